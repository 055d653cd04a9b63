package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// orderFilter narrows the administrator's list.
type orderFilter struct {
	status      *int   // nil: every order that was paid
	number      string // the order number; empty: any
	refundStuck bool   // only orders with a refund that needs a person, whatever their status
	search      string // a telephone, an e-mail or the beginning of a name; empty: any
}

// searchesPaid reports whether only the indexes of what is searched for narrow the list enough.
func (f orderFilter) searchesPaid() bool {
	return f.search != "" && f.number == "" && !f.refundStuck && (f.status == nil || *f.status >= statusPaid)
}

// listAllOrders returns a page of all buyers' orders, newest first, and how many there are on all pages. Only those that were
// paid, unless the filter asks for unpaid ones. A page past the end reads nothing; a far one walks the index up to it. Of the
// paid orders that a search finds there are the newest searchBound.
func (s *store) listAllOrders(ctx context.Context, filter orderFilter, offset, limit int) (orders []order, count int, err error) {
	if filter.searchesPaid() {
		return s.searchPaid(ctx, filter, offset, limit)
	}
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
	err = s.transact(ctx, batch)
	return orders, count, err
}

// adminListQuery returns the condition of a filter and the statement that counts the orders which meet it. Paid ones are
// counted by order_counts; the unpaid ones, as many as there are holds, and those of one number one by one.
func adminListQuery(filter orderFilter) (where, counted string, args []any) {
	status := `status >= 0`
	switch {
	case filter.refundStuck:
		status = fmt.Sprintf(`id IN (SELECT order_id FROM payments WHERE state = 'refunding' AND refusals >= %d)`, stuckAfter)
		if filter.status != nil {
			status, args = status+` AND status = $1`, []any{*filter.status}
		}
	case filter.status == nil:
		if filter.number == "" {
			return status, `SELECT sum(n) FROM order_counts`, nil
		}
	case *filter.status == statusUnpaid:
		status = `status = -1 AND ended IS NULL`
	default:
		status, args = `status = $1 AND status >= 0`, []any{*filter.status}
		if filter.number == "" {
			return status, `SELECT n FROM order_counts WHERE status = $1`, args
		}
	}
	where = status
	if filter.number != "" {
		args = append(args, filter.number)
		where += fmt.Sprintf(` AND number = $%d`, len(args))
		if !filter.refundStuck {
			where += ` AND ended IS NULL`
		}
	}
	if filter.search != "" {
		args = append(args, filter.search, digitsOf(filter.search))
		where += fmt.Sprintf(searchMatches, len(args)-1, len(args))
	}
	return where, `SELECT count(*) FROM orders WHERE ` + where, args
}

// What orders are found by, as order_search has it.
const (
	ordererPhone  = `regexp_replace(orderer_info ->> 'phoneNum', '[^0-9]', '', 'g') COLLATE "C"`
	receiverPhone = `regexp_replace(delivery_info ->> 'contactNum', '[^0-9]', '', 'g') COLLATE "C"`
	ordererEmail  = `lower((orderer_info ->> 'email') COLLATE "C")`
	ordererName   = `left(normalize(orderer_info ->> 'name'), 254) COLLATE "C"`
	receiverName  = `left(normalize(delivery_info ->> 'receiver'), 254) COLLATE "C"`

	otherPhone = `CASE WHEN delivery_info ->> 'contactNum' <> orderer_info ->> 'phoneNum' THEN ` + receiverPhone + ` END`
	otherName  = `CASE WHEN delivery_info ->> 'receiver' <> orderer_info ->> 'name' THEN ` + receiverName + ` END`
)

// searchMatches is the end of a condition: that the search in the first parameter, whose digits are in the second, finds the
// order.
const searchMatches = ` AND ((SELECT $%[2]d::text) IN (` + ordererPhone + `, ` + receiverPhone + `)
	OR ` + ordererEmail + ` = (SELECT lower($%[1]d::text COLLATE "C"))
	OR starts_with(` + ordererName + `, (SELECT normalize($%[1]d::text))) OR starts_with(` + receiverName + `, (SELECT normalize($%[1]d::text))))`

