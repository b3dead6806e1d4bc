"""What the tests of the running daemon share: daemons, a btrfs to run on, namespaces, and logs with every failure."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from snapbroker.blocking import Broker
from tests import harness
from tests.harness import Daemon, Wire

_numbers = itertools.count(1)


@pytest.hookimpl
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Only what a daemon writes from here on belongs to this test."""
    for daemon in harness.running:
        daemon.mark = daemon.log_file.stat().st_size


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of the daemons with a test that fails."""
    report = yield
    if report.failed:
        for daemon in harness.running:
            if log := daemon.log():
                report.sections.append((f"log of snapbrokerd in {daemon.place}", log))
    return report


@pytest.fixture(scope="session")
def btrfs() -> Iterator[Path]:
    """A mounted btrfs, for daemons with a btrfs snapshotter."""
    with harness.btrfs_filesystem() as path:
        yield path


@pytest.fixture(scope="session")
def daemon(btrfs: Path) -> Iterator[Daemon]:
    """The shared daemon, with a snapshotter of every backend; a test that harms one starts its own instead."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in harness.SNAPSHOTTERS}
    if "btrfs" in sections:
        sections["btrfs"] = {"root": str(btrfs / "shared")}
    with Daemon(sections, log_level="debug") as daemon:
        yield daemon


@pytest.fixture
def start_daemon() -> Iterator[Callable[..., Daemon]]:
    """A function that starts a daemon of the test's own (arguments as `Daemon`), stopped and checked at its end."""
    with contextlib.ExitStack() as daemons:
        yield lambda snapshotters, **settings: daemons.enter_context(Daemon(snapshotters, **settings))


@pytest.fixture(params=harness.SNAPSHOTTERS)
def snapshotter(request: pytest.FixtureRequest) -> str:
    """Every snapshotter of the shared daemon in turn."""
    return str(request.param)


@pytest.fixture
def namespace() -> str:
    """A namespace that nobody else uses."""
    return f"test-{next(_numbers)}"


@pytest.fixture
def broker(daemon: Daemon, snapshotter: str, namespace: str) -> Iterator[Broker]:
    """The blocking client of one snapshotter of the shared daemon, in a namespace of the test's own."""
    with daemon.client(snapshotter, namespace) as broker:
        yield broker


@pytest.fixture
def wire(daemon: Daemon, snapshotter: str, namespace: str) -> Iterator[Wire]:
    """The bare protocol to one snapshotter of the shared daemon, in a namespace of the test's own."""
    with daemon.wire(snapshotter, namespace) as wire:
        yield wire
