package main

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// ready is the answer of readyz.
func (s *shop) ready() answer {
	s.t.Helper()
	return s.call("", "GET", "/readyz", nil)
}

// newImpUID is one that the gateway does not know, nor any test.
func newImpUID() string { return fmt.Sprintf("imp_%012d", ids.Add(1)) }

const gatewayDown = `"gateway":"not answering"`

func TestReadyWithoutAGateway(t *testing.T) {
	s := newShop(t)
	_, impUID, _ := s.paid(buyerA)
	s.order(buyerB, s.painting(99000))
	if a := s.want(s.ready(), 200, ""); a.body != `{"database":"ok","reconciler":"ok","gateway":"ok"}` {
		t.Fatalf("answered %s", a.body)
	}
	// Whoever notices the silence, it is said until somebody gets an answer.
	for name, ask := range map[string]func(){
		"a browser's report": func() { s.report(impUID) },
		"a notice":           func() { s.notice(impUID) },
		"the reconciler":     func() { s.later(s.config.hold) }, // for an order of buyerB's
	} {
		s.fake.setFaults(func(string, string) fault { return fault{before: answer500} })
		ask()
		if a := s.want(s.ready(), 200, ""); !strings.Contains(a.body, gatewayDown) {
			t.Errorf("%s: %s", name, a.body)
		}
		s.fake.setFaults(nil)
		s.report(newImpUID()) // that there is none is an answer
		if a := s.want(s.ready(), 200, ""); strings.Contains(a.body, gatewayDown) {
			t.Errorf("after %s: %s", name, a.body)
		}
	}
}

func TestNotReadyWithAHangingDatabase(t *testing.T) {
	s := newShop(t)
	conn, err := pgx.Connect(t.Context(), s.config.databaseURL)
	check(t, err)
	defer conn.Close(context.Background())
	_, err = conn.Exec(t.Context(), `BEGIN; LOCK TABLE schema_steps`)
	check(t, err)
	if a := s.want(s.ready(), 503, ""); !strings.Contains(a.body, `"database":"not answering"`) {
		t.Errorf("answered %s", a.body)
	}
	s.want(s.call("", "GET", "/healthz", nil), 200, "")
	_, err = conn.Exec(t.Context(), `COMMIT`)
	check(t, err)
	s.want(s.ready(), 200, "")
}

func TestNotReadyWithAnOlderSchema(t *testing.T) {
	s := newShop(t)
	execSQL(t, s.config.databaseURL, `INSERT INTO schema_steps SELECT max(step) + 1 FROM schema_steps`) // a newer program's
	s.want(s.ready(), 200, "")
	execSQL(t, s.config.databaseURL, `DELETE FROM schema_steps WHERE step > 1`)
	if a := s.want(s.ready(), 503, ""); !strings.Contains(a.body, "schema older") {
		t.Errorf("answered %s", a.body)
	}
}

func TestNotReadyWithAStuckReconciler(t *testing.T) {
	s := newShop(t)
	s.clock.advance(10 * s.config.reconcile)
	s.want(s.ready(), 200, "")
	s.clock.advance(time.Second)
	if a := s.want(s.ready(), 503, ""); !strings.Contains(a.body, "ten intervals") {
		t.Errorf("answered %s", a.body)
	}
	check(t, s.settler.reconcileRound(t.Context()))
	s.want(s.ready(), 200, "")
}

// A backlog is worked off round by round.
func TestRoundEnds(t *testing.T) {
	s := newShop(t)
	const orders = 3 * maxParallel
	for range orders {
		s.order(newTestID(), s.painting(99000))
	}
	s.clock.advance(s.config.hold)
	s.fake.setFaults(func(string, string) fault { s.clock.advance(s.config.reconcile); return fault{} })
	for round := 1; round <= 3; round++ {
		check(t, s.settler.reconcileRound(t.Context()))
		if n := s.fake.calls("findAll"); n != round*maxParallel {
			t.Errorf("after round %d the gateway was asked about %d orders", round, n)
		}
	}
}

func TestGatewayTroubleIsLoggedOnce(t *testing.T) {
	s := newShop(t)
	// ask has the gateway answer a report, or not, a second after the one before.
	ask := func(answers bool) {
		s.clock.advance(time.Second)
		if !answers {
			s.fake.faultOnce("payment", fault{before: answer500})
		}
		s.report(newImpUID())
	}
	lines := func() (begun, ended int) {
		logged := s.logged.String()
		return strings.Count(logged, "the gateway does not answer"), strings.Count(logged, "the gateway answers again")
	}
	ask(true)
	for range 5 {
		ask(false)
	}
	ask(true)
	if begun, ended := lines(); begun != 1 || ended != 1 || !strings.Contains(s.logged.String(), `"seconds":5,"failed":5`) {
		t.Fatalf("%d begun, %d ended:\n%s", begun, ended, s.logged)
	}
	for i := range 120 { // two minutes in which every other call fails
		ask(i%2 == 0)
	}
	if begun, ended := lines(); begun > 3 || ended > 3 {
		t.Errorf("%d begun, %d ended", begun, ended)
	}
}
