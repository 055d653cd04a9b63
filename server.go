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
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// server answers the API. It is built once, for main and the tests alike, and is its own http.Handler.
type server struct {
	config  config
	store   *store
	settler *settler
	tokens  *tokens
	now     func() time.Time
	random  func() string // 16 hex digits nobody can guess
	log     *slog.Logger
	mux     *http.ServeMux

	limits  *limiter // of what strangers may ask
	metrics *metrics
	outage  outage // of the gateway
}

// request is an *http.Request with what the shell around the handlers knows of it.
type request struct {
	*http.Request
	caller  caller // the zero Caller on a call that needs no token and has no good one
	id      string // in the log, the history and the answer's X-Request-Id
	orderID string // set by handlers for the log
}

// actor is the change that this request's caller makes.
func (r *request) actor() actor {
	if r.caller.admin {
		return actor{kind: actorAdministrator, id: r.caller.id, request: r.id}
	}
	return actor{kind: actorBuyer, request: r.id}
}

// access is who may make a call.
type access int

const (
	public        access = iota // a token that is not good is ignored
	authenticated               // 401 without a good token
	admin                       // 403 without an administrator's
)

// route is a line of the API's table: a method and path, who may call it, the status of a success, and its handler. The
// handler's value becomes the JSON body; its error a refusal, or an opaque 5xx.
type route struct {
	pattern string
	access  access
	success int
	handle  func(*request) (any, error)
}

// httpError is an error that clients see: its status and body. The cause is for the log alone.
type httpError struct {
	status     int
	body       any
	retryAfter time.Duration
	cause      error
}

func (e *httpError) Error() string {
	if e.cause != nil {
		return e.cause.Error()
	}
	return http.StatusText(e.status)
}

// message is the body of every refusal and of most successes.
type message struct {
	Message string `json:"message"`
}

// statusError is a refusal with a message in Korean.
func statusError(status int, text string) *httpError {
	return &httpError{status: status, body: message{text}}
}

// fieldError is the 400 that names a field and says what is wrong with it.
func fieldError(field, problem string) *httpError {
	return statusError(http.StatusBadRequest, field+": "+problem)
}

const (
	messageFault   = "일시적인 오류가 발생했습니다. 잠시 후 다시 시도해 주세요"
	messageAway    = "서비스를 잠시 사용할 수 없습니다. 잠시 후 다시 시도해 주세요"
	messageGateway = "결제 서비스가 응답하지 않습니다. 잠시 후 다시 시도해 주세요"
	messageTooMany = "확인되지 않는 결제를 너무 많이 조회했습니다. 잠시 후 다시 시도해 주세요"
	messageSignIn  = "로그인이 필요합니다"
	messageAdmin   = "관리자만 사용할 수 있습니다"
)

// toHTTPError maps an error to what the client sees: the one place that does.
func toHTTPError(err error) *httpError {
	var r *httpError
	var gateway *gatewayError
	switch {
	case errors.As(err, &r):
		return r
	case errors.Is(err, context.Canceled):
		return &httpError{status: 499, body: message{messageFault}, cause: err} // the client went away
	case errors.As(err, &gateway):
		return &httpError{status: gateway.status, body: message{messageGateway}, retryAfter: 5 * time.Second, cause: err}
	case unavailable(err):
		return &httpError{status: http.StatusServiceUnavailable, body: message{messageAway}, retryAfter: 2 * time.Second, cause: err}
	default:
		return &httpError{status: http.StatusInternalServerError, body: message{messageFault}, cause: err}
	}
}

// add puts a route on the mux.
func (s *server) add(rt route) {
	traffic := s.metrics.route(rt.pattern)
	s.mux.HandleFunc(rt.pattern, func(w http.ResponseWriter, hr *http.Request) {
		start := s.now()
		r := &request{Request: hr, id: s.requestID(hr)}
		w.Header().Set("X-Request-Id", r.id)
		hr.Body = http.MaxBytesReader(w, hr.Body, maxBody)

		status, body := rt.success, any(nil)
		var cause error
		if value, err := s.call(rt, r); err == nil {
			body = value
		} else {
			refused := toHTTPError(err)
			status, body, cause = refused.status, refused.body, refused.cause
			if refused.retryAfter > 0 {
				w.Header().Set("Retry-After", strconv.Itoa(int((refused.retryAfter+time.Second-1)/time.Second)))
			}
		}
		writeJSON(w, status, body)
		took := s.now().Sub(start)
		traffic.count(status, took)
		s.logRequest(r, rt.pattern, status, took, cause)
	})
}

// call finds out who calls, and lets the handler answer. A panic is an error.
func (s *server) call(rt route, r *request) (body any, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	if r.Header["Authorization"] != nil {
		r.caller, err = s.tokens.caller(r.Request)
	}
	switch {
	case rt.access != public && r.caller.id == "":
		return nil, statusError(http.StatusUnauthorized, messageSignIn)
	case rt.access == admin && !r.caller.admin:
		return nil, statusError(http.StatusForbidden, messageAdmin)
	}
	return rt.handle(r)
}

