package main

import (
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// maxConnections is how many clients may be connected to a server at once. Each costs about 20 KB of memory.
const maxConnections = 2048

// boundedListener accepts at most so many connections at once. One more takes the place of the connection that has waited the
// longest for a request. While there is none, because requests are under way on all of them, it waits.
type boundedListener struct {
	net.Listener
	most int

	mu     sync.Mutex // guards what follows
	freed  *sync.Cond // a place may be free, or closed is set
	open   map[*boundedConn]struct{}
	closed bool
}

// boundedConn is a connection of a boundedListener.
type boundedConn struct {
	net.Conn
	idleSince atomic.Int64 // in Unix nanoseconds; 0 while a request is under way
}

// boundConnections returns a listener for server that accepts at most so many connections at once.
func boundConnections(server *http.Server, listener net.Listener, most int) net.Listener {
	l := &boundedListener{Listener: listener, most: most, open: map[*boundedConn]struct{}{}}
	l.freed = sync.NewCond(&l.mu)
	server.ConnState = l.setState
	return l
}

// Accept returns the next connection, once there is a place for it.
func (l *boundedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &boundedConn{Conn: conn}
	c.idleSince.Store(time.Now().UnixNano())
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.open) >= l.most && !l.closed && !l.closeLongestIdle() {
		l.freed.Wait()
	}
	if l.closed {
		conn.Close()
		return nil, net.ErrClosed
	}
	l.open[c] = struct{}{}
	return c, nil
}

// closeLongestIdle closes the connection that has waited the longest for a request, and reports whether there is one.
func (l *boundedListener) closeLongestIdle() bool {
	var longest *boundedConn
	var since int64
	for c := range l.open {
		if idle := c.idleSince.Load(); idle != 0 && (longest == nil || idle < since) {
			longest, since = c, idle
		}
	}
	if longest == nil {
		return false
	}
	delete(l.open, longest)
	longest.Close()
	return true
}

// Close closes the listener, and leaves the connections open.
func (l *boundedListener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.freed.Broadcast()
	return l.Listener.Close()
}

// setState is the ConnState function of the server.
func (l *boundedListener) setState(conn net.Conn, state http.ConnState) {
	c := conn.(*boundedConn)
	switch state {
	case http.StateActive: // the header of a request has been read
		c.idleSince.Store(0)
	case http.StateIdle:
		c.idleSince.Store(time.Now().UnixNano())
		l.freed.Signal()
	case http.StateClosed:
		l.mu.Lock()
		delete(l.open, c)
		l.mu.Unlock()
		l.freed.Signal()
	}
}
