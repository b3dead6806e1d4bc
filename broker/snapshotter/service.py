"""Requests in, parts of replies out: reads answered at once, writes queued for the next turn, streams on credit.

Everything here runs on the actor's loop and never waits for a disk; the writer's thread, the workers and the trash
have that. A ticket is one open request; its outcomes leave as they get ready, so that a long copy holds up nobody
who happened to be in the same request.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import anyio
import msgspec
from anyio.abc import TaskGroup

from backends.api import Snapshot, Task
from backends.failpoints import reach
from broker.access import WHOLE, Denials, Grant, decode_grant
from broker.logs import get_logger
from broker.snapshotter.errors import error_of
from broker.snapshotter.operations import Delivery, Operation, Result
from broker.snapshotter.writer import READ_WEIGHT, Errand
from broker.store import Token, digest_of
from snapbroker.contract import check_namespace, topic
from snapbroker.errors import (
    BrokerError,
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from snapbroker.protocol import (
    CREDIT_MAX,
    DONE,
    FILTERS_MAX,
    MORE,
    Audit,
    Cancel,
    Cleanup,
    Commit,
    Events,
    Mounts,
    Outcome,
    Prepare,
    Progress,
    Remove,
    Repair,
    Reply,
    Request,
    Stat,
    Update,
    UsageOf,
    View,
    Walk,
    Why,
    decode_request,
    encode,
    fault,
)

if TYPE_CHECKING:
    from broker.actor.fairness import Mix
    from broker.snapshotter.audits import Audits
    from broker.snapshotter.reader import Reader
    from broker.snapshotter.trash import Trash
    from broker.snapshotter.writer import Writer

log = get_logger()

PART_BYTES_MAX: Final = 4 * 1024 * 1024
"""Outcomes gathered before a part is sent."""
SLICE: Final = 128
"""Writes of one request that are queued before the loop gets a turn; a read counts for `READ_WEIGHT` of them."""
_WRITES: Final = frozenset((Prepare, View, Commit, Remove, Update))
_MILLISECOND: Final = 1_000_000
NOTHING: Final[Mapping[int, BrokerError]] = {}
"""What is refused where nothing is."""


class ServiceLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits of an actor's front."""

    audits_max: int = 2
    """Most audits, repairs and whys at work at a time: each reads all there is."""
    streams_max: int = 256
    """Most walks, event streams and cleanups open at a time, and one client has no more than are free."""
    follow_max_ms: int = 60_000
    """Longest a followed stream of events waits; then it ends without error, and the client asks again."""
    timeout_default_ms: int = 60_000
    """Deadline of a request that names none."""
    timeout_max_ms: int = 24 * 3600 * 1000
    """Longest deadline a request can ask for."""
    progress_interval_ms: int = 500
    """How often a long call tells how far it is."""
    stop_grace_ms: int = 3000
    """On a stop, how long what was accepted may take before it is taken back."""


Send = Callable[[bytes, bytes, bytes, bytes], None]


