package main

import (
	"cmp"
	"context"
	"errors"
	"math"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// limiter bounds what callers can have the gateway asked, and how many orders a buyer can make. It is one replica's.
//
// A look-up at the gateway takes one of a few slots, by tier: a flood of one tier leaves slots to the tiers before it. The
// reconciler's look-ups take none. A signed-in client has few calls that ask the gateway under way at once.
//
// Anyone may report a payment, and each report means one look-up. It is wasted when it finds no payment of ours or repeats
// one just made. Only wasted look-ups cost a client anything, in two ways:
//
//   - Each client has a leaky bucket of them. From throttleAfter on the client's look-ups share a few slots; while the
//     bucket is full its reports are refused.
//   - All clients together have one such bucket. While it is full, every client but an order that wasted a look-up within
//     penaltyMemory is refused.
//
// Reports of real payments are free, those of another shop's among them, which are looked up once in foreignFor. So the
// gateway's webhooks are never refused for their number, and neither are many buyers behind one address. A notice that names
// an order of ours is charged to that order, so that what strangers report does not shut it out.
//
// A refused report loses nothing: the reconciler asks the gateway about every order when its hold ends.
//
// A limiter is safe for concurrent use.
type limiter struct {
	now func() time.Time
	// slots has a semaphore for each tier. A look-up takes a slot of its own tier and one of each tier before it.
	slots     [len(tierSlots)]chan struct{}
	wait      time.Duration // for slots
	asking    turns[client] // of signed-in clients and orders: calls that ask the gateway
	reporting turns[report] // so that the same report is looked up once when it comes twice at once
	ordering  turns[string] // of buyers: calls that make an order
	newOrders bucketLimit   // of each buyer

	mu        sync.Mutex                 // guards what follows
	lookUps   recent[string, lastLookUp] // by imp_uid
	foreign   recent[string, time.Time]  // by imp_uid: when another shop's payment was looked up
	penalties recent[client, bucket]     // the clients' wasted look-ups
	total     bucket                     // the wasted look-ups of all clients
	orders    recent[string, bucket]     // the buyers' new orders
}

// client is the one for whom the gateway is asked, and that wasted look-ups are charged to: the user when the request has a
// valid token, the order that a notice names, or else the address. The other fields are zero.
type client struct {
	user    string
	admin   bool // of user
	order   string
	address netip.Prefix // as clientAddress returns it
}

// client returns the client that a signed-in user is.
func (c caller) client() client { return client{user: c.id, admin: c.admin} }

// report is what a source says: that there is a payment.
type report struct {
	source actorKind
	impUID string
}

// The tiers of clients. A later tier has fewer slots.
const (
	tierAdministrator = iota
	tierBuyer         // requests with a valid token, and notices that name an order of ours
	tierAnonymous     // requests without one, the gateway's other notices among them
	tierThrottled     // clients with throttleAfter or more wasted look-ups
)

// tierSlots is how many look-ups of a tier and of those after it may run at once. The gateway client has ten slots in all:
// each tier leaves some to those before it, and administrators leave one to the reconciler.
var tierSlots = [...]int{tierAdministrator: 9, tierBuyer: 8, tierAnonymous: 6, tierThrottled: 2}

const (
	// throttleAfter is the number of wasted look-ups from which a client is throttled. Two failed payments are normal.
	throttleAfter = 3
	// lookUpWait is how long a look-up waits for its slots, and a call that asks the gateway for its turn. A look-up itself
	// takes at most as long.
	lookUpWait = 5 * time.Second
	// unknownFor is how long the gateway's answer that it has no such payment is reused, and how soon a second look-up of
	// one payment is a repetition. A browser may report a payment before the gateway knows it, but hardly by more.
	unknownFor = 3 * time.Second
	// foreignFor is how long another shop's payment is not looked up again. It does not become ours.
	foreignFor = time.Hour
	// penaltyMemory is how long a client that wasted a look-up is refused while the bucket of all clients is full.
	penaltyMemory = 10 * time.Minute
	// rememberMost is the size of each half of what a limiter remembers by payment, client or buyer: a few MB in all.
	rememberMost = 10_000
	// callsAtOnce is how many calls of a kind one client has under way at once. A double click is normal.
	callsAtOnce = 2
	// orderWait is how long a new order waits for those of the same buyer.
	orderWait = time.Second
	// orderMemory is how long a buyer's new orders are remembered. A full bucket has leaked away by then.
	orderMemory = 20 * time.Minute
)

var (
	// clientLimit lets a client waste 100 look-ups at once, as an office full of clumsy buyers might, and then one every
	// 5 seconds.
	clientLimit = bucketLimit{burst: 100, refill: 5 * time.Second}
	// totalLimit lets all clients together waste 500 look-ups at once and then 5 a second. Those 5 occupy most of the
	// anonymous slots when the gateway takes a second to answer.
	totalLimit = bucketLimit{burst: 500, refill: 200 * time.Millisecond}
	// newOrderLimit lets a buyer make 20 orders at once and then one a minute. Each stays in the database for good.
	newOrderLimit = bucketLimit{burst: 20, refill: time.Minute}
)

var (
	// errTooMany says that a look-up was refused. It may be tried again after clientLimit.refill.
	errTooMany = errors.New("too many look-ups that found nothing")
	// errBusy says that too much else was under way for too long.
	errBusy = errors.New("too many calls at once")
)

// newLimiter returns a limiter that has seen nothing yet. now is the clock.
func newLimiter(now func() time.Time) *limiter {
	l := &limiter{
		now:       now,
		wait:      lookUpWait,
		asking:    turns[client]{most: callsAtOnce, wait: lookUpWait},
		reporting: turns[report]{most: 1, wait: lookUpWait},
		ordering:  turns[string]{most: callsAtOnce, wait: orderWait},
		newOrders: newOrderLimit,
		lookUps:   recent[string, lastLookUp]{keep: unknownFor, most: rememberMost},
		foreign:   recent[string, time.Time]{keep: foreignFor, most: rememberMost},
		penalties: recent[client, bucket]{keep: penaltyMemory, most: rememberMost},
		orders:    recent[string, bucket]{keep: orderMemory, most: rememberMost},
	}
	for tier, n := range tierSlots {
		l.slots[tier] = make(chan struct{}, n)
	}
	return l
}

// begin waits for c's turn to make a call that asks the gateway. The caller calls end after it. A client without a token has
// as many turns as it likes. begin returns errBusy when no turn came within lookUpWait, and ctx's error when ctx ended first.
func (l *limiter) begin(ctx context.Context, c client) (end func(), err error) {
	if c.user == "" && c.order == "" {
		return func() {}, nil
	}
	return l.asking.take(ctx, c)
}

// lastLookUp is the newest look-up of a payment.
type lastLookUp struct {
	source  actorKind // who reported the payment
	at      time.Time
	unknown bool // the gateway had no such payment
}

// lookUp returns the payment impUID as find does, once there is a slot for c. Beside find's errors it returns
//   - errNotOurs without a call of find, when that was found within foreignFor.
//   - errNoPayment without a call of find, when the gateway did not know the payment within unknownFor and source is the
//     same. Another source may know more: after a browser that was too early comes the gateway's webhook.
//   - errTooMany when c is refused; errBusy when no slot was free within lookUpWait; ctx's error when ctx ended first.
func (l *limiter) lookUp(
	ctx context.Context, c client, source actorKind, impUID string, find func(context.Context) (gatewayPayment, error),
) (gatewayPayment, error) {
	end, err := l.reporting.take(ctx, report{source, impUID})
	if err != nil {
		return gatewayPayment{}, err
	}
	defer end()
	release, err := l.acquire(ctx, func() (int, error) { return l.reportTier(c, source, impUID) })
	if err != nil {
		return gatewayPayment{}, err
	}
	defer release()
	p, err := find(ctx)
	l.record(c, source, impUID, err)
	return p, err
}

// askFor returns what ask returns. Unless by is the reconciler, it waits for a slot of by's client first: it returns errBusy when
// none was free within lookUpWait, and ctx's error when ctx ended first.
func askFor[T any](ctx context.Context, l *limiter, by actor, ask func(context.Context) (T, error)) (found T, err error) {
	if by.kind != actorReconciler {
		release, err := l.acquire(ctx, func() (int, error) { return l.tier(by.client), nil })
		if err != nil {
			return found, err
		}
		defer release()
	}
	return ask(ctx)
}

// acquire takes the slots of a tier. The caller calls release when it needs them no more. While it waits, look-ups of the same
// client end and may change the client's tier, so the tier is checked again once the slots are taken.
func (l *limiter) acquire(ctx context.Context, tierOf func() (int, error)) (release func(), err error) {
	wait, cancel := context.WithTimeout(ctx, l.wait)
	defer cancel()
	for {
		tier, err := tierOf()
		if err != nil {
			return nil, err
		}
		for next := tier; next >= 0; next-- {
			select {
			case l.slots[next] <- struct{}{}:
			case <-wait.Done():
				l.release(tier, next+1)
				return nil, cmp.Or(ctx.Err(), errBusy)
			}
		}
		if current, err := tierOf(); err == nil && current == tier {
			return func() { l.release(tier, 0) }, nil
		}
		l.release(tier, 0)
	}
}

// release gives back one slot of each tier from tier down to lowest.
func (l *limiter) release(tier, lowest int) {
	for ; tier >= lowest; tier-- {
		<-l.slots[tier]
	}
}

// reportTier returns c's tier, or errNotOurs, errNoPayment or errTooMany when there is to be no look-up: see lookUp.
func (l *limiter) reportTier(c client, source actorKind, impUID string) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if at, ok := l.foreign.get(impUID); ok && now.Sub(at) < foreignFor {
		return 0, errNotOurs
	}
	if last, ok := l.lookUps.get(impUID); ok && last.unknown && last.source == source && now.Sub(last.at) < unknownFor {
		return 0, errNoPayment
	}
	own, ok := l.penalties.get(c)
	switch {
	case clientLimit.level(own, now) > clientLimit.burst-1:
		return 0, errTooMany
	case ok && c.order == "" && now.Sub(own.updated) < penaltyMemory && totalLimit.level(l.total, now) > totalLimit.burst-1:
		return 0, errTooMany
	}
	return c.tier(clientLimit.level(own, now)), nil
}

