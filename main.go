// Command lumiere is the order service of the Lumiere gallery. It checks carts, makes orders that hold one-of-a-kind
// paintings, and confirms, cancels and refunds their Iamport payments.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
)

const usage = `lumiere is the order service of the Lumiere gallery.

Usage:
  lumiere                                    serve
  lumiere import FILE                        load or update the catalogue from a JSON array; - is standard input
  lumiere audit [-since 24h] [-json]         compare the ledger with the gateway; exit 0 only when they balance
  lumiere export -from DAY -to DAY [-by movement|painting]
                                             write CSV for the accountant: days such as 2026-11-30, both included
  lumiere forget -order ID                   erase the personal data of an order that is over
  lumiere migrate                            bring the schema up to date, as the role that owns it
  lumiere notify -test                       send a test to every address of NOTIFY_URL
  lumiere token -user ID [-admin] [-ttl 3h]  print a token
  lumiere healthcheck [-live]                exit 0 when the running service is ready; -live: when it is alive
  lumiere version                            print the version

With no variable of a deployment set, or with LOCAL=1, it runs in local development, with a private PostgreSQL, a sample catalogue
and a fake gateway. README.md describes the configuration.
`

func main() {
	time.Local = time.UTC
	tuneGC(os.Getenv)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "lumiere:", err)
		os.Exit(1)
	}
}

// tuneGC has the garbage collector run a third as often, unless GOGC says how often. Requests keep no memory, so the heap stays
// small all the same. When it is not, as with very many connections, the collector runs as often as memoryLimit needs, unless
// GOMEMLIMIT says otherwise.
func tuneGC(getenv func(string) string) {
	if getenv("GOGC") == "" {
		debug.SetGCPercent(300)
	}
	if getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
}

// memoryLimit is what the process keeps to, in bytes, as long as it does not need more.
const memoryLimit = 96 << 20

// errUsage says that the command line was wrong. The usage has been printed by then.
var errUsage = errors.New("see the usage above")

// run executes the command line args (without the program's name). Serving ends when ctx does; run returns once what it
// started has stopped. Tests call it with an environment and streams of their own.
func run(ctx context.Context, args []string, getenv func(string) string, in io.Reader, out, errOut io.Writer) error {
	command := ""
	if len(args) > 0 {
		command, args = args[0], args[1:]
	}
	flags := flag.NewFlagSet(command, flag.ContinueOnError)
	flags.SetOutput(errOut)
	flags.Usage = func() { fmt.Fprint(errOut, usage) }
	var execute func(config) error
	wantArgs := 0
	switch command {
	case "":
		execute = func(c config) error { return serve(ctx, c, out, errOut) }
	case "import":
		wantArgs = 1
		execute = func(c config) error { return importCommand(ctx, c, flags.Arg(0), in, out) }
	case "audit":
		since, asJSON := flags.Duration("since", 24*time.Hour, ""), flags.Bool("json", false, "")
		execute = func(c config) error { return auditCommand(ctx, c, *since, *asJSON, out, errOut) }
	case "export":
		from, to := flags.String("from", "", ""), flags.String("to", "", "")
		by := flags.String("by", "movement", "")
		execute = func(c config) error { return exportCommand(ctx, c, *from, *to, *by, out, errOut) }
	case "forget":
		order := flags.String("order", "", "")
		execute = func(c config) error { return forgetCommand(ctx, c, *order, out) }
	case "token":
		user, isAdmin := flags.String("user", "", ""), flags.Bool("admin", false, "")
		ttl := flags.Duration("ttl", 3*time.Hour, "")
		execute = func(c config) error { return tokenCommand(c, *user, *isAdmin, *ttl, out) }
	case "migrate":
		execute = func(c config) error { return migrateCommand(ctx, c, out) }
	case "notify":
		test := flags.Bool("test", false, "")
		execute = func(c config) error { return notifyCommand(ctx, c, *test, out, errOut) }
	case "healthcheck":
		live := flags.Bool("live", false, "")
		execute = func(c config) error { return healthcheckCommand(ctx, c, *live) }
	case "version":
		execute = func(config) error { _, err := fmt.Fprintln(out, "lumiere", version()); return err }
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
	return execute(c)
}

// version returns the commit that the program was built from and its time. A build without version control returns the
// module's version, or "unknown".
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

// serve runs the service until ctx ends. Requests under way then have drainTime to finish, and what runs in the
// background another backgroundStopTime.
func serve(ctx context.Context, c config, out, errOut io.Writer) (err error) {
	defer catchBrokenPipe()()
	log := newLog(c, errOut)
	var env *devEnv // nil outside local development
	if c.local {
		if env, err = openDevEnv(ctx, &c, out); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, env.close()) }()
	}
	listener, err := listen(c)
	if err != nil {
		return err
	}
	defer listener.Close()
	metricsListener, err := listenMetrics(c)
	if err != nil {
		return err
	}
	if metricsListener != nil {
		defer metricsListener.Close()
	}
	store, err := openMigratedStore(ctx, c.databaseURL)
	if err != nil {
		return err
	}
	defer store.close()
	s := newServer(c, store, nil, log, time.Now)
	if env != nil {
		if err := env.setUp(ctx, s, listener.Addr().String(), out); err != nil {
			return err
		}
	}
	return runServer(ctx, s, listener, metricsListener)
}

