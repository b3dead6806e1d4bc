"""A broker in a thread, kept in dictionaries, that speaks the wire through real sockets and misbehaves on demand.

The clients' tests need what no sound broker does: parts out of order, garbage, silence, a publisher that loses
messages at a chosen place. `script` holds what becomes of the next requests; what is not scripted is answered.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import zmq

from snapbroker import protocol, session
from snapbroker.contract import Event, Info, Kind, Mount, Usage, topic
from snapbroker.errors import (
    AlreadyExists,
    BrokerError,
    Cancelled,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
)
from snapbroker.protocol import DONE, MORE, REQUEST_VERSION, Outcome, Reply

WAIT_SECONDS = 20.0
FRAMES = 5
"""Of a request, the identity of who sent it included."""


class Received:
    """One request as it arrived, with the means to answer it."""

    def __init__(self, fake: FakeBroker, frames: list[bytes]) -> None:
        self.fake = fake
        self.identity, self.version, self.request_id, self.target, body = frames
        self.request = protocol.decode_request(body)
        self.calls = self.request.calls

    @property
    def verbs(self) -> list[str]:
        return [call.__struct_config__.tag for call in self.calls]

    def send(self, *frames: bytes) -> None:
        self.fake.router.send_multipart([self.identity, *frames])

    def part(self, reply: Reply | bytes, *, last: bool = False) -> None:
        body = reply if isinstance(reply, bytes) else protocol.encode(reply)
        self.send(REQUEST_VERSION, self.request_id, DONE if last else MORE, body)

    def done(self, *outcomes: Outcome) -> None:
        self.part(Reply(outcomes=outcomes), last=True)


Behaviour = Callable[[Received], None]


class FakeBroker:
    """Sockets `router.sock` and `events.sock` below `directory`; one or more snapshotters of one kind."""

    def __init__(self, directory: Path, *, names: tuple[str, ...] = ("overlayfs",), kept: int = 10**9) -> None:
        self.directory = directory
        self.names = names
        self.kept = kept
        self.endpoint = f"ipc://{directory}/router.sock"
        self.events_endpoint = f"ipc://{directory}/events.sock"
        self.script: deque[Behaviour] = deque()
        self.received: list[Received] = []
        self.subscriptions: set[bytes] = set()
        self.snapshots: dict[tuple[str, str], Info] = {}
        self.fences: dict[tuple[str, str], int] = {}
        self.kept_outcomes: dict[bytes, tuple[tuple[protocol.Call, ...], dict[int, Outcome]]] = {}
        self.journal: list[Event] = []
        self.lose: Callable[[Event], bool] = lambda event: False
        self.before_journal: Callable[[], None] = lambda: None
        self.newest_of_topic: dict[str, int] = {}
        self.beat = 0
        self.dropped = 0
        self._changed = threading.Condition()
        self._tasks: deque[Callable[[], None]] = deque()
        self._numbers = itertools.count(1)
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    # The thread.

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self.failure is not None:
            raise self.failure

    def start(self) -> None:
        """Serve from a fresh pair of sockets; what is stored is kept."""
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.bind(self.endpoint)
        self.publisher = self.context.socket(zmq.XPUB)
        self.publisher.bind(self.events_endpoint)
        self._inbox = self.context.socket(zmq.PAIR)
        self._inbox.bind("inproc://tasks")
        self._outbox = self.context.socket(zmq.PAIR)
        self._outbox.connect("inproc://tasks")
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Vanish, with everything that was not sent."""
        if self._thread is None:
            return

        def end() -> None:
            self._stopping = True

        self._tasks.append(end)
        self._outbox.send(b"")
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()
        self._thread = None
        self.context.destroy(linger=0)

    def run(self, task: Callable[[], None]) -> None:
        """Run `task` in the broker's thread and wait for it."""
        finished = threading.Event()

        def wrapped() -> None:
            task()
            finished.set()

        self._tasks.append(wrapped)
        self._outbox.send(b"")
        assert finished.wait(WAIT_SECONDS), self.failure

    def wait(self, condition: Callable[[], Any]) -> None:
        """Wait until `condition()` is true; it is looked at whenever the broker has done something."""
        with self._changed:
            assert self._changed.wait_for(condition, WAIT_SECONDS), self.failure

    def wait_for_subscription(self) -> None:
        self.wait(lambda: self.subscriptions)

    def _serve(self) -> None:
        poller = zmq.Poller()
        for socket in (self.router, self.publisher, self._inbox):
            poller.register(socket, zmq.POLLIN)
        try:
            while not self._stopping:
                for socket, _ in poller.poll():
                    self._turn(socket)
                with self._changed:
                    self._changed.notify_all()
        except BaseException as error:
            self.failure = error
            raise

    def _turn(self, socket: zmq.Socket[bytes]) -> None:
        if socket is self._inbox:
            self._inbox.recv()
            self._tasks.popleft()()
        elif socket is self.publisher:
            message = self.publisher.recv()
            (self.subscriptions.add if message[:1] == b"\1" else self.subscriptions.discard)(message[1:])
        else:
            frames = self.router.recv_multipart()
            if len(frames) != FRAMES:
                # As the router does.
                self.dropped += 1
                return
            received = Received(self, frames)
            self.received.append(received)
            if isinstance(received.calls[0], protocol.Cancel):
                received.done(Outcome(call=0, ok=encoded(protocol.Empty())))
            elif self.script:
                self.script.popleft()(received)
            else:
                self.answer(received)

    # What it answers.

    def requests(self, verb: str) -> list[Received]:
        return [received for received in self.received if verb in received.verbs]

    def cancelled(self) -> list[bytes]:
        """The request ids that were taken back."""
        return [received.calls[0].request for received in self.requests("cancel")]  # type: ignore[union-attr]

    def answer(self, received: Received) -> None:
        first = received.calls[0]
        if isinstance(first, protocol.Walk | protocol.Events):
            self._answer_pages(received, first)
            return
        if received.target not in {b"", *(name.encode() for name in self.names)}:
            error = NotFound(f"no snapshotter {received.target.decode()!r}; there are {', '.join(self.names)}")
            received.part(Reply(error=protocol.fault(error)), last=True)
            return
        before = dict(self.snapshots), list(self.journal), dict(self.newest_of_topic)
        outcomes = [self.outcome(received, index) for index in range(len(received.calls))]
        if received.request.atomic and any(outcome.error for outcome in outcomes):
            self.snapshots, self.journal, self.newest_of_topic = before
            back = protocol.fault(Cancelled("another call of the batch failed"))
            outcomes = [outcome if outcome.error else Outcome(call=outcome.call, error=back) for outcome in outcomes]
        else:
            for event in self.journal[len(before[1]) :]:
                self.publish(event)
        received.done(*outcomes)

    def outcome(self, received: Received, index: int) -> Outcome:
        """The outcome of one call: of a change with a token, the first one."""
        token = received.request.token
        if not token or type(received.calls[index]) not in session.CHANGES:
            return self._outcome(received, index)
        calls, kept = self.kept_outcomes.setdefault(token, (received.calls, {}))
        if calls != received.calls:
            error = InvalidArgument("this token was used for other calls")
            return Outcome(call=index, error=protocol.fault(error))
        if index not in kept:
            kept[index] = self._outcome(received, index)
        return kept[index]

    def _outcome(self, received: Received, index: int) -> Outcome:
        try:
            answer = self._execute(received, received.calls[index])
        except BrokerError as error:
            return Outcome(call=index, error=protocol.fault(error))
        return Outcome(call=index, ok=encoded(answer))

    def _execute(self, received: Received, call: protocol.Call) -> Any:
        namespace = received.request.namespace
        match call:
            case protocol.Status():
                return self.status()
            case protocol.Prepare(key=key, parent=parent, labels=labels):
                return self._create(namespace, key, Kind.ACTIVE, parent, labels)
            case protocol.View(key=key, parent=parent, labels=labels):
                return self._create(namespace, key, Kind.VIEW, parent, labels)
            case protocol.Mounts(key=key, fence=fence):
                return self._mounts(namespace, self._found(namespace, key, fence))
            case protocol.Stat(key=key):
                return self._found(namespace, key)
            case protocol.UsageOf(key=key):
                return Usage(inodes=1, size=4096 * len(self._found(namespace, key).name))
            case protocol.Commit(name=name, key=key, labels=labels, fence=fence):
                return self._commit(namespace, name, key, labels, fence)
            case protocol.Update(name=name, labels=labels, fieldpaths=fieldpaths):
                return self._update(namespace, name, labels, fieldpaths)
            case protocol.Remove(key=key, fence=fence):
                return self._remove(namespace, key, fence)
            case _:
                return protocol.Empty()

    def status(self) -> protocol.StatusAnswer:
        return protocol.StatusAnswer(
            version="0",
            pid=1,
            uptime_seconds=1.0,
            resident_bytes=1,
            endpoint=self.endpoint,
            events_endpoint=self.events_endpoint,
            snapshotters=tuple(protocol.ActorStatus(name=name, backend="memory", state="ready") for name in self.names),
        )

    def _found(self, namespace: str, key: str, fence: int = 0) -> Info:
        try:
            found = self.snapshots[namespace, key]
        except KeyError:
            raise NotFound(f"no snapshot {key!r}") from None
        if fence not in (0, self.fences[namespace, key]):
            raise FailedPrecondition("the fence is another's", {"fence": self.fences[namespace, key]})
        return found

    def _create(self, namespace: str, key: str, kind: Kind, parent: str, labels: dict[str, str]) -> Any:
        if parent:
            self._found(namespace, parent)
        if (namespace, key) in self.snapshots:
            raise AlreadyExists(f"snapshot {key!r} exists")
        info = Info(key, kind, parent, labels, created=next(self._numbers))
        self.snapshots[namespace, key] = info
        (self.directory / "files" / key).mkdir(parents=True, exist_ok=True)
        event = self.record(namespace, "prepare" if kind is Kind.ACTIVE else "view", key, info)
        self.fences[namespace, key] = event.sequence
        return self._mounts(namespace, info)

    def _mounts(self, namespace: str, info: Info) -> protocol.MountsAnswer:
        options = ("rbind", "rw" if info.kind is Kind.ACTIVE else "ro")
        mount = Mount("bind", str(self.directory / "files" / info.name), options)
        return protocol.MountsAnswer(mounts=(mount,), fence=self.fences[namespace, info.name])

    def _commit(self, namespace: str, name: str, key: str, labels: dict[str, str], fence: int) -> protocol.Empty:
        active = self._found(namespace, key, fence)
        if (namespace, name) in self.snapshots:
            raise AlreadyExists(f"snapshot {name!r} exists")
        if active.kind is not Kind.ACTIVE:
            raise FailedPrecondition(f"{key!r} is not active")
        del self.snapshots[namespace, key]
        info = Info(name, Kind.COMMITTED, active.parent, labels, created=next(self._numbers))
        self.snapshots[namespace, name] = info
        (self.directory / "files" / key).rename(self.directory / "files" / name)
        self.fences[namespace, name] = self.record(namespace, "commit", key, info).sequence
        return protocol.Empty()

    def _update(self, namespace: str, name: str, labels: dict[str, str], fieldpaths: tuple[str, ...]) -> Info:
        old = self._found(namespace, name)
        merged = dict(labels)
        if fieldpaths:
            merged = dict(old.labels)
            for path in fieldpaths:
                merged[path.removeprefix("labels.")] = labels.get(path.removeprefix("labels."), "")
        info = Info(name, old.kind, old.parent, merged, old.created, next(self._numbers))
        self.snapshots[namespace, name] = info
        self.record(namespace, "update", name, info)
        return info

    def _remove(self, namespace: str, key: str, fence: int) -> protocol.Empty:
        self._found(namespace, key, fence)
        if any(info.parent == key for (space, _), info in self.snapshots.items() if space == namespace):
            raise FailedPrecondition(f"cannot remove snapshot with child: {key!r}")
        del self.snapshots[namespace, key]
        self.record(namespace, "remove", key, None)
        return protocol.Empty()

    # Pages.

    def _answer_pages(self, received: Received, call: protocol.Walk | protocol.Events) -> None:
        try:
            pages = self._walk(received, call) if isinstance(call, protocol.Walk) else self._events(received, call)
        except BrokerError as error:
            received.done(Outcome(call=0, error=protocol.fault(error)))
            return
        for number, page in enumerate(pages, 1):
            received.part(Reply(outcomes=(Outcome(call=0, ok=encoded(page)),)), last=number == len(pages))

    def _walk(self, received: Received, call: protocol.Walk) -> list[protocol.WalkPage]:
        names = sorted(
            name for space, name in self.snapshots if space == received.request.namespace and name > call.after
        )
        infos = [self.snapshots[received.request.namespace, name] for name in names]
        pages = []
        for start in range(0, max(1, len(infos)), call.page)[: call.credit]:
            part = tuple(infos[start : start + call.page])
            more = start + call.page < len(infos)
            pages.append(protocol.WalkPage(infos=part, sequence=self.newest, next=part[-1].name if more else ""))
        return pages

    def _events(self, received: Received, call: protocol.Events) -> list[protocol.EventsPage]:
        self.before_journal()
        oldest = max(1, self.newest - self.kept + 1)
        if call.since + 1 < oldest or call.since > self.newest:
            raise OutOfRange(f"the journal has {oldest} to {self.newest}", {"oldest": oldest, "newest": self.newest})
        default = f"{received.target.decode()}/{received.request.namespace}/"
        found = [event for event in self.journal[call.since :] if event.topic.startswith(call.topics or default)]
        pages = []
        for start in range(0, max(1, len(found)), call.page)[: call.credit]:
            part = tuple(found[start : start + call.page])
            more = start + call.page < len(found)
            pages.append(
                protocol.EventsPage(events=part, next=part[-1].sequence if more else self.newest, newest=self.newest)
            )
        return pages

    # Events.

    @property
    def newest(self) -> int:
        return len(self.journal)

    def record(self, namespace: str, verb: str, key: str, info: Info | None) -> Event:
        """Append to the journal; all snapshotters share one here, the first is named."""
        name = topic(self.names[0], namespace, verb)
        event = Event(self.newest + 1, self.newest_of_topic.get(name, 0), 0, self.names[0], namespace, verb, key, info)
        self.newest_of_topic[name] = event.sequence
        self.journal.append(event)
        return event

    def publish(self, event: Event) -> None:
        if not self.lose(event):
            self.publisher.send_multipart(protocol.event_frames(event.topic, event.sequence, protocol.encode(event)))

    def happen(self, key: str, verb: str = "prepare", namespace: str = "default") -> None:
        """An event from nowhere, out of the broker's thread."""
        self.run(lambda: self.publish(self.record(namespace, verb, key, None)))

    def heartbeat(self, *, with_topics: bool = True, time: int = 0) -> None:
        """Publish one heartbeat, sent at `time`."""

        def send() -> None:
            changed = {name: newest for name, newest in self.newest_of_topic.items() if newest > self.beat}
            beat = protocol.Heartbeat(
                sequence=self.newest, previous=self.beat, time=time, topics=changed if with_topics else None
            )
            name = protocol.heartbeat_topic(self.names[0])
            self.publisher.send_multipart(protocol.event_frames(name, self.newest, protocol.encode(beat)))
            self.beat = self.newest

        self.run(send)


def encoded(answer: Any) -> Any:
    """An answer as it lies in an outcome."""
    import msgspec

    return msgspec.Raw(protocol.encode(answer))


# What may become of a request.


def silence(received: Received) -> None:
    """No reply at all."""


def out_of_order(received: Received) -> None:
    """One part a call, the last call first; twice, since a client must not mind."""
    for index in reversed(range(1, len(received.calls))):
        outcome = received.fake.outcome(received, index)
        received.part(Reply(outcomes=(outcome,)))
        received.part(Reply(outcomes=(outcome,)))
    received.done(received.fake.outcome(received, 0))


def body(text: bytes) -> Behaviour:
    """A reply with this body."""
    return lambda received: received.part(text, last=True)


def reply(*outcomes: Outcome, error: protocol.Fault | None = None) -> Behaviour:
    """These outcomes, whatever was called."""
    return lambda received: received.part(Reply(outcomes=outcomes, error=error), last=True)


def progress_first(*reports: protocol.Progress) -> Behaviour:
    """Progress of the first call, then the answer."""

    def behave(received: Received) -> None:
        for report in reports:
            received.part(Reply(outcomes=(Outcome(call=0, progress=report),)))
        received.fake.answer(received)

    return behave
