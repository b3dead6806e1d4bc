"""Every event once and in order, whatever the publisher loses, repeats or garbles: the tracker against a journal."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapbroker import protocol
from snapbroker.contract import Event, topic
from snapbroker.errors import Internal, InvalidArgument, OutOfRange, Unimplemented
from snapbroker.protocol import EventsPage, Heartbeat
from snapbroker.subscriber import SILENCE_SECONDS, Tracker, walk_again

SNAPSHOTTER = "overlayfs"
TOPICS = [
    (),
    ("overlayfs/",),
    ("overlayfs/default/",),
    ("overlayfs/default/snapshot/commit",),
    ("overlayfs/default/snapshot/com",),
    ("overlayfs/other/snapshot/prepare", "overlayfs/default/snapshot/commit"),
    ("overlayfs/nobody/",),
]


class Journal:
    """A snapshotter's journal, and what its publisher sends."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.newest_of_topic: dict[str, int] = {}
        self.beat = 0

    def happen(self, namespace: str, verb: str) -> list[bytes]:
        name = topic(SNAPSHOTTER, namespace, verb)
        event = Event(len(self.events) + 1, self.newest_of_topic.get(name, 0), 0, SNAPSHOTTER, namespace, verb, "k")
        self.newest_of_topic[name] = event.sequence
        self.events.append(event)
        return list(protocol.event_frames(name, event.sequence, protocol.encode(event)))

    def heartbeat(self, *, with_topics: bool = True, time: int = 0) -> list[bytes]:
        newest = len(self.events)
        changed = {name: last for name, last in self.newest_of_topic.items() if last > self.beat}
        beat = Heartbeat(sequence=newest, previous=self.beat, time=time, topics=changed if with_topics else None)
        self.beat = newest
        return list(protocol.event_frames(protocol.heartbeat_topic(SNAPSHOTTER), newest, protocol.encode(beat)))

    def matching(self, topics: Sequence[str]) -> list[Event]:
        return [event for event in self.events if event.topic.startswith(tuple(topics))]

    def page(self, call: protocol.Events, size: int) -> EventsPage:
        found = [event for event in self.matching(call.topics) if event.sequence > call.since]
        newest = len(self.events)
        following = found[size - 1].sequence if len(found) > size else newest
        return EventsPage(events=tuple(found[:size]), next=following, newest=newest)


def subscribed(tracker: Tracker, frames: list[bytes]) -> bool:
    return any(frames[0].startswith(prefix) for prefix in tracker.subscriptions)


def live(topics: Sequence[str] = (), since: int = 0) -> Tracker:
    tracker = Tracker(SNAPSHOTTER, "default", topics, since)
    tracker.begin_at(since)
    return tracker


happenings = st.tuples(st.sampled_from(["default", "other"]), st.sampled_from(["prepare", "commit", "remove"]))


@settings(max_examples=400)
@given(st.data())
def test_whatever_is_lost_or_repeated_the_journal_comes_out(data: st.DataObject):
    """Messages are lost, repeated and garbled at will; heartbeats too; the journal is asked in small pages."""
    topics = data.draw(st.sampled_from(TOPICS))
    journal = Journal()
    for happening in data.draw(st.lists(happenings, max_size=5)):
        journal.happen(*happening)
    since = data.draw(st.integers(0, len(journal.events)))
    tracker = Tracker(SNAPSHOTTER, "default", topics, since)
    queue: list[list[bytes]] = []
    seen: list[Event] = []

    def step() -> None:
        if tracker.behind:
            size = data.draw(st.integers(1, 3))
            seen.extend(tracker.page(journal.page(tracker.question(), size)))
        elif queue and (event := tracker.feed(queue.pop(0))) is not None:
            seen.append(event)

    for _ in range(data.draw(st.integers(0, 25))):
        match data.draw(st.sampled_from(["event", "event", "event", "heartbeat", "step", "step", "silence"])):
            case "event":
                frames = journal.happen(*data.draw(happenings))
            case "heartbeat":
                frames = journal.heartbeat(with_topics=data.draw(st.booleans()))
            case "silence":
                tracker.doubt()
                continue
            case _:
                step()
                continue
        fate = data.draw(st.sampled_from(["arrives", "arrives", "arrives", "lost", "twice", "garbled"]))
        if fate != "lost" and subscribed(tracker, frames):
            sent = [*frames[:3], b"\xc1"] if fate == "garbled" else frames
            queue.extend([sent] * (2 if fate == "twice" else 1))

    # One heartbeat that arrives is enough to know of everything before it.
    queue.append(journal.heartbeat(with_topics=data.draw(st.booleans())))
    while queue or tracker.behind:
        step()
    assert seen == [event for event in journal.matching(tracker.topics) if event.sequence > since]
    assert tracker.position == len(journal.events)


