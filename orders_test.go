package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"
)

// callers are who may make a call: the columns of callTable.
var callers = [6]string{"no token", "an expired token", "a tampered token", "a stranger", "the owner", "the administrator"}

// authorization is the header with which one of the callers calls. The tampered token is the owner's with the administrator's
// claims.
func (s *shop) authorization(who, owner string) string {
	switch who {
	case "an expired token":
		return "Bearer " + s.issueToken(caller{id: owner}, s.clock.Now().Add(-4*time.Hour))
	case "a tampered token":
		parts := strings.Split(s.as(owner), ".")
		return parts[0] + "." + strings.Split(s.as(adminID), ".")[1] + "." + parts[2]
	case "a stranger":
		return s.as(newTestID())
	case "the owner":
		return s.as(owner)
	case "the administrator":
		return "Bearer " + s.token(newTestID(), true)
	}
	return ""
}

// callTable says of every call and caller which status it is answered with. The data of each cell are new: prepare makes what
// the call is about, for an owner, and returns the path and the body.
var callTable = []struct {
	pattern string
	want    [6]int
	unknown string // the message of a stranger's 404
	prepare func(s *shop, owner string) (path string, body any)
}{
	{"GET /api/products/cart-items", [6]int{200, 200, 200, 200, 200, 200}, "", func(s *shop, _ string) (string, any) {
		return "/api/products/cart-items?productId=" + s.painting(99000), nil
	}},
	{"GET /api/products/total-price", [6]int{401, 401, 401, 200, 200, 200}, "", func(s *shop, _ string) (string, any) {
		return "/api/products/total-price?productId=" + s.painting(99000), nil
	}},
	{"POST /api/orders", [6]int{401, 401, 401, 201, 201, 201}, "", func(s *shop, _ string) (string, any) {
		return "/api/orders", orderBody(newNumber(), s.painting(99000))
	}},
	{"PATCH /api/orders/pay", [6]int{200, 200, 200, 200, 200, 200}, "", func(s *shop, owner string) (string, any) {
		return "/api/orders/pay", map[string]string{"imp_uid": s.charge(s.order(owner, s.painting(99000)), 109000)}
	}},
	{"POST /api/payments/webhook", [6]int{200, 200, 200, 200, 200, 200}, "", func(s *shop, owner string) (string, any) {
		return "/api/payments/webhook", map[string]string{"imp_uid": s.charge(s.order(owner, s.painting(99000)), 109000)}
	}},
	{"GET /api/orders/{id}", [6]int{401, 401, 401, 404, 200, 200}, messageOrderUnknown, func(s *shop, owner string) (string, any) {
		return "/api/orders/" + s.order(owner, s.painting(99000)), nil
	}},
	{"GET /api/orders/latest", [6]int{401, 401, 401, 404, 200, 404}, "최근 주문 내역이 없습니다", func(s *shop, owner string) (string, any) {
		s.order(owner, s.painting(99000))
		return "/api/orders/latest", nil
	}},
	{"GET /api/orders/mine", [6]int{401, 401, 401, 200, 200, 200}, "", func(s *shop, owner string) (string, any) {
		s.paid(owner)
		return "/api/orders/mine", nil
	}},
	{"GET /api/orders/{id}/history", [6]int{401, 401, 401, 404, 200, 200}, messageOrderUnknown, func(s *shop, owner string) (string, any) {
		return "/api/orders/" + s.order(owner, s.painting(99000)) + "/history", nil
	}},
	// An unpaid order is deleted, a paid one is cancelled and its money goes back.
	{"DELETE /api/orders/{id}", [6]int{401, 401, 401, 404, 200, 200}, messageNoSuchOrder, func(s *shop, owner string) (string, any) {
		return "/api/orders/" + s.order(owner, s.painting(99000)), nil
	}},
	{"DELETE /api/orders/{id}", [6]int{401, 401, 401, 404, 200, 200}, messageNoSuchOrder, func(s *shop, owner string) (string, any) {
		order, _, _ := s.paid(owner)
		return "/api/orders/" + order, nil
	}},
	// Its owner cancels one painting of several, and takes the return of one back.
	{"DELETE /api/orders/{id}", [6]int{401, 401, 401, 404, 200, 200}, messageNoSuchOrder, func(s *shop, owner string) (string, any) {
		order, paintings := s.paidFor(owner, 2)
		return "/api/orders/" + order, map[string]any{"status": 5, "products": paintings[:1]}
	}},
	{"PATCH /api/orders/{id}", [6]int{401, 401, 401, 404, 200, 200}, messageNoSuchOrder, func(s *shop, owner string) (string, any) {
		order, paintings := s.paidFor(owner, 2)
		s.want(s.call(owner, "DELETE", "/api/orders/"+order, map[string]any{"status": 4, "products": paintings[:1]}), 200, "")
		return "/api/orders/" + order, map[string]any{"status": 0, "products": paintings[:1]}
	}},
	// The administrator advances an order; its buyer may only ask to return it.
	{"PATCH /api/orders/{id}", [6]int{401, 401, 401, 404, 403, 200}, messageNoSuchOrder, func(s *shop, owner string) (string, any) {
		order, _, _ := s.paid(owner)
		return "/api/orders/" + order, `{"status":1}`
	}},
	{"PATCH /api/orders/{id}", [6]int{401, 401, 401, 404, 200, 200}, messageNoSuchOrder, func(s *shop, owner string) (string, any) {
		order, _, _ := s.paid(owner)
		s.want(s.call(adminID, "PATCH", "/api/orders/"+order, `{"status":1}`), 200, "")
		return "/api/orders/" + order, `{"status":4}`
	}},
	// Its buyer takes a return request back, too.
	{"PATCH /api/orders/{id}", [6]int{401, 401, 401, 404, 200, 200}, messageNoSuchOrder, func(s *shop, owner string) (string, any) {
		order, _, _ := s.paid(owner)
		s.want(s.call(owner, "DELETE", "/api/orders/"+order, `{"status":4}`), 200, "")
		return "/api/orders/" + order, `{"status":0}`
	}},
	{"POST /api/orders/{id}/refund", [6]int{401, 401, 401, 403, 403, 200}, "", func(s *shop, owner string) (string, any) {
		order, impUID := s.stuckRefund(owner)
		return "/api/orders/" + order + "/refund", map[string]string{"imp_uid": impUID, "byHand": "은행 송금"}
	}},
	{"PATCH /api/products/{id}", [6]int{401, 401, 401, 403, 403, 200}, "", func(s *shop, _ string) (string, any) {
		return "/api/products/" + s.painting(99000), `{"forSale":false}`
	}},
	{"GET /api/orders", [6]int{401, 401, 401, 403, 403, 200}, "", func(s *shop, owner string) (string, any) {
		s.paid(owner)
		return "/api/orders", nil
	}},
	{"GET /healthz", [6]int{200, 200, 200, 200, 200, 200}, "", func(*shop, string) (string, any) { return "/healthz", nil }},
	{"GET /readyz", [6]int{200, 200, 200, 200, 200, 200}, "", func(*shop, string) (string, any) { return "/readyz", nil }},
}

