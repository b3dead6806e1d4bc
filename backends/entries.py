"""Copying single files, directories, links and devices with all that belongs to them; `copying` walks whole trees.

A copy that takes the place of its original has everything of it: owners, modes, times to the nanosecond, extended
attributes (capabilities, ACLs and `trusted.*` among them), symbolic links, devices, fifos, sockets and holes (C123).
The order for each file matters: the owner first, since chown clears set-user-id bits and capabilities; then attributes;
then the mode, since an ACL rewrites it; the times last.

Most files are small, and what a small one costs is its system calls. So a file is made with its own mode, and set to it
afterwards only where that does not come out by itself: because of the umask, special bits, or attributes.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from backends.failpoints import reach
from backends.syscalls import clone_file
from snapbroker.errors import Cancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from backends.api import Task

Reflink: TypeAlias = Literal["auto", "always", "never"]
"""Whether files share blocks with their originals: where it works, or the copy fails, or not at all."""

CHUNK_BYTES: Final = 4 << 20
"""Bytes copied between two reports: after each the task may end the copy, for want of room or because it is cancelled.
64 MiB at a time were no quicker."""
BUFFER_BYTES: Final = 1 << 20
"""Bytes read at a time where the kernel cannot copy by itself."""
SMALL_BYTES: Final = 128 << 10
"""Up to this size one read and one write are cheaper than asking the kernel to copy."""

_SOURCE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_DESTINATION = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_NO_CLONE_HERE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.ENOSYS)
_NO_CLONE_OF_THIS = (errno.EINVAL, errno.ETXTBSY)
_NO_RANGE_COPY = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM)
_ATTRIBUTE_REFUSED = (errno.EOPNOTSUPP, errno.EPERM, errno.EACCES)
_ACLS = ("system.posix_acl_access", "system.posix_acl_default")
# How xfs shows where it keeps those two; anywhere else they would be attributes like others.
_XFS_ACLS = ("trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT")

_logger = logging.getLogger("backends")


@dataclass(slots=True)
class Entry:
    """What is to be copied: where it is, where it goes, what it was when it was looked at."""

    source: str
    destination: str
    status: os.stat_result


class EntryCopy:
    """Copies single entries, from any thread; shared state is what was learnt and whether to stop.

    `wrote` is told how many bytes went into files, one thread at a time; shared blocks do not count.
    """

    def __init__(self, task: Task, reflink: Reflink, wrote: Callable[[int], None] | None = None) -> None:
        self._task = task
        self._reflink = reflink
        self._wrote = wrote
        self._clones = reflink != "never"
        self._lock = threading.Lock()
        self._refused: set[str] = set()
        self._modes: dict[int, bool] = {}
        self._owner = (os.geteuid(), os.getegid())
        self._quiet = os.O_NOATIME
        self.shared = False
        self.failure: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """Make every thread stop at its next entry or chunk."""
        with self._lock:
            if self.failure is None:
                self.failure = error

    def advance(self, entries: int, size: int) -> None:
        """Note progress; raise when the copy is to stop."""
        if self.failure is not None:
            raise Cancelled("another part of the copy failed")
        with self._lock:
            self._task.advance(entries, size)

    def open_quietly(self, path: str, flags: int) -> int:
        """Open for reading without touching the access time, where that is allowed."""
        try:
            return os.open(path, flags | self._quiet)
        except PermissionError:
            if not self._quiet:
                raise
            # Only the owner and root may do that; everybody else still reads.
            fd = os.open(path, flags)
            self._quiet = 0
            return fd

    def copy_all(self, entries: list[Entry]) -> None:
        """Copy regular files."""
        for entry in entries:
            self._copy(entry)

    def _copy(self, entry: Entry) -> None:
        status = entry.status
        source = self.open_quietly(entry.source, _SOURCE)
        try:
            destination = self._create(entry.destination, status)
            try:
                size = status.st_size
                reported = self._copy_data(source, destination, status) if size else 0
                self._own(destination, status)
                self._finish_file(destination, status, plain=not self._copy_attributes(source, destination))
            finally:
                os.close(destination)
        finally:
            os.close(source)
        reach("entries.copied")
        self.advance(1, size - reported)

    def make_file(self, path: str, content: bytes, status: os.stat_result) -> None:
        """Make a file without attributes, its content being known."""
        fd = self._create(path, status)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(fd, rest) :]
            self._own(fd, status)
            self._finish_file(fd, status, plain=True)
        finally:
            os.close(fd)
        self.advance(1, len(content))

    @staticmethod
    def _create(path: str, status: os.stat_result) -> int:
        # The owner's bits, whatever the mode: only who may write a file may give it attributes.
        return os.open(path, _DESTINATION, status.st_mode & 0o777 | 0o600)

    def _own(self, destination: int | str, status: os.stat_result) -> None:
        if (status.st_uid, status.st_gid) != self._owner:
            os.chown(destination, status.st_uid, status.st_gid, follow_symlinks=isinstance(destination, int))

    def _finish_file(self, fd: int, status: os.stat_result, plain: bool) -> None:
        """Give a file its mode and times; `plain` when it has no attributes, which change the mode."""
        mode = stat.S_IMODE(status.st_mode)
        if not (plain and self._comes_out(mode, fd)):
            os.chmod(fd, mode)
        os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _comes_out(self, mode: int, fd: int) -> bool:
        """Whether a file made for `mode` has it, as `fd` was: the umask decides, the same for all of the copy."""
        known = self._modes.get(mode)
        if known is None:
            known = self._modes[mode] = stat.S_IMODE(os.fstat(fd).st_mode) == mode
        return known

    def finish(self, directory: Entry, plain: bool = False) -> None:
        """Give a directory what its original has, everything in it being there; a `plain` one has no attributes."""
        destination, status = directory.destination, directory.status
        self._own(destination, status)
        if not plain:
            self._copy_attributes(directory.source, destination)
        os.chmod(destination, stat.S_IMODE(status.st_mode))
        os.utime(destination, ns=(status.st_atime_ns, status.st_mtime_ns))
        self.advance(1, 0)

    def make_special(self, entry: Entry) -> None:
        """Make a symbolic link, device, fifo or socket."""
        status = entry.status
        link = stat.S_ISLNK(status.st_mode)
        if link:
            os.symlink(os.readlink(entry.source), entry.destination)
        else:
            os.mknod(entry.destination, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev)
        self._own(entry.destination, status)
        self._copy_attributes(entry.source, entry.destination, follow=False)
        if not link:
            os.chmod(entry.destination, stat.S_IMODE(status.st_mode))
        times = (status.st_atime_ns, status.st_mtime_ns)
        os.utime(entry.destination, ns=times, follow_symlinks=False)
        self.advance(1, 0)

    def _copy_attributes(self, source: int | str, destination: int | str, follow: bool = True) -> bool:
        """Copy extended attributes; answer whether there are any."""
        names = attributes(source, follow)
        for name in names:
            try:
                value = os.getxattr(source, name, follow_symlinks=follow)
                os.setxattr(destination, name, value, follow_symlinks=follow)
            except OSError as error:
                if error.errno not in _ATTRIBUTE_REFUSED:
                    raise
                self._log_refused(name, destination, error)
        return bool(names)

    def _log_refused(self, name: str, destination: int | str, error: OSError) -> None:
        """Once for each attribute: what is refused for one file is refused for all of them."""
        with self._lock:
            known = name in self._refused
            self._refused.add(name)
        if not known:
            path = os.readlink(f"/proc/self/fd/{destination}") if isinstance(destination, int) else destination
            _logger.warning("attribute %s is not copied to %s and the like: %s", name, path, error.strerror)

    def _copy_data(self, source: int, destination: int, status: os.stat_result) -> int:
        """Copy what is in the file; answer how many bytes of it have been reported already."""
        if self._clones and self._clone(source, destination):
            return 0
        size = status.st_size
        if has_holes(status):
            os.truncate(destination, size)
            return sum(self._copy_range(source, destination, start, end) for start, end in _data(source, size))
        if size > SMALL_BYTES:
            return self._copy_range(source, destination, 0, size)
        content = os.read(source, size)
        if os.write(destination, content) < len(content) or len(content) < size:
            # Cut short by a full disk, a signal or a file that shrank: do it the long way, from the start.
            return self._copy_range(source, destination, 0, size)
        self._note_written(size)
        return 0

    def _note_written(self, size: int) -> None:
        if self._wrote is not None:
            with self._lock:
                self._wrote(size)

    def _clone(self, source: int, destination: int) -> bool:
        try:
            clone_file(destination, source)
        except OSError as error:
            if self._reflink == "always":
                raise OSError(error.errno, f"cannot share blocks (reflink = always): {error.strerror}") from None
            if error.errno in _NO_CLONE_HERE:
                self._clones = False
            elif error.errno not in _NO_CLONE_OF_THIS:
                raise
            return False
        self.shared = True
        return True

    def _copy_range(self, source: int, destination: int, start: int, end: int) -> int:
        """Copy the bytes from `start` to `end`; answer how many were reported."""
        position = start
        while position < end:
            count = self._copy_chunk(source, destination, position, min(end - position, CHUNK_BYTES))
            if count == 0:
                break
            position += count
            self._note_written(count)
            self.advance(0, count)
        return position - start

    def _copy_chunk(self, source: int, destination: int, position: int, size: int) -> int:
        # copy_file_range shares blocks wherever it can, which `never` forbids.
        if self._reflink != "never":
            try:
                return os.copy_file_range(source, destination, size, position, position)
            except OSError as error:
                if error.errno not in _NO_RANGE_COPY:
                    raise
        content = os.pread(source, min(size, BUFFER_BYTES), position)
        return os.pwrite(destination, content, position) if content else 0


def make_plain(directory: str) -> None:
    """Let nothing that is made in an empty directory inherit a group or an ACL from it, nor be seen by others."""
    status = os.stat(directory, follow_symlinks=False)
    owner = (os.geteuid(), os.getegid())
    if (status.st_uid, status.st_gid) != owner:
        os.chown(directory, *owner, follow_symlinks=False)
    for name in attributes(directory):
        if name in _ACLS:
            os.removexattr(directory, name)
    if stat.S_IMODE(status.st_mode) != 0o700:
        os.chmod(directory, 0o700)


def attributes(path: int | str, follow: bool = False) -> list[str]:
    """The names of the extended attributes that a copy has to have; none where the filesystem has no such thing."""
    try:
        names = os.listxattr(path, follow_symlinks=follow)
    except OSError as error:
        if error.errno not in _ATTRIBUTE_REFUSED:
            raise
        return []
    return [name for name in names if name not in _XFS_ACLS] if names else names


def has_holes(status: os.stat_result) -> bool:
    """Whether a file takes fewer blocks than its size needs."""
    return status.st_blocks * 512 < status.st_size


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file has data and not holes: pairs of start and end."""
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, min(position, size)
