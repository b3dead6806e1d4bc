"""What the verbs do when they succeed, statement by statement of the contract, on every snapshotter."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from snapbroker import mount
from snapbroker.blocking import Broker
from snapbroker.contract import UPPERDIR_LABEL, Info, Kind, Mount, Usage
from snapbroker.errors import AlreadyExists, BrokerError, FailedPrecondition, InvalidArgument, NotFound
from snapbroker.protocol import (
    REQUEST_VERSION,
    Cleanup,
    Commit,
    MountsAnswer,
    Prepare,
    Remove,
    Request,
    Stat,
    UsageOf,
    Walk,
    encode,
)
from tests.harness import SNAPSHOTTERS, Daemon, Wire

on_disk = pytest.mark.parametrize("snapshotter", ["overlayfs", "native", "btrfs"])
MEBIBYTE = 1 << 20


def names(broker: Broker, *filters: str) -> list[str]:
    return [info.name for info in broker.walk(*filters)]


def committed(broker: Broker, name: str, parent: str = "", **labels: str) -> str:
    """A committed snapshot of that name."""
    broker.prepare(f"making {name}", parent)
    broker.commit(name, f"making {name}", labels=labels)
    return name


def write(mounts: list[Mount], files: dict[str, bytes | None]) -> None:
    """Write files into a snapshot through its mounts, None deletes; all is on disk on return."""
    with mount.mounted(mounts) as path:
        for name, content in files.items():
            if content is None:
                (path / name).unlink()
            else:
                (path / name).parent.mkdir(exist_ok=True)
                (path / name).write_bytes(content)
        flush(path)


def flush(path: Path) -> None:
    """Flush the filesystem of a mount: only then is it known which blocks its files take."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.sync()
    finally:
        os.close(descriptor)


def tree(mounts: list[Mount]) -> dict[str, bytes]:
    """The files of a snapshot as its mounts show them."""
    with mount.mounted(mounts) as path:
        return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


class TestStates:
    """C1-C10."""

    def test_kinds(self, broker: Broker) -> None:
        """C4: prepare, view and commit."""
        broker.prepare("job")
        broker.view("look")
        assert broker.stat("job").kind is Kind.ACTIVE
        assert broker.stat("look").kind is Kind.VIEW
        broker.commit("layer", "job")
        assert broker.stat("layer").kind is Kind.COMMITTED
        with pytest.raises(NotFound):
            broker.stat("job")
        assert names(broker) == ["layer", "look"]

    @pytest.mark.parametrize(("call", "word"), [("a", "active"), ("v", "view"), ("c", "committed")])
    def test_d15_the_words_of_the_kinds(self, broker: Broker, wire: Wire, call: str, word: str) -> None:
        broker.prepare("a")
        broker.view("v")
        committed(broker, "c")
        body = encode(Request(calls=(Stat(key=call),), namespace=broker.namespace))
        wire.send_frames(REQUEST_VERSION, b"1", broker.snapshotter_name.encode(), body)
        (outcome,) = msgspec.msgpack.decode(wire.receive_frames()[3])["outcomes"]
        assert outcome["ok"]["kind"] == word
        assert outcome["ok"]["name"] == call

    def test_c5_no_parent_is_an_empty_parent(self, broker: Broker) -> None:
        broker.prepare("job", "")
        assert broker.stat("job").parent == ""

    def test_c7_a_removed_name_is_free_at_once(self, broker: Broker) -> None:
        for _ in range(3):
            broker.prepare("key")
            broker.remove("key")
            broker.view("key")
            broker.remove("key")
            committed(broker, "key")
            broker.remove("key")
        assert names(broker) == []

    def test_a_committed_key_is_free_at_once(self, broker: Broker) -> None:
        broker.prepare("key")
        broker.commit("layer", "key")
        broker.prepare("key", "layer")
        assert broker.stat("key").parent == "layer"

    def test_d4_a_removed_snapshot_shares_nothing_with_the_next_of_its_name(self, broker: Broker) -> None:
        mounts = []
        for _ in range(4):
            mounts.append(broker.prepare("key"))
            broker.remove("key")
            mounts.append(broker.view("key"))
            broker.remove("key")
        assert len({tuple(answer) for answer in mounts}) == len(mounts)

    def test_a_failed_create_leaves_nothing(self, daemon: Daemon, broker: Broker, snapshotter: str) -> None:
        """C19; the directories made ahead of time for a pool are not of this create."""
        if snapshotter not in ("native", "btrfs"):
            return
        committed(broker, "base")
        broker.cleanup()
        place = daemon.root_of(snapshotter) / "snapshots"
        before = set(os.listdir(place))
        for key, parent in (("fresh", "missing"), ("base", ""), ("base", "base"), ("", "")):
            with pytest.raises(BrokerError):
                broker.prepare(key, parent)
        broker.cleanup()
        assert set(os.listdir(place)) == before

    @pytest.mark.parametrize("snapshotter", ["memory", "overlayfs"])
    def test_c10_the_chain_begins_with_the_immediate_parent(self, broker: Broker, snapshotter: str) -> None:
        ids: list[str] = []
        parent = ""
        for depth in range(6):
            found = identity(broker.prepare(f"job-{depth}", parent), snapshotter)
            assert chain(broker.mounts(f"job-{depth}"), snapshotter) == ids
            ids.insert(0, found)
            parent = f"layer-{depth}"
            broker.commit(parent, f"job-{depth}")
        assert chain(broker.view("look", parent), snapshotter) == ids

    def test_a_chain_is_that_of_what_was_committed_in_the_end(self, broker: Broker, wire: Wire) -> None:
        """An atomic request that failed leaves no trace, not even of the parent it would have given (C33)."""
        committed(broker, "base")
        broker.prepare("job")
        results = wire.call(
            Commit(name="layer", key="job", parent="base"), Prepare(key="child", parent="layer"), Remove(key="missing"),
            atomic=True,
        )  # fmt: skip
        assert all(isinstance(result, BrokerError) for result in results)
        broker.commit("layer", "job")
        assert broker.stat("layer").parent == ""
        mounts = broker.prepare("child", "layer")
        assert broker.mounts("child") == mounts
        broker.prepare("another", "")
        broker.commit("another layer", "another")
        expected = broker.prepare("another child", "another layer")
        assert [len(m.options) for m in mounts] == [len(m.options) for m in expected]
        broker.remove("base")


