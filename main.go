// Command lumiere is the order service of the Lumiere gallery: it checks a cart, makes orders that hold one-of-a-kind
// paintings, and confirms, cancels and refunds their Iamport payments.
package main

import (
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const usage = `lumiere is the order service of the Lumiere gallery.

Usage:
  lumiere                                    serve
  lumiere import FILE                        load or update the catalogue from a JSON array; - is standard input
  lumiere audit [-since 24h] [-json]         compare the books with the gateway; exit 0 only when they balance
  lumiere token -user ID [-admin] [-ttl 3h]  print a token
  lumiere healthcheck                        exit 0 when the running service is ready
  lumiere version                            print the version

Without DATABASE_URL, JWT_SECRET, IAMPORT_KEY and IAMPORT_SECRET it runs in local development: a private PostgreSQL,
a sample catalogue and a pretend gateway. README.md describes the configuration.
`

func main() {
	time.Local = time.UTC
	debug.SetGCPercent(300) // a request leaves nothing behind: the heap stays small, and is collected a third as often
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "lumiere:", err)
		os.Exit(1)
	}
}

// errUsage says that the command line was wrong; the usage has been printed.
var errUsage = errors.New("see the usage above")

// run is the program with its surroundings as arguments. It returns once ctx has ended and all that was begun is done.
func run(ctx context.Context, args []string, getenv func(string) string, in io.Reader, out, errOut io.Writer) error {
	command := ""
	if len(args) > 0 {
		command, args = args[0], args[1:]
	}
	flags := flag.NewFlagSet(command, flag.ContinueOnError)
	flags.SetOutput(errOut)
	flags.Usage = func() { fmt.Fprint(errOut, usage) }
	var do func(config) error
	wantArgs := 0
	switch command {
	case "":
		do = func(c config) error { return serve(ctx, c, out, errOut) }
	case "import":
		wantArgs = 1
		do = func(c config) error { return importCommand(ctx, c, flags.Arg(0), in, out) }
	case "audit":
		within, asJSON := flags.Duration("since", 24*time.Hour, ""), flags.Bool("json", false, "")
		do = func(c config) error { return auditCommand(ctx, c, *within, *asJSON, out, errOut) }
	case "token":
		user, isAdmin := flags.String("user", "", ""), flags.Bool("admin", false, "")
		ttl := flags.Duration("ttl", 3*time.Hour, "")
		do = func(c config) error { return tokenCommand(c, *user, *isAdmin, *ttl, out) }
	case "healthcheck":
		do = func(c config) error { return healthcheckCommand(ctx, c) }
	case "version":
		do = func(config) error { _, err := fmt.Fprintln(out, "lumiere", version()); return err }
	case "-h", "-help", "--help", "help":
		_, err := fmt.Fprint(out, usage)
		return err
	default:
		fmt.Fprint(errOut, usage)
		return fmt.Errorf("unknown command %q: %w", command, errUsage)
	}
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return errUsage
	}
	if flags.NArg() != wantArgs {
		flags.Usage()
		return errUsage
	}
	c, err := readConfig(getenv, command)
	if err != nil {
		return err
	}
	return do(c)
}

// ---- configuration

// config is the environment, read and checked.
type config struct {
	databaseURL               string
	jwtSecret                 []byte
	iamportKey, iamportSecret string
	iamportURL                string
	sandbox                   bool // accept payments of test channels
	port                      int
	metricsAddress            string         // host:port of the figures; empty: nowhere
	origins                   []string       // allowed by CORS
	proxies                   []netip.Prefix // whose X-Forwarded-For is believed
	shipping                  int64          // won for an order
	hold                      time.Duration  // how long an unpaid order keeps its paintings
	reconcile                 time.Duration  // between rounds of the reconciler
	logLevel                  slog.Level
	local                     bool // local development
}

// secretNames are the variables without which the service is in local development; each command needs some of them.
var secretNames = []string{"DATABASE_URL", "JWT_SECRET", "IAMPORT_KEY", "IAMPORT_SECRET"}

