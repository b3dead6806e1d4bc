"""A set of dense ids, as small as a million of them must be."""

from __future__ import annotations

from collections import defaultdict


class IdSet:
    """A set of dense ids: one bit each, in chunks of 65,536."""

    def __init__(self) -> None:
        self._chunks: defaultdict[int, bytearray] = defaultdict(lambda: bytearray(8192))

    def add(self, id_: int) -> None:
        """Put an id in."""
        self._chunks[id_ >> 16][(id_ & 0xFFFF) >> 3] |= 1 << (id_ & 7)

    def __contains__(self, id_: int) -> bool:
        chunk = self._chunks.get(id_ >> 16)
        return chunk is not None and bool(chunk[(id_ & 0xFFFF) >> 3] & 1 << (id_ & 7))
