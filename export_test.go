package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// exported runs the command and returns its lines without the header.
func exported(t *testing.T, databaseURL string, args ...string) [][]string {
	t.Helper()
	out, err := command(t, databaseURL, "", append([]string{"export"}, args...)...)
	check(t, err)
	text, marked := strings.CutPrefix(out, "\ufeff")
	if !marked {
		t.Fatalf("%q has no byte order mark", out)
	}
	lines, err := csv.NewReader(strings.NewReader(text)).ReadAll()
	check(t, err)
	return lines[1:]
}

func joined(lines [][]string) (all []string) {
	for _, line := range lines {
		all = append(all, strings.Join(line, ","))
	}
	return all
}

// movedShop is a shop in which money moved in every way, with the lines of its export. Its clock begins at 10:00 in Korea.
func movedShop(t *testing.T) (s *shop, want []string) {
	s = newDirectShop(t)
	line := func(at, order, payment, kind string, won int) {
		want = append(want, fmt.Sprintf("%s,%s,%s,iamport,%s,%s,%d", at, order, s.numberOf(order), payment, kind, won))
	}
	// Paid, a part given back in the console in the evening, cancelled after midnight.
	order, impUID, _ := s.paid(buyerA)
	line("2026-03-02,10:00:00", order, impUID, "paid", 109000)
	s.clock.advance(13*time.Hour + 59*time.Minute + 59*time.Second)
	check(t, s.fake.refundInConsole(impUID, 9000))
	s.later(0)
	line("2026-03-02,23:59:59", order, impUID, "refunded", -9000)
	s.clock.advance(time.Second)
	s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, nil), 200, "")
	line("2026-03-03,00:00:00", order, impUID, "refunded", -100000)
	// Paid before midnight, booked after it.
	s.clock.advance(24*time.Hour - time.Second)
	late := s.order(buyerB, s.painting(99000))
	lateUID := s.charge(late, 109000)
	line("2026-03-03,23:59:59", late, lateUID, "paid", 109000)
	s.later(2 * time.Second)
	// A forged payment is taken and given back.
	s.clock.advance(time.Hour)
	order = s.order(buyerA, s.painting(99000))
	impUID = s.charge(order, 1000)
	s.want(s.report(impUID), 400, "")
	line("2026-03-04,01:00:01", order, impUID, "paid", 1000)
	line("2026-03-04,01:00:01", order, impUID, "refunded", -1000)
	// So is one that went back before anybody knew of it.
	s.clock.advance(time.Hour)
	impUID = s.charge(order, 109000)
	s.clock.advance(time.Minute)
	check(t, s.fake.refundInConsole(impUID, 0))
	s.want(s.report(impUID), 400, "")
	line("2026-03-04,02:00:01", order, impUID, "paid", 109000)
	line("2026-03-04,02:01:01", order, impUID, "refunded", -109000)
	// A second payment is part back when it is seen, part back while its refund is refused, and the rest is paid back by hand.
	s.clock.advance(time.Hour)
	s.refuseCancels()
	impUID = s.charge(late, 109000)
	check(t, s.fake.refundInConsole(impUID, 4000))
	s.want(s.report(impUID), 400, "")
	line("2026-03-04,03:01:01", late, impUID, "paid", 109000)
	line("2026-03-04,03:01:01", late, impUID, "refunded", -4000)
	check(t, s.fake.refundInConsole(impUID, 5000))
	s.later(time.Hour)
	line("2026-03-04,04:01:01", late, impUID, "refunded", -5000)
	s.later(time.Hour)
	s.want(s.call(adminID, "POST", "/api/orders/"+late+"/refund", map[string]string{"imp_uid": impUID, "byHand": "은행 송금"}), 200, "")
	line("2026-03-04,05:01:01", late, impUID, "refunded by hand", -100000)
	s.fake.setFaults(nil)
	// A refund that is not done when it is exported.
	s.clock.advance(time.Hour)
	s.refuseCancels()
	impUID = s.charge(late, 109000)
	s.want(s.report(impUID), 409, "")
	line("2026-03-04,06:01:01", late, impUID, "paid", 109000)
	check(t, s.fake.refundInConsole(impUID, 7000))
	s.later(time.Hour)
	line("2026-03-04,07:01:01", late, impUID, "refunded", -7000)
	// A payment in another currency moves no won.
	impUID = s.fake.pay(fakePayment{MerchantUID: order, Amount: 109000, Currency: "USD"})
	s.fake.setFaults(nil)
	s.want(s.report(impUID), 400, "")
	return s, want
}

