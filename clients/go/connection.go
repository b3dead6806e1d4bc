package snapbroker

import (
	"context"
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// One DEALER socket and the requests under way on it.
//
// Calls made while others are made travel together. A caller adds its call to the exchange that is being gathered for
// its snapshotter and namespace. If nobody is sending it becomes the one who sends: at once where no other request is
// under way, so that a lone call waits for nobody; else after the goroutines that are ready to run have had their turn,
// which are as a rule those that the last reply woke. What is added while it sends goes with the next request.
//
// Two locks, taken in this order. io is for the sockets: who holds it sends, and takes what has come, in the order in
// which it came. mu is for what is remembered: it is held for a moment only, never while a socket is used. A Cancel that
// is due is left in the outbox, and sent by whoever made it due once it holds mu no more.
//
// A goroutine reads the socket and wakes callers by their channels; a caller that is alone waits at the socket itself, see
// lookout.

const (
	callsPerRequest = 256 // calls in one request: enough for a group commit, few enough to answer early
	readsPerRequest = 32  // a request that reads leaves with so many: the broker works on one while the next is made
	turnsMax        = 8   // how often others are given a turn before a request is sent that still grows

	contextGrace = time.Second // how long after a context's end a request ends by itself
)

// lane is what calls must share to travel together. Those whose contexts have deadlines travel apart from those that
// have the client's timeout: the longest of them is the request's, and each caller looks after its own.
type lane struct {
	target    string
	namespace string
	timed     bool
}

// Statistics of a connection: what it has done, and what it waits for.
type Statistics struct {
	Requests uint64 // sent, without repeats
	Calls    uint64 // in those requests
	Repeated uint64 // how often a request was repeated
	Stray    uint64 // replies that were late, or none at all
	UnderWay int    // requests without their last reply
	Unsent   int    // of them, those that wait for a connection
}

type connection struct {
	endpoint       string
	eventsEndpoint atomic.Pointer[string]
	timeout        time.Duration
	connectTimeout time.Duration
	callsMax       int
	readsMax       int
	keys           [2]string // client key and server key, as the options have them
	keyed          bool      // the router is spoken to with CURVE
	context        *zmq.Context
	reading        sync.WaitGroup
	waiting        atomic.Int64 // callers

	io      sync.Mutex
	socket  *watched
	monitor *watched
	lookout *lookout

	mu            sync.Mutex
	patience      *patience
	closed        bool
	connected     bool
	refused       *Error // why the last handshake failed: at once what waits ends with it
	suspected     *Error // why the last handshake may have failed: what waits ends with it in its time
	gathering     map[lane]*exchange
	full          []*exchange // gathered, and waiting to be sent
	flushing      bool
	underWay      map[uint64]pursuit
	unsent        []pursuit
	outbox        [][4][]byte
	number        uint64
	subscriptions map[*watched]*sync.Mutex
	statistics    Statistics
}

func open(o *options) (*connection, error) {
	router, err := routerEndpoint(o.endpoint)
	if err != nil {
		return nil, err
	}
	events, err := eventsEndpoint(o.eventsEndpoint, router)
	if err != nil {
		return nil, err
	}
	keys, err := keysFor(router, o.clientKey, o.serverKey)
	if err != nil {
		return nil, err
	}
	patience, err := newPatience(o.patience)
	if err != nil {
		return nil, err
	}
	context, err := zmq.NewContext()
	if err != nil {
		return nil, exhausted(router, err)
	}
	c := &connection{
		endpoint:       router,
		timeout:        o.timeout,
		connectTimeout: o.connectTimeout,
		callsMax:       o.callsPerRequest,
		readsMax:       min(o.callsPerRequest, readsPerRequest),
		keys:           [2]string{o.clientKey, o.serverKey},
		keyed:          keys != nil,
		context:        context,
		patience:       patience,
		gathering:      map[lane]*exchange{},
		underWay:       map[uint64]pursuit{},
		subscriptions:  map[*watched]*sync.Mutex{},
	}
	if events != "" {
		c.eventsEndpoint.Store(&events)
	}
	if c.socket, c.monitor, c.lookout, err = dealer(context, router, keys); err != nil {
		_ = context.Term()
		return nil, err
	}
	c.reading.Add(2)
	go c.read(c.socket)
	go c.read(c.monitor)
	return c, nil
}

// read takes what comes on one of the sockets until the connection is closed.
func (c *connection) read(socket *watched) {
	defer c.reading.Done()
	// An error is that of the closed descriptor.
	_ = socket.raw.Read(func(uintptr) bool {
		c.io.Lock()
		if c.socket != nil {
			if socket == c.monitor {
				c.look()
			} else {
				c.drain()
				c.sendUnsent()
			}
		}
		c.io.Unlock()
		c.post()
		return false
	})
}

// Calls into requests.

var pendings = sync.Pool{New: func() any { return &pending{done: make(chan struct{}, 1)} }}

// call makes one call, together with whatever else is called at this moment, and answers its answer, still encoded.
func (c *connection) call(
	ctx context.Context, target, namespace string, verb verb, body []byte, report func(Progress),
) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, ended(ctx, false, false)
	}
	if len(body) > BodyBytesMax-headBytesMax {
		return nil, invalid("the call takes %d bytes, more than %d", len(body), BodyBytesMax-headBytesMax)
	}
	way := lane{target: target, namespace: namespace}
	timeout := c.timeout
	if deadline, ok := ctx.Deadline(); ok {
		way.timed = true
		// Never negative by much: the context was not at its end a moment ago.
		timeout = max(time.Until(deadline), time.Millisecond)
	}
	p := pendings.Get().(*pending)
	*p = pending{verb: verb, body: body, done: p.done}
	if report != nil {
		p.report = make(chan Progress, 1)
	}
	alone, err := c.gather(way, timeout, p)
	if err != nil {
		return nil, err
	}
	if alone && report == nil {
		c.lookOut(ctx, p)
	}
	ok, whole, err := c.await(ctx, p, report)
	if whole {
		*p = pending{done: p.done}
		pendings.Put(p)
	}
	if err != nil {
		return nil, err
	}
	return ok, nil
}

