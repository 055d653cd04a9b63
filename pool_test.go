package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

func TestDatabaseGoneAndBack(t *testing.T) {
	heavy(t)
	server := runPostgres(t, postgresConfig{dir: postgresDir(t), settings: unsafeSettings})
	s := newShop(t, func(c *config) { c.databaseURL = server.url })
	painting := s.painting(99000)
	check(t, server.crash())
	for _, row := range [][2]string{{"GET", "/api/products/cart-items?productId=" + painting}, {"GET", "/api/orders/latest"}, {"GET", "/readyz"}} {
		s.want(s.call(buyerA, row[0], row[1], nil), 503, "")
	}
	s.want(s.call(buyerA, "POST", "/api/orders", orderBody(newNumber(), painting)), 503, messageAway)
	s.want(s.call("", "GET", "/healthz", nil), 200, "")
	check(t, server.start(t.Context()))
	// A connection that died unseen may fail once more; the pool has thrown it away then.
	for range 16 {
		if s.call("", "GET", "/readyz", nil).status == 200 {
			break
		}
	}
	s.want(s.call("", "GET", "/readyz", nil), 200, "")
	s.order(buyerA, painting)
}

// buyers walk through the shop while its database comes and goes, each from an order to its payment or its cancel.
type buyers struct {
	simulation
	shop    *shop
	refused atomic.Bool // a call found the database away
}

func newBuyers(s *shop) *buyers {
	var minutes atomic.Int64 // pass for the limiter at each look, so that it minds no repeated call
	s.limits.now = func() time.Time { return s.clock.Now().Add(time.Duration(minutes.Add(1)) * time.Minute) }
	b := &buyers{shop: s}
	b.simulation = simulation{&promises{}, b.retry}
	return b
}

// retry makes a call until the database is there for it, as a browser does.
func (b *buyers) retry(user, method, path string, body any) answer {
	ctx, cancel := context.WithTimeout(b.shop.t.Context(), time.Minute)
	defer cancel()
	for {
		a := b.shop.call(user, method, path, body)
		if a.status < 500 || pause(ctx, postgresPoll) != nil {
			return a
		}
		if a.status != 503 {
			b.shop.t.Errorf("a database that is away: %d %s", a.status, a.body)
		}
		b.refused.Store(true)
	}
}

// walk is one buyer's way with a painting.
func (b *buyers) walk(painting string, cancels bool) {
	buyer := newTestID()
	order, a := b.order(buyer, painting)
	if a.status == 409 { // another buyer was faster
		return
	}
	if a.status != 201 {
		b.shop.t.Errorf("order: %d %s", a.status, a.body)
		return
	}
	if a := b.report(order, map[string]string{"imp_uid": b.shop.charge(order, 109000)}); a.status != 200 {
		b.shop.t.Errorf("payment: %d %s", a.status, a.body)
		return
	}
	if !cancels {
		return
	}
	// 409: an answer before was lost. The cancel is booked, and goes on or is done.
	if a := b.remove(buyer, order, ""); a.status != 200 && a.status != 409 {
		b.shop.t.Errorf("cancel: %d %s", a.status, a.body)
	}
}

// wantPromised fails unless each order is at least as far as it was answered to be.
func (b *buyers) wantPromised() {
	b.shop.t.Helper()
	given := b.given()
	for order, problem := range broken(given, orderStatuses(b.shop.t, b.shop.config.databaseURL, "ended IS NULL")) {
		b.shop.t.Errorf("order %s %s", order, problem)
	}
}

// runPgBouncer starts PgBouncer in transaction mode with three connections to the server of databaseURL, and returns the
// connection string through it.
func runPgBouncer(t *testing.T, databaseURL string) string {
	t.Helper()
	program := findTool(t, "pgbouncer")
	server, err := pgx.ParseConfig(databaseURL)
	check(t, err)
	account, err := postgresAccount() // it does not run as root either
	check(t, err)
	dir := postgresDir(t)
	if account != nil {
		check(t, os.Chown(dir, int(account.Uid), int(account.Gid)))
	}
	users := fmt.Appendf(nil, "%q %q\n%q %q\n", server.User, server.Password, "lumiere_service", server.Password)
	check(t, os.WriteFile(filepath.Join(dir, "users"), users, 0o644))
	settings := filepath.Join(dir, "pgbouncer.ini")
	check(t, os.WriteFile(settings, fmt.Appendf(nil, `
[databases]
%[1]s = host=%[2]s port=%[3]d
[pgbouncer]
pool_mode = transaction
default_pool_size = 3
listen_addr =
listen_port = 6432
unix_socket_dir = %[4]s
auth_type = trust
auth_file = %[4]s/users
`, server.Database, server.Host, server.Port, dir), 0o644))
	var log bytes.Buffer
	cmd := exec.CommandContext(t.Context(), program, settings)
	cmd.Stderr = &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: account}
	check(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Wait()
		if t.Failed() {
			t.Logf("PgBouncer's log: %s", lastLines(log.Bytes()))
		}
	})
	through := databaseVia(t, databaseURL, "host", dir, "port", "6432", "default_query_exec_mode", "cache_describe")
	waitUntil(t, "PgBouncer answers", func() bool {
		conn, err := pgx.Connect(t.Context(), through)
		if err == nil {
			conn.Close(t.Context())
		}
		return err == nil
	})
	return through
}

