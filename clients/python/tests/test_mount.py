"""The mount helper with real mounts, through the new mount API and through the classic call."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapbroker import mount
from snapbroker.contract import Mount
from snapbroker.errors import (
    BrokerError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unimplemented,
)
from snapbroker.mount import idmap, system, table
from snapbroker.mount.kernel import CLASSIC, Kernel, Layers, running
from snapbroker.mount.plan import IdMapping, escaped, plan, split_layers

if TYPE_CHECKING:
    from collections.abc import Iterator

DESCRIPTORS = Kernel(trees=True, contexts=True, layers=Layers.DESCRIPTOR)
PATHS = Kernel(trees=True, contexts=True, layers=Layers.PATH)
TREES_ONLY = Kernel(trees=True, contexts=False, layers=Layers.STRING)
every_kernel = pytest.mark.parametrize("kernel", [DESCRIPTORS, PATHS, CLASSIC], ids=["descriptors", "paths", "classic"])
MAPS = ("uidmap=0:100000:65536", "gidmap=0:200000:65536")


def points_below(directory: Path) -> list[str]:
    return [entry.point for entry in table.entries() if table.within(entry.point, str(directory))]


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Path]:
    """A directory in which whatever a test leaves mounted is unmounted."""
    yield tmp_path
    for point in reversed(points_below(tmp_path)):
        system.umount(point, system.MNT_DETACH)


@pytest.fixture
def target(ground: Path) -> Path:
    path = ground / "target"
    path.mkdir()
    return path


@pytest.fixture
def source(ground: Path) -> Path:
    path = ground / "source"
    path.mkdir()
    (path / "file").write_text("from the source")
    return path


@pytest.fixture(scope="module")
def btrfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A btrfs on a loop device with the subvolumes `one` and `two`: the device and the mounted top."""
    directory = tmp_path_factory.mktemp("btrfs")
    image, top = directory / "image", directory / "top"
    top.mkdir()
    with image.open("wb") as file:
        file.truncate(256 << 20)
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True)
    with contextlib.ExitStack() as stack:
        device = subprocess.run(
            ["losetup", "-f", "--show", str(image)], check=True, capture_output=True, text=True
        ).stdout.strip()
        stack.callback(subprocess.run, ["losetup", "-d", device], check=True)
        subprocess.run(["mount", device, str(top)], check=True)
        stack.callback(subprocess.run, ["umount", str(top)], check=True)
        for name in ("one", "two"):
            subprocess.run(["btrfs", "subvolume", "create", str(top / name)], check=True, stdout=subprocess.DEVNULL)
            (top / name / "name").write_text(name)
        yield device, top


def subvolume_id(path: Path) -> str:
    shown = subprocess.run(
        ["btrfs", "inspect-internal", "rootid", str(path)], check=True, capture_output=True, text=True
    )
    return shown.stdout.strip()


def overlay(lowers: list[Path], upper: Path | None = None, work: Path | None = None, *options: str) -> Mount:
    layers = [f"lowerdir={':'.join(escaped(str(lower)) for lower in lowers)}"]
    if upper and work:
        layers = [f"workdir={escaped(str(work))}", f"upperdir={escaped(str(upper))}", *layers]
    return Mount("overlay", "overlay", (*layers, *options))


def make(ground: Path, *names: str) -> list[Path]:
    """Directories, each with a file of its own name and a file `same` that holds its name."""
    paths = [ground / name for name in names]
    for path in paths:
        path.mkdir(parents=True)
        (path / "same").write_text(path.name)
    return paths


def assert_read_only(directory: Path) -> None:
    with pytest.raises(OSError, match="Read-only") as raised:
        (directory / "written").write_text("")
    assert raised.value.errno == errno.EROFS


# What is asked for, without a mount.


