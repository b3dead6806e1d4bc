"""What the processes of a broker may do: read from the kernel, and tried with files that need every privilege left."""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backends import registry
from broker import privileges
from snapbroker.blocking import Broker
from snapbroker.mount import mounted
from tests.daemon import support
from tests.harness import Daemon

DISK = ("overlayfs", "native", "btrfs")


@pytest.fixture(scope="module")
def own(btrfs: Path) -> Iterator[Daemon]:
    """A daemon with the three backends on disk."""
    with Daemon({"overlayfs": {}, "native": {}, "btrfs": {"root": str(btrfs / "privileges")}}) as daemon:
        yield daemon


def threads(pid: int) -> list[dict[str, str]]:
    """The status of every thread of a process."""
    texts = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return [dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line) for text in texts]


def names(mask: str) -> set[str]:
    """The capabilities in a mask of the kernel's."""
    value = int(mask, 16)
    return {name for number, name in enumerate(privileges.NAMES) if value >> number & 1}


def test_the_numbers_are_the_kernels() -> None:
    header = Path("/usr/include/linux/capability.h")
    if header.exists():
        numbers = dict(re.findall(r"^#define CAP_(\w+)\s+(\d+)$", header.read_text(), re.MULTILINE))
        numbers.pop("LAST_CAP", None)
        assert {name.lower(): int(number) for name, number in numbers.items()} == {
            name: number for number, name in enumerate(privileges.NAMES)
        }
    assert int(Path("/proc/sys/kernel/cap_last_cap").read_text()) == len(privileges.NAMES) - 1


@pytest.mark.root
@pytest.mark.parametrize("name", DISK)
def test_an_actor_has_what_its_backend_names(name: str, own: Daemon) -> None:
    wanted = set(privileges.kept_by(registry.load(name)))
    support.make_base(own, name, f"base-{name}")
    with own.client(name) as broker:
        # Large enough for a child process of native's to build it.
        directory = support.directory_of(own, name, broker.prepare("large"))
        support.make_tree(directory, 600, 100)
        broker.commit("large-base", "large")
        for number in range(3):
            broker.prepare(f"child-{number}", "large-base")
    family = [process for title, process in own.forked().items() if title.split(", ")[0] == name]
    if name != "btrfs":
        assert len(family) > 1, "no child process to look at"
    for process in family:
        for thread in threads(process.pid):
            for kind in ("CapPrm", "CapEff", "CapBnd"):
                assert names(thread[kind]) == wanted, (process, kind)
            assert names(thread["CapAmb"]) == names(thread["CapInh"]) == set()
            assert thread["NoNewPrivs"] == "1"


@pytest.mark.root
def test_the_broker_and_its_fork_server_have_none_in_force(own: Daemon) -> None:
    union = set().union(*(privileges.kept_by(registry.load(name)) for name in DISK))
    found = threads(own.pid)
    assert len(found) >= 3, "its own and libzmq's"
    for thread in [*found, *threads(own.forked()["fork server"].pid)]:
        assert names(thread["CapEff"]) == set()
        assert union <= names(thread["CapPrm"])
        assert names(thread["CapPrm"]).isdisjoint({"sys_module", "sys_rawio", "sys_boot", "net_admin", "sys_ptrace"})
        assert thread["NoNewPrivs"] == "1"
    status = own.status()
    assert all(actor.open_files > 5 and actor.resident_bytes > 1 << 20 for actor in status.snapshotters)


@pytest.mark.root
def test_an_actor_that_is_started_again_can_do_as_much(own: Daemon) -> None:
    own.kill(actor="native")
    own.wait_ready()
    for thread in threads(support.pid_of(own, "native")):
        assert names(thread["CapEff"]) == set(privileges.kept_by(registry.load("native")))


@pytest.mark.root
@pytest.mark.parametrize("name", DISK)
def test_files_of_every_kind_and_owner(name: str, own: Daemon, tmp_path: Path) -> None:
    """The life of a snapshot whose files only a privileged process can read, copy, count and delete."""
    with own.client(name, "files") as broker:
        broker.prepare("making")
        fill(broker, "making", tmp_path)
        assert broker.usage("making").inodes >= 8
        broker.commit("base", "making", sync=True)
        broker.prepare("job", "base")
        assert described(broker, "job", tmp_path) == described(broker, "base-view", tmp_path, "base")
        fill(broker, "job", tmp_path, "again")
        assert broker.usage("job").inodes >= 8
        broker.commit("next", "job", sync=True)
        for key in ("base-view", "next", "base"):
            broker.remove(key)
        broker.cleanup()
    backlog = own.wait_for(
        lambda status: next(one for one in status.snapshotters if one.name == name).backlog["entries"] == 0
    )
    assert next(one for one in backlog.snapshotters if one.name == name).backlog["failed"] == 0


def fill(broker: Broker, key: str, place: Path, below: str = "tree") -> None:
    """Owners, modes, devices, attributes, file capabilities."""
    with at(broker, key, place) as root:
        tree = root / below
        tree.mkdir()
        (tree / "file").write_text("content")
        os.chown(tree / "file", 11, 12)
        (tree / "file").chmod(0o4711)
        os.setxattr(tree / "file", "trusted.test", b"for administrators")
        (tree / "tool").write_text("#!")
        os.setxattr(tree / "tool", "security.capability", struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0))
        os.mknod(tree / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (tree / "sticky").mkdir()
        (tree / "sticky/of-another").write_text("x")
        os.chown(tree / "sticky/of-another", 13, 14)
        (tree / "sticky/of-another").chmod(0)
        (tree / "sticky").chmod(0o1777)
        os.chown(tree / "sticky", 15, 16)
        (tree / "closed").mkdir()
        (tree / "closed/file").write_text("y")
        os.chown(tree / "closed", 17, 18)
        (tree / "closed").chmod(0o2000)


def described(broker: Broker, key: str, place: Path, parent: str = "") -> dict[str, tuple[object, ...]]:
    """Everything of a tree that a copy must keep."""
    if parent:
        broker.view(key, parent)
    found: dict[str, tuple[object, ...]] = {}
    with at(broker, key, place) as root:
        for path in sorted(root.rglob("*")):
            look = path.lstat()
            attributes = {
                name: os.getxattr(path, name)
                for name in os.listxattr(path)
                if name in ("trusted.test", "security.capability")
            }
            entry = (look.st_mode, look.st_uid, look.st_gid, look.st_rdev, tuple(attributes.items()))
            found[str(path.relative_to(root))] = entry
    assert len(found) == 8
    assert found["tree/tool"][-1]
    return found


def at(broker: Broker, key: str, place: Path) -> Callable[..., object]:
    """The snapshot, mounted here."""
    target = place / "mounted"
    target.mkdir(exist_ok=True)
    return mounted(broker.mounts(key), target)
