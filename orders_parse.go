package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"unicode/utf8"
)

// deliveryInfo, deliveryDetails and ordererInfo are the parts of an order that its buyer writes.
type deliveryInfo struct {
	Address         string `json:"address"`
	DetailedAddress string `json:"detailedAddress"`
	Receiver        string `json:"receiver"`
	ContactNum      string `json:"contactNum"`
}

type deliveryDetails struct {
	ReceiveAt      string `json:"receiveAt"`
	RequestedTerms string `json:"requestedTerms"`
}

type ordererInfo struct {
	Name        string `json:"name"`
	PhoneNum    string `json:"phoneNum"`
	Email       string `json:"email"`
	RefundTerms string `json:"refundTerms"`
}

// orderRequest is the body of POST /api/orders. What it says of a painting is compared with the catalogue, never kept.
type orderRequest struct {
	OrderItems []json.RawMessage `json:"orderItems"`
	Result     *struct {
		ID string `json:"id"`
	} `json:"result"`
	DeliveryInfo    *deliveryInfo    `json:"deliveryInfo"`
	DeliveryDetails *deliveryDetails `json:"deliveryDetails"`
	OrdererInfo     *ordererInfo     `json:"ordererInfo"`
	ShippingPrice   *int64           `json:"shippingPrice"`
	TotalPrice      *int64           `json:"totalPrice"`
}

// orderItemRequest is an element of orderItems. Image, title, artist and size are the catalogue's to say.
type orderItemRequest struct {
	Product string `json:"product"`
	Image   string `json:"image"`
	Title   string `json:"title"`
	Artist  string `json:"artist"`
	Size    string `json:"size"`
	Price   *int64 `json:"price"`
}

const (
	maxItems = 50  // paintings in an order
	maxText  = 500 // characters of a text
)

// invalidString reports whether a text is longer than maxText, or has a character that cannot be stored: NUL, or the U+FFFD
// that stands for a lone surrogate.
func invalidString(text string) bool {
	return strings.ContainsAny(text, "\x00\ufffd") || utf8.RuneCountInString(text) > maxText
}

// validateStrings trims the fields of an object. It returns a 400 that names the first field which is blank or invalid.
func validateStrings(object string, fields ...stringField) error {
	for _, f := range fields {
		*f.text = strings.TrimSpace(*f.text)
		name := joinField(object, f.name)
		switch {
		case *f.text == "" && !f.optional:
			return fieldError(name, "값이 필요합니다")
		case invalidString(*f.text):
			return fieldError(name, fmt.Sprintf("%d자 이내의 올바른 글자여야 합니다", maxText))
		}
	}
	return nil
}

type stringField struct {
	name     string
	text     *string
	optional bool
}

