package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// chargeback, deposit and expire are what the console call of local development does.
func (g *fakeGateway) chargeback(impUID string) error { return g.act(impUID, true, g.takeBack) }
func (g *fakeGateway) deposit(impUID string) error    { return g.act(impUID, true, g.payIn) }
func (g *fakeGateway) expire(impUID string) error     { return g.act(impUID, true, g.endAccount) }

// collect reads a list to its end: the payments, those that cannot be read, and the error that ended it.
func collect(list iter.Seq2[gatewayPayment, error]) (ids []string, unreadable []unreadablePayment, last error) {
	for p, err := range list {
		failure, failed := errors.AsType[*gatewayError](err)
		switch {
		case err == nil:
			ids = append(ids, p.impUID)
		case failed && failure.unreadable != nil:
			unreadable = append(unreadable, failure.unreadable...)
		default:
			last = err
		}
	}
	return ids, unreadable, last
}

// wantList checks for a list of exactly these payments, in any order.
func wantList(t *testing.T, list iter.Seq2[gatewayPayment, error], want ...string) {
	t.Helper()
	got, unreadable, err := collect(list)
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) || unreadable != nil || err != nil {
		t.Errorf("listed %q, %v, %v, want %q", got, unreadable, err, want)
	}
}

func TestGatewayListsByTime(t *testing.T) {
	g := newGatewayTest(t, false)
	start := g.clock.Now()
	second := func(n int) time.Time { return start.Add(time.Duration(n) * time.Second) }
	pay := func(p fakePayment) string {
		impUID := g.fake.pay(p)
		g.clock.advance(time.Second)
		return impUID
	}
	first := pay(fakePayment{MerchantUID: "order-1", Amount: 5900})
	other := pay(fakePayment{MerchantUID: "another-shop's", Amount: 1})
	pay(fakePayment{MerchantUID: "order-2", Amount: 1, Sandbox: true})
	pay(fakePayment{MerchantUID: "order-2", Amount: 1, Status: "ready"})
	pay(fakePayment{MerchantUID: "order-2", Amount: 1, Status: "failed"})
	part := pay(fakePayment{MerchantUID: "order-2", Amount: 5900})
	whole := pay(fakePayment{MerchantUID: "order-3", Amount: 5900})
	last := pay(fakePayment{MerchantUID: "order-4", Amount: 5900})

	g.clock.advance(time.Hour)
	check(t, g.fake.refundInConsole(part, 900))
	check(t, g.fake.refundInConsole(whole, 0))
	refunded := g.clock.Now()

	for name, c := range map[string]struct {
		status   gatewayStatus
		from, to time.Time
		want     []string
	}{
		"all paid":             {gatewayPaid, second(0), second(7), []string{first, other, last}},
		"both ends":            {gatewayPaid, second(0), second(1), []string{first, other}},
		"fractions of seconds": {gatewayPaid, second(7).Add(999 * time.Millisecond), second(8), []string{last}},
		"one second":           {gatewayPaid, second(1), second(1), []string{other}},
		"nothing then":         {gatewayPaid, second(2), second(6), nil},
		"the wrong way round":  {gatewayPaid, second(7), second(0), nil},
		"cancelled":            {gatewayCancelled, refunded, refunded, []string{part, whole}},
		"cancelled before":     {gatewayCancelled, second(0), refunded.Add(-time.Second), nil},
	} {
		for _, pageSize := range []int{1, 2, 1000} {
			t.Run(fmt.Sprintf("%s by %d", name, pageSize), func(t *testing.T) {
				g.pageSize = pageSize
				wantList(t, g.movedBetween(t.Context(), c.status, c.from, c.to), c.want...)
			})
		}
	}
}

// One second has more payments than fit on a page.
func TestGatewayListsOneSecondByPages(t *testing.T) {
	g := newGatewayTest(t, false)
	g.pageSize = 2
	var want []string
	for range 5 {
		want = append(want, g.fake.pay(fakePayment{MerchantUID: "order", Amount: 1}))
	}
	now := g.clock.Now()
	wantList(t, g.movedBetween(t.Context(), gatewayPaid, now, now), want...)
	if n := g.fake.calls("list"); n != 3 {
		t.Errorf("%d calls, want one for each page", n)
	}
	for range 2 * maxPages {
		g.fake.pay(fakePayment{MerchantUID: "order", Amount: 1})
	}
	_, _, err := collect(g.movedBetween(t.Context(), gatewayPaid, now, now))
	g.wantFailure(t, err, 502, "list")
}

