package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Random runs of a small shop. Each move goes to the service and to the model below. The answer, the ledger, the history and
// the money at the gateway must then be what the model says. A failure prints the seed of the one run in which it happened
// and that run's moves.

var (
	modelSeed  = flag.Uint64("model.seed", 0, "seed of the first run that TestModel plays; 0: another each time")
	modelSteps = flag.Int("model.steps", 2000, "how many random moves TestModel plays")
)

const (
	// runMoves is how many moves a run has before all is settled. The next one begins with new buyers and paintings.
	runMoves = 60
	// runsPerShop is how many runs share a shop. Its lists and its clock grow with them.
	runsPerShop = 6
	// maxListDelay is how late a payment shows up in the gateway's lists.
	maxListDelay = 50 * time.Minute
)

func TestModel(t *testing.T) {
	heavy(t)
	t.Parallel()
	seed := cmp.Or(*modelSeed, rand.Uint64()>>32)
	first, counts, steps := seed, map[string]int{}, 0
	for calm := false; steps < *modelSteps && !t.Failed(); calm = !calm {
		ends := map[string][]string{}
		for _, way := range modelWays {
			t.Run(fmt.Sprintf("%s from seed %d", way.name, seed), func(t *testing.T) {
				s := newDirectShop(t, way.configure)
				s.later(time.Second) // the service has read the gateway's lists once
				for run := range uint64(runsPerShop) {
					l := newModelRun(s, seed+run)
					l.via, l.model.via, l.single, l.calm = way.via, way.via, way.single, calm && way.single
					for range runMoves {
						l.move()
					}
					l.settleDown()
					for move, n := range l.counts {
						counts[move] += n
					}
					ends[way.name] = append(ends[way.name], l.end()...)
					s.logged.Reset()
					steps += runMoves
				}
			})
		}
		if one, other := ends["v1 as v2"], ends["v2"]; calm && !t.Failed() && !slices.Equal(one, other) {
			t.Errorf("from seed %d on, V1 ends with\n%s\nV2 with\n%s", seed, strings.Join(one, "\n"), strings.Join(other, "\n"))
		}
		seed += runsPerShop
	}
	var played []string
	for _, move := range slices.Sorted(maps.Keys(counts)) {
		played = append(played, fmt.Sprintf("%d %s", counts[move], move))
	}
	t.Logf("%d moves from seed %d on: %s", steps, first, strings.Join(played, ", "))
}

// modelWays are the ways to pay that the same random moves are played with. In a single one at most one payment of an order is
// ever paid, as at V2. When the gateway has no trouble, V1 and V2 must then end the same way.
var modelWays = []struct {
	name      string
	via       payVia
	single    bool
	configure func(*config)
}{
	{"v1", viaV1, false, func(*config) {}},
	{"v1 as v2", viaV1, true, func(*config) {}},
	{"v2", viaV2, true, withV2Alone},
	{"approval", viaApproval, true, withV2Alone},
}

// modelRun is one run of a shop: the model beside the service, and what has been done so far.
type modelRun struct {
	*shop
	model  model
	via    payVia
	single bool // at most one payment of an order is paid, and a report is of what the order's paymentId shows
	calm   bool // the gateway has no trouble
	seed   uint64
	random *rand.Rand
	buyers []string
	names  []string // of ids, for strings.NewReplacer
	trace  []string
	counts map[string]int
	begun  time.Time
}

// newModelRun begins a run with three buyers and four paintings.
func newModelRun(s *shop, seed uint64) *modelRun {
	s.clock.advance(time.Second) // what earlier runs did is not audited again
	l := &modelRun{shop: s, seed: seed, random: rand.New(rand.NewPCG(seed, 0)), counts: map[string]int{}, begun: s.clock.Now()}
	for i := range 3 {
		l.buyers = append(l.buyers, newTestID())
		l.names = append(l.names, l.buyers[i], fmt.Sprintf("buyer%d", i+1))
	}
	for i, id := range s.paintings(4, prices[0]) {
		l.model.paintings = append(l.model.paintings, &modelPainting{id: id, price: prices[0], forSale: true})
		l.names = append(l.names, id, fmt.Sprintf("painting%d", i+1))
	}
	l.names = append(l.names, adminID, "administrator")
	l.fake.listDelay = pick(l, []time.Duration{0, 0, 5 * time.Minute, maxListDelay}) // no call is under way
	return l
}

// prices are those that a painting may have.
var prices = []int64{99000, 99000, 99000, 120000}

// moves are what can happen, and how often.
var moves = []struct {
	often int
	name  string
	play  func(*modelRun)
}{
	{22, "create", (*modelRun).playCreate},
	{6, "show", (*modelRun).playShow},
	{20, "charge", (*modelRun).playCharge},
	{18, "report", (*modelRun).playReport},
	{12, "notice", (*modelRun).playNotice},
	{18, "delete", (*modelRun).playDelete},
	{14, "part", (*modelRun).playPart},
	{14, "step", (*modelRun).playStep},
	{6, "console", (*modelRun).playConsole},
	{3, "chargeback", (*modelRun).playChargeback},
	{6, "account", (*modelRun).playAccount},
	{3, "card company", (*modelRun).playCardCompany},
	{7, "change of mind", (*modelRun).playChangeOfMind},
	{4, "catalogue", (*modelRun).playCatalogue},
	{5, "sale", (*modelRun).playSale},
	{8, "refund", (*modelRun).playRefund},
	{9, "wait", (*modelRun).playWait},
	{12, "reconcile", (*modelRun).playReconcile},
}

// move plays a random move and compares.
func (l *modelRun) move() {
	l.t.Helper()
	l.tick(5 * time.Second) // a look-up repeated within 3 seconds may be answered from the one before
	l.model.trouble = noTrouble
	if l.random.IntN(5) == 0 {
		if t := pick(l, troubles); !l.calm {
			l.model.trouble = t
		}
	}
	l.fake.setFaults(l.faults(l.model.trouble))
	all := 0
	for _, m := range moves {
		all += m.often
	}
	n := l.random.IntN(all)
	for _, m := range moves {
		if n -= m.often; n < 0 {
			l.counts[m.name]++
			m.play(l)
			break
		}
	}
	l.compare()
}

// faults returns the trouble as a fault function of the test gateway.
func (l *modelRun) faults(t trouble) func(call, id string) fault {
	cancelled := map[string]bool{}
	return func(call, id string) fault {
		call, isV2 := strings.CutPrefix(call, "v2 ")
		switch {
		case call == "cancel":
			cancelled[id] = true
			if isV2 && t.status == http.StatusBadGateway {
				return fault{before: refuseV2}
			}
			return t.cancel
		case call == "account" && t.deposit:
			if isV2 {
				id = l.model.shown(l.model.order(id)).impUID
			}
			return fault{before: func(http.ResponseWriter, *http.Request) bool {
				l.fake.deposit(id) // the bank may refuse it, too late
				return false
			}}
		case call != "token" && (t.lookUp || t.after && cancelled[id]), call == "account" && t.account:
			return fault{before: answer500}
		}
		return fault{}
	}
}

// atGateway changes a payment so that no list of the gateway's shows a change.
func (l *modelRun) atGateway(impUID string, change func(*fakePayment)) {
	l.fake.mu.Lock()
	defer l.fake.mu.Unlock()
	change(l.fake.byImpUID[impUID])
}

func (l *modelRun) tick(d time.Duration) {
	l.clock.advance(d)
	l.model.now = l.clock.Now()
}

func pick[T any](l *modelRun, from []T) T { return from[l.random.IntN(len(from))] }

// lately picks one of the last ten; nil when there is none.
func lately[T any](l *modelRun, from []*T) *T {
	if len(from) == 0 {
		return nil
	}
	return pick(l, from[max(0, len(from)-10):])
}

// latePayment picks one of the last ten payments that fit; nil when there is none.
func (l *modelRun) latePayment(fits func(*modelPayment) bool) *modelPayment {
	return lately(l, slices.DeleteFunc(slices.Clone(l.model.payments), func(p *modelPayment) bool { return !fits(p) }))
}

// lateOrder picks one of the last ten orders that fit; nil when there is none.
func (l *modelRun) lateOrder(fits func(*modelOrder) bool) *modelOrder {
	return lately(l, slices.DeleteFunc(slices.Clone(l.model.orders), func(o *modelOrder) bool { return !fits(o) }))
}

// user is mostly the order's buyer, or else the administrator, another buyer or "".
func (l *modelRun) user(o *modelOrder) string {
	switch n := l.random.IntN(20); {
	case n < 13 && o != nil:
		return o.buyer
	case n < 17:
		return adminID
	case n < 19:
		return pick(l, l.buyers)
	}
	return ""
}

// administrator is mostly the administrator, or else a buyer or "".
func (l *modelRun) administrator() string {
	if l.random.IntN(10) > 0 {
		return adminID
	}
	return pick(l, append([]string{""}, l.buyers...))
}

// orderID returns the order's id, or that of no order.
func (o *modelOrder) orderID() string {
	if o == nil {
		return "61a7adc903b7708e5dbba693"
	}
	return o.id
}

// say adds a line to the trace.
func (l *modelRun) say(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	if l.model.trouble.name != "" {
		line += " while " + l.model.trouble.name
	}
	l.trace = append(l.trace, fmt.Sprintf("%3d %s  %s", len(l.trace)+1, l.model.now.Format("0102 15:04:05"), line))
}

// want says what was done and fails unless it was answered as the model says.
func (l *modelRun) want(a answer, r reply, format string, args ...any) {
	l.t.Helper()
	l.say(format+" → %d %s", append(args, a.status, a.message())...)
	if a.status != r.status || a.message() != r.message {
		l.fail("the model answers %d %s", r.status, r.message)
	}
}

// fail ends the test with the run so far.
func (l *modelRun) fail(format string, args ...any) {
	l.t.Helper()
	l.t.Fatal(strings.NewReplacer(l.names...).Replace(fmt.Sprintf("%s\n%s\nplay this run again: go test -run TestModel -model.seed=%d -model.steps=1",
		strings.Join(l.trace, "\n"), fmt.Sprintf(format, args...), l.seed)))
}

