package snapbroker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// A router in the test's hands: it receives when the test says so, and answers what the test says.
type fakeRouter struct {
	t        *testing.T
	context  *zmq.Context
	socket   *zmq.Socket
	endpoint string
}

type received struct {
	identity, id []byte
	bodyOfRequest
}

func newFakeRouter(t *testing.T) *fakeRouter {
	f := &fakeRouter{t: t, endpoint: ipc + filepath.Join(place(t), "router.sock")}
	f.context = must(zmq.NewContext())(t)
	f.open()
	t.Cleanup(func() {
		f.close()
		check(t, f.context.Term())
	})
	return f
}

func (f *fakeRouter) open() {
	f.socket = must(f.context.NewSocket(zmq.ROUTER))(f.t)
	check(f.t, errors.Join(f.socket.SetLinger(0), f.socket.SetRcvtimeo(patienceOfTests), f.socket.Bind(f.endpoint)))
}

func (f *fakeRouter) close() { check(f.t, f.socket.Close()) }

func (f *fakeRouter) dial(given ...Option) *Client {
	return dial(f.t, append([]Option{
		WithEndpoint(f.endpoint), WithSnapshotter("fake"), WithConnectTimeout(patienceOfTests),
	}, given...)...)
}

func (f *fakeRouter) next() *received {
	f.t.Helper()
	frames := must(f.socket.RecvMessageBytes(0))(f.t)
	if len(frames) != 5 || !bytes.Equal(frames[1], requestVersion) || string(frames[3]) != "fake" {
		f.t.Fatalf("received %q", frames)
	}
	request := must(decode(frames[4], (*reader).request, "request"))(f.t)
	return &received{frames[0], frames[2], request}
}

func (f *fakeRouter) answer(r *received, last bool, part []byte) {
	f.t.Helper()
	more := partMore
	if last {
		more = partLast
	}
	must(f.socket.SendMessage(r.identity, requestVersion, r.id, more, part))(f.t)
}

func (f *fakeRouter) outcomes(r *received, last bool, outcomes ...outcome) {
	f.t.Helper()
	f.answer(r, last, body((*writer).reply, reply{outcomes: outcomes}))
}

func (f *fakeRouter) refuse(r *received, err *Error) {
	f.t.Helper()
	f.answer(r, true, body((*writer).reply, reply{error: err}))
}

func okInfo(call int64, name string) outcome {
	return outcome{call: call, ok: body((*writer).info, Info{Name: name, Kind: Active})}
}

func okMounts(call int64) outcome {
	return outcome{call: call, ok: body((*writer).mounts, Mounts{Fence: 7})}
}

func verbs(r *received) (names []string) {
	for _, one := range r.calls {
		names = append(names, one.verb.String()+" "+one.key)
	}
	return names
}

var unavailable = &Error{Code: CodeUnavailable, Message: "stops", Details: map[string]any{"retry_after_ms": int64(1)}}

func TestCallsTravelTogether(t *testing.T) {
	f := newFakeRouter(t)
	c := f.dial()
	ctx := background(t)
	done := make(chan error, 1000)
	for round, most := range []int{readsPerRequest, callsPerRequest} {
		const calls = 600
		for i := range calls {
			go func() {
				if round == 0 {
					info, err := c.Stat(ctx, fmt.Sprint(i))
					if err == nil && info.Name != fmt.Sprint(i) {
						err = fmt.Errorf("%d has the answer of %s", i, info.Name)
					}
					done <- err
				} else {
					done <- errorOf(c.Prepare(ctx, fmt.Sprint(i), ""))
				}
			}()
		}
		requests := 0
		for got := 0; got < calls; requests++ {
			r := f.next()
			if got += len(r.calls); len(r.calls) > most {
				t.Errorf("%d calls in a request", len(r.calls))
			}
			if (len(r.token) > 0) != (round == 1) {
				t.Errorf("token %x with %s", r.token, r.calls[0].verb)
			}
			// In any order, in several parts.
			for _, i := range rand.Perm(len(r.calls)) {
				one := okMounts(int64(i))
				if round == 0 {
					one = okInfo(int64(i), r.calls[i].key)
				}
				f.outcomes(r, false, one)
			}
			f.outcomes(r, true)
		}
		for range calls {
			check(t, <-done)
		}
		if requests > calls/4 {
			t.Errorf("%d calls in %d requests", calls, requests)
		}
	}
}

