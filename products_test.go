package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
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
