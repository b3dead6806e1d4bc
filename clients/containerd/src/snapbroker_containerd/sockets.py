"""The unix socket's place: taken so that nobody's is taken away, by a mode that holds from the first moment."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from typing import Final

from snapbroker.errors import FailedPrecondition, InvalidArgument

PATH_BYTES_MAX: Final = 107
"""A unix socket's path, by the kernel's structure."""


@contextlib.contextmanager
def place(path: str, mode: int) -> Iterator[None]:
    """Within the block a socket may be bound to `path`: nobody listens there, and it is created with `mode`.

    One that is left over there is removed. Two bridges that start at the same time come one after the other, or the
    second would take the first one's socket for a left-over.
    """
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise InvalidArgument(f"{path}: the socket's path has over {PATH_BYTES_MAX} bytes: choose a shorter one")
    try:
        directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be listened on: {error.strerror}") from None
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        _remove_stale(path)
        before = os.umask(0o777 & ~mode)
        try:
            yield
        finally:
            os.umask(before)
    finally:
        os.close(directory)


def _remove_stale(path: str) -> None:
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise FailedPrecondition(f"{path} exists and is no socket: choose another one")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            raise FailedPrecondition(f"{path} cannot be listened on: {error.strerror}") from None
    raise FailedPrecondition(f"somebody listens on {path} already: stop it, or choose another socket")


def notify(message: str) -> None:
    """Tell the service manager, when it listens (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    # A service manager that does not take the message is no reason not to serve.
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel,
    ):
        channel.sendto(message.encode(), address)
