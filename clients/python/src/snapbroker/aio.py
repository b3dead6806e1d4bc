"""The asyncio client: the same verbs as the blocking one, for programs with thousands of calls under way.

Calls made in one turn of the loop travel together. A call only joins the exchange that is being gathered for its
snapshotter, namespace and timeout; the exchange is sent when the tasks that are ready have run. A call costs
one future and a share of a message: no task, no timer and no cancel scope of its own.

The connection has no background task either. Its socket is drained by a callback of the loop: nothing has to be
cancelled, a connection may be opened in one task and closed in another, and a lone call has one wake-up less
(measured, a stat by one caller, median: 94-117 us, and 152-185 us with a task that waits for the descriptor). The
ZeroMQ descriptor is edge-triggered: it is drained until nothing comes, and looked at again after every send, which
may have eaten the edge.

A caller that is cancelled gives its call up. The exchange is taken back when all its callers have: see `session`.

An exchange that is to be repeated stays among those under way, not sent, while its timer runs to the next try.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

import anyio
import anyio.lowlevel
import msgspec
import zmq

from snapbroker import endpoints, messages, protocol, session, sockets, subscriber
from snapbroker.contract import Event, Info, Mounts, Usage
from snapbroker.errors import (
    BrokerError,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    OutOfRange,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from snapbroker.keyfiles import Curve
from snapbroker.protocol import (
    CALLS_MAX,
    REQUEST_VERSION,
    AuditPage,
    Call,
    EventsPage,
    Finding,
    StatusAnswer,
    WalkPage,
    WhyAnswer,
)
from snapbroker.session import BatchCalls, Exchange, OnProgress, Pursuit, Read, Stream

_TURN = 256
"""How many events an iterator gives out before it lets the other tasks run."""

T = TypeVar("T")
_Lane = tuple[bytes, str, float]
"""What calls must share to travel together: target, namespace and timeout."""


class Statistics(msgspec.Struct, frozen=True):
    """What the connection has done, and what it waits for.

    `requests` sent with `calls`; requests `under_way`, of them `unsent` for want of a connection; replies that were
    `stray`: late, or none at all; how often a request was `repeated`.
    """

    requests: int
    calls: int
    under_way: int
    unsent: int
    stray: int
    repeated: int = 0


class _Connection:
    """One DEALER socket on the running loop, and the requests under way on it."""

    def __init__(
        self,
        endpoint: str,
        events_endpoint: str | None,
        timeout: float,
        connect_timeout: float,
        patience: float,
        calls_per_request: int,
        curve: Curve | None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.endpoint = endpoint
        self.timeout = timeout
        self.patience = session.Patience(patience, self._loop.time)
        self.closed = False
        self.sockets = sockets.Sockets(self, endpoint, curve)
        self._events_endpoint = events_endpoint
        self._connect_timeout = connect_timeout
        self._calls_per_request = calls_per_request
        self._reads_per_request = min(session.READS_PER_REQUEST, calls_per_request)
        self._gathering: dict[_Lane, Exchange] = {}
        self._under_way: dict[bytes, Pursuit] = {}
        self._unsent: deque[Pursuit] = deque()
        self._subscriptions: set[sockets.Socket] = set()
        self._number = 0
        self._requests = 0
        self._calls = 0
        self._stray = 0
        self._repeated = 0
        try:
            self._socket, self._monitor = self.sockets.dealer(endpoint)
        except BaseException:
            self.sockets.end()
            raise
        self._line = self.sockets.line(self._socket, self._monitor, endpoint)
        self._loop.add_reader(sockets.descriptor(self._socket), self._drain)
        self._loop.add_reader(sockets.descriptor(self._monitor), self._look)
        self._loop.call_soon(self._look)

    # Calls into requests.

    def gather(self, lane: _Lane) -> Exchange:
        """The exchange that the next call of this lane travels in."""
        exchange = self._gathering.get(lane)
        if exchange is None:
            self.check_open()
            if not self._gathering:
                self._loop.call_soon(self.flush)
            exchange = self._gathering[lane] = Exchange(*lane)
        return exchange

    async def call(self, lane: _Lane, call: Call, read: Read[T], progress: OnProgress | None = None) -> T:
        """One call, together with whatever else is called in this turn."""
        future: asyncio.Future[T] = self._loop.create_future()
        exchange = self._gathering.get(lane) or self.gather(lane)
        most = self._reads_per_request if type(call) in session.READS else self._calls_per_request
        if exchange.add(call, read, future, progress) >= most:
            del self._gathering[lane]
            self.launch(exchange)
        try:
            return await future
        except asyncio.CancelledError:
            if future.cancelled():
                exchange.abandon()
                self._take_back_call(exchange, future)
            raise

    def flush(self) -> None:
        """Send what was gathered."""
        gathering, self._gathering = self._gathering, {}
        for exchange in gathering.values():
            self.launch(exchange)

    def launch(self, pursuit: Pursuit) -> None:
        """Begin a request."""
        if isinstance(pursuit, Exchange):
            pursuit.without_abandoned()
            if not pursuit.calls:
                return
            self.patience.equip(pursuit)
        try:
            body = pursuit.encode()
        except InvalidArgument as error:
            self._launch_apart(pursuit, error)
            return
        pursuit.deadline = self._loop.time() + pursuit.timeout
        self._requests += 1
        self._calls += len(pursuit.calls)
        self._dispatch(pursuit, body, pursuit.timeout)

    def _dispatch(self, pursuit: Pursuit, body: bytes, time_left: float) -> None:
        """Send a request, or keep it until there is a connection."""
        self._number += 1
        pursuit.request_id = self._number.to_bytes(8, "big")
        self._under_way[pursuit.request_id] = pursuit
        # A connection that broke is noticed before it is used, or its end would be taken for the end of this request.
        if messages.readable(self._monitor):
            self._look()
        if self._unsent or not self._send(pursuit, body):
            self._unsent.append(pursuit)
            self._line.knock()
            time_left = time_left if self._line.connected else min(time_left, self._time_to_connect(pursuit))
        self._arm(pursuit, time_left)

    def _time_to_connect(self, pursuit: Pursuit) -> float:
        if pursuit.repeats is None:
            return self._connect_timeout
        return min(self._connect_timeout, pursuit.repeats.patience_left)

    def _launch_apart(self, pursuit: Pursuit, error: InvalidArgument) -> None:
        """One call that cannot be sent must not fail those it travels with: halve until it is alone."""
        halves = pursuit.halves() if isinstance(pursuit, Exchange) else []
        for half in halves:
            self.launch(half)
        if not halves:
            self._end(pursuit, error)

    def _send(self, pursuit: Pursuit, body: bytes) -> bool:
        if not self._line.connected:
            return False
        frames = (REQUEST_VERSION, pursuit.request_id, pursuit.target, body)
        try:
            messages.send(self._socket, frames)
        except zmq.Again:
            return False
        pursuit.sent = True
        if messages.readable(self._socket):
            self._loop.call_soon(self._drain)
        if pursuit.repeats is not None and isinstance(pursuit, Exchange) and (given_up := pursuit.given_up):
            self._take_back(pursuit, given_up)
        return True

    def _send_unsent(self) -> None:
        while self._unsent and self._send(self._unsent[0], self._unsent[0].encode()):
            pursuit = self._unsent.popleft()
            self._arm(pursuit, pursuit.deadline - self._loop.time())

    # Replies into outcomes.

    def _drain(self) -> None:
        """Take every message that is there."""
        while not self.closed and messages.readable(self._socket):
            self._take(messages.receive(self._socket, messages.NOBLOCK))
        if self._unsent and not self.closed:
            self._send_unsent()

    def _take(self, frames: Sequence[bytes]) -> None:
        reply = session.reply_frames(frames)
        pursuit = self._under_way.get(reply[0]) if reply is not None else None
        if reply is None or pursuit is None:
            self._stray += 1
            return
        try:
            finished = pursuit.receive(reply[2], reply[1])
        except Internal as error:
            pursuit.doubt = True
            pursuit.fail(error)
            finished = True
        if not finished:
            self.take_back_if_forsaken(pursuit)
        elif pursuit.failure is not None:
            self._repeat_later(pursuit, pursuit.failure)
        else:
            self._forget(pursuit)

    def _look(self) -> None:
        """Learn from the monitor whether the connection broke: replies under way on it will never come."""
        if self.closed:
            return
        broke = self._line.learn()
        if broke:
            self._drain()
            error = Unavailable(sockets.vanished(self.endpoint))
            for pursuit in [pursuit for pursuit in self._under_way.values() if pursuit.sent]:
                pursuit.doubt = True
                self._repeat_later(pursuit, error)
        if self._line.refused is not None:
            for pursuit in list(self._unsent):
                self._end(pursuit, Unauthenticated(self._line.refused))
        if self._line.connected and not self.closed:
            self._drain()

    # Repeats.

    def _repeat_later(self, pursuit: Pursuit, error: BrokerError) -> None:
        """Send a request once more after a pause; `error` ends it where it was repeated for long enough."""
        if pursuit.forsaken:
            self._forget(pursuit)
            return
        pause = pursuit.pause(self.patience, error) if isinstance(pursuit, Exchange) else None
        if pause is None:
            self._end(pursuit, error)
            return
        self._disarm(pursuit)
        pursuit.timer = self._loop.call_later(pause, self._repeat, pursuit)

    def _repeat(self, pursuit: Pursuit) -> None:
        pursuit.timer = None
        del self._under_way[pursuit.request_id]
        self._repeated += 1
        self._dispatch(pursuit, pursuit.encode(), pursuit.deadline - self._loop.time())

    # Ends.

    def _arm(self, pursuit: Pursuit, within: float) -> None:
        self._disarm(pursuit)
        if within != math.inf:
            pursuit.timer = self._loop.call_later(within, self._expire, pursuit, within)

    def _disarm(self, pursuit: Pursuit) -> None:
        if pursuit.timer is not None:
            pursuit.timer.cancel()
            pursuit.timer = None

    def _expire(self, pursuit: Pursuit, within: float) -> None:
        pursuit.timer = None
        if pursuit.sent:
            pursuit.doubt = True
            self._take_back(pursuit)
            self._end(pursuit, DeadlineExceeded(sockets.overdue(self.endpoint, pursuit.target, pursuit.timeout)))
            return
        error = self._line.absent(within)
        if pursuit.repeats is None:
            self._end(pursuit, error)
        else:
            self._unsent.remove(pursuit)
            self._repeat_later(pursuit, error)

    def take_back_if_forsaken(self, pursuit: Pursuit) -> None:
        """Send the Cancel of a request that nobody waits for any more."""
        if pursuit.forsaken and pursuit.request_id in self._under_way:
            self._take_back(pursuit)
            self._forget(pursuit)

    def _take_back_call(self, exchange: Exchange, slot: asyncio.Future[T]) -> None:
        """One caller gave up: its call is taken back alone while others wait for theirs."""
        if exchange.forsaken:
            self.take_back_if_forsaken(exchange)
        elif exchange.request_id in self._under_way and (number := exchange.number(slot)) is not None:
            self._take_back(exchange, (number,))

    def _take_back(self, pursuit: Pursuit, calls: tuple[int, ...] = ()) -> None:
        if not pursuit.sent:
            return
        self._number += 1
        body = session.encode_cancel(pursuit.request_id, pursuit.namespace, calls)
        frames = (REQUEST_VERSION, self._number.to_bytes(8, "big"), pursuit.target, body)
        # Without a connection there is nobody to tell: the broker has lost the request with it.
        with suppress(zmq.Again):
            messages.send(self._socket, frames)
        if messages.readable(self._socket):
            self._loop.call_soon(self._drain)

    def _end(self, pursuit: Pursuit, error: BrokerError) -> None:
        self._forget(pursuit)
        pursuit.fail(error)

    def _forget(self, pursuit: Pursuit) -> None:
        self._under_way.pop(pursuit.request_id, None)
        self._disarm(pursuit)
        if not pursuit.sent:
            with suppress(ValueError):
                self._unsent.remove(pursuit)
        if pursuit.on_end is not None:
            pursuit.on_end()

    def check_open(self) -> None:
        """Raise FailedPrecondition on a connection that was closed."""
        if self.closed:
            raise FailedPrecondition(f"the connection to {self.endpoint} is closed: connect again")

    def close(self) -> None:
        """Take back what is under way, and close the sockets."""
        if self.closed:
            return
        error = Unavailable(f"the connection to {self.endpoint} was closed with the call under way")
        gathering, self._gathering = self._gathering, {}
        for pursuit in [*self._under_way.values(), *gathering.values()]:
            pursuit.doubt = pursuit.doubt or pursuit.sent
            self._take_back(pursuit)
            self._end(pursuit, error)
        self.closed = True
        for socket in list(self._subscriptions):
            self.unsubscribe(socket)
        self._loop.remove_reader(sockets.descriptor(self._socket))
        self._loop.remove_reader(sockets.descriptor(self._monitor))
        self.sockets.close_dealer(self._socket, self._monitor)
        self.sockets.end()

    async def run(self, exchange: Exchange) -> None:
        """Send a request of one caller, and wait for all its outcomes."""
        self.check_open()
        ended = asyncio.Event()
        exchange.on_end = ended.set
        # What was called before in this turn goes first.
        self.flush()
        self.launch(exchange)
        try:
            await ended.wait()
        except asyncio.CancelledError:
            exchange.abandon_all()
            self.take_back_if_forsaken(exchange)
            raise

    async def status(self, timeout: float) -> StatusAnswer:
        """How the broker is."""
        return await self.call((b"", "", timeout), protocol.Status(), session.read_status)

    async def subscribe(self, prefixes: tuple[bytes, ...]) -> sockets.Socket:
        """A socket of the publisher; the broker is asked where it is, if neither argument nor environment tells."""
        if self._events_endpoint is None:
            status = await self.status(self.timeout)
            self._events_endpoint = endpoints.reachable_events_endpoint(status, self.endpoint)
        self.check_open()
        socket = self.sockets.subscriber(self._events_endpoint, prefixes)
        self._subscriptions.add(socket)
        return socket

    def unsubscribe(self, socket: sockets.Socket) -> None:
        """Close a socket of the publisher; who waits for it learns of it."""
        if not socket.closed:
            anyio.notify_closing(sockets.descriptor(socket))
            self.sockets.close_subscriber(socket)
        self._subscriptions.discard(socket)

    def statistics(self) -> Statistics:
        """The counters and queues."""
        return Statistics(
            self._requests, self._calls, len(self._under_way), len(self._unsent), self._stray, self._repeated
        )


class _View:
    """One snapshotter and namespace: the lane of the calls that go there, once the snapshotter is known."""

    def __init__(self, connection: _Connection, namespace: str, snapshotter: str | None) -> None:
        self.connection = connection
        self.namespace = namespace
        self.lane: _Lane | None = None
        if snapshotter is not None:
            self.lane = (endpoints.target_frame(snapshotter), namespace, connection.timeout)

    async def resolved(self, timeout: float | None = None) -> _Lane:
        """The lane; the broker is asked for its only snapshotter where none was named."""
        connection = self.connection
        if self.lane is None:
            status = await connection.status(connection.timeout)
            name = endpoints.only_snapshotter(status, connection.endpoint)
            self.lane = (endpoints.target_frame(name), self.namespace, connection.timeout)
        return self.lane if timeout is None else (self.lane[0], self.namespace, timeout)


class _Pages(Generic[T]):
    """The pages of one request; closing it early tells the broker."""

    def __init__(self, connection: _Connection, stream: Stream[T]) -> None:
        connection.check_open()
        self._connection = connection
        self._stream = stream
        self._waiter: asyncio.Future[None] | None = None
        stream.wake = self._wake
        # What was called before in this turn goes first.
        connection.flush()
        connection.launch(stream)

    @property
    def sent(self) -> bool:
        """Whether the broker was there to be asked."""
        return self._stream.sent

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> T | None:
        """The next page; None at the end."""
        waited = False
        try:
            while True:
                page = self._stream.take()
                if page is not None or self._stream.over:
                    break
                waited = True
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            if not waited:
                await anyio.lowlevel.checkpoint()
        except BaseException:
            self.close()
            raise
        return page

    def close(self) -> None:
        """Pages still to come are not wanted."""
        self._stream.give_up()
        if not self._connection.closed:
            self._connection.take_back_if_forsaken(self._stream)


class Walk:
    """The snapshots that match, in the order of their names: `async for` it, once.

    `sequence` is the newest event that the first page has seen: events above it, applied in order, bring the
    whole walk up to date. Pages are asked for as they are used.
    """

    def __init__(self, view: _View, filters: Sequence[str], timeout: float | None, page: int) -> None:
        self._view = view
        self._timeout = timeout
        self._page = page
        self._filters = session.texts(filters, "filters")
        self._after = ""
        self._sequence: int | None = None
        self._current: _Pages[WalkPage] | None = None
        self._infos: deque[Info] = deque()

    @property
    def sequence(self) -> int:
        """The newest event that the first page has seen; FailedPrecondition before that page has come."""
        if self._sequence is None:
            raise FailedPrecondition("a walk has no sequence before its first page: iterate first, or await first()")
        return self._sequence

    async def first(self) -> int:
        """Wait for the first page; answers `sequence`."""
        if self._sequence is None:
            page = await self._next_page()
            self._infos.extend(page.infos if page is not None else ())
        return self.sequence

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Info:
        while not self._infos:
            page = await self._next_page()
            if page is None:
                raise StopAsyncIteration
            self._infos.extend(page.infos)
        return self._infos.popleft()

    async def pages(self) -> AsyncIterator[WalkPage]:
        """The pages themselves, instead of the infos one by one."""
        while (page := await self._next_page()) is not None:
            yield page

    def close(self) -> None:
        """No more pages are wanted."""
        if self._current is not None:
            self._current.close()

    async def _next_page(self) -> WalkPage | None:
        """The next page; where the walk broke off it is asked for behind the last one, as a request is repeated."""
        connection = self._view.connection
        patience = connection.patience
        deadline = patience.clock() + (connection.timeout if self._timeout is None else self._timeout)
        repeats: session.Repeats | None = None
        while True:
            try:
                return await self._page_or_end()
            except Unavailable as error:
                if repeats is None:
                    if self._current is None or not self._current.sent or not patience.seconds:
                        raise
                    repeats = session.Repeats(patience, deadline)
                pause = repeats.pause(error)
                if pause is None:
                    raise
            await asyncio.sleep(pause)
            connection.check_open()
            self._current = None

    async def _page_or_end(self) -> WalkPage | None:
        if self._current is None:
            self._current = await self._ask()
        page = await self._current.next()
        if page is None and self._after:
            self._current = await self._ask()
            page = await self._current.next()
        if page is None:
            return None
        session.check_continues(page, self._after)
        self._after = page.next
        if self._sequence is None:
            self._sequence = page.sequence
        return page

    async def _ask(self) -> _Pages[WalkPage]:
        call = session.walk(self._filters, self._after, self._page)
        stream: Stream[WalkPage] = Stream(*await self._view.resolved(self._timeout), call, session.read_walk)
        return _Pages(self._view.connection, stream)


class Audit:
    """The findings of one audit or repair: `async for` it, once. `looked`: how much was looked at, as far as known."""

    def __init__(self, view: _View, timeout: float, execute: bool | None, progress: OnProgress | None) -> None:
        self._view = view
        self._timeout = timeout
        self._execute = execute
        self._progress = progress
        self._after = ""
        self._pages: _Pages[AuditPage] | None = None
        self._findings: deque[Finding] = deque()
        self.looked = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Finding:
        while not self._findings:
            page = await self._next_page()
            if page is None:
                raise StopAsyncIteration
            self._findings.extend(page.findings)
        return self._findings.popleft()

    async def _next_page(self) -> AuditPage | None:
        if self._pages is None:
            self._pages = await self._ask()
        page = await self._pages.next()
        if page is None and self._after:
            self._pages = await self._ask()
            page = await self._pages.next()
        if page is not None:
            self._after, self.looked = page.next, page.looked
        return page

    async def _ask(self) -> _Pages[AuditPage]:
        call = session.audit(self._execute, self._after)
        lane = await self._view.resolved(self._timeout)
        return _Pages(self._view.connection, Stream(*lane, call, session.read_audit, self._progress))

    def close(self) -> None:
        """No more findings are wanted: the audit ends."""
        if self._pages is not None:
            self._pages.close()


class Events:
    """The events of one snapshotter, each once and in the order of their sequence: `async for` it.

    What the publisher drops is taken from the journal. OutOfRange: the journal no longer has what is missing,
    walk again. An async context manager: entering it subscribes, leaving it unsubscribes; without one, the
    first step subscribes.
    """

    def __init__(
        self,
        view: _View,
        since: int | None,
        topics: Sequence[str],
        follow: bool,
        timeout: float | None,
        silence: float,
    ) -> None:
        self._view = view
        self._connection = view.connection
        self._since = since
        self._topics = topics
        self._follow = follow
        self._timeout = timeout
        self._silence = silence
        self._heard = 0.0
        self._turn = 0
        self._ready: deque[Event] = deque()
        self._tracker: subscriber.Tracker | None = None
        self._socket: sockets.Socket | None = None
        self._pages: _Pages[EventsPage] | None = None

    async def start(self) -> subscriber.Tracker:
        """Subscribe, unless that is done."""
        if self._tracker is not None:
            return self._tracker
        target, namespace, _ = await self._view.resolved()
        tracker = subscriber.Tracker(target.decode(), namespace, self._topics, self._since or 0, self._silence)
        if self._follow:
            self._socket = await self._connection.subscribe(tracker.subscriptions)
        if self._since is None:
            # Start above the newest event there is: a walk's first page says which that is.
            walk = Walk(self._view, (), self._timeout, 1)
            tracker.begin_at(await walk.first())
            walk.close()
        self._heard = time.monotonic()
        self._tracker = tracker
        return tracker

    @property
    def sequence(self) -> int:
        """Every event asked for up to this one was given out: where another stream goes on (`since=`)."""
        if self._ready:
            return self._ready[0].sequence - 1
        if self._tracker is None:
            raise FailedPrecondition("a stream of events has no sequence before it is started")
        return self._tracker.position

    def statistics(self) -> subscriber.Statistics:
        """What was dropped on the way, and healed."""
        return self._tracker.statistics() if self._tracker is not None else subscriber.Statistics(0, 0, 0, 0)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        event = await self._next()
        if event is None:
            raise StopAsyncIteration
        return event

    async def poll(self, timeout: float) -> Event | None:
        """The next event; None where none comes within `timeout` seconds, or the stream is at its end."""
        with anyio.move_on_after(timeout):
            return await self._next()
        return None

    def close(self) -> None:
        """Unsubscribe; what was received already is still given out."""
        pages, self._pages = self._pages, None
        if pages is not None:
            pages.close()
        socket, self._socket = self._socket, None
        if socket is not None:
            self._connection.unsubscribe(socket)
        if self._tracker is not None:
            self._tracker.behind = False

    async def _next(self) -> Event | None:
        tracker = self._tracker or await self.start()
        while not self._ready:
            await self._let_others_run()
            if tracker.behind:
                await self._ask_journal(tracker)
            elif self._socket is None:
                return None
            elif (event := await self._receive(tracker, self._socket)) is not None:
                return event
        await self._let_others_run()
        return self._ready.popleft()

    async def _let_others_run(self) -> None:
        """Messages that are there already do not suspend this task: a flood of them must not hold up the loop."""
        self._turn += 1
        if self._turn >= _TURN:
            self._turn = 0
            await anyio.lowlevel.checkpoint()

    async def _receive(self, tracker: subscriber.Tracker, socket: sockets.Socket) -> Event | None:
        """The next published event if one comes; None after a message that is not it, and after silence."""
        # The connection may have been closed while this task let others run: its socket is closed with it.
        self._connection.check_open()
        with suppress(zmq.Again):
            frames = messages.receive(socket, messages.NOBLOCK)
            self._heard = time.monotonic()
            return tracker.feed(frames)
        # Since the last message, and not since this call: a program may poll more often than the silence is long.
        left = self._heard + tracker.silence - time.monotonic()
        with anyio.move_on_after(max(0.0, left)) as scope, suppress(anyio.ClosedResourceError):
            await anyio.wait_readable(sockets.descriptor(socket))
        # A process that was held up finds that the time is over, and what came meanwhile.
        if scope.cancelled_caught and not socket.closed and not messages.readable(socket):
            self._heard = time.monotonic()
            sockets.connect_anew(socket)
            tracker.doubt()
        return None

    async def _ask_journal(self, tracker: subscriber.Tracker) -> None:
        """Take a page of what is missing from the journal, asking again until the timeout where it is unavailable."""
        give_up = time.monotonic() + (self._connection.timeout if self._timeout is None else self._timeout)
        pause = subscriber.RETRY_SECONDS
        while True:
            try:
                return await self._read_journal(tracker)
            except OutOfRange as error:
                raise subscriber.walk_again(error, tracker) from None
            except (Unavailable, ResourceExhausted):
                if self._socket is None or time.monotonic() + pause > give_up:
                    raise
            await anyio.sleep(pause)
            pause = min(2 * pause, subscriber.RETRY_SECONDS_MAX)

    async def _read_journal(self, tracker: subscriber.Tracker) -> None:
        if self._pages is None:
            lane = await self._view.resolved(self._timeout)
            stream: Stream[EventsPage] = Stream(*lane, tracker.question(), session.read_events)
            self._pages = _Pages(self._connection, stream)
        pages, self._pages = self._pages, None
        page = await pages.next()
        if page is None:
            return
        self._ready.extend(tracker.page(page))
        if tracker.behind:
            self._pages = pages
        else:
            pages.close()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Batch(BatchCalls):
    """Calls that travel together: sent at the end of the block, unless an exception leaves it."""

    def __init__(self, view: _View, timeout: float | None, *, atomic: bool) -> None:
        super().__init__(b"", view.namespace, view.connection.timeout if timeout is None else timeout, atomic=atomic)
        self._view = view

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        exchange = self._seal()
        if kind is None and exchange.calls:
            exchange.target = (await self._view.resolved())[0]
            await self._view.connection.run(exchange)
            self._raise_first()


class Broker:
    """One snapshotter, in one namespace, of the broker at `endpoint`. For the tasks of one loop, not for threads.

    Every method raises errors of `snapbroker.errors`. `timeout`: how long the call may take, in seconds, the
    connection's own where it is None; after it DeadlineExceeded is raised and the broker is told that nobody waits,
    as it is when the calling task is cancelled.
    `progress` is called with a `protocol.Progress` now and then while a long call is at work.
    """

    def __init__(self, view: _View) -> None:
        self._view = view
        self._connection = view.connection

    @property
    def endpoint(self) -> str:
        """The router's endpoint."""
        return self._connection.endpoint

    @property
    def namespace(self) -> str:
        """The namespace this view is of."""
        return self._view.namespace

    async def snapshotter_name(self) -> str:
        """The snapshotter this view is of; the broker is asked for its only one where none was named."""
        return (await self._view.resolved())[0].decode()

    def snapshotter(self, name: str, *, namespace: str | None = None) -> Broker:
        """The same connection's view of another snapshotter, or of another namespace."""
        chosen = self.namespace if namespace is None else endpoints.namespace_or_default(namespace)
        return Broker(_View(self._connection, chosen, name))

    async def prepare(
        self,
        key: str,
        parent: str = "",
        labels: Mapping[str, str] | None = None,
        *,
        timeout: float | None = None,
        progress: OnProgress | None = None,
    ) -> Mounts:
        """Create the active snapshot `key` on the committed `parent`, or an empty one; answers the mounts to make."""
        return await self._call(session.prepare(key, parent, labels), session.read_mounts, timeout, progress)

    async def view(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None, *, timeout: float | None = None
    ) -> Mounts:
        """Create the read-only snapshot `key` of the committed `parent`; answers the mounts to make."""
        return await self._call(session.view(key, parent, labels), session.read_mounts, timeout)

    async def commit(
        self,
        name: str,
        key: str,
        parent: str = "",
        labels: Mapping[str, str] | None = None,
        sync: bool = False,
        fence: int = 0,
        *,
        timeout: float | None = None,
        progress: OnProgress | None = None,
    ) -> None:
        """Turn the active `key` into the committed `name`, which has exactly `labels`; the key is free again.

        `sync`: its files are durable before the name exists. `parent`: the parent of one prepared without (rebase).
        `fence`: that of the mounts of the snapshot that is meant; FailedPrecondition where `key` is another's.
        """
        call = session.commit(name, key, parent, labels, sync, fence)
        await self._call(call, session.read_nothing, timeout, progress)

    async def remove(self, key: str, fence: int = 0, *, timeout: float | None = None) -> None:
        """Remove a snapshot without children; its files are deleted in the background. `fence`: as for commit."""
        await self._call(session.remove(key, fence), session.read_nothing, timeout)

    async def mounts(self, key: str, fence: int = 0, *, timeout: float | None = None) -> Mounts:
        """The mounts of an active snapshot or view, as prepare and view answered them. `fence`: as for commit."""
        return await self._call(session.mounts(key, fence), session.read_mounts, timeout)

    async def stat(self, key: str, *, timeout: float | None = None) -> Info:
        """What is known of a snapshot."""
        return await self._call(protocol.Stat(key=session.text(key)), session.read_info, timeout)

    async def update(
        self,
        name: str,
        labels: Mapping[str, str] | None,
        fieldpaths: Sequence[str] = (),
        *,
        timeout: float | None = None,
    ) -> Info:
        """Replace all labels, or those that `fieldpaths` name (`labels.<key>`); answers the snapshot with them."""
        return await self._call(session.update(name, labels, fieldpaths), session.read_info, timeout)

    async def usage(self, key: str, *, timeout: float | None = None, progress: OnProgress | None = None) -> Usage:
        """What a snapshot takes beyond its parents; an active one is measured."""
        return await self._call(protocol.UsageOf(key=session.text(key)), session.read_usage, timeout, progress)

    def walk(self, *filters: str, timeout: float | None = None, page: int = session.WALK_PAGE) -> Walk:
        """All snapshots that match one of `filters`, by name, asked for in pages of `page` infos."""
        return Walk(self._view, filters, _checked(timeout), page)

    async def cleanup(self, *, timeout: float | None = None, progress: OnProgress | None = None) -> None:
        """Wait until everything removed so far is deleted from disk."""
        await self._call(protocol.Cleanup(), session.read_nothing, timeout, progress)

    def events(
        self,
        since: int | None = None,
        topics: Sequence[str] = (),
        follow: bool = True,
        *,
        timeout: float | None = None,
        silence: float = subscriber.SILENCE_SECONDS,
    ) -> Events:
        """The events above sequence `since` (None: from here on), on topics that begin with one of `topics`.

        Without topics those of this namespace. With `follow` the stream has no end, else it ends with the newest
        event of the journal. `timeout`: how long a journal that does not answer is asked again. `silence`: after how
        many seconds without any message the journal is asked whether something was missed, until two heartbeats
        have told their interval; from then on three intervals.
        """
        return Events(self._view, since, topics, follow, _checked(timeout), session.seconds(silence))

    def audit(self, *, timeout: float = session.AUDIT_SECONDS, progress: OnProgress | None = None) -> Audit:
        """What is not as it must be with the snapshotter's records, journal and directories, of all namespaces."""
        return Audit(self._view, session.seconds(timeout), None, progress)

    def repair(
        self, execute: bool = False, *, timeout: float = session.AUDIT_SECONDS, progress: OnProgress | None = None
    ) -> Audit:
        """An audit whose findings are mended as they come; without `execute` they only say what would be done."""
        return Audit(self._view, session.seconds(timeout), bool(execute), progress)

    async def why(self, key: str, *, timeout: float | None = None) -> WhyAnswer:
        """What keeps the snapshot `key`, and the last events on this name, also where there is none."""
        return await self._call(protocol.Why(key=session.text(key)), session.read_why, timeout)

    async def status(self, *, timeout: float | None = None) -> StatusAnswer:
        """How the broker and its snapshotters are."""
        return await self._connection.status(self._connection.timeout if timeout is None else session.seconds(timeout))

    def batch(self, atomic: bool = False, *, timeout: float | None = None) -> Batch:
        """Calls that travel together, in order; `atomic`: all take effect or none. An error is raised at the end."""
        return Batch(self._view, _checked(timeout), atomic=atomic)

    def workspace(
        self,
        parent: str = "",
        commit_as: str | None = None,
        key: str | None = None,
        labels: Mapping[str, str] | None = None,
        sync: bool = False,
        *,
        keep_uncommitted: bool = False,
    ) -> AbstractAsyncContextManager[Path]:
        """A mounted directory on top of `parent`: committed as `commit_as` at the end of the block, else discarded.

        An exception that leaves the block discards it as well. `key` is a random one where it is None.
        `keep_uncommitted`: where the block did well and only the commit fails, the active snapshot `key` is kept,
        and a note on the error says so.
        """
        # Only a program that mounts needs the mount helper.
        from snapbroker import workspace

        return workspace.asynchronous(self, workspace.Plan.of(parent, commit_as, key, labels, sync, keep_uncommitted))

    def statistics(self) -> Statistics:
        """What the connection has done, and what it waits for."""
        return self._connection.statistics()

    def _call(
        self, call: Call, read: Read[T], timeout: float | None, progress: OnProgress | None = None
    ) -> Awaitable[T]:
        lane = self._view.lane
        if timeout is None and lane is not None:
            return self._connection.call(lane, call, read, progress)
        return self._call_elsewhere(call, read, timeout, progress)

    async def _call_elsewhere(self, call: Call, read: Read[T], timeout: float | None, progress: OnProgress | None) -> T:
        """A call whose lane is not the usual one, or not known yet."""
        return await self._connection.call(await self._view.resolved(_checked(timeout)), call, read, progress)


