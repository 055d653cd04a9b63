package main

import (
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Random lives of a small shop. Each move goes to the service and to the model below; the answer, the books, the
// history and the money at the gateway must then be what the model says. A failure prints the seed of the one life in which
// it happened and that life's moves.

var (
	modelSeed  = flag.Uint64("model.seed", 0, "seed of the first life that TestModel plays; 0: another each time")
	modelSteps = flag.Int("model.steps", 2000, "how many random moves TestModel plays")
)

// runMoves is how many moves a life has before all is settled; the next one begins with new buyers and paintings.
const runMoves = 60

func TestModel(t *testing.T) {
	heavy(t)
	t.Parallel()
	seed := cmp.Or(*modelSeed, rand.Uint64()>>32)
	s := newDirectShop(t)
	counts := map[string]int{}
	for steps := 0; steps < *modelSteps; steps += runMoves {
		l := newModelRun(s, seed)
		for range runMoves {
			l.move()
		}
		l.settleDown()
		for move, n := range l.counts {
			counts[move] += n
		}
		s.logged.Reset()
		seed++
	}
	t.Logf("the last life's seed was %d; moves: %v", seed-1, counts)
}

// modelRun is a shop's life: the model beside the service, and what has been done so far.
type modelRun struct {
	*shop
	model  model
	seed   uint64
	random *rand.Rand
	buyers []string
	names  []string // of ids, for strings.NewReplacer
	trace  []string
	counts map[string]int
}

// newModelRun begins a life with three buyers and four paintings.
func newModelRun(s *shop, seed uint64) *modelRun {
	l := &modelRun{shop: s, seed: seed, random: rand.New(rand.NewPCG(seed, 0)), counts: map[string]int{}}
	for i := range 3 {
		l.buyers = append(l.buyers, newTestID())
		l.names = append(l.names, l.buyers[i], fmt.Sprintf("buyer%d", i+1))
	}
	for i, id := range s.paintings(4, 99000) {
		l.model.paintings = append(l.model.paintings, &modelPainting{id: id, forSale: true})
		l.names = append(l.names, id, fmt.Sprintf("painting%d", i+1))
	}
	l.names = append(l.names, adminID, "administrator")
	return l
}

// moves are what can happen, and how often.
var moves = []struct {
	often int
	name  string
	play  func(*modelRun)
}{
	{20, "create", (*modelRun).playCreate},
	{5, "show", (*modelRun).playShow},
	{20, "charge", (*modelRun).playCharge},
	{20, "report", (*modelRun).playReport},
	{20, "notice", (*modelRun).playNotice},
	{20, "delete", (*modelRun).playDelete},
	{12, "step", (*modelRun).playStep},
	{6, "console", (*modelRun).playConsole},
	{2, "catalogue", (*modelRun).playCatalogue},
	{8, "wait", (*modelRun).playWait},
	{10, "reconcile", (*modelRun).playReconcile},
}

// move plays a random move and compares.
func (l *modelRun) move() {
	l.t.Helper()
	l.tick(5 * time.Second) // a look-up repeated within 3 seconds may be answered from the one before
	l.model.trouble = noTrouble
	if l.random.IntN(5) == 0 {
		l.model.trouble = pick(l, troubles)
	}
	l.fake.setFaults(l.model.trouble.faults())
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
func (t trouble) faults() func(call, id string) fault {
	cancelled := map[string]bool{}
	return func(call, id string) fault {
		switch {
		case call == "cancel":
			cancelled[id] = true
			return t.cancel
		case call != "token" && (t.lookUp || t.after && cancelled[id]):
			return fault{before: answer500}
		}
		return fault{}
	}
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

// id is the order's, or that of no order.
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
	l.trace = append(l.trace, fmt.Sprintf("%3d %s  %s", len(l.trace)+1, l.model.now.Format("02 15:04:05"), line))
}

// want says what was done and fails unless it was answered as the model says.
func (l *modelRun) want(a answer, r reply, format string, args ...any) {
	l.t.Helper()
	l.say(format+" → %d %s", append(args, a.status, a.message())...)
	if a.status != r.status || a.message() != r.message {
		l.fail("the model answers %d %s", r.status, r.message)
	}
}

// fail ends the test with the life so far.
func (l *modelRun) fail(format string, args ...any) {
	l.t.Helper()
	l.t.Fatal(strings.NewReplacer(l.names...).Replace(fmt.Sprintf("%s\n%s\nplay this life again: go test -run TestModel -model.seed=%d -model.steps=1",
		strings.Join(l.trace, "\n"), fmt.Sprintf(format, args...), l.seed)))
}

// compare fails unless the books, the history and the gateway are as the model says.
func (l *modelRun) compare() {
	l.t.Helper()
	var want, orders, paintings []string
	for _, o := range l.model.orders {
		orders = append(orders, o.id)
		want = append(want, fmt.Sprintf("order %s %d %s cancelling=%v: %s", o.id, o.status, o.ended, o.cancelling, strings.Join(o.history, ", ")))
	}
	for _, p := range l.model.paintings {
		paintings = append(paintings, p.id)
		owner := ""
		if p.owner != nil {
			owner = p.owner.id
		}
		want = append(want, fmt.Sprintf("painting %s is with order %s", p.id, owner))
	}
	for _, p := range l.model.payments {
		if p.state != "" {
			booked := p.booked
			if p.foreign {
				booked = 0
			}
			want = append(want, fmt.Sprintf("payment %s %s %s, %d back", p.impUID, p.state, p.reason, booked))
		}
		want = append(want, fmt.Sprintf("the gateway gave back %d of %s", p.back, p.impUID))
	}
	rows, _ := l.store.pool.Query(context.Background(), `
		SELECT format('order %s %s %s cancelling=%s: %s', id, status, ended, (cancelling_since IS NOT NULL)::text,
			(SELECT string_agg(why, ', ' ORDER BY h.id) FROM history h WHERE h.order_id = o.id)) FROM orders o WHERE id = ANY($1)
		UNION ALL SELECT format('painting %s is with order %s', id, order_id) FROM products WHERE id = ANY($2)
		UNION ALL SELECT format('payment %s %s %s, %s back', imp_uid, state, reason, refunded) FROM payments WHERE order_id = ANY($1)`, orders, paintings)
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	check(l.t, err)
	for _, p := range l.model.payments {
		got = append(got, fmt.Sprintf("the gateway gave back %d of %s", l.back(p.impUID), p.impUID))
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		only := func(a, b []string) string {
			return strings.Join(slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) }), "\n")
		}
		l.fail("the service has\n%s\nthe model has\n%s", only(got, want), only(want, got))
	}
}

