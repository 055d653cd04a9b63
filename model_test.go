package main

import (
	"cmp"
	"slices"
	"time"
)

// model is the contract of the API, about a shop in memory: who has which painting, where each order stands, what became of
// its money, and what each call is answered. It knows nothing of how the service does it.
type model struct {
	now       time.Time
	paintings []*modelPainting
	orders    []*modelOrder   // the oldest first
	payments  []*modelPayment // in the order in which their windows were opened
	trouble   trouble
}

type modelPainting struct {
	id      string
	forSale bool
	owner   *modelOrder // nil: in stock
}

type modelOrder struct {
	id, buyer, number string
	paintings         []*modelPainting
	status            int
	ended             string // deleted, replaced, expired
	cancelling        bool
	made, until       time.Time
	silent            time.Time // when the gateway last did not answer the reconciler about it
	history           []string
}

type modelPayment struct {
	impUID           string
	order            *modelOrder // nil: of another shop
	status           string      // at the gateway, before any refund: paid, ready, failed
	foreign, sandbox bool
	amount, back     int64     // at the gateway, back of amount was given back
	changed          time.Time // when money last moved at the gateway

	state, reason string // in our books; empty: unknown there
	booked        int64  // of back, what our books know
}

// trouble is how the gateway fails for the length of a step.
type trouble struct {
	name   string
	lookUp bool  // look-ups answer 500
	cancel fault // of every cancel
	status int   // what our answer is when a cancel has failed so
	after  bool  // look-ups after a cancel answer 500
}

var noTrouble = trouble{}

var troubles = []trouble{
	{name: "look-ups fail", lookUp: true},
	{name: "cancels fail", cancel: fault{before: answer500}, status: 503},
	{name: "cancels are dropped, and all is silent then", cancel: fault{before: dropConnection}, status: 503, after: true},
	{name: "cancels are refused", cancel: fault{before: answerRefusal(-1, "거절")}, status: 502},
	{name: "cancels are done and their answers lost", cancel: fault{after: dropConnection}, status: 503},
	{name: "cancels are done, and all is silent then", cancel: fault{after: answer500}, status: 503, after: true},
}

// reply is a status and the message with it.
type reply struct {
	status  int
	message string
}

var (
	gatewaySilent  = reply{503, "결제 서비스가 응답하지 않습니다. 잠시 후 다시 시도해 주세요"}
	nobodyAsks     = reply{401, "로그인이 필요합니다"}
	noSuchOrder    = reply{404, "해당 주문내역이 존재하지 않습니다"}
	paintingsTaken = reply{409, "이미 판매되었거나 다른 구매자가 결제 중인 작품이 있습니다"}
)

const orderTotal = 109000 // of one painting; each more is 99,000

func (o *modelOrder) total() int64 { return orderTotal + 99000*int64(len(o.paintings)-1) }
func (o *modelOrder) unpaid() bool { return o.status == -1 && o.ended == "" }

func (o *modelOrder) note(why string) { o.history = append(o.history, why) }

// seenBy reports whether the order exists for user: its buyer and the desk.
func (o *modelOrder) seenBy(user string) bool {
	return o != nil && o.ended == "" && (user == o.buyer || user == adminID)
}

// end lets an unpaid order go.
func (o *modelOrder) end(why string) {
	o.ended = why
	o.note(why)
	o.free()
}

func (o *modelOrder) free() {
	for _, p := range o.paintings {
		if p.owner == o {
			p.owner = nil
		}
	}
}

func (o *modelOrder) take() {
	for _, p := range o.paintings {
		p.owner = o
	}
}

// takenFor reports whether buyer cannot have the painting.
func (p *modelPainting) takenFor(buyer string) bool {
	return !p.forSale || p.owner != nil && !(p.owner.unpaid() && p.owner.buyer == buyer)
}

// live is the buyer's order that fits and has not ended, nil when there is none.
func (m *model) live(buyer string, fits func(*modelOrder) bool) *modelOrder {
	for _, o := range m.orders {
		if o.buyer == buyer && o.ended == "" && fits(o) {
			return o
		}
	}
	return nil
}

// create makes order o or says why not. The answer's order may be one that was made before.
func (m *model) create(o *modelOrder) (reply, *modelOrder) {
	twin := m.live(o.buyer, func(x *modelOrder) bool { return x.number == o.number })
	switch {
	case twin != nil && !sameSet(twin.paintingIDs(), o.paintingIDs()):
		return reply{409, "result.id: 다른 주문에 이미 사용된 주문 번호입니다"}, nil
	case twin != nil:
		return reply{201, "주문서 생성 성공"}, twin
	case slices.ContainsFunc(o.paintings, func(p *modelPainting) bool { return p.takenFor(o.buyer) }):
		return paintingsTaken, nil
	}
	if unpaid := m.live(o.buyer, (*modelOrder).unpaid); unpaid != nil {
		unpaid.end("replaced")
	}
	o.note("created")
	o.take()
	m.orders = append(m.orders, o)
	return reply{201, "주문서 생성 성공"}, o
}

