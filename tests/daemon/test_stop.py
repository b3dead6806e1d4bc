"""Stopped: what was accepted is finished, what cannot be is taken back, and it takes five seconds at most.

`Daemon.stop` itself holds the daemon to that: exit status 0 in time, no process, socket or mount left behind.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import zmq

from snapbroker.errors import BrokerError, NotFound, Unavailable
from snapbroker.protocol import (
    REQUEST_VERSION,
    Events,
    EventsPage,
    MountsAnswer,
    Prepare,
    Progress,
    Request,
    Stat,
    encode,
)
from tests.daemon import support
from tests.daemon.support import Bystander, Load, wait_until
from tests.harness import READY_S, STOP_S, Daemon, Wire, is_ended

QUICK_S = 3.0
"""A stop with nothing to wait for; half of it is the machine's."""

StartDaemon = Callable[..., Daemon]


def stopped_within(daemon: Daemon) -> float:
    """Stop it; answers how long that took, in seconds."""
    begun = time.monotonic()
    daemon.stop()
    return time.monotonic() - begun


def end(daemon: Daemon, *numbers: signal.Signals) -> None:
    """Send these signals, one after the other; it must end in time with exit status 0, and its actors with it."""
    assert daemon.process is not None
    family = psutil.Process(daemon.process.pid).children(recursive=True)
    for number in numbers:
        daemon.process.send_signal(number)
    assert daemon.process.wait(STOP_S) == 0
    daemon.process = None
    wait_until(lambda: all(map(is_ended, family)), "the end of its actors", timeout=1)


# What was accepted.


@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_under_load_finishes_what_was_accepted(start_daemon: StartDaemon, number: signal.Signals) -> None:
    daemon = start_daemon({"overlayfs": {"backend": "overlayfs"}})
    with Load(daemon, "overlayfs") as load:
        load.start()
        load.wait_for_calls(200)
        end(daemon, number)
        failures = load.stop()
    assert failures, "the workers were still calling"
    doubtful = [error.message for _, _, error in failures if support.is_doubtful(error)]
    assert doubtful == [], "accepted, and never answered"
    daemon.start()
    with daemon.client("overlayfs") as broker:
        infos = load.ledger.check(broker)
        support.check_journal(broker, infos)
    support.check_disk(daemon, "overlayfs")


@pytest.mark.root
def test_a_stop_takes_back_a_long_copy_and_leaves_nothing_of_it(start_daemon: StartDaemon) -> None:
    limits = {"service": {"progress_interval_ms": 5, "stop_grace_ms": 50}}
    daemon = start_daemon({"native": {"backend": "native", "limits": limits}})
    with daemon.client("native") as broker:
        (mount,) = broker.prepare("making")
        support.make_tree(Path(mount.source), 10_000, 32_000)
        broker.commit("tree", "making")
    place = daemon.root_of("native") / "snapshots"
    copy = Prepare(key="copy", parent="tree")
    with daemon.wire("native") as wire:
        parts = wire.parts(wire.send(copy), [copy])
        _, progress = next(parts)
        assert isinstance(progress, Progress)
        daemon.stop()
        outcomes = [result for _, result in parts if not isinstance(result, Progress)]
    # Not cancelled: it was not the caller who took it back, and it may be repeated.
    assert [type(outcome) for outcome in outcomes] == [Unavailable]
    assert len(list(place.iterdir())) == 1
    daemon.start()
    with daemon.client("native") as broker, pytest.raises(NotFound):
        broker.stat("copy")


def gated(tmp_path: Path, **limits: dict[str, int]) -> dict[str, object]:
    """The section of a snapshotter whose work waits."""
    return {"backend": "gated", "options": {"gates": str(tmp_path)}, "limits": limits}


def begin_prepare(wire: Wire, tmp_path: Path, key: str, **labels: str) -> bytes:
    """Send a prepare that waits at a gate of its own name, and wait until it does."""
    number = wire.send(Prepare(key=key, labels={"gate": key, **labels}))
    wait_until((tmp_path / f"{key}.waiting").exists, "the backend's work")
    return number


