package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/http"
	"slices"
	"sync/atomic"
	"time"
)

// settler decides what becomes of money: a payment that is seen, from whatever source, ends as a paid order or as a refund.
// Each of its calls may be repeated, in any order, at the same time and on several replicas.
type settler struct {
	store    *store
	gateways gateways
	limits   *limiter // of what clients have the gateways asked
	now      func() time.Time
	log      *slog.Logger
	interval time.Duration // between two rounds of the reconciler, and the first pause before a refund is tried again
	hold     time.Duration // how long an unpaid order keeps its paintings
	keep     time.Duration // how long a paid order keeps personal data

	// onTestHook is nil but in tests. It is called between any two calls to the database or the gateway that change or
	// decide something about a payment or an order, so that a test can stop one caller there. Nothing is locked then.
	onTestHook func(point, id string)

	lastRound  atomic.Int64             // when the reconciler last finished a round, Unix nanoseconds
	unreadable recent[string, struct{}] // payments of the lists that the log has named as unreadable; the reconciler's alone
}

// gateway is a payment gateway, as far as the program needs it.
type gateway interface {
	name() gatewayName
	// find looks up one payment.
	find(context.Context, paymentKey) (gatewayPayment, error)
	// paymentsOf lists every payment of an order that is paid, and then those that are cancelled: refunded in part or whole, or
	// ended without a deposit. None is an empty list, not an error. Windows that were opened and not paid are left out: a buyer
	// may open any number.
	//
	// A payment that cannot be read is named by the error, a gatewayError with unreadable set, and the list holds all others.
	// After any other error there is no list.
	paymentsOf(ctx context.Context, orderID string) ([]gatewayPayment, error)
	// paidPaymentsOf lists the payments of an order that are paid and not refunded, not even in part, as paymentsOf does.
	paidPaymentsOf(ctx context.Context, orderID string) ([]gatewayPayment, error)
	// movedBetween yields the payments that are in a status now and got there between two times: for gatewayPaid those paid
	// then, for gatewayCancelled those cancelled then. Both ends are included, to the second. A payment that is refunded while
	// the list is read may be missing from the paid ones; it is among those cancelled after that.
	//
	// A payment that cannot be read is yielded as an error, a gatewayError with unreadable set, and the others follow. Any other
	// error is the last: what is listed after it is not known.
	movedBetween(ctx context.Context, status gatewayStatus, from, to time.Time) iter.Seq2[gatewayPayment, error]
	// cancelPayment gives back all that is left of a payment, or a part of it. Once begun it goes on when its caller goes away. After a
	// gatewayError nobody knows whether the money went back: look the payment up before trying again.
	cancelPayment(context.Context, cancelRequest) (gatewayPayment, error)
	// endAccount ends an issued virtual account, so that nobody can pay into it any more. A gatewayRefusal: the payment is no
	// virtual account or not one that waits for a deposit. After a gatewayError nobody knows whether the account has ended.
	endAccount(context.Context, paymentKey) error
}

// refundLease is how long a caller that tries a refund is alone with it: longer than two cancels and look-ups may take.
const refundLease = 150 * time.Second

// stuckAfter is how many refusals by the gateway make a refund one that needs a person.
const stuckAfter = 3

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

// cancelReasons are those that cancel the order with its payment. The schema's orders_and_payments_agree knows them too.
var cancelReasons = []string{reasonBuyerCancel, reasonShopCancel}

// settlement is what became of a payment.
type settlement struct {
	orderID string
	state   paymentState // empty: no money moved with it (yet), or it was never ours to keep
	reason  string       // why the money goes back
	parts   []ledgerPart // the refunds of parts of it
}

// partEnded reports whether the part refund id is not under way any more.
func (s settlement) partEnded(id string) bool {
	return slices.ContainsFunc(s.parts, func(part ledgerPart) bool { return part.ID == id && part.State != partBooked })
}

