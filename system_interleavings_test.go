package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
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
	via               payVia
	buyer, rival      string
	deleter           string // who may cancel the order: its buyer, or the administrator
	painting, other   string // of which the order is
	order             string
	body              map[string]any // that made the order
	first             string         // the payment that pays for the order; the gateway has its money in most situations
	present           int            // the order's status
	forward, backward int            // the statuses one step on and back
	paidBefore        int            // how many payments the gateway had already
	begun             time.Time
}

// situations are the states of an order before the actions. Each order's hold has just ended.
var situations = []struct {
	name  string
	setUp func(*crossing)
}{
	{"unpaid", func(c *crossing) {}},
	{"unpaid, its money at the gateway", (*crossing).pay},
	{accountIssued, func(c *crossing) {
		c.first = c.via.window(c.fake, c.order, fakePayment{Amount: 208000, Status: "ready", PayMethod: "vbank"})
	}},
	{"expired, its money at the gateway", func(c *crossing) {
		check(c.t, c.settler.checkOrders(c.t.Context()))
		c.pay()
	}},
	{"paid", (*crossing).paid},
	{"shipping", func(c *crossing) {
		c.paid()
		c.step(1)
		c.step(2)
		c.present, c.forward, c.backward = 2, 3, 1
	}},
	{"return requested", func(c *crossing) {
		c.paid()
		c.want(c.call(c.buyer, "DELETE", "/api/orders/"+c.order, `{"status":4}`), 200, "")
		c.deleter, c.present = adminID, 4
	}},
	{"paid, the return of a painting requested", func(c *crossing) {
		c.paid()
		c.partReturning()
	}},
	{"shipping, the return of a painting requested", func(c *crossing) {
		c.paid()
		c.step(1)
		c.step(2)
		c.present, c.forward, c.backward = 2, 3, 1
		c.partReturning()
	}},
	{"paid, a painting cancelled", func(c *crossing) {
		c.paid()
		c.want(c.part(c.buyer, "DELETE", 5), 200, messageCancelled)
	}},
	{"paid, the refund of a painting not done", func(c *crossing) {
		c.paid()
		c.failCancel()
		c.want(c.part(c.buyer, "DELETE", 5), 503, messageRefundPending)
		c.clock.advance(time.Minute)
	}},
	{"cancelled, its refund not done", func(c *crossing) {
		c.paid()
		c.failCancel()
		c.want(c.call(c.buyer, "DELETE", "/api/orders/"+c.order, nil), 503, "")
		c.clock.advance(time.Minute)
	}},
	{"unpaid, the refund of a wrong amount not done", func(c *crossing) { // under manual approval it was never charged
		c.first = c.charge(c.order, 5000)
		c.failCancel()
		c.want(c.report(c.first), 400, "")
		c.clock.advance(time.Minute)
	}},
}

// accountIssued is the one situation in which a deposit may come.
const accountIssued = "unpaid, a virtual account issued"

// action does something about an order. It returns the answer of its last call, and the payment or order that it is about.
type action func(*crossing) (a answer, about string)

