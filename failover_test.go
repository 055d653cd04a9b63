package main

import (
	"context"
	"encoding/json"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

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

// buyers walk through the shop, each from an order to its payment or its cancel, and write down what they were promised.
type buyers struct {
	*shop
	mu       sync.Mutex
	promised map[string]int // by order, the last status that the service has answered it to be in
	refused  atomic.Bool    // a call found the database away
}

func newBuyers(s *shop) *buyers {
	var minutes atomic.Int64 // pass for the limiter at each look, so that it minds nobody's insistence
	s.limits.now = func() time.Time { return s.clock.Now().Add(time.Duration(minutes.Add(1)) * time.Minute) }
	return &buyers{shop: s, promised: map[string]int{}}
}

// retry makes a call until the database is there for it, as a browser does.
func (b *buyers) retry(call func() answer) answer {
	for {
		a := call()
		if a.status < 500 || pause(b.t.Context(), postgresPoll) != nil {
			return a
		}
		if a.status != 503 {
			b.t.Errorf("a database that is away: %d %s", a.status, a.body)
		}
		b.refused.Store(true)
	}
}

func (b *buyers) promise(order string, status int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.promised[order] = status
}

// given are the promises so far.
func (b *buyers) given() map[string]int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return maps.Clone(b.promised)
}

// walk is one buyer's way with a painting.
func (b *buyers) walk(painting string, cancels bool) {
	buyer, body := newTestID(), orderBody(newNumber(), painting)
	a := b.retry(func() answer { return b.call(buyer, "POST", "/api/orders", body) })
	if a.status == 409 { // another buyer was faster
		return
	}
	var made orderCreated
	if json.Unmarshal([]byte(a.body), &made); a.status != 201 {
		b.t.Errorf("order: %d %s", a.status, a.body)
		return
	}
	b.promise(made.OrderID, statusUnpaid)
	impUID := b.charge(made.OrderID, 109000)
	if a = b.retry(func() answer { return b.report(impUID) }); a.status != 200 {
		b.t.Errorf("payment: %d %s", a.status, a.body)
		return
	}
	b.promise(made.OrderID, statusPaid)
	if !cancels {
		return
	}
	switch a = b.retry(func() answer { return b.call(buyer, "DELETE", "/api/orders/"+made.OrderID, nil) }); a.status {
	case 200:
		b.promise(made.OrderID, statusCancelled)
	case 409: // an answer before was lost: it is booked, and goes on or is done
	default:
		b.t.Errorf("cancel: %d %s", a.status, a.body)
	}
}

// wantPromised fails unless each order is at least as far as it was answered to be.
func (b *buyers) wantPromised() {
	b.t.Helper()
	given := b.given()
	var statuses map[string]int
	check(b.t, json.Unmarshal([]byte(queryText(b.t, b.config.databaseURL,
		`SELECT json_object_agg(id, status)::text FROM orders WHERE ended IS NULL`)), &statuses))
	for order, status := range given {
		if now, there := statuses[order]; !there || now < status {
			b.t.Errorf("order %s was answered as %d; there: %v, now %d", order, status, there, now)
		}
	}
}

// A primary that is killed amid checkouts takes nothing along that anybody was told of, and the service goes on with the
// promoted standby.
func TestFailover(t *testing.T) {
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
	s.wantMismatches()
}

// tcpProxy passes connections on to a server until it is shut. Then nothing comes through, and nobody is told.
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
