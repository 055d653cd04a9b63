package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// splitOrder is a paid order of three paintings, of 99,000 won each, of which some are cancelled or returned.
type splitOrder struct {
	*shop
	buyer, id, impUID string
	paintings         []string
}

const splitTotal = 3*99000 + 10000

// split brings a new order of three paintings to a status.
func (s *shop) split(status int) *splitOrder {
	s.t.Helper()
	o := &splitOrder{shop: s, buyer: newTestID()}
	o.id, o.paintings = s.paidFor(o.buyer, 3)
	o.impUID = queryText(s.t, s.config.databaseURL, `SELECT imp_uid FROM payments WHERE order_id = '`+o.id+`'`)
	for step := 1; step <= min(status, statusDelivered); step++ {
		s.want(s.call(adminID, "PATCH", "/api/orders/"+o.id, map[string]int{"status": step}), 200, "")
	}
	if status == statusReturning {
		s.want(s.call(o.buyer, "DELETE", "/api/orders/"+o.id, `{"status":4}`), 200, "")
	}
	return o
}

// paidFor is a paid order of user's for so many new paintings.
func (s *shop) paidFor(user string, n int) (order string, paintings []string) {
	s.t.Helper()
	paintings = s.paintings(n, 99000)
	order = s.order(user, paintings...)
	s.want(s.report(s.charge(order, int64(10000+n*99000))), 200, "결제 성공")
	return order, paintings
}

// ask sends a DELETE or PATCH for the paintings with these numbers.
func (o *splitOrder) ask(user, method string, status int, paintings ...int) answer {
	o.t.Helper()
	ids := []string{}
	for _, i := range paintings {
		ids = append(ids, o.paintings[i])
	}
	return o.call(user, method, "/api/orders/"+o.id, map[string]any{"status": status, "products": ids})
}

func (o *splitOrder) cancel(user string, paintings ...int) answer {
	o.t.Helper()
	return o.ask(user, "DELETE", 5, paintings...)
}

func (o *splitOrder) askBack(paintings ...int) {
	o.t.Helper()
	o.want(o.ask(o.buyer, "DELETE", 4, paintings...), 200, messageReturnRequested)
}

// wantParts fails unless the order shows this status, these states of its paintings ("-" for none) and this refundedPrice in all
// three places, each painting is with its order or free accordingly, and the audit finds nothing.
func (o *splitOrder) wantParts(status int, states string, refunded int64) {
	o.t.Helper()
	type shown struct {
		ID     string `json:"_id"`
		Result struct{ Status int }
		Items  []struct{ Product, State string } `json:"orderItems"`
		Total  int64                             `json:"totalPrice"`
		Back   int64                             `json:"refundedPrice"`
	}
	for _, path := range []string{"/api/orders/" + o.id, "/api/orders/mine", "/api/orders"} {
		user := o.buyer
		if path == "/api/orders" {
			user = adminID
		}
		var answer struct {
			shown
			Orders []shown
		}
		check(o.t, json.Unmarshal([]byte(o.want(o.call(user, "GET", path, nil), 200, "").body), &answer))
		for _, listed := range answer.Orders {
			if listed.ID == o.id {
				answer.shown = listed
			}
		}
		got := []string{}
		for _, item := range answer.Items {
			got = append(got, map[string]string{"": "-"}[item.State]+item.State)
		}
		if answer.Result.Status != status || strings.Join(got, " ") != states || answer.Back != refunded || answer.Total != splitTotal {
			o.t.Fatalf("%s: status %d, %q, %d of %d refunded; want %d, %q, %d", path, answer.Result.Status, got, answer.Back, answer.Total, status, states, refunded)
		}
	}
	for i, state := range strings.Fields(states) {
		if free := o.inStock("", o.paintings[i]); free != (state == "cancelled") {
			o.t.Fatalf("painting %d is %s, free: %v", i, state, free)
		}
	}
	o.wantBalanced()
}

// whys are the lines of the order's history about single paintings, and how many paintings each is about.
func (o *splitOrder) whys() (all []string) {
	o.t.Helper()
	var shown struct {
		History []struct {
			Why      string
			Products []string
			Amount   int64
		}
	}
	check(o.t, json.Unmarshal([]byte(o.want(o.call(o.buyer, "GET", "/api/orders/"+o.id+"/history", nil), 200, "").body), &shown))
	for _, h := range shown.History {
		if h.Products != nil {
			all = append(all, fmt.Sprintf("%s %d %d", h.Why, len(h.Products), h.Amount))
		}
	}
	return all
}

func TestCancelPart(t *testing.T) {
	s := newShop(t)
	o := s.split(statusPaid)
	s.wantBody(o.cancel(o.buyer, 0), 200, `{"message":"해당 주문의 결제 취소가 완료되었습니다"}`)
	s.wantMoney(o.impUID, 99000)
	o.wantParts(statusPaid, "cancelled - -", 99000)
	s.want(o.cancel(adminID, 2), 200, messageCancelled)
	s.wantMoney(o.impUID, 198000)
	o.wantParts(statusPaid, "cancelled - cancelled", 198000)
	if got, want := o.whys(), []string{"part cancel requested 1 99000", "part cancelled 1 99000", "part cancel requested 1 99000", "part cancelled 1 99000"}; !slices.Equal(got, want) {
		t.Errorf("history %q, want %q", got, want)
	}
	s.want(o.cancel(o.buyer, 1), 200, messageCancelled) // the last one, so that the shipping goes back
	s.wantMoney(o.impUID, splitTotal)
	o.wantParts(statusCancelled, "cancelled cancelled cancelled", splitTotal)

	// A painting that was cancelled can be bought again, and stays cancelled here.
	o = s.split(statusPaid)
	s.want(o.cancel(o.buyer, 0), 200, "")
	again := s.order(buyerB, o.paintings[0])
	s.want(s.report(s.charge(again, 109000)), 200, "")
	s.want(s.call(o.buyer, "DELETE", "/api/orders/"+o.id, nil), 200, messageCancelled) // the rest
	s.wantMoney(o.impUID, splitTotal)
	if s.inStock("", o.paintings[0]) || !s.inStock("", o.paintings[1]) || s.statusOf(again) != statusPaid {
		t.Error("the cancel of the rest took a painting that was sold again")
	}
	s.wantBalanced()
}

