"""Damaged values of the database: what they cannot be read as is told by the one error that the readers expect.

A record, an event and the kept outcomes of a request, torn after they were written; and a whole store with one of them
in it, read through the snapshotter's reader and journal: an error of the contract, and the other records answer.
"""

from __future__ import annotations

import contextlib
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec

from backends.memory import Memory, MemoryOptions
from broker.snapshotter.reader import Reader
from broker.store import Environment, Journal, OutcomeRetention, Outcomes, Retention, Snapshots, StoreLimits, Token
from broker.store.outcomes import Kept
from broker.store.records import HEADER_BYTES, Record, decode_record, encode_info, index_key, info_of
from snapbroker.contract import Info, Kind
from snapbroker.errors import BrokerError, Internal
from snapbroker.protocol import Events, Outcome, Walk, encode
from tests.fuzz import vectors
from tests.fuzz.draws import Draws

_GOOD: Final = Record(Kind.COMMITTED, 0, 0, 1, 0, 3, 4096, 1, encode_info(Info("a", Kind.COMMITTED, labels={"b": "c"})))
_ACTIVE: Final = Record(Kind.ACTIVE, 0, 1, 2, 1, 0, 0, 2, encode_info(Info("b", Kind.ACTIVE, "a")))
_EVENT: Final = msgspec.msgpack.encode(
    {"sequence": 1, "previous": 0, "time": 1, "snapshotter": "s", "namespace": "n", "verb": "prepare", "key": "a"}
)
_KEPT: Final = encode(Kept(1, b"12345678", (Outcome(call=0, ok=msgspec.Raw(b"\x80")),)))
_OTHER: Final = "other"


class _Store:
    """A store with a good record, and readers of it."""

    def __init__(self) -> None:
        place = Path(tempfile.mkdtemp(prefix="snb-fuzz-"))
        self.environment = Environment(place, StoreLimits(map_initial_bytes=1 << 20, map_max_bytes=1 << 24))
        self.snapshots = Snapshots(self.environment)
        self.journal = Journal(self.environment, "s", Retention())
        self.outcomes = Outcomes(self.environment, OutcomeRetention())
        self.reader = Reader(self.environment, self.snapshots, self.journal, Memory.open(place, MemoryOptions()))
        self.token = Token("n", b"token", b"12345678")
        self.put(self.environment.snapshots, index_key("n", _OTHER), _GOOD.encode())

    def put(self, database: Any, key: bytes, value: bytes) -> None:
        """Write a value."""
        self.environment.write(lambda txn: txn.put(key, value, db=database))


@cache
def _store() -> _Store:
    return _Store()


def one(data: bytes) -> None:
    """One value, as it is or torn, by itself and in a store."""
    draws = Draws(data)
    kind = draws.number(3)
    whole = (draws.choice((_GOOD, _ACTIVE)).encode(), _EVENT, _KEPT)[kind]
    value = draws.rest() if draws.chance(4) else draws.torn(whole)
    if kind == 0:
        if draws.chance(2) and len(value) > 4:
            # As by a program that sums up what it has broken itself.
            value = zlib.crc32(value[4:]).to_bytes(4, "big") + value[4:]
        _record(value)
    elif kind == 1:
        _event(value)
    else:
        _kept(value)


def seeds() -> Iterator[bytes]:
    """Each kind of value, whole, torn and with a sum that is right."""
    for kind in range(3):
        for how in range(4):
            yield bytes((kind, 0, 0, 7, 0, 0, 12, how, 1, 0, 1))
            yield bytes((kind, 1, 0, 7, 0, 0, 50, how, 1, 0, 1))
    for body in vectors.bodies("Info", "Event"):
        yield b"\x00\x00\x03" + _GOOD.encode()[:HEADER_BYTES] + body
        yield b"\x01\x03" + body


def _record(value: bytes) -> None:
    store = _store()
    for read in (decode_record, info_of):
        with contextlib.suppress(ValueError, struct.error):
            read(value)
    key = index_key("n", "a")
    store.put(store.environment.snapshots, key, value)
    with store.environment.read() as txn:
        _attempt(lambda: store.reader.stat(txn, "n", "a"))
        _attempt(lambda: store.reader.mounts(txn, "n", "a", 0))
        _attempt(lambda: store.reader.mounts(txn, "n", "a", 1))
        _attempt(lambda: store.reader.usage(txn, "n", "a"))
        assert store.reader.stat(txn, "n", _OTHER) == _GOOD.info
    _attempt(lambda: store.reader.walk("n", Walk())(""))
    _attempt(lambda: store.reader.walk("n", Walk(filters=("kind==active",)))(""))
    _attempt(lambda: store.reader.walk("n", Walk())("a"))


def _event(value: bytes) -> None:
    store = _store()
    store.put(store.environment.journal, (1).to_bytes(8, "big"), value)
    _attempt(lambda: store.reader.events(Events(since=0), ("s/n/",))(0))
    _attempt(lambda: store.reader.events(Events(since=0), ())(0))
    _attempt(lambda: store.environment.write(lambda txn: store.journal.trim(txn, 2**62, 2, 1)))


def _kept(value: bytes) -> None:
    store = _store()
    store.put(store.environment.outcomes, store.token.key + b"\0\0", value)
    with store.environment.read() as txn:
        _attempt(lambda: store.outcomes.load(txn, store.token))


def _attempt(read: Callable[[], object]) -> None:
    """Read; an error must be one of the contract."""
    try:
        read()
    except BrokerError as error:
        assert error.code in (Internal.code, "failed_precondition", "invalid_argument", "not_found"), error
