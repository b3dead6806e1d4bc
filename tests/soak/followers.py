"""Who listens during a soak: one that must miss nothing, one that is slow, one that has stopped reading.

`Matcher` holds what the first is told against what the clients have done, while both go on: of each client a queue of
what must come, and a queue of what came.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Final

import zmq

from snapbroker import aio
from snapbroker.blocking import Events
from snapbroker.contract import Event, Info
from snapbroker.errors import OutOfRange
from tests.harness import Daemon
from tests.oracle import replay
from tests.powercut.books import Happening

HEAL_S: Final = 60.0
"""How long a follower asks again while the broker is away."""
SLOW_S: Final = 0.01
"""Pause of the slow subscriber after every event."""


class Matcher:
    """What must be told of each client, and what is told; `mismatches` is the first difference of each.

    A cleanup changes nothing and has no token: a repeat of one whose reply was lost is a second event. They are left
    out on both sides.
    """

    def __init__(self) -> None:
        self.matched = 0
        self.mismatches: dict[str, tuple[Happening, Happening]] = {}
        self._lock = threading.Lock()
        self._asked: defaultdict[str, deque[Happening]] = defaultdict(deque)
        self._told: defaultdict[str, deque[Happening]] = defaultdict(deque)

    def asked(self, client: str, happenings: Sequence[Happening]) -> None:
        """A client has the answer of what led to these events."""
        self._add(self._asked, client, [each for each in happenings if each[0] != "cleanup"])

    def told(self, client: str, happening: Happening) -> None:
        """The follower has an event of the client."""
        self._add(self._told, client, [happening] if happening[0] != "cleanup" else [])

    def _add(self, queues: defaultdict[str, deque[Happening]], client: str, happenings: Sequence[Happening]) -> None:
        with self._lock:
            queues[client].extend(happenings)
            asked, told = self._asked[client], self._told[client]
            while asked and told:
                pair = asked.popleft(), told.popleft()
                if pair[0] == pair[1]:
                    self.matched += 1
                else:
                    self.mismatches.setdefault(client, pair)

    def open(self) -> dict[str, tuple[int, int]]:
        """Of each client how many events are asked for and not told, and told and not asked for."""
        with self._lock:
            counts = {name: (len(self._asked[name]), len(self._told[name])) for name in {*self._asked, *self._told}}
        return {name: count for name, count in counts.items() if any(count)}


class Follower(threading.Thread):
    """Every event of every snapshotter through the asyncio client, from the first one on, without a gap."""

    def __init__(self, daemon: Daemon, matcher: Matcher) -> None:
        super().__init__(name="follower", daemon=True)
        self.sequences = dict.fromkeys(daemon.snapshotters, 0)
        self.states: dict[tuple[str, str], dict[str, Info]] = {}
        self.gaps = dict.fromkeys(daemon.snapshotters, 0)
        self.error: BaseException | None = None
        self._daemon = daemon
        self._matcher = matcher
        self._loop = asyncio.new_event_loop()
        self._over: asyncio.Event | None = None
        self._begun = threading.Event()

    def run(self) -> None:
        """Follow until told to stop."""
        try:
            self._loop.run_until_complete(self._all())
        except BaseException as error:
            self.error = error
        finally:
            self._begun.set()
            self._loop.close()

    def stop(self) -> None:
        """End it and wait."""
        self._begun.wait()
        over = self._over
        if over is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(over.set)
        self.join()

    async def _all(self) -> None:
        self._over = asyncio.Event()
        self._begun.set()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._follow(name)) for name in self._daemon.snapshotters]
            await self._over.wait()
            for task in tasks:
                task.cancel()

    async def _follow(self, name: str) -> None:
        async with (
            aio.connect(
                self._daemon.endpoint, snapshotter=name, events_endpoint=self._daemon.events_endpoint
            ) as broker,
            broker.events(since=0, topics=[f"{name}/"], timeout=HEAL_S) as events,
        ):
            async for event in events:
                self._take(event)
                self.gaps[name] = events.statistics().gaps

    def _take(self, event: Event) -> None:
        name = event.snapshotter
        expected = self.sequences[name] + 1
        assert event.sequence == expected, f"{name}: event {event.sequence} follows {expected - 1}"
        self.sequences[name] = event.sequence
        place = name, event.namespace
        self.states[place] = replay([event], self.states.get(place))
        happening = (event.verb, event.key, event.info.name if event.info else "")
        self._matcher.told(f"{name}/{event.namespace}", happening)


class SlowFollower(threading.Thread):
    """One that takes an event now and then: it falls behind, and still gets each once and in order.

    Where the journal no longer has what it comes to, it begins again with the newest, as a program does that walks.
    """

    def __init__(self, daemon: Daemon, snapshotter: str) -> None:
        super().__init__(name="slow follower", daemon=True)
        self.events = 0
        self.fell_off = 0
        self.error: BaseException | None = None
        self._daemon = daemon
        self._snapshotter = snapshotter
        self._halt = threading.Event()

    def run(self) -> None:
        """Follow until told to stop."""
        try:
            with self._daemon.client(self._snapshotter) as broker:
                while not self._halt.is_set():
                    try:
                        self._follow(broker.events(topics=[f"{self._snapshotter}/"], timeout=HEAL_S))
                    except OutOfRange:
                        self.fell_off += 1
        except BaseException as error:
            self.error = error

    def _follow(self, events: Events) -> None:
        last = 0
        with events:
            while not self._halt.is_set():
                event = events.poll(0.5)
                if event is None:
                    continue
                assert last in (0, event.sequence - 1), f"slow: event {event.sequence} follows {last}"
                last = event.sequence
                self.events += 1
                self._halt.wait(SLOW_S)

    def stop(self) -> None:
        """End it and wait."""
        self._halt.set()
        self.join()


class Deaf:
    """A subscriber of everything that never reads: what the publisher keeps for it is bounded by its setting."""

    def __init__(self, daemon: Daemon) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, 1)
        self._socket.linger = 0
        self._socket.connect(daemon.events_endpoint)
        self._socket.subscribe(b"")

    def close(self) -> None:
        """Leave."""
        self._socket.close()
        self._context.term()
