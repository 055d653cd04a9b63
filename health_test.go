package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// ready is the answer of readyz.
func (s *shop) ready() answer {
	s.t.Helper()
	return s.call("", "GET", "/readyz", nil)
}

const gatewayDown = `"gateway":"not answering"`

func TestReadyWithoutAGateway(t *testing.T) {
	s := newShop(t)
	_, impUID, _ := s.paid(buyerA)
	s.order(buyerB, s.painting(99000))
	if a := s.want(s.ready(), 200, ""); a.body != `{"database":"ok","reconciler":"ok","gateway":"ok"}` {
		t.Fatalf("answered %s", a.body)
	}
	// A silence that any call has met is reported until a call is answered again.
	for name, ask := range map[string]func(){
		"a browser's report": func() { s.report(impUID) },
		"a notice":           func() { s.notice(impUID) },
		"the reconciler":     func() { s.later(s.config.hold) }, // for an order of buyerB's
	} {
		s.fake.setFaults(func(string, string) fault { return fault{before: answer500} })
		ask()
		if a := s.want(s.ready(), 200, ""); !strings.Contains(a.body, gatewayDown) {
			t.Errorf("%s: %s", name, a.body)
		}
		s.fake.setFaults(nil)
		s.report(newImpUID()) // that there is none is an answer
		if a := s.want(s.ready(), 200, ""); strings.Contains(a.body, gatewayDown) {
			t.Errorf("after %s: %s", name, a.body)
		}
	}
}

// That test payments buy paintings is said wherever an operator looks.
func TestSandboxIsSaid(t *testing.T) {
	heavy(t)
	for _, sandbox := range []bool{false, true} {
		s := newShop(t, func(c *config) { c.sandbox = sandbox })
		if a := s.want(s.ready(), 200, ""); strings.Contains(a.body, `,"sandbox":true}`) != sandbox {
			t.Errorf("sandbox %v: answered %s", sandbox, a.body)
		}
		s.scrape().want(t, parsedMetrics{"lumiere_sandbox": boolValue(sandbox)})
		s.logged.Reset()
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		check(t, err)
		s.logStart(listener)
		listener.Close()
		line := s.lines("serving")[0]
		if want := map[bool]any{false: "INFO", true: "WARN"}[sandbox]; line["level"] != want || (line["sandbox"] == true) != sandbox ||
			(line["warning"] == "test payments buy paintings") != sandbox {
			t.Errorf("sandbox %v: logged %v", sandbox, line)
		}
	}
}

func TestNotReadyWithAHangingDatabase(t *testing.T) {
	heavy(t)
	s := newShop(t)
	conn, err := pgx.Connect(t.Context(), s.config.databaseURL)
	check(t, err)
	defer conn.Close(context.Background())
	_, err = conn.Exec(t.Context(), `BEGIN; LOCK TABLE schema_steps`)
	check(t, err)
	if a := s.want(s.ready(), 503, ""); !strings.Contains(a.body, `"database":"not answering"`) {
		t.Errorf("answered %s", a.body)
	}
	s.want(s.call("", "GET", "/healthz", nil), 200, "")
	_, err = conn.Exec(t.Context(), `COMMIT`)
	check(t, err)
	s.want(s.ready(), 200, "")
}

func TestNotReadyWithAnOlderSchema(t *testing.T) {
	s := newShop(t)
	execSQL(t, s.config.databaseURL, `INSERT INTO schema_steps SELECT max(step) + 1 FROM schema_steps`) // a newer program's
	s.want(s.ready(), 200, "")
	execSQL(t, s.config.databaseURL, `DELETE FROM schema_steps WHERE step > 1`)
	if a := s.want(s.ready(), 503, ""); !strings.Contains(a.body, "schema older") {
		t.Errorf("answered %s", a.body)
	}
}

func TestNotReadyWithAStuckReconciler(t *testing.T) {
	s := newShop(t)
	s.clock.advance(max(10*s.config.reconcile, refundLease))
	s.want(s.ready(), 200, "")
	s.clock.advance(time.Second)
	if a := s.want(s.ready(), 503, ""); !strings.Contains(a.body, "ten intervals") {
		t.Errorf("answered %s", a.body)
	}
	check(t, s.settler.reconcileRound(t.Context()))
	s.want(s.ready(), 200, "")
}

