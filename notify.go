package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Notifications tell other systems of the shop what happens to orders: each row of the history is posted to each address of
// NOTIFY_URL, as Standard Webhooks says (https://www.standardwebhooks.com). openapi.json describes them.

const (
	// notifyTimeout is how long a listener may take to answer.
	notifyTimeout = 10 * time.Second
	// notifyLease is when a notification that is being sent is taken for one whose replica died.
	notifyLease = notifyTimeout + 20*time.Second
	// notifyPoll is how often an address without work looks for some.
	notifyPoll = time.Second
	// notifyTries is for how long a notification is tried again.
	notifyTries = 3 * 24 * time.Hour
	// notifyFirstPause and notifyLongestPause bound the pauses between two attempts. They double.
	notifyFirstPause, notifyLongestPause = 10 * time.Second, time.Hour
	// notifyUpkeep is how often a replica says which addresses it has.
	notifyUpkeep = time.Hour
	// notifyWaitAtMost is for how long a notification may wait. One of an address that is tried waits that long only behind
	// others of its order.
	notifyWaitAtMost = 30 * 24 * time.Hour
	// notifyAnswerRead is how many bytes of an answer are read, so that its connection can be used again.
	notifyAnswerRead = 4 << 10
)

// notification is the body of a notification.
type notification struct {
	Type      string   `json:"type"`
	Timestamp jsonTime `json:"timestamp"`
	Data      any      `json:"data"`
}

// notifiedChange is a row of the history as others may see it: without texts that a person wrote, and without who did it.
type notifiedChange struct {
	Order   string `json:"order"`
	Number  string `json:"number"`
	Status  *int   `json:"status,omitempty"`
	From    *int   `json:"from,omitempty"`
	Payment string `json:"payment,omitempty"`
	Won     *int64 `json:"won,omitempty"`
}

// notifyTypes are the types of notifications by what the history says, up to its colon.
var notifyTypes = map[string]string{
	"created":               "order.created",
	"deleted":               "order.deleted",
	"replaced":              "order.replaced",
	"expired":               "order.expired",
	"withdrawn":             "order.withdrawn",
	"revived":               "order.revived",
	"paid":                  "order.paid",
	"preparing":             "order.preparing",
	"shipping":              "order.shipping",
	"shipment recorded":     "order.shipment_recorded",
	"shipment corrected":    "order.shipment_corrected",
	"delivered":             "order.delivered",
	"return requested":      "order.return_requested",
	"cancel requested":      "order.cancel_requested",
	"cancelled":             "order.cancelled",
	"part return requested": "order.part_return_requested",
	"part return withdrawn": "order.part_return_withdrawn",
	"part cancel requested": "order.part_cancel_requested",
	"part cancelled":        "order.part_cancelled",
	"personal data erased":  "order.personal_data_erased",
	"payment kept":          "payment.kept",
	"partly refunded":       "payment.partly_refunded",
	"refunding":             "payment.refunding",
	"refunded":              "payment.refunded",
	"refunded by hand":      "payment.refunded_by_hand",
	"refund refused":        "payment.refund_refused",
}

// The types of rows that a later release writes.
const (
	notifyOrderChanged   = "order.changed"
	notifyPaymentChanged = "payment.changed"
)

// notifyType returns the type of the notification of a row.
func notifyType(row historyRow) string {
	what, _, _ := strings.Cut(row.why, ":")
	switch {
	case notifyTypes[what] != "":
		return notifyTypes[what]
	case row.impUID != "":
		return notifyPaymentChanged
	default:
		return notifyOrderChanged
	}
}

// webhookID returns the notification's id, which is the same at each attempt and at each address. The time keeps it unique
// when a database that was restored to an earlier moment gives out an id again.
func (n *queuedNotification) webhookID() string {
	return fmt.Sprintf("%s_%d_%d", n.orderID, n.historyID, n.at.UnixMicro())
}

// body returns the notification's body.
func (n *queuedNotification) body() notification {
	return notification{notifyType(n.historyRow), jsonTime(n.at),
		notifiedChange{Order: n.orderID, Number: n.number, Status: n.to, From: n.from, Payment: n.impUID, Won: n.amount}}
}

// notifier sends notifications.
type notifier struct {
	store     *store
	addresses []*notifyAddress
	key       []byte
	transport http.RoundTripper
	now       func() time.Time
	log       *slog.Logger
}

// notifyAddress is an address that notifications go to. Its URL may have a secret in it: only the host is shown.
type notifyAddress struct {
	url, host string
	id        string        // its target's
	claiming  sync.Mutex    // held by the one worker that looks for work
	wake      chan struct{} // has a value when there may be work
	gone      atomic.Bool   // it answered 410
	failing   atomic.Bool   // the last attempt failed
}