// compare fails unless the ledger, the history and the gateway are as the model says.
func (l *modelRun) compare() {
	l.t.Helper()
	want := l.model.lines()
	var orders, paintings []string
	for _, o := range l.model.orders {
		orders = append(orders, o.id)
	}
	for _, p := range l.model.paintings {
		paintings = append(paintings, p.id)
	}
	rows, _ := l.store.pool.Query(context.Background(), `
		SELECT format('order %s %s %s cancelling=%s held until %s, returning %s, cancelled %s: %s', id, status, ended, (cancelling_since IS NOT NULL)::text,
			extract(epoch FROM held_until)::bigint, array_to_string(returning_ids, '+'), array_to_string(cancelled_ids, '+'), (SELECT string_agg(why, ', ' ORDER BY h.id) FROM history h WHERE h.order_id = o.id))
			FROM orders o WHERE id = ANY($1)
		UNION ALL SELECT format('part of %s: %s for %s, %s', order_id, array_to_string(product_ids, '+'), amount, state) FROM part_refunds WHERE order_id = ANY($1)
		UNION ALL SELECT format('painting %s for %s, on sale=%s, is with order %s', id, price, for_sale::text, order_id) FROM products WHERE id = ANY($2)
		UNION ALL SELECT format('payment %s of order %s %s %s, %s back, %s by hand, account=%s, %s refusals', imp_uid, order_id, state, reason, refunded,
			by_hand_amount, (refund_account IS NOT NULL)::text, refusals) FROM payments WHERE order_id = ANY($1)`, orders, paintings)
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	check(l.t, err)
	for _, p := range l.model.payments {
		got = append(got, fmt.Sprintf("the gateway gave back %d of %s", l.back(p.impUID), p.impUID))
	}
	l.wantSame(got, want)
	l.compareOpen()
}

// lines are what the service must have of the shop.
func (m *model) lines() (lines []string) {
	for _, o := range m.orders {
		lines = append(lines, fmt.Sprintf("order %s %d %s cancelling=%v held until %d, returning %s, cancelled %s: %s", o.id, o.status, o.ended, o.cancelling,
			o.until.Unix(), joinIDs(o.returning), joinIDs(o.cancelled), strings.Join(o.history, ", ")))
		for _, part := range o.parts {
			lines = append(lines, fmt.Sprintf("part of %s: %s for %d, %s", o.id, joinIDs(part.paintings), part.amount, part.state))
		}
	}
	for _, p := range m.paintings {
		owner := ""
		if p.owner != nil {
			owner = p.owner.id
		}
		lines = append(lines, fmt.Sprintf("painting %s for %d, on sale=%v, is with order %s", p.id, p.price, p.forSale, owner))
	}
	for _, p := range m.payments {
		if p.state != "" {
			lines = append(lines, fmt.Sprintf("payment %s of order %s %s %s, %d back, %d by hand, account=%v, %d refusals",
				p.impUID, p.ledger.id, p.state, p.reason, p.booked, p.byHand, p.account, p.refusals))
		}
		lines = append(lines, fmt.Sprintf("the gateway gave back %d of %s", p.back, p.impUID))
	}
	return lines
}

// compareOpen fails unless the service counts as many holds and refunds that are not done as the model.
func (l *modelRun) compareOpen() {
	l.t.Helper()
	var want openBalances
	for _, o := range l.model.orders {
		if o.unpaid() {
			want.holds++
		}
		if o.part() != nil {
			want.refunds++
		}
	}
	for _, p := range l.model.payments {
		switch {
		case p.stuck():
			want.refundsStuck++
		case p.state == "refunding":
			want.refunds++
		}
	}
	got, err := l.store.readOpenBalances(context.Background(), l.model.now, []gatewayList{"paid", "cancelled"})
	check(l.t, err)
	if got.holds != want.holds || got.refunds != want.refunds || got.refundsStuck != want.refundsStuck {
		l.fail("the service has %d holds, %d refunds and %d stuck ones, the model %d, %d and %d",
			got.holds, got.refunds, got.refundsStuck, want.holds, want.refunds, want.refundsStuck)
	}
}

// end is what the run has come to, in words that are the same for every run.
func (l *modelRun) end() (lines []string) {
	names := strings.NewReplacer(l.names...)
	for _, line := range l.model.lines() {
		lines = append(lines, names.Replace(line))
	}
	return lines
}

// wantSame fails unless the service has the same lines as the model, in any order.
func (l *modelRun) wantSame(got, want []string) {
	l.t.Helper()
	slices.Sort(got)
	slices.Sort(want)
	if slices.Equal(got, want) {
		return
	}
	only := func(a, b []string) string {
		return strings.Join(slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) }), "\n")
	}
	l.fail("the service has\n%s\nthe model has\n%s", only(got, want), only(want, got))
}

// playCreate asks for an order: a new one, or under a number used before, perhaps with the very same body.
func (l *modelRun) playCreate() {
	o := &modelOrder{status: -1, buyer: pick(l, l.buyers), number: newNumber(), address: "101호"}
	for _, i := range l.random.Perm(len(l.model.paintings))[:1+l.random.IntN(3)] {
		p := l.model.paintings[i]
		o.paintings, o.prices = append(o.paintings, p), append(o.prices, p.price)
	}
	if l.random.IntN(20) == 0 {
		o.prices[0] = pick(l, prices)
	}
	if again := lately(l, l.model.orders); again != nil && l.random.IntN(3) == 0 {
		o.buyer, o.number = again.buyer, again.number
		if l.random.IntN(3) > 0 {
			o.paintings, o.prices = again.paintings, again.prices
		}
		if l.random.IntN(4) == 0 {
			o.address = "102호"
		}
	}
	a := l.call(o.buyer, "POST", "/api/orders", o.body())
	var made orderCreated
	json.Unmarshal([]byte(a.body), &made)
	o.id = made.OrderID
	if l.model.live(o.buyer, func(x *modelOrder) bool { return x.id == o.id }) == nil && o.id != "" {
		l.names = append(l.names, o.id, fmt.Sprintf("order%d", len(l.model.orders)+1))
	}
	want, is := l.model.create(o)
	l.want(a, want, "%s orders %v for %v to %s under %s: %s", o.buyer, o.paintingIDs(), o.prices, o.address, o.number, o.id)
	if is != nil && is.id != o.id {
		l.fail("the model answers order %s", is.id)
	}
	if want == paintingsTaken {
		l.compareTaken(a, o)
	}
}

// compareTaken fails unless the refusal of order o says which paintings are taken and how.
func (l *modelRun) compareTaken(a answer, o *modelOrder) {
	l.t.Helper()
	type product struct {
		ID     string `json:"_id"`
		Reason string
		Until  string
	}
	var want []product
	for _, p := range o.paintings {
		until := l.model.leftToOthers(o.buyer, p)
		switch {
		case p.takenFor(o.buyer) && (!p.forSale || !p.owner.unpaid()):
			want = append(want, product{p.id, "sold", ""})
		case p.takenFor(o.buyer):
			want = append(want, product{p.id, "held", p.owner.until.Format(timeFormat)})
		case !until.IsZero():
			want = append(want, product{p.id, "held", until.Format(timeFormat)})
		}
	}
	var got struct{ Products []product }
	check(l.t, json.Unmarshal([]byte(a.body), &got))
	if !slices.Equal(got.Products, want) {
		l.fail("answered %v, the model %v", got.Products, want)
	}
}

// playShow compares one of the calls that show something.
func (l *modelRun) playShow() {
	buyer := pick(l, l.buyers)
	newest := func(fits func(*modelOrder) bool, most int) (ids []string) {
		for _, o := range slices.Backward(l.model.orders) {
			if fits(o) && len(ids) < most {
				ids = append(ids, o.id)
			}
		}
		return ids
	}
	own := func(o *modelOrder) bool { return o.buyer == buyer && o.ended == "" }
	var want, got any
	switch l.random.IntN(7) {
	case 0:
		o := lately(l, l.model.orders)
		user := l.user(o)
		status := 404
		if user == "" {
			status = 401
		} else if o.seenBy(user) {
			status = 200
		}
		a := l.call(user, "GET", "/api/orders/"+o.orderID(), nil)
		l.say("%s looks at order %s → %d", user, o.orderID(), a.status)
		var detail struct {
			Result     struct{ Status int }
			OrderItems []struct{ State string }
			Refunded   int64 `json:"refundedPrice"`
		}
		check(l.t, json.Unmarshal([]byte(a.body), &detail))
		if want, got = status, a.status; status == 200 {
			var states []struct{ State string }
			refunded := o.total()
			for _, p := range o.paintings {
				states = append(states, struct{ State string }{o.stateOf(p)})
			}
			if o.status < 5 {
				refunded = o.price(o.cancelled)
			}
			want, got = fmt.Sprint(o.status, states, refunded), fmt.Sprint(detail.Result.Status, detail.OrderItems, detail.Refunded)
		}
	case 1:
		l.say("%s looks at their newest order", buyer)
		var latest struct {
			ID string `json:"_id"`
		}
		check(l.t, json.Unmarshal([]byte(l.call(buyer, "GET", "/api/orders/latest", nil).body), &latest))
		want, got = strings.Join(newest(own, 1), ""), latest.ID
	case 2:
		l.say("%s lists their orders", buyer)
		list := l.list(buyer, "/api/orders/mine")
		count := map[int]int{}
		for _, o := range l.model.orders {
			if own(o) {
				count[o.status]++
			}
		}
		want = fmt.Sprint(newest(own, 3), count[0], count[1], count[2], count[3])
		got = fmt.Sprint(list.ids(), list.Status["paid"], list.Status["ready"], list.Status["coming"], list.Status["done"])
	case 3:
		l.say("the administrator lists the orders")
		ids, list := newest(func(o *modelOrder) bool { return o.status >= 0 }, 10), l.list(adminID, "/api/orders").ids()
		want, got = fmt.Sprint(ids), fmt.Sprint(list[:min(len(ids), len(list))]) // those of earlier runs follow
	case 4:
		l.say("the administrator lists the orders whose refund is stuck")
		want = fmt.Sprint(newest(func(o *modelOrder) bool {
			return slices.ContainsFunc(l.model.payments, func(p *modelPayment) bool { return p.ledger == o && p.stuck() })
		}, 10))
		got = fmt.Sprint(l.list(adminID, "/api/orders?refund=stuck").ids())
	default:
		l.say("%s looks at the paintings", buyer)
		stock, query, total := map[string]bool{}, "", int64(shippingPrice)
		for _, p := range l.model.paintings {
			stock[p.id] = !p.takenFor(buyer)
			query += "&productId=" + p.id
			total += p.price
		}
		var items []cartItem
		check(l.t, json.Unmarshal([]byte(l.call(buyer, "GET", "/api/products/cart-items?"+query, nil).body), &items))
		shown := map[string]bool{}
		for _, item := range items {
			shown[item.ID] = item.InStock
		}
		var price totalPriceAnswer
		check(l.t, json.Unmarshal([]byte(l.call(buyer, "GET", "/api/products/total-price?"+query, nil).body), &price))
		want, got = fmt.Sprint(stock, total), fmt.Sprint(shown, price.TotalPrice)
	}
	if want != got {
		l.fail("the service shows %v, the model %v", got, want)
	}
}

