package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// testGateway is the fake gateway with faults: it counts the calls that arrive and lets a test make any of them go wrong. It is
// an http.Handler as the fake gateway is, and the Transport of a client in the same process.
type testGateway struct {
	*fakeGateway

	faultMu sync.Mutex // apart from the fake's lock, so that a fault function may use the fake
	counts  map[string]int
	fault   func(call, id string) fault
	once    map[string][]fault
}

// The secrets of the test gateway's V2.
const testAPISecret, testWebhookSecret = "test-api-secret", "test-webhook-secret"

func newTestGateway(now func() time.Time) *testGateway {
	g := &testGateway{fakeGateway: newFakeGateway(now), counts: map[string]int{}, once: map[string][]fault{}}
	g.apiSecret, g.webhookSecret = testAPISecret, []byte(testWebhookSecret)
	return g
}

// fault is how a call goes wrong. The zero fault is none.
type fault struct {
	before faultHook // runs before the fake gateway sees the call, which it never does when the hook answers
	after  faultHook // runs when the call has been carried out; the caller gets the hook's answer if it gives one
}

// faultHook runs without any lock, may block, and reports whether it has answered. It never returns when it drops the
// connection. (net/http repeats a GET whose used connection was dropped by itself, but never a POST.)
type faultHook func(w http.ResponseWriter, r *http.Request) (answered bool)

// identifyCall returns the name of a call to the gateway and the imp_uid or merchant_uid that it is about, "" for a token. The
// name of a call that the gateway does not have is "".
func identifyCall(r *http.Request, body []byte) (name, id string) {
	path := append(strings.Split(strings.Trim(r.URL.Path, "/"), "/"), "", "", "")
	if "/"+path[0] == fakePortonePrefix {
		return identifyV2Call(path[1:])
	}
	switch {
	case r.URL.Path == "/users/getToken":
		return "token", ""
	case r.URL.Path == "/payments/cancel":
		var cancel fakeCancel
		json.Unmarshal(body, &cancel) // the fake gateway refuses what is malformed
		if cancel.ImpUID != "" {
			return "cancel", cancel.ImpUID
		}
		return "cancel", cancel.MerchantUID
	case path[0] == "payments" && slices.Contains([]string{"find", "findAll"}, path[1]):
		return path[1], path[2]
	case path[0] == "payments" && path[1] == "status":
		return "list", ""
	case path[0] == "vbanks":
		return "account", path[1]
	case path[0] == "payments" && path[2] == "":
		return "payment", path[1]
	}
	return "", ""
}

// identifyV2Call does the same for a path of the V2 API; the id is the paymentId.
func identifyV2Call(path []string) (name, id string) {
	switch {
	case path[1] == "":
		return "v2 list", ""
	case path[2] == "":
		return "v2 payment", path[1]
	case path[2] == "virtual-account":
		return "v2 account", path[1]
	}
	return "v2 " + path[2], path[1]
}

// ServeHTTP answers as the fake gateway, unless a fault gets in the way.
func (g *testGateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body) // once it is read, the server notices a caller that goes away
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	f := g.arrived(identifyCall(r, body))
	if f.before != nil && f.before(w, r) {
		return
	}
	answer := httptest.NewRecorder()
	work := r.Clone(r.Context())
	work.Body = io.NopCloser(bytes.NewReader(body))
	g.fakeGateway.ServeHTTP(answer, work)
	if f.after != nil && f.after(w, r) {
		return
	}
	maps.Copy(w.Header(), answer.Header())
	w.WriteHeader(answer.Code)
	w.Write(answer.Body.Bytes())
}

// RoundTrip carries out a call in this process. As at the real gateway, its work goes on when the caller goes away.
func (g *testGateway) RoundTrip(r *http.Request) (*http.Response, error) {
	answer := httptest.NewRecorder()
	dropped := make(chan bool, 1)
	go func() {
		defer func() {
			switch problem := recover(); problem {
			case nil, http.ErrAbortHandler:
				dropped <- problem != nil
			default:
				panic(problem)
			}
		}()
		call := r.Clone(r.Context())
		if call.Body == nil {
			call.Body = http.NoBody
		}
		g.ServeHTTP(answer, call)
	}()
	select {
	case <-r.Context().Done():
		return nil, r.Context().Err()
	case dropped := <-dropped:
		if dropped {
			return nil, io.EOF
		}
	}
	response := answer.Result()
	response.Request = r
	return response, nil
}

