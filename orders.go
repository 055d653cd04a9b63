package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strconv"
)

// The statuses of an order (result.status).
const (
	statusUnpaid    = -1 // 결제미완료
	statusPaid      = 0  // 결제완료
	statusPreparing = 1  // 발송준비중
	statusShipping  = 2  // 배송중
	statusDelivered = 3  // 배송완료
	statusReturning = 4  // 반품요청중
	statusCancelled = 5  // 결제취소
)

const (
	messageNoSuchOrder     = "해당 주문내역이 존재하지 않습니다"
	messageOrderUnknown    = "해당 주문 내역이 없습니다"
	messageCancelling      = "결제 취소가 진행 중입니다"
	messageConfirming      = "결제를 확인하는 중입니다. 잠시 후 다시 시도해 주세요"
	messageDeleted         = "결제 오류로 임시 주문서를 삭제했습니다"
	messageCancelled       = "해당 주문의 결제 취소가 완료되었습니다"
	messageReturnRequested = "해당 주문의 반품 요청이 완료되었습니다"
	messageTooManyOrders   = "주문을 너무 자주 만들었습니다. 잠시 후 다시 시도해 주세요"
	messageRefundPending   = "결제 취소를 접수했으나 환불이 아직 완료되지 않았습니다. 자동으로 다시 시도합니다"
)

// ---- POST /api/orders

// orderCreated is the answer to a new order.
type orderCreated struct {
	Message string `json:"message"`
	OrderID string `json:"orderId"`
}

// createOrder answers POST /api/orders: an order before its payment, which holds its paintings.
func (s *server) createOrder(r *request) (any, error) {
	body, err := readBody(r)
	if err != nil {
		return nil, err
	}
	order, err := parseOrder(body, s.config.shipping)
	if err != nil {
		return nil, err
	}
	order.createdAt, order.hold = s.now(), s.config.hold
	order.id, order.userID = s.newID(order.createdAt), r.caller.id
	created, err := s.placeOrder(r, order)
	if err != nil {
		return nil, err
	}
	r.orderID = created.orderID
	switch {
	case created.numberUsed:
		return nil, statusError(http.StatusConflict, "result.id: 이미 결제된 주문에 사용된 주문 번호입니다")
	case created.confirming && created.orderID == "":
		return nil, statusError(http.StatusConflict, messageConfirming)
	case created.orderID != "":
		return orderCreated{"주문서 생성 성공", created.orderID}, nil
	}
	return nil, s.whyNotCreated(r, order, created.items)
}

// placeOrder makes a new order unless the buyer has made too many. Then it finds only the order that the same request has made
// before.
func (s *server) placeOrder(r *request, order newOrder) (createResult, error) {
	end, err := s.limits.ordering.take(r.Context(), order.userID)
	if err != nil {
		return createResult{}, err
	}
	defer end()
	// A buyer who hangs up is charged all the same: whether the order was made has to be known.
	ctx, by := context.WithoutCancel(r.Context()), actor{kind: actorBuyer, request: r.id}
	wait := s.limits.chargeOrder(order.userID)
	s.settler.testHook("ordering", order.id)
	if wait > 0 {
		id, err := s.store.renewHold(ctx, by, order)
		if err == nil && id == "" {
			err = &httpError{status: http.StatusTooManyRequests, body: message{messageTooManyOrders}, retryAfter: wait}
		}
		return createResult{orderID: id}, err
	}
	created, err := s.store.placeOrder(ctx, by, order)
	if !created.made {
		s.limits.giveBackOrder(order.userID)
	}
	return created, err
}

// whyNotCreated refuses an order that could not be made.
func (s *server) whyNotCreated(r *request, order newOrder, items []requestedItem) error {
	for i, item := range items {
		if !item.known {
			return statusError(http.StatusNotFound, fmt.Sprintf("orderItems[%d].product: 존재하지 않는 작품입니다", i))
		}
	}
	if taken := slices.DeleteFunc(slices.Clone(items), func(item requestedItem) bool { return item.free }); len(taken) > 0 {
		return s.whyTaken(r, taken)
	}
	total := order.shippingPrice
	for i, item := range items {
		if item.price != order.prices[i] {
			return fieldError(fmt.Sprintf("orderItems[%d].price", i), fmt.Sprintf("작품 가격은 %d원입니다", item.price))
		}
		total += item.price
	}
	return fieldError("totalPrice", fmt.Sprintf("주문 금액은 %d원입니다", total))
}