func (l *modelRun) playCreate() {
	o := &modelOrder{status: -1, buyer: pick(l, l.buyers), number: newNumber(), made: l.model.now, until: l.model.now.Add(l.config.hold)}
	for _, i := range l.random.Perm(len(l.model.paintings))[:1+l.random.IntN(2)] {
		o.paintings = append(o.paintings, l.model.paintings[i])
	}
	if again := lately(l, l.model.orders); again != nil && l.random.IntN(4) == 0 { // a number used before, perhaps the very same order
		o.buyer, o.number = again.buyer, again.number
		if l.random.IntN(2) == 0 {
			o.paintings = again.paintings
		}
	}
	a := l.call(o.buyer, "POST", "/api/orders", orderBody(o.number, o.paintingIDs()...))
	var made orderCreated
	json.Unmarshal([]byte(a.body), &made)
	o.id = made.OrderID
	if l.model.live(o.buyer, func(x *modelOrder) bool { return x.id == o.id }) == nil && o.id != "" {
		l.names = append(l.names, o.id, fmt.Sprintf("order%d", len(l.model.orders)+1))
	}
	want, is := l.model.create(o)
	l.want(a, want, "%s orders %v under %s: %s", o.buyer, o.paintingIDs(), o.number, o.id)
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
		switch {
		case !p.takenFor(o.buyer):
		case !p.forSale || !p.owner.unpaid():
			want = append(want, product{p.id, "sold", ""})
		default:
			want = append(want, product{p.id, "held", p.owner.until.Format(timeFormat)})
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
	his := func(o *modelOrder) bool { return o.buyer == buyer && o.ended == "" }
	var want, got any
	switch l.random.IntN(5) {
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
		var detail struct{ Result struct{ Status int } }
		check(l.t, json.Unmarshal([]byte(a.body), &detail))
		if want, got = status, a.status; status == 200 {
			want, got = o.status, detail.Result.Status
		}
	case 1:
		l.say("%s looks at his newest order", buyer)
		var latest struct {
			ID string `json:"_id"`
		}
		check(l.t, json.Unmarshal([]byte(l.call(buyer, "GET", "/api/orders/latest", nil).body), &latest))
		want, got = strings.Join(newest(his, 1), ""), latest.ID
	case 2:
		l.say("%s lists his orders", buyer)
		list := l.list(buyer, "/api/orders/mine")
		count := map[int]int{}
		for _, o := range l.model.orders {
			if his(o) {
				count[o.status]++
			}
		}
		want = fmt.Sprint(newest(his, 3), count[0], count[1], count[2], count[3])
		got = fmt.Sprint(list.ids(), list.Status["paid"], list.Status["ready"], list.Status["coming"], list.Status["done"])
	case 3:
		l.say("the administrator lists the orders")
		ids, list := newest(func(o *modelOrder) bool { return o.status >= 0 }, 10), l.list(adminID, "/api/orders").ids()
		want, got = fmt.Sprint(ids), fmt.Sprint(list[:min(len(ids), len(list))]) // those of earlier lives follow
	case 4:
		l.say("%s looks at the paintings", buyer)
		stock := map[string]bool{}
		query := ""
		for _, p := range l.model.paintings {
			stock[p.id] = !p.takenFor(buyer)
			query += "&productId=" + p.id
		}
		var items []cartItem
		check(l.t, json.Unmarshal([]byte(l.call(buyer, "GET", "/api/products/cart-items?"+query, nil).body), &items))
		shown := map[string]bool{}
		for _, item := range items {
			shown[item.ID] = item.InStock
		}
		want, got = fmt.Sprint(stock), fmt.Sprint(shown)
	}
	if want != got {
		l.fail("the service shows %v, the model %v", got, want)
	}
}

// playCharge has a payment window end in one of the ways there are. The service is not told.
func (l *modelRun) playCharge() {
	p := &modelPayment{order: lately(l, l.model.orders), status: "paid", changed: l.model.now}
	for _, waiting := range l.model.payments {
		if waiting.status == "ready" && l.random.IntN(4) == 0 {
			waiting.status, waiting.changed = "paid", l.model.now
			l.fake.set(waiting.impUID, func(p *fakePayment) { p.Status, p.PaidAt = "paid", l.model.now })
			l.say("%s is paid after all", waiting.impUID)
			return
		}
	}
	merchant, kind := "another-shops-order", l.random.IntN(20)
	if kind == 0 {
		p.order = nil
	}
	if p.order != nil {
		merchant, p.amount = p.order.id, p.order.total()
	}
	currency := "KRW"
	switch {
	case p.order == nil:
		p.amount = 5000
	case kind < 3:
		p.amount += 1 - 2*l.random.Int64N(2)
	case kind == 3:
		currency, p.foreign, p.amount = "USD", true, 80
	case kind == 4:
		p.sandbox = true
	case kind == 5:
		p.status = "failed"
	case kind < 8:
		p.status = "ready"
	}
	p.impUID = l.fake.pay(fakePayment{MerchantUID: merchant, Amount: p.amount, Currency: currency, Sandbox: p.sandbox, Status: p.status})
	l.model.payments = append(l.model.payments, p)
	l.names = append(l.names, p.impUID, fmt.Sprintf("payment%d", len(l.model.payments)))
	l.say("%s: %d %s for order %s, %s, sandbox=%v", p.impUID, p.amount, currency, merchant, p.status, p.sandbox)
}

// playReport is a browser that reports a payment, again or for the first time.
func (l *modelRun) playReport() { l.playSeen("the browser reports", l.model.report, l.shop.report) }

// playNotice is the gateway's notice of a payment: late, repeated, in any order.
func (l *modelRun) playNotice() {
	l.playSeen("the gateway gives notice of", l.model.noticed, l.notice)
}

func (l *modelRun) playSeen(what string, model func(*modelPayment) reply, service func(string) answer) {
	p, impUID := lately(l, l.model.payments), "imp_unknown"
	if p != nil {
		impUID = p.impUID
	}
	want := model(p)
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
	want := l.model.delete(user, o, wanted)
	l.want(l.call(user, "DELETE", "/api/orders/"+o.orderID(), body), want, "%s deletes order %s with %v", user, o.orderID(), body)
}

func (l *modelRun) playStep() {
	o := lately(l, l.model.orders)
	user, to := l.user(o), 1+l.random.IntN(4)
	if o != nil && l.random.IntN(2) == 0 {
		user, to = adminID, o.status+1
	}
	want := l.model.advance(user, o, to)
	l.want(l.call(user, "PATCH", "/api/orders/"+o.orderID(), map[string]int{"status": to}), want, "%s moves order %s to %d", user, o.orderID(), to)
}

// playConsole is a refund by hand in the gateway's console; its notice may come later, or never.
func (l *modelRun) playConsole() {
	p := lately(l, l.model.payments)
	if p == nil || p.status != "paid" || p.back == p.amount {
		return
	}
	back := p.amount - p.back
	if l.random.IntN(2) == 0 {
		back = min(back, 1+l.random.Int64N(back))
	}
	p.back, p.changed = p.back+back, l.model.now
	check(l.t, l.fake.refundInConsole(p.impUID, back))
	l.say("the console gives back %d of %s", back, p.impUID)
}

// playCatalogue sells a painting elsewhere, or takes that back.
func (l *modelRun) playCatalogue() {
	p := pick(l, l.model.paintings)
	p.forSale = !p.forSale
	l.catalogue(99000, p.forSale, p.id)
	l.say("%s is for sale: %v", p.id, p.forSale)
}

// playWait lets time pass in which no replica's reconciler gets anywhere.
func (l *modelRun) playWait() {
	l.tick(pick(l, []time.Duration{time.Minute, 10 * time.Minute, 31 * time.Minute, 65 * time.Minute}))
	l.say("time passes")
}

func (l *modelRun) playReconcile() {
	l.tick(pick(l, []time.Duration{time.Second, time.Minute, 10 * time.Minute, 31 * time.Minute, 2 * time.Hour, 25 * time.Hour}))
	l.round()
}

// round is the reconciler's, one refund and one order after the other: which one is due the service says, what becomes
// of it the model.
func (l *modelRun) round() {
	l.t.Helper()
	l.say("the reconciler's round")
	ctx := context.Background()
	for {
		rows, err := l.store.claimDueRefunds(ctx, 1, l.model.now)
		check(l.t, err)
		if len(rows) == 0 {
			break
		}
		i := slices.IndexFunc(l.model.payments, func(p *modelPayment) bool { return p.impUID == rows[0].impUID && p.state == "refunding" })
		if i < 0 {
			l.fail("a refund of %s", rows[0].impUID)
		}
		l.say("  refunds %s again", rows[0].impUID)
		err = l.settler.attemptRefund(ctx, byReconciler, rows[0])
		if status := l.model.refundAgain(l.model.payments[i]); (status == 200) != (err == nil) {
			l.fail("%v, by the model %d", err, status)
		}
	}
	for {
		looks, err := l.store.claimDueChecks(ctx, 1, l.model.now)
		check(l.t, err)
		if len(looks) == 0 {
			break
		}
		i := slices.IndexFunc(l.model.orders, func(o *modelOrder) bool { return o.id == looks[0].id })
		l.say("  looks at order %s", looks[0].id)
		_, err = l.settler.checkOrder(ctx, looks[0])
		check(l.t, err)
		l.model.reconcile(l.model.orders[i], l.config.hold)
		l.compare()
	}
	for _, o := range l.model.orders {
		if o.unpaid() && !l.model.now.Before(o.until) && !l.model.now.Before(o.silent.Add(l.config.reconcile)) {
			l.fail("order %s is unpaid and its hold is over", o.id)
		}
	}
}

// settleDown ends a life: the reconciler has all the time it needs and the gateway answers. Then every won that the
// gateway has for an order pays for it, and the rest is back.
func (l *modelRun) settleDown() {
	l.t.Helper()
	l.model.trouble = noTrouble
	l.fake.setFaults(nil)
	for range 4 {
		l.tick(25 * time.Hour)
		l.round()
		l.compare()
	}
	for _, o := range l.model.orders {
		if o.unpaid() || o.cancelling {
			l.fail("order %s is not settled", o.id)
		}
	}
	for _, p := range l.model.payments {
		switch {
		case !p.moved() || p.changed.After(p.order.made.Add(24*time.Hour)): // nobody promises to find it
		case p.state == "kept" && p.booked == p.back && p.order.status >= 0 && p.order.status <= 4:
		case p.state == "refunded" && p.back == p.amount:
		default:
			l.fail("payment %s is %s, %d of %d back", p.impUID, p.state, p.back, p.amount)
		}
	}
	if n := queryText(l.t, l.config.databaseURL, `SELECT count(*) FROM orders WHERE next_look_at IS NOT NULL`); n != "0" {
		l.fail("%s orders are still to be looked at", n)
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
}

type modelPainting struct {
	id      string
	forSale bool
	owner   *modelOrder // nil: in stock
}

type modelOrder struct {
	id, buyer, number string
	paintings         []*modelPainting
	status            int
	ended             string // deleted, replaced, expired
	cancelling        bool
	made, until       time.Time
	silent            time.Time // when the gateway last did not answer the reconciler about it
	history           []string
}

type modelPayment struct {
	impUID           string
	order            *modelOrder // nil: of another shop
	status           string      // at the gateway, before any refund: paid, ready, failed
	foreign, sandbox bool
	amount, back     int64     // at the gateway, back of amount was given back
	changed          time.Time // when money last moved at the gateway

	state, reason string // in our books; empty: unknown there
	booked        int64  // of back, what our books know
}

// trouble is how the gateway fails for the length of a move.
type trouble struct {
	name   string
	lookUp bool  // look-ups answer 500
	cancel fault // of every cancel
	status int   // what our answer is when a cancel has failed so
	after  bool  // look-ups after a cancel answer 500
}

var noTrouble = trouble{}

var troubles = []trouble{
	{name: "look-ups fail", lookUp: true},
	{name: "cancels fail", cancel: fault{before: answer500}, status: 503},
	{name: "cancels are dropped, and all is silent then", cancel: fault{before: dropConnection}, status: 503, after: true},
	{name: "cancels are refused", cancel: fault{before: answerRefusal(-1, "거절")}, status: 502},
	{name: "cancels are done and their answers lost", cancel: fault{after: dropConnection}, status: 503},
	{name: "cancels are done, and all is silent then", cancel: fault{after: answer500}, status: 503, after: true},
}

// reply is a status and the message with it.
type reply struct {
	status  int
	message string
}

var (
	gatewaySilent  = reply{503, "결제 서비스가 응답하지 않습니다. 잠시 후 다시 시도해 주세요"}
	nobodyAsks     = reply{401, "로그인이 필요합니다"}
	noSuchOrder    = reply{404, "해당 주문내역이 존재하지 않습니다"}
	paintingsTaken = reply{409, "이미 판매되었거나 다른 구매자가 결제 중인 작품이 있습니다"}
)

const orderTotal = 109000 // of one painting; each more is 99,000

func (o *modelOrder) total() int64 { return orderTotal + 99000*int64(len(o.paintings)-1) }

func (o *modelOrder) unpaid() bool { return o.status == -1 && o.ended == "" }

func (o *modelOrder) note(why string) { o.history = append(o.history, why) }

// seenBy reports whether the order exists for user: its buyer and the administrator.
func (o *modelOrder) seenBy(user string) bool {
	return o != nil && o.ended == "" && (user == o.buyer || user == adminID)
}

// end lets an unpaid order go.
func (o *modelOrder) end(why string) {
	o.ended = why
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

func (o *modelOrder) take() {
	for _, p := range o.paintings {
		p.owner = o
	}
}

// takenFor reports whether buyer cannot have the painting.
func (p *modelPainting) takenFor(buyer string) bool {
	return !p.forSale || p.owner != nil && !(p.owner.unpaid() && p.owner.buyer == buyer)
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

// create makes order o or says why not. The answer's order may be one that was made before.
func (m *model) create(o *modelOrder) (reply, *modelOrder) {
	twin := m.live(o.buyer, func(x *modelOrder) bool { return x.number == o.number })
	switch {
	case twin != nil && !sameSet(twin.paintingIDs(), o.paintingIDs()):
		return reply{409, "result.id: 다른 주문에 이미 사용된 주문 번호입니다"}, nil
	case twin != nil:
		return reply{201, "주문서 생성 성공"}, twin
	case slices.ContainsFunc(o.paintings, func(p *modelPainting) bool { return p.takenFor(o.buyer) }):
		return paintingsTaken, nil
	}
	if unpaid := m.live(o.buyer, (*modelOrder).unpaid); unpaid != nil {
		unpaid.end("replaced")
	}
	o.note("created")
	o.take()
	m.orders = append(m.orders, o)
	return reply{201, "주문서 생성 성공"}, o
}

func (o *modelOrder) paintingIDs() (ids []string) {
	for _, p := range o.paintings {
		ids = append(ids, p.id)
	}
	return ids
}

// moved reports whether money moved with the payment at all, ours or not.
func (p *modelPayment) moved() bool { return p.status == "paid" && !p.sandbox && p.order != nil }

// settle is what becomes of a payment that we look at.
func (m *model) settle(p *modelPayment) {
	o := p.order
	switch {
	case !p.moved() || p.state == "refunded":
	case p.back == p.amount:
		m.refunded(p, "refunded at the gateway")
	case p.state != "":
		if p.state == "kept" && p.back > p.booked {
			o.note("partly refunded")
		}
		p.booked = p.back
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
}

// revivable reports whether an order that has ended can have its paintings again: all are in stock, or held by its
// buyer's own unpaid order. An order number has one live order, so another paid one with this number is in its way.
func (m *model) revivable(o *modelOrder) bool {
	return !slices.ContainsFunc(o.paintings, func(p *modelPainting) bool { return p.takenFor(o.buyer) }) &&
		m.live(o.buyer, func(x *modelOrder) bool { return x.number == o.number && x.status >= 0 }) == nil
}

func (m *model) pay(o *modelOrder, p *modelPayment) {
	why := "paid"
	if o.ended != "" {
		why = "revived"
		overlaps := func(p *modelPainting) bool { return slices.Contains(o.paintings, p) }
		if rival := m.live(o.buyer, (*modelOrder).unpaid); rival != nil &&
			(rival.number == o.number || slices.ContainsFunc(rival.paintings, overlaps)) {
			rival.end("replaced")
		}
		o.take()
	}
	o.status, o.ended = 0, ""
	o.note(why)
	p.state = "kept"
	o.note("payment kept")
}

// refund books that a payment's money goes back, and sends it back. It reports our answer's status: 200 when it is back.
func (m *model) refund(p *modelPayment, reason string) (status int) {
	p.state, p.reason, p.booked = "refunding", reason, p.back
	p.order.note("refunding: " + reason)
	return m.cancel(p)
}

// cancel is one attempt at a refund that is booked: the gateway compares what we believe is left of a payment in won.
func (m *model) cancel(p *modelPayment) (status int) {
	status = cmp.Or(m.trouble.status, 200)
	if m.trouble.cancel.before == nil {
		switch {
		case p.back == p.amount, p.booked != p.back && !p.foreign:
			status = cmp.Or(m.trouble.status, 502)
		default:
			p.back, p.changed = p.amount, m.now
		}
	}
	if status != 200 && (m.trouble.after || m.trouble.lookUp) {
		return status
	}
	m.settle(p)
	if p.state == "refunded" {
		return 200
	}
	return status
}

// refundAgain is a further attempt: it looks first.
func (m *model) refundAgain(p *modelPayment) (status int) {
	if m.trouble.lookUp {
		return 503
	}
	if m.settle(p); p.state == "refunded" {
		return 200
	}
	return m.cancel(p)
}

// refunded books that a payment is back, whole. The order goes with the payment it was paid with.
func (m *model) refunded(p *modelPayment, reason string) {
	cancels := p.state == "kept" || p.reason == "buyer cancelled" || p.reason == "shop cancelled"
	p.state, p.reason, p.booked = "refunded", cmp.Or(p.reason, reason), p.amount
	p.order.note("refunded: " + p.reason)
	if cancels {
		p.order.status, p.order.cancelling = 5, false
		p.order.note("cancelled")
		p.order.free()
	}
}

// report is a payment that the browser tells us of.
func (m *model) report(p *modelPayment) reply {
	switch {
	case m.trouble.lookUp:
		return gatewaySilent
	case p == nil || p.order == nil || p.sandbox:
		return reply{404, "imp_uid: 해당 결제 내역이 존재하지 않습니다"}
	}
	m.settle(p)
	switch {
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

// noticed is report for the gateway itself, which is told no more than that we have seen it.
func (m *model) noticed(p *modelPayment) reply {
	if r := m.report(p); r == gatewaySilent {
		return r
	}
	return reply{200, "확인했습니다"}
}

// check settles all that the gateway has for an order, first what is paid and then what was given back, the oldest first.
// An unpaid order for which nothing is paid is left alone. False: the gateway does not answer.
func (m *model) check(o *modelOrder) bool {
	if m.trouble.lookUp {
		return false
	}
	var paid, back []*modelPayment
	for _, p := range m.payments {
		switch {
		case p.order != o || !p.moved():
		case p.back == 0:
			paid = append(paid, p)
		default:
			back = append(back, p)
		}
	}
	if !o.unpaid() || len(paid) > 0 {
		for _, p := range append(paid, back...) {
			m.settle(p)
		}
	}
	return true
}

// reconcile looks at an order whose time has come: an unpaid one ends when its hold is over, but not before the gateway
// was asked, or was silent for as long again.
func (m *model) reconcile(o *modelOrder, hold time.Duration) {
	unpaid := o.unpaid()
	looked := m.check(o)
	if !looked {
		o.silent = m.now
	}
	if unpaid && o.unpaid() && !m.now.Before(o.until) && (looked || !m.now.Before(o.made.Add(2*hold))) {
		o.end("expired")
	}
}

// delete is DELETE /api/orders/:id; a nil wanted is no status.
func (m *model) delete(user string, o *modelOrder, wanted *int) reply {
	switch {
	case user == "":
		return nobodyAsks
	case !o.seenBy(user):
		return noSuchOrder
	case !o.unpaid():
		return m.deletePaid(user, o, wanted)
	case !m.check(o):
		return gatewaySilent
	case !o.unpaid():
		return reply{409, "결제가 확인되어 주문이 완료되었습니다. 취소하려면 다시 요청해 주세요"}
	}
	o.end("deleted")
	return reply{200, "결제 오류로 임시 주문서를 삭제했습니다"}
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
		o.status = 4
		o.note("return requested")
		return reply{200, "해당 주문의 반품 요청이 완료되었습니다"}
	case o.status == 4 && user != adminID:
		return reply{409, "반품을 요청한 주문입니다. 반품이 확인되면 환불됩니다"}
	case o.status != 0 && o.status != 4:
		return reply{409, "발송 준비가 시작된 주문은 취소할 수 없고 반품만 신청할 수 있습니다"}
	}
	if status := m.cancelOrder(user, o); status != 200 {
		return reply{status, "결제 취소를 접수했으나 환불이 아직 완료되지 않았습니다. 자동으로 다시 시도합니다"}
	}
	return reply{200, "해당 주문의 결제 취소가 완료되었습니다"}
}

func (m *model) cancelOrder(user string, o *modelOrder) (status int) {
	i := slices.IndexFunc(m.payments, func(p *modelPayment) bool {
		return p.order == o && (p.state == "kept" || p.reason == "buyer cancelled" || p.reason == "shop cancelled")
	})
	if o.cancelling {
		return m.refundAgain(m.payments[i])
	}
	o.cancelling = true
	o.note("cancel requested")
	reason := "buyer cancelled"
	if user == adminID {
		reason = "shop cancelled"
	}
	p := m.payments[i]
	p.state, p.reason = "refunding", reason
	o.note("refunding: " + reason)
	return m.cancel(p)
}

// advance is PATCH /api/orders/:id.
func (m *model) advance(user string, o *modelOrder, to int) reply {
	messages := map[int]string{1: "해당 주문이 발송 준비 중 단계로 변경되었습니다", 2: "해당 주문이 배송 중 단계로 변경되었습니다",
		3: "해당 주문이 배송 완료 단계로 변경되었습니다", 4: "해당 주문의 반품 요청 단계로 변경되었습니다"}
	onward := to >= 1 && to <= 3
	switch {
	case user == "":
		return nobodyAsks
	case !o.seenBy(user):
		return noSuchOrder
	case onward && user != adminID:
		return reply{403, "관리자만 사용할 수 있습니다"}
	case o.cancelling, onward && o.status != to-1, !onward && (to != 4 || o.status < 1 || o.status > 3):
		return reply{400, "변경실패, 진행 단계가 알맞지 않습니다"}
	}
	o.status = to
	o.note([]string{"preparing", "shipping", "delivered", "return requested"}[to-1])
	return reply{200, messages[to]}
}

// sameSet reports whether a and b, each without repeats, have the same elements.
func sameSet(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}
