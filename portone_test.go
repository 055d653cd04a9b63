package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// portoneTest is a client of V2 and the gateway that it calls, on one clock.
type portoneTest struct {
	*portoneClient
	fake     *testGateway
	clock    *testClock
	outcomes chan string // "call outcome" of every call that ended
}

// newPortoneTest uses no network.
func newPortoneTest(sandbox bool) *portoneTest {
	clock := newTestClock()
	double := newTestGateway(clock.Now)
	outcomes := make(chan string, 1000)
	gateway := newPortoneClient(portoneConfig{
		url: "http://gateway.invalid" + fakePortonePrefix, secret: testAPISecret, storeID: double.storeID, sandbox: sandbox, now: clock.Now,
		transport: double,
		observe:   func(call, outcome string, _ error, _ time.Duration) { outcomes <- call + " " + outcome },
	})
	return &portoneTest{gateway, double, clock, outcomes}
}

// pay is a payment of V2 for order.
func (g *portoneTest) pay(order string, p fakePayment) paymentKey {
	p.Version, p.MerchantUID, p.Amount = fakeV2, order, max(p.Amount, 5900)
	return paymentKey{orderID: order, impUID: g.fake.pay(p)}
}

func TestPortoneLooksUpAndCancels(t *testing.T) {
	g := newPortoneTest(false)
	order := newTestID()
	g.pay(order, fakePayment{Status: "failed"})
	key := g.pay(order, fakePayment{})
	want := gatewayPayment{gateway: gatewayPortOne, impUID: key.impUID, merchantUID: order, status: gatewayPaid, currency: "KRW", amount: 5900,
		paidAt: g.clock.Now(), moved: true}
	for _, k := range []paymentKey{key, {orderID: order}} {
		if p, err := g.find(t.Context(), k); p != want || err != nil {
			t.Errorf("find = %+v, %v, want %+v", p, err, want)
		}
	}
	for _, k := range []paymentKey{{}, {impUID: key.impUID}, {orderID: newTestID()}, {orderID: order, impUID: "another"}, {orderID: "../payments"}} {
		if p, err := g.find(t.Context(), k); !errors.Is(err, errNoPayment) {
			t.Errorf("find(%+v) = %+v, %v", k, p, err)
		}
	}
	for name, list := range map[string]func(context.Context, string) ([]gatewayPayment, error){"paid": g.paidPaymentsOf, "all": g.paymentsOf} {
		if all, err := list(t.Context(), order); !reflect.DeepEqual(all, []gatewayPayment{want}) || err != nil {
			t.Errorf("%s: %+v, %v", name, all, err)
		}
		if all, err := list(t.Context(), newTestID()); len(all) != 0 || err != nil {
			t.Errorf("%s of none: %+v, %v", name, all, err)
		}
	}
	want.status, want.cancelled, want.refundsListed, want.refundReasons = gatewayCancelled, 900, 900, "a part\n"
	part := cancelRequest{orderID: order, impUID: key.impUID, amount: 900, part: "part", remaining: 5900, isKRW: true, reason: "a part"}
	if p, err := g.cancelPayment(t.Context(), part); p != want || err != nil {
		t.Errorf("cancel of a part = %+v, %v, want %+v", p, err, want)
	}
	want.cancelled, want.fullyRefunded, want.refundsListed, want.refundReasons = 5900, true, 5900, "a part\n위조 \"결제\" <&>\n"
	request := cancelRequest{orderID: order, impUID: key.impUID, remaining: 5000, isKRW: true, reason: `위조 "결제" <&>`}
	if p, err := g.cancelPayment(t.Context(), request); p != want || err != nil {
		t.Errorf("cancel = %+v, %v, want %+v", p, err, want)
	}
	if all, err := g.paymentsOf(t.Context(), order); !reflect.DeepEqual(all, []gatewayPayment{want}) || err != nil {
		t.Errorf("paymentsOf = %+v, %v", all, err)
	}
	if all, err := g.paidPaymentsOf(t.Context(), order); len(all) != 0 || err != nil {
		t.Errorf("paidPaymentsOf = %+v, %v", all, err)
	}
	if p, _ := g.fake.get(key.impUID); len(p.Refunds) != 2 || p.Refunds[1].Reason != request.reason {
		t.Errorf("refunds at the gateway: %+v", p.Refunds)
	}
}

// What was paid free of tax goes back so: the fake gateway refuses anything else.
func TestTaxFreeRefunds(t *testing.T) {
	for _, taxFree := range []int64{0, 4900, 5900} {
		g := newPortoneTest(false)
		order := newTestID()
		key := g.pay(order, fakePayment{TaxFree: taxFree})
		if p, err := g.cancelPayment(t.Context(), cancelRequest{orderID: order, impUID: key.impUID, remaining: 5900, isKRW: true}); err != nil || !p.fullyRefunded {
			t.Errorf("%d of 5900: %+v, %v", taxFree, p, err)
		}
		if p, _ := g.fake.get(key.impUID); p.Refunds[0].TaxFree != taxFree {
			t.Errorf("%d of 5900 were tax-free, and went back %+v", taxFree, p.Refunds)
		}
	}
	for _, taxFree := range []bool{false, true} {
		g := newGatewayTestInMemory(false)
		g.taxFree = taxFree
		impUID := g.fake.pay(fakePayment{MerchantUID: "order", Amount: 5900})
		_, err := g.cancelPayment(t.Context(), cancelRequest{impUID: impUID, remaining: 5900, isKRW: true})
		check(t, err)
		if p, _ := g.fake.get(impUID); (p.Refunds[0].TaxFree == 5900) != taxFree {
			t.Errorf("IAMPORT_TAX_FREE %v: %+v", taxFree, p.Refunds)
		}
	}
}

func TestPortoneRefusals(t *testing.T) {
	account := &refundAccount{Holder: "홍길동", Bank: "SHINHAN", Number: "110123456789"}
	for name, row := range map[string]struct {
		payment   fakePayment
		remaining int64
		account   *refundAccount
		code      string // of the refusal; "": none
	}{
		"another remainder":   {fakePayment{}, 5000, nil, "CANCELLABLE_AMOUNT_CONSISTENCY_BROKEN"},
		"never paid":          {fakePayment{Status: "failed"}, 5900, nil, "PAYMENT_NOT_PAID"},
		"card company":        {fakePayment{RefundsRefused: "취소 기간 경과 홍길동"}, 5900, account, "PG_PROVIDER"},
		"account without one": {fakePayment{PayMethod: "vbank"}, 5900, nil, "INVALID_REQUEST"},
		"account":             {fakePayment{PayMethod: "vbank"}, 5900, account, ""},
		"partly back":         {fakePayment{Status: "cancelled", Cancelled: 900}, 5000, nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			g := newPortoneTest(false)
			key := g.pay(newTestID(), row.payment)
			p, err := g.cancelPayment(t.Context(), cancelRequest{orderID: key.orderID, impUID: key.impUID, remaining: row.remaining, isKRW: true, account: row.account})
			refusal, refused := errors.AsType[*gatewayRefusal](err)
			switch {
			case row.code == "" && (err != nil || !p.fullyRefunded):
				t.Errorf("%+v, %v", p, err)
			case row.code != "" && (!refused || refusal.code != row.code || strings.Contains(refusal.Error(), "홍길동")):
				t.Errorf("%+v, %v, want %s", p, err, row.code)
			}
		})
	}
}

