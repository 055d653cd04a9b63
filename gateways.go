package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"
)

// gateways are those that are configured.
type gateways []gateway

// errNoGateway says that a payment is at a gateway that is not configured.
var errNoGateway = errors.New("the payment's gateway is not configured")

// named returns the gateway of that name, or an error that is errNoGateway.
func (all gateways) named(name gatewayName) (gateway, error) {
	for _, g := range all {
		if g.name() == name {
			return g, nil
		}
	}
	return nil, fmt.Errorf("%w: %s", errNoGateway, name)
}

// find looks a payment up where it was made.
func (all gateways) find(ctx context.Context, name gatewayName, key paymentKey) (gatewayPayment, error) {
	g, err := all.named(name)
	if err != nil {
		return gatewayPayment{}, err
	}
	return g.find(ctx, key)
}

// paymentsOf lists an order's payments at every gateway. After an error of a gateway that does not respond, the list may lack
// some.
func (all gateways) paymentsOf(ctx context.Context, orderID string) ([]gatewayPayment, error) {
	return all.list(func(g gateway) ([]gatewayPayment, error) { return g.paymentsOf(ctx, orderID) })
}

// paidPaymentsOf lists those that are paid and not refunded, as paymentsOf does.
func (all gateways) paidPaymentsOf(ctx context.Context, orderID string) ([]gatewayPayment, error) {
	return all.list(func(g gateway) ([]gatewayPayment, error) { return g.paidPaymentsOf(ctx, orderID) })
}

// list joins the lists of every gateway. In its error what means that a gateway does not respond comes first.
func (all gateways) list(ask func(gateway) ([]gatewayPayment, error)) (payments []gatewayPayment, err error) {
	var unreadable []unreadablePayment
	for _, g := range all {
		found, problem := ask(g)
		payments = append(payments, found...)
		if these := unreadablePayments(problem); these != nil {
			unreadable = append(unreadable, these...)
		} else {
			err = errors.Join(err, problem)
		}
	}
	if err == nil {
		return payments, unreadableError("findAll", unreadable)
	}
	return payments, errors.Join(err, unreadableError("findAll", unreadable))
}

// lists returns the lists of every gateway.
func (all gateways) lists() (lists []gatewayList) {
	for _, g := range all {
		lists = append(lists, gatewayPaid.listAt(g.name()), gatewayCancelled.listAt(g.name()))
	}
	return lists
}

// gatewayObserver is told of every call to a gateway when it ends, except one whose caller went away: see iamportConfig.
type gatewayObserver func(gateway gatewayName, call, outcome string, err error, took time.Duration)

// newGateways returns clients of the gateways that c configures. transport and observe may be nil.
func newGateways(c config, now func() time.Time, transport http.RoundTripper, observe gatewayObserver) gateways {
	observed := func(gateway gatewayName) func(call, outcome string, err error, took time.Duration) {
		return func(call, outcome string, err error, took time.Duration) {
			if observe != nil {
				observe(gateway, call, outcome, err, took)
			}
		}
	}
	var all gateways
	if c.iamportKey != "" {
		all = append(all, newIamportClient(iamportConfig{
			url: c.iamportURL, key: c.iamportKey, secret: c.iamportSecret, sandbox: c.sandbox, taxFree: c.taxFree,
			now: now, transport: transport, observe: observed(gatewayIamport),
		}))
	}
	if c.portoneSecret != "" {
		all = append(all, newPortoneClient(portoneConfig{
			url: c.portoneURL, secret: c.portoneSecret, storeID: c.portoneStoreID, sandbox: c.sandbox,
			now: now, transport: transport, observe: observed(gatewayPortOne),
		}))
	}
	return all
}