def test_this_kernel_is_recognised() -> None:
    release = tuple(map(int, os.uname().release.split(".")[:2]))
    expected = Layers.DESCRIPTOR if release >= (6, 13) else Layers.PATH if release >= (6, 7) else Layers.STRING
    assert running() == Kernel(trees=release >= (5, 12), contexts=release >= (5, 2), layers=expected)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (Mount("bind", "/a", ("rbind", "bogus")), Unimplemented, "'bogus' is not known for type 'bind'"),
        (Mount("bind", "/a", ("rbind", "sync")), Unimplemented, "'sync'"),
        (Mount("bind", "/a", ("X-containerd.mkdir.path=/b",)), Unimplemented, "mount manager"),
        (Mount("bind", "/a", ("loop",)), Unimplemented, "mount manager"),
        (Mount("btrfs", "/dev/a", ("lowerdir=/x",)), Unimplemented, "'lowerdir=/x'"),
        (Mount("overlay", "overlay", ("lowerdir=/a:/b", "subvolid=5")), Unimplemented, "'subvolid=5'"),
        (Mount("format/overlay", "overlay", ()), Unimplemented, "'format/overlay'"),
        (Mount("ext4", "/dev/a", ()), Unimplemented, "'ext4'"),
        (Mount("", "/a", ("rbind",)), Unimplemented, "''"),
        (Mount("bind", "a", ("rbind",)), InvalidArgument, "absolute"),
        (Mount("bind", "/a\0b", ("rbind",)), InvalidArgument, "NUL"),
        (Mount("bind", "/a", ("rbind",), "../b"), InvalidArgument, "leads out"),
        (Mount("bind", "/a", ("rbind",), "b/../../c"), InvalidArgument, "leads out"),
        (Mount("overlay", "overlay", ("index=off",)), InvalidArgument, "lowerdir="),
        (Mount("overlay", "overlay", ("lowerdir=/a:b",)), InvalidArgument, "'b' must be an absolute path"),
        (Mount("overlay", "overlay", ("lowerdir=/a::/b",)), InvalidArgument, "''"),
        (Mount("overlay", "overlay", ("lowerdir=/a", "lowerdir=/b")), InvalidArgument, "twice"),
        (Mount("overlay", "overlay", ("lowerdir=/a", "upperdir=/b")), InvalidArgument, "belong together"),
        (Mount("overlay", "overlay", ("lowerdir=/a",)), InvalidArgument, "bind /a read-only instead"),
        (Mount("bind", "/a", ("uidmap=0:1:1",)), InvalidArgument, "belong together"),
        (Mount("bind", "/a", ("uidmap=0:1", "gidmap=0:1:1")), InvalidArgument, "inside:outside:count"),
        (Mount("bind", "/a", ("uidmap=0:-1:1", "gidmap=0:1:1")), InvalidArgument, "inside:outside:count"),
        (Mount("bind", "/a", ("uidmap=0:1:0", "gidmap=0:1:1")), InvalidArgument, "names no id"),
        (Mount("bind", "/a", ("uidmap=0:4294967295:1", "gidmap=0:1:1")), InvalidArgument, "above"),
    ],
)
def test_what_is_not_understood_is_refused(given: Mount, error: type[BrokerError], said: str) -> None:
    with pytest.raises(error) as raised:
        plan(given)
    assert said in raised.value.message


def test_later_options_win() -> None:
    read = plan(Mount("bind", "/a", ("ro", "rw", "nosuid", "suid", "noatime", "relatime", "nodev", "defaults")))
    assert read.attributes.add == system.MOUNT_ATTR_NODEV
    assert read.attributes.atime == 0
    assert read.attributes.remove == system.MOUNT_ATTR_ATIME
    assert read.attributes.writable


@pytest.mark.parametrize("path", ["/a:b", "/a\\b", "/a,b", "/a b", "/a\\", "/\\:,", "/ä\n"])
def test_layers_survive_their_escaping(path: str) -> None:
    assert split_layers(f"{escaped(path)}:{escaped(path)}:/z") == [path, path, "/z"]


# Bind mounts.


@pytest.mark.root
@every_kernel
def test_a_bind_shows_its_source_and_writes_to_it(source: Path, target: Path, kernel: Kernel) -> None:
    mount.all([Mount("bind", str(source), ("rw", "rbind"))], target, kernel=kernel)
    assert (target / "file").read_text() == "from the source"
    (target / "written").write_text("1")
    assert (source / "written").read_text() == "1"
    mount.unmount(target)
    assert not list(target.iterdir())


@pytest.mark.root
@every_kernel
def test_a_read_only_bind_is_read_only_everywhere(source: Path, target: Path, kernel: Kernel) -> None:
    (source / "sub").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nosuid,nodev,noatime", "tmpfs", str(source / "sub")], check=True)
    mount.all([Mount("bind", str(source), ("ro", "rbind"))], target, kernel=kernel)
    assert_read_only(target)
    assert_read_only(target / "sub")
    kept = os.ST_NOSUID | os.ST_NODEV | os.ST_NOATIME
    assert os.statvfs(target / "sub").f_flag & kept == kept
    (source / "file").write_text("the source stays writable")
    (source / "sub" / "file").write_text("as does what is on it")