// The same refund has the same key, also when its answer was lost; one that was refused is asked for with another.
func TestPortoneIdempotencyKeys(t *testing.T) {
	g := newPortoneTest(false)
	var keys []string
	note := func(w http.ResponseWriter, r *http.Request) bool {
		keys = append(keys, r.Header.Get("Idempotency-Key"))
		return false
	}
	key := g.pay(newTestID(), fakePayment{RefundsRefused: "거절"})
	request := cancelRequest{orderID: key.orderID, impUID: key.impUID, remaining: 5900, isKRW: true}
	cancel := func(before, after faultHook) error {
		g.fake.faultOnce("v2 cancel", fault{before: inTurn(note, before), after: after})
		_, err := g.cancelPayment(t.Context(), request)
		return err
	}
	none := func(http.ResponseWriter, *http.Request) bool { return false }
	if err := cancel(none, nil); !refused(err) {
		t.Fatal(err)
	}
	g.fake.set(key.impUID, func(p *fakePayment) { p.RefundsRefused = "" })
	if err := cancel(none, nil); !refused(err) { // the answer that was kept
		t.Fatal(err)
	}
	request.refusals = 1
	outstanding := func(w http.ResponseWriter, _ *http.Request) bool {
		answer := fakeV2Problem(http.StatusConflict, "IDEMPOTENCY_OUTSTANDING_REQUEST")
		writeFakeJSON(w, answer.status, answer.body)
		return true
	}
	if err := cancel(outstanding, nil); !errors.Is(err, errRefundTaken) {
		t.Fatal(err)
	}
	if err := cancel(answer500, nil); gatewayResponded(err) {
		t.Fatal(err)
	}
	check(t, cancel(none, nil))
	if len(keys) != 5 || keys[0] != keys[1] || keys[1] == keys[2] || keys[2] != keys[3] || keys[3] != keys[4] ||
		len(keys[0]) < 18 || keys[0][0] != '"' || !strings.HasSuffix(keys[0], `"`) {
		t.Errorf("the keys were %q", keys)
	}
}

func TestPortoneVirtualAccount(t *testing.T) {
	g := newPortoneTest(false)
	order := newTestID()
	key := g.pay(order, fakePayment{Status: "ready", PayMethod: "vbank"})
	if p, err := g.find(t.Context(), key); err != nil || !p.awaitsDeposit || p.moved || p.status != gatewayReady {
		t.Errorf("%+v, %v", p, err)
	}
	check(t, g.endAccount(t.Context(), key))
	if p, err := g.find(t.Context(), key); err != nil || p.awaitsDeposit || p.moved || p.status != gatewayCancelled || p.fullyRefunded {
		t.Errorf("ended: %+v, %v", p, err)
	}
	for _, k := range []paymentKey{key, g.pay(newTestID(), fakePayment{})} {
		err := g.endAccount(t.Context(), k)
		if refusal, ok := errors.AsType[*gatewayRefusal](err); !ok || refusal.code != "PAYMENT_NOT_WAITING_FOR_DEPOSIT" {
			t.Errorf("%v", err)
		}
	}
	for _, k := range []paymentKey{{}, {orderID: newTestID()}} {
		if err := g.endAccount(t.Context(), k); !errors.Is(err, errNoPayment) {
			t.Errorf("%v", err)
		}
	}
}

func TestPortoneConfirm(t *testing.T) {
	for name, row := range map[string]struct {
		payment fakePayment
		change  func(*confirmRequest)
		code    string // of the refusal; "": it is charged
	}{
		"as asked":       {fakePayment{}, nil, ""},
		"no txId":        {fakePayment{}, func(c *confirmRequest) { c.txID = "" }, ""},
		"another txId":   {fakePayment{}, func(c *confirmRequest) { c.txID = "another" }, "INFORMATION_MISMATCH"},
		"another amount": {fakePayment{}, func(c *confirmRequest) { c.total = 5901 }, "INFORMATION_MISMATCH"},
		"dollars":        {fakePayment{Currency: "USD"}, nil, "INFORMATION_MISMATCH"},
		"test channel":   {fakePayment{Sandbox: true}, nil, "INFORMATION_MISMATCH"},
		"another token":  {fakePayment{}, func(c *confirmRequest) { c.token = "another" }, "INVALID_PAYMENT_TOKEN"},
		"paid":           {fakePayment{Status: "paid"}, nil, "ALREADY_PAID"},
		"card company":   {fakePayment{ConfirmRefused: "한도 초과"}, nil, "PG_PROVIDER"},
	} {
		t.Run(name, func(t *testing.T) {
			g := newPortoneTest(false)
			row.payment.PaymentToken = "the-payment-token"
			if row.payment.Status == "" {
				row.payment.Status = "ready"
			}
			key := g.pay(newTestID(), row.payment)
			request := confirmRequest{orderID: key.orderID, token: "the-payment-token", txID: key.impUID, total: 5900}
			if row.change != nil {
				row.change(&request)
			}
			for range 2 { // again it is the same answer
				err := g.confirm(t.Context(), request)
				if refusal, ok := errors.AsType[*gatewayRefusal](err); row.code == "" && err != nil || row.code != "" && (!ok || refusal.code != row.code) {
					t.Errorf("%v, want %q", err, row.code)
				}
			}
			if p, _ := g.fake.get(key.impUID); (p.Status == "paid") != (row.code == "" || row.payment.Status == "paid") {
				t.Errorf("%s at the gateway", p.Status)
			}
			if shown := fmt.Sprintf("%v %+v %#v", request, request, request); strings.Contains(shown, "the-payment-token") {
				t.Error(shown)
			}
		})
	}
	g := newPortoneTest(false)
	if err := g.confirm(t.Context(), confirmRequest{orderID: newTestID(), token: "x", total: 1}); !errors.Is(err, errNoPayment) {
		t.Error(err)
	}
}