// gather adds the call to the request that is being gathered for its lane, and sees to it that it is sent.
func (c *connection) gather(way lane, timeout time.Duration, p *pending) (alone bool, err error) {
	most := c.callsMax
	if p.verb.reads() {
		most = c.readsMax
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return false, c.closedError()
	}
	e := c.gathering[way]
	if e != nil && e.bytes+len(p.body) > BodyBytesMax-headBytesMax {
		c.full = append(c.full, e)
		e = nil
	}
	if e == nil {
		e = &exchange{request: request{target: way.target, namespace: way.namespace}}
		if way.timed {
			e.grace = contextGrace
		}
		c.gathering[way] = e
	}
	e.timeout = max(e.timeout, timeout)
	e.add(p)
	if e.unsettled >= most {
		delete(c.gathering, way)
		c.full = append(c.full, e)
	}
	mine := !c.flushing
	c.flushing = true
	alone = c.waiting.Add(1) == 1
	c.mu.Unlock()
	if mine {
		c.flush(alone)
	}
	return alone, nil
}

// flush sends what was gathered. Who calls it has set flushing.
func (c *connection) flush(alone bool) {
	if !alone {
		c.giveTurns()
	}
	c.mu.Lock()
	batch := c.full
	c.full = nil
	for _, e := range c.gathering {
		batch = append(batch, e)
	}
	clear(c.gathering)
	c.mu.Unlock()
	c.launch(batch)
	c.mu.Lock()
	more := len(c.full) > 0 || len(c.gathering) > 0
	c.flushing = more
	c.mu.Unlock()
	if more {
		// The caller has its own reply to wait for.
		go c.flush(false)
	}
}