func TestReturnPart(t *testing.T) {
	s := newShop(t)
	for status := statusPaid; status <= statusDelivered; status++ {
		o := s.split(status)
		o.askBack(1)
		o.wantParts(status, "- returning -", 0)
		s.want(o.ask(o.buyer, "PATCH", status, 1), 200, advanceMessages[status])
		o.wantParts(status, "- - -", 0)
		o.askBack(0, 1)
		s.want(o.ask(adminID, "PATCH", status, 0), 200, advanceMessages[status])
		s.want(o.cancel(o.buyer, 1), 409, errReturnRequested.body.(message).Message)
		s.want(o.cancel(adminID, 1), 200, messageCancelled)
		s.wantMoney(o.impUID, 99000)
		o.wantParts(status, "- cancelled -", 99000)
		want := []string{"part return requested 1 0", "part return withdrawn 1 0", "part return requested 2 0", "part return withdrawn 1 0",
			"part cancel requested 1 99000", "part cancelled 1 99000"}
		if got := o.whys(); !slices.Equal(got, want) {
			t.Errorf("history %q, want %q", got, want)
		}
		if status < statusDelivered { // the order goes on
			s.want(s.call(adminID, "PATCH", "/api/orders/"+o.id, map[string]int{"status": status + 1}), 200, "")
			o.wantParts(status+1, "- cancelled -", 99000)
			s.want(s.call(adminID, "PATCH", "/api/orders/"+o.id, map[string]int{"status": status}), 200, "")
		}
		// All that are left: the order is returning.
		o.askBack(0)
		o.askBack(2)
		o.wantParts(statusReturning, "returning cancelled returning", 99000)
		s.want(o.ask(o.buyer, "PATCH", statusReturning, 2), 200, advanceMessages[status])
		o.wantParts(status, "returning cancelled -", 99000)
		o.askBack(2)
		s.want(s.call(o.buyer, "PATCH", "/api/orders/"+o.id, map[string]int{"status": status}), 200, advanceMessages[status])
		o.wantParts(status, "- cancelled -", 99000)
		o.askBack(0, 2)
		s.want(o.cancel(adminID, 0), 200, messageCancelled)
		s.wantMoney(o.impUID, 198000)
		o.wantParts(statusReturning, "cancelled cancelled returning", 198000)
		s.want(o.cancel(adminID, 2), 200, messageCancelled)
		s.wantMoney(o.impUID, splitTotal)
		o.wantParts(statusCancelled, "cancelled cancelled cancelled", splitTotal)
	}
	// All at once is the same as without products.
	o := s.split(statusShipping)
	o.askBack(1)
	o.askBack(0, 1, 2)
	o.wantParts(statusReturning, "returning returning returning", 0)
	s.want(o.ask(o.buyer, "PATCH", statusReturning, 0, 1, 2), 200, advanceMessages[statusShipping])
	o.wantParts(statusShipping, "- - -", 0)
	// The last one that was not asked back is cancelled: then all that are left are returning.
	o = s.split(statusPaid)
	o.askBack(0, 1)
	s.want(o.cancel(o.buyer, 2), 200, messageCancelled)
	o.wantParts(statusReturning, "returning returning cancelled", 99000)
	s.want(o.ask(o.buyer, "PATCH", statusReturning, 0), 200, advanceMessages[statusPaid])
	o.wantParts(statusPaid, "- returning cancelled", 99000)
	s.want(o.cancel(o.buyer, 0, 1), 200, messageCancelled) // all that are left, at 0
	o.wantParts(statusCancelled, "cancelled cancelled cancelled", splitTotal)
}

