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

func TestAdvance(t *testing.T) {
	s := newShop(t)
	const wrong = "변경실패, 진행 단계가 알맞지 않습니다"
	for _, row := range []struct {
		from   int
		user   string
		body   string
		status int
		text   string
	}{
		{0, adminID, `{"status":1}`, 200, "해당 주문이 발송 준비 중 단계로 변경되었습니다"},
		{1, adminID, `{"status":2}`, 200, "해당 주문이 배송 중 단계로 변경되었습니다"},
		{2, adminID, `{"status":3}`, 200, "해당 주문이 배송 완료 단계로 변경되었습니다"},
		{1, buyerA, `{"status":4}`, 200, "해당 주문의 반품 요청 단계로 변경되었습니다"},
		{2, adminID, `{"status":4}`, 200, "해당 주문의 반품 요청 단계로 변경되었습니다"},
		{3, buyerA, `{"status":4}`, 200, "해당 주문의 반품 요청 단계로 변경되었습니다"},
		{0, adminID, `{"status":2}`, 400, wrong}, {1, adminID, `{"status":1}`, 400, wrong}, {3, adminID, `{"status":1}`, 400, wrong},
		{1, adminID, `{"status":0}`, 200, "해당 주문이 결제 완료 단계로 변경되었습니다"},
		{2, adminID, `{"status":1}`, 200, "해당 주문이 발송 준비 중 단계로 변경되었습니다"},
		{3, adminID, `{"status":2}`, 200, "해당 주문이 배송 중 단계로 변경되었습니다"},
		{1, buyerA, `{"status":0}`, 403, messageAdmin}, {2, buyerA, `{"status":3}`, 403, messageAdmin},
		{0, adminID, `{"status":0}`, 400, wrong}, {4, adminID, `{"status":2}`, 400, wrong}, {4, buyerA, `{"status":3}`, 200, ""},
		{0, buyerA, `{"status":4}`, 400, wrong}, {4, buyerA, `{"status":4}`, 400, wrong}, {3, adminID, `{"status":5}`, 400, wrong},
		{0, adminID, `{"status":-1}`, 400, wrong}, {0, adminID, `{}`, 400, wrong}, {0, adminID, ``, 400, wrong},
		{0, adminID, `{"status":"1"}`, 400, ""}, {0, adminID, `{"status":1.5}`, 400, ""}, {0, adminID, `[]`, 400, ""},
		{1, buyerB, `{"status":4}`, 404, messageNoSuchOrder},
	} {
		t.Run(fmt.Sprintf("%d %s %s", row.from, row.user, row.body), func(t *testing.T) {
			order, _, _ := s.orderAt(row.from)
			s.want(s.call(row.user, "PATCH", "/api/orders/"+order, row.body), row.status, row.text)
			var wanted struct{ Status int }
			if row.status == 200 {
				check(t, json.Unmarshal([]byte(row.body), &wanted))
			} else {
				wanted.Status = row.from
			}
			if got := s.statusOf(order); got != wanted.Status {
				t.Errorf("status %d, want %d", got, wanted.Status)
			}
		})
	}
	for _, id := range []string{"61a7adc903b7708e5dbba693", "no-id"} {
		s.want(s.call(adminID, "PATCH", "/api/orders/"+id, `{"status":1}`), 404, messageNoSuchOrder)
	}
}

func TestTwoAdministratorsAtOnce(t *testing.T) {
	s := newShop(t)
	order, _, _ := s.orderAt(0)
	count := concurrently(20, func(int) answer { return s.call(adminID, "PATCH", "/api/orders/"+order, `{"status":1}`) })
	if count[200] != 1 || count[400] != 19 || s.statusOf(order) != statusPreparing {
		t.Fatalf("answers by status: %v, order %d", count, s.statusOf(order))
	}
}

func TestAdminList(t *testing.T) {
	s := newShop(t)
	var last string
	for i := range 12 {
		s.clock.advance(time.Millisecond)
		last, _, _ = s.orderAt([]int{0, 1, 4}[i%3])
	}
	unpaid := s.order(buyerB, s.painting(99000))
	number := queryText(t, s.config.databaseURL, `SELECT number FROM orders WHERE id = '`+last+`'`)
	for _, row := range []struct {
		query       string
		count       int
		page, pages int
		first       string // empty: any
	}{
		{"", 10, 1, 2, last}, {"?pageNumber=2", 2, 2, 2, ""}, {"?pageNumber=3", 0, 3, 2, ""}, {"?pageNumber=no", 10, 1, 2, last},
		{"?status=4", 4, 1, 1, last}, {"?status=0", 4, 1, 1, ""}, {"?status=5", 0, 1, 0, ""}, {"?status=-1", 1, 1, 1, unpaid},
		{"?number=" + number, 1, 1, 1, last}, {"?number=" + number + "&status=4", 1, 1, 1, last}, {"?number=" + number + "&status=0", 0, 1, 0, ""}, {"?number=none", 0, 1, 0, ""},
	} {
		l := s.list(adminID, "/api/orders"+row.query)
		if len(l.Orders) != row.count || l.Page != row.page || l.Pages != row.pages || (row.first != "" && l.Orders[0].ID != row.first) {
			t.Errorf("%q: %+v", row.query, l)
		}
	}
	check(t, s.store.compactStatusCounts(t.Context()))
	if l := s.list(adminID, "/api/orders"); l.Pages != 2 {
		t.Errorf("after folding: %d pages", l.Pages)
	}
	if user := fmt.Sprint(s.list(adminID, "/api/orders").Orders[0].User); user != "map[_id:"+buyerA+" general:map[email:buyer@example.com] name:홍길동]" {
		t.Errorf("user %s", user)
	}
	s.want(s.call(adminID, "GET", "/api/orders?status=7", nil), 400, "")
	s.want(s.call(adminID, "GET", "/api/orders?number=%00", nil), 400, "")
}

