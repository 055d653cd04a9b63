package main

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// saleState is a painting as the database has it: for_sale and the status of the order that has it, "free" when none does.
func (s *shop) saleState(painting string) string {
	s.t.Helper()
	return queryText(s.t, s.config.databaseURL, `SELECT p.for_sale || ' ' || coalesce(o.status::text, 'free')
		FROM products p LEFT JOIN orders o ON o.id = p.order_id WHERE p.id = '`+painting+`'`)
}

// paintingIn is a painting whose order is in a status ("free": it has none), and that order.
func (s *shop) paintingIn(holder string, forSale bool) (painting, order string) {
	s.t.Helper()
	if holder == "free" {
		painting = s.painting(99000)
	} else {
		var status int
		fmt.Sscan(holder, &status)
		order, _, painting = s.orderIn(status)
	}
	execSQL(s.t, s.config.databaseURL, fmt.Sprintf(`UPDATE products SET for_sale = %v WHERE id = '%s'`, forSale, painting))
	return painting, order
}

// ---- import

// importEntry is an entry of a catalogue, of a painting at a new price.
func importEntry(id string, inStock bool) string {
	return strings.Replace(catalogueEntry(id, "99000", "120000"), "true", fmt.Sprint(inStock), 1)
}

func TestImportAndWhetherForSale(t *testing.T) {
	shared := newShop(t)
	for _, row := range []struct {
		holder         string // the status of the order that has the painting; "new": there is no such painting yet
		before, inFile bool
		after          string
		said           string // after the number of paintings
		named          bool
	}{
		{"new", false, true, "true free", "1 new, 0 put on sale, 0 taken off sale", false},
		{"new", false, false, "false free", "1 new, 0 put on sale, 0 taken off sale", false},
		{"free", true, true, "true free", "0 new, 0 put on sale, 0 taken off sale", false},
		{"free", true, false, "false free", "0 new, 0 put on sale, 1 taken off sale", false},
		{"free", false, true, "true free", "0 new, 1 put on sale, 0 taken off sale", false},
		{"free", false, false, "false free", "0 new, 0 put on sale, 0 taken off sale", false},
		{"5", true, false, "false free", "0 new, 0 put on sale, 1 taken off sale", false},
		{"5", false, true, "true free", "0 new, 1 put on sale, 0 taken off sale", false},
		{"-1", true, true, "true -1", "0 new, 0 put on sale, 0 taken off sale", false},
		{"-1", true, false, "true -1", "0 new, 0 put on sale, 0 taken off sale", true},
		{"-1", false, true, "false -1", "0 new, 0 put on sale, 0 taken off sale", true},
		{"0", true, true, "true 0", "0 new, 0 put on sale, 0 taken off sale", false},
		{"0", true, false, "true 0", "0 new, 0 put on sale, 0 taken off sale", true},
		{"4", false, true, "false 4", "0 new, 0 put on sale, 0 taken off sale", true},
		{"4", false, false, "false 4", "0 new, 0 put on sale, 0 taken off sale", false},
	} {
		t.Run(fmt.Sprintf("%s, %v, file %v", row.holder, row.before, row.inFile), func(t *testing.T) {
			s := rowOf(t, shared)
			painting := newTestID()
			if row.holder != "new" {
				painting, _ = s.paintingIn(row.holder, row.before)
			}
			out, err := command(t, s.config.databaseURL, "["+importEntry(painting, row.inFile)+"]", "import", "-")
			check(t, err)
			want := "1 paintings imported: " + row.said + "\n"
			if row.named {
				want += painting + ": an order has it, so whether it is for sale was not changed\n"
			}
			if out != want {
				t.Errorf("printed %q, want %q", out, want)
			}
			if state := s.saleState(painting); state != row.after {
				t.Errorf("the painting is %q, want %q", state, row.after)
			}
			if price := queryText(t, s.config.databaseURL, `SELECT price::text FROM products WHERE id = '`+painting+`'`); price != "120000" {
				t.Errorf("its price is %s", price)
			}
		})
	}
}

