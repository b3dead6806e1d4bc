"""The tests that every backend passes, for pytest: subclass `BackendSuite`, give it a `backend` fixture.

    from backends.testsuite import BackendSuite

    class TestMine(BackendSuite):
        renames_directories = False

        @pytest.fixture
        def backend(self, tmp_path):
            backend = Mine.open(tmp_path / "root", Mine.Options())
            yield backend
            backend.close()

They run as root: contents are written and read through real mounts, made in a temporary directory and taken
away again whatever happens. `Bookkeeping` is the part that needs no disk.
"""

# ruff: noqa: D102 (a test is described by its name)

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

from backends import syscalls
from backends.api import REBASE, Backend, Pooled, Snapshot, Task
from snapbroker.contract import Kind, Usage
from snapbroker.errors import BrokerError, Cancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from snapbroker.contract import Mount

MEBIBYTE = 1 << 20


def attach(mount: Mount, target: Path) -> None:
    """Make one mount of a backend's answer at `target`, as a caller would."""
    if mount.type == "bind":
        clone = syscalls.open_tree(mount.source, syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE)
        read_only = syscalls.MOUNT_ATTR_RDONLY if "ro" in mount.options else 0
        _move(clone, target, read_only)
    elif mount.type == "overlay":
        _move(syscalls.detached_mount("overlay", _overlay_pairs(mount)), target)
    else:
        data = ",".join(option for option in mount.options if option not in ("ro", "rw"))
        flags = syscalls.MS_RDONLY if "ro" in mount.options else 0
        syscalls.mount(mount.source, target, mount.type, flags, data)


def _move(fd: int, target: Path, attributes: int = 0) -> None:
    try:
        if attributes:
            syscalls.mount_setattr(fd, attributes, recursive=True)
        syscalls.move_mount(fd, target)
    finally:
        os.close(fd)


def _overlay_pairs(mount: Mount) -> Iterator[tuple[str, str | None]]:
    yield "source", mount.source
    for option in mount.options:
        name, equals, value = option.partition("=")
        if name == "lowerdir":
            yield from (("lowerdir+", lower) for lower in value.split(":"))
        else:
            yield name, value if equals else None


