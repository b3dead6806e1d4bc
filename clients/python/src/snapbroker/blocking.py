"""The blocking client: the ten verbs, events, batches and workspaces for programs without a loop.

A call is one send and one receive on a plain socket. Sockets are taken from a stack and put back after the call,
the last used one first: threads that come and go need no sockets of their own, and there are never more
sockets than calls under way at once.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

import zmq

from snapbroker import endpoints, messages, protocol, session, sockets, subscriber
from snapbroker.contract import Event, Info, Mounts, Usage
from snapbroker.errors import (
    BrokerError,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
)
from snapbroker.keyfiles import Curve
from snapbroker.protocol import (
    REQUEST_VERSION,
    AuditPage,
    Call,
    EventsPage,
    Finding,
    StatusAnswer,
    WalkPage,
    WhyAnswer,
)
from snapbroker.session import Answer, BatchCalls, Exchange, OnProgress, Pursuit, Read, Stream

_SLICE_SECONDS: Final = 0.25
"""How long one receive blocks before the connection is looked at."""
_SLICE_MS: Final = round(_SLICE_SECONDS * 1000)

T = TypeVar("T")


class _Channel:
    """One DEALER socket, used by one thread at a time."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._endpoint = connection.endpoint
        self._socket, self._monitor = connection.sockets.dealer(connection.endpoint)
        self._line = connection.sockets.line(self._socket, self._monitor, self._endpoint)
        self._numbers = itertools.count(1)
        self._slice_ms = 0
        self._receive_within(_SLICE_MS)

    def send(self, pursuit: Pursuit) -> None:
        """Send a request; Unavailable where no broker is there within the connect timeout."""
        body = pursuit.encode()
        pursuit.request_id = next(self._numbers).to_bytes(8, "big")
        frames = (REQUEST_VERSION, pursuit.request_id, pursuit.target, body)
        if not self._line.connected or messages.readable(self._monitor):
            self._wait_for_connection(self._time_to_connect(pursuit))
        # Before it is: an interrupt may come between the sending and the noting of it.
        pursuit.sent = True
        try:
            messages.send(self._socket, frames)
        except zmq.Again:
            within = self._time_to_connect(pursuit)
            if not self._socket.poll(_milliseconds(within), zmq.POLLOUT):
                pursuit.sent = False
                raise self._line.absent(within) from None
            messages.send(self._socket, frames)

    def _time_to_connect(self, pursuit: Pursuit) -> float:
        within = min(self._connection.connect_timeout, pursuit.timeout)
        return within if pursuit.repeats is None else min(within, pursuit.repeats.patience_left)

    def _wait_for_connection(self, within: float) -> None:
        give_up = time.monotonic() + within
        self._line.learn()
        self._line.knock()
        while not self._line.connected:
            if (refusal := self._line.refusal()) is not None:
                raise refusal
            left = give_up - time.monotonic()
            if left <= 0:
                raise self._line.absent(within)
            self._monitor.poll(_milliseconds(left))
            self._line.learn()

    def receive(self, pursuit: Pursuit, until: Callable[[], object]) -> None:
        """Take parts of the reply until `until()` is true; raises where that does not happen before the deadline."""
        while not until():
            reply = session.reply_frames(self._next_frames(pursuit))
            if reply is None:
                raise Internal(f"{self._endpoint} does not speak the broker's protocol: is it a broker's router?")
            request_id, last, body = reply
            # What does not match answers an earlier request, whose caller has gone.
            if request_id == pursuit.request_id:
                pursuit.receive(body, last)

    def _next_frames(self, pursuit: Pursuit) -> list[bytes]:
        """The next message: one receive as a rule; the connection is looked at when nothing came for a while."""
        # Parts that keep coming, such as progress, must not put off the end.
        left = pursuit.deadline - time.monotonic()
        self._receive_within(_SLICE_MS if left >= _SLICE_SECONDS else _milliseconds(max(left, 0)))
        try:
            return messages.receive(self._socket)
        except zmq.Again:
            pass
        while True:
            broke = self._line.learn()
            left = pursuit.deadline - time.monotonic()
            over = broke or left <= 0 or self._connection.closed
            self._receive_within(0 if over else min(_SLICE_MS, _milliseconds(left)))
            try:
                return messages.receive(self._socket)
            except zmq.Again:
                if broke:
                    raise Unavailable(sockets.vanished(self._endpoint)) from None
                if left <= 0:
                    message = sockets.overdue(self._endpoint, pursuit.target, pursuit.timeout)
                    raise DeadlineExceeded(message) from None
                self._connection.check_open()

    def _receive_within(self, milliseconds: int) -> None:
        if milliseconds != self._slice_ms:
            self._socket.set(zmq.RCVTIMEO, milliseconds)
            self._slice_ms = milliseconds

    def take_back(self, pursuit: Pursuit) -> None:
        """Tell the broker that nobody waits for the request; what it still answers is passed over.

        Where an interrupt has left half a request, this is its end: the router drops both.
        """
        number = next(self._numbers).to_bytes(8, "big")
        body = session.encode_cancel(pursuit.request_id, pursuit.namespace)
        # Without a connection there is nobody to tell: the broker has lost the request with it.
        with suppress(zmq.ZMQError):
            messages.send(self._socket, (REQUEST_VERSION, number, pursuit.target, body))

    @property
    def lost(self) -> bool:
        """Whether nobody knows what is connected."""
        return self._line.lost

    def close(self) -> None:
        """Close the socket and its monitor."""
        self._connection.sockets.close_dealer(self._socket, self._monitor)


