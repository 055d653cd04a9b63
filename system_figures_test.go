package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

var figuresOrders = flag.Int("figures", 0, "measure the figures of docs/performance.md, with tables of up to so many orders")

const (
	figuresClients = 64
	figuresRounds  = 5
)

// TestFigures measures what docs/performance.md says, prints its table and the latencies. It is no test of
// anything: a goal that is missed is only said. It needs Linux, pgbench, wrk, and 12 GB of disk for 5,000,000 orders; and for
// those half of 24 GB of memory as huge pages, without which each connection pays for each page that it sees first.
func TestFigures(t *testing.T) {
	if *figuresOrders == 0 {
		t.Skip("measures for half an hour, on a quiet machine: go test -run TestFigures -figures 5000000 -timeout 0")
	}
	f := newBaseline(t)
	var galleries []*loadTest
	for orders := 5000; orders <= *figuresOrders; orders *= 10 {
		name := fmt.Sprintf("gallery_%d", orders)
		execSQL(t, f.server.url, "CREATE DATABASE "+name)
		galleries = append(galleries, newLoadTest(t, withDatabase(t, f.server.url, name), orders, time.Now))
	}
	execSQL(t, f.server.url, "CHECKPOINT")
	for _, g := range galleries { // the largest last
		execSQL(t, g.database, `CREATE EXTENSION pg_prewarm; SELECT pg_prewarm(oid) FROM pg_class
			WHERE relkind IN ('r', 'i', 't') AND relnamespace IN ('public'::regnamespace, 'pg_toast'::regnamespace)`)
	}
	largest := galleries[len(galleries)-1]
	f.starts(largest)
	for _, g := range galleries[:len(galleries)-1] {
		f.serve(g)
	}
	process, _ := f.serve(largest)
	time.Sleep(time.Second)
	idle := memory(t, process, "VmRSS")
	for _, read := range []string{"cart-items", "total-price", "detail", "latest"} {
		f.againstStatement(largest, read)
	}
	f.checkouts(largest)
	f.growth(galleries)
	f.row("memory", "busy with 64 connections under 64 MB, idle under 24 MB", fmt.Sprintf("busy %d MB, idle %d MB",
		memory(t, process, "VmHWM")>>20, idle>>20), memory(t, process, "VmHWM") < 64<<20 && idle < 24<<20)
	f.oneForAll(largest)
	fmt.Printf("\n| work | goal | measured |\n|---|---|---|\n%s\n", strings.Join(f.rows, "\n"))
}

// baseline is one run: a private PostgreSQL, the program, a gateway, and what has been measured so far.
type baseline struct {
	t       *testing.T
	dir     string
	server  *postgresServer
	gateway *httptest.Server
	rows    []string // of the table
}

func newBaseline(t *testing.T) *baseline {
	f := &baseline{t: t, dir: postgresDir(t), gateway: httptest.NewServer(http.HandlerFunc(instantGateway))}
	t.Cleanup(f.gateway.Close)
	// Settings of a machine of its own that keeps what it has committed; the rest is PostgreSQL's default.
	settings := map[string]string{
		"fsync": "on", "synchronous_commit": "on", "max_connections": "200", "max_wal_size": "16GB", "checkpoint_timeout": "30min",
		"shared_buffers": fmt.Sprintf("%dMB", memoryOfMachine(t)/2>>20),
	}
	f.server = runPostgres(t, postgresConfig{dir: f.dir, settings: settings})
	fmt.Printf("%d cores, %d GB, of them %d in huge pages, %s, %s with %v\n", runtime.NumCPU(), memoryOfMachine(t)>>30,
		kilobytes(t, "/proc/meminfo", "Hugetlb")>>30, runtime.Version(),
		queryText(t, f.server.url, "SELECT split_part(version(), ' on ', 1)"), settings)
	buildProgram(t, f.dir)
	return f
}

// buildProgram builds the program into a directory and returns its file.
func buildProgram(t testing.TB, dir string) (file string) {
	file = filepath.Join(dir, "lumiere")
	build := exec.Command("go", "build", "-o", file, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return file
}

// row says what was measured, and whether that is what was aimed at.
func (f *baseline) row(work, goal, measured string, reached bool) {
	if !reached {
		measured = "**missed:** " + measured
	}
	f.rows = append(f.rows, fmt.Sprintf("| %s | %s | %s |", work, goal, measured))
	fmt.Printf("%s: %s (goal: %s)\n", work, measured, goal)
}

// serve starts the program before a gallery and returns how long it took to be ready.
func (f *baseline) serve(g *loadTest) (process *os.Process, took time.Duration) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(f.t, err)
	g.address = listener.Addr().String()
	listener.Close()
	log, err := os.CreateTemp(f.dir, "log-")
	check(f.t, err)
	defer log.Close()
	program := exec.Command(filepath.Join(f.dir, "lumiere"))
	program.Stderr = log
	program.Env = []string{"DATABASE_URL=" + g.database, "JWT_SECRET=" + testSecret, "IAMPORT_KEY=key", "IAMPORT_SECRET=secret",
		"IAMPORT_URL=" + f.gateway.URL, "PORT=" + strconv.Itoa(listener.Addr().(*net.TCPAddr).Port)}
	start := time.Now()
	check(f.t, program.Start())
	f.t.Cleanup(func() { program.Process.Kill(); program.Wait() })
	for time.Since(start) < 10*time.Second {
		if w, err := dialWire(g.address); err == nil {
			status, _, err := w.do(wireRequest("GET", "/readyz", "", ""))
			w.conn.Close()
			if err == nil && status == http.StatusOK {
				return program.Process, time.Since(start)
			}
		}
		time.Sleep(time.Millisecond)
	}
	f.t.Fatal("the program is not ready after ten seconds")
	return nil, 0
}

