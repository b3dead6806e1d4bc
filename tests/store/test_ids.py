"""Ids: whatever happens, none is handed out twice (D4)."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from broker.snapshotter.ids import BLOCK, Ids
from broker.store import Environment, Snapshots
from snapbroker.errors import ResourceExhausted
from tests.store.conftest import SMALL


def ids_of(environment: Environment) -> Ids:
    return Ids(environment, Snapshots(environment))


def test_they_begin_at_1_and_rise(environment: Environment) -> None:
    ids = ids_of(environment)
    assert ids.boundary == 1
    assert [ids.take() for _ in range(3)] == [1, 2, 3]
    assert ids.take_many(3) == [4, 5, 6]


def test_none_comes_again_after_a_restart(tmp_path: Path) -> None:
    """Even if nothing was written since they were taken, as in a crash; and all of before are below the boundary."""
    seen: set[int] = set()
    for _ in range(5):
        environment = Environment(tmp_path / "metadata", SMALL)
        ids = ids_of(environment)
        taken = {ids.take() for _ in range(10)} | set(ids.take_many(10))
        assert len(taken) == 20
        assert not taken & seen
        assert min(taken) >= ids.boundary > max(seen, default=0)
        seen |= taken
        environment.close()


def test_blocks_join(environment: Environment) -> None:
    ids = ids_of(environment)
    taken: list[int] = []
    while len(taken) < 3 * BLOCK:
        taken += ids.take_many(1000)
        ids.replenish()
    assert taken == list(range(1, len(taken) + 1))


def test_a_writer_that_does_not_keep_up(environment: Environment) -> None:
    ids = ids_of(environment)
    ids.take_many(BLOCK - 1)
    with pytest.raises(ResourceExhausted) as raised:
        ids.take_many(2)
    assert raised.value.details["retry_after_ms"]
    assert ids.take() == BLOCK
    with pytest.raises(ResourceExhausted):
        ids.take()
    ids.replenish()
    assert ids.take() == BLOCK + 1


def test_from_several_threads(environment: Environment) -> None:
    ids = ids_of(environment)
    taken: list[list[int]] = [[] for _ in range(4)]
    begun = threading.Barrier(5)

    def take(into: list[int]) -> None:
        begun.wait(10)
        for _ in range(1000):
            into.append(ids.take())
            into.extend(ids.take_many(5))

    threads = [threading.Thread(target=take, args=(into,)) for into in taken]
    for thread in threads:
        thread.start()
    begun.wait(10)
    for _ in range(50):
        ids.replenish()
    for thread in threads:
        thread.join()
    everything = [id_ for into in taken for id_ in into]
    assert len(everything) == len(set(everything)) == 4 * 6000