// playCharge has a payment window end in one of the ways there are. Mostly the service is not told yet.
func (l *modelRun) playCharge() {
	if p := l.latePayment(func(p *modelPayment) bool { return p.status == "ready" && !p.vbank && l.mayPay(p) }); p != nil && l.random.IntN(4) == 0 {
		p.pay(l.model.now)
		l.fake.set(p.impUID, func(p *fakePayment) { p.Status, p.PaidAt = "paid", l.model.now })
		l.say("%s is paid after all", p.impUID)
		return
	}
	p := &modelPayment{order: lately(l, l.model.orders), status: "paid", changed: l.model.now}
	if ended := l.lateOrder(func(o *modelOrder) bool { return o.ended != "" }); ended != nil && l.random.IntN(4) == 0 {
		p.order = ended
	}
	merchant, kind := pick(l, otherShops), l.random.IntN(24)
	if l.single && (p.order == nil || !l.mayPay(p)) {
		return
	} else if kind < 2 && !l.single {
		p.order = nil
	}
	if p.order != nil {
		merchant, p.amount = p.order.id, p.order.total()
	}
	currency, method := "KRW", ""
	switch {
	case p.order == nil:
		p.amount = 5000
	case kind < 5:
		p.amount += 1 - 2*l.random.Int64N(2)
	case kind == 5:
		currency, p.foreign, p.amount = "USD", true, 80
	case kind == 6:
		p.sandbox = true
	case kind == 7:
		p.status = "failed"
	case kind == 8:
		p.status = "ready"
	case kind == 9:
		p.amount = 0 // a card that was registered
	}
	if p.order == nil && l.random.IntN(2) == 0 || kind > 9 && kind < 14 {
		p.status, p.vbank, method = "ready", true, payMethodVirtualAccount
		p.until = l.model.now.AddDate(0, 0, 7)
	}
	if p.token = l.via == viaApproval && p.status == "paid"; p.token {
		p.status = "ready"
	}
	p.paid = p.status == "paid"
	status := p.status
	if p.token {
		status = ""
	}
	p.impUID = l.via.window(l.fake, merchant, fakePayment{Amount: p.amount, Currency: currency, Sandbox: p.sandbox, Status: status, PayMethod: method})
	l.model.payments = append(l.model.payments, p)
	l.names = append(l.names, p.impUID, fmt.Sprintf("payment%d", len(l.model.payments)))
	l.say("%s: %d %s for order %s, %s %s, sandbox=%v", p.impUID, p.amount, currency, merchant, p.status, method, p.sandbox)
	if l.random.IntN(3) == 0 {
		l.playReportOf(p)
	}
}

// mayPay reports whether the gateway lets a payment be paid now.
func (l *modelRun) mayPay(p *modelPayment) bool {
	return !p.token && (!l.single || !slices.ContainsFunc(l.model.payments, func(x *modelPayment) bool { return x.order == p.order && x.paid }))
}

// otherShops are merchant_uids of other shops that use the gateway's account; one of them looks like ours.
var otherShops = []string{"another-shops-order", "61a7adc903b7708e5dbba694"}

// playReport is a browser that reports a payment, again or for the first time.
func (l *modelRun) playReport() { l.playReportOf(lately(l, l.model.payments)) }

func (l *modelRun) playReportOf(p *modelPayment) {
	report := l.model.report
	if p = l.shown(p); p != nil && p.token {
		report = l.model.approve
		if l.model.trouble.lookUp { // else the order would be reserved for longer: TestManualApprovalThroughTrouble
			l.model.trouble = noTrouble
			l.fake.setFaults(nil)
		}
	}
	l.playSeen(p, "the browser reports", report, func(impUID string) answer {
		there, ok := l.fake.get(impUID)
		if !ok {
			there = fakePayment{ImpUID: impUID}
		}
		return l.call("", "PATCH", "/api/orders/pay", reportOf(there))
	})
}

// playNotice is the gateway's notice of a payment: late, repeated, in any order.
func (l *modelRun) playNotice() {
	notice := l.notice
	if l.via != viaV1 {
		notice = l.noticeV2
	}
	l.playSeen(l.shown(lately(l, l.model.payments)), "the gateway gives notice of", l.model.noticed, notice)
}

// shown is the payment that the gateway shows for p's order, if it is asked for that.
func (l *modelRun) shown(p *modelPayment) *modelPayment {
	if p == nil || !l.single {
		return p
	}
	return l.model.shown(p.order)
}

func (l *modelRun) playSeen(p *modelPayment, what string, model func(*modelPayment) reply, service func(string) answer) {
	impUID := "imp_unknown"
	if p != nil {
		impUID = p.impUID
	} else if l.via != viaV1 {
		return
	}
	want := model(p)
	if l.via != viaV1 {
		want.message = strings.Replace(want.message, "imp_uid:", "paymentId:", 1)
	}
	l.want(service(impUID), want, what+" %s", impUID)
}

func (l *modelRun) playDelete() {
	o := lately(l, l.model.orders)
	user := l.user(o)
	var wanted *int
	var body any
	if n := l.random.IntN(8); n < 6 {
		n = []int{4, 5, 5, 4, 4, 3}[n]
		wanted, body = &n, map[string]int{"status": n}
	}
	want := l.model.delete(user, o, wanted, nil)
	l.want(l.call(user, "DELETE", "/api/orders/"+o.orderID(), body), want, "%s deletes order %s with %v", user, o.orderID(), body)
}

// playPart cancels or returns some paintings of an order, or takes their return back.
func (l *modelRun) playPart() {
	o := l.lateOrder(func(o *modelOrder) bool { return len(o.paintings) > 1 && o.status >= 0 && o.status < 5 })
	if o == nil || l.random.IntN(8) == 0 {
		o = lately(l, l.model.orders)
	}
	if o == nil || slices.ContainsFunc(l.model.payments, func(p *modelPayment) bool { return p.ledger == o && p.fickle }) {
		return // nobody knows what a gateway lists that has changed its mind
	}
	user, paintings := l.user(o), []*modelPainting(nil)
	for _, i := range l.random.Perm(len(o.paintings))[:1+l.random.IntN(len(o.paintings))] {
		paintings = append(paintings, o.paintings[i])
	}
	if p := o.part(); p != nil && l.random.IntN(2) == 0 {
		paintings = p.paintings
	}
	if l.random.IntN(20) == 0 {
		paintings = append(paintings, pick(l, l.model.paintings))
	}
	for i, p := range paintings {
		if slices.Index(paintings, p) < i {
			return
		}
	}
	n := pick(l, []int{4, 4, 4, 5, 5, 5, 3})
	method, wanted, body := "DELETE", &n, map[string]any{"status": n, "products": strings.Split(joinIDs(paintings), "+")}
	if l.random.IntN(8) == 0 {
		wanted = nil
		delete(body, "status")
	}
	want := reply{}
	if l.random.IntN(4) == 0 && len(o.returning) > 0 || l.random.IntN(12) == 0 {
		if n = o.status; l.random.IntN(8) == 0 {
			n = l.random.IntN(5)
		}
		method, body["status"] = "PATCH", n
		want = l.model.withdraw(user, o, n, paintings)
	} else {
		want = l.model.delete(user, o, wanted, paintings)
	}
	l.want(l.call(user, method, "/api/orders/"+o.id, body), want, "%s sends %s of order %s with %v", user, method, o.id, body)
}

// joinIDs are the ids of paintings in one text.
func joinIDs(paintings []*modelPainting) string {
	var ids []string
	for _, p := range paintings {
		ids = append(ids, p.id)
	}
	return strings.Join(ids, "+")
}

// playStep moves an order on, back, or to any status.
func (l *modelRun) playStep() {
	o := lately(l, l.model.orders)
	if paid := l.lateOrder(func(o *modelOrder) bool { return o.status >= 0 && o.status < 5 }); paid != nil && l.random.IntN(3) > 0 {
		o = paid
	}
	user, to := l.user(o), l.random.IntN(5)
	if o != nil {
		switch n := l.random.IntN(10); {
		case n < 6 && o.status == 4:
			to = o.cameFrom
		case n < 6:
			user, to = adminID, o.status+1
		case n < 8:
			user, to = adminID, o.status-1
		}
	}
	want := l.model.advance(user, o, to)
	l.want(l.call(user, "PATCH", "/api/orders/"+o.orderID(), map[string]int{"status": to}), want, "%s moves order %s to %d", user, o.orderID(), to)
}

// playConsole is a refund in the gateway's console. Its notice may come later, or never.
func (l *modelRun) playConsole() {
	p := l.latePayment(func(p *modelPayment) bool { return p.refundable() && !p.refused })
	if p == nil {
		return
	}
	back := p.amount - p.back
	if l.random.IntN(2) == 0 {
		back = 1 + l.random.Int64N(back)
	}
	p.giveBack(back, l.model.now)
	check(l.t, l.fake.refundInConsole(p.impUID, back))
	l.say("the console gives back %d of %s", back, p.impUID)
}