// setFaults has f asked about every call that arrives, one at a time; nil: no faults. id is the imp_uid or merchant_uid the
// call is about, "" for a token. f must not block, but its fault's hooks may.
func (g *testGateway) setFaults(f func(call, id string) fault) {
	g.faultMu.Lock()
	defer g.faultMu.Unlock()
	g.fault = f
}

// faultOnce gives f to the next such call that has none yet, before the function of setFaults is asked.
func (g *testGateway) faultOnce(call string, f fault) {
	g.faultMu.Lock()
	defer g.faultMu.Unlock()
	g.once[call] = append(g.once[call], f)
}

// calls returns how many calls of a name, as identifyCall has it, have arrived, whatever became of them.
func (g *testGateway) calls(call string) int {
	g.faultMu.Lock()
	defer g.faultMu.Unlock()
	return g.counts[call]
}

// arrived counts a call and returns its fault.
func (g *testGateway) arrived(call, id string) fault {
	g.faultMu.Lock()
	defer g.faultMu.Unlock()
	g.counts[call]++
	if waiting := g.once[call]; len(waiting) > 0 {
		g.once[call] = waiting[1:]
		return waiting[0]
	}
	if g.fault != nil && call != "" {
		return g.fault(call, id)
	}
	return fault{}
}

// set changes a payment without anyone being told, and reports whether there is one. change must not call g.
func (g *testGateway) set(impUID string, change func(*fakePayment)) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.byImpUID[impUID]
	if p == nil {
		return false
	}
	change(p)
	p.LastChanged = g.now()
	g.save()
	return true
}

// get returns a copy of one payment.
func (g *testGateway) get(impUID string) (fakePayment, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.byImpUID[impUID]
	if p == nil {
		return fakePayment{}, false
	}
	return p.clone(), true
}

// all returns copies of all payments, in the order their windows were opened.
func (g *testGateway) all() []fakePayment {
	g.mu.Lock()
	defer g.mu.Unlock()
	all := make([]fakePayment, 0, len(g.payments))
	for _, p := range g.payments {
		all = append(all, p.clone())
	}
	return all
}

func (p *fakePayment) clone() fakePayment {
	c := *p
	c.Refunds = slices.Clone(p.Refunds)
	return c
}

// dropConnection closes the connection in place of an answer.
func dropConnection(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) }

// hangUntilGone keeps the caller waiting until it gives up.
func hangUntilGone(_ http.ResponseWriter, r *http.Request) bool {
	<-r.Context().Done()
	panic(http.ErrAbortHandler)
}

// answer500 is what a proxy says of a gateway that is down.
func answer500(w http.ResponseWriter, _ *http.Request) bool {
	w.Header().Set("Content-Type", "text/html")
	w.WriteHeader(http.StatusInternalServerError)
	io.WriteString(w, "<html><body><h1>Internal Server Error</h1></body></html>")
	return true
}

// answer401 turns a good token down.
func answer401(w http.ResponseWriter, _ *http.Request) bool {
	fakeRefusal(http.StatusUnauthorized, -1, "Unauthorized").write(w)
	return true
}

// answerRefusal is HTTP 200 with a code that is not 0.
func answerRefusal(code int, message string) faultHook {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		fakeRefusal(http.StatusOK, code, message).write(w)
		return true
	}
}

// refuseV2 is V2's answer when the card company refuses.
func refuseV2(w http.ResponseWriter, _ *http.Request) bool {
	writeFakeJSON(w, http.StatusBadGateway, map[string]string{"type": "PG_PROVIDER"})
	return true
}

// waitFor runs wait and goes on; the context is the call's own.
func waitFor(wait func(context.Context)) faultHook {
	return func(_ http.ResponseWriter, r *http.Request) bool {
		wait(r.Context())
		return false
	}
}

// stopUntil goes on when released is closed, or hangs up when the caller gave up before.
func stopUntil(released <-chan struct{}) faultHook {
	return func(w http.ResponseWriter, r *http.Request) bool {
		select {
		case <-released:
			return false
		case <-r.Context().Done():
			panic(http.ErrAbortHandler)
		}
	}
}

