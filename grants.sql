-- What the role lumiere_service may do: what the program does, and nothing else. The owner's `lumiere migrate` runs this after the
-- steps of schema.sql, each time, if there is such a role.
--
-- Each table is named twice: nothing that was granted by hand is left, and what the program needs is granted. Columns that never
-- change are in no UPDATE; a lock (FOR UPDATE) needs one column that may. Replicas of the release before still run when this does:
-- what they need is taken away by the release after.

REVOKE ALL ON schema_steps, products, orders, payments, part_refunds, history, status_changes, order_tally, order_counts, order_search, gateway_lists,
	notify_targets, notifications FROM PUBLIC, lumiere_service;

GRANT USAGE ON SCHEMA public TO lumiere_service;
GRANT SELECT ON schema_steps TO lumiere_service;
GRANT SELECT, INSERT, UPDATE (artist_id, artist_name, title, image, size, canvas, price, for_sale, order_id)
	ON products TO lumiere_service;
GRANT SELECT, INSERT, UPDATE (status, ended, cancelling_since, updated_at, paid_at, held_until, next_look_at, confirming_until,
	carrier, parcel_number, erased_at, delivery_info, delivery_details, orderer_info, returning_ids, cancelled_ids)
	ON orders TO lumiere_service;
GRANT SELECT, INSERT, UPDATE (state, reason, refunded, updated_at, attempts, next_attempt_at, leased_until, last_error, refusals,
	refund_account, by_hand, by_hand_amount) ON payments TO lumiere_service;
GRANT SELECT, INSERT, UPDATE (state, updated_at, attempts, refusals, next_attempt_at, leased_until, last_error)
	ON part_refunds TO lumiere_service;
GRANT SELECT, INSERT ON history TO lumiere_service;
GRANT SELECT, INSERT, DELETE ON status_changes, order_tally TO lumiere_service;
GRANT SELECT ON order_counts TO lumiere_service;
GRANT SELECT, INSERT, DELETE, UPDATE (status) ON order_search TO lumiere_service;
GRANT SELECT, INSERT, UPDATE (read_until, leased_until) ON gateway_lists TO lumiere_service;
GRANT SELECT, INSERT, DELETE, UPDATE (seen_at, given_up) ON notify_targets TO lumiere_service;
GRANT SELECT, INSERT, DELETE, UPDATE (due_at, tried_since, attempts) ON notifications TO lumiere_service;
