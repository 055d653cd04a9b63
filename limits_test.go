package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestClientAddress(t *testing.T) {
	var proxies []netip.Prefix
	for _, text := range []string{"10.0.0.0/8", "192.0.2.7", "2001:db8:ffff::/48", "::1"} {
		proxy, err := parseProxy(text)
		check(t, err)
		proxies = append(proxies, proxy)
	}
	for _, row := range []struct{ peer, forwarded, want string }{
		{"203.0.113.5:4711", "", "203.0.113.5/32"},
		{"203.0.113.5:4711", "198.51.100.1", "203.0.113.5/32"}, // says a stranger
		{"10.1.2.3:80", "198.51.100.1", "198.51.100.1/32"},
		{"10.1.2.3:80", "1.1.1.1, 198.51.100.1", "198.51.100.1/32"}, // the first is the client's own invention
		{"10.1.2.3:80", "1.1.1.1, 198.51.100.1,10.9.9.9 , 192.0.2.7", "198.51.100.1/32"},
		{"10.1.2.3:80", "10.1.1.1, 10.9.9.9", "10.1.1.1/32"}, // from inside
		{"10.1.2.3:80", "", "10.1.2.3/32"},
		{"10.1.2.3:80", "198.51.100.1, unknown", "10.1.2.3/32"},
		{"10.1.2.3:80", "198.51.100.1, unknown, 10.9.9.9", "10.9.9.9/32"},
		{"10.1.2.3:80", "198.51.100.1:52100", "198.51.100.1/32"},
		{"[::1]:80", "[2001:db8:1:2:3:4:5:6]:52100", "2001:db8:1:2::/64"},
		{"[::1]:80", "[2001:db8:1:2:3:4:5:6]", "2001:db8:1:2::/64"},
		{"[2001:db8:ffff:1::1]:80", "2001:db8:1:2::9", "2001:db8:1:2::/64"},
		{"[2001:db8:1:2:ffff::1]:80", "", "2001:db8:1:2::/64"},
		{"[fe80::1%eth0]:80", "", "fe80::/64"},
		{"[::ffff:10.1.2.3]:80", "::ffff:198.51.100.1", "198.51.100.1/32"},
		{"@", "198.51.100.1", "invalid Prefix"},
	} {
		r := &http.Request{RemoteAddr: row.peer, Header: http.Header{}}
		for line := range strings.SplitSeq(row.forwarded, " , ") { // sometimes several lines
			r.Header.Add("X-Forwarded-For", line)
		}
		if got := clientAddress(r, proxies).String(); got != row.want {
			t.Errorf("%s for %q is %s, want %s", row.peer, row.forwarded, got, row.want)
		}
	}
}

// reportFrom tells the service of a payment as a browser at an address does.
func (s *shop) reportFrom(address, impUID string) answer {
	s.t.Helper()
	return s.sendFrom(address, "PATCH", "/api/orders/pay", map[string]string{"imp_uid": impUID})
}

// reportAs tells the service of a payment as a signed-in user's browser does.
func (s *shop) reportAs(user, impUID string) answer {
	s.t.Helper()
	return s.call(user, "PATCH", "/api/orders/pay", map[string]string{"imp_uid": impUID})
}

// noticeFrom tells the service of a payment as the gateway does, or a stranger in its name.
func (s *shop) noticeFrom(address, impUID string) answer {
	s.t.Helper()
	return s.sendFrom(address, "POST", "/api/payments/webhook", map[string]string{"imp_uid": impUID})
}

// noticeOfFrom is noticeFrom for a notice that says which order the payment is for.
func (s *shop) noticeOfFrom(address, order, impUID string) answer {
	s.t.Helper()
	return s.sendFrom(address, "POST", "/api/payments/webhook", map[string]string{"imp_uid": impUID, "merchant_uid": order})
}

func (s *shop) sendFrom(address, method, path string, body map[string]string) answer {
	s.t.Helper()
	request, err := newCall(s.t.Context(), method, path, "", body)
	check(s.t, err)
	request.RemoteAddr = address + ":4711"
	a, err := exchange(s.send, request)
	check(s.t, err)
	return a
}

