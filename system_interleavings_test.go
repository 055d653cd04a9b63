package main

import (
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Two actions on one order, in every interleaving: the first is stopped at each of its test points in turn, the second runs
// through, the first goes on. Whatever came of it, the answers given are true, and once the reconciler has had its time the
// money and the paintings are where the order says.

// crossing is one interleaving: the order that both actions are about, and what they need.
type crossing struct {
	*shop
	buyer, rival    string
	deleter         string // who may cancel the order: its buyer, or the administrator
	painting, order string
	first           string // the payment that pays for the order; the gateway has its money in most situations
	paidBefore      int    // how many payments the gateway had already
	begun           time.Time
}

// situations are the states of an order before the actions. Each order's hold has just ended.
var situations = []struct {
	name  string
	setUp func(*crossing)
}{
	{"unpaid", func(c *crossing) {}},
	{"unpaid, its money at the gateway", (*crossing).pay},
	{"expired, its money at the gateway", func(c *crossing) { c.round(); c.pay() }},
	{"paid", func(c *crossing) { c.pay(); c.want(c.report(c.first), 200, "결제 성공") }},
	{"return requested", func(c *crossing) {
		c.pay()
		c.want(c.report(c.first), 200, "결제 성공")
		c.want(c.call(c.buyer, "DELETE", "/api/orders/"+c.order, `{"status":4}`), 200, "")
		c.deleter = adminID
	}},
	{"cancelled, its refund not done", func(c *crossing) {
		c.pay()
		c.want(c.report(c.first), 200, "결제 성공")
		c.fake.faultOnce("cancel", fault{before: answer500})
		c.want(c.call(c.buyer, "DELETE", "/api/orders/"+c.order, nil), 503, "")
		c.clock.advance(time.Minute)
	}},
	{"unpaid, the refund of a wrong amount not done", func(c *crossing) {
		c.first = c.charge(c.order, 5000)
		c.fake.faultOnce("cancel", fault{before: answer500})
		c.want(c.report(c.first), 400, "")
		c.clock.advance(time.Minute)
	}},
}

// action does something about an order. It returns the answer of its last call, and the payment or order that it is about.
type action func(*crossing) (a answer, about string)

// actions are all that can be done. Those that are only second have no points to be stopped at, or the same as another.
var actions = []struct {
	name       string
	onlySecond bool
	do         action
}{
	{"report", false, func(c *crossing) (answer, string) { c.payOnce(); return c.report(c.first), c.first }},
	{"notice", true, func(c *crossing) (answer, string) { c.payOnce(); return c.notice(c.first), c.first }},
	{"reconciler", false, func(c *crossing) (answer, string) { c.round(); return answer{status: 200}, "" }},
	{"delete", false, func(c *crossing) (answer, string) { return c.delete("") }},
	{"return", false, func(c *crossing) (answer, string) { return c.delete(`{"status":4}`) }},
	{"step", false, func(c *crossing) (answer, string) {
		return c.call(adminID, "PATCH", "/api/orders/"+c.order, `{"status":1}`), c.order
	}},
	{"second payment", true, func(c *crossing) (answer, string) { return c.reportNew(c.order, 109000) }},
	{"wrong amount", false, func(c *crossing) (answer, string) { return c.reportNew(c.order, 1000) }},
	{"refund in the console", false, func(c *crossing) (answer, string) {
		c.payOnce()
		c.fake.refundInConsole(c.first, 0) // it may be back already
		return c.notice(c.first), c.first
	}},
	{"part refund in the console", true, func(c *crossing) (answer, string) {
		c.payOnce()
		c.fake.refundInConsole(c.first, 1000)
		return c.notice(c.first), c.first
	}},
	{"another order of the buyer's, paid", true, func(c *crossing) (answer, string) { return c.orderAndPay(c.buyer) }},
	{"a rival's order, paid", false, func(c *crossing) (answer, string) { return c.orderAndPay(c.rival) }},
}

func (c *crossing) pay() { c.first = c.charge(c.order, 109000) }

func (c *crossing) payOnce() {
	if c.first == "" {
		c.pay()
	}
}

// round has the reconciler do what is due.
func (c *crossing) round() {
	c.t.Helper()
	check(c.t, c.settler.reconcileRound(c.t.Context()))
}

func (c *crossing) delete(body string) (answer, string) {
	return c.call(c.deleter, "DELETE", "/api/orders/"+c.order, body), c.order
}

// reportNew pays an order with a new payment and reports it.
func (c *crossing) reportNew(order string, amount int64) (answer, string) {
	impUID := c.charge(order, amount)
	return c.report(impUID), impUID
}

// orderAndPay makes a new order for the same painting, pays it and reports the payment.
func (c *crossing) orderAndPay(user string) (answer, string) {
	a := c.call(user, "POST", "/api/orders", orderBody(newNumber(), c.painting))
	if a.status != 201 {
		return a, ""
	}
	var made orderCreated
	check(c.t, json.Unmarshal([]byte(a.body), &made))
	c.called += "-paid"
	return c.reportNew(made.OrderID, 109000)
}

// trueWhen says of each message what must be in the history for it to be true: of the payment or order that it speaks of,
// or, where own, of what the very call did.
var trueWhen = map[string]struct {
	own  bool
	whys []string // one of them, from its beginning
}{
	"결제 성공": {false, []string{"payment kept"}},
	"금액 불일치, 위조된 결제 시도":                             {false, []string{"refunding: amount differs"}},
	"주문 시간이 지나 작품이 이미 판매되어 결제 금액을 환불합니다":            {false, []string{"refunding: paintings gone"}},
	"이미 결제된 주문이므로 중복된 결제 금액을 환불합니다":                 {false, []string{"refunding: order paid already"}},
	"이미 취소된 주문이므로 결제 금액을 환불합니다":                     {false, []string{"refunding: order cancelled"}},
	"imp_uid: 취소된 결제입니다":                            {false, []string{"refunded: refunded at the gateway", "refunding: buyer cancelled", "refunding: shop cancelled"}},
	"주문서 생성 성공":                                     {true, []string{"created"}},
	"결제 오류로 임시 주문서를 삭제했습니다":                         {true, []string{"deleted"}},
	"결제가 확인되어 주문이 완료되었습니다. 취소하려면 다시 요청해 주세요":        {false, []string{"paid", "revived"}},
	"해당 주문의 결제 취소가 완료되었습니다":                         {false, []string{"cancelled"}},
	"결제 취소를 접수했으나 환불이 아직 완료되지 않았습니다. 자동으로 다시 시도합니다": {false, []string{"cancel requested"}},
	"결제 취소가 진행 중입니다":                                {false, []string{"cancel requested"}},
	"이미 취소된 주문입니다":                                  {false, []string{"cancelled"}},
	"해당 주문의 반품 요청이 완료되었습니다":                         {true, []string{"return requested"}},
	"이미 반품을 요청한 주문입니다":                              {false, []string{"return requested"}},
	"반품을 요청한 주문입니다. 반품이 확인되면 환불됩니다":                 {false, []string{"return requested"}},
	"발송 준비가 시작된 주문은 취소할 수 없고 반품만 신청할 수 있습니다":        {false, []string{"preparing"}},
	"해당 주문이 발송 준비 중 단계로 변경되었습니다":                    {true, []string{"preparing"}},
	"해당 주문내역이 존재하지 않습니다":                            {false, []string{"deleted", "replaced", "expired"}},
	"변경실패, 진행 단계가 알맞지 않습니다":                         {}, // the two say what the call did not do
	"이미 판매되었거나 다른 구매자가 결제 중인 작품이 있습니다":              {},
	"확인했습니다": {}, // the gateway is told nothing
	"":       {}, // the reconciler answers no call
}

// changesAnyway are refusals of calls that have changed the order.
var changesAnyway = []string{
	"결제가 확인되어 주문이 완료되었습니다. 취소하려면 다시 요청해 주세요", // its money was found
	"결제 취소를 접수했으나 환불이 아직 완료되지 않았습니다. 자동으로 다시 시도합니다",
	"imp_uid: 취소된 결제입니다", // which cancels the order that was paid with it
}

// wantTrue fails unless what a call was answered is true.
func (c *crossing) wantTrue(request string, a answer, about string) {
	c.t.Helper()
	said, ok := trueWhen[a.message()]
	if !ok {
		c.t.Fatalf("%s was answered %d %s", request, a.status, a.body)
	}
	rows := c.lines(`SELECT why FROM history WHERE (order_id = $1 OR imp_uid = $1) AND (NOT $2 OR request_id = $3)`, about, said.own, request)
	if len(said.whys) > 0 && !slices.ContainsFunc(rows, func(why string) bool {
		return slices.ContainsFunc(said.whys, func(w string) bool { return strings.HasPrefix(why, w) })
	}) {
		c.t.Errorf("%s was answered %d %s, but the history of %s has only %q", request, a.status, a.message(), about, rows)
	}
	if a.status >= 400 && !slices.Contains(changesAnyway, a.message()) {
		if rows := c.lines(`SELECT why FROM history WHERE request_id = $1 AND to_status IS NOT NULL`, request); len(rows) > 0 {
			c.t.Errorf("%s was refused with %d %s, but did %q", request, a.status, a.message(), rows)
		}
	}
}

// lines are the rows of a query of one text.
func (c *crossing) lines(sql string, args ...any) []string {
	c.t.Helper()
	rows, _ := c.store.pool.Query(c.t.Context(), sql, args...)
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	check(c.t, err)
	return lines
}

// wantWhole fails unless, once the reconciler has had its time, all that the gateway has for the two buyers' orders pays for
// them or is back.
func (c *crossing) wantWhole() {
	c.t.Helper()
	c.clock.advance(25 * time.Hour) // every refund is due, and the last look at every order
	c.round()
	buyers := []string{c.buyer, c.rival}
	for _, line := range c.lines(`SELECT format('order %s has status %s, and is unpaid or cancelling', id, status) FROM orders
		WHERE user_id = ANY($1) AND (cancelling_since IS NOT NULL OR status = -1 AND ended IS NULL)`, buyers) {
		c.t.Error(line)
	}
	c.wantBalancedSince(c.begun)
	booked := c.lines(`SELECT imp_uid FROM payments JOIN orders ON orders.id = order_id WHERE user_id = ANY($1) ORDER BY 1`, buyers)
	var there []string
	for _, p := range c.fake.all()[c.paidBefore:] {
		there = append(there, p.ImpUID)
	}
	slices.Sort(there)
	if !slices.Equal(booked, there) {
		c.t.Errorf("the books know of the payments %q, the gateway of %q", booked, there)
	}
	// What was just paid would be looked at once more, amid the next crossing.
	c.lines(`UPDATE orders SET next_look_at = NULL WHERE next_look_at IS NOT NULL RETURNING id`)
}

// cross runs the whole second action when the first has come to its test point number stop.
func cross(c *crossing, first, second action, stop int) {
	arrived, release := make(chan struct{}), make(chan struct{})
	var reached atomic.Int32
	c.settler.onTestHook = func(string, string) {
		if reached.Add(1) == int32(stop) {
			close(arrived)
			<-release
		}
	}
	done := make(chan func(), 1)
	go func() {
		defer close(done)
		done <- c.run("first", first)
	}()
	select {
	case <-arrived:
	case <-done:
		c.t.Fatal("the first action has no such point this time")
	}
	wantSecond := c.run("second", second)
	close(release)
	wantFirst := <-done
	c.settler.onTestHook = nil
	wantFirst()
	wantSecond()
}

// run does an action under a request id of its own, and returns what checks its answer.
func (c *crossing) run(name string, do action) (wantTrue func()) {
	alone, own := *c, *c.shop
	alone.shop, own.called = &own, name+"-"+c.order
	a, about := do(&alone)
	return func() { c.wantTrue(own.called, a, about) }
}

// points returns the test points that an action comes to.
func (c *crossing) points(do action) (names []string) {
	var mu sync.Mutex
	c.settler.onTestHook = func(name, _ string) {
		mu.Lock()
		defer mu.Unlock()
		names = append(names, name)
	}
	wantTrue := c.run("alone", do)
	c.settler.onTestHook = nil
	wantTrue()
	return names
}

func TestInterleavings(t *testing.T) {
	heavy(t)
	for _, situation := range situations {
		t.Run(situation.name, func(t *testing.T) {
			t.Parallel()
			s := newDirectShop(t)
			paintings := s.paintings(1000, 99000)
			next := func() *crossing {
				c := &crossing{shop: s, buyer: newTestID(), rival: newTestID(), painting: paintings[0], paidBefore: len(s.fake.all()), begun: s.clock.Now()}
				c.deleter, paintings = c.buyer, paintings[1:]
				c.order = s.order(c.buyer, c.painting)
				s.clock.advance(s.config.hold)
				situation.setUp(c)
				return c
			}
			crossings := 0
			for _, first := range actions {
				if first.onlySecond {
					continue
				}
				c := next()
				points := c.points(first.do)
				c.wantWhole()
				for i, point := range points {
					for _, second := range actions {
						c := next()
						cross(c, first.do, second.do, i+1)
						c.wantWhole()
						if t.Failed() {
							t.Fatalf("%s, stopped at its point %d (%s), crossed by %s", first.name, i+1, point, second.name)
						}
						crossings++
					}
				}
			}
			s.wantBalanced()
			t.Logf("%d crossings", crossings)
		})
	}
}