class Bookkeeping:
    """What holds for every backend, also for one that has no disk."""

    keeps_files: ClassVar[bool] = True
    """Whether files can go missing; override where there are none."""

    def reopen(self, backend: Backend) -> Backend:
        """The backend as a restarted daemon opens it; override where it has options without defaults."""
        backend.close()
        return type(backend).open(backend.root, getattr(backend, "options", type(backend).Options()))

    def test_probe_finds_nothing_missing(self, backend: Backend) -> None:
        support = type(backend).probe(backend.root, getattr(backend, "options", type(backend).Options()))
        assert support.ok, support.missing

    def test_a_fresh_root_is_empty(self, backend: Backend) -> None:
        assert list(backend.ids()) == []
        assert list(backend.discarded()) == []

    def test_created_snapshots_are_listed_and_whole(self, backend: Backend) -> None:
        active = create(backend, 7)
        view = create(backend, 12, Kind.VIEW)
        assert sorted(backend.ids()) == [7, 12]
        assert backend.whole(active)
        assert backend.whole(view)
        assert self.keeps_files != backend.whole(Snapshot(8, Kind.ACTIVE))

    def test_an_id_that_is_there_is_refused_and_left_alone(self, backend: Backend) -> None:
        active = create(backend, 7)
        with pytest.raises((OSError, BrokerError)):
            create(backend, 7)
        assert list(backend.ids()) == [7]
        assert backend.whole(active)

    def test_mounts_say_the_kind_and_stay_the_same(self, backend: Backend) -> None:
        base = commit(backend, create(backend, 1))
        for id_, kind, parents in (
            (2, Kind.ACTIVE, ()),
            (3, Kind.VIEW, ()),
            (4, Kind.ACTIVE, (base.id,)),
            (5, Kind.VIEW, (base.id,)),
        ):
            snapshot = create(backend, id_, kind, parents)
            mounts = backend.mounts(snapshot)
            assert mounts
            assert list(backend.mounts(snapshot)) == list(mounts)
            assert ("ro" in mounts[-1].options) == (kind is Kind.VIEW)

    def test_a_view_takes_nothing(self, backend: Backend) -> None:
        base = commit(backend, create(backend, 1))
        assert backend.usage(create(backend, 2, Kind.VIEW), Task()) == Usage()
        assert backend.usage(create(backend, 3, Kind.VIEW, (base.id,)), Task()) == Usage()

    def test_a_commit_can_be_settled(self, backend: Backend) -> None:
        active = create(backend, 1)
        measured = backend.usage(active, Task())
        assert backend.commit(active, sync=False, task=Task()) == measured
        assert backend.mounts(active)
        backend.settle(active)
        assert backend.whole(Snapshot(1, Kind.COMMITTED))
        assert list(backend.ids()) == [1]

    def test_a_commit_can_be_reverted_and_repeated(self, backend: Backend) -> None:
        active = create(backend, 1)
        before = backend.mounts(active)
        backend.commit(active, sync=False, task=Task())
        backend.revert(active)
        assert backend.whole(active)
        assert list(backend.mounts(active)) == list(before)
        commit(backend, active)
        assert backend.whole(Snapshot(1, Kind.COMMITTED))

    def test_discarding_moves_out_of_the_way(self, backend: Backend) -> None:
        for id_ in (1, 2):
            create(backend, id_)
        backend.discard(1)
        assert list(backend.ids()) == [2]
        assert self.keeps_files != backend.whole(Snapshot(1, Kind.ACTIVE))
        (token,) = backend.discarded()
        assert backend.measure(token, Task()).size >= 0
        backend.delete(token, Task())
        assert list(backend.discarded()) == []
        assert list(backend.ids()) == [2]

    def test_discarding_covers_every_kind(self, backend: Backend) -> None:
        base = commit(backend, create(backend, 1))
        create(backend, 2, Kind.ACTIVE, (base.id,))
        create(backend, 3, Kind.VIEW, (base.id,))
        create(backend, 4, Kind.VIEW)
        for id_ in (4, 3, 2, 1):
            backend.discard(id_)
        assert list(backend.ids()) == []
        empty_trash(backend)
        assert list(backend.discarded()) == []

    def test_what_is_missing_can_be_discarded_and_deleted(self, backend: Backend) -> None:
        backend.discard(99)
        assert list(backend.discarded()) == []
        create(backend, 1)
        backend.discard(1)
        backend.discard(1)
        (token,) = backend.discarded()
        backend.delete(token, Task())
        backend.delete(token, Task())
        assert backend.measure(token, Task()) == Usage()

    def test_a_cancelled_create_leaves_nothing(self, backend: Backend) -> None:
        base = commit(backend, create(backend, 1))
        for parents in ((), (base.id,)):
            task = Task()
            task.cancel()
            with pytest.raises(Cancelled):
                backend.create(Snapshot(2, Kind.ACTIVE, parents), task)
            assert list(backend.ids()) == [1]

    def test_a_cancelled_delete_can_be_repeated(self, backend: Backend) -> None:
        create(backend, 1)
        backend.discard(1)
        task = Task()
        task.cancel()
        (token,) = backend.discarded()
        with contextlib.suppress(Cancelled):
            backend.delete(token, task)
        empty_trash(backend)
        assert list(backend.discarded()) == []

    def test_threads_work_side_by_side(self, backend: Backend) -> None:
        ids = range(1, 33)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda id_: create(backend, id_), ids))
            assert sorted(backend.ids()) == list(ids)
            list(threads.map(backend.discard, ids))
            list(threads.map(lambda token: backend.delete(token, Task()), list(backend.discarded())))
        assert list(backend.ids()) == []
        assert list(backend.discarded()) == []

    def test_stocked_directories_serve_snapshots(self, backend: Backend) -> None:
        if not isinstance(backend, Pooled):
            return
        backend.stock([], Task())
        backend.stock([5, 3, 4], Task())
        assert sorted(backend.ids()) == [3, 4, 5]
        active = Snapshot(3, Kind.ACTIVE)
        assert backend.fits(active)
        assert backend.whole(active)
        base = commit(backend, active)
        child = Snapshot(4, Kind.ACTIVE, (base.id,))
        assert backend.fits(child)
        assert backend.mounts(child)
        backend.fits(Snapshot(5, Kind.ACTIVE, (12345,)))

    def test_stock_is_all_or_nothing(self, backend: Backend) -> None:
        if not isinstance(backend, Pooled):
            return
        create(backend, 3)
        with pytest.raises((OSError, BrokerError)):
            backend.stock([1, 2, 3, 4], Task())
        assert list(backend.ids()) == [3]
        assert backend.whole(Snapshot(3, Kind.ACTIVE))
        task = Task()
        task.cancel()
        with pytest.raises(Cancelled):
            backend.stock([5, 6], task)
        assert list(backend.ids()) == [3]

    def test_closing_twice_is_fine(self, backend: Backend) -> None:
        backend.close()
        backend.close()