// playChargeback is a card company that takes back all of a payment.
func (l *modelRun) playChargeback() {
	p := l.latePayment((*modelPayment).refundable)
	if p == nil {
		return
	}
	p.giveBack(p.amount-p.back, l.model.now)
	check(l.t, l.fake.chargeback(p.impUID))
	l.say("the card company takes back %s", p.impUID)
}

// playAccount is a deposit into a virtual account, or the account's end.
func (l *modelRun) playAccount() {
	p := l.latePayment(func(p *modelPayment) bool { return p.awaitsDeposit() && l.mayPay(p) })
	switch {
	case p == nil:
	case l.random.IntN(3) == 0:
		l.say("the account of %s ends", p.impUID)
		p.status, p.changed = "cancelled", l.model.now
		check(l.t, l.fake.act(p.impUID, true, l.fake.endAccount))
	case !l.model.now.After(p.until):
		l.say("a deposit for %s", p.impUID)
		p.pay(l.model.now)
		check(l.t, l.fake.deposit(p.impUID))
	}
}

// playCardCompany has a card company refuse to refund a payment from now on, or no longer.
func (l *modelRun) playCardCompany() {
	p := lately(l, l.model.payments)
	if p == nil || l.single && p.refused { // V2 goes on to answer for hours what it has answered before
		return
	}
	p.refused = !p.refused
	l.say("the card company refuses refunds of %s: %v", p.impUID, p.refused)
	l.atGateway(p.impUID, func(there *fakePayment) {
		if there.RefundsRefused = ""; p.refused {
			there.RefundsRefused = "한도 초과"
		}
	})
}

// playChangeOfMind has the gateway say something else of a payment than before. No list shows when that was.
func (l *modelRun) playChangeOfMind() {
	p := l.latePayment(func(p *modelPayment) bool {
		return !l.single && p.order != nil && !p.sandbox && !p.fickle && p.moved() && !p.unreadable() && (p.ledger == nil || p.ledger.part() == nil)
	})
	if p == nil {
		return
	}
	switch n := l.random.IntN(6); {
	case n == 0 || n == 1:
		merchant := pick(l, otherShops)
		other := lately(l, l.model.orders)
		if n == 1 || other == p.order {
			other = nil
		}
		if p.order = other; other != nil {
			merchant = other.id
		}
		l.atGateway(p.impUID, func(there *fakePayment) { there.MerchantUID = merchant })
		l.say("%s is of order %s now", p.impUID, merchant)
	case n == 2:
		p.status = pick(l, []string{"failed", "pending", "cancelled", "paid"})
	case n == 3:
		p.garbled = true
		l.atGateway(p.impUID, func(there *fakePayment) { there.Amount = -1 })
	default:
		p.back = l.random.Int64N(p.amount + 1)
	}
	p.fickle = true
	l.atGateway(p.impUID, func(there *fakePayment) { there.Status, there.Cancelled = p.status, p.back })
	l.say("%s is %s now, with %d back, garbled=%v", p.impUID, p.status, p.back, p.garbled)
	if l.random.IntN(2) == 0 {
		l.playReportOf(p)
	}
}

// playCatalogue imports a painting at another price, or as sold elsewhere, or as back.
func (l *modelRun) playCatalogue() {
	p := pick(l, l.model.paintings)
	p.price = pick(l, prices)
	forSale := l.random.IntN(4) > 0
	if p.owner == nil {
		p.forSale = forSale
	}
	l.catalogue(p.price, forSale, p.id)
	l.say("%s is imported for %d, for sale=%v", p.id, p.price, forSale)
}

// playSale takes a painting off sale or puts it on sale.
func (l *modelRun) playSale() {
	p, user, forSale := pick(l, l.model.paintings), l.administrator(), l.random.IntN(2) == 0
	want := l.model.changeSale(user, p, forSale)
	l.want(l.call(user, "PATCH", "/api/products/"+p.id, map[string]bool{"forSale": forSale}), want, "%s has %s for sale: %v", user, p.id, forSale)
}

// playRefund helps a refund, mostly one that is due.
func (l *modelRun) playRefund() {
	p := l.latePayment(func(p *modelPayment) bool { return p.state == "refunding" })
	if p == nil || l.random.IntN(5) == 0 {
		p = lately(l, l.model.payments)
	}
	o := lately(l, l.model.orders)
	if p != nil && p.ledger != nil && l.random.IntN(10) > 0 {
		o = p.ledger
	}
	l.helpRefund(l.administrator(), o, p, l.random.IntN(2) == 0)
}

// helpRefund has user help the refund of payment p of order o: to an account, or as paid back by hand.
func (l *modelRun) helpRefund(user string, o *modelOrder, p *modelPayment, toAccount bool) {
	l.t.Helper()
	impUID := "imp_unknown"
	if p != nil {
		impUID = p.impUID
	}
	body := map[string]any{"imp_uid": impUID, "byHand": "계좌 이체"}
	if toAccount {
		body = map[string]any{"imp_uid": impUID, "account": map[string]string{"holder": "홍길동", "bank": "04", "number": "000-000-000000"}}
	}
	want := l.model.helpRefund(user, o, p, toAccount)
	l.want(l.call(user, "POST", "/api/orders/"+o.orderID()+"/refund", body), want, "%s helps the refund of %s of order %s, account=%v",
		user, impUID, o.orderID(), toAccount)
}

// playWait lets time pass in which no replica's reconciler gets anywhere.
func (l *modelRun) playWait() {
	l.tick(l.some(time.Minute, 10*time.Minute, 29*time.Minute, 31*time.Minute, 65*time.Minute))
	l.say("time passes")
}

func (l *modelRun) playReconcile() {
	l.tick(l.some(time.Second, time.Minute, 10*time.Minute, 31*time.Minute, 2*time.Hour))
	l.round()
}

// some picks a time, and seldom one of days.
func (l *modelRun) some(often ...time.Duration) time.Duration {
	const day = 24 * time.Hour
	if l.random.IntN(8) == 0 {
		return pick(l, []time.Duration{day - time.Minute, day, 25 * time.Hour, 3 * day, 8 * day, 30 * day, 100 * day})
	}
	return pick(l, often)
}

// round is the reconciler's, one refund, payment and order after the other: which one is due the service says, what becomes
// of it the model.
func (l *modelRun) round() {
	l.t.Helper()
	l.say("the reconciler's round")
	l.retryRefunds()
	l.retryParts()
	l.readLists()
	l.checkOrders()
}

func (l *modelRun) retryRefunds() {
	l.t.Helper()
	for {
		rows, err := l.store.claimDueRefunds(context.Background(), 1, l.model.now)
		check(l.t, err)
		if len(rows) == 0 {
			return
		}
		p := l.model.payment(rows[0].impUID)
		if p == nil || p.state != "refunding" {
			l.fail("a refund of %s", rows[0].impUID)
		}
		l.say("  refunds %s again", p.impUID)
		err = l.settler.attemptRefund(context.Background(), byReconciler, rows[0])
		if status := l.model.refundAgain(p); (status == 200) != (err == nil) {
			l.fail("%v, by the model %d", err, status)
		}
		l.compare()
	}
}

func (l *modelRun) retryParts() {
	l.t.Helper()
	for {
		due, err := l.store.claimDueParts(context.Background(), 1, l.model.now)
		check(l.t, err)
		if len(due) == 0 {
			return
		}
		p := l.model.payment(due[0].payment.impUID)
		if p == nil || p.ledger.part() == nil {
			l.fail("a part refund of %s", due[0].payment.impUID)
		}
		l.say("  refunds a part of %s again", p.impUID)
		err = l.settler.attemptPart(context.Background(), byReconciler, due[0])
		if status := l.model.refundPartAgain(p); (status == 200) != (err == nil) || (status == 409) != errors.Is(err, errPartRefused) {
			l.fail("%v, by the model %d", err, status)
		}
		l.compare()
	}
}

// readLists has the gateway's lists read. They must show all that moved, however long ago and late.
func (l *modelRun) readLists() {
	l.t.Helper()
	for _, status := range []gatewayStatus{gatewayPaid, gatewayCancelled} {
		var found []string
		previous := ""
		l.settler.onTestHook = func(point, id string) {
			if point == "looked up" && previous != "cancelled "+id { // after its cancel it is the refund that looks
				found = append(found, id)
			}
			previous = point + " " + id
		}
		err := l.settler.readList(context.Background(), l.settler.gateways[0], status)
		l.settler.onTestHook = nil
		check(l.t, err)
		for _, impUID := range found {
			p := l.model.payment(impUID)
			if p == nil || l.model.trouble.lookUp {
				l.fail("the list of %s payments shows %s", status, impUID)
			}
			l.say("  reads of %s, %s", p.impUID, status)
			l.model.settle(p)
		}
		l.compare()
	}
	if l.model.trouble.lookUp {
		return
	}
	for _, p := range l.model.payments {
		if !p.fickle && !p.known() && !l.model.now.Before(p.changed.Add(maxListDelay)) {
			l.fail("the lists have not shown %s", p.impUID)
		}
	}
}

func (l *modelRun) checkOrders() {
	l.t.Helper()
	for {
		due, err := l.store.claimDueChecks(context.Background(), 1, l.model.now)
		check(l.t, err)
		if len(due) == 0 {
			break
		}
		i := slices.IndexFunc(l.model.orders, func(o *modelOrder) bool { return o.id == due[0].id })
		l.say("  asks about order %s", due[0].id)
		_, err = l.settler.checkOrder(context.Background(), due[0])
		check(l.t, err)
		l.model.reconcile(l.model.orders[i])
		l.compare()
	}
	for _, o := range l.model.orders {
		if o.unpaid() && !l.model.now.Before(o.until) && !l.model.now.Before(o.silent.Add(refundLease)) {
			l.fail("order %s is unpaid and its hold is over", o.id)
		}
	}
}

