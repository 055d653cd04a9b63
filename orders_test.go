package main

import "testing"

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
