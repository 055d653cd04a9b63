package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

var attackFor = flag.Duration("attack", 0, "how long TestAttack takes; 0 leaves it out; from 1m on its figures have to reach their goals")

const (
	attackQuiet     = 6                      // the first of so many parts of the time is quiet
	attackBuyers    = 16                     // honest ones
	attackShelf     = 4                      // an honest buyer's paintings
	attackThinks    = 400 * time.Millisecond // between an honest buyer's visits
	attackHold      = 3 * time.Second        // ORDER_HOLD
	attackLatency   = 20 * time.Millisecond  // of the gateway
	attackOverdue   = 15 * time.Second       // how long a hold may outlast its end, on a machine that is busy
	attackSlower    = 2                      // how much longer than in quiet an honest call may take, at the median
	attackMemory    = 128 << 20              // what the service may take
	attackTotal     = 109000                 // of an order of one painting
	gatewayAddress  = "192.0.2.1"
	hostileAddress  = "203.0.113.1"
	attackAgain     = 15 * time.Second // until a connection that was closed is made again
	unfinishedConns = 300
	headerConns     = 300
	idleConns       = 2000
	deletingConns   = 160
	lockedBuyers    = 24
)

// TestAttack has honest buyers use the built service, first in quiet and then beside all attacks at once. Every answer of theirs
// must be right, the service ready all the time, no hold may outlast its end, and the books must balance. The service, PostgreSQL,
// the gateway, the buyers and the attackers share the machine, so each attacker has the rate or the number of connections that
// the attack needs, and no more.
func TestAttack(t *testing.T) {
	if *attackFor == 0 {
		t.Skip("a load, which takes the whole machine: -attack 10m")
	}
	a := openAttack(t)
	over, goHome := context.WithCancel(t.Context())
	defer goHome()
	var visitors, attackers sync.WaitGroup
	for i := range attackBuyers {
		visitors.Go(func() { a.newHonestBuyer(i).live(over) })
	}
	visitors.Go(func() { a.watchReadiness(over) })
	visitors.Go(func() { a.watchHolds(over) })
	pause(t.Context(), *attackFor/attackQuiet)
	quiet := a.resources()
	a.attacked.Store(true)
	for _, attack := range a.attacks() {
		attackers.Go(func() { attack(over) })
	}
	pause(t.Context(), *attackFor-*attackFor/attackQuiet)
	attacked := a.resources()
	goHome()
	visitors.Wait()
	attackers.Wait()
	a.wantProof()
	a.wantFigures(quiet, attacked)
}

// attack is a shop under attack: the binary in a process of its own, a PostgreSQL that really writes, and a gateway.
type attack struct {
	t        *testing.T
	binary   string
	env      []string
	process  *os.Process
	address  string // of the service
	log      *os.File
	postgres *postgresServer
	fake     *testGateway
	tokens   *tokens
	idle     int // connections that do nothing
	attacked atomic.Bool
	honest   *http.Client
	hostile  *http.Client

	stock                  []string // paintings that nobody uses yet
	locked                 string   // the painting that a session locks
	hoard                  []string // those that one buyer wants for ever
	promises                        // to the honest buyers
	mu                     sync.Mutex
	took                   [2]timings                // of the honest calls: in quiet, under attack
	answers                map[string]map[string]int // to the attackers, by attack
	overdue, overdueLocked time.Duration             // the longest that a hold outlasted its end, but for the locked painting's; that of the locked painting
	hoardFree, hoardSeen   int                       // of hoard, summed over the looks at it
}

