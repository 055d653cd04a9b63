package main

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// fakeGateway is an Iamport and a PortOne in memory: their REST APIs as an http.Handler, the payment window and the console
// as methods. No money moves. It serves local development and the tests, never a configured deployment.
// It is safe for concurrent use.
type fakeGateway struct {
	key, secret        string // the only keys it gives a token for
	apiSecret, storeID string // of V2
	webhookSecret      []byte // V2's notices are signed with it
	// notify stands for the webhook, with the notice that noticeOf makes; set it before the first call. Nil: no notices.
	notify func(fakePayment)
	// listDelay is how long a changed payment is missing from the lists by time; set it before the first call.
	listDelay time.Duration

	now func() time.Time
	mux http.ServeMux

	mu           sync.Mutex
	payments     []*fakePayment // in the order their windows were opened
	byImpUID     map[string]*fakePayment
	token        string
	tokenExpires time.Time
	file         string                // "": not kept
	answered     map[string]fakeStored // by idempotency key
}

// fakePayment is a payment as the gateway knows it. Amounts are in the currency's major unit.
type fakePayment struct {
	ImpUID, MerchantUID, Status, Currency                 string
	Amount, Cancelled                                     int64
	Sandbox                                               bool
	StartedAt, PaidAt, FailedAt, CancelledAt, LastChanged time.Time
	Refunds                                               []fakeRefund
	PayMethod                                             string    // "" is "card"
	Account                                               string    // the number of a virtual account, once it is issued
	AccountUntil                                          time.Time // the last moment for a deposit into it
	RefundsRefused                                        string    // what the card company says to every refund; "": it makes them

	// What only V2 has.
	Version        string // fakeV2; "": the payment is V1's
	TaxFree        int64  // of Amount
	RefundsLate    bool   // refunds by the API are taken, and end later: see endRefund
	PaymentToken   string // under manual approval, what confirms the payment
	ConfirmRefused string // what the card company says to the confirmation; "": it charges
}

// fakeRefund is one refund, by the API or in the console.
type fakeRefund struct {
	ID, Reason string
	Amount     int64
	At         time.Time
	TaxFree    int64  // of Amount; V2's
	State      string // V2's: REQUESTED or FAILED; "": the money is back
}

// newFakeGateway makes one with no payments and keys of its own. Now nil: time.Now.
func newFakeGateway(now func() time.Time) *fakeGateway {
	if now == nil {
		now = time.Now
	}
	g := &fakeGateway{
		key: "fake-key-" + rand.Text(), secret: "fake-secret-" + rand.Text(), now: now,
		apiSecret: "fake-secret-" + rand.Text(), storeID: "store-fake", webhookSecret: []byte("fake-secret-" + rand.Text()),
		byImpUID: map[string]*fakePayment{}, answered: map[string]fakeStored{},
	}
	g.handleV2()
	for pattern, handler := range map[string]http.HandlerFunc{
		"POST /users/getToken":                        g.handler("token", g.answerToken),
		"GET /payments/{id}":                          g.handler("payment", g.withToken(g.answerPayment)),
		"GET /payments/find/{id}":                     g.handler("find", g.withToken(g.answerFind)),
		"GET /payments/find/{id}/{payment_status}":    g.handler("find", g.withToken(g.answerFind)),
		"GET /payments/findAll/{id}":                  g.handler("findAll", g.withToken(g.answerFindAll)),
		"GET /payments/findAll/{id}/{payment_status}": g.handler("findAll", g.withToken(g.answerFindAll)),
		"POST /payments/cancel":                       g.handler("cancel", g.withToken(g.answerCancel)),
		"GET /payments/status/{payment_status}":       g.handler("list", g.withToken(g.answerList)),
		"DELETE /vbanks/{id}":                         g.handler("endAccount", g.withToken(g.answerEndAccount)),
	} {
		g.mux.HandleFunc(pattern, handler)
	}
	return g
}

// ServeHTTP serves the REST API.
func (g *fakeGateway) ServeHTTP(w http.ResponseWriter, r *http.Request) { g.mux.ServeHTTP(w, r) }

