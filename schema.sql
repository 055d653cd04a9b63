-- The truth about paintings, orders and money.
--
-- Numbered, forward-only steps. Each is applied once, in order, in a transaction of its own under an advisory lock, by
-- `lumiere migrate`, or by whichever replica starts first if its role owns the tables. What the service's role may do with them
-- is in grants.sql. A released step is never edited: a change is a new step, and one that the program of the step before can
-- live with, since old replicas still run while the new one starts:
-- - It adds. What it replaces is dropped by a later release, when no program is left that uses it, unless the program of the step
--   before is only slower without it. A new column may be null or has a constant default; a new constraint is NOT VALID, and
--   validated by a step after it.
-- - It is short, and changes one busy table. It gets half a second to lock it, a few times: nobody waits behind it for longer.
-- - An index on a big table is CREATE INDEX IF NOT EXISTS here, and before the release the operator runs the same with
--   CONCURRENTLY, which no transaction may and which blocks nobody: the step finds it there. (One that failed half-way is
--   there too, but invalid: drop it first.)

-- step 1: paintings, orders, payments

-- A painting is one of a kind and has one owner by construction: order_id points at the one order that holds or
-- bought it, null means in stock. Nothing else in the database says who has it.
CREATE TABLE products (
	id          text COLLATE "C" NOT NULL CONSTRAINT products_pkey PRIMARY KEY,
	artist_id   text COLLATE "C" NOT NULL,
	artist_name text    NOT NULL,
	title       text    NOT NULL,
	image       text    NOT NULL,
	size        text    NOT NULL, -- "163x131cm"
	canvas      integer NOT NULL, -- 호
	price       bigint  NOT NULL, -- won
	for_sale    boolean NOT NULL, -- false: sold elsewhere, whatever order_id says
	order_id    text COLLATE "C",
	CONSTRAINT products_id_is_objectid CHECK (id ~ '^[0-9a-f]{24}$'),
	CONSTRAINT products_artist_is_objectid CHECK (artist_id ~ '^[0-9a-f]{24}$'),
	CONSTRAINT products_price_is_positive CHECK (price > 0),
	CONSTRAINT products_canvas_is_positive CHECK (canvas > 0)
) WITH (fillfactor = 80); -- order_id changes in place: no index on it, so that a hold is a HOT update

-- An order is a document, written once and read whole; what changes about it are the columns before the documents.
-- An unpaid order that ends stays as a tombstone (ended is not null): to clients it is gone, but money that arrives
-- late for it is recognised.
CREATE TABLE orders (
	id               text COLLATE "C" NOT NULL CONSTRAINT orders_pkey PRIMARY KEY,
	user_id          text COLLATE "C" NOT NULL,
	number           text COLLATE "C" NOT NULL, -- result.id, the browser's
	status           smallint NOT NULL,         -- -1 unpaid, 0 paid, 1 preparing, 2 shipping, 3 delivered, 4 return requested, 5 cancelled
	ended            text,                      -- why an unpaid order is a tombstone
	cancelling_since timestamptz,               -- its whole payment is on the way back
	created_at       timestamptz NOT NULL,
	updated_at       timestamptz NOT NULL,
	paid_at          timestamptz,
	held_until       timestamptz NOT NULL,      -- how long it may stay unpaid
	next_look_at     timestamptz,               -- when to ask the gateway next whether money came; null: no need
	shipping_price   bigint NOT NULL,           -- won
	total_price      bigint NOT NULL,           -- won, shipping included
	product_ids      text[] COLLATE "C" NOT NULL,
	items            json NOT NULL,             -- snapshots of the paintings, as the page prints orderItems
	delivery_info    json NOT NULL,
	delivery_details json,
	orderer_info     json NOT NULL,
	CONSTRAINT orders_id_is_objectid CHECK (id ~ '^[0-9a-f]{24}$'),
	CONSTRAINT orders_user_is_objectid CHECK (user_id ~ '^[0-9a-f]{24}$'),
	CONSTRAINT orders_status_is_known CHECK (status BETWEEN -1 AND 5),
	CONSTRAINT orders_only_unpaid_end CHECK (ended IS NULL OR (status = -1 AND ended IN ('deleted', 'replaced', 'expired'))),
	CONSTRAINT orders_paid_have_a_time CHECK ((status = -1) = (paid_at IS NULL)),
	CONSTRAINT orders_cancelling_are_paid CHECK (cancelling_since IS NULL OR status IN (0, 4)),
	CONSTRAINT orders_have_paintings CHECK (cardinality(product_ids) BETWEEN 1 AND 50),
	CONSTRAINT orders_money_is_whole CHECK (shipping_price >= 0 AND total_price > shipping_price)
) WITH (fillfactor = 85);

-- The number first, so that the desk can look one up without knowing the buyer.
CREATE UNIQUE INDEX orders_number_is_unique_per_buyer ON orders (number, user_id) WHERE ended IS NULL;
CREATE UNIQUE INDEX orders_one_unpaid_per_buyer ON orders (user_id) WHERE status = -1 AND ended IS NULL;
CREATE INDEX orders_by_buyer ON orders (user_id, created_at DESC, id DESC) WHERE ended IS NULL;
CREATE INDEX orders_to_look_at ON orders (next_look_at) WHERE next_look_at IS NOT NULL;

ALTER TABLE products ADD CONSTRAINT products_order_exists FOREIGN KEY (order_id) REFERENCES orders (id);

-- The ledger: every gateway payment that concerns one of our orders, from the moment we know of it.
CREATE TABLE payments (
	imp_uid         text COLLATE "C" NOT NULL CONSTRAINT payments_pkey PRIMARY KEY,
	order_id        text COLLATE "C" NOT NULL CONSTRAINT payments_order_exists REFERENCES orders (id),
	state           text   NOT NULL,
	reason          text,             -- why the money goes back
	currency        text   NOT NULL,
	amount          bigint NOT NULL,  -- won, as first paid; 0 in another currency
	refunded        bigint NOT NULL DEFAULT 0, -- won given back so far
	paid_at         timestamptz,
	created_at      timestamptz NOT NULL,
	updated_at      timestamptz NOT NULL,
	attempts        integer NOT NULL DEFAULT 0, -- of the refund
	next_attempt_at timestamptz, -- of the refund, by the reconciler
	leased_until    timestamptz, -- until then whoever tries the refund is alone
	last_error      text,
	CONSTRAINT payments_state_is_known CHECK (state IN ('kept', 'refunding', 'refunded')),
	CONSTRAINT payments_refund_has_a_reason CHECK ((state = 'kept') = (reason IS NULL)),
	CONSTRAINT payments_refunding_has_a_plan CHECK (state <> 'refunding' OR (next_attempt_at IS NOT NULL AND leased_until IS NOT NULL)),
	CONSTRAINT payments_refund_is_bounded CHECK (refunded BETWEEN 0 AND amount),
	CONSTRAINT payments_refunded_is_whole CHECK (state <> 'refunded' OR refunded = amount),
	CONSTRAINT payments_kept_is_won CHECK (state <> 'kept' OR (currency = 'KRW' AND amount > refunded))
) WITH (fillfactor = 85);

CREATE UNIQUE INDEX payments_one_kept_per_order ON payments (order_id) WHERE state = 'kept';
CREATE INDEX payments_by_order ON payments (order_id);
CREATE INDEX payments_to_refund ON payments (next_attempt_at) WHERE state = 'refunding';

-- Ended states stay ended, whoever asks: a status has only the successors named here.
CREATE FUNCTION orders_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF NOT ((OLD.status = -1 AND NEW.status = 0)
		OR (OLD.status IN (0, 1, 2) AND NEW.status = OLD.status + 1)
		OR (OLD.status IN (0, 1, 2, 3) AND NEW.status = 4)
		OR (OLD.status IN (0, 1, 2, 3, 4) AND NEW.status = 5)) THEN
		RAISE EXCEPTION 'order % cannot go from % to %', OLD.id, OLD.status, NEW.status
			USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_status_may_follow';
	END IF;
	RETURN NEW;
END $$;
CREATE TRIGGER orders_guard BEFORE UPDATE OF status ON orders
	FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION orders_guard();

-- Money that went back, or is on its way, is never kept again; what a payment is never changes.
CREATE FUNCTION payments_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF (OLD.imp_uid, OLD.order_id, OLD.currency, OLD.amount) IS DISTINCT FROM (NEW.imp_uid, NEW.order_id, NEW.currency, NEW.amount)
		OR NEW.refunded < OLD.refunded
		OR (OLD.state, NEW.state) NOT IN (('kept', 'kept'), ('kept', 'refunding'), ('kept', 'refunded'),
			('refunding', 'refunding'), ('refunding', 'refunded')) THEN
		RAISE EXCEPTION 'payment % cannot go from % to %', OLD.imp_uid, OLD.state, NEW.state
			USING ERRCODE = 'check_violation', CONSTRAINT = 'payments_state_may_follow';
	END IF;
	RETURN NEW;
END $$;
CREATE TRIGGER payments_guard BEFORE UPDATE ON payments FOR EACH ROW EXECUTE FUNCTION payments_guard();

-- Orders, payments and their history are the shop's books: nothing leaves them.
CREATE FUNCTION books_keep_everything() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	RAISE EXCEPTION 'rows of % are kept for good', TG_TABLE_NAME
		USING ERRCODE = 'restrict_violation', CONSTRAINT = TG_TABLE_NAME || '_are_kept';
END $$;
CREATE TRIGGER orders_are_kept BEFORE DELETE ON orders FOR EACH ROW EXECUTE FUNCTION books_keep_everything();
CREATE TRIGGER payments_are_kept BEFORE DELETE ON payments FOR EACH ROW EXECUTE FUNCTION books_keep_everything();

-- step 2: the order desk: history, and lists that stay flat