class Ticket:
    """One open request: which outcomes are ready, how many are missing, and what works on them."""

    __slots__ = (
        "abandoned",
        "aside",
        "bytes",
        "client",
        "closed",
        "ended",
        "grant",
        "missing",
        "operations",
        "outcomes",
        "request",
        "request_id",
        "scopes",
        "service",
        "unread",
    )

    def __init__(self, service: Service, client: bytes, request_id: bytes, missing: int) -> None:
        self.service = service
        self.client = client
        self.request_id = request_id
        self.missing = missing
        self.outcomes: list[Outcome] = []
        self.bytes = 0
        self.closed = False
        self.abandoned = False
        self.grant: Grant | None = None
        self.request: Request | None = None
        self.ended: dict[int, BrokerError] = {}
        self.aside = False
        self.unread: dict[int, Any] = {}
        """Calls that were not looked at yet, by number."""
        self.operations: list[Operation] = []
        self.scopes: dict[int, anyio.CancelScope] = {}

    @property
    def takes_back(self) -> bool:
        """Whether it begins with a Cancel, which does not wait behind what it takes back."""
        return type(self.unread.get(0)) is Cancel

    def settle(self, index: int, result: Result) -> None:
        """Take an outcome; `flush` sends it."""
        if isinstance(result, bytes):
            self.outcomes.append(Outcome(call=index, ok=msgspec.Raw(result)))
            self.bytes += len(result)
        else:
            if self.ended:
                result = self.ended.get(index, result)
            if self.abandoned and isinstance(result, Cancelled):
                # The caller did not take it back, and may repeat it: cancelled would say neither.
                result = Unavailable(
                    "the snapshotter stopped before the call was done; nothing was changed, repeat in a moment",
                    {"retry_after_ms": 1000},
                )
            self.outcomes.append(Outcome(call=index, error=fault(result)))
        self.missing -= 1
        if self.bytes > PART_BYTES_MAX:
            self.flush()

    def page(self, index: int, answer: bytes) -> None:
        """Send one page of a stream; more follow."""
        self._send(MORE, (Outcome(call=index, ok=msgspec.Raw(answer)),))

    def progressed(self, index: int, task: Task) -> None:
        """Send how far a long call is."""
        progress = Progress(entries=task.entries, bytes=task.bytes)
        self._send(MORE, (Outcome(call=index, progress=progress),))

    def flush(self) -> None:
        """Send what is ready; the last part closes the ticket, after which there is nothing to send."""
        if self.closed:
            return
        if self.missing:
            if self.outcomes:
                self._send(MORE, tuple(self.outcomes))
        else:
            self.closed = True
            self._send(DONE, tuple(self.outcomes))
            self.service.close_ticket(self)
        self.outcomes = []
        self.bytes = 0

    def _send(self, status: bytes, outcomes: tuple[Outcome, ...]) -> None:
        self.service.send(self.client, self.request_id, status, encode(Reply(outcomes=outcomes)))

    def set_aside(self) -> None:
        """Tell the router, once, that what is left goes on beside the turns."""
        if not self.aside and not self.closed:
            self.aside = True
            self.service.aside(self.client, self.request_id)

    def cancel(self, calls: tuple[int, ...] = ()) -> None:
        """Take back what is not done yet; with `calls`, of these numbers only."""
        for number in [number for number in self.unread if not calls or number in calls]:
            del self.unread[number]
            self.settle(number, Cancelled("the call was taken back before it began"))
        for operation in self.operations:
            numbers = range(operation.first, operation.first + len(operation.calls))
            if not calls or any(number in numbers for number in calls):
                operation.cancel()
        for number, scope in self.scopes.items():
            if not calls or number in calls:
                scope.cancel()

    def end(self, index: int, error: BrokerError) -> None:
        """End one stream with this error."""
        if index in self.scopes:
            self.ended[index] = error
            self.scopes[index].cancel()

    def abandon(self) -> None:
        """Take back what is not done yet because the snapshotter stops: the caller is told to repeat it."""
        self.abandoned = True
        self.cancel()


