package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// openapi.json against the service, both ways. The shop's ServeHTTP holds every request and answer of every test against the
// file: what it does not say fails that test. What the file says and no test has shown fails the whole run (wantWholeAPI).

// ---- the file

// apiFile is openapi.json, in as much of OpenAPI and JSON Schema as it uses: it has no other keyword.
type apiFile struct {
	OpenAPI string
	Info    struct {
		Title, Version, Description string
		Contact                     struct{ Name string }
		License                     struct{ Name, Identifier string }
	}
	Servers    []struct{ URL, Description string }
	Tags       []struct{ Name, Description string }
	Security   []any
	Paths      map[string]map[string]*apiCall
	Webhooks   map[string]map[string]*apiCall
	Components struct {
		SecuritySchemes     map[string]any
		Parameters, Headers map[string]*apiText
		Responses           map[string]*apiBody
		Schemas             map[string]*apiSchema
	}

	schemas []*apiSchema // all of them
	parts   []string     // what tests have to show: each call's parameters and statuses, each schema, each value of an enum
	mu      sync.Mutex
	shown   map[string]bool
}

type apiCall struct {
	OperationID, Summary, Description string
	Tags                              []string
	Security                          *[]any // nil: with a token
	Parameters                        []*apiText
	RequestBody                       *apiBody
	Responses                         map[string]*apiBody
	name                              string // its route's pattern
}

// apiText is a parameter or a header.
type apiText struct {
	Ref                   string `json:"$ref"`
	Name, In, Description string
	Required              bool
	Schema                *apiSchema
}

// apiBody is the body of a request, or an answer.
type apiBody struct {
	Ref         string `json:"$ref"`
	Description string
	Required    bool
	Headers     map[string]*apiText
	Content     map[string]struct{ Schema *apiSchema }
}

type apiSchema struct {
	Ref                 string `json:"$ref"`
	Type                any    // a name, or several
	Pattern             string
	Enum                []any
	Minimum             *float64
	Required            []string
	Properties          map[string]*apiSchema
	Items               *apiSchema
	MinItems, MaxItems  *int
	AnyOf               []*apiSchema
	Examples            []any
	Description, Format string
	name                string
	to                  *apiSchema // what Ref names
	pattern             *regexp.Regexp
}

// theAPI is openapi.json with every reference followed.
var theAPI = sync.OnceValue(func() *apiFile {
	f := &apiFile{shown: map[string]bool{}}
	decoder := json.NewDecoder(bytes.NewReader(openAPI))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(f); err != nil {
		panic(fmt.Errorf("openapi.json: %w", err))
	}
	for name, s := range f.Components.Schemas {
		f.prepare(s, name)
	}
	for name, text := range f.Components.Parameters {
		f.prepare(text.Schema, "parameter "+name)
	}
	for name, text := range f.Components.Headers {
		f.prepare(text.Schema, "header "+name)
	}
	for name, body := range f.Components.Responses {
		f.prepareBody(body, "response "+name)
	}
	for at, methods := range f.Paths {
		for method, c := range methods {
			c.name = strings.ToUpper(method) + " " + at
			f.prepareCall(c)
		}
	}
	for name, methods := range f.Webhooks {
		for method, c := range methods {
			c.name = "webhook " + method + " " + name
			f.prepareCall(c)
		}
	}
	return f
})

// named is the component that a reference names.
func named[T any](components map[string]*T, ref string) *T {
	component := components[path.Base(ref)]
	if component == nil {
		panic("openapi.json has no " + ref)
	}
	return component
}

// prepareCall follows the references of a call and names its parts.
func (f *apiFile) prepareCall(c *apiCall) {
	if c.RequestBody == nil {
		c.RequestBody = &apiBody{}
	}
	f.prepareBody(c.RequestBody, c.name)
	for n, p := range c.Parameters {
		if p.Ref != "" {
			c.Parameters[n] = named(f.Components.Parameters, p.Ref)
		} else {
			f.prepare(p.Schema, c.name+" "+p.Name)
		}
		f.parts = append(f.parts, c.name+"?"+c.Parameters[n].Name)
	}
	for status, body := range c.Responses {
		if body.Ref != "" {
			c.Responses[status] = named(f.Components.Responses, body.Ref)
		} else {
			f.prepareBody(body, c.name+" "+status)
		}
		f.parts = append(f.parts, c.name+" "+status)
	}
}