// TestWhoMayCall makes every call of the API as every caller. A call that is refused changes nothing.
func TestWhoMayCall(t *testing.T) {
	shared := newShop(t)
	rows := map[string]bool{}
	for _, row := range callTable {
		rows[row.pattern] = true
		for i, who := range callers {
			t.Run(row.pattern+" by "+who, func(t *testing.T) {
				s := rowOf(t, shared)
				owner := newTestID()
				path, body := row.prepare(s, owner)
				method, _, _ := strings.Cut(row.pattern, " ")
				before := s.fingerprint()
				message := map[int]string{401: messageSignIn, 403: messageAdmin, 404: row.unknown}[row.want[i]]
				s.want(s.callWith(s.authorization(who, owner), method, path, body), row.want[i], message)
				if row.want[i] >= 400 && s.fingerprint() != before {
					t.Error("a refused call has changed something")
				}
			})
		}
	}
	routes := map[string]bool{}
	for _, rt := range shared.routes() {
		routes[rt.pattern] = true
		if !rows[rt.pattern] {
			t.Errorf("%s has no row", rt.pattern)
		}
	}
	for pattern := range rows {
		if !routes[pattern] {
			t.Errorf("there is no route %s", pattern)
		}
	}
}

// fingerprint differs whenever something in the database or at the gateway has changed.
func (s *shop) fingerprint() string {
	s.t.Helper()
	books := queryText(s.t, s.config.databaseURL, `SELECT md5(concat(
		(SELECT string_agg(o::text, ';' ORDER BY id) FROM orders o), (SELECT string_agg(p::text, ';' ORDER BY imp_uid) FROM payments p),
		(SELECT string_agg(p::text, ';' ORDER BY id) FROM products p), (SELECT string_agg(r::text, ';' ORDER BY id) FROM part_refunds r), (SELECT count(*) FROM history)))`)
	return fmt.Sprint(books, s.fake.all())
}

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
		{"no deliveryDetails", "deliveryDetails", absent, `"deliveryDetails":{"receiveAt":"","requestedTerms":""},`, "문 앞"},
		{"null deliveryDetails", "deliveryDetails", nil, `"deliveryDetails":{"receiveAt":"","requestedTerms":""},`, "문 앞"},
		{"empty deliveryDetails", "deliveryDetails", map[string]any{}, `"deliveryDetails":{"receiveAt":"","requestedTerms":""},`, "문 앞"},
		{"one of deliveryDetails", "deliveryDetails.requestedTerms", absent, `"deliveryDetails":{"receiveAt":"문 앞","requestedTerms":""},`, "문자 주세요"},
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

