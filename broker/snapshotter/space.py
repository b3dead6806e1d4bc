"""Free space: what makes snapshots is refused while there is room to remove some, and a ballast is kept for worse.

A filesystem that is full to its last block serves nobody: a write in somebody's workspace fails half way, and the
database has no page left to note a removal on. So a prepare or view is refused before that, with the error that
says when to come again, and removals, commits, reads and the writes into what is mounted already have the reserve.
How large a copy will be is known when it is made: one that comes to the reserve is stopped there, and taken away again.

Those writes, or somebody else's, can take the reserve too. Then the ballast is let go, a file that holds nothing but
space: enough for the trials of a start and for the pages of a database that only wants to forget. It is taken up again
when there is room.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from backends.failpoints import reach
from backends.syscalls import free_bytes
from broker.logs import get_logger
from broker.snapshotter.reserve import SpaceLimits, lacking
from snapbroker.errors import BrokerError

log = get_logger()

BALLAST: Final = "ballast"
_LOOK_NS: Final = 10_000_000
"""How long a look at the filesystem is believed: far shorter than anything can fill a reserve."""


def of_each_filesystem(places: Sequence[Path]) -> list[Path]:
    """One place of each filesystem that the places lie on, the last one named."""
    return list({place.stat().st_dev: place for place in places}.values())


class Ballast:
    """The ballast of one snapshotter, one file on each filesystem that it uses."""

    def __init__(self, places: Sequence[Path], size_bytes: int) -> None:
        self._files = [place / BALLAST for place in of_each_filesystem([place for place in places if place.is_dir()])]
        self._size = size_bytes

    def tend(self, reserve_bytes: int) -> None:
        """Let go where it is needed, take up where there is room for it and the reserve."""
        for file in self._files:
            free = free_bytes(os.statvfs(file.parent))
            if free < self._size // 4 or not self._size:
                self._let_go(file)
            elif free > self._size + reserve_bytes and self._lacks(file):
                self._take_up(file)

    def let_go_if_needed(self) -> None:
        """What a start does first, before anything is tried."""
        self.tend(reserve_bytes=1 << 62)

    def _let_go(self, file: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
            if self._size:
                log.warning("the filesystem is full: the ballast is let go", file=str(file), bytes=self._size)

    def _lacks(self, file: Path) -> bool:
        """Whether the file is missing, or smaller than it is to be: of a start that was cut off, or of another size."""
        try:
            return file.stat().st_size < self._size
        except FileNotFoundError:
            return True

    def _take_up(self, file: Path) -> None:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            reach("space.opened")
            os.posix_fallocate(descriptor, 0, self._size)
        except OSError as error:
            file.unlink()
            log.warning("no ballast can be taken up", file=str(file), error=error.strerror)
        finally:
            os.close(descriptor)


class Space:
    """The room at some places, looked at when asked; used by the writer alone."""

    def __init__(
        self, places: Sequence[Path], limits: SpaceLimits, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._places = of_each_filesystem(places)
        self._limits = limits
        self._clock = clock
        self._looked = -_LOOK_NS
        self._lack: Callable[[], BrokerError] | None = None
        self._refused = 0

    def check(self) -> None:
        """Raise ResourceExhausted where the reserve is reached, Internal where nothing can be written at all."""
        moment = self._clock()
        if moment - self._looked >= _LOOK_NS:
            self._looked = moment
            self._lack = next((lack for place in self._places if (lack := lacking(place, self._limits))), None)
        if self._lack is not None:
            self._refused += 1
            raise self._lack()

    def statistics(self) -> dict[str, int]:
        """For `status`: what is free at the fullest place, and how many calls were refused; of a failed disk 0."""
        looks: list[os.statvfs_result] = []
        with contextlib.suppress(OSError):
            looks = [os.statvfs(place) for place in self._places]
        return {
            "free": min((free_bytes(look) for look in looks), default=0),
            "inodes": min((look.f_favail for look in looks if look.f_files), default=0),
            "reserve": self._limits.reserve_bytes,
            "reserve_inodes": self._limits.reserve_inodes,
            "refused": self._refused,
        }