// giveTurns lets goroutines that are ready to run add their calls, as long as they do.
func (c *connection) giveTurns() {
	before := -1
	for range turnsMax {
		runtime.Gosched()
		c.mu.Lock()
		now := len(c.full) * c.callsMax
		for _, e := range c.gathering {
			now += len(e.bodies)
		}
		full := len(c.full) > 0
		c.mu.Unlock()
		if now == before || full {
			return
		}
		before = now
	}
}

// await waits for the call's outcome, or for the context; whole says that nobody else has the pending any more.
func (c *connection) await(ctx context.Context, p *pending, report func(Progress)) (ok []byte, whole bool, err error) {
	defer c.waiting.Add(-1)
	if report == nil && ctx.Done() == nil {
		<-p.done
		return p.result()
	}
	for {
		select {
		case <-p.done:
			return p.result()
		case progress := <-p.report:
			report(progress)
		case <-ctx.Done():
			return c.giveUp(ctx, p)
		}
	}
}

// result of a call that is settled, and that nobody else has any more.
func (p *pending) result() (ok []byte, whole bool, err error) {
	if p.err != nil {
		return nil, true, p.err
	}
	return p.ok, true, nil
}

// giveUp takes back a call whose caller waits no more.
func (c *connection) giveUp(ctx context.Context, p *pending) (ok []byte, whole bool, err error) {
	c.mu.Lock()
	if p.settled {
		c.mu.Unlock()
		<-p.done
		return p.result()
	}
	e := p.exchange
	p.abandoned = true
	e.abandoned++
	sent := e.sent || e.doubt
	told := ended(ctx, sent, p.verb.changes())
	told.Message += e.repeats.told()
	if !sent && !c.connected {
		told.Message += "; there is no connection to " + c.endpoint
	}
	if e.forsaken() {
		c.takeBackIfForsaken(e)
	} else if e.registered {
		c.takeBack(e, []int{p.index})
	}
	c.mu.Unlock()
	c.post()
	return nil, false, told
}

// run sends a request of one caller, whose calls are pendings without channels, and waits for its end.
func (c *connection) run(ctx context.Context, e *exchange) error {
	if err := ctx.Err(); err != nil {
		return ended(ctx, false, false)
	}
	e.timeout = c.timeout
	if deadline, ok := ctx.Deadline(); ok {
		e.timeout, e.grace = max(time.Until(deadline), time.Millisecond), contextGrace
	}
	over := make(chan struct{})
	e.ended = over
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return c.closedError()
	}
	c.mu.Unlock()
	c.launch([]*exchange{e})
	select {
	case <-over:
		return nil
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.post()
	defer c.mu.Unlock()
	if e.unsettled == 0 {
		return nil
	}
	sent := e.sent || e.doubt
	err := ended(ctx, sent, e.changes)
	e.abandoned = e.unsettled
	c.takeBackIfForsaken(e)
	e.abandoned = 0
	e.doubt = sent
	e.fail(err)
	return err
}

// launch begins requests.
func (c *connection) launch(batch []*exchange) {
	now := time.Now()
	c.mu.Lock()
	launched := batch[:0]
	for _, e := range batch {
		e.withoutAbandoned()
		if e.unsettled == 0 {
			continue
		}
		if c.closed {
			e.fail(c.closedError())
			c.finish(e)
			continue
		}
		e.equip(c.patience)
		e.deadline = now.Add(e.timeout)
		c.register(e)
		c.statistics.Requests++
		c.statistics.Calls += uint64(len(e.bodies))
		launched = append(launched, e)
	}
	c.mu.Unlock()
	if len(launched) == 0 {
		return
	}
	c.io.Lock()
	for _, e := range launched {
		c.dispatch(e, e.encode(now))
	}
	c.lookAgain()
	c.io.Unlock()
	c.post()
}

