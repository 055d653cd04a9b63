package main

import (
	"fmt"
	"sync"
	"testing"
)

// authenticate is what a buyer's payment window does under manual approval: it gets a token, and charges nothing.
func (s *shop) authenticate(order string, p fakePayment) (txID string) {
	p.Version, p.MerchantUID, p.Status, p.PaymentToken = fakeV2, order, "ready", "token-"+order
	p.Amount = max(p.Amount, 1)
	return s.fake.pay(p)
}

// approve reports the authenticated payment of an order as the browser does.
func (s *shop) approve(order string) answer { return s.approveWith(order, "token-"+order) }

func (s *shop) approveWith(order, token string) answer {
	s.t.Helper()
	return s.call("", "PATCH", "/api/orders/pay", map[string]string{"paymentId": order, "paymentToken": token})
}

// wantCharged fails unless a payment was charged, or was not.
func (s *shop) wantCharged(txID string, charged bool) {
	s.t.Helper()
	if p, _ := s.fake.get(txID); p.PaidAt.IsZero() == charged {
		s.t.Errorf("charged %v at the gateway, want %v", !charged, charged)
	}
}

func TestManualApproval(t *testing.T) {
	for name, configure := range map[string]func(*config){"beside V1": withV2, "alone": withV2Alone} {
		t.Run(name, func(t *testing.T) {
			s := newShop(t, configure)
			painting := s.painting(99000)
			order := s.order(buyerA, painting)
			txID := s.authenticate(order, fakePayment{Amount: 109000})
			s.wantNaming(s.reportV2(order), 400, "paymentId: 결제가 완료되지")
			s.wantBody(s.approve(order), 200, `{"message":"결제 성공"}`)
			s.wantCharged(txID, true)
			s.wantBody(s.approve(order), 200, `{"message":"결제 성공"}`) // again
			if n := s.fake.calls("v2 confirm"); n != 1 {
				t.Errorf("confirmed %d times", n)
			}
			s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "")
			s.wantMoney(txID, 109000)
			s.wantNaming(s.approve(order), 400, "취소된 결제")
			s.wantBalanced()
		})
	}
}

// Nothing is charged for an order that cannot be had, nor by a confirmation that the gateway refuses. The order is as it was.
func TestManualApprovalRefusals(t *testing.T) {
	for name, row := range map[string]struct {
		payment fakePayment
		before  func(s *shop, order, painting string)
		token   string
		status  int
		text    string
		payable bool // afterwards, with the right token and amount
	}{
		"forged amount":   {payment: fakePayment{Amount: 1000}, status: 400, text: "금액 불일치, 위조된 결제 시도"},
		"another token":   {token: "another", status: 400, text: "paymentToken: ", payable: true},
		"test channel":    {payment: fakePayment{Sandbox: true}, status: 400, text: "금액 불일치"},
		"dollars":         {payment: fakePayment{Currency: "USD"}, status: 400, text: "금액 불일치"},
		"card company":    {payment: fakePayment{ConfirmRefused: "한도 초과"}, status: 400, text: "paymentId: 결제가 승인되지"},
		"hold has ended":  {before: func(s *shop, _, _ string) { s.later(s.config.hold) }, status: 409, text: "주문 시간이 지나"},
		"deleted":         {before: func(s *shop, order, _ string) { s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "") }, status: 409, text: "주문 시간이 지나"},
		"replaced":        {before: func(s *shop, _, _ string) { s.order(buyerA, s.painting(99000)) }, status: 409, text: "주문 시간이 지나"},
		"paid through V1": {before: func(s *shop, order, _ string) { s.want(s.report(s.charge(order, 109000)), 200, "") }, status: 409, text: "이미 결제된"},
		"paid, then cancelled": {before: func(s *shop, order, _ string) {
			s.want(s.report(s.charge(order, 109000)), 200, "")
			s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "")
		}, status: 409, text: "이미 취소된"},
		"sold meanwhile": {before: func(s *shop, _, painting string) {
			s.later(s.config.hold)
			s.order(buyerB, painting)
		}, status: 409, text: "주문 시간이 지나"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newShop(t, withV2)
			painting := s.painting(99000)
			order := s.order(buyerA, painting)
			if row.payment.Amount == 0 {
				row.payment.Amount = 109000
			}
			txID := s.authenticate(order, row.payment)
			if row.before != nil {
				row.before(s, order, painting)
			}
			token := row.token
			if token == "" {
				token = "token-" + order
			}
			s.wantNaming(s.approveWith(order, token), row.status, row.text)
			s.wantCharged(txID, false)
			if row.payable {
				s.want(s.approve(order), 200, "결제 성공")
			}
			if n := queryText(t, s.config.databaseURL, `SELECT count(*)::text FROM orders WHERE confirming_until IS NOT NULL`); n != "0" {
				t.Errorf("%s orders are reserved", n)
			}
			s.wantBalanced()
		})
	}
	s := newShop(t, withV2)
	s.wantNaming(s.approve(newTestID()), 404, "paymentId: ")
	order := s.order(buyerA, s.painting(99000))
	s.wantNaming(s.approve(order), 404, "paymentId: ") // its window was never opened
	s.wantNaming(s.call("", "PATCH", "/api/orders/pay", map[string]string{"imp_uid": "imp_123456789012", "paymentToken": "t"}), 400, "paymentToken: paymentId와")
	s.wantNaming(s.call("", "PATCH", "/api/orders/pay", map[string]any{"paymentId": order, "paymentToken": 1}), 400, "paymentToken: 형식")
}

