"""Audits, repairs and whys of a snapshotter that serves: step by step in its workers, beside everything else.

What an audit wants to know for certain it asks in an errand of the writer: there no call is half decided, and what
was committed before has its disk steps behind it. Calls of the same turn may have been decided already.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio
import msgspec

from backends.api import Inspected, Inspector, Task
from backends.inspecting import NothingInspector
from broker.audit.access import Flight, Work
from broker.audit.auditor import Auditor
from broker.audit.records import Rescue
from broker.audit.why import why
from broker.snapshotter.writer import Errand
from broker.store import IdSet
from snapbroker.errors import BrokerError, DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable
from snapbroker.protocol import CREDIT_MAX, PAGE_MAX, Audit, Repair, Why, encode

if TYPE_CHECKING:
    from lmdb import Transaction

    from backends.api import Backend
    from broker.snapshotter.pool import Pool
    from broker.snapshotter.recovery import Recovery
    from broker.snapshotter.trash import Trash
    from broker.snapshotter.writer import Writer
    from broker.store import Environment
    from broker.store.journal import Turn

T = TypeVar("T")

PAGE_BYTES_MAX: Final = 4 * 1024 * 1024
"""A page ends early when its findings reach this size, well below the longest body."""
_LOOK_S: Final = 0.2
"""How often whoever waits for the writer looks whether the snapshotter stops."""


class Page(msgspec.Struct, omit_defaults=True):
    """An AuditPage whose findings are still encoded."""

    findings: list[msgspec.Raw]
    next: str = ""
    looked: int = 0


class OnlineAccess:
    """The store of the actor; see `broker.audit.access.Access`."""

    def __init__(
        self,
        snapshotter: str,
        root: Path,
        metadata: Path,
        environment: Environment,
        backend: Backend,
        writer: Writer,
        pool: Pool | None,
        trash: Trash,
        recovery: Recovery,
    ) -> None:
        self.snapshotter = snapshotter
        self.root = root
        self.metadata = metadata
        self.environment = environment
        self._backend = backend
        self._writer = writer
        self._pool = pool
        self._trash = trash
        self._recovery = recovery
        self._watching: list[IdSet] = []
        self._stopped = False
        # What an earlier run had stocked is gone with its recovery, what this one has is in hand.
        self.stocked = False

    @property
    def inspector(self) -> Inspector:
        """The look at the backend's root, as it is at this moment."""
        return self._backend.inspector() if isinstance(self._backend, Inspected) else NothingInspector()

    def transact(self, work: Work[T]) -> T:
        """Run `work` in a turn of the writer, and wait for its commit."""
        done = threading.Event()
        results: list[T] = []
        errors: list[BrokerError | None] = []

        def run(txn: Transaction, turn: Turn, now: int) -> None:
            # Run again where the map had to grow.
            results[:] = [work(txn, turn, now)]

        def end(error: BrokerError | None) -> None:
            errors.append(error)
            done.set()

        self._writer.errand(Errand(run, end))
        while not done.wait(_LOOK_S):
            if self._stopped:
                raise Unavailable("the snapshotter is stopping, repeat in a moment", {"retry_after_ms": 1000})
        if errors[0] is not None:
            raise errors[0]
        return results[0]

    def flight(self) -> Flight:
        """What the writer, the workers and the pool have in their hands; called by the writer."""
        ids, creates, consumes, pins = self._writer.in_hand()
        if self._pool is not None:
            ids |= self._pool.in_hand()
        return Flight(ids, creates, consumes, pins, recovering=not self._recovery.finished)

    @contextlib.contextmanager
    def watch(self) -> Iterator[IdSet]:
        """Gather the ids that are committed meanwhile."""
        touched = IdSet()
        self._watching.append(touched)
        try:
            yield touched
        finally:
            self._watching = [other for other in self._watching if other is not touched]

    def see(self, id_: int) -> None:
        """A commit has touched the id; called by the writer."""
        for touched in self._watching:
            touched.add(id_)

    def discard(self, id_: int) -> None:
        """Put a directory into the trash."""
        self._trash.discard(id_, None)

    def failures(self) -> dict[str, str]:
        """What the trash could not delete."""
        return self._trash.failures()

    def stop(self) -> None:
        """Let nobody wait for the writer any more."""
        self._stopped = True