// inTurn runs hooks until one has answered.
func inTurn(hooks ...faultHook) faultHook {
	return func(w http.ResponseWriter, r *http.Request) bool {
		for _, hook := range hooks {
			if hook(w, r) {
				return true
			}
		}
		return false
	}
}

func TestFakeGatewayFind(t *testing.T) {
	g := newGatewayTest(t, false)
	ids := map[string]string{}
	for i, status := range []string{"paid", "ready", "paid", "failed"} {
		ids[g.fake.pay(fakePayment{MerchantUID: "a/b", Status: status, Amount: 100})] = fmt.Sprint(i)
		g.clock.advance(time.Second)
	}
	find := func(path string) string {
		t.Helper()
		response, err := g.lookUp(t.Context(), "find", path)
		if err != nil {
			return err.Error()
		}
		var answer struct {
			ImpUID string `json:"imp_uid"`
			Total  int
			List   []struct {
				ImpUID string `json:"imp_uid"`
			}
			Previous, Next int
		}
		if err := json.Unmarshal(response, &answer); err != nil {
			t.Fatal(err)
		}
		if answer.List == nil {
			return ids[answer.ImpUID]
		}
		text := fmt.Sprintf("%d of %d", answer.Previous, answer.Total)
		for _, one := range answer.List {
			text += " " + ids[one.ImpUID]
		}
		return fmt.Sprintf("%s, %d", text, answer.Next)
	}
	for path, want := range map[string]string{
		"/payments/find/a%2Fb":                             "3",
		"/payments/find/a%2Fb/paid":                        "2",
		"/payments/find/a%2Fb/paid?sorting=started":        "0",
		"/payments/find/a%2Fb?sorting=updated":             "0",
		"/payments/find/a%2Fb/cancelled":                   errNoPayment.Error(),
		"/payments/find/none":                              errNoPayment.Error(),
		"/payments/find/a%2Fb/wrong":                       "gateway find: HTTP status 400",
		"/payments/find/a%2Fb?sorting=wrong":               "gateway find: HTTP status 400",
		"/payments/findAll/a%2Fb":                          "0 of 4 3 2 1 0, 0",
		"/payments/findAll/a%2Fb?limit=3":                  "0 of 4 3 2 1, 2",
		"/payments/findAll/a%2Fb?limit=3&page=2":           "1 of 4 0, 0",
		"/payments/findAll/a%2Fb?limit=3&page=3":           "gateway find: HTTP status 400",
		"/payments/findAll/a%2Fb/paid?sorting=-paid":       "0 of 2 2 0, 0",
		"/payments/findAll/a%2Fb/all?limit=2&page=2":       "1 of 4 1 0, 0",
		"/payments/findAll/a%2Fb/paid?limit=1&page=1&x[]=": "0 of 2 2, 2",
		"/payments/nothing/here":                           "gateway find: the answer is not the JSON it should be",
	} {
		if got := find(path); got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
}

func TestFakeGatewayCancel(t *testing.T) {
	for name, c := range map[string]struct {
		body      string
		want      string // "" or what the error says
		cancelled int64
	}{
		"all":                {`{"imp_uid":"imp_1"}`, "", 5900},
		"amount 0":           {`{"imp_uid":"imp_1","amount":0,"checksum":null}`, "", 5900},
		"part":               {`{"imp_uid":"imp_1","amount":900,"checksum":5900}`, "", 900},
		"by merchant_uid":    {`{"merchant_uid":"order"}`, "", 5900},
		"imp_uid goes first": {`{"imp_uid":"imp_2","merchant_uid":"order"}`, fakeNoTarget, 0},
		"wrong checksum":     {`{"imp_uid":"imp_1","checksum":5000}`, fakeChecksum, 0},
		"too much":           {`{"imp_uid":"imp_1","amount":5901}`, fakeTooMuch, 0},
		"negative":           {`{"imp_uid":"imp_1","amount":-1}`, fakeTooMuch, 0},
		"not paid":           {`{"imp_uid":"imp_ready"}`, fakeNoTarget, 0},
		"nobody's":           {`{}`, "HTTP status 400", 0},
		"broken":             {`{`, "HTTP status 400", 0},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGatewayTestInMemory(false)
			g.fake.pay(fakePayment{ImpUID: "imp_1", MerchantUID: "order", Amount: 5900})
			g.fake.pay(fakePayment{ImpUID: "imp_ready", MerchantUID: "other", Amount: 5900, Status: "ready"})
			token, err := g.freshToken(t.Context(), "", nil)
			if err != nil {
				t.Fatal(err)
			}
			request := httptest.NewRequest("POST", "/payments/cancel", strings.NewReader(c.body))
			request.Header.Set("Authorization", "Bearer "+token.value)
			w := httptest.NewRecorder()
			g.fake.ServeHTTP(w, request)
			_, err = openEnvelope("cancel", w.Code, w.Body.Bytes())
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("err = %v, want %q", err, c.want)
			}
			if p, _ := g.fake.get("imp_1"); p.Cancelled != c.cancelled {
				t.Errorf("%d won given back, want %d", p.Cancelled, c.cancelled)
			}
		})
	}
}