// goodPortonePayment is a payment of 5,900 won for the order that portoneOrder is.
const (
	portoneOrder       = "61a7adc903b7708e5dbba693"
	goodPortonePayment = `{"id":"` + portoneOrder + `","transactionId":"tx-1","storeId":"store-fake","version":"V2","status":"PAID","currency":"KRW",` +
		`"channel":{"type":"LIVE"},"amount":{"total":5900,"taxFree":0,"discount":0,"paid":5900,"cancelled":0,"cancelledTaxFree":0},"paidAt":"2026-03-02T01:00:00.123Z"}`
)

func TestPortoneAnswers(t *testing.T) {
	with := func(pairs ...string) string { return strings.NewReplacer(pairs...).Replace(goodPortonePayment) }
	cancelled := func(status, amount, more string) string {
		return with(`"PAID"`, `"`+status+`"`, `"cancelled":0`, `"cancelled":`+amount, `"paidAt"`, more+`"paidAt"`)
	}
	cancellations := func(status string) string {
		return `"cancellations":[{"status":"` + status + `","totalAmount":5900}],`
	}
	const private = "buyer-name-in-the-answer"
	for name, row := range map[string]struct {
		status int
		body   string
		want   any // what the payment is, a gatewayError's status, or an error
	}{
		"good":                {200, goodPortonePayment, "paid 5900"},
		"unknown fields":      {200, with(`"paidAt"`, `"new":{"a":[null,1e999]},"paidAt"`), "paid 5900"},
		"unknown status":      {200, with(`PAID`, `HELD`), "HELD 5900"},
		"pending":             {200, with(`PAID`, `PAY_PENDING`, `"2026-03-02T01:00:00.123Z"`, `null`), "ready 5900 unmoved"},
		"issued":              {200, with(`PAID`, `VIRTUAL_ACCOUNT_ISSUED`, `"2026-03-02T01:00:00.123Z"`, `null`), "ready 5900 unmoved awaits"},
		"paid without a time": {200, with(`"2026-03-02T01:00:00.123Z"`, `null`), "paid 5900 unmoved"},
		"ready, no channel":   {200, with(`PAID`, `READY`, `{"type":"LIVE"}`, `null`, `"2026-03-02T01:00:00.123Z"`, `null`), "ready 5900 unmoved"},
		"part back":           {200, cancelled("PARTIAL_CANCELLED", "900", ""), "cancelled 5900 -900"},
		"all back":            {200, cancelled("CANCELLED", "5900", cancellations("SUCCEEDED")), "cancelled 5900 -5900 whole"},
		"all back, says paid": {200, cancelled("PAID", "5900", ""), "paid 5900 -5900 whole"},
		"discount, all back":  {200, strings.Replace(cancelled("CANCELLED", "5000", ""), `"discount":0`, `"discount":900`, 1), "cancelled 5900 -5900 whole"},
		"requested":           {200, cancelled("PAID", "0", cancellations("REQUESTED")), "paid 5900 pending"},
		"requested, counted":  {200, cancelled("CANCELLED", "5900", cancellations("REQUESTED")), "cancelled 5900 pending"},
		"failed":              {200, cancelled("PAID", "0", cancellations("FAILED")), "paid 5900 failed"},
		"unknown cancel":      {200, cancelled("PAID", "0", cancellations("NEW")), "paid 5900"},
		"cancelled, nothing":  {200, cancelled("CANCELLED", "0", ""), 502},
		"dollars":             {200, with(`KRW`, `USD`), "paid 0"},
		"V1":                  {200, with(`"V2"`, `"V1"`), errNoPayment},
		"V1 of another shape": {200, `{"version":"V1","id":5}`, errNoPayment},
		"another store":       {200, with(`store-fake`, `store-other`), errNoPayment},
		"test channel":        {200, with(`LIVE`, `TEST`), errNoPayment},
		"unknown channel":     {200, with(`LIVE`, `NEW`), errNoPayment},
		"paid, no channel":    {200, with(`"channel":{"type":"LIVE"},`, ``), errNoPayment},
		"another paymentId":   {200, with(portoneOrder, "61a7adc903b7708e5dbba694"), 502},
		"no version":          {200, with(`"version":"V2",`, ``), 502},
		"no store":            {200, with(`"storeId":"store-fake",`, ``), 502},
		"no transactionId":    {200, with(`"tx-1"`, `null`), 502},
		"transactionId odd":   {200, with(`tx-1`, `../tx`), 502},
		"no currency":         {200, with(`"KRW"`, `""`), 502},
		"no amount":           {200, with(`"amount"`, `"amounts"`), 502},
		"no cancelled":        {200, with(`"cancelled":0,`, ``), 502},
		"amount a fraction":   {200, with(`"total":5900`, `"total":5900.5`), 502},
		"amount a text":       {200, with(`"total":5900`, `"total":"`+private+`"`), 502},
		"amount too large":    {200, with(`"total":5900`, `"total":9223372036854775808`), 502},
		"amount negative":     {200, with(`"total":5900`, `"total":-1`), 502},
		"time a text":         {200, with(`2026-03-02T01:00:00.123Z`, private), 502},
		"404":                 {404, `{"type":"PAYMENT_NOT_FOUND","message":"` + private + `"}`, errNoPayment},
		"404 of a proxy":      {404, `<html>` + private, 502},
		"404 of another type": {404, `{"type":"NEW"}`, 502},
		"400":                 {400, `{"type":"INVALID_REQUEST","message":"` + private + `"}`, 502},
		"401":                 {401, `{"type":"UNAUTHORIZED"}`, 502},
		"403":                 {403, `{"type":"FORBIDDEN"}`, 502},
		"302":                 {302, ``, 502},
		"429":                 {429, ``, 503},
		"500":                 {500, goodPortonePayment, 503},
		"502 of a proxy":      {502, `<html>` + private, 503},
		"HTML":                {200, `<html>` + private, 502},
		"empty":               {200, ``, 502},
		"null":                {200, `null`, 502},
		"a list":              {200, `[` + goodPortonePayment + `]`, 502},
		"two documents":       {200, goodPortonePayment + goodPortonePayment, 502},
		"half a document":     {200, goodPortonePayment[:80], 502},
		"huge":                {200, goodPortonePayment + strings.Repeat(" ", maxAnswer), 502},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := answeringPortone(row.status, row.body)
			p, err := g.find(t.Context(), paymentKey{orderID: portoneOrder, impUID: "tx-1"})
			failure, failed := errors.AsType[*gatewayError](err)
			switch want := row.want.(type) {
			case string:
				if err != nil || described(p) != want {
					t.Errorf("%+v, %v: is %q, not %q", p, err, described(p), want)
				}
			case int:
				if !failed || failure.status != want || failure.call != "payment" {
					t.Errorf("%+v, %v, want a gatewayError %d", p, err, want)
				}
			case error:
				if !errors.Is(err, want) {
					t.Errorf("%+v, %v, want %v", p, err, want)
				}
			}
			if err != nil && (strings.Contains(err.Error(), private) || strings.Contains(err.Error(), testAPISecret)) {
				t.Errorf("the error tells too much: %v", err)
			}
		})
	}
}

