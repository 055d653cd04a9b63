package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"
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
		if a.message() == "" || a.header.Get("Content-Type") != "application/json; charset=utf-8" || !strings.Contains(a.header.Get("Allow"), row.allow) {
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
		request, err := http.NewRequest(row.method, s.url+row.path, nil)
		check(t, err)
		request.Header.Set("Origin", row.origin)
		if row.method == "OPTIONS" {
			request.Header.Set("Access-Control-Request-Method", "DELETE")
		}
		response, err := http.DefaultClient.Do(request)
		check(t, err)
		response.Body.Close()
		h := response.Header
		if response.StatusCode != row.status || (h.Get("Access-Control-Allow-Origin") == row.origin) != row.allowed || h.Get("Vary") != "Origin" ||
			h.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%+v: %d %v", row, response.StatusCode, h)
		}
		if row.status == 204 && (h.Get("Access-Control-Max-Age") != "600" || h.Get("Access-Control-Allow-Methods") != "GET, POST, PATCH, DELETE" ||
			h.Get("Access-Control-Allow-Headers") != "Authorization, Content-Type") {
			t.Errorf("preflight: %v", h)
		}
	}
}

func TestPanicIsOpaque(t *testing.T) {
	s := newShop(t)
	s.add(route{"GET /panic", anyone, 200, func(*request) (any, error) { panic("the cause") }})
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
	for _, secret := range []string{"홍길동", "buyer@example.com", "010-0000", "Bearer", "eyJ", testSecret, "in-the-query", s.double.secret} {
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

func TestDatabaseGoneAndBack(t *testing.T) {
	server := runPostgres(t, postgresConfig{Dir: postgresDir(t), Settings: unsafeSettings})
	s := newShop(t, func(c *config) { c.databaseURL = server.URL })
	painting := s.painting(99000)
	check(t, server.Crash())
	for _, row := range [][2]string{{"GET", "/api/products/cart-items?productId=" + painting}, {"GET", "/api/orders/latest"}, {"GET", "/readyz"}} {
		s.want(s.call(buyerA, row[0], row[1], nil), 503, "")
	}
	s.want(s.call(buyerA, "POST", "/api/orders", orderBody(newNumber(), painting)), 503, messageAway)
	s.want(s.call("", "GET", "/healthz", nil), 200, "")
	check(t, server.Start(t.Context()))
	// A connection that died unseen may fail once more; the pool has thrown it away then.
	for range 16 {
		if s.call("", "GET", "/readyz", nil).status == 200 {
			break
		}
	}
	s.want(s.call("", "GET", "/readyz", nil), 200, "")
	s.order(buyerA, painting)
}

func TestConfiguration(t *testing.T) {
	whole := map[string]string{"DATABASE_URL": "postgres://db", "JWT_SECRET": testSecret, "IAMPORT_KEY": "key", "IAMPORT_SECRET": "hidden-value"}
	for _, row := range []struct {
		set, unset string // NAME=value; NAME
		problem    string // empty: none
	}{
		{"", "", ""},
		{"PORT=8080", "", ""},
		{"", "DATABASE_URL", "DATABASE_URL"},
		{"", "IAMPORT_SECRET", "IAMPORT_SECRET"},
		{"JWT_SECRET=hidden-value", "", "JWT_SECRET"},
		{"PORT=x", "", "PORT"},
		{"SHIPPING_PRICE=-1", "", "SHIPPING_PRICE"},
		{"ORDER_HOLD=30", "", "ORDER_HOLD"},
		{"RECONCILE_INTERVAL=0s", "", "RECONCILE_INTERVAL"},
		{"IAMPORT_SANDBOX=perhaps", "", "IAMPORT_SANDBOX"},
		{"CORS_ORIGINS=*", "", "CORS_ORIGINS"},
		{"IAMPORT_URL=gateway", "", "IAMPORT_URL"},
		{"LOG_LEVEL=loud", "", "LOG_LEVEL"},
		{"METRICS_ADDR=9100", "", "METRICS_ADDR"},
		{"TRUSTED_PROXIES=10.0.0.0/8, 192.0.2.7,2001:db8::/32", "", ""},
		{"TRUSTED_PROXIES=proxy.example", "", "TRUSTED_PROXIES"},
		{"METRICS_ADDR=:9100", "", ""},
	} {
		name, value, _ := strings.Cut(row.set, "=")
		c, err := readConfig(func(asked string) string {
			switch asked {
			case name:
				return value
			case row.unset:
				return ""
			}
			return whole[asked]
		}, "")
		switch {
		case row.problem == "" && (err != nil || c.local || c.shipping != 10000 || c.hold != 30*time.Minute || c.reconcile != 10*time.Second):
			t.Errorf("%+v: %+v, %v", row, c, err)
		case row.problem != "" && (err == nil || !strings.Contains(err.Error(), row.problem) || strings.Contains(err.Error(), "hidden-value")):
			t.Errorf("%+v: %v", row, err)
		}
	}
	c, err := readConfig(func(string) string { return "" }, "")
	if err != nil || !c.local || c.port != 5000 {
		t.Errorf("nothing set: %+v, %v", c, err)
	}
	_, err = readConfig(func(name string) string { return map[string]string{"PORT": "x", "JWT_SECRET": "short"}[name] }, "")
	for _, name := range []string{"PORT", "JWT_SECRET", "DATABASE_URL", "IAMPORT_KEY", "IAMPORT_SECRET"} {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("not all problems at once: %v lacks %s", err, name)
		}
	}
}

func TestListen(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer taken.Close()
	port := taken.Addr().(*net.TCPAddr).Port
	advice := fmt.Sprintf("PORT=%d go run .", port+1)
	for _, row := range []struct {
		local, advised bool
		port           int
		err            error
	}{
		{local: true, port: port, err: syscall.EADDRINUSE, advised: true},
		{local: false, port: port, err: syscall.EADDRINUSE},
		{local: true, port: 0},
	} {
		listener, err := listen(config{local: row.local, port: row.port})
		if err == nil {
			listener.Close()
		}
		if !errors.Is(err, row.err) || (err != nil && strings.Contains(err.Error(), advice)) != row.advised {
			t.Errorf("%+v: %v", row, err)
		}
	}
}

// command runs the program with a configured environment and returns what it printed.
func command(t *testing.T, databaseURL, in string, args ...string) (string, error) {
	t.Helper()
	environment := map[string]string{"DATABASE_URL": databaseURL, "JWT_SECRET": testSecret}
	var out bytes.Buffer
	err := run(t.Context(), args, func(name string) string { return environment[name] }, strings.NewReader(in), &out, &out)
	return out.String(), err
}

func TestCommands(t *testing.T) {
	for _, args := range [][]string{{"nonsense"}, {"import"}, {"import", "a", "b"}, {"token", "-bad"}, {"serve"}} {
		if out, err := command(t, "", "", args...); err == nil || !strings.Contains(out, "Usage:") {
			t.Errorf("%q: %v, %s", args, err, out)
		}
	}
	for _, args := range [][]string{{"-h"}, {"import", "-h"}, {"help"}} {
		if out, err := command(t, "", "", args...); err != nil || !strings.Contains(out, "Usage:") {
			t.Errorf("%q: %v, %s", args, err, out)
		}
	}
	out, err := command(t, "", "", "token", "-user", strings.ToUpper(buyerA), "-admin", "-ttl", "1h")
	check(t, err)
	caller, err := newTokens([]byte(testSecret), time.Now).caller(&http.Request{Header: http.Header{"Authorization": {"Bearer " + strings.TrimSpace(out)}}})
	if err != nil || caller != (Caller{buyerA, true}) {
		t.Errorf("token: %+v, %v", caller, err)
	}
	if _, err := command(t, "", "", "token", "-user", "me"); err == nil {
		t.Error("a token for nobody")
	}
}

// catalogueEntry is an entry of a catalogue with one thing replaced.
func catalogueEntry(id, old, new string) string {
	return strings.Replace(`{"info":{"size":"73x61cm","canvas":20},"_id":"`+id+`","artist":{"_id":"61a4c82a2c1eaad2e0d0084c","name":"안영희"},`+
		`"title":"잠식","image":"/images/bye/1.jpg","price":99000,"inStock":true}`, old, new, 1)
}

func TestImport(t *testing.T) {
	url := newTestDatabase(t)
	first, second := newTestID(), newTestID()
	out, err := command(t, url, "["+catalogueEntry(first, "", "")+","+catalogueEntry(second, "true", "false")+"]", "import", "-")
	if err != nil || out != "2 paintings imported\n" { // before the first start
		t.Fatalf("%v, %s", err, out)
	}
	for _, row := range []struct{ old, new, problem string }{
		{"99000", "99000.5", "price"}, {"99000", "-1", "price"}, {"99000", `"99000"`, "price"}, {`"price":99000,`, "", "price"},
		{second, "xyz", "_id"}, {second, first, "_id"}, {"잠식", " ", "title"}, {"잠식", `\u0000`, "title"}, {"73x61cm", "", "info.size"},
		{`,"inStock":true`, "", "inStock"}, {"61a4c82a2c1eaad2e0d0084c", "", "artist._id"}, {"20}", "0}", "info.canvas"},
	} {
		_, err := command(t, url, "["+catalogueEntry(first, "잠식", "바뀐 제목")+","+catalogueEntry(second, row.old, row.new)+"]", "import", "-")
		if err == nil || !strings.Contains(err.Error(), "entry 2") || !strings.Contains(err.Error(), row.problem) {
			t.Errorf("%+v: %v", row, err)
		}
	}
	for _, text := range []string{"", "{}", "null", "[", "[1]"} {
		if _, err := command(t, url, text, "import", "-"); err == nil {
			t.Errorf("%q was imported", text)
		}
	}
	if title := queryText(t, url, `SELECT string_agg(DISTINCT title, ',') FROM products`); title != "잠식" {
		t.Errorf("half an import: %s", title)
	}
}

func TestImportKeepsHolds(t *testing.T) {
	s := newShop(t)
	painting := s.painting(99000)
	s.order(buyerA, painting)
	n, err := importCatalogue(t.Context(), s.store, strings.NewReader("["+catalogueEntry(painting, "잠식", "바뀐 제목")+"]"))
	if err != nil || n != 1 || s.inStock(buyerB, painting) {
		t.Fatalf("%d imported, %v, in stock %v", n, err, s.inStock(buyerB, painting))
	}
}

func TestImportManyPaintings(t *testing.T) {
	s := newShop(t)
	entries := make([]string, 100_000)
	for i := range entries {
		entries[i] = catalogueEntry(fmt.Sprintf("%024x", i+1), "", "")
	}
	n, err := importCatalogue(context.Background(), s.store, strings.NewReader("["+strings.Join(entries, ",")+"]"))
	if err != nil || n != len(entries) {
		t.Fatalf("%d imported, %v", n, err)
	}
}