var (
	// errNotOurs says that a payment is for no order of ours: the gateway's account may serve other shops.
	errNotOurs = errors.New("not a payment of ours")
	// errOtherOrder says that the ledger has the payment for another order than the gateway now names.
	errOtherOrder = errors.New("the payment belongs to another order")
	// errDepositAwaited says that the payment was a virtual account without a deposit. The account has been ended.
	errDepositAwaited = errors.New("the payment awaited a deposit")
	// errRefundPending says that a refund is booked but not done. It goes on by itself.
	errRefundPending = errors.New("the refund is not done yet")
)

// decide returns the whole rule of what becomes of payment p given the ledger of its order, and of the refund of a part of it
// that is under way: it is done once the gateway lists it, and it ends with the whole payment.
func decide(p gatewayPayment) func(orderLedger) decision {
	return func(l orderLedger) decision {
		known := l.payment(p.impUID)
		decided := decideWhole(p, known, l)
		part := known.bookedPart()
		switch {
		case part == "":
			return decided
		case p.gaveBack(part):
			decided.part, decided.partState = part, partDone
		case known.state == stateRefunded || decided.state == stateRefunded:
			decided.part, decided.partState = part, partUndone
		}
		if decided.part != "" && decided.state == "" {
			decided.state, decided.reason = known.state, known.reason
		}
		return decided
	}
}

// decideWhole is decide without the parts; known is the ledger's row of the payment. What the ledger already says of the payment
// comes first: an answer of the gateway may be older than that.
func decideWhole(p gatewayPayment, known *paymentRow, l orderLedger) decision {
	switch {
	case !p.moved, known != nil && known.state == stateRefunded:
		return decision{}
	case p.fullyRefunded && known != nil:
		ours := slices.Contains(cancelReasons, known.reason)
		return decision{state: stateRefunded, reason: cmp.Or(known.reason, reasonAtTheGateway),
			cancel: known.state == stateKept || ours, offSale: !ours && l.status >= statusShipping}
	case p.fullyRefunded:
		return decision{state: stateRefunded, reason: reasonAtTheGateway}
	case known != nil && p.cancelled > known.refunded:
		return decision{state: known.state, reason: known.reason}
	case known != nil, p.status != gatewayPaid && p.status != gatewayCancelled:
		return decision{}
	case !p.isKRW() || p.amount != l.total || p.cancelled != 0 || p.refundPending:
		return decision{state: stateRefunding, reason: reasonAmount}
	case l.status == statusCancelled:
		return decision{state: stateRefunding, reason: reasonCancelled}
	case l.status >= statusPaid:
		return decision{state: stateRefunding, reason: reasonDuplicate}
	case !l.ended:
		return decisionToPay
	case l.revivable:
		return decision{state: stateKept, pay: true, revive: true}
	default:
		return decision{state: stateRefunding, reason: reasonSold}
	}
}

// decisionToPay is what becomes of a payment that pays its unpaid order.
var decisionToPay = decision{state: stateKept, pay: true}

// paysUnpaid reports whether p pays an unpaid order of its amount whose ledger does not have p.
func (p gatewayPayment) paysUnpaid() bool {
	return decide(p)(orderLedger{status: statusUnpaid, total: p.amount}) == decisionToPay
}

// paymentReport says that there is a payment. It proves nothing: the gateway is asked.
type paymentReport struct {
	gateway gateway
	key     paymentKey
	orderID string // a notice's: for which order it says the payment is; "" when it does not
	signed  bool   // by the gateway: it is not counted as a stranger's, who may invent any number of payments
}

// id returns what the limiter knows the payment by.
func (r paymentReport) id() string { return cmp.Or(r.key.impUID, "order "+r.key.orderID) }

// field returns what the client calls the payment.
func (r paymentReport) field() string {
	if r.gateway.name() == gatewayPortOne {
		return "paymentId"
	}
	return "imp_uid"
}

// find looks the payment up. It returns errNotOurs for one that says itself that it is another shop's.
func (r paymentReport) find(ctx context.Context) (gatewayPayment, error) {
	p, err := r.gateway.find(ctx, r.key)
	if err == nil && !validID(p.merchantUID) {
		err = errNotOurs
	}
	return p, err
}

