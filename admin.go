package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"unicode/utf8"
)

// adminOrder is an order in the administrator's list.
type adminOrder struct {
	Result          orderResult     `json:"result"`
	DeliveryInfo    json.RawMessage `json:"deliveryInfo"`
	DeliveryDetails json.RawMessage `json:"deliveryDetails"`
	OrdererInfo     json.RawMessage `json:"ordererInfo"`
	ID              string          `json:"_id"`
	User            adminOrderUser  `json:"user"`
	OrderItems      json.RawMessage `json:"orderItems"`
	ShippingPrice   int64           `json:"shippingPrice"`
	TotalPrice      int64           `json:"totalPrice"`
	RefundedPrice   int64           `json:"refundedPrice,omitempty"`
	orderDelivery
}

// adminOrderUser is a buyer with the name and e-mail that they gave for the order.
type adminOrderUser struct {
	ID      string `json:"_id"`
	Name    string `json:"name"`
	General struct {
		Email string `json:"email"`
	} `json:"general"`
}

// adminOrders is what GET /api/orders answers.
type adminOrders struct {
	Orders []adminOrder `json:"orders"`
	Page   int          `json:"page"`
	Pages  int          `json:"pages"`
}

// maxSearch is how many characters a search has at most; of a name it is as many that are looked at.
const maxSearch = 254

// listOrders answers GET /api/orders, the administrator's list.
func (s *server) listOrders(r *request) (any, error) {
	query := r.URL.Query()
	filter := orderFilter{number: strings.TrimSpace(query.Get("number"))}
	if invalidString(filter.number) || strings.ToValidUTF8(filter.number, "\ufffd") != filter.number {
		return nil, fieldError("number", "주문 번호가 올바르지 않습니다")
	}
	if text := query.Get("status"); text != "" {
		status, err := strconv.Atoi(text)
		if err != nil || status < statusUnpaid || status > statusCancelled {
			return nil, fieldError("status", "진행 단계를 알 수 없습니다")
		}
		filter.status = &status
	}
	if query.Has("q") {
		filter.search = strings.TrimSpace(query.Get("q"))
		if filter.search == "" {
			return nil, fieldError("q", "값이 필요합니다")
		}
		if invalidString(filter.search) || !utf8.ValidString(filter.search) || utf8.RuneCountInString(filter.search) > maxSearch {
			return nil, fieldError("q", fmt.Sprintf("%d자 이내의 올바른 글자여야 합니다", maxSearch))
		}
	}
	switch query.Get("refund") {
	case "":
	case "stuck":
		filter.refundStuck = true
	default:
		return nil, fieldError("refund", "stuck만 사용할 수 있습니다")
	}
	page := pageNumber(r)
	orders, count, err := s.store.listAllOrders(r.Context(), filter, (page-1)*adminPageSize, adminPageSize)
	if err != nil {
		return nil, err
	}
	answer := adminOrders{Orders: make([]adminOrder, len(orders)), Page: page, Pages: pagesOf(count, adminPageSize)}
	for i, o := range orders {
		user := adminOrderUser{ID: o.userID, Name: o.ordererName}
		user.General.Email = o.ordererEmail
		items, refunded := o.itemsNow()
		answer.Orders[i] = adminOrder{
			Result: o.result(), DeliveryInfo: o.deliveryInfo, DeliveryDetails: o.deliveryDetailsJSON(), OrdererInfo: o.ordererInfo,
			ID: o.id, User: user, OrderItems: items, ShippingPrice: o.shippingPrice, TotalPrice: o.total, RefundedPrice: refunded, orderDelivery: o.delivery(),
		}
	}
	return answer, nil
}

// advanceMessages say where PATCH /api/orders/{id} has moved an order to.
var advanceMessages = map[int]string{
	statusPaid:      "해당 주문이 결제 완료 단계로 변경되었습니다",
	statusPreparing: "해당 주문이 발송 준비 중 단계로 변경되었습니다",
	statusShipping:  "해당 주문이 배송 중 단계로 변경되었습니다",
	statusDelivered: "해당 주문이 배송 완료 단계로 변경되었습니다",
	statusReturning: "해당 주문의 반품 요청 단계로 변경되었습니다",
}

