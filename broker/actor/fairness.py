"""Fairness between clients: one that floods waits behind itself, and another one behind no more than its share.

Three parts, none of which knows a socket or a snapshot.

`Admission` is the router's, one for each actor. A client's requests go to the actor up to a window; what is beyond
waits here, in a line of the client's own, and goes when something of that client comes back. So an actor, which serves
what it has in the order of arrival, never holds more of anybody than a window, and one call waits behind windows and
not behind a flood. A lone client has a wide window, for nobody waits behind it; with others about it is narrow, a
fraction of a millisecond's work. What goes on beside the actor's turns (a copy, a follower of events) does not fill it:
the actor tells, and the request is out of the window while it stays open.

How much may be open is divided by a rule of switches' buffers: a client may have as much as is free (Choudhury and
Hahne, "Dynamic Queue Length Thresholds", 1998). One alone gets half, two a third each, and there is always room for
the next. What is refused is told when to come back: at the pace at which this client's requests are done at the
moment, one after the other, so that a thousand refused at once do not return at once.

`FairQueue` is for what an actor's threads hand each other: a line for each client, served in turn (deficit round robin,
Shreedhar and Varghese, 1995). With one client it is a plain queue. `Mix` tells them whether there are several.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from snapbroker.errors import InvalidArgument, ResourceExhausted

ABOUT_NS: Final = 1_000_000_000
"""A client is about for this long after its last request: as long its neighbours' windows stay narrow."""
PACE_NS: Final = 100_000_000
"""How long requests are counted before their pace is believed."""
PACE_FIRST_NS: Final = 1_000_000
"""The pace of a client of which nothing was done yet."""
RETRY_MS_MAX: Final = 60_000
"""Longest retry-after that is told."""
REQUEST_BYTES: Final = 64
"""What a request weighs in a window beside its body, which is all that is known of its work."""

_WAITING: Final = -1
"""The weight of a request that is not in the actor's hands yet."""

Key = tuple[bytes, bytes]
"""A client's identity and a request's id."""
Frames = Sequence[bytes]
"""What is sent to the actor for a request; nothing of it is looked at here."""
T = TypeVar("T")


class Limits(Protocol):
    """What of the configuration is needed here."""

    @property
    def open_requests_max(self) -> int: ...  # noqa: D102
    @property
    def open_bytes_max(self) -> int: ...  # noqa: D102
    @property
    def client_requests_max(self) -> int: ...  # noqa: D102
    @property
    def client_bytes_max(self) -> int: ...  # noqa: D102
    @property
    def window_bytes(self) -> int: ...  # noqa: D102
    @property
    def window_shared_bytes(self) -> int: ...  # noqa: D102


@dataclass(slots=True)
class Request:
    """An open request: its size, when it came, and its weight in the window."""

    size: int
    arrival: int
    weight: int


