"""One blocking Python caller of containerd over gRPC: the latency that a Python program sees."""

from __future__ import annotations

import sys

import grpc

from benchmarks.callers import measured
from benchmarks.containerd import method
from snapbroker_containerd.api import snapshots_pb2 as api

WARMUP_SECONDS = 0.3


def main(socket: str, namespace: str, snapshotter: str, key: str, seconds: str) -> None:
    with grpc.insecure_channel(f"unix://{socket}") as channel:
        ask = method(channel, "Stat", api.StatSnapshotRequest, api.StatSnapshotResponse)
        metadata = (("containerd-namespace", namespace),)

        def stat() -> None:
            ask(api.StatSnapshotRequest(snapshotter=snapshotter, key=key), metadata=metadata)

        measured.repeat(stat, WARMUP_SECONDS)
        latencies, elapsed = measured.repeat(stat, float(seconds))
    print(measured.report("stat", 1, latencies, elapsed))


if __name__ == "__main__":
    main(*sys.argv[1:])
