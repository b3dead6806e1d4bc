"""The soak in a few seconds, and that what it looks for would be found."""

from __future__ import annotations

import os
import random

import pytest

from tests.harness import Daemon
from tests.soak.flatness import DESCRIPTORS, MEMORY_BYTES, SAMPLES_MIN, Life, Watch
from tests.soak.followers import Matcher
from tests.soak.run import Soak

SECONDS = 10.0


@pytest.mark.root
@pytest.mark.timeout(300)
def test_a_short_soak() -> None:
    seed = int(os.environ.get("SNAPBROKER_SEED") or random.SystemRandom().getrandbits(32))
    print(f"SNAPBROKER_SEED={seed} makes the same choices again")
    with Soak(SECONDS, seed, print) as soak:
        figures = soak.run()
    # Growth is not looked at: in the first seconds of a life its clients are still coming.
    assert soak.failures == []
    assert all(figures["answers_by_snapshotter"].values())
    assert figures["events_matched"]
    assert figures["files_verified"]


@pytest.mark.root
@pytest.mark.timeout(120)
def test_what_breaks_a_soak_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not when its clients, whose daemon is gone, have lost their patience, which is minutes."""

    def broken(soak: Soak, _: float) -> None:
        soak._daemon.kill()
        raise AssertionError("it did not start again")

    monkeypatch.setattr("tests.soak.run.TICK_S", 0.1)
    monkeypatch.setattr(Soak, "_tick", broken)
    with pytest.raises(AssertionError, match="did not start again"), Soak(SECONDS, 1, print) as soak:
        soak.run()


def watched(life: Life) -> list[str]:
    watch = Watch(Daemon.__new__(Daemon))
    watch.lives["broker"] = {1: Life([1], [1], [1]), 2: life}
    return watch.verdict()[1]


class TestWatch:
    """What grows is told, and what only is larger at the beginning is not."""

    def test_flat(self) -> None:
        count = 3 * SAMPLES_MIN
        assert watched(Life([50 << 20] * count, [20] * count, [5] * count)) == []

    def test_memory(self) -> None:
        count = 3 * SAMPLES_MIN
        memory = [(50 << 20) + number * MEMORY_BYTES * 3 // count for number in range(count)]
        (grown,) = watched(Life(memory, [20] * count, [5] * count))
        assert "memory grew" in grown

    def test_descriptors(self) -> None:
        count = 3 * SAMPLES_MIN
        (grown,) = watched(Life([1] * count, list(range(20, 20 + count)), [5] * count))
        assert "descriptors" in grown
        assert count * 2 / 3 > DESCRIPTORS

    def test_nothing_to_judge(self) -> None:
        (unknown,) = watched(Life([1], [1], [1]))
        assert "lived longer" in unknown


class TestMatcher:
    """What is asked for and what is told must be the same, in the same order."""

    def test_the_same(self) -> None:
        matcher = Matcher()
        matcher.asked("a", [("prepare", "x", "x"), ("cleanup", "", "")])
        matcher.told("a", ("prepare", "x", "x"))
        matcher.told("a", ("remove", "x", ""))
        assert matcher.open() == {"a": (0, 1)}
        matcher.asked("a", [("remove", "x", "")])
        assert (matcher.open(), matcher.mismatches, matcher.matched) == ({}, {}, 2)

    def test_another(self) -> None:
        matcher = Matcher()
        matcher.told("a", ("prepare", "y", "y"))
        matcher.asked("a", [("prepare", "x", "x")])
        assert matcher.mismatches == {"a": (("prepare", "x", "x"), ("prepare", "y", "y"))}
