package snapbroker

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"time"
)

// What a subscriber has seen and has missed: published messages and a journal become every event once, in order.
//
// A snapshotter's events are one sequence: 1, 2, 3 and so on. A publisher drops messages for a slow subscriber, and a
// subscription reaches it later than the first events, so what arrives on the socket is the sequence with holes. The
// journal has no holes but must be asked. The tracker gives out what arrives as long as that is provably the next event,
// and else says that it is behind: then the journal is asked for what is above its position.
//
// What is provably next. A subscriber of one topic follows the chain: each event names the one before it on its topic. A
// subscriber of several topics cannot: that nothing is missing on the topic of an event does not say that nothing before
// it is missing on another, and giving it out first would break the order. It therefore subscribes to the whole
// snapshotter and follows the sequence itself, skipping by topic, undecoded, what it was not asked for.
//
// The tail. A hole with nothing behind it is seen by the next heartbeat, which names the newest sequence, and the newest
// of each topic that changed since the heartbeat before.
//
// Why messages may be thrown away while behind. An event is in the journal before it is published, so the journal's
// answer contains every event that arrived before the question.
//
// A journal that starts again (the store was replaced) shows as a heartbeat below the position. The journal is then
// asked, and answers out_of_range: the caller has to walk again.

const (
	silenceDefault   = 5 * time.Second // how long nothing may arrive before the journal is asked, until heartbeats tell
	silenceIntervals = 3               // intervals of the heartbeat without a message that are silence (2/SNBE 7.2)
	silenceMin       = time.Second     // shortest that is believed in: a busy machine may be late by as much
	silenceMax       = 5 * time.Minute // longest: the broker's clock may have been set between two heartbeats
	journalPage      = 1000            // events in a page that the journal is asked for
	pagesAtOnce      = 8               // pages asked for at once: what a slow reader may have lying in its memory
)

var eventVerbs = [...]string{"prepare", "view", "commit", "update", "remove", "cleanup"}

// SubscriberStatistics say what became of the messages.
type SubscriberStatistics struct {
	Events     uint64 // given out
	Duplicates uint64 // dropped: the journal had brought them
	Gaps       uint64 // healed: how often the journal was asked because something was, or may have been, missed
	Malformed  uint64 // messages that were none
}

type tracker struct {
	snapshotter string
	topics      []string
	position    int64 // every event asked for with a sequence up to it was given out
	behind      bool  // the journal has to be asked for what is above position
	silence     time.Duration
	statistics  SubscriberStatistics
	beatTime    int64
	before      Event // the one given out last
	heartbeats  string
	onlyTopic   string // the one complete topic asked for, if it is one
}

func newTracker(snapshotter, namespace string, topics []string, since int64, silence time.Duration) (*tracker, error) {
	if len(topics) == 0 {
		topics = []string{snapshotter + "/" + namespace + "/"}
	}
	if len(topics) > FiltersMax {
		return nil, invalid("%d topics, more than %d: use a shorter prefix", len(topics), FiltersMax)
	}
	for _, topic := range topics {
		if !strings.HasPrefix(topic, snapshotter+"/") {
			return nil, invalid("topic %.80q does not begin with %q: a subscriber has the events of one snapshotter; open "+
				"one for each with In", topic, snapshotter+"/")
		}
	}
	t := &tracker{
		snapshotter: snapshotter,
		topics:      slices.Clone(topics),
		position:    since,
		behind:      true,
		silence:     min(silence, silenceMax),
		heartbeats:  heartbeatTopic(snapshotter),
	}
	if len(topics) == 1 && complete(topics[0]) {
		t.onlyTopic = topics[0]
	}
	return t, nil
}

func complete(topic string) bool {
	parts := strings.Split(topic, "/")
	return len(parts) == 4 && parts[2] == "snapshot" && slices.Contains(eventVerbs[:], parts[3])
}

// subscriptions are the prefixes to subscribe to; the heartbeat is covered.
func (t *tracker) subscriptions() []string {
	if t.onlyTopic != "" {
		return []string{t.onlyTopic, t.heartbeats}
	}
	return []string{t.snapshotter + "/"}
}

// beginAt has what comes above newest given out, the newest sequence there is.
func (t *tracker) beginAt(newest int64) {
	t.position = newest
	t.behind = false
}

// question asks the journal for what is above the position.
func (t *tracker) question() *call {
	return &call{verb: verbEvents, since: t.position, filters: t.topics, page: journalPage, credit: pagesAtOnce}
}

// doubt has the journal asked, though no message says so: nothing was heard for too long.
func (t *tracker) doubt() { t.miss() }

func (t *tracker) miss() {
	t.behind = true
	t.statistics.Gaps++
}

func (t *tracker) wanted(topic []byte) bool {
	for _, prefix := range t.topics {
		if len(topic) >= len(prefix) && string(topic[:len(prefix)]) == prefix {
			return true
		}
	}
	return false
}

