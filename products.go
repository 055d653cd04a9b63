package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// cartItem is a painting as cart-items answers it and import reads it.
type cartItem struct {
	Info struct {
		Size   string `json:"size"`
		Canvas int    `json:"canvas"`
	} `json:"info"`
	ID     string `json:"_id"`
	Artist struct {
		ID   string `json:"_id"`
		Name string `json:"name"`
	} `json:"artist"`
	Title   string `json:"title"`
	Image   string `json:"image"`
	Price   int64  `json:"price"`
	InStock bool   `json:"inStock"`
}

// cartItems answers GET /api/products/cart-items: the paintings asked for, in that order, sold ones too.
func (s *server) cartItems(r *request) (any, error) {
	ids, err := productIDs(r.URL.RawQuery)
	if err != nil || len(ids) == 0 {
		return []cartItem{}, err
	}
	paintings, err := s.store.findPaintings(r.Context(), ids)
	if err != nil {
		return nil, err
	}
	items := make([]cartItem, 0, len(ids))
	for _, id := range ids {
		if p, ok := paintings[id]; ok {
			items = append(items, p.cartItem(r.caller.id))
		}
	}
	return items, nil
}

// cartItem returns the painting as the user with the id caller sees it.
func (p painting) cartItem(caller string) (item cartItem) {
	item.Info.Size, item.Info.Canvas = p.size, p.canvas
	item.ID, item.Title, item.Image, item.Price = p.id, p.title, p.image, p.price
	item.Artist.ID, item.Artist.Name = p.artistID, p.artistName
	item.InStock = p.inStock(caller)
	return item
}

// totalPriceAnswer is what total-price answers.
type totalPriceAnswer struct {
	ID         string `json:"_id"`
	TotalPrice int64  `json:"totalPrice"`
}

// totalPrice answers GET /api/products/total-price: what an order of these paintings would cost, shipping included.
func (s *server) totalPrice(r *request) (any, error) {
	ids, err := productIDs(r.URL.RawQuery)
	if err != nil {
		return nil, err
	}
	if len(ids) == 0 {
		return nil, fieldError("productId", "상품 아이디가 필요합니다")
	}
	paintings, err := s.store.findPaintings(r.Context(), ids)
	if err != nil {
		return nil, err
	}
	total := s.config.shipping
	for _, id := range ids {
		p, ok := paintings[id]
		if !ok {
			return nil, statusError(http.StatusNotFound, "productId: 존재하지 않는 작품입니다: "+id)
		}
		total += p.price
	}
	return totalPriceAnswer{"결제 예정 총 금액", total}, nil
}

// maxQueryIDs bounds the paintings of one question; a cart may hold more than an order.
const maxQueryIDs = 500

// productIDs returns the productId values of a query in the order given, each once, in lower case. Clients spell an array
// as productId=a&productId=b, productId[]=a&productId[]=b or productId[0]=a&productId[1]=b.
func productIDs(query string) ([]string, error) {
	var ids []string
	for pair := range strings.SplitSeq(query, "&") {
		key, value, _ := strings.Cut(pair, "=")
		key, err := url.QueryUnescape(key)
		if err != nil || !isProductID(key) {
			continue
		}
		value, err = url.QueryUnescape(value)
		id, ok := parseID(value)
		if err != nil || !ok {
			return nil, fieldError("productId", "상품 아이디가 올바르지 않습니다")
		}
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
		if len(ids) > maxQueryIDs {
			return nil, fieldError("productId", fmt.Sprintf("상품은 한 번에 %d개까지 조회할 수 있습니다", maxQueryIDs))
		}
	}
	return ids, nil
}

// isProductID reports whether key is productId, alone or with an index in brackets.
func isProductID(key string) bool {
	index, ok := strings.CutPrefix(key, "productId")
	return ok && (index == "" || (index[0] == '[' && index[len(index)-1] == ']'))
}

// ---- PATCH /api/products/{id}

// changeProduct answers PATCH /api/products/{id}: an administrator puts a painting on sale or takes it off sale.
func (s *server) changeProduct(r *request) (any, error) {
	var body struct {
		ForSale *bool `json:"forSale"`
	}
	if err := decodeBody(r, &body); err != nil {
		return nil, err
	}
	if body.ForSale == nil {
		return nil, fieldError("forSale", "값이 필요합니다")
	}
	unknown := statusError(http.StatusNotFound, "존재하지 않는 작품입니다")
	id, ok := parseID(r.PathValue("id"))
	if !ok {
		return nil, unknown
	}
	err := s.settler.changeSale(r.Context(), r.actor(), id, *body.ForSale)
	switch {
	case errors.Is(err, errNotFound):
		return nil, unknown
	case errors.Is(err, errSold):
		return nil, statusError(http.StatusConflict, "결제된 주문의 작품은 판매 상태를 변경할 수 없습니다")
	case errors.Is(err, errStale):
		return nil, statusError(http.StatusConflict, "작품이 변경되는 중입니다. 잠시 후 다시 시도해 주세요")
	case err != nil:
		return nil, err
	}
	return message{"판매 상태가 변경되었습니다"}, nil
}

