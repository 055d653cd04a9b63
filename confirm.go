package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
)

// Under manual approval the buyer's browser gets a token, and nothing is charged until the payment is confirmed with it.

// confirmer is a gateway that has it.
type confirmer interface {
	gateway
	// confirm charges the buyer. Once begun it goes on when its caller goes away. After a gatewayRefusal this call has charged
	// nothing, though another may have before. After a gatewayError nobody knows: look the payment up.
	confirm(context.Context, confirmRequest) error
}

// confirmationLease is how long an order is reserved for the confirmation of its payment: longer than that and the look-up after
// it may take.
const confirmationLease = refundLease

// Why an order cannot be paid. Nothing has been charged then.
var (
	errOrderEnded      = errors.New("the unpaid order has ended")
	errOrderPaid       = errors.New("the order is paid already")
	errOrderCancelled  = errors.New("the order is cancelled")
	errOrderConfirming = errors.New("the order's payment is being confirmed")
)

// whyNotReserved returns the reason why an order was not reserved.
func (p payable) whyNotReserved() error {
	switch {
	case p.ended:
		return errOrderEnded
	case p.confirming:
		return errOrderConfirming
	case p.status == statusCancelled:
		return errOrderCancelled
	default:
		return errOrderPaid
	}
}

// confirmReported carries out a payment under manual approval that a client reports, as confirmPayment does. When its order
// cannot be had, the payment may have been made already: then it is settled, as settleReported does.
func (t *settler) confirmReported(ctx context.Context, by actor, report paymentReport, c confirmRequest) (settlement, error) {
	end, err := t.limits.begin(ctx, by.client)
	if err != nil {
		return settlement{}, err
	}
	defer end()
	settled, err := t.confirmPayment(ctx, by, report.gateway.(confirmer), c)
	switch {
	case errors.Is(err, errOrderEnded), errors.Is(err, errOrderPaid), errors.Is(err, errOrderCancelled), errors.Is(err, errOrderConfirming):
		// There is such an order, so a report that comes too late is no stranger's: it is charged to the order, if at all.
		by.client = client{order: c.orderID}
		made, problem := t.settleInTurn(ctx, by, report)
		if problem != nil && !errors.Is(problem, errNoPayment) || made.state != "" {
			return made, problem
		}
	case refused(err):
		t.limits.penalize(client{order: c.orderID})
	case errors.Is(err, errNotFound), errors.Is(err, errNoPayment):
		t.limits.penalize(by.client)
	}
	return settled, err
}

// confirmPayment charges a payment under manual approval and settles it. The order is reserved first, so that it cannot end while
// the buyer is charged; an order that cannot be had is not charged. Whatever the gateway answers then, the payment is looked up.
// After a lost answer the reservation goes on for the rest of confirmationLease: by then the reconciler, a notice or the same
// report again has found the payment, or there is none.
//
// It returns errNotFound, the reasons of whyNotReserved, errNoPayment, and the refusals and the errors of the gateway.
func (t *settler) confirmPayment(ctx context.Context, by actor, g confirmer, c confirmRequest) (settlement, error) {
	ctx = context.WithoutCancel(ctx)
	now := t.now()
	until := now.Add(confirmationLease)
	order, err := t.store.reserveForPayment(ctx, by, c.orderID, now, until)
	switch {
	case err != nil:
		return settlement{}, err
	case !order.reserved:
		return settlement{orderID: c.orderID}, order.whyNotReserved()
	}
	t.testHook("reserved", c.orderID)
	c.total = order.total
	cause := g.confirm(ctx, c)
	t.testHook("confirmed", c.orderID)
	settled, err := t.settleConfirmed(ctx, by, g, c.orderID)
	switch {
	case err == nil && settled.state != "":
		return settled, nil
	case err == nil && (refused(cause) || errors.Is(cause, errNoPayment)):
		return settlement{orderID: c.orderID}, errors.Join(cause, t.store.releaseReservation(ctx, c.orderID, until, t.now()))
	case err == nil:
		err = cmp.Or(cause, errNotShown)
	case cause != nil:
		err = fmt.Errorf("%w; the confirmation before: %v", err, cause) // which is no reason that nothing was charged
	}
	return settlement{orderID: c.orderID}, errors.Join(err, t.store.checkSoon(ctx, c.orderID, t.now()))
}

// errNotShown says that the gateway took a confirmation and does not show the payment as paid. It will, or else nothing was charged.
var errNotShown error = &gatewayError{status: http.StatusBadGateway, call: "confirm", err: errors.New("the payment is confirmed, but not shown as paid")}

// settleConfirmed looks up the payment of an order and settles it. The settlement is the zero one when there is no payment.
func (t *settler) settleConfirmed(ctx context.Context, by actor, g gateway, orderID string) (settlement, error) {
	p, err := g.find(ctx, paymentKey{orderID: orderID})
	if errors.Is(err, errNoPayment) {
		return settlement{}, nil
	} else if err != nil {
		return settlement{}, err
	}
	t.testHook("looked up", p.impUID)
	return t.settle(ctx, by, p)
}

// whyNotConfirmed returns what the client sees of an error of confirmReported that says why nothing was charged; nil for any other.
func whyNotConfirmed(err error) error {
	refusal, refused := errors.AsType[*gatewayRefusal](err)
	switch {
	case errors.Is(err, errNotFound):
		return statusError(http.StatusNotFound, "paymentId: 해당 결제 내역이 존재하지 않습니다")
	case errors.Is(err, errOrderEnded):
		return statusError(http.StatusConflict, "주문 시간이 지나 결제하지 않았습니다. 다시 주문해 주세요")
	case errors.Is(err, errOrderPaid):
		return statusError(http.StatusConflict, "이미 결제된 주문이므로 결제하지 않았습니다")
	case errors.Is(err, errOrderCancelled):
		return statusError(http.StatusConflict, "이미 취소된 주문이므로 결제하지 않았습니다")
	case errors.Is(err, errOrderConfirming):
		return statusError(http.StatusConflict, messageConfirming)
	case !refused:
		return nil
	case refusal.code == "INFORMATION_MISMATCH":
		return statusError(http.StatusBadRequest, "금액 불일치, 위조된 결제 시도")
	case refusal.code == "PG_PROVIDER":
		return fieldError("paymentId", "결제가 승인되지 않았습니다. 다른 결제 수단을 이용해 주세요")
	default:
		return fieldError("paymentToken", "결제 인증이 올바르지 않거나 만료되었습니다")
	}
}
