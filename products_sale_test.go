package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// ---- PATCH /api/products/{id}

const (
	saleChanged  = "판매 상태가 변경되었습니다"
	saleSold     = "결제된 주문의 작품은 판매 상태를 변경할 수 없습니다"
	saleStale    = "작품이 변경되는 중입니다. 잠시 후 다시 시도해 주세요"
	saleNotFound = "존재하지 않는 작품입니다"
)

// setSale makes the call as the administrator.
func (s *shop) setSale(painting string, forSale bool) answer {
	s.t.Helper()
	return s.call(adminID, "PATCH", "/api/products/"+painting, map[string]bool{"forSale": forSale})
}

// saleState is a painting as the database has it: for_sale and the status of the order that has it, "free" when none does.
func (s *shop) saleState(painting string) string {
	s.t.Helper()
	return queryText(s.t, s.config.databaseURL, `SELECT p.for_sale || ' ' || coalesce(o.status::text, 'free')
		FROM products p LEFT JOIN orders o ON o.id = p.order_id WHERE p.id = '`+painting+`'`)
}

// endOf is why an order ended; empty when it has not.
func (s *shop) endOf(order string) string {
	s.t.Helper()
	return queryText(s.t, s.config.databaseURL, `SELECT coalesce(ended, '') FROM orders WHERE id = '`+order+`'`)
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

func TestSetForSale(t *testing.T) {
	shared := newShop(t)
	type row struct {
		holder         string // the status of the order that has the painting
		before, wanted bool
		status         int
		message        string
		after          string
	}
	var rows []row
	for _, before := range []bool{true, false} {
		rows = append(rows,
			row{"free", before, true, 200, saleChanged, "true free"},
			row{"free", before, false, 200, saleChanged, "false free"},
			row{"-1", before, true, 200, saleChanged, "true -1"},
			row{"-1", before, false, 200, saleChanged, "false free"},
			row{"5", before, true, 200, saleChanged, "true free"}, // a cancelled order has none
			row{"5", before, false, 200, saleChanged, "false free"},
		)
		for _, paid := range []string{"0", "1", "2", "3", "4"} {
			for _, wanted := range []bool{true, false} {
				rows = append(rows, row{paid, before, wanted, 409, saleSold, fmt.Sprint(before, " ", paid)})
			}
		}
	}
	for _, row := range rows {
		t.Run(fmt.Sprintf("%s %v to %v", row.holder, row.before, row.wanted), func(t *testing.T) {
			s := rowOf(t, shared)
			painting, order := s.paintingIn(row.holder, row.before)
			for range 2 { // the same word again
				s.want(s.setSale(strings.ToUpper(painting), row.wanted), row.status, row.message)
				if state := s.saleState(painting); state != row.after {
					t.Fatalf("the painting is %q, want %q", state, row.after)
				}
			}
			if inStock := s.inStock(buyerB, painting); inStock != (row.after == "true free") {
				t.Errorf("in stock: %v", inStock)
			}
			if order == "" {
				return
			}
			wantEnd := ""
			if row.holder == "-1" && !row.wanted {
				wantEnd = "withdrawn"
			}
			if end := s.endOf(order); end != wantEnd {
				t.Errorf("the order ended %q, want %q", end, wantEnd)
			}
		})
	}
	shared.wantBalanced()
}

func TestSetForSaleRefusals(t *testing.T) {
	s := newShop(t)
	painting := s.painting(99000)
	good := `{"forSale":false}`
	for _, row := range []struct {
		user, id, body string
		status         int
		message        string
	}{
		{"", painting, good, 401, messageSignIn},
		{buyerA, painting, good, 403, messageAdmin},
		{adminID, newTestID(), good, 404, saleNotFound},
		{adminID, newTestID(), `{"forSale":true}`, 404, saleNotFound},
		{adminID, "no-id", good, 404, saleNotFound},
		{adminID, strings.Repeat("g", 24), good, 404, saleNotFound},
		{adminID, "cart-items", good, 404, saleNotFound},
		{adminID, "%00", good, 404, saleNotFound},
		{adminID, painting, `{}`, 400, "forSale: 값이 필요합니다"},
		{adminID, painting, `{"forSale":null}`, 400, "forSale: 값이 필요합니다"},
		{adminID, painting, `{"forSale":"false"}`, 400, "forSale: 형식이 올바르지 않습니다"},
		{adminID, painting, `{"forSale":0}`, 400, "forSale: 형식이 올바르지 않습니다"},
		{adminID, painting, `{"forSale":[]}`, 400, "forSale: 형식이 올바르지 않습니다"},
		{adminID, painting, `[]`, 400, "요청 본문은 JSON 객체여야 합니다"},
		{adminID, painting, `null`, 400, "요청 본문은 JSON 객체여야 합니다"},
		{adminID, painting, ``, 400, "요청 본문이 올바른 JSON이 아닙니다"},
	} {
		t.Run(fmt.Sprintf("%d %s %s", row.status, row.id, row.body), func(t *testing.T) {
			s := rowOf(t, s)
			s.want(s.call(row.user, "PATCH", "/api/products/"+row.id, row.body), row.status, row.message)
			if state := s.saleState(painting); state != "true free" {
				t.Errorf("the painting is %q", state)
			}
		})
	}
}

func TestWithdrawnOrder(t *testing.T) {
	s := newShop(t)
	first, withdrawn, last := s.painting(99000), s.painting(99000), s.painting(99000)
	order := s.order(buyerA, first, withdrawn, last)
	s.called = "withdrawn-by-the-shop"
	s.want(s.setSale(withdrawn, false), 200, saleChanged)
	s.called = ""

	for painting, want := range map[string]string{first: "true free", withdrawn: "false free", last: "true free"} {
		if state := s.saleState(painting); state != want {
			t.Errorf("painting %s is %q, want %q", painting, state, want)
		}
	}
	if s.inStock(buyerA, withdrawn) || s.inStock(buyerB, withdrawn) {
		t.Error("the withdrawn painting is in stock")
	}
	s.want(s.call(buyerA, "GET", "/api/orders/"+order, nil), 404, messageOrderUnknown)
	history := queryText(t, s.config.databaseURL, `SELECT concat_ws(' ', who, who_id, from_status, to_status, why, request_id)
		FROM history WHERE order_id = '`+order+`' ORDER BY id DESC LIMIT 1`)
	if want := "administrator " + adminID + " -1 -1 withdrawn withdrawn-by-the-shop"; history != want {
		t.Errorf("history: %q, want %q", history, want)
	}
	s.want(s.call(buyerA, "POST", "/api/orders", orderBody(newNumber(), withdrawn)), 409, "")
	s.order(buyerB, first, last)

	// Money that comes late goes back, and is found without a notice too.
	reported, unnoticed := s.charge(order, 109000+2*99000), s.charge(order, 109000+2*99000)
	s.want(s.report(reported), 409, "")
	s.wantMoney(reported, 109000+2*99000)
	s.later(s.config.hold)
	s.wantMoney(unnoticed, 109000+2*99000)
	if state := s.saleState(withdrawn); state != "false free" {
		t.Errorf("the withdrawn painting is %q", state)
	}
	s.wantBalanced()
}

// Once everything is for sale again, a withdrawn order is like one that expired.
func TestWithdrawnOrderIsRevived(t *testing.T) {
	s := newShop(t)
	painting := s.painting(99000)
	order := s.order(buyerA, painting)
	s.want(s.setSale(painting, false), 200, saleChanged)
	s.want(s.setSale(painting, true), 200, saleChanged)
	s.want(s.report(s.charge(order, 109000)), 200, "결제 성공")
	if state := s.saleState(painting); state != "true 0" {
		t.Errorf("the painting is %q", state)
	}
}

func TestSetForSaleIsLogged(t *testing.T) {
	s := newShop(t)
	free, sold := s.painting(99000), ""
	_, _, sold = s.paid(buyerA)
	s.called = "request-1"
	s.want(s.setSale(free, false), 200, saleChanged)
	s.want(s.setSale(sold, false), 409, saleSold)
	s.want(s.setSale(free, true), 200, saleChanged)
	var got []string
	for _, l := range s.lines("sale state changed") {
		got = append(got, fmt.Sprint(l["painting"], " ", l["for_sale"], " ", l["administrator"], " ", l["request"]))
	}
	want := []string{free + " false " + adminID + " request-1", free + " true " + adminID + " request-1"}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("logged %q, want %q", got, want)
	}
}