func TestImportCountsAndNamesAll(t *testing.T) {
	s := newShop(t)
	off, on, added := s.paintings(2, 99000), s.paintings(3, 99000), []string{newTestID()}
	s.catalogue(99000, false, on...)
	held := s.paintings(2, 99000)
	s.order(buyerA, held...)
	var entries []string
	for _, id := range append(append(held, off...), added...) {
		entries = append(entries, importEntry(id, false))
	}
	for _, id := range on {
		entries = append(entries, importEntry(id, true))
	}
	out, err := command(t, s.config.databaseURL, "["+strings.Join(entries, ",")+"]", "import", "-")
	const kept = ": an order has it, so whether it is for sale was not changed\n"
	want := "8 paintings imported: 1 new, 3 put on sale, 2 taken off sale\n" + held[0] + kept + held[1] + kept
	if err != nil || out != want {
		t.Errorf("%v, printed %q, want %q", err, out, want)
	}
}

// A catalogue that cart-items answered while a painting was held takes nothing off sale.
func TestImportOfWhatCartItemsAnswered(t *testing.T) {
	s := newShop(t)
	free, held := s.painting(99000), s.painting(99000)
	order := s.order(buyerA, held)
	file := s.want(s.call("", "GET", "/api/products/cart-items?productId="+free+"&productId="+held, nil), 200, "").body
	if !strings.Contains(file, `"inStock":false`) {
		t.Fatalf("nothing is held: %s", file)
	}
	out, err := command(t, s.config.databaseURL, strings.ReplaceAll(file, "99000", "120000"), "import", "-")
	check(t, err)
	if !strings.Contains(out, held) || strings.Contains(out, free) {
		t.Errorf("printed %q", out)
	}
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "")
	for _, painting := range []string{free, held} {
		if !s.inStock(buyerB, painting) {
			t.Errorf("%s is off sale", painting)
		}
		body := orderBody(newNumber(), painting)
		s.wantNaming(s.call(buyerB, "POST", "/api/orders", body), 400, "작품 가격은 120000원입니다")
	}
}

// An import and an order want the same painting at once: the one that asked first is the first to have it.
func TestImportRacesWithAnOrder(t *testing.T) {
	for _, row := range []struct {
		name        string
		importFirst bool
		ordered     int
		said, after string
	}{
		{"the import first", true, 409, "0 new, 0 put on sale, 1 taken off sale\n", "false free"},
		{"the order first", false, 201, "0 new, 0 put on sale, 0 taken off sale\n%s: an order has it, so whether it is for sale was not changed\n", "true -1"},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := newShop(t)
			painting := s.painting(99000)
			ctx := context.Background()
			conn, err := pgx.Connect(ctx, s.config.databaseURL)
			check(t, err)
			defer conn.Close(ctx)
			tx, err := conn.Begin(ctx)
			check(t, err)
			_, err = tx.Exec(ctx, `SELECT FROM products WHERE id = $1 FOR NO KEY UPDATE`, painting)
			check(t, err)

			var printed string
			var ordered answer
			calls := []func(){
				func() { ordered = s.call(buyerA, "POST", "/api/orders", orderBody(newNumber(), painting)) },
				func() {
					printed, err = command(t, s.config.databaseURL, "["+catalogueEntry(painting, "true", "false")+"]", "import", "-")
				},
			}
			if row.importFirst {
				calls[0], calls[1] = calls[1], calls[0]
			}
			done := make(chan struct{}, len(calls))
			for i, call := range calls {
				go func() {
					call()
					done <- struct{}{}
				}()
				waitUntil(t, "both wait for the painting", func() bool {
					return queryText(t, s.config.databaseURL, `SELECT count(*) FROM pg_stat_activity
						WHERE datname = current_database() AND wait_event_type = 'Lock'`) == fmt.Sprint(i+1)
				})
			}
			check(t, tx.Commit(ctx))
			<-done
			<-done
			check(t, err)
			s.want(ordered, row.ordered, "")
			said := row.said
			if strings.Contains(said, "%s") {
				said = fmt.Sprintf(said, painting)
			}
			if want := "1 paintings imported: " + said; printed != want {
				t.Errorf("printed %q, want %q", printed, want)
			}
			if state := s.saleState(painting); state != row.after {
				t.Errorf("the painting is %q, want %q", state, row.after)
			}
		})
	}
}
