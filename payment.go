package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"sync/atomic"
	"time"
)

// settler decides what becomes of money: a payment seen, from whatever source, ends as a paid order or as a refund.
// Everything it does may be done again, in any order, at the same time and on several replicas.
type settler struct {
	store    *store
	gateway  *iamportClient
	now      func() time.Time
	log      *slog.Logger
	interval time.Duration // between two rounds of the reconciler, and the first pause before a refund is tried again
	hold     time.Duration // how long an unpaid order keeps its paintings

	// onTestHook, when set, is called between any two calls to the database or the gateway that change or decide something, about
	// a payment or an order, so that tests can stop one caller there. Nothing is locked then.
	onTestHook func(name, id string)

	lastRound atomic.Int64 // when the reconciler last finished a round, Unix nanoseconds
}

// refundLease is how long whoever tries a refund is alone with it: longer than a cancel and two look-ups may take.
const refundLease = 90 * time.Second

// Why money goes back, as the ledger and the history say it.
const (
	reasonAmount       = "amount differs"
	reasonSold         = "paintings gone"
	reasonDuplicate    = "order paid already"
	reasonCancelled    = "order cancelled"
	reasonBuyerCancel  = "buyer cancelled"
	reasonShopCancel   = "shop cancelled"
	reasonAtTheGateway = "refunded at the gateway"
)

// cancelReasons are those that cancel the order with its payment.
var cancelReasons = []string{reasonBuyerCancel, reasonShopCancel}

// settlement is what became of a payment.
type settlement struct {
	orderID string
	state   paymentState // kept, refunding, refunded; empty: it is no payment (yet), or its money never was ours to keep
	reason  string       // why the money goes back
}

// errNotOurs says that a payment is for no order of ours: the gateway's account may serve other shops.
var errNotOurs = errors.New("not a payment of ours")

// errRefundPending says that a refund is booked but not done; it goes on by itself.
var errRefundPending = errors.New("the refund is not done yet")

// decide is the whole rule of what becomes of payment p given the books of its order. What the ledger already says of
// the payment comes first: an answer of the gateway may be older than that.
func decide(p gatewayPayment) func(orderLedger) decision {
	return func(b orderLedger) decision {
		known := b.payment(p.impUID)
		money := p.status == gatewayPaid || p.status == gatewayCancelled // cancelled with a remainder is a part refund

		switch {
		case known != nil && known.state == stateRefunded, !money:
			return decision{}
		case p.fullyRefunded && known != nil:
			return decision{state: stateRefunded, reason: cmp.Or(known.reason, reasonAtTheGateway),
				cancel: known.state == stateKept || slices.Contains(cancelReasons, known.reason)}
		case p.fullyRefunded:
			return decision{state: stateRefunded, reason: reasonAtTheGateway}
		case known != nil && p.cancelled > known.refunded:
			return decision{state: known.state, reason: known.reason}
		case known != nil:
			return decision{}
		case !p.isKRW() || p.amount != b.total || p.cancelled != 0:
			return decision{state: stateRefunding, reason: reasonAmount}
		case b.status == 5:
			return decision{state: stateRefunding, reason: reasonCancelled}
		case b.status >= 0:
			return decision{state: stateRefunding, reason: reasonDuplicate}
		case !b.ended:
			return decision{state: stateKept, pay: true}
		case b.revivable:
			return decision{state: stateKept, pay: true, revive: true}
		default:
			return decision{state: stateRefunding, reason: reasonSold}
		}
	}
}

// Settle does what has to be done with payment p, which the gateway has just described to somebody outside. errNotOurs: it
// is for no order of ours.
func (t *settler) settleReported(ctx context.Context, by actor, p gatewayPayment) (settlement, error) {
	t.testHook("looked up", p.impUID)
	return t.settle(ctx, by, p)
}

