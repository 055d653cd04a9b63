package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// The roles of a deployment: the owner migrates, the service's role serves.

// makeDeployment runs roles.sql on the server, as psql does, and returns the connection strings of the database's two roles.
func makeDeployment(t *testing.T, server *postgresServer) (owner, service string) {
	t.Helper()
	sql := regexp.MustCompile(`(?m)^(--|\\set|\\getenv) .*$`).ReplaceAllString(readText(t, "roles.sql"), "")
	sql = strings.NewReplacer(":'owner_password'", "'secret'", ":'service_password'", "'secret'").Replace(sql)
	before, inDatabase, found := strings.Cut(sql, `\connect lumiere`)
	if !found || strings.Contains(inDatabase, `\`) {
		t.Fatalf("roles.sql is not understood:\n%s", sql)
	}
	for statement := range strings.SplitSeq(before, ";") { // one at a time: a database is not made in a transaction
		execSQL(t, server.databaseURL("postgres"), statement)
	}
	execSQL(t, server.databaseURL("lumiere"), inDatabase)
	return withRole(t, server.url, "lumiere_owner"), withRole(t, server.url, "lumiere_service")
}

// runEmptyPostgres starts a server of this test's own that has no database but its first ones.
func runEmptyPostgres(t *testing.T) *postgresServer {
	t.Helper()
	server := runPostgres(t, postgresConfig{dir: postgresDir(t), settings: unsafeSettings})
	execSQL(t, server.databaseURL("postgres"), `DROP DATABASE lumiere`)
	return server
}

// What README.md says of a deployment: roles.sql, lumiere migrate as the owner, all else as the service's role.
func TestDeployment(t *testing.T) {
	server := runEmptyPostgres(t)
	owner, service := makeDeployment(t, server)
	wantRefusal := func(what string) {
		t.Helper()
		for _, args := range [][]string{{}, {"import", "-"}, {"migrate"}, {"audit"}} {
			if out, err := deployed(t, service, "[]", args...); err == nil || !strings.Contains(err.Error(), what) ||
				!strings.Contains(err.Error(), "run lumiere migrate first, as the owner of the tables") {
				t.Errorf("%q: %v, %s", args, err, out)
			}
		}
	}
	wantRefusal(fmt.Sprintf("its schema is at step 0 and this program needs step %d", len(migrations())))
	store := openTestStore(t, owner)
	check(t, store.migrate(t.Context(), migrations()[:len(migrations())-1]))
	wantRefusal("permission denied for table schema_steps") // the owner has granted nothing yet
	execSQL(t, owner, `GRANT SELECT ON schema_steps TO lumiere_service`)
	wantRefusal(fmt.Sprintf("its schema is at step %d and this program needs step %[2]d", len(migrations())-1, len(migrations())))
	out, err := deployed(t, owner, "", "migrate")
	if err != nil || out != fmt.Sprintf("the schema is at step %d\n", len(migrations())) {
		t.Fatalf("migrate: %v, %s", err, out)
	}

	for _, sql := range []string{
		// The past.
		`UPDATE history SET why = 'nothing'`, `DELETE FROM history`, `TRUNCATE history`, `DROP TABLE history`,
		`DELETE FROM orders`, `TRUNCATE orders CASCADE`, `DELETE FROM payments`, `TRUNCATE payments`, `DELETE FROM products`,
		`UPDATE orders SET total_price = 1`, `UPDATE orders SET user_id = '` + buyerA + `'`,
		`UPDATE payments SET amount = 1`, `UPDATE products SET id = ''`,
		`UPDATE order_tally SET n = 0`, `UPDATE status_changes SET to_status = 0`, `UPDATE order_search SET orderer_name = ''`,
		`UPDATE schema_steps SET applied_at = now()`, `DELETE FROM schema_steps`, `INSERT INTO schema_steps VALUES (1000)`,
		// What keeps it.
		`ALTER TABLE history DISABLE TRIGGER history_is_append_only`, `ALTER TABLE orders DISABLE TRIGGER ALL`, `DROP TRIGGER orders_are_kept ON orders`,
		`ALTER TABLE payments DROP CONSTRAINT payments_refund_is_bounded`, `ALTER TABLE orders ADD COLUMN note text`, `DROP INDEX payments_one_kept_per_order`,
		`CREATE OR REPLACE FUNCTION books_keep_everything() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END'`, `DROP FUNCTION orders_guard CASCADE`,
		`CREATE TRIGGER mine BEFORE INSERT ON history FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()`,
		`SET session_replication_role = replica`,
		// What hides it.
		`CREATE TABLE mine ()`, `CREATE TEMPORARY TABLE history (LIKE public.history)`, `CREATE SCHEMA mine`, `CREATE VIEW mine AS SELECT`,
		`CREATE FUNCTION mine() RETURNS void LANGUAGE sql AS ''`, `CREATE EXTENSION dblink`, `CREATE DATABASE mine`, `CREATE ROLE mine`,
		// Who may all of that.
		`SET ROLE lumiere_owner`, `SET SESSION AUTHORIZATION lumiere_owner`, `GRANT lumiere_owner TO lumiere_service`,
		`ALTER TABLE history OWNER TO lumiere_service`, `ALTER ROLE lumiere_service SUPERUSER`, `ALTER DATABASE lumiere OWNER TO lumiere_service`,
		`COPY history TO PROGRAM 'true'`,
	} {
		if err := inTransaction(t, service, sql); !notAllowed(err) {
			t.Errorf("%s: %v", sql, err)
		}
	}
	for _, args := range [][]string{{"import", "-"}, {"migrate"}} {
		if out, err := deployed(t, service, "["+catalogueEntry(newTestID(), "", "")+"]", args...); err != nil {
			t.Errorf("%q: %v, %s", args, err, out)
		}
	}
	wantServing(t, service)

	s := newShop(t, func(c *config) { c.databaseURL = server.url })
	if user := queryText(t, s.asService, `SELECT current_user`); user != "lumiere_service" {
		t.Fatalf("the shop's store is %s's", user)
	}
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+s.order(buyerA, s.painting(99000)), nil), 200, "")
	order, _, _ := s.paid(buyerB)
	s.want(s.call(buyerB, "DELETE", "/api/orders/"+order, nil), 200, "")
	s.later(s.config.hold)
	s.wantBalanced()
}

