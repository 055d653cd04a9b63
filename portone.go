package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"time"
)

// portoneConfig says which PortOne account to use, and how. What is not described is as in iamportConfig.
type portoneConfig struct {
	url, secret string
	storeID     string // only this store's payments are ours; "": all that the secret shows
	sandbox     bool
	now         func() time.Time
	transport   http.RoundTripper
	observe     func(call, outcome string, err error, took time.Duration)
}

// portoneClient is a client of PortOne's V2 REST API. It is safe for concurrent use and meant to be shared: at most 15 calls
// are under way at once. A payment's id there, the paymentId, is the id of its order. Several attempts to pay may share it, of
// which at most one is ever paid; the transactionId tells them apart.
type portoneClient struct {
	gatewayWire
	secret, storeID string
	sandbox         bool
}

// newPortoneClient makes a client; nothing is asked of the gateway before the first call.
func newPortoneClient(c portoneConfig) *portoneClient {
	return &portoneClient{
		gatewayWire: newGatewayWire(c.url, c.now, c.transport, c.observe),
		secret:      c.secret, storeID: c.storeID, sandbox: c.sandbox,
	}
}

func (g *portoneClient) name() gatewayName { return gatewayPortOne }

// find looks up the payment of an order. One of another transactionId than key's, if it has one, is not found.
func (g *portoneClient) find(ctx context.Context, key paymentKey) (gatewayPayment, error) {
	if !validID(key.orderID) {
		return gatewayPayment{}, errNoPayment
	}
	ctx, end := g.begin(ctx, "payment", g.lookUpLimit)
	p, err := g.fetchPayment(ctx, key)
	end(err)
	return p, err
}

func (g *portoneClient) fetchPayment(ctx context.Context, key paymentKey) (gatewayPayment, error) {
	path := paymentPath(key.orderID, "")
	if g.storeID != "" {
		path += "?storeId=" + url.QueryEscape(g.storeID)
	}
	answer, err := g.call(ctx, g.lookUps, gatewayCall{name: "payment", method: http.MethodGet, path: path})
	if err != nil {
		return gatewayPayment{}, err
	}
	p, err := g.decodePayment(answer)
	switch {
	case err == nil && p.merchantUID == key.orderID && (key.impUID == "" || key.impUID == p.impUID):
		return p, nil
	case err == nil && p.merchantUID == key.orderID, errors.Is(err, errNoPayment):
		return gatewayPayment{}, errNoPayment
	}
	u := identifyPortone(answer, err)
	switch {
	case u.merchantUID != "" && u.merchantUID != key.orderID:
		return gatewayPayment{}, brokenAnswer("payment", errors.New("the answer is about another paymentId"))
	case !bytes.HasPrefix(answer, []byte("{")):
		return gatewayPayment{}, brokenAnswer("payment", err)
	}
	u.impUID, u.merchantUID = cmp.Or(key.impUID, u.impUID), key.orderID
	return gatewayPayment{}, unreadableError("payment", []unreadablePayment{u})
}

// paymentPath returns the path of a payment, or of something that can be done with it.
func paymentPath(orderID, do string) string { return "/payments/" + url.PathEscape(orderID) + do }

// paymentsOf lists one payment at most: no other attempt of an order can have been paid.
func (g *portoneClient) paymentsOf(ctx context.Context, orderID string) ([]gatewayPayment, error) {
	return g.paymentIn(ctx, orderID, gatewayPaid, gatewayCancelled)
}

func (g *portoneClient) paidPaymentsOf(ctx context.Context, orderID string) ([]gatewayPayment, error) {
	return g.paymentIn(ctx, orderID, gatewayPaid)
}

func (g *portoneClient) paymentIn(ctx context.Context, orderID string, statuses ...gatewayStatus) ([]gatewayPayment, error) {
	p, err := g.find(ctx, paymentKey{orderID: orderID})
	switch {
	case errors.Is(err, errNoPayment):
		return nil, nil
	case err != nil:
		return nil, err
	}
	for _, status := range statuses {
		if p.status == status {
			return []gatewayPayment{p}, nil
		}
	}
	return nil, nil
}