// searchBound is how many paid orders a search finds at most, the newest.
const searchBound = 1000

// searchPaid is listAllOrders for a search of all paid orders, or of those in one status.
func (s *store) searchPaid(ctx context.Context, filter orderFilter, offset, limit int) (orders []order, count int, err error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	statuses := []int{statusPaid, statusPreparing, statusShipping, statusDelivered, statusReturning, statusCancelled}
	if filter.status != nil {
		statuses = []int{*filter.status}
	}
	rows, _ := s.pool.Query(ctx, searchPaidQuery, statuses, filter.search, digitsOf(filter.search))
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || offset >= len(ids) {
		return nil, len(ids), err
	}
	rows, _ = s.pool.Query(ctx, `SELECT `+orderColumns+` FROM orders o WHERE id = ANY ((SELECT $1::text[])::text[]) ORDER BY created_at DESC, id DESC`,
		ids[offset:min(offset+limit, len(ids))])
	orders, err = pgx.CollectRows(rows, scanOrder)
	return orders, len(ids), err
}

// searchPaidQuery returns the ids of the newest orders in the statuses $1 that the search $2, whose digits are $3, finds. The
// beginning of a name may be that of most orders: those are read a week at a time, the newest first, until there are enough. The
// orders of status_changes are read themselves, because order_search may not have them as they are.
var searchPaidQuery = strings.NewReplacer(
	"{in status}", `status = ANY ((SELECT $1::smallint[])::smallint[])`,
	"{indexed}", `id NOT IN (SELECT order_id FROM status_changes)`,
	"{in week}", `date_trunc('week', created_at AT TIME ZONE 'UTC') = named.week - interval '7 days'`,
	"{newest}", fmt.Sprint(`ORDER BY created_at DESC, id DESC LIMIT `, searchBound),
	"{bound}", strconv.Itoa(searchBound),
	"{matches}", fmt.Sprintf(searchMatches, 2, 3),
).Replace(`
	WITH RECURSIVE named (week, ids, n) AS ( -- n are in later weeks
		SELECT date_trunc('week', max(created_at) AT TIME ZONE 'UTC') + interval '7 days', '{}'::text[] COLLATE "C", 0 FROM orders WHERE status >= 0
		UNION ALL
		SELECT week - interval '7 days', ARRAY(
			SELECT id FROM (
				SELECT id, created_at FROM order_search WHERE {in status} AND {in week} AND {indexed}
					AND orderer_name >= (SELECT normalize($2::text)) AND orderer_name < (SELECT normalize($2::text) || chr(1114111))
				UNION
				SELECT id, created_at FROM order_search WHERE {in status} AND {in week} AND {indexed}
					AND receiver_name >= (SELECT normalize($2::text)) AND receiver_name < (SELECT normalize($2::text) || chr(1114111))) m
			{newest}), n + cardinality(ids)
		FROM named WHERE n + cardinality(ids) < {bound} AND week > (SELECT min(created_at) AT TIME ZONE 'UTC' FROM orders WHERE status >= 0)
	)
	SELECT id FROM orders WHERE id = ANY (ARRAY(
		(SELECT id FROM order_search WHERE {in status} AND {indexed} AND orderer_phone = (SELECT $3::text) {newest})
		UNION
		(SELECT id FROM order_search WHERE {in status} AND {indexed} AND receiver_phone = (SELECT $3::text) {newest})
		UNION
		(SELECT id FROM order_search WHERE {in status} AND {indexed} AND orderer_email = (SELECT lower($2::text COLLATE "C")) {newest})
		UNION
		SELECT unnest(ids) FROM named
		UNION
		SELECT id FROM orders WHERE id = ANY (ARRAY(SELECT order_id FROM status_changes)) AND status >= 0 AND {in status} {matches}))
	{newest}`)