func (f *apiFile) prepareBody(b *apiBody, name string) {
	for header, text := range b.Headers {
		if text.Ref != "" {
			b.Headers[header] = named(f.Components.Headers, text.Ref)
		} else {
			f.prepare(text.Schema, name+" "+header)
		}
	}
	for mediaType, content := range b.Content {
		f.prepare(content.Schema, name+" "+mediaType)
	}
}

func (f *apiFile) prepare(s *apiSchema, name string) {
	s.name, s.pattern = name, regexp.MustCompile(s.Pattern)
	f.schemas, f.parts = append(f.schemas, s), append(f.parts, name)
	if s.Ref != "" {
		s.to = named(f.Components.Schemas, s.Ref)
	}
	for _, value := range s.Enum {
		f.parts = append(f.parts, fmt.Sprintf("%s: %v", name, value))
	}
	for key, property := range s.Properties {
		f.prepare(property, name+"."+key)
	}
	for n, option := range s.AnyOf {
		f.prepare(option, fmt.Sprintf("%s option %d", name, n+1))
	}
	if s.Items != nil {
		f.prepare(s.Items, name+"[]")
	}
}

// ---- the checker

// inspection holds a request and its answer against the file.
type inspection struct {
	problems []string        // what the file does not say
	shown    []string        // the parts of the file that were there
	ignored  map[string]bool // fields that need not be in the file
}

// ignoredOnPurpose are the fields and parameters that tests send to see them ignored.
var ignoredOnPurpose = map[string]bool{"unknown": true, "reason": true, "page": true, "productIds": true, "token": true}

// want notes a problem unless ok.
func (i *inspection) want(ok bool, format string, args ...any) {
	if !ok {
		i.problems = append(i.problems, fmt.Sprintf(format, args...))
	}
}

// value holds a value called at against a schema. Objects are closed: what properties does not list is not there.
func (i *inspection) value(s *apiSchema, at string, value any) {
	i.shown = append(i.shown, s.name)
	if s.Enum != nil {
		i.shown = append(i.shown, fmt.Sprintf("%s: %v", s.name, value))
	}
	if s.to != nil {
		i.value(s.to, at, value)
	}
	types, _ := s.Type.([]any)
	i.want(s.Type == nil || s.Type == typeOf(value) || slices.Contains(types, typeOf(value)), "%s is %v, no %v", at, value, s.Type)
	i.want(s.Enum == nil || slices.Contains(s.Enum, value), "%s is %v, none of %v", at, value, s.Enum)
	text, isText := value.(string)
	i.want(s.Pattern == "" || isText && s.pattern.MatchString(text), "%s is %v, not like %s", at, value, s.Pattern)
	number, isNumber := value.(float64)
	i.want(s.Minimum == nil || isNumber && number >= *s.Minimum, "%s is %v, too small", at, value)
	i.want(s.AnyOf == nil || slices.ContainsFunc(s.AnyOf, func(option *apiSchema) bool { return i.fits(option, at, value) }),
		"%s is %v, which is no option of %s", at, value, s.name)

	list, _ := value.([]any)
	i.want((s.MinItems == nil || len(list) >= *s.MinItems) && (s.MaxItems == nil || len(list) <= *s.MaxItems), "%s has %d items", at, len(list))
	for n, item := range list {
		if s.Items != nil {
			i.value(s.Items, fmt.Sprintf("%s[%d]", at, n), item)
		}
	}
	object, _ := value.(map[string]any)
	for _, key := range s.Required {
		_, has := object[key]
		i.want(has, "%s lacks %s", at, key)
	}
	for key, child := range object {
		if property := s.Properties[key]; property != nil {
			i.value(property, at+"."+key, child)
		} else if s.Properties != nil {
			i.want(i.ignored[key], "%s.%s is not in the file", at, key)
		}
	}
}

