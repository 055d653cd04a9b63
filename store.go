package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// store has every SQL statement of the service, as methods on plain types. A call gives up after dbTimeout.
//
// Locks are always taken in one order: the buyer (an advisory lock, so that a buyer's orders change one at a time), the
// order's row, the paintings by id. advance takes only the order's row.
//
// Some statements say (SELECT $1) instead of $1. It hides from the planner how many keys or rows are asked for. The plan is
// then the same for any number, and PostgreSQL keeps it instead of planning at each call.
//
// A statement that changes an unpaid order by its id says status < 0. With status = -1 the indexes of unpaid orders would do for
// it, and the planner prefers to read such an index whole when there was no unpaid order as it last counted.
type store struct {
	pool      *pgxpool.Pool
	bulkhead  *bulkhead
	paintings *batcher[string, painting]
	orders    *batcher[orderKey, order]
	latest    *batcher[string, order]

	migrationLockWait time.Duration
}

// dbTimeout bounds one call to the database, waiting for a free connection included.
const dbTimeout = 5 * time.Second

var (
	// errNotFound says that there is no such row, or that the caller may not see it.
	errNotFound = errors.New("not found")
	// errStale says that a guarded change found the row in another state than the one that it changes from.
	errStale = errors.New("the order is no longer in that state")
	// errNotDue says that no refund of the payment is due.
	errNotDue = errors.New("no refund is due")
)

// openStore returns a store on the database at url. It does not wait for a connection: while the database is away, each call
// returns an error. trace may be nil.
func openStore(ctx context.Context, url string, trace pgx.QueryTracer) (*store, error) {
	pool, err := openPool(ctx, url, trace)
	if err != nil {
		return nil, err
	}
	s := &store{pool: pool, bulkhead: newBulkhead(int(pool.Config().MaxConns)), migrationLockWait: migrationLockWait}
	s.paintings = newBatcher(s.readPaintings)
	s.orders = newBatcher(s.readOrders)
	s.latest = newBatcher(s.readLatest)
	return s, nil
}

// openMigratedStore is openStore. It also brings the schema up to date.
func openMigratedStore(ctx context.Context, url string) (*store, error) {
	return openPreparedStore(ctx, url, (*store).migrateAll)
}

// openPreparedStore is openStore, followed by prepare. It closes the store when prepare returns an error.
func openPreparedStore(ctx context.Context, url string, prepare func(*store, context.Context) error) (*store, error) {
	s, err := openStore(ctx, url, nil)
	if err != nil {
		return nil, err
	}
	if err := prepare(s, ctx); err != nil {
		s.close()
		return nil, fmt.Errorf("database: %w", err)
	}
	return s, nil
}

// close waits for running statements and closes every connection.
func (s *store) close() { s.pool.Close() }

// ---- orders, read

// order is an order as it is shown. The documents are kept as the JSON that is answered.
type order struct {
	id, userID, number        string
	status                    int
	updatedAt                 time.Time
	paidAt                    *time.Time
	shippingPrice, total      int64 // won
	items, deliveryInfo       []byte
	deliveryDetails           []byte // nil when none was given
	ordererInfo               []byte
	returning, cancelled      []string // paintings, while others of the order are left
	ordererName, ordererEmail string   // of ordererInfo, for the administrator's list
	carrier, parcelNumber     string   // empty: not known
	shippedAt, deliveredAt    *time.Time
}

// orderKey asks for an order as a user: a buyer sees their own orders, an administrator sees all.
type orderKey struct {
	id    string
	buyer string
	admin bool
}