def identity(mounts: list[Mount], snapshotter: str) -> str:
    """What names the snapshot itself in its mounts."""
    (only,) = mounts
    if snapshotter == "memory" or only.type == "bind":
        return only.source
    (upper,) = [option for option in only.options if option.startswith("upperdir=")]
    return upper.removeprefix("upperdir=")


def chain(mounts: list[Mount], snapshotter: str) -> list[str]:
    """The identities of its parents, the immediate one first."""
    (only,) = mounts
    prefix = "parents=" if snapshotter == "memory" else "lowerdir="
    found = [option.removeprefix(prefix).split(":") for option in only.options if option.startswith(prefix)]
    return found[0] if found else []


class TestNames:
    """C11, D3."""

    @pytest.mark.parametrize(
        "name",
        [
            "a b",
            "a:b",
            "/a/b/",
            "../..",
            ".",
            "牛😀",
            "e\u0301",
            "\x01\x7f\n\t",
            "\ufffd",
            " ",
            "labels.x",
            "n" * 400,
            "n" * 401,
            "n" * 600,
            "n" * 4096,
            "é" * 2048,
            "😀" * 1024,
        ],
        ids=lambda name: ascii(name[:10]) + str(len(name)),
    )
    def test_any_text(self, broker: Broker, name: str) -> None:
        broker.prepare(name)
        assert broker.stat(name).name == name
        assert broker.mounts(name)
        assert names(broker) == [name]
        broker.commit(f"layer of {name}"[:1024], name)
        broker.prepare(name, f"layer of {name}"[:1024])
        assert broker.stat(name).parent == f"layer of {name}"[:1024]
        assert broker.update(name, {"a": "b"}).labels == {"a": "b"}
        broker.remove(name)
        broker.view(name)
        broker.remove(name)
        with pytest.raises(NotFound):
            broker.stat(name)

    def test_a_long_name_as_a_parent(self, broker: Broker) -> None:
        parent = "p" * 4096
        broker.prepare("job")
        broker.commit(parent, "job")
        broker.prepare("child", parent)
        with pytest.raises(FailedPrecondition):
            broker.remove(parent)
        assert broker.stat("child").parent == parent
        broker.remove("child")
        broker.remove(parent)

    def test_names_that_differ_late_are_different(self, broker: Broker) -> None:
        broker.prepare("n" * 4095 + "a")
        broker.prepare("n" * 4095 + "b")
        broker.remove("n" * 4095 + "a")
        assert names(broker) == ["n" * 4095 + "b"]

    def test_namespaces_share_nothing(self, daemon: Daemon, broker: Broker, snapshotter: str) -> None:
        """C79."""
        committed(broker, "base")
        with daemon.client(snapshotter, f"{broker.namespace}-2") as other:
            assert names(other) == []
            with pytest.raises(NotFound):
                other.prepare("job", "base")
            with pytest.raises(NotFound):
                other.remove("base")
            committed(other, "base")
            other.remove("base")
        assert names(broker) == ["base"]

    def test_a_namespace_that_begins_like_another(self, daemon: Daemon, broker: Broker, snapshotter: str) -> None:
        with daemon.client(snapshotter, f"{broker.namespace}.x") as other:
            other.prepare("other")
            broker.prepare("own")
            assert names(broker) == ["own"]
            assert names(other) == ["other"]


