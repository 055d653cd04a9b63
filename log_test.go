package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
)

// lines are the log's lines with this message.
func (s *shop) lines(msg string) (lines []map[string]any) {
	s.t.Helper()
	for text := range strings.Lines(s.logged.String()) {
		var line map[string]any
		check(s.t, json.Unmarshal([]byte(text), &line))
		if line["msg"] == msg {
			lines = append(lines, line)
		}
	}
	return lines
}

// movements are the log's lines about money: of which payment, how much of it had gone back, from which state to which,
// and by which road.
func (s *shop) movements() (all []string) {
	for _, l := range s.lines("money") {
		all = append(all, fmt.Sprintf("%s %v/%v %s>%s %s", l["imp_uid"], l["refunded"], l["amount"], l["from"], l["to"], l["source"]))
	}
	return all
}

func TestEachMovementOfMoneyIsLoggedOnce(t *testing.T) {
	s := newShop(t)
	order, paid, _ := s.paid(buyerA)
	s.report(paid)
	s.notice(paid)
	forged := s.charge(s.order(buyerB, s.painting(99000)), 1000)
	s.report(forged)
	s.report(forged)
	duplicate := s.charge(order, 109000)
	s.notice(duplicate)
	check(t, s.fake.refundInConsole(paid, 9000))
	s.notice(paid)
	s.notice(paid)
	s.fake.faultOnce("cancel", fault{before: answerRefusal(-1, "거절")})
	s.call(buyerA, "DELETE", "/api/orders/"+order, nil)
	s.later(time.Minute)
	s.later(time.Minute)
	console, gone, _ := s.paid(buyerA)
	check(t, s.fake.refundInConsole(gone, 0))
	s.notice(gone)
	s.order(buyerB, s.painting(99000))
	s.later(s.config.hold) // ends without money

	want := []string{
		paid + " 0/109000 unknown>kept buyer",
		forged + " 0/1000 unknown>refunding buyer", forged + " 1000/1000 refunding>refunded buyer",
		duplicate + " 0/109000 unknown>refunding gateway", duplicate + " 109000/109000 refunding>refunded gateway",
		paid + " 9000/109000 kept>kept gateway",
		paid + " 9000/109000 kept>refunding buyer", paid + " 109000/109000 refunding>refunded reconciler",
		gone + " 0/109000 unknown>kept buyer", gone + " 109000/109000 kept>refunded gateway",
	}
	if got := s.movements(); !slices.Equal(got, want) {
		t.Errorf("logged\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, l := range s.lines("money") {
		if l["level"] != "INFO" || l["order"] == "" || (l["source"] != "reconciler") != (l["request"] != "") {
			t.Error(l)
		}
	}
	if s.lines("money")[9]["order"] != console {
		t.Errorf("of order %v, not %s", s.lines("money")[9]["order"], console)
	}
	if n := len(s.lines("refund failed")); n != 1 {
		t.Errorf("%d lines about the refusal of one refund", n)
	}
}

// Whoever comes first, the log has as many lines as the history has entries about money.
func TestMovementsAtOnceAreLoggedOnce(t *testing.T) {
	s := newShop(t)
	order := s.order(buyerA, s.painting(99000))
	for range 3 {
		s.charge(order, 109000)
	}
	all := s.fake.all()
	concurrently(24, func(i int) answer {
		if i%2 == 0 {
			return s.notice(all[i%3].ImpUID)
		}
		return s.report(all[i%3].ImpUID)
	})
	concurrently(8, func(int) answer { return s.call(buyerA, "DELETE", "/api/orders/"+order, nil) })
	count := map[string]int{}
	for _, l := range s.lines("money") {
		count[fmt.Sprint(l["imp_uid"], " ", l["to"])]++
	}
	if most := slices.Max(slices.Collect(maps.Values(count))); most != 1 || len(count) != 7 {
		t.Errorf("logged %v", count)
	}
	if n := queryText(t, s.config.databaseURL, `SELECT count(*) FROM history WHERE imp_uid IS NOT NULL`); n != fmt.Sprint(len(count)) {
		t.Errorf("%s entries in the history, %d in the log", n, len(count))
	}
}

// A gateway that is away for hours is two lines in the log, however many refunds wait for it.
func TestRefundsThatWaitDoNotFloodTheLog(t *testing.T) {
	s := newShop(t)
	var orders []string
	for range 5 {
		order, _, _ := s.paid(newTestID())
		orders = append(orders, order)
	}
	s.fake.setFaults(func(string, string) fault { return fault{before: answer500} })
	for _, order := range orders {
		s.call(adminID, "DELETE", "/api/orders/"+order, nil)
	}
	for range 20 {
		s.later(10 * time.Minute)
	}
	s.fake.setFaults(nil)
	s.later(time.Hour)
	if n := strings.Count(s.logged.String(), `"level":"WARN"`); n != 0 || len(s.lines("the gateway answers again")) != 1 || len(s.lines("the gateway does not answer; payments, refunds and expiries wait")) != 1 {
		t.Errorf("%d warnings:\n%s", n, s.logged)
	}
	if n := len(s.movements()); n != 3*len(orders) {
		t.Errorf("%d movements logged", n)
	}
}

func TestLogLevel(t *testing.T) {
	for level, want := range map[slog.Level][]string{
		slog.LevelDebug: {"serving", "gateway", "request", "money"},
		slog.LevelInfo:  {"serving", "request", "money"},
		slog.LevelWarn:  nil,
	} {
		var logged bytes.Buffer
		s := newShop(t)
		s.log = newLog(config{logLevel: level}, &logged)
		s.settler.log = s.log
		s.log.Info("serving")
		s.paid(buyerA)
		s.logged = &logged
		for _, msg := range []string{"serving", "gateway", "request", "money"} {
			if got := len(s.lines(msg)) > 0; got != slices.Contains(want, msg) {
				t.Errorf("at %v: %s is logged: %v", level, msg, got)
			}
		}
	}
}