// memory is a line of the process's status, in bytes.
func memory(t testing.TB, process *os.Process, line string) int {
	return kilobytes(t, fmt.Sprintf("/proc/%d/status", process.Pid), line)
}

func memoryOfMachine(t testing.TB) int { return kilobytes(t, "/proc/meminfo", "MemTotal") }

// kilobytes reads a line such as "VmRSS:  1234 kB", in bytes.
func kilobytes(t testing.TB, file, line string) int {
	text, err := os.ReadFile(file)
	check(t, err)
	found := regexp.MustCompile(line + `:\s+(\d+) kB`).FindSubmatch(text)
	n, err := strconv.Atoi(string(found[1]))
	check(t, err)
	return n << 10
}

// ---- pgbench

// statement is what the store sends for call.
func (f *baseline) statement(g *loadTest, call func(*store) error) *tracer {
	seen := &tracer{}
	store, err := openStore(f.t.Context(), g.database, seen)
	check(f.t, err)
	defer store.close()
	check(f.t, call(store))
	return seen
}

// pgbench sends the last statement from as many clients as the service has and returns how often a second. Before each one
// it executes the commands, which begin with :n as the number of those before it and first. Arguments in place of the
// recorded ones are SQL, with the variables that the commands set.
func (t *tracer) pgbench(f *baseline, g *loadTest, first int, commands string, instead map[int]string) float64 {
	script := regexp.MustCompile(`\$\d+`).ReplaceAllStringFunc(t.last, func(parameter string) string {
		n, _ := strconv.Atoi(parameter[1:])
		if sql, ok := instead[n]; ok {
			return sql
		}
		return ":a" + parameter[1:]
	})
	file := filepath.Join(f.dir, "statement.sql")
	check(f.t, os.WriteFile(file, []byte("\\set n :n + 1\n"+commands+"\n"+script+";\n"), 0o600))
	args := []string{"--no-vacuum", "--protocol=prepared", "--client=" + strconv.Itoa(figuresClients), "--jobs=2", "--time=8", "--progress=1",
		"--file=" + file, "--define=n=" + strconv.Itoa(first), "--define=orders=" + strconv.Itoa(g.orders)}
	for i, arg := range t.args[t.last] {
		args = append(args, fmt.Sprintf("--define=a%d=%s", i+1, pgText(arg)))
	}
	out, err := exec.Command(filepath.Join(f.server.bin, "pgbench"), append(args, g.database)...).CombinedOutput()
	if err != nil {
		f.t.Fatalf("pgbench: %v\n%s", err, out)
	}
	var rates []float64
	for _, line := range regexp.MustCompile(`progress: .* s, ([\d.]+) tps`).FindAllSubmatch(out, -1) {
		rate, _ := strconv.ParseFloat(string(line[1]), 64)
		rates = append(rates, rate)
	}
	return median(rates[len(rates)/2:]) // the first seconds warm it up
}

// pgText is an argument as PostgreSQL reads it.
func pgText(arg any) string {
	switch a := arg.(type) {
	case time.Time:
		return a.Format(time.RFC3339Nano)
	case *string:
		return *a
	case []string, []bool, []int64:
		return "{" + strings.ReplaceAll(strings.Trim(fmt.Sprint(a), "[]"), " ", ",") + "}"
	}
	return fmt.Sprint(arg)
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}

// ---- what is measured

// starts measures how soon the program is ready with a database that has everything.
func (f *baseline) starts(g *loadTest) {
	var took []float64
	for range figuresRounds {
		process, ready := f.serve(g)
		took = append(took, ready.Seconds())
		check(f.t, process.Kill())
	}
	f.row("start against an existing database", "ready in under 0.15 s", fmt.Sprintf("%.3f s", median(took)), median(took) < 0.15)
}

// sqlID is galleryID in SQL.
func sqlID(kind, number string) string {
	return `'61a4` + kind + `' || lpad(to_hex((` + number + `)::bigint), 18, '0')`
}

