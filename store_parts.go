package main

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// partState is where the refund of a part stands.
type partState string

const (
	partBooked partState = "booked" // the gateway is being asked for it
	partDone   partState = "done"   // it went back, and its paintings are cancelled
	partUndone partState = "undone" // the gateway refused, or all of the payment went back otherwise
)

// partRefund is a refund of some of an order's paintings.
type partRefund struct {
	id              string
	products        []string
	amount          int64 // won
	remainingBefore int64 // won of the payment that had not gone back when it was booked
	reason          string
	attempts        int
	refusals        int        // of those, the ones that the gateway answered with a refusal
	payment         paymentRow // of which it is a part
}

// ledgerPart is what settling needs to know of a part refund.
type ledgerPart struct {
	ID    string
	State partState
}

// bookedPart returns the id of the payment's part refund that is under way; empty: none is.
func (p *paymentRow) bookedPart() string {
	if p != nil {
		for _, part := range p.parts {
			if part.State == partBooked {
				return part.ID
			}
		}
	}
	return ""
}

// changeReturning moves an order from the state that was read to a status in which exactly these paintings are asked back while
// others are left. It returns errStale when the order is in another state by now, or its money is on the way back.
func (s *store) changeReturning(ctx context.Context, by actor, state orderState, to int, returning []string, now time.Time) error {
	batch := &pgx.Batch{}
	batch.Queue(setActor, by.setting())
	batch.Queue(`UPDATE orders SET status = $3, returning_ids = coalesce($4::text[], '{}'), updated_at = $5
		WHERE id = $1 AND status = $2 AND returning_ids = $6 AND cancelled_ids = $7 AND ended IS NULL AND cancelling_since IS NULL
		RETURNING id`, state.id, state.status, to, returning, now, state.returning, state.cancelled).QueryRow(exactlyOne)
	return s.change(ctx, batch, state.id)
}

// claimedParts is the end of a statement whose CTE claimed has part refunds as they are now: its rows are those that scanPart
// reads.
const claimedParts = `
	SELECT claimed.part_id, claimed.products, claimed.part_amount, claimed.remaining, claimed.part_reason, claimed.tries, claimed.times_refused, ` + paymentColumns + `
	FROM claimed JOIN payments ON imp_uid = claimed.part_of`

// partReturning are the columns of claimed.
const partReturning = ` RETURNING id AS part_id, product_ids AS products, amount AS part_amount, remaining_before AS remaining,
	reason AS part_reason, attempts AS tries, refusals AS times_refused, imp_uid AS part_of`

func (r *partRefund) scanTo() []any {
	return append([]any{&r.id, &r.products, &r.amount, &r.remainingBefore, &r.reason, &r.attempts, &r.refusals}, r.payment.scanTo()...)
}

// bookPart books the refund of the part's paintings, of what they cost, before the gateway is asked, leased to the caller for
// refundLease. It returns errStale when the order is in another state than the one that was read.
func (s *store) bookPart(ctx context.Context, by actor, state orderState, part partRefund, now time.Time) (booked partRefund, err error) {
	batch := &pgx.Batch{}
	batch.Queue(setActor, by.setting())
	batch.Queue(`
		WITH o AS (
			UPDATE orders SET cancelling_since = $5, updated_at = $5 FROM payments k
			WHERE orders.id = $1 AND orders.status = $2 AND orders.returning_ids = $3 AND orders.cancelled_ids = $4
				AND orders.cancelling_since IS NULL AND k.order_id = orders.id AND k.state = 'kept'
			RETURNING orders.id, orders.items, k.imp_uid, k.amount - k.refunded AS remaining
		), claimed AS (
			INSERT INTO part_refunds (id, imp_uid, order_id, product_ids, amount, remaining_before, reason, state, created_at, updated_at, next_attempt_at, leased_until)
			SELECT $6, o.imp_uid, o.id, $7,
				(SELECT sum((i ->> 'price')::bigint) FROM json_array_elements(o.items) AS i WHERE i ->> 'product' = ANY ($7)),
				o.remaining, $8, 'booked', $5, $5, $9, $9
			FROM o`+partReturning+`)`+claimedParts,
		state.id, state.status, state.returning, state.cancelled, now, part.id, part.products, part.reason, now.Add(refundLease),
	).QueryRow(oneRow(booked.scanTo()...))
	err = s.change(ctx, batch, state.id)
	return booked, err
}