def test_a_stop_waits_for_work_that_ends_in_time(
    start_daemon: StartDaemon, plugins: dict[str, str], tmp_path: Path
) -> None:
    daemon = start_daemon({"gated": gated(tmp_path)}, environment=plugins)
    with daemon.wire("gated") as wire, daemon.wire("gated") as late:
        number = begin_prepare(wire, tmp_path, "slow")
        daemon.kill(signal.SIGTERM)
        wait_until(lambda: refused_as_stopping(late), "stopping")
        (tmp_path / "slow").touch()
        results = [result for _, result in wire.parts(number, [Prepare(key="")]) if not isinstance(result, Progress)]
        assert [type(result) for result in results] == [MountsAnswer]
        assert daemon.process is not None
        assert daemon.process.wait(STOP_S) == 0
        daemon.process = None
    daemon.start()
    with daemon.client("gated") as broker:
        assert broker.stat("slow").name == "slow"


def refused_as_stopping(wire: Wire) -> bool:
    """Whether a call is refused because the broker stops."""
    try:
        wire.one(Stat(key="slow"))
    except Unavailable as error:
        return "stopping" in error.message
    except BrokerError:
        return False
    return False


def test_a_stop_does_not_wait_for_work_that_does_not_listen(
    unstarted_daemon: StartDaemon, plugins: dict[str, str], tmp_path: Path
) -> None:
    daemon = unstarted_daemon({"gated": gated(tmp_path)}, environment=plugins).start()
    with daemon.wire("gated") as wire:
        number = begin_prepare(wire, tmp_path, "deaf", deaf="yes")
        end(daemon, signal.SIGTERM)
        with pytest.raises(BrokerError) as caught:
            list(wire.parts(number, [Prepare(key="")]))
    assert support.is_doubtful(caught.value)
    (tmp_path / "deaf").touch()
    daemon.start()
    with daemon.client("gated") as broker, pytest.raises(NotFound):
        broker.stat("deaf")
    end(daemon, signal.SIGTERM)


def test_a_stop_ends_those_who_follow(start_daemon: StartDaemon) -> None:
    daemon = start_daemon({"memory": {"backend": "memory"}})
    follow = Events(since=0, follow=True)
    with daemon.wire("memory") as wire, daemon.client("memory") as broker:
        number = wire.send(follow, timeout_ms=3_600_000)
        parts = wire.parts(number, [follow])
        broker.prepare("one")
        _, page = next(parts)
        assert isinstance(page, EventsPage)
        assert [event.key for event in page.events] == ["one"]
        assert stopped_within(daemon) < QUICK_S
        rest = [result for _, result in parts]
    assert all(isinstance(page, EventsPage) and not page.events for page in rest)


# Whatever state it is in.


def test_a_stop_does_not_wait_for_a_back_off(start_daemon: StartDaemon) -> None:
    daemon = start_daemon({"memory": {"backend": "memory"}}, supervisor={"backoff_initial_ms": 9000})
    daemon.kill(actor="memory")
    assert daemon.actor("memory").state == "unavailable"
    assert stopped_within(daemon) < QUICK_S


def test_a_stop_does_not_wait_for_an_actor_that_is_starting(
    unstarted_daemon: StartDaemon, plugins: dict[str, str], tmp_path: Path
) -> None:
    section = gated(tmp_path)
    section["options"] = {"gates": str(tmp_path), "open_gate": "open"}
    daemon = unstarted_daemon({"gated": section}, environment=plugins)
    daemon.start(wait=False)
    wait_until((tmp_path / "open.waiting").exists, "the start of the backend")
    assert daemon.actor("gated").state == "starting"
    assert stopped_within(daemon) < QUICK_S


