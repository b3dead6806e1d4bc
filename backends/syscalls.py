"""The Linux calls that Python's os module lacks, each one thin, typed and raising OSError with its path.

All go through `ctypes.CDLL`, which lets other threads run during the call; `fcntl.ioctl` with a buffer above
1,024 bytes would hold the interpreter's lock for as long as the kernel takes. The calls of the mount API that
came with Linux 5.2 are made by number, since the C library wraps them only from glibc 2.36 on; their numbers
are the same on every architecture.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

AT_FDCWD: Final = -100
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_EMPTY_PATH: Final = 0x1000
AT_RECURSIVE: Final = 0x8000

MS_RDONLY: Final = 0x1
MS_REMOUNT: Final = 0x20
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x40000
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR_IDMAP: Final = 0x100000
OPEN_TREE_CLONE: Final = 1

CLONE_NEWUSER: Final = 0x10000000

DT_UNKNOWN: Final = 0
DT_DIR: Final = 4
DT_REG: Final = 8

EXT4_MAGIC: Final = 0xEF53
XFS_MAGIC: Final = 0x58465342
BTRFS_MAGIC: Final = 0x9123683E

_RENAME_NOREPLACE = 1
_STATX_ATTR_MOUNT_ROOT = 0x2000
_STATX_BYTES = 256
_STATFS_BYTES = 256
_FICLONE = 0x40049409

_OPEN_TREE = 428
_MOVE_MOUNT = 429
_FSOPEN = 430
_FSCONFIG = 431
_FSMOUNT = 432
_MOUNT_SETATTR = 442

_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_MOVE_MOUNT_F_EMPTY_PATH = 4
_CLOEXEC_BIT = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]
_libc.getdents64.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_libc.getdents64.restype = ctypes.c_ssize_t
_libc.mount.argtypes = [
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
]

Path = str | bytes | os.PathLike[str]


def rename_noreplace(src: Path, dst: Path, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
    """Rename `src` to `dst`; FileExistsError where `os.rename` would replace, even an empty directory."""
    result = _libc.renameat2(
        _directory(src_dir_fd), os.fsencode(src), _directory(dst_dir_fd), os.fsencode(dst), _RENAME_NOREPLACE
    )
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(src), None, os.fsdecode(dst))


def syncfs(fd: int) -> None:
    """Write out everything dirty on the filesystem that `fd` is on."""
    _check(_libc.syncfs(fd), f"/proc/self/fd/{fd}")


def is_mount_root(path: Path, dir_fd: int | None = None) -> bool:
    """Whether `path` (not followed; "" is `dir_fd` itself) is where something is mounted.

    Unlike `os.path.ismount` it also knows bind mounts within one filesystem. Needs Linux 5.8; OSError
    EOPNOTSUPP before, since a wrong "no" would let a removal through into somebody else's files.
    """
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    flags = AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH
    _check(_libc.statx(_directory(dir_fd), os.fsencode(path), flags, 0, buffer), path)
    (attributes,) = struct.unpack_from("=Q", buffer, 8)
    (known,) = struct.unpack_from("=Q", buffer, 56)
    if not known & _STATX_ATTR_MOUNT_ROOT:
        raise OSError(errno.EOPNOTSUPP, "this kernel does not tell mount points (5.8 or later does)", os.fsdecode(path))
    return bool(attributes & _STATX_ATTR_MOUNT_ROOT)


def big_ioctl(fd: int, request: int, buffer: bytearray) -> int:
    """ioctl(2) with a structure of any size, filled in place; other threads run meanwhile."""
    view = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    return _check(_libc.ioctl(fd, request, ctypes.addressof(view)), f"/proc/self/fd/{fd}")


def free_bytes(found: os.statvfs_result) -> int:
    """What of a filesystem others than root may still take."""
    return found.f_bavail * found.f_frsize


def filesystem_magic(fd: int) -> int:
    """The kind of filesystem that `fd` is on, as statfs(2) numbers them: see the `*_MAGIC` constants."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    _check(_libc.fstatfs(fd, buffer), f"/proc/self/fd/{fd}")
    (magic,) = struct.unpack_from("@l", buffer)
    return int(magic) & 0xFFFFFFFF


def clone_file(dst_fd: int, src_fd: int) -> None:
    """Make `dst_fd` share all blocks of `src_fd` (a reflink); EOPNOTSUPP or EXDEV where it cannot."""
    fcntl.ioctl(dst_fd, _FICLONE, src_fd)


