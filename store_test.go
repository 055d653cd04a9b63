package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

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
//   - the administrator's search finds the orders, and then reads those of one page;
//   - an order for a painting that is taken asks how, once it has lost;
//   - money that does not just pay its order: the ledger is read under its locks once more, and what is decided is written; a
//     refund is settled like that, too;
//   - advancing an order reads its state, which says whether this caller may move it there, and then changes it from that state;
//   - the deletion of an unpaid order does the same, with the gateway asked in between;
//   - a cancel reads the state, books the refund before the gateway is asked for it, and then settles like pay.
func TestTrips(t *testing.T) {
	s := newShop(t)
	free := s.painting(99000)
	unpaid, toDelete := s.order(buyerA, s.painting(99000)), s.order(buyerB, s.painting(99000))
	impUID, forged := s.charge(unpaid, 109000), s.charge(s.order(newTestID(), s.painting(99000)), 1)
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
		{2, adminID, "GET", "/api/orders?q=buyer@example.com", nil, 200},
		{1, buyerA, "GET", "/api/orders/" + unpaid + "/history", nil, 200},
		{1, "", "PATCH", "/api/orders/pay", map[string]string{"imp_uid": impUID}, 200},
		{1, "", "POST", "/api/payments/webhook", map[string]string{"imp_uid": impUID}, 200},
		{5, "", "PATCH", "/api/orders/pay", map[string]string{"imp_uid": forged}, 400},
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
// them, but for the administrator's pages, where it is worth knowing how many to skip. And none reads a whole table that grows with
// the years.
func TestPlans(t *testing.T) {
	s := newShop(t)
	g := newLoadTest(t, s.config.databaseURL, 20000, s.now)
	const rounds = 10 // one call at a time needs one connection, so that all is prepared there
	planned := s.countPlans()
	var eachRound []int64
	// A change of a table's statistics, or of many tables anywhere in the cluster, has all planned once more: a round without a plan
	// can come late.
	for len(eachRound) < rounds || eachRound[len(eachRound)-1] > 0 && len(eachRound) < 20*rounds {
		before := planned.Load()
		painting := g.takeFree()
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
		for _, query := range []string{"", "?status=0", "?status=-1", "?number=" + newNumber(), "?status=1&number=" + newNumber(),
			"?q=010-0000-0000", "?q=buyer@example.com", "?q=" + url.QueryEscape("홍"), "?status=3&q=" + url.QueryEscape("홍길동"), "?status=-1&q=" + url.QueryEscape("홍"),
			"?q=" + url.QueryEscape("홍") + "&number=" + newNumber()} {
			s.want(s.call(adminID, "GET", "/api/orders"+query, nil), 200, "")
		}
	}
	if eachRound[len(eachRound)-1] > 0 {
		t.Errorf("so many statements are planned in each round: %v; if none is named below, they are the triggers'", eachRound)
	}
	_, err := s.store.readOpenBalances(t.Context(), s.now(), s.settler.gateways.lists())
	check(t, err)
	check(t, s.settler.reconcileRound(t.Context()))
	paid := queryText(t, g.database, `SELECT id FROM orders WHERE status >= 0 LIMIT 1`) // none of these changes it
	s.store.expireHold(t.Context(), byReconciler, paid, s.now())
	s.store.withdrawPainting(t.Context(), byReconciler, newTestID(), paid, s.now())
	s.store.reserveForPayment(t.Context(), byReconciler, paid, s.now(), s.now())
	s.store.releaseReservation(t.Context(), paid, s.now(), s.now())
	for range rounds {
		_, err := s.store.claimNotification(t.Context(), "", s.now(), s.now())
		check(t, err)
	}
	rows, _ := s.store.pool.Query(t.Context(), `
		SELECT custom_plans || ' of ' || generic_plans + custom_plans || ': ' || statement FROM pg_prepared_statements
		WHERE custom_plans > 5 AND generic_plans + custom_plans >= $1 AND statement NOT LIKE '% OFFSET $%'`, rounds)
	replanned, err := pgx.CollectRows(rows, pgx.RowTo[string])
	check(t, err)
	for _, statement := range replanned {
		t.Errorf("planned anew %s", statement)
	}
	_, err = s.store.pool.Exec(t.Context(), `SET seq_page_cost = 4`) // a real shop's tables are much larger than these
	check(t, err)
	for statement, args := range maps.Clone(s.traced.args) {
		if !strings.Contains(statement, "orders") && !strings.Contains(statement, "payments") {
			continue
		}
		rows, _ := s.store.pool.Query(t.Context(), "EXPLAIN "+statement, args...)
		plan, err := pgx.CollectRows(rows, pgx.RowTo[string])
		check(t, err)
		if text := strings.Join(plan, "\n"); regexp.MustCompile(`Seq Scan on (orders|payments|history)`).MatchString(text) {
			t.Errorf("%s\nreads a whole table:\n%s", statement, text)
		} else if regexp.MustCompile(`WHERE id = \$`).MatchString(statement) && strings.Contains(text, "unpaid") {
			t.Errorf("%s\nfinds an order by its id, and not by the primary key:\n%s", statement, text)
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
	config, err := pgxpool.ParseConfig(s.config.databaseURL) // of a superuser, who alone may have the planner's statistics logged
	check(s.t, err)
	config.MaxConns, config.ConnConfig.Tracer = s.store.pool.Config().MaxConns, s.traced
	config.ConnConfig.RuntimeParams["log_planner_stats"] = "on"
	config.ConnConfig.RuntimeParams["client_min_messages"] = "log"
	config.ConnConfig.OnNotice = func(_ *pgconn.PgConn, notice *pgconn.Notice) {
		if notice.Message == "PLANNER STATISTICS" {
			planned.Add(1)
		}
	}
	s.store.pool.Close()
	s.store.pool, err = pgxpool.NewWithConfig(s.t.Context(), config)
	check(s.t, err)
	return &planned
}

func TestMoneyReadsNoWholeTable(t *testing.T) {
	s := newShop(t)
	execSQL(t, s.config.databaseURL, `
		ALTER TABLE orders DISABLE TRIGGER orders_are_whole;
		ALTER TABLE payments DISABLE TRIGGER payments_agree_with_orders;
		INSERT INTO orders (id, user_id, number, status, created_at, updated_at, paid_at, held_until, shipping_price, total_price, product_ids,
			items, delivery_info, orderer_info)
		SELECT lpad(i::text, 24, '0'), lpad(i::text, 24, '0'), i, CASE WHEN i % 500 = 0 THEN -1 ELSE 3 END, now(), now(),
			CASE WHEN i % 500 = 0 THEN NULL ELSE now() END, now(), 0, 1, ARRAY['61a4debe4f5f6aa036bfec5f'], '[]', '{}', '{}' FROM generate_series(1, 2000) i;
		INSERT INTO payments (imp_uid, order_id, state, reason, currency, amount, created_at, updated_at, next_attempt_at, leased_until)
		SELECT id, id, CASE WHEN n % 500 = 1 THEN 'refunding' ELSE 'kept' END, CASE WHEN n % 500 = 1 THEN 'amount differs' END, 'KRW', 1, now(), now(), now(), now()
		FROM (SELECT id, row_number() OVER () AS n FROM orders WHERE status = 3) o;
		ANALYZE orders; ANALYZE payments`)
	rows, err := s.store.pool.Query(t.Context(), "EXPLAIN "+openBalancesQuery, s.now(), cancelReasons, stuckAfter, s.settler.gateways.lists())
	check(t, err)
	plan, err := pgx.CollectRows(rows, pgx.RowTo[string])
	check(t, err)
	if text := strings.Join(plan, "\n"); strings.Contains(text, "Seq Scan on orders") || strings.Contains(text, "Seq Scan on payments") {
		t.Error(text)
	}
	m, err := s.store.readOpenBalances(t.Context(), s.now(), s.settler.gateways.lists())
	if err != nil || m.holds != 4 || m.refunds != 4 || m.orders[statusDelivered] != 1996 {
		t.Errorf("%+v, %v", m, err)
	}
}

func TestSchemaDefendsItself(t *testing.T) {
	s := newDirectShop(t)
	order, impUID, painting := s.paid(buyerA)
	held := s.painting(99000)
	unpaid := s.order(buyerB, held)
	gone := s.order(buyerA, s.painting(99000))
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+gone, nil), 200, "")
	refunding, refunded := s.charge(order, 109000), s.charge(order, 109000)
	s.want(s.report(refunded), 409, "")
	s.fake.faultOnce("cancel", fault{before: answer500})
	s.want(s.report(refunding), 409, "")

	owner := openTestStore(t, s.config.databaseURL) // what keeps the service's role from most of these is tested in migrate_test.go
	insertPayment := `INSERT INTO payments (imp_uid, order_id, created_at, updated_at, state, reason, currency, amount, refunded)
		VALUES ('imp_x', '` + unpaid + `', now(), now(), `
	copyOrder := `INSERT INTO orders SELECT (json_populate_record(o, '{"id": "61a7adc903b7708e5dbba693", "number": "another", "ended": null}')).* FROM orders o WHERE id = '` + unpaid + `'`
	for _, row := range []struct{ sql, constraint string }{
		// A painting has one owner, who has paid for it or holds it.
		{`UPDATE products SET order_id = '000000000000000000000000'`, "products_order_exists"},
		{`UPDATE products SET order_id = '` + unpaid + `' WHERE id = '` + painting + `'`, "orders_and_paintings_agree"},
		{`UPDATE products SET order_id = NULL WHERE id = '` + held + `'`, "orders_and_paintings_agree"},
		{`UPDATE orders SET status = 5 WHERE id = '` + order + `'`, "orders_and_paintings_agree"},
		{`UPDATE orders SET ended = 'expired' WHERE id = '` + unpaid + `'`, "orders_and_paintings_agree"},
		{`UPDATE orders SET ended = NULL WHERE id = '` + gone + `'`, "orders_and_paintings_agree"},
		{`UPDATE orders SET ended = NULL, status = 0, paid_at = now() WHERE id = '` + gone + `'`, "orders_and_paintings_agree"},
		{`UPDATE orders SET ended = 'deleted' WHERE id = '` + unpaid + `'; ` + copyOrder + `;
			UPDATE orders SET status = 0, paid_at = now() WHERE number = 'another'`, "orders_and_paintings_agree"},
		{`DELETE FROM products WHERE id = '` + painting + `'`, "products_are_kept"},
		{`TRUNCATE products`, "products_are_kept"},
		// An order keeps one payment, and what went back is not kept again.
		{`INSERT INTO payments (imp_uid, order_id, state, currency, amount, created_at, updated_at) VALUES ('imp_x', '` + order + `', 'kept', 'KRW', 1, now(), now())`, "payments_one_kept_per_order"},
		{`UPDATE payments SET state = 'kept', reason = NULL WHERE imp_uid = '` + refunding + `'`, "payments_state_may_follow"},
		{`UPDATE payments SET state = 'kept', reason = NULL, refunded = 0 WHERE imp_uid = '` + refunded + `'`, "payments_state_may_follow"},
		{`UPDATE payments SET state = 'refunding', next_attempt_at = now(), leased_until = now() WHERE imp_uid = '` + refunded + `'`, "payments_state_may_follow"},
		{`UPDATE payments SET refunded = refunded - 1 WHERE imp_uid = '` + refunded + `'`, "payments_state_may_follow"},
		{`UPDATE payments SET state = 'refunded' WHERE imp_uid = '` + refunding + `'`, "payments_refunded_is_whole"},
		{`UPDATE payments SET state = 'refunding', next_attempt_at = now(), leased_until = now() WHERE imp_uid = '` + impUID + `'`, "payments_refund_has_a_reason"},
		{`UPDATE payments SET next_attempt_at = NULL WHERE imp_uid = '` + refunding + `'`, "payments_refunding_has_a_plan"},
		{`UPDATE payments SET leased_until = NULL WHERE imp_uid = '` + refunding + `'`, "payments_refunding_has_a_plan"},
		{`UPDATE payments SET refunded = amount + 1 WHERE imp_uid = '` + refunding + `'`, "payments_refund_is_bounded"},
		{`UPDATE payments SET refunded = amount WHERE imp_uid = '` + impUID + `'`, "payments_kept_is_won"},
		{`UPDATE payments SET amount = 1`, "payments_state_may_follow"},
		{`UPDATE payments SET gateway = 'portone'`, "payments_state_may_follow"},
		{`INSERT INTO payments (imp_uid, order_id, gateway, state, reason, currency, amount, created_at, updated_at)
			VALUES ('imp_x', '` + unpaid + `', 'another', 'refunded', 'amount differs', 'KRW', 0, now(), now())`, "payments_gateway_is_known"},
		{`INSERT INTO gateway_lists VALUES ('ready', now(), now())`, "gateway_lists_status_is_known"},
		{`UPDATE payments SET currency = 'USD'`, "payments_state_may_follow"},
		{`UPDATE payments SET imp_uid = 'imp_x' WHERE imp_uid = '` + impUID + `'`, "payments_state_may_follow"},
		{`UPDATE payments SET order_id = '` + unpaid + `' WHERE imp_uid = '` + impUID + `'`, "payments_state_may_follow"},
		{`UPDATE payments SET by_hand = 'cash' WHERE imp_uid = '` + refunding + `'`, "payments_by_hand_are_refunded"},
		{`UPDATE payments SET by_hand_amount = 1 WHERE imp_uid = '` + impUID + `'`, "payments_by_hand_are_refunded"},
		{insertPayment + `'lost', 'nobody knows', 'KRW', 109000, 0)`, "payments_state_is_known"},
		{insertPayment + `'kept', NULL, 'USD', 109000, 0)`, "payments_kept_is_won"},
		{insertPayment + `'kept', NULL, 'KRW', 109000, -1)`, "payments_refund_is_bounded"},
		// A status has its successors.
		{`UPDATE orders SET status = 2 WHERE id = '` + order + `'`, "orders_status_may_follow"},
		{`UPDATE orders SET status = 1, paid_at = now() WHERE id = '` + unpaid + `'`, "orders_status_may_follow"},
		{`UPDATE orders SET status = -1, paid_at = NULL WHERE id = '` + order + `'`, "orders_status_may_follow"},
		{`UPDATE orders SET status = 6 WHERE id = '` + order + `'`, "orders_status_may_follow"},
		{`UPDATE orders SET status = 0 WHERE id = '` + unpaid + `'`, "orders_paid_have_a_time"},
		{`UPDATE orders SET paid_at = NULL WHERE id = '` + order + `'`, "orders_paid_have_a_time"},
		{`UPDATE orders SET ended = 'deleted' WHERE id = '` + order + `'`, "orders_only_unpaid_end"},
		{`UPDATE orders SET ended = 'forgotten' WHERE id = '` + unpaid + `'`, "orders_only_unpaid_end"},
		{`UPDATE orders SET cancelling_since = now() WHERE id = '` + unpaid + `'`, "orders_cancelling_are_paid"},
		{`UPDATE orders SET confirming_until = now() WHERE id = '` + order + `'`, "orders_confirming_are_unpaid"},
		// What has left the shop has a parcel, and what has arrived a time.
		{`UPDATE orders SET shipped_at = now() WHERE id = '` + order + `'`, "orders_shipped_have_left"},
		{`UPDATE orders SET delivered_at = now() WHERE id = '` + order + `'`, "orders_delivered_have_arrived"},
		{`UPDATE orders SET carrier = 'carrier', parcel_number = '0' WHERE id = '` + order + `'`, "orders_parcels_are_whole"},
		{`UPDATE orders SET status = 1 WHERE id = '` + order + `'; UPDATE orders SET status = 2, carrier = 'carrier' WHERE id = '` + order + `'`, "orders_parcels_are_whole"},
		{copyOrder, "orders_one_unpaid_per_buyer"},
		{strings.Replace(copyOrder, `"another"`, `"another", "status": 6, "paid_at": "2026-03-02"`, 1), "orders_status_is_known"},
		{strings.Replace(copyOrder, `, "number": "another"`, `, "status": 0, "paid_at": "2026-03-02"`, 1), "orders_number_is_unique_per_buyer"},
		{strings.Replace(copyOrder, `61a7`, `61A7`, 1), "orders_id_is_objectid"},
		{strings.Replace(copyOrder, `"another"`, `"another", "user_id": "nobody"`, 1), "orders_user_is_objectid"},
		{strings.Replace(copyOrder, `"another"`, `"another", "product_ids": []`, 1), "orders_have_paintings"},
		{strings.Replace(copyOrder, `"another"`, `"another", "shipping_price": -1`, 1), "orders_money_is_whole"},
		{strings.Replace(copyOrder, `"another"`, `"another", "total_price": 10000`, 1), "orders_money_is_whole"},
		// The books keep everything.
		{`DELETE FROM orders`, "orders_are_kept"},
		{`DELETE FROM payments WHERE imp_uid = '` + impUID + `'`, "payments_are_kept"},
		{`TRUNCATE payments CASCADE`, "payments_are_kept"},
		{`UPDATE history SET why = 'nothing'`, "history_are_kept"},
		{`DELETE FROM history`, "history_are_kept"},
		{`TRUNCATE history`, "history_are_kept"},
		{`INSERT INTO history (order_id, at, why) VALUES ('000000000000000000000000', now(), 'nothing')`, "history_order_exists"},
		{`TRUNCATE orders CASCADE`, "orders_are_kept"},
	} {
		_, err := owner.pool.Exec(t.Context(), row.sql, pgx.QueryExecModeSimpleProtocol)
		if err == nil || constraintOf(err) != row.constraint {
			t.Errorf("%s: %v (constraint %q)", row.sql, err, constraintOf(err))
		}
	}
	s.wantMismatches(mismatchDue)
}

// Two who write plain SQL at the same time, neither of whom sees what the other has not committed.
func TestSchemaDefendsItselfAgainstTwo(t *testing.T) {
	s := newDirectShop(t)
	painting := s.painting(99000)
	order, gone := s.order(buyerA, s.painting(99000)), s.order(buyerB, painting)
	s.want(s.call(buyerB, "DELETE", "/api/orders/"+gone, nil), 200, "")
	keep := `WITH paid AS (UPDATE orders SET status = 0, paid_at = now() WHERE id = '` + order + `' AND status = -1)
		INSERT INTO payments (imp_uid, order_id, state, currency, amount, created_at, updated_at) VALUES ('imp_%[1]d', '` + order + `', 'kept', 'KRW', 109000, now(), now())`
	take := `WITH made AS (INSERT INTO orders SELECT (json_populate_record(o, '{"id": "%024[1]d", "user_id": "%024[1]d", "ended": null}')).* FROM orders o WHERE id = '` + gone + `' RETURNING id)
		UPDATE products SET order_id = made.id FROM made WHERE products.id = '` + painting + `'`
	owner := openTestStore(t, s.config.databaseURL)
	for sql, constraint := range map[string]string{keep: "payments_one_kept_per_order", take: "orders_and_paintings_agree"} {
		first, err := owner.pool.Begin(t.Context())
		check(t, err)
		defer first.Rollback(t.Context())
		_, err = first.Exec(t.Context(), fmt.Sprintf(sql, 1))
		check(t, err)
		second := make(chan error)
		go func() {
			_, err := owner.pool.Exec(t.Context(), fmt.Sprintf(sql, 2)) // it waits for the first, or comes after it
			second <- err
		}()
		check(t, first.Commit(t.Context()))
		if err := <-second; constraintOf(err) != constraint {
			t.Errorf("%s: %v", sql, err)
		}
	}
	s.wantMismatches(mismatchUnknown)
}

// Whatever takes or frees a buyer's paintings waits for the buyer's lock first, so that the locks behind it are always taken in
// one order.
func TestBuyerLock(t *testing.T) {
	shared := newDirectShop(t)
	for name, change := range map[string]func(s *shop, buyer, order string){
		"create": func(s *shop, buyer, _ string) { s.order(buyer, s.painting(99000)) },
		"pay":    func(s *shop, _, order string) { s.want(s.report(s.charge(order, 109000)), 200, "결제 성공") },
		"delete": func(s *shop, buyer, order string) {
			s.want(s.call(buyer, "DELETE", "/api/orders/"+order, nil), 200, "")
		},
		"expire": func(s *shop, _, _ string) { s.later(s.config.hold) },
	} {
		t.Run(name, func(t *testing.T) {
			s := rowOf(t, shared)
			buyer := newTestID()
			order := s.order(buyer, s.painting(99000))
			lock, err := s.store.pool.Begin(t.Context())
			check(t, err)
			defer lock.Rollback(context.Background())
			_, err = lock.Exec(t.Context(), `SELECT pg_advisory_xact_lock(hashtextextended($1, 0))`, buyer)
			check(t, err)
			done := make(chan struct{})
			go func() {
				defer close(done)
				change(s, buyer, order)
			}()
			waitUntil(t, "the change waits for the lock", func() bool {
				select {
				case <-done:
					t.Fatal("the change did not wait for the buyer's lock")
				default:
				}
				return queryText(t, s.config.databaseURL, `SELECT count(*)::text FROM pg_locks JOIN pg_database d ON d.oid = database
					WHERE locktype = 'advisory' AND NOT granted AND datname = current_database()`) == "1"
			})
			check(t, lock.Commit(t.Context()))
			<-done
		})
	}
	shared.wantBalanced()
}

// What becomes of a payment is decided while no other transaction can change its order, or take the paintings of an order that has ended.
func TestSettlementIsDecidedUnderLocks(t *testing.T) {
	s := newDirectShop(t)
	painting := s.painting(99000)
	order := s.order(buyerA, painting)
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "")
	p := gatewayPayment{impUID: newImpUID(), merchantUID: order}
	_, _, err := s.store.recordSettlement(t.Context(), actor{kind: actorBuyer}, p, s.now(), func(books orderLedger) decision {
		if !books.ended || !books.revivable {
			t.Errorf("%+v", books)
		}
		for table, id := range map[string]string{"orders": order, "products": painting} {
			_, err := s.store.pool.Exec(t.Context(), `SELECT FROM `+table+` WHERE id = $1 FOR NO KEY UPDATE NOWAIT`, id)
			if !lockedOut(err) {
				t.Errorf("the row of %s is not locked: %v", table, err)
			}
		}
		return decision{}
	})
	check(t, err)
}

