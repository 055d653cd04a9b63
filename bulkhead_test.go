package main

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// lockElsewhere has a session of its own execute sql in a transaction, and returns a function that ends it.
func (s *shop) lockElsewhere(sql string) (release func()) {
	s.t.Helper()
	conn, err := pgx.Connect(context.Background(), s.config.databaseURL)
	check(s.t, err)
	s.t.Cleanup(func() { conn.Close(context.Background()) })
	_, err = conn.Exec(context.Background(), `BEGIN; `+sql)
	check(s.t, err)
	return func() {
		s.t.Helper()
		_, err := conn.Exec(context.Background(), `ROLLBACK`)
		check(s.t, err)
	}
}

// waiting is how many sessions wait for a lock in this shop's database.
func (s *shop) waiting() string {
	return queryText(s.t, s.config.databaseURL, `SELECT count(*)::text FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`)
}

// What a forgotten session has locked is refused within a second or two, whichever call wants it and whatever kind of lock it
// is. Afterwards the same call is done.
func TestLockedElsewhere(t *testing.T) {
	heavy(t)
	s := newShop(t)
	byID := func(table, id string) string {
		key := map[string]string{"orders": "id", "products": "id", "payments": "imp_uid"}[table]
		return `SELECT FROM ` + table + ` WHERE ` + key + ` = '` + id + `' FOR UPDATE`
	}
	buyerLock := func(buyer string) string { return `SELECT pg_advisory_xact_lock(hashtextextended('` + buyer + `', 0))` }
	for _, row := range []struct {
		name  string
		begin func(s *shop, buyer string) (lock string, call func() answer)
		done  int
	}{
		{"create, its painting", func(s *shop, buyer string) (string, func() answer) {
			painting := s.painting(99000)
			return byID("products", painting), func() answer { return s.call(buyer, "POST", "/api/orders", orderBody(newNumber(), painting)) }
		}, 201},
		{"create, its buyer", func(s *shop, buyer string) (string, func() answer) {
			painting := s.painting(99000)
			return buyerLock(buyer), func() answer { return s.call(buyer, "POST", "/api/orders", orderBody(newNumber(), painting)) }
		}, 201},
		{"create, the order that it replaces", func(s *shop, buyer string) (string, func() answer) {
			order, painting := s.order(buyer, s.painting(99000)), s.painting(99000)
			return byID("orders", order), func() answer { return s.call(buyer, "POST", "/api/orders", orderBody(newNumber(), painting)) }
		}, 201},
		{"the same order again", func(s *shop, buyer string) (string, func() answer) {
			body := orderBody(newNumber(), s.painting(99000))
			order := s.want(s.call(buyer, "POST", "/api/orders", body), 201, "")
			return byID("orders", order.body[strings.Index(order.body, "orderId")+10:][:24]), func() answer { return s.call(buyer, "POST", "/api/orders", body) }
		}, 201},
		{"pay, its order", func(s *shop, buyer string) (string, func() answer) {
			order := s.order(buyer, s.painting(99000))
			impUID := s.charge(order, 109000)
			return byID("orders", order), func() answer { return s.report(impUID) }
		}, 200},
		{"a notice, its buyer", func(s *shop, buyer string) (string, func() answer) {
			impUID := s.charge(s.order(buyer, s.painting(99000)), 109000)
			return buyerLock(buyer), func() answer { return s.notice(impUID) }
		}, 200},
		{"delete, its painting", func(s *shop, buyer string) (string, func() answer) {
			painting := s.painting(99000)
			order := s.order(buyer, painting)
			return byID("products", painting), func() answer { return s.call(buyer, "DELETE", "/api/orders/"+order, nil) }
		}, 200},
		{"cancel, its order", func(s *shop, buyer string) (string, func() answer) {
			order, _, _ := s.paid(buyer)
			return byID("orders", order), func() answer { return s.call(buyer, "DELETE", "/api/orders/"+order, nil) }
		}, 200},
		{"cancel, its payment", func(s *shop, buyer string) (string, func() answer) {
			order, impUID, _ := s.paid(buyer)
			return byID("payments", impUID), func() answer { return s.call(buyer, "DELETE", "/api/orders/"+order, nil) }
		}, 200},
		{"cancel again, its payment", func(s *shop, buyer string) (string, func() answer) {
			order, impUID := s.stuckRefund(buyer)
			s.fake.setFaults(nil)
			s.clock.advance(refundLease)
			return byID("payments", impUID), func() answer { return s.call(buyer, "DELETE", "/api/orders/"+order, nil) }
		}, 200},
		{"help a refund, its payment", func(s *shop, buyer string) (string, func() answer) {
			order, impUID := s.stuckRefund(buyer)
			s.fake.setFaults(nil)
			s.clock.advance(refundLease)
			return byID("payments", impUID), func() answer {
				return s.call(adminID, "POST", "/api/orders/"+order+"/refund", map[string]any{"imp_uid": impUID,
					"account": map[string]string{"holder": "홍길동", "bank": "00", "number": "0"}})
			}
		}, 200},
		{"book a refund by hand, its order", func(s *shop, buyer string) (string, func() answer) {
			order, impUID := s.stuckRefund(buyer)
			s.fake.setFaults(nil)
			s.clock.advance(refundLease)
			return byID("orders", order), func() answer {
				return s.call(adminID, "POST", "/api/orders/"+order+"/refund", map[string]any{"imp_uid": impUID, "byHand": "계좌 이체"})
			}
		}, 200},
		{"advance, its order", func(s *shop, buyer string) (string, func() answer) {
			order, _, _ := s.paid(buyer)
			return byID("orders", order), func() answer { return s.call(adminID, "PATCH", "/api/orders/"+order, map[string]int{"status": 1}) }
		}, 200},
		{"take off sale, the painting", func(s *shop, _ string) (string, func() answer) {
			painting := s.painting(99000)
			return byID("products", painting), func() answer {
				return s.call(adminID, "PATCH", "/api/products/"+painting, map[string]bool{"forSale": false})
			}
		}, 200},
		{"take off sale, the order that holds it", func(s *shop, buyer string) (string, func() answer) {
			painting := s.painting(99000)
			order := s.order(buyer, painting)
			return byID("orders", order), func() answer {
				return s.call(adminID, "PATCH", "/api/products/"+painting, map[string]bool{"forSale": false})
			}
		}, 200},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := rowOf(t, s)
			lock, call := row.begin(s, newTestID())
			before := s.store.pool.Stat().NewConnsCount()
			release := s.lockElsewhere(lock)
			start := time.Now()
			a := s.want(call(), 503, messageAway)
			if took := time.Since(start); took > dbTimeout-time.Second || a.header.Get("Retry-After") == "" {
				t.Errorf("refused after %v with %v", took, a.header)
			}
			release()
			s.want(call(), row.done, "")
			if made := s.store.pool.Stat().NewConnsCount() - before; made > 0 {
				t.Errorf("%d connections were opened", made)
			}
		})
	}
	s.later(time.Hour)
	s.wantMismatches()
}