class TestTimes:
    """C13, C59: nanoseconds since the epoch, UTC."""

    def test_created_is_updated(self, broker: Broker) -> None:
        begin = time.time_ns()
        broker.prepare("job")
        broker.view("look")
        middle = time.time_ns()
        for key in ("job", "look"):
            info = broker.stat(key)
            assert begin <= info.created == info.updated <= middle
        broker.commit("layer", "job")
        layer = broker.stat("layer")
        assert middle <= layer.created == layer.updated <= time.time_ns()

    def test_update_sets_updated_alone(self, broker: Broker) -> None:
        committed(broker, "layer")
        before = broker.stat("layer")
        begin = time.time_ns()
        after = broker.update("layer", {"a": "b"})
        assert after.created == before.created
        assert begin <= after.updated <= time.time_ns()
        assert broker.stat("layer") == after

    def test_walk_tells_the_same_as_stat(self, broker: Broker) -> None:
        committed(broker, "base", x="y")
        broker.prepare("job", "base", {"a": "b"})
        broker.view("look", "base")
        assert list(broker.walk()) == [broker.stat(name) for name in ("base", "job", "look")]


class TestLabels:
    """C18, C20, C32, C56-C62."""

    def test_stored_as_given_without_the_empty_ones(self, broker: Broker) -> None:
        labels = {"a": "b", "empty": "", "containerd.io/gc.root": "x", "é": "牛", "a.b/c d": "=,\n"}
        stored = {key: value for key, value in labels.items() if value}
        broker.prepare("job", labels=labels)
        broker.view("look", labels=labels)
        assert broker.stat("job").labels == stored
        assert broker.stat("look").labels == stored
        broker.commit("layer", "job", labels=labels)
        assert broker.stat("layer").labels == stored
        assert broker.update("layer", labels).labels == stored

    def test_c32_labels_are_not_inherited(self, broker: Broker) -> None:
        broker.prepare("job", labels={"a": "b"})
        broker.commit("layer", "job", labels={"c": "d"})
        assert broker.stat("layer").labels == {"c": "d"}
        broker.prepare("child", "layer")
        assert broker.stat("child").labels == {}

    def test_c20_the_longest_label_fits(self, broker: Broker) -> None:
        labels = {"k": "v" * 4095, "é" * 1024: "ü" * 1024, "x" * 4095: "y"}
        broker.prepare("job", labels=labels)
        assert broker.stat("job").labels == labels
        assert list(broker.walk()) == [broker.stat("job")]

    def test_as_many_labels_as_there_may_be(self, broker: Broker) -> None:
        labels = {f"label-{number}": "v" * 100 for number in range(1024)}
        broker.prepare("job", labels=labels)
        assert broker.stat("job").labels == labels
        with pytest.raises(InvalidArgument):
            broker.update("job", {"one more": "x"}, ["labels.one more"])
        assert broker.stat("job").labels == labels

    @pytest.mark.parametrize(
        ("paths", "given", "result"),
        [
            pytest.param((), {"b": "2"}, {"b": "2"}, id="C56-all-replaced"),
            pytest.param((), {}, {}, id="C56-none-clears"),
            pytest.param((), {"b": ""}, {}, id="C62-empty"),
            pytest.param(("labels",), {"b": "2"}, {"b": "2"}, id="C57-labels"),
            pytest.param(("labels",), {}, {}, id="C57-labels-clears"),
            pytest.param(("labels.b",), {"b": "2", "c": "3"}, {"a": "1", "x.y/z": "0", "b": "2"}, id="C57-one"),
            pytest.param(("labels.a",), {"a": "9"}, {"a": "9", "x.y/z": "0"}, id="C57-one-again"),
            pytest.param(("labels.a",), {}, {"x.y/z": "0"}, id="C57-absent-is-deleted"),
            pytest.param(("labels.a",), {"a": ""}, {"x.y/z": "0"}, id="C57-empty-is-deleted"),
            pytest.param(("labels.x.y/z",), {"x.y/z": "7"}, {"a": "1", "x.y/z": "7"}, id="C57-dots-and-slashes"),
            pytest.param(("labels.missing",), {}, {"a": "1", "x.y/z": "0"}, id="C57-nothing-to-delete"),
            pytest.param(
                ("labels.a", "labels.b"), {"a": "5", "b": "6"}, {"a": "5", "b": "6", "x.y/z": "0"}, id="C57-two"
            ),
            pytest.param(("labels", "labels.b"), {"b": "6"}, {"b": "6"}, id="C57-all-and-one"),
            pytest.param(
                ("labels.labels.a",), {"labels.a": "8"}, {"a": "1", "x.y/z": "0", "labels.a": "8"}, id="C57-first"
            ),
            pytest.param(('labels."a"',), {'"a"': "8"}, {"a": "1", "x.y/z": "0", '"a"': "8"}, id="C57-no-quoting"),
        ],
    )
    def test_update(
        self, broker: Broker, paths: tuple[str, ...], given: dict[str, str], result: dict[str, str]
    ) -> None:
        """On every kind alike (C60); the answer is the snapshot as it is afterwards (C59)."""
        labels = {"a": "1", "x.y/z": "0"}
        broker.prepare("active", labels=labels)
        broker.view("view", labels=labels)
        committed(broker, "committed", **labels)
        for name in ("active", "view", "committed"):
            before = broker.stat(name)
            after = broker.update(name, given, paths)
            assert after == msgspec.structs.replace(before, labels=result, updated=after.updated)
            assert broker.stat(name) == after


