"""One blocking Python caller of containerd over gRPC: the latency that a Python program sees."""

from __future__ import annotations

import sys
from pathlib import Path

import grpc  # type: ignore[import-untyped]

from benchmarks.callers import measured
from benchmarks.containerd import generated

WARMUP_SECONDS = 0.3


def main(stubs: str, socket: str, namespace: str, snapshotter: str, key: str, seconds: str) -> None:
    messages, services = generated(Path(stubs))
    with grpc.insecure_channel(f"unix://{socket}") as channel:
        stub = services.SnapshotsStub(channel)
        metadata = (("containerd-namespace", namespace),)

        def stat() -> None:
            stub.Stat(messages.KeyRequest(snapshotter=snapshotter, key=key), metadata=metadata)

        measured.repeat(stat, WARMUP_SECONDS)
        latencies, elapsed = measured.repeat(stat, float(seconds))
    print(measured.report("stat", 1, latencies, elapsed))


if __name__ == "__main__":
    main(*sys.argv[1:])