// ---- import

// importCatalogue loads or updates paintings from a JSON array in the shape that cart-items answers, all or nothing. The
// error names the entry that is wrong.
func importCatalogue(ctx context.Context, store *store, file io.Reader) (importResult, error) {
	text, err := io.ReadAll(file)
	if err != nil {
		return importResult{}, err
	}
	var entries []json.RawMessage
	if err := json.Unmarshal(bytes.TrimPrefix(text, []byte("\ufeff")), &entries); err != nil {
		return importResult{}, fmt.Errorf("the catalogue is not a JSON array: %w", err)
	}
	if entries == nil {
		return importResult{}, errors.New("the catalogue is null, not a JSON array")
	}
	paintings := make([]painting, len(entries))
	seen := make(map[string]int, len(entries))
	for i, entry := range entries {
		p, err := parsePainting(entry)
		if err != nil {
			return importResult{}, fmt.Errorf("entry %d (_id %q): %w", i+1, p.id, err)
		}
		if first, ok := seen[p.id]; ok {
			return importResult{}, fmt.Errorf("entry %d (_id %q): the same _id as entry %d", i+1, p.id, first)
		}
		seen[p.id] = i + 1
		paintings[i] = p
	}
	return store.importPaintings(ctx, paintings)
}

// maxPrice bounds a painting's price, in won, so that no sum of prices overflows or leaves what JavaScript counts exactly.
const maxPrice = 100_000_000_000

// parsePainting reads one entry of a catalogue.
func parsePainting(entry []byte) (painting, error) {
	item := struct {
		cartItem
		InStock *bool `json:"inStock"` // a painting is never put on sale by an omission
	}{}
	err := json.Unmarshal(entry, &item)
	p := painting{id: item.ID, artistName: item.Artist.Name, title: item.Title, image: item.Image, size: item.Info.Size,
		canvas: item.Info.Canvas, price: item.Price}
	if err != nil {
		return p, err
	}
	var ok bool
	if p.id, ok = parseID(item.ID); !ok {
		return painting{id: item.ID}, errors.New("_id must be 24 hex digits")
	}
	if p.artistID, ok = parseID(item.Artist.ID); !ok {
		return p, errors.New("artist._id must be 24 hex digits")
	}
	for field, text := range map[string]string{"artist.name": p.artistName, "title": p.title, "image": p.image, "info.size": p.size} {
		if strings.TrimSpace(text) == "" || invalidString(text) {
			return p, fmt.Errorf("%s must be a text of 1 to %d characters", field, maxText)
		}
	}
	switch {
	case p.price <= 0 || p.price > maxPrice:
		return p, fmt.Errorf("price must be whole won between 1 and %d", int64(maxPrice))
	case p.canvas <= 0 || p.canvas > 1000:
		return p, errors.New("info.canvas must be between 1 and 1000")
	case item.InStock == nil:
		return p, errors.New("inStock is missing")
	}
	p.forSale = *item.InStock
	return p, nil
}

// errSold says that a paid order has the painting.
var errSold = errors.New("a paid order has the painting")

// changeSale puts a painting on sale or takes it off sale. An unpaid order that holds a painting taken off sale ends,
// unless its money is at the gateway: then it is paid. It returns errSold when a paid order has the painting, errNotFound when
// there is no such painting, and errStale when it kept changing hands.
func (t *settler) changeSale(ctx context.Context, by actor, id string, forSale bool) error {
	end, err := t.limits.begin(ctx, by.client)
	if err != nil {
		return err
	}
	defer end()
	// Each change names the order that has the painting. When that has changed, the painting is looked at anew.
	for range 5 {
		order, err := t.store.findPaintingOrder(ctx, id)
		if err != nil {
			return err
		}
		t.testHook("painting read", id)
		switch {
		case order.paid:
			return errSold
		case forSale || order.id == "":
			err = t.store.setForSale(context.WithoutCancel(ctx), id, order.id, forSale)
		default:
			if err = t.confirmUnpaid(ctx, by, order.id); err != nil {
				break // errStale: it is paid, and looked at anew
			}
			t.testHook("withdrawing", order.id)
			err = t.store.withdrawPainting(context.WithoutCancel(ctx), by, id, order.id, t.now())
		}
		if err == nil {
			t.log.Info("sale state changed", "painting", id, "for_sale", forSale, "administrator", by.id, "request", by.request)
		}
		if !errors.Is(err, errStale) {
			return err
		}
	}
	return errStale
}