// settleDown ends a run: the gateway answers, the reconciler has all the time it needs, and an administrator helps the refunds
// that need one. Then every won that the gateway has for an order pays for it, the rest is back, and the audit finds what is
// left to a person and nothing else.
func (l *modelRun) settleDown() {
	l.t.Helper()
	l.model.trouble = noTrouble
	l.fake.setFaults(nil)
	for _, p := range l.model.payments {
		l.makeReadable(p)
	}
	for range 3 {
		l.tick(25 * time.Hour)
		l.round()
	}
	l.say("the audit") // has the reconciler ask about what no list shows
	l.auditSince(l.begun)
	for range 2 { // an order that a check has changed is asked about once more
		l.tick(refundLease)
		l.round()
	}
	for _, p := range l.model.payments {
		if p.state != "refunding" {
			continue
		}
		if !p.refused && !p.vbank && p.order == p.ledger {
			l.fail("the refund of %s is not done", p.impUID)
		}
		toAccount := p.vbank && !p.refused && p.order == p.ledger
		l.helpRefund(adminID, p.ledger, p, toAccount)
		if l.compare(); p.state != "refunded" {
			l.fail("the refund of %s is not done", p.impUID)
		}
	}
	l.wantSettled()
}

// makeReadable ends what made a payment unreadable.
func (l *modelRun) makeReadable(p *modelPayment) {
	if !p.unreadable() {
		return
	}
	p.garbled = false
	if p.unreadable() {
		p.status = "paid"
	}
	l.atGateway(p.impUID, func(there *fakePayment) { there.Amount, there.Status = p.amount, p.status })
	l.say("%s can be read again, and is %s", p.impUID, p.status)
}

// wantSettled fails unless every won is where it belongs and the audit says so.
func (l *modelRun) wantSettled() {
	l.t.Helper()
	for _, o := range l.model.orders {
		if o.unpaid() || o.cancelling {
			l.fail("order %s is not settled", o.id)
		}
	}
	var want []string
	odd := false
	for _, p := range l.model.payments {
		found := p.mismatches()
		want = append(want, found...)
		odd = odd || len(found) > 0 || p.fickle || p.handed
		switch {
		case p.token && slices.Contains([]string{reasonAmount, reasonSold, reasonDuplicate, reasonCancelled}, p.reason):
			l.fail("payment %s was charged under manual approval, and went back", p.impUID)
		case p.fickle || p.order == nil || p.sandbox || !p.moved():
		case p.state == "kept" && p.booked == p.back && p.ledger.status >= 0 && p.ledger.status <= 4:
		case p.state == "refunded" && (p.back == p.amount || p.handed):
		default:
			l.fail("payment %s is %s, %d of %d back", p.impUID, p.state, p.back, p.amount)
		}
	}
	report := l.auditSince(l.begun)
	var got []string
	for _, m := range report.Mismatches {
		got = append(got, fmt.Sprintf("%s%s of order %s: %s", m.ImpUID, m.Painting, m.Order, m.Kind))
	}
	l.wantSame(got, want)
	if !odd && report.Ledger != report.Gateway {
		l.fail("the ledger has %+v, the gateway %+v", report.Ledger, report.Gateway)
	}
	if n := queryText(l.t, l.config.databaseURL, `SELECT count(*) FROM orders WHERE next_look_at IS NOT NULL`); n != "0" {
		l.fail("%s orders are still to be asked about", n)
	}
}

// model is the contract of the API, about a shop in memory: who has which painting, where each order stands, what became of
// its money, and what each call is answered. It knows nothing of how the service does it.
type model struct {
	now       time.Time
	paintings []*modelPainting
	orders    []*modelOrder   // the oldest first
	payments  []*modelPayment // in the order in which their windows were opened
	trouble   trouble
	via       payVia
}

type modelPainting struct {
	id      string
	price   int64 // today's
	forSale bool
	owner   *modelOrder // nil: no order has it
}

type modelOrder struct {
	id, buyer, number, address string
	paintings                  []*modelPainting
	prices                     []int64 // of paintings, as they were ordered
	status                     int
	cameFrom                   int    // where its return was asked for
	ended                      string // deleted, replaced, expired, withdrawn
	endedAt                    time.Time
	cancelling                 bool
	until                      time.Time        // when its hold ends
	since                      time.Time        // when the first of the holds began that it took paintings over from; its own beginning if none
	tookOver                   bool             // a painting from the buyer's unpaid order
	silent                     time.Time        // when the gateway last gave the reconciler no usable answer about it
	returning, cancelled       []*modelPainting // while others are left
	parts                      []*modelPart
	history                    []string
}

// modelPart is a refund of some paintings of an order.
type modelPart struct {
	paintings []*modelPainting
	amount    int64
	state     string // booked, done, undone
	there     bool   // the gateway has made it
}

type modelPayment struct {
	impUID string

	// At the gateway.
	order            *modelOrder // nil: of another shop
	status           string      // paid, ready, failed, pending, cancelled
	foreign, sandbox bool
	paid             bool // it has been, whatever the status says now
	amount, back     int64
	token            bool      // it is paid by our confirmation
	vbank            bool      // a virtual account
	until            time.Time // the last moment for a deposit into it
	refused          bool      // the card company refuses to give it back
	fickle           bool      // the gateway has changed its mind about it
	garbled          bool      // its amount is none
	changed          time.Time // when money last moved
	elsewhere        time.Time // when the service looked it up and it was another shop's

	// In the ledger.
	state, reason string      // empty: unknown there
	ledger        *modelOrder // the order that it is booked for
	booked        int64       // won that are back, what was paid by hand included; of a foreign one 0
	handed        bool        // the rest was paid back by hand
	byHand        int64       // won of that
	account       bool        // an account for its refund is known
	refusals      int
}

// trouble is how the gateway fails for the length of a move.
type trouble struct {
	name    string
	lookUp  bool  // look-ups answer 500
	cancel  fault // of every cancel
	status  int   // what our answer is when a cancel has failed so; 502: it is a refusal
	after   bool  // look-ups after a cancel answer 500
	account bool  // the end of a virtual account answers 500
	deposit bool  // a deposit comes just before a virtual account would end
}

var noTrouble = trouble{}

var troubles = []trouble{
	{name: "look-ups fail", lookUp: true},
	{name: "cancels fail", cancel: fault{before: answer500}, status: 503},
	{name: "cancels are dropped, and all is silent then", cancel: fault{before: dropConnection}, status: 503, after: true},
	{name: "cancels are refused", cancel: fault{before: answerRefusal(-1, "거절")}, status: 502},
	{name: "cancels are done and their answers lost", cancel: fault{after: dropConnection}, status: 503},
	{name: "cancels are done, and all is silent then", cancel: fault{after: answer500}, status: 503, after: true},
	{name: "accounts cannot be ended", account: true},
	{name: "a deposit comes before an account ends", deposit: true},
}

// reply is a status and the message with it.
type reply struct {
	status  int
	message string
}

var (
	noProblem      = reply{}
	gatewaySilent  = reply{503, "결제 서비스가 응답하지 않습니다. 잠시 후 다시 시도해 주세요"}
	gatewayBroken  = reply{502, gatewaySilent.message}
	nobodyAsks     = reply{401, "로그인이 필요합니다"}
	adminsOnly     = reply{403, "관리자만 사용할 수 있습니다"}
	noSuchOrder    = reply{404, "해당 주문내역이 존재하지 않습니다"}
	noSuchPayment  = reply{404, "imp_uid: 해당 결제 내역이 존재하지 않습니다"}
	orderMade      = reply{201, "주문서 생성 성공"}
	orderDeleted   = reply{200, "결제 오류로 임시 주문서를 삭제했습니다"}
	paintingsTaken = reply{409, "이미 판매되었거나 다른 구매자가 결제 중인 작품이 있습니다"}
)

const (
	shippingPrice = 10000
	orderHold     = 30 * time.Minute
	revivalTime   = 24 * time.Hour // in which late money may still pay for an order that ended
	stuckRefusals = 3
)

func (o *modelOrder) total() int64 {
	total := int64(shippingPrice)
	for _, price := range o.prices {
		total += price
	}
	return total
}

// body is the request for the order.
func (o *modelOrder) body() map[string]any {
	body := orderBody(o.number, o.paintingIDs()...)
	for i, item := range body["orderItems"].([]any) {
		item.(map[string]any)["price"] = o.prices[i]
	}
	body["deliveryInfo"].(map[string]any)["detailedAddress"] = o.address
	body["totalPrice"] = o.total()
	return body
}

// asks returns what the order's request says, in whatever order it names the paintings.
func (o *modelOrder) asks() []string {
	asks := []string{o.number, o.address}
	for i, p := range o.paintings {
		asks = append(asks, fmt.Sprint(p.id, " ", o.prices[i]))
	}
	slices.Sort(asks)
	return asks
}

func (o *modelOrder) unpaid() bool { return o.status == -1 && o.ended == "" }

func (o *modelOrder) has(p *modelPainting) bool { return slices.Contains(o.paintings, p) }

func (o *modelOrder) note(why string) { o.history = append(o.history, why) }

// seenBy reports whether the order exists for user: its buyer and the administrator.
func (o *modelOrder) seenBy(user string) bool {
	return o != nil && o.ended == "" && (user == o.buyer || user == adminID)
}

// end lets an unpaid order go.
func (m *model) end(o *modelOrder, why string) {
	o.ended, o.endedAt = why, m.now
	o.note(why)
	o.free()
}

func (o *modelOrder) free() {
	for _, p := range o.paintings {
		if p.owner == o {
			p.owner = nil
		}
	}
}

// part is the part refund that is under way, nil when there is none.
func (o *modelOrder) part() *modelPart {
	if i := slices.IndexFunc(o.parts, func(p *modelPart) bool { return p.state == "booked" }); i >= 0 {
		return o.parts[i]
	}
	return nil
}

// minus is paintings without others.
func minus(paintings, others []*modelPainting) []*modelPainting {
	return slices.DeleteFunc(slices.Clone(paintings), func(p *modelPainting) bool { return slices.Contains(others, p) })
}

func (o *modelOrder) left() []*modelPainting { return minus(o.paintings, o.cancelled) }

