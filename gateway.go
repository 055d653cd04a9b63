package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// What the two payment gateways' clients have in common: what they say of a payment, how they fail, and how a call is made.

// gatewayName says which gateway has a payment, as the ledger writes it.
type gatewayName string

const (
	gatewayIamport gatewayName = "iamport" // PortOne V1
	gatewayPortOne gatewayName = "portone" // PortOne V2
)

// gatewayStatus is a payment's last status, in the words of V1. There are others than these. It does not tell whether money
// moved: see gatewayPayment.moved.
type gatewayStatus string

const (
	gatewayReady     gatewayStatus = "ready" // its window was opened, or a virtual account waits for a deposit
	gatewayPaid      gatewayStatus = "paid"
	gatewayCancelled gatewayStatus = "cancelled" // after a partial refund too, and an account ended without a deposit
	gatewayFailed    gatewayStatus = "failed"
)

// gatewayPayment is what the gateway says of one payment.
type gatewayPayment struct {
	gateway             gatewayName
	impUID, merchantUID string // of V2 the transactionId and the paymentId
	status              gatewayStatus
	payMethod           string    // "card", "vbank" and others; "" when the gateway names none
	currency            string    // "KRW"
	amount              int64     // whole won, as first paid; 0 when currency is not KRW: not ours to book
	cancelled           int64     // whole won given back so far; 0 when currency is not KRW
	refundReasons       string    // why, as it was told, for each refund that the gateway lists, one to a line
	refundsListed       int64     // whole won of those; less than cancelled when the gateway does not list them all
	sandbox             bool      // made through a test channel: no money moved
	paidAt              time.Time // UTC; zero when never paid

	// moved reports whether the buyer's money ever moved, in whatever currency and whatever the status says. It is false
	// for a window that was not paid, a virtual account that ended without a deposit and the 0 won of a registered card.
	moved bool
	// fullyRefunded reports whether money moved and all of it was given back, whatever the status says: the amounts
	// count. It is also true of a payment that is still "paid" but whose refund equals its amount.
	fullyRefunded bool
	// refundPending reports whether there is a refund that the gateway has taken and not finished. It is not in cancelled.
	// V1 has none such.
	refundPending bool
	failedRefunds int    // V2: refunds that the gateway took and that then failed
	failedReasons string // of those, as refundReasons
	taxFree       int64  // V2: whole won of what is left that were paid free of tax
	// awaitsDeposit reports whether the payment is an issued virtual account that the buyer may still pay into.
	awaitsDeposit bool
}

// isKRW reports whether the payment is in the one currency the shop sells in.
func (p gatewayPayment) isKRW() bool { return p.currency == "KRW" }

// payMethodVirtualAccount is the payMethod of a virtual account. Its refund needs a refundAccount.
const payMethodVirtualAccount = "vbank"

// gaveBack reports whether the gateway lists a refund that was asked for with id in its reason.
func (p gatewayPayment) gaveBack(id string) bool { return strings.Contains(p.refundReasons, id) }

// key returns what names the payment at its gateway.
func (p gatewayPayment) key() paymentKey { return paymentKey{orderID: p.merchantUID, impUID: p.impUID} }

// paymentKey names a payment at its gateway: V1 finds it by the imp_uid, V2 by the paymentId, which is the order's id.
type paymentKey struct {
	orderID string // V1: may be empty
	impUID  string // V2, where it is the transactionId: empty for whichever payment the order has
}

// cancelRequest asks for a payment to be given back, all that is left of it or a part.
type cancelRequest struct {
	orderID   string // V2 needs it
	impUID    string
	amount    int64  // whole won to give back; 0: all that is left
	part      string // what tells the refund of a part from any other refund of the payment; empty: it is of all that is left
	remaining int64  // whole won not yet given back, as we believe; if not so, the gateway does nothing
	isKRW     bool   // the payment is in KRW; a foreign one is cancelled without comparing remaining
	reason    string
	refusals  int            // of the same refund so far: V2 answers a request that it has refused the same way for hours
	account   *refundAccount // where the money goes, for a payment into a virtual account; nil: back where it came from
}

// Format keeps the account out of what fmt prints, which does not ask the account itself when that is a field.
func (c cancelRequest) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "(the cancel of payment %q)", c.impUID)
}

// refundAccount is a buyer's bank account, as an administrator names it and the ledger keeps it until the money is back. It
// has to stay out of every log and error, so neither fmt nor encoding/json prints it. In a struct it has to be a pointer, whose
// address is printed.
type refundAccount struct {
	Holder string `json:"holder"`
	Bank   string `json:"bank"` // the code that the payment's provider gives the bank
	Number string `json:"number"`
}

