package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// Names, addresses, telephones, e-mail and free texts are kept as long as the law wants an order's contract and payment kept, and
// no longer. Amounts, paintings, ids and the history stay.

const (
	// keepUnpaid is how long after its end an order that was never paid keeps personal data.
	keepUnpaid = 30 * 24 * time.Hour
	// forgetBatch is how many orders of each kind one round of the reconciler erases at most: a caller who changes one of them
	// meanwhile waits no longer than that takes.
	forgetBatch = 100
)

// forgetDue erases the personal data of some of the orders that have kept it long enough. The others have their turn in the next
// rounds.
func (t *settler) forgetDue(ctx context.Context) error {
	now := t.now()
	erased, err := t.store.eraseDue(ctx, byReconciler, now.Add(-t.keep), now.Add(-keepUnpaid), now, forgetBatch)
	if erased > 0 && err == nil {
		t.log.Info("personal data erased", "orders", erased)
	}
	return err
}

// forgetCommand erases the personal data of an order at a person's wish, and prints that it did.
func forgetCommand(ctx context.Context, c config, order string, out io.Writer) error {
	id, ok := parseID(order)
	if !ok {
		return errors.New("-order must be an order's ObjectId: 24 hex digits")
	}
	return withStore(ctx, &c, (*store).checkSchema, func(store *store) error {
		o, err := store.readOrderData(ctx, id)
		switch {
		case errors.Is(err, errNotFound):
			return fmt.Errorf("there is no order %s", id)
		case err != nil:
			return err
		case o.erasedAt != nil:
			_, err = fmt.Fprintf(out, "the personal data of order %s was erased on %s already\n", id, day(*o.erasedAt))
			return err
		}
		now := time.Now()
		if err := o.mayForget(now, c.keep); err != nil {
			return fmt.Errorf("order %s keeps its personal data: %w", id, err)
		}
		err = store.erase(ctx, actor{kind: actorAdministrator}, o, now)
		if errors.Is(err, errStale) {
			return fmt.Errorf("order %s has just changed: try again", id)
		} else if err != nil {
			return err
		}
		_, err = fmt.Fprintf(out, "the personal data of order %s is erased\n", id)
		return err
	})
}

// mayForget returns why the personal data of an order must stay, nil when it may be erased. A delivered order keeps it for keep
// after its last change.
func (o orderData) mayForget(now time.Time, keep time.Duration) error {
	switch until := o.updatedAt.Add(keep); {
	case o.open:
		return errors.New("a return or refund is not done")
	case o.ended, o.status == statusCancelled, o.status == statusDelivered && !now.Before(until):
		return nil
	case o.status == statusUnpaid:
		return errors.New("it is not paid and has not ended")
	case o.status == statusReturning:
		return errors.New("its return is not done")
	case o.status == statusDelivered:
		return fmt.Errorf("the law has a delivered order kept until %s", day(until))
	default:
		return errors.New("it is not delivered")
	}
}
