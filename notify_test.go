package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// notifyTestKey is the key of the tests' notifications, notifyTestSecret its NOTIFY_SECRET.
const notifyTestKey = "a key of thirty-two bytes, or so"

var notifyTestSecret = notifySecretPrefix + base64.StdEncoding.EncodeToString([]byte(notifyTestKey))

// delivery is a notification as a listener got it.
type delivery struct {
	id, body  string
	Type      string
	Timestamp time.Time
	Data      struct {
		Order, Number string
		Status, From  *int
		Payment       string
		Won           *int64
	}
}

// String is the delivery as the tests compare it: type, from, status, won.
func (d delivery) String() string {
	text := d.Type
	if d.Data.Status != nil {
		from := "-"
		if d.Data.From != nil {
			from = fmt.Sprint(*d.Data.From)
		}
		text += fmt.Sprintf(" %s>%d", from, *d.Data.Status)
	}
	if d.Data.Payment != "" {
		text += fmt.Sprintf(" %s %d", d.Data.Payment, *d.Data.Won)
	}
	return text
}

// listener is a system of the shop that gets notifications, and holds each against its signature and openapi.json.
type listener struct {
	t       testing.TB
	address *url.URL
	mu      sync.Mutex
	got     []delivery
	answer  func(http.ResponseWriter, delivery) int // the status; nil: always 204
}

// secretPath is the path of each listener's address.
const secretPath = "/hook/path-that-is-secret"

func newListener(t testing.TB) *listener {
	t.Helper()
	l := &listener{t: t}
	server := httptest.NewServer(l)
	t.Cleanup(server.Close)
	var err error
	l.address, err = url.Parse(server.URL + secretPath)
	check(t, err)
	return l
}

func (l *listener) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	d := delivery{id: r.Header.Get("webhook-id"), body: string(body)}
	if err := json.Unmarshal(body, &d); err != nil || r.Method != "POST" || r.URL.Path != secretPath {
		l.t.Errorf("%s %s %s: %v", r.Method, r.URL, body, err)
	}
	mac := hmac.New(sha256.New, []byte(notifyTestKey))
	fmt.Fprintf(mac, "%s.%s.%s", d.id, r.Header.Get("webhook-timestamp"), body)
	if want := "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil)); r.Header.Get("webhook-signature") != want {
		l.t.Errorf("signature %q, want %q", r.Header.Get("webhook-signature"), want)
	}
	l.mu.Lock()
	l.got = append(l.got, d)
	answer := l.answer
	l.mu.Unlock()
	status := http.StatusNoContent
	if answer != nil {
		status = answer(w, d)
	}
	for _, problem := range theAPI().notified(r, body, status) {
		l.t.Errorf("openapi.json: notification %s: %s", body, problem)
	}
	w.WriteHeader(status)
}

// answers sets how the listener answers from now on.
func (l *listener) answers(answer func(http.ResponseWriter, delivery) int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answer = answer
}

// always is the answer with a status.
func always(status int) func(http.ResponseWriter, delivery) int {
	return func(http.ResponseWriter, delivery) int { return status }
}

// take returns what the listener got since the last take.
func (l *listener) take() (got []delivery) {
	l.mu.Lock()
	defer l.mu.Unlock()
	got, l.got = l.got, nil
	return got
}

