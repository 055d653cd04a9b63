package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestPage walks all of the page's ways, partly with the keyboard alone, on a phone and on a wide screen.
func TestPage(t *testing.T) {
	heavy(t)
	s := newShop(t, func(c *config) { c.local = true })
	s.addPage()
	const odd = `<img src="/odd" onerror="alert(1)"> & "따옴표"`
	s.importPaintings(painting{id: newTestID(), artistID: newTestID(), artistName: "<b>화가</b>", title: odd,
		image: "/images/odd.jpg", size: "73x61cm", canvas: 20, price: 99000, forSale: true})

	b := openBrowser(t, s.url)
	b.do("Page.navigate", object{"url": s.url + "/"})
	b.resize(phone)

	// order fills the cart and sends the order form.
	order := func(titles ...string) {
		t.Helper()
		s.clock.advance(time.Second)
		b.fillCart(titles...)
		b.resize(phone)
		b.click("주문하기$")
	}
	// choose clicks, and waits until the order in view has the status.
	choose := func(pattern, status string) {
		t.Helper()
		b.click(pattern)
		b.see(".status", status)
	}
	// deliver takes the order in view through the administrator's three steps.
	deliver := func() {
		t.Helper()
		choose("^발송 준비 시작$", "발송준비중")
		choose("^이 택배로 발송$", "배송중")
		choose("^배송 완료로 표시$", "배송완료")
	}
	// escape closes the payment window, and with it the order.
	escape := func() {
		t.Helper()
		b.see("dialog", "결제하기")
		b.press("Escape")
		b.see("#notice", "결제 오류로 임시 주문서를 삭제했습니다")
	}

	// With the keyboard alone, on a phone: two paintings, an address, a payment that is too low, one that is right, a refund.
	b.see("#view", odd)
	b.tabTo("^담기 ‘만월’$")
	b.press("Enter")
	b.see("#notice", "‘만월’을(를) 담았습니다")
	b.tabTo("^담기 ‘잠식’$")
	b.press(" ")
	b.see("#notice", "‘잠식’을(를) 담았습니다")
	b.tabTo("^장바구니 2$")
	b.press("Enter")
	b.see(".total", "171,000원")
	b.tabTo("^상세 주소$")
	b.do("Input.insertText", object{"text": "7층"})
	b.press("Enter")
	b.see("dialog", "171,000원")
	b.resize(phone)
	b.tabTo("^1,000원 적게 결제하기$")
	b.press(" ")
	b.see("#pay-alert", "금액 불일치, 위조된 결제 시도")
	b.tabTo("^결제하기$")
	b.press("Enter")
	b.see(".status", "결제완료")
	b.see("#notice", "결제 성공")
	b.see("#view", "7층")
	b.see(".history", "환불 완료 · 금액 불일치 · 170,000원")
	b.resize(phone)
	b.tabTo("^결제 취소$")
	b.press("Enter")
	b.see(".status", "결제취소")
	b.see("#notice", "해당 주문의 결제 취소가 완료되었습니다")

	// Another buyer takes what is free again, closes the window, and pays in one that dies, but the gateway gives notice.
	b.tabTo("^가람$")
	b.press("ArrowRight")
	b.see("#view", "해당 주문 내역이 없습니다")
	order("잠식")
	escape()
	b.click("주문하기$")
	b.click("웹훅은 도착")
	b.see(".status", "결제완료")
	b.see(".history", "결제사 알림")

	// The record has what can be pasted: in a terminal it answers the same.
	b.click("^요청 기록")
	b.see("#tokens", "BUYER2=")
	b.fits(phone)
	b.click("^요청 기록")
	b.resize(wide)
	var recorded struct{ Tokens, Curl, Answer string }
	b.run(`(() => {
		const entry = [...document.querySelectorAll('#calls li')].find(
			e => /^GET.api.orders.[0-9a-f]{24}200$/.test(e.querySelector('summary').textContent));
		const [curl, answer] = [...entry.querySelectorAll('pre')].map(e => e.textContent);
		return {tokens: document.querySelector('#tokens').innerText, curl, answer};
	})()`, &recorded)
	pasted, err := exec.Command("bash", "-c", recorded.Tokens[strings.Index(recorded.Tokens, "BUYER"):]+"\n"+recorded.Curl).Output()
	check(t, err)
	var compact bytes.Buffer
	check(t, json.Compact(&compact, []byte(recorded.Answer)))
	if got := strings.TrimSpace(string(pasted)); got != compact.String() {
		t.Errorf("pasted, %s\nanswers %s\nnot     %s", recorded.Curl, got, compact.String())
	}

	// The administrator finds the order by its number, goes one step too far and back, and sends it; the buyer returns it, changes
	// their mind twice, and gets the money back.
	var number string
	b.run(`document.querySelector('h1').innerText.replace('주문 ', '')`, &number)
	b.click("^관리자$")
	b.click("^주문 관리$")
	b.see("h1", "주문 관리")
	b.tabTo("^주문번호$")
	b.do("Input.insertText", object{"text": number})
	b.press("Enter")
	b.until(`document.querySelectorAll('a.sheet').length === 1`, nil)
	b.resize(wide)
	b.click("^잠식 결제완료")
	choose("^발송 준비 시작$", "발송준비중")
	choose("^한 단계 되돌리기$", "결제완료")
	deliver()
	b.tabTo("^운송장 번호$")
	b.do("Input.insertText", object{"text": "0000-0000-0001"})
	b.press("Enter")
	b.see(".history", "택배 정보 수정")
	b.click("^나래$")
	b.see(".facts", "0000-0000-0001")
	choose("^반품 신청$", "반품요청중")
	choose("^반품 신청 철회$", "배송완료")
	choose("^반품 신청$", "반품요청중")
	b.click("^관리자$")
	choose("^반품 확인 · 환불$", "결제취소")

	// Two buyers want one painting. The first one's payment window closes before it reports the payment: the painting stays held
	// until the reconciler finds the payment. The second buyer orders another one.
	b.click("^가람$")
	b.click("^갤러리$")
	b.click("^담기 ‘첫눈’$")
	b.click("^나래$")
	order("첫눈")
	b.click("웹훅도 유실")
	b.see(".status", "결제미완료")
	b.see("#notice", "결과를 알리지 못한 채 꺼졌습니다")
	b.resize(wide)
	b.click("^가람$")
	order(regexp.QuoteMeta(odd))
	b.see("#notice", "다른 구매자가 결제 중인 작품이 있습니다")
	b.see(".gone-mark", "예약됨 ·")
	b.resize(phone)
	b.click("^빼기 ‘첫눈’$")
	b.see(".total", "109,000원")
	b.click("^지난 주문 정보 불러오기$")
	b.see("#notice", "지난 주문 정보를 불러왔습니다")
	b.click("주문하기$")
	b.click("^결제하기$")
	b.see(".status", "결제완료")
	b.click("^나래$")
	b.click("^내 주문$")
	b.click("^첫눈 결제미완료")
	b.see(".status", "결제미완료")
	s.later(s.config.hold)
	b.see(".status", "결제완료")
	b.see(".history", "자동 대사")
	b.click("^내 주문$")
	b.see(".counts", "결제완료")
	b.resize(phone)

	// Part of the money goes back in the gateway's console, with a notice. When the painting is delivered the card company takes
	// all of it back, and the notice is lost: the reconciler finds it, and the painting is off sale until it is back.
	b.click("^첫눈 결제완료")
	b.click("^1,000원 환불")
	b.see(".history", "일부 환불 · 1,000원")
	b.click("^관리자$")
	deliver()
	b.click("^알림을 잃어버림$")
	b.resize(phone)
	b.tabTo("^카드사 승인취소")
	b.press("Enter")
	b.see("#notice", "카드사 승인취소: 결제사에서 처리했습니다")
	b.see(".status", "배송완료")
	s.later(s.config.reconcile)
	b.see(".status", "결제취소")
	b.see("#notice", "자동 대사")
	b.see("#view", "판매를 재개합니다")
	b.click("^갤러리$")
	b.resize(phone)
	b.tabTo("^판매 재개 ‘첫눈’$")
	b.press("Enter")
	b.see("#notice", "판매 상태가 변경되었습니다")
	b.until(`!document.querySelector('#view').innerText.includes('판매 재개 ‘첫눈’')`, nil)

	// It is sold again, and now the card company refuses to refund it. The administrator pays the money back by other means.
	b.click("^나래$")
	order("첫눈")
	choose("^결제하기$", "결제완료")
	b.click("^앞으로 환불 거절")
	b.see(".payment", "결제사는 환불을 거절합니다")
	b.click("^결제 취소$")
	b.see("#notice", "환불이 아직 완료되지 않았습니다")
	s.later(time.Hour)
	s.later(time.Hour)
	b.click("^관리자$")
	b.click("^주문 관리$")
	b.see("h1", "주문 관리")
	b.run(`document.querySelector('[name=number]').value = ''`, nil)
	b.tabTo("^주문자·받는 분$")
	b.do("Input.insertText", object{"text": "홍길"})
	b.click("^막힌 환불만$")
	b.click("^찾기$")
	b.until(`document.querySelectorAll('a.sheet').length === 1`, nil)
	b.click("^첫눈 결제완료")
	b.see(".payment", "환불 시작")
	b.resize(phone)
	b.tabTo("^직접 환불한 것으로 기록$")
	b.press(" ")
	b.see(".status", "결제취소")
	b.see(".history", "직접 환불 · 구매자 취소 · 550,000원")

	// A virtual account is no way to pay: the service ends it. Into one that it has not heard of the money may come all the same,
	// and back it goes to an account alone.
	b.click("^나래$")
	order("흐르는 것들")
	b.click("^가상계좌 발급하기$")
	b.see("#pay-alert", "가상계좌로는 결제할 수 없어")
	choose("^가상계좌 발급 직후 창이 꺼짐", "결제미완료")
	b.see(".payment", "해지됨")
	b.click("^알림을 잃어버림$")
	choose("^가상계좌에 입금", "결제완료")
	b.click("^결제 취소$")
	b.see("#notice", "환불이 아직 완료되지 않았습니다")
	b.click("^관리자$")
	choose("^이 계좌로 환불$", "결제취소")
	b.resize(wide)

	// Of two paintings one is asked back, kept after all, and then cancelled alone.
	b.click("^나래$")
	order("잠식", "첫눈")
	choose("^결제하기$", "결제완료")
	b.click("^이 작품만 반품 신청 ‘잠식’$")
	b.see(".item", "반품 신청됨")
	b.resize(phone)
	b.click("^이 작품 반품 철회 ‘잠식’$")
	b.see(".history", "작품 반품 철회")
	b.click("^이 작품만 취소 ‘잠식’$")
	b.see(".item", "취소됨")
	b.see(".sums", "환불된 금액")
	b.see(".history", "작품 취소 · ")
	b.see(".status", "결제완료")
	b.resize(phone)

	// An order that is deleted is gone.
	b.click("^나래$")
	order("흐르는 것들")
	escape()

	// What the page said is what the books say: the orders by age, the payments by amount and end, what the gateway keeps.
	books := queryText(t, s.config.databaseURL,
		`SELECT string_agg(concat_ws(' ', total_price, status, ended), ', ' ORDER BY created_at, ended) FROM orders`)
	if want := "171000 5, 109000 -1 deleted, 109000 5, 550000 5, 109000 0, 550000 5, 1690000 5, 649000 0, 1690000 -1 deleted"; books != want {
		t.Errorf("orders: %s\nwant %s", books, want)
	}
	books = queryText(t, s.config.databaseURL,
		`SELECT string_agg(concat_ws(' ', amount, refunded, reason), ', ' ORDER BY amount, reason) FROM payments`)
	if want := "109000 109000 shop cancelled, 109000 0, 170000 170000 amount differs, 171000 171000 buyer cancelled, " +
		"550000 550000 buyer cancelled, 550000 550000 refunded at the gateway, 649000 99000, 1690000 1690000 buyer cancelled"; books != want {
		t.Errorf("payments: %s\nwant %s", books, want)
	}
	s.wantMismatches()
	if report := s.audit(); report.Ledger.Kept != 109000+550000 || report.Ledger.ByHand != 550000 || report.Gateway.Kept != 109000+550000+550000 {
		t.Errorf("the books have %+v, the gateway %+v", report.Ledger, report.Gateway)
	}

	// The refusals are those that the story is about: two refunds, another's order after a change of buyers, a payment too low, a
	// virtual account, a painting held.
	slices.Sort(b.refused)
	wanted := regexp.MustCompile(`^(DELETE /api/orders/\w+ 502, ){2}(GET /api/orders/\w+ 404, ){4}` +
		`PATCH /api/orders/pay 400, PATCH /api/orders/pay 409, POST /api/orders 409$`)
	if refused := strings.Join(b.refused, ", "); !wanted.MatchString(refused) {
		t.Errorf("refused: %s", refused)
	}
	if len(b.problems) > 0 {
		t.Errorf("the page did what no page should:\n%s", strings.Join(b.problems, "\n"))
	}
}