// fits reports whether value keeps to a schema, and only then notes what it shows.
func (i *inspection) fits(s *apiSchema, at string, value any) bool {
	try := inspection{ignored: i.ignored}
	try.value(s, at, value)
	if len(try.problems) > 0 {
		return false
	}
	i.shown = append(i.shown, try.shown...)
	return true
}

// text holds a header or a parameter, which may stand for a number, against a schema.
func (i *inspection) text(s *apiSchema, at, text string) {
	if number, err := strconv.ParseFloat(text, 64); err != nil || !i.fits(s, at, number) {
		i.value(s, at, text)
	}
}

// typeOf is JSON Schema's name for the type of a decoded value.
func typeOf(value any) any {
	switch value := value.(type) {
	case bool:
		return "boolean"
	case string:
		return "string"
	case float64:
		if value == math.Trunc(value) {
			return "integer"
		}
		return "number"
	case []any:
		return "array"
	case map[string]any:
		return "object"
	default:
		return "null"
	}
}

// answer holds an answer to a call against the file.
func (i *inspection) answer(c *apiCall, status int, header http.Header, body []byte) {
	says := c.Responses[strconv.Itoa(status)]
	if says == nil {
		i.want(false, "the status is not in the file")
		return
	}
	i.shown = append(i.shown, fmt.Sprint(c.name, " ", status))
	for name, says := range says.Headers {
		if header.Get(name) != "" || says.Required {
			i.text(says.Schema, name, header.Get(name))
		}
	}
	i.want(header.Get("Retry-After") == "" || says.Headers["Retry-After"] != nil, "Retry-After is not in the file")
	mediaType, isUTF8 := strings.CutSuffix(header.Get("Content-Type"), "; charset=utf-8")
	var value any
	if err := json.Unmarshal(body, &value); err != nil || !isUTF8 || says.Content[mediaType].Schema == nil {
		i.want(false, "%.300s (%s, %v) is not in the file", body, header.Get("Content-Type"), err)
		return
	}
	i.value(says.Content[mediaType].Schema, "answer", value)
}

// request holds a request that succeeded against the file.
func (i *inspection) request(c *apiCall, r *http.Request, body []byte) {
	i.ignored = ignoredOnPurpose
	i.want(c.Security != nil || r.Header.Get("Authorization") != "", "done without a token")
	asked := url.Values{}
	for key, texts := range r.URL.Query() {
		key, _, _ = strings.Cut(key, "[")
		asked[key] = append(asked[key], texts...)
	}
	if id := r.PathValue("id"); id != "" {
		asked.Set("id", id)
	}
	for _, p := range c.Parameters {
		if p.In == "header" && r.Header.Get(p.Name) != "" {
			asked.Set(p.Name, r.Header.Get(p.Name))
		}
		i.want(!p.Required || asked[p.Name] != nil, "done without %s", p.Name)
		for _, text := range asked[p.Name] {
			i.shown = append(i.shown, p.Schema.name, c.name+"?"+p.Name)
			i.text(cmp.Or(p.Schema.Items, p.Schema), p.Name, text)
		}
		delete(asked, p.Name)
	}
	for name := range asked {
		i.want(i.ignored[name], "the parameter %s is not in the file", name)
	}
	if body = bytes.TrimSpace(body); len(body) == 0 {
		i.want(!c.RequestBody.Required, "done without a body")
		return
	}
	mediaType, value := "application/json", any(nil)
	if json.Unmarshal(body, &value) != nil {
		mediaType = "application/x-www-form-urlencoded"
		fields := map[string]any{}
		form, _ := url.ParseQuery(string(body))
		for key := range form {
			fields[key] = form.Get(key)
		}
		value = fields
	}
	if schema := c.RequestBody.Content[mediaType].Schema; schema != nil {
		i.value(schema, "body", value)
	} else {
		i.want(false, "a body of %s is not in the file", mediaType)
	}
}

// call is the call that the mux knows by pattern; nil when it is not in the file.
func (f *apiFile) call(pattern string) *apiCall {
	method, at, _ := strings.Cut(strings.TrimSuffix(pattern, "{$}"), " ")
	return f.Paths[at][strings.ToLower(method)]
}

