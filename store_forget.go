package main

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// erasing is the end of a statement whose CTE due has the orders (id) whose personal data is to be erased, at $1. Every text
// becomes "", so that the answers keep their keys. The last change of an order stays when it was.
const erasing = `, o AS (
		UPDATE orders SET erased_at = $1,
			delivery_info = '{"address":"","detailedAddress":"","receiver":"","contactNum":""}',
			delivery_details = '{"receiveAt":"","requestedTerms":""}',
			orderer_info = '{"name":"","phoneNum":"","email":"","refundTerms":""}'
		WHERE id = ANY(ARRAY(SELECT id FROM due)) AND erased_at IS NULL
		RETURNING id
	), p AS (
		UPDATE payments SET by_hand = '' FROM o WHERE payments.order_id = o.id AND by_hand <> ''
	)
	SELECT count(*) FROM o`

// noneOpen is the condition that no money of an order is on its way back, and none of its paintings.
const noneOpen = `NOT EXISTS (SELECT FROM payments WHERE order_id = orders.id AND state = 'refunding')
	AND cancelling_since IS NULL AND returning_ids = '{}'`

// eraseDue erases the personal data of up to most orders that were paid, are over and did not change after paid, and of up to
// most orders that ended unpaid and did not change after unpaid. It returns how many they are.
func (s *store) eraseDue(ctx context.Context, by actor, paid, unpaid, now time.Time, most int) (erased int, err error) {
	add := func(row pgx.Row) error {
		var n int
		err := row.Scan(&n)
		erased += n
		return err
	}
	batch := &pgx.Batch{}
	batch.Queue(setActor, by.setting())
	batch.Queue(`WITH due AS MATERIALIZED (
		SELECT id FROM orders WHERE erased_at IS NULL AND status IN (3, 5) AND updated_at <= $2 AND `+noneOpen+`
		ORDER BY updated_at LIMIT (SELECT $3::bigint) FOR NO KEY UPDATE SKIP LOCKED)`+erasing, now, paid, most).QueryRow(add)
	batch.Queue(`WITH due AS MATERIALIZED (
		SELECT id FROM orders WHERE erased_at IS NULL AND ended IS NOT NULL AND updated_at <= $2 AND `+noneOpen+`
		ORDER BY updated_at LIMIT (SELECT $3::bigint) FOR NO KEY UPDATE SKIP LOCKED)`+erasing, now, unpaid, most).QueryRow(add)
	return erased, s.transact(ctx, batch)
}

// erase erases the personal data of order id if it is in the same state as when it was read. It returns errStale when it is not.
func (s *store) erase(ctx context.Context, by actor, o orderData, now time.Time) error {
	batch := &pgx.Batch{}
	batch.Queue(setActor, by.setting())
	batch.Queue(`WITH due AS MATERIALIZED (
		SELECT id FROM orders WHERE id = $2 AND erased_at IS NULL AND status = $3 AND updated_at = $4 AND (ended IS NOT NULL) = $5 AND `+noneOpen+`
		FOR NO KEY UPDATE)`+erasing, now, o.id, o.status, o.updatedAt, o.ended).QueryRow(func(row pgx.Row) error {
		var n int
		if err := row.Scan(&n); err != nil || n == 1 {
			return err
		}
		return errStale
	})
	return s.change(ctx, batch, o.id)
}

// orderData is what decides whether the personal data of an order may be erased.
type orderData struct {
	id        string
	status    int
	ended     bool // unpaid
	open      bool // a refund or the return of a painting is not done
	updatedAt time.Time
	erasedAt  *time.Time
}

// readOrderData returns that of order id, and errNotFound when there is no such order.
func (s *store) readOrderData(ctx context.Context, id string) (o orderData, err error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	err = s.pool.QueryRow(ctx, `SELECT id, status, ended IS NOT NULL, NOT (`+noneOpen+`), updated_at, erased_at FROM orders WHERE id = $1`, id).
		Scan(&o.id, &o.status, &o.ended, &o.open, &o.updatedAt, &o.erasedAt)
	if errors.Is(err, pgx.ErrNoRows) {
		err = errNotFound
	}
	return o, err
}