// takenProduct is a painting that the caller cannot have.
type takenProduct struct {
	ID     string    `json:"_id"`
	Title  string    `json:"title"`
	Reason string    `json:"reason"`          // "sold", or "held": by an unpaid order, or left to others by this buyer
	Until  *jsonTime `json:"until,omitempty"` // when that ends
}

// takenProducts is the body of the 409 for an order whose paintings are not all to be had.
type takenProducts struct {
	Message  string         `json:"message"`
	Products []takenProduct `json:"products"`
}

// whyTaken returns the 409 that says which paintings are taken and how. It reads them once more: the statement that lost a
// race still saw them free.
func (s *server) whyTaken(r *request, taken []requestedItem) error {
	ids := make([]string, len(taken))
	for i, item := range taken {
		ids[i] = item.id
	}
	paintings, err := s.store.findPaintings(r.Context(), ids)
	if err != nil {
		return err
	}
	body := takenProducts{Message: "이미 판매되었거나 다른 구매자가 결제 중인 작품이 있습니다"}
	for _, item := range taken {
		p := paintings[item.id]
		product := takenProduct{ID: item.id, Title: item.title, Reason: "sold"}
		switch {
		case item.until != nil && p.inStock(r.caller.id):
			product.Reason, product.Until = "held", (*jsonTime)(item.until)
		case p.forSale && (!p.taken || p.holder != ""): // free again by now: it was held a moment ago
			product.Reason, product.Until = "held", (*jsonTime)(p.heldUntil)
		}
		body.Products = append(body.Products, product)
	}
	return &httpError{status: http.StatusConflict, body: body}
}

// orderHandler handles a call about the order id.
type orderHandler func(r *request, id string) (any, error)

// ofOrder makes a route's handler of handle. Where there is no such order for the caller, and for a malformed id, the answer
// is 404 with the text notFound.
func ofOrder(notFound string, handle orderHandler) func(*request) (any, error) {
	return func(r *request) (any, error) {
		id, ok := parseID(r.PathValue("id"))
		if !ok {
			return nil, statusError(http.StatusNotFound, notFound)
		}
		r.orderID = id
		body, err := handle(r, id)
		if errors.Is(err, errNotFound) {
			return nil, statusError(http.StatusNotFound, notFound)
		}
		return body, err
	}
}

// ---- GET /api/orders/{id} and /latest

// orderResult is the part of an order that changes.
type orderResult struct {
	ID        string    `json:"id"`
	PaidAt    *jsonTime `json:"paidAt,omitempty"`
	Status    int       `json:"status"`
	UpdatedAt jsonTime  `json:"updatedAt"`
}

// orderDetail is an order as the page prints it.
type orderDetail struct {
	Result          orderResult     `json:"result"`
	DeliveryInfo    json.RawMessage `json:"deliveryInfo"`
	DeliveryDetails json.RawMessage `json:"deliveryDetails"`
	OrdererInfo     json.RawMessage `json:"ordererInfo"`
	ID              string          `json:"_id"`
	User            string          `json:"user"`
	OrderItems      json.RawMessage `json:"orderItems"`
	ShippingPrice   int64           `json:"shippingPrice"`
	TotalPrice      int64           `json:"totalPrice"`
	RefundedPrice   int64           `json:"refundedPrice,omitempty"`
	orderDelivery
}

// orderDelivery is how far an order has come to its buyer. What is not known is left out.
type orderDelivery struct {
	Shipment    *orderShipment `json:"shipment,omitempty"`
	DeliveredAt *jsonTime      `json:"deliveredAt,omitempty"`
}

// orderShipment is an order's parcel.
type orderShipment struct {
	Carrier   string    `json:"carrier"`
	Number    string    `json:"number"`
	ShippedAt *jsonTime `json:"shippedAt"`
}

