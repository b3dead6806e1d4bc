"""Snapshots as btrfs subvolumes: a workspace of any size for the price of one commit of the filesystem, or less.

    <root>/empty                    read-only subvolume, the origin of what has no parent
    <root>/snapshots/<id>/fs        the active snapshot, writable; or a view without a parent, read-only
    <root>/snapshots/<id>/committed what commit made of it, read-only
    <root>/settled/<id>             the `fs` of a snapshot that is committed, on its way out
    <root>/trash/<id>               a discarded snapshot

Why each snapshot has a directory of its own: making a snapshot commits the filesystem's transaction while it
holds the lock of the directory that the new name goes into. In one common directory all snapshots wait for each
other's commits; in directories of their own they share them. Measured with Linux 6.18 on two cores: 400 a second
from any number of threads in one directory, 4,600 from 64 threads in 64 directories.

Durability comes with that commit. A new snapshot is on disk when the ioctl returns, and so is the directory made
for it, whose entry belongs to the same transaction or to one before. Making an empty subvolume, in contrast, is
not durable by itself: therefore a snapshot without a parent is made as a snapshot too, of `empty`. Deleting is not
durable either, and need not be: what a crash brings back is either without a record, and found as a left-over, or
the other half of a commit, which `whole` puts right.

A view of a parent costs nothing: committed subvolumes are read-only and are not removed while a view of them
exists, so the view mounts its parent's, read-only. That is immutable, the same at each call (C25), and leaves
nothing of its own on disk, as with native snapshots. A view without a parent is a read-only snapshot of `empty`.

A commit (C128) is one read-only snapshot of `fs` beside it. It flushes the data of `fs`, so that `sync` adds
nothing (D12). `fs` itself goes when the record is written: it is renamed out of the way and deleted with others,
see `backends.btrfs_sweeper` for why. Subvolumes that somebody made inside of `fs` are not
part of a btrfs snapshot: empty ones, such as systemd-tmpfiles makes in a system's tree, are replaced with
directories; with others the commit is refused, since what is in them would be lost silently.

Usage (C52) is found by searching the subvolume's tree for leaves written since it was made. See `changed_usage`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Self

import msgspec

from backends import btrfs_ioctl, files
from backends.api import Options, Support, Task
from backends.btrfs_sweeper import Sweeper
from backends.failpoints import reach
from backends.inspecting import ShelfInspector
from backends.syscalls import rename_noreplace
from snapbroker.contract import Kind, Mount, Usage
from snapbroker.errors import FailedPrecondition

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from backends.api import Inspector, Snapshot

EMPTY: Final = "empty"
SETTLED: Final = "settled"
ACTIVE: Final = "fs"
COMMITTED: Final = "committed"

SINCE_ATTRIBUTE: Final = "trusted.snapbroker.since"
"""On a committed snapshot's directory: the transaction that made its active snapshot, for `measure`."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_logger = logging.getLogger("backends")


class BtrfsOptions(Options, frozen=True, kw_only=True):
    """The btrfs snapshotter's own configuration."""

    subvolume_ids_max: Annotated[int, msgspec.Meta(ge=0)] = 65536
    """Subvolume ids kept in memory for `mounts`, about 200 bytes each; others are asked of the kernel."""


