package main

import (
	"sync"
	"testing"
)

// crowd runs n calls at once and counts their statuses.
func concurrently(n int, do func(i int) answer) map[int]int {
	count := map[int]int{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-start
			a := do(i)
			mu.Lock()
			count[a.status]++
			mu.Unlock()
		})
	}
	close(start)
	wg.Wait()
	return count
}

func (s *shop) wantOneOwner() {
	s.t.Helper()
	wantOneOwner(s.t, s.config.databaseURL)
}

// wantOneOwner fails unless every painting's order is live and lists it, and every live order has all of its paintings.
func wantOneOwner(t testing.TB, databaseURL string) {
	t.Helper()
	for name, sql := range map[string]string{
		"a painting is held by no live order": `SELECT count(*) FROM products p JOIN orders o ON o.id = p.order_id
			WHERE o.ended IS NOT NULL OR o.status = 5 OR p.id <> ALL (o.product_ids)`,
		"a live order lacks a painting": `SELECT count(*) FROM orders o, unnest(o.product_ids) AS i (id) JOIN products p USING (id)
			WHERE o.ended IS NULL AND o.status < 5 AND p.order_id IS DISTINCT FROM o.id`,
	} {
		if n := queryText(t, databaseURL, sql); n != "0" {
			t.Errorf("%s: %s", name, n)
		}
	}
}

func TestTwoHundredBuyersOnePainting(t *testing.T) {
	s := newShop(t)
	painting := s.painting(99000)
	buyers := make([]string, 200)
	for i := range buyers {
		buyers[i] = newTestID()
	}
	count := concurrently(len(buyers), func(i int) answer {
		return s.call(buyers[i], "POST", "/api/orders", orderBody(newNumber(), painting))
	})
	if count[201] != 1 || count[409] != 199 {
		t.Fatalf("answers by status: %v", count)
	}
	s.wantOneOwner()
}

func TestOverlappingCartsAtOnce(t *testing.T) {
	s := newShop(t)
	a, b, c := s.painting(99000), s.painting(99000), s.painting(99000)
	carts := [][]string{{a, b, c}, {c, b, a}, {b, a}, {c, a}, {b, c}}
	count := concurrently(100, func(i int) answer {
		return s.call(newTestID(), "POST", "/api/orders", orderBody(newNumber(), carts[i%len(carts)]...))
	})
	if count[201] != 1 || count[201]+count[409] != 100 { // any two carts overlap
		t.Fatalf("answers by status: %v", count)
	}
	s.wantOneOwner()
}

func TestOneBuyerManyOrdersAtOnce(t *testing.T) {
	s := newShop(t)
	a, b, c := s.painting(99000), s.painting(99000), s.painting(99000)
	carts := [][]string{{a, b}, {c, b}, {a}, {c, a}}
	count := concurrently(60, func(i int) answer {
		return s.call(buyerA, "POST", "/api/orders", orderBody(newNumber(), carts[i%len(carts)]...))
	})
	if count[201] != 60 {
		t.Fatalf("answers by status: %v", count)
	}
	if n := queryText(t, s.config.databaseURL, `SELECT count(*) FROM orders WHERE ended IS NULL`); n != "1" {
		t.Fatalf("%s unpaid orders of one buyer", n)
	}
	s.wantOneOwner()
}

func TestSameOrderSentManyTimesAtOnce(t *testing.T) {
	s := newShop(t)
	body := orderBody(newNumber(), s.painting(99000), s.painting(99000))
	var mu sync.Mutex
	bodies := map[string]int{}
	count := concurrently(30, func(int) answer {
		a := s.call(buyerA, "POST", "/api/orders", body)
		mu.Lock()
		bodies[a.body]++
		mu.Unlock()
		return a
	})
	if count[201] != 30 || len(bodies) != 1 {
		t.Fatalf("answers by status: %v, bodies: %v", count, bodies)
	}
	s.wantOneOwner()
}

func TestPaymentReportedManyTimesAtOnce(t *testing.T) {
	s := newShop(t)
	order := s.order(buyerA, s.painting(99000))
	first, second := s.charge(order, 109000), s.charge(order, 109000)
	count := concurrently(40, func(i int) answer { return s.report([]string{first, second}[i%2]) })
	if count[200] != 20 || count[409] != 20 {
		t.Fatalf("answers by status: %v", count)
	}
	var kept, back int64
	for _, impUID := range []string{first, second} {
		p, _ := s.fake.get(impUID)
		kept, back = kept+p.Amount-p.Cancelled, back+p.Cancelled
	}
	if kept != 109000 || back != 109000 || s.statusOf(order) != statusPaid {
		t.Fatalf("%d won kept, %d given back, status %d", kept, back, s.statusOf(order))
	}
}

func TestCancelledManyTimesAtOnce(t *testing.T) {
	s := newShop(t)
	order, impUID, painting := s.paid(buyerA)
	count := concurrently(20, func(int) answer { return s.call(buyerA, "DELETE", "/api/orders/"+order, nil) })
	if count[200] != 1 || count[409] != 19 {
		t.Fatalf("answers by status: %v", count)
	}
	if p, _ := s.fake.get(impUID); p.Cancelled != 109000 || s.fake.calls("cancel") != 1 {
		t.Fatalf("%d won given back in %d calls", p.Cancelled, s.fake.calls("cancel"))
	}
	if !s.inStock(buyerB, painting) {
		t.Fatal("the painting is not free")
	}
	s.wantOneOwner()
}
