package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/pprof"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// Figures for Prometheus, in its text format (version 0.0.4). Counting costs a request three atomic additions; all else is
// done when somebody asks, at METRICS_ADDR.

// requestStats counts calls of one kind by how they ended and how long they took.
type requestStats struct {
	byOutcome   []atomic.Uint64
	buckets     [len(bucketBounds) + 1]atomic.Uint64 // by bucket; the last is of those that took longer
	nanoseconds atomic.Int64                         // of all together
}

// bucketBounds are the upper ends of the buckets: a request takes milliseconds, a refund may take a minute.
var bucketBounds = [...]time.Duration{
	500 * time.Microsecond, time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second,
	2500 * time.Millisecond, 5 * time.Second, 10 * time.Second, time.Minute,
}

func newRequestStats(waysToEnd int) *requestStats {
	return &requestStats{byOutcome: make([]atomic.Uint64, waysToEnd)}
}

// count counts one call that ended in this way.
func (t *requestStats) count(way int, took time.Duration) {
	t.byOutcome[way].Add(1)
	bucket := 0
	for bucket < len(bucketBounds) && took > bucketBounds[bucket] {
		bucket++
	}
	t.buckets[bucket].Add(1)
	t.nanoseconds.Add(int64(took))
}

// The calls to the gateway and the ways in which they end, as iamportConfig.Observe tells them.
var (
	gatewayCalls    = [...]string{"token", "payment", "findAll", "list", "cancel", "endAccount"}
	gatewayOutcomes = [...]string{"ok", "none", "refused", "unreadable", "broken", "unreachable", "timeout"}
)

// metrics are the figures that are counted as things happen.
type metrics struct {
	routes  []routeStats  // as the table of routes
	noRoute *requestStats // of what is on none
	gateway [len(gatewayCalls)]*requestStats
}

// routeStats is the traffic of a route, by HTTP status.
type routeStats struct {
	pattern string
	*requestStats
}

func newMetrics() *metrics {
	m := &metrics{}
	for i := range m.gateway {
		m.gateway[i] = newRequestStats(len(gatewayOutcomes))
	}
	m.noRoute = m.route("none")
	return m
}

// route is where the requests of a route are counted. It is called before the first of them.
func (m *metrics) route(pattern string) *requestStats {
	t := newRequestStats(600)
	m.routes = append(m.routes, routeStats{pattern, t})
	return t
}

// gatewayCall counts one call to the gateway.
func (m *metrics) gatewayCall(call, outcome string, took time.Duration) {
	m.gateway[slices.Index(gatewayCalls[:], call)].count(slices.Index(gatewayOutcomes[:], outcome), took)
}

// ---- at METRICS_ADDR

// metricsHandler serves the figures and the profiles of the Go runtime. Neither is for strangers.
func (s *server) metricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		w.Write(s.exposition(r.Context()))
	})
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}

// openBalancesTimeout bounds the one statement that a scrape costs the database. Prometheus waits for 10 seconds.
const openBalancesTimeout = 2 * time.Second

// exposition is all figures as text. Those of money are missing while the database does not answer.
func (s *server) exposition(ctx context.Context) []byte {
	ctx, cancel := context.WithTimeout(ctx, openBalancesTimeout)
	defer cancel()
	now := s.now()
	money, err := s.store.readOpenBalances(ctx, now)
	if err != nil {
		s.log.Error("figures of money", "error", err)
	}
	e := &exposition{}
	e.family("lumiere_build_info", "gauge", "The program; always 1.")
	e.sample("", 1, "version", version())
	s.metrics.expose(e)
	s.exposePool(e)
	e.family("lumiere_database_up", "gauge", "1 when the database answered the statement behind the figures of money within 2 seconds, else 0.")
	e.sample("", gauge(err == nil))
	e.family("lumiere_gateway_silent", "gauge", "1 when the last call to the gateway got no usable answer, else 0.")
	e.sample("", gauge(s.outage.lasts()))
	e.family("lumiere_reconciler_round_age_seconds", "gauge", "Time since this replica's reconciler last finished a round.")
	e.sample("", now.Sub(time.Unix(0, s.settler.lastRound.Load())).Seconds())
	if err == nil {
		money.expose(e)
	}
	return e.text.Bytes()
}

