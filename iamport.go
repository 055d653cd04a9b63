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
	"math/big"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
)

// gatewayStatus is a payment's last status as the gateway names it. There are others than these. It does not tell
// whether money moved: see gatewayPayment.moved.
type gatewayStatus string

const (
	gatewayReady     gatewayStatus = "ready" // its window was opened, or a virtual account waits for a deposit
	gatewayPaid      gatewayStatus = "paid"
	gatewayCancelled gatewayStatus = "cancelled" // after a partial refund too, and an account ended without a deposit
	gatewayFailed    gatewayStatus = "failed"
)

// gatewayPayment is what the gateway says of one payment.
type gatewayPayment struct {
	impUID, merchantUID string
	status              gatewayStatus
	payMethod           string    // "card", "vbank" and others; "" when the gateway names none
	currency            string    // "KRW"
	amount              int64     // whole won, as first paid; 0 when currency is not KRW: not ours to book
	cancelled           int64     // whole won given back so far; 0 when currency is not KRW
	sandbox             bool      // made through a test channel: no money moved
	paidAt              time.Time // UTC; zero when never paid

	// moved reports whether the buyer's money ever moved, in whatever currency and whatever the status says. It is false
	// for a window that was not paid, a virtual account that ended without a deposit and the 0 won of a registered card.
	moved bool
	// fullyRefunded reports whether money moved and all of it was given back, whatever the status says: the amounts
	// count. It is also true of a payment that is still "paid" but whose refund equals its amount.
	fullyRefunded bool
	// awaitsDeposit reports whether the payment is an issued virtual account that the buyer may still pay into.
	awaitsDeposit bool
}

// isKRW reports whether the payment is in the one currency the shop sells in.
func (p gatewayPayment) isKRW() bool { return p.currency == "KRW" }

// payMethodVirtualAccount is the payMethod of a virtual account. Its refund needs a refundAccount.
const payMethodVirtualAccount = "vbank"

// cancelRequest asks for all that is left of a payment to be given back.
type cancelRequest struct {
	impUID    string
	remaining int64 // whole won not yet given back, as we believe; if not so, the gateway does nothing
	isKRW     bool  // the payment is in KRW; a foreign one is cancelled without comparing remaining
	reason    string
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
	code    int    // 1: a rule of the gateway's own; -1: the card company or its like said no
	message string // often the card company's words, which may name a buyer: log the refusal, not this
}

// privateText finds what a card company's words may tell of a buyer: telephone, card and account numbers, mail.
var privateText = regexp.MustCompile(`[^\s@]+@[^\s@]+|\d(?:[-* ]*\d){7,}`)

