package main

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// personalTexts are what orderBody and the tests below say of a person.
var personalTexts = []string{"홍길동", "어느시", "101호", "010-0000-0000", "buyer@example.com", "품절", "문 앞", "문자", "송금"}

// erasedOf reports whether the personal data of an order is erased; it must be there whole or not at all.
func (s *shop) erasedOf(order string) bool {
	s.t.Helper()
	row := queryText(s.t, s.config.databaseURL, `SELECT row_to_json(o)::text || (SELECT coalesce(json_agg(p), '[]') FROM payments p WHERE order_id = o.id)
		|| (SELECT json_agg(h) FROM history h WHERE order_id = o.id) FROM orders o WHERE id = '`+order+`'`)
	there := slices.ContainsFunc(personalTexts, func(text string) bool { return strings.Contains(row, text) })
	if said := strings.Contains(row, "personal data erased"); said == there {
		s.t.Errorf("erased, says the history: %v; the books have %s", said, row)
	}
	return !there
}

// forget runs the command.
func (s *shop) forget(order string) (string, error) {
	return command(s.t.(*testing.T), s.config.databaseURL, "", "forget", "-order", order)
}

// The personal data of an order that is over goes when its time is over, and not before.
func TestForgetDue(t *testing.T) {
	s := newDirectShop(t)
	type kind struct {
		name  string
		make  func() string
		after time.Duration // of the order's last change; 0: never
	}
	ended := func(end func(order string)) func() string {
		return func() string {
			order := s.order(newTestID(), s.painting(99000))
			end(order)
			return order
		}
	}
	paid := func(status int) func() string {
		return func() string { order, _, _ := s.orderIn(status); return order }
	}
	refunding := func(order string) {
		s.refuseCancels()
		s.want(s.report(s.charge(order, 109000)), 409, "")
		s.fake.setFaults(nil)
		execSQL(t, s.config.databaseURL, `UPDATE payments SET next_attempt_at = now() + interval '100 years' WHERE state = 'refunding'`)
	}
	kinds := []kind{
		{"paid", paid(statusPaid), 0},
		{"preparing", paid(statusPreparing), 0},
		{"shipping", paid(statusShipping), 0},
		{"returning", paid(statusReturning), 0},
		{"delivered", paid(statusDelivered), s.config.keep},
		{"delivered, one painting returning", func() string { o := s.split(statusDelivered); o.askBack(0); return o.id }, 0},
		{"delivered, one painting cancelled", func() string {
			o := s.split(statusPaid)
			s.want(o.cancel(o.buyer, 0), 200, "")
			for step := 1; step <= statusDelivered; step++ {
				s.want(s.call(adminID, "PATCH", "/api/orders/"+o.id, map[string]int{"status": step}), 200, "")
			}
			return o.id
		}, s.config.keep},
		{"cancelled", paid(statusCancelled), s.config.keep},
		{"deleted", ended(func(order string) { s.want(s.call(adminID, "DELETE", "/api/orders/"+order, nil), 200, "") }), keepUnpaid},
		{"expired", ended(func(string) { s.later(s.config.hold) }), keepUnpaid},
		{"delivered, with a second payment on its way back", func() string {
			order := paid(statusDelivered)()
			refunding(order)
			return order
		}, 0},
		{"deleted, with late money on its way back", ended(func(order string) {
			s.want(s.call(adminID, "DELETE", "/api/orders/"+order, nil), 200, "")
			s.catalogue(99000, false, strings.Trim(queryText(t, s.config.databaseURL, `SELECT product_ids::text FROM orders WHERE id = '`+order+`'`), "{}"))
			refunding(order)
		}), 0},
	}
	changed, orders := map[string]string{}, map[string]kind{}
	for _, k := range kinds {
		order := k.make()
		orders[order] = k
		changed[order] = queryText(t, s.config.databaseURL, `SELECT updated_at::text FROM orders WHERE id = '`+order+`'`)
	}
	start := s.clock.Now()
	for _, after := range []time.Duration{0, keepUnpaid - time.Hour, keepUnpaid + time.Hour, s.config.keep - time.Hour, s.config.keep + time.Hour, 2 * s.config.keep} {
		s.clock.nanoseconds.Store(start.Add(after).UnixNano())
		check(t, s.settler.reconcileRound(t.Context()))
		for order, k := range orders {
			if due := k.after > 0 && after >= k.after; s.erasedOf(order) != due {
				t.Errorf("%s, after %v: erased %v", k.name, after, !due)
			}
			if now := queryText(t, s.config.databaseURL, `SELECT updated_at::text FROM orders WHERE id = '`+order+`'`); now != changed[order] {
				t.Errorf("%s: its last change moved from %s to %s", k.name, changed[order], now)
			}
		}
	}
	if n := strings.Count(s.logged.String(), `"personal data erased"`); n != 2 {
		t.Errorf("the log has %d lines of it", n)
	}
	s.wantMismatches(mismatchDue, mismatchDue)
}

