package main

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// painting is a row of the catalogue and who has it.
type painting struct {
	id, artistID, artistName, title, image, size string
	canvas                                       int        // 호
	price                                        int64      // won
	forSale                                      bool       // false: sold elsewhere
	taken                                        bool       // an order holds or bought it
	holder                                       string     // the buyer whose unpaid order holds it; empty when bought or free
	heldUntil                                    *time.Time // when that hold ends
}

// inStock reports whether the painting is there for caller to buy; one that he holds himself is.
func (p painting) inStock(caller string) bool {
	return p.forSale && (!p.taken || (p.holder != "" && p.holder == caller))
}

// findPaintings are the paintings of ids that exist, by id.
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

// firstPaintingIDs are the ids of the first paintings of the catalogue, at most so many.
func (s *store) firstPaintingIDs(ctx context.Context, most int) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	rows, _ := s.pool.Query(ctx, `SELECT id FROM products ORDER BY id LIMIT $1`, most)
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// importPaintings loads or updates the catalogue by id, all or nothing. Who has a painting is not the catalogue's
// to say: an order keeps what it holds.
func (s *store) importPaintings(ctx context.Context, paintings []painting) error {
	return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `CREATE TEMPORARY TABLE incoming ON COMMIT DROP AS
			SELECT id, artist_id, artist_name, title, image, size, canvas, price, for_sale FROM products WITH NO DATA`); err != nil {
			return err
		}
		columns := []string{"id", "artist_id", "artist_name", "title", "image", "size", "canvas", "price", "for_sale"}
		if _, err := tx.CopyFrom(ctx, pgx.Identifier{"incoming"}, columns, pgx.CopyFromSlice(len(paintings), func(i int) ([]any, error) {
			p := &paintings[i]
			return []any{p.id, p.artistID, p.artistName, p.title, p.image, p.size, int32(p.canvas), p.price, p.forSale}, nil
		})); err != nil {
			return err
		}
		// In id order, as everybody locks paintings.
		_, err := tx.Exec(ctx, `
			INSERT INTO products (id, artist_id, artist_name, title, image, size, canvas, price, for_sale)
			SELECT id, artist_id, artist_name, title, image, size, canvas, price, for_sale FROM incoming ORDER BY id
			ON CONFLICT (id) DO UPDATE SET artist_id = excluded.artist_id, artist_name = excluded.artist_name,
				title = excluded.title, image = excluded.image, size = excluded.size, canvas = excluded.canvas,
				price = excluded.price, for_sale = excluded.for_sale`)
		return err
	})
}
