package main

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestPay(t *testing.T) {
	s := newShop(t, func(c *config) { c.sandbox = true })
	for _, sandbox := range []bool{false, true} {
		t.Run(fmt.Sprintf("sandbox %v", sandbox), func(t *testing.T) {
			s := rowOf(t, s)
			painting := s.painting(99000)
			order := s.order(buyerA, painting)
			impUID := s.fake.pay(fakePayment{MerchantUID: order, Amount: 109000, Sandbox: sandbox})
			for range 2 {
				s.wantBody(s.report(impUID), 200, `{"message":"결제 성공"}`)
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
			t.Parallel()
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
		{"over 4 KB", `{"imp_uid":"imp_1"}` + strings.Repeat(" ", smallBody), 413, ""},
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
			t.Parallel()
			s := newShop(t)
			painting := s.painting(99000)
			order := s.order(buyerA, painting)
			impUID := s.charge(order, 109000)
			limit := s.iamport().lookUpLimit
			s.iamport().lookUpLimit = 200 * time.Millisecond // any answer of these rows is right, however early it comes
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
			s.iamport().lookUpLimit = limit
			s.want(s.report(impUID), 200, "결제 성공")
		})
	}
}

func TestWebhook(t *testing.T) {
	s := newShop(t)
	order := s.order(buyerA, s.painting(99000))
	impUID := s.charge(order, 109000)
	ready := s.fake.pay(fakePayment{MerchantUID: order, Amount: 109000, Status: "ready"})
	foreign := s.charge("another-shop-1", 109000)
	for _, row := range []struct {
		body   string
		status int
	}{
		{`{"imp_uid":"imp_unknown"}`, 200}, {`{"imp_uid":"` + ready + `"}`, 200}, {`{"imp_uid":"` + foreign + `"}`, 200},
		{``, 400}, {`{}`, 400}, {`{"imp_uid":5}`, 400}, {`{"imp_uid":"../token"}`, 400}, {`[]`, 400}, {`imp_uid=%zz`, 400},
		{"imp_uid=" + impUID + "&merchant_uid=x&status=paid", 200}, {`{"imp_uid":"` + impUID + `","status":"paid"}`, 200},
	} {
		s.want(s.call("", "POST", "/api/payments/webhook", row.body), row.status, "")
	}
	if s.statusOf(order) != statusPaid || s.row(impUID) != "kept" || s.row(ready) != "none" || s.row(foreign) != "none" || s.back(foreign) != 0 {
		t.Fatalf("status %d, %s, %s, %s", s.statusOf(order), s.row(impUID), s.row(ready), s.row(foreign))
	}
	s.fake.faultOnce("payment", fault{before: answer500})
	if a := s.notice(impUID); a.status < 500 {
		t.Fatalf("a silent gateway: %d", a.status)
	}
}

func TestPaymentReportedManyTimesAtOnce(t *testing.T) {
	s := newShop(t)
	order := s.order(buyerA, s.painting(99000))
	first, second := s.charge(order, 109000), s.charge(order, 109000)
	count := concurrently(40, func(i int) answer { return s.report([]string{first, second}[i%2]) })
	if count[200] != 20 || count[409] != 20 {
		t.Fatalf("answers by status: %v", count)
	}
	var kept, back int64
	for _, impUID := range []string{first, second} {
		p, _ := s.fake.get(impUID)
		kept, back = kept+p.Amount-p.Cancelled, back+p.Cancelled
	}
	if kept != 109000 || back != 109000 || s.statusOf(order) != statusPaid {
		t.Fatalf("%d won kept, %d given back, status %d", kept, back, s.statusOf(order))
	}
}

func TestConsoleRefund(t *testing.T) {
	s := newShop(t)
	order, impUID, painting := s.orderAt(statusShipping)
	check(t, s.fake.refundInConsole(impUID, 9000))
	s.want(s.notice(impUID), 200, "")
	if s.statusOf(order) != statusShipping || s.row(impUID) != "kept" || queryText(t, s.config.databaseURL, `SELECT refunded FROM payments`) != "9000" {
		t.Fatalf("part refund: status %d, %s", s.statusOf(order), s.row(impUID))
	}
	check(t, s.fake.refundInConsole(impUID, 0))
	s.want(s.notice(impUID), 200, "")
	s.want(s.notice(impUID), 200, "")
	if s.statusOf(order) != statusCancelled || s.row(impUID) != "refunded: "+reasonAtTheGateway || s.inStock("", painting) {
		t.Fatalf("whole refund: status %d, %s", s.statusOf(order), s.row(impUID))
	}
}

func TestCancelThroughTrouble(t *testing.T) {
	for name, row := range map[string]struct {
		cancel fault // of the first cancel
		lookUp fault // of the look-up after it
		status int   // of the first DELETE
		calls  int   // cancels in all
	}{
		"answered":                        {fault{}, fault{}, 200, 1},
		"answer lost":                     {fault{after: dropConnection}, fault{}, 200, 1},
		"500 after the work":              {fault{after: answer500}, fault{}, 200, 1},
		"answer lost, and the look-up's":  {fault{after: dropConnection}, fault{before: answer500}, 503, 1},
		"refused":                         {fault{before: answerRefusal(-1, "결제취소에 실패하였습니다")}, fault{}, 502, 2},
		"dropped before the work":         {fault{before: dropConnection}, fault{}, 503, 2},
		"500 before the work":             {fault{before: answer500}, fault{}, 503, 2},
		"dropped before, and the look-up": {fault{before: dropConnection}, fault{before: answer500}, 503, 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t)
			order, impUID, painting := s.paid(buyerA)
			s.fake.faultOnce("cancel", row.cancel)
			s.fake.faultOnce("payment", row.lookUp)
			a := s.call(buyerA, "DELETE", "/api/orders/"+order, nil)
			if a.status != row.status && (row.status < 500 || a.status < 500) {
				t.Fatalf("answered %d %s", a.status, a.body)
			}
			if a.status != 200 {
				if s.statusOf(order) != statusPaid || s.inStock("", painting) || s.row(impUID) != "refunding: "+reasonBuyerCancel {
					t.Fatalf("status %d, %s", s.statusOf(order), s.row(impUID))
				}
				s.want(s.call(adminID, "PATCH", "/api/orders/"+order, `{"status":1}`), 400, "") // its money is on the way back
				s.later(time.Minute)
			}
			if s.statusOf(order) != statusCancelled || !s.inStock("", painting) || s.back(impUID) != 109000 || s.fake.calls("cancel") != row.calls {
				t.Fatalf("status %d, %s, %d won back in %d calls", s.statusOf(order), s.row(impUID), s.back(impUID), s.fake.calls("cancel"))
			}
		})
	}
}

