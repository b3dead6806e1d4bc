"""The line between router and actor: whole messages in their order, whatever the pieces, and none kept from its turn.

What comes is held against a reader that has all bytes at once; a message that nobody understands, or whose handler
fails, does not hold up the next.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec

from broker.actor import mailbox
from broker.actor.link import Link
from broker.actor.mailbox import Mailbox
from snapbroker.protocol import encode
from tests.fuzz.draws import Draws


def one(data: bytes) -> None:
    """A stream of bytes, cut into pieces."""
    draws = Draws(data)
    stream = b"".join(_message(draws) for _ in range(draws.number(5))) + (draws.blob() if draws.chance(4) else b"")
    expected, left = _slowly(stream)
    ends = socket.socketpair()
    try:
        link = Link(ends[0])
        requests: list[tuple[bytes, bytes, int, bytes, bytes]] = []
        stops: list[None] = []
        box = Mailbox(link, lambda *request: requests.append(request), lambda: stops.append(None))
        came: list[list[bytes]] = []

        def received(frames: list[bytes]) -> None:
            came.append(frames)
            box._received(frames)

        link._handler = received
        at = 0
        while at < len(stream):
            size = 1 + draws.number()
            ends[1].sendall(stream[at : at + size])
            at += size
            while link.drain():
                continue
        assert came == expected
        assert bytes(link._received) == left
        assert len(requests) == sum(_is_request(frames) for frames in expected)
        assert len(stops) == sum(frames[:1] == [mailbox.STOP] for frames in expected)
    finally:
        for end in ends:
            end.close()


def seeds() -> Iterator[bytes]:
    """Each kind of message."""
    for kind in range(4):
        yield bytes((1, kind)) + bytes(40)
        yield bytes((4, *(kind, 0, 1, 2, 3) * 4)) + bytes(range(40))


def _message(draws: Draws) -> bytes:
    kind = draws.number(4)
    if kind == 0:
        body = encode([mailbox.REQUEST, draws.blob(), draws.blob(), draws.take(8), draws.blob(), draws.blob()])
    elif kind == 1:
        body = encode([mailbox.STOP])
    elif kind == 2:
        body = encode([draws.blob() for _ in range(draws.number(4))])
    else:
        body = draws.blob()
    return len(body).to_bytes(4, "big") + draws.torn(body)


def _slowly(stream: bytes) -> tuple[list[list[bytes]], bytes]:
    """The messages that are arrays of byte strings, and what is left of one that is not whole."""
    found: list[list[bytes]] = []
    while len(stream) >= 4:
        length = int.from_bytes(stream[:4], "big")
        if len(stream) < 4 + length:
            break
        body, stream = stream[4 : 4 + length], stream[4 + length :]
        try:
            frames = msgspec.msgpack.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
        if isinstance(frames, list) and all(isinstance(frame, bytes) for frame in frames):
            found.append(frames)
    return found, stream


def _is_request(frames: list[bytes]) -> bool:
    return len(frames) == 6 and frames[0] == mailbox.REQUEST and len(frames[3]) == 8