var commandNeeds = map[string][]string{
	"": secretNames, "import": {"DATABASE_URL"}, "token": {"JWT_SECRET"}, "audit": {"DATABASE_URL", "IAMPORT_KEY", "IAMPORT_SECRET"},
}

// readConfig reads what command needs, and says everything that is wrong with it at once. A value that may be a secret is
// never part of the error.
func readConfig(getenv func(string) string, command string) (config, error) {
	var problems []error
	problem := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	or := func(name, byDefault string) string {
		if value := strings.TrimSpace(getenv(name)); value != "" {
			return value
		}
		return byDefault
	}
	c := config{
		databaseURL: or("DATABASE_URL", ""), jwtSecret: []byte(getenv("JWT_SECRET")),
		iamportKey: or("IAMPORT_KEY", ""), iamportSecret: or("IAMPORT_SECRET", ""),
		iamportURL: strings.TrimSuffix(or("IAMPORT_URL", "https://api.iamport.kr"), "/"),
	}
	c.local = !slices.ContainsFunc(secretNames, func(name string) bool { return getenv(name) != "" })
	if !c.local {
		for _, name := range commandNeeds[command] {
			if getenv(name) == "" {
				problem("%s is not set (with none of %s set, the service runs in local development)", name, strings.Join(secretNames, ", "))
			}
		}
		if n := len(c.jwtSecret); n > 0 && n < 32 {
			problem("JWT_SECRET has %d bytes; at least 32 are needed", n)
		}
	}
	if !strings.HasPrefix(c.iamportURL, "https://") && !strings.HasPrefix(c.iamportURL, "http://") {
		problem("IAMPORT_URL must begin with https:// or http://")
	}
	var err error
	if c.sandbox, err = strconv.ParseBool(or("IAMPORT_SANDBOX", "false")); err != nil {
		problem("IAMPORT_SANDBOX must be true or false")
	}
	if c.port, err = strconv.Atoi(or("PORT", "5000")); err != nil || c.port < 0 || c.port > 65535 {
		problem("PORT must be a number up to 65535")
	}
	if c.shipping, err = strconv.ParseInt(or("SHIPPING_PRICE", "10000"), 10, 64); err != nil || c.shipping < 0 || c.shipping > maxPrice {
		problem("SHIPPING_PRICE must be whole won, 0 or more")
	}
	if c.metricsAddress = or("METRICS_ADDR", ""); c.metricsAddress != "" {
		if _, _, err := net.SplitHostPort(c.metricsAddress); err != nil {
			problem("METRICS_ADDR must be host:port, such as 127.0.0.1:9100")
		}
	}
	duration := func(name, byDefault string) time.Duration {
		d, err := time.ParseDuration(or(name, byDefault))
		if err != nil || d <= 0 {
			problem("%s must be a duration such as %s", name, byDefault)
		}
		return d
	}
	c.hold, c.reconcile = duration("ORDER_HOLD", "30m"), duration("RECONCILE_INTERVAL", "10s")
	for origin := range strings.SplitSeq(getenv("CORS_ORIGINS"), ",") {
		if origin = strings.TrimSuffix(strings.TrimSpace(origin), "/"); origin == "" {
			continue
		}
		if !strings.Contains(origin, "://") || strings.Contains(origin, "*") {
			problem("CORS_ORIGINS lists exact origins such as https://lumiere.example, not %q", origin)
		}
		c.origins = append(c.origins, origin)
	}
	for proxy := range strings.SplitSeq(getenv("TRUSTED_PROXIES"), ",") {
		if proxy = strings.TrimSpace(proxy); proxy == "" {
			continue
		}
		prefix, err := parseProxy(proxy)
		if err != nil {
			problem("TRUSTED_PROXIES lists addresses and networks such as 10.0.0.0/8, not %q", proxy)
		}
		c.proxies = append(c.proxies, prefix)
	}
	if err := c.logLevel.UnmarshalText([]byte(or("LOG_LEVEL", "info"))); err != nil {
		problem("LOG_LEVEL must be debug, info, warn or error")
	}
	return c, errors.Join(problems...)
}

