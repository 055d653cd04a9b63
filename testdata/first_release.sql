-- The statements of the first release, word for word: what a replica of it sends, whatever the schema has become since.
-- schema_test.go makes an old database with them, and has them run beside a newer program. The last ones need step 2.

-- name: make incoming
CREATE TEMPORARY TABLE incoming ON COMMIT DROP AS
	SELECT id, artist_id, artist_name, title, image, size, canvas, price, for_sale FROM products WITH NO DATA

-- name: import
INSERT INTO products (id, artist_id, artist_name, title, image, size, canvas, price, for_sale)
	SELECT id, artist_id, artist_name, title, image, size, canvas, price, for_sale FROM incoming ORDER BY id
	ON CONFLICT (id) DO UPDATE SET artist_id = excluded.artist_id, artist_name = excluded.artist_name,
		title = excluded.title, image = excluded.image, size = excluded.size, canvas = excluded.canvas,
		price = excluded.price, for_sale = excluded.for_sale

-- name: read paintings
SELECT p.id, p.artist_id, p.artist_name, p.title, p.image, p.size, p.canvas, p.price, p.for_sale,
		p.order_id IS NOT NULL, coalesce(h.user_id, ''), h.held_until
	FROM products p LEFT JOIN orders h ON h.id = p.order_id AND h.status = -1
	WHERE p.id = ANY($1)

-- name: read orders
SELECT k.buyer, k.admin, o.id, o.user_id, o.number, o.status, o.updated_at, o.paid_at, o.shipping_price, o.total_price,
		o.items, o.delivery_info, o.delivery_details, o.orderer_info
	FROM unnest($1::text[], $2::text[], $3::boolean[]) AS k (id, buyer, admin)
	JOIN orders o ON o.id = k.id AND (o.user_id = k.buyer OR k.admin)
	WHERE o.ended IS NULL

-- name: read latest
SELECT o.id, o.user_id, o.delivery_info, o.delivery_details, o.orderer_info
	FROM unnest($1::text[]) AS k (buyer) CROSS JOIN LATERAL (
		SELECT id, user_id, delivery_info, delivery_details, orderer_info FROM orders
		WHERE user_id = k.buyer AND ended IS NULL ORDER BY created_at DESC, id DESC LIMIT 1) o

-- name: read state
SELECT status, cancelling_since IS NOT NULL FROM orders
	WHERE id = $1 AND (user_id = $2 OR $3) AND ended IS NULL

-- name: announce
SELECT set_config('lumiere.change', $1, true)

-- name: lock buyer
SELECT set_config('lumiere.change', $1, true), pg_advisory_xact_lock(hashtextextended($2, 0))

-- name: lock buyer of
SELECT set_config('lumiere.change', $1, true), pg_advisory_xact_lock(hashtextextended(user_id, 0)) FROM orders WHERE id = $2

-- name: create
WITH asked AS MATERIALIZED (
		SELECT a.n, a.id, a.price AS price_asked, p.price, p.title, p.image, p.artist_name AS artist,
			p.size || '(' || p.canvas || '호)' AS size
		FROM unnest($1::text[], $2::bigint[]) WITH ORDINALITY AS a (id, price, n) LEFT JOIN products p ON p.id = a.id
	), unpaid AS MATERIALIZED (
		SELECT id, product_ids FROM orders WHERE user_id = $4::text AND status = -1 AND ended IS NULL
	), locked AS MATERIALIZED (
		SELECT p.id, p.for_sale FROM products p
		WHERE p.id = ANY($1::text[] || coalesce((SELECT product_ids FROM unpaid), '{}'))
			AND ((p.order_id IS NULL AND p.for_sale) OR p.order_id = (SELECT id FROM unpaid))
		ORDER BY p.id FOR NO KEY UPDATE
	), twin AS (
		SELECT id, product_ids FROM orders WHERE number = $5::text AND user_id = $4 AND ended IS NULL
	), won AS (
		SELECT sum(price) AS price FROM asked
		HAVING NOT EXISTS (SELECT FROM twin) AND bool_and(price = price_asked AND id IN (SELECT id FROM locked WHERE for_sale))
			AND sum(price) + $6::bigint = $7::bigint
	), replaced AS (
		UPDATE orders SET ended = 'replaced', updated_at = $8::timestamptz, next_look_at = $8
		WHERE id = (SELECT id FROM unpaid) AND status = -1 AND ended IS NULL AND EXISTS (SELECT FROM won)
		RETURNING id, product_ids
	), made AS (
		INSERT INTO orders (id, user_id, number, status, created_at, updated_at, held_until, next_look_at, shipping_price,
			total_price, product_ids, items, delivery_info, delivery_details, orderer_info)
		SELECT $3::text, $4, $5, -1, $8, $8, $9::timestamptz, $9, $6, $7, $1,
			(SELECT array_to_json(array_agg(i)) FROM (SELECT image, title, artist, size, price, id AS product FROM asked ORDER BY n) i),
			$10::text::json, $11::text::json, $12::text::json
		FROM won, (SELECT count(*) FROM replaced) AS after_replaced
		RETURNING id
	), moved AS (
		UPDATE products SET order_id = CASE WHEN products.id = ANY($1) THEN made.id END FROM made
		WHERE products.id = ANY($1::text[] || coalesce((SELECT product_ids FROM replaced), '{}'))
	)
	SELECT a.id, coalesce(a.title, ''), a.price IS NOT NULL, a.id IN (SELECT id FROM locked WHERE for_sale), coalesce(a.price, 0),
		coalesce((SELECT id FROM made), ''), coalesce((SELECT id FROM twin), ''), (SELECT product_ids FROM twin)
	FROM asked a ORDER BY a.n

