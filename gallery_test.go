package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// loadTest is a database filled with orders, for benchmarks: a fifth as many paintings, and a tenth as many buyers.
type loadTest struct {
	t        testing.TB
	orders   int
	database string // its connection string
	address  string // of the service before it
	tokens   *tokens
	now      func() time.Time
	shown    []shownOrder // some of the orders

	mu   sync.Mutex
	free []string // some of the paintings that nobody has
}

// shownOrder is an order that its buyer sees.
type shownOrder struct{ ID, Buyer string }

// newLoadTest fills an empty database.
func newLoadTest(t testing.TB, databaseURL string, orders int, now func() time.Time) *loadTest {
	g := &loadTest{t: t, orders: orders, database: databaseURL, tokens: newTokens([]byte(testSecret), now), now: now}
	ctx := t.Context()
	store, err := openMigratedStore(ctx, databaseURL)
	check(t, err)
	defer store.close()
	conn, err := pgx.Connect(ctx, databaseURL)
	check(t, err)
	defer conn.Close(ctx)
	g.fill(conn)
	g.sample(conn)
	return g
}

// galleryFunctions say what order number n of a gallery with p paintings is: four in five are cancelled or expired;
// of the newest ones half are in a status from 0 to 4, and the last hundredth is unpaid.
const galleryFunctions = `
	SET session_replication_role = replica; -- the triggers' rows are written beside
	SET synchronous_commit = off;
	CREATE FUNCTION pg_temp.oid(kind text, n bigint) RETURNS text LANGUAGE sql IMMUTABLE AS
		$$ SELECT '61a4' || kind || lpad(to_hex(n), 18, '0') $$;
	CREATE FUNCTION pg_temp.orders(p bigint, first bigint, last bigint)
	RETURNS TABLE (id text, painting text, buyer text, status smallint, ended text, at timestamptz) LANGUAGE sql AS $$
		SELECT pg_temp.oid('0d', n), pg_temp.oid('0a', k),
			pg_temp.oid('0b', CASE WHEN unpaid THEN k ELSE n * 7919 END % (p / 2)),
			(CASE WHEN unpaid THEN -1 WHEN newest AND k % 10 < 5 THEN k % 10 WHEN n % 2 = 1 THEN -1 ELSE 5 END)::smallint,
			CASE WHEN n % 2 = 1 AND NOT unpaid AND NOT (newest AND k % 10 < 5) THEN 'expired' END,
			now() - (5 * p - n) * interval '30 seconds'
		FROM generate_series(first, last) n, LATERAL (SELECT (n - 1) % p + 1 AS k, n > 4 * p AS newest, n > 5 * p - p / 100 AS unpaid) a $$`

// galleryPaintings makes $1 paintings; galleryOrders makes the orders number $2 to $3 for so many.
const galleryPaintings = `
	INSERT INTO products (id, artist_id, artist_name, title, image, size, canvas, price, for_sale, order_id)
	SELECT pg_temp.oid('0a', k), pg_temp.oid('0c', k % 997), '안영희', '작품 ' || k, '/images/bye/1.jpg', '73x61cm', 20, 99000, true,
		CASE WHEN k % 10 < 5 OR k > $1 - $1 / 100 THEN pg_temp.oid('0d', 4 * $1 + k) END
	FROM generate_series(1, $1::bigint) k`