-- Append-only: who did what to an order or its money, written by the database itself for whoever changes them.
CREATE TABLE history (
	id          bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT history_pkey PRIMARY KEY,
	order_id    text COLLATE "C" NOT NULL CONSTRAINT history_order_exists REFERENCES orders (id),
	at          timestamptz NOT NULL,
	who         text NOT NULL, -- buyer, administrator, gateway, reconciler; database: none of them said so
	who_id      text,          -- the administrator's id
	from_status smallint,
	to_status   smallint,
	why         text NOT NULL,
	imp_uid     text,
	amount      bigint,        -- won
	request_id  text
);
CREATE INDEX history_by_order ON history (order_id, id);
CREATE TRIGGER history_is_append_only BEFORE UPDATE OR DELETE ON history
	FOR EACH ROW EXECUTE FUNCTION books_keep_everything();
CREATE TRIGGER history_is_never_emptied BEFORE TRUNCATE ON history
	FOR EACH STATEMENT EXECUTE FUNCTION books_keep_everything();

-- How many orders there are in each paid status, as differences that the reconciler folds together: a page count
-- that neither reads the orders nor makes two payments wait for one counter. The sum by status is always exact.
CREATE TABLE order_tally (
	status smallint NOT NULL,
	n      bigint   NOT NULL
);

CREATE FUNCTION history_note(order_id text, at timestamptz, from_status smallint, to_status smallint, why text, imp_uid text, amount bigint)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
	change json := nullif(current_setting('lumiere.change', true), ''); -- {"who", "id", "request"}, the program's, for this transaction
BEGIN
	INSERT INTO history (order_id, at, who, who_id, from_status, to_status, why, imp_uid, amount, request_id)
	VALUES (order_id, at, coalesce(change ->> 'who', 'database'), change ->> 'id', from_status, to_status, why, imp_uid, amount, change ->> 'request');
END $$;

CREATE FUNCTION orders_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF TG_OP = 'INSERT' THEN
		PERFORM history_note(NEW.id, NEW.created_at, NULL::smallint, NEW.status, 'created', NULL, NULL);
		IF NEW.status >= 0 THEN
			INSERT INTO order_tally VALUES (NEW.status, 1);
		END IF;
		RETURN NULL;
	END IF;
	PERFORM history_note(NEW.id, CASE WHEN NEW.updated_at = OLD.updated_at THEN clock_timestamp() ELSE NEW.updated_at END,
		OLD.status, NEW.status,
		CASE
			WHEN NEW.ended IS NOT NULL AND OLD.ended IS NULL THEN NEW.ended
			WHEN NEW.status = OLD.status THEN 'cancel requested'
			WHEN OLD.ended IS NOT NULL THEN 'revived'
			ELSE (ARRAY['paid', 'preparing', 'shipping', 'delivered', 'return requested', 'cancelled'])[NEW.status + 1]
		END, NULL, NULL);
	IF NEW.status <> OLD.status THEN
		INSERT INTO order_tally SELECT s, n FROM (VALUES (OLD.status, -1), (NEW.status, 1)) t (s, n) WHERE s >= 0;
	END IF;
	RETURN NULL;
END $$;
CREATE TRIGGER orders_history_insert AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION orders_history();
CREATE TRIGGER orders_history_update AFTER UPDATE OF status, ended, cancelling_since ON orders FOR EACH ROW
	WHEN (OLD.status <> NEW.status OR OLD.ended IS DISTINCT FROM NEW.ended
		OR (OLD.cancelling_since IS NULL AND NEW.cancelling_since IS NOT NULL))
	EXECUTE FUNCTION orders_history();

CREATE FUNCTION payments_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM history_note(NEW.order_id, NEW.updated_at, NULL::smallint, NULL::smallint,
		CASE
			WHEN NEW.state = 'kept' AND NEW.refunded > 0 THEN 'partly refunded'
			WHEN NEW.state = 'kept' THEN 'payment kept'
			ELSE NEW.state || ': ' || NEW.reason
		END,
		NEW.imp_uid,
		CASE WHEN NEW.state = 'kept' AND NEW.refunded > 0 THEN NEW.refunded ELSE NEW.amount END);
	RETURN NULL;
END $$;
CREATE TRIGGER payments_history_insert AFTER INSERT ON payments FOR EACH ROW EXECUTE FUNCTION payments_history();
CREATE TRIGGER payments_history_update AFTER UPDATE OF state, refunded ON payments FOR EACH ROW
	WHEN (OLD.state <> NEW.state OR (NEW.state = 'kept' AND OLD.refunded <> NEW.refunded))
	EXECUTE FUNCTION payments_history();

-- The desk's lists: newest first, all that were paid or those of one status.
CREATE INDEX orders_paid_by_age ON orders (created_at DESC, id DESC) WHERE status >= 0;
CREATE INDEX orders_paid_by_status ON orders (status, created_at DESC, id DESC) WHERE status >= 0;

-- What happened before there was a history.
INSERT INTO history (order_id, at, who, to_status, why)
	SELECT id, created_at, 'database', -1, 'created' FROM orders ORDER BY created_at, id;
INSERT INTO history (order_id, at, who, from_status, to_status, why)
	SELECT id, updated_at, 'database', -1, status, coalesce(ended, 'before history was kept') FROM orders
	WHERE status <> -1 OR ended IS NOT NULL ORDER BY updated_at, id;
INSERT INTO order_tally SELECT status, count(*) FROM orders WHERE status >= 0 GROUP BY status;

-- step 3: a live order has its paintings, an order that is over has none

-- Checked when a transaction commits, whatever its statements were: none takes a painting from the order that holds or
-- bought it, pays an order that lacks one, or leaves one with an order that has ended or is cancelled.
CREATE FUNCTION orders_and_paintings_agree() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
	an_order  text;
	paintings text[];
BEGIN
	IF TG_TABLE_NAME = 'products' THEN
		an_order := OLD.order_id;
		paintings := ARRAY[NEW.id];
	ELSE
		an_order := NEW.id;
		paintings := NEW.product_ids;
	END IF;
	IF EXISTS (SELECT FROM orders o JOIN products p ON p.id = ANY(paintings) AND p.id = ANY(o.product_ids)
			WHERE o.id = an_order AND (p.order_id IS NOT DISTINCT FROM o.id) <> (o.ended IS NULL AND o.status < 5)) THEN
		RAISE EXCEPTION 'order % and paintings % do not agree', an_order, paintings
			USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_and_paintings_agree';
	END IF;
	RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER orders_agree_with_paintings AFTER UPDATE OF status, ended ON orders
	DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
	WHEN (OLD.ended IS DISTINCT FROM NEW.ended OR OLD.status < 0 AND NEW.status >= 0 OR NEW.status = 5)
	EXECUTE FUNCTION orders_and_paintings_agree();
CREATE CONSTRAINT TRIGGER paintings_agree_with_orders AFTER UPDATE OF order_id ON products
	DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (OLD.order_id IS NOT NULL AND OLD.order_id IS DISTINCT FROM NEW.order_id)
	EXECUTE FUNCTION orders_and_paintings_agree();

-- A painting that somebody has cannot be forgotten, nor the ledger emptied.
CREATE TRIGGER products_are_kept BEFORE DELETE ON products
	FOR EACH ROW WHEN (OLD.order_id IS NOT NULL) EXECUTE FUNCTION books_keep_everything();
CREATE TRIGGER products_are_never_emptied BEFORE TRUNCATE ON products
	FOR EACH STATEMENT EXECUTE FUNCTION books_keep_everything();
CREATE TRIGGER payments_are_never_emptied BEFORE TRUNCATE ON payments
	FOR EACH STATEMENT EXECUTE FUNCTION books_keep_everything();

-- step 4: what the planner has to know of orders

-- Unpaid orders that have not ended are few, though unpaid ones (tombstones) and ones that have not ended are many.
-- Without this the planner expects those two to meet often, and reads the whole table for them.
CREATE STATISTICS orders_unpaid_are_few (mcv) ON status, ended FROM orders;
ANALYZE orders;

-- step 5: history at less cost

-- Who changes it is the default of a row's who, so that the triggers need not say it: {"who", "id", "request"} of the
-- transaction, which the program sets; database: none of them said so.
-- One index does for the key and for an order's history; an id by itself is never looked for.
CREATE UNIQUE INDEX IF NOT EXISTS history_by_order_and_id ON history (order_id, id);
ALTER TABLE history
	ALTER who SET DEFAULT coalesce(nullif(current_setting('lumiere.change', true), '')::json ->> 'who', 'database'),
	ALTER who_id SET DEFAULT nullif(current_setting('lumiere.change', true), '')::json ->> 'id',
	ALTER request_id SET DEFAULT nullif(current_setting('lumiere.change', true), '')::json ->> 'request',
	DROP CONSTRAINT history_pkey,
	ADD CONSTRAINT history_pkey PRIMARY KEY USING INDEX history_by_order_and_id;
DROP INDEX history_by_order;

CREATE OR REPLACE FUNCTION orders_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF TG_OP = 'INSERT' THEN
		INSERT INTO history (order_id, at, to_status, why) VALUES (NEW.id, NEW.created_at, NEW.status, 'created');
		IF NEW.status >= 0 THEN
			INSERT INTO order_tally VALUES (NEW.status, 1);
		END IF;
		RETURN NULL;
	END IF;
	INSERT INTO history (order_id, at, from_status, to_status, why) VALUES (NEW.id,
		CASE WHEN NEW.updated_at = OLD.updated_at THEN clock_timestamp() ELSE NEW.updated_at END, OLD.status, NEW.status,
		CASE
			WHEN NEW.ended IS NOT NULL AND OLD.ended IS NULL THEN NEW.ended
			WHEN NEW.status = OLD.status THEN 'cancel requested'
			WHEN OLD.ended IS NOT NULL THEN 'revived'
			ELSE (ARRAY['paid', 'preparing', 'shipping', 'delivered', 'return requested', 'cancelled'])[NEW.status + 1]
		END);
	IF NEW.status <> OLD.status THEN
		INSERT INTO order_tally SELECT s, n FROM (VALUES (OLD.status, -1), (NEW.status, 1)) t (s, n) WHERE s >= 0;
	END IF;
	RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION payments_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO history (order_id, at, imp_uid, amount, why) VALUES (NEW.order_id, NEW.updated_at, NEW.imp_uid,
		CASE WHEN NEW.state = 'kept' AND NEW.refunded > 0 THEN NEW.refunded ELSE NEW.amount END,
		CASE
			WHEN NEW.state = 'kept' AND NEW.refunded > 0 THEN 'partly refunded'
			WHEN NEW.state = 'kept' THEN 'payment kept'
			ELSE NEW.state || ': ' || NEW.reason
		END);
	RETURN NULL;