// constraintOf names the constraint that a statement ran into.
func constraintOf(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.ConstraintName
	}
	return ""
}

// The migrations: from the first release's database to today's, with replicas of both at work.

// ---- a replica of the first release

//go:embed testdata/first_release.sql
var firstRelease string

// oldReplica sends what a replica of the first release sends.
type oldReplica struct {
	t    testing.TB
	conn *pgx.Conn
	sql  map[string]string // by name
	now  time.Time
}

func newOldReplica(t testing.TB, databaseURL string) *oldReplica {
	conn, err := pgx.Connect(context.Background(), databaseURL)
	check(t, err)
	t.Cleanup(func() { conn.Close(context.Background()) })
	r := &oldReplica{t, conn, map[string]string{
		"one incoming": `INSERT INTO incoming VALUES ($1, $1, '안영희', '잠식', '/images/bye/1.jpg', '73x61cm', 20, 99000, true)`, // a COPY there
	}, newTestClock().Now().Add(-10 * time.Minute)}
	for _, statement := range strings.Split(firstRelease, "\n-- name: ")[1:] {
		name, sql, _ := strings.Cut(statement, "\n")
		r.sql[name] = sql
	}
	return r
}

// sent is a statement by its name, with its arguments.
type sent struct {
	name string
	args []any
}

