package main

import (
	"context"
	"slices"
	"sync"
)

// gate bounds how many changes are in the database at once, in all and of each row. A change that waits for a lock has a
// connection meanwhile, and those that wait must not have them all. At the gate a change waits without one.
//
// A gate is safe for concurrent use.
type gate struct {
	places chan struct{} // one for each change in the database
	mu     sync.Mutex    // guards what follows, and the fields of lines
	lines  map[string]*line
}

// line is the changes of one row: a few are in the database, the others wait.
type line struct {
	places chan struct{} // one for each change in the database
	length int
	locked chan struct{} // closed once a change has found the row locked by somebody else
	err    error         // of that change
}

// changesPerRow is how many changes of one row are in the database at once. Each waits for the one before it, so more would
// only keep connections.
const changesPerRow = 4

// newGate returns a gate to a database with so many connections. It keeps a quarter of them for reads.
func newGate(connections int) *gate {
	return &gate{places: make(chan struct{}, connections-connections/4), lines: map[string]*line{}}
}

// pass calls change when there is room for one more change of rows, and returns its error. When change did not get a lock,
// those that wait for the same rows get its error too: they would wait as long for nothing.
func (g *gate) pass(ctx context.Context, rows []string, change func() error) error {
	rows = slices.Compact(slices.Sorted(slices.Values(rows))) // in one order, so that no two callers wait for each other
	lines := make([]*line, len(rows))
	for i, row := range rows {
		lines[i] = g.join(row)
		defer g.leave(row, lines[i])
		if err := lines[i].enter(ctx); err != nil {
			return err
		}
		defer func() { <-lines[i].places }()
	}
	select {
	case g.places <- struct{}{}:
		defer func() { <-g.places }()
	case <-ctx.Done():
		return ctx.Err()
	}
	err := change()
	if lockedOut(err) {
		for i, row := range rows {
			g.dissolve(row, lines[i], err)
		}
	}
	return err
}

// join adds a change to the line of row.
func (g *gate) join(row string) *line {
	g.mu.Lock()
	defer g.mu.Unlock()
	l := g.lines[row]
	if l == nil {
		l = &line{places: make(chan struct{}, changesPerRow), locked: make(chan struct{})}
		g.lines[row] = l
	}
	l.length++
	return l
}

// leave takes a change out of l.
func (g *gate) leave(row string, l *line) {
	g.mu.Lock()
	defer g.mu.Unlock()
	l.length--
	if l.length == 0 && g.lines[row] == l {
		delete(g.lines, row)
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
func (g *gate) dissolve(row string, l *line, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.lines[row] == l {
		delete(g.lines, row)
		l.err = err
		close(l.locked)
	}
}
