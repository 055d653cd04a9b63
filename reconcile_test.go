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

// A notice may be lost of anything that happens, however old its order is: the gateway's lists have it.
func TestLostNotices(t *testing.T) {
	s := newShop(t)
	s.fake.listDelay = 5 * time.Minute
	order, kept, painting := s.paid(buyerA)
	refunded, refundedUID, freed := s.paid(buyerB)
	partly, partlyUID, _ := s.paid(buyerB)
	unpaid := s.order(buyerA, s.painting(99000))
	for _, age := range []time.Duration{time.Minute, 40 * time.Hour, 100 * 24 * time.Hour} {
		s.later(age)
		second := s.charge(order, 109000)
		late := s.charge(unpaid, 109000)
		wrong := s.charge(unpaid, 1000)
		foreign := s.charge("another-shop-1", 109000)
		if age > time.Hour && refunded != "" {
			check(t, s.fake.refundInConsole(refundedUID, 0))
			check(t, s.fake.refundInConsole(partlyUID, 9000))
		}
		s.later(4 * time.Minute)
		if s.row(second) != "none" {
			t.Fatalf("after %v: found before the list shows it", age)
		}
		s.later(time.Minute)
		s.later(time.Second)
		if s.row(second) != "refunded: "+reasonDuplicate || s.back(second) != 109000 || s.row(kept) != "kept" || s.inStock("", painting) {
			t.Errorf("after %v, a second payment: %s, the first %s", age, s.row(second), s.row(kept))
		}
		if s.row(wrong) != "refunded: "+reasonAmount || s.back(wrong) != 1000 || s.back(foreign) != 0 {
			t.Errorf("after %v, a wrong amount: %s", age, s.row(wrong))
		}
		want := map[bool]string{true: "kept", false: "refunded: " + reasonDuplicate}[age == time.Minute]
		if s.row(late) != want || s.statusOf(unpaid) != statusPaid {
			t.Errorf("after %v, an order nobody reported: %s, status %d", age, s.row(late), s.statusOf(unpaid))
		}
		if age > time.Hour && refunded != "" {
			if s.statusOf(refunded) != statusCancelled || !s.inStock("", freed) {
				t.Errorf("after %v, refunded in the console: status %d", age, s.statusOf(refunded))
			}
			if s.statusOf(partly) != statusPaid || queryText(t, s.config.databaseURL, `SELECT refunded FROM payments WHERE imp_uid = '`+partlyUID+`'`) != "9000" {
				t.Errorf("after %v, partly refunded in the console: status %d", age, s.statusOf(partly))
			}
			refunded = ""
		}
	}
	if n := queryText(t, s.config.databaseURL, `SELECT count(*) FROM orders WHERE next_look_at IS NOT NULL`); n != "0" {
		t.Errorf("%s orders are checked for ever", n)
	}
	s.wantBalanced()
}

// What the lists cost does not grow with the orders: one call a list and round, and no call about a single order.
func TestListsCostACall(t *testing.T) {
	s := newShop(t)
	for range 20 {
		s.paid(newTestID())
		s.charge("another-shop-1", 5000)
	}
	s.later(time.Second) // the first reading
	lists, others := s.fake.calls("list"), s.fake.calls("findAll")+s.fake.calls("payment")
	for range 3 {
		s.later(time.Hour)
	}
	if n := s.fake.calls("list") - lists; n != 6 {
		t.Errorf("%d lists were asked for in 3 rounds", n)
	}
	if n := s.fake.calls("findAll") + s.fake.calls("payment") - others; n != 0 {
		t.Errorf("%d orders or payments were asked about", n)
	}
}

// A list that was not read whole is read again from where the reading ended, by one replica at a time.
func TestListReadingGoesOn(t *testing.T) {
	s := newShop(t)
	order, _, _ := s.paid(buyerA)
	s.later(time.Second)
	second := s.charge(order, 109000)
	s.fake.setFaults(func(call, _ string) fault {
		if call == "list" {
			return fault{before: answer500}
		}
		return fault{}
	})
	for range 30 {
		s.later(24 * time.Hour)
	}
	s.fake.setFaults(nil)
	now := s.now()
	_, err := s.store.claimList(t.Context(), gatewayPaid.listAt(gatewayIamport), now)
	check(t, err)
	s.later(time.Second) // another replica reads the list
	if s.row(second) != "none" {
		t.Fatal("two replicas read one list")
	}
	s.later(refundLease) // it vanished
	if s.row(second) != "refunded: "+reasonDuplicate {
		t.Fatalf("the payment is %s", s.row(second))
	}
	s.wantBalanced()
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
