"""The publisher: every event of every snapshotter on one XPUB socket, and heartbeats that tell what came last.

A slow subscriber loses events here by design; it sees the gap by the chain that the events of a topic form, or by
the chain of heartbeats, and asks the journal. Nothing here is the guarantee, so nothing here waits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import anyio
import msgspec
import zmq

from broker.sockets import Port
from snapbroker.protocol import EVENT_VERSION, Heartbeat, encode, event_frames, heartbeat_topic

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from broker.audience import Audience


class Limits(Protocol):
    """What of the configuration is needed here."""

    @property
    def send_queue_max(self) -> int: ...  # noqa: D102
    @property
    def heartbeat_ms(self) -> int: ...  # noqa: D102
    @property
    def heartbeat_topics_max(self) -> int: ...  # noqa: D102


@dataclass(slots=True)
class _Beat:
    """What the next heartbeat of a snapshotter says; `topics` is None when it cannot name them all."""

    sequence: int
    previous: int
    topics: dict[str, int] | None = field(default_factory=dict)


class Publisher:
    """The events' socket; `publish` never waits."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, limits: Limits) -> None:
        socket = context.socket(zmq.XPUB)
        socket.setsockopt(zmq.SNDHWM, limits.send_queue_max)
        socket.bind(endpoint)
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._limits = limits
        self._subscriptions: set[bytes] = set()
        self._beats: dict[str, _Beat] = {}
        self._published = 0
        self.remote: Audience | None = None
        self.port = Port(socket, self._subscribed)

    def _subscribed(self, frames: list[bytes]) -> None:
        """Libzmq tells of the first subscription to a prefix and of the last one's end."""
        if frames[0][:1] == b"\x01":
            self._subscriptions.add(frames[0][1:])
        elif frames[0][:1] == b"\x00":
            self._subscriptions.discard(frames[0][1:])

    def publish(self, snapshotter: str, newest: dict[str, int], frames: Sequence[bytes]) -> None:
        """Publish the events of a turn: `newest` sequence by topic; topic, sequence (8 bytes), body of each."""
        beat = self._beats.setdefault(snapshotter, _Beat(0, 0, None))
        beat.sequence = max(newest.values())
        if beat.topics is not None:
            beat.topics.update(newest)
            if len(beat.topics) > self._limits.heartbeat_topics_max:
                beat.topics = None
        if self.remote is not None and self.remote.listening:
            for message in _messages(frames):
                self.remote.send(message)
        if self._subscriptions:
            self.port.send_all(_messages(frames))
            self._published += len(frames) // 3

    def started(self, snapshotter: str, newest: int) -> None:
        """An actor got ready with this newest sequence; what came before it may never have been published."""
        known = self._beats.get(snapshotter)
        self._beats[snapshotter] = _Beat(newest, known.previous if known else 0, None)

    async def beat(self) -> None:
        """Publish heartbeats until cancelled."""
        while True:
            await anyio.sleep(self._limits.heartbeat_ms / 1000)
            for snapshotter, beat in self._beats.items():
                self._send_beat(snapshotter, beat)
                self._beats[snapshotter] = _Beat(beat.sequence, beat.sequence)

    def _send_beat(self, snapshotter: str, beat: _Beat) -> None:
        heartbeat = Heartbeat(sequence=beat.sequence, previous=beat.previous, time=time.time_ns(), topics=beat.topics)
        topic = heartbeat_topic(snapshotter)
        self.port.send(event_frames(topic, beat.sequence, encode(heartbeat)))
        if self.remote is not None:
            # Topics name namespaces, which are not everybody's business there.
            silent = msgspec.structs.replace(heartbeat, topics=None)
            self.remote.send(event_frames(topic, beat.sequence, encode(silent)))

    def statistics(self) -> dict[str, int]:
        """For `status`."""
        return {
            **self.port.statistics(),
            "subscriptions": len(self._subscriptions),
            "published": self._published,
            "limit": self._limits.send_queue_max,
        }


def _messages(frames: Sequence[bytes]) -> Iterator[tuple[bytes, bytes, bytes, bytes]]:
    """The events' messages, of topic, sequence and body of each one behind the other."""
    for position in range(0, len(frames), 3):
        topic, sequence, body = frames[position : position + 3]
        yield topic, EVENT_VERSION, sequence, body