func TestUnknownPaymentIsRemembered(t *testing.T) {
	s := newDirectShop(t)
	silent := func(s *shop, impUID string) answer {
		s.fake.faultOnce("payment", fault{before: answer500})
		return s.report(impUID)
	}
	reportAfterNotice := func(s *shop, impUID string) answer { s.notice(impUID); return s.report(impUID) }
	for name, row := range map[string]struct {
		first, then func(s *shop, impUID string) answer // before and after the gateway knows the payment
		after       time.Duration
		status      int
		asked       int // in all
	}{
		"at once":                              {(*shop).report, (*shop).report, unknownFor - 1, 404, 1},
		"later":                                {(*shop).report, (*shop).report, unknownFor, 200, 2},
		"a notice, and again":                  {(*shop).notice, (*shop).notice, 0, 200, 1},
		"a report, then a notice":              {(*shop).report, (*shop).notice, 0, 200, 2},
		"a notice, then a report":              {(*shop).notice, (*shop).report, 0, 200, 2},
		"a report, a notice, the report again": {(*shop).report, reportAfterNotice, 0, 200, 3},
		"the gateway said nothing":             {silent, (*shop).report, 0, 200, 2},
	} {
		order, impUID, before := s.order(newTestID(), s.painting(99000)), newImpUID(), s.fake.calls("payment")
		row.first(s, impUID)
		s.fake.pay(fakePayment{ImpUID: impUID, MerchantUID: order, Amount: 109000})
		s.clock.advance(row.after)
		if a := row.then(s, impUID); a.status != row.status {
			t.Errorf("%s: answered %d %s", name, a.status, a.body)
		}
		if n := s.fake.calls("payment") - before; n != row.asked {
			t.Errorf("%s: the gateway was asked %d times", name, n)
		}
	}
}

// Ten thousand made-up payments in a minute, from one address and both ways in, cost the gateway a bounded number of
// look-ups, and others nothing.
func TestFloodFromOneAddress(t *testing.T) {
	heavy(t)
	s := newDirectShop(t)
	count := map[int]int{}
	const reports = 10_000
	for i := range reports {
		s.clock.advance(time.Minute / reports)
		if i%1000 == 500 {
			impUID := s.charge(s.order(newTestID(), s.painting(99000)), 109000)
			s.want(s.reportFrom("203.0.113.9", impUID), 200, "결제 성공")
			continue
		}
		a := s.reportFrom("198.51.100.1", fmt.Sprintf("imp_%d", i))
		count[a.status]++
		if a.status == 429 && (a.message() != messageTooMany || a.header.Get("Retry-After") != "5") {
			t.Fatalf("%v %s", a.header, a.body)
		}
	}
	asked := int(clientLimit.burst) + int(time.Minute/clientLimit.refill)
	if count[404] < asked-1 || count[404] > asked || count[404]+count[429] != reports-10 || s.fake.calls("payment") != count[404]+10 {
		t.Errorf("answers %v, %d look-ups", count, s.fake.calls("payment"))
	}
	// Waiting as told helps.
	s.clock.advance(clientLimit.refill)
	s.want(s.reportFrom("198.51.100.1", "imp_x"), 404, "")
	s.want(s.reportFrom("198.51.100.1", "imp_y"), 429, messageTooMany)
}

// However many made-up payments are being looked up, a true one finds a slot: strangers have some of them, suspects few.
func TestFloodLeavesSlots(t *testing.T) {
	for name, row := range map[string]struct {
		flood func(s *shop, i int, impUID string) answer
		slots int    // of the flood
		user  string // who pays meanwhile
	}{
		"one address": {func(s *shop, _ int, impUID string) answer { return s.reportFrom("198.51.100.1", impUID) }, 2, ""},
		"fifty addresses": {func(s *shop, i int, impUID string) answer {
			return s.reportFrom(fmt.Sprintf("198.51.100.%d", 100+i), impUID)
		}, 6, buyerA},
		"fifty buyers": {func(s *shop, _ int, impUID string) answer { return s.reportAs(newTestID(), impUID) }, 8, adminID},
	} {
		t.Run(name, func(t *testing.T) {
			s := newDirectShop(t)
			for range throttleAfter {
				s.reportFrom("198.51.100.1", newImpUID())
			}
			release, looking := make(chan struct{}), make(chan struct{}, 100)
			s.fake.setFaults(func(call, id string) fault {
				if !strings.HasPrefix(id, "imp_flood") {
					return fault{}
				}
				arrive := func(http.ResponseWriter, *http.Request) bool { looking <- struct{}{}; return false }
				return fault{before: inTurn(arrive, stopUntil(release))}
			})
			var flood sync.WaitGroup
			for i := range 50 {
				flood.Go(func() { row.flood(s, i, fmt.Sprintf("imp_flood_%d", i)) })
			}
			for range row.slots {
				<-looking
			}
			for range 5 {
				impUID := s.charge(s.order(newTestID(), s.painting(99000)), 109000)
				s.want(s.reportAs(row.user, impUID), 200, "결제 성공")
			}
			if len(looking) > 0 {
				t.Errorf("%d more made-up payments are being looked up", len(looking))
			}
			close(release)
			flood.Wait()
		})
	}
}

