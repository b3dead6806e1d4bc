"""How an audit gets at a store: the same for one that runs, beside its writer, and for one that nobody has open."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from backends.api import Backend, Inspected, Inspector, Pooled
from backends.inspecting import NothingInspector
from broker.store import Environment, IdSet, Journal, Retention

if TYPE_CHECKING:
    from lmdb import Transaction

    from broker.store.journal import Turn

T = TypeVar("T")
Work = Callable[["Transaction", "Turn", int], T]
"""What runs in a write transaction, with the journal's turn and the time."""


@dataclass(frozen=True, slots=True)
class Flight:
    """What is under way at this moment and therefore no finding.

    `ids` have or get directories, `creates` and `consumes` are index keys, `pins` are ids of parents with the number
    of calls that make something of them. `recovering`: the start is not over.
    """

    ids: Container[int] = frozenset()
    creates: Container[bytes] = frozenset()
    consumes: Container[bytes] = frozenset()
    pins: Mapping[int, int] = field(default_factory=dict)
    recovering: bool = False

    def holds(self, key: bytes) -> bool:
        """Whether a call that is under way is about the index key."""
        return key in self.creates or key in self.consumes


class Access(Protocol):
    """A store and its directory, for one audit; every method may block."""

    environment: Environment
    root: Path
    metadata: Path
    snapshotter: str

    stocked: bool
    """Whether directories that were made ahead of time for an earlier run may lie there."""

    @property
    def inspector(self) -> Inspector:
        """The look at what is on disk at this moment."""
        ...

    def transact(self, work: Work[T]) -> T:
        """Run `work` in a write transaction, behind all that was decided before; its events are told.

        It may share the transaction with calls, and is run again where that was dropped: only its result counts.
        """
        ...

    def flight(self) -> Flight:
        """What is under way; to be asked inside of `transact` alone."""
        ...

    def watch(self) -> contextlib.AbstractContextManager[IdSet]:
        """The ids that commits touch meanwhile."""
        ...

    def discard(self, id_: int) -> None:
        """Put the directory of an id into the trash."""
        ...

    def failures(self) -> dict[str, str]:
        """What cannot be deleted, with the reason."""
        ...


class OfflineAccess:
    """A store that no snapshotter has open; whoever makes it holds the lock of its root."""

    def __init__(
        self,
        environment: Environment,
        snapshotter: str,
        root: Path,
        metadata: Path,
        backend: type[Backend],
        open_backend: Callable[[], Backend],
    ) -> None:
        self.environment = environment
        self.snapshotter = snapshotter
        self.root = root
        self.metadata = metadata
        self.inspector = backend.inspect(root) if issubclass(backend, Inspected) else NothingInspector()
        self.stocked = issubclass(backend, Pooled)
        self._open_backend = open_backend
        self._backend: Backend | None = None
        # Nothing is dropped for its age by whoever only looks, or mends.
        self._journal = Journal(environment, snapshotter, Retention(events_max=2**62, age_max_s=2**32))

    def transact(self, work: Work[T]) -> T:
        """Run `work`, commit."""
        turn = self._journal.begin()

        def run(txn: Transaction) -> T:
            nonlocal turn
            turn = self._journal.begin()
            now = time.time_ns()
            result = work(txn, turn, now)
            turn.finish(txn, now)
            return result

        result = self.environment.write(run, frees=True)
        self._journal.settle(turn)
        return result

    def flight(self) -> Flight:
        """Nothing is."""
        return Flight()

    def watch(self) -> contextlib.AbstractContextManager[IdSet]:
        """Nobody commits."""
        return contextlib.nullcontext(IdSet())

    def discard(self, id_: int) -> None:
        """Put the directory into the trash, which the next start empties."""
        if self._backend is None:
            self._backend = self._open_backend()
        self._backend.discard(id_)

    def failures(self) -> dict[str, str]:
        """Nobody has tried."""
        return {}

    def close(self) -> None:
        """Let go of the backend; the environment is its owner's."""
        if self._backend is not None:
            self._backend.close()


def changed_at(path: str) -> int:
    """When something of a path was changed last, in nanoseconds; 0 where it cannot be looked at."""
    try:
        return os.stat(path, follow_symlinks=False).st_ctime_ns
    except OSError:
        return 0
