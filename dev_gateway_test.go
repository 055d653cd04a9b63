package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
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

func newTestGateway(now func() time.Time) *testGateway {
	return &testGateway{fakeGateway: newFakeGateway(now), counts: map[string]int{}, once: map[string][]fault{}}
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
	case path[0] == "payments" && path[2] == "":
		return "payment", path[1]
	}
	return "", ""
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