// A payment that is refunded while the paid ones are read must not make another one disappear.
func TestGatewayListsWhileItChanges(t *testing.T) {
	g := newGatewayTest(t, false)
	g.pageSize = 2
	from := g.clock.Now()
	var all []string
	for range 6 {
		all = append(all, g.fake.pay(fakePayment{MerchantUID: "order", Amount: 1}))
		g.clock.advance(time.Second)
	}
	var paid []string
	for p, err := range g.movedBetween(t.Context(), gatewayPaid, from, g.clock.Now()) {
		check(t, err)
		paid = append(paid, p.impUID)
		if len(paid) == 2 {
			check(t, g.fake.refundInConsole(all[0], 0))
			check(t, g.fake.refundInConsole(all[1], 0))
		}
	}
	if !slices.Equal(paid, all) {
		t.Errorf("listed %q, want %q", paid, all)
	}
	wantList(t, g.movedBetween(t.Context(), gatewayCancelled, from, g.clock.Now()), all[:2]...)
}

func TestGatewayListsMoreThan90Days(t *testing.T) {
	g := newGatewayTest(t, false)
	from := g.clock.Now()
	var want []string
	for _, day := range []int{0, 89, 90, 91, 180, 200} {
		at := from.AddDate(0, 0, day)
		want = append(want, g.fake.pay(fakePayment{MerchantUID: "order", Amount: 1, StartedAt: at, PaidAt: at}))
	}
	wantList(t, g.movedBetween(t.Context(), gatewayPaid, from, from.AddDate(0, 0, 200)), want...)
	if n := g.fake.calls("list"); n != 3 {
		t.Errorf("%d calls, want 3", n)
	}
}

func TestGatewayListsTestPaymentsOnlyWhenConfigured(t *testing.T) {
	g := newGatewayTest(t, true)
	now := g.clock.Now()
	impUID := g.fake.pay(fakePayment{MerchantUID: "order", Amount: 1, Sandbox: true})
	wantList(t, g.movedBetween(t.Context(), gatewayPaid, now, now), impUID)
	g.sandbox = false
	wantList(t, g.movedBetween(t.Context(), gatewayPaid, now, now))
}

func TestFakeGatewayListsLate(t *testing.T) {
	g := newGatewayTest(t, false)
	g.fake.listDelay = time.Minute
	now := g.clock.Now()
	impUID := g.fake.pay(fakePayment{MerchantUID: "order", Amount: 1})
	g.clock.advance(59 * time.Second)
	wantList(t, g.movedBetween(t.Context(), gatewayPaid, now, now))
	g.clock.advance(time.Second)
	wantList(t, g.movedBetween(t.Context(), gatewayPaid, now, now), impUID)
}