// Behind PgBouncer in transaction mode a connection is another one after each transaction: the schema, the import, and
// every call of buyers and the administrator live with that, many at a time.
func TestPgBouncer(t *testing.T) {
	heavy(t)
	databaseURL := newTestDatabase(t)
	s := newShop(t, func(c *config) { c.databaseURL = runPgBouncer(t, databaseURL) })
	b := newBuyers(s)
	stock := make([]string, 40)
	for i := range stock {
		stock[i] = s.painting(99000)
	}
	concurrently(2*len(stock), func(i int) answer {
		painting := stock[i/2] // each is wanted by two
		s.want(s.call(buyerA, "GET", "/api/products/cart-items?productId="+painting, nil), 200, "")
		s.want(s.call(buyerA, "GET", "/api/products/total-price?productId="+painting, nil), 200, "")
		b.walk(painting, i%3 == 0)
		s.call(buyerA, "GET", "/api/orders/latest", nil)
		s.want(s.call(adminID, "GET", "/api/orders", nil), 200, "")
		return s.want(s.call(buyerA, "GET", "/api/orders/mine", nil), 200, "")
	})
	s.later(time.Hour)
	for order := range b.given() {
		s.want(s.call(adminID, "GET", "/api/orders/"+order+"/history", nil), 200, "")
	}
	s.orderAt(statusReturning)
	s.order(buyerB, s.painting(99000))
	s.want(s.call(buyerB, "GET", "/api/orders/latest", nil), 200, "")
	b.wantPromised()
	s.wantBalanced()
}

// runReplicated starts a primary and a standby that has each commit before the primary's client hears of it.
func runReplicated(t *testing.T) (primary, standby *postgresServer) {
	t.Helper()
	primary = runPostgres(t, postgresConfig{dir: postgresDir(t), settings: unsafeSettings})
	dir := postgresDir(t)
	check(t, makeDir(dir))
	data := filepath.Join(dir, filepath.Base(primary.data))
	check(t, os.Mkdir(data, 0o700))
	check(t, primary.own(data))
	out, err := primary.command(t.Context(), "pg_basebackup", "-d", primary.url, "-D", data, "--checkpoint=fast", "--no-sync",
		"--write-recovery-conf").CombinedOutput()
	if err != nil {
		t.Fatalf("pg_basebackup: %v\n%s", err, out)
	}
	standby = runPostgres(t, postgresConfig{dir: dir, settings: unsafeSettings})
	execSQL(t, primary.url, `ALTER SYSTEM SET synchronous_standby_names = '*'`)
	execSQL(t, primary.url, `SELECT pg_reload_conf()`)
	waitUntil(t, "the standby is synchronous", func() bool {
		return queryText(t, primary.url, `SELECT coalesce(max(sync_state), '') FROM pg_stat_replication`) == "sync"
	})
	return primary, standby
}

// killAll ends the server and all of its sessions with SIGKILL. The server goes first: it would replace what it sees die.
func killAll(t *testing.T, server *postgresServer) {
	t.Helper()
	pids := queryText(t, server.url, `SELECT string_agg(pid::text, ' ') FROM pg_stat_activity`)
	check(t, server.kill())
	for pid := range strings.FieldsSeq(pids) {
		n, err := strconv.Atoi(pid)
		check(t, err)
		syscall.Kill(n, syscall.SIGKILL) // it may have noticed and gone
	}
}

