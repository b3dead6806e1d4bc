"""Daemons that the tests here may harm, on disk backends, and a backend whose work waits at a gate."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import gated
from tests.harness import Daemon

DISK_SNAPSHOTTERS = ("overlayfs", "native", "btrfs")

_numbers = itertools.count(1)


@pytest.fixture(params=DISK_SNAPSHOTTERS)
def disk_snapshotter(request: pytest.FixtureRequest) -> str:
    """Every snapshotter that keeps something on disk, in turn."""
    return str(request.param)


@pytest.fixture
def disk_section(disk_snapshotter: str, btrfs: Path) -> dict[str, str]:
    """The section of a disk snapshotter that nobody else uses."""
    if disk_snapshotter == "btrfs":
        return {"backend": "btrfs", "root": str(btrfs / f"harmed-{next(_numbers)}")}
    return {"backend": disk_snapshotter}


@pytest.fixture
def disk_daemon(disk_snapshotter: str, disk_section: dict[str, str], start_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon of the test's own with one disk snapshotter."""
    return start_daemon({disk_snapshotter: disk_section})


@pytest.fixture(scope="session")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the backend `gated` is installed, as a third party's distribution would be."""
    place = tmp_path_factory.mktemp("plugins")
    shutil.copy(gated.__file__, place / "snapbroker_gated.py")
    distribution = place / "snapbroker_gated-1.0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: snapbroker-gated\nVersion: 1.0\n")
    (distribution / "entry_points.txt").write_text("[snapbroker.backends]\ngated = snapbroker_gated:Gated\n")
    return {"PYTHONPATH": str(place)}


@pytest.fixture
def unstarted_daemon() -> Iterator[Callable[..., Daemon]]:
    """A function that makes a daemon without starting it; removed at the end, however it ended."""
    with contextlib.ExitStack() as daemons:

        def make(snapshotters: dict[str, dict[str, Any]], **settings: Any) -> Daemon:
            daemon = Daemon(snapshotters, **settings)
            daemons.callback(daemon.remove)
            return daemon

        yield make
