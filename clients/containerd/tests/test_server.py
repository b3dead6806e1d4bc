"""The bridge as a process: its socket, its signals, its stop, and calls that somebody or something holds up."""

from __future__ import annotations

import itertools
import os
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from bridges import PROGRAM, REPLY_S, Bridge
from grpc import StatusCode

from tests.daemon import support
from tests.harness import Daemon

MEMORY = {"one": {"backend": "memory"}, "two": {"backend": "memory"}}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """A broker that needs no root."""
    with Daemon(MEMORY) as daemon:
        yield daemon


@pytest.fixture
def place(daemon: Daemon) -> Path:
    """A directory with a short path."""
    path = daemon.place / f"bridge-{time.monotonic_ns()}"
    path.mkdir()
    return path


def refused(socket_path: Path) -> tuple[int, str]:
    """Exit status and message of a bridge that cannot listen there."""
    done = subprocess.run(
        [PROGRAM, "--listen", socket_path], capture_output=True, text=True, timeout=REPLY_S, check=False
    )
    return done.returncode, done.stderr


def figures(bridge: Bridge, *, wanted: int = 1) -> dict[str, Any]:
    """What the bridge logs when it is asked."""
    assert bridge.process is not None
    bridge.process.send_signal(10)
    support.wait_until(lambda: len(bridge.events("statistics")) >= wanted, "the figures")
    return bridge.events("statistics")[-1]


def figures_at_rest(bridge: Bridge) -> dict[str, Any]:
    """The figures of the methods once no call is open: a caller has its answer a moment before its call has ended."""
    told: dict[str, Any] = {}
    numbers = itertools.count(1)

    def rests() -> bool:
        told.update(figures(bridge, wanted=next(numbers))["methods"])
        return not any(method["open"] for method in told.values())

    support.wait_until(rests, "calls that ended")
    return told


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_the_socket_has_its_mode(daemon: Daemon, place: Path, mode: int) -> None:
    with Bridge(place, daemon.endpoint, socket_mode=mode) as bridge:
        found = bridge.socket.stat()
        assert stat.S_IMODE(found.st_mode) == mode
        assert found.st_uid == os.geteuid()


def test_a_socket_that_is_left_over_is_replaced(daemon: Daemon, place: Path) -> None:
    with Bridge(place, daemon.endpoint) as bridge:
        bridge.kill()
        assert bridge.socket.is_socket()
        bridge.start()
        with bridge.client("one") as client:
            assert client.names() == []


def test_a_socket_that_is_used_is_not_taken(daemon: Daemon, place: Path) -> None:
    with Bridge(place, daemon.endpoint) as bridge:
        status, message = refused(bridge.socket)
        assert (status, "somebody listens" in message) == (5, True)
        with bridge.client("one") as client:
            assert client.names() == []


def test_a_file_is_not_taken_for_a_socket(place: Path) -> None:
    (place / "file").write_text("dear")
    assert refused(place / "file")[0] == 5
    assert (place / "file").read_text() == "dear"


def test_a_place_where_no_socket_can_be(place: Path) -> None:
    status, message = refused(place / "missing" / "socket")
    assert (status, "No such file or directory" in message) == (5, True)
    status, message = refused(place / ("x" * 200))
    assert (status, "shorter" in message) == (2, True)


def test_the_service_manager_is_told(daemon: Daemon, place: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(place / "notify"))
        manager.settimeout(REPLY_S)
        with Bridge(place, daemon.endpoint, environment={"NOTIFY_SOCKET": str(place / "notify")}):
            assert manager.recv(100) == b"READY=1"
        assert manager.recv(100) == b"STOPPING=1"


def test_it_tells_its_figures(daemon: Daemon, place: Path) -> None:
    with Bridge(place, daemon.endpoint, log_format="json") as bridge:
        with bridge.client("one") as client:
            assert client.names() == []
            with pytest.raises(grpc.RpcError):
                client.stat("nothing")
        told = figures_at_rest(bridge)
        assert told["Stat"] == told["Stat"] | {"calls": 1, "open": 0, "failures": {"not_found": 1}}
        assert told["List"] == told["List"] | {"calls": 1, "open": 0, "failures": {}}
        assert told.keys() == {"Stat", "List"}
        bridge.stop()
        assert bridge.events("stopped")[0]["methods"] == told


def test_a_stop_waits_for_what_is_under_way(daemon: Daemon, place: Path) -> None:
    with Bridge(place, daemon.endpoint, log_format="json") as bridge, bridge.client("one") as client:
        with support.paused(daemon, "one"):
            call = client.begin("Prepare", key="stopping")
            support.wait_until(lambda: bridge_open(bridge), "the call")
            assert bridge.process is not None
            bridge.process.terminate()
            support.wait_until(lambda: bridge.events("stopping"), "the stop")
        assert call.result(REPLY_S) is not None
        assert bridge.process.wait(REPLY_S) == 0
        bridge.process = None
    with daemon.client("one", "containerd") as broker:
        broker.remove("stopping")