// openAttack builds the binary, starts PostgreSQL and the gateway, imports the catalogue and starts the service.
func openAttack(t *testing.T) *attack {
	a := &attack{t: t, answers: map[string]map[string]int{}, took: [2]timings{{}, {}}, tokens: newTokens([]byte(testSecret), time.Now),
		honest:  &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 2 * attackBuyers}},
		hostile: &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 2 * deletingConns}},
	}
	t.Cleanup(a.honest.CloseIdleConnections)
	t.Cleanup(a.hostile.CloseIdleConnections)
	var files syscall.Rlimit
	check(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files))
	a.idle = max(0, min(idleConns, int(min(files.Cur, 1<<20))-unfinishedConns-headerConns-4*deletingConns))
	a.binary = buildProgram(t, t.TempDir())
	a.postgres = runPostgres(t, postgresConfig{dir: postgresDir(t), settings: map[string]string{"log_connections": "on"}})
	a.fake = newTestGateway(time.Now)
	slow := waitFor(func(ctx context.Context) { pause(ctx, attackLatency) })
	a.fake.setFaults(func(string, string) fault { return fault{before: slow} })
	gateway := httptest.NewServer(a.fake)
	t.Cleanup(gateway.Close)

	serviceURL := makeServiceRole(t, a.postgres.url)
	owner, err := openMigratedStore(t.Context(), a.postgres.url)
	check(t, err)
	defer owner.close()
	var all []painting
	paintings := func(n int) (ids []string) {
		for range n {
			id := newTestID()
			ids = append(ids, id)
			all = append(all, painting{id: id, artistID: "61a4c82a2c1eaad2e0d0084c", artistName: "안영희", title: "잠식",
				image: "/images/bye/1.jpg", size: "73x61cm", canvas: 20, price: 99000, forSale: true})
		}
		return ids
	}
	a.stock, a.hoard = paintings(100+attackBuyers*attackShelf), paintings(maxItems)
	a.locked = a.takeStock(1)[0]
	_, err = owner.importPaintings(t.Context(), all)
	check(t, err)
	a.env = append(os.Environ(), "DATABASE_URL="+serviceURL, "JWT_SECRET="+testSecret, "IAMPORT_URL="+gateway.URL,
		"IAMPORT_KEY="+a.fake.key, "IAMPORT_SECRET="+a.fake.secret, "PORT=0", "TRUSTED_PROXIES=127.0.0.1",
		"ORDER_HOLD="+attackHold.String(), "RECONCILE_INTERVAL=1s")
	a.serve()
	return a
}

// takeStock returns n paintings that nobody else uses.
func (a *attack) takeStock(n int) []string {
	taken := a.stock[:n:n]
	a.stock = a.stock[n:]
	return taken
}

// serve starts the service, and returns when it serves. Its log is kept when the test fails.
func (a *attack) serve() {
	var err error
	a.log, err = os.CreateTemp("", "lumiere-attack-*.log")
	check(a.t, err)
	program := exec.CommandContext(a.t.Context(), a.binary)
	program.Env = a.env
	logged, err := program.StderrPipe()
	check(a.t, err)
	check(a.t, program.Start())
	a.process = program.Process
	serving, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		lines := bufio.NewScanner(logged)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			fmt.Fprintf(a.log, "%s\n", lines.Bytes())
			var said struct{ Msg, Address string }
			if a.address == "" && json.Unmarshal(lines.Bytes(), &said) == nil && said.Msg == "serving" {
				a.address = strings.Replace(said.Address, "[::]", "127.0.0.1", 1)
				close(serving)
			}
		}
	}()
	a.t.Cleanup(func() {
		program.Process.Kill()
		<-ended
		program.Wait()
		a.log.Close()
		if a.t.Failed() {
			a.t.Logf("the service's log is %s", a.log.Name())
		} else {
			os.Remove(a.log.Name())
		}
	})
	select {
	case <-serving:
	case <-ended:
		text, _ := os.ReadFile(a.log.Name())
		a.t.Fatalf("the service does not start:\n%s", lastLines(text))
	}
}

// token is a good token of a buyer's.
func (a *attack) token(user string) string {
	token, err := a.tokens.issue(caller{id: user}, time.Now(), time.Hour)
	if err != nil {
		panic(err)
	}
	return token
}