// newNotifier returns a notifier for the addresses of c.
func newNotifier(c config, store *store, log *slog.Logger, now func() time.Time) *notifier {
	n := &notifier{store: store, key: c.notifyKey, log: log, now: now, transport: &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: 3 * time.Second}).DialContext,
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:    3 * time.Second,
		MaxIdleConnsPerHost:    maxParallel,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: 16 << 10,
	}}
	for _, address := range c.notifyURLs {
		hash := sha256.Sum256([]byte(address.String()))
		n.addresses = append(n.addresses, &notifyAddress{url: address.String(), host: address.Host,
			id: hex.EncodeToString(hash[:]), wake: make(chan struct{}, 1)})
	}
	return n
}

// targets returns the ids of the addresses, sorted.
func (n *notifier) targets() []string {
	ids := make([]string, len(n.addresses))
	for i, a := range n.addresses {
		ids[i] = a.id
	}
	slices.Sort(ids)
	return ids
}

// figures returns what stands open. Without an address it asks nobody.
func (n *notifier) figures(ctx context.Context) (notifyFigures, error) {
	if len(n.addresses) == 0 {
		return notifyFigures{}, nil
	}
	return n.store.readNotifyFigures(ctx, n.targets(), n.now())
}

// run sends what is due until ctx ends. Every replica runs it; no two send the same notification.
func (n *notifier) run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { n.keepTargets(ctx) })
	for _, a := range n.addresses {
		for range maxParallel {
			wg.Go(func() { n.work(ctx, a) })
		}
	}
	wg.Wait()
}

// keepTargets says at start and then each hour which addresses this replica has. It runs without any, too: an address that was
// taken out of the configuration is forgotten by the replicas that still run.
func (n *notifier) keepTargets(ctx context.Context) {
	for ctx.Err() == nil {
		next := notifyUpkeep
		if err := n.store.keepNotifyTargets(ctx, n.targets(), n.now(), notifyTries, notifyWaitAtMost); err != nil && ctx.Err() == nil {
			n.log.Error("notifications", "error", err)
			next = notifyPoll
		}
		pause(ctx, next)
	}
}

// work sends notifications to a until ctx ends or a is gone.
func (n *notifier) work(ctx context.Context, a *notifyAddress) {
	for {
		next := n.await(ctx, a)
		if next == nil {
			return
		}
		n.attempt(ctx, a, next)
		select {
		case a.wake <- struct{}{}:
		default:
		}
	}
}

// await returns the next notification for a. It returns nil when ctx ends or a is gone.
func (n *notifier) await(ctx context.Context, a *notifyAddress) *queuedNotification {
	a.claiming.Lock()
	defer a.claiming.Unlock()
	for ctx.Err() == nil && !a.gone.Load() {
		next, err := n.claim(ctx, a)
		if err == nil && next != nil {
			return next
		}
		if err != nil && ctx.Err() == nil {
			n.log.Error("notifications", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-a.wake:
		case <-time.After(notifyPoll):
		}
	}
	return nil
}

func (n *notifier) claim(ctx context.Context, a *notifyAddress) (*queuedNotification, error) {
	return n.store.claimNotification(ctx, a.id, n.now(), n.now().Add(notifyLease))
}

// attempt sends a claimed notification and books how that went. What a shutdown cuts off is not booked: it is due again when
// its lease ends.
func (n *notifier) attempt(ctx context.Context, a *notifyAddress, q *queuedNotification) {
	status, err := n.send(ctx, a, q.webhookID(), q.body())
	if err != nil && ctx.Err() != nil {
		return
	}
	delivered := err == nil && isSuccess(status)
	cause := notifyCause(status, err)
	n.logTurn(a, delivered, cause)
	now := n.now()
	ctx = context.WithoutCancel(ctx)
	switch {
	case delivered:
		err = n.store.notificationSent(ctx, q, now)
	case !now.Before(q.triedSince.Add(notifyTries)):
		n.log.Error("notification given up", "host", a.host, "order", q.orderID, "type", notifyType(q.historyRow), "cause", cause)
		err = n.store.giveUpNotification(ctx, q, now)
	default:
		err = n.store.postponeNotification(ctx, q, now.Add(notifyPause(q.attempts)))
	}
	if err != nil {
		n.log.Error("notifications", "error", err) // it is due again when its lease ends
	}
	if status == http.StatusGone && a.gone.CompareAndSwap(false, true) {
		n.log.Error("notifications end until the next start: the address answered 410", "host", a.host)
	}
}

// logTurn logs when an address begins to fail and when it takes notifications again.
func (n *notifier) logTurn(a *notifyAddress, delivered bool, cause string) {
	switch {
	case !delivered && a.failing.CompareAndSwap(false, true):
		n.log.Warn("notification not delivered", "host", a.host, "cause", cause)
	case delivered && a.failing.CompareAndSwap(true, false):
		n.log.Info("notifications are delivered again", "host", a.host)
	}
}

// notifyPause returns how long to wait after an attempt that failed after so many others.
func notifyPause(failed int) time.Duration {
	if failed > 16 {
		return notifyLongestPause
	}
	return min(notifyFirstPause<<failed, notifyLongestPause)
}

func isSuccess(status int) bool { return status/100 == 2 }

// send posts a notification to a and returns the status of the answer. It follows no redirect: a RoundTripper never does.
func (n *notifier) send(ctx context.Context, a *notifyAddress, id string, body notification) (status int, err error) {
	ctx, cancel := context.WithTimeout(ctx, notifyTimeout)
	defer cancel()
	text := marshalRaw(body)
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, a.url, strings.NewReader(text))
	if err != nil {
		return 0, err
	}
	timestamp := strconv.FormatInt(n.now().Unix(), 10)
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("User-Agent", "lumiere")
	request.Header.Set("webhook-id", id)
	request.Header.Set("webhook-timestamp", timestamp)
	request.Header.Set("webhook-signature", "v1,"+base64.StdEncoding.EncodeToString(webhookSignature(n.key, id, timestamp, []byte(text))))
	response, err := n.transport.RoundTrip(request)
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	io.CopyN(io.Discard, response.Body, notifyAnswerRead)
	return response.StatusCode, nil
}

