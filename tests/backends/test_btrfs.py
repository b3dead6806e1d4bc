import contextlib
import fcntl
import itertools
import os
import shutil
import stat
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backends import btrfs_ioctl, btrfs_sweeper, syscalls
from backends.api import Snapshot, Support, Task
from backends.btrfs import ACTIVE, COMMITTED, EMPTY, SETTLED, Btrfs, BtrfsOptions
from backends.testsuite import MEBIBYTE, BackendSuite, Look, commit, contents, create, empty_trash, mode
from snapbroker.contract import Kind, Usage
from snapbroker.errors import Cancelled, FailedPrecondition
from tests.backends.conftest import MKFS, loop_mounted, run

pytestmark = pytest.mark.root

_FICLONE = 0x40049409


@pytest.fixture(scope="module")
def volume():
    base = Path(tempfile.mkdtemp(prefix="snapbroker-test-", dir="/var/tmp"))
    try:
        run("truncate", "--size", "2G", base / "image")
        run(*MKFS["btrfs"], base / "image")
        with loop_mounted(base / "image", base / "root") as root:
            yield root
    finally:
        shutil.rmtree(base)


_numbers = itertools.count()


@pytest.fixture
def backend(volume):
    backend = Btrfs.open(volume / f"root-{next(_numbers)}", BtrfsOptions())
    yield backend
    backend.close()


@pytest.fixture
def look(backend, tmp_path):
    look = Look(backend, tmp_path / "mounts")
    yield look
    look.close()


def own(backend, id_):
    return backend.root / "snapshots" / str(id_)


