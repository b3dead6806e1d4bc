import contextlib
import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from backends import overlayfs_probe, syscalls
from backends.api import ONLY_REMAP_IDS, REBASE, REMAP_IDS, Pooled, Snapshot, Task
from backends.cache import ENTRY_BYTES
from backends.overlayfs import LAYERS_MAX, Overlayfs, OverlayfsOptions, host_root
from backends.testsuite import BackendSuite, Look, commit, contents, create, empty_trash, mode
from snapbroker.contract import GIDMAPPING_LABEL, UIDMAPPING_LABEL, UPPERDIR_LABEL, Kind, Mount
from snapbroker.errors import FailedPrecondition, InvalidArgument

pytestmark = pytest.mark.root

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def opened(tmp_path):
    """Called with options, opens a backend at a root of its own."""
    with contextlib.ExitStack() as stack:

        def make(root=None, **options):
            backend = Overlayfs.open(root or tmp_path / "root", OverlayfsOptions(**options))
            stack.callback(backend.close)
            return backend

        yield make


class TestOverlayfs(BackendSuite):
    renames_directories = False

    @pytest.fixture
    def backend(self, opened):
        return opened()


class TestOverlayfsVolatile(BackendSuite):
    """Every promise but a second mount of the same upper directory, which `volatile` refuses (C119)."""

    renames_directories = False

    @pytest.fixture
    def backend(self, opened):
        return opened(mount_options=("volatile",))

    @pytest.fixture
    def look(self, backend, tmp_path):
        class Forgiving(Look):
            def attach(self, mounts, target):
                for mark in self.backend.root.glob("snapshots/*/work/work/incompat/volatile"):
                    shutil.rmtree(mark)
                super().attach(mounts, target)

        look = Forgiving(backend, tmp_path / "mounts")
        yield look
        look.close()


@pytest.mark.parametrize("kind", ["ext4", "ext4-nojournal", "xfs", "btrfs"])
def test_contents_and_trash_on_every_filesystem(kind, filesystem, opened, tmp_path):
    backend = opened(filesystem(kind) / "root")
    look = Look(backend, tmp_path / "mounts")
    try:
        backend.stock([1, 2], Task())
        with look(Snapshot(1, Kind.ACTIVE)) as root:
            (root / "file").write_text("text")
        assert backend.commit(Snapshot(1, Kind.ACTIVE), sync=True, task=Task()).inodes == 2
        with look(Snapshot(2, Kind.ACTIVE, (1,))) as root:
            assert contents(root) == {"file": "text"}
            (root / "file").unlink()
        backend.discard(2)
        empty_trash(backend)
        assert list(backend.ids()) == [1]
        assert list(backend.discarded()) == []
    finally:
        look.close()


def test_layout(opened):
    backend = opened()
    create(backend, 1)
    create(backend, 2, Kind.VIEW, (1,))
    root = backend.root
    modes = {str(path.relative_to(root)): mode(path) for path in root.rglob("*")}
    assert modes == {
        "snapshots": 0o700,
        "trash": 0o700,
        "snapshots/1": 0o700,
        "snapshots/1/fs": 0o755,
        "snapshots/1/work": 0o711,
        "snapshots/2": 0o700,
        "snapshots/2/fs": 0o755,
    }


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_modes_whatever_the_umask(opened, umask):
    backend = opened()
    before = os.umask(umask)
    try:
        backend.stock([1, 2, 3], Task())
    finally:
        os.umask(before)
    for id_ in (1, 2, 3):
        directory = backend.root / f"snapshots/{id_}"
        assert [mode(directory / name) for name in (".", "fs", "work")] == [0o700, 0o755, 0o711]


@pytest.mark.parametrize("above", ["snapshots", "snapshots/1"])
def test_modes_and_owners_whatever_is_above(opened, above):
    """A default ACL, or a set-group-id bit that gives a directory's group to what is made in it."""
    backend = opened()
    backend.stock([1], Task())
    subprocess.run(["setfacl", "-d", "-m", "o::---,g::---", backend.root / above], check=True)
    os.chown(backend.root / above, -1, 1234)
    os.chmod(backend.root / above, 0o2700)
    backend.stock([2, 3, 4], Task())
    for id_ in (2, 3, 4):
        directory = backend.root / f"snapshots/{id_}"
        assert [mode(directory / name) for name in (".", "fs", "work")] == [0o700, 0o755, 0o711]
        assert (directory / "fs").stat().st_gid == os.getegid()