// digitsOf returns the digits of a search that may be a telephone, and nil when there are fewer than seven.
func digitsOf(search string) *string {
	digits := strings.Map(func(r rune) rune {
		if r < '0' || r > '9' {
			return -1
		}
		return r
	}, search)
	if len(digits) < 7 {
		return nil
	}
	return &digits
}

// applyStatusChanges applies up to most changes of status to order_tally and order_search. Counts and searches read those that are
// left from status_changes, so they are exact at any time. It does not wait: the changes of an order that another transaction has
// locked are left, too.
func (s *store) applyStatusChanges(ctx context.Context, most int) error {
	return s.exec(ctx, applyStatusChangesQuery, most)
}

const applyStatusChangesQuery = `
	WITH changed AS MATERIALIZED (
		SELECT id, status, created_at, erased_at IS NULL AS findable, ` + ordererPhone + ` AS orderer_phone, ` + otherPhone + ` AS receiver_phone,
			` + ordererEmail + ` AS orderer_email, ` + ordererName + ` AS orderer_name, ` + otherName + ` AS receiver_name
		FROM orders WHERE id = ANY (ARRAY(SELECT order_id FROM status_changes LIMIT (SELECT $1::bigint)))
		FOR NO KEY UPDATE SKIP LOCKED -- a transaction that erases one of them waits, and then finds it in order_search
	), applied AS (
		DELETE FROM status_changes c USING changed WHERE c.order_id = changed.id RETURNING c.from_status, c.to_status
	), counted AS (
		INSERT INTO order_tally
		SELECT status, sum(n) FROM (SELECT to_status, 1 FROM applied UNION ALL SELECT from_status, -1 FROM applied) AS d (status, n)
		WHERE status >= 0 GROUP BY status
	)
	INSERT INTO order_search (id, status, created_at, orderer_phone, receiver_phone, orderer_email, orderer_name, receiver_name)
	SELECT id, status, created_at, orderer_phone, receiver_phone, orderer_email, orderer_name, receiver_name FROM changed WHERE findable
	ON CONFLICT (id) DO UPDATE SET status = excluded.status WHERE order_search.status <> excluded.status`

// compactStatusCounts adds up the differences in order_tally once there are many.
func (s *store) compactStatusCounts(ctx context.Context) error {
	return s.exec(ctx, `
		WITH old AS (DELETE FROM order_tally WHERE (SELECT count(*) FROM order_tally) > 100 RETURNING status, n)
		INSERT INTO order_tally SELECT status, sum(n) FROM old GROUP BY status`)
}

// openBalances is what stands open, for the metrics.
type openBalances struct {
	holds          int           // unpaid orders that hold paintings
	refunds        int           // payments, or parts of one, whose refund is booked and not done, and goes on by itself
	refundsStuck   int           // those that the gateway has refused so often that a person is needed
	oldestRefund   time.Duration // since the oldest of refunds was booked
	oldestUnknown  time.Duration // since the oldest hold ended of which the gateway has not said whether money came
	oldestListRead time.Duration // since the lists of the configured gateways were known to be read whole
	orders         [6]int        // paid orders by status, from 0
}