class _Connection:
    """What the views of one `connect` share: endpoints, sockets and the broker's only snapshotter."""

    def __init__(
        self,
        endpoint: str,
        events_endpoint: str | None,
        timeout: float,
        connect_timeout: float,
        patience: float,
        curve: Curve | None,
    ) -> None:
        self.endpoint = endpoint
        self.timeout = timeout
        self.connect_timeout = connect_timeout
        self.patience = session.Patience(patience)
        self.sockets = sockets.Sockets(self, endpoint, curve)
        self.closed = False
        self._closing = threading.Event()
        self._events_endpoint = events_endpoint
        self._idle: deque[_Channel] = deque()
        # The collector may strike inside of it, and have a forgotten walk or stream give its socket back.
        self._lock = threading.RLock()
        try:
            self.give(self.take())
        except BrokerError:
            self.close()
            raise

    def take(self) -> _Channel:
        """A channel for the calling thread alone, until it is given back."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._opened(lambda: _Channel(self))

    def give(self, channel: _Channel) -> None:
        """Put the channel back, if it is of use."""
        if channel.lost:
            with self._lock:
                channel.close()
        else:
            self._idle.append(channel)
        if self.closed:
            self._close_idle()

    def subscribe(self, prefixes: tuple[bytes, ...]) -> sockets.Socket:
        """A socket of the publisher, for the calling iterator alone, until `unsubscribe`."""
        endpoint = self.events_endpoint()
        return self._opened(lambda: self.sockets.subscriber(endpoint, prefixes))

    def unsubscribe(self, socket: sockets.Socket) -> None:
        """Close a socket of the publisher."""
        with self._lock:
            self.sockets.close_subscriber(socket)
        if self.closed:
            self._close_idle()

    def _opened(self, make: Callable[[], T]) -> T:
        with self._lock:
            self.check_open()
            try:
                return make()
            except zmq.ZMQError as error:
                raise ResourceExhausted(
                    f"no further socket to {self.endpoint}: {error}; make fewer calls at once"
                ) from None

    def check_open(self) -> None:
        """Raise FailedPrecondition on a connection that was closed."""
        if self.closed:
            raise FailedPrecondition(f"the connection to {self.endpoint} is closed: connect again")

    def run(self, exchange: Exchange) -> None:
        """Send a request, repeat it where that helps, and wait for the outcomes: an error is that of each call."""
        exchange.deadline = time.monotonic() + exchange.timeout
        self.patience.equip(exchange)
        channel = self.take()
        try:
            while (failure := self._try(channel, exchange)) is not None:
                pause = exchange.pause(self.patience, failure)
                if pause is None:
                    exchange.fail(failure)
                    return
                self.pause(pause)
        except BaseException as error:
            if exchange.sent:
                exchange.doubt = True
                channel.take_back(exchange)
            if not isinstance(error, BrokerError):
                raise
            exchange.fail(error)
        finally:
            self.give(channel)

    def _try(self, channel: _Channel, exchange: Exchange) -> BrokerError | None:
        """Send a request and take its reply; answers why it is to be repeated, None where it is not."""
        try:
            channel.send(exchange)
            channel.receive(exchange, lambda: not exchange.unsettled or exchange.failure or exchange.forsaken)
        except Unavailable as error:
            if not exchange.sent and exchange.repeats is None:
                raise
            exchange.doubt = exchange.doubt or exchange.sent
            return error
        if exchange.forsaken:
            channel.take_back(exchange)
            return None
        return exchange.failure

    def pause(self, seconds: float) -> None:
        """Wait before a repeat; FailedPrecondition where the connection is closed meanwhile."""
        self._closing.wait(seconds)
        self.check_open()

    def call(
        self,
        target: bytes,
        namespace: str,
        call: Call,
        read: Read[T],
        timeout: float,
        progress: OnProgress | None = None,
    ) -> T:
        """One call, one request."""
        exchange = Exchange(target, namespace, timeout)
        answer: Answer[T] = Answer()
        exchange.add(call, read, answer, progress)
        self.run(exchange)
        return answer.result()

    def status(self, timeout: float) -> StatusAnswer:
        """How the broker is."""
        return self.call(b"", "", protocol.Status(), session.read_status, timeout)

    def events_endpoint(self) -> str:
        """The publisher's endpoint; the broker is asked where neither argument nor environment tells it."""
        if self._events_endpoint is None:
            self._events_endpoint = endpoints.reachable_events_endpoint(self.status(self.timeout), self.endpoint)
        return self._events_endpoint

    def close(self) -> None:
        """Close every socket; one in use by another thread is closed by that thread, whose call ends soon."""
        self.closed = True
        self._closing.set()
        self._close_idle()

    def _close_idle(self) -> None:
        """Close what nobody uses, and the context with the last of it: a socket belongs to one thread at a time."""
        with self._lock:
            while self._idle:
                self._idle.pop().close()
            self.sockets.end()


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