END $$;
DROP FUNCTION history_note;

-- As before, but planned once: an estimate that hung on the number of paintings had it planned at each commit.
CREATE OR REPLACE FUNCTION orders_and_paintings_agree() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
	an_order  text;
	paintings text[];
BEGIN
	IF TG_TABLE_NAME = 'products' THEN
		an_order := OLD.order_id;
		paintings := ARRAY[NEW.id];
	ELSE
		an_order := NEW.id;
		paintings := NEW.product_ids;
	END IF;
	IF EXISTS (SELECT FROM orders o JOIN products p ON p.id = ANY ((SELECT paintings)::text[]) AND p.id = ANY (o.product_ids)
			WHERE o.id = an_order AND (p.order_id IS NOT DISTINCT FROM o.id) <> (o.ended IS NULL AND o.status < 5)) THEN
		RAISE EXCEPTION 'order % and paintings % do not agree', an_order, paintings
			USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_and_paintings_agree';
	END IF;
	RETURN NULL;
END $$;

-- step 6: who holds a painting, from an index as small as the unpaid orders are few

CREATE INDEX IF NOT EXISTS orders_unpaid ON orders (id) INCLUDE (user_id, held_until) WHERE status = -1 AND ended IS NULL;

-- step 7: what an order is never changes, and a status may go one back

-- The first of a buyer's holds that took a painting over from one another began then; null: this one took none over.
-- 'withdrawn' is the end of an unpaid order whose painting the shop took off sale.
ALTER TABLE orders
	ADD COLUMN held_again_since timestamptz,
	DROP CONSTRAINT orders_only_unpaid_end,
	ADD CONSTRAINT orders_only_unpaid_end
		CHECK (ended IS NULL OR (status = -1 AND ended IN ('deleted', 'replaced', 'expired', 'withdrawn'))) NOT VALID;

CREATE OR REPLACE FUNCTION orders_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF NOT ((OLD.status = -1 AND NEW.status = 0)
		OR (OLD.status IN (0, 1, 2) AND NEW.status = OLD.status + 1)
		OR (OLD.status IN (1, 2, 3) AND NEW.status = OLD.status - 1)
		OR (OLD.status IN (0, 1, 2, 3) AND NEW.status = 4)
		OR (OLD.status = 4 AND NEW.status IN (0, 1, 2, 3))
		OR (OLD.status IN (0, 1, 2, 3, 4) AND NEW.status = 5)) THEN
		RAISE EXCEPTION 'order % cannot go from % to %', OLD.id, OLD.status, NEW.status
			USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_status_may_follow';
	END IF;
	RETURN NEW;
END $$;

-- What was ordered, by which buyer, under which number and for how much is written once.
CREATE FUNCTION orders_are_written_once() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	RAISE EXCEPTION 'order % is written once', OLD.id
		USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_are_written_once';
END $$;
CREATE TRIGGER orders_are_written_once
	BEFORE UPDATE OF id, user_id, number, created_at, shipping_price, total_price, product_ids, items ON orders
	FOR EACH ROW WHEN ((OLD.id, OLD.user_id, OLD.number, OLD.created_at, OLD.shipping_price, OLD.total_price, OLD.product_ids, OLD.items::text)
		IS DISTINCT FROM
		(NEW.id, NEW.user_id, NEW.number, NEW.created_at, NEW.shipping_price, NEW.total_price, NEW.product_ids, NEW.items::text))
	EXECUTE FUNCTION orders_are_written_once();
CREATE TRIGGER orders_are_never_emptied BEFORE TRUNCATE ON orders
	FOR EACH STATEMENT EXECUTE FUNCTION books_keep_everything();

-- step 8: refunds that need a person

ALTER TABLE payments
	ADD COLUMN refusals integer NOT NULL DEFAULT 0,          -- times that the gateway answered the refund with a refusal
	ADD COLUMN refund_account json,                          -- where a virtual account's refund goes; gone once the money is back
	ADD COLUMN by_hand text,                                 -- how the rest was paid back other than through the gateway
	ADD COLUMN by_hand_amount bigint NOT NULL DEFAULT 0,     -- won of that, part of refunded
	ADD CONSTRAINT payments_by_hand_are_refunded
		CHECK (by_hand IS NULL AND by_hand_amount = 0
			OR by_hand IS NOT NULL AND by_hand_amount BETWEEN 0 AND refunded AND state = 'refunded') NOT VALID;

-- Money that went back, or is on its way, is never kept again; what a payment is never changes. The account that a refund
-- goes to is forgotten with the refund, whichever release books it.
CREATE OR REPLACE FUNCTION payments_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF (OLD.imp_uid, OLD.order_id, OLD.currency, OLD.amount) IS DISTINCT FROM (NEW.imp_uid, NEW.order_id, NEW.currency, NEW.amount)
		OR NEW.refunded < OLD.refunded
		OR (OLD.state, NEW.state) NOT IN (('kept', 'kept'), ('kept', 'refunding'), ('kept', 'refunded'),
			('refunding', 'refunding'), ('refunding', 'refunded')) THEN
		RAISE EXCEPTION 'payment % cannot go from % to %', OLD.imp_uid, OLD.state, NEW.state
			USING ERRCODE = 'check_violation', CONSTRAINT = 'payments_state_may_follow';
	END IF;
	IF NEW.state = 'refunded' THEN
		NEW.refund_account := NULL;
	END IF;
	RETURN NEW;
END $$;

CREATE OR REPLACE FUNCTION payments_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO history (order_id, at, imp_uid, amount, why) VALUES (NEW.order_id, NEW.updated_at, NEW.imp_uid,
		CASE
			WHEN NEW.by_hand IS NOT NULL THEN NEW.by_hand_amount
			WHEN NEW.state = 'kept' AND NEW.refunded > 0 THEN NEW.refunded
			ELSE NEW.amount
		END,
		CASE
			WHEN NEW.by_hand IS NOT NULL THEN 'refunded by hand: ' || NEW.reason
			WHEN NEW.state = 'kept' AND NEW.refunded > 0 THEN 'partly refunded'
			WHEN NEW.state = 'kept' THEN 'payment kept'
			ELSE NEW.state || ': ' || NEW.reason
		END);
	RETURN NULL;
END $$;

-- step 9: how far the gateway's lists have been read

-- One row for each list: all that moved before read_until is in the books. One replica reads a list at a time.
CREATE TABLE gateway_lists (
	status       text NOT NULL CONSTRAINT gateway_lists_pkey PRIMARY KEY,
	read_until   timestamptz NOT NULL,
	leased_until timestamptz NOT NULL,
	CONSTRAINT gateway_lists_status_is_known CHECK (status IN ('paid', 'cancelled'))
);

-- step 10: a buyer's holds that were begun again and ended, for how long a painting has to be left to others

CREATE INDEX IF NOT EXISTS orders_ended_after_holds ON orders (user_id, updated_at) WHERE ended IS NOT NULL AND held_again_since IS NOT NULL;

-- step 11: whatever statement changes an order, it has what it says

-- Checked when a transaction commits. An order is made unpaid. A live order has all of its paintings; one that is over has
-- none. A paid order has exactly one payment that is kept, or on its way back because the order is being cancelled; it is in
-- won and of the order's total. Any other order keeps none. The reasons are those of cancelReasons in payment.go.
-- The cases up to the first RETURN are the usual ones, each as cheap as it can be; what follows is the rule.
CREATE FUNCTION orders_are_whole() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
	usual boolean := false;
BEGIN
	IF TG_OP = 'INSERT' THEN
		IF NEW.status <> -1 THEN
			RAISE EXCEPTION 'order % is made paid', NEW.id
				USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_are_made_unpaid';
		END IF;
		IF NEW.ended IS NULL THEN
			usual := (SELECT count(*) FROM products p WHERE p.id = ANY ((SELECT NEW.product_ids)::text[]) AND p.order_id = NEW.id) = cardinality(NEW.product_ids);
		END IF;
	ELSIF OLD.ended IS NULL AND NEW.status BETWEEN 0 AND 4 AND NEW.cancelling_since IS NULL THEN
		-- The order was live before and had its paintings; no statement takes one away unseen (paintings_agree_with_orders).
		usual := EXISTS (SELECT FROM payments p WHERE p.order_id = NEW.id AND p.state = 'kept' AND p.currency = 'KRW' AND p.amount = NEW.total_price);
	END IF;
	IF usual THEN
		RETURN NULL;
	END IF;
	IF EXISTS (SELECT FROM orders o WHERE o.id = NEW.id
			AND CASE WHEN o.ended IS NULL AND o.status < 5 THEN cardinality(o.product_ids) ELSE 0 END
				<> (SELECT count(*) FROM products p WHERE p.id = ANY (o.product_ids) AND p.order_id = o.id)) THEN
		RAISE EXCEPTION 'order % and its paintings do not agree', NEW.id
			USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_and_paintings_agree';
	END IF;
	IF EXISTS (SELECT FROM orders o LEFT JOIN payments p ON p.order_id = o.id AND (p.state = 'kept'
				OR p.state = 'refunding' AND o.cancelling_since IS NOT NULL AND p.reason IN ('buyer cancelled', 'shop cancelled'))
			WHERE o.id = NEW.id
			GROUP BY o.id
			HAVING count(p.imp_uid) <> CASE WHEN o.status BETWEEN 0 AND 4 THEN 1 ELSE 0 END
				OR NOT coalesce(bool_and(p.currency = 'KRW' AND p.amount = o.total_price), true)) THEN
		RAISE EXCEPTION 'order % and its payments do not agree', NEW.id
			USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_and_payments_agree';
	END IF;
	RETURN NULL;
END $$;
DROP TRIGGER orders_agree_with_paintings ON orders;
CREATE CONSTRAINT TRIGGER orders_are_whole AFTER INSERT OR UPDATE OF status, ended, cancelling_since ON orders
	DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION orders_are_whole();

-- step 12: a painting is only with a live order that asked for it