func TestPartRefusals(t *testing.T) {
	s := newDirectShop(t)
	raw := func(text string) func(*splitOrder) answer {
		return func(o *splitOrder) answer {
			return o.call(o.buyer, "DELETE", "/api/orders/"+o.id, strings.ReplaceAll(text, "$", o.paintings[0]))
		}
	}
	ask := func(user, method string, status int, paintings ...int) func(*splitOrder) answer {
		return func(o *splitOrder) answer {
			if user == "" {
				user = o.buyer
			}
			return o.ask(user, method, status, paintings...)
		}
	}
	for _, row := range []struct {
		name    string
		status  int
		before  func(*splitOrder)
		ask     func(*splitOrder) answer
		answer  int
		message string // part of it
	}{
		{"no list", statusPaid, nil, raw(`{"status":5,"products":"$"}`), 400, "products: "},
		{"null", statusPaid, nil, raw(`{"status":5,"products":null}`), 400, "products: "},
		{"none", statusPaid, nil, raw(`{"status":5,"products":[]}`), 400, "products: "},
		{"a number", statusPaid, nil, raw(`{"status":5,"products":[1]}`), 400, "products"},
		{"no id", statusPaid, nil, raw(`{"status":5,"products":["$","x"]}`), 400, "products[1]: "},
		{"twice", statusPaid, nil, ask("", "DELETE", 5, 0, 0), 400, "products[1]: "},
		{"another order's", statusPaid, nil, raw(`{"status":5,"products":["$","` + newTestID() + `"]}`), 400, "products[1]: "},
		{"another status", statusPaid, nil, ask("", "DELETE", 3, 0), 400, "진행 단계"},
		{"cancelled already", statusPaid, func(o *splitOrder) { o.want(o.cancel(o.buyer, 0), 200, "") }, ask("", "DELETE", 5, 1, 0), 409, "products[1]: "},
		{"a return of one that is cancelled", statusPaid, func(o *splitOrder) { o.want(o.cancel(o.buyer, 0), 200, "") }, ask("", "DELETE", 4, 0), 409, "products[0]: "},
		{"returning already", statusDelivered, func(o *splitOrder) { o.askBack(0) }, ask("", "DELETE", 4, 1, 0), 409, "products[1]: "},
		{"returning already, and the rest", statusDelivered, func(o *splitOrder) { o.askBack(0, 1) }, ask("", "DELETE", 4, 0, 2), 409, "products[0]: "},
		{"all are returning", statusReturning, nil, ask("", "DELETE", 4, 0), 409, "이미 반품을 요청한 주문"},
		{"its buyer accepts a return", statusReturning, nil, ask("", "DELETE", 5, 0), 409, "반품을 요청한 주문"},
		{"once it is prepared", statusPreparing, nil, ask(adminID, "DELETE", 5, 0), 409, "발송 준비"},
		{"one that was asked back and one that was not", statusShipping, func(o *splitOrder) { o.askBack(0) }, ask(adminID, "DELETE", 5, 0, 1), 409, "발송 준비"},
		{"a cancelled order", statusPaid, func(o *splitOrder) { o.want(o.call(o.buyer, "DELETE", "/api/orders/"+o.id, nil), 200, "") }, ask("", "DELETE", 5, 0), 409, "이미 취소된 주문"},
		{"a stranger", statusPaid, nil, ask(buyerB, "DELETE", 5, 0), 404, messageNoSuchOrder},
		{"take back what was not asked for", statusShipping, func(o *splitOrder) { o.askBack(0) }, ask("", "PATCH", 2, 1), 409, "products[0]: "},
		{"take back with another status", statusShipping, func(o *splitOrder) { o.askBack(0) }, ask("", "PATCH", 3, 0), 400, "진행 단계"},
		{"take back one of another order", statusReturning, nil, raw2(), 400, "products[0]: "},
		{"take back by a stranger", statusReturning, nil, ask(buyerB, "PATCH", 4, 0), 404, messageNoSuchOrder},
		{"take back of a cancelled order", statusPaid, func(o *splitOrder) { o.want(o.call(o.buyer, "DELETE", "/api/orders/"+o.id, nil), 200, "") }, ask("", "PATCH", 5, 0), 400, "진행 단계"},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := rowOf(t, s)
			o := s.split(row.status)
			if row.before != nil {
				row.before(o)
			}
			before := s.fingerprint()
			s.wantNaming(row.ask(o), row.answer, row.message)
			if s.fingerprint() != before {
				t.Error("a refused call has changed something")
			}
		})
	}
	// An unpaid order is deleted whole.
	paintings := s.paintings(2, 99000)
	unpaid := s.order(buyerA, paintings...)
	s.wantNaming(s.call(buyerA, "DELETE", "/api/orders/"+unpaid, map[string]any{"products": paintings[:1]}), 409, "일부 작품")
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+unpaid, map[string]any{"products": paintings}), 200, messageDeleted)
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+s.endedOrder(), map[string]any{"products": paintings[:1]}), 200, messageDeleted)
}

// raw2 takes back the return of a painting that is in no order.
func raw2() func(*splitOrder) answer {
	return func(o *splitOrder) answer {
		return o.call(o.buyer, "PATCH", "/api/orders/"+o.id, map[string]any{"status": 4, "products": []string{newTestID()}})
	}
}

// endedOrder is an order of buyerA's that ended by itself.
func (s *shop) endedOrder() string {
	o := s.order(buyerA, s.painting(99000))
	s.order(buyerA, s.painting(99000))
	return o
}

func TestPartRefundThroughTrouble(t *testing.T) {
	refusal := answerRefusal(-1, "부분취소가 지원되지 않습니다")
	for name, row := range map[string]struct {
		cancel fault // of the first cancel
		lookUp fault // of the look-up after it
		status int   // of the first DELETE
		calls  int   // cancels in all
		back   int64
	}{
		"answered":                        {fault{}, fault{}, 200, 1, 99000},
		"answer lost":                     {fault{after: dropConnection}, fault{}, 200, 1, 99000},
		"500 after the work":              {fault{after: answer500}, fault{}, 200, 1, 99000},
		"answer lost, and the look-up's":  {fault{after: dropConnection}, fault{before: answer500}, 503, 1, 99000},
		"refused":                         {fault{before: refusal}, fault{}, 409, 1, 0},
		"refused, and the look-up fails":  {fault{before: refusal}, fault{before: answer500}, 502, 2, 99000},
		"dropped before the work":         {fault{before: dropConnection}, fault{}, 503, 2, 99000},
		"500 before the work":             {fault{before: answer500}, fault{}, 503, 2, 99000},
		"dropped before, and the look-up": {fault{before: dropConnection}, fault{before: answer500}, 503, 2, 99000},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t)
			o := s.split(statusPaid)
			s.fake.faultOnce("cancel", row.cancel)
			s.fake.faultOnce("payment", row.lookUp)
			a := o.cancel(o.buyer, 1)
			if a.status != row.status {
				t.Fatalf("answered %d %s", a.status, a.body)
			}
			if a.status > 500 {
				s.want(a, row.status, messageRefundPending)
				s.want(s.call(adminID, "PATCH", "/api/orders/"+o.id, `{"status":1}`), 400, "") // its money is on the way back
				s.want(o.ask(o.buyer, "DELETE", 4, 0), 409, messageCancelling)
				s.want(o.cancel(o.buyer, 0), 409, messageCancelling)
				s.want(s.call(o.buyer, "DELETE", "/api/orders/"+o.id, nil), 409, messageCancelling)
				if row.back != s.back(o.impUID) {
					s.wantMismatches(mismatchDue)
				}
				s.later(time.Minute)
			}
			s.wantMoney(o.impUID, row.back)
			if n := s.fake.calls("cancel"); n != row.calls {
				t.Errorf("%d cancels, want %d", n, row.calls)
			}
			if row.back > 0 {
				o.wantParts(statusPaid, "- cancelled -", 99000)
				return
			}
			if got, want := o.whys(), []string{"part cancel requested 1 99000", "refund refused 1 99000"}; !slices.Equal(got, want) {
				t.Errorf("history %q, want %q", got, want)
			}
			o.wantParts(statusPaid, "- - -", 0)
			s.want(o.cancel(o.buyer, 1), 200, messageCancelled)
			o.wantParts(statusPaid, "- cancelled -", 99000)
		})
	}
}

