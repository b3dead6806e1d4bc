"""No descriptors left, in an actor and in the broker: refused with the promised error, and over when there are some."""

from __future__ import annotations

import itertools
import os
import resource
from collections.abc import Callable

import psutil
import pytest

from snapbroker.errors import ResourceExhausted
from snapbroker.protocol import MountsAnswer, Prepare
from tests.daemon.support import Bystander, pid_of, wait_until
from tests.harness import Daemon

StartDaemon = Callable[..., Daemon]


def limit(pid: int, descriptors: int) -> None:
    """Let a process that runs have so many."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (descriptors, hard))


def test_an_actor_without_descriptors(start_daemon: StartDaemon) -> None:
    daemon = start_daemon({"native": {"options": {"copy_threads": 1}}, "memory": {"backend": "memory"}})
    with daemon.client("native", patience=0) as broker, Bystander(daemon, "memory") as bystander:
        broker.prepare("making")
        broker.commit("base", "making")
        pid = pid_of(daemon, "native")
        most = resource.prlimit(pid, resource.RLIMIT_NOFILE)[0]
        used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
        limit(pid, next(number for number in itertools.count() if number not in used))
        with pytest.raises(ResourceExhausted) as caught:
            broker.prepare("new", "base")
        assert caught.value.details["errno"] in (23, 24)
        # What needs none goes on.
        assert broker.stat("base").name == "base"
        assert broker.update("base", {"a": "b"}).labels == {"a": "b"}
        bystander.wait_for_rounds()
        limit(pid, most)
        broker.prepare("new", "base")
        assert daemon.actor("native").restarts == 0


def test_a_broker_without_descriptors(start_daemon: StartDaemon) -> None:
    """Those who are connected are served, and a dead actor comes back when there is room.

    Nobody connects meanwhile, since libzmq ends the process that can accept no more: see docs/operations.md.
    """
    daemon = start_daemon({"overlayfs": {}, "memory": {"backend": "memory"}})
    most = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[0]
    with daemon.wire("overlayfs") as wire, Bystander(daemon, "memory") as bystander:
        assert isinstance(wire.one(Prepare(key="a")), MountsAnswer)
        limit(daemon.pid, psutil.Process(daemon.pid).num_fds())
        daemon.forked()["overlayfs"].kill()
        wait_until(lambda: "an actor cannot be started" in daemon.log(), "it is told")
        bystander.wait_for_rounds()
        limit(daemon.pid, most)
        daemon.wait_ready()
        assert isinstance(wire.one(Prepare(key="b")), MountsAnswer)