// launchStream begins a request that is answered in pages.
func (c *connection) launchStream(s *stream) error {
	now := time.Now()
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return c.closedError()
	}
	s.deadline = now.Add(s.timeout)
	c.register(s)
	c.statistics.Requests++
	c.statistics.Calls++
	c.mu.Unlock()
	c.io.Lock()
	c.dispatch(s, s.encode(now))
	c.lookAgain()
	c.io.Unlock()
	c.post()
	return nil
}

// register gives the request an id by which a reply finds it. With mu.
func (c *connection) register(p pursuit) {
	c.number++
	r := p.core()
	r.id = c.number
	r.registered = true
	c.underWay[r.id] = p
}

// dispatch sends a request, or keeps it until there is a connection. With io.
func (c *connection) dispatch(p pursuit, body []byte) {
	if c.socket == nil {
		return
	}
	// A connection that broke is noticed before it is used, or its end would be taken for the end of this request.
	if c.monitor.readable() {
		c.look()
	}
	c.knock()
	r := p.core()
	c.mu.Lock()
	if !r.registered {
		c.mu.Unlock()
		return
	}
	left := r.deadline.Sub(c.patience.now()) + r.grace
	if !c.connected || len(c.unsent) > 0 {
		c.keep(p, left)
		c.mu.Unlock()
		return
	}
	r.sent = true
	c.arm(p, left)
	id := r.id
	c.mu.Unlock()
	if !c.socket.send([4][]byte{requestVersion, binary.BigEndian.AppendUint64(nil, id), []byte(r.target), body}) {
		c.mu.Lock()
		// A broker that takes nothing for the moment is there all the same.
		if r.registered && r.id == id {
			r.sent = false
			c.keep(p, left)
		}
		c.mu.Unlock()
		return
	}
	if e, ok := p.(*exchange); ok && e.repeats != nil {
		c.mu.Lock()
		if numbers := e.givenUp(); len(numbers) > 0 && e.registered && e.id == id {
			c.takeBack(e, numbers)
		}
		c.mu.Unlock()
	}
}

// keep holds a request until there is a connection, for as long as that may take. With mu.
func (c *connection) keep(p pursuit, left time.Duration) {
	r := p.core()
	c.unsent = append(c.unsent, p)
	if !c.connected {
		left = min(left, c.connectTimeout)
		if r.repeats != nil {
			left = min(left, r.repeats.patienceLeft())
		}
	}
	c.arm(p, left)
}

// sendUnsent sends what waits for a connection, or for room. With io.
func (c *connection) sendUnsent() {
	c.mu.Lock()
	if !c.connected || len(c.unsent) == 0 {
		c.mu.Unlock()
		return
	}
	waiting := c.unsent
	c.unsent = nil
	now := c.patience.now()
	bodies := make([][]byte, len(waiting))
	for i, p := range waiting {
		bodies[i] = p.encode(now)
	}
	c.mu.Unlock()
	for i, p := range waiting {
		c.dispatch(p, bodies[i])
	}
	c.lookAgain()
}

// lookAgain takes what the descriptor may not tell of any more, as after a send, which eats the edge. With io.
func (c *connection) lookAgain() {
	if c.socket != nil && c.socket.readable() {
		c.drain()
	}
}

// post sends what is in the outbox. Without locks.
func (c *connection) post() {
	c.mu.Lock()
	if len(c.outbox) == 0 {
		c.mu.Unlock()
		return
	}
	c.mu.Unlock()
	c.io.Lock()
	c.mu.Lock()
	outbox := c.outbox
	c.outbox = nil
	c.mu.Unlock()
	if c.socket != nil {
		for _, frames := range outbox {
			// Without a connection there is nobody to tell: the broker has lost the request with it.
			c.socket.send(frames)
		}
		c.lookAgain()
	}
	c.io.Unlock()
}

// Replies into outcomes.

