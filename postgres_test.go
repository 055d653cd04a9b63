package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

func TestMain(m *testing.M) {
	code := wantWholeAPI(m.Run())
	if err := stopTestPostgres(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// stopTestPostgres ends and removes the tests' server; testPostgres sets it.
var stopTestPostgres = func() error { return nil }

// testPostgres starts the server that the tests share when the first of them asks: what only parses needs none.
// The durability switched off makes it fast; a test of crashes starts a server of its own.
var testPostgres = sync.OnceValues(func() (databaseURL string, err error) {
	if given := os.Getenv("TEST_DATABASE_URL"); given != "" {
		return given, nil
	}
	dir, err := os.MkdirTemp("", "lumiere-test-")
	if err != nil {
		return "", err
	}
	stopTestPostgres = func() error { return os.RemoveAll(dir) }
	server, err := startPostgres(context.Background(), postgresConfig{Dir: dir, Settings: map[string]string{
		"fsync":              "off",
		"synchronous_commit": "off",
		"full_page_writes":   "off",
		"max_connections":    "200",
	}})
	if err != nil {
		return "", err
	}
	stopTestPostgres = func() error {
		defer os.RemoveAll(dir)
		return server.Stop()
	}
	return server.URL, nil
})

// testDatabaseURL returns the connection string of the tests' server: TEST_DATABASE_URL, or else a private one.
func testDatabaseURL(t testing.TB) string {
	t.Helper()
	databaseURL, err := testPostgres()
	if err != nil {
		t.Fatalf("the tests need PostgreSQL; TEST_DATABASE_URL may name one: %v", err)
	}
	return databaseURL
}

// newTestDatabase makes an empty database that is dropped when the test ends, and returns its connection string.
func newTestDatabase(t testing.TB) string {
	t.Helper()
	server := testDatabaseURL(t)
	name := "test_" + strings.ToLower(rand.Text())
	execSQL(t, server, "CREATE DATABASE "+name)
	t.Cleanup(func() { execSQL(t, server, "DROP DATABASE "+name+" WITH (FORCE)") })
	return withDatabase(t, server, name)
}

// withDatabase returns the connection string, an URL or keywords and values, with another database's name.
func withDatabase(t testing.TB, connString, name string) string {
	t.Helper()
	if !strings.Contains(connString, "://") {
		return connString + " dbname=" + name
	}
	u, err := url.Parse(connString)
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/" + name
	return u.String()
}

// databaseVia is the connection string of the database that databaseURL names, with other hosts on the way to it. options
// are pairs of a name and a value.
func databaseVia(t *testing.T, databaseURL string, options ...string) string {
	t.Helper()
	c, err := pgx.ParseConfig(databaseURL)
	check(t, err)
	query := url.Values{}
	for pair := range slices.Chunk(options, 2) {
		query.Set(pair[0], pair[1])
	}
	u := url.URL{Scheme: "postgres", User: url.UserPassword(c.User, c.Password), Path: "/" + c.Database, RawQuery: query.Encode()}
	return u.String()
}

// execSQL runs one statement on a connection of its own.
func execSQL(t testing.TB, databaseURL, sql string) {
	t.Helper()
	ctx := context.Background() // the test's own has ended when a cleanup runs
	conn, err := pgx.Connect(ctx, databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, sql); err != nil {
		t.Fatal(err)
	}
}

// queryText runs a query of one text value on a connection of its own.
func queryText(t testing.TB, databaseURL, sql string) string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	var value string
	if err := conn.QueryRow(t.Context(), sql).Scan(&value); err != nil {
		t.Fatal(err)
	}
	return value
}

// postgresDir returns a directory for a cluster, removed when the test ends. T.TempDir's parent is closed to the
// user that root runs PostgreSQL as.
func postgresDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lumiere-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// runPostgres starts a server for one test.
func runPostgres(t testing.TB, cfg postgresConfig) *postgresServer {
	t.Helper()
	if _, _, err := findPostgres(); err != nil && os.Getenv("TEST_DATABASE_URL") != "" {
		t.Skip(err) // this machine tests against a server elsewhere
	}
	server, err := startPostgres(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	return server
}

// unsafeSettings trade what a test does not test for speed.
var unsafeSettings = map[string]string{"fsync": "off"}

func TestFindPostgres(t *testing.T) {
	root := t.TempDir()
	root, err := filepath.EvalSymlinks(root) // macOS's temporary directory is behind a link
	if err != nil {
		t.Fatal(err)
	}
	install := func(name, version string) string {
		dir := filepath.Join(root, name)
		script(t, filepath.Join(dir, "initdb"), "")
		script(t, filepath.Join(dir, "postgres"), "echo '"+version+"'")
		return dir
	}
	old := install("9", "postgres (PostgreSQL) 9.6.24")
	twelve := install("12", "postgres (PostgreSQL) 12.22 (Debian 12.22-1)")
	thirteen := install("13", "postgres (PostgreSQL) 13.2")
	fifteen := install("15", "postgres (PostgreSQL) 15.9 (Debian 15.9-0+deb12u1)")
	fifteenLater := install("15later", "postgres (PostgreSQL) 15.10 (Postgres.app)")
	beta := install("18", "postgres (PostgreSQL) 18beta1")
	broken := install("broken", "no version at all")
	clientOnly := filepath.Join(root, "client")
	script(t, filepath.Join(clientOnly, "psql"), "")
	links := filepath.Join(root, "links")
	if err := os.MkdirAll(links, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(fifteen, "initdb"), filepath.Join(links, "initdb")); err != nil {
		t.Fatal(err)
	}

	tests := []struct {
		name   string
		places []string
		want   string
		major  int
		err    string // what the error says
	}{
		{"one", []string{fifteen}, fifteen, 15, ""},
		{"newest first", []string{fifteen, thirteen, old}, fifteen, 15, ""},
		{"newest last", []string{old, thirteen, fifteen}, fifteen, 15, ""},
		{"minor version", []string{fifteenLater, fifteen}, fifteenLater, 15, ""},
		{"beta", []string{fifteen, beta}, beta, 18, ""},
		{"link followed", []string{links}, fifteen, 15, ""},
		{"the rest passed over", []string{"", ".", broken, clientOnly, root + "/missing", thirteen}, thirteen, 13, ""},
		{"too old", []string{old, twelve}, "", 0, "PostgreSQL 12 in " + twelve + " is too old"},
		{"none", []string{clientOnly}, "", 0, "not found"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			bin, major, err := newestPostgres(test.places)
			if bin != test.want || major != test.major {
				t.Errorf("got %q, %d; want %q, %d", bin, major, test.want, test.major)
			}
			if (err != nil) != (test.err != "") {
				t.Fatalf("error: %v", err)
			}
			if err == nil {
				return
			}
			for _, part := range []string{test.err, "apt install postgresql", "brew install postgresql", "DATABASE_URL"} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("error %q does not say %q", err, part)
				}
			}
		})
	}
}