// actions are all that can be done. Those that are only second have no points to be stopped at, or the same as another.
var actions = []struct {
	name       string
	onlySecond bool
	do         action
}{
	{"report", false, func(c *crossing) (answer, string) { c.payOnce(); return c.report(c.first), c.about(c.first) }},
	{"notice", true, func(c *crossing) (answer, string) { c.payOnce(); return c.notice(c.first), c.about(c.first) }},
	{deposit, true, func(c *crossing) (answer, string) {
		c.fake.deposit(c.first) // the account may have ended
		return c.notice(c.first), c.about(c.first)
	}},
	{"reconciler", false, func(c *crossing) (answer, string) { c.round(); return answer{status: 200}, "" }},
	{"list reader", true, func(c *crossing) (answer, string) {
		check(c.t, c.settler.readList(c.t.Context(), c.settler.gateways[0], gatewayPaid))
		check(c.t, c.settler.readList(c.t.Context(), c.settler.gateways[0], gatewayCancelled))
		return answer{status: 200}, ""
	}},
	{"delete", false, func(c *crossing) (answer, string) { return c.delete("") }},
	{"return", false, func(c *crossing) (answer, string) { return c.delete(`{"status":4}`) }},
	{"cancel a painting", false, func(c *crossing) (answer, string) { return c.part(c.deleter, "DELETE", 5), c.order }},
	{"return a painting", false, func(c *crossing) (answer, string) { return c.part(c.buyer, "DELETE", 4), c.order }},
	{"take the return of a painting back", false, func(c *crossing) (answer, string) {
		return c.part(c.buyer, "PATCH", c.present), c.order
	}},
	{"step", false, func(c *crossing) (answer, string) { return c.step(c.forward) }},
	{"step back", false, func(c *crossing) (answer, string) { return c.step(c.backward) }},
	{"withdraw", false, func(c *crossing) (answer, string) {
		return c.call(adminID, "PATCH", "/api/products/"+c.painting, `{"forSale":false}`), c.painting
	}},
	{"import", true, func(c *crossing) (answer, string) {
		c.catalogue(120000, false, c.painting)
		return answer{status: 200}, ""
	}},
	{"refund to an account", false, func(c *crossing) (answer, string) {
		return c.helpRefund(`"account":{"holder":"홍길동","bank":"04","number":"000-000-000000"}`)
	}},
	{"refund by hand", true, func(c *crossing) (answer, string) { return c.helpRefund(`"byHand":"계좌 이체"`) }},
	{"second payment", true, func(c *crossing) (answer, string) { return c.reportNew(c.order, 208000) }},
	{"wrong amount", false, func(c *crossing) (answer, string) { return c.reportNew(c.order, 1000) }},
	{"refund in the console", false, func(c *crossing) (answer, string) {
		c.payOnce()
		c.fake.refundInConsole(c.first, 0) // it may be back already
		return c.notice(c.first), c.about(c.first)
	}},
	{"part refund in the console", true, func(c *crossing) (answer, string) {
		c.payOnce()
		c.fake.refundInConsole(c.first, 1000)
		return c.notice(c.first), c.about(c.first)
	}},
	{"order sent again", true, (*crossing).orderAgain},
	{"another order of the buyer's, paid", true, func(c *crossing) (answer, string) { return c.orderAndPay(c.buyer) }},
	{"a rival's order, paid", false, func(c *crossing) (answer, string) { return c.orderAndPay(c.rival) }},
}

const deposit = "deposit"

func (c *crossing) pay() { c.first = c.charge(c.order, 208000) }

// charge has the buyer pay an order, and returns the payment. V2 takes no second one for an order that was paid: then it is that one.
func (c *crossing) charge(order string, amount int64) string {
	made := c.via.window(c.fake, order, fakePayment{Amount: amount})
	for _, p := range c.fake.all() {
		if made == "" && p.MerchantUID == order && !p.PaidAt.IsZero() {
			made = p.ImpUID
		}
	}
	return made
}

// about is what an answer to a report of the payment is about: V2's reports name the order, of which the gateway may have several.
func (c *crossing) about(payment string) string {
	if c.via == viaV1 {
		return payment
	}
	p, _ := c.fake.get(payment)
	return p.MerchantUID
}

// report tells the service of a payment as the browser does.
func (c *crossing) report(impUID string) answer {
	c.t.Helper()
	p, _ := c.fake.get(impUID)
	return c.call("", "PATCH", "/api/orders/pay", reportOf(p))
}

// notice tells the service of a payment as the gateway does.
func (c *crossing) notice(impUID string) answer {
	c.t.Helper()
	if c.via == viaV1 {
		return c.shop.notice(impUID)
	}
	return c.noticeV2(impUID)
}

// failCancel has the gateway fail to give back the next payment.
func (c *crossing) failCancel() {
	for _, call := range []string{"cancel", "v2 cancel"} {
		c.fake.faultOnce(call, fault{before: answer500})
	}
}

func (c *crossing) payOnce() {
	if c.first == "" {
		c.pay()
	}
}

func (c *crossing) paid() {
	c.pay()
	c.want(c.report(c.first), 200, "결제 성공")
}

// step has the administrator move the order to a status.
func (c *crossing) step(to int) (answer, string) {
	return c.call(adminID, "PATCH", "/api/orders/"+c.order, map[string]int{"status": to}), c.order
}