// answeringPortone is a client whose gateway always answers the same.
func answeringPortone(status int, body string) *portoneClient {
	return newPortoneClient(portoneConfig{url: "http://gateway.invalid", secret: testAPISecret, storeID: "store-fake",
		transport: roundTripFunc(func(r *http.Request) (*http.Response, error) {
			if got := r.Header.Get("Authorization"); got != "PortOne "+testAPISecret {
				return nil, fmt.Errorf("authorized as %q", got)
			}
			return &http.Response{StatusCode: status, Header: http.Header{"Location": {"/elsewhere"}}, Body: io.NopCloser(strings.NewReader(body))}, nil
		})})
}

// described is a payment in short.
func described(p gatewayPayment) string {
	text := fmt.Sprintf("%s %d", p.status, p.amount)
	for _, word := range []struct {
		so   bool
		text string
	}{{p.cancelled > 0, fmt.Sprintf(" -%d", p.cancelled)}, {p.fullyRefunded, " whole"}, {p.refundPending, " pending"},
		{p.failedRefunds > 0, " failed"}, {!p.moved, " unmoved"}, {p.awaitsDeposit, " awaits"}} {
		if word.so {
			text += word.text
		}
	}
	return text
}

func TestPortoneChangeAnswers(t *testing.T) {
	for name, row := range map[string]struct {
		status  int
		body    string
		refusal string // its code; "": none
		failure int    // the gatewayError's status; 0: none
	}{
		"refused":            {409, `{"type":"PAYMENT_NOT_PAID","message":"x"}`, "PAYMENT_NOT_PAID", 0},
		"refused, new type":  {409, `{"type":"NEW","new":1}`, "NEW", 0},
		"refused, 400":       {400, `{"type":"INVALID_REQUEST"}`, "INVALID_REQUEST", 0},
		"card company":       {502, `{"type":"PG_PROVIDER","pgCode":"1","pgMessage":"거절"}`, "PG_PROVIDER", 0},
		"502 of a proxy":     {502, `<html>`, "", 503},
		"502 of a new type":  {502, `{"type":"NEW"}`, "", 503},
		"503":                {503, `{"type":"PG_PROVIDER"}`, "", 503},
		"409 of a proxy":     {409, `<html>`, "", 502},
		"409 without a type": {409, `{}`, "", 502},
		"401":                {401, `{"type":"UNAUTHORIZED"}`, "", 502},
		"no cancellation":    {200, `{}`, "", 502},
		"not JSON":           {200, `<html>`, "", 502},
		"failed":             {200, `{"cancellation":{"status":"FAILED"}}`, "FAILED", 0},
		"requested":          {200, `{"cancellation":{"status":"REQUESTED"}}`, "", 0},
		"a new status":       {200, `{"cancellation":{"status":"NEW"}}`, "", 0},
	} {
		t.Run(name, func(t *testing.T) {
			g := answeringPortone(row.status, row.body)
			err := g.sendCancel(t.Context(), cancelRequest{orderID: portoneOrder, impUID: "tx-1", remaining: 1, isKRW: true}, gatewayPayment{})
			refusal, refused := errors.AsType[*gatewayRefusal](err)
			failure, failed := errors.AsType[*gatewayError](err)
			if refused != (row.refusal != "") || refused && refusal.code != row.refusal || failed != (row.failure != 0) || failed && failure.status != row.failure {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestPortoneLists(t *testing.T) {
	g := newPortoneTest(false)
	g.pageSize = 3
	start := g.clock.Now()
	var all []string
	for n := range 20 { // more than a page in one second, too
		all = append(all, g.pay(newTestID(), fakePayment{}).impUID)
		if n%5 == 4 {
			g.clock.advance(time.Hour)
		}
	}
	g.fake.pay(fakePayment{MerchantUID: newTestID(), Amount: 1}) // V1's
	g.pay(newTestID(), fakePayment{Sandbox: true})
	g.pay(newTestID(), fakePayment{Status: "ready"})
	part := g.pay(newTestID(), fakePayment{Status: "cancelled", Cancelled: 1})
	whole := g.pay(newTestID(), fakePayment{Status: "cancelled", Cancelled: 5900})
	list := func(status gatewayStatus, from, to time.Time) []string {
		t.Helper()
		ids, unreadable, err := collect(g.movedBetween(t.Context(), status, from, to))
		if err != nil || len(unreadable) > 0 {
			t.Fatal(unreadable, err)
		}
		slices.Sort(ids)
		return slices.Compact(ids)
	}
	same := func(what string, got []string, want ...string) {
		t.Helper()
		if slices.Sort(want); !slices.Equal(got, want) {
			t.Errorf("%s: %d, want %d", what, len(got), len(want))
		}
	}
	same("paid", list(gatewayPaid, start, g.clock.Now()), slices.Clone(all)...)
	same("cancelled", list(gatewayCancelled, start, g.clock.Now()), part.impUID, whole.impUID)
	same("the first hour", list(gatewayPaid, start, start.Add(time.Hour-2*time.Second)), slices.Clone(all[:5])...)
	same("half a year", list(gatewayPaid, start.AddDate(0, -3, 0), start.AddDate(0, 3, 0)), slices.Clone(all)...)

	for name, body := range map[string]string{"no items": `{}`, "null": `null`, "items an object": `{"items":{}}`, "not JSON": `<`} {
		_, _, err := collect(answeringPortone(200, body).movedBetween(t.Context(), gatewayPaid, start, start))
		if failure, ok := errors.AsType[*gatewayError](err); !ok || failure.status != 502 {
			t.Errorf("%s: %v", name, err)
		}
	}
	ids, unreadable, err := collect(answeringPortone(200, `{"items":[{"id":"x","transactionId":"tx-0","version":"V2"},5,`+goodPortonePayment+`]}`).
		movedBetween(t.Context(), gatewayPaid, start, start))
	if err != nil || !slices.Equal(ids, []string{"tx-1"}) || len(unreadable) != 2 || unreadable[0].impUID != "tx-0" || unreadable[0].merchantUID != "x" {
		t.Errorf("%v, %v, %v", ids, unreadable, err)
	}
}

func FuzzPortonePayment(f *testing.F) {
	f.Add([]byte(goodPortonePayment))
	f.Add([]byte(strings.Replace(goodPortonePayment, `"paidAt"`, `"cancellations":[{"status":"REQUESTED","totalAmount":1}],"paidAt"`, 1)))
	f.Add([]byte(`{"version":"V1"}`))
	g := newPortoneClient(portoneConfig{})
	f.Fuzz(func(t *testing.T, body []byte) {
		p, err := g.decodePayment(body)
		if err != nil {
			if p != (gatewayPayment{}) {
				t.Errorf("%v, and yet %+v", err, p)
			}
			return
		}
		if p.gateway != gatewayPortOne || !validImpUID(p.impUID) || p.merchantUID == "" || p.status == "" || p.currency == "" || p.sandbox {
			t.Errorf("accepted %+v", p)
		}
		if min(p.amount, p.cancelled, p.taxFree) < 0 || !p.isKRW() && p.amount+p.cancelled+p.taxFree != 0 || p.fullyRefunded && p.cancelled < p.amount {
			t.Errorf("amounts of %+v", p)
		}
		if _, err := p.paidAt.MarshalText(); err != nil {
			t.Errorf("%+v cannot be written: %v", p, err)
		}
	})
}

// ---- the service

// withV2 configures V2 beside V1.
func withV2(c *config) {
	c.portoneURL, c.portoneSecret, c.portoneStoreID = c.iamportURL+fakePortonePrefix, testAPISecret, "store-fake"
	c.webhookSecrets = [][]byte{[]byte("the-new-secret"), []byte(testWebhookSecret)}
}

// withV2Alone configures V2 in place of V1.
func withV2Alone(c *config) {
	withV2(c)
	c.iamportKey, c.iamportSecret = "", ""
}

// chargeV2 has the gateway take amount for an order through V2 and returns the transactionId. The service is not told.
func (s *shop) chargeV2(order string, amount int64) string {
	return viaV2.window(s.fake, order, fakePayment{Amount: amount})
}

// reportV2 tells the service of an order's payment as the browser does.
func (s *shop) reportV2(order string) answer {
	s.t.Helper()
	return s.call("", "PATCH", "/api/orders/pay", map[string]string{"paymentId": order, "txId": "hint"})
}

// paidV2 makes an order of user's for one new painting, and pays it through V2.
func (s *shop) paidV2(user string) (order, txID, painting string) {
	s.t.Helper()
	painting = s.painting(99000)
	order = s.order(user, painting)
	txID = s.chargeV2(order, 109000)
	s.want(s.reportV2(order), 200, "결제 성공")
	return order, txID, painting
}

// noticeV2 tells the service of a payment as the gateway does, signed.
func (s *shop) noticeV2(txID string) answer {
	s.t.Helper()
	p, _ := s.fake.get(txID)
	header, body := s.fake.noticeOf(p)
	return s.sendNotice(header, string(body))
}

// sendNotice sends a notice of the test's own.
func (s *shop) sendNotice(header http.Header, body string) answer {
	s.t.Helper()
	request, err := newCall(s.t.Context(), "POST", s.url+"/api/payments/webhook", "", body)
	check(s.t, err)
	for name := range header {
		request.Header.Set(name, header.Get(name))
	}
	a, err := exchange(s.send, request)
	check(s.t, err)
	return a
}

func TestPayV2(t *testing.T) {
	for name, configure := range map[string]func(*config){"beside V1": withV2, "alone": withV2Alone} {
		t.Run(name, func(t *testing.T) {
			s := newShop(t, configure)
			order, txID, painting := s.paidV2(buyerA)
			s.wantBody(s.reportV2(strings.ToUpper(order)), 200, `{"message":"결제 성공"}`)
			if s.statusOf(order) != statusPaid || s.inStock(buyerA, painting) || s.row(txID) != "kept" || s.column(txID, "gateway") != "portone" {
				t.Fatal("not paid")
			}
			s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "해당 주문의 결제 취소가 완료되었습니다")
			s.wantMoney(txID, 109000)
			if !s.inStock(buyerB, painting) {
				t.Fatal("not in stock")
			}
			s.wantNaming(s.reportV2(order), 400, "paymentId: 취소")
			s.wantBalanced()
			for _, row := range []struct {
				body   map[string]any
				status int
				field  string
			}{
				{map[string]any{"imp_uid": "imp_1", "paymentId": order}, 400, "paymentId"},
				{map[string]any{"paymentId": "short"}, 400, "paymentId"},
				{map[string]any{"paymentId": 5}, 400, "paymentId"},
				{map[string]any{"paymentId": order, "txId": 5}, 400, "txId"},
				{map[string]any{"txId": "tx"}, 400, "imp_uid"},
				{map[string]any{"paymentId": newTestID()}, 404, "paymentId"},
			} {
				s.wantNaming(s.call("", "PATCH", "/api/orders/pay", row.body), row.status, row.field)
			}
		})
	}
	s := newShop(t)
	s.wantNaming(s.reportV2(newTestID()), 400, "paymentId: PortOne V2")
	s.wantNaming(s.sendNotice(nil, `{"payment_id":"`+newTestID()+`"}`), 400, "paymentId: PortOne V2")
	s = newShop(t, withV2Alone)
	s.wantNaming(s.report("imp_1"), 400, "imp_uid: PortOne V1")
	s.wantNaming(s.notice("imp_1"), 400, "imp_uid: PortOne V1")
}

func TestPayV2Refusals(t *testing.T) {
	for name, row := range map[string]struct {
		payment fakePayment
		status  int
		naming  string
		back    int64
	}{
		"too little":       {fakePayment{Amount: 108999}, 400, "위조", 108999},
		"dollars":          {fakePayment{Amount: 109000, Currency: "USD"}, 400, "위조", 109000},
		"partly back":      {fakePayment{Amount: 109000, Status: "cancelled", Cancelled: 1}, 400, "위조", 109000},
		"tax-free, forged": {fakePayment{Amount: 1, TaxFree: 1}, 400, "위조", 1},
		"ready":            {fakePayment{Amount: 109000, Status: "ready"}, 400, "paymentId", 0},
		"failed":           {fakePayment{Amount: 109000, Status: "failed"}, 400, "paymentId", 0},
		"cancelled":        {fakePayment{Amount: 109000, Status: "cancelled", Cancelled: 109000}, 400, "paymentId: 취소", 109000},
		"test channel":     {fakePayment{Amount: 109000, Sandbox: true}, 404, "paymentId", 0},
		"virtual account":  {fakePayment{Amount: 109000, Status: "ready", PayMethod: "vbank"}, 409, "가상계좌", 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t, withV2)
			painting := s.painting(99000)
			order := s.order(buyerA, painting)
			row.payment.Version, row.payment.MerchantUID = fakeV2, order
			txID := s.fake.pay(row.payment)
			for range 2 {
				if a := s.reportV2(order); name != "virtual account" || a.status != 400 { // ended, it is one that nobody paid
					s.wantNaming(a, row.status, row.naming)
				}
				s.wantMoney(txID, row.back)
			}
			if status := s.statusOf(order); status != statusUnpaid || s.inStock(buyerB, painting) {
				t.Fatalf("the order has status %d, or holds nothing", status)
			}
			if refunds := s.fake.calls("v2 cancel"); refunds > 1 {
				t.Fatalf("%d refunds were asked for", refunds)
			}
			s.want(s.report(s.charge(order, 109000)), 200, "결제 성공") // it can still be paid, through V1
			s.wantBalanced()
		})
	}
}

// The second payment goes back where it was made, whichever of the two gateways that is.
func TestPaidThroughBoth(t *testing.T) {
	s := newShop(t, withV2)
	order, txID, _ := s.paidV2(buyerA)
	impUID := s.charge(order, 109000)
	s.wantNaming(s.report(impUID), 409, "중복")
	s.wantMoney(impUID, 109000)
	s.wantMoney(txID, 0)
	order, impUID, _ = s.paid(buyerB)
	txID = s.chargeV2(order, 109000)
	s.wantNaming(s.reportV2(order), 409, "중복")
	s.wantMoney(txID, 109000)
	s.wantMoney(impUID, 0)
	s.wantBalanced()
}

// A shop that has moved to V2 gives V1's payments back as long as it has V1's keys; without them it says what is missing.
func TestMoveFromV1ToV2(t *testing.T) {
	before := newShop(t)
	order, impUID, _ := before.paid(buyerA)
	another, left, _ := before.paid(buyerB)
	open := func(configure func(*config)) *shop {
		s := &shop{t: t, clock: before.clock, logged: before.logged, fake: before.fake}
		s.open("http://gateway.invalid", s.fake, func(c *config) { c.databaseURL = before.config.databaseURL }, configure)
		return s
	}
	s := open(withV2)
	s.paidV2(buyerB)
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "")
	s.wantMoney(impUID, 109000)
	s.wantBalanced()

	s = open(withV2Alone)
	s.want(s.call(buyerB, "DELETE", "/api/orders/"+another, nil), 502, messageRefundPending)
	s.wantMoney(left, 0)
	if s.row(left) != "refunding: buyer cancelled" || !strings.Contains(s.column(left, "last_error"), "not configured: iamport") ||
		!strings.Contains(s.logged.String(), "not configured: iamport") {
		t.Errorf("%s, %s", s.row(left), s.column(left, "last_error"))
	}
	found := false
	for _, m := range s.auditSince(s.clock.Now().Add(-time.Hour)).Mismatches {
		found = found || m.Kind == mismatchNoGateway.name && m.ImpUID == left && m.Amount == 109000
	}
	if !found {
		t.Error("the audit says nothing of the gateway that is not configured")
	}
	s = open(withV2)
	s.later(time.Hour)
	s.wantMoney(left, 109000)
	s.wantBalanced()
}

// Money whose every notice was lost is found, before the hold ends and long after.
func TestLostNoticesV2(t *testing.T) {
	s := newShop(t, withV2)
	order := s.order(buyerA, s.painting(99000))
	s.chargeV2(order, 109000)
	s.later(s.config.hold)
	if s.statusOf(order) != statusPaid {
		t.Error("not found when the hold ended")
	}
	painting := s.painting(99000)
	late := s.order(buyerB, painting)
	s.later(s.config.hold)
	txID := s.chargeV2(late, 109000)
	s.later(time.Minute)
	if s.statusOf(late) != statusPaid || s.row(txID) != "kept" {
		t.Error("late money is not found in the list")
	}
	unpaid := s.order(buyerA, s.painting(99000))
	txID = s.chargeV2(unpaid, 109000)
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+unpaid, nil), 409, "")
	if s.statusOf(unpaid) != statusPaid || s.row(txID) != "kept" {
		t.Error("an order was deleted whose money had come")
	}
	gone := s.order(buyerA, s.painting(99000))
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+gone, nil), 200, "")
	s.clock.advance(25 * time.Hour)
	txID = s.chargeV2(gone, 109000)
	s.want(s.noticeV2(txID), 200, "")
	s.wantMoney(txID, 109000)
	s.wantBalanced()
}