// feed takes one published message; ok where event is the next one. A message that is none counts as lost: the next
// one shows the gap.
func (t *tracker) feed(frames [][]byte) (event Event, ok bool, err error) {
	if t.behind {
		// A heartbeat may be among what is thrown away: the next is not one interval after the one before.
		t.beatTime = 0
		return event, false, nil
	}
	if len(frames) != 4 || len(frames[2]) != 8 {
		t.statistics.Malformed++
		return event, false, nil
	}
	topic, version, sequence, body := frames[0], frames[1], binary.BigEndian.Uint64(frames[2]), frames[3]
	if string(version) != string(eventVersion) {
		return event, false, fault(CodeUnimplemented, "the broker publishes events as %q, not %q: update the client",
			version, eventVersion)
	}
	if sequence > 1<<63-1 {
		t.statistics.Malformed++
		return event, false, nil
	}
	if string(topic) == t.heartbeats {
		beat, err := decode(body, (*reader).heartbeat, "heartbeat")
		if err != nil {
			t.statistics.Malformed++
		} else {
			t.feedHeartbeat(&beat)
		}
		return event, false, nil
	}
	return t.feedEvent(topic, int64(sequence), body)
}

func (t *tracker) feedEvent(topic []byte, sequence int64, body []byte) (event Event, ok bool, err error) {
	if sequence <= t.position {
		t.statistics.Duplicates++
		return event, false, nil
	}
	follows := sequence == t.position+1
	switch {
	case t.onlyTopic != "" && string(topic) != t.onlyTopic:
		// A subscription is a prefix: a topic that merely begins like the one asked for may match.
		return event, false, nil
	case t.onlyTopic != "":
		ok = true
	default:
		ok = follows && t.wanted(topic)
	}
	if ok {
		event, err = decodeLike(body, (*reader).event, "event", &t.before)
		if err != nil || event.Sequence != sequence || !event.isOn(topic) {
			t.statistics.Malformed++
			return Event{}, false, nil
		}
		if t.onlyTopic != "" {
			follows = event.Previous <= t.position
		}
	}
	if !follows {
		t.miss()
		return Event{}, false, nil
	}
	t.position = sequence
	if ok {
		t.statistics.Events++
	}
	return event, ok, nil
}

func (t *tracker) feedHeartbeat(beat *heartbeat) {
	t.learnInterval(beat.time)
	if beat.sequence == t.position {
		return
	}
	if beat.sequence > t.position && t.position >= beat.previous && beat.topics != nil {
		missed := false
		for topic, sequence := range beat.topics {
			missed = missed || sequence > t.position && t.wanted([]byte(topic))
		}
		if !missed {
			t.position = beat.sequence
			return
		}
	}
	t.miss()
}

// learnInterval takes the publisher's times: those of arrival say how often this program looks.
func (t *tracker) learnInterval(at int64) {
	before := t.beatTime
	t.beatTime = at
	if 0 < before && before < at {
		interval := min(time.Duration(at-before), silenceMax)
		t.silence = min(max(silenceIntervals*interval, silenceMin), silenceMax)
	}
}

// page takes one page of the journal; answers the events that were not given out yet. It is ErrOutOfRange where the
// journal ends below the position: it is not the journal that was read before.
func (t *tracker) page(page *eventsPage) ([]Event, error) {
	if page.newest < t.position {
		err := fault(CodeOutOfRange, "the journal of %q ends at %d, below %d", t.snapshotter, page.newest, t.position)
		err.Details = map[string]any{"newest": page.newest}
		return nil, err
	}
	before := t.position
	fresh := page.events[:0]
	last := int64(0)
	for i := range page.events {
		event := page.events[i]
		last = event.Sequence
		if event.Sequence > before && t.wanted([]byte(event.Topic())) {
			fresh = append(fresh, event)
		}
	}
	t.position = max(before, page.next, last)
	if t.position == before && before < page.newest && len(page.events) > 0 {
		return nil, fault(CodeInternal, "the journal of %q answered what is above %d with what is not", t.snapshotter, before)
	}
	if t.position >= page.newest || t.position == before {
		// Nothing for these topics up to the newest: an empty page that leads nowhere is the end.
		t.position = max(t.position, page.newest)
		t.behind = false
	}
	t.statistics.Events += uint64(len(fresh))
	return fresh, nil
}

// walkAgain is the journal's refusal, as it reaches the caller.
func (t *tracker) walkAgain(err *Error) *Error {
	oldest, hasOldest := number(err.Details["oldest"])
	newest, hasNewest := number(err.Details["newest"])
	held := ""
	switch {
	case hasOldest && hasNewest && oldest <= newest:
		held = fmt.Sprintf(", which has %d to %d", oldest, newest)
	case hasOldest && hasNewest:
		held = ", which is empty"
	case hasNewest:
		held = fmt.Sprintf(", which ends at %d", newest)
	}
	// The journal's words are for whoever asks it directly, and end in advice of their own.
	told := fault(CodeOutOfRange, "the events of %q above %d are not in its journal%s: walk again, and follow the events "+
		"above the walk's sequence", t.snapshotter, t.position, held)
	told.Details = map[string]any{"since": t.position}
	for key, value := range err.Details {
		told.Details[key] = value
	}
	return told
}
