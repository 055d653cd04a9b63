package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"reflect"
	"sync"
	"sync/atomic"
	"time"
)

// auditor compares the ledger with the gateways. It changes neither: what the gateway knows and the ledger does not is left to
// the reconciler, which the auditor has look at once.
type auditor struct {
	store         *store
	gateways      gateways
	now           func() time.Time
	pause         func(context.Context) error // before an order that did not match is checked again
	progress      io.Writer                   // told how far the audit is
	progressEvery time.Duration
}

const (
	// auditChecks is how often an order is checked until its ledger and the gateway match: the service goes on meanwhile, and
	// a payment on its way is no mismatch.
	auditChecks = 3
	auditPause  = 500 * time.Millisecond
	// auditFailures is how many checks may fail before the audit asks the gateway no more.
	auditFailures = 10
)

// mismatchKind is a way in which books and gateway, or orders and paintings, may disagree.
type mismatchKind struct{ name, meaning, remedy string }

// What becomes of a mismatch.
const (
	remedySettle = "the reconciler settles it at its next round"
	remedyRetry  = "the reconciler tries again until it is back"
	remedyRefund = "a person has to help: name an account for the refund, or book it as paid back by hand"
	remedyByHand = "nothing puts it right by itself: see the order's history and the gateway's console"
	remedyAgain  = "run the audit again"
	remedyKeys   = "configure that gateway's keys, too, for as long as its payments may have to go back"
)

var (
	mismatchPaidThere  = mismatchKind{"paid there, not here", "the buyer has paid and it is not booked", remedySettle}
	mismatchTwice      = mismatchKind{"two payments", "the buyer has paid for the order once more and it is not booked", remedySettle}
	mismatchCancelled  = mismatchKind{"kept here, cancelled there", "the money went back in the gateway's console and the order still counts as paid", remedySettle}
	mismatchPartBack   = mismatchKind{"amount differs", "a part went back in the gateway's console and it is not booked", remedySettle}
	mismatchAmount     = mismatchKind{"amount differs", "what the gateway took or gave back is not what is booked", remedyByHand}
	mismatchUnknown    = mismatchKind{"kept here, unknown there", "the gateway has no such payment", remedyByHand}
	mismatchNoMoney    = mismatchKind{"kept here, never paid there", "the gateway says that no money came with the payment", remedyByHand}
	mismatchOtherOrder = mismatchKind{"payment of another order", "the gateway now names another order for a payment than the ledger has it for", remedyByHand}
	mismatchUnreadable = mismatchKind{"payment cannot be read", "the gateway's answer about the payment makes no sense", remedyByHand}
	mismatchUnchecked  = mismatchKind{"not compared", "the gateway gave no answer about the order", remedyAgain}
	mismatchNoGateway  = mismatchKind{"gateway not configured", "the payment was made at a gateway whose keys are not configured", remedyKeys}
	mismatchNotBack    = mismatchKind{"refunded here, kept there", "a refund is booked that the gateway has not made", remedyByHand}
	mismatchBackTwice  = mismatchKind{"paid back twice", "the gateway gave back what was paid back by hand, too", remedyByHand}
	mismatchDue        = mismatchKind{"refund due", "the money has to go back and has not yet", remedyRetry}
	mismatchStuck      = mismatchKind{"refund needs a person", "the money has to go back and the gateway refuses to give it back", remedyRefund}
	mismatchParts      = mismatchKind{"parts do not add up", "what went back for single paintings is not the price of those that are cancelled", remedyByHand}
	mismatchDueDone    = mismatchKind{"refund due", "the money is back and it is not booked", remedySettle}
	mismatchUnpaid     = mismatchKind{"order without money", "the order counts as paid and no payment of it is kept", remedyByHand}
	mismatchNoOrder    = mismatchKind{"money without order", "a payment is kept for an order that is not live", remedyByHand}
	mismatchMoving     = mismatchKind{"still changing", "the order changed whenever it was checked", remedyAgain}
	mismatchStray      = mismatchKind{"painting without order", "the painting is held by an order that is not live, and nobody can buy it", remedyByHand}
	mismatchMissing    = mismatchKind{"order without painting", "the painting of a live order is not held by it, and may be sold again", remedyByHand}
)

