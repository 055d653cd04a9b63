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
	gateway         gatewayName
	impUID, orderID string
	state           paymentState
	reason          string         // of the refund
	isKRW           bool           // in won
	amount          int64          // won; 0 when in another currency
	refunded        int64          // won
	attempts        int            // of the refund
	refusals        int            // of those, the ones that the gateway answered with a refusal
	account         *refundAccount // where a virtual account's refund goes; nil: none was named
	parts           []ledgerPart   // the refunds of parts of it; read by recordSettlement alone
	failed          int            // refunds that the gateway took and that failed, as a caller has seen there; not a column
}

// key returns what names the payment at its gateway.
func (p paymentRow) key() paymentKey { return paymentKey{orderID: p.orderID, impUID: p.impUID} }

const paymentColumns = `gateway, imp_uid, order_id, state, coalesce(reason, ''), currency = 'KRW', amount, refunded, attempts, refusals, refund_account`

// scanTo returns where the columns of paymentColumns go.
func (p *paymentRow) scanTo() []any {
	return []any{&p.gateway, &p.impUID, &p.orderID, &p.state, &p.reason, &p.isKRW, &p.amount, &p.refunded, &p.attempts, &p.refusals, &p.account}
}

func scanPayment(row pgx.CollectableRow) (p paymentRow, err error) {
	err = row.Scan(p.scanTo()...)
	return p, err
}

// orderLedger is what settling needs to know about an order, read under its locks.
type orderLedger struct {
	orderID   string
	status    int
	ended     bool
	total     int64 // won
	payments  []paymentRow
	revivable bool // a tombstone that late money may still pay: see lockRevivable
}

// payment returns the ledger's row of impUID, nil when there is none.
func (l orderLedger) payment(impUID string) *paymentRow {
	if i := slices.IndexFunc(l.payments, func(p paymentRow) bool { return p.impUID == impUID }); i >= 0 {
		return &l.payments[i]
	}
	return nil
}

// decision is what settling writes: what becomes of a payment, and of its order with it.
type decision struct {
	state   paymentState // empty: nothing is written
	reason  string       // why the money goes back
	pay     bool         // the order is paid with it
	revive  bool         // before that the order, a tombstone, takes its paintings again
	cancel  bool         // the order is cancelled with it and its paintings are free
	offSale bool         // they have left the shop: they are off sale until an administrator says that they are back

	part      string    // the refund of a part that ends; empty: none
	partState partState // as what
}

// revivableFor is how long after its end late money may still pay for an order.
const revivableFor = 24 * time.Hour

// lockRevivable says whether late money may still pay for the tombstone $1: it ended after $2 and its personal data is
// there, its paintings are for sale and free, or held by an unpaid order of the same buyer whose payment is not being confirmed
// at $3, today's prices add up to its total, and no order that has to stay has taken its number. It locks the paintings and what
// the buyer's unpaid order holds.
const lockRevivable = `
	WITH o AS (SELECT user_id, number, product_ids, total_price - shipping_price AS price FROM orders WHERE id = $1 AND ended IS NOT NULL AND updated_at > $2 AND erased_at IS NULL),
	unpaid AS (
		SELECT u.id, u.product_ids, (u.confirming_until > $3) IS TRUE AS confirming
		FROM orders u JOIN o ON u.user_id = o.user_id WHERE u.status = -1 AND u.ended IS NULL),
	locked AS (
		SELECT p.id, p.price, p.for_sale AND (p.order_id IS NULL OR p.order_id IS NOT DISTINCT FROM (SELECT id FROM unpaid WHERE NOT confirming)) AS free
		FROM products p WHERE p.id = ANY((SELECT product_ids FROM o)::text[] || coalesce((SELECT product_ids FROM unpaid), '{}'))
		ORDER BY p.id FOR NO KEY UPDATE)
	SELECT coalesce(bool_and(l.free) AND sum(l.price) = min(o.price), false) AND NOT EXISTS (
			SELECT FROM orders x JOIN o ON x.number = o.number AND x.user_id = o.user_id WHERE x.ended IS NULL AND (x.status >= 0 OR x.confirming_until > $3))
	FROM o JOIN locked l ON l.id = ANY(o.product_ids)`