// openBalancesQuery reads no more rows than there are holds, refunds that wait, and differences that order_counts adds up.
const openBalancesQuery = `
	SELECT h.n, h.oldest, r.n, r.stuck, r.oldest,
		(SELECT coalesce(extract(epoch FROM $1::timestamptz - min(read_until)), 0) FROM gateway_lists WHERE status = ANY($4::text[]))::float8,
		ARRAY(
			SELECT coalesce(c.n, 0) FROM generate_series(0, 5) AS s LEFT JOIN order_counts c ON c.status = s ORDER BY s)
	FROM (
		SELECT count(*) AS n, coalesce(greatest(extract(epoch FROM $1::timestamptz - min(held_until)), 0), 0)::float8 AS oldest
		FROM orders WHERE status = -1 AND ended IS NULL) h, (
		SELECT count(*) FILTER (WHERE p.refusals < $3) AS n, count(*) FILTER (WHERE p.refusals >= $3) AS stuck,
			coalesce(extract(epoch FROM $1::timestamptz - min(
				CASE WHEN p.reason = ANY($2::text[]) THEN o.cancelling_since ELSE p.created_at END) FILTER (WHERE p.refusals < $3)), 0)::float8 AS oldest
		FROM (SELECT order_id, refusals, reason, created_at FROM payments WHERE state = 'refunding'
			UNION ALL SELECT order_id, 0, reason, created_at FROM part_refunds WHERE state = 'booked') p JOIN orders o ON o.id = p.order_id) r`

// readOpenBalances returns what stands open at now, where lists are those of the configured gateways.
func (s *store) readOpenBalances(ctx context.Context, now time.Time, lists []gatewayList) (b openBalances, err error) {
	var refund, unknown, list float64 // seconds
	var orders []int
	err = s.pool.QueryRow(ctx, openBalancesQuery, now, cancelReasons, stuckAfter, lists).Scan(
		&b.holds, &unknown, &b.refunds, &b.refundsStuck, &refund, &list, &orders)
	b.oldestUnknown, b.oldestRefund, b.oldestListRead = seconds(unknown), seconds(refund), seconds(list)
	copy(b.orders[:], orders)
	return b, err
}

func seconds(n float64) time.Duration { return time.Duration(n * float64(time.Second)) }

// ---- the audit

// auditTimeout bounds the statements of the audit that read whole tables.
const auditTimeout = 2 * time.Minute

// ordersToAudit returns those of the orders listed that are ours, those that were made or changed since then, and those that
// owe a refund.
func (s *store) ordersToAudit(ctx context.Context, since time.Time, listed []string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, auditTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `
		SELECT id FROM orders WHERE updated_at >= $1
		UNION SELECT order_id FROM payments WHERE updated_at >= $1 OR state = 'refunding'
		UNION SELECT order_id FROM part_refunds WHERE state = 'booked'
		UNION SELECT id FROM orders WHERE id = ANY($2)
		ORDER BY 1`, since, listed)
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// auditLedger is an order's money in the ledger.
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
	dueSince     time.Time
	lastError    string
	byHand       bool  // the rest was paid back by other means
	byHandAmount int64 // won of that
	part         *auditPart
}

// auditPart is the refund of a part of a payment that is under way.
type auditPart struct {
	id        string
	amount    int64 // won
	dueSince  time.Time
	attempts  int
	lastError string
}

// readLedger returns the money of order id in the ledger. It leaves out the accounts that refunds go to.
func (s *store) readLedger(ctx context.Context, id string) (l auditLedger, err error) {
	batch := &pgx.Batch{}
	batch.Queue(`SELECT id, status, cancelling_since IS NOT NULL, total_price FROM orders WHERE id = $1`, id).QueryRow(func(row pgx.Row) error {
		return row.Scan(&l.orderID, &l.status, &l.cancelling, &l.total)
	})
	batch.Queue(`
		SELECT gateway, imp_uid, order_id, state, amount, refunded, attempts, refusals,
			greatest(created_at, (SELECT cancelling_since FROM orders WHERE id = order_id)), coalesce(last_error, ''), by_hand IS NOT NULL, by_hand_amount
		FROM payments WHERE order_id = $1 ORDER BY created_at, imp_uid`, id).Query(func(rows pgx.Rows) (err error) {
		l.payments, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (p auditPayment, err error) {
			err = row.Scan(&p.gateway, &p.impUID, &p.orderID, &p.state, &p.amount, &p.refunded, &p.attempts, &p.refusals,
				&p.dueSince, &p.lastError, &p.byHand, &p.byHandAmount)
			return p, err
		})
		return err
	})
	batch.Queue(`SELECT imp_uid, id, amount, created_at, attempts, coalesce(last_error, '') FROM part_refunds WHERE order_id = $1 AND state = 'booked'`, id).Query(func(rows pgx.Rows) error {
		var impUID string
		var part auditPart
		_, err := pgx.ForEachRow(rows, []any{&impUID, &part.id, &part.amount, &part.dueSince, &part.attempts, &part.lastError}, func() error {
			for i := range l.payments {
				if l.payments[i].impUID == impUID {
					l.payments[i].part = new(part)
				}
			}
			return nil
		})
		return err
	})
	err = s.transact(ctx, batch)
	return l, err
}

