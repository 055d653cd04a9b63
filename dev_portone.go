package main

import (
	"bytes"
	"cmp"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The V2 side of the fake gateway. Like the true one, V2 shows payments that were made through V1, and V1 shows none of V2's.

// fakeV2 is the Version of a payment made through V2.
const fakeV2 = "V2"

// fakePortonePrefix is where the V2 API is, at the fake gateway's address.
const fakePortonePrefix = "/v2"

// fakeKeyLife is how long a call with the same idempotency key gets the same answer.
const fakeKeyLife = 3 * time.Hour

// fakeV2Answer is an answer of the V2 API: a status and what is encoded as the body.
type fakeV2Answer struct {
	status int
	body   any
}

// fakeStored is the answer that an idempotency key has.
type fakeStored struct {
	answer fakeV2Answer
	at     time.Time
}

// fakeV2Call is a call of the V2 API, read whole.
type fakeV2Call struct {
	*http.Request
	id      string // paymentId
	request fakeV2Request
}

// fakeV2Request has the fields of all requests.
type fakeV2Request struct {
	StoreID       string         `json:"storeId"`
	PaymentToken  string         `json:"paymentToken"`
	TxID          string         `json:"txId"`
	Currency      string         `json:"currency"`
	TotalAmount   *int64         `json:"totalAmount"`
	IsTest        *bool          `json:"isTest"`
	Reason        string         `json:"reason"`
	Amount        *int64         `json:"amount"` // nil: all that is left
	TaxFreeAmount int64          `json:"taxFreeAmount"`
	Cancellable   *int64         `json:"currentCancellableAmount"` // nil: not compared
	RefundAccount *fakeV2Account `json:"refundAccount"`
	Page          struct{ Number, Size int }
	Filter        struct {
		StoreID       string
		From, Until   time.Time
		TimestampType string
		Status        []string
	}
}

type fakeV2Account struct{ Bank, Number, HolderName string }

// handleV2 adds the V2 API to the fake gateway's own.
func (g *fakeGateway) handleV2() {
	var mux http.ServeMux
	for pattern, work := range map[string]func(fakeV2Call) fakeV2Answer{
		"GET /payments/{id}":                        g.answerV2Payment,
		"GET /payments":                             g.answerV2List,
		"POST /payments/{id}/cancel":                g.answerV2Cancel,
		"POST /payments/{id}/confirm":               g.answerV2Confirm,
		"POST /payments/{id}/virtual-account/close": g.answerV2Close,
	} {
		mux.HandleFunc(pattern, g.v2Handler(work))
	}
	g.mux.Handle(fakePortonePrefix+"/", http.StripPrefix(fakePortonePrefix, &mux))
}

// fakeV2Problem is an error as the V2 API answers it. Its message is for people alone.
func fakeV2Problem(status int, kind string) fakeV2Answer {
	return fakeV2Answer{status, map[string]any{"type": kind, "message": "요청을 처리하지 못했습니다.", "unknown": true}}
}

// v2Handler runs one call. Only the work itself holds the lock.
func (g *fakeGateway) v2Handler(work func(fakeV2Call) fakeV2Answer) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		g.mu.Lock()
		answer := g.answerV2(w, r, work)
		g.mu.Unlock()
		writeFakeJSON(w, answer.status, answer.body)
	}
}

// answerV2 needs the lock. A POST whose key has been there before gets the answer that it got then.
func (g *fakeGateway) answerV2(w http.ResponseWriter, r *http.Request, work func(fakeV2Call) fakeV2Answer) fakeV2Answer {
	if r.Header.Get("Authorization") != "PortOne "+g.apiSecret {
		return fakeV2Problem(http.StatusUnauthorized, "UNAUTHORIZED")
	}
	call := fakeV2Call{Request: r, id: r.PathValue("id")}
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
	if r.Method == http.MethodGet && len(text) == 0 {
		text = []byte(r.URL.Query().Get("requestBody"))
		call.request.StoreID = r.URL.Query().Get("storeId")
	}
	if err == nil && len(text) > 0 {
		err = json.Unmarshal(text, &call.request)
	}
	if err != nil {
		return fakeV2Problem(http.StatusBadRequest, "INVALID_REQUEST")
	}
	if store := cmp.Or(call.request.StoreID, call.request.Filter.StoreID); store != "" && store != g.storeID {
		return fakeV2Problem(http.StatusForbidden, "FORBIDDEN")
	}
	header := r.Header.Get("Idempotency-Key")
	if header == "" || r.Method == http.MethodGet {
		return work(call)
	}
	key, err := strconv.Unquote(header)
	if err != nil || len(key) < 16 || len(key) > 256 || !strings.HasPrefix(header, `"`) {
		return fakeV2Problem(http.StatusBadRequest, "INVALID_REQUEST")
	}
	if before, ok := g.answered[key]; ok && g.now().Sub(before.at) < fakeKeyLife {
		return before.answer
	}
	answer := work(call)
	g.answered[key] = fakeStored{answer, g.now()}
	return answer
}

