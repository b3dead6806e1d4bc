"""A ledger as it may be found on a disk: read to its end or to where it is broken, and rebuilt from what was read.

Frames of records, whole and torn, and frames of whatever with a sum that is right; each record that was read is taken
into what is rebuilt, or left and told with the reason.
"""

from __future__ import annotations

import contextlib
import struct
import tempfile
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import msgspec

from backends.inspecting import NothingInspector
from broker.audit import rebuild
from broker.store.ledger import HEADER, NAME, Change, changes, check_not_lost, last_word
from broker.store.records import Record, encode_info, index_key
from snapbroker.contract import Info, Kind
from snapbroker.errors import FailedPrecondition
from tests.fuzz.draws import Draws

_FRAME: Final = struct.Struct(">II")
_CLOSED: Final = b"\xc1end" + (5).to_bytes(8, "big")
_NAMES: Final = ("a", "b", "c")


@cache
def _root() -> Path:
    return Path(tempfile.mkdtemp(prefix="snb-fuzz-"))


def one(data: bytes) -> None:
    """One file."""
    draws, root = Draws(data), _root()
    whole = HEADER + b"".join(_frame(draws) for _ in range(draws.number(6))) + (_CLOSED if draws.chance(2) else b"")
    text = draws.rest() if draws.chance(8) else draws.torn(whole)
    (root / NAME).write_bytes(text)
    found = list(changes(root))
    told: dict[bytes, bytes | None] = dict(found)
    for key in (*told, b"none"):
        assert last_word(root, key) == told.get(key)
    _check_prefix(text, found)
    known = {key: value for key, value in told.items() if value is not None}
    lost = False
    try:
        check_not_lost(root, root / "metadata")
    except FailedPrecondition:
        lost = True
    assert lost == bool(known)
    plan = rebuild.plan(NothingInspector(), found, None, stocked=False)
    assert plan.records.keys() <= known.keys()
    assert len(plan.records) + len(plan.left) == len(known), "each record is taken or told"
    ids = [record.id for record in plan.records.values()]
    assert len(set(ids)) == len(ids)
    assert plan.next_id > max(ids, default=0)


def seeds() -> Iterator[bytes]:
    """Files of frames of each kind, whole and torn; and one that is no ledger."""
    for kind in range(4):
        for parts in range(4):
            yield bytes((2, kind, parts, *(0, 0, 0, 1, 0, 0) * parts, kind, parts, *(1, 2, 0, 2, 1, 0) * parts, 1))
            yield bytes((1, kind, parts, *(1, 1, 1, 1, 0, 0) * parts, 0, 0, 7, 0, 0, 20, parts, 1))
    yield b"\x00\x00\x07" + HEADER
    yield b"\x00\x00\x07another file"


def _frame(draws: Draws) -> bytes:
    """A frame whose sum is right."""
    kind = draws.number(4)
    if kind == 3:
        body = draws.blob()
    else:
        parts = [part for _ in range(draws.number(4)) for part in _change(draws)]
        # Of a kind that no change has, or one without its record.
        parts += draws.choice(([], [None], [b"x"])) if kind == 2 else []
        body = msgspec.msgpack.encode(parts)
        body = draws.torn(body) if kind == 1 else body
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


def _change(draws: Draws) -> Change:
    name, parent = draws.choice(_NAMES), draws.choice(("", *_NAMES))
    key = draws.torn(index_key("n", name))
    if draws.chance(8):
        return key, None
    info = draws.torn(encode_info(Info(name, Kind.COMMITTED, parent, labels={"a": "b"})))
    value = Record(Kind.COMMITTED, 0, draws.number(3), 1 + draws.number(3), draws.number(4), 1, 1, 1, info).encode()
    return key, draws.torn(value)


def _check_prefix(text: bytes, found: list[Change]) -> None:
    """What is read is in the file, and a shorter file has no more of it."""
    assert not found or text.startswith(HEADER)
    for key, value in found:
        assert key in text
        assert value is None or value in text
    (_root() / NAME).write_bytes(text[:-1])
    shorter = list(changes(_root()))
    assert shorter == found[: len(shorter)]
    with contextlib.suppress(FileNotFoundError):
        (_root() / f"{NAME}.new").unlink()
    (_root() / NAME).write_bytes(text)