func TestOrderReplacement(t *testing.T) {
	s := newShop(t)
	a, b, c := s.painting(99000), s.painting(99000), s.painting(99000)
	create := func(user, number string, paintings ...string) answer {
		t.Helper()
		return s.call(user, "POST", "/api/orders", orderBody(number, paintings...))
	}
	first := s.want(create(buyerA, newNumber(), a, b), 201, "")
	s.want(create(buyerB, newNumber(), c), 201, "")
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

func TestTwoHundredBuyersOnePainting(t *testing.T) {
	s := newShop(t)
	painting := s.painting(99000)
	buyers := make([]string, 200)
	for i := range buyers {
		buyers[i] = newTestID()
	}
	count := concurrently(len(buyers), func(i int) answer {
		return s.call(buyers[i], "POST", "/api/orders", orderBody(newNumber(), painting))
	})
	if count[201] != 1 || count[409] != 199 {
		t.Fatalf("answers by status: %v", count)
	}
	s.wantBalanced()
}

func TestOverlappingCartsAtOnce(t *testing.T) {
	s := newShop(t)
	a, b, c := s.painting(99000), s.painting(99000), s.painting(99000)
	carts := [][]string{{a, b, c}, {c, b, a}, {b, a}, {c, a}, {b, c}}
	count := concurrently(100, func(i int) answer {
		return s.call(newTestID(), "POST", "/api/orders", orderBody(newNumber(), carts[i%len(carts)]...))
	})
	if count[201] != 1 || count[201]+count[409] != 100 { // any two carts overlap
		t.Fatalf("answers by status: %v", count)
	}
	s.wantBalanced()
}

func TestOneBuyerManyOrdersAtOnce(t *testing.T) {
	heavy(t)
	s := newShop(t)
	a, b, c := s.painting(99000), s.painting(99000), s.painting(99000)
	carts := [][]string{{a, b}, {c, b}, {a}, {c, a}}
	count := concurrently(60, func(i int) answer {
		return s.call(buyerA, "POST", "/api/orders", orderBody(newNumber(), carts[i%len(carts)]...))
	})
	if count[201] != 60 {
		t.Fatalf("answers by status: %v", count)
	}
	if n := queryText(t, s.config.databaseURL, `SELECT count(*) FROM orders WHERE ended IS NULL`); n != "1" {
		t.Fatalf("%s unpaid orders of one buyer", n)
	}
	s.wantBalanced()
}

func TestSameOrderSentManyTimesAtOnce(t *testing.T) {
	s := newShop(t)
	body := orderBody(newNumber(), s.painting(99000), s.painting(99000))
	var mu sync.Mutex
	bodies := map[string]int{}
	count := concurrently(30, func(int) answer {
		a := s.call(buyerA, "POST", "/api/orders", body)
		mu.Lock()
		bodies[a.body]++
		mu.Unlock()
		return a
	})
	if count[201] != 30 || len(bodies) != 1 {
		t.Fatalf("answers by status: %v, bodies: %v", count, bodies)
	}
	s.wantBalanced()
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
	s.importPaintings(painting{id: "61a4c895f59ea1b7a727a658", artistID: newTestID(), artistName: "다른 이",
		title: "다른 제목", image: "/other.jpg", size: "1x1cm", canvas: 1, price: 1, forSale: true})
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
		`"deliveryDetails":{"receiveAt":"","requestedTerms":""},`+
		`"ordererInfo":{"name":"홍길동","phoneNum":"010-0000-0000","email":"buyer@example.com","refundTerms":"품절 시 결제수단으로 환불"},"_id":"`+second.OrderID+`"}`)
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+second.OrderID, nil), 200, "")
	if id() != first {
		t.Fatal("a deleted order is the latest")
	}
}

