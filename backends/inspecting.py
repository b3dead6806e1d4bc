"""A look at a backend's root that changes nothing, not even modes: what an audit compares with the records."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from backends import files
from backends.api import Entry, Place, Snapshot, Task
from backends.btrfs_ioctl import SUBVOLUME_INODE
from backends.files import is_id
from snapbroker.contract import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

PRIVATE: Final = 0o700
"""The mode of every directory of the store's own."""


class ShelfInspector:
    """The look at a root that is laid out as a `backends.files.Shelf`.

    `parts` tells, below `snapshots/`, the directories that a snapshot needs; with `subvolumes` each must be one.
    `private`: the directory of an id is the store's own and not the root of what users see. `also` are further
    directories of the root.
    """

    def __init__(
        self,
        root: Path,
        parts: Callable[[Snapshot], Sequence[str]],
        *,
        private: bool,
        deep: bool = False,
        subvolumes: bool = False,
        also: Iterable[str] = (),
    ) -> None:
        self.root = Path(os.path.abspath(root))
        self.deep = deep
        self._parts = parts
        self._private = private
        self._subvolumes = subvolumes
        self._also = tuple(also)
        self._snapshots = self.root / "snapshots"
        self._trash = self.root / "trash"

    def places(self) -> Iterator[Place]:
        """The root and the directories in it."""
        yield Place(str(self.root), PRIVATE)
        for name in ("snapshots", "trash", *self._also):
            yield Place(str(self.root / name), PRIVATE)

    def entries(self) -> Iterator[Entry]:
        """Everything in `snapshots/`."""
        try:
            listing = os.scandir(self._snapshots)
        except FileNotFoundError:
            return
        with listing:
            for entry in listing:
                known = is_id(entry.name) and entry.is_dir(follow_symlinks=False)
                mode = PRIVATE if known and self._private else None
                yield Entry(int(entry.name) if known else 0, Place(entry.path, mode))

    def flaw(self, snapshot: Snapshot) -> str:
        """Which of the snapshot's directories is missing; empty where none is."""
        for part in self._parts(snapshot):
            path = self._snapshots / part
            try:
                status = os.stat(path, follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                return f"{path} is missing"
            if not stat.S_ISDIR(status.st_mode):
                return f"{path} is no directory"
            if self._subvolumes and status.st_ino != SUBVOLUME_INODE:
                return f"{path} is no subvolume"
        return ""

    def path(self, id: int) -> str:
        """Where the directory of an id is."""
        return str(self._snapshots / str(id))

    def unused(self, id: int) -> bool:
        """Whether the directory of an id has nothing but empty directories."""
        if not self._private:
            return False
        try:
            names = os.listdir(self.path(id))
            return all(not os.listdir(os.path.join(self.path(id), name)) for name in names)
        except OSError:
            return False

    def owner(self, path: str) -> int | None:
        """Whose directory a path lies in: an id, 0 for something in the trash, None for none of ours."""
        if path.startswith(f"{self._trash}/"):
            return 0
        if not path.startswith(f"{self._snapshots}/"):
            return None
        name = path[len(str(self._snapshots)) + 1 :].split("/", 1)[0]
        return int(name) if is_id(name) else None

    def size(self, path: str, task: Task) -> Usage:
        """What lies below a path, nested subvolumes included; missing is {0, 0}."""
        try:
            return files.usage(path, task)
        except (FileNotFoundError, NotADirectoryError):
            return Usage()

    def discarded(self) -> Iterator[str]:
        """The paths of what is in the trash."""
        try:
            listing = os.scandir(self._trash)
        except FileNotFoundError:
            return
        with listing:
            for entry in listing:
                yield entry.path

    def highest(self) -> int:
        """The highest id that has a name anywhere in the root."""
        found = 0
        for name in ("snapshots", "trash", *self._also):
            try:
                listing = os.scandir(self.root / name)
            except FileNotFoundError:
                continue
            with listing:
                for entry in listing:
                    stem = entry.name.partition(".")[0]
                    found = max(found, int(stem) if is_id(stem) else 0)
        return found


class NothingInspector:
    """The look at a backend that keeps no files: nothing of a record can be missing."""

    deep = False

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._ids = frozenset(ids)

    def places(self) -> Iterator[Place]:
        """None."""
        return iter(())

    def entries(self) -> Iterator[Entry]:
        """The ids that it was told, under no path."""
        for id_ in sorted(self._ids):
            yield Entry(id_, Place("", None))

    def flaw(self, snapshot: Snapshot) -> str:
        """Never any."""
        return ""

    def path(self, id: int) -> str:
        """Nowhere."""
        return ""

    def unused(self, id: int) -> bool:
        """Nothing is made ahead of time that would outlive its process."""
        return False

    def owner(self, path: str) -> int | None:
        """Nothing is mounted from here."""
        return None

    def size(self, path: str, task: Task) -> Usage:
        """Nothing."""
        return Usage()

    def discarded(self) -> Iterator[str]:
        """None."""
        return iter(())

    def highest(self) -> int:
        """The highest id it was told."""
        return max(self._ids, default=0)
