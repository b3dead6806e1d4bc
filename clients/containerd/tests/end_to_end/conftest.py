"""A broker with the three snapshotters, its bridge and a containerd that uses them, for all tests of a module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from benchmarks import images, scratch
from end_to_end import specimen
from end_to_end.machine import PLUGINS, Machine
from tests import harness

_running: list[Machine] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what broker, bridge and containerd wrote with a test that fails."""
    report = yield
    if report.failed:
        for machine in _running:
            report.sections += [(title, text) for title, text in machine.logs().items() if text]
    return report


@pytest.fixture(scope="session")
def btrfs() -> Iterator[Path]:
    """A mounted btrfs."""
    with harness.btrfs_filesystem() as path:
        yield path


@pytest.fixture(scope="module")
def machine(btrfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Everything that runs; at the end no container, no mount and no process may be left."""
    with Machine.start(btrfs / "broker") as machine:
        _running.append(machine)
        try:
            yield machine
        finally:
            _running.remove(machine)


@pytest.fixture(params=PLUGINS)
def snapshotter(request: pytest.FixtureRequest) -> str:
    """Each of containerd's names for a snapshotter of the broker in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def image() -> images.Image:
    """The image with one of everything."""
    return specimen.build()


@pytest.fixture(scope="session")
def archive(image: images.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of that image."""
    return image.write(tmp_path_factory.mktemp("archive") / "specimen.tar")


@pytest.fixture(scope="session")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Go program that asks and mounts as containerd's own users do."""
    scratch.require("go")
    program = tmp_path_factory.mktemp("caller") / "caller"
    scratch.run(["go", "build", "-trimpath", "-o", str(program), "."], cwd=Path(__file__).parent / "caller")
    return program


@pytest.fixture
def imported(
    machine: Machine, snapshotter: str, archive: Path, image: images.Image
) -> Iterator[Callable[..., images.Image]]:
    """The image, imported and unpacked through the snapshotter; removed at the end, and nothing may be left of it.

    The value imports one more archive, of the image that is given with it, which is removed as well.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(machine.check_empty, snapshotter)

        def take(image: images.Image, archive: Path) -> images.Image:
            machine.containerd.ctr("images", "import", "--snapshotter", snapshotter, archive)
            undo.callback(machine.containerd.remove_image, image.name)
            return image

        take(image, archive)
        yield take
