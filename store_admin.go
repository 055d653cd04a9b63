package main

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

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
