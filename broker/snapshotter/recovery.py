"""After a start: what a crash left on disk without a record is discarded, what a record promises is looked at.

It runs beside the service. Records are looked at by the writer, a page between turns; a record whose files are gone
is marked broken and everything else serves. An id that a commit has touched since the start is left alone: its files
may be half way between the two kinds, and its record moves to another key, perhaps from ahead of the scan to behind
it. Then the disk is listed: an id below this run's boundary (ids are never used twice) that no record has is a
left-over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Final

from backends.failpoints import reach
from broker.logs import get_logger
from broker.snapshotter.verbs import snapshot_of
from broker.snapshotter.writer import Errand
from broker.store.idset import IdSet
from broker.store.records import BROKEN, Record
from snapbroker.errors import BrokerError, NotFound

if TYPE_CHECKING:
    from lmdb import Transaction

    from backends.api import Backend
    from broker.snapshotter.trash import Trash
    from broker.snapshotter.writer import Writer
    from broker.store import Snapshots

log = get_logger()

PAGE: Final = 64
"""Records looked at in one turn: about a millisecond."""
RETRY_S: Final = 1.0
"""Pause before something that failed is tried again."""


class Recovery:
    """One pass over records and disk; `begin` queues it, `done` is called from a thread at its end."""

    def __init__(
        self,
        backend: Backend,
        snapshots: Snapshots,
        writer: Writer,
        trash: Trash,
        boundary: int,
        kept: Container[int] = frozenset(),
    ) -> None:
        """`kept`: ids without a record that are left alone all the same."""
        self._backend = backend
        self._snapshots = snapshots
        self._writer = writer
        self._trash = trash
        self._boundary = boundary
        self._kept = kept
        self._seen = IdSet()
        self._stopped = False
        self.checked = 0
        self.broken = 0
        self.damaged = 0
        self.leftovers = 0
        self.finished = False

    def begin(self) -> None:
        """Take over what an earlier run had put aside, and queue the first page of records."""
        self._writer.submit_work(self._take_over)
        self._page(b"")

    def _take_over(self) -> None:
        try:
            self._trash.recover(self._backend.discarded())
        except (OSError, BrokerError) as error:
            log.warning("the trash cannot be listed", error=str(error))
            self._later(lambda: self._writer.submit_work(self._take_over))

    def see(self, id_: int) -> None:
        """A commit has touched the id; called by the writer."""
        if not self.finished:
            self._seen.add(id_)

    def stop(self) -> None:
        """Queue no further page."""
        self._stopped = True

    def _page(self, after: bytes) -> None:
        rows: list[tuple[bytes, Record | None]] = []

        def run(txn: Transaction, _turn: object, _now: int) -> None:
            rows[:] = list(self._snapshots.scan(txn, after, PAGE))
            for key, record in rows:
                if record is None:
                    self.damaged += 1
                    log.error("a record is damaged", key=repr(key))
                else:
                    self._look(txn, key, record)
            reach("recovery.looked")

        def done(error: BrokerError | None) -> None:
            if self._stopped:
                return
            if error is not None:
                log.warning("recovery waits for the database", error=error.message)
                self._later(lambda: self._page(after))
            elif rows:
                self._page(rows[-1][0])
            else:
                self._writer.submit_work(self._sweep)

        self._writer.errand(Errand(run, done))

    def _later(self, call: Callable[[], None]) -> None:
        timer = threading.Timer(RETRY_S, call)
        timer.daemon = True
        timer.start()

    def _look(self, txn: Transaction, key: bytes, record: Record) -> None:
        if record.id >= self._boundary or record.id in self._seen:
            return
        self._seen.add(record.id)
        self.checked += 1
        namespace = key[: key.index(b"\0")].decode()
        name = ""
        try:
            info = record.decoded()
            name = info.name
            whole = self._backend.whole(snapshot_of(self._snapshots, txn, namespace, info, record))
        except (NotFound, FileNotFoundError, NotADirectoryError):
            whole = False
        except Exception as error:
            # It may pass: what cannot be looked at is not therefore broken.
            log.warning(
                "a snapshot cannot be looked at", namespace=namespace, name=name, id=record.id, error=str(error)
            )
            return
        if not whole:
            self.broken += 1
            log.error("a snapshot is broken: its files are missing", namespace=namespace, name=name, id=record.id)
        if whole == record.broken:
            self._snapshots.put(txn, key, record._replace(flags=0 if whole else BROKEN))
            reach("recovery.marked")

    def _sweep(self) -> None:
        """Discard what has no record; in a worker."""
        reach("recovery.sweeping")
        try:
            # Whose files a damaged record speaks of is unknown: nothing may be taken for a left-over.
            for id_ in () if self.damaged else self._backend.ids():
                if self._stopped:
                    return
                if id_ < self._boundary and id_ not in self._seen and id_ not in self._kept:
                    self.leftovers += 1
                    self._trash.discard(id_, None)
                    reach("recovery.discarded")
        except (OSError, BrokerError) as error:
            log.error("left-overs cannot be looked for", error=str(error))
        self.finished = True
        reach("recovery.finished")
        if self.leftovers or self.broken:
            log.info("recovered", checked=self.checked, broken=self.broken, leftovers=self.leftovers)

    def statistics(self) -> dict[str, int]:
        """For `status`."""
        return {
            "finished": int(self.finished),
            "checked": self.checked,
            "broken": self.broken,
            "damaged": self.damaged,
            "leftovers": self.leftovers,
        }
