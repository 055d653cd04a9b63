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

// Local development: everything that the service depends on, run on this machine and reachable from this machine only. It
// runs when no variable of a deployment is set, or with LOCAL=1. It answers its own page, front ends of the configured origins and
// the terminal: see allowsLocally.

// devCatalogueFile is the sample catalogue, in the format of the import command.
//
//go:embed dev_catalogue.json
var devCatalogueFile []byte

// devPage is the page at /.
//
//go:embed dev_page.html
var devPage []byte

// devPagePolicy is the Content-Security-Policy of devPage. The page is a single file that calls only this service. Trusted
// types make the browser reject any text that would be inserted as HTML.
const devPagePolicy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"

// devUsers are the users whose tokens the banner and the page show: two buyers and an administrator.
var devUsers = []devUser{
	{ID: "61a4e52b4f5f6aa036bfec61", Name: "가람", Variable: "BUYER"},
	{ID: "61a4e52b4f5f6aa036bfec62", Name: "나래", Variable: "BUYER2"},
	{ID: "61a4e52b4f5f6aa036bfec6a", Name: "관리자", Variable: "ADMIN", Admin: true},
}

// devUser is a user of local development, as the page gets it.
type devUser struct {
	ID       string `json:"id"`
	Name     string `json:"name"`
	Variable string `json:"variable"` // the shell variable that holds the token in the examples
	Admin    bool   `json:"admin"`
	Token    string `json:"token"`
}

// devTokenTTL is how long those tokens are valid: a working day.
const devTokenTTL = 12 * time.Hour

// devEnv is what local development runs beside the service.
type devEnv struct {
	dir           string // keeps everything between runs
	unlock        func() // releases dir for other processes
	server        *postgresServer
	gateway       *fakeGateway
	gatewayServer *http.Server
}

// openDevEnv starts the private PostgreSQL and the fake gateway, and sets their addresses and keys in c. It fails when
// another process has done so already. The caller closes the devEnv.
func openDevEnv(ctx context.Context, c *config, out io.Writer) (_ *devEnv, err error) {
	env := &devEnv{}
	defer func() {
		if err != nil {
			env.close()
		}
	}()
	if env.dir, err = cacheDir(); err != nil {
		return nil, err
	}
	if env.unlock, err = lockDir(env.dir); err != nil {
		return nil, fmt.Errorf("local development: %w", err)
	}
	if env.server, err = startPostgres(ctx, postgresConfig{dir: filepath.Join(env.dir, "postgres"), out: out}); err != nil {
		return nil, err
	}
	c.databaseURL = env.server.url
	if c.jwtSecret, err = devSecret(); err != nil {
		return nil, err
	}
	if err := env.startGateway(c); err != nil {
		return nil, err
	}
	if len(c.origins) == 0 {
		c.origins = []string{"http://localhost:3000"} // where front ends are usually developed
	}
	return env, nil
}

// startGateway starts the fake gateway, sets its address and keys in c, and writes them to devGatewayFile.
func (env *devEnv) startGateway(c *config) error {
	env.gateway = newFakeGateway(time.Now)
	if err := env.gateway.persist(filepath.Join(env.dir, "payments.json")); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	env.gatewayServer = httpServer(env.gateway, slog.Default())
	go env.gatewayServer.Serve(listener)
	address := devGatewayAddress{URL: "http://" + listener.Addr().String(), Key: env.gateway.key, Secret: env.gateway.secret,
		APISecret: env.gateway.apiSecret, StoreID: env.gateway.storeID}
	address.configure(c)
	c.webhookSecrets = [][]byte{env.gateway.webhookSecret}
	text, err := json.Marshal(address)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(env.dir, devGatewayFile), text, 0o600)
}

// close stops what openDevEnv started.
func (env *devEnv) close() (err error) {
	if env.gatewayServer != nil {
		err = env.gatewayServer.Close()
	}
	if env.server != nil {
		err = errors.Join(err, env.server.stop())
	}
	if env.unlock != nil {
		env.unlock()
	}
	return err
}

// setUp loads the sample catalogue into an empty database, adds the calls that only local development has to s, and prints
// the banner. address is the host and port of s. It must be called before s serves.
func (env *devEnv) setUp(ctx context.Context, s *server, address string, out io.Writer) error {
	ids, err := s.store.firstPaintingIDs(ctx, 200)
	if err != nil {
		return err
	}
	if len(ids) == 0 {
		if _, err := importCatalogue(ctx, s.store, bytes.NewReader(devCatalogueFile)); err != nil {
			return err
		}
	}
	env.gateway.notify = func(p fakePayment) {
		header, body := env.gateway.noticeOf(p)
		request, err := http.NewRequest(http.MethodPost, "http://"+address+"/api/payments/webhook", bytes.NewReader(body))
		if err != nil {
			panic(err) // the address is our own
		}
		request.Header = header
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			s.log.Warn("fake gateway: webhook not delivered", "error", err)
			return
		}
		response.Body.Close()
	}
	s.devHosts = devHosts(address)
	s.mux.HandleFunc("GET /local/payments", env.gateway.listPayments)
	s.mux.HandleFunc("POST /local/payments", env.gateway.window)
	s.mux.HandleFunc("POST /local/payments/{imp_uid}", env.gateway.console)
	s.mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("Content-Security-Policy", devPagePolicy)
		w.Write(devPage)
	})
	s.add(route{pattern: "GET /local/catalogue", access: public, success: http.StatusOK, handle: s.showDevCatalogue})
	return env.printBanner(s, address, out)
}

