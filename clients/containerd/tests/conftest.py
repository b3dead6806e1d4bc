"""One broker with every snapshotter, and one bridge, for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bridges import SNAPSHOTTERS, Bridge, Client, marks

from tests import harness
from tests.harness import Daemon


@pytest.fixture(scope="session")
def btrfs_root() -> Iterator[Path]:
    """A mounted btrfs."""
    with harness.btrfs_filesystem() as path:
        yield path / "snapshots"


@pytest.fixture(scope="module")
def daemons() -> Iterator[dict[str, tuple[Daemon, Bridge]]]:
    """Those that the module's tests have asked for; all are stopped at its end."""
    running: dict[str, tuple[Daemon, Bridge]] = {}
    yield running
    failures = []
    for daemon, bridge in running.values():
        try:
            bridge.__exit__(None)
        except AssertionError as error:
            failures.append(error)
        daemon.__exit__()
    assert not failures, failures


@pytest.fixture(scope="module", params=[pytest.param(name, marks=marks(name)) for name in SNAPSHOTTERS])
def running(request: pytest.FixtureRequest, daemons: dict[str, tuple[Daemon, Bridge]]) -> tuple[str, Daemon, Bridge]:
    """A snapshotter's name, and a broker that runs only that one, with a bridge before it.

    So that memory, which needs no root, is tested without anything that does.
    """
    name = str(request.param)
    if name not in daemons:
        section = {"root": str(request.getfixturevalue("btrfs_root"))} if name == "btrfs" else {}
        daemon = Daemon({name: section}).__enter__()
        bridge = Bridge(daemon.place, daemon.endpoint, log_format="json")
        daemons[name] = daemon, bridge
        bridge.start()
    return name, *daemons[name]


@pytest.fixture
def client(running: tuple[str, Daemon, Bridge]) -> Iterator[Client]:
    """Calls to an empty snapshotter, emptied again afterwards."""
    name, _, bridge = running
    with bridge.client(name) as client:
        yield client
        client.timeout = 30.0
        client.clear()