// addPage adds to the shop what only local development has.
func (s *shop) addPage() {
	s.t.Helper()
	env := &devEnv{gateway: s.fake.fakeGateway}
	check(s.t, env.setUp(s.t.Context(), s.server, strings.TrimPrefix(s.url, "http://"), io.Discard))
}

// The page sees an order's payments as the gateway has them, those too that the service knows nothing of.
func TestFakeGatewayListsPayments(t *testing.T) {
	g := newFakeGateway(nil)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /local/payments", g.listPayments)
	mux.HandleFunc("POST /local/payments/{imp_uid}", g.console)
	call := func(method, path, body string) (status int, answer string) {
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequest(method, "/local/payments"+path, strings.NewReader(body)))
		return w.Code, w.Body.String()
	}
	want := func(order string, payments ...string) {
		t.Helper()
		var list []struct {
			ImpUID  string `json:"imp_uid"`
			Status  string `json:"status"`
			Refused string `json:"refunds_refused"`
		}
		_, answer := call("GET", "?merchant_uid="+order, "")
		check(t, json.Unmarshal([]byte(answer), &list))
		got := []string{}
		for _, p := range list {
			got = append(got, strings.TrimSpace(p.ImpUID+" "+p.Status+" "+p.Refused))
		}
		if !slices.Equal(got, payments) {
			t.Errorf("of order %s: %q, want %q", order, got, payments)
		}
	}
	account := g.pay(fakePayment{MerchantUID: "a", Amount: 5900, Status: "ready", PayMethod: "vbank"})
	card := g.pay(fakePayment{MerchantUID: "a", Amount: 5900})
	other := g.pay(fakePayment{MerchantUID: "b", Amount: 5900})
	if status, answer := call("POST", "/"+card, `{"do":"refuse"}`); status != 200 {
		t.Error(answer)
	}
	want("a", account+" ready", card+" paid 카드사 거절")
	want("b", other+" paid")
	if _, answer := call("GET", "?merchant_uid=c", ""); strings.TrimSpace(answer) != "[]" {
		t.Errorf("of no order: %s", answer)
	}
	if err := g.refundInConsole(card, 0); err == nil {
		t.Error("refunded against the card company's word")
	}
	if status, _ := call("POST", "/imp_none", `{"do":"refuse"}`); status != 400 {
		t.Errorf("of no payment: %d", status)
	}
}

