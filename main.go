// Command lumiere is the order service of the Lumiere gallery: it checks a cart, makes orders that hold one-of-a-kind
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
  lumiere audit [-since 24h] [-json]         compare the books with the gateway; exit 0 only when they balance
  lumiere token -user ID [-admin] [-ttl 3h]  print a token
  lumiere healthcheck                        exit 0 when the running service is ready
  lumiere version                            print the version

Without DATABASE_URL, JWT_SECRET, IAMPORT_KEY and IAMPORT_SECRET it runs in local development: a private PostgreSQL,
a sample catalogue and a fake gateway. README.md describes the configuration.
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

// serve runs the service until ctx ends, then lets what is under way finish for 10 seconds.
func serve(ctx context.Context, c config, out, errOut io.Writer) (err error) {
	log := newLog(c, errOut)
	var env *devEnv
	host := ""
	if c.local {
		if env, err = openDevEnv(ctx, &c); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, env.close()) }()
		host = "127.0.0.1"
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(c.port)))
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
	defer store.close()
	s := newServer(c, store, nil, log, time.Now)
	if env != nil {
		if err := env.setUp(ctx, s, listener.Addr().String(), out); err != nil {
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
	beside.Go(func() { s.settler.reconcile(besides) })
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

// ---- commands

// importCommand loads the catalogue from the file called name, - being standard input, and prints what that changed.
func importCommand(ctx context.Context, c config, name string, in io.Reader, out io.Writer) error {
	if name != "-" {
		file, err := os.Open(name)
		if err != nil {
			return err
		}
		defer file.Close()
		in = file
	}
	return withStore(ctx, &c, func(store *store) error {
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

// withStore opens the database for a command and brings its schema up to date. In local development it completes the
// configuration with the private PostgreSQL and the fake gateway first.
func withStore(ctx context.Context, c *config, do func(*store) error) (err error) {
	if c.local {
		leave, err := joinDevEnv(ctx, c)
		if err != nil {
			return err
		}
		defer leave()
	}
	store, err := openMigratedStore(ctx, c.databaseURL)
	if err != nil {
		return err
	}
	defer store.close()
	return do(store)
}

// tokenCommand prints a token for user.
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
