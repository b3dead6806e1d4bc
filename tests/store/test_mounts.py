"""The answers to mounts that a reader keeps: as many as their limit allows, whatever they were asked for with."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from backends.api import Mount, Snapshot
from backends.memory import Memory, MemoryOptions
from broker.snapshotter import reader as module
from broker.snapshotter.reader import MOUNTS_BYTES_MAX, Reader
from broker.store import Environment, Journal, Record, Retention, Snapshots, index_key
from broker.store.records import encode_info
from snapbroker.contract import Info, Kind

FENCE = 7


class Counting(Memory):
    """Notes for which ids it was asked."""

    asked: list[int]

    def mounts(self, snapshot: Snapshot) -> Sequence[Mount]:
        self.asked.append(snapshot.id)
        return super().mounts(snapshot)


@pytest.fixture
def backend(tmp_path: Path) -> Counting:
    backend = Counting.open(tmp_path / "root", MemoryOptions())
    assert isinstance(backend, Counting)
    backend.asked = []
    return backend


@pytest.fixture
def ask(
    environment: Environment,
    snapshots: Snapshots,
    backend: Counting,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[int, int], bytes]:
    """Ask for the mounts of the snapshot with an id, with a fence or 0; the parameter is the bytes that may be kept."""
    monkeypatch.setattr(module, "MOUNTS_BYTES_MAX", getattr(request, "param", MOUNTS_BYTES_MAX))
    reader = Reader(environment, snapshots, Journal(environment, "s", Retention()), backend)

    def ask(id_: int, fence: int) -> bytes:
        with environment.read() as txn:
            return reader.mounts(txn, "ns", f"key-{id_}", fence)

    return ask


def insert(environment: Environment, snapshots: Snapshots, count: int) -> None:
    def work(txn: object) -> None:
        for id_ in range(1, count + 1):
            info = Info(f"key-{id_}", Kind.ACTIVE)
            row = Record(Kind.ACTIVE, 0, 0, id_, 0, 0, 0, FENCE, encode_info(info))
            snapshots.insert(txn, index_key("ns", info.name), row)  # type: ignore[arg-type]

    environment.write(work)


@pytest.mark.parametrize("ask", [4096], indirect=True)
def test_a_fence_pushes_no_other_answer_out(
    environment: Environment,
    snapshots: Snapshots,
    backend: Counting,
    ask: Callable[[int, int], bytes],
) -> None:
    insert(environment, snapshots, 2)
    first = ask(1, 0)
    answers = {ask(2, fence) for _ in range(50) for fence in (FENCE, 0)}
    assert len(answers) == 1
    assert ask(1, FENCE) == ask(1, 0) == first
    assert backend.asked == [1, 2]


def test_their_memory_has_a_limit(
    environment: Environment, snapshots: Snapshots, ask: Callable[[int, int], bytes]
) -> None:
    count = 30_000
    insert(environment, snapshots, count)
    tracemalloc.start()
    try:
        for id_ in range(1, count + 1):
            ask(id_, 0)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert MOUNTS_BYTES_MAX // 2 < taken < 3 * MOUNTS_BYTES_MAX // 2
