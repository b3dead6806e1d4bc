import errno
import hashlib
import logging
import os
import socket
import stat
import struct
import subprocess
import threading

import pytest

from backends import btrfs_ioctl, copying, entries, syscalls
from backends.api import Task
from backends.copying import BATCH_FILES, copy_tree
from backends.entries import CHUNK_BYTES
from snapbroker.errors import Cancelled

pytestmark = pytest.mark.root

MEBIBYTE = 1 << 20
ACL = struct.pack(
    "=IHHIHHIHHIHHIHHI", 2, 1, 6, 2**32 - 1, 2, 4, 1000, 4, 4, 2**32 - 1, 0x10, 5, 2**32 - 1, 0x20, 0, 2**32 - 1
)
CAPABILITY = struct.pack("=5I", 0x02000001, 1 << 10, 0, 0, 0)


@pytest.fixture(params=["ext4", "xfs", "btrfs"])
def disk_root(filesystem, request):
    return filesystem(request.param)


def plant(root):
    """A tree with one of everything."""
    (root / "etc/deep/deeper").mkdir(parents=True)
    (root / "empty").mkdir(mode=0o1777)
    (root / "etc/passwd").write_text("root\n")
    (root / "etc/none").write_bytes(b"")
    (root / "etc/large").write_bytes(os.urandom(3 * MEBIBYTE + 17))
    (root / b"not-utf-8-\xff\n".decode("utf-8", "surrogateescape")).write_text("name")
    (root / "setuid").write_text("program")
    os.chown(root / "setuid", 1000, 1001)
    (root / "setuid").chmod(0o6755)
    (root / "capable").write_text("program")
    os.chown(root / "capable", 7, 8)
    os.setxattr(root / "capable", "security.capability", CAPABILITY)
    (root / "acl").write_text("acl")
    os.setxattr(root / "acl", "system.posix_acl_access", ACL)
    os.setxattr(root / "etc", "system.posix_acl_default", ACL)
    os.setxattr(root / "etc/passwd", "user.note", b"\0binary\xff")
    os.setxattr(root / "etc/passwd", "trusted.overlay.opaque", b"y")
    os.setxattr(root / "etc", "user.directory", b"too")
    with (root / "holes").open("wb") as file:
        file.truncate(9 * MEBIBYTE)
        for position in (0, 2 * MEBIBYTE, 5 * MEBIBYTE):
            file.seek(position)
            file.write(b"data" * 4096)
    with (root / "hole").open("wb") as file:
        file.truncate(5000)
    os.link(root / "etc/passwd", root / "etc/deep/passwd")
    os.link(root / "etc/passwd", root / "passwd")
    os.symlink("etc/passwd", root / "link")
    os.symlink("nowhere/" * 20, root / "dangling")
    os.link(root / "dangling", root / "dangling-too", follow_symlinks=False)
    os.chown(root / "link", 5, 6, follow_symlinks=False)
    os.setxattr(root / "link", "trusted.link", b"itself", follow_symlinks=False)
    os.utime(root / "link", ns=(11, 1_000_000_012), follow_symlinks=False)
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "whiteout", stat.S_IFCHR, 0)
    os.mknod(root / "block", stat.S_IFBLK | 0o660, os.makedev(7, 250))
    with socket.socket(socket.AF_UNIX) as listener:
        fd = os.open(root, os.O_PATH)
        listener.bind(f"/proc/self/fd/{fd}/socket")
        os.close(fd)
    os.chown(root / "etc/deep", 21, 22)
    (root / "etc/deep").chmod(0o2710)
    (root / "unreadable").mkdir(mode=0)
    os.chown(root, 31, 32)
    root.chmod(0o711)
    os.setxattr(root, "user.root", b"yes")
    for number, (directory, _, files) in enumerate(os.walk(root, topdown=False)):
        for name in files:
            if not stat.S_ISLNK(os.lstat(os.path.join(directory, name)).st_mode):
                os.utime(os.path.join(directory, name), ns=(number + 10**18, number * 1_000_000_007))
        os.utime(directory, ns=(number + 10**17, number * 1_000_000_009))


def picture(root):
    """Everything that a copy has to have, by relative path; access times as they were before looking."""
    found = {}
    inodes = {}
    for directory, _, _ in [(str(root), None, None), *((d, 0, 0) for d in directories(root))]:
        status = os.lstat(directory)
        found[os.path.relpath(directory, root)] = describe(directory, status)
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            if stat.S_ISDIR(status.st_mode):
                continue
            relative = os.path.relpath(path, root)
            inodes.setdefault((status.st_dev, status.st_ino), []).append(relative)
            found[relative] = describe(path, status)
    found["hard links"] = sorted(sorted(names) for names in inodes.values() if len(names) > 1)
    return found