// recordSettlement reads the ledger of payment p's order under the order's locks, has decide say what becomes of p, and
// writes that, in one transaction, and asks the gateway nothing in between. It takes one round trip when p pays an unpaid order or
// nothing is to be written, and two when money goes back. One that did not pay for its order as expected takes three, and a
// tombstone four. A refund that is decided is leased to the caller for refundLease. It returns errNotFound when the order is
// not ours, and errOtherOrder when the ledger has the payment for another order.
func (s *store) recordSettlement(ctx context.Context, by actor, p gatewayPayment, now time.Time, decide func(orderLedger) decision) (ledger orderLedger, decided decision, err error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	err = s.bulkhead.pass(ctx, []string{p.merchantUID}, func() (err error) {
		if p.paysUnpaid() {
			var paid bool
			if ledger, paid, err = s.payUnpaid(ctx, by, p, now); paid {
				decided = decisionToPay
			}
			if err != nil || paid || decide(ledger) == (decision{}) {
				return err
			}
		}
		ledger, decided, err = s.settleLocked(ctx, by, p, now, decide)
		return err
	})
	return ledger, decided, err
}

// payUnpaid pays payment p's order with it in one round trip, if the order is unpaid, has not ended and is of p's amount, and if
// the ledger does not have p. It returns the ledger before that, and recordSettlement's errors.
func (s *store) payUnpaid(ctx context.Context, by actor, p gatewayPayment, now time.Time) (ledger orderLedger, paid bool, err error) {
	batch := &pgx.Batch{}
	queueLedger(batch, by, p, &ledger)
	batch.Queue(`
		WITH o AS (
			UPDATE orders SET status = 0, paid_at = $2, updated_at = $2, next_look_at = NULL
			WHERE id = $1 AND status < 0 AND ended IS NULL AND total_price = $5 AND NOT EXISTS (SELECT FROM payments WHERE imp_uid = $3)
			RETURNING id)
		INSERT INTO payments (imp_uid, order_id, state, currency, amount, paid_at, created_at, updated_at, gateway)
		SELECT $3, id, 'kept', $4, $5, $6, $2, $2, $7 FROM o
		RETURNING true`, p.merchantUID, now, p.impUID, p.currency, p.amount, p.paidAt, p.gateway).QueryRow(rowIfAny(&paid))
	if err = s.pool.SendBatch(ctx, batch).Close(); err == nil {
		err = ledger.notFor(p)
	}
	return ledger, paid, err
}

// queueLedger locks the order of payment p and its buyer, and reads its ledger.
func queueLedger(batch *pgx.Batch, by actor, p gatewayPayment, ledger *orderLedger) {
	batch.Queue(lockOrder, by.setting(), p.merchantUID).QueryRow(rowIfAny(nil, nil, nil, nil, &ledger.orderID, &ledger.status, &ledger.ended, &ledger.total))
	batch.Queue(`SELECT `+paymentColumns+`, (SELECT json_agg(json_build_object('ID', r.id, 'State', r.state)) FROM part_refunds r WHERE r.imp_uid = payments.imp_uid)
		FROM payments WHERE order_id = $1
		UNION ALL SELECT `+paymentColumns+`, NULL FROM payments WHERE imp_uid = $2 AND order_id <> $1`, p.merchantUID, p.impUID).Query(func(rows pgx.Rows) (err error) {
		ledger.payments, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (p paymentRow, err error) {
			err = row.Scan(append(p.scanTo(), &p.parts)...)
			return p, err
		})
		return err
	})
}

// notFor returns errNotFound when payment p's order is not ours, and errOtherOrder when the ledger has p for another one.
func (l orderLedger) notFor(p gatewayPayment) error {
	if l.orderID == "" {
		return errNotFound
	}
	if known := l.payment(p.impUID); known != nil && known.orderID != l.orderID {
		return errOtherOrder
	}
	return nil
}

