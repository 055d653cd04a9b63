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
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
	"github.com/jackc/pgx/v5/pgxpool"
)

// openPool returns a pool of connections to the database at url, without waiting for a connection. The error never contains
// the url, which may hold a password. trace may be nil.
//
// The url may name several servers. The pool uses the first that accepts writes. When that server crashes, hangs, becomes
// unreachable or becomes a standby, the pool moves to the server that accepts writes instead.
func openPool(ctx context.Context, url string, trace pgx.QueryTracer) (*pgxpool.Pool, error) {
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
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
	requireWritableServer(config.ConnConfig)
	closeWithoutWaiting(config)
	config.ConnConfig.BuildContextWatcherHandler = func(c *pgconn.PgConn) ctxwatch.Handler { return statementEnd{c.Conn()} }

	var pool *pgxpool.Pool
	// A connection that was idle for a second is pinged before it is used: its server may have gone away unnoticed.
	config.ShouldPing = func(ctx context.Context, p pgxpool.ShouldPingParams) bool {
		if p.IdleDuration < time.Second {
			return false
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), config.ConnConfig.ConnectTimeout)
		defer cancel()
		if p.Conn.Ping(ctx) != nil {
			pool.Reset() // the other connections go to the same server, and each would cost a timeout
		}
		return p.Conn.IsClosed() // have the pool ping a closed connection: that fails at once, and the pool drops it
	}
	pool, err = pgxpool.NewWithConfig(ctx, config)
	return pool, err
}

// The SQLSTATEs that this program tells apart, from appendix A of PostgreSQL's manual.
const (
	codeReadOnly              = "25006" // read_only_sql_transaction: the server is a standby
	codeSerializationFailure  = "40001"
	codeDeadlock              = "40P01" // deadlock_detected
	codeUndefinedTable        = "42P01"
	codeInsufficientPrivilege = "42501"
	codeLockNotAvailable      = "55P03"
	codeQueryCanceled         = "57014"
	codeAdminShutdown         = "57P01"
	codeCrashShutdown         = "57P02"
	codeCannotConnectNow      = "57P03" // the server is starting up or shutting down
	codeIdleSessionTimeout    = "57P05"
)

// requireWritableServer makes connections skip servers that accept no writes. A connection whose server becomes a standby is
// closed at the first write that fails. A target_session_attrs in the connection string takes precedence.
func requireWritableServer(config *pgx.ConnConfig) {
	if config.ValidateConnect == nil { // no target_session_attrs
		config.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	keep := config.OnPgError // reports whether the connection may be kept
	config.OnPgError = func(c *pgconn.PgConn, err *pgconn.PgError) bool { return err.Code != codeReadOnly && keep(c, err) }
}

// closeWithoutWaiting makes a connection leave the pool at once when it is closed, even if its server does not respond.
// pgx itself sends a cancel request and then reads from the connection for up to 15 seconds, and the connection takes a
// place in the pool until then.
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
	// The deadline is lifted from connections that carry statements. A cancel request has a connection of its own, for which
	// AfterNetConnect is not called: its deadline stays.
	config.ConnConfig.AfterNetConnect = func(_ context.Context, _ *pgconn.Config, conn net.Conn) (net.Conn, error) {
		return conn, conn.SetDeadline(time.Time{})
	}
	config.BeforeClose = func(conn *pgx.Conn) { conn.PgConn().Conn().Close() }
}

// statementEnd is what becomes of a connection when the context of its statement ends. pgx would close it at once, so that
// clients which hang up would cost as many connections.
type statementEnd struct{ conn net.Conn }

// HandleCancel cuts the statement off when the deadline of its context has passed. A statement whose context was cancelled
// before that goes on until then, for dbTimeout at most, and the connection is kept when it ends in time. Without a deadline
// it is cut off at once.
func (e statementEnd) HandleCancel(ctx context.Context) {
	end := time.Now()
	if deadline, ok := ctx.Deadline(); ok {
		end = end.Add(min(time.Until(deadline), dbTimeout))
	}
	e.conn.SetDeadline(end)
}

// HandleUnwatchAfterCancel makes the connection usable again.
func (e statementEnd) HandleUnwatchAfterCancel() { e.conn.SetDeadline(time.Time{}) }

// unavailable reports whether err means that the database cannot be reached or cannot work now, so that the same call may
// succeed later. Timeouts are among these errors.
func unavailable(err error) bool {
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch pg.Code {
		case codeReadOnly, codeSerializationFailure, codeDeadlock, codeLockNotAvailable, codeQueryCanceled,
			codeAdminShutdown, codeCrashShutdown, codeCannotConnectNow, codeIdleSessionTimeout:
			return true
		}
		return strings.HasPrefix(pg.Code, "08") || // connection exception
			strings.HasPrefix(pg.Code, "53") || // insufficient resources
			strings.HasPrefix(pg.Code, "58") // system error
	}
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return true
	}
	if _, ok := errors.AsType[net.Error](err); ok {
		return true
	}
	return errors.Is(err, context.DeadlineExceeded) || pgconn.SafeToRetry(err) ||
		errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF)
}
