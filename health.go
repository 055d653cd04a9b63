package main

import (
	"context"
	"log/slog"
	"net/http"
	"sync"
	"time"
)

// health is the body of /readyz: "ok" or a problem for each part that the service depends on.
type health struct {
	Database   string `json:"database"`
	Reconciler string `json:"reconciler"`
	Gateway    string `json:"gateway"`
	Sandbox    bool   `json:"sandbox,omitempty"` // test payments buy paintings
}

// healthz answers GET /healthz, always with 200. A process that does not respond to it should be restarted.
func (s *server) healthz(*request) (any, error) {
	return struct {
		Status string `json:"status"`
	}{"ok"}, nil
}

// readyz answers GET /readyz. It is 200 when orders can be taken: a connection of the pool answers a statement within a second, its
// schema is not older than the program, and the reconciler is not stalled. Otherwise it is 503. An unresponsive gateway is
// reported in the body but stays 200, because carts and new orders do not need it.
func (s *server) readyz(r *request) (any, error) {
	ctx, cancel := context.WithTimeout(r.Context(), time.Second)
	defer cancel()
	state := health{Database: "ok", Reconciler: "ok", Gateway: "ok", Sandbox: s.config.sandbox}
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
	if s.gatewaySilent() {
		state.Gateway = "not answering"
	}
	if state.Database != "ok" || state.Reconciler != "ok" {
		return nil, &httpError{status: http.StatusServiceUnavailable, body: state, retryAfter: time.Second, cause: err}
	}
	return state, nil
}

// observeGateway logs and counts one call to a gateway. It is the gatewayObserver of the server.
func (s *server) observeGateway(gateway gatewayName, call, outcome string, err error, elapsed time.Duration) {
	s.log.Debug("gateway", "gateway", gateway, "call", call, "outcome", outcome, "ms", float64(elapsed.Microseconds())/1000)
	s.metrics.gatewayCall(gatewayCallName{gateway, call}, outcome, elapsed)
	s.outages[gateway].observe(s.log, s.now(), err)
}

// gatewaySilent reports whether the last call to any of the gateways got no usable response.
func (s *server) gatewaySilent() bool {
	for _, o := range s.outages {
		if o.lasts() {
			return true
		}
	}
	return false
}

// outageInterval is the shortest time between two log lines that say that an outage began. Without it a gateway that fails
// every other call would flood the log.
const outageInterval = time.Minute

// outage tracks whether a gateway responds, and logs when it stops and when it starts again. It is safe for concurrent use.
type outage struct {
	gateway gatewayName

	mu       sync.Mutex
	silent   bool      // the last call got no usable response
	since    time.Time // when silent last became true
	failed   int       // failed calls since an end was last logged
	logged   bool      // a beginning was logged and its end was not
	loggedAt time.Time // when a beginning was last logged
}

// observe records the result of one call to the gateway: the call's error, or nil.
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
	case silent && !o.logged && now.Sub(o.loggedAt) >= outageInterval:
		o.logged, o.loggedAt = true, now
		log.Error("the gateway does not answer; payments, refunds and expiries wait", "gateway", o.gateway, "cause", err)
	case !silent && o.logged:
		log.Info("the gateway answers again", "gateway", o.gateway, "seconds", now.Sub(o.since).Seconds(), "failed", o.failed)
		o.logged, o.failed = false, 0
	}
}

// lasts reports whether the last call to the gateway got no usable response.
func (o *outage) lasts() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.silent
}
