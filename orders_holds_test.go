package main

import (
	"encoding/json"
	"testing"
	"time"
)

// create asks for an order of paintings of 99,000 won.
func (s *shop) create(user, number string, paintings ...string) answer {
	s.t.Helper()
	return s.call(user, "POST", "/api/orders", orderBody(number, paintings...))
}

// idOf is the order that an answer to POST /api/orders names.
func (s *shop) idOf(a answer) string {
	s.t.Helper()
	var made orderCreated
	check(s.t, json.Unmarshal([]byte(s.want(a, 201, "주문서 생성 성공").body), &made))
	return made.OrderID
}

// heldUntil is when the hold of an order ends.
func (s *shop) heldUntil(order string) time.Time {
	s.t.Helper()
	at, err := time.Parse(time.RFC3339, queryText(s.t, s.config.databaseURL,
		`SELECT to_char(held_until AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') FROM orders WHERE id = '`+order+`'`))
	check(s.t, err)
	return at
}

func TestOrderNumberSentAgain(t *testing.T) {
	s := newShop(t)
	a, b := s.painting(99000), s.painting(99000)
	number := newNumber()
	first := s.idOf(s.create(buyerA, number, a, b))
	held := s.heldUntil(first)

	// The same request again is the same order, and its hold begins anew.
	s.clock.advance(10 * time.Minute)
	if again := s.idOf(s.create(buyerA, number, b, a)); again != first {
		t.Fatalf("the same body made order %s beside %s", again, first)
	}
	if got := s.heldUntil(first); !got.Equal(held.Add(10 * time.Minute)) {
		t.Fatalf("held until %v, want ten minutes more than %v", got, held)
	}
	s.later(21 * time.Minute) // past the end of the first hold
	s.wantUntouched(first, a)

	// Anything different is another order, and replaces it.
	for name, change := range map[string]func(map[string]any){
		"address": func(body map[string]any) { put(body, "deliveryInfo.address", "[00000] 어느시 다른로 2") },
		"orderer": func(body map[string]any) { put(body, "ordererInfo.phoneNum", "010-1111-1111") },
		"details": func(body map[string]any) { put(body, "deliveryDetails", absent) },
	} {
		body := orderBody(number, a, b)
		change(body)
		next := s.idOf(s.call(buyerA, "POST", "/api/orders", body))
		if next == first {
			t.Fatalf("another %s is the same order", name)
		}
		first = next
	}

	// A price that the shop has changed meanwhile changes nothing of a request sent twice, and refuses any other.
	order := s.idOf(s.create(buyerA, number, a))
	s.catalogue(120000, true, a)
	if again := s.idOf(s.create(buyerA, number, a)); again != order {
		t.Fatalf("the same body made order %s beside %s", again, order)
	}
	s.wantNaming(s.create(buyerA, number, a, b), 400, "orderItems[0].price")
	s.wantUntouched(order, a)
}

func TestOrderNumberOfAPaidOrder(t *testing.T) {
	s := newShop(t)
	painting, other := s.painting(99000), s.painting(99000)
	number := newNumber()
	order := s.idOf(s.create(buyerA, number, painting))
	s.want(s.report(s.charge(order, 109000)), 200, "결제 성공")
	for status, reach := range []func(){
		statusPaid:      func() {},
		statusPreparing: func() { s.want(s.call(adminID, "PATCH", "/api/orders/"+order, map[string]int{"status": 1}), 200, "") },
		statusShipping:  func() { s.want(s.call(adminID, "PATCH", "/api/orders/"+order, map[string]int{"status": 2}), 200, "") },
		statusDelivered: func() { s.want(s.call(adminID, "PATCH", "/api/orders/"+order, map[string]int{"status": 3}), 200, "") },
		statusReturning: func() { s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, map[string]int{"status": 4}), 200, "") },
		statusCancelled: func() { s.want(s.call(adminID, "DELETE", "/api/orders/"+order, nil), 200, "") },
	} {
		reach()
		for _, wanted := range []string{painting, other} {
			a := s.create(buyerA, number, wanted)
			s.wantNaming(a, 409, "result.id")
			var made orderCreated
			if json.Unmarshal([]byte(a.body), &made); made.OrderID != "" {
				t.Fatalf("status %d: the refusal names order %s", status, made.OrderID)
			}
		}
		if got := s.statusOf(order); got != status {
			t.Fatalf("the number sent again moved the order from %d to %d", status, got)
		}
	}
	s.idOf(s.create(buyerB, number, painting)) // a number is unique for one buyer
}

