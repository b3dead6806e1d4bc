"""A child process for the file work that never ends: stocking directories, deleting trees and copying them.

In a thread of the actor this work would take the interpreter from the loop and the writer at every system call, tens
of thousands of times a second; in a process of its own it takes what the processors have to spare. The child opens
the same backend on the same root, answers one request at a time, and dies with its actor. It is forked when there is
something to do and let go when there was nothing for a while.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import msgspec
from setproctitle import setproctitle

from backends import failpoints, registry
from backends.api import Snapshot, Task
from backends.failpoints import reach
from broker import privileges
from broker.snapshotter.reserve import SpaceLimits, lacking
from snapbroker.contract import Kind
from snapbroker.errors import BrokerError, Cancelled, Unavailable
from snapbroker.protocol import Fault, error_of, fault

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.actor.forks import Child, Forks

HAND: Final = "hand"
"""What the fork server calls one of these processes."""
IDLE_S: Final = 20.0
"""After this long without a request the child is let go."""
LOOK_ENTRIES: Final = 256
LOOK_BYTES: Final = 4 << 20
"""After so many entries, or bytes, a copy looks how much room is left: a few microseconds of a few milliseconds."""
PROGRESS_S: Final = 0.25
"""How often a long deletion tells how far it is."""
_LENGTH: Final = struct.Struct(">I")


class Place(msgspec.Struct, frozen=True):
    """Which backend the child opens, what it leaves free there, and as what it shows among the processes."""

    title: str
    backend: str
    root: str
    options: dict[str, Any]
    space: SpaceLimits = SpaceLimits()


class Wanted(msgspec.Struct, frozen=True):
    """A `backends.api.Snapshot` on its way to the child."""

    id: int
    kind: Kind
    parents: tuple[int, ...]
    labels: dict[str, str]


class Job(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request to the child: ids to stock, tokens to delete, or snapshots to build."""

    stock: list[int] = []
    delete: list[str] = []
    build: list[Wanted] = []


class Answer(msgspec.Struct, omit_defaults=True):
    """What the child says: how far it is, and at the end how it went; `failed` by token, `built` in their order."""

    done: bool = False
    entries: int = 0
    bytes: int = 0
    errno: int = 0
    path: str = ""
    error: Fault | None = None
    failed: dict[str, str] = {}
    built: list[Answer] = []


_decode_job = msgspec.msgpack.Decoder(Job).decode
_decode_answer = msgspec.msgpack.Decoder(Answer).decode
_encode = msgspec.msgpack.Encoder().encode


def write(stream: IO[bytes], message: msgspec.Struct) -> None:
    """Send one message, its length before it."""
    body = _encode(message)
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()


def read(stream: IO[bytes]) -> bytes | None:
    """The next message, None at the end."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    return stream.read(_LENGTH.unpack(head)[0])


Tell = Callable[[Answer], None]


class Hand:
    """The actor's end of one such child; used by one thread, closed from any."""

    def __init__(self, place: Place, niceness: int, lock: int, forks: Forks) -> None:
        """`lock` is the root's: it stays locked until the last of its processes is gone."""
        self._place = place
        self._lock_descriptor = lock
        self._niceness = niceness
        self._forks = forks
        self._lock = threading.Lock()
        self._child: _Started | None = None
        self._closed = False
        self._used = time.monotonic()

    def stock(self, ids: Sequence[int], task: Task) -> None:
        """As `backends.api.Pooled.stock`."""
        self._ask(Job(stock=list(ids)), task)

    def build(self, snapshots: Sequence[Snapshot], task: Task) -> list[Answer]:
        """As `backends.api.Copying.build` for each; an answer each, with its failure or how much was copied.

        When it ends in the middle, Cancelled or Unavailable, what there is of them is left over.
        """
        wanted = [Wanted(one.id, one.kind, one.parents, dict(one.labels)) for one in snapshots]
        return self._ask(Job(build=wanted), task).built

    def delete(self, tokens: Sequence[str], task: Task) -> dict[str, str]:
        """Delete discarded entries; what could not be deleted, with the reason."""
        return self._ask(Job(delete=list(tokens)), task).failed

    def _ask(self, job: Job, task: Task) -> Answer:
        self._used = time.monotonic()
        child = self._started()
        answer = Answer()
        try:
            write(child.jobs, job)
            while not answer.done and (body := read(child.answers)) is not None:
                answer = _decode_answer(body)
                task.advance(answer.entries, answer.bytes)
        except Cancelled:
            self.let_go()
            raise
        except ConnectionError:
            pass  # The end of its line is its own, which is told below.
        except (OSError, ValueError) as error:
            self.let_go()
            raise Unavailable(f"the helper process is gone: {error}") from error
        if answer.done:
            raise_failure(answer)
            return answer
        self.let_go()
        if self._closed:
            raise Cancelled("the actor is stopping")
        raise Unavailable("the helper process ended in the middle of its work")

    @property
    def running(self) -> bool:
        """Whether there is a child."""
        return self._child is not None

    def _started(self) -> _Started:
        with self._lock:
            if self._closed:
                raise Cancelled("the actor is stopping")
            if self._child is None:
                ours, theirs = socket.socketpair()
                # What reads and writes keeps the socket open.
                with ours, theirs:
                    process = self._forks.start(HAND, self._niceness, theirs.fileno(), self._lock_descriptor)
                    self._child = _Started(process, ours.makefile("wb"), ours.makefile("rb"))
                write(self._child.jobs, self._place)
            return self._child

    def let_go_if_idle(self) -> None:
        """End the child when it had nothing to do for a while."""
        if time.monotonic() - self._used > IDLE_S:
            self.let_go()

    def let_go(self) -> None:
        """End the child; the next request starts another."""
        with self._lock:
            child, self._child = self._child, None
        if child is None:
            return
        child.process.kill()
        child.process.wait()
        for stream in (child.jobs, child.answers):
            # What was still to be written goes to nobody.
            with contextlib.suppress(OSError):
                stream.close()

    def close(self) -> None:
        """End the child for good; a request under way ends Cancelled."""
        self._closed = True
        with self._lock:
            if self._child is not None:
                self._child.process.kill()