// Erasing goes on in the next rounds, so many orders at a time.
func TestForgetInBatches(t *testing.T) {
	s := newDirectShop(t)
	manyPayments(t, s.config.databaseURL, 2*forgetBatch+50)
	s.clock.nanoseconds.Store(time.Date(2040, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano())
	for _, left := range []string{"150", "50", "0", "0"} {
		check(t, s.settler.forgetDue(t.Context()))
		if n := queryText(t, s.config.databaseURL, `SELECT count(*)::text FROM orders WHERE erased_at IS NULL`); n != left {
			t.Errorf("%s are left, want %s", n, left)
		}
	}
}

// However many orders there are, a round reads those that are due and no others.
func TestForgetReadsWhatIsDue(t *testing.T) {
	s := newDirectShop(t)
	manyPayments(t, s.config.databaseURL, 20000)
	check(t, s.settler.forgetDue(t.Context()))
	var plans string
	for statement, args := range maps.Clone(s.traced.args) {
		if strings.Contains(statement, "erased_at = $1") {
			rows, _ := s.store.pool.Query(t.Context(), "EXPLAIN "+statement, args...)
			plan, err := pgx.CollectRows(rows, pgx.RowTo[string])
			check(t, err)
			plans += strings.Join(plan, "\n") + "\n\n"
		}
	}
	if strings.Contains(plans, "Seq Scan on") || !strings.Contains(plans, "orders_paid_to_erase") || !strings.Contains(plans, "orders_ended_to_erase") {
		t.Error(plans)
	}
}

// An erased order is answered with every key, is no proposal for the next one, and stays in the lists and the books.
func TestErasedOrder(t *testing.T) {
	s := newDirectShop(t)
	older, _, _ := s.orderAt(statusDelivered)
	s.clock.advance(time.Hour)
	order, impUID := s.stuckRefund(buyerA)
	s.want(s.call(adminID, "POST", "/api/orders/"+order+"/refund", map[string]string{"imp_uid": impUID, "byHand": "은행 송금, 홍길동"}), 200, "")
	s.fake.setFaults(nil)
	before := s.audit().Ledger
	out, err := s.forget(order)
	if err != nil || out != "the personal data of order "+order+" is erased\n" || !s.erasedOf(order) || s.erasedOf(older) {
		t.Fatalf("%q, %v", out, err)
	}
	if out, err := s.forget(order); err != nil || !strings.Contains(out, "already") {
		t.Errorf("once more: %q, %v", out, err)
	}
	s.wantMismatches()
	if after := s.audit().Ledger; after != before || after.ByHand != 109000 {
		t.Errorf("%+v, before %+v", after, before)
	}
	for _, user := range []string{buyerA, adminID} {
		var detail orderDetail
		a := s.want(s.call(user, "GET", "/api/orders/"+order, nil), 200, "")
		check(t, json.Unmarshal([]byte(strings.NewReplacer(`"paidAt":`, `"-":`, `"updatedAt":`, `"-":`).Replace(a.body)), &detail))
		if string(detail.DeliveryInfo) != `{"address":"","detailedAddress":"","receiver":"","contactNum":""}` ||
			string(detail.DeliveryDetails) != `{"receiveAt":"","requestedTerms":""}` ||
			string(detail.OrdererInfo) != `{"name":"","phoneNum":"","email":"","refundTerms":""}` || detail.TotalPrice != 109000 {
			t.Errorf("%s", a.body)
		}
	}
	var latest latestOrder
	check(t, json.Unmarshal([]byte(s.want(s.call(buyerA, "GET", "/api/orders/latest", nil), 200, "").body), &latest))
	if latest.ID != older {
		t.Errorf("the newest order with an address is %s, not %s", latest.ID, older)
	}
	if ids := s.list(buyerA, "/api/orders/mine").ids(); !slices.Equal(ids, []string{order, older}) {
		t.Errorf("my orders: %q", ids)
	}
	a := s.want(s.call(adminID, "GET", "/api/orders?status=5", nil), 200, "")
	if !strings.Contains(a.body, order) || !strings.Contains(a.body, `"name":"","general":{"email":""}`) {
		t.Errorf("%s", a.body)
	}
	a = s.want(s.call(buyerA, "GET", "/api/orders/"+order+"/history", nil), 200, "")
	if !strings.Contains(a.body, `"who":"administrator","why":"personal data erased"`) {
		t.Errorf("%s", a.body)
	}
}

func TestForgetCommand(t *testing.T) {
	s := newDirectShop(t)
	s.clock.nanoseconds.Store(time.Now().UnixNano())
	for _, row := range []struct {
		name  string
		order func() string
		says  string // what the error says; empty: it is erased
	}{
		{"unpaid", func() string { order, _, _ := s.orderIn(statusUnpaid); return order }, "has not ended"},
		{"paid", func() string { order, _, _ := s.orderIn(statusPaid); return order }, "not delivered"},
		{"preparing", func() string { order, _, _ := s.orderIn(statusPreparing); return order }, "not delivered"},
		{"shipping", func() string { order, _, _ := s.orderIn(statusShipping); return order }, "not delivered"},
		{"delivered", func() string { order, _, _ := s.orderIn(statusDelivered); return order }, "kept until " + day(time.Now().Add(s.config.keep))},
		{"returning", func() string { order, _, _ := s.orderIn(statusReturning); return order }, "return is not done"},
		{"cancelled", func() string { order, _, _ := s.orderIn(statusCancelled); return order }, ""},
		{"ended unpaid", func() string {
			order := s.order(buyerB, s.painting(99000))
			s.want(s.call(buyerB, "DELETE", "/api/orders/"+order, nil), 200, "")
			return order
		}, ""},
		{"refunding", func() string {
			order, _, _ := s.orderIn(statusCancelled)
			s.refuseCancels()
			s.want(s.report(s.charge(order, 109000)), 409, "")
			s.fake.setFaults(nil)
			return order
		}, "refund is not done"},
		{"one painting returning", func() string { o := s.split(statusDelivered); o.askBack(0); return o.id }, "refund is not done"},
		{"delivered long ago", func() string {
			order, _, _ := s.orderIn(statusDelivered)
			execSQL(t, s.config.databaseURL, `UPDATE orders SET updated_at = updated_at - interval '6 years' WHERE id = '`+order+`'`)
			return order
		}, ""},
	} {
		order := row.order()
		out, err := s.forget(strings.ToUpper(order))
		if erased := s.erasedOf(order); (err == nil) != (row.says == "") || err != nil && !strings.Contains(err.Error(), row.says) || erased != (row.says == "") {
			t.Errorf("%s: %q, %v, erased %v", row.name, out, err, erased)
		}
	}
	for order, says := range map[string]string{newTestID(): "no order", "": "ObjectId", "me": "ObjectId"} {
		if out, err := s.forget(order); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %q, %v", order, out, err)
		}
	}
}

