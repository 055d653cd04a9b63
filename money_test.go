package main

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Money by every road: the browser's report, the gateway's notice, the reconciler, a deletion; and every way in which the
// gateway can fail beside them.

// notice tells the service of a payment as the gateway does.
func (s *shop) notice(impUID string) answer {
	s.t.Helper()
	return s.call("", "POST", "/api/payments/webhook", map[string]string{"imp_uid": impUID, "merchant_uid": "hint", "status": "paid"})
}

// row is the ledger's row of a payment: state and reason.
func (s *shop) row(impUID string) string {
	return queryText(s.t, s.config.databaseURL, `SELECT coalesce((SELECT state || coalesce(': ' || reason, '') FROM payments WHERE imp_uid = '`+impUID+`'), 'none')`)
}

// later moves the clock on and has the reconciler do what is due.
func (s *shop) later(d time.Duration) {
	s.t.Helper()
	s.clock.advance(d)
	check(s.t, s.settler.reconcileRound(s.t.Context()))
}

// refuseCancels has the gateway refuse every refund, until its faults are set anew.
func (s *shop) refuseCancels() {
	s.fake.setFaults(func(call, _ string) fault {
		if call == "cancel" {
			return fault{before: answerRefusal(-1, "거절")}
		}
		return fault{}
	})
}