// The same request sent again goes on with a refund whose answer was lost.
func TestPartRefundAskedForAgain(t *testing.T) {
	s := newShop(t)
	o := s.split(statusPaid)
	s.fake.faultOnce("cancel", fault{before: answer500})
	s.want(o.cancel(o.buyer, 0, 1), 503, messageRefundPending)
	s.want(o.cancel(o.buyer, 0), 409, messageCancelling)
	s.want(o.cancel(o.buyer, 0, 1, 2), 409, messageCancelling)
	s.want(o.cancel(o.buyer, 1, 0), 200, messageCancelled)
	s.wantMoney(o.impUID, 198000)
	o.wantParts(statusPaid, "cancelled cancelled -", 198000)
	s.want(o.cancel(o.buyer, 0, 1), 409, "products[0]: 이미 취소된 작품입니다")

	// While one caller is at it, no other is.
	o, before := s.split(statusPaid), s.fake.calls("cancel")
	var met atomic.Bool
	s.settler.onTestHook = func(point, _ string) {
		if point == "leased" && met.CompareAndSwap(false, true) {
			s.want(o.cancel(o.buyer, 0), 409, messageCancelling)
			check(t, s.settler.retryParts(t.Context()))
		}
	}
	s.want(o.cancel(o.buyer, 0), 200, messageCancelled)
	if asked := s.fake.calls("cancel") - before; asked != 1 {
		t.Errorf("the gateway was asked %d times", asked)
	}
}

// A failure is not noted with a refund that others have seen done meanwhile.
func TestPartRefundDoneMeanwhile(t *testing.T) {
	s := newShop(t)
	o := s.split(statusPaid)
	s.fake.faultOnce("cancel", fault{after: dropConnection})
	s.settler.onTestHook = func(point, _ string) {
		if point == "cancelled" {
			s.want(o.notice(o.impUID), 200, "")
			s.fake.faultOnce("payment", fault{before: answer500})
		}
	}
	o.cancel(o.buyer, 0)
	if got := queryText(t, s.config.databaseURL, `SELECT concat(state, ' ', last_error) FROM part_refunds`); got != "done " {
		t.Errorf("the refund is %q", got)
	}
	o.wantParts(statusPaid, "cancelled - -", 99000)
}

// The cancelled amount has grown before we have booked our own answer: what sees it first books it, once.
func TestPartRefundSeenFirstByOthers(t *testing.T) {
	for name, see := range map[string]func(*splitOrder){
		"a notice":  func(o *splitOrder) { o.want(o.notice(o.impUID), 200, "") },
		"a browser": func(o *splitOrder) { o.want(o.report(o.impUID), 200, "결제 성공") },
		"a list":    func(o *splitOrder) { check(o.t, o.settler.readList(o.t.Context(), o.iamport(), gatewayCancelled)) },
		"the reconciler, after the lease": func(o *splitOrder) {
			o.clock.advance(refundLease)
			check(o.t, o.settler.retryParts(o.t.Context()))
		},
	} {
		for how, lost := range map[string]fault{"answered": {}, "answer lost": {after: dropConnection}} {
			t.Run(name+", "+how, func(t *testing.T) {
				t.Parallel()
				s := newShop(t)
				o := s.split(statusPaid)
				s.fake.faultOnce("cancel", lost)
				seen := false
				s.settler.onTestHook = func(point, _ string) {
					if point == "cancelled" && !seen {
						seen = true
						see(o)
						o.wantParts(statusPaid, "cancelled - -", 99000)
					}
				}
				s.want(o.cancel(o.buyer, 0), 200, messageCancelled)
				s.settler.onTestHook = nil
				s.wantMoney(o.impUID, 99000)
				o.wantParts(statusPaid, "cancelled - -", 99000)
				if n := s.fake.calls("cancel"); !seen || n != 1 {
					t.Errorf("%d cancels; seen first: %v", n, seen)
				}
				if got, want := o.whys(), []string{"part cancel requested 1 99000", "part cancelled 1 99000"}; !slices.Equal(got, want) {
					t.Errorf("history %q, want %q", got, want)
				}
			})
		}
	}
}