@pytest.mark.root
@every_kernel
def test_a_bind_without_rbind_leaves_submounts_out(source: Path, target: Path, kernel: Kernel) -> None:
    (source / "sub").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(source / "sub")], check=True)
    (source / "sub" / "inner").write_text("")
    mount.all([Mount("bind", str(source), ("bind",))], target, kernel=kernel)
    assert not list((target / "sub").iterdir())


@pytest.mark.root
@every_kernel
def test_attributes_are_those_asked_for(source: Path, target: Path, kernel: Kernel) -> None:
    options = ("rbind", "nosuid", "nodev", "noexec", "noatime", "nodiratime", "nosymfollow")
    mount.all([Mount("bind", str(source), options)], target, kernel=kernel)
    flags = os.statvfs(target).f_flag
    asked = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME
    assert flags & asked == asked
    assert not flags & os.ST_RDONLY
    (source / "link").symlink_to("file")
    with pytest.raises(OSError, match="symbolic links"):
        (target / "link").read_text()


@pytest.mark.root
@every_kernel
def test_strictatime_replaces_what_the_source_has(source: Path, target: Path, kernel: Kernel) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "noatime", "tmpfs", str(source)], check=True)
    mount.all([Mount("bind", str(source), ("rbind", "strictatime"))], target, kernel=kernel)
    assert not os.statvfs(target).f_flag & (os.ST_NOATIME | os.ST_RELATIME)


@pytest.mark.root
@every_kernel
def test_a_file_is_bound_on_a_file(source: Path, ground: Path, kernel: Kernel) -> None:
    point = ground / "point"
    point.write_text("covered")
    mount.all([Mount("bind", str(source / "file"), ("bind", "ro"))], point, kernel=kernel)
    assert point.read_text() == "from the source"
    with pytest.raises(OSError, match="Read-only"):
        point.write_text("")
    mount.unmount(point)
    assert point.read_text() == "covered"


@pytest.mark.root
@every_kernel
def test_rw_of_a_read_only_source_is_an_error(source: Path, target: Path, kernel: Kernel) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(source)], check=True)
    with pytest.raises(FailedPrecondition, match="read-only mount"):
        mount.all([Mount("bind", str(source), ("rw", "rbind"))], target, kernel=kernel)
    assert not points_below(target)


@pytest.mark.root
@every_kernel
def test_a_mount_on_a_bind_does_not_show_at_its_source(source: Path, target: Path, kernel: Kernel) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(source)], check=True)
    subprocess.run(["mount", "--make-shared", str(source)], check=True)
    (source / "sub").mkdir()
    other = make(source.parent, "other")[0]
    mounts = [
        Mount("bind", str(source), ("rbind", "rw")),
        Mount("bind", str(other), ("rbind", "ro"), target="sub"),
    ]
    mount.all(mounts, target, kernel=kernel)
    assert (target / "sub" / "same").read_text() == "other"
    assert not list((source / "sub").iterdir())


