"""Requests out, replies in, without a socket: all that the blocking and the asyncio client share but the waiting.

An `Exchange` is one request under way. Its calls settle one by one, in whatever order the parts of the reply
bring their outcomes; a call that its caller has given up stays open until the broker has answered it, so that
the exchange can tell when nobody waits for any of its calls: then, and only then, the request may be taken
back with a `Cancel`, for its calls belong to different callers. A `Stream` is a request with one call that
is answered in pages.

*Repeats.* A request is tried again when its connection broke, and when the broker answers that it is unavailable: the
same calls in the same order, under another request id and with the token of the first try, by which the broker knows
what it has done already (RFC 1, 6.5). An outcome that came stays; that of the repeat says the same. A caller that gives
up while its request waits for the next try cannot be left out of it, for a token stands for all its calls: the
front sends a `Cancel` for the calls `given_up` right behind the repeat. `Patience` has the pace, `Repeats` the count.

*Doubt.* A try without a reply may have taken effect. A later try that is refused does not take that doubt away, only
an outcome does: until then every error that is told says so, and has `in_doubt` set.

Whatever the broker sends, a call ends with its answer or with an error of the contract.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

import msgspec

from snapbroker import protocol
from snapbroker.contract import FENCE_MAX, Info, Mounts, Usage
from snapbroker.errors import (
    AlreadyExists,
    BrokerError,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unimplemented,
)
from snapbroker.protocol import BODY_BYTES_MAX, CALLS_MAX, DONE, MORE, REQUEST_VERSION, Call, Progress

if TYPE_CHECKING:
    from snapbroker.protocol import AuditPage, EventsPage, StatusAnswer, WalkPage, WhyAnswer

TIMEOUT_SECONDS: Final = 60.0
"""How long a call waits for its answer where the caller says nothing."""
CALLS_PER_REQUEST: Final = 256
"""Most calls the asyncio client puts into one request: enough for a group commit, few enough to answer early."""
READS_PER_REQUEST: Final = 32
"""A request that reads leaves when it has so many calls, though more come in the same turn: the snapshotter then works
on one while the client reads the answer of another. Measured with 64 callers: 143,000 stats a second in one request,
170,000 in two. Writes gain more by sharing a commit."""
READS: Final = frozenset((protocol.Stat, protocol.Mounts, protocol.UsageOf))
CHANGES: Final = frozenset((protocol.Prepare, protocol.View, protocol.Commit, protocol.Remove, protocol.Update))
"""What must not be done twice: a request with one of these carries a token."""
AUDIT_SECONDS: Final = 3600.0
"""How long an audit or a repair may take where the caller says nothing: it reads all there is."""
WALK_PAGE: Final = 1000
"""Infos in one page of a walk."""
PAGES_AT_ONCE: Final = 8
"""Pages asked for at once by walk and events: what a slow reader may have lying in its memory."""
PATIENCE_SECONDS: Final = 10.0
"""How long a request is repeated where the caller says nothing: a restart and a recovery take a second or two."""
PAUSE_SECONDS: Final = 0.05
"""Longest pause before the first repeat; doubled with every further one."""
PAUSE_SECONDS_MAX: Final = 1.0
"""Longest pause of a client's own between two repeats."""
RETRY_AFTER_SECONDS_MAX: Final = 5.0
"""Longest pause that a broker's `retry_after_ms` is believed."""

_AGAIN: Final = frozenset((Unavailable.code, Cancelled.code))
"""Codes of calls that are repeated. `cancelled`, to a call that nobody took back, is what a broker that stops says."""
_DECIDED: Final = frozenset(
    error.code for error in (NotFound, AlreadyExists, FailedPrecondition, InvalidArgument, Unimplemented)
)
"""Codes that are an outcome: a call that has one of these had no effect, in no try (RFC 1, 6.5)."""

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)
Read = Callable[[msgspec.Raw], T]
OnProgress = Callable[[Progress], object]


# What each verb's `ok` is read as.


def _reader(answer: type[T]) -> Read[T]:
    return protocol.decoder(answer).decode


_mounts = _reader(protocol.MountsAnswer)
_empty = _reader(protocol.Empty)


