package main

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"time"
)

// batcher lets calls that arrive together share one query: while a query runs, the next callers' keys collect, and the
// moment it returns they go out as one. A lone caller waits for nothing, nothing is cached, and no answer is older
// than its question, since a query never takes keys after it has started.
type batcher[K comparable, V any] struct {
	query   func(context.Context, []K) (map[K]V, error)
	mu      sync.Mutex
	running bool
	waiting []*batch[K, V]
}

// batch is one query under way or about to be, and its answer once done is closed.
type batch[K comparable, V any] struct {
	keys   []K
	until  time.Time // it gives up then, and with it whoever waits, however long the flights before it took
	done   chan struct{}
	answer map[K]V
	err    error
}

// maxBatchKeys bounds the keys of one query, so that no caller waits for a crowd's worth of rows.
const maxBatchKeys = 1000

func newBatcher[K comparable, V any](query func(context.Context, []K) (map[K]V, error)) *batcher[K, V] {
	return &batcher[K, V]{query: query}
}

// get answers the values of keys; an unknown key is missing from the map, which is shared and must not be changed.
// A caller that goes away leaves the others' query alone. An error is everybody's who shares the query, so keys must be
// checked before: none may be one that the database refuses.
func (g *batcher[K, V]) get(ctx context.Context, keys ...K) (map[K]V, error) {
	g.mu.Lock()
	var f *batch[K, V]
	if n := len(g.waiting); n > 0 && len(g.waiting[n-1].keys)+len(keys) <= maxBatchKeys {
		f = g.waiting[n-1]
	} else {
		f = &batch[K, V]{until: time.Now().Add(dbTimeout), done: make(chan struct{})}
		g.waiting = append(g.waiting, f)
	}
	f.keys = append(f.keys, keys...)
	if !g.running {
		g.running = true
		go g.run()
	}
	g.mu.Unlock()
	select {
	case <-f.done:
		return f.answer, f.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// run sends out flights until none is waiting.
func (g *batcher[K, V]) run() {
	for {
		runtime.Gosched() // whoever is about to ask joins; nobody else waits
		g.mu.Lock()
		if len(g.waiting) == 0 {
			g.running = false
			g.mu.Unlock()
			return
		}
		f := g.waiting[0]
		g.waiting = g.waiting[1:]
		g.mu.Unlock()
		g.exec(f)
	}
}

// ask sends one flight's query and lets go of whoever waits for it, whatever happens.
func (g *batcher[K, V]) exec(f *batch[K, V]) {
	defer close(f.done)
	defer func() {
		if p := recover(); p != nil {
			f.err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	ctx, cancel := context.WithDeadline(context.Background(), f.until)
	defer cancel()
	f.answer, f.err = g.query(ctx, f.keys)
}