// v2Payment returns the payment that an id shows: the attempt that was paid, or else the last. One of V1 it shows when V2 has
// none.
func (g *fakeGateway) v2Payment(id string) (found *fakePayment) {
	rank := func(p *fakePayment) int {
		switch {
		case p == nil:
			return 0
		case p.Version != fakeV2:
			return 1
		case p.PaidAt.IsZero():
			return 2
		}
		return 3
	}
	for _, p := range g.payments {
		if p.MerchantUID == id && rank(p) >= rank(found) {
			found = p
		}
	}
	return found
}

// v1Payment returns the payment of an imp_uid, unless it was made through V2.
func (g *fakeGateway) v1Payment(impUID string) *fakePayment {
	if p := g.byImpUID[impUID]; p != nil && p.Version != fakeV2 {
		return p
	}
	return nil
}

var fakeV2NotFound = fakeV2Problem(http.StatusNotFound, "PAYMENT_NOT_FOUND")

func (g *fakeGateway) answerV2Payment(c fakeV2Call) fakeV2Answer {
	p := g.v2Payment(c.id)
	if p == nil {
		return fakeV2NotFound
	}
	return fakeV2Answer{http.StatusOK, g.v2Object(p)}
}

// answerV2List lists the payments of both versions by the time of their status's last change, shown listDelay after it.
func (g *fakeGateway) answerV2List(c fakeV2Call) fakeV2Answer {
	filter, page := c.request.Filter, c.request.Page
	size := cmp.Or(page.Size, 10)
	if filter.TimestampType != "STATUS_CHANGED_AT" || filter.Until.Before(filter.From) || filter.Until.Sub(filter.From) > 90*24*time.Hour ||
		page.Number < 0 || size < 1 || (page.Number+1)*size > 60_000 {
		return fakeV2Problem(http.StatusBadRequest, "INVALID_REQUEST")
	}
	found := []any{}
	for _, p := range g.payments {
		at := p.LastChanged
		if len(filter.Status) > 0 && !slices.Contains(filter.Status, p.v2Status()) || g.now().Sub(at) < g.listDelay ||
			at.Before(filter.From) || at.After(filter.Until) {
			continue
		}
		found = append(found, g.v2Object(p))
	}
	items := found[min(page.Number*size, len(found)):min((page.Number+1)*size, len(found))]
	return fakeV2Answer{http.StatusOK, map[string]any{
		"items": items, "page": map[string]int{"number": page.Number, "size": size, "totalCount": len(found)}}}
}

// answerV2Cancel gives money back, or takes the refund and lets it wait when RefundsLate is set.
func (g *fakeGateway) answerV2Cancel(c fakeV2Call) fakeV2Answer {
	p := g.v2Payment(c.id)
	if p == nil {
		return fakeV2NotFound
	}
	left, taxFree := p.Amount-p.Cancelled-p.requested(), p.TaxFree-p.cancelledTaxFree()
	amount := left
	if c.request.Amount != nil {
		amount = *c.request.Amount
	}
	conflict := ""
	switch {
	case p.PaidAt.IsZero():
		conflict = "PAYMENT_NOT_PAID"
	case p.Cancelled >= p.Amount:
		conflict = "PAYMENT_ALREADY_CANCELLED"
	case c.request.Cancellable != nil && *c.request.Cancellable != left:
		conflict = "CANCELLABLE_AMOUNT_CONSISTENCY_BROKEN"
	case amount <= 0 || amount > left:
		conflict = "CANCEL_AMOUNT_EXCEEDS_CANCELLABLE_AMOUNT"
	case c.request.TaxFreeAmount > taxFree:
		conflict = "CANCEL_TAX_FREE_AMOUNT_EXCEEDS_CANCELLABLE_TAX_FREE_AMOUNT"
	case amount-c.request.TaxFreeAmount > left-taxFree:
		conflict = "CANCEL_TAX_AMOUNT_EXCEEDS_CANCELLABLE_TAX_AMOUNT"
	case p.PayMethod == "vbank" && c.request.RefundAccount == nil:
		return fakeV2Problem(http.StatusBadRequest, "INVALID_REQUEST")
	case p.RefundsRefused != "":
		return fakeV2Answer{http.StatusBadGateway, map[string]any{"type": "PG_PROVIDER", "pgCode": "2015", "pgMessage": p.RefundsRefused}}
	}
	if conflict != "" {
		return fakeV2Problem(http.StatusConflict, conflict)
	}
	if p.RefundsLate {
		p.Refunds = append(p.Refunds, fakeRefund{
			ID: rand.Text(), Reason: c.request.Reason, Amount: amount, At: g.now(), TaxFree: c.request.TaxFreeAmount, State: "REQUESTED"})
		g.save()
	} else {
		g.giveBack(p, amount, c.request.Reason)
		p.Refunds[len(p.Refunds)-1].TaxFree = c.request.TaxFreeAmount
	}
	return fakeV2Answer{http.StatusOK, map[string]any{"cancellation": p.Refunds[len(p.Refunds)-1].v2Object()}}
}