// Whatever a browser may send from pages of others, local development gives them neither a token nor a payment.
func TestLocalDevelopmentAnswersItsPageAlone(t *testing.T) {
	s := newShop(t, func(c *config) { c.local = true })
	env := &devEnv{gateway: s.fake.fakeGateway}
	check(t, env.setUp(t.Context(), s.server, "127.0.0.1:5000", io.Discard))
	const catalogue, payments, page = "GET /local/catalogue", "POST /local/payments", "GET /"
	for _, row := range []struct {
		call, host, origin, site string
		status                   int
	}{
		// Our own page.
		{page, "127.0.0.1:5000", "", "none", 200},
		{catalogue, "127.0.0.1:5000", "", "same-origin", 200},
		{catalogue, "localhost:5000", "", "same-origin", 200},
		{catalogue, "[::1]:5000", "", "same-origin", 200},
		{payments, "localhost:5000", "http://localhost:5000", "same-origin", 200},
		// A front end of CORS_ORIGINS.
		{payments, "localhost:5000", "https://lumiere.example", "cross-site", 200},
		{catalogue, "localhost:5000", "https://lumiere.example", "cross-site", 403},
		// The terminal.
		{payments, "127.0.0.1:5000", "", "", 200},
		{catalogue, "127.0.0.1:5000", "", "", 403},
		{"GET /api/products/cart-items", "127.0.0.1:5000", "", "", 200},
		// A page of another's.
		{payments, "127.0.0.1:5000", "https://else.example", "cross-site", 403},
		{payments, "127.0.0.1:5000", "null", "cross-site", 403},
		{payments, "127.0.0.1:5000", "http://127.0.0.1:8000", "same-site", 403},
		{payments, "127.0.0.1:5000", "http://localhost:5000", "cross-site", 403},
		{payments + "/imp_1", "127.0.0.1:5000", "https://else.example", "cross-site", 403},
		{catalogue, "127.0.0.1:5000", "", "cross-site", 403},
		{catalogue, "127.0.0.1:5000", "", "same-site", 403},
		{catalogue, "127.0.0.1:5000", "", "none", 403},
		// One whose name resolves to 127.0.0.1: the browser takes it for ours.
		{page, "else.example:5000", "", "none", 403},
		{catalogue, "else.example:5000", "", "same-origin", 403},
		{payments, "else.example:5000", "http://else.example:5000", "same-origin", 403},
		{"GET /api/products/cart-items", "else.example:5000", "", "same-origin", 403},
		{"GET /readyz", "localhost.else.example:5000", "", "same-origin", 403},
		{catalogue, "127.0.0.1", "", "same-origin", 403},
		{catalogue, "127.0.0.1:5001", "", "same-origin", 403},
		{catalogue, "", "", "same-origin", 403},
	} {
		method, path, _ := strings.Cut(row.call, " ")
		r := httptest.NewRequest(method, path, strings.NewReader(`{"merchant_uid":"1","amount":1}`))
		r.Host = row.host
		for name, value := range map[string]string{"Origin": row.origin, "Sec-Fetch-Site": row.site} {
			if value != "" {
				r.Header.Set(name, value)
			}
		}
		w := httptest.NewRecorder()
		s.server.ServeHTTP(w, r)
		if tokens := strings.Contains(w.Body.String(), "eyJ"); w.Code != row.status || tokens != (row.call == catalogue && row.status == 200) {
			t.Errorf("%+v: %d %s", row, w.Code, w.Body)
		}
	}
	if hosts := devHosts("127.0.0.1:80"); !slices.Contains(hosts, "localhost") || !slices.Contains(hosts, "localhost:80") {
		t.Errorf("at port 80: %v", hosts)
	}
}

