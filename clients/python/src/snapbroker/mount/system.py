"""The mount system calls of Linux, old and new, as Python functions that raise OSError.

The calls of the new mount API go through `syscall(2)` by number, since a C library older than glibc 2.36 has
no wrappers for them; their numbers are the same on every architecture but alpha. ctypes lets go of the
interpreter lock during a call.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
AT_RECURSIVE: Final = 0x8000

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_SYNCHRONOUS: Final = 16
MS_REMOUNT: Final = 32
MS_DIRSYNC: Final = 128
MS_NOSYMFOLLOW: Final = 256
MS_NOATIME: Final = 1024
MS_NODIRATIME: Final = 2048
MS_BIND: Final = 4096
MS_MOVE: Final = 8192
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MS_RELATIME: Final = 1 << 21
MS_STRICTATIME: Final = 1 << 24
MS_LAZYTIME: Final = 1 << 25

MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR_NOSUID: Final = 0x2
MOUNT_ATTR_NODEV: Final = 0x4
MOUNT_ATTR_NOEXEC: Final = 0x8
MOUNT_ATTR_ATIME: Final = 0x70
"""The field that holds one of RELATIME (0), NOATIME, STRICTATIME."""
MOUNT_ATTR_NOATIME: Final = 0x10
MOUNT_ATTR_STRICTATIME: Final = 0x20
MOUNT_ATTR_NODIRATIME: Final = 0x80
MOUNT_ATTR_IDMAP: Final = 0x100000
MOUNT_ATTR_NOSYMFOLLOW: Final = 0x200000

CLONE_FS: Final = 0x200
CLONE_FILES: Final = 0x400
CLONE_NEWUSER: Final = 0x10000000

STRING_BYTES_MAX: Final = 255
"""Longest string that fsconfig(2) takes as a value."""
PAGE_BYTES_MAX: Final = os.sysconf("SC_PAGE_SIZE") - 1
"""Longest option string that mount(2) takes."""

_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 442
_CLOEXEC: Final = 1
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_SET_FD, _FSCONFIG_CMD_CREATE = 0, 1, 5, 6

_libc = ctypes.CDLL(None, use_errno=True)
_int, _long, _string = ctypes.c_int, ctypes.c_long, ctypes.c_char_p


def _function(name: str, *arguments: type[Any]) -> Callable[..., int]:
    """The C function `name` with a prototype of its own; the same function may have several."""
    function: Callable[..., int] = ctypes.CFUNCTYPE(_long, *arguments, use_errno=True)((name, _libc))
    return function


_mount = _function("mount", _string, _string, _string, ctypes.c_ulong, _string)
_umount2 = _function("umount2", _string, _int)
_unshare = _function("unshare", _int)
_open_tree = _function("syscall", _long, _int, _string, ctypes.c_uint)
_move_mount = _function("syscall", _long, _int, _string, _int, _string, ctypes.c_uint)
_fsopen = _function("syscall", _long, _string, ctypes.c_uint)
_fsconfig = _function("syscall", _long, _int, ctypes.c_uint, _string, _string, _int)
_fsmount = _function("syscall", _long, _int, ctypes.c_uint, ctypes.c_uint)
_mount_setattr = _function("syscall", _long, _int, _string, ctypes.c_uint, _string, ctypes.c_size_t)
_clone = _function("clone", ctypes.c_void_p, ctypes.c_void_p, _int, ctypes.c_void_p)
_sleep_address = ctypes.cast(_libc.sleep, ctypes.c_void_p)


def _checked(result: int, what: str) -> int:
    # The C int arrives as a long whose upper half is undefined for functions that return int.
    result = ctypes.c_int(result).value
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def mount(source: str | None, target: str, fstype: str | None, flags: int = 0, data: bytes | None = None) -> None:
    """Make, change or move a mount the classic way."""
    _checked(
        _mount(
            None if source is None else os.fsencode(source),
            os.fsencode(target),
            None if fstype is None else os.fsencode(fstype),
            flags,
            data,
        ),
        target,
    )


def umount(target: str, flags: int = 0) -> None:
    """Unmount, never through a symbolic link."""
    _checked(_umount2(os.fsencode(target), flags | UMOUNT_NOFOLLOW), target)


def unshare(flags: int) -> None:
    """Give the calling thread what it shared until then."""
    _checked(_unshare(flags), "unshare")


def open_tree(path: str, *, recursive: bool) -> int:
    """A descriptor of a detached copy of the mount at `path`; closing it takes the copy away."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (AT_RECURSIVE if recursive else 0)
    return _checked(_open_tree(_OPEN_TREE, AT_FDCWD, os.fsencode(path), flags), path)


