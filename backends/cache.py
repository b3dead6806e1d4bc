"""What was made once and may be asked for again, within a limit of memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

ENTRY_BYTES: Final = 210
"""What an entry takes beside the bytes of its key and value: its place in the table and in the order of use."""


class SizedCache(Generic[K, V]):
    """Values by key, up to `bytes_max`; what was used least lately goes first. Not thread-safe."""

    def __init__(self, bytes_max: int, size_of: Callable[[K, V], int]) -> None:
        """`size_of` tells the bytes of a key and its value; ENTRY_BYTES are added to each."""
        self.bytes_max = bytes_max
        self.bytes = 0
        self._size_of = size_of
        self._entries: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        """The value, which was used now; None where there is none."""
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, key: K, value: V) -> None:
        """Keep a value, in the place of one with the same key."""
        self.drop(key)
        self._entries[key] = value
        self.bytes += ENTRY_BYTES + self._size_of(key, value)
        while self.bytes > self.bytes_max:
            self.drop(next(iter(self._entries)))

    def drop(self, key: K) -> None:
        """Forget a value, if it is kept."""
        value = self._entries.pop(key, None)
        if value is not None:
            self.bytes -= ENTRY_BYTES + self._size_of(key, value)

    def __len__(self) -> int:
        return len(self._entries)
