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
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// gatewayTest is a client and the gateway that it calls, on one clock.
type gatewayTest struct {
	*iamportClient
	fake     *testGateway
	clock    *testClock
	outcomes chan string // "call outcome" of every call that ended
}

func newGatewayTest(t *testing.T, sandbox bool) *gatewayTest {
	t.Helper()
	g := newGatewayTestInMemory(sandbox)
	server := httptest.NewServer(g.fake)
	g.url, g.client.Transport = server.URL, newGatewayTransport()
	t.Cleanup(server.Close)
	t.Cleanup(g.client.CloseIdleConnections)
	return g
}

// newGatewayTestInMemory uses no network, so that time can be that of a synctest.
func newGatewayTestInMemory(sandbox bool) *gatewayTest {
	clock := newTestClock()
	double := newTestGateway(clock.Now)
	outcomes := make(chan string, 1000)
	gateway := newIamportClient(iamportConfig{
		key: double.key, secret: double.secret, sandbox: sandbox, now: clock.Now, transport: double,
		observe: func(call, outcome string, _ error, _ time.Duration) { outcomes <- call + " " + outcome },
	})
	return &gatewayTest{gateway, double, clock, outcomes}
}

func (g *gatewayTest) nextOutcomes(n int) (all []string) {
	for range n {
		all = append(all, <-g.outcomes)
	}
	return all
}

// wantFailure checks for a gatewayError and that it tells no secret.
func (g *gatewayTest) wantFailure(t *testing.T, err error, status int, call string) {
	t.Helper()
	var failure *gatewayError
	if !errors.As(err, &failure) || failure.status != status || failure.call != call {
		t.Fatalf("err = %v, want a GatewayError %d of %s", err, status, call)
	}
	g.fake.mu.Lock()
	token := g.fake.token
	g.fake.mu.Unlock()
	for _, secret := range []string{g.key, g.secret, token} {
		if secret != "" && strings.Contains(err.Error(), secret) {
			t.Errorf("error tells a secret: %v", err)
		}
	}
}

func TestGatewayLooksUpAndCancels(t *testing.T) {
	g := newGatewayTest(t, false)
	first := g.fake.pay(fakePayment{MerchantUID: "order-1", Amount: 5900})
	g.fake.pay(fakePayment{MerchantUID: "order-1", Status: "failed", Amount: 5900})
	g.fake.pay(fakePayment{MerchantUID: "order-2", Status: "ready", Amount: 1})
	want := gatewayPayment{
		gateway: gatewayIamport, impUID: first, merchantUID: "order-1", status: "paid", payMethod: "card", currency: "KRW", amount: 5900,
		paidAt: g.clock.Now(), moved: true,
	}

	if p, err := g.payment(t.Context(), first); p != want || err != nil {
		t.Errorf("Payment = %+v, %v, want %+v", p, err, want)
	}
	if all, err := g.paidPaymentsOf(t.Context(), "order-1"); !reflect.DeepEqual(all, []gatewayPayment{want}) || err != nil {
		t.Errorf("paidPaymentsOf = %+v, %v, want %+v alone", all, err, want)
	}
	if all, err := g.paymentsOf(t.Context(), "order-1"); !reflect.DeepEqual(all, []gatewayPayment{want}) || err != nil {
		t.Errorf("PaymentsFor = %+v, %v, want %+v alone", all, err, want)
	}
	for _, impUID := range []string{"imp_none", "", "a/../b", strings.Repeat("x", 65), "imp_1?x=y"} {
		if p, err := g.payment(t.Context(), impUID); !errors.Is(err, errNoPayment) {
			t.Errorf("Payment(%q) = %+v, %v, want ErrNoPayment", impUID, p, err)
		}
	}
	if all, err := g.paidPaymentsOf(t.Context(), "order-2"); len(all) != 0 || err != nil {
		t.Errorf("paidPaymentsOf = %+v, %v, want none", all, err)
	}
	if all, err := g.paymentsOf(t.Context(), "order-2"); len(all) != 0 || err != nil {
		t.Errorf("PaymentsFor = %+v, %v, want none", all, err)
	}

	want.status, want.cancelled, want.refundsListed, want.refundReasons = "cancelled", 900, 900, "a part\n"
	if p, err := g.cancelPayment(t.Context(), cancelRequest{impUID: first, amount: 900, remaining: 5900, isKRW: true, reason: "a part"}); p != want || err != nil {
		t.Errorf("Cancel of a part = %+v, %v, want %+v", p, err, want)
	}
	want.cancelled, want.fullyRefunded, want.refundsListed, want.refundReasons = 5900, true, 5900, "a part\n위조 \"결제\" <&>\n"
	request := cancelRequest{impUID: first, remaining: 5000, isKRW: true, reason: `위조 "결제" <&>`}
	if p, err := g.cancelPayment(t.Context(), request); p != want || err != nil {
		t.Errorf("Cancel = %+v, %v, want %+v", p, err, want)
	}
	if all, err := g.paymentsOf(t.Context(), "order-1"); !reflect.DeepEqual(all, []gatewayPayment{want}) || err != nil {
		t.Errorf("PaymentsFor = %+v, %v, want %+v", all, err, want)
	}
	if p, _ := g.fake.get(first); len(p.Refunds) != 2 || p.Refunds[1].Reason != request.reason {
		t.Errorf("refunds at the gateway: %+v", p.Refunds)
	}
	if n := g.fake.calls("payment"); n != 2 {
		t.Errorf("%d payment calls, want 2: what is no imp_uid is not asked for", n)
	}
	wantOutcomes := []string{
		"token ok", "payment ok", "findAll ok", "findAll ok", "payment none", "findAll ok", "findAll ok", "cancel ok",
	}
	if outcomes := g.nextOutcomes(len(wantOutcomes)); !reflect.DeepEqual(outcomes, wantOutcomes) {
		t.Errorf("observed %q, want %q", outcomes, wantOutcomes)
	}
}

