"""A filesystem whose power can be cut: what had reached its device at one instant, as an image to mount again.

The filesystem under test lies on a loop device over an image, and the image lies on an xfs that shares blocks. A cut
clones the image with one FICLONE while everything runs: the ioctl waits for the device writes that are under way, keeps
out those that follow, and copies no data. The loop device writes directly, so nothing of the image is in a cache of the
machine; what the filesystem under test has in its caches is not in the clone, and is lost as it is in a power cut. To
mount the clone is to replay the filesystem's journal.

A finished device write counts as durable here. A flush that is missing in a program is therefore found; one that is
missing inside the kernel's filesystem, or a drive that lies about its cache, is not.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from snapbroker import mount
from tests.harness import SCRATCH

FILESYSTEMS: Final = ("ext4", "xfs", "btrfs")
"""What is cut; each is made by its own mkfs with the defaults."""
IMAGE_BYTES: Final = 640 << 20
"""Apparent size of a filesystem under test: little more than the smallest xfs."""
HOST_BYTES: Final = 4 << 30
"""Apparent size of the filesystem that holds the images: two of them at a time, and what they do not share."""

_FICLONE: Final = 0x40049409
_MOUNT_OPTIONS: Final = {"xfs": ("-o", "nouuid")}
"""A clone has its origin's UUID, which xfs mounts once."""


@dataclass(frozen=True)
class Cut:
    """An image, and when it was taken: between `before` and `after`, in nanoseconds of the monotonic clock.

    What was acknowledged before `before` must be in it; what was sent after `after` cannot be.
    """

    image: Path
    before: int
    after: int


class Disk:
    """A mounted filesystem on an image; used as a context manager, it is unmounted and its image deleted at the end."""

    def __init__(self, kind: str, image: Path, target: Path) -> None:
        self.kind = kind
        self.image = image
        self.target = target
        self._device = ""

    @classmethod
    def made(cls, kind: str, host: Path, target: Path) -> Self:
        """A fresh filesystem on `host`, not yet mounted."""
        image = host / f"{kind}-{next(_images)}"
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        device = attached(image)
        try:
            run(f"mkfs.{kind}", "-q", device)
        finally:
            run("losetup", "--detach", device)
        return cls(kind, image, target)

    def after(self, cut: Cut) -> Self:
        """The filesystem that a cut has left, to be mounted at the same place."""
        return type(self)(self.kind, cut.image, self.target)

    def new_image(self) -> Path:
        """Where another image can be."""
        return self.image.with_name(f"{self.kind}-{next(_images)}")

    def cut(self, chance: random.Random) -> Cut:
        """Cut the power of a copy: this one goes on. Chance has no part in what is on it."""
        image = self.new_image()
        before = time.monotonic_ns()
        clone(self.image, image)
        return Cut(image, before, time.monotonic_ns())

    def attach(self) -> str:
        """The device that the image is behind."""
        device = attached(self.image)
        if run("losetup", "--noheadings", "--output", "DIO", device).strip() != "1":
            self.detach(device)
            raise RuntimeError(f"{device} does not write directly: a cut would keep what was never flushed")
        return device

    def detach(self, device: str) -> None:
        """Let go of the device."""
        run("losetup", "--detach", device)

    def __enter__(self) -> Self:
        self._device = self.attach()
        try:
            self.target.mkdir(exist_ok=True)
            run("mount", *_MOUNT_OPTIONS.get(self.kind, ()), self._device, self.target)
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            mount.unmount(self.target)
        except BaseException:
            # Somebody is still inside; the image must go all the same.
            mount.unmount(self.target, lazy=True)
            raise
        finally:
            self._detach()

    def _detach(self) -> None:
        try:
            self.detach(self._device)
        finally:
            self.image.unlink()


_images = itertools.count(1)


def attached(file: Path, *, direct: bool = True) -> str:
    """A loop device with the sectors of which a clone on xfs can be written directly: its blocks."""
    options = ["--direct-io=on"] if direct else []
    return run("losetup", *options, "--sector-size=4096", "--find", "--show", file).strip()


def clone(origin: Path, copy: Path) -> None:
    """Make a file that shares all blocks of another one, in one instant."""
    with origin.open("rb") as source, copy.open("wb") as target:
        fcntl.ioctl(target, _FICLONE, source.fileno())


@contextlib.contextmanager
def image_host() -> Iterator[Path]:
    """An xfs that shares blocks, for the images; unmounted, detached and deleted at the end."""
    place = Path(tempfile.mkdtemp(prefix="snb-power-", dir=SCRATCH))
    image, target = place / "image", place / "mnt"
    target.mkdir()
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, place)
        with image.open("wb") as file:
            file.truncate(HOST_BYTES)
        run("mkfs.xfs", "-q", "-m", "reflink=1", image)
        device = run("losetup", "--direct-io=on", "--find", "--show", image).strip()
        undo.callback(run, "losetup", "--detach", device)
        run("mount", device, target)
        # Lazily: a test that failed may have left somebody inside, and the image is to go all the same.
        undo.callback(run, "umount", "--lazy", target)
        yield target


def run(*command: str | os.PathLike[str]) -> str:
    """What a command prints; RuntimeError where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout
