"""Published messages and pages of the journal: events come out in order, once each, whatever came in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from snapbroker.contract import EVENT_VERBS, Event, Info, Kind
from snapbroker.errors import BrokerError, Internal, OutOfRange, Unimplemented
from snapbroker.protocol import (
    EVENT_VERSION,
    EventsPage,
    Heartbeat,
    decode_event,
    decode_heartbeat,
    encode,
    event_frames,
    heartbeat_topic,
)
from snapbroker.subscriber import Tracker, walk_again
from tests.fuzz import vectors
from tests.fuzz.draws import Draws

_NAME: Final = "overlayfs"
_TOPICS: Final = (
    (),
    (f"{_NAME}/",),
    (f"{_NAME}/default/snapshot/prepare",),
    (f"{_NAME}/default/snapshot/prepare", f"{_NAME}/other/"),
)


def one(data: bytes) -> None:
    """A subscriber, and what it is told by a publisher and a journal that keep to nothing."""
    draws = Draws(data)
    tracker = Tracker(_NAME, "default", draws.choice(_TOPICS), draws.number())
    if draws.chance(2):
        tracker.begin_at(tracker.position)
    seen = tracker.position
    while draws.left:
        try:
            came = tracker.page(_page(draws)) if draws.chance(4) else [tracker.feed(_message(draws))]
        except OutOfRange as error:
            assert isinstance(walk_again(error, tracker), OutOfRange)
            return
        except (Internal, Unimplemented):
            return
        for event in came:
            if event is not None:
                assert event.topic.startswith(tracker.topics), "an event of another topic"
        assert tracker.position >= seen, "the position went back"
        seen = tracker.position
        assert 0 < tracker.silence < 1000
    _check_alone(data)


def _check_alone(data: bytes) -> None:
    """The bare decoders."""
    for decode in (decode_event, decode_heartbeat):
        try:
            decode(data)
        except BrokerError as error:
            assert isinstance(error, Internal)


def seeds() -> Iterator[bytes]:
    """The golden events and heartbeats, as messages and by themselves."""
    for frames in vectors.frames("broker-to-subscriber"):
        yield b"\x01\x00\x01\x00\x01" + vectors.packed(frames)
    for body in vectors.bodies("Event", "Heartbeat"):
        yield body
        frames = list(event_frames(f"{_NAME}/default/snapshot/prepare", 1, body))
        yield b"\x01\x00\x01\x00\x01" + vectors.packed(frames)
    for sequence in range(5):
        yield bytes((1, 0, 1, *(0, 0, 0, sequence) * 5))


def _message(draws: Draws) -> list[bytes]:
    if draws.chance(2):
        return draws.frames()
    if draws.chance(3):
        topics = {draws.choice(_topics()): draws.number() for _ in range(draws.number(3))}
        beat = Heartbeat(
            sequence=draws.number(),
            previous=draws.number(),
            time=draws.integer(),
            topics=None if draws.chance(4) else topics,
        )
        return [heartbeat_topic(_NAME).encode(), EVENT_VERSION, bytes(8), draws.torn(encode(beat))]
    event = _event(draws)
    sequence = draws.number() if draws.chance(8) else event.sequence
    return list(event_frames(event.topic, sequence, draws.torn(encode(event))))


def _event(draws: Draws) -> Event:
    info = Info("a", draws.choice(tuple(Kind)), labels={"a": draws.text()}) if draws.chance(2) else None
    namespace, verb = draws.choice(("default", "other")), draws.choice(EVENT_VERBS)
    return Event(draws.number(), draws.number(), 1, _NAME, namespace, verb, "a", info)


def _page(draws: Draws) -> EventsPage:
    events = tuple(_event(draws) for _ in range(draws.number(4)))
    return EventsPage(events=events, next=draws.integer(2), newest=draws.integer(2))


def _topics() -> tuple[str, ...]:
    return tuple(f"{_NAME}/{namespace}/snapshot/{verb}" for namespace in ("default", "other") for verb in EVENT_VERBS)
