"""The ballast: a file that holds nothing but space, all of it or none."""

from __future__ import annotations

from pathlib import Path

from broker.snapshotter.space import BALLAST, Ballast

SIZE = 1 << 20


def test_a_ballast_that_a_crash_left_half_made_is_taken_up_whole(tmp_path: Path) -> None:
    ballast = tmp_path / BALLAST
    ballast.touch()
    Ballast([tmp_path], SIZE).tend(0)
    assert ballast.stat().st_size == SIZE
    assert ballast.stat().st_blocks * 512 >= SIZE


def test_a_whole_ballast_is_left_alone(tmp_path: Path) -> None:
    Ballast([tmp_path], SIZE).tend(0)
    before = (tmp_path / BALLAST).stat()
    Ballast([tmp_path], SIZE).tend(0)
    assert (tmp_path / BALLAST).stat().st_ctime_ns == before.st_ctime_ns
