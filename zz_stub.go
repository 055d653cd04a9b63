package main

import (
	"context"
	"slices"
	"time"
)

type refundAccount struct {
	Holder string `json:"holder"`
	Bank   string `json:"bank"`
	Number string `json:"number"`
}

type listedPayment struct {
	gatewayPayment
	err error
}

func (g *iamportClient) movedBetween(ctx context.Context, status gatewayStatus, from, to time.Time, each func(listedPayment) error) error {
	return nil
}
func (g *iamportClient) endAccount(ctx context.Context, impUID string) error { return nil }
func (p gatewayPayment) awaitsDeposit() bool                                 { return false }
func (p gatewayPayment) moved() bool                                         { return p.status == gatewayPaid || p.status == gatewayCancelled }

func sameSet(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}

func asListed(ps []gatewayPayment) (all []listedPayment) {
	for _, p := range ps {
		all = append(all, listedPayment{gatewayPayment: p})
	}
	return all
}
