package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

func TestMain(m *testing.M) {
	if os.Getenv("TEST_RUN_MAIN") != "" { // set by programCommand
		main()
		return
	}
	code := wantWholeAPI(m.Run())
	if err := stopTestPostgres(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// stopTestPostgres ends and removes the tests' server; testPostgres sets it.
var stopTestPostgres = func() error { return nil }

// testPostgres starts the server that the tests share when the first of them asks: what only parses needs none.
// The durability switched off makes it fast; a test of crashes starts a server of its own.
var testPostgres = sync.OnceValues(func() (databaseURL string, err error) {
	if given := os.Getenv("TEST_DATABASE_URL"); given != "" {
		return given, nil
	}
	dir, err := os.MkdirTemp("", "lumiere-test-")
	if err != nil {
		return "", err
	}
	stopTestPostgres = func() error { return os.RemoveAll(dir) }
	server, err := startPostgres(context.Background(), postgresConfig{dir: dir, settings: map[string]string{
		"fsync":              "off",
		"synchronous_commit": "off",
		"full_page_writes":   "off",
		"max_connections":    "200",
		"checkpoint_timeout": "1h", // a new database for each test is much to write down
		"max_wal_size":       "4GB",
		"wal_init_zero":      "off",
	}})
	if err != nil {
		return "", err
	}
	stopTestPostgres = func() error {
		defer os.RemoveAll(dir)
		return server.stop()
	}
	return server.url, nil
})

// testDatabaseURL returns the connection string of the tests' server: TEST_DATABASE_URL, or else a private one.
func testDatabaseURL(t testing.TB) string {
	t.Helper()
	databaseURL, err := testPostgres()
	if err != nil {
		t.Fatalf("the tests need PostgreSQL; TEST_DATABASE_URL may name one: %v", err)
	}
	return databaseURL
}

// newTestDatabase makes an empty database that is dropped when the test ends, and returns its connection string.
func newTestDatabase(t testing.TB) string {
	t.Helper()
	server := testDatabaseURL(t)
	name := "test_" + strings.ToLower(rand.Text())
	execSQL(t, server, "CREATE DATABASE "+name)
	t.Cleanup(func() { execSQL(t, server, "DROP DATABASE "+name+" WITH (FORCE)") })
	return withDatabase(t, server, name)
}

// newMigratedDatabase is newTestDatabase with the schema in it. It copies a database that is made once: the steps of the schema
// take longer than most tests.
func newMigratedDatabase(t testing.TB) string {
	t.Helper()
	server := testDatabaseURL(t)
	template := migratedTemplate(t)
	name := "test_" + strings.ToLower(rand.Text())
	execSQL(t, server, "CREATE DATABASE "+name+" TEMPLATE "+template)
	t.Cleanup(func() { execSQL(t, server, "DROP DATABASE "+name+" WITH (FORCE)") })
	return withDatabase(t, server, name)
}

var template struct {
	mu   sync.Mutex
	name string // empty: not made yet
}

// migratedTemplate returns the name of the database that newMigratedDatabase copies.
func migratedTemplate(t testing.TB) string {
	t.Helper()
	template.mu.Lock()
	defer template.mu.Unlock()
	if template.name != "" {
		return template.name
	}
	server := testDatabaseURL(t)
	name := "test_template_" + strings.ToLower(rand.Text())
	execSQL(t, server, "CREATE DATABASE "+name)
	stop := stopTestPostgres
	stopTestPostgres = func() error {
		conn, err := pgx.Connect(context.Background(), server)
		if err == nil {
			_, err = conn.Exec(context.Background(), "DROP DATABASE "+name)
			conn.Close(context.Background())
		}
		return errors.Join(err, stop())
	}
	databaseURL := withDatabase(t, server, name)
	makeServiceRole(t, databaseURL)
	owner, err := openMigratedStore(context.Background(), databaseURL)
	check(t, err)
	owner.close()
	template.name = name
	return name
}

// withDatabase returns the connection string, an URL or keywords and values, with another database's name.
func withDatabase(t testing.TB, connString, name string) string {
	t.Helper()
	if !strings.Contains(connString, "://") {
		return connString + " dbname=" + name
	}
	u, err := url.Parse(connString)
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/" + name
	return u.String()
}

// databaseVia is the connection string of the database that databaseURL names, with other hosts on the way to it. options
// are pairs of a name and a value.
func databaseVia(t *testing.T, databaseURL string, options ...string) string {
	t.Helper()
	c, err := pgx.ParseConfig(databaseURL)
	check(t, err)
	query := url.Values{}
	for pair := range slices.Chunk(options, 2) {
		query.Set(pair[0], pair[1])
	}
	u := url.URL{Scheme: "postgres", User: url.UserPassword(c.User, c.Password), Path: "/" + c.Database, RawQuery: query.Encode()}
	return u.String()
}

// makeServiceRole makes the role lumiere_service, unless the server has it, keeps it from making tables as roles.sql does, and
// returns the database's connection string with that role.
func makeServiceRole(t testing.TB, databaseURL string) string {
	t.Helper()
	c, err := pgx.ParseConfig(databaseURL)
	check(t, err)
	execSQL(t, databaseURL, fmt.Sprintf(`
		DO $$ BEGIN CREATE ROLE lumiere_service LOGIN PASSWORD '%s'; EXCEPTION WHEN duplicate_object OR unique_violation THEN END $$;
		REVOKE TEMPORARY ON DATABASE %s FROM PUBLIC;
		REVOKE CREATE ON SCHEMA public FROM PUBLIC`, c.Password, c.Database))
	return withRole(t, databaseURL, "lumiere_service")
}

// withRole returns the connection string, an URL or keywords and values, with another role, which has the same password.
func withRole(t testing.TB, connString, role string) string {
	t.Helper()
	if !strings.Contains(connString, "://") {
		return connString + " user=" + role
	}
	u, err := url.Parse(connString)
	check(t, err)
	if password, has := u.User.Password(); has {
		u.User = url.UserPassword(role, password)
	} else {
		u.User = url.User(role)
	}
	return u.String()
}

// execSQL runs one statement on a connection of its own.
func execSQL(t testing.TB, databaseURL, sql string) {
	t.Helper()
	ctx := context.Background() // the test's own has ended when a cleanup runs
	conn, err := pgx.Connect(ctx, databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, sql); err != nil {
		t.Fatal(err)
	}
}

// queryText runs a query of one text value on a connection of its own.
func queryText(t testing.TB, databaseURL, sql string) string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	var value string
	if err := conn.QueryRow(t.Context(), sql).Scan(&value); err != nil {
		t.Fatal(err)
	}
	return value
}

// postgresDir returns a directory for a cluster, removed when the test ends. T.TempDir's parent is closed to the
// user that root runs PostgreSQL as.
func postgresDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lumiere-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// runPostgres starts a server for one test.
func runPostgres(t testing.TB, cfg postgresConfig) *postgresServer {
	t.Helper()
	if _, _, err := findPostgres(); err != nil && os.Getenv("TEST_DATABASE_URL") != "" {
		t.Skip(err) // this machine tests against a server elsewhere
	}
	server, err := startPostgres(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.stop(); err != nil {
			t.Error(err)
		}
	})
	return server
}

