"""The contract's types as containerd's messages: kinds, moments, labels as they are stored.

An Info is always the first field of what it travels in, be it the answer of a Stat, of an Update or a block of a
List. So it is encoded once, with its field's tag, and a block is nothing but several of them in a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from snapbroker import contract
from snapbroker.contract import Kind
from snapbroker_containerd.api import mount_pb2, snapshots_pb2
from snapbroker_containerd.status import Refusal

_SECOND: Final = 1_000_000_000
_INFO_TAG: Final = b"\x0a"

# The values of the enumeration, as they are on the wire (C1).
_KINDS: Final = {
    Kind.VIEW: snapshots_pb2.VIEW,
    Kind.ACTIVE: snapshots_pb2.ACTIVE,
    Kind.COMMITTED: snapshots_pb2.COMMITTED,
}

M = TypeVar("M", bound=Message)


def read(kind: type[M], message: bytes) -> M:
    """The request in `message`; raises Refusal (invalid argument) where it is none, or holds what is not UTF-8."""
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"the message is no {kind.DESCRIPTOR.name}: {error}") from None


def info_field(of: contract.Info) -> bytes:
    """An Info as the first field of a message; moments are UTC, to the nanosecond (C13)."""
    message = snapshots_pb2.Info()
    message.name = of.name
    message.parent = of.parent
    message.kind = _KINDS[of.kind]
    created = message.created_at
    created.seconds, created.nanos = divmod(of.created, _SECOND)
    updated = message.updated_at
    updated.seconds, updated.nanos = divmod(of.updated, _SECOND)
    message.labels.update(of.labels)
    encoded = message.SerializeToString()
    return _INFO_TAG + _length(len(encoded)) + encoded


def _length(value: int) -> bytes:
    """A length as protobuf writes it: seven bits a byte, the lowest first."""
    if value < 0x80:
        return bytes((value,))
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def mounts(of: Iterable[contract.Mount]) -> list[mount_pb2.Mount]:
    """Mounts, in the order in which they are made."""
    return [
        mount_pb2.Mount(type=mount.type, source=mount.source, target=mount.target, options=mount.options)
        for mount in of
    ]