// A primary that is killed amid checkouts takes nothing along that anybody was told of, and the service goes on with the
// promoted standby.
func TestFailover(t *testing.T) {
	heavy(t)
	primary, standby := runReplicated(t)
	s := newShop(t, func(c *config) {
		// The standby comes first: it is passed over until it is promoted.
		c.databaseURL = databaseVia(t, primary.url, "target_session_attrs", "read-write",
			"host", standby.socket+","+primary.socket, "port", postgresPort+","+postgresPort)
	})
	alone, err := openStore(t.Context(), standby.url, nil)
	check(t, err)
	defer alone.close()
	if _, err := alone.schemaVersion(t.Context()); !unavailable(err) {
		t.Errorf("a standby is taken for a primary: %v", err)
	}

	b := newBuyers(s)
	stock := make([]string, 100)
	for i := range stock {
		stock[i] = s.painting(99000)
	}
	var next atomic.Int64
	var closing atomic.Bool
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			for !closing.Load() {
				n := int(next.Add(1))
				b.walk(stock[n/2%len(stock)], n%3 == 0) // each is wanted by two at once
			}
		})
	}
	t.Cleanup(func() {
		closing.Store(true)
		all.Wait()
	})
	waitUntil(t, "fifty orders are made", func() bool { return len(b.given()) >= 50 })
	last := s.painting(99000)
	killed := time.Now()
	killAll(t, primary)
	waitUntil(t, "the outage is felt", b.refused.Load)
	execSQL(t, standby.url, `SELECT pg_promote()`)
	promoted := time.Now()
	b.walk(last, true)
	t.Logf("an order, its payment and its cancel %v after the kill, %v after the promotion",
		time.Since(killed).Round(time.Millisecond), time.Since(promoted).Round(time.Millisecond))

	b.wantPromised()
	closing.Store(true)
	all.Wait()

	s.later(time.Hour) // all that was cut off goes on
	b.wantPromised()
	s.wantBalanced()
}

// tcpProxy passes connections on to a server until it is shut. Then nothing comes through, and no connection is closed.
type tcpProxy struct {
	net.Listener
	shut atomic.Bool
	gone <-chan struct{} // the test is over
}

func openTCPProxy(t *testing.T, network, address string) *tcpProxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	t.Cleanup(func() { listener.Close() })
	d := &tcpProxy{Listener: listener, gone: t.Context().Done()}
	go func() {
		for client, err := d.Accept(); err == nil; client, err = d.Accept() {
			if server, err := net.Dial(network, address); err == nil {
				go d.carry(server, client)
				go d.carry(client, server)
			}
		}
	}()
	return d
}

func (d *tcpProxy) carry(to, from net.Conn) {
	defer to.Close()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if d.shut.Load() {
			<-d.gone
		}
		if err != nil {
			return
		}
		to.Write(buffer[:n])
	}
}

// A server that says nothing any more, and refuses nothing either, is left for the next one: by those who wait for it,
// and by those who come when all connections have been idle. An attempt lasts for dbTimeout.
func TestSilentServer(t *testing.T) {
	heavy(t)
	databaseURL := newTestDatabase(t)
	server, err := pgx.ParseConfig(databaseURL)
	check(t, err)
	network, address := pgconn.NetworkAddress(server.Host, server.Port)
	for name, whenShut := range map[string]func(*testing.T, *store){
		"busy": func(t *testing.T, store *store) {
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			var all sync.WaitGroup
			for range store.pool.Config().MaxConns {
				all.Go(func() {
					if _, err := store.schemaVersion(ctx); err == nil {
						t.Error("a statement came through")
					}
				})
			}
			all.Wait()
		},
		"idle": func(t *testing.T, _ *store) {
			check(t, pause(t.Context(), 1100*time.Millisecond)) // a connection is not asked before it is given out
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := openTCPProxy(t, network, address)
			port := strconv.Itoa(d.Addr().(*net.TCPAddr).Port)
			store, err := openStore(t.Context(), databaseVia(t, databaseURL, "connect_timeout", "1",
				"host", "127.0.0.1,"+server.Host, "port", port+","+strconv.Itoa(int(server.Port))), nil)
			check(t, err)
			defer store.close()
			conns := make([]*pgxpool.Conn, store.pool.Config().MaxConns)
			for i := range conns {
				conns[i], err = store.pool.Acquire(t.Context())
				check(t, err)
			}
			for _, c := range conns {
				c.Release()
			}
			d.shut.Store(true)
			whenShut(t, store)
			if _, err = store.schemaVersion(t.Context()); err != nil {
				_, err = store.schemaVersion(t.Context())
			}
			check(t, err)
		})
	}
}

// A server that has become read-only, as a primary that was demoted, costs one answer.
func TestReadOnlyServer(t *testing.T) {
	store, err := openStore(t.Context(), newTestDatabase(t), nil)
	check(t, err)
	defer store.close()
	_, err = store.pool.Exec(t.Context(), `SET default_transaction_read_only = on`)
	check(t, err)
	if err := store.migrate(t.Context(), migrations()[:1]); !unavailable(err) {
		t.Errorf("a write to a standby: %v", err)
	}
	check(t, store.migrate(t.Context(), migrations()[:1]))
}