func TestLateMoney(t *testing.T) {
	for name, row := range map[string]struct {
		end    func(s *shop, order, painting string) // how the order ends before its money is reported
		status int
		kept   bool
	}{
		"deleted, free":  {func(s *shop, o, _ string) { s.want(s.call(buyerA, "DELETE", "/api/orders/"+o, nil), 200, "") }, 200, true},
		"expired, free":  {func(s *shop, _, _ string) { s.later(time.Hour) }, 200, true},
		"replaced, own":  {func(s *shop, _, p string) { s.order(buyerA, p) }, 200, true},
		"expired, held":  {func(s *shop, _, p string) { s.later(time.Hour); s.order(buyerB, p) }, 409, false},
		"sold elsewhere": {func(s *shop, _, p string) { s.later(time.Hour); s.sell(p) }, 409, false},
		"expired, one sold": {func(s *shop, _, p string) {
			s.later(time.Hour)
			s.want(s.report(s.charge(s.order(buyerB, p), 109000)), 200, "")
		}, 409, false},
		"replaced and own": {func(s *shop, _, p string) { s.order(buyerA, s.painting(99000)) }, 200, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t)
			painting := s.painting(99000)
			order := s.order(buyerA, painting, s.painting(99000)) // the other one stays free
			row.end(s, order, painting)
			s.want(s.call(buyerA, "GET", "/api/orders/"+order, nil), 404, "")
			impUID := s.charge(order, 208000)
			s.want(s.report(impUID), row.status, "")
			s.want(s.report(impUID), row.status, "")
			if row.kept && (s.statusOf(order) != statusPaid || s.row(impUID) != "kept" || s.back(impUID) != 0) {
				t.Errorf("not revived: %s", s.row(impUID))
			}
			if !row.kept && (s.row(impUID) != "refunded: "+reasonSold || s.back(impUID) != 208000) {
				t.Errorf("not given back: %s", s.row(impUID))
			}
			s.wantBalanced()
		})
	}
}

