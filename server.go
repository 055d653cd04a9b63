package main

import (
	"bytes"
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// server is the http.Handler of the API. newServer builds it, for serve and for the tests.
type server struct {
	config   config
	store    *store
	settler  *settler
	notifier *notifier
	tokens   *tokens
	now      func() time.Time
	random   func() string // returns 16 unpredictable hex digits
	log      *slog.Logger
	mux      *http.ServeMux

	devHosts []string // the Hosts that local development answers to; nil: all

	largeBodies chan struct{} // a place for each body that is large

	limits  *limiter // of what callers have the gateway asked, and of new orders
	metrics *metrics
	outages map[gatewayName]*outage // whether each gateway responds
}

// request is an *http.Request with what a handler needs beside it.
type request struct {
	*http.Request
	body    io.Reader // the Request's Body, up to the route's bound
	caller  caller    // zero on a public route without a valid token
	id      string    // written to the log, the history and the response's X-Request-Id
	orderID string    // set by the handler, for the log line of the request
}

// actor returns the actor of the changes that the request makes.
func (r *request) actor() actor {
	by := actor{kind: actorBuyer, client: r.caller.client(), request: r.id}
	if r.caller.admin {
		by.kind, by.id = actorAdministrator, r.caller.id
	}
	return by
}

// access says which callers a route accepts.
type access int

const (
	public        access = iota // everyone; an invalid token is ignored
	authenticated               // callers with a valid token; others get 401
	admin                       // administrators; other callers get 403, or 401 without a valid token
)

// route is one call of the API.
type route struct {
	pattern string // method and path, as http.ServeMux takes them
	access  access
	body    int64                       // the largest request body, in bytes; 0 where none is read
	success int                         // status of a response without an error
	handle  func(*request) (any, error) // returns the JSON body, or an error for toHTTPError
}

// httpError is an error with the status and body of its response. The cause is for the log only.
type httpError struct {
	status     int
	body       any
	retryAfter time.Duration // sent as Retry-After, in whole seconds rounded up; 0 for none
	cause      error         // nil when there is nothing to log
}

func (e *httpError) Error() string {
	if e.cause != nil {
		return e.cause.Error()
	}
	return http.StatusText(e.status)
}

// message is the body of error responses and of most successes. Its text is shown to the buyer, so it is Korean.
type message struct {
	Message string `json:"message"`
}

// statusError returns an error with a status and a message.
func statusError(status int, text string) *httpError {
	return &httpError{status: status, body: message{text}}
}

// fieldError returns the 400 for a field of the request. Its message names the field and the problem.
func fieldError(field, problem string) *httpError {
	return statusError(http.StatusBadRequest, field+": "+problem)
}

const (
	messageFault   = "일시적인 오류가 발생했습니다. 잠시 후 다시 시도해 주세요"
	messageAway    = "서비스를 잠시 사용할 수 없습니다. 잠시 후 다시 시도해 주세요"
	messageGateway = "결제 서비스가 응답하지 않습니다. 잠시 후 다시 시도해 주세요"
	messageTooMany = "확인되지 않는 결제를 너무 많이 조회했습니다. 잠시 후 다시 시도해 주세요"
	messageBusy    = "요청이 한꺼번에 너무 많습니다. 잠시 후 다시 시도해 주세요"
	messageSignIn  = "로그인이 필요합니다"
	messageAdmin   = "관리자만 사용할 수 있습니다"
)

// statusClientClosed is nginx's status for a request whose client hung up. It is seen in the log and the metrics only.
const statusClientClosed = 499

// toHTTPError returns err as the client sees it. An error that no handler gave a response is a 5xx whose body says nothing
// about the cause.
func toHTTPError(err error) *httpError {
	if e, ok := errors.AsType[*httpError](err); ok {
		return e
	}
	gateway, isGateway := errors.AsType[*gatewayError](err)
	switch {
	case errors.Is(err, context.Canceled):
		return &httpError{status: statusClientClosed, body: message{messageFault}, cause: err}
	case errors.Is(err, errTooMany):
		return &httpError{status: http.StatusTooManyRequests, body: message{messageTooMany}, retryAfter: clientLimit.refill, cause: err}
	case errors.Is(err, errBusy):
		return &httpError{status: http.StatusTooManyRequests, body: message{messageBusy}, retryAfter: lookUpWait, cause: err}
	case isGateway:
		return &httpError{status: gateway.status, body: message{messageGateway}, retryAfter: 5 * time.Second, cause: err}
	case unavailable(err):
		return &httpError{status: http.StatusServiceUnavailable, body: message{messageAway}, retryAfter: 2 * time.Second, cause: err}
	default:
		return &httpError{status: http.StatusInternalServerError, body: message{messageFault}, cause: err}
	}
}

// add registers a route. Its handler runs in call; what is the same for all routes is here.
func (s *server) add(rt route) {
	stats := s.metrics.route(rt.pattern)
	s.mux.HandleFunc(rt.pattern, func(w http.ResponseWriter, hr *http.Request) {
		start := s.now()
		// hr.Body stays what net/http made it: by its type it knows that a client which sent Expect: 100-continue was not
		// asked for the body, so that it need not wait for one after the response.
		body := &placedBody{Reader: http.MaxBytesReader(w, hr.Body, rt.body), places: s.largeBodies}
		defer body.release()
		r := &request{Request: hr, body: body, id: s.requestID(hr)}
		w.Header().Set("X-Request-Id", r.id)

		var cause error
		status := rt.success
		answer, err := s.call(rt, r)
		if err != nil {
			failure := toHTTPError(err)
			status, answer, cause = failure.status, failure.body, failure.cause
			if failure.retryAfter > 0 {
				w.Header().Set("Retry-After", strconv.Itoa(int((failure.retryAfter+time.Second-1)/time.Second)))
			}
		}
		writeJSON(w, status, answer)
		elapsed := s.now().Sub(start)
		stats.count(status, elapsed)
		s.logRequest(r, rt.pattern, status, elapsed, cause)
	})
}

// call identifies the caller, checks the route's access and runs the handler. A panic becomes an error with its stack.
func (s *server) call(rt route, r *request) (body any, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	if r.Header["Authorization"] != nil {
		r.caller, _ = s.tokens.caller(r.Request) // without a valid token the caller stays zero
	}
	switch {
	case rt.access != public && r.caller.id == "":
		return nil, statusError(http.StatusUnauthorized, messageSignIn)
	case rt.access == admin && !r.caller.admin:
		return nil, statusError(http.StatusForbidden, messageAdmin)
	}
	return rt.handle(r)
}

// logRequest writes the log line of a request. The line has no personal data: no token, no body, no query, no address. A 500
// is a fault of this program, and an error in the log. The other 5xx say that something which it depends on is away or busy:
// each is a warning, and what is away has a line of its own.
func (s *server) logRequest(r *request, pattern string, status int, elapsed time.Duration, cause error) {
	level := slog.LevelInfo
	switch {
	case status == http.StatusInternalServerError:
		level = slog.LevelError
	case status > http.StatusInternalServerError:
		level = slog.LevelWarn
	}
	attrs := []slog.Attr{slog.String("route", pattern), slog.Int("status", status),
		slog.Float64("ms", float64(elapsed.Microseconds())/1000), slog.String("request", r.id)}
	if r.orderID != "" {
		attrs = append(attrs, slog.String("order", r.orderID))
	}
	if cause != nil {
		attrs = append(attrs, slog.String("cause", cause.Error()))
	}
	s.log.LogAttrs(context.WithoutCancel(r.Context()), level, "request", attrs...)
}

// ServeHTTP sets the headers that every response has, answers CORS preflights, and passes the rest to the mux.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	header := w.Header()
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Cache-Control", "no-store")
	if s.devHosts != nil && !s.allowsLocally(r) {
		writeJSON(w, http.StatusForbidden, message{messageNotLocal})
		return
	}
	if s.cors(w, r) {
		return
	}
	s.mux.ServeHTTP(w, r)
}