// auditedOrder is what a check of one order found.
type auditedOrder struct {
	ledger     auditLedger
	there      []gatewayPayment
	mismatches []mismatch
	err        error // the ledger or the gateway could not be read
}

// audit compares with the gateway the money of all orders that changed since then, of all for which the gateway says that
// money moved since then, and of all whose refund is due; and, as far as they say so themselves, all orders with their
// payments and paintings. When the gateway or the database fails, the report has what was found until then.
func (a *auditor) audit(ctx context.Context, since time.Time) (auditReport, error) {
	report := auditReport{Since: jsonTime(since), At: jsonTime(a.now()), Mismatches: []mismatch{}}
	moved, listed, problem := a.listMoved(ctx, since)
	report.Mismatches = append(report.Mismatches, listed...)
	ids, err := a.store.ordersToAudit(ctx, since, moved)
	if err != nil {
		return report, errors.Join(problem, err)
	}
	orders, err := a.checkUntilTheyMatch(ctx, ids)
	problem = errors.Join(problem, err)
	checked := map[string]bool{}
	for _, o := range orders {
		report.add(o)
		checked[o.ledger.orderID] = o.err == nil
		problem = errors.Join(problem, a.leaveToReconciler(ctx, o))
	}
	strays, err := a.strays(ctx, checked)
	report.Mismatches = append(report.Mismatches, strays...)
	return report, errors.Join(problem, err)
}

// listMoved returns the merchant_uids of all payments that the gateway's lists have since then, and the payments of the
// lists that cannot be read.
func (a *auditor) listMoved(ctx context.Context, since time.Time) (orders []string, unreadable []mismatch, err error) {
	seen := map[string]bool{}
	for p, problem := range a.moved(ctx, since) {
		if !gatewayResponded(problem) {
			err = errors.Join(err, problem)
			continue
		}
		for _, u := range unreadablePayments(problem) {
			if !validID(u.merchantUID) { // one with an order is found when the order is checked
				unreadable = append(unreadable, mismatchOf(mismatchUnreadable, mismatch{ImpUID: u.impUID}))
			}
			p.merchantUID = u.merchantUID
		}
		if validID(p.merchantUID) && !seen[p.merchantUID] {
			seen[p.merchantUID] = true
			orders = append(orders, p.merchantUID)
		}
	}
	return orders, unreadable, err
}

// moved yields what is in the gateways' lists since then: see gateway.movedBetween.
func (a *auditor) moved(ctx context.Context, since time.Time) iter.Seq2[gatewayPayment, error] {
	return func(yield func(gatewayPayment, error) bool) {
		for _, g := range a.gateways {
			for _, status := range []gatewayStatus{gatewayPaid, gatewayCancelled} {
				for p, err := range g.movedBetween(ctx, status, since, a.now()) {
					if !yield(p, err) {
						return
					}
				}
			}
		}
	}
}

// strays returns the orders that disagree with their own payments or paintings, whenever they changed. Of those in checked
// the payments have been compared already.
func (a *auditor) strays(ctx context.Context, checked map[string]bool) (found []mismatch, err error) {
	orders, err := a.store.strayOrders(ctx)
	for _, o := range orders {
		if checked[o.orderID] {
			continue
		}
		kind := mismatchUnpaid
		if o.kept {
			kind = mismatchNoOrder
		}
		found = append(found, mismatchOf(kind, mismatch{Order: o.orderID, Amount: o.total}))
	}
	parts, problem := a.store.strayParts(ctx)
	err = errors.Join(err, problem)
	for _, order := range parts {
		found = append(found, mismatchOf(mismatchParts, mismatch{Order: order}))
	}
	paintings, problem := a.store.strayPaintings(ctx)
	for _, p := range paintings {
		kind := mismatchStray
		if p.missing {
			kind = mismatchMissing
		}
		found = append(found, mismatchOf(kind, mismatch{Order: p.orderID, Painting: p.paintingID}))
	}
	return found, errors.Join(err, problem)
}

// mismatchOf returns m as a mismatch of that kind.
func mismatchOf(kind mismatchKind, m mismatch) mismatch {
	m.Kind, m.Meaning, m.Remedy = kind.name, kind.meaning, kind.remedy
	return m
}

