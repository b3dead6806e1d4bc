"""Every command of `ctr snapshots`, on every snapshotter of the broker, with what it prints and what it changes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.node import CommandFailed
from end_to_end.machine import NAMESPACE, Machine, name_in_broker
from snapbroker.contract import Kind

pytestmark = pytest.mark.root

Ctr = Callable[..., str]
"""`ctr snapshots` on the snapshotter of the test; answers what it printed."""


@pytest.fixture
def ctr(machine: Machine, snapshotter: str) -> Iterator[Ctr]:
    """`ctr snapshots` on one snapshotter, and at the end nothing is left of what it made."""
    yield lambda *arguments: machine.containerd.snapshots(snapshotter, *arguments)
    while listed := rows(machine.containerd.snapshots(snapshotter, "ls")):
        parents = {line[1] for line in listed if len(line) == 3}
        leaves = [line[0] for line in listed if line[0] not in parents]
        machine.containerd.snapshots(snapshotter, "rm", *leaves)
    # A removal in containerd is a record less; the snapshotter hears of it from the garbage collector (C78).
    collect(machine)
    machine.check_empty(snapshotter)


@pytest.fixture
def base(machine: Machine, snapshotter: str, ctr: Ctr) -> str:
    """A committed snapshot with a file in it."""
    ctr("prepare", "making")
    with machine.mounted(snapshotter, "making") as tree:
        (tree / "base").write_bytes(b"b" * 100_000)
    ctr("commit", "base", "making")
    return "base"


def test_prepare_answers_a_directory_to_write_to(machine: Machine, snapshotter: str, ctr: Ctr) -> None:
    assert ctr("prepare", "key") == ""
    assert info(ctr, "key")["Kind"] == "Active"
    with machine.mounted(snapshotter, "key") as tree:
        assert list(tree.iterdir()) == []
        assert tree.stat().st_mode & 0o7777 == 0o755
        (tree / "file").write_text("kept")
    with machine.mounted(snapshotter, "key") as tree:
        assert (tree / "file").read_text() == "kept"


def test_prepare_prints_the_same_mounts_as_mounts(machine: Machine, snapshotter: str, ctr: Ctr, base: str) -> None:
    target = str(machine.home / "target")
    printed = ctr("prepare", "--target", target, "key", base)
    assert printed.startswith("mount -t ")
    assert target in printed
    assert ctr("mounts", target, "key") == printed


def test_view_shows_the_parent_and_cannot_be_written_to(
    machine: Machine, snapshotter: str, ctr: Ctr, base: str
) -> None:
    with machine.view(snapshotter, base) as tree:
        assert (tree / "base").stat().st_size == 100_000
        with pytest.raises(OSError, match="Read-only file system"):
            (tree / "file").write_text("refused")
        (view,) = [line for line in rows(ctr("ls")) if line[-1] == "View"]
        assert view[-2:] == [base, "View"]


def test_commit_makes_a_parent(machine: Machine, snapshotter: str, ctr: Ctr, base: str) -> None:
    assert rows(ctr("ls")) == [[base, "Committed"]]
    ctr("prepare", "child", base)
    with machine.mounted(snapshotter, "child") as tree:
        (tree / "base").unlink()
        (tree / "child").write_text("child")
    ctr("commit", "upper", "child")
    ctr("prepare", "grandchild", "upper")
    with machine.mounted(snapshotter, "grandchild") as tree:
        assert [path.name for path in tree.iterdir()] == ["child"]


def test_ls_and_tree(ctr: Ctr, base: str) -> None:
    ctr("prepare", "one", base)
    ctr("commit", "first", "one")
    ctr("prepare", "two", "first")
    ctr("prepare", "alone")
    header, *lines = ctr("ls").splitlines()
    assert header.split() == ["KEY", "PARENT", "KIND"]
    assert sorted(line.split() for line in lines) == [
        ["alone", "Active"],
        ["base", "Committed"],
        ["first", "base", "Committed"],
        ["two", "first", "Active"],
    ]
    assert ctr("tree").splitlines() == [" alone", " base", "  \\_ first", "    \\_ two"]


def test_info(machine: Machine, snapshotter: str, ctr: Ctr, base: str) -> None:
    ctr("prepare", "key", base)
    described = info(ctr, "key")
    assert (described["Name"], described["Parent"], described["Kind"]) == ("key", base, "Active")
    assert described["Created"] == described["Updated"]
    assert described["Created"].endswith("Z")
    (held,) = [record for record in machine.infos(snapshotter) if record.name.endswith("/key")]
    assert held.kind is Kind.ACTIVE
    assert held.parent.endswith(f"/{base}")
    # containerd keeps its own labels to itself; these are not for the snapshotter (C73).
    assert "containerd.io/gc.root" in described["Labels"]
    assert held.labels == {}


def test_label_reaches_the_broker_where_it_is_meant_for_it(
    machine: Machine, snapshotter: str, ctr: Ctr, base: str
) -> None:
    printed = ctr("label", base, "note=kept here", "containerd.io/snapshot/note=for the snapshotter")
    assert {"note=kept here", "containerd.io/snapshot/note=for the snapshotter"} <= set(printed.strip().split(","))
    assert info(ctr, base)["Labels"]["containerd.io/snapshot/note"] == "for the snapshotter"
    (held,) = machine.infos(snapshotter)
    assert held.labels == {"containerd.io/snapshot/note": "for the snapshotter"}
    ctr("label", base, "containerd.io/snapshot/note=")
    assert "containerd.io/snapshot/note" not in info(ctr, base)["Labels"]
    (held,) = machine.infos(snapshotter)
    assert held.labels == {}
    assert info(ctr, base)["Labels"]["note"] == "kept here"


def test_usage_is_the_brokers(machine: Machine, snapshotter: str, ctr: Ctr, base: str) -> None:
    ctr("prepare", "key", base)
    with machine.mounted(snapshotter, "key") as tree:
        (tree / "added").write_bytes(b"a" * 1_000_000)
        with (tree / "added").open("rb+") as file:
            file.flush()
    printed = {name: (int(size), int(inodes)) for name, size, inodes in rows(ctr("usage", "-b"))}
    with machine.daemon.client(name_in_broker(snapshotter), NAMESPACE) as broker:
        held = {record.name.split("/", 2)[2]: broker.usage(record.name) for record in broker.walk()}
    assert printed == {name: (usage.size, usage.inodes) for name, usage in held.items()}
    assert printed[base][0] >= 100_000
    assert 1_000_000 <= printed["key"][0] < 1_100_000
    (line,) = rows(ctr("usage", base))
    assert line[0] == base


def test_diff_is_what_changed(machine: Machine, snapshotter: str, ctr: Ctr, base: str) -> None:
    ctr("prepare", "making", base)
    with machine.mounted(snapshotter, "making") as tree:
        (tree / "base").unlink()
        (tree / "added").write_text("added")
        (tree / "directory").mkdir()
    expected = {".wh.base", "added", "directory"}
    # Of an active one and its parent; of a committed one and its parent; of two that are named.
    assert names_in(machine, snapshotter, "making") == expected
    ctr("commit", "upper", "making")
    assert names_in(machine, snapshotter, "upper") == expected
    assert names_in(machine, snapshotter, base) == {"base"}
    assert names_in(machine, snapshotter, base, "upper") == expected


def test_rm(machine: Machine, snapshotter: str, ctr: Ctr, base: str) -> None:
    ctr("prepare", "key", base)
    refused(ctr, "failed precondition", "rm", base)
    ctr("rm", "key")
    ctr("rm", base)
    assert rows(ctr("ls")) == []
    collect(machine)
    assert machine.infos(snapshotter) == []


def test_a_name_is_free_when_it_was_removed(machine: Machine, snapshotter: str, ctr: Ctr, base: str) -> None:
    ctr("prepare", "key", base)
    ctr("rm", "key")
    ctr("prepare", "key")
    with machine.mounted(snapshotter, "key") as tree:
        assert list(tree.iterdir()) == []


def test_unpack_makes_the_layers_of_an_image(
    machine: Machine, snapshotter: str, ctr: Ctr, image: Any, archive: Any
) -> None:
    machine.containerd.ctr("images", "import", "--no-unpack", archive)
    try:
        assert rows(ctr("ls")) == []
        machine.containerd.unpack(snapshotter, image.manifest.digest)
        assert {line[0] for line in rows(ctr("ls"))} == set(image.chain)
    finally:
        machine.containerd.remove_image(image.name)


def test_what_cannot_be_done_is_refused_with_its_code(ctr: Ctr, base: str) -> None:
    ctr("prepare", "key", base)
    refused(ctr, "already exists", "prepare", "key")
    refused(ctr, "already exists", "view", "key", base)
    refused(ctr, "already exists", "prepare", base)
    refused(ctr, "not found", "prepare", "other", "nobody")
    refused(ctr, "invalid argument", "prepare", "other", "key")
    refused(ctr, "invalid argument", "view", "other", "key")
    refused(ctr, "already exists", "commit", base, "key")
    refused(ctr, "not found", "commit", "other", "nobody")
    refused(ctr, "failed precondition", "commit", "other", base)
    refused(ctr, "failed precondition", "mounts", "/mnt", base)
    for command in ("info", "usage", "rm"):
        refused(ctr, "not found", command, "nobody")
    refused(ctr, "not found", "mounts", "/mnt", "nobody")
    refused(ctr, "not found", "label", "nobody", "a=b")
    assert sorted(line[0] for line in rows(ctr("ls"))) == [base, "key"]


def test_names_of_any_text(machine: Machine, snapshotter: str, ctr: Ctr) -> None:
    names = ["with spaces", "a/path/../of:it", "żółć-文件-😀", 'quotes"and\\more', "n" * 3000]
    for name in names:
        ctr("prepare", name)
    assert {record.name.split("/", 2)[2] for record in machine.infos(snapshotter)} == set(names)
    for name in names:
        assert info(ctr, name)["Name"] == name
        ctr("rm", name)


def test_namespaces_of_containerd_do_not_see_each_other(machine: Machine, snapshotter: str, ctr: Ctr) -> None:
    ctr("prepare", "key")
    other = f"{machine.containerd.namespace}-other"
    listed = machine.containerd.ctr("--namespace", other, "snapshots", "--snapshotter", snapshotter, "ls")
    assert rows(listed) == []
    machine.containerd.ctr("--namespace", other, "snapshots", "--snapshotter", snapshotter, "prepare", "key")
    held = [record.name.split("/") for record in machine.infos(snapshotter)]
    assert {(name[0], name[2]) for name in held} == {(machine.containerd.namespace, "key"), (other, "key")}
    machine.containerd.ctr("--namespace", other, "snapshots", "--snapshotter", snapshotter, "rm", "key")


def rows(printed: str) -> list[list[str]]:
    """The lines of a table without its header, in columns."""
    return [line.split() for line in printed.splitlines()[1:]]


def info(ctr: Ctr, name: str) -> dict[str, Any]:
    """What `ctr snapshots info` says."""
    return dict(json.loads(ctr("info", name)))


def refused(ctr: Ctr, code: str, *arguments: str) -> None:
    """The command must fail with this code."""
    with pytest.raises(CommandFailed, match=f": {code}$"):
        ctr(*arguments)


def names_in(machine: Machine, snapshotter: str, *snapshots: str) -> set[str]:
    """The names in the layer that `ctr snapshots diff` writes."""
    layer = machine.containerd.ctr_bytes("snapshots", "--snapshotter", snapshotter, "diff", *snapshots)
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        return {name.rstrip("/") for name in tar.getnames()}


def collect(machine: Machine) -> None:
    """Have containerd collect its garbage, and wait for it: removing anything with --sync does that."""
    machine.containerd.ctr("leases", "create", "--id", "collected")
    machine.containerd.ctr("leases", "rm", "--sync", "collected")
