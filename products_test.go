package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// pagePaintings puts the paintings that the page prints into the catalogue.
func (s *shop) pagePaintings() {
	s.t.Helper()
	s.importPaintings([]painting{
		{id: "61a4debe4f5f6aa036bfec5f", artistID: "61a4debe4f5f6aa036bfec5d", artistName: "로키산맥", title: "파멸",
			image: "/images/owner/1.jpg", size: "163x131cm", canvas: 100, price: 469000, forSale: true},
		{id: "61a58ed5eebb463c14eca0f9", artistID: "61a4c82a2c1eaad2e0d0084c", artistName: "안영희", title: "날갯짓",
			image: "/images/bye/2.jpg", size: "146x112cm", canvas: 80, price: 310000, forSale: true},
		{id: "61a4c895f59ea1b7a727a658", artistID: "61a4c82a2c1eaad2e0d0084c", artistName: "안영희", title: "잠식",
			image: "/images/bye/1.jpg", size: "73x61cm", canvas: 20, price: 99000, forSale: true},
	}...)
}

const pageCartItems = `[{"info":{"size":"163x131cm","canvas":100},"_id":"61a4debe4f5f6aa036bfec5f",` +
	`"artist":{"_id":"61a4debe4f5f6aa036bfec5d","name":"로키산맥"},"title":"파멸","image":"/images/owner/1.jpg","price":469000,"inStock":true},` +
	`{"info":{"size":"146x112cm","canvas":80},"_id":"61a58ed5eebb463c14eca0f9",` +
	`"artist":{"_id":"61a4c82a2c1eaad2e0d0084c","name":"안영희"},"title":"날갯짓","image":"/images/bye/2.jpg","price":310000,"inStock":true}]`

func TestCartItemsQuery(t *testing.T) {
	const a, b, c, unknown = "61a4debe4f5f6aa036bfec5f", "61a58ed5eebb463c14eca0f9", "61a4c895f59ea1b7a727a658", "ffffffffffffffffffffffff"
	shared := newShop(t)
	shared.pagePaintings()
	for _, row := range []struct {
		name, query string
		status      int
		ids         string
	}{
		{"no query", "", 200, ""},
		{"other keys only", "?page=1&productIds=" + a, 200, ""},
		{"one", "?productId=" + a, 200, a},
		{"order asked", "?productId=" + c + "&productId=" + a + "&productId=" + b, 200, c + " " + a + " " + b},
		{"repeats once", "?productId=" + b + "&productId=" + a + "&productId=" + b, 200, b + " " + a},
		{"repeats in two cases", "?productId=" + b + "&productId=" + strings.ToUpper(b), 200, b},
		{"unknown left out", "?productId=" + unknown + "&productId=" + a, 200, a},
		{"only unknown", "?productId=" + unknown, 200, ""},
		{"upper case", "?productId=" + strings.ToUpper(a), 200, a},
		{"axios", "?productId[]=" + b + "&productId[]=" + a, 200, b + " " + a},
		{"axios encoded", "?productId%5B%5D=" + b + "&productId%5b%5d=" + a, 200, b + " " + a},
		{"qs", "?productId[0]=" + b + "&productId[1]=" + a, 200, b + " " + a},
		{"qs encoded", "?productId%5B0%5D=" + b + "&productId%5B1%5D=" + a, 200, b + " " + a},
		{"id encoded", "?productId=%36" + a[1:], 200, a},
		{"empty id", "?productId=", 400, ""},
		{"23 digits", "?productId=" + a[1:], 400, ""},
		{"25 digits", "?productId=" + a + "0", 400, ""},
		{"not hex", "?productId=" + "g" + a[1:], 400, ""},
		{"24 bytes of Korean", "?productId=" + strings.Repeat("%EA%B0%80", 8), 400, ""},
		{"malformed beside a good one", "?productId=" + a + "&productId=undefined", 400, ""},
		{"malformed in an array", "?productId[]=undefined", 400, ""},
		{"broken encoding", "?productId=%zz", 400, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := rowOf(t, shared)
			got := s.call("", "GET", "/api/products/cart-items"+row.query, nil)
			if row.status != 200 {
				s.wantNaming(got, row.status, "productId")
				return
			}
			s.want(got, 200, "")
			var items []cartItem
			check(t, json.Unmarshal([]byte(got.body), &items))
			var ids []string
			for _, item := range items {
				ids = append(ids, item.ID)
			}
			if strings.Join(ids, " ") != row.ids || (row.ids == "" && got.body != "[]") {
				t.Fatalf("answered %s\nwant %q", got.body, row.ids)
			}
		})
	}
	shared.wantBody(shared.call("", "GET", "/api/products/cart-items?productId[]="+a+"&productId[]="+b, nil), 200, pageCartItems)
}