func TestReadYourOwnOrder(t *testing.T) {
	s := newDirectShop(t)
	var wg sync.WaitGroup
	for range 8 {
		buyer, other, painting := newTestID(), newTestID(), s.painting(99000)
		wg.Go(func() {
			for range 5 {
				order := s.order(buyer, painting)
				if s.inStock(other, painting) || s.statusOf(order) != statusUnpaid {
					t.Error("an order just made is not seen")
				}
				s.want(s.call(buyer, "DELETE", "/api/orders/"+order, nil), 200, "")
				if !s.inStock(other, painting) {
					t.Error("a painting just freed is not seen")
				}
				s.want(s.call(buyer, "GET", "/api/orders/latest", nil), 404, "")
			}
		})
	}
	wg.Wait()
}

func TestMyOrders(t *testing.T) {
	s := newShop(t)
	if a := s.call(buyerA, "GET", "/api/orders/mine", nil); a.body != `{"orders":[],"status":{"paid":0,"ready":0,"coming":0,"done":0},"page":1,"pages":0}` {
		t.Errorf("no orders: %s", a.body)
	}
	var newest []string
	for _, status := range []int{0, 1, 1, 2, 3, 4, 0} {
		s.clock.advance(time.Millisecond)
		order, _, _ := s.orderAt(status)
		newest = append([]string{order}, newest...)
	}
	s.paid(buyerB)
	for _, row := range []struct {
		query string
		page  int
		want  []string
	}{
		{"", 1, newest[:3]}, {"?pageNumber=1", 1, newest[:3]}, {"?pageNumber=3", 3, newest[6:]}, {"?pageNumber=4", 4, nil}, {"?pageNumber=999999999", 999999999, nil},
		{"?pageNumber=0", 1, newest[:3]}, {"?pageNumber=-2", 1, newest[:3]}, {"?pageNumber=x", 1, newest[:3]}, {"?pageNumber=99999999999999999999", 1, newest[:3]},
	} {
		l := s.list(buyerA, "/api/orders/mine"+row.query)
		var got []string
		for _, o := range l.Orders {
			got = append(got, o.ID)
		}
		if strings.Join(got, " ") != strings.Join(row.want, " ") || l.Page != row.page || l.Pages != 3 ||
			fmt.Sprint(l.Status) != "map[coming:1 done:1 paid:2 ready:2]" {
			t.Errorf("%q: %+v", row.query, l)
		}
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
		add(from, buyerA, []any{"{}" + strings.Repeat(" ", smallBody)}, 413, "", from)
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

func TestOrderThatNeverStandsStill(t *testing.T) {
	s := newShop(t)
	order, _, _ := s.paid(buyerA)
	execSQL(t, s.config.databaseURL, `CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'`)
	execSQL(t, s.config.databaseURL, `CREATE TRIGGER lose BEFORE UPDATE ON orders FOR EACH ROW EXECUTE FUNCTION lose()`)
	for _, body := range []any{nil, `{"status":4}`} {
		s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, body), 409, "주문이 변경되는 중입니다. 잠시 후 다시 시도해 주세요")
	}
}

