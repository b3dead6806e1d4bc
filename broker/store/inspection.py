"""The store as an audit reads it: page by page, damaged values and index entries as they are."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

from broker.store.records import HEADER_BYTES, parents_of
from broker.store.snapshots import reference_key

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lmdb import Transaction

    from broker.store.environment import Environment

_PAIR: Final = struct.Struct(">QQ")
_U64: Final = struct.Struct(">Q")
_KEPT: Final = b"kept"

Row = tuple[bytes, bytes]


class Inspection:
    """Reads of every database of an environment, and the writes that only a repair makes."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def rows(self, txn: Transaction, after: bytes, count: int) -> list[Row]:
        """Up to `count` stored records behind an index key."""
        return _page(txn, self._environment.snapshots, after, count)

    def value(self, txn: Transaction, key: bytes) -> bytes | None:
        """The stored record at an index key."""
        value = txn.get(key, db=self._environment.snapshots)
        return None if value is None else bytes(value)

    def write_value(self, txn: Transaction, key: bytes, value: bytes | None) -> None:
        """Put a stored record as it is; None deletes it. Indexes are left alone."""
        if value is None:
            txn.delete(key, db=self._environment.snapshots)
        else:
            txn.put(key, value, db=self._environment.snapshots)

    def heads(self, txn: Transaction, after: bytes, count: int) -> tuple[list[tuple[bytes, int, int]], bytes]:
        """Index key, id and parent's id of up to `count` records, and where to go on: empty at the end.

        What is too short to be a record is left out.
        """
        rows = self.rows(txn, after, count)
        heads = [(key, *parents_of(value)) for key, value in rows if len(value) >= HEADER_BYTES]
        return heads, rows[-1][0] if len(rows) == count else b""

    # Children.

    def children(self, txn: Transaction, after: bytes, count: int) -> tuple[list[tuple[int, int]], bytes]:
        """Parent's and child's id of up to `count` index entries, and where to go on: empty at the end."""
        rows = _page(txn, self._environment.children, after, count)
        pairs = [_PAIR.unpack(key) for key, _ in rows]
        return pairs, rows[-1][0] if len(rows) == count else b""

    def has_child(self, txn: Transaction, parent: int, child: int) -> bool:
        """Whether the index of children has the entry."""
        return txn.get(_PAIR.pack(parent, child), db=self._environment.children) is not None

    def set_child(self, txn: Transaction, parent: int, child: int, there: bool) -> None:
        """Put the entry in, or take it out."""
        if there:
            txn.put(_PAIR.pack(parent, child), b"", db=self._environment.children)
        else:
            txn.delete(_PAIR.pack(parent, child), db=self._environment.children)

    def children_of(self, txn: Transaction, parent: int) -> list[int]:
        """The ids of a snapshot's children by the index."""
        found: list[int] = []
        with txn.cursor(db=self._environment.children) as cursor:
            there = cursor.set_range(_PAIR.pack(parent, 0))
            while there:
                owner, child = _PAIR.unpack(cursor.key())
                if owner != parent:
                    break
                found.append(child)
                there = cursor.next()
        return found

    # References.

    def references(self, txn: Transaction, after: bytes, count: int) -> list[Row]:
        """Up to `count` entries of the index of references behind a key."""
        return _page(txn, self._environment.references, after, count)

    def reference_key(self, namespace: str, reference: str, id_: int) -> bytes:
        """Where the entry of a committed snapshot is."""
        return reference_key(namespace, reference) + _U64.pack(id_)

    def referred_by(self, txn: Transaction, key: bytes) -> str | None:
        """The name in an entry of the index of references."""
        value = txn.get(key, db=self._environment.references)
        return None if value is None else bytes(value).decode(errors="replace")

    def set_reference(self, txn: Transaction, key: bytes, name: str | None) -> None:
        """Put an entry in; None takes it out."""
        if name is None:
            txn.delete(key, db=self._environment.references)
        else:
            txn.put(key, name.encode(), db=self._environment.references)

    # The journal.

    def events(self, txn: Transaction, since: int, count: int) -> list[tuple[int, bytes]]:
        """Up to `count` encoded events above a sequence."""
        rows = _page(txn, self._environment.journal, _U64.pack(since), count)
        return [(int(_U64.unpack(key)[0]), value) for key, value in rows]

    def events_before(self, txn: Transaction, below: int, count: int) -> list[tuple[int, bytes]]:
        """Up to `count` encoded events below a sequence, the newest first."""
        found: list[tuple[int, bytes]] = []
        with txn.cursor(db=self._environment.journal) as cursor:
            there = cursor.prev() if cursor.set_range(_U64.pack(below)) else cursor.last()
            while there and len(found) < count:
                found.append((int(_U64.unpack(cursor.key())[0]), bytes(cursor.value())))
                there = cursor.prev()
        return found

    def event(self, txn: Transaction, sequence: int) -> bytes | None:
        """One encoded event."""
        value = txn.get(_U64.pack(sequence), db=self._environment.journal)
        return None if value is None else bytes(value)

    def newest_on(self, txn: Transaction, topic: str) -> int:
        """The newest sequence on a topic, by the index of topics."""
        value = txn.get(topic.encode(), db=self._environment.topics)
        return int(_U64.unpack(value)[0]) if value else 0

    def set_newest_on(self, txn: Transaction, topic: str, sequence: int) -> None:
        """Note the newest sequence on a topic."""
        txn.put(topic.encode(), _U64.pack(sequence), db=self._environment.topics)

    def cut(self, txn: Transaction, upto: int) -> None:
        """Drop the events up to a sequence."""
        with txn.cursor(db=self._environment.journal) as cursor:
            there = cursor.first()
            while there and int(_U64.unpack(cursor.key())[0]) <= upto:
                there = cursor.delete()

    def put_event(self, txn: Transaction, sequence: int, body: bytes) -> None:
        """Write an event, by a rebuild that begins a journal."""
        txn.put(_U64.pack(sequence), body, db=self._environment.journal)

    # Ids that are on disk, that no record has, and that are to stay.

    def kept(self, txn: Transaction) -> frozenset[int]:
        """The ids that nobody but a person may delete."""
        value = txn.get(_KEPT, db=self._environment.meta)
        return frozenset(number for (number,) in _U64.iter_unpack(bytes(value))) if value else frozenset()

    def keep(self, txn: Transaction, ids: Iterable[int]) -> None:
        """Add ids to those that are kept."""
        every = sorted(self.kept(txn).union(ids))
        if every:
            txn.put(_KEPT, b"".join(map(_U64.pack, every)), db=self._environment.meta)


def _page(txn: Transaction, database: Any, after: bytes, count: int) -> list[Row]:
    rows: list[Row] = []
    with txn.cursor(db=database) as cursor:
        found = cursor.set_range(after) if after else cursor.first()
        if found and after and cursor.key() == after:
            found = cursor.next()
        while found and len(rows) < count:
            rows.append((bytes(cursor.key()), bytes(cursor.value())))
            found = cursor.next()
    return rows