// pay is a payment window that was opened and came to an end. Zero fields get defaults: a new imp_uid, status
// "paid", currency "KRW", the times that belong to the status.
func (g *fakeGateway) pay(p fakePayment) (impUID string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.now()
	if p.ImpUID = cmp.Or(p.ImpUID, g.newImpUID()); p.Version == fakeV2 && strings.HasPrefix(p.ImpUID, "imp_") {
		p.ImpUID = newTransactionID()
	}
	p.Status = cmp.Or(p.Status, "paid")
	p.Currency = cmp.Or(p.Currency, "KRW")
	if p.StartedAt.IsZero() {
		p.StartedAt = now
	}
	if (p.Status == "paid" || p.Cancelled > 0) && p.PaidAt.IsZero() {
		p.PaidAt = now
	}
	if p.Status == "cancelled" && p.CancelledAt.IsZero() {
		p.CancelledAt = now
	}
	if p.Status == "ready" && p.PayMethod == "vbank" {
		p.Account, p.AccountUntil = fmt.Sprintf("000%011d", mathrand.Int64N(1e11)), now.AddDate(0, 0, 7)
	}
	if p.Status == "failed" && p.FailedAt.IsZero() {
		p.FailedAt = now
	}
	p.LastChanged = now
	g.add(p)
	g.save()
	return p.ImpUID
}

// newImpUID is random, so that two gateways before one database don't give the same.
func (g *fakeGateway) newImpUID() string {
	for {
		id := fmt.Sprintf("imp_%012d", mathrand.Int64N(1e12))
		if g.byImpUID[id] == nil {
			return id
		}
	}
}

func (g *fakeGateway) add(p fakePayment) {
	g.payments = append(g.payments, &p)
	g.byImpUID[p.ImpUID] = &p
}

// refundInConsole is a refund by hand in the gateway's console, of all that is left when amount is 0. It gives
// notice.
func (g *fakeGateway) refundInConsole(impUID string, amount int64) error {
	return g.act(impUID, true, func(p *fakePayment) string { return g.refund(p, amount, fakeInConsole) })
}

// What the gateway says when it refuses. Only the first three texts are known of the true one.
const (
	fakeNotFound        = "존재하지 않는 결제정보입니다."
	fakeNoTarget        = "취소할 결제건이 존재하지 않습니다."
	fakeCancelled       = "이미 전액취소된 주문입니다."
	fakeTooMuch         = "취소 요청 금액이 취소 가능 금액보다 큽니다."
	fakeChecksum        = "취소 가능 잔액(checksum)이 일치하지 않습니다."
	fakeNoRefundAccount = "환불계좌 정보가 필요합니다."
	fakeNoAccount       = "입금을 기다리는 가상계좌가 아닙니다."
	fakePaidAlready     = "paymentId: 이미 결제되었습니다"
)

// refund needs the lock, and answers what speaks against it, or "". A payment is "cancelled" after a partial
// refund too.
func (g *fakeGateway) refund(p *fakePayment, amount int64, reason string) (problem string) {
	switch {
	case p == nil || p.PaidAt.IsZero():
		return fakeNoTarget
	case p.Cancelled >= p.Amount:
		return fakeCancelled
	case amount < 0 || amount > p.Amount-p.Cancelled:
		return fakeTooMuch
	case p.RefundsRefused != "":
		return "결제취소에 실패하였습니다. " + p.RefundsRefused
	}
	g.giveBack(p, cmp.Or(amount, p.Amount-p.Cancelled), reason)
	return ""
}

// giveBack needs the lock.
func (g *fakeGateway) giveBack(p *fakePayment, amount int64, reason string) {
	p.Status, p.Cancelled = "cancelled", p.Cancelled+amount
	p.CancelledAt, p.LastChanged = g.now(), g.now()
	p.Refunds = append(p.Refunds, fakeRefund{ID: rand.Text(), Reason: reason, Amount: amount, At: p.CancelledAt})
	g.save()
}

// persist keeps the payments in a JSON file from now on, and first reads those it holds.
func (g *fakeGateway) persist(path string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil {
		var kept []fakePayment
		if err := json.Unmarshal(data, &kept); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		for _, p := range kept {
			g.add(p)
		}
	}
	g.file = path
	return g.write()
}

// save needs the lock. It has nobody to tell of a failure but the log.
func (g *fakeGateway) save() {
	if g.file == "" {
		return
	}
	if err := g.write(); err != nil {
		slog.Error("fake payments not saved", "err", err)
	}
}

