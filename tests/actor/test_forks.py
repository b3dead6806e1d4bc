"""The fork server: births and ends are told, signals reach whom they are for, nobody outlives who asked for it."""

from __future__ import annotations

import errno
import select
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import anyio
import psutil
import pytest

from broker.actor.forks import LOST, Child, Forks, ForkServerProcess
from tests.daemon.support import wait_until
from tests.harness import is_ended

MODULE = "tests.actor.forked"
WAIT_S = 20.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServerProcess]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    server = ForkServerProcess(MODULE)
    yield server
    anyio.run(server.close)


@pytest.fixture
def forks(server: ForkServerProcess) -> Forks:
    return server.launch()


def ended(child: Child) -> int:
    assert select.select([child.line], [], [], WAIT_S)[0], "its end is told"
    return child.wait()


def echoing(forks: Forks) -> tuple[Child, socket.socket, int]:
    """A process that lives until its line ends, the line, and how many descriptors it has."""
    ours, theirs = socket.socketpair()
    ours.settimeout(WAIT_S)
    with theirs:
        child = forks.start("echo", 0, theirs.fileno())
    return child, ours, int(ours.recv(100))


def family(forks: Forks, number: int) -> tuple[Child, list[psutil.Process], tuple[socket.socket, socket.socket]]:
    """A process with children of its own; they live while their lines, the last, are open."""
    (near, far), (ours, theirs) = socket.socketpair(), socket.socketpair()
    ours.settimeout(WAIT_S)
    with far, theirs:
        child = forks.start("parent", number, far.fileno(), theirs.fileno())
    return child, [psutil.Process(int(pid)) for pid in ours.recv(1000).split()], (near, ours)


def test_a_birth_and_an_end_are_told(forks: Forks) -> None:
    children = [forks.start("leave", number) for number in range(8)]
    assert len({child.pid for child in children}) == len(children)
    assert [ended(child) for child in children] == list(range(8))
    assert all(child.line.fileno() == -1 for child in children)


def test_what_raises_says_where_and_fails(server: ForkServerProcess, capfd: pytest.CaptureFixture[str]) -> None:
    assert ended(server.launch().start("fail", 77)) == 1
    assert "ValueError: 77" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_is_the_end(forks: Forks, number: signal.Signals) -> None:
    child, line, _ = echoing(forks)
    with line:
        child.send_signal(number)
        assert ended(child) == -number
        child.send_signal(number)
        child.kill()


def test_a_child_has_nothing_of_another(forks: Forks) -> None:
    (first, line, before), (second, other, after) = echoing(forks), echoing(forks)
    with line, other:
        assert before == after == 6, "its three, what it was given, its connection, and that by which it looks"
        line.shutdown(socket.SHUT_WR)
        assert ended(first) == 0, "nobody else has its line"
        other.sendall(b"still there")
        assert other.recv(100) == b"still there"
        other.shutdown(socket.SHUT_WR)
        assert ended(second) == 0


@pytest.mark.parametrize("stopped", [False, True])
def test_children_go_with_who_asked_for_them(forks: Forks, stopped: bool) -> None:
    child, children, lines = family(forks, 3)
    bystander, line, _ = echoing(forks)
    with line, lines[0], lines[1]:
        if stopped:
            children[0].suspend()
        child.kill()
        assert ended(child) == -signal.SIGKILL
        wait_until(lambda: all(is_ended(process) for process in children), "their end")
        line.sendall(b"untouched")
        assert line.recv(100) == b"untouched"
        bystander.kill()
        ended(bystander)


def test_all_go_with_the_fork_server_and_another_one_takes_its_place(server: ForkServerProcess) -> None:
    first = server.launch()
    child, children, lines = family(first, 2)
    with lines[0], lines[1]:
        server.kill()
        assert ended(child) == LOST
        wait_until(lambda: all(is_ended(process) for process in children), "their end")
    wait_until(lambda: server.launch() is not first, "another one")
    assert ended(server.launch().start("leave", 5)) == 5
    with pytest.raises(OSError, match="Bad file descriptor"):
        first.start("leave", 6)


def test_what_cannot_be_asked_for(forks: Forks) -> None:
    with pytest.raises(OSError, match="Invalid argument") as refused:
        forks.start("nothing", 0)
    assert refused.value.errno == errno.EINVAL
    assert ended(forks.start("leave", 3)) == 3


def test_without_room_for_a_process_who_asks_is_told(server: ForkServerProcess, forks: Forks) -> None:
    assert ended(forks.start("leave", 0)) == 0
    (pid,) = [child.pid for child in psutil.Process().children() if MODULE in child.cmdline()]
    # Room for what a request brings, and none for the connection of the child.
    limits = psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE)
    wait_until(lambda: psutil.Process(pid).num_fds() == 4, "the first one's are closed")
    psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE, (5, limits[1]))
    with pytest.raises(OSError, match="Too many open files"):
        forks.start("leave", 1)
    psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE, limits)
    assert ended(forks.start("leave", 2)) == 2


def test_a_fork_server_that_does_not_answer_is_killed(server: ForkServerProcess) -> None:
    async def start() -> Child:
        return await server.start("leave", 4, timeout_s=WAIT_S)

    assert ended(anyio.run(start)) == 4
    (process,) = [child for child in psutil.Process().children() if MODULE in child.cmdline()]
    process.suspend()

    async def start_in_time() -> Child:
        return await server.start("leave", 4, timeout_s=0.1)

    with pytest.raises(OSError, match=r"does not answer within 0\.1 s"):
        anyio.run(start_in_time)
    wait_until(lambda: is_ended(process), "its end")
    assert ended(anyio.run(start)) == 4