class TestMounts:
    @pytest.fixture
    def backend(self, opened):
        return opened()

    @pytest.fixture
    def prefix(self, backend):
        return f"{backend.root}/snapshots"

    def test_without_parent_it_is_a_bind_mount(self, backend, prefix):
        for kind, access in ((Kind.ACTIVE, "rw"), (Kind.VIEW, "ro")):
            assert backend.mounts(Snapshot(5, kind)) == (Mount("bind", f"{prefix}/5/fs", (access, "rbind")),)

    def test_a_view_of_one_parent_binds_it(self, backend, prefix):
        assert backend.mounts(Snapshot(5, Kind.VIEW, (3,))) == (Mount("bind", f"{prefix}/3/fs", ("ro", "rbind")),)

    def test_a_view_of_several_has_no_upper(self, backend, prefix):
        (mount,) = backend.mounts(Snapshot(5, Kind.VIEW, (3, 1)))
        assert mount == Mount("overlay", "overlay", (f"lowerdir={prefix}/3/fs:{prefix}/1/fs", "index=off"))

    def test_an_active_one_has_all_of_it_in_order(self, backend, prefix):
        (mount,) = backend.mounts(Snapshot(5, Kind.ACTIVE, (3, 1)))
        assert mount.options == (
            f"workdir={prefix}/5/work",
            f"upperdir={prefix}/5/fs",
            f"lowerdir={prefix}/3/fs:{prefix}/1/fs",
            "index=off",
        )

    def test_configured_options_come_before_those_found(self, opened, tmp_path):
        backend = opened(tmp_path / "other", mount_options=("volatile", "xino=off", "noatime"))
        for kind in (Kind.ACTIVE, Kind.VIEW):
            (mount,) = backend.mounts(Snapshot(5, kind, (3, 1)))
            assert mount.options[-4:] == ("volatile", "xino=off", "noatime", "index=off")
        (bind,) = backend.mounts(Snapshot(5, Kind.ACTIVE))
        assert bind.options == ("rw", "rbind")

    def test_a_configured_index_is_not_overruled(self, opened, tmp_path):
        backend = opened(tmp_path / "other", mount_options=("index=on",))
        (mount,) = backend.mounts(Snapshot(5, Kind.VIEW, (3, 1)))
        assert [option for option in mount.options if option.startswith("index")] == ["index=on"]

    def test_mappings_come_first_on_binds_too(self, backend):
        labels = {UIDMAPPING_LABEL: "0:1000:65536", GIDMAPPING_LABEL: "0:2000:65536"}
        for parents in ((), (3,), (3, 1)):
            for kind in (Kind.ACTIVE, Kind.VIEW):
                (mount,) = backend.mounts(Snapshot(5, kind, parents, labels))
                assert mount.options[:2] == ("uidmap=0:1000:65536", "gidmap=0:2000:65536")

    def test_mappings_stay_out_when_switched_off(self, opened, tmp_path):
        backend = opened(tmp_path / "other", remap_ids=False)
        labels = {UIDMAPPING_LABEL: "0:1000:65536"}
        assert backend.mounts(Snapshot(5, Kind.ACTIVE, (), labels))[0].options == ("rw", "rbind")

    def test_a_mapping_cannot_smuggle_options(self, backend):
        labels = {UIDMAPPING_LABEL: "0:1000:65536,upperdir=/etc"}
        with pytest.raises(InvalidArgument):
            backend.mounts(Snapshot(5, Kind.ACTIVE, (3,), labels))

    def test_a_parent_with_another_chain_is_not_confused(self, backend, prefix):
        backend.mounts(Snapshot(5, Kind.VIEW, (3, 1)))
        (mount,) = backend.mounts(Snapshot(6, Kind.VIEW, (3, 2)))
        assert mount.options[0] == f"lowerdir={prefix}/3/fs:{prefix}/2/fs"

    def test_the_memory_for_chains_is_bounded(self, backend, monkeypatch):
        kept = backend._lowers._options
        monkeypatch.setattr(kept, "bytes_max", 1000)
        expected = {}
        for id_ in range(1, 200):
            expected[id_] = backend.mounts(Snapshot(1000, Kind.VIEW, (id_, id_ + 1)))
        options = sum(len(option) for _, option in kept._entries.values())
        assert options + len(kept) * (ENTRY_BYTES + 2 * 8) == kept.bytes <= 1000
        assert len(kept) > 1
        for id_, mounts in expected.items():
            assert backend.mounts(Snapshot(1000, Kind.VIEW, (id_, id_ + 1))) == mounts