// While a confirmation is under way its order neither ends nor gets another, whatever asks for it.
func TestNothingEndsAnOrderThatIsConfirmed(t *testing.T) {
	for name, try := range map[string]func(s *shop, order, painting string){
		"delete": func(s *shop, order, _ string) {
			s.wantNaming(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 409, "결제를 확인하는 중")
		},
		"replace": func(s *shop, _, painting string) {
			s.wantNaming(s.create(buyerA, newNumber(), painting), 409, "결제를 확인하는 중")
			s.wantNaming(s.create(buyerA, newNumber(), s.painting(99000)), 409, "결제를 확인하는 중")
		},
		"take off sale": func(s *shop, _, painting string) {
			s.want(s.call(adminID, "PATCH", "/api/products/"+painting, map[string]bool{"forSale": false}), 409, "")
		},
		"the hold's end": func(s *shop, order, _ string) {
			execSQL(s.t, s.config.databaseURL, `UPDATE orders SET held_until = created_at, next_look_at = created_at WHERE id = '`+order+`'`)
			check(s.t, s.settler.reconcileRound(s.t.Context()))
		},
		"confirm again": func(s *shop, order, _ string) {
			s.wantNaming(s.approve(order), 409, "결제를 확인하는 중")
		},
		"late money of an older order": func(s *shop, order, painting string) {
			// The buyer's order before, for the same painting, was paid after all: its money must not take the painting away.
			older := queryText(s.t, s.config.databaseURL, `SELECT id FROM orders WHERE ended = 'replaced'`)
			s.want(s.report(s.charge(older, 109000)), 409, "")
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newShop(t, withV2)
			painting := s.painting(99000)
			s.order(buyerA, painting)
			order := s.order(buyerA, painting) // replaces the one before
			txID := s.authenticate(order, fakePayment{Amount: 109000})
			tried := false
			s.onceAt("reserved", func(string) { tried = true; try(s, order, painting) })
			s.want(s.approve(order), 200, "결제 성공")
			if !tried || s.statusOf(order) != statusPaid {
				t.Errorf("tried %v, status %d", tried, s.statusOf(order))
			}
			s.wantCharged(txID, true)
			s.wantMoney(txID, 0)
			s.wantBalanced()
		})
	}
}

