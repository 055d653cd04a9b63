package main

import (
	"encoding/json"
	"fmt"
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