// ---- parcels

// deliveries returns what the detail, the buyer's list and the administrator's list say of an order's delivery.
func (s *shop) deliveries(order string) (said [3]string) {
	s.t.Helper()
	type delivery struct {
		Shipment    json.RawMessage `json:"shipment,omitempty"`
		DeliveredAt json.RawMessage `json:"deliveredAt,omitempty"`
	}
	var detail, mine, all struct {
		delivery
		Orders []struct {
			ID string `json:"_id"`
			delivery
		}
	}
	check(s.t, json.Unmarshal([]byte(s.call(buyerA, "GET", "/api/orders/"+order, nil).body), &detail))
	check(s.t, json.Unmarshal([]byte(s.call(buyerA, "GET", "/api/orders/mine", nil).body), &mine))
	check(s.t, json.Unmarshal([]byte(s.call(adminID, "GET", "/api/orders", nil).body), &all))
	for i, d := range []delivery{detail.delivery, mine.Orders[0].delivery, all.Orders[0].delivery} {
		said[i] = marshalRaw(d)
	}
	if mine.Orders[0].ID != order || all.Orders[0].ID != order {
		s.t.Fatalf("the newest order is not %s", order)
	}
	return said
}

// TestShipment takes an order through its steps, a second apart, and looks at its delivery after each.
func TestShipment(t *testing.T) {
	shared := newShop(t)
	const parcel, other = `{"status":2,"shipment":{"carrier":"우체국택배","number":" 0000-1 "}}`, `{"status":2,"shipment":{"carrier":"대한택배","number":"0000-2"}}`
	first, second := func(at string) string {
		return `"shipment":{"carrier":"우체국택배","number":"0000-1","shippedAt":"` + at + `"}`
	}, func(at string) string {
		return `"shipment":{"carrier":"대한택배","number":"0000-2","shippedAt":"` + at + `"}`
	}
	for _, row := range []struct {
		name  string
		steps []string // bodies of PATCH, or "return"
		want  func(at func(step int) string) string
	}{
		{"not sent", []string{`{"status":1}`}, func(func(int) string) string { return `{}` }},
		{"with the step", []string{`{"status":1}`, parcel}, func(at func(int) string) string { return `{` + first(at(2)) + `}` }},
		{"corrected on the way", []string{`{"status":1}`, parcel, other}, func(at func(int) string) string { return `{` + second(at(2)) + `}` }},
		{"recorded later", []string{`{"status":1}`, `{"status":2}`, other}, func(at func(int) string) string { return `{` + second(at(2)) + `}` }},
		{"no parcel", []string{`{"status":1}`, `{"status":2}`, `{"status":3}`}, func(at func(int) string) string { return `{"deliveredAt":"` + at(3) + `"}` }},
		{"delivered", []string{`{"status":1}`, parcel, `{"status":3}`}, func(at func(int) string) string {
			return `{` + first(at(2)) + `,"deliveredAt":"` + at(3) + `"}`
		}},
		{"corrected at the door", []string{`{"status":1}`, parcel, `{"status":3}`, other}, func(at func(int) string) string {
			return `{` + second(at(2)) + `,"deliveredAt":"` + at(3) + `"}`
		}},
		{"not delivered after all", []string{`{"status":1}`, parcel, `{"status":3}`, `{"status":2}`}, func(at func(int) string) string { return `{` + first(at(2)) + `}` }},
		{"delivered again", []string{`{"status":1}`, parcel, `{"status":3}`, `{"status":2}`, `{"status":3}`}, func(at func(int) string) string {
			return `{` + first(at(2)) + `,"deliveredAt":"` + at(5) + `"}`
		}},
		{"not sent after all", []string{`{"status":1}`, parcel, `{"status":1}`}, func(func(int) string) string { return `{}` }},
		{"sent again", []string{`{"status":1}`, parcel, `{"status":1}`, `{"status":2}`}, func(func(int) string) string { return `{}` }},
		{"return asked", []string{`{"status":1}`, parcel, `{"status":3}`, "return"}, func(at func(int) string) string {
			return `{` + first(at(2)) + `,"deliveredAt":"` + at(3) + `"}`
		}},
		{"return taken back", []string{`{"status":1}`, parcel, `{"status":3}`, "return", `{"status":3}`}, func(at func(int) string) string {
			return `{` + first(at(2)) + `,"deliveredAt":"` + at(3) + `"}`
		}},
		{"return taken back on the way", []string{`{"status":1}`, parcel, "return", `{"status":2}`}, func(at func(int) string) string { return `{` + first(at(2)) + `}` }},
		{"return taken back before it was sent", []string{`{"status":1}`, "return", `{"status":1}`}, func(func(int) string) string { return `{}` }},
		{"returned", []string{`{"status":1}`, parcel, "return", "cancel"}, func(at func(int) string) string { return `{` + first(at(2)) + `}` }},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := rowOf(t, shared)
			order, _, _ := s.orderAt(0)
			times := map[int]string{}
			for i, step := range row.steps {
				s.clock.advance(time.Second)
				times[i+1] = s.now().Format(timeFormat)
				switch step {
				case "return":
					s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, `{"status":4}`), 200, "")
				case "cancel":
					s.want(s.call(adminID, "DELETE", "/api/orders/"+order, nil), 200, "")
				default:
					s.want(s.call(adminID, "PATCH", "/api/orders/"+order, step), 200, "")
				}
			}
			want := row.want(func(step int) string { return times[step] })
			for i, said := range s.deliveries(order) {
				if said != want {
					t.Errorf("%d: %s, want %s", i, said, want)
				}
			}
		})
	}
	shared.wantBalanced()
}