func send(name string, args ...any) sent { return sent{name, args} }

// transact sends statements as one transaction, again when the database could not work just then, as buyers do on a 503. So it is
// when step 5, which was released so, drops a function that the transaction was about to call. It answers how many rows the last
// one concerned.
func (r *oldReplica) transact(statements ...sent) (rows int64) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		err := pgx.BeginFunc(ctx, r.conn, func(tx pgx.Tx) error {
			for _, s := range statements {
				tag, err := tx.Exec(ctx, r.sql[s.name], s.args...)
				if err != nil {
					return fmt.Errorf("an old replica's %q: %w", s.name, err)
				}
				rows = tag.RowsAffected()
			}
			return nil
		})
		var pg *pgconn.PgError
		dropped := errors.As(err, &pg) && pg.Code == "42883" && strings.Contains(pg.Message, "history_note")
		if err == nil {
			return rows
		} else if !unavailable(err) && !dropped || ctx.Err() != nil {
			r.t.Error(err)
			return 0
		}
	}
}

// change is transact for a change of one row.
func (r *oldReplica) change(statements ...sent) {
	if rows := r.transact(statements...); rows != 1 {
		r.t.Errorf("an old replica's %q changed %d rows", statements[len(statements)-1].name, rows)
	}
}

// oldOrder is an order that an old replica made.
type oldOrder struct{ id, buyer, painting, impUID string }