// claimPart takes the refund of exactly these paintings of an order, for a caller who asks once more. It returns errStale when
// there is none, or another caller is at it.
func (s *store) claimPart(ctx context.Context, order string, products []string, now time.Time) (part partRefund, err error) {
	batch := &pgx.Batch{}
	batch.Queue(`SELECT ` + shortLockWait)
	batch.Queue(`
		WITH claimed AS (
			UPDATE part_refunds SET attempts = attempts + 1, next_attempt_at = $4, leased_until = $4
			WHERE order_id = $1 AND state = 'booked' AND product_ids @> $2 AND product_ids <@ $2 AND leased_until <= $3`+partReturning+`)`+claimedParts,
		order, products, now, now.Add(refundLease)).QueryRow(oneRow(part.scanTo()...))
	err = s.change(ctx, batch, order)
	return part, err
}

// claimDueParts takes up to most part refunds that are due and that no caller is at, leased for refundLease.
func (s *store) claimDueParts(ctx context.Context, most int, now time.Time) ([]partRefund, error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `
		WITH claimed AS (
			UPDATE part_refunds SET attempts = attempts + 1, next_attempt_at = $3, leased_until = $3
			WHERE id = ANY(ARRAY(
				SELECT id FROM part_refunds WHERE state = 'booked' AND next_attempt_at <= $2 AND leased_until <= $2
				ORDER BY next_attempt_at LIMIT $1 FOR UPDATE SKIP LOCKED))`+partReturning+`)`+claimedParts,
		most, now, now.Add(refundLease))
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (part partRefund, err error) {
		err = row.Scan(part.scanTo()...)
		return part, err
	})
}

// recordPartFailure notes why a part refund did not succeed, and that the reconciler tries it again after pause.
func (s *store) recordPartFailure(ctx context.Context, id string, cause error, now time.Time, pause time.Duration) error {
	return s.exec(ctx, `
		UPDATE part_refunds SET last_error = $2, refusals = refusals + $5, updated_at = $3, next_attempt_at = $4, leased_until = $3
		WHERE id = $1 AND state = 'booked'`, id, cause.Error(), now, now.Add(pause), oneIf(refused(cause)))
}

// undoPart ends a part refund that the gateway refused: its order is as before. It returns errStale when the refund has ended
// already.
func (s *store) undoPart(ctx context.Context, by actor, part partRefund, cause error, now time.Time) error {
	batch := &pgx.Batch{}
	batch.Queue(lockBuyerOf, by.setting(), part.payment.orderID)
	batch.Queue(`SELECT FROM orders WHERE id = $1 FOR NO KEY UPDATE`, part.payment.orderID)
	batch.Queue(`
		WITH r AS (
			UPDATE part_refunds SET state = 'undone', last_error = $2, refusals = refusals + 1, updated_at = $3, leased_until = $3
			WHERE id = $1 AND state = 'booked'
			RETURNING order_id
		), o AS (
			UPDATE orders SET cancelling_since = NULL, updated_at = $3 FROM r WHERE orders.id = r.order_id
		)
		SELECT order_id FROM r`, part.id, cause.Error(), now).QueryRow(exactlyOne)
	return s.change(ctx, batch, part.payment.orderID)
}

// queuePart ends a part refund whose order is locked. When it is done, its paintings are cancelled and free. Once all that are
// left were asked back, the order is returning.
func queuePart(batch *pgx.Batch, id string, state partState, now time.Time) {
	batch.Queue(`
		WITH r AS (
			UPDATE part_refunds SET state = $2, last_error = NULL, updated_at = $3, leased_until = $3
			WHERE id = $1 AND state = 'booked'
			RETURNING order_id, CASE WHEN $2 = 'done' THEN product_ids ELSE '{}' END AS product_ids
		), o AS (
			UPDATE orders SET cancelling_since = NULL, updated_at = $3, cancelled_ids = cancelled_ids || r.product_ids, returning_ids = rest.returning,
				status = CASE WHEN status < 4 AND cardinality(rest.returning) > 0
					AND cardinality(rest.returning) + cardinality(cancelled_ids) + cardinality(r.product_ids) = cardinality(orders.product_ids) THEN 4 ELSE status END
			FROM r, LATERAL (SELECT ARRAY(SELECT i FROM orders b, unnest(b.returning_ids) AS i WHERE b.id = r.order_id AND i <> ALL (r.product_ids)) AS returning) AS rest
			WHERE orders.id = r.order_id
			RETURNING orders.id, r.product_ids, false AS off_sale
		)`+freeing+`
		SELECT id FROM o`, id, state, now)
}