def read_mounts(ok: msgspec.Raw) -> Mounts:
    """The answer of prepare, view and mounts."""
    answer = _mounts(ok)
    mounts = Mounts(answer.mounts)
    mounts.fence = answer.fence
    return mounts


def read_nothing(ok: msgspec.Raw) -> None:
    """The answer of commit, remove, cleanup and cancel."""
    _empty(ok)


read_info: Read[Info] = _reader(Info)
read_usage: Read[Usage] = _reader(Usage)
read_status: Read[StatusAnswer] = _reader(protocol.StatusAnswer)
read_walk: Read[WalkPage] = _reader(protocol.WalkPage)
read_events: Read[EventsPage] = _reader(protocol.EventsPage)
read_audit: Read[AuditPage] = _reader(protocol.AuditPage)
read_why: Read[WhyAnswer] = _reader(protocol.WhyAnswer)


# The calls, from a caller's arguments. A wrong type is found here: at the broker it would spoil the whole
# request, in which other callers' calls travel too.


def text(value: object, what: str = "key") -> str:
    """`value` if it is a string; InvalidArgument else."""
    if isinstance(value, str):
        return value
    raise InvalidArgument(f"{what} must be a string, not {type(value).__name__}")


def texts(values: object, what: str) -> tuple[str, ...]:
    """`values` as a tuple of strings; a single string is a mistake that iterating would hide."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InvalidArgument(f"{what} must be a sequence of strings, not {type(values).__name__}")
    return tuple(text(value, what) for value in values)


def label_map(labels: Mapping[str, str] | None) -> dict[str, str]:
    """A copy of `labels` whose keys and values are strings."""
    if not labels:
        return {}
    return {text(key, "a label's key"): text(value, f"label {key!r}") for key, value in labels.items()}


def fence_number(value: object) -> int:
    """`value` if it can be a fencing number, 0 for any; InvalidArgument else."""
    if type(value) is int and 0 <= value <= FENCE_MAX:
        return value
    raise InvalidArgument(f"fence must be the number that prepare or view answered, or 0, not {value!r}")


def prepare(key: str, parent: str, labels: Mapping[str, str] | None) -> protocol.Prepare:
    """A prepare."""
    return protocol.Prepare(key=text(key), parent=text(parent, "parent"), labels=label_map(labels))


def view(key: str, parent: str, labels: Mapping[str, str] | None) -> protocol.View:
    """A view."""
    return protocol.View(key=text(key), parent=text(parent, "parent"), labels=label_map(labels))


def commit(
    name: str, key: str, parent: str, labels: Mapping[str, str] | None, sync: bool, fence: int
) -> protocol.Commit:
    """A commit."""
    return protocol.Commit(
        name=text(name, "name"),
        key=text(key),
        parent=text(parent, "parent"),
        labels=label_map(labels),
        sync=bool(sync),
        fence=fence_number(fence),
    )


def remove(key: str, fence: int) -> protocol.Remove:
    """A remove."""
    return protocol.Remove(key=text(key), fence=fence_number(fence))


def mounts(key: str, fence: int) -> protocol.Mounts:
    """A mounts."""
    return protocol.Mounts(key=text(key), fence=fence_number(fence))


def update(name: str, labels: Mapping[str, str] | None, fieldpaths: Sequence[str]) -> protocol.Update:
    """An update."""
    return protocol.Update(
        name=text(name, "name"), labels=label_map(labels), fieldpaths=texts(fieldpaths, "fieldpaths")
    )


def walk(filters: Sequence[str], after: str, page: int) -> protocol.Walk:
    """A walk, or its continuation behind `after`."""
    return protocol.Walk(filters=texts(filters, "filters"), after=after, page=page, credit=PAGES_AT_ONCE)


def audit(execute: bool | None, after: str) -> protocol.Audit | protocol.Repair:
    """An audit, or with `execute` a repair that does (True) or only says (False) what it would do."""
    if execute is None:
        return protocol.Audit(after=after, credit=PAGES_AT_ONCE)
    return protocol.Repair(execute=bool(execute), after=after, credit=PAGES_AT_ONCE)


def check_continues(page: WalkPage, after: str) -> None:
    """Raise Internal where a page's `next` leads back: the walk would never end."""
    if page.next and page.next <= after:
        raise Internal(f"the broker continues its walk at {page.next[:80]!r}, though it was at {after[:80]!r} before")


