package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// auditor compares the books with the gateway. It changes neither: what the gateway knows and the books don't it leaves
// to the reconciler, which it has look at once.
type auditor struct {
	store         *store
	gateway       *iamportClient
	now           func() time.Time
	pause         func(context.Context) error // before an order that did not match is looked at again
	progress      io.Writer                   // told how far the audit is
	progressEvery time.Duration
}

const (
	// auditChecks is how often an order is looked at until its books and the gateway match: the service goes on meanwhile,
	// and a payment on its way is no mismatch.
	auditChecks = 3
	auditPause  = 500 * time.Millisecond
	// auditFailures is how many looks may fail before the audit gives up.
	auditFailures = 10
)

// mismatchKind is a way in which books and gateway, or orders and paintings, may disagree.
type mismatchKind struct{ name, meaning, remedy string }

// What becomes of a mismatch.
const (
	remedySettle = "the reconciler settles it at its next round"
	remedyRetry  = "the reconciler tries again until it is back"
	remedyByHand = "nothing puts it right by itself: see the order's history and the gateway's console"
	remedyAgain  = "run the audit again"
)

var (
	mismatchPaidThere = mismatchKind{"paid there, not here", "the buyer has paid and it is not booked", remedySettle}
	mismatchTwice     = mismatchKind{"two payments", "the buyer has paid for the order once more and it is not booked", remedySettle}
	mismatchCancelled = mismatchKind{"kept here, cancelled there", "the money went back in the gateway's console and the order still counts as paid", remedySettle}
	mismatchPartBack  = mismatchKind{"amount differs", "a part went back in the gateway's console and it is not booked", remedySettle}
	mismatchAmount    = mismatchKind{"amount differs", "what the gateway took or gave back is not what is booked", remedyByHand}
	mismatchUnknown   = mismatchKind{"kept here, unknown there", "the gateway has no such payment", remedyByHand}
	mismatchNotBack   = mismatchKind{"refunded here, kept there", "a refund is booked that the gateway has not made", remedyByHand}
	mismatchDue       = mismatchKind{"refund due", "the money has to go back and has not yet", remedyRetry}
	mismatchDueDone   = mismatchKind{"refund due", "the money is back and it is not booked", remedySettle}
	mismatchUnpaid    = mismatchKind{"order without money", "the order counts as paid and no payment of it is kept", remedyByHand}
	mismatchNoOrder   = mismatchKind{"money without order", "a payment is kept for an order that is not live", remedyByHand}
	mismatchMoving    = mismatchKind{"still changing", "the order changed whenever it was looked at", remedyAgain}
	mismatchStray     = mismatchKind{"painting without order", "the painting is held by an order that is not live, and nobody can buy it", remedyByHand}
	mismatchMissing   = mismatchKind{"order without painting", "the painting of a live order is not held by it, and may be sold again", remedyByHand}
)

// mismatch is a line of the audit.
type mismatch struct {
	Order    string    `json:"order"`
	ImpUID   string    `json:"imp_uid,omitempty"`
	Painting string    `json:"painting,omitempty"`
	Amount   int64     `json:"amount,omitempty"` // won that are concerned
	Kind     string    `json:"kind"`
	Meaning  string    `json:"meaning"`
	Remedy   string    `json:"remedy"`
	Due      *auditDue `json:"due,omitempty"` // of a refund
}

// auditDue is how a refund goes.
type auditDue struct {
	Since     jsonTime `json:"since"`
	Attempts  int      `json:"attempts"`
	LastError string   `json:"lastError,omitempty"`
}

// auditSum is one side's money, in won.
type auditSum struct {
	Taken    int64 `json:"taken"`
	Refunded int64 `json:"refunded"`
	Kept     int64 `json:"kept"`
}

// auditReport is what the audit found.
type auditReport struct {
	Since      jsonTime   `json:"since"`
	At         jsonTime   `json:"at"`
	Orders     int        `json:"orders"`   // looked at
	Matching   int        `json:"matching"` // of them
	Gateway    auditSum   `json:"gateway"`
	Books      auditSum   `json:"books"`
	Mismatches []mismatch `json:"mismatches"`
}

// auditedOrder is what a look at one order saw.
type auditedOrder struct {
	ledger     auditLedger
	there      []gatewayPayment
	mismatches []mismatch
	err        error
}

// audit compares the money of all orders that were made or changed since then, and of all whose refund is due, with the
// gateway, and all paintings with the orders.
func (a *auditor) audit(ctx context.Context, since time.Time) (auditReport, error) {
	report := auditReport{Since: jsonTime(since), At: jsonTime(a.now()), Mismatches: []mismatch{}}
	ids, err := a.store.ordersToAudit(ctx, since)
	if err != nil {
		return report, err
	}
	orders, err := a.checkUntilTheyMatch(ctx, ids)
	if err != nil {
		return report, err
	}
	for _, o := range orders {
		report.add(o)
		if err := a.leaveToReconciler(ctx, o); err != nil {
			return report, err
		}
	}
	strays, err := a.store.strayPaintings(ctx)
	for _, s := range strays {
		kind := mismatchStray
		if s.missing {
			kind = mismatchMissing
		}
		report.Mismatches = append(report.Mismatches, mismatch{
			Order: s.orderID, Painting: s.paintingID, Kind: kind.name, Meaning: kind.meaning, Remedy: kind.remedy})
	}
	return report, err
}

