"""A node of its own: a private containerd with `ctr` and runc, and the bridge that lets it use a broker.

    with bridge(endpoint, home) as door, containerd(home, door.stanza()) as node:
        node.ctr("images", "import", "--snapshotter", "snapbroker-overlayfs", "image.tar")

containerd starts a shim for every container, which outlives it; at the end these are killed too, what they have
mounted is unmounted, and their sockets, control groups and runc's notes of them, which are all outside of the node's
own directory, are deleted. The containers' namespace has a name that nobody else uses, by which they are found.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import scratch

START_SECONDS = 30.0
"""How long containerd or the bridge may take until its socket takes connections."""
COMMAND_SECONDS = 100.0
"""How long one command of `ctr` may take."""
PAUSE_SECONDS = 0.02
"""Between two attempts to connect to a socket that is about to be there."""
RUNC_STATE = Path("/run/containerd/runc")
"""Where containerd's shims let runc keep its notes, a directory for each namespace."""
CONTROL_GROUPS = Path("/sys/fs/cgroup")
SHIM = "containerd-shim"

CONFIGURATION = """\
version = 2
root = "{root}"
state = "{state}"
# No pods, and no snapshotters but the one to compare with: fewer things to start, and nothing outside of the root.
disabled_plugins = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.internal.v1.opt",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.native",
    "io.containerd.snapshotter.v1.zfs",
]

[debug]
level = "warn"

[grpc]
address = "{socket}"
"""

_numbers = itertools.count(1)


class CommandFailed(RuntimeError):
    """A command of `ctr` ended with an error; the message has what it said."""


@dataclass(frozen=True)
class Bridge:
    """A running `snapbroker-containerd`; `command` is how it was started."""

    command: Sequence[str]
    socket: Path
    process: subprocess.Popen[bytes]
    log: Path

    def stanza(self) -> str:
        """What containerd's configuration needs for it, as it says itself."""
        program, *options = self.command
        return scratch.run([program, "stanza", *options])


@contextlib.contextmanager
def bridge(endpoint: str, home: Path, *options: str) -> Iterator[Bridge]:
    """Run the bridge between its socket in `home` and the broker at `endpoint`; yields when it takes connections."""
    door, log = home / "bridge.sock", home / "bridge.log"
    program = str(Path(sys.executable).with_name("snapbroker-containerd"))
    command = [program, "--listen", str(door), "--endpoint", endpoint, *options]
    with log.open("ab") as output, scratch.process(command, output) as process:
        wait_connected(door, process, log)
        yield Bridge(command, door, process, log)