# Times and bodies.


def seconds(timeout: float) -> float:
    """`timeout` if it can be waited for; InvalidArgument where it is no number, DeadlineExceeded where it is over."""
    if not isinstance(timeout, int | float) or math.isnan(timeout):
        raise InvalidArgument(f"timeout must be a number of seconds, not {timeout!r}")
    if timeout <= 0:
        raise DeadlineExceeded(f"no time was left for the call (timeout {timeout:g} s): it was not sent")
    return timeout


def timeout_ms(timeout: float) -> int:
    """The timeout as it is sent; 0, the broker's default, where the caller waits without end."""
    return max(1, round(timeout * 1000)) if timeout < 2**31 else 0


def encode(calls: Sequence[Call], namespace: str, timeout: float, *, atomic: bool = False, token: bytes = b"") -> bytes:
    """The body of a request; InvalidArgument where a call cannot be sent or all are too long together."""
    request = protocol.Request(
        calls=tuple(calls), namespace=namespace, atomic=atomic, timeout_ms=timeout_ms(timeout), token=token
    )
    try:
        body = protocol.encode(request)
    except (UnicodeEncodeError, msgspec.MsgspecError, TypeError, OverflowError) as error:
        raise InvalidArgument(f"the call cannot be sent: {error}") from None
    if len(body) > BODY_BYTES_MAX:
        raise InvalidArgument(
            f"a request of {len(calls)} calls takes {len(body)} bytes, more than {BODY_BYTES_MAX}: send fewer at once"
        )
    return body


def encode_cancel(request_id: bytes, namespace: str, calls: tuple[int, ...] = ()) -> bytes:
    """The body that takes back the request `request_id`."""
    return protocol.encode(
        protocol.Request(calls=(protocol.Cancel(request=request_id, calls=calls),), namespace=namespace)
    )


def reply_frames(frames: Sequence[bytes]) -> tuple[bytes, bool, bytes] | None:
    """Request id, whether it is the last part, and body of a reply; None where the frames are no reply."""
    if len(frames) != 4:
        return None
    version, request_id, more, body = frames
    if version != REQUEST_VERSION or (more != DONE and more != MORE):
        return None
    return request_id, more == DONE, body


# When a request is repeated.


class Patience:
    """How long the requests of one connection are repeated, at what pace, and the tokens that they carry.

    `seconds`: 0 for never. `clock` tells seconds, `chance` a number from 0 up to 1, `entropy` so many random bytes.
    """

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.seconds = patience_seconds(seconds)
        self.clock = clock
        self.chance = chance
        # Random bytes of the connection and a counter are as unique as random bytes for each request, and cheaper.
        self._prefix = entropy(16)
        self._numbers = itertools.count(1)

    def equip(self, exchange: Exchange) -> None:
        """Make the request one that can be repeated."""
        if self.seconds:
            exchange.patient = True
            if not CHANGES.isdisjoint(map(type, exchange.calls)):
                exchange.token = self._prefix + next(self._numbers).to_bytes(8, "big")


def patience_seconds(seconds: float) -> float:
    """`seconds` if requests can be repeated for so long; InvalidArgument else."""
    if isinstance(seconds, int | float) and seconds >= 0:
        return seconds
    raise InvalidArgument(f"patience must be a number of seconds, 0 to repeat nothing, not {seconds!r}")


class Repeats:
    """The repeats of one request: since when, how many, and for how long there may be more.

    `deadline` is the request's own, on the clock of `patience`.
    """

    __slots__ = ("_deadline", "_patience", "_since", "_until", "count")

    def __init__(self, patience: Patience, deadline: float) -> None:
        self._patience = patience
        self._since = patience.clock()
        self._deadline = deadline
        self._until = min(deadline, self._since + patience.seconds)
        self.count = 0

    def pause(self, error: BrokerError) -> float | None:
        """Seconds until the next repeat, a random number of them; None where that would be too late.

        Callers that lost the same broker come back spread over the pause. What the broker asks for comes on top.
        """
        longest = min(math.ldexp(PAUSE_SECONDS, min(self.count, 16)), PAUSE_SECONDS_MAX)
        pause = retry_after(error) + self._patience.chance() * longest
        if self._patience.clock() + pause >= self._until:
            return None
        self.count += 1
        return pause

    @property
    def time_left(self) -> float:
        """Seconds until the request's deadline."""
        return max(0.0, self._deadline - self._patience.clock())

    @property
    def patience_left(self) -> float:
        """Seconds until there is no further repeat."""
        return max(0.0, self._until - self._patience.clock())

    def told(self) -> str:
        """How often and how long, for a message; empty where there was none."""
        if not self.count:
            return ""
        times = "once" if self.count == 1 else f"{self.count} times"
        return f"; repeated {times} in {self._patience.clock() - self._since:.1f} s"


