package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// queryStub is the query of a batcher queries are seen: each takes its answer from the test.
type queryStub struct {
	*batcher[int, string]
	t       *testing.T
	started chan []int                               // the keys of each query
	answers chan func([]int) (map[int]string, error) // what it does then
	until   []time.Time
}

func newQueryStub(t *testing.T) *queryStub {
	f := &queryStub{t: t, started: make(chan []int), answers: make(chan func([]int) (map[int]string, error))}
	f.batcher = newBatcher(func(ctx context.Context, keys []int) (map[int]string, error) {
		until, _ := ctx.Deadline()
		f.until = append(f.until, until)
		f.started <- keys
		return (<-f.answers)(keys)
	})
	return f
}

// names answers the even keys; odd ones are unknown.
func names(keys []int) (map[int]string, error) {
	found := map[int]string{}
	for _, k := range keys {
		if k%2 == 0 {
			found[k] = fmt.Sprint("name ", k)
		}
	}
	return found, nil
}

// query has a caller ask for keys; what he is answered comes from the channel. It returns once his keys are in a query.
func (f *queryStub) query(ctx context.Context, keys ...int) <-chan any {
	answer := make(chan any, 1)
	before := f.collected()
	go func() {
		found, err := f.get(ctx, keys...)
		if err != nil {
			answer <- err
			return
		}
		text := ""
		for _, k := range keys {
			text += found[k] + ";"
		}
		answer <- text
	}()
	for f.collected() == before {
		runtime.Gosched()
	}
	return answer
}

// collected is how many keys wait for a query to return.
func (f *queryStub) collected() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range f.waiting {
		n += len(w.keys)
	}
	return n
}

// first has a caller ask alone, and returns once his query is under way.
func (f *queryStub) first() <-chan any {
	answer := make(chan any, 1)
	go func() {
		found, err := f.get(context.Background(), 0)
		answer <- fmt.Sprint(found, err)
	}()
	if keys := <-f.started; len(keys) != 1 {
		f.t.Fatalf("the lone caller's query is for %v", keys)
	}
	return answer
}

func TestBatchSharesAQuery(t *testing.T) {
	f := newQueryStub(t)
	lone := f.first()
	var answers []<-chan any
	for k := range 50 {
		answers = append(answers, f.query(t.Context(), k, k+1))
	}
	joined := time.Now()
	f.answers <- names
	if got := <-lone; got != "map[0:name 0] <nil>" {
		t.Errorf("the lone caller got %v", got)
	}
	if keys := <-f.started; len(keys) != 100 {
		t.Fatalf("%d keys in the second query", len(keys))
	}
	f.answers <- names
	for k, answer := range answers {
		even := fmt.Sprintf("name %d;", k+k%2)
		if want := []string{even + ";", ";" + even}[k%2]; <-answer != want {
			t.Errorf("caller %d did not get %q", k, want)
		}
	}
	if f.until[1].After(joined.Add(dbTimeout)) {
		t.Errorf("the second query may take until %v after its callers came", f.until[1].Sub(joined))
	}
}

func TestBatchCallerGoesAway(t *testing.T) {
	f := newQueryStub(t)
	lone := f.first()
	ctx, goAway := context.WithCancel(t.Context())
	gone, stays := f.query(ctx, 2), f.query(t.Context(), 4)
	goAway()
	if err := <-gone; err != context.Canceled {
		t.Errorf("the caller who went away got %v", err)
	}
	f.answers <- names
	<-lone
	<-f.started
	f.answers <- names
	if got := <-stays; got != "name 4;" {
		t.Errorf("the other one got %v", got)
	}
}

func TestBatchFails(t *testing.T) {
	fault := errors.New("the database is away")
	for name, fail := range map[string]func([]int) (map[int]string, error){
		"an error": func([]int) (map[int]string, error) { return nil, fault },
		"a panic":  func([]int) (map[int]string, error) { panic(fault) },
	} {
		f := newQueryStub(t)
		lone := f.first()
		a, b := f.query(t.Context(), 2), f.query(t.Context(), 4)
		f.answers <- names
		<-lone
		<-f.started
		c := f.query(t.Context(), 6)
		f.answers <- fail
		for _, answer := range []<-chan any{a, b} {
			if err, ok := (<-answer).(error); !ok || !strings.Contains(err.Error(), fault.Error()) {
				t.Errorf("%s: a caller got %v", name, err)
			}
		}
		<-f.started
		f.answers <- names
		if got := <-c; got != "name 6;" {
			t.Errorf("%s: the next query's caller got %v", name, got)
		}
	}
}

func TestBatchIsBounded(t *testing.T) {
	f := newQueryStub(t)
	lone := f.first()
	var answers []<-chan any
	for range 7 {
		answers = append(answers, f.query(t.Context(), make([]int, maxBatchKeys/3)...))
	}
	f.answers <- names
	<-lone
	for _, want := range []int{3, 3, 1} {
		if keys := <-f.started; len(keys) != want*(maxBatchKeys/3) {
			t.Fatalf("a query has %d keys", len(keys))
		}
		f.answers <- names
	}
	for _, answer := range answers {
		<-answer
	}
}

// What a caller has written, or seen written, before he asks is in what he is answered.
func TestBatchIsNeverOlderThanItsQuestion(t *testing.T) {
	var written atomic.Int64
	g := newBatcher(func(_ context.Context, keys []int) (map[int]int64, error) {
		seen := written.Load()
		runtime.Gosched()
		return map[int]int64{0: seen}, nil
	})
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 500 {
				mine := written.Add(1)
				if found, err := g.get(t.Context(), 0); err != nil || found[0] < mine {
					t.Errorf("read %d, %v after writing %d", found[0], err, mine)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestReadYourOwnOrder(t *testing.T) {
	s := newDirectShop(t)
	var wg sync.WaitGroup
	for range 8 {
		buyer, other, painting := newTestID(), newTestID(), s.painting(99000)
		wg.Go(func() {
			for range 5 {
				order := s.order(buyer, painting)
				if s.inStock(other, painting) || s.statusOf(order) != statusUnpaid {
					t.Error("an order just made is not seen")
				}
				s.want(s.call(buyer, "DELETE", "/api/orders/"+order, nil), 200, "")
				if !s.inStock(other, painting) {
					t.Error("a painting just freed is not seen")
				}
				s.want(s.call(buyer, "GET", "/api/orders/latest", nil), 404, "")
			}
		})
	}
	wg.Wait()
}
