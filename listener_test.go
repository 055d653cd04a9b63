package main

import (
	"bufio"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// boundedServer serves up to three connections. A request for /wait is answered when the test says so.
type boundedServer struct {
	t       *testing.T
	server  *http.Server
	address string
	leave   chan struct{}
	waiting atomic.Int32
	served  chan error
}

func newBoundedServer(t *testing.T) *boundedServer {
	s := &boundedServer{t: t, leave: make(chan struct{}), served: make(chan error, 1)}
	s.server = httpServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/wait" {
			s.waiting.Add(1)
			<-s.leave
			s.waiting.Add(-1)
		}
	}), slog.New(slog.DiscardHandler))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	s.address = listener.Addr().String()
	go func() { s.served <- s.server.Serve(boundConnections(s.server, listener, 3)) }()
	t.Cleanup(func() { s.server.Close() })
	return s
}

// rawClient is a connection to a boundedServer.
type rawClient struct {
	net.Conn
	t *testing.T
	*bufio.Reader
}

func (s *boundedServer) connect() *rawClient {
	s.t.Helper()
	conn, err := net.Dial("tcp", s.address)
	check(s.t, err)
	s.t.Cleanup(func() { conn.Close() })
	check(s.t, conn.SetDeadline(time.Now().Add(time.Minute)))
	return &rawClient{conn, s.t, bufio.NewReader(conn)}
}

func (c *rawClient) send(text string) {
	c.t.Helper()
	_, err := io.WriteString(c.Conn, text)
	check(c.t, err)
}

// answer reads the status of an answer without a body, and "" when the connection was closed instead.
func (c *rawClient) answer() string {
	response, err := http.ReadResponse(c.Reader, nil)
	if err != nil {
		return ""
	}
	return response.Status
}

func (c *rawClient) get(path string) string {
	c.t.Helper()
	c.send("GET " + path + " HTTP/1.1\r\nHost: test\r\n\r\n")
	return c.answer()
}

// One connection too many takes the place of the one that has been idle longest, be it with half a header.
func TestConnectionsAreBounded(t *testing.T) {
	s := newBoundedServer(t)
	clients := make([]*rawClient, 3)
	for i := range clients {
		clients[i] = s.connect()
		if got := clients[i].get("/"); got != "200 OK" {
			t.Fatalf("answered %q", got)
		}
	}
	clients[0].get("/") // it is the youngest now
	clients[1].send("GET / HTTP/1.1\r\nHost: te")
	more := s.connect()
	check(t, more.SetDeadline(time.Now().Add(5*time.Second))) // a header may take longer to come
	if got := more.get("/"); got != "200 OK" {
		t.Errorf("one more was answered %q", got)
	}
	if got := clients[1].answer(); got != "" {
		t.Errorf("the one with half a header was answered %q", got)
	}
	for _, i := range []int{0, 2} {
		if got := clients[i].get("/"); got != "200 OK" {
			t.Errorf("connection %d was answered %q", i, got)
		}
	}
}

// Requests under way are not cut off for another connection: it waits for one of them to end.
func TestBusyConnectionsAreKept(t *testing.T) {
	s := newBoundedServer(t)
	clients := make([]*rawClient, 3)
	for i := range clients {
		clients[i] = s.connect()
		clients[i].send("GET /wait HTTP/1.1\r\nHost: test\r\n\r\n")
	}
	waitUntil(t, "all are busy", func() bool { return s.waiting.Load() == 3 })
	more := s.connect()
	more.send("GET /wait HTTP/1.1\r\nHost: test\r\n\r\n")
	check(t, more.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
	if _, err := more.Peek(1); err == nil || s.waiting.Load() != 3 {
		t.Errorf("%d are busy at once", s.waiting.Load())
	}
	s.leave <- struct{}{}
	waitUntil(t, "the next has its place", func() bool { return s.waiting.Load() == 3 })
	last := s.connect()
	check(t, s.server.Close()) // while that one waits
	if err := <-s.served; !errors.Is(err, http.ErrServerClosed) {
		t.Errorf("served until %v", err)
	}
	if got := last.answer(); got != "" {
		t.Errorf("answered %q", got)
	}
	close(s.leave)
}

// Every cart may be asked for in whatever spelling, and a larger header is refused.
func TestHeaderSize(t *testing.T) {
	s := newBoundedServer(t)
	cart := strings.Repeat("productId%5B499%5D="+buyerA+"&", maxQueryIDs)
	if got := s.connect().get("/?" + cart); got != "200 OK" {
		t.Errorf("a cart of %d is answered %q", maxQueryIDs, got)
	}
	if got := s.connect().get("/?" + strings.Repeat("a", 40<<10)); got != "431 Request Header Fields Too Large" {
		t.Errorf("a header of 40 KB is answered %q", got)
	}
}