// unsafeSettings trade what a test does not test for speed.
var unsafeSettings = map[string]string{"fsync": "off"}

func TestNewTestDatabase(t *testing.T) {
	var first, second string
	t.Run("two of them", func(t *testing.T) {
		first, second = newTestDatabase(t), newTestDatabase(t)
		execSQL(t, first, "CREATE TABLE marks (mark int)")
		execSQL(t, second, "CREATE TABLE marks (mark int)")
	})
	if conn, err := pgx.Connect(t.Context(), first); err == nil {
		conn.Close(t.Context())
		t.Error("the database outlived its test")
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// waitUntil waits until so reports true, for a minute at most.
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
// since the rest can be worked on without it; where TEST_ALL is set, as in .ci/run, that is a failure.
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

// heavy skips a test that takes long, or needs much of the machine, when go test is given -short.
func heavy(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("takes long: not run with -short")
	}
}

// concurrently runs n calls at once and counts their statuses.
func concurrently(n int, do func(i int) answer) map[int]int {
	count := map[int]int{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-start
			a := do(i)
			mu.Lock()
			count[a.status]++
			mu.Unlock()
		})
	}
	close(start)
	wg.Wait()
	return count
}

// testClock is a clock that moves when told to.
type testClock struct{ nanoseconds atomic.Int64 }

func newTestClock() *testClock {
	c := &testClock{}
	c.nanoseconds.Store(time.Date(2026, 3, 2, 1, 0, 0, 0, time.UTC).UnixNano())
	return c
}

func (c *testClock) Now() time.Time { return time.Unix(0, c.nanoseconds.Load()).UTC() }

func (c *testClock) advance(d time.Duration) { c.nanoseconds.Add(int64(d)) }

var ids atomic.Int64

// newTestID is an ObjectId that no test has used before.
func newTestID() string { return fmt.Sprintf("61a4debe%016x", ids.Add(1)) }

// newNumber is an order number that no test has used before.
func newNumber() string { return fmt.Sprintf("20260302%06d", ids.Add(1)) }

// newImpUID is one that the gateway does not know, nor any test.
func newImpUID() string { return fmt.Sprintf("imp_%012d", ids.Add(1)) }

const testSecret = "test-secret-test-secret-test-secret-test"

// Users of the tests.
const (
	buyerA  = "61a4e52b4f5f6aa036bfeca1"
	buyerB  = "61a4e52b4f5f6aa036bfeca2"
	adminID = "61a4e52b4f5f6aa036bfecad"
)

// shop is the whole service of one test: its own database, a gateway and a clock that moves when told to. The
// reconciler runs when a test calls its Round. Its store has the service's role; what a test does to the database by hand it
// does through config.databaseURL, which is a superuser's.
type shop struct {
	*server
	t         testing.TB
	clock     *testClock
	fake      *testGateway
	logged    *bytes.Buffer // what it logged; read it when nothing runs
	traced    *tracer
	asService string // the connection string of its store
	url       string // empty: without a network
	called    string // the X-Request-Id of its calls; empty: the service makes one
}