// send makes a request from an address, as user or, as "", without a token.
func (a *attack) send(client *http.Client, address, user, method, path string, body any) (answer, error) {
	authorization := ""
	if user != "" {
		authorization = "Bearer " + a.token(user)
	}
	request, err := newCall(context.Background(), method, "http://"+a.address+path, authorization, body)
	if err != nil {
		return answer{}, err
	}
	request.Header.Set("X-Forwarded-For", address)
	return exchange(client.Do, request)
}

// ---- honest buyers

// honestBuyer is one of the buyers whose every answer must be right. It has paintings of its own and buys one after the other;
// before it buys one again it cancels that order. After some orders it goes on under another id: orders of one buyer are limited.
type honestBuyer struct {
	*attack
	address   string
	id        string
	visits    int
	paintings []string
	bought    map[string]purchase // by painting
}

type purchase struct{ buyer, order, impUID string }

func (a *attack) newHonestBuyer(i int) *honestBuyer {
	a.mu.Lock()
	defer a.mu.Unlock()
	return &honestBuyer{attack: a, address: fmt.Sprintf("198.51.100.%d", 1+i), paintings: a.takeStock(attackShelf), bought: map[string]purchase{}}
}

// live comes back until the shop closes, or an answer was wrong.
func (b *honestBuyer) live(over context.Context) {
	for pause(over, rand.N(2*attackThinks)) == nil {
		if err := b.visit(); err != nil {
			b.t.Errorf("a buyer %s: %v", map[bool]string{false: "in quiet", true: "under attack"}[b.attacked.Load()], err)
			return
		}
	}
}

// visit buys a painting. The error says which answer was wrong.
func (b *honestBuyer) visit() error {
	if b.visits%crashOrdersOfABuyer == 0 {
		b.id = newTestID()
	}
	painting := b.paintings[b.visits%len(b.paintings)]
	b.visits++
	if before, ok := b.bought[painting]; ok {
		if err := b.cancel(painting, before); err != nil {
			return err
		}
	}
	if err := b.lookAtCart(); err != nil {
		return err
	}
	order, a := b.as("order").order(b.id, painting)
	if a.status != 201 || a.message() != "주문서 생성 성공" || !validID(order) {
		return wrong("order", a)
	}
	p := purchase{b.id, order, b.fake.pay(fakePayment{MerchantUID: order, Amount: attackTotal})}
	if a := b.as("pay").report(order, map[string]string{"imp_uid": p.impUID}); a.status != 200 || a.message() != "결제 성공" {
		return wrong("pay", a)
	}
	b.bought[painting] = p
	notice := map[string]string{"imp_uid": p.impUID, "merchant_uid": order, "status": "paid"}
	if a := b.from(gatewayAddress, "notice").call("", "POST", "/api/payments/webhook", notice); a.status != 200 {
		return wrong("notice", a)
	}
	return b.look(painting, p, statusPaid)
}

// lookAtCart has all of the buyer's paintings shown: those are in stock that it has not bought.
func (b *honestBuyer) lookAtCart() error {
	a := b.as("cart").call(b.id, "GET", "/api/products/cart-items?productId="+strings.Join(b.paintings, "&productId="), nil)
	var items []cartItem
	if err := json.Unmarshal([]byte(a.body), &items); err != nil || a.status != 200 || len(items) != len(b.paintings) {
		return wrong("cart", a)
	}
	for i, item := range items {
		if _, bought := b.bought[b.paintings[i]]; item.ID != b.paintings[i] || item.Price != 99000 || item.InStock == bought {
			return wrong("cart", a)
		}
	}
	return nil
}

// look has an order shown.
func (b *honestBuyer) look(painting string, p purchase, status int) error {
	a := b.as("show").call(p.buyer, "GET", "/api/orders/"+p.order, nil)
	var shown struct {
		ID         string `json:"_id"`
		Result     struct{ Status int }
		TotalPrice int64
		OrderItems []struct{ Product string }
	}
	if err := json.Unmarshal([]byte(a.body), &shown); err != nil || a.status != 200 || shown.ID != p.order || shown.Result.Status != status ||
		shown.TotalPrice != attackTotal || len(shown.OrderItems) != 1 || shown.OrderItems[0].Product != painting {
		return wrong("show", a)
	}
	return nil
}

