"""How a snapshot lies on disk: the interface every backend fills, and nothing about names, labels or databases.

A backend is told ids, kinds and chains; the broker keeps names, labels, parents and events. Ids are never
reused (D4), so a directory named after an id is built in place: until the broker's database has a record of it,
it is a left-over, and a left-over is found at start and discarded. Every method blocks, is called from worker
threads, several at a time for different ids, and is durable when it returns unless it says otherwise.

The life of a snapshot on disk:

    create -> (mounts, usage) -> commit -> settle -> ... -> discard -> delete
                                    `----> revert (the record could not be written)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import msgspec

from snapbroker.contract import Kind, Mount, Usage
from snapbroker.errors import Cancelled

REBASE = "rebase"
REMAP_IDS = "remap-ids"
ONLY_REMAP_IDS = "only-remap-ids"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a backend is told of a snapshot: `parents` are ids, the immediate parent first, the root last."""

    id: int
    kind: Kind
    parents: tuple[int, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)


class Task:
    """A long operation as its backend sees it: asked whether to stop, told how far it is.

    `advance` is called often (once a file); it raises Cancelled once somebody called `cancel`.
    """

    __slots__ = ("_cancelled", "begun", "bytes", "entries")

    def __init__(self) -> None:
        self._cancelled = threading.Event()
        self.begun = False
        self.entries = 0
        self.bytes = 0

    def cancel(self) -> None:
        """Ask the operation to stop; it undoes what it did and raises Cancelled."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked."""
        return self._cancelled.is_set()

    def advance(self, entries: int = 1, size: int = 0) -> None:
        """Note progress; raise Cancelled when asked to stop."""
        self.begun = True
        self.entries += entries
        self.bytes += size
        if self._cancelled.is_set():
            raise Cancelled("the call was taken back")


class TooMany(Exception):
    """There is more than a glance takes in."""


class Glance(Task):
    """A task for what is done at once or not at all: it ends with TooMany beyond `ENTRIES_MAX` entries."""

    __slots__ = ()

    ENTRIES_MAX: ClassVar[int] = 32
    """What is measured in less time than it takes to hand it to another thread."""

    def advance(self, entries: int = 1, size: int = 0) -> None:
        """Count."""
        super().advance(entries, size)
        if self.entries > self.ENTRIES_MAX:
            raise TooMany


@dataclass(frozen=True, slots=True)
class Support:
    """What `probe` found: `missing` says, one line each, why the backend cannot work here; `notes` what it can."""

    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the backend can work here."""
        return not self.missing


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A backend's own part of its section in the configuration; subclassed by each backend."""


class Backend(Protocol):
    """How one kind of snapshotter lies on disk, under one root of its own."""

    Options: ClassVar[type[Options]]
    workers: ClassVar[int]
    """Threads that gain something from working at a time, unless the configuration says otherwise."""
    capabilities: frozenset[str]
    root: Path
    sync_remove: bool
    """Whether a removal is to be answered only once its files are deleted (C43)."""

    @classmethod
    def probe(cls, root: Path, options: Any) -> Support:
        """Say whether this machine and the filesystem at `root` (which may not exist yet) can do it."""
        ...

    @classmethod
    def open(cls, root: Path, options: Any) -> Self:
        """Make the root's layout where it is missing and return the backend; OSError or BrokerError says why not."""
        ...

    @classmethod
    def open_again(cls, root: Path, options: Any) -> Self:
        """The backend in a helper process of one that has it open: nothing is probed, which may need room on disk."""
        ...

    def create(self, snapshot: Snapshot, task: Task) -> None:
        """Build an active snapshot or view. On any error, nothing of it is left."""
        ...

    def mounts(self, snapshot: Snapshot) -> Sequence[Mount]:
        """The mounts of an active snapshot or view; always the same for the same snapshot (C25). Must be quick."""
        ...

    def usage(self, snapshot: Snapshot, task: Task) -> Usage:
        """Measure an active snapshot (C50)."""
        ...

    def commit(self, snapshot: Snapshot, sync: bool, task: Task) -> Usage:
        """Do what a commit of the active `snapshot` needs before its record, and measure it.

        With `sync`, its files are durable on return (D12). The snapshot keeps its id and must stay usable as
        active until `settle`.
        """
        ...

    def settle(self, snapshot: Snapshot) -> None:
        """The commit's record is written: drop what only the active snapshot needed. Need not be durable."""
        ...

    def revert(self, snapshot: Snapshot) -> None:
        """The commit's record was not written: drop what `commit` made."""
        ...

    def discard(self, id: int) -> str | None:
        """Move `id` out of the way in constant time (D13), into what `discarded` lists, and return its token.

        None where there is nothing of that id.
        """
        ...

    def discarded(self) -> Iterator[str]:
        """What `discard` has put away and `delete` has not yet deleted, as opaque tokens."""
        ...

    def measure(self, token: str, task: Task) -> Usage:
        """The size of a discarded entry, for the backlog's figures."""
        ...

    def delete(self, token: str, task: Task) -> None:
        """Delete a discarded entry for good, never through a mount point; missing is fine."""
        ...

    def ids(self) -> Iterator[int]:
        """Every id that has something on disk, in any order."""
        ...

    def whole(self, snapshot: Snapshot) -> bool:
        """Whether what the record promises is there; also puts right what a crash inside a commit left behind."""
        ...

    def labels(self, snapshot: Snapshot) -> Mapping[str, str]:
        """Labels that Stat, Update and Walk add (C115); empty for most."""
        ...

    def close(self) -> None:
        """Let go of descriptors; idempotent."""
        ...