// newShop opens a shop. change, when given, changes its configuration first.
func newShop(t testing.TB, change ...func(*config)) *shop {
	t.Helper()
	s := &shop{t: t, clock: newTestClock(), logged: &bytes.Buffer{}}
	s.fake = newTestGateway(s.clock.Now)
	gateway := httptest.NewServer(s.fake)
	t.Cleanup(gateway.Close)
	s.open(gateway.URL, nil, change...)
	service := httptest.NewServer(s)
	t.Cleanup(service.Close)
	s.url = service.URL
	return s
}

// newDirectShop opens a shop without a network, for tests of many calls: they go straight to ServeHTTP, and the gateway's
// client straight to the test gateway.
func newDirectShop(t testing.TB, change ...func(*config)) *shop {
	t.Helper()
	s := &shop{t: t, clock: newTestClock(), logged: &bytes.Buffer{}}
	s.fake = newTestGateway(s.clock.Now)
	s.open("http://gateway.invalid", s.fake, change...)
	return s
}

// open builds the server of a shop around its clock and its gateway.
func (s *shop) open(gatewayURL string, transport http.RoundTripper, change ...func(*config)) {
	s.t.Helper()
	c := config{
		jwtSecret: []byte(testSecret), iamportURL: gatewayURL, iamportKey: s.fake.key,
		iamportSecret: s.fake.secret, shipping: 10000, hold: 30 * time.Minute, reconcile: 10 * time.Second,
		keep: 43830 * time.Hour, origins: []string{"https://lumiere.example"},
		proxies: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}, // the tests name their requests
	}
	for _, f := range change {
		f(&c)
	}
	if c.databaseURL == "" {
		c.databaseURL = newMigratedDatabase(s.t)
		s.asService = makeServiceRole(s.t, c.databaseURL)
	} else {
		s.asService = makeServiceRole(s.t, c.databaseURL)
		owner, err := openMigratedStore(context.Background(), c.databaseURL)
		check(s.t, err)
		owner.close()
	}
	s.traced = &tracer{}
	store, err := openStore(context.Background(), s.asService, s.traced)
	check(s.t, err)
	s.t.Cleanup(store.close)
	s.server = newServer(c, store, transport, slog.New(slog.NewJSONHandler(s.logged, nil)), s.clock.Now)
	// Tests of other things have one buyer call at will.
	s.limits.newOrders.burst, s.limits.ordering.most, s.limits.asking.most = 1e9, 1000, 1000
	for _, g := range s.settler.gateways {
		switch g := g.(type) {
		case *iamportClient:
			s.t.Cleanup(g.client.CloseIdleConnections)
		case *portoneClient:
			s.t.Cleanup(g.client.CloseIdleConnections)
		}
	}
	s.settler.lastRound.Store(s.clock.Now().UnixNano())
}

// rowOf is the shop s with its failures going to a row's own t.
func rowOf(t *testing.T, s *shop) *shop {
	row := *s
	row.t = t
	return &row
}

// token is a good token of user's.
func (s *shop) token(user string, isAdmin bool) string {
	return s.issueToken(caller{id: user, admin: isAdmin}, s.clock.Now())
}

// issueToken is a token that was issued at a time and is good for three hours.
func (s *shop) issueToken(c caller, at time.Time) string {
	s.t.Helper()
	token, err := s.tokens.issue(c, at, 3*time.Hour)
	check(s.t, err)
	return token
}

// as returns the Authorization header of a user, a buyer or adminID; "" for the user "".
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

// call makes a request as user; as "" without a token. body is sent as it is when it is a string, as JSON otherwise.
func (s *shop) call(user, method, path string, body any) answer {
	s.t.Helper()
	return s.callWith(s.as(user), method, path, body)
}

// callWith is call with an Authorization header of the test's own.
func (s *shop) callWith(authorization, method, path string, body any) answer {
	s.t.Helper()
	request, err := newCall(s.t.Context(), method, s.url+path, authorization, body)
	check(s.t, err)
	if s.called != "" {
		request.Header.Set("X-Request-Id", s.called)
	}
	a, err := exchange(s.send, request)
	check(s.t, err)
	return a
}

// newCall is a request of the API. body is sent as it is when it is a string, as JSON otherwise.
func newCall(ctx context.Context, method, url, authorization string, body any) (*http.Request, error) {
	text, isText := body.(string)
	if !isText && body != nil {
		text = marshalRaw(body)
	}
	request, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(text))
	if err != nil {
		return nil, err
	}
	if authorization != "" {
		request.Header.Set("Authorization", authorization)
	}
	request.Header.Set("Content-Type", "application/json")
	return request, nil
}