// drain takes every message that is there. With io.
func (c *connection) drain() {
	for c.socket != nil {
		frames, ok := c.socket.receive()
		if !ok {
			return
		}
		c.take(frames)
	}
}

func (c *connection) take(frames [][]byte) {
	id, last, body, ok := replyFrames(frames)
	var part reply
	var malformed error
	if ok {
		part, malformed = decode(body, (*reader).reply, "reply")
		part.normalise()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var p pursuit
	if ok && len(id) == 8 {
		p = c.underWay[binary.BigEndian.Uint64([]byte(id))]
	}
	if p == nil {
		c.statistics.Stray++
		return
	}
	r := p.core()
	var wrong *Error
	finished := true
	if malformed != nil {
		wrong = asError(malformed)
	} else {
		finished, wrong = p.receive(&part, last)
	}
	switch {
	case wrong != nil:
		r.doubt = true
		c.end(p, wrong)
	case !finished:
		c.takeBackIfForsaken(p)
	case r.failure != nil:
		c.repeatLater(p, r.failure)
	default:
		c.forget(p)
	}
}

// look learns from the monitor what became of the connection. With io.
func (c *connection) look() {
	broke := false
	for {
		event, _, value, err := c.monitor.RecvEvent(zmq.DONTWAIT)
		if err != nil {
			break
		}
		c.mu.Lock()
		switch {
		case event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
			c.connected, c.refused, c.suspected = true, nil, nil
		case event&handshakeFailures != 0:
			c.connected = false
			c.handshakeFailed(event, value)
		case event == zmq.EVENT_CLOSED:
			c.suspected = nil // Nobody is there at all.
		default:
			broke = broke || c.connected
			c.connected = false
		}
		c.mu.Unlock()
	}
	if broke {
		c.drain()
		c.mu.Lock()
		err := fault(CodeUnavailable, "the connection to the broker at %s broke with the call under way", c.endpoint)
		for _, p := range c.pursuits() {
			if r := p.core(); r.sent {
				r.doubt = true
				c.repeatLater(p, err)
			}
		}
		c.mu.Unlock()
	}
	c.mu.Lock()
	connected := c.connected
	if refused := c.refused; refused != nil && !connected {
		for _, p := range slices.Clone(c.unsent) {
			c.end(p, refused)
		}
	}
	c.mu.Unlock()
	if connected {
		c.drain()
		c.sendUnsent()
	}
}

// pursuits are the requests under way, in their order. With mu.
func (c *connection) pursuits() []pursuit {
	all := make([]pursuit, 0, len(c.underWay))
	for _, p := range c.underWay {
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b pursuit) int {
		if a.core().id < b.core().id {
			return -1
		}
		return 1
	})
	return all
}

// handshakeFailed keeps what the calls that wait for a connection are to be told (3/SNBA 3.5). With mu.
func (c *connection) handshakeFailed(event zmq.Event, value int) {
	switch {
	case event == zmq.EVENT_HANDSHAKE_FAILED_AUTH && c.keyed:
		c.refused = fault(CodeUnauthenticated, "the broker at %s refused this client's key: it was revoked, or never given "+
			"to this broker", c.endpoint)
	case event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL && value != mechanismMismatch:
		c.refused = c.mistaken()
	case event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
		// One that has another key than was expected hangs up without a word, as one does that is just being stopped.
		if strings.HasPrefix(c.endpoint, tcp) {
			c.suspected = c.mistaken()
		}
	default:
		c.refused = c.mismatched()
	}
}

func (c *connection) mistaken() *Error {
	if !c.keyed {
		return c.mismatched()
	}
	return fault(CodeUnauthenticated, "the handshake with %s failed: the server key is not this broker's", c.endpoint)
}

func (c *connection) mismatched() *Error {
	if c.keyed {
		return fault(CodeUnauthenticated, "%s does not speak CURVE: connect to it without a key", c.endpoint)
	}
	return fault(CodeUnauthenticated, "%s asks for a key: pass WithClientKey or set %s", c.endpoint, ClientKeyVariable)
}