-- As in step 3, and when a painting moves from one order to another: the one that has it in the end is live and asked for it.
CREATE OR REPLACE FUNCTION orders_and_paintings_agree() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF EXISTS (SELECT FROM products p JOIN orders o ON o.id = ANY (ARRAY[OLD.order_id, p.order_id])
			WHERE p.id = NEW.id
				AND (p.order_id IS NOT DISTINCT FROM o.id) <> (o.ended IS NULL AND o.status < 5 AND p.id = ANY (o.product_ids))) THEN
		RAISE EXCEPTION 'painting % and its order do not agree', NEW.id
			USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_and_paintings_agree';
	END IF;
	RETURN NULL;
END $$;

-- step 13: a payment is kept for a paid order only

-- The same, seen from a payment. A new one is the usual case: it is kept for a paid order that is not being cancelled.
CREATE FUNCTION payments_agree_with_orders() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF TG_OP = 'INSERT' AND NEW.state <> 'kept' THEN
		RETURN NULL;
	END IF;
	IF TG_OP = 'INSERT' AND NEW.currency = 'KRW' THEN
		IF EXISTS (SELECT FROM orders o WHERE o.id = NEW.order_id AND o.status BETWEEN 0 AND 4 AND o.cancelling_since IS NULL
				AND o.total_price = NEW.amount) THEN
			RETURN NULL;
		END IF;
	END IF;
	IF EXISTS (SELECT FROM orders o LEFT JOIN payments p ON p.order_id = o.id AND (p.state = 'kept'
				OR p.state = 'refunding' AND o.cancelling_since IS NOT NULL AND p.reason IN ('buyer cancelled', 'shop cancelled'))
			WHERE o.id = NEW.order_id
			GROUP BY o.id
			HAVING count(p.imp_uid) <> CASE WHEN o.status BETWEEN 0 AND 4 THEN 1 ELSE 0 END
				OR NOT coalesce(bool_and(p.currency = 'KRW' AND p.amount = o.total_price), true)) THEN
		RAISE EXCEPTION 'payment % and its order do not agree', NEW.imp_uid
			USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_and_payments_agree';
	END IF;
	RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER payments_agree_with_orders AFTER INSERT OR UPDATE OF state ON payments
	DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION payments_agree_with_orders();

-- step 14: old rows are held to what was said above

ALTER TABLE orders VALIDATE CONSTRAINT orders_only_unpaid_end;

-- step 15: the same for payments

ALTER TABLE payments VALIDATE CONSTRAINT payments_by_hand_are_refunded;

-- step 16: which gateway a payment is at

-- imp_uid is its id there: V1's imp_uid, V2's transactionId. Until now there was V1 alone.
ALTER TABLE payments
	ADD COLUMN gateway text NOT NULL DEFAULT 'iamport',
	ADD CONSTRAINT payments_gateway_is_known CHECK (gateway IN ('iamport', 'portone')) NOT VALID;

-- As in step 8, and a payment stays at its gateway.
CREATE OR REPLACE FUNCTION payments_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF (OLD.imp_uid, OLD.gateway, OLD.order_id, OLD.currency, OLD.amount)
			IS DISTINCT FROM (NEW.imp_uid, NEW.gateway, NEW.order_id, NEW.currency, NEW.amount)
		OR NEW.refunded < OLD.refunded
		OR (OLD.state, NEW.state) NOT IN (('kept', 'kept'), ('kept', 'refunding'), ('kept', 'refunded'),
			('refunding', 'refunding'), ('refunding', 'refunded')) THEN
		RAISE EXCEPTION 'payment % cannot go from % to %', OLD.imp_uid, OLD.state, NEW.state
			USING ERRCODE = 'check_violation', CONSTRAINT = 'payments_state_may_follow';
	END IF;
	IF NEW.state = 'refunded' THEN
		NEW.refund_account := NULL;
	END IF;
	RETURN NEW;
END $$;

-- step 17: how far the lists of each gateway have been read

-- The names of V1's lists stay as they were: a program of the step before knows a list by its status alone.
ALTER TABLE gateway_lists
	DROP CONSTRAINT gateway_lists_status_is_known,
	ADD CONSTRAINT gateway_lists_status_is_known CHECK (status IN ('paid', 'cancelled', 'portone paid', 'portone cancelled')) NOT VALID;

-- step 18: old rows are held to what was said above

ALTER TABLE payments VALIDATE CONSTRAINT payments_gateway_is_known;

-- step 19: the same for the lists

ALTER TABLE gateway_lists VALIDATE CONSTRAINT gateway_lists_status_is_known;

-- step 20: an order whose payment is being confirmed

-- Until then a confirmation of the order's payment may be under way at the gateway: the order neither ends nor gets another.
ALTER TABLE orders
	ADD COLUMN confirming_until timestamptz,
	ADD CONSTRAINT orders_confirming_are_unpaid CHECK (confirming_until IS NULL OR status = -1) NOT VALID;

-- As in step 7. The reservation ends with the payment, whichever release books it.
CREATE OR REPLACE FUNCTION orders_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF NOT ((OLD.status = -1 AND NEW.status = 0)
		OR (OLD.status IN (0, 1, 2) AND NEW.status = OLD.status + 1)
		OR (OLD.status IN (1, 2, 3) AND NEW.status = OLD.status - 1)
		OR (OLD.status IN (0, 1, 2, 3) AND NEW.status = 4)
		OR (OLD.status = 4 AND NEW.status IN (0, 1, 2, 3))
		OR (OLD.status IN (0, 1, 2, 3, 4) AND NEW.status = 5)) THEN
		RAISE EXCEPTION 'order % cannot go from % to %', OLD.id, OLD.status, NEW.status
			USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_status_may_follow';
	END IF;
	NEW.confirming_until := NULL;
	RETURN NEW;
END $$;

-- step 21: the same for old rows

ALTER TABLE orders VALIDATE CONSTRAINT orders_confirming_are_unpaid;

-- step 22: parcels

-- When an order left the shop and when it arrived is kept by the database, whichever release moves its status. Both stay with
-- an order whose return is asked for, and are not known of one that was sent before this step.
ALTER TABLE orders
	ADD COLUMN carrier text,             -- the parcel's
	ADD COLUMN parcel_number text,       -- the carrier's for it
	ADD COLUMN shipped_at timestamptz,   -- since when it is in status 2 or further
	ADD COLUMN delivered_at timestamptz, -- since when it is in status 3 or further
	ADD CONSTRAINT orders_parcels_are_whole
		CHECK ((carrier IS NULL) = (parcel_number IS NULL) AND (carrier IS NULL OR shipped_at IS NOT NULL)) NOT VALID,
	ADD CONSTRAINT orders_shipped_have_left CHECK (shipped_at IS NULL OR status >= 2) NOT VALID,
	ADD CONSTRAINT orders_delivered_have_arrived CHECK (delivered_at IS NULL OR status >= 3) NOT VALID;

CREATE FUNCTION orders_shipment() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF NEW.status < 2 THEN
		NEW.carrier := NULL;
		NEW.parcel_number := NULL;
		NEW.shipped_at := NULL;
	ELSIF OLD.status < 2 AND NEW.status = 2 THEN
		NEW.shipped_at := NEW.updated_at;
	ELSIF NEW.carrier IS NOT NULL AND NEW.shipped_at IS NULL THEN -- it was sent before this step
		NEW.shipped_at := coalesce((SELECT at FROM history
			WHERE order_id = NEW.id AND from_status < 2 AND to_status = 2 ORDER BY id DESC LIMIT 1), NEW.updated_at);
	END IF;
	IF NEW.status < 3 THEN
		NEW.delivered_at := NULL;
	ELSIF OLD.status < 3 AND NEW.status = 3 THEN
		NEW.delivered_at := NEW.updated_at;
	END IF;
	RETURN NEW;
END $$;
CREATE TRIGGER orders_shipment BEFORE UPDATE OF status ON orders
	FOR EACH ROW WHEN (OLD.status >= 1 AND NEW.status <= 3) EXECUTE FUNCTION orders_shipment();

-- A parcel that is recorded or corrected without a step. Its number is not said here.
CREATE FUNCTION orders_shipment_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO history (order_id, at, from_status, to_status, why) VALUES (NEW.id, NEW.updated_at, OLD.status, NEW.status,
		CASE WHEN OLD.carrier IS NULL THEN 'shipment recorded' ELSE 'shipment corrected' END);
	RETURN NULL;
END $$;
CREATE TRIGGER orders_shipment_history AFTER UPDATE OF carrier, parcel_number ON orders FOR EACH ROW
	WHEN (OLD.status = NEW.status AND (OLD.carrier, OLD.parcel_number) IS DISTINCT FROM (NEW.carrier, NEW.parcel_number))
	EXECUTE FUNCTION orders_shipment_history();

-- step 23: the same for old rows

ALTER TABLE orders VALIDATE CONSTRAINT orders_parcels_are_whole, VALIDATE CONSTRAINT orders_shipped_have_left,
	VALIDATE CONSTRAINT orders_delivered_have_arrived;

-- step 24: finding a paid order by who ordered or receives it

SELECT normalize(''); -- fails here, and not when the first order is paid, where the database is not in UTF-8

-- Telephones are their digits, e-mail is in lower case, names are in NFC; store_admin.go says the same. An unpaid order is in
-- none of these, so that creating one costs nothing. What is written the same of the receiver as of the orderer is not there
-- twice.
CREATE INDEX IF NOT EXISTS orders_by_orderer_phone
	ON orders ((regexp_replace(orderer_info ->> 'phoneNum', '[^0-9]', '', 'g') COLLATE "C"), created_at DESC, id DESC)
	WHERE status >= 0;
CREATE INDEX IF NOT EXISTS orders_by_receiver_phone
	ON orders ((regexp_replace(delivery_info ->> 'contactNum', '[^0-9]', '', 'g') COLLATE "C"), created_at DESC, id DESC)
	WHERE status >= 0 AND delivery_info ->> 'contactNum' <> orderer_info ->> 'phoneNum';
CREATE INDEX IF NOT EXISTS orders_by_email
	ON orders ((lower((orderer_info ->> 'email') COLLATE "C")), created_at DESC, id DESC)
	WHERE status >= 0;