// A burst from an address that was unknown before ends as soon as its first look-ups have found nothing.
func TestBurstFromANewAddress(t *testing.T) {
	s := newDirectShop(t)
	count := concurrently(500, func(i int) answer { return s.reportFrom("198.51.100.1", fmt.Sprintf("imp_%d", i)) })
	most := int(clientLimit.burst) + tierSlots[tierAnonymous]
	if count[404] < int(clientLimit.burst) || count[404] > most || count[404]+count[429] != 500 || s.fake.calls("payment") != count[404] {
		t.Errorf("answers %v, %d look-ups", count, s.fake.calls("payment"))
	}
}

// When too much is wasted in all, those who wasted something wait, and those who did not go on.
func TestFloodFromManyAddresses(t *testing.T) {
	s := newDirectShop(t)
	for i := range int(totalLimit.burst) {
		s.want(s.reportFrom(fmt.Sprintf("198.51.%d.%d", i/250, i%250), fmt.Sprintf("imp_%d", i)), 404, "")
	}
	s.want(s.reportFrom("198.51.0.0", "imp_x"), 429, messageTooMany)
	impUID := s.charge(s.order(buyerA, s.painting(99000)), 109000)
	s.want(s.reportFrom("198.51.0.1", impUID), 429, messageTooMany)
	s.want(s.reportFrom("203.0.113.9", impUID), 200, "결제 성공")
	s.clock.advance(penaltyMemory)
	s.want(s.reportFrom("198.51.0.0", "imp_x"), 404, "")
}

// A notice that is refused comes again only for a 5xx; when it does not, the reconciler finds its payment.
func TestRefusedNoticeIsNotLost(t *testing.T) {
	s := newDirectShop(t)
	for i := range int(clientLimit.burst) {
		s.want(s.noticeFrom("198.51.100.1", fmt.Sprintf("imp_%d", i)), 200, "")
	}
	order := s.order(buyerA, s.painting(99000))
	impUID := s.charge(order, 109000)
	a := s.want(s.noticeFrom("198.51.100.1", impUID), 503, messageTooMany)
	if a.header.Get("Retry-After") != "5" || s.statusOf(order) != statusUnpaid {
		t.Errorf("%v, status %d", a.header, s.statusOf(order))
	}
	s.later(s.config.hold)
	if s.statusOf(order) != statusPaid {
		t.Errorf("status %d", s.statusOf(order))
	}
}

// What is charged: whatever found no money, and repetitions.
func TestWaste(t *testing.T) {
	s := newDirectShop(t)
	order, kept, _ := s.paid(buyerA)
	open := s.order(buyerB, s.painting(99000))
	ready := s.fake.pay(fakePayment{MerchantUID: open, Amount: 109000, Status: "ready"})
	foreign := s.charge("another-shop-1", 109000)
	duplicate := s.charge(order, 109000)
	silent := func() { s.fake.faultOnce("payment", fault{before: answer500}) }
	for i, row := range []struct {
		impUID  string
		prepare func()
		wasted  float64
	}{
		{"imp_unknown", nil, 1}, {ready, nil, 1}, {foreign, nil, 0}, {duplicate, nil, 0}, {kept, nil, 0},
		{kept, func() { s.reportFrom("198.51.100.9", kept) }, 1},
		{kept, func() { s.noticeFrom("198.51.100.9", kept) }, 0},
		{kept, silent, 0},
		{kept, func() { silent(); s.reportFrom("198.51.100.9", kept) }, 0}, // a call that the gateway did not answer may be repeated
	} {
		s.clock.advance(time.Minute)
		if row.prepare != nil {
			row.prepare()
		}
		address := fmt.Sprintf("198.51.100.%d", 10+i)
		s.reportFrom(address, row.impUID)
		own, _ := s.limits.penalties.get(client{address: netip.MustParsePrefix(address + "/32")})
		if own.level != row.wasted {
			t.Errorf("row %d: %v wasted, want %v", i, own.level, row.wasted)
		}
	}
}

