package main

import (
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"
)

// adminOrder is an order in the desk's list: whole, and with its buyer spelled out.
type adminOrder struct {
	Result          orderResult     `json:"result"`
	DeliveryInfo    json.RawMessage `json:"deliveryInfo"`
	DeliveryDetails json.RawMessage `json:"deliveryDetails,omitempty"`
	OrdererInfo     json.RawMessage `json:"ordererInfo"`
	ID              string          `json:"_id"`
	User            adminOrderUser  `json:"user"`
	OrderItems      json.RawMessage `json:"orderItems"`
	ShippingPrice   int64           `json:"shippingPrice"`
	TotalPrice      int64           `json:"totalPrice"`
}

// adminOrderUser is a buyer as the orderer wrote himself.
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
	page := pageNumber(r)
	orders, count, err := s.store.listAllOrders(r.Context(), filter, (page-1)*adminPageSize, adminPageSize)
	if err != nil {
		return nil, err
	}
	answer := adminOrders{Orders: make([]adminOrder, len(orders)), Page: page, Pages: pagesOf(count, adminPageSize)}
	for i, o := range orders {
		user := adminOrderUser{ID: o.userID, Name: o.ordererName}
		user.General.Email = o.ordererEmail
		answer.Orders[i] = adminOrder{o.result(), o.deliveryInfo, o.deliveryDetails, o.ordererInfo, o.id, user, o.items, o.shippingPrice, o.total}
	}
	return answer, nil
}

// advanceMessages say where PATCH /api/orders/{id} has moved an order to.
var advanceMessages = map[int]string{
	statusPreparing: "해당 주문이 발송 준비 중 단계로 변경되었습니다",
	statusShipping:  "해당 주문이 배송 중 단계로 변경되었습니다",
	statusDelivered: "해당 주문이 배송 완료 단계로 변경되었습니다",
	statusReturning: "해당 주문의 반품 요청 단계로 변경되었습니다",
}

// advanceOrder answers PATCH /api/orders/{id}: the administrator moves an order one step on, or its owner asks to return
// what has been sent. Two desks that click at once move it once: the step names the status it starts from.
func (s *server) advanceOrder(r *request) (any, error) {
	wanted, err := statusBody(r)
	if err != nil {
		return nil, err
	}
	id, ok := r.pathID()
	if !ok {
		return nil, statusError(http.StatusNotFound, messageNoSuchOrder)
	}
	state, err := s.store.findOrderState(r.Context(), id, r.caller)
	if errors.Is(err, errNotFound) {
		return nil, statusError(http.StatusNotFound, messageNoSuchOrder)
	} else if err != nil {
		return nil, err
	}
	s.settler.testHook("state read", id)
	wrongStep := statusError(http.StatusBadRequest, "변경실패, 진행 단계가 알맞지 않습니다")
	if wanted == nil {
		return nil, wrongStep
	}
	onward := *wanted >= statusPreparing && *wanted <= statusDelivered
	returned := *wanted == statusReturning && state.status >= statusPreparing && state.status <= statusDelivered
	switch {
	case onward && !r.caller.admin:
		return nil, statusError(http.StatusForbidden, messageAdmin)
	case onward && state.status == *wanted-1, returned:
		err = s.store.advance(r.Context(), r.actor(), id, state.status, *wanted, s.now())
	default:
		return nil, wrongStep
	}
	if errors.Is(err, errStale) {
		return nil, wrongStep
	} else if err != nil {
		return nil, err
	}
	return message{advanceMessages[*wanted]}, nil
}
