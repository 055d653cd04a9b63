package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"math"
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
	"testing"
	"time"
)

var figuresOrders = flag.Int("figures", 0, "measure the figures of README.md, with tables of up to so many orders")

const (
	figuresClients = 64
	figuresRounds  = 5
)

// TestFigures measures what README.md says under "How fast", prints its table and draws latency.svg. It is no test of
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
	build := exec.Command("go", "build", "-o", filepath.Join(f.dir, "lumiere"), ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return f
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
		order.id, order.userID, order.createdAt, order.heldUntil = newTestID(), newTestID(), time.Now(), time.Now().Add(time.Hour)
		_, err = s.insertOrder(f.t.Context(), actor{kind: actorBuyer}, order)
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
var lists = []string{"mine", "desk", "desk, status"}

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
	check(f.t, os.WriteFile("latency.svg", plot(galleries, lines), 0o666))
}

// grown says how much slower the calls are with the largest tables than with the smallest.
func (f *baseline) grown(what string, goal float64, lines map[string][]float64, names []string) {
	worst, slowest := 0.0, ""
	for _, name := range names {
		smallest, largest := lines[name][0], lines[name][len(lines[name])-1]
		fmt.Printf("%s: median %.2f ms, %.2f ms with the largest tables\n", name, smallest, largest)
		if ratio := largest / smallest; ratio > worst {
			worst, slowest = ratio, name
		}
	}
	f.row(fmt.Sprintf("%s: median with %d orders against 5000", what, *figuresOrders), fmt.Sprintf("at most %.1f ×", goal),
		fmt.Sprintf("%.2f × at most (%s)", worst, slowest), worst <= goal)
}

// plot draws the medians over the number of orders; both axes are logarithmic.
func plot(galleries []*loadTest, lines map[string][]float64) []byte {
	const left, top, width, height = 60, 20, 520, 360
	lowest, highest := math.Inf(1), 0.0
	for _, line := range lines {
		lowest, highest = min(lowest, slices.Min(line)), max(highest, slices.Max(line))
	}
	bottom, span := math.Floor(math.Log10(lowest)), math.Ceil(math.Log10(highest))-math.Floor(math.Log10(lowest))
	x := func(i int) float64 { return left + width*float64(i)/float64(max(len(galleries)-1, 1)) }
	y := func(ms float64) float64 { return top + height*(1-(math.Log10(ms)-bottom)/span) }

	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">
<rect width="100%%" height="100%%" fill="white"/>
`, left+width+120, top+height+50)
	for decade := 0.0; decade <= span; decade++ {
		ms := math.Pow(10, bottom+decade)
		fmt.Fprintf(&b, `<path d="M%d %.1fh%d" stroke="#ccc"/><text x="%d" y="%.1f" text-anchor="end">%g ms</text>`+"\n",
			left, y(ms), width, left-6, y(ms)+4, ms)
	}
	for i, g := range galleries {
		fmt.Fprintf(&b, `<path d="M%.1f %dv%d" stroke="#ccc"/><text x="%.1f" y="%d" text-anchor="middle">%d</text>`+"\n",
			x(i), top, height, x(i), top+height+18, g.orders)
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="middle">orders in the database; median of a call, %d connections</text>`+"\n",
		left+width/2, top+height+40, figuresClients)

	last := len(galleries) - 1
	names := slices.SortedFunc(maps.Keys(lines), func(a, b string) int { return cmp.Compare(lines[b][last], lines[a][last]) })
	label := 0.0
	for i, name := range names {
		colour := fmt.Sprintf("hsl(%d,70%%,40%%)", 360*i/len(names))
		points := ""
		for i, ms := range lines[name] {
			points += fmt.Sprintf("%.1f,%.1f ", x(i), y(ms))
		}
		label = max(label+13, y(lines[name][last])+4)
		fmt.Fprintf(&b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/><text x="%d" y="%.1f" fill="%s">%s</text>`+"\n",
			points, colour, left+width+8, label, colour, name)
	}
	fmt.Fprintln(&b, "</svg>")
	return b.Bytes()
}