// write replaces the file whole, so that a kill leaves the old or the new one. It is for its owner alone.
func (g *fakeGateway) write() error {
	data, err := json.MarshalIndent(g.payments, "", "\t")
	if err != nil {
		return err
	}
	draft, err := os.CreateTemp(filepath.Dir(g.file), filepath.Base(g.file)+".*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(draft.Name())
	_, err = draft.Write(data)
	if err := errors.Join(err, draft.Close()); err != nil {
		return err
	}
	return os.Rename(draft.Name(), g.file)
}

// fakeCall is a call of the REST API, read whole.
type fakeCall struct {
	*http.Request
	id     string // imp_uid or merchant_uid; "" for a token
	body   []byte
	cancel fakeCancel
}

type fakeCancel struct {
	ImpUID      string `json:"imp_uid"`
	MerchantUID string `json:"merchant_uid"`
	Amount      int64  `json:"amount"`   // 0: all that is left
	Checksum    *int64 `json:"checksum"` // nil: not compared
	Reason      string `json:"reason"`
	TaxFree     int64  `json:"tax_free"`
	Holder      string `json:"refund_holder"`
	Bank        string `json:"refund_bank"`
	Account     string `json:"refund_account"`
}

// fakeAnswer is an HTTP status and the envelope.
type fakeAnswer struct {
	status   int
	Code     int     `json:"code"`
	Message  *string `json:"message"`
	Response any     `json:"response"`
}

func fakeRefusal(status, code int, message string) fakeAnswer {
	return fakeAnswer{status, code, &message, nil}
}

func fakeSuccess(response any) fakeAnswer {
	return fakeAnswer{http.StatusOK, 0, nil, response}
}

// handler runs one call. Only the work itself holds the lock.
func (g *fakeGateway) handler(name string, work func(fakeCall) fakeAnswer) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		call, err := readFakeCall(w, r, name)
		if err != nil {
			fakeRefusal(http.StatusBadRequest, -1, "잘못된 요청입니다.").write(w)
			return
		}
		g.mu.Lock()
		answer := work(call)
		g.mu.Unlock()
		answer.write(w)
	}
}

func readFakeCall(w http.ResponseWriter, r *http.Request, name string) (fakeCall, error) {
	c := fakeCall{Request: r, id: r.PathValue("id")}
	var err error
	if c.body, err = io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20)); err != nil {
		return c, err
	}
	if name == "cancel" {
		err = json.Unmarshal(c.body, &c.cancel)
		c.id = cmp.Or(c.cancel.ImpUID, c.cancel.MerchantUID)
	}
	return c, err
}

// withToken lets in who shows the current token, bare or as Bearer.
func (g *fakeGateway) withToken(work func(fakeCall) fakeAnswer) func(fakeCall) fakeAnswer {
	return func(c fakeCall) fakeAnswer {
		token := strings.TrimPrefix(c.Header.Get("Authorization"), "Bearer ")
		if token == "" || token != g.token || !g.now().Before(g.tokenExpires) {
			return fakeRefusal(http.StatusUnauthorized, -1, "Unauthorized")
		}
		return work(c)
	}
}

// answerToken gives the same token until it expires. Asked in its last minute, it adds 5 minutes to its life.
func (g *fakeGateway) answerToken(c fakeCall) fakeAnswer {
	var keys struct {
		Key    string `json:"imp_key"`
		Secret string `json:"imp_secret"`
	}
	if json.Unmarshal(c.body, &keys) != nil || keys.Key != g.key || keys.Secret != g.secret {
		return fakeRefusal(http.StatusUnauthorized, -1, "인증에 실패하였습니다. API키와 secret을 확인하세요.")
	}
	now := g.now()
	switch left := g.tokenExpires.Sub(now); {
	case left <= 0:
		random := make([]byte, 20)
		rand.Read(random) // never fails
		g.token, g.tokenExpires = fmt.Sprintf("%x", random), now.Add(30*time.Minute)
	case left <= time.Minute:
		g.tokenExpires = g.tokenExpires.Add(5 * time.Minute)
	}
	return fakeSuccess(map[string]any{
		"access_token": g.token, "now": now.Unix(), "expired_at": g.tokenExpires.Unix(),
	})
}

func (g *fakeGateway) answerPayment(c fakeCall) fakeAnswer {
	p := g.v1Payment(c.id)
	if p == nil || p.Sandbox && c.URL.Query().Get("include_sandbox") != "true" {
		return fakeRefusal(http.StatusNotFound, -1, fakeNotFound)
	}
	return fakeSuccess(p.object())
}