// version is the commit that the program was built from, or a word for a build without one.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	setting := func(key string) string {
		i := slices.IndexFunc(info.Settings, func(s debug.BuildSetting) bool { return s.Key == key })
		if i < 0 {
			return ""
		}
		return info.Settings[i].Value
	}
	revision := setting("vcs.revision")
	if revision == "" {
		return info.Main.Version
	}
	revision = revision[:min(12, len(revision))]
	if setting("vcs.modified") == "true" {
		revision += "-modified"
	}
	return revision + " " + setting("vcs.time")
}

// ---- the service

// routes is the API. It is the one list of what can be called.
func (s *server) routes() []route {
	return []route{
		{"GET /api/products/cart-items", anyone, 200, s.cartItems},
		{"GET /api/products/total-price", signedIn, 200, s.totalPrice},
		{"POST /api/orders", signedIn, 201, s.createOrder},
		{"PATCH /api/orders/pay", anyone, 200, s.pay},
		{"DELETE /api/orders/{id}", signedIn, 200, s.deleteOrder},
		{"GET /api/orders/{id}", signedIn, 200, s.showOrder},
		{"GET /api/orders/latest", signedIn, 200, s.showLatest},
		{"POST /api/payments/webhook", anyone, 200, s.webhook},

		{"GET /api/orders/mine", signedIn, 200, s.listMine},
		{"GET /api/orders", admin, 200, s.listForDesk},
		{"PATCH /api/orders/{id}", signedIn, 200, s.stepOrder},
		{"GET /api/orders/{id}/history", signedIn, 200, s.showHistory},

		{"GET /healthz", anyone, 200, s.healthz},
		{"GET /readyz", anyone, 200, s.readyz},
	}
}

// newServer builds the service around a store and the way to the gateway (nil: the network), for main and the tests alike.
func newServer(c config, store *Store, toGateway http.RoundTripper, log *slog.Logger, now func() time.Time) *server {
	s := &server{
		config: c, store: store, tokens: newTokens(c.jwtSecret, now), now: now, random: randomDigits, log: log, mux: http.NewServeMux(),
		limits: newLimiter(now), metrics: newMetrics(),
	}
	gateway := NewGateway(GatewayConfig{URL: c.iamportURL, Key: c.iamportKey, Secret: c.iamportSecret, Sandbox: c.sandbox,
		Now: now, Transport: toGateway, Observe: s.observeGateway})
	s.till = &Till{store: store, gateway: gateway, now: now, log: log, every: c.reconcile, hold: c.hold}
	for _, rt := range s.routes() {
		s.add(rt)
	}
	s.mux.HandleFunc("GET /openapi.json", showOpenAPI)
	if !c.local { // there it is the page
		s.add(route{"GET /{$}", anyone, 200, s.about})
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

// serve runs the service until ctx ends, then lets what is under way finish for 10 seconds.
func serve(ctx context.Context, c config, out, errOut io.Writer) (err error) {
	log := newLog(c, errOut)
	var house *localHouse
	if c.local {
		if house, err = openLocalHouse(ctx, &c, out); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, house.Close()) }()
	}
	listener, err := listen(c)
	if err != nil {
		return err
	}
	defer listener.Close()
	var metricsListener net.Listener
	if c.metricsAddress != "" {
		if metricsListener, err = net.Listen("tcp", c.metricsAddress); err != nil {
			return err
		}
		defer metricsListener.Close()
	}
	store, err := openMigratedStore(ctx, c.databaseURL)
	if err != nil {
		return err
	}
	defer store.Close()
	s := newServer(c, store, nil, log, time.Now)
	if house != nil {
		if err := house.furnish(ctx, s, listener.Addr().String(), out); err != nil {
			return err
		}
	}
	if metricsListener != nil {
		log.Info("serving metrics", "address", metricsListener.Addr().String())
	}
	log.Info("serving", "address", listener.Addr().String(), "version", version())

	besides, stop := context.WithCancel(ctx)
	defer stop()
	var beside sync.WaitGroup
	beside.Go(func() { s.till.Reconcile(besides) })
	if metricsListener != nil {
		beside.Go(func() {
			if err := serveHTTP(besides, httpServer(s.metricsHandler(), log), metricsListener); err != nil {
				log.Error("metrics", "error", err)
			}
		})
	}
	err = serveHTTP(ctx, httpServer(s, log), listener)
	stop()
	ended := make(chan struct{})
	go func() {
		beside.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(2 * time.Second): // what the reconciler left is leased, and goes on elsewhere
	}
	log.Info("stopped")
	return err
}

