package main

import (
	"context"
	"errors"
	"sync"
	"time"
)

// maxParallel is how many refunds, or checks, one replica has under way at once. They are leased together, so they also run
// together.
const maxParallel = 8

const (
	// listOverlap is how far back each reading of the gateway's lists goes beyond the one before: how late a payment shows
	// up there is not known, nor how far its clock is from ours.
	listOverlap = time.Hour
	// listWindow is how much of a list is read before the reading is saved.
	listWindow = 7 * 24 * time.Hour
	// statusChangesBatch is how many changes of status a round applies at most: about 30 ms of work, which is as long as a caller
	// who changes one of these orders waits. In a rush of buyers the rest is applied later.
	statusChangesBatch = 1000
	// listChunk is how many payments of a list are compared with the ledger at once.
	listChunk = 500
)

var byReconciler = actor{kind: actorReconciler}

// reconcile does what no client waits for, each interval until ctx ends: it retries refunds, reads the gateway's lists of
// what moved, asks the gateway about unpaid orders whose hold ends, lets their paintings go, erases personal data whose time is
// over, and has the counts and the search follow the orders. Every replica runs it; no two work on the same row.
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

// reconcileRound does what is due now. It ends early when the database fails or the gateway does not respond, and leaves to
// the next round what it does not get to within an interval: a backlog must not look like a reconciler that is stuck.
func (t *settler) reconcileRound(ctx context.Context) error {
	err := errors.Join(t.retryRefunds(ctx), t.retryParts(ctx))
	for _, g := range t.gateways {
		err = errors.Join(err, t.readList(ctx, g, gatewayPaid), t.readList(ctx, g, gatewayCancelled))
	}
	err = errors.Join(err, t.checkOrders(ctx), t.forgetDue(ctx), t.store.applyStatusChanges(ctx, statusChangesBatch), t.store.compactStatusCounts(ctx))
	if err == nil {
		t.lastRound.Store(t.now().UnixNano())
	}
	return err
}

// retryRefunds tries every refund that is due.
func (t *settler) retryRefunds(ctx context.Context) error {
	for until := t.now().Add(t.interval); ctx.Err() == nil && t.now().Before(until); {
		due, err := t.store.claimDueRefunds(ctx, maxParallel, t.now())
		if err != nil || len(due) == 0 {
			return err
		}
		responded := forEachParallel(due, func(row paymentRow) bool {
			return gatewayResponded(t.attemptRefund(ctx, byReconciler, row))
		})
		if !responded {
			return nil // each failure is noted with its payment and comes back after its pause
		}
	}
	return nil
}

// ---- the gateway's lists

// readList settles what is new in one of a gateway's lists: every payment that was paid, or every one that was given back,
// since the list was last read whole. However old its order is, money whose notice was lost is found here, and so is a
// refund in the gateway's console. What the lists say of other shops' payments costs a comparison.
func (t *settler) readList(ctx context.Context, g gateway, status gatewayStatus) error {
	now, list := t.now(), status.listAt(g.name())
	from, err := t.store.claimList(ctx, list, now)
	if errors.Is(err, errStale) {
		return nil // another replica reads it
	} else if err != nil {
		return err
	}
	for from.Before(now) && err == nil {
		to := now
		if next := from.Add(listWindow); next.Before(now) {
			to = next
		}
		if err = t.settleMoved(ctx, g, status, from.Add(-listOverlap), to); err == nil {
			from, err = to, t.store.saveListRead(ctx, list, to, t.now(), refundLease)
		}
	}
	err = errors.Join(err, t.store.saveListRead(context.WithoutCancel(ctx), list, from, t.now(), 0))
	if !gatewayResponded(err) || lockedOut(err) {
		return nil // the next round goes on where this one ended
	}
	return err
}

// settleMoved settles what moved in a window of a list and is not in the ledger. A payment that cannot be read or settled is
// logged and does not stand in the way of the others; the audit reports it. The error is one of lockedOut when a payment is
// left for the next round because another session has its order's row locked.
func (t *settler) settleMoved(ctx context.Context, g gateway, status gatewayStatus, from, to time.Time) error {
	var chunk []gatewayPayment
	var locked error
	settle := func() error {
		err := t.settleUnsettled(ctx, chunk)
		chunk = chunk[:0]
		if lockedOut(err) {
			locked, err = err, nil
		}
		return err
	}
	for p, err := range g.movedBetween(ctx, status, from, to) {
		switch {
		case !gatewayResponded(err):
			return errors.Join(err, settle())
		case err != nil:
			t.logUnreadable(err)
		case validID(p.merchantUID):
			chunk = append(chunk, p)
		}
		if len(chunk) == listChunk {
			if err := settle(); err != nil {
				return err
			}
		}
	}
	return errors.Join(settle(), locked)
}