def retry_after(error: BrokerError) -> float:
    """Seconds that the broker asks to wait, as far as it is believed."""
    asked = error.details.get("retry_after_ms")
    if not isinstance(asked, int | float) or not asked > 0:
        return 0.0
    return min(asked / 1000, RETRY_AFTER_SECONDS_MAX)


# Requests under way.


class Slot(Protocol[T_contra]):
    """Where the outcome of one call goes: an `asyncio.Future`, or an `Answer`."""

    def done(self) -> bool:
        """Whether the caller has an outcome, or has given up."""
        ...

    def set_result(self, result: T_contra, /) -> None:
        """The call succeeded."""
        ...

    def set_exception(self, exception: BaseException, /) -> None:
        """The call failed."""
        ...


class Answer(Generic[T]):
    """The outcome of one call: `result()` returns or raises it; FailedPrecondition before it is there."""

    __slots__ = ("_done", "_error", "_value")

    _value: T

    def __init__(self) -> None:
        self._done = False
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether the outcome is there."""
        return self._done

    def set_result(self, result: T, /) -> None:
        """The call succeeded."""
        self._value = result
        self._done = True

    def set_exception(self, exception: BaseException, /) -> None:
        """The call failed."""
        self._error = exception
        self._done = True

    def error(self) -> BaseException | None:
        """Why the call failed; None where it did not, or has no outcome."""
        return self._error

    def result(self) -> T:
        """The answer."""
        if self._error is not None:
            raise self._error
        if not self._done:
            raise FailedPrecondition("the call has no outcome yet: the batch is sent at the end of its block")
        return self._value


class Pursuit:
    """What the clients need of any request under way: whose it is, and how to end it.

    `failure`, once a try is over, is why the request is to be repeated. `doubt`: a try without a reply may have taken
    effect.
    """

    __slots__ = (
        "calls",
        "deadline",
        "doubt",
        "failure",
        "namespace",
        "on_end",
        "repeats",
        "request_id",
        "sent",
        "target",
        "timeout",
        "timer",
    )

    def __init__(self, target: bytes, namespace: str, timeout: float) -> None:
        self.target = target
        self.namespace = namespace
        self.timeout = timeout
        self.calls: list[Call] = []
        self.request_id = b""
        self.sent = False
        self.deadline = math.inf
        self.timer: Any = None
        self.on_end: Callable[[], object] | None = None
        self.failure: BrokerError | None = None
        self.doubt = False
        self.repeats: Repeats | None = None

    def encode(self) -> bytes:
        """The body to send."""
        raise NotImplementedError

    def receive(self, body: bytes, last: bool) -> bool:
        """Take one part of the reply; True when nothing more is to come. Raises Internal where it is malformed."""
        raise NotImplementedError

    def fail(self, error: BrokerError) -> None:
        """End every call that has no outcome with `error`."""
        raise NotImplementedError

    @property
    def forsaken(self) -> bool:
        """Whether nobody waits for what is still to come."""
        raise NotImplementedError


class Exchange(Pursuit):
    """A request whose calls have one outcome each."""

    __slots__ = (
        "_abandoned",
        "_forgone",
        "_progress",
        "_readers",
        "_refused",
        "_slots",
        "atomic",
        "patient",
        "token",
        "unsettled",
    )

    def __init__(self, target: bytes, namespace: str, timeout: float, *, atomic: bool = False) -> None:
        super().__init__(target, namespace, timeout)
        self.atomic = atomic
        self.patient = False
        self.token = b""
        self.unsettled = 0
        self._refused: dict[int, BrokerError] = {}
        self._forgone: list[int] = []
        self._readers: list[Read[Any]] = []
        self._slots: list[Slot[Any] | None] = []
        self._progress: dict[int, OnProgress] = {}
        self._abandoned = 0

    def add(self, call: Call, read: Read[T], slot: Slot[T], progress: OnProgress | None = None) -> int:
        """Add a call whose outcome goes to `slot`; answers how many calls there are."""
        self.calls.append(call)
        self._readers.append(read)
        self._slots.append(slot)
        self.unsettled += 1
        if progress is not None:
            self._progress[len(self.calls) - 1] = progress
        return self.unsettled

    def abandon(self) -> None:
        """One caller has given up; its slot is done."""
        self._abandoned += 1

    def number(self, slot: Slot[Any]) -> int | None:
        """The number in the request of the call whose outcome was to go to `slot`; None once it has its outcome."""
        return next((number for number, other in enumerate(self._slots) if other is slot), None)

    def abandon_all(self) -> None:
        """The one caller of all calls has given up."""
        self._abandoned = self.unsettled

    def without_abandoned(self) -> None:
        """Leave out, before it is sent, what nobody waits for."""
        kept = [index for index, slot in enumerate(self._slots) if slot is not None and not slot.done()]
        if len(kept) == len(self.calls):
            return
        # A caller may be cancelled and not know it yet: its own abandon() is still to come, and is paid for here.
        self._abandoned -= len(self.calls) - len(kept)
        self._progress = {new: self._progress[old] for new, old in enumerate(kept) if old in self._progress}
        self.calls = [self.calls[index] for index in kept]
        self._readers = [self._readers[index] for index in kept]
        self._slots = [self._slots[index] for index in kept]
        self.unsettled = len(kept)

    @property
    def forsaken(self) -> bool:
        """Whether every call without an outcome was given up by its caller."""
        return 0 < self.unsettled <= self._abandoned

    def encode(self) -> bytes:
        """The body to send; a repeat has the time that is left."""
        timeout = self.timeout if self.repeats is None else self.repeats.time_left
        return encode(self.calls, self.namespace, timeout, atomic=self.atomic, token=self.token)

    def pause(self, patience: Patience, error: BrokerError) -> float | None:
        """Make ready for another try; answers the seconds until then, None where there is none."""
        if not self.patient:
            return None
        if self.repeats is None:
            self.repeats = Repeats(patience, self.deadline)
        pause = self.repeats.pause(error)
        if pause is not None:
            self.sent = False
            self.failure = None
            self._refused.clear()
        return pause

    @property
    def given_up(self) -> tuple[int, ...]:
        """The calls that a repeat must hold although their callers have gone."""
        open_ = (index for index, slot in enumerate(self._slots) if slot is not None and slot.done())
        return (*self._forgone, *open_)

    def halves(self) -> list[Exchange]:
        """The same calls in two requests, for one that cannot be sent as it is; none where it has to stay whole.

        A caller that gives up afterwards is not counted in its half, which is then not taken back.
        """
        if self.atomic or self.on_end is not None or len(self.calls) < 2:
            return []
        middle = len(self.calls) // 2
        halves = []
        for part in (range(middle), range(middle, len(self.calls))):
            half = Exchange(self.target, self.namespace, self.timeout)
            for index in part:
                slot = self._slots[index]
                if slot is not None:
                    half.add(self.calls[index], self._readers[index], slot, self._progress.get(index))
            halves.append(half)
        return halves

    def receive(self, body: bytes, last: bool) -> bool:
        """Take one part of the reply; True when every call has its outcome, or this try is over: see `failure`."""
        reply = protocol.decode_reply(body)
        slots = self._slots
        readers = self._readers
        for outcome in reply.outcomes:
            index = outcome.call
            if not 0 <= index < len(slots):
                raise Internal(f"the broker answered call {index} of a request of {len(slots)}")
            slot = slots[index]
            if slot is None:
                continue
            if outcome.progress is not None:
                self._report(index, slot, outcome.progress)
                continue
            if outcome.error is not None and self._refuse(index, slot, outcome.error):
                continue
            slots[index] = None
            self.unsettled -= 1
            if slot.done():
                self._abandoned -= 1
            elif outcome.error is not None:
                refusal = protocol.error_of(outcome.error)
                final = self.repeats is None or refusal.code in _DECIDED
                slot.set_exception(refusal if final else self._told(index, refusal))
            else:
                try:
                    value = readers[index](outcome.ok)
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    slot.set_exception(Internal(f"the broker's answer is malformed: {error}"))
                else:
                    slot.set_result(value)
        if reply.error is not None:
            return self._receive_refusal(protocol.error_of(reply.error))
        if last and self.unsettled:
            self._end_try()
            return True
        return not self.unsettled

    def _refuse(self, index: int, slot: Slot[Any], fault: protocol.Fault) -> bool:
        """Keep a call open that a repeat may bring an outcome for."""
        if not self.patient or fault.code not in _AGAIN:
            return False
        if slot.done():
            # Nobody waits for it, but a repeat for the others would execute it.
            self._forgone.append(index)
            return False
        self._refused[index] = protocol.error_of(fault)
        return True

    def _receive_refusal(self, error: BrokerError) -> bool:
        """The request was refused as a whole; or the snapshotter died, which is told by a detail (RFC 1, 6.4)."""
        self.doubt = self.doubt or bool(error.details.get("in_doubt"))
        if self.patient and error.code == Unavailable.code:
            self.failure = error
        else:
            self.fail(error)
        return True

    def _end_try(self) -> None:
        """The reply is over and calls are open: those that were refused."""
        if len(self._refused) < self.unsettled:
            raise Internal("the broker ended its reply without an outcome for every call")
        error = next(iter(self._refused.values()))
        if self.atomic and self.unsettled < len(self.calls):
            # The reason is another call's, and final: these were taken back with it.
            self.fail(error)
        else:
            self.failure = error

    def fail(self, error: BrokerError) -> None:
        """End every call without outcome with an error of its own: one exception in many tasks mixes tracebacks."""
        if not self.unsettled:
            return
        for index, slot in enumerate(self._slots):
            if slot is not None and not slot.done():
                slot.set_exception(self._told(index, self._refused.get(index, error)))
            self._slots[index] = None
        self.unsettled = 0

    def _told(self, index: int, error: BrokerError) -> BrokerError:
        """The error for the caller of one call: how long it was repeated, and whether it may have taken effect."""
        message = error.message
        doubt = self.doubt and type(self.calls[index]) in CHANGES
        if self.repeats is not None:
            message += self.repeats.told()
        if doubt and "unknown" not in message:
            message += "; it is unknown whether the call took effect: look with stat"
        told = type(error)(message, error.details)
        told.in_doubt = doubt
        return told

    def _report(self, index: int, slot: Slot[Any], progress: Progress) -> None:
        """Hand on how far a call is; a callback that fails gives its own call up, and no other."""
        report = self._progress.get(index)
        if report is None or slot.done():
            return
        try:
            report(progress)
        except Exception as error:
            slot.set_exception(error)
            self.abandon()


class Stream(Pursuit, Generic[T]):
    """A request of one call that is answered in pages; `wake` is called whenever something has come."""

    __slots__ = ("_answered", "_progress", "_read", "_wanted", "error", "over", "pages", "wake")

    def __init__(
        self,
        target: bytes,
        namespace: str,
        timeout: float,
        call: Call,
        read: Read[T],
        progress: OnProgress | None = None,
    ) -> None:
        super().__init__(target, namespace, timeout)
        self._progress = progress
        self.calls.append(call)
        self._read = read
        self._wanted = True
        self._answered = False
        self.pages: deque[T] = deque()
        self.error: Exception | None = None
        self.over = False
        self.wake: Callable[[], object] | None = None

    def encode(self) -> bytes:
        """The body to send."""
        return encode(self.calls, self.namespace, self.timeout)

    def receive(self, body: bytes, last: bool) -> bool:
        """Take one part of the reply; True when it was the last."""
        reply = protocol.decode_reply(body)
        for outcome in reply.outcomes:
            if outcome.call != 0:
                raise Internal(f"the broker answered call {outcome.call} of a request of 1")
            if outcome.error is not None:
                self.fail(protocol.error_of(outcome.error))
            elif outcome.progress is None:
                self._page(outcome.ok)
            elif self._progress is not None:
                self._report(self._progress, outcome.progress)
        if reply.error is not None:
            self.fail(protocol.error_of(reply.error))
        if last and not self._answered and not self.over:
            raise Internal("the broker ended its reply without a page")
        self.over = self.over or last
        if self.wake is not None:
            self.wake()
        return self.over

    def _report(self, report: OnProgress, progress: Progress) -> None:
        """Hand on how far the call is; a callback that fails ends the stream with its own exception."""
        try:
            report(progress)
        except Exception as error:
            self._progress = None
            self.error = error
            self.over = True

    def _page(self, ok: msgspec.Raw) -> None:
        try:
            self.pages.append(self._read(ok))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Internal(f"the broker's page is malformed: {error}") from None
        self._answered = True

    def fail(self, error: BrokerError) -> None:
        """End the stream with `error`, behind the pages that came before it."""
        if not self.over:
            self.error = error
            self.over = True
            if self.wake is not None:
                self.wake()

    def give_up(self) -> None:
        """The caller wants no more pages."""
        self._wanted = False

    @property
    def forsaken(self) -> bool:
        """Whether pages may come that nobody wants."""
        return not self._wanted and not self.over

    def take(self) -> T | None:
        """The next page; None where it has not come or there is none, and then the stream's error is raised."""
        if self.pages:
            return self.pages.popleft()
        if self.error is not None:
            raise self.error
        return None