func TestRepeatsAfterRefusal(t *testing.T) {
	f := newFakeRouter(t)
	c := f.dial()
	b := c.Batch()
	made, there := b.Prepare("new", ""), b.Stat("there")
	sent := make(chan error)
	go func() { sent <- b.Send(background(t)) }()
	first := f.next()
	f.outcomes(first, false, okInfo(1, "there"))
	f.outcomes(first, true, outcome{call: 0, error: unavailable})
	second := f.next()
	if bytes.Equal(first.id, second.id) || !bytes.Equal(first.token, second.token) || len(first.token) < 16 ||
		!slices.Equal(verbs(first), verbs(second)) {
		t.Errorf("%+v repeats %+v", second, first)
	}
	f.refuse(second, unavailable)
	third := f.next()
	f.outcomes(third, true, okMounts(0), okInfo(1, "another"))
	check(t, <-sent)
	if info := must(there.Get())(t); info.Name != "there" {
		t.Errorf("a repeat's answer %+v replaced the first", info)
	}
	if m := must(made.Get())(t); m.Fence != 7 {
		t.Errorf("mounts %+v", m)
	}
	if statistics := c.Statistics(); statistics.Repeated != 2 || statistics.Requests != 1 {
		t.Errorf("statistics %+v", statistics)
	}
}

func TestRepeatsAfterBrokenConnection(t *testing.T) {
	f := newFakeRouter(t)
	ctx := background(t)
	for _, patience := range []time.Duration{patienceOfTests, 0} {
		c := f.dial(WithPatience(patience))
		done := make(chan error)
		go func() { done <- errorOf(c.Prepare(ctx, "new", "")) }()
		first := f.next()
		f.close()
		f.open()
		if patience == 0 {
			told := refused(t, <-done, ErrUnavailable)
			if !told.InDoubt || len(first.token) != 0 {
				t.Errorf("%v, in doubt %t, token %x", told, told.InDoubt, first.token)
			}
			continue
		}
		second := f.next()
		if !bytes.Equal(first.token, second.token) || len(first.token) == 0 {
			t.Errorf("%+v repeats %+v", second, first)
		}
		// A refusal does not take the doubt of the first try away, an outcome does.
		f.outcomes(second, true, outcome{call: 0, error: &Error{Code: CodeInternal, Message: "disk"}})
		if told := refused(t, <-done, ErrInternal); !told.InDoubt {
			t.Errorf("%v is not in doubt", told)
		}
		go func() { done <- errorOf(c.Prepare(ctx, "new", "")) }()
		f.next()
		f.close()
		f.open()
		f.outcomes(f.next(), true, outcome{call: 0, error: &Error{Code: CodeAlreadyExists, Message: "taken"}})
		if told := refused(t, <-done, ErrAlreadyExists); told.InDoubt {
			t.Errorf("%v is in doubt", told)
		}
		check(t, c.Close())
	}
}

func TestTakingBack(t *testing.T) {
	f := newFakeRouter(t)
	c := f.dial()
	base := background(t)
	// Alone: the whole request.
	ctx, cancel := context.WithCancel(base)
	done := make(chan error, 4)
	go func() { done <- errorOf(c.Stat(ctx, "alone")) }()
	r := f.next()
	cancel()
	taken := f.next()
	if taken.calls[0].verb != verbCancel || !bytes.Equal(taken.calls[0].request, r.id) || len(taken.calls[0].calls) != 0 {
		t.Errorf("%+v takes back %x", taken.calls, r.id)
	}
	refused(t, <-done, ErrCancelled)
	f.outcomes(r, true, okInfo(0, "alone")) // Too late: passed over.

	// Together with others: its own call, and a repeat for the others holds it and takes it back.
	ctx, cancel = context.WithCancel(base)
	e := &exchange{request: request{target: "fake", namespace: "default"}}
	pendings := []*pending{}
	for i, key := range []string{"a", "b"} {
		encoded := must((&call{verb: verbPrepare, key: key}).encode())(t)
		pendings = append(pendings, &pending{verb: verbPrepare, body: encoded, done: make(chan struct{}, 1)})
		e.add(pendings[i])
	}
	e.timeout = patienceOfTests
	c.connection.launch([]*exchange{e})
	go func() { _, _, err := c.connection.await(ctx, pendings[0], nil); done <- err }()
	r = f.next()
	cancel()
	if told := refused(t, <-done, ErrCancelled); !told.InDoubt {
		t.Error("a change that was taken back is not in doubt")
	}
	taken = f.next()
	if !slices.Equal(taken.calls[0].calls, []int{0}) || !bytes.Equal(taken.calls[0].request, r.id) {
		t.Errorf("%+v takes back call 0 of %x", taken.calls, r.id)
	}
	f.refuse(r, unavailable)
	again := f.next()
	taken = f.next()
	if len(again.calls) != 2 || !slices.Equal(taken.calls[0].calls, []int{0}) ||
		!bytes.Equal(taken.calls[0].request, again.id) {
		t.Errorf("%+v, then %+v", again.calls, taken.calls)
	}
	f.outcomes(again, true, outcome{call: 0, error: &Error{Code: CodeCancelled, Message: "taken back"}}, okMounts(1))
	if _, _, err := c.connection.await(base, pendings[1], nil); err != nil {
		t.Error(err)
	}
	if statistics := c.Statistics(); statistics.UnderWay != 0 || statistics.Stray == 0 {
		t.Errorf("statistics %+v", statistics)
	}
}

