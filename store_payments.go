package main

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
)

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