-- The beginning of a name may be that of a million orders, of which the newest are wanted. These have the orders of each week
-- together, so that a search reads a week at a time and stops when it has enough.
CREATE INDEX IF NOT EXISTS orders_by_orderer_name
	ON orders (status, date_trunc('week', created_at AT TIME ZONE 'UTC'), (left(normalize(orderer_info ->> 'name'), 254) COLLATE "C"))
	WHERE status >= 0;
CREATE INDEX IF NOT EXISTS orders_by_receiver_name
	ON orders (status, date_trunc('week', created_at AT TIME ZONE 'UTC'), (left(normalize(delivery_info ->> 'receiver'), 254) COLLATE "C"))
	WHERE status >= 0 AND delivery_info ->> 'receiver' <> orderer_info ->> 'name';

-- step 25: notifications

-- An address that notifications go to, by the SHA-256 of its URL: the URL may have a secret in it.
CREATE TABLE notify_targets (
	id       text COLLATE "C" NOT NULL CONSTRAINT notify_targets_pkey PRIMARY KEY,
	seen_at  timestamptz NOT NULL, -- when a replica that runs last had it in its configuration
	given_up bigint NOT NULL DEFAULT 0, -- notifications that were never delivered
	CONSTRAINT notify_targets_id_is_a_hash CHECK (id ~ '^[0-9a-f]{64}$'),
	CONSTRAINT notify_targets_given_up_is_a_count CHECK (given_up >= 0)
);

-- A row of the history that a target has not got yet. It commits with its row of the history, so that none is lost in whatever
-- order transactions commit, and is deleted once it is delivered. It has no foreign keys: those would have each order lock the
-- target's row, and the history is never deleted.
CREATE TABLE notifications (
	target      text COLLATE "C" NOT NULL,
	order_id    text COLLATE "C" NOT NULL,
	history_id  bigint NOT NULL,
	written_at  timestamptz NOT NULL,
	due_at      timestamptz NOT NULL, -- while it is being sent: when its replica is taken for dead
	tried_since timestamptz,
	attempts    integer NOT NULL DEFAULT 0,
	CONSTRAINT notifications_pkey PRIMARY KEY (target, order_id, history_id),
	CONSTRAINT notifications_attempts_are_counted CHECK (attempts >= 0 AND (attempts = 0 OR tried_since IS NOT NULL))
);
CREATE INDEX notifications_due ON notifications (target, due_at);

CREATE FUNCTION history_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF EXISTS (SELECT FROM notify_targets) THEN
		INSERT INTO notifications (target, order_id, history_id, written_at, due_at)
			SELECT t.id, NEW.order_id, NEW.id, NEW.at, NEW.at FROM notify_targets t;
	END IF;
	RETURN NULL;
END $$;
CREATE TRIGGER history_notify AFTER INSERT ON history FOR EACH ROW EXECUTE FUNCTION history_notify();

-- step 26: what went back of a refund that is not done has a time

-- As before, and 'partly refunded' is in the history also while a refund waits, and of money that was part back when it was first
-- seen: history tells of each won that went back when that was.
CREATE OR REPLACE FUNCTION payments_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF TG_OP = 'INSERT' OR NEW.state <> OLD.state OR NEW.state = 'kept' THEN
		INSERT INTO history (order_id, at, imp_uid, amount, why) VALUES (NEW.order_id, NEW.updated_at, NEW.imp_uid,
			CASE
				WHEN NEW.by_hand IS NOT NULL THEN NEW.by_hand_amount
				WHEN NEW.state = 'kept' AND NEW.refunded > 0 THEN NEW.refunded
				ELSE NEW.amount
			END,
			CASE
				WHEN NEW.by_hand IS NOT NULL THEN 'refunded by hand: ' || NEW.reason
				WHEN NEW.state = 'kept' AND NEW.refunded > 0 THEN 'partly refunded'
				WHEN NEW.state = 'kept' THEN 'payment kept'
				ELSE NEW.state || ': ' || NEW.reason
			END);
	END IF;
	IF NEW.state = 'refunding' AND NEW.refunded > (CASE TG_OP WHEN 'INSERT' THEN 0 ELSE OLD.refunded END) THEN
		INSERT INTO history (order_id, at, imp_uid, amount, why) VALUES (NEW.order_id, NEW.updated_at, NEW.imp_uid, NEW.refunded, 'partly refunded');
	END IF;
	RETURN NULL;
END $$;
DROP TRIGGER payments_history_update ON payments;
CREATE TRIGGER payments_history_update AFTER UPDATE OF state, refunded ON payments FOR EACH ROW
	WHEN (OLD.state <> NEW.state OR OLD.refunded <> NEW.refunded)
	EXECUTE FUNCTION payments_history();
INSERT INTO history (order_id, at, imp_uid, amount, why)
	SELECT order_id, updated_at, imp_uid, refunded, 'partly refunded' FROM payments p
	WHERE state = 'refunding' AND refunded > 0 AND NOT EXISTS (SELECT FROM history h
		WHERE h.order_id = p.order_id AND h.imp_uid = p.imp_uid AND h.why = 'partly refunded' AND h.amount = p.refunded);

-- step 27: personal data ends

-- When the names, addresses, telephones, e-mail and free texts of an order were erased. They never come back, and nothing else
-- changes them. Before the release the operator adds the column, too, for the indexes of the next steps.
ALTER TABLE orders
	ADD COLUMN IF NOT EXISTS erased_at timestamptz,
	ADD CONSTRAINT orders_erased_are_over CHECK (erased_at IS NULL OR ended IS NOT NULL OR status >= 3) NOT VALID,
	ADD CONSTRAINT orders_erased_are_empty CHECK (erased_at IS NULL
		OR delivery_info::text = '{"address":"","detailedAddress":"","receiver":"","contactNum":""}'
		AND delivery_details IS NOT NULL AND delivery_details::text = '{"receiveAt":"","requestedTerms":""}'
		AND orderer_info::text = '{"name":"","phoneNum":"","email":"","refundTerms":""}') NOT VALID;
CREATE TRIGGER orders_texts_are_written_once
	BEFORE UPDATE OF delivery_info, delivery_details, orderer_info, erased_at ON orders
	FOR EACH ROW WHEN ((OLD.delivery_info::text, OLD.delivery_details::text, OLD.orderer_info::text, OLD.erased_at)
		IS DISTINCT FROM
		(NEW.delivery_info::text, NEW.delivery_details::text, NEW.orderer_info::text, NEW.erased_at)
		AND NOT (OLD.erased_at IS NULL AND NEW.erased_at IS NOT NULL))
	EXECUTE FUNCTION orders_are_written_once();

CREATE FUNCTION orders_erasure_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO history (order_id, at, why) VALUES (NEW.id, NEW.erased_at, 'personal data erased');
	RETURN NULL;
END $$;
CREATE TRIGGER orders_erasure_history AFTER UPDATE OF erased_at ON orders FOR EACH ROW
	WHEN (OLD.erased_at IS NULL AND NEW.erased_at IS NOT NULL) EXECUTE FUNCTION orders_erasure_history();

-- step 28: what was paid back by hand is forgotten with its order

-- As before. Of a payment that went back only the text may still be erased, and one that goes back by hand once its order's
-- data is erased keeps none.
CREATE OR REPLACE FUNCTION payments_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF (OLD.imp_uid, OLD.gateway, OLD.order_id, OLD.currency, OLD.amount)
			IS DISTINCT FROM (NEW.imp_uid, NEW.gateway, NEW.order_id, NEW.currency, NEW.amount)
		OR NEW.refunded < OLD.refunded
		OR (OLD.state, NEW.state) NOT IN (('kept', 'kept'), ('kept', 'refunding'), ('kept', 'refunded'),
			('refunding', 'refunding'), ('refunding', 'refunded'))
			AND NOT (OLD.state = 'refunded' AND OLD.by_hand IS NOT NULL AND to_jsonb(OLD) || '{"by_hand": ""}' = to_jsonb(NEW)) THEN
		RAISE EXCEPTION 'payment % cannot go from % to %', OLD.imp_uid, OLD.state, NEW.state
			USING ERRCODE = 'check_violation', CONSTRAINT = 'payments_state_may_follow';
	END IF;
	IF NEW.state = 'refunded' THEN
		NEW.refund_account := NULL;
	END IF;
	IF NEW.by_hand <> '' AND EXISTS (SELECT FROM orders WHERE id = NEW.order_id AND erased_at IS NOT NULL) THEN
		NEW.by_hand := '';
	END IF;
	RETURN NEW;
END $$;

-- step 29: which paid orders are to be erased next

CREATE INDEX IF NOT EXISTS orders_paid_to_erase ON orders (updated_at) WHERE erased_at IS NULL AND status IN (3, 5);

-- step 30: the same for orders that ended unpaid

CREATE INDEX IF NOT EXISTS orders_ended_to_erase ON orders (updated_at) WHERE erased_at IS NULL AND ended IS NOT NULL;

-- step 31: old rows are held to what was said above

ALTER TABLE orders VALIDATE CONSTRAINT orders_erased_are_over;
ALTER TABLE orders VALIDATE CONSTRAINT orders_erased_are_empty;

-- step 32: what the history says of single paintings

ALTER TABLE history ADD COLUMN product_ids text[] COLLATE "C"; -- the paintings that a row is about; null: the whole order

-- step 33: single paintings of an order

-- The paintings whose return was asked for, and those that were cancelled, while others of the order are left. Once all that
-- are left were asked back, the status says so (4) and the list is empty.
ALTER TABLE orders
	ADD COLUMN returning_ids text[] COLLATE "C" NOT NULL DEFAULT '{}',
	ADD COLUMN cancelled_ids text[] COLLATE "C" NOT NULL DEFAULT '{}',
	ADD CONSTRAINT orders_parts_are_theirs
		CHECK (returning_ids || cancelled_ids <@ product_ids AND NOT returning_ids && cancelled_ids) NOT VALID,
	ADD CONSTRAINT orders_have_paintings_left
		CHECK (cardinality(returning_ids) + cardinality(cancelled_ids) < cardinality(product_ids)) NOT VALID,
	ADD CONSTRAINT orders_parts_are_paid
		CHECK ((cardinality(returning_ids) = 0 OR status BETWEEN 0 AND 3) AND (cardinality(cancelled_ids) = 0 OR status >= 0)) NOT VALID,
	DROP CONSTRAINT orders_cancelling_are_paid, -- a part may go back at 1, 2 and 3, too
	ADD CONSTRAINT orders_cancelling_are_paid CHECK (cancelling_since IS NULL OR status BETWEEN 0 AND 4) NOT VALID;