func TestCancelledManyTimesAtOnce(t *testing.T) {
	s := newShop(t)
	order, impUID, painting := s.paid(buyerA)
	count := concurrently(20, func(int) answer { return s.call(buyerA, "DELETE", "/api/orders/"+order, nil) })
	if count[200] != 1 || count[409] != 19 {
		t.Fatalf("answers by status: %v", count)
	}
	if p, _ := s.fake.get(impUID); p.Cancelled != 109000 || s.fake.calls("cancel") != 1 {
		t.Fatalf("%d won given back in %d calls", p.Cancelled, s.fake.calls("cancel"))
	}
	if !s.inStock(buyerB, painting) {
		t.Fatal("the painting is not free")
	}
	s.wantBalanced()
}

func TestDeletionAgainstPayment(t *testing.T) {
	s := newShop(t)
	order := s.order(buyerA, s.painting(99000))
	s.fake.faultOnce("findAll", fault{before: answer500})
	if a := s.call(buyerA, "DELETE", "/api/orders/"+order, nil); a.status < 500 {
		t.Fatalf("a silent gateway: %d %s", a.status, a.body)
	}
	impUID := s.charge(order, 109000)
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 409, "")
	if s.statusOf(order) != statusPaid || s.row(impUID) != "kept" {
		t.Fatalf("status %d, %s", s.statusOf(order), s.row(impUID))
	}
}

func TestHistory(t *testing.T) {
	s := newShop(t)
	order, impUID, _ := s.orderAt(statusReturning)
	s.want(s.call(adminID, "DELETE", "/api/orders/"+order, nil), 200, "")
	lines := func(user string) (lines []string) {
		var h struct{ History []historyLine }
		check(t, json.Unmarshal([]byte(s.want(s.call(user, "GET", "/api/orders/"+order+"/history", nil), 200, "").body), &h))
		for _, e := range h.History {
			if e.At == "" || e.RequestID == "" {
				t.Errorf("incomplete: %+v", e)
			}
			lines = append(lines, strings.TrimSpace(fmt.Sprintf("%s %s %s %s %d", e.Who, e.WhoID, e.Why, e.ImpUID, e.Amount)))
		}
		return lines
	}
	want := []string{"buyer  created  0", "buyer  paid  0", "buyer  payment kept " + impUID + " 109000",
		"administrator " + adminID + " preparing  0", "administrator " + adminID + " shipping  0", "administrator " + adminID + " delivered  0",
		"buyer  return requested  0", "administrator " + adminID + " cancel requested  0",
		"administrator " + adminID + " refunding: " + reasonShopCancel + " " + impUID + " 109000",
		"administrator " + adminID + " refunded: " + reasonShopCancel + " " + impUID + " 109000", "administrator " + adminID + " cancelled  0"}
	sorted := func(lines []string) string { return strings.Join(lines, "\n") }
	if got := lines(adminID); sorted(got) != sorted(want) {
		t.Errorf("the administrator sees\n%s\nwant\n%s", sorted(got), sorted(want))
	}
	if got := sorted(lines(buyerA)); got != strings.ReplaceAll(sorted(want), adminID, "") {
		t.Errorf("the buyer sees\n%s", got)
	}
}

