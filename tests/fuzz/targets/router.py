"""Frames of a request at the router, and messages of an actor: one answer each or none, and true books of what is open.

Between router and actor lies the real framing, so what the actor is told is what the client sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Final

import zmq

from broker.access import WHOLE
from broker.actor import mailbox
from broker.config import RouterLimits
from broker.router import Router
from snapbroker.errors import ERRORS
from snapbroker.protocol import BODY_BYTES_MAX, DONE, MORE, REQUEST_ID_BYTES_MAX, REQUEST_VERSION, decode_reply, encode
from tests.fuzz import vectors
from tests.fuzz.draws import Draws

_NAME: Final = "overlayfs"
_OWN: Final = encode({})
_LIMITS: Final = RouterLimits(open_requests_max=3, open_bytes_max=600)
_STATES: Final = ("ready", "ready", "ready", "starting", "unavailable", "stopped")


class _Line:
    """The router's end of the line to an actor that only notes what it is told."""

    unsent_bytes = 0

    def __init__(self) -> None:
        self.told: list[list[bytes]] = []
        self.up = True

    def send(self, frames: Sequence[bytes]) -> bool:
        if self.up:
            self.told.append(list(frames))
        return self.up

    def drain(self) -> bool:
        return False


class _Actor:
    """What the router knows of an actor."""

    name = _NAME
    retry_after_ms = 0

    def __init__(self) -> None:
        self.state = "ready"
        self.link = _Line()

    def report(self, body: bytes) -> None:
        """Its figures."""

    def became_ready(self, body: bytes) -> None:
        """It serves."""


class _Front:
    """The clients' socket."""

    def __init__(self) -> None:
        self.sent: list[Sequence[bytes]] = []

    def send(self, frames: Sequence[bytes]) -> None:
        self.sent.append(frames)

    def statistics(self) -> dict[str, int]:
        return {}


_published: list[Any] = []


@cache
def _context() -> zmq.Context[zmq.Socket[bytes]]:
    return zmq.Context()


@cache
def _router() -> Router:
    """A router whose socket is closed: frames are given to it, and taken from it, where the socket would."""
    router = Router(_context(), "inproc://fuzz", _LIMITS, lambda *_: _OWN, lambda *event: _published.append(event))
    router.front.close()
    return router


def one(data: bytes) -> None:
    """Some messages of clients and of the actor."""
    draws, router = Draws(data), _router()
    actor, front = _Actor(), _Front()
    router.front = front  # type: ignore[assignment]
    router.add(actor)  # type: ignore[arg-type]
    while draws.left:
        front.sent.clear()
        actor.link.told.clear()
        if draws.chance(4):
            _act(draws, router, actor)
        else:
            _ask(draws, router, actor, front)
        _check_books(router)


def close() -> None:
    """Let go of the sockets."""
    _context().destroy(linger=0)


def seeds() -> Iterator[bytes]:
    """The golden requests, and each kind of message of an actor."""
    for frames in vectors.frames("client-to-broker"):
        yield b"\x00\x01" + vectors.packed([b"client", *frames])
        if len(frames) == 4:
            yield b"".join(b"\x00\x00\x00\x00\x01" + bytes((number,)) + b"\x00\x03abc" for number in range(5))
    for kind in range(5):
        yield bytes((0, 0, 0, 0, 1, 1, 0, 1, 1, 3, kind, 1, 1, 1, 1))


def _ask(draws: Draws, router: Router, actor: _Actor, front: _Front) -> None:
    actor.state = draws.choice(_STATES) if draws.chance(4) else "ready"
    frames = draws.frames() if draws.chance(2) else _request(draws)
    before = dict(router._lanes[_NAME.encode()].open)
    router._from_client(frames)
    told, answered = actor.link.told, front.sent
    if len(frames) != 5 or not 0 < len(frames[2]) <= REQUEST_ID_BYTES_MAX:
        assert not told
        assert not answered
        return
    assert len(told) + len(answered) == 1, "a request is handed on or answered"
    client, version, request_id, target, body = frames
    if told:
        kind, *place, arrival, grant, handed = told[0]
        assert (kind, place, len(arrival), grant, handed) == (mailbox.REQUEST, [client, request_id], 8, WHOLE, body)
        assert (version, target, actor.state) == (REQUEST_VERSION, _NAME.encode(), "ready")
        assert (client, request_id) not in before
        assert len(body) <= BODY_BYTES_MAX
        return
    to, spoken, answered_id, status, answer = answered[0]
    assert (to, spoken, answered_id, status) == (client, REQUEST_VERSION, request_id, DONE)
    error = decode_reply(answer).error
    assert error is None or error.code in ERRORS
    assert (error is None) == (version == REQUEST_VERSION and not target)


def _request(draws: Draws) -> list[bytes]:
    version = draws.blob() if draws.chance(16) else REQUEST_VERSION
    target = draws.choice((_NAME.encode(), _NAME.encode(), b"", b"none", b"\xff"))
    return [bytes((draws.number(2),)), version, bytes((draws.number(3),)) * (1 + draws.number(2)), target, draws.blob()]


def _act(draws: Draws, router: Router, actor: _Actor) -> None:
    """A message of the actor; what it must not say is an exception here, which the line logs and goes on."""
    kind = draws.number(5)
    if kind == 4:
        router.gone(actor)  # type: ignore[arg-type]
        assert not router._lanes[_NAME.encode()].open
        return
    client, request_id = bytes((draws.number(2),)), bytes((draws.number(3),)) * (1 + draws.number(2))
    if kind == 0:
        frames = [mailbox.REPLY, client, request_id, draws.choice((MORE, DONE)), draws.blob()]
    elif kind == 1:
        frames = [mailbox.EVENTS, draws.torn(encode({"a": 1})), b"a", bytes(8), b""]
    elif kind == 2:
        frames = [draws.choice((mailbox.REPORT, mailbox.READY)), draws.blob()]
    else:
        frames = draws.frames()
    try:
        router.from_actor(actor, frames)  # type: ignore[arg-type]
    except Exception:
        assert kind in (1, 3), frames


def _check_books(router: Router) -> None:
    lane = router._lanes[_NAME.encode()]
    assert lane.bytes == sum(size for size, _ in lane.open.values()) <= _LIMITS.open_bytes_max
    assert len(lane.open) <= _LIMITS.open_requests_max
    assert lane.retry_after_ms() > 0
    assert router.statistics()[f"mailbox.{_NAME}"]["open"] == len(lane.open)
