package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
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
//   - advancing an order reads its state, which says whether this caller may move it there, and then changes it from that state;
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
// them, but for the administrator's pages, where it is worth knowing how many to skip. And none reads a whole table that grows with
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

func TestMoneyReadsNoWholeTable(t *testing.T) {
	s := newShop(t)
	execSQL(t, s.config.databaseURL, `
		ALTER TABLE orders DISABLE TRIGGER orders_have_their_paintings, DISABLE TRIGGER new_orders_agree_with_payments;
		ALTER TABLE payments DISABLE TRIGGER payments_agree_with_orders;
		INSERT INTO orders (id, user_id, number, status, created_at, updated_at, paid_at, held_until, shipping_price, total_price, product_ids,
			items, delivery_info, orderer_info)
		SELECT lpad(i::text, 24, '0'), lpad(i::text, 24, '0'), i, CASE WHEN i % 500 = 0 THEN -1 ELSE 3 END, now(), now(),
			CASE WHEN i % 500 = 0 THEN NULL ELSE now() END, now(), 0, 1, ARRAY['61a4debe4f5f6aa036bfec5f'], '[]', '{}', '{}' FROM generate_series(1, 2000) i;
		INSERT INTO payments (imp_uid, order_id, state, reason, currency, amount, created_at, updated_at, next_attempt_at, leased_until)
		SELECT id, id, CASE WHEN n % 500 = 1 THEN 'refunding' ELSE 'kept' END, CASE WHEN n % 500 = 1 THEN 'amount differs' END, 'KRW', 1, now(), now(), now(), now()
		FROM (SELECT id, row_number() OVER () AS n FROM orders WHERE status = 3) o;
		ANALYZE orders; ANALYZE payments`)
	rows, err := s.store.pool.Query(t.Context(), "EXPLAIN "+openBalancesQuery, s.now(), cancelReasons, stuckAfter)
	check(t, err)
	plan, err := pgx.CollectRows(rows, pgx.RowTo[string])
	check(t, err)
	if text := strings.Join(plan, "\n"); strings.Contains(text, "Seq Scan on orders") || strings.Contains(text, "Seq Scan on payments") {
		t.Error(text)
	}
	m, err := s.store.readOpenBalances(t.Context(), s.now())
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
		{`UPDATE payments SET currency = 'USD'`, "payments_state_may_follow"},
		{`UPDATE payments SET imp_uid = 'imp_x' WHERE imp_uid = '` + impUID + `'`, "payments_state_may_follow"},
		{`UPDATE payments SET order_id = '` + unpaid + `' WHERE imp_uid = '` + impUID + `'`, "payments_state_may_follow"},
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
		{copyOrder, "orders_one_unpaid_per_buyer"},
		{strings.Replace(copyOrder, `"another"`, `"another", "status": 6, "paid_at": "2026-03-02"`, 1), "orders_status_is_known"},
		{strings.Replace(copyOrder, `, "number": "another"`, `, "status": 0, "paid_at": "2026-03-02"`, 1), "orders_number_is_unique_per_buyer"},
		{strings.Replace(copyOrder, `"another"`, `"another", "product_ids": []`, 1), "orders_have_paintings"},
		{strings.Replace(copyOrder, `"another"`, `"another", "total_price": 10000`, 1), "orders_money_is_whole"},
		// The books keep everything.
		{`DELETE FROM orders`, "orders_are_kept"},
		{`DELETE FROM payments WHERE imp_uid = '` + impUID + `'`, "payments_are_kept"},
		{`TRUNCATE payments`, "payments_are_kept"},
		{`UPDATE history SET why = 'nothing'`, "history_are_kept"},
		{`DELETE FROM history`, "history_are_kept"},
		{`TRUNCATE history`, "history_are_kept"},
		{`TRUNCATE orders CASCADE`, "orders_are_kept"},
	} {
		_, err := s.store.pool.Exec(t.Context(), row.sql, pgx.QueryExecModeSimpleProtocol)
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
	for sql, constraint := range map[string]string{keep: "payments_one_kept_per_order", take: "orders_and_paintings_agree"} {
		first, err := s.store.pool.Begin(t.Context())
		check(t, err)
		defer first.Rollback(t.Context())
		_, err = first.Exec(t.Context(), fmt.Sprintf(sql, 1))
		check(t, err)
		second := make(chan error)
		go func() {
			_, err := s.store.pool.Exec(t.Context(), fmt.Sprintf(sql, 2)) // it waits for the first, or comes after it
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