class _Pages(Generic[T]):
    """The pages of one request, in the calling thread; closing it early tells the broker."""

    def __init__(self, connection: _Connection, stream: Stream[T]) -> None:
        self._connection = connection
        self._stream = stream
        self._channel: _Channel | None = None
        self._channel = connection.take()
        try:
            self._channel.send(stream)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        page = self._stream.take()
        while page is None:
            if self._channel is None or self._stream.over:
                self.close()
                raise StopIteration
            try:
                self._stream.deadline = time.monotonic() + self._stream.timeout
                self._channel.receive(self._stream, lambda: self._stream.pages or self._stream.over)
                page = self._stream.take()
            except BaseException:
                self.close()
                raise
        return page

    def close(self) -> None:
        """Give the channel back; pages still to come are not wanted."""
        channel, self._channel = self._channel, None
        if channel is None:
            return
        if self._stream.sent and not self._stream.over:
            channel.take_back(self._stream)
        self._connection.give(channel)

    def __del__(self) -> None:
        self.close()


class Walk:
    """The snapshots that match, in the order of their names: iterate it, once.

    `sequence` is the newest event that the first page has seen: events above it, applied in order, bring the
    whole walk up to date. Pages are asked for as they are used.
    """

    def __init__(
        self, connection: _Connection, target: bytes, namespace: str, filters: Sequence[str], timeout: float, page: int
    ) -> None:
        self._connection = connection
        self._target = target
        self._namespace = namespace
        self._timeout = timeout
        self._page = page
        self._filters = session.texts(filters, "filters")
        self._after = ""
        self._sequence: int | None = None
        self._current: _Pages[WalkPage] | None = None
        self._infos: Iterator[Info] = iter(())

    @property
    def sequence(self) -> int:
        """The newest event that the first page has seen; waits for that page."""
        if self._sequence is None:
            page = self._next_page()
            self._infos = iter(page.infos)
            return page.sequence
        return self._sequence

    def __iter__(self) -> Iterator[Info]:
        return self

    def __next__(self) -> Info:
        while True:
            for info in self._infos:
                return info
            self._infos = iter(self._next_page().infos)

    def pages(self) -> Iterator[WalkPage]:
        """The pages themselves, instead of the infos one by one."""
        while True:
            try:
                page = self._next_page()
            except StopIteration:
                return
            yield page

    def close(self) -> None:
        """No more pages are wanted."""
        if self._current is not None:
            self._current.close()

    def _next_page(self) -> WalkPage:
        """The next page; where the walk broke off it is asked for behind the last one, as a request is repeated."""
        deadline = time.monotonic() + self._timeout
        repeats: session.Repeats | None = None
        while True:
            try:
                return self._page_or_end()
            except Unavailable as error:
                if repeats is None:
                    # Without a page asked for there was no broker to ask.
                    if self._current is None or not self._connection.patience.seconds:
                        raise
                    repeats = session.Repeats(self._connection.patience, deadline)
                pause = repeats.pause(error)
                if pause is None:
                    raise
            self._connection.pause(pause)
            self._current = None

    def _page_or_end(self) -> WalkPage:
        if self._current is None:
            self._current = self._ask()
        try:
            page = next(self._current)
        except StopIteration:
            if not self._after:
                raise
            self._current = self._ask()
            page = next(self._current)
        session.check_continues(page, self._after)
        self._after = page.next
        if self._sequence is None:
            self._sequence = page.sequence
        return page

    def _ask(self) -> _Pages[WalkPage]:
        call = session.walk(self._filters, self._after, self._page)
        stream: Stream[WalkPage] = Stream(self._target, self._namespace, self._timeout, call, session.read_walk)
        return _Pages(self._connection, stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Audit:
    """The findings of one audit or repair: iterate it, once. `looked`: how much was looked at, as far as is known."""

    def __init__(
        self,
        connection: _Connection,
        target: bytes,
        namespace: str,
        timeout: float,
        execute: bool | None,
        progress: OnProgress | None,
    ) -> None:
        self._connection = connection
        self._lane = (target, namespace, timeout)
        self._execute = execute
        self._progress = progress
        self._after = ""
        self._pages: _Pages[AuditPage] | None = None
        self._findings: Iterator[Finding] = iter(())
        self.looked = 0

    def __iter__(self) -> Iterator[Finding]:
        return self

    def __next__(self) -> Finding:
        while True:
            for finding in self._findings:
                return finding
            self._findings = iter(self._next_page().findings)

    def _next_page(self) -> AuditPage:
        if self._pages is None:
            self._pages = self._ask()
        try:
            page = next(self._pages)
        except StopIteration:
            if not self._after:
                raise
            self._pages = self._ask()
            page = next(self._pages)
        self._after, self.looked = page.next, page.looked
        return page

    def _ask(self) -> _Pages[AuditPage]:
        call = session.audit(self._execute, self._after)
        return _Pages(self._connection, Stream(*self._lane, call, session.read_audit, self._progress))

    def close(self) -> None:
        """No more findings are wanted: the audit ends."""
        if self._pages is not None:
            self._pages.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Events:
    """The events of one snapshotter, each once and in the order of their sequence: iterate it.

    What the publisher drops is taken from the journal. OutOfRange: the journal no longer has what is missing,
    walk again. A context manager: leaving it unsubscribes.
    """

    def __init__(
        self,
        connection: _Connection,
        target: bytes,
        namespace: str,
        since: int | None,
        topics: Sequence[str],
        follow: bool,
        timeout: float,
        silence: float,
    ) -> None:
        self._socket: sockets.Socket | None = None
        self._pages: _Pages[EventsPage] | None = None
        self._connection = connection
        self._target = target
        self._namespace = namespace
        self._timeout = timeout
        self._ready: deque[Event] = deque()
        self._tracker = subscriber.Tracker(target.decode(), namespace, topics, since or 0, silence)
        self._heard = time.monotonic()
        if follow:
            self._socket = connection.subscribe(self._tracker.subscriptions)
        if since is None:
            try:
                self._begin_at_newest()
            except BaseException:
                self.close()
                raise

    @property
    def sequence(self) -> int:
        """Every event asked for up to this one was given out: where another stream goes on (`since=`)."""
        return self._ready[0].sequence - 1 if self._ready else self._tracker.position

    def statistics(self) -> subscriber.Statistics:
        """What was dropped on the way, and healed."""
        return self._tracker.statistics()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        event = self._next(None)
        if event is None:
            raise StopIteration
        return event

    def poll(self, timeout: float) -> Event | None:
        """The next event; None where none comes within `timeout` seconds, or the stream is at its end."""
        return self._next(time.monotonic() + timeout)

    def close(self) -> None:
        """Unsubscribe; what was received already is still given out."""
        pages, self._pages = self._pages, None
        if pages is not None:
            pages.close()
        socket, self._socket = self._socket, None
        if socket is not None:
            self._connection.unsubscribe(socket)
        self._tracker.behind = False

    def _begin_at_newest(self) -> None:
        """Start above the newest event there is: a walk's first page says which that is."""
        with Walk(self._connection, self._target, self._namespace, (), self._timeout, 1) as walk:
            self._tracker.begin_at(walk.sequence)

    def _next(self, deadline: float | None) -> Event | None:
        while not self._ready:
            if self._tracker.behind:
                self._ask_journal()
            elif self._socket is None:
                return None
            elif (event := self._receive(self._socket, deadline)) is not None:
                return event
            elif deadline is not None and time.monotonic() >= deadline and not self._tracker.behind:
                return None
        return self._ready.popleft()

    def _receive(self, socket: sockets.Socket, deadline: float | None) -> Event | None:
        """The next published event if one comes; None after a message that is not it, and after silence."""
        with suppress(zmq.Again):
            frames = messages.receive(socket, messages.NOBLOCK)
            self._heard = time.monotonic()
            return self._tracker.feed(frames)
        self._connection.check_open()
        # Since the last message, and not since this call: a program may poll more often than the silence is long.
        silent_at = self._heard + self._tracker.silence
        until = silent_at if deadline is None else min(silent_at, deadline)
        if not socket.poll(math.ceil(max(0.0, until - time.monotonic()) * 1000)) and time.monotonic() >= silent_at:
            self._heard = time.monotonic()
            sockets.connect_anew(socket)
            self._tracker.doubt()
        return None

    def _ask_journal(self) -> None:
        """Take a page of what is missing from the journal, asking again until the timeout where it is unavailable."""
        give_up = time.monotonic() + self._timeout
        pause = subscriber.RETRY_SECONDS
        while True:
            try:
                return self._read_journal()
            except OutOfRange as error:
                raise subscriber.walk_again(error, self._tracker) from None
            except (Unavailable, ResourceExhausted):
                if self._socket is None or time.monotonic() + pause > give_up:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, subscriber.RETRY_SECONDS_MAX)

    def _read_journal(self) -> None:
        if self._pages is None:
            question = self._tracker.question()
            stream: Stream[EventsPage] = Stream(
                self._target, self._namespace, self._timeout, question, session.read_events
            )
            self._pages = _Pages(self._connection, stream)
        try:
            self._ready.extend(self._tracker.page(next(self._pages)))
        except StopIteration:
            self._pages = None
        except BaseException:
            self._pages.close()
            self._pages = None
            raise
        else:
            if not self._tracker.behind:
                self._pages.close()
                self._pages = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Without a tracker the stream was never begun: its arguments were refused.
        if hasattr(self, "_tracker"):
            self.close()