// by is its buyer's change.
func (o oldOrder) by() string { return actor{kind: actorBuyer, request: "request-" + o.id}.setting() }

// order makes an order for a painting.
func (r *oldReplica) order(buyer, painting string) oldOrder {
	o := oldOrder{newTestID(), buyer, painting, "imp_" + newTestID()}
	r.change(send("lock buyer", o.by(), buyer), send("create", []string{painting}, []int64{99000}, o.id, buyer, newNumber(), 10000, 109000,
		r.now, r.now.Add(30*time.Minute), `{"address":"[00000] 어느시 어느로 1","detailedAddress":"101호","receiver":"홍길동","contactNum":"010-0000-0000"}`,
		nil, `{"name":"홍길동","phoneNum":"010-0000-0000","email":"buyer@example.com","refundTerms":"품절 시 결제수단으로 환불"}`))
	return o
}

// unpaid is a new buyer's order for a new painting.
func (r *oldReplica) unpaid() oldOrder {
	painting := newTestID()
	r.change(send("make incoming"), send("one incoming", painting), send("import"))
	return r.order(newTestID(), painting)
}

// settle makes one transaction of what is read about an order's payment and what is decided.
func (r *oldReplica) settle(o oldOrder, decided ...sent) {
	r.change(slices.Concat([]sent{send("lock buyer of", o.by(), o.id), send("read order", o.id), send("read payments", o.id),
		send("read revivable", o.id)}, decided)...)
}

