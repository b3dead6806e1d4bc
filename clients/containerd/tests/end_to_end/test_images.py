"""Images are unpacked, run, changed and removed through the broker on every snapshotter, as on containerd's own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import images, scratch
from benchmarks.images import Image
from end_to_end import specimen, trees
from end_to_end.machine import Machine

pytestmark = pytest.mark.root

OWN = "overlayfs"
"""containerd's own snapshotter, which is what the others are compared with."""
CONTAINERS = 20
CHAIN = 128
CHANGES = """
set -e
cat /etc/greeting
echo changed >/etc/greeting
echo added >/etc/added
rm /etc/chmodded
rm -r /deep
mkdir -m 2750 /made
ln /etc/added /made/second
ln -s /etc/added /made/link
chmod 4711 /kinds/old
mv /kinds/large /made/large
rm -r /opaque
mkdir /opaque
echo alone >/opaque/only
"""
"""What a container does to its root filesystem, of every kind that a layer can say."""
CHANGED = {
    "etc/greeting": "changed",
    "etc/added": "added",
    "etc/.wh.chmodded": "",
    ".wh.deep": "",
    "kinds/.wh.large": "",
    "opaque/only": "alone",
}
"""Files that the layer of these changes must have, and the first line of those whose content is known."""

Imported = Callable[[Image, Path], Image]


@pytest.mark.usefixtures("imported")
def test_a_container_runs_and_prints(machine: Machine, snapshotter: str, image: Image) -> None:
    script = "cat /etc/greeting; id -u; cat /kinds/three 2>/dev/null || echo none; stat -c %a%F /kinds/null"
    printed = machine.containerd.run(snapshotter, image.name, "hello", "sh", "-c", script)
    assert printed.splitlines() == ["hello from the image", "0", "none", "666character special file"]


@pytest.mark.usefixtures("imported")
def test_every_layer_is_a_snapshot_under_its_chain_id(machine: Machine, snapshotter: str, image: Image) -> None:
    listed = machine.containerd.snapshots(snapshotter, "ls").splitlines()[1:]
    parents = ["", *image.chain[:-1]]
    expected = [[*filter(None, (name, parent)), "Committed"] for name, parent in zip(image.chain, parents, strict=True)]
    assert sorted(line.split() for line in listed) == sorted(expected)
    in_broker = machine.infos(snapshotter)
    assert {info.name.split("/", 2)[2] for info in in_broker} == set(image.chain)
    assert {info.name.split("/")[0] for info in in_broker} == {machine.containerd.namespace}


@pytest.mark.usefixtures("imported")
def test_the_unpacked_tree_is_that_of_containerds_own(machine: Machine, snapshotter: str, image: Image) -> None:
    machine.containerd.unpack(OWN, image.manifest.digest)
    for snapshot in image.chain:
        with machine.view(snapshotter, snapshot) as ours, machine.view(OWN, snapshot) as theirs:
            assert trees.differences(trees.entries(ours), trees.entries(theirs)) == []


@pytest.mark.usefixtures("imported")
def test_the_unpacked_tree_is_what_the_layers_say(machine: Machine, snapshotter: str, image: Image) -> None:
    with machine.view(snapshotter, image.chain[-1]) as tree:
        found = trees.entries(tree)
    assert {path: found.get(path) and (found[path].kind, found[path].mode) for path in specimen.FACTS} == specimen.FACTS
    assert dict(found["kinds/capable"].xattrs)["security.capability"] == specimen.CAPABILITY.encode()
    assert dict(found["kinds/xattrs"].xattrs)["user.note"] == "a note, żółć".encode()
    assert dict(found["kinds/odd"].xattrs) == {"user.on": b"a directory"}
    assert (found["kinds/odd"].user, found["kinds/odd"].group) == (12, 34)
    assert found["kinds/odd"].changed == int(specimen.ODD_TIME * 1e9)
    assert found["kinds/old"].changed == int(specimen.FIRST_SECOND * 1e9)
    assert found["kinds/far-owner"].user == 2_000_000_000
    assert found["kinds/far-device"].device == (250, 70_000)
    # Written anew by the third layer, removed by the fourth: of three names one is left.
    assert found["kinds/one"].names == ("kinds/one",)
    assert found["kinds/two"].names == ("kinds/two",)


@pytest.mark.usefixtures("imported")
def test_hard_links_within_a_layer_stay_one_file(machine: Machine, snapshotter: str, image: Image) -> None:
    with machine.view(snapshotter, image.chain[1]) as tree:
        assert trees.entries(tree)["kinds/one"].names == ("elsewhere/three", "kinds/one", "kinds/two")


def test_changes_of_a_container_become_an_image(
    machine: Machine, snapshotter: str, image: Image, imported: Imported, tmp_path: Path
) -> None:
    node = machine.containerd
    with machine.container(snapshotter, image.name, "changing", CHANGES) as printed:
        assert printed == "hello from the image\n"
        layer = node.ctr_bytes("snapshots", "--snapshotter", snapshotter, "diff", "changing")
        assert CHANGED.items() <= contents(layer).items()
        derived = image.derived("example.test/derived:1")
        derived.add_packed_layer(layer)
        imported(derived, derived.write(tmp_path / "derived.tar"))
        script = "cat /etc/greeting /made/second /opaque/only; ls / /opaque; stat -c %a /kinds/old /made"
        words = node.run(snapshotter, derived.name, "derived", "sh", "-c", script).split()
        assert words[:3] == ["changed", "added", "alone"]
        assert "deep" not in words
        assert words[-3:] == ["only", "4711", "2750"]
        with (
            machine.mounted(snapshotter, "changing") as active,
            machine.view(snapshotter, derived.chain[-1]) as layered,
        ):
            # A layer has times in seconds, and of the directories above a change none.
            of_container, of_image = (trees.without_times(trees.entries(tree)) for tree in (active, layered))
            assert trees.differences(of_container, of_image) == []


