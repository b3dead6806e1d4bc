"""A handful of power cuts on each filesystem; `make soak` makes hundreds.

The seed is random and told when a cut goes wrong: `SNAPBROKER_SEED=<it>` makes the same choices again.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.powercut.disk import FILESYSTEMS, image_host
from tests.powercut.machine import Machine

pytestmark = pytest.mark.root

CUTS = 2
"""Cuts of each filesystem, on which two snapshotters lie."""
CUTS_MAX = 10
CARELESS_CUTS = 10
"""Cuts that a broker which flushes nothing cannot get through."""
CARELESS = """
import os
os.fsync = lambda fd: None
import backends.syscalls
backends.syscalls.syncfs = lambda fd: None
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Path]:
    """Where the images lie."""
    with image_host() as path:
        yield path


@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_power_cuts(filesystem: str, host: Path) -> None:
    seed = os.environ.get("SNAPBROKER_SEED") or str(random.SystemRandom().getrandbits(32))
    with Machine(filesystem, host, seed) as under_test:
        rounds(under_test, CUTS)
        # On a busy machine the first cuts may come before anything was acknowledged.
        while not under_test.figures["records"] and under_test.figures["cuts"] < CUTS_MAX:
            under_test.round()
    assert under_test.figures["cuts"] >= CUTS
    assert under_test.figures["records"]


def test_a_broker_that_flushes_nothing_is_found_out(host: Path, tmp_path: Path) -> None:
    """The harness can fail: the database of this one is durable, and what its records speak of is not."""
    (tmp_path / "sitecustomize.py").write_text(CARELESS)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    careless = Machine("ext4", host, "careless", {"PYTHONPATH": path})
    with careless, pytest.raises(AssertionError, match=r"broken|missing|damaged") as found:
        rounds(careless, CARELESS_CUTS)
    assert any("power cut careless/ext4" in note for note in found.value.__notes__)


def rounds(under_test: Machine, count: int) -> None:
    for _ in range(count):
        under_test.round()
