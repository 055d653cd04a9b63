package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"
)

// Single paintings of a paid order: cancelled, asked back, and shown so, while others of the order are left.

// ---- what is shown

// shownItem is a painting of an order, and what became of it since.
type shownItem struct {
	Image   string `json:"image"`
	Title   string `json:"title"`
	Artist  string `json:"artist"`
	Size    string `json:"size"`
	Price   int64  `json:"price"`
	Product string `json:"product"`
	State   string `json:"state,omitempty"` // "returning" or "cancelled"
}

// itemsNow returns the order's paintings as they are shown, and the won of totalPrice that went back for those that are cancelled.
func (o order) itemsNow() (items json.RawMessage, refunded int64) {
	if o.status < statusReturning && len(o.returning)+len(o.cancelled) == 0 {
		return o.items, 0
	}
	var shown []shownItem
	json.Unmarshal(o.items, &shown) // the database made it
	for i := range shown {
		item := &shown[i]
		switch {
		case o.status == statusCancelled || slices.Contains(o.cancelled, item.Product):
			item.State = "cancelled"
			refunded += item.Price
		case o.status == statusReturning || slices.Contains(o.returning, item.Product):
			item.State = "returning"
		}
	}
	if o.status == statusCancelled {
		refunded = o.total // the shipping, too
	}
	return json.RawMessage(marshalRaw(shown)), refunded
}

// ---- what is asked for

// parseProducts returns the ids of paintings in a request, in lower case. The error is a 400.
func parseProducts(text json.RawMessage) ([]string, error) {
	var products []string
	if err := decodeJSON(text, "products", &products); err != nil {
		return nil, err
	}
	if len(products) == 0 {
		return nil, fieldError("products", "작품이 하나 이상 필요합니다")
	}
	for i, text := range products {
		id, ok := parseID(text)
		if !ok {
			return nil, partError(http.StatusBadRequest, i, "올바른 작품 ID가 아닙니다")
		}
		if slices.Contains(products[:i], id) {
			return nil, partError(http.StatusBadRequest, i, "같은 작품이 두 번 있습니다")
		}
		products[i] = id
	}
	return products, nil
}

// partError refuses a request because of the painting with this number in its products.
func partError(status, number int, problem string) error {
	return statusError(status, fmt.Sprintf("products[%d]: %s", number, problem))
}

// without returns the ids that are not among those taken away.
func without(ids, taken []string) []string {
	return slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return slices.Contains(taken, id) })
}

// left returns the paintings of the order that are not cancelled.
func (o orderState) left() []string { return without(o.products, o.cancelled) }

// leavesSome reports whether a cancel, or else a return, of these paintings leaves some of the order as they are; without any it
// is about all of them. The error is a 400 for a painting that is not in the order, and a 409 for one that is cancelled already.
func (o orderState) leavesSome(products []string, cancel bool) (bool, error) {
	for i, id := range products {
		switch {
		case !slices.Contains(o.products, id):
			return false, partError(http.StatusBadRequest, i, "주문에 없는 작품입니다")
		case slices.Contains(o.cancelled, id):
			return false, partError(http.StatusConflict, i, "이미 취소된 작품입니다")
		}
	}
	rest := without(o.left(), products)
	if products == nil || len(rest) == 0 {
		return false, nil
	}
	again := slices.ContainsFunc(products, func(id string) bool { return slices.Contains(o.returning, id) })
	return cancel || again || len(without(rest, o.returning)) > 0, nil
}

// isReturning reports whether the painting's return was asked for.
func (o orderState) isReturning(id string) bool {
	return o.status == statusReturning || slices.Contains(o.returning, id)
}

// requestPartReturn asks for the return of some of an order's paintings.
func (s *server) requestPartReturn(r *request, state orderState, products []string) error {
	for i, id := range products {
		if state.isReturning(id) {
			return partError(http.StatusConflict, i, "이미 반품을 요청한 작품입니다")
		}
	}
	return s.store.changeReturning(r.Context(), r.actor(), state, state.status, slices.Concat(state.returning, products), s.now())
}

// withdrawPartReturn takes the return request of some of an order's paintings back, and says where the order is then. It returns
// errStale when the order is in another state by now.
func (s *server) withdrawPartReturn(r *request, id string, wanted orderChange) (string, error) {
	state, err := s.store.findOrderState(r.Context(), id, r.caller, s.now())
	if err != nil {
		return "", err
	}
	s.settler.testHook("state read", id)
	if state.ended {
		return "", errNotFound
	}
	if wanted.parcel != nil || wanted.status == nil || *wanted.status != state.status || state.status < statusPaid || state.status > statusReturning || state.cancelling {
		return "", errWrongStep
	}
	if _, err := state.leavesSome(wanted.products, true); err != nil {
		return "", err
	}
	for i, id := range wanted.products {
		if !state.isReturning(id) {
			return "", partError(http.StatusConflict, i, "반품을 요청하지 않은 작품입니다")
		}
	}
	to, returning := state.status, state.returning
	if state.status == statusReturning {
		to, returning = state.cameFrom, state.left()
	}
	return advanceMessages[to], s.store.changeReturning(r.Context(), r.actor(), state, to, without(returning, wanted.products), s.now())
}

