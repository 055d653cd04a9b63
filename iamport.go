package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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

// gatewayStatus is a payment's status as the gateway names it. There are others than these.
type gatewayStatus string

const (
	gatewayReady     gatewayStatus = "ready" // its window was opened
	gatewayPaid      gatewayStatus = "paid"
	gatewayCancelled gatewayStatus = "cancelled" // after a partial refund too
	gatewayFailed    gatewayStatus = "failed"
)

// gatewayPayment is what the gateway says of one payment.
type gatewayPayment struct {
	impUID, merchantUID string
	status              gatewayStatus
	currency            string    // "KRW"
	amount              int64     // whole won, as first paid; 0 when Currency is not KRW: not ours to book
	cancelled           int64     // whole won given back so far; 0 when Currency is not KRW
	fullyRefunded       bool      // it was paid and nothing is left of it, in whatever currency: all was given back
	sandbox             bool      // made through a test channel: no money moved
	paidAt              time.Time // UTC; zero when never paid
}

// isKRW reports whether the payment is in the one currency the shop sells in.
func (p gatewayPayment) isKRW() bool { return p.currency == "KRW" }

// cancelRequest asks for all that is left of a payment to be given back.
type cancelRequest struct {
	impUID    string
	remaining int64 // whole won not yet given back, as we believe; if not so, the gateway does nothing
	isKRW     bool  // the payment is in KRW; a foreign one is cancelled without comparing Remaining
	reason    string
	account   *refundAccount
}

// errNoPayment means that the gateway answered and knows no such payment. A payment of a test channel
// is none either, unless iamportConfig.Sandbox is set.
var errNoPayment = errors.New("the gateway knows no such payment")

// gatewayRefusal means that the gateway answered and did nothing: HTTP 200 with a code that is not 0.
type gatewayRefusal struct {
	code    int    // 1: a rule of the gateway's own; -1: the card company or its like said no
	message string // often the card company's words, which may name a buyer: log the Refusal, not this
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
	// Status is 502 for a broken answer or our keys rejected; 503 when it is unreachable, answers 5xx or no
	// slot was free in time; 504 for no answer in time, or when the caller went away (Err is then
	// context.Canceled).
	status int
	call   string // "token", "payment", "find", "findAll", "cancel"
	err    error  // the cause, without keys, tokens or anything of an answer's content
}

func (e *gatewayError) Error() string { return "gateway " + e.call + ": " + e.err.Error() }
func (e *gatewayError) Unwrap() error { return e.err }

// iamportConfig says which Iamport account to use, and how.
type iamportConfig struct {
	url, key, secret string
	sandbox          bool              // also accept payments of test channels (staging)
	now              func() time.Time  // nil: time.Now
	transport        http.RoundTripper // nil: a transport of its own with sane limits
	// Observe is told of every call when it ends, except one whose caller went away. Call is as in
	// gatewayError, outcome "ok", "none", "refused", "broken", "unreachable" or "timeout", err the one that
	// its caller gets; took includes all waiting.
	observe func(call, outcome string, err error, took time.Duration) // nil: nobody
}

// iamportClient is a client of Iamport's (PortOne V1) REST API. It is safe for concurrent use and meant to be shared:
// its callers use one access token, and at most 16 calls are under way at once.
type iamportClient struct {
	url, key, secret string
	sandbox          bool
	now              func() time.Time
	observe          func(call, outcome string, err error, took time.Duration)
	client           *http.Client

	lookUpLimit, cancelLimit time.Duration // each for a whole call, its waiting and its token included
	lookUps, cancels         chan struct{} // slots; apart, so that neither kind waits for the other

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
	maxAnswer   = 1 << 20          // bytes of an answer's body
	tokenMargin = 30 * time.Second // of 60 s at most: asked earlier, the gateway gives the same token again
	maxPages    = 10               // of 100 payments each, for one merchant_uid
)

