package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// testClock is a clock that moves when told to.
type testClock struct{ nanoseconds atomic.Int64 }

func newTestClock() *testClock {
	c := &testClock{}
	c.nanoseconds.Store(time.Date(2026, 3, 2, 1, 0, 0, 0, time.UTC).UnixNano())
	return c
}

func (c *testClock) Now() time.Time          { return time.Unix(0, c.nanoseconds.Load()).UTC() }
func (c *testClock) advance(d time.Duration) { c.nanoseconds.Add(int64(d)) }

// shop is the whole service of one test: its own database, a gateway double and a clock that moves when told to. The
// reconciler runs when a test calls its Round.
type shop struct {
	*server
	t      testing.TB
	clock  *testClock
	fake   *fakeGateway
	logged *bytes.Buffer // what it logged; read it when nothing runs
	traced *tracer
	url    string // empty: without a network
	called string // the X-Request-Id of its calls; empty: the service makes one
}

const testSecret = "test-secret-test-secret-test-secret-test"

// Users of the tests.
const (
	buyerA  = "61a4e52b4f5f6aa036bfeca1"
	buyerB  = "61a4e52b4f5f6aa036bfeca2"
	adminID = "61a4e52b4f5f6aa036bfecad"
)

// newShop opens a shop. change, when given, changes its configuration first.
func newShop(t testing.TB, change ...func(*config)) *shop {
	t.Helper()
	s := &shop{t: t, clock: newTestClock(), logged: &bytes.Buffer{}}
	s.fake = newFakeGateway(s.clock.Now)
	gateway := httptest.NewServer(s.fake)
	t.Cleanup(gateway.Close)
	s.open(gateway.URL, nil, change...)
	service := httptest.NewServer(s)
	t.Cleanup(service.Close)
	s.url = service.URL
	return s
}

// newDirectShop opens a shop without a network, for tests of many calls: they go straight to ServeHTTP, and the gateway's
// client straight to its double.
func newDirectShop(t testing.TB) *shop {
	t.Helper()
	s := &shop{t: t, clock: newTestClock(), logged: &bytes.Buffer{}}
	s.fake = newFakeGateway(s.clock.Now)
	s.open("http://gateway.invalid", s.fake)
	return s
}

// open builds the server of a shop around its clock and its gateway.
func (s *shop) open(gatewayURL string, transport http.RoundTripper, change ...func(*config)) {
	s.t.Helper()
	c := config{
		jwtSecret: []byte(testSecret), iamportURL: gatewayURL, iamportKey: s.fake.key,
		iamportSecret: s.fake.secret, shipping: 10000, hold: 30 * time.Minute, reconcile: 10 * time.Second,
		origins: []string{"https://lumiere.example"},
	}
	for _, f := range change {
		f(&c)
	}
	if c.databaseURL == "" {
		c.databaseURL = newTestDatabase(s.t)
	}
	s.traced = &tracer{}
	store, err := openStore(context.Background(), c.databaseURL, s.traced)
	check(s.t, err)
	s.t.Cleanup(store.close)
	check(s.t, store.migrate(context.Background(), migrations()))
	s.server = newServer(c, store, transport, slog.New(slog.NewJSONHandler(s.logged, nil)), s.clock.Now)
	s.t.Cleanup(s.settler.gateway.client.CloseIdleConnections)
	s.settler.lastRound.Store(s.clock.Now().UnixNano())
}

// token is a good token of user's.
func (s *shop) token(user string, isAdmin bool) string {
	token, err := s.tokens.issue(caller{id: user, admin: isAdmin}, s.clock.Now(), 3*time.Hour)
	check(s.t, err)
	return token
}

// as is the Authorization header of a user: a buyer, or desk, the administrator. "" is nobody.
func (s *shop) as(user string) string {
	if user == "" {
		return ""
	}
	return "Bearer " + s.token(user, user == adminID)
}

// answer is what a call answered.
type answer struct {
	status int
	header http.Header
	body   string
}