// knock tries again where libzmq has given up, as it does where it was refused. With io.
func (c *connection) knock() {
	c.mu.Lock()
	refused := c.refused
	c.refused = nil
	c.mu.Unlock()
	if refused != nil {
		c.socket.connectAnew(c.endpoint)
	}
}

// Repeats. All with mu.

// repeatLater sends a request once more after a pause; err ends it where it was repeated for long enough.
func (c *connection) repeatLater(p pursuit, err *Error) {
	if p.forsaken() {
		c.forget(p)
		return
	}
	e, ok := p.(*exchange)
	if !ok {
		c.end(p, err)
		return
	}
	pause, ok := e.again(c.patience, err)
	if !ok {
		c.end(p, err)
		return
	}
	c.disarm(&e.request)
	arming := e.arming
	e.timer = time.AfterFunc(pause, func() { c.repeat(e, arming) })
}

func (c *connection) repeat(e *exchange, arming uint64) {
	c.mu.Lock()
	if !e.registered || e.arming != arming || c.closed {
		c.mu.Unlock()
		return
	}
	e.timer = nil
	delete(c.underWay, e.id)
	c.register(e)
	c.statistics.Repeated++
	body := e.encode(c.patience.now())
	c.mu.Unlock()
	c.io.Lock()
	c.dispatch(e, body)
	c.lookAgain()
	c.io.Unlock()
	c.post()
}

// Ends. All with mu.

func (c *connection) arm(p pursuit, within time.Duration) {
	r := p.core()
	c.disarm(r)
	arming := r.arming
	r.timer = time.AfterFunc(within, func() { c.expire(p, arming, within) })
}

func (c *connection) disarm(r *request) {
	r.arming++
	if r.timer != nil {
		r.timer.Stop()
		r.timer = nil
	}
}

func (c *connection) expire(p pursuit, arming uint64, within time.Duration) {
	c.mu.Lock()
	r := p.core()
	switch {
	case !r.registered || r.arming != arming:
	case r.sent:
		r.doubt = true
		c.takeBack(p, nil)
		who := "the broker itself"
		if r.target != "" {
			who = fmt.Sprintf("%q", r.target)
		}
		c.end(p, fault(CodeDeadlineExceeded, "no answer from %s at %s within %.3g s", who, c.endpoint, r.timeout.Seconds()))
	default:
		err := c.suspected
		if err == nil {
			err = fault(CodeUnavailable, "%s", absentBroker(c.endpoint, within))
		}
		if r.repeats == nil || err.Code != CodeUnavailable {
			c.end(p, err)
		} else {
			c.removeUnsent(p)
			c.repeatLater(p, err)
		}
	}
	c.mu.Unlock()
	c.post()
}

// takeBackIfForsaken sends the Cancel of a request that nobody waits for any more.
func (c *connection) takeBackIfForsaken(p pursuit) {
	if p.forsaken() && p.core().registered {
		c.takeBack(p, nil)
		c.forget(p)
	}
}

// takeBack leaves a Cancel in the outbox, of the whole request or of some of its calls.
func (c *connection) takeBack(p pursuit, calls []int) {
	r := p.core()
	if !r.sent {
		return
	}
	c.number++
	cancel := call{verb: verbCancel, request: binary.BigEndian.AppendUint64(nil, r.id), calls: calls}
	body := appendRequest(nil, [][]byte{cancel.append(nil)}, r.namespace, false, 0, nil)
	c.outbox = append(c.outbox,
		[4][]byte{requestVersion, binary.BigEndian.AppendUint64(nil, c.number), []byte(r.target), body})
}

func (c *connection) end(p pursuit, err *Error) {
	// First the calls, then who waits for all of them.
	p.fail(err)
	c.forget(p)
}