// exchange is what is wrong with a request that was served and its answer.
func (f *apiFile) exchange(r *http.Request, asked []byte, status int, header http.Header, answered []byte) []string {
	var i inspection
	switch call := f.call(r.Pattern); {
	case r.Pattern == "GET /panic", status == 499: // a test's own; the caller has gone
	case call != nil:
		i.answer(call, status, header, answered)
		if status < 300 {
			i.request(call, r, asked)
		}
	case r.Pattern != noRoute && r.Pattern != "":
		i.want(false, "the call is not in the file")
	case status != http.StatusNoContent: // a preflight's
		var m message
		json.Unmarshal(answered, &m)
		i.want(strings.Contains(f.Info.Description, fmt.Sprintf("%d `%s`", status, m.Message)), "%.300s is not in the file", answered)
	}
	f.note(i)
	return i.problems
}

// notified is what is wrong with a notification that was answered with this status.
func (f *apiFile) notified(r *http.Request, body []byte, status int) []string {
	c := f.Webhooks["notification"]["post"]
	answered := "default"
	switch {
	case isSuccess(status):
		answered = "2XX"
	case c.Responses[strconv.Itoa(status)] != nil:
		answered = strconv.Itoa(status)
	}
	i := inspection{shown: []string{c.name + " " + answered}}
	i.request(c, r, body)
	f.note(i)
	return i.problems
}

// note remembers which parts of the file an inspection has seen.
func (f *apiFile) note(i inspection) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, part := range i.shown {
		f.shown[part] = true
	}
}

// ServeHTTP is the server's, and holds what it is asked and answers against openapi.json: all but the calls of local
// development's page.
func (s *shop) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, measures := s.t.(*testing.B)
	if measures || s.config.local && (r.URL.Path == "/" || strings.HasPrefix(r.URL.Path, "/local/")) {
		s.server.ServeHTTP(w, r)
		return
	}
	var asked bytes.Buffer
	r.Body = struct {
		io.Reader
		io.Closer
	}{io.TeeReader(r.Body, &asked), r.Body}
	answered := httptest.NewRecorder()
	s.server.ServeHTTP(answered, r)
	for _, problem := range theAPI().exchange(r, asked.Bytes(), answered.Code, answered.Header(), answered.Body.Bytes()) {
		s.t.Errorf("openapi.json: %s %s, answered %d: %s", r.Method, r.URL, answered.Code, problem)
	}
	maps.Copy(w.Header(), answered.Header())
	w.WriteHeader(answered.Code)
	w.Write(answered.Body.Bytes())
}

// wantWholeAPI is the exit code of a run of the tests that ended with code: a run of all of them has to show all of
// openapi.json.
func wantWholeAPI(code int) int {
	if testing.Short() {
		return code
	}
	for _, part := range []string{"run", "skip", "list", "fuzz"} {
		if flag.Lookup("test."+part).Value.String() != "" {
			return code
		}
	}
	f := theAPI()
	unshown := slices.DeleteFunc(slices.Sorted(slices.Values(f.parts)), func(part string) bool { return f.shown[part] })
	if code != 0 || len(unshown) == 0 {
		return code
	}
	fmt.Printf("openapi.json says what no test has shown:\n%s\n", strings.Join(unshown, "\n"))
	return 1
}

// ---- what the file says

// calls are the file's calls.
func (f *apiFile) calls() (calls []*apiCall) {
	for _, methods := range f.Paths {
		calls = slices.AppendSeq(calls, maps.Values(methods))
	}
	return calls
}

// example is a value as a schema shows it: its own example, or what those of its parts make.
func (s *apiSchema) example() any {
	switch {
	case s.Examples != nil:
		return s.Examples[0]
	case s.Enum != nil:
		return s.Enum[0]
	case s.AnyOf != nil:
		return s.AnyOf[0].example()
	case s.Items != nil:
		return []any{s.Items.example()}
	case s.to != nil:
		return s.to.example()
	case s.Properties == nil:
		return nil
	}
	object := map[string]any{}
	for name, property := range s.Properties {
		object[name] = property.example()
	}
	return object
}

