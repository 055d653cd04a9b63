package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// audit is the audit of the last 24 hours.
func (s *shop) audit() auditReport {
	s.t.Helper()
	return s.auditSince(s.clock.Now().Add(-24 * time.Hour))
}

// mismatchTexts are kinds of mismatch as a report has them.
func mismatchTexts(kinds []mismatchKind) (all []string) {
	for _, k := range kinds {
		all = append(all, k.name+": "+k.remedy)
	}
	return all
}

// wantMismatches fails unless the audit finds exactly these kinds of mismatch, in this order.
func (s *shop) wantMismatches(kinds ...mismatchKind) []mismatch {
	s.t.Helper()
	report := s.audit()
	var got []string
	for _, m := range report.Mismatches {
		got = append(got, m.Kind+": "+m.Remedy)
	}
	if want := mismatchTexts(kinds); !slices.Equal(got, want) {
		s.t.Fatalf("found %q, want %q", got, want)
	}
	return report.Mismatches
}

func TestAuditOfBalancedBooks(t *testing.T) {
	s := newDirectShop(t)
	s.paid(buyerA)
	s.orderAt(statusReturning)
	cancelled, _, _ := s.paid(buyerA)
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+cancelled, nil), 200, "")
	deleted := s.order(buyerA, s.painting(99000))
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+deleted, nil), 200, "")
	forged := s.order(buyerA, s.painting(99000))
	s.want(s.report(s.charge(forged, 1000)), 400, "")
	part, impUID, _ := s.paid(buyerB)
	check(t, s.fake.refundInConsole(impUID, 9000))
	s.want(s.notice(impUID), 200, "")
	s.fake.pay(fakePayment{MerchantUID: part, Amount: 109000, Status: "failed"})
	s.fake.pay(fakePayment{MerchantUID: part, Amount: 109000, Sandbox: true})
	check(t, s.fake.refundInConsole(s.charge(part, 5000), 0)) // came and went without us
	s.charge("another-shop-1", 109000)

	s.wantBalanced()
	report := s.audit()
	want := auditSum{Taken: 4*109000 + 1000, Refunded: 109000 + 1000 + 9000, Kept: 3*109000 - 9000}
	if report.Orders != 6 || report.Matching != 6 || report.Ledger != want || report.Gateway != want {
		t.Fatalf("%+v, want %+v", report, want)
	}
}

