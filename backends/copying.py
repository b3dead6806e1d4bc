"""Copying a tree as it is: what a native snapshot is made of, and no slower than `cp -a`.

Each entry is copied as `entries` says, and hard links between files of the tree are kept (C123). Directories get
what their originals have when everything below them is there, from the bottom up, because each entry made inside
changes their times and a default ACL would be inherited.

One thread walks; files are copied in batches by worker threads, which are only started once there is more
than one batch, so that a small tree costs no thread at all. Measured on two cores with Linux 6.18, two
workers take two thirds of the time of one thread on ext4, and more than two gain nothing: a small file is a
dozen short system calls, and what is between them shares one interpreter lock.

Paths are handed to the kernel whole. Where a path gets long, its directory is opened and the walk goes on
below `/proc/self/fd/N`, so that depth is limited by the filesystem alone.

What is mounted inside the source is not copied: a directory with a mount on it becomes an empty one, a file
with a mount on it is left out. A nested btrfs subvolume is not mounted, and becomes a directory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import stat
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from backends.entries import Entry, EntryCopy, Reflink, make_plain
from backends.failpoints import reach
from backends.syscalls import is_mount_root

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from backends.api import Task

BATCH_FILES: Final = 64
"""Files handed to a worker at a time: few enough to keep all workers busy to the end."""
BATCH_BYTES: Final = 16 << 20
"""A batch of this size is full, however few files it has."""
QUEUED_BATCHES_PER_THREAD: Final = 4
"""How far the walk runs ahead of the workers."""
UNFLUSHED_BYTES: Final = 64 << 20
"""So much is written before it is flushed beside the copying: enough for a flush to be worth its journal commit."""
PATH_BYTES_MAX: Final = 2048
"""Longest directory path handed to the kernel, half of what it takes: leaves room for a name of 255 bytes."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ANCHOR = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_logger = logging.getLogger("backends")


def copy_tree(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    task: Task,
    threads: int = 2,
    reflink: Reflink = "auto",
    flush: Callable[[], None] | None = None,
) -> bool:
    """Copy the tree at `source`, with its root directory's own metadata, into the directory `destination`.

    `destination` is made where it is missing, and else must be empty. `task` counts an entry for each file
    and directory, and its bytes; large files report as they go. Any error, or Cancelled, stops all threads
    and is raised, leaving what was copied so far. An attribute that the destination refuses is only logged
    (C123). Answers whether any file shares its blocks with its original.

    What was copied is the caller's to flush. With `flush`, which writes out whatever is dirty, that is begun early:
    it is called from a thread of its own, beside the copying, each time UNFLUSHED_BYTES were written.
    """
    with contextlib.ExitStack() as stack:
        wrote = stack.enter_context(_WriteBehind(flush)).wrote if flush else None
        files = EntryCopy(task, reflink, wrote)
        _TreeCopy(files, threads, stack).run(os.fspath(source), os.fspath(destination))
        return files.shared


