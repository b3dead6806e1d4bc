"""The verbs under load: prepare, the life of a layer, and the reads, at a few numbers of callers."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench import BASE, Bench
from benchmarks.figures import Figure, callers, compare
from benchmarks.services import Sample, blocking, load

READS = ("stat", "mounts", "usage")
FILL_CALLERS = 64


def prepare(bench: Bench, backend: str) -> Iterator[Figure]:
    """Prepare from a small base."""
    yield from _changing(bench, backend, "prepare", "prepare")


def cycle(bench: Bench, backend: str) -> Iterator[Figure]:
    """Prepare, commit and remove, one after the other."""
    yield from _changing(bench, backend, "cycle", "prepare + commit + remove")


def _changing(bench: Bench, backend: str, operation: str, work: str) -> Iterator[Figure]:
    for count in bench.plan.callers:
        bench.say(f"{work}, {backend}, {callers(count)}")

        def measure(side: str, count: int = count) -> Sample:
            # A store of its own every time: what one load leaves behind does not weigh on the next.
            with bench.service(side, backend, with_base=True) as service:
                return load(service, operation, callers=count, parent=BASE, prefix=operation, **_duration(bench))

        samples = bench.alternate(measure)
        yield compare(work, backend, callers(count), samples)
        if count == 1:
            yield compare(work, backend, callers(count), samples, unit="ms, median", take="p50_ms")


def _duration(bench: Bench) -> dict[str, float]:
    return {"seconds": bench.plan.seconds, "warmup": bench.plan.warmup}


def reads(bench: Bench, backend: str) -> Iterator[Figure]:
    """Stat, mounts and usage of active, empty snapshots."""
    keys = bench.plan.read_keys
    with bench.services(backend) as services:
        for service in services.values():
            load(service, "fill", callers=FILL_CALLERS, operations=keys, parent=BASE, prefix="read")
        for operation in READS:
            for count in bench.plan.callers:
                bench.say(f"{operation}, {backend}, {callers(count)}")

                def measure(side: str, operation: str = operation, count: int = count) -> Sample:
                    service = services[side]
                    return load(service, operation, callers=count, keys=keys, prefix="read", **_duration(bench))

                samples = bench.alternate(measure)
                yield compare(operation, backend, callers(count), samples)
                if count == 1:
                    yield compare(operation, backend, callers(count), samples, unit="ms, median", take="p50_ms")


def latency(bench: Bench) -> Iterator[Figure]:
    """One blocking Python program on either side, which asks for the stat of one snapshot."""
    bench.say("stat, one blocking Python caller")
    with bench.services("overlayfs") as services:
        samples = bench.alternate(lambda side: blocking(services[side], BASE, bench.plan.seconds))
    yield compare(
        "stat, one blocking Python caller", "overlayfs", callers(1), samples, unit="ms, median", take="p50_ms"
    )


def walk(bench: Bench) -> Iterator[Figure]:
    """Walk over the whole list, every info of it in the caller's hands."""
    infos = bench.plan.walk_infos
    with bench.services("overlayfs") as services:
        for service in services.values():
            load(service, "fill", callers=FILL_CALLERS, operations=infos, parent=BASE, prefix="walk")
        for count in bench.plan.callers:
            bench.say(f"walk of {infos:,}, {callers(count)}")

            def measure(side: str, count: int = count) -> Sample:
                return load(services[side], "walk", callers=count, keys=infos, seconds=bench.plan.seconds)

            samples = bench.alternate(measure)
            yield compare("walk", "overlayfs", callers(count), samples, unit="walks/s")
            if count == 1:
                yield compare("walk", "overlayfs", callers(count), samples, unit="ms, median", take="p50_ms")