func (g *fakeGateway) answerFind(c fakeCall) fakeAnswer {
	found, problem := g.find(c)
	if problem != nil {
		return *problem
	}
	return fakeSuccess(found[0].object())
}

func (g *fakeGateway) answerFindAll(c fakeCall) fakeAnswer {
	found, problem := g.find(c)
	if problem != nil {
		return *problem
	}
	return answerPage(c, found)
}

func answerPage(c fakeCall, found []*fakePayment) fakeAnswer {
	page, err1 := strconv.Atoi(cmp.Or(c.URL.Query().Get("page"), "1"))
	limit, err2 := strconv.Atoi(cmp.Or(c.URL.Query().Get("limit"), "20"))
	if err1 != nil || err2 != nil || limit < 1 || limit > 1000 || page < 1 || (page-1)*limit >= len(found) {
		return fakeRefusal(http.StatusBadRequest, -1, "page 또는 limit이 올바르지 않습니다.")
	}
	next := page + 1
	if page*limit >= len(found) {
		next = 0
	}
	list := []any{}
	for _, p := range found[(page-1)*limit : min(page*limit, len(found))] {
		list = append(list, p.object())
	}
	return fakeSuccess(map[string]any{"total": len(found), "previous": page - 1, "next": next, "list": list})
}

// find answers at least one payment of a merchant_uid, sorted, or what is the problem.
func (g *fakeGateway) find(c fakeCall) ([]*fakePayment, *fakeAnswer) {
	return g.selectPayments(c, func(p *fakePayment) bool { return p.MerchantUID == c.id })
}

// answerList lists the payments of the whole account by the time at which they got into their status. It shows a payment
// listDelay after its last change.
func (g *fakeGateway) answerList(c fakeCall) fakeAnswer {
	from, err1 := strconv.ParseInt(c.URL.Query().Get("from"), 10, 64)
	to, err2 := strconv.ParseInt(c.URL.Query().Get("to"), 10, 64)
	if err1 != nil || err2 != nil || to < from || to-from > 90*24*60*60 {
		return fakeRefusal(http.StatusBadRequest, -1, "조회 기간이 올바르지 않습니다.")
	}
	found, problem := g.selectPayments(c, func(p *fakePayment) bool {
		at := map[string]time.Time{"paid": p.PaidAt, "cancelled": p.CancelledAt, "failed": p.FailedAt}[c.PathValue("payment_status")]
		if at.IsZero() {
			at = p.StartedAt
		}
		return from <= at.Unix() && at.Unix() <= to && g.now().Sub(p.LastChanged) >= g.listDelay
	})
	if problem != nil {
		return *problem
	}
	return answerPage(c, found)
}

// selectPayments answers at least one payment of the call's status that matches, sorted, or what is the problem.
func (g *fakeGateway) selectPayments(c fakeCall, match func(*fakePayment) bool) ([]*fakePayment, *fakeAnswer) {
	status := c.PathValue("payment_status")
	if !slices.Contains([]string{"", "all", "ready", "paid", "cancelled", "failed"}, status) {
		problem := fakeRefusal(http.StatusBadRequest, -1, "payment_status가 올바르지 않습니다.")
		return nil, &problem
	}
	sorting := cmp.Or(c.URL.Query().Get("sorting"), "-started")
	key, ok := map[string]func(*fakePayment) time.Time{
		"started": func(p *fakePayment) time.Time { return p.StartedAt },
		"paid":    func(p *fakePayment) time.Time { return p.PaidAt },
		"updated": func(p *fakePayment) time.Time { return p.LastChanged },
	}[strings.TrimPrefix(sorting, "-")]
	if !ok {
		problem := fakeRefusal(http.StatusBadRequest, -1, "sorting이 올바르지 않습니다.")
		return nil, &problem
	}
	var found []*fakePayment
	for _, p := range g.payments {
		if p.Version != fakeV2 && (status == "" || status == "all" || status == p.Status) && match(p) {
			found = append(found, p)
		}
	}
	if len(found) == 0 {
		problem := fakeRefusal(http.StatusNotFound, -1, fakeNotFound)
		return nil, &problem
	}
	slices.SortStableFunc(found, func(a, b *fakePayment) int { return key(a).Compare(key(b)) })
	if strings.HasPrefix(sorting, "-") {
		slices.Reverse(found)
	}
	return found, nil
}