class TestOwners:
    @pytest.fixture
    def backend(self, opened):
        return opened()

    def owner(self, backend, id_):
        status = (backend.root / f"snapshots/{id_}/fs").stat()
        return status.st_uid, status.st_gid

    def make(self, backend, id_, labels, parents=()):
        snapshot = Snapshot(id_, Kind.ACTIVE, parents, labels)
        assert not backend.fits(snapshot)
        backend.create(snapshot, Task())
        return self.owner(backend, id_)

    def test_container_root_owns_it(self, backend):
        labels = {UIDMAPPING_LABEL: "0:1000:65536", GIDMAPPING_LABEL: "5:9:1,0:2000:5"}
        assert self.make(backend, 1, labels) == (1000, 2000)

    def test_one_mapping_is_enough_and_the_parent_gives_the_other(self, backend):
        assert self.make(backend, 1, {UIDMAPPING_LABEL: "0:1000:1"}) == (1000, os.getegid())
        commit(backend, Snapshot(1, Kind.ACTIVE))
        assert self.make(backend, 2, {GIDMAPPING_LABEL: "0:7:1"}, (1,)) == (1000, 7)

    def test_the_mapping_counts_also_without_idmapped_mounts(self, opened, tmp_path):
        backend = opened(tmp_path / "other", remap_ids=False)
        assert self.make(backend, 1, {UIDMAPPING_LABEL: "0:1000:1"}) == (1000, os.getegid())

    def test_the_parent_s_owner_is_taken_but_not_its_mode(self, backend):
        create(backend, 1)
        os.chown(backend.root / "snapshots/1/fs", 31, 32)
        os.chmod(backend.root / "snapshots/1/fs", 0o710)
        commit(backend, Snapshot(1, Kind.ACTIVE))
        assert self.make(backend, 2, {}, (1,)) == (31, 32)
        assert mode(backend.root / "snapshots/2/fs") == 0o755

    @pytest.mark.parametrize(
        "mapping",
        [
            *("", "0", "0:1", "0:1:2:3", "0:1:1,", "a:b:c", "\u0660:1:1"),
            *("1:1000:5", "0:-1:5", "-1:0:5", "0:1000:0"),
            *("0:4294967295:1", "0:0:4294967296", "99999999999999999999:0:1,0:0:1"),
        ],
    )
    def test_bad_mappings_make_nothing(self, backend, mapping):
        with pytest.raises(InvalidArgument):
            host_root(mapping)
        if not mapping:
            return
        snapshot = Snapshot(1, Kind.ACTIVE, (), {UIDMAPPING_LABEL: mapping})
        assert not backend.fits(snapshot)
        with pytest.raises(InvalidArgument):
            backend.create(snapshot, Task())
        assert list(backend.ids()) == []

    def test_stock_serves_active_snapshots_of_our_own_owner_only(self, backend):
        assert isinstance(backend, Pooled)
        create(backend, 1)
        assert backend.fits(Snapshot(2, Kind.ACTIVE, (1,)))
        assert backend.fits(Snapshot(2, Kind.ACTIVE, (), {"unrelated": "label"}))
        assert not backend.fits(Snapshot(2, Kind.VIEW))
        assert not backend.fits(Snapshot(2, Kind.VIEW, (1,)))
        assert not backend.fits(Snapshot(2, Kind.ACTIVE, (77,)))


