"""A broker, its bridge and a containerd, started together and looked at from all sides."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import node, scratch
from benchmarks.node import Bridge, Containerd
from end_to_end import trees
from snapbroker.contract import Event, Info
from tests.harness import Daemon

PLUGINS = ("snapbroker-overlayfs", "snapbroker-native", "snapbroker-btrfs")
"""What the snapshotters are called in containerd, where the plain names are those of its own."""
NAMESPACE = "containerd"
"""The broker's namespace for everything that containerd has (D14)."""
BRIDGE_SETTINGS = "bridge.toml"
PATIENT = "[calls]\nwait_ms = 30000\n"
"""The bridge waits longer than a broker takes to start on a machine that has a lot to do."""
STOP_SECONDS = 10.0
RECONNECT_SECONDS = 10.0
VIEW_ATTEMPTS = 10
OWN_FILES = ("data.mdb", "lock.mdb", "lock", "ballast", "ledger")
"""What a snapshotter has on its disk besides the snapshots."""


def name_in_broker(plugin: str) -> str:
    """What the broker calls a snapshotter."""
    return plugin.removeprefix("snapbroker-")


@dataclass
class Machine:
    """What runs; `home` has short paths, since 128 layers have to fit into a page (C118)."""

    home: Path
    daemon: Daemon
    bridge: Bridge
    containerd: Containerd
    undo: contextlib.ExitStack

    @classmethod
    @contextlib.contextmanager
    def start(cls, btrfs: Path, bridge_settings: str = PATIENT) -> Iterator[Machine]:
        """Start all three; at the end they must stop by themselves and leave nothing.

        `bridge_settings`: the content of the bridge's configuration file.
        """
        sections = {"overlayfs": {}, "native": {}, "btrfs": {"root": str(btrfs)}}
        with contextlib.ExitStack() as undo:
            home = undo.enter_context(scratch.directory("snb-node"))
            # The root of a user namespace is nobody here, and has to reach its root filesystem.
            home.chmod(0o711)
            (home / BRIDGE_SETTINGS).write_text(bridge_settings)
            daemon = undo.enter_context(Daemon(sections, log_level="debug"))
            bridge = undo.enter_context(node.bridge(daemon.endpoint, home, "--config", str(home / BRIDGE_SETTINGS)))
            containerd = undo.enter_context(node.containerd(home, bridge.stanza()))
            machine = cls(home, daemon, bridge, containerd, undo)
            yield machine
            assert containerd.sweep() == []
            machine.stop_bridge()

    def logs(self) -> dict[str, str]:
        """What each of them wrote, by who it was."""
        return {
            "log of snapbrokerd": self.daemon.log(),
            "log of snapbroker-containerd": self.bridge.log.read_text()[-20_000:],
            "log of containerd": self.containerd.log.read_text()[-20_000:],
        }

    def infos(self, plugin: str) -> list[Info]:
        """The snapshots that the broker keeps for containerd."""
        with self.daemon.client(name_in_broker(plugin), NAMESPACE) as broker:
            return list(broker.walk())

    def sequence(self, plugin: str) -> int:
        """The number of the newest event of a snapshotter."""
        with self.daemon.client(name_in_broker(plugin), NAMESPACE) as broker, broker.walk() as walk:
            return walk.sequence

    def events_since(self, plugin: str, sequence: int) -> list[Event]:
        """What the journal has behind this number."""
        with (
            self.daemon.client(name_in_broker(plugin), NAMESPACE) as broker,
            broker.events(sequence, follow=False) as events,
        ):
            return list(events)

    def check_empty(self, plugin: str) -> None:
        """Nothing of containerd's is left: no record in it, none in the broker, and no file on the disk."""
        listed = self.containerd.snapshots(plugin, "ls").splitlines()
        assert [line.split() for line in listed] == [["KEY", "PARENT", "KIND"]]
        assert self.infos(plugin) == []
        root = self.daemon.root_of(name_in_broker(plugin))
        assert [path for path in trees.files(root) if path.name not in OWN_FILES] == []

    @contextlib.contextmanager
    def view(self, plugin: str, snapshot: str) -> Iterator[Path]:
        """The tree of a committed snapshot, mounted as `ctr` says."""
        key = f"view of {snapshot}"
        self._make_view(plugin, key, snapshot)
        try:
            with self.mounted(plugin, key) as target:
                yield target
        finally:
            self.containerd.snapshots(plugin, "rm", key)

    def _make_view(self, plugin: str, key: str, snapshot: str) -> None:
        """Unlike `ctr snapshots prepare`, `view` keeps the garbage collector away by no label: it may be quicker."""
        for _ in range(VIEW_ATTEMPTS):
            self.containerd.snapshots(plugin, "view", key, snapshot)
            with contextlib.suppress(node.CommandFailed):
                self.containerd.snapshots(plugin, "label", key, "containerd.io/gc.root=test")
                return
        raise AssertionError(f"the garbage collector was quicker {VIEW_ATTEMPTS} times")

    @contextlib.contextmanager
    def container(self, plugin: str, image: str, name: str, script: str) -> Iterator[str]:
        """A container that has run a script to its end, and is there still with its snapshot; what it printed."""
        printed = self.containerd.run(plugin, image, name, "sh", "-c", script, keep=True)
        try:
            yield printed
        finally:
            self.containerd.ctr("containers", "rm", name)

    @contextlib.contextmanager
    def mounted(self, plugin: str, key: str) -> Iterator[Path]:
        """The tree of a view or an active snapshot, mounted by the commands that `ctr snapshots mounts` prints."""
        target = Path(tempfile.mkdtemp(prefix="mount-", dir=self.home))
        node.shell(self.containerd.snapshots(plugin, "mounts", target, key))
        try:
            yield target
        finally:
            scratch.run(["umount", str(target)])
            target.rmdir()

    def stop_bridge(self) -> None:
        """It must stop by itself, and take its socket away."""
        self.bridge.process.terminate()
        assert self.bridge.process.wait(STOP_SECONDS) == 0
        assert not self.bridge.socket.exists()
        assert "Traceback" not in self.bridge.log.read_text()

    def crash_broker(self) -> None:
        """End the broker and its actors as a crash does, and start it again."""
        self.daemon.kill(signal.SIGKILL)
        self.daemon.start()

    def crash_containerd(self) -> None:
        """End containerd as a crash does, without the shims, and start it again."""
        assert self.containerd.process is not None
        self.containerd.process.kill()
        self.containerd.process.wait()
        self.undo.enter_context(node.serving(self.containerd))

    def crash_bridge(self, plugin: str) -> None:
        """End the bridge as a crash does, start it again on the socket that it left, and wait for containerd.

        After a connection that was refused, containerd refuses all calls itself for a second and more (C141).
        """
        self.bridge.process.kill()
        self.bridge.process.wait()
        self.bridge = self.undo.enter_context(
            node.bridge(self.daemon.endpoint, self.home, "--config", str(self.home / BRIDGE_SETTINGS))
        )
        give_up = time.monotonic() + RECONNECT_SECONDS
        while True:
            try:
                self.containerd.snapshots(plugin, "prepare", "probe")
            except node.CommandFailed:
                if time.monotonic() > give_up:
                    raise
            else:
                self.containerd.snapshots(plugin, "rm", "probe")
                return