// noSuchCall answers what no route matches: 404, or 405 with an Allow header where the path has routes of other methods.
func (s *server) noSuchCall(w http.ResponseWriter, r *http.Request) {
	status, text := http.StatusNotFound, "없는 주소입니다"
	if allowed := s.allowedMethods(r); allowed != "" {
		status, text = http.StatusMethodNotAllowed, "이 주소에서 지원하지 않는 요청 방식입니다"
		w.Header().Set("Allow", allowed)
	}
	id := s.requestID(r)
	w.Header().Set("X-Request-Id", id)
	writeJSON(w, status, message{text})
	s.metrics.noRoute.count(status, 0)
	s.logRequest(&request{Request: r, id: id}, "none", status, 0, nil)
}

// allowedMethods returns the methods of the routes that the request's path has, as the Allow header lists them.
func (s *server) allowedMethods(r *http.Request) string {
	var methods []string
	for _, method := range []string{http.MethodDelete, http.MethodGet, http.MethodHead, http.MethodPatch, http.MethodPost} {
		other := r.Clone(r.Context())
		other.Method = method
		if _, pattern := s.mux.Handler(other); pattern != noRoute {
			methods = append(methods, method)
		}
	}
	return strings.Join(methods, ", ")
}

// noRoute is the pattern that matches a request when no route does.
const noRoute = "/"