// exchange sends a request and reads its answer.
func exchange(send func(*http.Request) (*http.Response, error), request *http.Request) (answer, error) {
	response, err := send(request)
	if err != nil {
		return answer{}, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return answer{response.StatusCode, response.Header, strings.TrimSuffix(string(text), "\n")}, err
}

// send makes a request over the network, if there is one.
func (s *shop) send(request *http.Request) (*http.Response, error) {
	if s.url != "" {
		return http.DefaultClient.Do(request)
	}
	if request.Body == nil {
		request.Body = http.NoBody
	}
	request.RemoteAddr = cmp.Or(request.RemoteAddr, "127.0.0.1:1")
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

// wantNaming is want for a refusal whose message has to contain text.
func (s *shop) wantNaming(a answer, status int, text string) {
	s.t.Helper()
	if a.status != status || a.message() == "" || !strings.Contains(a.message(), text) {
		s.t.Fatalf("answered %d %s\nwant %d with a message containing %q", a.status, a.body, status, text)
	}
}

// wantBody is want for the exact body.
func (s *shop) wantBody(a answer, status int, body string) {
	s.t.Helper()
	if a.status != status || a.body != body {
		s.t.Fatalf("answered %d %s\nwant     %d %s", a.status, a.body, status, body)
	}
}

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

// order makes an order of user's for paintings of 99,000 won and returns its id.
func (s *shop) order(user string, paintings ...string) string {
	s.t.Helper()
	a := s.want(s.call(user, "POST", "/api/orders", orderBody(newNumber(), paintings...)), 201, "주문서 생성 성공")
	var made orderCreated
	check(s.t, json.Unmarshal([]byte(a.body), &made))
	return made.OrderID
}

// charge has the gateway take amount for an order and returns the imp_uid. The service is not told.
func (s *shop) charge(order string, amount int64) string {
	return s.fake.pay(fakePayment{MerchantUID: order, Amount: amount})
}

// report tells the service of a payment as the browser does.
func (s *shop) report(impUID string) answer {
	s.t.Helper()
	return s.call("", "PATCH", "/api/orders/pay", map[string]string{"imp_uid": impUID})
}

// notice tells the service of a payment as the gateway does.
func (s *shop) notice(impUID string) answer {
	s.t.Helper()
	return s.call("", "POST", "/api/payments/webhook", map[string]string{"imp_uid": impUID, "merchant_uid": "hint", "status": "paid"})
}

// later moves the clock on and has the reconciler do what is due.
func (s *shop) later(d time.Duration) {
	s.t.Helper()
	s.clock.advance(d)
	check(s.t, s.settler.reconcileRound(s.t.Context()))
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

// orderIn is an order of buyerA's in any status; impUID is empty when it is unpaid.
func (s *shop) orderIn(status int) (order, impUID, painting string) {
	s.t.Helper()
	switch status {
	case statusUnpaid:
		painting = s.painting(99000)
		return s.order(buyerA, painting), "", painting
	case statusCancelled:
		order, impUID, painting = s.paid(buyerA)
		s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "")
		return order, impUID, painting
	default:
		return s.orderAt(status)
	}
}

// refuseCancels has the gateway refuse every refund, until its faults are set anew.
func (s *shop) refuseCancels() {
	s.fake.setFaults(func(call, _ string) fault {
		if call == "cancel" {
			return fault{before: answerRefusal(-1, "거절")}
		}
		return fault{}
	})
}

// stuckRefund is a paid order of user's whose cancel the gateway refuses until it needs a person. The gateway goes on refusing.
func (s *shop) stuckRefund(user string) (order, impUID string) {
	s.t.Helper()
	order, impUID, _ = s.paid(user)
	s.refuseCancels()
	s.want(s.call(user, "DELETE", "/api/orders/"+order, nil), 502, messageRefundPending)
	for range stuckAfter - 1 {
		s.later(time.Hour)
	}
	return order, impUID
}

// statusOf returns the order's status as the administrator sees it.
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

// row is the ledger's row of a payment: state and reason.
func (s *shop) row(impUID string) string {
	return queryText(s.t, s.config.databaseURL, `SELECT coalesce((SELECT state || coalesce(': ' || reason, '') FROM payments WHERE imp_uid = '`+impUID+`'), 'none')`)
}

// back is how much of a payment the gateway has given back.
func (s *shop) back(impUID string) int64 {
	p, _ := s.fake.get(impUID)
	return p.Cancelled
}

// listed is what both lists answer, as far as the tests look.
type listed struct {
	Orders []struct {
		ID     string `json:"_id"`
		User   any
		Result struct{ Status int }
	}
	Status      map[string]int
	Page, Pages int
}

func (l listed) ids() (ids []string) {
	for _, o := range l.Orders {
		ids = append(ids, o.ID)
	}
	return ids
}

func (s *shop) list(user, path string) (l listed) {
	s.t.Helper()
	check(s.t, json.Unmarshal([]byte(s.want(s.call(user, "GET", path, nil), 200, "").body), &l))
	return l
}

// wantMoney fails unless the gateway has given back this much of a payment.
func (s *shop) wantMoney(impUID string, back int64) {
	s.t.Helper()
	if p, ok := s.fake.get(impUID); !ok || p.Cancelled != back {
		s.t.Fatalf("the gateway gave back %d of %d, want %d", p.Cancelled, p.Amount, back)
	}
}

// wantUntouched fails unless the order is unpaid still, its paintings held for its buyer and no money given back.
func (s *shop) wantUntouched(order, painting string) {
	s.t.Helper()
	if status := s.statusOf(order); status != statusUnpaid {
		s.t.Fatalf("the order has status %d", status)
	}
	if !s.inStock(buyerA, painting) || s.inStock(buyerB, painting) {
		s.t.Fatal("the painting is not held for its buyer any more")
	}
	if n := s.fake.calls("cancel"); n != 0 {
		s.t.Fatalf("%d refunds were asked for", n)
	}
}

// iamport is the client of the V1 gateway.
func (s *shop) iamport() *iamportClient {
	s.t.Helper()
	g, err := s.settler.gateways.named(gatewayIamport)
	check(s.t, err)
	return g.(*iamportClient)
}

// auditor returns an auditor that takes no pauses.
func (s *shop) auditor() *auditor {
	return &auditor{store: s.store, gateways: s.settler.gateways, now: s.clock.Now, progress: io.Discard, progressEvery: time.Hour,
		pause: func(context.Context) error { return nil }}
}

// auditSince is the audit of the orders that were made or changed since then.
func (s *shop) auditSince(since time.Time) auditReport {
	s.t.Helper()
	report, err := s.auditor().audit(s.t.Context(), since)
	check(s.t, err)
	return report
}

// wantBalanced fails unless the money, the orders and the paintings agree, in the books and at the gateway. What must agree
// the audit knows.
func (s *shop) wantBalanced() auditReport {
	s.t.Helper()
	return s.wantBalancedSince(s.clock.Now().Add(-365 * 24 * time.Hour))
}

// wantBalancedSince is wantBalanced for the orders that were made or changed since then, and for all paintings.
func (s *shop) wantBalancedSince(since time.Time) auditReport {
	s.t.Helper()
	report := s.auditSince(since)
	for _, m := range report.Mismatches {
		s.t.Errorf("order %s, payment or painting %s%s: %s: %s", m.Order, m.ImpUID, m.Painting, m.Kind, m.Meaning)
	}
	if report.Matching != report.Orders || report.Ledger != report.Gateway {
		s.t.Errorf("%d of %d orders match; the books have %+v, the gateway %+v", report.Matching, report.Orders, report.Ledger, report.Gateway)
	}
	s.wantTrueStatusCounts()
	return report
}

// promises are what the service has told those who call it: by order, the last status that it was said to be in. A status
// only grows.
type promises struct {
	mu       sync.Mutex
	promised map[string]int
}

// said notes that the service said an order to be at least in status.
func (p *promises) said(order string, status int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if before, known := p.promised[order]; !known || status > before {
		if p.promised == nil {
			p.promised = map[string]int{}
		}
		p.promised[order] = status
	}
}

// given returns the promises so far.
func (p *promises) given() map[string]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.promised)
}