class TestMounts:
    """C21-C25."""

    def test_mounts_are_recovered(self, broker: Broker) -> None:
        """C25: the same as they were answered first, whatever happens meanwhile."""
        committed(broker, "base")
        committed(broker, "top", "base")
        first = {}
        for number, parent in enumerate(("", "base", "top")):
            first[f"job-{number}"] = broker.prepare(f"job-{number}", parent)
            first[f"look-{number}"] = broker.view(f"look-{number}", parent)
        assert {key: broker.mounts(key) for key in first} == first
        committed(broker, "higher", "top")
        broker.update("base", {"a": "b"})
        broker.update("job-1", {"a": "b"})
        assert {key: broker.mounts(key) for key in first} == first

    def test_inside_an_atomic_request_too(self, broker: Broker, wire: Wire) -> None:
        committed(broker, "base")
        prepared, looked = wire.call(Prepare(key="job", parent="base"), Stat(key="job"), atomic=True)
        assert isinstance(prepared, MountsAnswer)
        assert list(prepared.mounts) == broker.mounts("job")
        assert looked == broker.stat("job")

    def test_the_last_mount_says_who_may_write(self, broker: Broker, snapshotter: str) -> None:
        """C98: a writable snapshot is never answered with a mount that looks read-only."""
        committed(broker, "base")
        committed(broker, "top", "base")
        for number, parent in enumerate(("", "base", "top")):
            assert not read_only(broker.prepare(f"job-{number}", parent)[-1])
            assert read_only(broker.view(f"look-{number}", parent)[-1])

    @on_disk
    @pytest.mark.root
    def test_c22_a_view_is_really_read_only(self, broker: Broker) -> None:
        committed(broker, "base")
        committed(broker, "top", "base")
        for number, parent in enumerate(("", "base", "top")):
            mounts = broker.view(f"look-{number}", parent)
            with mount.mounted(mounts) as path, pytest.raises(OSError, match=os.strerror(errno.EROFS)):
                (path / "file").touch()

    @on_disk
    @pytest.mark.root
    def test_c23_a_fresh_root_is_0755(self, broker: Broker) -> None:
        for mounts in (broker.prepare("job"), broker.view("look")):
            with mount.mounted(mounts) as path:
                assert path.stat().st_mode & 0o7777 == 0o755
                assert list(path.iterdir()) == []

    @on_disk
    @pytest.mark.root
    def test_c36_contents(self, broker: Broker) -> None:
        write(broker.prepare("one"), {"kept": b"1", "changed": b"1", "deleted": b"1", "dir/in": b"1"})
        broker.commit("layer-1", "one")
        write(broker.prepare("two", "layer-1"), {"changed": b"2", "deleted": None, "dir/in": None, "added": b"2"})
        broker.commit("layer-2", "two", sync=True)
        assert tree(broker.view("look-1", "layer-1")) == {
            "kept": b"1",
            "changed": b"1",
            "deleted": b"1",
            "dir/in": b"1",
        }
        assert tree(broker.view("look-2", "layer-2")) == {"kept": b"1", "changed": b"2", "added": b"2"}
        assert tree(broker.prepare("three", "layer-2")) == {"kept": b"1", "changed": b"2", "added": b"2"}

    @on_disk
    @pytest.mark.root
    def test_siblings_do_not_see_each_other(self, broker: Broker) -> None:
        write(broker.prepare("one"), {"file": b"base"})
        broker.commit("base", "one")
        write(broker.prepare("left", "base"), {"file": b"left", "left": b""})
        write(broker.prepare("right", "base"), {"file": None, "right": b""})
        assert tree(broker.mounts("left")) == {"file": b"left", "left": b""}
        assert tree(broker.mounts("right")) == {"right": b""}
        assert tree(broker.view("look", "base")) == {"file": b"base"}

    @on_disk
    @pytest.mark.root
    def test_c37_a_commit_needs_no_unmount(self, broker: Broker) -> None:
        with mount.mounted(broker.prepare("job")) as path:
            (path / "file").write_bytes(b"content")
            broker.commit("layer", "job")
        assert tree(broker.view("look", "layer")) == {"file": b"content"}

    @on_disk
    @pytest.mark.root
    def test_c41_a_remove_needs_no_unmount(self, broker: Broker) -> None:
        with mount.mounted(broker.prepare("job")) as path:
            (path / "file").write_bytes(b"content")
            broker.remove("job")
        assert names(broker) == []
        broker.cleanup()

    @on_disk
    @pytest.mark.root
    def test_c34_a_failed_commit_leaves_the_key_usable(self, broker: Broker) -> None:
        committed(broker, "taken")
        write(broker.prepare("job"), {"file": b"content"})
        before = broker.stat("job")
        for name, parent in (("taken", ""), ("job", ""), ("layer", "layer"), ("layer", "missing")):
            with pytest.raises(BrokerError):
                broker.commit(name, "job", parent)
            assert broker.stat("job") == before
            assert tree(broker.mounts("job")) == {"file": b"content"}
        broker.commit("layer", "job")
        assert tree(broker.view("look", "layer")) == {"file": b"content"}