def entry_types(fd: int) -> dict[str, int]:
    """The entries of the directory `fd` with their `d_type` exactly as the filesystem gave it.

    `os.scandir` hides a missing type behind a stat; overlayfs cannot, and needs to be told (C116).
    """
    # A descriptor of its own: one shared with others would be read from wherever they left it.
    own = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    try:
        return _entry_types(own)
    finally:
        os.close(own)


def _entry_types(fd: int) -> dict[str, int]:
    found: dict[str, int] = {}
    buffer = ctypes.create_string_buffer(32768)
    while size := _check(_libc.getdents64(fd, buffer, len(buffer)), f"/proc/self/fd/{fd}"):
        offset = 0
        raw = buffer.raw
        while offset < size:
            length, kind = struct.unpack_from("=HB", raw, offset + 16)
            name = raw[offset + 19 : offset + length].split(b"\0", 1)[0]
            if name not in (b".", b".."):
                found[os.fsdecode(name)] = kind
            offset += length
    return found


def mount(source: Path, target: Path, filesystem: str | None, flags: int = 0, data: str | None = None) -> None:
    """Mount `source` at `target`, the classic way; `data` is the option string, one page at most."""
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        None if filesystem is None else filesystem.encode(),
        flags,
        None if data is None else os.fsencode(data),
    )
    _check(result, target)


def unmount(target: Path, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(ctypes.c_char_p(os.fsencode(target)), ctypes.c_int(flags)), target)


def detached_mount(filesystem: str, options: Iterable[tuple[str, str | None]], attributes: int = 0) -> int:
    """Mount a filesystem nowhere and answer a descriptor of it; closing the last one unmounts it.

    `options` are pairs of key and value, None for a flag; a value is 255 bytes at most. The kernel's own
    words about a refusal are in the OSError's message. Needs Linux 5.2.
    """
    context = _check(_syscall(_FSOPEN, filesystem.encode(), _CLOEXEC_BIT), filesystem)
    try:
        step = filesystem
        try:
            for key, value in options:
                step = key if value is None else f"{key}={value}"
                _configure(context, key, value)
            step = filesystem
            _check(_syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0), filesystem)
            return _check(_syscall(_FSMOUNT, context, _CLOEXEC_BIT, attributes), filesystem)
        except OSError as error:
            words = "; ".join((os.strerror(error.errno or 0), *_kernel_words(context)))
            raise OSError(error.errno, words, step) from None
    finally:
        os.close(context)


def open_tree(path: Path, flags: int = OPEN_TREE_CLONE, dir_fd: int | None = None) -> int:
    """A detached clone of the mount at `path`, as a descriptor; closing the last one unmounts it."""
    descriptor = _syscall(_OPEN_TREE, _directory(dir_fd), os.fsencode(path), flags | os.O_CLOEXEC)
    return _check(descriptor, path)


def move_mount(fd: int, target: Path) -> None:
    """Attach the detached mount `fd` at `target`."""
    _check(
        _syscall(_MOVE_MOUNT, fd, b"", AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH),
        target,
    )


def mount_setattr(fd: int, attributes: int, user_namespace_fd: int = 0, recursive: bool = False) -> None:
    """Set MOUNT_ATTR_* on the mount `fd`; MOUNT_ATTR_IDMAP maps owners as the user namespace does."""
    record = struct.pack("=4Q", attributes, 0, 0, user_namespace_fd)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _check(_syscall(_MOUNT_SETATTR, fd, b"", flags, record, len(record)), f"/proc/self/fd/{fd}")


def _configure(context: int, key: str, value: str | None) -> None:
    if value is None:
        result = _syscall(_FSCONFIG, context, _FSCONFIG_SET_FLAG, key.encode(), None, 0)
    else:
        result = _syscall(_FSCONFIG, context, _FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0)
    _check(result, key)


def _kernel_words(context: int) -> list[str]:
    """What the kernel left in the context's log, one message a read, until ENODATA."""
    words: list[str] = []
    with contextlib.suppress(OSError):
        while message := os.read(context, 8192):
            words.append(message.decode(errors="replace").strip())
    return words


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    # syscall(2) is variadic: each argument must be as wide as a register, or its upper half is undefined.
    wide = (
        ctypes.c_long(argument) if isinstance(argument, int) else ctypes.c_char_p(argument) for argument in arguments
    )
    return int(_libc.syscall(ctypes.c_long(number), *wide))


def _directory(dir_fd: int | None) -> int:
    return AT_FDCWD if dir_fd is None else dir_fd


def _check(result: int, path: Path) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(path))
    return result