func TestExportMovements(t *testing.T) {
	s, want := movedShop(t)
	for _, row := range []struct {
		from, to string
		lines    []string
	}{
		{"2026-03-02", "2026-03-04", want},
		{"2026-03-02", "2026-03-02", want[:2]},
		{"2026-03-03", "2026-03-03", want[2:4]},
		{"2026-03-04", "2026-04-30", want[4:]},
		{"2026-03-05", "2026-03-05", nil},
		{"2020-01-01", "2026-03-01", nil},
	} {
		if got := joined(exported(t, s.config.databaseURL, "-from", row.from, "-to", row.to)); !slices.Equal(got, row.lines) {
			t.Errorf("%s to %s:\n%s\nwant\n%s", row.from, row.to, strings.Join(got, "\n"), strings.Join(row.lines, "\n"))
		}
	}
	s.wantExportBalanced()
}

// wantExportBalanced fails unless the sums of the movements are those of the ledger, day by day for what was taken.
func (s *shop) wantExportBalanced() {
	s.t.Helper()
	t, sums := s.t.(*testing.T), map[string]int64{}
	for _, line := range exported(t, s.config.databaseURL, "-from", "2020-01-01", "-to", "2030-12-31") {
		won, err := strconv.ParseInt(line[7], 10, 64)
		check(t, err)
		sums[line[6]] += won
		if line[6] == "paid" {
			sums[line[0]] += won
		}
	}
	ledger := map[string]int64{}
	check(t, json.Unmarshal([]byte(queryText(t, s.config.databaseURL, `
		WITH l (name, won) AS (
			SELECT 'paid', sum(amount) FROM payments
			UNION ALL SELECT 'refunded', -sum(refunded - by_hand_amount) FROM payments
			UNION ALL SELECT 'refunded by hand', -sum(by_hand_amount) FROM payments
			UNION ALL SELECT to_char(paid_at AT TIME ZONE 'Asia/Seoul', 'YYYY-MM-DD'), sum(amount) FROM payments GROUP BY 1)
		SELECT json_object_agg(name, won) FROM l WHERE won <> 0`)), &ledger))
	if !maps.Equal(sums, ledger) {
		t.Errorf("exported %v\nledger   %v", sums, ledger)
	}
}

// Earlier releases wrote no history of what went back of a refund that was not done, the first one none at all. Then it went back
// when the payment changed last; nothing is missing.
func TestExportOfOldRows(t *testing.T) {
	s, _ := movedShop(t)
	for _, missing := range []string{
		`why = 'partly refunded' AND imp_uid IN (SELECT imp_uid FROM payments WHERE reason <> 'buyer cancelled')`,
		`imp_uid IS NOT NULL AND why NOT LIKE 'refunded by hand%'`,
	} {
		execSQL(t, s.config.databaseURL, `SET session_replication_role = replica; DELETE FROM history WHERE `+missing)
		s.wantExportBalanced()
	}
}