def read_only(last: Mount) -> bool:
    """As containerd's unpacker decides it."""
    if last.type == "overlay":
        return not any(option.startswith("upperdir=") for option in last.options)
    return "ro" in last.options


class TestRebase:
    """C33, D9."""

    def test_the_same_parent_or_none_is_no_rebase(self, broker: Broker) -> None:
        committed(broker, "base")
        broker.prepare("one", "base")
        broker.commit("layer-1", "one", "base")
        broker.prepare("two", "base")
        broker.commit("layer-2", "two")
        assert broker.stat("layer-1").parent == broker.stat("layer-2").parent == "base"

    @pytest.mark.parametrize("snapshotter", ["memory", "overlayfs"])
    def test_a_parent_given_at_commit(self, broker: Broker, snapshotter: str) -> None:
        committed(broker, "base")
        committed(broker, "top", "base")
        broker.prepare("job")
        broker.commit("layer", "job", "top")
        assert broker.stat("layer").parent == "top"
        assert names(broker, "parent==top") == ["layer"]
        with pytest.raises(FailedPrecondition, match="remove"):
            broker.remove("top")
        expected = chain(broker.view("look-at-top", "top"), snapshotter) or [
            # One layer is a bind mount of it.
            broker.mounts("look-at-top")[0].source
        ]
        assert chain(broker.prepare("child", "layer"), snapshotter)[1:] == expected
        for name in ("child", "layer", "look-at-top", "top", "base"):
            broker.remove(name)

    @pytest.mark.root
    @pytest.mark.parametrize("snapshotter", ["overlayfs"])
    def test_the_contents_of_both(self, broker: Broker) -> None:
        write(broker.prepare("one"), {"lower": b"1", "both": b"1"})
        broker.commit("base", "one")
        write(broker.prepare("two"), {"upper": b"2", "both": b"2"})
        broker.commit("layer", "two", "base")
        assert tree(broker.view("look", "layer")) == {"lower": b"1", "upper": b"2", "both": b"2"}


