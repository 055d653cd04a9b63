package main

import (
	"bytes"
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Local development: everything that the service stands on, on one machine, for nobody else. None of it can be switched
// on in a configured deployment: it is there only when DATABASE_URL, JWT_SECRET, IAMPORT_KEY and IAMPORT_SECRET are all unset.

//go:embed dev_catalogue.json
var devCatalogueFile []byte

//go:embed dev_page.html
var devPage []byte

// devPagePolicy lets the page be what it is, one file that talks to this service alone. With trusted types the browser
// itself refuses to make HTML of a text.
const devPagePolicy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"

// devUsers are the users whose tokens are handed out.
var devUsers = []devUser{
	{ID: "61a4e52b4f5f6aa036bfec61", Name: "가람", Variable: "BUYER"},
	{ID: "61a4e52b4f5f6aa036bfec62", Name: "나래", Variable: "BUYER2"},
	{ID: "61a4e52b4f5f6aa036bfec6a", Name: "관리자", Variable: "ADMIN", Admin: true},
}

type devUser struct {
	ID       string `json:"id"`
	Name     string `json:"name"`
	Variable string `json:"variable"` // the shell variable that keeps the token, in what is printed and shown to be pasted
	Admin    bool   `json:"admin"`
	Token    string `json:"token"`
}

// devTokenTTL is long enough for a day's work.
const devTokenTTL = 12 * time.Hour

// devEnv is what local development runs beside the service.
type devEnv struct {
	dir     string
	unlock  func()
	server  *postgresServer
	gateway *fakeGateway
	http    *http.Server // the gateway's
}

// openDevEnv starts the private PostgreSQL and the fake gateway, and completes the configuration with them.
func openDevEnv(ctx context.Context, c *config) (env *devEnv, err error) {
	h := &devEnv{}
	defer func() {
		if err != nil {
			h.close()
		}
	}()
	if h.dir, err = cacheDir(); err != nil {
		return nil, err
	}
	if h.unlock, err = lockDir(h.dir); err != nil {
		return nil, fmt.Errorf("local development: %w", err)
	}
	if h.server, err = startPostgres(ctx, postgresConfig{dir: filepath.Join(h.dir, "postgres")}); err != nil {
		return nil, err
	}
	if c.jwtSecret, err = devSecret(); err != nil {
		return nil, err
	}
	h.gateway = newFakeGateway(time.Now)
	if err := h.gateway.persist(filepath.Join(h.dir, "payments.json")); err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	h.http = httpServer(h.gateway, slog.Default())
	go h.http.Serve(listener)
	c.databaseURL, c.iamportURL = h.server.url, "http://"+listener.Addr().String()
	c.iamportKey, c.iamportSecret = h.gateway.key, h.gateway.secret
	where, _ := json.Marshal(devGatewayAddress{c.iamportURL, c.iamportKey, c.iamportSecret})
	if err := os.WriteFile(filepath.Join(h.dir, devGatewayFile), where, 0o600); err != nil {
		return nil, err
	}
	if len(c.origins) == 0 {
		c.origins = []string{"http://localhost:3000"} // where the front end is developed
	}
	return h, nil
}

// close stops what openDevEnv started.
func (h *devEnv) close() (err error) {
	if h.http != nil {
		err = h.http.Close()
	}
	if h.server != nil {
		err = errors.Join(err, h.server.stop())
	}
	if h.unlock != nil {
		h.unlock()
	}
	return err
}

// setUp loads the sample catalogue into an empty database, adds the calls that only local development has, and prints
// how to use it all.
func (h *devEnv) setUp(ctx context.Context, s *server, address string, out io.Writer) error {
	ids, err := s.store.firstPaintingIDs(ctx, 200)
	if err != nil {
		return err
	}
	if len(ids) == 0 {
		if _, err := importCatalogue(ctx, s.store, bytes.NewReader(devCatalogueFile)); err != nil {
			return err
		}
	}
	h.gateway.notify = func(impUID, merchantUID, status string) {
		text, _ := json.Marshal(map[string]string{"imp_uid": impUID, "merchant_uid": merchantUID, "status": status})
		response, err := http.Post("http://"+address+"/api/payments/webhook", "application/json", bytes.NewReader(text))
		if err != nil {
			s.log.Warn("fake gateway: notice not delivered", "error", err)
			return
		}
		response.Body.Close()
	}
	s.mux.HandleFunc("GET /local/payments", h.gateway.listPayments)
	s.mux.HandleFunc("POST /local/payments", h.gateway.window)
	s.mux.HandleFunc("POST /local/payments/{imp_uid}", h.gateway.console)
	s.mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("Content-Security-Policy", devPagePolicy)
		w.Write(devPage)
	})
	s.add(route{"GET /local/catalogue", public, http.StatusOK, s.showDevCatalogue})
	return h.printBanner(s, address, out)
}

// devCatalogue is what the page starts from.
type devCatalogue struct {
	IDs    []string  `json:"ids"`
	People []devUser `json:"people"`
}

