package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	oldestPostgres     = 13               // the first major version that has everything this program uses
	postgresName       = "lumiere"        // of the database and its user
	postgresPort       = "5432"           // part of the socket's file name; no TCP port is opened
	postgresStartLimit = time.Minute      // for a start, including the recovery after a crash
	postgresStopLimit  = 30 * time.Second // for a shutdown; then the server is killed
	postgresPoll       = 20 * time.Millisecond
	orphanGrace        = time.Second // for a server without a socket to finish starting or stopping
	maxSocketDir       = 89          // bytes; macOS allows 103 for the path of a socket, with "/.s.PGSQL.5432"
)

// postgresPlaces returns the directories where PostgreSQL's server programs may be.
func postgresPlaces() []string {
	places := filepath.SplitList(os.Getenv("PATH"))
	if bindir, err := exec.Command("pg_config", "--bindir").Output(); err == nil {
		places = append(places, strings.TrimSpace(string(bindir)))
	}
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin",         // Debian, Ubuntu
		"/opt/homebrew/opt/postgresql*/bin", // Homebrew on Apple silicon
		"/usr/local/opt/postgresql*/bin",    // Homebrew on Intel
		"/Applications/Postgres.app/Contents/Versions/*/bin",
	} {
		matches, _ := filepath.Glob(pattern) // fails only on a malformed pattern
		places = append(places, matches...)
	}
	return places
}

// findPostgres returns the directory with the server programs (initdb, postgres) of the newest PostgreSQL on this machine,
// and its major version. When there is none, the error says how to install it.
func findPostgres() (bin string, major int, err error) {
	return newestPostgres(postgresPlaces())
}

// newestPostgres does what findPostgres does, in the given directories only.
func newestPostgres(places []string) (bin string, major int, err error) {
	var newest []int
	for _, place := range places {
		if !filepath.IsAbs(place) {
			continue
		}
		// The programs find their files relative to their real location, so symbolic links are resolved.
		initdb, err := filepath.EvalSymlinks(filepath.Join(place, "initdb"))
		if err != nil {
			continue
		}
		dir := filepath.Dir(initdb)
		version, err := postgresVersion(filepath.Join(dir, "postgres"))
		if err == nil && slices.Compare(version, newest) > 0 {
			bin, newest = dir, version
		}
	}
	const advice = "install it (Debian, Ubuntu: apt install postgresql; macOS: brew install postgresql@17) or set DATABASE_URL"
	switch {
	case bin == "":
		return "", 0, fmt.Errorf("PostgreSQL's server programs (initdb, postgres) were not found: %s", advice)
	case newest[0] < oldestPostgres:
		return "", 0, fmt.Errorf("PostgreSQL %d in %s is too old, %d or later is needed: %s", newest[0], bin, oldestPostgres, advice)
	}
	return bin, newest[0], nil
}

// versionPattern matches the major and minor version in the output of postgres --version.
var versionPattern = regexp.MustCompile(`\) (\d+)(?:\.(\d+))?`)

// postgresVersion returns the major and minor version that the server program prints, such as
// "postgres (PostgreSQL) 17.2 (Debian …)".
func postgresVersion(program string) ([]int, error) {
	cmd := exec.Command(program, "--version")
	cmd.Env = postgresEnv(filepath.Dir(program))
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%s --version: %w\n%s", program, err, lastLines(out))
	}
	match := versionPattern.FindSubmatch(out)
	if match == nil {
		return nil, fmt.Errorf("%s --version answered %q", program, out)
	}
	major, err := strconv.Atoi(string(match[1]))
	if err != nil {
		return nil, err
	}
	minor, _ := strconv.Atoi(string(match[2])) // a beta has none, which counts as 0
	return []int{major, minor}, nil
}
