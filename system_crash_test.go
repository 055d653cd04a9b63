package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var (
	crashFor  = flag.Duration("crash", 2*time.Second, "how long TestCrash lets things break")
	crashSeed = flag.Uint64("crash.seed", 0, "the choices TestCrash makes; 0: new ones")
	crashVia  = flag.String("crash.via", "", "how TestCrash's buyers pay: v1, v2 or approval; empty: each chooses")
)

const (
	crashBuyers    = 16
	crashPaintings = 200
	crashHold      = time.Second            // ORDER_HOLD
	crashPatience  = 3 * time.Second        // how long a buyer waits for an answer
	crashLatency   = 20 * time.Millisecond  // of the gateway
	crashInterval  = 100 * time.Millisecond // RECONCILE_INTERVAL
	crashListDelay = 3 * time.Second        // how late the gateway's lists show what moved
	crashAccount   = "000-1234-567890"      // where a virtual account's refund goes
)

// crash is a shop in which everything breaks: two replicas of the real binary before a PostgreSQL that really writes,
// and a gateway. Every actor (buyer, administrator, the gateway's console, the faults of the machine and of the gateway) has a
// random number generator of its own, so that a seed gives each the same choices again; their order in time is the machine's
// choice.
type crash struct {
	t         *testing.T
	seed      uint64
	binary    string
	env       []string
	log       *os.File
	postgres  *postgresServer
	fake      *testGateway
	replicas  [2]*crashReplica
	paintings []string
	over      context.Context // ends when the actors go home
	calm      chan struct{}   // closed when the gateway fails no more
	calmAt    time.Time       // when that was
	errands   sync.WaitGroup  // late notices and second reports, still under way

	promises
	mu       sync.Mutex
	orders   map[string]*crashOrder
	verdicts map[string]string // by imp_uid: what PATCH pay said of the money
	answers  map[int]int       // by status
	faults   map[string]int    // by kind
	figures  map[string]int
}

// What PATCH pay may say of a payment's money.
const (
	saidKept       = "kept"
	saidBack       = "goes back"
	saidNotCharged = "not charged"
)

// crashOrder is what was asked of an order.
type crashOrder struct {
	deleted     bool     // the service said so
	charged     bool     // money was paid for it
	refundAsked bool     // by its buyer, the shop, or in the gateway's console
	steppedBack bool     // it was asked to go back, so that what was said of its status need not last
	cancelled   []string // paintings that the service said to be cancelled
}

func TestCrash(t *testing.T) {
	heavy(t)
	c := openCrash(t)
	stopReplicas := c.runReplicas()
	over, goHome := context.WithCancel(t.Context())
	defer goHome()
	c.over = over
	var actors sync.WaitGroup
	for i := range crashBuyers {
		actors.Go(func() { (&crashBuyer{crash: c, rng: c.newRNG(uint64(100 + i))}).live() })
	}
	actors.Go(func() { c.runAdmin(c.newRNG(1)) })
	actors.Go(func() { c.injectFault(c.newRNG(2), goHome) })
	actors.Go(func() { c.runConsole(c.newRNG(4)) })
	actors.Wait()
	c.errands.Wait()
	c.calmAt = time.Now()
	close(c.calm)
	for _, ahead := range []string{"30 seconds", "1 hour"} {
		stopReplicas()
		c.endLeases()
		stopReplicas = c.runReplicas()
		c.settleDown(ahead)
	}
	c.wantProof()
	stopReplicas()
	c.printFigures()
}

// openCrash builds the binary, starts PostgreSQL and the gateway, and imports the catalogue.
func openCrash(t *testing.T) *crash {
	c := &crash{
		t: t, seed: cmp.Or(*crashSeed, rand.Uint64N(1e9)), binary: filepath.Join(t.TempDir(), "lumiere"), calm: make(chan struct{}),
		orders: map[string]*crashOrder{}, verdicts: map[string]string{}, answers: map[int]int{}, faults: map[string]int{}, figures: map[string]int{"mismatches": 0},
		replicas: [2]*crashReplica{{}, {}},
	}
	if *crashVia != "" && !slices.Contains(waysToPay, payVia(*crashVia)) {
		t.Fatalf("-crash.via is none of %q", waysToPay)
	}
	t.Logf("-crash %v -crash.seed %d -crash.via %q", *crashFor, c.seed, *crashVia)
	c.openLog()
	built := make(chan error, 1)
	go func() {
		out, err := exec.Command("go", "build", "-o", c.binary, ".").CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, out)
		}
		built <- err
	}()
	c.postgres = runPostgres(t, postgresConfig{dir: postgresDir(t)})
	check(t, <-built)

	c.fake = newTestGateway(time.Now)
	c.fake.listDelay = crashListDelay
	faultRNG := c.newRNG(3)
	c.fake.setFaults(func(call, _ string) fault { return c.chooseFault(faultRNG, call) })
	gateway := httptest.NewServer(c.fake)
	t.Cleanup(gateway.Close)
	c.env = append(os.Environ(), "DATABASE_URL="+makeServiceRole(t, c.postgres.url), "JWT_SECRET="+testSecret, "IAMPORT_URL="+gateway.URL,
		"IAMPORT_KEY="+c.fake.key, "IAMPORT_SECRET="+c.fake.secret,
		"PORTONE_URL="+gateway.URL+fakePortonePrefix, "PORTONE_API_SECRET="+c.fake.apiSecret, "PORTONE_STORE_ID="+c.fake.storeID, "PORT=0", "LOG_LEVEL=info", "TRUSTED_PROXIES=127.0.0.1",
		"ORDER_HOLD="+crashHold.String(), "RECONCILE_INTERVAL="+crashInterval.String())

	var entries []string
	for range crashPaintings {
		c.paintings = append(c.paintings, newTestID())
		entries = append(entries, catalogueEntry(c.paintings[len(c.paintings)-1], "", ""))
	}
	owner, err := openMigratedStore(t.Context(), c.postgres.url)
	check(t, err)
	owner.close()
	importing := c.command("import", "-")
	importing.Stdin = strings.NewReader("[" + strings.Join(entries, ",") + "]")
	if out, err := importing.CombinedOutput(); err != nil {
		t.Fatalf("import: %v\n%s", err, out)
	}
	return c
}

