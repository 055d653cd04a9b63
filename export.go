package main

import (
	"bufio"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// korea is the time zone of the shop's days. Korea has had no summer time since 1988.
var korea = time.FixedZone("Asia/Seoul", 9*60*60)

// exportCommand writes to out, as CSV, what happened on the days from the first to the last, both included: a line for each
// movement of money, or for each painting sold.
func exportCommand(ctx context.Context, c config, first, last, by string, out, errOut io.Writer) error {
	from, fromErr := time.ParseInLocation(time.DateOnly, first, korea)
	to, toErr := time.ParseInLocation(time.DateOnly, last, korea)
	switch {
	case fromErr != nil:
		return errors.New("-from must be a day such as 2026-11-01")
	case toErr != nil || to.Before(from):
		return errors.New("-to must be a day such as 2026-11-30, and not before -from")
	case by != "movement" && by != "painting":
		return errors.New("-by must be movement or painting")
	}
	return withStore(ctx, &c, (*store).checkSchema, func(store *store) error {
		e := newExporter(out)
		if isTerminal(errOut) && !isTerminal(out) {
			defer tell(errOut, time.Second, func() string { return fmt.Sprintf("%d lines", e.lines.Load()) })()
		}
		write := e.movements
		if by == "painting" {
			write = e.paintings
		}
		if err := write(ctx, store, from, to.AddDate(0, 0, 1)); err != nil {
			return fmt.Errorf("the export is not whole: %w", err)
		}
		return nil
	})
}

// isTerminal reports whether a person may be looking at w.
func isTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// exporter writes lines of CSV that Excel opens with Korean intact: it takes a byte order mark for UTF-8.
type exporter struct {
	csv   *csv.Writer
	lines atomic.Int64
}

func newExporter(out io.Writer) *exporter {
	buffered := bufio.NewWriterSize(out, 64<<10)
	buffered.WriteString("\ufeff") // an error stays, and is that of the lines
	return &exporter{csv: csv.NewWriter(buffered)}
}

// movements writes a line for each movement of money.
func (e *exporter) movements(ctx context.Context, store *store, from, to time.Time) error {
	return e.table("day,time,order,number,gateway,payment,kind,won", func() error {
		return store.eachMovement(ctx, from, to, func(m movement) error {
			at := m.at.In(korea)
			return e.line(at.Format(time.DateOnly), at.Format(time.TimeOnly), m.order, cell(m.number), m.gateway, cell(m.payID), m.kind, won(m.won))
		})
	})
}

// paintings writes a line for each painting of the orders that were paid.
func (e *exporter) paintings(ctx context.Context, store *store, from, to time.Time) error {
	return e.table("order,number,product,artist,title,price,paid,shipped,delivered,state", func() error {
		return store.eachSoldPainting(ctx, from, to, func(p soldPainting) error {
			return e.line(p.order, cell(p.number), p.product, cell(p.artist), cell(p.title), won(p.price),
				day(p.paid), dayOrNone(p.shipped), dayOrNone(p.delivered), statusNames[p.status])
		})
	})
}

// statusNames are the words for the statuses of a paid order. The history has the same.
var statusNames = []string{"paid", "preparing", "shipping", "delivered", "return requested", "cancelled"}

// table writes the header and what lines writes.
func (e *exporter) table(header string, lines func() error) error {
	if err := e.csv.Write(strings.Split(header, ",")); err != nil {
		return err
	}
	if err := lines(); err != nil {
		return err
	}
	e.csv.Flush()
	return e.csv.Error()
}

func (e *exporter) line(fields ...string) error {
	e.lines.Add(1)
	return e.csv.Write(fields)
}

// cell returns a text so that no spreadsheet takes it for a formula.
func cell(text string) string {
	if text != "" && strings.ContainsRune("=+-@\t\r", rune(text[0])) {
		return "'" + text
	}
	return text
}

func won(n int64) string { return strconv.FormatInt(n, 10) }

// day returns the day of a time in Korea.
func day(at time.Time) string { return at.In(korea).Format(time.DateOnly) }

func dayOrNone(at *time.Time) string {
	if at == nil {
		return ""
	}
	return day(*at)
}