// While one of the gateways does not answer, nobody knows whether an order was paid there.
func TestHoldWaitsForBothGateways(t *testing.T) {
	for _, silent := range []string{"findAll", "v2 payment"} {
		s := newShop(t, withV2)
		painting := s.painting(99000)
		order := s.order(buyerA, painting)
		s.fake.setFaults(func(call, _ string) fault {
			if call == silent {
				return fault{before: answer500}
			}
			return fault{}
		})
		s.later(s.config.hold)
		if s.statusOf(order) != statusUnpaid || s.inStock(buyerB, painting) {
			t.Errorf("%s: the hold ended", silent)
		}
		if a := s.call(buyerA, "DELETE", "/api/orders/"+order, nil); a.status != 503 {
			t.Errorf("%s: deleted with %d", silent, a.status)
		}
		s.fake.setFaults(nil)
		s.later(time.Minute)
		if !s.inStock(buyerB, painting) {
			t.Errorf("%s: the hold did not end", silent)
		}
	}
}

func TestConsoleRefundsV2(t *testing.T) {
	s := newShop(t, withV2)
	order, txID, painting := s.paidV2(buyerA)
	check(t, s.fake.refundInConsole(txID, 9000))
	s.want(s.noticeV2(txID), 200, "")
	if s.statusOf(order) != statusPaid || s.column(txID, "refunded") != "9000" {
		t.Error("a part that went back is not booked")
	}
	check(t, s.fake.chargeback(txID)) // its notice is lost
	s.later(time.Minute)
	if s.statusOf(order) != statusCancelled || s.row(txID) != "refunded: "+reasonAtTheGateway || !s.inStock(buyerB, painting) {
		t.Error("a chargeback is not booked")
	}
	order, txID, _ = s.paidV2(buyerA)
	check(t, s.fake.refundInConsole(txID, 9000)) // of which nobody was told
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "")
	s.wantMoney(txID, 109000)
	s.wantBalanced()
}

