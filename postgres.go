package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	oldestPostgres     = 13 // the major version from which on everything we use is there
	postgresName       = "lumiere"
	postgresPort       = "5432"           // only part of the socket's name
	postgresStartLimit = time.Minute      // for a start, the recovery after a crash included
	postgresStopLimit  = 30 * time.Second // for a shutdown, before the server is killed
	postgresPoll       = 20 * time.Millisecond
	orphanGrace        = time.Second // for a server without a socket to finish starting or stopping
	maxSocketDir       = 89          // bytes: macOS allows a socket's path 103, "/.s.PGSQL.5432" included
)

// findPostgres returns the directory that holds the server programs (initdb, postgres) of the newest PostgreSQL on
// this machine, and its major version. When there is none the error says how to install one.
func findPostgres() (bin string, major int, err error) {
	return newestPostgres(postgresPlaces())
}

// postgresPlaces lists the directories where PostgreSQL's programs may be.
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

// newestPostgres is findPostgres over the given places.
func newestPostgres(places []string) (bin string, major int, err error) {
	var newest []int
	for _, place := range places {
		if !filepath.IsAbs(place) {
			continue
		}
		// The programs find their own files relative to where they really are, so a link in PATH is followed.
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

var versionPattern = regexp.MustCompile(`\) (\d+)(?:\.(\d+))?`)

// postgresVersion asks the server program for its version, major and minor: "postgres (PostgreSQL) 17.2 (Debian …)".
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
	minor, _ := strconv.Atoi(string(match[2])) // a beta has none
	return []int{major, minor}, nil
}

// cacheDir returns the directory where local development keeps what it makes, and makes it when missing.
// For root it is in /var/cache unless XDG_CACHE_HOME says otherwise: PostgreSQL runs as another user then, who
// cannot reach root's home.
func cacheDir() (string, error) {
	base, err := os.UserCacheDir()
	if os.Geteuid() == 0 {
		base, err = cmp.Or(os.Getenv("XDG_CACHE_HOME"), "/var/cache"), nil
	}
	if err != nil {
		return "", fmt.Errorf("no directory to keep the database in: %w", err)
	}
	dir := filepath.Join(base, "lumiere")
	if err := makeDir(dir); err != nil {
		return "", fmt.Errorf("no directory to keep the database in: %w", err)
	}
	return dir, nil
}

// makeDir makes dir, its parents too, private to us; root's can be passed through by the user PostgreSQL runs as.
func makeDir(dir string) error {
	var mode fs.FileMode = 0o700
	if os.Geteuid() == 0 {
		mode = 0o711
	}
	if err := os.MkdirAll(dir, mode); err != nil {
		return err
	}
	return os.Chmod(dir, mode) // whatever the umask took away
}

// errAlreadyRunning says that another process holds the lock.
var errAlreadyRunning = errors.New("already running")

// lockDir keeps every other process out of dir until unlock is called or this process ends, however it ends.
// When another one is in, the error is errAlreadyRunning and names its process id.
func lockDir(dir string) (unlock func(), err error) {
	file, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer file.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			pid, _ := io.ReadAll(file)
			return nil, fmt.Errorf("%w as process %s (it holds %s): stop it first", errAlreadyRunning, bytes.TrimSpace(pid), dir)
		}
		return nil, fmt.Errorf("lock %s: %w", file.Name(), err)
	}
	if err := file.Truncate(0); err == nil {
		fmt.Fprintln(file, os.Getpid()) // only for the message above
	}
	return func() { file.Close() }, nil
}

// postgresConfig says what private cluster to run.
type postgresConfig struct {
	Dir      string            // where the cluster lives, one for each major version; made when missing
	Settings map[string]string // PostgreSQL's settings, beside and before ours: "fsync": "off"
	Out      io.Writer         // told what is downloaded; nil: standard error
}

// postgresServer is a private PostgreSQL cluster, reached by its Unix socket alone. Its methods are for one
// goroutine at a time.
type postgresServer struct {
	URL string // connection string of the database "lumiere"

	config  postgresConfig
	bin     string
	data    string              // the cluster's data directory
	socket  string              // the socket's directory
	account *syscall.Credential // whom to run it as; nil for ourselves

	process *os.Process // nil while stopped
	exited  chan error  // gets the outcome of the process, once
}