// want fails unless the listener got these since the last take.
func (l *listener) want(want ...string) {
	l.t.Helper()
	var got []string
	for _, d := range l.take() {
		got = append(got, d.String())
	}
	if !slices.Equal(got, want) {
		l.t.Fatalf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// withListeners configures a shop to notify these.
func withListeners(listeners ...*listener) func(*config) {
	return func(c *config) {
		c.notifyKey = []byte(notifyTestKey)
		for _, l := range listeners {
			c.notifyURLs = append(c.notifyURLs, l.address)
		}
	}
}

// newNotifyingShop opens a shop that notifies these listeners.
func newNotifyingShop(t testing.TB, listeners ...*listener) *shop {
	t.Helper()
	s := newShop(t, withListeners(listeners...))
	t.Cleanup(s.notifier.transport.(*http.Transport).CloseIdleConnections)
	s.keepTargets()
	return s
}

// keepTargets does what the notifier does at start and each hour.
func (s *shop) keepTargets() {
	s.t.Helper()
	check(s.t, s.store.keepNotifyTargets(s.t.Context(), s.notifier.targets(), s.clock.Now(), notifyTries, notifyWaitAtMost))
}

// notify sends what is due to each address, one after the other.
func (s *shop) notify() {
	s.t.Helper()
	for _, a := range s.notifier.addresses {
		for !a.gone.Load() {
			next, err := s.notifier.claim(s.t.Context(), a)
			check(s.t, err)
			if next == nil {
				break
			}
			s.notifier.attempt(s.t.Context(), a, next)
		}
	}
}

// history is the number of rows of the history.
func (s *shop) historyRows() string {
	return queryText(s.t, s.config.databaseURL, `SELECT count(*)::text FROM history`)
}

// wantQueued fails unless so many notifications wait.
func (s *shop) wantQueued(n int) {
	s.t.Helper()
	if got := queryText(s.t, s.config.databaseURL, `SELECT count(*)::text FROM notifications`); got != fmt.Sprint(n) {
		s.t.Fatalf("%s notifications wait, want %d", got, n)
	}
}

// Each row of the history is told once, in its order, and says nothing that a person wrote.
func TestNotificationsTellTheHistory(t *testing.T) {
	l := newListener(t)
	s := newNotifyingShop(t, l)
	order, impUID, _ := s.orderAt(statusReturning)
	s.want(s.call(adminID, "DELETE", "/api/orders/"+order, nil), 200, "")
	s.notify()
	all := l.take()
	var got []string
	ids := map[string]bool{}
	for _, d := range all {
		got = append(got, d.String())
		ids[d.id] = true
		if d.Data.Order != order {
			t.Errorf("%s: order %s", d.body, d.Data.Order)
		}
		for _, word := range []string{"홍길동", "example.com", "010-", "어느시", "문 앞", adminID, buyerA} {
			if strings.Contains(d.body, word) {
				t.Errorf("%s says %s", d.body, word)
			}
		}
	}
	payment := " " + impUID + " 109000"
	want := []string{"order.created ->-1", "order.paid -1>0", "payment.kept" + payment, "order.preparing 0>1", "order.shipping 1>2", "order.delivered 2>3",
		"order.return_requested 3>4", "order.cancel_requested 4>4", "payment.refunding" + payment, "order.cancelled 4>5", "payment.refunded" + payment}
	slices.Sort(got) // in its order: see below
	if slices.Sort(want); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if len(ids) != len(all) || fmt.Sprint(len(all)) != s.historyRows() {
		t.Errorf("%d notifications with %d ids of %s rows", len(all), len(ids), s.historyRows())
	}
	rows, err := s.store.historyOf(t.Context(), order, caller{id: adminID, admin: true})
	check(t, err)
	for i, row := range rows {
		if all[i].Type != notifyType(row) || !all[i].Timestamp.Equal(row.at.Truncate(time.Millisecond)) {
			t.Errorf("notification %d is %s, the history's row is %+v", i, all[i].body, row)
		}
	}
	s.notify()
	l.want()
	s.wantQueued(0)

	// The ends of unpaid orders, a revival, and refunds that are not whole or not by the gateway.
	unpaid := s.order(buyerA, s.painting(99000))
	replacing := s.order(buyerA, s.painting(99000))
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+replacing, nil), 200, "")
	offSale := s.painting(99000)
	s.order(buyerA, offSale)
	s.want(s.call(adminID, "PATCH", "/api/products/"+offSale, map[string]bool{"forSale": false}), 200, "")
	late := s.order(buyerB, s.painting(99000))
	s.later(31 * time.Minute)
	s.want(s.report(s.charge(late, 109000)), 200, "")
	stuck, stuckImpUID := s.stuckRefund(buyerA)
	s.want(s.call(adminID, "POST", "/api/orders/"+stuck+"/refund", map[string]any{"imp_uid": stuckImpUID, "byHand": "홍길동 계좌로"}), 200, "")
	s.notify()
	told := map[string]bool{}
	for _, d := range l.take() {
		told[d.Type] = true
		if strings.Contains(d.body, "홍길동") {
			t.Errorf("%s has a person's text", d.body)
		}
		if d.Type == "order.replaced" && d.Data.Order != unpaid {
			t.Errorf("%s replaced", d.Data.Order)
		}
	}
	for _, kind := range []string{"order.replaced", "order.deleted", "order.withdrawn", "order.expired", "order.revived", "payment.refunded_by_hand"} {
		if !told[kind] {
			t.Errorf("no %s among %v", kind, slices.Sorted(maps.Keys(told)))
		}
	}
	if told[notifyOrderChanged] || told[notifyPaymentChanged] {
		t.Errorf("a row of the history has no type: %v", told)
	}
	s.wantQueued(0)
}