// The migration writes down what went back before it of a refund that was not done.
func TestHistoryOfOldRefunds(t *testing.T) {
	databaseURL := newTestDatabase(t)
	store, err := openStore(t.Context(), databaseURL, nil)
	check(t, err)
	defer store.close()
	before := slices.IndexFunc(migrations(), func(step string) bool {
		return strings.Contains(step, ": what went back of a refund that is not done has a time")
	})
	check(t, store.migrate(t.Context(), migrations()[:before]))
	execSQL(t, databaseURL, `
		ALTER TABLE orders DISABLE TRIGGER orders_are_whole;
		INSERT INTO orders (id, user_id, number, status, ended, created_at, updated_at, held_until, shipping_price, total_price, product_ids,
			items, delivery_info, orderer_info)
		VALUES ('61a7adc903b7708e5dbba693', '`+buyerA+`', '1', -1, 'expired', now(), now(), now(), 0, 1, ARRAY['61a4debe4f5f6aa036bfec5f'], '[]', '{}', '{}');
		INSERT INTO payments (imp_uid, gateway, order_id, state, reason, currency, amount, refunded, paid_at, created_at, updated_at, next_attempt_at, leased_until)
		SELECT uid, gateway, '61a7adc903b7708e5dbba693', 'refunding', 'amount differs', 'KRW', 109000, back, at, at, at, at, at
		FROM (VALUES ('imp_part', 'iamport', 4000), ('imp_none', 'portone', 0)) AS p (uid, gateway, back), (SELECT '2026-03-02T01:00:00Z'::timestamptz) AS t (at)`)
	check(t, store.migrateAll(t.Context()))
	execSQL(t, databaseURL, `UPDATE payments SET updated_at = updated_at + interval '1 day'`) // a refusal
	got := joined(exported(t, databaseURL, "-from", "2026-03-02", "-to", "2026-03-03"))
	want := []string{
		"2026-03-02,10:00:00,61a7adc903b7708e5dbba693,1,portone,imp_none,paid,109000",
		"2026-03-02,10:00:00,61a7adc903b7708e5dbba693,1,iamport,imp_part,paid,109000",
		"2026-03-02,10:00:00,61a7adc903b7708e5dbba693,1,iamport,imp_part,refunded,-4000",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

func TestExportPaintings(t *testing.T) {
	s := newDirectShop(t)
	formula, quoted := newTestID(), newTestID()
	add := func(id, artist, title string) {
		s.importPaintings(painting{id: id, artistID: "61a4c82a2c1eaad2e0d0084c", artistName: artist, title: title,
			image: "/images/bye/1.jpg", size: "73x61cm", canvas: 20, price: 99000, forSale: true})
	}
	add(formula, "-안영희", "=SUM(A1)")
	add(quoted, "@영희", "\"잠식\",\n둘째 줄")
	body := orderBody("+8210", formula, quoted)
	s.want(s.call(buyerA, "POST", "/api/orders", body), 201, "")
	order := queryText(t, s.config.databaseURL, `SELECT id FROM orders`)
	s.clock.advance(13*time.Hour + 59*time.Minute) // 23:59 in Korea
	impUID := s.charge(order, 208000)
	s.clock.advance(2 * time.Minute)
	s.want(s.report(impUID), 200, "")
	s.order(buyerB, s.painting(99000)) // not paid
	lines := func(day string) []string {
		return joined(exported(t, s.config.databaseURL, "-from", day, "-to", day, "-by", "painting"))
	}
	for status, state := range []string{"paid", "preparing", "shipping", "delivered", "return requested", "cancelled"} {
		switch status {
		case statusPaid:
		case statusCancelled:
			s.want(s.call(adminID, "DELETE", "/api/orders/"+order, nil), 200, "")
		case statusReturning:
			s.want(s.call(buyerA, "DELETE", "/api/orders/"+order, map[string]int{"status": 4}), 200, "")
		default:
			s.want(s.call(adminID, "PATCH", "/api/orders/"+order, map[string]int{"status": status}), 200, "")
		}
		shipped, delivered := "", ""
		if status >= statusShipping {
			shipped = "2026-03-03"
		}
		if status >= statusDelivered {
			delivered = "2026-03-03"
		}
		rest := ",99000,2026-03-02," + shipped + "," + delivered + "," + state
		want := []string{
			order + ",'+8210," + formula + ",'-안영희,'=SUM(A1)" + rest,
			order + ",'+8210," + quoted + ",'@영희,\"잠식\",\n둘째 줄" + rest,
		}
		if got := lines("2026-03-02"); !slices.Equal(got, want) {
			t.Errorf("%q, want %q", got, want)
		}
	}
	if got := lines("2026-03-03"); len(got) > 0 {
		t.Errorf("on the day of the booking: %q", got)
	}
	// The payments of an order that are not the one that paid it count for no painting, nor does an order lack its own.
	s.want(s.report(s.charge(order, 208000)), 409, "")
	if got := lines("2026-03-03"); len(got) > 0 {
		t.Errorf("of a second payment: %q", got)
	}
	execSQL(t, s.config.databaseURL, `SET session_replication_role = replica; UPDATE payments SET created_at = created_at + interval '1 second'`)
	if got := lines("2026-03-03"); len(got) != 2 {
		t.Errorf("without its payment's time the order's own counts: %q", got)
	}
}

func TestCell(t *testing.T) {
	for text, want := range map[string]string{
		"": "", "잠식": "잠식", "=1+1": "'=1+1", "+82": "'+82", "-1": "'-1", "@A1": "'@A1", "\tx": "'\tx", "\rx": "'\rx", "1=1": "1=1", "'=": "'=",
	} {
		if got := cell(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func TestExportCommand(t *testing.T) {
	s := newDirectShop(t)
	for _, args := range [][]string{
		{}, {"-from", "2026-11-01"}, {"-to", "2026-11-30"}, {"-from", "2026-11-30", "-to", "2026-11-01"}, {"-from", "2026-11-31", "-to", "2026-12-01"},
		{"-from", "yesterday", "-to", "2026-12-01"}, {"-from", "2026-11-01", "-to", "2026-11-30", "-by", "artist"}, {"-from", "2026-11-01", "-to", "2026-11-30", "more"},
	} {
		if out, err := command(t, s.config.databaseURL, "", append([]string{"export"}, args...)...); err == nil || strings.Contains(out, "\ufeff") {
			t.Errorf("%q: %v\n%s", args, err, out)
		}
	}
	for by, header := range map[string]string{
		"movement": "day,time,order,number,gateway,payment,kind,won\n",
		"painting": "order,number,product,artist,title,price,paid,shipped,delivered,state\n",
	} {
		out, err := command(t, s.config.databaseURL, "", "export", "-from", "2026-11-01", "-to", "2026-11-30", "-by", by)
		if err != nil || out != "\ufeff"+header {
			t.Errorf("%s: %q, %v", by, out, err)
		}
	}
}

// brokenPipe takes so many bytes and no more.
type brokenPipe struct{ left int }

var errBroken = errors.New("broken pipe")

func (p *brokenPipe) Write(b []byte) (int, error) {
	if p.left -= len(b); p.left < 0 {
		return 0, errBroken
	}
	return len(b), nil
}

// manyPayments are so many orders of a day, each with one payment.
func manyPayments(t testing.TB, databaseURL string, n int) {
	execSQL(t, databaseURL, fmt.Sprintf(`
		SET session_replication_role = replica;
		INSERT INTO orders (id, user_id, number, status, created_at, updated_at, paid_at, held_until, shipping_price, total_price, product_ids,
			items, delivery_info, delivery_details, orderer_info)
		SELECT lpad(to_hex(i), 24, '0'), lpad(to_hex(i), 24, '0'), '20261101' || lpad(i::text, 7, '0'), 3, at, at, at, at, 10000, 109000,
			ARRAY[lpad(to_hex(i), 24, '0')], json_build_array(json_build_object('image', '/images/bye/1.jpg', 'title', '작품 ' || i, 'artist', '안영희',
				'size', '73x61cm(20호)', 'price', 99000, 'product', lpad(to_hex(i), 24, '0'))),
			'{"address":"[00000] 어느시 어느로 1","detailedAddress":"101호","receiver":"홍길동","contactNum":"010-0000-0000"}',
			'{"receiveAt":"문 앞","requestedTerms":"도착 시 문자 주세요"}',
			'{"name":"홍길동","phoneNum":"010-0000-0000","email":"buyer@example.com","refundTerms":"품절 시 결제수단으로 환불"}'
		FROM (SELECT i, '2026-11-01T00:00:00Z'::timestamptz + i * interval '10 milliseconds' AS at FROM generate_series(1, %d) i) n;
		INSERT INTO payments (imp_uid, order_id, state, currency, amount, paid_at, created_at, updated_at)
		SELECT 'imp_' || number, id, 'kept', 'KRW', total_price, paid_at, paid_at, paid_at FROM orders;
		INSERT INTO history (order_id, at, imp_uid, amount, why) SELECT order_id, paid_at, imp_uid, amount, 'payment kept' FROM payments;
		ANALYZE`, n))
}

// An export that is not whole ends with an error: its reader has gone, or it was interrupted.
func TestExportEndsEarly(t *testing.T) {
	s := newDirectShop(t)
	manyPayments(t, s.config.databaseURL, 5000)
	from := time.Date(2026, 11, 1, 0, 0, 0, 0, korea)
	for _, write := range []func(*exporter, context.Context, *store, time.Time, time.Time) error{(*exporter).movements, (*exporter).paintings} {
		for _, left := range []int{0, 100 << 10} {
			if err := write(newExporter(&brokenPipe{left}), t.Context(), s.store, from, from.AddDate(0, 0, 1)); !errors.Is(err, errBroken) {
				t.Errorf("after %d bytes: %v", left, err)
			}
		}
		var out bytes.Buffer
		check(t, write(newExporter(&out), t.Context(), s.store, from, from.AddDate(0, 0, 1)))
		if n := strings.Count(out.String(), "\n"); n != 5001 {
			t.Errorf("%d lines", n)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := write(newExporter(io.Discard), ctx, s.store, from, from.AddDate(0, 0, 1)); err == nil {
			t.Error("an export that was interrupted is whole")
		}
	}
	s.order(buyerA, s.painting(99000)) // the connections are good, or gone
}

func TestIsTerminal(t *testing.T) {
	read, write, err := os.Pipe()
	check(t, err)
	defer read.Close()
	defer write.Close()
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	defer terminal.Close()
	for _, row := range []struct {
		w    io.Writer
		want bool
	}{{terminal, true}, {write, false}, {io.Discard, false}} {
		if got := isTerminal(row.w); got != row.want {
			t.Errorf("%T: %v", row.w, got)
		}
	}
}

var exportLines = flag.Int("export", 0, "measure an export of so many lines")

// TestExportFigures measures the figure of docs/operations.md.
func TestExportFigures(t *testing.T) {
	if *exportLines == 0 {
		t.Skip("measures for a minute: go test -run TestExportFigures -export 1000000")
	}
	databaseURL := newShop(t).config.databaseURL
	manyPayments(t, databaseURL, *exportLines)
	for _, by := range []string{"movement", "painting"} {
		program := programCommand(t, map[string]string{"DATABASE_URL": databaseURL}, "export", "-from", "2026-11-01", "-to", "2026-11-30", "-by", by)
		out, err := program.StdoutPipe()
		check(t, err)
		start := time.Now()
		check(t, program.Start())
		lines, most := bufio.NewScanner(out), 0
		n, bytes := 0, 0
		for ; lines.Scan(); n++ {
			bytes += len(lines.Text()) + 1
			if n == *exportLines*99/100 { // what is left does not fit into the pipe
				most = memory(t, program.Process, "VmHWM")
			}
		}
		check(t, lines.Err())
		check(t, program.Wait())
		fmt.Printf("%s: %d lines, %d MB in %.1f s, at most %d MB resident\n", by, n-1, bytes>>20, time.Since(start).Seconds(), most>>20)
		if n != *exportLines+1 || most > 64<<20 {
			t.Errorf("%s: %d lines with %d MB", by, n-1, most>>20)
		}
	}
}