// Format writes the same words for every account and every verb.
func (refundAccount) Format(f fmt.State, _ rune) { io.WriteString(f, "(a refund account)") }

// MarshalJSON does the same for what is written as JSON, a log too.
func (refundAccount) MarshalJSON() ([]byte, error) { return []byte(`"(a refund account)"`), nil }

// stored returns the account as the JSON that the ledger keeps.
func (a refundAccount) stored() string {
	type plain refundAccount // without MarshalJSON
	return marshalRaw(plain(a))
}

// redact removes the account's holder and number from a text of the gateway's.
func (a refundAccount) redact(text string) string {
	for _, private := range []string{a.Holder, a.Number} {
		if private != "" {
			text = strings.ReplaceAll(text, private, "…")
		}
	}
	return text
}

// errNoPayment means that the gateway answered and knows no such payment. A payment of a test channel
// is none either, unless iamportConfig.sandbox is set.
var errNoPayment = errors.New("the gateway knows no such payment")

// gatewayRefusal means that the gateway answered and did nothing: HTTP 200 with a code that is not 0, and of endAccount
// HTTP 400 too. No code and no text is known of a refusal because the remainder is another than the cancelRequest's: look
// the payment up and compare.
type gatewayRefusal struct {
	code    string // V1: 1 is a rule of the gateway's own, -1 the word of the card company or its like; V2: the error's type
	message string // often the card company's words, which may name a buyer: log the refusal, not this
}

// privateText finds what a card company's words may tell of a buyer: telephone, card and account numbers, mail.
var privateText = regexp.MustCompile(`[^\s@]+@[^\s@]+|\d(?:[-* ]*\d){7,}`)

// Error is safe to log: one short line, numbers that could be a buyer's left out.
func (r *gatewayRefusal) Error() string {
	text := []rune(privateText.ReplaceAllString(r.message, "…"))
	return fmt.Sprintf("the gateway refused (code %s): %q", r.code, string(text[:min(len(text), 200)]))
}

// gatewayError means that no usable answer came: whether the gateway did what was asked is unknown.
type gatewayError struct {
	// status is 502 for a broken answer or our keys rejected; 503 when it is unreachable, answers 5xx or no
	// slot was free in time; 504 for no answer in time, or when the caller went away (err is then
	// context.Canceled).
	status int
	call   string // as in gatewayCalls
	err    error  // the cause, without keys, tokens or anything of an answer's content but imp_uids
	// unreadable names the payments that cannot be read when that is all that is wrong. The gateway does answer then, and
	// another call or the other payments of a list may be fine.
	unreadable []unreadablePayment
}

// unreadablePayment is a payment of which the gateway says something that cannot be relied on.
type unreadablePayment struct {
	impUID, merchantUID string // each "" when it cannot be read either
	err                 error  // without anything of the content
}

func (e *gatewayError) Error() string { return "gateway " + e.call + ": " + e.err.Error() }
func (e *gatewayError) Unwrap() error { return e.err }

// ---- a call

// gatewayWire makes the calls of a gateway's client. It is safe for concurrent use.
type gatewayWire struct {
	url     string
	now     func() time.Time
	observe func(call, outcome string, err error, took time.Duration)
	client  *http.Client

	lookUpLimit, listLimit, cancelLimit time.Duration // each for a whole call, all waiting included
	lookUps, cancels                    chan struct{} // slots; apart, so that neither kind waits for the other
	pageSize                            int           // payments on a page of movedBetween
}

// newGatewayWire returns one for the gateway at url. now, transport and observe may be nil: see iamportConfig.
func newGatewayWire(
	url string, now func() time.Time, transport http.RoundTripper, observe func(call, outcome string, err error, took time.Duration),
) gatewayWire {
	if now == nil {
		now = time.Now
	}
	if observe == nil {
		observe = func(string, string, error, time.Duration) {}
	}
	if transport == nil {
		transport = newGatewayTransport()
	}
	return gatewayWire{
		url: strings.TrimRight(url, "/"), now: now, observe: observe,
		client: &http.Client{
			Transport:     transport,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		lookUpLimit: 5 * time.Second, listLimit: 30 * time.Second, cancelLimit: 60 * time.Second,
		lookUps: make(chan struct{}, maxLookUps), cancels: make(chan struct{}, maxCancels),
		pageSize: 1000,
	}
}

// Look-ups, cancels and, with V1, the one renewal of the token add up to the 16 calls at once.
const (
	maxLookUps = 10
	maxCancels = 5
)

const (
	maxAnswer = 1 << 20           // bytes of an answer's body
	maxPage   = 16 << 20          // bytes of one page of movedBetween: 16 kB for each of 1,000 payments
	maxWindow = 90 * 24 * 60 * 60 // seconds that the gateway lists at once
	maxPages  = 10                // of one order's payments, 100 each, or of one second's
)

// newGatewayTransport leaves the time of a call to its context. It speaks HTTP/1.1: one stuck connection is
// one stuck call.
func newGatewayTransport() *http.Transport {
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: 3 * time.Second}).DialContext,
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:    3 * time.Second,
		MaxIdleConnsPerHost:    maxLookUps + maxCancels + 1,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
	}
}

