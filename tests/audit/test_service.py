"""Audits, repairs and whys of a daemon that serves: what is under way, mounts, pages, clients and commands."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.main import main as snapbrokerd
from snapbroker import aio, mount
from snapbroker.command import main as snapbroker
from snapbroker.errors import InvalidArgument, Unavailable, Unimplemented
from snapbroker.protocol import Audit, AuditPage, Finding, Remove, Repair, Stat, Why
from tests.daemon import support
from tests.harness import Daemon, audit_clean, findings

pytestmark = pytest.mark.root

DISK = ("overlayfs", "native", "btrfs")
REF = "containerd.io/snapshot.ref"


@pytest.fixture(scope="module")
def served(btrfs: Path) -> Iterator[Daemon]:
    """A daemon with a snapshotter of every backend; each test leaves it as clean as it was."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in ("memory", *DISK)}
    sections["btrfs"] = {"root": str(btrfs / "audited")}
    with Daemon(sections) as daemon:
        yield daemon


def kinds(found: list[dict[str, Any]]) -> set[str]:
    return {each["kind"] for each in found if each["severity"] != "note"}


@pytest.mark.parametrize("name", DISK)
def test_what_is_under_way_is_no_finding(served: Daemon, name: str) -> None:
    with support.Load(served, name) as load:
        load.start()
        for calls in range(20, 120, 20):
            load.wait_for_calls(calls)
            found = [each for each in findings(served, name) if each["severity"] != "note"]
            assert found == []
        load.stop()
    with served.client(name) as broker:
        broker.cleanup()
    audit_clean(served)


@pytest.mark.parametrize("name", DISK)
def test_a_mount_that_outlives_its_snapshot(served: Daemon, name: str, tmp_path: Path) -> None:
    with served.client(name, "mounted") as broker:
        broker.prepare("base-making")
        broker.commit("base", "base-making")
        mounts = broker.prepare("job", "base")
        mount.all(mounts, tmp_path)
        try:
            (use,) = broker.why("job").mounts
            assert (use.point, use.pid) == (str(tmp_path), os.getpid()) or use.pid > 0
            if name == "overlayfs":
                assert [found.point for found in broker.why("base").mounts] == [str(tmp_path)], "as a layer"
            broker.remove("job")
            (told,) = [each for each in findings(served, name) if each["kind"] == "mount"]
            assert told["path"] == str(tmp_path)
        finally:
            subprocess.run(["umount", tmp_path], check=True)
        broker.cleanup()
        broker.remove("base")
    assert kinds(findings(served, name)) == set()


@pytest.mark.parametrize("name", ["overlayfs", "native"])
def test_files_that_cannot_be_deleted(served: Daemon, name: str) -> None:
    with served.client(name, "stuck") as broker:
        directory = support.directory_of(served, name, broker.prepare("job"))
        (directory / "inside").mkdir()
        # Nothing is deleted through a mount.
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory / "inside"], check=True)
        broker.remove("job")
        try:
            served.wait_for(lambda _: served.actor(name).backlog["failed"])
            (told,) = [each for each in findings(served, name) if each["kind"] == "trash-stuck"]
            assert told["size"] > 0
            assert told["time"] > 0
            assert told["message"].startswith("1 of 1 entries of the trash cannot be deleted")
        finally:
            for target in served.mounts():
                subprocess.run(["umount", target], check=True)
        broker.cleanup()
    assert kinds(findings(served, name)) == set()


def test_why_names_what_keeps_a_snapshot_and_what_became_of_it(served: Daemon) -> None:
    with served.client("memory", "why") as broker:
        broker.prepare("making")
        broker.commit("base", "making", labels={REF: "layer"})
        for number in range(3):
            broker.prepare(f"child-{number}", "base")
        answer = broker.why("base")
        assert answer.info == broker.stat("base")
        assert (answer.children, answer.children_count) == (("child-0", "child-1", "child-2"), 3)
        assert answer.references == ("layer",)
        assert [(event.verb, event.key) for event in answer.events] == [("commit", "making")]
        gone = broker.why("making")
        assert gone.info is None
        assert [(event.verb, event.key) for event in gone.events] == [("commit", "making"), ("prepare", "making")]
        broker.update("child-0", {"a": "b"})
        broker.remove("child-0")
        assert [event.verb for event in broker.why("child-0").events] == ["remove", "update", "prepare"]
        never = broker.why("never")
        assert (never.info, never.events, never.holds) == (None, (), ())
        assert never.oldest >= 1
        broker.prepare("child-0", "base")
        assert [event.verb for event in broker.why("child-0").events] == ["prepare"], "the other one was another"
        for key in ("child-0", "child-1", "child-2", "base"):
            broker.remove(key)


@pytest.mark.parametrize("name", DISK)
def test_why_names_a_mount_in_another_namespace(served: Daemon, name: str, tmp_path: Path) -> None:
    """As a container has it, also to an actor that may not ask which namespace a process is in."""
    command = [str(Path(sys.executable).with_name("snapbroker")), "-e", served.endpoint, "-s", name, "mount"]
    script = '"$@" >&2 && echo mounted && read -r end'
    with served.client(name) as broker:
        broker.prepare("elsewhere")
        container = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script, "sh", *command, "elsewhere", str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with container:
            assert container.stdout is not None
            assert container.stdout.readline() == b"mounted\n"
            (use,) = broker.why("elsewhere").mounts
            assert (use.point, use.pid) == (str(tmp_path), container.pid)
            container.communicate(b"end\n")
        assert broker.why("elsewhere").mounts == ()
        broker.remove("elsewhere")