// catchBrokenPipe keeps the process alive when the reader of its standard output or error ends: the writes fail then, and no
// longer end the program. The commands are not kept, so that they end with the pager that they were piped into. The caller
// calls stop.
func catchBrokenPipe() (stop func()) {
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, syscall.SIGPIPE) // not signal.Ignore, which child processes would inherit
	return func() { signal.Stop(caught) }
}

// listen opens the port of the API. In local development only this machine can reach it.
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

// listenMetrics opens METRICS_ADDR. The listener is nil when METRICS_ADDR is not set.
func listenMetrics(c config) (net.Listener, error) {
	if c.metricsAddress == "" {
		return nil, nil
	}
	return net.Listen("tcp", c.metricsAddress)
}

// runServer serves the API until ctx ends, with the reconciler, the notifier and, when its listener is not nil, the
// metrics server in the background.
func runServer(ctx context.Context, s *server, listener, metricsListener net.Listener) error {
	s.logStart(listener)
	if metricsListener != nil {
		s.log.Info("serving metrics", "address", metricsListener.Addr().String())
	}
	backgroundCtx, stop := context.WithCancel(ctx)
	defer stop()
	var background sync.WaitGroup
	background.Go(func() { s.settler.reconcile(backgroundCtx) })
	background.Go(func() { s.notifier.run(backgroundCtx) })
	if metricsListener != nil {
		background.Go(func() {
			if err := serveAndDrain(backgroundCtx, httpServer(s.metricsHandler(), s.log), metricsListener); err != nil {
				s.log.Error("metrics server failed", "error", err)
			}
		})
	}
	err := serveAndDrain(ctx, httpServer(s, s.log), listener)
	stop()
	waitAtMost(&background, backgroundStopTime)
	s.log.Info("stopped")
	return err
}

// logStart writes the first line of the log. With IAMPORT_SANDBOX it is a warning.
func (s *server) logStart(listener net.Listener) {
	attrs := []any{"address", listener.Addr().String(), "version", version()}
	if s.config.sandbox {
		s.log.Warn("serving", append(attrs, "sandbox", true, "warning", "test payments buy paintings")...)
		return
	}
	s.log.Info("serving", attrs...)
}

const (
	// drainTime is how long requests under way may take to finish once the service is asked to stop.
	drainTime = 7 * time.Second
	// backgroundStopTime is how long shutdown waits for the reconciler, the notifier and the metrics server. What
	// they leave undone is leased, and is done by another replica or after the next start.
	backgroundStopTime = 2 * time.Second
)

// waitAtMost waits for wg, but no longer than limit.
func waitAtMost(wg *sync.WaitGroup, limit time.Duration) {
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(limit):
	}
}