// deployed runs the program with a deployment's environment and returns what it printed.
func deployed(t *testing.T, databaseURL, in string, args ...string) (string, error) {
	environment := map[string]string{"DATABASE_URL": databaseURL, "JWT_SECRET": testSecret, "IAMPORT_KEY": "key", "IAMPORT_SECRET": "secret",
		"IAMPORT_URL": "http://127.0.0.1:9", "PORT": "0"}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // should it serve
	defer cancel()
	var out bytes.Buffer
	err := run(ctx, args, func(name string) string { return environment[name] }, strings.NewReader(in), &out, &out)
	return out.String(), err
}

// wantServing fails unless the program serves, and ends when it is asked to.
func wantServing(t *testing.T, databaseURL string) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	environment := map[string]string{"DATABASE_URL": databaseURL, "JWT_SECRET": testSecret, "IAMPORT_KEY": "key", "IAMPORT_SECRET": "secret",
		"IAMPORT_URL": "http://127.0.0.1:9", "PORT": "0"}
	logged, errOut := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, nil, func(name string) string { return environment[name] }, nil, io.Discard, errOut)
		errOut.Close()
	}()
	line := make([]byte, 4096)
	n, err := logged.Read(line)
	if err != nil || !bytes.Contains(line[:n], []byte(`"msg":"serving"`)) {
		t.Errorf("it logs %s, %v", line[:n], err)
	}
	go io.Copy(io.Discard, logged)
	stop()
	check(t, <-ended)
}

// inTransaction runs a statement and takes back what it did.
func inTransaction(t *testing.T, databaseURL, sql string) error {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	check(t, err)
	defer conn.Close(context.Background())
	if strings.HasPrefix(sql, "CREATE DATABASE") {
		_, err := conn.Exec(t.Context(), sql)
		return err
	}
	tx, err := conn.Begin(t.Context())
	check(t, err)
	defer tx.Rollback(context.Background())
	_, err = tx.Exec(t.Context(), sql)
	return err
}