def directories(root):
    for directory, names, _ in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                yield path


def describe(path, status):
    is_link, is_file = stat.S_ISLNK(status.st_mode), stat.S_ISREG(status.st_mode)
    return {
        "mode": oct(status.st_mode),
        "owner": (status.st_uid, status.st_gid),
        "modified": status.st_mtime_ns,
        "device": status.st_rdev,
        "links": None if stat.S_ISDIR(status.st_mode) else status.st_nlink,
        "target": os.readlink(path) if is_link else None,
        "attributes": {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
            if not name.startswith("trusted.SGI_ACL")  # how xfs shows the ACLs a second time
        },
        "content": hashlib.sha256(open_and_read(path)).hexdigest() if is_file else None,
        "data": data_ranges(path, status.st_size) if is_file else None,
    }


def open_and_read(path):
    with open(path, "rb") as file:
        return file.read()


def data_ranges(path, size):
    fd = os.open(path, os.O_RDONLY)
    try:
        return list(entries._data(fd, size))
    finally:
        os.close(fd)


class TestFidelity:
    @pytest.mark.parametrize("reflink", ["auto", "never"])
    @pytest.mark.parametrize("batch", [1, BATCH_FILES])
    def test_a_copy_cannot_be_told_from_its_original(self, disk_root, monkeypatch, reflink, batch):
        monkeypatch.setattr(copying, "BATCH_FILES", batch)
        source = disk_root / "source"
        source.mkdir()
        plant(source)
        os.sync()
        copy_tree(source, disk_root / "copy", Task(), reflink=reflink)
        expected = picture(source)
        assert picture(disk_root / "copy") == expected
        assert expected["capable"]["attributes"]["security.capability"] == CAPABILITY
        assert len(expected["holes"]["data"]) == 3

    def test_access_times_come_along_and_the_originals_stay(self, scratch):
        source = scratch / "source"
        (source / "directory").mkdir(parents=True)
        (source / "directory/file").write_text("text")
        paths = ["directory/file", "directory", "."]
        for path in paths:
            os.utime(source / path, ns=(1, 2))
        copy_tree(source, scratch / "copy", Task())
        for root in (source, scratch / "copy"):
            assert [os.stat(root / path).st_atime_ns for path in paths] == [1, 1, 1]

    def test_across_filesystems(self, filesystem, scratch):
        source = scratch / "source"
        source.mkdir()
        plant(source)
        target = filesystem("xfs") / "copy"
        copy_tree(source, target, Task())
        assert picture(target) == picture(source)
        copy_tree(target, scratch / "back", Task())
        assert picture(scratch / "back") == picture(source)
        assert os.listxattr(scratch / "back/acl") == ["system.posix_acl_access"]

    def test_what_is_made_inherits_nothing_from_where_it_is_made(self, scratch):
        source = scratch / "source"
        (source / "directory").mkdir(parents=True)
        (source / "directory/file").write_text("text")
        os.symlink("x", source / "link")
        place = scratch / "place"
        place.mkdir()
        os.chown(place, 0, 4321)
        os.setxattr(place, "system.posix_acl_default", ACL)
        place.chmod(0o2777)
        before = os.umask(0)
        try:
            copy_tree(source, place / "copy", Task())
        finally:
            os.umask(before)
        assert picture(place / "copy") == picture(source)

    @pytest.mark.parametrize("umask", [0o000, 0o027, 0o777])
    def test_modes_whatever_the_umask(self, scratch, umask):
        source = scratch / "source"
        source.mkdir()
        for mode in (0o000, 0o444, 0o600, 0o644, 0o666, 0o755, 0o777, 0o1644, 0o2755, 0o4755):
            for number in range(2):
                (source / f"{mode:o}-{number}").write_text("text")
                os.chown(source / f"{mode:o}-{number}", number, number)
                (source / f"{mode:o}-{number}").chmod(mode)
        before = os.umask(umask)
        try:
            copy_tree(source, scratch / "copy", Task())
        finally:
            os.umask(before)
        assert picture(scratch / "copy") == picture(source)

    def test_an_existing_empty_directory_is_filled(self, scratch):
        source = scratch / "source"
        source.mkdir()
        plant(source)
        (scratch / "copy").mkdir()
        copy_tree(source, scratch / "copy", Task())
        assert picture(scratch / "copy") == picture(source)

    def test_deeper_than_any_path(self, scratch):
        root = scratch / "source"
        root.mkdir()
        name = "n" * 200
        fd = os.open(root, os.O_RDONLY)
        for level in range(60):
            os.mkdir(name, dir_fd=fd)
            inner = os.open(name, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = inner
            with open(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd), "w") as file:
                file.write(f"level {level}")
            os.symlink(f"{level}", "link", dir_fd=fd)
            os.utime("link", ns=(5, level), dir_fd=fd, follow_symlinks=False)
        os.close(fd)
        before = len(os.listdir("/proc/self/fd"))
        copy_tree(root, scratch / "copy", Task())
        assert len(os.listdir("/proc/self/fd")) == before
        fds = [os.open(scratch / tree, os.O_RDONLY) for tree in ("source", "copy")]
        try:
            for level in range(60):
                for index, fd in enumerate(fds):
                    fds[index] = os.open(name, os.O_RDONLY, dir_fd=fd)
                    os.close(fd)
                source, copy = fds
                assert sorted(os.listdir(copy)) == sorted(os.listdir(source))
                assert os.fstat(copy).st_mtime_ns == os.fstat(source).st_mtime_ns
                assert os.stat("link", dir_fd=copy, follow_symlinks=False).st_mtime_ns == level
                with open(os.open("file", os.O_RDONLY, dir_fd=copy)) as file:
                    assert file.read() == f"level {level}"
        finally:
            for fd in fds:
                os.close(fd)
        for tree in ("source", "copy"):
            subprocess.run(["rm", "-rf", scratch / tree], check=True)