-- name: end unpaid
WITH o AS (
		UPDATE orders SET ended = $2, updated_at = $3, next_look_at = $4 WHERE id = $1 AND status = -1 AND ended IS NULL
		RETURNING id, product_ids), theirs AS (
		SELECT p.id FROM products p JOIN o ON p.id = ANY(o.product_ids) AND p.order_id = o.id ORDER BY p.id FOR NO KEY UPDATE OF p
	), freed AS (
		UPDATE products SET order_id = NULL FROM theirs WHERE products.id = theirs.id
	)
	SELECT id FROM o

-- name: step
UPDATE orders SET status = $3, updated_at = $4
	WHERE id = $1 AND status = $2 AND ended IS NULL AND cancelling_since IS NULL RETURNING id

-- name: read order
SELECT id, status, ended IS NOT NULL, total_price FROM orders WHERE id = $1 FOR NO KEY UPDATE

-- name: read payments
SELECT imp_uid, order_id, state, coalesce(reason, ''), currency = 'KRW', amount, refunded, attempts FROM payments WHERE order_id = $1

-- name: read revivable
WITH o AS (SELECT user_id, number, product_ids FROM orders WHERE id = $1 AND ended IS NOT NULL),
	unpaid AS (SELECT u.id, u.product_ids FROM orders u JOIN o ON u.user_id = o.user_id WHERE u.status = -1 AND u.ended IS NULL),
	locked AS (
		SELECT p.id, p.for_sale AND (p.order_id IS NULL OR p.order_id = (SELECT id FROM unpaid)) AS free
		FROM products p WHERE p.id = ANY((SELECT product_ids FROM o)::text[] || coalesce((SELECT product_ids FROM unpaid), '{}'))
		ORDER BY p.id FOR NO KEY UPDATE)
	SELECT coalesce(bool_and(l.free), false) AND NOT EXISTS (
			SELECT FROM orders x JOIN o ON x.number = o.number AND x.user_id = o.user_id WHERE x.ended IS NULL AND x.status >= 0)
	FROM o JOIN locked l ON l.id = ANY(o.product_ids)

-- name: end other
WITH o AS (
		UPDATE orders u SET ended = 'replaced', updated_at = $2, next_look_at = $2 FROM orders o
		WHERE o.id = $1 AND u.user_id = o.user_id AND u.status = -1 AND u.ended IS NULL
			AND (u.number = o.number OR u.product_ids && o.product_ids)
		RETURNING u.id, u.product_ids), theirs AS (
		SELECT p.id FROM products p JOIN o ON p.id = ANY(o.product_ids) AND p.order_id = o.id ORDER BY p.id FOR NO KEY UPDATE OF p
	), freed AS (
		UPDATE products SET order_id = NULL FROM theirs WHERE products.id = theirs.id
	)
	SELECT id FROM o

-- name: take paintings
UPDATE products p SET order_id = o.id FROM orders o WHERE o.id = $1 AND p.id = ANY(o.product_ids)

-- name: pay
UPDATE orders SET status = 0, ended = NULL, paid_at = $2, updated_at = $2, next_look_at = NULL
	WHERE id = $1 AND status = -1

-- name: book
INSERT INTO payments (imp_uid, order_id, state, reason, currency, amount, refunded, paid_at, created_at, updated_at, attempts, next_attempt_at, leased_until)
	VALUES ($1, $2, $3, nullif($4, ''), $5, $6, $7, $8, $9, $9, 1, $10, $10)
	ON CONFLICT (imp_uid) DO UPDATE SET state = excluded.state, reason = coalesce(payments.reason, excluded.reason),
		refunded = CASE excluded.state WHEN 'refunded' THEN payments.amount ELSE greatest(payments.refunded, excluded.refunded) END,
		updated_at = excluded.updated_at,
		last_error = CASE WHEN excluded.state = 'refunded' THEN NULL ELSE payments.last_error END