// part asks something for one painting of the order.
func (c *crossing) part(user, method string, status int) answer {
	c.t.Helper()
	return c.call(user, method, "/api/orders/"+c.order, map[string]any{"status": status, "products": []string{c.painting}})
}

// partReturning has the buyer ask for the return of a painting, which the administrator may accept.
func (c *crossing) partReturning() {
	c.t.Helper()
	c.want(c.part(c.buyer, "DELETE", 4), 200, messageReturnRequested)
	c.deleter = adminID
}

// helpRefund has the administrator help the refund of the payment as the rest of the body says.
func (c *crossing) helpRefund(rest string) (answer, string) {
	c.payOnce()
	a := c.call(adminID, "POST", "/api/orders/"+c.order+"/refund", `{"imp_uid":"`+c.first+`",`+rest+`}`)
	if a.status == 404 {
		return a, "" // the payment is not in the ledger yet
	}
	return a, c.first
}

// orderAgain sends the request for the order once more.
func (c *crossing) orderAgain() (answer, string) {
	a := c.call(c.buyer, "POST", "/api/orders", c.body)
	var made orderCreated
	check(c.t, json.Unmarshal([]byte(a.body), &made))
	return a, made.OrderID
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
	return c.report(impUID), c.about(impUID)
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
	"금액 불일치, 위조된 결제 시도":                                 {false, []string{"refunding: amount differs"}},
	"주문 시간이 지나 작품이 이미 판매되어 결제 금액을 환불합니다":                {false, []string{"refunding: paintings gone"}},
	"이미 결제된 주문이므로 중복된 결제 금액을 환불합니다":                     {false, []string{"refunding: order paid already"}},
	"이미 취소된 주문이므로 결제 금액을 환불합니다":                         {false, []string{"refunding: order cancelled"}},
	"imp_uid: 취소된 결제입니다":                                {false, []string{"refunded: refunded at the gateway", "refunding: buyer cancelled", "refunding: shop cancelled"}},
	"주문서 생성 성공":                                         {false, []string{"created"}},
	"결제 오류로 임시 주문서를 삭제했습니다":                             {false, []string{"deleted", "replaced", "expired", "withdrawn"}},
	"결제가 확인되어 주문이 완료되었습니다. 취소하려면 다시 요청해 주세요":            {false, []string{"paid", "revived"}},
	"해당 주문의 결제 취소가 완료되었습니다":                             {false, []string{"cancelled", "part cancelled"}},
	"결제 취소를 접수했으나 환불이 아직 완료되지 않았습니다. 자동으로 다시 시도합니다":     {false, []string{"cancel requested", "part cancel requested", "refunding"}},
	"결제 취소가 진행 중입니다":                                    {false, []string{"cancel requested", "part cancel requested", "refunding"}},
	"환불이 처리되었습니다":                                       {false, []string{"refunded"}},
	"이미 취소된 주문입니다":                                      {false, []string{"cancelled"}},
	"해당 주문의 반품 요청이 완료되었습니다":                             {true, []string{"return requested", "part return requested"}},
	"이미 반품을 요청한 주문입니다":                                  {false, []string{"return requested"}},
	"반품을 요청한 주문입니다. 반품이 확인되면 환불됩니다":                     {false, []string{"return requested", "part return requested"}},
	"발송 준비가 시작된 주문은 취소할 수 없고 반품만 신청할 수 있습니다":            {false, []string{"preparing"}},
	"해당 주문이 결제 완료 단계로 변경되었습니다":                          {true, []string{"paid", "part return withdrawn"}},
	"해당 주문이 발송 준비 중 단계로 변경되었습니다":                        {true, []string{"preparing"}},
	"해당 주문이 배송 중 단계로 변경되었습니다":                           {true, []string{"shipping", "part return withdrawn"}},
	"결제사가 일부 금액의 환불을 거절하여 취소하지 못했습니다":                   {false, []string{"refund refused"}},
	"products[0]: 이미 취소된 작품입니다":                         {false, []string{"part cancelled"}},
	"products[0]: 이미 반품을 요청한 작품입니다":                     {false, []string{"part return requested"}},
	"products[0]: 반품을 요청하지 않은 작품입니다":                    {},
	"결제되지 않은 주문은 일부 작품만 취소할 수 없습니다":                     {},
	"해당 주문이 배송 완료 단계로 변경되었습니다":                          {true, []string{"delivered"}},
	"해당 주문내역이 존재하지 않습니다":                                {false, []string{"deleted", "replaced", "expired", "withdrawn"}},
	"판매 상태가 변경되었습니다":                                    {}, // wantTrue looks at the painting
	"가상계좌로는 결제할 수 없어 발급된 계좌를 해지했습니다. 다른 결제 수단을 이용해 주세요": {}, // these say what the call did not do
	"imp_uid: 환불할 금액이 없는 결제입니다":                         {},
	"imp_uid: 결제가 완료되지 않았습니다":                           {},
	"result.id: 이미 결제된 주문에 사용된 주문 번호입니다":                {},
	"결제된 주문의 작품은 판매 상태를 변경할 수 없습니다":                     {},
	"orderItems[0].price: 작품 가격은 120000원입니다":            {},
	"변경실패, 진행 단계가 알맞지 않습니다":                             {},
	"이미 판매되었거나 다른 구매자가 결제 중인 작품이 있습니다":                  {},
	"확인했습니다": {}, // the gateway is told nothing

	// Under manual approval nothing was charged then.
	"주문 시간이 지나 결제하지 않았습니다. 다시 주문해 주세요": {false, []string{"deleted", "replaced", "expired", "withdrawn"}},
	"이미 결제된 주문이므로 결제하지 않았습니다":          {false, []string{"paid", "revived"}},
	"이미 취소된 주문이므로 결제하지 않았습니다":          {false, []string{"cancelled"}},
	messageConfirming: {},
	"작품이 변경되는 중입니다. 잠시 후 다시 시도해 주세요":        {},
	"paymentToken: 결제 인증이 올바르지 않거나 만료되었습니다": {}, // the window was opened again since
	"": {}, // the reconciler answers no call
}