// A correction moves nothing, and the history tells of it but not the number.
func TestShipmentCorrected(t *testing.T) {
	s := newShop(t)
	order, _, _ := s.orderAt(1)
	parcel := func(number string) string {
		return `{"status":2,"shipment":{"carrier":"우체국택배","number":"` + number + `"}}`
	}
	const corrected = "해당 주문의 배송 정보가 변경되었습니다"
	s.want(s.call(adminID, "PATCH", "/api/orders/"+order, parcel("0000-1")), 200, advanceMessages[statusShipping])
	s.want(s.call(adminID, "PATCH", "/api/orders/"+order, parcel("0000-1")), 200, corrected) // sent twice
	s.want(s.call(adminID, "PATCH", "/api/orders/"+order, parcel("0000-2")), 200, corrected)
	s.want(s.call(adminID, "PATCH", "/api/orders/"+order, `{"status":3}`), 200, "")
	s.want(s.call(adminID, "PATCH", "/api/orders/"+order, parcel("0000-3")), 200, corrected)
	if s.statusOf(order) != statusDelivered {
		t.Errorf("status %d", s.statusOf(order))
	}
	s.want(s.call(adminID, "PATCH", "/api/orders/"+order, `{"status":2}`), 200, "")
	s.want(s.call(adminID, "PATCH", "/api/orders/"+order, `{"status":1}`), 200, "")
	s.want(s.call(adminID, "PATCH", "/api/orders/"+order, `{"status":2}`), 200, "")
	s.want(s.call(adminID, "PATCH", "/api/orders/"+order, parcel("0000-4")), 200, corrected)
	var whys []string
	var history orderHistory
	body := s.call(adminID, "GET", "/api/orders/"+order+"/history", nil).body
	check(t, json.Unmarshal([]byte(strings.ReplaceAll(body, `"at":`, `"-":`)), &history))
	for _, e := range history.History[len(history.History)-9:] {
		whys = append(whys, fmt.Sprintf("%d-%d %s", *e.From, *e.To, e.Why))
	}
	if got := strings.Join(whys, ", "); got != "0-1 preparing, 1-2 shipping, 2-2 shipment corrected, 2-3 delivered, 3-3 shipment corrected, 3-2 shipping, 2-1 preparing, 1-2 shipping, 2-2 shipment recorded" {
		t.Error(got)
	}
	if told := body + s.logged.String(); strings.Contains(told, "0000-") || strings.Contains(told, "우체국택배") {
		t.Error("the history or the log tells the parcel")
	}
}

