package main

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// painting is a row of the catalogue, and which buyer has it.
type painting struct {
	id, artistID, artistName, title, image, size string
	canvas                                       int        // 호
	price                                        int64      // won
	forSale                                      bool       // false: sold elsewhere
	taken                                        bool       // an order holds or bought it
	holder                                       string     // the buyer whose unpaid order holds it; empty when bought or free
	heldUntil                                    *time.Time // when that hold ends
}

// inStock reports whether the user can order the painting. A painting that they hold themselves is in stock for them.
func (p painting) inStock(caller string) bool {
	return p.forSale && (!p.taken || (p.holder != "" && p.holder == caller))
}

// findPaintings returns the paintings of ids by id. Unknown ids are missing. The map is shared: it must not be changed.
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

// firstPaintingIDs returns the ids of at most so many paintings, in order of id.
func (s *store) firstPaintingIDs(ctx context.Context, most int) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `SELECT id FROM products ORDER BY id LIMIT $1`, most)
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// importResult is what an import changed.
type importResult struct {
	loaded  int      // paintings in the file
	added   int      // of those, paintings that are new
	onSale  int      // paintings of before that were put on sale
	offSale int      // paintings of before that were taken off sale
	ordered []string // ids of paintings whose sale state was left alone, against the file, because an order has them
}

// importPaintings loads or updates the catalogue by id, all or nothing. It never changes who has a painting, nor whether
// a painting is for sale while an order has it: cart-items says that a held painting is out of stock, and a catalogue made
// from its answer must not take that painting off sale for good.
func (s *store) importPaintings(ctx context.Context, paintings []painting) (result importResult, err error) {
	result.loaded = len(paintings)
	err = pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		columns := paintingColumns(paintings)
		// In id order, the order in which paintings are always locked. What is counted under these locks is what the next statement finds.
		if err := tx.QueryRow(ctx, `
			WITH existing AS MATERIALIZED (
				SELECT p.id, p.order_id IS NOT NULL AS ordered, p.for_sale, i.for_sale AS wanted
				FROM products p JOIN `+incomingPaintings+` ON i.id = p.id ORDER BY p.id FOR NO KEY UPDATE OF p)
			SELECT cardinality($1) - count(*), count(*) FILTER (WHERE wanted AND NOT for_sale AND NOT ordered),
				count(*) FILTER (WHERE NOT wanted AND for_sale AND NOT ordered),
				array_agg(id ORDER BY id) FILTER (WHERE wanted <> for_sale AND ordered)
			FROM existing`, columns...).Scan(&result.added, &result.onSale, &result.offSale, &result.ordered); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `
			INSERT INTO products (id, artist_id, artist_name, title, image, size, canvas, price, for_sale)
			SELECT id, artist_id, artist_name, title, image, size, canvas, price, for_sale FROM `+incomingPaintings+` ORDER BY id
			ON CONFLICT (id) DO UPDATE SET artist_id = excluded.artist_id, artist_name = excluded.artist_name,
				title = excluded.title, image = excluded.image, size = excluded.size, canvas = excluded.canvas,
				price = excluded.price,
				for_sale = CASE WHEN products.order_id IS NULL THEN excluded.for_sale ELSE products.for_sale END`, columns...)
		return err
	})
	return result, err
}

// incomingPaintings are the rows of paintingColumns. A temporary table would need a right that the service's role must not have:
// one that is named like a table of the schema is found instead of it, even by the triggers.
const incomingPaintings = `unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::integer[], $8::bigint[], $9::boolean[])
	AS i (id, artist_id, artist_name, title, image, size, canvas, price, for_sale)`

// paintingColumns returns the columns of incomingPaintings.
func paintingColumns(paintings []painting) []any {
	n := len(paintings)
	ids, artistIDs, artistNames, titles, images, sizes := make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n)
	canvases, prices, forSale := make([]int32, n), make([]int64, n), make([]bool, n)
	for i := range paintings {
		p := &paintings[i]
		ids[i], artistIDs[i], artistNames[i], titles[i], images[i], sizes[i] = p.id, p.artistID, p.artistName, p.title, p.image, p.size
		canvases[i], prices[i], forSale[i] = int32(p.canvas), p.price, p.forSale
	}
	return []any{ids, artistIDs, artistNames, titles, images, sizes, canvases, prices, forSale}
}

// ---- whether a painting is for sale

// paintingOrder is the order that has a painting; the zero value when none has it.
type paintingOrder struct {
	id   string
	paid bool
}

// findPaintingOrder returns the order that has painting id, and errNotFound when there is no such painting.
func (s *store) findPaintingOrder(ctx context.Context, id string) (o paintingOrder, err error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	err = s.pool.QueryRow(ctx, `SELECT coalesce(o.id, ''), coalesce(o.status >= 0, false)
		FROM products p LEFT JOIN orders o ON o.id = p.order_id WHERE p.id = $1`, id).Scan(&o.id, &o.paid)
	if errors.Is(err, pgx.ErrNoRows) {
		return o, errNotFound
	}
	return o, err
}

// setForSale puts painting id on sale or takes it off sale. It returns errStale when another order than orderID (empty: none)
// has the painting.
func (s *store) setForSale(ctx context.Context, id, orderID string, forSale bool) error {
	batch := &pgx.Batch{}
	batch.Queue(`SELECT ` + shortLockWait)
	batch.Queue(`UPDATE products SET for_sale = $3
		WHERE id = $1 AND order_id IS NOT DISTINCT FROM nullif($2, '') RETURNING id`, id, orderID, forSale).QueryRow(exactlyOne)
	return s.change(ctx, batch, id)
}

// withdrawPainting ends the unpaid order orderID, takes painting id, which is one of its paintings, off sale, and frees the
// others. It returns errStale when the order is not unpaid any more.
func (s *store) withdrawPainting(ctx context.Context, by actor, id, orderID string, now time.Time) error {
	batch := &pgx.Batch{}
	batch.Queue(lockBuyerOf, by.setting(), orderID)
	batch.Queue(`
		WITH o AS (
			UPDATE orders SET ended = 'withdrawn', updated_at = $3, next_look_at = NULL
			WHERE id = $2 AND status < 0 AND ended IS NULL AND (confirming_until > $3) IS NOT TRUE
			RETURNING id, product_ids
		), theirs AS (
			SELECT p.id FROM products p JOIN o ON p.id = ANY(o.product_ids) AND p.order_id = o.id ORDER BY p.id FOR NO KEY UPDATE OF p
		), freed AS (
			UPDATE products SET order_id = NULL, for_sale = for_sale AND products.id <> $1 FROM theirs WHERE products.id = theirs.id
		)
		SELECT id FROM o`, id, orderID, now).QueryRow(exactlyOne)
	return s.change(ctx, batch, id, orderID)
}