class Btrfs:
    """The btrfs backend (see the module)."""

    Options: ClassVar[type[Options]] = BtrfsOptions
    workers: ClassVar[int] = 64
    privileges: ClassVar[frozenset[str]] = frozenset(("chown", "dac_override", "fowner", "fsetid", "sys_admin"))
    """Deleting subvolumes, and the attribute that tells when one was committed, are for administrators."""
    sync_remove: bool = False
    capabilities: frozenset[str] = frozenset()

    @classmethod
    def probe(cls, root: Path, options: Any) -> Support:
        """Whether `root`, or the nearest directory above it that exists, is on a btrfs that may be used so."""
        directory = str(next(path for path in (root.absolute(), *root.absolute().parents) if path.exists()))
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            return Support((f"{directory}: {error.strerror}: name a directory that can be made and read",))
        try:
            return _support(directory, fd)
        finally:
            os.close(fd)

    @classmethod
    def open(cls, root: Path, options: Any) -> Self:
        """Make the layout; FailedPrecondition when `probe` says that it cannot work."""
        support = cls.probe(root, options)
        if not support.ok:
            raise FailedPrecondition("; ".join(support.missing))
        return cls(files.Shelf(root), options)

    @classmethod
    def open_again(cls, root: Path, options: Any) -> Self:
        """The same root in another process, without probing."""
        return cls(files.Shelf(root), options)

    def __init__(self, shelf: files.Shelf, options: BtrfsOptions) -> None:
        self.root = shelf.root
        self.options = options
        self._shelf = shelf
        try:
            self._device = _device(shelf.root_fd)
            _make_empty(shelf.root_fd)
            self._settled_fd = _make_directory(SETTLED, shelf.root_fd)
        except BaseException:
            shelf.close()
            raise
        self._sweeper = Sweeper((self._settled_fd, shelf.trash_fd))
        self._sync = files.FilesystemSync(shelf.root_fd)
        # No entry ever gets wrong: ids are not reused, and nobody asks for a subvolume before its record is there.
        self._subvolume_id = functools.lru_cache(options.subvolume_ids_max)(self._find_subvolume_id)

    def create(self, snapshot: Snapshot, task: Task) -> None:
        """One snapshot of the parent, or of `empty`; for a view of a parent nothing but a look at it."""
        task.advance(0)
        with self._origin(snapshot) as origin_fd:
            if _borrows(snapshot):
                return
            name = str(snapshot.id)
            os.mkdir(name, 0o700, dir_fd=self._shelf.snapshots_fd)
            try:
                reach("btrfs.made")
                with _opened(name, self._shelf.snapshots_fd) as own_fd:
                    btrfs_ioctl.create_snapshot(origin_fd, own_fd, ACTIVE, snapshot.kind is Kind.VIEW)
                reach("btrfs.snapshotted")
                task.advance()
            except BaseException:
                self._undo_create(name)
                raise

    def _undo_create(self, name: str) -> None:
        reach("btrfs.undoing")
        try:
            with _opened(name, self._shelf.snapshots_fd) as own_fd:
                btrfs_ioctl.destroy_with_nested(own_fd, ACTIVE, Task())
            os.rmdir(name, dir_fd=self._shelf.snapshots_fd)
        except OSError as error:
            # Without a record it is found as a left-over at the next start.
            _logger.warning("left over after a failed create: %s/%s: %s", self._shelf.snapshots, name, error)

    def mounts(self, snapshot: Snapshot) -> Sequence[Mount]:
        """A mount of the subvolume by its id (C127); a view's is that of its parent."""
        where = _origin_of(snapshot) if _borrows(snapshot) else f"snapshots/{snapshot.id}/{ACTIVE}"
        option = f"subvolid={self._subvolume_id(where)}"
        return (Mount("btrfs", self._device, (option, "ro") if snapshot.kind is Kind.VIEW else (option,)),)

    def _find_subvolume_id(self, path: str) -> int:
        with _opened(path, self._shelf.root_fd) as fd:
            return btrfs_ioctl.subvolume(fd).id

    def usage(self, snapshot: Snapshot, task: Task) -> Usage:
        """What the active snapshot has that its parent has not; all of it where it has none (C52, C49)."""
        if snapshot.kind is Kind.VIEW:
            return Usage()
        if snapshot.parents:
            # Data that is not written out has no extents yet. Callers at the same time share one flush.
            self._sync.sync()
        with self._own(snapshot) as own_fd:
            return self._usage(snapshot, own_fd, ACTIVE, task)

    def _usage(self, snapshot: Snapshot, own_fd: int, name: str, task: Task) -> Usage:
        if not snapshot.parents:
            return files.usage(name, task, own_fd)
        with (
            _opened(ACTIVE, own_fd) as active_fd,
            _opened(name, own_fd) as fd,
            self._origin(snapshot) as parent_fd,
        ):
            since = btrfs_ioctl.subvolume(active_fd).created
            return btrfs_ioctl.changed_usage(fd, since, task, parent_fd)

    def commit(self, snapshot: Snapshot, sync: bool, task: Task) -> Usage:
        """One read-only snapshot, durable with its data on return whatever `sync` says; measured in there.

        FailedPrecondition while there are subvolumes inside with something in them (see the module).
        """
        task.advance(0)
        with self._own(snapshot) as own_fd, _opened(ACTIVE, own_fd) as active_fd:
            active = btrfs_ioctl.subvolume(active_fd)
            os.setxattr(own_fd, SINCE_ATTRIBUTE, str(active.created).encode())
            inside = btrfs_ioctl.nested(active_fd, active.id)
            reach("btrfs.noted")
            _replace_committed(active_fd, own_fd, read_only=not inside)
            try:
                if inside:
                    _flatten(active_fd, own_fd, inside)
                reach("btrfs.committed")
                return self._usage(snapshot, own_fd, COMMITTED, task)
            except BaseException:
                btrfs_ioctl.destroy_with_nested(own_fd, COMMITTED, Task())
                raise

    def settle(self, snapshot: Snapshot) -> None:
        """Put the active subvolume away for deletion; one still mounted somewhere (C37) goes with its last mount."""
        reach("btrfs.settling")
        with contextlib.suppress(FileNotFoundError), self._own(snapshot) as own_fd:
            rename_noreplace(ACTIVE, str(snapshot.id), own_fd, self._settled_fd)
            reach("btrfs.settled")
        self._sweeper.sweep_if_due()

    def revert(self, snapshot: Snapshot) -> None:
        """Delete the committed subvolume; the active one was not touched."""
        reach("btrfs.reverting")
        with self._own(snapshot) as own_fd:
            btrfs_ioctl.destroy_with_nested(own_fd, COMMITTED, Task())

    def discard(self, id: int) -> str | None:
        """Rename the snapshot's directory, with the subvolumes in it, into the trash."""
        return self._shelf.discard(id)

    def discarded(self) -> Iterator[str]:
        """The entries of the trash, among them what was settled and is still there: of a life that was cut off."""
        for name in files.names(self._settled_fd):
            # Gone: a burst was quicker.
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                rename_noreplace(name, f"{name}.{SETTLED}", self._settled_fd, self._shelf.trash_fd)
        return self._shelf.discarded()

    def measure(self, token: str, task: Task) -> Usage:
        """What a discarded snapshot had beyond its parent, as far as it is written out."""
        try:
            with self._discarded(token) as own_fd:
                return _discarded_usage(own_fd, task)
        except (FileNotFoundError, NotADirectoryError):
            return self._shelf.measure(token, task)

    def delete(self, token: str, task: Task) -> None:
        """Delete the subvolumes, with those that were made inside them, and then the directory.

        Others that are discarded go along, so that deleting one after the other is cheap (see the sweeper).
        """
        btrfs_ioctl.entry_name(token)
        if os.access(token, os.F_OK, dir_fd=self._shelf.trash_fd, follow_symlinks=False):
            self._sweeper.delete(token, self._shelf.trash_fd, task)
            self._shelf.delete(token, task)

    def ids(self) -> Iterator[int]:
        """Every id with a directory; a view of a parent has none."""
        return self._shelf.ids()

    def whole(self, snapshot: Snapshot) -> bool:
        """Whether the subvolume that counts is there; of a commit that a crash cut in two, drop the other one."""
        try:
            if _borrows(snapshot):
                with self._origin(snapshot) as fd:
                    return os.fstat(fd).st_ino == btrfs_ioctl.SUBVOLUME_INODE
            with self._own(snapshot) as own_fd:
                return _put_right(own_fd, snapshot.kind)
        except FileNotFoundError:
            return False

    @classmethod
    def inspect(cls, root: Path) -> Inspector:
        """A look at a root that changes nothing."""
        return ShelfInspector(root, _parts, private=True, subvolumes=True, also=(SETTLED,))

    def inspector(self) -> Inspector:
        """The same of this root."""
        return self.inspect(self.root)

    def labels(self, snapshot: Snapshot) -> Mapping[str, str]:
        """None."""
        return {}

    def close(self) -> None:
        """Finish deletions under way and let go of the root."""
        self._sweeper.close()
        self._shelf.close()
        if self._settled_fd >= 0:
            os.close(self._settled_fd)
            self._settled_fd = -1

    def _own(self, snapshot: Snapshot) -> contextlib.AbstractContextManager[int]:
        return _opened(str(snapshot.id), self._shelf.snapshots_fd)

    def _origin(self, snapshot: Snapshot) -> contextlib.AbstractContextManager[int]:
        return _opened(_origin_of(snapshot), self._shelf.root_fd)

    def _discarded(self, token: str) -> contextlib.AbstractContextManager[int]:
        btrfs_ioctl.entry_name(token)
        return _opened(token, self._shelf.trash_fd)


