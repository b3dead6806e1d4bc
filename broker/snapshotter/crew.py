"""Several hands for a backend whose `create` computes, and one flush for whatever they made meanwhile.

Threads of the actor would wait for one interpreter; so snapshots are built in child processes, a thread here for each.
Nobody else waits in a thread: who orders a snapshot is called back. Waking one thread for each, and again for its
flush, costs the actor more than all the rest it does for a prepare (165 of 250 microseconds, measured with 64 callers
on two cores).

Copies known to be small are handed over several at a time, which shares the way to the other process and back. They
have a line of their own, and always a hand: the others, large or not known yet, leave one free.

The flush has a thread too. While small copies are being built it waits until half of what is under way is there: each
flush writes a journal commit, and everybody under way in one flush would leave the hands idle for as long as it takes.
A lone order is built and flushed by its thread itself, without the way to another process, if it turns out small. A
large one is begun again by a hand: the interpreter stays free for the loop, and hands take no more of the processors
than the callers of the other verbs leave.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from backends.api import Task, TooMany
from backends.failpoints import reach
from broker.actor.fairness import FairQueue
from broker.logs import get_logger
from broker.snapshotter.hands import Hand, failure_of
from snapbroker.contract import Kind
from snapbroker.errors import Cancelled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backends.api import Copying, Snapshot

log = get_logger()

BATCH: Final = 16
"""Most small copies handed over at a time: some milliseconds of work."""
FLUSH: Final = 64
"""Small copies that do not wait for others to be flushed with."""
SMALL_ENTRIES: Final = 64
"""Most files and directories of a copy that is small, so that nobody would take it back in the middle."""
SMALL_BYTES: Final = 1 << 20
"""Most bytes of it."""
KNOWN_MAX: Final = 4096
"""Parents whose size is remembered."""


@dataclass(slots=True, eq=False)
class Order:
    """A snapshot to create, and whom to tell. Both calls come from a thread of the crew."""

    snapshot: Snapshot
    task: Task
    check: Callable[[], None]
    """Raises where it is not to be begun any more."""
    done: Callable[[Exception | None], None]
    """Told why it could not be made, or None once it is durable; must not raise."""
    line: bytes = b""
    """Whose it is: clients are served in turn."""


class Crew:
    """The hands of one backend (see the module); `discard` puts what is left of a snapshot into the trash."""

    def __init__(self, backend: Copying, discard: Callable[[int], None], hands: Sequence[Hand]) -> None:
        self._backend = backend
        self._discard = discard
        self._hands = hands
        self._long_max = max(1, len(hands) - 1)
        self._lock = threading.Lock()
        self._ordered = threading.Condition(self._lock)
        self._finished = threading.Condition(self._lock)
        self._short: FairQueue[Order] = FairQueue(quantum=1)
        self._long: FairQueue[Order] = FairQueue(quantum=1)
        self._building_short = 0
        self._building_long = 0
        self._built: list[Order] = []
        self._small: OrderedDict[tuple[int, bool], bool] = OrderedDict()
        self._closed = False
        self._ended = False
        self._flusher = threading.Thread(target=self._flush_all, name="flush", daemon=True)
        self._builders = [
            threading.Thread(target=self._build_all, args=(hand,), name=f"hand-{number}", daemon=True)
            for number, hand in enumerate(self._hands)
        ]
        for thread in (self._flusher, *self._builders):
            thread.start()

    def submit(self, order: Order) -> None:
        """Create a snapshot, as `backends.api.Backend.create` does, but return at once."""
        with self._lock:
            closed = self._closed
            if not closed:
                small = self._small.get(_parent(order.snapshot), False)
                (self._short if small else self._long).append(order.line, order)
                self._ordered.notify()
        if closed:
            order.done(Cancelled("the actor is stopping"))

    # The threads of the hands.

    def _build_all(self, hand: Hand) -> None:
        while taken := self._take(hand):
            orders, long, alone = taken
            built: list[Order] = []
            try:
                if begun := [order for order in orders if _begins(order)]:
                    built = self._build_alone(hand, begun[0]) if alone else self._hand_over(hand, begun)
            finally:
                with self._lock:
                    if long:
                        self._building_long -= 1
                    else:
                        self._building_short -= len(orders)
                    if not alone:
                        self._built += built
                    self._finished.notify()
            if alone:
                # No longer building: the next order of the same caller, who is answered here, is alone again.
                self._flush(built)

    def _take(self, hand: Hand) -> tuple[list[Order], bool, bool] | None:
        """Orders for a hand, whether they may take long, and whether nothing else is to be built; None at the end."""
        with self._lock:
            while not self._closed:
                alone = len(self._short) + len(self._long) == 1 and not self._building_short + self._building_long
                if self._long and self._building_long < self._long_max:
                    self._building_long += 1
                    return [self._long.popleft()], True, alone
                if self._short:
                    # One that has to be started first keeps a single order waiting.
                    most = BATCH if hand.running else 1
                    share = max(1, min(most, len(self._short) // len(self._hands)))
                    self._building_short += share
                    return self._short.take(share), False, alone
                self._ordered.wait()
        return None

    def _build_alone(self, hand: Hand, order: Order) -> list[Order]:
        """Build here what is small, and let a hand build what is not."""
        before = (order.task.entries, order.task.bytes)
        try:
            self._backend.build(order.snapshot, _Trial(order.task))
        except TooMany:
            order.task.entries, order.task.bytes = before
            return self._hand_over(hand, [order])
        except Exception as error:
            order.done(error)
            return []
        self._learn(order.snapshot, order.task.entries - before[0], order.task.bytes - before[1])
        return [order]

    def _hand_over(self, hand: Hand, orders: list[Order]) -> list[Order]:
        """Let a hand build; answer what it built."""
        # What takes long is taken back by ending the child; several at a time are done before anybody could.
        task = orders[0].task if len(orders) == 1 else Task()
        try:
            answers = hand.build([order.snapshot for order in orders], task)
        except Exception as error:
            # The child was ended in the middle of it.
            self._drop(orders, error)
            return []
        built = []
        for order, answer in zip(orders, answers, strict=True):
            failure = failure_of(answer)
            if failure is not None:
                order.done(failure)
                continue
            self._learn(order.snapshot, answer.entries, answer.bytes)
            built.append(order)
        return built

    def _learn(self, snapshot: Snapshot, entries: int, size: int) -> None:
        with self._lock:
            parent = _parent(snapshot)
            self._small[parent] = entries <= SMALL_ENTRIES and size <= SMALL_BYTES
            self._small.move_to_end(parent)
            if len(self._small) > KNOWN_MAX:
                self._small.popitem(last=False)

    # The flusher's thread.

    def _flush_all(self) -> None:
        while True:
            with self._lock:
                while not self._ripe():
                    self._finished.wait()
                orders, self._built = self._built, []
            if not orders:
                return
            self._flush(orders)

    def _ripe(self) -> bool:
        if not self._built:
            return self._ended
        under_way = self._building_short
        if self._building_long < len(self._hands):
            under_way += len(self._short)
        return len(self._built) >= min(FLUSH, under_way)

    def _flush(self, orders: list[Order]) -> None:
        if not orders:
            return
        reach("crew.built")
        try:
            self._backend.flush([order.snapshot for order in orders])
        except Exception as error:
            self._drop(orders, error)
            return
        reach("crew.flushed")
        for order in orders:
            try:
                order.task.advance(0)
            except Cancelled as error:
                self._drop([order], error)
            else:
                order.done(None)

    def _drop(self, orders: Sequence[Order], reason: Exception) -> None:
        reach("crew.dropping")
        for order in orders:
            try:
                self._discard(order.snapshot.id)
            except Exception as error:
                # Without a record it is found as a left-over at the next start.
                log.warning("left over after a failed create", id=order.snapshot.id, error=str(error))
            order.done(reason)

    # From the actor.

    def rest(self) -> None:
        """Let go of hands that have nothing to do; called now and then."""
        with self._lock:
            if self._building_short or self._building_long:
                return
            for hand in self._hands:
                hand.let_go_if_idle()

    def close(self) -> None:
        """Take back what waits and end the hands for good."""
        with self._lock:
            self._closed = True
            waiting = [*self._short.clear(), *self._long.clear()]
            self._ordered.notify_all()
        for order in waiting:
            order.done(Cancelled("the actor is stopping"))
        for hand in self._hands:
            hand.close()

    def wait(self) -> None:
        """After `close`: wait until they are gone."""
        for thread in self._builders:
            thread.join()
        with self._lock:
            self._ended = True
            self._finished.notify()
        self._flusher.join()
        for hand in self._hands:
            hand.let_go()


class _Trial(Task):
    """A task that is given up with TooMany once it is not small; for the rest it is the task of the order."""

    __slots__ = ("_before", "_task")

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task = task
        self._before = (task.entries, task.bytes)

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked."""
        return self._task.cancelled

    def advance(self, entries: int = 1, size: int = 0) -> None:
        """Note progress."""
        self._task.advance(entries, size)
        self.entries, self.bytes = self._task.entries - self._before[0], self._task.bytes - self._before[1]
        if self.entries > SMALL_ENTRIES or self.bytes > SMALL_BYTES:
            raise TooMany


def _begins(order: Order) -> bool:
    try:
        order.task.advance(0)
        order.check()
    except Exception as error:
        order.done(error)
        return False
    return True


def _parent(snapshot: Snapshot) -> tuple[int, bool]:
    """What decides how much there is to build."""
    return snapshot.parents[0] if snapshot.parents else 0, snapshot.kind is Kind.VIEW
