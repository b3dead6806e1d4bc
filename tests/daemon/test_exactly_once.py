"""Killed under callers who repeat: each of them sees one effect of every call, and none sees an error."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import pytest

from snapbroker import aio
from snapbroker.blocking import Broker
from snapbroker.session import Patience
from tests.daemon import support
from tests.harness import READY_S, Daemon

pytestmark = pytest.mark.root

CALLERS = 64
CALLS = 400
"""Calls answered before each kill, and after the last one."""
PATIENCE_S = 2 * READY_S
"""On a busy machine a start takes much longer than the patience that a client has by itself."""


class Callers(threading.Thread):
    """`CALLERS` callers who prepare, commit and remove until `halt` is set, and note what was `answered`."""

    def __init__(self, daemon: Daemon, snapshotter: str) -> None:
        super().__init__()
        self.daemon_under_load = daemon
        self.snapshotter = snapshotter
        self.halt = threading.Event()
        self.answered: list[tuple[str, str]] = []
        self.repeated = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        """Work until told to stop; an error of any caller ends all."""
        try:
            self.work()
        except BaseException as error:
            self.error = error

    def work(self) -> None:
        """Let the callers call."""
        raise NotImplementedError

    def wait_for_calls(self, count: int) -> None:
        """Wait until so many further calls were answered."""
        wanted = len(self.answered) + count
        support.wait_until(lambda: self.error or len(self.answered) >= wanted, "calls under load", PATIENCE_S)
        if self.error is not None:
            raise self.error

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.halt.set()
        self.join(PATIENCE_S)
        if kind is None:
            assert not self.is_alive(), "a caller hangs in a call"
            if self.error is not None:
                raise self.error


class Tasks(Callers):
    """Tasks of one asyncio client, whose calls share requests."""

    def work(self) -> None:
        """Run the loop."""
        asyncio.run(self._load())

    async def _load(self) -> None:
        daemon = self.daemon_under_load
        connection = aio.connect(
            daemon.endpoint, snapshotter=self.snapshotter, connect_timeout=PATIENCE_S, patience=PATIENCE_S
        )
        async with connection as broker:
            try:
                async with asyncio.TaskGroup() as group:
                    for number in range(CALLERS):
                        group.create_task(self._caller(broker, number))
            finally:
                self.repeated = broker.statistics().repeated

    async def _caller(self, broker: aio.Broker, number: int) -> None:
        for turn in itertools.count():
            if self.halt.is_set():
                return
            key, name = f"t{number}-{turn}", f"t{number}-{turn}-made"
            fence = (await broker.prepare(key, "base")).fence
            self.answered.append(("prepare", key))
            if turn % 3 == 0:
                await broker.remove(key, fence)
                self.answered.append(("remove", key))
                continue
            await broker.commit(name, key, fence=fence)
            self.answered.append(("commit", key))
            if turn % 3 == 1:
                await broker.remove(name)
                self.answered.append(("remove", name))


class Threads(Callers):
    """Threads with one blocking client, each call a request."""

    def work(self) -> None:
        """Run the threads."""
        daemon = self.daemon_under_load
        with daemon.client(self.snapshotter, connect_timeout=PATIENCE_S, patience=PATIENCE_S) as broker:
            broker._connection.patience = Patience(PATIENCE_S, chance=self._chance)
            with ThreadPoolExecutor(CALLERS) as pool:
                for caller in [pool.submit(self._caller, broker, number) for number in range(CALLERS)]:
                    caller.result()

    def _chance(self) -> float:
        self.repeated += 1
        return random.random()

    def _caller(self, broker: Broker, number: int) -> None:
        try:
            for turn in itertools.count():
                if self.halt.is_set():
                    return
                key, name = f"t{number}-{turn}", f"t{number}-{turn}-made"
                fence = broker.prepare(key, "base").fence
                self.answered.append(("prepare", key))
                broker.commit(name, key, fence=fence)
                self.answered.append(("commit", key))
                if turn % 2:
                    broker.remove(name)
                    self.answered.append(("remove", name))
        except BaseException:
            self.halt.set()
            raise


def kill_broker(daemon: Daemon, snapshotter: str) -> None:
    daemon.kill()
    daemon.start()


def kill_actor(daemon: Daemon, snapshotter: str) -> None:
    os.kill(support.pid_of(daemon, snapshotter), signal.SIGKILL)


def stop_broker(daemon: Daemon, snapshotter: str) -> None:
    daemon.restart()


def check_once(daemon: Daemon, callers: Callers) -> None:
    """The journal has each call that was answered once, and nothing else."""
    with daemon.client(callers.snapshotter) as broker:
        events = [
            (event.verb, event.key)
            for event in broker.events(since=0, follow=False)
            if event.key not in ("base-making", "base")
        ]
        infos = {info.name: info for info in broker.walk()}
        support.check_journal(broker, infos)
    assert Counter(events) == Counter(callers.answered)
    assert set(Counter(events).values()) == {1}
    support.check_disk(daemon, callers.snapshotter)


@pytest.mark.parametrize("harm", [kill_broker, kill_actor, stop_broker])
@pytest.mark.parametrize(("kind", "snapshotter"), [(Tasks, "overlayfs"), (Tasks, "native"), (Threads, "overlayfs")])
def test_one_effect_and_no_error(
    start_daemon: Callable[..., Daemon],
    kind: type[Callers],
    snapshotter: str,
    harm: Callable[[Daemon, str], None],
) -> None:
    daemon = start_daemon({snapshotter: {}})
    support.make_base(daemon, snapshotter)
    with kind(daemon, snapshotter) as callers:
        for _ in range(2):
            callers.wait_for_calls(CALLS)
            harm(daemon, snapshotter)
        callers.wait_for_calls(CALLS)
    assert callers.repeated, "no call was under way"
    check_once(daemon, callers)
