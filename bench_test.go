package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
)

// tripCounter counts a store's round trips to the database: a statement or a batch is one.
type tripCounter struct{ atomic.Int64 }

func (c *tripCounter) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	c.Add(1)
	return ctx
}

func (c *tripCounter) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func (c *tripCounter) TraceBatchStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	c.Add(1)
	return ctx
}

func (c *tripCounter) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}

func (c *tripCounter) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData) {}

// Every call takes one round trip to the database, but for those whose answer hangs on what the gateway says or on the
// state that an order is found in:
//   - an order for a painting that is taken asks how, once it has lost;
//   - pay reads the books under their locks, decides, and writes: two, in one transaction;
//   - a step reads the order's state, which says whether this caller may move it there, and then changes it from that state;
//   - the deletion of an unpaid order does the same, with the gateway asked in between;
//   - a cancel reads the state, books the refund before the gateway is asked for it, and then settles like pay.
func TestTrips(t *testing.T) {
	s := newShop(t)
	free := s.painting(99000)
	unpaid, toDelete := s.order(buyerA, s.painting(99000)), s.order(buyerB, s.painting(99000))
	impUID := s.charge(unpaid, 109000)
	toCancel, _, _ := s.paid(newTestID())
	toStep, _, _ := s.paid(newTestID())
	for _, row := range []struct {
		trips              int64
		user, method, path string
		body               any
		status             int
	}{
		{0, "", "GET", "/api/products/cart-items", nil, 200},
		{1, "", "GET", "/api/products/cart-items?productId=" + free + "&productId=" + newTestID(), nil, 200},
		{1, buyerA, "GET", "/api/products/total-price?productId=" + free, nil, 200},
		{1, newTestID(), "POST", "/api/orders", orderBody(newNumber(), free), 201},
		{2, newTestID(), "POST", "/api/orders", orderBody(newNumber(), free), 409},
		{1, buyerA, "GET", "/api/orders/" + unpaid, nil, 200},
		{1, buyerA, "GET", "/api/orders/latest", nil, 200},
		{1, buyerA, "GET", "/api/orders/mine", nil, 200},
		{1, desk, "GET", "/api/orders", nil, 200},
		{1, desk, "GET", "/api/orders?number=" + newNumber(), nil, 200},
		{1, buyerA, "GET", "/api/orders/" + unpaid + "/history", nil, 200},
		{2, "", "PATCH", "/api/orders/pay", map[string]string{"imp_uid": impUID}, 200},
		{2, "", "POST", "/api/payments/webhook", map[string]string{"imp_uid": impUID}, 200},
		{2, desk, "PATCH", "/api/orders/" + toStep, map[string]int{"status": 1}, 200},
		{1, buyerA, "DELETE", "/api/orders/" + toStep, nil, 404},
		{2, buyerB, "DELETE", "/api/orders/" + toDelete, nil, 200},
		{4, desk, "DELETE", "/api/orders/" + toCancel, nil, 200},
		{0, "", "GET", "/healthz", nil, 200},
		{1, "", "GET", "/readyz", nil, 200},
	} {
		before := s.trips.Load()
		s.want(s.call(row.user, row.method, row.path, row.body), row.status, "")
		if got := s.trips.Load() - before; got > row.trips {
			t.Errorf("%s %s: %d trips, want %d", row.method, row.path, got, row.trips)
		}
	}
}

// Planning some of the statements takes longer than executing them. PostgreSQL keeps the plan of a prepared statement once
// it has planned it five times, unless a plan for the arguments at hand always looks cheaper: so no estimate may hang on them.
func TestPlansAreKept(t *testing.T) {
	s := newShop(t)
	const rounds = 10 // one call at a time needs one connection, so that all is prepared there
	for range rounds {
		order, _, painting := s.paid(buyerA)
		for _, path := range []string{"/api/products/cart-items?productId=" + painting, "/api/orders/" + order, "/api/orders/latest",
			"/api/orders/mine", "/api/orders/" + order + "/history"} {
			s.want(s.call(buyerA, "GET", path, nil), 200, "")
		}
		for _, query := range []string{"", "?status=0", "?number=" + newNumber()} {
			s.want(s.call(desk, "GET", "/api/orders"+query, nil), 200, "")
		}
		s.want(s.call(desk, "PATCH", "/api/orders/"+order, map[string]int{"status": 1}), 200, "")
		s.want(s.call(desk, "PATCH", "/api/orders/"+order, map[string]int{"status": 4}), 200, "")
		s.want(s.call(desk, "DELETE", "/api/orders/"+order, nil), 200, "")
		s.want(s.call(buyerA, "DELETE", "/api/orders/"+s.order(buyerA, painting), nil), 200, "")
	}
	rows, _ := s.store.pool.Query(t.Context(), `
		SELECT custom_plans || ' of ' || generic_plans + custom_plans || ': ' || statement FROM pg_prepared_statements
		WHERE custom_plans > 5 AND generic_plans + custom_plans >= $1`, rounds)
	replanned, err := pgx.CollectRows(rows, pgx.RowTo[string])
	check(t, err)
	for _, statement := range replanned {
		t.Errorf("planned anew %s", statement)
	}
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