// parseOrder returns the order that the body of POST /api/orders asks for, or the 400 that names a field of it. shipping is
// the shop's shipping price in won.
func parseOrder(body []byte, shipping int64) (o newOrder, err error) {
	var in orderRequest
	if err := decodeJSON(body, "", &in); err != nil {
		return o, err
	}
	switch {
	case len(in.OrderItems) == 0:
		return o, statusError(http.StatusBadRequest, "주문할 상품 목록이 없습니다")
	case len(in.OrderItems) > maxItems:
		return o, fieldError("orderItems", fmt.Sprintf("한 번에 %d점까지 주문할 수 있습니다", maxItems))
	case in.Result == nil:
		return o, fieldError("result", "값이 필요합니다")
	case in.DeliveryInfo == nil:
		return o, fieldError("deliveryInfo", "값이 필요합니다")
	case in.OrdererInfo == nil:
		return o, fieldError("ordererInfo", "값이 필요합니다")
	case in.ShippingPrice == nil:
		return o, fieldError("shippingPrice", "값이 필요합니다")
	case in.TotalPrice == nil:
		return o, fieldError("totalPrice", "값이 필요합니다")
	}
	for i, raw := range in.OrderItems {
		name := fmt.Sprintf("orderItems[%d]", i)
		id, price, err := parseOrderItem(raw, name)
		if err != nil {
			return o, err
		}
		if slices.Contains(o.productIDs, id) {
			return o, fieldError(name+".product", "같은 작품이 두 번 들어 있습니다")
		}
		o.productIDs, o.prices = append(o.productIDs, id), append(o.prices, price)
	}
	if in.DeliveryDetails == nil {
		in.DeliveryDetails = &deliveryDetails{}
	}
	d, dd, w := in.DeliveryInfo, in.DeliveryDetails, in.OrdererInfo
	if err := errors.Join( // each names its first
		validateStrings("result", stringField{"id", &in.Result.ID, false}),
		validateStrings("deliveryInfo", stringField{"address", &d.Address, false}, stringField{"detailedAddress", &d.DetailedAddress, false},
			stringField{"receiver", &d.Receiver, false}, stringField{"contactNum", &d.ContactNum, false}),
		validateStrings("deliveryDetails", stringField{"receiveAt", &dd.ReceiveAt, true}, stringField{"requestedTerms", &dd.RequestedTerms, true}),
		validateStrings("ordererInfo", stringField{"name", &w.Name, false}, stringField{"phoneNum", &w.PhoneNum, false},
			stringField{"email", &w.Email, false}, stringField{"refundTerms", &w.RefundTerms, false}),
	); err != nil {
		return o, err
	}
	if !strings.Contains(w.Email, "@") {
		return o, fieldError("ordererInfo.email", "이메일 주소가 올바르지 않습니다")
	}
	if *in.ShippingPrice != shipping {
		return o, fieldError("shippingPrice", fmt.Sprintf("배송비는 %d원입니다", shipping))
	}
	o.number, o.shippingPrice, o.total = in.Result.ID, *in.ShippingPrice, *in.TotalPrice
	o.deliveryInfo, o.deliveryDetails, o.ordererInfo = marshalRaw(d), marshalRaw(dd), marshalRaw(w)
	return o, nil
}

// parseOrderItem returns the painting and the price of one element of orderItems. Its errors call the element name.
func parseOrderItem(raw []byte, name string) (id string, price int64, err error) {
	var item orderItemRequest
	if bytes.Equal(bytes.TrimSpace(raw), []byte("null")) {
		return "", 0, fieldError(name, "형식이 올바르지 않습니다")
	}
	if err := decodeJSON(raw, name, &item); err != nil {
		return "", 0, err
	}
	id, ok := parseID(item.Product)
	switch {
	case !ok:
		return "", 0, fieldError(name+".product", "상품 아이디가 올바르지 않습니다")
	case item.Price == nil:
		return "", 0, fieldError(name+".price", "값이 필요합니다")
	}
	return id, *item.Price, nil
}

// orderChange is the body of DELETE and PATCH /api/orders/{id}.
type orderChange struct {
	status   *int     // nil when none was sent
	parcel   *parcel  // nil when none was sent
	products []string // the paintings that it is about; nil: all
}

// parcel is how an order is sent.
type parcel struct {
	Carrier string `json:"carrier"`
	Number  string `json:"number"`
}

// changeBody returns the change in the body. No body is one without a status.
func changeBody(r *request) (change orderChange, err error) {
	body, err := readBody(r)
	if err != nil || len(bytes.TrimSpace(body)) == 0 {
		return change, err
	}
	var in struct {
		Status   json.RawMessage `json:"status"`
		Shipment *parcel         `json:"shipment"`
		Products json.RawMessage `json:"products"`
	}
	if err := decodeObject(body, &in); err != nil {
		return change, err
	}
	if in.Status != nil {
		if err := decodeJSON(in.Status, "status", &change.status); err != nil || change.status == nil {
			return change, fieldError("status", "정수여야 합니다")
		}
	}
	if in.Products != nil {
		if change.products, err = parseProducts(in.Products); err != nil {
			return change, err
		}
	}
	if change.parcel = in.Shipment; change.parcel != nil {
		if change.status == nil || *change.status != statusShipping {
			return change, fieldError("shipment", "배송 중(2) 단계와 함께 보내야 합니다")
		}
		return change, validateStrings("shipment", stringField{"carrier", &change.parcel.Carrier, false}, stringField{"number", &change.parcel.Number, false})
	}
	return change, nil
}