// Every way in which books and gateway, or orders and paintings, can disagree, all at once.
func TestAuditFindsMismatches(t *testing.T) {
	s := newDirectShop(t)
	// The schema refuses paintings that do not agree with their orders; books from before it did may have some.
	execSQL(t, s.config.databaseURL, `
		ALTER TABLE orders DISABLE TRIGGER orders_are_whole;
		ALTER TABLE payments DISABLE TRIGGER payments_agree_with_orders;
		ALTER TABLE products DISABLE TRIGGER paintings_agree_with_orders`)
	behindItsBack := func(sql, order string) {
		execSQL(t, s.config.databaseURL, strings.ReplaceAll(sql, "$1", "'"+order+"'"))
	}
	var painting string // of the last order
	order := func() string { painting = s.painting(99000); return s.order(newTestID(), painting) }
	paid := func() (order, impUID string) { order, impUID, painting = s.paid(newTestID()); return order, impUID }
	atGateway := func(impUID string, change func(*fakePayment)) { s.fake.set(impUID, change) }

	type row struct {
		name  string
		order string
		found []mismatchKind
		left  []mismatchKind // after the reconciler's next round
	}
	var rows []row
	settled := func(name, order string, found ...mismatchKind) { rows = append(rows, row{name, order, found, nil}) }
	byHand := func(name, order string, found ...mismatchKind) { rows = append(rows, row{name, order, found, found}) }

	o := order()
	s.charge(o, 109000)
	settled("closed tab", o, mismatchPaidThere)
	o = order()
	s.charge(o, 1000)
	settled("wrong amount, not reported", o, mismatchPaidThere)
	o = order()
	s.want(s.call(adminID, "DELETE", "/api/orders/"+o, nil), 200, "")
	s.charge(o, 109000)
	settled("tombstone", o, mismatchPaidThere)
	o, _ = paid()
	s.charge(o, 109000)
	settled("second payment", o, mismatchTwice)
	o = order()
	s.charge(o, 109000)
	s.charge(o, 109000)
	settled("two payments, neither reported", o, mismatchPaidThere, mismatchTwice)
	o, impUID := paid()
	check(t, s.fake.refundInConsole(impUID, 0))
	settled("refunded in the console", o, mismatchCancelled)
	o, impUID = paid()
	check(t, s.fake.refundInConsole(impUID, 9000))
	settled("partly refunded in the console", o, mismatchPartBack)
	o, impUID = paid()
	_, err := s.store.bookRefund(t.Context(), actor{kind: actorBuyer}, o, statusPaid, reasonBuyerCancel, s.now())
	check(t, err)
	check(t, s.fake.refundInConsole(impUID, 0))
	settled("refund booked, made by another hand", o, mismatchDueDone)

	o, impUID = paid()
	atGateway(impUID, func(p *fakePayment) { p.Amount = 108000 })
	byHand("another amount", o, mismatchAmount)
	o, impUID = paid()
	atGateway(impUID, func(p *fakePayment) { p.Currency = "USD" })
	byHand("another currency", o, mismatchAmount)
	o, impUID = paid()
	atGateway(impUID, func(p *fakePayment) { p.Status = "failed" })
	byHand("never paid", o, mismatchNoMoney)
	o, impUID = paid()
	s.want(s.call(adminID, "DELETE", "/api/orders/"+o, nil), 200, "")
	atGateway(impUID, func(p *fakePayment) { p.Status, p.Cancelled = "paid", 0 })
	byHand("refund undone", o, mismatchNotBack)
	o, _ = paid()
	behindItsBack(`UPDATE payments SET state = 'refunded', reason = 'none', refunded = amount WHERE order_id = $1`, o)
	byHand("money said to be back", o, mismatchNotBack, mismatchUnpaid)
	o, _ = paid()
	behindItsBack(`UPDATE orders SET status = 5 WHERE id = $1`, o)
	byHand("order cancelled alone", o, mismatchNoOrder, mismatchStray)
	o = order()
	behindItsBack(`UPDATE orders SET ended = 'deleted' WHERE id = $1`, o)
	byHand("painting left with a tombstone", o, mismatchStray)
	stray := s.painting(99000)
	o, _ = paid()
	behindItsBack(`UPDATE products SET order_id = $1 WHERE id = '`+stray+`'`, o)
	byHand("painting never asked for", o, mismatchStray)
	o, _ = paid()
	behindItsBack(`UPDATE products SET order_id = NULL WHERE order_id = $1`, o)
	byHand("painting taken from its order", o, mismatchMissing)

	found := func() map[string][]string {
		kinds := map[string][]string{}
		for _, m := range s.audit().Mismatches {
			kinds[m.Order] = append(kinds[m.Order], m.Kind+": "+m.Remedy)
			if lone := m.Kind == mismatchUnpaid.name || m.Kind == mismatchNoOrder.name; lone != (m.ImpUID+m.Painting == "") || m.Meaning == "" {
				t.Errorf("%+v", m)
			}
		}
		return kinds
	}
	want := func(look string, name string, got []string, kinds []mismatchKind) {
		if !slices.Equal(got, mismatchTexts(kinds)) {
			t.Errorf("%s, %s: found %q, want %q", name, look, got, mismatchTexts(kinds))
		}
	}
	first, second := found(), found()
	check(t, s.settler.reconcileRound(t.Context()))
	third := found()
	for _, r := range rows {
		want("at first", r.name, first[r.order], r.found)
		want("at the second audit", r.name, second[r.order], r.found) // the first put nothing right by itself
		want("after a round of the reconciler", r.name, third[r.order], r.left)
	}
}

func TestAuditOfDueRefund(t *testing.T) {
	s := newDirectShop(t)
	order, impUID, _ := s.paid(buyerA)
	s.refuseCancels()
	booked := s.clock.Now()
	s.call(buyerA, "DELETE", "/api/orders/"+order, nil)
	s.later(time.Hour)
	execSQL(t, s.config.databaseURL, `UPDATE payments SET updated_at = updated_at - interval '1 year'`)
	s.clock.advance(365 * 24 * time.Hour) // a refund that is due is never too old
	found := s.wantMismatches(mismatchDue)[0]
	if found.Order != order || found.ImpUID != impUID || found.Amount != 109000 || !time.Time(found.Due.Since).Equal(booked) || found.Due.Attempts != 2 ||
		!strings.Contains(found.Due.LastError, "거절") {
		t.Errorf("%+v %+v", found, found.Due)
	}
	var table strings.Builder
	s.audit().table(&table)
	if !strings.Contains(table.String(), "    due for 8761h0m0s, 2 attempts; last error: the gateway refused (code -1): \"거절\"\n") {
		t.Error(table.String())
	}
	s.fake.setFaults(nil)
	s.later(0)
	s.wantBalanced()
}

