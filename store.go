package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// store is every SQL statement of the service, as functions of plain types. Its calls give up after dbTimeout.
//
// Locks are always taken in one order: the buyer (an advisory lock, so that his orders change one at a time), the
// order's row, the paintings by id. An administrator's step takes the order's row alone.
//
// Where a statement says (SELECT $1), the planner is not to know how many keys or rows are asked for: then its plan is the
// same for any number, and PostgreSQL keeps it instead of planning at each call.
type store struct {
	pool      *pgxpool.Pool
	paintings *batcher[string, painting]
	orders    *batcher[orderKey, order]
	latest    *batcher[string, order]

	migrationLockWait time.Duration
}

// dbTimeout bounds one call to the database, waiting for a free connection included.
const dbTimeout = 5 * time.Second

var (
	// errNotFound says that there is no such row, or that it is not the caller's.
	errNotFound = errors.New("not found")
	// errStale says that the guarded change found the row in another state than the one it was asked to change.
	errStale = errors.New("the order is no longer in that state")
)

// openStore connects to the database at url. It does not wait for it: a database that is away is an error of each
// call, until it is back. trace may be nil.
func openStore(ctx context.Context, url string, trace pgx.QueryTracer) (*store, error) {
	pool, err := openPool(ctx, url, trace)
	if err != nil {
		return nil, err
	}
	s := &store{pool: pool, migrationLockWait: migrationLockWait}
	s.paintings = newBatcher(s.readPaintings)
	s.orders = newBatcher(s.readOrders)
	s.latest = newBatcher(s.readLatest)
	return s, nil
}

// openMigratedStore is openStore, and brings the schema up to date.
func openMigratedStore(ctx context.Context, url string) (*store, error) {
	s, err := openStore(ctx, url, nil)
	if err != nil {
		return nil, err
	}
	if err := s.migrate(ctx, migrations()); err != nil {
		s.close()
		return nil, fmt.Errorf("database: %w", err)
	}
	return s, nil
}

// close waits for running statements and closes every connection.
func (s *store) close() { s.pool.Close() }

// ---- schema

//go:embed schema.sql
var schemaSQL string

// migrationHeader finds the line that begins a numbered step of schema.sql.
var migrationHeader = regexp.MustCompile(`(?m)^-- step \d+:`)

// migrations are the steps of schema.sql in order; step N is the element N-1.
func migrations() []string {
	starts := migrationHeader.FindAllStringIndex(schemaSQL, -1)
	steps := make([]string, len(starts))
	for i, at := range starts {
		end := len(schemaSQL)
		if i+1 < len(starts) {
			end = starts[i+1][0]
		}
		steps[i] = schemaSQL[at[0]:end]
	}
	return steps
}

// schemaVersion is the number of the newest step that the database has; 0 on an empty one.
func (s *store) schemaVersion(ctx context.Context) (version int, err error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	// Not as a prepared statement: before the first step it fails, and a pooler would keep its name taken.
	err = s.pool.QueryRow(ctx, `SELECT coalesce(max(step), 0) FROM schema_steps`, pgx.QueryExecModeExec).Scan(&version)
	if pg := (*pgconn.PgError)(nil); errors.As(err, &pg) && pg.Code == "42P01" { // undefined_table
		return 0, nil
	}
	return version, err
}

// A step waits this long for a lock, since whoever comes after it waits too, then lets them by and tries again, so many
// times. The wait is shorter than PostgreSQL's deadlock_timeout: of a step and a buyer's call it is the step that gives way.
const (
	migrationLockWait = 500 * time.Millisecond
	migrationTries    = 10
)

// migrate brings the database to these steps, those of schema.sql. Replicas that start together wait for the one that
// came first. A database with more steps than that belongs to a newer program and is left as it is.
func (s *store) migrate(ctx context.Context, steps []string) error {
	version, err := s.schemaVersion(ctx)
	if err != nil {
		return err
	}
	for n := version + 1; n <= len(steps); n++ {
		for try := 1; ; try++ {
			if err = s.applyMigration(ctx, n, steps[n-1]); err == nil {
				break
			} else if try == migrationTries || !lockedOut(err) {
				return fmt.Errorf("schema step %d: %w", n, err)
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(s.migrationLockWait):
			}
		}
	}
	return nil
}

// lockedOut reports whether err means that others had locked what a step needs.
func lockedOut(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && (pg.Code == "55P03" || pg.Code == "40P01") // lock_not_available, deadlock_detected
}

