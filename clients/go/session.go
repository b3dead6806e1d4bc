package snapbroker

import (
	"strings"
	"time"
)

// Requests out, replies in, without a socket: what a connection does under its mutex.
//
// An exchange is one request under way. Its calls settle one by one, in whatever order the parts of the reply bring
// their outcomes; a call that its caller has given up stays open until the broker has answered it, so that the exchange
// can tell when nobody waits for any of its calls: then the whole request is taken back. A stream is a request with one
// call that is answered in pages.
//
// Repeats. A request is tried again when its connection broke, and when the broker answers that it is unavailable: the
// same calls in the same order, under another request id and with the token of the first try, by which the broker knows
// what it has done already (1/SNBR 6.5). An outcome that came stays; that of the repeat says the same. A caller that
// gives up while its request waits for the next try cannot be left out of it, for a token stands for all its calls: a
// Cancel for those calls follows right behind the repeat.
//
// Doubt. A try without a reply may have taken effect. A later try that is refused does not take that doubt away, only an
// outcome does: until then every error that is told says so, and has InDoubt set.

// pursuit is any request under way.
type pursuit interface {
	core() *request
	// encode answers the body to send at this time.
	encode(now time.Time) []byte
	// receive takes one part of the reply. Finished: nothing more is to come in this try; see request.failure.
	receive(part *reply, last bool) (finished bool, err *Error)
	// fail ends every call that has no outcome.
	fail(err *Error)
	// forsaken: nobody waits for what is still to come.
	forsaken() bool
}

// request is what the connection needs of any pursuit.
type request struct {
	target     string
	namespace  string
	timeout    time.Duration
	deadline   time.Time
	grace      time.Duration // where a context has the deadline it is the one to say so
	id         uint64
	registered bool // under way: a reply finds it
	sent       bool
	timer      *time.Timer
	arming     uint64 // which setting of the timer holds
	failure    *Error // why this try is over, and the request to be repeated
	doubt      bool   // a try without a reply may have taken effect
	repeats    *repeats
}

func (r *request) core() *request { return r }

// timeoutMS is the time that is left, as it is sent.
func (r *request) timeoutMS(now time.Time) int64 {
	left := r.timeout
	if r.repeats != nil {
		left = r.deadline.Sub(now)
	}
	return max(1, (left + time.Millisecond/2).Milliseconds())
}

// pending is one call whose caller waits.
type pending struct {
	verb   verb
	body   []byte
	done   chan struct{} // one signal, when settled; nil in a batch, whose caller waits for all
	bell   *lookout      // where the caller waits at the socket
	report chan Progress // the latest; nil where nobody asks

	exchange  *exchange
	index     int
	abandoned bool
	settled   bool
	refused   *Error // in this try; a repeat may bring an outcome

	ok  []byte
	err *Error
}

func (p *pending) settle(ok []byte, err *Error) {
	p.ok, p.err, p.settled = ok, err, true
	if p.bell != nil {
		p.bell.ring()
	}
	if p.done != nil {
		p.done <- struct{}{} // From here on it is the caller's.
	}
}

// exchange is a request whose calls have one outcome each.
type exchange struct {
	request
	atomic    bool
	patient   bool
	changes   bool
	token     []byte
	bodies    [][]byte
	slots     []*pending // nil once settled
	bytes     int
	unsettled int
	abandoned int
	outcomes  int           // how many have come
	refused   bool          // as a whole, before any outcome
	forgone   []int         // refused, and its caller has gone: a repeat holds it all the same
	ended     chan struct{} // closed at the end of a batch
}

func (e *exchange) add(p *pending) {
	p.exchange, p.index = e, len(e.bodies)
	e.bodies = append(e.bodies, p.body)
	e.slots = append(e.slots, p)
	e.bytes += len(p.body)
	e.unsettled++
	e.changes = e.changes || p.verb.changes()
}

