package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
)

// attemptRefund carries out a booked and leased refund. The first attempt goes straight to the gateway; each further one
// looks the payment up first, since the answer to the one before may have been lost. It returns errRefundPending with the
// cause when it did not succeed: the reconciler goes on with it.
func (t *settler) attemptRefund(ctx context.Context, by actor, row paymentRow) error {
	t.testHook("leased", row.impUID)
	if row.attempts > 1 {
		p, err := askFor(ctx, t.limits, by, func(ctx context.Context) (gatewayPayment, error) { return t.gateways.find(ctx, row.gateway, row.key()) })
		if err != nil {
			return t.postponeRefund(ctx, row, err)
		}
		t.testHook("looked up", row.impUID)
		settled, err := t.settle(ctx, by, p)
		if err != nil {
			return t.postponeRefund(ctx, row, err)
		}
		row.refunded, row.failed = p.cancelled, p.failedRefunds
		switch {
		case settled.state == stateRefunded:
			return nil
		case p.refundPending:
			return t.postponeRefund(ctx, row, errRefundTaken)
		}
	}
	return t.requestRefund(ctx, by, row)
}

// requestRefund asks the gateway for the whole remainder and books its answer. After any other answer than a success the
// payment is looked up, since the money may be back all the same. A refusal that may be due to another remainder than we
// knew is followed by one more try with the fresh one.
func (t *settler) requestRefund(ctx context.Context, by actor, row paymentRow) error {
	ctx = context.WithoutCancel(ctx)
	g, err := t.gateways.named(row.gateway)
	if err != nil {
		return t.postponeRefund(ctx, row, err)
	}
	for again := true; ; again = false {
		p, cause := g.cancelPayment(ctx, cancelRequest{
			orderID: row.orderID, impUID: row.impUID, remaining: row.amount - row.refunded, isKRW: row.isKRW, reason: row.reason,
			refusals: row.refusals, account: row.account})
		t.testHook("cancelled", row.impUID)
		if cause != nil {
			p, err = askFor(ctx, t.limits, by, func(ctx context.Context) (gatewayPayment, error) { return g.find(ctx, row.key()) })
			if err != nil {
				return t.postponeRefund(ctx, row, cause)
			}
			t.testHook("looked up", row.impUID)
		}
		row.failed = p.failedRefunds
		settled, err := t.settle(ctx, by, p)
		switch {
		case err != nil:
			return t.postponeRefund(ctx, row, err)
		case settled.state == stateRefunded:
			return nil
		case p.refundPending:
			return t.postponeRefund(ctx, row, errRefundTaken)
		case again && refused(cause) && p.cancelled != row.refunded:
			row.refunded = p.cancelled
			continue
		case cause == nil:
			cause = fmt.Errorf("the gateway took the cancel but says %q", p.status)
		}
		return t.postponeRefund(ctx, row, cause)
	}
}

// refused reports whether err is the gateway's answer that it does not do what was asked.
func refused(err error) bool {
	_, ok := errors.AsType[*gatewayRefusal](err)
	return ok
}

// postponeRefund notes that a refund did not succeed and when it is tried again: after growing pauses, an hour at most.
func (t *settler) postponeRefund(ctx context.Context, row paymentRow, cause error) error {
	pause := t.pauseAfter(row.attempts)
	err := t.store.recordRefundFailure(context.WithoutCancel(ctx), row, cause, t.now(), pause)
	level, what := slog.LevelWarn, "refund failed"
	switch {
	case !gatewayResponded(cause):
		level = slog.LevelDebug // the log says once that the gateway does not respond, not for each refund
	case errors.Is(cause, errRefundTaken):
		level, what = slog.LevelInfo, "refund under way"
	}
	t.log.Log(ctx, level, what, "order", row.orderID, "imp_uid", row.impUID, "amount", row.amount, "attempt", row.attempts,
		"again_in", pause.String(), "cause", cause)
	return fmt.Errorf("%w: %w", errRefundPending, errors.Join(cause, err))
}

// refundOrder gives back the whole payment of a paid order and cancels it. It returns errStale when the order is not in
// status from any more, errRefundPending when the refund is booked and goes on by itself, and errBusy.
func (t *settler) refundOrder(ctx context.Context, by actor, id string, from int, reason string) error {
	end, err := t.limits.begin(ctx, by.client)
	if err != nil {
		return err
	}
	defer end()
	row, err := t.store.bookRefund(context.WithoutCancel(ctx), by, id, from, reason, t.now())
	if err != nil {
		return err
	}
	t.logTransition(by, id, gatewayPayment{impUID: row.impUID, amount: row.amount, cancelled: row.refunded},
		&paymentRow{state: stateKept}, decision{state: stateRefunding, reason: reason})
	return t.attemptRefund(ctx, by, row)
}

// retryOrderRefund goes on with the cancel of an order whose refund did not succeed at once. It returns errStale when
// another caller is at it.
func (t *settler) retryOrderRefund(ctx context.Context, by actor, id string) error {
	end, err := t.limits.begin(ctx, by.client)
	if err != nil {
		return err
	}
	defer end()
	row, err := t.store.claimOrderRefund(ctx, id, t.now())
	if err != nil {
		return err
	}
	return t.attemptRefund(ctx, by, row)
}

// refundToAccount tries a refund that is due once more, to the account that the gateway needs for it. The account is kept
// until the money is back. It returns errNotFound when the order has no such payment, errNotDue when no refund of it is
// due, errStale when another caller is at it, and errRefundPending when it failed and goes on by itself.
func (t *settler) refundToAccount(ctx context.Context, by actor, id, impUID string, account refundAccount) error {
	end, err := t.limits.begin(ctx, by.client)
	if err != nil {
		return err
	}
	defer end()
	row, err := t.store.claimRefundTo(ctx, id, impUID, account, t.now())
	if err != nil {
		return err
	}
	return t.attemptRefund(ctx, by, row)
}
