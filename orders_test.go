package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

func TestWholeWay(t *testing.T) {
	s := newShop(t)
	order, impUID, painting := s.paid(buyerA)
	if s.statusOf(order) != 0 || s.inStock(buyerB, painting) {
		t.Fatal("not paid")
	}
	s.want(s.report(impUID), 200, "결제 성공")
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "해당 주문의 결제 취소가 완료되었습니다")
	if s.statusOf(order) != 5 || !s.inStock(buyerB, painting) {
		t.Fatal("not cancelled")
	}
}

// rowOf is the shop s with its failures going to a row's own t.
func rowOf(t *testing.T, s *shop) *shop {
	row := *s
	row.t = t
	return &row
}

// wantNaming is want for a refusal whose message has to contain text.
func (s *shop) wantNaming(a answer, status int, text string) {
	s.t.Helper()
	if a.status != status || a.message() == "" || !strings.Contains(a.message(), text) {
		s.t.Fatalf("answered %d %s\nwant %d with a message containing %q", a.status, a.body, status, text)
	}
}

// wantBody is want for the exact body.
func (s *shop) wantBody(a answer, status int, body string) {
	s.t.Helper()
	if a.status != status || a.body != body {
		s.t.Fatalf("answered %d %s\nwant     %d %s", a.status, a.body, status, body)
	}
}

// wantMoney fails unless the gateway has given back this much of a payment.
func (s *shop) wantMoney(impUID string, back int64) {
	s.t.Helper()
	if p, ok := s.fake.get(impUID); !ok || p.Cancelled != back {
		s.t.Fatalf("the gateway gave back %d of %d, want %d", p.Cancelled, p.Amount, back)
	}
}

// wantUntouched fails unless the order is unpaid still, its paintings held for its buyer and no money given back.
func (s *shop) wantUntouched(order, painting string) {
	s.t.Helper()
	if status := s.statusOf(order); status != statusUnpaid {
		s.t.Fatalf("the order has status %d", status)
	}
	if !s.inStock(buyerA, painting) || s.inStock(buyerB, painting) {
		s.t.Fatal("the painting is not held for its buyer any more")
	}
	if n := s.fake.calls("cancel"); n != 0 {
		s.t.Fatalf("%d refunds were asked for", n)
	}
}

