package main

import (
	"context"
	_ "embed"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

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

// transact sends statements as one transaction, again when the database could not work just then, as buyers do on a 503. It
// answers how many rows the last one concerned.
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
		if err == nil {
			return rows
		} else if !unavailable(err) || ctx.Err() != nil {
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
	s.wantTrueTally()
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

// wantTrueTally fails unless as many orders are counted in each status as there are.
func (s *shop) wantTrueTally() {
	s.t.Helper()
	if wrong := queryText(s.t, s.config.databaseURL, `
		SELECT coalesce(string_agg(format('%s: %s, not %s', status, counted, n), '; '), '')
		FROM (SELECT status, sum(n) AS counted FROM order_tally GROUP BY status) t
		FULL JOIN (SELECT status, count(*) AS n FROM orders WHERE status >= 0 GROUP BY status) o USING (status)
		WHERE coalesce(counted, 0) <> coalesce(n, 0)`); wrong != "" {
		s.t.Errorf("wrong tally of status %s", wrong)
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
			if err := store.migrate(t.Context(), migrations()); err != nil {
				t.Error(err)
			}
		})
	}
	starting.Wait()
}

func TestUpgradeOfTheFirstRelease(t *testing.T) {
	url := newTestDatabase(t)
	check(t, openTestStore(t, url).migrate(t.Context(), migrations()[:1]))
	old := newOldReplica(t, url)
	before := old.works()
	s := newShop(t, func(c *config) { c.databaseURL = url })
	s.wantTrueTally()
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
	s.wantTrueTally()
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
	check(t, s.store.migrate(t.Context(), migrations()))
	if after := queryText(t, s.config.databaseURL, state); after != before {
		t.Errorf("steps %s, before %s", after, before)
	}
	s.want(s.call("", "GET", "/readyz", nil), 200, "")
}

func TestMigrationIsAppliedWholeOrNotAtAll(t *testing.T) {
	s := newShop(t)
	steps := append(migrations(), `CREATE TABLE half (); SELECT 1/0`)
	if err := s.store.migrate(t.Context(), steps); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("schema step %d: ", len(steps))) {
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
	s := newShop(t)
	report, err := pgx.Connect(t.Context(), s.config.databaseURL)
	check(t, err)
	defer report.Close(context.Background())
	const begin = `BEGIN; SELECT count(*) FROM orders` // a long look at the table, which a migration wants to change
	_, err = report.Exec(t.Context(), begin)
	check(t, err)
	steps := append(migrations(), `ALTER TABLE orders ADD COLUMN note text`)
	s.store.migrationLockWait = 300 * time.Millisecond
	migrated := make(chan error, 1)
	go func() { migrated <- s.store.migrate(t.Context(), steps) }()
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
	s.store.migrationLockWait = time.Millisecond
	if err := s.store.migrate(t.Context(), append(steps, `DROP TABLE orders CASCADE`)); !lockedOut(err) {
		t.Errorf("a step that never gets its lock: %v", err)
	}
}
