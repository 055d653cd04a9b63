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
// A look-up is wasted when it finds no money of ours, or repeats one just made. Each asker pays for what he wastes: after a
// few his look-ups share a few slots, after many he is refused for a while. Once very many were wasted in all, everybody
// who wasted any is refused. A payment that is true costs nothing, so that neither the gateway's notices nor many buyers
// behind one address are ever refused for their number. However many addresses a flood has, it leaves slots to buyers who
// report with their token.
//
// What is refused is not lost: the reconciler asks about every order at its hold's end.
type limiter struct {
	now   func() time.Time
	slots [len(slotsOf)]chan struct{} // by rank: a look-up takes one of its rank's and one of each before

	mu     sync.Mutex
	asked  recent[string, lastLookUp] // by imp_uid
	wasted recent[asker, arrears]
	inAll  arrears
}

// asker is who is charged: the buyer when he is signed in, else the address.
type asker struct {
	buyer   string
	address netip.Prefix
}

// Ranks of askers.
const (
	rankBuyer    = iota // signed in
	rankStranger        // anybody; so is the gateway with its notices
	rankSuspect         // who has just wasted some
)

// slotsOf are how many look-ups of a rank and those after it there may be at once. Of the gateway client's ten the
// strangers leave some to buyers, and these one to refunds, deletions and the reconciler.
var slotsOf = [...]int{rankBuyer: 9, rankStranger: 6, rankSuspect: 2}

const (
	// Two failed payments make nobody a suspect, and a hundred addresses are suspects after 300 look-ups.
	suspectAfter = 3
	// A look-up is done within 5 seconds; who has waited that long for a slot would only be kept longer.
	lookUpWait = 5 * time.Second
	// The browser may come before the gateway knows its payment, but hardly by so much.
	unknownFor = 3 * time.Second
	// Who wasted a look-up is refused for so long when too many are wasted in all.
	wasteFor = 10 * time.Minute
	// Twice as many askers and payments are remembered at most: a few MB.
	rememberMost = 10_000
)

var (
	// One asker may waste 100 look-ups at once, an office full of clumsy buyers, and then one each 5 seconds.
	wasteOfOne = allowance{most: 100, forgiven: 5 * time.Second}
	// All together may waste 500 at once and then 5 a second: most of their slots, when the gateway takes a second to answer.
	wasteOfAll = allowance{most: 500, forgiven: 200 * time.Millisecond}
)

// errTooMany says that a look-up was refused; after wasteOfOne.forgiven it may be tried again.
var errTooMany = errors.New("too many look-ups that found nothing")

func newLimiter(now func() time.Time) *limiter {
	l := &limiter{
		now:    now,
		asked:  recent[string, lastLookUp]{keep: unknownFor, most: rememberMost},
		wasted: recent[asker, arrears]{keep: wasteFor, most: rememberMost},
	}
	for rank, most := range slotsOf {
		l.slots[rank] = make(chan struct{}, most)
	}
	return l
}

// lastLookUp is how the newest look-up of a payment ended.
type lastLookUp struct {
	road    actorKind
	at      time.Time
	unknown bool
}

// lookUp has ask look up payment impUID for somebody. A payment that the gateway has just not known on the same source is
// errNoPayment without asking: another source may know more, the browser coming too early and then the gateway's notice.
// errTooMany: whoever asks is refused.
func (l *limiter) lookUp(
	ctx context.Context, who asker, source actorKind, impUID string, ask func(context.Context, string) (gatewayPayment, error),
) (gatewayPayment, error) {
	rank, err := l.enter(ctx, who, source, impUID)
	if err != nil {
		return gatewayPayment{}, err
	}
	defer l.leave(rank, rankBuyer)
	p, err := ask(ctx, impUID)
	l.note(who, source, impUID, err)
	return p, err
}

// enter waits for the slots of who's rank. While somebody waits, others of his address find out about theirs: what is true
// of him counts when the slots are there.
func (l *limiter) enter(ctx context.Context, who asker, source actorKind, impUID string) (rank int, err error) {
	wait, cancel := context.WithTimeout(ctx, lookUpWait)
	defer cancel()
	for {
		if rank, err = l.rank(who, source, impUID); err != nil {
			return rank, err
		}
		for next := rank; next >= rankBuyer; next-- {
			select {
			case l.slots[next] <- struct{}{}:
			case <-wait.Done():
				l.leave(rank, next+1)
				return rank, cmp.Or(ctx.Err(), errTooMany)
			}
		}
		if again, err := l.rank(who, source, impUID); err == nil && again == rank {
			return rank, nil
		}
		l.leave(rank, rankBuyer)
	}
}

// leave gives back the slots of the ranks from one down to the lowest that were taken.
func (l *limiter) leave(rank, lowest int) {
	for ; rank >= lowest; rank-- {
		<-l.slots[rank]
	}
}

// rank is who's, or why he gets no look-up.
func (l *limiter) rank(who asker, source actorKind, impUID string) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if last, ok := l.asked.get(impUID); ok && last.unknown && last.road == source && now.Sub(last.at) < unknownFor {
		return 0, errNoPayment
	}
	own, ok := l.wasted.get(who)
	switch n := wasteOfOne.left(own, now); {
	case n > wasteOfOne.most-1:
		return 0, errTooMany
	case ok && now.Sub(own.since) < wasteFor && wasteOfAll.left(l.inAll, now) > wasteOfAll.most-1:
		return 0, errTooMany
	case n >= suspectAfter:
		return rankSuspect, nil
	case who.buyer == "":
		return rankStranger, nil
	default:
		return rankBuyer, nil
	}
}

// note remembers how a look-up ended and charges what was wasted: no payment, a repetition, or a caller who hung up. The
// gateway's silence says nothing.
func (l *limiter) note(who asker, source actorKind, impUID string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now, unknown := l.now(), errors.Is(err, errNoPayment)
	last, ok := l.asked.get(impUID)
	repeated := ok && last.road == source && now.Sub(last.at) < unknownFor
	if unknown || err == nil {
		l.asked.put(impUID, lastLookUp{source, now, unknown}, now)
	}
	if unknown || repeated || errors.Is(err, context.Canceled) {
		l.charge(who, now)
	}
}

// waste charges who for a look-up that found a payment, but no money of ours.
func (l *limiter) waste(who asker) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.charge(who, l.now())
}

func (l *limiter) charge(who asker, now time.Time) {
	own, _ := l.wasted.get(who)
	l.wasted.put(who, wasteOfOne.charged(own, now), now)
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