// script writes an executable shell script.
func script(t testing.TB, path, commands string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+commands+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestNewTestDatabase(t *testing.T) {
	var first, second string
	t.Run("two of them", func(t *testing.T) {
		first, second = newTestDatabase(t), newTestDatabase(t)
		execSQL(t, first, "CREATE TABLE marks (mark int)")
		execSQL(t, second, "CREATE TABLE marks (mark int)")
	})
	if conn, err := pgx.Connect(t.Context(), first); err == nil {
		conn.Close(t.Context())
		t.Error("the database outlived its test")
	}
}

// Whatever ended a server, the next start finds what was committed.
func TestPostgresRecovers(t *testing.T) {
	cfg := postgresConfig{Dir: postgresDir(t)}
	server := runPostgres(t, cfg)
	execSQL(t, server.URL, "CREATE TABLE endings (name text PRIMARY KEY)")
	pidFile := filepath.Join(server.data, "postmaster.pid")
	again := func() {
		t.Helper()
		if err := server.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	endings := []struct {
		name string
		end  func()
	}{
		{"Stop", func() {
			check(t, server.Stop())
			again()
		}},
		{"Crash", func() {
			check(t, server.Crash())
			again()
		}},
		{"Kill", func() {
			check(t, server.Kill())
			again()
		}},
		{"Kill with a session at work", func() {
			var session sync.WaitGroup
			defer session.Wait()
			session.Go(func() {
				if conn, err := pgx.Connect(t.Context(), server.URL); err == nil {
					conn.Exec(t.Context(), "SELECT count(*) FROM generate_series(1, 20000000) work")
					conn.Close(t.Context())
				}
			})
			working := `SELECT count(*)::text FROM pg_stat_activity WHERE query LIKE '% work' AND state = 'active'`
			for queryText(t, server.URL, working) != "1" {
			}
			check(t, server.Kill())
			again()
		}},
		{"still running, its owner gone", func() {
			server = runPostgres(t, cfg)
		}},
		{"its process id in use by a stranger", func() {
			stranger := exec.Command("sleep", "60")
			stranger.SysProcAttr = &syscall.SysProcAttr{Credential: server.account}
			check(t, stranger.Start())
			check(t, server.Kill())
			content, err := os.ReadFile(pidFile)
			check(t, err)
			_, rest, _ := strings.Cut(string(content), "\n")
			check(t, os.WriteFile(pidFile, []byte(strconv.Itoa(stranger.Process.Pid)+"\n"+rest), 0o600))
			again()
			if err := stranger.Process.Signal(syscall.SIGTERM); err != nil {
				t.Errorf("the stranger: %v", err)
			}
			if stranger.Wait(); stranger.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
				t.Errorf("the stranger ended before we ended it: %v", stranger.ProcessState)
			}
		}},
		{"a file cut off", func() {
			check(t, server.Kill())
			check(t, os.WriteFile(pidFile, []byte("-1\n"), 0o600))
			check(t, os.Chown(pidFile, ownerOf(t, server.data), -1))
			again()
		}},
	}
	for i, ending := range endings {
		execSQL(t, server.URL, "INSERT INTO endings VALUES ('"+ending.name+"')")
		ending.end()
		if got := queryText(t, server.URL, "SELECT count(*)::text FROM endings"); got != strconv.Itoa(i+1) {
			t.Fatalf("%s: %s rows are there, want %d", ending.name, got, i+1)
		}
	}
	if err := server.Start(t.Context()); err == nil {
		t.Error("a running server was started")
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func ownerOf(t testing.TB, path string) int {
	t.Helper()
	info, err := os.Stat(path)
	check(t, err)
	return int(info.Sys().(*syscall.Stat_t).Uid)
}

// A cluster whose making was interrupted is removed and made anew; its directory may be deep, and strangely named.
func TestPostgresMakesCluster(t *testing.T) {
	dir := filepath.Join(postgresDir(t), strings.Repeat("deep, 깊은 ", 10)+`'"`)
	halfMade := filepath.Join(dir, "new-1")
	check(t, os.MkdirAll(halfMade, 0o711))
	check(t, os.Chmod(filepath.Dir(dir), 0o711))
	check(t, os.WriteFile(filepath.Join(halfMade, "PG_VERSION"), []byte("15\n"), 0o600))
	server := runPostgres(t, postgresConfig{Dir: dir, Settings: unsafeSettings})
	if _, err := os.Stat(halfMade); err == nil {
		t.Error("the half-made cluster is still there")
	}
	for setting, want := range map[string]string{
		"server_encoding":  "UTF8",
		"lc_collate":       "C",
		"listen_addresses": "",
		"fsync":            "off",
		"TimeZone":         "0",
		"port":             postgresPort,
	} {
		query := "SELECT setting FROM pg_settings WHERE name = '" + setting + "'"
		switch setting {
		case "lc_collate":
			query = "SELECT datcollate::text FROM pg_database WHERE datname = 'lumiere'"
		case "TimeZone": // without the system's time zones UTC has another name
			query = "SELECT extract(timezone FROM now())::text"
		}
		if got := queryText(t, server.URL, query); got != want {
			t.Errorf("%s is %q, want %q", setting, got, want)
		}
	}
	info, err := os.Stat(server.socket)
	check(t, err)
	if info.Mode().Perm() != 0o700 {
		t.Errorf("the socket's directory is open to others: %v", info.Mode())
	}
	check(t, server.Stop())
	if _, err := os.Stat(server.socket); err == nil {
		t.Error("the socket's directory outlived the server")
	}
}

func TestPostgresSaysWhatIsWrong(t *testing.T) {
	dir := postgresDir(t)
	cfg := postgresConfig{Dir: dir, Settings: map[string]string{"fsync": "off", "max_connections": "many"}}
	if server, err := startPostgres(t.Context(), cfg); err == nil {
		server.Stop()
		t.Error("it started")
	} else if !strings.Contains(err.Error(), `invalid value for parameter "max_connections"`) {
		t.Errorf("the error does not carry the server's: %v", err)
	}

	if os.Geteuid() != 0 {
		return
	}
	check(t, os.Chmod(dir, 0o700))
	_, err := startPostgres(t.Context(), postgresConfig{Dir: filepath.Join(dir, "closed")})
	if err == nil || !strings.Contains(err.Error(), "cannot reach "+dir) {
		t.Errorf("a directory closed to PostgreSQL: %v", err)
	}
}

func TestCacheDir(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_CACHE_HOME", filepath.Join(home, "cache"))
	dir, err := cacheDir()
	check(t, err)
	info, err := os.Stat(dir)
	check(t, err)
	if !strings.HasPrefix(dir, home) || info.Mode().Perm()&0o066 != 0 {
		t.Errorf("%s, %v", dir, info.Mode())
	}
}

// A process killed with SIGKILL leaves neither the lock nor, for long, the server.
func TestPostgresOwnerKilled(t *testing.T) {
	dir := postgresDir(t)
	cfg := postgresConfig{Dir: dir, Settings: unsafeSettings}
	server := runPostgres(t, cfg) // make the cluster
	check(t, server.Stop())

	owner := exec.Command(os.Args[0], "-test.run=^TestPostgresOwner$")
	owner.Env = append(os.Environ(), "POSTGRES_OWNER_DIR="+dir)
	owner.Stderr = os.Stderr
	out, err := owner.StdoutPipe()
	check(t, err)
	check(t, owner.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "running\n" {
		t.Fatalf("the owner said %q, %v", line, err)
	}
	if _, err := lockDir(dir); err == nil {
		t.Error("the directory was locked twice")
	} else if want := fmt.Sprintf("already running as process %d", owner.Process.Pid); !strings.Contains(err.Error(), want) {
		t.Errorf("the error %q does not say %q", err, want)
	}
	check(t, owner.Process.Kill())
	owner.Wait()

	unlock, err := lockDir(dir)
	check(t, err)
	unlock()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		if _, err := os.Stat(filepath.Join(server.data, "postmaster.pid")); os.IsNotExist(err) {
			break
		}
		if pause(ctx, postgresPoll) != nil {
			t.Fatal("the server outlives its owner")
		}
	}
	check(t, server.Start(t.Context()))
}

// TestPostgresOwner is the process that TestPostgresOwnerKilled kills.
func TestPostgresOwner(t *testing.T) {
	dir := os.Getenv("POSTGRES_OWNER_DIR")
	if dir == "" {
		return
	}
	_, err := lockDir(dir)
	check(t, err)
	_, err = startPostgres(t.Context(), postgresConfig{Dir: dir, Settings: unsafeSettings})
	check(t, err)
	fmt.Println("running")
	select {}
}

func TestLockDir(t *testing.T) {
	dir := t.TempDir()
	unlock, err := lockDir(dir)
	check(t, err)
	if _, err := lockDir(dir); err == nil || strings.Contains(err.Error(), "\n") {
		t.Errorf("locked twice: %v", err)
	}
	unlock()
	unlock, err = lockDir(dir)
	check(t, err)
	unlock()
	if _, err := lockDir(filepath.Join(dir, "missing")); !os.IsNotExist(err) {
		t.Errorf("a missing directory: %v", err)
	}
}