func (s *server) showDevCatalogue(r *request) (any, error) {
	ids, err := s.store.firstPaintingIDs(r.Context(), 200)
	if err != nil {
		return nil, err
	}
	return devCatalogue{ids, s.devUsersWithTokens()}, nil
}

// devUsersWithTokens are the devUsers, each with a new token.
func (s *server) devUsersWithTokens() []devUser {
	people := slices.Clone(devUsers)
	for i, p := range people {
		var err error
		if people[i].Token, err = s.tokens.issue(caller{id: p.ID, admin: p.Admin}, s.now(), devTokenTTL); err != nil {
			panic(err) // HS256 signs with any secret
		}
	}
	return people
}

// devSecret is the secret of local development's tokens, made at the first run and kept, so that a command in another
// terminal makes tokens that the running service accepts.
func devSecret() ([]byte, error) {
	dir, err := cacheDir()
	if err != nil {
		return nil, err
	}
	name := filepath.Join(dir, "jwt-secret")
	if secret, err := os.ReadFile(name); err == nil && len(secret) >= 32 {
		return secret, nil
	}
	var random [32]byte
	rand.Read(random[:])
	secret := []byte(base64.RawURLEncoding.EncodeToString(random[:]))
	return secret, os.WriteFile(name, secret, 0o600)
}

// joinDevEnv finds what a command stands on in local development: the private PostgreSQL and the fake gateway of
// the running service, or those that it starts itself until leave.
func joinDevEnv(ctx context.Context, c *config) (leave func() error, err error) {
	env, problem := openDevEnv(ctx, c)
	if problem == nil {
		return env.close, nil
	}
	dir, err := cacheDir()
	if err != nil {
		return nil, err
	}
	if c.databaseURL, err = runningPostgres(filepath.Join(dir, "postgres")); err != nil {
		return nil, problem
	}
	text, err := os.ReadFile(filepath.Join(dir, devGatewayFile))
	if err != nil {
		return nil, err
	}
	var at devGatewayAddress
	if err := json.Unmarshal(text, &at); err != nil {
		return nil, err
	}
	c.iamportURL, c.iamportKey, c.iamportSecret = at.URL, at.Key, at.Secret
	return func() error { return nil }, nil
}

// devGatewayAddress is where a running service has its fake gateway, kept in devGatewayFile for commands in another
// terminal. Its keys are made anew at each start.
type devGatewayAddress struct{ URL, Key, Secret string }

const devGatewayFile = "gateway.json"

// printBanner prints where the service is, tokens, and the lines that walk from a cart to a cancelled order.
func (h *devEnv) printBanner(s *server, address string, out io.Writer) error {
	var tokens strings.Builder
	for _, p := range s.devUsersWithTokens() {
		fmt.Fprintf(&tokens, "%s=%s\n", p.Variable, p.Token)
	}
	_, err := fmt.Fprint(out, strings.NewReplacer("{url}", "http://"+address, "{tokens}", tokens.String()).Replace(`
Lumiere's order service, in local development: {url}
The page there walks through everything; the lines below do the same. More tokens: go run . token -user ID [-admin]

URL={url}
{tokens}
curl -sg "$URL/api/products/cart-items?productId[]=61a4c895f59ea1b7a727a658&productId[]=61a4debe4f5f6aa036bfec5f"
curl -sg "$URL/api/products/total-price?productId[]=61a4c895f59ea1b7a727a658" -H "Authorization: Bearer $BUYER"
ORDER=$(curl -s "$URL/api/orders" -H "Authorization: Bearer $BUYER" -H 'Content-Type: application/json' -d '{
  "orderItems": [{"product": "61a4c895f59ea1b7a727a658", "image": "/images/bye/1.jpg", "title": "잠식", "artist": "안영희",
    "size": "73x61cm(20호)", "price": 99000}],
  "result": {"id": "'$(date +%Y%m%d%H%M%S)'"},
  "deliveryInfo": {"address": "[00000] 서울특별시 어느구 어느로 1", "detailedAddress": "101호", "receiver": "홍길동", "contactNum": "010-0000-0000"},
  "ordererInfo": {"name": "홍길동", "phoneNum": "010-0000-0000", "email": "buyer@example.com", "refundTerms": "품절 시 결제수단으로 환불"},
  "shippingPrice": 10000, "totalPrice": 109000}' | sed -E 's/.*"orderId":"([0-9a-f]+)".*/\1/'); echo "$ORDER"
IMP_UID=$(curl -s "$URL/local/payments" -H 'Content-Type: application/json' -d '{"merchant_uid": "'$ORDER'", "amount": 109000}' | sed -E 's/.*"imp_uid":"([^"]+)".*/\1/'); echo "$IMP_UID"
curl -s -X PATCH "$URL/api/orders/pay" -H 'Content-Type: application/json' -d '{"imp_uid": "'$IMP_UID'"}'
curl -s "$URL/api/orders/$ORDER" -H "Authorization: Bearer $BUYER"
curl -s -X DELETE "$URL/api/orders/$ORDER" -H "Authorization: Bearer $BUYER"

`))
	return err
}