// checkUntilTheyMatch checks every order, and those again that do not match. The error is of the first order that could not
// be checked, once too many could not; the orders are those that were reached.
func (a *auditor) checkUntilTheyMatch(ctx context.Context, ids []string) ([]auditedOrder, error) {
	orders, open := make([]auditedOrder, len(ids)), make([]int, len(ids))
	for i := range open {
		orders[i].ledger.orderID, orders[i].err = ids[i], errNotReached
		open[i] = i
	}
	var failed error
	for check := range auditChecks {
		if check > 0 {
			if err := a.pause(ctx); err != nil {
				return nil, err
			}
		}
		failed = a.checkOrders(ctx, ids, open, orders)
		var again []int
		for _, i := range open {
			if o := orders[i]; o.err != nil || len(o.mismatches) > 0 {
				again = append(again, i)
			}
		}
		if open = again; len(open) == 0 || failed != nil {
			break
		}
	}
	return orders, failed
}

// errNotReached says that the audit ended before an order was checked.
var errNotReached = errors.New("not checked")

// checkOrders checks the orders with the numbers in open, as many at once as the gateway's client has slots. It returns the
// first error once auditFailures of them could not be checked.
func (a *auditor) checkOrders(ctx context.Context, ids []string, open []int, orders []auditedOrder) error {
	var next, failures atomic.Int64
	var first atomic.Pointer[error]
	defer tell(a.progress, a.progressEvery, func() string {
		return fmt.Sprintf("looking at order %d of %d", min(next.Load(), int64(len(open))), len(open))
	})()
	var workers sync.WaitGroup
	for range maxLookUps {
		workers.Go(func() {
			for n := next.Add(1); n <= int64(len(open)) && failures.Load() < auditFailures; n = next.Add(1) {
				i := open[n-1]
				if orders[i] = a.checkOrder(ctx, ids[i]); orders[i].err != nil {
					failures.Add(1)
					first.CompareAndSwap(nil, &orders[i].err)
				}
			}
		})
	}
	workers.Wait()
	if failures.Load() >= auditFailures {
		return *first.Load()
	}
	return ctx.Err()
}

// checkOrder compares an order's ledger with the gateway. The ledger is read before and after the gateway's answer: when it
// changed between, it is not known which of the two the answer belongs to.
func (a *auditor) checkOrder(ctx context.Context, id string) auditedOrder {
	o := auditedOrder{ledger: auditLedger{orderID: id}}
	before, err := a.store.readLedger(ctx, id)
	if err != nil {
		o.err = err
		return o
	}
	o.ledger = before
	there, problem := a.gateways.paymentsOf(ctx, id)
	if err = problem; gatewayResponded(err) {
		o.ledger, err = a.store.readLedger(ctx, id)
	}
	switch {
	case err != nil:
		o.err = err
		o.compareRefunds()
	case !reflect.DeepEqual(before, o.ledger):
		o.mismatch(mismatchMoving, "", 0)
	default:
		o.err = a.compare(ctx, &o, there, unreadablePayments(problem))
	}
	return o
}

// compareRefunds reports what the ledger alone says of an order about which the gateway gave no answer.
func (o *auditedOrder) compareRefunds() {
	for _, row := range o.ledger.payments {
		if row.state == stateRefunding {
			o.comparePayment(row, gatewayPayment{}, false)
		}
		o.comparePart(row, gatewayPayment{})
	}
}

// leaveToReconciler has the reconciler look at an order if that puts something right.
func (a *auditor) leaveToReconciler(ctx context.Context, o auditedOrder) error {
	for _, m := range o.mismatches {
		if m.Remedy == remedySettle {
			return a.store.checkSoon(ctx, m.Order, a.now())
		}
	}
	return nil
}

func (o *auditedOrder) mismatch(kind mismatchKind, impUID string, amount int64) *mismatch {
	o.mismatches = append(o.mismatches, mismatchOf(kind, mismatch{Order: o.ledger.orderID, ImpUID: impUID, Amount: amount}))
	return &o.mismatches[len(o.mismatches)-1]
}