@runtime_checkable
class Pooled(Protocol):
    """A backend whose directories can be made ahead of time, many for the price of one flush."""

    def stock(self, ids: Sequence[int], task: Task) -> None:
        """Make the directories of all `ids`, durable on return; on an error or cancellation none is left."""
        ...

    def fits(self, snapshot: Snapshot) -> bool:
        """Whether a stocked directory serves this snapshot as it is. Must be quick and must not raise."""
        ...


@runtime_checkable
class Glancing(Protocol):
    """A backend whose `commit`, without `sync`, does nothing but measure, which a small snapshot is too quick for."""

    def glance(self, snapshot: Snapshot) -> Usage | None:
        """The usage of an active snapshot of a few entries; None where measuring it would take longer than that."""
        ...


@runtime_checkable
class Copying(Protocol):
    """A backend whose `create` is a computation, best done by several processes, and then a flush that many share."""

    hands: ClassVar[int]
    """Processes that gain something from building at a time, unless the configuration says otherwise."""

    def build(self, snapshot: Snapshot, task: Task) -> None:
        """The part of `create` that computes; not durable. On any error, nothing of it is left."""
        ...

    def flush(self, snapshots: Sequence[Snapshot]) -> None:
        """Make what `build` made durable, all of them at once; concurrent callers share one flush."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """A path of the store's own, and the mode it must have; None: it is the users' to choose."""

    path: str
    mode: int | None


@dataclass(frozen=True, slots=True)
class Entry:
    """Something that lies where snapshots lie; `id` is 0 for what is not named like one."""

    id: int
    place: Place


class Inspector(Protocol):
    """A look at a root that changes nothing; it needs no open backend. OSError where it cannot look."""

    deep: bool
    """Whether a snapshot needs the files of all its parents, and not of the immediate one at most."""

    def places(self) -> Iterator[Place]:
        """The directories of the store's own that every root has."""
        ...

    def entries(self) -> Iterator[Entry]:
        """Everything that lies where snapshots lie, in any order."""
        ...

    def flaw(self, snapshot: Snapshot) -> str:
        """What of the files that the record promises is missing, as a sentence; empty where nothing is."""
        ...

    def path(self, id: int) -> str:
        """Where the files of an id are."""
        ...

    def unused(self, id: int) -> bool:
        """Whether the directory of an id holds nothing but what is made ahead of time, and nobody wrote into it."""
        ...

    def owner(self, path: str) -> int | None:
        """Whose files a path is among: an id, 0 for something discarded, None for none of ours."""
        ...

    def size(self, path: str, task: Task) -> Usage:
        """What lies below a path."""
        ...

    def discarded(self) -> Iterator[str]:
        """The paths of what is discarded and not yet deleted."""
        ...

    def highest(self) -> int:
        """The highest id that anything in the root is named after."""
        ...


@runtime_checkable
class Inspected(Protocol):
    """A backend whose root can be looked at, for an audit."""

    @classmethod
    def inspect(cls, root: Path) -> Inspector:
        """The look at a root that nobody needs to have open."""
        ...

    def inspector(self) -> Inspector:
        """The look at what this backend has."""
        ...


@runtime_checkable
class Modest(Protocol):
    """A backend that says which of root's capabilities it needs once it is open; the others are given up for good.

    Names as in capabilities(7), in lower case and without `CAP_`.
    """

    privileges: ClassVar[frozenset[str]]


BackendType = type[Backend]
"""What the entry points of group `snapbroker.backends` name."""


def fsync_directory(path: str | os.PathLike[str], dir_fd: int | None = None) -> None:
    """Flush a directory's entries to disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