// readingKeys draw what the clients ask for: three paintings, and an order with its buyer, as gallery.orderAt.
const readingKeys = `
\set i random(1, :orders / 5)
\set j random(1, :orders / 5)
\set k random(1, :orders / 5)
\set o 2 * random(1, (:orders - :orders / 500) / 2)
\set b :o * 7919 % (:orders / 10)`

// againstStatement compares one endpoint with the statement behind it; both ask for keys at random.
func (f *baseline) againstStatement(g *loadTest, name string) {
	var keys map[int]string
	statement := f.statement(g, func(s *store) (err error) {
		o, buyer := g.shown[0], "ARRAY["+sqlID("0b", ":b")+"]"
		switch name {
		case "detail":
			keys = map[int]string{1: "ARRAY[" + sqlID("0d", ":o") + "]", 2: buyer}
			_, err = s.findOrder(f.t.Context(), o.ID, caller{id: o.Buyer})
		case "latest":
			keys = map[int]string{1: buyer}
			_, err = s.findLatestOrder(f.t.Context(), o.Buyer)
		default:
			keys = map[int]string{1: "ARRAY[" + sqlID("0a", ":i") + ", " + sqlID("0a", ":j") + ", " + sqlID("0a", ":k") + "]"}
			_, err = s.findPaintings(f.t.Context(), g.cart())
		}
		return err
	})
	script := f.wrkScript(g.requests(name))
	var ratios, rates, bare, slowest []float64
	for range figuresRounds {
		rate, p99 := f.wrk(g, script)
		rates, slowest = append(rates, rate), append(slowest, p99.Seconds()*1000)
		bare = append(bare, statement.pgbench(f, g, 0, readingKeys, keys))
		ratios = append(ratios, rate/bare[len(bare)-1])
	}
	f.row(name, "≥ 1.0 × the bare statement in pgbench, p99 < 10 ms",
		fmt.Sprintf("%.2f × (%.0f of %.0f a second), p99 %.1f ms", median(ratios), median(rates), median(bare), median(slowest)),
		median(ratios) >= 1 && median(slowest) < 10)
}

// wrkScript writes what has wrk draw from these requests, and returns the file.
func (f *baseline) wrkScript(requests [][]byte) (file string) {
	var script strings.Builder
	script.WriteString("local requests = {\n")
	for _, request := range requests {
		fmt.Fprintf(&script, "%q,\n", request)
	}
	script.WriteString("}\nfunction request() return requests[math.random(#requests)] end\n")
	file = filepath.Join(f.dir, "requests.lua")
	check(f.t, os.WriteFile(file, []byte(script.String()), 0o600))
	return file
}

// wrk makes a script's requests from as many connections as pgbench, and returns how many are answered a second and how
// long 99 in 100 take at most.
func (f *baseline) wrk(g *loadTest, script string) (rate float64, p99 time.Duration) {
	out, err := exec.Command("wrk", "--threads=1", "--connections="+strconv.Itoa(figuresClients), "--duration=6s", "--latency",
		"--script="+script, "http://"+g.address).CombinedOutput()
	found := regexp.MustCompile(`(?s)99% +(\S+)\n.*Requests/sec: +([\d.]+)`).FindSubmatch(out)
	if err != nil || found == nil || bytes.Contains(out, []byte("Non-2xx")) || bytes.Contains(out, []byte("Socket errors")) {
		f.t.Fatalf("wrk: %v\n%s", err, out)
	}
	p99, err = time.ParseDuration(string(found[1]))
	check(f.t, err)
	rate, err = strconv.ParseFloat(string(found[2]), 64)
	check(f.t, err)
	return rate, p99
}

// checkouts compares whole checkouts with the statement that creates an order.
func (f *baseline) checkouts(g *loadTest) {
	statement := f.statement(g, func(s *store) error {
		body, err := json.Marshal(orderBody(newNumber(), g.takeFree()))
		check(f.t, err)
		order, err := parseOrder(body, 10000)
		check(f.t, err)
		order.id, order.userID, order.createdAt, order.hold = newTestID(), newTestID(), time.Now(), time.Hour
		_, err = s.placeOrder(f.t.Context(), actor{kind: actorBuyer}, order)
		return err
	})
	const number = `\set i :n * 64 + :client_id`
	each := map[int]string{1: `ARRAY[` + sqlID("0a", ":i / 2 * 10 + 6 + :i % 2") + `]`, 3: sqlID("0e", ":i"), 4: sqlID("0f", ":i"), 5: `'2026' || :i`}
	var ratios, rates, bare []float64
	for round := range figuresRounds {
		m := g.drive(figuresClients, 4*time.Second, checkout)
		rates = append(rates, float64(len(m["create"])+len(m["pay"]))/4)
		bare = append(bare, statement.pgbench(f, g, round*600, number, each))
		ratios = append(ratios, rates[round]/bare[round])
	}
	if queryText(f.t, g.database, `SELECT count(*)::text FROM orders WHERE id LIKE '61a40e%'`) == "0" {
		f.t.Error("pgbench has made no order")
	}
	f.row("create + pay", "requests ≥ 0.8 × the bare create statement in pgbench, > 1,000 checkouts a second",
		fmt.Sprintf("%.2f × (%.0f of %.0f a second), %.0f checkouts a second", median(ratios), median(rates), median(bare), median(rates)/2),
		median(ratios) >= 0.8 && median(rates)/2 > 1000)
}