// cancelPart gives back the price of some of a paid order's paintings, while others are left. An administrator accepts the return
// of those that were asked back.
func (s *server) cancelPart(r *request, state orderState, products []string) error {
	if state.cancelling {
		err := s.settler.retryPartRefund(r.Context(), r.actor(), state.id, products)
		if errors.Is(err, errStale) {
			return s.whileCancelling(r, state)
		}
		return whyPartNotRefunded(err)
	}
	for _, id := range products {
		switch returning := state.isReturning(id); {
		case returning && !r.caller.admin:
			return errReturnRequested
		case !returning && state.status != statusPaid:
			return errOnlyReturn
		}
	}
	err := s.settler.refundPart(r.Context(), r.actor(), state, partRefund{id: s.newID(s.now()), products: products, reason: r.cancelReason()})
	return whyPartNotRefunded(err)
}

// whyPartNotRefunded returns what the client sees of a part refund that did not succeed at once.
func whyPartNotRefunded(err error) error {
	if errors.Is(err, errPartRefused) {
		return &httpError{status: http.StatusConflict, body: message{"결제사가 일부 금액의 환불을 거절하여 취소하지 못했습니다"}, cause: err}
	}
	return whyRefundPending(err)
}

// ---- the money of a part

// errPartRefused says that the gateway refused a part refund, which is undone.
var errPartRefused = errors.New("the gateway refused the part refund")

// gatewayReason returns the reason that the gateway is given. It has the id by which the gateway's list of refunds tells this one
// from those made in its console.
func (r partRefund) gatewayReason() string { return "part " + r.id + ": " + r.reason }

// refundPart books the refund of some of an order's paintings and asks the gateway for it. It returns errStale when the order is
// in another state than the one that was read, errPartRefused when the gateway refused and the refund is undone,
// errRefundPending when it is booked and goes on by itself, and errBusy.
func (t *settler) refundPart(ctx context.Context, by actor, state orderState, part partRefund) error {
	end, err := t.limits.begin(ctx, by.client)
	if err != nil {
		return err
	}
	defer end()
	part, err = t.store.bookPart(context.WithoutCancel(ctx), by, state, part, t.now())
	if err != nil {
		return err
	}
	t.logPart(slog.LevelInfo, part, "part refund booked", nil)
	return t.attemptPart(ctx, by, part)
}

// retryPartRefund goes on with the refund of exactly these paintings, which did not succeed at once. It returns errStale when
// there is none, or when another caller is at it.
func (t *settler) retryPartRefund(ctx context.Context, by actor, order string, products []string) error {
	end, err := t.limits.begin(ctx, by.client)
	if err != nil {
		return err
	}
	defer end()
	part, err := t.store.claimPart(ctx, order, products, t.now())
	if err != nil {
		return err
	}
	return t.attemptPart(ctx, by, part)
}

// attemptPart carries out a booked and leased part refund. As attemptRefund does, it looks the payment up before it asks again.
func (t *settler) attemptPart(ctx context.Context, by actor, part partRefund) error {
	ctx = context.WithoutCancel(ctx)
	t.testHook("leased", part.payment.impUID)
	if part.attempts > 1 {
		p, err := askFor(ctx, t.limits, by, func(ctx context.Context) (gatewayPayment, error) {
			return t.gateways.find(ctx, part.payment.gateway, part.payment.key())
		})
		if err != nil {
			return t.postponePart(ctx, part, err)
		}
		t.testHook("looked up", part.payment.impUID)
		ended, err := t.settlePart(ctx, by, part, p)
		if ended || err != nil {
			return err
		}
		part.payment.refunded = p.cancelled
	}
	return t.requestPart(ctx, by, part)
}

