package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestDeskSteps(t *testing.T) {
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
		{0, adminID, `{"status":2}`, 400, wrong}, {1, adminID, `{"status":1}`, 400, wrong}, {2, adminID, `{"status":1}`, 400, wrong},
		{0, buyerA, `{"status":4}`, 400, wrong}, {4, buyerA, `{"status":4}`, 400, wrong}, {3, adminID, `{"status":5}`, 400, wrong},
		{0, adminID, `{"status":-1}`, 400, wrong}, {0, adminID, `{}`, 400, wrong}, {0, adminID, ``, 400, wrong},
		{0, adminID, `{"status":"1"}`, 400, ""}, {0, adminID, `{"status":1.5}`, 400, ""}, {0, adminID, `[]`, 400, ""},
		{0, buyerA, `{"status":1}`, 403, messageAdmin},
		{0, buyerB, `{"status":1}`, 404, messageNoSuchOrder}, {1, buyerB, `{"status":4}`, 404, messageNoSuchOrder},
		{0, "", `{"status":1}`, 401, messageSignIn},
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

func TestTwoDesksAtOnce(t *testing.T) {
	s := newShop(t)
	order, _, _ := s.orderAt(0)
	count := concurrently(20, func(int) answer { return s.call(adminID, "PATCH", "/api/orders/"+order, `{"status":1}`) })
	if count[200] != 1 || count[400] != 19 || s.statusOf(order) != statusPreparing {
		t.Fatalf("answers by status: %v, order %d", count, s.statusOf(order))
	}
}

// listed is what both lists answer, as far as the tests look.
type listed struct {
	Orders []struct {
		ID     string `json:"_id"`
		User   any
		Result struct{ Status int }
	}
	Status      map[string]int
	Page, Pages int
}

func (l listed) ids() (ids []string) {
	for _, o := range l.Orders {
		ids = append(ids, o.ID)
	}
	return ids
}

func (s *shop) list(user, path string) (l listed) {
	s.t.Helper()
	check(s.t, json.Unmarshal([]byte(s.want(s.call(user, "GET", path, nil), 200, "").body), &l))
	return l
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
	s.want(s.call("", "GET", "/api/orders/mine", nil), 401, messageSignIn)
}

func TestDeskList(t *testing.T) {
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
	s.want(s.call(buyerA, "GET", "/api/orders", nil), 403, messageAdmin)
	s.want(s.call("", "GET", "/api/orders", nil), 401, messageSignIn)
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
		t.Errorf("the desk sees\n%s\nwant\n%s", sorted(got), sorted(want))
	}
	if got := sorted(lines(buyerA)); got != strings.ReplaceAll(sorted(want), adminID, "") {
		t.Errorf("the buyer sees\n%s", got)
	}
	s.want(s.call(buyerB, "GET", "/api/orders/"+order+"/history", nil), 404, messageOrderUnknown)
	s.want(s.call("", "GET", "/api/orders/"+order+"/history", nil), 401, messageSignIn)
}

// historyLine is a history entry as a client reads it.
type historyLine struct {
	At, Who, WhoID, Why, RequestID string
	ImpUID                         string `json:"imp_uid"`
	Amount                         int64
}