func TestCacheDir(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_CACHE_HOME", filepath.Join(home, "cache"))
	dir, err := cacheDir()
	check(t, err)
	info, err := os.Stat(dir)
	check(t, err)
	if !strings.HasPrefix(dir, home) || info.Mode().Perm()&0o066 != 0 {
		t.Errorf("%s, %v", dir, info.Mode())
	}
}

// In local development the gateway lives in the running service; with none running the command starts its own.
func TestAuditInLocalDevelopment(t *testing.T) {
	heavy(t)
	cache := postgresDir(t)
	check(t, makeDir(cache))
	t.Setenv("XDG_CACHE_HOME", cache)
	t.Setenv("HOME", cache)
	dir, err := cacheDir()
	check(t, err)
	check(t, runPostgres(t, postgresConfig{dir: filepath.Join(dir, "postgres"), settings: unsafeSettings}).stop()) // make the cluster quickly
	nothingSet := func(string) string { return "" }
	audit := func() (string, error) {
		var out bytes.Buffer
		err := run(t.Context(), []string{"audit"}, nothingSet, nil, &out, io.Discard)
		return out.String(), err
	}

	c, err := readConfig(nothingSet, "")
	check(t, err)
	house, err := openDevEnv(t.Context(), &c, io.Discard)
	check(t, err)
	defer house.close()
	if out, err := audit(); err != nil || !strings.Contains(out, "0 of 0 orders") {
		t.Errorf("nothing sold yet: %v\n%s", err, out)
	}
	store, err := openStore(t.Context(), c.databaseURL, nil)
	check(t, err)
	painting, now := newTestID(), time.Now()
	_, err = importCatalogue(t.Context(), store, strings.NewReader("["+catalogueEntry(painting, "", "")+"]"))
	check(t, err)
	created, err := store.placeOrder(t.Context(), actor{kind: actorBuyer}, newOrder{id: newTestID(), userID: buyerA, number: newNumber(),
		productIDs: []string{painting}, prices: []int64{99000}, shippingPrice: 10000, total: 109000, deliveryInfo: "{}", ordererInfo: "{}",
		createdAt: now, hold: time.Hour, deliveryDetails: "{}"})
	check(t, err)
	store.close()
	impUID := house.gateway.pay(fakePayment{MerchantUID: created.orderID, Amount: 109000})
	for _, running := range []bool{true, false} {
		if out, err := audit(); !errors.Is(err, errUnbalanced) || !strings.Contains(out, impUID) {
			t.Errorf("service running %v: %v\n%s", running, err, out)
		}
		check(t, house.close())
	}
}