def move_mount(descriptor: int, target: int) -> None:
    """Attach the detached mount `descriptor` on what the descriptor `target` (O_PATH) refers to."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
    _checked(_move_mount(_MOVE_MOUNT, descriptor, b"", target, b"", flags), "move_mount")


def mount_setattr(
    descriptor: int,
    *,
    recursive: bool = False,
    add: int = 0,
    remove: int = 0,
    propagation: int = 0,
    userns: int = 0,
) -> None:
    """Change the attributes of a detached mount, and with `recursive` of all mounts on it, all or none."""
    attributes = struct.pack("=4Q", add, remove, propagation, userns)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _checked(
        _mount_setattr(_MOUNT_SETATTR, descriptor, b"", flags, attributes, len(attributes)),
        "mount_setattr",
    )


def fsopen(fstype: str) -> int:
    """A context in which a filesystem is configured."""
    return _checked(_fsopen(_FSOPEN, os.fsencode(fstype), _CLOEXEC), f"fsopen {fstype}")


def fsconfig_flag(context: int, key: str) -> None:
    """Set a parameter without a value."""
    _checked(_fsconfig(_FSCONFIG, context, _FSCONFIG_SET_FLAG, os.fsencode(key), None, 0), key)


def fsconfig_string(context: int, key: str, value: str) -> None:
    """Set a parameter to a string of at most STRING_BYTES_MAX bytes."""
    what = f"{key}={value}"
    _checked(
        _fsconfig(_FSCONFIG, context, _FSCONFIG_SET_STRING, os.fsencode(key), os.fsencode(value), 0),
        what,
    )


def fsconfig_descriptor(context: int, key: str, descriptor: int) -> None:
    """Set a parameter to what a descriptor refers to."""
    _checked(_fsconfig(_FSCONFIG, context, _FSCONFIG_SET_FD, os.fsencode(key), None, descriptor), key)


def fsconfig_create(context: int) -> None:
    """Bring the configured filesystem into being."""
    _checked(_fsconfig(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0), "create")


def fsmount(context: int, attributes: int) -> int:
    """A descriptor of a detached mount of the filesystem; closing it takes the mount away."""
    return _checked(_fsmount(_FSMOUNT, context, _CLOEXEC, attributes), "fsmount")


def messages(context: int) -> list[str]:
    """What the kernel had to say about a filesystem context, errors and warnings, oldest first."""
    found: list[str] = []
    while True:
        try:
            message = os.read(context, 8192).decode(errors="replace").strip()
        except OSError:
            return found
        # Each begins with its level: "e ", "w " or "i ".
        found.append(message[2:] if message[1:2] == " " else message)


def clone_asleep(flags: int, seconds: int) -> int:
    """The process id of a child that runs nothing but the C library's sleep(3), then ends.

    The child is a copy of this process in which no line of Python is executed, so that no lock that another
    thread holds at this moment can matter. It sends no signal when it ends, and nobody's `waitpid(-1)` finds
    it: the caller reaps it with the option WAIT_CLONE.
    """
    stack = ctypes.create_string_buffer(64 * 1024)
    top = (ctypes.addressof(stack) + len(stack)) & ~0xFF
    return _checked(_clone(_sleep_address, top, flags, seconds), "clone")


WAIT_CLONE: Final = 0x40000000
"""__WALL of waitpid(2)."""
