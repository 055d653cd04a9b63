package main

import (
	"bytes"
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
	settled, err := s.settler.settleReported(r.Context(), actor{kind: actorGateway, request: r.id}, s.clientOf(r), *report)
	r.orderID = settled.orderID
	switch {
	case errors.Is(err, errTooMany):
		return nil, tooManyError(http.StatusServiceUnavailable, err)
	case err != nil && whyNotSettled(*report, err) == nil:
		return nil, err
	default:
		return message{"확인했습니다"}, nil
	}
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
		return s.reportOf(gatewayIamport, paymentKey{impUID: notice.impUID})
	case len(s.config.webhookSecrets) > 0 && !signedWithOneOf(s.config.webhookSecrets, r.Header, body, s.now()):
		return nil, statusError(http.StatusUnauthorized, "webhook-signature: 서명이 올바르지 않습니다")
	case !validID(notice.paymentID): // of something else than a payment, or of one for another shop
		return nil, nil
	}
	report, err := s.reportOf(gatewayPortOne, paymentKey{orderID: notice.paymentID})
	if err == nil {
		report.signed = len(s.config.webhookSecrets) > 0
	}
	return report, err
}

// paymentNotice is what a notice says.
type paymentNotice struct {
	impUID    string // V1's
	isV2      bool
	paymentID string // V2's
}

// decodeNotice reads a notice. V1's is JSON or a form, as the gateway's console has it. V2's is JSON with a type and data; in
// its older format it is JSON or a form with payment_id.
func decodeNotice(body []byte) (paymentNotice, error) {
	var fields struct {
		ImpUID    string `json:"imp_uid"`
		PaymentID string `json:"payment_id"`
		Type      string
		Data      json.RawMessage
	}
	if trimmed := bytes.TrimSpace(body); len(trimmed) > 0 && trimmed[0] == '{' {
		if err := decodeJSON(body, "", &fields); err != nil {
			return paymentNotice{}, err
		}
	} else {
		form, _ := url.ParseQuery(string(body)) // what can be read of a broken form is enough
		fields.ImpUID, fields.PaymentID = form.Get("imp_uid"), form.Get("payment_id")
	}
	if fields.Type != "" {
		var data struct{ PaymentID json.RawMessage }
		json.Unmarshal(fields.Data, &data) // of a type that tells of something else it may be anything
		return paymentNotice{isV2: true, paymentID: textOf(data.PaymentID)}, nil
	}
	return paymentNotice{impUID: fields.ImpUID, isV2: fields.PaymentID != "", paymentID: fields.PaymentID}, nil
}

// noticeAge is how far a signed notice's time may be from ours.
const noticeAge = 5 * time.Minute

// signedWithOneOf reports whether a notice has a signature with one of keys that is right and of now, as Standard Webhooks
// makes them. The comparison takes the same time for every wrong signature.
func signedWithOneOf(keys [][]byte, header http.Header, body []byte, now time.Time) bool {
	id, timestamp := header.Get("Webhook-Id"), header.Get("Webhook-Timestamp")
	seconds, err := strconv.ParseInt(timestamp, 10, 64)
	if err != nil || id == "" || time.Unix(seconds, 0).Sub(now).Abs() > noticeAge {
		return false
	}
	for _, key := range keys {
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(id + "." + timestamp + "."))
		mac.Write(body)
		want := mac.Sum(nil)
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