// answerCancel refuses with HTTP 200 and code 1. An imp_uid goes before a merchant_uid, even a wrong one.
func (g *fakeGateway) answerCancel(c fakeCall) fakeAnswer {
	if c.id == "" {
		return fakeRefusal(http.StatusBadRequest, -1, "imp_uid 또는 merchant_uid가 필요합니다.")
	}
	p := g.v1Payment(c.cancel.ImpUID)
	if c.cancel.ImpUID == "" {
		for _, one := range g.payments {
			if one.Version != fakeV2 && one.MerchantUID == c.cancel.MerchantUID {
				p = one
			}
		}
	}
	checksum := c.cancel.Checksum
	if p != nil && p.Cancelled < p.Amount && checksum != nil && *checksum != p.Amount-p.Cancelled {
		return fakeRefusal(http.StatusOK, 1, fakeChecksum)
	}
	if p != nil && p.PayMethod == "vbank" && p.Cancelled < p.Amount && !p.PaidAt.IsZero() && (c.cancel.Holder == "" || c.cancel.Bank == "" || c.cancel.Account == "") {
		return fakeRefusal(http.StatusOK, 1, fakeNoRefundAccount)
	}
	if problem := g.refund(p, c.cancel.Amount, c.cancel.Reason); problem != "" {
		code := 1
		if p != nil && p.RefundsRefused != "" {
			code = -1
		}
		return fakeRefusal(http.StatusOK, code, problem)
	}
	p.Refunds[len(p.Refunds)-1].TaxFree = c.cancel.TaxFree
	return fakeSuccess(p.object())
}

// answerEndAccount ends a virtual account that nobody has paid into.
func (g *fakeGateway) answerEndAccount(c fakeCall) fakeAnswer {
	p := g.v1Payment(c.id)
	if p == nil {
		return fakeRefusal(http.StatusNotFound, -1, fakeNotFound)
	}
	if problem := g.endAccount(p); problem != "" {
		return fakeRefusal(http.StatusBadRequest, -1, problem)
	}
	return fakeSuccess(p.object())
}

// object is a payment as the API shows it, fields that our client has to ignore included.
func (p *fakePayment) object() map[string]any {
	history := []any{}
	for _, r := range p.Refunds {
		history = append(history, map[string]any{
			"pg_tid": "fake_tid", "amount": r.Amount, "cancelled_at": unixOrZero(r.At), "reason": r.Reason,
			"cancellation_id": r.ID, "receipt_url": nil,
		})
	}
	var cancelReason, account any
	if p.Account != "" {
		account = p.Account
	}
	if len(p.Refunds) > 0 {
		cancelReason = p.Refunds[len(p.Refunds)-1].Reason
	}
	return map[string]any{
		"imp_uid": p.ImpUID, "merchant_uid": p.MerchantUID, "status": p.Status, "currency": p.Currency,
		"amount": p.Amount, "cancel_amount": p.Cancelled, "sandbox": p.Sandbox,
		"started_at": unixOrZero(p.StartedAt), "paid_at": unixOrZero(p.PaidAt),
		"failed_at": unixOrZero(p.FailedAt), "cancelled_at": unixOrZero(p.CancelledAt),
		"cancel_history": history, "cancel_reason": cancelReason, "fail_reason": nil,
		"name": "Lumiere", "pay_method": cmp.Or(p.PayMethod, "card"), "channel": "pc", "pg_provider": "fake",
		"emb_pg_provider": nil, "pg_tid": "fake_tid", "buyer_name": nil, "buyer_tel": nil,
		"apply_num": nil, "card_name": nil, "card_quota": 0, "card_type": nil,
		"vbank_num": account, "vbank_date": unixOrZero(p.AccountUntil), "custom_data": nil,
		"escrow": false, "promotion": map[string]any{"id": nil, "discount": 0}, "receipt_url": nil,
	}
}

func unixOrZero(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

func (a fakeAnswer) write(w http.ResponseWriter) { writeFakeJSON(w, a.status, a) }

func writeFakeJSON(w http.ResponseWriter, status int, v any) {
	var body bytes.Buffer
	encoder := json.NewEncoder(&body)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	w.Write(body.Bytes())
}