class TestProbe:
    def test_capabilities(self, opened, tmp_path):
        assert opened().capabilities == {REMAP_IDS, ONLY_REMAP_IDS, REBASE}
        assert opened(tmp_path / "slow", slow_chown=True).capabilities == {REMAP_IDS, REBASE}
        assert opened(tmp_path / "plain", remap_ids=False).capabilities == {ONLY_REMAP_IDS, REBASE}

    def test_it_leaves_nothing_and_mounts_nothing(self, tmp_path):
        support = Overlayfs.probe(tmp_path / "not/there", OverlayfsOptions())
        assert support.ok
        assert os.listdir(tmp_path) == []
        # Other tests mount and unmount meanwhile, elsewhere.
        assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()

    def test_a_bad_option_is_named_with_the_kernel_s_words(self, tmp_path):
        options = OverlayfsOptions(mount_options=("volatile", "metacopy=perhaps", "nonsense", "upperdir=/x", "ro"))
        support = Overlayfs.probe(tmp_path, options)
        assert [line.split(":")[0] for line in support.missing] == [
            "mount option 'metacopy=perhaps'",
            "mount option 'nonsense'",
            "mount option 'upperdir=/x'",
            "mount option 'ro'",
        ]
        with pytest.raises(FailedPrecondition, match="nonsense"):
            Overlayfs.open(tmp_path / "root", options)

    @pytest.mark.parametrize("name", ["a:b", "a,b", "a\\b", "a\nb"])
    def test_a_root_that_options_cannot_carry_is_refused(self, tmp_path, name):
        assert not Overlayfs.probe(tmp_path / name, OverlayfsOptions()).ok
        with pytest.raises(FailedPrecondition, match="path must not contain"):
            Overlayfs.open(tmp_path / name, OverlayfsOptions())
        assert not (tmp_path / name).exists()

    def test_a_filesystem_that_cannot_be_written_to_is_named(self):
        support = Overlayfs.probe(Path("/proc/snapbroker"), OverlayfsOptions())
        assert len(support.missing) == 1
        assert support.missing[0].startswith("/proc: cannot be written to")

    def test_a_filesystem_that_cannot_hold_an_upper_is_refused(self, opened, tmp_path):
        backend = opened()
        look = Look(backend, tmp_path / "mounts")
        create(backend, 1)
        try:
            with look(create(backend, 2, Kind.ACTIVE, (1,))) as merged:
                (missing,) = Overlayfs.probe(merged, OverlayfsOptions()).missing
                assert "cannot be mounted" in missing
        finally:
            look.close()

    def test_missing_entry_types_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            overlayfs_probe, "entry_types", lambda fd: dict.fromkeys(syscalls.entry_types(fd), syscalls.DT_UNKNOWN)
        )
        (missing,) = Overlayfs.probe(tmp_path, OverlayfsOptions()).missing
        assert "d_type" in missing

    def test_in_a_user_namespace_marks_are_the_user_s(self, tmp_path):
        script = (
            "import sys\nfrom pathlib import Path\nfrom backends.overlayfs import Overlayfs, OverlayfsOptions\n"
            "backend = Overlayfs.open(Path(sys.argv[1]), OverlayfsOptions())\n"
            "print(backend._suffix_options, sorted(backend.capabilities))"
        )
        command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", script, tmp_path / "root"]
        answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
        assert answer.strip() == "('userxattr', 'index=off') ['only-remap-ids']"


def test_the_upperdir_label(opened, tmp_path):
    assert opened().labels(Snapshot(4, Kind.ACTIVE)) == {}
    backend = opened(tmp_path / "labelled", upperdir_label=True)
    assert backend.labels(Snapshot(4, Kind.ACTIVE)) == {UPPERDIR_LABEL: f"{backend.root}/snapshots/4/fs"}


def test_missing_directories_are_not_whole(opened):
    backend = opened()
    active = create(backend, 1)
    (backend.root / "snapshots/1/work").rmdir()
    assert not backend.whole(active)
    assert backend.whole(Snapshot(1, Kind.COMMITTED))
    (backend.root / "snapshots/1/fs").rmdir()
    os.symlink("/", backend.root / "snapshots/1/fs")
    assert not backend.whole(Snapshot(1, Kind.COMMITTED))


