package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgxpool"
)

// Everything around the handlers: what all calls have in common, the configuration and the commands.

func TestNoSuchCall(t *testing.T) {
	s := newShop(t)
	for _, row := range []struct {
		method, path string
		status       int
		allow        string
	}{
		{"GET", "/api/nothing", 404, ""},
		{"GET", "/api/orders/pay/more", 404, ""},
		{"PUT", "/api/orders/pay", 405, "PATCH"},
		{"POST", "/api/products/cart-items", 405, "GET"},
		{"POST", "/local/payments", 404, ""}, // local development's alone
		{"GET", "/local/catalogue", 404, ""},
	} {
		a := s.want(s.call("", row.method, row.path, nil), row.status, "")
		if a.message() == "" || a.header.Get("Content-Type") != "application/json; charset=utf-8" || !strings.Contains(a.header.Get("Allow"), row.allow) ||
			a.header.Get("X-Request-Id") == "" || a.header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s %s: %v %s", row.method, row.path, a.header, a.body)
		}
	}
}

func TestHeadersOfEveryAnswer(t *testing.T) {
	s := newShop(t)
	for _, row := range []struct {
		origin, method, path string
		status               int
		allowed              bool
	}{
		{"https://lumiere.example", "GET", "/api/products/cart-items", 200, true},
		{"https://lumiere.example", "GET", "/api/orders/latest", 401, true},
		{"https://lumiere.example", "GET", "/api/nothing", 404, true},
		{"https://lumiere.example", "OPTIONS", "/api/orders/61a7adc903b7708e5dbba693", 204, true},
		{"https://else.example", "GET", "/api/products/cart-items", 200, false},
		{"https://else.example", "OPTIONS", "/api/orders", 405, false},
	} {
		request, err := newCall(t.Context(), row.method, s.url+row.path, "", nil)
		check(t, err)
		request.Header.Set("Origin", row.origin)
		if row.method == "OPTIONS" {
			request.Header.Set("Access-Control-Request-Method", "DELETE")
		}
		a, err := exchange(s.send, request)
		check(t, err)
		h := a.header
		if a.status != row.status || (h.Get("Access-Control-Allow-Origin") == row.origin) != row.allowed || h.Get("Vary") != "Origin" ||
			h.Get("X-Content-Type-Options") != "nosniff" || h.Get("Cache-Control") != "no-store" {
			t.Errorf("%+v: %d %v", row, a.status, h)
		}
		if row.status == 204 && (h.Get("Access-Control-Max-Age") != "600" || h.Get("Access-Control-Allow-Methods") != "GET, POST, PATCH, DELETE" ||
			h.Get("Access-Control-Allow-Headers") != "Authorization, Content-Type") {
			t.Errorf("preflight: %v", h)
		}
	}
}

// A client that sent Expect: 100-continue waits with its body, so an answer without a look at the body must not wait for it.
func TestExpectContinue(t *testing.T) {
	s := newShop(t)
	service := httptest.NewServer(s.server) // not the shop's, which reads every body
	defer service.Close()
	for _, row := range []struct {
		authorization string
		statuses      string // of all answers, 100 included
	}{
		{"", "401"},
		{"Authorization: " + s.as(buyerA) + "\r\n", "100 400"},
	} {
		connection, err := net.Dial("tcp", service.Listener.Addr().String())
		check(t, err)
		defer connection.Close()
		fmt.Fprintf(connection, "POST /api/orders HTTP/1.1\r\nHost: test\r\n%sContent-Length: 2\r\nExpect: 100-continue\r\n\r\n", row.authorization)
		check(t, connection.SetReadDeadline(time.Now().Add(10*time.Second))) // far less than the server waits for a body
		answers, statuses := bufio.NewReader(connection), ""
		for {
			answered, err := http.ReadResponse(answers, nil)
			if err != nil {
				t.Fatalf("after %q: %v", statuses, err)
			}
			statuses += " " + strconv.Itoa(answered.StatusCode)
			if answered.StatusCode != http.StatusContinue {
				break
			}
			io.WriteString(connection, "{}")
		}
		if statuses != " "+row.statuses {
			t.Errorf("answered%s, want %s", statuses, row.statuses)
		}
	}
}

func TestPanicIsOpaque(t *testing.T) {
	s := newShop(t)
	s.add(route{"GET /panic", public, 0, 200, func(*request) (any, error) { panic("the cause") }})
	a := s.want(s.call("", "GET", "/panic", nil), 500, messageFault)
	if strings.Contains(a.body, "cause") || !strings.Contains(s.logged.String(), "the cause") {
		t.Fatalf("answered %s, logged %s", a.body, s.logged)
	}
}

func TestLogHasNobodyInIt(t *testing.T) {
	s := newShop(t)
	order, impUID, _ := s.paid(buyerA)
	s.call(buyerA, "GET", "/api/orders/"+order+"?token=in-the-query", nil)
	logged := s.logged.String()
	for _, secret := range []string{"홍길동", "buyer@example.com", "010-0000", "Bearer", "eyJ", testSecret, "in-the-query", s.fake.secret} {
		if strings.Contains(logged, secret) {
			t.Errorf("the log has %q", secret)
		}
	}
	for _, part := range []string{`"route":"GET /api/orders/{id}"`, `"status":201`, `"order":"` + order + `"`, `"imp_uid":"` + impUID + `"`, `"request":"`} {
		if !strings.Contains(logged, part) {
			t.Errorf("the log lacks %s:\n%s", part, logged)
		}
	}
}