func gauge(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

// expose writes what was counted. A status that a route has not answered yet is left out.
func (m *metrics) expose(e *exposition) {
	e.family("lumiere_http_requests_total", "counter", "Requests answered, by route and HTTP status.")
	for _, r := range m.routes {
		for status := range r.byOutcome {
			if n := r.byOutcome[status].Load(); n > 0 {
				e.sample("", float64(n), "route", r.pattern, "status", strconv.Itoa(status))
			}
		}
	}
	e.family("lumiere_http_request_duration_seconds", "histogram", "Time to answer a request, by route.")
	for _, r := range m.routes {
		e.histogram(r.requestStats, "route", r.pattern)
	}
	e.family("lumiere_gateway_calls_total", "counter",
		"Calls to the payment gateway by how they ended: none is an answer, and unreadable one about a payment that makes no sense; broken, unreachable and timeout are not.")
	for i, t := range m.gateway {
		for outcome := range t.byOutcome {
			e.sample("", float64(t.byOutcome[outcome].Load()), "call", gatewayCalls[i], "outcome", gatewayOutcomes[outcome])
		}
	}
	e.family("lumiere_gateway_call_duration_seconds", "histogram", "Time that a call to the payment gateway took, all waiting included.")
	for i, t := range m.gateway {
		e.histogram(t, "call", gatewayCalls[i])
	}
}

// exposePool writes how much of the database connections is in use.
func (s *server) exposePool(e *exposition) {
	pool := s.store.pool.Stat()
	e.family("lumiere_database_connections", "gauge", "Connections to the database by what they are doing.")
	e.sample("", float64(pool.AcquiredConns()), "state", "in use")
	e.sample("", float64(pool.IdleConns()), "state", "idle")
	e.sample("", float64(pool.ConstructingConns()), "state", "connecting")
	e.family("lumiere_database_connections_most", "gauge", "Connections to the database that there may be.")
	e.sample("", float64(pool.MaxConns()))
	e.family("lumiere_database_waits_total", "counter", "Statements that had to wait for a free connection.")
	e.sample("", float64(pool.EmptyAcquireCount()))
	e.family("lumiere_database_wait_seconds_total", "counter", "Time that statements have waited for a free connection.")
	e.sample("", pool.EmptyAcquireWaitTime().Seconds())
}

// paidStatuses are the names of the order statuses from 0.
var paidStatuses = [...]string{"paid", "preparing", "shipping", "delivered", "return requested", "cancelled"}

// expose writes the figures of money. They are the database's: every replica says the same.
func (m openBalances) expose(e *exposition) {
	e.family("lumiere_holds", "gauge", "Unpaid orders that hold paintings now.")
	e.sample("", float64(m.holds))
	e.family("lumiere_refunds_waiting", "gauge", "Payments whose refund is booked and not done yet.")
	e.sample("", float64(m.refunds))
	e.family("lumiere_oldest_unsettled_payment_seconds", "gauge",
		"How long the oldest money has been neither kept nor given back; 0 when there is none. "+
			"refund: since a refund that is not done yet was booked. "+
			"unknown: since the hold of an unpaid order ended of which the gateway has not said yet whether money came.")
	e.sample("", m.oldestRefund.Seconds(), "kind", "refund")
	e.sample("", m.oldestUnknown.Seconds(), "kind", "unknown")
	e.family("lumiere_orders", "gauge", "Orders that were paid, by the status they have now.")
	for status, n := range m.orders {
		e.sample("", float64(n), "status", paidStatuses[status])
	}
}

// ---- the text format

// exposition is text in Prometheus' format, written family by family.
type exposition struct {
	text bytes.Buffer
	name string // of the family being written
}

// family begins a family. help is one line without a backslash.
func (e *exposition) family(name, kind, help string) {
	e.name = name
	fmt.Fprintf(&e.text, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

var labelEscapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// sample writes one value of the family; labels are names and values in turn.
func (e *exposition) sample(suffix string, value float64, labels ...string) {
	e.text.WriteString(e.name + suffix)
	for i := 0; i < len(labels); i += 2 {
		fmt.Fprintf(&e.text, `%c%s="%s"`, "{,"[min(i, 1)], labels[i], labelEscapes.Replace(labels[i+1]))
	}
	if len(labels) > 0 {
		e.text.WriteByte('}')
	}
	fmt.Fprintf(&e.text, " %s\n", strconv.FormatFloat(value, 'g', -1, 64))
}

// histogram writes how long the calls of t took.
func (e *exposition) histogram(t *requestStats, label, value string) {
	n := uint64(0)
	for i := range t.buckets {
		n += t.buckets[i].Load()
		bound := "+Inf"
		if i < len(bucketBounds) {
			bound = strconv.FormatFloat(bucketBounds[i].Seconds(), 'g', -1, 64)
		}
		e.sample("_bucket", float64(n), label, value, "le", bound)
	}
	e.sample("_sum", time.Duration(t.nanoseconds.Load()).Seconds(), label, value)
	e.sample("_count", float64(n), label, value)
}