class TestMounts:
    def test_what_is_mounted_inside_is_not_copied(self, scratch, caplog):
        source, other = scratch / "source", scratch / "other"
        (source / "directory").mkdir(parents=True)
        (source / "directory/hidden").write_text("hidden")
        (source / "file").write_text("hidden")
        other.mkdir()
        (other / "stranger").write_text("stranger")
        syscalls.mount(other, source / "directory", None, syscalls.MS_BIND)
        syscalls.mount("/dev/null", source / "file", None, syscalls.MS_BIND)
        try:
            with caplog.at_level(logging.WARNING, "backends"):
                copy_tree(source, scratch / "copy", Task())
        finally:
            syscalls.unmount(source / "file")
            syscalls.unmount(source / "directory")
        assert os.listdir(scratch / "copy") == ["directory"]
        assert os.listdir(scratch / "copy/directory") == []
        assert "mount point" in caplog.text
        assert "mounted over" in caplog.text

    def test_the_source_may_be_a_mount_itself(self, filesystem, scratch):
        root = filesystem("ext4", "64M")
        (root / "file").write_text("text")
        copy_tree(root, scratch / "copy", Task())
        assert (scratch / "copy/file").read_text() == "text"

    def test_a_subvolume_inside_is_copied_as_a_directory(self, filesystem):
        root = filesystem("btrfs")
        (root / "source").mkdir()
        fd = os.open(root / "source", os.O_RDONLY)
        btrfs_ioctl.create_subvolume(fd, "inner")
        os.close(fd)
        (root / "source/inner/file").write_text("text")
        copy_tree(root / "source", root / "copy", Task())
        assert (root / "copy/inner/file").read_text() == "text"
        assert (root / "copy/inner").stat().st_ino != btrfs_ioctl.SUBVOLUME_INODE


class TestReflink:
    def test_blocks_are_shared_or_not_as_asked(self, filesystem):
        root = filesystem("btrfs")
        (root / "source").mkdir()
        (root / "source/file").write_bytes(os.urandom(8 * MEBIBYTE))
        os.sync()
        exclusive = {}
        for reflink in ("auto", "always", "never"):
            copy_tree(root / "source", root / reflink, Task(), reflink=reflink)
            os.sync()
            exclusive[reflink] = physical(root / reflink / "file")
        original = physical(root / "source/file")
        assert exclusive["auto"] == original
        assert exclusive["always"] == original
        assert not exclusive["never"] & original

    def test_always_fails_where_it_cannot(self, scratch):
        (scratch / "source").mkdir()
        (scratch / "source/file").write_text("text")
        with pytest.raises(OSError, match="reflink = always") as caught:
            copy_tree(scratch / "source", scratch / "copy", Task(), reflink="always")
        assert caught.value.errno == errno.EOPNOTSUPP


