"""One blocking Python caller of our broker: the latency that a Python program sees."""

from __future__ import annotations

import sys

import snapbroker
from benchmarks.callers import measured
from benchmarks.callers.peer_blocking import WARMUP_SECONDS


def main(endpoint: str, namespace: str, snapshotter: str, key: str, seconds: str) -> None:
    with snapbroker.connect(endpoint, namespace=namespace, snapshotter=snapshotter) as broker:
        measured.repeat(lambda: broker.stat(key), WARMUP_SECONDS)
        latencies, elapsed = measured.repeat(lambda: broker.stat(key), float(seconds))
    print(measured.report("stat", 1, latencies, elapsed))


if __name__ == "__main__":
    main(*sys.argv[1:])