func TestAuditLooksBackAsFarAsAsked(t *testing.T) {
	s := newDirectShop(t)
	_, impUID, _ := s.paid(buyerA)
	check(t, s.fake.refundInConsole(impUID, 0))
	s.clock.advance(25 * time.Hour)
	if report := s.audit(); report.Orders != 0 || len(report.Mismatches) != 0 {
		t.Errorf("24 hours: %+v", report)
	}
	report, err := s.auditor().audit(t.Context(), s.clock.Now().Add(-26*time.Hour))
	if err != nil || report.Orders != 1 || len(report.Mismatches) != 1 {
		t.Errorf("26 hours: %+v, %v", report, err)
	}
	s.want(s.report(impUID), 400, "") // now the order has changed
	if report := s.audit(); report.Orders != 1 || report.Matching != 1 {
		t.Errorf("changed since: %+v", report)
	}
}

// The gateway's answer is of a moment at which the books may have been other than they are now.
func TestAuditOfMovingBooks(t *testing.T) {
	s := newDirectShop(t)
	order, impUID, _ := s.paid(buyerA)
	s.fake.faultOnce("findAll", fault{after: func(http.ResponseWriter, *http.Request) bool {
		s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "")
		return false
	}})
	s.wantBalanced()
	if s.row(impUID) != "refunded: "+reasonBuyerCancel {
		t.Fatal("nothing moved")
	}

	unpaid := s.order(buyerA, s.painting(99000))
	late := s.charge(unpaid, 109000) // its report is on the way
	a := s.auditor()
	a.pause = func(context.Context) error { s.want(s.report(late), 200, ""); return nil }
	report, err := a.audit(t.Context(), s.clock.Now().Add(-time.Hour))
	if err != nil || len(report.Mismatches) != 0 || report.Matching != 2 {
		t.Fatalf("a payment on its way: %+v, %v", report, err)
	}

	s.fake.setFaults(func(string, string) fault {
		return fault{after: func(http.ResponseWriter, *http.Request) bool {
			execSQL(t, s.config.databaseURL, `UPDATE payments SET attempts = attempts + 1 WHERE state = 'kept'`)
			return false
		}}
	})
	s.wantMismatches(mismatchMoving)
}

