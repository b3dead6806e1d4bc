"""Bytes as a row of choices: what a structured target builds its input from, the same on every machine.

Choices are taken from the front, one byte each, so that a mutation changes one of them and leaves the others; texts and
blobs have their length before them. When nothing is left every choice is the first one and every text is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draws:
    """A reader of `data`; `left` is whether there is more."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> bool:
        """Whether there is more."""
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """The next bytes, fewer at the end."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))

    def number(self, below: int = 256) -> int:
        """A number from 0 up to `below`, which is 256 at most."""
        taken = self.take(1)
        return taken[0] % below if taken else 0

    def chance(self, of: int = 256) -> bool:
        """Whether a choice among `of` is the last one: False when nothing is left."""
        return self.number(of) == of - 1

    def choice(self, values: Sequence[T]) -> T:
        """One of these, of which there are 256 at most."""
        return values[self.number(len(values))]

    def integer(self, size: int = 8) -> int:
        """A signed number of up to `size` bytes."""
        return int.from_bytes(self.take(self.number(size + 1)), "big", signed=True)

    def blob(self) -> bytes:
        """Up to 255 bytes."""
        return self.take(self.number())

    def text(self) -> str:
        """Up to 255 bytes of UTF-8, what is broken in them replaced."""
        return self.blob().decode(errors="replace")

    def torn(self, whole: bytes) -> bytes:
        """`whole`, most of the time; else with some bytes changed, inserted, cut out or left away at the end."""
        if not self.chance(8):
            return whole
        torn = bytearray(whole)
        for _ in range(1 + self.number(4)):
            at = self.number() * 256 + self.number()
            at %= len(torn) + 1
            kind = self.number(4)
            if kind == 0:
                torn[at : at + 1] = self.take(1)
            elif kind == 1:
                torn[at:at] = self.take(1 + self.number(4))
            elif kind == 2:
                del torn[at : at + 1 + self.number(16)]
            else:
                del torn[at:]
        return bytes(torn)

    def frames(self, most: int = 8) -> list[bytes]:
        """Up to `most - 1` frames, each with its length before it in two bytes."""
        return [self.take(int.from_bytes(self.take(2), "big")) for _ in range(self.number(most))]
