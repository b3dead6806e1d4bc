"""A store of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.store import Environment, Snapshots, StoreLimits

SMALL = StoreLimits(map_initial_bytes=1 << 20, map_max_bytes=1 << 26)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Environment]:
    """An empty store."""
    environment = Environment(tmp_path / "metadata", SMALL)
    yield environment
    environment.close()


@pytest.fixture
def snapshots(environment: Environment) -> Snapshots:
    """Its snapshots."""
    return Snapshots(environment)