class BackendSuite(Bookkeeping):
    """Everything, with contents seen through real mounts."""

    renames_directories: ClassVar[bool] = True
    """Whether a directory that came from the parent can be renamed; overlayfs answers EXDEV (C120)."""

    @pytest.fixture
    def look(self, backend: Backend, tmp_path: Path) -> Iterator[Look]:
        """Gives contents: `look(snapshot)` is a context manager that answers the mounted root."""
        look = Look(backend, tmp_path / "mounts")
        yield look
        look.close()

    def test_the_root_is_0755_whatever_the_umask(self, backend: Backend, look: Look) -> None:
        before = os.umask(0o077)
        try:
            active = create(backend, 1)
            view = create(backend, 2, Kind.VIEW)
            if isinstance(backend, Pooled):
                backend.stock([3], Task())
                with look(Snapshot(3, Kind.ACTIVE)) as root:
                    assert mode(root) == 0o755
        finally:
            os.umask(before)
        for snapshot in (active, view):
            with look(snapshot) as root:
                assert mode(root) == 0o755
        assert mode(backend.root) == 0o700

    def test_an_active_snapshot_starts_empty_and_takes_files(self, backend: Backend, look: Look) -> None:
        active = create(backend, 1)
        with look(active) as root:
            assert os.listdir(root) == []
            (root / "file").write_text("text")
        with look(active) as root:
            assert (root / "file").read_text() == "text"

    def test_a_view_is_really_read_only(self, backend: Backend, look: Look) -> None:
        base = self.committed(backend, look, 1, (), lambda root: (root / "file").write_text("text"))
        top = self.committed(backend, look, 2, (1,), lambda root: (root / "other").write_text("text"))
        for id_, parents in ((10, ()), (11, (base.id,)), (12, (top.id, base.id))):
            with look(create(backend, id_, Kind.VIEW, parents)) as root:
                assert len(os.listdir(root)) == len(parents)
                with pytest.raises(OSError, match="Read-only") as caught:
                    (root / "new").write_text("")
                assert caught.value.errno == errno.EROFS
                if parents:
                    for change in (os.unlink, lambda path: os.truncate(path, 0), lambda path: os.chmod(path, 0)):
                        with pytest.raises(OSError, match="Read-only"):
                            change(root / "file")

    def test_a_child_sees_what_its_parent_had_at_commit(self, backend: Backend, look: Look) -> None:
        def fill(root: Path) -> None:
            (root / "directory").mkdir(mode=0o750)
            (root / "directory/file").write_text("text")
            os.symlink("directory/file", root / "link")
            os.mkfifo(root / "fifo")
            os.mknod(root / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
            os.setxattr(root / "directory/file", "user.snapbroker", b"attribute")
            os.chown(root / "directory", 1234, 5678)
            os.utime(root / "directory/file", ns=(1, 1_234_567_890_123_456_789))

        base = self.committed(backend, look, 1, (), fill)
        for kind in (Kind.ACTIVE, Kind.VIEW):
            snapshot = create(backend, 2 if kind is Kind.ACTIVE else 3, kind, (base.id,))
            with look(snapshot) as root:
                assert sorted(os.listdir(root)) == ["device", "directory", "fifo", "link"]
                assert os.readlink(root / "link") == "directory/file"
                assert (root / "link").read_text() == "text"
                assert os.getxattr(root / "directory/file", "user.snapbroker") == b"attribute"
                assert (root / "directory/file").stat().st_mtime_ns == 1_234_567_890_123_456_789
                directory = (root / "directory").stat()
                assert (directory.st_uid, directory.st_gid, stat.S_IMODE(directory.st_mode)) == (1234, 5678, 0o750)
                assert stat.S_ISFIFO((root / "fifo").lstat().st_mode)
                assert (root / "device").lstat().st_rdev == os.makedev(1, 3)

    def test_a_child_changes_nothing_in_its_parent(self, backend: Backend, look: Look) -> None:
        def fill(root: Path) -> None:
            for name in ("kept", "deleted", "changed", "grown"):
                (root / name).write_text(name)

        base = self.committed(backend, look, 1, (), fill)

        def change(root: Path) -> None:
            (root / "deleted").unlink()
            (root / "changed").write_text("other")
            with (root / "grown").open("a") as file:
                file.write(" longer")
            (root / "added").write_text("added")

        self.committed(backend, look, 2, (base.id,), change)
        with look(create(backend, 3, Kind.VIEW, (2, 1))) as root:
            assert contents(root) == {"kept": "kept", "changed": "other", "grown": "grown longer", "added": "added"}
        with look(create(backend, 4, Kind.VIEW, (1,))) as root:
            assert contents(root) == {name: name for name in ("kept", "deleted", "changed", "grown")}

    def test_siblings_do_not_see_each_other(self, backend: Backend, look: Look) -> None:
        base = self.committed(backend, look, 1, (), lambda root: (root / "file").write_text("base"))
        first, second = (create(backend, id_, Kind.ACTIVE, (base.id,)) for id_ in (2, 3))
        with look(first) as one, look(second) as other:
            (one / "file").write_text("one")
            (other / "mine").write_text("other")
            assert contents(one) == {"file": "one"}
            assert contents(other) == {"file": "base", "mine": "other"}

    def test_a_chain_shows_all_its_layers(self, backend: Backend, look: Look) -> None:
        parents: tuple[int, ...] = ()
        for id_ in range(1, 11):

            def add(root: Path, id_: int = id_) -> None:
                (root / f"layer-{id_}").write_text(str(id_))
                (root / "newest").write_text(str(id_))
                if id_ > 1:
                    (root / f"layer-{id_ - 1}").rename(root / f"moved-{id_ - 1}")

            self.committed(backend, look, id_, parents, add)
            parents = (id_, *parents)
        expected = {f"moved-{id_}": str(id_) for id_ in range(1, 10)} | {"layer-10": "10", "newest": "10"}
        for id_, kind in ((11, Kind.ACTIVE), (12, Kind.VIEW)):
            with look(create(backend, id_, kind, parents)) as root:
                assert contents(root) == expected

    def test_same_size_in_the_same_second_is_a_change(self, backend: Backend, look: Look) -> None:
        second = 1_700_000_000_000_000_000

        def write(text: str, nanoseconds: int) -> Callable[[Path], None]:
            def fill(root: Path) -> None:
                (root / "file").write_text(text)
                os.utime(root / "file", ns=(second, second + nanoseconds))

            return fill

        self.committed(backend, look, 1, (), write("aaaa", 1))
        self.committed(backend, look, 2, (1,), write("bbbb", 2))
        with look(create(backend, 3, Kind.VIEW, (2, 1))) as child, look(create(backend, 4, Kind.VIEW, (1,))) as base:
            assert contents(child) == {"file": "bbbb"}
            assert contents(base) == {"file": "aaaa"}

    def test_a_directory_made_again_hides_the_old_one(self, backend: Backend, look: Look) -> None:
        def fill(root: Path) -> None:
            (root / "directory/below").mkdir(parents=True)
            (root / "directory/old").write_text("old")

        def replace(root: Path) -> None:
            shutil.rmtree(root / "directory")
            (root / "directory").mkdir()
            (root / "directory/new").write_text("new")

        self.committed(backend, look, 1, (), fill)
        self.committed(backend, look, 2, (1,), replace)
        with look(create(backend, 3, Kind.ACTIVE, (2, 1))) as root:
            assert contents(root / "directory") == {"new": "new"}
        with look(create(backend, 4, Kind.VIEW, (1,))) as root:
            assert sorted(os.listdir(root / "directory")) == ["below", "old"]

    def test_owner_and_mode_alone_are_changes(self, backend: Backend, look: Look) -> None:
        def fill(root: Path) -> None:
            for name in ("owned", "moded"):
                (root / name).write_text(name)
            (root / "directory").mkdir(mode=0o755)

        def change(root: Path) -> None:
            os.chown(root / "owned", 11, 12)
            os.chmod(root / "moded", 0o4711)  # noqa: S103
            os.chmod(root / "directory", 0o1770)  # noqa: S103

        self.committed(backend, look, 1, (), fill)
        self.committed(backend, look, 2, (1,), change)
        with look(create(backend, 3, Kind.VIEW, (2, 1))) as root:
            assert ((root / "owned").stat().st_uid, (root / "owned").stat().st_gid) == (11, 12)
            assert mode(root / "moded") == 0o4711
            assert mode(root / "directory") == 0o1770
            assert contents(root, "owned", "moded") == {"owned": "owned", "moded": "moded"}
        with look(create(backend, 4, Kind.VIEW, (1,))) as root:
            assert (root / "owned").stat().st_uid == 0
            assert mode(root / "moded") == 0o644
            assert mode(root / "directory") == 0o755

    def test_a_child_s_root_belongs_to_its_parent_s_owner(self, backend: Backend, look: Look) -> None:
        base = self.committed(backend, look, 1, (), lambda root: os.chown(root, 21, 22))
        child = Snapshot(2, Kind.ACTIVE, (base.id,))
        if isinstance(backend, Pooled) and backend.fits(child):
            backend.stock([child.id], Task())
        else:
            backend.create(child, Task())
        with look(child) as root:
            assert (root.stat().st_uid, root.stat().st_gid) == (21, 22)

    def test_files_of_the_parent_can_be_linked_and_moved(self, backend: Backend, look: Look) -> None:
        def fill(root: Path) -> None:
            (root / "first").write_text("first")
            (root / "second").write_text("second")
            (root / "pair").write_text("pair")
            os.link(root / "pair", root / "twin")

        def change(root: Path) -> None:
            os.link(root / "first", root / "linked")
            (root / "second").rename(root / "moved")
            os.link(root / "moved", root / "moved-linked")
            (root / "twin").unlink()

        self.committed(backend, look, 1, (), fill)
        self.committed(backend, look, 2, (1,), change)
        with look(create(backend, 3, Kind.VIEW, (2, 1))) as root:
            assert contents(root) == {
                "first": "first",
                "linked": "first",
                "moved": "second",
                "moved-linked": "second",
                "pair": "pair",
            }
            assert (root / "first").stat().st_ino == (root / "linked").stat().st_ino
            assert (root / "moved").stat().st_ino == (root / "moved-linked").stat().st_ino
        with look(create(backend, 4, Kind.VIEW, (1,))) as root:
            assert sorted(os.listdir(root)) == ["first", "pair", "second", "twin"]

    def test_a_directory_of_the_parent_can_be_moved(self, backend: Backend, look: Look) -> None:
        def fill(root: Path) -> None:
            (root / "directory/below").mkdir(parents=True)
            (root / "directory/below/file").write_text("text")

        def move(root: Path) -> None:
            if self.renames_directories:
                (root / "directory").rename(root / "moved")
                return
            with pytest.raises(OSError, match="cross-device"):
                (root / "directory").rename(root / "moved")
            shutil.move(root / "directory", root / "moved")

        self.committed(backend, look, 1, (), fill)
        self.committed(backend, look, 2, (1,), move)
        with look(create(backend, 3, Kind.VIEW, (2, 1))) as root:
            assert os.listdir(root) == ["moved"]
            assert contents(root / "moved/below") == {"file": "text"}

    def test_the_active_snapshot_may_still_be_mounted_at_commit(self, backend: Backend, look: Look) -> None:
        active = create(backend, 1)
        with look(active) as root:
            (root / "file").write_text("text")
            backend.commit(active, sync=True, task=Task())
            backend.settle(active)
            with look(create(backend, 2, Kind.ACTIVE, (1,))) as child:
                assert contents(child) == {"file": "text"}

    def test_a_reverted_commit_keeps_the_contents(self, backend: Backend, look: Look) -> None:
        active = create(backend, 1)
        with look(active) as root:
            (root / "file").write_text("one")
        backend.commit(active, sync=False, task=Task())
        backend.revert(active)
        with look(active) as root:
            assert contents(root) == {"file": "one"}
            (root / "file").write_text("two")
        commit(backend, active)
        with look(create(backend, 2, Kind.VIEW, (1,))) as root:
            assert contents(root) == {"file": "two"}

    def test_usage_is_what_the_snapshot_added(self, backend: Backend, look: Look) -> None:
        def fill(root: Path) -> None:
            (root / "large").write_bytes(os.urandom(2 * MEBIBYTE))
            os.link(root / "large", root / "linked")
            with (root / "sparse").open("wb") as file:
                file.truncate(64 * MEBIBYTE)

        active = create(backend, 1)
        empty = backend.usage(active, Task())
        with look(active) as root:
            fill(root)
            os.sync()
        filled = backend.usage(active, Task())
        assert filled.inodes == empty.inodes + 2
        assert 2 * MEBIBYTE <= filled.size - empty.size < 3 * MEBIBYTE
        assert backend.commit(active, sync=True, task=Task()) == filled
        backend.settle(active)

        child = create(backend, 2, Kind.ACTIVE, (1,))
        untouched = backend.usage(child, Task())
        assert untouched.inodes <= 1
        assert untouched.size <= 64 << 10
        with look(child) as root:
            (root / "added").write_bytes(os.urandom(MEBIBYTE))
            os.sync()
        changed = backend.usage(child, Task())
        assert changed.inodes == untouched.inodes + 1
        assert MEBIBYTE <= changed.size - untouched.size < 2 * MEBIBYTE

    def test_measuring_can_be_cancelled(self, backend: Backend, look: Look) -> None:
        active = create(backend, 1)
        with look(active) as root:
            (root / "file").write_text("text")
        task = Task()
        task.cancel()
        with pytest.raises(Cancelled):
            backend.usage(active, task)
        with pytest.raises(Cancelled):
            backend.commit(active, sync=False, task=task)
        backend.revert(active)
        assert backend.whole(active)

    def test_a_missing_parent_leaves_nothing(self, backend: Backend, look: Look) -> None:
        with pytest.raises((OSError, BrokerError)):
            create(backend, 2, Kind.ACTIVE, (1,))
        assert list(backend.ids()) == []

    def test_a_cancelled_create_with_contents_leaves_nothing(self, backend: Backend, look: Look) -> None:
        def fill(root: Path) -> None:
            for number in range(50):
                (root / f"file-{number}").write_text("text")

        base = self.committed(backend, look, 1, (), fill)
        task = Task()
        task.cancel()
        with pytest.raises(Cancelled):
            backend.create(Snapshot(2, Kind.ACTIVE, (base.id,)), task)
        assert list(backend.ids()) == [1]
        with look(create(backend, 2, Kind.ACTIVE, (base.id,))) as root:
            assert len(os.listdir(root)) == 50

    def test_a_restart_finds_left_overs_and_trash(self, backend: Backend, look: Look) -> None:
        self.committed(backend, look, 1, (), lambda root: (root / "file").write_text("text"))
        create(backend, 2, Kind.ACTIVE, (1,))
        create(backend, 3)
        backend.discard(3)
        again = self.reopen(backend)
        try:
            assert sorted(again.ids()) == [1, 2]
            assert again.whole(Snapshot(1, Kind.COMMITTED))
            assert again.whole(Snapshot(2, Kind.ACTIVE, (1,)))
            assert len(list(again.discarded())) == 1
            empty_trash(again)
            assert list(again.discarded()) == []
        finally:
            again.close()

    def test_a_commit_cut_off_by_a_restart_is_put_right(self, backend: Backend, look: Look) -> None:
        active = create(backend, 1)
        with look(active) as root:
            (root / "file").write_text("text")
        backend.commit(active, sync=True, task=Task())
        again = self.reopen(backend)
        look = Look(again, look.directory)
        try:
            # Its record was not written: it is active as before, and can be committed again.
            assert again.whole(active)
            with look(active) as root:
                assert contents(root) == {"file": "text"}
            again.commit(active, sync=True, task=Task())
        finally:
            again.close()
        again = self.reopen(again)
        look = Look(again, look.directory)
        try:
            # Its record was written, and nothing after it.
            assert again.whole(Snapshot(1, Kind.COMMITTED))
            with look(create(again, 2, Kind.VIEW, (1,))) as root:
                assert contents(root) == {"file": "text"}
            # A view of a parent may have nothing of its own on disk.
            assert sorted(again.ids()) in ([1], [1, 2])
        finally:
            again.close()

    def test_strangers_in_the_root_are_left_alone(self, backend: Backend) -> None:
        stranger = backend.root / "a file of somebody"
        stranger.write_text("text")
        again = self.reopen(backend)
        try:
            assert list(again.ids()) == []
            assert list(again.discarded()) == []
            assert stranger.read_text() == "text"
        finally:
            again.close()

    def test_a_large_deep_discarded_tree_is_measured_and_deleted(self, backend: Backend, look: Look) -> None:
        active = create(backend, 1)
        with look(active) as root, contextlib.ExitStack() as stack:
            fd = os.open(root, os.O_RDONLY)
            for level in range(300):
                stack.callback(os.close, fd)
                os.mkdir("deeper", dir_fd=fd)
                os.close(os.open(f"file-{level}", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
                fd = os.open("deeper", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
        backend.discard(1)
        (token,) = backend.discarded()
        assert backend.measure(token, Task()).inodes >= 600
        backend.delete(token, Task())
        assert list(backend.discarded()) == []

    def test_rebase_shows_the_parent_below(self, backend: Backend, look: Look) -> None:
        if REBASE not in backend.capabilities:
            return
        self.committed(backend, look, 1, (), lambda root: (root / "below").write_text("below"))
        self.committed(backend, look, 2, (), lambda root: (root / "above").write_text("above"))
        with look(create(backend, 3, Kind.VIEW, (2, 1))) as root:
            assert contents(root) == {"below": "below", "above": "above"}

    def committed(
        self, backend: Backend, look: Look, id_: int, parents: tuple[int, ...], fill: Callable[[Path], object]
    ) -> Snapshot:
        """A committed snapshot that `fill` wrote, through its mount."""
        active = create(backend, id_, Kind.ACTIVE, parents)
        with look(active) as root:
            fill(root)
        return commit(backend, active)


class Look:
    """Mounts snapshots below `directory`; called with a snapshot it is a context manager of its root."""

    def __init__(self, backend: Backend, directory: Path) -> None:
        self.backend = backend
        self.directory = directory
        self._mounted: list[Path] = []
        directory.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def __call__(self, snapshot: Snapshot) -> Iterator[Path]:
        """The snapshot's root, mounted."""
        target = self.directory / f"{snapshot.id}-{snapshot.kind}-{len(self._mounted)}"
        target.mkdir()
        self.attach(self.backend.mounts(snapshot), target)
        try:
            yield target
        finally:
            syscalls.unmount(target, syscalls.UMOUNT_NOFOLLOW)
            self._mounted.remove(target)
            target.rmdir()

    def attach(self, mounts: Sequence[Mount], target: Path) -> None:
        """Make the mounts at `target`, one over the other."""
        for mount in mounts:
            attach(mount, target / mount.target)
            self._mounted.append(target)

    def close(self) -> None:
        """Take away what a failed test left mounted."""
        for target in reversed(self._mounted):
            syscalls.unmount(target, syscalls.MNT_DETACH)


def create(
    backend: Backend, id_: int, kind: Kind = Kind.ACTIVE, parents: tuple[int, ...] = (), **labels: str
) -> Snapshot:
    """A snapshot, made."""
    snapshot = Snapshot(id_, kind, parents, labels)
    backend.create(snapshot, Task())
    return snapshot


def commit(backend: Backend, active: Snapshot) -> Snapshot:
    """The active snapshot, committed under its id."""
    backend.commit(active, sync=False, task=Task())
    backend.settle(active)
    return Snapshot(active.id, Kind.COMMITTED, active.parents)


def empty_trash(backend: Backend) -> None:
    """Delete everything that was discarded."""
    for token in list(backend.discarded()):
        backend.delete(token, Task())


def contents(root: Path, *names: str) -> dict[str, str]:
    """The regular files of a directory with their texts."""
    return {name: (root / name).read_text() for name in (names or os.listdir(root))}


def mode(path: Path) -> int:
    """Permission bits, set-id bits and sticky bit."""
    return stat.S_IMODE(path.lstat().st_mode)
