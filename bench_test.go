package main

import (
	"context"
	"log/slog"
	"maps"
	mathrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// tracer sees what a store sends to the database.
type tracer struct {
	trips atomic.Int64 // a statement or a batch is one

	mu   sync.Mutex
	last string           // the statement sent last
	args map[string][]any // the last arguments of each statement
}

func (t *tracer) sent(sql string, args []any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.args == nil {
		t.args = map[string][]any{}
	}
	t.last, t.args[sql] = sql, args
}

func (t *tracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	t.trips.Add(1)
	t.sent(data.SQL, data.Args)
	return ctx
}

func (t *tracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func (t *tracer) TraceBatchStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	t.trips.Add(1)
	return ctx
}

func (t *tracer) TraceBatchQuery(_ context.Context, _ *pgx.Conn, data pgx.TraceBatchQueryData) {
	t.sent(data.SQL, data.Args)
}

func (t *tracer) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData) {}

// Every call takes one round trip to the database, but for those whose answer hangs on what the gateway says or on the
// state that an order is found in:
//   - an order for a painting that is taken asks how, once it has lost;
//   - pay reads the books under their locks, decides, and writes: two, in one transaction;
//   - a step reads the order's state, which says whether this caller may move it there, and then changes it from that state;
//   - the deletion of an unpaid order does the same, with the gateway asked in between;
//   - a cancel reads the state, books the refund before the gateway is asked for it, and then settles like pay.
func TestTrips(t *testing.T) {
	s := newShop(t)
	free := s.painting(99000)
	unpaid, toDelete := s.order(buyerA, s.painting(99000)), s.order(buyerB, s.painting(99000))
	impUID := s.charge(unpaid, 109000)
	toCancel, _, _ := s.paid(newTestID())
	toStep, _, _ := s.paid(newTestID())
	for _, row := range []struct {
		trips              int64
		user, method, path string
		body               any
		status             int
	}{
		{0, "", "GET", "/api/products/cart-items", nil, 200},
		{1, "", "GET", "/api/products/cart-items?productId=" + free + "&productId=" + newTestID(), nil, 200},
		{1, buyerA, "GET", "/api/products/total-price?productId=" + free, nil, 200},
		{1, newTestID(), "POST", "/api/orders", orderBody(newNumber(), free), 201},
		{2, newTestID(), "POST", "/api/orders", orderBody(newNumber(), free), 409},
		{1, buyerA, "GET", "/api/orders/" + unpaid, nil, 200},
		{1, buyerA, "GET", "/api/orders/latest", nil, 200},
		{1, buyerA, "GET", "/api/orders/mine", nil, 200},
		{1, adminID, "GET", "/api/orders", nil, 200},
		{1, adminID, "GET", "/api/orders?number=" + newNumber(), nil, 200},
		{1, buyerA, "GET", "/api/orders/" + unpaid + "/history", nil, 200},
		{2, "", "PATCH", "/api/orders/pay", map[string]string{"imp_uid": impUID}, 200},
		{2, "", "POST", "/api/payments/webhook", map[string]string{"imp_uid": impUID}, 200},
		{2, adminID, "PATCH", "/api/orders/" + toStep, map[string]int{"status": 1}, 200},
		{1, buyerA, "DELETE", "/api/orders/" + toStep, nil, 404},
		{2, buyerB, "DELETE", "/api/orders/" + toDelete, nil, 200},
		{4, adminID, "DELETE", "/api/orders/" + toCancel, nil, 200},
		{0, "", "GET", "/healthz", nil, 200},
		{1, "", "GET", "/readyz", nil, 200},
	} {
		before := s.traced.trips.Load()
		s.want(s.call(row.user, row.method, row.path, row.body), row.status, "")
		if got := s.traced.trips.Load() - before; got > row.trips {
			t.Errorf("%s %s: %d trips, want %d", row.method, row.path, got, row.trips)
		}
	}
}