// broken returns what does not keep to the promises given before the orders had these statuses: each order must be there, and
// at least as far as it was said to be.
func broken(given, statuses map[string]int) (orders map[string]string) {
	orders = map[string]string{}
	for order, status := range given {
		if now, there := statuses[order]; !there {
			orders[order] = "was answered to its buyer and is not there"
		} else if now < status {
			orders[order] = fmt.Sprintf("was said to be in status %d and is in %d", status, now)
		}
	}
	return orders
}

// orderStatuses returns the status of each order that fits a condition in SQL.
func orderStatuses(t testing.TB, databaseURL, condition string) (statuses map[string]int) {
	t.Helper()
	text := queryText(t, databaseURL, `SELECT coalesce(json_object_agg(id, status), '{}')::text FROM orders WHERE `+condition)
	check(t, json.Unmarshal([]byte(text), &statuses))
	return statuses
}

// simulation is the shop as its simulated buyers use it: what they do is called as call says, and what they are told is kept.
type simulation struct {
	*promises
	call func(user, method, path string, body any) answer
}

// order makes an order for paintings of 99,000 won; id is "" unless it is made.
func (m simulation) order(user string, paintings ...string) (id string, a answer) {
	a = m.call(user, "POST", "/api/orders", orderBody(newNumber(), paintings...))
	var made orderCreated
	if a.status == http.StatusCreated && json.Unmarshal([]byte(a.body), &made) == nil {
		m.said(made.OrderID, statusUnpaid)
	}
	return made.OrderID, a
}

// report tells the service of a payment for an order.
func (m simulation) report(order string, report map[string]string) answer {
	a := m.call("", "PATCH", "/api/orders/pay", report)
	if a.status == http.StatusOK {
		m.said(order, statusPaid)
	}
	return a
}

// remove deletes, cancels or returns an order, as its status and the body say.
func (m simulation) remove(user, order, body string) answer {
	a := m.call(user, "DELETE", "/api/orders/"+order, body)
	if a.status != http.StatusOK {
		return a
	}
	switch a.message() {
	case "해당 주문의 결제 취소가 완료되었습니다":
		m.said(order, statusCancelled)
	case "해당 주문의 반품 요청이 완료되었습니다":
		m.said(order, statusReturning)
	}
	return a
}

// command runs the program with a configured environment and returns what it printed.
func command(t *testing.T, databaseURL, in string, args ...string) (string, error) {
	t.Helper()
	environment := map[string]string{"DATABASE_URL": databaseURL, "JWT_SECRET": testSecret}
	var out bytes.Buffer
	err := run(t.Context(), args, func(name string) string { return environment[name] }, strings.NewReader(in), &out, &out)
	return out.String(), err
}

