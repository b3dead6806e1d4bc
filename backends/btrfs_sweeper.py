"""Deleting subvolumes in bursts, since each deletion waits for every snapshot being made, and they for it.

The kernel makes snapshots under a lock that all of them share, for the length of a transaction commit, and deletes
a subvolume under the same lock held alone. One deletion after the other, each waits for the commits that are under
way, and stops those that come later from joining them: measured with Linux 6.18 on two cores, with 64 threads that
prepare, commit and discard, a single thread that deletes what they leave takes away more than half of their rate and
still falls behind. Whoever waits for that lock gets it in the order of asking. So deletions that ask at the same
time, from many threads, get it one right after the other between two rounds of snapshots, and a whole burst costs
about what a single deletion does.

After each burst comes a pause, a multiple of the time that the burst took: nothing when nobody makes snapshots, and
long enough for others when the burst had to wait for them. What has to go is found in directories, not in memory: a
burst may as well take what another process, or an earlier one, left there.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from backends import btrfs_ioctl
from backends.api import Task
from backends.failpoints import reach

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

THREADS: Final = 32
"""Deletions that ask for the kernel's lock at the same time."""
BURST_MAX: Final = 256
"""Entries of one directory taken by one burst: bounds how long it holds up others, to tens of milliseconds."""
PAUSE_FACTOR: Final = 4
"""Deleting may take a fifth of the time."""
PAUSE_S_MAX: Final = 1.0
"""Longest pause, after a burst that met something slow."""
TICK_S: Final = 0.05
"""How often a caller who waits for the end of a pause looks whether its task is cancelled."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_logger = logging.getLogger("backends")


class Sweeper:
    """Deletes the subvolumes in some directories: those that are entries themselves, and those one level down.

    `directories` are descriptors that stay the caller's. Safe to use from several threads and processes.
    """

    def __init__(self, directories: Sequence[int]) -> None:
        self._directories = directories
        self._threads = ThreadPoolExecutor(THREADS, "sweep")
        self._busy = threading.Lock()
        self._not_before = 0.0
        self._later: threading.Timer | None = None

    def sweep_if_due(self) -> None:
        """A burst; once its pause has passed, where another one was just made or is under way."""
        if time.monotonic() < self._not_before or not self._busy.acquire(blocking=False):
            self._sweep_later()
            return
        try:
            self._burst([])
        finally:
            self._busy.release()

    def _sweep_later(self) -> None:
        """Have a last burst, should nobody come and make one; a timer at a time is enough."""
        if self._later is not None and self._later.is_alive():
            return
        wait_s = min(max(self._not_before - time.monotonic(), TICK_S), PAUSE_S_MAX)
        self._later = threading.Timer(wait_s, self._sweep_again)
        self._later.daemon = True
        self._later.start()

    def _sweep_again(self) -> None:
        self._later = None
        with contextlib.suppress(OSError, RuntimeError):  # Closed meanwhile.
            self.sweep_if_due()

    def delete(self, name: str, dir_fd: int, task: Task) -> None:
        """Delete the subvolumes of one entry, in a burst together with others; missing is fine.

        What is not a subvolume stays, and so does the entry when there is anything else in it.
        """
        while (wait_s := self._not_before - time.monotonic()) > 0:
            task.advance(0)
            time.sleep(min(wait_s, TICK_S))
        with self._busy:
            self._burst([(name, dir_fd, task)])

    def _burst(self, wanted: list[tuple[str, int, Task]]) -> None:
        begun = time.monotonic()
        chosen = {(name, dir_fd) for name, dir_fd, _ in wanted}
        others = [entry for entry in self._found() if entry not in chosen]
        running = [self._threads.submit(_delete_entry, *entry, Task()) for entry in others]
        try:
            for name, dir_fd, task in wanted:
                _delete_entry(name, dir_fd, task)
        finally:
            for (name, _), deletion in zip(others, running, strict=True):
                # Nobody asked for this one by name: its own deletion, or the next burst, tries again.
                if error := deletion.exception():
                    _logger.warning("subvolumes of the discarded %s are not deleted yet: %s", name, error)
            ended = time.monotonic()
            self._not_before = ended + min(PAUSE_FACTOR * (ended - begun), PAUSE_S_MAX)

    def _found(self) -> Iterator[tuple[str, int]]:
        for dir_fd in self._directories:
            # Opened again each time: btrfs shows a directory as it was when it was opened.
            fd = os.open(".", _DIRECTORY, dir_fd=dir_fd)
            try:
                with os.scandir(fd) as entries:
                    names = [entry.name for entry in itertools.islice(entries, BURST_MAX)]
            finally:
                os.close(fd)
            yield from ((name, dir_fd) for name in names)

    def close(self) -> None:
        """Wait for what is under way; idempotent."""
        if self._later is not None:
            self._later.cancel()
        self._threads.shutdown()


def _delete_entry(name: str, dir_fd: int, task: Task) -> None:
    if btrfs_ioctl.is_subvolume(name, dir_fd):
        btrfs_ioctl.destroy_with_nested(dir_fd, name, task)
        reach("btrfs_sweeper.destroyed")
        return
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=dir_fd)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        for inner in os.listdir(fd):
            if btrfs_ioctl.is_subvolume(inner, fd):
                btrfs_ioctl.destroy_with_nested(fd, inner, task)
                reach("btrfs_sweeper.destroyed")
    finally:
        os.close(fd)
    with contextlib.suppress(OSError):
        os.rmdir(name, dir_fd=dir_fd)