func TestShipmentRefused(t *testing.T) {
	s := newShop(t)
	const good, wrong = `{"status":2,"shipment":{"carrier":"우체국택배","number":"0000"}}`, "변경실패, 진행 단계가 알맞지 않습니다"
	for _, row := range []struct {
		at     int
		user   string
		body   string
		status int
		naming string
	}{
		{1, adminID, `{"status":2,"shipment":{"carrier":"우체국택배"}}`, 400, "shipment.number"},
		{1, adminID, `{"status":2,"shipment":{"carrier":"우체국택배","number":" "}}`, 400, "shipment.number"},
		{1, adminID, `{"status":2,"shipment":{"carrier":"우체국택배","number":"\u0000"}}`, 400, "shipment.number"},
		{1, adminID, `{"status":2,"shipment":{"carrier":"우체국택배","number":"` + strings.Repeat("0", maxText+1) + `"}}`, 400, "shipment.number"},
		{1, adminID, `{"status":2,"shipment":{"carrier":"우체국택배","number":5}}`, 400, "shipment.number"},
		{1, adminID, `{"status":2,"shipment":{"number":"0000"}}`, 400, "shipment.carrier"},
		{1, adminID, `{"status":2,"shipment":"0000"}`, 400, "shipment"},
		{0, adminID, `{"status":1,"shipment":{"carrier":"우체국택배","number":"0000"}}`, 400, "shipment"},
		{2, adminID, `{"status":3,"shipment":{"carrier":"우체국택배","number":"0000"}}`, 400, "shipment"},
		{1, adminID, `{"shipment":{"carrier":"우체국택배","number":"0000"}}`, 400, "shipment"},
		{0, adminID, good, 400, ""}, {4, adminID, good, 400, ""}, {5, adminID, good, 400, ""}, {-1, adminID, good, 400, ""},
		{1, buyerA, good, 403, ""}, {2, buyerA, good, 403, ""}, {4, buyerA, good, 403, ""}, {1, buyerB, good, 404, ""},
	} {
		t.Run(fmt.Sprintf("%d %s %.80s", row.at, row.user, row.body), func(t *testing.T) {
			s := rowOf(t, s)
			order, _, _ := s.orderIn(row.at)
			before := s.fingerprint()
			answered := s.call(row.user, "PATCH", "/api/orders/"+order, row.body)
			if row.naming == "" {
				s.want(answered, row.status, map[int]string{400: wrong, 403: messageAdmin, 404: messageNoSuchOrder}[row.status])
			} else {
				s.wantNaming(answered, row.status, row.naming)
			}
			if s.fingerprint() != before {
				t.Error("a refused call has changed something")
			}
		})
	}
}

// A replica of the release before moves an order without a word of its parcel.
func TestShipmentMovedByTheReleaseBefore(t *testing.T) {
	s := newShop(t)
	order, _, _ := s.orderAt(1)
	s.want(s.call(adminID, "PATCH", "/api/orders/"+order, `{"status":2,"shipment":{"carrier":"우체국택배","number":"0000"}}`), 200, "")
	before := newOldReplica(t, s.config.databaseURL)
	step := func(from, to int) string {
		s.clock.advance(time.Second)
		before.change(send("step", order, from, to, s.now()))
		return s.deliveries(order)[0]
	}
	if got := step(2, 3); !strings.HasSuffix(got, `"deliveredAt":"`+s.now().Format(timeFormat)+`"}`) {
		t.Error(got)
	}
	if got := step(3, 2); !strings.Contains(got, `"0000"`) || strings.Contains(got, "deliveredAt") {
		t.Error(got)
	}
	if got := step(2, 1); got != `{}` {
		t.Error(got)
	}
	step(1, 2)
	at := s.now().Format(timeFormat)
	// One that was sent before there was a place for the time has it from the history, once it has a parcel.
	execSQL(t, s.config.databaseURL, `UPDATE orders SET shipped_at = NULL WHERE id = '`+order+`'`)
	step(2, 3)
	s.want(s.call(adminID, "PATCH", "/api/orders/"+order, `{"status":2,"shipment":{"carrier":"우체국택배","number":"0000"}}`), 200, "")
	if got := s.deliveries(order)[0]; !strings.Contains(got, `"shippedAt":"`+at+`"`) {
		t.Error(got)
	}
}

// ---- search

