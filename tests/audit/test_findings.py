"""Every kind of finding, made for real on a root: seen by both entrances, left alone by a dry run, mended, gone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.store.records import BROKEN
from snapbroker.blocking import Broker
from tests.audit.harm import Store, remove_files, tree
from tests.harness import Daemon, audit_clean, findings

pytestmark = pytest.mark.root

REF = "containerd.io/snapshot.ref"
DISK = ("overlayfs", "native", "btrfs")
LEFT, ABOVE = 60_000, 70_000
"""Ids that nobody uses: one that was given out, one that was not."""


def build(broker: Broker) -> None:
    """Snapshots that are harmed later, each for one finding."""
    for name in ("base", "gone", "odd", "referred"):
        broker.prepare(f"{name}-making")
    with broker.batch() as batch:
        for name in ("base", "gone", "odd"):
            batch.commit(name, f"{name}-making")
        batch.commit("referred", "referred-making", labels={REF: "layer"})
    with broker.batch() as batch:
        for key in ("lost", "damaged", "deep", "unlisted", "marked", "silent", "fenced", "quiet"):
            batch.prepare(key, "base")
        batch.prepare("orphan", "gone")
        batch.prepare("astray", "odd")
        batch.prepare("exchanged", "base")


def harm(store: Store, root: Path, snapshotter: str) -> set[tuple[str, str]]:
    """Break one thing for each kind; answers kind and key, or the end of the path, of the findings that must be."""
    snapshots = root / "snapshots"
    base = store.record("base").id
    remove_files(snapshots / str(store.record("lost").id))
    left, above = snapshots / str(LEFT), snapshots / str(ABOVE)
    for directory in (left, above):
        directory.mkdir(mode=0o700)
        (directory / "file").write_text("somebody's")
    (snapshots / "README").write_text("put here by hand")
    (root / "trash").chmod(0o755)
    store.damage("damaged")
    if snapshotter == "overlayfs":
        # An empty one could not be told from what is made ahead of time, while the daemon rests.
        (snapshots / str(store.record("gone").id) / "fs" / "file").write_text("of a layer")
    store.delete("gone")
    store.reinform("odd", lambda info: msgspec.structs.replace(info, kind="active"), kind=store.record("lost").kind)
    store.change("deep", depth=7)
    store.change("exchanged", parent_id=base + 10_000)
    store.set_child(base, store.record("exchanged").id, there=False)
    store.set_child(base + 10_000, store.record("exchanged").id, there=True)
    store.set_child(base, store.record("unlisted").id, there=False)
    store.set_child(base, LEFT + 1, there=True)
    store.set_reference("layer", store.record("referred").id, None)
    store.set_reference("another", base, "base")
    store.change("marked", flags=BROKEN)
    store.reinform("silent", lambda info: msgspec.structs.replace(info, labels={"said": "to nobody"}))
    store.change("fenced", fence=store.record("quiet").fence)
    events = store.events()
    removed = next(number for number, event in events.items() if event["key"] == "gone-making")
    store.set_event(removed, None)
    store.set_event(removed + 1, b"\xc1")
    chained = next(number for number, event in events.items() if event["key"] == "quiet")
    store.set_event(chained, {**events[chained], "previous": 1})
    store.set_topic(f"{snapshotter}/default/snapshot/commit", 1)
    return {
        ("missing-files", "lost"),
        ("leftover", f"/{LEFT}"),
        ("id-above", f"/{ABOVE}"),
        ("stranger", "/README"),
        ("mode", "/trash"),
        ("damaged-record", "damaged"),
        ("missing-parent", "orphan"),
        ("leftover", f"/{GONE}"),
        ("parent-not-committed", "astray"),
        ("wrong-parent", "exchanged"),
        ("wrong-depth", "deep"),
        ("missing-child", "unlisted"),
        ("stray-child", str(LEFT + 1)),
        ("missing-reference", "referred"),
        ("stray-reference", "base"),
        ("whole-again", "marked"),
        ("journal-state", "silent"),
        ("journal-state", "gone"),
        ("wrong-fence", "fenced"),
        ("journal-gap", str(removed)),
        ("damaged-event", str(removed + 1)),
        ("journal-chain", str(chained)),
        ("journal-topic", "commit"),
    }


GONE = "gone"
"""Stands for the id of the snapshot whose record is deleted."""


def subjects(found: list[dict[str, Any]], gone: int) -> set[tuple[str, str]]:
    """Kind and subject, in the words of `harm`."""
    told: set[tuple[str, str]] = set()
    for each in found:
        if each["kind"] == "journal-topic":
            subject = each["message"].split(" is ")[0].rpartition("/")[2]
        elif each["kind"] in ("journal-gap", "damaged-event", "journal-chain"):
            subject = str(each["sequence"])
        elif each["kind"] == "stray-child":
            subject = str(each["id"])
        elif each["key"]:
            subject = each["key"]
        else:
            name = os.path.basename(each["path"])
            subject = f"/{GONE if name == str(gone) else name}"
        told.add((each["kind"], subject))
    return told


@pytest.fixture(params=DISK)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def section(backend: str, btrfs: Path, tmp_path: Path) -> dict[str, Any]:
    """A snapshotter that nobody else uses."""
    limits = {"pool": {"pool_min": 4}}
    if backend == "btrfs":
        return {"backend": "btrfs", "root": str(btrfs / tmp_path.name), "limits": limits}
    return {"backend": backend, "limits": limits}


class Harmed:
    """A daemon whose one snapshotter was harmed while it served."""

    def __init__(self, daemon: Daemon, backend: str) -> None:
        self.daemon = daemon
        self.backend = backend
        self.root = daemon.root_of(backend)
        self.store = Store(self.root / "metadata")
        with daemon.client(backend) as broker:
            build(broker)
            broker.cleanup()
        daemon.wait_for(lambda status: status.snapshotters[0].queues["recovery"]["finished"])
        self.gone = self.store.record("gone").id
        self.expected = harm(self.store, self.root, backend)
        if backend == "native":
            # The directory of an id is the snapshot's own there, and any file in it somebody's.
            assert (self.root / "snapshots" / str(LEFT) / "file").exists()

    @property
    def broken(self) -> tuple[str, ...]:
        """What cannot be but removed, children first."""
        # On btrfs an active snapshot needs another subvolume than a committed one.
        return ("lost", "orphan", "astray", "exchanged", *(("odd",) if self.backend == "btrfs" else ()))

    def check_all_found(self) -> list[dict[str, Any]]:
        """Every finding is there, and no other."""
        found = findings(self.daemon, self.backend)
        told = subjects([each for each in found if each["kind"] not in ("trash", "stocked")], self.gone)
        # What was broken for one finding is told of others too, in the journal's words.
        besides = {("journal-state", "odd"), ("missing-child", "exchanged"), ("missing-files", "odd")}
        assert self.expected <= told, f"not found: {self.expected - told}"
        assert told <= self.expected | besides, f"too much: {told - self.expected}"
        return found

    def check_dry_run(self) -> None:
        """It says what it would do, and does nothing."""
        before, files = self.store.contents(), tree(self.root / "snapshots")
        found = findings(self.daemon, self.backend, "--repair")
        assert not any(each["mended"] for each in found)
        assert {each["kind"] for each in found if each["repair"]} >= {"leftover", "damaged-record", "journal-gap"}
        assert self.store.contents() == before
        # The pool may have made others.
        assert files.items() <= tree(self.root / "snapshots").items()
        assert (self.root / "trash").stat().st_mode & 0o777 == 0o755

    def check_repair(self) -> None:
        """All that can be mended is, and nothing else is touched."""
        found = findings(self.daemon, self.backend, "--repair", "--yes")
        assert [each for each in found if each["repair"] and not each["mended"]] == []
        snapshots = self.root / "snapshots"
        assert (snapshots / "README").read_text() == "put here by hand"
        assert (snapshots / str(ABOVE) / "file").read_text() == "somebody's"
        assert not (snapshots / str(LEFT)).exists()
        assert not (snapshots / str(self.gone)).exists()
        assert not self.store.has("damaged")
        assert self.store.next_id() > ABOVE
        assert self.store.record("deep").depth == 1
        again = findings(self.daemon, self.backend)
        wrong = {(each["kind"], each["key"]) for each in again if each["severity"] != "note"}
        assert wrong == {("broken", key) for key in self.broken}
        assert ("unknown-directory", ABOVE) in {(each["kind"], each["id"]) for each in again}


@pytest.fixture
def harmed(backend: str, section: dict[str, Any], start_daemon: Callable[..., Daemon]) -> Harmed:
    return Harmed(start_daemon({backend: section}), backend)


def check_clean_at_last(harmed: Harmed) -> None:
    """Without what is broken nothing is found, and the snapshotter serves."""
    with harmed.daemon.client(harmed.backend) as broker:
        for key in harmed.broken:
            broker.remove(key)
        broker.prepare("fresh", "base")
        broker.cleanup()
    audit_clean(harmed.daemon)
    assert (harmed.root / "snapshots" / str(ABOVE) / "file").exists()


def test_found_by_both_entrances_and_mended_while_it_rests(harmed: Harmed) -> None:
    harmed.check_all_found()
    harmed.check_dry_run()
    harmed.daemon.stop()
    harmed.check_all_found()
    harmed.check_dry_run()
    harmed.check_repair()
    harmed.daemon.start()
    check_clean_at_last(harmed)


def test_mended_while_it_serves(harmed: Harmed) -> None:
    harmed.check_repair()
    check_clean_at_last(harmed)
    harmed.daemon.stop()
    audit_clean(harmed.daemon)