// newIamportClient makes a client; nothing is asked of the gateway before the first call.
func newIamportClient(c iamportConfig) *iamportClient {
	g := &iamportClient{
		url: strings.TrimRight(c.url, "/"), key: c.key, secret: c.secret, sandbox: c.sandbox,
		now: c.now, observe: c.observe,
		lookUpLimit: 5 * time.Second, cancelLimit: 60 * time.Second,
		lookUps: make(chan struct{}, maxLookUps), cancels: make(chan struct{}, maxCancels),
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
	p, err := decodePayment(response)
	switch {
	case err != nil:
		return gatewayPayment{}, brokenAnswer("payment", err)
	case p.impUID != impUID:
		return gatewayPayment{}, brokenAnswer("payment", errors.New("the answer is about another imp_uid"))
	case p.sandbox && !g.sandbox:
		return gatewayPayment{}, errNoPayment
	}
	return p, nil
}

// paidPayment looks up the newest payment of merchantUID that is paid and not refunded, not even in part.
func (g *iamportClient) paidPayment(ctx context.Context, merchantUID string) (gatewayPayment, error) {
	ctx, end := g.begin(ctx, "find", g.lookUpLimit)
	p, err := g.fetchPaidPayment(ctx, merchantUID)
	end(err)
	return p, err
}

func (g *iamportClient) fetchPaidPayment(ctx context.Context, merchantUID string) (gatewayPayment, error) {
	response, err := g.lookUp(ctx, "find", "/payments/find/"+url.PathEscape(merchantUID)+"/paid")
	if err != nil {
		return gatewayPayment{}, err
	}
	p, err := g.decodeFound("find", response, merchantUID)
	if err != nil {
		return gatewayPayment{}, err
	}
	if p.sandbox && !g.sandbox {
		// There is no filter here: a newer payment of a test channel must not hide an older true one.
		all, err := g.listPayments(ctx, merchantUID, gatewayPaid)
		if err != nil {
			return gatewayPayment{}, err
		}
		if len(all) == 0 {
			return gatewayPayment{}, errNoPayment
		}
		p = all[len(all)-1]
	}
	return p, nil
}

// paymentsOf lists every payment of merchantUID with which money has moved: first those that are paid, then those
// given back, in part or whole; of each the first begun first. None is an empty list, not an error. Windows that were
// opened and not paid are left out: a buyer may open any number.
func (g *iamportClient) paymentsOf(ctx context.Context, merchantUID string) (all []gatewayPayment, err error) {
	ctx, end := g.begin(ctx, "findAll", g.lookUpLimit)
	defer func() { end(err) }()
	for _, status := range []gatewayStatus{gatewayPaid, gatewayCancelled} {
		some, err := g.listPayments(ctx, merchantUID, status)
		if err != nil {
			return nil, err
		}
		all = append(all, some...)
	}
	return all, nil
}

// listPayments lists the payments of merchantUID in a status. It asks for the oldest first, so that a payment made
// meanwhile does not move the pages.
func (g *iamportClient) listPayments(ctx context.Context, merchantUID string, status gatewayStatus) ([]gatewayPayment, error) {
	var all []gatewayPayment
	path := "/payments/findAll/" + url.PathEscape(merchantUID) + "/" + string(status) + "?sorting=started&limit=100&page="
	for page := 1; page != 0; {
		response, err := g.lookUp(ctx, "findAll", path+strconv.Itoa(page))
		if errors.Is(err, errNoPayment) {
			break
		}
		if err != nil {
			return nil, err
		}
		var found struct {
			Next int
			List []json.RawMessage
		}
		if err := decodeAnswer(response, &found); err != nil {
			return nil, brokenAnswer("findAll", err)
		}
		for _, one := range found.List {
			p, err := g.decodeFound("findAll", one, merchantUID)
			if err != nil {
				return nil, err
			}
			if !p.sandbox || g.sandbox {
				all = append(all, p)
			}
		}
		if found.Next != 0 && (found.Next != page+1 || found.Next > maxPages) {
			return nil, brokenAnswer("findAll", errors.New("the pages do not come to an end"))
		}
		page = found.Next
	}
	return all, nil
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
	response, err := g.call(ctx, g.cancels, gatewayCall{"cancel", http.MethodPost, "/payments/cancel", request})
	if err != nil {
		return gatewayPayment{}, err
	}
	p, err := decodePayment(response)
	if err == nil && p.impUID != c.impUID {
		err = errors.New("the answer is about another imp_uid")
	}
	if err != nil {
		return gatewayPayment{}, brokenAnswer("cancel", err)
	}
	return p, nil
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

// gatewayOutcome is "" when the caller went away: that says nothing of the gateway.
func gatewayOutcome(err error) string {
	var refusal *gatewayRefusal
	var failure *gatewayError
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, context.Canceled):
		return ""
	case errors.Is(err, errNoPayment):
		return "none"
	case errors.As(err, &refusal):
		return "refused"
	case errors.As(err, &failure) && failure.status == http.StatusServiceUnavailable:
		return "unreachable"
	case errors.As(err, &failure) && failure.status == http.StatusGatewayTimeout:
		return "timeout"
	}
	return "broken"
}