// settleUnsettled settles those of payments that are ours and not in the ledger yet. It goes on after an error of lockedOut.
func (t *settler) settleUnsettled(ctx context.Context, payments []gatewayPayment) error {
	if len(payments) == 0 {
		return nil
	}
	impUIDs, err := t.store.unsettledOf(ctx, payments)
	if err != nil {
		return err
	}
	unsettled := map[string]bool{}
	for _, id := range impUIDs {
		unsettled[id] = true
	}
	var locked error
	for _, p := range payments {
		if !unsettled[p.impUID] {
			continue
		}
		t.testHook("looked up", p.impUID)
		_, err := t.settle(ctx, byReconciler, p)
		switch {
		case lockedOut(err):
			locked = err
			t.log.Warn("payment not settled yet", "order", p.merchantUID, "imp_uid", p.impUID, "cause", err)
		case unavailable(err) || !gatewayResponded(err):
			return err
		case err != nil && !errors.Is(err, errDepositAwaited):
			t.log.Error("payment not settled", "order", p.merchantUID, "imp_uid", p.impUID, "cause", err)
		}
	}
	return locked
}

// logUnreadable names the payments that cannot be read, each once in a while: every round reads them again.
func (t *settler) logUnreadable(err error) {
	for _, p := range unreadablePayments(err) {
		if _, named := t.unreadable.get(p.impUID); named {
			continue
		}
		t.unreadable.put(p.impUID, struct{}{}, t.now())
		t.log.Error("payment not read", "order", p.merchantUID, "imp_uid", p.impUID, "cause", p.err)
	}
}

// unreadablePayments returns the payments that err says cannot be read.
func unreadablePayments(err error) []unreadablePayment {
	if gateway, ok := errors.AsType[*gatewayError](err); ok {
		return gateway.unreadable
	}
	return nil
}

// ---- unpaid orders

// checkOrders asks the gateway about every order whose time has come.
func (t *settler) checkOrders(ctx context.Context) error {
	for until := t.now().Add(t.interval); ctx.Err() == nil && t.now().Before(until); {
		due, err := t.store.claimDueChecks(ctx, maxParallel, t.now())
		if err != nil || len(due) == 0 {
			return err
		}
		var mu sync.Mutex
		var failed error
		responded := forEachParallel(due, func(c paymentCheck) bool {
			answer, err := t.checkOrder(ctx, c)
			if lockedOut(err) { // by another session
				t.log.Warn("order not checked yet", "order", c.id, "cause", err)
				if err = t.checkAgainAt(ctx, c, t.now().Add(t.interval)); lockedOut(err) {
					err = nil // the order's row is locked, too: it is asked about again when the lease ends
				}
			}
			mu.Lock()
			failed = errors.Join(failed, err)
			mu.Unlock()
			return gatewayResponded(answer)
		})
		if failed != nil || !responded {
			return failed
		}
	}
	return nil
}

// checkOrder asks the gateway about one order and settles what it finds. An unpaid order whose hold is over ends then; any
// other is asked about once. While it cannot be found out whether money came, the hold goes on for up to its length. It
// returns the gateway's error and the database's.
func (t *settler) checkOrder(ctx context.Context, c paymentCheck) (answer, err error) {
	check := t.settleAll
	if c.unpaid {
		check = t.checkUnpaid
	}
	t.testHook("leased", c.id)
	settled, answer := check(ctx, byReconciler, c.id)
	t.testHook("looked", c.id)
	now := t.now()
	known := answer == nil || errors.Is(answer, errNoPayment)
	switch {
	case c.unpaid && settled.state == stateKept:
		return nil, nil // it is paid
	case gatewayResponded(answer) && unavailable(answer):
		return nil, answer // the database failed; the lease ends by itself
	case !known && c.unpaid && !now.Before(c.heldUntil.Add(t.hold)):
		return answer, t.endHold(ctx, c, now)
	case !known && gatewayResponded(answer):
		t.log.Error("order not checked", "order", c.id, "cause", answer)
		return nil, nil // it is asked about again when the lease ends
	case !known:
		return answer, t.checkAgainAt(ctx, c, now.Add(t.interval))
	case c.unpaid && now.Before(c.heldUntil):
		return nil, t.checkAgainAt(ctx, c, c.heldUntil)
	case c.unpaid:
		return nil, t.endHold(ctx, c, now)
	default:
		return nil, t.store.scheduleCheck(ctx, c, nil)
	}
}

func (t *settler) checkAgainAt(ctx context.Context, c paymentCheck, next time.Time) error {
	return t.store.scheduleCheck(ctx, c, &next)
}

// endHold lets an unpaid order's paintings go. That it was paid, deleted or begun anew meanwhile is no error.
func (t *settler) endHold(ctx context.Context, c paymentCheck, now time.Time) error {
	err := t.store.expireHold(ctx, byReconciler, c.id, now)
	if errors.Is(err, errStale) {
		return nil
	}
	return err
}

// gatewayResponded reports whether err is anything but a gateway that did not respond. A payment that cannot be read is a
// response.
func gatewayResponded(err error) bool {
	gateway, failed := errors.AsType[*gatewayError](err)
	return !failed || gateway.unreadable != nil
}

// forEachParallel runs do for all items at once and reports whether all returned true.
func forEachParallel[T any](items []T, do func(T) bool) bool {
	var wg sync.WaitGroup
	results := make([]bool, len(items))
	for i, item := range items {
		wg.Go(func() { results[i] = do(item) })
	}
	wg.Wait()
	for _, ok := range results {
		if !ok {
			return false
		}
	}
	return true
}

// stalled reports whether no round has finished for ten intervals, or for as long as a refund may take when that is longer.
// The clock starts when reconcile does.
func (t *settler) stalled() bool {
	return t.now().Sub(time.Unix(0, t.lastRound.Load())) > max(10*t.interval, refundLease)
}