func (o order) delivery() orderDelivery {
	d := orderDelivery{DeliveredAt: (*jsonTime)(o.deliveredAt)}
	if o.carrier != "" {
		d.Shipment = &orderShipment{o.carrier, o.parcelNumber, (*jsonTime)(o.shippedAt)}
	}
	return d
}

func (o order) result() orderResult {
	return orderResult{ID: o.number, PaidAt: (*jsonTime)(o.paidAt), Status: o.status, UpdatedAt: jsonTime(o.updatedAt)}
}

// deliveryDetailsJSON returns an order's deliveryDetails with both texts: earlier releases kept those only that were given,
// and clients read both.
func (o order) deliveryDetailsJSON() json.RawMessage {
	if bytes.Contains(o.deliveryDetails, []byte(`"receiveAt":`)) && bytes.Contains(o.deliveryDetails, []byte(`"requestedTerms":`)) {
		return o.deliveryDetails
	}
	var d deliveryDetails
	if o.deliveryDetails != nil {
		json.Unmarshal(o.deliveryDetails, &d) // the database holds what marshalRaw made
	}
	return json.RawMessage(marshalRaw(d))
}

// showOrder answers GET /api/orders/{id}.
func (s *server) showOrder(r *request, id string) (any, error) {
	o, err := s.store.findOrder(r.Context(), id, r.caller)
	if err != nil {
		return nil, err
	}
	items, refunded := o.itemsNow()
	return orderDetail{
		Result: o.result(), DeliveryInfo: o.deliveryInfo, DeliveryDetails: o.deliveryDetailsJSON(), OrdererInfo: o.ordererInfo,
		ID: o.id, User: o.userID, OrderItems: items, ShippingPrice: o.shippingPrice, TotalPrice: o.total, RefundedPrice: refunded, orderDelivery: o.delivery(),
	}, nil
}

// latestOrder is what GET /api/orders/latest answers: what an order form is filled with.
type latestOrder struct {
	DeliveryInfo    json.RawMessage `json:"deliveryInfo"`
	DeliveryDetails json.RawMessage `json:"deliveryDetails"`
	OrdererInfo     json.RawMessage `json:"ordererInfo"`
	ID              string          `json:"_id"`
}

// showLatest answers GET /api/orders/latest.
func (s *server) showLatest(r *request) (any, error) {
	o, err := s.store.findLatestOrder(r.Context(), r.caller.id)
	if errors.Is(err, errNotFound) {
		return nil, statusError(http.StatusNotFound, "최근 주문 내역이 없습니다")
	} else if err != nil {
		return nil, err
	}
	r.orderID = o.id
	return latestOrder{DeliveryInfo: o.deliveryInfo, DeliveryDetails: o.deliveryDetailsJSON(), OrdererInfo: o.ordererInfo, ID: o.id}, nil
}

// ---- DELETE /api/orders/{id}

// deleteOrder answers DELETE /api/orders/{id}: delete an unpaid order, cancel a paid one or some of its paintings, or ask for
// their return.
func (s *server) deleteOrder(r *request, id string) (any, error) {
	change, err := changeBody(r)
	if err != nil {
		return nil, err
	}
	text, err := s.whileStale(func() (string, error) { return s.endOrder(r, id, change) })
	return message{text}, err
}

// whileStale makes a change that names the state it starts from. When another change came first, it is made anew from the
// state that there is now.
func (s *server) whileStale(change func() (string, error)) (string, error) {
	for range 5 {
		if text, err := change(); !errors.Is(err, errStale) {
			return text, err
		}
	}
	return "", statusError(http.StatusConflict, "주문이 변경되는 중입니다. 잠시 후 다시 시도해 주세요")
}

