package main

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"time"
)

// batcher combines concurrent look-ups by key into one query. While a query runs, the keys of further callers collect in the
// next batch, which runs as soon as the query returns, or has taken long. A lone caller does not wait, and nothing is cached: a
// query takes no keys after it has started, so a result is never older than the call that asked for it.
//
// A batcher is safe for concurrent use.
type batcher[K comparable, V any] struct {
	query   func(context.Context, []K) (map[K]V, error)
	mu      sync.Mutex     // guards what follows, and the keys of waiting batches
	running int            // goroutines in run
	overdue int            // of those, the ones whose query has taken longer than longQuery
	waiting []*batch[K, V] // batches that have not started, oldest first
}

// batch is one query and its result, which may be read once done is closed.
type batch[K comparable, V any] struct {
	keys     []K
	deadline time.Time // of the query; it counts from the batch's first caller, however long earlier batches take
	overdue  bool      // the query has taken longer than longQuery; guarded by the batcher's mu, as ended is
	ended    bool
	done     chan struct{}
	result   map[K]V
	err      error
}

// maxBatchKeys bounds the keys of one query, so that a caller does not wait for the rows of very many others. A single call
// may exceed it.
const maxBatchKeys = 1000

const (
	// longQuery is after which time a query no longer keeps the next one waiting. It may have met a connection that hangs.
	longQuery = 100 * time.Millisecond
	// maxQueries bounds the queries that run at once when all of them take long.
	maxQueries = 4
)

// newBatcher returns a batcher that calls query. Keys without a value are missing from query's map. The
// keys that it is given may repeat.
func newBatcher[K comparable, V any](query func(context.Context, []K) (map[K]V, error)) *batcher[K, V] {
	return &batcher[K, V]{query: query}
}

// get returns the values of keys. Keys without a value are missing from the map. The map may hold other callers' keys too,
// is shared with them, and must not be changed.
//
// When ctx ends, get returns its error and the query continues for the others. An error of the query is returned to every
// caller in the batch, so callers must check beforehand that the database accepts their keys. get gives up dbTimeout after
// the batch's first caller.
func (b *batcher[K, V]) get(ctx context.Context, keys ...K) (map[K]V, error) {
	joined := b.join(keys)
	select {
	case <-joined.done:
		return joined.result, joined.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// join adds keys to a batch that has not started and returns the batch.
func (b *batcher[K, V]) join(keys []K) *batch[K, V] {
	b.mu.Lock()
	defer b.mu.Unlock()
	var last *batch[K, V]
	if n := len(b.waiting); n > 0 && len(b.waiting[n-1].keys)+len(keys) <= maxBatchKeys {
		last = b.waiting[n-1]
	} else {
		last = &batch[K, V]{deadline: time.Now().Add(dbTimeout), done: make(chan struct{})}
		b.waiting = append(b.waiting, last)
	}
	last.keys = append(last.keys, keys...)
	b.start()
	return last
}

// start has the waiting batches executed, unless a query is running that will end soon. The caller holds mu.
func (b *batcher[K, V]) start() {
	if len(b.waiting) > 0 && b.running == b.overdue && b.running < maxQueries {
		b.running++
		go b.run()
	}
}

// run executes batches until none is waiting, or another goroutine does so.
func (b *batcher[K, V]) run() {
	for {
		runtime.Gosched() // goroutines that are about to call get join this batch
		b.mu.Lock()
		if len(b.waiting) == 0 || b.running-b.overdue > 1 {
			b.running--
			b.mu.Unlock()
			return
		}
		next := b.waiting[0]
		b.waiting = b.waiting[1:]
		b.mu.Unlock()
		b.exec(next)
	}
}

// exec runs the query of one batch and releases its callers, also when the query panics.
func (b *batcher[K, V]) exec(next *batch[K, V]) {
	defer close(next.done)
	defer func() {
		if p := recover(); p != nil {
			next.err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	ctx, cancel := context.WithDeadline(context.Background(), next.deadline)
	defer cancel()
	timer := time.AfterFunc(longQuery, func() { b.takesLong(next) })
	defer b.endQuery(next, timer)
	next.result, next.err = b.query(ctx, next.keys)
}

// takesLong notes that the query of a batch takes long, so that the next one starts.
func (b *batcher[K, V]) takesLong(of *batch[K, V]) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !of.ended {
		of.overdue = true
		b.overdue++
		b.start()
	}
}

// endQuery notes that the query of a batch has ended.
func (b *batcher[K, V]) endQuery(of *batch[K, V], timer *time.Timer) {
	timer.Stop()
	b.mu.Lock()
	defer b.mu.Unlock()
	of.ended = true
	if of.overdue {
		b.overdue--
	}
}
