"""A process of an overlayfs snapshotter is ended at every point that is its own, and at a share of the others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.failpoints.crashes import Crashes, running
from tests.failpoints.ways import share

pytestmark = pytest.mark.root

BACKEND = "overlayfs"


@pytest.fixture(scope="module")
def crashes() -> Iterator[Crashes]:
    """One daemon for all of them: its supervisor starts the actor again."""
    with running(BACKEND) as crashes:
        yield crashes
        crashes.finish()


def test_a_first_start(crashes: Crashes) -> None:
    crashes.start()


@pytest.mark.parametrize(("name", "process"), share(BACKEND))
def test_at(crashes: Crashes, name: str, process: str) -> None:
    crashes.round(name, process)
