package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Guards of the money's code against what may come between two of its steps. Each test stops one caller at a test point, or with
// a lock in the database, and lets another one go by.

// onceAt runs do when the settler comes to a test point for the first time.
func (s *shop) onceAt(point string, do func(id string)) {
	var came atomic.Bool
	s.settler.onTestHook = func(at, id string) {
		if at == point && !came.Swap(true) {
			do(id)
		}
	}
}

// column is a column of a payment's row as text; "" for null.
func (s *shop) column(impUID, column string) string {
	s.t.Helper()
	return queryText(s.t, s.config.databaseURL, `SELECT coalesce((SELECT `+column+` FROM payments WHERE imp_uid = '`+impUID+`')::text, '')`)
}

// holdRow locks an order's row in a transaction of its own until release is called.
func (s *shop) holdRow(order string) (release func()) {
	s.t.Helper()
	conn, err := pgx.Connect(s.t.Context(), s.config.databaseURL)
	check(s.t, err)
	s.t.Cleanup(func() { conn.Close(context.Background()) })
	_, err = conn.Exec(s.t.Context(), `BEGIN`)
	check(s.t, err)
	_, err = conn.Exec(s.t.Context(), `SELECT FROM orders WHERE id = $1 FOR UPDATE`, order)
	check(s.t, err)
	return func() {
		s.t.Helper()
		_, err := conn.Exec(s.t.Context(), `ROLLBACK`)
		check(s.t, err)
	}
}

// waitForLocks waits until so many sessions of the shop's database wait for a lock.
func (s *shop) waitForLocks(t *testing.T, n int) {
	t.Helper()
	waitUntil(t, fmt.Sprintf("%d sessions wait for a lock", n), func() bool {
		return queryText(t, s.config.databaseURL, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock'`) == fmt.Sprint(n)
	})
}

// ---- the end of a hold

// A check before a hold's end, as the audit asks for one, leaves the hold and the check at its end as they are.
func TestEarlyCheck(t *testing.T) {
	s := newShop(t)
	painting := s.painting(99000)
	order := s.order(buyerA, painting)
	s.clock.advance(29 * time.Minute)
	check(t, s.store.checkSoon(t.Context(), order, s.now()))
	s.later(0)
	if n := s.fake.calls("findAll"); n != 1 {
		t.Fatalf("the gateway was asked %d times", n)
	}
	s.want(s.call(buyerA, "GET", "/api/orders/"+order, nil), 200, "")
	s.later(time.Minute)
	s.want(s.call(buyerA, "GET", "/api/orders/"+order, nil), 404, "")
	if !s.inStock("", painting) {
		t.Error("the hold did not end at its time")
	}
}

// A hold that its buyer begins anew while the gateway is asked about it goes on.
func TestHoldBegunAnewDuringItsCheck(t *testing.T) {
	s := newShop(t)
	number, painting := newNumber(), s.painting(99000)
	order := s.idOf(s.create(buyerA, number, painting))
	s.onceAt("looked", func(string) {
		if again := s.idOf(s.create(buyerA, number, painting)); again != order {
			t.Errorf("the same request made order %s, not %s", again, order)
		}
	})
	s.later(s.config.hold)
	s.want(s.call(buyerA, "GET", "/api/orders/"+order, nil), 200, "")
	if s.inStock("", painting) {
		t.Error("the painting is free")
	}
	s.later(s.config.hold)
	s.want(s.call(buyerA, "GET", "/api/orders/"+order, nil), 404, "")
}

// What changes an order while the gateway is asked about it says when it is asked again, not the check.
func TestChangeDuringACheck(t *testing.T) {
	heavy(t)
	for name, change := range map[string]func(s *shop, order, number, painting string){
		"its hold begins anew": func(s *shop, order, number, painting string) { s.idOf(s.create(buyerA, number, painting)) },
		"it is deleted": func(s *shop, order, number, painting string) {
			s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "")
		},
		"it is paid":                     func(s *shop, order, number, painting string) { s.want(s.report(s.charge(order, 109000)), 200, "") },
		"its painting is taken off sale": func(s *shop, order, number, painting string) { s.want(s.setSale(painting, false), 200, "") },
	} {
		t.Run(name, func(t *testing.T) {
			s := newShop(t)
			next := func() string {
				return queryText(t, s.config.databaseURL, `SELECT coalesce(next_look_at::text, 'never') FROM orders`)
			}
			number, painting := newNumber(), s.painting(99000)
			order := s.idOf(s.create(buyerA, number, painting))
			unchanged, changed := next(), ""
			s.clock.advance(20 * time.Minute)
			check(t, s.store.checkSoon(t.Context(), order, s.now()))
			s.onceAt("looked", func(string) {
				change(s, order, number, painting)
				changed = next()
			})
			s.later(0)
			if got := next(); got != changed || got == unchanged {
				t.Errorf("asked about next %s, want %s", got, changed)
			}
		})
	}
}