// startPostgres starts the cluster in cfg.Dir with this machine's PostgreSQL, or with a downloaded one: see fetchPostgres.
func startPostgres(ctx context.Context, cfg postgresConfig) (*postgresServer, error) {
	bin, major, err := findPostgres()
	if err != nil {
		bin, major, err = fetchPostgres(ctx, err, cmp.Or[io.Writer](cfg.Out, os.Stderr))
	}
	if err != nil {
		return nil, err
	}
	return startPostgresIn(ctx, bin, major, cfg)
}

// startPostgresIn starts the cluster in cfg.Dir with the programs in bin and waits until it answers. A cluster is made when there is none, so is
// the database; what a crash left behind, a server still running too, is cleared away first. Keeping a second living
// process out of cfg.Dir is the caller's part: see lockDir.
func startPostgresIn(ctx context.Context, bin string, major int, cfg postgresConfig) (*postgresServer, error) {
	account, err := postgresAccount()
	if err != nil {
		return nil, err
	}
	if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return nil, err
	}
	if err := makeDir(cfg.Dir); err != nil {
		return nil, err
	}
	if account != nil {
		if err := checkReachable(cfg.Dir); err != nil {
			return nil, err
		}
	}
	p := &postgresServer{
		config:  cfg,
		bin:     bin,
		data:    filepath.Join(cfg.Dir, fmt.Sprintf("data-%d", major)),
		socket:  filepath.Join(cfg.Dir, "socket"),
		account: account,
	}
	if len(p.socket) > maxSocketDir || strings.Contains(p.socket, ",") { // a comma separates hosts
		if p.socket, err = os.MkdirTemp("", "lumiere-"); err != nil {
			return nil, err
		}
	}
	p.URL = p.databaseURL(postgresName)
	if err := p.makeCluster(ctx); err != nil {
		return nil, err
	}
	if err := os.WriteFile(p.logFile(), nil, 0o600); err != nil {
		return nil, err
	}
	if err := p.Start(ctx); err != nil {
		return nil, err
	}
	return p, nil
}

// postgresAccount returns the user to run PostgreSQL as when we are root, since it refuses root; nil when we are not.
func postgresAccount() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "_postgres", "nobody"} {
		account, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err := strconv.ParseUint(account.Uid, 10, 32)
		if err != nil {
			return nil, err
		}
		gid, err := strconv.ParseUint(account.Gid, 10, 32)
		if err != nil {
			return nil, err
		}
		return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid), Groups: []uint32{uint32(gid)}}, nil
	}
	return nil, errors.New("PostgreSQL does not run as root, and there is no user postgres or nobody to run it as")
}

// checkReachable tells whether another user can get to dir, and names what is in the way.
func checkReachable(dir string) error {
	for ; ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil {
			return err
		}
		if info.Mode()&0o001 == 0 {
			return fmt.Errorf("PostgreSQL does not run as root, and the user it runs as cannot reach %s: "+
				"set XDG_CACHE_HOME to a directory that everyone can pass through", dir)
		}
		if dir == filepath.Dir(dir) {
			return nil
		}
	}
}

func (p *postgresServer) databaseURL(name string) string {
	u := url.URL{
		Scheme:   "postgres",
		User:     url.User(postgresName),
		Path:     "/" + name,
		RawQuery: url.Values{"host": {p.socket}, "port": {postgresPort}}.Encode(),
	}
	return u.String()
}

func (p *postgresServer) logFile() string { return filepath.Join(p.config.Dir, "log") }

// command prepares one of PostgreSQL's programs to run as its user and out of reach of the terminal's Ctrl-C, which
// is meant for us: we stop it when nothing needs it any more.
func (p *postgresServer) command(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(p.bin, program), args...)
	cmd.Dir = p.config.Dir
	cmd.Env = append(postgresEnv(p.bin), "LC_ALL=C", "TZ=UTC")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: p.account}
	return cmd
}

// own gives path to the user PostgreSQL runs as.
func (p *postgresServer) own(path string) error {
	if p.account == nil {
		return nil
	}
	return os.Chown(path, int(p.account.Uid), int(p.account.Gid))
}

