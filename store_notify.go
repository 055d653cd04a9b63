package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Statements of notifications. A target is an address that they go to: notify_targets says by what.

// queuedNotification is a row of the history on its way to a target, leased to this replica.
type queuedNotification struct {
	target      string
	orderID     string
	historyID   int64
	attempts    int // that failed
	triedSince  time.Time
	leasedUntil time.Time
	number      string // of the order
	historyRow         // without who, whoID and requestID
}

// claimNotification leases the notification for target that has been due the longest, until the given time. It returns nil when
// none is due. Only the oldest notification of an order is sent. One that waits behind it is put off until that one's time
// comes again; notificationSent and giveUpNotification bring it forward.
func (s *store) claimNotification(ctx context.Context, target string, now, until time.Time) (*queuedNotification, error) {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	for {
		n := &queuedNotification{target: target, leasedUntil: until}
		var isFirst bool
		err := s.pool.QueryRow(ctx, `
			WITH due AS MATERIALIZED (
				SELECT order_id, history_id FROM notifications
				WHERE target = $1 AND due_at <= $2::timestamptz ORDER BY due_at LIMIT 1 FOR UPDATE SKIP LOCKED
			), claimed AS (
				UPDATE notifications n SET
					due_at = CASE WHEN n.history_id = first.history_id THEN $3::timestamptz ELSE greatest(first.due_at, $3) END,
					tried_since = CASE WHEN n.history_id = first.history_id THEN coalesce(n.tried_since, $2) ELSE n.tried_since END
				FROM due CROSS JOIN LATERAL (
					SELECT f.history_id, f.due_at FROM notifications f WHERE f.target = $1 AND f.order_id = due.order_id
					ORDER BY f.history_id LIMIT 1) first
				WHERE n.target = $1 AND n.order_id = due.order_id AND n.history_id = due.history_id
				RETURNING n.order_id, n.history_id, n.attempts, coalesce(n.tried_since, $2) AS tried_since, n.history_id = first.history_id AS is_first
			)
			SELECT c.order_id, c.history_id, c.attempts, c.tried_since, c.is_first,
				o.number, h.at, h.from_status, h.to_status, h.why, coalesce(h.imp_uid, ''), h.amount
			FROM claimed c JOIN orders o ON o.id = c.order_id JOIN history h ON h.order_id = c.order_id AND h.id = c.history_id`,
			target, now, until).Scan(&n.orderID, &n.historyID, &n.attempts, &n.triedSince, &isFirst,
			&n.number, &n.at, &n.from, &n.to, &n.why, &n.impUID, &n.amount)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil, nil
		}
		if err != nil || isFirst {
			return n, err
		}
		// The one in front may have been removed since the statement above began: this one must not wait for nothing.
		err = s.execNotified(ctx, n, `UPDATE notifications n SET due_at = $4
			WHERE target = $1 AND order_id = $2 AND history_id = $3 AND NOT EXISTS (
				SELECT FROM notifications f WHERE f.target = $1 AND f.order_id = $2 AND f.history_id < $3)`, now)
		if err != nil {
			return nil, err
		}
	}
}

// execNotified executes a statement that removes notification n or depends on whether another of its order was removed; $1, $2
// and $3 are its key. Those of one order at one target are executed one after the other.
func (s *store) execNotified(ctx context.Context, n *queuedNotification, sql string, args ...any) error {
	batch := &pgx.Batch{}
	batch.Queue(`SELECT pg_advisory_xact_lock(hashtextextended($1 || $2, 1))`, n.target, n.orderID)
	batch.Queue(sql, append([]any{n.target, n.orderID, n.historyID}, args...)...)
	return s.transact(ctx, batch)
}

// nextIsDue ends a statement that has removed the notification $1, $2, $3: the next one of its order is due at $4.
const nextIsDue = `
	UPDATE notifications SET due_at = least(due_at, $4::timestamptz)
	WHERE target = $1 AND order_id = $2 AND history_id = (
		SELECT min(history_id) FROM notifications WHERE target = $1 AND order_id = $2 AND history_id <> $3)`

