"""Snapshots as plain directories, each a full copy of its parent: works on any filesystem, with any tool.

    <root>/snapshots/<id>   the root directory of the snapshot itself, active or committed (C121)
    <root>/trash/<id>       discarded

A copy shares its blocks with the original where the filesystem can do that (xfs, btrfs, bcachefs); elsewhere it
takes the time and space of its bytes. It is built in place: ids are never reused (D4), and until the broker's
database has a record of one, its directory is a left-over that a start collects. One flush of the filesystem at
the end, shared by everybody who copies at that time, makes it durable; flushing each file by itself, as the
peer does, costs as many journal commits as there are files.

A view of a parent has no directory: it is a read-only bind mount of its parent's, which does not change any more.

Usage (D10). What counts for a snapshot with a parent is what it added to or changed in the copy, by the words of
the interface (C48): an untouched child is {0, 0} where the peer reports the whole copy again (C53). Each child is
compared with its immediate parent; what blocks they really share is not looked at.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import tempfile
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Self

import msgspec

from backends import files
from backends.api import Options, Support, Task
from backends.copying import copy_tree
from backends.entries import Reflink
from backends.failpoints import reach
from backends.inspecting import ShelfInspector
from backends.patterns import Patterns
from backends.syscalls import clone_file
from snapbroker.contract import Kind, Mount, Usage
from snapbroker.errors import FailedPrecondition

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from backends.api import Inspector, Snapshot

COPY_THREADS_MAX: Final = 64
"""Most threads one copy may have: beyond the number of processors they only wait for each other."""

_ROOT_MODE = 0o755

_logger = logging.getLogger("backends")


class NativeOptions(Options, frozen=True, kw_only=True):
    """The native snapshotter's own configuration."""

    copy_threads: Annotated[int, msgspec.Meta(ge=1, le=COPY_THREADS_MAX)] = 2
    """Threads that copy the files of one large tree; measured best at the number of processors, up to two."""
    reflink: Reflink = "auto"
    """Share blocks with the parent: `auto` where it works, `always` or fail, `never` for blocks of its own."""


