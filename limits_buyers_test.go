package main

import (
	"context"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// newLimitedShop is newDirectShop with the limits of production, which other tests do without.
func newLimitedShop(t testing.TB) *shop {
	t.Helper()
	s := newDirectShop(t)
	s.limits = newLimiter(s.clock.Now)
	s.settler.limits = s.limits
	return s
}

// gauge counts what is under way.
type gauge struct{ now, most atomic.Int32 }

// blockLookUps stops those calls to the gateway that are chosen, until release is called. The gauge counts them.
func (s *shop) blockLookUps(chosen func(call, id string) bool) (looking *gauge, release func()) {
	looking, released := &gauge{}, make(chan struct{})
	s.fake.setFaults(func(call, id string) fault {
		if !chosen(call, id) {
			return fault{}
		}
		return fault{before: func(w http.ResponseWriter, r *http.Request) bool {
			n := looking.now.Add(1)
			defer looking.now.Add(-1)
			for most := looking.most.Load(); n > most && !looking.most.CompareAndSwap(most, n); most = looking.most.Load() {
			}
			return stopUntil(released)(w, r)
		}}
	})
	return looking, func() { close(released) }
}

// ---- new orders

// A buyer who orders over and over is slowed down, and nobody else is.
func TestNewOrdersOfOneBuyer(t *testing.T) {
	s := newLimitedShop(t)
	s.limits.ordering.wait = time.Minute // however slow the machine
	paintings := s.paintings(160, 99000)
	order := func(i int) answer {
		return s.call(buyerA, "POST", "/api/orders", orderBody(newNumber(), paintings[i]))
	}
	wantRefused := func(a answer, after string) {
		t.Helper()
		if s.want(a, 429, messageTooManyOrders); a.header.Get("Retry-After") != after {
			t.Errorf("Retry-After %q, want %q", a.header.Get("Retry-After"), after)
		}
	}
	if count := concurrently(len(paintings), order); count[201] != 20 || count[429] != 140 {
		t.Errorf("answers %v", count)
	}
	if n := queryText(t, s.config.databaseURL, `SELECT count(*) FROM orders`); n != "20" {
		t.Errorf("%s orders", n)
	}
	s.order(buyerB, s.painting(99000))
	wantRefused(order(0), "60")
	s.clock.advance(time.Minute - 1)
	wantRefused(order(0), "1")
	s.clock.advance(1)
	s.want(order(0), 201, "")
	wantRefused(order(1), "60")
	s.clock.advance(time.Hour)
	for range int(newOrderLimit.burst) {
		s.order(buyerA, s.painting(99000))
	}
	wantRefused(order(0), "60")
}

// Only an order that is made counts. A request sent again finds its order however many were made.
func TestWhatCountsAsANewOrder(t *testing.T) {
	s := newLimitedShop(t)
	free, held := s.painting(99000), s.painting(99000)
	s.order(buyerB, held)
	wrongPrice, used := orderBody(newNumber(), free), orderBody(newNumber(), free)
	wrongPrice["totalPrice"] = 1
	impUID := s.charge(s.idOf(s.call(buyerA, "POST", "/api/orders", used)), 109000)
	s.want(s.report(impUID), 200, "")
	for range 2 * int(newOrderLimit.burst) {
		s.want(s.call(buyerA, "POST", "/api/orders", orderBody(newNumber(), held)), 409, "")
		s.want(s.call(buyerA, "POST", "/api/orders", orderBody(newNumber(), newTestID())), 404, "")
		s.want(s.call(buyerA, "POST", "/api/orders", used), 409, "")
	}
	first := orderBody(newNumber(), s.painting(99000))
	firstID := s.idOf(s.call(buyerA, "POST", "/api/orders", first))
	for range 2 * int(newOrderLimit.burst) {
		if id := s.idOf(s.call(buyerA, "POST", "/api/orders", first)); id != firstID {
			t.Fatalf("sent again: order %s, want %s", id, firstID)
		}
	}
	for range int(newOrderLimit.burst) - 3 {
		s.order(buyerA, s.painting(99000))
	}
	last := orderBody(newNumber(), s.painting(99000))
	lastID := s.idOf(s.call(buyerA, "POST", "/api/orders", last))

	// Now the bucket is full.
	s.want(s.call(buyerA, "POST", "/api/orders", first), 429, messageTooManyOrders) // it was replaced
	s.want(s.call(buyerA, "POST", "/api/orders", used), 429, messageTooManyOrders)
	if id := s.idOf(s.call(buyerA, "POST", "/api/orders", last)); id != lastID {
		t.Errorf("sent again: order %s, want %s", id, lastID)
	}
}

// A buyer who hangs up has made the order all the same, and pays for it.
func TestHangingUpOnANewOrder(t *testing.T) {
	s := newLimitedShop(t)
	ctx, hangUp := context.WithCancel(t.Context())
	s.settler.onTestHook = func(point, _ string) {
		if point == "ordering" {
			hangUp()
		}
	}
	body := strings.NewReader(marshalRaw(orderBody(newNumber(), s.painting(99000))))
	request := httptest.NewRequestWithContext(ctx, "POST", "/api/orders", body)
	request.Header.Set("Authorization", s.as(buyerA))
	s.ServeHTTP(httptest.NewRecorder(), request)
	s.want(s.call(buyerA, "GET", "/api/orders/latest", nil), 200, "")
	if made, _ := s.limits.orders.get(buyerA); made.level != 1 {
		t.Errorf("charged for %v orders", made.level)
	}
}

// The third order of a buyer at once waits, and not for long. Others do not wait.
func TestOrdersAtOnce(t *testing.T) {
	s := newLimitedShop(t)
	arrived, released := make(chan struct{}, callsAtOnce), make(chan struct{})
	var block atomic.Bool
	block.Store(true)
	s.settler.onTestHook = func(point, _ string) {
		if point == "ordering" && block.Load() {
			arrived <- struct{}{}
			<-released
		}
	}
	paintings := s.paintings(callsAtOnce+1, 99000)
	order := func(user string, i int) answer {
		return s.call(user, "POST", "/api/orders", orderBody(newNumber(), paintings[i]))
	}
	answers := make(chan map[int]int)
	go func() { answers <- concurrently(callsAtOnce, func(i int) answer { return order(buyerA, i) }) }()
	for range callsAtOnce {
		<-arrived
	}
	block.Store(false)
	s.want(order(buyerA, callsAtOnce), 429, messageBusy)
	s.want(order(buyerB, callsAtOnce), 201, "")
	close(released)
	if count := <-answers; count[201] != callsAtOnce {
		t.Errorf("answers %v", count)
	}
}

// ---- calls that ask the gateway

// However many of one buyer's deletions the gateway keeps waiting, others pay at once.
func TestDeletionsOfOneBuyer(t *testing.T) {
	s := newLimitedShop(t)
	s.limits.asking.wait = time.Minute // however slow the machine
	order, others := s.order(buyerA, s.painting(99000)), s.order(buyerB, s.painting(99000))
	var deleting atomic.Int32
	s.settler.onTestHook = func(point, id string) {
		if point == "state read" && id == order {
			deleting.Add(1)
		}
	}
	looking, release := s.blockLookUps(func(_, id string) bool { return id == order })
	answers := make(chan map[int]int)
	go func() {
		answers <- concurrently(160, func(int) answer { return s.call(buyerA, "DELETE", "/api/orders/"+order, nil) })
	}()
	waitUntil(t, "all deletions", func() bool { return deleting.Load() >= 160 && looking.now.Load() > 0 })
	s.want(s.reportAs(buyerB, s.charge(others, 109000)), 200, "결제 성공")
	release()
	if count := <-answers; count[200] == 0 {
		t.Errorf("answers %v", count)
	}
	if most := looking.most.Load(); most > callsAtOnce {
		t.Errorf("%d look-ups at once", most)
	}
}

// However many buyers' deletions the gateway keeps waiting, an administrator is heard.
func TestDeletionsOfManyBuyers(t *testing.T) {
	s := newLimitedShop(t)
	s.limits.wait = time.Minute // however slow the machine
	buyers, orders := make([]string, 20), make([]string, 20)
	for i := range buyers {
		buyers[i] = newTestID()
		orders[i] = s.order(buyers[i], s.painting(99000))
	}
	painting := s.painting(99000)
	s.order(buyerA, painting)
	looking, release := s.blockLookUps(func(_, id string) bool { return slices.Contains(orders, id) })
	answers := make(chan map[int]int)
	go func() {
		answers <- concurrently(len(buyers), func(i int) answer { return s.call(buyers[i], "DELETE", "/api/orders/"+orders[i], nil) })
	}()
	waitUntil(t, "the buyers' slots are taken", func() bool { return int(looking.now.Load()) == tierSlots[tierBuyer] })
	s.want(s.call(adminID, "PATCH", "/api/products/"+painting, `{"forSale":false}`), 200, "")
	release()
	if count := <-answers; count[200] != len(buyers) {
		t.Errorf("answers %v", count)
	}
	if most := int(looking.most.Load()); most > tierSlots[tierBuyer] {
		t.Errorf("%d look-ups at once", most)
	}
}

// Without a slot in time nothing is looked up.
func TestNoSlotInTime(t *testing.T) {
	s := newLimitedShop(t)
	stuck, _ := s.stuckRefund(buyerA)
	paid, _, _ := s.paid(buyerB)
	unpaid := s.order(buyerB, s.painting(99000))
	kept := s.charge(s.order(buyerA, s.painting(99000)), 109000)
	s.clock.advance(time.Minute)
	for range tierSlots[tierBuyer] {
		s.limits.slots[tierBuyer] <- struct{}{}
	}
	s.limits.wait = 0
	before := s.fake.calls("payment") + s.fake.calls("findAll")
	s.want(s.reportAs(buyerA, kept), 429, messageBusy)
	s.want(s.noticeFrom("198.51.100.1", kept), 503, messageBusy)
	s.want(s.call(buyerB, "DELETE", "/api/orders/"+unpaid, nil), 429, messageBusy)
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+stuck, nil), 502, messageRefundPending)
	s.want(s.call(buyerB, "DELETE", "/api/orders/"+paid, nil), 502, messageRefundPending) // the gateway refuses, and is not asked why
	if asked := s.fake.calls("payment") + s.fake.calls("findAll") - before; asked != 0 {
		t.Errorf("%d look-ups", asked)
	}
	s.limits.wait = lookUpWait
	s.want(s.call(adminID, "DELETE", "/api/orders/"+unpaid, nil), 200, messageDeleted)
}

