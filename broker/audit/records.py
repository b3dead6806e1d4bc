"""One record held against everything it depends on: its value, its parent, the indexes, its files, the journal."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from backends.api import Inspector, Snapshot
from broker.audit.found import Found, Mend
from broker.audit.journal import MAKING, decode_event
from broker.audit.kinds import finding
from broker.store import Inspection
from broker.store.records import BROKEN, HEADER_BYTES, Record, decode_record, index_key, info_of, parents_of
from snapbroker.contract import SNAPSHOT_REF_LABEL, Info, Kind, check_name
from snapbroker.errors import BrokerError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lmdb import Transaction

    from broker.store import IdSet
    from broker.store.journal import Turn

CHAIN_MAX: Final = 1024
"""Most layers that are followed: a chain that leads back to itself ends here."""
_decode_info = msgspec.msgpack.Decoder(Info).decode

Rescue = Callable[[bytes], bytes | None]
"""The value that a record had by the ledger; None where it has none."""


@dataclass(slots=True)
class Row:
    """What was read of one record: the record where it is whole, and its chain as far as it is needed."""

    key: bytes
    record: Record | None
    info: Info | None
    snapshot: Snapshot | None
    found: list[Found]


class Examiner:
    """Looks at records; `known` remembers the committed snapshots whose files were seen, where it is given."""

    def __init__(self, inspection: Inspection, inspector: Inspector, rescue: Rescue) -> None:
        self._inspection = inspection
        self._inspector = inspector
        self._rescue = rescue

    def read(self, txn: Transaction, key: bytes, value: bytes, known: IdSet | None) -> Row:
        """Everything about a record that the database tells."""
        row = Row(key, None, None, None, [])
        try:
            record = decode_record(value)
            info = record.decoded()
            namespace, name = _place(key), info.name
            if index_key(namespace, name) != key:
                raise ValueError("it is that of another name")
            if info.kind is not record.kind or bool(info.parent) != bool(record.parent_id):
                raise ValueError("its parts say different things")
        except (ValueError, struct.error, msgspec.MsgspecError, UnicodeError) as error:
            row.found.append(self._damaged(key, value, error))
            return row
        row.record, row.info = record, info
        about = {"namespace": namespace, "key": name, "id": record.id, "time": info.updated}
        chain = self._chain(txn, row, record, info, about, known)
        if chain is not None:
            row.snapshot = Snapshot(record.id, info.kind, chain, info.labels)
        self._indexes(txn, row, record, info, about)
        self._fence(txn, row, record, info, about)
        return row

    def look(self, row: Row, known: IdSet | None) -> None:
        """What the disk tells of a record; needs no transaction."""
        record, info = row.record, row.info
        if record is None or info is None:
            return
        about = {"namespace": _place(row.key), "key": info.name, "id": record.id, "time": info.updated}
        path = self._inspector.path(record.id)
        if row.snapshot is None:
            if record.broken:
                row.found.append(Found(finding("broken", f"{info.name!r} is marked broken", path=path, **about)))
            return
        try:
            flaw = self._inspector.flaw(row.snapshot)
        except OSError as error:
            message = f"the files of {info.name!r} cannot be looked at: {error.strerror}"
            row.found.append(Found(finding("unreadable", message, path=str(error.filename or path), **about)))
            return
        if flaw and record.broken:
            message = f"{info.name!r} is marked broken: {flaw}"
            row.found.append(Found(finding("broken", message, path=path, **about)))
        elif flaw:
            message = f"the files of {info.name!r} are not there: {flaw}"
            row.found.append(Found(finding("missing-files", message, path=path, **about), self._mark(row, BROKEN)))
        elif record.broken:
            message = f"{info.name!r} is marked broken, and its files are there"
            row.found.append(Found(finding("whole-again", message, path=path, **about), self._mark(row, 0)))
        elif known is not None and info.kind is Kind.COMMITTED:
            known.add(record.id)

    # The parts.

    def _damaged(self, key: bytes, value: bytes, error: Exception) -> Found:
        name = name_in(key, value)
        about: dict[str, object] = {
            "namespace": _place(key),
            "key": name or key.partition(b"\0")[2].decode("utf-8", "replace"),
        }
        if len(value) >= HEADER_BYTES:
            about["id"] = min(parents_of(value)[0], 2**63 - 1)
        rescued = self._rescued(key, value)
        comes = "; the ledger has it" if rescued else ""
        said = finding("damaged-record", f"the record cannot be read: {error}{comes}", **about)
        return Found(said, self._replace(key, value, rescued, name))

    def _rescued(self, key: bytes, value: bytes) -> bytes | None:
        """What the ledger has of the record, where it is of the same id: the ledger may be a moment behind."""
        if len(value) < HEADER_BYTES:
            return None
        try:
            rescued = self._rescue(key)
            if rescued is None or parents_of(rescued)[0] != parents_of(value)[0]:
                return None
            decode_record(rescued)
        except (OSError, ValueError, struct.error, msgspec.MsgspecError):
            return None
        return rescued

    def _replace(self, key: bytes, value: bytes, rescued: bytes | None, name: str) -> Mend:
        def work(txn: Transaction, turn: Turn, now: int) -> bool:
            if self._inspection.value(txn, key) != value:
                return False
            namespace = _place(key)
            if rescued is not None:
                self._inspection.write_value(txn, key, rescued)
                turn.append(txn, now, namespace, "update", name_in(key, rescued), info_of(rescued))
                return True
            self._inspection.write_value(txn, key, None)
            known = name or self._name_in_journal(txn, key)
            if known:
                turn.append(txn, now, namespace, "remove", known)
            return True

        return lambda access: access.transact(work)

    def _name_in_journal(self, txn: Transaction, key: bytes) -> str:
        """The whole of a long name, of which the key has the beginning only."""
        namespace, below = _place(key), 2**63
        while bodies := self._inspection.events_before(txn, below, 512):
            for sequence, body in bodies:
                below = sequence
                event = decode_event(body)
                for name in () if event is None or event.namespace != namespace else event.names:
                    if index_key(namespace, name) == key:
                        return name
        return ""

    def _chain(
        self,
        txn: Transaction,
        row: Row,
        record: Record,
        info: Info,
        about: Mapping[str, object],
        known: IdSet | None,
    ) -> tuple[int, ...] | None:
        """The ids of the parents that have to be looked at; None where the chain is broken, which is noted."""
        namespace = _place(row.key)
        parent, wanted, chain, depth = info.parent, record.parent_id, list[int](), 0
        while parent or wanted:
            above = self._parent(txn, namespace, parent)
            if above is None or len(chain) > CHAIN_MAX:
                why = "leads back to itself" if above else f"ends at {parent!r}, which does not exist"
                self._note_parent(row, "missing-parent", f"the chain of {info.name!r} {why}", about)
                return None
            if above.kind is not Kind.COMMITTED:
                message = f"the parent {parent!r} of {info.name!r} is {above.kind}, not committed"
                self._note_parent(row, "parent-not-committed", message, about)
                return None
            if above.id != wanted:
                message = f"the parent {parent!r} of {info.name!r} has id {above.id}, the record says {wanted}"
                self._note_parent(row, "wrong-parent", message, about)
                return None
            chain.append(above.id)
            if not depth:
                depth = above.depth + 1
            if not self._inspector.deep or (known is not None and above.id in known):
                break
            parent, wanted = above.decoded().parent, above.parent_id
        if record.depth != depth:
            message = f"the record of {info.name!r} says {record.depth} layers below it, there are {depth}"
            row.found.append(Found(finding("wrong-depth", message, **about), self._recount(row)))
        return tuple(chain)

    def _parent(self, txn: Transaction, namespace: str, name: str) -> Record | None:
        value = self._inspection.value(txn, index_key(namespace, name)) if name else None
        try:
            return decode_record(value) if value is not None else None
        except (ValueError, struct.error):
            return None

    def _note_parent(self, row: Row, kind: str, message: str, about: Mapping[str, object]) -> None:
        # Once it is marked, it is known: what remains to be done is the `broken` that is told of it.
        if row.record is not None and not row.record.broken:
            row.found.append(Found(finding(kind, message, **about), self._mark(row, BROKEN)))

    def _indexes(self, txn: Transaction, row: Row, record: Record, info: Info, about: Mapping[str, object]) -> None:
        if record.parent_id and not self._inspection.has_child(txn, record.parent_id, record.id):
            message = f"the index of children does not have {info.name!r} below {info.parent!r}"
            row.found.append(Found(finding("missing-child", message, **about), self._add_child(row)))
        reference = info.labels.get(SNAPSHOT_REF_LABEL) if info.kind is Kind.COMMITTED else None
        if reference:
            key = self._inspection.reference_key(_place(row.key), reference, record.id)
            if self._inspection.referred_by(txn, key) != info.name:
                message = f"the index of references does not have {info.name!r} under {reference[:80]!r}"
                row.found.append(Found(finding("missing-reference", message, **about), self._add_reference(row, key)))

    def _fence(self, txn: Transaction, row: Row, record: Record, info: Info, about: Mapping[str, object]) -> None:
        namespace = _place(row.key)
        body = self._inspection.event(txn, record.fence) if record.fence else None
        if body is None:
            oldest, newest = bounds(self._inspection, txn)
            # Within the bounds it is a hole, which is told of the journal.
            if record.fence <= newest and (record.fence or oldest > 1 or not newest):
                return
            what = f"is above the newest event, {newest}" if record.fence else "is 0"
        else:
            event = decode_event(body)
            if event is None or (event.verb in MAKING and event.namespace == namespace and event.subject == info.name):
                return
            what = f"is of another event, {event.verb} of {event.subject!r}"
        message = f"the fence {record.fence} of {info.name!r} {what}"
        row.found.append(Found(finding("wrong-fence", message, sequence=record.fence, **about), self._refence(row)))

    # How it is mended. Each looks first whether the record is still the one that was found.

    def _change(self, row: Row, change: Callable[[Transaction, Turn, int, Record], Record | None]) -> Mend:
        id_ = row.record.id if row.record is not None else 0

        def work(txn: Transaction, turn: Turn, now: int) -> bool:
            value = self._inspection.value(txn, row.key)
            if value is None:
                return False
            record = decode_record(value)
            if record.id != id_:
                return False
            changed = change(txn, turn, now, record)
            if changed is not None and changed != record:
                self._inspection.write_value(txn, row.key, changed.encode())
            return True

        return lambda access: access.transact(work)

    def _mark(self, row: Row, flags: int) -> Mend:
        return self._change(row, lambda _txn, _turn, _now, record: record._replace(flags=flags))

    def _recount(self, row: Row) -> Mend:
        def change(txn: Transaction, _turn: Turn, _now: int, record: Record) -> Record:
            depth, parent = 0, record.decoded().parent
            while parent and depth <= CHAIN_MAX:
                above = self._parent(txn, _place(row.key), parent)
                if above is None:
                    break
                depth, parent = depth + 1, above.decoded().parent
            return record._replace(depth=depth)

        return self._change(row, change)

    def _add_child(self, row: Row) -> Mend:
        def change(txn: Transaction, _turn: Turn, _now: int, record: Record) -> None:
            if record.parent_id:
                self._inspection.set_child(txn, record.parent_id, record.id, there=True)

        return self._change(row, change)

    def _add_reference(self, row: Row, key: bytes) -> Mend:
        def change(txn: Transaction, _turn: Turn, _now: int, record: Record) -> None:
            self._inspection.set_reference(txn, key, record.decoded().name)

        return self._change(row, change)

    def _refence(self, row: Row) -> Mend:
        def change(txn: Transaction, turn: Turn, now: int, record: Record) -> Record:
            fence = turn.next
            turn.append(txn, now, _place(row.key), "update", record.decoded().name, record.info)
            return record._replace(fence=fence)

        return self._change(row, change)


def _place(key: bytes) -> str:
    """The namespace in an index key."""
    return key.partition(b"\0")[0].decode("utf-8", "replace")


def name_in(key: bytes, value: bytes) -> str:
    """The name of a record that may be damaged, where its key or what can be read of it tells; empty where not."""
    plain = key.partition(b"\0")[2]
    for text in (_info_name(value), plain.decode("utf-8", "replace")):
        try:
            check_name(text)
            if index_key(_place(key), text) == key:
                return text
        except (BrokerError, UnicodeError):
            continue
    return ""


def _info_name(value: bytes) -> str:
    try:
        return _decode_info(value[HEADER_BYTES:]).name
    except (msgspec.MsgspecError, UnicodeError):
        return ""


def bounds(inspection: Inspection, txn: Transaction) -> tuple[int, int]:
    """Oldest and newest sequence of the journal; (1, 0) where it is empty."""
    newest = inspection.events_before(txn, 2**63, 1)
    oldest = inspection.events(txn, 0, 1)
    return (oldest[0][0], newest[0][0]) if newest and oldest else (1, 0)