func TestGatewayTroubleIsLoggedOnce(t *testing.T) {
	s := newShop(t)
	// ask has the gateway answer a report, or not, a second after the one before.
	ask := func(answers bool) {
		s.clock.advance(time.Second)
		if !answers {
			s.fake.faultOnce("payment", fault{before: answer500})
		}
		s.report(newImpUID())
	}
	lines := func() (begun, ended int) {
		logged := s.logged.String()
		return strings.Count(logged, "the gateway does not answer"), strings.Count(logged, "the gateway answers again")
	}
	ask(true)
	for range 5 {
		ask(false)
	}
	ask(true)
	if begun, ended := lines(); begun != 1 || ended != 1 || !strings.Contains(s.logged.String(), `"seconds":5,"failed":5`) {
		t.Fatalf("%d begun, %d ended:\n%s", begun, ended, s.logged)
	}
	for i := range 120 { // two minutes in which every other call fails
		ask(i%2 == 0)
	}
	if begun, ended := lines(); begun > 3 || ended > 3 {
		t.Errorf("%d begun, %d ended", begun, ended)
	}
}

// scrape is the figures as Prometheus gets them, checked by a strict parser and, where it is installed, by promtool.
func (s *shop) scrape() parsedMetrics {
	s.t.Helper()
	recorder := httptest.NewRecorder()
	s.metricsHandler().ServeHTTP(recorder, httptest.NewRequest("GET", "/metrics", nil))
	if recorder.Code != 200 || recorder.Header().Get("Content-Type") != "text/plain; version=0.0.4; charset=utf-8" {
		s.t.Fatalf("answered %d %v", recorder.Code, recorder.Header())
	}
	text := recorder.Body.String()
	if promtool, err := exec.LookPath("promtool"); err == nil {
		check := exec.CommandContext(s.t.Context(), promtool, "check", "metrics")
		check.Stdin = strings.NewReader(text)
		if problems, err := check.CombinedOutput(); err != nil || len(bytes.TrimSpace(problems)) > 0 {
			s.t.Errorf("promtool: %v\n%s", err, problems)
		}
	}
	f, err := parseMetrics(text)
	if err != nil {
		s.t.Fatalf("%v\n%s", err, text)
	}
	return f
}

// parsedMetrics are the samples of an exposition by series, as they are written: name{label="value"}.
type parsedMetrics map[string]float64

// want compares some of the figures.
func (f parsedMetrics) want(t *testing.T, want parsedMetrics) {
	t.Helper()
	for _, series := range slices.Sorted(maps.Keys(want)) {
		if got, ok := f[series]; !ok || got != want[series] {
			t.Errorf("%s is %v (%v), want %v", series, got, ok, want[series])
		}
	}
}

var (
	commentLine = regexp.MustCompile(`^# (HELP|TYPE) ([a-z_]+) (.+)$`)
	sampleLine  = regexp.MustCompile(`^([a-z_]+)(\{([a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+\})? ([-+0-9.e]+)$`)
	bucketEnd   = regexp.MustCompile(`,le="([^"]+)"\}$`)
)

// parseMetrics reads the text format and refuses whatever its specification does not allow, and what is not customary.
func parseMetrics(text string) (parsedMetrics, error) {
	f := parsedMetrics{}
	var family, kind string
	seen := map[string]bool{}
	if !strings.HasSuffix(text, "\n") {
		return nil, fmt.Errorf("the last line has no end")
	}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if c := commentLine.FindStringSubmatch(line); c != nil {
			switch {
			case c[1] == "HELP" && seen[c[2]]:
				return nil, fmt.Errorf("the family %s comes twice", c[2])
			case c[1] == "HELP":
				family, kind, seen[c[2]] = c[2], "", true
			case c[2] != family || kind != "":
				return nil, fmt.Errorf("TYPE without its HELP: %s", line)
			case !slices.Contains([]string{"counter", "gauge", "histogram"}, c[3]) || (c[3] == "counter") != strings.HasSuffix(family, "_total"):
				return nil, fmt.Errorf("wrong type: %s", line)
			default:
				kind = c[3]
			}
			continue
		}
		s := sampleLine.FindStringSubmatch(line)
		if s == nil {
			return nil, fmt.Errorf("malformed: %s", line)
		}
		name := s[1]
		if kind == "histogram" {
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				name = strings.TrimSuffix(name, suffix)
			}
		}
		value, err := strconv.ParseFloat(s[4], 64)
		series := strings.TrimSuffix(line, " "+s[4])
		_, again := f[series]
		switch {
		case err != nil || again || kind == "" || name != family:
			return nil, fmt.Errorf("misplaced or repeated: %s", line)
		case kind != "gauge" && value < 0:
			return nil, fmt.Errorf("less than nothing was counted: %s", line)
		}
		f[series] = value
	}
	return f, f.checkHistograms()
}

