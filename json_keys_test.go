package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestUniqueKeys(t *testing.T) {
	var many strings.Builder // more keys than keySet keeps in its array
	for i := range 40 {
		fmt.Fprintf(&many, `"k%d":%d,`, i, i)
	}
	long := strings.Repeat("긴", maxKeyPath)
	for _, text := range []string{
		`{}`, `[]`, `""`, `1`, ` [ ] `, "\n{\t} ", `{"a":1,"b":2}`, `{"é":1,"e":2,"":3}`,
		`{"a":{"a":{"a":1}},"b":[{"a":1},{"a":2}]}`,
		`{"a":"\"b\":1,\"b\":2","b":"}","c":"\\","d":"[{"}`,
		`{` + many.String() + `"k":{` + many.String() + `"k":0}}`, `{"id":1,"ıd":2}`,
		`{"a":1,"a.b":2,"b":[],"c":[1 , -2e+1,true,null,"x",[ [ ]]]}`,
	} {
		if err := checkUniqueKeys([]byte(text)); err != nil {
			t.Errorf("%s: %v", text, err.(*httpError).body)
		}
	}
	for _, row := range []struct{ text, path string }{
		{`{"a":1,"a":1}`, "a"},
		{` { "a" : 1 , "b" : [ ] , "a" : 2 } `, "a"},
		{`{"a":[],"a":{}}`, "a"},
		{`{"":1,"":2}`, ""},
		{`{"deliveryInfo":{"address":"1"},"deliveryInfo":{"receiver":"2"}}`, "deliveryInfo"},
		{`{"deliveryInfo":{"address":"1","receiver":"2","address":"3"}}`, "deliveryInfo.address"},
		{`{"orderItems":[{"price":1},{"price":1,"size":"","price":2}]}`, "orderItems[1].price"},
		{`[[1,{"a":[{"b":0,"b":1}]}]]`, "[0][1].a[0].b"},
		{`{` + many.String() + `"K5":0}`, "K5"}, {`{` + many.String() + `"K35":0}`, "K35"}, {`{"a":{` + many.String() + `"\u212a39":0}}`, "a.\u212a39"},
		// Keys that encoding/json takes for one field.
		{`{"imp_uid":1,"ImP_uid":2}`, "ImP_uid"},
		{`{"imp_uid":1,"imp\u005fuid":2}`, "imp_uid"},
		{`{"status":1,"\u017ftatuſ":2}`, "ſtatuſ"},
		{`{"bank":1,"ban\u212a":2}`, "ban\u212a"},
		{`{"` + long + `":1,"` + long + `":2}`, strings.Repeat("긴", maxKeyPath/3) + "…"},
	} {
		err := checkUniqueKeys([]byte(row.text))
		if e, ok := err.(*httpError); !ok || e.status != http.StatusBadRequest || e.body != (message{row.path + ": " + messageDuplicateKey}) {
			t.Errorf("%s: %v, want %s", row.text, err, row.path)
		}
	}
}

// Every call that takes JSON refuses a key that comes twice.
func TestEveryBodyWithAKeyTwice(t *testing.T) {
	s := newShop(t)
	for _, c := range theAPI().calls() {
		if c.RequestBody.Content == nil {
			continue
		}
		method, path, _ := strings.Cut(strings.Replace(c.name, "{id}", s.order(buyerA, s.painting(99000)), 1), " ")
		s.want(s.call(adminID, method, path, `{"unknown":{"a":[{"b":1,"b":1}]}}`), 400, "unknown.a[0].b: "+messageDuplicateKey)
	}
}

// An order's address is never mixed from two.
func TestOrderWithAKeyTwice(t *testing.T) {
	s := newShop(t)
	body := marshalRaw(orderBody(newNumber(), s.painting(99000)))
	for at, twice := range map[string]string{
		"deliveryInfo":         strings.Replace(body, `"deliveryInfo":`, `"deliveryInfo":{"receiver":"홍길동"},"deliveryInfo":`, 1),
		"orderItems[0].price":  strings.Replace(body, `"price":`, `"price":1,"price":`, 1),
		"deliveryInfo.address": strings.Replace(body, `"address":`, `"Address":"","address":`, 1),
	} {
		s.want(s.call(buyerA, "POST", "/api/orders", twice), 400, at+": "+messageDuplicateKey)
	}
	s.want(s.call(buyerA, "POST", "/api/orders", body), 201, "")
}

// FuzzUniqueKeys compares checkUniqueKeys with a slow search through the tokens of encoding/json.
func FuzzUniqueKeys(f *testing.F) {
	for _, seed := range []string{`{"a":1,"A":2}`, `{"a":[{"b":{}},{"b":[]}],"c":"\"}{"}`, `[{"a":1},{"a":1,"a":1}]`, `{"\u0061":1,"a":2}`, ` [ 1.5e3 , null ] `} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if !json.Valid(text) || !utf8.Valid(text) {
			t.Skip()
		}
		if unique := checkUniqueKeys(text) == nil; unique != uniqueKeysByToken(json.NewDecoder(bytes.NewReader(text))) {
			t.Errorf("%s: unique %v", text, unique)
		}
	})
}

// uniqueKeysByToken reports whether no key comes twice in an object of the next value.
func uniqueKeysByToken(tokens *json.Decoder) bool {
	unique := true
	token, _ := tokens.Token()
	seen := map[string]bool{}
	for tokens.More() && (token == json.Delim('{') || token == json.Delim('[')) {
		if token == json.Delim('{') {
			key, _ := tokens.Token()
			folded := strings.Map(foldRune, fmt.Sprint(key))
			unique = unique && !seen[folded]
			seen[folded] = true
		}
		unique = uniqueKeysByToken(tokens) && unique
	}
	if _, opened := token.(json.Delim); opened {
		tokens.Token()
	}
	return unique
}

func BenchmarkParseOrder(b *testing.B) {
	for _, n := range []int{1, maxItems} {
		var ids []string
		for range n {
			ids = append(ids, newTestID())
		}
		body := []byte(marshalRaw(orderBody(newNumber(), ids...)))
		b.Run(fmt.Sprintf("%d paintings", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := parseOrder(body, 10000); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkHostileKeys is a megabyte of what costs checkUniqueKeys most.
func BenchmarkHostileKeys(b *testing.B) {
	var many strings.Builder
	for i := 0; many.Len() < maxBody-20; i++ {
		fmt.Fprintf(&many, `"%d":0,`, i)
	}
	for name, text := range map[string]string{
		"objects": "[" + strings.TrimSuffix(strings.Repeat("{},", maxBody/3), ",") + "]",
		"keys":    "{" + strings.TrimSuffix(many.String(), ",") + "}",
		"escapes": `{"` + strings.Repeat(`\u0061`, maxBody/6-10) + `":0}`,
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if err := decodeJSON([]byte(text), "", &struct{}{}); name != "objects" && err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