@pytest.mark.usefixtures("imported")
def test_the_layer_of_a_container_is_that_of_containerds_own(machine: Machine, snapshotter: str, image: Image) -> None:
    machine.containerd.unpack(OWN, image.manifest.digest)
    layers = []
    for used in (snapshotter, OWN):
        with machine.container(used, image.name, f"changing-{used}", CHANGES):
            packed = machine.containerd.ctr_bytes("snapshots", "--snapshotter", used, "diff", f"changing-{used}")
            layers.append(contents(packed))
    assert layers[0] == layers[1]


@pytest.mark.usefixtures("imported")
def test_a_container_in_a_user_namespace(machine: Machine, snapshotter: str, image: Image) -> None:
    mapping = ("--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536")
    script = "echo mine >/etc/mine; stat -c '%u %g' /etc/greeting /etc/mine; cat /etc/greeting; cat /proc/self/uid_map"
    # Its layers are copied by containerd itself, with every owner changed, and committed as a layer more.
    options = ("--rm", "--snapshotter", snapshotter, *mapping)
    lines = machine.containerd.ctr("run", *options, image.name, "mapped", "sh", "-c", script).splitlines()
    assert lines[:3] == ["0 0", "0 0", "hello from the image"]
    assert lines[3].split() == ["0", "100000", "65536"]


@pytest.mark.usefixtures("imported")
def test_containers_start_at_once(machine: Machine, snapshotter: str, image: Image) -> None:
    node = machine.containerd
    script = "echo $0 >/tmp/mine; cat /tmp/mine /etc/greeting; ls /tmp"
    running = [
        subprocess.Popen(
            node.command("run", "--rm", "--snapshotter", snapshotter, image.name, name, "sh", "-c", script, name),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in (f"at-once-{number}" for number in range(CONTAINERS))
    ]  # fmt: skip
    printed = [process.communicate(timeout=100) for process in running]
    expected = [(f"at-once-{number}\nhello from the image\nmine\n", "") for number in range(CONTAINERS)]
    assert printed == expected
    assert [process.returncode for process in running] == [0] * CONTAINERS


def test_removing_an_image_leaves_nothing(machine: Machine, snapshotter: str, image: Image, archive: Path) -> None:
    node = machine.containerd
    node.ctr("images", "import", "--snapshotter", snapshotter, archive)
    assert len(machine.infos(snapshotter)) == len(image.chain)
    node.remove_image(image.name)
    # The fixture looks at this after every test; here it is the point, and without a container in between.
    machine.check_empty(snapshotter)


def test_everything_is_in_the_journal(machine: Machine, snapshotter: str, image: Image, archive: Path) -> None:
    node = machine.containerd
    before = machine.sequence(snapshotter)
    node.ctr("images", "import", "--snapshotter", snapshotter, archive)
    node.remove_image(image.name)
    events = machine.events_since(snapshotter, before)
    layers = len(image.chain)
    assert [event.verb for event in events] == ["prepare", "commit"] * layers + ["remove"] * layers + ["cleanup"]
    committed = [event.info.name for event in events if event.verb == "commit" and event.info]
    assert [name.split("/", 2)[2] for name in committed] == image.chain
    # Children before their parents (C100).
    assert [event.key for event in events if event.verb == "remove"] == committed[::-1]
    assert {event.namespace for event in events} == {"containerd"}


@pytest.mark.parametrize("snapshotter", ["snapbroker-overlayfs"], indirect=True)
def test_a_long_chain_mounts_through_containerds_own_code(
    machine: Machine, snapshotter: str, caller: Path, tmp_path: Path
) -> None:
    """More than a page of options, which containerd's mount code shortens (C118): in a Go caller, and in a shim."""
    node = machine.containerd
    image = images.of_tiny_layers("example.test/chain:1", CHAIN)
    node.ctr("images", "import", "--snapshotter", snapshotter, image.write(tmp_path / "chain.tar"))
    try:
        target = tmp_path / "target"
        target.mkdir()
        words = {
            "address": node.socket,
            "namespace": node.namespace,
            "snapshotter": snapshotter,
            "key": "long",
            "parent": image.chain[-1],
            "target": target,
        }
        seen = json.loads(scratch.run([str(caller), *(f"--{word}={value}" for word, value in words.items())]))
        assert seen["layers"] == CHAIN
        assert seen["option_bytes"] > os.sysconf("SC_PAGE_SIZE")
        assert {"layers", "written"} <= set(seen["entries"])
        assert list(target.iterdir()) == []
        printed = node.run(snapshotter, image.name, "chained", "sh", "-c", "ls /layers; cat /layers/*")
    finally:
        node.remove_image(image.name)
    numbers = [str(number) for number in range(2, CHAIN + 1)]
    assert sorted(printed.splitlines()) == sorted([*numbers, *(f"layer {number}" for number in numbers)])
    machine.check_empty(snapshotter)


def contents(layer: bytes) -> dict[str, str]:
    """What a layer has, by path: the first line of small files, and what else there is to say of the others."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        for entry in tar:
            if entry.isreg():
                file = tar.extractfile(entry)
                assert file is not None
                found[entry.name] = file.readline(100).decode(errors="replace").strip() if entry.size < 100 else "large"
            else:
                found[entry.name] = f"{entry.type!r} {entry.mode:o} {entry.linkname}"
    return found
