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
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// cacheDir returns the directory where local development keeps its files, and creates it when missing. For root it is below
// XDG_CACHE_HOME or /var/cache, because PostgreSQL then runs as a user that cannot reach root's home.
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

// makeDir creates dir and its parents, accessible to this user only. When the user is root, other users may pass through it,
// because PostgreSQL runs as another user.
func makeDir(dir string) error {
	var mode fs.FileMode = 0o700
	if os.Geteuid() == 0 {
		mode = 0o711
	}
	if err := os.MkdirAll(dir, mode); err != nil {
		return err
	}
	return os.Chmod(dir, mode) // not narrowed by the umask
}

// errAlreadyRunning says that another process holds the lock.
var errAlreadyRunning = errors.New("already running")

// lockDir takes an exclusive lock on dir. It lasts until unlock is called or this process ends, in whatever way. When another
// process holds the lock, the error is errAlreadyRunning and has its process id.
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
		fmt.Fprintln(file, os.Getpid()) // for the error message above
	}
	return func() { file.Close() }, nil
}

// postgresConfig describes a private cluster.
type postgresConfig struct {
	dir      string            // holds a data directory for each major version; created when missing
	settings map[string]string // PostgreSQL settings, such as "fsync": "off"; they override those of arguments
	out      io.Writer         // told what is downloaded; nil: standard error
}

// postgresServer is a private PostgreSQL cluster. It is reached through its Unix socket only. It is not safe for concurrent
// use.
type postgresServer struct {
	url string // connection string of the database "lumiere"

	config  postgresConfig
	bin     string              // directory of the server programs
	data    string              // the cluster's data directory
	socket  string              // the socket's directory
	account *syscall.Credential // the user that the server runs as; nil for the user of this process

	process *os.Process // nil while stopped
	exited  chan error  // receives the result of the process, once
}

// startPostgres starts the cluster in cfg.dir with this machine's PostgreSQL, or with a downloaded one (see fetchPostgres), as
// startPostgresIn does.
func startPostgres(ctx context.Context, cfg postgresConfig) (*postgresServer, error) {
	bin, major, err := findPostgres()
	if err != nil {
		bin, major, err = fetchPostgres(ctx, err, cmp.Or[io.Writer](cfg.out, os.Stderr))
	}
	if err != nil {
		return nil, err
	}
	return startPostgresIn(ctx, bin, major, cfg)
}

// startPostgresIn starts the cluster in cfg.dir with the server programs in bin, and waits until it accepts connections. It
// creates the cluster and the database when they are missing. It first removes what a crash left behind, and ends a server
// that is still running there, so the caller must keep other processes out of cfg.dir: see lockDir.
func startPostgresIn(ctx context.Context, bin string, major int, cfg postgresConfig) (*postgresServer, error) {
	account, err := postgresAccount()
	if err != nil {
		return nil, err
	}
	if cfg.dir, err = filepath.Abs(cfg.dir); err != nil {
		return nil, err
	}
	if err := makeDir(cfg.dir); err != nil {
		return nil, err
	}
	if account != nil {
		if err := checkReachable(cfg.dir); err != nil {
			return nil, err
		}
	}
	p := &postgresServer{
		config:  cfg,
		bin:     bin,
		data:    filepath.Join(cfg.dir, fmt.Sprintf("data-%d", major)),
		socket:  filepath.Join(cfg.dir, "socket"),
		account: account,
	}
	if len(p.socket) > maxSocketDir || strings.Contains(p.socket, ",") { // a comma separates hosts
		if p.socket, err = os.MkdirTemp("", "lumiere-"); err != nil {
			return nil, err
		}
	}
	p.url = p.databaseURL(postgresName)
	if err := p.makeCluster(ctx); err != nil {
		return nil, err
	}
	if err := os.WriteFile(p.logFile(), nil, 0o600); err != nil {
		return nil, err
	}
	if err := p.start(ctx); err != nil {
		return nil, err
	}
	return p, nil
}

// postgresAccount returns the user that PostgreSQL runs as when this process is root, because PostgreSQL refuses to run as
// root. It returns nil when this process is not root.
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

// checkReachable returns an error unless every user can pass through dir and its parents. The error names the directory that
// cannot be passed.
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

