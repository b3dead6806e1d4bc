"""A method of the service for grpcio: bytes in, bytes out, and what became of its calls.

grpcio would parse and build the messages just as well; here that is part of a call, so that a message which cannot be
read has a status of its own and is counted like any other.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from snapbroker_containerd.status import Refusal

Answer = Callable[[bytes], Awaitable[bytes]]
"""From a request's message to its answer's; raises Refusal."""
Stream = Callable[[bytes], AsyncIterator[bytes]]
"""From a request's message to the messages of its answer; raises Refusal."""
Context = Any
"""grpcio's `ServicerContext`, which has no types."""


class Method:
    """One method: its handler, and the figures of its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.tasks: set[asyncio.Task[Any]] = set()
        self.failures: Counter[str] = Counter()
        self.seconds = 0.0
        self.seconds_max = 0.0

    def answering(self, answer: Answer) -> Any:
        """The handler of a method with one message each way."""

        async def handle(message: bytes, context: Context) -> bytes:
            begun = self._begin()
            try:
                return await answer(message)
            except BaseException as error:
                await self._fail(error, context)
                raise
            finally:
                self._end(begun)

        return grpc.unary_unary_rpc_method_handler(handle)

    def streaming(self, stream: Stream) -> Any:
        """The handler of a method that answers a stream of messages."""

        async def handle(message: bytes, context: Context) -> AsyncIterator[bytes]:
            begun = self._begin()
            try:
                async for part in stream(message):
                    yield part
            except BaseException as error:
                await self._fail(error, context)
                raise
            finally:
                self._end(begun)

        return grpc.unary_stream_rpc_method_handler(handle)

    def _begin(self) -> float:
        self.calls += 1
        self.tasks.add(_task())
        return time.monotonic()

    def _end(self, begun: float) -> None:
        seconds = time.monotonic() - begun
        self.tasks.discard(_task())
        self.seconds += seconds
        self.seconds_max = max(self.seconds_max, seconds)

    async def _fail(self, error: BaseException, context: Context) -> None:
        """Count a call that failed; end it with the status of a Refusal."""
        if isinstance(error, Refusal):
            self.failures[error.status.name.lower()] += 1
            await context.abort(error.status, error.message)
        self.failures["internal" if isinstance(error, Exception) else "cancelled"] += 1

    def statistics(self) -> dict[str, Any]:
        """Calls, those still open, mean and longest time of the others in microseconds, failures by status."""
        ended = self.calls - len(self.tasks)
        return {
            "calls": self.calls,
            "open": len(self.tasks),
            "mean_us": round(self.seconds / ended * 1e6) if ended else 0,
            "max_us": round(self.seconds_max * 1e6),
            "failures": dict(self.failures),
        }


def _task() -> asyncio.Task[Any]:
    """The task that grpcio runs a call in."""
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a call runs in a task")
    return task