CREATE OR REPLACE FUNCTION orders_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF NOT ((OLD.status = -1 AND NEW.status = 0)
		OR (OLD.status IN (0, 1, 2) AND NEW.status = OLD.status + 1)
		OR (OLD.status IN (1, 2, 3) AND NEW.status = OLD.status - 1)
		OR (OLD.status IN (0, 1, 2, 3) AND NEW.status = 4)
		OR (OLD.status = 4 AND NEW.status IN (0, 1, 2, 3))
		OR (OLD.status IN (0, 1, 2, 3, 4) AND NEW.status = 5)) THEN
		RAISE EXCEPTION 'order % cannot go from % to %', OLD.id, OLD.status, NEW.status
			USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_status_may_follow';
	END IF;
	NEW.confirming_until := NULL;
	IF NEW.status > 3 THEN
		NEW.returning_ids := '{}'; -- whichever release writes it: the status says it of all that are left
	END IF;
	RETURN NEW;
END $$;

-- Which paintings' return was asked for, or is no longer, while others of the order are left. That some were cancelled is
-- written with their refund.
CREATE FUNCTION orders_parts_history() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
	before text[] := CASE WHEN OLD.status = 4 THEN OLD.product_ids ELSE OLD.returning_ids END;
	asked  text[] := ARRAY(SELECT i FROM unnest(NEW.returning_ids) AS i WHERE i <> ALL (before));
	back   text[] := ARRAY(SELECT i FROM unnest(before) AS i WHERE i <> ALL (NEW.returning_ids || NEW.cancelled_ids));
BEGIN
	INSERT INTO history (order_id, at, why, product_ids)
		SELECT NEW.id, NEW.updated_at, why, ids
		FROM (VALUES ('part return requested', asked), ('part return withdrawn', back)) AS v (why, ids) WHERE cardinality(ids) > 0;
	RETURN NULL;
END $$;
CREATE TRIGGER orders_parts_history AFTER UPDATE OF returning_ids ON orders FOR EACH ROW
	WHEN (NEW.status BETWEEN 0 AND 3 AND OLD.returning_ids <> NEW.returning_ids AND OLD.cancelled_ids = NEW.cancelled_ids)
	EXECUTE FUNCTION orders_parts_history();

-- step 34: refunds of a part of a payment

-- A refund of some of an order's paintings, booked before the gateway is asked for exactly that amount. The reason given to the
-- gateway has the id, so that the gateway's own list of refunds tells ours from those made in its console. What went back of a
-- payment in all, by whomever, is its row's refunded.
CREATE TABLE part_refunds (
	id               text COLLATE "C" NOT NULL CONSTRAINT part_refunds_pkey PRIMARY KEY,
	imp_uid          text COLLATE "C" NOT NULL CONSTRAINT part_refunds_payment_exists REFERENCES payments (imp_uid),
	order_id         text COLLATE "C" NOT NULL,
	product_ids      text[] COLLATE "C" NOT NULL,
	amount           bigint NOT NULL, -- won
	remaining_before bigint NOT NULL, -- won of the payment that had not gone back when this was booked
	reason           text   NOT NULL,
	state            text   NOT NULL,
	created_at       timestamptz NOT NULL,
	updated_at       timestamptz NOT NULL,
	attempts         integer NOT NULL DEFAULT 1,
	refusals         integer NOT NULL DEFAULT 0, -- times that the gateway answered with a refusal
	next_attempt_at  timestamptz NOT NULL,       -- by the reconciler
	leased_until     timestamptz NOT NULL,       -- until then whoever tries it is alone
	last_error       text,
	CONSTRAINT part_refunds_id_is_objectid CHECK (id ~ '^[0-9a-f]{24}$'),
	CONSTRAINT part_refunds_have_paintings CHECK (cardinality(product_ids) > 0),
	CONSTRAINT part_refunds_are_positive CHECK (amount > 0 AND remaining_before > 0),
	CONSTRAINT part_refunds_state_is_known CHECK (state IN ('booked', 'done', 'undone'))
);
CREATE UNIQUE INDEX part_refunds_one_booked_per_payment ON part_refunds (imp_uid) WHERE state = 'booked';
CREATE INDEX part_refunds_by_payment ON part_refunds (imp_uid);
CREATE INDEX part_refunds_by_order ON part_refunds (order_id);
CREATE INDEX part_refunds_to_do ON part_refunds (next_attempt_at) WHERE state = 'booked';
CREATE TRIGGER part_refunds_are_kept BEFORE DELETE ON part_refunds FOR EACH ROW EXECUTE FUNCTION books_keep_everything();
CREATE TRIGGER part_refunds_are_never_emptied BEFORE TRUNCATE ON part_refunds
	FOR EACH STATEMENT EXECUTE FUNCTION books_keep_everything();

-- What a part refund is never changes, and it ends once.
CREATE FUNCTION part_refunds_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF (OLD.id, OLD.imp_uid, OLD.order_id, OLD.product_ids, OLD.amount, OLD.remaining_before)
			IS DISTINCT FROM (NEW.id, NEW.imp_uid, NEW.order_id, NEW.product_ids, NEW.amount, NEW.remaining_before)
		OR OLD.state <> 'booked' AND NEW.state <> OLD.state THEN
		RAISE EXCEPTION 'part refund % cannot go from % to %', OLD.id, OLD.state, NEW.state
			USING ERRCODE = 'check_violation', CONSTRAINT = 'part_refunds_state_may_follow';
	END IF;
	RETURN NEW;
END $$;
CREATE TRIGGER part_refunds_guard BEFORE UPDATE ON part_refunds FOR EACH ROW EXECUTE FUNCTION part_refunds_guard();

-- One that ends because the whole payment went back is not worth a row: the order's says it.
CREATE FUNCTION part_refunds_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF NEW.state <> 'undone' OR EXISTS (SELECT FROM payments p WHERE p.imp_uid = NEW.imp_uid AND p.state = 'kept') THEN
		INSERT INTO history (order_id, at, why, product_ids, imp_uid, amount) VALUES (NEW.order_id, NEW.updated_at,
			CASE NEW.state WHEN 'booked' THEN 'part cancel requested' WHEN 'done' THEN 'part cancelled' ELSE 'refund refused' END,
			NEW.product_ids, NEW.imp_uid, NEW.amount);
	END IF;
	RETURN NULL;
END $$;
CREATE TRIGGER part_refunds_history_insert AFTER INSERT ON part_refunds FOR EACH ROW EXECUTE FUNCTION part_refunds_history();
CREATE TRIGGER part_refunds_history_update AFTER UPDATE OF state ON part_refunds FOR EACH ROW
	WHEN (OLD.state <> NEW.state) EXECUTE FUNCTION part_refunds_history();

CREATE OR REPLACE FUNCTION orders_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF TG_OP = 'INSERT' THEN
		INSERT INTO history (order_id, at, to_status, why) VALUES (NEW.id, NEW.created_at, NEW.status, 'created');
		IF NEW.status >= 0 THEN
			INSERT INTO order_tally VALUES (NEW.status, 1);
		END IF;
		RETURN NULL;
	END IF;
	IF NEW.status = OLD.status AND NEW.status >= 0 THEN
		IF EXISTS (SELECT FROM part_refunds r WHERE r.order_id = NEW.id AND r.state = 'booked') THEN
			RETURN NULL; -- its row says what is cancelled
		END IF;
	END IF;
	INSERT INTO history (order_id, at, from_status, to_status, why) VALUES (NEW.id,
		CASE WHEN NEW.updated_at = OLD.updated_at THEN clock_timestamp() ELSE NEW.updated_at END, OLD.status, NEW.status,
		CASE
			WHEN NEW.ended IS NOT NULL AND OLD.ended IS NULL THEN NEW.ended
			WHEN NEW.status = OLD.status THEN 'cancel requested'
			WHEN OLD.ended IS NOT NULL THEN 'revived'
			ELSE (ARRAY['paid', 'preparing', 'shipping', 'delivered', 'return requested', 'cancelled'])[NEW.status + 1]
		END);
	IF NEW.status <> OLD.status THEN
		INSERT INTO order_tally SELECT s, n FROM (VALUES (OLD.status, -1), (NEW.status, 1)) t (s, n) WHERE s >= 0;
	END IF;
	RETURN NULL;
END $$;

-- orders_parts_agree says whether an order and its part refunds agree: the paintings that are cancelled are those that were
-- refunded; each refund is of the prices of its paintings; while something is left, what was taken less what we gave back is the
-- price of what is left and the shipping; and one that is under way is of paintings that are left, of a payment that is kept.
CREATE FUNCTION orders_parts_agree(an_order text) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
	RETURN (SELECT coalesce(bool_and(
		coalesce((SELECT array_agg(i ORDER BY i) FROM part_refunds r CROSS JOIN unnest(r.product_ids) AS i
				WHERE r.order_id = o.id AND r.state = 'done'), '{}')
			= coalesce((SELECT array_agg(i ORDER BY i) FROM unnest(o.cancelled_ids) AS i), '{}')
		AND NOT EXISTS (SELECT FROM part_refunds r WHERE r.order_id = o.id AND r.state <> 'undone' AND r.amount IS DISTINCT FROM
				(SELECT sum((i ->> 'price')::bigint) FROM json_array_elements(o.items) AS i WHERE i ->> 'product' = ANY (r.product_ids)))
		AND (o.status NOT BETWEEN 0 AND 4 OR o.total_price - coalesce((SELECT sum(r.amount) FROM part_refunds r
				WHERE r.order_id = o.id AND r.state = 'done'), 0)
			= o.shipping_price + (SELECT sum((i ->> 'price')::bigint) FROM json_array_elements(o.items) AS i
				WHERE i ->> 'product' <> ALL (o.cancelled_ids)))
		AND NOT EXISTS (SELECT FROM part_refunds r JOIN payments p ON p.imp_uid = r.imp_uid
			WHERE r.order_id = o.id AND (p.order_id <> o.id
				OR r.state = 'booked' AND o.status BETWEEN 0 AND 4 AND (p.state <> 'kept' OR o.cancelling_since IS NULL
					OR r.product_ids && o.cancelled_ids OR NOT r.product_ids <@ o.product_ids)))
		AND NOT EXISTS (SELECT FROM payments p WHERE p.order_id = o.id AND p.refunded
			< (SELECT coalesce(sum(r.amount), 0) FROM part_refunds r WHERE r.imp_uid = p.imp_uid AND r.state = 'done'))), true)
	FROM orders o WHERE o.id = an_order);