// book is the ledger's row of an order's payment.
func (r *oldReplica) book(o oldOrder, state, reason string, amount, refunded int64) sent {
	return send("book", o.impUID, o.id, state, reason, "KRW", amount, refunded, r.now, r.now, r.now)
}

// paid is an order that was paid and has come to a status.
func (r *oldReplica) paid(status int) oldOrder {
	o := r.unpaid()
	r.settle(o, send("pay", o.id, r.now), r.book(o, "kept", "", 109000, 0))
	for to := 1; to <= status; to++ {
		r.change(send("announce", o.by()), send("read state", o.id, o.buyer, false), send("step", o.id, to-1, to, r.now))
	}
	return o
}

// cancelling is a paid order whose refund did not succeed yet.
func (r *oldReplica) cancelling() oldOrder {
	o := r.paid(statusPaid)
	r.change(send("announce", o.by()), send("begin cancel", o.id, statusPaid, r.now, reasonBuyerCancel, r.now))
	r.change(send("claim cancel", o.id, r.now, r.now, cancelReasons))
	r.change(send("refund failed", o.impUID, "refused", r.now, r.now))
	return o
}

func (r *oldReplica) ended(why string) oldOrder {
	o := r.unpaid()
	r.change(send("lock buyer of", o.by(), o.id), send("end unpaid", o.id, why, r.now, r.now))
	r.change(send("set look", o.id, r.now.Add(2*time.Hour)))
	return o
}

