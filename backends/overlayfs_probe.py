"""What overlayfs can do on this machine and filesystem, found out by trying it on mounts that nobody sees.

Every trial is a *detached* mount: it exists as a descriptor only, appears in no mount table, and is gone when
the descriptor is closed, even by a crash. Its directories lie in a temporary directory on the filesystem in
question and are named through /proc/self/fd, since a mount option holds 255 bytes at most.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backends.api import Task
from backends.files import remove_tree
from backends.syscalls import (
    AT_EMPTY_PATH,
    DT_DIR,
    DT_REG,
    MOUNT_ATTR_IDMAP,
    OPEN_TREE_CLONE,
    detached_mount,
    entry_types,
    mount_setattr,
    open_tree,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

GENERIC_OPTIONS = frozenset(
    (
        *("rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync"),
        *("relatime", "strictatime", "atime", "noatime", "diratime", "nodiratime"),
    )
)
"""Options of every mount, which mount(8) makes flags of: overlayfs itself does not know them."""
RESERVED_OPTIONS = frozenset(["ro", "lowerdir", "lowerdir+", "datadir+", "upperdir", "workdir", "source"])
"""Options that this backend sets itself, and `ro`, which tells an unpacker that a layer is complete (C98)."""

_DIRECTORIES = ("above", "below", "upper", "work")
_HOST_NAMESPACE = ["0", "0", "4294967295"]
_NAMESPACE_HOLDER = (
    "import ctypes, sys\nif ctypes.CDLL(None).unshare(0x10000000): sys.exit(1)\nprint(flush=True); sys.stdin.read()"
)


@dataclass(frozen=True, slots=True)
class Features:
    """What was found: `missing` says, one line each, why overlayfs cannot be used here at all."""

    missing: tuple[str, ...] = ()
    index: bool = False
    """Whether the option `index` exists, so that `index=off` is to be given (C110)."""
    userxattr: bool = False
    """Whether marks must be kept in `user.*` attributes, as in a user namespace (C110)."""
    idmapped: bool = False
    """Whether lower layers may be idmapped (C111)."""
    user_namespace: bool = False


def examine(root: Path, mount_options: Sequence[str]) -> Features:
    """Try everything in a temporary directory at `root`, or at the nearest directory above it that exists."""
    place = root
    while not place.is_dir():
        place = place.parent
    try:
        with _temporary_directory(place) as fd:
            return _examine(fd, mount_options)
    except OSError as error:
        return Features(missing=(f"{place}: cannot be written to: {error.strerror}",))


@contextlib.contextmanager
def _temporary_directory(place: str | os.PathLike[str]) -> Iterator[int]:
    path = tempfile.mkdtemp(prefix=".snapbroker-probe-", dir=place)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
        place_fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            remove_tree(os.path.basename(path), place_fd, Task())
        finally:
            os.close(place_fd)


def _examine(fd: int, mount_options: Sequence[str]) -> Features:
    user_namespace = in_user_namespace()
    userxattr = user_namespace and _wants_userxattr(fd, mount_options)
    marks = ["userxattr"] if userxattr else []
    missing = []
    if not tells_types(fd):
        missing.append("directories do not tell the types of their entries (d_type); xfs needs ftype=1")
    if refusal := _refusal(fd, marks):
        missing.append(f"overlay cannot be mounted here: {refusal}")
    else:
        missing.extend(
            f"mount option {option!r}: {refusal}"
            for option in mount_options
            if (refusal := _option_refusal(fd, option, marks))
        )
    if missing:
        return Features(tuple(missing), user_namespace=user_namespace)
    return Features(
        index=not _has_option(mount_options, "index") and _refusal(fd, [*marks, "index=off"]) is None,
        userxattr=userxattr,
        idmapped=_maps_lowers(fd, marks),
        user_namespace=user_namespace,
    )


def in_user_namespace() -> bool:
    """Whether ids are mapped here, so that marks in `trusted.*` attributes are out of reach."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return file.read().split() != _HOST_NAMESPACE