// Notices of another shop's payments on the same account are looked up once an hour, and do not stand in the way of ours.
func TestNoticesOfAnotherShop(t *testing.T) {
	s := newDirectShop(t)
	s.limits.reporting.wait = time.Minute // however slow the machine
	foreign := make([]string, 300)
	for i := range foreign {
		foreign[i] = s.charge(fmt.Sprintf("another-shop-%d", i), 5000)
	}
	count := concurrently(1000, func(i int) answer { return s.noticeFrom("198.51.100.1", foreign[i%len(foreign)]) })
	if count[200] != 1000 || s.fake.calls("payment") != len(foreign) || s.limits.total.level != 0 {
		t.Errorf("answers %v, %d look-ups, %v wasted", count, s.fake.calls("payment"), s.limits.total.level)
	}
	order := s.order(buyerA, s.painting(99000))
	s.want(s.noticeFrom("198.51.100.1", s.charge(order, 109000)), 200, "확인했습니다")
	if s.statusOf(order) != statusPaid {
		t.Errorf("status %d", s.statusOf(order))
	}

	similar := s.charge(newTestID(), 5000) // the other shop's numbers look like ours
	for _, row := range []struct {
		after  time.Duration
		impUID string
		asked  int
	}{{0, foreign[0], 0}, {foreignFor - 1, foreign[0], 0}, {1, foreign[0], 1}, {0, foreign[0], 0}, {0, similar, 1}, {0, similar, 0}} {
		s.clock.advance(row.after)
		before := s.fake.calls("payment")
		s.want(s.noticeFrom("198.51.100.1", row.impUID), 200, "확인했습니다")
		s.want(s.reportFrom("198.51.100.1", row.impUID), 404, "")
		if asked := s.fake.calls("payment") - before; asked != row.asked {
			t.Errorf("%+v: %d look-ups", row, asked)
		}
	}
	if s.limits.total.level != 0 {
		t.Errorf("%v wasted", s.limits.total.level)
	}
}

// However many made-up payments strangers report, all at one address and elsewhere, a notice that names its order is heard.
func TestTrueNoticeInAFlood(t *testing.T) {
	s := newDirectShop(t)
	for i := range int(totalLimit.burst) {
		address := "198.51.100.1"
		if i >= int(clientLimit.burst) {
			address = fmt.Sprintf("198.51.%d.%d", 101+i/250, i%250)
		}
		s.want(s.noticeFrom(address, newImpUID()), 200, "")
	}
	s.want(s.noticeFrom("198.51.100.1", newImpUID()), 503, messageTooMany)
	s.want(s.noticeOfFrom("198.51.100.1", newTestID(), newImpUID()), 503, messageTooMany)

	for range throttleAfter {
		order := s.order(newTestID(), s.painting(99000))
		failed := s.fake.pay(fakePayment{MerchantUID: order, Amount: 109000, Status: "failed"})
		s.want(s.noticeOfFrom("198.51.100.1", order, failed), 200, "")
		s.want(s.noticeOfFrom("198.51.100.1", order, s.charge(order, 109000)), 200, "")
		if s.statusOf(order) != statusPaid {
			t.Errorf("status %d", s.statusOf(order))
		}
	}
}

// A stranger who names an order of ours shuts out the notices of that order at most.
func TestFloodNamingAnOrder(t *testing.T) {
	s := newLimitedShop(t)
	s.limits.asking.wait = time.Minute // however slow the machine
	named, other := s.order(buyerA, s.painting(99000)), s.order(buyerB, s.painting(99000))

	looking, release := s.blockLookUps(func(_, id string) bool { return strings.HasPrefix(id, "imp_flood") })
	answers := make(chan map[int]int)
	go func() {
		answers <- concurrently(150, func(i int) answer { return s.noticeOfFrom("198.51.100.1", named, fmt.Sprintf("imp_flood_%d", i)) })
	}()
	waitUntil(t, "two look-ups", func() bool { return looking.now.Load() == callsAtOnce })
	s.want(s.noticeOfFrom("198.51.100.1", other, s.charge(other, 109000)), 200, "")
	if s.statusOf(other) != statusPaid {
		t.Errorf("status %d", s.statusOf(other))
	}
	release()
	if count := <-answers; count[200] < int(clientLimit.burst) || count[200] > int(clientLimit.burst)+callsAtOnce || count[200]+count[503] != 150 {
		t.Errorf("answers %v", count)
	}
	if most := looking.most.Load(); most > callsAtOnce {
		t.Errorf("%d look-ups at once", most)
	}

	s.want(s.noticeOfFrom("198.51.100.1", named, s.charge(named, 109000)), 503, messageTooMany)
	s.want(s.noticeFrom("198.51.100.1", newImpUID()), 200, "") // the sender was not charged
	s.later(s.config.hold)
	if s.statusOf(named) != statusPaid {
		t.Errorf("status %d", s.statusOf(named))
	}
}

