package main

import (
	"context"
	"errors"
	"sync"
	"time"
)

// maxParallel is how many refunds, or looks, one replica has under way at once. They are leased together, so they
// also run together.
const maxParallel = 8

// lastCheck is how long after its last change the gateway is last asked about an order: a payment window may stay open
// for long after the order is gone or paid.
const lastCheck = 24 * time.Hour

var byReconciler = actor{kind: actorReconciler}

// reconcile does what nobody waits for, each interval until ctx ends: it retries refunds, asks the gateway about orders
// whose time has come, and lets the paintings of unpaid ones go. Every replica runs one; they never work on the same row.
func (t *settler) reconcile(ctx context.Context) {
	t.lastRound.Store(t.now().UnixNano())
	ticker := time.NewTicker(t.interval)
	defer ticker.Stop()
	for {
		if err := t.reconcileRound(ctx); err != nil && ctx.Err() == nil {
			t.log.Error("reconcile", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// reconcileRound does what is due now. It ends early when the database fails or the gateway does not answer, and leaves to the next
// round what refunds or looks do not get to within an interval: a backlog must not look like a reconciler that is stuck.
func (t *settler) reconcileRound(ctx context.Context) error {
	err := errors.Join(t.retryRefunds(ctx), t.checkOrders(ctx), t.store.compactStatusCounts(ctx))
	if err == nil {
		t.lastRound.Store(t.now().UnixNano())
	}
	return err
}

// retryRefunds tries every refund that is due.
func (t *settler) retryRefunds(ctx context.Context) error {
	for until := t.now().Add(t.interval); ctx.Err() == nil && t.now().Before(until); {
		now := t.now()
		due, err := t.store.claimDueRefunds(ctx, maxParallel, now, now.Add(refundLease))
		if err != nil || len(due) == 0 {
			return err
		}
		allAnswered := forEachParallel(due, func(row paymentRow) bool {
			return gatewayResponded(t.attemptRefund(ctx, byReconciler, row))
		})
		if !allAnswered {
			return nil // each failure is noted with its payment and comes back after its pause
		}
	}
	return nil
}

// checkOrders asks the gateway about every order whose time has come.
func (t *settler) checkOrders(ctx context.Context) error {
	for until := t.now().Add(t.interval); ctx.Err() == nil && t.now().Before(until); {
		now := t.now()
		due, err := t.store.claimDueChecks(ctx, maxParallel, now, now.Add(refundLease))
		if err != nil || len(due) == 0 {
			return err
		}
		var mu sync.Mutex
		var failed error
		allAnswered := forEachParallel(due, func(l paymentCheck) bool {
			seen, err := t.checkOrder(ctx, l)
			mu.Lock()
			failed = errors.Join(failed, err)
			mu.Unlock()
			return gatewayResponded(seen)
		})
		if failed != nil || !allAnswered {
			return failed
		}
	}
	return nil
}

// lookAt asks the gateway about one order and settles what it finds. An unpaid order whose hold is over ends then; one
// that is paid or has ended is looked at twice more, since a notice may be lost, and late money is late. seen is the
// gateway's error, err the database's. While the gateway does not answer, the hold stays, up to twice its length.
func (t *settler) checkOrder(ctx context.Context, l paymentCheck) (seen, err error) {
	unpaid := l.status == statusUnpaid && !l.ended
	look := t.settleAll
	if unpaid {
		look = t.checkUnpaid
	}
	t.testHook("leased", l.id)
	settled, seen := look(ctx, byReconciler, l.id)
	t.testHook("looked", l.id)
	now := t.now()
	var gateway *gatewayError
	switch {
	case errors.As(seen, &gateway) && unpaid && !now.Before(l.createdAt.Add(2*t.hold)):
		return seen, t.expireHold(ctx, l, now, now.Add(t.interval))
	case errors.As(seen, &gateway):
		return seen, t.store.scheduleCheck(ctx, l, now.Add(t.interval))
	case seen != nil && !errors.Is(seen, errNoPayment):
		return nil, seen // the lease ends by itself
	case unpaid && settled.state == stateKept:
		return nil, nil // it is paid, and looked at once more when the lease ends
	case unpaid && now.Before(l.heldUntil):
		return nil, t.store.scheduleCheck(ctx, l, l.heldUntil)
	case unpaid:
		return nil, t.expireHold(ctx, l, now, now.Add(t.hold))
	case now.Before(l.updatedAt.Add(t.hold)):
		return nil, t.store.scheduleCheck(ctx, l, l.updatedAt.Add(t.hold))
	case now.Before(l.updatedAt.Add(lastCheck)):
		return nil, t.store.scheduleCheck(ctx, l, l.updatedAt.Add(lastCheck))
	default:
		return nil, t.store.scheduleCheck(ctx, l, time.Time{})
	}
}

// expireHold lets an unpaid order's paintings go; that it was paid or deleted meanwhile is no error.
func (t *settler) expireHold(ctx context.Context, l paymentCheck, now, nextLook time.Time) error {
	err := t.store.endUnpaid(ctx, byReconciler, l.id, "expired", now, nextLook)
	if errors.Is(err, errStale) {
		return nil
	}
	return err
}

// gatewayResponded reports whether err is anything but the gateway's silence. A payment that cannot be read is an answer.
func gatewayResponded(err error) bool {
	gateway, failed := errors.AsType[*gatewayError](err)
	return !failed || gateway.unreadable != nil
}

// forEachParallel runs do for all items at once and reports whether all answered.
func forEachParallel[T any](items []T, do func(T) bool) bool {
	var wg sync.WaitGroup
	all := make([]bool, len(items))
	for i, item := range items {
		wg.Go(func() { all[i] = do(item) })
	}
	wg.Wait()
	for _, ok := range all {
		if !ok {
			return false
		}
	}
	return true
}

// stalled reports whether the reconciler has not finished a round for ten intervals; before its first one it has from the
// start of the program. However short they are, a refund may take its time.
func (t *settler) stalled() bool {
	return t.now().Sub(time.Unix(0, t.lastRound.Load())) > max(10*t.interval, refundLease)
}
