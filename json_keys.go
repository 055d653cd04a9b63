package main

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"
	"unicode"
)

// messageDuplicateKey follows the path of a key that comes twice.
const messageDuplicateKey = "같은 이름의 값이 두 번 들어 있습니다"

// maxKeyPath is how many bytes of the path a 400 quotes. The client made it up.
const maxKeyPath = 200

// checkUniqueKeys returns a 400 that names the first key which comes twice in one object of text, at any depth. encoding/json
// would take the last one, or mix both when their values are objects. Keys are the same when encoding/json could take both for
// one field: escapes are resolved, and case does not matter. text must be valid JSON.
func checkUniqueKeys(text []byte) error {
	scan := keyScanner{text: text}
	if scan.value() {
		return nil
	}
	path := string(scan.path)
	if len(path) > maxKeyPath {
		path = strings.ToValidUTF8(path[:maxKeyPath], "") + "…"
	}
	return fieldError(path, messageDuplicateKey)
}

// keyScanner walks through valid JSON and stops at the first key that comes twice in an object.
type keyScanner struct {
	text []byte // what is left
	path []byte // of the value that text begins with, such as orderItems[0].price
}

// value skips the next value, and reports whether no key in it comes twice. When one does, path is that key's.
func (s *keyScanner) value() bool {
	switch s.next() {
	case '{':
		return s.object()
	case '[':
		return s.array()
	case '"':
		s.string()
	default: // a number, true, false or null
		end := bytes.IndexAny(s.text, ",]} \t\r\n")
		if end < 0 {
			end = len(s.text)
		}
		s.text = s.text[end:]
	}
	return true
}

func (s *keyScanner) object() bool {
	outer := len(s.path)
	var seen keySet
	for s.skip(); s.next() != '}'; {
		if s.text[0] == ',' {
			s.skip()
			continue
		}
		key := unquote(s.string())
		s.next()
		s.skip() // the colon
		if outer > 0 {
			s.path = append(s.path, '.')
		}
		s.path = append(s.path, key...)
		if !seen.add(key) {
			return false
		}
		if !s.value() {
			return false
		}
		s.path = s.path[:outer]
	}
	s.skip()
	return true
}

func (s *keyScanner) array() bool {
	outer := len(s.path)
	for n := 0; ; n++ {
		s.skip()             // the bracket or a comma
		if s.next() == ']' { // of an empty array
			break
		}
		s.path = append(strconv.AppendInt(append(s.path, '['), int64(n), 10), ']')
		if !s.value() {
			return false
		}
		s.path = s.path[:outer]
		if s.next() == ']' {
			break
		}
	}
	s.skip()
	return true
}

// next drops white space and returns the first byte after it.
func (s *keyScanner) next() byte {
	s.text = bytes.TrimLeft(s.text, " \t\r\n")
	return s.text[0]
}

// skip drops one byte.
func (s *keyScanner) skip() { s.text = s.text[1:] }

// string drops a string and returns it with its quotes.
func (s *keyScanner) string() []byte {
	end := 1
	for s.text[end] != '"' {
		if s.text[end] == '\\' {
			end++
		}
		end++
	}
	quoted := s.text[:end+1]
	s.text = s.text[end+1:]
	return quoted
}

// unquote returns the content of a string in quotes, which must be valid JSON.
func unquote(quoted []byte) []byte {
	if bytes.IndexByte(quoted, '\\') < 0 {
		return quoted[1 : len(quoted)-1]
	}
	var text string
	json.Unmarshal(quoted, &text)
	return []byte(text)
}

// keySet is the set of an object's keys, without regard to case. The first ones need no allocation, and an object of this API
// has no more. Searching the rest takes no longer when there are many, so that a body full of keys is no attack.
type keySet struct {
	few  [16][]byte
	n    int // how many few has
	rest map[string]struct{}
}

// add adds key, and reports whether the set did not have it.
func (k *keySet) add(key []byte) bool {
	for _, other := range k.few[:k.n] {
		if bytes.EqualFold(key, other) {
			return false
		}
	}
	if k.n < len(k.few) {
		k.few[k.n] = key
		k.n++
		return true
	}
	if k.rest == nil {
		k.rest = map[string]struct{}{}
	}
	folded := string(bytes.Map(foldRune, key))
	_, has := k.rest[folded]
	k.rest[folded] = struct{}{}
	return !has
}

// foldRune returns the smallest of the characters that bytes.EqualFold takes for r.
func foldRune(r rune) rune {
	for {
		next := unicode.SimpleFold(r)
		if next <= r {
			return next
		}
		r = next
	}
}