// A refund that the gateway takes and does not finish at once is pending until its notice or the reconciler ends it. It is asked
// for once, unless it fails.
func TestRefundEndsLater(t *testing.T) {
	for _, told := range []bool{true, false} {
		s := newShop(t, withV2)
		order, txID, painting := s.paidV2(buyerA)
		s.fake.set(txID, func(p *fakePayment) { p.RefundsLate = true })
		s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 502, messageRefundPending)
		for range 3 {
			s.later(time.Hour)
		}
		if s.statusOf(order) != statusPaid || s.row(txID) != "refunding: buyer cancelled" || s.column(txID, "refusals") != "0" || s.fake.calls("v2 cancel") != 1 {
			t.Fatalf("%s, %d cancels", s.row(txID), s.fake.calls("v2 cancel"))
		}
		s.wantMismatches(mismatchDue)
		check(t, s.fake.act(txID, false, func(p *fakePayment) string { return s.fake.endRefund(p, true) }))
		if told {
			s.want(s.noticeV2(txID), 200, "")
		} else {
			s.later(time.Hour)
		}
		if s.statusOf(order) != statusCancelled || s.row(txID) != "refunded: buyer cancelled" || !s.inStock(buyerB, painting) {
			t.Fatalf("%s", s.row(txID))
		}
		s.wantMoney(txID, 109000)
		s.wantBalanced()
	}
}