// browser is a headless Chromium with one page, driven as a person would drive it: by looking, clicking and typing. It
// is spoken to over two pipes in the DevTools protocol (chromedevtools.github.io/devtools-protocol), JSON messages with
// a NUL after each. Nothing runs beside the test: events are read on the way to a command's answer.
type browser struct {
	t        testing.TB
	commands *os.File
	answers  *os.File
	messages *bufio.Reader     // from answers
	session  string            // the page's
	last     int               // the id of the newest command
	methods  map[string]string // of the page's requests, by their id
	refused  []string          // answers of 400 and above: "PATCH /api/orders/pay 400"
	problems []string          // whatever a page must not do
	origin   string            // the only one that it may talk to
	log      string            // the file with what Chromium says
}

// openBrowser starts a Chromium that knows nothing of this machine's user, with a page that is empty yet and may talk to
// origin alone.
func openBrowser(t testing.TB, origin string) *browser {
	t.Helper()
	program := findTool(t, "chromium", "chromium-browser", "google-chrome", "google-chrome-stable",
		"/Applications/Chromium.app/Contents/MacOS/Chromium", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
	home, err := os.MkdirTemp("", "chromium") // not T.TempDir: what Chromium leaves behind for a moment is no failure
	check(t, err)
	log, err := os.Create(filepath.Join(home, "log"))
	check(t, err)
	theirCommands, commands, err := os.Pipe()
	check(t, err)
	answers, theirAnswers, err := os.Pipe()
	check(t, err)
	cmd := exec.Command(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic",
		"--disable-sync", "--disable-background-networking", "--disable-component-update", "--no-first-run", "--no-startup-window",
		"--lang=ko", "--user-data-dir="+home, "--remote-debugging-pipe")
	cmd.ExtraFiles = []*os.File{theirCommands, theirAnswers} // 3 and 4
	cmd.Env = append(os.Environ(), "HOME="+home)
	cmd.Stderr = log
	check(t, cmd.Start())
	for _, theirs := range []*os.File{theirCommands, theirAnswers, log} {
		theirs.Close()
	}
	t.Cleanup(func() {
		commands.Close() // it ends when its pipe does
		answers.Close()
		late := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
		cmd.Wait()
		late.Stop()
		os.RemoveAll(home)
	})
	b := &browser{t: t, commands: commands, answers: answers, messages: bufio.NewReader(answers), methods: map[string]string{},
		origin: origin, log: log.Name()}
	var target struct{ TargetID string }
	var attached struct{ SessionID string }
	check(t, json.Unmarshal(b.do("Target.createTarget", object{"url": "about:blank"}), &target))
	check(t, json.Unmarshal(b.do("Target.attachToTarget", object{"targetId": target.TargetID, "flatten": true}), &attached))
	b.session = attached.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log", "Network"} {
		b.do(domain+".enable", object{})
	}
	b.do("Emulation.setFocusEmulationEnabled", object{"enabled": true})
	return b
}

