"""Where a mount goes: found below the mount point without following a link that a snapshot may contain."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapbroker.errors import FailedPrecondition

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True, slots=True)
class Place:
    """A mount point: `descriptor` (O_PATH) for attaching, `path` for unmounting and messages."""

    path: str
    descriptor: int

    @property
    def link(self) -> str:
        """The place for calls that take a path: not to be led elsewhere by a rename."""
        return f"/proc/self/fd/{self.descriptor}"


@contextlib.contextmanager
def place(root: str, parts: Sequence[str]) -> Iterator[Place]:
    """The place `parts` below `root`, an absolute path without symbolic links.

    A snapshot's files are anybody's work: a link in them could lead a mount over `/etc`. So the way below the
    root is walked step by step, through mounts but not through links.
    """
    path = root
    descriptor = os.open(root, os.O_PATH | os.O_CLOEXEC)
    try:
        for part in parts:
            path = f"{path.rstrip('/')}/{part}"
            following = _step(descriptor, part, path)
            os.close(descriptor)
            descriptor = following
        yield Place(path, descriptor)
    finally:
        os.close(descriptor)


def _step(descriptor: int, part: str, path: str) -> int:
    try:
        found = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise
        raise FailedPrecondition(f"mount point {path} does not exist below the mount before it") from None
    if stat.S_ISLNK(os.fstat(found).st_mode):
        os.close(found)
        raise FailedPrecondition(f"mount point {path} is a symbolic link: it is not followed")
    return found