@given(st.lists(happenings, max_size=30), st.sampled_from(TOPICS))
def test_where_nothing_is_lost_the_journal_is_not_asked(happened: list[tuple[str, str]], topics: tuple[str, ...]):
    journal, tracker = Journal(), live(topics)
    seen = []
    for happening in happened:
        frames = journal.happen(*happening)
        if subscribed(tracker, frames) and (event := tracker.feed(frames)) is not None:
            seen.append(event)
    assert not tracker.behind
    assert seen == journal.matching(tracker.topics)
    assert tracker.statistics().gaps == 0


def test_an_event_behind_a_hole_on_another_topic_waits_for_the_hole():
    """The chain of one topic has no hole here: `previous` alone would yield the commit before the prepare."""
    journal, tracker = Journal(), live()
    journal.happen("default", "prepare")
    commit = journal.happen("default", "commit")
    assert tracker.feed(commit) is None
    assert tracker.behind
    fresh = tracker.page(journal.page(tracker.question(), 10))
    assert [event.verb for event in fresh] == ["prepare", "commit"]
    assert tracker.statistics().gaps == 1


def test_one_topic_is_followed_by_its_chain():
    tracker = live(["overlayfs/default/snapshot/commit"])
    assert tracker.subscriptions == (b"overlayfs/default/snapshot/commit", b"overlayfs//heartbeat")
    journal = Journal()
    first = journal.happen("default", "commit")
    journal.happen("default", "prepare")
    second = journal.happen("default", "commit")
    third = journal.happen("default", "commit")
    assert tracker.feed(first) is not None
    assert tracker.feed(second) is not None
    assert tracker.feed(third) is not None
    assert not tracker.behind


def test_the_loss_of_one_topics_event_is_seen():
    tracker, journal = live(["overlayfs/default/snapshot/commit"]), Journal()
    journal.happen("default", "commit")
    assert tracker.feed(journal.happen("default", "commit")) is None
    assert tracker.behind


def test_a_longer_topic_is_not_the_one_asked_for():
    tracker, journal = live(["overlayfs/default/snapshot/commit"]), Journal()
    frames = journal.happen("default", "commit")
    assert tracker.feed([b"overlayfs/default/snapshot/commit-not", *frames[1:]]) is None
    assert not tracker.behind
    assert tracker.feed(frames) is not None


def test_a_heartbeat_shows_the_lost_tail():
    tracker, journal = live(), Journal()
    journal.happen("default", "prepare")
    tracker.feed(journal.heartbeat(with_topics=True))
    assert tracker.behind


def test_a_heartbeat_that_names_only_other_topics_asks_nothing():
    tracker, journal = live(["overlayfs/default/snapshot/commit"]), Journal()
    journal.happen("other", "prepare")
    tracker.feed(journal.heartbeat(with_topics=True))
    assert not tracker.behind
    assert tracker.position == 1


def test_after_a_lost_heartbeat_the_next_one_is_not_believed():
    tracker, journal = live(["overlayfs/default/snapshot/commit"]), Journal()
    journal.happen("default", "commit")
    journal.heartbeat(with_topics=True)
    journal.happen("other", "prepare")
    tracker.feed(journal.heartbeat(with_topics=True))
    assert tracker.behind