class TestRemove:
    """C39-C43, D6, D13."""

    @pytest.mark.parametrize("kind", list(Kind))
    def test_c40_a_child_of_any_kind(self, broker: Broker, kind: Kind) -> None:
        committed(broker, "base")
        if kind is Kind.VIEW:
            broker.view("child", "base")
        elif kind is Kind.ACTIVE:
            broker.prepare("child", "base")
        else:
            committed(broker, "child", "base")
        with pytest.raises(FailedPrecondition, match="remove"):
            broker.remove("base")
        broker.remove("child")
        broker.remove("base")
        assert names(broker) == []

    def test_every_child_counts(self, broker: Broker) -> None:
        committed(broker, "base")
        for number in range(3):
            broker.prepare(f"job-{number}", "base")
        for number in range(3):
            with pytest.raises(FailedPrecondition):
                broker.remove("base")
            broker.remove(f"job-{number}")
        broker.remove("base")

    def test_a_child_of_the_same_name_as_before(self, broker: Broker) -> None:
        """D6: the index is of ids; the new snapshot has none of the old one's children."""
        committed(broker, "base")
        broker.prepare("job", "base")
        broker.commit("layer", "job")
        broker.remove("layer")
        broker.remove("base")
        committed(broker, "base")
        broker.remove("base")

    @on_disk
    def test_d13_cleanup_waits_until_the_files_are_gone(self, daemon: Daemon, broker: Broker, snapshotter: str) -> None:
        places = []
        for number in range(20):
            mounts = broker.prepare(f"job-{number}")
            if mounts[0].type == "bind":
                places.append(Path(mounts[0].source))
        committed(broker, "base")
        committed(broker, "top", "base")
        for name in ("top", "base", *(f"job-{number}" for number in range(20))):
            broker.remove(name)
        broker.cleanup()
        assert not [place for place in places if place.exists()]
        assert os.listdir(daemon.root_of(snapshotter) / "trash") == []

    def test_d11_an_empty_store(self, broker: Broker, wire: Wire) -> None:
        assert names(broker) == []
        assert names(broker, "kind==active") == []
        broker.cleanup()
        (page,) = wire.pages(Walk())
        assert page.infos == ()
        assert page.next == ""


class TestUsage:
    """C35, C48-C53, D10."""

    def test_c49_a_view_takes_nothing(self, broker: Broker) -> None:
        committed(broker, "base")
        broker.view("look", "base")
        broker.view("bare")
        assert broker.usage("look") == broker.usage("bare") == Usage(0, 0)

    @pytest.mark.parametrize(
        ("snapshotter", "empty", "child"),
        [
            ("memory", Usage(0, 0), Usage(0, 0)),
            # C51: the root directory itself counts, a block on ext4.
            ("overlayfs", Usage(1, 4096), Usage(1, 4096)),
            # D10: an untouched copy added nothing over its parent.
            ("native", Usage(1, 4096), Usage(0, 0)),
            # C52: an untouched subvolume shares everything with its parent.
            ("btrfs", Usage(1, 0), Usage(0, 0)),
        ],
    )
    def test_what_nobody_wrote_to(self, broker: Broker, empty: Usage, child: Usage) -> None:
        broker.prepare("job")
        assert broker.usage("job") == empty
        broker.commit("base", "job")
        assert broker.usage("base") == empty
        broker.prepare("child", "base")
        assert broker.usage("child") == child
        broker.commit("layer", "child")
        assert broker.usage("layer") == child

    @on_disk
    @pytest.mark.root
    @pytest.mark.parametrize("parent", [False, True])
    def test_what_was_written(self, broker: Broker, parent: bool) -> None:
        """Hardlinks count once, holes not at all, and the parent's files only where they were written to (C48, C51)."""
        if parent:
            write(broker.prepare("one"), {"old": os.urandom(MEBIBYTE), "older": os.urandom(MEBIBYTE)})
            broker.commit("base", "one")
        broker.prepare("job", "base" if parent else "")
        empty = broker.usage("job")
        with mount.mounted(broker.mounts("job")) as path:
            (path / "file").write_bytes(os.urandom(MEBIBYTE))
            os.link(path / "file", path / "link")
            with (path / "sparse").open("wb") as file:
                file.truncate(100 * MEBIBYTE)
                file.seek(50 * MEBIBYTE)
                file.write(os.urandom(65536))
            (path / "symlink").symlink_to("file")
            (path / "directory").mkdir()
            flush(path)
        active = broker.usage("job")
        # file, sparse, symlink and directory; where nothing counted before, the root directory was written to as well.
        assert active.inodes - empty.inodes in ((4,) if empty.inodes else (4, 5))
        assert MEBIBYTE + 65536 <= active.size - empty.size < MEBIBYTE + 65536 + 100_000
        broker.commit("layer", "job")
        assert broker.usage("layer") == active

    @on_disk
    @pytest.mark.root
    def test_c50_what_is_committed_was_measured_then(self, broker: Broker) -> None:
        write(broker.prepare("job"), {"file": os.urandom(MEBIBYTE)})
        broker.commit("layer", "job")
        before = broker.usage("layer")
        assert before.size >= MEBIBYTE
        write(broker.prepare("child", "layer"), {"file": None, "another": os.urandom(3 * MEBIBYTE)})
        assert broker.usage("layer") == before
        assert broker.usage("child").size >= 3 * MEBIBYTE

    def test_inside_an_atomic_request(self, broker: Broker, wire: Wire) -> None:
        committed(broker, "base")
        broker.prepare("job", "base")
        results = wire.call(
            UsageOf(key="job"), UsageOf(key="base"), Commit(name="layer", key="job"), UsageOf(key="layer"), atomic=True
        )
        assert results[0] == results[3] == broker.usage("layer")
        assert results[1] == broker.usage("base")


