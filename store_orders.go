package main

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
)

// newOrder is an order about to be made. Prices are the client's, to be compared with the catalogue's.
type newOrder struct {
	id, userID, number   string
	productIDs           []string // distinct
	prices               []int64  // won, of productIDs
	shippingPrice, total int64    // won
	deliveryInfo         string   // JSON
	deliveryDetails      string   // JSON
	ordererInfo          string   // JSON
	createdAt            time.Time
	hold                 time.Duration // how long it may stay unpaid
}

// requestedItem is what the database knew of a painting that an order asked for.
type requestedItem struct {
	id, title string
	known     bool       // there is such a painting
	free      bool       // it could be held for this buyer
	price     int64      // won
	until     *time.Time // until then it is left to others: this buyer has held it again and again without paying
}

// createResult is what became of a request for a new order. Without an orderID, items tell why there is none.
type createResult struct {
	orderID    string // the order made, or the same one that the buyer has already
	made       bool   // it is a new one
	numberUsed bool   // an order of this buyer's that was paid has the number
	confirming bool   // the buyer's unpaid order cannot be replaced: its payment is being confirmed
	items      []requestedItem

	holdIsOver bool // the buyer has held one of items for as long as one may
}

// anyFree reports whether no order has one of the items. The buyer may have to leave it to others all the same.
func (c createResult) anyFree() bool {
	return slices.ContainsFunc(c.items, func(item requestedItem) bool { return item.free })
}

// placeOrder holds all of the paintings for a new order or none, and replaces the buyer's unpaid order. The same request
// again finds that order and begins its hold anew. A hold that takes a painting over from the replaced order ends at most
// twice o.hold after the first of them began. Once such a hold has ended unpaid, the buyer has to leave the painting to
// others for o.hold.
func (s *store) placeOrder(ctx context.Context, by actor, o newOrder) (createResult, error) {
	created, numberOf, err := s.insertOrder(ctx, by, o, false)
	if err == nil && numberOf == statusUnpaid {
		if created.orderID, err = s.renewHold(ctx, by, o); err == nil && created.orderID == "" {
			created, numberOf, err = s.insertOrder(ctx, by, o, true)
		}
	}
	created.numberUsed = numberOf >= statusPaid
	if err == nil && created.orderID == "" && !created.numberUsed && (created.holdIsOver || created.anyFree()) {
		err = s.markLeftToOthers(ctx, o, created.items)
	}
	return created, err
}

// insertOrder makes a new order in one round trip: under the buyer's lock, one statement locks the free ones of the paintings
// in id order, and makes the order if that is all of them and every price is the catalogue's. A painting that is already
// taken is not locked, so that losers neither wait nor write. It returns the status of the buyer's order that has the number
// already, or noStatus. No order is made then, except in place of an unpaid one when sameNumber is set.
func (s *store) insertOrder(ctx context.Context, by actor, o newOrder, sameNumber bool) (created createResult, numberOf int, err error) {
	batch := &pgx.Batch{}
	batch.Queue(lockBuyer, by.setting(), o.userID)
	batch.Queue(`
		WITH requested AS MATERIALIZED (
			SELECT a.n, a.id, a.price AS price_asked, p.price, p.title, p.image, p.artist_name AS artist,
				p.size || '(' || p.canvas || '호)' AS size
			FROM unnest((SELECT $1::text[]), (SELECT $2::bigint[])) WITH ORDINALITY AS a (id, price, n) LEFT JOIN products p ON p.id = a.id
		), existing AS (
			SELECT status FROM orders WHERE number = $5::text AND user_id = $4::text AND ended IS NULL
		), unpaid AS MATERIALIZED (
			SELECT id, product_ids, coalesce(held_again_since, created_at) AS held_since, confirming_until > $8::timestamptz AS confirming
			FROM orders WHERE user_id = $4 AND status = -1 AND ended IS NULL
		), locked AS MATERIALIZED (
			SELECT p.id, p.for_sale FROM products p
			WHERE p.id = ANY($1::text[] || coalesce((SELECT product_ids FROM unpaid), '{}'))
				AND ((p.order_id IS NULL AND p.for_sale) OR p.order_id = (SELECT id FROM unpaid WHERE held_since + 2 * $9::interval > $8::timestamptz))
			ORDER BY p.id FOR NO KEY UPDATE
		), accepted AS (
			SELECT sum(price) AS price FROM requested
			HAVING NOT EXISTS (SELECT FROM existing WHERE status >= 0 OR NOT $13::boolean) AND (SELECT confirming FROM unpaid) IS NOT TRUE
				AND NOT EXISTS (
					SELECT FROM orders WHERE user_id = $4 AND ended IS NOT NULL AND held_again_since IS NOT NULL AND updated_at > $8 - $9 AND ended <> 'replaced'
						AND EXISTS (SELECT FROM unnest(product_ids) AS i (id) WHERE i.id = ANY($1) AND i.id <> ALL (coalesce((SELECT product_ids FROM unpaid), '{}'))))
				AND bool_and(price = price_asked AND id IN (SELECT id FROM locked WHERE for_sale)) AND sum(price) + $6::bigint = $7::bigint
		), replaced AS (
			UPDATE orders SET ended = 'replaced', updated_at = $8, next_look_at = NULL
			WHERE user_id = $4 AND id = (SELECT id FROM unpaid) AND status = -1 AND ended IS NULL AND EXISTS (SELECT FROM accepted)
			RETURNING id, product_ids
		), made AS (
			INSERT INTO orders (id, user_id, number, status, created_at, updated_at, held_until, next_look_at, held_again_since,
				shipping_price, total_price, product_ids, items, delivery_info, delivery_details, orderer_info)
			SELECT $3::text, $4, $5, -1, $8, $8, least($8 + $9, h.since + 2 * $9), least($8 + $9, h.since + 2 * $9), h.since, $6, $7, $1,
				(SELECT array_to_json(array_agg(i)) FROM (SELECT image, title, artist, size, price, id AS product FROM requested ORDER BY n) i),
				$10::text::json, $11::text::json, $12::text::json
			FROM accepted, (SELECT count(*) FROM replaced) AS after_replaced,
				(SELECT (SELECT held_since FROM unpaid WHERE product_ids && $1) AS since) AS h
			RETURNING id
		), moved AS (
			UPDATE products SET order_id = CASE WHEN products.id = ANY($1) THEN made.id END FROM made
			WHERE products.id = ANY($1::text[] || coalesce((SELECT product_ids FROM replaced), '{}'))
		)
		SELECT r.id, coalesce(r.title, ''), r.price IS NOT NULL, r.id IN (SELECT id FROM locked WHERE for_sale), coalesce(r.price, 0),
			coalesce((SELECT id FROM made), ''), coalesce((SELECT status FROM existing), $14::smallint),
			EXISTS (SELECT FROM unpaid WHERE held_since + 2 * $9 <= $8 AND $1 && product_ids), (SELECT confirming FROM unpaid) IS TRUE
		FROM requested r ORDER BY r.n`,
		o.productIDs, o.prices, o.id, o.userID, o.number, o.shippingPrice, o.total, o.createdAt, o.hold,
		o.deliveryInfo, o.deliveryDetails, o.ordererInfo, sameNumber, noStatus,
	).Query(func(rows pgx.Rows) error {
		var item requestedItem
		_, err := pgx.ForEachRow(rows, []any{&item.id, &item.title, &item.known, &item.free, &item.price,
			&created.orderID, &numberOf, &created.holdIsOver, &created.confirming}, func() error {
			created.items = append(created.items, item)
			return nil
		})
		return err
	})
	if err := s.change(ctx, batch, append([]string{o.userID}, o.productIDs...)...); err != nil {
		return createResult{}, noStatus, err
	}
	created.made = created.orderID != ""
	return created, numberOf, nil
}