// An order that changes after it was read is not erased as it was.
func TestForgetIsGuarded(t *testing.T) {
	s := newDirectShop(t)
	order, _, _ := s.orderIn(statusCancelled)
	read, err := s.store.readOrderData(t.Context(), order)
	check(t, err)
	for _, change := range []func(*orderData){
		func(o *orderData) { o.status = statusDelivered },
		func(o *orderData) { o.ended = true },
		func(o *orderData) { o.updatedAt = o.updatedAt.Add(-time.Second) },
	} {
		o := read
		change(&o)
		if err := s.store.erase(t.Context(), byReconciler, o, s.now()); err != errStale || s.erasedOf(order) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	check(t, s.store.erase(t.Context(), byReconciler, read, s.now()))
	if err := s.store.erase(t.Context(), byReconciler, read, s.now()); err != errStale {
		t.Errorf("twice: %v", err)
	}
}

// Money that comes for an order whose data was erased goes back, however soon after its end: there is nowhere to send the painting.
func TestLateMoneyForAnErasedOrder(t *testing.T) {
	s := newDirectShop(t)
	order := s.order(buyerA, s.painting(99000))
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "")
	_, err := s.forget(order)
	check(t, err)
	s.refuseCancels()
	impUID := s.charge(order, 109000)
	s.want(s.report(impUID), 409, "")
	for range stuckAfter {
		s.later(time.Hour)
	}
	s.want(s.call(adminID, "POST", "/api/orders/"+order+"/refund", map[string]string{"imp_uid": impUID, "byHand": "은행 송금, 홍길동"}), 200, "")
	if s.row(impUID) != "refunded: "+reasonSold || !s.erasedOf(order) {
		t.Errorf("%s", s.row(impUID))
	}
	s.wantMismatches()
}