@pytest.fixture(scope="module", params=SNAPSHOTTERS)
def filtered(request: pytest.FixtureRequest, daemon: Daemon) -> Iterator[Broker]:
    """Two layers, a job and a look at them, to be walked over and not changed."""
    with daemon.client(request.param, "filters") as broker:
        committed(broker, "base")
        broker.prepare("in", "base")
        broker.commit("top", "in", labels={"color": "blue", "containerd.io/gc.root": "x"})
        broker.prepare("job", "base", {"color": "red"})
        broker.view("look", "base")
        yield broker


class TestFilters:
    """C63-C68 through the socket: that the whole grammar holds is the business of the filters' own tests."""

    @pytest.mark.parametrize(
        ("filters", "expected"),
        [
            ((), "base job look top"),
            (("",), "base job look top"),
            (("name==job",), "job"),
            (("name!=job",), "base look top"),
            (("name~=o",), "job look top"),
            (("name~=^(job|look)$",), "job look"),
            (("name~=(",), ""),
            (("kind==active",), "job"),
            (("kind==view",), "look"),
            (("kind==committed",), "base top"),
            (("kind==Active",), ""),
            (("parent==base",), "job look top"),
            (('parent==""',), "base"),
            (("labels.color",), "job top"),
            (("labels.color==red",), "job"),
            (("labels.color!=red",), "base look top"),
            (('labels."containerd.io/gc.root"==x',), "top"),
            (("kind==committed,labels.color==blue",), "top"),
            (("kind==committed,labels.color==red",), ""),
            (("kind==view", "labels.color==red"), "job look"),
            (("kind==view", ""), "base job look top"),
            (("bogus",), ""),
            (("bogus!=z",), "base job look top"),
        ],
    )
    def test_walk(self, filtered: Broker, filters: tuple[str, ...], expected: str) -> None:
        assert names(filtered, *filters) == expected.split()