class _TreeCopy:
    """The walk: makes directories, links and special files itself, and hands on regular files."""

    def __init__(self, files: EntryCopy, threads: int, anchors: contextlib.ExitStack) -> None:
        self._files = files
        self._anchors = anchors
        self._workers = _Workers(files, threads)
        self._directories: list[Entry] = []
        self._linked: dict[tuple[int, int], str] = {}
        self._late_links: list[tuple[str, str]] = []
        self._batch = _Batch()

    def run(self, source: str, destination: str) -> None:
        status = os.stat(source, follow_symlinks=False)
        with contextlib.suppress(FileExistsError):
            os.mkdir(destination, 0o700)
        make_plain(destination)
        pending = [Entry(source, destination, status)]
        with self._workers:
            while pending:
                directory = self._shortened(pending.pop())
                self._directories.append(directory)
                pending.extend(self._fill(directory, root=len(self._directories) == 1))
            # The walk is over: this thread copies the last batch itself, beside the workers.
            self._files.copy_all(self._batch.entries)
        reach("copying.walked")
        for original, link in self._late_links:
            os.link(original, link, follow_symlinks=False)
        for directory in reversed(self._directories):
            self._files.finish(directory)

    def _shortened(self, directory: Entry) -> Entry:
        """The same directory, below a descriptor of its own where its path has become long."""
        return Entry(self._short(directory.source), self._short(directory.destination), directory.status)

    def _short(self, path: str) -> str:
        if len(os.fsencode(path)) <= PATH_BYTES_MAX:
            return path
        fd = os.open(path, _ANCHOR)
        self._anchors.callback(os.close, fd)
        # With the dot, its last part is a directory and no symbolic link, whatever the call thinks of links.
        return f"/proc/self/fd/{fd}/."

    def _fill(self, directory: Entry, root: bool) -> list[Entry]:
        """Copy what is in `directory`; answer its subdirectories, which exist but are still empty."""
        fd = self._files.open_quietly(directory.source, _DIRECTORY)
        try:
            if not root and is_mount_root("", fd):
                _logger.warning("%s is a mount point: copied without what is mounted", directory.source)
                return []
            with os.scandir(fd) as entries:
                return self._fill_from(directory, entries, fd)
        finally:
            os.close(fd)

    def _fill_from(self, directory: Entry, entries: Iterator[os.DirEntry[str]], fd: int) -> list[Entry]:
        above, below = directory.source, directory.destination
        device = directory.status.st_dev
        subdirectories: list[Entry] = []
        for found in entries:
            name = found.name
            entry = Entry(f"{above}/{name}", f"{below}/{name}", found.stat(follow_symlinks=False))
            if stat.S_ISDIR(entry.status.st_mode):
                os.mkdir(entry.destination, 0o700)
                subdirectories.append(entry)
            elif entry.status.st_dev != device and is_mount_root(name, fd):
                _logger.warning("%s is mounted over: left out of the copy", entry.source)
            elif entry.status.st_nlink == 1 or not self._link(entry):
                self._take(entry)
        return subdirectories

    def _link(self, entry: Entry) -> bool:
        """Whether another name of the same file came before; then this one becomes a link to it."""
        key = (entry.status.st_dev, entry.status.st_ino)
        first = self._linked.setdefault(key, entry.destination)
        if first == entry.destination:
            return False
        # A worker may not have made the first name yet.
        self._late_links.append((first, entry.destination))
        self._files.advance(1, 0)
        return True

    def _take(self, entry: Entry) -> None:
        if not stat.S_ISREG(entry.status.st_mode):
            self._files.make_special(entry)
            return
        if self._batch.full:
            self._workers.submit(self._batch.entries)
            self._batch = _Batch()
        self._batch.add(entry)


@dataclass(slots=True)
class _Batch:
    entries: list[Entry] = field(default_factory=list)
    size: int = 0

    @property
    def full(self) -> bool:
        return len(self.entries) >= BATCH_FILES or self.size >= BATCH_BYTES

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.size += entry.status.st_size


class _Workers:
    """Threads that copy batches: started with the first one, joined on exit, which raises their failure."""

    def __init__(self, files: EntryCopy, threads: int) -> None:
        self._files = files
        self._count = threads
        self._threads: list[threading.Thread] = []
        self._batches: queue.Queue[list[Entry] | None] = queue.Queue(threads * QUEUED_BATCHES_PER_THREAD)

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._files.fail(error)
        for _ in self._threads:
            self._batches.put(None)
        for thread in self._threads:
            thread.join()
        # The first failure is the cause; what other threads raised since only says that they stopped.
        if self._files.failure is not None and self._files.failure is not error:
            raise self._files.failure from None

    def submit(self, batch: list[Entry]) -> None:
        if not self._threads:
            for number in range(self._count):
                thread = threading.Thread(target=self._work, name=f"copy-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)
        self._batches.put(batch)

    def _work(self) -> None:
        # After a failure the queue is still emptied: the walk may be waiting for room in it.
        while (batch := self._batches.get()) is not None:
            try:
                self._files.copy_all(batch)
            except BaseException as error:
                # Raised again by the thread that waits.
                self._files.fail(error)


class _WriteBehind:
    """Flushes what a large copy has written so far, beside the copying, so that the flush at its end is short.

    Otherwise one processor copies into memory that another could have been writing out. Measured on two cores with
    Linux 6.18 and ext4, 300 MiB in 12,000 files: copied and flushed in 0.45 s instead of 0.52 s.
    """

    def __init__(self, flush: Callable[[], None]) -> None:
        self._flush = flush
        self._unflushed = 0
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._failure: OSError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._thread is not None:
            self._stopping = True
            self._wake.set()
            self._thread.join()
        if self._failure is not None and error is None:
            raise self._failure

    def wrote(self, size: int) -> None:
        """Note bytes that went into files; not from two threads at a time."""
        self._unflushed += size
        if self._unflushed < UNFLUSHED_BYTES:
            return
        self._unflushed = 0
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="write-behind", daemon=True)
            self._thread.start()
        self._wake.set()

    def _run(self) -> None:
        while self._wake.wait() and not self._stopping:
            self._wake.clear()
            try:
                self._flush()
            except OSError as error:
                # The kernel tells of a failed write-back once: whoever flushes at the end does not hear of it.
                self._failure = error
                return
