package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/pprof"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// Metrics for Prometheus in its text format, version 0.0.4: https://prometheus.io/docs/instrumenting/exposition_formats/.
// A request costs three atomic additions. Everything else happens when METRICS_ADDR is scraped.

// requestStats counts calls of one kind, by outcome and by duration. It is safe for concurrent use.
type requestStats struct {
	byOutcome   []atomic.Uint64
	buckets     [len(bucketBounds) + 1]atomic.Uint64 // the last one counts calls beyond all bounds
	nanoseconds atomic.Int64                         // the sum of all durations
}

// bucketBounds are the inclusive upper bounds of the duration buckets. A request takes milliseconds, a refund may take a
// minute.
var bucketBounds = [...]time.Duration{
	500 * time.Microsecond, time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second,
	2500 * time.Millisecond, 5 * time.Second, 10 * time.Second, time.Minute,
}

// newRequestStats returns counters for outcomes from 0 to outcomes-1.
func newRequestStats(outcomes int) *requestStats {
	return &requestStats{byOutcome: make([]atomic.Uint64, outcomes)}
}

// count adds one call.
func (r *requestStats) count(outcome int, elapsed time.Duration) {
	r.byOutcome[outcome].Add(1)
	bucket, _ := slices.BinarySearch(bucketBounds[:], elapsed)
	r.buckets[bucket].Add(1)
	r.nanoseconds.Add(int64(elapsed))
}

// gatewayCallName is a call to a gateway, as its client names it.
type gatewayCallName struct {
	gateway gatewayName
	call    string
}

// The calls to the gateways and their outcomes, as a gatewayObserver gets them.
var (
	gatewayCalls = [...]gatewayCallName{
		{gatewayIamport, "token"}, {gatewayIamport, "payment"}, {gatewayIamport, "findAll"}, {gatewayIamport, "list"},
		{gatewayIamport, "cancel"}, {gatewayIamport, "endAccount"},
		{gatewayPortOne, "payment"}, {gatewayPortOne, "list"}, {gatewayPortOne, "cancel"}, {gatewayPortOne, "endAccount"},
		{gatewayPortOne, "confirm"},
	}
	gatewayOutcomes = [...]string{"ok", "none", "refused", "unreadable", "broken", "unreachable", "timeout"}
)

// metrics are the counters of this process.
type metrics struct {
	routes  []routeStats  // in the order of route's calls
	noRoute *requestStats // requests that match no route
	gateway [len(gatewayCalls)]*requestStats
}

// routeStats counts the requests of a route. The outcome is the HTTP status.
type routeStats struct {
	pattern string
	*requestStats
}

// newMetrics returns counters that are all 0.
func newMetrics() *metrics {
	m := &metrics{}
	for i := range m.gateway {
		m.gateway[i] = newRequestStats(len(gatewayOutcomes))
	}
	m.noRoute = m.route("none")
	return m
}

// route adds a route and returns its counters. All routes must be added before the first request.
func (m *metrics) route(pattern string) *requestStats {
	stats := newRequestStats(600) // every HTTP status
	m.routes = append(m.routes, routeStats{pattern, stats})
	return stats
}

// gatewayCall counts one call to a gateway. call and outcome must be among gatewayCalls and gatewayOutcomes.
func (m *metrics) gatewayCall(call gatewayCallName, outcome string, elapsed time.Duration) {
	m.gateway[slices.Index(gatewayCalls[:], call)].count(slices.Index(gatewayOutcomes[:], outcome), elapsed)
}

// ---- at METRICS_ADDR

// metricsHandler returns the handler of METRICS_ADDR: /metrics, and the profiles of the Go runtime. It has no access
// control, so the address must not be public.
func (s *server) metricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		w.Write(s.metricsText(r.Context()))
	})
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}

// openBalancesTimeout bounds the statements that a scrape sends to the database. Prometheus gives up a scrape after 10
// seconds by default.
const openBalancesTimeout = 2 * time.Second

// metricsText returns all metrics as text. The open balances are missing when the database does not answer in time.
func (s *server) metricsText(ctx context.Context) []byte {
	ctx, cancel := context.WithTimeout(ctx, openBalancesTimeout)
	defer cancel()
	now := s.now()
	balances, err := s.store.readOpenBalances(ctx, now, s.settler.gateways.lists())
	notify, notifyErr := s.notifier.figures(ctx)
	if err = errors.Join(err, notifyErr); err != nil {
		s.log.Error("read open balances", "error", err)
	}
	e := &exposition{}
	e.family("lumiere_build_info", "gauge", "The program; always 1.")
	e.sample("", 1, "version", version())
	e.family("lumiere_sandbox", "gauge", "1 when test payments buy paintings (IAMPORT_SANDBOX), else 0.")
	e.sample("", boolValue(s.config.sandbox))
	s.metrics.expose(e)
	s.exposePool(e)
	e.family("lumiere_database_up", "gauge", "1 when the database answered this scrape's statements within 2 seconds, else 0.")
	e.sample("", boolValue(err == nil))
	e.family("lumiere_gateway_silent", "gauge", "1 when the last call to the payment gateway got no usable answer, else 0.")
	for _, g := range s.settler.gateways {
		e.sample("", boolValue(s.outages[g.name()].lasts()), "gateway", string(g.name()))
	}
	e.family("lumiere_reconciler_round_age_seconds", "gauge", "Time since this replica's reconciler last finished a round.")
	e.sample("", now.Sub(time.Unix(0, s.settler.lastRound.Load())).Seconds())
	if err == nil {
		balances.expose(e)
		notify.expose(e)
	}
	return e.text.Bytes()
}