// Notices of other shops name their orders as they like.
func TestNoticeNamesAnythingAsItsOrder(t *testing.T) {
	s := newDirectShop(t)
	for i, order := range []string{`null`, `7`, `"x"`, `"\u0000"`} {
		s.want(s.call("", "POST", "/api/payments/webhook", fmt.Sprintf(`{"imp_uid":"imp_%d","merchant_uid":%s}`, i, order)), 200, "확인했습니다")
	}
	order := s.order(buyerA, s.painting(99000))
	s.want(s.call("", "POST", "/api/payments/webhook", "imp_uid=imp_form&merchant_uid="+order), 200, "")
	if charged, _ := s.limits.penalties.get(client{order: order}); charged.level != 1 {
		t.Errorf("%v charged to the order that a form names", charged.level)
	}
}

// Honest traffic is never refused, even if all of it comes from one address.
func TestTrueReportsAreFree(t *testing.T) {
	l := newLimiter(newTestClock().Now)
	gateway := client{address: netip.MustParsePrefix("198.51.100.1/32")}
	for i := range 10_000 {
		if _, err := l.lookUp(t.Context(), gateway, "gateway", fmt.Sprint(i), func(context.Context) (gatewayPayment, error) { return gatewayPayment{}, nil }); err != nil {
			t.Fatalf("report %d: %v", i, err)
		}
	}
}

// A buyer who is signed in is charged as a buyer, not by address.
func TestBuyersAreChargedThemselves(t *testing.T) {
	s := newDirectShop(t)
	for range int(clientLimit.burst) {
		s.want(s.reportAs(buyerA, newImpUID()), 404, "")
	}
	for user, status := range map[string]int{buyerA: 429, buyerB: 404, "": 404} { // at one address
		s.want(s.reportAs(user, newImpUID()), status, "")
	}
}

// A caller that hangs up is charged all the same.
func TestHangingUpIsCharged(t *testing.T) {
	s := newDirectShop(t)
	ctx, hangUp := context.WithCancel(t.Context())
	s.fake.faultOnce("payment", fault{before: waitFor(func(context.Context) { hangUp() })})
	request := httptest.NewRequestWithContext(ctx, "PATCH", "/api/orders/pay", strings.NewReader(`{"imp_uid":"imp_1"}`))
	recorder := httptest.NewRecorder()
	s.ServeHTTP(recorder, request)
	if s.limits.total.level != 1 || recorder.Code != 499 || s.gatewaySilent() {
		t.Errorf("%v wasted, logged as %d, the gateway is silent: %v", s.limits.total.level, recorder.Code, s.gatewaySilent())
	}
}

// Many goroutines, addresses and payments at once: the slots are kept, and what is remembered stays bounded.
func TestLimiterAtOnce(t *testing.T) {
	clock := newTestClock()
	l := newLimiter(clock.Now)
	var looking atomic.Int32
	var wg sync.WaitGroup
	for g := range 32 {
		wg.Go(func() {
			for i := range 300 {
				clock.advance(time.Millisecond)
				address := netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, byte(i % 4), byte(g * i % 16)}), 32)
				_, err := l.lookUp(t.Context(), client{address: address}, "buyer", fmt.Sprint(g*i%500), func(context.Context) (gatewayPayment, error) {
					if n := looking.Add(1); n > int32(tierSlots[tierAnonymous]) {
						t.Errorf("%d look-ups at once", n)
					}
					defer looking.Add(-1)
					return gatewayPayment{}, []error{nil, errNoPayment, errNoPayment, &gatewayError{status: 503, err: errors.New("down")}}[i%4]
				})
				if err != nil && !errors.Is(err, errTooMany) && !errors.Is(err, errNoPayment) && gatewayResponded(err) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for tier, slots := range l.slots {
		if len(slots) != 0 {
			t.Errorf("%d slots of tier %d are not given back", len(slots), tier)
		}
	}
	if len(l.reporting.queues) != 0 {
		t.Errorf("%d reports are still waited for", len(l.reporting.queues))
	}
}

func TestRecent(t *testing.T) {
	r := recent[int, string]{keep: time.Minute, most: 10}
	now := newTestClock().Now()
	for i := range 1000 {
		r.put(i, "value", now)
		if len(r.newer)+len(r.older) > 2*r.most {
			t.Fatalf("%d remembered", len(r.newer)+len(r.older))
		}
	}
	for key, known := range map[int]bool{999: true, 990: true, 500: false} {
		if _, ok := r.get(key); ok != known {
			t.Errorf("%d is known: %v", key, ok)
		}
	}
	r.put(1000, "value", now.Add(r.keep))
	r.put(1001, "value", now.Add(2*r.keep))
	if _, ok := r.get(999); ok {
		t.Error("remembered for twice as long as need be")
	}
	if _, ok := r.get(1000); !ok {
		t.Error("forgotten too soon")
	}
}