func TestGatewayCancelRefused(t *testing.T) {
	g := newGatewayTest(t, false)
	impUID := g.fake.pay(fakePayment{MerchantUID: "order", Amount: 5900})
	if err := g.fake.refundInConsole(impUID, 900); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		request cancelRequest
		message string
	}{
		"unknown":  {cancelRequest{impUID: "imp_none", remaining: 5900, isKRW: true}, fakeNoTarget},
		"checksum": {cancelRequest{impUID: impUID, remaining: 5900, isKRW: true}, fakeChecksum},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := g.cancelPayment(t.Context(), c.request)
			var refusal *gatewayRefusal
			if !errors.As(err, &refusal) || refusal.code != "1" || refusal.message != c.message {
				t.Errorf("err = %v, want a refusal", err)
			}
		})
	}
	before := g.fake.calls("cancel")
	for _, request := range []cancelRequest{
		{impUID: impUID, isKRW: true}, {impUID: impUID, remaining: -1, isKRW: true}, {impUID: "a b", remaining: 1, isKRW: true}, {remaining: 1},
	} {
		if p, err := g.cancelPayment(t.Context(), request); err == nil {
			t.Errorf("Cancel(%+v) = %+v, want an error", request, p)
		}
	}
	if g.fake.calls("cancel") != before {
		t.Error("a request that cannot be right was sent")
	}
	if p, _ := g.fake.get(impUID); p.Cancelled != 900 {
		t.Errorf("%d won given back, want the 900 of before", p.Cancelled)
	}

	if p, err := g.cancelPayment(t.Context(), cancelRequest{impUID: impUID, remaining: 5000, isKRW: true, reason: "나머지"}); p.cancelled != 5900 || err != nil {
		t.Errorf("Cancel of the rest = %+v, %v", p, err)
	}
	var refusal *gatewayRefusal
	if _, err := g.cancelPayment(t.Context(), cancelRequest{impUID: impUID, remaining: 5900, isKRW: true}); !errors.As(err, &refusal) ||
		refusal.message != fakeCancelled {
		t.Errorf("second cancel: %v", err)
	}
}

func TestGatewayCancelsForeignPaymentWithoutChecksum(t *testing.T) {
	g := newGatewayTest(t, false)
	impUID := g.fake.pay(fakePayment{MerchantUID: "order", Amount: 50, Currency: "USD"})
	check(t, g.fake.refundInConsole(impUID, 20))
	if p, err := g.payment(t.Context(), impUID); err != nil || p.status != "cancelled" || p.fullyRefunded {
		t.Errorf("with a remainder: %+v, %v", p, err)
	}
	p, err := g.cancelPayment(t.Context(), cancelRequest{impUID: impUID})
	if err != nil || !p.fullyRefunded || p.isKRW() || p.amount != 0 || p.cancelled != 0 {
		t.Errorf("Cancel = %+v, %v", p, err)
	}
}

func TestRefusalIsSafeToLog(t *testing.T) {
	r := &gatewayRefusal{"-1", "[2015] 취소 실패\n홍 010-1234-5678 1234567890123456 a@b.kr 5,900원 " + strings.Repeat("가", 1000)}
	text := r.Error()
	for _, private := range []string{"1234", "5678", "@", "\n"} {
		if strings.Contains(text, private) {
			t.Errorf("%q is in %s", private, text)
		}
	}
	if !strings.Contains(text, "[2015] 취소 실패") || !strings.Contains(text, "5,900원") || len(text) > 1000 {
		t.Errorf("text = %s", text)
	}
}

