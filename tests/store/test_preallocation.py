"""The database's file is made longer before its pages are needed, and never over what is in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.store import Environment, StoreLimits
from broker.store.preallocation import PAUSE_S, PIECE, ROOM, STEP_MIN_BYTES, Preallocation
from tests.harness import loop_filesystem

LIMITS = StoreLimits(map_initial_bytes=64 << 20, preallocated_max_bytes=2 * STEP_MIN_BYTES)
VALUE = b"v" * 2000


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def place(request: pytest.FixtureRequest) -> Iterator[Path]:
    with loop_filesystem(request.param, 400 << 20) as path:
        yield path


def write(environment: Environment, number: int) -> None:
    environment.write(lambda txn: txn.put(b"%08d" % number, VALUE, db=environment.snapshots))


def contents(environment: Environment) -> int:
    with environment.read() as txn, txn.cursor(db=environment.snapshots) as cursor:
        values = [bytes(value) for _, value in cursor]
    assert values == [VALUE] * len(values)
    return len(values)


def test_there_is_room_before_it_is_needed(place: Path) -> None:
    environment = Environment(place / "room", LIMITS)
    write(environment, 0)
    assert environment.runs_short()
    environment.extend()
    size = environment.file.stat().st_size
    used = environment.statistics()["used_bytes"]
    assert used + STEP_MIN_BYTES <= size < used + STEP_MIN_BYTES + len(PIECE)
    assert not environment.runs_short()
    for number in range(400):
        write(environment, number)
        if environment.runs_short():
            break
    assert environment.file.stat().st_size == size, "the pages were there"
    assert size - environment.statistics()["used_bytes"] < STEP_MIN_BYTES // 2
    environment.close()
    again = Environment(place / "room", LIMITS)
    assert contents(again) == number + 1
    assert again.runs_short()
    again.close()


def test_transactions_go_on_meanwhile_and_lose_nothing(place: Path) -> None:
    environment = Environment(place / "meanwhile", LIMITS)
    ended = threading.Event()

    def extend() -> None:
        while not ended.is_set():
            environment.extend()

    # Always at it, whether it is wanted or not: the ends of both meet as often as can be.
    thread = threading.Thread(target=extend)
    thread.start()
    for number in range(1000):
        write(environment, number)
        environment.runs_short()
    ended.set()
    thread.join()
    assert contents(environment) == 1000
    environment.close()
    again = Environment(place / "meanwhile", LIMITS)
    assert contents(again) == 1000
    again.close()


def test_a_filesystem_that_is_nearly_full_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("broker.store.preallocation.time.monotonic", lambda: now)
    with loop_filesystem("ext4", (ROOM + 8) * STEP_MIN_BYTES) as place:
        file = place / "file"
        file.write_bytes(b"used")
        (place / "others").write_bytes(bytes(16 * STEP_MIN_BYTES))
        preallocation = Preallocation(file, STEP_MIN_BYTES)
        assert preallocation.wanted(4)
        preallocation.extend()
        assert file.read_bytes() == b"used"
        assert not preallocation.wanted(4)
        (place / "others").unlink()
        now += PAUSE_S
        assert preallocation.wanted(4)
        file.unlink()
        preallocation.extend()
        assert not preallocation.wanted(4), "what went wrong is not tried again at once either"


def test_elsewhere_and_where_nothing_is_wanted_it_stays_as_it_is(place: Path) -> None:
    file = place / "file"
    file.write_bytes(b"used")
    assert not Preallocation(file, 0).wanted(4)
    with loop_filesystem("btrfs", 256 << 20) as other:
        file = other / "file"
        file.write_bytes(b"used")
        assert not Preallocation(file, STEP_MIN_BYTES).wanted(4)