// ---- one buyer's orders change one at a time

// While an order changes, the buyer's next one waits: it finds what became of the first.
func TestOrderReplacedWhileItChanges(t *testing.T) {
	heavy(t)
	for name, row := range map[string]struct {
		change func(s *shop, order, painting string) error
		status int // of the next order, for the same painting
	}{
		"it is paid": {func(s *shop, order, _ string) error { return s.wantStatus(200, s.report(s.charge(order, 109000))) }, 409},
		"its hold ends": {func(s *shop, order, _ string) error {
			return s.store.expireHold(s.t.Context(), byReconciler, order, s.now())
		}, 201},
		"it is deleted": {func(s *shop, order, _ string) error {
			return s.wantStatus(200, s.call(buyerA, "DELETE", "/api/orders/"+order, nil))
		}, 201},
		"its painting is taken off sale": {func(s *shop, _, painting string) error { return s.wantStatus(200, s.setSale(painting, false)) }, 409},
	} {
		t.Run(name, func(t *testing.T) {
			s := newShop(t)
			painting := s.painting(99000)
			order := s.order(buyerA, painting)
			s.clock.advance(s.config.hold)
			release := s.holdRow(order)
			changed := make(chan error, 1)
			go func() { changed <- row.change(s, order, painting) }()
			s.waitForLocks(t, 1)
			next := make(chan answer, 1)
			go func() { next <- s.create(buyerA, newNumber(), painting) }()
			s.waitForLocks(t, 2)
			release()
			if err := <-changed; err != nil {
				t.Error(err)
			}
			s.want(<-next, row.status, "")
			s.wantBalanced()
		})
	}
}

// wantStatus returns an error unless a call was answered this status.
func (s *shop) wantStatus(status int, a answer) error {
	if a.status != status {
		return fmt.Errorf("answered %d %s, want %d", a.status, a.body, status)
	}
	return nil
}

// A replica that vanishes between the two round trips of a settlement keeps the order locked for seconds only.
func TestReplicaVanishesWhileItSettles(t *testing.T) {
	heavy(t)
	s := newShop(t)
	order := s.order(buyerA, s.painting(99000))
	impUID := s.charge(order, 109000)
	p, err := s.iamport().payment(t.Context(), impUID)
	check(t, err)
	p.cancelled = 1 // what just pays an order takes one trip
	locked, silent, vanished := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	endSilence := sync.OnceFunc(func() { close(silent) })
	defer endSilence()
	go func() {
		_, _, err := s.store.recordSettlement(context.WithoutCancel(t.Context()), byReconciler, p, s.now(), func(orderLedger) decision {
			close(locked)
			<-silent
			return decision{state: stateRefunding, reason: reasonAmount}
		})
		vanished <- err
	}()
	<-locked
	var a answer
	waitUntil(t, "the order can be paid", func() bool { // a report waits for as long as one call to the database may
		a = s.report(impUID)
		return a.status != http.StatusServiceUnavailable
	})
	s.want(a, 200, "결제 성공")
	endSilence()
	if err := <-vanished; err == nil {
		t.Error("the silent replica's transaction went on")
	}
	if s.row(impUID) != "kept" || s.statusOf(order) != statusPaid {
		t.Errorf("status %d, %s", s.statusOf(order), s.row(impUID))
	}
}

// ---- refunds

// A cancel that is asked for again is the order's own, not the refund of a duplicate payment beside it.
func TestCancelAgainBesideADuplicate(t *testing.T) {
	s := newShop(t)
	order, impUID, _ := s.paid(buyerA)
	s.refuseCancels()
	duplicate := s.charge(order, 109000)
	s.want(s.report(duplicate), 409, "")
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 502, messageRefundPending)
	s.fake.setFaults(nil)
	before := s.column(duplicate, "(attempts, leased_until)")
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "해당 주문의 결제 취소가 완료되었습니다")
	s.wantMoney(impUID, 109000)
	s.wantMoney(duplicate, 0)
	if after := s.column(duplicate, "(attempts, leased_until)"); after != before || s.statusOf(order) != statusCancelled {
		t.Errorf("status %d, attempts and lease of the duplicate's refund %s, before %s", s.statusOf(order), after, before)
	}
	s.later(time.Hour)
	s.wantMoney(duplicate, 109000)
	s.wantBalanced()
}