// settle does what has to be done with payment p as the gateway has just described it. Every source comes through here: the
// browser, the gateway's notice, the reconciler, the shop. What it decides it finishes, even when the caller goes away.
func (t *settler) settle(ctx context.Context, by actor, p gatewayPayment) (settlement, error) {
	if !validID(p.merchantUID) {
		return settlement{}, errNotOurs
	}
	now := t.now()
	books, entry, err := t.store.recordSettlement(context.WithoutCancel(ctx), by, p, now, now.Add(refundLease), decide(p))
	if errors.Is(err, errNotFound) {
		return settlement{}, errNotOurs
	} else if err != nil {
		return settlement{}, fmt.Errorf("settle payment %s: %w", p.impUID, err)
	}
	t.testHook("booked", p.impUID)
	result := settlement{orderID: books.orderID, state: entry.state, reason: entry.reason}
	known := books.payment(p.impUID)
	if known != nil && (entry.state == "" || entry.state == known.state) {
		result.state, result.reason = known.state, known.reason
	}
	if entry.state != "" {
		t.logTransition(by, books, p, known, entry)
	}
	if known == nil && entry.state == stateRefunding {
		row := paymentRow{impUID: p.impUID, orderID: books.orderID, reason: entry.reason, isKRW: p.isKRW(), amount: p.amount, refunded: p.cancelled}
		if err := t.requestRefund(ctx, by, row); err == nil {
			result.state = stateRefunded
		}
		// A refund that failed is booked and goes on by itself; what becomes of the payment is known.
	}
	return result, nil
}

// attemptRefund carries out a booked and leased refund. The first attempt goes straight to the gateway; each further one looks
// first, since the answer to the one before may have been lost. errRefundPending (with the cause) when it did not
// succeed: the reconciler goes on with it.
func (t *settler) attemptRefund(ctx context.Context, by actor, row paymentRow) error {
	t.testHook("leased", row.impUID)
	if row.attempts > 1 {
		p, err := t.gateway.payment(ctx, row.impUID)
		if err != nil {
			return t.postponeRefund(ctx, row, err)
		}
		t.testHook("looked up", row.impUID)
		settled, err := t.settle(ctx, by, p)
		if err != nil {
			return t.postponeRefund(ctx, row, err)
		}
		if settled.state == stateRefunded {
			return nil
		}
		row.refunded = p.cancelled
	}
	return t.requestRefund(ctx, by, row)
}

// requestRefund asks the gateway for the whole remainder and books its answer. After any other answer than a success the
// payment is looked up, since the money may be back all the same.
func (t *settler) requestRefund(ctx context.Context, by actor, row paymentRow) error {
	ctx = context.WithoutCancel(ctx)
	p, cause := t.gateway.cancelPayment(ctx, cancelRequest{impUID: row.impUID, remaining: row.amount - row.refunded, isKRW: row.isKRW, reason: row.reason})
	t.testHook("cancelled", row.impUID)
	if cause != nil {
		var err error
		if p, err = t.gateway.payment(ctx, row.impUID); err != nil {
			return t.postponeRefund(ctx, row, cause)
		}
		t.testHook("looked up", row.impUID)
	}
	settled, err := t.settle(ctx, by, p)
	switch {
	case err != nil:
		return t.postponeRefund(ctx, row, err)
	case settled.state == stateRefunded:
		return nil
	case cause == nil:
		cause = fmt.Errorf("the gateway took the cancel but says %q", p.status)
	}
	return t.postponeRefund(ctx, row, cause)
}

// postponeRefund notes that a refund did not succeed and when it is tried again: after growing pauses, an hour at most.
func (t *settler) postponeRefund(ctx context.Context, row paymentRow, cause error) error {
	now := t.now()
	pause := min(t.interval<<min(row.attempts, 16), time.Hour)
	err := t.store.recordRefundFailure(context.WithoutCancel(ctx), row.impUID, cause.Error(), now, now.Add(pause))
	level := slog.LevelWarn
	if !gatewayResponded(cause) {
		level = slog.LevelDebug // that the gateway is silent the log says once, not for each refund
	}
	t.log.Log(ctx, level, "refund failed", "order", row.orderID, "imp_uid", row.impUID, "amount", row.amount, "attempt", row.attempts,
		"again_in", pause.String(), "cause", cause)
	return fmt.Errorf("%w: %w", errRefundPending, errors.Join(cause, err))
}

// refundOrder gives back the whole payment of a paid order and cancels it. errStale: it is not in from any more.
// errRefundPending: booked, and going on by itself.
func (t *settler) refundOrder(ctx context.Context, by actor, id string, from int, reason string) error {
	now := t.now()
	row, err := t.store.bookRefund(context.WithoutCancel(ctx), by, id, from, reason, now, now.Add(refundLease))
	if err != nil {
		return err
	}
	t.logTransition(by, orderLedger{orderID: id}, gatewayPayment{impUID: row.impUID, amount: row.amount, cancelled: row.refunded}, &paymentRow{state: stateKept}, decision{state: stateRefunding, reason: reason})
	return t.attemptRefund(ctx, by, row)
}

