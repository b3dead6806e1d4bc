"""One audit from beginning to end, as a generator of small steps: nothing is held, and nobody waits, in between.

A finding is made in two looks. The first is quick and may be wrong, for the store changes while it is read: a page
of records in a read transaction, a listing of the directory, a table of mounts. What looks wrong is looked at once
more in a write transaction, behind everything that was decided before, without what is in the hands of a call or of the
pool; only what is wrong then is told. Calls may be decided in the same transaction before it: their records are there,
their disk steps and the last writes of the turn come after it.

Whether any record has an id cannot be looked up. So ids that seem to have none are first freed of what is under way,
then held against all records in a second scan, during which commits, that move a record from one key to another,
tell the ids they touch.
"""

from __future__ import annotations

import itertools
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from backends.api import Entry, Place, Task, TooMany
from broker.audit import mounts
from broker.audit.access import Access, Flight, changed_at
from broker.audit.found import Found
from broker.audit.journal import JournalCheck
from broker.audit.kinds import finding
from broker.audit.records import Examiner, Rescue
from broker.store import IdSet, Inspection
from broker.store.ledger import NAME as LEDGER
from broker.store.records import index_key, parents_of
from broker.store.snapshots import reference_key
from snapbroker.contract import SNAPSHOT_REF_LABEL, Kind, Usage
from snapbroker.errors import BrokerError, Cancelled, InvalidArgument, Unavailable

if TYPE_CHECKING:
    from lmdb import Transaction

    from broker.store.journal import Turn
    from snapbroker.protocol import Finding

ROWS: Final = 64
"""Records or index entries looked at in one transaction: about half a millisecond, for which other readers wait."""
EVENTS: Final = 128
"""Events looked at in one transaction: about as long."""
ENTRIES: Final = 512
"""Directories looked at in one step."""
SECOND_LOOKS: Final = 64
"""Suspects looked at in one write transaction: about a millisecond of everybody's time."""
HEADS: Final = 1024
"""Records whose ids are read in one transaction."""
MEASURED_ENTRIES_MAX: Final = 1_000_000
"""Files that one audit counts to say how large things are; then sizes are those of what was counted."""
TRASH_OLD_S: Final = 3600.0
"""What is in the trash for longer than this is not on its way out, but stuck."""

STAGES: Final = ("places", "records", "directories", "references", "trash", "journal")
_OF_DIRECTORIES: Final = frozenset(("leftover", "id-above", "unknown-directory"))
Step = list[Found]


class _Budget(Task):
    """A task that ends when it has counted so many entries in all that it was used for."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def advance(self, entries: int = 1, size: int = 0) -> None:
        super().advance(entries, size)
        self.left -= entries
        if self.left < 0:
            raise TooMany


@dataclass(slots=True)
class _Suspects:
    """What seems to have no record: directories, index entries by child, mounts, and ids met twice."""

    entries: dict[int, Entry] = field(default_factory=dict)
    children: dict[int, set[int]] = field(default_factory=dict)
    uses: dict[int, list[mounts.Use]] = field(default_factory=dict)
    twice: set[int] = field(default_factory=set)
    heads: dict[int, list[tuple[bytes, int]]] = field(default_factory=dict)
    """Id to index key and parent's id, of the records that have one of these ids after all."""

    def ids(self) -> set[int]:
        return {*self.entries, *self.children, *self.uses, *self.twice}