// findOrder returns the order id, and errNotFound when there is none that who may see.
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
			o.items, o.delivery_info, o.delivery_details, o.orderer_info, o.returning_ids, o.cancelled_ids, `+deliveryColumns+`
		FROM unnest((SELECT $1::text[]), (SELECT $2::text[]), (SELECT $3::boolean[])) AS k (id, buyer, admin)
		JOIN orders o ON o.id = k.id AND (o.user_id = k.buyer OR k.admin)
		WHERE o.ended IS NULL`, ids, buyers, admins)
	found := make(map[orderKey]order, len(keys))
	var key orderKey
	var o order
	_, err := pgx.ForEachRow(rows, []any{&key.buyer, &key.admin, &o.id, &o.userID, &o.number, &o.status, &o.updatedAt, &o.paidAt,
		&o.shippingPrice, &o.total, &o.items, &o.deliveryInfo, &o.deliveryDetails, &o.ordererInfo, &o.returning, &o.cancelled,
		&o.carrier, &o.parcelNumber, &o.shippedAt, &o.deliveredAt}, func() error {
		key.id = o.id
		found[key] = o
		return nil
	})
	return found, err
}

// findLatestOrder returns the id, delivery and orderer of the buyer's newest order that has them still, and errNotFound when
// there is none.
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
			WHERE user_id = k.buyer AND ended IS NULL AND erased_at IS NULL ORDER BY created_at DESC, id DESC LIMIT 1) o`, buyers)
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
	client  client // for whom the gateway is asked meanwhile; not in the history
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

// transact sends the statements of batch as one transaction, in one round trip. A batch without a BEGIN is one implicit
// transaction. It returns the error of the first statement that failed, or of the first of their callbacks.
func (s *store) transact(ctx context.Context, batch *pgx.Batch) error {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	return s.pool.SendBatch(ctx, batch).Close()
}

// change is transact for a batch that locks rows, of which it names those that many callers may want at once: the ids of an
// order, of paintings, of a buyer. The batch begins with a statement that has shortLockWait.
func (s *store) change(ctx context.Context, batch *pgx.Batch, rows ...string) error {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	return s.bulkhead.pass(ctx, rows, func() error { return s.pool.SendBatch(ctx, batch).Close() })
}

// exec is change for one statement.
func (s *store) exec(ctx context.Context, sql string, args ...any) error {
	batch := &pgx.Batch{}
	batch.Queue(`SELECT ` + shortLockWait)
	batch.Queue(sql, args...)
	return s.change(ctx, batch)
}

const (
	// shortLockWait has each statement of the transaction fail when it does not get a lock within a second, so that a row
	// which another session has locked does not keep a connection for long.
	shortLockWait = `set_config('lock_timeout', '1000', true)`
	// setActor has shortLockWait, and tells the database who makes the change; $1 is actor.setting.
	setActor = `SELECT set_config('lumiere.change', $1, true), ` + shortLockWait
	// lockBuyer is setActor, and takes the lock under which the orders of buyer $2 change one at a time.
	lockBuyer = setActor + `, pg_advisory_xact_lock(hashtextextended($2, 0))`
	// lockBuyerOf is lockBuyer for the buyer of the order $2.
	lockBuyerOf = lockingBuyer + ` FROM orders WHERE id = $2`
	// lockOrder is lockBuyerOf, and then locks the order. Its last columns are the order's id, status, whether it has ended, and its
	// total. PostgreSQL computes a statement's columns before it locks the row, so the buyer is locked first, and computes them
	// again when the row has changed meanwhile.
	lockOrder = lockingBuyer + `, id, status, ended IS NOT NULL, total_price FROM orders WHERE id = $2 FOR NO KEY UPDATE`
	// lockingBuyer is the beginning of both. It also has the server end the transaction when its client is silent for 5 seconds
	// between two statements: a replica that vanishes must not keep an order locked until TCP notices.
	lockingBuyer = setActor + `, set_config('idle_in_transaction_session_timeout', '5000', true), pg_advisory_xact_lock(hashtextextended(user_id, 0))`
)

// freeing is part of a statement whose CTE o has ended orders (id, product_ids, off_sale): it gives back what they hold,
// locked in id order. Paintings of an order with off_sale are not for sale from then on.
const freeing = `, theirs AS (
		SELECT p.id, o.off_sale FROM products p JOIN o ON p.id = ANY(o.product_ids) AND p.order_id = o.id ORDER BY p.id FOR NO KEY UPDATE OF p
	), freed AS (
		UPDATE products SET order_id = NULL, for_sale = for_sale AND NOT theirs.off_sale FROM theirs WHERE products.id = theirs.id
	)`