// oneForAll has a thousand buyers order one painting at the same moment.
func (f *baseline) oneForAll(g *loadTest) {
	const buyers = 1000
	wires, requests, took := make([]*wire, buyers), make([][]byte, buyers), make([]time.Duration, buyers)
	painting := g.takeFree()
	for i := range wires {
		var err error
		wires[i], err = dialWire(g.address)
		check(f.t, err)
		defer wires[i].conn.Close()
		text, err := json.Marshal(orderBody(newNumber(), painting))
		check(f.t, err)
		requests[i] = wireRequest("POST", "/api/orders", g.token(newTestID()), string(text))
	}
	count := concurrently(buyers, func(i int) answer {
		start := time.Now()
		status, _, err := wires[i].do(requests[i])
		check(f.t, err)
		took[i] = time.Since(start)
		return answer{status: status}
	})
	slices.Sort(took)
	f.row("1,000 buyers, one painting", "every answer within a second", fmt.Sprintf("the last after %.2f s; %d got it, %d a 409",
		took[buyers-1].Seconds(), count[201], count[409]), took[buyers-1] < time.Second && count[201] == 1 && count[409] == buyers-1)
}

// lists are the calls that page through orders.
var lists = []string{"mine", "admin", "admin, status"}

// growth compares each call's median over tables of growing size.
func (f *baseline) growth(galleries []*loadTest) {
	medians := make([]map[string][]float64, len(galleries)) // by gallery and call, of each round
	flows := make([][]func(*checkoutClient), len(galleries))
	for i, g := range galleries {
		medians[i] = map[string][]float64{}
		flows[i] = []func(*checkoutClient){life}
		for _, name := range append([]string{"cart-items", "total-price", "detail", "latest", "history"}, lists...) {
			flows[i] = append(flows[i], g.reading(name))
		}
	}
	for range figuresRounds {
		for flow := range flows[0] {
			for i, g := range galleries {
				m := g.drive(figuresClients, 2*time.Second, flows[i][flow])
				for name := range m {
					medians[i][name] = append(medians[i][name], m.percentile(name, 50).Seconds()*1000)
				}
			}
		}
	}
	lines := map[string][]float64{} // milliseconds by size
	for i := range galleries {
		for name, rounds := range medians[i] {
			lines[name] = append(lines[name], median(rounds))
		}
	}
	others := slices.DeleteFunc(slices.Sorted(maps.Keys(lines)), func(name string) bool { return slices.Contains(lists, name) })
	f.grown("every call but the lists", 1.2, lines, others)
	f.grown("lists", 1.5, lines, lists)
	printLatencies(galleries, lines)
}

// printLatencies prints the medians in milliseconds, a line for each call and a column for each number of orders.
func printLatencies(galleries []*loadTest, lines map[string][]float64) {
	fmt.Printf("%-14s", "orders")
	for _, g := range galleries {
		fmt.Printf("%10d", g.orders)
	}
	fmt.Println()
	for _, name := range slices.Sorted(maps.Keys(lines)) {
		fmt.Printf("%-14s", name)
		for _, ms := range lines[name] {
			fmt.Printf("%7.2f ms", ms)
		}
		fmt.Println()
	}
}

// grown says how much slower the calls are with the largest tables than with the smallest.
func (f *baseline) grown(what string, goal float64, lines map[string][]float64, names []string) {
	worst, slowest := 0.0, ""
	for _, name := range names {
		smallest, largest := lines[name][0], lines[name][len(lines[name])-1]
		if ratio := largest / smallest; ratio > worst {
			worst, slowest = ratio, name
		}
	}
	f.row(fmt.Sprintf("%s: median with %d orders against 5000", what, *figuresOrders), fmt.Sprintf("at most %.1f ×", goal),
		fmt.Sprintf("%.2f × at most (%s)", worst, slowest), worst <= goal)
}