func TestCartItemsStock(t *testing.T) {
	s := newShop(t)
	_, _, sold := s.paid(buyerA)
	held, free := s.painting(99000), s.painting(99000)
	s.order(buyerA, held)
	expired := s.issueToken(caller{id: buyerA}, s.clock.Now().Add(-4*time.Hour))
	for _, row := range []struct {
		name, authorization string
		sold, held, free    bool
	}{
		{"nobody", "", false, false, true},
		{"the holder", s.as(buyerA), false, true, true},
		{"the holder, scheme in lower case", "bearer " + s.token(buyerA, false), false, true, true},
		{"another buyer", s.as(buyerB), false, false, true},
		{"an administrator", s.as(adminID), false, false, true},
		{"an expired token is ignored", "Bearer " + expired, false, false, true},
		{"garbage is ignored", "Bearer garbage", false, false, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := rowOf(t, s)
			got := s.want(s.callWith(row.authorization, "GET", "/api/products/cart-items?productId="+sold+"&productId="+held+"&productId="+free, nil), 200, "")
			var items []cartItem
			check(t, json.Unmarshal([]byte(got.body), &items))
			if len(items) != 3 || items[0].InStock != row.sold || items[1].InStock != row.held || items[2].InStock != row.free {
				t.Fatalf("answered %s\nwant sold, held and free painting in stock: %v %v %v", got.body, row.sold, row.held, row.free)
			}
		})
	}
}

func TestTotalPrice(t *testing.T) {
	shared := newShop(t)
	_, _, sold := shared.paid(buyerA)
	a, b := shared.painting(310000), shared.painting(469000)
	for _, row := range []struct {
		name, query string
		status      int
		total       int
		message     string
	}{
		{"one", "productId=" + a, 200, 320000, ""},
		{"two", "productId=" + a + "&productId=" + b, 200, 789000, ""},
		{"axios", "productId[]=" + a + "&productId[]=" + b, 200, 789000, ""},
		{"axios encoded", "productId%5B%5D=" + a + "&productId%5B%5D=" + b, 200, 789000, ""},
		{"qs", "productId[0]=" + a + "&productId[1]=" + b, 200, 789000, ""},
		{"repeats count once", "productId=" + a + "&productId=" + strings.ToUpper(a), 200, 320000, ""},
		{"sold counts", "productId=" + a + "&productId=" + sold, 200, 419000, ""},
		{"none", "", 400, 0, "productId"},
		{"empty", "productId=", 400, 0, "productId"},
		{"malformed", "productId=" + a + "&productId=1", 400, 0, "productId"},
		{"unknown", "productId=" + a + "&productId=ffffffffffffffffffffffff", 404, 0, "productId"},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := rowOf(t, shared)
			got := s.call(buyerB, "GET", "/api/products/total-price?"+row.query, nil)
			if row.status != 200 {
				s.wantNaming(got, row.status, row.message)
				return
			}
			s.wantBody(got, 200, fmt.Sprintf(`{"_id":"결제 예정 총 금액","totalPrice":%d}`, row.total))
		})
	}
	dear := newShop(t, func(c *config) { c.shipping = 25000 })
	p := dear.painting(99000)
	dear.wantBody(dear.call(buyerA, "GET", "/api/products/total-price?productId="+p, nil), 200, `{"_id":"결제 예정 총 금액","totalPrice":124000}`)
}

func TestTooManyPaintingsAsked(t *testing.T) {
	s := newShop(t)
	query := url.Values{}
	for range maxQueryIDs + 1 {
		query.Add("productId", newTestID())
	}
	for _, call := range []string{"cart-items", "total-price"} {
		s.want(s.call(buyerA, "GET", "/api/products/"+call+"?"+query.Encode(), nil), 400, "productId: 상품은 한 번에 500개까지 조회할 수 있습니다")
	}
}

// catalogueEntry is an entry of a catalogue with one thing replaced.
func catalogueEntry(id, old, new string) string {
	return strings.Replace(`{"info":{"size":"73x61cm","canvas":20},"_id":"`+id+`","artist":{"_id":"61a4c82a2c1eaad2e0d0084c","name":"안영희"},`+
		`"title":"잠식","image":"/images/bye/1.jpg","price":99000,"inStock":true}`, old, new, 1)
}