// checkHistograms checks that buckets grow up to the count.
func (f parsedMetrics) checkHistograms() error {
	type bucket struct{ end, n float64 }
	histograms := map[string][]bucket{} // by the series of the count
	for series, n := range f {
		if le := bucketEnd.FindStringSubmatch(series); le != nil {
			end, err := strconv.ParseFloat(le[1], 64)
			if err != nil {
				return fmt.Errorf("%s: %w", series, err)
			}
			of := strings.Replace(strings.TrimSuffix(series, le[0])+"}", "_bucket{", "_count{", 1)
			histograms[of] = append(histograms[of], bucket{end, n})
		}
	}
	for of, buckets := range histograms {
		slices.SortFunc(buckets, func(a, b bucket) int { return int(1e6 * (min(a.end, 1e6) - min(b.end, 1e6))) })
		for i := range buckets[1:] {
			if buckets[i].n > buckets[i+1].n {
				return fmt.Errorf("%s: the buckets do not grow: %v", of, buckets)
			}
		}
		if last := buckets[len(buckets)-1]; last.end < 1e300 || last.n != f[of] {
			return fmt.Errorf("%s: %v counted, the last bucket is %v", of, f[of], last)
		}
	}
	return nil
}

func TestStrictParser(t *testing.T) {
	const head = "# HELP x y\n# TYPE x gauge\n"
	for _, text := range []string{
		"", "x 1\n", head + "x 1", head + "x 1\nx 1\n", head + "y 1\n", head + "x one\n", head + "x{A=\"b\"} 1\n", head + "x{a=\"\\q\"} 1\n",
		head + "x{a=b} 1\n", head + head, "# HELP x y\n# TYPE x counter\nx 1\n", "# HELP x_total y\n# TYPE x_total counter\nx_total -1\n",
		"# TYPE x gauge\nx 1\n", "# HELP x y\n# TYPE x histogram\nx_bucket{a=\"b\",le=\"1\"} 2\nx_bucket{a=\"b\",le=\"+Inf\"} 1\nx_count{a=\"b\"} 1\n",
	} {
		if f, err := parseMetrics(text); err == nil {
			t.Errorf("%q is %v", text, f)
		}
	}
}

func TestMetrics(t *testing.T) {
	s := newShop(t)
	s.scrape() // nothing has happened yet
	s.paid(buyerA)
	_, refused, _ := s.paid(buyerA)
	s.orderAt(statusShipping)
	s.order(buyerB, s.painting(99000))
	s.report("imp_unknown")
	s.call("", "GET", "/api/nothing", nil)

	// A refund that the gateway refuses, and an unpaid order of which it says nothing.
	s.fake.setFaults(func(call, id string) fault {
		if call == "cancel" {
			return fault{before: answerRefusal(-1, "거절")}
		}
		return fault{}
	})
	s.clock.advance(20 * time.Minute)
	s.call(buyerA, "DELETE", "/api/orders/"+queryText(t, s.config.databaseURL, `SELECT order_id FROM payments WHERE imp_uid = '`+refused+`'`), nil)
	s.clock.advance(10*time.Minute + 42*time.Second)

	s.scrape().want(t, parsedMetrics{
		`lumiere_http_requests_total{route="POST /api/orders",status="201"}`:                      4,
		`lumiere_http_requests_total{route="PATCH /api/orders/pay",status="200"}`:                 3,
		`lumiere_http_requests_total{route="PATCH /api/orders/pay",status="404"}`:                 1,
		`lumiere_http_requests_total{route="DELETE /api/orders/{id}",status="502"}`:               1,
		`lumiere_http_requests_total{route="none",status="404"}`:                                  1,
		`lumiere_http_request_duration_seconds_count{route="PATCH /api/orders/pay"}`:              4,
		`lumiere_http_request_duration_seconds_bucket{route="PATCH /api/orders/pay",le="0.0005"}`: 4, // by a clock that stands
		`lumiere_gateway_calls_total{gateway="iamport",call="payment",outcome="ok"}`:              4,
		`lumiere_gateway_calls_total{gateway="iamport",call="payment",outcome="none"}`:            1,
		`lumiere_gateway_calls_total{gateway="iamport",call="cancel",outcome="refused"}`:          1,
		`lumiere_gateway_call_duration_seconds_count{gateway="iamport",call="cancel"}`:            1,
		`lumiere_database_up`:                                      1,
		`lumiere_database_connections_most`:                        16,
		`lumiere_gateway_silent{gateway="iamport"}`:                0,
		`lumiere_reconciler_round_age_seconds`:                     1842,
		`lumiere_holds`:                                            1,
		`lumiere_refunds_waiting`:                                  1,
		`lumiere_oldest_unsettled_payment_seconds{kind="refund"}`:  642,
		`lumiere_oldest_unsettled_payment_seconds{kind="unknown"}`: 42,
		`lumiere_orders{status="paid"}`:                            2,
		`lumiere_orders{status="shipping"}`:                        1,
		`lumiere_orders{status="cancelled"}`:                       0,
	})
	s.fake.setFaults(nil)
	check(t, s.settler.reconcileRound(t.Context()))
	s.scrape().want(t, parsedMetrics{
		`lumiere_reconciler_round_age_seconds`: 0, `lumiere_holds`: 0, `lumiere_refunds_waiting`: 0,
		`lumiere_oldest_unsettled_payment_seconds{kind="refund"}`: 0, `lumiere_oldest_unsettled_payment_seconds{kind="unknown"}`: 0,
		`lumiere_orders{status="paid"}`: 1, `lumiere_orders{status="cancelled"}`: 1,
	})
}

