"""What a cut makes of a log of writes: all up to the last flush, and behind that what chance keeps."""

from __future__ import annotations

import io
import random
import struct

import pytest

from tests.powercut.logged import replay

SECTOR = 512
FLUSH, DISCARD = 1, 4


def log_of(*entries: bytes) -> io.BytesIO:
    """A log with these entries; its number of them is behind, as it is between two flushes."""
    return io.BytesIO(struct.pack("<QQQI", 0x6A736677736872, 1, 0, SECTOR).ljust(SECTOR, b"\0") + b"".join(entries))


def write(at: int, letter: str, sectors: int = 1) -> bytes:
    """An entry that writes a letter all over some sectors."""
    return struct.pack("<QQQQ", at, sectors, 0, 0).ljust(SECTOR, b"\0") + letter.encode() * SECTOR * sectors


def mark(flags: int, at: int = 0, sectors: int = 0) -> bytes:
    """An entry without data."""
    return struct.pack("<QQQQ", at, sectors, flags, 0).ljust(SECTOR, b"\0")


def image_of(log: io.BytesIO, seed: int) -> str:
    """The first letter of each sector of an image that had eight of dots."""
    image = io.BytesIO(b"." * SECTOR * 8)
    replay(log, image, random.Random(seed))
    return image.getvalue()[::SECTOR].decode()


@pytest.mark.parametrize(
    ("entries", "images"),
    [
        ((), {"........"}),
        ((write(0, "a"), mark(FLUSH)), {"a......."}),
        ((write(0, "a"), write(0, "b", 2), mark(FLUSH)), {"bb......"}),
        ((write(0, "a"), mark(FLUSH), write(1, "b")), {"a.......", "ab......"}),
        ((write(0, "a"), write(1, "b")), {"........", "a.......", ".b......", "ab......"}),
        ((write(0, "a"), mark(FLUSH), mark(DISCARD, 0, 1), mark(FLUSH)), {"a......."}),
        # Of the one whose place is empty the program had not been told; of the flush behind it, it had.
        ((write(0, "a"), bytes(4 * SECTOR), write(1, "b"), mark(FLUSH)), {"ab......"}),
        ((write(0, "a"), mark(FLUSH), write(1, "b")[:-1]), {"a......."}),
        ((write(0, "a"), mark(FLUSH)[: SECTOR // 2]), {"........", "a......."}),
    ],
)
def test_what_was_flushed_is_there(entries: tuple[bytes, ...], images: set[str]) -> None:
    log = log_of(*entries)
    assert {image_of(log, seed) for seed in range(64)} == images