def tells_types(fd: int) -> bool:
    """Whether the filesystem of the directory `fd` gives its entries' types (C116)."""
    os.mkdir("directory", dir_fd=fd)
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, dir_fd=fd))
    types = entry_types(fd)
    return types["directory"] == DT_DIR and types["file"] == DT_REG


def _has_option(mount_options: Sequence[str], name: str) -> bool:
    return any(option.partition("=")[0] == name for option in mount_options)


def _wants_userxattr(fd: int, mount_options: Sequence[str]) -> bool:
    # Without the option the mount succeeds as well, and fails with EIO when a directory is made opaque. With
    # it, it succeeds too where the filesystem has no such attributes, as tmpfs before Linux 6.6.
    if _has_option(mount_options, "userxattr"):
        return False
    try:
        os.setxattr(fd, "user.overlay.probe", b"y")
    except OSError:
        return False
    return _refusal(fd, ["userxattr"]) is None


def _option_refusal(fd: int, option: str, marks: Sequence[str]) -> str | None:
    name = option.partition("=")[0]
    if name in RESERVED_OPTIONS:
        return "set by the backend itself, remove it from mount_options"
    if "," in option or "\0" in option or not name:
        return "not one mount option"
    return None if name in GENERIC_OPTIONS else _refusal(fd, [*marks, option])


def _refusal(fd: int, options: Sequence[str]) -> str | None:
    """Why an overlay with these options cannot be mounted, None when it can."""
    try:
        _try_overlay(fd, options)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _maps_lowers(fd: int, marks: Sequence[str]) -> bool:
    try:
        with _user_namespace() as namespace:

            def mapped(lower: int) -> int:
                clone = open_tree("", OPEN_TREE_CLONE | AT_EMPTY_PATH, lower)
                try:
                    mount_setattr(clone, MOUNT_ATTR_IDMAP, namespace)
                except BaseException:
                    os.close(clone)
                    raise
                return clone

            _try_overlay(fd, marks, mapped)
    except OSError:
        return False
    return True


def _try_overlay(fd: int, options: Sequence[str], lower: Callable[[int], int] = os.dup) -> None:
    """Mount an overlay of two lower layers and a fresh upper one; `lower` answers a layer's descriptor."""
    with contextlib.ExitStack() as stack:
        trial = stack.enter_context(_temporary_directory(f"/proc/self/fd/{fd}"))
        opened: dict[str, int] = {}
        for name in _DIRECTORIES:
            os.mkdir(name, dir_fd=trial)
            opened[name] = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=trial)
            stack.callback(os.close, opened[name])
        above, below = lower(opened["above"]), lower(opened["below"])
        stack.callback(os.close, above)
        stack.callback(os.close, below)
        pairs: list[tuple[str, str | None]] = [
            ("source", "overlay"),
            ("lowerdir", f"/proc/self/fd/{above}:/proc/self/fd/{below}"),
            ("upperdir", f"/proc/self/fd/{opened['upper']}"),
            ("workdir", f"/proc/self/fd/{opened['work']}"),
        ]
        pairs.extend(_pair(option) for option in options)
        mounted = detached_mount("overlay", pairs)
        # A mount that cannot use its work directory is made all the same, read-only.
        stack.callback(os.close, mounted)
        if os.statvfs(mounted).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, "mounted read-only: this filesystem cannot hold an upper directory")


def _pair(option: str) -> tuple[str, str | None]:
    name, equals, value = option.partition("=")
    return name, value if equals else None


@contextlib.contextmanager
def _user_namespace() -> Iterator[int]:
    """A descriptor of a user namespace that maps one id, for a trial; made by a process of its own."""
    # Not by a fork: this process may have threads, whose locks a fork would copy in whatever state they are.
    command = [sys.executable, "-I", "-S", "-c", _NAMESPACE_HOLDER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as holder:
        if holder.stdout is None or not holder.stdout.readline():
            raise OSError(errno.EPERM, "user namespaces cannot be made here")
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{holder.pid}/{name}", "w", encoding="ascii") as file:
                file.write("0 0 1")
        namespace = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield namespace
        finally:
            os.close(namespace)