func TestWhatABrokerMustNotSay(t *testing.T) {
	f := newFakeRouter(t)
	c := f.dial()
	ctx := background(t)
	for name, answer := range map[string][]byte{
		"garbage":         []byte("\xc1garbage"),
		"another call":    body((*writer).reply, reply{outcomes: []outcome{okInfo(1, "x")}}),
		"no outcome":      body((*writer).reply, reply{}),
		"an empty one":    body((*writer).reply, reply{outcomes: []outcome{{call: 0}}}),
		"another's":       body((*writer).reply, reply{outcomes: []outcome{okMounts(0)}}),
		"an unknown code": body((*writer).reply, reply{outcomes: []outcome{{error: &Error{Code: "odd", Message: "?"}}}}),
	} {
		done := make(chan error)
		go func() { done <- errorOf(c.Stat(ctx, "x")) }()
		f.answer(f.next(), true, answer)
		if told := refused(t, <-done, ErrInternal); told.Code != CodeInternal {
			t.Errorf("%s: %v", name, told)
		}
	}
	pages := make(chan error)
	go func() { pages <- errorOf2(c.List(ctx, nil)) }()
	r := f.next()
	page := body((*writer).walkPage, WalkPage{next: "m"})
	f.outcomes(r, true, outcome{ok: page})
	f.outcomes(f.next(), true, outcome{ok: page})
	refused(t, <-pages, ErrInternal)
}

func errorOf2[A, B any](_ A, _ B, err error) error { return err }

func TestProgressAndDeadlines(t *testing.T) {
	f := newFakeRouter(t)
	c := f.dial(WithTimeout(1234 * time.Millisecond * 1000))
	ctx := background(t)
	seen := make(chan Progress, 10)
	done := make(chan error)
	go func() { done <- errorOf(c.Usage(ctx, "big", WithProgress(func(p Progress) { seen <- p }))) }()
	r := f.next()
	if left := time.Duration(r.timeoutMS) * time.Millisecond; left <= 0 || left > patienceOfTests {
		t.Errorf("the context's deadline was sent as %v", left)
	}
	f.outcomes(r, false, outcome{progress: &Progress{Entries: 3, Bytes: 5}})
	if got := <-seen; got != (Progress{3, 5}) {
		t.Errorf("progress %+v", got)
	}
	f.outcomes(r, true, outcome{ok: body((*writer).usage, Usage{Inodes: 1, Size: 2})})
	check(t, <-done)
	go func() { done <- errorOf(c.Stat(context.Background(), "x")) }()
	if r = f.next(); r.timeoutMS != 1_234_000 {
		t.Errorf("the client's timeout was sent as %d ms", r.timeoutMS)
	}
	f.outcomes(r, true, okInfo(0, "x"))
	check(t, <-done)
	// What is under way when the connection is closed ends, and is taken back.
	go func() { done <- errorOf(c.Prepare(ctx, "x", "")) }()
	r = f.next()
	check(t, c.Close())
	if told := refused(t, <-done, ErrUnavailable); !told.InDoubt {
		t.Errorf("%v is not in doubt", told)
	}
	if taken := f.next(); !bytes.Equal(taken.calls[0].request, r.id) {
		t.Errorf("%+v takes back %x", taken.calls, r.id)
	}
}

func TestPatience(t *testing.T) {
	p := must(newPatience(10 * time.Second))(t)
	now := time.Unix(1000, 0)
	p.now = func() time.Time { return now }
	p.chance = func() float64 { return 1 }
	r := newRepeats(p, now.Add(time.Hour))
	var pauses []time.Duration
	for {
		pause, ok := r.pause(&Error{Details: map[string]any{"retry_after_ms": int64(10)}})
		if !ok {
			break
		}
		pauses = append(pauses, pause.Round(time.Millisecond)-10*time.Millisecond)
		now = now.Add(pause)
	}
	want := []time.Duration{50, 100, 200, 400, 800, 1000, 1000}
	for i, pause := range want {
		if pauses[i] != pause*time.Millisecond {
			t.Errorf("pauses %v, not %v ms", pauses, want)
			break
		}
	}
	if waited := now.Sub(time.Unix(1000, 0)); waited >= 10*time.Second || waited < 8*time.Second {
		t.Errorf("gave up after %v", waited)
	}
	if _, ok := newRepeats(p, now.Add(time.Millisecond)).pause(unavailable); ok {
		t.Error("repeated beyond the request's deadline")
	}
	refused(t, errorOf(newPatience(-1)), ErrInvalidArgument)
	if a, b := p.token(), p.token(); bytes.Equal(a, b) || len(a) < 16 || len(a) > 64 {
		t.Errorf("tokens %x and %x", a, b)
	}
}