// movedBetween lists the whole store, payments for others than our orders included.
func (g *portoneClient) movedBetween(
	ctx context.Context, status gatewayStatus, from, to time.Time,
) iter.Seq2[gatewayPayment, error] {
	return movedBetween(from, to, func(first, last int64, page int) (paymentPage, error) {
		ctx, end := g.begin(ctx, "list", g.listLimit)
		found, err := g.readPage(ctx, status, first, last, page)
		end(cmp.Or(err, unreadableError("list", found.unreadable)))
		return found, err
	})
}

// portoneFilter is what GET /payments is asked for.
type portoneFilter struct {
	StoreID       string   `json:"storeId,omitempty"`
	From          string   `json:"from"`
	Until         string   `json:"until"`
	TimestampType string   `json:"timestampType"`
	Status        []string `json:"status"`
}

// readPage returns page number page, from 1, of the payments that got into status between two Unix seconds. Whether the gateway
// includes the end that it is given is not known: it is given the second after the last.
func (g *portoneClient) readPage(ctx context.Context, status gatewayStatus, first, last int64, page int) (paymentPage, error) {
	filter := portoneFilter{
		StoreID: g.storeID, From: unixText(first), Until: unixText(last + 1), TimestampType: "STATUS_CHANGED_AT", Status: []string{"PAID"},
	}
	if status == gatewayCancelled {
		filter.Status = []string{"CANCELLED", "PARTIAL_CANCELLED"}
	}
	request := marshalRaw(map[string]any{"page": map[string]int{"number": page - 1, "size": g.pageSize}, "filter": filter})
	answer, err := g.call(ctx, g.lookUps, gatewayCall{
		name: "list", method: http.MethodGet, path: "/payments?requestBody=" + url.QueryEscape(request), maxAnswer: maxPage,
	})
	if err != nil {
		return paymentPage{}, err
	}
	var list struct {
		Items *[]json.RawMessage
		Page  struct{ TotalCount int }
	}
	if err := decodeAnswer(answer, &list); err != nil {
		return paymentPage{}, brokenAnswer("list", err)
	}
	if list.Items == nil {
		return paymentPage{}, brokenAnswer("list", errors.New("the answer has no items"))
	}
	var found paymentPage
	if n := len(*list.Items); n >= g.pageSize || n > 0 && list.Page.TotalCount > (page-1)*g.pageSize+n {
		found.next = page + 1
	}
	if found.next > maxPages {
		return paymentPage{}, brokenAnswer("list", errors.New("the pages do not come to an end"))
	}
	for _, object := range *list.Items {
		p, err := g.decodePayment(object)
		switch {
		case err == nil:
			found.payments = append(found.payments, p)
		case !errors.Is(err, errNoPayment):
			found.unreadable = append(found.unreadable, identifyPortone(object, err))
		}
	}
	return found, nil
}

// unixText returns Unix seconds as the gateway writes times.
func unixText(seconds int64) string { return time.Unix(seconds, 0).UTC().Format(time.RFC3339) }

// endAccount ends the virtual account of an order's payment.
func (g *portoneClient) endAccount(ctx context.Context, key paymentKey) error {
	if !validID(key.orderID) {
		return errNoPayment
	}
	_, err := g.change(ctx, "endAccount", paymentPath(key.orderID, "/virtual-account/close"), "", map[string]any{})
	return err
}

// errRefundTaken says that the gateway has taken a refund, or is still at an earlier request of it, and has not finished it.
var errRefundTaken = errors.New("the gateway has taken the refund and not finished it")