func TestFakeGatewayKnowsItsToken(t *testing.T) {
	g := newGatewayTestInMemory(false)
	if _, err := g.freshToken(t.Context(), "", nil); err != nil {
		t.Fatal(err)
	}
	g.token.value = "another"
	if _, err := g.payment(t.Context(), "imp_none"); !errors.Is(err, errNoPayment) {
		t.Error(err)
	}
	if n := g.fake.calls("token"); n != 2 {
		t.Errorf("%d token calls, want 2", n)
	}
}

func TestFakeGatewayWindowAndNotices(t *testing.T) {
	g := newFakeGateway(nil)
	notices := make(chan [3]string, 1)
	g.notify = func(p fakePayment) { notices <- [3]string{p.ImpUID, p.MerchantUID, p.Status} }
	post := func(body string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		g.window(w, httptest.NewRequest("POST", "/", strings.NewReader(body)))
		return w
	}
	for _, body := range []string{"", "x", "[]", `{"merchant_uid":"a"}`, `{"merchant_uid":"a","amount":-1}`,
		`{"merchant_uid":"a","amount":1.5}`, `{"amount":1}`, `{"merchant_uid":"a","amount":1,"status":"cancelled"}`} {
		if w := post(body); w.Code != 400 || !strings.Contains(w.Body.String(), `{"message":"`) {
			t.Errorf("window(%s) = %d %s", body, w.Code, w.Body)
		}
	}
	w := post(`{"merchant_uid":"order","amount":5900,"notify":true}`)
	var answer map[string]string
	if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || answer["merchant_uid"] != "order" {
		t.Fatalf("window = %d %s", w.Code, w.Body)
	}
	impUID := answer["imp_uid"]
	if got := <-notices; got != [3]string{impUID, "order", "paid"} {
		t.Errorf("notice %q", got)
	}
	if err := g.refundInConsole(impUID, 0); err != nil {
		t.Error(err)
	}
	if got := <-notices; got != [3]string{impUID, "order", "cancelled"} {
		t.Errorf("notice %q", got)
	}
	if err := g.refundInConsole(impUID, 0); err == nil || err.Error() != fakeCancelled {
		t.Errorf("second refund: %v", err)
	}
}

func TestFakeGatewayPersists(t *testing.T) {
	path := filepath.Join(t.TempDir(), "payments.json")
	first := newTestGateway(nil)
	if err := first.persist(path); err != nil {
		t.Fatal(err)
	}
	id := first.pay(fakePayment{MerchantUID: "order", Amount: 5900})
	first.set(id, func(p *fakePayment) { p.Sandbox = true })
	if err := first.refundInConsole(id, 900); err != nil {
		t.Fatal(err)
	}
	second := newTestGateway(nil)
	if err := second.persist(path); err != nil {
		t.Fatal(err)
	}
	if all := second.all(); len(all) != 1 || !all[0].Sandbox || all[0].Cancelled != 900 || len(all[0].Refunds) != 1 {
		t.Errorf("kept: %+v", all)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if left, _ := filepath.Glob(path + ".*"); len(left) != 0 {
		t.Errorf("drafts left: %v", left)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := newFakeGateway(nil).persist(path); err == nil {
		t.Error("a broken file was read")
	}
}