// settleLocked is recordSettlement for what payUnpaid has not done.
func (s *store) settleLocked(ctx context.Context, by actor, p gatewayPayment, now time.Time, decide func(orderLedger) decision) (ledger orderLedger, decided decision, err error) {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return ledger, decided, err
	}
	// A connection that is released inside a transaction is closed, which rolls it back. A lock that was not got is no reason
	// to close it.
	defer conn.Release()
	defer func() {
		if lockedOut(err) {
			conn.Exec(ctx, `ROLLBACK`)
		}
	}()

	id := p.merchantUID
	read := &pgx.Batch{}
	read.Queue(`BEGIN`)
	queueLedger(read, by, p, &ledger)
	if err := conn.SendBatch(ctx, read).Close(); err != nil {
		return ledger, decided, err
	}
	if why := ledger.notFor(p); why != nil {
		_, err = conn.Exec(ctx, `ROLLBACK`)
		return ledger, decided, errors.Join(why, err)
	}
	if ledger.ended {
		if err := conn.QueryRow(ctx, lockRevivable, id, now.Add(-revivableFor), now).Scan(&ledger.revivable); err != nil {
			return ledger, decided, err
		}
	}

	decided = decide(ledger)
	write := &pgx.Batch{}
	if decided.state != "" {
		queueDecision(write, p, decided, id, now)
	}
	write.Queue(`COMMIT`)
	return ledger, decided, conn.SendBatch(ctx, write).Close()
}

// queueDecision writes what was decided about payment p of order id. Each statement names the state it changes from; under
// the locks that the decision was made under, that is the state it finds.
func queueDecision(batch *pgx.Batch, p gatewayPayment, decided decision, id string, now time.Time) {
	if decided.revive {
		// If the buyer's unpaid order has the number or a painting of the revived one, it ends: the revived order takes the
		// shared paintings and the others are free.
		batch.Queue(`WITH o AS (
			UPDATE orders u SET ended = 'replaced', updated_at = $2, next_look_at = NULL FROM orders o
			WHERE o.id = $1 AND u.user_id = o.user_id AND u.status = -1 AND u.ended IS NULL
				AND (u.number = o.number OR u.product_ids && o.product_ids)
			RETURNING u.id, u.product_ids, false AS off_sale)`+freePaintings, id, now)
		batch.Queue(`UPDATE products p SET order_id = o.id FROM orders o WHERE o.id = $1 AND p.id = ANY(o.product_ids)`, id)
	}
	if decided.pay {
		batch.Queue(`UPDATE orders SET status = 0, ended = NULL, paid_at = $2, updated_at = $2, next_look_at = NULL
			WHERE id = $1 AND status = -1`, id, now)
	}
	var paidAt *time.Time
	if !p.paidAt.IsZero() {
		paidAt = &p.paidAt
	}
	batch.Queue(`
		INSERT INTO payments (imp_uid, order_id, state, reason, currency, amount, refunded, paid_at, created_at, updated_at, attempts, next_attempt_at, leased_until, gateway)
		VALUES ($1, $2, $3, nullif($4, ''), $5, $6, CASE $3 WHEN 'refunded' THEN $6::bigint ELSE $7::bigint END, $8, $9, $9, 1, $10, $10, $11)
		ON CONFLICT (imp_uid) DO UPDATE SET state = excluded.state, reason = coalesce(payments.reason, excluded.reason),
			refunded = CASE excluded.state WHEN 'refunded' THEN payments.amount ELSE greatest(payments.refunded, excluded.refunded) END,
			updated_at = excluded.updated_at,
			last_error = CASE WHEN excluded.state = 'refunded' THEN NULL ELSE payments.last_error END
		WHERE payments.order_id = excluded.order_id`,
		p.impUID, id, decided.state, decided.reason, p.currency, p.amount, min(p.cancelled, p.amount), paidAt, now, now.Add(refundLease), p.gateway)
	if decided.part != "" {
		queuePart(batch, decided.part, decided.partState, now)
	}
	if decided.cancel {
		batch.Queue(`WITH o AS (
			UPDATE orders SET status = 5, cancelling_since = NULL, updated_at = $2 WHERE id = $1 AND status BETWEEN 0 AND 4
			RETURNING id, product_ids, $3::boolean AS off_sale)`+freePaintings, id, now, decided.offSale)
	}
}

// payable is where an order stands that is to be paid.
type payable struct {
	total      int64 // won
	status     int
	ended      bool
	confirming bool // another confirmation of its payment is under way
	reserved   bool // for the caller
}

