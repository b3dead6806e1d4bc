"""A filesystem whose power can be cut more cruelly: of what its device was not told to flush, chance loses half.

A clone of an image (`tests.powercut.disk`) has every write that the device has finished. A drive with a cache keeps
less: what came before its last flush, and of what came later any part, in any order. Here the loop device lies on a
file that qemu's storage daemon exports, which notes every write and every flush in a log, in the form of the kernel's
dm-log-writes. A cut takes the log as it is, and makes an image of what was there at the start, all writes up to the
last flush, and each of those behind it as chance will have it.

So a flush that is missing in a program is found, one that the filesystem or LMDB would owe the device as well, and one
that comes in the wrong order.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

from tests.daemon.support import wait_until
from tests.powercut.disk import Cut, Disk, attached, clone

PROGRAM: Final = "qemu-storage-daemon"
KEPT: Final = 0.5
"""The chance of each write that was not flushed."""
START_S: Final = 20.0

_MAGIC: Final = 0x6A736677736872
_HEAD: Final = struct.Struct("<QQQI")
"""Magic, version, number of entries (which is behind), bytes of a sector."""
_ENTRY: Final = struct.Struct("<QQQQ")
"""First sector, number of sectors, flags, bytes of further data."""
_FLUSH: Final = 1
_DISCARD: Final = 4


@dataclass(frozen=True)
class Write:
    """One entry of a log: where it goes on the device, how long it is, and where its data are in the log."""

    at: int
    size: int
    data: int
    flush: bool


class LoggedDisk(Disk):
    """A mounted filesystem on a device whose writes are logged."""

    def attach(self) -> str:
        """Start the log where the image is now, and the device that writes into both."""
        self._base, self._log, self._export = (
            self.image.with_name(f"{self.image.name}-{part}") for part in ("base", "log", "export")
        )
        clone(self.image, self._base)
        for path in (self._log, self._export):
            path.touch()
        self._program = subprocess.Popen(
            [
                PROGRAM,
                "--blockdev", f"driver=file,filename={self.image},node-name=image",
                "--blockdev", f"driver=file,filename={self._log},node-name=log",
                "--blockdev", "driver=blklogwrites,node-name=both,file=image,log=log,log-sector-size=512",
                "--export", f"type=fuse,id=export,node-name=both,mountpoint={self._export},writable=on",
            ],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_until(lambda: self._export.stat().st_size, f"the export of {PROGRAM}", START_S)
            return attached(self._export, direct=False)
        except BaseException:
            self._end()
            raise

    def detach(self, device: str) -> None:
        """Let go of the device, and end the program behind it."""
        try:
            super().detach(device)
        finally:
            self._end()

    def _end(self) -> None:
        self._program.terminate()
        self._program.wait(START_S)
        for path in (self._base, self._log, self._export):
            path.unlink()

    def cut(self, chance: random.Random) -> Cut:
        """Cut the power of a copy, and let chance decide what of the unflushed is on it."""
        image = self.new_image()
        log = self._log.with_suffix(".cut")
        before = time.monotonic_ns()
        clone(self._log, log)
        after = time.monotonic_ns()
        clone(self._base, image)
        try:
            with log.open("rb") as source, image.open("r+b") as target:
                replay(source, target, chance)
        finally:
            log.unlink()
        return Cut(image, before, after)


def replay(log: BinaryIO, image: BinaryIO, chance: random.Random) -> None:
    """Write to an image what a log has up to its last flush, and of what is behind that whatever chance keeps."""
    entries = list(_entries(log))
    flushed = max((number for number, entry in enumerate(entries) if entry.flush), default=-1)
    for number, entry in enumerate(entries):
        if number <= flushed or chance.random() < KEPT:
            log.seek(entry.data)
            image.seek(entry.at)
            image.write(log.read(entry.size))


def _entries(log: BinaryIO) -> Iterator[Write]:
    """The entries of a log, as far as they are written; what was discarded stays as it was.

    Each is written by one call, so that a clone of the log has it wholly or not at all. The place of one that was
    under way is empty, while others behind it, a flush among them, may be there and count.
    """
    end = log.seek(0, os.SEEK_END)
    log.seek(0)
    magic, version, _, sector = _HEAD.unpack(log.read(_HEAD.size))
    if (magic, version) != (_MAGIC, 1):
        raise ValueError(f"not a log of writes: {magic:#x}, version {version}")
    position = sector
    while position + _ENTRY.size <= end:
        log.seek(position)
        first, count, flags, _ = _ENTRY.unpack(log.read(_ENTRY.size))
        position += sector
        if not (first or count or flags):
            continue
        size = 0 if flags & _DISCARD else count * sector
        if position + size > end:
            return
        yield Write(first * sector, size, position, bool(flags & _FLUSH))
        position += size