// notificationSent removes a notification that its target has got.
func (s *store) notificationSent(ctx context.Context, n *queuedNotification, now time.Time) error {
	return s.execNotified(ctx, n, `WITH sent AS (DELETE FROM notifications WHERE target = $1 AND order_id = $2 AND history_id = $3)`+nextIsDue, now)
}

// postponeNotification notes that an attempt failed and when to try again, unless the lease has run out and another replica has
// it.
func (s *store) postponeNotification(ctx context.Context, n *queuedNotification, next time.Time) error {
	return s.execNotify(ctx, `UPDATE notifications SET attempts = attempts + 1, due_at = $4
		WHERE target = $1 AND order_id = $2 AND history_id = $3 AND due_at = $5`,
		n.target, n.orderID, n.historyID, next, n.leasedUntil)
}

// giveUpNotification removes a notification that its target will never get, and counts it, unless the lease has run out.
func (s *store) giveUpNotification(ctx context.Context, n *queuedNotification, now time.Time) error {
	return s.execNotified(ctx, n, `
		WITH given_up AS (
			DELETE FROM notifications WHERE target = $1 AND order_id = $2 AND history_id = $3 AND due_at = $5 RETURNING target
		), counted AS (
			UPDATE notify_targets SET given_up = given_up + 1 WHERE id IN (SELECT target FROM given_up)
		)`+nextIsDue, now, n.leasedUntil)
}

func (s *store) execNotify(ctx context.Context, sql string, args ...any) error {
	ctx, cancel := context.WithTimeout(ctx, dbTimeout)
	defer cancel()
	_, err := s.pool.Exec(ctx, sql, args...)
	return err
}

// keepNotifyTargets says that the targets are in this replica's configuration: what is written to the history from then on
// waits for them. Targets that no replica has had for unusedFor are forgotten, with what waits for them. What has waited for
// longer than waitAtMost is given up, so that a target which gets nothing does not fill the database. targets are sorted.
//
// The statements are transactions of their own, so that no two of them lock the same rows in opposite orders.
func (s *store) keepNotifyTargets(ctx context.Context, targets []string, now time.Time, unusedFor, waitAtMost time.Duration) error {
	for _, statement := range []struct {
		sql  string
		args []any
	}{
		{`INSERT INTO notify_targets (id, seen_at) SELECT unnest($1::text[]), $2 ON CONFLICT (id) DO UPDATE SET seen_at = EXCLUDED.seen_at`,
			[]any{targets, now}},
		{`DELETE FROM notify_targets WHERE seen_at < $1`, []any{now.Add(-unusedFor)}},
		{`DELETE FROM notifications WHERE target NOT IN (SELECT id FROM notify_targets)`, nil},
		{`WITH given_up AS (DELETE FROM notifications WHERE written_at < $1 RETURNING target)
			UPDATE notify_targets SET given_up = given_up + g.n
			FROM (SELECT target, count(*) AS n FROM given_up GROUP BY target) g WHERE id = g.target`, []any{now.Add(-waitAtMost)}},
	} {
		if err := s.execNotify(ctx, statement.sql, statement.args...); err != nil {
			return fmt.Errorf("keep targets of notifications: %w", err)
		}
	}
	return nil
}

// notifyFigures are what stands open of notifications, for the metrics.
type notifyFigures struct {
	oldest  time.Duration // since the oldest that is not delivered was written
	givenUp int64
}

// readNotifyFigures returns the figures of these targets at now.
func (s *store) readNotifyFigures(ctx context.Context, targets []string, now time.Time) (f notifyFigures, err error) {
	var oldest float64 // seconds
	err = s.pool.QueryRow(ctx, `
		SELECT (SELECT coalesce(greatest(extract(epoch FROM $2::timestamptz - min(written_at)), 0), 0) FROM notifications WHERE target = ANY($1))::float8,
			(SELECT coalesce(sum(given_up), 0) FROM notify_targets WHERE id = ANY($1))::bigint`, targets, now).Scan(&oldest, &f.givenUp)
	f.oldest = seconds(oldest)
	return f, err
}