// retryOrderRefund goes on with the cancel of an order whose refund did not succeed at once. errStale: somebody is at it.
func (t *settler) retryOrderRefund(ctx context.Context, by actor, id string) error {
	now := t.now()
	row, err := t.store.claimOrderRefund(ctx, id, now, now.Add(refundLease))
	if err != nil {
		return err
	}
	return t.attemptRefund(ctx, by, row)
}

// Look asks the gateway whether money came for an unpaid order, and settles all of it. errNoPayment: none.
func (t *settler) checkUnpaid(ctx context.Context, by actor, id string) (kept settlement, err error) {
	if _, err := t.gateway.paidPayment(ctx, id); err != nil {
		return kept, err
	}
	t.testHook("money found", id)
	return t.settleAll(ctx, by, id) // others may stand behind the one that was found
}

// settleAll settles every payment that the gateway has for an order, whatever notice of it was lost. The settlement is
// that of the payment which the order keeps; the zero one when it keeps none.
func (t *settler) settleAll(ctx context.Context, by actor, id string) (kept settlement, err error) {
	payments, err := t.gateway.paymentsOf(ctx, id)
	if err != nil {
		return kept, err
	}
	for _, p := range payments {
		t.testHook("looked up", p.impUID)
		settled, problem := t.settle(ctx, by, p)
		err = errors.Join(err, problem)
		if settled.state == stateKept {
			kept = settled
		}
	}
	return kept, err
}

// discardUnpaid ends an unpaid order at its buyer's wish. Money already at the gateway wins: then the order is settled, not
// deleted. errStale: it is not unpaid any more.
func (t *settler) discardUnpaid(ctx context.Context, by actor, id string) error {
	settled, err := t.checkUnpaid(ctx, by, id)
	if err == nil && settled.state == stateKept {
		return errStale
	} else if err != nil && !errors.Is(err, errNoPayment) {
		return err
	}
	t.testHook("deleting", id)
	now := t.now()
	return t.store.endUnpaid(context.WithoutCancel(ctx), by, id, "deleted", now, now.Add(t.hold))
}

func (t *settler) testHook(step, id string) {
	if t.onTestHook != nil {
		t.onTestHook(step, id)
	}
}

// logTransition writes the one line that every movement of money has: a payment known, or its state or what went back of it
// changed. The end of a hold moves none.
func (t *settler) logTransition(by actor, b orderLedger, p gatewayPayment, known *paymentRow, entry decision) {
	from := paymentState("unknown")
	if known != nil {
		from = known.state
	}
	t.log.Info("money", "order", b.orderID, "imp_uid", p.impUID, "amount", p.amount, "refunded", p.cancelled,
		"from", from, "to", entry.state, "reason", entry.reason, "source", by.kind, "request", by.request)
}

// ---- PATCH /api/orders/pay and the gateway's notices

// pay answers PATCH /api/orders/pay: the browser reports a payment. It proves nothing; the gateway is asked.
func (s *server) pay(r *request) (any, error) {
	var body struct {
		ImpUID string `json:"imp_uid"`
	}
	if err := decodeBody(r, &body); err != nil {
		return nil, err
	}
	if !validImpUID(body.ImpUID) {
		return nil, fieldError("imp_uid", "결제 번호가 올바르지 않습니다")
	}
	settled, err := s.lookUpAndSettle(r, actor{kind: actorBuyer, request: r.id}, body.ImpUID)
	switch {
	case errors.Is(err, errNoPayment), errors.Is(err, errNotOurs):
		return nil, statusError(http.StatusNotFound, "imp_uid: 해당 결제 내역이 존재하지 않습니다")
	case errors.Is(err, errTooMany):
		return nil, tooManyError(http.StatusTooManyRequests, err)
	case err != nil:
		return nil, err
	case settled.state == stateKept:
		return message{"결제 성공"}, nil
	default:
		return nil, whyNotPaid(settled)
	}
}

// lookUpAndSettle settles a payment that a stranger speaks of. errTooMany: he has spoken of too many that are none.
func (s *server) lookUpAndSettle(r *request, by actor, impUID string) (settlement, error) {
	who := client{buyer: r.caller.id}
	if who.buyer == "" {
		who.address = clientAddress(r.Request, s.config.proxies)
	}
	p, err := s.limits.lookUp(r.Context(), who, by.kind, impUID, s.settler.gateway.payment)
	if err != nil {
		return settlement{}, err
	}
	settled, err := s.settler.settleReported(r.Context(), by, p)
	if errors.Is(err, errNotOurs) || err == nil && settled.state == "" {
		s.limits.penalize(who)
	}
	r.orderID = settled.orderID
	return settled, err
}

