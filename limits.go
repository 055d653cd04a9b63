package main

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// limiter bounds what strangers can make the service ask of the gateway: reports and notices of payments are open to
// everybody, and each means a look-up.
//
// A look-up is wasted when it finds no money of ours, or repeats one just made. Each client pays for what he wastes: after a
// few his look-ups share a few slots, after many he is refused for a while. Once very many were wasted in all, everybody
// who wasted any is refused. A payment that is true costs nothing, so that neither the gateway's notices nor many buyers
// behind one address are ever refused for their number. However many addresses a flood has, it leaves slots to buyers who
// report with their token.
//
// What is refused is not lost: the reconciler asks about every order at its hold's end.
type limiter struct {
	now   func() time.Time
	slots [len(tierSlots)]chan struct{} // by tier: a look-up takes one of its tier's and one of each before

	mu        sync.Mutex
	lookUps   recent[string, lastLookUp] // by imp_uid
	penalties recent[client, bucket]
	total     bucket
}

// client is who is charged: the buyer when he is signed in, else the address.
type client struct {
	buyer   string
	address netip.Prefix
}

// Tiers of clients.
const (
	tierBuyer     = iota // signed in
	tierAnonymous        // anybody; so is the gateway with its notices
	tierThrottled        // who has just wasted some
)

// tierSlots are how many look-ups of a tier and those after it there may be at once. Of the gateway client's ten the
// strangers leave some to buyers, and these one to refunds, deletions and the reconciler.
var tierSlots = [...]int{tierBuyer: 9, tierAnonymous: 6, tierThrottled: 2}

const (
	// Two failed payments make nobody a suspect, and a hundred addresses are suspects after 300 look-ups.
	throttleAfter = 3
	// A look-up is done within 5 seconds; who has waited that long for a slot would only be kept longer.
	lookUpWait = 5 * time.Second
	// The browser may come before the gateway knows its payment, but hardly by so much.
	unknownFor = 3 * time.Second
	// Who wasted a look-up is refused for so long when too many are wasted in all.
	penaltyMemory = 10 * time.Minute
	// Twice as many clients and payments are remembered at most: a few MB.
	rememberMost = 10_000
)

var (
	// One client may waste 100 look-ups at once, an office full of clumsy buyers, and then one each 5 seconds.
	clientLimit = bucketLimit{burst: 100, refill: 5 * time.Second}
	// All together may waste 500 at once and then 5 a second: most of their slots, when the gateway takes a second to answer.
	totalLimit = bucketLimit{burst: 500, refill: 200 * time.Millisecond}
)

// errTooMany says that a look-up was refused; after clientLimit.forgiven it may be tried again.
var errTooMany = errors.New("too many look-ups that found nothing")

func newLimiter(now func() time.Time) *limiter {
	l := &limiter{
		now:       now,
		lookUps:   recent[string, lastLookUp]{keep: unknownFor, most: rememberMost},
		penalties: recent[client, bucket]{keep: penaltyMemory, most: rememberMost},
	}
	for tier, most := range tierSlots {
		l.slots[tier] = make(chan struct{}, most)
	}
	return l
}

// lastLookUp is how the newest look-up of a payment ended.
type lastLookUp struct {
	source  actorKind
	at      time.Time
	unknown bool
}

// lookUp has ask look up payment impUID for somebody. A payment that the gateway has just not known on the same source is
// errNoPayment without asking: another source may know more, the browser coming too early and then the gateway's notice.
// errTooMany: whoever asks is refused.
func (l *limiter) lookUp(
	ctx context.Context, who client, source actorKind, impUID string, ask func(context.Context, string) (gatewayPayment, error),
) (gatewayPayment, error) {
	tier, err := l.enter(ctx, who, source, impUID)
	if err != nil {
		return gatewayPayment{}, err
	}
	defer l.leave(tier, tierBuyer)
	p, err := ask(ctx, impUID)
	l.note(who, source, impUID, err)
	return p, err
}

// enter waits for the slots of who's tier. While somebody waits, others of his address find out about theirs: what is true
// of him counts when the slots are there.
func (l *limiter) enter(ctx context.Context, who client, source actorKind, impUID string) (tier int, err error) {
	wait, cancel := context.WithTimeout(ctx, lookUpWait)
	defer cancel()
	for {
		if tier, err = l.tierOf(who, source, impUID); err != nil {
			return tier, err
		}
		for next := tier; next >= tierBuyer; next-- {
			select {
			case l.slots[next] <- struct{}{}:
			case <-wait.Done():
				l.leave(tier, next+1)
				return tier, cmp.Or(ctx.Err(), errTooMany)
			}
		}
		if again, err := l.tierOf(who, source, impUID); err == nil && again == tier {
			return tier, nil
		}
		l.leave(tier, tierBuyer)
	}
}

// leave gives back the slots of the tiers from one down to the lowest that were taken.
func (l *limiter) leave(tier, lowest int) {
	for ; tier >= lowest; tier-- {
		<-l.slots[tier]
	}
}

