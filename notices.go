package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// The gateways' notices: POST /api/payments/webhook.

// webhook answers POST /api/payments/webhook. A notice is a hint to look and no more, signed or not. The answer is 200 once the
// payment is handled, whatever became of it. A fault of ours, a gateway that does not respond and too many notices of nothing
// are a 5xx: only then does the gateway send a notice again, so that it is not 429.
func (s *server) webhook(r *request) (any, error) {
	report, err := s.readNotice(r)
	if err != nil || report == nil {
		return message{"확인했습니다"}, err
	}
	settled, err := s.settler.settleNoticed(r.Context(), actor{kind: actorGateway, client: s.clientOf(r), request: r.id}, *report)
	r.orderID = settled.orderID
	switch {
	case errors.Is(err, errTooMany), errors.Is(err, errBusy):
		refusal := toHTTPError(err)
		refusal.status = http.StatusServiceUnavailable
		return nil, refusal
	case err != nil && whyNotSettled(*report, err) == nil:
		return nil, err
	default:
		return message{"확인했습니다"}, nil
	}
}

// settleNoticed is settleReported for a notice. It proves nothing that a notice says which order its payment is for, but when
// there is such an order, the notice is charged to it.
func (t *settler) settleNoticed(ctx context.Context, by actor, report paymentReport) (settlement, error) {
	if validID(report.orderID) {
		ours, err := t.store.orderExists(ctx, report.orderID)
		if err != nil {
			return settlement{}, err
		}
		if ours {
			by.client = client{order: report.orderID}
		}
	}
	return t.settleReported(ctx, by, report)
}

// readNotice returns what a notice reports, nil when that is no payment for an order of ours. V1's is unsigned. Where the
// secrets of V2's notices are configured, one that is not signed with one of them is refused.
func (s *server) readNotice(r *request) (*paymentReport, error) {
	body, err := readBody(r)
	if err != nil {
		return nil, err
	}
	notice, err := decodeNotice(body)
	if err != nil {
		return nil, err
	}
	switch {
	case notice.impUID != "" || !notice.isV2:
		if !validImpUID(notice.impUID) {
			return nil, fieldError("imp_uid", "결제 번호가 올바르지 않습니다")
		}
		report, err := s.reportOf(gatewayIamport, paymentKey{impUID: notice.impUID})
		if err == nil {
			report.orderID = notice.merchantUID
		}
		return report, err
	case len(s.config.webhookSecrets) > 0 && !signedWithOneOf(s.config.webhookSecrets, r.Header, body, s.now()):
		return nil, statusError(http.StatusUnauthorized, "webhook-signature: 서명이 올바르지 않습니다")
	case !validID(notice.paymentID): // of something else than a payment, or of one for another shop
		return nil, nil
	}
	report, err := s.reportOf(gatewayPortOne, paymentKey{orderID: notice.paymentID})
	if err == nil {
		report.orderID, report.signed = notice.paymentID, len(s.config.webhookSecrets) > 0
	}
	return report, err
}

// paymentNotice is what a notice says.
type paymentNotice struct {
	impUID      string // V1's
	merchantUID string // V1's: the order
	isV2        bool
	paymentID   string // V2's, the order too
}

// decodeNotice reads a notice. V1's is JSON or a form, as the gateway's console has it. V2's is JSON with a type and data; in
// its older format it is JSON or a form with payment_id.
func decodeNotice(body []byte) (paymentNotice, error) {
	var fields struct {
		ImpUID      string          `json:"imp_uid"`
		MerchantUID json.RawMessage `json:"merchant_uid"` // another shop's may be a number
		PaymentID   string          `json:"payment_id"`
		Type        string
		Data        json.RawMessage
	}
	if trimmed := bytes.TrimSpace(body); len(trimmed) > 0 && trimmed[0] == '{' {
		if err := decodeJSON(body, "", &fields); err != nil {
			return paymentNotice{}, err
		}
	} else {
		form, _ := url.ParseQuery(string(body)) // what can be read of a broken form is enough
		fields.ImpUID, fields.PaymentID = form.Get("imp_uid"), form.Get("payment_id")
		fields.MerchantUID = json.RawMessage(marshalRaw(form.Get("merchant_uid")))
	}
	if fields.Type != "" {
		var data struct{ PaymentID json.RawMessage }
		json.Unmarshal(fields.Data, &data) // of a type that tells of something else it may be anything
		return paymentNotice{isV2: true, paymentID: textOf(data.PaymentID)}, nil
	}
	return paymentNotice{impUID: fields.ImpUID, merchantUID: textOf(fields.MerchantUID), isV2: fields.PaymentID != "", paymentID: fields.PaymentID}, nil
}

// noticeAge is how far a signed notice's time may be from ours.
const noticeAge = 5 * time.Minute

// webhookSignature returns the signature that Standard Webhooks asks for, before it is encoded.
func webhookSignature(key []byte, id, timestamp string, body []byte) []byte {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(id + "." + timestamp + "."))
	mac.Write(body)
	return mac.Sum(nil)
}

// signedWithOneOf reports whether a notice has a signature with one of keys that is right and of now, as Standard Webhooks
// makes them. The comparison takes the same time for every wrong signature.
func signedWithOneOf(keys [][]byte, header http.Header, body []byte, now time.Time) bool {
	id, timestamp := header.Get("Webhook-Id"), header.Get("Webhook-Timestamp")
	seconds, err := strconv.ParseInt(timestamp, 10, 64)
	if err != nil || id == "" || time.Unix(seconds, 0).Sub(now).Abs() > noticeAge {
		return false
	}
	for _, key := range keys {
		want := webhookSignature(key, id, timestamp, body)
		for signature := range strings.FieldsSeq(header.Get("Webhook-Signature")) {
			text, isV1 := strings.CutPrefix(signature, "v1,")
			given, err := base64.StdEncoding.DecodeString(text)
			if isV1 && err == nil && hmac.Equal(given, want) {
				return true
			}
		}
	}
	return false
}
