"""Broker, snapshotter, bridge or containerd are killed at work: the others go on, and nothing is left over."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.images import Image
from benchmarks.node import CommandFailed
from end_to_end.machine import NAMESPACE, Machine, name_in_broker

pytestmark = [pytest.mark.root, pytest.mark.slow]

LAYERS = 40
"""Enough for an import to last while the broker is killed and started."""
KILLED_AFTER = 4
"""Committed layers."""
WAIT_SECONDS = 1.0
"""How long the bridge of the impatient machine waits."""
ENDED_SECONDS = 60.0
"""How long a command may last whatever happens to the broker: containerd itself waits for ever (C141)."""

CRASHES: dict[str, Callable[[Machine, str], None]] = {
    "broker": lambda machine, _: machine.crash_broker(),
    "snapshotter": lambda machine, plugin: machine.daemon.kill(actor=name_in_broker(plugin)),
    "bridge": lambda machine, plugin: machine.crash_bridge(plugin),
    "containerd": lambda machine, _: machine.crash_containerd(),
}
"""What is killed, and that it is there again."""


@pytest.fixture(scope="module")
def layers() -> Image:
    """An image of many layers."""
    image = Image("example.test/layers:1")
    for number in range(LAYERS):
        with image.layer() as layer:
            layer.file(f"/layers/{number}", f"layer {number}\n".encode() * 1000)
    return image


@pytest.fixture(scope="module")
def layers_archive(layers: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of that image."""
    return layers.write(tmp_path_factory.mktemp("archive") / "layers.tar")


@pytest.fixture
def impatient(btrfs: Path) -> Iterator[Machine]:
    """A machine whose bridge waits for the broker only shortly."""
    with Machine.start(btrfs / "impatient", f"[calls]\nwait_ms = {round(WAIT_SECONDS * 1000)}\n") as machine:
        yield machine


@pytest.mark.parametrize("crashed", CRASHES)
def test_an_import_is_repeated_after_a_crash(
    machine: Machine, snapshotter: str, layers: Image, layers_archive: Path, crashed: str
) -> None:
    node = machine.containerd
    before = machine.sequence(snapshotter)
    importing = subprocess.Popen(
        node.command("images", "import", "--snapshotter", snapshotter, layers_archive),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        wait_for_commits(machine, snapshotter, before, KILLED_AFTER)
        assert importing.poll() is None
        CRASHES[crashed](machine, snapshotter)
        _, errors = importing.communicate(timeout=ENDED_SECONDS)
        # Where the bridge lives it waits, and the first import knows of nothing.
        assert importing.returncode == 0 or crashed in ("bridge", "containerd"), errors.decode()
        node.ctr("images", "import", "--snapshotter", snapshotter, layers_archive)
        with machine.view(snapshotter, layers.chain[-1]) as tree:
            found = {int(path.name): path.read_bytes() for path in (tree / "layers").iterdir()}
        assert found == {number: f"layer {number}\n".encode() * 1000 for number in range(LAYERS)}
    finally:
        importing.kill()
        importing.communicate()
        # The lease of a command that was cut off protects what it had made for a day (C92).
        for lease in node.ctr("leases", "ls", "--quiet").split():
            node.ctr("leases", "rm", lease)
        node.remove_image(layers.name)
    machine.check_empty(snapshotter)


@pytest.mark.usefixtures("imported")
def test_a_container_does_not_notice(machine: Machine, snapshotter: str, image: Image) -> None:
    node = machine.containerd
    node.ctr("run", "--detach", "--snapshotter", snapshotter, image.name, "lasting", "sleep", "1000")
    try:
        inside = ("tasks", "exec", "--exec-id")
        node.ctr(*inside, "before", "lasting", "sh", "-c", "echo written before >/tmp/note")
        machine.crash_broker()
        machine.crash_containerd()
        assert node.ctr(*inside, "after", "lasting", "cat", "/tmp/note", "/etc/greeting").splitlines() == [
            "written before",
            "hello from the image",
        ]
        assert node.run(snapshotter, image.name, "another", "cat", "/etc/greeting") == "hello from the image\n"
    finally:
        node.ctr("tasks", "kill", "--signal", "SIGKILL", "lasting")
        node.ctr("tasks", "rm", "--force", "lasting")
        node.ctr("containers", "rm", "lasting")


def test_while_the_broker_is_away_calls_fail_in_time_and_work_afterwards(impatient: Machine) -> None:
    plugin = "snapbroker-overlayfs"
    node = impatient.containerd
    node.snapshots(plugin, "prepare", "before")
    impatient.daemon.stop()
    for command in (("prepare", "during"), ("mounts", "/mnt", "before"), ("usage", "before")):
        started = time.monotonic()
        with pytest.raises(CommandFailed, match=r": unavailable$"):
            node.snapshots(plugin, *command)
        assert WAIT_SECONDS / 4 < time.monotonic() - started < 10 * WAIT_SECONDS
    impatient.daemon.start()
    node.snapshots(plugin, "prepare", "after")
    assert {info.name.split("/", 2)[2] for info in impatient.infos(plugin)} == {"before", "after"}
    node.snapshots(plugin, "rm", "before", "after")


def wait_for_commits(machine: Machine, plugin: str, since: int, number: int) -> None:
    """Return when so many snapshots were committed after an event."""
    with machine.daemon.client(name_in_broker(plugin), NAMESPACE) as broker, broker.events(since) as events:
        while number:
            event = events.poll(ENDED_SECONDS)
            assert event is not None
            number -= event.verb == "commit"