// settleReported looks up the payment that by's client speaks of and settles it. Besides settle's errors it returns
// errNoPayment, errTooMany when the client has spoken of too many that are none, and errBusy.
func (t *settler) settleReported(ctx context.Context, by actor, report paymentReport) (settlement, error) {
	end, err := t.limits.begin(ctx, by.client)
	if err != nil {
		return settlement{}, err
	}
	defer end()
	return t.settleInTurn(ctx, by, report)
}

// settleInTurn is settleReported for a caller that has its client's turn.
func (t *settler) settleInTurn(ctx context.Context, by actor, report paymentReport) (settlement, error) {
	lookUp := func() (gatewayPayment, error) {
		return t.limits.lookUp(ctx, by.client, by.kind, report.id(), report.find)
	}
	if report.signed {
		lookUp = func() (gatewayPayment, error) { return askFor(ctx, t.limits, by, report.find) }
	}
	p, err := lookUp()
	if err != nil {
		return settlement{}, err
	}
	t.testHook("looked up", p.impUID)
	settled, err := t.settle(ctx, by, p)
	switch {
	case errors.Is(err, errNotOurs):
		t.limits.recordForeign(report.id())
	case report.signed:
	case errors.Is(err, errOtherOrder) || err == nil && settled.state == "":
		t.limits.penalize(by.client)
	}
	return settled, err
}

// settle does what has to be done with payment p as the gateway has just described it. Every source comes through here: the
// browser, the gateway's notice, the reconciler, the administrator. It finishes what it decides, even when the caller goes
// away. It returns errNotOurs, errOtherOrder and errDepositAwaited.
func (t *settler) settle(ctx context.Context, by actor, p gatewayPayment) (settlement, error) {
	if !validID(p.merchantUID) {
		return settlement{}, errNotOurs
	}
	ctx = context.WithoutCancel(ctx)
	ledger, decided, err := t.store.recordSettlement(ctx, by, p, t.now(), decide(p))
	switch {
	case errors.Is(err, errNotFound):
		return settlement{}, errNotOurs
	case errors.Is(err, errOtherOrder):
		return settlement{orderID: ledger.orderID}, err
	case err != nil:
		return settlement{}, fmt.Errorf("settle payment %s: %w", p.impUID, err)
	}
	t.testHook("booked", p.impUID)
	result := settlement{orderID: ledger.orderID, state: decided.state, reason: decided.reason}
	known := ledger.payment(p.impUID)
	if known != nil && (decided.state == "" || decided.state == known.state) {
		result.state, result.reason = known.state, known.reason
	}
	if known != nil {
		result.parts = slices.Clone(known.parts)
		for i, part := range result.parts {
			if part.ID == decided.part {
				result.parts[i].State = decided.partState
			}
		}
	}
	if decided.state != "" {
		t.logTransition(by, ledger.orderID, p, known, decided)
	}
	switch {
	case p.awaitsDeposit:
		return result, t.endDepositAccount(ctx, p)
	case known == nil && decided.state == stateRefunding:
		row := paymentRow{gateway: p.gateway, impUID: p.impUID, orderID: ledger.orderID, reason: decided.reason, isKRW: p.isKRW(), amount: p.amount, refunded: p.cancelled}
		if err := t.requestRefund(ctx, by, row); err == nil {
			result.state = stateRefunded
		}
		// A refund that failed is booked and goes on by itself. What becomes of the payment is known.
	}
	return result, nil
}

// endDepositAccount ends the virtual account that payment p of one of our orders awaits a deposit to, and returns errDepositAwaited.
// An original is not held for the days that a deposit may take. A deposit that comes all the same is late money as any other.
func (t *settler) endDepositAccount(ctx context.Context, p gatewayPayment) error {
	g, err := t.gateways.named(p.gateway)
	if err == nil {
		err = g.endAccount(ctx, p.key())
	}
	if !gatewayResponded(err) {
		return err
	}
	// A refusal means that the account has ended already, or that the buyer has just paid in: then a notice follows.
	t.log.Info("virtual account ended", "order", p.merchantUID, "imp_uid", p.impUID, "cause", err)
	return errDepositAwaited
}