END $$;

CREATE FUNCTION orders_and_parts_agree() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF NOT orders_parts_agree(NEW.order_id) THEN
		RAISE EXCEPTION 'order % and its part refunds do not agree', NEW.order_id
			USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_and_parts_agree';
	END IF;
	RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER part_refunds_agree_with_orders AFTER INSERT OR UPDATE OF state ON part_refunds
	DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION orders_and_parts_agree();

-- As in step 11, of the paintings that are left. An order of which nothing was cancelled costs no more than before.
CREATE OR REPLACE FUNCTION orders_are_whole() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
	usual boolean := false;
BEGIN
	IF TG_OP = 'INSERT' THEN
		IF NEW.status <> -1 THEN
			RAISE EXCEPTION 'order % is made paid', NEW.id
				USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_are_made_unpaid';
		END IF;
		IF NEW.ended IS NULL THEN
			usual := (SELECT count(*) FROM products p WHERE p.id = ANY ((SELECT NEW.product_ids)::text[]) AND p.order_id = NEW.id) = cardinality(NEW.product_ids);
		END IF;
	ELSIF OLD.ended IS NULL AND NEW.status BETWEEN 0 AND 4 AND OLD.cancelling_since IS NULL AND NEW.cancelling_since IS NULL
		AND OLD.cancelled_ids = '{}' AND NEW.cancelled_ids = '{}' THEN
		-- The order was live before and had its paintings; no statement takes one away unseen (paintings_agree_with_orders).
		usual := EXISTS (SELECT FROM payments p WHERE p.order_id = NEW.id AND p.state = 'kept' AND p.currency = 'KRW' AND p.amount = NEW.total_price);
	END IF;
	IF usual THEN
		RETURN NULL;
	END IF;
	IF EXISTS (SELECT FROM orders o CROSS JOIN LATERAL (
				SELECT count(*) AS n, count(*) FILTER (WHERE p.id = ANY (o.cancelled_ids)) AS cancelled
				FROM products p WHERE p.id = ANY (o.product_ids) AND p.order_id = o.id) AS held
			WHERE o.id = NEW.id AND (held.cancelled > 0 OR held.n <>
				CASE WHEN o.ended IS NULL AND o.status < 5 THEN cardinality(o.product_ids) - cardinality(o.cancelled_ids) ELSE 0 END)) THEN
		RAISE EXCEPTION 'order % and its paintings do not agree', NEW.id
			USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_and_paintings_agree';
	END IF;
	IF EXISTS (SELECT FROM orders o LEFT JOIN payments p ON p.order_id = o.id AND (p.state = 'kept'
				OR p.state = 'refunding' AND o.cancelling_since IS NOT NULL AND p.reason IN ('buyer cancelled', 'shop cancelled'))
			WHERE o.id = NEW.id
			GROUP BY o.id
			HAVING count(p.imp_uid) <> CASE WHEN o.status BETWEEN 0 AND 4 THEN 1 ELSE 0 END
				OR NOT coalesce(bool_and(p.currency = 'KRW' AND p.amount = o.total_price), true)) THEN
		RAISE EXCEPTION 'order % and its payments do not agree', NEW.id
			USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_and_payments_agree';
	END IF;
	IF NEW.cancelled_ids <> '{}' OR EXISTS (SELECT FROM part_refunds r WHERE r.order_id = NEW.id) THEN
		IF NOT orders_parts_agree(NEW.id) THEN
			RAISE EXCEPTION 'order % and its part refunds do not agree', NEW.id
				USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_and_parts_agree';
		END IF;
	END IF;
	RETURN NULL;
END $$;

-- step 35: an order's parts are checked with the order

-- As in step 12: a painting that was cancelled is not with its order any more.
CREATE OR REPLACE FUNCTION orders_and_paintings_agree() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF EXISTS (SELECT FROM products p JOIN orders o ON o.id = ANY (ARRAY[OLD.order_id, p.order_id])
			WHERE p.id = NEW.id
				AND (p.order_id IS NOT DISTINCT FROM o.id)
					<> (o.ended IS NULL AND o.status < 5 AND p.id = ANY (o.product_ids) AND p.id <> ALL (o.cancelled_ids))) THEN
		RAISE EXCEPTION 'painting % and its order do not agree', NEW.id
			USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_and_paintings_agree';
	END IF;
	RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER orders_parts_are_whole AFTER UPDATE OF returning_ids, cancelled_ids ON orders
	DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (OLD.cancelled_ids <> NEW.cancelled_ids)
	EXECUTE FUNCTION orders_are_whole();

-- step 36: old rows are held to what was said above

ALTER TABLE orders
	VALIDATE CONSTRAINT orders_parts_are_theirs,
	VALIDATE CONSTRAINT orders_have_paintings_left,
	VALIDATE CONSTRAINT orders_parts_are_paid,
	VALIDATE CONSTRAINT orders_cancelling_are_paid;

-- step 37: what holds of each row of orders, in one function

-- PostgreSQL reads and prepares each CHECK anew in every statement that writes to its table, and orders had seventeen: with those
-- of payments a sixth of what a payment cost. A function is prepared once in a session. The rules are those of the steps before,
-- each under its name. A step that replaces the function adds the constraint anew, too, and has it validated: PostgreSQL does not
-- look at old rows when a function changes.
CREATE FUNCTION orders_row_holds(o orders) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
	broken text := CASE
		WHEN NOT o.id ~ '^[0-9a-f]{24}$' THEN 'orders_id_is_objectid'
		WHEN NOT o.user_id ~ '^[0-9a-f]{24}$' THEN 'orders_user_is_objectid'
		WHEN NOT o.status BETWEEN -1 AND 5 THEN 'orders_status_is_known'
		WHEN (o.status = -1) <> (o.paid_at IS NULL) THEN 'orders_paid_have_a_time'
		WHEN NOT cardinality(o.product_ids) BETWEEN 1 AND 50 THEN 'orders_have_paintings'
		WHEN NOT (o.shipping_price >= 0 AND o.total_price > o.shipping_price) THEN 'orders_money_is_whole'
	END;
BEGIN
	IF num_nonnulls(o.ended, o.cancelling_since, o.confirming_until, o.carrier, o.parcel_number, o.shipped_at, o.delivered_at, o.erased_at) > 0 THEN
		broken := CASE
			WHEN broken IS NOT NULL THEN broken
			WHEN o.ended IS NOT NULL AND NOT (o.status = -1 AND o.ended IN ('deleted', 'replaced', 'expired', 'withdrawn')) THEN 'orders_only_unpaid_end'
			WHEN o.cancelling_since IS NOT NULL AND NOT o.status BETWEEN 0 AND 4 THEN 'orders_cancelling_are_paid'
			WHEN o.confirming_until IS NOT NULL AND o.status <> -1 THEN 'orders_confirming_are_unpaid'
			WHEN (o.carrier IS NULL) <> (o.parcel_number IS NULL) OR o.carrier IS NOT NULL AND o.shipped_at IS NULL THEN 'orders_parcels_are_whole'
			WHEN o.shipped_at IS NOT NULL AND o.status < 2 THEN 'orders_shipped_have_left'
			WHEN o.delivered_at IS NOT NULL AND o.status < 3 THEN 'orders_delivered_have_arrived'
			WHEN o.erased_at IS NOT NULL AND o.ended IS NULL AND o.status < 3 THEN 'orders_erased_are_over'
			WHEN o.erased_at IS NOT NULL AND NOT (
				o.delivery_info::text = '{"address":"","detailedAddress":"","receiver":"","contactNum":""}'
				AND o.delivery_details IS NOT NULL AND o.delivery_details::text = '{"receiveAt":"","requestedTerms":""}'
				AND o.orderer_info::text = '{"name":"","phoneNum":"","email":"","refundTerms":""}') THEN 'orders_erased_are_empty'
		END;
	END IF;
	IF cardinality(o.returning_ids) + cardinality(o.cancelled_ids) > 0 THEN
		broken := CASE
			WHEN broken IS NOT NULL THEN broken
			WHEN NOT (o.returning_ids || o.cancelled_ids <@ o.product_ids AND NOT o.returning_ids && o.cancelled_ids) THEN 'orders_parts_are_theirs'
			WHEN NOT cardinality(o.returning_ids) + cardinality(o.cancelled_ids) < cardinality(o.product_ids) THEN 'orders_have_paintings_left'
			WHEN o.returning_ids <> '{}' AND NOT o.status BETWEEN 0 AND 3 OR o.status < 0 THEN 'orders_parts_are_paid'
		END;
	END IF;
	IF broken IS NOT NULL THEN
		RAISE EXCEPTION 'order % cannot be as it is to be written', o.id
			USING ERRCODE = 'check_violation', TABLE = 'orders', CONSTRAINT = broken;
	END IF;
	RETURN true;
END $$;
ALTER TABLE orders ADD CONSTRAINT orders_row_holds CHECK (orders_row_holds(orders)) NOT VALID;

-- step 38: the same of payments

