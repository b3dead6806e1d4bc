import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from backends import native, patterns, syscalls
from backends.api import Snapshot, Task
from backends.copying import BATCH_FILES
from backends.files import SyncStatistics
from backends.native import Native, NativeOptions
from backends.testsuite import MEBIBYTE, BackendSuite, Look, commit, contents, create, empty_trash, mode
from snapbroker.contract import Kind, Usage
from snapbroker.errors import Cancelled, FailedPrecondition
from tests.backends.test_copying import physical, picture

pytestmark = pytest.mark.root


@pytest.fixture
def backend(scratch):
    backend = Native.open(scratch / "root", NativeOptions())
    yield backend
    backend.close()


@pytest.fixture
def look(backend, tmp_path):
    look = Look(backend, tmp_path / "mounts")
    yield look
    look.close()


def own(backend, id_):
    return backend.root / "snapshots" / str(id_)


def base_with_files(backend, files=20, id_=1):
    active = create(backend, id_)
    for number in range(files):
        (own(backend, id_) / f"file-{number}").write_bytes(os.urandom(10_000))
    return commit(backend, active)


class TestNative(BackendSuite):
    @pytest.fixture(name="backend")
    def _backend(self, backend):
        return backend


class TestLayout:
    def test_the_directory_itself_is_the_root(self, backend):
        create(backend, 1)
        create(backend, 2, Kind.VIEW)
        assert os.listdir(own(backend, 1)) == []
        assert [mode(own(backend, id_)) for id_ in (1, 2)] == [0o755, 0o755]
        assert mode(backend.root / "snapshots") == 0o700

    def test_a_view_of_a_parent_has_no_directory(self, backend):
        base = base_with_files(backend)
        view = create(backend, 2, Kind.VIEW, (base.id,))
        assert list(backend.ids()) == [1]
        assert backend.whole(view)
        shutil.rmtree(own(backend, 1))
        assert not backend.whole(view)
        with pytest.raises(FileNotFoundError):
            create(backend, 3, Kind.VIEW, (base.id,))

    def test_mounts_are_the_peer_s(self, backend):
        base = base_with_files(backend)
        for id_, kind, parents, source, access in (
            (2, Kind.ACTIVE, (), 2, "rw"),
            (3, Kind.VIEW, (), 3, "ro"),
            (4, Kind.ACTIVE, (base.id,), 4, "rw"),
            (5, Kind.VIEW, (base.id,), 1, "ro"),
        ):
            (mount,) = backend.mounts(create(backend, id_, kind, parents))
            assert (mount.type, mount.source, mount.options) == ("bind", str(own(backend, source)), ("rbind", access))

    def test_a_child_s_root_is_its_parent_s_in_all(self, backend):
        active = create(backend, 1)
        os.chown(own(backend, 1), 12, 34)
        own(backend, 1).chmod(0o1770)
        os.setxattr(own(backend, 1), "user.note", b"text")
        os.utime(own(backend, 1), ns=(1, 2))
        base = commit(backend, active)
        create(backend, 2, Kind.ACTIVE, (base.id,))
        status = own(backend, 2).stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (12, 34, 0o1770, 2)
        assert os.getxattr(own(backend, 2), "user.note") == b"text"


class TestUsage:
    def test_an_untouched_child_is_nothing(self, backend):
        base = base_with_files(backend)
        child = create(backend, 2, Kind.ACTIVE, (base.id,))
        assert backend.usage(child, Task()) == Usage()
        assert backend.commit(child, sync=True, task=Task()) == Usage()

    def test_a_child_is_compared_with_its_immediate_parent(self, backend):
        base_with_files(backend)
        middle = create(backend, 2, Kind.ACTIVE, (1,))
        (own(backend, 2) / "second").write_bytes(os.urandom(MEBIBYTE))
        commit(backend, middle)
        top = create(backend, 3, Kind.ACTIVE, (2, 1))
        (own(backend, 3) / "third").write_bytes(os.urandom(4096))
        (own(backend, 3) / "file-0").chmod(0o600)
        assert backend.usage(top, Task()) == Usage(2, 4096 + 12288)


