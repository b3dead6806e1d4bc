"""Killed in the middle of work: what was acknowledged is there, the rest whole or absent, nothing is left over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from backends import btrfs_ioctl
from snapbroker.blocking import Broker
from snapbroker.errors import FailedPrecondition, NotFound
from snapbroker.protocol import Prepare, Progress
from tests.daemon import support
from tests.daemon.support import Bystander, Ledger, Load, queue_of
from tests.harness import Daemon, audit_clean, is_ended

pytestmark = pytest.mark.root

AT_ONCE_S = 1.5
"""How soon a caller is told that its actor died; its own deadline is a minute away."""
FRESH = 50
"""Snapshots made after the last kill."""
CALLS = 100
"""Acknowledged calls before each kill: some hundred directories, and the pool has been used."""


def check_everything(daemon: Daemon, snapshotter: str, ledger: Ledger) -> None:
    """Books, journal and disk agree."""
    with daemon.client(snapshotter) as broker:
        infos = ledger.check(broker)
        support.check_journal(broker, infos)
    support.check_disk(daemon, snapshotter)
    audit_clean(daemon, snapshotter)
    records = support.records_of(daemon, snapshotter)
    assert {name for _, name in records} == infos.keys()
    if daemon.snapshotters[snapshotter]["backend"] != "btrfs":
        known = ledger.ids.keys() & infos.keys()
        assert {key: records["default", key].id for key in known} == {key: ledger.ids[key] for key in known}


def check_new_ids(daemon: Daemon, snapshotter: str, ledger: Ledger) -> None:
    """What is made from here on has ids that nobody had."""
    with daemon.client(snapshotter) as broker:
        with broker.batch() as batch:
            answers = [batch.prepare(f"fresh-{number}", "base") for number in range(FRESH)]
        fresh = [support.id_of(answer.result()) for answer in answers]
        assert len(set(fresh)) == FRESH
        assert min(fresh) > max(ledger.ids.values())


def test_an_actor_killed_under_load(
    disk_snapshotter: str, disk_section: dict[str, str], start_daemon: Callable[..., Daemon]
) -> None:
    daemon = start_daemon({disk_snapshotter: disk_section, "bystander": {"backend": "memory"}})
    bystander_pid = daemon.actor("bystander").pid
    waited: list[float] = []
    with Load(daemon, disk_snapshotter) as load, Bystander(daemon, "bystander") as bystander:
        for kills in (1, 2, 3):
            load.start()
            load.wait_for_calls(CALLS)
            victim = support.pid_of(daemon, disk_snapshotter)
            killed = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            support.wait_until(lambda: all(worker.failures or worker.error for worker in load.workers), "told")
            waited += [ended - max(sent, killed) for sent, ended, error in load.stop() if support.is_doubtful(error)]
            daemon.wait_ready()
            bystander.wait_for_rounds()
            assert daemon.actor(disk_snapshotter).restarts == kills
        check_everything(daemon, disk_snapshotter, load.ledger)
        check_new_ids(daemon, disk_snapshotter, load.ledger)
    assert waited, "no call was in the hands of an actor that died"
    assert max(waited) < AT_ONCE_S
    assert daemon.actor("bystander").pid == bystander_pid
    assert daemon.actor("bystander").restarts == 0
    lines = [json.loads(line) for line in daemon.log().splitlines()]
    pauses = [line["pause_ms"] for line in lines if line["event"] == "an actor is restarted"]
    assert pauses == [100, 200, 400], "the back-off doubles"


def test_a_fork_server_killed_under_load(start_daemon: Callable[..., Daemon]) -> None:
    """All actors go with it, and come back with another one."""
    daemon = start_daemon({"overlayfs": {"backend": "overlayfs"}, "native": {"backend": "native"}})
    family = daemon.forked()
    with Load(daemon, "overlayfs") as load:
        load.start()
        load.wait_for_calls(CALLS)
        family["fork server"].kill()
        support.wait_until(lambda: all(worker.failures or worker.error for worker in load.workers), "told")
        assert any(support.is_doubtful(error) for _, _, error in load.stop())
        support.wait_until(lambda: all(map(is_ended, family.values())), "their end")
        daemon.wait_ready()
        assert [actor.restarts for actor in daemon.status().snapshotters] == [1, 1]
        check_everything(daemon, "overlayfs", load.ledger)
        check_new_ids(daemon, "overlayfs", load.ledger)
        assert daemon.forked()["fork server"] != family["fork server"]


def test_an_actor_is_known_dead_before_its_end_is_told(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon({"memory": {"backend": "memory"}})
    fork_server = daemon.forked()["fork server"]
    fork_server.suspend()
    try:
        daemon.forked()["memory"].kill()
        daemon.wait_for(lambda status: [actor.state for actor in status.snapshotters] == ["unavailable"])
        assert daemon.actor("memory").restarts == 0
    finally:
        fork_server.resume()
    daemon.wait_ready()
    assert daemon.actor("memory").restarts == 1


def test_a_daemon_killed_under_load(disk_daemon: Daemon, disk_snapshotter: str) -> None:
    with Load(disk_daemon, disk_snapshotter) as load:
        for _ in range(2):
            load.start()
            load.wait_for_calls(CALLS)
            actors = [psutil.Process(actor.pid) for actor in disk_daemon.status().snapshotters]
            # This waits for the actors too, and says so when one outlives its broker.
            disk_daemon.kill()
            assert all(map(is_ended, actors))
            load.stop()
            boundary = support.next_id_of(disk_daemon, disk_snapshotter)
            disk_daemon.start()
            check_everything(disk_daemon, disk_snapshotter, load.ledger)
            place = disk_daemon.root_of(disk_snapshotter) / "snapshots"
            recorded = {record.id for record in support.records_of(disk_daemon, disk_snapshotter).values()}
            assert all(int(name) >= boundary or int(name) in recorded for name in os.listdir(place))
        check_new_ids(disk_daemon, disk_snapshotter, load.ledger)


def test_a_copy_cut_off_leaves_nothing(start_daemon: Callable[..., Daemon]) -> None:
    limits = {"service": {"progress_interval_ms": 5}}
    daemon = start_daemon({"native": {"backend": "native", "limits": limits}})
    with daemon.client("native") as broker:
        (mount,) = broker.prepare("making")
        support.make_tree(Path(mount.source), 3000, 8000)
        broker.commit("tree", "making")
    place = daemon.root_of("native") / "snapshots"
    copy = Prepare(key="copy", parent="tree")
    with daemon.wire("native") as wire:
        _, progress = next(wire.parts(wire.send(copy), [copy]))
        assert isinstance(progress, Progress)
        daemon.kill()
    assert len(list(place.iterdir())) == 2
    daemon.start()
    assert recovered(daemon, "native")["leftovers"] == 1
    with daemon.client("native") as broker:
        broker.cleanup()
        with pytest.raises(NotFound):
            broker.stat("copy")
        assert len(list(place.iterdir())) == 1
        assert list((daemon.root_of("native") / "trash").iterdir()) == []
        broker.prepare("copy", "tree")


def plant(daemon: Daemon, snapshotter: str, id_: int) -> Path:
    """A directory as a crash leaves it between its making and its record."""
    place = daemon.root_of(snapshotter) / "snapshots" / str(id_)
    if snapshotter == "overlayfs":
        (place / "fs").mkdir(parents=True)
        (place / "work").mkdir()
        (place / "fs" / "file").write_bytes(b"left over")
    elif snapshotter == "native":
        (place / "half" / "a" / "copy").mkdir(parents=True)
        (place / "half" / "file").write_bytes(b"left over")
    else:
        place.mkdir()
        _snapshot(daemon.root_of(snapshotter) / "empty", place, "fs")
        (place / "fs" / "file").write_bytes(b"left over")
    return place


def _snapshot(origin: Path, into: Path, name: str, *, read_only: bool = False) -> None:
    origin_fd, into_fd = os.open(origin, os.O_RDONLY), os.open(into, os.O_RDONLY)
    try:
        btrfs_ioctl.create_snapshot(origin_fd, into_fd, name, read_only)
    finally:
        os.close(origin_fd)
        os.close(into_fd)


def recovered(daemon: Daemon, snapshotter: str) -> dict[str, int]:
    """The figures of the recovery after a start."""
    status = daemon.wait_for(lambda status: queue_of(status, snapshotter, "recovery").get("finished"))
    return queue_of(status, snapshotter, "recovery")


def test_planted_left_overs_are_collected(disk_daemon: Daemon, disk_snapshotter: str) -> None:
    daemon = disk_daemon
    support.make_base(daemon, disk_snapshotter)
    with daemon.client(disk_snapshotter) as broker:
        broker.prepare("kept", "base")
        broker.view("seen", "base")
    daemon.stop()
    root = daemon.root_of(disk_snapshotter)
    unused = support.next_id_of(daemon, disk_snapshotter) - 1
    planted = plant(daemon, disk_snapshotter, unused)
    (root / "snapshots" / str(unused - 1)).mkdir()
    # A stranger's name is never an id, and is left alone.
    (root / "snapshots" / "notes").mkdir()
    # Of ids that nobody had: what was being stocked when the daemon ended is there already.
    half = root / "trash" / str(unused - 2) / "deep"
    (half / "er").mkdir(parents=True)
    (half / "file").write_bytes(b"half deleted")
    (root / "trash" / str(unused - 3)).write_bytes(b"a file")
    daemon.start()
    assert recovered(daemon, disk_snapshotter)["leftovers"] >= 2
    assert not planted.exists()
    assert (root / "snapshots" / "notes").is_dir()
    (root / "snapshots" / "notes").rmdir()
    support.check_disk(daemon, disk_snapshotter)
    with daemon.client(disk_snapshotter) as broker:
        assert [info.name for info in broker.walk()] == ["base", "kept", "seen"]


def test_a_btrfs_commit_cut_in_two(btrfs: Path, start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon({"btrfs": {"backend": "btrfs", "root": str(btrfs / "cut")}})
    support.make_base(daemon, "btrfs")
    with daemon.client("btrfs") as broker:
        broker.prepare("active", "base")
        broker.prepare("consumed", "base")
        broker.commit("committed", "consumed")
        broker.prepare("removed", "base")
        broker.remove("removed")
        broker.cleanup()
    daemon.stop()
    place = btrfs / "cut" / "snapshots"
    ids = {name: record.id for (_, name), record in support.records_of(daemon, "btrfs").items()}
    active, committed = place / str(ids["active"]), place / str(ids["committed"])
    # Before the record: the commit's subvolume is there, the active snapshot is still the truth.
    (active / "fs" / "written-after").write_bytes(b"and not lost")
    _snapshot(active / "fs", active, "committed", read_only=True)
    # After the record: the active subvolume was not yet dropped.
    _snapshot(committed / "committed", committed, "fs")
    # A deletion cut off after its first subvolume.
    trash = btrfs / "cut" / "trash" / "77"
    trash.mkdir()
    _snapshot(btrfs / "cut" / "empty", trash, "fs")
    daemon.start()
    recovery = recovered(daemon, "btrfs")
    assert (recovery["broken"], recovery["leftovers"]) == (0, 0)
    assert os.listdir(active) == ["fs"]
    assert os.listdir(committed) == ["committed"]
    with daemon.client("btrfs") as broker:
        broker.cleanup()
        assert list((btrfs / "cut" / "trash").iterdir()) == []
        broker.commit("whole", "active")
        broker.view("look", "whole")
        broker.prepare("child", "committed")
    assert (active / "committed" / "written-after").read_bytes() == b"and not lost"
    support.check_files(committed / "committed")


def test_a_snapshot_without_files_is_broken_and_the_rest_serves(disk_daemon: Daemon, disk_snapshotter: str) -> None:
    daemon = disk_daemon
    support.make_base(daemon, disk_snapshotter)
    with daemon.client(disk_snapshotter) as broker:
        broker.prepare("making", "base")
        broker.commit("layer", "making")
        broker.prepare("active", "base")
        broker.prepare("other", "base")
    daemon.stop()
    root = daemon.root_of(disk_snapshotter)
    ids = {name: record.id for (_, name), record in support.records_of(daemon, disk_snapshotter).items()}
    for name in ("layer", "active"):
        (root / "snapshots" / str(ids[name])).rename(root / f"taken-away-{name}")
    daemon.start()
    assert recovered(daemon, disk_snapshotter)["broken"] == 2
    with daemon.client(disk_snapshotter) as broker:
        _check_broken(broker)
        broker.mounts("other")
        broker.prepare("fresh", "base")
        broker.commit("fresh-layer", "fresh")
        broker.remove("layer")
        broker.remove("active")
        broker.cleanup()
        assert {info.name for info in broker.walk()} == {"base", "other", "fresh-layer"}
    daemon.restart()
    assert recovered(daemon, disk_snapshotter)["broken"] == 0
    support.check_disk(daemon, disk_snapshotter)


def _check_broken(broker: Broker) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: broker.mounts("active"),
        lambda: broker.usage("active"),
        lambda: broker.commit("name", "active"),
        lambda: broker.prepare("child", "layer"),
        lambda: broker.view("child", "layer"),
    ]
    for call in calls:
        with pytest.raises(FailedPrecondition, match="broken"):
            call()
    # What is known of it is still told.
    assert broker.stat("layer").parent == broker.stat("active").parent == "base"


def test_a_snapshot_put_back_is_whole_again(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon({"native": {"backend": "native"}})
    support.make_base(daemon, "native")
    daemon.stop()
    (record,) = support.records_of(daemon, "native").values()
    place, away = daemon.root_of("native") / "snapshots" / str(record.id), daemon.place / "away"
    shutil.move(place, away)
    daemon.start()
    assert recovered(daemon, "native")["broken"] == 1
    daemon.stop()
    shutil.move(away, place)
    daemon.start()
    assert recovered(daemon, "native")["broken"] == 0
    with daemon.client("native") as broker:
        broker.prepare("child", "base")