// endRefund ends the refund of a payment that waits: the money is back, or the refund failed. It needs the lock.
func (g *fakeGateway) endRefund(p *fakePayment, done bool) (problem string) {
	if p == nil {
		return fakeNoTarget
	}
	for i := range p.Refunds {
		refund := &p.Refunds[i]
		if refund.State != "REQUESTED" {
			continue
		}
		if refund.State = "FAILED"; done {
			refund.State, p.Status = "", "cancelled"
			p.Cancelled, p.CancelledAt, p.LastChanged = p.Cancelled+refund.Amount, g.now(), g.now()
		}
		g.save()
		return ""
	}
	return fakeNoTarget
}

// answerV2Confirm charges a payment under manual approval.
func (g *fakeGateway) answerV2Confirm(c fakeV2Call) fakeV2Answer {
	p := g.v2Payment(c.id)
	switch {
	case p == nil:
		return fakeV2NotFound
	case !p.PaidAt.IsZero():
		return fakeV2Problem(http.StatusConflict, "ALREADY_PAID")
	case p.PaymentToken == "" || c.request.PaymentToken != p.PaymentToken || p.Status != "ready":
		return fakeV2Problem(http.StatusBadRequest, "INVALID_PAYMENT_TOKEN")
	case c.request.TotalAmount != nil && *c.request.TotalAmount != p.Amount, c.request.Currency != "" && c.request.Currency != p.Currency,
		c.request.IsTest != nil && *c.request.IsTest != p.Sandbox, c.request.TxID != "" && c.request.TxID != p.ImpUID:
		return fakeV2Problem(http.StatusConflict, "INFORMATION_MISMATCH")
	case p.ConfirmRefused != "":
		return fakeV2Answer{http.StatusBadGateway, map[string]any{"type": "PG_PROVIDER", "pgCode": "1001", "pgMessage": p.ConfirmRefused}}
	}
	p.Status, p.PaidAt, p.LastChanged = "paid", g.now(), g.now()
	g.save()
	return fakeV2Answer{http.StatusOK, map[string]any{"pgTxId": "fake_tid", "paidAt": p.PaidAt}}
}

func (g *fakeGateway) answerV2Close(c fakeV2Call) fakeV2Answer {
	p := g.v2Payment(c.id)
	if p == nil {
		return fakeV2NotFound
	}
	if g.endAccount(p) != "" {
		return fakeV2Problem(http.StatusConflict, "PAYMENT_NOT_WAITING_FOR_DEPOSIT")
	}
	return fakeV2Answer{http.StatusOK, map[string]any{"closedAt": p.CancelledAt}}
}

// v2Status is a payment's status in V2's words.
func (p *fakePayment) v2Status() string {
	switch {
	case p.Status == "cancelled" && p.Cancelled > 0 && p.Cancelled < p.Amount:
		return "PARTIAL_CANCELLED"
	case p.Status == "ready" && p.Account != "":
		return "VIRTUAL_ACCOUNT_ISSUED"
	}
	return strings.ToUpper(p.Status)
}

// requested is how much of a payment is on its way back.
func (p *fakePayment) requested() (won int64) {
	for _, r := range p.Refunds {
		if r.State == "REQUESTED" {
			won += r.Amount
		}
	}
	return won
}

func (p *fakePayment) cancelledTaxFree() (won int64) {
	for _, r := range p.Refunds {
		if r.State != "FAILED" {
			won += r.TaxFree
		}
	}
	return won
}

