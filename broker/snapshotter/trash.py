"""What was removed and still lies on disk: put aside in constant time, deleted in the background (D13).

The backlog is on disk, so a crash loses none of it; in memory there is only a bounded queue of tokens, refilled from
the disk when it overflowed. Whoever waits for the backlog of a moment waits until everything put aside before that
moment is deleted.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

import structlog
from snapbroker.contract import Usage
from snapbroker.errors import BrokerError

from backends.api import Task

if TYPE_CHECKING:
    from backends.api import Backend

log = structlog.get_logger()

QUEUE_MAX: Final = 65_536
"""Tokens kept in memory; beyond, the directory on disk is the queue."""


class Trash:
    """The discarded entries of one backend, deleted one after the other by the thread that runs `run`.

    Order is what lets somebody wait: entries go in the order they came. Once the queue overflowed, the disk is the
    queue and has no order, so whoever waits then waits until the overflow is gone.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._condition = threading.Condition()
        self._queue: deque[int | str] = deque()
        self._sizes: dict[int | str, Usage] = {}
        self._task = Task()
        self._overflow = False
        self._bytes = 0
        self._added = 0
        self._deleted = 0
        self._failed: dict[str, str] = {}
        self._waiters: list[tuple[int, Callable[[], None]]] = []

    def discard(self, id_: int, usage: Usage | None) -> None:
        """Put the files of a removed snapshot aside; `usage` where it is known."""
        with self._condition:
            self._added += 1
            if not self._overflow and len(self._queue) < QUEUE_MAX:
                self._queue.append(id_)
                if usage is not None:
                    self._sizes[id_] = usage
                    self._bytes += usage.size
                self._condition.notify()
                return
            self._overflow = True
        self._put_aside(id_)

    def _put_aside(self, id_: int) -> None:
        try:
            self._backend.discard(id_)
        except (OSError, BrokerError) as error:
            log.warning("a removed snapshot's files cannot be put aside", id=id_, error=str(error))

    def recover(self, tokens: Iterable[str]) -> None:
        """Take over what an earlier run, or an earlier attempt, had put aside."""
        with self._condition:
            before = len(self._queue)
            self._queue.extend(tokens)
            self._added += len(self._queue) - before
            self._condition.notify()

    def run(self) -> None:
        """Delete until `stop`; the body of a thread."""
        while (entry := self._next()) is not None:
            self._delete(entry)
            with self._condition:
                self._deleted += 1
                usage = self._sizes.pop(entry, None)
                self._bytes -= usage.size if usage else 0
                ready = self._take_ready()
            for call in ready:
                call()

    def _next(self) -> int | str | None:
        while True:
            with self._condition:
                while not self._queue and not self._overflow and not self._task.cancelled:
                    self._condition.wait()
                if self._task.cancelled:
                    return None
                if self._queue:
                    return self._queue.popleft()
            tokens = list(itertools.islice(self._backend.discarded(), QUEUE_MAX))
            with self._condition:
                self._queue.extend(token for token in tokens if token not in self._failed)
                if not self._queue:
                    self._overflow = False
                    self._deleted = self._added
                ready = self._take_ready()
            for call in ready:
                call()

    def _take_ready(self) -> list[Callable[[], None]]:
        if self._overflow or not self._waiters:
            return []
        ready = [call for mark, call in self._waiters if mark <= self._deleted]
        self._waiters = [(mark, call) for mark, call in self._waiters if mark > self._deleted]
        return ready

    def _delete(self, entry: int | str) -> None:
        token = str(entry)
        try:
            if isinstance(entry, int):
                self._backend.discard(entry)
            self._backend.delete(token, self._task)
            self._failed.pop(token, None)
        except (OSError, BrokerError) as error:
            if not self._task.cancelled:
                self._failed[token] = str(error)
                log.warning("a removed snapshot's files cannot be deleted", token=token, error=str(error))

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

    def backlog(self) -> dict[str, int]:
        """Entries and bytes that wait (bytes: as far as known from commits), and entries that cannot be deleted."""
        with self._condition:
            return {
                "entries": self._added - self._deleted,
                "bytes": self._bytes,
                "deleted": self._deleted,
                "failed": len(self._failed),
                "files_deleted": self._task.entries,
            }