func TestAuditWhenTheGatewayFails(t *testing.T) {
	heavy(t)
	s := newDirectShop(t)
	for range 3 * auditFailures {
		s.order(newTestID(), s.painting(99000))
	}
	for range auditFailures - 1 {
		s.fake.faultOnce("findAll", fault{before: answer500})
	}
	s.wantBalanced()

	before := s.fake.calls("findAll")
	s.fake.setFaults(func(string, string) fault { return fault{before: answer500} })
	_, err := s.auditor().audit(t.Context(), s.clock.Now().Add(-time.Hour))
	var silent *gatewayError
	if !errors.As(err, &silent) {
		t.Errorf("a silent gateway: %v", err)
	}
	if n := s.fake.calls("findAll") - before; n > 2*auditFailures {
		t.Errorf("asked %d times", n)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.auditor().audit(ctx, s.clock.Now().Add(-time.Hour)); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}

// progress is a writer that tells when it is first written to.
type progress struct {
	bytes.Buffer
	written chan struct{}
}

func (p *progress) Write(text []byte) (int, error) {
	if p.Len() == 0 {
		close(p.written)
	}
	return p.Buffer.Write(text)
}

func TestAuditTellsHowFarItIs(t *testing.T) {
	s := newDirectShop(t)
	s.paid(buyerA)
	told := &progress{written: make(chan struct{})}
	s.fake.faultOnce("findAll", fault{before: stopUntil(told.written)})
	a := s.auditor()
	a.progress, a.progressEvery = told, time.Millisecond
	_, err := a.audit(t.Context(), s.clock.Now().Add(-time.Hour))
	check(t, err)
	if text := told.String(); !strings.HasPrefix(text, "\rlooking at order 1 of 1") || !strings.HasSuffix(text, "\n") {
		t.Errorf("%q", text)
	}
}

// auditCommand runs the command against the shop.
func (s *shop) auditCommand(args ...string) (out string, err error) {
	environment := map[string]string{"DATABASE_URL": s.asService, "IAMPORT_URL": s.config.iamportURL,
		"IAMPORT_KEY": s.config.iamportKey, "IAMPORT_SECRET": s.config.iamportSecret,
		"PORTONE_URL": s.config.portoneURL, "PORTONE_API_SECRET": s.config.portoneSecret, "PORTONE_STORE_ID": s.config.portoneStoreID}
	var text bytes.Buffer
	err = run(s.t.Context(), append([]string{"audit"}, args...), func(name string) string { return environment[name] }, nil, &text, io.Discard)
	return text.String(), err
}

func TestAuditCommand(t *testing.T) {
	heavy(t)
	s := newShop(t)
	s.clock.nanoseconds.Store(time.Now().UnixNano())
	s.paid(buyerA)
	out, err := s.auditCommand()
	const sums = `won               gateway           ledger
taken             109,000          109,000
refunded                0                0
by hand                 0                0
kept              109,000          109,000
1 of 1 orders made or changed since `
	if err != nil || !strings.HasPrefix(out, sums) {
		t.Errorf("balanced: %v\n%s", err, out)
	}

	order := s.order(buyerB, s.painting(99000))
	impUID := s.charge(order, 109000)
	out, err = s.auditCommand("-since", "1h")
	want := "order                     payment or painting                 won  mismatch\n" +
		order + "  " + impUID + "                109,000  paid there, not here\n" +
		"    the buyer has paid and it is not booked; the reconciler settles it at its next round\n" + `
won               gateway           ledger
taken             218,000          109,000
refunded                0                0
by hand                 0                0
kept              218,000          109,000
1 of 2 orders made or changed since `
	if !errors.Is(err, errUnbalanced) || !strings.HasPrefix(out, want) {
		t.Errorf("unbalanced: %v\n%s\nwant\n%s", err, out, want)
	}

	out, err = s.auditCommand("-json")
	var report struct {
		Orders, Matching int
		Gateway, Books   auditSum
		Mismatches       []struct {
			Order, Kind string
			ImpUID      string `json:"imp_uid"`
			Amount      int64
		}
	}
	if problem := json.Unmarshal([]byte(out), &report); !errors.Is(err, errUnbalanced) || problem != nil {
		t.Fatalf("%v, %v\n%s", err, problem, out)
	}
	if m := report.Mismatches; len(m) != 1 || m[0].Order != order || m[0].ImpUID != impUID || m[0].Amount != 109000 || m[0].Kind != mismatchPaidThere.name ||
		report.Orders != 2 || report.Matching != 1 || report.Gateway.Kept != 218000 || report.Books.Kept != 109000 {
		t.Errorf("%+v", report)
	}
	s.clock.nanoseconds.Store(time.Now().UnixNano())
	check(t, s.settler.reconcileRound(t.Context()))
	if out, err := s.auditCommand("-json"); err != nil || !strings.Contains(out, `"mismatches": []`) {
		t.Errorf("balanced: %v\n%s", err, out)
	}

	s.fake.setFaults(func(string, string) fault { return fault{before: answer500} })
	if out, err := s.auditCommand(); err == nil || errors.Is(err, errUnbalanced) || !strings.Contains(out, mismatchUnchecked.name) {
		t.Errorf("a silent gateway: %v\n%s", err, out)
	}
	for _, args := range [][]string{{"-since", "0s"}, {"-since", "-1h"}, {"-since", "yesterday"}, {"-json", "more"}} {
		if out, err := s.auditCommand(args...); err == nil || out != "" {
			t.Errorf("%q: %v\n%s", args, err, out)
		}
	}
	s.config.iamportKey = ""
	if _, err := s.auditCommand(); err == nil || !strings.Contains(err.Error(), "IAMPORT_KEY") {
		t.Errorf("without a key: %v", err)
	}
}
