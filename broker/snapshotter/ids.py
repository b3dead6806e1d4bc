"""Ids that are never used twice: handed out from blocks that the store reserved before (D4).

An id becomes a directory before its record is committed. Were ids counted in the record's transaction, a crash
would give the id again while its directory is still there. So a block is reserved in a transaction of its own
ahead of its use, and what a crash leaves unused of it is never used.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from backends.failpoints import reach
from snapbroker.errors import ResourceExhausted

if TYPE_CHECKING:
    from broker.store import Environment, Snapshots

BLOCK: Final = 1 << 16
"""Ids reserved at a time: one small transaction in 65,536 snapshots."""


class Ids:
    """The ids of one actor; `take` from any thread, `replenish` from the writer between transactions."""

    def __init__(self, environment: Environment, snapshots: Snapshots) -> None:
        self._environment = environment
        self._snapshots = snapshots
        self._lock = threading.Lock()
        self._blocks: deque[list[int]] = deque()
        with environment.read() as txn:
            self.boundary = snapshots.next_id(txn)
        """Every id of an earlier run is below it."""
        self.replenish()

    def take(self) -> int:
        """An id that nobody had."""
        return self.take_many(1)[0]

    def take_many(self, count: int) -> list[int]:
        """`count` ids; ResourceExhausted while the writer has not reserved enough."""
        with self._lock:
            if self._left() < count:
                raise ResourceExhausted("the reserved ids are used up, repeat at once", {"retry_after_ms": 1})
            taken: list[int] = []
            while len(taken) < count:
                block = self._blocks[0]
                part = min(count - len(taken), block[1] - block[0])
                taken.extend(range(block[0], block[0] + part))
                block[0] += part
                if block[0] == block[1]:
                    self._blocks.popleft()
            return taken

    def _left(self) -> int:
        return sum(block[1] - block[0] for block in self._blocks)

    def replenish(self) -> None:
        """Reserve another block when less than half a block is left; durable on return."""
        with self._lock:
            if self._left() >= BLOCK // 2:
                return
        first = self._environment.write(self._reserve, frees=True)
        reach("ids.committed")
        with self._lock:
            self._blocks.append([first, first + BLOCK])

    def _reserve(self, txn: object) -> int:
        first = self._snapshots.next_id(txn)  # type: ignore[arg-type]
        self._snapshots.reserve_ids(txn, first, BLOCK)  # type: ignore[arg-type]
        reach("ids.reserved")
        return first