// notifyCause says in words how an attempt ended. Errors that may quote the answer, which may repeat the address, are not quoted.
func notifyCause(status int, err error) string {
	_, notConnected := errors.AsType[*net.OpError](err)
	_, notTrusted := errors.AsType[*tls.CertificateVerificationError](err)
	timeout, isNet := errors.AsType[net.Error](err)
	switch {
	case err == nil:
		return strings.TrimSpace(fmt.Sprint(status, " ", http.StatusText(status)))
	case errors.Is(err, context.DeadlineExceeded), isNet && timeout.Timeout():
		return fmt.Sprintf("no answer within %v", notifyTimeout)
	case notConnected, notTrusted:
		return err.Error()
	default:
		return "no HTTP answer"
	}
}

// notifyCommand sends one test to every address and prints what each answered.
func notifyCommand(ctx context.Context, c config, test bool, out, errOut io.Writer) error {
	switch {
	case !test:
		fmt.Fprint(errOut, usage)
		return errUsage
	case len(c.notifyURLs) == 0:
		return errors.New("NOTIFY_URL is not set")
	}
	n := newNotifier(c, nil, newLog(c, errOut), time.Now)
	refused := 0
	for _, a := range n.addresses {
		status, err := n.send(ctx, a, "test_"+randomDigits(), notification{"notification.test", jsonTime(n.now()), struct{}{}})
		fmt.Fprintf(out, "%s: %s\n", a.host, notifyCause(status, err))
		if err != nil || !isSuccess(status) {
			refused++
		}
	}
	if refused > 0 {
		return fmt.Errorf("%d of %d addresses did not take the test", refused, len(n.addresses))
	}
	return nil
}

// ---- configuration

// notifySecretPrefix begins a secret of Standard Webhooks. The rest is base64 of 24 to 64 bytes.
const notifySecretPrefix = "whsec_"

// notifications returns the addresses of NOTIFY_URL, each once, and the key in NOTIFY_SECRET. In local development only
// addresses on this machine are told.
func (e *environment) notifications(local bool) (addresses []*url.URL, key []byte) {
	for text := range e.list("NOTIFY_URL") {
		u, err := url.Parse(text)
		if err != nil || !isSecureURL(u) || u.User != nil {
			e.problem("NOTIFY_URL lists addresses that begin with https:// (http:// only to this machine), without a user")
			continue
		}
		known := slices.ContainsFunc(addresses, func(other *url.URL) bool { return other.String() == u.String() })
		if !known && (!local || isLoopback(u.Hostname())) {
			addresses = append(addresses, u)
		}
	}
	secret, hasPrefix := strings.CutPrefix(e.text("NOTIFY_SECRET", ""), notifySecretPrefix)
	key, err := base64.StdEncoding.DecodeString(secret)
	switch hasURL := e.text("NOTIFY_URL", "") != ""; {
	case secret == "" && !hasPrefix && !hasURL:
		return nil, nil
	case secret == "" && !hasPrefix:
		e.problem("NOTIFY_SECRET is not set, and NOTIFY_URL is")
	case !hasURL:
		e.problem("NOTIFY_URL is not set, and NOTIFY_SECRET is")
	case !hasPrefix || err != nil || len(key) < 24 || len(key) > 64:
		e.problem("NOTIFY_SECRET must be %s and base64 of 24 to 64 bytes", notifySecretPrefix)
	}
	return addresses, key
}