// What goes back in the gateway's console stays apart from our refunds.
func TestPartRefundsAndTheConsole(t *testing.T) {
	console := func(o *splitOrder, won int64) {
		check(o.t, o.fake.refundInConsole(o.impUID, won))
		o.want(o.notice(o.impUID), 200, "")
	}
	for name, row := range map[string]struct {
		status   int
		do       func(*splitOrder)
		back     int64
		then     int // the status
		states   string
		refunded int64
	}{
		"a part before": {statusPaid, func(o *splitOrder) {
			console(o, 9000)
			o.want(o.cancel(o.buyer, 0), 200, "")
		}, 108000, statusPaid, "cancelled - -", 99000},
		"a part before, not noticed": {statusPaid, func(o *splitOrder) {
			check(o.t, o.fake.refundInConsole(o.impUID, 9000))
			o.want(o.cancel(o.buyer, 0), 200, "")
		}, 108000, statusPaid, "cancelled - -", 99000},
		"a part after": {statusPaid, func(o *splitOrder) {
			o.want(o.cancel(o.buyer, 0), 200, "")
			console(o, 9000)
		}, 108000, statusPaid, "cancelled - -", 99000},
		"the very same amount, while ours has no answer": {statusPaid, func(o *splitOrder) {
			o.fake.faultOnce("cancel", fault{before: dropConnection})
			o.want(o.cancel(o.buyer, 0), 503, messageRefundPending)
			console(o, 99000)
			if o.inStock("", o.paintings[0]) {
				o.t.Error("the console's refund was taken for ours")
			}
			o.later(time.Minute)
		}, 198000, statusPaid, "cancelled - -", 99000},
		"too little is left": {statusPaid, func(o *splitOrder) {
			console(o, 250000)
			o.wantNaming(o.cancel(o.buyer, 0), 409, "거절")
		}, 250000, statusPaid, "- - -", 0},
		"just enough is left": {statusPaid, func(o *splitOrder) {
			console(o, splitTotal-99000)
			o.want(o.cancel(o.buyer, 0), 200, messageCancelled)
		}, splitTotal, statusCancelled, "cancelled cancelled cancelled", splitTotal},
		"all of it, a part being cancelled": {statusPaid, func(o *splitOrder) {
			o.want(o.cancel(o.buyer, 0), 200, "")
			console(o, 0)
		}, splitTotal, statusCancelled, "cancelled cancelled cancelled", splitTotal},
		"all of it, while ours has no answer": {statusPaid, func(o *splitOrder) {
			o.fake.faultOnce("cancel", fault{before: dropConnection})
			o.want(o.cancel(o.buyer, 0), 503, messageRefundPending)
			console(o, 0)
			o.later(time.Minute)
		}, splitTotal, statusCancelled, "cancelled cancelled cancelled", splitTotal},
		"all of it, once our answer was lost": {statusPaid, func(o *splitOrder) {
			o.fake.faultOnce("cancel", fault{after: dropConnection})
			o.fake.faultOnce("payment", fault{before: answer500})
			o.want(o.cancel(o.buyer, 0), 503, messageRefundPending)
			console(o, 0)
		}, splitTotal, statusCancelled, "cancelled cancelled cancelled", splitTotal},
		"a chargeback of what was sent": {statusShipping, func(o *splitOrder) {
			o.askBack(0)
			o.want(o.cancel(adminID, 0), 200, "")
			check(o.t, o.fake.chargeback(o.impUID))
			o.want(o.notice(o.impUID), 200, "")
			if !o.inStock("", o.paintings[0]) || o.inStock("", o.paintings[1]) {
				o.t.Error("the painting that came back is not for sale, or one that left the shop is")
			}
			for _, painting := range o.paintings[1:] {
				o.want(o.call(adminID, "PATCH", "/api/products/"+painting, `{"forSale":true}`), 200, "")
			}
		}, splitTotal, statusCancelled, "cancelled cancelled cancelled", splitTotal},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := newShop(t).split(row.status)
			row.do(o)
			o.wantMoney(o.impUID, row.back)
			o.wantParts(row.then, row.states, row.refunded)
			if n := queryText(t, o.config.databaseURL, `SELECT count(*)::text FROM part_refunds WHERE state = 'booked'`); n != "0" {
				t.Errorf("%s part refunds are under way", n)
			}
		})
	}
}

// A gateway that does not list its refunds is believed when it answers our own request. When that answer is lost, nobody knows
// whose refund it was, and nothing is asked for twice.
func TestPartRefundThatIsNotListed(t *testing.T) {
	s := newShop(t)
	forget := func(o *splitOrder) { s.fake.set(o.impUID, func(p *fakePayment) { p.Refunds = nil }) }
	o := s.split(statusPaid)
	s.want(o.cancel(o.buyer, 0), 200, "")
	forget(o)
	s.want(o.cancel(o.buyer, 1), 200, "")
	o.wantParts(statusPaid, "cancelled cancelled -", 198000)

	o = s.split(statusPaid)
	s.fake.faultOnce("cancel", fault{after: func(w http.ResponseWriter, r *http.Request) bool {
		forget(o)
		unlisted := httptest.NewRequest("GET", "/payments/"+o.impUID, nil)
		unlisted.Header = r.Header
		s.fake.fakeGateway.ServeHTTP(w, unlisted)
		return true
	}})
	s.want(o.cancel(o.buyer, 0), 200, messageCancelled)
	o.wantParts(statusPaid, "cancelled - -", 99000)

	o = s.split(statusPaid)
	s.fake.faultOnce("cancel", fault{after: dropConnection})
	s.settler.onTestHook = func(point, _ string) {
		if point == "cancelled" {
			forget(o)
		}
	}
	s.want(o.cancel(o.buyer, 0), 502, messageRefundPending)
	s.settler.onTestHook = nil
	before := s.fake.calls("cancel")
	s.later(time.Hour)
	if s.fake.calls("cancel") != before {
		t.Error("it was asked for again")
	}
	found := s.wantMismatches(mismatchDue)[0]
	if found.Amount != 99000 || !strings.Contains(found.Due.LastError, "does not list") {
		t.Errorf("%+v %+v", found, found.Due)
	}
}