// endOrder does what DELETE means for the order as it is, and says so. It returns errStale when the order is in another state
// by now.
func (s *server) endOrder(r *request, id string, wanted orderChange) (string, error) {
	state, err := s.store.findOrderState(r.Context(), id, r.caller, s.now())
	if err != nil {
		return "", err
	}
	s.settler.testHook("state read", id)
	cancel := wanted.status == nil || *wanted.status == statusCancelled
	part, err := state.leavesSome(wanted.products, cancel)
	switch {
	case state.ended:
		return messageDeleted, nil
	case err != nil:
		return "", err
	case state.status == statusUnpaid && part:
		return "", statusError(http.StatusConflict, "결제되지 않은 주문은 일부 작품만 취소할 수 없습니다")
	case state.confirming:
		return "", statusError(http.StatusConflict, messageConfirming)
	case state.status == statusUnpaid:
		return messageDeleted, s.deleteUnpaid(r, id)
	case !cancel && *wanted.status != statusReturning:
		return "", statusError(http.StatusBadRequest, "진행 단계를 알 수 없습니다")
	case state.status == statusCancelled:
		return "", statusError(http.StatusConflict, "이미 취소된 주문입니다")
	case !cancel && state.status == statusReturning:
		return "", statusError(http.StatusConflict, "이미 반품을 요청한 주문입니다")
	case !cancel && state.cancelling:
		return "", statusError(http.StatusConflict, messageCancelling)
	case part && !cancel:
		return messageReturnRequested, s.requestPartReturn(r, state, wanted.products)
	case !cancel && wanted.products != nil:
		return messageReturnRequested, s.store.changeReturning(r.Context(), r.actor(), state, statusReturning, nil, s.now())
	case !cancel:
		return messageReturnRequested, s.store.advance(r.Context(), r.actor(), id, state.status, statusReturning, nil, s.now())
	case part:
		return messageCancelled, s.cancelPart(r, state, wanted.products)
	case state.status == statusReturning && !r.caller.admin:
		return "", errReturnRequested
	case state.status != statusPaid && state.status != statusReturning:
		return "", errOnlyReturn
	default:
		return messageCancelled, s.cancelPaid(r, state)
	}
}

var (
	errReturnRequested = statusError(http.StatusConflict, "반품을 요청한 주문입니다. 반품이 확인되면 환불됩니다")
	errOnlyReturn      = statusError(http.StatusConflict, "발송 준비가 시작된 주문은 취소할 수 없고 반품만 신청할 수 있습니다")
)

// deleteUnpaid ends an unpaid order, unless its money has arrived.
func (s *server) deleteUnpaid(r *request, id string) error {
	err := s.settler.discardUnpaid(r.Context(), r.actor(), id)
	if !errors.Is(err, errStale) {
		return err
	}
	if state, err := s.store.findOrderState(r.Context(), id, r.caller, s.now()); err != nil || state.ended {
		return errStale
	}
	return statusError(http.StatusConflict, "결제가 확인되어 주문이 완료되었습니다. 취소하려면 다시 요청해 주세요")
}

// cancelPaid gives the money of a paid or returned order back.
func (s *server) cancelPaid(r *request, state orderState) error {
	var err error
	if !state.cancelling {
		err = s.settler.refundOrder(r.Context(), r.actor(), state.id, state.status, r.cancelReason())
	} else if err = s.settler.retryOrderRefund(r.Context(), r.actor(), state.id); errors.Is(err, errStale) {
		return s.whileCancelling(r, state)
	}
	return whyRefundPending(err)
}

// cancelReason returns why the money of an order goes back that the caller cancels.
func (r *request) cancelReason() string {
	if r.caller.admin {
		return reasonShopCancel
	}
	return reasonBuyerCancel
}

// whyRefundPending returns what the client sees of a refund that did not succeed at once. Any other error stays as it is.
func whyRefundPending(err error) error {
	if !errors.Is(err, errRefundPending) {
		return err
	}
	shown := toHTTPError(err)
	if shown.status == http.StatusInternalServerError || shown.status == http.StatusTooManyRequests {
		shown.status = http.StatusBadGateway // the gateway refused, or no slot was free to ask it
	}
	shown.body = message{messageRefundPending}
	return shown
}