// callExample makes the request that a call's examples make, as the administrator.
func (s *shop) callExample(c *apiCall) answer {
	s.t.Helper()
	method, at, _ := strings.Cut(c.name, " ")
	query := url.Values{}
	for _, p := range c.Parameters {
		value := fmt.Sprint(cmp.Or(p.Schema.Items, p.Schema).example())
		if at = strings.Replace(at, "{"+p.Name+"}", value, 1); p.In == "query" {
			query.Set(p.Name, value)
		}
	}
	var body any
	if schema := c.RequestBody.Content["application/json"].Schema; schema != nil {
		body = schema.example()
	}
	return s.call(adminID, method, at+"?"+query.Encode(), body)
}

func TestOpenAPIHasEveryCall(t *testing.T) {
	s := newServer(config{}, nil, nil, nil, nil)
	for _, rt := range s.routes() {
		if theAPI().call(rt.pattern) == nil {
			t.Errorf("%s is not in the file", rt.pattern)
		}
	}
	for _, c := range theAPI().calls() {
		method, at, _ := strings.Cut(c.name, " ")
		if _, found := s.mux.Handler(httptest.NewRequest(method, at, nil)); strings.TrimSuffix(found, "{$}") != c.name {
			t.Errorf("%s is not served, but %q", c.name, found)
		}
	}
}

// Tools convert a parameter and generate code by its schema's type. Many of them ignore what stands beside a $ref.
func TestOpenAPISchemasSuitTools(t *testing.T) {
	for _, s := range theAPI().schemas {
		restricts := s.Type != nil || s.Enum != nil || s.Pattern != "" || s.Minimum != nil || s.MinItems != nil || s.MaxItems != nil ||
			s.Items != nil || s.Properties != nil || s.Required != nil || s.AnyOf != nil
		switch {
		case s.Ref != "" && restricts:
			t.Errorf("%s restricts what its $ref names", s.name)
		case s.Ref == "" && s.AnyOf == nil && s.Type == nil:
			t.Errorf("%s has no type", s.name)
		}
	}
}

func TestOpenAPIExamplesFit(t *testing.T) {
	var i inspection
	for _, s := range theAPI().schemas {
		for _, example := range s.Examples {
			i.value(s, s.name, example)
		}
	}
	for _, c := range theAPI().calls() {
		for _, body := range slices.AppendSeq([]*apiBody{c.RequestBody}, maps.Values(c.Responses)) {
			for _, content := range body.Content {
				i.value(content.Schema, content.Schema.name, content.Schema.example())
			}
		}
	}
	for _, problem := range i.problems {
		t.Error(problem)
	}
}

func TestOpenAPIIsServed(t *testing.T) {
	s := newShop(t)
	a := s.want(s.call("", "GET", "/openapi.json", nil), 200, "")
	if a.body != strings.TrimSuffix(string(openAPI), "\n") || a.header.Get("Cache-Control") != "public, max-age=300" {
		t.Errorf("answered %d bytes, %v", len(a.body), a.header)
	}
	s.wantBody(s.call("", "GET", "/", nil), 200, `{"name":"lumiere","version":"`+version()+`","openapi":"/openapi.json"}`)

	local := httptest.NewRecorder()
	newServer(config{local: true}, nil, nil, nil, nil).ServeHTTP(local, httptest.NewRequest("GET", "/openapi.json", nil))
	if local.Code != 200 {
		t.Errorf("local development answers %d", local.Code)
	}
}

// ---- answers that no other test provokes

// exampleShop is a shop that knows the payment of the examples, which is for a wrong amount and an order that is not there.
func exampleShop(t *testing.T) *shop {
	s := newShop(t)
	s.fake.pay(fakePayment{ImpUID: "imp_448280090638", MerchantUID: newTestID(), Amount: 1})
	return s
}

