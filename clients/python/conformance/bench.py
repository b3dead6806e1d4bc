"""What the client takes for a call, how many it makes with many callers, and how fast it receives events.

python bench.py blocking|asyncio --endpoint E --events-endpoint V --snapshotter S --namespace N
                --work latency|throughput|events --seconds T --callers C
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import values

import snapbroker
from snapbroker import aio

KEY = "bench"
END = "bench-end"
IDLE_SECONDS = 60.0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("client", choices=("blocking", "asyncio"))
    for name in ("endpoint", "events-endpoint", "snapshotter", "namespace"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--work", required=True, choices=("latency", "throughput", "events"))
    parser.add_argument("--seconds", required=True, type=float)
    parser.add_argument("--callers", required=True, type=int)
    return parser.parse_args()


def settings(options: argparse.Namespace) -> dict[str, str]:
    """The arguments of `connect`."""
    return {name: getattr(options, name) for name in ("endpoint", "events_endpoint", "snapshotter", "namespace")}


# One caller.


def latency(options: argparse.Namespace) -> dict[str, Any]:
    """Stat by a blocking caller."""
    with snapbroker.connect(**settings(options)) as broker:
        broker.stat(KEY)
        times: list[float] = []
        clock = time.perf_counter
        moment = begun = clock() + options.seconds / 10
        while clock() < begun:
            broker.stat(KEY)
        moment = begun = clock()
        until = begun + options.seconds
        while moment < until:
            broker.stat(KEY)
            before, moment = moment, clock()
            times.append(moment - before)
    return latencies(times, moment - begun)


async def latency_of_task(options: argparse.Namespace) -> dict[str, Any]:
    """Stat by one task."""
    async with aio.connect(**settings(options)) as broker:
        await broker.stat(KEY)
        times: list[float] = []
        clock = time.perf_counter
        moment = begun = clock() + options.seconds / 10
        while clock() < begun:
            await broker.stat(KEY)
        moment = begun = clock()
        until = begun + options.seconds
        while moment < until:
            await broker.stat(KEY)
            before, moment = moment, clock()
            times.append(moment - before)
    return latencies(times, moment - begun)


def latencies(times: list[float], seconds: float) -> dict[str, Any]:
    """The figures of one caller's calls."""
    percentiles = statistics.quantiles(times, n=100)
    return {
        "work": "latency",
        "calls": len(times),
        "seconds": seconds,
        "p50_ms": percentiles[49] * 1000,
        "p99_ms": percentiles[98] * 1000,
    }


# Many callers.


def throughput(options: argparse.Namespace) -> dict[str, Any]:
    """Stat by threads."""
    with snapbroker.connect(**settings(options)) as broker, ThreadPoolExecutor(options.callers) as threads:
        broker.stat(KEY)
        clock = time.perf_counter
        begun = clock() + options.seconds / 10
        until = begun + options.seconds

        def caller(_: int) -> tuple[int, float]:
            calls, moment = 0, clock()
            while moment < until:
                broker.stat(KEY)
                moment = clock()
                calls += moment > begun
            return calls, moment

        return rates(list(threads.map(caller, range(options.callers))), begun)


async def throughput_of_tasks(options: argparse.Namespace) -> dict[str, Any]:
    """Stat by tasks."""
    async with aio.connect(**settings(options)) as broker:
        await broker.stat(KEY)
        clock = time.perf_counter
        begun = clock() + options.seconds / 10
        until = begun + options.seconds

        async def caller() -> tuple[int, float]:
            calls, moment = 0, clock()
            while moment < until:
                await broker.stat(KEY)
                moment = clock()
                calls += moment > begun
            return calls, moment

        return rates(await asyncio.gather(*(caller() for _ in range(options.callers))), begun)


def rates(callers: list[tuple[int, float]], begun: float) -> dict[str, Any]:
    """The figures of all callers: how many calls each had answered since `begun`, and when the last one was."""
    calls = sum(count for count, _ in callers)
    seconds = max(moment for _, moment in callers) - begun
    return {"work": "throughput", "calls": calls, "seconds": seconds, "per_second": calls / seconds}


# A subscriber.


def events(options: argparse.Namespace) -> dict[str, Any]:
    """A blocking subscriber."""
    with snapbroker.connect(**settings(options)) as broker, broker.events(silence=IDLE_SECONDS) as stream:
        values.write({"ready": True})
        event = stream.poll(IDLE_SECONDS)
        begun = time.perf_counter()
        for count in itertools.count(1):
            if event is None:
                raise SystemExit(f"no event came for {IDLE_SECONDS:g} s")
            if event.key == END:
                return received(count, time.perf_counter() - begun, stream.statistics().gaps)
            event = next(stream)
    raise AssertionError


async def events_of_task(options: argparse.Namespace) -> dict[str, Any]:
    """A subscriber in a task."""
    async with aio.connect(**settings(options)) as broker, broker.events(silence=IDLE_SECONDS) as stream:
        values.write({"ready": True})
        event = await stream.poll(IDLE_SECONDS)
        begun = time.perf_counter()
        for count in itertools.count(1):
            if event is None:
                raise SystemExit(f"no event came for {IDLE_SECONDS:g} s")
            if event.key == END:
                return received(count, time.perf_counter() - begun, stream.statistics().gaps)
            event = await anext(stream)
    raise AssertionError


def received(count: int, seconds: float, gaps: int) -> dict[str, Any]:
    """The figures of a subscriber."""
    rate = count / seconds if seconds else math.inf
    return {"work": "events", "events": count, "seconds": seconds, "per_second": rate, "gaps": gaps}


BLOCKING: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "latency": latency,
    "throughput": throughput,
    "events": events,
}
ASYNCIO: dict[str, Callable[[argparse.Namespace], Any]] = {
    "latency": latency_of_task,
    "throughput": throughput_of_tasks,
    "events": events_of_task,
}


def main() -> None:
    """Do the work and write its figures."""
    options = arguments()
    if options.client == "blocking":
        values.write(BLOCKING[options.work](options))
    else:
        values.write(asyncio.run(ASYNCIO[options.work](options)))


if __name__ == "__main__":
    main()