// programCommand returns the program as a process of its own, ended with the test, with this environment and no other variable.
func programCommand(t *testing.T, environment map[string]string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = []string{"TEST_RUN_MAIN=1"}
	for name, value := range environment {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	return cmd
}

func TestGOMEMLIMITIsRespected(t *testing.T) {
	const given = 777 << 20 // as the Go runtime sets it from GOMEMLIMIT
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(given))
	for text, want := range map[string]int64{"": memoryLimit, "777MiB": given} {
		debug.SetMemoryLimit(given)
		tuneGC(func(name string) string { return map[string]string{"GOGC": "100", "GOMEMLIMIT": text}[name] })
		if got := debug.SetMemoryLimit(given); got != want {
			t.Errorf("GOMEMLIMIT=%s: %d bytes, want %d", text, got, want)
		}
	}
}

func TestGOGCIsRespected(t *testing.T) {
	const given = 77 // as the Go runtime sets it from GOGC
	defer debug.SetGCPercent(debug.SetGCPercent(given))
	for gogc, want := range map[string]int{"": 300, "77": given} {
		debug.SetGCPercent(given)
		tuneGC(func(name string) string { return map[string]string{"GOGC": gogc, "GOMEMLIMIT": "1GiB"}[name] })
		if got := debug.SetGCPercent(given); got != want {
			t.Errorf("GOGC=%s: %d percent, want %d", gogc, got, want)
		}
	}
}

// The service goes on when what reads its log ends.
func TestLogPipeCloses(t *testing.T) {
	program := programCommand(t, map[string]string{"DATABASE_URL": newTestDatabase(t), "JWT_SECRET": testSecret, "IAMPORT_KEY": "key",
		"IAMPORT_SECRET": "secret", "IAMPORT_URL": "http://127.0.0.1:9", "PORT": "0"})
	logged, err := program.StderrPipe()
	check(t, err)
	check(t, program.Start())
	var serving struct{ Msg, Address string }
	check(t, json.NewDecoder(logged).Decode(&serving))
	check(t, logged.Close())
	for range 3 { // each is logged
		request, err := newCall(t.Context(), "GET", "http://"+strings.Replace(serving.Address, "[::]", "127.0.0.1", 1)+"/healthz", "", nil)
		check(t, err)
		a, err := exchange(http.DefaultClient.Do, request)
		if err != nil || a.status != 200 {
			t.Fatalf("%d, %v", a.status, err)
		}
	}
	check(t, program.Process.Signal(syscall.SIGTERM))
	check(t, program.Wait())
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
	who, err := newTokens([]byte(testSecret), time.Now).caller(&http.Request{Header: http.Header{"Authorization": {"Bearer " + strings.TrimSpace(out)}}})
	if err != nil || who != (caller{buyerA, true}) {
		t.Errorf("token: %+v, %v", who, err)
	}
	if _, err := command(t, "", "", "token", "-user", "me"); err == nil {
		t.Error("a token for nobody")
	}
}

// Only migrate, serving, and an import into an empty database change the schema.
func TestCommandsAndTheSchema(t *testing.T) {
	heavy(t)
	newest := len(migrations())
	version := func(databaseURL string) int {
		store, err := openStore(t.Context(), databaseURL, nil)
		check(t, err)
		defer store.close()
		version, err := store.schemaVersion(t.Context())
		check(t, err)
		return version
	}
	migrate := func(databaseURL string, steps int) {
		store, err := openStore(t.Context(), databaseURL, nil)
		check(t, err)
		defer store.close()
		check(t, store.migrate(t.Context(), migrations()[:steps]))
	}
	commands := map[string][]string{"import": {"import", "-"}, "audit": {"audit"}, "migrate": {"migrate"},
		"export": {"export", "-from", "2026-11-01", "-to", "2026-11-30"}, "forget": {"forget", "-order", newTestID()}}
	for _, row := range []struct {
		command     string
		steps, then int
		refused     bool
	}{
		{"migrate", 0, newest, false},
		{"migrate", newest - 1, newest, false},
		{"migrate", newest, newest, false},
		{"import", 0, newest, false},
		{"import", newest - 1, newest - 1, true},
		{"import", newest, newest, false},
		{"audit", 0, 0, true},
		{"audit", newest - 1, newest - 1, true},
		{"export", newest - 1, newest - 1, true},
		{"export", newest, newest, false},
		{"forget", newest - 1, newest - 1, true},
	} {
		databaseURL := newTestDatabase(t)
		migrate(databaseURL, row.steps)
		environment := map[string]string{"DATABASE_URL": databaseURL, "IAMPORT_KEY": "key", "IAMPORT_SECRET": "secret", "IAMPORT_URL": "http://127.0.0.1:9"}
		var out bytes.Buffer
		err := run(t.Context(), commands[row.command], func(name string) string { return environment[name] }, strings.NewReader("[]"), &out, &out)
		if (err != nil) != row.refused || err != nil && !strings.Contains(err.Error(), "run lumiere migrate") {
			t.Errorf("%+v: %v, %s", row, err, &out)
		}
		if got := version(databaseURL); got != row.then {
			t.Errorf("%+v: then the schema is at step %d", row, got)
		}
		if row.command == "migrate" && out.String() != fmt.Sprintf("the schema is at step %d\n", newest) {
			t.Errorf("migrate prints %q", &out)
		}
	}
}

