"""Bounded waiting: while the broker or an actor is away, a call is repeated, and never done twice.

containerd sets no deadline and, in some calls, holds its own database meanwhile (C75, C141). So a call waits a few
seconds for what is away and then fails UNAVAILABLE. What was refused can simply be repeated. The hard part is a call
whose reply was lost: the broker, or the actor, died with it in its hands.

What can be said of it. A process that died decides nothing any more, and its successor holds the lock of the same
root before it answers. So what the successor answers to a look is final, and tells whether the lost call took
effect:

- Prepare and View: there is a snapshot under the key, of the kind and with the parent that were asked for, created
  between the sending of the call and the loss of its reply, by the broker's clock, which is this machine's. Keys that
  containerd sends hold a number that it never uses twice (C72), so nobody else made that snapshot, and it is answered
  as if nothing had happened. Where two callers of the bridge have lost the same key, nobody can tell whose it is, and
  both fail. A snapshot that is older is not ours: the repeated call says ALREADY_EXISTS.
- Commit: the same, of a committed snapshot under the name.
- Remove: there is nothing under the key, which is what was asked for. Whether there was something before cannot be
  told. A snapshot created after the call was sent is somebody's new one: then the call fails, since repeating it
  would remove that.
- Everything else reads, or sets what a repetition sets again.

Where the look finds nothing, the lost call had no effect, and is repeated. Each answer to "did it take effect?" is one
`Look`; idempotency tokens would take its place: a repetition that carries the token of the lost call.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import msgspec
import structlog

from snapbroker.errors import BrokerError, Cancelled, ResourceExhausted, Unavailable

log = structlog.get_logger()

T = TypeVar("T")

MOMENTS: Final = (Unavailable, ResourceExhausted, Cancelled)
"""What passes. A call that ends `cancelled` was taken back by a broker that stops: a caller's own end is no answer."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long what is away is waited for."""

    wait_ms: int = 5000
    """How long a call is repeated while broker or snapshotter is away; then it fails with unavailable."""
    pause_initial_ms: int = 50
    """Pause before the first repetition; doubled with every further one, and shortened by chance by up to a half."""
    pause_max_ms: int = 1000
    """Longest pause between two repetitions."""


class Span(msgspec.Struct, frozen=True):
    """Between the sending of a call and the loss of its reply: nanoseconds since the epoch, by the broker's clock."""

    since: int
    until: int

    def covers(self, moment: int) -> bool:
        """Whether the lost call may have done what was done at `moment`."""
        return self.since <= moment <= self.until


Look = Callable[[Span], Awaitable[T | None]]
"""Whether a lost call took effect: its answer, or None where it did not."""


class Patience:
    """Repeats calls. `statistics` tells how often."""

    def __init__(self, limits: Limits, chance: random.Random | None = None) -> None:
        self._limits = limits
        self._chance = chance or random.Random()
        self._lost: Counter[tuple[str, str]] = Counter()
        self._contested: set[tuple[str, str]] = set()
        self.repeated = 0
        self.recovered = 0
        self.given_up = 0

    async def repeat(
        self,
        error: BrokerError,
        call: Callable[[], Awaitable[T]],
        *,
        sent: int = 0,
        look: Look[T] | None = None,
        what: tuple[str, str] | None = None,
    ) -> T:
        """The outcome of a call that failed with `error`, one of MOMENTS, sent at `sent`.

        `look` is asked before a repetition where the call may have taken effect; `what`, snapshotter and key, is what
        it creates. Raises the last error when the time is over.
        """
        if what is None:
            return await self._repeat(error, call, sent, look, what)
        self._lost[what] += 1
        if self._lost[what] > 1:
            self._contested.add(what)
        try:
            return await self._repeat(error, call, sent, look, what)
        finally:
            self._lost[what] -= 1
            if not self._lost[what]:
                del self._lost[what]
                self._contested.discard(what)

    async def _repeat(
        self,
        error: BrokerError,
        call: Callable[[], Awaitable[T]],
        sent: int,
        look: Look[T] | None,
        what: tuple[str, str] | None,
    ) -> T:
        lost = Span(sent, time.time_ns()) if is_lost(error) else None
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._limits.wait_ms / 1000
        pause = self._limits.pause_initial_ms / 1000
        while True:
            wait = self._pause(pause, error)
            if loop.time() + wait > give_up:
                self.given_up += 1
                raise self._last_word(error, lost)
            await asyncio.sleep(wait)
            pause = min(2 * pause, self._limits.pause_max_ms / 1000)
            self.repeated += 1
            try:
                if lost is not None and look is not None:
                    found = await self._ask(look, lost, what)
                    if found is not None:
                        self.recovered += 1
                        return found
                    lost = None
                sent = time.time_ns()
                return await call()
            except MOMENTS as again:
                error = again
                if lost is None and is_lost(error):
                    lost = Span(sent, time.time_ns())

    async def _ask(self, look: Look[T], lost: Span, what: tuple[str, str] | None) -> T | None:
        found = await look(lost)
        if found is not None and what is not None and what in self._contested:
            raise Undecided(f"two calls for {what[1]!r} were under way when the broker went away: one took effect")
        return found

    def _pause(self, pause: float, error: BrokerError) -> float:
        """A pause of chance length; a broker that is overloaded says itself how long."""
        asked = error.details.get("retry_after_ms", 0) if isinstance(error, ResourceExhausted) else 0
        longest = self._limits.pause_max_ms / 1000
        return max(pause * self._chance.uniform(0.5, 1.0), min(asked / 1000 if isinstance(asked, int) else 0, longest))

    def _last_word(self, error: BrokerError, lost: Span | None) -> BrokerError:
        message = f"{error.message} (repeated for {self._limits.wait_ms} ms)"
        if lost is not None and not is_lost(error):
            message += "; whether the first attempt took effect is unknown"
        kind = Unavailable if isinstance(error, Cancelled) else type(error)
        return kind(message, error.details)

    def statistics(self) -> dict[str, int]:
        """Calls repeated, calls whose lost answer was found out, calls that waited in vain."""
        return {"repeated": self.repeated, "recovered": self.recovered, "given_up": self.given_up}


class Undecided(BrokerError):
    """What became of a lost call cannot be told; repeating it might do harm."""

    code = "unavailable"


def is_lost(error: BrokerError) -> bool:
    """Whether the call may have taken effect all the same. The broker and the client say so in these words."""
    return error.in_doubt or "unknown" in error.message
