"""What was removed and still lies on disk: put aside in constant time, deleted in the background (D13).

The backlog is on disk, so a crash loses none of it; in memory there is only a bounded queue of tokens, refilled from
the disk when it overflowed. Whoever waits for the backlog of a moment waits until everything put aside before that
moment is deleted.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from backends.api import Task
from backends.failpoints import reach
from broker.logs import get_logger
from snapbroker.contract import Usage

if TYPE_CHECKING:
    from backends.api import Backend

log = get_logger()

QUEUE_MAX: Final = 65_536
"""Tokens kept in memory; beyond, the directory on disk is the queue."""
RETRY_S: Final = 1.0
"""Pause before a deletion that failed as a whole is tried again."""
BATCH: Final = 64
"""Tokens deleted between two looks at the queue."""


class Deleter(Protocol):
    """Who deletes: see `broker.snapshotter.hands`."""

    def delete(self, tokens: Sequence[str], task: Task) -> dict[str, str]:
        """Delete discarded entries; what could not be deleted, with the reason."""
        ...

    def let_go(self) -> None:
        """There is nothing to delete at the moment."""
        ...


class Trash:
    """The discarded entries of one backend, deleted in their order by the thread that runs `run`.

    Order is what lets somebody wait: entries go in the order they came. Once the queue overflowed, the disk is the
    queue and has no order, so whoever waits then waits until the overflow is gone.
    """

    def __init__(self, backend: Backend, deleter: Deleter, idle_s: float) -> None:
        self._backend = backend
        self._deleter = deleter
        self._idle_s = idle_s
        self._condition = threading.Condition()
        self._queue: deque[str] = deque()
        self._sizes: dict[str, Usage] = {}
        self._task = Task()
        self._overflow = False
        self._bytes = 0
        self._added = 0
        self._deleted = 0
        self._failed: dict[str, str] = {}
        self._waiters: list[tuple[int, Callable[[], None]]] = []

    def discard(self, id_: int, usage: Usage | None) -> None:
        """Put the files of a removed snapshot aside; `usage` where it is known."""
        token = self._backend.discard(id_)
        if token is None:
            return
        reach("trash.discarded")
        with self._condition:
            self._added += 1
            if self._overflow or len(self._queue) >= QUEUE_MAX:
                self._overflow = True
                return
            self._queue.append(token)
            if usage is not None:
                self._sizes[token] = usage
                self._bytes += usage.size
            self._condition.notify()

    def recover(self, tokens: Iterable[str]) -> None:
        """Take over what an earlier run, or an earlier attempt, had put aside."""
        with self._condition:
            before = len(self._queue)
            several = iter(tokens)
            reach("trash.recovered")
            self._queue.extend(itertools.islice(several, max(0, QUEUE_MAX - before)))
            self._added += len(self._queue) - before
            for _ in several:
                self._added += 1
                self._overflow = True
            self._condition.notify()

    def run(self) -> None:
        """Delete until `stop`; the body of a thread."""
        while tokens := self._next():
            reach("trash.taken")
            try:
                failed = self._deleter.delete(tokens, self._task)
            except Exception as error:
                self._put_back(tokens, error)
                continue
            reach("trash.deleted")
            self._note(tokens, failed)
        self._deleter.let_go()

    def _next(self) -> list[str]:
        """Some tokens to delete; empty at the end."""
        while True:
            with self._condition:
                while not self._queue and not self._overflow and not self._stopped():
                    if not self._condition.wait(self._idle_s):
                        self._deleter.let_go()
                if self._stopped():
                    return []
                if self._queue:
                    return [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            self._refill()

    def _refill(self) -> None:
        """After an overflow: what the disk has."""
        try:
            tokens = list(itertools.islice(self._backend.discarded(), QUEUE_MAX))
        except Exception as error:
            self._put_back([], error)
            return
        with self._condition:
            self._queue.extend(token for token in tokens if token not in self._failed)
            if not self._queue:
                self._overflow = False
                self._deleted = self._added
            ready = self._take_ready()
        for call in ready:
            call()

    def _stopped(self) -> bool:
        return self._task.cancelled

    def _take_ready(self) -> list[Callable[[], None]]:
        if self._overflow or not self._waiters:
            return []
        ready = [call for mark, call in self._waiters if mark <= self._deleted]
        self._waiters = [(mark, call) for mark, call in self._waiters if mark > self._deleted]
        return ready

    def _put_back(self, tokens: list[str], error: Exception) -> None:
        """Nothing could be deleted at all: try the same again after a pause."""
        if self._stopped():
            return
        log.warning("removed snapshots' files cannot be deleted at the moment", error=str(error), entries=len(tokens))
        with self._condition:
            self._queue.extendleft(reversed(tokens))
            self._condition.wait_for(self._stopped, RETRY_S)

    def _note(self, tokens: list[str], failed: dict[str, str]) -> None:
        for token, reason in failed.items():
            log.warning("a removed snapshot's files cannot be deleted", token=token, error=reason)
        with self._condition:
            self._deleted += len(tokens)
            for token in tokens:
                usage = self._sizes.pop(token, None)
                self._bytes -= usage.size if usage else 0
                self._failed.pop(token, None)
            self._failed.update(failed)
            ready = self._take_ready()
        for call in ready:
            call()

    def when_empty(self, call: Callable[[], None]) -> Callable[[], None]:
        """Call `call`, from any thread, once all that is put aside by this moment is deleted; returns an undo.

        What could not be deleted before is tried again first.
        """
        self.recover(list(self._failed))
        with self._condition:
            entry = (self._added, call)
            if self._deleted >= self._added and not self._overflow:
                waits = False
            else:
                waits = True
                self._waiters.append(entry)
        if not waits:
            call()

        def undo() -> None:
            with self._condition:
                if entry in self._waiters:
                    self._waiters.remove(entry)

        return undo

    def failures(self) -> dict[str, str]:
        """What cannot be deleted, with the reason."""
        with self._condition:
            return dict(self._failed)

    def stop(self) -> None:
        """End `run` soon, in the middle of an entry if need be: the rest is found at the next start."""
        self._task.cancel()
        with self._condition:
            self._condition.notify_all()

    def mark(self) -> tuple[int, int] | None:
        """For the watch: how far the deletions are, None while nothing is to be deleted."""
        with self._condition:
            return (self._deleted, self._task.entries) if self._added > self._deleted else None

    def backlog(self) -> dict[str, int]:
        """Entries and bytes that wait (bytes: as far as known from commits), and entries that cannot be deleted."""
        with self._condition:
            return {
                "entries": self._added - self._deleted,
                "bytes": self._bytes,
                "deleted": self._deleted,
                "failed": len(self._failed),
                "files_deleted": self._task.entries,
                "limit": QUEUE_MAX,
            }