func TestHealthcheck(t *testing.T) {
	s := newShop(t)
	_, port, _ := strings.Cut(strings.TrimPrefix(s.url, "http://"), ":")
	healthcheck := func(args ...string) error {
		return run(t.Context(), append([]string{"healthcheck"}, args...), func(name string) string { return map[string]string{"PORT": port}[name] }, nil, io.Discard, io.Discard)
	}
	check(t, healthcheck())
	check(t, healthcheck("-live"))
	s.clock.advance(time.Hour) // in which no round of the reconciler finished
	if err := healthcheck(); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("a service that is not ready: %v", err)
	}
	check(t, healthcheck("-live"))
	if !strings.Contains(readText(t, "Dockerfile"), `"healthcheck", "-live"]`) {
		t.Error("the container is not checked for being alive")
	}
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
		{"KEEP_PERSONAL_DATA=720h", "", ""},
		{"KEEP_PERSONAL_DATA=719h59m", "", "KEEP_PERSONAL_DATA"},
		{"KEEP_PERSONAL_DATA=5y", "", "KEEP_PERSONAL_DATA"},
		{"IAMPORT_SANDBOX=perhaps", "", "IAMPORT_SANDBOX"},
		{"CORS_ORIGINS=*", "", "CORS_ORIGINS"},
		{"IAMPORT_URL=gateway", "", "IAMPORT_URL"},
		{"LOG_LEVEL=loud", "", "LOG_LEVEL"},
		{"METRICS_ADDR=9100", "", "METRICS_ADDR"},
		{"TRUSTED_PROXIES=10.0.0.0/8, 192.0.2.7,2001:db8::/32", "", ""},
		{"TRUSTED_PROXIES=proxy.example", "", "TRUSTED_PROXIES"},
		{"METRICS_ADDR=:9100", "", ""},
		// A blank variable is not set.
		{"JWT_SECRET=" + strings.Repeat(" ", 32), "", "JWT_SECRET is not set"},
		{"JWT_SECRET= " + strings.Repeat("x", 30) + " ", "", "JWT_SECRET has 30 bytes"},
		{"IAMPORT_KEY= ", "", "IAMPORT_KEY is not set"},
		{"DATABASE_URL=\t", "", "DATABASE_URL is not set"},
		{"PORT= ", "", ""},
		{"CORS_ORIGINS= , ", "", ""},
		{"LOCAL= ", "", ""},
		{"LOCAL=0", "", ""},
		{"LOCAL=perhaps", "", "LOCAL"},
		// The gateway is called by https alone, except on this machine.
		{"IAMPORT_URL=http://api.iamport.kr", "", "IAMPORT_URL"},
		{"IAMPORT_URL=http://127.0.0.1.example", "", "IAMPORT_URL"},
		{"IAMPORT_URL=http://10.0.0.1", "", "IAMPORT_URL"},
		{"IAMPORT_URL=http://127.0.0.1@gateway.example", "", "IAMPORT_URL"},
		{"IAMPORT_URL=https://", "", "IAMPORT_URL"},
		{"IAMPORT_URL=ftp://127.0.0.1", "", "IAMPORT_URL"},
		{"PORTONE_URL=http://api.portone.io", "", "PORTONE_URL"},
		{"PORTONE_URL=http://127.0.0.1:8000/v2", "", ""},
		{"PORTONE_WEBHOOK_SECRET=hidden-value", "", "PORTONE_WEBHOOK_SECRET"},
		{"IAMPORT_TAX_FREE=perhaps", "", "IAMPORT_TAX_FREE"},
		{"IAMPORT_URL=http://127.0.0.1:8000", "", ""},
		{"IAMPORT_URL=http://[::1]:8000", "", ""},
		{"IAMPORT_URL=http://localhost:8000", "", ""},
		{"IAMPORT_URL= https://gateway.example/ ", "", ""},
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
	_, err := readConfig(func(name string) string { return map[string]string{"PORT": "x", "JWT_SECRET": "short"}[name] }, "")
	for _, name := range []string{"PORT", "JWT_SECRET", "DATABASE_URL", "IAMPORT_KEY", "IAMPORT_SECRET"} {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("not all problems at once: %v lacks %s", err, name)
		}
	}
}

// V1 needs two keys, V2 one secret, and one of the two is enough.
func TestGatewayConfiguration(t *testing.T) {
	for _, command := range []string{"", "audit"} {
		for set, missing := range map[string]string{
			"":            "IAMPORT_KEY IAMPORT_SECRET PORTONE_API_SECRET",
			"IAMPORT_KEY": "IAMPORT_SECRET", "IAMPORT_SECRET": "IAMPORT_KEY", "IAMPORT_KEY IAMPORT_SECRET": "", "PORTONE_API_SECRET": "",
			"IAMPORT_KEY IAMPORT_SECRET PORTONE_API_SECRET": "", "PORTONE_API_SECRET IAMPORT_KEY": "IAMPORT_SECRET",
			"PORTONE_STORE_ID": "IAMPORT_KEY IAMPORT_SECRET PORTONE_API_SECRET", "IAMPORT_KEY IAMPORT_SECRET PORTONE_STORE_ID": "PORTONE_API_SECRET",
			"PORTONE_WEBHOOK_SECRET PORTONE_API_SECRET PORTONE_STORE_ID": "", "IAMPORT_KEY IAMPORT_SECRET PORTONE_WEBHOOK_SECRET": "PORTONE_API_SECRET",
		} {
			c, err := readConfig(func(name string) string {
				switch {
				case name == "DATABASE_URL":
					return "postgres://db"
				case name == "JWT_SECRET":
					return testSecret
				case !slices.Contains(strings.Fields(set), name):
					return ""
				case name == "PORTONE_WEBHOOK_SECRET":
					return "whsec_aGlkZGVu"
				}
				return "hidden-value"
			}, command)
			for _, name := range []string{"IAMPORT_KEY", "IAMPORT_SECRET", "PORTONE_API_SECRET"} {
				if named := err != nil && strings.Contains(err.Error(), name+" is not set"); named != slices.Contains(strings.Fields(missing), name) {
					t.Errorf("%q: %v", set, err)
				}
			}
			if err == nil && len(newGateways(c, nil, nil, nil)) != strings.Count(set, "IAMPORT_KEY")+strings.Count(set, "PORTONE_API_SECRET") {
				t.Errorf("%q: %+v", set, newGateways(c, nil, nil, nil))
			}
		}
	}
}

