"""What all golden vectors are made of: the values they are about, and how a value becomes a vector."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from snapbroker.contract import LABEL_BYTES_MAX, NAME_BYTES_MAX, NAMESPACE_BYTES_MAX, Event, Info, Kind, Mount
from snapbroker.protocol import Call, Fault, Outcome, Request, encode

Vector = dict[str, Any]

CREATED: Final = 1_700_000_000_123_456_789
LONGEST_NAME: Final = "é" * (NAME_BYTES_MAX // 2)
LONGEST_LABEL: Final = {"k" * 96: "v" * (LABEL_BYTES_MAX - 96)}
LONGEST_NAMESPACE: Final = "n" * NAMESPACE_BYTES_MAX
# A letter of two bytes, a Han character of three, an emoji of four, a letter with a combining accent, a quote.
FAR_NAME: Final = 'é/牛/😀/e\u0301/"\\'
INTEGER_MAX: Final = 2**63 - 1

MOUNTS: Final = (Mount("overlay", "overlay", ("workdir=/r/7/work", "upperdir=/r/7/fs", "lowerdir=/r/3/fs:/r/1/fs")),)
BASE: Final = Info("base", Kind.COMMITTED, "", {"team": "build"}, CREATED, CREATED)
JOB: Final = Info("job-42", Kind.ACTIVE, "base", {}, CREATED + 1000, CREATED + 1000)
LOOK: Final = Info("look", Kind.VIEW, "base", {}, CREATED + 2000, CREATED + 2000)


def event(sequence: int, previous: int, verb: str, key: str = "", info: Info | None = None) -> Event:
    """An event of the snapshotter `overlayfs` in the namespace `default`."""
    return Event(sequence, previous, CREATED + sequence, "overlayfs", "default", verb, key, info)


def one(*calls: Call, namespace: str = "default", atomic: bool = False, timeout_ms: int = 0) -> Request:
    """A request, mostly with one call."""
    return Request(calls=calls, namespace=namespace, atomic=atomic, timeout_ms=timeout_ms)


def ok(call: int, answer: msgspec.Struct) -> Outcome:
    """The outcome of a call that succeeded."""
    return Outcome(call=call, ok=msgspec.Raw(encode(answer)))


def failed(call: int, code: str, message: str, **details: object) -> Outcome:
    """The outcome of a call that did not."""
    return Outcome(call=call, error=Fault(code=code, message=message, details=details))


def view_of(body: bytes) -> object:
    """The JSON view of a body: what a reader that knows only MessagePack sees; bytes in base64."""
    return msgspec.to_builtins(msgspec.msgpack.decode(body))


def vector(name: str, value: msgspec.Struct, note: str) -> Vector:
    """A message as this implementation writes it."""
    body = encode(value)
    return {"name": name, "type": type(value).__name__, "note": note, "hex": body.hex(), "json": view_of(body)}


def readable(name: str, type_: str, body: bytes, same_as: str, note: str, *, opaque: bool = False) -> Vector:
    """Bytes that a reader must take although no writer here writes them; they mean what `same_as` means.

    `opaque`: the body holds what JSON cannot say, so that the vector has no `json`.
    """
    made = {"name": name, "type": type_, "note": note, "same_as": same_as, "hex": body.hex()}
    return made if opaque else {**made, "json": view_of(body)}
