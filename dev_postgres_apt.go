package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// On Debian and Ubuntu, local development does without an installed PostgreSQL: it unpacks the distribution's own
// packages in the cache directory and runs them from there. This needs no root and installs nothing: apt works on
// lists of its own, and dpkg-deb only unpacks. Time zones by name work only where the system has them.

// fetchPostgres returns the server programs in the cache directory, and downloads them when they are not there. It is
// for a machine where findPostgres failed; notFound is that error, and part of this one.
func fetchPostgres(ctx context.Context, notFound error, out io.Writer) (bin string, major int, err error) {
	if !hasApt() {
		return "", 0, notFound
	}
	bin, major, err = cachedPostgres(ctx, out)
	switch {
	case ctx.Err() != nil:
		return "", 0, ctx.Err()
	case err != nil:
		return "", 0, fmt.Errorf("%w\nDownloading it failed: %w", notFound, err)
	}
	return bin, major, nil
}

// hasApt reports whether this is Debian, Ubuntu or one of their kind.
func hasApt() bool {
	for _, program := range []string{"apt-get", "apt-cache", "dpkg-deb"} {
		if _, err := exec.LookPath(program); err != nil {
			return false
		}
	}
	return runtime.GOOS == "linux"
}

// cachedPostgres is fetchPostgres where apt is. Of several processes one downloads and the others wait for it.
func cachedPostgres(ctx context.Context, out io.Writer) (bin string, major int, err error) {
	dir, err := cacheDir()
	if err != nil {
		return "", 0, err
	}
	dir = filepath.Join(dir, "apt")
	if err := makeDir(dir); err != nil {
		return "", 0, err
	}
	if os.Geteuid() == 0 {
		if err := checkReachable(dir); err != nil {
			return "", 0, err
		}
	}
	unlock, err := waitForLock(ctx, dir)
	if err != nil {
		return "", 0, err
	}
	defer unlock()
	unpacked := filepath.Join(dir, "postgresql")
	if bin, major, err = newestPostgres(unpackedPlaces(unpacked)); err == nil {
		return bin, major, nil
	}
	if err := downloadPostgres(ctx, unpacked, out); err != nil {
		return "", 0, err
	}
	return newestPostgres(unpackedPlaces(unpacked))
}

// waitForLock is lockDir, but waits while another process is in.
func waitForLock(ctx context.Context, dir string) (unlock func(), err error) {
	for {
		unlock, err := lockDir(dir)
		if !errors.Is(err, errAlreadyRunning) {
			return unlock, err
		}
		if err := pause(ctx, postgresPoll); err != nil {
			return nil, err
		}
	}
}

// unpackedPlaces lists the directories of server programs below root, where packages are unpacked.
func unpackedPlaces(root string) []string {
	places, _ := fs.Glob(os.DirFS(root), "usr/lib/postgresql/*/bin") // fails only on a malformed pattern
	for i, place := range places {
		places[i] = filepath.Join(root, place)
	}
	return places
}

// postgresEnv returns the environment of the server programs in bin. Unpacked ones are shown the libraries that were
// unpacked with them.
func postgresEnv(bin string) []string {
	root, _, isPackage := strings.Cut(bin, "/usr/lib/postgresql/")
	if !isPackage || root == "" {
		return os.Environ()
	}
	var libraries []string
	for _, pattern := range []string{"usr/lib/*-linux-*", "lib/*-linux-*"} {
		matches, _ := fs.Glob(os.DirFS(root), pattern)
		for _, match := range matches {
			libraries = append(libraries, filepath.Join(root, match))
		}
	}
	return append(os.Environ(), "LD_LIBRARY_PATH="+strings.Join(libraries, ":"))
}

// downloadPostgres replaces the directory unpacked with PostgreSQL's packages. It says on out what it downloads. The
// directory gets its name when its programs have run, so what an interrupted download left has another name, and is
// removed. The caller holds the lock of the parent directory.
func downloadPostgres(ctx context.Context, unpacked string, out io.Writer) error {
	parent := filepath.Dir(unpacked)
	halfMade, err := fs.Glob(os.DirFS(parent), "new-*")
	if err != nil {
		return err
	}
	for _, name := range halfMade {
		if err := os.RemoveAll(filepath.Join(parent, name)); err != nil {
			return err
		}
	}
	dir, err := os.MkdirTemp(parent, "new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	fmt.Fprintf(out, "PostgreSQL is not installed. Its packages of this distribution are downloaded and unpacked in %s; nothing is installed.\n"+
		"Downloading the package lists (10 MB or more)\n", parent)
	a := &apt{dir: dir}
	if err := a.unpackPostgres(ctx, out); err != nil {
		if complaints := lastLines(a.complaints.Bytes()); complaints != "" {
			err = fmt.Errorf("%w\n%s", err, complaints)
		}
		return err
	}
	if err := os.RemoveAll(unpacked); err != nil { // its programs did not run
		return err
	}
	return os.Rename(a.root(), unpacked)
}