// Local development starts where nothing belongs to a deployment, and where it is asked for. A deployment that lost its secrets
// does not start.
func TestLocalConfiguration(t *testing.T) {
	whole := map[string]string{"DATABASE_URL": "postgres://db", "JWT_SECRET": "short", "IAMPORT_KEY": "key", "IAMPORT_SECRET": "hidden-value",
		"IAMPORT_URL": "http://gateway.example", "CORS_ORIGINS": "https://lumiere.example", "LOCAL": "1"}
	for _, row := range []struct {
		set   map[string]string
		local bool
	}{
		{map[string]string{}, true},
		{map[string]string{"DATABASE_URL": " ", "TRUSTED_PROXIES": " "}, true},
		{map[string]string{"PORT": "5001", "ORDER_HOLD": "1m", "LOG_LEVEL": "debug", "IAMPORT_SANDBOX": "true"}, true},
		{map[string]string{"TRUSTED_PROXIES": "10.0.0.0/8"}, false},
		{map[string]string{"CORS_ORIGINS": "https://lumiere.example"}, false},
		{map[string]string{"METRICS_ADDR": ":9100"}, false},
		{map[string]string{"PORTONE_STORE_ID": "store-1"}, false},
		{map[string]string{"PORTONE_WEBHOOK_SECRET": "whsec_aGlkZGVu"}, false},
		{map[string]string{"METRICS_ADDR": ":9100", "LOCAL": "false"}, false},
		{map[string]string{"METRICS_ADDR": ":9100", "LOCAL": "1"}, true},
		{whole, true},
	} {
		c, err := readConfig(func(name string) string { return row.set[name] }, "")
		switch {
		case row.local && (err != nil || !c.local || c.databaseURL != "" || len(c.jwtSecret) > 0 || c.iamportKey+c.iamportSecret+c.iamportURL != ""):
			t.Errorf("%v: %+v, %v", row.set, c, err)
		case row.local && len(c.origins) > 0 != (row.set["CORS_ORIGINS"] != ""):
			t.Errorf("%v: origins %v", row.set, c.origins)
		case !row.local:
			for _, name := range secretNames {
				if err == nil || !strings.Contains(err.Error(), name+" is not set") {
					t.Errorf("%v: %v, without %s", row.set, err, name)
				}
			}
		}
	}
}

// The figures and profiles have an address of their own, and end with the service.
func TestMetricsAddress(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	environment := map[string]string{"DATABASE_URL": newTestDatabase(t), "JWT_SECRET": testSecret, "IAMPORT_KEY": "key", "IAMPORT_SECRET": "secret",
		"IAMPORT_URL": "http://127.0.0.1:9", "METRICS_ADDR": "127.0.0.1:0", "PORT": "0"}
	logged, errOut := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, nil, func(name string) string { return environment[name] }, nil, io.Discard, errOut)
		errOut.Close()
	}()
	var metrics, service struct{ Msg, Address string }
	lines := json.NewDecoder(logged)
	check(t, lines.Decode(&service))
	check(t, lines.Decode(&metrics))
	if metrics.Msg != "serving metrics" || service.Msg != "serving" {
		t.Fatal(metrics, service)
	}
	go io.Copy(io.Discard, io.MultiReader(lines.Buffered(), logged))
	address, public := metrics.Address, strings.Replace(service.Address, "[::]", "127.0.0.1", 1)
	get := func(url string) (answer, error) {
		request, err := newCall(t.Context(), "GET", "http://"+url, "", nil)
		check(t, err)
		return exchange(http.DefaultClient.Do, request)
	}
	a, err := get(address + "/metrics")
	check(t, err)
	if _, err := parseMetrics(a.body + "\n"); err != nil {
		t.Error(err)
	}
	for url, status := range map[string]int{address + "/debug/pprof/goroutine?debug=1": 200, public + "/metrics": 404, public + "/debug/pprof/": 404, address + "/api/orders": 404} {
		a, err := get(url)
		check(t, err)
		if a.status != status {
			t.Errorf("%s: %d", url, a.status)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	stop()
	check(t, <-ended)
	if _, err := get(address + "/metrics"); err == nil {
		t.Error("the figures are served after the end")
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
