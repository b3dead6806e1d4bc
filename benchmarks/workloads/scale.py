"""Whether what a call takes depends on how much is there: snapshots beside it, layers below it."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict

import snapbroker.mount
from benchmarks import scratch
from benchmarks.bench import BASE, Bench
from benchmarks.figures import Figure, Target, callers, compare
from benchmarks.services import OURS, PEER, Sample, Service, load
from snapbroker.contract import Mount

CALLERS = 64
FILL_CALLERS = {OURS: 1024, PEER: 16}
"""Enough for either to be as quick as it can be."""
MOUNTS = 10
"""How often a chain is mounted."""
FEW = 100
"""The store that a removal from a large one is compared with."""
RATIO_MAX = 1.2
"""How much slower a call may be in a large store."""
TARGETS_AT = {("prepare", 1_000_000), ("remove", 100_000)}
"""Where a target is set."""

Pair = dict[str, Sample]
"""What the prepares and the removes of one round took."""


def crowded(bench: Bench, backend: str, levels: tuple[int, ...]) -> Iterator[Figure]:
    """Prepare and remove a few where many are, and in turn, in a second store, where none or few are."""
    for side in bench.sides:
        reached = [level for level in levels if side == OURS or level <= bench.plan.scale_peer_infos_max]
        if reached and (side == OURS or backend != "memory"):
            yield from _crowded(bench, side, backend, reached)


def _crowded(bench: Bench, side: str, backend: str, levels: list[int]) -> Iterator[Figure]:
    with contextlib.ExitStack() as stack:
        full, few, empty = (
            stack.enter_context(bench.service(side, backend, with_base=backend != "memory")) for _ in range(3)
        )
        parent = "" if backend == "memory" else BASE
        _fill(few, parent, "few", FEW)
        there = 0
        for level in levels:
            bench.say(f"{side}, {backend}: {level:,} snapshots there")
            _fill(full, parent, f"level-{level}", level - there)
            there = level
            rounds = {"empty": empty, "few": few, "full": full}
            taken: dict[str, list[Pair]] = {name: [] for name in rounds}
            for number in range(bench.plan.rounds):
                for name, service in rounds.items():
                    taken[name].append(_prepare_and_remove(bench, service, parent, f"{level}-{number}"))
            yield _figure("prepare", side, backend, level, taken["full"], taken["empty"], "none there")
            yield _figure("drop", side, backend, level, taken["full"], taken["few"], f"{FEW} there")


def _fill(service: Service, parent: str, prefix: str, count: int) -> None:
    load(service, "fill", callers=FILL_CALLERS[service.side], operations=count, parent=parent, prefix=prefix)


def _prepare_and_remove(bench: Bench, service: Service, parent: str, prefix: str) -> Pair:
    operations = bench.plan.scale_operations if service.side == OURS else bench.plan.scale_peer_operations
    options: dict[str, object] = {"callers": CALLERS, "operations": operations, "parent": parent}
    # The first pass does not count: it brings both stores' pools of ready directories to the same size, which the
    # large one reached when it was filled.
    for name in (f"warm-{prefix}", prefix):
        taken = {}
        for verb in ("prepare", "drop"):
            taken[verb] = load(service, verb, prefix=name, **options)
            # A pool that is stocked again, more in the store whose pool grew larger, is not part of what follows.
            service.settle()
    return taken


def _figure(verb: str, side: str, backend: str, level: int, full: list[Pair], less: list[Pair], than: str) -> Figure:
    """Time a call in the full store, against the time in the other."""
    work = {"prepare": "prepare", "drop": "remove"}[verb]
    judged = side == OURS and (work, level) in TARGETS_AT
    return Figure(
        work, backend, f"{level:,} there", "ms a call",
        tuple(1000 / taken[verb].rate for taken in full), tuple(1000 / taken[verb].rate for taken in less),
        subject=side, baseline=f"{side}, {than}", target=Target(at_most=RATIO_MAX) if judged else None,
        samples={name: [asdict(taken[verb]) for taken in rounds] for name, rounds in (("full", full), (than, less))},
    )  # fmt: skip


def chains(bench: Bench) -> Iterator[Figure]:
    """Prepare on top of many layers."""
    deepest = max(bench.plan.chain_depths)
    turns = itertools.count()
    with bench.services("overlayfs") as services:
        bench.say(f"building chains of {deepest} layers")
        for service in services.values():
            load(service, "chain", operations=deepest, prefix="layer")
        for depth, count in itertools.product(bench.plan.chain_depths, (1, CALLERS)):
            work = f"prepare on {depth} layer{'s' * (depth > 1)}"
            bench.say(f"{work}, {callers(count)}")

            def measure(side: str, depth: int = depth, count: int = count) -> Sample:
                return load(
                    services[side], "prepare", callers=count, seconds=bench.plan.seconds / 2,
                    parent=f"layer-{depth - 1}", prefix=f"turn-{next(turns)}",
                )  # fmt: skip

            samples = bench.alternate(measure)
            yield compare(work, "overlayfs", callers(count), samples)
            if count == 1:
                yield compare(work, "overlayfs", callers(1), samples, unit="ms, median", take="p50_ms")
        if OURS in services:
            for depth in bench.plan.chain_depths:
                yield _mounting(bench, services[OURS], depth)


def _mounting(bench: Bench, service: Service, depth: int) -> Figure:
    """Time the client's mount helper, mount and unmount; mount(8) fails from about 42 layers on."""
    bench.say(f"mounting {depth} layers")
    mounts = [
        Mount(mount.type, mount.source, mount.options)
        for mount in service.calls.prepare(f"mounted-{depth}", f"layer-{depth - 1}")
    ]
    times = []
    with scratch.directory("snapbroker-bench-mount") as target:
        for _ in range(MOUNTS):
            begun = time.perf_counter()
            with snapbroker.mount.mounted(mounts, target):
                pass
            times.append((time.perf_counter() - begun) * 1000)
    work = f"mount and unmount {depth} layer{'s' * (depth > 1)}"
    return Figure(work, "overlayfs", callers(1), "ms, median", tuple(times), baseline="")