// message is the body's message.
func (a answer) message() string {
	var m message
	json.Unmarshal([]byte(a.body), &m)
	return m.Message
}

// call makes a request as user ("": nobody). body is sent as it is when it is a string, as JSON otherwise.
func (s *shop) call(user, method, path string, body any) answer {
	s.t.Helper()
	return s.callWith(s.as(user), method, path, body)
}

// callWith is call with an Authorization header of the test's own.
func (s *shop) callWith(authorization, method, path string, body any) answer {
	s.t.Helper()
	var reader io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		reader = strings.NewReader(b)
	default:
		text, err := json.Marshal(b)
		check(s.t, err)
		reader = bytes.NewReader(text)
	}
	request, err := http.NewRequest(method, s.url+path, reader)
	check(s.t, err)
	if authorization != "" {
		request.Header.Set("Authorization", authorization)
	}
	request.Header.Set("Content-Type", "application/json")
	if s.called != "" {
		request.Header.Set("X-Request-Id", s.called)
	}
	response, err := s.send(request)
	check(s.t, err)
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	check(s.t, err)
	return answer{response.StatusCode, response.Header, strings.TrimSuffix(string(text), "\n")}
}

// send makes a request over the network, if there is one.
func (s *shop) send(request *http.Request) (*http.Response, error) {
	if s.url != "" {
		return http.DefaultClient.Do(request)
	}
	if request.Body == nil {
		request.Body = http.NoBody
	}
	recorder := httptest.NewRecorder()
	s.ServeHTTP(recorder, request)
	return recorder.Result(), nil
}

// want fails the test unless a call answered this status and, when text is not empty, this message.
func (s *shop) want(a answer, status int, text string) answer {
	s.t.Helper()
	if a.status != status || (text != "" && a.message() != text) {
		s.t.Fatalf("answered %d %s\nwant %d %q", a.status, a.body, status, text)
	}
	return a
}

var ids atomic.Int64

// newTestID is an ObjectId that no test has used before.
func newTestID() string { return fmt.Sprintf("61a4debe%016x", ids.Add(1)) }

// painting puts a painting of this price into the catalogue and returns its id. Its size is 73x61cm, its canvas 20.
func (s *shop) painting(price int64) string {
	s.t.Helper()
	return s.paintings(1, price)[0]
}

// paintings puts so many paintings into the catalogue at once.
func (s *shop) paintings(n int, price int64) (ids []string) {
	s.t.Helper()
	for range n {
		ids = append(ids, newTestID())
	}
	s.catalogue(price, true, ids...)
	return ids
}

// catalogue puts paintings into the catalogue, or changes them there.
func (s *shop) catalogue(price int64, forSale bool, ids ...string) {
	s.t.Helper()
	var all []painting
	for _, id := range ids {
		all = append(all, painting{id: id, artistID: "61a4c82a2c1eaad2e0d0084c", artistName: "안영희",
			title: "잠식", image: "/images/bye/1.jpg", size: "73x61cm", canvas: 20, price: price, forSale: forSale})
	}
	s.importPaintings(all...)
}

// importPaintings loads paintings into the catalogue.
func (s *shop) importPaintings(paintings ...painting) {
	s.t.Helper()
	_, err := s.store.importPaintings(context.Background(), paintings)
	check(s.t, err)
}

// orderBody is a good body of POST /api/orders for paintings of 99,000 won each; number is its result.id.
func orderBody(number string, paintings ...string) map[string]any {
	items := make([]any, len(paintings))
	for i, id := range paintings {
		items[i] = map[string]any{"product": id, "image": "/images/bye/1.jpg", "title": "잠식", "artist": "안영희", "size": "73x61cm(20호)", "price": 99000}
	}
	return map[string]any{
		"orderItems":      items,
		"result":          map[string]any{"id": number},
		"deliveryInfo":    map[string]any{"address": "[00000] 어느시 어느로 1", "detailedAddress": "101호", "receiver": "홍길동", "contactNum": "010-0000-0000"},
		"deliveryDetails": map[string]any{"receiveAt": "문 앞", "requestedTerms": "문자 주세요"},
		"ordererInfo":     map[string]any{"name": "홍길동", "phoneNum": "010-0000-0000", "email": "buyer@example.com", "refundTerms": "품절 시 결제수단으로 환불"},
		"shippingPrice":   10000,
		"totalPrice":      10000 + 99000*len(paintings),
	}
}