type gatewayCall struct {
	name, method, path string
	body               any // nil: none
}

func (g *iamportClient) lookUp(ctx context.Context, name, path string) (json.RawMessage, error) {
	return g.call(ctx, g.lookUps, gatewayCall{name, http.MethodGet, path, nil})
}

// call makes one call with the shared token and answers the envelope's response. When the gateway turns the
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
		if status != http.StatusUnauthorized {
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
		return 0, nil, &gatewayError{http.StatusServiceUnavailable, c.name, err}
	}
	return g.exchange(ctx, c, token)
}

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
			return 0, nil, &gatewayError{http.StatusGatewayTimeout, c.name, ctx.Err()}
		}
		return 0, nil, &gatewayError{http.StatusServiceUnavailable, c.name, connectionError(err)}
	}
	defer answer.Body.Close()
	body, err = io.ReadAll(io.LimitReader(answer.Body, maxAnswer+1))
	switch {
	case err != nil && ctx.Err() != nil:
		return 0, nil, &gatewayError{http.StatusGatewayTimeout, c.name, ctx.Err()}
	case answer.StatusCode >= 500 || answer.StatusCode == http.StatusTooManyRequests:
		err := fmt.Errorf("HTTP status %d", answer.StatusCode)
		return 0, nil, &gatewayError{http.StatusServiceUnavailable, c.name, err}
	case err != nil:
		return 0, nil, brokenAnswer(c.name, fmt.Errorf("answer cut short: %w", err))
	case len(body) > maxAnswer:
		return 0, nil, brokenAnswer(c.name, errors.New("answer too long"))
	}
	return answer.StatusCode, body, nil
}

// connectionError keeps the causes known to show nothing of what was sent or answered: net/http quotes a
// malformed answer.
func connectionError(err error) error {
	var network *net.OpError
	var certificate *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	switch {
	case errors.As(err, &network):
		return network
	case errors.As(err, &certificate):
		return certificate
	case errors.As(err, &record):
		return record
	case errors.Is(err, io.EOF):
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

// openEnvelope answers what a well-formed success holds. A 404 without an envelope is somebody else's, a
// proxy's say: it must not pass for "no such payment".
func openEnvelope(call string, status int, body []byte) (json.RawMessage, error) {
	if status != http.StatusOK && status != http.StatusNotFound {
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

// decodeFound decodes a payment that was looked up by its merchant_uid.
func (g *iamportClient) decodeFound(call string, response []byte, merchantUID string) (gatewayPayment, error) {
	p, err := decodePayment(response)
	if err == nil && p.merchantUID != merchantUID {
		err = errors.New("the answer is about another merchant_uid")
	}
	if err != nil {
		return gatewayPayment{}, brokenAnswer(call, err)
	}
	return p, nil
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
		impUID: object.ImpUID, merchantUID: object.MerchantUID,
		status: object.Status, currency: object.Currency, sandbox: object.Sandbox,
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
	p.fullyRefunded = p.status == gatewayCancelled && cancelled.Cmp(amount) >= 0
	if p.isKRW() {
		if !wholeWon(amount) || !wholeWon(cancelled) {
			return gatewayPayment{}, errors.New("an amount is not of whole won")
		}
		p.amount, p.cancelled = amount.Num().Int64(), cancelled.Num().Int64()
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
	var mismatch *json.UnmarshalTypeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &mismatch) && mismatch.Field != "":
		return fmt.Errorf("the answer's %s has the wrong type", mismatch.Field)
	}
	return errors.New("the answer is not the JSON it should be")
}

func brokenAnswer(call string, err error) error {
	return &gatewayError{http.StatusBadGateway, call, err}
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

// freshToken answers the shared token, after a renewal if it is due or if the token is still the rejected one
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
		return nil, &gatewayError{http.StatusGatewayTimeout, call, err}
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
	status, body, err := g.exchange(ctx, gatewayCall{"token", http.MethodPost, "/users/getToken", keys}, "")
	if err != nil {
		return nil, err
	}
	if status == http.StatusUnauthorized {
		return nil, brokenAnswer("token", errors.New("the gateway rejects our keys"))
	}
	response, err := openEnvelope("token", status, body)
	var refusal *gatewayRefusal
	if errors.As(err, &refusal) || errors.Is(err, errNoPayment) {
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
