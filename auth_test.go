package main

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

func TestTokens(t *testing.T) {
	s := newShop(t)
	order, impUID, painting := s.paid(buyerA)
	now := s.clock.Now()
	sign := func(method jwt.SigningMethod, secret any, change func(jwt.MapClaims)) string {
		c := jwt.MapClaims{"id": buyerA, "isAdmin": false, "iat": now.Unix(), "exp": now.Add(time.Hour).Unix()}
		change(c)
		token, err := jwt.NewWithClaims(method, c).SignedString(secret)
		check(t, err)
		return "Bearer " + token
	}
	with := func(key string, value any) string {
		return sign(jwt.SigningMethodHS256, []byte(testSecret), func(c jwt.MapClaims) { c[key] = value })
	}
	without := func(key string) string {
		return sign(jwt.SigningMethodHS256, []byte(testSecret), func(c jwt.MapClaims) { delete(c, key) })
	}
	// raw signs a header and claims that are written out.
	raw := func(header, claims string) string {
		text := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(claims))
		signature, err := jwt.SigningMethodHS256.Sign(text, []byte(testSecret))
		check(t, err)
		return "Bearer " + text + "." + base64.RawURLEncoding.EncodeToString(signature)
	}
	const header = `{"alg":"HS256","typ":"JWT"}`
	claims := fmt.Sprintf(`"id":"%s","exp":%d`, buyerA, now.Add(time.Hour).Unix())
	past := now.Add(-time.Hour).Unix()
	as := func(jwt.MapClaims) {}
	good := with("isAdmin", false)
	parts := strings.Split(good, ".")
	for _, row := range []struct{ name, authorization string }{
		{"empty scheme", "Bearer"},
		{"empty token", "Bearer "},
		{"garbage", "Bearer garbage"},
		{"dots", "Bearer a.b.c"},
		{"no scheme", strings.TrimPrefix(good, "Bearer ")},
		{"another scheme", strings.Replace(good, "Bearer", "Basic", 1)},
		{"expiring now", with("exp", now.Unix())},
		{"alg none", sign(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, as)},
		{"HS384", sign(jwt.SigningMethodHS384, []byte(testSecret), as)},
		{"HS512", sign(jwt.SigningMethodHS512, []byte(testSecret), as)},
		{"another secret", sign(jwt.SigningMethodHS256, []byte(testSecret+"x"), as)},
		{"no signature", parts[0] + "." + parts[1] + "."},
		{"no exp", without("exp")},
		{"exp no number", with("exp", "tomorrow")},
		{"exp null", with("exp", nil)},
		{"exp a text of digits", with("exp", fmt.Sprint(now.Add(time.Hour).Unix()))},
		{"exp twice, the last one past", raw(header, fmt.Sprintf(`{%s,"exp":%d}`, claims, past))},
		{"exp twice, the last one a text", raw(header, fmt.Sprintf(`{%s,"exp":"%d"}`, claims, now.Add(time.Hour).Unix()))},
		{"exp in another case", raw(header, strings.Replace(`{`+claims+`}`, `"exp"`, `"EXP"`, 1))},
		{"nbf in the future", with("nbf", now.Add(time.Second).Unix())},
		{"nbf a text", with("nbf", fmt.Sprint(past))},
		{"nbf twice, the last one in the future", raw(header, fmt.Sprintf(`{%s,"nbf":%d,"nbf":%d}`, claims, past, now.Add(time.Minute).Unix()))},
		{"crit", raw(`{"alg":"HS256","crit":["b64"],"b64":true}`, `{`+claims+`}`)},
		{"crit unknown", raw(`{"alg":"HS256","crit":["x"],"x":1}`, `{`+claims+`}`)},
		{"crit empty", raw(`{"alg":"HS256","crit":[]}`, `{`+claims+`}`)},
		{"crit null", raw(`{"alg":"HS256","crit":null}`, `{`+claims+`}`)},
		{"crit twice", raw(`{"alg":"HS256","crit":["x"],"crit":[]}`, `{`+claims+`}`)},
		{"alg twice, the last one none", raw(`{"alg":"HS256","alg":"none"}`, `{`+claims+`}`)},
		{"aud", with("aud", "lumiere")},
		{"aud a list", with("aud", []string{"lumiere", "https://lumiere.example"})},
		{"aud an empty list", with("aud", []string{})},
		{"aud empty", with("aud", "")},
		{"aud null", with("aud", nil)},
		{"aud twice", raw(header, `{`+claims+`,"aud":"lumiere","aud":null}`)},
		{"id in another case", raw(header, strings.Replace(`{`+claims+`}`, `"id"`, `"ID"`, 1))},
		{"id twice, the last one no ObjectId", raw(header, `{`+claims+`,"id":"me"}`)},
		{"no id", without("id")},
		{"id null", with("id", nil)},
		{"id empty", with("id", "")},
		{"id not hex", with("id", strings.Repeat("z", 24))},
		{"id too short", with("id", buyerA[1:])},
		{"id a number", with("id", 1)},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := rowOf(t, s)
			s.want(s.callWith(row.authorization, "DELETE", "/api/orders/"+order, nil), http.StatusUnauthorized, messageSignIn)
		})
	}
	if s.statusOf(order) != statusPaid {
		t.Fatal("a call without a good token changed something")
	}

	// Good tokens that look odd.
	for _, row := range []struct{ name, authorization string }{
		{"scheme in lower case", strings.Replace(good, "Bearer", "bearer", 1)},
		{"scheme in upper case", strings.Replace(good, "Bearer", "BEARER", 1)},
		{"id in upper case", with("id", strings.ToUpper(buyerA))},
		{"isAdmin left out", without("isAdmin")},
		{"isAdmin a text", with("isAdmin", "true")},
		{"nbf now", with("nbf", now.Unix())},
		{"exp a fraction", with("exp", float64(now.Unix())+3600.5)},
		{"exp twice, the first one past", raw(header, fmt.Sprintf(`{"exp":%d,%s}`, past, claims))},
		{"id in another case beside it", raw(header, `{`+claims+`,"ID":"`+buyerB+`"}`)},
		{"isAdmin in another case", raw(header, `{`+claims+`,"ISADMIN":true}`)},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := rowOf(t, s)
			s.want(s.callWith(row.authorization, "GET", "/api/orders/"+order, nil), 200, "")
		})
	}

	// To others than its buyer and administrators the order does not exist, and it is never a 401.
	stranger := func(isAdmin any) string {
		return sign(jwt.SigningMethodHS256, []byte(testSecret), func(c jwt.MapClaims) { c["id"], c["isAdmin"] = buyerB, isAdmin })
	}
	for _, isAdmin := range []any{false, nil, "true", "True", 1, 1.5, []any{true}, map[string]any{"a": true}} {
		t.Run(fmt.Sprintf("stranger, isAdmin %v", isAdmin), func(t *testing.T) {
			s := rowOf(t, s)
			s.want(s.callWith(stranger(isAdmin), "GET", "/api/orders/"+order, nil), 404, messageOrderUnknown)
			s.want(s.callWith(stranger(isAdmin), "DELETE", "/api/orders/"+order, nil), 404, messageNoSuchOrder)
			s.want(s.callWith(stranger(isAdmin), "GET", "/api/orders/latest", nil), 404, "최근 주문 내역이 없습니다")
			s.want(s.callWith(stranger(isAdmin), "GET", "/api/products/total-price?productId="+painting, nil), 200, "")
			s.wantMoney(impUID, 0)
		})
	}
	s.want(s.callWith(stranger(true), "GET", "/api/orders/"+order, nil), 200, "")
	s.want(s.callWith(stranger(true), "DELETE", "/api/orders/"+order, nil), 200, "")
	s.wantMoney(impUID, 109000)

	// Good tokens are remembered, each with its own end, and not too many.
	s.want(s.callWith(good, "GET", "/api/orders/"+order, nil), 200, "")
	s.clock.advance(time.Hour - time.Millisecond)
	s.want(s.callWith(good, "GET", "/api/orders/"+order, nil), 200, "")
	s.clock.advance(time.Millisecond)
	s.want(s.callWith(good, "GET", "/api/orders/"+order, nil), http.StatusUnauthorized, messageSignIn)
	for i := len(s.tokens.verified); i < maxVerifiedTokens; i++ {
		s.tokens.verified[sha256.Sum256([]byte{byte(i), byte(i >> 8)})] = verifiedToken{}
	}
	s.want(s.call(buyerA, "GET", "/api/orders/"+order, nil), 200, "")
	if n := len(s.tokens.verified); n != 1 {
		t.Errorf("%d tokens are remembered", n)
	}
}

func FuzzAuthorization(f *testing.F) {
	now := func() time.Time { return time.Date(2026, 3, 2, 1, 0, 0, 0, time.UTC) }
	tokens := newTokens([]byte(testSecret), now)
	good, err := tokens.issue(caller{id: buyerA}, now(), time.Hour)
	check(f, err)
	for _, seed := range []string{"", "Bearer", "Bearer ", "bearer " + good, "Bearer " + good + "x", "Basic " + good, good, "Bearer a.b.c",
		"Bearer eyJhbGciOiJub25lIn0.e30.", "Bearer " + strings.Repeat(".", 300)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, header string) {
		caller, err := tokens.caller(&http.Request{Header: http.Header{"Authorization": {header}}})
		if (err == nil) != (caller.id != "") || caller.admin || (err == nil && caller.id != buyerA) {
			t.Fatalf("%q makes %+v, %v", header, caller, err)
		}
	})
}