// cors sets the CORS headers for the configured origins. It reports whether the request was a preflight, which it has
// answered then.
func (s *server) cors(w http.ResponseWriter, r *http.Request) (answered bool) {
	header := w.Header()
	header.Add("Vary", "Origin")
	origin := r.Header.Get("Origin")
	if origin == "" || !slices.Contains(s.config.origins, origin) {
		return false
	}
	header.Set("Access-Control-Allow-Origin", origin)
	header.Set("Access-Control-Expose-Headers", "X-Request-Id, Retry-After")
	if r.Method != http.MethodOptions || r.Header.Get("Access-Control-Request-Method") == "" {
		return false
	}
	header.Set("Access-Control-Allow-Methods", "GET, POST, PATCH, DELETE")
	header.Set("Access-Control-Allow-Headers", "Authorization, Content-Type")
	header.Set("Access-Control-Max-Age", "600")
	w.WriteHeader(http.StatusNoContent)
	return true
}

// requestIDPattern matches the X-Request-Id values that are accepted from a proxy.
var requestIDPattern = regexp.MustCompile(`^[A-Za-z0-9._-]{8,64}$`)

// requestID returns a new id for the request. When it comes from one of the trusted proxies with an acceptable X-Request-Id,
// requestID returns that one. Nobody else's is accepted, because the id is written into the history, which cannot be changed.
func (s *server) requestID(r *http.Request) string {
	if id := r.Header.Get("X-Request-Id"); id != "" && requestIDPattern.MatchString(id) && s.fromProxy(r) {
		return id
	}
	return s.random()
}

// fromProxy reports whether the request's peer is one of the trusted proxies.
func (s *server) fromProxy(r *http.Request) bool {
	peer, _ := parseAddress(r.RemoteAddr)
	return slices.ContainsFunc(s.config.proxies, func(p netip.Prefix) bool { return p.Contains(peer) })
}

// ---- JSON

