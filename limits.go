package main

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// limiter bounds the payment look-ups at the gateway that callers can cause. PATCH /api/orders/pay and the webhook are
// public, and each call of them means one look-up.
//
// A look-up is wasted when it finds no payment of ours or repeats one just made. Only wasted look-ups cost a client
// anything, in two ways:
//
//   - Each client has a leaky bucket of them. From throttleAfter on the client's look-ups share a few slots; while the
//     bucket is full they are refused.
//   - All clients together have one such bucket. While it is full, every client that wasted a look-up within
//     penaltyMemory is refused.
//
// Reports of real payments are free. So the gateway's webhooks are never refused for their number, and neither are many
// buyers behind one address. A flood from many addresses cannot take the slots that are kept for buyers with a token.
//
// A refused report loses nothing: the reconciler asks the gateway about every order when its hold ends.
//
// A limiter is safe for concurrent use.
type limiter struct {
	now func() time.Time
	// slots has a semaphore for each tier. A look-up takes a slot of its own tier and one of each tier before it.
	slots [len(tierSlots)]chan struct{}

	mu        sync.Mutex                 // guards what follows
	lookUps   recent[string, lastLookUp] // by imp_uid
	penalties recent[client, bucket]     // the clients' wasted look-ups
	total     bucket                     // the wasted look-ups of all clients
}

// client is the one that wasted look-ups are charged to: the buyer when the request has a valid token, else the address.
// The other field is zero.
type client struct {
	buyer   string
	address netip.Prefix // as clientAddress returns it
}

// The tiers of clients. A later tier has fewer slots.
const (
	tierBuyer     = iota // requests with a valid token
	tierAnonymous        // requests without one, the gateway's webhooks among them
	tierThrottled        // clients with throttleAfter or more wasted look-ups
)

// tierSlots is how many look-ups of a tier and of those after it may run at once. The gateway client has ten slots in all:
// anonymous callers leave some of them to buyers, and buyers leave one to refunds, deletions and the reconciler.
var tierSlots = [...]int{tierBuyer: 9, tierAnonymous: 6, tierThrottled: 2}

const (
	// throttleAfter is the number of wasted look-ups from which a client is throttled. Two failed payments are normal.
	throttleAfter = 3
	// lookUpWait is how long a look-up waits for its slots. A look-up itself takes at most as long.
	lookUpWait = 5 * time.Second
	// unknownFor is how long the gateway's answer that it has no such payment is reused, and how soon a second look-up of
	// one payment is a repetition. A browser may report a payment before the gateway knows it, but hardly by more.
	unknownFor = 3 * time.Second
	// penaltyMemory is how long a client that wasted a look-up is refused while the bucket of all clients is full.
	penaltyMemory = 10 * time.Minute
	// rememberMost is the size of each half of lookUps and of penalties: a few MB in all.
	rememberMost = 10_000
)

var (
	// clientLimit lets a client waste 100 look-ups at once, as an office full of clumsy buyers might, and then one every
	// 5 seconds.
	clientLimit = bucketLimit{burst: 100, refill: 5 * time.Second}
	// totalLimit lets all clients together waste 500 look-ups at once and then 5 a second. Those 5 occupy most of the
	// anonymous slots when the gateway takes a second to answer.
	totalLimit = bucketLimit{burst: 500, refill: 200 * time.Millisecond}
)

// errTooMany says that a look-up was refused. It may be tried again after clientLimit.refill.
var errTooMany = errors.New("too many look-ups that found nothing")

// newLimiter returns a limiter that has seen no look-up. now is the clock.
func newLimiter(now func() time.Time) *limiter {
	l := &limiter{
		now:       now,
		lookUps:   recent[string, lastLookUp]{keep: unknownFor, most: rememberMost},
		penalties: recent[client, bucket]{keep: penaltyMemory, most: rememberMost},
	}
	for tier, n := range tierSlots {
		l.slots[tier] = make(chan struct{}, n)
	}
	return l
}

// lastLookUp is the newest look-up of a payment.
type lastLookUp struct {
	source  actorKind // who reported the payment
	at      time.Time
	unknown bool // the gateway had no such payment
}

// lookUp returns the payment impUID as fetch does, once there is a slot for c. Beside fetch's errors it returns
//   - errNoPayment without a call of fetch, when the gateway did not know the payment within unknownFor and source is the
//     same. Another source may know more: after a browser that was too early comes the gateway's webhook.
//   - errTooMany when c is refused, or no slot was free within lookUpWait; ctx's error when ctx ended first.
func (l *limiter) lookUp(
	ctx context.Context, c client, source actorKind, impUID string, fetch func(context.Context, string) (gatewayPayment, error),
) (gatewayPayment, error) {
	tier, err := l.acquire(ctx, c, source, impUID)
	if err != nil {
		return gatewayPayment{}, err
	}
	defer l.release(tier, tierBuyer)
	p, err := fetch(ctx, impUID)
	l.record(c, source, impUID, err)
	return p, err
}