// cancelPayment looks the payment up first. That tells how much of it was paid free of tax, and whether there is a refund
// already that is not finished: then it asks for none. The payment that it returns may be one whose refund is pending.
func (g *portoneClient) cancelPayment(ctx context.Context, c cancelRequest) (gatewayPayment, error) {
	key := paymentKey{orderID: c.orderID, impUID: c.impUID}
	if c.isKRW && c.remaining <= 0 {
		return gatewayPayment{}, errors.New("gateway cancel: nothing is left to give back")
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), g.lookUpLimit+g.cancelLimit)
	defer cancel()
	before, err := g.find(ctx, key)
	if err != nil || before.fullyRefunded || before.refundPending {
		return before, err
	}
	if err := g.sendCancel(ctx, c, before); err != nil {
		return gatewayPayment{}, err
	}
	return g.find(ctx, key)
}

func (g *portoneClient) sendCancel(ctx context.Context, c cancelRequest, before gatewayPayment) error {
	request, taxFree := map[string]any{"reason": c.reason}, before.taxFree
	if c.amount > 0 { // without an amount: all that is left
		request["amount"], taxFree = c.amount, min(taxFree, c.amount)
	}
	if c.isKRW {
		request["currentCancellableAmount"] = c.remaining
	}
	if taxFree > 0 {
		request["taxFreeAmount"] = taxFree
	}
	if a := c.account; a != nil {
		request["refundAccount"] = map[string]string{"bank": a.Bank, "number": a.Number, "holderName": a.Holder}
	}
	// A refund that is tried again because its answer was lost has the same key. What was refused is asked for anew.
	attempt := fmt.Sprintf("lumiere-refund-%s%s-%d-%d-%d", c.impUID, c.part, c.remaining, c.refusals, before.failedRefunds)
	answer, err := g.change(ctx, "cancel", paymentPath(c.orderID, "/cancel"), attempt, request)
	refusal, refused := errors.AsType[*gatewayRefusal](err)
	switch {
	case refused && refusal.code == "IDEMPOTENCY_OUTSTANDING_REQUEST":
		return errRefundTaken
	case refused && c.account != nil:
		refusal.message = c.account.redact(refusal.message) // a bank may repeat what it does not like
		return refusal
	case err != nil:
		return err
	}
	var done struct{ Cancellation *struct{ Status string } }
	if err := decodeAnswer(answer, &done); err != nil {
		return brokenAnswer("cancel", err)
	}
	switch {
	case done.Cancellation == nil:
		return brokenAnswer("cancel", errors.New("the answer has no cancellation"))
	case done.Cancellation.Status == "FAILED":
		return &gatewayRefusal{code: "FAILED"}
	}
	return nil // whether it is done the payment says
}

// confirmRequest asks for a payment to be carried out that its buyer has authenticated.
type confirmRequest struct {
	orderID, token string
	txID           string // the transactionId that the browser names; may be empty
	total          int64  // won
}

// Format keeps the token out of what fmt prints.
func (c confirmRequest) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "(the confirmation of payment %q)", c.orderID)
}

// confirm returns errNoPayment when the order has no payment.
func (g *portoneClient) confirm(ctx context.Context, c confirmRequest) error {
	if !validID(c.orderID) {
		return errNoPayment
	}
	request := map[string]any{"paymentToken": c.token, "currency": "KRW", "totalAmount": c.total}
	if c.txID != "" {
		request["txId"] = c.txID
	}
	if !g.sandbox {
		request["isTest"] = false
	}
	attempt := fmt.Sprintf("lumiere-confirm-%x", sha256.Sum256([]byte(c.orderID+" "+c.token)))
	_, err := g.change(ctx, "confirm", paymentPath(c.orderID, "/confirm"), attempt, request)
	return err
}