// noStatus stands for the status of an order that there is not.
const noStatus = -2

// renewHold begins the hold of the buyer's unpaid order anew when it is the same as o: number, paintings, prices and texts. It
// returns that order's id, and "" when there is none.
func (s *store) renewHold(ctx context.Context, by actor, o newOrder) (id string, err error) {
	batch := &pgx.Batch{}
	batch.Queue(lockBuyer, by.setting(), o.userID)
	batch.Queue(`
		UPDATE orders SET updated_at = $6, held_until = h.until, next_look_at = h.until
		FROM (SELECT id, least($6::timestamptz + $7::interval, coalesce(held_again_since, created_at) + 2 * $7) AS until
			FROM orders WHERE user_id = $1 AND status = -1 AND ended IS NULL) h
		WHERE orders.id = h.id AND number = $2 AND status < 0 AND ended IS NULL AND shipping_price = $3 AND total_price = $4
			AND (SELECT array_agg((i ->> 'product') || ' ' || (i ->> 'price') ORDER BY i ->> 'product') FROM json_array_elements(items) AS i)
				= (SELECT array_agg(a.id || ' ' || a.price ORDER BY a.id) FROM unnest($5::text[], $8::bigint[]) AS a (id, price))
			AND delivery_info::text = $9 AND delivery_details::text = $10 AND orderer_info::text = $11
		RETURNING orders.id`,
		o.userID, o.number, o.shippingPrice, o.total, o.productIDs, o.createdAt, o.hold, o.prices, o.deliveryInfo, o.deliveryDetails, o.ordererInfo,
	).QueryRow(oneRow(&id))
	if err = s.change(ctx, batch, o.userID); errors.Is(err, errStale) {
		err = nil
	}
	return id, err
}

// markLeftToOthers notes which of items the buyer has to leave to others, and until when.
func (s *store) markLeftToOthers(ctx context.Context, o newOrder, items []requestedItem) error {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `
		WITH unpaid AS (SELECT product_ids, coalesce(held_again_since, created_at) AS held_since FROM orders WHERE user_id = $1 AND status = -1 AND ended IS NULL)
		SELECT i.id, max(updated_at) + $3::interval FROM orders CROSS JOIN unnest(product_ids) AS i (id)
		WHERE user_id = $1 AND ended IS NOT NULL AND held_again_since IS NOT NULL AND updated_at > $2::timestamptz - $3 AND ended <> 'replaced' AND i.id <> ALL (coalesce((SELECT product_ids FROM unpaid), '{}')) GROUP BY i.id
		UNION ALL
		SELECT i.id, $2::timestamptz + $3 FROM unpaid CROSS JOIN unnest(product_ids) AS i (id) WHERE held_since + 2 * $3 <= $2`, o.userID, o.createdAt, o.hold)
	var id string
	var until time.Time
	_, err := pgx.ForEachRow(rows, []any{&id, &until}, func() error {
		if i := slices.IndexFunc(items, func(item requestedItem) bool { return item.id == id }); i >= 0 {
			items[i].free, items[i].until = false, new(until)
		}
		return nil
	})
	return err
}
