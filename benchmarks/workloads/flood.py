"""What a client that calls now and then feels of one that floods the same snapshotter."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict

from benchmarks import scratch, services
from benchmarks.bench import BASE, Bench
from benchmarks.figures import Figure, Target, callers
from benchmarks.services import OURS, Sample, Service, load

RATIO_MAX = 3.0
"""The 99th percentile of the good client, as a multiple of the quiet one."""
FLOODS = (("stat", 1000, 1), ("stat", 64, 256), ("prepare", 1000, 1), ("prepare", 64, 256))
"""What floods, in how many open requests, of how many calls each."""


def flood(bench: Bench, operation: str, requests: int, calls: int) -> Iterator[Figure]:
    """One caller of stat and of prepare, quiet and beside a flood, in turns on one service."""
    if OURS in bench.sides:
        at = f"beside {requests} requests of {calls} {operation}"
        for work in ("stat", "prepare"):
            bench.say(f"{work} {at}")
            quiet: list[Sample] = []
            flooded: list[Sample] = []
            for number in range(bench.plan.rounds):
                with bench.service(OURS, "overlayfs", with_base=True) as service:
                    load(service, "fill", callers=1, operations=1, parent=BASE, prefix="flood")
                    quiet.append(_good(bench, service, work, f"quiet-{number}"))
                    with flooding(bench, service, operation, requests, calls):
                        flooded.append(_good(bench, service, work, f"flooded-{number}"))
            samples = {"flooded": [asdict(sample) for sample in flooded], "quiet": [asdict(sample) for sample in quiet]}
            for unit, take in (("ms, p99", "p99_ms"), ("ms, median", "p50_ms")):
                values, against = (tuple(getattr(sample, take) for sample in taken) for taken in (flooded, quiet))
                target = Target(at_most=RATIO_MAX) if take == "p99_ms" else None
                yield Figure(
                    work, "overlayfs", at, unit, values, against,
                    baseline=f"{callers(1)}, quiet", target=target, samples=samples,
                )  # fmt: skip


def _good(bench: Bench, service: Service, work: str, prefix: str) -> Sample:
    prefix = "flood" if work == "stat" else prefix
    return load(
        service, work, callers=1, parent=BASE, prefix=prefix, seconds=bench.plan.seconds, warmup=bench.plan.warmup
    )


@contextlib.contextmanager
def flooding(bench: Bench, service: Service, operation: str, requests: int, calls: int) -> Iterator[None]:
    """A program that floods, from its first reply on."""
    address = service.command("stat")
    options = {
        "address": next(word.removeprefix("-address=") for word in address if word.startswith("-address=")),
        "operation": operation, "requests": requests, "calls": calls, "parent": BASE,
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.callers.flood", *services.flags(options)]
    with scratch.program(command, stdin=subprocess.PIPE) as program:
        assert program.stdout is not None
        if program.stdout.readline() != "ready\n":
            raise RuntimeError(f"{' '.join(command)}: {program.communicate()[1]}")
        yield
        output, errors = program.communicate()
        if program.returncode:
            raise RuntimeError(f"{' '.join(command)}: {errors}")
    told = json.loads(output)
    bench.say(f"the flood had {told['rate']:,.0f} calls/s answered, {told['refused']:,} requests refused")