// checkUnpaid asks the gateways whether money came for an unpaid order, and settles all of it, as settleAll does. It returns
// errNoPayment when none came.
func (t *settler) checkUnpaid(ctx context.Context, by actor, id string) (settlement, error) {
	paid, err := askFor(ctx, t.limits, by, func(ctx context.Context) ([]gatewayPayment, error) { return t.gateways.paidPaymentsOf(ctx, id) })
	if len(paid) == 0 {
		return settlement{}, cmp.Or(err, errNoPayment)
	}
	t.testHook("money found", id)
	return t.settleAll(ctx, by, id) // others may stand beside the one that was found
}

// settleAll settles every payment that the gateways have for an order. The settlement is that of the payment which the order
// keeps; the zero one when it keeps none. A payment that cannot be read or settled is an error, and does not stand in the
// way of the others.
func (t *settler) settleAll(ctx context.Context, by actor, id string) (kept settlement, err error) {
	payments, err := askFor(ctx, t.limits, by, func(ctx context.Context) ([]gatewayPayment, error) { return t.gateways.paymentsOf(ctx, id) })
	for _, p := range payments {
		t.testHook("looked up", p.impUID)
		settled, problem := t.settle(ctx, by, p)
		if !errors.Is(problem, errOtherOrder) {
			err = errors.Join(err, problem)
		}
		if settled.state == stateKept {
			kept = settled
		}
	}
	return kept, err
}

// discardUnpaid ends an unpaid order at its buyer's wish. Money already at the gateway wins: then the order is settled, not
// ended, and errStale returned, as when the order is not unpaid any more.
func (t *settler) discardUnpaid(ctx context.Context, by actor, id string) error {
	end, err := t.limits.begin(ctx, by.client)
	if err != nil {
		return err
	}
	defer end()
	if err := t.confirmUnpaid(ctx, by, id); err != nil {
		return err
	}
	t.testHook("deleting", id)
	return t.store.endUnpaid(context.WithoutCancel(ctx), by, id, "deleted", t.now())
}

// confirmUnpaid asks the gateway whether money came for an unpaid order, which may end when none did. It returns errStale when
// the order is paid by it now.
func (t *settler) confirmUnpaid(ctx context.Context, by actor, id string) error {
	settled, err := t.checkUnpaid(ctx, by, id)
	switch {
	case settled.state == stateKept:
		return errStale
	case errors.Is(err, errNoPayment):
		return nil
	default:
		return err
	}
}

func (t *settler) testHook(point, id string) {
	if t.onTestHook != nil {
		t.onTestHook(point, id)
	}
}

// logTransition writes the one line that every movement of money has: a payment became known, or its state or what went
// back of it changed. The end of a hold moves none.
func (t *settler) logTransition(by actor, orderID string, p gatewayPayment, known *paymentRow, decided decision) {
	from := paymentState("unknown")
	if known != nil {
		from = known.state
	}
	t.log.Info("money", "order", orderID, "imp_uid", p.impUID, "amount", p.amount, "refunded", p.cancelled,
		"from", from, "to", decided.state, "reason", decided.reason, "source", by.kind, "request", by.request)
}

// ---- PATCH /api/orders/pay