def test_nothing_is_deleted_through_a_mount(opened, mounted):
    backend = opened()
    create(backend, 1)
    inside = backend.root / "snapshots/1/fs/inside"
    inside.mkdir()
    mounted(inside)
    (inside / "precious").write_text("text")
    backend.discard(1)
    (token,) = backend.discarded()
    with pytest.raises(OSError, match="still mounted") as caught:
        backend.delete(token, Task())
    assert caught.value.errno == errno.EBUSY
    assert caught.value.filename == "1/fs/inside"
    moved = backend.root / "trash/1/fs/inside"
    assert (moved / "precious").read_text() == "text"
    syscalls.unmount(moved)
    backend.delete(token, Task())
    assert list(backend.discarded()) == []


def test_a_snapshot_removed_while_mounted_is_deleted_underneath(opened, tmp_path):
    backend = opened()
    look = Look(backend, tmp_path / "mounts")
    commit(backend, create(backend, 1))
    try:
        with look(create(backend, 2, Kind.ACTIVE, (1,))) as root:
            (root / "file").write_text("text")
            backend.discard(2)
            assert (root / "file").read_text() == "text"
            empty_trash(backend)
            assert list(backend.discarded()) == []
    finally:
        look.close()


def test_a_chain_of_500_layers_mounts(opened, tmp_path):
    backend = opened()
    look = Look(backend, tmp_path / "mounts")
    backend.stock(range(1, LAYERS_MAX + 2), Task())
    for id_ in range(1, LAYERS_MAX + 1):
        (backend.root / f"snapshots/{id_}/fs/{id_}").write_text(str(id_))
        (backend.root / f"snapshots/{id_}/fs/newest").write_text(str(id_))
    parents = tuple(range(LAYERS_MAX, 0, -1))
    active = Snapshot(LAYERS_MAX + 1, Kind.ACTIVE, parents)
    assert backend.fits(active)
    try:
        with look(active) as root:
            assert len(os.listdir(root)) == LAYERS_MAX + 1
            assert contents(root, "1", "250", "500", "newest") == {
                "1": "1",
                "250": "250",
                "500": "500",
                "newest": "500",
            }
            (root / "1").write_text("changed")
            (root / "250").unlink()
        assert (backend.root / "snapshots/1/fs/1").read_text() == "1"
        view = create(backend, LAYERS_MAX + 2, Kind.VIEW, parents)
        with look(view) as root:
            assert len(os.listdir(root)) == LAYERS_MAX + 1
    finally:
        look.close()
    too_deep = Snapshot(LAYERS_MAX + 3, Kind.ACTIVE, (LAYERS_MAX + 1, *parents))
    assert not backend.fits(too_deep)
    with pytest.raises(FailedPrecondition, match="deeper"):
        backend.create(too_deep, Task())
    assert backend.layers_max == LAYERS_MAX


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_what_was_made_survives_a_power_cut(kind, disk, opened):
    disk = disk(kind)
    backend = opened(disk.root / "root")
    stopped = threading.Event()

    def disturb():
        # Commits that fall between one directory and the next are what a flush could miss.
        fd = os.open(disk.root, os.O_RDONLY)
        while not stopped.is_set():
            syscalls.syncfs(fd)
        os.close(fd)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        for first in range(1, 1200, 300):
            ids = range(first, first + 256)
            backend.stock(ids, Task())
            backend.create(Snapshot(first + 256, Kind.ACTIVE, (first,), {UIDMAPPING_LABEL: "0:1000:1"}), Task())
            with disk.after_power_cut() as root:
                for id_ in (*ids, first + 256):
                    directory = root / f"root/snapshots/{id_}"
                    assert [mode(directory / name) for name in (".", "fs", "work")] == [0o700, 0o755, 0o711]
                assert (directory / "fs").stat().st_uid == 1000
    finally:
        stopped.set()
        disturber.join()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("options", [(), ("volatile",)])
def test_a_synced_commit_survives_a_power_cut(kind, options, disk, opened, tmp_path):
    disk = disk(kind)
    backend = opened(disk.root / "root", mount_options=options)
    look = Look(backend, tmp_path / "mounts")
    commit(backend, create(backend, 1))
    try:
        with look(create(backend, 2, Kind.ACTIVE, (1,))) as root:
            (root / "file").write_bytes(b"x" * 100_000)
            backend.commit(Snapshot(2, Kind.ACTIVE, (1,)), sync=True, task=Task())
            with disk.after_power_cut() as cut:
                assert (cut / "root/snapshots/2/fs/file").read_bytes() == b"x" * 100_000
    finally:
        look.close()