// A refund of a part that waits is a refund that waits: it is counted, and no person can help it. The rest of an order is helped
// as any refund.
func TestPartRefundThatWaits(t *testing.T) {
	s := newShop(t)
	o := s.split(statusPaid)
	s.fake.setFaults(func(call, _ string) fault {
		if call == "cancel" {
			return fault{before: answer500}
		}
		return fault{}
	})
	s.want(o.cancel(o.buyer, 0), 503, messageRefundPending)
	s.clock.advance(time.Minute)
	open, err := s.store.readOpenBalances(t.Context(), s.now(), s.settler.gateways.lists())
	if err != nil || open.refunds != 1 || open.refundsStuck != 0 || open.oldestRefund != time.Minute {
		t.Errorf("%+v, %v", open, err)
	}
	s.want(s.call(adminID, "POST", "/api/orders/"+o.id+"/refund", `{"imp_uid":"`+o.impUID+`","byHand":"은행 송금"}`), 409, "imp_uid: 환불할 금액이 없는 결제입니다")
	if stuck := s.list(adminID, "/api/orders?refund=stuck"); len(stuck.Orders) != 0 {
		t.Errorf("stuck: %v", stuck.ids())
	}
	s.later(24 * time.Hour)
	s.wantMismatches(mismatchDue)
	s.fake.setFaults(nil)
	s.later(time.Hour)
	o.wantParts(statusPaid, "cancelled - -", 99000)

	s.refuseCancels()
	s.want(s.call(o.buyer, "DELETE", "/api/orders/"+o.id, nil), 502, messageRefundPending)
	for range stuckAfter {
		s.later(time.Hour)
	}
	s.wantMismatches(mismatchStuck)
	s.want(s.call(adminID, "POST", "/api/orders/"+o.id+"/refund", `{"imp_uid":"`+o.impUID+`","byHand":"은행 송금"}`), 200, "")
	if got := queryText(t, s.config.databaseURL, `SELECT format('%s %s', refunded, by_hand_amount) FROM payments`); got != "307000 208000" || s.statusOf(o.id) != statusCancelled {
		t.Errorf("refunded and by hand %s, status %d", got, s.statusOf(o.id))
	}
	s.wantMismatches()
}

// What was done to another painting of the order since it was read stays done.
func TestPartsChangedMeanwhile(t *testing.T) {
	s := newShop(t)
	returning := func(paintings ...int) func(*splitOrder) answer {
		return func(o *splitOrder) answer { return o.ask(o.buyer, "DELETE", 4, paintings...) }
	}
	cancel := func(paintings ...int) func(*splitOrder) answer {
		return func(o *splitOrder) answer { return o.cancel(o.buyer, paintings...) }
	}
	failing := func(o *splitOrder) answer {
		s.fake.faultOnce("cancel", fault{before: answer500})
		return o.cancel(o.buyer, 1)
	}
	for _, row := range []struct {
		first, meanwhile func(*splitOrder) answer
		answer           int
		status           int
		want             string
		back             int64 // won
	}{
		{returning(0), returning(1), 200, statusPaid, "returning returning -", 0},
		{returning(0), returning(0), 409, statusPaid, "returning - -", 0},
		{returning(0), cancel(1), 200, statusPaid, "returning cancelled -", 99000},
		{returning(0), failing, 409, statusPaid, "- cancelled -", 99000},
		{returning(0, 2), cancel(1), 200, statusReturning, "returning cancelled returning", 99000},
		{cancel(0), returning(1), 200, statusPaid, "cancelled returning -", 99000},
		{cancel(0), returning(0), 409, statusPaid, "returning - -", 0},
		{cancel(0), cancel(1), 200, statusPaid, "cancelled cancelled -", 198000},
		{cancel(0), cancel(0), 409, statusPaid, "cancelled - -", 99000},
		{cancel(0), failing, 409, statusPaid, "- cancelled -", 99000},
	} {
		o := s.split(statusPaid)
		var met atomic.Bool
		s.settler.onTestHook = func(point, _ string) {
			if point == "state read" && met.CompareAndSwap(false, true) {
				row.meanwhile(o)
			}
		}
		s.want(row.first(o), row.answer, "")
		s.later(time.Hour) // what has failed is tried again
		o.wantParts(row.status, row.want, row.back)
	}
}

func TestPartsAtOnce(t *testing.T) {
	s := newShop(t)
	o := s.split(statusPaid)
	concurrently(12, func(i int) answer {
		switch i % 4 {
		case 0:
			return o.cancel(o.buyer, 0)
		case 1:
			return o.cancel(o.buyer, 1)
		case 2:
			return o.ask(o.buyer, "DELETE", 4, 2)
		default:
			return o.notice(o.impUID)
		}
	})
	done := queryText(t, s.config.databaseURL, `SELECT coalesce(sum(amount), 0)::text FROM part_refunds WHERE state = 'done'`)
	if back := s.back(o.impUID); done != fmt.Sprint(back) || back == 0 {
		t.Errorf("%s won of parts are done, the gateway gave back %d", done, back)
	}
	s.wantBalanced()
}

// Money that comes for an order of which a part is cancelled goes back, as for any paid order.
func TestSecondPaymentOfASplitOrder(t *testing.T) {
	s := newShop(t)
	o := s.split(statusPaid)
	s.want(o.cancel(o.buyer, 0), 200, "")
	second := s.charge(o.id, splitTotal)
	s.want(s.report(second), 409, "이미 결제된 주문이므로 중복된 결제 금액을 환불합니다")
	s.wantMoney(second, splitTotal)
	s.want(s.report(o.impUID), 200, "결제 성공")
	o.wantParts(statusPaid, "cancelled - -", 99000)
}