// makeCluster makes the data directory unless it is there. It gets its name when it is whole, so what an interrupted
// run left has another name, and is removed.
func (p *postgresServer) makeCluster(ctx context.Context) error {
	if _, err := os.Stat(p.data); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	halfMade, _ := filepath.Glob(filepath.Join(p.config.Dir, "new-*")) // fails only on a malformed pattern
	for _, dir := range halfMade {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	dir, err := os.MkdirTemp(p.config.Dir, "new-")
	if err != nil {
		return err
	}
	if err := p.own(dir); err != nil {
		return err
	}
	args := []string{"-D", dir, "-U", postgresName, "-A", "trust", "-E", "UTF8", "--locale=C"}
	if p.config.Settings["fsync"] == "off" {
		args = append(args, "--no-sync")
	}
	if out, err := p.command(ctx, "initdb", args...).CombinedOutput(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err() // interrupted; the next start makes it anew
		}
		return fmt.Errorf("initdb: %w\n%s", err, lastLines(out))
	}
	return os.Rename(dir, p.data)
}

// Start starts a stopped server again and waits until it answers.
func (p *postgresServer) Start(ctx context.Context) error {
	if p.process != nil {
		return errors.New("PostgreSQL is already running")
	}
	ctx, cancel := context.WithTimeout(ctx, postgresStartLimit)
	defer cancel()
	if err := p.endOrphan(ctx); err != nil {
		return err
	}
	for {
		err := p.launch(ctx)
		// After a SIGKILL of the server its sessions may finish what they are at, and until then nobody else gets in.
		if err == nil || !strings.Contains(err.Error(), "pre-existing shared memory block") {
			return err
		}
		if pause(ctx, postgresPoll) != nil {
			return err
		}
	}
}

// makeSocketDir makes the socket's directory anew: a lock file of a dead server would keep the next one from starting
// when another process has its id now.
func (p *postgresServer) makeSocketDir() error {
	if err := os.RemoveAll(p.socket); err != nil {
		return err
	}
	if err := os.Mkdir(p.socket, 0o700); err != nil {
		return err
	}
	return p.own(p.socket)
}

// launch starts the server and waits until the database is there. The error carries what the server logged.
func (p *postgresServer) launch(ctx context.Context) error {
	if err := p.makeSocketDir(); err != nil {
		return err
	}
	log, err := os.OpenFile(p.logFile(), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	logStart, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	cmd := p.command(context.Background(), "postgres", p.arguments()...) // it outlives ctx
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	dismiss, err := p.postGuard(cmd.Process.Pid)
	if err != nil {
		cmd.Process.Kill()
		cmd.Wait()
		return err
	}
	p.process, p.exited = cmd.Process, make(chan error, 1)
	go func() {
		err := cmd.Wait()
		dismiss()
		p.exited <- err
	}()
	if err := p.makeDatabase(ctx); err != nil {
		p.end(syscall.SIGQUIT)
		written, _ := os.ReadFile(p.logFile())
		return fmt.Errorf("PostgreSQL did not start: %w\n%s", err, lastLines(written[min(logStart, int64(len(written))):]))
	}
	return nil
}

func (p *postgresServer) arguments() []string {
	settings := map[string]string{
		"listen_addresses":        "",
		"port":                    postgresPort,
		"unix_socket_directories": `"` + strings.ReplaceAll(p.socket, `"`, `""`) + `"`,
		"unix_socket_permissions": "0700",
	}
	maps.Copy(settings, p.config.Settings)
	args := []string{"-D", p.data}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		args = append(args, "-c", name+"="+settings[name])
	}
	return args
}

// postGuard has the server shut down when this process dies without doing so (SIGKILL, a panic, a test out of time):
// a shell waits at a pipe whose other end is ours alone. The parent-death signal would be Linux's only, and it follows
// the thread that started the server, not the process. dismiss sends the guard home.
func (p *postgresServer) postGuard(pid int) (dismiss func(), err error) {
	guard := exec.Command("/bin/sh", "-c", `read -r _ || kill -INT "$0"`, strconv.Itoa(pid))
	guard.Dir = "/"
	guard.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: p.account}
	pipe, err := guard.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := guard.Start(); err != nil {
		return nil, err
	}
	return func() {
		io.WriteString(pipe, "\n")
		guard.Wait()
	}, nil
}