// reserveForPayment keeps an unpaid order from ending, and from any other confirmation, until then. It returns errNotFound when
// there is no such order, and an order that is not reserved when it cannot be.
func (s *store) reserveForPayment(ctx context.Context, by actor, id string, now, until time.Time) (p payable, err error) {
	batch := &pgx.Batch{}
	batch.Queue(lockBuyerOf, by.setting(), id)
	batch.Queue(`SELECT total_price, status, ended IS NOT NULL, (confirming_until > $2) IS TRUE FROM orders WHERE id = $1`, id, now).QueryRow(func(row pgx.Row) error {
		return row.Scan(&p.total, &p.status, &p.ended, &p.confirming)
	})
	batch.Queue(`
		UPDATE orders SET confirming_until = $3, updated_at = $2, next_look_at = $3
		WHERE id = $1 AND status < 0 AND ended IS NULL AND (confirming_until > $2) IS NOT TRUE
		RETURNING true`, id, now, until).QueryRow(rowIfAny(&p.reserved))
	if err = s.change(ctx, batch, id); errors.Is(err, pgx.ErrNoRows) {
		err = errNotFound
	}
	return p, err
}

// releaseReservation ends the reservation of an order whose payment was not made, and has the reconciler look at the order.
// until names the reservation: a later one stays.
func (s *store) releaseReservation(ctx context.Context, id string, until, now time.Time) error {
	return s.exec(ctx, `
		UPDATE orders SET confirming_until = NULL, updated_at = $3, next_look_at = greatest(held_until, $3)
		WHERE id = $1 AND status < 0 AND ended IS NULL AND confirming_until = $2`, id, until, now)
}

// bookRefund books the refund of a paid order's whole payment before the gateway is asked, leased to the caller for
// refundLease. It returns errStale when the order is not in status from, or is being cancelled already.
func (s *store) bookRefund(ctx context.Context, by actor, id string, from int, reason string, now time.Time) (payment paymentRow, err error) {
	batch := &pgx.Batch{}
	batch.Queue(setActor, by.setting())
	batch.Queue(`
		WITH o AS (
			UPDATE orders SET cancelling_since = $3, updated_at = $3 FROM payments k
			WHERE orders.id = $1 AND orders.status = $2 AND orders.cancelling_since IS NULL AND k.order_id = orders.id AND k.state = 'kept'
			RETURNING orders.id)
		UPDATE payments SET state = 'refunding', reason = $4, updated_at = $3, attempts = 1, next_attempt_at = $5, leased_until = $5
		FROM o WHERE payments.order_id = o.id AND payments.state = 'kept'
		RETURNING `+paymentColumns, id, from, now, reason, now.Add(refundLease)).QueryRow(oneRow(payment.scanTo()...))
	err = s.change(ctx, batch, id)
	return payment, err
}

// claimOrderRefund takes the refund of an order that is being cancelled, for a caller who asks once more. It returns
// errStale when another caller is at it, or when it is done.
func (s *store) claimOrderRefund(ctx context.Context, id string, now time.Time) (payment paymentRow, err error) {
	batch := &pgx.Batch{}
	batch.Queue(`SELECT ` + shortLockWait)
	batch.Queue(`
		UPDATE payments SET attempts = attempts + 1, next_attempt_at = $3, leased_until = $3
		WHERE order_id = $1 AND state = 'refunding' AND reason = ANY($4) AND leased_until <= $2
		RETURNING `+paymentColumns, id, now, now.Add(refundLease), cancelReasons).QueryRow(oneRow(payment.scanTo()...))
	err = s.change(ctx, batch, id)
	return payment, err
}

// claimRefundTo takes a refund that is due and notes the account that it goes to. Besides refundDue's errors it returns
// errStale when another caller is at it.
func (s *store) claimRefundTo(ctx context.Context, id, impUID string, account refundAccount, now time.Time) (payment paymentRow, err error) {
	batch := &pgx.Batch{}
	batch.Queue(`SELECT ` + shortLockWait)
	batch.Queue(paymentIsDue, id, impUID).QueryRow(refundDue)
	batch.Queue(`
		UPDATE payments SET refund_account = $5, attempts = attempts + 1, next_attempt_at = $4, leased_until = $4
		WHERE imp_uid = $2 AND order_id = $1 AND state = 'refunding' AND leased_until <= $3
		RETURNING `+paymentColumns, id, impUID, now, now.Add(refundLease), account.stored()).QueryRow(oneRow(payment.scanTo()...))
	err = s.change(ctx, batch, id)
	return payment, err
}

