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

// caller is the user that a request comes from. It is zero when the user is unknown.
type caller struct {
	id    string // the user's ObjectId, in lower case
	admin bool
}

// tokens verifies and issues the bearer tokens of the Lumiere login service: JWTs signed with HS256, with the claims id,
// isAdmin, iat and exp. A tokens is safe for concurrent use.
type tokens struct {
	secret []byte
	parser *jwt.Parser
	now    func() time.Time

	mu       sync.Mutex
	verified map[[sha256.Size]byte]verifiedToken // by the token's hash; a front end sends one token many times
}

// verifiedToken is the content of a token whose signature was correct.
type verifiedToken struct {
	caller  caller
	expires time.Time
}

// maxVerifiedTokens bounds tokens.verified. A full map is emptied.
const maxVerifiedTokens = 10_000

// newTokens returns tokens signed with secret. now is the clock.
func newTokens(secret []byte, now func() time.Time) *tokens {
	parser := jwt.NewParser(jwt.WithValidMethods([]string{"HS256"}), jwt.WithExpirationRequired(), jwt.WithTimeFunc(now))
	return &tokens{secret: secret, parser: parser, now: now, verified: map[[sha256.Size]byte]verifiedToken{}}
}

// claims are the claims of a token. Only the JSON boolean true in isAdmin makes an administrator. IsAdmin is an any so
// that a token with another type there is still valid, as a buyer's.
type claims struct {
	ID      string `json:"id"`
	IsAdmin any    `json:"isAdmin"`
	jwt.RegisteredClaims
}

// errNoToken says that a request has no bearer token.
var errNoToken = errors.New("no bearer token")

// caller returns the user whose valid token is in the request's Authorization header, or an error. The error may quote the
// token, so it must not be logged or sent to a client.
func (t *tokens) caller(r *http.Request) (caller, error) {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return caller{}, errNoToken
	}
	token = strings.TrimSpace(token)
	hash := sha256.Sum256([]byte(token))
	t.mu.Lock()
	cached, ok := t.verified[hash]
	t.mu.Unlock()
	if ok && t.now().Before(cached.expires) {
		return cached.caller, nil
	}
	verified, err := t.verify(token)
	if err != nil {
		return caller{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.verified) >= maxVerifiedTokens {
		clear(t.verified)
	}
	t.verified[hash] = verified
	return verified.caller, nil
}

// verify checks the token's signature, its expiry and that its id is an ObjectId.
func (t *tokens) verify(token string) (verifiedToken, error) {
	var c claims
	if _, err := t.parser.ParseWithClaims(token, &c, func(*jwt.Token) (any, error) { return t.secret, nil }); err != nil {
		return verifiedToken{}, err
	}
	id, ok := parseID(c.ID)
	if !ok {
		return verifiedToken{}, errors.New("the token's id is not an ObjectId")
	}
	return verifiedToken{caller: caller{id: id, admin: c.IsAdmin == true}, expires: c.ExpiresAt.Time}, nil
}

// issue returns a token for c that is valid from now for ttl.
func (t *tokens) issue(c caller, now time.Time, ttl time.Duration) (string, error) {
	return jwt.NewWithClaims(jwt.SigningMethodHS256, claims{
		ID:               c.id,
		IsAdmin:          c.admin,
		RegisteredClaims: jwt.RegisteredClaims{IssuedAt: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(ttl))},
	}).SignedString(t.secret)
}