// checkUntilTheyMatch looks at every order, and again at those that do not match.
func (a *auditor) checkUntilTheyMatch(ctx context.Context, ids []string) ([]auditedOrder, error) {
	orders, open := make([]auditedOrder, len(ids)), make([]int, len(ids))
	for i := range open {
		open[i] = i
	}
	for look := range auditChecks {
		if look > 0 {
			if err := a.pause(ctx); err != nil {
				return nil, err
			}
		}
		if err := a.checkOrders(ctx, ids, open, orders); err != nil {
			return nil, err
		}
		var again []int
		for _, i := range open {
			if o := orders[i]; o.err != nil || len(o.mismatches) > 0 {
				again = append(again, i)
			}
		}
		if open = again; len(open) == 0 {
			break
		}
	}
	for _, i := range open {
		if err := orders[i].err; err != nil {
			return nil, err
		}
	}
	return orders, nil
}

// checkOrders looks at the orders with the numbers in open, as many at once as the gateway's client has slots.
func (a *auditor) checkOrders(ctx context.Context, ids []string, open []int, orders []auditedOrder) error {
	var next, failed atomic.Int64
	defer a.tell(&next, len(open))()
	var workers sync.WaitGroup
	for range maxLookUps {
		workers.Go(func() {
			for n := next.Add(1); n <= int64(len(open)) && failed.Load() < auditFailures; n = next.Add(1) {
				i := open[n-1]
				if orders[i] = a.checkOrder(ctx, ids[i]); orders[i].err != nil {
					failed.Add(1)
				}
			}
		})
	}
	workers.Wait()
	if failed.Load() >= auditFailures {
		for _, i := range open {
			if err := orders[i].err; err != nil {
				return err
			}
		}
	}
	return ctx.Err()
}

// checkOrder compares an order's books with the gateway. They are read before and after the gateway's answer: when they moved
// between, nobody knows which of them the answer belongs to.
func (a *auditor) checkOrder(ctx context.Context, id string) (o auditedOrder) {
	before, err := a.store.readLedger(ctx, id)
	if err != nil {
		return auditedOrder{err: err}
	}
	if o.there, err = a.gateway.paymentsOf(ctx, id); err != nil {
		return auditedOrder{err: err}
	}
	if o.ledger, err = a.store.readLedger(ctx, id); err != nil {
		return auditedOrder{err: err}
	}
	if reflect.DeepEqual(before, o.ledger) {
		o.compare()
	} else {
		o.mismatch(mismatchMoving, "", 0)
	}
	return o
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
	o.mismatches = append(o.mismatches, mismatch{Order: o.ledger.orderID, ImpUID: impUID, Amount: amount,
		Kind: kind.name, Meaning: kind.meaning, Remedy: kind.remedy})
	return &o.mismatches[len(o.mismatches)-1]
}