def _checked(timeout: float | None) -> float | None:
    return None if timeout is None else session.seconds(timeout)


@asynccontextmanager
async def connect(
    endpoint: str | None = None,
    *,
    namespace: str | None = None,
    snapshotter: str | None = None,
    timeout: float = session.TIMEOUT_SECONDS,
    connect_timeout: float = sockets.CONNECT_SECONDS,
    patience: float = session.PATIENCE_SECONDS,
    events_endpoint: str | None = None,
    calls_per_request: int = session.CALLS_PER_REQUEST,
    curve: Curve | str | os.PathLike[str] | None = None,
) -> AsyncIterator[Broker]:
    """A connection to a broker for the tasks of the running loop, as an async context manager.

    What is not given comes from SNAPBROKER_ENDPOINT, SNAPBROKER_NAMESPACE, SNAPBROKER_SNAPSHOTTER and
    SNAPBROKER_EVENTS_ENDPOINT, else from the defaults: the machine's own socket, `default`, the broker's only
    snapshotter. The broker need not be there yet: a call waits for it up to `connect_timeout` seconds.
    A request whose connection breaks, or that finds the snapshotter unavailable, is repeated for up to `patience`
    seconds, within its own timeout, and takes effect once; with 0 nothing is repeated.
    Calls of one turn of the loop travel together, up to `calls_per_request` in one request, reads in smaller ones.
    `curve`, for a broker behind tcp: the client's key file, or a `Curve`; else SNAPBROKER_CLIENT_KEY names the file.
    The broker's public key is in it, or SNAPBROKER_SERVER_KEY has it.
    """
    if not 0 < calls_per_request <= CALLS_MAX:
        raise InvalidArgument(f"calls_per_request must be 1 to {CALLS_MAX}, not {calls_per_request}")
    router = endpoints.router_endpoint(endpoint)
    publisher = endpoints.events_endpoint(events_endpoint, router)
    chosen_namespace = endpoints.namespace_or_default(namespace)
    chosen_snapshotter = endpoints.snapshotter_or_none(snapshotter)
    connection = _Connection(
        router,
        publisher,
        session.seconds(timeout),
        session.seconds(connect_timeout),
        patience,
        calls_per_request,
        endpoints.curve_for(curve, router, publisher),
    )
    try:
        yield Broker(_View(connection, chosen_namespace, chosen_snapshotter))
    finally:
        connection.close()