// historyTypes are the types of the rows of an order's history, in its order.
func (s *shop) historyTypes(order string) (types []string) {
	s.t.Helper()
	rows, err := s.store.historyOf(s.t.Context(), order, caller{id: adminID, admin: true})
	check(s.t, err)
	for _, row := range rows {
		types = append(types, notifyType(row))
	}
	return types
}

func TestNotificationTypes(t *testing.T) {
	for _, row := range []struct {
		why, impUID, want string
	}{
		{"paid", "", "order.paid"},
		{"refunding: buyer cancelled", "imp_1", "payment.refunding"},
		{"refunded by hand: shop cancelled", "imp_1", "payment.refunded_by_hand"},
		{"of a later release", "", "order.changed"},
		{"of a later release: too", "imp_1", "payment.changed"},
	} {
		if got := notifyType(historyRow{why: row.why, impUID: row.impUID}); got != row.want {
			t.Errorf("%+v: %s", row, got)
		}
	}
	described := theAPI().Webhooks["notification"]["post"].Description
	for _, kind := range append(slices.Collect(maps.Values(notifyTypes)), notifyOrderChanged, notifyPaymentChanged, "notification.test") {
		if !strings.Contains(described, "`"+kind+"`") {
			t.Errorf("openapi.json does not describe %s", kind)
		}
	}
}