class Auditor:
    """One audit of one store. `task` counts what was looked at, and ends the audit when it is cancelled."""

    def __init__(
        self, access: Access, task: Task, rescue: Rescue = lambda _key: None, *, execute: bool = False
    ) -> None:
        """With `execute`, what can be mended is mended as it is found. `rescue`: see `Rescue`."""
        self._access = access
        self._environment = access.environment
        self._inspection = Inspection(access.environment)
        self._inspector = access.inspector
        self._examiner = Examiner(self._inspection, access.inspector, rescue)
        self._execute = execute
        self._task = task
        self._budget = _Budget(MEASURED_ENTRIES_MAX)
        self._seen = IdSet()
        self._parented = IdSet()
        self._suspects = _Suspects()
        self._damaged = 0
        self._stocked = 0
        self._places_missing = False

    def told(self, after: str = "") -> Iterator[tuple[str, Finding] | None]:
        """Findings, each with the `after` that continues behind it, and None between two steps.

        A finding is mended just before it is told. What is mended is not there any more when somebody continues, so it
        is not counted.
        """
        begin, skip = _position(after)
        for number, stage in enumerate(STAGES):
            # Directories are held against the records: their ids have to be known.
            silent = number < begin
            if silent and (stage != "records" or begin > STAGES.index("directories")):
                continue
            count = 0
            for step in self._stage(stage):
                self._task.advance(0)
                yield None
                for found in step:
                    if silent or (number == begin and count < skip):
                        count += 1
                        continue
                    count += not self._mend(found)
                    yield f"{stage}/{count}", found.finding

    def _stage(self, stage: str) -> Iterator[Step]:
        stages: dict[str, Callable[[], Iterator[Step]]] = {
            "places": self._look_at_places,
            "records": self._look_at_records,
            "directories": self._look_at_directories,
            "references": self._look_at_references,
            "trash": self._look_at_trash,
            "journal": self._look_at_journal,
        }
        return stages[stage]()

    def _mend(self, found: Found) -> bool:
        if not self._execute or found.mend is None:
            return False
        try:
            done = found.mend(self._access)
        except (Unavailable, Cancelled):
            raise
        except (BrokerError, OSError, ValueError) as error:
            found.finding = msgspec.structs.replace(found.finding, failure=str(error) or repr(error))
            return False
        why = "" if done else "it changed meanwhile: audit again"
        found.finding = msgspec.structs.replace(found.finding, mended=done, failure=why)
        return done

    # Modes and owners.

    def _look_at_places(self) -> Iterator[Step]:
        metadata = str(self._access.metadata)
        own = [
            Place(metadata, 0o700),
            *(Place(f"{metadata}/{name}", 0o600) for name in ("data.mdb", "lock.mdb")),
            *(Place(f"{self._access.root}/{name}", 0o600) for name in ("lock", LEDGER)),
        ]
        found: Step = []
        for place in own:
            found += self._check_mode(place)
        for place in self._inspector.places():
            self._task.advance()
            try:
                os.stat(place.path, follow_symlinks=False)
            except FileNotFoundError:
                self._places_missing = True
                found.append(Found(finding("missing-place", f"{place.path} is not there", path=place.path)))
                continue
            found += self._check_mode(place)
        yield found

    def _check_mode(self, place: Place) -> Step:
        if place.mode is None:
            return []
        try:
            status = os.stat(place.path, follow_symlinks=False)
        except OSError:
            return []
        mode, owner = stat.S_IMODE(status.st_mode), os.geteuid()
        if stat.S_ISLNK(status.st_mode) or (mode == place.mode and status.st_uid == owner):
            return []
        message = f"{place.path} has mode {mode:04o} and owner {status.st_uid}, not {place.mode:04o} and {owner}"
        said = finding("mode", message, path=place.path, time=status.st_ctime_ns)

        def mend(_access: Access) -> bool:
            fd = os.open(place.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fchown(fd, owner, -1)
                os.fchmod(fd, place.mode or 0)
            finally:
                os.close(fd)
            return True

        return [Found(said, mend)]

    # Records.

    def _look_at_records(self) -> Iterator[Step]:
        known = IdSet()
        after = b""
        while True:
            with self._environment.read() as txn:
                rows = [self._examiner.read(txn, *row, known) for row in self._inspection.rows(txn, after, ROWS)]
            if not rows:
                return
            after = rows[-1].key
            suspects: list[bytes] = []
            for row in rows:
                self._task.advance()
                self._examiner.look(row, known)
                if row.record is not None:
                    self._note_id(row.record.id, row.record.parent_id)
                if row.found:
                    suspects.append(row.key)
            yield []
            for begin in range(0, len(suspects), SECOND_LOOKS):
                yield self._look_again(suspects[begin : begin + SECOND_LOOKS])

    def _note_id(self, id_: int, parent_id: int) -> None:
        if id_ in self._seen:
            self._suspects.twice.add(id_)
        self._seen.add(id_)
        if parent_id:
            self._parented.add(id_)

    def _look_again(self, keys: list[bytes]) -> Step:
        def work(txn: Transaction, _turn: Turn, _now: int) -> Step:
            flight = self._access.flight()
            found: Step = []
            for key in keys:
                value = self._inspection.value(txn, key)
                if value is None or flight.holds(key):
                    continue
                row = self._examiner.read(txn, key, value, None)
                self._examiner.look(row, None)
                found += row.found
            return found

        found = self._access.transact(work)
        self._damaged += sum(each.finding.kind == "damaged-record" for each in found)
        if self._execute:
            # A record that is put back has its directory.
            return [self._with_return(each) for each in found]
        return found

    def _with_return(self, found: Found) -> Found:
        if found.finding.kind != "damaged-record" or found.mend is None:
            return found
        mend, said = found.mend, found.finding

        def mend_and_note(access: Access) -> bool:
            done = mend(access)
            with self._environment.read() as txn:
                value = self._inspection.value(txn, index_key(said.namespace, said.key)) if said.key else None
            if value is not None:
                self._note_id(*parents_of(value))
            return done

        return Found(said, mend_and_note)

    # What should have a record: directories, index entries, mounts.

    def _look_at_directories(self) -> Iterator[Step]:
        yield from self._list_entries()
        yield from self._list_children()
        yield self._list_mounts()
        if not self._suspects.ids():
            return
        suspects = self._suspects
        with self._access.watch() as touched:
            flight, kept, next_id = self._access.transact(self._state)
            _drop(suspects.entries, flight.ids)
            after = b""
            wanted = suspects.ids()
            while True:
                with self._environment.read() as txn:
                    heads, after = self._inspection.heads(txn, after, HEADS)
                for key, id_, parent_id in heads:
                    if id_ in wanted:
                        suspects.heads.setdefault(id_, []).append((key, parent_id))
                yield []
                if not after:
                    break
            for ids in _chunks(sorted(wanted), SECOND_LOOKS):
                yield self._judge(ids, touched, kept, next_id)
        if self._stocked:
            message = f"{self._stocked} directories that were made ahead of time wait to be discarded"
            yield [Found(finding("stocked", message))]

    def _state(self, txn: Transaction, _turn: object = None, _now: int = 0) -> tuple[Flight, frozenset[int], int]:
        next_id = int.from_bytes(txn.get(b"next_id", db=self._environment.meta) or b"\0\0\0\0\0\0\0\1")
        return self._access.flight(), self._inspection.kept(txn), next_id

    def _list_entries(self) -> Iterator[Step]:
        entries = self._inspector.entries()
        while part := list(itertools.islice(entries, ENTRIES)):
            found: Step = []
            for entry in part:
                self._task.advance()
                if not entry.id:
                    path = entry.place.path
                    said = finding("stranger", f"{path} is not named like a snapshot", path=path, time=changed_at(path))
                    found.append(Found(said))
                    continue
                found += self._check_mode(entry.place)
                if entry.id not in self._seen:
                    self._suspects.entries[entry.id] = entry
            yield found

    def _list_children(self) -> Iterator[Step]:
        met = IdSet()
        after = b""
        while True:
            with self._environment.read() as txn:
                pairs, after = self._inspection.children(txn, after, HEADS)
            for parent, child in pairs:
                self._task.advance()
                if child not in self._parented or child in met or parent not in self._seen:
                    self._suspects.children.setdefault(child, set()).add(parent)
                met.add(child)
            yield []
            if not after:
                break
        # Of two entries of one child the first was not suspicious.
        twice = set(self._suspects.children)
        after = b""
        while twice:
            with self._environment.read() as txn:
                pairs, after = self._inspection.children(txn, after, HEADS)
            for parent, child in pairs:
                if child in twice:
                    self._suspects.children[child].add(parent)
            yield []
            if not after:
                break

    def _list_mounts(self) -> Step:
        for use in mounts.uses(str(self._access.root), self._inspector):
            self._task.advance()
            if use.id not in self._seen:
                self._suspects.uses.setdefault(use.id, []).append(use)
        return []

    def _judge(self, ids: list[int], touched: IdSet, kept: frozenset[int], next_id: int) -> Step:
        """Look at suspects again, in one write transaction."""

        def work(txn: Transaction, _turn: Turn, _now: int) -> Step:
            flight = self._access.flight()
            found: Step = []
            for id_ in ids:
                if id_ in touched:
                    continue
                heads = self._heads_now(txn, id_)
                if id_ in self._suspects.twice:
                    found += self._shared(id_, heads)
                found += self._strays(txn, id_, heads)
                if heads or id_ in flight.ids:
                    continue
                found += self._unheld(id_)
                entry = self._suspects.entries.get(id_)
                if entry is not None:
                    found += self._unrecorded(entry, flight, kept, next_id)
            return found

        return [self._measured(each) for each in self._access.transact(work) if _is_there(each)]

    def _heads_now(self, txn: Transaction, id_: int) -> list[tuple[bytes, int]]:
        """Those of the records found with the id that have it still."""
        heads: list[tuple[bytes, int]] = []
        for key, _ in self._suspects.heads.get(id_, ()):
            value = self._inspection.value(txn, key)
            if value is not None and parents_of(value)[0] == id_:
                heads.append((key, parents_of(value)[1]))
        return heads

    def _shared(self, id_: int, heads: list[tuple[bytes, int]]) -> Step:
        if len(heads) < 2:
            return []
        names = " and ".join(repr(key.partition(b"\0")[2].decode("utf-8", "replace")) for key, _ in heads)
        return [Found(finding("shared-id", f"{names} have the same id", id=id_, path=self._inspector.path(id_)))]

    def _strays(self, txn: Transaction, id_: int, heads: list[tuple[bytes, int]]) -> Step:
        parents = {parent for _, parent in heads}
        found: Step = []
        for parent in self._suspects.children.get(id_, ()):
            if parent in parents or not self._inspection.has_child(txn, parent, id_):
                continue

            def take_out(txn: Transaction, _turn: Turn, _now: int, parent: int = parent) -> bool:
                self._inspection.set_child(txn, parent, id_, there=False)
                return True

            message = f"the index of children has id {id_} below {parent}, no record does"
            said = finding("stray-child", message, id=id_)
            found.append(Found(said, lambda access, work=take_out: access.transact(work)))  # type: ignore[misc]
        return found

    def _unheld(self, id_: int) -> Step:
        found: Step = []
        for use in self._suspects.uses.get(id_, ()):
            who = f", in the mount namespace of {use.mount.process} ({use.mount.pid})"
            message = f"{use.mount.point} is mounted from {use.path}, which no record has{who}"
            found.append(Found(finding("mount", message, id=id_, path=use.mount.point)))
        return found

    def _unrecorded(self, entry: Entry, flight: Flight, kept: frozenset[int], next_id: int) -> Step:
        id_, path = entry.id, entry.place.path
        if path and not os.path.lexists(path):
            return []
        about = {"id": id_, "path": path, "time": changed_at(path) if path else 0}
        if id_ in kept:
            return [Found(finding("unknown-directory", f"{path} is kept although no record has it", **about))]
        if id_ >= next_id:
            return [
                Found(
                    finding("id-above", f"{path} has an id that was never given out, the next is {next_id}", **about),
                    lambda access: access.transact(lambda txn, _turn, _now: self._reserve(txn, id_)),
                )
            ]
        if flight.recovering:
            return []
        if self._access.stocked and self._inspector.unused(id_):
            self._stocked += 1
            return []
        perhaps = "; it may be that of a damaged record" if self._damaged else ""
        said = finding("leftover", f"no record has {path or id_}{perhaps}", **about)

        def discard(access: Access) -> bool:
            access.discard(id_)
            return True

        return [Found(said, discard)]

    def _reserve(self, txn: Transaction, id_: int) -> bool:
        _, _, next_id = self._state(txn)
        if id_ >= next_id:
            txn.put(b"next_id", (id_ + 1).to_bytes(8), db=self._environment.meta)
        self._inspection.keep(txn, [id_])
        return True

    def _measured(self, found: Found) -> Found:
        """With the size of what it is about, where that is a directory nobody has."""
        said = found.finding
        if said.kind in _OF_DIRECTORIES and said.path:
            usage = self._size(said.path)
            found.finding = msgspec.structs.replace(said, inodes=usage.inodes, size=usage.size)
        return found

    def _size(self, path: str) -> Usage:
        try:
            return self._inspector.size(path, self._budget)
        except (TooMany, OSError):
            return Usage()

    # References.

    def _look_at_references(self) -> Iterator[Step]:
        after = b""
        while True:
            with self._environment.read() as txn:
                rows = self._inspection.references(txn, after, ROWS)
                # The read sees records and index at the same moment.
                strays = [(key, name) for key, name in rows if not self._refers(txn, key, name)]
            self._task.advance(len(rows))
            yield [self._stray_reference(key, name) for key, name in strays]
            if len(rows) < ROWS:
                return
            after = rows[-1][0]

    def _refers(self, txn: Transaction, key: bytes, name: bytes) -> bool:
        namespace = key.partition(b"\0")[0].decode("utf-8", "replace")
        value = self._inspection.value(txn, index_key(namespace, name.decode("utf-8", "replace")))
        if value is None:
            return False
        row = self._examiner.read(txn, index_key(namespace, name.decode("utf-8", "replace")), value, IdSet())
        if row.record is None or row.info is None:
            return True  # Told of the record.
        reference = row.info.labels.get(SNAPSHOT_REF_LABEL)
        return (
            row.info.kind is Kind.COMMITTED
            and bool(reference)
            and reference_key(namespace, reference or "") + row.record.id.to_bytes(8) == key
        )

    def _stray_reference(self, key: bytes, name: bytes) -> Found:
        namespace, text = key.partition(b"\0")[0].decode("utf-8", "replace"), name.decode("utf-8", "replace")

        def work(txn: Transaction, _turn: Turn, _now: int) -> bool:
            if self._inspection.referred_by(txn, key) is None or self._refers(txn, key, name):
                return False
            self._inspection.set_reference(txn, key, None)
            return True

        message = f"the index of references names {text!r}, which has no such label"
        said = finding("stray-reference", message, namespace=namespace, key=text)
        return Found(said, lambda access: access.transact(work))

    # The trash.

    def _look_at_trash(self) -> Iterator[Step]:
        count, size, inodes, oldest = 0, 0, 0, 0
        first = ""
        for path in self._inspector.discarded():
            self._task.advance()
            changed = changed_at(path)
            if not changed:
                continue
            count += 1
            usage = self._size(path)
            size, inodes = size + usage.size, inodes + usage.inodes
            if not oldest or changed < oldest:
                oldest, first = changed, path
            if count % ENTRIES == 0:
                yield []
        failures = self._access.failures()
        about = {"path": first, "time": oldest, "size": size, "inodes": inodes}
        if failures:
            name, reason = next(iter(failures.items()))
            message = f"{len(failures)} of {count} entries of the trash cannot be deleted, first {name}: {reason}"
            yield [Found(finding("trash-stuck", message, **about))]
        elif count and time.time_ns() - oldest > TRASH_OLD_S * 1e9:
            yield [Found(finding("trash-stuck", f"{count} entries of the trash wait to be deleted", **about))]
        elif count:
            yield [Found(finding("trash", f"{count} entries of the trash wait to be deleted", **about))]

    # The journal.

    def _look_at_journal(self) -> Iterator[Step]:
        check = JournalCheck(self._inspection, self._access.snapshotter)
        while True:
            while True:
                with self._environment.read() as txn:
                    events = self._inspection.events(txn, check.upto, EVENTS)
                    for event in events:
                        check.feed(txn, *event)
                self._task.advance(len(events))
                yield []
                if len(events) < EVENTS:
                    break
            found = self._access.transact(lambda txn, turn, _now: self._settled(txn, turn, check.copy()))
            if found is not None:
                yield found
                return

    def _settled(self, txn: Transaction, turn: Turn, check: JournalCheck) -> Step | None:
        """The journal's findings; None where more has come than one transaction should read."""
        events = self._inspection.events(txn, check.upto, EVENTS)
        if len(events) == EVENTS:
            return None
        for event in events:
            check.feed(txn, *event)
        return check.settle(txn, turn)


def _position(after: str) -> tuple[int, int]:
    """Which stage, and how many of its findings were told, in a page's `next`."""
    if not after:
        return 0, 0
    stage, _, told = after.partition("/")
    if stage not in STAGES or not told.isdecimal() or len(told) > 12:
        raise InvalidArgument(f"after is the `next` of a page of an audit, or empty, not {after[:80]!r}")
    return STAGES.index(stage), int(told)


def _is_there(found: Found) -> bool:
    """Whether the directory is still there, now that all of the transaction's disk steps are done."""
    said = found.finding
    return said.kind not in _OF_DIRECTORIES or not said.path or os.path.lexists(said.path)


def _drop(entries: dict[int, Entry], ids: object) -> None:
    for id_ in [id_ for id_ in entries if id_ in ids]:  # type: ignore[operator]
        del entries[id_]


def _chunks(ids: list[int], size: int) -> Iterator[list[int]]:
    for begin in range(0, len(ids), size):
        yield ids[begin : begin + size]
