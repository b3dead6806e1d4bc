"""What one record looks like: a fixed header for the broker, and behind it the Info exactly as the wire sends it.

A stat is then one lookup and a slice, without decoding anything. Header, 48 bytes, big endian: CRC-32 of all that
follows (4), kind (1), flags (1), depth (2), id (8), parent's id (8), inodes (8), size (8), fence (8). Depth is the
number of ancestors, the fence the sequence of the event that made the snapshot. The sum is there because a damaged
Info would otherwise be sent as it is and spoil a whole reply.

The index key is `namespace NUL name`. LMDB keys end at 511 bytes: a name over 400 bytes is indexed by its first
400 bytes and a digest (D3), the full name being in the Info; readers that promise the order of names sort the
run of keys that share the 400 bytes.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import Final, NamedTuple

import msgspec

from snapbroker.contract import Info, Kind, Usage
from snapbroker.errors import Internal

_HEADER: Final = struct.Struct(">BBHQQQQQ")
_SUM: Final = struct.Struct(">I")
HEADER_BYTES: Final = _SUM.size + _HEADER.size
_KINDS: Final = (Kind.VIEW, Kind.ACTIVE, Kind.COMMITTED)
_KIND_NUMBERS: Final = {kind: number for number, kind in enumerate(_KINDS)}
BROKEN: Final = 1
"""Flag: what the record promises is not on disk."""
PLAIN_BYTES_MAX: Final = 400
"""Names up to this length are indexed as they are."""
DIGEST_BYTES: Final = 32
LONG_KEY_BYTES: Final = PLAIN_BYTES_MAX + DIGEST_BYTES

_decode_info = msgspec.msgpack.Decoder(Info).decode
_encode = msgspec.msgpack.Encoder().encode


class Record(NamedTuple):
    """A snapshot as it is stored; `info` is the encoded Info."""

    kind: Kind
    flags: int
    depth: int
    id: int
    parent_id: int
    inodes: int
    size: int
    fence: int
    info: bytes

    @property
    def broken(self) -> bool:
        """Whether its files are missing."""
        return bool(self.flags & BROKEN)

    @property
    def usage(self) -> Usage:
        """The usage measured at commit; zero for the other kinds."""
        return Usage(self.inodes, self.size)

    def decoded(self) -> Info:
        """The Info; Internal where it is none, though its checksum is right."""
        try:
            return _decode_info(self.info)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Internal(f"the record of snapshot {self.id} is damaged: {error}") from error

    def encode(self) -> bytes:
        """The value that is stored."""
        body = (
            _HEADER.pack(
                _KIND_NUMBERS[self.kind],
                self.flags,
                self.depth,
                self.id,
                self.parent_id,
                self.inodes,
                self.size,
                self.fence,
            )
            + self.info
        )
        return _SUM.pack(zlib.crc32(body)) + body


def decode_record(value: bytes | memoryview) -> Record:
    """The record in a stored value; ValueError or struct.error when it is damaged."""
    (checksum,) = _SUM.unpack_from(value)
    kind, flags, depth, id_, parent_id, inodes, size, fence = _HEADER.unpack_from(value, _SUM.size)
    if zlib.crc32(value[_SUM.size :]) != checksum:
        raise ValueError("its checksum is wrong")
    if kind >= len(_KINDS):
        raise ValueError(f"unknown kind {kind}")
    return Record(_KINDS[kind], flags, depth, id_, parent_id, inodes, size, fence, bytes(value[HEADER_BYTES:]))


def parents_of(value: bytes) -> tuple[int, int]:
    """Id and parent's id in a stored value of `HEADER_BYTES` or more, which may be damaged."""
    header = _HEADER.unpack_from(value, _SUM.size)
    return int(header[3]), int(header[4])


def is_committed(value: bytes) -> bool:
    """Whether a stored value says that it is of a committed snapshot."""
    return len(value) >= HEADER_BYTES and value[_SUM.size] == _KIND_NUMBERS[Kind.COMMITTED]


def info_of(value: bytes) -> bytes:
    """The encoded Info in a stored value, the rest only summed up; ValueError or struct.error when it is damaged."""
    (checksum,) = _SUM.unpack_from(value)
    if zlib.crc32(value[_SUM.size :]) != checksum:
        raise ValueError("its checksum is wrong")
    return value[HEADER_BYTES:]


def encode_info(info: Info) -> bytes:
    """The Info as stored and as sent."""
    return _encode(info)


def index_key(namespace: str, name: str) -> bytes:
    """Where the record of `name` is."""
    encoded = name.encode()
    if len(encoded) > PLAIN_BYTES_MAX:
        digest = hashlib.blake2b(encoded, digest_size=DIGEST_BYTES).digest()
        encoded = encoded[:PLAIN_BYTES_MAX] + digest
    return namespace.encode() + b"\0" + encoded