// gone is the status of an order that is over without having been paid.
const gone = -2

// works does all that a replica of the first release does on migration 1, and returns its orders by what they should be.
func (r *oldReplica) works() map[int][]oldOrder {
	cancelled := r.cancelling()
	r.settle(cancelled, r.book(cancelled, "refunded", reasonBuyerCancel, 109000, 109000), send("cancel", cancelled.id, r.now))
	forged := r.unpaid()
	r.settle(forged, r.book(forged, "refunding", reasonAmount, 1000, 0))
	r.settle(forged, r.book(forged, "refunded", reasonAmount, 1000, 1000))
	revived := r.ended("deleted")
	other := r.order(revived.buyer, revived.painting)
	r.settle(revived, send("end other", revived.id, r.now), send("take paintings", revived.id), send("pay", revived.id, r.now),
		r.book(revived, "kept", "", 109000, 0))
	replaced := r.unpaid()
	replacement := r.order(replaced.buyer, replaced.painting)
	r.transact(send("claim refunds", 1, r.now, r.now))
	r.transact(send("claim looks", 1, r.now, r.now))
	r.transact(send("read paintings", []string{forged.painting}))
	r.transact(send("read orders", []string{forged.id}, []string{forged.buyer}, []bool{false}), send("read latest", []string{forged.buyer}))
	return map[int][]oldOrder{
		statusUnpaid: {r.unpaid(), forged, replacement}, statusPaid: {r.paid(0), revived, r.cancelling()}, statusPreparing: {r.paid(1)},
		statusShipping: {r.paid(2)}, statusDelivered: {r.paid(3)}, statusReturning: {r.paid(4)}, statusCancelled: {cancelled},
		gone: {r.ended("deleted"), r.ended("expired"), other, replaced},
	}
}

// lists does what a replica of the first release does on migration 2 alone.
func (r *oldReplica) lists(o oldOrder) {
	r.transact(send("fold tally"), send("list for desk", 0, 10), send("list status for desk", 0, 0, 10), send("count mine", o.buyer),
		send("list mine", o.buyer, 0, 3), send("read history", o.id, o.buyer, false))
}

// ---- the service on its database