func TestSchemaDefendsParts(t *testing.T) {
	s := newDirectShop(t)
	owner := openTestStore(t, s.config.databaseURL) // what keeps the service's role from most of these is tested in migrate_test.go
	o := s.split(statusPaid)
	s.want(o.cancel(o.buyer, 0), 200, "")
	o.askBack(1)
	unpaid := s.order(buyerB, s.paintings(2, 99000)...)
	order, left := "'"+o.id+"'", "'"+o.paintings[2]+"'"
	insert := `INSERT INTO part_refunds (id, imp_uid, order_id, product_ids, amount, remaining_before, reason, state, created_at, updated_at, next_attempt_at, leased_until)
		VALUES ('61a7adc903b7708e5dbba693', '` + o.impUID + `', ` + order + `, ARRAY[` + left + `], `
	for _, row := range []struct{ sql, constraint string }{
		// What is cancelled was refunded, and the other way round.
		{`UPDATE orders SET cancelled_ids = '{}' WHERE id = ` + order, "orders_and_paintings_agree"},
		{`UPDATE orders SET cancelled_ids = ARRAY[` + left + `] WHERE id = ` + order, "orders_and_paintings_agree"},
		{`UPDATE products SET order_id = NULL WHERE id = ` + left, "orders_and_paintings_agree"},
		{`UPDATE orders SET cancelled_ids = cancelled_ids || ARRAY[` + left + `] WHERE id = ` + order + `; UPDATE products SET order_id = NULL WHERE id = ` + left, "orders_have_paintings_left"},
		{`UPDATE orders SET returning_ids = '{}', cancelled_ids = cancelled_ids || ARRAY[` + left + `] WHERE id = ` + order + `; UPDATE products SET order_id = NULL WHERE id = ` + left, "orders_and_parts_agree"},
		{insert + `99000, 208000, 'shop cancelled', 'done', now(), now(), now(), now())`, "orders_and_parts_agree"},
		{insert + `99000, 208000, 'shop cancelled', 'booked', now(), now(), now(), now())`, "orders_and_parts_agree"}, // and the order is not cancelling
		{`UPDATE orders SET cancelling_since = now() WHERE id = ` + order + `; ` + insert + `98999, 208000, 'shop cancelled', 'booked', now(), now(), now(), now())`, "orders_and_parts_agree"},
		{insert + `0, 208000, 'shop cancelled', 'booked', now(), now(), now(), now())`, "part_refunds_are_positive"},
		{insert + `99000, 208000, 'shop cancelled', 'lost', now(), now(), now(), now())`, "part_refunds_state_is_known"},
		{strings.Replace(insert, o.impUID, "imp_x", 1) + `99000, 208000, 'shop cancelled', 'booked', now(), now(), now(), now())`, "part_refunds_payment_exists"},
		{strings.Replace(insert, "ARRAY["+left, "ARRAY[NULL", 1) + `99000, 208000, 'shop cancelled', 'booked', now(), now(), now(), now())`, "orders_and_parts_agree"},
		{strings.Replace(insert, "ARRAY["+left+"]", "'{}'", 1) + `99000, 208000, 'shop cancelled', 'booked', now(), now(), now(), now())`, "part_refunds_have_paintings"},
		{strings.Replace(insert, "61a7adc903b7708e5dbba693", "x", 1) + `99000, 208000, 'shop cancelled', 'booked', now(), now(), now(), now())`, "part_refunds_id_is_objectid"},
		{insert + `99000, 208000, 'shop cancelled', 'booked', now(), now(), now(), now());` +
			strings.Replace(insert, "dbba693", "dbba694", 1) + `99000, 208000, 'shop cancelled', 'booked', now(), now(), now(), now())`, "part_refunds_one_booked_per_payment"},
		// What a part refund is never changes, and none is lost.
		{`UPDATE part_refunds SET amount = 1`, "part_refunds_state_may_follow"},
		{`UPDATE part_refunds SET state = 'undone'`, "part_refunds_state_may_follow"},
		{`UPDATE part_refunds SET product_ids = '{}'`, "part_refunds_state_may_follow"},
		{`DELETE FROM part_refunds`, "part_refunds_are_kept"},
		{`TRUNCATE part_refunds`, "part_refunds_are_kept"},
		// Only paintings of a paid order are asked back or cancelled, each once.
		{`UPDATE orders SET returning_ids = ARRAY['` + newTestID() + `'] WHERE id = ` + order, "orders_parts_are_theirs"},
		{`UPDATE orders SET returning_ids = cancelled_ids WHERE id = ` + order, "orders_parts_are_theirs"},
		{`UPDATE orders SET returning_ids = product_ids[2:] WHERE id = ` + order, "orders_have_paintings_left"},
		{`UPDATE orders SET returning_ids = product_ids[2:] WHERE id = '` + unpaid + `'`, "orders_parts_are_paid"},
		{`UPDATE orders SET cancelled_ids = product_ids[2:] WHERE id = '` + unpaid + `'`, "orders_parts_are_paid"},
	} {
		_, err := owner.pool.Exec(t.Context(), row.sql, pgx.QueryExecModeSimpleProtocol)
		if err == nil || constraintOf(err) != row.constraint {
			t.Errorf("%s: %v (constraint %q)", row.sql, err, constraintOf(err))
		}
	}
	o.wantParts(statusPaid, "cancelled returning -", 99000)
	// While a part is on its way back, the order is cancelling.
	s.fake.faultOnce("cancel", fault{before: answer500})
	s.want(o.cancel(o.buyer, 2), 503, messageRefundPending)
	_, err := s.store.pool.Exec(t.Context(), `UPDATE orders SET cancelling_since = NULL WHERE id = `+order)
	if constraintOf(err) != "orders_and_parts_agree" {
		t.Error(err)
	}
}