// cancel has an order's money given back, and looks whether it was.
func (b *honestBuyer) cancel(painting string, p purchase) error {
	if a := b.as("cancel").remove(p.buyer, p.order, ""); a.status != 200 || a.message() != "해당 주문의 결제 취소가 완료되었습니다" {
		return wrong("cancel", a)
	}
	if at, _ := b.fake.get(p.impUID); at.Cancelled != attackTotal {
		return fmt.Errorf("cancel: %d won came back", at.Cancelled)
	}
	delete(b.bought, painting)
	return b.look(painting, p, statusCancelled)
}

func wrong(name string, a answer) error {
	return fmt.Errorf("%s: answered %d %s", name, a.status, a.body)
}

// as is the shop as the buyer uses it, with each call's time taken under a name.
func (b *honestBuyer) as(name string) simulation { return b.from(b.address, name) }

// from is as for an address. The zero answer says that none came.
func (b *honestBuyer) from(address, name string) simulation {
	return simulation{&b.promises, func(user, method, path string, body any) answer {
		phase := 0
		if b.attacked.Load() {
			phase = 1
		}
		start := time.Now()
		got, err := b.send(b.honest, address, user, method, path, body)
		elapsed := time.Since(start)
		if err != nil {
			return answer{body: err.Error()}
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		b.took[phase][name] = append(b.took[phase][name], elapsed)
		return got
	}}
}

// ---- attackers

// attacks are what is done to the service at once, each until its context ends.
func (a *attack) attacks() []func(context.Context) {
	replacer, hoarder := newTestID(), newTestID()
	some, deleted := a.takeStock(2), a.takeStock(20)
	attacks := []func(context.Context){
		func(over context.Context) {
			often(over, attackHold*4/5, func() {
				a.try("hoards 50 paintings", hoarder, "POST", "/api/orders", orderBody(newNumber(), a.hoard...))
			})
		},
		func(over context.Context) { a.deleteAtOnce(over, deleted) },
		func(over context.Context) {
			often(over, 50*time.Millisecond, func() {
				a.notify("another shop's payments", a.fake.pay(fakePayment{MerchantUID: "other-" + newNumber(), Amount: 5900}))
			})
		},
		func(over context.Context) {
			often(over, 50*time.Millisecond, func() { a.notify("made-up payments", newImpUID()) })
		},
		func(over context.Context) { a.lock(over, a.locked) },
	}
	for i := range 2 {
		attacks = append(attacks, func(over context.Context) {
			often(over, 5*time.Millisecond, func() {
				a.try("orders over and over", replacer, "POST", "/api/orders", orderBody(newNumber(), some[i]))
			})
		})
	}
	for range 4 {
		attacks = append(attacks, func(over context.Context) { often(over, 25*time.Millisecond, a.hangUp) })
	}
	for range lockedBuyers {
		buyer := newTestID()
		attacks = append(attacks, func(over context.Context) {
			often(over, time.Second, func() {
				a.try("orders of the locked painting", buyer, "POST", "/api/orders", orderBody(newNumber(), a.locked))
			})
		})
	}
	return append(attacks, a.connections()...)
}

// often calls do over and over, with pauses of this length between.
func often(over context.Context, every time.Duration, do func()) {
	for pause(over, every) == nil {
		do()
	}
}

// try makes an attacker's call.
func (a *attack) try(attack, user, method, path string, body any) answer {
	return a.tryFrom(hostileAddress, attack, user, method, path, body)
}

// notify gives notice of a payment from the gateway's own address: its console sends all that is paid on an account.
func (a *attack) notify(attack, impUID string) {
	a.tryFrom(gatewayAddress, attack, "", "POST", "/api/payments/webhook", map[string]string{"imp_uid": impUID, "merchant_uid": "other", "status": "paid"})
}

func (a *attack) tryFrom(address, attack, user, method, path string, body any) answer {
	got, err := a.send(a.hostile, address, user, method, path, body)
	if err != nil {
		a.count(attack, "no answer")
		return answer{}
	}
	a.count(attack, fmt.Sprint(got.status))
	if got.status == http.StatusInternalServerError {
		a.t.Errorf("%s: answered %d %s", attack, got.status, got.body)
	}
	return got
}

func (a *attack) count(attack, what string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.answers[attack] == nil {
		a.answers[attack] = map[string]int{}
	}
	a.answers[attack][what]++
}

// deleteAtOnce makes an unpaid order every two seconds and has it deleted on many connections. A buyer has few orders, so each
// comes from another one.
func (a *attack) deleteAtOnce(over context.Context, paintings []string) {
	for round := 0; pause(over, 2*time.Second) == nil; round++ {
		buyer := newTestID()
		made := a.try("orders to be deleted", buyer, "POST", "/api/orders", orderBody(newNumber(), paintings[round%len(paintings)]))
		var order orderCreated
		if json.Unmarshal([]byte(made.body), &order) == nil && order.OrderID != "" {
			concurrently(deletingConns, func(int) answer { return a.try("deletes an order", buyer, "DELETE", "/api/orders/"+order.OrderID, nil) })
		}
	}
}

// lock locks a painting in a forgotten session, and lets it go now and then.
func (a *attack) lock(over context.Context, painting string) {
	session, err := pgx.Connect(context.Background(), a.postgres.url)
	if err != nil {
		a.t.Error(err)
		return
	}
	defer session.Close(context.Background())
	often(over, attackHold/6, func() {
		for _, statement := range []string{"BEGIN", "UPDATE products SET title = title WHERE id = '" + painting + "'"} {
			if _, err := session.Exec(context.Background(), statement); err != nil {
				a.t.Error(err)
			}
		}
		pause(over, attackHold)
		session.Exec(context.Background(), "ROLLBACK")
	})
}

// hangUp asks for something and closes the connection in mid-call.
func (a *attack) hangUp() {
	conn, err := net.Dial("tcp", a.address)
	if err != nil {
		a.count("hangs up", "not connected")
		return
	}
	defer conn.Close()
	a.count("hangs up", "done")
	requests := [][]byte{
		wireRequest("GET", "/api/products/cart-items?productId="+a.hoard[0], "", ""),
		wireRequest("GET", "/api/orders/mine", a.token(buyerA), ""),
		wireRequest("POST", "/api/orders", a.token(buyerA), marshalRaw(orderBody(newNumber(), newTestID()))),
	}
	conn.Write(requests[rand.IntN(len(requests))])
	time.Sleep(rand.N(2 * time.Millisecond))
}

// connections are those that only take room: requests that do not end, large headers, and idle ones.
func (a *attack) connections() (attacks []func(context.Context)) {
	pay := wireRequest("PATCH", "/api/orders/pay", "", strings.Repeat(" ", smallBody))
	order := wireRequest("POST", "/api/orders", a.token(buyerB), strings.Repeat(" ", maxBody))
	header := "GET /api/products/cart-items HTTP/1.1\r\nHost: localhost\r\nX-Large: "
	add := func(attack string, n int, kinds ...[]byte) {
		for i := range n {
			attacks = append(attacks, func(over context.Context) { a.occupy(over, attack, kinds[i%len(kinds)]) })
		}
	}
	add("unfinished bodies", unfinishedConns, pay[:len(pay)-1000], order[:len(order)-1000])
	add("large headers", headerConns, []byte(header+strings.Repeat("a", 250<<10)), []byte(header+strings.Repeat("a", 30<<10)))
	add("idle", a.idle, wireRequest("GET", "/healthz", "", ""))
	return attacks
}

// occupy sends this on a connection and then nothing more, and once more some time after the connection is closed.
func (a *attack) occupy(over context.Context, attack string, text []byte) {
	for wait := rand.N(5 * time.Second); pause(over, wait) == nil; wait = attackAgain {
		conn, err := net.Dial("tcp", a.address)
		if err != nil {
			a.count(attack, "not connected")
			continue
		}
		stop := context.AfterFunc(over, func() { conn.Close() })
		a.count(attack, "connections")
		if _, err = conn.Write(text); err == nil {
			io.Copy(io.Discard, conn)
		}
		stop()
		conn.Close()
	}
}

// ---- what is watched and proven

// watchReadiness fails the test when the service is not ready.
func (a *attack) watchReadiness(over context.Context) {
	often(over, 200*time.Millisecond, func() {
		got, err := a.send(a.honest, "198.51.100.200", "", "GET", "/readyz", nil)
		if err != nil || got.status != 200 {
			a.t.Errorf("readyz: %d %s %v", got.status, got.body, err)
		}
	})
}

// watchHolds looks for holds that outlast their end, and for hoarded paintings that are free.
func (a *attack) watchHolds(over context.Context) {
	session, err := pgx.Connect(context.Background(), a.postgres.url)
	if err != nil {
		a.t.Error(err)
		return
	}
	defer session.Close(context.Background())
	often(over, 200*time.Millisecond, func() {
		var overdue, overdueLocked float64
		var free int
		err := session.QueryRow(context.Background(), `SELECT
			coalesce(max(late) FILTER (WHERE $2 <> ALL(product_ids)), 0)::float8, coalesce(max(late) FILTER (WHERE $2 = ANY(product_ids)), 0)::float8,
			(SELECT count(*) FROM products WHERE order_id IS NULL AND id = ANY($1))
			FROM (SELECT product_ids, extract(epoch FROM clock_timestamp() - held_until) AS late FROM orders WHERE status = -1 AND ended IS NULL) o`,
			a.hoard, a.locked).Scan(&overdue, &overdueLocked, &free)
		if err != nil {
			a.t.Error(err)
			return
		}
		a.overdue = max(a.overdue, time.Duration(overdue*float64(time.Second)))
		a.overdueLocked = max(a.overdueLocked, time.Duration(overdueLocked*float64(time.Second)))
		if a.attacked.Load() {
			a.hoardFree, a.hoardSeen = a.hoardFree+free, a.hoardSeen+len(a.hoard)
		}
	})
}

// wantProof fails the test unless all holds end, all that buyers were told is true, and the books balance.
func (a *attack) wantProof() {
	// What the session kept the reconciler from is tried again at each round, and may be locked again then.
	if a.overdue > attackOverdue || a.overdueLocked > refundLease+attackOverdue {
		a.t.Errorf("a hold outlasted its end by %v, one of the locked painting by %v", a.overdue, a.overdueLocked)
	}
	execSQL(a.t, a.postgres.url, `UPDATE orders SET next_look_at = now() WHERE status = -1 AND ended IS NULL AND '`+a.locked+`' = ANY(product_ids)`)
	waitUntil(a.t, "no order is unpaid or being refunded", func() bool {
		return queryText(a.t, a.postgres.url, `SELECT (SELECT count(*) FROM orders WHERE status = -1 AND ended IS NULL OR cancelling_since IS NOT NULL)
			+ (SELECT count(*) FROM payments WHERE state = 'refunding')`) == "0"
	})
	for order, problem := range broken(a.given(), orderStatuses(a.t, a.postgres.url, "true")) {
		a.t.Errorf("order %s %s", order, problem)
	}
	a.fake.setFaults(nil) // the audit asks fast
	audit := exec.Command(a.binary, "audit")
	audit.Env = a.env
	if out, err := audit.CombinedOutput(); err != nil {
		a.t.Errorf("lumiere audit: %v\n%s", err, out)
	}
}

// attackResources are what was taken up to now.
type attackResources struct {
	memory      int           // the service's maximal resident memory; 0 where there is no /proc
	service     time.Duration // of a core, by the service; 0 where there is no /proc
	test        time.Duration // of a core, by the gateway, the buyers and the attackers
	connections int           // that the service made to the database
}

func (a *attack) resources() (r attackResources) {
	if runtime.GOOS == "linux" {
		r.memory = memory(a.t, a.process, "VmHWM")
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", a.process.Pid))
		check(a.t, err)
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')'):]))
		for _, ticks := range fields[12:14] { // utime and stime, in hundredths of a second
			n, err := strconv.Atoi(ticks)
			check(a.t, err)
			r.service += time.Duration(n) * 10 * time.Millisecond
		}
	}
	var own syscall.Rusage
	check(a.t, syscall.Getrusage(syscall.RUSAGE_SELF, &own))
	r.test = time.Duration(own.Utime.Nano() + own.Stime.Nano())
	text, err := os.ReadFile(a.postgres.logFile())
	check(a.t, err)
	r.connections = strings.Count(string(text), "authorized: user=lumiere_service")
	return r
}