// applyMigration applies step n in a transaction of its own, unless the database has it.
func (s *store) applyMigration(ctx context.Context, n int, step string) error {
	return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(4820561379)`); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `CREATE TABLE IF NOT EXISTS schema_steps (
			step integer CONSTRAINT schema_steps_pkey PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())`); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `INSERT INTO schema_steps (step) VALUES ($1) ON CONFLICT DO NOTHING`, n)
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		if _, err := tx.Exec(ctx, `SELECT set_config('lock_timeout', $1, true)`, fmt.Sprint(s.migrationLockWait.Milliseconds())); err != nil {
			return err
		}
		_, err = tx.Conn().PgConn().Exec(ctx, step).ReadAll()
		return err
	})
}

// ---- request batching

// batcher lets calls that arrive together share one query: while a query runs, the next callers' keys collect, and the
// moment it returns they go out as one. A lone caller waits for nothing, nothing is cached, and no answer is older
// than its question, since a query never takes keys after it has started.
type batcher[K comparable, V any] struct {
	query   func(context.Context, []K) (map[K]V, error)
	mu      sync.Mutex
	running bool
	waiting []*batch[K, V]
}

// batch is one query under way or about to be, and its answer once done is closed.
type batch[K comparable, V any] struct {
	keys   []K
	until  time.Time // it gives up then, and with it whoever waits, however long the flights before it took
	done   chan struct{}
	answer map[K]V
	err    error
}

// maxBatchKeys bounds the keys of one query, so that no caller waits for a crowd's worth of rows.
const maxBatchKeys = 1000

func newBatcher[K comparable, V any](query func(context.Context, []K) (map[K]V, error)) *batcher[K, V] {
	return &batcher[K, V]{query: query}
}

// get answers the values of keys; an unknown key is missing from the map, which is shared and must not be changed.
// A caller that goes away leaves the others' query alone. An error is everybody's who shares the query, so keys must be
// checked before: none may be one that the database refuses.
func (g *batcher[K, V]) get(ctx context.Context, keys ...K) (map[K]V, error) {
	g.mu.Lock()
	var f *batch[K, V]
	if n := len(g.waiting); n > 0 && len(g.waiting[n-1].keys)+len(keys) <= maxBatchKeys {
		f = g.waiting[n-1]
	} else {
		f = &batch[K, V]{until: time.Now().Add(dbTimeout), done: make(chan struct{})}
		g.waiting = append(g.waiting, f)
	}
	f.keys = append(f.keys, keys...)
	if !g.running {
		g.running = true
		go g.run()
	}
	g.mu.Unlock()
	select {
	case <-f.done:
		return f.answer, f.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// run sends out flights until none is waiting.
func (g *batcher[K, V]) run() {
	for {
		runtime.Gosched() // whoever is about to ask joins; nobody else waits
		g.mu.Lock()
		if len(g.waiting) == 0 {
			g.running = false
			g.mu.Unlock()
			return
		}
		f := g.waiting[0]
		g.waiting = g.waiting[1:]
		g.mu.Unlock()
		g.exec(f)
	}
}

// ask sends one flight's query and lets go of whoever waits for it, whatever happens.
func (g *batcher[K, V]) exec(f *batch[K, V]) {
	defer close(f.done)
	defer func() {
		if p := recover(); p != nil {
			f.err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	ctx, cancel := context.WithDeadline(context.Background(), f.until)
	defer cancel()
	f.answer, f.err = g.query(ctx, f.keys)
}

// ---- paintings

// painting is a row of the catalogue and who has it.
type painting struct {
	id, artistID, artistName, title, image, size string
	canvas                                       int        // 호
	price                                        int64      // won
	forSale                                      bool       // false: sold elsewhere
	taken                                        bool       // an order holds or bought it
	holder                                       string     // the buyer whose unpaid order holds it; empty when bought or free
	heldUntil                                    *time.Time // when that hold ends
}

// inStock reports whether the painting is there for caller to buy; one that he holds himself is.
func (p painting) inStock(caller string) bool {
	return p.forSale && (!p.taken || (p.holder != "" && p.holder == caller))
}

// findPaintings are the paintings of ids that exist, by id.
func (s *store) findPaintings(ctx context.Context, ids []string) (map[string]painting, error) {
	return s.paintings.get(ctx, ids...)
}

func (s *store) readPaintings(ctx context.Context, ids []string) (map[string]painting, error) {
	rows, _ := s.pool.Query(ctx, `
		SELECT p.id, p.artist_id, p.artist_name, p.title, p.image, p.size, p.canvas, p.price, p.for_sale,
			p.order_id IS NOT NULL, coalesce(h.user_id, ''), h.held_until
		FROM products p LEFT JOIN orders h ON h.id = p.order_id AND h.status = -1 AND h.ended IS NULL
		WHERE p.id = ANY ((SELECT $1::text[])::text[])`, ids)
	found := make(map[string]painting, len(ids))
	var p painting
	_, err := pgx.ForEachRow(rows, []any{&p.id, &p.artistID, &p.artistName, &p.title, &p.image, &p.size, &p.canvas, &p.price,
		&p.forSale, &p.taken, &p.holder, &p.heldUntil}, func() error {
		found[p.id] = p
		return nil
	})
	return found, err
}

// firstPaintingIDs are the ids of the first paintings of the catalogue, at most so many.
func (s *store) firstPaintingIDs(ctx context.Context, most int) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `SELECT id FROM products ORDER BY id LIMIT $1`, most)
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// importPaintings loads or updates the catalogue by id, all or nothing. Who has a painting is not the catalogue's
// to say: an order keeps what it holds.
func (s *store) importPaintings(ctx context.Context, paintings []painting) error {
	return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `CREATE TEMPORARY TABLE incoming ON COMMIT DROP AS
			SELECT id, artist_id, artist_name, title, image, size, canvas, price, for_sale FROM products WITH NO DATA`); err != nil {
			return err
		}
		columns := []string{"id", "artist_id", "artist_name", "title", "image", "size", "canvas", "price", "for_sale"}
		if _, err := tx.CopyFrom(ctx, pgx.Identifier{"incoming"}, columns, pgx.CopyFromSlice(len(paintings), func(i int) ([]any, error) {
			p := &paintings[i]
			return []any{p.id, p.artistID, p.artistName, p.title, p.image, p.size, int32(p.canvas), p.price, p.forSale}, nil
		})); err != nil {
			return err
		}
		// In id order, as everybody locks paintings.
		_, err := tx.Exec(ctx, `
			INSERT INTO products (id, artist_id, artist_name, title, image, size, canvas, price, for_sale)
			SELECT id, artist_id, artist_name, title, image, size, canvas, price, for_sale FROM incoming ORDER BY id
			ON CONFLICT (id) DO UPDATE SET artist_id = excluded.artist_id, artist_name = excluded.artist_name,
				title = excluded.title, image = excluded.image, size = excluded.size, canvas = excluded.canvas,
				price = excluded.price, for_sale = excluded.for_sale`)
		return err
	})
}

// ---- orders, read

// order is an order as it is shown. The documents are JSON as it is answered, and not read on the way.
type order struct {
	id, userID, number        string
	status                    int
	updatedAt                 time.Time
	paidAt                    *time.Time
	shippingPrice, total      int64 // won
	items, deliveryInfo       []byte
	deliveryDetails           []byte // nil when none was given
	ordererInfo               []byte
	ordererName, ordererEmail string // of OrdererInfo, for the desk
}

// orderKey asks for an order as somebody: a buyer sees his own, an administrator everybody's.
type orderKey struct {
	id    string
	buyer string
	admin bool
}

// Order is the order id if caller may see it, else errNotFound.
func (s *store) findOrder(ctx context.Context, id string, who caller) (order, error) {
	key := orderKey{id, who.id, who.admin}
	found, err := s.orders.get(ctx, key)
	if err != nil {
		return order{}, err
	}
	o, ok := found[key]
	if !ok {
		return o, errNotFound
	}
	return o, nil
}

func (s *store) readOrders(ctx context.Context, keys []orderKey) (map[orderKey]order, error) {
	ids, buyers, admins := make([]string, len(keys)), make([]string, len(keys)), make([]bool, len(keys))
	for i, k := range keys {
		ids[i], buyers[i], admins[i] = k.id, k.buyer, k.admin
	}
	rows, _ := s.pool.Query(ctx, `
		SELECT k.buyer, k.admin, o.id, o.user_id, o.number, o.status, o.updated_at, o.paid_at, o.shipping_price, o.total_price,
			o.items, o.delivery_info, o.delivery_details, o.orderer_info
		FROM unnest((SELECT $1::text[]), (SELECT $2::text[]), (SELECT $3::boolean[])) AS k (id, buyer, admin)
		JOIN orders o ON o.id = k.id AND (o.user_id = k.buyer OR k.admin)
		WHERE o.ended IS NULL`, ids, buyers, admins)
	found := make(map[orderKey]order, len(keys))
	var key orderKey
	var o order
	_, err := pgx.ForEachRow(rows, []any{&key.buyer, &key.admin, &o.id, &o.userID, &o.number, &o.status, &o.updatedAt, &o.paidAt,
		&o.shippingPrice, &o.total, &o.items, &o.deliveryInfo, &o.deliveryDetails, &o.ordererInfo}, func() error {
		key.id = o.id
		found[key] = o
		return nil
	})
	return found, err
}

// findLatestOrder is the buyer's newest order, its delivery and orderer alone; errNotFound when he has none.
func (s *store) findLatestOrder(ctx context.Context, buyer string) (order, error) {
	found, err := s.latest.get(ctx, buyer)
	if err != nil {
		return order{}, err
	}
	o, ok := found[buyer]
	if !ok {
		return o, errNotFound
	}
	return o, nil
}

func (s *store) readLatest(ctx context.Context, buyers []string) (map[string]order, error) {
	rows, _ := s.pool.Query(ctx, `
		SELECT o.id, o.user_id, o.delivery_info, o.delivery_details, o.orderer_info
		FROM unnest((SELECT $1::text[])) AS k (buyer) CROSS JOIN LATERAL (
			SELECT id, user_id, delivery_info, delivery_details, orderer_info FROM orders
			WHERE user_id = k.buyer AND ended IS NULL ORDER BY created_at DESC, id DESC LIMIT 1) o`, buyers)
	found := make(map[string]order, len(buyers))
	var o order
	_, err := pgx.ForEachRow(rows, []any{&o.id, &o.userID, &o.deliveryInfo, &o.deliveryDetails, &o.ordererInfo}, func() error {
		found[o.userID] = o
		return nil
	})
	return found, err
}

// ---- changes

// actorKind says what sort of actor changes something. The values are those of the public history.
type actorKind string

const (
	actorBuyer         actorKind = "buyer"         // the browser
	actorAdministrator actorKind = "administrator" // one of the shop's people
	actorGateway       actorKind = "gateway"       // the gateway's notice
	actorReconciler    actorKind = "reconciler"
)

// actor says who changes something. The database writes it into the history of all that the transaction changes.
type actor struct {
	kind    actorKind
	id      string // an administrator's user id
	request string // the request's id
}

// setting returns the actor as the schema's triggers read it.
func (a actor) setting() string {
	return marshalRaw(struct {
		Who     actorKind `json:"who"`
		ID      string    `json:"id,omitempty"`
		Request string    `json:"request,omitempty"`
	}{a.kind, a.id, a.request})
}

// transact sends the statements of batch as one transaction in one round trip, after the one that says who makes the
// change. Without a BEGIN of their own the statements of a batch are one implicit transaction.
func (s *store) transact(ctx context.Context, batch *pgx.Batch) error {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	return s.pool.SendBatch(ctx, batch).Close()
}

const (
	// setActor says in the database who makes the change; $1 is Change.setting.
	setActor = `SELECT set_config('lumiere.change', $1, true)`
	// lockBuyer announces likewise and then makes the buyer's ($2) changes go one at a time.
	lockBuyer = `SELECT set_config('lumiere.change', $1, true), pg_advisory_xact_lock(hashtextextended($2, 0))`
	// lockBuyerOf is lockBuyer for the buyer of the order $2.
	lockBuyerOf = `SELECT set_config('lumiere.change', $1, true), pg_advisory_xact_lock(hashtextextended(user_id, 0)) FROM orders WHERE id = $2`
)

// newOrder is an order about to be made. Prices are the client's, to be compared with the catalogue's.
type newOrder struct {
	id, userID, number   string
	productIDs           []string // distinct
	prices               []int64  // won, of ProductIDs
	shippingPrice, total int64    // won
	deliveryInfo         string   // JSON
	deliveryDetails      *string  // JSON
	ordererInfo          string   // JSON
	createdAt, heldUntil time.Time
}

// Asked is what the database knew of a painting that an order asked for.
type requestedItem struct {
	id, title string
	known     bool  // there is such a painting
	free      bool  // it could be held for this buyer
	price     int64 // won
}

// createResult is what became of a new order.
type createResult struct {
	orderID       string   // the order made, or the one that has this number already; empty: none, and Asked tells why
	existing      bool     // OrderID has this number already
	existingItems []string // its paintings
	items         []requestedItem
}

// insertOrder holds all of the paintings for a new order or none, and replaces the buyer's unpaid order. It is one
// round trip: under the buyer's lock, one statement locks the free ones of the paintings in id order, and makes the
// order if that is all of them and every price is the catalogue's. A painting that is already taken is not locked,
// so that losers neither wait nor write.
func (s *store) insertOrder(ctx context.Context, by actor, o newOrder) (created createResult, err error) {
	batch := &pgx.Batch{}
	batch.Queue(lockBuyer, by.setting(), o.userID)
	batch.Queue(`
		WITH asked AS MATERIALIZED (
			SELECT a.n, a.id, a.price AS price_asked, p.price, p.title, p.image, p.artist_name AS artist,
				p.size || '(' || p.canvas || '호)' AS size
			FROM unnest((SELECT $1::text[]), (SELECT $2::bigint[])) WITH ORDINALITY AS a (id, price, n) LEFT JOIN products p ON p.id = a.id
		), unpaid AS MATERIALIZED (
			SELECT id, product_ids FROM orders WHERE user_id = $4::text AND status = -1 AND ended IS NULL
		), locked AS MATERIALIZED (
			SELECT p.id, p.for_sale FROM products p
			WHERE p.id = ANY($1::text[] || coalesce((SELECT product_ids FROM unpaid), '{}'))
				AND ((p.order_id IS NULL AND p.for_sale) OR p.order_id = (SELECT id FROM unpaid))
			ORDER BY p.id FOR NO KEY UPDATE
		), twin AS (
			SELECT id, product_ids FROM orders WHERE number = $5::text AND user_id = $4 AND ended IS NULL
		), won AS (
			SELECT sum(price) AS price FROM asked
			HAVING NOT EXISTS (SELECT FROM twin) AND bool_and(price = price_asked AND id IN (SELECT id FROM locked WHERE for_sale))
				AND sum(price) + $6::bigint = $7::bigint
		), replaced AS (
			UPDATE orders SET ended = 'replaced', updated_at = $8::timestamptz, next_look_at = $8
			WHERE id = (SELECT id FROM unpaid) AND status = -1 AND ended IS NULL AND EXISTS (SELECT FROM won)
			RETURNING id, product_ids
		), made AS (
			INSERT INTO orders (id, user_id, number, status, created_at, updated_at, held_until, next_look_at, shipping_price,
				total_price, product_ids, items, delivery_info, delivery_details, orderer_info)
			SELECT $3::text, $4, $5, -1, $8, $8, $9::timestamptz, $9, $6, $7, $1,
				(SELECT array_to_json(array_agg(i)) FROM (SELECT image, title, artist, size, price, id AS product FROM asked ORDER BY n) i),
				$10::text::json, $11::text::json, $12::text::json
			FROM won, (SELECT count(*) FROM replaced) AS after_replaced
			RETURNING id
		), moved AS (
			UPDATE products SET order_id = CASE WHEN products.id = ANY($1) THEN made.id END FROM made
			WHERE products.id = ANY($1::text[] || coalesce((SELECT product_ids FROM replaced), '{}'))
		)
		SELECT a.id, coalesce(a.title, ''), a.price IS NOT NULL, a.id IN (SELECT id FROM locked WHERE for_sale), coalesce(a.price, 0),
			coalesce((SELECT id FROM made), ''), coalesce((SELECT id FROM twin), ''), (SELECT product_ids FROM twin)
		FROM asked a ORDER BY a.n`,
		o.productIDs, o.prices, o.id, o.userID, o.number, o.shippingPrice, o.total, o.createdAt, o.heldUntil,
		o.deliveryInfo, o.deliveryDetails, o.ordererInfo,
	).Query(func(rows pgx.Rows) error {
		var a requestedItem
		var made, twin string
		_, err := pgx.ForEachRow(rows, []any{&a.id, &a.title, &a.known, &a.free, &a.price, &made, &twin, &created.existingItems}, func() error {
			created.orderID, created.existing = made+twin, twin != ""
			created.items = append(created.items, a)
			return nil
		})
		return err
	})
	if err := s.transact(ctx, batch); err != nil {
		return createResult{}, err
	}
	return created, nil
}

// freePaintings is the end of a statement whose CTE o has ended orders (id, product_ids): it gives back what they
// hold, locked in id order.
const freePaintings = `, theirs AS (
		SELECT p.id FROM products p JOIN o ON p.id = ANY(o.product_ids) AND p.order_id = o.id ORDER BY p.id FOR NO KEY UPDATE OF p
	), freed AS (
		UPDATE products SET order_id = NULL FROM theirs WHERE products.id = theirs.id
	)
	SELECT id FROM o`

// endUnpaid makes a tombstone of an unpaid order and frees its paintings; why is deleted or expired. The gateway is
// asked about it again at nextLook. errStale: it is not unpaid any more.
func (s *store) endUnpaid(ctx context.Context, by actor, id, why string, now, nextLook time.Time) error {
	batch := &pgx.Batch{}
	batch.Queue(lockBuyerOf, by.setting(), id)
	batch.Queue(`WITH o AS (
		UPDATE orders SET ended = $2, updated_at = $3, next_look_at = $4 WHERE id = $1 AND status = -1 AND ended IS NULL
		RETURNING id, product_ids)`+freePaintings, id, why, now, nextLook).QueryRow(exactlyOne)
	return s.transact(ctx, batch)
}

// exactlyOne turns the absence of a guarded change's row into errStale.
func exactlyOne(row pgx.Row) error {
	var id string
	if err := row.Scan(&id); errors.Is(err, pgx.ErrNoRows) {
		return errStale
	} else {
		return err
	}
}

// advance moves an order from one status to another, unless its money is on the way back. errStale: it is not in from,
// or being cancelled.
func (s *store) advance(ctx context.Context, by actor, id string, from, to int, now time.Time) error {
	batch := &pgx.Batch{}
	batch.Queue(setActor, by.setting())
	batch.Queue(`UPDATE orders SET status = $3, updated_at = $4
		WHERE id = $1 AND status = $2 AND ended IS NULL AND cancelling_since IS NULL RETURNING id`, id, from, to, now).QueryRow(exactlyOne)
	return s.transact(ctx, batch)
}

// orderState is where an order stands, for whoever wants to change it.
type orderState struct {
	id         string
	status     int
	cancelling bool
}

// orderState is the state of order id if caller may see it, else errNotFound.
func (s *store) findOrderState(ctx context.Context, id string, who caller) (orderState, error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	state := orderState{id: id}
	err := s.pool.QueryRow(ctx, `SELECT status, cancelling_since IS NOT NULL FROM orders
		WHERE id = $1 AND (user_id = $2 OR $3) AND ended IS NULL`, id, who.id, who.admin).Scan(&state.status, &state.cancelling)
	if errors.Is(err, pgx.ErrNoRows) {
		return state, errNotFound
	}
	return state, err
}

// ---- money

// paymentState is where a payment stands in the ledger.
type paymentState string

const (
	stateKept      paymentState = "kept"      // the order is paid with it
	stateRefunding paymentState = "refunding" // its refund is booked and not done yet
	stateRefunded  paymentState = "refunded"  // all of it went back
)

// paymentRow is a row of the ledger.
type paymentRow struct {
	impUID, orderID string
	state           paymentState
	reason          string // of the refund
	isKRW           bool   // in won
	amount          int64  // won; 0 when in another currency
	refunded        int64  // won
	attempts        int    // of the refund
}

const paymentColumns = `imp_uid, order_id, state, coalesce(reason, ''), currency = 'KRW', amount, refunded, attempts`

func scanPayment(row pgx.CollectableRow) (p paymentRow, err error) {
	err = row.Scan(&p.impUID, &p.orderID, &p.state, &p.reason, &p.isKRW, &p.amount, &p.refunded, &p.attempts)
	return p, err
}

// orderLedger is what settling needs to know about an order, read under its locks.
type orderLedger struct {
	orderID   string
	status    int
	ended     bool
	total     int64 // won
	payments  []paymentRow
	revivable bool // a tombstone whose paintings are all free, or held only by the same buyer's unpaid order
}

// payment is the ledger's row of impUID, nil when there is none.
func (b orderLedger) payment(impUID string) *paymentRow {
	if i := slices.IndexFunc(b.payments, func(p paymentRow) bool { return p.impUID == impUID }); i >= 0 {
		return &b.payments[i]
	}
	return nil
}

// decision is what settling writes: what becomes of a payment, and of its order with it.
type decision struct {
	state  paymentState // empty: nothing is written
	reason string       // why the money goes back
	pay    bool         // the order is paid with it
	revive bool         // before that the order, a tombstone, takes its paintings again
	cancel bool         // the order is cancelled with it and its paintings are free
}

// lockRevivable says whether the paintings of the tombstone $1 are still to be had, and locks those and what its buyer's
// unpaid order holds.
const lockRevivable = `
	WITH o AS (SELECT user_id, number, product_ids FROM orders WHERE id = $1 AND ended IS NOT NULL),
	unpaid AS (SELECT u.id, u.product_ids FROM orders u JOIN o ON u.user_id = o.user_id WHERE u.status = -1 AND u.ended IS NULL),
	locked AS (
		SELECT p.id, p.for_sale AND (p.order_id IS NULL OR p.order_id IS NOT DISTINCT FROM (SELECT id FROM unpaid)) AS free
		FROM products p WHERE p.id = ANY((SELECT product_ids FROM o)::text[] || coalesce((SELECT product_ids FROM unpaid), '{}'))
		ORDER BY p.id FOR NO KEY UPDATE)
	SELECT coalesce(bool_and(l.free), false) AND NOT EXISTS (
			SELECT FROM orders x JOIN o ON x.number = o.number AND x.user_id = o.user_id WHERE x.ended IS NULL AND x.status >= 0)
	FROM o JOIN locked l ON l.id = ANY(o.product_ids)`

// recordSettlement reads the books of payment p's order under the order's locks, has decide say what becomes of it, and writes
// that: two round trips (three for a tombstone), one transaction, and nothing asked of anybody else in between. A refund
// that is decided is leased to the caller until lease. errNotFound: the order is not ours.
func (s *store) recordSettlement(ctx context.Context, by actor, p gatewayPayment, now, lease time.Time, decide func(orderLedger) decision) (books orderLedger, entry decision, err error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return books, entry, err
	}
	// A connection that is released inside a transaction is closed, which rolls it back.
	defer conn.Release()

	id := p.merchantUID
	read := &pgx.Batch{}
	read.Queue(`BEGIN`)
	read.Queue(lockBuyerOf, by.setting(), id)
	read.Queue(`SELECT id, status, ended IS NOT NULL, total_price FROM orders WHERE id = $1 FOR NO KEY UPDATE`, id).QueryRow(func(row pgx.Row) error {
		return row.Scan(&books.orderID, &books.status, &books.ended, &books.total)
	})
	read.Queue(`SELECT `+paymentColumns+` FROM payments WHERE order_id = $1`, id).Query(func(rows pgx.Rows) (err error) {
		books.payments, err = pgx.CollectRows(rows, scanPayment)
		return err
	})
	if err := conn.SendBatch(ctx, read).Close(); errors.Is(err, pgx.ErrNoRows) {
		_, err = conn.Exec(ctx, `ROLLBACK`)
		return books, entry, errors.Join(errNotFound, err)
	} else if err != nil {
		return books, entry, err
	}
	if books.ended {
		if err := conn.QueryRow(ctx, lockRevivable, id).Scan(&books.revivable); err != nil {
			return books, entry, err
		}
	}

	entry = decide(books)
	write := &pgx.Batch{}
	if entry.state != "" {
		queueDecision(write, p, entry, books, now, lease)
	}
	write.Queue(`COMMIT`)
	return books, entry, conn.SendBatch(ctx, write).Close()
}

// queueDecision writes what was decided about payment p. Each statement names the state it changes from; under the locks
// that the decision was made under, that is the state it finds.
func queueDecision(batch *pgx.Batch, p gatewayPayment, entry decision, books orderLedger, now, lease time.Time) {
	id := books.orderID
	if entry.revive {
		// What the buyer's unpaid order holds of it, the revived one takes; the rest is free with the unpaid one's end.
		batch.Queue(`WITH o AS (
			UPDATE orders u SET ended = 'replaced', updated_at = $2, next_look_at = $2 FROM orders o
			WHERE o.id = $1 AND u.user_id = o.user_id AND u.status = -1 AND u.ended IS NULL
				AND (u.number = o.number OR u.product_ids && o.product_ids)
			RETURNING u.id, u.product_ids)`+freePaintings, id, now)
		batch.Queue(`UPDATE products p SET order_id = o.id FROM orders o WHERE o.id = $1 AND p.id = ANY(o.product_ids)`, id)
	}
	if entry.pay {
		batch.Queue(`UPDATE orders SET status = 0, ended = NULL, paid_at = $2, updated_at = $2, next_look_at = coalesce(next_look_at, $3)
			WHERE id = $1 AND status = -1`, id, now, lease)
	}
	var paidAt *time.Time
	if !p.paidAt.IsZero() {
		paidAt = &p.paidAt
	}
	refunded := min(p.cancelled, p.amount)
	batch.Queue(`
		INSERT INTO payments (imp_uid, order_id, state, reason, currency, amount, refunded, paid_at, created_at, updated_at, attempts, next_attempt_at, leased_until)
		VALUES ($1, $2, $3, nullif($4, ''), $5, $6, $7, $8, $9, $9, 1, $10, $10)
		ON CONFLICT (imp_uid) DO UPDATE SET state = excluded.state, reason = coalesce(payments.reason, excluded.reason),
			refunded = CASE excluded.state WHEN 'refunded' THEN payments.amount ELSE greatest(payments.refunded, excluded.refunded) END,
			updated_at = excluded.updated_at,
			last_error = CASE WHEN excluded.state = 'refunded' THEN NULL ELSE payments.last_error END`,
		p.impUID, id, entry.state, entry.reason, p.currency, p.amount, refunded, paidAt, now, lease)
	if entry.cancel {
		batch.Queue(`WITH o AS (
			UPDATE orders SET status = 5, cancelling_since = NULL, updated_at = $2 WHERE id = $1 AND status BETWEEN 0 AND 4
			RETURNING id, product_ids)`+freePaintings, id, now)
	}
}

// bookRefund books the refund of a paid order's whole payment before the gateway is asked, leased to the caller until
// lease. errStale: the order is not in from, or is being cancelled already.
func (s *store) bookRefund(ctx context.Context, by actor, id string, from int, reason string, now, lease time.Time) (paymentRow, error) {
	var payment paymentRow
	batch := &pgx.Batch{}
	batch.Queue(setActor, by.setting())
	batch.Queue(`
		WITH o AS (
			UPDATE orders SET cancelling_since = $3, updated_at = $3 FROM payments k
			WHERE orders.id = $1 AND orders.status = $2 AND orders.cancelling_since IS NULL AND k.order_id = orders.id AND k.state = 'kept'
			RETURNING orders.id)
		UPDATE payments SET state = 'refunding', reason = $4, updated_at = $3, attempts = 1, next_attempt_at = $5, leased_until = $5
		FROM o WHERE payments.order_id = o.id AND payments.state = 'kept'
		RETURNING `+paymentColumns, id, from, now, reason, lease).Query(func(rows pgx.Rows) (err error) {
		payment, err = pgx.CollectExactlyOneRow(rows, scanPayment)
		return err
	})
	if err := s.transact(ctx, batch); errors.Is(err, pgx.ErrNoRows) {
		return payment, errStale
	} else {
		return payment, err
	}
}

// claimOrderRefund takes the refund of an order that is being cancelled, for a caller who asks once more. errStale:
// somebody is at it, or it is done.
func (s *store) claimOrderRefund(ctx context.Context, id string, now, lease time.Time) (paymentRow, error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `
		UPDATE payments SET attempts = attempts + 1, next_attempt_at = $3, leased_until = $3
		WHERE order_id = $1 AND state = 'refunding' AND reason = ANY($4) AND leased_until <= $2
		RETURNING `+paymentColumns, id, now, lease, cancelReasons)
	payment, err := pgx.CollectExactlyOneRow(rows, scanPayment)
	if errors.Is(err, pgx.ErrNoRows) {
		return payment, errStale
	}
	return payment, err
}

// claimDueRefunds takes up to most refunds that are due and nobody is at, for the caller alone until lease.
func (s *store) claimDueRefunds(ctx context.Context, most int, now, lease time.Time) ([]paymentRow, error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `
		UPDATE payments SET attempts = attempts + 1, next_attempt_at = $3, leased_until = $3
		WHERE imp_uid = ANY(ARRAY(
			SELECT imp_uid FROM payments WHERE state = 'refunding' AND next_attempt_at <= $2 AND leased_until <= $2
			ORDER BY next_attempt_at LIMIT $1 FOR UPDATE SKIP LOCKED))
		RETURNING `+paymentColumns, most, now, lease)
	return pgx.CollectRows(rows, scanPayment)
}

// recordRefundFailure notes why a refund did not succeed and when the reconciler tries it again.
func (s *store) recordRefundFailure(ctx context.Context, impUID, why string, now, again time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	_, err := s.pool.Exec(ctx, `UPDATE payments SET last_error = $2, updated_at = $3, next_attempt_at = $4, leased_until = $3
		WHERE imp_uid = $1 AND state = 'refunding'`, impUID, why, now, again)
	return err
}

// paymentCheck is an order about which the gateway is to be asked.
type paymentCheck struct {
	id                              string
	status                          int
	ended                           bool
	createdAt, updatedAt, heldUntil time.Time
}

// claimDueChecks takes up to most orders whose time has come to ask the gateway about them, for the caller alone until
// lease.
func (s *store) claimDueChecks(ctx context.Context, most int, now, lease time.Time) ([]paymentCheck, error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `
		UPDATE orders SET next_look_at = $3
		WHERE id = ANY(ARRAY(
			SELECT id FROM orders WHERE next_look_at <= $2 ORDER BY next_look_at LIMIT $1 FOR UPDATE SKIP LOCKED))
		RETURNING id, status, ended IS NOT NULL, created_at, updated_at, held_until`, most, now, lease)
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (l paymentCheck, err error) {
		err = row.Scan(&l.id, &l.status, &l.ended, &l.createdAt, &l.updatedAt, &l.heldUntil)
		return l, err
	})
}

// scheduleCheck says when the gateway is to be asked about an order next; a zero time is never. An order that has changed
// since the look was claimed keeps the time of its lease.
func (s *store) scheduleCheck(ctx context.Context, l paymentCheck, next time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	var at *time.Time
	if !next.IsZero() {
		at = &next
	}
	_, err := s.pool.Exec(ctx, `UPDATE orders SET next_look_at = $3 WHERE id = $1 AND updated_at = $2`, l.id, l.updatedAt, at)
	return err
}

// checkSoon has the reconciler ask the gateway about an order at its next round.
func (s *store) checkSoon(ctx context.Context, id string, now time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	_, err := s.pool.Exec(ctx, `UPDATE orders SET next_look_at = $2 WHERE id = $1 AND (next_look_at IS NULL OR next_look_at > $2)`, id, now)
	return err
}

// compactStatusCounts adds the differences of order_tally together once there are many.
func (s *store) compactStatusCounts(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	_, err := s.pool.Exec(ctx, `
		WITH old AS (DELETE FROM order_tally WHERE (SELECT count(*) FROM order_tally) > 100 RETURNING status, n)
		INSERT INTO order_tally SELECT status, sum(n) FROM old GROUP BY status`)
	return err
}

// Money is what stands open, for the figures.
type openBalances struct {
	holds         int           // unpaid orders that hold paintings
	refunds       int           // payments whose refund is booked and not done
	oldestRefund  time.Duration // since the oldest of those was booked
	oldestUnknown time.Duration // since the oldest hold ended of which the gateway has not said whether money came
	orders        [6]int        // paid orders by status, from 0
}

// openBalancesQuery reads no more rows than there are holds, refunds that wait, and differences in order_tally.
const openBalancesQuery = `
	SELECT h.n, h.oldest, r.n, r.oldest, ARRAY(
		SELECT coalesce(sum(t.n), 0)::bigint FROM generate_series(0, 5) AS s LEFT JOIN order_tally t ON t.status = s GROUP BY s ORDER BY s)
	FROM (
		SELECT count(*) AS n, coalesce(greatest(extract(epoch FROM $1::timestamptz - min(held_until)), 0), 0)::float8 AS oldest
		FROM orders WHERE status = -1 AND ended IS NULL) h, (
		SELECT count(*) AS n, coalesce(extract(epoch FROM $1::timestamptz - min(
			CASE WHEN p.reason = ANY($2::text[]) THEN o.cancelling_since ELSE p.created_at END)), 0)::float8 AS oldest
		FROM payments p JOIN orders o ON o.id = p.order_id WHERE p.state = 'refunding') r`

// readOpenBalances is what stands open at now.
func (s *store) readOpenBalances(ctx context.Context, now time.Time) (m openBalances, err error) {
	var refund, unknown float64 // seconds
	var orders []int
	err = s.pool.QueryRow(ctx, openBalancesQuery, now, cancelReasons).Scan(&m.holds, &unknown, &m.refunds, &refund, &orders)
	m.oldestUnknown, m.oldestRefund = seconds(unknown), seconds(refund)
	copy(m.orders[:], orders)
	return m, err
}

func seconds(n float64) time.Duration { return time.Duration(n * float64(time.Second)) }

// ---- the desk

// orderColumns are those of an Order in a list.
const orderColumns = `o.id, o.user_id, o.number, o.status, o.updated_at, o.paid_at, o.shipping_price, o.total_price,
	o.items, o.delivery_info, o.delivery_details, o.orderer_info, o.orderer_info ->> 'name', o.orderer_info ->> 'email'`

func scanOrder(row pgx.CollectableRow) (o order, err error) {
	err = row.Scan(&o.id, &o.userID, &o.number, &o.status, &o.updatedAt, &o.paidAt, &o.shippingPrice, &o.total,
		&o.items, &o.deliveryInfo, &o.deliveryDetails, &o.ordererInfo, &o.ordererName, &o.ordererEmail)
	return o, err
}

// listBuyerOrders is a page of the buyer's orders, newest first, and how many he has in each status.
func (s *store) listBuyerOrders(ctx context.Context, buyer string, offset, limit int) (orders []order, count map[int]int, err error) {
	batch := &pgx.Batch{}
	batch.Queue(`SELECT status, count(*) FROM orders WHERE user_id = $1 AND ended IS NULL GROUP BY status`, buyer).Query(func(rows pgx.Rows) error {
		count, err = collectCounts(rows)
		return err
	})
	batch.Queue(`SELECT `+orderColumns+` FROM orders o WHERE user_id = $1 AND ended IS NULL
		ORDER BY created_at DESC, id DESC OFFSET (SELECT $2::bigint) LIMIT (SELECT $3::bigint)`, buyer, offset, limit).Query(func(rows pgx.Rows) (err error) {
		orders, err = pgx.CollectRows(rows, scanOrder)
		return err
	})
	return orders, count, s.transact(ctx, batch)
}

// collectCounts reads rows of a status and a number.
func collectCounts(rows pgx.Rows) (map[int]int, error) {
	count := map[int]int{}
	var status, n int
	_, err := pgx.ForEachRow(rows, []any{&status, &n}, func() error {
		count[status] = n
		return nil
	})
	return count, err
}

// orderFilter narrows the desk's list.
type orderFilter struct {
	status *int   // nil: every order that was paid
	number string // the order number; empty: any
}

// listAllOrders is a page of all buyers' orders, newest first, and how many there are on all pages. Only the paid
// ones, unless the filter asks for unpaid. A page past the end reads nothing; a far one walks the index up to it.
func (s *store) listAllOrders(ctx context.Context, filter orderFilter, offset, limit int) (orders []order, count int, err error) {
	where, counted, args := adminListQuery(filter)
	args = append(args, offset, limit)
	counted = `SELECT coalesce((` + counted + `), 0)::bigint`
	batch := &pgx.Batch{}
	batch.Queue(counted, args[:len(args)-2]...).QueryRow(func(row pgx.Row) error { return row.Scan(&count) })
	batch.Queue(fmt.Sprintf(`SELECT %s FROM orders o WHERE %s AND $%d::bigint < (%s)
		ORDER BY created_at DESC, id DESC OFFSET $%d LIMIT $%d`,
		orderColumns, where, len(args)-1, counted, len(args)-1, len(args)), args...).Query(func(rows pgx.Rows) (err error) {
		orders, err = pgx.CollectRows(rows, scanOrder)
		return err
	})
	return orders, count, s.transact(ctx, batch)
}

// adminListQuery is the condition of a filter and the statement that counts what meets it. The paid ones are counted by
// their tally, the unpaid ones (as many as there are holds) and those of one number one by one.
func adminListQuery(filter orderFilter) (where, counted string, args []any) {
	switch {
	case filter.number != "" && filter.status != nil:
		where, args = `number = $1 AND ended IS NULL AND status = $2`, []any{filter.number, *filter.status}
	case filter.number != "":
		where, args = `number = $1 AND ended IS NULL AND status >= 0`, []any{filter.number}
	case filter.status == nil:
		return `status >= 0`, `SELECT sum(n) FROM order_tally`, nil
	case *filter.status == statusUnpaid:
		where = `status = -1 AND ended IS NULL`
	default:
		return `status = $1 AND status >= 0`, `SELECT sum(n) FROM order_tally WHERE status = $1`, []any{*filter.status}
	}
	return where, `SELECT count(*) FROM orders WHERE ` + where, args
}

// historyRow is a row of an order's history.
type historyRow struct {
	at        time.Time
	who       string
	whoID     string // an administrator's
	from, to  *int   // nil where the row is about money
	why       string
	impUID    string
	amount    *int64 // won
	requestID string
}

// historyOf is what happened to order id, oldest first, if caller may see it, else errNotFound.
func (s *store) historyOf(ctx context.Context, id string, who caller) ([]historyRow, error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `
		SELECT h.at, h.who, coalesce(h.who_id, ''), h.from_status, h.to_status, h.why, coalesce(h.imp_uid, ''), h.amount, coalesce(h.request_id, '')
		FROM orders o JOIN history h ON h.order_id = o.id
		WHERE o.id = $1 AND (o.user_id = $2 OR $3) AND o.ended IS NULL ORDER BY h.id`, id, who.id, who.admin)
	entries, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (e historyRow, err error) {
		err = row.Scan(&e.at, &e.who, &e.whoID, &e.from, &e.to, &e.why, &e.impUID, &e.amount, &e.requestID)
		return e, err
	})
	if err == nil && len(entries) == 0 {
		err = errNotFound // an order's making is its first entry
	}
	return entries, err
}

// ---- the audit

// auditTimeout bounds the statements of the audit that read whole tables.
const auditTimeout = 2 * time.Minute

// ordersToAudit are the orders that were made or changed since then, their money too, and those that owe a refund.
func (s *store) ordersToAudit(ctx context.Context, since time.Time) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, auditTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `
		SELECT id FROM orders WHERE updated_at >= $1
		UNION SELECT order_id FROM payments WHERE updated_at >= $1 OR state = 'refunding'
		ORDER BY 1`, since)
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// auditLedger is an order's money in the books.
type auditLedger struct {
	orderID    string
	status     int
	cancelling bool
	total      int64 // won
	payments   []auditPayment
}

// auditPayment is a row of the ledger and how its refund goes.
type auditPayment struct {
	paymentRow
	dueSince  time.Time
	lastError string
}

// readLedger reads the books of order id.
func (s *store) readLedger(ctx context.Context, id string) (b auditLedger, err error) {
	batch := &pgx.Batch{}
	batch.Queue(`SELECT id, status, cancelling_since IS NOT NULL, total_price FROM orders WHERE id = $1`, id).QueryRow(func(row pgx.Row) error {
		return row.Scan(&b.orderID, &b.status, &b.cancelling, &b.total)
	})
	batch.Queue(`
		SELECT `+paymentColumns+`, greatest(created_at, (SELECT cancelling_since FROM orders WHERE id = order_id)), coalesce(last_error, '')
		FROM payments WHERE order_id = $1 ORDER BY created_at, imp_uid`, id).Query(func(rows pgx.Rows) (err error) {
		b.payments, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (p auditPayment, err error) {
			err = row.Scan(&p.impUID, &p.orderID, &p.state, &p.reason, &p.isKRW, &p.amount, &p.refunded, &p.attempts, &p.dueSince, &p.lastError)
			return p, err
		})
		return err
	})
	return b, s.transact(ctx, batch)
}

// strayPainting is a painting that is not where its order says.
type strayPainting struct {
	paintingID, orderID string
	missing             bool // the live order does not hold it; else it is held by the order, which is not live or never asked for it
}

// strayPaintings are those among all paintings and orders.
func (s *store) strayPaintings(ctx context.Context) ([]strayPainting, error) {
	ctx, cancel := context.WithTimeout(ctx, auditTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `
		SELECT p.id, o.id, false FROM products p JOIN orders o ON o.id = p.order_id
		WHERE o.ended IS NOT NULL OR o.status = 5 OR p.id <> ALL (o.product_ids)
		UNION ALL
		SELECT i.id, o.id, true FROM orders o CROSS JOIN unnest(o.product_ids) AS i (id) LEFT JOIN products p ON p.id = i.id
		WHERE o.ended IS NULL AND o.status < 5 AND p.order_id IS DISTINCT FROM o.id`)
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (p strayPainting, err error) {
		err = row.Scan(&p.paintingID, &p.orderID, &p.missing)
		return p, err
	})
}