func (c *crash) newRNG(actor uint64) *rand.Rand { return rand.New(rand.NewPCG(c.seed, actor)) }

// command is the binary with the service's environment.
func (c *crash) command(args ...string) *exec.Cmd {
	cmd := exec.Command(c.binary, args...)
	cmd.Env = c.env
	return cmd
}

// openLog opens the file that the replicas log to. It stays when the test fails.
func (c *crash) openLog() {
	var err error
	c.log, err = os.CreateTemp("", "lumiere-crash-*.log")
	check(c.t, err)
	c.t.Cleanup(func() {
		c.log.Close()
		if !c.t.Failed() {
			os.Remove(c.log.Name())
			return
		}
		text, _ := os.ReadFile(c.log.Name())
		c.t.Logf("the replicas' log is %s; its end:\n%s", c.log.Name(), lastLines(text))
	})
}

// ---- what breaks

// crashReplica is one of the replicas.
type crashReplica struct {
	process atomic.Pointer[os.Process] // nil when it is down
	serving atomic.Pointer[string]     // its URL, nil until it serves
}

// url is where it serves; "" when it does not.
func (r *crashReplica) url() string {
	if at := r.serving.Load(); at != nil {
		return *at
	}
	return ""
}

// kill sends SIGKILL and reports whether there was anybody to send it to.
func (r *crashReplica) kill() bool {
	process := r.process.Load()
	return process != nil && process.Kill() == nil
}

// runReplicas keeps both replicas running, whatever ends them, until stop kills them. It returns when both serve.
func (c *crash) runReplicas() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, r := range c.replicas {
		running.Go(func() {
			for ctx.Err() == nil {
				c.runReplica(ctx, r)
				pause(ctx, 100*time.Millisecond)
			}
		})
	}
	stop = func() { cancel(); running.Wait() }
	c.t.Cleanup(stop)
	c.wait(func() string {
		if c.replicas[0].url() == "" || c.replicas[1].url() == "" {
			return "a replica does not serve"
		}
		return ""
	})
	return stop
}

// runReplica runs a replica until it ends. It logs into a pipe of ours: should this process die, so does the replica.
func (c *crash) runReplica(ctx context.Context, r *crashReplica) {
	cmd := exec.CommandContext(ctx, c.binary)
	cmd.Env = c.env
	logged, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		if ctx.Err() == nil {
			c.t.Error(err)
		}
		return
	}
	r.process.Store(cmd.Process)
	lines := bufio.NewScanner(logged)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		fmt.Fprintf(c.log, "%s\n", lines.Bytes())
		var said struct{ Msg, Address string }
		if json.Unmarshal(lines.Bytes(), &said) == nil && said.Msg == "serving" {
			at := "http://" + strings.Replace(said.Address, "[::]", "127.0.0.1", 1)
			r.serving.Store(&at)
		}
	}
	r.process.Store(nil)
	r.serving.Store(nil)
	cmd.Wait() // killed
}

// wait polls until nothing is left to wait for; three minutes are more than the slowest machine takes.
func (c *crash) wait(left func() string) {
	c.t.Helper()
	deadline := time.Now().Add(3 * time.Minute)
	for what := left(); what != ""; what = left() {
		if time.Now().After(deadline) {
			c.t.Fatal("waited in vain: ", what)
		}
		time.Sleep(postgresPoll)
	}
}