def physical(path):
    """Where on the disk the file's extents are."""
    lines = subprocess.run(["filefrag", "-v", path], check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split(":")[2].strip() for line in lines if line.strip()[:1].isdigit()}


class TestTask:
    def test_progress_counts_entries_and_bytes_once(self, scratch):
        source = scratch / "source"
        source.mkdir()
        plant(source)
        expected = sum(
            1 + len(files) + sum(os.path.islink(os.path.join(d, n)) for n in names)
            for d, names, files in os.walk(source)
        )
        regular = {
            (s.st_ino): s.st_size
            for d, _, files in os.walk(source)
            for s in (os.lstat(os.path.join(d, name)) for name in files)
            if stat.S_ISREG(s.st_mode)
        }
        for batch in (1, 64):
            task = Task()
            copy_tree(source, scratch / f"copy-{batch}", task)
            assert (task.entries, task.bytes) == (expected, sum(regular.values()))

    @pytest.mark.parametrize("threads", [1, 2, 4])
    def test_a_cancelled_copy_stops_all_threads(self, scratch, threads):
        source = scratch / "source"
        source.mkdir()
        for number in range(10 * BATCH_FILES):
            (source / f"file-{number}").write_text("text")
        for allowed in (0, 1, BATCH_FILES, 5 * BATCH_FILES):
            target = scratch / f"copy-{threads}-{allowed}"
            with pytest.raises(Cancelled, match="taken back"):
                copy_tree(source, target, CancelledAfter(allowed), threads)
            assert len(os.listdir(target)) < 10 * BATCH_FILES
            assert not [thread for thread in threading.enumerate() if thread.name.startswith("copy-")]

    def test_a_large_file_is_given_up_in_the_middle(self, scratch):
        source = scratch / "source"
        source.mkdir()
        with (source / "large").open("wb") as file:
            for _ in range(3):
                file.write(bytes(CHUNK_BYTES))
        task = CancelledAfter(1)
        with pytest.raises(Cancelled):
            copy_tree(source, scratch / "copy", task)
        assert task.bytes <= 2 * CHUNK_BYTES
        assert 0 < (scratch / "copy/large").stat().st_size <= 2 * CHUNK_BYTES

    def test_the_first_failure_is_the_one_raised(self, scratch, monkeypatch):
        source = scratch / "source"
        source.mkdir()
        for number in range(10 * BATCH_FILES):
            (source / f"file-{number}").write_text("text")
        (scratch / "copy").mkdir()
        (scratch / "copy/file-77").write_text("in the way")
        with pytest.raises(FileExistsError) as caught:
            copy_tree(source, scratch / "copy", Task())
        assert caught.value.filename == str(scratch / "copy/file-77")
        assert (scratch / "copy/file-77").read_text() == "in the way"

    def test_a_missing_source_makes_nothing(self, scratch):
        with pytest.raises(FileNotFoundError):
            copy_tree(scratch / "missing", scratch / "copy", Task())
        assert not (scratch / "copy").exists()

    def test_a_small_tree_starts_no_thread(self, scratch, monkeypatch):
        source = scratch / "source"
        source.mkdir()
        for number in range(BATCH_FILES):
            (source / f"file-{number}").write_text("text")
        monkeypatch.setattr(copying.threading, "Thread", None)
        copy_tree(source, scratch / "copy", Task())
        assert len(os.listdir(scratch / "copy")) == BATCH_FILES
        (source / "one-more").write_text("text")
        with pytest.raises(TypeError):
            copy_tree(source, scratch / "other", Task())


class WaitingFor(Task):
    """A copy that goes on from its fourth mebibyte once something has reached."""

    def __init__(self, reached):
        super().__init__()
        self.reached = reached

    def advance(self, entries=1, size=0):
        super().advance(entries, size)
        if self.bytes == 4 * MEBIBYTE:
            assert self.reached.wait(30)