@pytest.mark.root
@every_kernel
def test_a_read_only_bind_is_read_only_before_it_has_its_place(
    source: Path, target: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at in the call that makes it visible: nobody can have written through it before."""
    flags: list[int] = []
    move_mount, classic_mount = system.move_mount, system.mount

    def watched_move(descriptor: int, place: int) -> None:
        flags.append(os.fstatvfs(descriptor).f_flag)
        move_mount(descriptor, place)

    def watched_mount(
        moved: str | None, place: str, fstype: str | None, how: int = 0, data: bytes | None = None
    ) -> None:
        if os.path.realpath(place) == str(target):
            assert how == system.MS_MOVE
            assert moved
            flags.append(os.statvfs(moved).f_flag)
        classic_mount(moved, place, fstype, how, data)

    monkeypatch.setattr(system, "move_mount", watched_move)
    monkeypatch.setattr(system, "mount", watched_mount)
    mount.all([Mount("bind", str(source), ("ro", "rbind"))], target, kernel=kernel)
    assert [bool(flag & os.ST_RDONLY) for flag in flags] == [True]
    assert_read_only(target)


# Overlay.


@pytest.mark.root
@every_kernel
def test_an_overlay_merges_its_layers(ground: Path, target: Path, kernel: Kernel) -> None:
    top, bottom, upper = make(ground, "top", "bottom", "upper")
    (upper / "same").unlink()
    work = ground / "work"
    work.mkdir()
    (bottom / "deep").write_text("deep")
    mount.all([overlay([top, bottom], upper, work, "index=off")], target, kernel=kernel)
    assert (target / "same").read_text() == "top"
    assert (target / "deep").read_text() == "deep"
    (target / "deep").write_text("changed")
    (target / "same").unlink()
    mount.unmount(target)
    assert (bottom / "deep").read_text() == "deep"
    assert (upper / "deep").read_text() == "changed"
    assert (upper / "same").is_char_device()


@pytest.mark.root
@every_kernel
def test_an_overlay_without_an_upper_layer_is_read_only(ground: Path, target: Path, kernel: Kernel) -> None:
    mount.all([overlay(make(ground, "top", "bottom"))], target, kernel=kernel)
    assert (target / "same").read_text() == "top"
    assert_read_only(target)


@pytest.mark.root
@every_kernel
def test_a_read_only_overlay_with_an_upper_layer(ground: Path, target: Path, kernel: Kernel) -> None:
    lower, upper, work = make(ground, "lower", "upper", "work")
    mount.all([overlay([lower], upper, work, "ro", "nosuid")], target, kernel=kernel)
    assert_read_only(target)
    assert os.statvfs(target).f_flag & os.ST_NOSUID


@pytest.mark.root
@every_kernel
def test_names_with_separators_in_them(ground: Path, target: Path, kernel: Kernel) -> None:
    names = ["a:b", "c,d", "e\\f", "g h", "i\\", "j\nk", "ü"]
    lowers = make(ground, *names)
    for lower in lowers:
        (lower / lower.name).write_text("here")
    upper, work = make(ground, "upper ,:\\x", "work ,:\\x")
    (upper / "same").unlink()
    point = ground / "point ,:\\x"
    point.mkdir()
    mount.all([overlay(lowers, upper, work)], point, kernel=kernel)
    assert sorted(os.listdir(point)) == sorted([*names, "same"])
    (point / "written").write_text("1")
    mount.unmount(point)
    assert (upper / "written").read_text() == "1"
    assert not points_below(ground)


@pytest.mark.root
@every_kernel
def test_bind_names_with_separators_in_them(ground: Path, kernel: Kernel) -> None:
    source, point = make(ground, "s ,:\\x", "p ,:\\x")
    mount.all([Mount("bind", str(source), ("rbind", "ro"))], point, kernel=kernel)
    assert (point / "same").read_text() == "s ,:\\x"
    mount.unmount(point)


def chain(directory: Path, count: int) -> list[Path]:
    directory.mkdir(parents=True)
    lowers = [directory / str(number) / "fs" for number in range(count)]
    for number, lower in enumerate(lowers):
        lower.mkdir(parents=True)
        (lower / f"from {number}").write_text(str(number))
    return lowers


@pytest.mark.root
@every_kernel
def test_five_hundred_layers(ground: Path, target: Path, kernel: Kernel) -> None:
    lowers = chain(ground / "io.containerd.snapshotter.v1.overlayfs" / "snapshots", 500)
    upper, work = make(ground, "upper", "work")
    before = Path.cwd()
    mount.all([overlay(lowers, upper, work, "index=off")], target, kernel=kernel)
    assert len(os.listdir(target)) == 501
    assert (target / "from 499").read_text() == "499"
    (target / "from 0").write_text("changed")
    assert Path.cwd() == before
    mount.unmount(target)


@pytest.mark.root
@pytest.mark.parametrize("kernel", [DESCRIPTORS, PATHS], ids=["descriptors", "paths"])
def test_layers_whose_paths_are_longer_than_a_string_may_be(ground: Path, target: Path, kernel: Kernel) -> None:
    long = ground / ("x" * 200) / ("y" * 200)
    lowers = chain(long / "snapshots", 60)
    upper, work = make(long, "upper", "work")
    mount.all([overlay(lowers, upper, work)], target, kernel=kernel)
    assert len(os.listdir(target)) == 61
    assert (target / "from 59").read_text() == "59"


@pytest.mark.root
def test_the_classic_call_says_when_a_chain_is_too_long(ground: Path, target: Path) -> None:
    lowers = chain(ground / "a", 20) + chain(ground / ("b" * 250), 20)
    with pytest.raises(FailedPrecondition, match=r"40 layers need \d+ bytes .* takes 4095"):
        mount.all([overlay(lowers)], target, kernel=CLASSIC)
    assert not points_below(target)


@pytest.mark.root
@every_kernel
def test_an_overlay_that_came_out_read_only_is_an_error(ground: Path, target: Path, kernel: Kernel) -> None:
    lower, upper, work = make(ground, "lower", "upper", "work")
    # overlayfs needs a directory `work` in the work directory, and cannot take away one that is immutable.
    (work / "work").mkdir()
    (work / "work" / "kept").write_text("")
    subprocess.run(["chattr", "+i", str(work / "work"), str(work / "work" / "kept")], check=True)
    try:
        with pytest.raises(FailedPrecondition, match="came out read-only"):
            mount.all([overlay([lower], upper, work)], target, kernel=kernel)
    finally:
        subprocess.run(["chattr", "-R", "-i", str(work)], check=True)
    assert not points_below(target)


@pytest.mark.root
@pytest.mark.parametrize("kernel", [DESCRIPTORS, PATHS], ids=["descriptors", "paths"])
def test_the_kernel_is_quoted_when_it_refuses(ground: Path, target: Path, kernel: Kernel) -> None:
    with pytest.raises(FailedPrecondition) as raised:
        mount.all([overlay(chain(ground / "snapshots", 501))], target, kernel=kernel)
    assert str(target) in raised.value.message
    assert "Invalid argument" in raised.value.message
    assert "overlay: too many lower directories, limit is 500" in raised.value.message
    assert raised.value.details["errno"] == "EINVAL"
    assert len(raised.value.message) < 1000


@pytest.mark.root
@every_kernel
def test_what_the_kernel_refuses_without_a_word(ground: Path, target: Path, kernel: Kernel) -> None:
    lower = make(ground, "lower")[0]
    with pytest.raises(FailedPrecondition, match=r"Too many levels of symbolic links|Invalid argument") as raised:
        mount.all([overlay([lower, lower])], target, kernel=kernel)
    assert str(target) in raised.value.message
    assert not points_below(target)


@pytest.mark.root
@every_kernel
def test_a_missing_layer_is_named(ground: Path, target: Path, kernel: Kernel) -> None:
    lower = make(ground, "lower")[0]
    with pytest.raises(FailedPrecondition, match="No such file"):
        mount.all([overlay([lower, ground / "missing"])], target, kernel=kernel)
    with pytest.raises(FailedPrecondition, match="missing"):
        mount.all([Mount("bind", str(ground / "missing"), ("rbind",))], target, kernel=kernel)


# Id mappings (C111).


@pytest.mark.root
def test_an_idmapped_bind(source: Path, target: Path) -> None:
    os.chown(source / "file", 5, 6)
    mount.all([Mount("bind", str(source), (*MAPS, "rw", "rbind"))], target)
    status = os.stat(target / "file")
    assert (status.st_uid, status.st_gid) == (100005, 200006)


@pytest.mark.root
@pytest.mark.parametrize("kernel", [DESCRIPTORS, PATHS, TREES_ONLY], ids=["descriptors", "paths", "classic"])
def test_an_idmapped_overlay(ground: Path, target: Path, kernel: Kernel) -> None:
    top, bottom = make(ground, "top", "bottom")
    (bottom / "deep").write_text("deep")
    os.chown(bottom / "deep", 5, 6)
    upper, work = ground / "upper", ground / "work"
    upper.mkdir()
    work.mkdir()
    os.chown(upper, 100000, 200000)
    mount.all([overlay([top, bottom], upper, work, *MAPS, "index=off")], target, kernel=kernel)
    assert os.stat(target).st_uid == 100000
    status = os.stat(target / "deep")
    assert (status.st_uid, status.st_gid) == (100005, 200006)
    (target / "deep").write_text("changed")
    mount.unmount(target)
    assert os.stat(upper / "deep").st_uid == 100005
    assert os.stat(bottom / "deep").st_uid == 5
    assert not points_below(ground)


@pytest.mark.root
def test_five_hundred_idmapped_layers(ground: Path, target: Path) -> None:
    lowers = chain(ground / "snapshots", 500)
    mount.all([overlay(lowers, None, None, *MAPS)], target)
    assert os.stat(target / "from 499").st_uid == 100000


@pytest.mark.root
def test_detached_layers_that_the_kernel_refuses_are_attached_in_a_corner(
    ground: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Linux before 6.15, where a detached copy is EINVAL."""
    lowers = make(ground, "top", "bottom")
    real = system.fsconfig_descriptor
    refused: list[int] = []

    def refuse(context: int, key: str, descriptor: int) -> None:
        if key == "lowerdir+":
            refused.append(descriptor)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), key)
        real(context, key, descriptor)

    monkeypatch.setattr(system, "fsconfig_descriptor", refuse)
    monkeypatch.setenv("TMPDIR", str(ground))
    monkeypatch.setattr("tempfile.tempdir", None)
    mount.all([overlay(lowers, None, None, *MAPS)], target, kernel=DESCRIPTORS)
    assert refused
    assert os.stat(target / "same").st_uid == 100000
    assert points_below(ground) == [str(target)]
    assert not list(ground.glob("snapbroker-staging-*"))