// price is what some of the order's paintings cost when they were ordered.
func (o *modelOrder) price(of []*modelPainting) (price int64) {
	for i, p := range o.paintings {
		if slices.Contains(of, p) {
			price += o.prices[i]
		}
	}
	return price
}

// stateOf is what the order says of one of its paintings.
func (o *modelOrder) stateOf(p *modelPainting) string {
	switch {
	case o.status == 5 || slices.Contains(o.cancelled, p):
		return "cancelled"
	case o.status == 4 || slices.Contains(o.returning, p):
		return "returning"
	}
	return ""
}

func (o *modelOrder) take() {
	for _, p := range o.paintings {
		p.owner = o
	}
}

// takenFor reports whether buyer cannot have the painting.
func (p *modelPainting) takenFor(buyer string) bool {
	return !p.forSale || p.owner != nil && !(p.owner.unpaid() && p.owner.buyer == buyer)
}

// leftToOthers returns until when buyer, who has held the painting again and again without paying, leaves it to others; zero if
// they need not.
func (m *model) leftToOthers(buyer string, p *modelPainting) (until time.Time) {
	if u := m.live(buyer, (*modelOrder).unpaid); u != nil && u.has(p) {
		if !m.now.Before(u.since.Add(2 * orderHold)) {
			return m.now.Add(orderHold)
		}
		return until
	}
	for _, o := range m.orders {
		end := o.endedAt.Add(orderHold)
		if o.buyer == buyer && o.has(p) && o.tookOver && o.ended != "" && o.ended != "replaced" && m.now.Before(end) && end.After(until) {
			until = end
		}
	}
	return until
}

// live is the buyer's order that fits and has not ended, nil when there is none.
func (m *model) live(buyer string, fits func(*modelOrder) bool) *modelOrder {
	for _, o := range m.orders {
		if o.buyer == buyer && o.ended == "" && fits(o) {
			return o
		}
	}
	return nil
}

// payment is the payment of an imp_uid, nil when there is none.
func (m *model) payment(impUID string) *modelPayment {
	i := slices.IndexFunc(m.payments, func(p *modelPayment) bool { return p.impUID == impUID })
	if i < 0 {
		return nil
	}
	return m.payments[i]
}

// order is the order of an id, which there is.
func (m *model) order(id string) *modelOrder {
	return m.orders[slices.IndexFunc(m.orders, func(o *modelOrder) bool { return o.id == id })]
}

// shown is the payment of an order that a paymentId shows: the one that was paid, or else the last.
func (m *model) shown(o *modelOrder) (shown *modelPayment) {
	for _, p := range m.payments {
		if p.order == o && (shown == nil || p.paid || !shown.paid) {
			shown = p
		}
	}
	return shown
}

// paidUnder reports whether the buyer has an order of that number that was ever paid.
func (m *model) paidUnder(buyer, number string) bool {
	return m.live(buyer, func(o *modelOrder) bool { return o.number == number && o.status >= 0 }) != nil
}

// create makes order o or says why not. The answer's order may be one that was made before.
func (m *model) create(o *modelOrder) (reply, *modelOrder) {
	unpaid := m.live(o.buyer, (*modelOrder).unpaid)
	switch {
	case m.paidUnder(o.buyer, o.number):
		return reply{409, "result.id: 이미 결제된 주문에 사용된 주문 번호입니다"}, nil
	case unpaid != nil && slices.Equal(unpaid.asks(), o.asks()):
		m.hold(unpaid)
		return orderMade, unpaid
	case slices.ContainsFunc(o.paintings, func(p *modelPainting) bool {
		return p.takenFor(o.buyer) || !m.leftToOthers(o.buyer, p).IsZero()
	}):
		return paintingsTaken, nil
	}
	for i, p := range o.paintings {
		if p.price != o.prices[i] {
			return reply{400, fmt.Sprintf("orderItems[%d].price: 작품 가격은 %d원입니다", i, p.price)}, nil
		}
	}
	o.since = m.now
	if unpaid != nil {
		if o.tookOver = slices.ContainsFunc(o.paintings, unpaid.has); o.tookOver {
			o.since = unpaid.since
		}
		m.end(unpaid, "replaced")
	}
	m.hold(o)
	o.note("created")
	o.take()
	m.orders = append(m.orders, o)
	return orderMade, o
}

// hold begins an order's hold, perhaps anew. However often that is done, it ends at most 2 holds after the first began.
func (m *model) hold(o *modelOrder) {
	o.until = m.now.Add(orderHold)
	if last := o.since.Add(2 * orderHold); last.Before(o.until) {
		o.until = last
	}
}

func (o *modelOrder) paintingIDs() (ids []string) {
	for _, p := range o.paintings {
		ids = append(ids, p.id)
	}
	return ids
}

// moved reports whether money ever moved with the payment.
func (p *modelPayment) moved() bool { return p.amount > 0 && (p.paid || p.back > 0) }

// unreadable reports whether what the gateway says of the payment makes no sense.
func (p *modelPayment) unreadable() bool {
	return p.garbled || p.moved() && p.status == "cancelled" && p.back == 0
}

// listed reports whether the gateway names the payment among those of its order.
func (p *modelPayment) listed() bool {
	return p.order != nil && !p.sandbox && (p.status == "paid" || p.status == "cancelled")
}

func (p *modelPayment) awaitsDeposit() bool { return p.vbank && p.status == "ready" }

// refundable reports whether something is left that the gateway can give back.
func (p *modelPayment) refundable() bool { return p.paid && p.back < p.amount && !p.garbled }

// seen is what the gateway says is back, as far as it can be booked in won.
func (p *modelPayment) seen() int64 {
	if p.foreign {
		return 0
	}
	return p.back
}

// known reports whether the ledger has all that the gateway says of a payment.
func (p *modelPayment) known() bool {
	return p.order == nil || p.sandbox || !p.moved() || !p.listed() ||
		p.state == "refunded" || p.state != "" && p.back < p.amount && p.booked == p.seen()
}

// stuck reports whether the refund needs a person.
func (p *modelPayment) stuck() bool { return p.state == "refunding" && p.refusals >= stuckRefusals }

func (p *modelPayment) cancelsOrder() bool {
	return p.reason == "buyer cancelled" || p.reason == "shop cancelled"
}

// pay is money that comes later than its window was opened.
func (p *modelPayment) pay(now time.Time) { p.status, p.paid, p.changed = "paid", true, now }

// giveBack is the gateway giving back a part of the payment, or all of it.
func (p *modelPayment) giveBack(won int64, now time.Time) {
	p.status, p.back, p.changed = "cancelled", p.back+won, now
}

// mismatches are what the audit of a settled order finds about the payment, for a person.
func (p *modelPayment) mismatches() (found []string) {
	say := func(o *modelOrder, kind string) {
		found = append(found, fmt.Sprintf("%s of order %s: %s", p.impUID, o.id, kind))
	}
	switch {
	case p.state == "":
	case p.ledger != p.order:
		if p.state == "kept" {
			say(p.ledger, "payment of another order")
		}
		if p.listed() && p.moved() && p.back < p.amount {
			say(p.order, "payment of another order")
		}
	case p.handed && p.listed() && p.seen() > p.booked-p.byHand:
		say(p.ledger, "paid back twice")
	case p.handed:
	case p.state == "refunded" && p.listed() && p.back < p.amount:
		say(p.ledger, "refunded here, kept there")
	case p.state == "kept" && !p.listed():
		say(p.ledger, "kept here, never paid there")
	case p.state == "kept" && p.back < p.booked:
		say(p.ledger, "amount differs")
	}
	return found
}

// settle is what becomes of a payment that we look at and can read. False: it is of no order of ours, or of another one than
// it is booked for.
func (m *model) settle(p *modelPayment) bool {
	o := p.order
	switch {
	case o == nil || p.state != "" && p.ledger != o:
		return false
	case !p.moved() || p.state == "refunded":
	case p.back >= p.amount:
		m.refunded(p, "refunded at the gateway")
	case p.state != "":
		if p.seen() > p.booked {
			o.note("partly refunded")
			p.booked = p.seen()
		}
		if part := o.part(); p.state == "kept" && part != nil && part.there {
			o.partDone(part)
		}
	case p.status != "paid" && p.status != "cancelled":
	case p.foreign || p.amount != o.total() || p.back > 0:
		m.refund(p, "amount differs")
	case o.status == 5:
		m.refund(p, "order cancelled")
	case o.status >= 0:
		m.refund(p, "order paid already")
	case o.ended != "" && !m.revivable(o):
		m.refund(p, "paintings gone")
	default:
		m.pay(o, p)
	}
	return true
}

// revivable reports whether late money may still pay for an order that has ended: not for longer than a day, at today's prices,
// while all of its paintings are there for its buyer, and unless a paid order has its number.
func (m *model) revivable(o *modelOrder) bool {
	today := int64(shippingPrice)
	for _, p := range o.paintings {
		today += p.price
	}
	return m.now.Before(o.endedAt.Add(revivalTime)) && today == o.total() && !m.paidUnder(o.buyer, o.number) &&
		!slices.ContainsFunc(o.paintings, func(p *modelPainting) bool { return p.takenFor(o.buyer) })
}

func (m *model) pay(o *modelOrder, p *modelPayment) {
	why := "paid"
	if o.ended != "" {
		why = "revived"
		if rival := m.live(o.buyer, (*modelOrder).unpaid); rival != nil &&
			(rival.number == o.number || slices.ContainsFunc(rival.paintings, o.has)) {
			m.end(rival, "replaced")
		}
		o.take()
	}
	o.status, o.ended = 0, ""
	o.note(why)
	p.state, p.ledger = "kept", o
	o.note("payment kept")
}

// refund books that a payment's money goes back, and sends it back.
func (m *model) refund(p *modelPayment, reason string) {
	p.state, p.reason, p.ledger, p.booked = "refunding", reason, p.order, p.seen()
	p.ledger.note("refunding: " + reason)
	if p.booked > 0 {
		p.ledger.note("partly refunded")
	}
	m.cancel(p, p.booked)
}

