"""Records, children and references of one actor, read and written inside a transaction that the caller holds."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, cast

from backends.cache import SizedCache
from backends.failpoints import reach
from broker.store.records import (
    DIGEST_BYTES,
    LONG_KEY_BYTES,
    PLAIN_BYTES_MAX,
    Record,
    decode_record,
    index_key,
    info_of,
)
from snapbroker.contract import SNAPSHOT_REF_LABEL, Info, Kind
from snapbroker.errors import Internal, NotFound

if TYPE_CHECKING:
    from lmdb import Cursor, Transaction

    from broker.store.environment import Environment

_PAIR: Final = struct.Struct(">QQ")
_U64: Final = struct.Struct(">Q")
_NEXT_ID: Final = b"next_id"
CHAINS_BYTES_MAX: Final = 4 << 20
"""Memory for the cache of chains, about 19,000 short ones."""


Change = tuple[bytes, bytes | None]
"""An index key and the record that it has from now on; None where it has none."""
Row = tuple[bytes, bytes]
"""An index key and the record stored there."""


def row_record(row: Row) -> Record:
    """The record of a row; Internal names it when it is damaged."""
    return decoded(*row)


def row_info(row: Row) -> bytes:
    """The encoded Info of a row, without decoding the rest; Internal names it when it is damaged."""
    try:
        return info_of(row[1])
    except (ValueError, struct.error) as error:
        raise _damaged(row[0], error) from error


def row_name(row: Row) -> str:
    """The name of a row, which only a long one has to be decoded for."""
    name = row[0].partition(b"\0")[2]
    return decoded(*row).decoded().name if len(name) > PLAIN_BYTES_MAX else name.decode()


class Snapshots:
    """The snapshots database with its two indexes: children by parent, and committed names by `snapshot.ref`."""

    def __init__(
        self, environment: Environment, *, writes: bool = False, note: Callable[[list[Change]], None] | None = None
    ) -> None:
        """With `writes`, chains learnt in a transaction are kept only once it is settled.

        `note` is told, then, what changed of committed snapshots.
        """
        self._note = note
        self._changes: list[Change] = []
        self._writes = writes
        self._db = environment.snapshots
        self._children = environment.children
        self._references = environment.references
        self._meta = environment.meta
        self._chains: SizedCache[int, tuple[int, ...]] = SizedCache(CHAINS_BYTES_MAX, lambda _, chain: 8 * len(chain))
        self._fresh: list[int] = []

    # One record.

    def get(self, txn: Transaction, key: bytes) -> Record | None:
        """The record at an index key."""
        value = txn.get(key, db=self._db)
        if value is None:
            return None
        return decoded(key, value)

    def value(self, txn: Transaction, key: bytes) -> bytes | None:
        """The stored value at an index key, as `get` decodes it; equal values are equal records."""
        value = txn.get(key, db=self._db)
        return None if value is None else bytes(value)

    def info(self, txn: Transaction, key: bytes) -> bytes | None:
        """The encoded Info at an index key."""
        value = self.value(txn, key)
        if value is None:
            return None
        try:
            return info_of(value)
        except (ValueError, struct.error) as error:
            raise _damaged(key, error) from error

    def put(self, txn: Transaction, key: bytes, record: Record) -> None:
        """Write a record over whatever is at the key; indexes are the caller's business."""
        value = record.encode()
        txn.put(key, value, db=self._db)
        if self._note is not None and record.kind is Kind.COMMITTED:
            self._changes.append((key, value))

    def insert(self, txn: Transaction, key: bytes, record: Record) -> None:
        """Write a record that was not there, and its place among its parent's children."""
        self.put(txn, key, record)
        if record.parent_id:
            reach("snapshots.inserted")
            txn.put(_PAIR.pack(record.parent_id, record.id), b"", db=self._children)

    def delete(self, txn: Transaction, key: bytes, record: Record) -> None:
        """Delete a record and its place among its parent's children."""
        txn.delete(key, db=self._db)
        if self._note is not None and record.kind is Kind.COMMITTED:
            self._changes.append((key, None))
        if record.parent_id:
            reach("snapshots.deleted")
            txn.delete(_PAIR.pack(record.parent_id, record.id), db=self._children)

    def has_children(self, txn: Transaction, id_: int) -> bool:
        """Whether any snapshot has `id_` as its immediate parent (D6)."""
        with txn.cursor(db=self._children) as cursor:
            return cursor.set_range(_PAIR.pack(id_, 0)) and cursor.key()[:8] == _U64.pack(id_)

    # Chains.

    def chain(self, txn: Transaction, namespace: str, parent: str, record: Record) -> tuple[int, ...]:
        """The ids from the committed snapshot `parent`, whose record is given, up to its root (C10)."""
        known = self._chains.get(record.id)
        if known is not None:
            return known
        walked: dict[int, None] = {}
        above: tuple[int, ...] = ()
        while True:
            walked[record.id] = None
            if not record.parent_id:
                break
            parent = record.decoded().parent
            found = self.get(txn, index_key(namespace, parent))
            if found is None:
                raise NotFound(f"parent {parent!r} in the chain does not exist")
            if found.id in walked:
                raise Internal(f"the record of {parent!r} is damaged: it is its own ancestor")
            cached = self._chains.get(found.id)
            if cached is not None:
                above = cached
                break
            record = found
        chain = tuple(walked) + above
        self._chains.put(chain[0], chain)
        if self._writes:
            self._fresh.append(chain[0])
        return chain

    def settle(self) -> None:
        """The transaction is committed: what was learnt of chains in it holds."""
        self._fresh.clear()
        if self._note is not None and self._changes:
            self._note(self._changes)
            self._changes = []

    def mark(self) -> tuple[int, int]:
        """Where the transaction is, for `rewind`."""
        return len(self._fresh), len(self._changes)

    def rewind(self, to: tuple[int, int] = (0, 0)) -> None:
        """Forget the chains learnt, and the changes made, since `mark`: the transaction that knew them was dropped."""
        mark, changed = to
        del self._changes[changed:]
        for id_ in self._fresh[mark:]:
            self._chains.drop(id_)
        del self._fresh[mark:]

    # References: "do you have this?" (C93-C96).

    def refer(self, txn: Transaction, namespace: str, info: Info, id_: int) -> None:
        """Index a committed snapshot under its `snapshot.ref` label, if it has one."""
        reference = info.labels.get(SNAPSHOT_REF_LABEL)
        if reference:
            txn.put(reference_key(namespace, reference) + _U64.pack(id_), info.name.encode(), db=self._references)
            reach("snapshots.referred")

    def unrefer(self, txn: Transaction, namespace: str, info: Info, id_: int) -> None:
        """Take it out of the index."""
        reference = info.labels.get(SNAPSHOT_REF_LABEL)
        if reference:
            txn.delete(reference_key(namespace, reference) + _U64.pack(id_), db=self._references)

    def referred(self, txn: Transaction, namespace: str, reference: str) -> list[str]:
        """The names of the committed snapshots that carry the reference."""
        prefix = reference_key(namespace, reference)
        names: list[str] = []
        with txn.cursor(db=self._references) as cursor:
            found = cursor.set_range(prefix)
            while found and cursor.key()[: len(prefix)] == prefix:
                names.append(bytes(cursor.value()).decode())
                found = cursor.next()
        return names

    # Scans.

    def page(self, txn: Transaction, namespace: str, after: str, scan_max: int) -> tuple[list[Row], bool]:
        """Up to about `scan_max` stored records behind the name `after`, by name, and whether that was the end.

        A run of long names that share their first 400 bytes is taken whole, because only the full names tell its
        order (D3).
        """
        prefix = namespace.encode() + b"\0"
        start = index_key(namespace, after) if after else prefix
        long_key_bytes = len(prefix) + LONG_KEY_BYTES
        if len(start) == long_key_bytes:
            start = start[: len(prefix) + PLAIN_BYTES_MAX]
        rows: list[Row] = []
        with txn.cursor(db=self._db) as cursor:
            found = cursor.set_range(start)
            if found and after and cursor.key() == start:
                # The name itself; or, behind a long name, the plain name of its first 400 bytes, which is before it.
                found = cursor.next()
            while found and len(rows) < scan_max:
                found = False
                # Buffers are off: keys and values are bytes.
                for key, value in cast("Iterator[Row]", cursor.iternext()):
                    if not key.startswith(prefix):
                        return rows, True
                    if len(key) == long_key_bytes:
                        run, found = self._long_run(cursor, key[:-DIGEST_BYTES])
                        rows.extend(row for name, row in run if name > after)
                        break
                    rows.append((key, value))
                    if len(rows) == scan_max:
                        found = cursor.next()
                        break
        return rows, not found

    @staticmethod
    def _long_run(cursor: Cursor, stem: bytes) -> tuple[list[tuple[str, Row]], bool]:
        """The rows from the cursor on that share the stem, by name, and whether others follow."""
        run: list[tuple[str, Row]] = []
        found = True
        while found:
            row = bytes(cursor.key()), bytes(cursor.value())
            if len(row[0]) != len(stem) + DIGEST_BYTES or not row[0].startswith(stem):
                break
            run.append((decoded(*row).decoded().name, row))
            found = cursor.next()
        run.sort(key=lambda item: item[0].encode())
        return run, found

    def scan(self, txn: Transaction, after: bytes, count: int) -> Iterator[tuple[bytes, Record | None]]:
        """Up to `count` records of all namespaces behind the index key `after`, in the index's order.

        None stands for a record that is damaged.
        """
        with txn.cursor(db=self._db) as cursor:
            found = cursor.set_range(after) if after else cursor.first()
            if found and after and cursor.key() == after:
                found = cursor.next()
            while found and count:
                key, value = bytes(cursor.key()), cursor.value()
                try:
                    yield key, decode_record(value)
                except (ValueError, struct.error):
                    yield key, None
                count -= 1
                found = cursor.next()

    def count(self, txn: Transaction) -> int:
        """How many snapshots there are."""
        return int(txn.stat(db=self._db)["entries"])

    # Ids.

    def next_id(self, txn: Transaction) -> int:
        """The first id that no transaction has reserved; ids below were perhaps used (D4)."""
        value = txn.get(_NEXT_ID, db=self._meta)
        return int(_U64.unpack(value)[0]) if value else 1

    def reserve_ids(self, txn: Transaction, first: int, count: int) -> None:
        """Note that ids up to `first + count - 1` may be used from this commit on."""
        txn.put(_NEXT_ID, _U64.pack(first + count), db=self._meta)


def decoded(key: bytes, value: bytes | memoryview) -> Record:
    """The record in the value stored at `key`; Internal where it is damaged."""
    try:
        return decode_record(value)
    except (ValueError, struct.error) as error:
        raise _damaged(key, error) from error


def _damaged(key: bytes, error: Exception) -> Internal:
    name = key.partition(b"\0")[2].decode(errors="replace")
    return Internal(f"the record of {name!r} is damaged: {error}")


def reference_key(namespace: str, reference: str) -> bytes:
    """What the index's entries of a reference begin with; an id follows."""
    return namespace.encode() + b"\0" + hashlib.blake2b(reference.encode(), digest_size=_DIGEST).digest()


_DIGEST: Final = 32