// requestPart asks the gateway for exactly the part's amount, with what is left of the payment as the guard, and books its
// answer. A refusal that may be due to another remainder than we knew is followed by one more try with the fresh one; any other
// undoes the refund.
func (t *settler) requestPart(ctx context.Context, by actor, part partRefund) error {
	g, err := t.gateways.named(part.payment.gateway)
	if err != nil {
		return t.postponePart(ctx, part, err)
	}
	for again := true; ; again = false {
		p, cause := g.cancelPayment(ctx, cancelRequest{orderID: part.payment.orderID, impUID: part.payment.impUID, amount: part.amount, part: part.id, refusals: part.refusals,
			remaining: part.payment.amount - part.payment.refunded, isKRW: part.payment.isKRW, reason: part.gatewayReason()})
		t.testHook("cancelled", part.payment.impUID)
		if cause != nil {
			p, err = askFor(ctx, t.limits, by, func(ctx context.Context) (gatewayPayment, error) { return g.find(ctx, part.payment.key()) })
			if err != nil {
				return t.postponePart(ctx, part, cause)
			}
			t.testHook("looked up", part.payment.impUID)
		} else if p.cancelled-p.refundsListed >= part.amount && !p.gaveBack(part.id) {
			p.refundReasons += part.gatewayReason() // the answer to our own request needs no list
			p.refundsListed += part.amount
		}
		ended, err := t.settlePart(ctx, by, part, p)
		switch {
		case ended || err != nil:
			return err
		case refused(cause) && again && p.cancelled != part.payment.refunded:
			part.payment.refunded = p.cancelled
		case refused(cause):
			return t.undoPart(ctx, by, part, cause)
		default:
			return t.postponePart(ctx, part, cmp.Or(cause, errors.New("the gateway took the cancel but does not list it")))
		}
	}
}

// settlePart settles the part's payment p and reports whether the part has ended: it is done, or all of the payment went back. An
// error says that it was postponed, or undone because the gateway took it and it failed there. When the gateway gave back more than
// it lists, nobody knows whether the part is among it, and it must not be asked for again.
func (t *settler) settlePart(ctx context.Context, by actor, part partRefund, p gatewayPayment) (ended bool, err error) {
	settled, err := t.settle(ctx, by, p)
	switch {
	case err != nil:
		return false, t.postponePart(ctx, part, err)
	case settled.partEnded(part.id):
		return true, nil
	case p.refundPending:
		return false, t.postponePart(ctx, part, errRefundTaken)
	case strings.Contains(p.failedReasons, part.id):
		return false, t.undoPart(ctx, by, part, &gatewayRefusal{code: "FAILED"})
	case p.cancelled > p.refundsListed && p.cancelled > part.payment.amount-part.remainingBefore:
		return false, t.postponePart(ctx, part, errors.New("the gateway does not list all that it gave back"))
	}
	return false, nil
}

// postponePart notes that a part refund did not succeed and when it is tried again.
func (t *settler) postponePart(ctx context.Context, part partRefund, cause error) error {
	err := t.store.recordPartFailure(ctx, part.id, cause, t.now(), t.pauseAfter(part.attempts))
	level, what := slog.LevelWarn, "part refund failed"
	switch { // as for a whole refund
	case !gatewayResponded(cause):
		level = slog.LevelDebug
	case errors.Is(cause, errRefundTaken):
		level, what = slog.LevelInfo, "part refund under way"
	}
	t.logPart(level, part, what, cause)
	return fmt.Errorf("%w: %w", errRefundPending, errors.Join(cause, err))
}

// undoPart ends a part refund that the gateway refused. It returns errPartRefused, and errStale when the refund has ended
// otherwise.
func (t *settler) undoPart(ctx context.Context, by actor, part partRefund, cause error) error {
	if err := t.store.undoPart(ctx, by, part, cause, t.now()); err != nil {
		return err
	}
	t.logPart(slog.LevelWarn, part, "part refund refused", cause)
	return fmt.Errorf("%w: %w", errPartRefused, cause)
}

func (t *settler) logPart(level slog.Level, part partRefund, what string, cause error) {
	t.log.Log(context.Background(), level, what, "order", part.payment.orderID, "imp_uid", part.payment.impUID, "part", part.id, "amount", part.amount,
		"attempt", part.attempts, "cause", cause)
}

// retryParts tries every part refund that is due.
func (t *settler) retryParts(ctx context.Context) error {
	for until := t.now().Add(t.interval); ctx.Err() == nil && t.now().Before(until); {
		due, err := t.store.claimDueParts(ctx, maxParallel, t.now())
		if err != nil || len(due) == 0 {
			return err
		}
		if !forEachParallel(due, func(part partRefund) bool { return gatewayResponded(t.attemptPart(ctx, byReconciler, part)) }) {
			return nil // each failure is noted with its part and comes back after its pause
		}
	}
	return nil
}

// pauseAfter returns how long a refund waits after so many attempts: ever longer, an hour at most.
func (t *settler) pauseAfter(attempts int) time.Duration {
	return min(t.interval<<min(attempts, 16), time.Hour)
}