// tier returns c's tier.
func (l *limiter) tier(c client) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	own, _ := l.penalties.get(c)
	return c.tier(clientLimit.level(own, l.now()))
}

// tier returns the tier of a client with so many wasted look-ups.
func (c client) tier(wasted float64) int {
	switch {
	case wasted >= throttleAfter:
		return tierThrottled
	case c.admin:
		return tierAdministrator
	case c.user != "" || c.order != "":
		return tierBuyer
	default:
		return tierAnonymous
	}
}

// record remembers a look-up that ended with err. It charges c when the look-up was wasted: there was no such payment, it
// was a repetition, or the caller hung up. A gateway that did not respond costs nothing, and neither does another shop's payment.
func (l *limiter) record(c client, source actorKind, impUID string, err error) {
	if errors.Is(err, errNotOurs) {
		l.recordForeign(impUID)
		return
	}
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

// recordForeign remembers that a payment was looked up and is another shop's.
func (l *limiter) recordForeign(impUID string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.foreign.put(impUID, l.now(), l.now())
}

// penalize charges c for a look-up whose payment turned out to pay nothing.
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

// ---- new orders

// chargeOrder charges buyer for a new order, before the database is asked. When the bucket is full it charges nothing and returns
// how long it takes until there is room.
func (l *limiter) chargeOrder(buyer string) (wait time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	made, _ := l.orders.get(buyer)
	if over := l.newOrders.level(made, now) - (l.newOrders.burst - 1); over > 0 {
		return time.Duration(math.Ceil(over * float64(l.newOrders.refill)))
	}
	l.orders.put(buyer, l.newOrders.charge(made, now), now)
	return 0
}

// giveBackOrder undoes a chargeOrder after which no order was made.
func (l *limiter) giveBackOrder(buyer string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	made, _ := l.orders.get(buyer)
	l.orders.put(buyer, bucket{level: max(0, l.newOrders.level(made, now)-1), updated: now}, now)
}

// ---- what a limiter is made of

// turns bounds how many calls are under way at once for each key.
type turns[K comparable] struct {
	most int           // for a key
	wait time.Duration // for a turn

	mu     sync.Mutex
	queues map[K]*queue // by the keys that a call has or wants a turn of
}

// queue is the calls of a key.
type queue struct {
	turns chan struct{}
	calls int // how many have or want a turn
}

// take waits for a turn of key. The caller calls end after it. take returns errBusy when no turn came within t.wait, and ctx's
// error when ctx ended first.
func (t *turns[K]) take(ctx context.Context, key K) (end func(), err error) {
	q := t.join(key)
	end = func() {
		<-q.turns
		t.leave(key, q)
	}
	select {
	case q.turns <- struct{}{}:
		return end, nil
	default:
	}
	wait, cancel := context.WithTimeout(ctx, t.wait)
	defer cancel()
	select {
	case q.turns <- struct{}{}:
		return end, nil
	case <-wait.Done():
		t.leave(key, q)
		return nil, cmp.Or(ctx.Err(), errBusy)
	}
}

func (t *turns[K]) join(key K) *queue {
	t.mu.Lock()
	defer t.mu.Unlock()
	q := t.queues[key]
	if q == nil {
		q = &queue{turns: make(chan struct{}, t.most)}
		if t.queues == nil {
			t.queues = map[K]*queue{}
		}
		t.queues[key] = q
	}
	q.calls++
	return q
}

func (t *turns[K]) leave(key K, q *queue) {
	t.mu.Lock()
	defer t.mu.Unlock()
	q.calls--
	if q.calls == 0 {
		delete(t.queues, key)
	}
}

// bucketLimit is the limit of a leaky bucket, of wasted look-ups or of new orders.
type bucketLimit struct {
	burst  float64       // how many an empty bucket takes
	refill time.Duration // how long one takes to leak away
}

// bucket is a leaky bucket. The zero bucket is empty.
type bucket struct {
	level   float64 // how many are in the bucket at updated
	updated time.Time
}

// level returns how many are in b now.
func (l bucketLimit) level(b bucket, now time.Time) float64 {
	return max(0, b.level-float64(now.Sub(b.updated))/float64(l.refill))
}

// charge returns b with one more. The level stops at burst, so that look-ups under way when the bucket fills do not
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