// freePaintings is freeing as the end of a statement.
const freePaintings = freeing + `
	SELECT id FROM o`

// endUnpaid makes a tombstone of an unpaid order and frees its paintings; why is deleted, expired or withdrawn. It returns
// errStale when the order is not unpaid any more.
func (s *store) endUnpaid(ctx context.Context, by actor, id, why string, now time.Time) error {
	batch := &pgx.Batch{}
	batch.Queue(lockBuyerOf, by.setting(), id)
	batch.Queue(`WITH o AS (
		UPDATE orders SET ended = $2, updated_at = $3, next_look_at = NULL
		WHERE id = $1 AND status < 0 AND ended IS NULL AND (confirming_until > $3) IS NOT TRUE
		RETURNING id, product_ids, false AS off_sale)`+freePaintings, id, why, now).QueryRow(exactlyOne)
	return s.change(ctx, batch, id)
}

// expireHold is endUnpaid for an order whose hold has ended. It returns errStale also when the hold has been begun anew.
func (s *store) expireHold(ctx context.Context, by actor, id string, now time.Time) error {
	batch := &pgx.Batch{}
	batch.Queue(lockBuyerOf, by.setting(), id)
	batch.Queue(`WITH o AS (
		UPDATE orders SET ended = 'expired', updated_at = $2, next_look_at = NULL
		WHERE id = $1 AND status < 0 AND ended IS NULL AND held_until <= $2 AND (confirming_until > $2) IS NOT TRUE
		RETURNING id, product_ids, false AS off_sale)`+freePaintings, id, now).QueryRow(exactlyOne)
	return s.change(ctx, batch, id)
}

// oneRow reads the row of a guarded change, and returns errStale when there is none.
func oneRow(to ...any) func(pgx.Row) error {
	return func(row pgx.Row) error {
		err := row.Scan(to...)
		if errors.Is(err, pgx.ErrNoRows) {
			return errStale
		}
		return err
	}
}

// rowIfAny reads a row if there is one.
func rowIfAny(to ...any) func(pgx.Row) error {
	return func(row pgx.Row) error {
		if err := row.Scan(to...); !errors.Is(err, pgx.ErrNoRows) {
			return err
		}
		return nil
	}
}

// exactlyOne is oneRow for a change that returns an id which the caller knows.
func exactlyOne(row pgx.Row) error { return oneRow(new(string))(row) }

// advance moves an order from one status to another, and records its parcel unless p is nil. It returns errStale when the
// order is not in status from, when its money is on the way back, or when it would be to send again and its address is
// erased.
func (s *store) advance(ctx context.Context, by actor, id string, from, to int, p *parcel, now time.Time) error {
	var carrier, number *string
	if p != nil {
		carrier, number = &p.Carrier, &p.Number
	}
	batch := &pgx.Batch{}
	batch.Queue(setActor, by.setting())
	batch.Queue(`UPDATE orders SET status = $3, updated_at = $4, carrier = coalesce($5, carrier), parcel_number = coalesce($6, parcel_number)
		WHERE id = $1 AND status = $2 AND ended IS NULL AND cancelling_since IS NULL AND (erased_at IS NULL OR $3 >= 3) RETURNING id`,
		id, from, to, now, carrier, number).QueryRow(exactlyOne)
	return s.change(ctx, batch, id)
}

// orderState is where an order stands, for a caller that wants to change it.
type orderState struct {
	id         string
	status     int
	cancelling bool
	ended      bool // unpaid, by the service: a tombstone
	confirming bool // unpaid, and its payment is being confirmed
	cameFrom   int  // the status in which its return was asked for, when it is statusReturning

	products, returning, cancelled []string // returning is empty in statusReturning: all that are left are
}