// wantOfEveryCall has every call that may answer with a status do so now.
func (s *shop) wantOfEveryCall(status int) {
	s.t.Helper()
	for _, c := range theAPI().calls() {
		if c.Responses[strconv.Itoa(status)] != nil {
			if a := s.callExample(c); a.status != status {
				s.t.Errorf("%s: %d %s, want %d", c.name, a.status, a.body, status)
			}
		}
	}
}

func TestEveryCallWithoutItsDatabase(t *testing.T) {
	s := exampleShop(t)
	pool, err := pgxpool.New(t.Context(), "postgres://127.0.0.1:1/nothing?connect_timeout=1")
	check(t, err)
	t.Cleanup(pool.Close)
	s.store.pool.Close()
	s.store.pool = pool
	s.wantOfEveryCall(503)
}

func TestEveryCallWithABrokenDatabase(t *testing.T) {
	s := exampleShop(t)
	execSQL(t, s.config.databaseURL, `ALTER TABLE orders RENAME TO gone`)
	s.wantOfEveryCall(500)
}

func TestEveryCallWithAGatewayInTrouble(t *testing.T) {
	heavy(t)
	broken := func(w http.ResponseWriter, _ *http.Request) bool { _, err := io.WriteString(w, "{"); return err == nil }
	for status, hook := range map[int]faultHook{502: broken, 503: answer500, 504: hangUntilGone} {
		t.Run(strconv.Itoa(status), func(t *testing.T) {
			s := newShop(t)
			unpaid := s.order(buyerA, s.painting(99000))
			paid, impUID, _ := s.paid(buyerB)
			s.iamport().lookUpLimit, s.iamport().cancelLimit = 200*time.Millisecond, 200*time.Millisecond // any answer here is right
			s.fake.setFaults(func(call, _ string) fault {
				if call == "token" {
					return fault{}
				}
				return fault{before: hook}
			})
			s.want(s.report(impUID), status, messageGateway)
			s.want(s.notice(impUID), status, messageGateway)
			s.want(s.call(buyerA, "DELETE", "/api/orders/"+unpaid, nil), status, messageGateway)
			s.want(s.call(buyerB, "DELETE", "/api/orders/"+paid, nil), status, messageRefundPending)
			s.want(s.call(adminID, "POST", "/api/orders/"+paid+"/refund", map[string]any{
				"imp_uid": impUID, "account": map[string]string{"holder": "홍길동", "bank": "00", "number": "0"}}), status, messageRefundPending)
		})
	}
}

// bodyOf is the largest body that a call takes.
func (s *shop) bodyOf(call string) int64 {
	s.t.Helper()
	for _, rt := range s.routes() {
		if rt.pattern == call {
			return rt.body
		}
	}
	s.t.Fatalf("there is no call %s", call)
	return 0
}

func TestEveryBodyThatCannotBeRead(t *testing.T) {
	s := newShop(t)
	for _, c := range theAPI().calls() {
		if c.RequestBody.Content == nil {
			continue
		}
		method, path, _ := strings.Cut(strings.Replace(c.name, "{id}", newTestID(), 1), " ")
		most := s.bodyOf(c.name)
		s.want(s.call(adminID, method, path, "{"), 400, "요청 본문이 올바른 JSON이 아닙니다")
		s.want(s.call(adminID, method, path, "{\xff}"), 400, "요청 본문이 올바른 UTF-8이 아닙니다")
		s.want(s.call(adminID, method, path, strings.Repeat(" ", int(most)+1)), 413, "요청 본문은 "+bodySize(most)+"를 넘을 수 없습니다")

		connection, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		check(t, err)
		fmt.Fprintf(connection, "%s %s HTTP/1.1\r\nHost: test\r\nAuthorization: %s\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{",
			method, path, s.as(adminID))
		check(t, connection.(*net.TCPConn).CloseWrite())
		answered, err := io.ReadAll(connection)
		check(t, errors.Join(err, connection.Close()))
		if !strings.HasPrefix(string(answered), "HTTP/1.1 400 ") || !strings.Contains(string(answered), "요청 본문을 끝까지 읽지 못했습니다") {
			t.Errorf("%s with half a body: %s", c.name, answered)
		}
	}
}