// Whatever the confirmation's answer is lost to, the order ends paid, or never charged.
func TestManualApprovalThroughTrouble(t *testing.T) {
	for name, row := range map[string]struct {
		confirm, lookUp fault
		status          int // of the first answer
		charged         bool
	}{
		"never arrived":               {confirm: fault{before: answer500}, status: 503},
		"answer lost":                 {confirm: fault{after: answer500}, status: 200, charged: true},
		"answer lost, look-up lost":   {confirm: fault{after: answer500}, lookUp: fault{before: answer500}, status: 503, charged: true},
		"never arrived, look-up lost": {confirm: fault{before: answer500}, lookUp: fault{before: answer500}, status: 503},
		"confirmed, look-up lost":     {lookUp: fault{before: answer500}, status: 503, charged: true},
	} {
		for _, then := range []string{"reported again", "notice", "reconciler", "reconciler after the hold"} {
			t.Run(name+", "+then, func(t *testing.T) {
				s := newShop(t, withV2)
				painting := s.painting(99000)
				order := s.order(buyerA, painting)
				txID := s.authenticate(order, fakePayment{Amount: 109000})
				s.fake.faultOnce("v2 confirm", row.confirm)
				s.fake.faultOnce("v2 payment", row.lookUp)
				s.want(s.approve(order), row.status, "")
				switch then {
				case "reported again":
					s.approve(order)
				case "notice":
					s.noticeV2(txID)
				case "reconciler":
					s.later(s.config.reconcile)
				case "reconciler after the hold":
					s.later(s.config.hold + confirmationLease)
				}
				s.wantCharged(txID, row.charged)
				switch paid := queryText(t, s.config.databaseURL, `SELECT status::text FROM orders WHERE id = '`+order+`'`) == "0"; {
				case paid != row.charged:
					t.Errorf("charged %v, paid %v", row.charged, paid)
				case !paid:
					s.later(confirmationLease)
					s.later(s.config.hold)
					if !s.inStock(buyerB, painting) {
						t.Error("the painting is still held")
					}
				}
				s.wantMoney(txID, 0)
				s.wantBalanced()
			})
		}
	}
}

// The program ends between two steps of a confirmation.
func TestCrashDuringManualApproval(t *testing.T) {
	for _, at := range []string{"reserved", "confirmed", "looked up", "booked"} {
		t.Run(at, func(t *testing.T) {
			s := newShop(t, withV2)
			painting := s.painting(99000)
			order := s.order(buyerA, painting)
			txID := s.authenticate(order, fakePayment{Amount: 109000})
			s.onceAt(at, func(string) { panic("crash") })
			s.want(s.approve(order), 500, "")
			s.settler.onTestHook = nil
			s.later(s.config.reconcile)
			s.later(confirmationLease)
			p, _ := s.fake.get(txID)
			if charged, paid := !p.PaidAt.IsZero(), s.statusOf(order) == statusPaid; charged != paid || charged == (at == "reserved") {
				t.Errorf("charged %v, paid %v", charged, paid)
			}
			s.wantMoney(txID, 0)
			s.later(s.config.hold)
			s.wantBalanced()
		})
	}
}

// Two hundred buyers have each authenticated a payment for the same painting, and report it at once. One is charged.
func TestManualApprovalRace(t *testing.T) {
	heavy(t)
	const buyers = 200
	s := newDirectShop(t, withV2)
	painting := s.painting(99000)
	orders, payments := make([]string, buyers), make([]string, buyers)
	for i := range buyers {
		if i > 0 {
			s.later(s.config.hold) // the order before has ended, and its window is still open
		}
		orders[i] = s.order(fmt.Sprintf("%024x", i+1), painting)
		payments[i] = s.authenticate(orders[i], fakePayment{Amount: 109000})
	}
	answers := make([]answer, buyers)
	var wg sync.WaitGroup
	for i := range buyers {
		wg.Go(func() { answers[i] = s.approve(orders[i]) })
	}
	wg.Wait()
	charged, won := 0, 0
	for i, a := range answers {
		p, _ := s.fake.get(payments[i])
		if !p.PaidAt.IsZero() {
			charged++
		}
		switch {
		case a.status == 200:
			won++
		case a.status != 409:
			t.Errorf("buyer %d: %d %s", i, a.status, a.body)
		}
	}
	if charged != 1 || won != 1 {
		t.Errorf("%d charged, %d told so", charged, won)
	}
	s.wantBalanced()
}