def test_silence_is_three_intervals_of_the_heartbeat():
    tracker, journal, second = live(), Journal(), 10**9
    assert tracker.silence == SILENCE_SECONDS
    told = []
    for time in (100, 102, 104.5, 90, 90, 91, 91.001, 5000):
        tracker.feed(journal.heartbeat(time=round(time * second)))
        told.append(tracker.silence)
    # A clock that was set back tells nothing, and no silence is shorter or longer than makes sense.
    assert told == [SILENCE_SECONDS, 6, 7.5, 7.5, 7.5, 3, 1, 300]
    assert Tracker(SNAPSHOTTER, "default", (), 0, silence=1e9).silence == 300


def test_heartbeats_that_were_thrown_away_are_not_counted_as_an_interval():
    tracker, journal, second = live(), Journal(), 10**9
    tracker.feed(journal.heartbeat(time=second))
    tracker.doubt()
    tracker.feed(journal.heartbeat(time=2 * second))
    tracker.page(EventsPage())
    tracker.feed(journal.heartbeat(time=30 * second))
    assert tracker.silence == SILENCE_SECONDS
    tracker.feed(journal.heartbeat(time=31 * second))
    assert tracker.silence == 3


def test_the_journals_advice_is_not_said_twice():
    refused = OutOfRange("sequence 9 has not happened: walk again", {"oldest": 2, "newest": 5})
    message = walk_again(refused, live(since=9)).message
    assert message.count("walk again") == 1
    assert "which has 2 to 5" in message


def test_a_journal_that_starts_again():
    tracker = live(since=7)
    tracker.feed(Journal().heartbeat(with_topics=True))
    assert tracker.behind
    with pytest.raises(OutOfRange) as raised:
        tracker.page(EventsPage(newest=2))
    assert "walk again" in walk_again(raised.value, tracker).message
    assert walk_again(raised.value, tracker).details == {"newest": 2, "since": 7}


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"overlayfs/default/snapshot/prepare", protocol.EVENT_VERSION, b"\0" * 7, b""],
        [b"overlayfs/default/snapshot/prepare", protocol.EVENT_VERSION, b"\0" * 7 + b"\1", b"\xc1"],
        [b"overlayfs//heartbeat", protocol.EVENT_VERSION, b"\0" * 8, b"\x80"],
    ],
)
def test_a_message_that_is_none_counts_as_lost(frames: list[bytes]):
    tracker, journal = live(), Journal()
    journal.happen("default", "prepare")
    assert tracker.feed(frames) is None
    assert tracker.statistics().malformed == 1
    assert tracker.feed(journal.happen("default", "prepare")) is None
    assert tracker.behind


def test_an_event_under_another_topic_counts_as_lost():
    tracker, journal = live(), Journal()
    _, *frames = journal.happen("other", "remove")
    assert tracker.feed([b"overlayfs/default/snapshot/prepare", *frames]) is None
    assert tracker.statistics().malformed == 1
    assert tracker.position == 0


def test_an_event_under_another_ones_number_counts_as_lost():
    tracker, journal = live(), Journal()
    first, second = journal.happen("default", "prepare"), journal.happen("default", "prepare")
    assert tracker.feed([*first[:3], second[3]]) is None
    assert tracker.position == 0


def test_another_version_is_an_error():
    with pytest.raises(Unimplemented, match="update"):
        live().feed([b"overlayfs/default/snapshot/prepare", b"SNBE\x02", b"\0" * 8, b""])


def test_a_journal_that_leads_nowhere_is_no_endless_loop():
    tracker, journal = Tracker(SNAPSHOTTER, "default", (), 1), Journal()
    journal.happen("default", "prepare")
    with pytest.raises(Internal):
        tracker.page(EventsPage(events=tuple(journal.events), next=1, newest=5))
    assert tracker.page(EventsPage(next=1, newest=5)) == []
    assert not tracker.behind
    assert tracker.position == 5


@pytest.mark.parametrize("topics", [("native/",), ("overlayfs",), ("",), ("overlayfs/", "x/"), ["overlayfs/"] * 65])
def test_topics_of_one_snapshotter(topics: Sequence[str]):
    with pytest.raises(InvalidArgument):
        Tracker(SNAPSHOTTER, "default", topics, 0)