// apt runs the programs of apt on lists and caches of its own in dir.
type apt struct {
	dir        string
	complaints bytes.Buffer // what the programs said on their standard error; a failed download of a list is only a warning
}

// root returns the directory that the packages are unpacked in.
func (a *apt) root() string { return filepath.Join(a.dir, "root") }

// unpackPostgres downloads the package lists and PostgreSQL's packages, unpacks them, and tries the programs.
func (a *apt) unpackPostgres(ctx context.Context, out io.Writer) error {
	for _, dir := range []string{"state/lists/partial", "cache/archives/partial", "root"} {
		if err := os.MkdirAll(filepath.Join(a.dir, dir), 0o755); err != nil {
			return err
		}
	}
	if _, err := a.run(ctx, "apt-get", "update"); err != nil {
		return err
	}
	packages, err := a.postgresPackages(ctx)
	if err != nil {
		return err
	}
	names, size := make([]string, len(packages)), 0
	for i, p := range packages {
		names[i], size = p.name, size+p.size
	}
	fmt.Fprintf(out, "Downloading %s (%.1f MB)\n", strings.Join(names, ", "), float64(size)/1e6)
	if _, err := a.run(ctx, "apt-get", append([]string{"download"}, names...)...); err != nil {
		return err
	}
	files, err := fs.Glob(os.DirFS(a.dir), "*.deb")
	if err != nil {
		return err
	}
	for _, file := range files {
		if _, err := a.command(ctx, "dpkg-deb", "--extract", file, a.root()); err != nil {
			return err
		}
	}
	return tryPostgres(a.root())
}

// tryPostgres asks the programs unpacked in root for their version, which loads their libraries. It takes the compiler
// of queries away first: its library, LLVM, is not downloaded, and without both PostgreSQL does not compile.
func tryPostgres(root string) error {
	places := unpackedPlaces(root)
	if len(places) == 0 {
		return errors.New("the packages have no server programs")
	}
	for _, bin := range places {
		if err := os.RemoveAll(filepath.Join(filepath.Dir(bin), "lib", "llvmjit.so")); err != nil {
			return err
		}
		for _, program := range []string{"initdb", "postgres"} {
			if _, err := postgresVersion(filepath.Join(bin, program)); err != nil {
				return err
			}
		}
	}
	return nil
}

// aptPackage is a package to download.
type aptPackage struct {
	name string
	size int // bytes
}

var (
	serverDependency = regexp.MustCompile(`(?m)^  Depends: (postgresql-\d+)$`)
	// packageLine is what --print-uris prints for a package: 'URI' postgresql-17_17.2-1_amd64.deb 16384000 SHA256:…
	packageLine   = regexp.MustCompile(`(?m)^'\S+' ([^_\s]+)_\S+ (\d+)`)
	neededPackage = regexp.MustCompile(`^(postgresql-\d|lib)`)
	// unneededPackage matches libraries that the server does not load: those of its compiler of queries, of the scripts
	// that manage an installed cluster, and headers.
	unneededPackage = regexp.MustCompile(`^lib(llvm|z3|perl)|-(perl|dev)$`)
)

// postgresPackages returns the server's package and the packages of the libraries that it needs and the system lacks.
func (a *apt) postgresPackages(ctx context.Context) ([]aptPackage, error) {
	depends, err := a.run(ctx, "apt-cache", "depends", "postgresql")
	if err != nil {
		return nil, err
	}
	server := serverDependency.FindStringSubmatch(depends)
	if server == nil {
		return nil, errors.New("this distribution's package postgresql names no server package")
	}
	// The package may count as installed although its programs were not found.
	plan, err := a.run(ctx, "apt-get", "install", "--print-uris", "--reinstall", "--no-install-recommends", server[1])
	if err != nil {
		return nil, err
	}
	var packages []aptPackage
	for _, line := range packageLine.FindAllStringSubmatch(plan, -1) {
		if name := line[1]; neededPackage.MatchString(name) && !unneededPackage.MatchString(name) {
			size, err := strconv.Atoi(line[2])
			if err != nil {
				return nil, err
			}
			packages = append(packages, aptPackage{name, size})
		}
	}
	if !slices.ContainsFunc(packages, func(p aptPackage) bool { return p.name == server[1] }) {
		return nil, fmt.Errorf("the package %s cannot be downloaded", server[1])
	}
	return packages, nil
}

// run runs a program of apt and returns what it printed.
func (a *apt) run(ctx context.Context, program string, args ...string) (string, error) {
	return a.command(ctx, program, append([]string{
		"-qq",
		"-o", "Dir::State=" + filepath.Join(a.dir, "state"),
		"-o", "Dir::Cache=" + filepath.Join(a.dir, "cache"),
		"-o", "APT::Sandbox::User=root", // otherwise root's apt-get downloads as a user that may not write to dir
		"-o", "Acquire::Languages=none", // descriptions
	}, args...)...)
}

// command runs a program in dir and returns what it printed.
func (a *apt) command(ctx context.Context, program string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = a.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stderr = &a.complaints
	cmd.WaitDelay = time.Second // for what a killed program started
	output, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w", program, err)
	}
	return string(output), nil
}