type object = map[string]any

// do has the browser carry out a command and answers its result.
func (b *browser) do(method string, params object) json.RawMessage {
	b.t.Helper()
	b.last++
	command, err := json.Marshal(object{"id": b.last, "method": method, "params": params, "sessionId": b.session})
	check(b.t, err)
	_, err = b.commands.Write(append(command, 0))
	check(b.t, err)
	check(b.t, b.answers.SetReadDeadline(time.Now().Add(2*time.Minute)))
	for {
		text, err := b.messages.ReadBytes(0)
		if err != nil {
			log, _ := os.ReadFile(b.log)
			b.t.Fatalf("%s %v: %v; Chromium said:\n%s", method, params, err, log)
		}
		var message struct {
			ID             int
			Method         string
			Params, Result json.RawMessage
			Error          *struct{ Message string }
		}
		check(b.t, json.Unmarshal(text[:len(text)-1], &message))
		switch {
		case message.ID == 0:
			b.watch(message.Method, message.Params)
		case message.ID == b.last && message.Error != nil:
			b.t.Fatalf("%s %v: %s", method, params, message.Error.Message)
		case message.ID == b.last:
			return message.Result
		}
	}
}

// watch notes what a page must not do, and which of its requests were refused.
func (b *browser) watch(method string, params json.RawMessage) {
	var event struct {
		RequestID, Type string
		Request         struct{ URL, Method string }
		Response        struct {
			URL    string
			Status int
		}
		Entry struct{ Source, Level string }
	}
	check(b.t, json.Unmarshal(params, &event))
	switch {
	case method == "Network.requestWillBeSent":
		b.methods[event.RequestID] = event.Request.Method
		if !strings.HasPrefix(event.Request.URL, b.origin+"/") && !strings.HasPrefix(event.Request.URL, "data:") {
			b.problems = append(b.problems, "a request to "+event.Request.URL)
		}
	case method == "Network.responseReceived" && event.Response.Status >= 400:
		path, _, _ := strings.Cut(strings.TrimPrefix(event.Response.URL, b.origin), "?")
		b.refused = append(b.refused, fmt.Sprint(b.methods[event.RequestID], " ", path, " ", event.Response.Status))
	case method == "Log.entryAdded" && event.Entry.Source == "network": // the same refusals again
	case method == "Log.entryAdded", method == "Runtime.exceptionThrown", method == "Network.loadingFailed",
		method == "Runtime.consoleAPICalled" && (event.Type == "error" || event.Type == "warning" || event.Type == "assert"):
		b.problems = append(b.problems, method+" "+string(params))
	}
}

