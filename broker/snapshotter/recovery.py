"""After a start: what a crash left on disk without a record is discarded, what a record promises is looked at.

It runs beside the service. Records are looked at by the writer, a page between turns, because only there no commit
is half done on the same directory; a record whose files are gone is marked broken and everything else serves. Then
the disk is listed: an id below this run's boundary (ids are never used twice) that no record has is a left-over.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from broker.snapshotter.verbs import snapshot_of
from broker.snapshotter.writer import Errand
from broker.store.records import BROKEN, Record
from snapbroker.errors import BrokerError

if TYPE_CHECKING:
    from lmdb import Transaction

    from backends.api import Backend
    from broker.snapshotter.trash import Trash
    from broker.snapshotter.writer import Writer
    from broker.store import Snapshots

log = structlog.get_logger()

PAGE: Final = 64
"""Records looked at in one turn: about a millisecond."""


class IdSet:
    """A set of dense ids: one bit each, in chunks of 65,536."""

    def __init__(self) -> None:
        self._chunks: defaultdict[int, bytearray] = defaultdict(lambda: bytearray(8192))

    def add(self, id_: int) -> None:
        """Put an id in."""
        self._chunks[id_ >> 16][(id_ & 0xFFFF) >> 3] |= 1 << (id_ & 7)

    def __contains__(self, id_: int) -> bool:
        chunk = self._chunks.get(id_ >> 16)
        return chunk is not None and bool(chunk[(id_ & 0xFFFF) >> 3] & 1 << (id_ & 7))


class Recovery:
    """One pass over records and disk; `begin` queues it, `done` is called from a thread at its end."""

    def __init__(self, backend: Backend, snapshots: Snapshots, writer: Writer, trash: Trash, boundary: int) -> None:
        self._backend = backend
        self._snapshots = snapshots
        self._writer = writer
        self._trash = trash
        self._boundary = boundary
        self._seen = IdSet()
        self._stopped = False
        self.checked = 0
        self.broken = 0
        self.damaged = 0
        self.leftovers = 0
        self.finished = False

    def begin(self) -> None:
        """Queue the first page."""
        self._page(b"")

    def see(self, id_: int) -> None:
        """A record moves to another key, perhaps from ahead of the scan to behind it; called by the writer."""
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

        def done(error: BrokerError | None) -> None:
            if error is not None:
                log.error("recovery stopped", error=str(error))
            elif rows and not self._stopped:
                self._page(rows[-1][0])
            elif not self._stopped:
                self._writer.submit_work(self._sweep)

        self._writer.errand(Errand(run, done))

    def _look(self, txn: Transaction, key: bytes, record: Record) -> None:
        self._seen.add(record.id)
        if record.id >= self._boundary:
            return
        self.checked += 1
        namespace = key[: key.index(b"\0")].decode()
        try:
            info = record.decoded()
            snapshot = snapshot_of(self._snapshots, txn, namespace, info, record)
            whole = self._backend.whole(snapshot)
        except (BrokerError, OSError, msgspec.MsgspecError) as error:
            log.warning("a snapshot cannot be looked at", namespace=namespace, id=record.id, error=str(error))
            whole = False
        if whole == record.broken:
            if not whole:
                self.broken += 1
                log.error("a snapshot is broken: its files are missing", namespace=namespace, id=record.id)
            self._snapshots.put(txn, key, record._replace(flags=0 if whole else BROKEN))

    def _sweep(self) -> None:
        """Discard what has no record; in a worker."""
        try:
            self._trash.recover(list(self._backend.discarded()))
            # Whose files a damaged record speaks of is unknown: nothing may be taken for a left-over.
            for id_ in () if self.damaged else self._backend.ids():
                if self._stopped:
                    return
                if id_ < self._boundary and id_ not in self._seen:
                    self.leftovers += 1
                    self._trash.discard(id_, None)
        except (OSError, BrokerError) as error:
            log.error("left-overs cannot be looked for", error=str(error))
        self.finished = True
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