// compare finds what does not match between an order's ledger and the payments that the gateway has for it, of which some
// may be unreadable. About a payment of the ledger that is not among them the gateway is asked.
func (a *auditor) compare(ctx context.Context, o *auditedOrder, listed []gatewayPayment, unreadable []unreadablePayment) error {
	there, unread := map[string]gatewayPayment{}, map[string]bool{}
	for _, p := range unreadable {
		o.mismatch(mismatchUnreadable, p.impUID, 0)
		unread[p.impUID] = true
	}
	o.there = listed
	for _, p := range listed {
		there[p.impUID] = p
	}
	paid, kept := false, false
	for _, row := range o.ledger.payments {
		p, known := there[row.impUID]
		delete(there, row.impUID)
		kept = kept || row.state == stateKept
		paid = paid || row.state == stateKept || row.state == stateRefunding && o.ledger.cancelling
		if unread[row.impUID] {
			continue
		}
		g, err := a.gateways.named(row.gateway)
		if err != nil {
			o.mismatch(mismatchNoGateway, row.impUID, row.amount-row.refunded)
			continue
		}
		if !known && row.state == stateKept {
			elsewhere, err := g.find(ctx, row.key())
			if err == nil && elsewhere.merchantUID != o.ledger.orderID {
				o.mismatch(mismatchOtherOrder, row.impUID, row.amount-row.refunded)
				continue
			} else if err != nil && !gatewayResponded(err) {
				return err
			}
			p, known = elsewhere, err == nil
		}
		o.comparePayment(row, p, known)
		o.comparePart(row, p)
	}
	again := paid
	for _, p := range o.there {
		if _, unbooked := there[p.impUID]; !unbooked || p.fullyRefunded || !p.moved {
			continue
		}
		if other, err := a.store.orderOfPayment(ctx, p.impUID); err != nil {
			return err
		} else if other != "" {
			o.mismatch(mismatchOtherOrder, p.impUID, p.amount-p.cancelled)
			continue
		}
		kind := mismatchPaidThere
		if again {
			kind = mismatchTwice
		}
		again = true
		o.mismatch(kind, p.impUID, p.amount-p.cancelled)
	}
	live := o.ledger.status >= statusPaid && o.ledger.status < statusCancelled
	switch {
	case live && !paid:
		o.mismatch(mismatchUnpaid, "", o.ledger.total)
	case !live && kept:
		o.mismatch(mismatchNoOrder, "", o.ledger.total)
	}
	return nil
}

// comparePayment compares a row of the ledger with what the gateway says of the payment, if it knows it.
func (o *auditedOrder) comparePayment(row auditPayment, p gatewayPayment, known bool) {
	left, back := row.amount-row.refunded, p.cancelled
	if part := row.part; part != nil && p.gaveBack(part.id) {
		back -= part.amount // see comparePart
	}
	switch {
	case row.state == stateRefunding:
		kind := mismatchDue
		switch {
		case known && p.fullyRefunded:
			kind = mismatchDueDone
		case row.refusals >= stuckAfter:
			kind = mismatchStuck
		}
		o.mismatch(kind, row.impUID, left).Due = &auditDue{jsonTime(row.dueSince), row.attempts, row.lastError}
	case row.byHand && known && p.cancelled > row.refunded-row.byHandAmount:
		o.mismatch(mismatchBackTwice, row.impUID, p.cancelled-(row.refunded-row.byHandAmount))
	case row.byHand:
	case row.state == stateRefunded && known && p.moved && !p.fullyRefunded:
		o.mismatch(mismatchNotBack, row.impUID, p.amount-p.cancelled)
	case row.state == stateRefunded:
	case !known:
		o.mismatch(mismatchUnknown, row.impUID, left)
	case !p.moved, p.status != gatewayPaid && p.status != gatewayCancelled:
		o.mismatch(mismatchNoMoney, row.impUID, left)
	case p.fullyRefunded:
		o.mismatch(mismatchCancelled, row.impUID, left)
	case back > row.refunded:
		o.mismatch(mismatchPartBack, row.impUID, back-row.refunded)
	case !p.isKRW() || p.amount != row.amount || p.amount != o.ledger.total || back != row.refunded && p.cancelled != row.refunded:
		o.mismatch(mismatchAmount, row.impUID, p.amount)
	}
}

// comparePart reports the refund of a part of a payment that is under way.
func (o *auditedOrder) comparePart(row auditPayment, p gatewayPayment) {
	if row.part == nil {
		return
	}
	kind := mismatchDue
	if p.gaveBack(row.part.id) || p.fullyRefunded {
		kind = mismatchDueDone
	}
	o.mismatch(kind, row.impUID, row.part.amount).Due = &auditDue{jsonTime(row.part.dueSince), row.part.attempts, row.part.lastError}
}