// compare finds what does not match between the books and the gateway.
func (o *auditedOrder) compare() {
	there := map[string]gatewayPayment{}
	for _, p := range o.there {
		there[p.impUID] = p
	}
	paid, kept := false, false
	for _, row := range o.ledger.payments {
		p, known := there[row.impUID]
		delete(there, row.impUID)
		kept = kept || row.state == stateKept
		paid = paid || row.state == stateKept || row.state == stateRefunding && o.ledger.cancelling
		o.comparePayment(row, p, known)
	}
	again := paid
	for _, p := range o.there {
		if _, unbooked := there[p.impUID]; !unbooked || p.fullyRefunded {
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
}

// comparePayment compares a row of the ledger with what the gateway says of the payment, if it knows it.
func (o *auditedOrder) comparePayment(row auditPayment, p gatewayPayment, known bool) {
	left := row.amount - row.refunded
	switch {
	case row.state == stateRefunding:
		kind := mismatchDue
		if known && p.fullyRefunded {
			kind = mismatchDueDone
		}
		o.mismatch(kind, row.impUID, left).Due = &auditDue{jsonTime(row.dueSince), row.attempts, row.lastError}
	case row.state == stateRefunded && known && !p.fullyRefunded:
		o.mismatch(mismatchNotBack, row.impUID, p.amount-p.cancelled)
	case row.state == stateRefunded:
	case !known:
		o.mismatch(mismatchUnknown, row.impUID, left)
	case p.fullyRefunded:
		o.mismatch(mismatchCancelled, row.impUID, left)
	case p.cancelled > row.refunded:
		o.mismatch(mismatchPartBack, row.impUID, p.cancelled-row.refunded)
	case !p.isKRW() || p.amount != row.amount || p.amount != o.ledger.total || p.cancelled != row.refunded:
		o.mismatch(mismatchAmount, row.impUID, p.amount)
	}
}

// add takes an order into the report. Money that came and went back without us is in neither side's sum.
func (r *auditReport) add(o auditedOrder) {
	booked := map[string]bool{}
	for _, row := range o.ledger.payments {
		booked[row.impUID] = true
		r.Books.Taken += row.amount
		r.Books.Refunded += row.refunded
		if row.state == stateKept {
			r.Books.Kept += row.amount - row.refunded
		}
	}
	for _, p := range o.there {
		if booked[p.impUID] || !p.fullyRefunded {
			r.Gateway.Taken += p.amount
			r.Gateway.Refunded += p.cancelled
			r.Gateway.Kept += p.amount - p.cancelled
		}
	}
	r.Orders++
	if len(o.mismatches) == 0 {
		r.Matching++
	}
	r.Mismatches = append(r.Mismatches, o.mismatches...)
}

// tell says every while, on one line, how far the audit is, until stop is called.
func (a *auditor) tell(done *atomic.Int64, of int) (stop func()) {
	ticker, stopped, told := time.NewTicker(a.progressEvery), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(told)
		end := ""
		for {
			select {
			case <-ticker.C:
				fmt.Fprintf(a.progress, "\rlooking at order %d of %d", min(done.Load(), int64(of)), of)
				end = "\n"
			case <-stopped:
				io.WriteString(a.progress, end)
				return
			}
		}
	}()
	return func() {
		ticker.Stop()
		close(stopped)
		<-told
	}
}

// ---- the command

// errUnbalanced says that the audit found what does not match.
var errUnbalanced = errors.New("the books do not balance")

// auditCommand prints the audit of the orders made or changed within the time before now. It is an error when the books do not
// balance, or when that could not be found out.
func auditCommand(ctx context.Context, c config, within time.Duration, asJSON bool, out, errOut io.Writer) error {
	if within <= 0 {
		return errors.New("-since must be a duration such as 24h")
	}
	return withStore(ctx, &c, func(store *store) error {
		gateway := newIamportClient(iamportConfig{url: c.iamportURL, key: c.iamportKey, secret: c.iamportSecret, sandbox: c.sandbox})
		a := &auditor{store: store, gateway: gateway, now: time.Now, progress: errOut, progressEvery: time.Second,
			pause: func(ctx context.Context) error { return pause(ctx, auditPause) }}
		report, err := a.audit(ctx, a.now().Add(-within))
		if err != nil {
			return fmt.Errorf("the audit was not finished: %w", err)
		}
		if err := report.print(out, asJSON); err != nil {
			return err
		}
		if n := len(report.Mismatches); n > 0 {
			return fmt.Errorf("%w; mismatches: %d", errUnbalanced, n)
		}
		return nil
	})
}

// print writes the report as a table or as JSON.
func (r auditReport) print(out io.Writer, asJSON bool) error {
	var text strings.Builder
	if asJSON {
		encoder := json.NewEncoder(&text)
		encoder.SetIndent("", "  ")
		if err := encoder.Encode(r); err != nil {
			return err
		}
	} else {
		r.table(&text)
	}
	_, err := io.WriteString(out, text.String())
	return err
}

func (r auditReport) table(out *strings.Builder) {
	const line = "%-24s  %-24s  %13s  %s\n"
	if len(r.Mismatches) > 0 {
		fmt.Fprintf(out, line, "order", "payment or painting", "won", "mismatch")
	}
	for _, m := range r.Mismatches {
		fmt.Fprintf(out, line, m.Order, m.ImpUID+m.Painting, grouped(m.Amount), m.Kind)
		if m.Due != nil {
			fmt.Fprintf(out, "    due for %v, %d attempts; last error: %s\n", time.Time(r.At).Sub(time.Time(m.Due.Since)).Round(time.Second),
				m.Due.Attempts, m.Due.LastError)
		}
		fmt.Fprintf(out, "    %s; %s\n", m.Meaning, m.Remedy)
	}
	if len(r.Mismatches) > 0 {
		fmt.Fprintln(out)
	}
	fmt.Fprintf(out, "%-8s  %15s  %15s\n", "won", "gateway", "books")
	for _, row := range []struct {
		name           string
		gateway, books int64
	}{
		{"taken", r.Gateway.Taken, r.Books.Taken},
		{"refunded", r.Gateway.Refunded, r.Books.Refunded},
		{"kept", r.Gateway.Kept, r.Books.Kept},
	} {
		fmt.Fprintf(out, "%-8s  %15s  %15s\n", row.name, grouped(row.gateway), grouped(row.books))
	}
	since, _ := r.Since.MarshalText()
	fmt.Fprintf(out, "%d of %d orders made or changed since %s match\n", r.Matching, r.Orders, since)
}

// grouped is won with a comma before every third digit, and nothing for none.
func grouped(won int64) string {
	digits := strconv.FormatInt(won, 10)
	for i := len(digits) - 3; i > 0 && digits[i-1] != '-'; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}