// wantFigures prints what was measured. In a long run it fails the test for a goal that is missed.
func (a *attack) wantFigures(quiet, attacked attackResources) {
	judge := func(reached bool, what string) {
		if !reached && *attackFor >= time.Minute {
			a.t.Error("missed: ", what)
		}
	}
	fmt.Printf("%d cores for the service, PostgreSQL, the gateway, the buyers and the attackers; %d idle connections; %v\n", runtime.NumCPU(), a.idle, *attackFor)
	fmt.Printf("| call | calls, quiet | calls, attacked | median, quiet | median, attacked | ratio | p99, attacked |\n|---|---|---|---|---|---|---|\n")
	for _, name := range slices.Sorted(maps.Keys(a.took[1])) {
		if len(a.took[0][name]) == 0 {
			continue // a run too short for it
		}
		before, then := a.took[0].percentile(name, 50), a.took[1].percentile(name, 50)
		ratio := float64(then) / float64(before)
		fmt.Printf("| %s | %d | %d | %.1f ms | %.1f ms | %.2f × | %.1f ms |\n", name, len(a.took[0][name]), len(a.took[1][name]), before.Seconds()*1000,
			then.Seconds()*1000, ratio, a.took[1].percentile(name, 99).Seconds()*1000)
		judge(ratio <= attackSlower, fmt.Sprintf("%s takes %.2f × as long as in quiet", name, ratio))
	}
	cores := func(d time.Duration) float64 { return float64(d) / float64(*attackFor-*attackFor/attackQuiet) }
	fmt.Printf("memory: %d MB in quiet, %d MB\n", quiet.memory>>20, attacked.memory>>20)
	judge(attacked.memory < attackMemory, fmt.Sprintf("%d MB of memory", attacked.memory>>20))
	fmt.Printf("cores under attack: the service %.2f, the gateway, the buyers and the attackers %.2f\n", cores(attacked.service-quiet.service), cores(attacked.test-quiet.test))
	fmt.Printf("connections to the database: %d in quiet, %d more under attack\n", quiet.connections, attacked.connections-quiet.connections)
	fmt.Printf("a hold outlasted its end by %v at most, one of the locked painting by %v\n", a.overdue.Round(time.Millisecond), a.overdueLocked.Round(time.Millisecond))
	fmt.Printf("of the hoarded paintings %.0f %% were free at any time\n", 100*float64(a.hoardFree)/float64(max(1, a.hoardSeen)))
	judge(a.hoardFree > 0, "the hoarded paintings are never free")
	for _, attack := range slices.Sorted(maps.Keys(a.answers)) {
		fmt.Printf("%s: %v\n", attack, a.answers[attack])
	}
}
