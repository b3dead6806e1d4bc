"""Snapshots that lie nowhere: the oracle of the tests, with every answer of a backend and no disk.

It keeps the ids, so that what a broker asks of its backend can be checked; its mounts, of type `memory`, can
be told apart but not mounted, and every usage is {0, 0}.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, ClassVar, Self

from backends.api import REBASE, Options, Snapshot, Support, Task
from backends.inspecting import NothingInspector
from snapbroker.contract import Kind, Mount, Usage
from snapbroker.errors import AlreadyExists

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from backends.api import Inspector


class MemoryOptions(Options, frozen=True, kw_only=True):
    """There is nothing to choose."""


class Memory:
    """The memory backend; safe to call from several threads."""

    Options: ClassVar[type[Options]] = MemoryOptions
    workers: ClassVar[int] = 4
    privileges: ClassVar[frozenset[str]] = frozenset()
    sync_remove: bool = False
    capabilities: frozenset[str] = frozenset([REBASE])

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._ids: set[int] = set()
        self._trash: set[str] = set()

    @classmethod
    def probe(cls, root: Path, options: MemoryOptions) -> Support:
        """It works everywhere."""
        return Support(notes=("keeps nothing: for tests",))

    @classmethod
    def open(cls, root: Path, options: MemoryOptions) -> Self:
        """A backend without snapshots; `root` is only remembered."""
        return cls(root)

    @classmethod
    def open_again(cls, root: Path, options: MemoryOptions) -> Self:
        """The same root in another process, without probing."""
        return cls(root)

    def create(self, snapshot: Snapshot, task: Task) -> None:
        """Remember the id."""
        self.stock([snapshot.id], task)

    def stock(self, ids: Sequence[int], task: Task) -> None:
        """Remember the ids, all or none."""
        task.advance(len(ids))
        with self._lock:
            if taken := self._ids.intersection(ids):
                raise AlreadyExists(f"id {min(taken)} has been made already")
            self._ids.update(ids)

    def fits(self, snapshot: Snapshot) -> bool:
        """Active snapshots only, as on disk."""
        return snapshot.kind is Kind.ACTIVE

    def mounts(self, snapshot: Snapshot) -> Sequence[Mount]:
        """One mount that says the kind and the chain."""
        access = "rw" if snapshot.kind is Kind.ACTIVE else "ro"
        chain = ":".join(map(str, snapshot.parents))
        options = (access, f"parents={chain}") if chain else (access,)
        return (Mount("memory", str(snapshot.id), options),)

    def usage(self, snapshot: Snapshot, task: Task) -> Usage:
        """Nothing."""
        task.advance(0)
        return Usage()

    def commit(self, snapshot: Snapshot, sync: bool, task: Task) -> Usage:
        """Nothing to do, nothing to measure."""
        return self.usage(snapshot, task)

    def settle(self, snapshot: Snapshot) -> None:
        """Nothing."""

    def revert(self, snapshot: Snapshot) -> None:
        """Nothing."""

    def discard(self, id: int) -> str | None:
        """Move the id into the trash."""
        with self._lock:
            if id not in self._ids:
                return None
            self._ids.remove(id)
            self._trash.add(str(id))
            return str(id)

    def discarded(self) -> Iterator[str]:
        """The ids in the trash."""
        with self._lock:
            return iter(sorted(self._trash))

    def measure(self, token: str, task: Task) -> Usage:
        """Nothing."""
        task.advance(0)
        return Usage()

    def delete(self, token: str, task: Task) -> None:
        """Forget an id of the trash."""
        task.advance()
        with self._lock:
            self._trash.discard(token)

    def ids(self) -> Iterator[int]:
        """The ids remembered."""
        with self._lock:
            return iter(sorted(self._ids))

    def whole(self, snapshot: Snapshot) -> bool:
        """Always: where nothing is kept, nothing can be missing after a restart."""
        return True

    @classmethod
    def inspect(cls, root: Path) -> Inspector:
        """A look at a root that changes nothing."""
        return NothingInspector()

    def inspector(self) -> Inspector:
        """The same of this root."""
        return NothingInspector(self.ids())

    def labels(self, snapshot: Snapshot) -> Mapping[str, str]:
        """None."""
        return {}

    def close(self) -> None:
        """Nothing is held."""
