package main

import (
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// payingPage is a shop that takes V1 and V2, with its page in a browser.
func payingPage(t *testing.T, change ...func(*config)) (*shop, *browser) {
	t.Helper()
	s := newShop(t, append(change, withV2, func(c *config) {
		c.local = true
	})...)
	s.clock.nanoseconds.Store(time.Now().UnixNano()) // the commands have no other clock than the machine's
	s.addPage()
	b := openBrowser(t, s.url)
	b.do("Page.navigate", object{"url": s.url + "/"})
	b.resize(wide)
	return s, b
}

// wantRefused fails unless these calls of the page were refused, and it did nothing that no page should.
func (b *browser) wantRefused(pattern string) {
	b.t.Helper()
	slices.Sort(b.refused)
	if refused := strings.Join(b.refused, ", "); !regexp.MustCompile("^" + pattern + "$").MatchString(refused) {
		b.t.Errorf("refused: %s", refused)
	}
	if len(b.problems) > 0 {
		b.t.Errorf("the page did what no page should:\n%s", strings.Join(b.problems, "\n"))
	}
}

// The whole purchase and refund in the page, in all three ways to pay.
func TestPageInAllWaysToPay(t *testing.T) {
	heavy(t)
	s, b := payingPage(t)
	for _, way := range []struct {
		label, gateway string
		lost           string // what the gateway has of a payment that another buyer's was faster than
		charged        bool   // when it was lost
	}{
		{"V1", "V1", "전액 환불됨", true},
		{"V2", "V2", "전액 환불됨", true},
		{"V2 수동 승인", "V2", "인증됨, 청구되지 않음", false},
	} {
		t.Run(way.label, func(t *testing.T) {
			b.t = t
			// order sends the order form, and chooses how to pay.
			order := func(title string) {
				s.clock.advance(time.Second)
				b.fillCart(title)
				b.click("주문하기$")
				b.see("dialog", "결제하기")
				b.resize(phone)
				b.resize(wide)
				b.click("^" + way.label + "$")
			}
			// The card company takes its time with the refund of one of V2.
			order("잠식")
			b.click("^결제하기$")
			b.see(".status", "결제완료")
			b.see(".payment", way.gateway+" · 카드")
			b.see(".payment", "승인됨")
			b.resize(phone)
			b.resize(wide)
			if way.gateway == "V2" {
				b.click("^앞으로 환불을 늦게")
				b.see("#notice", "앞으로 환불을 늦게")
			}
			b.click("^결제 취소$")
			if way.gateway == "V2" {
				b.see(".payment", "109,000원 환불 중")
				b.see(".history", "환불 시작")
				b.click("^환불 완료")
			}
			b.see(".status", "결제취소")
			b.see(".payment", "전액 환불됨")

			// Another buyer is faster. Under manual approval that costs nobody anything.
			order("잠식")
			b.click("^그사이 다른 구매자가 먼저 결제함$")
			b.see("#pay-alert", "나래: 결제 성공")
			b.click("^결제하기$")
			b.see("#pay-alert", way.lost)
			b.see("#pay-alert", "주문 시간이 지나")
			b.see("#last-call", "GET /local/payments")
			payments := s.fake.all()
			lost := payments[len(payments)-1]
			if charged := !lost.PaidAt.IsZero(); charged != way.charged || lost.Cancelled != map[bool]int64{true: 109000}[charged] {
				t.Errorf("charged %v, refunded %d", charged, lost.Cancelled)
			}
			b.press("Escape")
			b.see(".gone-mark", "판매됨")
			b.click("^빼기 ‘잠식’$")
			s.wantBalanced()

			// The other one gives the painting back, for the next way.
			b.click("^나래$")
			b.click("^내 주문$")
			b.click("^잠식 결제완료")
			b.click("^결제 취소$")
			b.see(".status", "결제취소")
			b.click("^가람$")
			b.see("#view", "해당 주문 내역이 없습니다")
			s.wantBalanced()
		})
	}
	b.t = t
	// A forged amount is not charged either.
	b.fillCart("만월")
	b.click("주문하기$")
	b.click("^1,000원 적게 결제하기$") // the way is still chosen
	b.see("#pay-alert", "금액 불일치")
	b.see("#pay-alert", "인증됨, 청구되지 않음")
	b.click("^결제하기$")
	b.see(".status", "결제완료")
	books := queryText(t, s.config.databaseURL,
		`SELECT string_agg(concat_ws(' ', gateway, amount, refunded, reason), ', ' ORDER BY gateway, amount, reason) FROM payments`)
	want := strings.Repeat("iamport 109000 109000 buyer cancelled, ", 4) + "iamport 109000 109000 paintings gone, portone 72000 0, " +
		strings.Repeat("portone 109000 109000 buyer cancelled, ", 2) + "portone 109000 109000 paintings gone"
	if books != want {
		t.Errorf("payments: %s\nwant %s", books, want)
	}
	s.wantBalanced()
	// Two refunds that take their time, three windows that are late, another's order after a change of buyers, a forged amount.
	b.wantRefused(`(DELETE /api/orders/\w+ (404|502), ){5}(GET /api/orders/\w+ 404, ){3}PATCH /api/orders/pay 400(, PATCH /api/orders/pay 409){3}`)
}

// An order of three paintings, from the cart until its personal data is erased. The books balance and the shop's other systems are
// told at every step.
func TestOrderOfThree(t *testing.T) {
	heavy(t)
	l := newListener(t)
	s, b := payingPage(t, withListeners(l))
	t.Cleanup(s.notifier.transport.(*http.Transport).CloseIdleConnections)
	s.keepTargets()
	first := day(s.clock.Now())
	// told fails unless the listener gets these next, and the audit finds nothing.
	told := func(want ...string) {
		t.Helper()
		s.clock.advance(max(0, time.Since(s.clock.Now())))
		s.notify()
		var got []string
		for _, d := range l.take() {
			got = append(got, d.Type)
		}
		if !slices.Equal(got, want) {
			t.Errorf("told %q, want %q", got, want)
		}
		if out, err := s.auditCommand(); err != nil || !strings.Contains(out, "1 of 1 orders") {
			t.Fatalf("audit: %v\n%s", err, out)
		}
	}

	b.fillCart("만월", "잠식", "첫눈")
	b.see(".total", "711,000원")
	b.click("주문하기$")
	b.see("dialog", "711,000원")
	told("order.created")
	b.click("^V2 수동 승인$")
	b.click("^결제하기$")
	b.see(".status", "결제완료")
	var order string
	b.run(`location.hash.replace('#/orders/', '')`, &order)
	told("order.paid", "payment.kept")
	b.click("^이 작품만 취소 ‘만월’$")
	b.see(".item", "취소됨")
	b.see(".sums", "62,000원")
	told("order.part_cancel_requested", "payment.partly_refunded", "order.part_cancelled")

	b.click("^관리자$")
	b.click("^발송 준비 시작$")
	b.see(".status", "발송준비중")
	told("order.preparing")
	b.tabTo("^운송장 번호$")
	b.do("Input.insertText", object{"text": "0000-0000-0003"})
	b.click("^이 택배로 발송$")
	b.see(".status", "배송중")
	told("order.shipping")
	b.click("^배송 완료로 표시$")
	b.see(".status", "배송완료")
	told("order.delivered")

	b.click("^가람$")
	b.see(".facts", "0000-0000-0003")
	b.click("^이 작품만 반품 신청 ‘잠식’$")
	b.see(".item", "반품 신청됨")
	told("order.part_return_requested")
	b.click("^관리자$")
	b.click("^이 작품만 환불 ‘잠식’$")
	b.see(".sums", "161,000원")
	b.see(".status", "배송완료")
	told("order.part_cancel_requested", "payment.partly_refunded", "order.part_cancelled")

	days := []string{"-from", first, "-to", day(s.clock.Now())}
	var moved []string
	for _, line := range exported(t, s.asService, days...) {
		moved = append(moved, strings.Join(append(line[4:5], line[6:]...), " "))
	}
	if want := []string{"portone paid 711000", "portone refunded -62000", "portone refunded -99000"}; !slices.Equal(moved, want) {
		t.Errorf("moved: %q, want %q", moved, want)
	}
	var sold []string
	for _, line := range exported(t, s.asService, append(days, "-by", "painting")...) {
		sold = append(sold, line[4]+" "+line[9])
	}
	slices.Sort(sold)
	if want := []string{"만월 cancelled", "잠식 cancelled", "첫눈 delivered"}; !slices.Equal(sold, want) {
		t.Errorf("sold: %q, want %q", sold, want)
	}

	s.later(s.config.keep - time.Hour)
	if s.erasedOf(order) {
		t.Error("erased too early")
	}
	s.later(time.Hour)
	s.keepTargets()
	if !s.erasedOf(order) {
		t.Error("the personal data is there")
	}
	told("order.personal_data_erased")
	b.do("Page.reload", object{}) // with tokens of that day
	b.see(".history", "개인정보 파기")
	b.see(".sums", "161,000원")
	b.until(`!document.querySelector('#view').innerText.includes('홍길동')`, nil)
	b.wantRefused("")
}