// What docs/operations.md says of a deployment whose one role owns everything: the SQL, then lumiere migrate, while the replicas
// of before go on.
func TestDeploymentOfOneRole(t *testing.T) {
	heavy(t)
	sql := regexp.MustCompile("(?s)```sql\n(.*?)```").FindStringSubmatch(readText(t, "docs/operations.md"))
	if sql == nil {
		t.Fatal("docs/operations.md has no SQL")
	}
	for _, superuser := range []bool{true, false} { // compose.yaml once made the one role a superuser
		t.Run(fmt.Sprintf("superuser %v", superuser), func(t *testing.T) {
			server := runPostgres(t, postgresConfig{dir: postgresDir(t), settings: unsafeSettings})
			admin := server.url
			if !superuser {
				execSQL(t, server.url, `CREATE ROLE admin SUPERUSER LOGIN`)
				execSQL(t, withRole(t, server.databaseURL("postgres"), "admin"), `ALTER ROLE lumiere RENAME TO postgres`)
				execSQL(t, withRole(t, server.databaseURL("postgres"), "admin"), `CREATE ROLE lumiere LOGIN`)
				execSQL(t, withRole(t, server.databaseURL("postgres"), "admin"), `ALTER DATABASE lumiere OWNER TO lumiere`)
				admin = withRole(t, server.url, "admin")
			}
			check(t, openTestStore(t, server.url).migrate(t.Context(), migrations()[:1]))
			old := newOldReplica(t, server.url)
			old.works()
			execSQL(t, admin, sql[1])
			old.works()
			_, err := deployed(t, withRole(t, server.url, "lumiere_owner"), "", "migrate")
			check(t, err)
			old.works()
			if left := queryText(t, admin, `
				SELECT coalesce(string_agg(name, ' '), '') FROM (
					SELECT relname AS name, relowner AS owner FROM pg_class WHERE relnamespace = 'public'::regnamespace
					UNION ALL SELECT proname, proowner FROM pg_proc WHERE pronamespace = 'public'::regnamespace
					UNION ALL SELECT stxname, stxowner FROM pg_statistic_ext) o WHERE owner <> 'lumiere_owner'::regrole`); left != "" {
				t.Errorf("not the owner's: %s", left)
			}
			service := withRole(t, server.url, "lumiere_service")
			wantServing(t, service)
			for _, sql := range []string{`CREATE TABLE mine ()`, `CREATE TEMPORARY TABLE mine ()`, `DELETE FROM history`} {
				if err := inTransaction(t, service, sql); !notAllowed(err) {
					t.Errorf("%s: %v", sql, err)
				}
			}
		})
	}
}

// Each table of the schema is in both halves of grants.sql, and nothing is left of what was granted besides.
func TestGrants(t *testing.T) {
	databaseURL := newTestDatabase(t)
	makeServiceRole(t, databaseURL)
	store := openTestStore(t, databaseURL)
	check(t, store.migrateAll(t.Context()))
	const granted = `SELECT coalesce(string_agg(format('%s %s %s', table_name, column_name, privilege_type), E'\n' ORDER BY table_name, column_name, privilege_type), '')
		FROM (SELECT table_name, column_name, privilege_type, grantee FROM information_schema.column_privileges
			UNION ALL SELECT table_name, '', privilege_type, grantee FROM information_schema.table_privileges
			UNION ALL SELECT object_name, '', privilege_type, grantee FROM information_schema.usage_privileges WHERE object_schema = 'public') g
		WHERE grantee = 'lumiere_service'`
	exact := queryText(t, databaseURL, granted)
	for _, table := range strings.Fields(queryText(t, databaseURL, `SELECT string_agg(relname, ' ') FROM pg_class
			WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'f')`)) {
		if !strings.Contains("\n"+exact, "\n"+table+" ") {
			t.Errorf("grants.sql does not say what the service may do with %s", table)
		}
	}
	execSQL(t, databaseURL, `GRANT ALL ON ALL TABLES IN SCHEMA public TO lumiere_service; GRANT ALL ON ALL TABLES IN SCHEMA public TO PUBLIC`)
	check(t, store.migrateAll(t.Context()))
	after := strings.Split(queryText(t, databaseURL, granted), "\n")
	for _, privilege := range after {
		if !slices.Contains(strings.Split(exact, "\n"), privilege) {
			t.Errorf("grants.sql does not take away %s", privilege)
		}
	}
	if public := queryText(t, databaseURL, strings.Replace(granted, "'lumiere_service'", "'PUBLIC' AND table_name IN (SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace)", 1)); public != "" {
		t.Errorf("everybody may\n%s", public)
	}
}