// advanceOrder answers PATCH /api/orders/{id}. An administrator moves an order one step on or back; the owner asks to return
// what has been sent, and either takes that back. Two that click at once move it once: a step names the status it starts from.
// A parcel for an order that has been sent corrects the one before and moves nothing.
func (s *server) advanceOrder(r *request, id string) (any, error) {
	change, err := changeBody(r)
	if err != nil {
		return nil, err
	}
	if change.products != nil {
		text, err := s.whileStale(func() (string, error) { return s.withdrawPartReturn(r, id, change) })
		return message{text}, err
	}
	state, err := s.store.findOrderState(r.Context(), id, r.caller, s.now())
	if err != nil {
		return nil, err
	}
	s.settler.testHook("state read", id)
	if err := mayAdvance(state, change, r.caller); err != nil {
		return nil, err
	}
	to, text := *change.status, advanceMessages[*change.status]
	if change.parcel != nil && state.status >= statusShipping {
		to, text = state.status, "해당 주문의 배송 정보가 변경되었습니다"
	}
	if err := s.store.advance(r.Context(), r.actor(), id, state.status, to, change.parcel, s.now()); errors.Is(err, errStale) {
		return nil, errWrongStep
	} else if err != nil {
		return nil, err
	}
	return message{text}, nil
}

var errWrongStep = statusError(http.StatusBadRequest, "변경실패, 진행 단계가 알맞지 않습니다")

// mayAdvance returns why an order in this state cannot change so at who's word, nil when it can.
func mayAdvance(state orderState, change orderChange, who caller) error {
	wanted := change.status
	switch {
	case state.ended:
		return errNotFound
	case wanted == nil:
		return errWrongStep
	case change.parcel != nil && !who.admin:
		return statusError(http.StatusForbidden, messageAdmin)
	case change.parcel != nil:
		if state.status < statusPreparing || state.status > statusDelivered {
			return errWrongStep
		}
	case *wanted == statusReturning:
		if state.status < statusPreparing || state.status > statusDelivered {
			return errWrongStep
		}
	case state.status == statusReturning:
		if *wanted != state.cameFrom {
			return errWrongStep
		}
	case *wanted < statusPaid || *wanted > statusDelivered:
		return errWrongStep
	case !who.admin:
		return statusError(http.StatusForbidden, messageAdmin)
	case state.status < statusPaid || state.status > statusDelivered || *wanted != state.status+1 && *wanted != state.status-1:
		return errWrongStep
	}
	return nil
}

// helpRefund answers POST /api/orders/{id}/refund: a refund that the gateway refuses is tried again to an account, or booked as
// paid back by other means.
func (s *server) helpRefund(r *request, id string) (any, error) {
	var body struct {
		ImpUID  string         `json:"imp_uid"`
		Account *refundAccount `json:"account"`
		ByHand  *string        `json:"byHand"`
	}
	if err := decodeBody(r, &body); err != nil {
		return nil, err
	}
	if !validImpUID(body.ImpUID) {
		return nil, fieldError("imp_uid", "결제 번호가 올바르지 않습니다")
	}
	var err error
	switch a := body.Account; {
	case (a == nil) == (body.ByHand == nil):
		return nil, fieldError("account", "account와 byHand 중 하나만 필요합니다")
	case a == nil:
		if err := validateStrings("", stringField{"byHand", body.ByHand, false}); err != nil {
			return nil, err
		}
		err = s.store.refundByHand(r.Context(), r.actor(), id, body.ImpUID, *body.ByHand, s.now())
	default:
		if err := validateStrings("account", stringField{"holder", &a.Holder, false}, stringField{"bank", &a.Bank, false}, stringField{"number", &a.Number, false}); err != nil {
			return nil, err
		}
		err = s.settler.refundToAccount(r.Context(), r.actor(), id, body.ImpUID, *a)
	}
	switch {
	case errors.Is(err, errNotDue):
		return nil, statusError(http.StatusConflict, "imp_uid: 환불할 금액이 없는 결제입니다")
	case errors.Is(err, errStale):
		return nil, statusError(http.StatusConflict, messageCancelling)
	case err != nil:
		return nil, whyRefundPending(err)
	}
	return message{"환불이 처리되었습니다"}, nil
}