// run evaluates an expression in the page, and waits for it when it is a promise; into is where its value goes, nil: nowhere.
func (b *browser) run(expression string, into any) {
	b.t.Helper()
	var answer struct {
		Result           struct{ Value json.RawMessage }
		ExceptionDetails *struct {
			Exception struct{ Description, Value string }
		}
	}
	text := b.do("Runtime.evaluate", object{"expression": expression, "awaitPromise": true, "returnByValue": true})
	check(b.t, json.Unmarshal(text, &answer))
	if e := answer.ExceptionDetails; e != nil {
		b.t.Fatal(cmp.Or(e.Exception.Description, e.Exception.Value))
	}
	if into != nil {
		check(b.t, json.Unmarshal(answer.Result.Value, into))
	}
}

// until waits for an expression to be truthy in a page that waits for nothing, and answers its value.
func (b *browser) until(expression string, into any) {
	b.t.Helper()
	b.run(fmt.Sprintf(`new Promise((resolve, reject) => {
		const end = performance.now() + 60000;
		(function look() {
			const found = document.querySelector('h1') && !document.querySelector('[aria-busy=true]') && (%s);
			if (found) resolve(found);
			else if (performance.now() > end) reject('not seen: ' + %q + '\n' +
				[...document.querySelectorAll('main, #notice, dialog')].map(e => e.innerText).join('\n'));
			else setTimeout(look, 20);
		})();
	})`, expression, expression), into)
}

// look is what the expressions below find things with.
const look = `
	const visible = e => e.checkVisibility({visibilityProperty: true, opacityProperty: true});
	const shown = selector => [...document.querySelectorAll(selector)].filter(visible);
	const name = e => ((e.labels?.[0] ?? e).innerText ?? '').replace(/\s+/g, ' ').trim();`

