package main

import (
	"encoding/json"
	"fmt"
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