// A cancel that the gateway answers with another payment has not succeeded, even though that payment is back.
func TestCancelAnsweredWithAnotherPayment(t *testing.T) {
	heavy(t)
	for name, another := range map[string]func(s *shop, order string) (impUID string){
		"of the same order": func(s *shop, order string) string { return s.charge(order, 109000) },
		"of another order":  func(s *shop, _ string) string { return s.charge(s.order(buyerB, s.painting(99000)), 1000) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newShop(t)
			order, impUID, painting := s.paid(buyerA)
			other := another(s, order)
			s.report(other)
			if s.back(other) == 0 {
				t.Fatal("the other payment is not back")
			}
			s.fake.faultOnce("cancel", fault{before: func(w http.ResponseWriter, _ *http.Request) bool {
				p, _ := s.fake.get(other)
				fakeSuccess(p.object()).write(w)
				return true
			}})
			s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 502, messageRefundPending)
			if s.statusOf(order) != statusPaid || s.inStock("", painting) || s.row(impUID) != "refunding: "+reasonBuyerCancel {
				t.Fatalf("status %d, %s", s.statusOf(order), s.row(impUID))
			}
			s.later(time.Minute)
			s.wantMoney(impUID, 109000)
			if s.statusOf(order) != statusCancelled {
				t.Errorf("status %d", s.statusOf(order))
			}
			s.wantBalanced()
		})
	}
}

// A refund that fails while another caller succeeds leaves no trace of the failure.
func TestRefundFailsWhileAnotherSucceeds(t *testing.T) {
	s := newShop(t)
	order, impUID, _ := s.paid(buyerA)
	s.fake.faultOnce("cancel", fault{before: answerRefusal(-1, "거절")})
	s.onceAt("booked", func(string) { // the first caller knows by now that its refund failed
		check(t, s.fake.refundInConsole(impUID, 0))
		s.want(s.notice(impUID), 200, "")
		s.clock.advance(time.Second)
	})
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 502, messageRefundPending)
	if s.row(impUID) != "refunded: "+reasonBuyerCancel || s.statusOf(order) != statusCancelled {
		t.Fatalf("status %d, %s", s.statusOf(order), s.row(impUID))
	}
	if got := s.column(impUID, "(refusals, last_error, updated_at < (SELECT updated_at FROM orders) + interval '1 second')"); got != "(0,,t)" {
		t.Errorf("refusals, last error, unchanged since: %s", got)
	}
	if strings.Contains(s.logged.String(), "SQLSTATE") {
		t.Errorf("the database refused something:\n%s", s.logged)
	}
}

// Only the gateway's own no makes a refund one that needs a person; its silence does not.
func TestRefusalsAreCounted(t *testing.T) {
	heavy(t)
	for name, row := range map[string]struct {
		cancel, lookUp fault
		refusals       string
	}{
		"refused":                      {fault{before: answerRefusal(-1, "거절")}, fault{}, "1"},
		"refused, then silent":         {fault{before: answerRefusal(-1, "거절")}, fault{before: answer500}, "1"},
		"silent":                       {fault{before: answer500}, fault{}, "0"},
		"silent about the payment too": {fault{before: dropConnection}, fault{before: dropConnection}, "0"},
		"an answer that makes no sense": {fault{before: func(w http.ResponseWriter, _ *http.Request) bool {
			fakeSuccess("done").write(w)
			return true
		}}, fault{}, "0"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newShop(t)
			order, impUID, _ := s.paid(buyerA)
			s.fake.faultOnce("cancel", row.cancel)
			s.fake.faultOnce("payment", row.lookUp)
			if a := s.call(buyerA, "DELETE", "/api/orders/"+order, nil); a.message() != messageRefundPending {
				t.Fatalf("answered %d %s", a.status, a.body)
			}
			if got := s.column(impUID, "refusals"); got != row.refusals || s.column(impUID, "attempts") != "1" {
				t.Errorf("%s refusals in %s attempts, want %s in 1", got, s.column(impUID, "attempts"), row.refusals)
			}
		})
	}
}

// ---- refunds that a person helps