// listen opens the service's port. Local development is reached from this machine only.
func listen(c config) (net.Listener, error) {
	host := ""
	if c.local {
		host = "127.0.0.1"
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(c.port)))
	if c.local && errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%w (to take another port: PORT=%d go run .)", err, c.port+1)
	}
	return listener, err
}

// drainTime is how long requests under way may take to finish once the service is asked to stop.
const drainTime = 7 * time.Second

// httpServer has every limit set. Writing may take as long as a forged payment's look-up, refund and second look-up.
func httpServer(handler http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler: handler, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: 2 * time.Minute,
		IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 256 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
}

// serveHTTP serves until ctx ends, then drains.
func serveHTTP(ctx context.Context, server *http.Server, listener net.Listener) error {
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.Background(), drainTime)
	defer cancel()
	if err := server.Shutdown(drain); err != nil {
		server.Close() // whatever is cut off here is booked, and goes on with the next start
	}
	return nil
}

// newLog is JSON in production and readable text in local development.
func newLog(c config, to io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: c.logLevel}
	if c.local {
		return slog.New(slog.NewTextHandler(to, options))
	}
	return slog.New(slog.NewJSONHandler(to, options))
}

// about answers / in a configured deployment.
func (s *server) about(*request) (any, error) {
	return struct {
		Name    string `json:"name"`
		Version string `json:"version"`
		OpenAPI string `json:"openapi"`
	}{"lumiere", version(), "/openapi.json"}, nil
}

// ---- commands

// importCommand loads the catalogue from the file called name, - being standard input.
func importCommand(ctx context.Context, c config, name string, in io.Reader, out io.Writer) error {
	if name != "-" {
		file, err := os.Open(name)
		if err != nil {
			return err
		}
		defer file.Close()
		in = file
	}
	return withStore(ctx, &c, func(store *Store) error {
		n, err := importCatalogue(ctx, store, in)
		if err == nil {
			fmt.Fprintf(out, "%d paintings imported\n", n)
		}
		return err
	})
}

// withStore opens the database for a command and brings its schema up to date. In local development it completes the
// configuration with the private PostgreSQL and the pretend gateway first.
func withStore(ctx context.Context, c *config, do func(*Store) error) (err error) {
	if c.local {
		leave, err := joinLocalHouse(ctx, c)
		if err != nil {
			return err
		}
		defer leave()
	}
	store, err := openMigratedStore(ctx, c.databaseURL)
	if err != nil {
		return err
	}
	defer store.Close()
	return do(store)
}

// tokenCommand prints a token for user.
func tokenCommand(c config, user string, isAdmin bool, ttl time.Duration, out io.Writer) (err error) {
	id, ok := parseID(user)
	if !ok {
		return errors.New("-user must be an ObjectId: 24 hex digits")
	}
	if c.local {
		if c.jwtSecret, err = localSecret(); err != nil {
			return err
		}
	}
	token, err := newTokens(c.jwtSecret, time.Now).issue(Caller{ID: id, Admin: isAdmin}, time.Now(), ttl)
	if err == nil {
		fmt.Fprintln(out, token)
	}
	return err
}

// healthcheckCommand asks the service on this machine whether it is ready.
func healthcheckCommand(ctx context.Context, c config) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/readyz", c.port), nil)
	if err != nil {
		return err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(response.Body, 1000))
		return fmt.Errorf("not ready: %s: %s", response.Status, text)
	}
	return nil
}