@pytest.mark.root
def test_an_id_mapping_of_an_overlay_is_refused_with_a_reason(ground: Path, target: Path) -> None:
    middle = ground / "middle"
    middle.mkdir()
    mount.all([overlay(make(ground, "top", "bottom"))], middle)
    with pytest.raises(FailedPrecondition, match="does not take an id mapping"):
        mount.all([Mount("bind", str(middle), (*MAPS, "rbind"))], target)


@pytest.mark.root
@pytest.mark.parametrize("type_", ["bind", "overlay", "btrfs"])
def test_an_id_mapping_on_an_old_kernel_says_what_is_needed(source: Path, target: Path, type_: str) -> None:
    options = (*MAPS, "lowerdir=/a:/b") if type_ == "overlay" else MAPS
    with pytest.raises(FailedPrecondition, match=r"Linux 5\.1"):
        mount.all([Mount(type_, str(source), options)], target, kernel=CLASSIC)


@pytest.mark.root
def test_user_namespaces_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idmap, "_kept", type(idmap._kept)())
    monkeypatch.setattr(idmap, "NAMESPACES_MAX", 2)
    mappings = [IdMapping(f"0 {100000 + number} 1\n", "0 0 1\n") for number in range(3)]

    def identity(mapping: IdMapping) -> int:
        with idmap.namespace(mapping) as descriptor:
            return os.fstat(descriptor).st_ino

    first = identity(mappings[0])
    assert identity(mappings[0]) == first
    with idmap.namespace(mappings[0]) as held:
        identity(mappings[1])
        identity(mappings[2])
        assert list(idmap._kept) == mappings[1:]
        assert os.fstat(held).st_ino == first
    for descriptor in idmap._kept.values():
        os.close(descriptor)