class TestCreate:
    @pytest.mark.parametrize("allowed", [1, BATCH_FILES // 2, 3 * BATCH_FILES, 5 * BATCH_FILES - 1])
    def test_one_cancelled_in_the_middle_leaves_nothing(self, backend, allowed):
        base = base_with_files(backend, 5 * BATCH_FILES)
        with pytest.raises(Cancelled):
            backend.create(Snapshot(2, Kind.ACTIVE, (base.id,)), CancelledAfter(allowed))
        assert os.listdir(backend.root / "snapshots") == ["1"]

    def test_a_full_disk_leaves_nothing(self, filesystem):
        root = filesystem("ext4", "24M")
        backend = Native.open(root / "root", NativeOptions())
        try:
            active = create(backend, 1)
            (own(backend, 1) / "large").write_bytes(os.urandom(14 * MEBIBYTE))
            base = commit(backend, active)
            with pytest.raises(OSError, match="No space left"):
                create(backend, 2, Kind.ACTIVE, (base.id,))
            assert list(backend.ids()) == [1]
        finally:
            backend.close()

    def test_concurrent_creates_share_flushes(self, backend):
        base = base_with_files(backend)
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(lambda id_: create(backend, id_, Kind.ACTIVE, (base.id,)), range(2, 66)))
        statistics = backend._sync.statistics()
        assert statistics.calls == 64
        assert statistics.flushes < 64
        expected = {name: (own(backend, 1) / name).read_bytes() for name in os.listdir(own(backend, 1))}
        for id_ in range(2, 66):
            assert {name: (own(backend, id_) / name).read_bytes() for name in os.listdir(own(backend, id_))} == expected

    def test_empty_ones_that_were_built_together_share_a_flush(self, backend):
        snapshots = [Snapshot(id_, Kind.ACTIVE) for id_ in range(1, 65)]
        for snapshot in snapshots:
            backend.build(snapshot, Task())
        backend.flush(snapshots)
        assert backend._sync.statistics() == SyncStatistics(calls=1, flushes=1)

    def test_a_warm_base_is_not_read_again(self, backend, monkeypatch):
        monkeypatch.setattr(patterns, "REST_S", 0)
        monkeypatch.setattr(patterns, "SETTLED_NS", -(10**12))
        base = base_with_files(backend, 8)
        expected = picture(own(backend, 1))
        for id_ in (2, 3):
            create(backend, id_, Kind.ACTIVE, (base.id,))
        with monkeypatch.context() as patch:
            patch.setattr(native, "copy_tree", None)
            child = create(backend, 4, Kind.ACTIVE, (base.id,))
        assert [picture(own(backend, id_)) for id_ in (2, 3, 4)] == [expected] * 3
        assert backend.usage(child, Task()) == Usage()
        (own(backend, 1) / "file-7").write_text("damaged")
        create(backend, 5, Kind.ACTIVE, (base.id,))
        assert (own(backend, 5) / "file-7").read_text() == "damaged"

    def test_a_base_whose_blocks_are_shared_is_shared_again(self, filesystem, monkeypatch):
        monkeypatch.setattr(patterns, "REST_S", 0)
        monkeypatch.setattr(patterns, "SETTLED_NS", -(10**12))
        backend = Native.open(filesystem("xfs") / "root", NativeOptions())
        try:
            base = base_with_files(backend, 8)
            os.sync()
            for id_ in (2, 3, 4):
                create(backend, id_, Kind.ACTIVE, (base.id,))
            blocks = {tuple(physical(own(backend, id_) / "file-0")) for id_ in (1, 2, 3, 4)}
            assert len(blocks) == 1
        finally:
            backend.close()

    def test_a_copy_shares_blocks_where_it_can(self, filesystem):
        root = filesystem("xfs")
        used = {}
        for reflink in ("always", "never"):
            backend = Native.open(root / reflink, NativeOptions(reflink=reflink))
            try:
                active = create(backend, 1)
                (own(backend, 1) / "large").write_bytes(os.urandom(16 * MEBIBYTE))
                base = commit(backend, active)
                os.sync()
                before = os.statvfs(root).f_bfree
                create(backend, 2, Kind.ACTIVE, (base.id,))
                used[reflink] = (before - os.statvfs(root).f_bfree) * os.statvfs(root).f_frsize
                assert (own(backend, 2) / "large").read_bytes() == (own(backend, 1) / "large").read_bytes()
            finally:
                backend.close()
        assert used["always"] < MEBIBYTE
        assert used["never"] >= 16 * MEBIBYTE


class TestProbe:
    def test_it_says_whether_copies_share_blocks(self, filesystem):
        options = NativeOptions()
        (note,) = Native.probe(filesystem("xfs") / "not/yet", options).notes
        assert "can share blocks" in note
        plain = filesystem("ext4", "64M")
        (note,) = Native.probe(plain, options).notes
        assert "full copy" in note
        always = NativeOptions(reflink="always")
        assert "reflink" in Native.probe(plain, always).missing[0]
        with pytest.raises(FailedPrecondition, match="reflink"):
            Native.open(plain / "root", always)
        assert not (plain / "root").exists()

    def test_a_place_that_cannot_be_written_is_told(self):
        (line,) = Native.probe(Path("/proc/nowhere"), NativeOptions()).missing
        assert line.startswith("/proc: ")

    @pytest.mark.parametrize("wrong", [{"copy_threads": 0}, {"copy_threads": 65}, {"reflink": "maybe"}, {"threads": 2}])
    def test_wrong_options_are_refused(self, wrong):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, NativeOptions)