func TestGatewaySandbox(t *testing.T) {
	for _, sandbox := range []bool{false, true} {
		t.Run(fmt.Sprint(sandbox), func(t *testing.T) {
			g := newGatewayTest(t, sandbox)
			test := g.fake.pay(fakePayment{MerchantUID: "test", Amount: 1, Sandbox: true})
			real := g.fake.pay(fakePayment{MerchantUID: "mixed", Amount: 1})
			g.clock.advance(time.Minute)
			later := g.fake.pay(fakePayment{MerchantUID: "mixed", Amount: 1, Sandbox: true})

			p, err := g.payment(t.Context(), test)
			if sandbox && !p.sandbox || !sandbox && !errors.Is(err, errNoPayment) {
				t.Errorf("Payment = %+v, %v", p, err)
			}
			all, err := g.paymentsOf(t.Context(), "test")
			if err != nil || sandbox != (len(all) == 1) {
				t.Errorf("PaymentsFor = %+v, %v", all, err)
			}
			want := []string{real}
			if sandbox {
				want = append(want, later)
			}
			all, err = g.paidPaymentsOf(t.Context(), "mixed")
			var got []string
			for _, p := range all {
				got = append(got, p.impUID)
			}
			if !reflect.DeepEqual(got, want) || err != nil {
				t.Errorf("paidPaymentsOf(mixed) = %q, %v, want %q", got, err, want)
			}
		})
	}
}

func TestGatewayReadsAllPages(t *testing.T) {
	g := newGatewayTest(t, false)
	for i := range 100 * maxPages {
		g.fake.pay(fakePayment{MerchantUID: "order", Amount: int64(i)})
	}
	all, err := g.paymentsOf(t.Context(), "order")
	if err != nil || len(all) != 100*maxPages {
		t.Fatalf("%d payments, %v, want all", len(all), err)
	}
	for i, p := range all {
		if p.amount != int64(i) {
			t.Fatalf("payment %d is number %d", i, p.amount)
		}
	}
	g.fake.pay(fakePayment{MerchantUID: "order", Amount: 1})
	_, err = g.paymentsOf(t.Context(), "order")
	g.wantFailure(t, err, 502, "findAll")
}

func TestGatewayTokenLife(t *testing.T) {
	g := newGatewayTest(t, false)
	impUID := g.fake.pay(fakePayment{MerchantUID: "order", Amount: 1})
	for _, step := range []struct {
		wait time.Duration
		want int // token calls so far
	}{
		{0, 1},
		{30*time.Minute - tokenMargin - time.Second, 1},
		{time.Second, 2},       // within the margin: the same token, its life extended by 5 minutes
		{5 * time.Minute, 3},   // again
		{10 * time.Minute, 4},  // expired: a new one
		{29 * time.Minute, 4},  // still good
		{100 * time.Minute, 5}, // long expired
	} {
		g.clock.advance(step.wait)
		if _, err := g.payment(t.Context(), impUID); err != nil {
			t.Fatal(err)
		}
		if n := g.fake.calls("token"); n != step.want {
			t.Fatalf("after %v: %d token calls, want %d", step.wait, n, step.want)
		}
	}
}

func TestGatewayTokenLifeIgnoresClockSkew(t *testing.T) {
	for _, skew := range []time.Duration{-time.Hour, time.Hour} {
		g := newGatewayTest(t, false)
		ours := newTestClock()
		ours.advance(skew)
		g.now = ours.Now
		for _, wait := range []time.Duration{0, 29 * time.Minute, time.Minute} {
			ours.advance(wait)
			g.clock.advance(wait)
			if _, err := g.payment(t.Context(), "imp_none"); !errors.Is(err, errNoPayment) {
				t.Fatal(err)
			}
		}
		if n := g.fake.calls("token"); n != 2 {
			t.Errorf("skew %v: %d token calls, want 2", skew, n)
		}
	}
}

// All who need a token while it is asked for wait for that one; who asked first may go away meanwhile.
func TestGatewayConcurrentCallersRenewOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGatewayTestInMemory(false)
		impUID := g.fake.pay(fakePayment{MerchantUID: "order", Amount: 1})
		release := make(chan struct{})
		g.fake.faultOnce("token", fault{before: stopUntil(release)})

		ctx, leave := context.WithCancel(t.Context())
		first := make(chan error)
		go func() { _, err := g.payment(ctx, impUID); first <- err }()
		synctest.Wait()
		leave()
		if err := <-first; !errors.Is(err, context.Canceled) {
			t.Errorf("the caller who left: %v", err)
		}
		const callers = 50
		errs := make(chan error, callers)
		for range callers {
			go func() { _, err := g.payment(t.Context(), impUID); errs <- err }()
		}
		synctest.Wait()
		close(release)
		for range callers {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		if n := g.fake.calls("token"); n != 1 {
			t.Errorf("%d token calls, want 1", n)
		}
	})
}

// Who hears late that the old token was turned down uses the one that others have got meanwhile, though the
// gateway gave them the same string.
func TestGatewayRenewsRejectedTokenOnce(t *testing.T) {
	g := newGatewayTest(t, false)
	impUID := g.fake.pay(fakePayment{MerchantUID: "order", Amount: 1})
	if _, err := g.payment(t.Context(), impUID); err != nil {
		t.Fatal(err)
	}
	arrived, release := make(chan struct{}), make(chan struct{})
	arrive := waitFor(func(context.Context) { close(arrived) })
	g.fake.faultOnce("payment", fault{before: inTurn(arrive, stopUntil(release), answer401)})
	g.fake.faultOnce("payment", fault{before: answer401})
	late := make(chan error)
	go func() { _, err := g.payment(t.Context(), impUID); late <- err }()
	<-arrived
	if _, err := g.payment(t.Context(), impUID); err != nil {
		t.Error(err)
	}
	close(release)
	if err := <-late; err != nil {
		t.Error(err)
	}
	if n := g.fake.calls("token"); n != 2 {
		t.Errorf("%d token calls, want 2", n)
	}
}