// tierOf is who's, or why he gets no look-up.
func (l *limiter) tierOf(who client, source actorKind, impUID string) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if last, ok := l.lookUps.get(impUID); ok && last.unknown && last.source == source && now.Sub(last.at) < unknownFor {
		return 0, errNoPayment
	}
	own, ok := l.penalties.get(who)
	switch n := clientLimit.level(own, now); {
	case n > clientLimit.burst-1:
		return 0, errTooMany
	case ok && now.Sub(own.updated) < penaltyMemory && totalLimit.level(l.total, now) > totalLimit.burst-1:
		return 0, errTooMany
	case n >= throttleAfter:
		return tierThrottled, nil
	case who.buyer == "":
		return tierAnonymous, nil
	default:
		return tierBuyer, nil
	}
}

// note remembers how a look-up ended and charges what was wasted: no payment, a repetition, or a caller who hung up. The
// gateway's silence says nothing.
func (l *limiter) note(who client, source actorKind, impUID string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now, unknown := l.now(), errors.Is(err, errNoPayment)
	last, ok := l.lookUps.get(impUID)
	repeated := ok && last.source == source && now.Sub(last.at) < unknownFor
	if unknown || err == nil {
		l.lookUps.put(impUID, lastLookUp{source, now, unknown}, now)
	}
	if unknown || repeated || errors.Is(err, context.Canceled) {
		l.charge(who, now)
	}
}

// penalize charges who for a look-up that found a payment, but no money of ours.
func (l *limiter) penalize(who client) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.charge(who, l.now())
}

func (l *limiter) charge(who client, now time.Time) {
	own, _ := l.penalties.get(who)
	l.penalties.put(who, clientLimit.charge(own, now), now)
	l.total = totalLimit.charge(l.total, now)
}

// bucketLimit is how much may be wasted: so many at once, and one more whenever one is forgiven.
type bucketLimit struct {
	burst  float64
	refill time.Duration
}

// bucket are what was wasted and not forgiven, as of since, when something was last wasted.
type bucket struct {
	level   float64
	updated time.Time
}

// level is what is not forgiven by now.
func (a bucketLimit) level(r bucket, now time.Time) float64 {
	return max(0, r.level-float64(now.Sub(r.updated))/float64(a.refill))
}

// charge is r with one more wasted; never more than the most, so that it is forgiven soon.
func (a bucketLimit) charge(r bucket, now time.Time) bucket {
	return bucket{min(a.level(r, now)+1, a.burst), now}
}

// recent remembers values for at least keep, as long as there are not more than most. It has two halves; when the newer
// one is old or full, it takes the older one's place. What get answers may be older than keep.
type recent[K comparable, V any] struct {
	keep         time.Duration
	most         int
	newer, older map[K]V
	since        time.Time // when the newer half was begun
}

func (r *recent[K, V]) get(key K) (V, bool) {
	value, ok := r.newer[key]
	if !ok {
		value, ok = r.older[key]
	}
	return value, ok
}

func (r *recent[K, V]) put(key K, value V, now time.Time) {
	if r.newer == nil || len(r.newer) >= r.most || now.Sub(r.since) >= r.keep {
		r.newer, r.older, r.since = map[K]V{}, r.newer, now
	}
	r.newer[key] = value
}

// ---- whose request it is

// clientAddress is where r comes from, as far as it is known for sure: the peer, or, when that is one of our proxies, the
// last address in X-Forwarded-For that is none. An IPv6 client is its /64, since it can have all addresses of that.
func clientAddress(r *http.Request, proxies []netip.Prefix) netip.Prefix {
	peer, _ := parseAddress(r.RemoteAddr)
	forwarded := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for i := len(forwarded) - 1; i >= 0 && isAmong(peer, proxies); i-- {
		next, ok := parseAddress(forwarded[i])
		if !ok {
			break
		}
		peer = next
	}
	bits := 32
	if peer.Is6() {
		bits = 64
	}
	prefix, _ := peer.Prefix(bits) // without an address, as of a Unix socket, all are one
	return prefix
}

// parseAddress reads an IP address, with a port or without.
func parseAddress(text string) (netip.Addr, bool) {
	text = strings.TrimSpace(text)
	address, err := netip.ParseAddr(strings.Trim(text, "[]"))
	if err != nil {
		var withPort netip.AddrPort
		withPort, err = netip.ParseAddrPort(text)
		address = withPort.Addr()
	}
	return address.Unmap().WithZone(""), err == nil
}

func isAmong(address netip.Addr, prefixes []netip.Prefix) bool {
	for _, prefix := range prefixes {
		if prefix.Contains(address) {
			return true
		}
	}
	return false
}

// parseProxy reads an address or a network of addresses.
func parseProxy(text string) (netip.Prefix, error) {
	if prefix, err := netip.ParsePrefix(text); err == nil {
		return prefix.Masked(), nil
	}
	address, err := netip.ParseAddr(text)
	if err != nil {
		return netip.Prefix{}, err
	}
	address = address.Unmap()
	return netip.PrefixFrom(address, address.BitLen()), nil
}