var galleryOrders = []string{`
	INSERT INTO orders (id, user_id, number, status, ended, created_at, updated_at, paid_at, held_until, next_look_at,
		shipping_price, total_price, product_ids, items, delivery_info, delivery_details, orderer_info)
	SELECT id, buyer, to_char(at, 'YYYYMMDDHH24MISS'), status, ended, at, at + '1 minute', CASE WHEN status >= 0 THEN at + '1 minute' END,
		now() + '1 day', CASE WHEN status = -1 AND ended IS NULL THEN now() + '1 day' END, 10000, 109000, ARRAY[painting],
		json_build_array(json_build_object('image', '/images/bye/1.jpg', 'title', '작품', 'artist', '안영희', 'size', '73x61cm(20호)',
			'price', 99000, 'product', painting)),
		'{"address":"[00000] 어느시 어느로 1","detailedAddress":"101호","receiver":"홍길동","contactNum":"010-0000-0000"}',
		'{"receiveAt":"문 앞","requestedTerms":"도착 시 문자 주세요"}',
		'{"name":"홍길동","phoneNum":"010-0000-0000","email":"buyer@example.com","refundTerms":"품절 시 결제수단으로 환불"}'
	FROM pg_temp.orders($1, $2, $3)`, `
	INSERT INTO payments (imp_uid, order_id, state, reason, currency, amount, refunded, paid_at, created_at, updated_at)
	SELECT 'imp_' || id, id, CASE status WHEN 5 THEN 'refunded' ELSE 'kept' END, CASE status WHEN 5 THEN 'buyer cancelled' END,
		'KRW', 109000, CASE status WHEN 5 THEN 109000 ELSE 0 END, at, at, at
	FROM pg_temp.orders($1, $2, $3) WHERE status >= 0`, `
	INSERT INTO history (order_id, at, who, from_status, to_status, why)
	SELECT id, at + step * interval '1 minute', 'buyer', CASE step WHEN 1 THEN -1 END, CASE step WHEN 1 THEN status ELSE -1 END,
		CASE step WHEN 1 THEN coalesce(ended, 'paid') ELSE 'created' END
	FROM pg_temp.orders($1, $2, $3), generate_series(0, 1) step WHERE step = 0 OR status <> -1 OR ended IS NOT NULL`, `
	INSERT INTO order_tally SELECT status, count(*) FROM pg_temp.orders($1, $2, $3) WHERE status >= 0 GROUP BY status`,
}

// fill writes the orders in steps, and says how far it is when that takes long.
func (g *loadTest) fill(conn *pgx.Conn) {
	const step = 50000
	ctx, paintings := g.t.Context(), g.orders/5
	_, err := conn.Exec(ctx, galleryFunctions)
	check(g.t, err)
	_, err = conn.Exec(ctx, galleryPaintings, paintings)
	check(g.t, err)
	for first := 1; first <= g.orders; first += step {
		for _, statement := range galleryOrders {
			_, err := conn.Exec(ctx, statement, paintings, first, min(first+step-1, g.orders))
			check(g.t, err)
		}
		if g.orders > step {
			fmt.Printf("\r%d of %d orders", min(first+step-1, g.orders), g.orders)
		}
	}
	_, err = conn.Exec(ctx, "VACUUM ANALYZE")
	check(g.t, err)
}

// paintingID is the id of the painting number k, from 1.
func paintingID(k int) string { return galleryID("0a", k) }

// galleryID is the id of a gallery's row of this kind and number, as pg_temp.oid.
func galleryID(kind string, n int) string { return fmt.Sprintf("61a4%s%018x", kind, n) }

// orderAt is the order number n, an even one and so not expired, but none of the unpaid ones at the end. readingKeys draws
// the same for pgbench.
func (g *loadTest) orderAt(n int) shownOrder {
	return shownOrder{ID: galleryID("0d", n), Buyer: galleryID("0b", n*7919%(g.orders/10))}
}

// sample chooses the orders and the free paintings that are asked for.
func (g *loadTest) sample(conn *pgx.Conn) {
	g.shown = make([]shownOrder, min(g.orders, 10000))
	for i := range g.shown {
		g.shown[i] = g.orderAt(2 + 2*mathrand.IntN((g.orders-g.orders/500)/2))
	}
	rows, _ := conn.Query(g.t.Context(), `SELECT id FROM products WHERE order_id IS NULL AND title ~ '[89]$'`)
	var err error
	g.free, err = pgx.CollectRows(rows, pgx.RowTo[string])
	check(g.t, err)
}