func TestFakeGatewayListRules(t *testing.T) {
	g := newGatewayTest(t, false)
	g.fake.pay(fakePayment{MerchantUID: "order", Amount: 1})
	now := g.clock.Now().Unix()
	const days90 = 90 * 24 * 60 * 60
	const bad = "gateway list: HTTP status 400"
	for path, want := range map[string]string{
		fmt.Sprintf("paid?from=%d&to=%d", now-days90, now):          "",
		fmt.Sprintf("all?from=%d&to=%d&sorting=-paid", now, now):    "",
		fmt.Sprintf("paid?from=%d&to=%d&limit=1000", now, now):      "",
		fmt.Sprintf("paid?from=%d&to=%d", now-days90-1, now):        bad,
		fmt.Sprintf("paid?from=%d&to=%d", now, now-1):               bad,
		fmt.Sprintf("paid?from=%d", now):                            bad,
		fmt.Sprintf("paid?from=%d&to=%d&limit=1001", now, now):      bad,
		fmt.Sprintf("paid?from=%d&to=%d&page=2", now, now):          bad,
		fmt.Sprintf("paid?from=%d&to=%d&sorting=amount", now, now):  bad,
		fmt.Sprintf("wrong?from=%d&to=%d", now, now):                bad,
		fmt.Sprintf("failed?from=%d&to=%d", now, now):               errNoPayment.Error(),
		fmt.Sprintf("paid?from=%d&to=%d", now-days90, now-1):        errNoPayment.Error(),
		fmt.Sprintf("cancelled?from=%d&to=%d&page=1", now, now+100): errNoPayment.Error(),
	} {
		got := ""
		if _, err := g.lookUp(t.Context(), "list", "/payments/status/"+path); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}

// goodPayment is a payment as the gateway shows it.
const goodPayment = `{"imp_uid":"imp_1","merchant_uid":"order","status":"paid","currency":"KRW","amount":5900,"cancel_amount":0,` +
	`"paid_at":1700000000}`

// listOf is an answer that lists these JSON texts.
func listOf(next int, payments ...string) string {
	return fmt.Sprintf(`{"code":0,"response":{"total":9,"previous":0,"next":%d,"list":[%s]}}`, next, strings.Join(payments, ","))
}

// Entries that cannot be read are named, as far as they can be, and hide no other.
func TestGatewayListHoldsUnreadablePayments(t *testing.T) {
	const private = "buyer-name-in-the-answer"
	second := strings.Replace(goodPayment, "imp_1", "imp_2", 1)
	g := newAnswerTest(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/cancelled") {
			w.WriteHeader(404)
			io.WriteString(w, `{"code":-1}`)
			return
		}
		io.WriteString(w, listOf(0, goodPayment, `null`, `"`+private+`"`, `{"imp_uid":12,"merchant_uid":["`+private+`"]}`,
			`{"imp_uid":"imp_3","merchant_uid":"order","status":"paid","currency":"KRW","amount":"`+private+`","cancel_amount":0}`,
			`{"imp_uid":"imp_4","merchant_uid":"order","status":{"a":"`+private+`"}}`,
			`{"imp_uid":"`+private+` <b>","merchant_uid":"order"}`, second))
	})
	var outcomes []string
	g.observe = func(call, outcome string, err error, _ time.Duration) {
		if call == "token" {
			return
		}
		outcomes = append(outcomes, call+" "+outcome)
		if !gatewayResponded(err) {
			t.Errorf("%v counts as silence", err)
		}
	}
	names := func(payments []unreadablePayment) (all []string) {
		for _, u := range payments {
			if strings.Contains(u.err.Error(), private) {
				t.Errorf("the error tells too much: %v", u.err)
			}
			all = append(all, u.impUID+"/"+u.merchantUID)
		}
		return all
	}
	want := []string{"/", "/", "/", "imp_3/order", "imp_4/order", "/order"}

	ids, unreadable, err := collect(g.movedBetween(t.Context(), gatewayPaid, time.Unix(0, 0), time.Unix(0, 0)))
	if !slices.Equal(ids, []string{"imp_1", "imp_2"}) || !slices.Equal(names(unreadable), want) || err != nil {
		t.Errorf("movedBetween: %q, %v, %v", ids, unreadable, err)
	}

	all, err := g.paymentsOf(t.Context(), "order")
	failure, failed := errors.AsType[*gatewayError](err)
	if !failed || !gatewayResponded(err) || failure.status != 502 || !slices.Equal(names(failure.unreadable), want) {
		t.Errorf("paymentsOf: %v", err)
	}
	if len(all) != 2 || all[0].impUID != "imp_1" || all[1].impUID != "imp_2" {
		t.Errorf("paymentsOf hides what it can read: %+v", all)
	}
	if want := []string{"list unreadable", "findAll unreadable"}; !slices.Equal(outcomes, want) {
		t.Errorf("observed %q, want %q", outcomes, want)
	}
}

// A payment of another order is none of this one's, and hides none of them.
func TestGatewayFindAllAnswersAboutAnother(t *testing.T) {
	other := strings.NewReplacer("imp_1", "imp_2", `"order"`, `"other"`).Replace(goodPayment)
	g := newAnswerTest(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, listOf(0, other, goodPayment)) })
	all, err := g.paidPaymentsOf(t.Context(), "order")
	failure, failed := errors.AsType[*gatewayError](err)
	if len(all) != 1 || all[0].impUID != "imp_1" || !failed || len(failure.unreadable) != 1 || failure.unreadable[0].impUID != "imp_2" {
		t.Errorf("%+v, %v", all, err)
	}
}