class TestEarlyFlush:
    @pytest.fixture
    def source(self, scratch):
        source = scratch / "source"
        source.mkdir()
        for number in range(8):
            (source / f"file-{number}").write_bytes(os.urandom(MEBIBYTE))
        return source

    def test_it_is_called_beside_the_copying(self, scratch, source, monkeypatch):
        monkeypatch.setattr(copying, "UNFLUSHED_BYTES", 3 * MEBIBYTE)
        begun, flushed = threading.Event(), []

        def flush():
            flushed.append(threading.current_thread())
            begun.set()

        task = WaitingFor(begun)
        copy_tree(source, scratch / "copy", task, flush=flush)
        assert begun.is_set()
        assert task.bytes == 8 * MEBIBYTE
        assert 1 <= len(flushed) <= 2
        assert threading.current_thread() not in flushed
        assert not flushed[0].is_alive()

    def test_a_small_copy_is_left_to_the_caller(self, scratch, source):
        copy_tree(source, scratch / "copy", Task(), flush=lambda: pytest.fail("it was called"))

    def test_blocks_that_are_shared_need_none(self, filesystem, monkeypatch):
        monkeypatch.setattr(copying, "UNFLUSHED_BYTES", MEBIBYTE)
        root = filesystem("xfs")
        (root / "source").mkdir()
        (root / "source/file").write_bytes(os.urandom(4 * MEBIBYTE))
        shared = copy_tree(root / "source", root / "copy", Task(), flush=lambda: pytest.fail("it was called"))
        assert shared
        assert not copy_tree(root / "source", root / "other", Task(), reflink="never")

    def test_its_failure_is_the_copy_s(self, scratch, source, monkeypatch):
        monkeypatch.setattr(copying, "UNFLUSHED_BYTES", MEBIBYTE)
        begun = threading.Event()

        def flush():
            begun.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with pytest.raises(OSError, match="Input/output"):
            copy_tree(source, scratch / "copy", WaitingFor(begun), flush=flush)

    def test_a_copy_that_fails_says_its_own_reason(self, scratch, source, monkeypatch):
        monkeypatch.setattr(copying, "UNFLUSHED_BYTES", MEBIBYTE)

        def flush():
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with pytest.raises(Cancelled):
            copy_tree(source, scratch / "copy", CancelledAfter(12), flush=flush)


class TestFallbacks:
    """What other kernels and filesystems answer, played by the calls themselves."""

    @pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
    def test_without_copy_file_range(self, scratch, monkeypatch, number):
        def refuse(*_):
            raise OSError(number, os.strerror(number))

        source = scratch / "source"
        source.mkdir()
        plant(source)
        monkeypatch.setattr(os, "copy_file_range", refuse)
        copy_tree(source, scratch / "copy", Task())
        assert picture(scratch / "copy") == picture(source)

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ETXTBSY])
    def test_a_file_that_cannot_be_cloned_is_copied(self, scratch, monkeypatch, number):
        def refuse(*_):
            raise OSError(number, os.strerror(number))

        source = scratch / "source"
        source.mkdir()
        plant(source)
        monkeypatch.setattr(entries, "clone_file", refuse)
        copy_tree(source, scratch / "copy", Task())
        assert picture(scratch / "copy") == picture(source)

    def test_other_failures_are_raised(self, scratch, monkeypatch):
        def fail(*_, **__):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        (scratch / "source").mkdir()
        (scratch / "source/large").write_bytes(bytes(MEBIBYTE))
        for name, module in (("clone_file", entries), ("copy_file_range", os), ("setxattr", os)):
            os.setxattr(scratch / "source/large", "user.note", b"text")
            with monkeypatch.context() as patch:
                patch.setattr(module, name, fail)
                with pytest.raises(OSError, match="Input/output"):
                    copy_tree(scratch / "source", scratch / f"copy-{name}", Task())

    def test_a_write_cut_short_is_completed(self, scratch, monkeypatch):
        source = scratch / "source"
        source.mkdir()
        (source / "file").write_bytes(os.urandom(50_000))
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, content: write(fd, content[:100]))
        copy_tree(source, scratch / "copy", Task())
        assert (scratch / "copy/file").read_bytes() == (source / "file").read_bytes()

    def test_a_refused_attribute_is_logged_once_and_the_copy_goes_on(self, scratch, caplog):
        source = scratch / "source"
        source.mkdir()
        for number in range(5):
            (source / f"file-{number}").write_text("text")
            os.setxattr(source / f"file-{number}", "user.note", b"text")
        # ramfs takes no user attributes.
        target = scratch / "ramfs"
        target.mkdir()
        syscalls.mount("ramfs", target, "ramfs")
        try:
            with caplog.at_level(logging.WARNING, "backends"):
                copy_tree(source, target / "copy", Task())
            assert len(os.listdir(target / "copy")) == 5
        finally:
            syscalls.unmount(target)
        assert [record.message.split()[1] for record in caplog.records] == ["user.note"]


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
