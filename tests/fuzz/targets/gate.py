"""ZAP requests: one answer each or none, and in comes nobody whose key the directory does not have.

What asks is libzmq itself; but the address, the routing id and the credentials in a request are the peer's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import zmq
from zmq.utils import z85

from broker import keys
from broker.gate import DOMAIN, ZAP_VERSION, Gate, is_generated
from snapbroker.errors import Unauthenticated
from tests.fuzz.draws import Draws


class _Limits:
    handshake_ms = 1000


class _Port:
    """The handler's end of its socket."""

    def __init__(self) -> None:
        self.sent: list[Sequence[bytes]] = []

    def send(self, frames: Sequence[bytes]) -> None:
        self.sent.append(frames)


@cache
def _context() -> zmq.Context[zmq.Socket[bytes]]:
    return zmq.Context()


@cache
def _gate() -> tuple[Gate, bytes]:
    """A gate whose socket is closed, and the key that it knows."""
    directory = Path(tempfile.mkdtemp(prefix="snb-fuzz-")) / "keys"
    keys.make(directory, "farm", "read", ("red",), ())
    gate = Gate(_context(), keys.Keyring(directory, 1000), _Limits())
    gate.port.close()
    (known,) = keys.read_directory(directory).entries
    return gate, z85.decode(known.encode())


def close() -> None:
    """Let go of the sockets."""
    _context().destroy(linger=0)


def one(data: bytes) -> None:
    """Some requests."""
    draws = Draws(data)
    gate, known = _gate()
    while draws.left:
        port = _Port()
        gate.port = port  # type: ignore[assignment]
        before = gate.statistics()
        frames = draws.frames(12) if draws.chance(4) else _request(draws, known)
        gate._asked(frames)
        _check(gate, known, frames, port.sent, before)


def seeds() -> Iterator[bytes]:
    """Good requests, and with one frame that is another each."""
    for number in range(12):
        choices = bytearray(12)
        choices[number] = 255
        yield bytes(choices) + b"\x05peer!" + bytes(20)
        yield bytes(12) + bytes(choices)
    yield b"\x03\x09" + bytes(18)


def _request(draws: Draws, known: bytes) -> list[bytes]:
    version = draws.blob() if draws.chance(8) else ZAP_VERSION
    domain = draws.choice((DOMAIN, DOMAIN, DOMAIN, b"", b"other"))
    mechanism = draws.choice((b"CURVE", b"CURVE", b"CURVE", b"NULL", b"PLAIN", b""))
    credentials = draws.torn(known) if not draws.chance(4) else draws.blob()
    return [draws.take(5), b"", version, draws.blob(), domain, draws.blob(), draws.blob(), mechanism, credentials]


def _check(gate: Gate, known: bytes, frames: list[bytes], sent: list[Sequence[bytes]], before: dict[str, int]) -> None:
    after = gate.statistics()
    counted = [after[name] - before[name] for name in ("connections", "connections_refused")]
    if len(frames) != 9 or frames[2] != ZAP_VERSION:
        assert not sent
        assert counted == [0, 0]
        return
    ((peer, empty, version, request_id, status, _, user, metadata),) = sent
    assert (peer, empty, version, request_id, metadata) == (frames[0], b"", ZAP_VERSION, frames[3], b"")
    good = (frames[4], frames[7], frames[8]) == (DOMAIN, b"CURVE", known)
    assert (status, user) == ((b"200", z85.encode(known)) if good else (b"400", b""))
    assert counted == [int(good), int(not good)]
    assert not is_generated(frames[6]) or frames[6][0] == 0
    key = z85.encode(frames[8]).decode() if len(frames[8]) == 32 else frames[8].decode(errors="replace")
    try:
        entry = gate.entry(key)
    except Unauthenticated:
        assert frames[8] != known
        return
    assert entry.grant.key == key