func (o *modelOrder) paintingIDs() (ids []string) {
	for _, p := range o.paintings {
		ids = append(ids, p.id)
	}
	return ids
}

// moved reports whether money moved with the payment at all, ours or not.
func (p *modelPayment) moved() bool { return p.status == "paid" && !p.sandbox && p.order != nil }

// settle is what becomes of a payment that we look at.
func (m *model) settle(p *modelPayment) {
	o := p.order
	switch {
	case !p.moved() || p.state == "refunded":
	case p.back == p.amount:
		m.refunded(p, "refunded at the gateway")
	case p.state != "":
		if p.state == "kept" && p.back > p.booked {
			o.note("partly refunded")
		}
		p.booked = p.back
	case p.foreign || p.amount != o.total() || p.back > 0:
		m.refund(p, "amount differs")
	case o.status == 5:
		m.refund(p, "order cancelled")
	case o.status >= 0:
		m.refund(p, "order paid already")
	case o.ended != "" && !m.revivable(o):
		m.refund(p, "paintings gone")
	default:
		m.pay(o, p)
	}
}

// revivable reports whether an order that has ended can have its paintings again: all are in stock, or held by its
// buyer's own unpaid order. An order number has one live order, so another paid one with this number is in its way.
func (m *model) revivable(o *modelOrder) bool {
	return !slices.ContainsFunc(o.paintings, func(p *modelPainting) bool { return p.takenFor(o.buyer) }) &&
		m.live(o.buyer, func(x *modelOrder) bool { return x.number == o.number && x.status >= 0 }) == nil
}

func (m *model) pay(o *modelOrder, p *modelPayment) {
	why := "paid"
	if o.ended != "" {
		why = "revived"
		overlaps := func(p *modelPainting) bool { return slices.Contains(o.paintings, p) }
		if rival := m.live(o.buyer, (*modelOrder).unpaid); rival != nil &&
			(rival.number == o.number || slices.ContainsFunc(rival.paintings, overlaps)) {
			rival.end("replaced")
		}
		o.take()
	}
	o.status, o.ended = 0, ""
	o.note(why)
	p.state = "kept"
	o.note("payment kept")
}

// refund books that a payment's money goes back, and sends it back. It reports our answer's status: 200 when it is back.
func (m *model) refund(p *modelPayment, reason string) (status int) {
	p.state, p.reason, p.booked = "refunding", reason, p.back
	p.order.note("refunding: " + reason)
	return m.cancel(p)
}

// cancel is one attempt at a refund that is booked: the gateway compares what we believe is left of a payment in won.
func (m *model) cancel(p *modelPayment) (status int) {
	status = cmp.Or(m.trouble.status, 200)
	if m.trouble.cancel.before == nil {
		switch {
		case p.back == p.amount, p.booked != p.back && !p.foreign:
			status = cmp.Or(m.trouble.status, 502)
		default:
			p.back, p.changed = p.amount, m.now
		}
	}
	if status != 200 && (m.trouble.after || m.trouble.lookUp) {
		return status
	}
	m.settle(p)
	if p.state == "refunded" {
		return 200
	}
	return status
}

// refundAgain is a further attempt: it looks first.
func (m *model) refundAgain(p *modelPayment) (status int) {
	if m.trouble.lookUp {
		return 503
	}
	if m.settle(p); p.state == "refunded" {
		return 200
	}
	return m.cancel(p)
}

// refunded books that a payment is back, whole. The order goes with the payment it was paid with.
func (m *model) refunded(p *modelPayment, reason string) {
	cancels := p.state == "kept" || p.reason == "buyer cancelled" || p.reason == "shop cancelled"
	p.state, p.reason, p.booked = "refunded", cmp.Or(p.reason, reason), p.amount
	p.order.note("refunded: " + p.reason)
	if cancels {
		p.order.status, p.order.cancelling = 5, false
		p.order.note("cancelled")
		p.order.free()
	}
}

// report is a payment that the browser tells us of.
func (m *model) report(p *modelPayment) reply {
	switch {
	case m.trouble.lookUp:
		return gatewaySilent
	case p == nil || p.order == nil || p.sandbox:
		return reply{404, "imp_uid: 해당 결제 내역이 존재하지 않습니다"}
	}
	m.settle(p)
	switch {
	case p.state == "":
		return reply{400, "imp_uid: 결제가 완료되지 않았습니다"}
	case p.state == "kept":
		return reply{200, "결제 성공"}
	}
	switch p.reason {
	case "amount differs":
		return reply{400, "금액 불일치, 위조된 결제 시도"}
	case "paintings gone":
		return reply{409, "주문 시간이 지나 작품이 이미 판매되어 결제 금액을 환불합니다"}
	case "order paid already":
		return reply{409, "이미 결제된 주문이므로 중복된 결제 금액을 환불합니다"}
	case "order cancelled":
		return reply{409, "이미 취소된 주문이므로 결제 금액을 환불합니다"}
	default:
		return reply{400, "imp_uid: 취소된 결제입니다"}
	}
}