// BenchmarkCalls measures each call over real HTTP, with 64 connections, beside what it asks of the store: the bare
// statement through the driver. The allocations are the service's alone.
func BenchmarkCalls(b *testing.B) {
	s := newShop(b)
	s.log = slog.New(slog.DiscardHandler)
	gateway := httptest.NewServer(http.HandlerFunc(instantGateway))
	b.Cleanup(gateway.Close)
	s.iamport().url = gateway.URL
	g := newLoadTest(b, s.config.databaseURL, 5000, s.now)
	g.address = strings.TrimPrefix(s.url, "http://")
	some := func() shownOrder { return g.shown[mathrand.IntN(len(g.shown))] }
	for _, bench := range []struct {
		name      string
		statement func(context.Context) error
	}{
		{"cart-items", func(ctx context.Context) error { _, err := s.store.readPaintings(ctx, g.cart()); return err }},
		{"total-price", func(ctx context.Context) error { _, err := s.store.readPaintings(ctx, g.cart()); return err }},
		{"detail", func(ctx context.Context) error {
			o := some()
			_, err := s.store.readOrders(ctx, []orderKey{{id: o.ID, buyer: o.Buyer}})
			return err
		}},
		{"latest", func(ctx context.Context) error { _, err := s.store.readLatest(ctx, []string{some().Buyer}); return err }},
		{"history", func(ctx context.Context) error {
			o := some()
			_, err := s.store.historyOf(ctx, o.ID, caller{id: o.Buyer})
			return err
		}},
		{"mine", func(ctx context.Context) error {
			_, _, err := s.store.listBuyerOrders(ctx, some().Buyer, 0, minePageSize)
			return err
		}},
		{"admin", func(ctx context.Context) error {
			_, _, err := s.store.listAllOrders(ctx, orderFilter{}, 0, adminPageSize)
			return err
		}},
		{"life", nil},
	} {
		flow := life
		if bench.name != "life" {
			flow = g.reading(bench.name)
		}
		b.Run(bench.name+"/http", func(b *testing.B) {
			s.measure(b, func(pb *testing.PB) {
				w, err := dialWire(g.address)
				check(b, err)
				defer w.conn.Close()
				c := &checkoutClient{loadTest: g, wire: w, taken: timings{}}
				for pb.Next() {
					flow(c)
				}
			})
		})
		if bench.statement != nil {
			b.Run(bench.name+"/statement", func(b *testing.B) {
				s.measure(b, func(pb *testing.PB) {
					for pb.Next() {
						check(b, bench.statement(b.Context()))
					}
				})
			})
		}
	}
}

// measure runs body in 64 goroutines and reports how often a second, and with how many trips, what it repeats is done.
func (s *shop) measure(b *testing.B, body func(*testing.PB)) {
	b.ReportAllocs()
	b.SetParallelism((64 + runtime.GOMAXPROCS(0) - 1) / runtime.GOMAXPROCS(0))
	trips := s.traced.trips.Load()
	b.ResetTimer()
	b.RunParallel(body)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "requests/s")
	b.ReportMetric(float64(s.traced.trips.Load()-trips)/float64(b.N), "trips/op")
}

// loadTest is a database filled with orders, for benchmarks: a fifth as many paintings, and a tenth as many buyers.
type loadTest struct {
	t        testing.TB
	orders   int
	database string // its connection string
	address  string // of the service before it
	tokens   *tokens
	now      func() time.Time
	shown    []shownOrder // some of the orders

	mu   sync.Mutex
	free []string // some of the free paintings
}

// shownOrder is an order that its buyer sees.
type shownOrder struct{ ID, Buyer string }

// newLoadTest fills an empty database.
func newLoadTest(t testing.TB, databaseURL string, orders int, now func() time.Time) *loadTest {
	g := &loadTest{t: t, orders: orders, database: databaseURL, tokens: newTokens([]byte(testSecret), now), now: now}
	ctx := t.Context()
	store, err := openMigratedStore(ctx, databaseURL)
	check(t, err)
	defer store.close()
	conn, err := pgx.Connect(ctx, databaseURL)
	check(t, err)
	defer conn.Close(ctx)
	g.fill(conn)
	g.sample(conn)
	return g
}

// galleryFunctions say what order number n of a gallery with p paintings is: four in five are cancelled or expired;
// of the newest ones half are in a status from 0 to 4, and the last hundredth is unpaid.
const galleryFunctions = `
	SET session_replication_role = replica; -- the triggers' rows are written beside
	SET synchronous_commit = off;
	CREATE FUNCTION pg_temp.oid(kind text, n bigint) RETURNS text LANGUAGE sql IMMUTABLE AS
		$$ SELECT '61a4' || kind || lpad(to_hex(n), 18, '0') $$;
	CREATE FUNCTION pg_temp.orders(p bigint, first bigint, last bigint)
	RETURNS TABLE (id text, painting text, buyer text, status smallint, ended text, at timestamptz) LANGUAGE sql AS $$
		SELECT pg_temp.oid('0d', n), pg_temp.oid('0a', k),
			pg_temp.oid('0b', CASE WHEN unpaid THEN k ELSE n * 7919 END % (p / 2)),
			(CASE WHEN unpaid THEN -1 WHEN newest AND k % 10 < 5 THEN k % 10 WHEN n % 2 = 1 THEN -1 ELSE 5 END)::smallint,
			CASE WHEN n % 2 = 1 AND NOT unpaid AND NOT (newest AND k % 10 < 5) THEN 'expired' END,
			now() - (5 * p - n) * interval '30 seconds'
		FROM generate_series(first, last) n, LATERAL (SELECT (n - 1) % p + 1 AS k, n > 4 * p AS newest, n > 5 * p - p / 100 AS unpaid) a $$`

