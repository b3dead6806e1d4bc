package snapbroker

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	mathrand "math/rand/v2"
	"time"
)

const (
	timeoutDefault        = 60 * time.Second       // how long a call waits where its context has no deadline
	auditTimeout          = time.Hour              // how long an audit may take instead: it reads all there is
	connectTimeoutDefault = 3 * time.Second        // how long a call waits for a broker that is not there
	patienceDefault       = 10 * time.Second       // how long a request is repeated: a restart takes a second or two
	pauseFirst            = 50 * time.Millisecond  // longest pause before the first repeat; doubled with every further one
	pauseMax              = time.Second            // longest pause of a client's own between two repeats
	retryAfterMax         = 5 * time.Second        // longest pause that a broker's retry_after_ms is believed
	journalRetryFirst     = 100 * time.Millisecond // first pause before a journal that is unavailable is asked again
	journalRetryMax       = 2 * time.Second        // longest such pause
)

// patience says how long the requests of one connection are repeated, at what pace, and which tokens they carry.
// Time and chance are inputs, so that a test has them in its hand.
type patience struct {
	limit  time.Duration // 0: nothing is repeated
	now    func() time.Time
	chance func() float64
	prefix [16]byte
	number uint64
}

func newPatience(limit time.Duration) (*patience, error) {
	p := &patience{limit: limit, now: time.Now, chance: mathrand.Float64}
	if limit < 0 {
		return nil, invalid("patience must be a duration, 0 to repeat nothing, not %v", limit)
	}
	if _, err := rand.Read(p.prefix[:]); err != nil {
		return nil, fault(CodeInternal, "no random bytes for the tokens of repeats: %v", err)
	}
	return p, nil
}

// token for a request that changes something: random bytes of the connection and a counter are as unique as random
// bytes for each request, and cheaper.
func (p *patience) token() []byte {
	p.number++
	return binary.BigEndian.AppendUint64(p.prefix[:len(p.prefix):len(p.prefix)], p.number)
}

// repeats of one request: since when, how many, and for how long there may be more.
type repeats struct {
	patience *patience
	since    time.Time
	deadline time.Time // the request's own
	until    time.Time
	count    int
}

func newRepeats(p *patience, deadline time.Time) *repeats {
	now := p.now()
	until := now.Add(p.limit)
	if deadline.Before(until) {
		until = deadline
	}
	return &repeats{patience: p, since: now, deadline: deadline, until: until}
}

// pause until the next repeat, of random length, so that callers that lost the same broker come back spread over it;
// what the broker asks for comes on top. Not ok where that would be too late.
func (r *repeats) pause(err *Error) (pause time.Duration, ok bool) {
	longest := min(pauseFirst<<min(r.count, 16), pauseMax)
	pause = retryAfter(err) + time.Duration(r.patience.chance()*float64(longest))
	if !r.patience.now().Add(pause).Before(r.until) {
		return 0, false
	}
	r.count++
	return pause, true
}

func (r *repeats) patienceLeft() time.Duration { return max(0, r.until.Sub(r.patience.now())) }

// told is how often and how long, for a message; empty where there was none.
func (r *repeats) told() string {
	if r == nil || r.count == 0 {
		return ""
	}
	times := "once"
	if r.count > 1 {
		times = fmt.Sprintf("%d times", r.count)
	}
	return fmt.Sprintf("; repeated %s in %.1f s", times, r.patience.now().Sub(r.since).Seconds())
}

// retryAfter is how long the broker asks to wait, as far as it is believed.
func retryAfter(err *Error) time.Duration {
	asked, ok := number(err.Details["retry_after_ms"])
	if !ok || asked <= 0 {
		return 0
	}
	return time.Duration(min(asked, retryAfterMax.Milliseconds())) * time.Millisecond
}