func TestGatewayRetriesOnceOn401(t *testing.T) {
	g := newGatewayTest(t, false)
	impUID := g.fake.pay(fakePayment{MerchantUID: "order", Amount: 5900})
	g.fake.faultOnce("cancel", fault{before: answer401})
	if _, err := g.cancelPayment(t.Context(), cancelRequest{impUID: impUID, remaining: 5900, isKRW: true}); err != nil {
		t.Error(err)
	}
	if token, cancel := g.fake.calls("token"), g.fake.calls("cancel"); token != 2 || cancel != 2 {
		t.Errorf("%d token and %d cancel calls, want 2 each", token, cancel)
	}

	g.fake.setFaults(func(call, _ string) fault {
		if call == "payment" {
			return fault{before: answer401}
		}
		return fault{}
	})
	_, err := g.payment(t.Context(), impUID)
	g.wantFailure(t, err, 502, "payment")
	if n := g.fake.calls("payment"); n != 2 {
		t.Errorf("%d payment calls, want 2", n)
	}
	g.fake.setFaults(nil)
	if _, err := g.payment(t.Context(), impUID); err != nil {
		t.Errorf("after the gateway came to its senses: %v", err)
	}
}

// Every way a call can fail before or after the work, through every call.
func TestGatewayFaults(t *testing.T) {
	for name, c := range map[string]struct {
		fault  fault
		status int
	}{
		"500 with HTML":  {fault{before: answer500}, 503},
		"dropped":        {fault{before: dropConnection}, 503},
		"lost answer":    {fault{after: dropConnection}, 503},
		"hung":           {fault{before: hangUntilGone}, 504},
		"hung when done": {fault{after: hangUntilGone}, 504},
	} {
		for _, call := range []string{"token", "payment", "findAll", "cancel"} {
			t.Run(name+"/"+call, func(t *testing.T) {
				if c.status != 504 {
					newGatewayTest(t, false).testFault(t, call, c.fault, c.status)
					return
				}
				synctest.Test(t, func(t *testing.T) {
					newGatewayTestInMemory(false).testFault(t, call, c.fault, c.status)
				})
			})
		}
	}
}

func (g *gatewayTest) testFault(t *testing.T, call string, f fault, status int) {
	id := g.fake.pay(fakePayment{MerchantUID: "order", Amount: 5900})
	g.fake.setFaults(func(arrived, _ string) fault {
		if arrived == call {
			return f
		}
		return fault{}
	})
	do := func() (err error) {
		switch call {
		case "token", "payment":
			_, err = g.payment(t.Context(), id)
		case "findAll":
			_, err = g.paymentsOf(t.Context(), "order")
		case "cancel":
			_, err = g.cancelPayment(t.Context(), cancelRequest{impUID: id, remaining: 5900, isKRW: true})
		}
		return err
	}

	err := do()
	var failure *gatewayError
	if call == "token" && errors.As(err, &failure) && failure.status == 504 {
		g.wantFailure(t, err, 504, failure.call) // the look-up and its token run out of the same 5 s
	} else {
		g.wantFailure(t, err, status, call)
	}
	outcome := map[int]string{503: "unreachable", 504: "timeout"}[status]
	if outcomes := g.nextOutcomes(2); !strings.HasSuffix(outcomes[1], " "+outcome) {
		t.Errorf("observed %q, want %s", outcomes, outcome)
	}
	p, _ := g.fake.get(id)
	if done := call == "cancel" && f.after != nil; done != (p.Cancelled == 5900) {
		t.Errorf("%d won given back", p.Cancelled)
	}

	g.fake.setFaults(nil)
	var refusal *gatewayRefusal
	if err := do(); err != nil && !(call == "cancel" && errors.As(err, &refusal)) {
		t.Errorf("afterwards: %v", err)
	}
}

func TestGatewayUnreachable(t *testing.T) {
	g := newGatewayTest(t, false)
	server := httptest.NewServer(http.NotFoundHandler())
	server.Close()
	g.url = server.URL
	_, err := g.payment(t.Context(), "imp_1")
	g.wantFailure(t, err, 503, "token")
}

func TestGatewayRejectsKeys(t *testing.T) {
	g := newGatewayTest(t, false)
	g.key = "another-key"
	_, err := g.cancelPayment(t.Context(), cancelRequest{impUID: "imp_1", remaining: 1, isKRW: true})
	g.wantFailure(t, err, 502, "token")
}

func TestGatewayCancelRefusedByCardCompany(t *testing.T) {
	const message = "결제취소에 실패하였습니다. 기취소성공"
	g := newGatewayTest(t, false)
	id := g.fake.pay(fakePayment{MerchantUID: "order", Amount: 5900})
	g.fake.faultOnce("cancel", fault{before: answerRefusal(-1, message)})
	_, err := g.cancelPayment(t.Context(), cancelRequest{impUID: id, remaining: 5900, isKRW: true})
	var refusal *gatewayRefusal
	if !errors.As(err, &refusal) || *refusal != (gatewayRefusal{"-1", message}) {
		t.Errorf("err = %v", err)
	}
	if p, _ := g.fake.get(id); p.Cancelled != 0 {
		t.Error("money went back")
	}
}