// Planning some of the statements takes longer than executing them. PostgreSQL keeps the plan of a prepared statement once
// it has planned it five times, unless a plan for the arguments at hand always looks cheaper: so no estimate may hang on
// them, but for the desk's pages, where it is worth knowing how many to skip. And none reads a whole table that grows with
// the years.
func TestPlans(t *testing.T) {
	s := newShop(t)
	g := newLoadTest(t, s.config.databaseURL, 20000, s.now)
	const rounds = 10 // one call at a time needs one connection, so that all is prepared there
	planned := s.countPlans()
	var eachRound []int64
	for i := range rounds {
		before := planned.Load()
		painting := g.free[i]
		order := s.order(buyerA, painting)
		s.want(s.report(s.charge(order, 109000)), 200, "")
		for _, path := range []string{"/api/products/cart-items?productId=" + painting, "/api/orders/" + order, "/api/orders/latest",
			"/api/orders/mine", "/api/orders/" + order + "/history"} {
			s.want(s.call(buyerA, "GET", path, nil), 200, "")
		}
		s.want(s.call(adminID, "PATCH", "/api/orders/"+order, map[string]int{"status": 1}), 200, "")
		s.want(s.call(adminID, "PATCH", "/api/orders/"+order, map[string]int{"status": 4}), 200, "")
		s.want(s.call(adminID, "DELETE", "/api/orders/"+order, nil), 200, "")
		s.want(s.call(buyerA, "DELETE", "/api/orders/"+s.order(buyerA, painting), nil), 200, "")
		eachRound = append(eachRound, planned.Load()-before)
		for _, query := range []string{"", "?status=0", "?status=-1", "?number=" + newNumber(), "?status=1&number=" + newNumber()} {
			s.want(s.call(adminID, "GET", "/api/orders"+query, nil), 200, "")
		}
	}
	if slices.Min(eachRound[rounds-4:]) > 0 { // statistics that change have all planned once more, now and then
		t.Errorf("so many statements are planned in each round: %v; if none is named below, they are the triggers'", eachRound)
	}
	_, err := s.store.readOpenBalances(t.Context(), s.now())
	check(t, err)
	check(t, s.settler.reconcileRound(t.Context()))
	rows, _ := s.store.pool.Query(t.Context(), `
		SELECT custom_plans || ' of ' || generic_plans + custom_plans || ': ' || statement FROM pg_prepared_statements
		WHERE custom_plans > 5 AND generic_plans + custom_plans >= $1 AND statement NOT LIKE '% OFFSET $%'`, rounds)
	replanned, err := pgx.CollectRows(rows, pgx.RowTo[string])
	check(t, err)
	for _, statement := range replanned {
		t.Errorf("planned anew %s", statement)
	}
	for statement, args := range maps.Clone(s.traced.args) {
		if !strings.Contains(statement, "orders") && !strings.Contains(statement, "payments") {
			continue
		}
		rows, _ := s.store.pool.Query(t.Context(), "EXPLAIN "+statement, args...)
		plan, err := pgx.CollectRows(rows, pgx.RowTo[string])
		check(t, err)
		if text := strings.Join(plan, "\n"); regexp.MustCompile(`Seq Scan on (orders|payments|history)`).MatchString(text) {
			t.Errorf("%s\nreads a whole table:\n%s", statement, text)
		}
	}
	// With millions of orders the planner would read them all for the unpaid ones if it took those for many.
	estimate := queryText(t, g.database, `EXPLAIN SELECT FROM orders WHERE status = -1 AND ended IS NULL`)
	if rows, err := strconv.Atoi(regexp.MustCompile(`rows=(\d+)`).FindStringSubmatch(estimate)[1]); err != nil || rows > 200 {
		t.Errorf("the planner expects %d of 40 unpaid orders", rows)
	}
}

// countPlans counts what the database plans for this shop, its triggers' statements too.
func (s *shop) countPlans() *atomic.Int64 {
	var planned atomic.Int64
	config := s.store.pool.Config()
	config.ConnConfig.RuntimeParams["log_planner_stats"] = "on"
	config.ConnConfig.RuntimeParams["client_min_messages"] = "log"
	config.ConnConfig.OnNotice = func(_ *pgconn.PgConn, notice *pgconn.Notice) {
		if notice.Message == "PLANNER STATISTICS" {
			planned.Add(1)
		}
	}
	s.store.pool.Close()
	var err error
	s.store.pool, err = pgxpool.NewWithConfig(s.t.Context(), config)
	check(s.t, err)
	return &planned
}

// BenchmarkCalls measures each call over real HTTP, with 64 connections, beside what it asks of the store: the bare
// statement through the driver. The allocations are the service's alone.
func BenchmarkCalls(b *testing.B) {
	s := newShop(b)
	s.log = slog.New(slog.DiscardHandler)
	gateway := httptest.NewServer(http.HandlerFunc(instantGateway))
	b.Cleanup(gateway.Close)
	s.settler.gateway.url = gateway.URL
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
		{"desk", func(ctx context.Context) error {
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
