"""The asyncio client's recorder: a task for each namespace, all on one connection."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys

import values
from mirror import WAIT_SECONDS, Mirror

from snapbroker import aio
from snapbroker.errors import OutOfRange


async def record(broker: aio.Broker, begun: asyncio.Barrier) -> None:
    """State, then stream, until the end of the namespace."""
    mirror = Mirror(broker.namespace)
    first = True
    while not mirror.ended:
        walk = broker.walk()
        infos = [info async for info in walk]
        mirror.walked(infos, walk.sequence)
        async with broker.events(walk.sequence) as events:
            if first:
                if await begun.wait() == 0:
                    values.write({"ready": True})
                first = False
            with contextlib.suppress(OutOfRange):
                while not mirror.ended:
                    mirror.apply(await anext(events))
            mirror.gaps += events.statistics().gaps
    mirror.end()


async def main(namespaces: list[str]) -> None:
    """Record all namespaces to their ends."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    snapshotter = os.environ["SNAPBROKER_SNAPSHOTTER"]
    begun = asyncio.Barrier(len(namespaces))
    async with aio.connect(timeout=WAIT_SECONDS, patience=WAIT_SECONDS) as connection, asyncio.TaskGroup() as records:
        for namespace in namespaces:
            records.create_task(record(connection.snapshotter(snapshotter, namespace=namespace), begun))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
