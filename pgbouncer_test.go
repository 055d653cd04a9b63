package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// runPgBouncer starts PgBouncer in transaction mode with three connections to the server of databaseURL, and returns the
// connection string through it.
func runPgBouncer(t *testing.T, databaseURL string) string {
	t.Helper()
	program := findTool(t, "pgbouncer")
	server, err := pgx.ParseConfig(databaseURL)
	check(t, err)
	account, err := postgresAccount() // it does not run as root either
	check(t, err)
	dir := postgresDir(t)
	if account != nil {
		check(t, os.Chown(dir, int(account.Uid), int(account.Gid)))
	}
	password := ""
	if server.Password != "" {
		password = "password=" + server.Password
	}
	settings := filepath.Join(dir, "pgbouncer.ini")
	check(t, os.WriteFile(settings, fmt.Appendf(nil, `
[databases]
%[1]s = host=%[2]s port=%[3]d user=%[4]s %[5]s
[pgbouncer]
pool_mode = transaction
default_pool_size = 3
listen_addr =
listen_port = 6432
unix_socket_dir = %[6]s
auth_type = any
`, server.Database, server.Host, server.Port, server.User, password, dir), 0o644))
	var log bytes.Buffer
	cmd := exec.CommandContext(t.Context(), program, settings)
	cmd.Stderr = &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: account}
	check(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Wait()
		if t.Failed() {
			t.Logf("PgBouncer's log: %s", lastLines(log.Bytes()))
		}
	})
	through := databaseVia(t, databaseURL, "host", dir, "port", "6432", "default_query_exec_mode", "cache_describe")
	waitUntil(t, "PgBouncer answers", func() bool {
		conn, err := pgx.Connect(t.Context(), through)
		if err == nil {
			conn.Close(t.Context())
		}
		return err == nil
	})
	return through
}

// Behind PgBouncer in transaction mode a connection is another one after each transaction: the schema, the import, and
// every call of buyers and the desk live with that, many at a time.
func TestPgBouncer(t *testing.T) {
	databaseURL := newTestDatabase(t)
	s := newShop(t, func(c *config) { c.databaseURL = runPgBouncer(t, databaseURL) })
	b := newBuyers(s)
	stock := make([]string, 40)
	for i := range stock {
		stock[i] = s.painting(99000)
	}
	concurrently(2*len(stock), func(i int) answer {
		painting := stock[i/2] // each is wanted by two
		s.want(s.call(buyerA, "GET", "/api/products/cart-items?productId="+painting, nil), 200, "")
		s.want(s.call(buyerA, "GET", "/api/products/total-price?productId="+painting, nil), 200, "")
		b.walk(painting, i%3 == 0)
		s.call(buyerA, "GET", "/api/orders/latest", nil)
		s.want(s.call(adminID, "GET", "/api/orders", nil), 200, "")
		return s.want(s.call(buyerA, "GET", "/api/orders/mine", nil), 200, "")
	})
	s.later(time.Hour)
	for order := range b.given() {
		s.want(s.call(adminID, "GET", "/api/orders/"+order+"/history", nil), 200, "")
	}
	s.orderAt(statusReturning)
	s.order(buyerB, s.painting(99000))
	s.want(s.call(buyerB, "GET", "/api/orders/latest", nil), 200, "")
	b.wantPromised()
	s.wantMismatches()
}
