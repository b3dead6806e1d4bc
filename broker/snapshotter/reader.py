"""The reading verbs, answered from a read transaction at once: never behind a writer's flush.

Used by the loop's thread alone. A stat is a lookup and a slice; mounts of a snapshot never change (C25), so their
encoded answers are kept by the stored value that they were made of, up to a limit in bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Final

import msgspec

from backends.api import Snapshot
from backends.cache import SizedCache
from broker.filters import compile_filters
from broker.snapshotter.lifecycle import refusal
from broker.snapshotter.verbs import check_fence, check_whole, snapshot_of, with_labels
from broker.store import Record, index_key
from broker.store.records import encode_info
from broker.store.snapshots import Row, decoded, row_info, row_name, row_record
from snapbroker.contract import Info, Kind, check_name
from snapbroker.errors import InvalidArgument, NotFound
from snapbroker.protocol import PAGE_MAX, Events, MountsAnswer, Walk, encode

if TYPE_CHECKING:
    from lmdb import Transaction

    from backends.api import Backend
    from broker.store import Environment, Journal, Snapshots

PAGE_BYTES_MAX: Final = 4 * 1024 * 1024
"""A page ends early when its infos or events reach this size, well below the longest body."""
SCAN_MAX: Final = 2000
"""Records or events looked at in one transaction; a page of a sparse filter may so be short, or empty."""
FILTER_S: Final = 0.005
"""A page ends early when its filters took this long: a costly expression does not hold up the other callers."""
MOUNTS_BYTES_MAX: Final = 4 * 1024 * 1024
"""Memory for the encoded answers to mounts."""


class Page(msgspec.Struct, omit_defaults=True):
    """A WalkPage whose infos are still encoded."""

    infos: list[msgspec.Raw]
    sequence: int = 0
    next: str = ""


class EventPage(msgspec.Struct, omit_defaults=True):
    """An EventsPage whose events are still encoded."""

    events: list[msgspec.Raw]
    next: int = 0
    newest: int = 0


class Reader:
    """Stat, mounts, usage of what was measured, and the pages of walk and events."""

    def __init__(self, environment: Environment, snapshots: Snapshots, journal: Journal, backend: Backend) -> None:
        self._environment = environment
        self._snapshots = snapshots
        self._journal = journal
        self._backend = backend
        self._labelled = bool(backend.labels(Snapshot(0, Kind.ACTIVE)))
        self._mounts: SizedCache[bytes, bytes] = SizedCache(
            MOUNTS_BYTES_MAX, lambda value, answer: len(value) + len(answer)
        )

    def _record(self, txn: Transaction, namespace: str, key: str) -> Record:
        check_name(key)
        record = self._snapshots.get(txn, index_key(namespace, key))
        if record is None:
            raise _missing(key)
        return record

    def transaction(self) -> AbstractContextManager[Transaction]:
        """A read transaction to answer the calls of one request from."""
        return self._environment.read()

    def stat(self, txn: Transaction, namespace: str, key: str) -> bytes:
        """The encoded Info (C55), with the backend's own labels where it has some (C115)."""
        if self._labelled:
            return self._labelled_info(txn, namespace, self._record(txn, namespace, key))
        check_name(key)
        info = self._snapshots.info(txn, index_key(namespace, key))
        if info is None:
            raise _missing(key)
        return info

    def _labelled_info(self, txn: Transaction, namespace: str, record: Record) -> bytes:
        info = record.decoded()
        extra = self._backend.labels(snapshot_of(self._snapshots, txn, namespace, info, record))
        return encode_info(with_labels(info, extra)) if extra else record.info

    def mounts(self, txn: Transaction, namespace: str, key: str, fence: int) -> bytes:
        """The encoded MountsAnswer (C24-C27)."""
        check_name(key)
        index = index_key(namespace, key)
        value = self._snapshots.value(txn, index)
        if value is None:
            raise _missing(key)
        known = self._mounts.get(value)
        if known is None or fence:
            record = decoded(index, value)
            check_fence(record, key, fence)
            error = refusal(record.kind, "mounts", key)
            if error is not None:
                raise error
            check_whole(record, key)
            if known is None:
                snapshot = snapshot_of(self._snapshots, txn, namespace, record.decoded(), record)
                known = encode(MountsAnswer(mounts=tuple(self._backend.mounts(snapshot)), fence=record.fence))
                self._mounts.put(value, known)
        return known

    def usage(self, txn: Transaction, namespace: str, key: str) -> bytes | Snapshot:
        """The encoded Usage of a view or a committed snapshot; of an active one, what is to be measured (C49, C50)."""
        record = self._record(txn, namespace, key)
        if record.kind is not Kind.ACTIVE:
            return encode(record.usage)
        check_whole(record, key)
        return snapshot_of(self._snapshots, txn, namespace, record.decoded(), record)

    # Streams.

    def walk(self, namespace: str, call: Walk) -> Callable[[str], tuple[bytes, str]]:
        """A function from a name to the encoded page behind it and the next name, '' at the end (C63-C68)."""
        matches = compile_filters(call.filters)
        size = _page_size(call.page)

        def page(after: str) -> tuple[bytes, str]:
            with self._environment.read() as txn:
                sequence = self._journal.newest_in(txn)
                rows, end = self._snapshots.page(txn, namespace, after, size if matches is None else SCAN_MAX)
                infos, full_at = self._select(txn, namespace, rows, matches, size)
            next_ = full_at or ("" if end else row_name(rows[-1]))
            return encode(Page(infos, sequence, next_)), next_

        return page

    def _select(
        self, txn: Transaction, namespace: str, rows: Sequence[Row], matches: Callable[[Info], bool] | None, size: int
    ) -> tuple[list[msgspec.Raw], str]:
        """The infos that match, and the name to continue behind when the page is full before the rows end."""
        infos: list[msgspec.Raw] = []
        room = PAGE_BYTES_MAX
        late = time.monotonic() + FILTER_S
        last = len(rows) - 1
        for number, row in enumerate(rows):
            if matches is not None and not matches(row_record(row).decoded()):
                if time.monotonic() > late and number < last:
                    return infos, row_name(row)
                continue
            info = self._labelled_info(txn, namespace, row_record(row)) if self._labelled else row_info(row)
            infos.append(msgspec.Raw(info))
            room -= len(info)
            if (len(infos) == size or room < 0) and number < last:
                return infos, row_name(row)
        return infos, ""

    def events(self, call: Events, topics: tuple[str, ...]) -> Callable[[int], tuple[bytes, int, int, bool]]:
        """A function from a sequence to the encoded page above it, its next and newest, and whether it has events."""
        size = _page_size(call.page)

        def page(since: int) -> tuple[bytes, int, int, bool]:
            with self._environment.read() as txn:
                oldest, newest = self._journal.bounds(txn)
                self._journal.check(since, oldest, newest)
                bodies, reached = self._journal.page(txn, since, topics, size, 4 * SCAN_MAX, PAGE_BYTES_MAX)
            return (
                encode(EventPage([msgspec.Raw(body) for body in bodies], reached, newest)),
                reached,
                newest,
                bool(bodies),
            )

        return page

    def newest(self) -> int:
        """The newest sequence."""
        with self._environment.read() as txn:
            return self._journal.newest_in(txn)

    def count(self) -> int:
        """How many snapshots there are, of all namespaces."""
        with self._environment.read() as txn:
            return self._snapshots.count(txn)


def _missing(key: str) -> NotFound:
    return NotFound(f"snapshot {key!r} does not exist")


def _page_size(page: int) -> int:
    if not 0 < page <= PAGE_MAX:
        raise InvalidArgument(f"a page has 1 to {PAGE_MAX} entries, not {page}")
    return page