// A notification that fails is tried again with its id after growing pauses. The rest of its order waits for it; other orders
// and other addresses do not. After three days it is given up.
func TestNotificationsThatFail(t *testing.T) {
	l, other := newListener(t), newListener(t)
	s := newNotifyingShop(t, l, other)
	stuck, fine := s.order(buyerA, s.painting(99000)), s.order(buyerB, s.painting(99000))
	s.want(s.report(s.charge(stuck, 109000)), 200, "")
	fails := map[string]func(http.ResponseWriter, delivery) int{
		"500": always(500), "400": always(400), "404": always(404), "304": always(304),
		"302": func(w http.ResponseWriter, _ delivery) int {
			w.Header().Set("Location", other.address.String())
			return http.StatusFound
		},
		"302 to nowhere": func(w http.ResponseWriter, _ delivery) int {
			w.Header().Set("Location", "https://\x7f"+secretPath)
			return http.StatusFound
		},
		"an end": func(http.ResponseWriter, delivery) int { panic(http.ErrAbortHandler) },
		"no HTTP": func(w http.ResponseWriter, _ delivery) int {
			connection, _, err := http.NewResponseController(w).Hijack()
			check(t, err)
			io.WriteString(connection, secretPath+"\r\n\r\n")
			connection.Close()
			panic(http.ErrAbortHandler)
		},
	}
	names := slices.Sorted(maps.Keys(fails))
	failWith := func(name string) {
		l.answers(func(w http.ResponseWriter, d delivery) int {
			if d.Data.Order == stuck {
				return fails[name](w, d)
			}
			return 204
		})
	}
	failWith(names[0])
	s.notify()
	got := l.take()
	if len(got) != 2 || got[0].Data.Order != stuck || got[1].Data.Order != fine {
		t.Fatalf("got %v", got)
	}
	other.want("order.created ->-1", "order.created ->-1", "order.paid -1>0", "payment.kept "+queryText(t, s.config.databaseURL, `SELECT imp_uid FROM payments`)+" 109000")
	id := got[0].id
	began := s.clock.Now()
	wait := notifyFirstPause
	for n := 1; n < 12; n++ {
		name := names[n%len(names)]
		failWith(name)
		s.clock.advance(wait - time.Second)
		s.notify()
		l.want()
		s.clock.advance(time.Second)
		s.notify()
		if got := l.take(); len(got) != 1 || got[0].id != id {
			t.Fatalf("attempt %d (%s) after %v: %v", n+1, name, wait, got)
		}
		wait = min(2*wait, time.Hour)
	}
	other.want()
	s.wantQueued(3)
	s.scrape().want(t, parsedMetrics{"lumiere_notifications_given_up_total": 0})

	// For three days; then the next of the order has its turn, and three days of its own.
	for attempts := 12; ; attempts++ {
		s.clock.advance(time.Hour)
		s.notify()
		got := l.take()
		if len(got) == 0 || got[0].id != id || attempts > 100 {
			t.Fatalf("attempt %d: %v", attempts, got)
		}
		if len(got) == 2 {
			if got[1].Type != "order.paid" {
				t.Errorf("%s follows", got[1].Type)
			}
			break
		}
	}
	if tried := s.clock.Now().Sub(began); tried < notifyTries || tried > notifyTries+time.Hour {
		t.Errorf("given up %v later", tried)
	}
	s.wantQueued(2)
	s.scrape().want(t, parsedMetrics{"lumiere_notifications_given_up_total": 1})
	if f := s.scrape()["lumiere_notifications_oldest_seconds"]; f < notifyTries.Seconds() {
		t.Errorf("the oldest waits for %v seconds", f)
	}
	l.answers(nil)
	s.clock.advance(notifyFirstPause)
	s.notify()
	if got := l.take(); len(got) != 2 || got[0].Type != "order.paid" || got[1].Type != "payment.kept" {
		t.Errorf("the rest of the order: %v", got)
	}
	s.scrape().want(t, parsedMetrics{"lumiere_notifications_given_up_total": 1, "lumiere_notifications_oldest_seconds": 0})

	logged := s.logged.String()
	if strings.Contains(logged, "path-that-is-secret") || strings.Contains(logged, notifyTestKey) {
		t.Errorf("the log has a secret:\n%s", logged)
	}
	for _, line := range []string{"notification not delivered", "notification given up", "notifications are delivered again", l.address.Host} {
		if !strings.Contains(logged, line) {
			t.Errorf("the log lacks %q:\n%s", line, logged)
		}
	}
}

func TestNotifyPause(t *testing.T) {
	for failed, want := range map[int]time.Duration{0: 10 * time.Second, 1: 20 * time.Second, 8: 2560 * time.Second, 9: time.Hour, 1000: time.Hour} {
		if got := notifyPause(failed); got != want {
			t.Errorf("%d: %v, want %v", failed, got, want)
		}
	}
}

// An address that answers 410 gets nothing more until the next start, and then all.
func TestNotificationsEndWithGone(t *testing.T) {
	l, other := newListener(t), newListener(t)
	s := newNotifyingShop(t, l, other)
	l.answers(always(http.StatusGone))
	s.order(buyerA, s.painting(99000))
	s.order(buyerB, s.painting(99000))
	s.notify()
	l.want("order.created ->-1")
	other.want("order.created ->-1", "order.created ->-1")
	s.clock.advance(time.Hour)
	s.notify()
	l.want()
	if next := s.notifier.await(t.Context(), s.notifier.addresses[0]); next != nil {
		t.Errorf("its workers go on with %v", next)
	}
	l.answers(nil)
	s.server.notifier = newNotifier(s.config, s.store, s.log, s.now) // the next start
	s.notify()
	l.want("order.created ->-1", "order.created ->-1")
	s.wantQueued(0)
}