func (r fakeRefund) v2Object() map[string]any {
	shown := map[string]any{"status": cmp.Or(r.State, "SUCCEEDED"), "id": r.ID, "totalAmount": r.Amount, "taxFreeAmount": r.TaxFree,
		"vatAmount": 0, "reason": r.Reason, "requestedAt": r.At, "trigger": "API"}
	if r.State == "" {
		shown["cancelledAt"] = r.At
	}
	return shown
}

// v2Object is a payment as the V2 API shows it, fields that our client has to ignore included.
func (g *fakeGateway) v2Object(p *fakePayment) map[string]any {
	cancellations := []any{}
	for _, r := range p.Refunds {
		cancellations = append(cancellations, r.v2Object())
	}
	kind := "LIVE"
	if p.Sandbox {
		kind = "TEST"
	}
	paid := p.Amount
	if p.PaidAt.IsZero() {
		paid = 0
	}
	shown := map[string]any{
		"id": p.MerchantUID, "transactionId": p.ImpUID, "storeId": g.storeID, "merchantId": "merchant-fake", "version": cmp.Or(p.Version, "V1"),
		"status": p.v2Status(), "requestedAt": p.StartedAt, "updatedAt": p.LastChanged, "statusChangedAt": p.LastChanged,
		"orderName": "Lumiere", "currency": p.Currency, "customer": map[string]any{}, "promotionId": nil,
		"amount": map[string]any{"total": p.Amount, "taxFree": p.TaxFree, "vat": 0, "supply": p.Amount - p.TaxFree, "discount": 0, "paid": paid,
			"cancelled": p.Cancelled, "cancelledTaxFree": p.cancelledTaxFree()},
		"channel": map[string]any{"type": kind, "id": "channel-fake", "key": "channel-key-fake", "name": "fake", "pgProvider": "TOSSPAYMENTS"},
		"method":  map[string]any{"type": "PaymentMethodCard"}, "unknown": []any{1, "둘"},
	}
	if len(cancellations) > 0 {
		shown["cancellations"] = cancellations
	}
	if !p.PaidAt.IsZero() {
		shown["paidAt"] = p.PaidAt
	}
	return shown
}

// fakeNoticeTypes has V2's word for what a notice tells, by the status that the payment is in.
var fakeNoticeTypes = map[string]string{
	"PAID": "Transaction.Paid", "CANCELLED": "Transaction.Cancelled", "PARTIAL_CANCELLED": "Transaction.PartialCancelled",
	"FAILED": "Transaction.Failed", "READY": "Transaction.Ready", "VIRTUAL_ACCOUNT_ISSUED": "Transaction.VirtualAccountIssued",
}

// noticeOf returns the notice that the gateway gives of a payment. One of V2 is signed.
func (g *fakeGateway) noticeOf(p fakePayment) (http.Header, []byte) {
	if p.Version != fakeV2 {
		return http.Header{"Content-Type": {"application/json"}},
			[]byte(marshalRaw(map[string]string{"imp_uid": p.ImpUID, "merchant_uid": p.MerchantUID, "status": p.Status}))
	}
	body := []byte(marshalRaw(map[string]any{
		"type": fakeNoticeTypes[p.v2Status()], "timestamp": g.now().UTC(),
		"data": map[string]string{"storeId": g.storeID, "paymentId": p.MerchantUID, "transactionId": p.ImpUID}}))
	return signedNotice(g.webhookSecret, "msg_"+rand.Text(), g.now(), body), body
}

// signedNotice returns the headers of a notice, as Standard Webhooks has them. It signs by itself, so that an error in our own
// signatures is not made twice.
func signedNotice(secret []byte, id string, at time.Time, body []byte) http.Header {
	seconds := strconv.FormatInt(at.Unix(), 10)
	mac := hmac.New(sha256.New, secret)
	mac.Write(bytes.Join([][]byte{[]byte(id), []byte(seconds), body}, []byte(".")))
	return http.Header{"Content-Type": {"application/json"}, "Webhook-Id": {id}, "Webhook-Timestamp": {seconds},
		"Webhook-Signature": {"v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))}}
}

// newTransactionID is random, as newImpUID is.
func newTransactionID() string {
	random := make([]byte, 16)
	rand.Read(random) // never fails
	return fmt.Sprintf("%x-%x-%x-%x-%x", random[:4], random[4:6], random[6:8], random[8:10], random[10:])
}
