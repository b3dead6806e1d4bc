import contextlib
import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from backends import files, syscalls
from backends.api import Task
from backends.files import (
    DESCRIPTORS_MAX,
    Descent,
    DirectorySync,
    FilesystemSync,
    Shelf,
    remove_tree,
    usage,
    usage_over,
)
from snapbroker.contract import Usage
from snapbroker.errors import Cancelled

REPOSITORY = Path(__file__).parents[2]
DEPTH = 3000


@contextlib.contextmanager
def directory(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def remove(path, task=None):
    with directory(path.parent) as fd:
        remove_tree(path.name, fd, task or Task())


def disk_usage(path):
    """What du(1) says: allocated bytes and inodes."""
    size, inodes = (
        int(subprocess.run(["du", "-s", *flags, path], check=True, capture_output=True, text=True).stdout.split()[0])
        for flags in (["--block-size=1"], ["--inodes"])
    )
    return Usage(inodes, size)


def deep(path, depth=DEPTH):
    """Directories one in the other, a file in each: deeper than a path, the stack or the descriptors reach."""
    path.mkdir()
    fd = os.open(path, os.O_RDONLY)
    for _ in range(depth):
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.mkdir("below", dir_fd=fd)
        below = os.open("below", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def copy(source, target):
    subprocess.run(["cp", "-a", source, target], check=True)


def touch(path, text="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class TestUsage:
    def test_it_counts_as_du_does(self, scratch):
        tree = scratch / "tree"
        for number in range(40):
            touch(tree / f"directory-{number % 7}/file-{number}", "x" * number * 1000)
        os.link(tree / "directory-0/file-0", tree / "directory-1/again")
        os.link(tree / "directory-3/file-38", tree / "again")
        os.symlink("nowhere", tree / "link")
        os.mkfifo(tree / "fifo")
        with (tree / "sparse").open("wb") as file:
            file.truncate(1 << 30)
        os.sync()
        assert usage(tree, Task()) == disk_usage(tree)

    def test_an_empty_directory_counts_itself(self, tmp_path):
        assert usage(tmp_path, Task()) == Usage(1, tmp_path.stat().st_blocks * 512)

    def test_a_missing_root_is_an_error(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            usage(tmp_path / "missing", Task())

    def test_the_root_is_not_followed(self, tmp_path):
        os.symlink("/", tmp_path / "link")
        with pytest.raises(NotADirectoryError):
            usage(tmp_path / "link", Task())

    def test_it_may_start_at_a_descriptor(self, tmp_path):
        touch(tmp_path / "tree/file")
        with directory(tmp_path) as fd:
            assert usage("tree", Task(), fd).inodes == 2

    def test_depth_costs_no_descriptors(self, tmp_path):
        deep(tmp_path / "tree")
        seen = []

        class Counting(Task):
            def advance(self, entries=1, size=0):
                seen.append(len(os.listdir("/proc/self/fd")))

        before = len(os.listdir("/proc/self/fd"))
        assert usage(tmp_path / "tree", Counting()).inodes == 2 * DEPTH + 1
        # One more for the scan of the directory.
        assert max(seen) - before == DESCRIPTORS_MAX + 1
        remove(tmp_path / "tree")

    @pytest.mark.root
    def test_mounts_inside_are_left_out(self, tmp_path, mounted):
        tree = tmp_path / "tree"
        touch(tree / "file")
        (tree / "mounted").mkdir()
        before = usage(tree, Task())
        touch(mounted(tree / "mounted") / "large", "x" * 100_000)
        assert usage(tree, Task()) == Usage(before.inodes - 1, before.size - tree.stat().st_blksize)

    @pytest.mark.root
    def test_a_file_mounted_over_is_left_out(self, tmp_path, mounted):
        tree = tmp_path / "tree"
        touch(tree / "file")
        (tmp_path / "other").mkdir()
        source = touch(mounted(tmp_path / "other") / "source", "x" * 100_000)
        syscalls.mount(source, tree / "file", None, syscalls.MS_BIND)
        try:
            assert usage(tree, Task()).inodes == 1
        finally:
            syscalls.unmount(tree / "file")

    @pytest.mark.root
    def test_nested_subvolumes_belong_to_the_tree(self, filesystem):
        root = filesystem("btrfs")
        tree = root / "tree"
        tree.mkdir()
        subprocess.run(["btrfs", "-q", "subvolume", "create", tree / "nested"], check=True)
        touch(tree / "nested/file")
        assert usage(tree, Task()).inodes == 3
        remove(tree)
        assert not tree.exists()

    def test_what_vanishes_meanwhile_is_not_counted(self, tmp_path):
        tree = tmp_path / "tree"
        for name in ("a/file", "b/file", "c/file"):
            touch(tree / name)

        class Removing(Task):
            def advance(self, entries=1, size=0):
                for name in ("a", "b", "c"):
                    if (tree / name).exists():
                        remove(tree / name)

        assert usage(tree, Removing()).inodes == 1

    def test_a_directory_swapped_for_a_link_leads_nowhere(self, tmp_path):
        tree = tmp_path / "tree"
        touch(tree / "inner/file")
        touch(tmp_path / "outside/secret")

        class Swapping(Task):
            def advance(self, entries=1, size=0):
                if not (tree / "inner").is_symlink():
                    (tree / "inner").rename(tmp_path / "moved")
                    os.symlink(tmp_path / "outside", tree / "inner")

        assert usage(tree, Swapping()).inodes == 1

    def test_a_level_moved_away_meanwhile_is_noticed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "DESCRIPTORS_MAX", 2)
        (tmp_path / "tree/a/b/c/d").mkdir(parents=True)
        with Descent(tmp_path / "tree") as descent:
            for name in "abcd":
                descent.enter(name)
            (tmp_path / "tree/a/b").rename(tmp_path / "elsewhere")
            for _ in range(2):
                descent.leave()
            with pytest.raises(OSError, match="moved while it was read") as caught:
                descent.leave()
            assert caught.value.errno == errno.ESTALE

    def test_it_can_be_cancelled(self, tmp_path):
        touch(tmp_path / "file")
        task = Task()
        task.cancel()
        with pytest.raises(Cancelled):
            usage(tmp_path, task)


class TestUsageOver:
    @pytest.fixture
    def parent(self, scratch):
        parent = scratch / "parent"
        for name in ("a", "b", "directory/c", "directory/deeper/d"):
            touch(parent / name, name * 3000)
        os.symlink("target", parent / "link")
        os.link(parent / "a", parent / "twin")
        os.mkfifo(parent / "fifo")
        return parent

    @pytest.fixture
    def child(self, scratch, parent):
        copy(parent, scratch / "child")
        return scratch / "child"

    def measure(self, parent, child):
        os.sync()
        return usage_over(parent, child, Task())

    def cost(self, *paths):
        os.sync()
        return Usage(len(paths), sum(path.lstat().st_blocks for path in paths) * 512)

    def test_an_untouched_copy_is_nothing(self, parent, child):
        assert self.measure(parent, child) == Usage()

    @pytest.mark.parametrize(
        "change",
        [
            lambda path: path.write_text("longer" * 9999),
            lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
            lambda path: os.chmod(path, 0o600),
            lambda path: os.chown(path, 1, -1),
            lambda path: os.chown(path, -1, 1),
            lambda path: (path.unlink(), os.mkfifo(path)),
            lambda path: (path.unlink(), os.symlink("x", path)),
        ],
        ids=["size", "time", "mode", "user", "group", "fifo", "link"],
    )
    @pytest.mark.root
    def test_a_changed_file_counts(self, parent, child, change):
        path = child / "directory/c"
        change(path)
        assert self.measure(parent, child) == self.cost(path)

    def test_a_changed_link_target_counts(self, parent, child):
        status = (child / "link").lstat()
        (child / "link").unlink()
        os.symlink("tegrat", child / "link")
        os.utime(child / "link", ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
        assert self.measure(parent, child) == self.cost(child / "link")

    @pytest.mark.root
    def test_a_changed_device_number_counts(self, parent, child):
        for tree, minor in ((parent, 3), (child, 5)):
            os.mknod(tree / "device", stat.S_IFCHR | 0o600, os.makedev(1, minor))
            os.utime(tree / "device", ns=(0, 0))
        assert self.measure(parent, child) == self.cost(child / "device")

    def test_added_trees_count_with_their_directories(self, parent, child):
        added = [touch(child / "new/inner/file", "x" * 9000), child / "new/inner", child / "new"]
        assert self.measure(parent, child) == self.cost(*added)

    def test_a_directory_in_place_of_a_file_counts(self, parent, child):
        (child / "b").unlink()
        assert self.measure(parent, child) == Usage()
        added = [touch(child / "b/file"), child / "b"]
        assert self.measure(parent, child) == self.cost(*added)

    def test_a_changed_directory_does_not_count(self, parent, child):
        os.chmod(child / "directory", 0o700)
        os.utime(child / "directory", ns=(0, 0))
        (child / "directory/deeper/d").unlink()
        assert self.measure(parent, child) == Usage()

    def test_links_count_once(self, parent, child):
        touch(child / "new/one", "x" * 9000)
        os.link(child / "new/one", child / "two")
        assert self.measure(parent, child) == self.cost(child / "two", child / "new")

    def test_another_name_for_an_unchanged_file_is_nothing(self, parent, child):
        os.link(child / "a", child / "new")
        os.link(child / "b", child / "directory/deeper/new")
        assert self.measure(parent, child) == Usage()

    def test_deep_trees_are_compared(self, tmp_path):
        for name in ("parent", "child"):
            deep(tmp_path / name)
        for tree in ("parent", "child"):
            for name in ("below", "below/below"):
                os.utime(tmp_path / tree / name / "file", ns=(0, 0))
        task = Task()
        measured = usage_over(tmp_path / "parent", tmp_path / "child", task)
        assert measured.inodes == DEPTH - 2
        assert task.entries == 2 * DEPTH
        for name in ("parent", "child"):
            remove(tmp_path / name)

    def test_it_can_be_cancelled(self, parent, child):
        task = Task()
        task.cancel()
        with pytest.raises(Cancelled):
            usage_over(parent, child, task)


class TestRemoveTree:
    def test_everything_goes(self, tmp_path):
        tree = tmp_path / "tree"
        for number in range(20):
            touch(tree / f"{number % 3}/{number % 5}/file-{number}")
        outside = touch(tmp_path / "outside/file")
        os.symlink(outside.parent, tree / "link")
        os.symlink("nowhere", tree / "dangling")
        os.mkfifo(tree / "fifo")
        task = Task()
        remove(tree, task)
        assert not tree.exists()
        assert outside.exists()
        assert task.entries == len(range(20)) + 3 + 3 + 15

    @pytest.mark.parametrize("make", [touch, os.mkfifo, lambda path: os.symlink("/etc", path)])
    def test_anything_but_a_directory_goes_too(self, tmp_path, make):
        make(tmp_path / "thing")
        remove(tmp_path / "thing")
        assert os.listdir(tmp_path) == []
        assert Path("/etc").is_dir()

    def test_missing_is_fine(self, tmp_path):
        remove(tmp_path / "missing")

    def test_any_depth(self, tmp_path):
        deep(tmp_path / "tree")
        remove(tmp_path / "tree")
        assert os.listdir(tmp_path) == []

    def test_a_directory_larger_than_a_batch(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "BATCH_ENTRIES", 7)
        for number in range(100):
            touch(tmp_path / f"tree/{number % 10}/{number}")
            touch(tmp_path / f"tree/file-{number}")
        remove(tmp_path / "tree")
        assert os.listdir(tmp_path) == []

    @pytest.mark.root
    def test_it_stops_at_a_mount(self, tmp_path, mounted):
        tree = tmp_path / "tree"
        touch(tree / "a/b/file")
        (tree / "a/b/mounted").mkdir()
        precious = touch(mounted(tree / "a/b/mounted") / "precious")
        with pytest.raises(OSError, match="still mounted") as caught:
            remove(tree)
        assert caught.value.errno == errno.EBUSY
        assert caught.value.filename == "tree/a/b/mounted"
        assert precious.exists()

    @pytest.mark.root
    def test_it_stops_at_a_bind_mount_of_the_same_filesystem(self, tmp_path):
        precious = touch(tmp_path / "outside/precious")
        inner = tmp_path / "tree/inner"
        inner.mkdir(parents=True)
        syscalls.mount(precious.parent, inner, None, syscalls.MS_BIND)
        try:
            for path in (tmp_path / "tree", inner):
                with pytest.raises(OSError, match="still mounted"):
                    remove(path)
            assert precious.exists()
        finally:
            syscalls.unmount(inner)
        remove(tmp_path / "tree")
        assert precious.exists()

    @pytest.mark.root
    def test_it_names_a_file_that_is_mounted_over(self, tmp_path):
        source = touch(tmp_path / "source")
        target = touch(tmp_path / "tree/inner/file")
        syscalls.mount(source, target, None, syscalls.MS_BIND)
        try:
            with pytest.raises(OSError, match="busy") as caught:
                remove(tmp_path / "tree")
            assert caught.value.filename == "tree/inner/file"
        finally:
            syscalls.unmount(target)
        remove(tmp_path / "tree")
        assert source.read_text() == "text"

    @pytest.mark.root
    def test_protected_files_and_directories_go(self, scratch, protect):
        tree = scratch / "tree"
        for path in (touch(tree / "inner/immutable"), tree / "inner", touch(tree / "work/work/file").parent):
            protect(path)
        protect(tree)
        remove(tree)
        assert not tree.exists()

    @pytest.mark.root
    def test_without_privileges_closed_directories_go(self, scratch):
        touch(scratch / "tree/work/work/file")
        touch(scratch / "tree/readonly/inner/file")
        for path, mode in (("work/work", 0), ("readonly/inner", 0o500), ("readonly", 0o600), (".", 0o400)):
            os.chmod(scratch / "tree" / path, mode)
        subprocess.run(["chown", "-R", "1234:1234", scratch], check=True)
        script = (
            "import os, sys\nfrom backends.api import Task\nfrom backends.files import remove_tree\n"
            "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
            "os.setgroups([]); os.setgid(1234); os.setuid(1234)\n"
            "remove_tree('tree', fd, Task())"
        )
        subprocess.run([sys.executable, "-c", script, scratch], check=True, cwd=REPOSITORY)
        assert os.listdir(scratch) == []

    def test_a_cancelled_removal_can_go_on(self, tmp_path):
        for number in range(20):
            touch(tmp_path / f"tree/{number}")

        class Impatient(Task):
            def advance(self, entries=1, size=0):
                super().advance(entries, size)
                if self.entries == 10:
                    self.cancel()

        with pytest.raises(Cancelled):
            remove(tmp_path / "tree", Impatient())
        assert 0 < len(os.listdir(tmp_path / "tree")) < 20
        remove(tmp_path / "tree")
        assert os.listdir(tmp_path) == []


class TestFilesystemSync:
    """With syncfs replaced by one that waits for the test: the rounds are what is tested, not the disk."""

    @pytest.fixture
    def syncfs(self, monkeypatch):
        class Syncfs:
            def __init__(self):
                self.begun = threading.Semaphore(0)
                self.permits = threading.Semaphore(0)
                self.calls = 0
                self.error = None

            def __call__(self, fd):
                self.calls += 1
                self.begun.release()
                assert self.permits.acquire(timeout=10)
                if self.error:
                    raise self.error

        stub = Syncfs()
        monkeypatch.setattr(files, "syncfs", stub)
        return stub

    @pytest.fixture
    def callers(self):
        """Called with a sync, starts a thread that calls it; answers the list of what the calls raised."""
        threads = []
        raised = []

        def start(sync, *trees):
            def call():
                try:
                    sync.sync(*trees)
                except OSError as error:
                    raised.append(error.errno)

            before = sync.statistics().calls
            threads.append(threading.Thread(target=call))
            threads[-1].start()
            while sync.statistics().calls == before:
                os.sched_yield()
            return threads[-1]

        yield start, raised
        for thread in threads:
            thread.join(10)

    def test_callers_share_the_round_after_the_running_one(self, syncfs, callers):
        start, raised = callers
        sync = FilesystemSync(0)
        first = start(sync)
        syncfs.begun.acquire()
        others = [start(sync) for _ in range(10)]
        syncfs.permits.release()
        first.join(10)
        assert not first.is_alive()
        # The running round began before the others called: it must not count for them.
        syncfs.begun.acquire()
        assert all(thread.is_alive() for thread in others)
        syncfs.permits.release()
        for thread in others:
            thread.join(10)
            assert not thread.is_alive()
        assert (syncfs.calls, raised) == (2, [])
        assert sync.statistics() == files.SyncStatistics(calls=11, flushes=2)

    def test_a_failure_reaches_everybody_it_concerns(self, syncfs, callers):
        start, raised = callers
        sync = FilesystemSync(0)
        first = start(sync)
        syncfs.begun.acquire()
        others = [start(sync) for _ in range(3)]
        syncfs.permits.release()
        first.join(10)
        syncfs.begun.acquire()
        syncfs.error = OSError(errno.EIO, "lost")
        syncfs.permits.release()
        for thread in others:
            thread.join(10)
        assert raised == [errno.EIO] * 3
        syncfs.error = None
        syncfs.permits.release()
        sync.sync()

    def test_from_a_failure_on_each_tree_is_asked_by_itself(self, monkeypatch):
        failures = [OSError(errno.EIO, "lost")]
        lost = {"mine": OSError(errno.EIO, "lost", "mine/file")}
        asked = []

        def syncfs(fd):
            if failures:
                raise failures.pop()

        def fsync_files(tree):
            asked.append(tree)
            # The kernel tells it once.
            if error := lost.pop(tree, None):
                raise error

        monkeypatch.setattr(files, "syncfs", syncfs)
        monkeypatch.setattr(files, "fsync_files", fsync_files)
        sync = FilesystemSync(0)
        with pytest.raises(OSError, match="lost"):
            # Whose file it was the flush does not say: it may be this one's.
            sync.sync("others")
        sync.sync("others")
        for _ in range(2):
            with pytest.raises(OSError, match="lost") as caught:
                sync.sync("mine")
            assert caught.value.filename == "mine/file"
        assert asked == ["others", "others", "mine"]

    def test_a_failure_of_the_flush_before_is_asked_after(self, syncfs, callers, monkeypatch):
        """It had begun when the caller came, and may have tried to write the caller's files."""
        start, raised = callers
        asked = []
        monkeypatch.setattr(files, "fsync_files", asked.append)
        sync = FilesystemSync(0)
        first = start(sync)
        syncfs.begun.acquire()
        second = start(sync, "mine")
        syncfs.error = OSError(errno.EIO, "lost")
        syncfs.permits.release()
        first.join(10)
        syncfs.begun.acquire()
        syncfs.error = None
        syncfs.permits.release()
        second.join(10)
        assert (raised, asked) == ([errno.EIO], ["mine"])

    def test_the_real_one_flushes(self, tmp_path):
        with directory(tmp_path) as fd:
            sync = FilesystemSync(fd)
            sync.sync()
            assert sync.statistics() == files.SyncStatistics(calls=1, flushes=1)
        with pytest.raises(OSError, match="Bad file descriptor"):
            FilesystemSync(-1).sync()


class TestDirectorySync:
    @pytest.mark.root
    @pytest.mark.parametrize(
        ("kind", "flush"),
        [
            ("ext4", files._flush_last),
            ("ext4-nojournal", files._flush_unordered),
            ("xfs", files._flush_last),
            ("btrfs", files._commit_transaction),
        ],
    )
    def test_each_filesystem_has_its_way(self, filesystem, kind, flush):
        root = filesystem(kind)
        with directory(root) as fd:
            sync = DirectorySync(fd)
            assert sync._flush is flush
            os.mkdir("a", dir_fd=fd)
            os.mkdir("a/b", dir_fd=fd)
            sync.sync(["a", "a/b"], fd)
            sync.sync([], fd)

    @pytest.mark.root
    def test_a_commit_whose_wake_up_is_lost_is_asked_for_again(self, filesystem, monkeypatch):
        root = filesystem("btrfs")
        real, asked, begun = fcntl.ioctl, [], threading.Event()

        def ioctl(fd, request, argument):
            if request != files._BTRFS_IOC_START_SYNC:
                return real(fd, request, argument)
            asked.append(threading.current_thread())
            if len(asked) <= files.COMMIT_REPEATS_MAX:
                # As the kernel does: it comes back when the commit has begun, whoever had it begin.
                assert begun.wait(30)
                return real(fd, request, argument)
            answer = real(fd, request, argument)
            begun.set()
            return answer

        monkeypatch.setattr(files, "COMMIT_BEGINS_S", 0.01)
        monkeypatch.setattr(files.fcntl, "ioctl", ioctl)
        threads = threading.active_count()
        with directory(root) as fd:
            os.mkdir("a", dir_fd=fd)
            DirectorySync(fd).sync(["a"], fd)
            assert len(asked) == files.COMMIT_REPEATS_MAX + 1
        assert threading.active_count() == threads

    @pytest.mark.root
    def test_an_error_of_a_commit_is_the_caller_s(self, tmp_path):
        threads = threading.active_count()
        with directory(tmp_path) as fd, pytest.raises(OSError, match="ioctl"):
            files._commit_transaction(["a"], fd)
        assert threading.active_count() == threads

    @pytest.mark.parametrize(("dirty", "expected"), [(0, ["syncfs"]), (1 << 30, ["a/b", "a"])])
    def test_without_an_order_it_depends_on_what_is_dirty(self, tmp_path, monkeypatch, dirty, expected):
        flushed = []
        monkeypatch.setattr(files, "_dirty_bytes", lambda: dirty)
        monkeypatch.setattr(files, "syncfs", lambda fd: flushed.append("syncfs"))
        monkeypatch.setattr(files, "fsync_directory", lambda path, dir_fd: flushed.append(path))
        with directory(tmp_path) as fd:
            files._flush_unordered(["a", "a/b"], fd)
        assert flushed == expected

    def test_dirty_bytes_are_the_kernel_s(self, scratch):
        before = files._dirty_bytes()
        (scratch / "file").write_bytes(bytes(64 << 20))
        assert files._dirty_bytes() >= 0
        assert files._dirty_bytes() != before


class TestShelf:
    @pytest.fixture
    def shelf(self, tmp_path):
        shelf = Shelf(tmp_path / "some/where/root")
        yield shelf
        shelf.close()

    def test_the_layout_is_private_whatever_the_umask(self, tmp_path):
        before = os.umask(0o777)
        try:
            # Nobody but root could enter what such a umask makes; the root itself is put right.
            Shelf(tmp_path / "root").close()
        finally:
            os.umask(before)
        for path in (".", "snapshots", "trash"):
            assert stat.S_IMODE((tmp_path / "root" / path).stat().st_mode) == 0o700

    def test_an_existing_root_is_kept_and_made_private(self, tmp_path):
        touch(tmp_path / "root/snapshots/3/file")
        os.chmod(tmp_path / "root", 0o777)
        with contextlib.closing(Shelf(tmp_path / "root")) as shelf:
            assert list(shelf.ids()) == [3]
            assert stat.S_IMODE(shelf.root.stat().st_mode) == 0o700

    def test_ids_are_canonical_numbers_of_directories(self, shelf):
        for name in ("1", "20", "18446744073709551615"):
            (shelf.snapshots / name).mkdir()
        for name in ("0", "01", "-1", "+1", "1.5", "a", "rm-1", "new-1", " 1", "\u0661", "1_0", "9" * 30):
            (shelf.snapshots / name).mkdir()
        touch(shelf.snapshots / "7")
        os.symlink("1", shelf.snapshots / "8")
        assert sorted(shelf.ids()) == [1, 20, 18446744073709551615]

    def test_listing_twice_at_a_time(self, shelf):
        for number in range(1, 500):
            (shelf.snapshots / str(number)).mkdir()
        assert [pair for pair in zip(shelf.ids(), shelf.ids(), strict=True) if pair[0] != pair[1]] == []

    def test_a_snapshot_goes_through_the_trash(self, shelf):
        touch(shelf.path(4) / "fs/file")
        shelf.discard(4)
        assert list(shelf.ids()) == []
        (token,) = shelf.discarded()
        assert (shelf.trash / token / "fs/file").exists()
        assert shelf.measure(token, Task()).inodes == 3
        shelf.delete(token, Task())
        assert list(shelf.discarded()) == []

    def test_a_name_taken_in_the_trash_is_no_obstacle(self, shelf):
        for taken in ("4", "4.1"):
            (shelf.trash / taken).mkdir()
        touch(shelf.path(4) / "mine")
        shelf.discard(4)
        assert sorted(shelf.discarded()) == ["4", "4.1", "4.2"]
        assert (shelf.trash / "4.2/mine").exists()
        assert os.listdir(shelf.trash / "4") == []

    def test_missing_is_fine(self, shelf):
        shelf.discard(5)
        shelf.delete("5", Task())
        assert shelf.measure("5", Task()) == Usage()

    def test_anything_in_the_trash_is_measured_and_deleted(self, shelf):
        touch(shelf.trash / "file", "x" * 5000)
        assert shelf.measure("file", Task()).inodes == 1
        shelf.delete("file", Task())
        assert list(shelf.discarded()) == []

    @pytest.mark.parametrize("token", ["", ".", "..", "../snapshots", "a/b", "a\0b"])
    def test_tokens_lead_nowhere_else(self, shelf, token):
        for call in (shelf.measure, shelf.delete):
            with pytest.raises(ValueError, match="not an entry"):
                call(token, Task())

    def test_threads_discard_the_same_snapshot_once(self, shelf):
        shelf.path(1).mkdir()
        barrier = threading.Barrier(8)

        def discard():
            barrier.wait()
            shelf.discard(1)

        threads = [threading.Thread(target=discard) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert list(shelf.discarded()) == ["1"]

    def test_a_file_in_the_way_says_so(self, tmp_path):
        touch(tmp_path / "root/snapshots")
        with pytest.raises(NotADirectoryError):
            Shelf(tmp_path / "root")

    def test_closing_twice_is_fine_and_leaks_nothing(self, tmp_path):
        before = set(os.listdir("/proc/self/fd"))
        shelf = Shelf(tmp_path / "root")
        shelf.close()
        shelf.close()
        assert set(os.listdir("/proc/self/fd")) == before
        with pytest.raises(OSError, match="Bad file descriptor"):
            shelf.discard(1)


class TestSyscalls:
    def test_rename_replaces_nothing(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        with pytest.raises(FileExistsError) as caught:
            syscalls.rename_noreplace(tmp_path / "a", tmp_path / "b")
        assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "a"), str(tmp_path / "b"))
        with directory(tmp_path) as fd:
            syscalls.rename_noreplace("a", "c", fd, fd)
        assert sorted(os.listdir(tmp_path)) == ["b", "c"]
        with pytest.raises(FileNotFoundError):
            syscalls.rename_noreplace(tmp_path / "a", tmp_path / "d")

    def test_mount_roots(self, tmp_path):
        assert syscalls.is_mount_root("/proc")
        assert not syscalls.is_mount_root(tmp_path)
        with directory("/") as fd:
            assert syscalls.is_mount_root("proc", fd)
            assert syscalls.is_mount_root("", fd)
        with pytest.raises(FileNotFoundError):
            syscalls.is_mount_root(tmp_path / "missing")

    def test_a_kernel_that_tells_no_mount_roots_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(syscalls, "_STATX_ATTR_MOUNT_ROOT", 1 << 40)
        with pytest.raises(OSError, match=r"5\.8") as caught:
            syscalls.is_mount_root(tmp_path)
        assert caught.value.errno == errno.EOPNOTSUPP

    def test_entry_types(self, tmp_path):
        (tmp_path / "directory").mkdir()
        for number in range(2000):
            touch(tmp_path / f"file-{number}")
        with directory(tmp_path) as fd:
            for _ in range(2):
                types = syscalls.entry_types(fd)
                assert len(types) == 2001
                assert types.pop("directory") == syscalls.DT_DIR
                assert set(types.values()) == {syscalls.DT_REG}

    def test_errors_carry_number_and_path(self, tmp_path):
        with pytest.raises(OSError, match="Bad file descriptor"):
            syscalls.syncfs(-1)
        with pytest.raises(OSError, match=r"Invalid argument|Operation not permitted"):
            syscalls.unmount(tmp_path)
        with pytest.raises(OSError, match="such device") as caught:
            syscalls.detached_mount("nothing", [])
        assert caught.value.errno == errno.ENODEV

    @pytest.mark.root
    def test_a_refused_mount_carries_the_kernel_s_words(self):
        with pytest.raises(OSError, match="overlay: ") as caught:
            syscalls.detached_mount("overlay", [("metacopy", "perhaps")])
        assert caught.value.filename == "metacopy=perhaps"

    @pytest.mark.root
    def test_a_clone_shares_the_blocks(self, filesystem):
        root = filesystem("btrfs")
        (root / "source").write_bytes(b"x" * 100_000)
        with (root / "source").open("rb") as source, (root / "target").open("wb") as target:
            syscalls.clone_file(target.fileno(), source.fileno())
        assert (root / "target").read_bytes() == b"x" * 100_000

    def test_a_large_ioctl_fills_its_buffer(self, tmp_path):
        buffer = bytearray(4096)
        with (tmp_path / "file").open("wb") as file:
            syscalls.big_ioctl(file.fileno(), 0x80086601, buffer)
            expected = fcntl.ioctl(file.fileno(), 0x80086601, bytes(8))
        assert buffer[:8] == expected
        with open("/dev/null", "rb") as null, pytest.raises(OSError, match="Inappropriate ioctl"):
            syscalls.big_ioctl(null.fileno(), 0x9408, bytearray(16))