// see waits until an element that selector names shows the text.
func (b *browser) see(selector, text string) {
	b.t.Helper()
	b.until(fmt.Sprintf(`(() => {%s
		return shown(%q).some(e => e.innerText.includes(%q));
	})()`, look, selector, text), nil)
}

// click waits until a thing whose name matches the pattern can be hit, and clicks it.
func (b *browser) click(pattern string) {
	b.t.Helper()
	var at struct{ X, Y float64 }
	b.until(fmt.Sprintf(`(() => {%s
		for (const e of shown('a, button, label, summary').filter(e => new RegExp(%q).test(name(e)))) {
			e.scrollIntoView({block: 'center'});
			const box = e.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
			if (e.contains(document.elementFromPoint(x, y))) return {x, y};
		}
	})()`, look, pattern), &at)
	for _, kind := range []string{"mouseMoved", "mousePressed", "mouseReleased"} {
		b.do("Input.dispatchMouseEvent", object{"type": kind, "x": at.X, "y": at.Y, "button": "left", "clickCount": 1})
	}
}

// press presses a key.
func (b *browser) press(key string) {
	b.t.Helper()
	code := map[string]int{"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowRight": 39}[key]
	text := map[string]string{"Enter": "\r", " ": " "}[key]
	b.do("Input.dispatchKeyEvent", object{"type": "keyDown", "key": key, "windowsVirtualKeyCode": code, "text": text})
	b.do("Input.dispatchKeyEvent", object{"type": "keyUp", "key": key, "windowsVirtualKeyCode": code})
}

// fillCart puts paintings of the gallery into the cart, and shows it.
func (b *browser) fillCart(titles ...string) {
	b.t.Helper()
	b.click("^갤러리$")
	for _, title := range titles {
		b.click("^담기 ‘" + title + "’$")
		b.see("#notice", "담았습니다")
	}
	b.click("^장바구니")
	b.see("h1", "장바구니")
}

// tabTo presses Tab until the thing whose name matches the pattern has the focus. On the way the focus must be seen.
func (b *browser) tabTo(pattern string) {
	b.t.Helper()
	b.until("true", nil)
	for range 200 {
		b.press("Tab")
		var focus struct {
			Name         string
			Found, Shown bool
		}
		b.run(fmt.Sprintf(`(() => {%s
			const e = document.activeElement, ring = e.type === 'radio' ? e.nextElementSibling : e, box = ring.getBoundingClientRect();
			const outlined = getComputedStyle(ring).outlineStyle === 'solid' && box.bottom > 0 && box.top < innerHeight;
			return {name: name(e).slice(0, 60), found: new RegExp(%q).test(name(e)), shown: e === document.body || outlined};
		})()`, look, pattern), &focus)
		if !focus.Shown {
			b.t.Errorf("nobody sees that %q has the focus", focus.Name)
		}
		if focus.Found {
			return
		}
	}
	b.t.Fatalf("no way to %q with the Tab key", pattern)
}

// Sizes of a window.
var (
	phone = object{"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": true}
	wide  = object{"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": false}
)

// fits makes the window this large, and looks whether what it shows fits in.
func (b *browser) fits(size object) {
	b.t.Helper()
	b.do("Emulation.setDeviceMetricsOverride", size)
	b.run(`new Promise(requestAnimationFrame)`, nil) // by then the page knows
	var shown struct {
		Title, Text string
		Width       int
	}
	b.until(`({title: document.title, text: document.body.innerText, width: document.documentElement.scrollWidth})`, &shown)
	if odd := regexp.MustCompile(`\[object|undefined|NaN|Invalid`).FindString(shown.Text); odd != "" {
		b.t.Errorf("%s says %q", shown.Title, odd)
	}
	if shown.Width > size["width"].(int) {
		b.t.Errorf("%s is %d wide on a screen of %d", shown.Title, shown.Width, size["width"])
	}
}

// resize makes the window this large, the phone's or the wide one's; what it shows must fit both.
func (b *browser) resize(to object) {
	b.t.Helper()
	other := phone
	if to["width"] == phone["width"] {
		other = wide
	}
	b.fits(other)
	b.fits(to)
}