// galleryPaintings makes $1 paintings; galleryOrders makes the orders number $2 to $3 for so many.
const galleryPaintings = `
	INSERT INTO products (id, artist_id, artist_name, title, image, size, canvas, price, for_sale, order_id)
	SELECT pg_temp.oid('0a', k), pg_temp.oid('0c', k % 997), '안영희', '작품 ' || k, '/images/bye/1.jpg', '73x61cm', 20, 99000, true,
		CASE WHEN k % 10 < 5 OR k > $1 - $1 / 100 THEN pg_temp.oid('0d', 4 * $1 + k) END
	FROM generate_series(1, $1::bigint) k`

var galleryOrders = []string{`
	INSERT INTO orders (id, user_id, number, status, ended, created_at, updated_at, paid_at, held_until, next_look_at,
		shipping_price, total_price, product_ids, items, delivery_info, delivery_details, orderer_info)
	SELECT id, buyer, to_char(at, 'YYYYMMDDHH24MISS'), status, ended, at, at + '1 minute', CASE WHEN status >= 0 THEN at + '1 minute' END,
		now() + '1 day', CASE WHEN status = -1 AND ended IS NULL THEN now() + '1 day' END, 10000, 109000, ARRAY[painting],
		json_build_array(json_build_object('image', '/images/bye/1.jpg', 'title', '작품', 'artist', '안영희', 'size', '73x61cm(20호)',
			'price', 99000, 'product', painting)),
		'{"address":"[00000] 어느시 어느로 1","detailedAddress":"101호","receiver":"홍길동","contactNum":"010-0000-0000"}',
		'{"receiveAt":"문 앞","requestedTerms":"도착 시 문자 주세요"}',
		'{"name":"홍길동","phoneNum":"010-0000-0000","email":"buyer@example.com","refundTerms":"품절 시 결제수단으로 환불"}'
	FROM pg_temp.orders($1, $2, $3)`, `
	INSERT INTO payments (imp_uid, order_id, state, reason, currency, amount, refunded, paid_at, created_at, updated_at)
	SELECT 'imp_' || id, id, CASE status WHEN 5 THEN 'refunded' ELSE 'kept' END, CASE status WHEN 5 THEN 'buyer cancelled' END,
		'KRW', 109000, CASE status WHEN 5 THEN 109000 ELSE 0 END, at, at, at
	FROM pg_temp.orders($1, $2, $3) WHERE status >= 0`, `
	INSERT INTO history (order_id, at, who, from_status, to_status, why)
	SELECT id, at + step * interval '1 minute', 'buyer', CASE step WHEN 1 THEN -1 END, CASE step WHEN 1 THEN status ELSE -1 END,
		CASE step WHEN 1 THEN coalesce(ended, 'paid') ELSE 'created' END
	FROM pg_temp.orders($1, $2, $3), generate_series(0, 1) step WHERE step = 0 OR status <> -1 OR ended IS NOT NULL`, `
	INSERT INTO order_tally SELECT status, count(*) FROM pg_temp.orders($1, $2, $3) WHERE status >= 0 GROUP BY status`, `
	INSERT INTO order_search SELECT id, status, at, '01000000000', NULL, 'buyer@example.com', '홍길동', NULL
	FROM pg_temp.orders($1, $2, $3) WHERE status >= 0`,
}

// fill writes the orders a batch at a time, and prints how far it is when that takes long.
func (g *loadTest) fill(conn *pgx.Conn) {
	const step = 50000
	ctx, paintings := g.t.Context(), g.orders/5
	_, err := conn.Exec(ctx, galleryFunctions)
	check(g.t, err)
	_, err = conn.Exec(ctx, galleryPaintings, paintings)
	check(g.t, err)
	for first := 1; first <= g.orders; first += step {
		for _, statement := range galleryOrders {
			_, err := conn.Exec(ctx, statement, paintings, first, min(first+step-1, g.orders))
			check(g.t, err)
		}
		if g.orders > step {
			fmt.Printf("\r%d of %d orders", min(first+step-1, g.orders), g.orders)
		}
	}
	_, err = conn.Exec(ctx, "VACUUM ANALYZE")
	check(g.t, err)
}

// paintingID is the id of the painting number k, from 1.
func paintingID(k int) string { return galleryID("0a", k) }

// galleryID is the id of a gallery's row of this kind and number, as pg_temp.oid.
func galleryID(kind string, n int) string { return fmt.Sprintf("61a4%s%018x", kind, n) }

// orderAt is the order number n, an even one and so not expired, but none of the unpaid ones at the end. readingKeys draws
// the same for pgbench.
func (g *loadTest) orderAt(n int) shownOrder {
	return shownOrder{ID: galleryID("0d", n), Buyer: galleryID("0b", n*7919%(g.orders/10))}
}

