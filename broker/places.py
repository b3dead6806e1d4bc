"""Local sockets with the rights they are to have, from their first moment on, and a directory nobody can swap them in.

A socket's file is made by bind(2), with what the umask leaves. So it is bound for its owner alone, then given to
owner and group, and opened for others last: at no instant has it more rights than in the end. The file is
held by a descriptor meanwhile, lest a link that somebody put in its place be followed.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from snapbroker.errors import FailedPrecondition, InvalidArgument

UNCHANGED: Final = -1
_BIND_UMASK: Final = 0o177

T = TypeVar("T")


def user_id(told: str | int) -> int:
    """A user's number; InvalidArgument where there is no such user, UNCHANGED for ''."""
    return _number(told, lambda name: pwd.getpwnam(name).pw_uid, "user")


def group_id(told: str | int) -> int:
    """A group's number; InvalidArgument where there is no such group, UNCHANGED for ''."""
    return _number(told, lambda name: grp.getgrnam(name).gr_gid, "group")


def _number(told: str | int, find: Callable[[str], int], what: str) -> int:
    if isinstance(told, str):
        if not told:
            return UNCHANGED
        if not told.isascii() or not told.isdecimal():
            try:
                return find(told)
            except (KeyError, ValueError, OSError):
                raise InvalidArgument(f"there is no {what} {told[:80]!r} on this machine") from None
        told = int(told)
    # The highest one means "unchanged" to the kernel.
    if not 0 <= told < 2**32 - 1:
        raise InvalidArgument(f"{told} is no {what}'s number")
    return told


def bind_local(bind: Callable[[], T], endpoint: str, owner: int, group: int, mode: int) -> T:
    """Run `bind`, which binds the endpoint, and give its socket owner, group and mode."""
    if not endpoint.startswith("ipc://") or endpoint.startswith("ipc://@"):
        return bind()
    old = os.umask(_BIND_UMASK)
    try:
        bound = bind()
    finally:
        os.umask(old)
    _give(Path(endpoint.removeprefix("ipc://")), owner, group, mode)
    return bound


def _give(path: Path, owner: int, group: int, mode: int) -> None:
    try:
        held = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(held)
            if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
                raise FailedPrecondition(f"{path} was replaced while it was made: choose a directory of the broker's")
            itself = f"/proc/self/fd/{held}"
            if (owner, group) != (UNCHANGED, UNCHANGED):
                os.chown(itself, owner, group)
            os.chmod(itself, mode)
        finally:
            os.close(held)
    except OSError as error:
        raise FailedPrecondition(
            f"{path} cannot be given to user {owner} and group {group} with mode {mode:#o}: {error.strerror}: "
            "only root gives files away; others can name a group that they are in"
        ) from None


def check_runtime(directory: Path) -> None:
    """FailedPrecondition where others could put a socket of their own in the place of the broker's."""
    found = directory.stat()
    if found.st_uid not in (0, os.geteuid()):
        raise FailedPrecondition(f"{directory} belongs to user {found.st_uid}: choose another --runtime, or chown it")
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise FailedPrecondition(
            f"{directory}: others can write to it, and put a socket of their own there: chmod go-w {directory}"
        )