// However many want one painting that is locked elsewhere, they keep few connections, and the others do not notice.
func TestManyWantALockedPainting(t *testing.T) {
	heavy(t)
	s := newShop(t)
	locked, free := s.painting(99000), s.painting(99000)
	release := s.lockElsewhere(`UPDATE products SET price = price WHERE id = '` + locked + `'`)
	answers := make(chan map[int]int)
	go func() {
		answers <- concurrently(24, func(int) answer {
			return s.call(newTestID(), "POST", "/api/orders", orderBody(newNumber(), locked))
		})
	}()
	waitUntil(t, "all of them wait, four of them in the database", func() bool {
		if s.waiting() != "4" {
			return false
		}
		s.store.bulkhead.mu.Lock()
		defer s.store.bulkhead.mu.Unlock()
		l := s.store.bulkhead.lines[locked]
		return l != nil && l.length == 24
	})
	s.order(buyerB, free)
	s.inStock(buyerB, locked)
	s.want(s.ready(), 200, "")
	if n := s.store.pool.Stat().AcquiredConns(); n > s.store.pool.Config().MaxConns/2 {
		t.Errorf("they keep %d connections", n)
	}
	if count := <-answers; count[503] != 24 {
		t.Errorf("answered %v", count)
	}
	release()
	s.order(buyerA, locked)
}

