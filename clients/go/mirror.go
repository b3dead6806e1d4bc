package snapbroker

import (
	"context"
	"errors"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"
)

// A Mirror holds what exists in a namespace of a snapshotter, and follows its events: state and stream without a gap,
// across lost messages and restarts of the broker (2/SNBE section 6). Where the journal no longer has what was missed
// it walks again. It is for one goroutine at a time; Close may be called by any.
type Mirror struct {
	subscriber *Subscriber
	snapshots  map[string]Info
	walked     bool
}

// A Change of a mirror.
type Change struct {
	// Event is what happened, applied to the mirror already; nil after a walk.
	Event *Event
	// Sequence of the event, or of the first page of the walk: events above it follow.
	Sequence int64
	// Known: the mirror had the event's effect already, from a later page of the walk.
	Known bool
	// Before is what the mirror held before a walk that was not the first; nil else.
	Before map[string]Info
}

// Mirror subscribes to the events of the client's namespace, and walks with the first Next.
func (c *Client) Mirror(ctx context.Context) (*Mirror, error) { return c.mirror(ctx) }

func (c *Client) mirror(ctx context.Context, given ...SubscribeOption) (*Mirror, error) {
	s, err := c.Subscribe(ctx, append(given, WithSince(0))...)
	if err != nil {
		return nil, err
	}
	return &Mirror{subscriber: s}, nil
}

// Close unsubscribes. What the mirror holds stays.
func (m *Mirror) Close() { m.subscriber.Close() }

// Len is the number of snapshots that the mirror holds.
func (m *Mirror) Len() int { return len(m.snapshots) }

// Get answers a snapshot that the mirror holds.
func (m *Mirror) Get(name string) (Info, bool) {
	info, ok := m.snapshots[name]
	return info, ok
}

// Snapshots are all that the mirror holds, in the order of the bytes of their names.
func (m *Mirror) Snapshots() []Info {
	infos := make([]Info, 0, len(m.snapshots))
	for _, info := range m.snapshots {
		infos = append(infos, info)
	}
	slices.SortFunc(infos, func(a, b Info) int { return strings.Compare(a.Name, b.Name) })
	return infos
}

// Statistics say what was dropped on the way, and healed.
func (m *Mirror) Statistics() SubscriberStatistics { return m.subscriber.Statistics() }

// Changes gives out changes for as long as they come: it ends with the first error, that of the context included.
func (m *Mirror) Changes(ctx context.Context) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		for {
			change, err := m.Next(ctx)
			if !yield(change, err) || err != nil {
				return
			}
		}
	}
}

// Next waits for the next change; the first is a walk. After an error it may be called again, and misses nothing.
func (m *Mirror) Next(ctx context.Context) (Change, error) {
	if !m.walked {
		return m.walk(ctx)
	}
	event, err := m.subscriber.Next(ctx)
	if errors.Is(err, ErrOutOfRange) {
		m.walked = false
		return m.walk(ctx)
	}
	if err != nil {
		return Change{}, err
	}
	return Change{Event: &event, Sequence: event.Sequence, Known: !m.apply(&event)}, nil
}

// apply says whether the event changed anything.
func (m *Mirror) apply(event *Event) (changed bool) {
	if event.Verb == "commit" || event.Verb == "remove" {
		_, changed = m.snapshots[event.Key]
		delete(m.snapshots, event.Key)
	}
	if event.Info != nil {
		before, found := m.snapshots[event.Info.Name]
		changed = changed || !found || !before.equal(event.Info)
		m.snapshots[event.Info.Name] = *event.Info
	}
	return changed
}

func (i *Info) equal(other *Info) bool {
	return i.Name == other.Name && i.Kind == other.Kind && i.Parent == other.Parent && i.Created == other.Created &&
		i.Updated == other.Updated && maps.Equal(i.Labels, other.Labels)
}

// walk reads the state anew, asking again, until the timeout, where the broker is away.
func (m *Mirror) walk(ctx context.Context) (Change, error) {
	s := m.subscriber
	giveUp := deadlineOf(ctx, time.Now(), s.client.connection.timeout)
	pause := journalRetryFirst
	for {
		infos, sequence, err := s.client.List(ctx, nil)
		if err == nil {
			before := m.snapshots
			m.snapshots = make(map[string]Info, len(infos))
			for _, info := range infos {
				m.snapshots[info.Name] = info
			}
			s.restart(sequence)
			m.walked = true
			return Change{Sequence: sequence, Before: before}, nil
		}
		if !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrResourceExhausted) ||
			time.Now().Add(pause).After(giveUp) {
			return Change{}, err
		}
		if err := sleep(ctx, pause); err != nil {
			return Change{}, err
		}
		pause = min(2*pause, journalRetryMax)
	}
}

// restart goes on above another sequence, with what the journal has.
func (s *Subscriber) restart(since int64) {
	if asked := s.swapPages(nil); asked != nil {
		asked.close()
	}
	s.ready = nil
	s.tracker.position = since
	s.tracker.behind = true
	s.heard = time.Now()
}