// begin starts the time of one call; end stops it and tells the observer.
func (g *gatewayWire) begin(
	ctx context.Context, call string, limit time.Duration,
) (_ context.Context, end func(error)) {
	start := g.now()
	ctx, cancel := context.WithTimeout(ctx, limit)
	return ctx, func(err error) {
		cancel()
		if outcome := gatewayOutcome(err); outcome != "" {
			g.observe(call, outcome, err, g.now().Sub(start))
		}
	}
}

// gatewayOutcome returns how a call ended, one of gatewayOutcomes. It is "" when the caller went away: that says nothing of
// the gateway.
func gatewayOutcome(err error) string {
	failure, failed := errors.AsType[*gatewayError](err)
	_, refused := errors.AsType[*gatewayRefusal](err)
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, context.Canceled):
		return ""
	case errors.Is(err, errNoPayment):
		return "none"
	case refused:
		return "refused"
	case failed && failure.unreadable != nil:
		return "unreadable"
	case failed && failure.status == http.StatusServiceUnavailable:
		return "unreachable"
	case failed && failure.status == http.StatusGatewayTimeout:
		return "timeout"
	}
	return "broken"
}

// gatewayCall is a call to a gateway.
type gatewayCall struct {
	name, method, path string
	body               any    // nil: none
	maxAnswer          int    // bytes of the answer's body; 0: maxAnswer
	idempotencyKey     string // the gateway carries out a call with the same key once; "": none is sent
	refusable          bool   // V1: HTTP status 400 is a refusal, and not a mistake in the call
	relaying           bool   // V2: HTTP status 502 may be what a card company says, and is returned
}

// exchangeInSlot is exchange once there is a free slot.
func (g *gatewayWire) exchangeInSlot(
	ctx context.Context, slots chan struct{}, c gatewayCall, authorization string,
) (status int, body []byte, err error) {
	select {
	case slots <- struct{}{}:
		defer func() { <-slots }()
	case <-ctx.Done():
	}
	if ctx.Err() != nil { // a slot that came at the last moment is too late
		err := fmt.Errorf("no free slot: %w", ctx.Err())
		return 0, nil, &gatewayError{status: http.StatusServiceUnavailable, call: c.name, err: err}
	}
	return g.exchange(ctx, c, authorization)
}

var (
	errAnswerTooLong = errors.New("answer too long")
	errBadRequest    = errors.New("HTTP status 400")
)

// exchange sends one request and reads its answer whole, so that the connection can be used again.
func (g *gatewayWire) exchange(
	ctx context.Context, c gatewayCall, authorization string,
) (status int, body []byte, err error) {
	request, err := g.request(ctx, c, authorization)
	if err != nil {
		return 0, nil, brokenAnswer(c.name, err)
	}
	answer, err := g.client.Do(request)
	if err != nil {
		if ctx.Err() != nil {
			return 0, nil, &gatewayError{status: http.StatusGatewayTimeout, call: c.name, err: ctx.Err()}
		}
		return 0, nil, &gatewayError{status: http.StatusServiceUnavailable, call: c.name, err: connectionError(err)}
	}
	defer answer.Body.Close()
	limit := cmp.Or(c.maxAnswer, maxAnswer)
	body, err = io.ReadAll(io.LimitReader(answer.Body, int64(limit)+1))
	switch {
	case err != nil && ctx.Err() != nil:
		return 0, nil, &gatewayError{status: http.StatusGatewayTimeout, call: c.name, err: ctx.Err()}
	case answer.StatusCode == http.StatusBadGateway && c.relaying && err == nil && len(body) <= limit:
		return answer.StatusCode, body, nil
	case answer.StatusCode >= 500 || answer.StatusCode == http.StatusTooManyRequests:
		err := fmt.Errorf("HTTP status %d", answer.StatusCode)
		return 0, nil, &gatewayError{status: http.StatusServiceUnavailable, call: c.name, err: err}
	case err != nil:
		return 0, nil, brokenAnswer(c.name, fmt.Errorf("answer cut short: %w", err))
	case len(body) > limit:
		return 0, nil, brokenAnswer(c.name, errAnswerTooLong)
	}
	return answer.StatusCode, body, nil
}

