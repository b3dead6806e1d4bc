"""What must hold of a snapshotter whatever happened to it: journal, records and directories tell the same."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from broker.store.records import Record
from snapbroker.contract import Event, Info, Kind
from snapbroker.errors import OutOfRange
from snapbroker.protocol import Cleanup, Events, StatusAnswer, Walk
from tests.daemon import support
from tests.daemon.support import queue_of
from tests.harness import Daemon, Wire, audit_clean
from tests.oracle import check_chains, replay
from tests.powercut.books import Happening

PAGE = 1000


def events_of(wire: Wire, since: int = 0) -> list[Event]:
    """The journal of a snapshotter above a sequence, of all namespaces."""
    events: list[Event] = []
    while True:
        pages = wire.pages(Events(since=since, topics=(f"{wire.snapshotter}/",), page=PAGE))
        events += [event for page in pages for event in page.events]
        since = pages[-1].next
        if since >= pages[-1].newest:
            return events


def happenings(events: Iterable[Event], namespace: str) -> list[Happening]:
    """The events of a namespace without their numbers."""
    return [
        (event.verb, event.key, event.info.name if event.info else "")
        for event in events
        if event.namespace == namespace
    ]


def walked(wire: Wire, namespace: str) -> tuple[dict[str, Info], int]:
    """The snapshots of a namespace by name, and the sequence that the walk is a picture of."""
    infos: dict[str, Info] = {}
    sequence, after = -1, ""
    while True:
        for page in wire.pages(Walk(after=after, page=PAGE), namespace=namespace):
            infos.update((info.name, info) for info in page.infos)
            after = page.next
            sequence = page.sequence if sequence < 0 else sequence
        if not after:
            return infos, sequence


def check_journal(
    wire: Wire, namespaces: Iterable[str], pictures: Mapping[str, tuple[dict[str, Info], int]] | None = None
) -> list[Event]:
    """The journal has no gap, its chains hold, and replayed it gives what a walk shows; answers its events.

    `pictures`: what a walk of a namespace has shown earlier, and its sequence, where the journal's beginning is not
    kept for ever. For a snapshotter that nobody changes meanwhile.
    """
    pictures = pictures or {}
    first = _oldest(wire)
    events = events_of(wire, first - 1)
    assert [event.sequence for event in events] == list(range(first, first + len(events))), "a gap in the journal"
    check_chains(events, _newest_before(events) if first > 1 else None)
    by_namespace: defaultdict[str, list[Event]] = defaultdict(list)
    for event in events:
        by_namespace[event.namespace].append(event)
    for namespace in namespaces:
        state, sequence = pictures.get(namespace, ({}, 0))
        assert sequence >= first - 1, f"the picture of {namespace} at {sequence} is older than the journal, {first}"
        later = [event for event in by_namespace[namespace] if event.sequence > sequence]
        found, _ = walked(wire, namespace)
        replayed = replay(later, state)
        assert replayed == found, f"{namespace}: the journal tells {replayed}, a walk {found}"
    return events


def _oldest(wire: Wire) -> int:
    """The oldest sequence that the journal has."""
    try:
        wire.pages(Events(since=0, topics=(f"{wire.snapshotter}/",), page=1, credit=1))
    except OutOfRange as error:
        return int(error.details["oldest"])
    return 1


def _newest_before(events: Iterable[Event]) -> dict[str, int]:
    """What the first event on each topic says of the one before it, which is no longer kept."""
    first: dict[str, int] = {}
    for event in events:
        first.setdefault(event.topic, event.previous)
    return first


def check_recovered(daemon: Daemon, snapshotter: str) -> dict[str, int]:
    """Wait for the end of the recovery: nothing is broken, nothing damaged; answers its figures."""
    status = daemon.wait_for(lambda status: queue_of(status, snapshotter, "recovery").get("finished"))
    recovery = queue_of(status, snapshotter, "recovery")
    assert not recovery["broken"], f"{snapshotter}: {recovery}: records without their files\n{daemon.log()}"
    assert not recovery["damaged"], f"{snapshotter}: {recovery}: records that cannot be read\n{daemon.log()}"
    return recovery


def check_directories(daemon: Daemon, snapshotter: str) -> int:
    """Recovered and cleaned up, the disk has what the records tell, and what is stocked; answers how many records.

    For a snapshotter that nobody changes meanwhile.
    """
    with daemon.wire(snapshotter, "checks") as wire:
        wire.one(Cleanup())
    root = daemon.root_of(snapshotter)
    left = os.listdir(root / "trash")
    assert not left, f"{snapshotter}: the trash has {left[:5]}"
    records = support.records_of(daemon, snapshotter)
    in_use = {record.id for record in records.values()}
    assert len(in_use) == len(records), "two snapshots have the same id"
    assert max(in_use, default=0) < support.next_id_of(daemon, snapshotter), "an id in use could be given out again"
    besides: set[str] = set()

    def only_stocked_besides(status: StatusAnswer) -> bool:
        besides.clear()
        besides.update(set(os.listdir(root / "snapshots")) - {str(id_) for id_ in in_use})
        return len(besides) == queue_of(status, snapshotter, "pool").get("ready", 0)

    try:
        daemon.wait_for(only_stocked_besides)
    except AssertionError as error:
        error.add_note(f"{snapshotter}: directories without a record: {sorted(besides)[:10]}")
        raise
    for (_, name), record in records.items():
        assert not record.broken, f"{snapshotter}: {name} is broken"
        check_form(root / "snapshots" / str(record.id), record, daemon.snapshotters[snapshotter])
    audit_clean(daemon, snapshotter)
    return len(records)


def check_form(place: Path, record: Record, section: Mapping[str, Any]) -> None:
    """A snapshot's directory has what its kind needs, and nothing of what only a step on the way needed."""
    backend = section["backend"]
    if record.kind is Kind.VIEW and record.parent_id and backend != "overlayfs":
        assert not place.exists(), f"{place} is a view's, which borrows its parent's files"
    elif backend == "overlayfs":
        wanted = {"fs", "work"} if record.kind is Kind.ACTIVE else {"fs"}
        assert wanted <= set(os.listdir(place)), f"{place} has {os.listdir(place)}"
    elif backend == "btrfs":
        wanted = {"committed"} if record.kind is Kind.COMMITTED else {"fs"}
        assert wanted == set(os.listdir(place)), f"{place} has {os.listdir(place)}"
    else:
        assert place.is_dir(), f"{place} is missing"
