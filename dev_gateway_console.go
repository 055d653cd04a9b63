package main

import (
	"cmp"
	"crypto/rand"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
)

// What happens at the fake gateway outside its API: the payment window, the console, the banks and the card companies.

// window is the payment window as a call, for local development: POST {"merchant_uid", "amount", "status":
// "paid" (default), "failed", "ready" or "vbank", "notify": also give notice of it} → {"imp_uid", "merchant_uid"}. "vbank" issues a
// virtual account and is "ready" until its deposit. With "paymentId" in place of "merchant_uid" it is V2's, and answers
// {"paymentId", "txId"}; with the status "approved" the payment waits for manual approval, and "paymentToken" is answered, too.
func (g *fakeGateway) window(w http.ResponseWriter, r *http.Request) {
	var request struct {
		MerchantUID string `json:"merchant_uid"`
		PaymentID   string `json:"paymentId"`
		Amount      int64  `json:"amount"`
		Status      string `json:"status"`
		Notify      bool   `json:"notify"`
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(&request); err != nil {
		writeFakeJSON(w, http.StatusBadRequest, map[string]string{"message": "요청 본문이 올바른 JSON이 아닙니다"})
		return
	}
	p := fakePayment{
		MerchantUID: cmp.Or(request.PaymentID, request.MerchantUID), Amount: request.Amount, Status: cmp.Or(request.Status, "paid"),
	}
	if request.PaymentID != "" {
		p.Version = fakeV2
	}
	problem := ""
	switch {
	case p.MerchantUID == "" || len(p.MerchantUID) > 40:
		problem = "merchant_uid는 1자 이상 40자 이하의 문자열이어야 합니다"
	case p.Amount <= 0:
		problem = "amount는 0보다 큰 정수여야 합니다"
	case p.Version == fakeV2 && g.isPaidV2(p.MerchantUID):
		problem = fakePaidAlready
	case p.Version == fakeV2 && p.Status == "approved":
		p.Status, p.PaymentToken = "ready", "token_"+rand.Text()
	case !slices.Contains([]string{"paid", "failed", "ready", "vbank"}, p.Status):
		problem = "status는 paid, failed, ready, vbank 중 하나여야 합니다"
	}
	if problem != "" {
		writeFakeJSON(w, http.StatusBadRequest, map[string]string{"message": problem})
		return
	}
	if p.Status == "vbank" {
		p.Status, p.PayMethod = "ready", "vbank"
	}
	p.ImpUID = g.pay(p)
	g.act(p.ImpUID, request.Notify, func(*fakePayment) string { return "" })
	answer := map[string]string{"imp_uid": p.ImpUID, "merchant_uid": p.MerchantUID}
	if p.Version == fakeV2 {
		answer = map[string]string{"paymentId": p.MerchantUID, "txId": p.ImpUID}
	}
	if p.PaymentToken != "" {
		answer["paymentToken"] = p.PaymentToken
	}
	writeFakeJSON(w, http.StatusOK, answer)
}

// isPaidV2 reports whether an attempt of V2 with this paymentId was ever paid: then there is no other.
func (g *fakeGateway) isPaidV2(paymentID string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.v2Payment(paymentID)
	return p != nil && p.Version == fakeV2 && !p.PaidAt.IsZero()
}

// listPayments lists the payments of an order as a call, for local development: GET ?merchant_uid=… → an array of them as the API
// shows them, the oldest first. "version" says besides through which of V1 and V2 each was made, "refunds_refused" what the card
// company answers to every refund, "" if it makes them, "refunds_late" that it takes its time, "refund_requested" how much waits.
func (g *fakeGateway) listPayments(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	defer g.mu.Unlock()
	list := []map[string]any{}
	for _, p := range g.payments {
		if p.MerchantUID == r.URL.Query().Get("merchant_uid") {
			shown := p.object()
			shown["version"] = cmp.Or(p.Version, "V1")
			shown["refunds_refused"], shown["refunds_late"], shown["refund_requested"] = p.RefundsRefused, p.RefundsLate, p.requested()
			list = append(list, shown)
		}
	}
	writeFakeJSON(w, http.StatusOK, list)
}

// console is what can happen to a payment afterwards as a call, for local development: POST {"do": "refund" ("amount": 0 is all
// that is left), "chargeback", "refuse" (all refunds from now on), "deposit" or "expire" (both of a virtual account), and of V2 "late" (refunds
// from now on wait), "finish" or "fail" (both of a refund that waits), "notify": also give notice of it}. Without "notify" the notice is lost. It answers the payment as the API shows it.
func (g *fakeGateway) console(w http.ResponseWriter, r *http.Request) {
	var request struct {
		Do     string `json:"do"`
		Amount int64  `json:"amount"`
		Notify bool   `json:"notify"`
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(&request); err != nil {
		writeFakeJSON(w, http.StatusBadRequest, map[string]string{"message": "요청 본문이 올바른 JSON이 아닙니다"})
		return
	}
	var shown map[string]any
	err := g.act(r.PathValue("imp_uid"), request.Notify, func(p *fakePayment) (problem string) {
		switch request.Do {
		case "refund":
			problem = g.refund(p, request.Amount, fakeInConsole)
		case "chargeback":
			problem = g.takeBack(p)
		case "refuse":
			problem = g.refuseRefunds(p)
		case "deposit":
			problem = g.payIn(p)
		case "expire":
			problem = g.endAccount(p)
		case "late":
			problem = g.delayRefunds(p)
		case "finish", "fail":
			problem = g.endRefund(p, request.Do == "finish")
		default:
			problem = "do는 refund, chargeback, refuse, deposit, expire, late, finish, fail 중 하나여야 합니다"
		}
		if problem == "" {
			shown = p.object()
		}
		return problem
	})
	if err != nil {
		writeFakeJSON(w, http.StatusBadRequest, map[string]string{"message": err.Error()})
		return
	}
	writeFakeJSON(w, http.StatusOK, shown)
}

// act has something happen to a payment, nil if there is none of that imp_uid, and gives notice of it. The change is made under
// the lock and returns what speaks against it, or "".
func (g *fakeGateway) act(impUID string, notify bool, change func(*fakePayment) (problem string)) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.byImpUID[impUID]
	if problem := change(p); problem != "" {
		return errors.New(problem)
	}
	if notify && g.notify != nil {
		go g.notify(*p)
	}
	return nil
}

// Why money goes back otherwise than by a call: the reason that the gateway lists.
const (
	fakeInConsole = "콘솔에서 취소"
	fakeTakenBack = "카드사 승인취소"
)

// takeBack is the card company that takes back all that is left, however long ago the payment was. It needs the lock.
func (g *fakeGateway) takeBack(p *fakePayment) (problem string) {
	if p == nil || p.PaidAt.IsZero() || p.Cancelled >= p.Amount {
		return fakeNoTarget
	}
	g.giveBack(p, p.Amount-p.Cancelled, fakeTakenBack)
	return ""
}

// refuseRefunds has the card company refuse every refund of a payment from now on. It needs the lock.
func (g *fakeGateway) refuseRefunds(p *fakePayment) (problem string) {
	if p == nil {
		return fakeNoTarget
	}
	p.RefundsRefused = "카드사 거절"
	g.save()
	return ""
}

// delayRefunds has the refunds of a payment of V2 wait from now on. It needs the lock.
func (g *fakeGateway) delayRefunds(p *fakePayment) (problem string) {
	if p == nil || p.Version != fakeV2 {
		return fakeNoTarget
	}
	p.RefundsLate = true
	g.save()
	return ""
}

// payIn is the buyer's deposit into a virtual account. The bank takes none after the account's last moment, and none through V2
// once another attempt with the same paymentId was paid. It needs the lock.
func (g *fakeGateway) payIn(p *fakePayment) (problem string) {
	if p == nil || p.Status != "ready" || p.Account == "" || g.now().After(p.AccountUntil) {
		return fakeNoAccount
	}
	if p.Version == fakeV2 && !g.v2Payment(p.MerchantUID).PaidAt.IsZero() {
		return fakePaidAlready
	}
	p.Status, p.PaidAt, p.LastChanged = "paid", g.now(), g.now()
	g.save()
	return ""
}

// endAccount ends a virtual account that nobody has paid into, at a call, in the console or by its date. No money moves, and yet
// the payment is cancelled. It needs the lock.
func (g *fakeGateway) endAccount(p *fakePayment) (problem string) {
	if p == nil || p.Status != "ready" || p.Account == "" {
		return fakeNoAccount
	}
	p.Status, p.CancelledAt, p.LastChanged = "cancelled", g.now(), g.now()
	g.save()
	return ""
}