// Error is safe to log: one short line, numbers that could be a buyer's left out.
func (r *gatewayRefusal) Error() string {
	text := []rune(privateText.ReplaceAllString(r.message, "…"))
	return fmt.Sprintf("the gateway refused (code %d): %q", r.code, string(text[:min(len(text), 200)]))
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

// iamportConfig says which Iamport account to use, and how.
type iamportConfig struct {
	url, key, secret string
	sandbox          bool              // also accept payments of test channels (staging)
	now              func() time.Time  // nil: time.Now
	transport        http.RoundTripper // nil: a transport of its own with sane limits
	// observe is told of every call when it ends, except one whose caller went away. call is one of gatewayCalls,
	// outcome one of gatewayOutcomes, err the one that its caller gets; took includes all waiting.
	observe func(call, outcome string, err error, took time.Duration) // nil: not observed
}

// iamportClient is a client of Iamport's (PortOne V1) REST API. It is safe for concurrent use and meant to be shared:
// its callers use one access token, and at most 16 calls are under way at once.
type iamportClient struct {
	url, key, secret string
	sandbox          bool
	now              func() time.Time
	observe          func(call, outcome string, err error, took time.Duration)
	client           *http.Client

	lookUpLimit, listLimit, cancelLimit time.Duration // each for a whole call, its waiting and its token included
	lookUps, cancels                    chan struct{} // slots; apart, so that neither kind waits for the other
	pageSize                            int           // payments on a page of movedBetween

	mu      sync.Mutex
	token   *accessToken  // nil: none yet, or the gateway turned it down
	renewal *tokenRenewal // nil: none under way
}

// Look-ups, cancels and the one renewal of the token add up to the 16 calls at once.
const (
	maxLookUps = 10
	maxCancels = 5
)

const (
	maxAnswer   = 1 << 20           // bytes of an answer's body
	maxPage     = 16 << 20          // bytes of one page of movedBetween: 16 kB for each of 1,000 payments, which have about 2
	maxWindow   = 90 * 24 * 60 * 60 // seconds that the gateway lists at once
	tokenMargin = 30 * time.Second  // of 60 s at most: asked earlier, the gateway gives the same token again
	maxPages    = 10                // of one order's payments, 100 each, or of one second's
)

// newIamportClient makes a client; nothing is asked of the gateway before the first call.
func newIamportClient(c iamportConfig) *iamportClient {
	g := &iamportClient{
		url: strings.TrimRight(c.url, "/"), key: c.key, secret: c.secret, sandbox: c.sandbox,
		now: c.now, observe: c.observe,
		lookUpLimit: 5 * time.Second, listLimit: 30 * time.Second, cancelLimit: 60 * time.Second,
		lookUps: make(chan struct{}, maxLookUps), cancels: make(chan struct{}, maxCancels),
		pageSize: 1000,
	}
	if g.now == nil {
		g.now = time.Now
	}
	if g.observe == nil {
		g.observe = func(string, string, error, time.Duration) {}
	}
	if c.transport == nil {
		c.transport = newGatewayTransport()
	}
	g.client = &http.Client{
		Transport:     c.transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return g
}

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

var impUIDPattern = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// validImpUID reports whether s can be an imp_uid at all; anything else is never sent to the gateway.
func validImpUID(s string) bool { return impUIDPattern.MatchString(s) }

// payment looks up one payment.
func (g *iamportClient) payment(ctx context.Context, impUID string) (gatewayPayment, error) {
	if !validImpUID(impUID) {
		return gatewayPayment{}, errNoPayment
	}
	ctx, end := g.begin(ctx, "payment", g.lookUpLimit)
	p, err := g.fetchPayment(ctx, impUID)
	end(err)
	return p, err
}

func (g *iamportClient) fetchPayment(ctx context.Context, impUID string) (gatewayPayment, error) {
	path := "/payments/" + url.PathEscape(impUID)
	if g.sandbox {
		path += "?include_sandbox=true"
	}
	response, err := g.lookUp(ctx, "payment", path)
	if err != nil {
		return gatewayPayment{}, err
	}
	p, err := readPayment("payment", response, impUID)
	if err == nil && p.sandbox && !g.sandbox {
		return gatewayPayment{}, errNoPayment
	}
	return p, err
}

// paymentsOf lists every payment of merchantUID that is paid, and then those that are cancelled: refunded in part or
// whole, or ended without a deposit. Of each kind the first begun comes first. None is an empty list, not an error.
// Windows that were opened and not paid are left out: a buyer may open any number.
//
// A payment that cannot be read is named by the error, a gatewayError with unreadable set, and the list holds all others.
// After any other error there is no list.
func (g *iamportClient) paymentsOf(ctx context.Context, merchantUID string) ([]gatewayPayment, error) {
	return g.findAll(ctx, merchantUID, gatewayPaid, gatewayCancelled)
}

// paidPaymentsOf lists the payments of merchantUID that are paid and not refunded, not even in part, as paymentsOf does.
func (g *iamportClient) paidPaymentsOf(ctx context.Context, merchantUID string) ([]gatewayPayment, error) {
	return g.findAll(ctx, merchantUID, gatewayPaid)
}

func (g *iamportClient) findAll(
	ctx context.Context, merchantUID string, statuses ...gatewayStatus,
) (all []gatewayPayment, err error) {
	ctx, end := g.begin(ctx, "findAll", g.lookUpLimit)
	defer func() { end(err) }()
	var unreadable []unreadablePayment
	for _, status := range statuses {
		// The oldest first, so that a payment made meanwhile does not move the pages.
		path := "/payments/findAll/" + url.PathEscape(merchantUID) + "/" + string(status) + "?sorting=started&limit=100&page="
		for page := 1; page != 0; {
			found, err := g.readPage(ctx, gatewayCall{name: "findAll", method: http.MethodGet, path: path}, page)
			if err != nil {
				return nil, err
			}
			for _, p := range found.payments {
				if p.merchantUID == merchantUID {
					all = append(all, p)
					continue
				}
				err := errors.New("it is another merchant_uid's")
				unreadable = append(unreadable, unreadablePayment{p.impUID, p.merchantUID, err})
			}
			unreadable = append(unreadable, found.unreadable...)
			page = found.next
		}
	}
	return all, unreadableError("findAll", unreadable)
}

// movedBetween yields the payments of the whole account, other shops' included, that are in status now and got there between
// two times: for gatewayPaid those paid then, for gatewayCancelled those cancelled then. Both ends are included, to the
// second. The order is roughly that of time. A payment that is refunded while the list is read may be missing from the
// paid ones; it is among those cancelled after that.
//
// A payment that cannot be read is yielded as an error, a gatewayError with unreadable set, and the others follow. Any other
// error is the last: what is listed after it is not known.
//
// Memory holds one page. A time that has more payments than fit on a page is asked for in halves, instead of page by page:
// a payment that leaves the list while it is read would move others from the next page to one that was read already. Only
// a single second is read page by page.
func (g *iamportClient) movedBetween(
	ctx context.Context, status gatewayStatus, from, to time.Time,
) iter.Seq2[gatewayPayment, error] {
	return func(yield func(gatewayPayment, error) bool) {
		for first := from.Unix(); first <= to.Unix(); first += maxWindow {
			if !g.listWindow(ctx, status, first, min(first+maxWindow-1, to.Unix()), yield) {
				return
			}
		}
	}
}

// listWindow does the work of movedBetween between two Unix seconds and reports whether to go on.
func (g *iamportClient) listWindow(
	ctx context.Context, status gatewayStatus, first, last int64, yield func(gatewayPayment, error) bool,
) bool {
	for page := 1; page != 0; {
		found, err := g.listPage(ctx, status, first, last, page)
		switch {
		case first < last && (err == nil && found.next != 0 || errors.Is(err, errAnswerTooLong)):
			middle := first + (last-first)/2
			return g.listWindow(ctx, status, first, middle, yield) && g.listWindow(ctx, status, middle+1, last, yield)
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

func (g *iamportClient) listPage(
	ctx context.Context, status gatewayStatus, first, last int64, page int,
) (paymentPage, error) {
	ctx, end := g.begin(ctx, "list", g.listLimit)
	path := fmt.Sprintf("/payments/status/%s?from=%d&to=%d&limit=%d&sorting=started&page=", status, first, last, g.pageSize)
	found, err := g.readPage(ctx, gatewayCall{name: "list", method: http.MethodGet, path: path, maxAnswer: maxPage}, page)
	end(cmp.Or(err, unreadableError("list", found.unreadable)))
	return found, err
}

// paymentPage is one page of a list of payments.
type paymentPage struct {
	payments   []gatewayPayment // without those of test channels, unless they are configured
	unreadable []unreadablePayment
	next       int // number of the next page; 0: none
}

// readPage makes a call whose path ends before the page's number. No payments at all, and a list that has become shorter
// meanwhile, are an empty page.
func (g *iamportClient) readPage(ctx context.Context, c gatewayCall, page int) (paymentPage, error) {
	c.path += strconv.Itoa(page)
	response, err := g.call(ctx, g.lookUps, c)
	switch {
	case errors.Is(err, errNoPayment), page > 1 && errors.Is(err, errBadRequest):
		return paymentPage{}, nil
	case err != nil:
		return paymentPage{}, err
	}
	var list struct {
		Next int
		List *[]json.RawMessage
	}
	if err := decodeAnswer(response, &list); err != nil {
		return paymentPage{}, brokenAnswer(c.name, err)
	}
	switch {
	case list.List == nil:
		return paymentPage{}, brokenAnswer(c.name, errors.New("the answer has no list"))
	case list.Next != 0 && (list.Next != page+1 || page == maxPages || len(*list.List) == 0):
		return paymentPage{}, brokenAnswer(c.name, errors.New("the pages do not come to an end"))
	}
	found := paymentPage{next: list.Next}
	for _, object := range *list.List {
		p, err := decodePayment(object)
		switch {
		case err != nil:
			found.unreadable = append(found.unreadable, identify(object, err))
		case !p.sandbox || g.sandbox:
			found.payments = append(found.payments, p)
		}
	}
	return found, nil
}

// endAccount ends an issued virtual account, so that nobody can pay into it any more. A gatewayRefusal: the payment is no
// virtual account or not one that waits for a deposit. After a gatewayError nobody knows whether the account has ended.
func (g *iamportClient) endAccount(ctx context.Context, impUID string) error {
	if !validImpUID(impUID) {
		return errNoPayment
	}
	ctx, end := g.begin(context.WithoutCancel(ctx), "endAccount", g.cancelLimit)
	_, err := g.call(ctx, g.cancels, gatewayCall{
		name: "endAccount", method: http.MethodDelete, path: "/vbanks/" + url.PathEscape(impUID), refusable: true,
	})
	end(err)
	return err
}

// cancelPayment gives back all that is left of a payment. Once begun it goes on when its caller goes away. After a
// gatewayError nobody knows whether the money went back: look the payment up before trying again.
func (g *iamportClient) cancelPayment(ctx context.Context, c cancelRequest) (gatewayPayment, error) {
	switch {
	case !validImpUID(c.impUID):
		return gatewayPayment{}, errors.New("gateway cancel: not an imp_uid")
	case c.isKRW && c.remaining <= 0:
		return gatewayPayment{}, errors.New("gateway cancel: nothing is left to give back")
	}
	ctx, end := g.begin(context.WithoutCancel(ctx), "cancel", g.cancelLimit)
	p, err := g.sendCancel(ctx, c)
	end(err)
	return p, err
}

func (g *iamportClient) sendCancel(ctx context.Context, c cancelRequest) (gatewayPayment, error) {
	request := map[string]any{"imp_uid": c.impUID, "reason": c.reason} // without an amount: all that is left
	if c.isKRW {
		request["checksum"] = c.remaining
	}
	if a := c.account; a != nil {
		request["refund_holder"], request["refund_bank"], request["refund_account"] = a.Holder, a.Bank, a.Number
	}
	response, err := g.call(ctx, g.cancels, gatewayCall{
		name: "cancel", method: http.MethodPost, path: "/payments/cancel", body: request,
	})
	if refusal, ok := errors.AsType[*gatewayRefusal](err); ok && c.account != nil {
		refusal.message = c.account.redact(refusal.message) // a bank may repeat what it does not like
	}
	if err != nil {
		return gatewayPayment{}, err
	}
	return readPayment("cancel", response, c.impUID)
}

// begin starts the time of one call; end stops it and tells the observer.
func (g *iamportClient) begin(
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

type gatewayCall struct {
	name, method, path string
	body               any  // nil: none
	maxAnswer          int  // bytes of the answer's body; 0: maxAnswer
	refusable          bool // HTTP status 400 is a refusal, and not a mistake in the call
}

func (g *iamportClient) lookUp(ctx context.Context, name, path string) (json.RawMessage, error) {
	return g.call(ctx, g.lookUps, gatewayCall{name: name, method: http.MethodGet, path: path})
}

// call makes one call with the shared token and returns the envelope's response. When the gateway turns the
// token down, it tries once more with a renewed one.
func (g *iamportClient) call(ctx context.Context, slots chan struct{}, c gatewayCall) (json.RawMessage, error) {
	var rejected *accessToken
	for range 2 {
		token, err := g.freshToken(ctx, c.name, rejected)
		if err != nil {
			return nil, err
		}
		status, body, err := g.exchangeInSlot(ctx, slots, c, token.value)
		if err != nil {
			return nil, err
		}
		switch {
		case status == http.StatusBadRequest && c.refusable:
			return nil, openRefusal(c.name, body)
		case status != http.StatusUnauthorized:
			return openEnvelope(c.name, status, body)
		}
		rejected = token
	}
	return nil, brokenAnswer(c.name, errors.New("a new token was rejected"))
}

func (g *iamportClient) exchangeInSlot(
	ctx context.Context, slots chan struct{}, c gatewayCall, token string,
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
	return g.exchange(ctx, c, token)
}

var (
	errAnswerTooLong = errors.New("answer too long")
	errBadRequest    = errors.New("HTTP status 400")
)

// exchange sends one request and reads its answer whole, so that the connection can be used again.
func (g *iamportClient) exchange(
	ctx context.Context, c gatewayCall, token string,
) (status int, body []byte, err error) {
	request, err := g.request(ctx, c, token)
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

func (g *iamportClient) request(ctx context.Context, c gatewayCall, token string) (*http.Request, error) {
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
	if token != "" {
		request.Header.Set("Authorization", token)
	} else {
		// Asking for a token twice does no harm: net/http may do so when an idle connection proves closed.
		request.Header["Idempotency-Key"] = nil
	}
	return request, nil
}

// notFoundText begins the message about an unknown payment. It comes with 404, from older servers with 200.
const notFoundText = "존재하지 않는 결제정보"

// openEnvelope returns what a well-formed success holds. A 404 without an envelope comes from a proxy: it must not pass for
// "no such payment".
func openEnvelope(call string, status int, body []byte) (json.RawMessage, error) {
	switch status {
	case http.StatusOK, http.StatusNotFound:
	case http.StatusBadRequest:
		return nil, brokenAnswer(call, errBadRequest)
	default:
		return nil, brokenAnswer(call, fmt.Errorf("HTTP status %d", status))
	}
	var envelope struct {
		Code     *int
		Message  string
		Response json.RawMessage
	}
	if err := decodeAnswer(body, &envelope); err != nil {
		return nil, brokenAnswer(call, err)
	}
	switch code := envelope.Code; {
	case code == nil:
		return nil, brokenAnswer(call, errors.New("the answer has no code"))
	case *code != 0 && status == http.StatusNotFound,
		*code == -1 && strings.HasPrefix(envelope.Message, notFoundText):
		return nil, errNoPayment
	case status == http.StatusNotFound:
		return nil, brokenAnswer(call, errors.New("HTTP status 404 and code 0"))
	case *code != 0:
		return nil, &gatewayRefusal{*code, envelope.Message}
	}
	return envelope.Response, nil
}

// openRefusal returns the refusal that a well-formed answer with HTTP status 400 is.
func openRefusal(call string, body []byte) error {
	if _, err := openEnvelope(call, http.StatusOK, body); err != nil {
		return err
	}
	return brokenAnswer(call, errors.New("HTTP status 400 and code 0"))
}

// readPayment decodes the payment that was asked for. When the answer is an object, but not a payment as it should be, that
// payment is unreadable; anything else is a broken answer.
func readPayment(call string, response []byte, impUID string) (gatewayPayment, error) {
	p, err := decodePayment(response)
	if err == nil && p.impUID == impUID {
		return p, nil
	}
	u := identify(response, err)
	switch {
	case u.impUID != "" && u.impUID != impUID:
		return gatewayPayment{}, brokenAnswer(call, errors.New("the answer is about another imp_uid"))
	case !bytes.HasPrefix(response, []byte("{")):
		return gatewayPayment{}, brokenAnswer(call, err)
	}
	u.impUID = impUID
	return gatewayPayment{}, unreadableError(call, []unreadablePayment{u})
}

// identify reads what it can of a payment that decodePayment does not accept because of err.
func identify(object []byte, err error) unreadablePayment {
	u := unreadablePayment{err: err}
	var fields struct {
		ImpUID      json.RawMessage `json:"imp_uid"`
		MerchantUID json.RawMessage `json:"merchant_uid"`
	}
	if json.Unmarshal(object, &fields) != nil {
		return u
	}
	u.impUID, u.merchantUID = textOf(fields.ImpUID), textOf(fields.MerchantUID)
	if !validImpUID(u.impUID) {
		u.impUID = ""
	}
	return u
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

// decodePayment decodes a payment object. What the gateway always sends has to be there; other fields are
// ignored.
func decodePayment(response []byte) (gatewayPayment, error) {
	var object struct {
		ImpUID       string          `json:"imp_uid"`
		MerchantUID  string          `json:"merchant_uid"`
		Status       gatewayStatus   `json:"status"`
		PayMethod    json.RawMessage `json:"pay_method"`
		AccountNo    json.RawMessage `json:"vbank_num"`
		Currency     string          `json:"currency"`
		Amount       json.RawMessage `json:"amount"`
		CancelAmount json.RawMessage `json:"cancel_amount"`
		Sandbox      bool            `json:"sandbox"`
		PaidAt       int64           `json:"paid_at"` // Unix seconds; 0: never paid
	}
	if err := decodeAnswer(response, &object); err != nil {
		return gatewayPayment{}, err
	}
	p := gatewayPayment{
		impUID: object.ImpUID, merchantUID: object.MerchantUID, status: object.Status,
		payMethod: textOf(object.PayMethod), currency: object.Currency, sandbox: object.Sandbox,
	}
	switch {
	case !validImpUID(p.impUID):
		return gatewayPayment{}, errors.New("the payment has no imp_uid")
	case p.merchantUID == "" || p.status == "" || p.currency == "":
		return gatewayPayment{}, errors.New("the payment lacks its merchant_uid, status or currency")
	case object.Amount == nil || object.CancelAmount == nil:
		return gatewayPayment{}, errors.New("the payment lacks its amounts")
	case object.PaidAt < 0 || object.PaidAt > lastSecond:
		return gatewayPayment{}, errors.New("the payment's time is out of range")
	}
	if object.PaidAt > 0 {
		p.paidAt = time.Unix(object.PaidAt, 0).UTC()
	}
	amount, ok1 := exactNumber(object.Amount)
	cancelled, ok2 := exactNumber(object.CancelAmount)
	if !ok1 || !ok2 {
		return gatewayPayment{}, errors.New("an amount is not a number")
	}
	if p.isKRW() {
		if !wholeWon(amount) || !wholeWon(cancelled) {
			return gatewayPayment{}, errors.New("an amount is not of whole won")
		}
		p.amount, p.cancelled = amount.Num().Int64(), cancelled.Num().Int64()
	}
	p.awaitsDeposit = p.status == gatewayReady && p.paidAt.IsZero() && p.payMethod == payMethodVirtualAccount && textOf(object.AccountNo) != ""
	// paid_at alone should tell whether money moved. But what was given back was paid before, even if a refund
	// should clear paid_at: no recorded answer does, but a refund would then never be seen to succeed.
	p.moved = amount.Sign() > 0 && (!p.paidAt.IsZero() || cancelled.Sign() > 0)
	p.fullyRefunded = p.moved && cancelled.Cmp(amount) >= 0
	if p.moved && p.status == gatewayCancelled && cancelled.Sign() == 0 {
		// No recorded answer is like this either. All of the money may be back, or none. To take it for a refund may
		// cost the buyer what they paid, to take it for a payment may cost the shop a painting: a person has to look.
		return gatewayPayment{}, errors.New("the payment was paid and is cancelled, but no amount is given back")
	}
	return p, nil
}

// numberPattern bounds what exact arithmetic has to work on: 1e999999999 is a JSON number too.
var numberPattern = regexp.MustCompile(`^\d{1,18}(\.\d{1,18})?([eE][+-]?\d{1,2})?$`)

// exactNumber reads a JSON number of any spelling (5900, 5900.0, 5.9e3) that is not negative.
func exactNumber(number json.RawMessage) (*big.Rat, bool) {
	if !numberPattern.Match(number) {
		return nil, false
	}
	return new(big.Rat).SetString(string(number))
}

func wholeWon(amount *big.Rat) bool { return amount.IsInt() && amount.Num().IsInt64() }

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

// accessToken is compared by its address: the gateway may give the same string again.
type accessToken struct {
	value string
	until time.Time // by our clock, the margin taken off
}

// tokenRenewal is a renewal under way; token and err may be read once done is closed.
type tokenRenewal struct {
	done  chan struct{}
	token *accessToken
	err   error
}

// freshToken returns the shared token, after a renewal if it is due or if the token is still the rejected one
// (nil: none was). All callers wait for the same renewal, each as long as its own context lasts.
func (g *iamportClient) freshToken(ctx context.Context, call string, rejected *accessToken) (*accessToken, error) {
	g.mu.Lock()
	if g.token == rejected {
		g.token = nil
	}
	if token := g.token; token != nil && g.now().Before(token.until) {
		g.mu.Unlock()
		return token, nil
	}
	if g.renewal == nil {
		g.renewal = &tokenRenewal{done: make(chan struct{})}
		go g.renewToken(g.renewal)
	}
	renewal := g.renewal
	g.mu.Unlock()

	select {
	case <-renewal.done:
		return renewal.token, renewal.err
	case <-ctx.Done():
		err := fmt.Errorf("waiting for a token: %w", ctx.Err())
		return nil, &gatewayError{status: http.StatusGatewayTimeout, call: call, err: err}
	}
}

// renewToken has a time of its own: the caller who started it may go away while others wait.
func (g *iamportClient) renewToken(r *tokenRenewal) {
	ctx, end := g.begin(context.Background(), "token", g.lookUpLimit)
	r.token, r.err = g.requestToken(ctx)
	end(r.err)

	g.mu.Lock()
	g.token, g.renewal = r.token, nil
	g.mu.Unlock()
	close(r.done)
}

func (g *iamportClient) requestToken(ctx context.Context) (*accessToken, error) {
	asked := g.now()
	keys := map[string]string{"imp_key": g.key, "imp_secret": g.secret}
	call := gatewayCall{name: "token", method: http.MethodPost, path: "/users/getToken", body: keys}
	status, body, err := g.exchange(ctx, call, "")
	if err != nil {
		return nil, err
	}
	if status == http.StatusUnauthorized {
		return nil, brokenAnswer("token", errors.New("the gateway rejects our keys"))
	}
	response, err := openEnvelope("token", status, body)
	if _, refused := errors.AsType[*gatewayRefusal](err); refused || errors.Is(err, errNoPayment) {
		return nil, brokenAnswer("token", errors.New("the gateway gives no token for our keys"))
	}
	if err != nil {
		return nil, err
	}
	var object struct {
		AccessToken string `json:"access_token"`
		ExpiredAt   int64  `json:"expired_at"` // Unix seconds by the gateway's clock, as is Now
		Now         int64  `json:"now"`
	}
	if err := decodeAnswer(response, &object); err != nil {
		return nil, brokenAnswer("token", err)
	}
	if object.AccessToken == "" || object.Now <= 0 || object.ExpiredAt <= object.Now {
		return nil, brokenAnswer("token", errors.New("the answer holds no usable token"))
	}
	life := time.Duration(min(object.ExpiredAt-object.Now, 24*60*60)) * time.Second
	return &accessToken{object.AccessToken, asked.Add(life - tokenMargin)}, nil
}