def test_a_stop_with_an_actor_that_does_not_answer(unstarted_daemon: StartDaemon) -> None:
    sections = {"memory": {"backend": "memory"}, "other": {"backend": "memory"}}
    daemon = unstarted_daemon(sections, supervisor={"stop_timeout_ms": 1000}).start()
    with daemon.client("other") as broker:
        broker.prepare("kept")
    with support.paused(daemon, "memory"):
        end(daemon, signal.SIGTERM)
    daemon.start()
    with daemon.client("other") as broker:
        broker.stat("kept")
    end(daemon, signal.SIGTERM)


# The service manager.


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket that a service manager listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(STOP_S)
        yield listener


def test_the_service_manager_is_told(
    unstarted_daemon: StartDaemon, plugins: dict[str, str], tmp_path: Path, manager: socket.socket
) -> None:
    section = gated(tmp_path)
    section["options"] = {"gates": str(tmp_path), "open_gate": "open"}
    environment = {**plugins, "NOTIFY_SOCKET": str(tmp_path / "notify")}
    daemon = unstarted_daemon({"gated": section, "memory": {"backend": "memory"}}, environment=environment)
    daemon.start(wait=False)
    wait_until((tmp_path / "open.waiting").exists, "the start of the backend")
    daemon.wait_for(lambda status: "ready" in {actor.state for actor in status.snapshotters})
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(100)
    manager.settimeout(STOP_S)
    (tmp_path / "open").touch()
    assert manager.recv(100) == b"READY=1"
    with daemon.client("gated") as broker:
        broker.prepare("served-when-told")
    daemon.stop()
    assert manager.recv(100) == b"STOPPING=1"


def test_an_abstract_socket_is_told_too(unstarted_daemon: StartDaemon) -> None:
    name = f"snapbroker-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        listener.settimeout(STOP_S)
        daemon = unstarted_daemon({"memory": {"backend": "memory"}}, environment={"NOTIFY_SOCKET": f"@{name}"})
        daemon.start()
        assert listener.recv(100) == b"READY=1"
        daemon.stop()


def test_a_service_manager_that_is_gone_is_no_reason_to_fail(unstarted_daemon: StartDaemon, tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "nobody")}
    daemon = unstarted_daemon({"memory": {"backend": "memory"}}, environment=environment)
    daemon.start()
    with daemon.client("memory") as broker:
        broker.prepare("served")
    daemon.stop()


# A second daemon.


def second(first: Daemon, name: str, *, root: Path, runtime: Path, endpoint: str = "") -> subprocess.Popen[str]:
    """Start a daemon beside the first one; it is expected to end by itself."""
    config = first.place / f"{name}.toml"
    head = f'endpoint = "{endpoint}"\n' if endpoint else ""
    config.write_text(f'{head}[snapshotters.memory]\nbackend = "memory"\n')
    program = Path(sys.executable).with_name("snapbrokerd")
    command: list[str | Path] = [program, "--config", config, "--root", root, "--runtime", runtime]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=first.place)