// injectFault kills a replica, now and then both or one that is just starting, whenever the service has given so many answers,
// and ends PostgreSQL in immediate mode twice, in a long run once in half a minute. In the end the actors go home.
func (c *crash) injectFault(rng *rand.Rand, goHome func()) {
	defer goHome()
	crashes, crashed, start := max(2, int(*crashFor/(30*time.Second))), 0, time.Now()
	for {
		// However slow the machine, the service comes to something between two blows and in all.
		answered, orders := c.progress()
		waiting := time.Now()
		for next := answered + rng.IntN(150); answered < next; answered, orders = c.progress() {
			if time.Since(waiting) > 3*time.Minute {
				c.t.Error("the service answers nothing any more")
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
		done := min(float64(time.Since(start))/float64(*crashFor), float64(orders)/60)
		if done >= 1 {
			return
		}
		victim, both, starting := rng.IntN(2), rng.IntN(5) == 0, rng.IntN(4) == 0
		for i, r := range c.replicas {
			if (i == victim || both) && (starting || r.url() != "") && r.kill() {
				c.count("replicas killed", 1)
			}
		}
		c.endListLeases()
		if done*float64(crashes) > float64(crashed)+0.5 {
			crashed++
			c.count("PostgreSQL crashes", 1)
			if err := errors.Join(c.postgres.crash(), c.postgres.start(context.Background())); err != nil {
				c.t.Error(err)
				return
			}
		}
	}
}

// progress is how many answers the service has given, and how many orders it has made.
func (c *crash) progress() (answers, orders int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for status, n := range c.answers {
		if status != 0 {
			answers += n
		}
	}
	return answers, len(c.given())
}

// chooseFault has one call in four go wrong, and every call take its time.
func (c *crash) chooseFault(rng *rand.Rand, call string) fault {
	slow := waitFor(func(ctx context.Context) { pause(ctx, crashLatency) })
	roll, hanging := rng.IntN(32), time.Duration(rng.Int64N(int64(min(*crashFor/10, 10*time.Second))))
	select {
	case <-c.calm:
		return fault{before: slow}
	default:
	}
	hang := func(w http.ResponseWriter, r *http.Request) bool {
		select {
		case <-r.Context().Done():
		case <-c.calm:
		case <-time.After(hanging):
		}
		return dropConnection(w, r)
	}
	kinds := []struct {
		name string
		fault
	}{
		{"answered 500", fault{before: inTurn(slow, answer500)}},
		{"dropped the call", fault{before: inTurn(slow, dropConnection)}},
		{"hung", fault{before: hang}},
		{"did it and answered 500", fault{before: slow, after: answer500}},
		{"did it and dropped the answer", fault{before: slow, after: dropConnection}},
		{"did it and hung", fault{before: slow, after: hang}},
		{"turned the token down", fault{before: inTurn(slow, answer401)}},
		{"refused", fault{before: inTurn(slow, refusals[call])}},
	}
	if roll >= len(kinds) || kinds[roll].name == "refused" && refusals[call] == nil {
		return fault{before: slow}
	}
	c.mu.Lock()
	c.faults[kinds[roll].name]++
	c.mu.Unlock()
	return kinds[roll].fault
}

// refusals are how the gateway refuses those calls that it may.
var refusals = map[string]faultHook{
	"cancel": answerRefusal(-1, "결제취소에 실패하였습니다."), "v2 cancel": refuseV2, "v2 confirm": refuseV2,
}

func (c *crash) count(figure string, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.figures[figure] += n
}

// ---- who uses it

// crashBuyer is one of the buyers. After some orders the buyer goes on under another id: orders of one buyer are limited.
type crashBuyer struct {
	*crash
	id    string
	ids   []string // all so far
	via   payVia   // how the buyer pays under this id
	made  int      // orders
	rng   *rand.Rand
	pages int // of the buyer's list of orders
}

const crashOrdersOfABuyer = 15

// live comes back to the shop until it closes.
func (b *crashBuyer) live() {
	for b.over.Err() == nil {
		if len(b.ids) <= b.made/crashOrdersOfABuyer {
			b.id = newTestID()
			b.ids = append(b.ids, b.id)
			b.via = cmp.Or(payVia(*crashVia), waysToPay[b.rng.IntN(len(waysToPay))])
		}
		b.visit()
		b.giveBack()
		pause(b.over, time.Duration(b.rng.IntN(50))*time.Millisecond)
	}
}

// visit makes an order and does with it whatever buyers do.
func (b *crashBuyer) visit() {
	order, total := b.order()
	if order == "" {
		return
	}
	if b.rng.IntN(8) == 0 { // too late, or nearly
		pause(b.over, time.Duration(b.rng.Int64N(int64(3*crashHold))))
	}
	switch roll := b.rng.IntN(23); {
	case roll < 9:
		b.pay(order, fakePayment{Amount: total})
	case roll < 11:
		b.pay(order, fakePayment{Amount: total - 1000})
	case roll < 12:
		b.pay(order, fakePayment{Amount: 100, Currency: "USD"})
	case roll < 13:
		b.pay(order, fakePayment{Amount: total, Status: []string{"ready", "failed"}[b.rng.IntN(2)]})
	case roll < 15: // in two windows
		b.pay(order, fakePayment{Amount: total})
		b.pay(order, fakePayment{Amount: total})
	case roll < 16: // at a second try
		b.pay(order, fakePayment{Amount: total + 1000})
		b.pay(order, fakePayment{Amount: total})
	case roll < 17: // and deletes it at once
		b.pay(order, fakePayment{Amount: total})
		b.remove(b.id, b.rng, order, "")
	case roll < 18:
		b.remove(b.id, b.rng, order, "")
	case roll < 20: // and pays in a window that was left open, when others may have the paintings
		b.remove(b.id, b.rng, order, "")
		pause(b.over, time.Duration(b.rng.Int64N(int64(crashHold))))
		b.pay(order, fakePayment{Amount: total})
	case roll < 21:
		b.payByAccount(order, total)
	default: // closes the tab
	}
}

// order makes an order of up to three paintings; id is "" if it is not made. When no answer comes the buyer sends it again.
func (b *crashBuyer) order() (id string, total int64) {
	var cart []string
	for _, i := range b.rng.Perm(len(b.paintings))[:1+b.rng.IntN(3)] {
		cart = append(cart, b.paintings[i])
	}
	again := 0
	shop := simulation{&b.promises, func(user, method, path string, body any) (a answer) {
		for a.status == 0 && again < 3 {
			a, again = b.call(b.rng, user, method, path, body), again+1
		}
		return a
	}}
	id, a := shop.order(b.id, cart...)
	switch {
	case id != "":
		b.made++
	case a.message() == messageConfirming: // for as long as confirmationLease, when an answer was lost
		b.made = crashOrdersOfABuyer * len(b.ids)
	}
	return id, int64(10000 + 99000*len(cart))
}

// payByAccount has a virtual account issued and may pay into it, before the service ends it or too late for that.
func (b *crashBuyer) payByAccount(order string, total int64) {
	b.count("virtual accounts issued", 1)
	impUID := b.pay(order, fakePayment{Amount: total, Status: "ready", PayMethod: "vbank"})
	b.later(func(rng *rand.Rand) {
		if b.fake.act(impUID, false, b.fake.payIn) == nil {
			b.count("deposits", 1)
			b.notify(rng, impUID)
		}
	})
}

// notify gives the gateway's notice of a payment, or loses it.
func (c *crash) notify(rng *rand.Rand, impUID string) {
	if rng.IntN(2) == 0 {
		return
	}
	p, _ := c.fake.get(impUID)
	_, body := c.fake.noticeOf(p)
	c.call(rng, "", "POST", "/api/payments/webhook", []string{string(body), formOf(p)}[rng.IntN(2)])
}

// pay pays in the gateway's window. The browser may report it, once or more, and notices may come, late or never. Now and then
// nobody reports a payment. The refund of some is refused for good. When there is no further payment for the order, impUID is "".
func (b *crashBuyer) pay(order string, p fakePayment) (impUID string) {
	b.change(order, func(o *crashOrder) { o.charged = true })
	if p.Status == "" && b.rng.IntN(10) == 0 {
		p.RefundsRefused = "거래가 정지된 카드입니다."
	}
	impUID = b.via.window(b.fake, order, p)
	if impUID == "" {
		return ""
	}
	if b.rng.IntN(5) == 0 {
		b.count("payments nobody reported", 1)
		return impUID
	}
	for range []int{0, 1, 2, 2, 4}[b.rng.IntN(5)] {
		b.later(func(rng *rand.Rand) { b.notify(rng, impUID) })
	}
	switch b.rng.IntN(6) {
	case 0: // closes the tab
	case 1:
		b.later(func(rng *rand.Rand) { b.report(rng, order, impUID) })
		fallthrough
	default:
		b.report(b.rng, order, impUID)
	}
	return impUID
}

// simulation is the shop as one who calls it sees it.
func (c *crash) simulation(rng *rand.Rand) simulation {
	return simulation{&c.promises, func(user, method, path string, body any) answer { return c.call(rng, user, method, path, body) }}
}

// report tells the service of a payment, and keeps what it says of the money.
func (c *crash) report(rng *rand.Rand, order, impUID string) {
	p, _ := c.fake.get(impUID)
	a, verdict := c.simulation(rng).report(order, reportOf(p)), ""
	switch text := a.message(); {
	case a.status == 200:
		verdict = saidKept
		c.count("reports answered 200", 1)
	case strings.Contains(text, "결제하지 않았습니다"):
		verdict = saidNotCharged
		c.count("reports answered that nothing was charged", 1)
	case text == messageConfirming, strings.HasPrefix(text, "가상계좌"):
	case a.status == 409, strings.HasPrefix(text, "금액 불일치"):
		verdict = saidBack
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if verdict != "" && c.verdicts[impUID] != saidNotCharged { // which is so for ever
		c.verdicts[impUID] = verdict
	}
}

// giveBack cancels or returns most of what the buyer has bought, now and then twice at once. Some returns are withdrawn.
func (b *crashBuyer) giveBack() {
	var mine myOrders
	user := b.ids[b.rng.IntN(len(b.ids))]
	a := b.call(b.rng, user, "GET", fmt.Sprintf("/api/orders/mine?pageNumber=%d", 1+b.rng.IntN(max(1, b.pages))), nil)
	json.Unmarshal([]byte(a.body), &mine)
	b.pages = mine.Pages
	for _, o := range mine.Orders {
		body := []string{"", `{"status":5}`, `{"status":4}`, `{"status":4}`}[b.rng.IntN(4)]
		switch {
		case b.rng.IntN(3) == 0:
			continue
		case o.Result.Status >= statusPaid && b.rng.IntN(3) == 0:
			b.changePart(user, b.rng, o.ID, o.Result.Status, o.OrderItems, "")
		case o.Result.Status == statusReturning:
			b.stepBack(user, b.rng, o.ID, b.rng.IntN(statusReturning)) // the list does not say where it came from
		case o.Result.Status >= statusPaid && o.Result.Status <= statusDelivered:
			if b.rng.IntN(5) == 0 {
				b.later(func(rng *rand.Rand) { b.remove(user, rng, o.ID, body) })
			}
			b.remove(user, b.rng, o.ID, body)
		}
	}
}

// changePart cancels or returns one painting of an order, or takes its return back. With a state it is one in that state. A part
// that goes back may be the last one.
func (c *crash) changePart(user string, rng *rand.Rand, order string, status int, items json.RawMessage, state string) {
	var shown []shownItem
	json.Unmarshal(items, &shown)
	var products []string
	for _, item := range shown {
		if state == "" && item.State != "cancelled" || state == item.State {
			products = append(products, item.Product)
		}
	}
	if len(products) == 0 {
		return
	}
	what := []string{"cancel", "return", "return", "withdraw"}[rng.IntN(4)]
	if state == "returning" {
		what = "cancel"
	}
	product := products[rng.IntN(len(products))]
	body := map[string]any{"status": map[string]int{"cancel": 5, "return": 4, "withdraw": status}[what], "products": []string{product}}
	method := "DELETE"
	switch what {
	case "withdraw":
		method = "PATCH"
		c.change(order, func(o *crashOrder) { o.steppedBack = true })
	case "cancel":
		c.change(order, func(o *crashOrder) { o.refundAsked = true })
	}
	if c.call(rng, user, method, "/api/orders/"+order, body).status != 200 {
		return
	}
	c.count("paintings: "+what+" answered 200", 1)
	if what == "cancel" {
		c.change(order, func(o *crashOrder) { o.cancelled = append(o.cancelled, product) })
	}
}

// stepBack moves an order back to a status, if it may go there.
func (c *crash) stepBack(user string, rng *rand.Rand, order string, status int) {
	c.change(order, func(o *crashOrder) { o.steppedBack = true })
	if c.call(rng, user, "PATCH", "/api/orders/"+order, map[string]int{"status": status}).status == 200 {
		c.count("steps back answered 200", 1)
	}
}

// remove deletes, cancels or returns an order, as the body says, and keeps what the service says.
func (c *crash) remove(user string, rng *rand.Rand, order, body string) {
	if !strings.Contains(body, "4") {
		c.change(order, func(o *crashOrder) { o.refundAsked = true })
	}
	switch a := c.simulation(rng).remove(user, order, body); {
	case a.status != 200:
	case a.message() == "해당 주문의 결제 취소가 완료되었습니다":
		c.count("cancels answered 200", 1)
	case a.message() == "해당 주문의 반품 요청이 완료되었습니다":
		c.count("returns answered 200", 1)
	default:
		c.count("deletions answered 200", 1)
		c.change(order, func(o *crashOrder) { o.deleted = true })
	}
}

// runAdmin moves orders on and some of them back, cancels what was returned and now and then what was just paid, helps refunds
// that the gateway refuses, and takes paintings off sale and puts them back.
func (c *crash) runAdmin(rng *rand.Rand) {
	for c.over.Err() == nil {
		var list adminOrders
		query := []string{"pageNumber=1", "pageNumber=2", "status=0", "status=4"}[rng.IntN(4)]
		a := c.call(rng, adminID, "GET", "/api/orders?"+query, nil)
		json.Unmarshal([]byte(a.body), &list)
		for _, o := range list.Orders {
			switch status := o.Result.Status; {
			case rng.IntN(3) == 0:
				c.changePart(adminID, rng, o.ID, status, o.OrderItems, "returning")
			case status == statusReturning && rng.IntN(4) > 0, status == statusPaid && rng.IntN(20) == 0:
				c.remove(adminID, rng, o.ID, "")
			case status == statusReturning:
				c.stepBack(adminID, rng, o.ID, rng.IntN(statusReturning))
			case status >= statusPreparing && status <= statusDelivered && rng.IntN(6) == 0:
				c.stepBack(adminID, rng, o.ID, status-1)
			case status <= statusShipping && rng.IntN(3) == 0:
				if c.call(rng, adminID, "PATCH", "/api/orders/"+o.ID, map[string]int{"status": status + 1}).status == 200 {
					c.said(o.ID, status+1)
				}
			}
		}
		switch rng.IntN(6) {
		case 0:
			c.helpRefunds(rng)
		case 1, 2:
			body := []string{`{"forSale":true}`, `{"forSale":false}`}[rng.IntN(8)/7]
			c.call(rng, adminID, "PATCH", "/api/products/"+c.paintings[rng.IntN(len(c.paintings))], body)
		}
		pause(c.over, time.Duration(rng.IntN(50))*time.Millisecond)
	}
}

// helpRefunds does for refunds that need a person what a person does: it names the account that a virtual account's refund goes
// to, and books as paid back by hand what the gateway never gives back. The payments of an order are in the gateway's console.
func (c *crash) helpRefunds(rng *rand.Rand) {
	var list adminOrders
	json.Unmarshal([]byte(c.call(rng, adminID, "GET", "/api/orders?refund=stuck", nil).body), &list)
	for _, o := range list.Orders {
		for _, p := range c.fake.all() {
			if p.MerchantUID != o.ID || p.PaidAt.IsZero() || p.Cancelled == p.Amount {
				continue
			}
			body := map[string]any{"imp_uid": p.ImpUID, "account": map[string]string{"holder": "홍길동", "bank": "은행", "number": crashAccount}}
			if p.RefundsRefused != "" && rng.IntN(4) > 0 {
				body = map[string]any{"imp_uid": p.ImpUID, "byHand": "은행 송금"}
			}
			if c.call(rng, adminID, "POST", "/api/orders/"+o.ID+"/refund", body).status == 200 {
				c.count("refunds helped", 1)
			}
		}
	}
}

// runConsole gives money back in the gateway's console, all of it or a part, and lets card companies take it back. It leaves
// alone what a person may book as paid back by hand: to give that back once more is a mistake that the audit reports.
func (c *crash) runConsole(rng *rand.Rand) {
	for c.over.Err() == nil {
		pause(c.over, time.Duration(rng.Int64N(int64(min(*crashFor/5, 4*time.Second)))))
		all := c.fake.all()
		if len(all) == 0 {
			continue
		}
		p := all[len(all)-1-rng.IntN(min(len(all), 50))]
		left := p.Amount - p.Cancelled
		if p.RefundsRefused != "" || p.PaidAt.IsZero() || left == 0 {
			continue
		}
		c.change(p.MerchantUID, func(o *crashOrder) { o.refundAsked = true })
		name, amount := "refunds in the console", left
		act := func(p *fakePayment) string { return c.fake.refund(p, amount, fakeInConsole) }
		switch rng.IntN(3) {
		case 0:
			name, act = "chargebacks", c.fake.takeBack
		case 1:
			name, amount = "part refunds in the console", (left+1)/2
		}
		if c.fake.act(p.ImpUID, false, act) == nil {
			c.count(name, 1)
			c.notify(rng, p.ImpUID)
		}
	}
}

// later runs an errand after up to two holds, with a generator of its own; its actor does not wait for it.
func (b *crashBuyer) later(errand func(*rand.Rand)) {
	rng := rand.New(rand.NewPCG(b.rng.Uint64(), 0))
	delay := time.Duration(rng.IntN(2)) * time.Duration(rng.Int64N(int64(2*crashHold)))
	b.errands.Go(func() {
		pause(b.over, delay)
		errand(rng)
	})
}

// call makes a request as user. The zero answer says that none came.
func (c *crash) call(rng *rand.Rand, user, method, path string, body any) answer {
	a, err := c.send(rng, user, method, path, body)
	if err != nil {
		a = answer{}
	}
	c.mu.Lock()
	c.answers[a.status]++
	c.mu.Unlock()
	switch a.status {
	case 0, http.StatusServiceUnavailable, http.StatusTooManyRequests: // no client tries again at once
		pause(c.over, time.Duration(50+rng.IntN(200))*time.Millisecond)
	case http.StatusOK, http.StatusCreated, http.StatusBadRequest, http.StatusForbidden, http.StatusNotFound, http.StatusConflict,
		http.StatusBadGateway, http.StatusGatewayTimeout:
	default:
		c.t.Errorf("%s %s, request %s: %s", method, path, a.header.Get("X-Request-Id"), a.body)
	}
	return a
}

// send makes a request of either replica, that which serves if only one does.
func (c *crash) send(rng *rand.Rand, user, method, path string, body any) (a answer, err error) {
	replica, address := rng.IntN(2), fmt.Sprintf("10.0.%d.%d", rng.IntN(256), rng.IntN(256))
	authorization := ""
	if user != "" {
		token, err := newTokens([]byte(testSecret), time.Now).issue(caller{id: user, admin: user == adminID}, time.Now(), time.Hour)
		if err != nil {
			return a, err
		}
		authorization = "Bearer " + token
	}
	ctx, cancel := context.WithTimeout(context.Background(), crashPatience)
	defer cancel()
	url := cmp.Or(c.replicas[replica].url(), c.replicas[1-replica].url()) + path
	request, err := newCall(ctx, method, url, authorization, body)
	if err != nil {
		return a, err
	}
	request.Header.Set("X-Forwarded-For", address)
	return exchange(http.DefaultClient.Do, request)
}

// change notes something of an order.
func (c *crash) change(order string, do func(*crashOrder)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	o := c.orders[order]
	if o == nil {
		o = &crashOrder{}
		c.orders[order] = o
	}
	do(o)
}

// ---- when the dust settles

// endLeases makes the next round of the reconciler the one at which everything planned is due. It only
// saves time: the holders of the leases are dead, what is due later would come by itself, and what is not planned stays so.
func (c *crash) endLeases() {
	execSQL(c.t, c.postgres.url, `UPDATE payments SET next_attempt_at = now(), leased_until = now() WHERE state = 'refunding'`)
	execSQL(c.t, c.postgres.url, `UPDATE part_refunds SET next_attempt_at = now(), leased_until = now() WHERE state = 'booked'`)
	execSQL(c.t, c.postgres.url, `UPDATE orders SET confirming_until = now() WHERE confirming_until > now()`)
	execSQL(c.t, c.postgres.url, `UPDATE orders SET next_look_at = now() WHERE next_look_at IS NOT NULL`)
	c.endListLeases()
}

// endListLeases has the gateway's lists read on though their reader may be dead. A second reader does no harm.
func (c *crash) endListLeases() {
	execSQL(c.t, c.postgres.url, `UPDATE gateway_lists SET leased_until = now()`)
}

// settleDown waits until nothing is left to be done but what is planned for later than that: first the leases of what
// the reconciler has just looked at, then only the looks a day after an order's last change. Refunds that need a person get
// one; that they need one shows after few attempts, which are not waited for either.
func (c *crash) settleDown(ahead string) {
	rng, listed := c.newRNG(5), c.calmAt.Add(crashListDelay+time.Second).UTC().Format(time.RFC3339Nano)
	c.wait(func() string {
		execSQL(c.t, c.postgres.url, `UPDATE payments SET next_attempt_at = now() WHERE state = 'refunding' AND leased_until <= now()`)
		execSQL(c.t, c.postgres.url, `UPDATE part_refunds SET next_attempt_at = now() WHERE state = 'booked' AND leased_until <= now()`)
		c.helpRefunds(rng)
		return queryText(c.t, c.postgres.url, `SELECT concat_ws(', ',
			(SELECT count(*) || ' refunds' FROM payments WHERE state = 'refunding' HAVING count(*) > 0),
			(SELECT count(*) || ' part refunds' FROM part_refunds WHERE state = 'booked' HAVING count(*) > 0),
			(SELECT count(*) || ' unpaid orders' FROM orders WHERE status = -1 AND ended IS NULL HAVING count(*) > 0),
			(SELECT 'a list' FROM gateway_lists HAVING count(*) FILTER (WHERE read_until > '`+listed+`') < 4),
			(SELECT count(*) || ' cancels' FROM orders WHERE cancelling_since IS NOT NULL HAVING count(*) > 0),
			(SELECT count(*) || ' looks' FROM orders WHERE next_look_at < now() + interval '`+ahead+`' HAVING count(*) > 0))`)
	})
}

// wantProof fails the test for every won and painting that is not where it belongs, and for every word that was not kept.
func (c *crash) wantProof() {
	if out, err := c.command("audit").CombinedOutput(); err != nil {
		c.t.Errorf("lumiere audit: %v\n%s", err, out)
	}
	if n := queryText(c.t, c.postgres.url, `SELECT count(*) FROM payments WHERE refund_account IS NOT NULL`); n != "0" {
		c.t.Errorf("%s accounts for refunds are kept after the refunds", n)
	}
	if text, err := os.ReadFile(c.log.Name()); err != nil || strings.Contains(string(text), crashAccount) {
		c.t.Errorf("the log names an account for a refund: %v", err)
	}
	statuses, live := orderStatuses(c.t, c.postgres.url, "true"), orderStatuses(c.t, c.postgres.url, "ended IS NULL")
	c.count("orders", len(statuses))
	given := c.given()
	for order, status := range given {
		if o := c.orders[order]; o != nil && o.steppedBack && status < statusCancelled {
			given[order] = min(status, statusPaid)
		}
	}
	for order, problem := range broken(given, statuses) {
		c.mismatch(order, "%s", problem)
	}
	var cancelled map[string][]string
	check(c.t, json.Unmarshal([]byte(queryText(c.t, c.postgres.url,
		`SELECT coalesce(json_object_agg(id, cancelled_ids), '{}')::text FROM orders WHERE cancelled_ids <> '{}'`)), &cancelled))
	c.count("orders of which a part was cancelled", len(cancelled))
	for order, o := range c.orders {
		if rest := without(o.cancelled, cancelled[order]); len(rest) > 0 && statuses[order] != statusCancelled {
			c.mismatch(order, "lost that %q are cancelled", rest)
		}
	}
	for order, status := range statuses {
		asked := cmp.Or(c.orders[order], &crashOrder{})
		_, isLive := live[order]
		switch {
		case status == statusCancelled && !asked.refundAsked:
			c.mismatch(order, "was cancelled and nobody asked")
		case asked.deleted && !asked.charged && isLive:
			c.mismatch(order, "was said to be deleted and is not")
		}
	}
	var byHand map[string]bool // payments whose rest was booked as paid back by hand
	check(c.t, json.Unmarshal([]byte(queryText(c.t, c.postgres.url,
		`SELECT coalesce(json_object_agg(imp_uid, true), '{}')::text FROM payments WHERE by_hand IS NOT NULL`)), &byHand))
	c.count("payments paid back by hand", len(byHand))
	var paintings map[string]int
	check(c.t, json.Unmarshal([]byte(queryText(c.t, c.postgres.url, `SELECT json_object_agg(at, n)::text FROM (SELECT
		CASE WHEN order_id IS NOT NULL THEN 'paintings sold' WHEN for_sale THEN 'paintings free' ELSE 'paintings off sale' END AS at, count(*) AS n
		FROM products GROUP BY 1) p`)), &paintings))
	for at, n := range paintings {
		c.count(at, n)
	}
	var reasons map[string]string // of what went back because it paid for nothing
	check(c.t, json.Unmarshal([]byte(queryText(c.t, c.postgres.url, `SELECT coalesce(json_object_agg(imp_uid, reason), '{}')::text FROM payments
		WHERE reason IN ('`+strings.Join([]string{reasonAmount, reasonSold, reasonDuplicate, reasonCancelled}, "', '")+`')`)), &reasons))
	for _, p := range c.fake.all() {
		c.wantVerdict(p, byHand[p.ImpUID])
		c.wantApproved(p, reasons[p.ImpUID])
	}
}

// wantApproved fails the test for a payment under manual approval that was charged though it could pay for nothing: the service
// gave it back for that reason. What went back elsewhere first did pay for something.
func (c *crash) wantApproved(p fakePayment, reason string) {
	if viaOf(p) != viaApproval || p.PaidAt.IsZero() {
		return
	}
	elsewhere := len(p.Refunds) > 0 && slices.Contains([]string{fakeInConsole, fakeTakenBack}, p.Refunds[0].Reason)
	if reason != "" && !elsewhere {
		c.mismatch(p.MerchantUID, "%s was charged under manual approval, and went back: %s", p.ImpUID, reason)
	}
}

// wantVerdict compares what became of a payment with what was said of it. byHand says that its rest is back by other means.
func (c *crash) wantVerdict(p fakePayment, byHand bool) {
	back := p.Cancelled
	if byHand {
		back = p.Amount
	}
	if !p.PaidAt.IsZero() {
		c.count("payments taken", 1)
		c.count("payments taken via "+string(viaOf(p)), 1)
		if back == p.Amount {
			c.count("payments given back", 1)
		}
	}
	switch verdict := c.verdicts[p.ImpUID]; {
	case verdict == saidKept && !c.reportedPaid(p):
		c.mismatch(p.MerchantUID, "%s was said to be kept and was never paid", p.ImpUID)
	case verdict == saidNotCharged && !p.PaidAt.IsZero():
		c.mismatch(p.MerchantUID, "%s was said not to be charged and was", p.ImpUID)
	case verdict == saidKept && back > 0 && !c.orders[p.MerchantUID].refundAsked:
		c.mismatch(p.MerchantUID, "%s was said to be kept, and nobody cancelled its order, but it went back", p.ImpUID)
	case verdict == saidBack && !p.PaidAt.IsZero() && back < p.Amount:
		c.mismatch(p.MerchantUID, "%s was said to go back and did not", p.ImpUID)
	}
}

// reportedPaid reports whether the payment that a report of p is about was paid: V2's reports name the order, of which the gateway
// may have several.
func (c *crash) reportedPaid(p fakePayment) bool {
	if viaOf(p) == viaV1 || !p.PaidAt.IsZero() {
		return !p.PaidAt.IsZero()
	}
	return slices.ContainsFunc(c.fake.all(), func(other fakePayment) bool { return other.MerchantUID == p.MerchantUID && !other.PaidAt.IsZero() })
}

// mismatch fails the test for an order, with all that is known of it.
func (c *crash) mismatch(order, format string, args ...any) {
	c.count("mismatches", 1)
	history := queryText(c.t, c.postgres.url, `SELECT coalesce(string_agg(concat_ws(' ', at, who, why, imp_uid, amount, request_id), E'\n' ORDER BY id), 'none')
		FROM history WHERE order_id = '`+order+`'`)
	var gateway []string
	for _, p := range c.fake.all() {
		if p.MerchantUID == order {
			gateway = append(gateway, fmt.Sprintf("%+v", p))
		}
	}
	c.t.Errorf("order %s "+format+"\nits history:\n%s\nat the gateway:\n%s\n", append(append([]any{order}, args...), history, strings.Join(gateway, "\n"))...)
}

// printFigures says what happened, a line for each of: what was done, what the gateway did wrong, what was answered.
func (c *crash) printFigures() {
	answers := map[string]int{}
	for status, n := range c.answers {
		answers[fmt.Sprintf("answered %d", status)] = n
	}
	answers["not answered"] = answers["answered 0"]
	delete(answers, "answered 0")
	for _, figures := range []map[string]int{c.figures, c.faults, answers} {
		var parts []string
		for _, name := range slices.Sorted(maps.Keys(figures)) {
			parts = append(parts, fmt.Sprintf("%d %s", figures[name], name))
		}
		c.t.Log(strings.Join(parts, ", "))
	}
}
