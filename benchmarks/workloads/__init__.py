"""Everything that can be measured, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.bench import Bench
from benchmarks.figures import Figure
from benchmarks.plan import BACKENDS, Plan
from benchmarks.workloads import bridge, calls, clients, copies, daemon, flood, scale

Workload = Callable[[Bench], Iterator[Figure]]


def workloads(plan: Plan) -> dict[str, Workload]:
    """Name to workload, in the order in which they are run."""
    named: dict[str, Workload] = {"memory": daemon.memory, "latency": calls.latency}
    for backend in BACKENDS:
        named[f"prepare.{backend}"] = partial(calls.prepare, backend=backend)
        named[f"cycle.{backend}"] = partial(calls.cycle, backend=backend)
        named[f"reads.{backend}"] = partial(calls.reads, backend=backend)
    for operation, requests, count in flood.FLOODS:
        named[f"flood.{operation}.{count}"] = partial(flood.flood, operation=operation, requests=requests, calls=count)
    named["walk"] = calls.walk
    named["bridge.verbs"] = bridge.verbs
    named["bridge.unpack"] = bridge.unpack
    named["fanout"] = daemon.fanout
    named["clients"] = clients.clients
    named["chains"] = scale.chains
    for filesystem in ("ext4", "btrfs"):
        named[f"copy.{filesystem}"] = partial(copies.copy, filesystem=filesystem)
    named["during.copy"] = copies.during_copy
    named["during.removal"] = copies.during_removal
    for backend, levels in plan.scale:
        named[f"scale.{backend}"] = partial(scale.crowded, backend=backend, levels=levels)
    return named