def refusal_of(process: subprocess.Popen[str]) -> str:
    """The last thing it says before it ends, refused."""
    try:
        _, errors = process.communicate(timeout=READY_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 5, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("snapbrokerd: ")
    return last


@pytest.fixture
def first(start_daemon: StartDaemon) -> Daemon:
    """A daemon that serves already."""
    return start_daemon({"memory": {"backend": "memory"}})


def test_a_second_daemon_is_refused_and_the_first_notices_nothing(first: Daemon) -> None:
    place = first.place
    pids = [first.pid, first.actor("memory").pid]
    with Bystander(first, "memory") as bystander:
        others = [
            second(first, "same-root", root=first.root, runtime=place / "run-1"),
            second(first, "same-runtime", root=place / "root-2", runtime=first.runtime),
            second(first, "same-endpoint", root=place / "root-3", runtime=place / "run-3", endpoint=first.endpoint),
        ]
        refusals = [refusal_of(process) for process in others]
        bystander.wait_for_rounds()
        # Who comes after them finds the first one as well.
        with first.client("memory", "bystander") as broker:
            broker.prepare("newcomer")
    places = [str(first.root), str(first.runtime), str(first.runtime / "router.sock")]
    assert [where for where, refusal in zip(places, refusals, strict=True) if where not in refusal] == []
    assert [first.pid, first.actor("memory").pid] == pids


@pytest.mark.parametrize("name", ["router.sock", "events.sock"])
def test_a_file_in_the_place_of_a_socket_is_left_alone(first: Daemon, name: str) -> None:
    runtime = first.place / "occupied"
    runtime.mkdir()
    (runtime / name).write_text("precious")
    assert str(runtime / name) in refusal_of(second(first, "occupied", root=first.place / "other", runtime=runtime))
    assert (runtime / name).read_text() == "precious"


def test_the_sockets_of_a_killed_daemon_are_taken_over(start_daemon: StartDaemon) -> None:
    daemon = start_daemon({"memory": {"backend": "memory"}})
    left = set(os.listdir(daemon.runtime))
    for _ in range(2):
        daemon.kill()
        assert {"router.sock", "events.sock"} <= set(os.listdir(daemon.runtime))
        daemon.start()
    assert set(os.listdir(daemon.runtime)) == left, "the killed ones left something for good"
    with daemon.client("memory") as broker, broker.events(since=None) as events:
        broker.prepare("served")
        event = events.poll(STOP_S)
        assert event is not None
        assert event.key == "served"


def test_a_caller_outlives_a_restart(first: Daemon) -> None:
    with first.client("memory", connect_timeout=STOP_S) as broker:
        broker.prepare("before")
        first.restart()
        deadline = time.monotonic() + STOP_S
        while True:
            try:
                broker.prepare("after")
                break
            except Unavailable:
                assert time.monotonic() < deadline


def test_a_second_signal_changes_nothing(start_daemon: StartDaemon, plugins: dict[str, str], tmp_path: Path) -> None:
    daemon = start_daemon({"gated": gated(tmp_path)}, environment=plugins)
    with daemon.wire("gated") as wire, daemon.wire("gated") as late:
        number = begin_prepare(wire, tmp_path, "slow")
        daemon.kill(signal.SIGTERM)
        wait_until(lambda: refused_as_stopping(late), "stopping")
        daemon.kill(signal.SIGTERM)
        daemon.kill(signal.SIGINT)
        assert refused_as_stopping(late)
        (tmp_path / "slow").touch()
        results = [result for _, result in wire.parts(number, [Prepare(key="")]) if not isinstance(result, Progress)]
    assert [type(result) for result in results] == [MountsAnswer]
    end(daemon)


def test_requests_without_end_do_not_keep_it_from_stopping(first: Daemon) -> None:
    halt = threading.Event()
    body = encode(Request(calls=(Stat(key="nothing"),), namespace="default"))

    def flood() -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket_:
            socket_.linger = 0
            socket_.connect(first.endpoint)
            for number in itertools.count(1):
                if halt.is_set():
                    return
                with contextlib.suppress(zmq.Again):
                    socket_.send_multipart((REQUEST_VERSION, b"%d" % number, b"memory", body), zmq.NOBLOCK)
                with contextlib.suppress(zmq.Again):
                    socket_.recv_multipart(zmq.NOBLOCK)

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        wait_until(lambda: first.status().queues["mailbox.memory"]["served"] > 2000, "a flood")
        assert stopped_within(first) < STOP_S
    finally:
        halt.set()
        flooding.join()


@pytest.mark.root
def test_an_actor_that_does_not_stop_is_killed_with_its_children_before_the_daemon_ends(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon({"overlayfs": {"backend": "overlayfs"}}, supervisor={"stop_timeout_ms": 100})
    family = daemon.forked()
    assert {"overlayfs", "overlayfs, pool"} < family.keys()
    for title in ("overlayfs", "overlayfs, pool"):
        family[title].suspend()
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(STOP_S) == 0
    daemon.process = None
    assert [title for title, process in family.items() if not is_ended(process)] == []