// databaseURL returns the connection string of the named database.
func (p *postgresServer) databaseURL(name string) string {
	u := url.URL{
		Scheme:   "postgres",
		User:     url.User(postgresName),
		Path:     "/" + name,
		RawQuery: url.Values{"host": {p.socket}, "port": {postgresPort}}.Encode(),
	}
	return u.String()
}

func (p *postgresServer) logFile() string { return filepath.Join(p.config.dir, "log") }

// command prepares one of PostgreSQL's programs to run as p.account. The program has a process group of its own, so that the
// terminal's Ctrl-C reaches this process only, which stops the server when nothing needs it any more.
func (p *postgresServer) command(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(p.bin, program), args...)
	cmd.Dir = p.config.dir
	cmd.Env = append(postgresEnv(p.bin), "LC_ALL=C", "TZ=UTC")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: p.account}
	return cmd
}

// own makes the user that PostgreSQL runs as the owner of path.
func (p *postgresServer) own(path string) error {
	if p.account == nil {
		return nil
	}
	return os.Chown(path, int(p.account.Uid), int(p.account.Gid))
}

// makeCluster creates the data directory unless it exists. The directory has a temporary name until it is complete. Those that
// interrupted runs left behind are removed.
func (p *postgresServer) makeCluster(ctx context.Context) error {
	if _, err := os.Stat(p.data); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	halfMade, _ := filepath.Glob(filepath.Join(p.config.dir, "new-*")) // fails only on a malformed pattern
	for _, dir := range halfMade {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	dir, err := os.MkdirTemp(p.config.dir, "new-")
	if err != nil {
		return err
	}
	if err := p.own(dir); err != nil {
		return err
	}
	args := []string{"-D", dir, "-U", postgresName, "-A", "trust", "-E", "UTF8", "--locale=C"}
	if p.config.settings["fsync"] == "off" {
		args = append(args, "--no-sync")
	}
	if out, err := p.command(ctx, "initdb", args...).CombinedOutput(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err() // interrupted; the next start begins anew
		}
		return fmt.Errorf("initdb: %w\n%s", err, lastLines(out))
	}
	return os.Rename(dir, p.data)
}

// start starts a stopped server and waits until it accepts connections, for at most postgresStartLimit.
func (p *postgresServer) start(ctx context.Context) error {
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
		// After a SIGKILL of the server its sessions may still run. Until they end, a new server cannot start.
		if err == nil || !strings.Contains(err.Error(), "pre-existing shared memory block") {
			return err
		}
		if pause(ctx, postgresPoll) != nil {
			return err
		}
	}
}

// makeSocketDir creates the socket's directory and removes an old one. In an old one, the lock file of a dead server would
// keep the new server from starting if another process now has the dead server's id.
func (p *postgresServer) makeSocketDir() error {
	if err := os.RemoveAll(p.socket); err != nil {
		return err
	}
	if err := os.Mkdir(p.socket, 0o700); err != nil {
		return err
	}
	return p.own(p.socket)
}

// launch starts the server and waits until the database exists. The error contains the end of what the server logged.
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
	stop, err := p.startWatchdog(cmd.Process.Pid)
	if err != nil {
		cmd.Process.Kill()
		cmd.Wait()
		return err
	}
	p.process, p.exited = cmd.Process, make(chan error, 1)
	go func() {
		err := cmd.Wait()
		stop()
		p.exited <- err
	}()
	if err := p.makeDatabase(ctx); err != nil {
		p.end(syscall.SIGQUIT)
		written, _ := os.ReadFile(p.logFile())
		return fmt.Errorf("PostgreSQL did not start: %w\n%s", err, lastLines(written[min(logStart, int64(len(written))):]))
	}
	return nil
}

// arguments returns the command line of the server.
func (p *postgresServer) arguments() []string {
	settings := map[string]string{
		"listen_addresses":        "",
		"port":                    postgresPort,
		"unix_socket_directories": `"` + strings.ReplaceAll(p.socket, `"`, `""`) + `"`,
		"unix_socket_permissions": "0700",
	}
	maps.Copy(settings, p.config.settings)
	args := []string{"-D", p.data}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		args = append(args, "-c", name+"="+settings[name])
	}
	return args
}

