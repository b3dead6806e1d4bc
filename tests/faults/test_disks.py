"""Disks that fail, turn read-only, or run out of inodes: the promised error, reads go on, and the way back."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backends.syscalls import free_bytes
from snapbroker.blocking import Broker
from snapbroker.errors import BrokerError, Internal, ResourceExhausted, Unavailable
from tests.daemon.support import Bystander, wait_until
from tests.harness import Daemon, loop_filesystem

pytestmark = pytest.mark.root
StartDaemon = Callable[..., Daemon]
_GOINGDOWN = 0x8004587D
_NOLOGFLUSH = 2
STOCKED = 64
"""Directories made ahead of time."""


class Disk:
    """A filesystem on a loop device that can be broken and mounted anew."""

    def __init__(self, kind: str, path: Path) -> None:
        mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
        self.kind, self.path = kind, path
        self._device = next(fields[0] for fields in mounts if fields[1] == str(path))

    def fail(self) -> None:
        """From here on all input and output is an error."""
        descriptor = os.open(self.path, os.O_RDONLY)
        fcntl.ioctl(descriptor, _GOINGDOWN, struct.pack("I", _NOLOGFLUSH))
        os.close(descriptor)

    def turn_read_only(self) -> None:
        """As ext4 does when it finds itself damaged."""
        subprocess.run(["mount", "-o", "remount,errors=remount-ro", self.path], check=True)
        Path(f"/sys/fs/ext4/{Path(self._device).name}/trigger_fs_error").write_text("test")

    def mount_anew(self) -> None:
        """What an operator does: away with it, and mount it."""
        subprocess.run(["umount", "--lazy", self.path], check=True)
        # While a process holds it, a mount would only bring the broken one back.
        mounted = Path(f"/sys/fs/{self.kind}/{Path(self._device).name}")
        wait_until(lambda: not mounted.exists(), "the filesystem is let go of")
        subprocess.run(["mount", self._device, self.path], check=True)


@pytest.fixture
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    kind = getattr(request, "param", "ext4")
    with loop_filesystem(kind, 400 << 20) as path:
        yield Disk(kind, path)


def refused(call: Callable[[], object]) -> BrokerError:
    with pytest.raises(BrokerError) as caught:
        call()
    return caught.value


def breaks(broker: Broker, number: int) -> None:
    """Every verb that writes has the error of a broken disk, and nothing of it is there."""
    for call in (
        lambda: broker.prepare("new", "base"),
        lambda: broker.update("base", {"a": "b"}),
        lambda: broker.commit("name", "active", sync=True),
        lambda: broker.remove("active"),
    ):
        error = refused(call)
        assert isinstance(error, Internal)
        assert os.strerror(number) in error.message
    assert {info.name for info in broker.walk()} == {"base", "active"}
    assert broker.stat("base").labels == {}
    assert broker.mounts("active")


@pytest.mark.parametrize(
    ("disk", "snapshotter", "number"),
    [("ext4", "overlayfs", errno.EIO), ("xfs", "native", errno.EIO), ("ext4", "native", errno.EROFS)],
    indirect=["disk"],
)
def test_a_broken_disk(disk: Disk, snapshotter: str, number: int, start_daemon: StartDaemon) -> None:
    daemon = start_daemon({snapshotter: {"root": str(disk.path / "root")}, "memory": {"backend": "memory"}})
    with daemon.client(snapshotter, patience=0) as broker, Bystander(daemon, "memory") as bystander:
        broker.prepare("making")
        broker.commit("base", "making")
        broker.prepare("active", "base")
        disk.fail() if number == errno.EIO else disk.turn_read_only()
        if disk.kind == "xfs":
            # It refuses what is mapped too, which ends the process at its first look into the database.
            assert isinstance(refused(lambda: broker.prepare("new", "base")), (Internal, Unavailable))
        else:
            breaks(broker, number)
        bystander.wait_for_rounds()
        disk.mount_anew()
        daemon.wait_ready()
        # What was acknowledged is there, and everything works: the actor has started itself anew.
        assert {info.name for info in broker.walk()} == {"base", "active"}
        broker.prepare("new", "base")
        broker.commit("name", "active", sync=True)
        bystander.wait_for_rounds()
    daemon.stop()


def test_nothing_is_handed_out_on_a_read_only_disk(disk: Disk, start_daemon: StartDaemon, tmp_path: Path) -> None:
    """The database lies elsewhere and goes on; directories made ahead of time are there, but of no use."""
    pool = {"pool_min": STOCKED, "pool_max": STOCKED}
    section = {"root": str(disk.path / "root"), "metadata": str(tmp_path / "metadata"), "limits": {"pool": pool}}
    daemon = start_daemon({"overlayfs": section, "memory": {"backend": "memory"}})
    with daemon.client("overlayfs", patience=0) as broker, Bystander(daemon, "memory"):
        broker.prepare("active")
        disk.turn_read_only()
        error: BrokerError | None = None
        made = 0
        while error is None:
            # The first ones are there already, before anybody has noticed.
            try:
                broker.prepare(f"k{made}")
                made += 1
            except BrokerError as refusal:
                error = refusal
        assert made < STOCKED
        assert isinstance(error, Internal)
        assert error.details["errno"] == errno.EROFS
        # What needs no file goes on.
        assert broker.update("active", {"a": "b"}).labels == {"a": "b"}
        assert broker.mounts("active")
    daemon.stop()


@pytest.mark.parametrize("snapshotter", ["overlayfs", "native"])
def test_what_creates_is_refused_before_inodes_run_out(snapshotter: str, start_daemon: StartDaemon) -> None:
    with loop_filesystem("ext4", 64 << 20, "-m", "0", "-N", "2048") as path:
        reserve = os.statvfs(path).f_favail - 150
        space = {"reserve_inodes": reserve, "reserve_bytes": 1 << 20}
        limits = {"space": space, "pool": {"pool_min": 16, "pool_max": 16}}
        daemon = start_daemon(
            {snapshotter: {"root": str(path / "root"), "limits": limits}, "memory": {"backend": "memory"}}
        )
        with daemon.client(snapshotter, patience=0) as broker, Bystander(daemon, "memory"):
            made = []
            error: BrokerError | None = None
            while error is None:
                try:
                    broker.prepare(f"k{len(made)}")
                    made.append(f"k{len(made)}")
                except BrokerError as refusal:
                    error = refusal
            assert isinstance(error, ResourceExhausted)
            assert error.details["retry_after_ms"] > 0
            assert error.details["free_inodes"] < reserve
            assert os.statvfs(path).f_favail > reserve - 100
            broker.commit("base", made[0])
            for key in made[1:]:
                broker.remove(key)
            broker.cleanup()
            wait_until(lambda: succeeds(lambda: broker.prepare("again")), "room again")
        daemon.stop()


def test_a_copy_ends_where_the_reserve_begins(start_daemon: StartDaemon) -> None:
    reserve = 40 << 20
    with loop_filesystem("ext4", 200 << 20, "-m", "0") as path:
        section = {"root": str(path / "root"), "limits": {"space": {"reserve_bytes": reserve}}}
        daemon = start_daemon({"native": section, "memory": {"backend": "memory"}})
        with daemon.client("native", patience=0) as broker, Bystander(daemon, "memory") as bystander:
            with broker.workspace(commit_as="base") as workspace:
                for number in range(5):
                    (workspace / f"file-{number}").write_bytes(bytes([number]) * (10 << 20))
            broker.prepare("fits", "base")
            assert free_bytes(os.statvfs(path)) > reserve, "it is not refused at once"
            for key in ("large", "large"):
                with pytest.raises(ResourceExhausted, match="the reserve is") as refused:
                    broker.prepare(key, "base")
                # Not much of the reserve was taken, and everything is back.
                assert reserve - (16 << 20) < refused.value.details["free_bytes"] < reserve
                wait_until(lambda: free_bytes(os.statvfs(path)) > reserve, "room as before")
            bystander.wait_for_rounds()
            broker.remove("fits")
            broker.cleanup()
            wait_until(lambda: succeeds(lambda: broker.prepare("large", "base")), "room again")
        daemon.stop()


def succeeds(call: Callable[[], object]) -> bool:
    try:
        call()
    except ResourceExhausted:
        return False
    return True