func TestRefundFailsLater(t *testing.T) {
	s := newShop(t, withV2)
	order, txID, _ := s.paidV2(buyerA)
	s.fake.set(txID, func(p *fakePayment) { p.RefundsLate = true })
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 502, messageRefundPending)
	for n := range stuckAfter {
		check(t, s.fake.act(txID, false, func(p *fakePayment) string { return s.fake.endRefund(p, false) }))
		s.later(time.Hour)
		if got := s.column(txID, "refusals"); got != fmt.Sprint(n+1) || s.fake.calls("v2 cancel") != n+2 {
			t.Fatalf("%s refusals and %d cancels, after %d refunds that failed", got, s.fake.calls("v2 cancel"), n+1)
		}
	}
	s.wantMismatches(mismatchStuck)
	check(t, s.fake.act(txID, true, func(p *fakePayment) string { return s.fake.endRefund(p, true) }))
	s.later(time.Hour)
	s.wantMoney(txID, 109000)
	s.wantBalanced()
}

// Money that is on its way back pays for nothing, even if it has not arrived.
func TestPaidWithMoneyThatGoesBack(t *testing.T) {
	s := newShop(t, withV2)
	order := s.order(buyerA, s.painting(99000))
	txID := s.fake.pay(fakePayment{Version: fakeV2, MerchantUID: order, Amount: 109000, Refunds: []fakeRefund{{Amount: 9000, State: "REQUESTED"}}})
	s.wantNaming(s.reportV2(order), 400, "위조")
	if s.statusOf(order) != statusUnpaid || s.row(txID) != "refunding: "+reasonAmount || s.fake.calls("v2 cancel") != 0 {
		t.Fatal(s.row(txID))
	}
	check(t, s.fake.act(txID, false, func(p *fakePayment) string { return s.fake.endRefund(p, true) }))
	s.later(time.Hour)
	s.wantMoney(txID, 109000)
	s.wantBalanced()
}

// Whatever becomes of the call, the money goes back once.
func TestCancelV2ThroughTrouble(t *testing.T) {
	for name, f := range map[string]fault{
		"answer lost":  {after: dropConnection},
		"never there":  {before: answer500},
		"dropped":      {before: dropConnection},
		"card company": {before: refuseV2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t, withV2)
			order, txID, _ := s.paidV2(buyerA)
			s.fake.faultOnce("v2 cancel", f)
			s.call(buyerA, "DELETE", "/api/orders/"+order, nil)
			s.later(time.Hour)
			if s.statusOf(order) != statusCancelled {
				t.Errorf("status %d", s.statusOf(order))
			}
			if p, _ := s.fake.get(txID); p.Cancelled != 109000 || len(p.Refunds) != 1 {
				t.Errorf("%+v", p)
			}
			s.wantBalanced()
		})
	}
}

func TestVirtualAccountRefundV2(t *testing.T) {
	s := newShop(t, withV2)
	order := s.order(buyerA, s.painting(99000))
	txID := s.fake.pay(fakePayment{Version: fakeV2, MerchantUID: order, Amount: 109000, PayMethod: "vbank"})
	s.want(s.reportV2(order), 200, "")
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 502, messageRefundPending)
	s.clock.advance(time.Hour)
	s.want(s.helpRefund(order, txID, "account"), 200, "")
	s.wantMoney(txID, 109000)
	s.wantBalanced()
}

func TestWebhookV2(t *testing.T) {
	s := newShop(t, withV2)
	now := s.clock.Now()
	order, txID, _ := s.paidV2(buyerA)
	p, _ := s.fake.get(txID)
	_, text := s.fake.noticeOf(p)
	body := string(text)
	sign := func(secret string, at time.Time, body string) http.Header {
		return signedNotice([]byte(secret), "msg_1", at, []byte(body))
	}
	with := func(header http.Header, name, value string) http.Header { header.Set(name, value); return header }
	good := sign(testWebhookSecret, now, body).Get("Webhook-Signature")
	old := `{"payment_id":"` + order + `","tx_id":"` + txID + `","status":"Paid"}`
	form := "payment_id=" + order + "&tx_id=" + txID + "&status=Paid"
	other := `{"type":"BillingKey.Issued","timestamp":"2026-03-02T01:00:00Z","data":{"billingKey":[5]}}`
	for name, row := range map[string]struct {
		header http.Header
		body   string
		status int
	}{
		"signed":                   {sign(testWebhookSecret, now, body), body, 200},
		"with the new secret":      {sign("the-new-secret", now, body), body, 200},
		"the older format":         {sign(testWebhookSecret, now, old), old, 200},
		"the older format, a form": {sign(testWebhookSecret, now, form), form, 200},
		"one of several":           {with(sign("x", now, body), "Webhook-Signature", "v1,bm8= v2,x "+good), body, 200},
		"five minutes ago":         {sign(testWebhookSecret, now.Add(-noticeAge), body), body, 200},
		"in five minutes":          {sign(testWebhookSecret, now.Add(noticeAge), body), body, 200},
		"of something else":        {sign(testWebhookSecret, now, other), other, 200},
		"V1's needs none":          {nil, `{"imp_uid":"imp_unknown"}`, 200},
		"older":                    {sign(testWebhookSecret, now.Add(-noticeAge-time.Second), body), body, 401},
		"newer":                    {sign(testWebhookSecret, now.Add(noticeAge+time.Second), body), body, 401},
		"another secret":           {sign("another", now, body), body, 401},
		"an empty secret":          {sign("", now, body), body, 401},
		"another body":             {sign(testWebhookSecret, now, body), body + " ", 401},
		"another id":               {with(sign(testWebhookSecret, now, body), "Webhook-Id", "msg_2"), body, 401},
		"no id":                    {with(sign(testWebhookSecret, now, body), "Webhook-Id", ""), body, 401},
		"another time":             {with(sign(testWebhookSecret, now, body), "Webhook-Timestamp", fmt.Sprint(now.Unix()+1)), body, 401},
		"a time that is none":      {with(sign(testWebhookSecret, now, body), "Webhook-Timestamp", "now"), body, 401},
		"another version":          {with(sign(testWebhookSecret, now, body), "Webhook-Signature", "v2"+good[2:]), body, 401},
		"no signature":             {with(sign(testWebhookSecret, now, body), "Webhook-Signature", ""), body, 401},
		"not base64":               {with(sign(testWebhookSecret, now, body), "Webhook-Signature", "v1,%%"), body, 401},
		"unsigned":                 {nil, body, 401},
		"unsigned, older format":   {nil, form, 401},
		"not JSON":                 {sign(testWebhookSecret, now, "{"), "{", 400},
	} {
		t.Run(name, func(t *testing.T) { rowOf(t, s).want(s.sendNotice(row.header, row.body), row.status, "") })
	}
	open := newShop(t, withV2, func(c *config) { c.webhookSecrets = nil }) // nothing is signed
	order, txID = open.order(buyerA, open.painting(99000)), ""
	txID = open.chargeV2(order, 109000)
	open.want(open.sendNotice(nil, `{"type":"Transaction.Paid","data":{"paymentId":"`+order+`"}}`), 200, "")
	if open.row(txID) != "kept" {
		t.Error("an unsigned notice is no hint")
	}
}