// startWatchdog starts a shell that shuts the server pid down when this process ends without stopping it: by SIGKILL, a panic
// or a test's timeout. The shell waits for the end of a pipe whose other end only this process has. stop ends the shell and
// leaves the server alone.
//
// The parent-death signal is no alternative: only Linux has it, and it is sent at the end of the thread that started the
// server, not of the process.
func (p *postgresServer) startWatchdog(pid int) (stop func(), err error) {
	watchdog := exec.Command("/bin/sh", "-c", `read -r _ || kill -INT "$0"`, strconv.Itoa(pid))
	watchdog.Dir = "/"
	watchdog.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: p.account}
	pipe, err := watchdog.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := watchdog.Start(); err != nil {
		return nil, err
	}
	return func() {
		io.WriteString(pipe, "\n")
		watchdog.Wait()
	}, nil
}

// makeDatabase waits until the server accepts connections and creates the database unless it exists.
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

// connect retries until the server accepts a connection. It fails when the server or ctx ends.
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

// stop shuts the server down (PostgreSQL's fast shutdown) and waits until it has ended. It does nothing when the server is
// stopped already.
func (p *postgresServer) stop() error { return p.end(syscall.SIGINT) }

// end sends the server a signal and waits until it has ended. A server that takes longer than postgresStopLimit is killed,
// which is an error.
func (p *postgresServer) end(signal syscall.Signal) error {
	if p.process == nil {
		return nil
	}
	p.process.Signal(signal) // fails only when the server has ended, and then exited says how
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

// endOrphan ends a server that still runs in the data directory although the process that started it has ended. A server that
// runs is recognized by its socket: the process id in its file may belong to another process by now.
func (p *postgresServer) endOrphan(ctx context.Context) error {
	path := filepath.Join(p.data, "postmaster.pid")
	deadline := time.Now().Add(orphanGrace)
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
			return nil // a new server removes the file of a dead one
		case listening(socket):
			// PostgreSQL's immediate shutdown. It loses nothing: the next start recovers from the write-ahead log.
			if err := syscall.Kill(pid, syscall.SIGQUIT); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("end the PostgreSQL left running as process %d: %w", pid, err)
			}
		case time.Now().After(deadline):
			return os.Remove(path) // the process with this id is not a server of this directory
		}
		if err := pause(ctx, postgresPoll); err != nil {
			return fmt.Errorf("the PostgreSQL left running as process %d does not end: %w", pid, err)
		}
	}
}

// readPIDFile reads PostgreSQL's postmaster.pid and returns the process id and the path of the socket. Line 1 has the process
// id, line 4 the port and line 5 the socket's directory. While the server starts, the later lines are missing; the socket is
// "" then.
func readPIDFile(path string) (pid int, socket string, err error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return 0, "", err
	}
	lines := strings.Split(string(content), "\n")
	pid, _ = strconv.Atoi(strings.TrimSpace(lines[0])) // a truncated file belongs to no running server
	if len(lines) > 5 && lines[4] != "" {
		socket = filepath.Join(lines[4], ".s.PGSQL."+lines[3])
	}
	return pid, socket, nil
}

// listening reports whether a process listens on the Unix socket. Errors other than a refused connection and a missing socket
// count as listening.
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

// pause waits for d. It returns ctx's error when ctx ends first.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// lastLines returns the last 10 lines of a program's output.
func lastLines(output []byte) string {
	lines := strings.Split(strings.TrimSpace(string(output)), "\n")
	return strings.Join(lines[max(0, len(lines)-10):], "\n")
}

// runningPostgres returns the connection string of the server that another process runs in dir.
func runningPostgres(dir string) (databaseURL string, err error) {
	files, _ := filepath.Glob(filepath.Join(dir, "data-*", "postmaster.pid"))
	for _, file := range files {
		if _, socket, err := readPIDFile(file); err == nil && listening(socket) {
			return (&postgresServer{socket: filepath.Dir(socket)}).databaseURL(postgresName), nil
		}
	}
	return "", fmt.Errorf("no PostgreSQL answers in %s", dir)
}