// Damage that was done while the schema's checks were off.
func TestAuditFindsDamagedParts(t *testing.T) {
	s := newDirectShop(t)
	o := s.split(statusPaid)
	s.want(o.cancel(o.buyer, 0), 200, "")
	s.wantMismatches()
	order, id := "'"+o.id+"'", o.paintings[0]
	execSQL(t, s.config.databaseURL, `
		ALTER TABLE orders DISABLE TRIGGER USER; ALTER TABLE products DISABLE TRIGGER USER; ALTER TABLE part_refunds DISABLE TRIGGER USER`)
	for _, row := range []struct {
		damage, repair string
		found          []mismatchKind
	}{
		{`UPDATE orders SET cancelled_ids = '{}' WHERE id = ` + order, `UPDATE orders SET cancelled_ids = product_ids[1:1] WHERE id = ` + order,
			[]mismatchKind{mismatchParts, mismatchMissing}},
		{`UPDATE orders SET cancelled_ids = product_ids[1:2] WHERE id = ` + order, `UPDATE orders SET cancelled_ids = product_ids[1:1] WHERE id = ` + order,
			[]mismatchKind{mismatchParts, mismatchStray}},
		{`UPDATE products SET order_id = ` + order + ` WHERE id = '` + id + `'`, `UPDATE products SET order_id = NULL WHERE id = '` + id + `'`,
			[]mismatchKind{mismatchStray}},
		{`UPDATE part_refunds SET amount = 98999`, `UPDATE part_refunds SET amount = 99000`, []mismatchKind{mismatchParts}},
		{`UPDATE part_refunds SET state = 'undone'`, `UPDATE part_refunds SET state = 'done'`, []mismatchKind{mismatchParts}},
		{`UPDATE part_refunds SET state = 'booked'`, `UPDATE part_refunds SET state = 'done'`, []mismatchKind{mismatchDueDone, mismatchParts}},
	} {
		execSQL(t, s.config.databaseURL, row.damage)
		t.Log(row.damage)
		s.wantMismatches(row.found...)
		execSQL(t, s.config.databaseURL, row.repair)
		s.wantMismatches()
	}
}

// Through V2 a part goes back as through V1. A refund that the gateway takes and finishes later is waited for; one that fails there
// is undone.
func TestPartRefundV2(t *testing.T) {
	s := newShop(t, withV2)
	split := func() *splitOrder {
		o := &splitOrder{shop: s, buyer: newTestID(), paintings: s.paintings(3, 99000)}
		o.id = s.order(o.buyer, o.paintings...)
		o.impUID = s.chargeV2(o.id, splitTotal)
		s.want(s.reportV2(o.id), 200, "결제 성공")
		return o
	}
	o := split()
	s.want(o.cancel(o.buyer, 0), 200, messageCancelled)
	s.wantMoney(o.impUID, 99000)
	o.wantParts(statusPaid, "cancelled - -", 99000)
	s.fake.set(o.impUID, func(p *fakePayment) { p.RefundsRefused = "부분취소 불가" })
	s.wantNaming(o.cancel(o.buyer, 1), 409, "거절")
	s.wantNaming(o.cancel(o.buyer, 1), 409, "거절")
	s.fake.set(o.impUID, func(p *fakePayment) { p.RefundsRefused = "" })
	s.want(o.cancel(o.buyer, 1), 200, messageCancelled) // it is no answer that the gateway remembers
	o.wantParts(statusPaid, "cancelled cancelled -", 198000)
	s.want(o.cancel(o.buyer, 2), 200, messageCancelled)
	o.wantParts(statusCancelled, "cancelled cancelled cancelled", splitTotal)

	o = split()
	s.fake.set(o.impUID, func(p *fakePayment) { p.RefundsRefused = "부분취소 불가" })
	s.settler.onTestHook = func(point, _ string) {
		if point == "cancelled" {
			s.fake.faultOnce("v2 payment", fault{before: answer500})
		}
	}
	s.wantNaming(o.cancel(o.buyer, 0), 502, messageRefundPending)
	s.settler.onTestHook = nil
	s.fake.set(o.impUID, func(p *fakePayment) { p.RefundsRefused = "" })
	s.later(time.Minute) // nor after a refusal whose look-up failed
	o.wantParts(statusPaid, "cancelled - -", 99000)

	for name, done := range map[string]bool{"done later": true, "failed later": false} {
		o = split()
		s.fake.set(o.impUID, func(p *fakePayment) { p.RefundsLate = true })
		before := s.fake.calls("v2 cancel")
		s.want(o.cancel(o.buyer, 0), 502, messageRefundPending)
		s.later(time.Minute)
		if asked := s.fake.calls("v2 cancel") - before; asked != 1 || s.back(o.impUID) != 0 {
			t.Fatalf("%s: asked for %d times, %d won are back", name, asked, s.back(o.impUID))
		}
		check(t, s.fake.act(o.impUID, false, func(p *fakePayment) string { return s.fake.endRefund(p, done) }))
		s.fake.set(o.impUID, func(p *fakePayment) { p.RefundsLate = false })
		s.later(time.Hour)
		if done {
			o.wantParts(statusPaid, "cancelled - -", 99000)
			continue
		}
		o.wantParts(statusPaid, "- - -", 0)
		if got, want := o.whys(), []string{"part cancel requested 1 99000", "refund refused 1 99000"}; !slices.Equal(got, want) {
			t.Errorf("%s: history %q, want %q", name, got, want)
		}
		s.want(o.cancel(o.buyer, 0), 200, messageCancelled)
		o.wantParts(statusPaid, "cancelled - -", 99000)
	}
}

// An order of which a painting is returning keeps its personal data; the accountant's list has the state of each painting.
func TestPartsElsewhere(t *testing.T) {
	s := newDirectShop(t)
	o := s.split(statusDelivered)
	o.askBack(0, 1)
	s.want(o.cancel(adminID, 0), 200, "")
	var states []int
	check(t, s.store.eachSoldPainting(t.Context(), s.now().Add(-time.Hour), s.now().Add(time.Hour), func(p soldPainting) error {
		states = append(states, p.status)
		return nil
	}))
	if want := []int{statusCancelled, statusReturning, statusDelivered}; !slices.Equal(states, want) {
		t.Errorf("states %d, want %d", states, want)
	}
	erase := func() int {
		n, err := s.store.eraseDue(t.Context(), byReconciler, s.now().Add(time.Hour), s.now().Add(time.Hour), s.now(), 10)
		check(t, err)
		return n
	}
	if n := erase(); n != 0 {
		t.Errorf("%d orders were erased while a painting was returning", n)
	}
	s.want(o.cancel(adminID, 1), 200, "")
	if n := erase(); n != 1 {
		t.Errorf("%d orders were erased after that", n)
	}
	o.wantParts(statusDelivered, "cancelled cancelled -", 198000)
}