func TestHoldsAreBounded(t *testing.T) {
	s := newShop(t) // ORDER_HOLD is 30 minutes
	painting, other := s.painting(99000), s.painting(99000)
	start := s.clock.Now()
	s.order(buyerA, painting)
	s.clock.advance(25 * time.Minute)
	if got := s.heldUntil(s.order(buyerA, painting, other)); !got.Equal(start.Add(55 * time.Minute)) {
		t.Fatalf("the second hold ends at %v", got.Sub(start))
	}
	s.clock.advance(20 * time.Minute)
	third := s.order(buyerA, painting)
	if got := s.heldUntil(third); !got.Equal(start.Add(time.Hour)) {
		t.Fatalf("the third hold ends after %v, want twice ORDER_HOLD after the first began", got.Sub(start))
	}

	// The request sent again does not go beyond that either.
	number := newNumber()
	s.clock.advance(5 * time.Minute)
	fourth := s.idOf(s.create(buyerA, number, painting))
	s.clock.advance(5 * time.Minute)
	s.idOf(s.create(buyerA, number, painting))
	if got := s.heldUntil(fourth); !got.Equal(start.Add(time.Hour)) {
		t.Fatalf("sent again, the hold ends after %v", got.Sub(start))
	}

	s.later(5 * time.Minute)
	if !s.inStock(buyerB, painting) {
		t.Fatal("the painting is still held")
	}
	// Now it is left to others for ORDER_HOLD.
	ended := s.clock.Now()
	until, _ := jsonTime(ended.Add(30 * time.Minute)).MarshalText()
	s.wantBody(s.create(buyerA, newNumber(), painting), 409, `{"message":"이미 판매되었거나 다른 구매자가 결제 중인 작품이 있습니다",`+
		`"products":[{"_id":"`+painting+`","title":"잠식","reason":"held","until":"`+string(until)+`"}]}`)
	s.want(s.create(buyerA, newNumber(), other), 201, "") // its last hold was none of those
	s.clock.advance(29 * time.Minute)
	s.want(s.create(buyerA, newNumber(), painting), 409, "")
	s.clock.advance(time.Minute)
	s.want(s.create(buyerA, newNumber(), painting), 201, "")
}

// Others may have a painting at once that a buyer has to leave to them, and a first hold that ended leaves it to nobody.
func TestHoldEndedIsForOthers(t *testing.T) {
	s := newShop(t)
	painting := s.painting(99000)
	s.order(buyerA, painting)
	s.later(31 * time.Minute)
	order := s.order(buyerA, painting) // a hold that took over nothing may be followed by another
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "")
	s.order(buyerA, painting)
	s.clock.advance(20 * time.Minute)
	s.order(buyerA, painting)
	s.later(31 * time.Minute)
	s.want(s.create(buyerA, newNumber(), painting), 409, "")
	s.order(buyerB, painting)
}

// An unpaid order that the service has ended is no error page for a payment window that closes late.
func TestDeleteOfAnEndedOrder(t *testing.T) {
	s := newShop(t)
	a, b := s.painting(99000), s.painting(99000)
	replaced := s.order(buyerA, a)
	expired := s.order(buyerA, b)
	s.later(31 * time.Minute)
	deleted := s.order(buyerA, a)
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+deleted, nil), 200, messageDeleted)
	before := queryText(t, s.config.databaseURL, `SELECT json_agg(o ORDER BY id) FROM orders o`)
	for _, order := range []string{replaced, expired} {
		for _, body := range []any{nil, map[string]int{"status": 4}, map[string]int{"status": 5}, map[string]int{"status": 9}} {
			s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, body), 200, messageDeleted)
		}
		s.want(s.call(buyerB, "DELETE", "/api/orders/"+order, nil), 404, messageNoSuchOrder)
		s.want(s.call(buyerA, "GET", "/api/orders/"+order, nil), 404, messageOrderUnknown)
		s.want(s.call(adminID, "PATCH", "/api/orders/"+order, map[string]int{"status": 0}), 404, messageNoSuchOrder)
	}
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+deleted, nil), 404, messageNoSuchOrder)
	if after := queryText(t, s.config.databaseURL, `SELECT json_agg(o ORDER BY id) FROM orders o`); after != before {
		t.Fatalf("the orders changed from %s\nto %s", before, after)
	}
}