// A row that commits after one with a later id is told all the same.
func TestNotificationOfALateCommit(t *testing.T) {
	l := newListener(t)
	s := newNotifyingShop(t, l)
	first, second := s.order(buyerA, s.painting(99000)), s.order(buyerB, s.painting(99000))
	s.notify()
	l.take()
	write := func(order string) (tx pgx.Tx, id int64) {
		conn, err := pgx.Connect(t.Context(), s.config.databaseURL)
		check(t, err)
		t.Cleanup(func() { conn.Close(context.Background()) })
		tx, err = conn.Begin(t.Context())
		check(t, err)
		check(t, tx.QueryRow(t.Context(), `INSERT INTO history (order_id, at, why) VALUES ($1, $2, 'of a test') RETURNING id`,
			order, s.clock.Now()).Scan(&id))
		return tx, id
	}
	for _, orders := range [][2]string{{first, second}, {first, first}} {
		late, lower := write(orders[0])
		early, higher := write(orders[1])
		if lower >= higher {
			t.Fatalf("ids %d, %d", lower, higher)
		}
		check(t, early.Commit(t.Context()))
		s.notify()
		if got := l.take(); len(got) != 1 || !strings.HasPrefix(got[0].id, fmt.Sprintf("%s_%d_", orders[1], higher)) {
			t.Fatalf("got %v", got)
		}
		check(t, late.Commit(t.Context()))
		s.notify()
		if got := l.take(); len(got) != 1 || !strings.HasPrefix(got[0].id, fmt.Sprintf("%s_%d_", orders[0], lower)) {
			t.Fatalf("of the late one: %v", got)
		}
	}
	s.wantQueued(0)
}

// A notification is with one replica at a time, the next of its order waits meanwhile, and a replica that dies with one loses
// nothing.
func TestNotificationsAreLeased(t *testing.T) {
	l := newListener(t)
	s := newNotifyingShop(t, l)
	order, _, _ := s.paid(buyerA)
	a := s.notifier.addresses[0]
	claim := func() *queuedNotification {
		t.Helper()
		q, err := s.notifier.claim(t.Context(), a)
		check(t, err)
		return q
	}
	dead := claim()
	if dead == nil || dead.orderID != order || claim() != nil {
		t.Fatal("two replicas have an order's notifications")
	}
	s.clock.advance(notifyLease - time.Second)
	if claim() != nil {
		t.Fatal("the lease ended early")
	}
	s.clock.advance(time.Second)
	heir := claim()
	if heir == nil || heir.webhookID() != dead.webhookID() {
		t.Fatalf("%+v after %+v", heir, dead)
	}
	// What the dead one books after its lease changes nothing.
	check(t, s.store.postponeNotification(t.Context(), dead, s.clock.Now()))
	check(t, s.store.giveUpNotification(t.Context(), dead, s.clock.Now()))
	if claim() != nil {
		t.Fatal("a lease that had run out was booked")
	}
	s.scrape().want(t, parsedMetrics{"lumiere_notifications_given_up_total": 0})
	s.notifier.attempt(t.Context(), a, heir)
	s.notify()
	var types []string
	for _, d := range l.take() {
		types = append(types, d.Type)
	}
	if !slices.Equal(types, s.historyTypes(order)) {
		t.Errorf("got %v", types)
	}
}

// Several replicas at once tell each row once, an order's in order, while another address takes its connections and is silent.
func TestNotifiersTogether(t *testing.T) {
	l, silent := newListener(t), newListener(t)
	s := newNotifyingShop(t, silent, l)
	hangs := make(chan struct{})
	silent.answers(func(http.ResponseWriter, delivery) int { <-hangs; return 204 })
	defer close(hangs)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var running sync.WaitGroup
	for range 3 {
		n := newNotifier(s.config, s.store, s.log, s.now)
		running.Go(func() { n.run(ctx) })
	}
	var orders []string
	for range 12 {
		order := s.order(buyerA, s.painting(99000))
		s.clock.advance(time.Second) // of a change in the moment of the one before the history has the database's time
		s.want(s.report(s.charge(order, 109000)), 200, "")
		orders = append(orders, order)
	}
	waitUntil(t, "the listener gets all", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.got) >= 3*len(orders)
	})
	stop()
	running.Wait()
	got := map[string][]string{}
	for _, d := range l.take() {
		got[d.Data.Order] = append(got[d.Data.Order], d.Type)
	}
	for _, order := range orders {
		if want := s.historyTypes(order); !slices.Equal(got[order], want) {
			t.Errorf("got %v, want %v", got[order], want)
		}
	}
	if n := len(silent.take()); n == 0 {
		t.Error("the silent address was not asked")
	}
	s.wantQueued(3 * len(orders))
	if cut := queryText(t, s.config.databaseURL, `SELECT sum(attempts)::text FROM notifications`); cut != "0" {
		t.Errorf("%s attempts that a shutdown cut off are booked", cut)
	}
}

