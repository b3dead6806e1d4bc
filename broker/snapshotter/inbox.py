"""What waits for the writer: a line for each client, served in turn, and before them all what the actor itself wants.

With one client about a turn takes what is there. With several it is short, since whoever comes in the middle of it
waits for its end, and who only reads for the interpreter: the flood of one fills the turns that the others leave, and
makes them no longer.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from broker.actor.fairness import FairQueue, Mix
from snapbroker.errors import ResourceExhausted

if TYPE_CHECKING:
    from broker.snapshotter.operations import Operation

RETRY_MS: Final = 10
"""About the time of a turn."""
_STOP: Final = object()
_FIRST: Final = b""
"""The line of what is served before all clients."""


class Limits(Protocol):
    """What of the configuration is needed here."""

    @property
    def turn_max(self) -> int: ...  # noqa: D102
    @property
    def turn_shared_max(self) -> int: ...  # noqa: D102
    @property
    def turn_part_max(self) -> int: ...  # noqa: D102
    @property
    def waiting_max(self) -> int: ...  # noqa: D102


E = TypeVar("E")
"""What an actor queues for itself."""


class Inbox(Generic[E]):
    """`submit` from the loop's thread, `first` from any, `take` from the writer's."""

    def __init__(self, limits: Limits, mix: Mix) -> None:
        self._limits = limits
        self._mix = mix
        self._arrived: queue.SimpleQueue[tuple[bytes, Any, bool]] = queue.SimpleQueue()
        """Whose it is, operations or what the actor queues for itself, and whether they come back."""
        self._first: deque[E] = deque()
        self._lines: FairQueue[Operation] = FairQueue(limits.turn_part_max)
        self._lock = threading.Lock()
        self._counts: dict[bytes, int] = {}
        self._waiting = 0
        self._stopped = False

    def submit(self, client: bytes, operations: Sequence[Operation], *, more: bool = False) -> None:
        """Queue a client's operations in their order; ResourceExhausted when it has too many waiting, and then none is.

        Where all together have too many, too many is more than its part. `more`: of a request that was let in.
        """
        with self._lock:
            own = self._counts.get(client, 0)
            most = self._limits.waiting_max
            if not more and self._waiting > most and own > most // len(self._counts):
                raise ResourceExhausted(
                    f"{own} operations of this client wait, and {self._waiting} of all, more than waiting_max={most}",
                    {"retry_after_ms": RETRY_MS, "position": own},
                )
            self._counts[client] = own + len(operations)
            self._waiting += len(operations)
        self._arrived.put((client, operations, False))

    def first(self, item: E) -> None:
        """Queue something that goes before what clients have waiting."""
        self._arrived.put((_FIRST, item, False))

    def again(self, operation: Operation) -> None:
        """Queue an operation that comes back from work: it goes before what else its client has waiting."""
        with self._lock:
            self._counts[operation.line] = self._counts.get(operation.line, 0) + 1
            self._waiting += 1
        self._arrived.put((operation.line, (operation,), True))

    def stop(self) -> None:
        """Let `take` tell, once everything before is taken, that nothing more is to come."""
        self._arrived.put((_FIRST, _STOP, False))

    def take(self) -> list[Operation | E]:
        """What goes into a turn; waits for something, but for no more than the stop."""
        self._sort(block=not self._lines and not self._first)
        most = self._limits.turn_max
        batch: list[Operation | E] = [self._first.popleft() for _ in range(min(most, len(self._first)))]
        if shared := self._mix.shared:
            most = min(most, self._limits.turn_shared_max)
        if self._lines:
            taken = self._lines.take(max(1, most - len(batch)), once=shared)
            batch += taken
            self._count(taken)
        return batch

    def _count(self, taken: Sequence[Operation]) -> None:
        with self._lock:
            self._waiting -= len(taken)
            for operation in taken:
                left = self._counts[operation.line] - 1
                if left:
                    self._counts[operation.line] = left
                else:
                    del self._counts[operation.line]

    def _sort(self, *, block: bool) -> None:
        """Put what has arrived into its lines."""
        arrived = self._arrived
        try:
            while True:
                client, what, again = arrived.get(block)
                block = False
                if client != _FIRST:
                    for item in what:
                        self._lines.append(client, item, len(item.calls), first=again)
                elif what is _STOP:
                    self._stopped = True
                else:
                    self._first.append(what)
        except queue.Empty:
            return

    @property
    def stopped(self) -> bool:
        """Whether the stop was reached and nothing waits."""
        return self._stopped and not self._first and not self._lines and self._arrived.empty()

    def statistics(self) -> dict[str, int]:
        """For `status`."""
        with self._lock:
            return {"waiting": self._waiting, "limit": self._limits.waiting_max, "clients": len(self._counts)}