// cancel is one attempt at a refund that is booked: the gateway compares what we believe is back already. It returns our
// answer's status: 200 when all is back. A refusal because something else is back than we believed is followed by one more.
func (m *model) cancel(p *modelPayment, believed int64) (status int) {
	if m.looksFirst() {
		return 503
	}
	if m.via != viaV1 && p.back == p.amount && !p.unreadable() && m.settle(p) && p.state == "refunded" {
		return 200 // V2 sees that all is back, and is not asked for more
	}
	for again := true; ; again = false {
		refused := m.refusesCancel(p, believed)
		if m.trouble.cancel.before == nil && !refused {
			p.giveBack(p.amount-p.back, m.now)
		}
		if m.trouble.status != 0 {
			refused = m.trouble.status == 502
		}
		status = cmp.Or(m.trouble.status, map[bool]int{true: 502, false: 200}[refused])
		switch {
		case status != 200 && (m.trouble.after || m.trouble.lookUp || p.unreadable()):
		case !m.settle(p):
			return 502
		case p.state == "refunded":
			return 200
		case again && refused && p.seen() != believed:
			believed = p.seen()
			continue
		}
		if refused {
			p.refusals++
		}
		return status
	}
}

// looksFirst reports whether a cancel fails because a look-up does: V2 is asked for the payment before anything goes back.
func (m *model) looksFirst() bool { return m.via != viaV1 && m.trouble.lookUp }

// refusesCancel reports whether the gateway gives back none of a payment.
func (m *model) refusesCancel(p *modelPayment, believed int64) bool {
	return !p.refundable() || !p.foreign && believed != p.back || p.vbank && !p.account || p.refused
}

// refundAgain is a further attempt: it looks first.
func (m *model) refundAgain(p *modelPayment) (status int) {
	switch {
	case m.trouble.lookUp:
		return 503
	case p.unreadable() || !m.settle(p):
		return 502
	case p.state == "refunded":
		return 200
	}
	return m.cancel(p, p.seen())
}

// refunded books that a payment is back, whole. The order goes with the payment it was paid with. Its paintings are available
// again only if they never left the shop, or if we cancelled the order: then they are back.
func (m *model) refunded(p *modelPayment, reason string) {
	if p.state == "" {
		p.ledger = p.order
	}
	ours, cancels := p.cancelsOrder(), p.state == "kept" || p.cancelsOrder()
	p.state, p.reason, p.account = "refunded", cmp.Or(p.reason, reason), false
	if p.booked = p.amount; p.foreign {
		p.booked = 0
	}
	p.ledger.note("refunded: " + p.reason)
	if part := p.ledger.part(); cancels && part != nil && part.there {
		p.ledger.partDone(part)
	} else if cancels && part != nil {
		part.state = "undone"
	}
	if cancels {
		m.cancelled(p.ledger, !ours && p.ledger.status >= 2)
	}
}

// cancelled ends a paid order whose money is back.
func (m *model) cancelled(o *modelOrder, offSale bool) {
	o.status, o.cancelling, o.returning = 5, false, nil
	o.note("cancelled")
	for _, p := range o.paintings {
		if p.owner == o {
			p.forSale = p.forSale && !offSale
		}
	}
	o.free()
}

// partDone cancels the paintings of a part refund that the gateway has made. Once all that are left were asked back, the order is
// returning.
func (o *modelOrder) partDone(part *modelPart) {
	part.state, o.cancelling = "done", false
	o.cancelled = append(o.cancelled, part.paintings...)
	o.returning = minus(o.returning, part.paintings)
	o.note("part cancelled")
	for _, p := range part.paintings {
		p.owner = nil
	}
	if o.status < 4 && len(minus(o.left(), o.returning)) == 0 {
		o.move(4)
	}
}

// report is a payment that the browser tells us of.
func (m *model) report(p *modelPayment) reply {
	switch {
	case p != nil && m.now.Sub(p.elsewhere) < foreignFor: // it is not looked up
		return noSuchPayment
	case m.trouble.lookUp:
		return gatewaySilent
	case p == nil || p.sandbox:
		return noSuchPayment
	case p.unreadable():
		return gatewayBroken
	case p.order == nil:
		p.elsewhere = m.now
		return noSuchPayment
	case !m.settle(p):
		return reply{409, "imp_uid: 이미 다른 주문에 사용된 결제입니다"}
	case p.awaitsDeposit():
		return m.endAccount(p)
	case p.state == "":
		return reply{400, "imp_uid: 결제가 완료되지 않았습니다"}
	case p.state == "kept":
		return reply{200, "결제 성공"}
	}
	switch p.reason {
	case "amount differs":
		return reply{400, "금액 불일치, 위조된 결제 시도"}
	case "paintings gone":
		return reply{409, "주문 시간이 지나 작품이 이미 판매되어 결제 금액을 환불합니다"}
	case "order paid already":
		return reply{409, "이미 결제된 주문이므로 중복된 결제 금액을 환불합니다"}
	case "order cancelled":
		return reply{409, "이미 취소된 주문이므로 결제 금액을 환불합니다"}
	default:
		return reply{400, "imp_uid: 취소된 결제입니다"}
	}
}

// approve is a payment under manual approval that the browser reports: it is charged if it pays for the order and the order can
// be had.
func (m *model) approve(p *modelPayment) reply {
	o := p.order
	switch {
	case p.state != "":
		return m.report(p)
	case o.status == 5:
		return reply{409, "이미 취소된 주문이므로 결제하지 않았습니다"}
	case o.status >= 0:
		return reply{409, "이미 결제된 주문이므로 결제하지 않았습니다"}
	case o.ended != "":
		return reply{409, "주문 시간이 지나 결제하지 않았습니다. 다시 주문해 주세요"}
	case p.foreign || p.sandbox || p.amount != o.total():
		return reply{400, "금액 불일치, 위조된 결제 시도"}
	}
	p.pay(m.now)
	return m.report(p)
}

// endAccount ends a virtual account, unless a deposit comes first.
func (m *model) endAccount(p *modelPayment) reply {
	switch {
	case m.trouble.account:
		return gatewaySilent
	case m.trouble.deposit && !m.now.After(p.until):
		p.pay(m.now)
	default:
		p.status, p.changed = "cancelled", m.now
	}
	return reply{409, "가상계좌로는 결제할 수 없어 발급된 계좌를 해지했습니다. 다른 결제 수단을 이용해 주세요"}
}

// noticed is report for the gateway itself, which is told no more than that we have seen it.
func (m *model) noticed(p *modelPayment) reply {
	if r := m.report(p); r.status >= 500 {
		return r
	}
	return reply{200, "확인했습니다"}
}

// check settles all that the gateway has for an order, first what is paid and then what was given back, the oldest first.
// An unpaid order for which nothing is paid is left alone. The problem is that the gateway gives no usable answer.
func (m *model) check(o *modelOrder) (problem reply) {
	if m.trouble.lookUp {
		return gatewaySilent
	}
	var paid, back []*modelPayment
	for _, p := range m.payments {
		switch {
		case p.order != o || !p.listed():
		case p.status == "paid":
			paid = append(paid, p)
		default:
			back = append(back, p)
		}
	}
	switch {
	case o.unpaid() && len(paid) == 0:
		return noProblem
	case o.unpaid() && !slices.ContainsFunc(paid, func(p *modelPayment) bool { return !p.unreadable() }):
		return gatewayBroken
	}
	unpaid := o.unpaid()
	for _, p := range append(paid, back...) {
		if p.unreadable() {
			problem = gatewayBroken
			continue
		}
		m.settle(p)
	}
	if unpaid && !o.unpaid() {
		return noProblem
	}
	return problem
}

// reconcile asks about an order whose time has come: an unpaid one ends when its hold is over, but not before the gateway
// has given an answer, or none for as long again.
func (m *model) reconcile(o *modelOrder) {
	unpaid := o.unpaid()
	problem := m.check(o)
	if problem != noProblem {
		o.silent = m.now
	}
	if unpaid && o.unpaid() && !m.now.Before(o.until) && (problem == noProblem || !m.now.Before(o.until.Add(orderHold))) {
		m.end(o, "expired")
	}
}

// refusesProducts is why what was asked for these paintings of an order makes no sense.
func (o *modelOrder) refusesProducts(paintings []*modelPainting) reply {
	for i, p := range paintings {
		switch {
		case !o.has(p):
			return reply{400, fmt.Sprintf("products[%d]: 주문에 없는 작품입니다", i)}
		case slices.Contains(o.cancelled, p):
			return reply{409, fmt.Sprintf("products[%d]: 이미 취소된 작품입니다", i)}
		}
	}
	return noProblem
}

// deletePart is DELETE for some of an order's paintings, while others are left. False: it is about all that are left.
func (m *model) deletePart(user string, o *modelOrder, wanted *int, paintings []*modelPainting) (answer reply, isPart bool) {
	cancel := wanted == nil || *wanted == 5
	rest := minus(o.left(), paintings)
	again := len(minus(o.returning, paintings)) < len(o.returning)
	switch {
	case len(rest) == 0, !cancel && !again && len(minus(rest, o.returning)) == 0:
		return noProblem, false
	case o.unpaid():
		return reply{409, "결제되지 않은 주문은 일부 작품만 취소할 수 없습니다"}, true
	case !cancel && *wanted != 4 || o.status == 5 || !cancel && (o.status == 4 || o.cancelling):
		return noProblem, false // as for the whole
	case !cancel:
		for i, p := range paintings {
			if o.stateOf(p) == "returning" {
				return reply{409, fmt.Sprintf("products[%d]: 이미 반품을 요청한 작품입니다", i)}, true
			}
		}
		o.returning = append(o.returning, paintings...)
		o.note("part return requested")
		return reply{200, "해당 주문의 반품 요청이 완료되었습니다"}, true
	}
	if part := o.part(); o.cancelling && (part == nil || len(minus(part.paintings, paintings))+len(minus(paintings, part.paintings)) > 0) {
		return reply{409, "결제 취소가 진행 중입니다"}, true
	}
	for _, p := range paintings {
		switch {
		case o.cancelling:
		case o.stateOf(p) == "returning" && user != adminID:
			return reply{409, "반품을 요청한 주문입니다. 반품이 확인되면 환불됩니다"}, true
		case o.stateOf(p) == "" && o.status != 0:
			return reply{409, "발송 준비가 시작된 주문은 취소할 수 없고 반품만 신청할 수 있습니다"}, true
		}
	}
	switch status := m.cancelPart(o, paintings); status {
	case 200:
		return reply{200, "해당 주문의 결제 취소가 완료되었습니다"}, true
	case 409:
		return reply{409, "결제사가 일부 금액의 환불을 거절하여 취소하지 못했습니다"}, true
	default:
		return refundPending(status), true
	}
}

