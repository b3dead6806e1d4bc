"""Through the bridge: the same gRPC callers ask snapbroker-containerd and containerd's own snapshots service."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import grpc

from benchmarks import containerd, images, node, scratch, services, snapbrokerd
from benchmarks.bench import Bench
from benchmarks.figures import Figure, Target
from benchmarks.workloads import calls

THROUGH = "through the bridge: "
TARGETS: dict[tuple[str, str, str], Target] = {
    ("prepare", "64 callers", "calls/s"): Target(at_least=2, aim=4),
    ("prepare + commit + remove", "64 callers", "calls/s"): Target(at_least=2, aim=4),
    ("prepare", "1 caller", "ms, median"): Target(at_most=1, aim=0.35),
    ("walk", "1 caller", "ms, median"): Target(at_most=1),
}
"""Work, where and unit: what the ratio to containerd has to be. A Go plugin that is asked directly takes 0.35."""
LAYERS = 12
UNPACK_AT_MOST = 1.1


class Bridged:
    """The broker behind the bridge, as gRPC callers see it."""

    name = services.OURS

    def __init__(self, daemon: services.Side, peer: containerd.Containerd) -> None:
        self._daemon, self._peer = daemon, peer

    @contextlib.contextmanager
    def start(self, backend: str, place: Path) -> Iterator[services.Service]:
        """Run the daemon and the bridge."""
        with contextlib.ExitStack() as stack:
            bridge = stack.enter_context(bridged(self._daemon, backend, place))
            channel = stack.enter_context(grpc.insecure_channel(f"unix://{bridge.socket}"))
            yield containerd.Running(self._peer.callers, bridge.socket, backend, channel, bridge.process.pid)


@contextlib.contextmanager
def bridged(daemon: services.Side, backend: str, place: Path) -> Iterator[node.Bridge]:
    """A bridge to a broker of its own."""
    with (
        daemon.start(backend, place) as broker,
        scratch.directory("snapbroker-bench-bridge") as home,
        node.bridge(cast("snapbrokerd.Running", broker).endpoint, home) as bridge,
    ):
        yield bridge


def verbs(bench: Bench) -> Iterator[Figure]:
    """Prepare, the life of a layer, the reads and a list, at the entrance of either."""
    peer = cast("containerd.Containerd", bench.sides[services.PEER])
    broker = Bridged(bench.sides[services.OURS], peer)
    through = Bench(bench.plan, {services.PEER: peer, services.OURS: broker})
    for workload in (calls.prepare, calls.cycle, calls.reads):
        for figure in workload(through, "overlayfs"):
            yield _renamed(figure)
    for figure in calls.walk(through):
        yield _renamed(figure)


def _renamed(figure: Figure) -> Figure:
    target = TARGETS.get((figure.work, figure.at, figure.unit))
    return dataclasses.replace(figure, work=THROUGH + figure.work, target=target)


def unpack(bench: Bench) -> Iterator[Figure]:
    """A real image's layers, by containerd onto its own overlayfs and onto ours."""
    bench.say(f"unpacking an image of {LAYERS} layers")
    image = images.of_this_machine("bench", LAYERS)
    taken: dict[str, list[float]] = {"overlayfs": [], "snapbroker-overlayfs": []}
    with bench.place("overlayfs") as place, bridged(bench.sides[services.OURS], "overlayfs", place) as bridge:
        (place / "node").mkdir()
        archive = image.write(place / "image.tar")
        with node.containerd(place / "node", bridge.stanza()) as containers:
            for _ in range(bench.plan.rounds + 1):
                for snapshotter, seconds in taken.items():
                    seconds.append(containers.unpack_seconds(snapshotter, archive, image.manifest.digest))
    # The first of each finds the programs cold.
    own, ours = (tuple(seconds[1:]) for seconds in taken.values())
    yield Figure(
        THROUGH + "unpack", "overlayfs", f"{LAYERS} layers, {image.packed_bytes >> 20} MiB packed", "s", ours, own,
        target=Target(at_most=UNPACK_AT_MOST),
    )  # fmt: skip
