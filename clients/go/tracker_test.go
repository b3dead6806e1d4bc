package snapbroker

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// world is a snapshotter's journal and its publisher, which loses messages.
type world struct {
	random  *rand.Rand
	events  []Event
	newest  map[string]int64
	beat    int64
	changed map[string]int64
}

func (w *world) happen() [][]byte {
	namespace := []string{"default", "other", "default2"}[w.random.IntN(3)]
	verb := eventVerbs[w.random.IntN(len(eventVerbs))]
	event := Event{
		Sequence: int64(len(w.events)) + 1, Time: 1, Snapshotter: "s", Namespace: namespace, Verb: verb,
		Key: fmt.Sprint("key-", len(w.events)),
	}
	topic := event.Topic()
	event.Previous = w.newest[topic]
	w.newest[topic], w.changed[topic] = event.Sequence, event.Sequence
	w.events = append(w.events, event)
	return published(topic, event.Sequence, body((*writer).event, event))
}

func (w *world) heartbeat() [][]byte {
	beat := heartbeat{sequence: int64(len(w.events)), previous: w.beat, time: 1, topics: w.changed}
	if w.random.IntN(4) == 0 {
		beat.topics = nil
	}
	w.beat, w.changed = beat.sequence, map[string]int64{}
	return published("s//heartbeat", beat.sequence, body((*writer).heartbeat, beat))
}

func published(topic string, sequence int64, body []byte) [][]byte {
	return [][]byte{[]byte(topic), eventVersion, binary.BigEndian.AppendUint64(nil, uint64(sequence)), body}
}

// page is what the journal answers, in small pages.
func (w *world) page(question *call) *eventsPage {
	page := &eventsPage{next: question.since, newest: int64(len(w.events))}
	tracker := &tracker{topics: question.filters}
	for _, event := range w.events[question.since:] {
		if len(page.events) == 3 {
			break
		}
		page.next = event.Sequence
		if tracker.wanted([]byte(event.Topic())) {
			page.events = append(page.events, event)
		}
	}
	return page
}

// Whatever is lost, doubled or garbled on the way: every event that was asked for comes once, in order.
func TestEveryEventOnce(t *testing.T) {
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 1))
		w := &world{random: random, newest: map[string]int64{}, changed: map[string]int64{}}
		topics := [][]string{
			nil, {"s/"}, {"s/default/snapshot/commit"}, {"s/other/", "s/default/snapshot/remove"}, {"s/default"},
		}[random.IntN(5)]
		tracker := must(newTracker("s", "default", topics, 0, silenceDefault))(t)
		loss := random.Float64() / 2
		var got []int64
		take := func(event Event, ok bool, err error) {
			check(t, err)
			if ok {
				got = append(got, event.Sequence)
			}
		}
		for step := range 200 {
			if tracker.behind && random.IntN(3) == 0 || tracker.behind && step == 199 {
				events, err := tracker.page(w.page(tracker.question()))
				check(t, err)
				for _, event := range events {
					take(event, true, nil)
				}
			}
			var frames [][]byte
			if random.IntN(5) > 0 {
				frames = w.happen()
			} else {
				frames = w.heartbeat()
			}
			topic := string(frames[0])
			subscribed := slices.ContainsFunc(tracker.subscriptions(), func(prefix string) bool {
				return len(topic) >= len(prefix) && topic[:len(prefix)] == prefix
			})
			if !subscribed || random.Float64() < loss {
				continue
			}
			switch random.IntN(30) {
			case 0:
				frames[3] = []byte("garbage")
			case 1:
				// Another topic than that of the event inside, and one that was asked for: others are not looked into.
				other := Topic("s", []string{"default", "other"}[random.IntN(2)], "commit")
				if other == topic {
					other += "s"
				}
				if topic != "s//heartbeat" && tracker.wanted([]byte(other)) {
					frames[0] = []byte(other)
				}
			}
			take(tracker.feed(frames))
			if random.IntN(10) == 0 {
				take(tracker.feed(frames))
			}
		}
		w.changed = nil
		last := published("s//heartbeat", int64(len(w.events)),
			body((*writer).heartbeat, heartbeat{sequence: int64(len(w.events)), previous: int64(len(w.events)) + 1, time: 2}))
		take(tracker.feed(last))
		for tracker.behind {
			events, err := tracker.page(w.page(tracker.question()))
			check(t, err)
			for _, event := range events {
				take(event, true, nil)
			}
		}
		var want []int64
		for _, event := range w.events {
			if tracker.wanted([]byte(event.Topic())) {
				want = append(want, event.Sequence)
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("seed %d, topics %v: %v, not %v", seed, topics, got, want)
		}
		if tracker.statistics.Events != uint64(len(want)) || tracker.position != int64(len(w.events)) {
			t.Fatalf("seed %d: %+v", seed, tracker)
		}
	}
}

