"""What a subscriber has seen and has missed: published messages and a journal become every event once, in order.

A snapshotter's events are one sequence: 1, 2, 3 and so on. A publisher drops messages for a slow subscriber,
and a subscription reaches it later than the first events, so what arrives on the socket is the sequence with
holes. The journal has no holes but must be asked. The `Tracker` yields what arrives as long as that is provably
the next event, and else says that it is `behind`: then the journal is asked for what is above `position`.

*What is provably next.* A subscriber of one topic follows the chain: each event names the one before it on its
topic. A subscriber of several topics cannot: that nothing is missing on the topic of an event does not say that
nothing before it is missing on another, and yielding it first would break the order. It therefore subscribes to
the whole snapshotter and follows the sequence itself, skipping by topic, undecoded, what it was not asked for.

*The tail.* A hole with nothing behind it is seen by the next heartbeat, which names the newest sequence, and
the newest of each topic that changed since the heartbeat before.

*Why messages may be thrown away while behind.* An event is in the journal before it is published, so the
journal's answer contains every event that arrived before the question.

*A journal that starts again* (the store was replaced) shows as a heartbeat below `position`. The journal is then
asked, and answers `out_of_range`: the caller has to walk again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from snapbroker.contract import EVENT_VERBS, Event
from snapbroker.errors import Internal, InvalidArgument, OutOfRange, Unimplemented
from snapbroker.protocol import (
    CREDIT_MAX,
    EVENT_VERSION,
    FILTERS_MAX,
    PAGE_MAX,
    EventsPage,
    Heartbeat,
    decode_event,
    decode_heartbeat,
    heartbeat_topic,
)
from snapbroker.protocol import Events as EventsCall
from snapbroker.session import PAGES_AT_ONCE, texts

SILENCE_SECONDS: Final = 5.0
"""How long nothing may arrive, not even a heartbeat, before the journal is asked whether something was missed.

So it is until two heartbeats have told their interval; from then on it is SILENCE_INTERVALS of those."""
SILENCE_INTERVALS: Final = 3
"""Intervals of the heartbeat without a message that are silence (RFC 2, 7.2)."""
SILENCE_SECONDS_MIN: Final = 1.0
"""Shortest silence that is believed in: a busy machine may be late by as much."""
SILENCE_SECONDS_MAX: Final = 300.0
"""Longest silence that is waited for: the broker's clock may have been set between two heartbeats."""
RETRY_SECONDS: Final = 0.1
"""First pause before a journal that is unavailable is asked again."""
RETRY_SECONDS_MAX: Final = 2.0
"""Longest pause before a journal that is unavailable is asked again."""

_PAGE: Final = min(1000, PAGE_MAX)
_CREDIT: Final = min(PAGES_AT_ONCE, CREDIT_MAX)
_EVENT_ENDINGS: Final = tuple(f"/snapshot/{verb}" for verb in EVENT_VERBS)


class Statistics(msgspec.Struct, frozen=True):
    """What became of the messages: events given out, duplicates dropped, gaps healed, messages that were none."""

    events: int
    duplicates: int
    gaps: int
    malformed: int