// An address takes part from the start that first has it, until no replica has had it for three days.
func TestNotifyTargets(t *testing.T) {
	l := newListener(t)
	s := newShop(t)
	s.order(buyerA, s.painting(99000))
	s.wantQueued(0) // nobody is told
	s.keepTargets()
	if n := queryText(t, s.config.databaseURL, `SELECT count(*)::text FROM notify_targets`); n != "0" {
		t.Errorf("%s targets", n)
	}

	without := s.server.notifier
	withListeners(l)(&s.config)
	s.server.notifier = newNotifier(s.config, s.store, s.log, s.now)
	s.keepTargets()
	s.notify()
	l.want()
	s.order(buyerB, s.painting(99000))
	s.notify()
	l.want("order.created ->-1")

	// A start without it forgets nothing for three days.
	with := s.server.notifier
	s.clock.advance(time.Second)
	s.order(buyerB, s.painting(99000)) // replaces the one before
	s.server.notifier = without
	s.clock.advance(notifyTries - time.Second)
	s.keepTargets()
	s.wantQueued(2)
	s.server.notifier = with
	s.keepTargets()
	s.notify()
	if got := l.take(); len(got) != 2 {
		t.Errorf("got %v", got)
	}
	s.clock.advance(time.Second)
	s.order(buyerB, s.painting(99000))
	s.wantQueued(2)
	s.server.notifier = without
	s.clock.advance(notifyTries + time.Second)
	s.keepTargets()
	s.wantQueued(0)

	// What an address never asks for is given up after a month.
	s.server.notifier = with
	s.keepTargets()
	s.order(buyerB, s.painting(99000))
	for range 11 {
		s.clock.advance(notifyTries - time.Second)
		s.keepTargets()
	}
	s.wantQueued(0)
	s.scrape().want(t, parsedMetrics{"lumiere_notifications_given_up_total": 2, "lumiere_notifications_oldest_seconds": 0})
}

func TestNotifyConfiguration(t *testing.T) {
	for _, row := range []struct {
		urls, secret string
		addresses    int
		problem      string // empty: none
	}{
		{"", "", 0, ""},
		{"https://hooks.example/secret-path, https://other.example/?token=1", notifyTestSecret, 2, ""},
		{"https://hooks.example/secret-path,https://hooks.example/secret-path,", notifyTestSecret, 1, ""},
		{"http://127.0.0.1:9000/secret-path,http://[::1]:9000,http://localhost:9000", notifyTestSecret, 3, ""},
		{"https://hooks.example/secret-path", "", 0, "NOTIFY_SECRET is not set"},
		{"", notifyTestSecret, 0, "NOTIFY_URL is not set"},
		{"http://hooks.example/secret-path", notifyTestSecret, 0, "NOTIFY_URL"},
		{"http://10.0.0.1/secret-path", notifyTestSecret, 0, "NOTIFY_URL"},
		{"hooks.example/secret-path", notifyTestSecret, 0, "NOTIFY_URL"},
		{"https://user:secret-path@hooks.example", notifyTestSecret, 0, "NOTIFY_URL"},
		{"https://hooks.example/secret-path%", notifyTestSecret, 0, "NOTIFY_URL"},
		{"https://hooks.example/secret-path", strings.TrimPrefix(notifyTestSecret, notifySecretPrefix), 0, "NOTIFY_SECRET"},
		{"https://hooks.example/secret-path", notifySecretPrefix, 0, "NOTIFY_SECRET"},
		{"https://hooks.example/secret-path", notifySecretPrefix + "secret-path", 0, "NOTIFY_SECRET"},
		{"https://hooks.example/secret-path", notifySecretPrefix + "c2hvcnQ=", 0, "NOTIFY_SECRET"},
	} {
		environment := map[string]string{"DATABASE_URL": "postgres://db", "JWT_SECRET": testSecret, "IAMPORT_KEY": "key", "IAMPORT_SECRET": "secret",
			"NOTIFY_URL": row.urls, "NOTIFY_SECRET": row.secret}
		c, err := readConfig(func(name string) string { return environment[name] }, "")
		switch {
		case row.problem == "" && (err != nil || len(c.notifyURLs) != row.addresses || row.addresses > 0 && string(c.notifyKey) != notifyTestKey):
			t.Errorf("%+v: %v, %v", row, c.notifyURLs, err)
		case row.problem != "" && (err == nil || !strings.Contains(err.Error(), row.problem) || strings.Contains(err.Error(), "secret-path")):
			t.Errorf("%+v: %v", row, err)
		}
	}
	// Local development tells this machine alone.
	environment := map[string]string{"LOCAL": "1", "NOTIFY_URL": "https://hooks.example,http://127.0.0.1:9000", "NOTIFY_SECRET": notifyTestSecret}
	c, err := readConfig(func(name string) string { return environment[name] }, "")
	if err != nil || len(c.notifyURLs) != 1 || c.notifyURLs[0].Hostname() != "127.0.0.1" {
		t.Errorf("%v, %v", c.notifyURLs, err)
	}
}