// pagePaintings puts the paintings that the page prints into the catalogue.
func (s *shop) pagePaintings() {
	s.t.Helper()
	check(s.t, s.store.importPaintings(s.t.Context(), []painting{
		{id: "61a4debe4f5f6aa036bfec5f", artistID: "61a4debe4f5f6aa036bfec5d", artistName: "로키산맥", title: "파멸",
			image: "/images/owner/1.jpg", size: "163x131cm", canvas: 100, price: 469000, forSale: true},
		{id: "61a58ed5eebb463c14eca0f9", artistID: "61a4c82a2c1eaad2e0d0084c", artistName: "안영희", title: "날갯짓",
			image: "/images/bye/2.jpg", size: "146x112cm", canvas: 80, price: 310000, forSale: true},
		{id: "61a4c895f59ea1b7a727a658", artistID: "61a4c82a2c1eaad2e0d0084c", artistName: "안영희", title: "잠식",
			image: "/images/bye/1.jpg", size: "73x61cm", canvas: 20, price: 99000, forSale: true},
	}))
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
	expired, err := s.tokens.issue(caller{id: buyerA}, s.clock.Now().Add(-4*time.Hour), 3*time.Hour)
	check(t, err)
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

// absent, put into a body, leaves the field out.
var absent = new(struct{})

// put sets the field at path (deliveryInfo.address, orderItems[0].price) of a body.
func put(body map[string]any, path string, value any) {
	keys := strings.Split(strings.NewReplacer("[", ".", "]", "").Replace(path), ".")
	var at any = body
	for i, key := range keys {
		last := i == len(keys)-1
		switch object := at.(type) {
		case map[string]any:
			switch {
			case last && value == absent:
				delete(object, key)
			case last:
				object[key] = value
			}
			at = object[key]
		case []any:
			n, err := strconv.Atoi(key)
			if err != nil {
				panic(err)
			}
			if last {
				object[n] = value
			}
			at = object[n]
		default:
			panic("no such field: " + path)
		}
	}
}

const noItems = "주문할 상품 목록이 없습니다"

func TestCreateOrderFields(t *testing.T) {
	type row struct {
		path    string
		value   any
		message string // it has to contain this: the field, unless told
	}
	raw := func(text string) json.RawMessage { return json.RawMessage(text) }
	rows := []row{
		{"orderItems", absent, noItems}, {"orderItems", nil, noItems}, {"orderItems", []any{}, noItems},
		{"orderItems", "a", ""}, {"orderItems", map[string]any{}, ""}, {"orderItems", 1, ""}, {"orderItems", slices.Repeat([]any{1}, 5000), ""},
		{"orderItems[0]", nil, ""}, {"orderItems[0]", "a", ""}, {"orderItems[0]", []any{}, ""},
		{"orderItems[0].price", absent, ""}, {"orderItems[0].product", absent, ""}, {"orderItems[0].product", "", ""},
		{"orderItems[0].product", "undefined", ""}, {"orderItems[0].product", 1, ""}, {"orderItems[0].product", nil, ""},
		{"orderItems[0].price", 98999, ""}, {"orderItems[0].price", 0, ""}, {"orderItems[0].price", -99000, ""},
		{"shippingPrice", 0, ""}, {"shippingPrice", 9999, ""}, {"shippingPrice", -10000, ""},
		{"totalPrice", 0, ""}, {"totalPrice", 99000, ""}, {"totalPrice", 109001, ""}, {"totalPrice", -109000, ""},
		{"ordererInfo.email", "buyer.example.com", ""}, {"deliveryDetails", "a", ""}, {"deliveryDetails", []any{}, ""},
	}
	for _, price := range []string{"orderItems[0].price", "shippingPrice", "totalPrice"} {
		for _, value := range []any{nil, "99000", true, []any{}, map[string]any{}, raw("1e400"), raw("-1e400"), raw("10000.5"),
			raw("0.1"), raw("9223372036854775808"), raw("1e-400")} {
			rows = append(rows, row{price, value, ""})
		}
		rows = append(rows, row{price, absent, ""})
	}
	for _, object := range []string{"result", "deliveryInfo", "ordererInfo"} {
		for _, value := range []any{absent, nil, "a", 1, true, []any{}, map[string]any{}, raw("1e400")} {
			rows = append(rows, row{object, value, ""})
		}
	}
	required := []string{"result.id", "deliveryInfo.address", "deliveryInfo.detailedAddress", "deliveryInfo.receiver", "deliveryInfo.contactNum",
		"ordererInfo.name", "ordererInfo.phoneNum", "ordererInfo.email", "ordererInfo.refundTerms"}
	for _, text := range required {
		for _, value := range []any{absent, nil, "", " \t\n\u3000\u00a0"} {
			rows = append(rows, row{text, value, ""})
		}
	}
	for _, text := range append(required, "deliveryDetails.receiveAt", "deliveryDetails.requestedTerms") {
		for _, value := range []any{1, true, []any{}, map[string]any{}, raw("1e400"), strings.Repeat("가", 500) + "@",
			"a@\x00", raw(`"a@\ud800"`), raw(`"a@\udc00\ud800"`)} {
			rows = append(rows, row{text, value, ""})
		}
	}
	for _, text := range []string{"image", "title", "artist", "size"} {
		rows = append(rows, row{"orderItems[0]." + text, 1, ""}, row{"orderItems[0]." + text, map[string]any{}, ""})
	}

	shared := newShop(t)
	painting := shared.painting(99000)
	for _, row := range rows {
		if row.message == "" {
			row.message = row.path + ": "
			if object, ok := row.value.(map[string]any); ok && len(object) == 0 && slices.Contains([]string{"result", "deliveryInfo", "ordererInfo"}, row.path) {
				row.message = row.path + "." // an empty object lacks its fields
			}
		}
		text := fmt.Sprintf("%s", row.value)
		if row.value == absent {
			text = "absent"
		}
		t.Run(fmt.Sprintf("%s=%.20q", row.path, text), func(t *testing.T) {
			s := rowOf(t, shared)
			body := orderBody(newNumber(), painting)
			put(body, row.path, row.value)
			s.wantNaming(s.call(buyerA, "POST", "/api/orders", body), 400, row.message)
		})
	}
	if !shared.inStock("", painting) {
		t.Fatal("a refused order holds the painting")
	}
	shared.want(shared.call(buyerA, "GET", "/api/orders/latest", nil), 404, "최근 주문 내역이 없습니다")
	shared.order(buyerA, painting) // what was refused was the field alone
}

func TestCreateOrderBodies(t *testing.T) {
	shared := newShop(t)
	painting := shared.painting(99000)
	good, err := json.Marshal(orderBody(newNumber(), painting))
	check(t, err)
	many := make([]string, 51)
	for i := range many {
		many[i] = shared.painting(99000)
	}
	for _, row := range []struct {
		name    string
		body    any
		status  int
		message string
	}{
		{"none", nil, 400, ""},
		{"not JSON", "order", 400, ""},
		{"cut off", string(good[:len(good)-1]), 400, ""},
		{"two", string(good) + string(good), 400, ""},
		{"null", "null", 400, ""},
		{"array", "[]", 400, ""},
		{"string", `"a"`, 400, ""},
		{"deep", strings.Repeat("[", 100000), 400, ""},
		{"broken UTF-8", strings.Replace(string(good), "홍길동", "홍\xff동", 1), 400, "UTF-8"},
		{"surrogate in UTF-8", strings.Replace(string(good), "홍길동", "홍\xed\xa0\x80동", 1), 400, "UTF-8"},
		{"over 1 MB", string(good) + strings.Repeat(" ", maxBody), 413, ""},
		{"51 paintings", orderBody(newNumber(), many...), 400, "orderItems"},
		{"a painting twice", orderBody(newNumber(), painting, painting), 400, "orderItems[1].product"},
		{"a painting twice in two cases", orderBody(newNumber(), painting, strings.ToUpper(painting)), 400, "orderItems[1].product"},
		{"unknown painting", orderBody(newNumber(), painting, "ffffffffffffffffffffffff"), 404, "orderItems[1].product"},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := rowOf(t, shared)
			s.wantNaming(s.call(buyerA, "POST", "/api/orders", row.body), row.status, row.message)
			if !s.inStock("", painting) {
				t.Fatal("the painting is held")
			}
		})
	}
	shared.want(shared.call(buyerA, "POST", "/api/orders", string(good)+strings.Repeat(" ", maxBody-len(good))), 201, "주문서 생성 성공")
	shared.order(buyerB, many[:50]...)
}

