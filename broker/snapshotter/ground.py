"""Whether the directories that an actor works in are still those that their paths lead to.

Everything is done through descriptors and a mapped file that were opened at the start. When a filesystem is unmounted
because it failed, or a directory is moved away or deleted, these go on to stand for what was there before: writes would
fail for ever, or be acknowledged and gone with the next start, and a filesystem cannot be mounted anew while somebody
holds the old one. So each second the paths are looked at. When one of them leads elsewhere the actor ends, and its
successors wait until there is a database again: a start makes none where an earlier one of the same daemon had one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from broker.logs import get_logger
from snapbroker.errors import Unavailable

log = get_logger()

LAYOUT: Final = ("snapshots", "trash")
"""Directories of a root that are looked at where the backend has them."""
Identity = tuple[int, int, int]


def require(database: Path) -> None:
    """Unavailable where there is no database: for a start after one that had it."""
    if not database.is_file():
        raise Unavailable(
            f"{database} was there and is missing: mount its filesystem, or put it back; to begin with an empty store "
            "start the daemon anew"
        )


class Ground:
    """The places of one actor, looked at with `lost`."""

    def __init__(self, root: Path, database: Path) -> None:
        self._held = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in _places(root, database)}
        self._identities = {path: _identity(descriptor) for path, descriptor in self._held.items()}

    def lost(self) -> bool:
        """Whether a path leads nowhere, or elsewhere than at the start; it is logged."""
        for path, identity in self._identities.items():
            try:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                log.error("a place of the snapshotter is missing", place=str(path))
                return True
            except OSError as error:
                # The disk fails, or descriptors have run out: what is held may be good for more.
                log.warning("a place of the snapshotter cannot be looked at", place=str(path), error=error.strerror)
                continue
            try:
                if _identity(descriptor) != identity:
                    log.error("a place of the snapshotter is another one", place=str(path))
                    return True
            except OSError as error:
                log.warning("a place of the snapshotter cannot be looked at", place=str(path), error=error.strerror)
            finally:
                os.close(descriptor)
        return False

    def close(self) -> None:
        """Let go of the places."""
        for descriptor in self._held.values():
            os.close(descriptor)


def _places(root: Path, database: Path) -> Sequence[Path]:
    return [root, database, *(root / name for name in LAYOUT if (root / name).is_dir())]


def _identity(descriptor: int) -> Identity:
    """Mount, device and inode: one filesystem mounted a second time has the same devices and inodes."""
    found = os.fstat(descriptor)
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as lines:
        mount = next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))
    return mount, found.st_dev, found.st_ino