// A delivered order whose address is erased is never to be sent again; its return is possible.
func TestErasedOrderMoves(t *testing.T) {
	s := newDirectShop(t)
	order, impUID, _ := s.orderAt(statusDelivered)
	s.later(s.config.keep)
	if !s.erasedOf(order) {
		t.Fatal("it is not erased")
	}
	s.want(s.call(adminID, "PATCH", "/api/orders/"+order, map[string]int{"status": 2}), 400, "")
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, map[string]int{"status": 4}), 200, "")
	s.want(s.call(adminID, "PATCH", "/api/orders/"+order, map[string]int{"status": 3}), 200, "")
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, map[string]int{"status": 4}), 200, "")
	s.want(s.call(adminID, "DELETE", "/api/orders/"+order, nil), 200, "")
	s.wantMoney(impUID, 109000)
	s.erasedOf(order)
	check(t, s.store.applyStatusChanges(t.Context(), 100))
	s.wantBalancedSince(s.clock.Now().Add(-time.Hour))
}

func TestSchemaErasesForGood(t *testing.T) {
	s := newDirectShop(t)
	order, _ := s.stuckRefund(buyerA)
	impUID := queryText(t, s.config.databaseURL, `SELECT imp_uid FROM payments`)
	s.want(s.call(adminID, "POST", "/api/orders/"+order+"/refund", map[string]string{"imp_uid": impUID, "byHand": "은행 송금"}), 200, "")
	s.fake.setFaults(nil)
	byGateway, gatewayUID, _ := s.orderIn(statusCancelled)
	paid, _, _ := s.paid(buyerB)
	_, err := s.forget(byGateway)
	check(t, err)
	blank := `erased_at = now(), delivery_info = '{"address":"","detailedAddress":"","receiver":"","contactNum":""}',
		delivery_details = '{"receiveAt":"","requestedTerms":""}', orderer_info = '{"name":"","phoneNum":"","email":"","refundTerms":""}'`
	for sql, constraint := range map[string]string{
		// The texts change by erasing alone, whole and of an order that is over.
		`UPDATE orders SET delivery_info = '{}' WHERE id = '` + order + `'`:                                                                "orders_are_written_once",
		`UPDATE orders SET delivery_details = NULL WHERE id = '` + order + `'`:                                                             "orders_are_written_once",
		`UPDATE orders SET orderer_info = '{"name":""}' WHERE id = '` + order + `'`:                                                        "orders_are_written_once",
		`UPDATE orders SET erased_at = now() WHERE id = '` + order + `'`:                                                                   "orders_erased_are_empty",
		`UPDATE orders SET ` + strings.Replace(blank, `'{"receiveAt":"","requestedTerms":""}'`, "NULL", 1) + ` WHERE id = '` + order + `'`: "orders_erased_are_empty",
		`UPDATE orders SET ` + blank + ` WHERE id = '` + paid + `'`:                                                                        "orders_erased_are_over",
		// It never comes back.
		`UPDATE orders SET erased_at = NULL WHERE id = '` + byGateway + `'`:                       "orders_are_written_once",
		`UPDATE orders SET erased_at = erased_at + interval '1s' WHERE id = '` + byGateway + `'`:  "orders_are_written_once",
		`UPDATE orders SET orderer_info = '{"name":"가"}' WHERE id = '` + byGateway + `'`:          "orders_are_written_once",
		`UPDATE payments SET by_hand = 'again' WHERE imp_uid = '` + impUID + `'`:                  "payments_state_may_follow",
		`UPDATE payments SET by_hand = NULL, by_hand_amount = 0 WHERE imp_uid = '` + impUID + `'`: "payments_state_may_follow",
		`UPDATE payments SET by_hand = '', by_hand_amount = 0 WHERE imp_uid = '` + impUID + `'`:   "payments_state_may_follow",
		`UPDATE payments SET by_hand = '', reason = 'another' WHERE imp_uid = '` + impUID + `'`:   "payments_state_may_follow",
		`UPDATE payments SET by_hand = '', updated_at = now() WHERE imp_uid = '` + impUID + `'`:   "payments_state_may_follow",
		`UPDATE payments SET by_hand = '' WHERE imp_uid = '` + gatewayUID + `'`:                   "payments_state_may_follow",
	} {
		if _, err := s.store.pool.Exec(t.Context(), sql); constraintOf(err) != constraint {
			t.Errorf("%s: %v", sql, err)
		}
	}
	execSQL(t, s.config.databaseURL, `UPDATE payments SET by_hand = '' WHERE imp_uid = '`+impUID+`'`)
	execSQL(t, s.config.databaseURL, `UPDATE orders SET `+blank+` WHERE id = '`+order+`'`)
	s.wantMismatches()
}
