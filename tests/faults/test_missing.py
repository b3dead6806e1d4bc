"""Places that are gone, and records that cannot be read: told, not papered over, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from snapbroker.errors import FailedPrecondition, Internal, Unavailable
from tests.daemon.support import Bystander, directory_of, queue_of, wait_until
from tests.harness import Daemon

StartDaemon = Callable[..., Daemon]


@pytest.mark.parametrize("place", ["metadata", "."])
def test_a_database_that_was_moved_away_is_waited_for(place: str, start_daemon: StartDaemon) -> None:
    daemon = start_daemon({"overlayfs": {}, "memory": {"backend": "memory"}})
    root = daemon.root_of("overlayfs")
    moved, away = (root / place).resolve(), root.with_name("away")
    with daemon.client("overlayfs", patience=0) as broker, Bystander(daemon, "memory") as bystander:
        broker.prepare("kept")
        moved.rename(away)
        wait_until(lambda: "was there and is missing" in daemon.log(), "it is told")
        with pytest.raises(Unavailable):
            broker.prepare("nowhere")
        # No empty store was made in its place.
        assert not (root / "metadata" / "data.mdb").exists()
        bystander.wait_for_rounds()
        if moved.exists():
            moved.rename(root.with_name("left"))
        away.rename(moved)
        daemon.wait_ready()
        assert {info.name for info in broker.walk()} == {"kept"}
        assert broker.mounts("kept")
        broker.prepare("new")
        bystander.wait_for_rounds()


def test_snapshots_that_were_moved_away_are_broken_until_they_are_back(start_daemon: StartDaemon) -> None:
    daemon = start_daemon({"overlayfs": {}, "memory": {"backend": "memory"}})
    root = daemon.root_of("overlayfs")

    def recovered(broken: int) -> None:
        daemon.wait_for(
            lambda status: (
                (figures := queue_of(status, "overlayfs", "recovery")).get("finished") == 1
                and figures["checked"] == 1
                and figures["broken"] == broken
            )
        )

    with daemon.client("overlayfs") as broker, Bystander(daemon, "memory") as bystander:
        broker.prepare("kept")
        (root / "snapshots").rename(root / "away")
        recovered(broken=1)
        with pytest.raises(FailedPrecondition):
            broker.mounts("kept")
        assert broker.stat("kept").name == "kept"
        broker.prepare("new")
        broker.remove("new")
        bystander.wait_for_rounds()
        (root / "snapshots").rename(root / "empty")
        (root / "away").rename(root / "snapshots")
        recovered(broken=0)
        assert broker.mounts("kept")


def test_files_of_a_snapshot_that_are_gone_break_it_alone(start_daemon: StartDaemon) -> None:
    daemon = start_daemon({"native": {}, "memory": {"backend": "memory"}})
    with daemon.client("native", patience=0) as broker, Bystander(daemon, "memory") as bystander:
        for name in ("lost", "kept"):
            (directory_of(daemon, "native", broker.prepare(f"{name}-making")) / "file").write_text(name)
            broker.commit(name, f"{name}-making")
        source = next(p for p in (daemon.root_of("native") / "snapshots").glob("*/file") if p.read_text() == "lost")
        source.unlink()
        source.parent.rmdir()
        # Found where it is needed, before any start.
        with pytest.raises((Internal, FailedPrecondition)):
            broker.prepare("child", "lost")
        (mount,) = broker.prepare("sibling", "kept")
        assert (Path(mount.source) / "file").read_text() == "kept"
        bystander.wait_for_rounds()


def test_a_record_that_cannot_be_read_harms_nobody_else(start_daemon: StartDaemon) -> None:
    daemon = start_daemon({"overlayfs": {}, "memory": {"backend": "memory"}})
    with daemon.client("overlayfs") as broker:
        for key in ("a", "b", "c"):
            broker.prepare(key)
    daemon.stop()
    environment = lmdb.open(str(daemon.root_of("overlayfs") / "metadata"), max_dbs=16)
    records = environment.open_db(b"snapshots", create=False)
    with environment.begin(write=True, db=records) as transaction:
        key = next(bytes(key) for key, _ in transaction.cursor() if key.endswith(b"b"))
        transaction.put(key, b"\xff" * 7)
    environment.close()
    daemon.may_log_tracebacks = True
    daemon.start()
    with daemon.client("overlayfs", patience=0) as broker, Bystander(daemon, "memory"), Bystander(daemon, "overlayfs"):
        with pytest.raises(Internal):
            broker.stat("b")
        assert broker.stat("a").name == "a"
        assert broker.mounts("c")
        daemon.wait_for(lambda status: queue_of(status, "overlayfs", "recovery").get("damaged") == 1)
        broker.remove("a")