func TestWithdrawingAsksTheGatewayFirst(t *testing.T) {
	for _, row := range []struct {
		name    string
		amounts []int64 // of payments that nobody has told the service of
		status  int
		message string
		after   string
	}{
		{"no money", nil, 200, saleChanged, "false free"},
		{"its money", []int64{109000}, 409, saleSold, "true 0"},
		{"its money behind a wrong amount", []int64{109000, 5000}, 409, saleSold, "true 0"},
		{"a wrong amount", []int64{5000}, 200, saleChanged, "false free"},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := newShop(t)
			painting := s.painting(99000)
			order := s.order(buyerA, painting)
			for _, amount := range row.amounts {
				s.charge(order, amount)
				s.clock.advance(time.Second)
			}
			s.want(s.setSale(painting, false), row.status, row.message)
			if state := s.saleState(painting); state != row.after {
				t.Errorf("the painting is %q, want %q", state, row.after)
			}
			for _, p := range s.fake.all() {
				if kept := p.Amount == 109000; kept != (p.Cancelled == 0) {
					t.Errorf("%d of %d won went back", p.Cancelled, p.Amount)
				}
			}
		})
	}
}

func TestWithdrawingWhileTheGatewayIsInTrouble(t *testing.T) {
	broken := func(w http.ResponseWriter, _ *http.Request) bool { _, err := io.WriteString(w, "{"); return err == nil }
	for status, hook := range map[int]faultHook{502: broken, 503: answer500, 504: hangUntilGone} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			s := newShop(t)
			painting, free := s.painting(99000), s.painting(99000)
			order := s.order(buyerA, painting)
			s.settler.gateway.lookUpLimit = 200 * time.Millisecond // any answer here is right
			s.fake.setFaults(func(call, _ string) fault {
				if call == "token" {
					return fault{}
				}
				return fault{before: hook}
			})
			s.want(s.setSale(painting, false), status, messageGateway)
			s.wantUntouched(order, painting)
			if state := s.saleState(painting); state != "true -1" {
				t.Errorf("the painting is %q", state)
			}
			s.want(s.setSale(free, false), 200, saleChanged) // needs no gateway
			s.want(s.setSale(painting, true), 200, saleChanged)
		})
	}
}

