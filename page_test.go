package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestPage walks all of the page's ways, partly with the keyboard alone, on a phone and on a wide screen.
func TestPage(t *testing.T) {
	s := newShop(t, func(c *config) { c.local = true })
	house := &devEnv{gateway: s.fake}
	check(t, house.setUp(t.Context(), s.server, strings.TrimPrefix(s.url, "http://"), io.Discard))
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
		b.click("^갤러리$")
		for _, title := range titles {
			b.click("^담기 ‘" + title + "’$")
			b.see("#notice", "담았습니다")
		}
		b.click("^장바구니")
		b.see("h1", "장바구니")
		b.resize(phone)
		b.click("주문하기$")
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

	// The desk finds the order by its number and sends it; the buyer returns it, and gets the money back.
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
	b.click("^발송 준비 시작$")
	b.see(".status", "발송준비중")
	b.click("^발송$")
	b.see(".status", "배송중")
	b.click("^배송 완료로 표시$")
	b.see(".status", "배송완료")
	b.click("^나래$")
	b.click("^반품 신청$")
	b.see(".status", "반품요청중")
	b.click("^관리자$")
	b.click("^반품 확인 · 환불$")
	b.see(".status", "결제취소")

	// Two buyers want one painting. The first one's window dies, and nobody tells of his payment: it is held for him until
	// the reconciler finds it. The second one does with what he can have.
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

	// An order that is deleted is gone.
	order("흐르는 것들")
	escape()

	// What the page said is what the books say: the orders by age, the payments by amount and end, what the gateway keeps.
	books := queryText(t, s.config.databaseURL,
		`SELECT string_agg(concat_ws(' ', total_price, status, ended), ', ' ORDER BY created_at, ended) FROM orders`)
	if want := "171000 5, 109000 -1 deleted, 109000 5, 550000 0, 109000 0, 1690000 -1 deleted"; books != want {
		t.Errorf("orders: %s\nwant %s", books, want)
	}
	books = queryText(t, s.config.databaseURL,
		`SELECT string_agg(concat_ws(' ', amount, refunded, reason), ', ' ORDER BY amount, reason) FROM payments`)
	if want := "109000 109000 shop cancelled, 109000 0, 170000 170000 amount differs, 171000 171000 buyer cancelled, 550000 0"; books != want {
		t.Errorf("payments: %s\nwant %s", books, want)
	}
	kept := int64(0)
	for _, p := range s.fake.all() {
		kept += p.Amount - p.Cancelled
	}
	if kept != 109000+550000 {
		t.Errorf("the gateway keeps %d won", kept)
	}
	s.wantOneOwner()

	// The refusals are those that the story is about: another's order after a change of buyers, a payment too low, a painting held.
	slices.Sort(b.refused)
	wanted := regexp.MustCompile(`^(GET /api/orders/\w+ 404, ){4}PATCH /api/orders/pay 400, POST /api/orders 409$`)
	if refused := strings.Join(b.refused, ", "); !wanted.MatchString(refused) {
		t.Errorf("refused: %s", refused)
	}
	if len(b.problems) > 0 {
		t.Errorf("the page did what no page should:\n%s", strings.Join(b.problems, "\n"))
	}
}
