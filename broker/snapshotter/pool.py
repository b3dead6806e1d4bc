"""Directories made ahead of time, so that a prepare needs no disk but its own transaction.

A thread keeps the pool stocked in batches: many directories for the price of one flush. It sleeps while there is
enough, and doubles what it aims for whenever the pool ran dry, up to a limit. What is left at the end has no record
and is collected at the next start like any left-over.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec
import structlog
from snapbroker.errors import BrokerError

from backends.api import Task

if TYPE_CHECKING:
    from backends.api import Pooled
    from broker.snapshotter.ids import Ids

log = structlog.get_logger()

BATCH: Final = 256
"""Directories made for one flush."""


class PoolLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How many directories wait ready; each takes three inodes and 12 KiB on ext4."""

    pool_min: int = 256
    """Ready directories aimed for when idle."""
    pool_max: int = 8192
    """Ready directories aimed for at most, after bursts."""
    pool_idle_s: float = 60.0
    """After this long without a prepare the aim goes back to `pool_min`."""


class Pool:
    """Ready directories by id; `take` from the writer, the stocking in a thread of its own."""

    def __init__(self, backend: Pooled, ids: Ids, limits: PoolLimits) -> None:
        self._backend = backend
        self._ids = ids
        self._limits = limits
        self._ready: deque[int] = deque()
        self._aim = limits.pool_min
        self._wake = threading.Event()
        self._task = Task()
        self._taken = 0
        self._dry = 0
        self._failures = 0

    def take(self) -> int | None:
        """A ready directory's id, or None when there is none at the moment."""
        try:
            id_ = self._ready.popleft()
        except IndexError:
            self._dry += 1
            self._aim = min(2 * self._aim, self._limits.pool_max)
            self._wake.set()
            return None
        self._taken += 1
        if len(self._ready) * 2 < self._aim:
            self._wake.set()
        return id_

    def give_back(self, id_: int) -> None:
        """A directory that was taken and not used after all."""
        self._ready.appendleft(id_)

    def run(self) -> None:
        """Keep the pool stocked until `stop`; the body of a thread."""
        while not self._stopped():
            missing = self._aim - len(self._ready)
            if missing <= 0:
                self._wake.clear()
                if len(self._ready) >= self._aim and not self._wake.wait(self._limits.pool_idle_s):
                    self._aim = max(self._limits.pool_min, self._aim // 2)
                continue
            try:
                ids = self._ids.take_many(min(missing, BATCH))
                self._backend.stock(ids, self._task)
            except (OSError, BrokerError) as error:
                if self._stopped():
                    return
                self._failures += 1
                log.warning("the pool cannot be stocked", error=str(error), ready=len(self._ready))
                self._wake.clear()
                self._wake.wait(1.0)
                continue
            self._ready.extend(ids)

    def _stopped(self) -> bool:
        return self._task.cancelled

    def stop(self) -> None:
        """End `run`."""
        self._task.cancel()
        self._wake.set()

    def statistics(self) -> dict[str, int]:
        """For `status`."""
        return {
            "ready": len(self._ready),
            "aim": self._aim,
            "taken": self._taken,
            "ran_dry": self._dry,
            "failures": self._failures,
        }
