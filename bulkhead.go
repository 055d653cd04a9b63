package main

import (
	"context"
	"slices"
	"sync"
)

// bulkhead bounds how many changes are in the database at once, in all and of each row. A change that waits for a lock has a
// connection meanwhile, and those that wait must not have them all. Before it, a change waits without one.
//
// A bulkhead is safe for concurrent use.
type bulkhead struct {
	places chan struct{} // one for each change in the database
	mu     sync.Mutex    // guards what follows, and the fields of lines
	lines  map[string]*line
}

// line is the changes of one row: a few are in the database, the others wait.
type line struct {
	places chan struct{} // one for each change in the database
	length int
	locked chan struct{} // closed once a change has found the row locked by another session
	err    error         // of that change
}

// changesPerRow is how many changes of one row are in the database at once. Each waits for the one before it, so more would
// only keep connections.
const changesPerRow = 4

// newBulkhead returns a bulkhead to a database with so many connections. It keeps a quarter of them for reads.
func newBulkhead(connections int) *bulkhead {
	return &bulkhead{places: make(chan struct{}, connections-connections/4), lines: map[string]*line{}}
}

// pass calls change when there is room for one more change of rows, and returns its error. When change did not get a lock,
// those that wait for the same rows get its error too: they would wait as long for nothing.
func (b *bulkhead) pass(ctx context.Context, rows []string, change func() error) error {
	rows = slices.Compact(slices.Sorted(slices.Values(rows))) // in one order, so that no two callers wait for each other
	lines := make([]*line, 0, len(rows))                      // those entered
	defer func() {
		for i, l := range lines {
			<-l.places
			b.leave(rows[i], l)
		}
	}()
	for _, row := range rows {
		l := b.join(row)
		if err := l.enter(ctx); err != nil {
			b.leave(row, l)
			return err
		}
		lines = append(lines, l)
	}
	select {
	case b.places <- struct{}{}:
		defer func() { <-b.places }()
	case <-ctx.Done():
		return ctx.Err()
	}
	err := change()
	if lockedOut(err) {
		for i, l := range lines {
			b.dissolve(rows[i], l, err)
		}
	}
	return err
}

// join adds a change to the line of row.
func (b *bulkhead) join(row string) *line {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := b.lines[row]
	if l == nil {
		l = &line{places: make(chan struct{}, changesPerRow), locked: make(chan struct{})}
		b.lines[row] = l
	}
	l.length++
	return l
}

// leave takes a change out of l.
func (b *bulkhead) leave(row string, l *line) {
	b.mu.Lock()
	defer b.mu.Unlock()
	l.length--
	if l.length == 0 && b.lines[row] == l {
		delete(b.lines, row)
	}
}

// enter waits for a place in the database.
func (l *line) enter(ctx context.Context) error {
	select {
	case l.places <- struct{}{}:
		return nil
	case <-l.locked:
		return l.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// dissolve gives err to all that wait in l. The next change of row begins a new line.
func (b *bulkhead) dissolve(row string, l *line, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.lines[row] == l {
		delete(b.lines, row)
		l.err = err
		close(l.locked)
	}
}
