package main

import (
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
// A look-up is wasted when it finds no money of ours, or repeats one just made. Each address pays for what it wastes:
// after some its look-ups share a few slots, after many it is refused for a while. Once very many were wasted in all,
// every address that wasted any is refused. A payment that is true costs its address nothing, so that neither the
// gateway's notices nor many buyers behind one address are ever refused for their number.
//
// What is refused is not lost: the reconciler asks about every order at its hold's end.
type limiter struct {
	now            func() time.Time
	clear, suspect chan struct{} // slots for look-ups

	mu     sync.Mutex
	asked  recent[string, lastLookUp]    // by imp_uid
	wasted recent[netip.Prefix, arrears] // by address
	inAll  arrears
}

const (
	// Of the gateway client's 10 look-ups at once strangers have 9 at most, so that refunds, deletions and the reconciler
	// go on; those who wasted suspectAfter have 2 of these. A buyer behind an address with a few failed payments is none.
	clearLookUps   = 7
	suspectLookUps = 2
	suspectAfter   = 10
	// A look-up is done within 5 seconds; who has waited that long for a slot would only be kept longer.
	lookUpWait = 5 * time.Second
	// The browser may come before the gateway knows its payment, but hardly by so much.
	unknownFor = 3 * time.Second
	// Who wasted a look-up is refused for so long when too many are wasted in all.
	wasteFor = 10 * time.Minute
	// Twice as many addresses and payments are remembered at most: a few MB.
	rememberMost = 10_000
)

var (
	// An address may waste 100 look-ups at once, a shop full of clumsy buyers, and then one each 5 seconds.
	wasteOfOne = allowance{most: 100, forgiven: 5 * time.Second}
	// All together may waste 500 at once and then 5 a second: half of the slots, when the gateway takes a second to answer.
	wasteOfAll = allowance{most: 500, forgiven: 200 * time.Millisecond}
)

// errTooMany says that a look-up was refused; after wasteOfOne.forgiven it may be tried again.
var errTooMany = errors.New("too many look-ups that found nothing")

func newLimiter(now func() time.Time) *limiter {
	return &limiter{
		now: now, clear: make(chan struct{}, clearLookUps), suspect: make(chan struct{}, suspectLookUps),
		asked:  recent[string, lastLookUp]{keep: unknownFor, most: rememberMost},
		wasted: recent[netip.Prefix, arrears]{keep: wasteFor, most: rememberMost},
	}
}

// lastLookUp is how the newest look-up of a payment ended.
type lastLookUp struct {
	road    string
	at      time.Time
	unknown bool
}

// lookUp has ask look up payment impUID for somebody at an address. A payment that the gateway has just not known on the
// same road is ErrNoPayment without asking: another road may know more, the browser coming too early and then the gateway's
// notice. errTooMany: the address is refused.
func (l *limiter) lookUp(
	ctx context.Context, address netip.Prefix, road, impUID string, ask func(context.Context, string) (Payment, error),
) (Payment, error) {
	slot, err := l.enter(ctx, address, road, impUID)
	if err != nil {
		return Payment{}, err
	}
	defer func() { <-slot }()
	p, err := ask(ctx, impUID)
	l.note(address, road, impUID, err)
	return p, err
}

// enter waits for a slot. While one waits, others of its address find out about theirs: what is true of it counts when
// the slot is there.
func (l *limiter) enter(ctx context.Context, address netip.Prefix, road, impUID string) (slot chan struct{}, err error) {
	wait, cancel := context.WithTimeout(ctx, lookUpWait)
	defer cancel()
	for {
		if slot, err = l.slots(address, road, impUID); err != nil {
			return nil, err
		}
		select {
		case slot <- struct{}{}:
		case <-wait.Done():
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, errTooMany
		}
		if again, err := l.slots(address, road, impUID); again == slot && err == nil {
			return slot, nil
		}
		<-slot
	}
}

// slots are those that an address may use.
func (l *limiter) slots(address netip.Prefix, road, impUID string) (chan struct{}, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if last, ok := l.asked.get(impUID); ok && last.unknown && last.road == road && now.Sub(last.at) < unknownFor {
		return nil, ErrNoPayment
	}
	own, ok := l.wasted.get(address)
	switch n := wasteOfOne.left(own, now); {
	case n > wasteOfOne.most-1:
		return nil, errTooMany
	case ok && now.Sub(own.since) < wasteFor && wasteOfAll.left(l.inAll, now) > wasteOfAll.most-1:
		return nil, errTooMany
	case n >= suspectAfter:
		return l.suspect, nil
	default:
		return l.clear, nil
	}
}

// note remembers how a look-up ended and charges what was wasted: no payment, a repetition, or a caller who hung up. The
// gateway's silence says nothing.
func (l *limiter) note(address netip.Prefix, road, impUID string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now, unknown := l.now(), errors.Is(err, ErrNoPayment)
	last, ok := l.asked.get(impUID)
	repeated := ok && last.road == road && now.Sub(last.at) < unknownFor
	if unknown || err == nil {
		l.asked.put(impUID, lastLookUp{road, now, unknown}, now)
	}
	if unknown || repeated || errors.Is(err, context.Canceled) {
		l.charge(address, now)
	}
}

// waste charges an address for a look-up that found a payment, but no money of ours.
func (l *limiter) waste(address netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.charge(address, l.now())
}

func (l *limiter) charge(address netip.Prefix, now time.Time) {
	own, _ := l.wasted.get(address)
	l.wasted.put(address, wasteOfOne.charged(own, now), now)
	l.inAll = wasteOfAll.charged(l.inAll, now)
}

// allowance is how much may be wasted: so many at once, and one more whenever one is forgiven.
type allowance struct {
	most     float64
	forgiven time.Duration
}

// arrears are what was wasted and not forgiven, as of since, when something was last wasted.
type arrears struct {
	n     float64
	since time.Time
}

// left is what is not forgiven by now.
func (a allowance) left(r arrears, now time.Time) float64 {
	return max(0, r.n-float64(now.Sub(r.since))/float64(a.forgiven))
}

// charged is r with one more wasted; never more than the most, so that it is forgiven soon.
func (a allowance) charged(r arrears, now time.Time) arrears {
	return arrears{min(a.left(r, now)+1, a.most), now}
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