// What is wrong with one payment says nothing of the gateway; what is wrong with the answer itself does.
func TestGatewayUnreadablePaymentIsAnAnswer(t *testing.T) {
	envelope := func(response string) string { return `{"code":0,"response":` + response + `}` }
	for name, c := range map[string]struct {
		body     string
		answered bool
	}{
		"amount a text":   {envelope(strings.Replace(goodPayment, "5900", `"5900"`, 1)), true},
		"no status":       {envelope(strings.Replace(goodPayment, `"paid"`, `null`, 1)), true},
		"empty":           {envelope(`{}`), true},
		"another payment": {envelope(strings.Replace(goodPayment, "imp_1", "imp_2", 1)), false},
		"a list":          {envelope(`[` + goodPayment + `]`), false},
		"null":            {envelope(`null`), false},
		"no response":     {`{"code":0}`, false},
		"half":            {envelope(goodPayment)[:60], false},
		"HTML":            {`<html>`, false},
	} {
		t.Run(name, func(t *testing.T) {
			g := newAnswerTest(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, c.body) })
			for call, err := range map[string]error{
				"payment": second(g.payment(t.Context(), "imp_1")),
				"cancel":  second(g.cancelPayment(t.Context(), cancelRequest{impUID: "imp_1"})),
			} {
				failure, failed := errors.AsType[*gatewayError](err)
				if !failed || failure.status != 502 || failure.call != call || gatewayResponded(err) != c.answered {
					t.Errorf("%s: %v", call, err)
				}
				if c.answered && (len(failure.unreadable) != 1 || failure.unreadable[0].impUID != "imp_1" || gatewayOutcome(err) != "unreadable") {
					t.Errorf("%s: %+v", call, failure)
				}
			}
		})
	}
}

func second[T any](_ T, err error) error { return err }

// A payment that makes no sense is a 502 for its browser, and no outage.
func TestUnreadablePaymentIsNoOutage(t *testing.T) {
	s := newShop(t)
	impUID := s.charge(s.order(buyerA, s.painting(99000)), 109000)
	s.fake.set(impUID, func(p *fakePayment) { p.Status = "cancelled" }) // and yet nothing is given back
	s.want(s.report(impUID), 502, "")
	if a := s.want(s.ready(), 200, ""); !strings.Contains(a.body, `"gateway":"ok"`) {
		t.Errorf("readyz: %s", a.body)
	}
	if s.outage.lasts() {
		t.Error("the gateway counts as silent")
	}
}

// The answers to a list, each for one second. Page 1 is answered as the case says, the further ones with HTTP status 400.
func TestGatewayListAnswers(t *testing.T) {
	for name, c := range map[string]struct {
		status int
		body   string
		want   []string // nil and no failure: nothing
		fails  int
	}{
		"nothing with 404":           {404, `{"code":-1,"message":"존재하지 않는 결제정보입니다."}`, nil, 0},
		"nothing with 200":           {200, `{"code":-1,"message":"존재하지 않는 결제정보입니다."}`, nil, 0},
		"an empty list":              {200, listOf(0), nil, 0},
		"shorter meanwhile":          {200, listOf(2, goodPayment), []string{"imp_1"}, 0},
		"400":                        {400, `{"code":-1,"message":"page"}`, nil, 502},
		"404 of a proxy":             {404, `<html>`, nil, 502},
		"HTML":                       {200, `<html>`, nil, 502},
		"half":                       {200, listOf(0, goodPayment)[:80], nil, 502},
		"no list":                    {200, `{"code":0,"response":{"total":0,"next":0}}`, nil, 502},
		"response null":              {200, `{"code":0,"response":null}`, nil, 502},
		"list an object":             {200, `{"code":0,"response":{"next":0,"list":{}}}`, nil, 502},
		"a page that is not next":    {200, listOf(3, goodPayment), nil, 502},
		"pages without any payment":  {200, listOf(2), nil, 502},
		"500":                        {500, ``, nil, 503},
		"refused":                    {200, `{"code":1,"message":"거절"}`, nil, -1},
		"longer than it ever should": {200, listOf(0, goodPayment) + strings.Repeat(" ", maxPage), nil, 502},
	} {
		t.Run(name, func(t *testing.T) {
			g := newAnswerTest(t, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Query().Get("page") != "1" {
					w.WriteHeader(400)
					io.WriteString(w, `{"code":-1,"message":"page"}`)
					return
				}
				w.WriteHeader(c.status)
				io.WriteString(w, c.body)
			})
			ids, unreadable, err := collect(g.movedBetween(t.Context(), gatewayPaid, time.Unix(1, 0), time.Unix(1, 0)))
			failure, failed := errors.AsType[*gatewayError](err)
			_, refused := errors.AsType[*gatewayRefusal](err)
			switch {
			case !slices.Equal(ids, c.want) || unreadable != nil:
				t.Errorf("listed %q, %v", ids, unreadable)
			case c.fails == 0 && err != nil, c.fails == -1 && !refused, c.fails > 0 && (!failed || failure.status != c.fails || gatewayResponded(err)):
				t.Errorf("err = %v, want %d", err, c.fails)
			}
		})
	}
}