// boolValue returns 1 for true and 0 for false.
func boolValue(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// expose writes the counters. Statuses that a route has never returned are left out.
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
	for i, stats := range m.gateway {
		for outcome := range stats.byOutcome {
			e.sample("", float64(stats.byOutcome[outcome].Load()),
				"gateway", string(gatewayCalls[i].gateway), "call", gatewayCalls[i].call, "outcome", gatewayOutcomes[outcome])
		}
	}
	e.family("lumiere_gateway_call_duration_seconds", "histogram", "Duration of a call to the payment gateway, waiting for a slot included.")
	for i, stats := range m.gateway {
		e.histogram(stats, "gateway", string(gatewayCalls[i].gateway), "call", gatewayCalls[i].call)
	}
}

// exposePool writes the state of the pool of database connections.
func (s *server) exposePool(e *exposition) {
	pool := s.store.pool.Stat()
	e.family("lumiere_database_connections", "gauge", "Connections to the database, by state.")
	e.sample("", float64(pool.AcquiredConns()), "state", "in use")
	e.sample("", float64(pool.IdleConns()), "state", "idle")
	e.sample("", float64(pool.ConstructingConns()), "state", "connecting")
	e.family("lumiere_database_connections_most", "gauge", "Largest number of connections to the database.")
	e.sample("", float64(pool.MaxConns()))
	e.family("lumiere_database_waits_total", "counter", "Statements that had to wait for a free connection.")
	e.sample("", float64(pool.EmptyAcquireCount()))
	e.family("lumiere_database_wait_seconds_total", "counter", "Time that statements have waited for a free connection.")
	e.sample("", pool.EmptyAcquireWaitTime().Seconds())
}

// paidStatuses are the names of the order statuses 0 to 5.
var paidStatuses = [...]string{"paid", "preparing", "shipping", "delivered", "return requested", "cancelled"}

// expose writes the open balances. They come from the database, so they are the same on every replica.
func (b openBalances) expose(e *exposition) {
	e.family("lumiere_holds", "gauge", "Unpaid orders that hold paintings now.")
	e.sample("", float64(b.holds))
	e.family("lumiere_refunds_waiting", "gauge", "Refunds that are booked and not done yet, and go on by themselves.")
	e.sample("", float64(b.refunds))
	e.family("lumiere_refunds_stuck", "gauge", "Refunds that the gateway has refused three times or more. A person has to help.")
	e.sample("", float64(b.refundsStuck))
	e.family("lumiere_gateway_lists_age_seconds", "gauge", "Time since all that moved at the gateway was known.")
	e.sample("", b.oldestListRead.Seconds())
	e.family("lumiere_oldest_unsettled_payment_seconds", "gauge",
		"Age of the oldest unsettled payment; 0 when there is none. "+
			"refund: since its refund was booked, which is not done yet. "+
			"unknown: since the hold of an unpaid order ended; the gateway has not said yet whether it was paid.")
	e.sample("", b.oldestRefund.Seconds(), "kind", "refund")
	e.sample("", b.oldestUnknown.Seconds(), "kind", "unknown")
	e.family("lumiere_orders", "gauge", "Orders that were paid, by the status they have now.")
	for status, n := range b.orders {
		e.sample("", float64(n), "status", paidStatuses[status])
	}
}

// expose writes the figures of notifications. They come from the database, too.
func (f notifyFigures) expose(e *exposition) {
	e.family("lumiere_notifications_oldest_seconds", "gauge", "Age of the oldest notification that is not delivered yet; 0 when there is none.")
	e.sample("", f.oldest.Seconds())
	e.family("lumiere_notifications_given_up_total", "counter", "Notifications that were never delivered.")
	e.sample("", float64(f.givenUp))
}

// ---- the text format

// exposition is text in Prometheus' format. It is written family by family: a family is a metric's name with all its
// samples.
type exposition struct {
	text bytes.Buffer
	name string // of the current family
}

// family begins a family. help must be one line without a backslash.
func (e *exposition) family(name, kind, help string) {
	e.name = name
	fmt.Fprintf(&e.text, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// labelEscapes escapes what the format does not allow in a label's value.
var labelEscapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// sample writes one sample of the current family. labels alternates names and values.
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

// histogram writes the durations in stats, with labels as sample has them. Its buckets are cumulative, as the format demands.
func (e *exposition) histogram(stats *requestStats, labels ...string) {
	n := uint64(0)
	for i := range stats.buckets {
		n += stats.buckets[i].Load()
		bound := "+Inf"
		if i < len(bucketBounds) {
			bound = strconv.FormatFloat(bucketBounds[i].Seconds(), 'g', -1, 64)
		}
		e.sample("_bucket", float64(n), append(slices.Clip(labels), "le", bound)...)
	}
	e.sample("_sum", time.Duration(stats.nanoseconds.Load()).Seconds(), labels...)
	e.sample("_count", float64(n), labels...)
}