// whileCancelling answers a second cancel while the first is under way. It returns errStale when that has just ended.
func (s *server) whileCancelling(r *request, state orderState) error {
	now, err := s.store.findOrderState(r.Context(), state.id, r.caller, s.now())
	if err == nil && reflect.DeepEqual(now, state) {
		return statusError(http.StatusConflict, messageCancelling)
	}
	return errStale
}

// ---- GET /api/orders/mine

// Orders to a page.
const (
	minePageSize  = 3
	adminPageSize = 10
)

// pageNumber returns the page that the query asks for, and 1 when that is no page.
func pageNumber(r *request) int {
	page, err := strconv.Atoi(r.URL.Query().Get("pageNumber"))
	if err != nil || page < 1 || page > 1<<40 {
		return 1
	}
	return page
}

// pagesOf returns how many pages n orders fill.
func pagesOf(n, perPage int) int { return (n + perPage - 1) / perPage }

// myOrder is an order in its buyer's list.
type myOrder struct {
	Result     orderResult     `json:"result"`
	ID         string          `json:"_id"`
	User       string          `json:"user"`
	OrderItems json.RawMessage `json:"orderItems"`
	TotalPrice int64           `json:"totalPrice"`
	Refunded   int64           `json:"refundedPrice,omitempty"`
	orderDelivery
}

// myOrders is what GET /api/orders/mine answers; Status counts all of the buyer's orders, not the page's.
type myOrders struct {
	Orders []myOrder `json:"orders"`
	Status struct {
		Paid   int `json:"paid"`
		Ready  int `json:"ready"`
		Coming int `json:"coming"`
		Done   int `json:"done"`
	} `json:"status"`
	Page  int `json:"page"`
	Pages int `json:"pages"`
}

// listMine answers GET /api/orders/mine.
func (s *server) listMine(r *request) (any, error) {
	page := pageNumber(r)
	orders, count, err := s.store.listBuyerOrders(r.Context(), r.caller.id, (page-1)*minePageSize, minePageSize)
	if err != nil {
		return nil, err
	}
	answer := myOrders{Orders: make([]myOrder, len(orders)), Page: page}
	for i, o := range orders {
		items, refunded := o.itemsNow()
		answer.Orders[i] = myOrder{Result: o.result(), ID: o.id, User: o.userID, OrderItems: items, TotalPrice: o.total, Refunded: refunded, orderDelivery: o.delivery()}
	}
	answer.Status.Paid, answer.Status.Ready = count[statusPaid], count[statusPreparing]
	answer.Status.Coming, answer.Status.Done = count[statusShipping], count[statusDelivered]
	all := 0
	for _, n := range count {
		all += n
	}
	answer.Pages = pagesOf(all, minePageSize)
	return answer, nil
}

// ---- GET /api/orders/{id}/history

// historyEntry is a line of an order's history. WhoID, an administrator, is shown to administrators only.
type historyEntry struct {
	At        jsonTime `json:"at"`
	Who       string   `json:"who"`
	WhoID     string   `json:"whoId,omitempty"`
	From      *int     `json:"from,omitempty"`
	To        *int     `json:"to,omitempty"`
	Why       string   `json:"why"`
	ImpUID    string   `json:"imp_uid,omitempty"`
	Amount    *int64   `json:"amount,omitempty"`
	Products  []string `json:"products,omitempty"`
	RequestID string   `json:"requestId,omitempty"`
}

// orderHistory is what GET /api/orders/{id}/history answers.
type orderHistory struct {
	History []historyEntry `json:"history"`
}

// showHistory answers GET /api/orders/{id}/history.
func (s *server) showHistory(r *request, id string) (any, error) {
	entries, err := s.store.historyOf(r.Context(), id, r.caller)
	if err != nil {
		return nil, err
	}
	answer := orderHistory{make([]historyEntry, len(entries))}
	for i, e := range entries {
		if !r.caller.admin {
			e.whoID = ""
		}
		answer.History[i] = historyEntry{At: jsonTime(e.at), Who: e.who, WhoID: e.whoID, From: e.from, To: e.to, Why: e.why,
			ImpUID: e.impUID, Amount: e.amount, Products: e.products, RequestID: e.requestID}
	}
	return answer, nil
}
