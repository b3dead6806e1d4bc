"""The records of a snapshotter whose database is gone, put together from what is left: the ledger, a backup, the disk.

The disk has the last word: what is not there whole is not rebuilt, and what is there without anybody who knows it is
kept and told. The ledger knows the committed snapshots up to its last flush. A backup, which may be older, knows the
others, where their files are still there.

The journal begins anew far above every sequence that was ever given out, at the microseconds since the epoch: whoever
followed the old one is out of range and walks, and no fencing number comes twice.
"""

from __future__ import annotations

import os
import struct
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from backends.api import Inspector, Snapshot
from broker.store import Environment, Inspection, Snapshots, StoreLimits
from broker.store.journal import Entry
from broker.store.ledger import Change
from broker.store.records import Record, decode_record, index_key
from snapbroker.contract import EVENT_VERBS, Kind, topic
from snapbroker.errors import Internal
from snapbroker.protocol import encode

if TYPE_CHECKING:
    from lmdb import Transaction

BATCH: Final = 4096
"""Records written in one transaction."""


@dataclass(frozen=True, slots=True)
class Left:
    """Something that is not rebuilt: a record that nothing fits, or a directory that nobody knows."""

    what: str
    why: str
    id: int = 0


@dataclass(slots=True)
class Plan:
    """What is to be written."""

    records: dict[bytes, Record] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    unused: int = 0
    next_id: int = 1
    newest: int = 0

    @property
    def kinds(self) -> Counter[str]:
        """How many of each kind."""
        return Counter(record.kind.value for record in self.records.values())


def plan(inspector: Inspector, ledger: Iterable[Change], backup: Environment | None, *, stocked: bool) -> Plan:
    """Put together what is known, and hold it against the disk. `stocked`: empty directories may be made ahead."""
    made = Plan()
    known: dict[bytes, bytes] = dict(_rows(backup, made)) if backup is not None else {}
    told: dict[bytes, bytes | None] = dict(ledger)
    committed = {_id_of(value) for value in told.values() if value is not None} - {0}
    for key, value in list(known.items()):
        # It is another by now, or under another name.
        if key in told or _id_of(value) in committed:
            del known[key]
    known.update((key, value) for key, value in told.items() if value is not None)
    _choose(made, inspector, known)
    _look_at_disk(made, inspector, stocked=stocked)
    return made


def _rows(backup: Environment, made: Plan) -> Iterator[tuple[bytes, bytes]]:
    inspection = Inspection(backup)
    with backup.read() as txn:
        newest = inspection.events_before(txn, 2**63, 1)
        made.newest = newest[0][0] if newest else 0
        made.next_id = Snapshots(backup).next_id(txn)
    after = b""
    while True:
        with backup.read() as txn:
            rows = inspection.rows(txn, after, BATCH)
        if not rows:
            return
        after = rows[-1][0]
        yield from rows


def _id_of(value: bytes) -> int:
    try:
        return decode_record(value).id
    except (ValueError, struct.error):
        return 0


def _read(key: bytes, value: bytes) -> Record:
    """The record, where it is one of this key; ValueError, struct.error or Internal where not."""
    record = decode_record(value)
    name = record.decoded().name
    if index_key(key.partition(b"\0")[0].decode(), name) != key:
        raise ValueError(f"it is that of {name!r}")
    return record


def _choose(made: Plan, inspector: Inspector, known: dict[bytes, bytes]) -> None:
    """Take the records whose files and parents are there, parents first."""
    records: list[tuple[bytes, Record]] = []
    for key, value in known.items():
        try:
            records.append((key, _read(key, value)))
        except (ValueError, struct.error, Internal) as error:
            made.left.append(Left(_called(key), f"its record cannot be read: {error}"))
    chains: dict[int, tuple[int, ...]] = {}
    ids: set[int] = set()
    for key, record in sorted(records, key=lambda each: each[1].depth):
        why, chain = _fits(made, inspector, key, record, chains)
        if record.id in ids:
            why = why or f"another snapshot has its id, {record.id}"
        if why:
            made.left.append(Left(_called(key), why, record.id))
            continue
        ids.add(record.id)
        made.records[key] = record._replace(flags=0, depth=len(chain))
        if record.kind is Kind.COMMITTED:
            chains[record.id] = (record.id, *chain)
        made.next_id = max(made.next_id, record.id + 1)


