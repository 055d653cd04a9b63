package main

import (
	"crypto/sha256"
	"errors"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// caller is who a request comes from; the zero Caller is nobody.
type caller struct {
	id    string // the user's ObjectId, lower case
	admin bool
}

// tokens reads and makes the bearer tokens of the Lumiere login service: HS256, claims id, isAdmin, iat, exp.
type tokens struct {
	secret []byte
	parser *jwt.Parser
	now    func() time.Time

	mu   sync.Mutex
	good map[[sha256.Size]byte]goodToken // verified before: a page makes many calls with one token
}

// goodToken is what a verified token says.
type goodToken struct {
	caller  caller
	expires time.Time
}

// goodTokens bounds how many are remembered; beyond, all are forgotten and verified anew.
const goodTokens = 10_000

// newTokens uses secret and tells the time with now.
func newTokens(secret []byte, now func() time.Time) *tokens {
	parser := jwt.NewParser(jwt.WithValidMethods([]string{"HS256"}), jwt.WithExpirationRequired(), jwt.WithTimeFunc(now))
	return &tokens{secret: secret, parser: parser, now: now, good: map[[sha256.Size]byte]goodToken{}}
}

// claims are what a token says. IsAdmin is any so that only the JSON boolean true makes an administrator, without a
// string or a number in its place making the token a bad one.
type claims struct {
	ID      string `json:"id"`
	IsAdmin any    `json:"isAdmin"`
	jwt.RegisteredClaims
}

var errNoToken = errors.New("no bearer token")

// caller is who the request's Authorization header says, or an error that says why nobody. The error is not for logs
// or clients: it may quote the token.
func (t *tokens) caller(r *http.Request) (caller, error) {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return caller{}, errNoToken
	}
	token = strings.TrimSpace(token)
	hash := sha256.Sum256([]byte(token))
	t.mu.Lock()
	known, ok := t.good[hash]
	t.mu.Unlock()
	if ok && t.now().Before(known.expires) {
		return known.caller, nil
	}
	verified, err := t.verify(token)
	if err != nil {
		return caller{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.good) >= goodTokens {
		clear(t.good)
	}
	t.good[hash] = verified
	return verified.caller, nil
}

// verify reads a token that has not been seen before.
func (t *tokens) verify(token string) (goodToken, error) {
	var c claims
	if _, err := t.parser.ParseWithClaims(token, &c, func(*jwt.Token) (any, error) { return t.secret, nil }); err != nil {
		return goodToken{}, err
	}
	id, ok := parseID(c.ID)
	if !ok {
		return goodToken{}, errors.New("the token's id is not an ObjectId")
	}
	return goodToken{caller{id: id, admin: c.IsAdmin == true}, c.ExpiresAt.Time}, nil
}

// issue makes a token for caller that is good for ttl from now.
func (t *tokens) issue(who caller, now time.Time, ttl time.Duration) (string, error) {
	return jwt.NewWithClaims(jwt.SigningMethodHS256, claims{
		ID: who.id, IsAdmin: who.admin,
		RegisteredClaims: jwt.RegisteredClaims{IssuedAt: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(ttl))},
	}).SignedString(t.secret)
}