class Tracker:
    """The events of one snapshotter on the topics that begin with one of `topics`, above sequence `since`.

    `position`: every event asked for with a sequence up to it was yielded. `behind`: the journal has to be
    asked for what is above `position`, and published messages are thrown away until it has answered. `silence`: how
    many seconds nothing may arrive before that is to be doubted; learned from the heartbeats, once there were two.
    """

    def __init__(
        self, snapshotter: str, namespace: str, topics: Sequence[str], since: int, silence: float = SILENCE_SECONDS
    ) -> None:
        self.snapshotter = snapshotter
        self.topics = _checked_topics(snapshotter, namespace, topics)
        self.position = since
        self.behind = True
        self.silence = min(silence, SILENCE_SECONDS_MAX)
        self._beat_time = 0
        self._events = 0
        self._duplicates = 0
        self._gaps = 0
        self._malformed = 0
        self._prefixes = tuple(topic.encode() for topic in self.topics)
        self._heartbeat = heartbeat_topic(snapshotter).encode()
        self._only_topic = self._prefixes[0] if len(self.topics) == 1 and _complete(self.topics[0]) else None

    @property
    def subscriptions(self) -> tuple[bytes, ...]:
        """The prefixes to subscribe to; the heartbeat is covered."""
        if self._only_topic is not None:
            return (self._only_topic, self._heartbeat)
        return (f"{self.snapshotter}/".encode(),)

    def statistics(self) -> Statistics:
        """The counters so far."""
        return Statistics(self._events, self._duplicates, self._gaps, self._malformed)

    def begin_at(self, newest: int) -> None:
        """Yield what comes above `newest`, the newest sequence there is."""
        self.position = newest
        self.behind = False

    def question(self) -> EventsCall:
        """The call that asks the journal for what is above `position`."""
        return EventsCall(since=self.position, topics=self.topics, page=_PAGE, credit=_CREDIT)

    def doubt(self) -> None:
        """Ask the journal, though no message says so: nothing was heard for too long."""
        self.behind = True

    def feed(self, frames: Sequence[bytes]) -> Event | None:
        """Take one published message; answers the event if it is the next one.

        A message that is none counts as lost: the next one shows the gap. Raises Unimplemented where the
        publisher speaks another version.
        """
        if self.behind:
            # A heartbeat may be among what is thrown away: the next is not one interval after the one before.
            self._beat_time = 0
            return None
        if len(frames) != 4 or len(frames[2]) != 8:
            self._malformed += 1
            return None
        topic, version, number, body = frames
        if version != EVENT_VERSION:
            raise Unimplemented(f"the broker publishes events as {version!r}, not {EVENT_VERSION!r}: update the client")
        try:
            if topic == self._heartbeat:
                self._feed_heartbeat(decode_heartbeat(body))
                return None
            return self._feed_event(topic, int.from_bytes(number, "big"), body)
        except Internal:
            self._malformed += 1
            return None

    def _feed_event(self, topic: bytes, sequence: int, body: bytes) -> Event | None:
        if sequence <= self.position:
            self._duplicates += 1
            return None
        event: Event | None = None
        if self._only_topic is None:
            follows = sequence == self.position + 1
            if follows and topic.startswith(self._prefixes):
                event = decode_event(body)
        elif topic == self._only_topic:
            event = decode_event(body)
            follows = event.previous <= self.position
        else:
            # A subscription is a prefix: a topic that merely begins like the one asked for may match.
            return None
        if event is not None and (event.sequence != sequence or event.topic.encode() != topic):
            self._malformed += 1
            return None
        if not follows:
            self._miss()
            return None
        self.position = sequence
        self._events += event is not None
        return event

    def _feed_heartbeat(self, beat: Heartbeat) -> None:
        self._learn_interval(beat.time)
        if beat.sequence == self.position:
            return
        if beat.sequence > self.position >= beat.previous and beat.topics is not None:
            missed = any(
                sequence > self.position and topic.startswith(self.topics) for topic, sequence in beat.topics.items()
            )
            if not missed:
                self.position = beat.sequence
                return
        self._miss()

    def _learn_interval(self, time: int) -> None:
        """Take the publisher's times, in nanoseconds: those of arrival say how often this program looks."""
        before, self._beat_time = self._beat_time, time
        if 0 < before < time:
            silence = SILENCE_INTERVALS * (time - before) / 1e9
            self.silence = min(max(silence, SILENCE_SECONDS_MIN), SILENCE_SECONDS_MAX)

    def _miss(self) -> None:
        self.behind = True
        self._gaps += 1

    def page(self, page: EventsPage) -> list[Event]:
        """Take one page of the journal; answers the events that were not yielded yet.

        Raises OutOfRange where the journal ends below `position`: it is not the journal that was read before.
        """
        if page.newest < self.position:
            raise OutOfRange(
                f"the journal of {self.snapshotter!r} ends at {page.newest}, below {self.position}",
                {"newest": page.newest},
            )
        before = self.position
        fresh = [event for event in page.events if event.sequence > before and event.topic.startswith(self.topics)]
        last = page.events[-1].sequence if page.events else 0
        self.position = max(before, page.next, last)
        if self.position == before < page.newest and page.events:
            raise Internal(f"the journal of {self.snapshotter!r} answered what is above {before} with what is not")
        if self.position >= page.newest or self.position == before:
            # Nothing for these topics up to the newest: an empty page that leads nowhere is the end.
            self.position = max(self.position, page.newest)
            self.behind = False
        self._events += len(fresh)
        return fresh


def walk_again(error: OutOfRange, tracker: Tracker) -> OutOfRange:
    """The journal's refusal, as it reaches the caller."""
    oldest, newest = error.details.get("oldest"), error.details.get("newest")
    # The journal's words are for whoever asks it directly, and end in advice of their own.
    if isinstance(oldest, int) and isinstance(newest, int):
        held = f", which has {oldest} to {newest}" if oldest <= newest else ", which is empty"
    else:
        held = f", which ends at {newest}" if isinstance(newest, int) else ""
    return OutOfRange(
        f"the events of {tracker.snapshotter!r} above {tracker.position} are not in its journal{held}: walk again, "
        "and follow the events above the walk's sequence",
        {**error.details, "since": tracker.position},
    )


def _complete(topic: str) -> bool:
    return topic.endswith(_EVENT_ENDINGS) and topic.count("/") == 3


def _checked_topics(snapshotter: str, namespace: str, topics: Sequence[str]) -> tuple[str, ...]:
    """The prefixes asked for, those of the own namespace where none are; InvalidArgument for another snapshotter's."""
    chosen = texts(topics, "topics") or (f"{snapshotter}/{namespace}/",)
    if len(chosen) > FILTERS_MAX:
        raise InvalidArgument(f"{len(chosen)} topics, more than {FILTERS_MAX}: use a shorter prefix")
    for topic in chosen:
        if not topic.startswith(f"{snapshotter}/"):
            raise InvalidArgument(
                f"topic {topic[:80]!r} does not begin with {snapshotter + '/'!r}: a stream has the events of one "
                "snapshotter; open one for each with broker.snapshotter(name).events()"
            )
    return chosen