def subvolume_of(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return btrfs_ioctl.subvolume(fd)
    finally:
        os.close(fd)


def make_subvolume(directory, name):
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        btrfs_ioctl.create_subvolume(fd, name)
    finally:
        os.close(fd)
    return directory / name


def base_with_files(backend, look, id_=1, files=20):
    active = create(backend, id_)
    with look(active) as root:
        for number in range(files):
            (root / f"file-{number}").write_bytes(os.urandom(10_000))
    return commit(backend, active)


def mount_table():
    return Path("/proc/self/mountinfo").read_text().splitlines()


class TestBtrfs(BackendSuite):
    @pytest.fixture(name="backend")
    def _backend(self, backend):
        return backend


class TestLayout:
    def test_each_snapshot_has_a_private_directory_with_its_subvolumes(self, backend, look):
        base = base_with_files(backend, look)
        child = create(backend, 2, Kind.ACTIVE, (base.id,))
        view = create(backend, 3, Kind.VIEW)
        assert os.listdir(own(backend, base.id)) == [COMMITTED]
        assert os.listdir(own(backend, child.id)) == [ACTIVE]
        assert os.listdir(own(backend, view.id)) == [ACTIVE]
        assert {mode(own(backend, id_)) for id_ in (1, 2, 3)} == {0o700}
        assert mode(backend.root) == 0o700
        read_only = {
            "base": subvolume_of(own(backend, 1) / COMMITTED).read_only,
            "child": subvolume_of(own(backend, 2) / ACTIVE).read_only,
            "view": subvolume_of(own(backend, 3) / ACTIVE).read_only,
            "empty": subvolume_of(backend.root / EMPTY).read_only,
        }
        assert read_only == {"base": True, "child": False, "view": True, "empty": True}

    def test_a_view_of_a_parent_mounts_the_parent_s_subvolume(self, backend, look):
        base = base_with_files(backend, look)
        views = [create(backend, id_, Kind.VIEW, (base.id,)) for id_ in (2, 3)]
        assert list(backend.ids()) == [base.id]
        expected = (f"subvolid={subvolume_of(own(backend, base.id) / COMMITTED).id}", "ro")
        for view in views:
            (mount,) = backend.mounts(view)
            assert mount.options == expected
            assert backend.whole(view)
        backend.discard(views[0].id)
        assert backend.whole(views[1])
        assert backend.whole(base)

    def test_mounts_name_device_and_subvolume(self, backend, volume):
        active = create(backend, 1)
        (mount,) = backend.mounts(active)
        device = next(line.split(" - ")[1].split(" ")[1] for line in mount_table() if line.split(" ")[4] == str(volume))
        assert (mount.type, mount.source) == ("btrfs", device)
        assert mount.options == (f"subvolid={subvolume_of(own(backend, 1) / ACTIVE).id}",)

    def test_a_commit_gets_a_subvolume_of_its_own(self, backend):
        active = create(backend, 1)
        before = subvolume_of(own(backend, 1) / ACTIVE).id
        commit(backend, active)
        assert subvolume_of(own(backend, 1) / COMMITTED).id != before

    def test_a_committed_snapshot_cannot_be_written_to_even_by_root(self, backend, look):
        base = base_with_files(backend, look)
        with pytest.raises(OSError, match="Read-only"):
            (own(backend, base.id) / COMMITTED / "file-0").write_bytes(b"")

    def test_an_unfinished_origin_is_made_again(self, volume):
        root = volume / f"root-{next(_numbers)}"
        root.mkdir()
        (make_subvolume(root, EMPTY) / "stray").write_text("")
        backend = Btrfs.open(root, BtrfsOptions())
        try:
            assert os.listdir(root / EMPTY) == []
            assert mode(root / EMPTY) == 0o755
            assert subvolume_of(root / EMPTY).read_only
            first = subvolume_of(root / EMPTY).id
        finally:
            backend.close()
        Btrfs.open(root, BtrfsOptions()).close()
        assert subvolume_of(root / EMPTY).id == first


class TestUsage:
    def test_an_untouched_or_only_read_child_is_nothing(self, backend, look):
        base = base_with_files(backend, look)
        child = create(backend, 2, Kind.ACTIVE, (base.id,))
        assert backend.usage(child, Task()) == Usage()
        with look(child) as root:
            for name in os.listdir(root):
                (root / name).read_bytes()
        assert backend.usage(child, Task()) == Usage()
        assert backend.commit(child, sync=False, task=Task()) == Usage()

    def test_reading_that_is_noted_in_the_inode_is_no_change(self, backend, look):
        base = base_with_files(backend, look)
        child = create(backend, 2, Kind.ACTIVE, (base.id,))
        (mount,) = backend.mounts(child)
        target = look.directory / "strict"
        target.mkdir()
        strictatime = 1 << 24
        syscalls.mount(mount.source, target, mount.type, strictatime, ",".join(mount.options))
        try:
            before = (target / "file-0").stat().st_atime_ns
            (target / "file-0").read_bytes()
            assert (target / "file-0").stat().st_atime_ns > before
        finally:
            syscalls.unmount(target)
        assert backend.usage(child, Task()) == Usage()

    def test_added_and_modified_files_count(self, backend, look):
        base = base_with_files(backend, look)
        child = create(backend, 2, Kind.ACTIVE, (base.id,))
        with look(child) as root:
            (root / "added").write_bytes(os.urandom(MEBIBYTE))
            (root / "file-0").chmod(0o600)
            with (root / "file-1").open("r+b") as file:
                file.write(os.urandom(4096))
            (root / "file-2").unlink()
            (root / "directory").mkdir()
            os.symlink("added", root / "link")
        usage = backend.usage(child, Task())
        # added, file-0, file-1, directory, link; the bytes of added, one block of file-1, the link's inline target.
        assert usage.inodes == 5
        assert usage.size == MEBIBYTE + 4096 + 4096
        assert backend.commit(child, sync=False, task=Task()) == usage

    def test_an_extent_counts_once_and_the_parent_s_not_at_all(self, backend, look):
        base = base_with_files(backend, look)
        child = create(backend, 2, Kind.ACTIVE, (base.id,))
        with look(child) as root:
            (root / "new").write_bytes(os.urandom(MEBIBYTE))
            for source, clone in (("new", "clone-of-new"), ("file-0", "clone-of-old")):
                with (root / source).open("rb") as one, (root / clone).open("wb") as other:
                    fcntl.ioctl(other.fileno(), _FICLONE, one.fileno())
            os.link(root / "new", root / "link-to-new")
        assert backend.usage(child, Task()) == Usage(3, MEBIBYTE)

    def test_a_deleted_open_file_does_not_count(self, backend, look):
        base = base_with_files(backend, look)
        child = create(backend, 2, Kind.ACTIVE, (base.id,))
        with look(child) as root, (root / "gone").open("wb") as file:
            file.write(os.urandom(MEBIBYTE))
            file.flush()
            os.unlink(root / "gone")
            assert backend.usage(child, Task()) == Usage()

    def test_many_files_over_many_leaves_are_all_found(self, backend, look):
        base = base_with_files(backend, look)
        child = create(backend, 2, Kind.ACTIVE, (base.id,))
        with look(child) as root:
            for number in range(3000):
                (root / f"new-{number}").write_bytes(b"x" * 10)
        assert backend.usage(child, Task()) == Usage(3000, 3000 * 4096)

    def test_measuring_stops_when_asked(self, backend, look):
        base = base_with_files(backend, look)
        child = create(backend, 2, Kind.ACTIVE, (base.id,))
        with look(child) as root:
            (root / "new").write_text("text")
        task = Task()
        task.cancel()
        with pytest.raises(Cancelled):
            backend.usage(child, task)

    def test_what_is_discarded_is_measured_without_its_parent(self, backend, look):
        base = base_with_files(backend, look)
        committed, active = (create(backend, id_, Kind.ACTIVE, (base.id,)) for id_ in (2, 3))
        for snapshot in (committed, active):
            with look(snapshot) as root:
                (root / "new").write_bytes(os.urandom(MEBIBYTE))
        os.sync()
        commit(backend, committed)
        for id_ in (2, 3):
            backend.discard(id_)
        for token in backend.discarded():
            assert backend.measure(token, Task()).size == MEBIBYTE
        empty_trash(backend)
        backend.discard(1)
        (token,) = backend.discarded()
        # 20 files of 10,000 bytes, three blocks each.
        assert backend.measure(token, Task()).size == 20 * 3 * 4096


class TestCommit:
    def test_a_cancelled_commit_leaves_the_active_snapshot_alone(self, backend, look):
        active = create(backend, 1)
        with look(active) as root:
            (root / "file").write_text("text")
        for allowed in (0, 1):
            with pytest.raises(Cancelled):
                backend.commit(active, sync=False, task=CancelledAfter(allowed))
            assert os.listdir(own(backend, 1)) == [ACTIVE]
        assert backend.whole(active)
        commit(backend, active)

    def test_a_stale_committed_subvolume_is_replaced(self, backend, look):
        active = create(backend, 1)
        backend.commit(active, sync=False, task=Task())
        with look(active) as root:
            (root / "later").write_text("later")
        commit(backend, active)
        with look(create(backend, 2, Kind.VIEW, (1,))) as root:
            assert contents(root) == {"later": "later"}

    def test_of_two_halves_the_record_decides(self, backend, look):
        for id_, kind, stays in ((1, Kind.COMMITTED, COMMITTED), (2, Kind.ACTIVE, ACTIVE)):
            active = create(backend, id_)
            backend.commit(active, sync=False, task=Task())
            assert sorted(os.listdir(own(backend, id_))) == [COMMITTED, ACTIVE]
            assert backend.whole(Snapshot(id_, kind))
            assert os.listdir(own(backend, id_)) == [stays]
            other = Kind.ACTIVE if kind is Kind.COMMITTED else Kind.COMMITTED
            assert not backend.whole(Snapshot(id_, other))
            assert os.listdir(own(backend, id_)) == [stays]

    def test_settling_while_mounted_keeps_nothing_on_disk(self, backend, look):
        active = create(backend, 1)
        with look(active) as root:
            (root / "file").write_text("text")
            commit(backend, active)
            assert os.listdir(own(backend, 1)) == [COMMITTED]
        with look(create(backend, 2, Kind.VIEW, (1,))) as root:
            assert contents(root) == {"file": "text"}

    def test_an_empty_subvolume_inside_becomes_a_directory(self, backend, look):
        active = create(backend, 1)
        with look(active) as root:
            (root / "var/lib").mkdir(parents=True)
            inner = make_subvolume(root / "var/lib", "machines")
            inner.chmod(0o2750)
            os.chown(inner, 12, 34)
            inner.chmod(0o2750)
        commit(backend, active)
        child = create(backend, 2, Kind.ACTIVE, (1,))
        with look(child) as root:
            inner = root / "var/lib/machines"
            status = inner.stat()
            assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12, 34, 0o2750)
            (inner / "file").write_text("text")
            assert contents(inner) == {"file": "text"}

    def test_a_filled_subvolume_inside_is_refused_by_name(self, backend, look):
        active = create(backend, 1)
        with look(active) as root:
            (root / "var").mkdir()
            (make_subvolume(root / "var", "inner") / "file").write_text("text")
        with pytest.raises(FailedPrecondition, match="/var/inner is a subvolume"):
            backend.commit(active, sync=False, task=Task())
        assert os.listdir(own(backend, 1)) == [ACTIVE]
        with look(active) as root:
            assert contents(root / "var/inner") == {"file": "text"}

    def test_a_commit_that_is_refused_leaves_subvolumes_inside_as_they_are(self, backend, look):
        active = create(backend, 1)
        with look(active) as root:
            empty = make_subvolume(root, "empty")
            (make_subvolume(root, "filled") / "file").write_text("text")
            before = subvolume_of(empty).id
            with pytest.raises(FailedPrecondition, match="/filled is a subvolume"):
                backend.commit(active, sync=False, task=Task())
            assert subvolume_of(empty).id == before


