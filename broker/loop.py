"""The loop that every process of the broker runs on.

A message wakes the broker twice and the actor once, and each time the loop itself is a good part of the work: with
libuv's a lone caller's stat takes 0.25 ms where it takes 0.29 with the standard library's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple, Unpack

import anyio

Arguments = TypeVarTuple("Arguments")
T = TypeVar("T")


def run(main: Callable[[Unpack[Arguments]], Awaitable[T]], *arguments: *Arguments) -> T:
    """Run `main` until it returns; what it raises is raised."""
    return anyio.run(main, *arguments, backend="asyncio", backend_options={"use_uvloop": True})