// TestCreateOrderAccepts has each row change one thing that is allowed, and looks at what the order says then.
func TestCreateOrderAccepts(t *testing.T) {
	shared := newShop(t)
	long := strings.Repeat("가", 500)
	const details = `"deliveryDetails":{"receiveAt":"문 앞","requestedTerms":"문자 주세요"},`
	for _, row := range []struct {
		name, path string
		value      any
		has, hasNo string
	}{
		{"as it is", "unknown", "x", details, "unknown"},
		{"trims", "deliveryInfo.address", " \t어느로 1\u3000\n", `"address":"어느로 1",`, ""},
		{"trims the number", "result.id", " 20260302999999 ", `"id":"20260302999999",`, ""},
		{"trims before it counts", "deliveryInfo.receiver", "  " + long + "  ", `"receiver":"` + long + `",`, ""},
		{"HTML is text", "deliveryDetails.receiveAt", `<b>&"\`, `"receiveAt":"<b>&\"\\"`, ""},
		{"emoji", "deliveryInfo.receiver", json.RawMessage(`"\ud83d\ude00"`), `"receiver":"😀"`, ""},
		{"no deliveryDetails", "deliveryDetails", absent, "", "deliveryDetails"},
		{"null deliveryDetails", "deliveryDetails", nil, "", "deliveryDetails"},
		{"empty deliveryDetails", "deliveryDetails", map[string]any{}, "", "deliveryDetails"},
		{"one of deliveryDetails", "deliveryDetails.requestedTerms", absent, `"deliveryDetails":{"receiveAt":"문 앞"},`, "requestedTerms"},
		{"upper-case product", "orderItems[0].product", strings.ToUpper(shared.painting(99000)), `"title":"잠식"`, "61A4DEBE"},
		{"a false title", "orderItems[0].title", "모나리자", `"title":"잠식"`, "모나리자"},
		{"a false artist", "orderItems[0].artist", "모나리자", `"artist":"안영희"`, "모나리자"},
		{"a false size", "orderItems[0].size", "1x1cm", `"size":"73x61cm(20호)"`, "1x1cm"},
		{"a false image", "orderItems[0].image", "/x.jpg", `"image":"/images/bye/1.jpg"`, "/x.jpg"},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := rowOf(t, shared)
			body := orderBody(newNumber(), s.painting(99000))
			put(body, row.path, row.value)
			var made orderCreated
			got := s.want(s.call(buyerA, "POST", "/api/orders", body), 201, "")
			check(t, json.Unmarshal([]byte(got.body), &made))
			s.wantBody(got, 201, `{"message":"주문서 생성 성공","orderId":"`+made.OrderID+`"}`)
			if !validID(made.OrderID) {
				t.Fatalf("orderId %q is no ObjectId in lower case", made.OrderID)
			}
			seen := s.want(s.call(buyerA, "GET", "/api/orders/"+made.OrderID, nil), 200, "").body
			if !strings.Contains(seen, row.has) || (row.hasNo != "" && strings.Contains(seen, row.hasNo)) {
				t.Fatalf("the order is %s\nwant %q in it, and not %q", seen, row.has, row.hasNo)
			}
		})
	}
}

func TestCreateOrderTaken(t *testing.T) {
	s := newShop(t)
	_, _, sold := s.paid(buyerA)
	held, free := s.painting(99000), s.painting(99000)
	s.order(buyerA, held)
	until := s.clock.Now().Add(30 * time.Minute).Format(timeFormat)
	const text = `{"message":"이미 판매되었거나 다른 구매자가 결제 중인 작품이 있습니다","products":[`
	heldJSON := `{"_id":"` + held + `","title":"잠식","reason":"held","until":"` + until + `"}`
	soldJSON := `{"_id":"` + sold + `","title":"잠식","reason":"sold"}`
	for _, row := range []struct {
		name, buyer string
		paintings   []string
		products    string
	}{
		{"held", buyerB, []string{free, held}, heldJSON},
		{"sold", buyerB, []string{sold, free}, soldJSON},
		{"both", buyerB, []string{sold, held, free}, soldJSON + "," + heldJSON},
		{"sold to himself", buyerA, []string{sold, held}, soldJSON},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := rowOf(t, s)
			s.wantBody(s.call(row.buyer, "POST", "/api/orders", orderBody(newNumber(), row.paintings...)), 409, text+row.products+"]}")
			if !s.inStock("", free) || !s.inStock(buyerA, held) || s.inStock(buyerB, held) {
				t.Fatal("a refused order changed what is held")
			}
		})
	}
}

func TestOrderNumberAndReplacement(t *testing.T) {
	s := newShop(t)
	a, b, c := s.painting(99000), s.painting(99000), s.painting(99000)
	number := newNumber()
	create := func(user, number string, paintings ...string) answer {
		t.Helper()
		return s.call(user, "POST", "/api/orders", orderBody(number, paintings...))
	}
	first := s.want(create(buyerA, number, a, b), 201, "")
	s.wantBody(create(buyerA, number, a, b), 201, first.body)
	s.wantBody(create(buyerA, number, b, a), 201, first.body)
	s.wantNaming(create(buyerA, number, a), 409, "result.id")
	s.wantNaming(create(buyerA, number, a, b, c), 409, "result.id")
	s.wantNaming(create(buyerA, number, c), 409, "result.id")
	if !s.inStock("", c) || s.inStock("", a) || s.inStock("", b) {
		t.Fatal("the number sent again changed what is held")
	}
	other := s.want(create(buyerB, number, c), 201, "") // unique for one buyer only
	if other.body == first.body {
		t.Fatal("two buyers have one order")
	}
	var made orderCreated
	check(t, json.Unmarshal([]byte(first.body), &made))

	// A refused order leaves the unpaid one alone; one that is made replaces it.
	s.want(create(buyerA, newNumber(), a, c), 409, "")
	s.wantUntouched(made.OrderID, b)
	replacement := s.order(buyerA, b)
	s.want(s.call(buyerA, "GET", "/api/orders/"+made.OrderID, nil), 404, messageOrderUnknown)
	if !s.inStock(buyerB, a) || s.inStock(buyerB, b) || !s.inStock(buyerA, b) {
		t.Fatal("the new order did not free and keep what it should")
	}
	impUID := s.charge(replacement, 109000)
	s.want(s.report(impUID), 200, "결제 성공")
	s.order(buyerA, a) // a paid order is not replaced
	if status := s.statusOf(replacement); status != statusPaid {
		t.Fatalf("a new order changed a paid one to %d", status)
	}
}

func TestPayRefusals(t *testing.T) {
	const forged = "금액 불일치, 위조된 결제 시도"
	for _, row := range []struct {
		name    string
		payment fakePayment // for the order unless MerchantUID is set
		sandbox bool
		status  int
		message string
		back    int64
	}{
		{"too little", fakePayment{Amount: 108999}, false, 400, forged, 108999},
		{"one won", fakePayment{Amount: 1}, false, 400, forged, 1},
		{"too much", fakePayment{Amount: 109001}, false, 400, forged, 109001},
		{"dollars", fakePayment{Amount: 109000, Currency: "USD"}, false, 400, forged, 109000},
		{"dollars, partly back", fakePayment{Amount: 80, Currency: "USD", Status: "cancelled", Cancelled: 1}, false, 400, forged, 80},
		{"won, partly back", fakePayment{Amount: 109000, Status: "cancelled", Cancelled: 1}, false, 400, forged, 109000},
		{"ready", fakePayment{Amount: 109000, Status: "ready"}, false, 400, "", 0},
		{"failed", fakePayment{Amount: 109000, Status: "failed"}, false, 400, "", 0},
		{"failed, other amount", fakePayment{Amount: 1, Status: "failed"}, false, 400, "", 0},
		{"cancelled", fakePayment{Amount: 109000, Status: "cancelled", Cancelled: 109000}, false, 400, "", 109000},
		{"another shop's", fakePayment{Amount: 109000, MerchantUID: "other-shop-1"}, false, 404, "", 0},
		{"an order that never was", fakePayment{Amount: 109000, MerchantUID: "ffffffffffffffffffffffff"}, false, 404, "", 0},
		{"sandbox", fakePayment{Amount: 109000, Sandbox: true}, false, 404, "", 0},
		{"sandbox configured, forged", fakePayment{Amount: 1, Sandbox: true}, true, 400, forged, 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := newShop(t, func(c *config) { c.sandbox = row.sandbox })
			painting := s.painting(99000)
			order := s.order(buyerA, painting)
			if row.payment.MerchantUID == "" {
				row.payment.MerchantUID = order
			}
			impUID := s.fake.pay(row.payment)
			for range 2 { // told again it says the same, and moves no more money
				s.want(s.report(impUID), row.status, row.message)
				s.wantMoney(impUID, row.back)
			}
			if status := s.statusOf(order); status != statusUnpaid || s.inStock(buyerB, painting) {
				t.Fatalf("the order has status %d, or holds nothing", status)
			}
			if refunds := s.fake.calls("cancel"); refunds > 1 || (row.message == "" && refunds != 0) {
				t.Fatalf("%d refunds were asked for", refunds)
			}
			s.want(s.report(s.charge(order, 109000)), 200, "결제 성공") // the order can still be paid
			if s.statusOf(order) != statusPaid {
				t.Fatal("not paid")
			}
		})
	}
}

func TestPay(t *testing.T) {
	s := newShop(t, func(c *config) { c.sandbox = true })
	expired, err := s.tokens.issue(caller{id: buyerB}, s.clock.Now().Add(-4*time.Hour), 3*time.Hour)
	check(t, err)
	for _, row := range []struct {
		name, authorization string
		sandbox             bool
	}{
		{"nobody", "", false},
		{"the buyer", s.as(buyerA), false},
		{"somebody else", s.as(buyerB), false},
		{"garbage", "Bearer garbage", false},
		{"expired", "Bearer " + expired, false},
		{"a sandbox payment where configured", "", true},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := rowOf(t, s)
			painting := s.painting(99000)
			order := s.order(buyerA, painting)
			impUID := s.fake.pay(fakePayment{MerchantUID: order, Amount: 109000, Sandbox: row.sandbox})
			for range 2 {
				s.wantBody(s.callWith(row.authorization, "PATCH", "/api/orders/pay", map[string]string{"imp_uid": impUID}), 200, `{"message":"결제 성공"}`)
			}
			s.wantMoney(impUID, 0)
			if s.statusOf(order) != statusPaid || s.inStock(buyerA, painting) {
				t.Fatal("not paid")
			}
			second := s.charge(order, 109000) // an order is paid once
			s.want(s.report(second), 409, "")
			s.wantMoney(second, 109000)
			s.wantMoney(impUID, 0)
		})
	}
}

func TestPayBodies(t *testing.T) {
	shared := newShop(t)
	for _, row := range []struct {
		name, body string
		status     int
		message    string
	}{
		{"none", "", 400, ""}, {"null", "null", 400, ""}, {"array", "[]", 400, ""}, {"not JSON", "imp_uid=imp_1", 400, ""},
		{"missing", `{}`, 400, "imp_uid"}, {"null imp_uid", `{"imp_uid":null}`, 400, "imp_uid"},
		{"empty", `{"imp_uid":""}`, 400, "imp_uid"}, {"number", `{"imp_uid":1}`, 400, "imp_uid"},
		{"object", `{"imp_uid":{}}`, 400, "imp_uid"}, {"list", `{"imp_uid":["imp_1"]}`, 400, "imp_uid"},
		{"a path", `{"imp_uid":"../users/getToken"}`, 400, "imp_uid"}, {"a query", `{"imp_uid":"imp_1?a=b"}`, 400, "imp_uid"},
		{"NUL", `{"imp_uid":"imp_\u0000"}`, 400, "imp_uid"}, {"too long", `{"imp_uid":"` + strings.Repeat("1", 500) + `"}`, 400, "imp_uid"},
		{"broken UTF-8", "{\"imp_uid\":\"\xff\"}", 400, "UTF-8"},
		{"over 1 MB", `{"imp_uid":"imp_1"}` + strings.Repeat(" ", maxBody), 413, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := rowOf(t, shared)
			s.wantNaming(s.call("", "PATCH", "/api/orders/pay", row.body), row.status, row.message)
			if n := s.fake.calls("payment"); n != 0 {
				t.Fatalf("the gateway was asked %d times", n)
			}
		})
	}
	shared.wantNaming(shared.report("imp_999999999999"), 404, "imp_uid")
}

func TestPayGatewayFaults(t *testing.T) {
	for _, row := range []struct {
		name, call string
		hook       faultHook
		statuses   []int
	}{
		{"500", "payment", answer500, []int{502, 503, 504}},
		{"dropped", "payment", dropConnection, []int{502, 503, 504}},
		{"hung", "payment", hangUntilGone, []int{502, 503, 504}},
		{"no token: 500", "token", answer500, []int{502, 503, 504}},
		{"no token: dropped", "token", dropConnection, []int{502, 503, 504}},
		{"no token: hung", "token", hangUntilGone, []int{502, 503, 504}},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := newShop(t)
			painting := s.painting(99000)
			order := s.order(buyerA, painting)
			impUID := s.charge(order, 109000)
			limit := s.settler.gateway.lookUpLimit
			s.settler.gateway.lookUpLimit = 200 * time.Millisecond // any answer of these rows is right, however early it comes
			s.fake.setFaults(func(call, _ string) fault {
				if call == row.call {
					return fault{before: row.hook}
				}
				return fault{}
			})
			got := s.report(impUID)
			if !slices.Contains(row.statuses, got.status) || got.message() == "" {
				t.Fatalf("answered %d %s\nwant one of %d and a message", got.status, got.body, row.statuses)
			}
			if s.fake.calls(row.call) == 0 {
				t.Fatal("the fault did not happen")
			}
			s.wantUntouched(order, painting)
			s.fake.setFaults(nil)
			s.settler.gateway.lookUpLimit = limit
			s.want(s.report(impUID), 200, "결제 성공")
		})
	}
}

// orderIn is an order of buyerA's in any status; impUID is empty when it is unpaid.
func (s *shop) orderIn(status int) (order, impUID, painting string) {
	s.t.Helper()
	switch status {
	case statusUnpaid:
		painting = s.painting(99000)
		return s.order(buyerA, painting), "", painting
	case statusCancelled:
		order, impUID, painting = s.paid(buyerA)
		s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "")
		return order, impUID, painting
	default:
		return s.orderAt(status)
	}
}

func TestDeleteTable(t *testing.T) {
	const (
		deleted   = "결제 오류로 임시 주문서를 삭제했습니다"
		cancelled = "해당 주문의 결제 취소가 완료되었습니다"
		returned  = "해당 주문의 반품 요청이 완료되었습니다"
		unknown   = "진행 단계를 알 수 없습니다"
		gone      = -2 // the status of an order that is deleted
	)
	type row struct {
		from    int
		caller  string
		body    any
		status  int
		message string
		to      int
	}
	none := []any{nil, "", " \n", "{}", `{"reason":"x"}`}
	var rows []row
	add := func(from int, caller string, bodies []any, status int, message string, to int) {
		for _, body := range bodies {
			rows = append(rows, row{from, caller, body, status, message, to})
		}
	}
	five, four := []any{`{"status":5}`}, []any{`{"status":4}`}
	fiveOrNone := append(five, none...)

	add(statusUnpaid, buyerA, none, 200, deleted, gone)
	for _, n := range []int{-1, 0, 1, 4, 5, 6} {
		add(statusUnpaid, buyerA, []any{fmt.Sprintf(`{"status":%d}`, n)}, 200, deleted, gone)
	}
	add(statusUnpaid, adminID, five, 200, deleted, gone)
	add(statusPaid, buyerA, fiveOrNone, 200, cancelled, statusCancelled)
	add(statusPaid, adminID, five, 200, cancelled, statusCancelled)
	for from := statusPaid; from <= statusDelivered; from++ {
		add(from, buyerA, four, 200, returned, statusReturning)
	}
	for from := statusPreparing; from <= statusDelivered; from++ {
		add(from, buyerA, fiveOrNone, 409, "반품", from)
	}
	add(statusReturning, adminID, fiveOrNone, 200, cancelled, statusCancelled)
	add(statusReturning, buyerA, fiveOrNone, 409, "", statusReturning)
	add(statusReturning, buyerA, four, 409, "이미", statusReturning)
	add(statusCancelled, buyerA, append(fiveOrNone, four...), 409, "이미", statusCancelled)
	for from := statusPaid; from <= statusCancelled; from++ {
		for _, n := range []int{-2, -1, 0, 1, 3, 6} {
			add(from, buyerA, []any{fmt.Sprintf(`{"status":%d}`, n)}, 400, unknown, from)
		}
	}
	for _, from := range []int{statusUnpaid, statusPaid, statusReturning} {
		for _, value := range []string{`"5"`, "5.5", "true", "null", "[]", "[5]", "{}", "1e400", `""`} {
			add(from, buyerA, []any{`{"status":` + value + `}`}, 400, "status", from)
		}
		add(from, buyerA, []any{"{", "[]", "5", `{"status":5`, "status=5", "{\"status\":\"\xff\"}"}, 400, "", from)
		add(from, buyerA, []any{"{}" + strings.Repeat(" ", maxBody)}, 413, "", from)
		add(from, buyerB, append(fiveOrNone, four...), 404, messageNoSuchOrder, from)
	}

	shared := newShop(t)
	for _, row := range rows {
		t.Run(fmt.Sprintf("%d,%s,%.20v", row.from, row.caller[20:], row.body), func(t *testing.T) {
			s := rowOf(t, shared)
			order, impUID, painting := s.orderIn(row.from)
			got := s.call(row.caller, "DELETE", "/api/orders/"+order, row.body)
			s.wantNaming(got, row.status, row.message)
			if row.status == 200 {
				s.wantBody(got, 200, `{"message":"`+row.message+`"}`)
			}
			if row.to == gone {
				s.want(s.call(buyerA, "GET", "/api/orders/"+order, nil), 404, messageOrderUnknown)
				s.want(s.call(adminID, "GET", "/api/orders/"+order, nil), 404, messageOrderUnknown)
				s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, row.body), 404, messageNoSuchOrder)
			} else if status := s.statusOf(order); status != row.to {
				t.Fatalf("the order has status %d, want %d", status, row.to)
			}
			if free := s.inStock(buyerB, painting); free != (row.to == gone || row.to == statusCancelled) {
				t.Fatalf("the painting is free: %v", free)
			}
			if impUID != "" && row.to == statusCancelled {
				s.wantMoney(impUID, 109000)
			} else if impUID != "" {
				s.wantMoney(impUID, 0)
			}
		})
	}

	s := shared
	for _, id := range []string{"ffffffffffffffffffffffff", "1", "latest", strings.Repeat("g", 24)} {
		for _, body := range append(fiveOrNone, four...) {
			s.want(s.call(buyerA, "DELETE", "/api/orders/"+id, body), 404, messageNoSuchOrder)
		}
	}
	order, impUID, _ := s.paid(buyerA)
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+strings.ToUpper(order), nil), 200, cancelled)
	s.wantMoney(impUID, 109000)
}

func TestShowOrder(t *testing.T) {
	s := newShop(t)
	s.pagePaintings()
	const buyer = "61a4e52b4f5f6aa036bfec61"
	const delivery = `"deliveryInfo":{"address":"[12990] 경기 하남시 감북로 18 (감일동)","detailedAddress":"강남으로 가자 8282","receiver":"김로또","contactNum":"010-7777-7777"},`
	const details = `"deliveryDetails":{"receiveAt":"문 앞","requestedTerms":"도착 시 꼭 문자주세요!!"},`
	const orderer = `"ordererInfo":{"name":"남대문","phoneNum":"010-4444-4444","email":"a@test.com","refundTerms":"품절 시 결제수단으로 환불"},`
	const items = `"orderItems":[{"image":"/images/bye/1.jpg","title":"잠식","artist":"안영희","size":"73x61cm(20호)","price":99000,"product":"61a4c895f59ea1b7a727a658"},` +
		`{"image":"/images/owner/1.jpg","title":"파멸","artist":"로키산맥","size":"163x131cm(100호)","price":469000,"product":"61a4debe4f5f6aa036bfec5f"}],` +
		`"shippingPrice":10000,"totalPrice":578000`
	var made orderCreated
	got := s.want(s.call(buyer, "POST", "/api/orders", `{"result":{"id":"20211130111111"},`+delivery+details+orderer+items+`}`), 201, "")
	check(t, json.Unmarshal([]byte(got.body), &made))
	page := func(result string) string {
		return `{"result":{` + result + `},` + delivery + details + orderer + `"_id":"` + made.OrderID + `","user":"` + buyer + `",` + items + `}`
	}
	path := "/api/orders/" + made.OrderID
	s.wantBody(s.call(buyer, "GET", path, nil), 200, page(`"id":"20211130111111","status":-1,"updatedAt":"2026-03-02T01:00:00.000Z"`))
	s.clock.advance(time.Minute + 146*time.Millisecond)
	s.want(s.report(s.charge(made.OrderID, 578000)), 200, "")
	paid := page(`"id":"20211130111111","paidAt":"2026-03-02T01:01:00.146Z","status":0,"updatedAt":"2026-03-02T01:01:00.146Z"`)
	for _, row := range []struct {
		name, user, path string
		status           int
	}{
		{"its buyer", buyer, path, 200},
		{"upper case", buyer, "/api/orders/" + strings.ToUpper(made.OrderID), 200},
		{"an administrator", adminID, path, 200},
		{"a stranger", buyerB, path, 404},
		{"unknown", buyer, "/api/orders/ffffffffffffffffffffffff", 404},
		{"malformed", buyer, "/api/orders/1", 404},
		{"not hex", buyer, "/api/orders/" + strings.Repeat("g", 24), 404},
		{"its number", buyer, "/api/orders/20211130111111", 404},
	} {
		t.Run(row.name, func(t *testing.T) {
			want := paid
			if row.status == 404 {
				want = `{"message":"해당 주문 내역이 없습니다"}`
			}
			rowOf(t, s).wantBody(s.call(row.user, "GET", row.path, nil), row.status, want)
		})
	}

	// The snapshot is of that day.
	check(t, s.store.importPaintings(t.Context(), []painting{{id: "61a4c895f59ea1b7a727a658", artistID: newTestID(), artistName: "다른 이",
		title: "다른 제목", image: "/other.jpg", size: "1x1cm", canvas: 1, price: 1, forSale: true}}))
	s.wantBody(s.call(buyer, "GET", path, nil), 200, paid)
	s.wantBody(s.call(buyer, "GET", "/api/orders/latest", nil), 200, "{"+delivery+details+orderer+`"_id":"`+made.OrderID+`"}`)
}

func TestLatestOrder(t *testing.T) {
	s := newShop(t)
	latest := func(user string) answer { return s.call(user, "GET", "/api/orders/latest", nil) }
	id := func() string {
		t.Helper()
		var order struct {
			ID string `json:"_id"`
		}
		check(t, json.Unmarshal([]byte(s.want(latest(buyerA), 200, "").body), &order))
		return order.ID
	}
	s.wantBody(latest(buyerA), 404, `{"message":"최근 주문 내역이 없습니다"}`)
	first, _, _ := s.paid(buyerA)
	if id() != first {
		t.Fatal("not the only one")
	}
	s.clock.advance(time.Second)
	body := orderBody(newNumber(), s.painting(99000))
	put(body, "deliveryDetails", absent)
	var second orderCreated
	check(t, json.Unmarshal([]byte(s.want(s.call(buyerA, "POST", "/api/orders", body), 201, "").body), &second))
	s.wantBody(latest(buyerA), 200, `{"deliveryInfo":{"address":"[00000] 어느시 어느로 1","detailedAddress":"101호","receiver":"홍길동","contactNum":"010-0000-0000"},`+
		`"ordererInfo":{"name":"홍길동","phoneNum":"010-0000-0000","email":"buyer@example.com","refundTerms":"품절 시 결제수단으로 환불"},"_id":"`+second.OrderID+`"}`)
	s.want(latest(buyerB), 404, "최근 주문 내역이 없습니다")
	s.want(latest(adminID), 404, "최근 주문 내역이 없습니다") // an administrator's own are none
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+second.OrderID, nil), 200, "")
	if id() != first {
		t.Fatal("a deleted order is the latest")
	}
}

func TestTokens(t *testing.T) {
	s := newShop(t)
	order, impUID, painting := s.paid(buyerA)
	free := s.painting(99000)
	now := s.clock.Now()
	sign := func(method jwt.SigningMethod, secret any, change func(jwt.MapClaims)) string {
		c := jwt.MapClaims{"id": buyerA, "isAdmin": false, "iat": now.Unix(), "exp": now.Add(time.Hour).Unix()}
		change(c)
		token, err := jwt.NewWithClaims(method, c).SignedString(secret)
		check(t, err)
		return "Bearer " + token
	}
	with := func(key string, value any) string {
		return sign(jwt.SigningMethodHS256, []byte(testSecret), func(c jwt.MapClaims) { c[key] = value })
	}
	without := func(key string) string {
		return sign(jwt.SigningMethodHS256, []byte(testSecret), func(c jwt.MapClaims) { delete(c, key) })
	}
	as := func(jwt.MapClaims) {}
	good := with("isAdmin", false)
	body := orderBody(newNumber(), free)
	routes := []struct {
		method, path string
		body         any
	}{
		{"GET", "/api/products/total-price?productId=" + painting, nil},
		{"POST", "/api/orders", body},
		{"DELETE", "/api/orders/" + order, nil},
		{"GET", "/api/orders/" + order, nil},
		{"GET", "/api/orders/latest", nil},
	}
	parts := strings.Split(good, ".")
	for _, row := range []struct{ name, authorization string }{
		{"none", ""},
		{"empty scheme", "Bearer"},
		{"empty token", "Bearer "},
		{"garbage", "Bearer garbage"},
		{"dots", "Bearer a.b.c"},
		{"no scheme", strings.TrimPrefix(good, "Bearer ")},
		{"another scheme", strings.Replace(good, "Bearer", "Basic", 1)},
		{"expired", with("exp", now.Add(-time.Hour).Unix())},
		{"expiring now", with("exp", now.Unix())},
		{"alg none", sign(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, as)},
		{"HS384", sign(jwt.SigningMethodHS384, []byte(testSecret), as)},
		{"HS512", sign(jwt.SigningMethodHS512, []byte(testSecret), as)},
		{"another secret", sign(jwt.SigningMethodHS256, []byte(testSecret+"x"), as)},
		{"no signature", parts[0] + "." + parts[1] + "."},
		{"another's claims", parts[0] + "." + strings.Split(s.as(adminID), ".")[1] + "." + parts[2]},
		{"no exp", without("exp")},
		{"exp no number", with("exp", "tomorrow")},
		{"exp null", with("exp", nil)},
		{"no id", without("id")},
		{"id null", with("id", nil)},
		{"id empty", with("id", "")},
		{"id not hex", with("id", strings.Repeat("z", 24))},
		{"id too short", with("id", buyerA[1:])},
		{"id a number", with("id", 1)},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := rowOf(t, s)
			for _, route := range routes {
				got := s.callWith(row.authorization, route.method, route.path, route.body)
				s.want(got, http.StatusUnauthorized, messageSignIn)
			}
		})
	}
	if s.statusOf(order) != statusPaid || !s.inStock("", free) {
		t.Fatal("a call without a good token changed something")
	}

	// Good tokens that look odd.
	for _, row := range []struct{ name, authorization string }{
		{"scheme in lower case", strings.Replace(good, "Bearer", "bearer", 1)},
		{"scheme in upper case", strings.Replace(good, "Bearer", "BEARER", 1)},
		{"id in upper case", with("id", strings.ToUpper(buyerA))},
		{"isAdmin left out", without("isAdmin")},
		{"isAdmin a text", with("isAdmin", "true")},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := rowOf(t, s)
			s.want(s.callWith(row.authorization, "GET", "/api/orders/"+order, nil), 200, "")
		})
	}

	// To others than its buyer and administrators the order does not exist, and it is never a 401.
	stranger := func(isAdmin any) string {
		return sign(jwt.SigningMethodHS256, []byte(testSecret), func(c jwt.MapClaims) { c["id"], c["isAdmin"] = buyerB, isAdmin })
	}
	for _, isAdmin := range []any{false, nil, "true", "True", 1, 1.5, []any{true}, map[string]any{"a": true}} {
		t.Run(fmt.Sprintf("stranger, isAdmin %v", isAdmin), func(t *testing.T) {
			s := rowOf(t, s)
			s.want(s.callWith(stranger(isAdmin), "GET", "/api/orders/"+order, nil), 404, messageOrderUnknown)
			s.want(s.callWith(stranger(isAdmin), "DELETE", "/api/orders/"+order, nil), 404, messageNoSuchOrder)
			s.want(s.callWith(stranger(isAdmin), "GET", "/api/orders/latest", nil), 404, "최근 주문 내역이 없습니다")
			s.want(s.callWith(stranger(isAdmin), "GET", "/api/products/total-price?productId="+painting, nil), 200, "")
			s.wantMoney(impUID, 0)
		})
	}
	s.want(s.callWith(stranger(true), "GET", "/api/orders/"+order, nil), 200, "")
	s.want(s.callWith(stranger(true), "DELETE", "/api/orders/"+order, nil), 200, "")
	s.wantMoney(impUID, 109000)

	// Good tokens are remembered, each with its own end, and not too many.
	s.want(s.callWith(good, "GET", "/api/orders/"+order, nil), 200, "")
	s.clock.advance(time.Hour - time.Millisecond)
	s.want(s.callWith(good, "GET", "/api/orders/"+order, nil), 200, "")
	s.clock.advance(time.Millisecond)
	s.want(s.callWith(good, "GET", "/api/orders/"+order, nil), http.StatusUnauthorized, messageSignIn)
	for i := len(s.tokens.verified); i < maxVerifiedTokens; i++ {
		s.tokens.verified[sha256.Sum256([]byte{byte(i), byte(i >> 8)})] = verifiedToken{}
	}
	s.want(s.call(buyerA, "GET", "/api/orders/"+order, nil), 200, "")
	if n := len(s.tokens.verified); n != 1 {
		t.Errorf("%d tokens are remembered", n)
	}
}