-- name: cancel
WITH o AS (
			UPDATE orders SET status = 5, cancelling_since = NULL, updated_at = $2 WHERE id = $1 AND status BETWEEN 0 AND 4
			RETURNING id, product_ids), theirs AS (
		SELECT p.id FROM products p JOIN o ON p.id = ANY(o.product_ids) AND p.order_id = o.id ORDER BY p.id FOR NO KEY UPDATE OF p
	), freed AS (
		UPDATE products SET order_id = NULL FROM theirs WHERE products.id = theirs.id
	)
	SELECT id FROM o

-- name: begin cancel
WITH o AS (
		UPDATE orders SET cancelling_since = $3, updated_at = $3 FROM payments k
		WHERE orders.id = $1 AND orders.status = $2 AND orders.cancelling_since IS NULL AND k.order_id = orders.id AND k.state = 'kept'
		RETURNING orders.id)
	UPDATE payments SET state = 'refunding', reason = $4, updated_at = $3, attempts = 1, next_attempt_at = $5, leased_until = $5
	FROM o WHERE payments.order_id = o.id AND payments.state = 'kept'
	RETURNING imp_uid, order_id, state, coalesce(reason, ''), currency = 'KRW', amount, refunded, attempts

-- name: claim cancel
UPDATE payments SET attempts = attempts + 1, next_attempt_at = $3, leased_until = $3
	WHERE order_id = $1 AND state = 'refunding' AND reason = ANY($4) AND leased_until <= $2
	RETURNING imp_uid, order_id, state, coalesce(reason, ''), currency = 'KRW', amount, refunded, attempts

-- name: claim refunds
UPDATE payments SET attempts = attempts + 1, next_attempt_at = $3, leased_until = $3
	WHERE imp_uid = ANY(ARRAY(
		SELECT imp_uid FROM payments WHERE state = 'refunding' AND next_attempt_at <= $2 AND leased_until <= $2
		ORDER BY next_attempt_at LIMIT $1 FOR UPDATE SKIP LOCKED))
	RETURNING imp_uid, order_id, state, coalesce(reason, ''), currency = 'KRW', amount, refunded, attempts

-- name: refund failed
UPDATE payments SET last_error = $2, updated_at = $3, next_attempt_at = $4, leased_until = $3
	WHERE imp_uid = $1 AND state = 'refunding'

-- name: claim looks
UPDATE orders SET next_look_at = $3
	WHERE id = ANY(ARRAY(
		SELECT id FROM orders WHERE next_look_at <= $2 ORDER BY next_look_at LIMIT $1 FOR UPDATE SKIP LOCKED))
	RETURNING id, status, ended IS NOT NULL, created_at, updated_at, held_until

-- name: set look
UPDATE orders SET next_look_at = $2 WHERE id = $1 AND status = -1

-- name: fold tally
WITH old AS (DELETE FROM order_tally WHERE (SELECT count(*) FROM order_tally) > 100 RETURNING status, n)
	INSERT INTO order_tally SELECT status, sum(n) FROM old GROUP BY status

-- name: list for desk
SELECT o.id, o.user_id, o.number, o.status, o.updated_at, o.paid_at, o.shipping_price, o.total_price,
	o.items, o.delivery_info, o.delivery_details, o.orderer_info, o.orderer_info ->> 'name', o.orderer_info ->> 'email' FROM orders o WHERE status >= 0 ORDER BY created_at DESC, id DESC
		OFFSET $1::bigint LIMIT CASE WHEN $1 < (SELECT coalesce((SELECT sum(n) FROM order_tally), 0)::bigint) THEN $2::bigint ELSE 0 END

-- name: list status for desk
SELECT o.id, o.user_id, o.number, o.status, o.updated_at, o.paid_at, o.shipping_price, o.total_price,
	o.items, o.delivery_info, o.delivery_details, o.orderer_info, o.orderer_info ->> 'name', o.orderer_info ->> 'email' FROM orders o WHERE status = $1 AND status >= 0 ORDER BY created_at DESC, id DESC
		OFFSET $2::bigint LIMIT CASE WHEN $2 < (SELECT coalesce((SELECT sum(n) FROM order_tally WHERE status = $1), 0)::bigint) THEN $3::bigint ELSE 0 END

-- name: list mine
SELECT o.id, o.user_id, o.number, o.status, o.updated_at, o.paid_at, o.shipping_price, o.total_price,
	o.items, o.delivery_info, o.delivery_details, o.orderer_info, o.orderer_info ->> 'name', o.orderer_info ->> 'email' FROM orders o WHERE user_id = $1 AND ended IS NULL
		ORDER BY created_at DESC, id DESC LIMIT $3 OFFSET $2

-- name: count mine
SELECT status, count(*) FROM orders WHERE user_id = $1 AND ended IS NULL GROUP BY status

-- name: read history
SELECT h.at, h.who, coalesce(h.who_id, ''), h.from_status, h.to_status, h.why, coalesce(h.imp_uid, ''), h.amount, coalesce(h.request_id, '')
	FROM orders o JOIN history h ON h.order_id = o.id
	WHERE o.id = $1 AND (o.user_id = $2 OR $3) AND o.ended IS NULL ORDER BY h.id
