"""Directories made ahead of time, so that a prepare needs no disk but its own transaction.

A thread keeps the pool stocked in batches: many directories for the price of one flush. It sleeps while there is
enough. What is aimed for grows by twice what was lacking, up to a limit, so that the next burst of its size finds
enough, and not much more: one that nobody takes was made, and is deleted, for nothing. Others help the thread while
somebody waits: a filesystem of some age can take a fifth of a millisecond of a processor for one directory, where ext4
looks for inodes that were not deleted lately. What is left at the end has no record and is collected at the next start
like any left-over.
"""

from __future__ import annotations

import errno
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from backends.api import Task
from backends.failpoints import reach
from broker.actor.fairness import FairQueue, Mix
from broker.logs import get_logger
from broker.snapshotter.errors import error_of_system
from snapbroker.errors import BrokerError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.snapshotter.ids import Ids

log = get_logger()

BATCH: Final = 128
"""Directories made for one flush: about ten milliseconds of work."""
BATCH_SHARED: Final = 32
"""The same while several clients call: a flush of theirs waits for no more of the disk than this."""


class PoolLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How many directories wait ready; each takes three inodes and 12 KiB on ext4."""

    pool_min: int = 256
    """Ready directories aimed for when idle."""
    pool_max: int = 8192
    """Ready directories aimed for at most, after bursts."""
    pool_idle_s: float = 20.0
    """After this long without a prepare the aim is halved, down to `pool_min`, and the stocking processes end."""
    stockers: int = 2
    """Processes that make directories; all but one only while prepares wait."""


GROWTH: Final = 2
"""How many more are aimed for after each call that found none."""
KEPT: Final = 16
"""Directories, a quarter of the aim at most, that a client leaves for the others when its calls wait already."""
PART: Final = 4
"""How many of them it may have before it waits, of a batch."""
BROKEN: Final = (errno.EIO, errno.EROFS)
"""What a disk answers that is not to be written on any more, whatever it still shows."""
RETRY_S: Final = 1.0
"""Pause after directories could not be made, unless somebody asks for one."""

Waiter = Callable[[int | BrokerError], None]


class Stocker(Protocol):
    """Who makes directories: see `broker.snapshotter.hands`."""

    def stock(self, ids: Sequence[int], task: Task) -> None:
        """Make the directories of all `ids`, durable on return."""
        ...

    def let_go(self) -> None:
        """There is nothing to make at the moment."""
        ...


class Pool:
    """Ready directories by id; `take` from the writer, the stocking in a thread of its own."""

    def __init__(self, ids: Ids, discard: Callable[[int], None], limits: PoolLimits, mix: Mix) -> None:
        """`discard` puts into the trash what is left of an id, if there is anything."""
        self._ids = ids
        self._discard = discard
        self._limits = limits
        self._lock = threading.Lock()
        self._wanted = threading.Condition(self._lock)
        """Told when the pool is half empty."""
        self._awaited = threading.Condition(self._lock)
        """Told when somebody waits: waking a helper at every take would cost more than it brings."""
        self._ready: deque[int] = deque()
        self._making: set[int] = set()
        self._parked: FairQueue[Waiter] = FairQueue(quantum=1)
        self._mix = mix
        self._had: Counter[bytes] = Counter()
        """How many each client took since the last batch."""
        self._ended = False
        self._aim = limits.pool_min
        self._task = Task()
        self._complaint = ""
        self._taken = 0
        self._dry = 0
        self._failures = 0
        self._broken = False
        """Whether the disk fails: what lies on it is of no use either, until something can be made again."""
        self._rounds = 0
        self._stocking: dict[str, int] = {}
        """Which batch each thread is at."""

    def take(self, line: bytes) -> int | None:
        """A ready directory's id, or None when there is none at the moment, or this client waits for some already."""
        with self._lock:
            if not self._ready or self._broken or self._parked.waiting(line):
                return None
            if self._mix.shared and len(self._ready) <= self._kept and self._had[line] >= PART:
                return None
            self._had[line] += 1
            id_ = self._ready.popleft()
            if len(self._ready) * 2 < self._aim:
                self._wanted.notify_all()
        self._taken += 1
        return id_

    @property
    def _kept(self) -> int:
        """How many are left for those who do not wait: always less than is aimed for, so that more are made."""
        return min(KEPT, self._aim // 4)

    def park(self, line: bytes, waiter: Waiter) -> None:
        """Call `waiter` with the id of a directory that is still to be made, or an error; from the pool's thread."""
        with self._lock:
            self._dry += 1
            self._aim = min(self._aim + GROWTH, self._limits.pool_max)
            ended = self._ended
            if not ended:
                self._parked.append(line, waiter)
                self._wanted.notify_all()
                self._awaited.notify_all()
        if ended:
            waiter(Unavailable("the snapshotter is stopping"))

    def run(self, stocker: Stocker, *, helps: bool = False) -> None:
        """Keep the pool stocked until `stop`, or with `helps` only while somebody waits; the body of a thread each."""
        name = threading.current_thread().name
        while not self._task.cancelled:
            ids: list[int] = []
            try:
                ids = self._begin(name, helps=helps)
                if not ids:
                    self._rest(stocker, helps=helps)
                    continue
                reach("pool.taken")
                stocker.stock(ids, self._task)
                reach("pool.stocked")
            except (OSError, BrokerError) as error:
                self._stocking.pop(name, None)
                self._put_aside(ids)
                self._failed(error_of_system(error) if isinstance(error, OSError) else error)
            else:
                self._stocking.pop(name, None)
                self._shelve(ids)
        with self._lock:
            self._ended = True
        self._failed(Unavailable("the snapshotter is stopping"))

    def _begin(self, name: str, *, helps: bool) -> list[int]:
        """The ids of a batch that is to be made, none where there is enough."""
        with self._lock:
            missing = self._missing(helps=helps)
            if missing <= 0:
                return []
            self._rounds += 1
            self._stocking[name] = self._rounds
            ids = self._ids.take_many(min(missing, BATCH_SHARED if self._mix.shared else BATCH))
            self._making.update(ids)
            return ids

    def _missing(self, *, helps: bool) -> int:
        if helps and not self._parked:
            return 0
        return self._aim + len(self._parked) - len(self._ready) - len(self._making)

    def _rest(self, stocker: Stocker, *, helps: bool) -> None:
        """There is enough: wait until there is not, and aim lower after a quiet while."""
        called = self._awaited if helps else self._wanted
        with self._lock:
            if self._missing(helps=helps) > 0 or self._task.cancelled or called.wait(self._limits.pool_idle_s):
                return
            if not helps:
                self._aim = max(self._limits.pool_min, self._aim // 2)
        stocker.let_go()

    def _shelve(self, ids: list[int]) -> None:
        """Who waits is served first, except that some are left for clients that do not wait yet."""
        self._complaint = ""
        self._broken = False
        with self._lock:
            self._ready.extend(ids)
            self._had.clear()
            free = max(1, len(self._ready) - self._kept)
            served = [(waiter, self._ready.popleft()) for waiter in self._parked.take(free)] if self._parked else []
            self._making.difference_update(ids)
            self._making.update(id_ for _, id_ in served)
        self._taken += len(served)
        for waiter, id_ in served:
            waiter(id_)
        with self._lock:
            self._making.difference_update(id_ for _, id_ in served)

    def in_hand(self) -> set[int]:
        """The ids that are ready, being made, or on their way to a call."""
        with self._lock:
            return {*self._ready, *self._making}

    def _put_aside(self, ids: list[int]) -> None:
        """Discard what a process that was ended in the middle has made; ids are not used again."""
        reach("pool.failed")
        errors: list[Exception] = []
        for id_ in ids:
            try:
                self._discard(id_)
            except Exception as error:
                errors.append(error)
        if errors:
            # Without a record it is found as a left-over at the next start.
            log.warning("left over after a failed stocking", first=ids[0], entries=len(errors), error=str(errors[0]))
        with self._lock:
            self._making.difference_update(ids)

    def _failed(self, error: BrokerError) -> None:
        """Tell who waits, and try again a little later."""
        self._broken = error.details.get("errno") in BROKEN
        with self._lock:
            parked = self._parked.clear()
        for waiter in parked:
            waiter(error)
        if self._task.cancelled:
            return
        self._failures += 1
        if error.message != self._complaint:
            self._complaint = error.message
            log.warning("the pool cannot be stocked", error=error.message, ready=len(self._ready))
        with self._lock:
            if not self._parked and not self._task.cancelled:
                self._wanted.wait(RETRY_S)

    def stop(self) -> None:
        """End every `run`."""
        with self._lock:
            self._task.cancel()
            self._wanted.notify_all()
            self._awaited.notify_all()

    def marks(self) -> dict[str, int | None]:
        """For the watch, by thread: changes with every batch, None while none is being made."""
        stocking = dict(self._stocking)
        return {name: stocking.get(name) for name in self.threads}

    @property
    def threads(self) -> list[str]:
        """The names under which threads `run`, the one that helps nobody first."""
        return ["pool", *(f"pool-{number}" for number in range(2, self._limits.stockers + 1))]

    def statistics(self) -> dict[str, int]:
        """For `status`."""
        return {
            "ready": len(self._ready),
            "aim": self._aim,
            "taken": self._taken,
            "waiting": len(self._parked),
            "limit": self._limits.pool_max,
            "ran_dry": self._dry,
            "failures": self._failures,
        }