// One answer each, from a server that gives a good token to everybody.
func TestGatewayAnswers(t *testing.T) {
	const good = `{"imp_uid":"imp_1","merchant_uid":"order","status":"paid","currency":"KRW","amount":5900,` +
		`"cancel_amount":0,"sandbox":false,"paid_at":1700000000}`
	envelope := func(response string) string { return `{"code":0,"message":null,"response":` + response + `}` }
	with := func(old, new string) string { return envelope(strings.Replace(good, old, new, 1)) }
	amount := func(number string) string { return with("5900", number) }
	const private = "buyer-name-in-the-answer"

	for name, c := range map[string]struct {
		status int
		body   string
		want   any // Payment, a gatewayError's status, or an error
	}{
		"good":                {200, envelope(good), int64(5900)},
		"unknown fields":      {200, with(`"paid_at"`, `"new":{"a":[null,1e999]},"paid_at"`), int64(5900)},
		"unknown status":      {200, with(`"paid"`, `"pending"`), int64(5900)},
		"no sandbox":          {200, with(`"sandbox":false,`, ``), int64(5900)},
		"never paid":          {200, with(`1700000000`, `null`), int64(5900)},
		"amount 5900.0":       {200, amount("5900.0"), int64(5900)},
		"amount 5.9e3":        {200, amount("5.9e3"), int64(5900)},
		"amount 590000E-2":    {200, amount("590000E-2"), int64(5900)},
		"amount 0":            {200, amount("0"), int64(0)},
		"foreign":             {200, strings.Replace(amount("12.34"), "KRW", "USD", 1), int64(0)},
		"amount 5900.5":       {200, amount("5900.5"), 502},
		"amount almost whole": {200, amount("5900.0000000000000000000000001"), 502},
		"amount string":       {200, amount(`"5900"`), 502},
		"amount null":         {200, amount("null"), 502},
		"amount 1e400":        {200, amount("1e400"), 502},
		"amount 1e999999999":  {200, amount("1e999999999"), 502},
		"amount 1e-999999999": {200, amount("1e-999999999"), 502},
		"amount too large":    {200, amount("9223372036854775808"), 502},
		"amount negative":     {200, amount("-1"), 502},
		"amount object":       {200, amount("{}"), 502},
		"amount missing":      {200, with(`"amount":5900,`, ``), 502},
		"cancel_amount":       {200, with(`"cancel_amount":0`, `"cancel_amount":0.5`), 502},
		"no cancel_amount":    {200, with(`"cancel_amount":0,`, ``), 502},
		"no imp_uid":          {200, with(`"imp_uid":"imp_1",`, ``), 502},
		"other imp_uid":       {200, with(`imp_1`, `imp_2`), 502},
		"imp_uid a number":    {200, with(`"imp_1"`, `1012345678`), 502},
		"no merchant_uid":     {200, with(`"order"`, `null`), 502},
		"no status":           {200, with(`"paid"`, `null`), 502},
		"no currency":         {200, with(`"KRW"`, `""`), 502},
		"paid_at text":        {200, with(`1700000000`, `"`+private+`"`), 502},
		"paid_at in ms":       {200, with(`1700000000`, `1700000000000`), 502},
		"sandbox payment":     {200, with(`false`, `true`), errNoPayment},
		"404":                 {404, `{"code":-1,"message":"존재하지 않는 결제정보입니다.","response":null}`, errNoPayment},
		"404 other text":      {404, `{"code":-1,"message":"없음"}`, errNoPayment},
		"404 of a proxy":      {404, `<html>` + private + `</html>`, 502},
		"404 and code 0":      {404, envelope(good), 502},
		"not found with 200":  {200, `{"code":-1,"message":"존재하지 않는 결제정보입니다.","response":null}`, errNoPayment},
		"refused":             {200, `{"code":-1,"message":"거절","response":null}`, &gatewayRefusal{"-1", "거절"}},
		"refused with a body": {200, strings.Replace(envelope(good), `0`, `1`, 1), &gatewayRefusal{"1", ""}},
		"400":                 {400, `{"code":-1,"message":"` + private + `","response":null}`, 502},
		"302":                 {302, ``, 502},
		"207":                 {207, envelope(good), 502},
		"429":                 {429, ``, 503},
		"500":                 {500, envelope(good), 503},
		"502 with HTML":       {502, `<html>` + private + `</html>`, 503},
		"HTML":                {200, `<html>` + private + `</html>`, 502},
		"empty":               {200, ``, 502},
		"null":                {200, `null`, 502},
		"no code":             {200, `{"response":` + good + `}`, 502},
		"code a string":       {200, `{"code":"0","response":` + good + `}`, 502},
		"message an object":   {200, `{"code":1,"message":{"a":"` + private + `"}}`, 502},
		"no response":         {200, `{"code":0,"message":null}`, 502},
		"response null":       {200, envelope(`null`), 502},
		"response a list":     {200, envelope(`[` + good + `]`), 502},
		"two documents":       {200, envelope(good) + envelope(good), 502},
		"half a document":     {200, envelope(good)[:60], 502},
		"huge":                {200, envelope(good) + strings.Repeat(" ", maxAnswer), 502},
		"huge 500":            {500, strings.Repeat("x", 2*maxAnswer), 503},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newAnswerTest(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Location", "/users/getToken")
				w.WriteHeader(c.status)
				io.WriteString(w, c.body)
			})
			p, err := g.payment(t.Context(), "imp_1")
			var failure *gatewayError
			var refusal *gatewayRefusal
			switch want := c.want.(type) {
			case int64:
				if err != nil || p.impUID != "imp_1" || p.merchantUID != "order" || p.amount != want {
					t.Errorf("Payment = %+v, %v", p, err)
				}
			case int:
				if !errors.As(err, &failure) || failure.status != want || failure.call != "payment" {
					t.Errorf("Payment = %+v, %v, want a GatewayError %d", p, err, want)
				}
			case *gatewayRefusal:
				if !errors.As(err, &refusal) || *refusal != *want {
					t.Errorf("Payment = %+v, %v, want %v", p, err, want)
				}
			case error:
				if !errors.Is(err, want) {
					t.Errorf("Payment = %+v, %v, want %v", p, err, want)
				}
			}
			if err != nil {
				for _, secret := range []string{g.key, g.secret, answerTestToken, private, "1012345678"} {
					if strings.Contains(err.Error(), secret) {
						t.Errorf("the error tells too much: %v", err)
					}
				}
			}
		})
	}
}