def bridge_open(bridge: Bridge) -> bool:
    """Whether a call is under way there."""
    methods = figures(bridge, wanted=len(bridge.events("statistics")) + 1)["methods"]
    return any(method["open"] for method in methods.values())


def test_a_stop_does_not_wait_for_ever(daemon: Daemon, place: Path) -> None:
    with (
        Bridge(place, daemon.endpoint, log_format="json", server={"stop_grace_ms": 100}) as bridge,
        bridge.client("one") as client,
        support.paused(daemon, "one"),
    ):
        call = client.begin("Stat", key="key")
        support.wait_until(lambda: bridge_open(bridge), "the call")
        bridge.stop()
        assert call.exception(REPLY_S).code() in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)


def test_a_call_that_is_cancelled_is_taken_back(daemon: Daemon, place: Path) -> None:
    with Bridge(place, daemon.endpoint, log_format="json") as bridge, bridge.client("one") as client:
        with support.paused(daemon, "one"):
            call = client.begin("Stat", key="key")
            support.wait_until(lambda: bridge_open(bridge), "the call")
            call.cancel()
            support.wait_until(lambda: not bridge_open(bridge), "its end")
        told = figures(bridge, wanted=len(bridge.events("statistics")) + 1)
        assert told["methods"]["Stat"]["failures"] == {"cancelled": 1}
        assert told["broker"]["under_way"] == 0


def test_the_callers_deadline_holds(daemon: Daemon, place: Path) -> None:
    with Bridge(place, daemon.endpoint) as bridge, bridge.client("one") as client, support.paused(daemon, "one"):
        client.timeout = 0.2
        with pytest.raises(grpc.RpcError) as caught:
            client.stat("key")
        assert caught.value.code() == StatusCode.DEADLINE_EXCEEDED


def test_no_call_takes_for_ever(daemon: Daemon, place: Path) -> None:
    """C141: containerd sets no deadline; a snapshotter that hangs is answered for."""
    limits = {"call_timeout_ms": 200, "work_timeout_ms": 200}
    key = {"key": "hanging"}
    calls = {
        "Prepare": key, "View": key, "Mounts": key, "Commit": key | {"name": "name"}, "Remove": key, "Stat": key,
        "Update": {"info": {"name": "name"}}, "List": {}, "Usage": key, "Cleanup": {},
    }  # fmt: skip
    with Bridge(place, daemon.endpoint, calls=limits) as bridge, bridge.client("one") as client:
        assert client.names() == []
        with support.paused(daemon, "one"):
            for method, fields in calls.items():
                with pytest.raises(grpc.RpcError) as caught:
                    client.call(method, **fields)
                assert caught.value.code() == StatusCode.DEADLINE_EXCEEDED, method
                assert "within 0.2 s" in caught.value.details()
        # Each was taken back, or was done before it was: nobody knows, as the message says.
        client.clear()


def test_one_that_hangs_holds_up_nobody_else(daemon: Daemon, place: Path) -> None:
    with (
        Bridge(place, daemon.endpoint) as bridge,
        bridge.client("one") as hanging,
        bridge.client("two") as client,
    ):
        with support.paused(daemon, "one"):
            calls = [hanging.begin("Stat", key="key") for _ in range(100)]
            for number in range(10):
                client.prepare(f"key-{number}")
            client.clear()
            assert not any(call.done() for call in calls)
        assert all(call.exception(REPLY_S).code() == StatusCode.NOT_FOUND for call in calls)


def test_names_are_mapped(daemon: Daemon, place: Path) -> None:
    """C138; with a mapping no other name means anything."""
    names = {"fast": "one", "gone": "nobody"}
    with Bridge(place, daemon.endpoint, snapshotters=names) as bridge, bridge.client("fast") as client:
        client.prepare("key")
        with daemon.client("one", "containerd") as broker:
            assert [info.name for info in broker.walk()] == ["key"]
        client.remove("key")
        for name in ("one", "two", "snapbroker-one", "gone"):
            with pytest.raises(grpc.RpcError) as caught:
                client.call("Stat", key="key", snapshotter=name)
            assert caught.value.code() == StatusCode.INVALID_ARGUMENT
            assert caught.value.details().endswith("there are: fast")


def test_the_namespace_is_the_configured_one(daemon: Daemon, place: Path) -> None:
    """D14."""
    with Bridge(place, daemon.endpoint, namespace="node-7") as bridge, bridge.client("two") as client:
        client.prepare("key")
        with daemon.client("two", "node-7") as broker:
            assert broker.stat("key").name == "key"
        client.clear()


def test_a_broker_that_lost_a_snapshotter(place: Path) -> None:
    """A name that was good before the broker was started anew without it."""
    with Daemon(MEMORY) as own, Bridge(place, own.endpoint) as bridge, bridge.client("two") as client:
        assert client.names() == []
        own.snapshotters.pop("two")
        own.restart()
        with pytest.raises(grpc.RpcError) as caught:
            client.stat("key")
        assert caught.value.code() == StatusCode.INVALID_ARGUMENT
