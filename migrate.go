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

//go:embed schema.sql
var schemaSQL string

// migrationHeader finds the line that begins a numbered step of schema.sql.
var migrationHeader = regexp.MustCompile(`(?m)^-- step \d+:`)

// migrations are the steps of schema.sql in order; step N is the element N-1.
func migrations() []string {
	starts := migrationHeader.FindAllStringIndex(schemaSQL, -1)
	steps := make([]string, len(starts))
	for i, at := range starts {
		end := len(schemaSQL)
		if i+1 < len(starts) {
			end = starts[i+1][0]
		}
		steps[i] = schemaSQL[at[0]:end]
	}
	return steps
}

// schemaVersion is the number of the newest step that the database has; 0 on an empty one.
func (s *store) schemaVersion(ctx context.Context) (version int, err error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	// Not as a prepared statement: before the first step it fails, and a pooler would keep its name taken.
	err = s.pool.QueryRow(ctx, `SELECT coalesce(max(step), 0) FROM schema_steps`, pgx.QueryExecModeExec).Scan(&version)
	if pg := (*pgconn.PgError)(nil); errors.As(err, &pg) && pg.Code == "42P01" { // undefined_table
		return 0, nil
	}
	return version, err
}

// A step waits this long for a lock, since whoever comes after it waits too, then lets them by and tries again, so many
// times. The wait is shorter than PostgreSQL's deadlock_timeout: of a step and a buyer's call it is the step that gives way.
const (
	migrationLockWait = 500 * time.Millisecond
	migrationTries    = 10
)

// migrate brings the database to these steps, those of schema.sql. Replicas that start together wait for the one that
// came first. A database with more steps than that belongs to a newer program and is left as it is.
func (s *store) migrate(ctx context.Context, steps []string) error {
	version, err := s.schemaVersion(ctx)
	if err != nil {
		return err
	}
	for n := version + 1; n <= len(steps); n++ {
		for try := 1; ; try++ {
			if err = s.applyMigration(ctx, n, steps[n-1]); err == nil {
				break
			} else if try == migrationTries || !lockedOut(err) {
				return fmt.Errorf("schema step %d: %w", n, err)
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(s.migrationLockWait):
			}
		}
	}
	return nil
}

// lockedOut reports whether err means that others had locked what a step needs.
func lockedOut(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && (pg.Code == "55P03" || pg.Code == "40P01") // lock_not_available, deadlock_detected
}

// applyMigration applies step n in a transaction of its own, unless the database has it.
func (s *store) applyMigration(ctx context.Context, n int, step string) error {
	return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(4820561379)`); err != nil {
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
		_, err = tx.Conn().PgConn().Exec(ctx, step).ReadAll()
		return err
	})
}