@pytest.mark.root
def test_user_namespaces_leave_no_child_behind() -> None:
    with idmap.namespace(IdMapping("0 300000 7\n", "0 300000 7\n")):
        children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    names = [Path(f"/proc/{child}/comm").read_text() for child in children]
    assert Path("/proc/self/comm").read_text() not in names


@pytest.mark.root
def test_mapped_mounts_from_many_threads(ground: Path) -> None:
    source = make(ground, "source")[0]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            point = make(ground, f"point {number}")[0]
            for turn in range(10):
                maps = (f"uidmap=0:{1000 * number + turn + 1}:1000", "gidmap=0:0:1000")
                with mount.mounted([Mount("bind", str(source), (*maps, "rbind"))], point) as path:
                    assert os.stat(path / "same").st_uid == 1000 * number + turn + 1
        except BaseException as error:  # handed to the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# btrfs.


@pytest.mark.root
@every_kernel
def test_a_btrfs_subvolume(btrfs: tuple[str, Path], target: Path, kernel: Kernel) -> None:
    device, top = btrfs
    mount.all([Mount("btrfs", device, (f"subvolid={subvolume_id(top / 'two')}",))], target, kernel=kernel)
    assert (target / "name").read_text() == "two"
    (target / "written").write_text("1")
    assert (top / "two" / "written").read_text() == "1"
    mount.unmount(target)


@pytest.mark.root
@every_kernel
def test_a_read_only_btrfs_mount_leaves_the_others_writable(
    btrfs: tuple[str, Path], target: Path, kernel: Kernel
) -> None:
    device, top = btrfs
    options = (f"subvolid={subvolume_id(top / 'one')}", "ro", "noatime")
    mount.all([Mount("btrfs", device, options)], target, kernel=kernel)
    assert_read_only(target)
    (top / "one" / "written").write_text("1")
    mount.unmount(target)


@pytest.mark.root
def test_an_idmapped_btrfs_mount(btrfs: tuple[str, Path], target: Path) -> None:
    device, top = btrfs
    mount.all([Mount("btrfs", device, (f"subvolid={subvolume_id(top / 'one')}", *MAPS))], target)
    assert os.stat(target / "name").st_uid == 100000
    mount.unmount(target)


@pytest.mark.root
@every_kernel
def test_a_subvolume_that_is_not_there(btrfs: tuple[str, Path], target: Path, kernel: Kernel) -> None:
    with pytest.raises(FailedPrecondition, match="No such file"):
        mount.all([Mount("btrfs", btrfs[0], ("subvolid=99999",))], target, kernel=kernel)
    assert not points_below(target)


# Several mounts, targets, failures.


