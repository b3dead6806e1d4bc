"""The LMDB environment of one actor: opened once, grown without losing a call, one format version.

LMDB keeps its default sync: a commit that returned is on disk. The map is the file's greatest size; when a
transaction hits it, the transaction is dropped, the map doubled and the work repeated: `write` therefore takes
the work as a function that can be run again. Growing is only legal while no transaction of this process is
open, so readers hold a gate while they read, and nobody keeps a read transaction across a page.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import lmdb
import msgspec

from backends.failpoints import reach
from backends.syscalls import free_bytes
from broker.store.preallocation import Preallocation
from snapbroker.errors import FailedPrecondition, Internal, ResourceExhausted

if TYPE_CHECKING:
    from lmdb import Transaction

FORMAT: Final = 2
"""Version of the records' layout; another one is refused at open."""

DATABASE: Final = "data.mdb"
"""LMDB's name for the file."""

FULL_BYTES: Final = 1 << 20
"""With less room than this, a write that failed is taken to have failed for it."""
RESERVE_STEP_BYTES: Final = 1 << 20
"""By how much at least the map grows for a transaction that frees."""

T = TypeVar("T")


def copy_database(path: Path, descriptor: int, *, compact: bool) -> None:
    """Write a consistent copy of the database in the directory `path`, which may be in use, to an open file.

    `compact`: without free pages, which takes longer. What the copy reads is kept meanwhile: the database grows by what
    changes. Internal where it cannot be read.
    """
    try:
        environment = lmdb.open(os.fspath(path), readonly=True, max_dbs=12, readahead=True)
        try:
            environment.copyfd(descriptor, compact=compact)
        finally:
            environment.close()
    except lmdb.Error as error:
        raise Internal(f"the metadata database {path} cannot be copied: {error}") from error


class StoreFull(ResourceExhausted):
    """The map is as large as it may be."""


class StoreBroken(Internal):
    """A commit failed half way: what is on disk is only known to whoever opens the database anew."""


class StoreLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits of one metadata database."""

    map_initial_bytes: int = 1 << 30
    """Size of the map at start; the file itself grows as records come."""
    map_max_bytes: int = 1 << 40
    """Where growing ends and writes get resource_exhausted."""
    preallocated_max_bytes: int = 16 << 20
    """How much longer than what is used of it the file is made at most, ahead of time, on ext4 and xfs; 0: never."""


class _Reading(AbstractContextManager["Transaction"]):
    """The gate and a transaction behind it; a class, as a generator costs a stat two of its thirty microseconds."""

    __slots__ = ("_environment", "_gate", "_txn")

    def __init__(self, gate: threading.Lock, environment: lmdb.Environment) -> None:
        self._gate = gate
        self._environment = environment

    def __enter__(self) -> Transaction:
        self._gate.acquire()
        try:
            self._txn = self._environment.begin()
        except BaseException:
            self._gate.release()
            raise
        return self._txn

    def __exit__(self, *_error: object) -> None:
        # Nothing was written: there is nothing that an end by itself could not give back.
        try:
            self._txn.abort()
        finally:
            self._gate.release()


class Environment:
    """An open environment and its named databases."""

    def __init__(self, path: Path, limits: StoreLimits) -> None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = path
        self.file = path / DATABASE
        self._limits = limits
        self._gate = threading.Lock()
        size = self.file.stat().st_size if self.file.exists() else 0
        try:
            self._env = lmdb.open(
                os.fspath(path),
                map_size=max(min(max(limits.map_initial_bytes, 2 * size), limits.map_max_bytes), size),
                max_dbs=12,
                max_spare_txns=4,
                mode=0o600,
                readahead=False,
            )
        except lmdb.Error as error:
            raise Internal(f"cannot open the metadata database {path}: {error}") from error
        self._env.reader_check()
        reach("environment.opened")
        self.page_bytes = int(self._env.stat()["psize"])
        self._preallocation = Preallocation(self.file, limits.preallocated_max_bytes)
        with self._env.begin(write=True) as txn:
            self.meta = self._env.open_db(b"meta", txn=txn)
            self.snapshots = self._env.open_db(b"snapshots", txn=txn)
            self.children = self._env.open_db(b"children", txn=txn)
            self.references = self._env.open_db(b"references", txn=txn)
            self.journal = self._env.open_db(b"journal", txn=txn)
            self.topics = self._env.open_db(b"topics", txn=txn)
            self.outcomes = self._env.open_db(b"outcomes", txn=txn)
            self.outcome_ages = self._env.open_db(b"outcome_ages", txn=txn)
            found = txn.get(b"format", db=self.meta)
            if found is None:
                txn.put(b"format", str(FORMAT).encode(), db=self.meta)
            elif found != str(FORMAT).encode():
                raise FailedPrecondition(
                    f"the metadata database {path} has format {found.decode()}, this snapbrokerd reads {FORMAT}: "
                    "run the version that wrote it"
                )

    def read(self) -> AbstractContextManager[Transaction]:
        """A read transaction, to be closed within a page's work; from any thread."""
        return _Reading(self._gate, self._env)

    def write(self, work: Callable[[Transaction], T], *, frees: bool = False) -> T:
        """Run `work` in a write transaction and commit; repeat it in a larger map when this one is full.

        Deleting takes pages too: a transaction that only `frees` may use the reserve beyond `map_max_bytes`, or a
        full database could not be emptied. StoreFull when there is no room left.
        """
        while True:
            try:
                with self._env.begin(write=True) as txn:
                    result = work(txn)
                    reach("environment.worked")
            except lmdb.MapFullError:
                reach("environment.full")
                self._grow(frees=frees)
                reach("environment.grown")
            except lmdb.PanicError as error:
                raise StoreBroken(f"the metadata database has to be opened anew: {error}") from error
            except lmdb.DiskError as error:
                raise ResourceExhausted(f"the metadata database's disk is full: {error}") from error
            except lmdb.Error as error:
                if self._disk_is_full():
                    raise ResourceExhausted(f"the metadata database's disk is full: {error}") from error
                raise Internal(f"the metadata database failed: {error}") from error
            else:
                reach("environment.committed")
                return result

    def _disk_is_full(self) -> bool:
        """LMDB reports a write that a full disk cut short as an input/output error."""
        return free_bytes(os.statvfs(self._path)) < FULL_BYTES

    @contextmanager
    def nested(self, txn: Transaction) -> Iterator[Transaction]:
        """A child of `txn`: committed into it at the end, dropped alone on an exception."""
        with self._env.begin(parent=txn, write=True) as child:
            yield child
        reach("environment.nested")

    def _grow(self, *, frees: bool) -> None:
        limit = self._limits.map_max_bytes
        with self._gate:
            size = int(self._env.info()["map_size"])
            if size < limit:
                larger = min(2 * size, limit)
            elif frees and size < limit + limit // 4:
                larger = size + max(limit // 64, RESERVE_STEP_BYTES)
            else:
                raise StoreFull(
                    f"the metadata database reached map_max_bytes={limit}: raise it in the configuration, or remove "
                    "snapshots"
                )
            self._env.set_mapsize(larger)

    def runs_short(self) -> bool:
        """Whether the file should be made longer before the next transactions need it; to be asked by who writes."""
        return self._preallocation.wanted(int(self._env.info()["last_pgno"] + 1) * self.page_bytes)

    def extend(self) -> None:
        """Make it so, in another thread than the one that writes: it waits for the disk."""
        self._preallocation.extend()

    def statistics(self) -> dict[str, int]:
        """Map size, bytes used, and readers, for `status`."""
        with self._gate:
            info = self._env.info()
            page = int(self._env.stat()["psize"])
        return {
            "map_bytes": int(info["map_size"]),
            "limit": self._limits.map_max_bytes,
            "used_bytes": int(info["last_pgno"] + 1) * page,
            "readers": int(info["num_readers"]),
        }

    def close(self) -> None:
        """Close; the environment cannot be used after."""
        self._env.close()