// wantOldOrders fails unless the service shows old orders as what they should be.
func (s *shop) wantOldOrders(orders map[int][]oldOrder) {
	s.t.Helper()
	for status, orders := range orders {
		for _, o := range orders {
			if status == gone {
				s.want(s.call(o.buyer, "GET", "/api/orders/"+o.id, nil), 404, messageOrderUnknown)
				continue
			}
			mine := s.list(o.buyer, "/api/orders/mine").Orders
			if got := s.statusOf(o.id); got != status || len(mine) != 1 || mine[0].ID != o.id || s.inStock("", o.painting) != (status == statusCancelled) {
				s.t.Errorf("status %d, want %d; the buyer's list: %v", got, status, mine)
			}
			history := s.want(s.call(o.buyer, "GET", "/api/orders/"+o.id+"/history", nil), 200, "").body
			if !strings.Contains(history, `"to":-1,"why":"created"`) || status >= 0 && !strings.Contains(history, fmt.Sprintf(`"to":%d,`, status)) {
				s.t.Errorf("status %d has the history %s", status, history)
			}
		}
	}
}

// finishOldOrders does with old orders what their buyers and the administrator do next.
func (s *shop) finishOldOrders(orders map[int][]oldOrder) {
	s.t.Helper()
	unpaid, paid, preparing, returning, late := orders[statusUnpaid][0], orders[statusPaid][0], orders[statusPreparing][0], orders[statusReturning][0], orders[gone][0]
	s.want(s.report(s.charge(unpaid.id, 109000)), 200, "결제 성공")
	s.want(s.report(s.charge(late.id, 109000)), 200, "결제 성공")
	s.want(s.call(paid.buyer, "DELETE", "/api/orders/"+paid.id, nil), 200, "")
	s.want(s.call(adminID, "DELETE", "/api/orders/"+returning.id, nil), 200, "")
	s.want(s.call(adminID, "PATCH", "/api/orders/"+preparing.id, `{"status":2}`), 200, "")
	s.later(0) // the refund that did not succeed
	for id, want := range map[string]int{unpaid.id: 0, late.id: 0, paid.id: 5, returning.id: 5, preparing.id: 2, orders[statusPaid][2].id: 5} {
		if got := s.statusOf(id); got != want {
			s.t.Errorf("status %d, want %d", got, want)
		}
	}
	s.wantTrueStatusCounts()
	s.wantBalanced()
}

// payBooked has the gateway know the payments in the books: the old replicas only booked them.
func (s *shop) payBooked() {
	s.t.Helper()
	rows, _ := s.store.pool.Query(s.t.Context(), `SELECT imp_uid, order_id, currency, CASE WHEN refunded > 0 THEN 'cancelled' ELSE 'paid' END, amount, refunded FROM payments`)
	booked, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (p fakePayment, err error) {
		err = row.Scan(&p.ImpUID, &p.MerchantUID, &p.Currency, &p.Status, &p.Amount, &p.Cancelled)
		return p, err
	})
	check(s.t, err)
	for _, p := range booked {
		s.fake.pay(p)
	}
}

// wantTrueStatusCounts fails unless as many orders are counted in each status as there are, and order_search has each paid order
// whose changes of status were applied, as it is.
func (s *shop) wantTrueStatusCounts() {
	s.t.Helper()
	if wrong := queryText(s.t, s.config.databaseURL, `
		SELECT coalesce(string_agg(format('%s: %s, not %s', status, counted, n), '; '), '')
		FROM (SELECT status, n AS counted FROM order_counts) t
		FULL JOIN (SELECT status, count(*) AS n FROM orders WHERE status >= 0 GROUP BY status) o USING (status)
		WHERE coalesce(counted, 0) <> coalesce(n, 0)`); wrong != "" {
		s.t.Errorf("wrong count of status %s", wrong)
	}
	if wrong := queryText(s.t, s.config.databaseURL, `
		SELECT coalesce(string_agg(format('%s: %s, not %s', id, s, o), '; '), '')
		FROM (SELECT id, (status, created_at, `+ordererPhone+`, `+otherPhone+`, `+ordererEmail+`, `+ordererName+`, `+otherName+`)::text AS o
			FROM orders WHERE status >= 0 AND erased_at IS NULL) o
		FULL JOIN (SELECT id, (status, created_at, orderer_phone, receiver_phone, orderer_email, orderer_name, receiver_name)::text AS s
			FROM order_search) s USING (id)
		WHERE o IS DISTINCT FROM s AND id NOT IN (SELECT order_id FROM status_changes)`); wrong != "" {
		s.t.Errorf("order_search has wrong orders: %s", wrong)
	}
}

// openTestStore opens a store, as a starting replica does.
func openTestStore(t testing.TB, databaseURL string) *store {
	t.Helper()
	store, err := openStore(context.Background(), databaseURL, nil)
	check(t, err)
	t.Cleanup(store.close)
	return store
}

