"""Frames and parts of replies: every call ends with its answer or with an error of the contract, and only once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from snapbroker import protocol, session
from snapbroker.errors import BrokerError, Internal, Unavailable
from snapbroker.protocol import DONE, MORE, REQUEST_VERSION, Call, Fault, Outcome, Progress, Reply
from snapbroker.session import Answer, Exchange, Patience, Pursuit, Stream
from tests.fuzz import vectors
from tests.fuzz.draws import Draws

_CALLS: Final[tuple[tuple[Call, session.Read[Any]], ...]] = (
    (protocol.Stat(key="a"), session.read_info),
    (protocol.Prepare(key="a"), session.read_mounts),
    (protocol.Remove(key="a"), session.read_nothing),
    (protocol.UsageOf(key="a"), session.read_usage),
)
_PAGES: Final[tuple[tuple[Call, session.Read[Any]], ...]] = (
    (protocol.Walk(), session.read_walk),
    (protocol.Events(since=0), session.read_events),
    (protocol.Status(), session.read_status),
)
_ANSWERS: Final = (
    b"\x80",
    *vectors.bodies("Info", "MountsAnswer", "Usage", "WalkPage", "EventsPage", "StatusAnswer"),
)
_CODES: Final = ("unavailable", "cancelled", "not_found", "internal", "resource_exhausted", "no such code", "")


def one(data: bytes) -> None:
    """Some parts of a reply, to a request of calls or to a stream."""
    draws = Draws(data)
    if draws.chance(3):
        _stream(draws)
    else:
        _exchange(draws)


def seeds() -> Iterator[bytes]:
    """The golden replies, as the body of one part each, to a request and to a stream."""
    for frames in vectors.frames("broker-to-client"):
        yield b"\x00\x01\x00\x00" + b"\x01" + vectors.packed(frames)
        yield b"\x02\x00" + b"\x01" + vectors.packed(frames)
    for body in vectors.bodies("Reply"):
        yield b"\x00\x01\x00\x00" + b"\x01" + vectors.packed([REQUEST_VERSION, b"id", DONE, body])


def _exchange(draws: Draws) -> None:
    exchange = Exchange(b"target", "default", 60.0, atomic=draws.chance(4))
    answers: list[Answer[Any]] = []
    for _ in range(1 + draws.number(4)):
        call, read = draws.choice(_CALLS)
        answers.append(Answer())
        exchange.add(call, read, answers[-1])
    patience = Patience(10.0 if draws.chance(2) else 0.0, lambda: 0.0, lambda: 0.0, bytes)
    patience.equip(exchange)
    settled: dict[int, object] = {}
    while draws.left and exchange.unsettled:
        if not _received(draws, exchange):
            break
        for number, answer in enumerate(answers):
            if answer.done():
                outcome = answer.error() or answer.result()
                assert settled.setdefault(number, outcome) is outcome, "an outcome was replaced"
        if exchange.failure is not None and exchange.pause(patience, exchange.failure) is None:
            exchange.fail(exchange.failure)
    assert exchange.unsettled == sum(not answer.done() for answer in answers)
    exchange.fail(Unavailable("the connection broke"))
    for answer in answers:
        assert answer.done()
        assert answer.error() is None or isinstance(answer.error(), BrokerError)


def _stream(draws: Draws) -> None:
    call, read = draws.choice(_PAGES)
    stream: Stream[Any] = Stream(b"target", "default", 60.0, call, read)
    while draws.left and not stream.over and _received(draws, stream):
        pass
    stream.fail(Unavailable("the connection broke"))
    try:
        while stream.take() is not None:
            pass
    except BrokerError:
        return
    assert stream.error is None, "a stream that ended with an error ends as if it were whole"


def _received(draws: Draws, pursuit: Pursuit) -> bool:
    """Feed one part; False when it ended the request, as it does in the clients."""
    frames = draws.frames() if draws.chance(2) else [REQUEST_VERSION, b"id", draws.choice((MORE, DONE)), _part(draws)]
    parsed = session.reply_frames(frames)
    if parsed is None:
        return True
    _, last, body = parsed
    try:
        over = pursuit.receive(body, last)
    except Internal as error:
        pursuit.fail(error)
        return False
    return not over or pursuit.failure is not None


def _part(draws: Draws) -> bytes:
    outcomes = tuple(_outcome(draws) for _ in range(draws.number(4)))
    reply = Reply(outcomes=outcomes, error=_fault(draws) if draws.chance(8) else None)
    return draws.torn(protocol.encode(reply))


def _outcome(draws: Draws) -> Outcome:
    number = draws.integer() if draws.chance(16) else draws.number(4)
    kind = draws.number(3)
    if kind == 0:
        return Outcome(call=number, ok=msgspec.Raw(draws.torn(draws.choice(_ANSWERS))))
    if kind == 1:
        return Outcome(call=number, error=_fault(draws))
    return Outcome(call=number, progress=Progress(entries=draws.number(), bytes=draws.integer()))


def _fault(draws: Draws) -> Fault:
    details: dict[str, Any] = {"retry_after_ms": draws.choice((100, -1, 2**62, 0.5, "soon", None))}
    return Fault(code=draws.choice(_CODES), message=draws.text(), details=details if draws.chance(2) else {})
