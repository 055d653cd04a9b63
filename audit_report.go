package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
)

// mismatch is a line of the audit.
type mismatch struct {
	Order    string    `json:"order"`
	ImpUID   string    `json:"imp_uid,omitempty"`
	Painting string    `json:"painting,omitempty"`
	Amount   int64     `json:"amount,omitempty"` // won that are concerned
	Kind     string    `json:"kind"`
	Meaning  string    `json:"meaning"`
	Remedy   string    `json:"remedy"`
	Due      *auditDue `json:"due,omitempty"` // of a refund
}

// auditDue is how a refund goes.
type auditDue struct {
	Since     jsonTime `json:"since"`
	Attempts  int      `json:"attempts"`
	LastError string   `json:"lastError,omitempty"`
}

// auditSum is one side's money, in won. What was paid back by hand went back in the ledger alone: to the gateway it is kept.
type auditSum struct {
	Taken    int64 `json:"taken"`
	Refunded int64 `json:"refunded"`
	ByHand   int64 `json:"byHand,omitempty"`
	Kept     int64 `json:"kept"`
}

// auditReport is what the audit found.
type auditReport struct {
	Since      jsonTime   `json:"since"`
	At         jsonTime   `json:"at"`
	Orders     int        `json:"orders"`   // looked at
	Matching   int        `json:"matching"` // of them
	Gateway    auditSum   `json:"gateway"`
	Ledger     auditSum   `json:"books"` // the key is released
	Mismatches []mismatch `json:"mismatches"`
}

// add takes an order into the report. Money that came and went back without us is in neither side's sum.
func (r *auditReport) add(o auditedOrder) {
	if o.err != nil {
		o.mismatch(mismatchUnchecked, "", 0)
	}
	booked := map[string]bool{}
	for _, row := range o.ledger.payments {
		if o.err != nil {
			break // neither side is known
		}
		booked[row.impUID] = true
		r.Ledger.Taken += row.amount
		r.Ledger.Refunded += row.refunded - row.byHandAmount
		r.Ledger.ByHand += row.byHandAmount
		if row.state == stateKept {
			r.Ledger.Kept += row.amount - row.refunded
		}
	}
	for _, p := range o.there {
		if booked[p.impUID] || p.moved && !p.fullyRefunded {
			r.Gateway.Taken += p.amount
			r.Gateway.Refunded += p.cancelled
			r.Gateway.Kept += p.amount - p.cancelled
		}
	}
	r.Orders++
	if len(o.mismatches) == 0 {
		r.Matching++
	}
	r.Mismatches = append(r.Mismatches, o.mismatches...)
}

// tell writes text's result every while, on one line of w, until stop is called.
func tell(w io.Writer, every time.Duration, text func() string) (stop func()) {
	ticker, stopped, told := time.NewTicker(every), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(told)
		end := ""
		for {
			select {
			case <-ticker.C:
				io.WriteString(w, "\r"+text())
				end = "\n"
			case <-stopped:
				io.WriteString(w, end)
				return
			}
		}
	}()
	return func() {
		ticker.Stop()
		close(stopped)
		<-told
	}
}

// errUnbalanced says that the audit found what does not match.
var errUnbalanced = errors.New("ledger and gateway do not balance")

// auditCommand prints the audit of the orders made or changed within the time before now. It returns errUnbalanced when
// something does not match, and another error when that could not be found out.
func auditCommand(ctx context.Context, c config, within time.Duration, asJSON bool, out, errOut io.Writer) error {
	if within <= 0 {
		return errors.New("-since must be a duration such as 24h")
	}
	return withStore(ctx, &c, (*store).checkSchema, func(store *store) error {
		a := &auditor{store: store, gateways: newGateways(c, time.Now, nil, nil), now: time.Now, progress: errOut, progressEvery: time.Second,
			pause: func(ctx context.Context) error { return pause(ctx, auditPause) }}
		report, problem := a.audit(ctx, a.now().Add(-within))
		if err := report.print(out, asJSON); err != nil {
			return err
		}
		if problem != nil {
			return fmt.Errorf("the audit was not finished: %w", problem)
		}
		if n := len(report.Mismatches); n > 0 {
			return fmt.Errorf("%w; mismatches: %d", errUnbalanced, n)
		}
		return nil
	})
}

// print writes the report as a table or as JSON.
func (r auditReport) print(out io.Writer, asJSON bool) error {
	var text strings.Builder
	if asJSON {
		encoder := json.NewEncoder(&text)
		encoder.SetIndent("", "  ")
		if err := encoder.Encode(r); err != nil {
			return err
		}
	} else {
		r.table(&text)
	}
	_, err := io.WriteString(out, text.String())
	return err
}

func (r auditReport) table(out *strings.Builder) {
	const line = "%-24s  %-24s  %13s  %s\n"
	if len(r.Mismatches) > 0 {
		fmt.Fprintf(out, line, "order", "payment or painting", "won", "mismatch")
	}
	for _, m := range r.Mismatches {
		fmt.Fprintf(out, line, m.Order, m.ImpUID+m.Painting, grouped(m.Amount), m.Kind)
		if m.Due != nil {
			fmt.Fprintf(out, "    due for %v, %d attempts; last error: %s\n", time.Time(r.At).Sub(time.Time(m.Due.Since)).Round(time.Second),
				m.Due.Attempts, m.Due.LastError)
		}
		fmt.Fprintf(out, "    %s; %s\n", m.Meaning, m.Remedy)
	}
	if len(r.Mismatches) > 0 {
		fmt.Fprintln(out)
	}
	fmt.Fprintf(out, "%-8s  %15s  %15s\n", "won", "gateway", "ledger")
	for _, row := range []struct {
		name            string
		gateway, ledger int64
	}{
		{"taken", r.Gateway.Taken, r.Ledger.Taken},
		{"refunded", r.Gateway.Refunded, r.Ledger.Refunded},
		{"by hand", r.Gateway.ByHand, r.Ledger.ByHand},
		{"kept", r.Gateway.Kept, r.Ledger.Kept},
	} {
		fmt.Fprintf(out, "%-8s  %15s  %15s\n", row.name, grouped(row.gateway), grouped(row.ledger))
	}
	since, _ := r.Since.MarshalText()
	fmt.Fprintf(out, "%d of %d orders made or changed since %s match\n", r.Matching, r.Orders, since)
}

// grouped is won with a comma before every third digit, and nothing for none.
func grouped(won int64) string {
	digits := strconv.FormatInt(won, 10)
	for i := len(digits) - 3; i > 0 && digits[i-1] != '-'; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}