// changesAnyway are refusals of calls that have changed the order.
var changesAnyway = []string{
	"결제가 확인되어 주문이 완료되었습니다. 취소하려면 다시 요청해 주세요", // its money was found
	"결제 취소를 접수했으나 환불이 아직 완료되지 않았습니다. 자동으로 다시 시도합니다",
	"imp_uid: 취소된 결제입니다",            // which cancels the order that was paid with it
	"결제된 주문의 작품은 판매 상태를 변경할 수 없습니다", // its money was found
}

// wantTrue fails unless what a call was answered is true.
func (c *crossing) wantTrue(request string, a answer, about string) {
	c.t.Helper()
	text := strings.Replace(a.message(), "paymentId:", "imp_uid:", 1) // V2's reports are refused in the same words
	said, ok := trueWhen[text]
	if !ok {
		c.t.Fatalf("%s was answered %d %s", request, a.status, a.body)
	}
	if c.via == viaApproval && text == "금액 불일치, 위조된 결제 시도" {
		said.whys = nil // nothing was charged, so that nothing goes back: wantWhole looks
	}
	rows := c.lines(`SELECT why FROM history WHERE (order_id = $1 OR imp_uid = $1) AND (NOT $2 OR request_id = $3)`, about, said.own, request)
	if about != "" && len(said.whys) > 0 && !slices.ContainsFunc(rows, func(why string) bool {
		return slices.ContainsFunc(said.whys, func(w string) bool { return strings.HasPrefix(why, w) })
	}) {
		c.t.Errorf("%s was answered %d %s, but the history of %s has only %q", request, a.status, a.message(), about, rows)
	}
	switch {
	case a.message() == "판매 상태가 변경되었습니다":
		if rows := c.lines(`SELECT id FROM products WHERE id = $1 AND (for_sale OR order_id IS NOT NULL)`, about); len(rows) > 0 {
			c.t.Errorf("%s took the painting off sale, and it is on sale or ordered", request)
		}
	case a.status == 201 && about == c.order && slices.Contains(rows, "expired"):
		c.t.Errorf("%s began the order's hold anew, and it expired", request)
	}
	if a.status >= 400 && !slices.Contains(changesAnyway, text) {
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
	c.clock.advance(25 * time.Hour) // every refund is due, and every check of an order
	c.round()
	buyers := []string{c.buyer, c.rival}
	for _, line := range c.lines(`SELECT format('order %s has status %s, and is unpaid, cancelling or to be checked', id, status) FROM orders
		WHERE user_id = ANY($1) AND (cancelling_since IS NOT NULL OR status = -1 AND ended IS NULL OR next_look_at IS NOT NULL)`, buyers) {
		c.t.Error(line)
	}
	c.wantAudited(buyers)
	booked := c.lines(`SELECT imp_uid FROM payments JOIN orders ON orders.id = order_id WHERE user_id = ANY($1) ORDER BY 1`, buyers)
	var there []string
	for _, p := range c.fake.all()[c.paidBefore:] {
		if !p.PaidAt.IsZero() {
			there = append(there, p.ImpUID)
			if c.via == viaApproval && p.Amount < 109000 {
				c.t.Errorf("%d won were charged for order %s", p.Amount, p.MerchantUID)
			}
		}
	}
	slices.Sort(there)
	if !slices.Equal(booked, there) {
		c.t.Errorf("the ledger knows of the payments %q, the gateway of %q", booked, there)
	}
}

// wantAudited fails unless the audit finds nothing but what was paid back by hand and in the gateway's console too.
func (c *crossing) wantAudited(buyers []string) {
	c.t.Helper()
	var want, got []string
	for _, line := range c.lines(`SELECT format('%s %s', imp_uid, refunded - by_hand_amount) FROM payments JOIN orders ON orders.id = order_id
		WHERE user_id = ANY($1) AND by_hand IS NOT NULL`, buyers) {
		var impUID string
		var booked int64
		_, err := fmt.Sscan(line, &impUID, &booked)
		check(c.t, err)
		p, _ := c.fake.get(impUID)
		if p.Cancelled > booked && p.Refunds[len(p.Refunds)-1].Reason == fakeInConsole {
			want = append(want, impUID+": "+mismatchBackTwice.name)
		}
	}
	for _, m := range c.auditSince(c.begun).Mismatches {
		got = append(got, m.ImpUID+": "+m.Kind)
	}
	if !slices.Equal(got, want) {
		c.t.Errorf("the audit finds %q, not %q", got, want)
	}
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

var crossOneIn = flag.Int("cross", 12, "TestInterleavings tries one in so many crossings, from a random one on; 1: all of them")

func TestInterleavings(t *testing.T) {
	heavy(t)
	gateways := map[payVia]func(*config){viaV1: func(*config) {}, viaV2: withV2Alone, viaApproval: withV2Alone}
	for _, via := range waysToPay {
		for _, situation := range situations {
			t.Run(string(via)+", "+situation.name, func(t *testing.T) {
				t.Parallel()
				s := newDirectShop(t, gateways[via])
				paintings := s.paintings(2000, 99000) // two for each crossing
				next := func() *crossing {
					s.clock.advance(time.Second) // what was done before is not audited again
					c := &crossing{shop: s, via: via, buyer: newTestID(), rival: newTestID(), painting: paintings[0], other: paintings[1], forward: 1,
						paidBefore: len(s.fake.all()), begun: s.clock.Now()}
					c.deleter, paintings = c.buyer, paintings[2:]
					c.body = orderBody(newNumber(), c.painting, c.other)
					_, c.order = c.orderAgain()
					s.clock.advance(s.config.hold)
					situation.setUp(c)
					return c
				}
				crossAll(t, situation.name, next)
			})
		}
	}
}

// crossAll crosses all pairs of actions, each on a new order that next makes.
func crossAll(t *testing.T, situation string, next func() *crossing) {
	crossings, all := 0, rand.IntN(*crossOneIn)
	for _, first := range actions {
		if first.onlySecond {
			continue
		}
		c := next()
		points := c.points(first.do)
		c.wantWhole()
		for i, point := range points {
			for _, second := range actions {
				if second.name == deposit && situation != accountIssued {
					continue
				}
				if all++; all%*crossOneIn != 0 {
					continue
				}
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
	t.Logf("%d crossings", crossings)
}