// findOrderState returns the state of order id, and errNotFound when there is none that who may see. Orders that the service
// has ended are found; those that their buyer has deleted are not.
func (s *store) findOrderState(ctx context.Context, id string, who caller, now time.Time) (orderState, error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	state := orderState{id: id}
	err := s.pool.QueryRow(ctx, `
		SELECT status, cancelling_since IS NOT NULL, ended IS NOT NULL, (confirming_until > $4) IS TRUE, CASE WHEN status = 4 THEN coalesce((
			SELECT from_status FROM history WHERE order_id = orders.id AND to_status = 4 AND from_status <> 4 ORDER BY history.id DESC LIMIT 1), 3)
			ELSE 0 END, product_ids, returning_ids, cancelled_ids
		FROM orders WHERE id = $1 AND (user_id = $2 OR $3) AND ended IS DISTINCT FROM 'deleted'`,
		id, who.id, who.admin, now).Scan(&state.status, &state.cancelling, &state.ended, &state.confirming, &state.cameFrom,
		&state.products, &state.returning, &state.cancelled)
	if errors.Is(err, pgx.ErrNoRows) {
		return state, errNotFound
	}
	return state, err
}

// ---- lists and history

// orderExists reports whether there is an order id, live or ended.
func (s *store) orderExists(ctx context.Context, id string) (exists bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	err = s.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM orders WHERE id = $1)`, id).Scan(&exists)
	return exists, err
}

// orderColumns are the columns that scanOrder reads.
const orderColumns = `o.id, o.user_id, o.number, o.status, o.updated_at, o.paid_at, o.shipping_price, o.total_price,
	o.items, o.delivery_info, o.delivery_details, o.orderer_info, o.returning_ids, o.cancelled_ids, o.orderer_info ->> 'name', o.orderer_info ->> 'email', ` + deliveryColumns

// deliveryColumns are those of an order's delivery.
const deliveryColumns = `coalesce(o.carrier, ''), coalesce(o.parcel_number, ''), o.shipped_at, o.delivered_at`

func scanOrder(row pgx.CollectableRow) (o order, err error) {
	err = row.Scan(&o.id, &o.userID, &o.number, &o.status, &o.updatedAt, &o.paidAt, &o.shippingPrice, &o.total,
		&o.items, &o.deliveryInfo, &o.deliveryDetails, &o.ordererInfo, &o.returning, &o.cancelled, &o.ordererName, &o.ordererEmail,
		&o.carrier, &o.parcelNumber, &o.shippedAt, &o.deliveredAt)
	return o, err
}

// listBuyerOrders returns a page of the buyer's orders, newest first, and how many they have in each status.
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

// collectCounts returns the numbers of rows of a status and a number, by status.
func collectCounts(rows pgx.Rows) (map[int]int, error) {
	count := map[int]int{}
	var status, n int
	_, err := pgx.ForEachRow(rows, []any{&status, &n}, func() error {
		count[status] = n
		return nil
	})
	return count, err
}

// historyRow is a row of an order's history.
type historyRow struct {
	at        time.Time
	who       string
	whoID     string // an administrator's
	from, to  *int   // nil where the row is about money
	why       string
	impUID    string
	amount    *int64   // won
	products  []string // nil: the whole order's
	requestID string
}

// historyOf returns what happened to order id, oldest first, and errNotFound when there is no order that who may see.
func (s *store) historyOf(ctx context.Context, id string, who caller) ([]historyRow, error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `
		SELECT h.at, h.who, coalesce(h.who_id, ''), h.from_status, h.to_status, h.why, coalesce(h.imp_uid, ''), h.amount, h.product_ids, coalesce(h.request_id, '')
		FROM orders o JOIN history h ON h.order_id = o.id
		WHERE o.id = $1 AND (o.user_id = $2 OR $3) AND o.ended IS NULL ORDER BY h.id`, id, who.id, who.admin)
	entries, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (e historyRow, err error) {
		err = row.Scan(&e.at, &e.who, &e.whoID, &e.from, &e.to, &e.why, &e.impUID, &e.amount, &e.products, &e.requestID)
		return e, err
	})
	if err == nil && len(entries) == 0 {
		err = errNotFound // an order's making is its first entry
	}
	return entries, err
}
