"""The messages between the router and an actor, and the actor's end of their line.

router to actor:  SETUP, body         the first: what the actor is to be
                  REQUEST, client's identity, request id, arrival (8 bytes, monotonic nanoseconds), grant, body
                  GRANT, key, grant   what the owner of a key may do has changed; the empty grant: nothing
                  STOP
actor to router:  READY, body         once, when it serves
                  REPLY, client's identity, request id, MORE or DONE, body
                  EVENTS, newest sequence by topic (a MessagePack map), then topic, sequence (8 bytes), body of
                  each event
                  ASIDE, client's identity, request id
                                      what is left of a request goes on beside the actor's turns, and keeps nobody
                                      from them: a copy, a stream
                  REPORT, body, vital every second: its figures, and the sign that its loop turns; for each thread that
                                      it cannot do without, how many milliseconds it stands still (a MessagePack map)

Both ends live on one machine, so the monotonic clock is the same.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final

from broker.actor.link import Link
from snapbroker.protocol import encode

SETUP: Final = b"B"
REQUEST: Final = b"Q"
STOP: Final = b"X"
GRANT: Final = b"G"
READY: Final = b"U"
REPLY: Final = b"R"
EVENTS: Final = b"E"
ASIDE: Final = b"A"
REPORT: Final = b"S"

U64: Final = struct.Struct(">Q")


class Mailbox:
    """The actor's end: requests come to the handler, replies, events and reports go to the router."""

    def __init__(
        self,
        link: Link,
        on_request: Callable[[bytes, bytes, int, bytes, bytes], None],
        on_stop: Callable[[], None],
        on_grant: Callable[[bytes, bytes], None] = lambda _key, _grant: None,
    ) -> None:
        self._link = link
        self._on_request = on_request
        self._on_grant = on_grant
        self._on_stop = on_stop

    def open(self) -> None:
        """Take requests, on the running loop; an actor that nobody can hear any more stops."""
        self._link.listen(self._received, self._on_stop)

    def _received(self, frames: list[bytes]) -> None:
        if frames[0] == REQUEST:
            _, client, request_id, arrival, grant, body = frames
            self._on_request(client, request_id, U64.unpack(arrival)[0], grant, body)
        elif frames[0] == GRANT:
            self._on_grant(frames[1], frames[2])
        elif frames[0] == STOP:
            self._on_stop()

    def together(self) -> AbstractContextManager[None]:
        """What is sent inside leaves at the end, by one system call; not to be nested."""
        return self._link.together()

    def reply(self, client: bytes, request_id: bytes, status: bytes, body: bytes) -> None:
        """Send one part of a reply."""
        self._link.send((REPLY, client, request_id, status, body))

    def aside(self, client: bytes, request_id: bytes) -> None:
        """Say that a request goes on beside the turns."""
        self._link.send((ASIDE, client, request_id))

    def events(self, events: Sequence[tuple[str, int, bytes]]) -> None:
        """Send the events of a turn."""
        frames = [EVENTS, b""]
        newest: dict[str, int] = {}
        for topic, sequence, body in events:
            newest[topic] = sequence
            frames += (topic.encode(), U64.pack(sequence), body)
        frames[1] = encode(newest)
        self._link.send(frames)

    def ready(self, body: bytes) -> None:
        """Say that requests can come."""
        self._link.send((READY, body))

    def report(self, body: bytes, vital: Mapping[str, int]) -> None:
        """Send the actor's figures, and how long its vital threads stand still."""
        self._link.send((REPORT, body, encode(vital)))