func TestImport(t *testing.T) {
	url := newTestDatabase(t)
	first, second := newTestID(), newTestID()
	out, err := command(t, url, "["+catalogueEntry(first, "", "")+","+catalogueEntry(second, "true", "false")+"]", "import", "-")
	if err != nil || out != "2 paintings imported: 2 new, 0 put on sale, 0 taken off sale\n" { // before the first start
		t.Fatalf("%v, %s", err, out)
	}
	for _, row := range []struct{ old, new, problem string }{
		{"99000", "99000.5", "price"}, {"99000", "-1", "price"}, {"99000", `"99000"`, "price"}, {`"price":99000,`, "", "price"},
		{second, "xyz", "_id"}, {second, first, "_id"}, {"잠식", " ", "title"}, {"잠식", `\u0000`, "title"}, {"73x61cm", "", "info.size"},
		{`,"inStock":true`, "", "inStock"}, {"61a4c82a2c1eaad2e0d0084c", "", "artist._id"}, {"20}", "0}", "info.canvas"},
	} {
		_, err := command(t, url, "["+catalogueEntry(first, "잠식", "바뀐 제목")+","+catalogueEntry(second, row.old, row.new)+"]", "import", "-")
		if err == nil || !strings.Contains(err.Error(), "entry 2") || !strings.Contains(err.Error(), row.problem) {
			t.Errorf("%+v: %v", row, err)
		}
	}
	for _, text := range []string{"", "{}", "null", "[", "[1]"} {
		if _, err := command(t, url, text, "import", "-"); err == nil {
			t.Errorf("%q was imported", text)
		}
	}
	if title := queryText(t, url, `SELECT string_agg(DISTINCT title, ',') FROM products`); title != "잠식" {
		t.Errorf("half an import: %s", title)
	}
}

func TestImportKeepsHolds(t *testing.T) {
	s := newShop(t)
	painting := s.painting(99000)
	s.order(buyerA, painting)
	result, err := importCatalogue(t.Context(), s.store, strings.NewReader("["+catalogueEntry(painting, "잠식", "바뀐 제목")+"]"))
	if err != nil || result.loaded != 1 || s.inStock(buyerB, painting) {
		t.Fatalf("%d imported, %v, in stock %v", result.loaded, err, s.inStock(buyerB, painting))
	}
}

func TestImportManyPaintings(t *testing.T) {
	heavy(t)
	s := newShop(t)
	entries := make([]string, 100_000)
	for i := range entries {
		entries[i] = catalogueEntry(fmt.Sprintf("%024x", i+1), "", "")
	}
	result, err := importCatalogue(context.Background(), s.store, strings.NewReader("["+strings.Join(entries, ",")+"]"))
	if err != nil || result.loaded != len(entries) {
		t.Fatalf("%d imported, %v", result.loaded, err)
	}
}

func FuzzProductIDs(f *testing.F) {
	for _, seed := range []string{"", "productId=61a4debe4f5f6aa036bfec5f", "productId[]=61A4DEBE4F5F6AA036BFEC5F&productId%5B1%5D=61a4debe4f5f6aa036bfec5d",
		"productId=%zz", "productId=%00", "&&=&productId", "productId[=", "productId]=x", "productId=a;b", "product%49d=1"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, query string) {
		ids, err := productIDs(query)
		if err != nil {
			wantBadRequest(t, err)
			return
		}
		for i, id := range ids {
			if !validID(id) || slices.Contains(ids[:i], id) {
				t.Fatalf("%q gives %q", query, ids)
			}
		}
	})
}

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
	heavy(t)
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
	heavy(t)
	broken := func(w http.ResponseWriter, _ *http.Request) bool { _, err := io.WriteString(w, "{"); return err == nil }
	for status, hook := range map[int]faultHook{502: broken, 503: answer500, 504: hangUntilGone} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			s := newShop(t)
			painting, free := s.painting(99000), s.painting(99000)
			order := s.order(buyerA, painting)
			s.iamport().lookUpLimit = 200 * time.Millisecond // any answer here is right
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
	heavy(t)
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
			out, err := command(t, s.asService, "["+importEntry(painting, row.inFile)+"]", "import", "-")
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
	out, err := command(t, s.asService, "["+strings.Join(entries, ",")+"]", "import", "-")
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
	out, err := command(t, s.asService, strings.ReplaceAll(file, "99000", "120000"), "import", "-")
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
	heavy(t)
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
					printed, err = command(t, s.asService, "["+catalogueEntry(painting, "true", "false")+"]", "import", "-")
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