// newNumber is an order number that no test has used before.
func newNumber() string { return fmt.Sprintf("20260302%06d", ids.Add(1)) }

// order makes an order of user's for paintings of 99,000 won and returns its id.
func (s *shop) order(user string, paintings ...string) string {
	s.t.Helper()
	a := s.want(s.call(user, "POST", "/api/orders", orderBody(newNumber(), paintings...)), 201, "주문서 생성 성공")
	var made orderCreated
	check(s.t, json.Unmarshal([]byte(a.body), &made))
	return made.OrderID
}

// charge has the gateway take amount for an order and returns the imp_uid; nobody is told.
func (s *shop) charge(order string, amount int64) string {
	return s.fake.pay(fakePayment{MerchantUID: order, Amount: amount})
}

// report tells the service of a payment as the browser does.
func (s *shop) report(impUID string) answer {
	s.t.Helper()
	return s.call("", "PATCH", "/api/orders/pay", map[string]string{"imp_uid": impUID})
}

// paid makes an order of user's for one new painting, and pays it.
func (s *shop) paid(user string) (order, impUID, painting string) {
	s.t.Helper()
	painting = s.painting(99000)
	order = s.order(user, painting)
	impUID = s.charge(order, 109000)
	s.want(s.report(impUID), 200, "결제 성공")
	return order, impUID, painting
}

// orderAt brings a new paid order of buyerA's to a status from 0 to 4.
func (s *shop) orderAt(status int) (order, impUID, painting string) {
	s.t.Helper()
	order, impUID, painting = s.paid(buyerA)
	for step := 1; step <= min(status, statusDelivered); step++ {
		s.want(s.call(adminID, "PATCH", "/api/orders/"+order, map[string]int{"status": step}), 200, "")
	}
	if status == statusReturning {
		s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, map[string]int{"status": 4}), 200, "")
	}
	return order, impUID, painting
}

// status is the order's status as its buyer or the desk sees it.
func (s *shop) statusOf(order string) int {
	s.t.Helper()
	var detail struct{ Result struct{ Status int } }
	check(s.t, json.Unmarshal([]byte(s.want(s.call(adminID, "GET", "/api/orders/"+order, nil), 200, "").body), &detail))
	return detail.Result.Status
}

// inStock reports whether cart-items says to user that the painting is in stock.
func (s *shop) inStock(user, painting string) bool {
	s.t.Helper()
	var items []cartItem
	check(s.t, json.Unmarshal([]byte(s.want(s.call(user, "GET", "/api/products/cart-items?productId="+painting, nil), 200, "").body), &items))
	if len(items) != 1 {
		s.t.Fatalf("cart-items answered %d paintings", len(items))
	}
	return items[0].InStock
}

// waitUntil looks until it is so.
func waitUntil(t *testing.T, what string, so func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for !so() {
		if pause(ctx, postgresPoll) != nil {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// findTool is a program that some tests need beside PostgreSQL, by any of its names or paths. Without it they are skipped,
// since nobody needs it to work on the rest; where TEST_ALL is set, as in .ci/run, that is a failure.
func findTool(t testing.TB, names ...string) string {
	t.Helper()
	for _, name := range names {
		for _, place := range []string{name, "/usr/sbin/" + name} { // not in the PATH of Debian's users
			if program, err := exec.LookPath(place); err == nil {
				return program
			}
		}
	}
	if os.Getenv("TEST_ALL") == "" {
		t.Skipf("%s is not installed", names[0])
	}
	t.Fatalf("%s is not installed, and TEST_ALL is set", names[0])
	return ""
}