class TestDelete:
    def test_subvolumes_inside_go_with_their_snapshot(self, backend, look):
        active = create(backend, 1)
        with look(active) as root:
            first = make_subvolume(root, "first")
            second = make_subvolume(first, "second")
            make_subvolume(second, "third")
            (second / "file").write_text("text")
            make_subvolume(root, "other")
        backend.discard(1)
        empty_trash(backend)
        assert list(backend.discarded()) == []

    def test_a_cancelled_delete_is_finished_by_the_next(self, backend, look):
        active = create(backend, 1)
        with look(active) as root:
            for number in range(3):
                make_subvolume(root, f"inner-{number}")
        backend.discard(1)
        (token,) = backend.discarded()
        with pytest.raises(Cancelled):
            backend.delete(token, CancelledAfter(1))
        assert list(backend.discarded()) == [token]
        backend.delete(token, Task())
        assert list(backend.discarded()) == []

    def test_nothing_is_deleted_through_a_mount_inside(self, backend, look, tmp_path):
        kept = tmp_path / "kept"
        kept.mkdir()
        (kept / "file").write_text("text")
        create(backend, 1)
        inside = own(backend, 1) / ACTIVE / "inside"
        inside.mkdir()
        syscalls.mount(kept, inside, None, syscalls.MS_BIND)
        backend.discard(1)
        empty_trash(backend)
        # The kernel takes the mount away together with the directory below it.
        assert not [line for line in mount_table() if str(backend.root) in line.split(" ")[4]]
        assert list(backend.discarded()) == []
        assert contents(kept) == {"file": "text"}

    def test_a_mounted_snapshot_can_be_removed(self, backend, look):
        active = create(backend, 1)
        with look(active) as root:
            (root / "file").write_text("text")
            backend.discard(1)
            empty_trash(backend)
            assert list(backend.discarded()) == []

    def test_strangers_in_the_trash_go_and_strange_tokens_are_refused(self, backend):
        (backend.root / "trash/file").write_text("text")
        (backend.root / "trash/directory").mkdir()
        (make_subvolume(backend.root / "trash", "subvolume") / "file").write_text("text")
        for token in list(backend.discarded()):
            assert backend.measure(token, Task()).inodes >= 1
        empty_trash(backend)
        assert list(backend.discarded()) == []
        for token in ("../snapshots", "..", ""):
            with pytest.raises(ValueError, match="entry"):
                backend.delete(token, Task())


