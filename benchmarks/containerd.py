"""The peer: containerd's own snapshots service on a private root and socket, durable as it is shipped."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.protobuf.empty_pb2 import Empty

from benchmarks import scratch, services
from snapbroker_containerd.api import snapshots_pb2 as api
from snapbroker_containerd.service import SERVICE

NAMESPACE = "bench"
KEPT = {"containerd.io/gc.root": "bench"}
"""Keeps a snapshot from containerd's garbage collector, which runs on its own after some changes."""
START_SECONDS = 30.0
"""How long containerd may take until its socket answers."""
CALL_SECONDS = 1800.0
"""How long one call may take: a native snapshot of gigabytes is copied, and flushed, inside its prepare."""

SOURCE = Path(__file__).parent / "peer"
"""The Go program of callers."""

CONFIGURATION = """\
version = 2
root = "{root}"
state = "{state}"
# Images, pods and shims are not measured; without them containerd is smaller, which is to its advantage.
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]

[grpc]
address = "{socket}"

[plugins."io.containerd.snapshotter.v1.{backend}"]
root_path = "{place}"
"""


class Containerd:
    """Starts containerd; the callers are compiled once, into `tools`."""

    name = services.PEER

    def __init__(self, tools: Path) -> None:
        scratch.require("containerd", "go")
        self.callers = tools / "peer"
        scratch.run(["go", "build", "-trimpath", "-o", str(self.callers), "."], cwd=SOURCE)

    @contextlib.contextmanager
    def start(self, backend: str, place: Path) -> Iterator[services.Service]:
        """Run containerd with everything under `place`; with btrfs its main database is on the disk, as usual."""
        with contextlib.ExitStack() as stack:
            home = stack.enter_context(scratch.directory("snapbroker-bench-containerd"))
            socket = home / "containerd.sock"
            configuration = home / "config.toml"
            root = home / "root" if backend == "btrfs" else place / "containerd"
            configuration.write_text(
                CONFIGURATION.format(
                    root=root, state=home / "state", socket=socket, backend=backend, place=place / backend
                )
            )
            log = stack.enter_context((home / "log").open("wb"))
            process = stack.enter_context(scratch.process(["containerd", "--config", str(configuration)], log))
            channel = stack.enter_context(grpc.insecure_channel(f"unix://{socket}"))
            try:
                grpc.channel_ready_future(channel).result(START_SECONDS)
            except grpc.FutureTimeoutError:
                tail = (home / "log").read_text()[-2000:]
                raise RuntimeError(f"containerd does not answer after {START_SECONDS:g} s:\n{tail}") from None
            yield Running(self.callers, socket, backend, channel, process.pid)


class Calls:
    """Single blocking calls over gRPC."""

    def __init__(self, channel: grpc.Channel, backend: str) -> None:
        self._backend = backend
        self._prepare = method(channel, "Prepare", api.PrepareSnapshotRequest, api.PrepareSnapshotResponse)
        self._commit = method(channel, "Commit", api.CommitSnapshotRequest, Empty)
        self._remove = method(channel, "Remove", api.RemoveSnapshotRequest, Empty)
        self._with = {"metadata": (("containerd-namespace", NAMESPACE),), "timeout": CALL_SECONDS}

    def prepare(self, key: str, parent: str = "") -> Sequence[services.MountPoint]:
        request = api.PrepareSnapshotRequest(snapshotter=self._backend, key=key, parent=parent, labels=KEPT)
        answer = self._prepare(request, **self._with)
        return [services.MountPoint(mount.type, mount.source, tuple(mount.options)) for mount in answer.mounts]

    def commit(self, name: str, key: str) -> None:
        self._commit(
            api.CommitSnapshotRequest(snapshotter=self._backend, name=name, key=key, labels=KEPT), **self._with
        )

    def remove(self, key: str) -> None:
        self._remove(api.RemoveSnapshotRequest(snapshotter=self._backend, key=key), **self._with)


class Running:
    """A containerd that answers."""

    side = services.PEER

    def __init__(self, callers: Path, socket: Path, backend: str, channel: grpc.Channel, pid: int) -> None:
        self._callers, self._socket, self._backend, self._pid = callers, socket, backend, pid
        self.calls = Calls(channel, backend)

    def command(self, operation: str, **options: object) -> list[str]:
        named = {"address": self._socket, "namespace": NAMESPACE, "snapshotter": self._backend, "operation": operation}
        return [str(self._callers), *services.flags({**named, **options})]

    def blocking_command(self, key: str, seconds: float) -> list[str]:
        return [
            sys.executable, "-m", "benchmarks.callers.peer_blocking", str(self._socket), NAMESPACE, self._backend,
            key, str(seconds),
        ]  # fmt: skip

    def settle(self) -> None:
        services.load(self, "settle")

    def resident(self) -> dict[str, int]:
        return {"containerd": psutil.Process(self._pid).memory_info().rss}


def method(channel: grpc.Channel, name: str, request: Any, response: Any) -> Any:
    """A method of the snapshots service, as a function from request to response."""
    return channel.unary_unary(f"/{SERVICE}/{name}", request.SerializeToString, response.FromString)