// logRequest writes the one line of a request. It has no token, no body and no query: nothing of a person.
func (s *server) logRequest(r *request, pattern string, status int, took time.Duration, cause error) {
	level := slog.LevelInfo
	if status >= 500 {
		level = slog.LevelError
	}
	attrs := []slog.Attr{slog.String("route", pattern), slog.Int("status", status),
		slog.Float64("ms", float64(took.Microseconds())/1000), slog.String("request", r.id)}
	if r.orderID != "" {
		attrs = append(attrs, slog.String("order", r.orderID))
	}
	if cause != nil {
		attrs = append(attrs, slog.String("cause", cause.Error()))
	}
	s.log.LogAttrs(context.WithoutCancel(r.Context()), level, "request", attrs...)
}

// ServeHTTP is everything that is the same for all calls, around the mux.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	header := w.Header()
	header.Set("X-Content-Type-Options", "nosniff")
	if s.cors(w, r) {
		return
	}
	if _, pattern := s.mux.Handler(r); pattern == "" {
		s.noSuchCall(w, r)
		return
	}
	s.mux.ServeHTTP(w, r)
}

// noSuchCall answers 404 and 405 in JSON; the mux knows which, and which methods there are.
func (s *server) noSuchCall(w http.ResponseWriter, r *http.Request) {
	seen := &statusOnly{header: w.Header()}
	s.mux.ServeHTTP(seen, r)
	text := "없는 주소입니다"
	if seen.status == http.StatusMethodNotAllowed {
		text = "이 주소에서 지원하지 않는 요청 방식입니다"
	}
	writeJSON(w, seen.status, message{text})
	s.metrics.noRoute.count(seen.status, 0)
	s.logRequest(&request{Request: r, id: s.requestID(r)}, "none", seen.status, 0, nil)
}

// statusOnly is a ResponseWriter that keeps the status and drops the body.
type statusOnly struct {
	header http.Header
	status int
}

func (w *statusOnly) Header() http.Header         { return w.header }
func (w *statusOnly) Write(b []byte) (int, error) { return len(b), nil }
func (w *statusOnly) WriteHeader(status int)      { w.status = status }

// cors lets the pages of listed origins call, and answers their preflights; it reports whether it did.
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

// requestIDs are the ids of a caller or proxy in front that are taken over.
var requestIDs = regexp.MustCompile(`^[A-Za-z0-9._-]{8,64}$`)

func (s *server) requestID(r *http.Request) string {
	if id := r.Header.Get("X-Request-Id"); id != "" && requestIDs.MatchString(id) {
		return id
	}
	return s.random()
}

// ---- JSON

var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// writeJSON answers value, Korean and HTML characters as they are. It is encoded before the header is written, so that a
// fault can still be a 500.
func writeJSON(w http.ResponseWriter, status int, value any) {
	buffer := buffers.Get().(*bytes.Buffer)
	defer buffers.Put(buffer)
	buffer.Reset()
	encoder := json.NewEncoder(buffer)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(value); err != nil {
		slog.Error("encode answer", "error", err)
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

// marshalRaw is value as the JSON that the database keeps, Korean and HTML characters as they are.
func marshalRaw(value any) string {
	var text strings.Builder
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(value); err != nil {
		panic(err) // structs of strings
	}
	return strings.TrimSuffix(text.String(), "\n")
}

// maxBody bounds the body of a request, in bytes.
const maxBody = 1 << 20

// readBody is the request's body: 413 when it is too large, 400 when it is not UTF-8.
func readBody(r *request) ([]byte, error) {
	body, err := io.ReadAll(r.Body)
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, statusError(http.StatusRequestEntityTooLarge, "요청 본문은 1MB를 넘을 수 없습니다")
	case err != nil:
		return nil, statusError(http.StatusBadRequest, "요청 본문을 끝까지 읽지 못했습니다")
	case !utf8.Valid(body):
		return nil, statusError(http.StatusBadRequest, "요청 본문이 올바른 UTF-8이 아닙니다")
	}
	return body, nil
}

// decodeJSON reads JSON into value. What does not fit is a 400 that names the field, below prefix.
func decodeJSON(text []byte, prefix string, value any) error {
	err := json.Unmarshal(text, value)
	var mistyped *json.UnmarshalTypeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &mistyped) && prefix+mistyped.Field != "":
		return fieldError(joinField(prefix, mistyped.Field), "형식이 올바르지 않습니다")
	case errors.As(err, &mistyped):
		return statusError(http.StatusBadRequest, "요청 본문은 JSON 객체여야 합니다")
	default:
		return statusError(http.StatusBadRequest, "요청 본문이 올바른 JSON이 아닙니다")
	}
}