CREATE FUNCTION payments_row_holds(p payments) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
	broken text := CASE
		WHEN p.state NOT IN ('kept', 'refunding', 'refunded') THEN 'payments_state_is_known'
		WHEN p.gateway NOT IN ('iamport', 'portone') THEN 'payments_gateway_is_known'
		WHEN (p.state = 'kept') <> (p.reason IS NULL) THEN 'payments_refund_has_a_reason'
		WHEN p.state = 'refunding' AND (p.next_attempt_at IS NULL OR p.leased_until IS NULL) THEN 'payments_refunding_has_a_plan'
		WHEN NOT p.refunded BETWEEN 0 AND p.amount THEN 'payments_refund_is_bounded'
		WHEN p.state = 'refunded' AND p.refunded <> p.amount THEN 'payments_refunded_is_whole'
		WHEN p.state = 'kept' AND NOT (p.currency = 'KRW' AND p.amount > p.refunded) THEN 'payments_kept_is_won'
		WHEN p.by_hand IS NULL AND p.by_hand_amount <> 0
			OR p.by_hand IS NOT NULL AND NOT (p.by_hand_amount BETWEEN 0 AND p.refunded AND p.state = 'refunded') THEN 'payments_by_hand_are_refunded'
	END;
BEGIN
	IF broken IS NOT NULL THEN
		RAISE EXCEPTION 'payment % cannot be as it is to be written', p.imp_uid
			USING ERRCODE = 'check_violation', TABLE = 'payments', CONSTRAINT = broken;
	END IF;
	RETURN true;
END $$;
ALTER TABLE payments ADD CONSTRAINT payments_row_holds CHECK (payments_row_holds(payments)) NOT VALID;

-- step 39: old rows are held to what was said above

ALTER TABLE orders VALIDATE CONSTRAINT orders_row_holds;

-- step 40: the same for payments

ALTER TABLE payments VALIDATE CONSTRAINT payments_row_holds;

-- step 41: orders need the single rules no longer

ALTER TABLE orders
	DROP CONSTRAINT orders_id_is_objectid, DROP CONSTRAINT orders_user_is_objectid, DROP CONSTRAINT orders_status_is_known,
	DROP CONSTRAINT orders_only_unpaid_end, DROP CONSTRAINT orders_paid_have_a_time, DROP CONSTRAINT orders_cancelling_are_paid,
	DROP CONSTRAINT orders_confirming_are_unpaid, DROP CONSTRAINT orders_have_paintings, DROP CONSTRAINT orders_money_is_whole,
	DROP CONSTRAINT orders_parcels_are_whole, DROP CONSTRAINT orders_shipped_have_left, DROP CONSTRAINT orders_delivered_have_arrived,
	DROP CONSTRAINT orders_erased_are_over, DROP CONSTRAINT orders_erased_are_empty, DROP CONSTRAINT orders_parts_are_theirs,
	DROP CONSTRAINT orders_have_paintings_left, DROP CONSTRAINT orders_parts_are_paid;

-- step 42: nor do payments

ALTER TABLE payments
	DROP CONSTRAINT payments_state_is_known, DROP CONSTRAINT payments_gateway_is_known, DROP CONSTRAINT payments_refund_has_a_reason,
	DROP CONSTRAINT payments_refunding_has_a_plan, DROP CONSTRAINT payments_refund_is_bounded, DROP CONSTRAINT payments_refunded_is_whole,
	DROP CONSTRAINT payments_kept_is_won, DROP CONSTRAINT payments_by_hand_are_refunded;

-- step 43: a row of the history has an order, without a foreign key

-- A foreign key had the order read and locked for each of the three rows of a checkout. Orders are never deleted, and what a trigger
-- writes is about an order or a payment of one. So only a row that no trigger writes is checked.
CREATE OR REPLACE FUNCTION history_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF pg_trigger_depth() = 1 THEN
		IF NOT EXISTS (SELECT FROM orders o WHERE o.id = NEW.order_id) THEN
			RAISE EXCEPTION 'there is no order %', NEW.order_id
				USING ERRCODE = 'foreign_key_violation', CONSTRAINT = 'history_order_exists';
		END IF;
	END IF;
	IF EXISTS (SELECT FROM notify_targets) THEN
		INSERT INTO notifications (target, order_id, history_id, written_at, due_at)
			SELECT t.id, NEW.order_id, NEW.id, NEW.at, NEW.at FROM notify_targets t;
	END IF;
	RETURN NULL;
END $$;
LOCK TABLE orders, history IN ACCESS EXCLUSIVE MODE; -- in the order in which buyers lock them
ALTER TABLE history DROP CONSTRAINT history_order_exists;

-- step 44: a payment leaves the counts and the search to the reconciler

-- The changes of status that the reconciler has not yet applied to order_tally and order_search. A payment writes one row here, and
-- to no index of the search.
CREATE TABLE status_changes (
	order_id    text COLLATE "C" NOT NULL,
	from_status smallint NOT NULL,
	to_status   smallint NOT NULL
);

-- What paid orders are found by. Telephones are their digits, e-mail is in lower case, names are in NFC; store_admin.go says the
-- same. The receiver's are null where they are written as the orderer's. An order that is in status_changes may be missing here,
-- or have its former status. An order whose personal data was erased is not here.
CREATE TABLE order_search (
	id             text COLLATE "C" NOT NULL CONSTRAINT order_search_pkey PRIMARY KEY, -- the order's
	status         smallint NOT NULL,
	created_at     timestamptz NOT NULL,
	orderer_phone  text COLLATE "C",
	receiver_phone text COLLATE "C",
	orderer_email  text COLLATE "C",
	orderer_name   text COLLATE "C",
	receiver_name  text COLLATE "C"
);
CREATE INDEX order_search_by_orderer_phone ON order_search (orderer_phone, created_at DESC, id DESC);
CREATE INDEX order_search_by_receiver_phone ON order_search (receiver_phone, created_at DESC, id DESC) WHERE receiver_phone IS NOT NULL;
CREATE INDEX order_search_by_email ON order_search (orderer_email, created_at DESC, id DESC);

-- The beginning of a name may be that of a million orders, of which the newest are wanted. These have the orders of each week
-- together, so that a search reads a week at a time and stops when it has enough.
CREATE INDEX order_search_by_orderer_name ON order_search (status, date_trunc('week', created_at AT TIME ZONE 'UTC'), orderer_name);
CREATE INDEX order_search_by_receiver_name ON order_search (status, date_trunc('week', created_at AT TIME ZONE 'UTC'), receiver_name)
	WHERE receiver_name IS NOT NULL;

-- How many paid orders there are in each status. Replicas of the release before read order_tally alone, so their numbers of pages
-- are those of the reconciler's last round.
CREATE VIEW order_counts AS
	SELECT status, sum(n)::bigint AS n FROM (
		SELECT status, n FROM order_tally
		UNION ALL SELECT to_status, 1 FROM status_changes
		UNION ALL SELECT from_status, -1 FROM status_changes WHERE from_status >= 0) AS counted (status, n)
	GROUP BY status;

-- Replicas of the release before write to these from now on, and grants.sql runs only after the last step.
DO $$
BEGIN
	IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'lumiere_service') THEN
		GRANT INSERT ON status_changes TO lumiere_service;
		GRANT SELECT, DELETE ON order_search TO lumiere_service;
	END IF;
END $$;

CREATE OR REPLACE FUNCTION orders_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF TG_OP = 'INSERT' THEN
		INSERT INTO history (order_id, at, to_status, why) VALUES (NEW.id, NEW.created_at, NEW.status, 'created');
		IF NEW.status >= 0 THEN
			INSERT INTO status_changes VALUES (NEW.id, -1, NEW.status);
		END IF;
		RETURN NULL;
	END IF;
	IF NEW.status = OLD.status AND NEW.status >= 0 THEN
		IF EXISTS (SELECT FROM part_refunds r WHERE r.order_id = NEW.id AND r.state = 'booked') THEN
			RETURN NULL; -- its row says what is cancelled
		END IF;
	END IF;
	INSERT INTO history (order_id, at, from_status, to_status, why) VALUES (NEW.id,
		CASE WHEN NEW.updated_at = OLD.updated_at THEN clock_timestamp() ELSE NEW.updated_at END, OLD.status, NEW.status,
		CASE
			WHEN NEW.ended IS NOT NULL AND OLD.ended IS NULL THEN NEW.ended
			WHEN NEW.status = OLD.status THEN 'cancel requested'
			WHEN OLD.ended IS NOT NULL THEN 'revived'
			ELSE (ARRAY['paid', 'preparing', 'shipping', 'delivered', 'return requested', 'cancelled'])[NEW.status + 1]
		END);
	IF NEW.status <> OLD.status THEN
		INSERT INTO status_changes VALUES (NEW.id, OLD.status, NEW.status);
	END IF;
	RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION orders_erasure_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO history (order_id, at, why) VALUES (NEW.id, NEW.erased_at, 'personal data erased');
	DELETE FROM order_search WHERE id = NEW.id;
	RETURN NULL;
END $$;

-- When this lock is granted, every transaction that ran the former functions has ended: the next step sees what they wrote.
LOCK TABLE orders IN SHARE ROW EXCLUSIVE MODE;

-- step 45: the orders that were paid before

INSERT INTO order_search
	SELECT id, status, created_at,
		regexp_replace(orderer_info ->> 'phoneNum', '[^0-9]', '', 'g'),
		CASE WHEN delivery_info ->> 'contactNum' <> orderer_info ->> 'phoneNum' THEN regexp_replace(delivery_info ->> 'contactNum', '[^0-9]', '', 'g') END,
		lower((orderer_info ->> 'email') COLLATE "C"),
		left(normalize(orderer_info ->> 'name'), 254),
		CASE WHEN delivery_info ->> 'receiver' <> orderer_info ->> 'name' THEN left(normalize(delivery_info ->> 'receiver'), 254) END
	FROM orders WHERE status >= 0 AND erased_at IS NULL;
ANALYZE order_search;

-- step 46: what orders were found by before

-- Each INSERT and UPDATE of orders opens all of its indexes. Without these a replica of the release before reads all paid orders for
-- a search.
DROP INDEX orders_by_orderer_phone, orders_by_receiver_phone, orders_by_email, orders_by_orderer_name, orders_by_receiver_name;

-- step 47: what was erased while step 45 read the orders

-- Their triggers did not see the rows that step 45 wrote. All of them have ended, because step 46 waited for their locks.
DELETE FROM order_search s USING orders o WHERE o.id = s.id AND o.erased_at IS NOT NULL;