@contextlib.contextmanager
def strangers(daemon: Daemon, name: str, count: int) -> Iterator[set[str]]:
    """Files that are not named like snapshots."""
    places = [daemon.root_of(name) / "snapshots" / f"stranger-{number}" for number in range(count)]
    for place in places:
        place.touch()
    try:
        yield {str(place) for place in places}
    finally:
        for place in places:
            place.unlink()


def test_pages_and_credit(served: Daemon) -> None:
    with strangers(served, "native", 7) as wanted, served.wire("native", "pages") as wire:
        for execute in (None, False, True):
            after, pages = "", []
            while True:
                call = Audit(after=after, page=2, credit=2)
                if execute is not None:
                    call = Repair(execute=execute, after=after, page=2, credit=2)
                got: list[AuditPage] = wire.pages(call)
                assert len(got) <= 2
                pages += got
                after = got[-1].next
                if not after:
                    break
            assert all(len(page.findings) <= 2 for page in pages)
            found: list[Finding] = [finding for page in pages for finding in page.findings]
            assert sorted(finding.path for finding in found if finding.kind == "stranger") == sorted(wanted)
            assert pages[-1].looked > 0


@pytest.mark.parametrize(
    "call",
    [
        Audit(page=0),
        Audit(credit=0),
        Audit(page=10_001),
        Repair(credit=1025),
        Audit(after="x"),
        Audit(after="trash/-1"),
    ],
)
def test_what_makes_no_sense_is_refused(served: Daemon, call: Audit | Repair) -> None:
    with served.wire("memory", "refused") as wire, pytest.raises(InvalidArgument):
        wire.one(call)


@pytest.mark.parametrize("call", [Audit(), Repair(), Why(key="a")])
def test_not_part_of_an_atomic_request(served: Daemon, call: Audit | Repair | Why) -> None:
    with served.wire("memory", "refused") as wire, pytest.raises(Unimplemented):
        wire.call(Stat(key="a"), call, atomic=True)


def test_no_more_than_allowed_at_a_time(served: Daemon) -> None:
    with served.wire("overlayfs", "many") as wire:
        results = wire.call(*(Audit() for _ in range(20)), Remove(key="none"))
    codes = [getattr(result, "code", "") for result in results]
    assert codes.count("resource_exhausted") == 18
    assert codes[-1] == "not_found"


async def test_the_asyncio_client(served: Daemon) -> None:
    with strangers(served, "native", 3) as wanted:
        async with aio.connect(served.endpoint, snapshotter="native", namespace="async") as broker:
            audit = broker.audit()
            assert {finding.path async for finding in audit if finding.kind == "stranger"} == wanted
            assert audit.looked > 0
            assert {finding.path async for finding in broker.repair() if finding.kind == "stranger"} == wanted
            assert not [finding async for finding in broker.repair(execute=True) if finding.mended]
            assert (await broker.why("none")).info is None


def test_the_commands(served: Daemon, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    here = ["-e", served.endpoint, "-s", "native", "-n", "commands"]
    with served.client("native", "commands") as broker:
        broker.prepare("making")
        broker.commit("base", "making")
        broker.prepare("child", "base")
    assert snapbroker([*here, "audit"]) == 0
    assert capsysbinary.readouterr().out.splitlines()[-1].endswith(b" 0 errors, 0 warnings, 0 notes")
    left = served.root_of("native") / "snapshots" / "50000"
    left.mkdir()
    assert snapbroker([*here, "audit", "--repair"]) == 20
    out = capsysbinary.readouterr().out.decode()
    assert "warning: leftover: no record has" in out
    assert "repair would: put it into the trash" in out
    assert left.exists()
    assert snapbroker([*here, "--json", "audit", "--repair", "--yes"]) == 0
    told, *_, summary = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    assert (told["kind"], told["mended"], told["snapshotter"]) == ("leftover", True, "native")
    assert told["age_seconds"] >= 0
    assert summary["summary"]["mended"] == 1
    assert not left.exists()
    assert snapbroker([*here, "why", "base"]) == 0
    out = capsysbinary.readouterr().out.decode()
    assert "base is committed" in out
    assert "    child child" in out
    assert snapbroker([*here, "--json", "why", "making"]) == 0
    answer = json.loads(capsysbinary.readouterr().out)
    assert answer["info"] is None
    assert [event["verb"] for event in answer["events"]] == ["commit", "prepare"]
    with pytest.raises(SystemExit):
        snapbroker([*here, "audit", "--yes"])
    with served.client("native", "commands") as broker:
        broker.remove("child")
        broker.remove("base")
        broker.cleanup()


def test_a_root_that_is_served_is_refused(served: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("audit", "rebuild"):
        assert snapbrokerd([verb, "--config", str(served.config_file), "native"]) == 5
        assert "a snapbrokerd serves" in capsys.readouterr().err
    assert snapbrokerd(["audit", "--config", str(served.config_file), "nobody"]) == 3
    assert "no snapshotter 'nobody'" in capsys.readouterr().err


def test_a_stop_does_not_wait_for_an_audit(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon({"memory": {}})
    with daemon.client("memory") as broker, broker.batch() as batch:
        for number in range(1000):
            batch.prepare(f"job-{number}")
    begun, ended = threading.Event(), []

    def audit_on_and_on() -> None:
        with daemon.client("memory", patience=0) as broker:
            try:
                while True:
                    list(broker.audit())
                    begun.set()
            except Unavailable as error:
                ended.append(error)

    thread = threading.Thread(target=audit_on_and_on)
    thread.start()
    assert begun.wait(30)
    daemon.stop()
    thread.join(30)
    assert len(ended) == 1
