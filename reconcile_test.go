package main

import (
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestHoldEnds(t *testing.T) {
	s := newShop(t)
	unpaid, paid := s.painting(99000), s.painting(99000)
	first, second := s.order(buyerA, unpaid), s.order(buyerB, paid)
	impUID := s.charge(second, 109000) // its browser was closed, and no notice came
	s.later(29 * time.Minute)
	if s.inStock("", unpaid) {
		t.Fatal("the hold ended early")
	}
	s.later(time.Minute)
	s.want(s.call(buyerA, "GET", "/api/orders/"+first, nil), 404, "")
	if !s.inStock("", unpaid) || s.statusOf(second) != statusPaid || s.row(impUID) != "kept" {
		t.Fatalf("in stock %v, status %d, %s", s.inStock("", unpaid), s.statusOf(second), s.row(impUID))
	}
	s.wantBalanced()
}

func TestHoldWaitsForTheGateway(t *testing.T) {
	s := newShop(t)
	painting := s.painting(99000)
	order := s.order(buyerA, painting)
	s.fake.setFaults(func(string, string) fault {
		return fault{before: func(w http.ResponseWriter, r *http.Request) bool { return answer500(w, r) }}
	})
	s.later(59 * time.Minute)
	s.want(s.call(buyerA, "GET", "/api/orders/"+order, nil), 200, "")
	s.later(time.Minute)
	s.want(s.call(buyerA, "GET", "/api/orders/"+order, nil), 404, "")
	if !s.inStock("", painting) {
		t.Fatal("held for longer than twice ORDER_HOLD")
	}
	impUID := s.charge(order, 109000)
	s.fake.setFaults(nil)
	s.later(time.Minute) // the tombstone is asked about once the gateway answers
	if s.statusOf(order) != statusPaid || s.row(impUID) != "kept" {
		t.Fatalf("late money was not found: %s", s.row(impUID))
	}
}

// A notice may be lost of anything that happens to an order: the reconciler looks at each once more.
func TestPaidOrdersAreLookedAtOnceMore(t *testing.T) {
	s := newShop(t)
	order, kept, painting := s.paid(buyerA)
	refunded, _, freed := s.paid(buyerB)
	second := s.charge(order, 109000)
	check(t, s.fake.refundInConsole(queryText(t, s.config.databaseURL, `SELECT imp_uid FROM payments WHERE order_id = '`+refunded+`'`), 0))
	s.later(29 * time.Minute)
	if s.row(second) != "none" || s.statusOf(refunded) != statusPaid {
		t.Fatal("looked at early")
	}
	s.later(time.Minute)
	if s.row(second) != "refunded: "+reasonDuplicate || s.back(second) != 109000 || s.row(kept) != "kept" || s.inStock("", painting) {
		t.Errorf("a second payment: %s, the first %s", s.row(second), s.row(kept))
	}
	if s.statusOf(refunded) != statusCancelled || !s.inStock("", freed) {
		t.Errorf("refunded in the console: status %d", s.statusOf(refunded))
	}
	third := s.charge(order, 109000)
	s.later(30 * time.Minute) // not yet
	s.later(23 * time.Hour)
	if s.back(third) != 109000 || s.statusOf(order) != statusPaid {
		t.Errorf("a third payment: %s", s.row(third))
	}
	s.later(time.Hour)
	if n := queryText(t, s.config.databaseURL, `SELECT count(*) FROM orders WHERE next_look_at IS NOT NULL`); n != "0" {
		t.Errorf("%s orders are looked at for ever", n)
	}
}

// A right payment behind a wrong one, both unreported: the newest is not the only one.
func TestOlderPaymentBehindAWrongOne(t *testing.T) {
	s := newShop(t)
	order := s.order(buyerA, s.painting(99000))
	right := s.charge(order, 109000)
	s.clock.advance(time.Second)
	wrong := s.charge(order, 1000)
	s.refuseCancels() // the wrong one stays paid at the gateway
	s.later(30 * time.Minute)
	if s.statusOf(order) != statusPaid || s.row(right) != "kept" || s.row(wrong) != "refunding: "+reasonAmount {
		t.Errorf("right %s, wrong %s", s.row(right), s.row(wrong))
	}
}

func TestRefundGoesOnAfterTheProcessDied(t *testing.T) {
	s := newShop(t)
	order, impUID, _ := s.paid(buyerA)
	row, err := s.store.bookRefund(t.Context(), actor{kind: actorBuyer}, order, statusPaid, reasonBuyerCancel, s.now())
	check(t, err)
	if row.impUID != impUID {
		t.Fatal(row)
	}
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 409, messageCancelling)
	s.later(time.Second) // another process may still be at it
	if s.back(impUID) != 0 {
		t.Fatal("the lease was not kept")
	}
	s.later(refundLease)
	if s.back(impUID) != 109000 || s.statusOf(order) != statusCancelled {
		t.Fatalf("status %d, %d won back", s.statusOf(order), s.back(impUID))
	}
}

func TestRefundPausesGrow(t *testing.T) {
	s := newShop(t)
	order, impUID, _ := s.paid(buyerA)
	s.refuseCancels()
	s.call(buyerA, "DELETE", "/api/orders/"+order, nil)
	var pauses []string
	for range 4 {
		pauses = append(pauses, queryText(t, s.config.databaseURL, `SELECT extract(epoch FROM next_attempt_at - updated_at)::int FROM payments`))
		s.later(time.Hour)
	}
	if got := strings.Join(pauses, " "); got != "20 40 80 160" {
		t.Errorf("pauses %s", got)
	}
	if e := queryText(t, s.config.databaseURL, `SELECT last_error FROM payments`); !strings.Contains(e, "거절") {
		t.Errorf("last error %q", e)
	}
	s.fake.setFaults(nil)
	s.later(time.Hour)
	if s.back(impUID) != 109000 || s.statusOf(order) != statusCancelled {
		t.Errorf("status %d, %d won back", s.statusOf(order), s.back(impUID))
	}
}

// A backlog is worked off round by round.
func TestRoundEnds(t *testing.T) {
	s := newShop(t)
	const orders = 3 * maxParallel
	for range orders {
		s.order(newTestID(), s.painting(99000))
	}
	s.clock.advance(s.config.hold)
	s.fake.setFaults(func(string, string) fault { s.clock.advance(s.config.reconcile); return fault{} })
	for round := 1; round <= 3; round++ {
		check(t, s.settler.reconcileRound(t.Context()))
		if n := s.fake.calls("findAll"); n != round*maxParallel {
			t.Errorf("after round %d the gateway was asked about %d orders", round, n)
		}
	}
}