// instantGateway answers at once and remembers nothing: imp_ORDER has paid for ORDER, what is cancelled has gone back,
// and no order has any other payment.
func instantGateway(w http.ResponseWriter, r *http.Request) {
	impUID, status, cancelled := strings.TrimPrefix(r.URL.Path, "/payments/"), "paid", 0
	switch {
	case r.URL.Path == "/users/getToken":
		now := time.Now().Unix()
		fmt.Fprintf(w, `{"code":0,"message":null,"response":{"access_token":"token","now":%d,"expired_at":%d}}`, now, now+1800)
		return
	case r.URL.Path == "/payments/cancel":
		var body fakeCancel
		json.NewDecoder(r.Body).Decode(&body)
		impUID, status, cancelled = body.ImpUID, "cancelled", 109000
	case !strings.HasPrefix(impUID, "imp_"):
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprintf(w, `{"code":-1,"message":%q,"response":null}`, fakeNotFound)
		return
	}
	fmt.Fprintf(w, `{"code":0,"message":null,"response":{"imp_uid":%q,"merchant_uid":%q,"status":%q,"currency":"KRW",
		"amount":109000,"cancel_amount":%d,"sandbox":false,"paid_at":%d}}`,
		impUID, strings.TrimPrefix(impUID, "imp_"), status, cancelled, time.Now().Unix())
}

// ---- load

// timings are how long calls took, by their name.
type timings map[string][]time.Duration

func (m timings) percentile(name string, percent int) time.Duration {
	all := slices.Sorted(slices.Values(m[name]))
	return all[len(all)*percent/100]
}

// checkoutClient is one connection to the service.
type checkoutClient struct {
	*loadTest
	wire  *wire
	taken timings

	painting string // of its own
}

// call makes a request and notes how long it took.
func (c *checkoutClient) call(name string, request []byte, want int) []byte {
	start := time.Now()
	status, body, err := c.wire.do(request)
	c.taken[name] = append(c.taken[name], time.Since(start))
	if err != nil || status != want {
		panic(fmt.Sprintf("%s answered %d %s %v, want %d", name, status, body, err, want))
	}
	return body
}

// drive has clients do flow over and over for a while, after a second to warm up.
func (g *loadTest) drive(clients int, length time.Duration, flow func(*checkoutClient)) timings {
	all := timings{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	begin := time.Now().Add(time.Second)
	for range clients {
		wg.Go(func() {
			w, err := dialWire(g.address)
			check(g.t, err)
			defer w.conn.Close()
			c := &checkoutClient{loadTest: g, wire: w, taken: timings{}}
			for time.Now().Before(begin) {
				flow(c)
			}
			clear(c.taken)
			for flow(c); time.Since(begin) < length; {
				flow(c)
			}
			g.giveBack(c.painting)
			mu.Lock()
			defer mu.Unlock()
			for name, took := range c.taken {
				all[name] = append(all[name], took...)
			}
		})
	}
	wg.Wait()
	return all
}

func (g *loadTest) token(user string) string {
	token, err := g.tokens.issue(caller{id: user, admin: user == adminID}, g.now(), 3*time.Hour)
	check(g.t, err)
	return token
}

// takeFree is a painting that nobody has.
func (g *loadTest) takeFree() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.free) == 0 {
		panic("no painting is free any more")
	}
	id := g.free[0]
	g.free = g.free[1:]
	return id
}

// giveBack says that nobody has the painting any more; "" is none.
func (g *loadTest) giveBack(painting string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if painting != "" {
		g.free = append(g.free, painting)
	}
}

// cart is three paintings.
func (g *loadTest) cart() []string {
	n := g.orders / 5
	return []string{paintingID(1 + mathrand.IntN(n)), paintingID(1 + mathrand.IntN(n)), paintingID(1 + mathrand.IntN(n))}
}

// requests are one call's questions, about many orders and paintings.
func (g *loadTest) requests(name string) [][]byte {
	byDesk := g.token(adminID)
	ask := map[string]func(o shownOrder) []byte{
		"cart-items": func(shownOrder) []byte {
			return wireRequest("GET", "/api/products/cart-items?productId="+strings.Join(g.cart(), "&productId="), "", "")
		},
		"total-price": func(o shownOrder) []byte {
			return wireRequest("GET", "/api/products/total-price?productId="+strings.Join(g.cart(), "&productId="), g.token(o.Buyer), "")
		},
		"detail": func(o shownOrder) []byte { return wireRequest("GET", "/api/orders/"+o.ID, g.token(o.Buyer), "") },
		"history": func(o shownOrder) []byte {
			return wireRequest("GET", "/api/orders/"+o.ID+"/history", g.token(o.Buyer), "")
		},
		"latest":       func(o shownOrder) []byte { return wireRequest("GET", "/api/orders/latest", g.token(o.Buyer), "") },
		"mine":         func(o shownOrder) []byte { return wireRequest("GET", "/api/orders/mine", g.token(o.Buyer), "") },
		"desk":         func(shownOrder) []byte { return wireRequest("GET", "/api/orders", byDesk, "") },
		"desk, status": func(shownOrder) []byte { return wireRequest("GET", "/api/orders?status=0", byDesk, "") },
	}[name]
	requests := make([][]byte, len(g.shown))
	for i, o := range g.shown {
		requests[i] = ask(o)
	}
	return requests
}