func TestPaintingThatNeverStandsStill(t *testing.T) {
	s := newShop(t)
	free, held := s.painting(99000), s.painting(99000)
	order := s.order(buyerA, held)
	execSQL(t, s.config.databaseURL, `CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'`)
	for _, table := range []string{"products", "orders"} {
		execSQL(t, s.config.databaseURL, `CREATE TRIGGER lose BEFORE UPDATE ON `+table+` FOR EACH ROW EXECUTE FUNCTION lose()`)
	}
	s.want(s.setSale(free, false), 409, saleStale)
	s.want(s.setSale(free, true), 409, saleStale)
	s.want(s.setSale(held, true), 409, saleStale)
	s.want(s.setSale(held, false), 409, saleStale)
	if n := len(s.lines("sale state changed")); n != 0 {
		t.Errorf("%d lines about changes that were none", n)
	}
	s.wantUntouched(order, held)
}

// A painting changes hands at each point where taking it off sale can be overtaken. What is answered is true afterwards.
func TestWithdrawingIsOvertaken(t *testing.T) {
	type crossed struct {
		*shop
		painting, order string
	}
	buy := func(c crossed, user string) answer {
		return c.call(user, "POST", "/api/orders", orderBody(newNumber(), c.painting))
	}
	for _, row := range []struct {
		name     string
		overtake func(crossed)
		held     bool // an unpaid order holds the painting before
		after    []string
	}{
		{"its payment is reported", func(c crossed) { c.report(c.charge(c.order, 109000)) }, true, []string{"true 0", "false free"}},
		{"its buyer deletes it", func(c crossed) { c.call(buyerA, "DELETE", "/api/orders/"+c.order, nil) }, true, []string{"false free"}},
		{"its buyer orders anew", func(c crossed) { buy(c, buyerA) }, true, []string{"false free"}},
		{"its hold ends and another buyer orders", func(c crossed) { c.later(c.config.hold); buy(c, buyerB) }, true, []string{"false free"}},
		{"a buyer orders", func(c crossed) { buy(c, buyerA) }, false, []string{"false free"}},
		{"a buyer orders and pays", func(c crossed) {
			var made orderCreated
			if a := buy(c, buyerA); a.status == 201 {
				check(c.t, json.Unmarshal([]byte(a.body), &made))
				c.report(c.charge(made.OrderID, 109000))
			}
		}, false, []string{"true 0", "false free"}},
		{"another administrator takes it off sale", func(c crossed) { c.setSale(c.painting, false) }, true, []string{"false free"}},
		{"another administrator puts it on sale", func(c crossed) { c.setSale(c.painting, true) }, true, []string{"false free"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := newDirectShop(t)
			points := 0
			for stop := int32(1); ; stop++ {
				c := crossed{shop: s, painting: s.painting(99000)}
				if row.held {
					c.order = s.order(buyerA, c.painting)
				}
				var reached atomic.Int32
				s.settler.onTestHook = func(string, string) {
					if reached.Add(1) == stop {
						row.overtake(c) // the points that this passes are counted beyond stop
					}
				}
				a := s.setSale(c.painting, false)
				s.settler.onTestHook = nil
				state := s.saleState(c.painting)
				switch {
				case a.status == 200 && state == "false free":
				case a.status == 409 && a.message() == saleSold && state == "true 0":
				default:
					t.Fatalf("overtaken at point %d: answered %d %s, the painting is %q", stop, a.status, a.body, state)
				}
				if !strings.Contains(strings.Join(row.after, ","), state) {
					t.Fatalf("overtaken at point %d: the painting is %q, want one of %q", stop, state, row.after)
				}
				if reached.Load() < stop {
					break
				}
				points++
			}
			if want := map[bool]int{true: 2, false: 1}[row.held]; points < want {
				t.Errorf("%d points, want %d at least", points, want)
			}
			for _, p := range s.fake.all() {
				kept := queryText(t, s.config.databaseURL, `SELECT count(*) FROM orders WHERE status = 0 AND id = '`+p.MerchantUID+`'`)
				if (kept == "1") != (p.Cancelled == 0) {
					t.Errorf("%d of %d won went back, paid orders: %s", p.Cancelled, p.Amount, kept)
				}
			}
			s.wantBalanced()
		})
	}
}

func TestWithdrawingAmidManyBuyers(t *testing.T) {
	s := newShop(t)
	painting, other := s.painting(99000), s.painting(99000)
	s.order(newTestID(), painting, other)
	count := concurrently(60, func(i int) answer {
		if i%20 == 0 {
			a := s.setSale(painting, false)
			if a.status != 200 {
				t.Errorf("answered %d %s", a.status, a.body)
			}
			return answer{}
		}
		return s.call(newTestID(), "POST", "/api/orders", orderBody(newNumber(), painting, other))
	})
	if count[201] != 0 || count[409] != 57 || s.saleState(painting) != "false free" || s.saleState(other) != "true free" {
		t.Fatalf("answers by status: %v, the paintings are %q and %q", count, s.saleState(painting), s.saleState(other))
	}
	s.wantBalanced()
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