// back is how much of a payment the gateway has given back.
func (s *shop) back(impUID string) int64 {
	p, _ := s.fake.get(impUID)
	return p.Cancelled
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
	if s.statusOf(order) != statusCancelled || s.row(impUID) != "refunded: "+reasonAtTheGateway || !s.inStock("", painting) {
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

func TestRefundGoesOnAfterTheProcessDied(t *testing.T) {
	s := newShop(t)
	order, impUID, _ := s.paid(buyerA)
	row, err := s.store.bookRefund(t.Context(), actor{kind: actorBuyer}, order, statusPaid, reasonBuyerCancel, s.now(), s.now().Add(refundLease))
	check(t, err)
	if row.impUID != impUID {
		t.Fatal(row)
	}
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 409, messageCancelling)
	s.later(time.Second) // somebody may still be at it
	if s.back(impUID) != 0 {
		t.Fatal("the lease was not kept")
	}
	s.later(refundLease)
	if s.back(impUID) != 109000 || s.statusOf(order) != statusCancelled {
		t.Fatalf("status %d, %d won back", s.statusOf(order), s.back(impUID))
	}
}

func TestRefundPausesGrow(t *testing.T) {
	s := newShop(t)
	order, impUID, _ := s.paid(buyerA)
	s.refuseCancels()
	s.call(buyerA, "DELETE", "/api/orders/"+order, nil)
	var pauses []string
	for range 4 {
		pauses = append(pauses, queryText(t, s.config.databaseURL, `SELECT extract(epoch FROM next_attempt_at - updated_at)::int FROM payments`))
		s.later(time.Hour)
	}
	if got := strings.Join(pauses, " "); got != "20 40 80 160" {
		t.Errorf("pauses %s", got)
	}
	if e := queryText(t, s.config.databaseURL, `SELECT last_error FROM payments`); !strings.Contains(e, "거절") {
		t.Errorf("last error %q", e)
	}
	s.fake.setFaults(nil)
	s.later(time.Hour)
	if s.back(impUID) != 109000 || s.statusOf(order) != statusCancelled {
		t.Errorf("status %d, %d won back", s.statusOf(order), s.back(impUID))
	}
}

func TestLateMoney(t *testing.T) {
	for name, row := range map[string]struct {
		end    func(s *shop, order, painting string) // how the order ends before its money is reported
		status int
		kept   bool
	}{
		"deleted, free":    {func(s *shop, o, _ string) { s.want(s.call(buyerA, "DELETE", "/api/orders/"+o, nil), 200, "") }, 200, true},
		"expired, free":    {func(s *shop, _, _ string) { s.later(time.Hour) }, 200, true},
		"replaced, own":    {func(s *shop, _, p string) { s.order(buyerA, p) }, 200, true},
		"expired, held":    {func(s *shop, _, p string) { s.later(time.Hour); s.order(buyerB, p) }, 409, false},
		"sold elsewhere":   {func(s *shop, _, p string) { s.later(time.Hour); s.sell(p) }, 409, false},
		"replaced and own": {func(s *shop, _, p string) { s.order(buyerA, s.painting(99000)) }, 200, true},
	} {
		t.Run(name, func(t *testing.T) {
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
			s.wantOneOwner()
		})
	}
}

// sell takes a painting out of the catalogue's stock, as the shop does that sells it elsewhere.
func (s *shop) sell(painting string) {
	execSQL(s.t, s.config.databaseURL, `UPDATE products SET for_sale = false WHERE id = '`+painting+`'`)
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

func TestHoldEnds(t *testing.T) {
	s := newShop(t)
	unpaid, paid := s.painting(99000), s.painting(99000)
	first, second := s.order(buyerA, unpaid), s.order(buyerB, paid)
	impUID := s.charge(second, 109000) // its browser was closed, and no notice came
	s.later(29 * time.Minute)
	if s.inStock("", unpaid) {
		t.Fatal("the hold ended early")
	}
	s.later(time.Minute)
	s.want(s.call(buyerA, "GET", "/api/orders/"+first, nil), 404, "")
	if !s.inStock("", unpaid) || s.statusOf(second) != statusPaid || s.row(impUID) != "kept" {
		t.Fatalf("in stock %v, status %d, %s", s.inStock("", unpaid), s.statusOf(second), s.row(impUID))
	}
	s.wantOneOwner()
}

// A notice may be lost of anything that happens to an order: the reconciler looks at each once more.
func TestPaidOrdersAreLookedAtOnceMore(t *testing.T) {
	s := newShop(t)
	order, kept, painting := s.paid(buyerA)
	refunded, _, freed := s.paid(buyerB)
	second := s.charge(order, 109000)
	check(t, s.fake.refundInConsole(queryText(t, s.config.databaseURL, `SELECT imp_uid FROM payments WHERE order_id = '`+refunded+`'`), 0))
	s.later(29 * time.Minute)
	if s.row(second) != "none" || s.statusOf(refunded) != statusPaid {
		t.Fatal("looked at early")
	}
	s.later(time.Minute)
	if s.row(second) != "refunded: "+reasonDuplicate || s.back(second) != 109000 || s.row(kept) != "kept" || s.inStock("", painting) {
		t.Errorf("a second payment: %s, the first %s", s.row(second), s.row(kept))
	}
	if s.statusOf(refunded) != statusCancelled || !s.inStock("", freed) {
		t.Errorf("refunded in the console: status %d", s.statusOf(refunded))
	}
	third := s.charge(order, 109000)
	s.later(30 * time.Minute) // not yet
	s.later(23 * time.Hour)
	if s.back(third) != 109000 || s.statusOf(order) != statusPaid {
		t.Errorf("a third payment: %s", s.row(third))
	}
	s.later(time.Hour)
	if n := queryText(t, s.config.databaseURL, `SELECT count(*) FROM orders WHERE next_look_at IS NOT NULL`); n != "0" {
		t.Errorf("%s orders are looked at for ever", n)
	}
}

// A right payment behind a wrong one, both unreported: the newest is not the only one.
func TestOlderPaymentBehindAWrongOne(t *testing.T) {
	s := newShop(t)
	order := s.order(buyerA, s.painting(99000))
	right := s.charge(order, 109000)
	s.clock.advance(time.Second)
	wrong := s.charge(order, 1000)
	s.refuseCancels() // the wrong one stays paid at the gateway
	s.later(30 * time.Minute)
	if s.statusOf(order) != statusPaid || s.row(right) != "kept" || s.row(wrong) != "refunding: "+reasonAmount {
		t.Errorf("right %s, wrong %s", s.row(right), s.row(wrong))
	}
}

func TestHoldWaitsForTheGateway(t *testing.T) {
	s := newShop(t)
	painting := s.painting(99000)
	order := s.order(buyerA, painting)
	s.fake.setFaults(func(string, string) fault {
		return fault{before: func(w http.ResponseWriter, r *http.Request) bool { return answer500(w, r) }}
	})
	s.later(59 * time.Minute)
	s.want(s.call(buyerA, "GET", "/api/orders/"+order, nil), 200, "")
	s.later(time.Minute)
	s.want(s.call(buyerA, "GET", "/api/orders/"+order, nil), 404, "")
	if !s.inStock("", painting) {
		t.Fatal("held for longer than twice ORDER_HOLD")
	}
	impUID := s.charge(order, 109000)
	s.fake.setFaults(nil)
	s.later(time.Minute) // the tombstone is asked about once the gateway answers
	if s.statusOf(order) != statusPaid || s.row(impUID) != "kept" {
		t.Fatalf("late money was not found: %s", s.row(impUID))
	}
}

func TestSchemaDefendsItself(t *testing.T) {
	s := newDirectShop(t)
	order, impUID, painting := s.paid(buyerA)
	held := s.painting(99000)
	unpaid := s.order(buyerB, held)
	gone := s.order(buyerA, s.painting(99000))
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+gone, nil), 200, "")
	refunding, refunded := s.charge(order, 109000), s.charge(order, 109000)
	s.want(s.report(refunded), 409, "")
	s.fake.faultOnce("cancel", fault{before: answer500})
	s.want(s.report(refunding), 409, "")

	insertPayment := `INSERT INTO payments (imp_uid, order_id, created_at, updated_at, state, reason, currency, amount, refunded)
		VALUES ('imp_x', '` + unpaid + `', now(), now(), `
	copyOrder := `INSERT INTO orders SELECT (json_populate_record(o, '{"id": "61a7adc903b7708e5dbba693", "number": "another", "ended": null}')).* FROM orders o WHERE id = '` + unpaid + `'`
	for _, row := range []struct{ sql, constraint string }{
		// A painting has one owner, who has paid for it or holds it.
		{`UPDATE products SET order_id = '000000000000000000000000'`, "products_order_exists"},
		{`UPDATE products SET order_id = '` + unpaid + `' WHERE id = '` + painting + `'`, "orders_and_paintings_agree"},
		{`UPDATE products SET order_id = NULL WHERE id = '` + held + `'`, "orders_and_paintings_agree"},
		{`UPDATE orders SET status = 5 WHERE id = '` + order + `'`, "orders_and_paintings_agree"},
		{`UPDATE orders SET ended = 'expired' WHERE id = '` + unpaid + `'`, "orders_and_paintings_agree"},
		{`UPDATE orders SET ended = NULL WHERE id = '` + gone + `'`, "orders_and_paintings_agree"},
		{`UPDATE orders SET ended = NULL, status = 0, paid_at = now() WHERE id = '` + gone + `'`, "orders_and_paintings_agree"},
		{`UPDATE orders SET ended = 'deleted' WHERE id = '` + unpaid + `'; ` + copyOrder + `;
			UPDATE orders SET status = 0, paid_at = now() WHERE number = 'another'`, "orders_and_paintings_agree"},
		{`DELETE FROM products WHERE id = '` + painting + `'`, "products_are_kept"},
		{`TRUNCATE products`, "products_are_kept"},
		// An order keeps one payment, and what went back is not kept again.
		{`INSERT INTO payments (imp_uid, order_id, state, currency, amount, created_at, updated_at) VALUES ('imp_x', '` + order + `', 'kept', 'KRW', 1, now(), now())`, "payments_one_kept_per_order"},
		{`UPDATE payments SET state = 'kept', reason = NULL WHERE imp_uid = '` + refunding + `'`, "payments_state_may_follow"},
		{`UPDATE payments SET state = 'kept', reason = NULL, refunded = 0 WHERE imp_uid = '` + refunded + `'`, "payments_state_may_follow"},
		{`UPDATE payments SET state = 'refunding', next_attempt_at = now(), leased_until = now() WHERE imp_uid = '` + refunded + `'`, "payments_state_may_follow"},
		{`UPDATE payments SET refunded = refunded - 1 WHERE imp_uid = '` + refunded + `'`, "payments_state_may_follow"},
		{`UPDATE payments SET state = 'refunded' WHERE imp_uid = '` + refunding + `'`, "payments_refunded_is_whole"},
		{`UPDATE payments SET state = 'refunding', next_attempt_at = now(), leased_until = now() WHERE imp_uid = '` + impUID + `'`, "payments_refund_has_a_reason"},
		{`UPDATE payments SET next_attempt_at = NULL WHERE imp_uid = '` + refunding + `'`, "payments_refunding_has_a_plan"},
		{`UPDATE payments SET leased_until = NULL WHERE imp_uid = '` + refunding + `'`, "payments_refunding_has_a_plan"},
		{`UPDATE payments SET refunded = amount + 1 WHERE imp_uid = '` + refunding + `'`, "payments_refund_is_bounded"},
		{`UPDATE payments SET refunded = amount WHERE imp_uid = '` + impUID + `'`, "payments_kept_is_won"},
		{`UPDATE payments SET amount = 1`, "payments_state_may_follow"},
		{`UPDATE payments SET currency = 'USD'`, "payments_state_may_follow"},
		{`UPDATE payments SET imp_uid = 'imp_x' WHERE imp_uid = '` + impUID + `'`, "payments_state_may_follow"},
		{`UPDATE payments SET order_id = '` + unpaid + `' WHERE imp_uid = '` + impUID + `'`, "payments_state_may_follow"},
		{insertPayment + `'lost', 'nobody knows', 'KRW', 109000, 0)`, "payments_state_is_known"},
		{insertPayment + `'kept', NULL, 'USD', 109000, 0)`, "payments_kept_is_won"},
		{insertPayment + `'kept', NULL, 'KRW', 109000, -1)`, "payments_refund_is_bounded"},
		// A status has its successors.
		{`UPDATE orders SET status = 2 WHERE id = '` + order + `'`, "orders_status_may_follow"},
		{`UPDATE orders SET status = 1, paid_at = now() WHERE id = '` + unpaid + `'`, "orders_status_may_follow"},
		{`UPDATE orders SET status = -1, paid_at = NULL WHERE id = '` + order + `'`, "orders_status_may_follow"},
		{`UPDATE orders SET status = 6 WHERE id = '` + order + `'`, "orders_status_may_follow"},
		{`UPDATE orders SET status = 0 WHERE id = '` + unpaid + `'`, "orders_paid_have_a_time"},
		{`UPDATE orders SET paid_at = NULL WHERE id = '` + order + `'`, "orders_paid_have_a_time"},
		{`UPDATE orders SET ended = 'deleted' WHERE id = '` + order + `'`, "orders_only_unpaid_end"},
		{`UPDATE orders SET ended = 'forgotten' WHERE id = '` + unpaid + `'`, "orders_only_unpaid_end"},
		{`UPDATE orders SET cancelling_since = now() WHERE id = '` + unpaid + `'`, "orders_cancelling_are_paid"},
		{copyOrder, "orders_one_unpaid_per_buyer"},
		{strings.Replace(copyOrder, `"another"`, `"another", "status": 6, "paid_at": "2026-03-02"`, 1), "orders_status_is_known"},
		{strings.Replace(copyOrder, `, "number": "another"`, `, "status": 0, "paid_at": "2026-03-02"`, 1), "orders_number_is_unique_per_buyer"},
		{strings.Replace(copyOrder, `"another"`, `"another", "product_ids": []`, 1), "orders_have_paintings"},
		{strings.Replace(copyOrder, `"another"`, `"another", "total_price": 10000`, 1), "orders_money_is_whole"},
		// The books keep everything.
		{`DELETE FROM orders`, "orders_are_kept"},
		{`DELETE FROM payments WHERE imp_uid = '` + impUID + `'`, "payments_are_kept"},
		{`TRUNCATE payments`, "payments_are_kept"},
		{`UPDATE history SET why = 'nothing'`, "history_are_kept"},
		{`DELETE FROM history`, "history_are_kept"},
		{`TRUNCATE history`, "history_are_kept"},
		{`TRUNCATE orders CASCADE`, "products_are_kept"},
	} {
		_, err := s.store.pool.Exec(t.Context(), row.sql, pgx.QueryExecModeSimpleProtocol)
		if err == nil || constraintOf(err) != row.constraint {
			t.Errorf("%s: %v (constraint %q)", row.sql, err, constraintOf(err))
		}
	}
	s.wantOneOwner()
}