class Native(files.Shelved):
    """The native backend (see the module)."""

    Options: ClassVar[type[Options]] = NativeOptions
    workers: ClassVar[int] = 64
    privileges: ClassVar[frozenset[str]] = frozenset(
        ("chown", "dac_override", "fowner", "fsetid", "mknod", "setfcap", "sys_admin")
    )
    """Files are copied with owners, modes, devices, file capabilities, and attributes of `trusted.*`."""
    hands: ClassVar[int] = 3
    sync_remove: bool = False
    capabilities: frozenset[str] = frozenset()

    @classmethod
    def probe(cls, root: Path, options: NativeOptions) -> Support:
        """Whether files can be made at `root`, or in the nearest directory above it, and whether they can share."""
        directory = str(next(path for path in (root.absolute(), *root.absolute().parents) if path.exists()))
        try:
            shares = _can_clone(directory)
        except OSError as error:
            return Support((f"{directory}: {error.strerror}: name a directory that can be written to",))
        if shares:
            return Support(notes=(f"{directory} can share blocks between copies (reflink)",))
        if options.reflink == "always":
            return Support(
                (f"{directory} cannot share blocks between files: set reflink to auto, or use xfs or btrfs",)
            )
        return Support(notes=(f"{directory} is on a filesystem without reflinks: each snapshot is a full copy",))

    @classmethod
    def open(cls, root: Path, options: NativeOptions) -> Self:
        """Make the layout; FailedPrecondition when `probe` says that it cannot work."""
        support = cls.probe(root, options)
        if not support.ok:
            raise FailedPrecondition("; ".join(support.missing))
        return cls(files.Shelf(root), options)

    @classmethod
    def open_again(cls, root: Path, options: NativeOptions) -> Self:
        """The same root in another process, without probing."""
        return cls(files.Shelf(root), options)

    def __init__(self, shelf: files.Shelf, options: NativeOptions) -> None:
        super().__init__(shelf)
        self.options = options
        self._directories = files.DirectorySync(shelf.snapshots_fd)
        self._sync = files.FilesystemSync(shelf.root_fd)
        self._patterns = Patterns()

    def create(self, snapshot: Snapshot, task: Task) -> None:
        """An empty directory, or a copy of the parent's, flushed; nothing for a view of a parent."""
        self.build(snapshot, task)
        try:
            self.flush([snapshot])
            task.advance(0)
        except BaseException:
            self._undo_create(str(snapshot.id))
            raise

    def flush(self, snapshots: Sequence[Snapshot]) -> None:
        """Write copies' data and directories to disk, in one flush of the filesystem for all who wait for one."""
        made = [snapshot for snapshot in snapshots if not _borrows(snapshot)]
        if len(made) == 1 and not made[0].parents:
            self._directories.sync((str(made[0].id),), self._shelf.snapshots_fd)
        elif made:
            # Several empty ones are of several processes: the directory made last is not known.
            self._sync.sync(*(self._path(snapshot.id) for snapshot in made))

    def build(self, snapshot: Snapshot, task: Task) -> None:
        """Make the directory and copy the parent's tree into it."""
        task.advance(0)
        if _borrows(snapshot):
            os.stat(self._path(snapshot.parents[0]))
            return
        name = str(snapshot.id)
        # A copy's directory gets the mode of its original at the end.
        os.mkdir(name, 0o700 if snapshot.parents else _ROOT_MODE, dir_fd=self._shelf.snapshots_fd)
        try:
            reach("native.made")
            if snapshot.parents:
                self._copy(snapshot, task)
            else:
                self._finish_empty(name)
            reach("native.copied")
            task.advance(0)
        except BaseException:
            self._undo_create(name)
            raise

    def _copy(self, snapshot: Snapshot, task: Task) -> None:
        parent = snapshot.parents[0]
        source, destination = self._path(parent), self._path(snapshot.id)
        if self._patterns.copy(parent, source, destination, task):
            return
        before = (task.entries, task.bytes)
        options = self.options
        if not copy_tree(source, destination, task, options.copy_threads, options.reflink, self._sync.sync):
            self._patterns.copied(parent, task.entries - before[0], task.bytes - before[1])

    def _finish_empty(self, name: str) -> None:
        # The umask may have taken some of it (C23).
        if stat.S_IMODE(os.stat(name, dir_fd=self._shelf.snapshots_fd).st_mode) != _ROOT_MODE:
            os.chmod(name, _ROOT_MODE, dir_fd=self._shelf.snapshots_fd)

    def _undo_create(self, name: str) -> None:
        reach("native.undoing")
        try:
            files.remove_tree(name, self._shelf.snapshots_fd, Task())
        except OSError as error:
            # Without a record it is found as a left-over at the next start.
            _logger.warning("left over after a failed create: %s%s: %s", self._prefix, name, error)

    def mounts(self, snapshot: Snapshot) -> Sequence[Mount]:
        """A bind mount of the snapshot's directory, or for a view of its parent's (C122)."""
        id_ = snapshot.parents[0] if _borrows(snapshot) else snapshot.id
        access = "ro" if snapshot.kind is Kind.VIEW else "rw"
        return (Mount("bind", self._path(id_), ("rbind", access)),)

    def usage(self, snapshot: Snapshot, task: Task) -> Usage:
        """What the snapshot has beyond its immediate parent (D10); a view has nothing (C49)."""
        if snapshot.kind is Kind.VIEW:
            return Usage()
        path = self._path(snapshot.id)
        if snapshot.parents:
            return files.usage_over(self._path(snapshot.parents[0]), path, task)
        return files.usage(path, task)

    def commit(self, snapshot: Snapshot, sync: bool, task: Task) -> Usage:
        """Measure it, as `usage` does; the directory stays what it is. With `sync`, flush it first (D12)."""
        task.advance(0)
        if sync:
            self._sync.sync(self._path(snapshot.id))
        return self.usage(snapshot, task)

    def settle(self, snapshot: Snapshot) -> None:
        """Nothing to drop."""

    def revert(self, snapshot: Snapshot) -> None:
        """Nothing to drop."""

    def whole(self, snapshot: Snapshot) -> bool:
        """Whether the directory is there: the record was written after all that is in it."""
        id_ = snapshot.parents[0] if _borrows(snapshot) else snapshot.id
        try:
            return stat.S_ISDIR(os.stat(self._path(id_), follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return False

    @classmethod
    def inspect(cls, root: Path) -> Inspector:
        """A look at a root that changes nothing."""
        return ShelfInspector(root, _parts, private=False)

    def inspector(self) -> Inspector:
        """The same of this root."""
        return self.inspect(self.root)

    def labels(self, snapshot: Snapshot) -> Mapping[str, str]:
        """None."""
        return {}

    def _path(self, id_: int) -> str:
        return f"{self._prefix}{id_}"


def _borrows(snapshot: Snapshot) -> bool:
    """Whether it is a view that shows its parent's directory."""
    return snapshot.kind is Kind.VIEW and bool(snapshot.parents)


def _can_clone(directory: str) -> bool:
    """Whether files in `directory` can share blocks; OSError when none can be made there."""
    with tempfile.TemporaryFile(dir=directory) as source, tempfile.TemporaryFile(dir=directory) as clone:
        source.write(b"\0" * 4096)
        source.flush()
        try:
            clone_file(clone.fileno(), source.fileno())
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS):
                raise
            return False
    return True


def _parts(snapshot: Snapshot) -> list[str]:
    """The directory that is mounted."""
    return [str(snapshot.parents[0] if _borrows(snapshot) else snapshot.id)]