// historyLine is a history entry as a client reads it.
type historyLine struct {
	At, Who, WhoID, Why, RequestID string
	ImpUID                         string `json:"imp_uid"`
	Amount                         int64
}

func TestHistoryByTheProgramAndByHand(t *testing.T) {
	s := newShop(t)
	noticed, found, moved := s.order(buyerA, s.painting(99000)), s.order(buyerB, s.painting(99000)), ""
	s.want(s.notice(s.charge(noticed, 109000)), 200, "")
	s.charge(found, 109000)
	s.later(s.config.hold)
	moved, _, _ = s.paid(buyerA)
	execSQL(t, s.config.databaseURL, `UPDATE orders SET status = 1 WHERE id = '`+moved+`'`)
	for order, who := range map[string]string{noticed: "gateway", found: "reconciler", moved: "database"} {
		if a := s.call(adminID, "GET", "/api/orders/"+order+"/history", nil); !strings.Contains(a.body, `"who":"`+who+`"`) {
			t.Errorf("no %s in %s", who, a.body)
		}
	}
}

func FuzzParseOrder(f *testing.F) {
	good, err := json.Marshal(orderBody("20260302000001", "61a4debe4f5f6aa036bfec5f", "61a58ed5eebb463c14eca0f9"))
	check(f, err)
	f.Add(good)
	for _, change := range [][2]string{{`"deliveryDetails"`, `"other"`}, {"99000", "1e400"}, {"99000", "99000.5"}, {"홍길동", `\ud800`}, {"홍길동", `\u0000`},
		{`"result":{`, `"result":[{`}, {"10000", "null"}, {"buyer@example.com", " "}, {`"orderItems":[`, `"orderItems":[null,`}, {"}", ""}} {
		f.Add([]byte(strings.ReplaceAll(string(good), change[0], change[1])))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		if !utf8.Valid(body) { // readBody refuses it
			t.Skip()
		}
		o, err := parseOrder(body, 10000)
		if err != nil {
			wantBadRequest(t, err)
			return
		}
		if n := len(o.productIDs); n < 1 || n > maxItems || n != len(o.prices) || o.shippingPrice != 10000 {
			t.Fatalf("%s gives %+v", body, o)
		}
		for i, id := range o.productIDs {
			if !validID(id) || slices.Contains(o.productIDs[:i], id) {
				t.Fatalf("%s gives the paintings %q", body, o.productIDs)
			}
		}
		for _, text := range []string{o.deliveryInfo, o.deliveryDetails, o.ordererInfo} {
			var fields map[string]string
			if err := json.Unmarshal([]byte(text), &fields); err != nil {
				t.Fatalf("%s gives the document %s", body, text)
			}
			for name, value := range fields {
				if value == "" && text != o.deliveryDetails || value != strings.TrimSpace(value) || invalidString(value) {
					t.Fatalf("%s gives %s %q", body, name, value)
				}
			}
		}
	})
}

// create asks for an order of paintings of 99,000 won.
func (s *shop) create(user, number string, paintings ...string) answer {
	s.t.Helper()
	return s.call(user, "POST", "/api/orders", orderBody(number, paintings...))
}

// idOf is the order that an answer to POST /api/orders names.
func (s *shop) idOf(a answer) string {
	s.t.Helper()
	var made orderCreated
	check(s.t, json.Unmarshal([]byte(s.want(a, 201, "주문서 생성 성공").body), &made))
	return made.OrderID
}

// heldUntil is when the hold of an order ends.
func (s *shop) heldUntil(order string) time.Time {
	s.t.Helper()
	at, err := time.Parse(time.RFC3339, queryText(s.t, s.config.databaseURL,
		`SELECT to_char(held_until AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') FROM orders WHERE id = '`+order+`'`))
	check(s.t, err)
	return at
}