class Service:
    """The front of one snapshotter."""

    def __init__(
        self,
        snapshotter: str,
        send: Send,
        reader: Reader,
        writer: Writer,
        trash: Trash,
        tasks: TaskGroup,
        sync_remove: bool,
        limits: ServiceLimits,
        publish: Callable[[list[tuple[str, int, bytes]]], None],
        audits: Audits,
        aside: Callable[[bytes, bytes], None],
        mix: Mix,
    ) -> None:
        self._mix = mix
        self._audits = audits
        self._snapshotter = snapshotter
        self.send = send
        self.aside = aside
        self._reader = reader
        self._writer = writer
        self._trash = trash
        self._tasks = tasks
        self._sync_remove = sync_remove
        self._limits = limits
        self._publish = publish
        self._open: dict[tuple[bytes, bytes], Ticket] = {}
        self._streams = 0
        self._streams_of: Counter[bytes] = Counter()
        self._loop = asyncio.get_running_loop()
        self._news = anyio.Event()
        self._idle = anyio.Event()
        self._stopping = False
        self._requests = 0
        self._calls = 0
        self._denials = Denials("a call was refused")
        self._steps: dict[bytes, deque[tuple[Ticket, Callable[[], bool]]]] = {}
        """By client, what is to be looked at in the next turns of the loop."""

    # In.

    def receive(self, client: bytes, request_id: bytes, arrival: int, body: bytes, grant: bytes = WHOLE) -> None:
        """Take a request; whatever it is, it gets a reply and nothing is raised."""
        self._requests += 1
        self._mix.see(client)
        try:
            if self._stopping:
                raise Unavailable("the snapshotter is stopping, repeat in a moment", {"retry_after_ms": 1000})
            request = decode_request(body)
            check_namespace(request.namespace)
            ticket = Ticket(self, client, request_id, len(request.calls))
            if grant:
                self._accept_some(ticket, request, arrival, decode_grant(grant))
            else:
                self._accept(ticket, request, arrival)
        except Exception as error:
            self._refuse(client, request_id, error_of(error, "the request"))

    def _refuse(self, client: bytes, request_id: bytes, error: BrokerError) -> None:
        ticket = self._open.pop((client, request_id), None)
        if ticket is not None:
            ticket.cancel()
            ticket.closed = True
        self.send(client, request_id, DONE, encode(Reply(error=fault(error))))

    def _accept_some(self, ticket: Ticket, request: Request, arrival: int, grant: Grant) -> None:
        """Take a request of who may not do everything: each call that may not be gets its refusal."""
        ticket.grant, ticket.request = grant, request
        refused: dict[int, BrokerError] = {}
        for index, call in enumerate(request.calls):
            error = grant.refusal(call, request.namespace) or self._unseen(grant, call, request.namespace)
            if error is not None:
                refused[index] = error
                self._denials.add(client=grant.client, reason=error.message)
        if refused and request.atomic:
            first = min(refused)
            for index in range(len(request.calls)):
                if index not in refused:
                    refused[index] = Cancelled(f"call {first} of the atomic request may not be: nothing was executed")
        self._accept(ticket, request, arrival, refused)

    def _unseen(self, grant: Grant, call: Any, namespace: str) -> BrokerError | None:
        """The refusal of an events call that asks for what the client may not see."""
        if isinstance(call, Events):
            try:
                grant.narrowed(self._topics(call, namespace, None), self._snapshotter)
            except PermissionDenied as error:
                return error
            except BrokerError:
                return None  # Malformed: it has its own answer.
        return None

    def regrant(self, key: bytes, frame: bytes) -> None:
        """End the streams that the owner of a key could not begin any more."""
        grant = decode_grant(frame) if frame else None
        for ticket in list(self._open.values()):
            if ticket.grant is None or ticket.request is None or ticket.grant.key.encode() != key:
                continue
            for index in list(ticket.scopes):
                error = self._no_more(ticket.request.calls[index], ticket.request.namespace, ticket.grant, grant)
                if error is not None:
                    self._denials.add(client=ticket.grant.client, reason=error.message)
                    ticket.end(index, error)

    def _no_more(self, call: Any, namespace: str, before: Grant, grant: Grant | None) -> BrokerError | None:
        if grant is None:
            return Unauthenticated("this key was revoked: ask whoever keeps the broker's keys")
        error = grant.refusal(call, namespace) or self._unseen(grant, call, namespace)
        if (
            error is None
            and isinstance(call, Events)
            and grant.prefixes((self._snapshotter,)) != before.prefixes((self._snapshotter,))
        ):
            return Unavailable("what this key may see has changed: ask again", {"retry_after_ms": 1})
        return error

    def _accept(
        self, ticket: Ticket, request: Request, arrival: int, refused: Mapping[int, BrokerError] = NOTHING
    ) -> None:
        deadline = self._deadline(request, arrival)
        self._open[ticket.client, ticket.request_id] = ticket
        for index, error in refused.items():
            ticket.settle(index, error)
        if request.atomic and len(request.calls) > 1 and not refused:
            self._accept_atomic(ticket, request, deadline)
            return
        ticket.unread = {index: call for index, call in enumerate(request.calls) if index not in refused}
        self._in_order(ticket, lambda: self._read(ticket, request, deadline))

    def _in_order(self, ticket: Ticket, step: Callable[[], bool]) -> None:
        """Take a step of a request, behind those of its client before it; again until it says that none is left."""
        steps = self._steps.get(ticket.client)
        if steps is not None and not ticket.takes_back:
            steps.append((ticket, step))
        elif step():
            if steps is None:
                self._loop.call_soon(self._next_step, ticket.client)
            self._steps.setdefault(ticket.client, deque()).append((ticket, step))

    def _next_step(self, client: bytes) -> None:
        steps = self._steps[client]
        ticket, step = steps[0]
        try:
            more = not ticket.closed and step()
        except Exception as error:
            self._refuse(client, ticket.request_id, error_of(error, "the request"))
            more = False
        if not more:
            steps.popleft()
        if steps:
            self._loop.call_soon(self._next_step, client)
        else:
            del self._steps[client]

    def _read(self, ticket: Ticket, request: Request, deadline: int) -> bool:
        """Look at the next calls of a request; whether there are more, before which the loop has a turn."""
        self._writer.give_way()
        unread = ticket.unread
        if len(unread) * READ_WEIGHT <= SLICE:
            calls, ticket.unread = unread, {}
        else:
            calls = {index: unread.pop(index) for index in _slice(unread)}
        namespace, token = request.namespace, _token_of(request)
        operations = [
            Operation(ticket, namespace, (call,), index, deadline, token, ticket.client)
            for index, call in calls.items()
            if type(call) in _WRITES
        ]
        if len(operations) < len(calls):
            self._answer_reads(ticket, namespace, calls, deadline)
        self._calls += len(calls)
        self._writer.charge(len(calls) - len(operations), len(operations))
        if operations:
            self._submit(ticket, operations)
        if ticket.unread:
            return True
        if ticket.outcomes:
            ticket.flush()
        return False

    def _submit(self, ticket: Ticket, operations: list[Operation]) -> None:
        try:
            self._writer.submit(operations, more=bool(ticket.operations))
        except BrokerError as error:
            # What was read is read: the writes alone are refused.
            for operation in operations:
                ticket.settle(operation.first, error)
        else:
            ticket.operations += operations

    def _deadline(self, request: Request, arrival: int) -> int:
        timeout = request.timeout_ms or self._limits.timeout_default_ms
        if not 0 < timeout <= self._limits.timeout_max_ms:
            raise InvalidArgument(f"timeout_ms is 1 to {self._limits.timeout_max_ms}, not {timeout}")
        deadline = arrival + timeout * _MILLISECOND
        if time.monotonic_ns() > deadline:
            raise DeadlineExceeded("the deadline passed before the request was read; it was not executed")
        return deadline

    def _accept_atomic(self, ticket: Ticket, request: Request, deadline: int) -> None:
        for call in request.calls:
            if isinstance(call, (Walk, Events, Cleanup, Cancel, Audit, Repair, Why)):
                raise Unimplemented(
                    "walk, events, cleanup, cancel, audit, repair and why cannot be part of an atomic request"
                )
        token = _token_of(request)
        operation = Operation(ticket, request.namespace, request.calls, 0, deadline, token, ticket.client)
        self._calls += len(request.calls)
        ticket.operations = [operation]

        def submit() -> bool:
            self._writer.submit(ticket.operations)
            return False

        self._in_order(ticket, submit)

    def _answer_reads(self, ticket: Ticket, namespace: str, calls: Mapping[int, Any], deadline: int) -> None:
        """Answer the reads among the calls, and begin the streams."""
        reader = self._reader
        active: list[tuple[int, Snapshot]] = []
        with reader.transaction() as txn:
            for index, call in calls.items():
                kind = type(call)
                if kind in _WRITES:
                    continue
                try:
                    if kind is Stat:
                        ticket.settle(index, reader.stat(txn, namespace, call.key))
                    elif kind is Mounts:
                        ticket.settle(index, reader.mounts(txn, namespace, call.key, call.fence))
                    elif kind is UsageOf:
                        answer = reader.usage(txn, namespace, call.key)
                        if isinstance(answer, bytes):
                            ticket.settle(index, answer)
                        else:
                            active.append((index, answer))
                    else:
                        self._begin(ticket, index, call, namespace, deadline)
                except Exception as error:
                    ticket.settle(index, error_of(error, "the call"))
        if active:
            self._glance(ticket, active)

    def _glance(self, ticket: Ticket, active: list[tuple[int, Snapshot]]) -> None:
        """Let a worker measure the small ones all in one go; each of the others then takes its time apart."""

        def work() -> None:
            results = [(index, snapshot, self._writer.glanced(snapshot)) for index, snapshot in active]
            self._soon(lambda: self._glanced(ticket, results))

        self._writer.submit_work(work, ticket.client)

    def _glanced(self, ticket: Ticket, results: list[tuple[int, Snapshot, Result | None]]) -> None:
        for index, snapshot, result in results:
            if result is not None:
                ticket.settle(index, result)
                continue
            try:
                self._begin_stream(ticket, index, self._measure, snapshot)
            except BrokerError as error:
                ticket.settle(index, error)
        ticket.flush()

    def _begin(self, ticket: Ticket, index: int, call: Any, namespace: str, deadline: int) -> None:
        if isinstance(call, Walk):
            _check_credit(call.credit)
            page = self._reader.walk(namespace, call)
            self._begin_stream(ticket, index, self._walk, call, page, deadline)
        elif isinstance(call, Events):
            _check_credit(call.credit)
            topics = self._topics(call, namespace, ticket.grant)
            self._begin_stream(ticket, index, self._events, call, self._reader.events(call, topics), deadline)
        elif isinstance(call, Cleanup):
            self._begin_stream(ticket, index, self._cleanup, namespace)
        elif isinstance(call, (Audit, Repair)):
            self._begin_stream(ticket, index, self._audit, call, deadline)
        elif isinstance(call, Why):
            self._begin_stream(ticket, index, self._why, call, namespace)
        elif isinstance(call, Cancel):
            self._cancel(ticket, index, call)
        else:
            raise Unimplemented("status is asked of the broker itself: leave the target empty")

    def _topics(self, call: Events, namespace: str, grant: Grant | None) -> tuple[str, ...]:
        if len(call.topics) > FILTERS_MAX:
            raise InvalidArgument(f"{len(call.topics)} topics, more than {FILTERS_MAX}")
        topics = call.topics or (topic(self._snapshotter, namespace, ""),)
        return topics if grant is None else grant.narrowed(topics, self._snapshotter)

    def _cancel(self, ticket: Ticket, index: int, call: Cancel) -> None:
        other = self._open.get((ticket.client, call.request))
        if other is None or other is ticket:
            raise NotFound("no such open request of this client; perhaps it is done")
        other.cancel(call.calls)
        ticket.settle(index, encode({}))

    # Streams.

    def _begin_stream(self, ticket: Ticket, index: int, stream: Callable[..., Any], *arguments: Any) -> None:
        if self._tasks.cancel_scope.cancel_called:
            raise Unavailable("the snapshotter is stopping, repeat in a moment", {"retry_after_ms": 1000})
        own = self._streams_of[ticket.client]
        if own >= self._limits.streams_max - self._streams:
            raise ResourceExhausted(
                f"{own} streams of this client are open, and {self._streams} of all: "
                f"streams_max={self._limits.streams_max}, and one client has no more than is free",
                {"retry_after_ms": 100, "position": own},
            )
        self._streams += 1
        self._streams_of[ticket.client] += 1
        ticket.set_aside()
        scope = anyio.CancelScope()
        ticket.scopes[index] = scope
        self._tasks.start_soon(self._run_stream, ticket, index, scope, stream, arguments)

    async def _run_stream(
        self,
        ticket: Ticket,
        index: int,
        scope: anyio.CancelScope,
        stream: Callable[..., Any],
        arguments: tuple[Any, ...],
    ) -> None:
        result: Result = Cancelled("the call was taken back")
        try:
            with scope:
                result = await stream(ticket, index, *arguments)
        except Exception as error:
            result = error_of(error, "the call")
        finally:
            self._streams -= 1
            self._streams_of[ticket.client] -= 1
            if not self._streams_of[ticket.client]:
                del self._streams_of[ticket.client]
        ticket.settle(index, result)
        ticket.flush()

    async def _walk(
        self, ticket: Ticket, index: int, call: Walk, page: Callable[[str], tuple[bytes, str]], deadline: int
    ) -> bytes:
        after = call.after
        for number in range(call.credit):
            _check_deadline(deadline)
            answer, after = page(after)
            if not after or number + 1 == call.credit:
                return answer
            ticket.page(index, answer)
            await anyio.lowlevel.checkpoint()
        raise AssertionError("a credit is at least one page")

    async def _events(
        self,
        ticket: Ticket,
        index: int,
        call: Events,
        page: Callable[[int], tuple[bytes, int, int, bool]],
        deadline: int,
    ) -> bytes:
        since, credit, begun = call.since, call.credit, time.monotonic_ns()
        while True:
            news = self._news
            answer, since, newest, some = page(since)
            caught_up = since >= newest
            if caught_up and not call.follow:
                return answer
            if some or not caught_up:
                credit -= 1
                if not credit:
                    return answer
                ticket.page(index, answer)
            if not caught_up:
                await anyio.lowlevel.checkpoint()
                continue
            # A client that went away tells nobody: so a stream lasts no longer than its limit, and is asked for again.
            until = min(deadline, begun + self._limits.follow_max_ms * _MILLISECOND)
            with anyio.move_on_after((until - time.monotonic_ns()) / 1e9) as waiting:
                await news.wait()
            if waiting.cancelled_caught or self._stopping:
                return page(since)[0]

    async def _measure(self, ticket: Ticket, index: int, snapshot: Snapshot) -> bytes:
        task = Task()
        done = anyio.Event()
        outcome: list[Result] = []

        def work() -> None:
            outcome.append(self._writer.measured(snapshot, task))
            self._soon(done.set)

        self._writer.submit_work(work, ticket.client)
        try:
            await done.wait()
        finally:
            task.cancel()
        if isinstance(outcome[0], BrokerError):
            raise outcome[0]
        return outcome[0]

    async def _audit(self, ticket: Ticket, index: int, call: Audit | Repair, deadline: int) -> bytes:
        return await self._audits.stream(
            call,
            deadline,
            lambda answer: ticket.page(index, answer),
            lambda task: ticket.progressed(index, task),
            lambda: self._stopping,
        )

    async def _why(self, _ticket: Ticket, _index: int, call: Why, namespace: str) -> bytes:
        return await self._audits.why(call, namespace)

    async def _cleanup(self, ticket: Ticket, index: int, namespace: str) -> bytes:
        """Wait until what is put aside by this moment is deleted, then write the event (D7, D13)."""
        await self._wait_for_trash(ticket, index)
        failures = self._trash.failures()
        if failures:
            name, reason = next(iter(failures.items()))
            raise Internal(f"{len(failures)} removed snapshots cannot be deleted, first {name}: {reason}")
        reach("service.emptied")
        written = anyio.Event()
        errors: list[BrokerError | None] = []

        def done(error: BrokerError | None) -> None:
            errors.append(error)
            self._soon(written.set)

        self._writer.errand(Errand(lambda txn, turn, now: turn.append(txn, now, namespace, "cleanup", ""), done))
        await written.wait()
        if errors[0] is not None:
            raise errors[0]
        return encode({})

    async def _wait_for_trash(self, ticket: Ticket, index: int) -> None:
        """Wait until the trash is as empty as asked, telling how much is left."""
        empty = anyio.Event()
        undo = self._trash.when_empty(lambda: self._soon(empty.set))
        try:
            while not empty.is_set():
                with anyio.move_on_after(self._limits.progress_interval_ms / 1000):
                    await empty.wait()
                    return
                left = Task()
                backlog = self._trash.backlog()
                left.entries, left.bytes = backlog["entries"], backlog["bytes"]
                ticket.progressed(index, left)
        finally:
            undo()

    # Out.

    def deliver(self, delivery: Delivery) -> None:
        """Send the outcomes of a committed turn, then its events."""
        touched: dict[Ticket, None] = {}
        for operation, results in delivery.results:
            ticket: Any = operation.requester
            if len(results) == len(operation.calls):
                for number, result in enumerate(results, operation.first):
                    if self._sync_remove and type(operation.calls[number - operation.first]) is Remove:
                        ticket.set_aside()
                        self._settle_deleted(ticket, number, result)
                    else:
                        ticket.settle(number, result)
            else:
                for number in range(len(operation.calls)):
                    ticket.settle(number, results[0])
            touched[ticket] = None
        for ticket in touched:
            if ticket.outcomes or not ticket.missing:
                self._flush(ticket)
        for operation in delivery.aside:
            operation.requester.set_aside()
        if delivery.events:
            reach("service.answered")
            self._publish(delivery.events)
            reach("service.published")
            self._news.set()
            self._news = anyio.Event()

    def _flush(self, ticket: Ticket) -> None:
        """One reply that cannot be sent must not keep the others and the events from leaving."""
        try:
            ticket.flush()
        except Exception as error:
            self._refuse(ticket.client, ticket.request_id, error_of(error, "the reply"))

    def _settle_deleted(self, ticket: Ticket, index: int, result: Result) -> None:
        """With `sync_remove`, a removal is answered once its files are deleted (C43)."""

        def settle() -> None:
            ticket.settle(index, result)
            ticket.flush()

        if isinstance(result, bytes):
            self._trash.when_empty(lambda: self._soon(settle))
        else:
            ticket.settle(index, result)

    def close_ticket(self, ticket: Ticket) -> None:
        """The last part is sent."""
        self._open.pop((ticket.client, ticket.request_id), None)
        if self._stopping and not self._open:
            self._idle.set()

    async def tell_progress(self) -> None:
        """Send the progress of long calls, until cancelled."""
        known: dict[Operation, tuple[int, int]] = {}
        while True:
            await anyio.sleep(self._limits.progress_interval_ms / 1000)
            seen: dict[Operation, tuple[int, int]] = {}
            for ticket in list(self._open.values()):
                for operation in ticket.operations:
                    task = operation.task
                    if task is None or not operation.needs:
                        continue
                    figures = (task.entries, task.bytes)
                    if operation in known and figures != known[operation]:
                        ticket.progressed(operation.first, task)
                    seen[operation] = figures
            known = seen

    def _soon(self, call: Callable[[], None]) -> None:
        """Run `call` on the loop, from any thread."""
        self._loop.call_soon_threadsafe(call)

    async def stop(self) -> None:
        """Refuse what comes, finish what was accepted, take back what takes longer than the grace."""
        self._stopping = True
        self._news.set()
        if self._open:
            with anyio.move_on_after(self._limits.stop_grace_ms / 1000):
                await self._idle.wait()
        for ticket in list(self._open.values()):
            ticket.abandon()
        self._writer.abandon()
        if self._open:
            with anyio.move_on_after(0.5):
                await self._idle.wait()

    def statistics(self) -> dict[str, dict[str, int]]:
        """For `status`."""
        return {
            "service": {
                "open": len(self._open),
                "streams": self._streams,
                "streams_limit": self._limits.streams_max,
                "requests": self._requests,
                "calls": self._calls,
                "denied": self._denials.count,
            }
        }


def _slice(calls: Mapping[int, Any]) -> list[int]:
    """The numbers of the first calls that are a slice together."""
    weight = 0
    numbers = []
    for number, call in calls.items():
        weight += 1 if type(call) in _WRITES else READ_WEIGHT
        if weight > SLICE:
            break
        numbers.append(number)
    return numbers


def _token_of(request: Request) -> Token | None:
    return Token(request.namespace, request.token, digest_of(request.calls)) if request.token else None


def _check_credit(credit: int) -> None:
    if not 0 < credit <= CREDIT_MAX:
        raise InvalidArgument(f"credit is 1 to {CREDIT_MAX} pages, not {credit}")


def _check_deadline(deadline: int) -> None:
    if time.monotonic_ns() > deadline:
        raise DeadlineExceeded("the deadline passed in the middle of a walk: go on behind the last page's `next`")