// queryStub is a batcher whose queries the test sees and answers.
type queryStub struct {
	*batcher[int, string]
	t       *testing.T
	started chan []int                               // the keys of each query
	answers chan func([]int) (map[int]string, error) // what it does then
	until   []time.Time
}

func newQueryStub(t *testing.T) *queryStub {
	f := &queryStub{t: t, started: make(chan []int), answers: make(chan func([]int) (map[int]string, error))}
	f.batcher = newBatcher(func(ctx context.Context, keys []int) (map[int]string, error) {
		until, _ := ctx.Deadline()
		f.until = append(f.until, until)
		f.started <- keys
		return (<-f.answers)(keys)
	})
	return f
}

// names answers the even keys; odd ones are unknown.
func names(keys []int) (map[int]string, error) {
	found := map[int]string{}
	for _, k := range keys {
		if k%2 == 0 {
			found[k] = fmt.Sprint("name ", k)
		}
	}
	return found, nil
}

// query has a caller ask for keys; the answer comes from the channel. It returns once the keys wait for a query.
func (f *queryStub) query(ctx context.Context, keys ...int) <-chan any {
	answer := make(chan any, 1)
	before := f.collected()
	go func() {
		found, err := f.get(ctx, keys...)
		if err != nil {
			answer <- err
			return
		}
		text := ""
		for _, k := range keys {
			text += found[k] + ";"
		}
		answer <- text
	}()
	synctest.Wait()
	if f.collected() == before {
		f.t.Fatalf("the keys %v do not wait for a query", keys)
	}
	return answer
}

// collected is how many keys wait for a query to return.
func (f *queryStub) collected() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range f.waiting {
		n += len(w.keys)
	}
	return n
}

// first has a caller ask alone, and returns once its query is under way.
func (f *queryStub) first() <-chan any {
	answer := make(chan any, 1)
	go func() {
		found, err := f.get(context.Background(), 0)
		answer <- fmt.Sprint(found, err)
	}()
	if keys := <-f.started; len(keys) != 1 {
		f.t.Fatalf("the lone caller's query is for %v", keys)
	}
	return answer
}

func TestBatchSharesAQuery(t *testing.T) { synctest.Test(t, testBatchSharesAQuery) }

func testBatchSharesAQuery(t *testing.T) {
	f := newQueryStub(t)
	lone := f.first()
	var answers []<-chan any
	for k := range 50 {
		answers = append(answers, f.query(t.Context(), k, k+1))
	}
	joined := time.Now()
	f.answers <- names
	if got := <-lone; got != "map[0:name 0] <nil>" {
		t.Errorf("the lone caller got %v", got)
	}
	if keys := <-f.started; len(keys) != 100 {
		t.Fatalf("%d keys in the second query", len(keys))
	}
	f.answers <- names
	for k, answer := range answers {
		even := fmt.Sprintf("name %d;", k+k%2)
		if want := []string{even + ";", ";" + even}[k%2]; <-answer != want {
			t.Errorf("caller %d did not get %q", k, want)
		}
	}
	if f.until[1].After(joined.Add(dbTimeout)) {
		t.Errorf("the second query may take until %v after its callers came", f.until[1].Sub(joined))
	}
}

func TestBatchCallerGoesAway(t *testing.T) { synctest.Test(t, testBatchCallerGoesAway) }

func testBatchCallerGoesAway(t *testing.T) {
	f := newQueryStub(t)
	lone := f.first()
	ctx, goAway := context.WithCancel(t.Context())
	gone, stays := f.query(ctx, 2), f.query(t.Context(), 4)
	goAway()
	if err := <-gone; err != context.Canceled {
		t.Errorf("the caller who went away got %v", err)
	}
	f.answers <- names
	<-lone
	<-f.started
	f.answers <- names
	if got := <-stays; got != "name 4;" {
		t.Errorf("the other one got %v", got)
	}
}

func TestBatchFails(t *testing.T) { synctest.Test(t, testBatchFails) }