// sample chooses the orders and the free paintings that are asked for.
func (g *loadTest) sample(conn *pgx.Conn) {
	g.shown = make([]shownOrder, min(g.orders, 10000))
	for i := range g.shown {
		g.shown[i] = g.orderAt(2 + 2*mathrand.IntN((g.orders-g.orders/500)/2))
	}
	rows, _ := conn.Query(g.t.Context(), `SELECT id FROM products WHERE order_id IS NULL AND title ~ '[89]$'`)
	var err error
	g.free, err = pgx.CollectRows(rows, pgx.RowTo[string])
	check(g.t, err)
}

// instantGateway answers at once and remembers nothing: imp_ORDER has paid for ORDER, what is cancelled has gone back,
// and no order has any other payment.
func instantGateway(w http.ResponseWriter, r *http.Request) {
	impUID, status, cancelled := strings.TrimPrefix(r.URL.Path, "/payments/"), "paid", 0
	switch {
	case r.URL.Path == "/users/getToken":
		now := time.Now().Unix()
		fmt.Fprintf(w, `{"code":0,"message":null,"response":{"access_token":"token","now":%d,"expired_at":%d}}`, now, now+1800)
		return
	case r.URL.Path == "/payments/cancel":
		var body fakeCancel
		json.NewDecoder(r.Body).Decode(&body)
		impUID, status, cancelled = body.ImpUID, "cancelled", 109000
	case !strings.HasPrefix(impUID, "imp_"):
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprintf(w, `{"code":-1,"message":%q,"response":null}`, fakeNotFound)
		return
	}
	fmt.Fprintf(w, `{"code":0,"message":null,"response":{"imp_uid":%q,"merchant_uid":%q,"status":%q,"currency":"KRW",
		"amount":109000,"cancel_amount":%d,"sandbox":false,"paid_at":%d}}`,
		impUID, strings.TrimPrefix(impUID, "imp_"), status, cancelled, time.Now().Unix())
}

// ---- load

// timings are how long calls took, by their name.
type timings map[string][]time.Duration

func (m timings) percentile(name string, percent int) time.Duration {
	all := slices.Sorted(slices.Values(m[name]))
	return all[len(all)*percent/100]
}

// checkoutClient is one connection to the service.
type checkoutClient struct {
	*loadTest
	wire  *wire
	taken timings

	painting string // of its own
}

// call makes a request and notes how long it took.
func (c *checkoutClient) call(name string, request []byte, want int) []byte {
	start := time.Now()
	status, body, err := c.wire.do(request)
	c.taken[name] = append(c.taken[name], time.Since(start))
	if err != nil || status != want {
		panic(fmt.Sprintf("%s answered %d %s %v, want %d", name, status, body, err, want))
	}
	return body
}

// drive has clients do flow over and over for a while, after a second to warm up.
func (g *loadTest) drive(clients int, length time.Duration, flow func(*checkoutClient)) timings {
	all := timings{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	begin := time.Now().Add(time.Second)
	for range clients {
		wg.Go(func() {
			w, err := dialWire(g.address)
			check(g.t, err)
			defer w.conn.Close()
			c := &checkoutClient{loadTest: g, wire: w, taken: timings{}}
			for time.Now().Before(begin) {
				flow(c)
			}
			clear(c.taken)
			for flow(c); time.Since(begin) < length; {
				flow(c)
			}
			g.giveBack(c.painting)
			mu.Lock()
			defer mu.Unlock()
			for name, took := range c.taken {
				all[name] = append(all[name], took...)
			}
		})
	}
	wg.Wait()
	return all
}

func (g *loadTest) token(user string) string {
	token, err := g.tokens.issue(caller{id: user, admin: user == adminID}, g.now(), 3*time.Hour)
	check(g.t, err)
	return token
}

// takeFree returns a painting that is free.
func (g *loadTest) takeFree() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.free) == 0 {
		panic("no painting is free any more")
	}
	id := g.free[0]
	g.free = g.free[1:]
	return id
}

// giveBack notes that a painting is free again; "" is none.
func (g *loadTest) giveBack(painting string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if painting != "" {
		g.free = append(g.free, painting)
	}
}

// cart is three paintings.
func (g *loadTest) cart() []string {
	n := g.orders / 5
	return []string{paintingID(1 + mathrand.IntN(n)), paintingID(1 + mathrand.IntN(n)), paintingID(1 + mathrand.IntN(n))}
}