func joinField(prefix, field string) string {
	if prefix == "" || field == "" {
		return prefix + field
	}
	return prefix + "." + field
}

// decodeBody reads the request's JSON object into value.
func decodeBody(r *request, value any) error {
	body, err := readBody(r)
	if err != nil {
		return err
	}
	return decodeObject(body, value)
}

// decodeObject is decodeJSON for a whole body, which null is not.
func decodeObject(body []byte, value any) error {
	if string(bytes.TrimSpace(body)) == "null" {
		return statusError(http.StatusBadRequest, "요청 본문은 JSON 객체여야 합니다")
	}
	return decodeJSON(body, "", value)
}

// parseID is the ObjectId in text in lower case; false when it is none.
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

// validID reports whether text is an ObjectId as we write it.
func validID(text string) bool {
	id, ok := parseID(text)
	return ok && id == text
}

// newID makes an ObjectId: the seconds of now, then random digits.
func (s *server) newID(now time.Time) string {
	return fmt.Sprintf("%08x%s", uint32(now.Unix()), s.random())
}

// timeFormat is how times are answered: UTC, three decimals, Z.
const timeFormat = "2006-01-02T15:04:05.000Z"

// jsonTime is a time in JSON, in timeFormat.
type jsonTime time.Time

func (t jsonTime) MarshalText() ([]byte, error) {
	return time.Time(t).UTC().AppendFormat(nil, timeFormat), nil
}

// routes is the API. It is the one list of what can be called.
func (s *server) routes() []route {
	return []route{
		{"GET /api/products/cart-items", public, 200, s.cartItems},
		{"GET /api/products/total-price", authenticated, 200, s.totalPrice},
		{"PATCH /api/products/{id}", admin, 200, s.changeProduct},
		{"POST /api/orders", authenticated, 201, s.createOrder},
		{"PATCH /api/orders/pay", public, 200, s.pay},
		{"DELETE /api/orders/{id}", authenticated, 200, ofOrder(messageNoSuchOrder, s.deleteOrder)},
		{"GET /api/orders/{id}", authenticated, 200, ofOrder(messageOrderUnknown, s.showOrder)},
		{"GET /api/orders/latest", authenticated, 200, s.showLatest},
		{"POST /api/payments/webhook", public, 200, s.webhook},

		{"GET /api/orders/mine", authenticated, 200, s.listMine},
		{"GET /api/orders", admin, 200, s.listOrders},
		{"PATCH /api/orders/{id}", authenticated, 200, ofOrder(messageNoSuchOrder, s.advanceOrder)},
		{"POST /api/orders/{id}/refund", admin, 200, ofOrder(messageNoSuchOrder, s.helpRefund)},
		{"GET /api/orders/{id}/history", authenticated, 200, ofOrder(messageOrderUnknown, s.showHistory)},

		{"GET /healthz", public, 200, s.healthz},
		{"GET /readyz", public, 200, s.readyz},
	}
}

// newServer builds the service around a store and the way to the gateway (nil: the network), for main and the tests alike.
func newServer(c config, store *store, toGateway http.RoundTripper, log *slog.Logger, now func() time.Time) *server {
	s := &server{
		config: c, store: store, tokens: newTokens(c.jwtSecret, now), now: now, random: randomDigits, log: log, mux: http.NewServeMux(),
		limits: newLimiter(now), metrics: newMetrics(),
	}
	gateway := newIamportClient(iamportConfig{url: c.iamportURL, key: c.iamportKey, secret: c.iamportSecret, sandbox: c.sandbox,
		now: now, transport: toGateway, observe: s.observeGateway})
	s.settler = &settler{
		store: store, gateway: gateway, limits: s.limits, now: now, log: log, interval: c.reconcile, hold: c.hold,
		unreadable: recent[string, struct{}]{keep: time.Hour, most: 1000},
	}
	for _, rt := range s.routes() {
		s.add(rt)
	}
	s.mux.HandleFunc("GET /openapi.json", showOpenAPI)
	if !c.local { // there it is the page
		s.add(route{"GET /{$}", public, 200, s.about})
	}
	return s
}

// openAPI describes every call for whoever writes a front end.
//
//go:embed openapi.json
var openAPI []byte

// showOpenAPI answers /openapi.json.
func showOpenAPI(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Cache-Control", "public, max-age=300")
	w.Write(openAPI)
}

// randomDigits are 16 hex digits nobody can guess.
func randomDigits() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// about answers / in a configured deployment.
func (s *server) about(*request) (any, error) {
	return struct {
		Name    string `json:"name"`
		Version string `json:"version"`
		OpenAPI string `json:"openapi"`
	}{"lumiere", version(), "/openapi.json"}, nil
}