class TestSweeping:
    def test_what_is_settled_is_deleted_at_once_when_nothing_else_goes_on(self, backend):
        for id_ in (1, 2, 3):
            backend._sweeper._not_before = 0.0
            commit(backend, create(backend, id_))
            assert os.listdir(backend.root / SETTLED) == []

    def test_in_a_pause_it_waits_for_the_next_deletion_of_anything(self, backend):
        backend._sweeper._not_before = float("inf")
        commit(backend, create(backend, 1))
        create(backend, 2)
        assert os.listdir(backend.root / SETTLED) == ["1"]
        assert os.listdir(own(backend, 1)) == [COMMITTED]
        again = Btrfs.open(backend.root, BtrfsOptions())
        try:
            again.discard(2)
            again.delete("2", Task())
            assert os.listdir(again.root / SETTLED) == []
            assert again.whole(Snapshot(1, Kind.COMMITTED))
        finally:
            again.close()

    def test_what_a_life_that_was_cut_off_had_settled_is_discarded(self, backend):
        backend._sweeper._not_before = float("inf")
        commit(backend, create(backend, 1))
        again = Btrfs.open(backend.root, BtrfsOptions())
        try:
            (token,) = again.discarded()
            assert os.listdir(backend.root / SETTLED) == []
            assert again.measure(token, Task()).inodes
            again.delete(token, Task())
            assert list(again.discarded()) == []
            assert again.whole(Snapshot(1, Kind.COMMITTED))
        finally:
            again.close()

    def test_the_last_of_many_goes_when_it_is_quiet(self, backend):
        backend._sweeper._not_before = time.monotonic() + 0.1
        commit(backend, create(backend, 1))
        give_up = time.monotonic() + 20
        while os.listdir(backend.root / SETTLED):
            assert time.monotonic() < give_up

    def test_one_deletion_takes_others_along(self, backend):
        for id_ in range(1, 41):
            create(backend, id_)
            backend.discard(id_)
        backend.delete("17", Task())
        assert list(backend.discarded()) == []

    def test_whoever_waits_for_the_end_of_a_pause_can_be_cancelled(self, backend):
        create(backend, 1)
        backend.discard(1)
        backend._sweeper._not_before = float("inf")
        with pytest.raises(Cancelled):
            backend.delete("1", CancelledAfter(2))
        assert list(backend.discarded()) == ["1"]

    def test_a_slow_burst_is_followed_by_a_pause(self, backend, monkeypatch):
        clock = iter([100.0, 100.1, 200.0, 210.0])
        monkeypatch.setattr(btrfs_sweeper.time, "monotonic", lambda: next(clock))
        backend._sweeper._burst([])
        assert backend._sweeper._not_before == pytest.approx(100.1 + 0.4)
        backend._sweeper._burst([])
        assert backend._sweeper._not_before == 210.0 + btrfs_sweeper.PAUSE_S_MAX

    def test_what_cannot_be_deleted_fails_only_for_whom_it_concerns(self, backend, monkeypatch, caplog):
        destroy = btrfs_ioctl.destroy_with_nested

        def refuse(dir_fd, name, task):
            if os.readlink(f"/proc/self/fd/{dir_fd}").endswith("/trash/1"):
                raise PermissionError("in use")
            destroy(dir_fd, name, task)

        for id_ in (1, 2):
            create(backend, id_)
            backend.discard(id_)
        monkeypatch.setattr(btrfs_ioctl, "destroy_with_nested", refuse)
        backend.delete("2", Task())
        assert list(backend.discarded()) == ["1"]
        assert "discarded 1 are not deleted yet: in use" in caplog.text
        with pytest.raises(PermissionError):
            backend.delete("1", Task())
        monkeypatch.undo()
        backend.delete("1", Task())
        assert list(backend.discarded()) == []