// noticed is report for the gateway itself, which is told no more than that we have seen it.
func (m *model) noticed(p *modelPayment) reply {
	if r := m.report(p); r == gatewaySilent {
		return r
	}
	return reply{200, "확인했습니다"}
}

// check settles all that the gateway has for an order, first what is paid and then what was given back, the oldest first.
// An unpaid order for which nothing is paid is left alone. False: the gateway does not answer.
func (m *model) check(o *modelOrder) bool {
	if m.trouble.lookUp {
		return false
	}
	var paid, back []*modelPayment
	for _, p := range m.payments {
		switch {
		case p.order != o || !p.moved():
		case p.back == 0:
			paid = append(paid, p)
		default:
			back = append(back, p)
		}
	}
	if !o.unpaid() || len(paid) > 0 {
		for _, p := range append(paid, back...) {
			m.settle(p)
		}
	}
	return true
}

// reconcile looks at an order whose time has come: an unpaid one ends when its hold is over, but not before the gateway
// was asked, or was silent for as long again.
func (m *model) reconcile(o *modelOrder, hold time.Duration) {
	unpaid := o.unpaid()
	looked := m.check(o)
	if !looked {
		o.silent = m.now
	}
	if unpaid && o.unpaid() && !m.now.Before(o.until) && (looked || !m.now.Before(o.made.Add(2*hold))) {
		o.end("expired")
	}
}

// delete is DELETE /api/orders/:id; a nil wanted is no status.
func (m *model) delete(user string, o *modelOrder, wanted *int) reply {
	switch {
	case user == "":
		return nobodyAsks
	case !o.seenBy(user):
		return noSuchOrder
	case !o.unpaid():
		return m.deletePaid(user, o, wanted)
	case !m.check(o):
		return gatewaySilent
	case !o.unpaid():
		return reply{409, "결제가 확인되어 주문이 완료되었습니다. 취소하려면 다시 요청해 주세요"}
	}
	o.end("deleted")
	return reply{200, "결제 오류로 임시 주문서를 삭제했습니다"}
}

func (m *model) deletePaid(user string, o *modelOrder, wanted *int) reply {
	cancel := wanted == nil || *wanted == 5
	switch {
	case !cancel && *wanted != 4:
		return reply{400, "진행 단계를 알 수 없습니다"}
	case o.status == 5:
		return reply{409, "이미 취소된 주문입니다"}
	case !cancel && o.status == 4:
		return reply{409, "이미 반품을 요청한 주문입니다"}
	case !cancel && o.cancelling:
		return reply{409, "결제 취소가 진행 중입니다"}
	case !cancel:
		o.status = 4
		o.note("return requested")
		return reply{200, "해당 주문의 반품 요청이 완료되었습니다"}
	case o.status == 4 && user != adminID:
		return reply{409, "반품을 요청한 주문입니다. 반품이 확인되면 환불됩니다"}
	case o.status != 0 && o.status != 4:
		return reply{409, "발송 준비가 시작된 주문은 취소할 수 없고 반품만 신청할 수 있습니다"}
	}
	if status := m.cancelOrder(user, o); status != 200 {
		return reply{status, "결제 취소를 접수했으나 환불이 아직 완료되지 않았습니다. 자동으로 다시 시도합니다"}
	}
	return reply{200, "해당 주문의 결제 취소가 완료되었습니다"}
}

func (m *model) cancelOrder(user string, o *modelOrder) (status int) {
	i := slices.IndexFunc(m.payments, func(p *modelPayment) bool {
		return p.order == o && (p.state == "kept" || p.reason == "buyer cancelled" || p.reason == "shop cancelled")
	})
	if o.cancelling {
		return m.refundAgain(m.payments[i])
	}
	o.cancelling = true
	o.note("cancel requested")
	reason := "buyer cancelled"
	if user == adminID {
		reason = "shop cancelled"
	}
	p := m.payments[i]
	p.state, p.reason = "refunding", reason
	o.note("refunding: " + reason)
	return m.cancel(p)
}

// advance is PATCH /api/orders/:id.
func (m *model) advance(user string, o *modelOrder, to int) reply {
	messages := map[int]string{1: "해당 주문이 발송 준비 중 단계로 변경되었습니다", 2: "해당 주문이 배송 중 단계로 변경되었습니다",
		3: "해당 주문이 배송 완료 단계로 변경되었습니다", 4: "해당 주문의 반품 요청 단계로 변경되었습니다"}
	onward := to >= 1 && to <= 3
	switch {
	case user == "":
		return nobodyAsks
	case !o.seenBy(user):
		return noSuchOrder
	case onward && user != adminID:
		return reply{403, "관리자만 사용할 수 있습니다"}
	case o.cancelling, onward && o.status != to-1, !onward && (to != 4 || o.status < 1 || o.status > 3):
		return reply{400, "변경실패, 진행 단계가 알맞지 않습니다"}
	}
	o.status = to
	o.note([]string{"preparing", "shipping", "delivered", "return requested"}[to-1])
	return reply{200, messages[to]}
}