// cancelPart gives back the price of some paintings, or goes on with that. It returns our answer's status.
func (m *model) cancelPart(o *modelOrder, paintings []*modelPainting) (status int) {
	i := slices.IndexFunc(m.payments, func(p *modelPayment) bool { return p.ledger == o && p.state == "kept" })
	p := m.payments[i]
	if o.cancelling {
		return m.refundPartAgain(p)
	}
	o.cancelling = true
	o.parts = append(o.parts, &modelPart{paintings: paintings, amount: o.price(paintings), state: "booked"})
	o.note("part cancel requested")
	return m.requestPart(p, p.booked)
}

// refundPartAgain is a further attempt at a part refund: it looks first.
func (m *model) refundPartAgain(p *modelPayment) (status int) {
	part := p.ledger.part()
	switch {
	case m.trouble.lookUp:
		return 503
	case p.unreadable() || !m.settle(p):
		return 502
	case part.state != "booked":
		return 200
	}
	return m.requestPart(p, p.seen())
}

// requestPart is one attempt at a part refund that is booked. 409: it was refused, and is undone.
func (m *model) requestPart(p *modelPayment, believed int64) (status int) {
	o := p.ledger
	part := o.part()
	if m.looksFirst() {
		return 503
	}
	for again := true; ; again = false {
		refused := !p.refundable() || believed != p.back || part.amount > p.amount-p.back || p.vbank || p.refused
		if m.trouble.cancel.before == nil && !refused {
			p.giveBack(part.amount, m.now)
			part.there = true
		}
		if m.trouble.status != 0 {
			refused = m.trouble.status == 502
		}
		status = cmp.Or(m.trouble.status, map[bool]int{true: 502, false: 200}[refused])
		switch {
		case status != 200 && (m.trouble.after || m.trouble.lookUp || p.unreadable()):
			return status
		case !m.settle(p):
			return 502
		case part.state != "booked":
			return 200
		case refused && again && p.seen() != believed:
			believed = p.seen()
		case refused:
			part.state, o.cancelling = "undone", false
			o.note("refund refused")
			return 409
		default:
			return status
		}
	}
}

// withdraw is PATCH /api/orders/:id for some of an order's paintings: their return is taken back.
func (m *model) withdraw(user string, o *modelOrder, status int, paintings []*modelPainting) reply {
	if user == "" {
		return nobodyAsks
	} else if !o.seenBy(user) {
		return noSuchOrder
	}
	if status != o.status || status < 0 || status > 4 || o.cancelling {
		return reply{400, "변경실패, 진행 단계가 알맞지 않습니다"}
	} else if refused := o.refusesProducts(paintings); refused != noProblem {
		return refused
	}
	for i, p := range paintings {
		if o.stateOf(p) != "returning" {
			return reply{409, fmt.Sprintf("products[%d]: 반품을 요청하지 않은 작품입니다", i)}
		}
	}
	if o.status < 4 {
		o.returning = minus(o.returning, paintings)
		o.note("part return withdrawn")
		return reply{200, stepMessages[o.status]}
	}
	rest := minus(o.left(), paintings)
	o.move(o.cameFrom)
	if o.returning = rest; len(rest) > 0 {
		o.note("part return withdrawn")
	}
	return reply{200, stepMessages[o.status]}
}

// delete is DELETE /api/orders/:id; a nil wanted is no status, and nil paintings are all.
func (m *model) delete(user string, o *modelOrder, wanted *int, paintings []*modelPainting) reply {
	switch {
	case user == "":
		return nobodyAsks
	case o == nil || o.ended == "deleted" || user != o.buyer && user != adminID:
		return noSuchOrder
	case o.ended != "":
		return orderDeleted
	}
	if refused := o.refusesProducts(paintings); refused != noProblem {
		return refused
	}
	if paintings != nil {
		if answer, isPart := m.deletePart(user, o, wanted, paintings); isPart {
			return answer
		}
	}
	if !o.unpaid() {
		return m.deletePaid(user, o, wanted)
	}
	if problem := m.check(o); problem != noProblem {
		return problem
	} else if !o.unpaid() {
		return reply{409, "결제가 확인되어 주문이 완료되었습니다. 취소하려면 다시 요청해 주세요"}
	}
	m.end(o, "deleted")
	return orderDeleted
}

func (m *model) deletePaid(user string, o *modelOrder, wanted *int) reply {
	cancel := wanted == nil || *wanted == 5
	switch {
	case !cancel && *wanted != 4:
		return reply{400, "진행 단계를 알 수 없습니다"}
	case o.status == 5:
		return reply{409, "이미 취소된 주문입니다"}
	case !cancel && o.status == 4:
		return reply{409, "이미 반품을 요청한 주문입니다"}
	case !cancel && o.cancelling:
		return reply{409, "결제 취소가 진행 중입니다"}
	case !cancel:
		o.move(4)
		return reply{200, "해당 주문의 반품 요청이 완료되었습니다"}
	case o.status == 4 && user != adminID:
		return reply{409, "반품을 요청한 주문입니다. 반품이 확인되면 환불됩니다"}
	case o.status != 0 && o.status != 4:
		return reply{409, "발송 준비가 시작된 주문은 취소할 수 없고 반품만 신청할 수 있습니다"}
	}
	if o.part() != nil {
		return reply{409, "결제 취소가 진행 중입니다"}
	}
	if status := m.cancelOrder(user, o); status != 200 {
		return refundPending(status)
	}
	return reply{200, "해당 주문의 결제 취소가 완료되었습니다"}
}

func refundPending(status int) reply {
	return reply{status, "결제 취소를 접수했으나 환불이 아직 완료되지 않았습니다. 자동으로 다시 시도합니다"}
}

func (m *model) cancelOrder(user string, o *modelOrder) (status int) {
	i := slices.IndexFunc(m.payments, func(p *modelPayment) bool { return p.ledger == o && (p.state == "kept" || p.cancelsOrder()) })
	p := m.payments[i]
	if o.cancelling {
		return m.refundAgain(p)
	}
	o.cancelling = true
	o.note("cancel requested")
	p.state, p.reason = "refunding", "buyer cancelled"
	if user == adminID {
		p.reason = "shop cancelled"
	}
	o.note("refunding: " + p.reason)
	return m.cancel(p, p.booked)
}

// helpRefund is POST /api/orders/:id/refund.
func (m *model) helpRefund(user string, o *modelOrder, p *modelPayment, toAccount bool) reply {
	switch {
	case user == "":
		return nobodyAsks
	case user != adminID:
		return adminsOnly
	case o == nil || p == nil || p.ledger != o:
		return noSuchOrder
	case p.state != "refunding":
		return reply{409, "imp_uid: 환불할 금액이 없는 결제입니다"}
	case toAccount:
		p.account = true
		if status := m.refundAgain(p); status != 200 {
			return refundPending(status)
		}
	default:
		m.paidByHand(p)
	}
	return reply{200, "환불이 처리되었습니다"}
}

// paidByHand books that the rest of a payment was paid back by other means.
func (m *model) paidByHand(p *modelPayment) {
	if !p.foreign {
		p.byHand, p.booked = p.amount-p.booked, p.amount
	}
	p.state, p.handed, p.account = "refunded", true, false
	p.ledger.note("refunded by hand: " + p.reason)
	if p.cancelsOrder() {
		m.cancelled(p.ledger, false)
	}
}

// changeSale is PATCH /api/products/:id. An unpaid order that has a painting taken off sale ends, unless its money has come.
func (m *model) changeSale(user string, p *modelPainting, forSale bool) reply {
	switch {
	case user == "":
		return nobodyAsks
	case user != adminID:
		return adminsOnly
	}
	if !forSale && p.owner != nil && p.owner.unpaid() {
		o := p.owner
		if problem := m.check(o); problem != noProblem {
			return problem
		} else if o.unpaid() {
			m.end(o, "withdrawn")
		}
	}
	if p.owner != nil && !p.owner.unpaid() {
		return reply{409, "결제된 주문의 작품은 판매 상태를 변경할 수 없습니다"}
	}
	p.forSale = forSale
	return reply{200, "판매 상태가 변경되었습니다"}
}

// advance is PATCH /api/orders/:id: one step on or back, a return, or a return taken back.
func (m *model) advance(user string, o *modelOrder, to int) reply {
	if user == "" {
		return nobodyAsks
	} else if !o.seenBy(user) {
		return noSuchOrder
	}
	sent := o.status >= 1 && o.status <= 3
	allowed := false
	switch {
	case to == 4:
		allowed = sent
	case o.status == 4:
		allowed = to == o.cameFrom
	case to >= 0 && to <= 3:
		if user != adminID {
			return adminsOnly
		}
		allowed = (sent || o.status == 0) && (to == o.status+1 || to == o.status-1)
	}
	if !allowed || o.cancelling {
		return reply{400, "변경실패, 진행 단계가 알맞지 않습니다"}
	}
	o.move(to)
	return reply{200, stepMessages[to]}
}

var stepMessages = []string{"해당 주문이 결제 완료 단계로 변경되었습니다", "해당 주문이 발송 준비 중 단계로 변경되었습니다",
	"해당 주문이 배송 중 단계로 변경되었습니다", "해당 주문이 배송 완료 단계로 변경되었습니다", "해당 주문의 반품 요청 단계로 변경되었습니다"}

func (o *modelOrder) move(to int) {
	if to == 4 {
		o.cameFrom, o.returning = o.status, nil
	}
	o.status = to
	o.note([]string{"paid", "preparing", "shipping", "delivered", "return requested"}[to])
}