class Containerd:
    """A containerd with everything that belongs to it under `home`; containers and snapshots are in `namespace`."""

    def __init__(self, home: Path, namespace: str = "") -> None:
        self.home = home
        self.socket = home / "containerd.sock"
        self.log = home / "containerd.log"
        self.configuration = home / "containerd.toml"
        self.process: subprocess.Popen[bytes] | None = None
        self.namespace = namespace or f"snb-{os.getpid()}-{next(_numbers)}"

    def ctr(self, *arguments: str | os.PathLike[str], timeout: float = COMMAND_SECONDS) -> str:
        """Run `ctr` with these arguments; answers what it printed, CommandFailed when it ends with an error."""
        return self.ctr_bytes(*arguments, timeout=timeout).decode()

    def ctr_bytes(self, *arguments: str | os.PathLike[str], timeout: float = COMMAND_SECONDS) -> bytes:
        """As `ctr`, for an output that is no text, as a layer."""
        done = subprocess.run(
            self.command(*arguments), stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            raise CommandFailed(f"ctr {' '.join(map(str, arguments))}: exit status {done.returncode}: {said}")
        return done.stdout

    def command(self, *arguments: str | os.PathLike[str]) -> list[str]:
        """The words of a `ctr` command."""
        return ["ctr", "--address", str(self.socket), "--namespace", self.namespace, *map(str, arguments)]

    def snapshots(self, snapshotter: str, *arguments: str | os.PathLike[str]) -> str:
        """Run `ctr snapshots` on one snapshotter."""
        return self.ctr("snapshots", "--snapshotter", snapshotter, *arguments)

    def run(self, snapshotter: str, image: str, name: str, *command: str, keep: bool = False) -> str:
        """Run a container to its end; answers what it printed. With `keep` it and its snapshot stay."""
        options = [] if keep else ["--rm"]
        return self.ctr("run", *options, "--snapshotter", snapshotter, image, name, *command)

    def remove_image(self, name: str) -> None:
        """Remove an image, and wait for the garbage collection that takes what only it needed."""
        self.ctr("images", "rm", "--sync", name)

    def unpack(self, snapshotter: str, manifest: str) -> None:
        """Unpack an image whose content is there; of all commands this one takes the option for itself."""
        self.ctr("snapshots", "unpack", "--snapshotter", snapshotter, manifest)

    def unpack_seconds(self, snapshotter: str, archive: Path, manifest: str) -> float:
        """How long unpacking takes, from the content that is there to the last layer's snapshot.

        Every time in a namespace of its own, where no layer is there yet, and without removing anything: ext4 does
        not use an inode again within seconds after its deletion, and looks for another one at great length. After a
        removal of this many files, unpacking them took two to five times as long (measured on Linux 6.18).
        """
        fresh = ("--namespace", f"{self.namespace}-{next(_numbers)}")
        self.ctr(*fresh, "images", "import", "--no-unpack", archive)
        started = time.monotonic()
        self.ctr(*fresh, "snapshots", "unpack", "--snapshotter", snapshotter, manifest)
        return time.monotonic() - started

    def shims(self) -> list[psutil.Process]:
        """The shims of this containerd, running or not."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name().startswith(SHIM) and str(self.socket) in process.cmdline():
                    found.append(process)
        return found

    def mounts(self) -> list[str]:
        """Mount points below its directory, in the order of mounting."""
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
        targets = [os.fsdecode(line.split(" ")[4]) for line in lines]
        return [target for target in targets if target.startswith(f"{self.home}/")]

    def sweep(self) -> list[str]:
        """Take away whatever containers have left; answers what that was, nothing if they were removed properly."""
        left = []
        for shim in self.shims():
            left.append(f"process {shim.pid}: {' '.join(shim.cmdline())}")
            for process in [*shim.children(recursive=True), shim]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        for address in self.home.glob("state/**/address"):
            Path(address.read_text().removeprefix("unix://")).unlink(missing_ok=True)
        for target in reversed(self.mounts()):
            left.append(f"mount {target}")
            scratch.run(["umount", "--lazy", target], check=False)
        notes = RUNC_STATE / self.namespace
        if notes.exists():
            left += [f"runc's {path}" for path in notes.iterdir()]
            shutil.rmtree(notes)
        for group in (*CONTROL_GROUPS.glob(f"*/{self.namespace}"), CONTROL_GROUPS / self.namespace):
            left += [f"control group {below}" for below in _remove_groups(group) if below != group]
        return left


@contextlib.contextmanager
def containerd(home: Path, plugins: str = "") -> Iterator[Containerd]:
    """Run a containerd with `plugins` in its configuration; whoever they speak of must answer already."""
    scratch.require("containerd", "ctr", "runc")
    node = Containerd(home)
    text = CONFIGURATION.format(root=home / "root", state=home / "state", socket=node.socket)
    node.configuration.write_text(f"{text}\n{plugins}")
    try:
        with serving(node):
            yield node
    finally:
        node.sweep()


@contextlib.contextmanager
def serving(node: Containerd) -> Iterator[subprocess.Popen[bytes]]:
    """Run the process of a containerd, again if it ran before; yields when it takes connections."""
    command = ["containerd", "--config", str(node.configuration)]
    with node.log.open("ab") as output, scratch.process(command, output) as node.process:
        wait_connected(node.socket, node.process, node.log)
        yield node.process


def wait_connected(door: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when a unix socket takes connections; RuntimeError, with the log's end, if its process ends before."""
    give_up = time.monotonic() + START_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX) as attempt, contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            attempt.connect(str(door))
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PAUSE_SECONDS)
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        if time.monotonic() > give_up:
            raise RuntimeError(f"nobody answers at {door} after {START_SECONDS:g} s:\n{log.read_text()[-2000:]}")


def shell(commands: str) -> None:
    """Run commands that were printed to be run, as those of `ctr snapshots mounts`."""
    subprocess.run(["sh", "-e", "-c", commands], check=True, capture_output=True)


def _remove_groups(group: Path) -> Sequence[Path]:
    """Remove a control group and those below it; answers which there were."""
    found = [Path(where) for where, _, _ in os.walk(group, topdown=False)]
    for path in found:
        with contextlib.suppress(OSError):
            path.rmdir()
    return found