@dataclass(slots=True, frozen=True)
class _Started:
    """A child that is there, and the two directions of the line to it."""

    process: Child
    jobs: IO[bytes]
    answers: IO[bytes]


def failure_of(answer: Answer) -> Exception | None:
    """The error that an answer brings, if it does."""
    if answer.errno:
        return OSError(answer.errno, os.strerror(answer.errno), answer.path)
    return None if answer.error is None else error_of(answer.error)


def raise_failure(answer: Answer) -> None:
    """Raise the error that an answer brings, if it does."""
    failure = failure_of(answer)
    if failure is not None:
        raise failure


# The child.


def run(niceness: int, forks: Forks, given: list[int]) -> int:
    """Be a hand of an actor until it lets go. Given: the line to it, and the root's lock, held until the end."""
    forks.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.nice(niceness)
    with contextlib.suppress(ConnectionError), socket.socket(fileno=given[0]) as line:
        serve(line.makefile("rb"), line.makefile("wb"))
    return 0


def serve(jobs: IO[bytes], answers: IO[bytes]) -> None:
    """Do one job after the other at the Place that comes first, until nothing more comes."""
    body = read(jobs)
    if body is None:
        return
    place = msgspec.msgpack.decode(body, type=Place)
    setproctitle(f"snapbrokerd: {place.title}")
    kind: Any = registry.load(place.backend)
    privileges.rise()
    privileges.keep(privileges.kept_by(kind))
    failpoints.arm(failpoints.HAND)
    tell = partial(write, answers)
    backend: Any = None
    while (body := read(jobs)) is not None:
        reach("hands.asked")
        try:
            # Opened for the first job, and tried again for the next: who waits is told what the disk says.
            backend = backend or kind.open_again(Path(place.root), msgspec.convert(place.options, kind.Options))
            answer = do(backend, _decode_job(body), place, tell)
        except (OSError, BrokerError) as error:
            answer = failed(error)
        reach("hands.done")
        answer.done = True
        tell(answer)


def do(backend: Any, job: Job, place: Place, tell: Tell) -> Answer:
    """Do one job, and tell now and then how far it is."""
    if job.build:
        return Answer(built=[build(backend, wanted, place, tell) for wanted in job.build])
    return stock(backend, job.stock) if job.stock else delete(backend, job.delete, tell)


def failed(error: OSError | BrokerError) -> Answer:
    """The answer that brings an error."""
    if isinstance(error, OSError):
        return Answer(errno=error.errno or errno.EIO, path=str(error.filename or ""))
    return Answer(error=fault(error))


def stock(backend: Any, ids: list[int]) -> Answer:
    """Stock directories."""
    backend.stock(ids, Task())
    return Answer(entries=len(ids))


def build(backend: Any, wanted: Wanted, place: Place, tell: Tell) -> Answer:
    """Build a snapshot; how much was copied, or why it failed."""
    task = TellingCopy(tell, place)
    try:
        backend.build(Snapshot(wanted.id, wanted.kind, wanted.parents, wanted.labels), task)
    except (OSError, BrokerError) as error:
        return failed(error)
    return Answer(entries=task.entries, bytes=task.bytes)


class Telling(Task):
    """A task that tells the actor, now and then, how far it is."""

    __slots__ = ("_lock", "_tell", "_told_at", "_told_bytes", "_told_entries")

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._tell = tell
        self._lock = threading.Lock()
        self._told_entries = 0
        self._told_bytes = 0
        self._told_at = time.monotonic()

    def advance(self, entries: int = 1, size: int = 0) -> None:
        """Count, and tell."""
        super().advance(entries, size)
        if time.monotonic() - self._told_at > PROGRESS_S and self._lock.acquire(blocking=False):
            # A copy has several threads; one of them tells.
            self._told_at = time.monotonic()
            self._tell(self.untold())
            self._lock.release()

    def untold(self) -> Answer:
        """What was done since the last telling."""
        answer = Answer(entries=self.entries - self._told_entries, bytes=self.bytes - self._told_bytes)
        self._told_entries += answer.entries
        self._told_bytes += answer.bytes
        return answer


class TellingCopy(Telling):
    """The same of a copy, which ends where the reserve of its filesystem begins: its size is not known before."""

    __slots__ = ("_look_at", "_place")

    def __init__(self, tell: Tell, place: Place) -> None:
        super().__init__(tell)
        self._place = place
        self._look_at = (LOOK_ENTRIES, LOOK_BYTES)

    def advance(self, entries: int = 1, size: int = 0) -> None:
        """Count, tell, and look now and then how much room is left."""
        super().advance(entries, size)
        if self.entries >= self._look_at[0] or self.bytes >= self._look_at[1]:
            self._look_at = (self.entries + LOOK_ENTRIES, self.bytes + LOOK_BYTES)
            if lack := lacking(Path(self._place.root), self._place.space):
                raise lack()


def delete(backend: Any, tokens: list[str], tell: Tell) -> Answer:
    """Delete discarded entries, each on its own."""
    task = Telling(tell)
    failed: dict[str, str] = {}
    for token in tokens:
        try:
            backend.delete(token, task)
        except (OSError, BrokerError) as error:
            failed[token] = str(error)
    answer = task.untold()
    answer.failed = failed
    return answer