// refundByHand books what is left of a payment as paid back by other means; how says by which. With the refund that
// cancels an order, the order is cancelled. Besides refundDue's errors it returns errStale when a caller is at the refund.
func (s *store) refundByHand(ctx context.Context, by actor, id, impUID, how string, now time.Time) error {
	batch := &pgx.Batch{}
	batch.Queue(lockBuyerOf, by.setting(), id)
	batch.Queue(`SELECT FROM orders WHERE id = $1 FOR NO KEY UPDATE`, id)
	batch.Queue(paymentIsDue, id, impUID).QueryRow(refundDue)
	batch.Queue(`
		WITH p AS (
			UPDATE payments SET state = 'refunded', refunded = amount, by_hand = $3, by_hand_amount = amount - refunded, last_error = NULL, updated_at = $4
			WHERE imp_uid = $2 AND order_id = $1 AND state = 'refunding' AND leased_until <= $4
			RETURNING order_id, reason
		), o AS (
			UPDATE orders SET status = 5, cancelling_since = NULL, updated_at = $4 FROM p
			WHERE orders.id = p.order_id AND p.reason = ANY($5) AND status BETWEEN 0 AND 4
			RETURNING orders.id, product_ids, false AS off_sale
		)`+freeing+`
		SELECT order_id FROM p`, id, impUID, how, now, cancelReasons).QueryRow(exactlyOne)
	return s.change(ctx, batch, id)
}

// paymentIsDue is the statement whose row refundDue reads.
const paymentIsDue = `SELECT state = 'refunding' FROM payments WHERE order_id = $1 AND imp_uid = $2`

// refundDue returns errNotFound when the order has no such payment, and errNotDue when no refund of it is due.
func refundDue(row pgx.Row) error {
	var due bool
	switch err := row.Scan(&due); {
	case errors.Is(err, pgx.ErrNoRows):
		return errNotFound
	case err == nil && !due:
		return errNotDue
	default:
		return err
	}
}

// claimDueRefunds takes up to most refunds that are due and that no caller is at, leased for refundLease.
func (s *store) claimDueRefunds(ctx context.Context, most int, now time.Time) ([]paymentRow, error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `
		UPDATE payments SET attempts = attempts + 1, next_attempt_at = $3, leased_until = $3
		WHERE imp_uid = ANY(ARRAY(
			SELECT imp_uid FROM payments WHERE state = 'refunding' AND next_attempt_at <= $2 AND leased_until <= $2
			ORDER BY next_attempt_at LIMIT $1 FOR UPDATE SKIP LOCKED))
		RETURNING `+paymentColumns, most, now, now.Add(refundLease))
	return pgx.CollectRows(rows, scanPayment)
}

// recordRefundFailure notes why the refund of payment did not succeed, and that the reconciler tries it again after pause. A
// refund that the gateway took and that then failed is a refusal, too.
func (s *store) recordRefundFailure(ctx context.Context, payment paymentRow, cause error, now time.Time, pause time.Duration) error {
	return s.exec(ctx, `
		UPDATE payments SET last_error = $2, refusals = greatest(refusals + $5, $6), updated_at = $3, next_attempt_at = $4, leased_until = $3
		WHERE imp_uid = $1 AND state = 'refunding'`,
		payment.impUID, cause.Error(), now, now.Add(pause), oneIf(refused(cause)), payment.failed)
}

func oneIf(yes bool) int {
	if yes {
		return 1
	}
	return 0
}

// ---- what the reconciler asks the gateway about

// paymentCheck is an order about which the gateway is to be asked.
type paymentCheck struct {
	id                   string
	unpaid               bool      // and live: its hold is to end
	updatedAt, heldUntil time.Time // the hold ends no earlier than a confirmation that was begun
}

// claimDueChecks takes up to most orders whose time has come to ask the gateway about them, leased for refundLease.
func (s *store) claimDueChecks(ctx context.Context, most int, now time.Time) ([]paymentCheck, error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `
		UPDATE orders SET next_look_at = $3
		WHERE id = ANY(ARRAY(
			SELECT id FROM orders WHERE next_look_at <= $2 ORDER BY next_look_at LIMIT $1 FOR UPDATE SKIP LOCKED))
		RETURNING id, status = -1 AND ended IS NULL, updated_at, greatest(held_until, confirming_until)`, most, now, now.Add(refundLease))
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (c paymentCheck, err error) {
		err = row.Scan(&c.id, &c.unpaid, &c.updatedAt, &c.heldUntil)
		return c, err
	})
}

