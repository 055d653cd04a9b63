package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"math/big"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
)

// iamportConfig says which Iamport account to use, and how.
type iamportConfig struct {
	url, key, secret string
	sandbox          bool              // also accept payments of test channels (staging)
	taxFree          bool              // payments are made tax-free, and go back so
	now              func() time.Time  // nil: time.Now
	transport        http.RoundTripper // nil: a transport of its own with sane limits
	// observe is told of every call when it ends, except one whose caller went away. call is one of gatewayCalls,
	// outcome one of gatewayOutcomes, err the one that its caller gets; took includes all waiting.
	observe func(call, outcome string, err error, took time.Duration) // nil: not observed
}

// iamportClient is a client of Iamport's (PortOne V1) REST API. It is safe for concurrent use and meant to be shared:
// its callers use one access token, and at most 16 calls are under way at once.
type iamportClient struct {
	gatewayWire
	key, secret      string
	sandbox, taxFree bool

	mu      sync.Mutex
	token   *accessToken  // nil: none yet, or the gateway turned it down
	renewal *tokenRenewal // nil: none under way
}

// tokenMargin is at most 60 s: asked earlier, the gateway gives the same token again.
const tokenMargin = 30 * time.Second

// newIamportClient makes a client; nothing is asked of the gateway before the first call.
func newIamportClient(c iamportConfig) *iamportClient {
	return &iamportClient{
		gatewayWire: newGatewayWire(c.url, c.now, c.transport, c.observe),
		key:         c.key, secret: c.secret, sandbox: c.sandbox, taxFree: c.taxFree,
	}
}

func (g *iamportClient) name() gatewayName { return gatewayIamport }

var impUIDPattern = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// validImpUID reports whether s can be an imp_uid at all; anything else is never sent to the gateway.
func validImpUID(s string) bool { return impUIDPattern.MatchString(s) }

// find looks up one payment.
func (g *iamportClient) find(ctx context.Context, key paymentKey) (gatewayPayment, error) {
	return g.payment(ctx, key.impUID)
}

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

// paymentsOf lists of each kind the first begun first.
func (g *iamportClient) paymentsOf(ctx context.Context, merchantUID string) ([]gatewayPayment, error) {
	return g.findAll(ctx, merchantUID, gatewayPaid, gatewayCancelled)
}

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

// movedBetween lists the whole account, other shops' payments included. The order is roughly that of time.
func (g *iamportClient) movedBetween(
	ctx context.Context, status gatewayStatus, from, to time.Time,
) iter.Seq2[gatewayPayment, error] {
	return movedBetween(from, to, func(first, last int64, page int) (paymentPage, error) {
		return g.listPage(ctx, status, first, last, page)
	})
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
func (g *iamportClient) endAccount(ctx context.Context, key paymentKey) error {
	if !validImpUID(key.impUID) {
		return errNoPayment
	}
	ctx, end := g.begin(context.WithoutCancel(ctx), "endAccount", g.cancelLimit)
	_, err := g.call(ctx, g.cancels, gatewayCall{
		name: "endAccount", method: http.MethodDelete, path: "/vbanks/" + url.PathEscape(key.impUID), refusable: true,
	})
	end(err)
	return err
}

// cancelPayment gives back all that is left of a payment, or a part of it. Once begun it goes on when its caller goes away. After a
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
	request := map[string]any{"imp_uid": c.impUID, "reason": c.reason}
	if c.amount > 0 { // without an amount: all that is left
		request["amount"] = c.amount
	}
	if c.isKRW {
		request["checksum"] = c.remaining
	}
	if c.isKRW && g.taxFree {
		request["tax_free"] = cmp.Or(c.amount, c.remaining)
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
		return nil, &gatewayRefusal{strconv.Itoa(*code), envelope.Message}
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
		Refunds      json.RawMessage `json:"cancel_history"`
		PaidAt       int64           `json:"paid_at"` // Unix seconds; 0: never paid
	}
	if err := decodeAnswer(response, &object); err != nil {
		return gatewayPayment{}, err
	}
	p := gatewayPayment{
		gateway: gatewayIamport, impUID: object.ImpUID, merchantUID: object.MerchantUID, status: object.Status,
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
		p.refundReasons, p.refundsListed = decodeRefunds(object.Refunds)
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

// decodeRefunds returns the reasons of the refunds in a payment's cancel_history, one to a line, and the won that they add up to.
// A list that cannot be read has none: the amounts of the payment count, not its list.
func decodeRefunds(list json.RawMessage) (reasons string, won int64) {
	var refunds []struct {
		Amount json.RawMessage `json:"amount"`
		Reason json.RawMessage `json:"reason"`
	}
	if json.Unmarshal(list, &refunds) != nil {
		return "", 0
	}
	for _, r := range refunds {
		if amount, ok := exactNumber(r.Amount); ok && wholeWon(amount) {
			reasons, won = reasons+textOf(r.Reason)+"\n", won+amount.Num().Int64()
		}
	}
	return reasons, won
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