const answerTestToken = "0123456789012345678901234567890123456789"

// newAnswerTest is a client before a server that gives a good token, and for everything else does as told.
func newAnswerTest(t *testing.T, answer http.HandlerFunc) *iamportClient {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("POST /users/getToken", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `{"code":0,"response":{"access_token":%q,"now":1,"expired_at":1801}}`, answerTestToken)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if got := r.Header.Get("Authorization"); got != answerTestToken {
			t.Errorf("Authorization: %q", got)
		}
		answer(w, r)
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	g := newIamportClient(iamportConfig{url: server.URL, key: "a-test-key", secret: "a-test-secret"})
	t.Cleanup(g.client.CloseIdleConnections)
	return g
}

func TestGatewayTokenAnswers(t *testing.T) {
	const secret = "0123456789"
	token := func(fields string) string { return `{"code":0,"response":{"access_token":` + fields + `}}` }
	for name, c := range map[string]struct {
		status int
		body   string
		want   int
	}{
		"401":              {401, `{"code":-1,"message":"a-test-key a-test-secret","response":null}`, 502},
		"refused":          {200, `{"code":1,"message":"a-test-key a-test-secret","response":null}`, 502},
		"404":              {404, `{"code":-1,"message":"a-test-key a-test-secret","response":null}`, 502},
		"no token":         {200, token(`"", "now":1, "expired_at":1801`), 502},
		"token a number":   {200, token(`1` + secret + `, "now":1, "expired_at":1801`), 502},
		"no now":           {200, token(`"` + secret + `", "expired_at":1801`), 502},
		"expired":          {200, token(`"` + secret + `", "now":1801, "expired_at":1801`), 502},
		"not for a header": {200, token(`"` + secret + `\n", "now":1, "expired_at":1801`), 503},
		"response null":    {200, `{"code":0,"response":null}`, 502},
		"500":              {500, `a-test-key a-test-secret`, 503},
	} {
		t.Run(name, func(t *testing.T) {
			g := newAnswerTest(t, nil)
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.WriteHeader(c.status)
				io.WriteString(w, c.body)
			}))
			defer server.Close()
			g.url = server.URL
			_, err := g.payment(t.Context(), "imp_1")
			var failure *gatewayError
			if !errors.As(err, &failure) || failure.status != c.want {
				t.Fatalf("err = %v, want a GatewayError %d", err, c.want)
			}
			for _, text := range []string{g.key, g.secret, secret} {
				if strings.Contains(err.Error(), text) {
					t.Errorf("the error tells a secret: %v", err)
				}
			}
		})
	}
}