func (c *connection) forget(p pursuit) {
	r := p.core()
	if !r.registered {
		return
	}
	r.registered = false
	delete(c.underWay, r.id)
	c.disarm(r)
	if !r.sent {
		c.removeUnsent(p)
	}
	if e, ok := p.(*exchange); ok {
		c.finish(e)
	}
}

func (c *connection) finish(e *exchange) {
	if e.ended != nil {
		close(e.ended)
		e.ended = nil
	}
}

func (c *connection) removeUnsent(p pursuit) {
	if i := slices.Index(c.unsent, p); i >= 0 {
		c.unsent = slices.Delete(c.unsent, i, i+1)
	}
}

func (c *connection) closedError() *Error {
	return fault(CodeFailedPrecondition, "the connection to %s is closed: dial again", c.endpoint)
}

// subscribe opens a socket of the publisher, for one subscriber.
func (c *connection) subscribe(ctx context.Context, prefixes []string, queued int, guard *sync.Mutex) (*watched, error) {
	endpoint := c.eventsEndpoint.Load()
	if endpoint == nil {
		status, err := c.status(ctx)
		if err != nil {
			return nil, err
		}
		found, err := reachable(&status, c.endpoint)
		if err != nil {
			return nil, err
		}
		endpoint = &found
		c.eventsEndpoint.Store(endpoint)
	}
	keys, err := keysFor(*endpoint, c.keys[0], c.keys[1])
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, c.closedError()
	}
	socket, err := publications(c.context, *endpoint, keys, prefixes, queued)
	if err != nil {
		return nil, err
	}
	socket.endpoint = *endpoint
	c.subscriptions[socket] = guard
	return socket, nil
}

// unsubscribe closes a socket of the publisher, once.
func (c *connection) unsubscribe(socket *watched) {
	c.mu.Lock()
	guard := c.subscriptions[socket]
	delete(c.subscriptions, socket)
	c.mu.Unlock()
	if guard != nil {
		socket.interrupt()
		guard.Lock()
		_ = socket.Close()
		guard.Unlock()
	}
}

func (c *connection) status(ctx context.Context) (Status, error) {
	body, _ := (&call{verb: verbStatus}).encode()
	return answer(ctx, c, "", "", verbStatus, body, (*reader).status, nil)
}

// answer makes a call and reads its answer in the caller's goroutine.
func answer[T any](
	ctx context.Context, c *connection, target, namespace string, verb verb, body []byte, read func(*reader) T,
	report func(Progress),
) (T, error) {
	ok, err := c.call(ctx, target, namespace, verb, body, report)
	if err != nil {
		var zero T
		return zero, err
	}
	return decode(ok, read, "answer")
}

// close takes back what is under way, and closes the sockets.
func (c *connection) close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	err := fault(CodeUnavailable, "the connection to %s was closed with the call under way", c.endpoint)
	for _, p := range c.pursuits() {
		r := p.core()
		r.doubt = r.doubt || r.sent
		c.takeBack(p, nil)
		c.end(p, err)
	}
	for _, e := range c.gathering {
		e.fail(err)
		c.finish(e)
	}
	clear(c.gathering)
	for _, e := range c.full {
		e.fail(err)
		c.finish(e)
	}
	c.full = nil
	sockets := make([]*watched, 0, len(c.subscriptions))
	for socket := range c.subscriptions {
		sockets = append(sockets, socket)
	}
	c.mu.Unlock()
	c.post()
	for _, socket := range sockets {
		c.unsubscribe(socket)
	}
	c.lookout.users.Wait()
	c.io.Lock()
	socket, monitor := c.socket, c.monitor
	c.socket = nil
	c.io.Unlock()
	_ = socket.Monitor("", 0)
	monitor.close()
	socket.close()
	c.reading.Wait()
	c.lookout.close()
	if err := c.context.Term(); err != nil {
		return fault(CodeInternal, "the sockets to %s did not end: %v", c.endpoint, err)
	}
	return nil
}
