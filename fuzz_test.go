package main

import (
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// wantBadRequest fails unless err is a refusal that blames the request.
func wantBadRequest(t *testing.T, err error) {
	t.Helper()
	var r *httpError
	if !errors.As(err, &r) || r.status != http.StatusBadRequest {
		t.Fatalf("not a 400: %v", err)
	}
	if text := r.body.(message).Message; text == "" || !utf8.ValidString(text) {
		t.Fatalf("a message nobody can read: %q", text)
	}
}

func FuzzProductIDs(f *testing.F) {
	for _, seed := range []string{"", "productId=61a4debe4f5f6aa036bfec5f", "productId[]=61A4DEBE4F5F6AA036BFEC5F&productId%5B1%5D=61a4debe4f5f6aa036bfec5d",
		"productId=%zz", "productId=%00", "&&=&productId", "productId[=", "productId]=x", "productId=a;b", "product%49d=1"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, query string) {
		ids, err := productIDs(query)
		if err != nil {
			wantBadRequest(t, err)
			return
		}
		for i, id := range ids {
			if !validID(id) || slices.Contains(ids[:i], id) {
				t.Fatalf("%q gives %q", query, ids)
			}
		}
	})
}

func FuzzParseOrder(f *testing.F) {
	good, err := json.Marshal(orderBody("20260302000001", "61a4debe4f5f6aa036bfec5f", "61a58ed5eebb463c14eca0f9"))
	check(f, err)
	f.Add(good)
	for _, change := range [][2]string{{"99000", "1e400"}, {"99000", "99000.5"}, {"홍길동", `\ud800`}, {"홍길동", `\u0000`}, {"홍길동", "\xff"},
		{`"result":{`, `"result":[{`}, {"10000", "null"}, {"buyer@example.com", " "}, {`"orderItems":[`, `"orderItems":[null,`}, {"}", ""}} {
		f.Add([]byte(strings.ReplaceAll(string(good), change[0], change[1])))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		o, err := parseOrder(body, 10000)
		if err != nil {
			wantBadRequest(t, err)
			return
		}
		if n := len(o.productIDs); n < 1 || n > maxItems || n != len(o.prices) || o.shippingPrice != 10000 {
			t.Fatalf("%s gives %+v", body, o)
		}
		for i, id := range o.productIDs {
			if !validID(id) || slices.Contains(o.productIDs[:i], id) {
				t.Fatalf("%s gives the paintings %q", body, o.productIDs)
			}
		}
		documents := []string{o.deliveryInfo, o.ordererInfo}
		if o.deliveryDetails != nil {
			documents = append(documents, *o.deliveryDetails)
		}
		for _, text := range documents {
			var fields map[string]string
			if err := json.Unmarshal([]byte(text), &fields); err != nil {
				t.Fatalf("%s gives the document %s", body, text)
			}
			for name, value := range fields {
				if value == "" || value != strings.TrimSpace(value) || invalidString(value) {
					t.Fatalf("%s gives %s %q", body, name, value)
				}
			}
		}
	})
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