// A page that is longer than the client reads is asked for in halves.
func TestGatewayListTooLong(t *testing.T) {
	g := newAnswerTest(t, func(w http.ResponseWriter, r *http.Request) {
		from, to := r.URL.Query().Get("from"), r.URL.Query().Get("to")
		io.WriteString(w, listOf(0, strings.Replace(goodPayment, "imp_1", "imp_"+from, 1)))
		if from != to {
			io.WriteString(w, strings.Repeat(" ", maxPage))
		}
	})
	wantList(t, g.movedBetween(t.Context(), gatewayPaid, time.Unix(5, 0), time.Unix(7, 0)), "imp_5", "imp_6", "imp_7")
}

func TestGatewayListFaults(t *testing.T) {
	g := newGatewayTest(t, false)
	now := g.clock.Now()
	impUID := g.fake.pay(fakePayment{MerchantUID: "order", Amount: 1})
	list := func(ctx context.Context) error {
		_, _, err := collect(g.movedBetween(ctx, gatewayPaid, now, now))
		return err
	}
	answers := newAnswerTest(t, answer500AsHandler)
	_, _, err := collect(answers.movedBetween(t.Context(), gatewayPaid, now, now))
	g.wantFailure(t, err, 503, "list")
	gone, leave := context.WithCancel(t.Context())
	leave()
	if err := list(gone); !errors.Is(err, context.Canceled) {
		t.Errorf("of a caller who left: %v", err)
	}
	wantList(t, g.movedBetween(t.Context(), gatewayPaid, now, now), impUID)
}

func answer500AsHandler(w http.ResponseWriter, r *http.Request) { answer500(w, r) }

// A caller that has seen enough ends the list, whatever is left of it.
func TestGatewayListEndsEarly(t *testing.T) {
	g := newGatewayTest(t, false)
	g.pageSize = 1
	from := g.clock.Now()
	for range 4 {
		g.fake.pay(fakePayment{MerchantUID: "order", Amount: 1})
		g.clock.advance(time.Second)
	}
	n := 0
	for range g.movedBetween(t.Context(), gatewayPaid, from, g.clock.Now()) {
		if n++; n == 2 {
			break
		}
	}
	if calls := g.fake.calls("list"); n != 2 || calls > 6 {
		t.Errorf("%d payments, %d calls", n, calls)
	}
}

// Whether money moved and whether it is back is told by the amounts and by paid_at, whatever the status says.
func TestPaymentMoved(t *testing.T) {
	const paidAt = 1700000000
	for name, c := range map[string]struct {
		status                       string
		currency, amount, cancelled  string
		paidAt                       int64
		moved, fullyRefunded, broken bool
	}{
		"paid":                               {"paid", "KRW", "5900", "0", paidAt, true, false, false},
		"paid in part back":                  {"cancelled", "KRW", "5900", "900", paidAt, true, false, false},
		"all back":                           {"cancelled", "KRW", "5900", "5900", paidAt, true, true, false},
		"more than all back":                 {"cancelled", "KRW", "5900", "6000", paidAt, true, true, false},
		"all back, the status is late":       {"paid", "KRW", "5900", "5900", paidAt, true, true, false},
		"part back, the status is late":      {"paid", "KRW", "5900", "900", paidAt, true, false, false},
		"all back, an unknown status":        {"pending", "KRW", "5900", "5900", paidAt, true, true, false},
		"failed after all":                   {"failed", "KRW", "5900", "0", paidAt, true, false, false},
		"dollars":                            {"paid", "USD", "12.34", "0", paidAt, true, false, false},
		"dollars, part back":                 {"cancelled", "USD", "12.34", "12.33", paidAt, true, false, false},
		"dollars, all back":                  {"cancelled", "USD", "12.34", "12.340", paidAt, true, true, false},
		"opened":                             {"ready", "KRW", "5900", "0", 0, false, false, false},
		"failed":                             {"failed", "KRW", "5900", "0", 0, false, false, false},
		"an account without a deposit":       {"cancelled", "KRW", "5900", "0", 0, false, false, false},
		"the same in dollars":                {"cancelled", "USD", "12.34", "0", 0, false, false, false},
		"a card registered":                  {"paid", "KRW", "0", "0", paidAt, false, false, false},
		"a registration cancelled":           {"cancelled", "KRW", "0", "0", paidAt, false, false, false},
		"paid, but never":                    {"paid", "KRW", "5900", "0", 0, false, false, false},
		"back, so it was paid":               {"cancelled", "KRW", "5900", "5900", 0, true, true, false},
		"cancelled, but nothing back":        {"cancelled", "KRW", "5900", "0", paidAt, false, false, true},
		"cancelled, but no dollar back":      {"cancelled", "USD", "12.34", "0.00", paidAt, false, false, true},
		"a status that differs in case only": {"Cancelled", "KRW", "5900", "0", paidAt, true, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := decodePayment(fmt.Appendf(nil, `{"imp_uid":"imp_1","merchant_uid":"a","status":%q,"currency":%q,"amount":%s,`+
				`"cancel_amount":%s,"paid_at":%d}`, c.status, c.currency, c.amount, c.cancelled, c.paidAt))
			if p.moved != c.moved || p.fullyRefunded != c.fullyRefunded || (err != nil) != c.broken {
				t.Errorf("%+v, %v", p, err)
			}
		})
	}
}