// makeDatabase waits until the server answers, and makes the database unless it is there.
func (p *postgresServer) makeDatabase(ctx context.Context) error {
	conn, err := p.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var exists bool
	err = conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)`, postgresName).Scan(&exists)
	if err != nil || exists {
		return err
	}
	_, err = conn.Exec(ctx, "CREATE DATABASE "+postgresName)
	return err
}

// connect tries until the server lets us in, ends, or ctx does.
func (p *postgresServer) connect(ctx context.Context) (*pgx.Conn, error) {
	for {
		conn, err := pgx.Connect(ctx, p.databaseURL("postgres"))
		if err == nil {
			return conn, nil
		}
		select {
		case outcome := <-p.exited:
			p.exited <- outcome
			return nil, fmt.Errorf("it ended at once (%v)", outcome)
		case <-ctx.Done():
			return nil, err
		case <-time.After(postgresPoll):
		}
	}
}

// Stop shuts the server down in order (PostgreSQL's "fast" mode) and waits for it. Stopping a stopped one is no error.
func (p *postgresServer) Stop() error { return p.end(syscall.SIGINT) }

// Crash ends the server at once, without writing anything back (PostgreSQL's "immediate" mode): what was committed
// comes back from its log at the next start.
func (p *postgresServer) Crash() error { return p.end(syscall.SIGQUIT) }

// Kill ends the server with SIGKILL, as a power cut would. Its sessions notice by themselves and end.
func (p *postgresServer) Kill() error {
	err := p.end(syscall.SIGKILL)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return nil
	}
	return err
}

// end sends the server a signal and waits until it is gone.
func (p *postgresServer) end(signal syscall.Signal) error {
	if p.process == nil {
		return nil
	}
	p.process.Signal(signal) // fails only when it is gone already, which the outcome tells
	var err error
	select {
	case err = <-p.exited:
	case <-time.After(postgresStopLimit):
		p.process.Kill()
		err = errors.Join(fmt.Errorf("PostgreSQL had to be killed: it did not stop in %v", postgresStopLimit), <-p.exited)
	}
	p.process = nil
	return errors.Join(err, os.RemoveAll(p.socket))
}

// endOrphan ends a server that still runs on our data directory though the process that started it is gone. Whether it
// runs is told by its socket, not by the process id in its file: that may be anybody's by now.
func (p *postgresServer) endOrphan(ctx context.Context) error {
	path := filepath.Join(p.data, "postmaster.pid")
	patience := time.Now().Add(orphanGrace)
	for {
		pid, socket, err := readPIDFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		switch {
		case pid <= 0 || errors.Is(syscall.Kill(pid, 0), syscall.ESRCH):
			return nil // PostgreSQL clears up after a dead one by itself
		case listening(socket):
			// PostgreSQL's immediate shutdown: nobody is left to wait for, and its log has everything.
			if err := syscall.Kill(pid, syscall.SIGQUIT); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("end the PostgreSQL left running as process %d: %w", pid, err)
			}
		case time.Now().After(patience):
			return os.Remove(path) // the id is another process's by now
		}
		if err := pause(ctx, postgresPoll); err != nil {
			return fmt.Errorf("the PostgreSQL left running as process %d does not end: %w", pid, err)
		}
	}
}

// readPIDFile reads PostgreSQL's postmaster.pid: its process id in the first line, port and socket directory in the
// fourth and fifth. While the server is coming up the later ones are missing; the socket is "" then.
func readPIDFile(path string) (pid int, socket string, err error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return 0, "", err
	}
	lines := strings.Split(string(content), "\n")
	pid, _ = strconv.Atoi(strings.TrimSpace(lines[0])) // a cut-off file belongs to no living server
	if len(lines) > 5 && lines[4] != "" {
		socket = filepath.Join(lines[4], ".s.PGSQL."+lines[3])
	}
	return pid, socket, nil
}

// listening tells whether a process listens on the Unix socket.
func listening(socket string) bool {
	if socket == "" {
		return false
	}
	conn, err := net.Dial("unix", socket)
	if err == nil {
		conn.Close()
	}
	return !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist)
}

// pause waits for d, or for the end of ctx, which is an error.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// lastLines returns the end of a program's output, short enough for an error.
func lastLines(output []byte) string {
	lines := strings.Split(strings.TrimSpace(string(output)), "\n")
	return strings.Join(lines[max(0, len(lines)-10):], "\n")
}

// runningPostgres is the connection string of the server that another process runs in dir.
func runningPostgres(dir string) (databaseURL string, err error) {
	files, _ := filepath.Glob(filepath.Join(dir, "data-*", "postmaster.pid"))
	for _, file := range files {
		if _, socket, err := readPIDFile(file); err == nil && listening(socket) {
			return (&postgresServer{socket: filepath.Dir(socket)}).databaseURL(postgresName), nil
		}
	}
	return "", fmt.Errorf("no PostgreSQL answers in %s", dir)
}
