package main

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// What is exported is read by one statement, and so from one moment. It goes on for as long as its reader takes: no timeout.

// movement is money that was taken, or went back.
type movement struct {
	at             time.Time
	order, number  string
	gateway, payID string
	kind           string // paid, refunded, refunded by hand
	won            int64  // below 0 when it went back
}

// eachMovement calls each for all that moved from one time until before another, in that order. Money was taken when the gateway
// says so, and went back when that was booked. What went back of a payment adds up to what the ledger has: each row of its history
// tells how much it was by then, and what none of them tells went back at the payment's last change (there was no history yet).
func (s *store) eachMovement(ctx context.Context, from, to time.Time, each func(movement) error) error {
	const query = `
		SELECT m.at, m.order_id, o.number, m.gateway, m.imp_uid, m.kind, m.won
		FROM (
			SELECT coalesce(paid_at, created_at) AS at, order_id, gateway, imp_uid, 'paid' AS kind, amount AS won, 0 AS n FROM payments
			UNION ALL
			SELECT back.at, p.order_id, p.gateway, p.imp_uid, k.kind, k.won, back.id
			FROM payments p, LATERAL (
				SELECT at, id, other, max(total) OVER (ORDER BY id)
					- coalesce(max(total) OVER (ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS won
				FROM (
					SELECT h.at, h.id, CASE WHEN h.why LIKE 'refunded by hand: %' THEN h.amount ELSE 0 END AS other,
						CASE WHEN h.why = 'partly refunded' THEN h.amount WHEN h.why LIKE 'refunded%: %' THEN p.amount ELSE 0 END AS total
					FROM history h WHERE h.order_id = p.order_id AND h.imp_uid = p.imp_uid
					UNION ALL SELECT p.updated_at, 9223372036854775807, 0, p.refunded) AS total
				) AS back, LATERAL (VALUES ('refunded', back.other - back.won), ('refunded by hand', -back.other)) AS k (kind, won)
			WHERE p.refunded > 0 AND p.updated_at >= $1::timestamptz - interval '1 day' -- the clocks of replicas may differ
		) m JOIN orders o ON o.id = m.order_id
		WHERE m.at >= $1 AND m.at < $2 AND m.won <> 0
		ORDER BY m.at, m.order_id, m.imp_uid, m.n, m.kind`
	var m movement
	return s.stream(ctx, query, []any{from, to}, []any{&m.at, &m.order, &m.number, &m.gateway, &m.payID, &m.kind, &m.won},
		func() error { return each(m) })
}

// soldPainting is a painting of an order that was paid.
type soldPainting struct {
	order, number          string
	product, artist, title string
	price                  int64 // won
	paid                   time.Time
	shipped, delivered     *time.Time
	status                 int // the order's
}

// eachSoldPainting calls each for the paintings of all orders whose payment was made from one time until before another, in that
// order. The payment that paid an order was booked together with it.
func (s *store) eachSoldPainting(ctx context.Context, from, to time.Time, each func(soldPainting) error) error {
	const query = `
		SELECT o.id, o.number, i.item ->> 'product', i.item ->> 'artist', i.item ->> 'title', (i.item ->> 'price')::bigint,
			coalesce(p.paid_at, o.paid_at), o.shipped_at, o.delivered_at,
			CASE WHEN i.item ->> 'product' = ANY (o.cancelled_ids) THEN 5 WHEN i.item ->> 'product' = ANY (o.returning_ids) THEN 4 ELSE o.status END
		FROM orders o LEFT JOIN LATERAL (
				SELECT paid_at FROM payments WHERE order_id = o.id AND created_at = o.paid_at AND amount = o.total_price
				ORDER BY state = 'kept' DESC LIMIT 1) AS p ON true,
			LATERAL json_array_elements(o.items) WITH ORDINALITY AS i (item, n)
		WHERE o.status >= 0 AND coalesce(p.paid_at, o.paid_at) >= $1 AND coalesce(p.paid_at, o.paid_at) < $2
			AND o.created_at < $2 AND o.paid_at >= $1::timestamptz - interval '1 day' -- the gateway's clock may differ
		ORDER BY 7, o.id, i.n`
	var p soldPainting
	return s.stream(ctx, query, []any{from, to}, []any{&p.order, &p.number, &p.product, &p.artist, &p.title, &p.price, &p.paid,
		&p.shipped, &p.delivered, &p.status}, func() error { return each(p) })
}

// stream calls each for every row of a query, read into scans. However many they are, one is in memory at a time.
func (s *store) stream(ctx context.Context, query string, args, scans []any, each func() error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	rows, err := s.pool.Query(ctx, query, args...)
	if err != nil {
		return err
	}
	_, err = pgx.ForEachRow(rows, scans, func() error {
		err := each()
		if err != nil {
			cancel() // the rows that are left are not read
		}
		return err
	})
	return err
}
