"""The native snapshotter's copy: how long it takes, and what readers feel of it and of a large removal."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from benchmarks import scratch, trees
from benchmarks.bench import Bench
from benchmarks.figures import Figure, Target, callers
from benchmarks.services import OURS, PEER, Sample, Service, active, base, load, load_during

COPY_RATIO_MAX = 1.2
STALL_RATIO_MAX = 3.0
CP = "cp -a"
CP_SYNCED = "cp -a, then sync"
READ_KEY = "read-0"


def copy(bench: Bench, filesystem: str) -> Iterator[Figure]:
    """Prepare from a base of many files on ext4 (or what /var/tmp is) or btrfs, where files are reflinked."""
    plan = bench.plan
    bench.say(f"native copy of {plan.copy_files:,} files, {filesystem}")
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(bench.place("btrfs" if filesystem == "btrfs" else "native"))
        source = place / "source"
        source.mkdir()
        trees.many(source, plan.copy_files, plan.copy_bytes)
        ways: dict[str, Callable[[int], float]] = {
            CP: lambda number: _cp(source, place, number, synced=False),
            CP_SYNCED: lambda number: _cp(source, place, number, synced=True),
        }
        for side in bench.sides:
            root = place / side
            root.mkdir()
            service = stack.enter_context(bench.sides[side].start("native", root))
            base(service, "tree", lambda target: _same(source, target))
            ways[side] = partial(_prepare, service)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(plan.rounds):
            for way, run in ways.items():
                scratch.run(["sync", "--file-system", str(place)])
                seconds[way].append(run(number))
    at = f"{plan.copy_files:,} files, {plan.copy_bytes >> 20} MiB, {filesystem}"
    for subject in bench.sides:
        for baseline in [CP, CP_SYNCED] + [PEER] * (subject == OURS and PEER in bench.sides):
            target = Target(at_most=COPY_RATIO_MAX, aim=1) if (subject, baseline) == (OURS, CP) else None
            yield Figure(
                "prepare", "native", at, "s", tuple(seconds[subject]), tuple(seconds[baseline]),
                subject=subject, baseline=baseline, target=target,
            )  # fmt: skip


def _same(source: Path, target: Path) -> None:
    scratch.run(["cp", "--archive", "--reflink=auto", f"{source}/.", str(target)])


def _cp(source: Path, place: Path, number: int, *, synced: bool) -> float:
    copied = place / f"copied-{number}-{synced}"
    begun = time.perf_counter()
    scratch.run(["cp", "--archive", "--reflink=auto", str(source), str(copied)])
    if synced:
        scratch.run(["sync", "--file-system", str(place)])
    seconds = time.perf_counter() - begun
    scratch.delete(copied)
    return seconds


def _prepare(service: Service, number: int) -> float:
    begun = time.perf_counter()
    service.calls.prepare(f"copy-{number}", "tree")
    seconds = time.perf_counter() - begun
    service.calls.remove(f"copy-{number}")
    service.settle()
    return seconds


def during_copy(bench: Bench) -> Iterator[Figure]:
    """Stat while the same actor copies a large base."""
    size = bench.plan.large_copy_bytes

    def arrange(service: Service, number: int) -> Callable[[], object]:
        if number == 0:
            base(service, "large", lambda target: trees.large(target, size))
        return lambda: service.calls.prepare(f"large-{number}", "large")

    def tidy(service: Service, number: int) -> None:
        service.calls.remove(f"large-{number}")

    yield from _during(bench, f"a copy of {size / 2**30:g} GiB", arrange, tidy)


def during_removal(bench: Bench) -> Iterator[Figure]:
    """Stat while the same actor deletes many files."""
    files = bench.plan.removal_files

    def arrange(service: Service, number: int) -> Callable[[], object]:
        active(service, f"many-{number}", lambda target: trees.empty(target, files))

        def work() -> None:
            service.calls.remove(f"many-{number}")
            service.settle()

        return work

    yield from _during(bench, f"a removal of {files:,} files", arrange, lambda service, number: None)


def _during(
    bench: Bench,
    what: str,
    arrange: Callable[[Service, int], Callable[[], object]],
    tidy: Callable[[Service, int], None],
) -> Iterator[Figure]:
    """Compare the stat latencies of one caller during some work with the idle ones of the same service."""
    for side in bench.sides:
        if shutil.disk_usage(scratch.DISK).free < 4 * bench.plan.large_copy_bytes:
            raise RuntimeError(f"{scratch.DISK} needs {4 * bench.plan.large_copy_bytes >> 30} GiB of free space")
        bench.say(f"{side}: stat during {what}")
        idle: list[Sample] = []
        busy: list[Sample] = []
        with bench.service(side, "native") as service:
            service.calls.prepare(READ_KEY)
            for number in range(bench.plan.rounds):
                work = arrange(service, number)
                scratch.run(["sync", "--file-system", str(scratch.DISK)])
                idle.append(load(service, "stat", prefix="read", seconds=bench.plan.seconds, warmup=bench.plan.warmup))
                sample, seconds = load_during(service, work, "stat", prefix="read")
                bench.say(f"{side}: {what} took {seconds:.2f} s, longest stat {sample.max_ms:.1f} ms")
                busy.append(sample)
                tidy(service, number)
                service.settle()
        yield Figure(
            f"stat during {what}", "native", callers(1), "ms, p99",
            tuple(sample.p99_ms for sample in busy), tuple(sample.p99_ms for sample in idle),
            subject=side, baseline=f"{side}, idle", target=Target(at_most=STALL_RATIO_MAX) if side == OURS else None,
            samples={"busy": [asdict(sample) for sample in busy], "idle": [asdict(sample) for sample in idle]},
        )  # fmt: skip