// acquire takes the slots of c's tier and returns the tier. While it waits, look-ups of the same client end and may change
// the client's tier, so the tier is checked again once the slots are taken.
func (l *limiter) acquire(ctx context.Context, c client, source actorKind, impUID string) (tier int, err error) {
	wait, cancel := context.WithTimeout(ctx, lookUpWait)
	defer cancel()
	for {
		if tier, err = l.tierOf(c, source, impUID); err != nil {
			return tier, err
		}
		for next := tier; next >= tierBuyer; next-- {
			select {
			case l.slots[next] <- struct{}{}:
			case <-wait.Done():
				l.release(tier, next+1)
				return tier, cmp.Or(ctx.Err(), errTooMany)
			}
		}
		if current, err := l.tierOf(c, source, impUID); err == nil && current == tier {
			return tier, nil
		}
		l.release(tier, tierBuyer)
	}
}

// release gives back one slot of each tier from tier down to lowest.
func (l *limiter) release(tier, lowest int) {
	for ; tier >= lowest; tier-- {
		<-l.slots[tier]
	}
}

// tierOf returns c's tier, or errNoPayment or errTooMany when there is to be no look-up: see lookUp.
func (l *limiter) tierOf(c client, source actorKind, impUID string) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if last, ok := l.lookUps.get(impUID); ok && last.unknown && last.source == source && now.Sub(last.at) < unknownFor {
		return 0, errNoPayment
	}
	own, ok := l.penalties.get(c)
	switch level := clientLimit.level(own, now); {
	case level > clientLimit.burst-1:
		return 0, errTooMany
	case ok && now.Sub(own.updated) < penaltyMemory && totalLimit.level(l.total, now) > totalLimit.burst-1:
		return 0, errTooMany
	case level >= throttleAfter:
		return tierThrottled, nil
	case c.buyer == "":
		return tierAnonymous, nil
	default:
		return tierBuyer, nil
	}
}

// record remembers a look-up that ended with err. It charges c when the look-up was wasted: there was no such payment, it
// was a repetition, or the caller hung up. A gateway that did not respond costs nothing.
func (l *limiter) record(c client, source actorKind, impUID string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now, unknown := l.now(), errors.Is(err, errNoPayment)
	last, ok := l.lookUps.get(impUID)
	repeated := ok && last.source == source && now.Sub(last.at) < unknownFor
	if unknown || err == nil {
		l.lookUps.put(impUID, lastLookUp{source, now, unknown}, now)
	}
	if unknown || repeated || errors.Is(err, context.Canceled) {
		l.charge(c, now)
	}
}

// penalize charges c for a look-up whose payment turned out to be none of ours.
func (l *limiter) penalize(c client) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.charge(c, l.now())
}

// charge adds one wasted look-up of c. l.mu must be held.
func (l *limiter) charge(c client, now time.Time) {
	own, _ := l.penalties.get(c)
	l.penalties.put(c, clientLimit.charge(own, now), now)
	l.total = totalLimit.charge(l.total, now)
}

// bucketLimit is the limit of a leaky bucket of wasted look-ups.
type bucketLimit struct {
	burst  float64       // how many an empty bucket takes
	refill time.Duration // how long one takes to leak away
}

// bucket is a leaky bucket. The zero bucket is empty.
type bucket struct {
	level   float64 // wasted look-ups in the bucket at updated
	updated time.Time
}

// level returns how many look-ups are in b now.
func (l bucketLimit) level(b bucket, now time.Time) float64 {
	return max(0, b.level-float64(now.Sub(b.updated))/float64(l.refill))
}

// charge returns b with one look-up more. The level stops at burst, so that look-ups under way when the bucket fills do not
// prolong the refusal.
func (l bucketLimit) charge(b bucket, now time.Time) bucket {
	return bucket{level: min(l.level(b, now)+1, l.burst), updated: now}
}

// recent is a map that forgets. A value is kept for at least keep, unless more than most others are put after it. It may be
// kept for longer, so callers that need an exact age store the time with the value.
//
// The map has two halves. When the newer half is keep old or has most values, it becomes the older half, and what was in the
// older half is forgotten.
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

// ---- the address of a request

// clientAddress returns the address that r is known to come from. That is the peer's, or, when the peer is one of proxies,
// the last address in X-Forwarded-For that is not one of them. An IPv6 address is returned as its /64, since a client
// usually has all addresses of one. A peer without an IP address, as on a Unix socket, has the zero prefix.
func clientAddress(r *http.Request, proxies []netip.Prefix) netip.Prefix {
	isProxy := func(address netip.Addr) bool {
		return slices.ContainsFunc(proxies, func(p netip.Prefix) bool { return p.Contains(address) })
	}
	address, _ := parseAddress(r.RemoteAddr)
	forwarded := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for _, text := range slices.Backward(forwarded) {
		next, ok := parseAddress(text)
		if !isProxy(address) || !ok {
			break
		}
		address = next
	}
	bits := 32
	if address.Is6() {
		bits = 64
	}
	prefix, _ := address.Prefix(bits)
	return prefix
}

// parseAddress returns the IP address in text, which may have a port. An IPv4 address mapped to IPv6 becomes IPv4, and an
// IPv6 zone is dropped.
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

// parseProxy returns the network in text, such as 10.0.0.0/8. A single address becomes a network of one.
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
