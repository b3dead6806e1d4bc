"""Loads our broker and prints one JSON document: the callers are asyncio tasks of this one program.

Each task makes its next call when the one before is answered, so the number of callers is the number of calls
under way; what tasks call in the same turn of the loop, the client library sends as one message.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import snapbroker.aio
from benchmarks.callers import measured, subscribers

Call = Callable[[int], Awaitable[object]]
"""A call, given a number that no other call of its load has."""
READ_BYTES = 4096


class Work:
    """The operations that can be measured."""

    def __init__(self, broker: Any, options: argparse.Namespace, prefix: str) -> None:
        self.broker, self.options, self.prefix = broker, options, prefix

    def key(self, number: int) -> str:
        return f"{self.prefix}-{number}"

    def known(self, number: int) -> str:
        return self.key(number % self.options.keys)

    async def prepare(self, number: int) -> None:
        await self.broker.prepare(self.key(number), self.options.parent)

    async def cycle(self, number: int) -> None:
        key = self.key(number)
        await self.broker.prepare(key, self.options.parent)
        await self.broker.commit(f"{key}-committed", key)
        await self.broker.remove(f"{key}-committed")

    async def drop(self, number: int) -> None:
        await self.broker.remove(self.key(number))

    async def chain(self, number: int) -> None:
        key = self.key(number)
        await self.broker.prepare(f"{key}-active", self.key(number - 1) if number else self.options.parent)
        await self.broker.commit(key, f"{key}-active")

    async def stat(self, number: int) -> None:
        await self.broker.stat(self.known(number))

    async def mounts(self, number: int) -> None:
        await self.broker.mounts(self.known(number))

    async def usage(self, number: int) -> None:
        await self.broker.usage(self.known(number))

    async def walk(self, number: int) -> None:
        count = 0
        async for _ in self.broker.walk():
            count += 1
        if count < self.options.keys:
            raise RuntimeError(f"the walk gave {count} infos, at least {self.options.keys} were expected")

    async def settle(self, number: int) -> None:
        await self.broker.cleanup()

    fill = prepare


async def run(
    callers: int, call: Call, *, operations: int = 0, until: Callable[[float], bool]
) -> tuple[list[float], float]:
    """Run a closed loop: one latency a call, and the seconds from its beginning to the last answer.

    It ends after `operations` calls, or without them once `until` says so of a moment.
    """
    latencies: list[float] = []
    numbers = itertools.count()

    async def caller() -> None:
        clock = time.perf_counter
        moment = clock()
        while not until(moment):
            number = next(numbers)
            if operations and number >= operations:
                return
            await call(number)
            before, moment = moment, clock()
            latencies.append(moment - before)

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    return latencies, time.perf_counter() - begun


def never(moment: float) -> bool:
    return False


def after(seconds: float) -> Callable[[float], bool]:
    """Say whether `seconds` have passed from this call on."""
    end = time.perf_counter() + seconds
    return end.__le__


@contextlib.asynccontextmanager
async def end_of_input() -> AsyncIterator[Callable[[float], bool]]:
    """Say whether standard input is at its end."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def read() -> None:
        if not os.read(sys.stdin.fileno(), READ_BYTES):
            ended.set()
            loop.remove_reader(sys.stdin.fileno())

    loop.add_reader(sys.stdin.fileno(), read)
    try:
        yield lambda moment: ended.is_set()
    finally:
        loop.remove_reader(sys.stdin.fileno())


async def measure(broker: Any, options: argparse.Namespace) -> str:
    work = Work(broker, options, options.prefix)
    call: Call = getattr(work, options.operation)
    once = options.operation == "settle"
    if options.warmup:
        reading = options.operation in {"stat", "mounts", "usage", "walk"}
        warm = Work(broker, options, options.prefix if reading else f"warm-{options.prefix}")
        await run(options.callers, getattr(warm, options.operation), until=after(options.warmup))
    if options.until_eof:
        async with end_of_input() as until:
            print("ready", flush=True)
            latencies, seconds = await run(options.callers, call, until=until)
    else:
        operations = 1 if once else options.operations
        until = never if operations else after(options.seconds)
        latencies, seconds = await run(options.callers, call, operations=operations, until=until)
    return measured.report(options.operation, options.callers, latencies, seconds)


async def fanout(broker: Any, options: argparse.Namespace) -> str:
    """Prepare `operations` snapshots while `subscribers` listen; measure until every subscriber has every event."""
    work = Work(broker, options, options.prefix)
    probe = Work(broker, options, f"probe-{options.prefix}")
    topic = f"{options.snapshotter}/{options.namespace}/snapshot/prepare"
    async with subscribers.start(options.events, topic, options.subscribers, options.operations) as listeners:
        for number in itertools.count():
            await probe.prepare(number)
            if await listeners.heard():
                break
        await listeners.counting()
        begun = time.time()
        latencies, seconds = await run(options.callers, work.prepare, operations=options.operations, until=never)
        deliveries, ended = await listeners.result()
    expected = options.operations * options.subscribers
    return measured.report(
        "fanout", options.callers, latencies, seconds, subscribers=options.subscribers, deliveries=deliveries,
        lost=expected - deliveries, delivery_rate=deliveries / (ended - begun),
    )  # fmt: skip


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-address", required=True, help="the broker's endpoint")
    parser.add_argument("-events", default="", help="the broker's endpoint for subscribers")
    parser.add_argument("-namespace", default="bench")
    parser.add_argument("-snapshotter", default="overlayfs")
    parser.add_argument("-operation", default="stat")
    parser.add_argument("-parent", default="")
    parser.add_argument("-prefix", default="key")
    parser.add_argument("-callers", type=int, default=1)
    parser.add_argument("-subscribers", type=int, default=1)
    parser.add_argument("-operations", type=int, default=0)
    parser.add_argument("-keys", type=int, default=1)
    parser.add_argument("-seconds", type=float, default=1)
    parser.add_argument("-warmup", type=float, default=0)
    parser.add_argument("-until-eof", action="store_true", dest="until_eof")
    options = parser.parse_args()
    connection = snapbroker.aio.connect(options.address, namespace=options.namespace, snapshotter=options.snapshotter)
    async with connection as broker:
        operate = fanout if options.operation == "fanout" else measure
        print(await operate(broker, options))


if __name__ == "__main__":
    asyncio.run(main())
