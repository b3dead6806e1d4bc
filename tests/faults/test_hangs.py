"""Threads and processes that stand still while their actor goes on to answer: told, given up, and started anew."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import psutil
import pytest

from snapbroker.errors import BrokerError, NotFound, Unavailable
from snapbroker.protocol import MountsAnswer, Prepare
from tests.daemon.support import Bystander, is_doubtful, queue_of, wait_until
from tests.harness import Daemon, Wire, is_ended, loop_filesystem

PROGRESS_MAX_MS = 2000
SILENCE_MAX_MS = 4000
STILL_TOLD_MS = 500
StartDaemon = Callable[..., Daemon]


def start(start_daemon: StartDaemon, **section: Any) -> Daemon:
    limits = {"still_told_ms": STILL_TOLD_MS, **section.pop("limits", {})}
    return start_daemon(
        {"hurt": {"backend": "overlayfs", "limits": limits, **section}, "memory": {"backend": "memory"}},
        supervisor={"progress_max_ms": PROGRESS_MAX_MS, "silence_max_ms": SILENCE_MAX_MS},
    )


@contextlib.contextmanager
def database_locked(daemon: Daemon) -> Iterator[None]:
    """Hold the lock of the database's writer, as a process does that hangs in a transaction."""
    environment = lmdb.open(str(daemon.root_of("hurt") / "metadata"), max_dbs=16)
    try:
        with environment.begin(write=True):
            yield
    finally:
        environment.close()


def error_of(wire: Wire, number: bytes, call: Any) -> BrokerError:
    with pytest.raises(BrokerError) as caught:
        list(wire.parts(number, (call,)))
    return caught.value


def test_a_writer_that_stands_still_is_given_up_though_its_loop_answers(start_daemon: StartDaemon) -> None:
    daemon = start(start_daemon)
    with daemon.client("hurt") as broker, daemon.wire("hurt") as wire, Bystander(daemon, "memory"):
        broker.prepare("kept")
        with database_locked(daemon):
            call = Prepare(key="stuck")
            number = wire.send(call, timeout_ms=100)
            daemon.wait_for(lambda status: queue_of(status, "hurt", "watch").get("writer_ms"))
            # Reads go on, and its reports come.
            assert broker.stat("kept").name == "kept"
            error = error_of(wire, number, call)
            assert isinstance(error, Unavailable)
            assert is_doubtful(error)
        daemon.wait_ready()
        assert broker.stat("kept").name == "kept"
        with pytest.raises(NotFound):
            broker.stat("stuck")
        broker.prepare("stuck")
    log = daemon.log()
    assert '"thread": "writer"' in log
    assert "an actor stands still and is killed" in log
    # Told before, with the place in the code; and once more by the process itself, of all its threads.
    assert '"what": "writer"' in log
    assert "Thread 0x" in log
    assert daemon.actor("hurt").restarts == 1


@pytest.mark.root
def test_whoever_waits_is_told_before_a_disk_lets_go_of_the_process(start_daemon: StartDaemon) -> None:
    """A frozen filesystem keeps a thread in the kernel, where nothing kills it; that of the loop too, once it reads."""
    with loop_filesystem("ext4", 128 << 20, "-m", "0") as disk:
        daemon = start(start_daemon, root=str(disk / "root"))
        with daemon.client("hurt") as broker, daemon.wire("hurt") as wire, Bystander(daemon, "memory") as bystander:
            broker.prepare("kept")
            pid = daemon.actor("hurt").pid
            subprocess.run(["fsfreeze", "--freeze", disk], check=True)
            try:
                call = Prepare(key="stuck")
                error = error_of(wire, wire.send(call), call)
                assert isinstance(error, Unavailable)
                with pytest.raises(Unavailable):
                    wire.one(call)
                assert psutil.pid_exists(pid)
                bystander.wait_for_rounds()
            finally:
                subprocess.run(["fsfreeze", "--unfreeze", disk], check=True)
            daemon.wait_ready()
            assert daemon.actor("hurt").pid != pid
            assert broker.stat("kept").name == "kept"
            broker.prepare("after")
        daemon.stop()


@pytest.mark.root
def test_a_call_that_stands_still_before_it_made_anything_is_told(start_daemon: StartDaemon) -> None:
    with loop_filesystem("ext4", 128 << 20, "-m", "0") as disk:
        daemon = start(start_daemon, backend="native", root=str(disk / "root"), metadata=str(disk.parent / "metadata"))
        with daemon.wire("hurt") as wire:
            call = Prepare(key="stuck")
            subprocess.run(["fsfreeze", "--freeze", disk], check=True)
            try:
                number = wire.send(call)
                wait_until(lambda: '"what": "create of snapshot' in daemon.log(), "it is told")
            finally:
                subprocess.run(["fsfreeze", "--unfreeze", disk], check=True)
            assert isinstance(list(wire.parts(number, (call,)))[-1][1], MountsAnswer)
            wait_until(lambda: "it goes on" in daemon.log(), "it is told")
        assert daemon.actor("hurt").restarts == 0
        daemon.stop()


def test_a_deletion_that_stands_still_is_told_and_holds_up_nobody(start_daemon: StartDaemon) -> None:
    daemon = start(start_daemon)
    with daemon.client("hurt") as broker:
        broker.prepare("first")
        broker.remove("first")
        broker.cleanup()
        deleter = daemon.forked()["hurt, deleter"]
        deleter.suspend()
        try:
            broker.prepare("second")
            broker.remove("second")
            wait_until(lambda: '"what": "trash"' in daemon.log(), "it is told")
            daemon.wait_for(lambda status: queue_of(status, "hurt", "watch")["trash_ms"] > PROGRESS_MAX_MS)
            with Bystander(daemon, "hurt"):
                assert daemon.actor("hurt").backlog["entries"] >= 1
        finally:
            deleter.resume()
        broker.cleanup()
        wait_until(lambda: "it goes on" in daemon.log(), "it is told")
    assert daemon.actor("hurt").restarts == 0


def test_a_pool_that_stands_still_is_given_up(start_daemon: StartDaemon) -> None:
    # With a second one the calls would be answered, and only the log would tell.
    daemon = start(start_daemon, limits={"pool": {"pool_min": 2, "pool_max": 2, "stockers": 1}})
    with daemon.wire("hurt") as wire, Bystander(daemon, "memory"):
        stocker = daemon.forked()["hurt, pool"]
        stocker.suspend()
        calls = tuple(Prepare(key=f"k{number}") for number in range(8))
        number = wire.send(*calls)
        made = []
        with pytest.raises(Unavailable):
            made += list(wire.parts(number, calls))
        daemon.wait_ready()
        assert '"thread": "pool"' in daemon.log()
        results = wire.call(*(Prepare(key=f"after{number}") for number in range(8)))
        assert {type(result) for result in results} == {MountsAnswer}
        # Its end is what counts: who has inherited it may reap it later.
        wait_until(lambda: is_ended(stocker), "its child has ended")


def test_the_service_manager_hears_that_the_loop_turns(unstarted_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(20)
        environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "1000000"}
        daemon = unstarted_daemon({"memory": {"backend": "memory"}}, environment=environment)
        daemon.start()
        heard = {manager.recv(100) for _ in range(8)}
        assert heard == {b"READY=1", b"WATCHDOG=1"}
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            manager.settimeout(3)
            while heard_in_time(manager):
                continue
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        manager.settimeout(20)
        assert manager.recv(100) == b"WATCHDOG=1"
        daemon.stop()


def heard_in_time(manager: socket.socket) -> bool:
    with contextlib.suppress(TimeoutError):
        return bool(manager.recv(100))
    return False
