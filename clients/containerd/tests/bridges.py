"""A bridge as it is run, and containerd's side of its socket: plain gRPC calls of grpcio's own client."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from snapbroker.contract import Mount
from snapbroker_containerd.api import snapshots_pb2 as api

SNAPSHOTTERS: Final = ("memory", "overlayfs", "native", "btrfs")
PROGRAM: Final = str(Path(sys.executable).with_name("snapbroker-containerd"))
SERVICE: Final = "/containerd.services.snapshots.v1.Snapshots"
REPLY_S: Final = 30.0
"""How long a call may take on a busy machine."""
STOP_S: Final = 10.0
"""How long a stop may take on a busy machine; the bridge gives calls five seconds."""
METHODS: Final = {
    "Prepare": (api.PrepareSnapshotRequest, api.PrepareSnapshotResponse),
    "View": (api.ViewSnapshotRequest, api.ViewSnapshotResponse),
    "Mounts": (api.MountsRequest, api.MountsResponse),
    "Commit": (api.CommitSnapshotRequest, Empty),
    "Remove": (api.RemoveSnapshotRequest, Empty),
    "Stat": (api.StatSnapshotRequest, api.StatSnapshotResponse),
    "Update": (api.UpdateSnapshotRequest, api.UpdateSnapshotResponse),
    "List": (api.ListSnapshotsRequest, api.ListSnapshotsResponse),
    "Usage": (api.UsageRequest, api.UsageResponse),
    "Cleanup": (api.CleanupRequest, Empty),
}
OPTIONS: Final = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 64 << 20)]


def marks(snapshotter: str) -> list[pytest.MarkDecorator]:
    """Only memory needs no root."""
    return [] if snapshotter == "memory" else [pytest.mark.root]


class Bridge:
    """One `snapbroker-containerd`: started at the beginning of the block, stopped at its end with exit status 0."""

    def __init__(
        self, place: Path, endpoint: str, *, environment: Mapping[str, str] | None = None, **table: Any
    ) -> None:
        self.socket = place / "bridge.sock"
        self.log_file = place / "bridge.log"
        self.config = place / "bridge.toml"
        self.config.write_text("".join(_toml(table)))
        self._endpoint = endpoint
        self._environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Run it, and wait until it serves."""
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [PROGRAM, "--listen", self.socket, "-e", self._endpoint, "--config", self.config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
            )
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            grpc.channel_ready_future(channel).result(REPLY_S)
        return self

    def stop(self) -> None:
        """SIGTERM: it must end by itself with exit status 0, and take its socket with it."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_S)
        finally:
            self.kill()
        assert status == 0, self.log_file.read_text()
        assert not self.socket.exists()
        assert "Traceback" not in self.log_file.read_text(), self.log_file.read_text()

    def kill(self) -> None:
        """End it, if it still runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def events(self, name: str) -> list[dict[str, Any]]:
        """The entries of this name in its log."""
        lines = [line for line in self.log_file.read_text().splitlines() if line.startswith("{")]
        return [entry for line in lines if (entry := json.loads(line))["event"] == name]

    @contextlib.contextmanager
    def client(self, snapshotter: str) -> Iterator[Client]:
        """Calls for one snapshotter, over a connection of their own."""
        # Channels to the same address share a connection unless they are told not to.
        options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"unix:{self.socket}", options=options) as channel:
            yield Client(channel, snapshotter)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.kill()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self.process is not None and kind is None:
                self.stop()
        finally:
            self.kill()


def _toml(table: Mapping[str, Any]) -> Iterator[str]:
    """A flat table, then those in it: JSON's strings, numbers and arrays are TOML's too."""
    for key, value in table.items():
        if not isinstance(value, Mapping):
            yield f"{key} = {json.dumps(value)}\n"
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield f"[{key}]\n" + "".join(f"{json.dumps(name)} = {json.dumps(entry)}\n" for name, entry in value.items())


class Client:
    """The ten calls for one snapshotter, in few words; every error is grpcio's."""

    def __init__(self, channel: grpc.Channel, snapshotter: str) -> None:
        self._channel = channel
        self.snapshotter = snapshotter
        self.timeout = REPLY_S

    def call(self, method: str, **fields: Any) -> Any:
        """The answer of a method; of List all its messages."""
        request, response = METHODS[method]
        kind = self._channel.unary_stream if method == "List" else self._channel.unary_unary
        invoke = kind(f"{SERVICE}/{method}", request.SerializeToString, response.FromString)
        answer = invoke(request(**{"snapshotter": self.snapshotter, **fields}), timeout=self.timeout)
        return list(answer) if method == "List" else answer

    def begin(self, method: str, **fields: Any) -> Any:
        """A call that is not waited for."""
        request, response = METHODS[method]
        invoke = self._channel.unary_unary(f"{SERVICE}/{method}", request.SerializeToString, response.FromString)
        return invoke.future(request(**{"snapshotter": self.snapshotter, **fields}), timeout=self.timeout)

    def raw(self, path: str, message: bytes) -> bytes:
        """Whatever bytes, to whatever method."""
        answer: bytes = self._channel.unary_unary(path)(message, timeout=self.timeout)
        return answer

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        return _mounts(self.call("Prepare", key=key, parent=parent, labels=labels))

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        return _mounts(self.call("View", key=key, parent=parent, labels=labels))

    def mounts(self, key: str) -> list[Mount]:
        return _mounts(self.call("Mounts", key=key))

    def commit(self, name: str, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> Any:
        return self.call("Commit", name=name, key=key, parent=parent, labels=labels)

    def remove(self, key: str) -> Any:
        return self.call("Remove", key=key)

    def stat(self, key: str) -> Any:
        return self.call("Stat", key=key).info

    def update(self, name: str, labels: Mapping[str, str] | None = None, *paths: str, mask: bool = False) -> Any:
        """Without paths there is no mask, unless `mask` asks for an empty one."""
        update_mask = FieldMask(paths=paths) if paths or mask else None
        return self.call("Update", info=api.Info(name=name, labels=labels), update_mask=update_mask).info

    def list(self, *filters: str) -> list[Any]:
        return [info for block in self.blocks(*filters) for info in block.info]

    def blocks(self, *filters: str) -> list[Any]:
        messages: list[Any] = self.call("List", filters=filters)
        return messages

    def names(self, *filters: str) -> list[str]:
        return [info.name for info in self.list(*filters)]

    def usage(self, key: str) -> Any:
        return self.call("Usage", key=key)

    def cleanup(self) -> Any:
        return self.call("Cleanup")

    def committed(self, name: str, parent: str = "", labels: Mapping[str, str] | None = None) -> None:
        """A committed snapshot."""
        self.prepare(f"{name}-making", parent)
        self.commit(name, f"{name}-making", labels=labels)

    def clear(self) -> None:
        """Remove everything, children first."""
        left = {info.name: info.parent for info in self.list()}
        while left:
            for name in left.keys() - set(left.values()):
                self.remove(name)
                del left[name]


def _mounts(answer: Any) -> list[Mount]:
    return [Mount(mount.type, mount.source, tuple(mount.options), mount.target) for mount in answer.mounts]