// scheduleCheck says when the gateway is to be asked about an order next; nil is never. An order that has changed since
// the check was claimed keeps the time that it has.
func (s *store) scheduleCheck(ctx context.Context, c paymentCheck, next *time.Time) error {
	return s.exec(ctx, `UPDATE orders SET next_look_at = $3 WHERE id = $1 AND updated_at = $2`, c.id, c.updatedAt, next)
}

// checkSoon has the reconciler ask the gateway about an order at its next round.
func (s *store) checkSoon(ctx context.Context, id string, now time.Time) error {
	return s.exec(ctx, `UPDATE orders SET next_look_at = $2 WHERE id = $1 AND (next_look_at IS NULL OR next_look_at > $2)`, id, now)
}

// gatewayList names one of a gateway's lists as the database does. V1's have only the status for a name, as they had before
// there was another gateway.
type gatewayList string

func (s gatewayStatus) listAt(gateway gatewayName) gatewayList {
	if gateway == gatewayIamport {
		return gatewayList(s)
	}
	return gatewayList(gateway) + " " + gatewayList(s)
}

// claimList takes the reading of a list of a gateway's, leased for refundLease, and returns until when all that moved is
// known. It returns errStale while another replica reads the list. The first reading begins with the oldest open order.
func (s *store) claimList(ctx context.Context, list gatewayList, now time.Time) (readUntil time.Time, err error) {
	batch := &pgx.Batch{}
	batch.Queue(`SELECT ` + shortLockWait)
	batch.Queue(`
		INSERT INTO gateway_lists (status, read_until, leased_until)
		SELECT $1::text, least($2::timestamptz - $3::interval, (SELECT min(created_at) FROM orders WHERE status = -1 AND ended IS NULL),
			(SELECT min(created_at) FROM orders WHERE status = 0), (SELECT min(created_at) FROM orders WHERE status = 1),
			(SELECT min(created_at) FROM orders WHERE status = 2), (SELECT min(created_at) FROM orders WHERE status = 4)), $2
		WHERE NOT EXISTS (SELECT FROM gateway_lists WHERE status = $1::text)
		ON CONFLICT DO NOTHING`, list, now, revivableFor)
	batch.Queue(`UPDATE gateway_lists SET leased_until = $3 WHERE status = $1 AND leased_until <= $2 RETURNING read_until`,
		list, now, now.Add(refundLease)).QueryRow(oneRow(&readUntil))
	err = s.change(ctx, batch)
	return readUntil, err
}

// saveListRead notes that all that moved until then is known, and keeps the list leased for lease; 0 gives it back.
func (s *store) saveListRead(ctx context.Context, list gatewayList, until, now time.Time, lease time.Duration) error {
	return s.exec(ctx, `UPDATE gateway_lists SET read_until = greatest(read_until, $2), leased_until = $3 WHERE status = $1`,
		list, until, now.Add(lease))
}

// unsettledOf returns the imp_uids of those payments that are for orders of ours and not in the ledger as the gateway tells
// of them. A payment that the ledger has for another order is none of them.
func (s *store) unsettledOf(ctx context.Context, payments []gatewayPayment) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	impUIDs, orders := make([]string, len(payments)), make([]string, len(payments))
	cancelled, back := make([]int64, len(payments)), make([]bool, len(payments))
	for i, p := range payments {
		impUIDs[i], orders[i], cancelled[i], back[i] = p.impUID, p.merchantUID, p.cancelled, p.fullyRefunded
	}
	rows, _ := s.pool.Query(ctx, `
		SELECT l.imp_uid FROM unnest($1::text[], $2::text[], $3::bigint[], $4::boolean[]) AS l (imp_uid, order_id, cancelled, back)
		JOIN orders o ON o.id = l.order_id LEFT JOIN payments p ON p.imp_uid = l.imp_uid
		WHERE p.imp_uid IS NULL OR p.order_id = l.order_id AND p.state <> 'refunded' AND (l.back OR l.cancelled > p.refunded)`,
		impUIDs, orders, cancelled, back)
	return pgx.CollectRows(rows, pgx.RowTo[string])
}