def _fits(
    made: Plan, inspector: Inspector, key: bytes, record: Record, chains: dict[int, tuple[int, ...]]
) -> tuple[str, tuple[int, ...]]:
    """Why a record cannot be taken, empty where it can; and its chain."""
    info = record.decoded()
    chain: tuple[int, ...] = ()
    if info.parent:
        parent = made.records.get(index_key(key.partition(b"\0")[0].decode(), info.parent))
        if parent is None or parent.id != record.parent_id or parent.id not in chains:
            return f"its parent {info.parent!r} is not there", ()
        chain = chains[parent.id]
    try:
        return inspector.flaw(Snapshot(record.id, record.kind, chain, info.labels)), chain
    except OSError as error:
        return f"its files cannot be looked at: {error}", ()


def _look_at_disk(made: Plan, inspector: Inspector, *, stocked: bool) -> None:
    ids = {record.id for record in made.records.values()}
    for entry in inspector.entries():
        if not entry.id:
            made.left.append(Left(entry.place.path, "it is not named like a snapshot"))
        elif entry.id not in ids:
            if stocked and inspector.unused(entry.id):
                made.unused += 1
                continue
            made.kept.append(entry.id)
            made.left.append(Left(entry.place.path or str(entry.id), "nothing tells what it is", entry.id))
    made.next_id = max(made.next_id, inspector.highest() + 1)


def _called(key: bytes) -> str:
    namespace, _, name = key.partition(b"\0")
    return f"{namespace.decode('utf-8', 'replace')}/{name.decode('utf-8', 'replace')}"


def write(made: Plan, metadata: Path, snapshotter: str, limits: StoreLimits) -> None:
    """Write the database beside its place, and put it there when it is whole."""
    beside = metadata.with_name(f"{metadata.name}.rebuilding")
    for old in ("data.mdb", "lock.mdb"):
        (beside / old).unlink(missing_ok=True)
    environment = Environment(beside, limits)
    try:
        rows = list(made.records.items())
        for begin in range(0, len(rows), BATCH):
            part = rows[begin : begin + BATCH]
            environment.write(lambda txn, part=part: _write_records(environment, txn, part))  # type: ignore[misc]
        environment.write(lambda txn: _begin(environment, txn, made, snapshotter))
    finally:
        environment.close()
    metadata.mkdir(mode=0o700, parents=True, exist_ok=True)
    (metadata / "lock.mdb").unlink(missing_ok=True)
    (beside / "data.mdb").rename(metadata / "data.mdb")
    for directory in (metadata, metadata.parent):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    (beside / "lock.mdb").unlink(missing_ok=True)
    beside.rmdir()


def _write_records(environment: Environment, txn: Transaction, rows: Iterable[tuple[bytes, Record]]) -> None:
    snapshots = Snapshots(environment)
    for key, record in rows:
        snapshots.insert(txn, key, record)
        if record.kind is Kind.COMMITTED:
            snapshots.refer(txn, key.partition(b"\0")[0].decode(), record.decoded(), record.id)


def _begin(environment: Environment, txn: Transaction, made: Plan, snapshotter: str) -> None:
    """The ids that are taken, and a journal of one event that says nothing."""
    inspection = Inspection(environment)
    Snapshots(environment).reserve_ids(txn, made.next_id, 0)
    inspection.keep(txn, made.kept)
    now = time.time_ns()
    highest = max((record.fence for record in made.records.values()), default=0)
    sequence = max(now // 1000, made.newest + 1, highest + 1)
    namespaces = {key.partition(b"\0")[0].decode() for key in made.records} | {"default"}
    inspection.put_event(txn, sequence, encode(Entry(sequence, 0, now, snapshotter, "default", "cleanup")))
    # The next event on every topic names this one as the one before: who follows a topic sees the gap at once.
    for namespace in namespaces:
        for verb in EVENT_VERBS:
            inspection.set_newest_on(txn, topic(snapshotter, namespace, verb), sequence)