func TestOrderNumberSentAgain(t *testing.T) {
	s := newShop(t)
	a, b := s.painting(99000), s.painting(99000)
	number := newNumber()
	first := s.idOf(s.create(buyerA, number, a, b))
	held := s.heldUntil(first)

	// The same request again is the same order, and its hold begins anew.
	s.clock.advance(10 * time.Minute)
	if again := s.idOf(s.create(buyerA, number, b, a)); again != first {
		t.Fatalf("the same body made order %s beside %s", again, first)
	}
	if got := s.heldUntil(first); !got.Equal(held.Add(10 * time.Minute)) {
		t.Fatalf("held until %v, want ten minutes more than %v", got, held)
	}
	s.later(21 * time.Minute) // past the end of the first hold
	s.wantUntouched(first, a)

	// Anything different is another order, and replaces it.
	for name, change := range map[string]func(map[string]any){
		"address": func(body map[string]any) { put(body, "deliveryInfo.address", "[00000] 어느시 다른로 2") },
		"orderer": func(body map[string]any) { put(body, "ordererInfo.phoneNum", "010-1111-1111") },
		"details": func(body map[string]any) { put(body, "deliveryDetails", absent) },
	} {
		body := orderBody(number, a, b)
		change(body)
		next := s.idOf(s.call(buyerA, "POST", "/api/orders", body))
		if next == first {
			t.Fatalf("another %s is the same order", name)
		}
		first = next
	}

	// A price that the shop has changed meanwhile changes nothing of a request sent twice, and refuses any other.
	order := s.idOf(s.create(buyerA, number, a))
	s.catalogue(120000, true, a)
	if again := s.idOf(s.create(buyerA, number, a)); again != order {
		t.Fatalf("the same body made order %s beside %s", again, order)
	}
	s.wantNaming(s.create(buyerA, number, a, b), 400, "orderItems[0].price")
	s.wantUntouched(order, a)
}

func TestOrderNumberOfAPaidOrder(t *testing.T) {
	s := newShop(t)
	painting, other := s.painting(99000), s.painting(99000)
	number := newNumber()
	order := s.idOf(s.create(buyerA, number, painting))
	s.want(s.report(s.charge(order, 109000)), 200, "결제 성공")
	for status, reach := range []func(){
		statusPaid:      func() {},
		statusPreparing: func() { s.want(s.call(adminID, "PATCH", "/api/orders/"+order, map[string]int{"status": 1}), 200, "") },
		statusShipping:  func() { s.want(s.call(adminID, "PATCH", "/api/orders/"+order, map[string]int{"status": 2}), 200, "") },
		statusDelivered: func() { s.want(s.call(adminID, "PATCH", "/api/orders/"+order, map[string]int{"status": 3}), 200, "") },
		statusReturning: func() { s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, map[string]int{"status": 4}), 200, "") },
		statusCancelled: func() { s.want(s.call(adminID, "DELETE", "/api/orders/"+order, nil), 200, "") },
	} {
		reach()
		for _, wanted := range []string{painting, other} {
			a := s.create(buyerA, number, wanted)
			s.wantNaming(a, 409, "result.id")
			var made orderCreated
			if json.Unmarshal([]byte(a.body), &made); made.OrderID != "" {
				t.Fatalf("status %d: the refusal names order %s", status, made.OrderID)
			}
		}
		if got := s.statusOf(order); got != status {
			t.Fatalf("the number sent again moved the order from %d to %d", status, got)
		}
	}
	s.idOf(s.create(buyerB, number, painting)) // a number is unique for one buyer
}