// helpRefund is the administrator's call that helps a refund; help is "account" or "byHand".
func (s *shop) helpRefund(order, impUID, help string) answer {
	s.t.Helper()
	body := map[string]any{"imp_uid": impUID, "byHand": "은행 송금"}
	if help == "account" {
		body = map[string]any{"imp_uid": impUID, "account": map[string]string{"holder": "예금주", "bank": "은행", "number": testAccount}}
	}
	return s.call(adminID, "POST", "/api/orders/"+order+"/refund", body)
}

// testAccount is an account number that is too short to pass for one in a card company's words.
const testAccount = "12-34-567"

// While a refund is under way, nobody else can help it.
func TestHelpWhileARefundIsUnderWay(t *testing.T) {
	heavy(t)
	for _, help := range []string{"account", "byHand"} {
		t.Run(help, func(t *testing.T) {
			s := newShop(t)
			order, impUID := s.stuckRefund(buyerA)
			attempts := ""
			s.onceAt("leased", func(string) {
				attempts = s.column(impUID, "attempts")
				s.want(s.helpRefund(order, impUID, help), 409, messageCancelling)
			})
			s.later(time.Hour)
			if got := s.column(impUID, "attempts"); attempts == "" || got != attempts || s.row(impUID) != "refunding: "+reasonBuyerCancel {
				t.Fatalf("%s, %s attempts, %s when it was leased", s.row(impUID), got, attempts)
			}
			s.fake.setFaults(nil)
			s.want(s.helpRefund(order, impUID, help), 200, "환불이 처리되었습니다")
			if s.statusOf(order) != statusCancelled {
				t.Errorf("status %d", s.statusOf(order))
			}
			s.wantMismatches()
		})
	}
}

// Only a refund that is due can be helped, and only of the order that it is of.
func TestHelpWhatIsNotDue(t *testing.T) {
	s := newShop(t)
	order, impUID := s.stuckRefund(buyerA)
	kept, keptUID, _ := s.paid(buyerB)
	s.fake.setFaults(nil)
	back, backUID, _ := s.orderIn(statusCancelled)
	const notDue = "imp_uid: 환불할 금액이 없는 결제입니다"
	for name, row := range map[string]struct {
		order, impUID string
		status        int
		message       string
	}{
		"a payment that is kept":              {kept, keptUID, 409, notDue},
		"a payment that is back":              {back, backUID, 409, notDue},
		"another order's payment that is due": {kept, impUID, 404, ""},
		"another order's payment":             {order, keptUID, 404, ""},
		"no payment of ours":                  {order, newImpUID(), 404, ""},
		"no order of ours":                    {newTestID(), impUID, 404, ""},
	} {
		for _, help := range []string{"account", "byHand"} {
			t.Run(name+", "+help, func(t *testing.T) {
				s := rowOf(t, s)
				before, cancels := s.fingerprint(), s.fake.calls("cancel")
				s.want(s.helpRefund(row.order, row.impUID, help), row.status, row.message)
				if s.fingerprint() != before || s.fake.calls("cancel") != cancels {
					t.Error("something has changed")
				}
			})
		}
	}
}

// A refund that is done while a person's help waits for its row needs none.
func TestHelpWhileTheRefundIsDone(t *testing.T) {
	heavy(t)
	for _, help := range []string{"account", "byHand"} {
		t.Run(help, func(t *testing.T) {
			s := newShop(t)
			order, _, _ := s.paid(buyerA)
			s.refuseCancels()
			duplicate := s.charge(order, 109000)
			s.want(s.report(duplicate), 409, "")
			conn, err := pgx.Connect(t.Context(), s.config.databaseURL)
			check(t, err)
			defer conn.Close(context.Background())
			tx, err := conn.Begin(t.Context())
			check(t, err)
			_, err = tx.Exec(t.Context(), `UPDATE payments SET state = 'refunded', refunded = amount WHERE imp_uid = $1`, duplicate)
			check(t, err)
			helped := make(chan answer, 1)
			go func() { helped <- s.helpRefund(order, duplicate, help) }()
			s.waitForLocks(t, 1)
			check(t, tx.Commit(t.Context()))
			s.want(<-helped, 409, messageCancelling)
			if got := s.column(duplicate, "(state, attempts, refund_account, by_hand)"); got != "(refunded,1,,)" {
				t.Errorf("state, attempts, account, by hand: %s", got)
			}
		})
	}
}