func TestTrackerOfAnotherJournal(t *testing.T) {
	tracker := must(newTracker("s", "default", nil, 10, silenceDefault))(t)
	tracker.beginAt(10)
	_, _, err := tracker.feed(published("s//heartbeat", 3, body((*writer).heartbeat, heartbeat{sequence: 3, time: 1})))
	check(t, err)
	if !tracker.behind {
		t.Error("a journal that begins again was not noticed")
	}
	_, err = tracker.page(&eventsPage{newest: 3})
	told := tracker.walkAgain(refused(t, err, ErrOutOfRange))
	if told.Details["since"] != int64(10) || told.Details["newest"] != int64(3) {
		t.Errorf("details %v", told.Details)
	}
	_, err = tracker.page(&eventsPage{newest: 20, next: 10, events: []Event{{Sequence: 4}}})
	refused(t, err, ErrInternal)
}

func TestTrackerOfAnotherVersion(t *testing.T) {
	tracker := must(newTracker("s", "default", nil, 0, silenceDefault))(t)
	tracker.beginAt(0)
	frames := published("s//heartbeat", 0, nil)
	frames[1] = []byte("SNBE\x02")
	_, _, err := tracker.feed(frames)
	refused(t, err, ErrUnimplemented)
	for _, topics := range [][]string{{"other/"}, make([]string, FiltersMax+1)} {
		refused(t, errorOf(newTracker("s", "default", topics, 0, silenceDefault)), ErrInvalidArgument)
	}
}

func TestSilenceIsLearned(t *testing.T) {
	tracker := must(newTracker("s", "default", nil, 0, silenceDefault))(t)
	tracker.beginAt(0)
	for beat := int64(1); beat <= 2; beat++ {
		at := beat * int64(2*time.Second)
		_, _, err := tracker.feed(published("s//heartbeat", 0, body((*writer).heartbeat, heartbeat{time: at})))
		check(t, err)
	}
	if tracker.silence != silenceIntervals*2*time.Second {
		t.Errorf("silence %v", tracker.silence)
	}
}

func TestGarbageIsNoMessage(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 7))
	samples := golden(t).Messages
	for range 20_000 {
		v := samples[random.IntN(len(samples))]
		if len(v.Hex) > 2000 {
			continue
		}
		spoilt := v.body(t)
		for range 1 + random.IntN(3) {
			if len(spoilt) > 0 {
				spoilt[random.IntN(len(spoilt))] = byte(random.Uint32())
			}
		}
		codec, known := codecs[v.Type]
		if !known {
			t.Fatalf("no codec for %s", v.Type)
		}
		if _, err := codec.read(spoilt); err != nil && !errors.Is(err, ErrInternal) {
			t.Fatalf("%x: %v", spoilt, err)
		}
	}
}

func BenchmarkEvents(b *testing.B) {
	event := Event{Sequence: 1, Time: 1 << 60, Snapshotter: "overlayfs", Namespace: "default", Verb: "prepare",
		Key: "job-12345", Info: &Info{Name: "job-12345", Kind: Active, Parent: "base", Created: 1 << 60, Updated: 1 << 60}}
	frames := published(event.Topic(), 1, body((*writer).event, event))
	tracker := must(newTracker("overlayfs", "default", nil, 0, silenceDefault))(b)
	b.ReportAllocs()
	for b.Loop() {
		tracker.beginAt(0)
		if _, ok, err := tracker.feed(frames); !ok || err != nil {
			b.Fatal(ok, err)
		}
	}
}