class Audits:
    """The calls; used by the loop."""

    def __init__(self, access: OnlineAccess, writer: Writer, rescue: Rescue, interval_s: float, open_max: int) -> None:
        self._access = access
        self._writer = writer
        self._rescue = rescue
        self._interval_s = interval_s
        self._open_max = open_max
        self._open = 0

    async def stream(
        self,
        call: Audit | Repair,
        deadline: int,
        page: Callable[[bytes], None],
        progressed: Callable[[Task], None],
        stopping: Callable[[], bool],
    ) -> bytes:
        """Send the pages through `page`; answers the last one."""
        if not 0 < call.page <= PAGE_MAX:
            raise InvalidArgument(f"a page has 1 to {PAGE_MAX} entries, not {call.page}")
        if not 0 < call.credit <= CREDIT_MAX:
            raise InvalidArgument(f"credit is 1 to {CREDIT_MAX} pages, not {call.credit}")
        with self._counted(), _cancelled_at_end() as task:
            execute = isinstance(call, Repair) and call.execute
            auditor = Auditor(self._access, task, self._rescue, execute=execute)
            sheet = _Sheet(auditor.told(call.after), call.page)
            told, credit = time.monotonic(), call.credit
            while True:
                if stopping():
                    raise Unavailable("the snapshotter is stopping, repeat in a moment", {"retry_after_ms": 1000})
                if time.monotonic_ns() > deadline:
                    raise DeadlineExceeded("the deadline passed in the middle of the audit: allow it more time")
                await self.in_worker(sheet.fill)
                if sheet.over:
                    return sheet.take(task.entries, last=True)
                if sheet.full:
                    credit -= 1
                    answer = sheet.take(task.entries)
                    if not credit:
                        return answer
                    page(answer)
                elif time.monotonic() - told > self._interval_s:
                    told = time.monotonic()
                    progressed(task)

    async def why(self, call: Why, namespace: str) -> bytes:
        """The encoded WhyAnswer."""
        with self._counted(), _cancelled_at_end() as task:
            return encode(await self.in_worker(lambda: why(self._access, namespace, call.key, task)))

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        if self._open >= self._open_max:
            raise ResourceExhausted(
                f"{self._open} audits are open, and audits_max={self._open_max}", {"retry_after_ms": 1000}
            )
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def in_worker(self, work: Callable[[], T]) -> T:
        """The result of `work`, done by a worker."""
        loop = asyncio.get_running_loop()
        done = anyio.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)
            # The loop may have ended without waiting.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(done.set)

        self._writer.submit_work(run)
        await done.wait()
        if errors:
            raise errors[0]
        return results[0]


class _Sheet:
    """A page that is filled: by a worker, in steps."""

    def __init__(self, told: Iterator[Any], size: int) -> None:
        self._told = told
        self._size = size
        self._findings: list[msgspec.Raw] = []
        self._bytes = 0
        self._next = ""
        self.over = False

    @property
    def full(self) -> bool:
        """Whether the page is to be sent."""
        return len(self._findings) >= self._size or self._bytes >= PAGE_BYTES_MAX

    def fill(self) -> None:
        """Take findings to the end of the step or of the page."""
        while not self.full:
            try:
                item = next(self._told)
            except StopIteration:
                self.over = True
                return
            if item is None:
                return
            self._next, finding = item
            encoded = encode(finding)
            self._findings.append(msgspec.Raw(encoded))
            self._bytes += len(encoded)

    def take(self, looked: int, *, last: bool = False) -> bytes:
        """The encoded page; the next one begins."""
        page = encode(Page(self._findings, "" if last else self._next, looked))
        self._findings, self._bytes = [], 0
        return page


@contextlib.contextmanager
def _cancelled_at_end() -> Iterator[Task]:
    """A task that is over with the block, however it ends: a worker that is still at it stops."""
    task = Task()
    try:
        yield task
    finally:
        task.cancel()