class TestPowerCut:
    @pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
    def test_what_was_answered_is_there(self, disk, kind):
        disk = disk(kind)
        backend = Native.open(disk.root / "root", NativeOptions())
        try:
            active = create(backend, 1)
            with disk.after_power_cut() as root:
                assert mode(root / "root/snapshots/1") == 0o755
            (own(backend, 1) / "directory").mkdir()
            (own(backend, 1) / "directory/file").write_bytes(b"x" * MEBIBYTE)
            (own(backend, 1) / "small").write_text("text")
            os.utime(own(backend, 1), ns=(3, 4))
            backend.commit(active, sync=True, task=Task())
            with disk.after_power_cut() as root:
                assert (root / "root/snapshots/1/directory/file").read_bytes() == b"x" * MEBIBYTE
            create(backend, 2, Kind.ACTIVE, (1,))
            with disk.after_power_cut() as root:
                copy = root / "root/snapshots/2"
                assert (copy / "directory/file").read_bytes() == b"x" * MEBIBYTE
                assert (copy / "small").read_text() == "text"
                assert copy.stat().st_mtime_ns == 4
        finally:
            backend.close()

    @pytest.mark.parametrize("kind", ["ext4", "ext4-nojournal", "xfs", "btrfs"])
    def test_what_was_flushed_together_is_there(self, disk, kind):
        disk = disk(kind)
        backend = Native.open(disk.root / "root", NativeOptions())
        try:
            snapshots = [Snapshot(id_, Kind.ACTIVE) for id_ in range(1, 6)]
            for snapshot in snapshots:
                backend.build(snapshot, Task())
            backend.flush(snapshots)
            with disk.after_power_cut() as root:
                assert sorted(os.listdir(root / "root/snapshots")) == ["1", "2", "3", "4", "5"]
                assert mode(root / "root/snapshots/5") == 0o755
            (own(backend, 1) / "file").write_text("text")
            base = commit(backend, snapshots[0])
            snapshots = [Snapshot(6, Kind.ACTIVE), Snapshot(7, Kind.ACTIVE, (base.id,)), Snapshot(8, Kind.ACTIVE)]
            for snapshot in snapshots:
                backend.build(snapshot, Task())
            backend.flush(snapshots)
            with disk.after_power_cut() as root:
                assert {"6", "7", "8"} < set(os.listdir(root / "root/snapshots"))
                assert (root / "root/snapshots/7/file").read_text() == "text"
        finally:
            backend.close()


class TestMountsInside:
    def test_nothing_is_copied_or_deleted_through_them(self, backend, look, tmp_path):
        kept = tmp_path / "kept"
        kept.mkdir()
        (kept / "file").write_text("text")
        active = create(backend, 1)
        inside = own(backend, 1) / "inside"
        inside.mkdir()
        syscalls.mount(kept, inside, None, syscalls.MS_BIND)
        try:
            base = commit(backend, active)
            child = create(backend, 2, Kind.ACTIVE, (base.id,))
            assert os.listdir(own(backend, 2) / "inside") == []
            assert backend.whole(child)
            backend.discard(1)
            with pytest.raises(OSError, match="mounted"):
                empty_trash(backend)
        finally:
            (point,) = backend.root.glob("*/1/inside")
            syscalls.unmount(point)
        empty_trash(backend)
        assert contents(kept) == {"file": "text"}


class CancelledAfter(Task):
    """A task that is cancelled at its nth progress."""

    def __init__(self, allowed):
        super().__init__()
        self.allowed = allowed

    def advance(self, entries=1, size=0):
        if self.allowed == 0:
            self.cancel()
        self.allowed -= 1
        super().advance(entries, size)