// buffers keeps the buffers of writeJSON between requests.
var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// writeJSON writes the response: status, and value as JSON with HTML characters unescaped. The value is encoded before the
// header is written, so that an encoding error can still become a 500.
func writeJSON(w http.ResponseWriter, status int, value any) {
	buffer := buffers.Get().(*bytes.Buffer)
	defer buffers.Put(buffer)
	buffer.Reset()
	encoder := json.NewEncoder(buffer)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(value); err != nil {
		slog.Error("encode response", "error", err)
		buffer.Reset()
		status = http.StatusInternalServerError
		buffer.WriteString(`{"message":"` + messageFault + `"}`)
	}
	header := w.Header()
	header.Set("Content-Type", "application/json; charset=utf-8")
	header.Set("Content-Length", strconv.Itoa(buffer.Len()))
	w.WriteHeader(status)
	w.Write(buffer.Bytes())
}

// marshalRaw returns value as JSON with HTML characters unescaped, as the database keeps it. The value must be one that
// can be encoded; else marshalRaw panics.
func marshalRaw(value any) string {
	var text strings.Builder
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(value); err != nil {
		panic(err)
	}
	return strings.TrimSuffix(text.String(), "\n")
}

// decodeJSON decodes the JSON in text into value. The error is a 400. It names the field whose type is wrong, or the key that
// comes twice in one object; prefix is the path of value in the request body, "" for the body itself.
func decodeJSON(text []byte, prefix string, value any) error {
	err := json.Unmarshal(text, value)
	mistyped, wrongType := errors.AsType[*json.UnmarshalTypeError](err)
	switch {
	case err == nil && prefix == "":
		return checkUniqueKeys(text)
	case err == nil: // part of a body that was checked as a whole
		return nil
	case wrongType && prefix+mistyped.Field != "":
		return fieldError(joinField(prefix, mistyped.Field), "형식이 올바르지 않습니다")
	case wrongType:
		return statusError(http.StatusBadRequest, "요청 본문은 JSON 객체여야 합니다")
	default:
		return statusError(http.StatusBadRequest, "요청 본문이 올바른 JSON이 아닙니다")
	}
}

// joinField returns the path of a field below prefix, either of which may be empty.
func joinField(prefix, field string) string {
	if prefix == "" || field == "" {
		return prefix + field
	}
	return prefix + "." + field
}

// decodeBody decodes the request body, a JSON object, into value. Errors are those of readBody and decodeObject.
func decodeBody(r *request, value any) error {
	body, err := readBody(r)
	if err != nil {
		return err
	}
	return decodeObject(body, value)
}

// decodeObject decodes a request body. A JSON null is rejected, because the body must be an object.
func decodeObject(body []byte, value any) error {
	if string(bytes.TrimSpace(body)) == "null" {
		return statusError(http.StatusBadRequest, "요청 본문은 JSON 객체여야 합니다")
	}
	return decodeJSON(body, "", value)
}

// parseID returns the ObjectId in text (24 hex digits) in lower case, and whether text is one.
func parseID(text string) (string, bool) {
	if len(text) != 24 {
		return "", false
	}
	for i := range len(text) {
		if c := text[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') && (c < 'A' || c > 'F') {
			return "", false
		}
	}
	return strings.ToLower(text), true
}

// validID reports whether text is an ObjectId in lower case, as this service writes them.
func validID(text string) bool {
	id, ok := parseID(text)
	return ok && id == text
}

// newID returns a new ObjectId: 8 hex digits of now in Unix seconds, then 16 random ones.
func (s *server) newID(now time.Time) string {
	return fmt.Sprintf("%08x%s", uint32(now.Unix()), s.random())
}

// timeFormat is the format of times in responses: UTC with milliseconds, as the API page shows them.
const timeFormat = "2006-01-02T15:04:05.000Z"

// jsonTime is a time that is encoded in timeFormat.
type jsonTime time.Time

func (t jsonTime) MarshalText() ([]byte, error) {
	utc := time.Time(t).UTC()
	text := utc.AppendFormat(make([]byte, 0, len(timeFormat)), time.RFC3339) // several times as fast as timeFormat
	ms := utc.Nanosecond() / 1e6
	return append(text[:len(text)-1], '.', byte('0'+ms/100), byte('0'+ms/10%10), byte('0'+ms%10), 'Z'), nil
}