func TestNotifyCommand(t *testing.T) {
	good, bad := newListener(t), newListener(t)
	bad.answers(always(http.StatusForbidden))
	closed := httptest.NewServer(http.NotFoundHandler())
	closed.Close()
	command := func(urls string, args ...string) (string, error) {
		var out bytes.Buffer
		environment := map[string]string{"NOTIFY_URL": urls, "NOTIFY_SECRET": notifyTestSecret}
		if urls == "" {
			environment = nil
		}
		err := run(t.Context(), append([]string{"notify"}, args...), func(name string) string { return environment[name] }, nil, &out, &out)
		return out.String(), err
	}
	out, err := command(good.address.String(), "-test")
	if err != nil || out != good.address.Host+": 204 No Content\n" {
		t.Errorf("%q, %v", out, err)
	}
	good.want("notification.test")
	out, err = command(strings.Join([]string{good.address.String(), bad.address.String(), closed.URL + secretPath}, ","), "-test")
	host := strings.TrimPrefix(closed.URL, "http://")
	if want := good.address.Host + ": 204 No Content\n" + bad.address.Host + ": 403 Forbidden\n" + host + ": dial tcp " + host; err == nil ||
		err.Error() != "2 of 3 addresses did not take the test" || !strings.HasPrefix(out, want) || strings.Contains(out, "secret") {
		t.Errorf("%q, %v", out, err)
	}
	for urls, args := range map[string][]string{"": {"-test"}, good.address.String(): {}} {
		if out, err := command(urls, args...); err == nil {
			t.Errorf("%q %v: %q", urls, args, out)
		}
	}
}

// Serving sends notifications, and stops with the service.
func TestServingNotifies(t *testing.T) {
	l := newListener(t)
	databaseURL := newTestDatabase(t)
	s := newShop(t, func(c *config) { c.databaseURL = databaseURL })
	environment := map[string]string{"DATABASE_URL": databaseURL, "JWT_SECRET": testSecret, "IAMPORT_KEY": "key", "IAMPORT_SECRET": "secret",
		"IAMPORT_URL": "http://127.0.0.1:9", "PORT": "0", "NOTIFY_URL": l.address.String(), "NOTIFY_SECRET": notifyTestSecret}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, nil, func(name string) string { return environment[name] }, nil, io.Discard, io.Discard)
	}()
	waitUntil(t, "the address is known", func() bool {
		return queryText(t, databaseURL, `SELECT count(*)::text FROM notify_targets`) == "1"
	})
	s.order(buyerA, s.painting(99000))
	waitUntil(t, "the order is told", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.got) > 0
	})
	stop()
	check(t, <-ended)
	if got := l.take(); got[0].Type != "order.created" {
		t.Errorf("got %v", got)
	}
}
