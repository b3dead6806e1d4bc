"""The reserve of a filesystem, and the error where it is reached; for a child process too, which imports little."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from backends.syscalls import free_bytes
from snapbroker.errors import BrokerError, Internal, ResourceExhausted

RETRY_MS: Final = 1000


class SpaceLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is kept free on the filesystems of the root and of the metadata."""

    reserve_bytes: int = 16 * 1024 * 1024
    """With less free space than this nothing is created."""
    reserve_inodes: int = 256
    """With fewer free inodes than this nothing is created; filesystems without a fixed number are not asked."""
    ballast_bytes: int = 4 * 1024 * 1024
    """Size of the file that is deleted when less than a quarter of this is free; 0: none."""


def lacking(place: Path, limits: SpaceLimits) -> Callable[[], BrokerError] | None:
    """The error that tells a caller what lacks at a place; None where there is more than the reserve."""
    found = os.statvfs(place)
    if found.f_flag & os.ST_RDONLY:
        # A directory made ahead of time would be handed out all the same.
        return partial(Internal, f"{os.strerror(errno.EROFS)} ({place})", {"errno": errno.EROFS})
    free, inodes = free_bytes(found), found.f_favail
    if free < limits.reserve_bytes:
        what = f"{free} bytes are free at {place}, the reserve is {limits.reserve_bytes}"
    elif found.f_files and inodes < limits.reserve_inodes:
        what = f"{inodes} inodes are free at {place}, the reserve is {limits.reserve_inodes}"
    else:
        return None
    details = {"retry_after_ms": RETRY_MS, "free_bytes": free, "free_inodes": inodes}
    return partial(ResourceExhausted, f"{what}: remove snapshots, or make the filesystem larger", details)
