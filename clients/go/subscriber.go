package snapbroker

import (
	"context"
	"errors"
	"iter"
	"os"
	"strings"
	"sync"
	"time"
)

// A SubscribeOption is WithSince, WithTopics or WithSilence.
type SubscribeOption func(*subscribeOptions) error

type subscribeOptions struct {
	since   int64
	fromNow bool
	topics  []string
	silence time.Duration
	queued  int
}

// WithSince begins above this sequence, with what the journal has. Without it a subscriber begins with what comes.
func WithSince(sequence int64) SubscribeOption {
	return func(o *subscribeOptions) error {
		if sequence < 0 {
			return invalid("since must be a sequence, 0 or more, not %d", sequence)
		}
		o.since, o.fromNow = sequence, false
		return nil
	}
}

// WithTopics gives only the events on topics that begin with one of these (see Topic). Without it those of the client's
// namespace.
func WithTopics(topics ...string) SubscribeOption {
	return func(o *subscribeOptions) error { o.topics = topics; return nil }
}

// WithSilence says after how long without any message the journal is asked whether something was missed, until two
// heartbeats have told their interval; from then on it is three of those. 5 seconds where nothing is said.
func WithSilence(silence time.Duration) SubscribeOption {
	return func(o *subscribeOptions) error { o.silence = silence; return positive("silence", silence) }
}

// A Subscriber has the events of one snapshotter, each once and in the order of their sequence. What the publisher
// drops, and what was published while there was no connection or no broker, is taken from the journal. It is for one
// goroutine at a time; Close may be called by any.
type Subscriber struct {
	client  *Client
	tracker *tracker
	guard   sync.Mutex // of the socket and of what follows it: closing is another goroutine's
	socket  *watched
	pages   *pages
	closed  bool
	ready   []Event
	heard   time.Time
}

// Subscribe subscribes to events. From the moment it returns none is missed.
func (c *Client) Subscribe(ctx context.Context, given ...SubscribeOption) (*Subscriber, error) {
	o := subscribeOptions{fromNow: true, silence: silenceDefault, queued: eventsQueuedMax}
	for _, option := range given {
		if err := option(&o); err != nil {
			return nil, err
		}
	}
	s, err := c.subscriber(ctx, &o)
	if err != nil {
		return nil, err
	}
	if s.socket, err = c.connection.subscribe(ctx, s.tracker.subscriptions(), o.queued, &s.guard); err != nil {
		return nil, err
	}
	if o.fromNow {
		// The first page of a walk says which event is the newest.
		for page, err := range c.WalkPages(ctx, nil, WithPage(1)) {
			if err != nil {
				s.Close()
				return nil, err
			}
			s.tracker.beginAt(page.Sequence)
			break
		}
	}
	s.heard = time.Now()
	return s, nil
}

func (c *Client) subscriber(ctx context.Context, o *subscribeOptions) (*Subscriber, error) {
	snapshotter, err := c.Snapshotter(ctx)
	if err != nil {
		return nil, err
	}
	for _, topic := range o.topics {
		if err := checkText(topic, "topic"); err != nil {
			return nil, err
		}
	}
	tracker, err := newTracker(snapshotter, c.namespace, o.topics, o.since, o.silence)
	if err != nil {
		return nil, err
	}
	return &Subscriber{client: c, tracker: tracker, heard: time.Now()}, nil
}

// Journal gives out the events above a sequence that the journal has, and ends with its newest: on topics that begin
// with one of these, without topics those of the client's namespace. ErrOutOfRange: the journal does not reach back so
// far; the details "oldest" and "newest" say what it has.
func (c *Client) Journal(ctx context.Context, since int64, topics ...string) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		o := subscribeOptions{topics: topics, silence: silenceDefault}
		if err := WithSince(since)(&o); err != nil {
			yield(Event{}, err)
			return
		}
		s, err := c.subscriber(ctx, &o)
		if err != nil {
			yield(Event{}, err)
			return
		}
		defer s.Close()
		for len(s.ready) > 0 || s.tracker.behind {
			event, err := s.Next(ctx)
			if errors.Is(err, errEndOfJournal) {
				return
			}
			if !yield(event, err) || err != nil {
				return
			}
		}
	}
}

var errEndOfJournal = errors.New("the journal is at its end")

// Close unsubscribes. A Next that waits ends with ErrFailedPrecondition.
func (s *Subscriber) Close() {
	s.guard.Lock()
	s.closed = true
	s.guard.Unlock()
	if asked := s.swapPages(nil); asked != nil {
		asked.close()
	}
	if s.socket != nil {
		s.client.connection.unsubscribe(s.socket)
	}
}

// Sequence: every event asked for up to this one was given out. It is where another subscriber goes on (WithSince).
func (s *Subscriber) Sequence() int64 {
	if len(s.ready) > 0 {
		return s.ready[0].Sequence - 1
	}
	return s.tracker.position
}

// Statistics say what was dropped on the way, and healed.
func (s *Subscriber) Statistics() SubscriberStatistics { return s.tracker.statistics }