class Pace:
    """How long one of a client's requests takes after another, and a moment for each that is to come back."""

    __slots__ = ("_begun", "_count", "_gap", "_promised", "_rested")

    def __init__(self, now: int) -> None:
        self._gap = PACE_FIRST_NS
        self._begun = now
        self._rested = now
        self._count = 0
        self._promised = 0

    def rests(self, now: int) -> None:
        """Nothing is open: the time from here on says nothing of the pace."""
        self._rested = now

    def resumes(self, now: int) -> None:
        """Something is open again."""
        self._begun += now - self._rested

    def done(self, now: int) -> None:
        """One more is done."""
        self._count += 1
        passed = now - self._begun
        if passed > PACE_NS:
            self._gap = passed // self._count
            self._begun, self._count = now, 0

    def gap(self, now: int) -> int:
        """Nanoseconds from one to the next; where nothing was done for long, as long as that."""
        passed = now - self._begun
        return max(self._gap, passed // (self._count + 1)) if passed > PACE_NS else self._gap

    def promise(self, now: int) -> tuple[int, int]:
        """When the next one that is refused may come back, in milliseconds, and how many were told before it."""
        gap = self.gap(now)
        ahead = max(0, self._promised - now) // gap
        self._promised = max(self._promised, now) + gap
        return min((self._promised - now) // 1_000_000 + 1, RETRY_MS_MAX), ahead


class Client:
    """One client at one actor."""

    __slots__ = ("bytes", "hands", "open", "pace", "waiting")

    def __init__(self, now: int) -> None:
        self.open: dict[bytes, Request] = {}
        self.bytes = 0
        self.hands = 0
        """What it has in the actor's hands, by weight."""
        self.waiting: deque[tuple[bytes, Frames]] = deque()
        """Id and frames of what is not in the actor's hands yet."""
        self.pace = Pace(now)


class Admission:
    """The open requests of one actor (see the module); times are nanoseconds of any clock that never goes back."""

    def __init__(self, name: str, limits: Limits) -> None:
        self._name = name
        self._limits = limits
        self._clients: dict[bytes, Client] = {}
        self._idle: dict[bytes, int] = {}
        """Clients with nothing open and since when, the longest first."""
        self._look = 0
        self._window = limits.window_bytes
        self.open = 0
        self.bytes = 0
        self.waiting = 0
        self.served = 0
        self.refused = 0
        self.mean_ns = 1_000_000.0

    def admit(self, identity: bytes, request_id: bytes, size: int, frames: Frames, now: int) -> bool:
        """Open a request of `size` bytes: whether it goes to the actor at once; else `done` will answer its frames.

        InvalidArgument when its id is open already, ResourceExhausted when there is no room.
        """
        client = self._clients.get(identity) or self._appeared(identity, now)
        if request_id in client.open:
            raise InvalidArgument("this request id is still open: use another one")
        limits, requests = self._limits, len(client.open)
        if (
            requests >= limits.client_requests_max
            or requests >= limits.open_requests_max - self.open
            or client.bytes + size > limits.client_bytes_max
            or client.bytes + size > limits.open_bytes_max - self.bytes
        ):
            raise self._refusal(client, now)
        if not requests:
            self._idle.pop(identity, None)
            client.pace.resumes(now)
        self.open += 1
        self.bytes += size
        client.bytes += size
        if client.waiting or (client.hands and client.hands + size + REQUEST_BYTES > self._window):
            client.open[request_id] = Request(size, now, _WAITING)
            client.waiting.append((request_id, frames))
            self.waiting += 1
            return False
        weight = size + REQUEST_BYTES
        client.open[request_id] = Request(size, now, weight)
        client.hands += weight
        return True

    def _appeared(self, identity: bytes, now: int) -> Client:
        """A client that was not about: the windows of the others get narrow."""
        if now >= self._look:
            self._forget(now)
        client = self._clients[identity] = Client(now)
        self._idle[identity] = now
        self._share()
        return client

    def _forget(self, now: int) -> None:
        self._look = now + ABOUT_NS // 4
        gone = []
        for identity, since in self._idle.items():
            if now - since < ABOUT_NS:
                break
            gone.append(identity)
        for identity in gone:
            del self._idle[identity], self._clients[identity]
        if gone:
            self._share()

    def _share(self) -> None:
        limits = self._limits
        self._window = limits.window_bytes if len(self._clients) < 2 else limits.window_shared_bytes

    def _refusal(self, client: Client, now: int) -> ResourceExhausted:
        self.refused += 1
        retry_after_ms, ahead = client.pace.promise(now)
        limits, own = self._limits, len(client.open)
        return ResourceExhausted(
            f"snapshotter {self._name!r} has {own} open requests of {client.bytes} bytes of this client and "
            f"{self.open} of {self.bytes} bytes of all: one may have {limits.client_requests_max} of "
            f"{limits.client_bytes_max} bytes and no more than is free, all {limits.open_requests_max} of "
            f"{limits.open_bytes_max} bytes",
            {"retry_after_ms": retry_after_ms, "position": own + ahead},
        )

    def done(self, identity: bytes, request_id: bytes, now: int) -> Iterable[Frames]:
        """A request's last part came: the frames of each that goes to the actor in its place."""
        if now >= self._look:
            self._forget(now)
        client = self._clients.get(identity)
        request = client.open.pop(request_id, None) if client is not None else None
        if client is None or request is None:
            return ()
        self.open -= 1
        self.bytes -= request.size
        client.bytes -= request.size
        self.served += 1
        self.mean_ns += (now - request.arrival - self.mean_ns) / 64
        client.pace.done(now)
        if request.weight > 0:
            client.hands -= request.weight
        if not client.open:
            self._idle[identity] = now
            client.pace.rests(now)
        return self._next(client) if client.waiting else ()

    def set_aside(self, identity: bytes, request_id: bytes) -> Iterable[Frames]:
        """What is left of a request goes on beside the actor's turns and fills no window; answers as `done`."""
        client = self._clients.get(identity)
        request = client.open.get(request_id) if client is not None else None
        if client is None or request is None or request.weight <= 0:
            return ()
        client.hands -= request.weight
        request.weight = 0
        return self._next(client) if client.waiting else ()

    def _next(self, client: Client) -> Iterator[Frames]:
        while client.waiting:
            request_id, frames = client.waiting[0]
            request = client.open[request_id]
            weight = request.size + REQUEST_BYTES
            if client.hands and client.hands + weight > self._window:
                return
            client.waiting.popleft()
            self.waiting -= 1
            client.hands += weight
            request.weight = weight
            yield frames

    def clear(self) -> tuple[list[Key], list[Key]]:
        """The actor is gone: what was in its hands, and what never was; nothing is open any more."""
        handed: list[Key] = []
        kept: list[Key] = []
        for identity, client in self._clients.items():
            for request_id, request in client.open.items():
                (kept if request.weight == _WAITING else handed).append((identity, request_id))
        self._clients.clear()
        self._idle.clear()
        self.open = self.bytes = self.waiting = 0
        self._share()
        return handed, kept

    def statistics(self) -> dict[str, int]:
        """For `status`."""
        return {
            "open": self.open,
            "limit": self._limits.open_requests_max,
            "bytes": self.bytes,
            "bytes_limit": self._limits.open_bytes_max,
            "waiting": self.waiting,
            "clients": len(self._clients),
            "client_limit": self._limits.client_requests_max,
            "window": self._window,
            "served": self.served,
            "refused": self.refused,
            "mean_us": int(self.mean_ns / 1000),
        }


class Mix:
    """Whether several clients called within the last second; one that takes over from another is alone."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._latest = b""
        self._changed = self._mixed = -ABOUT_NS

    def see(self, line: bytes) -> None:
        """A client does something."""
        if line != self._latest:
            if self._latest:
                changed, self._changed = self._changed, self._clock()
                if self._changed - changed < ABOUT_NS:
                    self._mixed = self._changed
            self._latest = line

    @property
    def shared(self) -> bool:
        """Whether one waits for others."""
        return self._clock() - self._mixed < ABOUT_NS


class _Line(Generic[T]):
    __slots__ = ("allowance", "items")

    def __init__(self) -> None:
        self.items: deque[tuple[T, int]] = deque()
        self.allowance = 0


class FairQueue(Generic[T]):
    """A line for each client, served in turn; not thread-safe."""

    def __init__(self, quantum: int = 8) -> None:
        """`quantum`: how much, by cost, one line is served before the next one's turn comes."""
        self._quantum = quantum
        self._lines: dict[bytes, _Line[T]] = {}
        self._turn: deque[bytes] = deque()
        self._length = 0

    def append(self, line: bytes, item: T, cost: int = 1, *, first: bool = False) -> None:
        """Put an item at the end of a client's line, or before what else is in it."""
        found = self._lines.get(line)
        if found is None:
            found = self._lines[line] = _Line()
            self._turn.append(line)
        (found.items.appendleft if first else found.items.append)((item, cost))
        self._length += 1

    def take(self, budget: int, *, once: bool = False) -> list[T]:
        """Items up to a cost of `budget`, and always one if there is any; with `once`, a turn of each line at most."""
        taken: list[T] = []
        turns = len(self._turn) if once else sys.maxsize
        while self._turn and ((budget > 0 and turns > 0) or not taken):
            turns -= 1
            line = self._lines[self._turn[0]]
            if line.allowance <= 0 or line.items[0][1] > line.allowance:
                line.allowance += self._quantum
            while line.items and line.items[0][1] <= line.allowance and (budget > 0 or not taken):
                item, cost = line.items.popleft()
                line.allowance -= cost
                budget -= cost
                taken.append(item)
            if not line.items:
                del self._lines[self._turn.popleft()]
            elif line.allowance <= 0 or line.items[0][1] > line.allowance:
                self._turn.rotate(-1)
        self._length -= len(taken)
        return taken

    def popleft(self) -> T:
        """The next item; IndexError when there is none."""
        if not self._turn:
            raise IndexError("empty")
        return self.take(1)[0]

    def waiting(self, line: bytes) -> int:
        """How many wait in one line."""
        found = self._lines.get(line)
        return len(found.items) if found is not None else 0

    def clear(self) -> list[T]:
        """Take everything."""
        return self.take(sys.maxsize)

    def __len__(self) -> int:
        return self._length