// reading is the flow of a client that asks one call's questions.
func (g *loadTest) reading(name string) func(*checkoutClient) {
	requests := g.requests(name)
	return func(c *checkoutClient) { c.call(name, requests[mathrand.IntN(len(requests))], http.StatusOK) }
}

// order makes an order for a painting and returns its id.
func (c *checkoutClient) order(buyer, painting string) string {
	text, err := json.Marshal(orderBody(newNumber(), painting))
	check(c.t, err)
	var made orderCreated
	check(c.t, json.Unmarshal(c.call("create", wireRequest("POST", "/api/orders", c.token(buyer), string(text)), 201), &made))
	return made.OrderID
}

// pay reports that an order is paid.
func (c *checkoutClient) pay(buyer, order string) {
	c.call("pay", wireRequest("PATCH", "/api/orders/pay", c.token(buyer), `{"imp_uid":"imp_`+order+`"}`), 200)
}

// checkout is an order of a new buyer's, and its payment.
func checkout(c *checkoutClient) {
	buyer := newTestID()
	c.pay(buyer, c.order(buyer, c.takeFree()))
}

// life leads an order through everything that may become of it, and another one to its end unpaid. The painting is the
// client's for good, so that the tables grow little.
func life(c *checkoutClient) {
	if c.painting == "" {
		c.painting = c.takeFree()
	}
	buyer := newTestID()
	order := c.order(buyer, c.painting)
	c.pay(buyer, order)
	path, byBuyer, byDesk := "/api/orders/"+order, c.token(buyer), c.token(adminID)
	for status := statusPreparing; status <= statusDelivered; status++ {
		c.call("step", wireRequest("PATCH", path, byDesk, fmt.Sprintf(`{"status":%d}`, status)), 200)
	}
	c.call("return", wireRequest("DELETE", path, byBuyer, `{"status":4}`), 200)
	c.call("cancel", wireRequest("DELETE", path, byDesk, ""), 200)
	order = c.order(buyer, c.painting)
	c.call("delete", wireRequest("DELETE", "/api/orders/"+order, byBuyer, ""), 200)
}

// wire is a client's connection that costs next to nothing, so that what is measured is the service.
type wire struct {
	conn   net.Conn
	answer *bufio.Reader
	body   []byte
}

func dialWire(address string) (*wire, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	return &wire{conn: conn, answer: bufio.NewReaderSize(conn, 16<<10)}, nil
}

// do sends a whole request and reads its answer; the body is good until the next call.
func (w *wire) do(request []byte) (status int, body []byte, err error) {
	if _, err := w.conn.Write(request); err != nil {
		return 0, nil, err
	}
	length := 0
	for {
		line, err := w.answer.ReadSlice('\n')
		if err != nil {
			return 0, nil, err
		}
		switch value, isLength := bytes.CutPrefix(line, []byte("Content-Length: ")); {
		case status == 0:
			status, err = strconv.Atoi(string(line[len("HTTP/1.1 "):][:3]))
		case isLength:
			length, err = strconv.Atoi(string(bytes.TrimSpace(value)))
		}
		if err != nil {
			return 0, nil, err
		}
		if len(line) == len("\r\n") {
			break
		}
	}
	w.body = slices.Grow(w.body[:0], length)[:length]
	_, err = io.ReadFull(w.answer, w.body)
	return status, w.body, err
}

// wireRequest is a request as it goes over the wire.
func wireRequest(method, path, token, body string) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: localhost\r\n", method, path)
	if token != "" {
		fmt.Fprintf(&b, "Authorization: Bearer %s\r\n", token)
	}
	if body != "" {
		fmt.Fprintf(&b, "Content-Type: application/json\r\nContent-Length: %d\r\n", len(body))
	}
	return []byte(b.String() + "\r\n" + body)
}