func TestPaymentAwaitsDeposit(t *testing.T) {
	for fields, want := range map[string]bool{
		`"status":"ready","pay_method":"vbank","vbank_num":"00012345678901"`:     true,
		`"status":"ready","pay_method":"vbank","vbank_num":null`:                 false, // chosen, not issued yet
		`"status":"ready","pay_method":"vbank","vbank_num":""`:                   false,
		`"status":"ready","pay_method":"vbank"`:                                  false,
		`"status":"ready","pay_method":"vbank","vbank_num":12345678901`:          false,
		`"status":"ready","pay_method":"card","vbank_num":"00012345678901"`:      false,
		`"status":"ready","pay_method":{"a":1},"vbank_num":"00012345678901"`:     false, // no reason not to read the rest
		`"status":"ready","pay_method":null`:                                     false,
		`"status":"paid","pay_method":"vbank","vbank_num":"00012345678901"`:      false,
		`"status":"cancelled","pay_method":"vbank","vbank_num":"00012345678901"`: false,
	} {
		p, err := decodePayment([]byte(`{"imp_uid":"imp_1","merchant_uid":"a","currency":"KRW","amount":1,"cancel_amount":0,` + fields + `}`))
		if err != nil || p.awaitsDeposit != want {
			t.Errorf("%s: %+v, %v", fields, p, err)
		}
		if strings.Contains(fmt.Sprintf("%+v", p), "12345678901") {
			t.Errorf("%+v tells the account", p)
		}
	}
}

// A virtual account is issued, paid into and refunded, or ends without a deposit.
func TestGatewayVirtualAccount(t *testing.T) {
	g := newGatewayTest(t, false)
	issue := func() string {
		return g.fake.pay(fakePayment{MerchantUID: "order", Amount: 5900, Status: "ready", PayMethod: "vbank"})
	}
	want := func(impUID string, status gatewayStatus, moved, awaits bool) gatewayPayment {
		t.Helper()
		p, err := g.payment(t.Context(), impUID)
		if err != nil || p.status != status || p.payMethod != payMethodVirtualAccount || p.moved != moved || p.awaitsDeposit != awaits {
			t.Errorf("%+v, %v", p, err)
		}
		return p
	}
	refused := func(err error, message string) {
		t.Helper()
		if refusal, ok := errors.AsType[*gatewayRefusal](err); !ok || refusal.message != message {
			t.Errorf("err = %v, want a refusal %q", err, message)
		}
	}

	paid := issue()
	want(paid, gatewayReady, false, true)
	g.clock.advance(3 * 24 * time.Hour)
	check(t, g.fake.deposit(paid))
	want(paid, gatewayPaid, true, false)
	refused(g.endAccount(t.Context(), paid), fakeNoAccount)
	wantList(t, g.movedBetween(t.Context(), gatewayPaid, g.clock.Now(), g.clock.Now()), paid)

	request := cancelRequest{impUID: paid, remaining: 5900, isKRW: true}
	refused(second(g.cancelPayment(t.Context(), request)), fakeNoRefundAccount)
	request.account = &refundAccount{}
	refused(second(g.cancelPayment(t.Context(), request)), fakeNoRefundAccount)
	request.account = &refundAccount{"홍길동", "088", "110000000001"}
	if p, err := g.cancelPayment(t.Context(), request); err != nil || !p.fullyRefunded {
		t.Errorf("with an account: %+v, %v", p, err)
	}

	ended, expired, late := issue(), issue(), issue()
	check(t, g.endAccount(t.Context(), ended))
	check(t, g.fake.expire(expired))
	for _, impUID := range []string{ended, expired} {
		if p := want(impUID, gatewayCancelled, false, false); p.fullyRefunded {
			t.Errorf("%+v: nothing was ever paid", p)
		}
		refused(g.endAccount(t.Context(), impUID), fakeNoAccount)
		if err := g.fake.deposit(impUID); err == nil {
			t.Error("a deposit into an account that has ended")
		}
		refused(second(g.cancelPayment(t.Context(), cancelRequest{impUID: impUID, remaining: 5900, isKRW: true})), fakeNoTarget)
	}
	g.clock.advance(8 * 24 * time.Hour)
	if err := g.fake.deposit(late); err == nil {
		t.Error("a deposit after the last moment")
	}
	refused(g.endAccount(t.Context(), g.fake.pay(fakePayment{MerchantUID: "order", Amount: 1})), fakeNoAccount)
	for _, impUID := range []string{"imp_none", "", "a/b"} {
		if err := g.endAccount(t.Context(), impUID); !errors.Is(err, errNoPayment) {
			t.Errorf("endAccount(%q) = %v", impUID, err)
		}
	}
}

