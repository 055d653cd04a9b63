package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
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
		impUID: first, merchantUID: "order-1", status: "paid", payMethod: "card", currency: "KRW", amount: 5900,
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

	want.status, want.cancelled, want.fullyRefunded = "cancelled", 5900, true
	request := cancelRequest{impUID: first, remaining: 5900, isKRW: true, reason: `위조 "결제" <&>`}
	if p, err := g.cancelPayment(t.Context(), request); p != want || err != nil {
		t.Errorf("Cancel = %+v, %v, want %+v", p, err, want)
	}
	if all, err := g.paymentsOf(t.Context(), "order-1"); !reflect.DeepEqual(all, []gatewayPayment{want}) || err != nil {
		t.Errorf("PaymentsFor = %+v, %v, want %+v", all, err, want)
	}
	if p, _ := g.fake.get(first); len(p.Refunds) != 1 || p.Refunds[0].Reason != request.reason {
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
			if !errors.As(err, &refusal) || refusal.code != 1 || refusal.message != c.message {
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
	r := &gatewayRefusal{-1, "[2015] 취소 실패\n홍 010-1234-5678 1234567890123456 a@b.kr 5,900원 " + strings.Repeat("가", 1000)}
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
	if !errors.As(err, &refusal) || *refusal != (gatewayRefusal{-1, message}) {
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
		"refused":             {200, `{"code":-1,"message":"거절","response":null}`, &gatewayRefusal{-1, "거절"}},
		"refused with a body": {200, strings.Replace(envelope(good), `0`, `1`, 1), &gatewayRefusal{1, ""}},
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
