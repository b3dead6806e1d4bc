"""Subscribers of the broker's events in a process of their own, so that they do not slow the callers down."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator

import zmq

QUIET_SECONDS = 0.5
"""How long nothing may arrive before what has not arrived counts as lost."""
PROBE_SECONDS = 0.05
"""How long a probe may take to reach every subscriber."""


class Listeners:
    """The other process, seen from the callers' one."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        self._process, self._output = process, process.stdout

    async def heard(self) -> bool:
        """Whether every subscriber has heard of something: a subscription has no answer that says it has begun."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBE_SECONDS):
                await self._expect(b"heard\n")
                return True
        return False

    async def counting(self) -> None:
        """Wait until what was sent before is out of the way."""
        await self._expect(b"counting\n")

    async def _expect(self, line: bytes) -> None:
        if await self._output.readline() != line:
            raise RuntimeError("the subscribers ended early")

    async def result(self) -> tuple[int, float]:
        """How many events all subscribers have received together, and when (wall clock) the last one came."""
        document = json.loads(await self._output.readline())
        return document["deliveries"], document["ended"]


@contextlib.asynccontextmanager
async def start(endpoint: str, topic: str, count: int, events: int) -> AsyncIterator[Listeners]:
    """Run `count` subscribers to `topic`, each of which waits for `events` events."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, endpoint, topic, str(count), str(events), stdout=asyncio.subprocess.PIPE
    )
    try:
        yield Listeners(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def main(endpoint: str, topic: str, count: str, events: str) -> None:
    context = zmq.Context()
    poller = zmq.Poller()
    heard = dict.fromkeys((_subscriber(context, endpoint, topic) for _ in range(int(count))), False)
    for socket in heard:
        poller.register(socket, zmq.POLLIN)
    while not all(heard.values()):
        for socket, _ in poller.poll():
            _drain(socket)
            heard[socket] = True
    print("heard", flush=True)
    # The probes that are still under way do not count.
    while ready := poller.poll(int(QUIET_SECONDS * 1000)):
        for socket, _ in ready:
            _drain(socket)
    print("counting", flush=True)
    deliveries, ended = _receive(poller, int(count) * int(events))
    print(json.dumps({"deliveries": deliveries, "ended": ended}), flush=True)
    context.destroy(linger=0)


def _subscriber(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, topic: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.SUB)
    socket.rcvhwm = 0
    socket.subscribe(topic.encode())
    socket.connect(endpoint)
    return socket


def _drain(socket: zmq.Socket[bytes]) -> int:
    """Take every event that is there."""
    count = 0
    with contextlib.suppress(zmq.Again):
        while True:
            socket.recv_multipart(zmq.NOBLOCK)
            count += 1
    return count


def _receive(poller: zmq.Poller, expected: int) -> tuple[int, float]:
    """Count what arrives until all of it has, or nothing more comes."""
    deliveries, ended = 0, time.time()
    quiet = None
    while deliveries < expected and (ready := poller.poll(quiet)):
        deliveries += sum(_drain(socket) for socket, _ in ready)
        ended = time.time()
        quiet = int(QUIET_SECONDS * 1000)
    return deliveries, ended


if __name__ == "__main__":
    main(*sys.argv[1:])
