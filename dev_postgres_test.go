package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
)

// crash ends the server at once, without writing anything back (PostgreSQL's "immediate" mode): what was committed
// comes back from its log at the next start.
func (p *postgresServer) crash() error { return p.end(syscall.SIGQUIT) }

// kill ends the server with SIGKILL, as a power cut would. Its sessions notice by themselves and end.
func (p *postgresServer) kill() error {
	err := p.end(syscall.SIGKILL)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return nil
	}
	return err
}

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

// Whatever ended a server, the next start finds what was committed.
func TestPostgresRecovers(t *testing.T) {
	heavy(t)
	cfg := postgresConfig{dir: postgresDir(t)}
	server := runPostgres(t, cfg)
	execSQL(t, server.url, "CREATE TABLE endings (name text PRIMARY KEY)")
	pidFile := filepath.Join(server.data, "postmaster.pid")
	again := func() {
		t.Helper()
		if err := server.start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	endings := []struct {
		name string
		end  func()
	}{
		{"Stop", func() {
			check(t, server.stop())
			again()
		}},
		{"Crash", func() {
			check(t, server.crash())
			again()
		}},
		{"Kill", func() {
			check(t, server.kill())
			again()
		}},
		{"Kill with a session at work", func() {
			var session sync.WaitGroup
			defer session.Wait()
			session.Go(func() {
				if conn, err := pgx.Connect(t.Context(), server.url); err == nil {
					conn.Exec(t.Context(), "SELECT count(*) FROM generate_series(1, 20000000) work")
					conn.Close(t.Context())
				}
			})
			working := `SELECT count(*)::text FROM pg_stat_activity WHERE query LIKE '% work' AND state = 'active'`
			waitUntil(t, "the session works", func() bool { return queryText(t, server.url, working) == "1" })
			check(t, server.kill())
			again()
		}},
		{"still running, its owner gone", func() {
			server = runPostgres(t, cfg)
		}},
		{"its process id in use by a stranger", func() {
			stranger := exec.Command("sleep", "60")
			stranger.SysProcAttr = &syscall.SysProcAttr{Credential: server.account}
			check(t, stranger.Start())
			check(t, server.kill())
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
			check(t, server.kill())
			check(t, os.WriteFile(pidFile, []byte("-1\n"), 0o600))
			check(t, os.Chown(pidFile, ownerOf(t, server.data), -1))
			again()
		}},
	}
	for i, ending := range endings {
		execSQL(t, server.url, "INSERT INTO endings VALUES ('"+ending.name+"')")
		ending.end()
		if got := queryText(t, server.url, "SELECT count(*)::text FROM endings"); got != strconv.Itoa(i+1) {
			t.Fatalf("%s: %s rows are there, want %d", ending.name, got, i+1)
		}
	}
	if err := server.start(t.Context()); err == nil {
		t.Error("a running server was started")
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
	heavy(t)
	dir := filepath.Join(postgresDir(t), strings.Repeat("deep, 깊은 ", 10)+`'"`)
	halfMade := filepath.Join(dir, "new-1")
	check(t, os.MkdirAll(halfMade, 0o711))
	check(t, os.Chmod(filepath.Dir(dir), 0o711))
	check(t, os.WriteFile(filepath.Join(halfMade, "PG_VERSION"), []byte("15\n"), 0o600))
	server := runPostgres(t, postgresConfig{dir: dir, settings: unsafeSettings})
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
		if got := queryText(t, server.url, query); got != want {
			t.Errorf("%s is %q, want %q", setting, got, want)
		}
	}
	info, err := os.Stat(server.socket)
	check(t, err)
	if info.Mode().Perm() != 0o700 {
		t.Errorf("the socket's directory is open to others: %v", info.Mode())
	}
	check(t, server.stop())
	if _, err := os.Stat(server.socket); err == nil {
		t.Error("the socket's directory outlived the server")
	}
}

func TestPostgresSaysWhatIsWrong(t *testing.T) {
	heavy(t)
	dir := postgresDir(t)
	cfg := postgresConfig{dir: dir, settings: map[string]string{"fsync": "off", "max_connections": "many"}}
	if server, err := startPostgres(t.Context(), cfg); err == nil {
		server.stop()
		t.Error("it started")
	} else if !strings.Contains(err.Error(), `invalid value for parameter "max_connections"`) {
		t.Errorf("the error does not carry the server's: %v", err)
	}

	if os.Geteuid() != 0 {
		return
	}
	check(t, os.Chmod(dir, 0o700))
	_, err := startPostgres(t.Context(), postgresConfig{dir: filepath.Join(dir, "closed")})
	if err == nil || !strings.Contains(err.Error(), "cannot reach "+dir) {
		t.Errorf("a directory closed to PostgreSQL: %v", err)
	}
}

// A process killed with SIGKILL leaves neither the lock nor, for long, the server.
func TestPostgresOwnerKilled(t *testing.T) {
	heavy(t)
	dir := postgresDir(t)
	cfg := postgresConfig{dir: dir, settings: unsafeSettings}
	server := runPostgres(t, cfg) // make the cluster
	check(t, server.stop())

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
	waitUntil(t, "the server ends after its owner", func() bool {
		_, err := os.Stat(filepath.Join(server.data, "postmaster.pid"))
		return os.IsNotExist(err)
	})
	check(t, server.start(t.Context()))
}

// TestPostgresOwner is the process that TestPostgresOwnerKilled kills.
func TestPostgresOwner(t *testing.T) {
	dir := os.Getenv("POSTGRES_OWNER_DIR")
	if dir == "" {
		return
	}
	_, err := lockDir(dir)
	check(t, err)
	_, err = startPostgres(t.Context(), postgresConfig{dir: dir, settings: unsafeSettings})
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

// aptCache returns the directory that packages are unpacked in, in a cache of the test's own.
func aptCache(t *testing.T) string {
	t.Helper()
	cache := postgresDir(t)
	check(t, makeDir(cache))
	t.Setenv("XDG_CACHE_HOME", cache)
	dir := filepath.Join(cache, "lumiere", "apt")
	check(t, os.MkdirAll(filepath.Join(dir, "new-interrupted", "root"), 0o755))
	return dir
}

// wantEntries fails the test unless dir has these entries, in order.
func wantEntries(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	check(t, err)
	var got []string
	for _, entry := range entries {
		got = append(got, entry.Name())
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s has %q, want %q", dir, got, want)
	}
}

// The distribution's packages are downloaded once, by one of two processes that need them at the same time, and run.
func TestPostgresFromPackages(t *testing.T) {
	if _, err := os.Stat("/etc/debian_version"); err != nil || os.Getenv("TEST_ALL") == "" || testing.Short() {
		t.Skip("downloads packages: only on Debian and Ubuntu, and with TEST_ALL set")
	}
	dir := aptCache(t)
	var outs [2]bytes.Buffer
	var both sync.WaitGroup
	for i := range outs {
		both.Go(func() {
			if _, _, err := cachedPostgres(t.Context(), &outs[i]); err != nil {
				t.Error(err)
			}
		})
	}
	both.Wait()
	if t.Failed() {
		return
	}
	if said := outs[0].String() + outs[1].String(); strings.Count(said, "Downloading ") != 2 || !strings.Contains(said, " MB)\n") {
		t.Errorf("not one download of lists and packages: %s", said)
	}
	wantEntries(t, dir, "lock", "postgresql")

	installFakeApt(t, noNetwork)
	bin, major, err := cachedPostgres(t.Context(), io.Discard)
	if err != nil || !strings.HasPrefix(bin, dir) {
		t.Fatalf("the second time: %s, %v", bin, err)
	}
	server, err := startPostgresIn(t.Context(), bin, major, postgresConfig{dir: postgresDir(t), settings: map[string]string{
		"fsync":          "off",
		"jit_above_cost": "0", // compile every query, were there a compiler
	}})
	check(t, err)
	if got := queryText(t, server.url, `SELECT sum(i)::text FROM generate_series(1, 1000) i`); got != "500500" {
		t.Errorf("the sum is %s", got)
	}
	check(t, server.stop())
}

// noNetwork replaces the programs of fakeApt that need one.
var noNetwork = map[string]string{"apt-cache": "exit 100", "apt-get": "exit 100"}

// fakeApt has what apt's programs do, without a network and packages: PostgreSQL 17 is a pair of shell scripts.
var fakeApt = map[string]string{
	"apt-cache": `echo postgresql; echo '  Depends: postgresql-17'; echo '  Suggests: postgresql-doc'`,
	"apt-get": `case "$*" in
*--print-uris*--reinstall*)
	for package in postgresql-17:16500000 libpq5:500000 libllvm19:26000000 libz3-4:7000000 libjson-perl:1 postgresql-common:1 perl:1; do
		file=${package%:*}_1.0-1_amd64.deb
		echo "'http://packages.invalid/$file' $file ${package#*:} SHA256:0"
	done ;;
*" download "*)
	asked="$*"
	for package in ${asked#*" download "}; do
		>${package}_1.0-1_amd64.deb
	done ;;
esac`,
	"dpkg-deb": `case $2 in
postgresql-17_*)
	bin=$3/usr/lib/postgresql/17/bin
	mkdir -p $bin $3/usr/lib/postgresql/17/lib
	>$3/usr/lib/postgresql/17/lib/llvmjit.so
	printf '#!/bin/sh\necho "initdb (PostgreSQL) 17.2"\n' >$bin/initdb
	printf '#!/bin/sh\necho "postgres (PostgreSQL) 17.2"\ntest -e "$LD_LIBRARY_PATH/libpq.so.5"\n' >$bin/postgres
	chmod +x $bin/* ;;
libpq5_*)
	mkdir -p $3/usr/lib/x86_64-linux-gnu
	>$3/usr/lib/x86_64-linux-gnu/libpq.so.5 ;;
*)
	exit 1 ;;
esac`,
}

// installFakeApt puts fakeApt in front of the machine's programs, except where another script is given.
func installFakeApt(t *testing.T, other map[string]string) {
	t.Helper()
	dir := t.TempDir()
	for program, commands := range fakeApt {
		if given, ok := other[program]; ok {
			commands = given
		}
		script(t, filepath.Join(dir, program), commands)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestFetchPostgres(t *testing.T) {
	dir := aptCache(t)
	bin := filepath.Join(dir, "postgresql", "usr", "lib", "postgresql", "17", "bin")
	installFakeApt(t, nil)
	for _, row := range []struct {
		name   string
		before func()
		said   string // empty: nothing
	}{
		{"the first time", func() {}, "Downloading postgresql-17, libpq5 (17.0 MB)\n"},
		{"the second time", func() { installFakeApt(t, noNetwork) }, ""},
		{"programs that do not run any more", func() {
			script(t, filepath.Join(bin, "postgres"), "exit 127")
			installFakeApt(t, nil)
		}, "Downloading postgresql-17, libpq5 (17.0 MB)\n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			row.before()
			var out bytes.Buffer
			got, major, err := cachedPostgres(t.Context(), &out)
			if err != nil || got != bin || major != 17 {
				t.Fatalf("%s, %d, %v", got, major, err)
			}
			if said := out.String(); !strings.Contains(said, row.said) || (said == "") != (row.said == "") {
				t.Errorf("said %q", said)
			}
			wantEntries(t, dir, "lock", "postgresql")
			wantEntries(t, filepath.Join(bin, "..", "lib")) // without LLVM its compiler is an error
		})
	}
}

func TestFetchPostgresFails(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("elsewhere nothing is downloaded")
	}
	_, _, notFound := newestPostgres(nil)
	for _, row := range []struct {
		name   string
		broken map[string]string
		causes []string
	}{
		{"the lists", map[string]string{"apt-get": "echo 'E: disk full' >&2; exit 100"}, []string{"apt-get: exit status 100", "E: disk full"}},
		{"no network, a warning to apt", map[string]string{
			"apt-get":   "echo 'W: Failed to fetch' >&2",
			"apt-cache": "echo 'E: No packages found' >&2; exit 100",
		}, []string{"apt-cache: exit status 100", "W: Failed to fetch", "E: No packages found"}},
		{"a package without a server", map[string]string{"apt-cache": "echo postgresql"}, []string{"names no server package"}},
		{"the server has no source", map[string]string{"apt-get": ":"}, []string{"postgresql-17 cannot be downloaded"}},
		{"the packages", map[string]string{
			"apt-get": `case "$*" in *" download "*) echo 'E: hash sum mismatch' >&2; exit 100; esac` + "\n" + fakeApt["apt-get"],
		}, []string{"hash sum mismatch"}},
		{"unpacking", map[string]string{"dpkg-deb": "echo 'unexpected end of file' >&2; exit 2"}, []string{"dpkg-deb: exit status 2", "unexpected end of file"}},
		{"empty packages", map[string]string{"dpkg-deb": ":"}, []string{"no server programs"}},
		{"a library is missing", map[string]string{
			"dpkg-deb": fakeApt["dpkg-deb"] + `
test ! -d $3/usr/lib/postgresql || printf '#!/bin/sh\necho libicu.so: cannot open >&2; exit 127\n' >$3/usr/lib/postgresql/17/bin/postgres`,
		}, []string{"exit status 127", "libicu.so: cannot open"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			dir := aptCache(t)
			installFakeApt(t, row.broken)
			_, _, err := fetchPostgres(t.Context(), notFound, io.Discard)
			if !errors.Is(err, notFound) {
				t.Fatalf("the advice is missing: %v", err)
			}
			for _, cause := range row.causes {
				if !strings.Contains(err.Error(), cause) {
					t.Errorf("%v does not say %q", err, cause)
				}
			}
			wantEntries(t, dir, "lock")
		})
	}
	t.Run("interrupted", func(t *testing.T) {
		dir := aptCache(t)
		installFakeApt(t, nil)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, _, err := fetchPostgres(ctx, notFound, io.Discard); err != context.Canceled {
			t.Error(err)
		}
		wantEntries(t, dir, "lock")
	})
	t.Run("no apt", func(t *testing.T) {
		t.Setenv("PATH", t.TempDir())
		if _, _, err := fetchPostgres(t.Context(), notFound, io.Discard); err != notFound {
			t.Error(err)
		}
	})
}