// A stranger does not choose what the log and the history call a request.
func TestRequestID(t *testing.T) {
	heavy(t)
	for _, row := range []struct {
		name, proxies, sent string
		kept                bool
	}{
		{"no proxy", "", "request-1", false},
		{"another proxy", "192.0.2.0/24", "request-1", false},
		{"the proxy", "127.0.0.0/8", "request-1", true},
		{"too short", "127.0.0.0/8", "request", false},
		{"a space", "127.0.0.0/8", "request 1", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := newShop(t, func(c *config) {
				c.proxies = nil
				if row.proxies != "" {
					c.proxies = []netip.Prefix{netip.MustParsePrefix(row.proxies)}
				}
			})
			s.called = row.sent
			for path, status := range map[string]int{"/healthz": 200, "/api/orders/latest": 401, "/api/nothing": 404} {
				id := s.want(s.call("", "GET", path, nil), status, "").header.Get("X-Request-Id")
				if !requestIDPattern.MatchString(id) || (id == row.sent) != row.kept || !strings.Contains(s.logged.String(), `"request":"`+id+`"`) {
					t.Errorf("%s is request %q", path, id)
				}
			}
			order := s.order(buyerA, s.painting(99000))
			history := s.want(s.call(adminID, "GET", "/api/orders/"+order+"/history", nil), 200, "").body
			if strings.Contains(history, `"`+row.sent+`"`) != row.kept {
				t.Errorf("the history: %s", history)
			}
		})
	}
}

// What is expected to fail now and then is a warning; a fault of the program is an error.
func TestLogLevelOfFailures(t *testing.T) {
	s := newShop(t)
	s.add(route{"GET /panic", public, 0, 200, func(*request) (any, error) { panic("the cause") }})
	level := func(path string, status int) any {
		t.Helper()
		s.logged.Reset()
		s.want(s.call(buyerA, "GET", path, nil), status, "")
		return s.lines("request")[0]["level"]
	}
	if got := level("/panic", 500); got != "ERROR" {
		t.Errorf("a fault is logged as %v", got)
	}
	if got := level("/api/orders/latest", 404); got != "INFO" {
		t.Errorf("a refusal is logged as %v", got)
	}
	for status, hook := range map[int]faultHook{503: answer500, 504: hangUntilGone} {
		s.iamport().lookUpLimit = 200 * time.Millisecond
		s.fake.setFaults(func(call, _ string) fault {
			if call == "token" {
				return fault{}
			}
			return fault{before: hook}
		})
		s.logged.Reset()
		s.want(s.report(newImpUID()), status, messageGateway)
		if got := s.lines("request")[0]["level"]; got != "WARN" {
			t.Errorf("a %d of the gateway's is logged as %v", status, got)
		}
	}
	s.store.pool.Close()
	pool, err := pgxpool.New(t.Context(), "postgres://127.0.0.1:1/nothing?connect_timeout=1")
	check(t, err)
	defer pool.Close()
	s.store.pool = pool
	if got := level("/api/orders/latest", 503); got != "WARN" {
		t.Errorf("a database that is away is logged as %v", got)
	}
}

// lines are the log's lines with this message.
func (s *shop) lines(msg string) (lines []map[string]any) {
	s.t.Helper()
	for text := range strings.Lines(s.logged.String()) {
		var line map[string]any
		check(s.t, json.Unmarshal([]byte(text), &line))
		if line["msg"] == msg {
			lines = append(lines, line)
		}
	}
	return lines
}

func TestLogLevel(t *testing.T) {
	heavy(t)
	for level, want := range map[slog.Level][]string{
		slog.LevelDebug: {"serving", "gateway", "request", "money"},
		slog.LevelInfo:  {"serving", "request", "money"},
		slog.LevelWarn:  nil,
	} {
		var logged bytes.Buffer
		s := newShop(t)
		s.log = newLog(config{logLevel: level}, &logged)
		s.settler.log = s.log
		s.log.Info("serving")
		s.paid(buyerA)
		s.logged = &logged
		for _, msg := range []string{"serving", "gateway", "request", "money"} {
			if got := len(s.lines(msg)) > 0; got != slices.Contains(want, msg) {
				t.Errorf("at %v: %s is logged: %v", level, msg, got)
			}
		}
	}
}

// wantBadRequest fails unless err is a refusal that blames the request.
func wantBadRequest(t *testing.T, err error) {
	t.Helper()
	var r *httpError
	if !errors.As(err, &r) || r.status != http.StatusBadRequest {
		t.Fatalf("not a 400: %v", err)
	}
	if text := r.body.(message).Message; text == "" || !utf8.ValidString(text) {
		t.Fatalf("a message nobody can read: %q", text)
	}
}

// Times are in UTC with three decimals, the rest cut off.
func TestJSONTime(t *testing.T) {
	for at, want := range map[string]string{
		"2021-12-01T17:15:53.146Z":       "2021-12-01T17:15:53.146Z",
		"2021-12-01T17:15:53Z":           "2021-12-01T17:15:53.000Z",
		"2021-12-02T02:15:53.007+09:00":  "2021-12-01T17:15:53.007Z",
		"2021-12-01T17:15:53.059999999Z": "2021-12-01T17:15:53.059Z",
		"2021-12-31T23:59:59.999999999Z": "2021-12-31T23:59:59.999Z",
	} {
		parsed, err := time.Parse(time.RFC3339, at)
		check(t, err)
		got, err := jsonTime(parsed).MarshalText()
		if err != nil || string(got) != want || string(got) != parsed.UTC().Format(timeFormat) {
			t.Errorf("%s: %s, %v, want %s", at, got, err, want)
		}
	}
}