class TestFailures:
    def test_a_create_cancelled_after_the_snapshot_leaves_nothing(self, backend, look):
        base = base_with_files(backend, look)
        with pytest.raises(Cancelled):
            backend.create(Snapshot(2, Kind.ACTIVE, (base.id,)), CancelledAfter(1))
        assert os.listdir(backend.root / "snapshots") == ["1"]

    def test_a_broken_parent_is_noticed(self, backend, look):
        base = base_with_files(backend, look)
        view = create(backend, 2, Kind.VIEW, (base.id,))
        fd = os.open(own(backend, base.id), os.O_RDONLY)
        try:
            btrfs_ioctl.destroy(fd, COMMITTED)
        finally:
            os.close(fd)
        assert not backend.whole(base)
        assert not backend.whole(view)
        for kind in (Kind.ACTIVE, Kind.VIEW):
            with pytest.raises(FileNotFoundError):
                create(backend, 3, kind, (base.id,))
        assert not own(backend, 3).exists()

    def test_a_plain_directory_is_not_whole(self, backend):
        (own(backend, 1) / ACTIVE).mkdir(parents=True)
        assert not backend.whole(Snapshot(1, Kind.ACTIVE))
        assert not backend.whole(Snapshot(2, Kind.ACTIVE))

    def test_many_threads_share_one_parent(self, backend, look):
        base = base_with_files(backend, look)
        with ThreadPoolExecutor(16) as threads:
            children = list(threads.map(lambda id_: create(backend, id_, Kind.ACTIVE, (base.id,)), range(2, 66)))
            usages = list(threads.map(lambda child: backend.commit(child, True, Task()), children))
            list(threads.map(backend.settle, children))
        assert usages == [Usage()] * 64
        assert all(backend.whole(Snapshot(child.id, Kind.COMMITTED)) for child in children)
        assert len({backend.mounts(Snapshot(100 + c.id, Kind.VIEW, (c.id,))) for c in children}) == 64


