"""The auditor on a store of its own, for what no harm from outside makes: chains that end nowhere, disks that fail."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.api import Snapshot, Task
from backends.files import Shelf
from backends.native import Native, NativeOptions
from broker.audit import journal
from broker.audit.access import Flight, OfflineAccess
from broker.audit.auditor import EVENTS, Auditor
from broker.audit.kinds import KINDS
from broker.audit.why import why
from broker.store import Environment, Inspection, Record, Snapshots, StoreLimits, index_key
from broker.store.journal import Turn
from broker.store.records import encode_info
from snapbroker.contract import Info, Kind
from snapbroker.errors import Cancelled, InvalidArgument
from snapbroker.protocol import Finding

LONG = "n" * 600
"""A name of which the index key has only the beginning."""


class World:
    """A native root and its store, written as the writer writes it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shelf = Shelf(root)
        (root / "lock").touch(mode=0o600)
        self.environment = Environment(root / "metadata", StoreLimits(map_initial_bytes=1 << 20))
        self.snapshots = Snapshots(self.environment)
        self.access = OfflineAccess(
            self.environment,
            "native",
            root,
            root / "metadata",
            Native,
            lambda: Native.open_again(root, NativeOptions()),
        )
        self.environment.write(lambda txn: self.snapshots.reserve_ids(txn, 1, 1000))

    def make(self, id_: int, name: str, parent: str = "", kind: Kind = Kind.COMMITTED, **fields: Any) -> Record:
        """A snapshot with its event and its directory."""
        return self.access.transact(
            lambda txn, turn, now: self.make_in(txn, turn, now, id_, name, parent, kind, **fields)
        )

    def make_in(
        self,
        txn: Any,
        turn: Turn,
        now: int,
        id_: int,
        name: str,
        parent: str = "",
        kind: Kind = Kind.COMMITTED,
        **fields: Any,
    ) -> Record:
        """The same within a transaction."""
        if not self.shelf.path(id_).exists():
            self.shelf.path(id_).mkdir()
        above = self.snapshots.get(txn, index_key("default", parent)) if parent else None
        info = encode_info(Info(name, kind, parent, {}, now, now))
        depth, parent_id = (above.depth + 1, above.id) if above else (0, 0)
        record = Record(kind, 0, depth, id_, parent_id, 0, 0, turn.next, info)._replace(**fields)
        self.snapshots.insert(txn, index_key("default", name), record)
        turn.append(txn, now, "default", "commit" if kind is Kind.COMMITTED else "prepare", f"{name}-key", info)
        return record

    def tell(self, count: int) -> None:
        """Events, each of which says that there is no such snapshot, as it is."""

        def work(txn: Any, turn: Turn, now: int) -> None:
            for _ in range(count):
                turn.append(txn, now, "default", "remove", "nobody")

        self.access.transact(work)

    def audit(self, *, execute: bool = False, after: str = "") -> list[Finding]:
        auditor = Auditor(self.access, Task(), execute=execute)
        return [item[1] for item in auditor.told(after) if item is not None]

    def kinds(self, **options: Any) -> list[tuple[str, str]]:
        return sorted((each.kind, each.key or str(each.id or "")) for each in self.audit(**options))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "root")
    yield world
    world.access.close()
    world.environment.close()
    world.shelf.close()


def test_a_good_store_is_clean(world: World) -> None:
    world.make(1, "base")
    world.make(2, "top", "base")
    world.make(3, "job", "top", Kind.ACTIVE)
    world.make(4, LONG, "base")
    assert world.audit() == []


def test_two_records_with_one_id(world: World) -> None:
    world.make(1, "one", kind=Kind.ACTIVE)
    world.make(1, "two", kind=Kind.ACTIVE)
    (found,) = world.audit()
    assert (found.kind, found.id, found.repair) == ("shared-id", 1, "")
    assert "'one' and 'two'" in found.message


def test_a_chain_that_leads_back_to_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    base = world.make(1, "base")
    top = world.make(2, "top", "base")
    world.access.transact(
        lambda txn, _turn, _now: world.snapshots.put(
            txn,
            index_key("default", "base"),
            base._replace(parent_id=top.id, depth=2, info=encode_info(Info("base", Kind.COMMITTED, "top"))),
        )
    )
    # Only where every layer counts is a chain followed to its end.
    monkeypatch.setattr(world.access.inspector, "deep", True, raising=False)
    kinds = world.kinds()
    assert ("missing-parent", "base") in kinds
    assert ("missing-parent", "top") in kinds
    world.audit(execute=True)
    assert {("broken", "base"), ("broken", "top")} <= set(world.kinds())