// messageNotLocal is the answer to a request that allowsLocally refuses.
const messageNotLocal = "이 컴퓨터의 페이지와 터미널에서만 사용할 수 있습니다"

// devHosts returns what the Host header is in requests to address, a host and port of this machine.
func devHosts(address string) []string {
	_, port, _ := net.SplitHostPort(address)
	var hosts []string
	for _, host := range []string{"127.0.0.1", "localhost", "[::1]"} {
		if port == "80" { // which browsers leave out
			hosts = append(hosts, host)
		}
		hosts = append(hosts, host+":"+port)
	}
	return hosts
}

// allowsLocally reports whether local development answers r. Any page in the developer's browser can send requests here:
//   - A page whose name was made to resolve to 127.0.0.1 could read the answers too. Its Host is its name.
//   - The calls below /local/ are closed to pages of other origins than ours and those of CORS_ORIGINS. Programs in a terminal
//     send no Origin.
//   - The tokens are for our own page alone, which its browser says with Sec-Fetch-Site; no page can set that. The terminal has
//     the tokens of the banner.
func (s *server) allowsLocally(r *http.Request) bool {
	if !slices.Contains(s.devHosts, r.Host) {
		return false
	}
	if !strings.HasPrefix(r.URL.Path, "/local/") {
		return true
	}
	if r.URL.Path == "/local/catalogue" {
		return r.Header.Get("Sec-Fetch-Site") == "same-origin"
	}
	origin := r.Header.Get("Origin")
	return origin == "" || origin == "http://"+r.Host || slices.Contains(s.config.origins, origin)
}

// devCatalogue is what the page needs to start.
type devCatalogue struct {
	IDs   []string  `json:"ids"` // of paintings
	Users []devUser `json:"people"`
}

// showDevCatalogue answers GET /local/catalogue.
func (s *server) showDevCatalogue(r *request) (any, error) {
	ids, err := s.store.firstPaintingIDs(r.Context(), 200)
	if err != nil {
		return nil, err
	}
	return devCatalogue{ids, s.devUsersWithTokens()}, nil
}

// devUsersWithTokens returns devUsers, each with a new token.
func (s *server) devUsersWithTokens() []devUser {
	users := slices.Clone(devUsers)
	for i, u := range users {
		token, err := s.tokens.issue(caller{id: u.ID, admin: u.Admin}, s.now(), devTokenTTL)
		if err != nil {
			panic(err) // HS256 signs with any secret
		}
		users[i].Token = token
	}
	return users
}

// devSecret returns the secret of local development's tokens. It is created at the first run and kept in the cache
// directory, so that the token command issues tokens which the running service accepts.
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

// joinDevEnv sets in c the addresses and keys of the private PostgreSQL and the fake gateway. They are those of the running
// service; when none runs, joinDevEnv starts its own, which leave stops.
func joinDevEnv(ctx context.Context, c *config) (leave func() error, err error) {
	env, openErr := openDevEnv(ctx, c, os.Stderr) // standard output is the command's
	if openErr == nil {
		return env.close, nil
	}
	dir, err := cacheDir()
	if err != nil {
		return nil, err
	}
	if c.databaseURL, err = runningPostgres(filepath.Join(dir, "postgres")); err != nil {
		return nil, openErr
	}
	text, err := os.ReadFile(filepath.Join(dir, devGatewayFile))
	if err != nil {
		return nil, err
	}
	var gateway devGatewayAddress
	if err := json.Unmarshal(text, &gateway); err != nil {
		return nil, err
	}
	gateway.configure(c)
	return func() error { return nil }, nil
}

// devGatewayAddress is the content of devGatewayFile: where the running service has its fake gateway. The keys are new at
// every start.
type devGatewayAddress struct{ URL, Key, Secret, APISecret, StoreID string }

// configure sets in c what a client of the fake gateway needs, of either version.
func (a devGatewayAddress) configure(c *config) {
	c.iamportURL, c.iamportKey, c.iamportSecret = a.URL, a.Key, a.Secret
	c.portoneURL, c.portoneSecret, c.portoneStoreID = a.URL+fakePortonePrefix, a.APISecret, a.StoreID
}

// devGatewayFile is the name of a file in the cache directory, for commands in another terminal.
const devGatewayFile = "gateway.json"

// printBanner prints the service's address, tokens, and examples that lead from a cart to a cancelled order.
func (env *devEnv) printBanner(s *server, address string, out io.Writer) error {
	var tokens strings.Builder
	for _, u := range s.devUsersWithTokens() {
		fmt.Fprintf(&tokens, "%s=%s\n", u.Variable, u.Token)
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