@pytest.mark.root
@every_kernel
def test_mounts_with_targets_below_one_another(ground: Path, target: Path, kernel: Kernel) -> None:
    outer, inner = make(ground, "outer", "inner")
    (outer / "a" / "b").mkdir(parents=True)
    mounts = [
        Mount("bind", str(outer), ("rbind", "rw")),
        Mount("bind", str(inner), ("rbind", "ro"), target="/a/./b"),
    ]
    mount.all(mounts, target, kernel=kernel)
    assert (target / "a" / "b" / "same").read_text() == "inner"
    assert_read_only(target / "a" / "b")
    (target / "written").write_text("")
    mount.unmount(target)
    assert not points_below(ground)


@pytest.mark.root
def test_a_target_is_not_reached_through_a_link(ground: Path, target: Path) -> None:
    outer, inner, victim = make(ground, "outer", "inner", "victim")
    (outer / "link").symlink_to(victim)
    mounts = [Mount("bind", str(outer), ("rbind",)), Mount("bind", str(inner), ("rbind",), target="link")]
    with pytest.raises(FailedPrecondition, match="symbolic link"):
        mount.all(mounts, target)
    assert not points_below(ground)


@pytest.mark.root
@every_kernel
def test_a_failure_takes_back_what_was_mounted(ground: Path, target: Path, kernel: Kernel) -> None:
    outer = make(ground, "outer")[0]
    good = Mount("bind", str(outer), ("rbind",))
    for bad in (
        Mount("bind", str(ground / "missing"), ("rbind",)),
        Mount("bind", str(outer), ("rbind",), target="missing"),
        overlay([outer, outer]),
    ):
        with pytest.raises(FailedPrecondition):
            mount.all([good, good, bad], target, kernel=kernel)
        assert not points_below(ground)


@pytest.mark.root
def test_an_option_not_known_in_the_last_mount_mounts_nothing(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(mount, "_make", lambda *_: calls.append("made"))
    mounts = [Mount("bind", str(source), ("rbind",)), Mount("bind", str(source), ("rbind", "X-containerd.x"))]
    with pytest.raises(Unimplemented):
        mount.all(mounts, target)
    assert not calls


def test_a_missing_target_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="make the directory first"):
        mount.all([Mount("bind", "/", ("rbind",))], tmp_path / "missing")
    with pytest.raises(NotFound, match="missing"):
        mount.unmount(tmp_path / "missing")