func testBatchFails(t *testing.T) {
	fault := errors.New("the database is away")
	for name, fail := range map[string]func([]int) (map[int]string, error){
		"an error": func([]int) (map[int]string, error) { return nil, fault },
		"a panic":  func([]int) (map[int]string, error) { panic(fault) },
	} {
		f := newQueryStub(t)
		lone := f.first()
		a, b := f.query(t.Context(), 2), f.query(t.Context(), 4)
		f.answers <- names
		<-lone
		<-f.started
		c := f.query(t.Context(), 6)
		f.answers <- fail
		for _, answer := range []<-chan any{a, b} {
			if err, ok := (<-answer).(error); !ok || !strings.Contains(err.Error(), fault.Error()) {
				t.Errorf("%s: a caller got %v", name, err)
			}
		}
		<-f.started
		f.answers <- names
		if got := <-c; got != "name 6;" {
			t.Errorf("%s: the next query's caller got %v", name, got)
		}
	}
}

// A query that hangs keeps the next one waiting for longQuery, and at most maxQueries hang at once. All the same there is one
// at a time again afterwards.
func TestBatchHangs(t *testing.T) { synctest.Test(t, testBatchHangs) }

func testBatchHangs(t *testing.T) {
	f := newQueryStub(t)
	began := time.Now()
	var answers []<-chan any
	hung := make([]chan func([]int) (map[int]string, error), maxQueries)
	for n := range hung {
		hung[n] = make(chan func([]int) (map[int]string, error))
	}
	f.batcher.query = func(_ context.Context, keys []int) (map[int]string, error) {
		f.started <- keys
		n := keys[0] / 2
		if n >= len(hung) {
			return (<-f.answers)(keys)
		}
		return (<-hung[n])(keys)
	}
	for n := range maxQueries + 2 {
		answer := make(chan any, 1)
		go func() {
			found, err := f.get(t.Context(), 2*n)
			answer <- fmt.Sprint(found[2*n]+" ", err)
		}()
		answers = append(answers, answer)
		if n < maxQueries {
			if keys := <-f.started; len(keys) != 1 || time.Since(began) != time.Duration(n)*longQuery {
				t.Fatalf("query %d of the keys %v began after %v", n, keys, time.Since(began))
			}
		}
	}
	time.Sleep(10 * longQuery) // of the test's clock
	select {
	case keys := <-f.started:
		t.Fatalf("a query of %v began beside %d that hang", keys, maxQueries)
	default:
	}
	hung[1] <- names
	if keys := <-f.started; len(keys) != 2 {
		t.Fatalf("the next query has the keys %v", keys)
	}
	last := make(chan any, 1)
	go func() {
		found, err := f.get(t.Context(), 100)
		last <- fmt.Sprint(found[100]+" ", err)
	}()
	for _, n := range []int{0, 2, 3} {
		hung[n] <- names
	}
	synctest.Wait()
	select {
	case keys := <-f.started:
		t.Fatalf("a query of %v began beside one that does not take long", keys)
	default:
	}
	f.answers <- names
	if keys := <-f.started; len(keys) != 1 {
		t.Fatalf("the last query has the keys %v", keys)
	}
	f.answers <- names
	for n, answer := range append(answers, last) {
		if got := <-answer; !strings.HasSuffix(got.(string), " <nil>") || !strings.HasPrefix(got.(string), "name ") {
			t.Errorf("caller %d got %v", n, got)
		}
	}
	synctest.Wait()
	if f.running != 0 || f.overdue != 0 {
		t.Errorf("%d are running, %d take long", f.running, f.overdue)
	}
}

func TestBatchIsBounded(t *testing.T) { synctest.Test(t, testBatchIsBounded) }

func testBatchIsBounded(t *testing.T) {
	f := newQueryStub(t)
	lone := f.first()
	var answers []<-chan any
	for range 7 {
		answers = append(answers, f.query(t.Context(), make([]int, maxBatchKeys/3)...))
	}
	f.answers <- names
	<-lone
	for _, want := range []int{3, 3, 1} {
		if keys := <-f.started; len(keys) != want*(maxBatchKeys/3) {
			t.Fatalf("a query has %d keys", len(keys))
		}
		f.answers <- names
	}
	for _, answer := range answers {
		<-answer
	}
}

// An answer includes everything that was written before its question.
func TestBatchIsNeverOlderThanItsQuestion(t *testing.T) {
	var written atomic.Int64
	g := newBatcher(func(_ context.Context, keys []int) (map[int]int64, error) {
		seen := written.Load()
		runtime.Gosched()
		return map[int]int64{0: seen}, nil
	})
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 500 {
				mine := written.Add(1)
				if found, err := g.get(t.Context(), 0); err != nil || found[0] < mine {
					t.Errorf("read %d, %v after writing %d", found[0], err, mine)
					return
				}
			}
		})
	}
	wg.Wait()
}