// The reconciler settles the others' payments while one order is locked elsewhere, and loses none.
func TestReconcilerPassesLockedOrders(t *testing.T) {
	heavy(t)
	s := newShop(t)
	var orders, payments []string
	for range 3 {
		order := s.order(newTestID(), s.painting(99000))
		orders = append(orders, order)
	}
	held := s.painting(99000)
	expiring := s.order(newTestID(), held)
	s.clock.advance(time.Minute)
	for _, order := range orders {
		payments = append(payments, s.charge(order, 109000))
	}
	release := s.lockElsewhere(`SELECT FROM orders WHERE id = '` + orders[1] + `' FOR UPDATE; SELECT FROM products WHERE id = '` + held + `' FOR UPDATE`)
	s.later(time.Second)
	for i, want := range []string{"kept", "none", "kept"} {
		if got := s.row(payments[i]); got != want {
			t.Errorf("payment %d is %s, want %s", i, got, want)
		}
	}
	s.later(2 * s.config.hold)
	s.want(s.ready(), 200, "")
	release()
	s.later(s.settler.interval)
	if !s.inStock(buyerB, held) {
		t.Errorf("the painting of order %s is held", expiring)
	}
	s.later(refundLease)
	if got := s.row(payments[1]); got != "kept" {
		t.Errorf("the payment is %s", got)
	}
	s.wantBalanced()
}

var errLocked error = &pgconn.PgError{Code: codeLockNotAvailable}

func TestBulkhead(t *testing.T) { synctest.Test(t, testBulkhead) }

func testBulkhead(t *testing.T) {
	g := newBulkhead(16)
	var mu sync.Mutex
	var inside []string
	pass := func(ctx context.Context, rows ...string) (leave chan<- error, result <-chan error) {
		l, r := make(chan error), make(chan error, 1)
		go func() {
			r <- g.pass(ctx, rows, func() error {
				mu.Lock()
				inside = append(inside, strings.Join(rows, " "))
				mu.Unlock()
				return <-l
			})
		}()
		synctest.Wait()
		return l, r
	}
	wantInside := func(want ...string) {
		t.Helper()
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		slices.Sort(inside)
		if !slices.Equal(inside, want) {
			t.Fatalf("inside are %v, want %v", inside, want)
		}
		inside = nil
	}
	var leaves []chan<- error
	var results []<-chan error
	for range changesPerRow + 2 {
		leave, result := pass(t.Context(), "a")
		leaves, results = append(leaves, leave), append(results, result)
	}
	wantInside("a", "a", "a", "a")
	ctx, goAway := context.WithCancel(t.Context())
	_, gone := pass(ctx, "a")
	goAway()
	if err := <-gone; err != context.Canceled {
		t.Errorf("who went away got %v", err)
	}
	leaves[0] <- nil // the fifth takes its place
	wantInside("a")
	both, bothDone := pass(t.Context(), "b", "a", "b") // waits for a, and keeps no place of b
	wantInside()
	leaves[1] <- errLocked // the sixth gets the same, and so does the one that wants both
	for _, result := range []<-chan error{results[1], results[5], bothDone} {
		if err := <-result; err != errLocked {
			t.Errorf("who waited for a locked row got %v", err)
		}
	}
	_ = both
	b, bDone := pass(t.Context(), "b")
	wantInside("b")
	b <- nil
	check(t, <-bDone)
	for _, i := range []int{2, 3, 4} {
		leaves[i] <- nil
		check(t, <-results[i])
	}
	if len(g.lines) != 0 || len(g.places) != 0 {
		t.Errorf("%d lines and %d places are left", len(g.lines), len(g.places))
	}
}

// A quarter of the connections is left to those who only read.
func TestBulkheadLeavesConnections(t *testing.T) { synctest.Test(t, testBulkheadLeavesConnections) }