// orderOfPayment returns the order that the ledger has payment impUID for; empty when it has none.
func (s *store) orderOfPayment(ctx context.Context, impUID string) (order string, err error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	err = s.pool.QueryRow(ctx, `SELECT order_id FROM payments WHERE imp_uid = $1`, impUID).Scan(&order)
	if errors.Is(err, pgx.ErrNoRows) {
		err = nil
	}
	return order, err
}

// strayOrder is an order that disagrees with its payments in the ledger.
type strayOrder struct {
	orderID string
	total   int64 // won
	kept    bool  // it is not live, and yet a payment is kept for it; else it is live without exactly one payment of its total
}

// strayOrders returns those among all orders.
func (s *store) strayOrders(ctx context.Context) ([]strayOrder, error) {
	ctx, cancel := context.WithTimeout(ctx, auditTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `
		SELECT o.id, o.total_price, false FROM orders o LEFT JOIN payments p ON p.order_id = o.id
			AND (p.state = 'kept' OR p.state = 'refunding' AND o.cancelling_since IS NOT NULL AND p.reason = ANY($1))
		WHERE o.status BETWEEN 0 AND 4
		GROUP BY o.id HAVING count(p.imp_uid) <> 1 OR NOT bool_and(p.currency = 'KRW' AND p.amount = o.total_price)
		UNION ALL
		SELECT o.id, o.total_price, true FROM payments p JOIN orders o ON o.id = p.order_id
		WHERE p.state = 'kept' AND o.status NOT BETWEEN 0 AND 4`, cancelReasons)
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (o strayOrder, err error) {
		err = row.Scan(&o.orderID, &o.total, &o.kept)
		return o, err
	})
}

// strayParts returns the orders that disagree with their part refunds, among all.
func (s *store) strayParts(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, auditTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `
		SELECT id FROM (SELECT order_id AS id FROM part_refunds UNION SELECT id FROM orders WHERE cancelled_ids <> '{}') o
		WHERE NOT orders_parts_agree(id) ORDER BY id`)
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// strayPainting is a painting that is not where its order says.
type strayPainting struct {
	paintingID, orderID string
	missing             bool // the live order does not hold it; else it is held by the order, which is not live or never asked for it
}

// strayPaintings returns those among all paintings and orders.
func (s *store) strayPaintings(ctx context.Context) ([]strayPainting, error) {
	ctx, cancel := context.WithTimeout(ctx, auditTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `
		SELECT p.id, o.id, false FROM products p JOIN orders o ON o.id = p.order_id
		WHERE o.ended IS NOT NULL OR o.status = 5 OR p.id <> ALL (o.product_ids) OR p.id = ANY (o.cancelled_ids)
		UNION ALL
		SELECT i.id, o.id, true FROM orders o CROSS JOIN unnest(o.product_ids) AS i (id) LEFT JOIN products p ON p.id = i.id
		WHERE o.ended IS NULL AND o.status < 5 AND i.id <> ALL (o.cancelled_ids) AND p.order_id IS DISTINCT FROM o.id`)
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (p strayPainting, err error) {
		err = row.Scan(&p.paintingID, &p.orderID, &p.missing)
		return p, err
	})
}
