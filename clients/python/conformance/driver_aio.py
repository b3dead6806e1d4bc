"""The asyncio client's driver: does the steps that come on stdin, and says what came of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable
from typing import Any

import values
from values import AnyStep, Batch, Churn, Events, Open, Status, Step, Together, Walk, failure, value

from snapbroker import aio
from snapbroker.errors import BrokerError


class Driver:
    """A connection, and what each step makes of it."""

    def __init__(self) -> None:
        self.snapshotter = ""
        self.connection = contextlib.AsyncExitStack()

    async def open(self, **settings: Any) -> None:
        """Close the connection there is and open another."""
        await self.connection.aclose()
        self.snapshotter = settings.get("snapshotter") or os.environ["SNAPBROKER_SNAPSHOTTER"]
        self.broker = await self.connection.enter_async_context(aio.connect(**settings))

    async def do(self, step: AnyStep) -> dict[str, Any]:
        """The outcome of a step."""
        if isinstance(step, Open):
            await self.open(**step.settings())
            return {"ok": {}}
        return await outcome(self.answer(step))

    async def answer(self, step: AnyStep) -> Any:
        """The answer of a step; its error is raised."""
        broker = self.view(step)
        if isinstance(step, Batch):
            return {"results": await in_batch(broker, step)}
        if isinstance(step, Together):
            return {"results": await asyncio.gather(*(outcome(one(broker, call)) for call in step.calls))}
        if isinstance(step, Churn):
            return {"calls": await churn(broker, step)}
        if isinstance(step, Walk):
            walk = step.call(broker)
            infos = [value(info) async for info in walk]
            return {"infos": infos, "sequence": walk.sequence}
        if isinstance(step, Events):
            return {"events": await taken(step.call(broker), step.count)}
        if isinstance(step, Status):
            return {"snapshotters": sorted(actor.name for actor in (await step.call(broker)).snapshotters)}
        return await one(broker, step)

    def view(self, step: Step) -> aio.Broker:
        """The broker that the step is for."""
        if step.snapshotter is None and step.namespace is None:
            return self.broker
        return self.broker.snapshotter(step.snapshotter or self.snapshotter, namespace=step.namespace)


async def one(broker: aio.Broker, call: Step) -> Any:
    """The answer of one call."""
    return value(await call.call(broker))


async def outcome(answer: Awaitable[Any]) -> dict[str, Any]:
    """The answer, or the error instead of it."""
    try:
        return {"ok": await answer}
    except BrokerError as error:
        return failure(error)


async def in_batch(broker: aio.Broker, step: Batch) -> list[dict[str, Any]]:
    """What came of each call of a batch; an error of the whole is raised where no call has an outcome."""
    options = {} if step.timeout_ms is None else {"timeout": step.timeout_ms / 1000}
    answers = []
    try:
        async with broker.batch(step.atomic, **options) as batch:
            answers = [call.call(batch) for call in step.calls]
    except BrokerError:
        if len(answers) < len(step.calls) or not any(answer.done() for answer in answers):
            raise
    return [await outcome(result(answer)) for answer in answers]


async def result(answer: Any) -> Any:
    """The answer that a call of a batch has."""
    return value(answer.result())


async def taken(events: Any, count: int | None) -> list[Any]:
    """The events to the end of the journal, or so many."""
    found: list[Any] = []
    async with events:
        while count is None or len(found) < count:
            event = await anext(events, None)
            if event is None:
                break
            found.append(value(event))
    return found


async def churn(broker: aio.Broker, step: Churn) -> int:
    """Prepare, and remove or commit, or both, `count` times by `callers` at a time; answers the number of calls."""
    numbers = iter(range(step.count))

    async def caller() -> int:
        calls = 0
        for number in numbers:
            key = f"{step.prefix}-{number}"
            fence = (await broker.prepare(key, step.parent)).fence
            calls += 2
            if number % 3 == 0:
                await broker.remove(key, fence)
                continue
            await broker.commit(f"{key}-made", key, fence=fence)
            if number % 3 == 2:
                await broker.remove(f"{key}-made")
                calls += 1
        return calls

    return sum(await asyncio.gather(*(caller() for _ in range(step.callers))))


async def main() -> None:
    """Step by step, until there is no more."""
    driver = Driver()
    await driver.open()
    values.write({"ready": "python-asyncio"})
    while line := await asyncio.to_thread(sys.stdin.buffer.readline):
        step = values.read_step(line)
        values.write({"id": step.id, **await driver.do(step)})
    await driver.connection.aclose()


if __name__ == "__main__":
    asyncio.run(main())
