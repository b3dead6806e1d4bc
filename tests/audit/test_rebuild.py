"""The ledger, backups taken under load, and a database that is gone: what comes back, and what is left alone."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends.inspecting import NothingInspector
from broker.audit import rebuild
from broker.main import main as snapbrokerd
from broker.store.ledger import NAME, changes
from broker.store.records import Record, decode_record, encode_info, index_key
from snapbroker.contract import Info, Kind
from snapbroker.errors import OutOfRange
from tests.audit.harm import Store
from tests.daemon import support
from tests.harness import Daemon, audit_clean, findings

pytestmark = pytest.mark.root

LABELS = {"containerd.io/snapshot.ref": "layer-one", "team": "build"}


@pytest.fixture(params=("overlayfs", "native", "btrfs"))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def daemon(backend: str, btrfs: Path, tmp_path: Path, start_daemon: Callable[..., Daemon]) -> Daemon:
    limits = {"pool": {"pool_min": 4}, "ledger": {"flush_ms": 50}}
    section: dict[str, Any] = {"backend": backend, "limits": limits}
    if backend == "btrfs":
        section["root"] = str(btrfs / tmp_path.name)
    return start_daemon({backend: section})


def command(*arguments: str) -> list[dict[str, Any]]:
    """What a command of the daemon prints with --json; it must end with 0."""
    printed = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(printed, write_through=True)) as text:
        status = snapbrokerd([*arguments, "--json"])
        text.detach()
    assert status == 0
    return [json.loads(line) for line in printed.getvalue().splitlines()]


def build(daemon: Daemon, backend: str, *, base: bool = True) -> dict[str, Info]:
    """Committed snapshots in two namespaces, one with children; answers those that must come back."""
    if base:
        support.make_base(daemon, backend)
    with daemon.client(backend) as broker, daemon.client(backend, "other") as other:
        broker.prepare("a", "base")
        broker.commit("layer", "a", labels={"first": "1"})
        broker.update("layer", LABELS)
        for key in ("b", "c"):
            broker.prepare(key, "layer")
        broker.commit("top", "b")
        broker.commit("removed", "c")
        broker.remove("removed")
        other.prepare("x")
        other.commit("base", "x")
        mounts = broker.prepare("workspace", "layer")
        (support.directory_of(daemon, backend, mounts) / "work").write_text("half done")
        broker.view("look", "top")
        broker.cleanup()
        assert other.stat("base").kind == "committed"
        return {info.name: info for info in broker.walk("kind==committed")}


def lose_database(daemon: Daemon, backend: str) -> None:
    shutil.rmtree(daemon.root_of(backend) / "metadata")


def committed_of(daemon: Daemon, backend: str) -> dict[str, Info]:
    with daemon.client(backend) as broker:
        return {info.name: info for info in broker.walk("kind==committed")}


def test_committed_snapshots_come_back_from_the_ledger(daemon: Daemon, backend: str) -> None:
    committed = build(daemon, backend)
    with daemon.client(backend) as broker:
        seen, fence = broker.walk().sequence, broker.mounts("workspace").fence
    daemon.stop()
    root = daemon.root_of(backend)
    lose_database(daemon, backend)
    daemon.may_log_tracebacks = True
    dry = command("rebuild", "--config", str(daemon.config_file))
    assert not (root / "metadata").exists()
    done = command("rebuild", "--config", str(daemon.config_file), "--yes")
    assert [{**each, "summary": None} for each in done] == [{**each, "summary": None} for each in dry]
    assert done[-1]["summary"]["committed"] == len(committed) + 1
    assert done[-1]["summary"]["kept"] == len([each for each in done[:-1] if each["why"] == "nothing tells what it is"])
    daemon.start()
    assert committed_of(daemon, backend) == committed
    with daemon.client(backend, "other") as other:
        assert [info.name for info in other.walk()] == ["base"]
    # What was under way is nobody's any more, and still there after a sweep.
    left = [each for each in findings(daemon, backend) if each["kind"] == "unknown-directory"]
    assert [each["id"] for each in left] == [each["id"] for each in done[:-1]]
    assert left
    assert any(path.read_text() == "half done" for path in Path(root, "snapshots").glob("*/**/work") if path.is_file())
    audit_clean(daemon)
    with daemon.client(backend) as broker:
        with pytest.raises(OutOfRange):
            list(broker.events(since=seen, follow=False))
        assert broker.prepare("fresh", "top").fence > max(fence, seen)
        assert broker.why("layer").references == ("layer-one",)


@pytest.mark.parametrize("backend", ["overlayfs"], indirect=True)
def test_a_start_without_the_database_is_refused(
    daemon: Daemon, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    committed = build(daemon, backend)
    daemon.stop()
    lose_database(daemon, backend)
    ledger = (daemon.root_of(backend) / NAME).read_bytes()
    daemon.start(wait=False)
    daemon.wait_for(lambda _: "is gone, and" in daemon.log())
    daemon.kill(signal.SIGKILL)
    assert (daemon.root_of(backend) / NAME).read_bytes() == ledger
    assert not (daemon.root_of(backend) / "metadata" / "data.mdb").exists()
    assert [each["kind"] for each in findings(daemon, backend)] == ["missing-database"]
    (daemon.root_of(backend) / NAME).rename(daemon.root_of(backend) / "away")
    assert snapbrokerd(["rebuild", "--config", str(daemon.config_file), "--yes"]) == 5
    assert "nothing tells what its directories are" in capsys.readouterr().err
    (daemon.root_of(backend) / "away").rename(daemon.root_of(backend) / NAME)
    command("rebuild", "--config", str(daemon.config_file), "--yes")
    for _ in range(2):
        daemon.start()
        audit_clean(daemon)
        assert committed_of(daemon, backend) == committed
        daemon.stop()


@pytest.mark.parametrize("backend", ["overlayfs", "btrfs"], indirect=True)
def test_a_backup_under_load_brings_everything_back(daemon: Daemon, backend: str, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    with support.Load(daemon, backend, workers=2) as load:
        load.start()
        build(daemon, backend, base=False)
        load.wait_for_calls(30)
        command("backup", str(backup), "--config", str(daemon.config_file))
        load.wait_for_calls(60)
        load.stop()
    with daemon.client(backend) as broker:
        infos = {info.name: info for info in broker.walk()}
        broker.cleanup()
    assert snapbrokerd(["backup", str(backup), "--config", str(daemon.config_file)]) == 4, "nothing is overwritten"
    daemon.stop()
    lose_database(daemon, backend)
    rebuilt = command("rebuild", "--config", str(daemon.config_file), "--from", str(backup), "--yes")
    daemon.start()
    with daemon.client(backend) as broker:
        found = {info.name: info for info in broker.walk()}
        # The ledger has what was committed since the backup, the backup the workspaces that were there by then.
        assert {name: info for name, info in found.items() if info.kind == "committed"} == {
            name: info for name, info in infos.items() if info.kind == "committed"
        }
        assert found.keys() <= infos.keys()
        assert found["workspace"] == infos["workspace"]
        assert found["look"] == infos["look"]
        (support.directory_of(daemon, backend, broker.mounts("workspace")) / "more").write_text("to write")
    # Those of the load may have been removed since.
    assert {"base", "layer", "top"} <= found.keys()
    assert rebuilt[-1]["summary"]["active"] >= 1
    audit_clean(daemon)


@pytest.mark.parametrize("backend", ["overlayfs"], indirect=True)
def test_an_old_copy_in_the_place_of_the_database_is_refused(daemon: Daemon, backend: str, tmp_path: Path) -> None:
    build(daemon, backend)
    command("backup", str(tmp_path / "b"), "--config", str(daemon.config_file), "--compact")
    with daemon.client(backend) as broker:
        broker.prepare("later")
    daemon.stop()
    metadata = daemon.root_of(backend) / "metadata"
    shutil.copyfile(tmp_path / "b" / f"{backend}.mdb", metadata / "data.mdb")
    daemon.start(wait=False)
    daemon.wait_for(lambda _: "it is an old copy" in daemon.log())


@pytest.mark.parametrize("backend", ["overlayfs"], indirect=True)
def test_the_ledger_survives_kills(daemon: Daemon, backend: str) -> None:
    committed = build(daemon, backend)
    root = daemon.root_of(backend)

    def in_ledger() -> set[str]:
        rows = dict(changes(root)).items()
        return {decode_record(value).decoded().name for key, value in rows if value and key.startswith(b"default\0")}

    support.wait_until(lambda: in_ledger() == committed.keys(), "the ledger has all")
    daemon.kill()
    with (root / NAME).open("ab") as file:
        file.write(b"\0\0\1\0torn")
    assert in_ledger() == committed.keys()
    daemon.start()
    daemon.wait_for(lambda status: status.snapshotters[0].queues["ledger"]["rewritten"] == 1)
    assert in_ledger() == committed.keys()
    daemon.stop()
    daemon.start()
    daemon.wait_for(lambda status: status.snapshotters[0].queues["ledger"]["size_bytes"] > 0)
    assert daemon.actor(backend).queues["ledger"]["rewritten"] == 0, "a stop in order leaves a ledger that holds"


@pytest.mark.parametrize("backend", ["overlayfs"], indirect=True)
def test_a_damaged_record_is_put_back_from_the_ledger(daemon: Daemon, backend: str) -> None:
    committed = build(daemon, backend)
    root = daemon.root_of(backend)
    support.wait_until(lambda: any(key == b"default\0layer" for key, _ in changes(root)), "the ledger has it")
    daemon.stop()
    Store(root / "metadata").damage("layer")
    found = findings(daemon, backend, "--repair", "--yes")
    assert ("damaged-record", "layer", True) in {(each["kind"], each["key"], each["mended"]) for each in found}
    daemon.start()
    assert committed_of(daemon, backend) == committed
    audit_clean(daemon)


def test_what_cannot_be_read_is_left_and_the_rest_is_taken() -> None:
    def value(name: str, id_: int, info: bytes = b"") -> bytes:
        info = info or encode_info(Info(name, Kind.COMMITTED))
        return Record(Kind.COMMITTED, 0, 0, id_, 0, 1, 1, id_, info).encode()

    good = index_key("n", "good"), value("good", 1)
    bad = [
        (index_key("n", "torn"), value("torn", 2)[:-1]),
        (index_key("n", "short"), b"short"),
        (index_key("n", "none"), value("none", 3, b"\xc1")),
        (index_key("n", "other"), value("another", 4)),
        (b"\xff\0spoilt", value("spoilt", 5)),
    ]
    plan = rebuild.plan(NothingInspector(), [good, *bad], None, stocked=False)
    assert list(plan.records) == [good[0]]
    assert len(plan.left) == len(bad)
    assert all("cannot be read" in left.why for left in plan.left)