// httpServer returns a server for handler with every limit set. The write timeout is long enough for the slowest call:
// the report of a forged payment, which is looked up, refunded and looked up again.
func httpServer(handler http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      2 * time.Minute,
		IdleTimeout:       75 * time.Second, // longer than proxies keep a connection: they close it, not we as they use it
		MaxHeaderBytes:    32 << 10,         // a cart of maxQueryIDs takes 22 KB
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
}

// serveAndDrain serves up to maxConnections until ctx ends, then waits up to drainTime for the requests under way. It returns
// nil after such a shutdown.
func serveAndDrain(ctx context.Context, server *http.Server, listener net.Listener) error {
	served := make(chan error, 1)
	go func() { served <- server.Serve(boundConnections(server, listener, maxConnections)) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	drainCtx, cancel := context.WithTimeout(context.Background(), drainTime)
	defer cancel()
	if err := server.Shutdown(drainCtx); err != nil {
		server.Close() // money that a cut-off request was moving is in the ledger; the next start continues with it
	}
	return nil
}

// newLog returns a logger that writes JSON to w, or text in local development.
func newLog(c config, w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: c.logLevel}
	if c.local {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

// ---- commands

// importCommand loads the catalogue from the named file, or from in when the name is "-", and prints what changed.
func importCommand(ctx context.Context, c config, name string, in io.Reader, out io.Writer) error {
	if name != "-" {
		file, err := os.Open(name)
		if err != nil {
			return err
		}
		defer file.Close()
		in = file
	}
	return withStore(ctx, &c, (*store).migrateEmpty, func(store *store) error {
		result, err := importCatalogue(ctx, store, in)
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "%d paintings imported: %d new, %d put on sale, %d taken off sale\n",
			result.loaded, result.added, result.onSale, result.offSale)
		for _, id := range result.ordered {
			fmt.Fprintf(out, "%s: an order has it, so whether it is for sale was not changed\n", id)
		}
		return nil
	})
}

// migrateCommand brings the schema up to date and prints its version.
func migrateCommand(ctx context.Context, c config, out io.Writer) error {
	return withStore(ctx, &c, (*store).migrateAll, func(store *store) error {
		version, err := store.schemaVersion(ctx)
		if err == nil {
			fmt.Fprintf(out, "the schema is at step %d\n", version)
		}
		return err
	})
}

// withStore calls fn with the database of c once prepare has returned nil, and closes the database afterwards. In local
// development it first completes c with the addresses and keys of the private PostgreSQL and the fake gateway. That database is
// the program's own, so its schema is brought up to date, whatever prepare would do.
func withStore(ctx context.Context, c *config, prepare func(*store, context.Context) error, fn func(*store) error) (err error) {
	if c.local {
		leave, err := joinDevEnv(ctx, c)
		if err != nil {
			return err
		}
		defer leave()
		prepare = (*store).migrateAll
	}
	store, err := openPreparedStore(ctx, c.databaseURL, prepare)
	if err != nil {
		return err
	}
	defer store.close()
	return fn(store)
}

// tokenCommand prints a token for the user with this ObjectId, valid for ttl.
func tokenCommand(c config, user string, isAdmin bool, ttl time.Duration, out io.Writer) (err error) {
	id, ok := parseID(user)
	if !ok {
		return errors.New("-user must be an ObjectId: 24 hex digits")
	}
	if c.local {
		if c.jwtSecret, err = devSecret(); err != nil {
			return err
		}
	}
	token, err := newTokens(c.jwtSecret, time.Now).issue(caller{id: id, admin: isAdmin}, time.Now(), ttl)
	if err == nil {
		fmt.Fprintln(out, token)
	}
	return err
}

// healthcheckCommand returns nil when the service on this machine answers /readyz, or /healthz when live, with 200 within 5
// seconds.
func healthcheckCommand(ctx context.Context, c config, live bool) error {
	path := "/readyz"
	if live {
		path = "/healthz"
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d%s", c.port, path), nil)
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
		return fmt.Errorf("%s: %s: %s", path, response.Status, text)
	}
	return nil
}
