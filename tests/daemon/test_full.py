"""A filesystem without room: refused in time, served all the same, and a start on one full to its last block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapbroker.errors import ResourceExhausted
from tests.daemon.support import wait_until
from tests.harness import Daemon, loop_filesystem

pytestmark = pytest.mark.root
RESERVE_BYTES = 8 << 20
BALLAST_BYTES = 1 << 20


class Disk:
    """A small filesystem that can be filled up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    @property
    def free_bytes(self) -> int:
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def fill(self, leave_bytes: int = 0) -> None:
        """Fill up to so many bytes, or to the very last block."""
        descriptor = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        size = 1 << 20
        try:
            while size >= 512 and (not leave_bytes or self.free_bytes > leave_bytes):
                try:
                    os.write(descriptor, bytes(min(size, max(self.free_bytes - leave_bytes, 512))))
                    os.fsync(descriptor)
                except OSError:
                    size //= 2
        finally:
            os.close(descriptor)

    def empty(self) -> None:
        """Give everything back."""
        self._filler.unlink()


@pytest.fixture(params=["overlayfs", "native"])
def snapshotter(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def disk() -> Iterator[Disk]:
    with loop_filesystem("ext4", 96 << 20, "-m", "0") as path:
        yield Disk(path)


@pytest.fixture
def daemon(disk: Disk, snapshotter: str, start_daemon: Callable[..., Daemon]) -> Daemon:
    space = {"reserve_bytes": RESERVE_BYTES, "ballast_bytes": BALLAST_BYTES}
    return start_daemon({snapshotter: {"root": str(disk.path / "root"), "limits": {"space": space}}})


def ballast(disk: Disk) -> Path:
    return disk.path / "root" / "metadata" / "ballast"


def test_what_creates_is_refused_before_the_disk_is_full(daemon: Daemon, disk: Disk, snapshotter: str) -> None:
    with daemon.client(snapshotter) as broker:
        broker.prepare("a")
        disk.fill(RESERVE_BYTES // 2)
        with pytest.raises(ResourceExhausted, match="reserve") as refused:
            broker.prepare("b")
        assert refused.value.details["retry_after_ms"] > 0
        assert refused.value.details["free_bytes"] < RESERVE_BYTES
        with pytest.raises(ResourceExhausted, match="reserve"):
            broker.view("v")
        broker.commit("base", "a")
        assert broker.stat("base").name == "base"
        broker.update("base", {"x": "y"})
        broker.remove("base")
        daemon.wait_for(lambda status: status.snapshotters[0].queues["space"]["refused"] == 2)
        disk.empty()
        wait_until(lambda: succeeds(lambda: broker.prepare("c")), "room again")


def test_a_full_disk_can_be_started_on_and_emptied(daemon: Daemon, disk: Disk, snapshotter: str) -> None:
    with daemon.client(snapshotter) as broker:
        mounts = broker.prepare("a")
        (Path(mounts[0].source) / "file").write_bytes(bytes(4 << 20))
        broker.commit("base", "a")
        broker.prepare("keep")
    wait_until(ballast(disk).exists, "the ballast")
    daemon.kill()
    disk.fill()
    daemon.start()
    assert not ballast(disk).exists()
    with daemon.client(snapshotter) as broker:
        assert {info.name for info in broker.walk()} == {"base", "keep"}
        with pytest.raises(ResourceExhausted):
            broker.prepare("b")
        broker.remove("base")
        broker.cleanup()
        assert disk.free_bytes > 3 << 20
        disk.empty()
        wait_until(lambda: succeeds(lambda: broker.prepare("b")), "room again")
    wait_until(ballast(disk).exists, "the ballast again")


def succeeds(call: Callable[[], object]) -> bool:
    with contextlib.suppress(ResourceExhausted):
        call()
        return True
    return False
