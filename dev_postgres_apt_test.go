package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
)

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
