package main

import (
	"context"
	"log/slog"
	"net/http"
	"sync"
	"time"
)

// health is what readyz answers: a word on each thing that the service stands on.
type health struct {
	Database   string `json:"database"`
	Reconciler string `json:"reconciler"`
	Gateway    string `json:"gateway"`
}

// healthz answers as long as the process can: it fails only by not answering, and then the process should be restarted.
func (s *server) healthz(*request) (any, error) {
	return struct {
		Status string `json:"status"`
	}{"ok"}, nil
}

// readyz answers 200 when orders can be taken: the database answers a statement within a second, its schema is not
// older than the program, and the reconciler gets through its rounds. A silent gateway is only said: carts and orders
// go on without it.
func (s *server) readyz(r *request) (any, error) {
	ctx, cancel := context.WithTimeout(r.Context(), time.Second)
	defer cancel()
	state := health{Database: "ok", Reconciler: "ok", Gateway: "ok"}
	version, err := s.store.schemaVersion(ctx)
	switch {
	case err != nil:
		state.Database = "not answering"
	case version < len(migrations()):
		state.Database = "schema older than the program"
	}
	if s.settler.stalled() {
		state.Reconciler = "has not finished a round for ten intervals"
	}
	if s.outage.lasts() {
		state.Gateway = "not answering"
	}
	if state.Database != "ok" || state.Reconciler != "ok" {
		return nil, &httpError{status: http.StatusServiceUnavailable, body: state, retryAfter: time.Second, cause: err}
	}
	return state, nil
}

// observeGateway is told of every call to the gateway (iamportConfig.Observe).
func (s *server) observeGateway(call, outcome string, err error, took time.Duration) {
	s.log.Debug("gateway", "call", call, "outcome", outcome, "ms", float64(took.Microseconds())/1000)
	s.metrics.gatewayCall(call, outcome, took)
	s.outage.observe(s.log, s.now(), err)
}

// outageEvery is how often at most the log says that the gateway does not answer: one that fails every other call must
// not flood it.
const outageEvery = time.Minute

// outage knows whether the gateway answers, and says so in the log when that begins and when it ends.
type outage struct {
	mu     sync.Mutex
	silent bool      // the last call got no usable answer
	since  time.Time // when that began
	failed int       // calls since the log last said that it ended
	said   bool      // the log has a beginning without its end
	saidAt time.Time // when it last had a beginning
}

// observe takes note of how one call to the gateway ended.
func (o *outage) observe(log *slog.Logger, now time.Time, err error) {
	silent := !gatewayResponded(err)
	o.mu.Lock()
	defer o.mu.Unlock()
	if silent && !o.silent {
		o.since = now
	}
	o.silent = silent
	if silent {
		o.failed++
	}
	switch {
	case silent && !o.said && now.Sub(o.saidAt) >= outageEvery:
		o.said, o.saidAt = true, now
		log.Error("the gateway does not answer; payments, refunds and expiries wait", "cause", err)
	case !silent && o.said:
		log.Info("the gateway answers again", "seconds", now.Sub(o.since).Seconds(), "failed", o.failed)
		o.said, o.failed = false, 0
	}
}

// lasts reports whether the last call to the gateway got no usable answer.
func (o *outage) lasts() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.silent
}
