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

// verify checks the token as RFC 7515 and RFC 7519 demand, and that its id is an ObjectId. Claims are decoded into a map, so
// that their names are case-sensitive, and of a name that comes twice the last one counts. Only the JSON boolean true in isAdmin
// makes an administrator.
func (t *tokens) verify(token string) (verifiedToken, error) {
	claims := jwt.MapClaims{}
	parsed, err := t.parser.ParseWithClaims(token, claims, func(*jwt.Token) (any, error) { return t.secret, nil })
	if err != nil {
		return verifiedToken{}, err
	}
	if _, has := parsed.Header["crit"]; has {
		return verifiedToken{}, errors.New("the token has extensions that must be understood")
	}
	if _, has := claims["aud"]; has { // the login service names no audience, so it is never this one
		return verifiedToken{}, errors.New("the token is for another audience")
	}
	text, _ := claims["id"].(string)
	id, ok := parseID(text)
	if !ok {
		return verifiedToken{}, errors.New("the token's id is not an ObjectId")
	}
	expires, err := claims.GetExpirationTime()
	if err != nil {
		return verifiedToken{}, err
	}
	return verifiedToken{caller: caller{id: id, admin: claims["isAdmin"] == true}, expires: expires.Time}, nil
}

// issue returns a token for c that is valid from now for ttl.
func (t *tokens) issue(c caller, now time.Time, ttl time.Duration) (string, error) {
	return jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{
		"id":      c.id,
		"isAdmin": c.admin,
		"iat":     now.Unix(),
		"exp":     now.Add(ttl).Unix(),
	}).SignedString(t.secret)
}
