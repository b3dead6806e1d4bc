"""Snapshots as overlayfs layers: each is one directory of changes, its parents' directories lie beneath it.

    <root>/snapshots/      0700
        <id>/              0700
            fs/            0755   what the snapshot changes; an upper directory, later a lower one
            work/          0711   overlayfs's own, beside an active snapshot's upper directory (C105)
    <root>/trash/          0700   what was discarded and is not yet deleted

A commit moves nothing: the upper directory of an active snapshot simply becomes a lower directory of others.
Mounts are the ones containerd makes, option by option (C106-C111), so that its tools and ours can take turns.

Owners. A container whose ids are mapped wants a root directory that belongs to *its* root. `fs` is given to
the host id of container root where labels say a mapping, else to the owner of the immediate parent's `fs`
(C112). A directory made ahead of time serves only a snapshot that needs neither.
"""

from __future__ import annotations

import functools
import os
import stat
import threading
from typing import TYPE_CHECKING, ClassVar, Final, Self

from backends.api import ONLY_REMAP_IDS, REBASE, REMAP_IDS, Glance, Options, Snapshot, Support, Task, TooMany
from backends.cache import SizedCache
from backends.failpoints import reach
from backends.files import DirectorySync, FilesystemSync, Shelf, Shelved, SyncStatistics, remove_tree, usage
from backends.inspecting import ShelfInspector
from backends.overlayfs_probe import Features, examine
from snapbroker.contract import GIDMAPPING_LABEL, UIDMAPPING_LABEL, UPPERDIR_LABEL, Kind, Mount, Usage
from snapbroker.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from backends.api import Inspector

LAYERS_MAX: Final = 500
"""Most lower layers of one mount: the kernel's limit ("too many lower directories, limit is 500")."""
LOWERS_CACHED_BYTES_MAX: Final = 8 << 20
"""Memory for ready `lowerdir=` strings: 500 layers take about 35 kB, ten take 700 bytes."""
OWNERS_CACHED_MAX: Final = 16384
"""Owners of parents' directories that are remembered, about 2 MB."""

_ID_MAX = 2**32 - 2
_FORBIDDEN_IN_ROOT = frozenset(":,\\\n")

Owner = tuple[int, int]


class OverlayfsOptions(Options, frozen=True, kw_only=True):
    """The overlayfs backend's part of a snapshotter's section."""

    mount_options: tuple[str, ...] = ()
    """Options for every overlay mount, read-only ones too, never for binds (C110). Each is tried at start."""
    upperdir_label: bool = False
    """Add the label `containerd.io/snapshot/overlay.upperdir`, the path of `fs`, to every answer (C115)."""
    sync_remove: bool = False
    """Have `remove` wait until the files are deleted (C43); the broker does the waiting."""
    slow_chown: bool = False
    """Let clients remap owners by copying where mounts cannot: withdraws `only-remap-ids` (C114)."""
    remap_ids: bool = True
    """Hand out `uidmap=` and `gidmap=` where the kernel can idmap the layers of an overlay (C111)."""