func TestGatewayEndAccountAnswers(t *testing.T) {
	for name, c := range map[string]struct {
		status int
		body   string
		want   int // of a gatewayError; 0: none, -1: a refusal
	}{
		"done":           {200, `{"code":0,"response":null}`, 0},
		"refused":        {200, `{"code":-1,"message":"거절"}`, -1},
		"400":            {400, `{"code":-1,"message":"거절"}`, -1},
		"400 and code 0": {400, `{"code":0,"response":{}}`, 502},
		"400 of a proxy": {400, `<html>`, 502},
		"404 of a proxy": {404, `<html>`, 502},
		"500":            {500, ``, 503},
	} {
		t.Run(name, func(t *testing.T) {
			g := newAnswerTest(t, func(w http.ResponseWriter, r *http.Request) {
				if r.Method != http.MethodDelete || r.URL.Path != "/vbanks/imp_1" {
					t.Errorf("asked %s %s", r.Method, r.URL)
				}
				w.WriteHeader(c.status)
				io.WriteString(w, c.body)
			})
			observed := ""
			g.observe = func(call, _ string, _ error, _ time.Duration) { observed = call }
			err := g.endAccount(t.Context(), "imp_1")
			if observed != "endAccount" {
				t.Errorf("observed %q", observed)
			}
			failure, failed := errors.AsType[*gatewayError](err)
			refusal, refused := errors.AsType[*gatewayRefusal](err)
			switch {
			case c.want == 0 && err != nil, c.want == -1 && (!refused || refusal.message != "거절"),
				c.want > 0 && (!failed || failure.status != c.want || failure.call != "endAccount"):
				t.Errorf("err = %v", err)
			}
		})
	}
}

// The account of a refund reaches the gateway and nothing else.
func TestRefundAccountIsNeverTold(t *testing.T) {
	account := refundAccount{holder: "홍길동", bank: "088", number: "110-000-000001"}
	request := cancelRequest{impUID: "imp_1", account: &account}
	var sent map[string]any
	status, answer := 200, `{"code":-1,"message":"예금주 홍길동 불일치: 110-000-000001, 110000000001"}`
	g := newAnswerTest(t, func(w http.ResponseWriter, r *http.Request) {
		check(t, json.NewDecoder(r.Body).Decode(&sent))
		w.WriteHeader(status)
		io.WriteString(w, answer)
	})
	var told bytes.Buffer
	_, err := g.cancelPayment(t.Context(), request)
	if refusal, ok := errors.AsType[*gatewayRefusal](err); !ok || !strings.Contains(refusal.Error(), "불일치") {
		t.Errorf("err = %v, want a refusal that says why", err)
	}
	want := map[string]any{"imp_uid": "imp_1", "reason": "", "refund_holder": "홍길동", "refund_bank": "088", "refund_account": "110-000-000001"}
	if !reflect.DeepEqual(sent, want) {
		t.Errorf("sent %v", sent)
	}
	fmt.Fprintln(&told, err)
	for _, answer = range []string{`{"code":0,"response":{"imp_uid":"imp_1","vbank_holder":"홍길동","amount":"110-000-000001"}}`, `<홍길동>`} {
		_, err := g.cancelPayment(t.Context(), request)
		fmt.Fprintln(&told, err)
	}
	status = 500
	_, err = g.cancelPayment(t.Context(), request)
	fmt.Fprintln(&told, err)

	text, asJSON := slog.New(slog.NewTextHandler(&told, nil)), slog.New(slog.NewJSONHandler(&told, nil))
	for _, value := range []any{request, &request, account, &account, []refundAccount{account}, struct{ A any }{account}} {
		fmt.Fprintf(&told, "%v %+v %#v %s %q %x %d\n", value, value, value, value, value, value, value)
		text.Info("refund", "value", value)
		asJSON.Info("refund", "value", value)
	}
	for _, private := range []string{"홍길동", "000001", "110000", fmt.Sprintf("%x", "홍길동"), "\\ud64d"} {
		if strings.Contains(told.String(), private) {
			t.Errorf("%q is told:\n%s", private, told.String())
		}
	}
	if !strings.Contains(told.String(), "a refund account") {
		t.Errorf("told:\n%s", told.String())
	}
}

