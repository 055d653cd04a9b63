package main

import (
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// Caller is who a request comes from; the zero Caller is nobody.
type Caller struct {
	ID    string // the user's ObjectId, lower case
	Admin bool
}

// tokens reads and makes the bearer tokens of the Lumiere login service: HS256, claims id, isAdmin, iat, exp.
type tokens struct {
	secret []byte
	parser *jwt.Parser
}

// newTokens uses secret and tells the time with now.
func newTokens(secret []byte, now func() time.Time) *tokens {
	return &tokens{secret, jwt.NewParser(jwt.WithValidMethods([]string{"HS256"}), jwt.WithExpirationRequired(), jwt.WithTimeFunc(now))}
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
func (t *tokens) caller(r *http.Request) (Caller, error) {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return Caller{}, errNoToken
	}
	var c claims
	if _, err := t.parser.ParseWithClaims(strings.TrimSpace(token), &c, func(*jwt.Token) (any, error) { return t.secret, nil }); err != nil {
		return Caller{}, err
	}
	id, ok := parseID(c.ID)
	if !ok {
		return Caller{}, errors.New("the token's id is not an ObjectId")
	}
	return Caller{ID: id, Admin: c.IsAdmin == true}, nil
}

// issue makes a token for caller that is good for ttl from now.
func (t *tokens) issue(caller Caller, now time.Time, ttl time.Duration) (string, error) {
	return jwt.NewWithClaims(jwt.SigningMethodHS256, claims{
		ID: caller.ID, IsAdmin: caller.Admin,
		RegisteredClaims: jwt.RegisteredClaims{IssuedAt: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(ttl))},
	}).SignedString(t.secret)
}
