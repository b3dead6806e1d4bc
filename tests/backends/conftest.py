"""Filesystems of the tests' own, on loop devices, and what looks at them after a power cut."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from backends import syscalls
from backends.syscalls import clone_file

pytest.register_assert_rewrite("backends.testsuite")

MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "ext4-nojournal": ["mkfs.ext4", "-q", "-F", "-O", "^has_journal"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def loop_mounted(image, target, *options, direct="on"):
    """Mount a filesystem image; it is unmounted and its device detached whatever happens."""
    device = run("losetup", f"--direct-io={direct}", "--find", "--show", image)
    try:
        target.mkdir(exist_ok=True)
        run("mount", *options, device, target)
        try:
            yield target
        finally:
            run("umount", "--recursive", "--lazy", target)
    finally:
        run("losetup", "--detach", device)


class Disk:
    """A mounted filesystem over an image whose state can be photographed as a power cut would leave it."""

    def __init__(self, kind, image, mountpoint):
        self.kind = kind
        self.image = image
        self.root = mountpoint

    @contextlib.contextmanager
    def after_power_cut(self):
        """The filesystem as it is once only what has reached the disk is left."""
        photograph = self.image.with_suffix(".cut")
        with self.image.open("rb") as source, photograph.open("wb") as target:
            clone_file(target.fileno(), source.fileno())
        options = ("-o", "nouuid") if self.kind == "xfs" else ()
        try:
            with loop_mounted(photograph, self.root.with_suffix(".after"), *options, direct="off") as root:
                yield root
        finally:
            photograph.unlink()


@pytest.fixture
def scratch():
    """A directory on a real disk; /tmp may be a tmpfs."""
    path = Path(tempfile.mkdtemp(prefix="snapbroker-test-", dir="/var/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def filesystem(scratch):
    """Called with a kind of `MKFS`, mounts a fresh filesystem of it and answers its root."""
    with contextlib.ExitStack() as stack:

        def make(kind, size="1G", *arguments):
            image = scratch / f"{kind}.img"
            run("truncate", "--size", size, image)
            run(*MKFS[kind], *arguments, image)
            return stack.enter_context(loop_mounted(image, scratch / kind))

        yield make


@pytest.fixture
def disk(filesystem):
    """Called with a kind of `MKFS`, answers a `Disk`: its image lies on an xfs that can clone it."""
    with contextlib.ExitStack() as stack:

        def make(kind):
            host = filesystem("xfs", "3G")
            image = host / "disk.img"
            run("truncate", "--size", "1G", image)
            run(*MKFS[kind], image)
            mountpoint = host / "disk"
            return Disk(kind, image, stack.enter_context(loop_mounted(image, mountpoint)))

        yield make


@pytest.fixture
def mounted(tmp_path):
    """Called with a directory, mounts a small tmpfs on it until the test ends."""
    targets = []

    def make(target):
        syscalls.mount("tmpfs", target, "tmpfs")
        targets.append(target)
        return target

    yield make
    for target in reversed(targets):
        # The test may have unmounted it, or moved the directory that carries it.
        with contextlib.suppress(OSError):
            syscalls.unmount(target, syscalls.MNT_DETACH)


@pytest.fixture
def protect():
    """Called with a file, makes it immutable until it is deleted."""

    def make(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, 0x40086602, (0x10).to_bytes(8, "little"))
        finally:
            os.close(fd)

    return make