func TestHoldsAreBounded(t *testing.T) {
	s := newShop(t) // ORDER_HOLD is 30 minutes
	painting, other := s.painting(99000), s.painting(99000)
	start := s.clock.Now()
	s.order(buyerA, painting)
	s.clock.advance(25 * time.Minute)
	if got := s.heldUntil(s.order(buyerA, painting, other)); !got.Equal(start.Add(55 * time.Minute)) {
		t.Fatalf("the second hold ends at %v", got.Sub(start))
	}
	s.clock.advance(20 * time.Minute)
	third := s.order(buyerA, painting)
	if got := s.heldUntil(third); !got.Equal(start.Add(time.Hour)) {
		t.Fatalf("the third hold ends after %v, want twice ORDER_HOLD after the first began", got.Sub(start))
	}

	// The request sent again does not go beyond that either.
	number := newNumber()
	s.clock.advance(5 * time.Minute)
	fourth := s.idOf(s.create(buyerA, number, painting))
	s.clock.advance(5 * time.Minute)
	s.idOf(s.create(buyerA, number, painting))
	if got := s.heldUntil(fourth); !got.Equal(start.Add(time.Hour)) {
		t.Fatalf("sent again, the hold ends after %v", got.Sub(start))
	}

	s.later(5 * time.Minute)
	if !s.inStock(buyerB, painting) {
		t.Fatal("the painting is still held")
	}
	// Now it is left to others for ORDER_HOLD.
	ended := s.clock.Now()
	until, _ := jsonTime(ended.Add(30 * time.Minute)).MarshalText()
	s.wantBody(s.create(buyerA, newNumber(), painting), 409, `{"message":"이미 판매되었거나 다른 구매자가 결제 중인 작품이 있습니다",`+
		`"products":[{"_id":"`+painting+`","title":"잠식","reason":"held","until":"`+string(until)+`"}]}`)
	s.want(s.create(buyerA, newNumber(), other), 201, "") // its last hold was none of those
	s.clock.advance(29 * time.Minute)
	s.want(s.create(buyerA, newNumber(), painting), 409, "")
	s.clock.advance(time.Minute)
	s.want(s.create(buyerA, newNumber(), painting), 201, "")
}

// Others may have a painting at once that a buyer has to leave to them, and a first hold that ended leaves it to nobody.
func TestHoldEndedIsForOthers(t *testing.T) {
	s := newShop(t)
	painting := s.painting(99000)
	s.order(buyerA, painting)
	s.later(31 * time.Minute)
	order := s.order(buyerA, painting) // a hold that took over nothing may be followed by another
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "")
	s.order(buyerA, painting)
	s.clock.advance(20 * time.Minute)
	s.order(buyerA, painting)
	s.later(31 * time.Minute)
	s.want(s.create(buyerA, newNumber(), painting), 409, "")
	s.order(buyerB, painting)
}

// An unpaid order that the service has ended is no error page for a payment window that closes late.
func TestDeleteOfAnEndedOrder(t *testing.T) {
	s := newShop(t)
	a, b := s.painting(99000), s.painting(99000)
	replaced := s.order(buyerA, a)
	expired := s.order(buyerA, b)
	s.later(31 * time.Minute)
	deleted := s.order(buyerA, a)
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+deleted, nil), 200, messageDeleted)
	before := queryText(t, s.config.databaseURL, `SELECT json_agg(o ORDER BY id) FROM orders o`)
	for _, order := range []string{replaced, expired} {
		for _, body := range []any{nil, map[string]int{"status": 4}, map[string]int{"status": 5}, map[string]int{"status": 9}} {
			s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, body), 200, messageDeleted)
		}
		s.want(s.call(buyerB, "DELETE", "/api/orders/"+order, nil), 404, messageNoSuchOrder)
		s.want(s.call(buyerA, "GET", "/api/orders/"+order, nil), 404, messageOrderUnknown)
		s.want(s.call(adminID, "PATCH", "/api/orders/"+order, map[string]int{"status": 0}), 404, messageNoSuchOrder)
	}
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+deleted, nil), 404, messageNoSuchOrder)
	if after := queryText(t, s.config.databaseURL, `SELECT json_agg(o ORDER BY id) FROM orders o`); after != before {
		t.Fatalf("the orders changed from %s\nto %s", before, after)
	}
}
