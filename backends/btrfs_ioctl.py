"""The btrfs ioctls a snapshotter needs, typed, and no more: no command is forked and no library is needed.

Structures and numbers are those of `linux/btrfs.h` and `linux/btrfs_tree.h`. What is larger than 1,024 bytes
goes through `big_ioctl`, so that other threads run while the kernel commits a transaction.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from backends.failpoints import reach
from backends.syscalls import big_ioctl
from snapbroker.contract import Usage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from backends.api import Task

SUBVOLUME_INODE: Final = 256
"""Inode number of the root directory of every subvolume."""
NAME_BYTES_MAX: Final = 255
"""Longest name of an entry."""
SEARCH_BYTES: Final = 64 << 10
"""Room for the answers of one tree search: a few leaves of the tree, and any single item."""

_WRITE, _READ = 1, 2
_U64_MAX = (1 << 64) - 1

_ARGS_BYTES = 4096
_READ_ONLY = 1 << 1
_BY_ID = 1 << 4
_UNKNOWN_FLAG = 1 << 63

_ROOT_TREE = 1
_OWN_TREE = 0
_LAST_OBJECT = _U64_MAX - 255
_INODE_ITEM = 1
_EXTENT_DATA = 108
_ROOT_REF = 156
_TYPE_MAX = 255
_EXTENT_INLINE = 0
_EXTENT_HEADER_BYTES = 21
_INODE_BYTES = 160

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _request(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | 0x94 << 8 | number


_SUBVOL_CREATE = _request(_WRITE, 14, _ARGS_BYTES)
_SNAP_DESTROY = _request(_WRITE, 15, _ARGS_BYTES)
_TREE_SEARCH_V2 = _request(_READ | _WRITE, 17, 112)
_INO_LOOKUP = _request(_READ | _WRITE, 18, _ARGS_BYTES)
_SNAP_CREATE_V2 = _request(_WRITE, 23, _ARGS_BYTES)
_SUBVOL_GETFLAGS = _request(_READ, 25, 8)
_SUBVOL_SETFLAGS = _request(_WRITE, 26, 8)
_DEV_INFO = _request(_READ | _WRITE, 30, _ARGS_BYTES)
_FS_INFO = _request(_READ, 31, 1024)
_GET_SUBVOL_INFO = _request(_READ, 60, 504)
_SNAP_DESTROY_V2 = _request(_WRITE, 63, _ARGS_BYTES)

_SEARCH_ARGS = struct.Struct("=7Q3I36xQ")
_SEARCH_ARGS_BYTES = _SEARCH_ARGS.size
_ITEMS_MAX = (1 << 32) - 1
_SEARCH_COUNT_OFFSET = 64
_ITEM_HEADER = struct.Struct("=3Q2I")
_ROOT_REF_HEADER = struct.Struct("=QQH")
_INODE = struct.Struct("=5Q4I3Q")
_INODE_CTIME = struct.Struct("=QI")
_INODE_CTIME_OFFSET = 124
_EXTENT = struct.Struct("=QQBBHBQQ")


@dataclass(frozen=True, slots=True)
class Filesystem:
    """What FS_INFO tells."""

    devices: int
    device_id_max: int
    sector_bytes: int


@dataclass(frozen=True, slots=True)
class Subvolume:
    """What GET_SUBVOL_INFO tells: `created` is the transaction that made the subvolume or snapshot."""

    id: int
    generation: int
    created: int
    read_only: bool


class Key(NamedTuple):
    """Where an item stands in its tree."""

    object_id: int
    type: int
    offset: int


class Item(NamedTuple):
    """One item of a tree: its key, the transaction of the leaf it is in, its bytes."""

    key: Key
    transaction: int
    data: bytes


class Nested(NamedTuple):
    """A subvolume inside another: its id, the inode of the directory it is in, its name there."""

    id: int
    directory: int
    name: str


def create_subvolume(dir_fd: int, name: str) -> None:
    """Make an empty subvolume `name` in the directory. Not durable by itself."""
    big_ioctl(dir_fd, _SUBVOL_CREATE, _volume_args(0, name))


def create_snapshot(source_fd: int, dir_fd: int, name: str, read_only: bool = False) -> None:
    """Make `name` in the directory a snapshot of the subvolume `source_fd`, what is dirty in it included.

    One transaction is committed inside: the snapshot, and whatever was done before, is durable on return.
    """
    flags = _READ_ONLY if read_only else 0
    head = struct.pack("=qQQ4Q", source_fd, 0, flags, 0, 0, 0, 0)
    big_ioctl(dir_fd, _SNAP_CREATE_V2, _padded(head + entry_name(name)))


def destroy(dir_fd: int, name: str) -> None:
    """Delete the subvolume `name`; ENOTEMPTY while it has subvolumes inside. Not durable by itself.

    Space comes back in the background, once no descriptor is left inside.
    """
    big_ioctl(dir_fd, _SNAP_DESTROY, _volume_args(0, name))


def destroy_id(fd: int, id_: int) -> None:
    """Delete the subvolume `id_`, wherever it is on the filesystem of `fd` (Linux 5.7, CAP_SYS_ADMIN)."""
    big_ioctl(fd, _SNAP_DESTROY_V2, _padded(struct.pack("=qQQ4QQ", 0, 0, _BY_ID, 0, 0, 0, 0, id_)))


def has_destroy_id(fd: int) -> bool:
    """Whether this kernel has `destroy_id`: asked with a flag that no kernel knows, which deletes nothing."""
    try:
        big_ioctl(fd, _SNAP_DESTROY_V2, _padded(struct.pack("=qQQ4QQ", 0, 0, _UNKNOWN_FLAG, 0, 0, 0, 0, 0)))
    except OSError as error:
        return error.errno == errno.EOPNOTSUPP
    return False


def is_subvolume(name: str, dir_fd: int) -> bool:
    """Whether `name` in the directory, known to be on btrfs, is there and is a subvolume."""
    try:
        status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return status.st_ino == SUBVOLUME_INODE


def subvolume(fd: int) -> Subvolume:
    """What is known of the subvolume that `fd` is in (Linux 4.18)."""
    record = bytearray(504)
    fcntl.ioctl(fd, _GET_SUBVOL_INFO, record)
    (id_,) = struct.unpack_from("=Q", record, 0)
    generation, flags = struct.unpack_from("=QQ", record, 280)
    (created,) = struct.unpack_from("=Q", record, 352)
    # Here the flags are those on disk, where read-only is bit 0.
    return Subvolume(id_, generation, created, bool(flags & 1))


def set_read_only(fd: int, read_only: bool) -> None:
    """Make the subvolume `fd` read-only or writable; durable on return."""
    record = bytearray(8)
    fcntl.ioctl(fd, _SUBVOL_GETFLAGS, record)
    (flags,) = struct.unpack("=Q", record)
    flags = flags | _READ_ONLY if read_only else flags & ~_READ_ONLY
    fcntl.ioctl(fd, _SUBVOL_SETFLAGS, struct.pack("=Q", flags))


def filesystem(fd: int) -> Filesystem:
    """What is known of the filesystem of `fd`; ENOTTY or EOPNOTSUPP when it is not btrfs."""
    record = bytearray(1024)
    fcntl.ioctl(fd, _FS_INFO, record)
    device_id_max, devices = struct.unpack_from("=QQ", record, 0)
    (sector_bytes,) = struct.unpack_from("=I", record, 36)
    return Filesystem(devices, device_id_max, sector_bytes)


def devices(fd: int) -> Iterator[str]:
    """The paths of the block devices the filesystem of `fd` is on, as the kernel knows them."""
    for device_id in range(1, filesystem(fd).device_id_max + 1):
        record = bytearray(_ARGS_BYTES)
        struct.pack_into("=Q", record, 0, device_id)
        try:
            big_ioctl(fd, _DEV_INFO, record)
        except OSError as error:
            if error.errno == errno.ENODEV:  # a number whose device was taken out
                continue
            raise
        path = bytes(record[_ARGS_BYTES - 1024 :]).split(b"\0", 1)[0]
        if path:
            yield os.fsdecode(path)


def search(
    fd: int,
    tree: int,
    first: Key,
    last: Key,
    since: int = 0,
    room: int = SEARCH_BYTES,
) -> Iterator[Item]:
    """The items of a tree with keys from `first` to `last`, in order of their keys (CAP_SYS_ADMIN).

    Only leaves written in transaction `since` or later are looked at, so the cost is that of what changed; an
    item in them may itself be older. `room` is the size of the buffer, and so of the largest item in bytes.
    """
    buffer = bytearray(_SEARCH_ARGS_BYTES + room)
    key = first
    while True:
        # These bound one key that is compared as a whole: object id, type and offset are not ranges by themselves.
        bounds = (key.object_id, last.object_id, key.offset, last.offset, since, _U64_MAX, key.type, last.type)
        _SEARCH_ARGS.pack_into(buffer, 0, tree, *bounds, _ITEMS_MAX, room)
        big_ioctl(fd, _TREE_SEARCH_V2, buffer)
        (count,) = struct.unpack_from("=I", buffer, _SEARCH_COUNT_OFFSET)
        if count == 0:
            return
        position = _SEARCH_ARGS_BYTES
        for _ in range(count):
            transaction, object_id, offset, type_, size = _ITEM_HEADER.unpack_from(buffer, position)
            position += _ITEM_HEADER.size
            key = Key(object_id, type_, offset)
            yield Item(key, transaction, bytes(buffer[position : position + size]))
            position += size
        if key >= last:
            return
        key = _after(key)


def nested(fd: int, id_: int) -> list[Nested]:
    """The subvolumes directly inside the subvolume `id_`."""
    found = []
    for item in search(fd, _ROOT_TREE, Key(id_, _ROOT_REF, 0), Key(id_, _ROOT_REF, _U64_MAX)):
        directory, _, size = _ROOT_REF_HEADER.unpack_from(item.data)
        name = item.data[_ROOT_REF_HEADER.size :][:size]
        found.append(Nested(item.key.offset, directory, os.fsdecode(name)))
    return found


def directory_path(fd: int, inode: int) -> str:
    """The path of a directory inside the subvolume of `fd`, relative to it: "" or ending in a slash."""
    record = bytearray(_ARGS_BYTES)
    struct.pack_into("=QQ", record, 0, 0, inode)
    big_ioctl(fd, _INO_LOOKUP, record)
    return os.fsdecode(bytes(record[16:]).split(b"\0", 1)[0])


def can_search(fd: int) -> bool:
    """Whether this process may search trees."""
    try:
        nested(fd, SUBVOLUME_INODE)
    except PermissionError:
        return False
    return True


def destroy_with_nested(dir_fd: int, name: str, task: Task) -> None:
    """Delete the subvolume `name` in the directory with all subvolumes inside it; missing is fine."""
    try:
        destroy(dir_fd, name)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
    else:
        task.advance()
        return
    fd = os.open(name, _DIRECTORY, dir_fd=dir_fd)
    try:
        # Each one stands before those inside it, which the loop finds by and by.
        inside = nested(fd, subvolume(fd).id)
        for found in inside:
            inside.extend(nested(fd, found.id))
    finally:
        os.close(fd)
    for found in reversed(inside):
        task.advance()
        destroy_id(dir_fd, found.id)
        reach("btrfs_ioctl.destroyed")
    destroy(dir_fd, name)
    task.advance()


def changed_usage(fd: int, since: int, task: Task, parent_fd: int | None = None) -> Usage:
    """What the subvolume `fd` has that came after transaction `since`: the usage of a snapshot (C52).

    `size` is the space of data extents written since, each once, wherever in its files they are; an extent
    shared with an older one costs nothing. `inodes` are those made since, and those changed: of these only
    reading is told apart, and for that `parent_fd`, the subvolume as it was, is needed; a directory counts as
    changed by its mode or owner, not by its entries. Only what is committed is seen.
    """
    tally = _Changes(filesystem(fd).sector_bytes, since, parent_fd)
    first, last = Key(SUBVOLUME_INODE, _INODE_ITEM, 0), Key(_LAST_OBJECT, _TYPE_MAX, _U64_MAX)
    for item in search(fd, _OWN_TREE, first, last, since + 1):
        if item.key.type == _INODE_ITEM:
            task.advance()
            tally.inode(item)
        elif item.key.type == _EXTENT_DATA:
            tally.extent(item)
    return tally.usage()


class _Changes:
    """Counts items of changed leaves, which also hold items that did not change."""

    def __init__(self, sector_bytes: int, since: int, parent_fd: int | None) -> None:
        self._sector_bytes = sector_bytes
        self._since = since
        self._parent_fd = parent_fd
        self._inodes: set[int] = set()
        self._deleted: set[int] = set()
        self._extents: set[int] = set()
        self._size = 0

    def usage(self) -> Usage:
        return Usage(len(self._inodes), self._size)

    def inode(self, item: Item) -> None:
        record = _INODE.unpack_from(item.data)
        generation, transaction, links = record[0], record[1], record[5]
        if links == 0:
            # Deleted while still open: it goes with the last descriptor.
            self._deleted.add(item.key.object_id)
        elif generation > self._since or (transaction > self._since and self._differs(item)):
            self._inodes.add(item.key.object_id)

    def _differs(self, item: Item) -> bool:
        """Whether more than reading happened to an inode that the parent has as well."""
        if self._parent_fd is None:
            return True
        room = _ITEM_HEADER.size + _INODE_BYTES
        for original in search(self._parent_fd, _OWN_TREE, item.key, item.key, room=room):
            return _identity(item.data) != _identity(original.data)
        return True

    def extent(self, item: Item) -> None:
        (generation,) = struct.unpack_from("=Q", item.data)
        if generation <= self._since or item.key.object_id in self._deleted:
            return
        # Also when the inode's own item is in a leaf that was not written again.
        self._inodes.add(item.key.object_id)
        if item.data[20] == _EXTENT_INLINE:
            # As stat counts it: whole sectors.
            inline = len(item.data) - _EXTENT_HEADER_BYTES
            self._size += -(-inline // self._sector_bytes) * self._sector_bytes
            return
        *_, address, size = _EXTENT.unpack_from(item.data)
        if address and address not in self._extents:
            self._extents.add(address)
            self._size += size


def _identity(inode: bytes) -> tuple[int, ...]:
    """What of an inode item tells a changed one: mode and owner, and but for directories the time of change."""
    _, _, _, _, _, _, user, group, mode, device, flags, _ = _INODE.unpack_from(inode)
    if mode & 0o170000 == 0o040000:
        return (user, group, mode, flags)
    return (user, group, mode, device, flags, *_INODE_CTIME.unpack_from(inode, _INODE_CTIME_OFFSET))


def _after(key: Key) -> Key:
    """The key that follows."""
    if key.offset < _U64_MAX:
        return Key(key.object_id, key.type, key.offset + 1)
    if key.type < _TYPE_MAX:
        return Key(key.object_id, key.type + 1, 0)
    return Key(key.object_id + 1, 0, 0)


def _volume_args(fd: int, name: str) -> bytearray:
    return _padded(struct.pack("=q", fd) + entry_name(name))


def entry_name(name: str) -> bytes:
    """`name` in bytes; ValueError when it is not the name of one entry of a directory."""
    encoded = os.fsencode(name)
    if encoded in (b"", b".", b"..") or b"/" in encoded or b"\0" in encoded or len(encoded) > NAME_BYTES_MAX:
        raise ValueError(f"not a name of one entry: {name!r}")
    return encoded


def _padded(record: bytes) -> bytearray:
    return bytearray(record.ljust(_ARGS_BYTES, b"\0"))