// Each call that asks the gateway counts. While two of a client's are under way, its third waits, and not for long.
func TestCallsAtOnce(t *testing.T) {
	for name, row := range map[string]struct {
		client func(order string) client // whose calls are under way
		order  func(s *shop) (order, impUID, painting string)
		call   func(s *shop, order, impUID, painting string) answer
		busy   int
		after  int // once one of the two has ended
	}{
		"a report": {
			func(string) client { return client{user: buyerA} },
			func(s *shop) (string, string, string) { return s.paid(buyerA) },
			func(s *shop, _, impUID, _ string) answer { return s.reportAs(buyerA, impUID) }, 429, 200,
		},
		"a notice": {
			func(order string) client { return client{order: order} },
			func(s *shop) (string, string, string) { return s.paid(buyerA) },
			func(s *shop, order, impUID, _ string) answer { return s.noticeOfFrom("198.51.100.1", order, impUID) }, 503, 200,
		},
		"deleting an unpaid order": {
			func(string) client { return client{user: buyerA} },
			func(s *shop) (string, string, string) { return s.orderIn(statusUnpaid) },
			func(s *shop, order, _, _ string) answer { return s.call(buyerA, "DELETE", "/api/orders/"+order, nil) }, 429, 200,
		},
		"cancelling a paid one": {
			func(string) client { return client{user: buyerA} },
			func(s *shop) (string, string, string) { return s.paid(buyerA) },
			func(s *shop, order, _, _ string) answer { return s.call(buyerA, "DELETE", "/api/orders/"+order, nil) }, 429, 200,
		},
		"cancelling it once more": {
			func(string) client { return client{user: buyerA} },
			func(s *shop) (string, string, string) {
				order, impUID := s.stuckRefund(buyerA)
				return order, impUID, ""
			},
			func(s *shop, order, _, _ string) answer { return s.call(buyerA, "DELETE", "/api/orders/"+order, nil) }, 429, 502,
		},
		"an administrator's cancel": {
			func(string) client { return client{user: adminID, admin: true} },
			func(s *shop) (string, string, string) { return s.orderAt(statusReturning) },
			func(s *shop, order, _, _ string) answer { return s.call(adminID, "DELETE", "/api/orders/"+order, nil) }, 429, 200,
		},
		"taking a painting off sale": {
			func(string) client { return client{user: adminID, admin: true} },
			func(s *shop) (string, string, string) { return s.orderIn(statusUnpaid) },
			func(s *shop, _, _, painting string) answer {
				return s.call(adminID, "PATCH", "/api/products/"+painting, `{"forSale":false}`)
			}, 429, 200,
		},
		"helping a refund": {
			func(string) client { return client{user: adminID, admin: true} },
			func(s *shop) (string, string, string) {
				order, impUID := s.stuckRefund(buyerA)
				return order, impUID, ""
			},
			func(s *shop, order, impUID, _ string) answer {
				return s.call(adminID, "POST", "/api/orders/"+order+"/refund",
					map[string]any{"imp_uid": impUID, "account": map[string]string{"holder": "홍길동", "bank": "은행", "number": "000-1234"}})
			}, 429, 502,
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newLimitedShop(t)
			order, impUID, painting := row.order(s)
			s.clock.advance(time.Minute)
			s.limits.asking.wait = 0
			var end func()
			for range callsAtOnce {
				var err error
				end, err = s.limits.asking.take(t.Context(), row.client(order))
				check(t, err)
			}
			if a := s.want(row.call(s, order, impUID, painting), row.busy, messageBusy); a.header.Get("Retry-After") != "5" {
				t.Errorf("%v", a.header)
			}
			end()
			s.want(row.call(s, order, impUID, painting), row.after, "")
			if n := len(s.limits.asking.queues); n != 1 {
				t.Errorf("%d clients have calls under way", n)
			}
		})
	}
}

// What buyers and administrators wait for leaves the reconciler a slot of its own.
func TestReconcilerWaitsForNobody(t *testing.T) {
	s := newLimitedShop(t)
	painting := s.painting(99000)
	s.order(buyerA, painting)
	for range tierSlots[tierAdministrator] {
		s.limits.slots[tierAdministrator] <- struct{}{}
	}
	s.later(s.config.hold)
	if !s.inStock(buyerB, painting) {
		t.Error("an order whose hold has ended holds its painting")
	}
	if tierSlots[tierAdministrator] >= maxLookUps {
		t.Errorf("%d of the gateway client's %d slots are not the reconciler's", tierSlots[tierAdministrator], maxLookUps)
	}
}