// tooManyError is the refusal of who has asked about too many payments that are none.
func tooManyError(status int, cause error) *httpError {
	return &httpError{status: status, body: message{messageTooMany}, retryAfter: clientLimit.refill, cause: cause}
}

// whyNotPaid is the refusal of a payment that pays nothing.
func whyNotPaid(settled settlement) error {
	switch settled.reason {
	case "":
		return statusError(http.StatusBadRequest, "imp_uid: 결제가 완료되지 않았습니다")
	case reasonAmount:
		return statusError(http.StatusBadRequest, "금액 불일치, 위조된 결제 시도")
	case reasonSold:
		return statusError(http.StatusConflict, "주문 시간이 지나 작품이 이미 판매되어 결제 금액을 환불합니다")
	case reasonDuplicate:
		return statusError(http.StatusConflict, "이미 결제된 주문이므로 중복된 결제 금액을 환불합니다")
	case reasonCancelled:
		return statusError(http.StatusConflict, "이미 취소된 주문이므로 결제 금액을 환불합니다")
	default:
		return statusError(http.StatusBadRequest, "imp_uid: 취소된 결제입니다")
	}
}

// webhook answers POST /api/payments/webhook: a notice of the gateway's, unsigned, so that it is a hint to look and no
// more. It is 200 once the payment is handled, whatever it is. A fault of ours, the gateway's silence and too many notices
// of nothing are a 5xx: on that alone the gateway sends a notice again, so that it is not 429.
func (s *server) webhook(r *request) (any, error) {
	impUID, err := noticeImpUID(r)
	if err != nil {
		return nil, err
	}
	_, err = s.lookUpAndSettle(r, actor{kind: actorGateway, request: r.id}, impUID)
	switch {
	case errors.Is(err, errTooMany):
		return nil, tooManyError(http.StatusServiceUnavailable, err)
	case err != nil && !errors.Is(err, errNoPayment) && !errors.Is(err, errNotOurs):
		return nil, err
	default:
		return message{"확인했습니다"}, nil
	}
}

// noticeImpUID is the imp_uid of a notice, which is JSON or a form as the gateway's console has it.
func noticeImpUID(r *request) (string, error) {
	body, err := readBody(r)
	if err != nil {
		return "", err
	}
	var notice struct {
		ImpUID string `json:"imp_uid"`
	}
	if trimmed := bytes.TrimSpace(body); len(trimmed) > 0 && trimmed[0] == '{' {
		if err := decodeJSON(body, "", &notice); err != nil {
			return "", err
		}
	} else {
		form, _ := url.ParseQuery(string(body)) // what can be read of a broken form is enough
		notice.ImpUID = form.Get("imp_uid")
	}
	if !validImpUID(notice.ImpUID) {
		return "", fieldError("imp_uid", "결제 번호가 올바르지 않습니다")
	}
	return notice.ImpUID, nil
}

// errSold says that a paid order has the painting.
var errSold = errors.New("a paid order has the painting")

// changeSale puts a painting on sale or takes it off sale. An unpaid order that holds a painting taken off sale ends,
// unless its money is at the gateway: then it is paid. errSold: a paid order has the painting. errNotFound: there is no
// such painting. errStale: it kept changing hands.
func (t *settler) changeSale(ctx context.Context, by actor, id string, forSale bool) error {
	// Each change names the order that has the painting. When that has changed, the painting is looked at anew.
	for range 5 {
		order, err := t.store.findPaintingOrder(ctx, id)
		if err != nil {
			return err
		}
		t.testHook("painting read", id)
		switch {
		case order.paid:
			return errSold
		case forSale || order.id == "":
			err = t.store.setForSale(context.WithoutCancel(ctx), id, order.id, forSale)
		default:
			if _, err := t.checkUnpaid(ctx, by, order.id); err != nil && !errors.Is(err, errNoPayment) {
				return err
			}
			t.testHook("withdrawing", order.id)
			now := t.now()
			err = t.store.withdrawPainting(context.WithoutCancel(ctx), by, id, order.id, now, now.Add(t.hold))
		}
		if err == nil {
			t.log.Info("sale state changed", "painting", id, "for_sale", forSale, "administrator", by.id, "request", by.request)
		}
		if !errors.Is(err, errStale) {
			return err
		}
	}
	return errStale
}