func TestSearch(t *testing.T) {
	s := newShop(t)
	order := func(name, phone, email, receiver, contact string) string {
		s.clock.advance(3 * 24 * time.Hour) // some share a week
		body := orderBody(newNumber(), s.painting(99000))
		body["ordererInfo"] = map[string]any{"name": name, "phoneNum": phone, "email": email, "refundTerms": "x"}
		body["deliveryInfo"] = map[string]any{"address": "x", "detailedAddress": "x", "receiver": receiver, "contactNum": contact}
		var made orderCreated
		check(t, json.Unmarshal([]byte(s.want(s.call(newTestID(), "POST", "/api/orders", body), 201, "").body), &made))
		return made.OrderID
	}
	pay := func(order string) string {
		s.want(s.report(s.charge(order, 109000)), 200, "")
		return order
	}
	const decomposed = "\u1112\u1169\u11bc\u1100\u1175\u11af\u1103\u1169\u11bc" // 홍길동
	kim := pay(order("김하나", "010-0000-0001", "Hana@Example.com", "김하나", "010-0000-0001"))
	gift := pay(order("이둘", "02) 000-0002", "two@example.com", "김하늘", "+82 10 0000 0003"))
	hong := pay(order(decomposed, "01000000004", "hong@example.com", "박%셋", "070.0000.0005"))
	odd := pay(order("100%_김", "010-000", "odd_@example.com", "100%_김", "010-000"))
	both := pay(order("김하나", "010-0000-0006", "six@example.com", "김하나둘", "010-0000-0001"))
	const wide = "\U0001d160" // of four bytes, and three such in NFC
	long := pay(order(strings.Repeat(wide, maxText), strings.Repeat("0", maxText), "@"+strings.Repeat(wide, maxText-1), strings.Repeat(wide, maxText-1), strings.Repeat("0", maxText-1)))
	check(t, s.store.applyStatusChanges(t.Context(), 3)) // the others are found before that, and kim in another status than then
	for status := range 2 {
		s.want(s.call(adminID, "PATCH", "/api/orders/"+kim, map[string]int{"status": status + 1}), 200, "")
	}
	unpaid := order("김결제전", "010-0000-0001", "unpaid@example.com", "김결제전", "010-0000-0001")
	rows := []struct {
		query, rest string
		want        []string
	}{
		{"010-0000-0001", "", []string{both, kim}}, {"01000000001", "", []string{both, kim}}, {" (010) 0000 0001 ", "", []string{both, kim}},
		{"0100000000", "", nil}, {"020000002", "", []string{gift}}, {"821000000003", "", []string{gift}}, {"07000000005", "", []string{hong}}, {"010000", "", nil},
		{"hana@example.com", "", []string{kim}}, {"TWO@EXAMPLE.COM", "", []string{gift}}, {"two@example", "", nil}, {"example.com", "", nil},
		{"odd_@example.com", "", []string{odd}}, {"oddx@example.com", "", nil},
		{"김", "", []string{both, gift, kim}}, {"김하나", "", []string{both, kim}}, {"김하나둘", "", []string{both}}, {"하나", "", nil}, {"이둘", "", []string{gift}},
		{"홍길", "", []string{hong}}, {decomposed, "", []string{hong}}, {"100%", "", []string{odd}}, {"100%_김", "", []string{odd}},
		{wide, "", []string{long}}, {strings.Repeat("0", maxSearch), "", nil},
		{"%", "", nil}, {"_", "", nil}, {"박_셋", "", nil}, {"박%", "", []string{hong}}, {`\`, "", nil}, {"'", "", nil},
		{"김", "&status=2", []string{kim}}, {"김", "&status=0", []string{both, gift}}, {"김", "&status=3", nil}, {"01000000001", "&status=2", []string{kim}},
		{"HANA@example.com", "&status=0", nil},
		{"김", "&status=-1", []string{unpaid}}, {"01000000001", "&status=-1", []string{unpaid}}, {"이", "&status=-1", nil}, {"UNPAID@example.com", "&status=-1", []string{unpaid}},
		{"김", "&number=" + s.numberOf(gift), []string{gift}}, {"이", "&number=" + s.numberOf(gift), []string{gift}}, {"홍", "&number=" + s.numberOf(gift), nil},
		{"010-0000-0001", "&number=" + s.numberOf(kim), []string{kim}}, {"hana@example.com", "&number=" + s.numberOf(kim) + "&status=2", []string{kim}},
		{"김", "&refund=stuck", nil},
	}
	for _, left := range []string{"5", "0"} {
		if n := queryText(t, s.config.databaseURL, `SELECT count(*)::text FROM status_changes`); n != left {
			t.Errorf("%s changes of status are to be applied, want %s", n, left)
		}
		for _, row := range rows {
			l := s.list(adminID, "/api/orders?q="+url.QueryEscape(row.query)+row.rest)
			if !slices.Equal(l.ids(), row.want) || l.Pages != pagesOf(len(row.want), adminPageSize) {
				t.Errorf("%q%s: %v on %d pages, want %v", row.query, row.rest, l.ids(), l.Pages, row.want)
			}
		}
		check(t, s.settler.reconcileRound(t.Context()))
	}
	s.want(s.call(adminID, "DELETE", "/api/orders/"+gift, nil), 200, "")
	s.refuseCancels()
	s.want(s.call(adminID, "DELETE", "/api/orders/"+both, nil), 502, "")
	for range stuckAfter - 1 {
		s.later(time.Hour)
	}
	if l := s.list(adminID, "/api/orders?refund=stuck&q="+url.QueryEscape("김하나둘")); !slices.Equal(l.ids(), []string{both}) {
		t.Errorf("stuck: %v", l.ids())
	}
	// What an order no longer says, it is not found by.
	s.want(s.call(adminID, "PATCH", "/api/orders/"+kim, map[string]int{"status": 3}), 200, "")
	erased := false
	for range 2 {
		for _, q := range []string{"김하나", "01000000001", "hana@example.com"} {
			if l := s.list(adminID, "/api/orders?status=3&q="+url.QueryEscape(q)); (len(l.Orders) == 0) != erased {
				t.Errorf("erased %v, %q finds %v", erased, q, l.ids())
			}
		}
		s.clock.advance(s.config.keep)
		check(t, s.settler.forgetDue(t.Context()))
		erased = true
	}
	for _, q := range []string{"", "%20", "%00", "%ff", strings.Repeat("0", maxSearch+1)} {
		s.wantNaming(s.call(adminID, "GET", "/api/orders?q="+q, nil), 400, "q")
	}
	s.want(s.call(adminID, "GET", "/api/orders?q="+strings.Repeat("0", maxSearch), nil), 200, "")
}

// Of more orders than searchBound the newest are found, on so many pages.
func TestSearchIsBounded(t *testing.T) {
	s := newShop(t)
	newLoadTest(t, s.config.databaseURL, 20000, s.now)
	newest := s.list(adminID, "/api/orders")
	for _, q := range []string{"홍", "홍길동", "010-0000-0000", "buyer@example.com"} {
		if l := s.list(adminID, "/api/orders?q="+url.QueryEscape(q)); l.Pages != searchBound/adminPageSize || !slices.Equal(l.ids(), newest.ids()) {
			t.Errorf("%q: %v on %d pages, want %v", q, l.ids(), l.Pages, newest.ids())
		}
		for page, want := range map[int]int{searchBound / adminPageSize: adminPageSize, searchBound/adminPageSize + 1: 0} {
			path := fmt.Sprintf("/api/orders?pageNumber=%d", page)
			l, all := s.list(adminID, path+"&q="+url.QueryEscape(q)), s.list(adminID, path)
			if len(l.Orders) != want || want > 0 && !slices.Equal(l.ids(), all.ids()) {
				t.Errorf("%q, page %d: %v, want %v", q, page, l.ids(), all.ids())
			}
		}
		one, all := s.list(adminID, "/api/orders?status=3&q="+url.QueryEscape(q)), s.list(adminID, "/api/orders?status=3")
		if !slices.Equal(one.ids(), all.ids()) {
			t.Errorf("%q in status 3: %v, want %v", q, one.ids(), all.ids())
		}
	}
}

// A batch leaves the changes beyond its bound, and those of an order that another transaction has locked. A transaction that changes
// one of its orders waits for its end.
func TestStatusChangesAreApplied(t *testing.T) {
	s := newDirectShop(t)
	var orders []string
	for range 6 {
		order, _, _ := s.orderAt(statusPreparing) // two changes
		orders = append(orders, order)
	}
	apply := func(most, left int) {
		t.Helper()
		check(t, s.store.applyStatusChanges(t.Context(), most))
		if n := queryText(t, s.config.databaseURL, `SELECT count(*)::text FROM status_changes`); n != fmt.Sprint(left) {
			t.Errorf("%s changes of status are left, want %d", n, left)
		}
		s.wantTrueStatusCounts()
	}
	apply(4, 8)
	release := s.holdRow(orders[5])
	apply(100, 2)
	release()
	apply(100, 0)

	s.want(s.call(adminID, "DELETE", "/api/orders/"+orders[0], `{"status":4}`), 200, "")
	s.want(s.call(adminID, "DELETE", "/api/orders/"+orders[0], nil), 200, "")
	o, err := s.store.readOrderData(t.Context(), orders[0])
	check(t, err)
	execSQL(t, s.config.databaseURL, `DELETE FROM order_search`) // as if it had not been there yet
	applying, err := s.store.pool.Begin(t.Context())
	check(t, err)
	defer applying.Rollback(context.Background())
	_, err = applying.Exec(t.Context(), applyStatusChangesQuery, 100)
	check(t, err)
	erased := make(chan error, 1)
	go func() { erased <- s.store.erase(t.Context(), byReconciler, o, s.now()) }()
	s.waitForLocks(t, 1)
	check(t, applying.Commit(t.Context()))
	check(t, <-erased)
	if n := queryText(t, s.config.databaseURL, `SELECT count(*)::text FROM order_search`); n != "0" {
		t.Errorf("%s orders are found by what was erased", n)
	}
}

// Replicas that apply changes at the same time apply each once.
func TestStatusChangesAreAppliedOnce(t *testing.T) {
	s := newDirectShop(t)
	for range 20 {
		s.paid(newTestID())
	}
	concurrently(40, func(int) answer {
		check(t, s.store.applyStatusChanges(t.Context(), 7))
		return answer{}
	})
	check(t, s.store.applyStatusChanges(t.Context(), 100))
	s.wantTrueStatusCounts()
}

func (s *shop) numberOf(order string) string {
	return queryText(s.t, s.config.databaseURL, `SELECT number FROM orders WHERE id = '`+order+`'`)
}

// ---- refunds that need a person

func TestStuckRefund(t *testing.T) {
	s := newShop(t)
	order, impUID := s.stuckRefund(buyerA)
	other, _, _ := s.paid(buyerB)
	s.want(s.call(buyerB, "DELETE", "/api/orders/"+other, nil), 502, messageRefundPending) // refused once
	if ids := s.list(adminID, "/api/orders?refund=stuck").ids(); len(ids) != 1 || ids[0] != order {
		t.Fatalf("stuck: %v, want %s", ids, order)
	}
	if ids := s.list(adminID, "/api/orders?refund=stuck&status=1").ids(); len(ids) != 0 {
		t.Fatalf("stuck and preparing: %v", ids)
	}
	s.wantNaming(s.call(adminID, "GET", "/api/orders?refund=all", nil), 400, "refund")
	s.wantMismatches(mismatchStuck, mismatchDue)
	b, err := s.store.readOpenBalances(t.Context(), s.now(), s.settler.gateways.lists())
	if err != nil || b.refunds != 1 || b.refundsStuck != 1 {
		t.Fatalf("%+v, %v", b, err)
	}

	// Without an answer nothing counts as a refusal.
	s.fake.setFaults(func(string, string) fault { return fault{before: answer500} })
	for range 5 {
		s.later(time.Hour)
	}
	if ids := s.list(adminID, "/api/orders?refund=stuck").ids(); len(ids) != 1 {
		t.Fatalf("stuck: %v", ids)
	}
	s.fake.setFaults(nil)
	s.later(time.Hour)
	if s.statusOf(order) != statusCancelled || s.row(impUID) != "refunded: "+reasonBuyerCancel {
		t.Fatalf("status %d, %s", s.statusOf(order), s.row(impUID))
	}
	s.wantBalanced()
}

func TestRefundByHand(t *testing.T) {
	s := newShop(t)
	order, impUID := s.stuckRefund(buyerA)
	path := "/api/orders/" + order + "/refund"
	byHand := map[string]string{"imp_uid": impUID, "byHand": "은행 송금"}
	for _, row := range []struct {
		body   any
		status int
		naming string
	}{
		{`{}`, 400, "imp_uid"}, {`[]`, 400, ""}, {``, 400, ""},
		{map[string]any{"imp_uid": impUID}, 400, "account"},
		{map[string]any{"imp_uid": impUID, "byHand": "x", "account": map[string]string{"holder": "가", "bank": "00", "number": "0"}}, 400, "account"},
		{map[string]any{"imp_uid": impUID, "byHand": strings.Repeat("가", maxText+1)}, 400, "byHand"},
		{map[string]any{"imp_uid": impUID, "byHand": " "}, 400, "byHand"}, {map[string]any{"imp_uid": impUID, "byHand": 5}, 400, "byHand"},
		{map[string]any{"imp_uid": impUID, "account": map[string]string{"bank": "00", "number": "0"}}, 400, "account.holder"},
		{map[string]any{"imp_uid": impUID, "account": map[string]string{"holder": "가", "number": "0"}}, 400, "account.bank"},
		{map[string]any{"imp_uid": impUID, "account": map[string]string{"holder": "가", "bank": "00"}}, 400, "account.number"},
		{map[string]any{"imp_uid": newImpUID(), "byHand": "x"}, 404, ""},
	} {
		s.wantNaming(s.call(adminID, "POST", path, row.body), row.status, row.naming)
	}
	other, otherUID, _ := s.paid(buyerB)
	s.wantNaming(s.call(adminID, "POST", "/api/orders/"+other+"/refund", map[string]string{"imp_uid": otherUID, "byHand": "x"}), 409, "imp_uid")
	s.want(s.call(adminID, "POST", "/api/orders/"+other+"/refund", byHand), 404, messageNoSuchOrder)
	if s.row(otherUID) != "kept" || s.row(impUID) != "refunding: "+reasonBuyerCancel {
		t.Fatalf("%s, %s", s.row(otherUID), s.row(impUID))
	}

	s.want(s.call(adminID, "POST", path, byHand), 200, "환불이 처리되었습니다")
	if s.statusOf(order) != statusCancelled || s.row(impUID) != "refunded: "+reasonBuyerCancel {
		t.Fatalf("status %d, %s", s.statusOf(order), s.row(impUID))
	}
	var history orderHistory
	check(t, json.Unmarshal([]byte(strings.ReplaceAll(s.call(adminID, "GET", "/api/orders/"+order+"/history", nil).body, `"at":`, `"-":`)), &history))
	last := history.History[len(history.History)-2:]
	if last[0].Why != "refunded by hand: "+reasonBuyerCancel && last[1].Why != "refunded by hand: "+reasonBuyerCancel || last[1].Who != string(actorAdministrator) {
		t.Fatalf("history: %+v", last)
	}
	s.wantNaming(s.call(adminID, "POST", path, byHand), 409, "imp_uid")

	// The audit counts it in a line of its own, and it matches.
	report := s.audit()
	if len(report.Mismatches) != 0 || report.Ledger != (auditSum{Taken: 2 * 109000, ByHand: 109000, Kept: 109000}) || report.Gateway != (auditSum{Taken: 2 * 109000, Kept: 2 * 109000}) {
		t.Fatalf("%+v", report)
	}
	// The gateway gives it back later all the same.
	check(t, s.fake.refundInConsole(impUID, 0))
	s.later(time.Second)
	s.wantMismatches(mismatchBackTwice)
}

// A refund by hand of what was paid twice leaves the order alone.
func TestRefundByHandOfADuplicate(t *testing.T) {
	s := newShop(t)
	order, kept, _ := s.paid(buyerA)
	s.refuseCancels()
	second := s.charge(order, 109000)
	s.want(s.report(second), 409, "")
	s.later(time.Hour)
	s.want(s.call(adminID, "POST", "/api/orders/"+order+"/refund", map[string]string{"imp_uid": second, "byHand": "은행 송금"}), 200, "")
	if s.statusOf(order) != statusPaid || s.row(kept) != "kept" || s.row(second) != "refunded: "+reasonDuplicate {
		t.Fatalf("status %d, %s, %s", s.statusOf(order), s.row(kept), s.row(second))
	}
	if report := s.audit(); len(report.Mismatches) != 0 {
		t.Fatalf("%+v", report.Mismatches)
	}
}

// A virtual account's refund needs an account, which is forgotten once the money is back.
func TestRefundToAnAccount(t *testing.T) {
	s := newShop(t)
	order := s.order(buyerA, s.painting(99000))
	impUID := s.account(order)
	check(t, s.fake.deposit(impUID)) // nobody was told of the account
	s.want(s.report(impUID), 200, "결제 성공")
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 502, messageRefundPending)
	path := "/api/orders/" + order + "/refund"
	body := map[string]any{"imp_uid": impUID, "account": map[string]string{"holder": "김예금", "bank": "88", "number": "990-123-456789"}}
	stored := func() string {
		return queryText(t, s.config.databaseURL, `SELECT coalesce(refund_account::text, 'none') FROM payments WHERE imp_uid = '`+impUID+`'`)
	}
	s.fake.faultOnce("cancel", fault{before: answer500})
	s.fake.faultOnce("payment", fault{})
	s.want(s.call(adminID, "POST", path, body), 503, messageRefundPending)
	if !strings.Contains(stored(), "990-123-456789") {
		t.Fatalf("the account of a refund that goes on is %s", stored())
	}
	s.later(time.Hour) // it goes on by itself, to the account
	if s.statusOf(order) != statusCancelled || s.row(impUID) != "refunded: "+reasonBuyerCancel || s.back(impUID) != 109000 {
		t.Fatalf("status %d, %s", s.statusOf(order), s.row(impUID))
	}
	if stored() != "none" {
		t.Fatal("the account is kept after the money is back")
	}
	told := s.logged.String() + s.call(adminID, "GET", "/api/orders/"+order+"/history", nil).body + s.call(adminID, "GET", "/api/orders/"+order, nil).body +
		s.call(adminID, "GET", "/api/orders", nil).body + queryText(t, s.config.databaseURL, `SELECT json_agg(h)::text FROM history h`)
	for _, private := range []string{"990-123-456789", "김예금"} {
		if strings.Contains(told, private) {
			t.Errorf("%q is told", private)
		}
	}
	s.wantBalanced()
}

// A return is taken back to where it was asked for.
func TestReturnTakenBack(t *testing.T) {
	s := newShop(t)
	for from := statusPaid; from <= statusDelivered; from++ {
		for _, user := range []string{buyerA, adminID} {
			order, _, painting := s.orderAt(from)
			s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, map[string]int{"status": 4}), 200, "")
			for to := statusUnpaid; to <= statusCancelled; to++ {
				if to != from && to != statusReturning {
					s.want(s.call(user, "PATCH", "/api/orders/"+order, map[string]int{"status": to}), 400, "")
				}
			}
			s.want(s.call(user, "PATCH", "/api/orders/"+order, map[string]int{"status": from}), 200, advanceMessages[from])
			if got := s.statusOf(order); got != from || s.inStock("", painting) {
				t.Errorf("back at %d, want %d", got, from)
			}
			// It may be asked for again, and while the money is on its way back nothing moves.
			s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, map[string]int{"status": 4}), 200, "")
			s.refuseCancels()
			s.want(s.call(adminID, "DELETE", "/api/orders/"+order, nil), 502, "")
			s.want(s.call(user, "PATCH", "/api/orders/"+order, map[string]int{"status": from}), 400, "")
			s.fake.setFaults(nil)
		}
	}
}
