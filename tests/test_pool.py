"""The pool of ready directories: whoever waits for one gets it, and some are left for those who do not wait."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import cast

import pytest

from backends.api import Task
from broker.actor.fairness import Mix
from broker.snapshotter.ids import Ids
from broker.snapshotter.pool import KEPT, PART, Pool, PoolLimits
from snapbroker.errors import BrokerError
from tests.daemon.support import wait_until


class Stocker:
    """Makes nothing, at once."""

    def stock(self, ids: Sequence[int], task: Task) -> None:
        pass

    def let_go(self) -> None:
        pass


class Numbers:
    """Ids in their order."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def take_many(self, count: int) -> list[int]:
        return list(itertools.islice(self._numbers, count))


def several() -> Mix:
    """Several clients are about, and always will be."""
    mix = Mix(lambda: 0)
    for line in (b"good", b"flood", b"good"):
        mix.see(line)
    assert mix.shared
    return mix


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    limits = PoolLimits(pool_min=request.param, pool_idle_s=0.02, stockers=3)
    pool = Pool(cast(Ids, Numbers()), lambda _id: None, limits, several())
    threads = [
        threading.Thread(name=name, target=pool.run, args=(Stocker(),), kwargs={"helps": name != "pool"})
        for name in pool.threads
    ]
    for thread in threads:
        thread.start()
    yield pool
    pool.stop()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def had(pool: Pool, line: bytes) -> int:
    """A directory for a client, waited for where none is ready."""
    got = pool.take(line)
    if got is None:
        waits: queue.SimpleQueue[int | BrokerError] = queue.SimpleQueue()
        pool.park(line, waits.put)
        waited = waits.get(timeout=20)
        assert isinstance(waited, int)
        return waited
    return got


@pytest.mark.parametrize("pool", [1, 2, 5, KEPT, 256], indirect=True)
def test_two_clients_get_what_they_ask_for_whatever_is_aimed_for(pool: Pool) -> None:
    taken = [had(pool, line) for _ in range(100) for line in (b"flood", b"flood", b"flood", b"good")]
    assert len(set(taken)) == len(taken) == 400


@pytest.mark.parametrize("pool", [1, 2, 5], indirect=True)
def test_an_aim_that_was_lowered_keeps_nobody_waiting(pool: Pool) -> None:
    for number in range(40):
        had(pool, b"%d" % (number % 2))
    wait_until(lambda: pool.statistics()["aim"] <= 5 < pool.statistics()["ready"], "a lower aim, and what is left")
    taken = [had(pool, line) for _ in range(50) for line in (b"flood", b"flood", b"flood", b"good")]
    assert len(set(taken)) == len(taken)


def test_a_flood_leaves_some_for_who_does_not_wait() -> None:
    """Without the thread: nothing is made meanwhile."""
    pool = Pool(cast(Ids, Numbers()), lambda _id: None, PoolLimits(pool_min=256), several())
    pool._shelve(list(range(1, 65)))
    assert pool.take(b"good") is not None
    count = 0
    while pool.take(b"flood") is not None:
        count += 1
    assert count == 63 - KEPT
    assert [pool.take(b"good") is not None for _ in range(PART)] == [True] * (PART - 1) + [False]


def test_a_burst_raises_the_aim_by_twice_what_it_lacked() -> None:
    """Nor beyond the limit."""
    limits = PoolLimits(pool_min=256, pool_max=500)
    pool = Pool(cast(Ids, Numbers()), lambda _id: None, limits, several())
    for number in range(1, 200):
        assert pool.take(b"burst") is None
        pool.park(b"burst", lambda _got: None)
        assert pool.statistics()["aim"] == min(256 + 2 * number, 500)
