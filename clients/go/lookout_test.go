package snapbroker

import (
	"context"
	"testing"
	"time"
)

// alone begins a call whose caller waits at the socket itself.
func alone(ctx context.Context, t *testing.T, f *fakeRouter, c *Client) (*received, chan error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- errorOf(c.Stat(ctx, "lone")) }()
	r := f.next()
	c.connection.lookout.awaitUser(t, c.connection)
	return r, done
}

func (l *lookout) awaitUser(t *testing.T, c *connection) {
	t.Helper()
	for end := time.Now().Add(patienceOfTests); time.Now().Before(end); time.Sleep(time.Millisecond) {
		c.mu.Lock()
		user := l.user
		c.mu.Unlock()
		if user != nil {
			return
		}
	}
	t.Fatal("the lone caller does not wait at the socket")
}

// Whatever ends a lone call ends it at once, also while its caller is in poll(2).
func TestLoneCaller(t *testing.T) {
	f := newFakeRouter(t)
	c := f.dial()
	ctx := background(t)
	check(t, func() error { // The first call may have waited for the connection.
		done := make(chan error, 1)
		go func() { done <- errorOf(c.Stat(ctx, "first")) }()
		f.outcomes(f.next(), true, okInfo(0, "first"))
		return <-done
	}())

	r, done := alone(ctx, t, f, c)
	f.outcomes(r, true, okInfo(0, "lone"))
	check(t, <-done)

	// Another caller has its answer, whoever reads it, before the lone one and after.
	for _, first := range []bool{true, false} {
		r, done = alone(ctx, t, f, c)
		other := make(chan error, 1)
		go func() { other <- errorOf(c.Stat(ctx, "other")) }()
		s := f.next()
		if first {
			f.outcomes(s, true, okInfo(0, "other"))
			check(t, <-other)
			f.outcomes(r, true, okInfo(0, "lone"))
			check(t, <-done)
		} else {
			f.outcomes(r, true, okInfo(0, "lone"))
			check(t, <-done)
			f.outcomes(s, true, okInfo(0, "other"))
			check(t, <-other)
		}
	}

	cancelled, cancel := context.WithCancel(ctx)
	r, done = alone(cancelled, t, f, c)
	cancel()
	refused(t, <-done, ErrCancelled)
	if taken := f.next(); taken.calls[0].verb != verbCancel || string(taken.calls[0].request) != string(r.id) {
		t.Errorf("%+v", taken)
	}
	timed, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	done = make(chan error, 1)
	go func() { done <- errorOf(c.Stat(timed, "lone")) }()
	refused(t, <-done, ErrDeadlineExceeded)
	f.next()
	f.next()

	_, done = alone(ctx, t, f, c)
	check(t, c.Close())
	refused(t, <-done, ErrUnavailable)
}

// What comes between the lone caller's last look and the goroutine that reads being told to wait is taken as well.
func TestLookAway(t *testing.T) {
	f := newFakeRouter(t)
	c := f.dial()
	ctx := background(t)
	// A batch does not look out: its reply leaves the descriptor among the ready ones.
	for range 3 {
		done := sendBatch(ctx, c)
		f.outcomes(f.next(), true, okInfo(0, "before"))
		check(t, <-done)
		l := c.connection.lookout
		l.open(false)
		done = sendBatch(ctx, c)
		r := f.next()
		// Who sent it has looked once more for a reply when it gives up the lock.
		c.connection.io.Lock()
		f.outcomes(r, true, okInfo(0, "meanwhile"))
		c.connection.io.Unlock()
		l.wait()
		c.connection.lookAway()
		select {
		case err := <-done:
			check(t, err)
		case <-time.After(patienceOfTests):
			t.Fatal("a reply lies at the socket and nobody takes it")
		}
	}
}

func sendBatch(ctx context.Context, c *Client) chan error {
	done := make(chan error, 1)
	b := c.Batch()
	b.Stat("with-others")
	go func() { done <- b.Send(ctx) }()
	return done
}