// connectionError keeps the causes known to show nothing of what was sent or answered: net/http quotes a
// malformed answer.
func connectionError(err error) error {
	if network, ok := errors.AsType[*net.OpError](err); ok {
		return network
	}
	if certificate, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return certificate
	}
	if record, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return record
	}
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("the connection was closed without an answer: %w", io.EOF)
	}
	return errors.New("no HTTP answer came")
}

func (g *gatewayWire) request(ctx context.Context, c gatewayCall, authorization string) (*http.Request, error) {
	var body []byte
	if c.body != nil {
		var err error
		if body, err = json.Marshal(c.body); err != nil {
			return nil, err
		}
	}
	request, err := http.NewRequestWithContext(ctx, c.method, g.url+c.path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", "application/json")
	if c.body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	switch {
	case c.idempotencyKey != "":
		request.Header.Set("Idempotency-Key", strconv.Quote(c.idempotencyKey))
	case authorization == "":
		// Asking for a token twice does no harm: net/http may do so when an idle connection proves closed.
		request.Header["Idempotency-Key"] = nil
	}
	if authorization != "" {
		request.Header.Set("Authorization", authorization)
	}
	return request, nil
}

// ---- an answer

// decodeAnswer is json.Unmarshal with errors that show nothing of the content.
func decodeAnswer(data []byte, v any) error {
	err := json.Unmarshal(data, v)
	if err == nil {
		return nil
	}
	if mismatch, ok := errors.AsType[*json.UnmarshalTypeError](err); ok && mismatch.Field != "" {
		return fmt.Errorf("the answer's %s has the wrong type", mismatch.Field)
	}
	return errors.New("the answer is not the JSON it should be")
}

func brokenAnswer(call string, err error) error {
	return &gatewayError{status: http.StatusBadGateway, call: call, err: err}
}

// unreadableError is the gatewayError of payments that cannot be read, or nil when there are none.
func unreadableError(call string, payments []unreadablePayment) error {
	if len(payments) == 0 {
		return nil
	}
	first := payments[0]
	err := fmt.Errorf("payment %q cannot be read, nor can %d others: %w", first.impUID, len(payments)-1, first.err)
	if len(payments) == 1 {
		err = fmt.Errorf("payment %q cannot be read: %w", first.impUID, first.err)
	}
	return &gatewayError{status: http.StatusBadGateway, call: call, err: err, unreadable: payments}
}

// textOf returns a JSON string's text, and "" for any other value.
func textOf(value json.RawMessage) (text string) {
	if json.Unmarshal(value, &text) != nil {
		return ""
	}
	return text
}

// lastSecond is 9999-12-31T23:59:59Z in Unix seconds, the last that RFC 3339 can write.
const lastSecond = 253402300799

// ---- lists

// paymentPage is one page of a list of payments.
type paymentPage struct {
	payments   []gatewayPayment // without those of test channels, unless they are configured
	unreadable []unreadablePayment
	next       int // number of the next page; 0: none
}

// listPage returns page number page, from 1, of the payments that moved between two Unix seconds, both included.
type listPage func(first, last int64, page int) (paymentPage, error)

// movedBetween yields what list lists between two times: see gateway.movedBetween.
//
// Memory holds one page. A time that has more payments than fit on a page is asked for in halves, instead of page by page:
// a payment that leaves the list while it is read would move others from the next page to one that was read already. Only
// a single second is read page by page.
func movedBetween(from, to time.Time, list listPage) iter.Seq2[gatewayPayment, error] {
	return func(yield func(gatewayPayment, error) bool) {
		for first := from.Unix(); first <= to.Unix(); first += maxWindow {
			if !list.window(first, min(first+maxWindow-1, to.Unix()), yield) {
				return
			}
		}
	}
}

// window does the work of movedBetween between two Unix seconds and reports whether to go on.
func (list listPage) window(first, last int64, yield func(gatewayPayment, error) bool) bool {
	for page := 1; page != 0; {
		found, err := list(first, last, page)
		switch {
		case first < last && (err == nil && found.next != 0 || errors.Is(err, errAnswerTooLong)):
			middle := first + (last-first)/2
			return list.window(first, middle, yield) && list.window(middle+1, last, yield)
		case err != nil:
			yield(gatewayPayment{}, err)
			return false
		}
		for _, p := range found.payments {
			if !yield(p, nil) {
				return false
			}
		}
		for _, u := range found.unreadable {
			if !yield(gatewayPayment{}, unreadableError("list", []unreadablePayment{u})) {
				return false
			}
		}
		page = found.next
	}
	return true
}