func TestGatewayConnectionsThatBreak(t *testing.T) {
	for name, c := range map[string]struct {
		bytes string
		want  int
	}{
		"truncated":           {"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"code\":0,", 502},
		"truncated 500":       {"HTTP/1.1 500 No\r\nContent-Length: 1000\r\n\r\n<html>", 503},
		"not HTTP":            {answerTestToken + "\r\n\r\n", 503},
		"a header not a line": {"HTTP/1.1 200 OK\r\n" + answerTestToken + "\r\n\r\n", 503},
		"endless headers":     {"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 100<<10) + "\r\n\r\n", 503},
	} {
		t.Run(name, func(t *testing.T) {
			g := newAnswerTest(t, func(w http.ResponseWriter, r *http.Request) {
				connection, _, err := http.NewResponseController(w).Hijack()
				if err != nil {
					t.Error(err)
					return
				}
				defer connection.Close()
				io.WriteString(connection, c.bytes)
			})
			_, err := g.payment(t.Context(), "imp_1")
			var failure *gatewayError
			if !errors.As(err, &failure) || failure.status != c.want {
				t.Fatalf("err = %v, want a GatewayError %d", err, c.want)
			}
			if strings.Contains(err.Error(), answerTestToken) {
				t.Errorf("the error tells what was answered: %v", err)
			}
		})
	}
}

func TestGatewayEscapesPaths(t *testing.T) {
	var asked string
	g := newAnswerTest(t, func(w http.ResponseWriter, r *http.Request) {
		asked = r.URL.EscapedPath()
		w.WriteHeader(404)
		io.WriteString(w, `{"code":-1}`)
	})
	if all, err := g.paidPaymentsOf(t.Context(), "주문/1?a=b#c%"); len(all) != 0 || err != nil {
		t.Error(all, err)
	}
	if want := "/payments/findAll/%EC%A3%BC%EB%AC%B8%2F1%3Fa=b%23c%25/paid"; asked != want {
		t.Errorf("asked for %s, want %s", asked, want)
	}
}

func TestGatewayFindAnswersAboutAnother(t *testing.T) {
	g := newGatewayTest(t, false)
	id := g.fake.pay(fakePayment{MerchantUID: "order", Amount: 1})
	bend := fault{before: waitFor(func(context.Context) {
		g.fake.set(id, func(p *fakePayment) { p.ImpUID = "not an imp_uid" })
	})}
	g.fake.faultOnce("findAll", bend)
	_, err := g.paymentsOf(t.Context(), "order")
	g.wantFailure(t, err, 502, "findAll")

	other := newAnswerTest(t, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"code":0,"response":{"next":0,"list":[{"imp_uid":"imp_1","merchant_uid":"other","status":"paid",`+
			`"currency":"KRW","amount":1,"cancel_amount":0}]}}`)
	})
	_, err = other.paidPaymentsOf(t.Context(), "order")
	g.wantFailure(t, err, 502, "findAll")
}

// A caller that goes away ends its look-up, at the gateway too, but never its cancel.
func TestGatewayCallerGoesAway(t *testing.T) {
	g := newGatewayTest(t, false)
	id := g.fake.pay(fakePayment{MerchantUID: "order", Amount: 5900})
	if _, err := g.payment(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	g.nextOutcomes(2)

	ctx, leave := context.WithCancel(t.Context())
	gone := make(chan struct{})
	g.fake.faultOnce("payment", fault{before: waitFor(func(ctx context.Context) {
		leave()
		<-ctx.Done()
		close(gone)
	})})
	_, err := g.payment(ctx, id)
	g.wantFailure(t, err, 504, "payment")
	if !errors.Is(err, context.Canceled) {
		t.Errorf("err = %v, want it to say that the caller left", err)
	}
	<-gone

	p, err := g.cancelPayment(ctx, cancelRequest{impUID: id, remaining: 5900, isKRW: true})
	if p.cancelled != 5900 || err != nil {
		t.Errorf("cancel of a caller who had left: %+v, %v", p, err)
	}
	if outcomes := g.nextOutcomes(1); outcomes[0] != "cancel ok" {
		t.Errorf("observed %q: a caller who leaves says nothing of the gateway", outcomes)
	}
}

// The limits as they are in production, on a clock of the test's own.
func TestGatewayLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stuck := roundTripFunc(func(r *http.Request) (*http.Response, error) {
			if r.URL.Path == "/users/getToken" {
				return gatewayResponse(`{"code":0,"response":{"access_token":"a","now":1,"expired_at":1801}}`), nil
			}
			<-r.Context().Done()
			return nil, r.Context().Err()
		})
		g := newIamportClient(iamportConfig{transport: stuck})
		for call, limit := range map[string]time.Duration{"payment": 5 * time.Second, "cancel": 60 * time.Second} {
			start := time.Now()
			var err error
			if call == "payment" {
				_, err = g.payment(t.Context(), "imp_1")
			} else {
				_, err = g.cancelPayment(t.Context(), cancelRequest{impUID: "imp_1", remaining: 1, isKRW: true})
			}
			var failure *gatewayError
			if !errors.As(err, &failure) || failure.status != 504 || failure.call != call {
				t.Errorf("%s: err = %v", call, err)
			}
			if took := time.Since(start); took != limit {
				t.Errorf("%s gave up after %v, want %v", call, took, limit)
			}
		}
	})
}

// However many call, at most 16 calls are under way; look-ups don't keep a cancel waiting; who gets no slot
// in time hears 503.
func TestGatewaySixteenAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var underWay, cancels atomic.Int32
		release := make(chan struct{})
		transport := roundTripFunc(func(r *http.Request) (*http.Response, error) {
			if r.URL.Path == "/users/getToken" {
				return gatewayResponse(`{"code":0,"response":{"access_token":"a","now":1,"expired_at":1801}}`), nil
			}
			if underWay.Add(1) > 16 {
				t.Error("more than 16 calls at once")
			}
			defer underWay.Add(-1)
			if r.Method == http.MethodPost {
				cancels.Add(1)
			}
			<-release
			return gatewayResponse(`{"code":1}`), nil
		})
		g := newIamportClient(iamportConfig{transport: transport})
		results := make(chan error, 100)
		start := func(n int, call func() (gatewayPayment, error)) {
			for range n {
				go func() { _, err := call(); results <- err }()
			}
			synctest.Wait()
		}
		lookUp := func() (gatewayPayment, error) { return g.payment(t.Context(), "imp_1") }
		cancel := func() (gatewayPayment, error) {
			return g.cancelPayment(t.Context(), cancelRequest{impUID: "imp_1", remaining: 1, isKRW: true})
		}

		g.lookUpLimit = 30 * time.Second
		start(maxLookUps, lookUp)
		g.lookUpLimit = 5 * time.Second
		start(30, lookUp)
		start(20, cancel)
		if underWay.Load() != maxLookUps+maxCancels || cancels.Load() != maxCancels {
			t.Errorf("%d calls under way, %d of them cancels", underWay.Load(), cancels.Load())
		}
		for range 30 {
			var failure *gatewayError
			if err := <-results; !errors.As(err, &failure) || failure.status != 503 {
				t.Errorf("without a slot: %v", err)
			}
		}
		close(release)
		for range maxLookUps + 20 {
			var refusal *gatewayRefusal
			if err := <-results; !errors.As(err, &refusal) {
				t.Errorf("with a slot: %v", err)
			}
		}
	})
}

type roundTripFunc func(*http.Request) (*http.Response, error)

func (f roundTripFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func gatewayResponse(body string) *http.Response {
	return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader(body))}
}

func FuzzPaymentAnswer(f *testing.F) {
	f.Add(200, []byte(`{"code":0,"message":null,"response":{"imp_uid":"imp_1","merchant_uid":"a","status":"paid",`+
		`"currency":"KRW","amount":5.9e3,"cancel_amount":0,"sandbox":false,"paid_at":1700000000}}`))
	f.Add(404, []byte(`{"code":-1,"message":"존재하지 않는 결제정보입니다.","response":null}`))
	f.Add(200, []byte(`{"code":0,"response":{"imp_uid":"a","merchant_uid":"a","status":"paid","currency":"USD",`+
		`"amount":1e999,"cancel_amount":-0.5,"paid_at":-1}}`))
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		response, err := openEnvelope("payment", status, body)
		if err != nil {
			return
		}
		p, err := decodePayment(response)
		if err != nil {
			if p != (gatewayPayment{}) {
				t.Errorf("%v, and yet %+v", err, p)
			}
			return
		}
		if !validImpUID(p.impUID) || p.merchantUID == "" || p.status == "" || p.currency == "" {
			t.Errorf("accepted %+v", p)
		}
		if p.amount < 0 || p.cancelled < 0 || !p.isKRW() && p.amount+p.cancelled != 0 {
			t.Errorf("amounts of %+v", p)
		}
		if _, err := p.paidAt.MarshalText(); err != nil {
			t.Errorf("%+v cannot be written: %v", p, err)
		}
	})
}

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
	if s.gatewaySilent() {
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
	refused(g.endAccount(t.Context(), paymentKey{impUID: paid}), fakeNoAccount)
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
	check(t, g.endAccount(t.Context(), paymentKey{impUID: ended}))
	check(t, g.fake.expire(expired))
	for _, impUID := range []string{ended, expired} {
		if p := want(impUID, gatewayCancelled, false, false); p.fullyRefunded {
			t.Errorf("%+v: nothing was ever paid", p)
		}
		refused(g.endAccount(t.Context(), paymentKey{impUID: impUID}), fakeNoAccount)
		if err := g.fake.deposit(impUID); err == nil {
			t.Error("a deposit into an account that has ended")
		}
		refused(second(g.cancelPayment(t.Context(), cancelRequest{impUID: impUID, remaining: 5900, isKRW: true})), fakeNoTarget)
	}
	g.clock.advance(8 * 24 * time.Hour)
	if err := g.fake.deposit(late); err == nil {
		t.Error("a deposit after the last moment")
	}
	refused(g.endAccount(t.Context(), paymentKey{impUID: g.fake.pay(fakePayment{MerchantUID: "order", Amount: 1})}), fakeNoAccount)
	for _, impUID := range []string{"imp_none", "", "a/b"} {
		if err := g.endAccount(t.Context(), paymentKey{impUID: impUID}); !errors.Is(err, errNoPayment) {
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
			err := g.endAccount(t.Context(), paymentKey{impUID: "imp_1"})
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
	account := refundAccount{Holder: "홍길동", Bank: "088", Number: "110-000-000001"}
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
	if refusal, ok := errors.AsType[*gatewayRefusal](err); !ok || refusal.code != "-1" || !strings.HasSuffix(refusal.message, "기취소성공") {
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
	g.notify = func(p fakePayment) { notices <- p.Status }
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