class TestProbe:
    def test_here_it_works_and_names_the_device(self, volume):
        support = Btrfs.probe(volume / "not/yet/there", BtrfsOptions())
        assert support.missing == ()
        assert "/dev/loop" in support.notes[0]

    def test_another_filesystem_is_named(self, filesystem):
        root = filesystem("ext4", "64M")
        assert Btrfs.probe(root / "x", BtrfsOptions()) == Support(
            (f"{root} is on ext4, not on btrfs: put the root on a btrfs filesystem",)
        )
        with pytest.raises(FailedPrecondition, match="is on ext4"):
            Btrfs.open(root / "x", BtrfsOptions())
        assert not (root / "x").exists()

    def test_a_read_only_mount_is_told(self, volume, tmp_path):
        device = Btrfs.probe(volume, BtrfsOptions()).notes[0].rpartition(" ")[2]
        target = tmp_path / "read-only"
        target.mkdir()
        syscalls.mount(device, target, "btrfs", syscalls.MS_RDONLY)
        try:
            (line,) = Btrfs.probe(target, BtrfsOptions()).missing
            assert "read-write" in line
        finally:
            syscalls.unmount(target)

    def test_without_privilege_each_lack_is_a_line(self, volume):
        for directory in (volume.parent, volume):
            directory.chmod(0o755)
        lines = as_nobody(lambda: "\n".join(Btrfs.probe(volume, BtrfsOptions()).missing)).splitlines()
        assert len(lines) == 2
        assert "written to" in lines[0]
        assert "CAP_SYS_ADMIN" in lines[1]


def as_nobody(call):
    """What `call` answers in a process without any privilege."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.write(writer, call().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


class TestPowerCut:
    def test_what_was_answered_is_there(self, disk, tmp_path):
        disk = disk("btrfs")
        backend = Btrfs.open(disk.root / "root", BtrfsOptions())
        try:
            active, view = create(backend, 1), create(backend, 2, Kind.VIEW)
            with after_power_cut(disk) as again:
                assert again.whole(active)
                assert again.whole(view)
                assert mode(own(again, 1) / ACTIVE) == 0o755

            with Look(backend, tmp_path)(active) as root:
                (root / "file").write_bytes(b"x" * MEBIBYTE)
            backend.commit(active, sync=True, task=Task())
            with after_power_cut(disk) as again:
                assert again.whole(Snapshot(1, Kind.COMMITTED))
                assert (own(again, 1) / COMMITTED / "file").read_bytes() == b"x" * MEBIBYTE

            backend.settle(active)
            child = create(backend, 3, Kind.ACTIVE, (1,))
            with after_power_cut(disk) as again:
                assert again.whole(Snapshot(1, Kind.COMMITTED))
                assert again.whole(child)
                assert (own(again, 3) / ACTIVE / "file").read_bytes() == b"x" * MEBIBYTE
        finally:
            backend.close()


@contextlib.contextmanager
def after_power_cut(disk):
    with disk.after_power_cut() as root:
        backend = Btrfs.open(root / "root", BtrfsOptions())
        try:
            yield backend
        finally:
            backend.close()


class CancelledAfter(Task):
    """A task that is cancelled at its nth progress, at whatever point of the work that is."""

    def __init__(self, allowed):
        super().__init__()
        self.allowed = allowed

    def advance(self, entries=1, size=0):
        if self.allowed == 0:
            self.cancel()
        self.allowed -= 1
        super().advance(entries, size)