func TestMoneyForACancelledOrder(t *testing.T) {
	s := newShop(t)
	order, _, _ := s.orderIn(statusCancelled)
	impUID := s.charge(order, 109000)
	s.want(s.report(impUID), 409, "이미 취소된 주문이므로 결제 금액을 환불합니다")
	s.wantMoney(impUID, 109000)
}

// sell takes a painting out of the catalogue's stock, as the shop does that sells it elsewhere.
func (s *shop) sell(painting string) {
	execSQL(s.t, s.config.databaseURL, `UPDATE products SET for_sale = false WHERE id = '`+painting+`'`)
}

// movements are the log's lines about money: of which payment, how much of it had gone back, from which state to which,
// and from which source.
func (s *shop) movements() (all []string) {
	for _, l := range s.lines("money") {
		all = append(all, fmt.Sprintf("%s %v/%v %s>%s %s", l["imp_uid"], l["refunded"], l["amount"], l["from"], l["to"], l["source"]))
	}
	return all
}

func TestEachMovementOfMoneyIsLoggedOnce(t *testing.T) {
	s := newShop(t)
	order, paid, _ := s.paid(buyerA)
	s.report(paid)
	s.notice(paid)
	forged := s.charge(s.order(buyerB, s.painting(99000)), 1000)
	s.report(forged)
	s.report(forged)
	duplicate := s.charge(order, 109000)
	s.notice(duplicate)
	check(t, s.fake.refundInConsole(paid, 9000))
	s.notice(paid)
	s.notice(paid)
	s.fake.faultOnce("cancel", fault{before: answerRefusal(-1, "거절")})
	s.call(buyerA, "DELETE", "/api/orders/"+order, nil)
	s.later(time.Minute)
	s.later(time.Minute)
	console, gone, _ := s.paid(buyerA)
	check(t, s.fake.refundInConsole(gone, 0))
	s.notice(gone)
	s.order(buyerB, s.painting(99000))
	s.later(s.config.hold) // ends without money

	want := []string{
		paid + " 0/109000 unknown>kept buyer",
		forged + " 0/1000 unknown>refunding buyer", forged + " 1000/1000 refunding>refunded buyer",
		duplicate + " 0/109000 unknown>refunding gateway", duplicate + " 109000/109000 refunding>refunded gateway",
		paid + " 9000/109000 kept>kept gateway",
		paid + " 9000/109000 kept>refunding buyer", paid + " 109000/109000 refunding>refunded reconciler",
		gone + " 0/109000 unknown>kept buyer", gone + " 109000/109000 kept>refunded gateway",
	}
	if got := s.movements(); !slices.Equal(got, want) {
		t.Errorf("logged\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, l := range s.lines("money") {
		if l["level"] != "INFO" || l["order"] == "" || (l["source"] != "reconciler") != (l["request"] != "") {
			t.Error(l)
		}
	}
	if s.lines("money")[9]["order"] != console {
		t.Errorf("of order %v, not %s", s.lines("money")[9]["order"], console)
	}
	if n := len(s.lines("refund failed")); n != 1 {
		t.Errorf("%d lines about the refusal of one refund", n)
	}
}

// Among concurrent calls too, the log has as many lines as the history has entries about money.
func TestMovementsAtOnceAreLoggedOnce(t *testing.T) {
	s := newShop(t)
	order := s.order(buyerA, s.painting(99000))
	for range 3 {
		s.charge(order, 109000)
	}
	all := s.fake.all()
	concurrently(24, func(i int) answer {
		if i%2 == 0 {
			return s.notice(all[i%3].ImpUID)
		}
		return s.report(all[i%3].ImpUID)
	})
	concurrently(8, func(int) answer { return s.call(buyerA, "DELETE", "/api/orders/"+order, nil) })
	count := map[string]int{}
	for _, l := range s.lines("money") {
		count[fmt.Sprint(l["imp_uid"], " ", l["to"])]++
	}
	if most := slices.Max(slices.Collect(maps.Values(count))); most != 1 || len(count) != 7 {
		t.Errorf("logged %v", count)
	}
	if n := queryText(t, s.config.databaseURL, `SELECT count(*) FROM history WHERE imp_uid IS NOT NULL`); n != fmt.Sprint(len(count)) {
		t.Errorf("%s entries in the history, %d in the log", n, len(count))
	}
}

// A gateway that is away for hours is two lines in the log beside those of its requests, however many refunds wait for it.
func TestRefundsThatWaitDoNotFloodTheLog(t *testing.T) {
	s := newShop(t)
	var orders []string
	for range 5 {
		order, _, _ := s.paid(newTestID())
		orders = append(orders, order)
	}
	s.fake.setFaults(func(string, string) fault { return fault{before: answer500} })
	for _, order := range orders {
		s.call(adminID, "DELETE", "/api/orders/"+order, nil)
	}
	for range 20 {
		s.later(10 * time.Minute)
	}
	s.fake.setFaults(nil)
	s.later(time.Hour)
	if n := strings.Count(s.logged.String(), `"level":"WARN"`); n != len(orders) || len(s.lines("the gateway answers again")) != 1 || len(s.lines("the gateway does not answer; payments, refunds and expiries wait")) != 1 {
		t.Errorf("%d warnings:\n%s", n, s.logged)
	}
	if n := len(s.movements()); n != 3*len(orders) {
		t.Errorf("%d movements logged", n)
	}
}

// ---- what the gateway may report besides

// A status proves nothing: money came if the payment was ever paid.
func TestPaymentThatNeverWasMoney(t *testing.T) {
	s := newShop(t)
	for name, p := range map[string]fakePayment{
		"a virtual account ended before a deposit": {Status: "cancelled", Amount: 109000, PayMethod: "vbank"},
		"a card that was registered":               {Status: "paid", Amount: 0, PaidAt: s.now()},
		"paid, without a time":                     {Status: "cancelled", Amount: 109000, Cancelled: 0},
	} {
		for _, by := range []func(string) answer{s.report, s.notice} {
			painting := s.painting(99000)
			p.MerchantUID, p.ImpUID = s.order(newTestID(), painting), ""
			impUID := s.fake.pay(p)
			a := by(impUID)
			if a.status != 400 && a.message() != "확인했습니다" {
				t.Errorf("%s: answered %d %s", name, a.status, a.body)
			}
			s.later(time.Second)
			if s.statusOf(p.MerchantUID) != statusUnpaid || s.row(impUID) != "none" {
				t.Errorf("%s: status %d, %s", name, s.statusOf(p.MerchantUID), s.row(impUID))
			}
		}
	}
	s.wantBalanced()
}

// All of a payment may be back although its status does not say so.
func TestPaymentRefundedWithoutSayingSo(t *testing.T) {
	s := newShop(t)
	order, impUID, painting := s.paid(buyerA)
	s.fake.set(impUID, func(p *fakePayment) { p.Cancelled = p.Amount })
	s.want(s.notice(impUID), 200, "확인했습니다")
	if s.statusOf(order) != statusCancelled || s.row(impUID) != "refunded: "+reasonAtTheGateway || !s.inStock("", painting) {
		t.Fatalf("status %d, %s", s.statusOf(order), s.row(impUID))
	}
	s.wantBalanced()
}

// A payment belongs to one order for ever.
func TestPaymentThatNamesAnotherOrder(t *testing.T) {
	s := newShop(t)
	first, impUID, _ := s.paid(buyerA)
	second := s.order(buyerB, s.painting(99000))
	s.fake.set(impUID, func(p *fakePayment) { p.MerchantUID = second })
	s.want(s.report(impUID), 409, "imp_uid: 이미 다른 주문에 사용된 결제입니다")
	s.want(s.notice(impUID), 200, "확인했습니다")
	s.later(time.Second)
	s.later(31 * time.Minute) // the end of the second order's hold
	if s.statusOf(first) != statusPaid || s.row(impUID) != "kept" {
		t.Fatalf("status %d, %s", s.statusOf(first), s.row(impUID))
	}
	s.want(s.call(buyerB, "GET", "/api/orders/"+second, nil), 404, "")
	report := s.audit()
	if len(report.Mismatches) != 2 || report.Mismatches[0].Kind != mismatchOtherOrder.name || report.Mismatches[1].Kind != mismatchOtherOrder.name {
		t.Fatalf("the audit finds %+v", report.Mismatches)
	}

	// It stands in the way of nothing else.
	other, otherUID, _ := s.paid(buyerB)
	s.charge(other, 109000)
	s.later(time.Second)
	if s.statusOf(other) != statusPaid || s.row(otherUID) != "kept" {
		t.Fatalf("another order: status %d, %s", s.statusOf(other), s.row(otherUID))
	}
}

// An ended order is no option on yesterday's price.
func TestLateMoneyPaysTodaysPrice(t *testing.T) {
	for name, row := range map[string]struct {
		late    time.Duration // after the order's end
		change  func(s *shop, painting string)
		revived bool
	}{
		"at once":                 {time.Minute, nil, true},
		"within a day":            {24*time.Hour - time.Minute, nil, true},
		"after a day":             {24*time.Hour + time.Minute, nil, false},
		"after 90 days":           {90 * 24 * time.Hour, nil, false},
		"the price has changed":   {time.Minute, func(s *shop, painting string) { s.catalogue(990000, true, painting) }, false},
		"no longer for sale":      {time.Minute, func(s *shop, painting string) { s.catalogue(99000, false, painting) }, false},
		"another buyer's by now":  {time.Minute, func(s *shop, painting string) { s.order(buyerB, painting) }, false},
		"the same buyer's unpaid": {time.Minute, func(s *shop, painting string) { s.order(buyerA, painting) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newDirectShop(t)
			painting := s.painting(99000)
			order := s.order(buyerA, painting)
			s.later(31 * time.Minute)
			s.later(row.late)
			if row.change != nil {
				row.change(s, painting)
			}
			impUID := s.charge(order, 109000)
			a := s.report(impUID)
			if row.revived {
				s.want(a, 200, "결제 성공")
				s.wantMoney(impUID, 0)
			} else {
				s.want(a, 409, "주문 시간이 지나 작품이 이미 판매되어 결제 금액을 환불합니다")
				s.wantMoney(impUID, 109000)
			}
			s.wantBalanced()
		})
	}
}

// A whole refund at the gateway frees a painting only if it never left the shop.
func TestRefundAtTheGatewayAfterDelivery(t *testing.T) {
	s := newShop(t)
	for status, free := range []bool{statusPaid: true, statusPreparing: true, statusShipping: false, statusDelivered: false, statusReturning: false} {
		order, impUID, painting := s.orderAt(status)
		check(t, s.fake.chargeback(impUID))
		s.later(time.Second) // no notice comes
		if s.statusOf(order) != statusCancelled || s.row(impUID) != "refunded: "+reasonAtTheGateway || s.inStock("", painting) != free {
			t.Errorf("from %d: status %d, %s, in stock: %v", status, s.statusOf(order), s.row(impUID), s.inStock("", painting))
		}
		if free {
			continue
		}
		s.want(s.call(buyerB, "POST", "/api/orders", orderBody(newNumber(), painting)), 409, "")
		s.want(s.call(adminID, "PATCH", "/api/products/"+painting, `{"forSale":true}`), 200, "")
		if !s.inStock("", painting) {
			t.Errorf("from %d: the administrator's word did not put it on sale", status)
		}
	}
	// The administrator's own cancel of a return says that the painting is back.
	order, _, painting := s.orderAt(statusReturning)
	s.want(s.call(adminID, "DELETE", "/api/orders/"+order, nil), 200, "")
	if !s.inStock("", painting) {
		t.Error("a painting that was returned is off sale")
	}
	s.wantBalanced()
}

// account has the gateway issue a virtual account for an order of one painting, and returns the imp_uid.
func (s *shop) account(order string) string {
	return s.fake.pay(fakePayment{MerchantUID: order, Amount: 109000, Status: "ready", PayMethod: "vbank"})
}

// An issued virtual account is ended; a deposit that comes all the same is late money as any other.
func TestVirtualAccount(t *testing.T) {
	const refused = "가상계좌로는 결제할 수 없어 발급된 계좌를 해지했습니다. 다른 결제 수단을 이용해 주세요"
	s := newShop(t)
	painting := s.painting(99000)
	order := s.order(buyerA, painting)
	impUID := s.account(order)
	s.fake.faultOnce("account", fault{before: answer500})
	if a := s.report(impUID); a.status < 500 {
		t.Fatalf("a gateway that does not end the account: %d %s", a.status, a.body)
	}
	s.want(s.report(impUID), 409, refused)
	if p, _ := s.fake.get(impUID); p.Status != "cancelled" {
		t.Fatalf("the account is %s", p.Status)
	}
	s.want(s.report(impUID), 400, "imp_uid: 결제가 완료되지 않았습니다")
	s.wantUntouched(order, painting)

	issued := s.account(order)
	s.want(s.notice(issued), 200, "확인했습니다")
	if p, _ := s.fake.get(issued); p.Status != "cancelled" {
		t.Fatalf("the account of the notice is %s", p.Status)
	}
	others := s.account("another-shop-1")
	s.want(s.notice(others), 200, "확인했습니다")
	if p, _ := s.fake.get(others); p.Status != "ready" {
		t.Fatalf("another shop's account is %s", p.Status)
	}

	// The buyer has just paid in: the account is not ended, and its money counts.
	deposited := s.account(order)
	s.fake.faultOnce("account", fault{before: func(http.ResponseWriter, *http.Request) bool { check(t, s.fake.deposit(deposited)); return false }})
	s.want(s.report(deposited), 409, refused)
	s.later(time.Second)
	if s.statusOf(order) != statusPaid || s.row(deposited) != "kept" {
		t.Fatalf("status %d, %s", s.statusOf(order), s.row(deposited))
	}
	s.wantBalanced()
}

// A cancel that is refused because something went back meanwhile is tried once more in the same call.
func TestCancelWithAStaleRemainder(t *testing.T) {
	s := newShop(t)
	order, impUID, _ := s.paid(buyerA)
	check(t, s.fake.refundInConsole(impUID, 9000)) // nobody was told
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "해당 주문의 결제 취소가 완료되었습니다")
	s.wantMoney(impUID, 109000)
	if n := s.fake.calls("cancel"); n != 2 {
		t.Fatalf("%d cancels were asked for", n)
	}
	s.wantBalanced()
}

// One payment that cannot be read hides no other, and the gateway does not count as down because of it.
func TestUnreadablePayment(t *testing.T) {
	s := newShop(t)
	bad, badUID, _ := s.paid(buyerA)
	s.fake.set(badUID, func(p *fakePayment) { p.Amount = -1 })
	good := s.order(buyerB, s.painting(99000))
	goodUID := s.charge(good, 109000)
	s.later(time.Second)
	if s.statusOf(good) != statusPaid || s.row(goodUID) != "kept" || s.statusOf(bad) != statusPaid {
		t.Fatalf("status %d, %s", s.statusOf(good), s.row(goodUID))
	}
	if a := s.want(s.ready(), 200, ""); strings.Contains(a.body, "not answering") {
		t.Fatalf("ready: %s", a.body)
	}
	report, err := s.auditor().audit(t.Context(), s.now().Add(-time.Hour))
	if err != nil || len(report.Mismatches) != 1 || report.Mismatches[0].Kind != mismatchUnreadable.name || report.Mismatches[0].Order != bad {
		t.Fatalf("%+v, %v", report.Mismatches, err)
	}
	if n := strings.Count(s.logged.String(), `"payment not read"`); n != 1 {
		t.Fatalf("%d lines of the log name it", n)
	}
}
