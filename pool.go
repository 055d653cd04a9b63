package main

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// openPool makes the pool of connections to the database at url, which may name several servers: the first that takes
// writes is used. When that one dies, hangs, vanishes or is demoted, the pool leaves it for the one that took its place. It
// does not wait for any of them. trace may be nil.
func openPool(ctx context.Context, url string, trace pgx.QueryTracer) (*pgxpool.Pool, error) {
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		// The parser's error repeats the connection string, which may hold a password.
		return nil, errors.New("DATABASE_URL is not a PostgreSQL connection string")
	}
	if !strings.Contains(url, "pool_max_conns") {
		config.MaxConns = 16
	}
	if config.ConnConfig.ConnectTimeout == 0 {
		config.ConnConfig.ConnectTimeout = 2 * time.Second // for each server
	}
	if config.ConnConfig.RuntimeParams["application_name"] == "" {
		config.ConnConfig.RuntimeParams["application_name"] = "lumiere"
	}
	config.ConnConfig.Tracer = trace
	config.MaxConnLifetime = 30 * time.Minute
	config.MaxConnLifetimeJitter = 5 * time.Minute
	takeWritableServers(config.ConnConfig)
	closeWithoutWaiting(config)

	var pool *pgxpool.Pool
	config.ShouldPing = func(ctx context.Context, p pgxpool.ShouldPingParams) bool {
		if p.IdleDuration < time.Second {
			return false
		}
		ctx, cancel := context.WithTimeout(ctx, config.ConnConfig.ConnectTimeout)
		defer cancel()
		if p.Conn.Ping(ctx) != nil {
			pool.Reset() // the others won't answer either, and each would be waited for
		}
		return p.Conn.IsClosed() // then the pool's own ping fails at once
	}
	pool, err = pgxpool.NewWithConfig(ctx, config)
	return pool, err
}

// readOnly is PostgreSQL's code for a write that a standby was asked for.
const readOnly = "25006"

// takeWritableServers passes over servers that take no writes, and closes the connection to one that stops taking them.
func takeWritableServers(config *pgx.ConnConfig) {
	if config.ValidateConnect == nil { // no target_session_attrs
		config.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	keep := config.OnPgError
	config.OnPgError = func(c *pgconn.PgConn, err *pgconn.PgError) bool { return err.Code != readOnly && keep(c, err) }
}

// closeWithoutWaiting frees the place of a closed connection in the pool although its server says nothing. By itself pgx
// asks the server to cancel the statement and then reads what is left, for 15 seconds.
func closeWithoutWaiting(config *pgxpool.Config) {
	limit, dial := config.ConnConfig.ConnectTimeout, config.ConnConfig.DialFunc
	config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return conn, conn.SetDeadline(time.Now().Add(limit))
	}
	// The limit stays on a connection that only carries a request to cancel.
	config.ConnConfig.AfterNetConnect = func(_ context.Context, _ *pgconn.Config, conn net.Conn) (net.Conn, error) {
		return conn, conn.SetDeadline(time.Time{})
	}
	config.BeforeClose = func(conn *pgx.Conn) { conn.PgConn().Conn().Close() }
}

// unavailable reports whether err means that the database can't be reached or can't work now, so that the same call
// may succeed later: not reachable, shutting down, starting up, out of connections, a standby, or out of time.
func unavailable(err error) bool {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		switch pg.Code {
		case readOnly, "40001", "40P01", "55P03", "57014", "57P01", "57P02", "57P03", "57P05":
			return true
		}
		return strings.HasPrefix(pg.Code, "08") || strings.HasPrefix(pg.Code, "53") || strings.HasPrefix(pg.Code, "58")
	}
	var connect *pgconn.ConnectError
	var network net.Error
	return errors.As(err, &connect) || errors.As(err, &network) || errors.Is(err, context.DeadlineExceeded) ||
		pgconn.SafeToRetry(err) || errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF)
}