// requests are one call's questions, about many orders and paintings.
func (g *loadTest) requests(name string) [][]byte {
	byAdmin := g.token(adminID)
	ask := map[string]func(o shownOrder) []byte{
		"cart-items": func(shownOrder) []byte {
			return wireRequest("GET", "/api/products/cart-items?productId="+strings.Join(g.cart(), "&productId="), "", "")
		},
		"total-price": func(o shownOrder) []byte {
			return wireRequest("GET", "/api/products/total-price?productId="+strings.Join(g.cart(), "&productId="), g.token(o.Buyer), "")
		},
		"detail": func(o shownOrder) []byte { return wireRequest("GET", "/api/orders/"+o.ID, g.token(o.Buyer), "") },
		"history": func(o shownOrder) []byte {
			return wireRequest("GET", "/api/orders/"+o.ID+"/history", g.token(o.Buyer), "")
		},
		"latest":        func(o shownOrder) []byte { return wireRequest("GET", "/api/orders/latest", g.token(o.Buyer), "") },
		"mine":          func(o shownOrder) []byte { return wireRequest("GET", "/api/orders/mine", g.token(o.Buyer), "") },
		"admin":         func(shownOrder) []byte { return wireRequest("GET", "/api/orders", byAdmin, "") },
		"admin, status": func(shownOrder) []byte { return wireRequest("GET", "/api/orders?status=0", byAdmin, "") },
	}[name]
	requests := make([][]byte, len(g.shown))
	for i, o := range g.shown {
		requests[i] = ask(o)
	}
	return requests
}

// reading is the flow of a client that asks one call's questions.
func (g *loadTest) reading(name string) func(*checkoutClient) {
	requests := g.requests(name)
	return func(c *checkoutClient) { c.call(name, requests[mathrand.IntN(len(requests))], http.StatusOK) }
}

// order makes an order for a painting and returns its id.
func (c *checkoutClient) order(buyer, painting string) string {
	text, err := json.Marshal(orderBody(newNumber(), painting))
	check(c.t, err)
	var made orderCreated
	check(c.t, json.Unmarshal(c.call("create", wireRequest("POST", "/api/orders", c.token(buyer), string(text)), 201), &made))
	return made.OrderID
}

// pay reports that an order is paid.
func (c *checkoutClient) pay(buyer, order string) {
	c.call("pay", wireRequest("PATCH", "/api/orders/pay", c.token(buyer), `{"imp_uid":"imp_`+order+`"}`), 200)
}

// checkout is an order of a new buyer's, and its payment.
func checkout(c *checkoutClient) {
	buyer := newTestID()
	c.pay(buyer, c.order(buyer, c.takeFree()))
}

// life leads an order through everything that may become of it, and another one to its end unpaid. The painting is the
// client's for good, so that the tables grow little.
func life(c *checkoutClient) {
	if c.painting == "" {
		c.painting = c.takeFree()
	}
	buyer := newTestID()
	order := c.order(buyer, c.painting)
	c.pay(buyer, order)
	path, byBuyer, byAdmin := "/api/orders/"+order, c.token(buyer), c.token(adminID)
	for status := statusPreparing; status <= statusDelivered; status++ {
		c.call("advance", wireRequest("PATCH", path, byAdmin, fmt.Sprintf(`{"status":%d}`, status)), 200)
	}
	c.call("return", wireRequest("DELETE", path, byBuyer, `{"status":4}`), 200)
	c.call("cancel", wireRequest("DELETE", path, byAdmin, ""), 200)
	order = c.order(buyer, c.painting)
	c.call("delete", wireRequest("DELETE", "/api/orders/"+order, byBuyer, ""), 200)
}

// wire is a client's connection that costs next to nothing, so that what is measured is the service.
type wire struct {
	conn   net.Conn
	answer *bufio.Reader
	body   []byte
}

func dialWire(address string) (*wire, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	return &wire{conn: conn, answer: bufio.NewReaderSize(conn, 16<<10)}, nil
}

// do sends a whole request and reads its answer; the body is good until the next call.
func (w *wire) do(request []byte) (status int, body []byte, err error) {
	if _, err := w.conn.Write(request); err != nil {
		return 0, nil, err
	}
	length := 0
	for {
		line, err := w.answer.ReadSlice('\n')
		if err != nil {
			return 0, nil, err
		}
		switch value, isLength := bytes.CutPrefix(line, []byte("Content-Length: ")); {
		case status == 0:
			status, err = strconv.Atoi(string(line[len("HTTP/1.1 "):][:3]))
		case isLength:
			length, err = strconv.Atoi(string(bytes.TrimSpace(value)))
		}
		if err != nil {
			return 0, nil, err
		}
		if len(line) == len("\r\n") {
			break
		}
	}
	w.body = slices.Grow(w.body[:0], length)[:length]
	_, err = io.ReadFull(w.answer, w.body)
	return status, w.body, err
}

// wireRequest is a request as it goes over the wire.
func wireRequest(method, path, token, body string) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: localhost\r\n", method, path)
	if token != "" {
		fmt.Fprintf(&b, "Authorization: Bearer %s\r\n", token)
	}
	if body != "" {
		fmt.Fprintf(&b, "Content-Type: application/json\r\nContent-Length: %d\r\n", len(body))
	}
	return []byte(b.String() + "\r\n" + body)
}