// The metrics that the alerts and the runbook name are exposed, and every alert has a row in the runbook and a test.
func TestAlerts(t *testing.T) {
	s := newShop(t)
	s.call("", "GET", "/healthz", nil)                                         // lumiere_http_requests_total begins with the first request
	exposed := map[string]bool{"lumiere_owner": true, "lumiere_service": true} // no metrics: the database's roles
	for series := range s.scrape() {
		name, _, _ := strings.Cut(series, "{")
		exposed[name] = true
	}
	rules, runbook := readText(t, "docs/alerts.yml"), readText(t, "docs/operations.md")
	for _, name := range regexp.MustCompile(`\blumiere_[a-z_]+`).FindAllString(rules+runbook, -1) {
		if !exposed[name] {
			t.Errorf("%s is not exposed", name)
		}
	}
	names := func(text, pattern string) (names []string) {
		for _, match := range regexp.MustCompile("(?m)"+pattern).FindAllStringSubmatch(text, -1) {
			names = append(names, match[1])
		}
		return names
	}
	alerts := names(rules, `^ +- alert: (\w+)$`)
	if len(alerts) == 0 || strings.Count(rules, "alert:") != len(alerts) {
		t.Fatalf("of the alerts in docs/alerts.yml only %v are recognized", alerts)
	}
	if rows := names(runbook, "^\\| `(Lumiere\\w+)` \\|"); !slices.Equal(rows, alerts) {
		t.Errorf("the runbook has rows for\n%v\nand docs/alerts.yml has\n%v", rows, alerts)
	}
	if tested := slices.Compact(names(readText(t, "docs/alerts_test.yml"), `^ +- alertname: (\w+)$`)); !slices.Equal(tested, alerts) {
		t.Errorf("docs/alerts_test.yml tests\n%v\nand docs/alerts.yml has\n%v", tested, alerts)
	}
}

func readText(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	check(t, err)
	return string(text)
}

func TestMetricsWithoutADatabase(t *testing.T) {
	s := newShop(t)
	s.call("", "GET", "/healthz", nil)
	s.store.close()
	f := s.scrape()
	f.want(t, parsedMetrics{`lumiere_database_up`: 0, `lumiere_http_requests_total{route="GET /healthz",status="200"}`: 1})
	if _, ok := f["lumiere_holds"]; ok {
		t.Error("holds are said without being known")
	}
}

// Every way in which a call can end has its place.
func TestTrafficBuckets(t *testing.T) {
	m := newMetrics()
	for _, call := range gatewayCalls {
		for _, outcome := range gatewayOutcomes {
			m.gatewayCall(call, outcome, time.Millisecond)
		}
	}
	for took, bucket := range map[time.Duration]int{0: 0, time.Millisecond: 1, time.Millisecond + 1: 2, time.Minute: len(bucketBounds) - 1, time.Hour: len(bucketBounds)} {
		one := newRequestStats(1)
		one.count(0, took)
		if one.buckets[bucket].Load() != 1 || one.nanoseconds.Load() != int64(took) {
			t.Errorf("%v is not in bucket %d", took, bucket)
		}
	}
}

func TestCountingAllocatesNothing(t *testing.T) {
	one := newRequestStats(600)
	if n := testing.AllocsPerRun(100, func() { one.count(200, time.Second) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