// routes returns every call of the API: pattern, access, largest body, status of a success, handler. newServer adds /openapi.json and
// the page at /.
func (s *server) routes() []route {
	return []route{
		{"GET /api/products/cart-items", public, 0, 200, s.cartItems},
		{"GET /api/products/total-price", authenticated, 0, 200, s.totalPrice},
		{"PATCH /api/products/{id}", admin, smallBody, 200, s.changeProduct},
		{"POST /api/orders", authenticated, maxBody, 201, s.createOrder},
		{"PATCH /api/orders/pay", public, smallBody, 200, s.pay},
		{"DELETE /api/orders/{id}", authenticated, smallBody, 200, ofOrder(messageNoSuchOrder, s.deleteOrder)},
		{"GET /api/orders/{id}", authenticated, 0, 200, ofOrder(messageOrderUnknown, s.showOrder)},
		{"GET /api/orders/latest", authenticated, 0, 200, s.showLatest},
		{"POST /api/payments/webhook", public, smallBody, 200, s.webhook},

		{"GET /api/orders/mine", authenticated, 0, 200, s.listMine},
		{"GET /api/orders", admin, 0, 200, s.listOrders},
		{"PATCH /api/orders/{id}", authenticated, textBody, 200, ofOrder(messageNoSuchOrder, s.advanceOrder)},
		{"POST /api/orders/{id}/refund", admin, textBody, 200, ofOrder(messageNoSuchOrder, s.helpRefund)},
		{"GET /api/orders/{id}/history", authenticated, 0, 200, ofOrder(messageOrderUnknown, s.showHistory)},

		{"GET /healthz", public, 0, 200, s.healthz},
		{"GET /readyz", public, 0, 200, s.readyz},
	}
}

// newServer returns a server. transport carries the calls to the gateways; when it is nil they go over the network. now is
// the clock. The caller closes the store, after the server's last request.
func newServer(c config, store *store, transport http.RoundTripper, log *slog.Logger, now func() time.Time) *server {
	s := &server{
		config:  c,
		store:   store,
		tokens:  newTokens(c.jwtSecret, now),
		now:     now,
		random:  randomDigits,
		log:     log,
		mux:     http.NewServeMux(),
		limits:  newLimiter(now),
		metrics: newMetrics(),
		outages: map[gatewayName]*outage{gatewayIamport: {gateway: gatewayIamport}, gatewayPortOne: {gateway: gatewayPortOne}},

		largeBodies: make(chan struct{}, maxLargeBodies),
	}
	s.settler = &settler{
		store:      store,
		gateways:   newGateways(c, now, transport, s.observeGateway),
		limits:     s.limits,
		now:        now,
		log:        log,
		interval:   c.reconcile,
		hold:       c.hold,
		keep:       c.keep,
		unreadable: recent[string, struct{}]{keep: time.Hour, most: 1000},
	}
	s.notifier = newNotifier(c, store, log, now)
	for _, rt := range s.routes() {
		s.add(rt)
	}
	s.mux.HandleFunc(noRoute, s.noSuchCall)
	s.mux.HandleFunc("GET /openapi.json", showOpenAPI)
	if !c.local { // devEnv.setUp puts its page there
		s.add(route{pattern: "GET /{$}", access: public, success: 200, handle: s.about})
	}
	return s
}

// openAPI is the OpenAPI document of this API.
//
//go:embed openapi.json
var openAPI []byte

// showOpenAPI answers GET /openapi.json. It is not in routes because its body is served as it is.
func showOpenAPI(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Cache-Control", "public, max-age=300")
	w.Write(openAPI)
}

// randomDigits returns 16 unpredictable hex digits.
func randomDigits() string {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// about answers GET / outside local development.
func (s *server) about(*request) (any, error) {
	return struct {
		Name    string `json:"name"`
		Version string `json:"version"`
		OpenAPI string `json:"openapi"`
	}{"lumiere", version(), "/openapi.json"}, nil
}