// startTogether starts several replicas, and returns when all of them have the schema they need.
func startTogether(t *testing.T, databaseURL string) {
	var starting sync.WaitGroup
	for range 5 {
		store := openTestStore(t, databaseURL)
		starting.Go(func() {
			if err := store.migrateAll(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	starting.Wait()
}

func TestUpgradeOfTheFirstRelease(t *testing.T) {
	heavy(t)
	url := newTestDatabase(t)
	check(t, openTestStore(t, url).migrate(t.Context(), migrations()[:1]))
	old := newOldReplica(t, url)
	before := old.works()
	s := newShop(t, func(c *config) { c.databaseURL = url })
	s.wantTrueStatusCounts()
	s.wantOldOrders(before)
	beside := old.works() // it goes on beside the new one
	s.wantOldOrders(beside)
	s.payBooked()
	s.finishOldOrders(before)
	s.finishOldOrders(beside)
	old.lists(beside[statusPaid][1])
}

func TestReplicasStartTogetherBesideOldOnes(t *testing.T) {
	heavy(t)
	url := newTestDatabase(t)
	check(t, openTestStore(t, url).migrate(t.Context(), migrations()[:1]))
	var working sync.WaitGroup
	started := make(chan struct{})
	worked := make([][]map[int][]oldOrder, 3)
	for i := range worked {
		old := newOldReplica(t, url)
		working.Go(func() {
			for done := false; !done; {
				select {
				case <-started:
					done = true
				default:
				}
				worked[i] = append(worked[i], old.works())
			}
		})
	}
	startTogether(t, url)
	close(started)
	working.Wait()
	s := newShop(t, func(c *config) { c.databaseURL = url })
	for _, orders := range slices.Concat(worked...) {
		s.wantOldOrders(orders)
	}
	s.wantTrueStatusCounts()
	s.payBooked()
	s.later(0) // the refunds that did not succeed
	s.wantBalanced()
}

func TestReplicasStartTogetherOnAnEmptyDatabase(t *testing.T) {
	url := newTestDatabase(t)
	startTogether(t, url)
	if n := queryText(t, url, `SELECT max(step)::text FROM schema_steps`); n != fmt.Sprint(len(migrations())) {
		t.Errorf("the schema is at step %s", n)
	}
}

func TestNewerSchemaIsLeftAlone(t *testing.T) {
	s := newShop(t)
	execSQL(t, s.config.databaseURL, fmt.Sprintf(`INSERT INTO schema_steps (step, applied_at) VALUES (%d, 'epoch')`, len(migrations())+1))
	const state = `SELECT string_agg(step || ' ' || applied_at, ', ' ORDER BY step) FROM schema_steps`
	before := queryText(t, s.config.databaseURL, state)
	check(t, openTestStore(t, s.config.databaseURL).migrateAll(t.Context()))
	if after := queryText(t, s.config.databaseURL, state); after != before {
		t.Errorf("steps %s, before %s", after, before)
	}
	s.want(s.call("", "GET", "/readyz", nil), 200, "")
}

func TestMigrationIsAppliedWholeOrNotAtAll(t *testing.T) {
	s := newShop(t)
	steps := append(migrations(), `CREATE TABLE half (); SELECT 1/0`)
	if err := openTestStore(t, s.config.databaseURL).migrate(t.Context(), steps); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("schema step %d: ", len(steps))) {
		t.Errorf("a broken step: %v", err)
	}
	if version, err := s.store.schemaVersion(t.Context()); version != len(migrations()) || err != nil {
		t.Errorf("the schema is at step %d, %v", version, err)
	}
	if half := queryText(t, s.config.databaseURL, `SELECT coalesce(to_regclass('half')::text, 'none')`); half != "none" {
		t.Error("half a step was applied")
	}
}

func TestMigrationLetsOthersBy(t *testing.T) {
	heavy(t)
	s := newShop(t)
	report, err := pgx.Connect(t.Context(), s.config.databaseURL)
	check(t, err)
	defer report.Close(context.Background())
	const begin = `BEGIN; SELECT count(*) FROM orders` // a long look at the table, which a migration wants to change
	_, err = report.Exec(t.Context(), begin)
	check(t, err)
	steps := append(migrations(), `ALTER TABLE orders ADD COLUMN note text`)
	owner := openTestStore(t, s.config.databaseURL)
	owner.migrationLockWait = 300 * time.Millisecond
	migrated := make(chan error, 1)
	go func() { migrated <- owner.migrate(t.Context(), steps) }()
	waitUntil(t, "the migration waits for its lock", func() bool {
		return queryText(t, s.config.databaseURL, `SELECT count(*)::text FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'
			AND relation = 'orders'::regclass`) != "0"
	})
	s.order(buyerA, s.painting(99000)) // it comes after the migration, and would wait for as long as the report
	_, err = report.Exec(t.Context(), `ROLLBACK`)
	check(t, err)
	check(t, <-migrated)
	s.order(buyerA, s.painting(99000))

	_, err = report.Exec(t.Context(), begin)
	check(t, err)
	owner.migrationLockWait = time.Millisecond
	if err := owner.migrate(t.Context(), append(steps, `DROP TABLE orders CASCADE`)); !lockedOut(err) {
		t.Errorf("a step that never gets its lock: %v", err)
	}
}