class Batch(BatchCalls):
    """Calls that travel together: sent at the end of the block, unless an exception leaves it."""

    def __init__(self, connection: _Connection, target: bytes, namespace: str, timeout: float, *, atomic: bool) -> None:
        super().__init__(target, namespace, timeout, atomic=atomic)
        self._connection = connection

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        exchange = self._seal()
        if kind is None and exchange.calls:
            self._connection.run(exchange)
            self._raise_first()


class Broker:
    """One snapshotter, in one namespace, of the broker at `endpoint`. Usable from several threads.

    Every method raises errors of `snapbroker.errors`. `timeout`: how long the call may take, in seconds, the
    connection's own where it is None; after it DeadlineExceeded is raised and the broker is told that nobody waits.
    `progress` is called with a `protocol.Progress` now and then while a long call is at work.
    """

    def __init__(self, connection: _Connection, namespace: str, snapshotter: str | None) -> None:
        self._connection = connection
        self._target = None if snapshotter is None else endpoints.target_frame(snapshotter)
        self.namespace = namespace

    @property
    def endpoint(self) -> str:
        """The router's endpoint."""
        return self._connection.endpoint

    @property
    def snapshotter_name(self) -> str:
        """The snapshotter this view is of; the broker is asked for its only one where none was named."""
        return (self._target or self._resolve()).decode()

    def snapshotter(self, name: str, *, namespace: str | None = None) -> Broker:
        """The same connection's view of another snapshotter, or of another namespace."""
        if namespace is not None:
            namespace = endpoints.namespace_or_default(namespace)
        return Broker(self._connection, namespace or self.namespace, name)

    def prepare(
        self,
        key: str,
        parent: str = "",
        labels: Mapping[str, str] | None = None,
        *,
        timeout: float | None = None,
        progress: OnProgress | None = None,
    ) -> Mounts:
        """Create the active snapshot `key` on the committed `parent`, or an empty one; answers the mounts to make."""
        return self._call(session.prepare(key, parent, labels), session.read_mounts, timeout, progress)

    def view(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None, *, timeout: float | None = None
    ) -> Mounts:
        """Create the read-only snapshot `key` of the committed `parent`; answers the mounts to make."""
        return self._call(session.view(key, parent, labels), session.read_mounts, timeout)

    def commit(
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
        self._call(call, session.read_nothing, timeout, progress)

    def remove(self, key: str, fence: int = 0, *, timeout: float | None = None) -> None:
        """Remove a snapshot without children; its files are deleted in the background. `fence`: as for commit."""
        self._call(session.remove(key, fence), session.read_nothing, timeout)

    def mounts(self, key: str, fence: int = 0, *, timeout: float | None = None) -> Mounts:
        """The mounts of an active snapshot or view, as prepare and view answered them. `fence`: as for commit."""
        return self._call(session.mounts(key, fence), session.read_mounts, timeout)

    def stat(self, key: str, *, timeout: float | None = None) -> Info:
        """What is known of a snapshot."""
        return self._call(protocol.Stat(key=session.text(key)), session.read_info, timeout)

    def update(
        self,
        name: str,
        labels: Mapping[str, str] | None,
        fieldpaths: Sequence[str] = (),
        *,
        timeout: float | None = None,
    ) -> Info:
        """Replace all labels, or those that `fieldpaths` name (`labels.<key>`); answers the snapshot with them."""
        return self._call(session.update(name, labels, fieldpaths), session.read_info, timeout)

    def usage(self, key: str, *, timeout: float | None = None, progress: OnProgress | None = None) -> Usage:
        """What a snapshot takes beyond its parents; an active one is measured."""
        return self._call(protocol.UsageOf(key=session.text(key)), session.read_usage, timeout, progress)

    def walk(self, *filters: str, timeout: float | None = None, page: int = session.WALK_PAGE) -> Walk:
        """All snapshots that match one of `filters`, by name; `timeout` is for each page, of `page` infos."""
        return Walk(self._connection, self._named(), self.namespace, filters, self._seconds(timeout), page)

    def cleanup(self, *, timeout: float | None = None, progress: OnProgress | None = None) -> None:
        """Wait until everything removed so far is deleted from disk."""
        self._call(protocol.Cleanup(), session.read_nothing, timeout, progress)

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
        within, still = self._seconds(timeout), session.seconds(silence)
        return Events(self._connection, self._named(), self.namespace, since, topics, follow, within, still)

    def audit(self, *, timeout: float = session.AUDIT_SECONDS, progress: OnProgress | None = None) -> Audit:
        """What is not as it must be with the snapshotter's records, journal and directories, of all namespaces."""
        within = session.seconds(timeout)
        return Audit(self._connection, self._named(), self.namespace, within, None, progress)

    def repair(
        self, execute: bool = False, *, timeout: float = session.AUDIT_SECONDS, progress: OnProgress | None = None
    ) -> Audit:
        """An audit whose findings are mended as they come; without `execute` they only say what would be done."""
        within = session.seconds(timeout)
        return Audit(self._connection, self._named(), self.namespace, within, bool(execute), progress)

    def why(self, key: str, *, timeout: float | None = None) -> WhyAnswer:
        """What keeps the snapshot `key`, and the last events on this name, also where there is none."""
        return self._call(protocol.Why(key=session.text(key)), session.read_why, timeout)

    def status(self, *, timeout: float | None = None) -> StatusAnswer:
        """How the broker and its snapshotters are."""
        return self._connection.status(self._seconds(timeout))

    def batch(self, atomic: bool = False, *, timeout: float | None = None) -> Batch:
        """Calls that travel together, in order; `atomic`: all take effect or none. An error is raised at the end."""
        return Batch(self._connection, self._named(), self.namespace, self._seconds(timeout), atomic=atomic)

    def workspace(
        self,
        parent: str = "",
        commit_as: str | None = None,
        key: str | None = None,
        labels: Mapping[str, str] | None = None,
        sync: bool = False,
        *,
        keep_uncommitted: bool = False,
    ) -> AbstractContextManager[Path]:
        """A mounted directory on top of `parent`: committed as `commit_as` at the end of the block, else discarded.

        An exception that leaves the block discards it as well. `key` is a random one where it is None.
        `keep_uncommitted`: where the block did well and only the commit fails, the active snapshot `key` is kept,
        and a note on the error says so.
        """
        # Only a program that mounts needs the mount helper.
        from snapbroker import workspace

        return workspace.blocking(self, workspace.Plan.of(parent, commit_as, key, labels, sync, keep_uncommitted))

    def close(self) -> None:
        """Close the connection, for every view of it."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, call: Call, read: Read[T], timeout: float | None, progress: OnProgress | None = None) -> T:
        connection = self._connection
        within = connection.timeout if timeout is None else session.seconds(timeout)
        return connection.call(self._target or self._resolve(), self.namespace, call, read, within, progress)

    def _seconds(self, timeout: float | None) -> float:
        return self._connection.timeout if timeout is None else session.seconds(timeout)

    def _named(self) -> bytes:
        return self._target or self._resolve()

    def _resolve(self) -> bytes:
        status = self._connection.status(self._connection.timeout)
        self._target = endpoints.target_frame(endpoints.only_snapshotter(status, self.endpoint))
        return self._target


def connect(
    endpoint: str | None = None,
    *,
    namespace: str | None = None,
    snapshotter: str | None = None,
    timeout: float = session.TIMEOUT_SECONDS,
    connect_timeout: float = sockets.CONNECT_SECONDS,
    patience: float = session.PATIENCE_SECONDS,
    events_endpoint: str | None = None,
    curve: Curve | str | os.PathLike[str] | None = None,
) -> Broker:
    """A connection to a broker; use it as a context manager, or close it.

    What is not given comes from SNAPBROKER_ENDPOINT, SNAPBROKER_NAMESPACE, SNAPBROKER_SNAPSHOTTER and
    SNAPBROKER_EVENTS_ENDPOINT, else from the defaults: the machine's own socket, `default`, the broker's only
    snapshotter. The broker need not be there yet: a call waits for it up to `connect_timeout` seconds.
    A request whose connection breaks, or that finds the snapshotter unavailable, is repeated for up to `patience`
    seconds, within its own timeout, and takes effect once; with 0 nothing is repeated.
    `curve`, for a broker behind tcp: the client's key file, or a `Curve`; else SNAPBROKER_CLIENT_KEY names the file.
    The broker's public key is in it, or SNAPBROKER_SERVER_KEY has it.
    """
    router = endpoints.router_endpoint(endpoint)
    chosen_namespace = endpoints.namespace_or_default(namespace)
    chosen_snapshotter = endpoints.snapshotter_or_none(snapshotter)
    publisher = endpoints.events_endpoint(events_endpoint, router)
    connection = _Connection(
        router,
        publisher,
        session.seconds(timeout),
        session.seconds(connect_timeout),
        patience,
        endpoints.curve_for(curve, router, publisher),
    )
    return Broker(connection, chosen_namespace, chosen_snapshotter)