// pay answers PATCH /api/orders/pay: the browser reports a payment. The report proves nothing; the gateway is asked.
func (s *server) pay(r *request) (any, error) {
	var body struct {
		ImpUID    string `json:"imp_uid"`
		PaymentID string `json:"paymentId"`
		TxID      string `json:"txId"`         // of whichever attempt the browser knows; the gateway says which was paid
		Token     string `json:"paymentToken"` // under manual approval
	}
	if err := decodeBody(r, &body); err != nil {
		return nil, err
	}
	report, err := s.readReport(body.ImpUID, body.PaymentID)
	if err != nil {
		return nil, err
	}
	by, settled := actor{kind: actorBuyer, client: s.clientOf(r), request: r.id}, settlement{}
	if body.Token == "" {
		settled, err = s.settler.settleReported(r.Context(), by, *report)
	} else if _, ok := report.gateway.(confirmer); ok {
		approval := confirmRequest{orderID: report.key.orderID, token: body.Token, txID: body.TxID}
		settled, err = s.settler.confirmReported(r.Context(), by, *report, approval)
	} else {
		return nil, fieldError("paymentToken", "paymentId와 함께 보내야 합니다")
	}
	r.orderID = settled.orderID
	switch {
	case err != nil:
		return nil, cmp.Or(whyNotConfirmed(err), whyNotSettled(*report, err), err)
	case settled.state == stateKept:
		return message{"결제 성공"}, nil
	default:
		return nil, whyNotPaid(*report, settled)
	}
}

// readReport returns the report of a V1 payment by its imp_uid, or of a V2 payment by its paymentId, which is the order's id.
func (s *server) readReport(impUID, paymentID string) (*paymentReport, error) {
	orderID, isID := parseID(paymentID)
	switch {
	case impUID != "" && paymentID != "":
		return nil, fieldError("paymentId", "imp_uid와 함께 보낼 수 없습니다")
	case paymentID != "" && !isID:
		return nil, fieldError("paymentId", "결제 번호가 올바르지 않습니다")
	case paymentID != "":
		return s.reportOf(gatewayPortOne, paymentKey{orderID: orderID})
	case !validImpUID(impUID):
		return nil, fieldError("imp_uid", "결제 번호가 올바르지 않습니다")
	}
	return s.reportOf(gatewayIamport, paymentKey{impUID: impUID})
}

// reportOf returns the report of a payment at a gateway, or a 400 when that is not configured.
func (s *server) reportOf(name gatewayName, key paymentKey) (*paymentReport, error) {
	report := &paymentReport{key: key}
	var err error
	if report.gateway, err = s.settler.gateways.named(name); err == nil {
		return report, nil
	}
	if name == gatewayPortOne {
		return nil, fieldError("paymentId", "PortOne V2 결제는 받지 않습니다")
	}
	return nil, fieldError("imp_uid", "PortOne V1 결제는 받지 않습니다")
}

// clientOf returns who is charged for what a request makes us ask the gateway.
func (s *server) clientOf(r *request) client {
	if r.caller.id != "" {
		return r.caller.client()
	}
	return client{address: clientAddress(r.Request, s.config.proxies)}
}

// whyNotSettled returns what the client sees of an error that says what the payment is; nil for any other error.
func whyNotSettled(report paymentReport, err error) error {
	switch {
	case errors.Is(err, errNoPayment), errors.Is(err, errNotOurs):
		return statusError(http.StatusNotFound, report.field()+": 해당 결제 내역이 존재하지 않습니다")
	case errors.Is(err, errOtherOrder):
		return statusError(http.StatusConflict, report.field()+": 이미 다른 주문에 사용된 결제입니다")
	case errors.Is(err, errDepositAwaited):
		return statusError(http.StatusConflict, "가상계좌로는 결제할 수 없어 발급된 계좌를 해지했습니다. 다른 결제 수단을 이용해 주세요")
	default:
		return nil
	}
}

// whyNotPaid refuses a payment that pays nothing.
func whyNotPaid(report paymentReport, settled settlement) error {
	switch settled.reason {
	case "":
		return fieldError(report.field(), "결제가 완료되지 않았습니다")
	case reasonAmount:
		return statusError(http.StatusBadRequest, "금액 불일치, 위조된 결제 시도")
	case reasonSold:
		return statusError(http.StatusConflict, "주문 시간이 지나 작품이 이미 판매되어 결제 금액을 환불합니다")
	case reasonDuplicate:
		return statusError(http.StatusConflict, "이미 결제된 주문이므로 중복된 결제 금액을 환불합니다")
	case reasonCancelled:
		return statusError(http.StatusConflict, "이미 취소된 주문이므로 결제 금액을 환불합니다")
	default:
		return fieldError(report.field(), "취소된 결제입니다")
	}
}