func testBulkheadLeavesConnections(t *testing.T) {
	for connections, want := range map[int]int{1: 1, 3: 3, 4: 3, 16: 12} {
		g := newBulkhead(connections)
		entered, leave := make(chan struct{}, 100), make(chan struct{})
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				g.pass(t.Context(), []string{newTestID()}, func() error {
					entered <- struct{}{}
					<-leave
					return nil
				})
			})
		}
		synctest.Wait()
		if len(entered) != want {
			t.Errorf("%d changes at once with %d connections, want %d", len(entered), connections, want)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if err := g.pass(ctx, nil, func() error { return nil }); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("one more got %v", err)
		}
		cancel()
		close(leave)
		all.Wait()
	}
}

// A client that hangs up in mid-call costs no connection, and what it asked for is done.
func TestHangUp(t *testing.T) {
	s := newDirectShop(t)
	painting := s.painting(99000)
	order := s.order(buyerB, s.painting(99000))
	whole, _ := s.paidFor(newTestID(), 2)
	split, paintings := s.paidFor(newTestID(), 2)
	for name, row := range map[string]struct {
		lock   string
		method string
		path   string
		body   any
		status int
	}{
		"a change": {`SELECT FROM products WHERE id = '` + painting + `' FOR UPDATE`, "POST", "/api/orders", orderBody(newNumber(), painting), 201},
		"a read":   {`LOCK TABLE history`, "GET", "/api/orders/" + order + "/history", nil, statusClientClosed},
		"a batch":  {`LOCK TABLE order_tally`, "GET", "/api/orders", nil, statusClientClosed},
		"a cancel": {`SELECT FROM orders WHERE id = '` + whole + `' FOR UPDATE`, "DELETE", "/api/orders/" + whole, nil, 200},
		"a cancel of a painting": {`SELECT FROM orders WHERE id = '` + split + `' FOR UPDATE`, "DELETE", "/api/orders/" + split,
			map[string]any{"status": 5, "products": paintings[:1]}, 200},
	} {
		release := s.lockElsewhere(row.lock)
		before := s.store.pool.Stat().NewConnsCount()
		ctx, hangUp := context.WithCancel(t.Context())
		defer hangUp()
		request, err := newCall(ctx, row.method, row.path, s.as(adminID), row.body)
		check(t, err)
		answered := make(chan answer)
		go func() {
			a, _ := exchange(s.send, request)
			answered <- a
		}()
		waitUntil(t, name+" waits for the lock", func() bool { return s.waiting() == "1" })
		hangUp()
		release()
		if a := <-answered; a.status != row.status && a.status != 200 { // a read is answered when it was prepared before
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
		if made := s.store.pool.Stat().NewConnsCount() - before; made > 0 {
			t.Errorf("%s: %d connections were opened", name, made)
		}
	}
	s.want(s.call(adminID, "POST", "/api/orders", orderBody(newNumber(), s.painting(99000))), 201, "")
}

// A call that waits for a connection ends with its client.
func TestHangUpWhileWaitingForAConnection(t *testing.T) {
	s := newDirectShop(t)
	order := s.order(buyerA, s.painting(99000))
	for range s.store.pool.Config().MaxConns {
		conn, err := s.store.pool.Acquire(t.Context())
		check(t, err)
		defer conn.Release()
	}
	for _, row := range [][2]string{{"DELETE", "/api/orders/" + order}, {"GET", "/api/orders/" + order}, {"GET", "/api/orders/mine"}} {
		ctx, hangUp := context.WithCancel(t.Context())
		request, err := newCall(ctx, row[0], row[1], s.as(buyerA), nil)
		check(t, err)
		time.AfterFunc(10*time.Millisecond, hangUp)
		start := time.Now()
		a, _ := exchange(s.send, request)
		if took := time.Since(start); a.status != statusClientClosed || took > dbTimeout/2 {
			t.Errorf("%v: %d after %v", row, a.status, took)
		}
	}
	if a := s.want(s.ready(), http.StatusServiceUnavailable, ""); !strings.Contains(a.body, `"database":"not answering"`) {
		t.Errorf("readyz answered %s", a.body)
	}
}