// withoutAbandoned leaves out, before it is sent, what nobody waits for.
func (e *exchange) withoutAbandoned() {
	if e.abandoned == 0 {
		return
	}
	slots := e.slots
	e.bodies, e.slots, e.bytes, e.unsettled, e.abandoned, e.changes = nil, nil, 0, 0, 0, false
	for _, p := range slots {
		if p.abandoned {
			p.settled = true
		} else {
			e.add(p)
		}
	}
}

// equip makes the request one that can be repeated.
func (e *exchange) equip(p *patience) {
	if p.limit > 0 {
		e.patient = true
		if e.changes {
			e.token = p.token()
		}
	}
}

func (e *exchange) encode(now time.Time) []byte {
	body := make([]byte, 0, e.bytes+headBytesMax)
	return appendRequest(body, e.bodies, e.namespace, e.atomic, e.timeoutMS(now), e.token)
}

func (e *exchange) forsaken() bool { return e.unsettled > 0 && e.unsettled <= e.abandoned }

// givenUp are the calls that a repeat must hold although their callers have gone.
func (e *exchange) givenUp() []int {
	numbers := e.forgone
	if e.abandoned > 0 {
		for index, p := range e.slots {
			if p != nil && p.abandoned {
				numbers = append(numbers[:len(numbers):len(numbers)], index)
			}
		}
	}
	return numbers
}

// again makes ready for another try; answers the pause until then, not ok where there is none.
func (e *exchange) again(p *patience, err *Error) (time.Duration, bool) {
	if !e.patient {
		return 0, false
	}
	if e.repeats == nil {
		e.repeats = newRepeats(p, e.deadline)
	}
	pause, ok := e.repeats.pause(err)
	if ok {
		e.sent = false
		e.failure = nil
		for _, slot := range e.slots {
			if slot != nil {
				slot.refused = nil
			}
		}
	}
	return pause, ok
}

func (e *exchange) receive(part *reply, last bool) (bool, *Error) {
	for i := range part.outcomes {
		one := &part.outcomes[i]
		if one.call < 0 || one.call >= int64(len(e.slots)) {
			return true, fault(CodeInternal, "the broker answered call %d of a request of %d", one.call, len(e.slots))
		}
		slot := e.slots[one.call]
		switch {
		case slot == nil:
		case one.progress != nil:
			slot.progress(*one.progress)
		case one.error != nil && e.refuse(slot, one.error):
		default:
			e.settle(slot, one)
		}
	}
	if part.error != nil {
		// The request was refused as a whole; or the snapshotter died, which is told by a detail (1/SNBR 6.4).
		unavailable := part.error.Code == CodeUnavailable
		inDoubt, _ := part.error.Details["in_doubt"].(bool)
		e.doubt = e.doubt || inDoubt
		if e.patient && unavailable {
			e.failure = part.error
		} else {
			e.refused = e.outcomes == 0
			e.fail(part.error)
		}
		return true, nil
	}
	if last && e.unsettled > 0 {
		return true, e.endTry()
	}
	return e.unsettled == 0, nil
}

func (e *exchange) settle(slot *pending, one *outcome) {
	e.slots[slot.index] = nil
	e.unsettled--
	e.outcomes++
	if slot.abandoned {
		e.abandoned--
		slot.settled = true
		return
	}
	err := one.error
	if err != nil && e.repeats != nil && !decided(err.Code) {
		err = e.told(slot, err)
	}
	if err == nil && one.ok == nil {
		err = fault(CodeInternal, "the broker's outcome of call %d is neither an answer nor an error", one.call)
	}
	slot.settle(one.ok, err)
}

// decided: the call that has this error had no effect, in no try (1/SNBR 6.5).
func decided(code Code) bool {
	switch code {
	case CodeNotFound, CodeAlreadyExists, CodeFailedPrecondition, CodeInvalidArgument, CodeUnimplemented:
		return true
	}
	return false
}

// refuse keeps a call open that a repeat may bring an outcome for. Cancelled, to a call that nobody took back, is what
// a broker that stops may say.
func (e *exchange) refuse(slot *pending, err *Error) bool {
	if !e.patient || err.Code != CodeUnavailable && err.Code != CodeCancelled {
		return false
	}
	if slot.abandoned {
		// Nobody waits for it, but a repeat for the others would execute it.
		e.forgone = append(e.forgone, slot.index)
		return false
	}
	slot.refused = err
	return true
}

