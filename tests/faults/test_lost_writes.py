"""Data that the disk did not take after it was written: told to whoever wrote it, whoever flushed first."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends import files
from backends.files import FilesystemSync

pytestmark = pytest.mark.root
LOST = (errno.EIO, errno.ENOSPC)
"""What the kernel says of a page that its device did not take."""


@contextlib.contextmanager
def thin_filesystem(place: Path) -> Iterator[Path]:
    """An ext4 of 400 MiB on a device that has 80: what is written beyond fails when it is written back."""
    host, target = place / "host", place / "mnt"
    host.mkdir()
    target.mkdir()

    def run(*command: str | Path) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    with contextlib.ExitStack() as undo:
        run("mount", "-t", "tmpfs", "-o", "size=80m", "thin", host)
        undo.callback(run, "umount", "--lazy", host)
        run("truncate", "--size", "400M", host / "image")
        device = run("losetup", "--find", "--show", host / "image")
        undo.callback(run, "losetup", "--detach", device)
        # A journal that met the end of the device would make all of it read-only.
        features = ("-O", "^has_journal", "-E", "lazy_itable_init=0,nodiscard")
        run("mkfs.ext4", "-q", "-m", "0", *features, device)
        run("mount", device, target)
        undo.callback(run, "umount", "--lazy", target)
        yield target


def fail(fd: int) -> None:
    """A flush that says what the kernel says, and nothing of a file."""
    raise OSError(errno.EIO, os.strerror(errno.EIO), f"/proc/self/fd/{fd}")


@pytest.mark.parametrize("again", [False, True], ids=["told once", "told late and again"])
def test_whose_data_was_lost_is_told_though_another_flush_was_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, again: bool
) -> None:
    with thin_filesystem(tmp_path) as path:
        for name in ("mine", "others"):
            (path / name).mkdir()
        os.sync()
        descriptor = os.open(path, os.O_RDONLY)
        try:
            sync = FilesystemSync(descriptor)
            (path / "others" / "small").write_bytes(bytes(4096))
            (path / "mine" / "large").write_bytes(os.urandom(100 << 20))
            # The kernel tells whoever asks first.
            with pytest.raises(OSError, match=r"error|space") as told:
                sync.sync(str(path / "others"))
            assert told.value.errno in LOST
            if again:
                # A write-back that ends later makes the next flush of the filesystem fail too.
                monkeypatch.setattr(files, "syncfs", fail)
            # And whose data it was: with the file, and as often as it asks.
            for _ in range(2):
                with pytest.raises(OSError, match=r"error|space") as told:
                    sync.sync(str(path / "mine"))
                assert told.value.errno in LOST
                assert told.value.filename == str(path / "mine" / "large")
        finally:
            os.close(descriptor)
