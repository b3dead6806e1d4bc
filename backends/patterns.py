"""Small trees remembered, so that one more copy of a warm base is made without reading the base again.

A build farm prepares from the same few bases thousands of times a minute. Of each copy of a small tree a third is
finding out what there is to copy: opening, reading and closing files that are what they were a millisecond before.
A pattern holds the names in a tree and what is in its files; copying it is making them.

It trusts nobody. That committed trees do not change is a promise the disk does not know of: a mount of the active
snapshot may have outlived its commit, a file may be damaged. So before each copy every entry is looked at, one lstat
each: it has to be the same inode, unchanged, which the kernel tells by its change time, of content, attributes and
directory entries alike. If anything differs the pattern is dropped and the tree copied the long way, which also says
what is wrong with it. The change time is only as fine as the kernel's clock, before Linux 6.13 up to 10 ms; so what
changed just before it was read is not remembered.

Only plain trees have patterns: a few small files, directories and symbolic links, without attributes, holes, second
names or mounts. Everything else is copied the long way too.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from backends.entries import Entry, EntryCopy, attributes, has_holes, make_plain
from backends.failpoints import reach
from backends.syscalls import is_mount_root

if TYPE_CHECKING:
    from collections.abc import Iterator

    from backends.api import Task

ENTRIES_MAX: Final = 64
"""Most entries of a tree with a pattern."""
BYTES_MAX: Final = 128 << 10
"""Most bytes in its files."""
PATTERNS_MAX: Final = 64
"""Trees remembered at a time, so 8 MiB of content at most in each process that copies."""
REST_S: Final = 0.25
"""A tree is read for its pattern so long after it was first copied: most trees are copied once."""
SETTLED_NS: Final = 100_000_000
"""What changed more recently than this may change once more without its change time telling."""


class Patterns:
    """The patterns of a backend's committed snapshots, by id; used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # A pattern, or when the tree was first copied, or None for one that cannot have a pattern.
        self._known: OrderedDict[int, Pattern | float | None] = OrderedDict()

    def copied(self, id_: int, entries: int, size: int) -> None:
        """Note that a tree was copied the long way, and how large it is."""
        if entries > ENTRIES_MAX or size > BYTES_MAX:
            return
        with self._lock:
            if id_ not in self._known:
                self._remember(id_, time.monotonic())

    def copy(self, id_: int, source: str, destination: str, task: Task) -> bool:
        """Fill the empty directory `destination` as `copy_tree` does; False when the tree has to be copied by it."""
        pattern = self._pattern(id_, source)
        if pattern is None:
            return False
        seen = pattern.seen(source)
        if seen is None:
            with self._lock:
                self._known.pop(id_, None)
            return False
        make_plain(destination)
        pattern.copy(seen, source, destination, task)
        return True

    def _pattern(self, id_: int, source: str) -> Pattern | None:
        with self._lock:
            known = self._known.get(id_)
            if isinstance(known, Pattern):
                self._known.move_to_end(id_)
                return known
            if known is None or time.monotonic() - known < REST_S:
                return None
        pattern = Pattern.of(source)
        with self._lock:
            self._remember(id_, pattern)
        return pattern

    def _remember(self, id_: int, known: Pattern | float | None) -> None:
        self._known[id_] = known
        self._known.move_to_end(id_)
        if len(self._known) > PATTERNS_MAX:
            self._known.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Part:
    """One entry of a tree: its path below the root, and what is in it if it is a file."""

    path: str
    status: os.stat_result
    content: bytes = b""


class Pattern:
    """What there is in one tree, each directory before what is in it."""

    def __init__(self, parts: list[Part]) -> None:
        self._parts = parts

    @classmethod
    def of(cls, root: str) -> Pattern | None:
        """The pattern of a tree; None when it cannot have one."""
        parts: list[Part] = []
        before = time.time_ns() - SETTLED_NS
        size = 0
        try:
            for part in _parts(root):
                parts.append(part)
                size += len(part.content)
                if len(parts) > ENTRIES_MAX or size > BYTES_MAX or part.status.st_ctime_ns > before:
                    return None
        except (_Unfit, OSError):
            return None
        return cls(parts)

    def seen(self, root: str) -> list[os.stat_result] | None:
        """What the entries of the tree are at the moment; None when it is not what it was."""
        seen: list[os.stat_result] = []
        try:
            for part in self._parts:
                status = os.stat(root + part.path, follow_symlinks=False)
                if _identity(status) != _identity(part.status):
                    return None
                seen.append(status)
        except OSError:
            return None
        return seen

    def copy(self, seen: list[os.stat_result], source: str, destination: str, task: Task) -> None:
        """Make everything in `destination`; `seen` is what it is to look like."""
        copy = EntryCopy(task, "never")
        directories: list[Entry] = []
        for part, status in zip(self._parts, seen, strict=True):
            path = destination + part.path
            if stat.S_ISREG(status.st_mode):
                copy.make_file(path, part.content, status)
            elif stat.S_ISLNK(status.st_mode):
                copy.make_special(Entry(source + part.path, path, status))
            else:
                if part.path:
                    os.mkdir(path, 0o700)
                directories.append(Entry(source + part.path, path, status))
        reach("patterns.filled")
        for directory in reversed(directories):
            copy.finish(directory, plain=True)


class _Unfit(Exception):
    """The tree cannot have a pattern."""


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_ctime_ns, status.st_dev


def _parts(root: str) -> Iterator[Part]:
    pending = [Part("", os.stat(root, follow_symlinks=False))]
    device = pending[0].status.st_dev
    while pending:
        part = pending.pop()
        path = root + part.path
        mode = part.status.st_mode
        if part.status.st_dev != device or attributes(path) or (part.path and is_mount_root(path)):
            raise _Unfit
        if stat.S_ISDIR(mode):
            with os.scandir(path) as found:
                pending += [Part(f"{part.path}/{entry.name}", entry.stat(follow_symlinks=False)) for entry in found]
            yield part
        elif stat.S_ISLNK(mode):
            yield part
        elif stat.S_ISREG(mode) and part.status.st_nlink == 1 and not has_holes(part.status):
            yield Part(part.path, part.status, _content(path, part.status))
        else:
            raise _Unfit


def _content(path: str, status: os.stat_result) -> bytes:
    if status.st_size > BYTES_MAX:
        raise _Unfit
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NOATIME | os.O_CLOEXEC)
    try:
        content = os.read(fd, BYTES_MAX + 1)
        same = _identity(os.fstat(fd)) == _identity(status)
    finally:
        os.close(fd)
    if not same or len(content) != status.st_size:
        raise _Unfit
    return content