func TestGatewayCancelAnswersAboutAnother(t *testing.T) {
	back := strings.NewReplacer("imp_1", "imp_2", `"paid"`, `"cancelled"`, `"cancel_amount":0`, `"cancel_amount":5900`).Replace(goodPayment)
	g := newAnswerTest(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, `{"code":0,"response":`+back+`}`) })
	p, err := g.cancelPayment(t.Context(), cancelRequest{impUID: "imp_1", remaining: 5900, isKRW: true})
	failure, failed := errors.AsType[*gatewayError](err)
	if !failed || failure.status != 502 || failure.unreadable != nil || p != (gatewayPayment{}) {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestFakeGatewayRefusesForGood(t *testing.T) {
	g := newGatewayTest(t, false)
	impUID := g.fake.pay(fakePayment{MerchantUID: "order", Amount: 5900, RefundsRefused: "기취소성공"})
	_, err := g.cancelPayment(t.Context(), cancelRequest{impUID: impUID, remaining: 5900, isKRW: true})
	if refusal, ok := errors.AsType[*gatewayRefusal](err); !ok || refusal.code != -1 || !strings.HasSuffix(refusal.message, "기취소성공") {
		t.Errorf("err = %v", err)
	}
	if err := g.fake.refundInConsole(impUID, 1); err == nil {
		t.Error("the console refunded it")
	}
	check(t, g.fake.chargeback(impUID))
	if p, err := g.payment(t.Context(), impUID); err != nil || !p.fullyRefunded {
		t.Errorf("after a chargeback: %+v, %v", p, err)
	}
	if err := g.fake.chargeback(impUID); err == nil {
		t.Error("a chargeback of what is back")
	}
}

// What local development's page does at the gateway after a payment.
func TestFakeGatewayConsole(t *testing.T) {
	g := newFakeGateway(nil)
	notices := make(chan string, 1)
	g.notify = func(_, _, status string) { notices <- status }
	mux := http.NewServeMux()
	mux.HandleFunc("POST /local/payments", g.window)
	mux.HandleFunc("POST /local/payments/{imp_uid}", g.console)
	call := func(path, body string) (status int, answer map[string]any) {
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequest("POST", "/local/payments"+path, strings.NewReader(body)))
		check(t, json.Unmarshal(w.Body.Bytes(), &answer))
		return w.Code, answer
	}
	open := func(status string) string {
		t.Helper()
		code, answer := call("", `{"merchant_uid":"order","amount":5900,"status":"`+status+`"}`)
		if code != 200 {
			t.Fatal(answer)
		}
		return "/" + answer["imp_uid"].(string)
	}
	want := func(path, body string, code int, status string, cancelled float64) {
		t.Helper()
		got, answer := call(path, body)
		if got != code || code == 200 && (answer["status"] != status || answer["cancel_amount"] != cancelled) || code != 200 && answer["message"] == nil {
			t.Errorf("%s = %d %v", body, got, answer)
		}
	}

	card := open("paid")
	want(card, `{"do":"refund","amount":900,"notify":true}`, 200, "cancelled", 900)
	if status := <-notices; status != "cancelled" {
		t.Errorf("notice of %q", status)
	}
	want(card, `{"do":"deposit"}`, 400, "", 0)
	want(card, `{"do":"chargeback"}`, 200, "cancelled", 5900)
	want(card, `{"do":"refund"}`, 400, "", 0)
	account := open("vbank")
	want(account, `{"do":"refund"}`, 400, "", 0)
	want(account, `{"do":"deposit","notify":true}`, 200, "paid", 0)
	if status := <-notices; status != "paid" {
		t.Errorf("notice of %q", status)
	}
	want(account, `{"do":"expire"}`, 400, "", 0)
	want(open("vbank"), `{"do":"expire"}`, 200, "cancelled", 0)
	for _, body := range []string{`{"do":"nothing"}`, `{}`, `x`} {
		want(card, body, 400, "", 0)
	}
	for _, do := range []string{"refund", "chargeback", "deposit", "expire"} {
		want("/imp_none", `{"do":"`+do+`"}`, 400, "", 0)
	}
	if len(notices) != 0 {
		t.Error("a lost notice came")
	}
}