// The account that a refund goes to is in the ledger until the money is back, and nowhere else ever.
func TestAccountIsForgotten(t *testing.T) {
	heavy(t)
	for name, finish := range map[string]func(s *shop, order, impUID string){
		"given back to the account": func(s *shop, order, impUID string) {
			s.want(s.helpRefund(order, impUID, "account"), 200, "")
		},
		"given back by the reconciler": func(s *shop, _, _ string) { s.later(time.Hour) },
		"given back in the console": func(s *shop, _, impUID string) {
			check(s.t, s.fake.refundInConsole(impUID, 0))
			s.want(s.notice(impUID), 200, "")
		},
		"paid back by hand": func(s *shop, order, impUID string) { s.want(s.helpRefund(order, impUID, "byHand"), 200, "") },
	} {
		t.Run(name, func(t *testing.T) {
			s := newShop(t)
			s.clock.nanoseconds.Store(time.Now().UnixNano()) // the audit command's clock
			order := s.order(buyerA, s.painting(99000))
			impUID := s.account(order)
			check(t, s.fake.deposit(impUID))
			s.want(s.report(impUID), 200, "결제 성공")
			s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 502, messageRefundPending)

			s.fake.setFaults(func(call, _ string) fault {
				if call == "cancel" {
					return fault{before: answerRefusal(1, "환불계좌가 올바르지 않습니다: 예금주 "+testAccount)}
				}
				return fault{}
			})
			var told []string
			told = append(told, s.want(s.helpRefund(order, impUID, "account"), 502, messageRefundPending).body)
			if n := s.column(impUID, "refund_account ->> 'number'"); n != testAccount {
				t.Fatalf("the ledger has the account %q", n)
			}
			told = append(told, s.column(impUID, "last_error"))
			for _, path := range []string{"/api/orders/" + order + "/history", "/api/orders?refund=stuck", "/api/orders/" + order} {
				told = append(told, s.want(s.call(adminID, "GET", path, nil), 200, "").body)
			}
			for _, args := range [][]string{{"-json"}, nil} {
				out, err := s.auditCommand(args...)
				if !errors.Is(err, errUnbalanced) || !strings.Contains(out, impUID) {
					t.Fatalf("the audit: %v\n%s", err, out)
				}
				told = append(told, out)
			}
			s.fake.setFaults(nil)
			finish(s, order, impUID)
			if s.row(impUID) != "refunded: "+reasonBuyerCancel || s.statusOf(order) != statusCancelled {
				t.Fatalf("status %d, %s", s.statusOf(order), s.row(impUID))
			}
			told = append(told, s.want(s.call(adminID, "GET", "/api/orders/"+order+"/history", nil), 200, "").body)

			if left := s.column(impUID, "refund_account"); left != "" {
				t.Errorf("the ledger has still %s", left)
			}
			for table := range strings.FieldsSeq("orders payments history products gateway_lists") {
				told = append(told, queryText(t, s.config.databaseURL, `SELECT coalesce(string_agg(t::text, ' '), '') FROM `+table+` t`))
			}
			for _, text := range append(told, s.logged.String()) {
				if strings.Contains(text, testAccount) || strings.Contains(text, "예금주") {
					t.Errorf("it names the account: %s", text)
				}
			}
			s.wantMismatches()
		})
	}
}

// ---- a payment belongs to one order

// Two settlements of one payment, which the gateway ascribes to one order and then to another: the second, which has read the
// ledger before the first wrote it, changes nothing of the first.
func TestPaymentAscribedToTwoOrdersAtOnce(t *testing.T) {
	s := newShop(t)
	first, second := s.order(buyerA, s.painting(99000)), s.order(buyerB, s.painting(99000))
	s.refuseCancels()
	impUID := s.charge(first, 5000)
	p, err := s.iamport().payment(t.Context(), impUID)
	check(t, err)
	p.merchantUID, p.cancelled, p.fullyRefunded = second, p.amount, true
	_, _, err = s.store.recordSettlement(t.Context(), byReconciler, p, s.now(), func(l orderLedger) decision {
		s.want(s.report(impUID), 400, "금액 불일치, 위조된 결제 시도")
		return decide(p)(l)
	})
	check(t, err)
	if got := s.column(impUID, "(order_id, state, refunded)"); got != "("+first+",refunding,0)" {
		t.Errorf("the ledger has %s", got)
	}
	if _, _, err := s.store.recordSettlement(t.Context(), byReconciler, p, s.now(), decide(p)); !errors.Is(err, errOtherOrder) {
		t.Errorf("afterwards: %v", err)
	}
	if got := s.column(impUID, "(order_id, state, refunded)"); got != "("+first+",refunding,0)" {
		t.Errorf("the ledger has %s", got)
	}
}