// change makes a call that moves money or ends something, and goes on with it when the caller goes away. idempotencyKey may be
// empty.
func (g *portoneClient) change(
	ctx context.Context, name, path, idempotencyKey string, request map[string]any,
) (answer json.RawMessage, err error) {
	if g.storeID != "" {
		request["storeId"] = g.storeID
	}
	ctx, end := g.begin(context.WithoutCancel(ctx), name, g.cancelLimit)
	answer, err = g.call(ctx, g.cancels, gatewayCall{
		name: name, method: http.MethodPost, path: path, body: request, idempotencyKey: idempotencyKey, relaying: true, refusable: true,
	})
	end(err)
	return answer, err
}

// call makes one call and returns what a success holds. A 404 that is none of the gateway's own comes from a proxy: it must not
// pass for "no such payment".
func (g *portoneClient) call(ctx context.Context, slots chan struct{}, c gatewayCall) (json.RawMessage, error) {
	status, body, err := g.exchangeInSlot(ctx, slots, c, "PortOne "+g.secret)
	if err != nil || status == http.StatusOK {
		return body, err
	}
	var failure struct{ Type, Message, PgMessage json.RawMessage }
	json.Unmarshal(body, &failure) // what is not the gateway's has no type
	kind := textOf(failure.Type)
	refusal := &gatewayRefusal{kind, cmp.Or(textOf(failure.PgMessage), textOf(failure.Message))}
	switch {
	case status == http.StatusUnauthorized:
		return nil, brokenAnswer(c.name, errors.New("the gateway rejects our secret"))
	case status == http.StatusNotFound && kind == "PAYMENT_NOT_FOUND":
		return nil, errNoPayment
	case status == http.StatusBadGateway && kind == "PG_PROVIDER":
		return nil, refusal
	case status == http.StatusBadGateway:
		return nil, &gatewayError{status: http.StatusServiceUnavailable, call: c.name, err: errors.New("HTTP status 502")}
	case c.refusable && kind != "" && (status == http.StatusBadRequest || status == http.StatusConflict):
		return nil, refusal
	}
	return nil, brokenAnswer(c.name, fmt.Errorf("HTTP status %d", status))
}

// portonePayment is a payment as the gateway shows it, in as much as is used. What is always there is not optional.
type portonePayment struct {
	ID            string `json:"id"`
	TransactionID string `json:"transactionId"`
	StoreID       string `json:"storeId"`
	Version       string `json:"version"`
	Status        string `json:"status"`
	Currency      string `json:"currency"`
	Channel       *struct {
		Type string `json:"type"`
	} `json:"channel"`
	Amount *struct {
		Total            *int64 `json:"total"`
		TaxFree          int64  `json:"taxFree"`
		Discount         int64  `json:"discount"`
		Cancelled        *int64 `json:"cancelled"`
		CancelledTaxFree int64  `json:"cancelledTaxFree"`
	} `json:"amount"`
	PaidAt        *time.Time `json:"paidAt"`
	Cancellations []struct {
		Status      string          `json:"status"`
		TotalAmount int64           `json:"totalAmount"`
		Reason      json.RawMessage `json:"reason"`
	} `json:"cancellations"`
}

// portoneStatuses has V1's word for each status of V2. What the status leaves open, such as how much went back, the amounts say.
var portoneStatuses = map[string]gatewayStatus{
	"READY": gatewayReady, "PAY_PENDING": gatewayReady, "VIRTUAL_ACCOUNT_ISSUED": gatewayReady, "FAILED": gatewayFailed,
	"PAID": gatewayPaid, "PARTIAL_CANCELLED": gatewayCancelled, "CANCELLED": gatewayCancelled,
}