@pytest.mark.root
@pytest.mark.parametrize("type_", ["bind", "overlay"])
def test_a_user_without_privileges_is_told_so(ground: Path, type_: str) -> None:
    """In a process of its own, which gives its capabilities away."""
    given = Mount("bind", "/usr", ("rbind",)) if type_ == "bind" else overlay([Path("/usr"), Path("/etc")])
    script = f"""
import ctypes
from snapbroker import errors, mount
from snapbroker.contract import Mount
header, no_capabilities = (0x20080522).to_bytes(4, 'little') + bytes(4), bytes(24)
assert ctypes.CDLL(None).capset(header, no_capabilities) == 0
try:
    mount.all([Mount({given.type!r}, {given.source!r}, {given.options!r})], '/tmp')
except errors.PermissionDenied as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert "needs root" in done.stdout


# Unmounting.


@pytest.mark.root
def test_a_mount_that_is_busy_for_a_moment_is_waited_for(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount.all([Mount("bind", str(source), ("rbind",))], target)
    file = (target / "file").open()
    monkeypatch.setattr("time.sleep", lambda _: file.close())
    mount.unmount(target)
    assert not points_below(target)


@pytest.mark.root
def test_unmount_takes_off_the_topmost_mount_only(ground: Path, target: Path) -> None:
    for path in make(ground, "one", "two"):
        mount.all([Mount("bind", str(path), ("rbind",))], target)
    assert (target / "same").read_text() == "two"
    mount.unmount(target)
    assert (target / "same").read_text() == "one"
    mount.unmount(target)
    with pytest.raises(FailedPrecondition, match=r"is not a mount point: name the directory"):
        mount.unmount(target)


@pytest.mark.root
def test_unmount_of_a_stack_with_mounts_on_it(ground: Path, target: Path) -> None:
    one, two, inner = make(ground, "one", "two", "inner")
    (two / "sub").mkdir()
    mount.all([Mount("bind", str(one), ("rbind",)), Mount("bind", str(two), ("rbind",))], target)
    mount.all([Mount("bind", str(inner), ("rbind",), "sub")] * 2, target)
    with pytest.raises(FailedPrecondition, match="2 mounts lie on it"):
        mount.unmount(target, recursive=False)
    mount.unmount(target)
    assert (target / "same").read_text() == "one"


@pytest.mark.root
def test_unmount_below_a_directory_that_is_no_mount(ground: Path, target: Path) -> None:
    one = make(ground, "one")[0]
    for name in ("a", "b"):
        (target / name).mkdir()
    mount.all([Mount("bind", str(one), ("rbind",), name) for name in ("a", "b")], target)
    with pytest.raises(FailedPrecondition, match="2 lie below"):
        mount.unmount(target, recursive=False)
    mount.unmount(target)
    assert not points_below(ground)


@pytest.mark.root
@pytest.mark.parametrize("recursive", [False, True])
def test_a_busy_mount_names_who_holds_it(source: Path, target: Path, recursive: bool) -> None:
    mount.all([Mount("bind", str(source), ("rbind",))], target)
    holder = subprocess.Popen(["cat"], cwd=target, stdin=subprocess.PIPE)
    try:
        with pytest.raises(FailedPrecondition, match=rf"busy: in use by .*{holder.pid} \(cat\)"):
            mount.unmount(target, recursive=recursive)
        mount.unmount(target, lazy=True)
        assert not points_below(target)
    finally:
        holder.communicate()


def test_the_root_directory_is_not_unmounted() -> None:
    for way in ("/", "/..", "//"):
        with pytest.raises(FailedPrecondition, match="root directory"):
            mount.unmount(way, lazy=True)


# For the length of a block.


@pytest.mark.root
def test_mounted_on_a_directory_of_its_own(source: Path) -> None:
    with mount.mounted([Mount("bind", str(source), ("rbind",))]) as path:
        assert (path / "file").exists()
        assert path.stat().st_ino == source.stat().st_ino
    assert not path.exists()
    assert source.exists()


@pytest.mark.root
def test_mounted_on_a_directory_given(source: Path, target: Path) -> None:
    with mount.mounted([Mount("bind", str(source), ("rbind",))], target) as path:
        assert path == target
        assert (path / "file").exists()
    assert target.exists()
    assert not points_below(target)


@pytest.mark.root
@pytest.mark.parametrize("option", ["volatile", "fsync=volatile"])
def test_mounted_is_never_volatile(ground: Path, option: str) -> None:
    lower, upper, work = make(ground, "lower", "upper", "work")
    for number in range(2):
        with mount.mounted([overlay([lower], upper, work, option)]) as path:
            (path / f"file-{number}").touch()
    assert sorted(os.listdir(upper)) == ["file-0", "file-1", "same"]


@pytest.mark.root
def test_what_was_mounted_volatile_says_so_the_second_time(ground: Path, target: Path) -> None:
    lower, upper, work = make(ground, "lower", "upper", "work")
    mounts = [overlay([lower], upper, work, "volatile")]
    mount.all(mounts, target)
    mount.unmount(target)
    for attempt in (lambda: mount.all(mounts, target), lambda: mount.mounted(mounts).__enter__()):
        with pytest.raises(FailedPrecondition, match="mounted volatile before") as raised:
            attempt()
        assert f"{work}/work/incompat/volatile" in raised.value.message
    assert not os.path.ismount(target)


@pytest.mark.root
def test_mounted_leaves_nothing_after_an_exception(source: Path) -> None:
    seen: list[Path] = []

    def body() -> None:
        with mount.mounted([Mount("bind", str(source), ("rbind",))]) as path, (path / "file").open():
            seen.append(path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        body()
    assert not seen[0].exists()


@pytest.mark.root
def test_mounted_tells_of_a_process_that_goes_on(source: Path) -> None:
    seen: list[Path] = []
    with contextlib.ExitStack() as held:

        def body() -> None:
            with mount.mounted([Mount("bind", str(source), ("rbind",))]) as path:
                seen.append(path)
                held.enter_context((path / "file").open())

        with pytest.raises(FailedPrecondition, match="busy"):
            body()
    assert not seen[0].exists()


def test_mounted_removes_its_directory_when_mounting_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(Unimplemented), mount.mounted([Mount("zfs", "/a")]):
        pass
    assert not list(tmp_path.iterdir())


def test_a_refusal_names_its_kind_for_programs(tmp_path: Path) -> None:
    with pytest.raises(Unimplemented) as raised:
        mount.all([Mount("bind", "/a", ("rbind", "X-containerd.y"))], tmp_path)
    assert raised.value.details == {"option": "X-containerd.y"}


def test_errors_without_a_name_are_internal() -> None:
    error = mount._explained(OSError(errno.EIO, "Input/output error"), "cannot mount", "/x")
    assert error.code == "internal"
    assert isinstance(mount._explained(OSError(errno.EACCES, "no"), "cannot mount", "/x"), PermissionDenied)