// Events gives out events for as long as they come: it ends with the first error, that of the context included.
func (s *Subscriber) Events(ctx context.Context) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		for {
			event, err := s.Next(ctx)
			if !yield(event, err) || err != nil {
				return
			}
		}
	}
}

// Next waits for the next event. After an error it may be called again, and misses nothing: after ErrUnavailable, where
// the broker was away for longer than the client's timeout, and after that of the context.
//
// ErrOutOfRange: the journal has no longer what was missed. Walk again, and subscribe above the walk's sequence; a
// Mirror does.
func (s *Subscriber) Next(ctx context.Context) (Event, error) {
	for len(s.ready) == 0 {
		switch {
		case s.isClosed():
			return Event{}, fault(CodeFailedPrecondition, "the subscriber is closed: subscribe again")
		case s.tracker.behind:
			if err := s.askJournal(ctx); err != nil {
				return Event{}, err
			}
		case s.socket == nil:
			return Event{}, errEndOfJournal
		default:
			event, ok, err := s.receive(ctx)
			if ok || err != nil {
				return event, err
			}
		}
	}
	event := s.ready[0]
	s.ready = s.ready[1:]
	return event, nil
}

// receive takes the next published event if one comes; not ok after a message that is none, and after silence.
func (s *Subscriber) receive(ctx context.Context) (event Event, ok bool, err error) {
	frames, err := s.take()
	if frames == nil && err == nil {
		frames, err = s.wait(ctx)
	}
	if frames == nil || err != nil {
		return event, false, err
	}
	s.heard = time.Now()
	return s.tracker.feed(frames)
}

func (s *Subscriber) isClosed() bool {
	s.guard.Lock()
	defer s.guard.Unlock()
	return s.closed
}

func (s *Subscriber) take() ([][]byte, error) {
	s.guard.Lock()
	defer s.guard.Unlock()
	if !s.socket.opened() {
		return nil, s.client.connection.closedError()
	}
	frames, _ := s.socket.receive()
	return frames, nil
}

// wait waits for a message, the context's end, or silence, which asks the journal: no frames then.
func (s *Subscriber) wait(ctx context.Context) ([][]byte, error) {
	if ctx.Err() != nil {
		return nil, ended(ctx, true, false)
	}
	silent := s.heard.Add(s.tracker.silence)
	_ = s.socket.file.SetReadDeadline(silent)
	stop := context.AfterFunc(ctx, func() { _ = s.socket.file.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var frames [][]byte
	var closed error
	err := s.socket.raw.Read(func(uintptr) bool {
		frames, closed = s.take()
		return frames != nil || closed != nil
	})
	switch {
	case frames != nil:
		return frames, nil
	case closed != nil:
		return nil, closed
	case ctx.Err() != nil:
		return nil, ended(ctx, true, false)
	case !errors.Is(err, os.ErrDeadlineExceeded):
		return nil, s.client.connection.closedError()
	}
	if now := time.Now(); !now.Before(silent) {
		// A program that was stopped for long wakes to both: what lies there first.
		if frames, closed = s.take(); frames != nil || closed != nil {
			return frames, closed
		}
		s.heard = now
		s.tracker.doubt()
		s.knock()
	}
	return nil, nil
}

// knock has a connection to another machine made anew that nothing was heard of: libzmq gives up where it was refused.
func (s *Subscriber) knock() {
	s.guard.Lock()
	defer s.guard.Unlock()
	if s.socket.opened() && strings.HasPrefix(s.socket.endpoint, tcp) {
		s.socket.connectAnew(s.socket.endpoint)
	}
}

// askJournal takes a page of what is missing from the journal, asking again, until the timeout, where it is unavailable.
func (s *Subscriber) askJournal(ctx context.Context) error {
	giveUp := deadlineOf(ctx, time.Now(), s.client.connection.timeout)
	pause := journalRetryFirst
	for {
		err := s.readJournal(ctx)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, ErrOutOfRange):
			return s.tracker.walkAgain(asError(err))
		case !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrResourceExhausted):
			return err
		case s.socket == nil || time.Now().Add(pause).After(giveUp):
			return err
		}
		if err := sleep(ctx, pause); err != nil {
			return err
		}
		pause = min(2*pause, journalRetryMax)
	}
}

func (s *Subscriber) readJournal(ctx context.Context) (err error) {
	asked := s.swapPages(nil)
	if asked == nil {
		if asked, err = s.client.ask(ctx, s.tracker.question()); err != nil {
			return err
		}
	}
	body, err := asked.next(ctx)
	if err != nil || body == nil {
		return err
	}
	page, err := decode(body, (*reader).eventsPage, "page")
	if err == nil {
		s.ready, err = s.tracker.page(&page)
	}
	if err == nil && s.tracker.behind {
		asked = s.swapPages(asked)
	}
	if asked != nil {
		asked.close()
	}
	return err
}

// swapPages leaves pages for the next question, and takes what was left.
func (s *Subscriber) swapPages(next *pages) *pages {
	s.guard.Lock()
	defer s.guard.Unlock()
	before := s.pages
	s.pages = next
	if s.closed && next != nil {
		s.pages = nil
		return next
	}
	return before
}