// decodePayment decodes a payment object. What the gateway always sends has to be there; other fields are ignored. It returns
// errNoPayment for one that is none of ours: made through V1, in another store, or through a test channel.
func (g *portoneClient) decodePayment(answer []byte) (gatewayPayment, error) {
	var whose struct{ Version, StoreID json.RawMessage }
	if json.Unmarshal(answer, &whose) == nil {
		version, store := textOf(whose.Version), textOf(whose.StoreID)
		if version != "" && version != "V2" || g.storeID != "" && store != "" && store != g.storeID {
			return gatewayPayment{}, errNoPayment
		}
	}
	var object portonePayment
	if err := decodeAnswer(answer, &object); err != nil {
		return gatewayPayment{}, err
	}
	switch amount := object.Amount; {
	case object.ID == "" || !validImpUID(object.TransactionID):
		return gatewayPayment{}, errors.New("the payment has no id or transactionId")
	case object.Version == "" || object.StoreID == "" || object.Status == "" || object.Currency == "":
		return gatewayPayment{}, errors.New("the payment lacks its version, storeId, status or currency")
	case amount == nil || amount.Total == nil || amount.Cancelled == nil:
		return gatewayPayment{}, errors.New("the payment lacks its amounts")
	case min(*amount.Total, *amount.Cancelled, amount.TaxFree, amount.Discount, amount.CancelledTaxFree) < 0:
		return gatewayPayment{}, errors.New("an amount is negative")
	}
	p := object.payment()
	switch {
	case p.sandbox && !g.sandbox:
		return gatewayPayment{}, errNoPayment
	case p.moved && object.Status == "CANCELLED" && *object.Amount.Cancelled == 0:
		// As with V1: a person has to look.
		return gatewayPayment{}, errors.New("the payment was paid and is cancelled, but no amount is given back")
	}
	return p, nil
}

// payment returns what a whole object says.
func (o portonePayment) payment() gatewayPayment {
	status, known := portoneStatuses[o.Status]
	if !known {
		status = gatewayStatus(o.Status)
	}
	p := gatewayPayment{gateway: gatewayPortOne, impUID: o.TransactionID, merchantUID: o.ID, status: status, currency: o.Currency}
	if o.PaidAt != nil && o.PaidAt.Unix() > 0 {
		p.paidAt = o.PaidAt.UTC()
	}
	total, cancelled, succeeded := *o.Amount.Total, *o.Amount.Cancelled, int64(0)
	for _, c := range o.Cancellations {
		switch c.Status {
		case "SUCCEEDED":
			succeeded += c.TotalAmount
			p.refundReasons += textOf(c.Reason) + "\n"
		case "REQUESTED":
			p.refundPending = true
		case "FAILED":
			p.failedRefunds++
			p.failedReasons += textOf(c.Reason) + "\n"
		}
	}
	if p.refundPending {
		cancelled = min(cancelled, succeeded) // what is requested is not back, however the gateway counts it
	}
	p.moved = total > 0 && (!p.paidAt.IsZero() || cancelled > 0)
	// What the gateway gave as a discount nobody paid, and nobody gets back.
	p.fullyRefunded = p.moved && (cancelled >= total || o.Status == "CANCELLED" && cancelled >= total-o.Amount.Discount && cancelled > 0)
	if p.fullyRefunded {
		cancelled = max(cancelled, total)
	}
	p.awaitsDeposit = o.Status == "VIRTUAL_ACCOUNT_ISSUED" && !p.moved
	p.sandbox = o.Channel != nil && o.Channel.Type != "LIVE" || o.Channel == nil && p.moved
	if p.isKRW() {
		p.refundsListed = succeeded
		p.amount, p.cancelled, p.taxFree = total, cancelled, max(o.Amount.TaxFree-o.Amount.CancelledTaxFree, 0)
	}
	return p
}

// identifyPortone reads what it can of a payment that decodePayment does not accept because of err.
func identifyPortone(object []byte, err error) unreadablePayment {
	u := unreadablePayment{err: err}
	var fields struct{ ID, TransactionID json.RawMessage }
	if json.Unmarshal(object, &fields) != nil {
		return u
	}
	u.impUID, u.merchantUID = textOf(fields.TransactionID), textOf(fields.ID)
	if !validImpUID(u.impUID) {
		u.impUID = ""
	}
	return u
}