class TestReferences:
    """C93-C96: "do you have this?", asked by a label on prepare."""

    LABEL = "containerd.io/snapshot.ref"

    def ask(self, broker: Broker, key: str, target: str, parent: str = "") -> list[Mount]:
        return broker.prepare(key, parent, {self.LABEL: target})

    def test_what_is_not_there_is_prepared(self, broker: Broker) -> None:
        assert self.ask(broker, "job", "sha256:1")
        assert broker.stat("job").labels == {self.LABEL: "sha256:1"}

    def test_what_has_the_name_is_there(self, broker: Broker) -> None:
        committed(broker, "sha256:1")
        with pytest.raises(AlreadyExists, match="target snapshot"):
            self.ask(broker, "job", "sha256:1")
        assert names(broker) == ["sha256:1"]

    def test_what_carries_the_label_is_there(self, broker: Broker) -> None:
        committed(broker, "base")
        self.ask(broker, "job", "sha256:1", "base")
        broker.commit("layer", "job", labels={self.LABEL: "sha256:1"})
        with pytest.raises(AlreadyExists) as raised:
            self.ask(broker, "again", "sha256:1", "base")
        assert raised.value.details == {"name": "layer"}
        assert names(broker, f'labels."{self.LABEL}"=="sha256:1",parent==base') == ["layer"]
        with pytest.raises(NotFound):
            broker.stat("again")

    def test_on_another_parent_it_is_another_layer(self, broker: Broker) -> None:
        """C95."""
        committed(broker, "base")
        committed(broker, "other")
        self.ask(broker, "job", "sha256:1", "base")
        broker.commit("layer", "job", labels={self.LABEL: "sha256:1"})
        assert self.ask(broker, "again", "sha256:1", "other")

    def test_a_missing_parent_comes_first(self, broker: Broker) -> None:
        """D2."""
        committed(broker, "sha256:1")
        with pytest.raises(NotFound):
            self.ask(broker, "job", "sha256:1", "missing")

    def test_it_follows_updates_and_removes(self, broker: Broker) -> None:
        committed(broker, "layer")
        broker.update("layer", {self.LABEL: "sha256:1"})
        with pytest.raises(AlreadyExists):
            self.ask(broker, "job", "sha256:1")
        broker.update("layer", {self.LABEL: "sha256:2"})
        self.ask(broker, "job", "sha256:1")
        with pytest.raises(AlreadyExists):
            self.ask(broker, "another", "sha256:2")
        broker.remove("layer")
        self.ask(broker, "another", "sha256:2")

    def test_several_carry_it(self, broker: Broker) -> None:
        for name in ("one", "two"):
            broker.prepare("job")
            broker.commit(name, "job", labels={self.LABEL: "sha256:1"})
        broker.remove("one")
        with pytest.raises(AlreadyExists) as raised:
            self.ask(broker, "job", "sha256:1")
        assert raised.value.details == {"name": "two"}

    def test_a_name_is_taken_by_any_kind(self, broker: Broker) -> None:
        """C93: whatever has the name, the layer cannot be made under it."""
        committed(broker, "base")
        committed(broker, "layer on base", "base")
        broker.prepare("active")
        broker.view("view")
        for target in ("active", "view", "layer on base"):
            with pytest.raises(AlreadyExists, match="target snapshot"):
                self.ask(broker, "job", target)

    def test_an_active_snapshot_is_no_answer(self, broker: Broker) -> None:
        self.ask(broker, "job", "sha256:1")
        assert self.ask(broker, "again", "sha256:1")

    def test_namespaces_are_apart(self, daemon: Daemon, broker: Broker, snapshotter: str) -> None:
        committed(broker, "sha256:1")
        with daemon.client(snapshotter, f"{broker.namespace}-2") as other:
            assert self.ask(other, "job", "sha256:1")

    def test_a_view_asks_for_nothing(self, broker: Broker) -> None:
        committed(broker, "sha256:1")
        assert broker.view("look", "", {self.LABEL: "sha256:1"})


class TestUpperdirLabel:
    """C115: the option of overlayfs that shows where the files are."""

    @pytest.mark.root
    def test_every_answer_shows_it_and_no_filter_sees_it(self, start_daemon: Any) -> None:
        daemon = start_daemon({"overlayfs": {"options": {"upperdir_label": True}}})
        with daemon.client("overlayfs") as broker:
            (first,) = broker.prepare("job", labels={"a": "b"})
            expected = {"a": "b", UPPERDIR_LABEL: first.source}
            assert broker.stat("job").labels == expected
            assert [info.labels for info in broker.walk()] == [expected]
            assert broker.update("job", {"a": "b"}).labels == expected
            with broker.batch(atomic=True) as batch:
                stat = batch.stat("job")
                update = batch.update("job", {"a": "b"})
            assert stat.result().labels == update.result().labels == expected
            assert names(broker, f'labels."{UPPERDIR_LABEL}"') == []
            broker.commit("layer", "job")
            assert broker.stat("layer").labels == {UPPERDIR_LABEL: first.source}


def test_cleanup_can_be_repeated(broker: Broker, wire: Wire) -> None:
    broker.prepare("job")
    broker.remove("job")
    for result in wire.call(Cleanup(), Cleanup()):
        assert not isinstance(result, BrokerError)


def test_sync_commit(broker: Broker) -> None:
    """D12: every snapshotter knows the option."""
    committed(broker, "base")
    broker.prepare("job", "base")
    broker.commit("layer", "job", sync=True)
    assert broker.stat("layer") == Info(
        "layer", Kind.COMMITTED, "base", {}, broker.stat("layer").created, broker.stat("layer").updated
    )