// Two who write plain SQL at the same time, neither of whom sees what the other has not committed.
func TestSchemaDefendsItselfAgainstTwo(t *testing.T) {
	s := newDirectShop(t)
	painting := s.painting(99000)
	order, gone := s.order(buyerA, s.painting(99000)), s.order(buyerB, painting)
	s.want(s.call(buyerB, "DELETE", "/api/orders/"+gone, nil), 200, "")
	keep := `INSERT INTO payments (imp_uid, order_id, state, currency, amount, created_at, updated_at) VALUES ('imp_%[1]d', '` + order + `', 'kept', 'KRW', 109000, now(), now())`
	take := `WITH made AS (INSERT INTO orders SELECT (json_populate_record(o, '{"id": "%024[1]d", "user_id": "%024[1]d", "ended": null}')).* FROM orders o WHERE id = '` + gone + `' RETURNING id)
		UPDATE products SET order_id = made.id FROM made WHERE products.id = '` + painting + `'`
	for sql, constraint := range map[string]string{keep: "payments_one_kept_per_order", take: "orders_and_paintings_agree"} {
		first, err := s.store.pool.Begin(t.Context())
		check(t, err)
		defer first.Rollback(t.Context())
		_, err = first.Exec(t.Context(), fmt.Sprintf(sql, 1))
		check(t, err)
		second := make(chan error)
		go func() {
			_, err := s.store.pool.Exec(t.Context(), fmt.Sprintf(sql, 2)) // it waits for the first, or comes after it
			second <- err
		}()
		check(t, first.Commit(t.Context()))
		if err := <-second; constraintOf(err) != constraint {
			t.Errorf("%s: %v", sql, err)
		}
	}
	s.wantOneOwner()
}

// constraintOf names the constraint that a statement ran into.
func constraintOf(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.ConstraintName
	}
	return ""
}