def _origin_of(snapshot: Snapshot) -> str:
    """Below the root, the read-only subvolume that `snapshot` starts from."""
    return f"snapshots/{snapshot.parents[0]}/{COMMITTED}" if snapshot.parents else EMPTY


def _borrows(snapshot: Snapshot) -> bool:
    """Whether it is a view that shows its parent's subvolume."""
    return snapshot.kind is Kind.VIEW and bool(snapshot.parents)


def _make_empty(root_fd: int) -> None:
    """Make the origin of what has no parent; one that a crash left half made is made again."""
    if btrfs_ioctl.is_subvolume(EMPTY, root_fd):
        with _opened(EMPTY, root_fd) as fd:
            if btrfs_ioctl.subvolume(fd).read_only:
                return
        btrfs_ioctl.destroy_with_nested(root_fd, EMPTY, Task())
    btrfs_ioctl.create_subvolume(root_fd, EMPTY)
    with _opened(EMPTY, root_fd) as fd:
        os.fchmod(fd, 0o755)  # C23
        reach("btrfs.emptied")
        # This commits the transaction, and with it all of the above.
        btrfs_ioctl.set_read_only(fd, True)


def _make_directory(name: str, dir_fd: int) -> int:
    """A descriptor of the directory, made where it is missing; what is put into it carries it to disk."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=dir_fd)
    return os.open(name, _DIRECTORY, dir_fd=dir_fd)


def _replace_committed(active_fd: int, own_fd: int, *, read_only: bool) -> None:
    try:
        btrfs_ioctl.create_snapshot(active_fd, own_fd, COMMITTED, read_only)
    except FileExistsError:
        # Of a commit whose record was not written and whose `revert` failed.
        btrfs_ioctl.destroy_with_nested(own_fd, COMMITTED, Task())
        btrfs_ioctl.create_snapshot(active_fd, own_fd, COMMITTED, read_only)


def _flatten(active_fd: int, own_fd: int, inside: Sequence[btrfs_ioctl.Nested]) -> None:
    """Put directories where a snapshot has stubs of the empty subvolumes inside, then make it read-only.

    FailedPrecondition for subvolumes that are not empty. The active snapshot stays as it is: its commit may yet fail.
    """
    with _opened(COMMITTED, own_fd) as fd:
        for found in inside:
            path = btrfs_ioctl.directory_path(active_fd, found.directory) + found.name
            with _opened(path, active_fd) as inner_fd:
                status = os.fstat(inner_fd)
                if os.listdir(inner_fd):
                    raise FailedPrecondition(
                        f"/{path} is a subvolume of its own, which a btrfs snapshot leaves out: delete it, or replace "
                        "it with a directory, and commit again"
                    )
            os.rmdir(path, dir_fd=fd)
            reach("btrfs.unnested")
            os.mkdir(path, 0o700, dir_fd=fd)
            os.chown(path, status.st_uid, status.st_gid, dir_fd=fd, follow_symlinks=False)
            os.chmod(path, stat.S_IMODE(status.st_mode), dir_fd=fd)
        # This commits the transaction, and with it all of the above.
        btrfs_ioctl.set_read_only(fd, True)


def _put_right(own_fd: int, kind: Kind) -> bool:
    promised, other = (COMMITTED, ACTIVE) if kind is Kind.COMMITTED else (ACTIVE, COMMITTED)
    if not btrfs_ioctl.is_subvolume(promised, own_fd):
        return False
    if btrfs_ioctl.is_subvolume(other, own_fd):
        btrfs_ioctl.destroy_with_nested(own_fd, other, Task())
        reach("btrfs.righted")
    return True


def _discarded_usage(own_fd: int, task: Task) -> Usage:
    name = COMMITTED if btrfs_ioctl.is_subvolume(COMMITTED, own_fd) else ACTIVE
    with _opened(name, own_fd) as fd:
        if name == ACTIVE:
            return btrfs_ioctl.changed_usage(fd, btrfs_ioctl.subvolume(fd).created, task)
        return btrfs_ioctl.changed_usage(fd, int(os.getxattr(own_fd, SINCE_ATTRIBUTE)), task)


def _support(directory: str, fd: int) -> Support:
    try:
        btrfs_ioctl.filesystem(fd)
    except OSError:
        kind, _ = _mount_of(fd)
        return Support((f"{directory} is on {kind}, not on btrfs: put the root on a btrfs filesystem",))
    missing = []
    if not os.access(directory, os.W_OK):
        missing.append(f"{directory} cannot be written to: mount it read-write, or run the daemon as root")
    if not btrfs_ioctl.can_search(fd):
        missing.append("CAP_SYS_ADMIN is missing: run the daemon as root, outside of any user namespace")
    if not btrfs_ioctl.has_destroy_id(fd):
        missing.append("the kernel cannot delete subvolumes by id: Linux 5.7 or later can")
    if missing:
        return Support(tuple(missing))
    try:
        return Support(notes=(f"{directory} is on btrfs, device {_device(fd)}",))
    except FailedPrecondition as error:
        return Support((error.message,))


def _device(fd: int) -> str:
    """The block device that the filesystem of `fd` is mounted from; FailedPrecondition when there is none."""
    # The kernel's own list first: a mount's source may be a word such as /dev/root, or hidden by another mount.
    for path in (*btrfs_ioctl.devices(fd), _mount_of(fd)[1]):
        with contextlib.suppress(OSError):
            if stat.S_ISBLK(os.stat(path).st_mode):
                return path
    raise FailedPrecondition("no device of the btrfs filesystem is found under /dev: make its device nodes visible")


def _mount_of(fd: int) -> tuple[str, str]:
    """Type and source of the mount that `fd` is on."""
    # Not by device number: btrfs gives each subvolume one of its own, which is in no table.
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
        mount_id = next(line.split()[1] for line in lines if line.startswith("mnt_id:"))
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if line.split(" ", 1)[0] == mount_id:
                kind, source = line.rstrip("\n").partition(" - ")[2].split(" ")[:2]
                return kind, source
    return "an unknown filesystem", ""


@contextlib.contextmanager
def _opened(path: str, dir_fd: int) -> Iterator[int]:
    """A descriptor of a directory, held no longer than needed: an open one keeps a deleted subvolume's space."""
    fd = os.open(path, _DIRECTORY, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def _parts(snapshot: Snapshot) -> list[str]:
    """The subvolume that counts."""
    if _borrows(snapshot):
        return [f"{snapshot.parents[0]}/{COMMITTED}"]
    return [f"{snapshot.id}/{COMMITTED if snapshot.kind is Kind.COMMITTED else ACTIVE}"]