class Overlayfs(Shelved):
    """The overlayfs backend; see the module, and `backends.api.Backend` for what each method promises."""

    Options: ClassVar[type[Options]] = OverlayfsOptions
    layers_max: ClassVar[int] = LAYERS_MAX
    workers: ClassVar[int] = 8
    privileges: ClassVar[frozenset[str]] = frozenset(("chown", "dac_override", "fowner", "fsetid"))
    """Files of any owner are counted and deleted; roots of snapshots get their parent's owner."""

    def __init__(self, shelf: Shelf, options: OverlayfsOptions, features: Features) -> None:
        super().__init__(shelf)
        self.options = options
        self.sync_remove = options.sync_remove
        self.features = features
        self._remaps = options.remap_ids and features.idmapped
        self.capabilities = _capabilities(options, features, self._remaps)
        self._suffix_options = _overlay_options(options, features)
        self._owner: Owner = (os.geteuid(), os.getegid())
        self._lowers = _Lowers(self._prefix)
        self._parent_owner = functools.lru_cache(OWNERS_CACHED_MAX)(self._read_owner)
        self._directory_sync = DirectorySync(shelf.root_fd)
        self._filesystem_sync = FilesystemSync(shelf.root_fd)

    @classmethod
    def probe(cls, root: Path, options: OverlayfsOptions) -> Support:
        """Try what is needed: entry types, an overlay with an upper directory, each configured option."""
        if complaint := _root_complaint(root):
            return Support(missing=(complaint,))
        features = examine(root, options.mount_options)
        notes = (
            f"chains of up to {LAYERS_MAX} layers",
            f"idmapped layers: {'yes' if features.idmapped else 'no'}",
            f"marks in {'user' if features.userxattr else 'trusted'}.overlay attributes",
        )
        return Support(missing=features.missing, notes=() if features.missing else notes)

    @classmethod
    def open(cls, root: Path, options: OverlayfsOptions) -> Self:
        """Make the layout at `root`; FailedPrecondition where `probe` finds something missing."""
        if complaint := _root_complaint(root):
            raise FailedPrecondition(complaint)
        shelf = Shelf(root)
        try:
            return cls(shelf, options, _examined(shelf.root, options))
        except BaseException:
            shelf.close()
            raise

    @classmethod
    def open_again(cls, root: Path, options: OverlayfsOptions) -> Self:
        """The same root in another process, without probing."""
        return cls(Shelf(root), options, Features())

    def create(self, snapshot: Snapshot, task: Task) -> None:
        """Make the snapshot's directories, with the owner they need."""
        if len(snapshot.parents) > LAYERS_MAX:
            raise FailedPrecondition(
                f"a chain of {len(snapshot.parents)} layers is deeper than overlayfs mounts ({LAYERS_MAX})"
            )
        owner = self._wanted_owner(snapshot)
        self._make([snapshot.id], snapshot.kind is Kind.ACTIVE, owner, task)

    def stock(self, ids: Sequence[int], task: Task) -> None:
        """Make the directories of active snapshots ahead of time, all in one flush."""
        self._make(ids, True, self._owner, task)

    def fits(self, snapshot: Snapshot) -> bool:
        """Whether the snapshot needs what `stock` makes: a work directory, and the daemon as owner."""
        if snapshot.kind is not Kind.ACTIVE or len(snapshot.parents) > LAYERS_MAX:
            return False
        try:
            return self._wanted_owner(snapshot) == self._owner
        except (OSError, InvalidArgument):
            return False

    def mounts(self, snapshot: Snapshot) -> Sequence[Mount]:
        """A bind mount where one directory is all there is, an overlay otherwise (C106-C111)."""
        parents = snapshot.parents
        options = self._mapping_options(snapshot) if self._remaps and snapshot.labels else ()
        directory = f"{self._prefix}{snapshot.id}"
        if snapshot.kind is Kind.ACTIVE:
            if not parents:
                return (Mount("bind", f"{directory}/fs", (*options, "rw", "rbind")),)
            options = (*options, f"workdir={directory}/work", f"upperdir={directory}/fs")
        elif len(parents) < 2:
            source = f"{self._prefix}{parents[0]}/fs" if parents else f"{directory}/fs"
            return (Mount("bind", source, (*options, "ro", "rbind")),)
        return (Mount("overlay", "overlay", (*options, self._lowers.option(parents), *self._suffix_options)),)

    def usage(self, snapshot: Snapshot, task: Task) -> Usage:
        """What the snapshot's own directory takes; a view takes nothing (C49, C51)."""
        if snapshot.kind is Kind.VIEW:
            return Usage()
        return usage(f"{snapshot.id}/fs", task, self._shelf.snapshots_fd)

    def glance(self, snapshot: Snapshot) -> Usage | None:
        """The usage of a snapshot of a few entries."""
        try:
            return self.usage(snapshot, Glance())
        except (TooMany, OSError):
            return None

    def commit(self, snapshot: Snapshot, sync: bool, task: Task) -> Usage:
        """Measure the snapshot; with `sync`, flush its filesystem first.

        What is written through a mounted overlay is dirty in the filesystem of the upper directory: flushing
        that one needs no path to the mount, and reaches the files of a `volatile` overlay as well, which
        itself ignores every request to flush.
        """
        if sync:
            self._filesystem_sync.sync(f"{self._prefix}{snapshot.id}/fs")
        return self.usage(snapshot, task)

    def settle(self, snapshot: Snapshot) -> None:
        """Nothing: the work directory stays, it may still be mounted (C37, C105)."""

    def revert(self, snapshot: Snapshot) -> None:
        """Nothing: a commit changes no file."""

    def whole(self, snapshot: Snapshot) -> bool:
        """Whether the directories are there, its own and every layer below: all of them are mounted."""
        names = ["fs", "work"] if snapshot.kind is Kind.ACTIVE else ["fs"]
        own = all(self._is_directory(f"{snapshot.id}/{name}") for name in names)
        return own and all(self._is_directory(f"{parent}/fs") for parent in snapshot.parents)

    @classmethod
    def inspect(cls, root: Path) -> Inspector:
        """A look at a root that changes nothing."""
        return ShelfInspector(root, _parts, private=True, deep=True)

    def inspector(self) -> Inspector:
        """The same of this root."""
        return self.inspect(self.root)

    def labels(self, snapshot: Snapshot) -> Mapping[str, str]:
        """The path of the snapshot's own directory, where configured (C115)."""
        return {UPPERDIR_LABEL: f"{self._prefix}{snapshot.id}/fs"} if self.options.upperdir_label else {}

    def statistics(self) -> SyncStatistics:
        """How many commits asked for a flush, and how many flushes served them."""
        return self._filesystem_sync.statistics()

    def _is_directory(self, path: str) -> bool:
        try:
            status = os.stat(path, dir_fd=self._shelf.snapshots_fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return stat.S_ISDIR(status.st_mode)

    def _make(self, ids: Sequence[int], work: bool, owner: Owner, task: Task) -> None:
        made: list[str] = []
        begun: list[str] = []
        # What the first one's directories came out as by themselves the others' do, too: a look at each would take a
        # fifth of the time.
        trusted = False
        try:
            for id_ in ids:
                task.advance()
                name = str(id_)
                right = self._make_directory(name, 0o700, trusted)
                begun.append(name)
                made.append(name)
                reach("overlayfs.made")
                if work:
                    right &= self._make_directory(f"{name}/work", 0o711, trusted)
                    made.append(f"{name}/work")
                right &= self._make_directory(f"{name}/fs", 0o755, trusted, owner)
                made.append(f"{name}/fs")
                trusted = right
            reach("overlayfs.filled")
            self._directory_sync.sync(made, self._shelf.snapshots_fd)
            reach("overlayfs.flushed")
        except BaseException:
            reach("overlayfs.undoing")
            for name in begun:
                remove_tree(name, self._shelf.snapshots_fd, Task())
            raise

    def _make_directory(self, path: str, mode: int, trusted: bool, owner: Owner | None = None) -> bool:
        """Make a directory; whether it came out right by itself, which is taken for granted where that is `trusted`."""
        dir_fd = self._shelf.snapshots_fd
        os.mkdir(path, mode, dir_fd=dir_fd)
        if trusted:
            return True
        # The process's umask, or a default ACL above, may have taken permissions away (C23).
        status = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        owned = owner is None or (status.st_uid, status.st_gid) == owner
        if owner is not None and not owned:
            os.chown(path, *owner, dir_fd=dir_fd, follow_symlinks=False)
        permitted = stat.S_IMODE(status.st_mode) == mode
        if not permitted:
            os.chmod(path, mode, dir_fd=dir_fd)
        return owned and permitted

    def _wanted_owner(self, snapshot: Snapshot) -> Owner:
        """Who owns the snapshot's root (C112); InvalidArgument for a mapping that says no root (C113)."""
        owner = self._parent_owner(snapshot.parents[0]) if snapshot.parents else self._owner
        if not snapshot.labels:
            return owner
        uids = snapshot.labels.get(UIDMAPPING_LABEL)
        gids = snapshot.labels.get(GIDMAPPING_LABEL)
        return (host_root(uids) if uids else owner[0], host_root(gids) if gids else owner[1])

    def _read_owner(self, id: int) -> Owner:
        status = os.stat(f"{id}/fs", dir_fd=self._shelf.snapshots_fd, follow_symlinks=False)
        return status.st_uid, status.st_gid

    def _mapping_options(self, snapshot: Snapshot) -> tuple[str, ...]:
        labels = snapshot.labels
        options: list[str] = []
        for name, label in (("uidmap", UIDMAPPING_LABEL), ("gidmap", GIDMAPPING_LABEL)):
            if mapping := labels.get(label):
                # A label may be changed after the snapshot was made, and an option must not smuggle others.
                host_root(mapping)
                options.append(f"{name}={mapping}")
        return tuple(options)


class _Lowers:
    """Ready `lowerdir=` options by immediate parent, whose own chain never changes."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._lock = threading.Lock()
        self._options: SizedCache[int, tuple[tuple[int, ...], str]] = SizedCache(LOWERS_CACHED_BYTES_MAX, _option_bytes)

    def option(self, parents: tuple[int, ...]) -> str:
        with self._lock:
            found = self._options.get(parents[0])
            if found is not None and found[0] == parents:
                return found[1]
        prefix = self._prefix
        option = "lowerdir=" + ":".join([f"{prefix}{id_}/fs" for id_ in parents])
        with self._lock:
            self._options.put(parents[0], (parents, option))
        return option


def _option_bytes(_: int, kept: tuple[tuple[int, ...], str]) -> int:
    # Of the chain itself the store may keep the same copy, or not.
    parents, option = kept
    return 8 * len(parents) + len(option)


@functools.lru_cache(1024)
def host_root(mapping: str) -> int:
    """The host id of container root in `container:host:size[,...]`; InvalidArgument when there is none (C113)."""
    host = None
    for entry in mapping.split(","):
        fields = entry.split(":")
        if len(fields) != 3 or not all(field.isascii() and field.isdecimal() for field in fields):
            raise InvalidArgument(f"id mapping {mapping[:80]!r} is not container:host:size[,...] of numbers from 0")
        container, first, size = map(int, fields)
        if not size or container + size - 1 > _ID_MAX or first + size - 1 > _ID_MAX:
            raise InvalidArgument(f"id mapping {mapping[:80]!r} has a range that is empty or leaves 32 bits")
        if container == 0:
            host = first
    if host is None:
        raise InvalidArgument(f"id mapping {mapping[:80]!r} does not map container id 0")
    return host


def _examined(root: Path, options: OverlayfsOptions) -> Features:
    features = examine(root, options.mount_options)
    if features.missing:
        raise FailedPrecondition(f"overlayfs cannot work at {root}: {'; '.join(features.missing)}")
    return features


def _capabilities(options: OverlayfsOptions, features: Features, remaps: bool) -> frozenset[str]:
    found = {REMAP_IDS} if remaps else set[str]()
    if not options.slow_chown:
        found.add(ONLY_REMAP_IDS)
    if not features.user_namespace:
        found.add(REBASE)
    return frozenset(found)


def _overlay_options(options: OverlayfsOptions, features: Features) -> tuple[str, ...]:
    """What follows `lowerdir=` in every overlay mount, in containerd's order (C109, C110)."""
    found = list(options.mount_options)
    if features.userxattr:
        found.append("userxattr")
    if features.index:
        found.append("index=off")
    return tuple(found)


def _root_complaint(root: Path) -> str | None:
    if not _FORBIDDEN_IN_ROOT.isdisjoint(str(root)):
        return f"{root}: the root's path must not contain ':', ',', '\\' or a line break"
    return None


def _parts(snapshot: Snapshot) -> list[str]:
    """The directories that are mounted: its own, and those of all layers below."""
    own = ["fs", "work"] if snapshot.kind is Kind.ACTIVE else ["fs"]
    return [*(f"{snapshot.id}/{name}" for name in own), *(f"{parent}/fs" for parent in snapshot.parents)]
