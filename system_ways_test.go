package main

import "cmp"

// payVia is a way in which a simulated buyer pays.
type payVia string

const (
	viaV1       payVia = "v1"
	viaV2       payVia = "v2"
	viaApproval payVia = "approval" // V2 with manual approval
)

var waysToPay = []payVia{viaV1, viaV2, viaApproval}

// viaOf is how a payment is made.
func viaOf(p fakePayment) payVia {
	switch {
	case p.Version != fakeV2:
		return viaV1
	case p.PaymentToken == "":
		return viaV2
	}
	return viaApproval
}

// window has the order's payment window come to the end that p says, and returns the payment's imp_uid or transactionId. Under
// manual approval a payment that would be paid is authenticated instead. V2 opens no window for an order that was ever paid: then
// it returns "".
func (via payVia) window(g *testGateway, order string, p fakePayment) string {
	if p.MerchantUID = order; via != viaV1 {
		p.Version = fakeV2
		if g.isPaidV2(order) {
			return ""
		}
	}
	if via == viaApproval && cmp.Or(p.Status, "paid") == "paid" {
		p.Status, p.PaymentToken = "ready", "token-"+newTestID()
	}
	return g.pay(p)
}

// reportOf is what the browser tells the service of a payment.
func reportOf(p fakePayment) map[string]string {
	switch viaOf(p) {
	case viaV1:
		return map[string]string{"imp_uid": p.ImpUID}
	case viaV2:
		return map[string]string{"paymentId": p.MerchantUID}
	}
	return map[string]string{"paymentId": p.MerchantUID, "txId": p.ImpUID, "paymentToken": p.PaymentToken}
}

// formOf is the gateway's notice of a payment that was paid, as a form.
func formOf(p fakePayment) string {
	if viaOf(p) == viaV1 {
		return "imp_uid=" + p.ImpUID + "&status=paid"
	}
	return "payment_id=" + p.MerchantUID + "&tx_id=" + p.ImpUID + "&status=Paid"
}