// What a notice holds beside what is read may be anything.
func TestNoticeOfAnyShape(t *testing.T) {
	for body, want := range map[string]paymentNotice{
		`{"imp_uid":"imp_1","data":5}`:                         {impUID: "imp_1"},
		`{"type":"Transaction.Paid","data":{"paymentId":"p"}}`: {isV2: true, paymentID: "p"},
		`{"type":"Transaction.Paid","data":{"paymentId":5}}`:   {isV2: true},
		`{"type":"New.Thing","data":[5]}`:                      {isV2: true},
		`{"type":"New.Thing"}`:                                 {isV2: true},
		`{"payment_id":"p","status":"Paid"}`:                   {isV2: true, paymentID: "p"},
		`payment_id=p&imp_uid=`:                                {isV2: true, paymentID: "p"},
		``:                                                     {},
	} {
		if got, err := decodeNotice([]byte(body)); got != want || err != nil {
			t.Errorf("%s: %+v, %v", body, got, err)
		}
	}
}

// A signed notice is the gateway's own, and is not counted, whatever it tells of. Strangers' are.
func TestSignedNoticesAreNotCounted(t *testing.T) {
	s := newDirectShop(t, withV2)
	order := s.order(buyerA, s.painting(99000))
	p := fakePayment{Version: fakeV2, MerchantUID: order, ImpUID: "none", Status: "paid"}
	for range 2 * int(clientLimit.burst) {
		header, body := s.fake.noticeOf(p)
		s.want(s.sendNotice(header, string(body)), 200, "")
	}
	if s.limits.total.level != 0 {
		t.Errorf("%v look-ups are counted", s.limits.total.level)
	}
	s.wantNaming(s.reportV2(order), 404, "paymentId")
	if s.limits.total.level != 1 {
		t.Errorf("%v of a stranger's look-ups are counted", s.limits.total.level)
	}
}

func TestWebhookSecrets(t *testing.T) {
	secret := "whsec_" + base64.StdEncoding.EncodeToString([]byte("hidden-value"))
	for value, n := range map[string]int{"": 0, secret: 1, secret + ", " + secret: 2, "hidden-value": -1, "whsec_": -1, "whsec_hidden-value": -1, secret + ",x": -1} {
		e := &environment{getenv: func(string) string { return value }}
		keys := e.webhookSecrets()
		if ok := len(e.problems) == 0; ok != (n >= 0) || ok && len(keys) != n || n > 0 && string(keys[0]) != "hidden-value" {
			t.Errorf("%s: %q, %v", value, keys, e.problems)
		}
		if text := fmt.Sprint(e.problems); strings.Contains(text, "hidden") {
			t.Error(text)
		}
	}
}

// figures and readiness tell the gateways apart.
func TestEachGatewayIsObserved(t *testing.T) {
	s := newShop(t, withV2)
	s.paidV2(buyerA)
	order := s.order(buyerB, s.painting(99000))
	s.fake.setFaults(func(call, _ string) fault {
		if call == "v2 payment" {
			return fault{before: answer500}
		}
		return fault{}
	})
	s.want(s.reportV2(order), 503, messageGateway)
	s.report("imp_unknown") // V1 answers
	s.scrape().want(t, parsedMetrics{
		`lumiere_gateway_silent{gateway="portone"}`:                                           1,
		`lumiere_gateway_silent{gateway="iamport"}`:                                           0,
		`lumiere_gateway_calls_total{gateway="portone",call="payment",outcome="ok"}`:          1,
		`lumiere_gateway_calls_total{gateway="portone",call="payment",outcome="unreachable"}`: 1,
		`lumiere_gateway_calls_total{gateway="iamport",call="payment",outcome="none"}`:        1,
	})
	if a := s.want(s.ready(), 200, ""); !strings.Contains(a.body, gatewayDown) {
		t.Error(a.body)
	}
}

// The payment window and the console of local development speak V2, too.
func TestFakePortoneWindow(t *testing.T) {
	g := newTestGateway(newTestClock().Now)
	mux := http.NewServeMux()
	mux.HandleFunc("POST /local/payments", g.window)
	mux.HandleFunc("POST /local/payments/{imp_uid}", g.console)
	call := func(path, body string, status int) (answer map[string]any) {
		t.Helper()
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequest("POST", "/local/payments"+path, strings.NewReader(body)))
		if w.Code != status || json.Unmarshal(w.Body.Bytes(), &answer) != nil {
			t.Errorf("%s %s: %d %s", path, body, w.Code, w.Body)
		}
		return answer
	}
	first := call("", `{"paymentId":"p","amount":5900,"status":"failed"}`, 200)
	approved := call("", `{"paymentId":"p","amount":5900,"status":"approved"}`, 200)
	txID, _ := approved["txId"].(string)
	if first["paymentId"] != "p" || first["txId"] == txID || first["paymentToken"] != nil || len(txID) != 36 || approved["paymentToken"] == nil {
		t.Errorf("%v, %v", first, approved)
	}
	paid, _ := call("", `{"paymentId":"p","amount":5900}`, 200)["txId"].(string)
	call("", `{"paymentId":"p","amount":5900}`, 400) // it is paid
	call("/"+paid, `{"do":"late"}`, 200)
	call("/"+paid, `{"do":"finish"}`, 400)
	for _, row := range []struct {
		do   string
		back int64
	}{{"fail", 0}, {"finish", 5900}} {
		g.set(paid, func(p *fakePayment) { p.Refunds = append(p.Refunds, fakeRefund{Amount: 5900, State: "REQUESTED"}) })
		call("/"+paid, `{"do":"`+row.do+`"}`, 200)
		if p, _ := g.get(paid); p.Cancelled != row.back {
			t.Errorf("%s: %+v", row.do, p)
		}
	}
	call("/"+g.pay(fakePayment{MerchantUID: "o", Amount: 1}), `{"do":"late"}`, 400) // V1 has none
}