class BatchCalls:
    """The calls of a batch: each answers an `Answer` whose `result()` is there after the block."""

    def __init__(self, target: bytes, namespace: str, timeout: float, *, atomic: bool) -> None:
        self._exchange = Exchange(target, namespace, timeout, atomic=atomic)
        self._answers: list[Answer[Any]] = []
        self._sent = False

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> Answer[Mounts]:
        """An active snapshot; answers its mounts."""
        return self._add(prepare(key, parent, labels), read_mounts)

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> Answer[Mounts]:
        """A read-only snapshot; answers its mounts."""
        return self._add(view(key, parent, labels), read_mounts)

    def commit(
        self,
        name: str,
        key: str,
        parent: str = "",
        labels: Mapping[str, str] | None = None,
        sync: bool = False,
        fence: int = 0,
    ) -> Answer[None]:
        """The active `key` becomes the committed `name`."""
        return self._add(commit(name, key, parent, labels, sync, fence), read_nothing)

    def remove(self, key: str, fence: int = 0) -> Answer[None]:
        """The snapshot goes."""
        return self._add(remove(key, fence), read_nothing)

    def mounts(self, key: str, fence: int = 0) -> Answer[Mounts]:
        """The mounts of an active snapshot or view."""
        return self._add(mounts(key, fence), read_mounts)

    def stat(self, key: str) -> Answer[Info]:
        """What is known of a snapshot."""
        return self._add(protocol.Stat(key=text(key)), read_info)

    def update(self, name: str, labels: Mapping[str, str] | None, fieldpaths: Sequence[str] = ()) -> Answer[Info]:
        """Other labels; answers the snapshot with them."""
        return self._add(update(name, labels, fieldpaths), read_info)

    def usage(self, key: str) -> Answer[Usage]:
        """What a snapshot takes."""
        return self._add(protocol.UsageOf(key=text(key)), read_usage)

    def __len__(self) -> int:
        return len(self._answers)

    def _add(self, call: Call, read: Read[T]) -> Answer[T]:
        if self._sent:
            raise FailedPrecondition("the batch is sent: open another one")
        if len(self._answers) >= CALLS_MAX:
            raise InvalidArgument(f"a batch has at most {CALLS_MAX} calls: send what is there first")
        answer: Answer[T] = Answer()
        self._exchange.add(call, read, answer)
        self._answers.append(answer)
        return answer

    def _seal(self) -> Exchange:
        """The exchange to send; no call can be added to it any more."""
        self._sent = True
        return self._exchange

    def _raise_first(self) -> None:
        """Raise the error of the first call that failed by itself, with a note where others failed too.

        A call of an atomic batch that was only taken back with the others is `Cancelled`: not the reason.
        """
        errors = [error for answer in self._answers if (error := answer.error()) is not None]
        if not errors:
            return
        reason = next((error for error in errors if not isinstance(error, Cancelled)), errors[0])
        if len(errors) > 1 and not self._exchange.atomic:
            reason.add_note(
                f"{len(errors)} of {len(self._answers)} calls of the batch failed; each answer has its own error"
            )
        raise reason