// endTry: the reply is over and calls are open, those that were refused.
func (e *exchange) endTry() *Error {
	var first *Error
	refused := 0
	for _, slot := range e.slots {
		if slot != nil && slot.refused != nil {
			refused++
			if first == nil {
				first = slot.refused
			}
		}
	}
	switch {
	case refused < e.unsettled:
		return fault(CodeInternal, "the broker ended its reply without an outcome for every call")
	case e.atomic && e.unsettled < len(e.slots):
		// The reason is another call's, and final: these were taken back with it.
		e.fail(first)
	default:
		e.failure = first
	}
	return nil
}

func (e *exchange) fail(err *Error) {
	for index, slot := range e.slots {
		if slot == nil {
			continue
		}
		e.slots[index] = nil
		if slot.abandoned {
			slot.settled = true
			continue
		}
		reason := err
		if slot.refused != nil {
			reason = slot.refused
		}
		slot.settle(nil, e.told(slot, reason))
	}
	e.unsettled, e.abandoned = 0, 0
}

// told is the error for the caller of one call: how long it was repeated, and whether it may have taken effect.
func (e *exchange) told(slot *pending, err *Error) *Error {
	told := *err
	told.InDoubt = e.doubt && slot.verb.changes()
	told.Message += e.repeats.told()
	if told.InDoubt && !strings.Contains(told.Message, "unknown") {
		told.Message += doubtful
	}
	return &told
}

// progress keeps the latest for the caller, who may be slow.
func (p *pending) progress(progress Progress) {
	if !p.abandoned {
		keepLatest(p.report, progress)
	}
}

func keepLatest(report chan Progress, progress Progress) {
	for report != nil {
		select {
		case report <- progress:
			return
		default:
		}
		select {
		case <-report:
		default:
		}
	}
}

// stream is a request of one call that is answered in pages.
type stream struct {
	request
	call     []byte
	pages    [][]byte
	answered bool
	unwanted bool
	over     bool
	err      *Error
	wake     chan struct{} // one signal whenever something has come
	report   chan Progress // the latest; nil where nobody asks
}

func newStream(target, namespace string, timeout time.Duration, call []byte) *stream {
	return &stream{
		request: request{target: target, namespace: namespace, timeout: timeout},
		call:    call,
		wake:    make(chan struct{}, 1),
	}
}

func (s *stream) encode(now time.Time) []byte {
	body := make([]byte, 0, len(s.call)+headBytesMax)
	return appendRequest(body, [][]byte{s.call}, s.namespace, false, s.timeoutMS(now), nil)
}

func (s *stream) receive(part *reply, last bool) (bool, *Error) {
	for i := range part.outcomes {
		one := &part.outcomes[i]
		switch {
		case one.call != 0:
			return true, fault(CodeInternal, "the broker answered call %d of a request of 1", one.call)
		case one.error != nil:
			s.fail(one.error)
		case one.ok != nil:
			s.pages = append(s.pages, one.ok)
			s.answered = true
		case one.progress != nil:
			keepLatest(s.report, *one.progress)
		default:
			return true, fault(CodeInternal, "the broker's outcome is neither a page nor an error")
		}
	}
	if part.error != nil {
		s.fail(part.error)
	}
	if last && !s.answered && !s.over {
		return true, fault(CodeInternal, "the broker ended its reply without a page")
	}
	s.over = s.over || last
	s.signal()
	return s.over, nil
}

func (s *stream) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// fail ends the stream, behind the pages that came before.
func (s *stream) fail(err *Error) {
	if !s.over {
		s.err, s.over = err, true
		s.signal()
	}
}

func (s *stream) forsaken() bool { return s.unwanted && !s.over }

// take answers the next page; nil where none is there, and then the stream's error if it is over.
func (s *stream) take() (page []byte, over bool, err *Error) {
	if len(s.pages) > 0 {
		page, s.pages = s.pages[0], s.pages[1:]
		return page, false, nil
	}
	return nil, s.over, s.err
}