def test_a_damaged_record_of_a_long_name_is_told_of_by_its_whole_name(world: World) -> None:
    world.make(1, LONG)
    key = index_key("default", LONG)
    world.access.transact(lambda txn, _turn, _now: txn.put(key, b"rubbish", db=world.environment.snapshots))
    (found,) = [each for each in world.audit(execute=True) if each.kind == "damaged-record"]
    assert found.mended
    assert world.kinds() == [("trash", "")]
    with world.environment.read() as txn, txn.cursor(db=world.environment.journal) as cursor:
        assert cursor.last()
        assert LONG.encode() in cursor.value()
    assert not world.shelf.path(1).exists()


def test_a_directory_that_cannot_be_looked_at(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.make(1, "base")

    def flaw(_snapshot: Snapshot) -> str:
        raise OSError(errno.EIO, "Input/output error", "/dev/bad")

    monkeypatch.setattr(world.access.inspector, "flaw", flaw)
    (found,) = world.audit()
    assert (found.kind, found.key, found.path, found.repair) == ("unreadable", "base", "/dev/bad", "")


def test_a_place_that_is_missing(world: World) -> None:
    (world.root / "trash").rmdir()
    (found,) = world.audit()
    assert (found.kind, found.path) == ("missing-place", str(world.root / "trash"))


def test_too_much_between_two_states(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "PENDING_MAX", 2)
    records = [world.make(number, f"job-{number}", kind=Kind.ACTIVE) for number in range(1, 6)]
    for record in records:
        key = index_key("default", f"job-{record.id}")
        world.access.transact(lambda txn, _turn, _now, key=key, record=record: world.snapshots.delete(txn, key, record))  # type: ignore[misc]
    kinds = [each.kind for each in world.audit()]
    assert kinds.count("journal-state") == 2
    assert kinds.count("unchecked") == 1


def test_what_is_in_hand_is_no_finding(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.make(1, "base")
    world.shelf.path(7).mkdir()
    world.shelf.path(8).mkdir()
    monkeypatch.setattr(world.access, "flight", lambda: Flight(ids={7}))
    assert world.kinds() == [("leftover", "8")]
    monkeypatch.setattr(world.access, "flight", lambda: Flight(recovering=True))
    assert world.kinds() == []


def test_the_rest_of_an_audit_is_continued(world: World) -> None:
    for number in range(5):
        (world.root / "snapshots" / f"stranger-{number}").touch()
    world.shelf.path(7).mkdir()
    told = [item for item in Auditor(world.access, Task()).told() if item is not None]
    assert len(told) == 6
    for count, (after, _) in enumerate(told, 1):
        rest = world.audit(after=after)
        assert [each.path for each in rest] == [finding.path for _, finding in told[count:]]
    with pytest.raises(InvalidArgument):
        world.audit(after="nowhere/1")


def test_an_audit_can_be_cancelled(world: World) -> None:
    world.make(1, "base")
    task = Task()
    told = Auditor(world.access, task).told()
    next(told)
    task.cancel()
    with pytest.raises(Cancelled):
        list(told)


def test_a_mend_that_fails_says_why_and_the_rest_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.shelf.path(7).mkdir()
    (world.root / "trash").chmod(0o777)

    def discard(_id: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(world.access, "discard", discard)
    found = {each.kind: each for each in world.audit(execute=True)}
    assert found["mode"].mended
    assert not found["leftover"].mended
    assert "Read-only file system" in found["leftover"].failure


@pytest.mark.parametrize("kind", [Kind.COMMITTED, Kind.ACTIVE])
def test_a_transaction_that_calls_have_part_in(world: World, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    """What they have decided is there, on a topic with events and on one without, its index being written last."""
    world.make(1, "base")
    # Its record comes with the transaction in which it is looked at again.
    world.shelf.path(2).mkdir()
    transact, ids = world.access.transact, itertools.count(2)

    def shared(work: Callable[[Any, Turn, int], Any]) -> Any:
        def run(txn: Any, turn: Turn, now: int) -> Any:
            id_ = next(ids)
            world.make_in(txn, turn, now, id_, f"name-{id_}", "base", kind)
            return work(txn, turn, now)

        return transact(run)

    monkeypatch.setattr(world.access, "transact", shared)
    assert world.audit() == []
    assert next(ids) > 3


def test_a_transaction_that_is_run_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What calls had decided in a transaction that was dropped has not happened."""
    world.make(1, "base")
    transact = world.access.transact

    def again(work: Callable[[Any, Turn, int], Any]) -> Any:
        def dropped(txn: Any, turn: Turn, now: int) -> Any:
            for _ in range(3):
                turn.append(txn, now, "default", "remove", "nobody")
            work(txn, turn, now)
            raise KeyError("the map is full")

        with pytest.raises(KeyError):
            transact(dropped)
        return transact(work)

    monkeypatch.setattr(world.access, "transact", again)
    assert world.audit() == []


def test_events_that_are_dropped_for_their_age_while_they_are_read(world: World) -> None:
    world.make(1, "base")
    world.tell(2 * EVENTS + 2)
    world.make(2, "job", "base", Kind.ACTIVE)
    told = Auditor(world.access, Task()).told("journal/0")
    assert next(told) is None
    # More than was read, the last of it in the middle of a page.
    world.access.transact(lambda txn, _turn, _now: Inspection(world.environment).cut(txn, EVENTS + 7))
    assert [item for item in told if item is not None] == []


def test_events_that_are_lost_while_they_are_read(world: World) -> None:
    world.tell(2 * EVENTS + 2)
    told = Auditor(world.access, Task()).told("journal/0")
    assert next(told) is None
    world.access.transact(lambda txn, _turn, _now: txn.delete((EVENTS + 7).to_bytes(8), db=world.environment.journal))
    (found,) = [item[1] for item in told if item is not None]
    assert (found.kind, found.sequence) == ("journal-gap", EVENTS + 7)


def test_a_topic_is_not_set_back_by_who_would_mend_it(world: World) -> None:
    """An event has come since it was found wrong, and has noted itself."""
    name = "native/default/snapshot/remove"
    world.tell(3)
    world.access.transact(lambda txn, _turn, _now: txn.put(name.encode(), (1).to_bytes(8), db=world.environment.topics))
    check = journal.JournalCheck(Inspection(world.environment), "native")
    with world.environment.read() as txn:
        for event in Inspection(world.environment).events(txn, 0, 10):
            check.feed(txn, *event)
    (found,) = world.access.transact(lambda txn, turn, _now: check.settle(txn, turn))
    assert (found.finding.kind, found.finding.sequence) == ("journal-topic", 3)
    world.tell(1)
    assert found.mend is not None
    assert not found.mend(world.access)
    assert world.audit() == []


def test_why_tells_of_calls_under_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    record = world.make(1, "job", kind=Kind.ACTIVE)
    key = index_key("default", "job")
    monkeypatch.setattr(world.access, "flight", lambda: Flight(consumes={key}, pins={record.id: 2}))
    held = why(world.access, "default", "job", Task()).holds
    assert held == ("a commit of it is under way", "2 calls that make or commit a snapshot on it are under way")
    monkeypatch.setattr(world.access, "flight", lambda: Flight(creates={index_key("default", "new")}))
    assert why(world.access, "default", "new", Task()).holds == ("a call that makes it is under way",)


def test_why_names_some_children_and_counts_all(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.audit.why.CHILDREN_MAX", 3)
    world.make(1, "base")
    for number in range(2, 9):
        world.make(number, f"child-{number}", "base", Kind.ACTIVE)
    answer = why(world.access, "default", "base", Task())
    assert (answer.children, answer.children_count) == (("child-2", "child-3", "child-4"), 7)


def test_the_specification_lists_every_kind() -> None:
    text = (Path(__file__).parents[2] / "docs" / "rfc" / "1-request.md").read_text()
    table = text.partition("| kind | severity | repair |\n|---|---|---|\n")[2].partition("\n\n")[0]
    rows = {row.split(" | ")[0].strip("| `"): row.removesuffix(" |").split(" | ")[1:] for row in table.splitlines()}
    assert rows == {name: [kind.severity, kind.repair or "-"] for name, kind in KINDS.items()}
