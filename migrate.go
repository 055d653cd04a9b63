package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// schemaSQL holds every migration. Released migrations never change.
//
//go:embed schema.sql
var schemaSQL string

// grantsSQL grants the role lumiere_service what the program needs.
//
//go:embed grants.sql
var grantsSQL string

// migrationHeader matches the line that begins a migration in schema.sql.
var migrationHeader = regexp.MustCompile(`(?m)^-- step \d+:`)

// migrations returns the migrations of schema.sql in order. Migration n is element n-1.
func migrations() []string {
	starts := migrationHeader.FindAllStringIndex(schemaSQL, -1)
	all := make([]string, len(starts))
	for i, start := range starts {
		end := len(schemaSQL)
		if i+1 < len(starts) {
			end = starts[i+1][0]
		}
		all[i] = schemaSQL[start[0]:end]
	}
	return all
}

// schemaVersion returns the number of the newest migration that the database has, 0 for an empty database.
func (s *store) schemaVersion(ctx context.Context) (version int, err error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	// QueryExecModeExec prepares no statement. On an empty database preparing fails, and a connection pooler would still
	// have the statement's name in use.
	err = s.pool.QueryRow(ctx, `SELECT coalesce(max(step), 0) FROM schema_steps`, pgx.QueryExecModeExec).Scan(&version)
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok && pg.Code == codeUndefinedTable {
		return 0, nil
	}
	return version, err
}

const (
	// migrationLockWait is how long a migration waits for a lock, and then how long it lets others work before it tries
	// again. While it waits, every call that needs the locked table waits behind it. It is shorter than PostgreSQL's
	// deadlock_timeout, so that in a deadlock with a buyer's call it is the migration that fails.
	migrationLockWait = 500 * time.Millisecond
	// migrationTries is how often a migration is tried before migrate fails.
	migrationTries = 10
)

// lockMigrations lets one replica at a time change the schema and its privileges, until its transaction ends.
const lockMigrations = `SELECT pg_advisory_xact_lock(4820561379)`

// migrate applies those of migrations that the database does not have yet, each in a transaction. Replicas that start
// together take turns. A database with more migrations belongs to a newer release and is left as it is.
func (s *store) migrate(ctx context.Context, migrations []string) error {
	version, err := s.schemaVersion(ctx)
	if err != nil {
		return err
	}
	for n := version + 1; n <= len(migrations); n++ {
		if err := s.retryMigration(ctx, n, migrations[n-1]); err != nil {
			return err
		}
	}
	return nil
}

// migrateAll applies those of the program's migrations that the database does not have yet, and grants the service's role what
// the program needs. With a role that may not, it fails when there is something to apply.
func (s *store) migrateAll(ctx context.Context) error {
	older := s.checkSchema(ctx)
	if notAllowed(older) {
		return older
	}
	if older != nil {
		err := s.migrate(ctx, migrations())
		if notAllowed(err) {
			return fmt.Errorf("%w (%w)", older, err)
		}
		if err != nil {
			return err
		}
	}
	return s.grant(ctx)
}

// migrateEmpty is migrateAll for an empty database, and checkSchema for any other.
func (s *store) migrateEmpty(ctx context.Context) error {
	if version, err := s.schemaVersion(ctx); err == nil && version == 0 {
		return s.migrateAll(ctx)
	}
	return s.checkSchema(ctx)
}

// checkSchema returns an error when the schema is older than the program. It changes nothing: a command of a newer build, run
// from a laptop, must not migrate the database of the service.
func (s *store) checkSchema(ctx context.Context) error {
	version, err := s.schemaVersion(ctx)
	if notAllowed(err) {
		return fmt.Errorf("%w: run lumiere migrate first, as the owner of the tables: it grants lumiere_service what it needs", err)
	}
	if newest := len(migrations()); err == nil && version < newest {
		err = fmt.Errorf("its schema is at step %d and this program needs step %d: run lumiere migrate first, as the owner of the tables",
			version, newest)
	}
	return err
}

// grant has the service's role do what grantsSQL says, and no more. It does nothing when there is no such role, when this
// connection's role does not own the tables, or when the database belongs to a newer release, which grants more.
func (s *store) grant(ctx context.Context) error {
	return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, lockMigrations); err != nil {
			return err
		}
		var due bool
		if err := tx.QueryRow(ctx, `
			SELECT pg_has_role(relowner, 'USAGE') AND EXISTS (SELECT FROM pg_roles WHERE rolname = 'lumiere_service')
				AND (SELECT max(step) FROM schema_steps) = $1
			FROM pg_class WHERE oid = 'schema_steps'::regclass`, len(migrations())).Scan(&due); err != nil || !due {
			return err
		}
		_, err := tx.Conn().PgConn().Exec(ctx, grantsSQL).ReadAll() // several statements, so the simple protocol
		return err
	})
}

// notAllowed reports whether err means that the connection's role may not do what it tried.
func notAllowed(err error) bool {
	pg, ok := errors.AsType[*pgconn.PgError](err)
	return ok && pg.Code == codeInsufficientPrivilege
}

// retryMigration applies migration n, and tries again while others hold the locks that it needs.
func (s *store) retryMigration(ctx context.Context, n int, migration string) error {
	for try := 1; ; try++ {
		err := s.applyMigration(ctx, n, migration)
		if err == nil {
			return nil
		}
		if try == migrationTries || !lockedOut(err) {
			return fmt.Errorf("schema step %d: %w", n, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(s.migrationLockWait):
		}
	}
}

// lockedOut reports whether err means that a statement did not get a lock because others held it.
func lockedOut(err error) bool {
	pg, ok := errors.AsType[*pgconn.PgError](err)
	return ok && (pg.Code == codeLockNotAvailable || pg.Code == codeDeadlock)
}

// applyMigration applies migration n in a transaction, unless the database has it already.
func (s *store) applyMigration(ctx context.Context, n int, migration string) error {
	return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, lockMigrations); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `CREATE TABLE IF NOT EXISTS schema_steps (
			step integer CONSTRAINT schema_steps_pkey PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())`); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `INSERT INTO schema_steps (step) VALUES ($1) ON CONFLICT DO NOTHING`, n)
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		if _, err := tx.Exec(ctx, `SELECT set_config('lock_timeout', $1, true)`, fmt.Sprint(s.migrationLockWait.Milliseconds())); err != nil {
			return err
		}
		_, err = tx.Conn().PgConn().Exec(ctx, migration).ReadAll() // several statements, so the simple protocol
		return err
	})
}
