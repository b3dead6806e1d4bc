"""One soak: clients, kills and followers on one daemon with every backend, and what must hold when all is quiet.

Kills come in three parts of the run. In the first the daemon itself is killed or stopped, and its fork server, actors
and their child processes are killed; in the second all but the daemon; in the last children alone, so that an actor
lives for a third of the run and the broker for two, which is what growth is measured on.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Final, Self

import psutil

from snapbroker.contract import Info
from snapbroker.errors import BrokerError
from tests import harness
from tests.daemon.support import wait_until
from tests.harness import Daemon, Silence
from tests.oracle import Oracle, timeless
from tests.powercut.books import Books, Contents
from tests.powercut.checks import check_directories, check_journal, check_recovered, walked
from tests.powercut.client import Client
from tests.soak.flatness import Watch
from tests.soak.followers import HEAL_S, Deaf, Follower, Matcher, SlowFollower

FORK_SERVER: Final = "fork server"
CLIENTS: Final = 4
"""Clients of each snapshotter."""
PATIENCE_S: Final = 300.0
"""How long a client repeats a request: on a busy machine kills may follow each other faster than a cleanup is done."""
KILLS: Final = 120
"""About how many kills a run of any length has; fewer than one in `KILL_S_MIN` seconds."""
KILL_S_MIN: Final = 5.0
"""Shortest mean time between two kills: an actor that dies more often is made to wait by its supervisor."""
TICK_S: Final = 10.0
"""Between two lines of progress."""
SETTINGS: Final[dict[str, Any]] = {
    # Soon full, so that what is bounded is seen to stay so.
    "publisher": {"send_queue_max": 5000, "heartbeat_ms": 500},
    "log_level": "warning",
}
LIMITS: Final = {"journal": {"events_max": 200_000}, "outcomes": {"age_max_s": 2 * int(PATIENCE_S)}}

Say = Callable[[str], None]


class Soak:
    """A daemon under load; a context manager."""

    def __init__(self, seconds: float, seed: int, say: Say) -> None:
        self.kills: Counter[str] = Counter()
        self.failures: list[str] = []
        self.grown: list[str] = []
        """What is not flat, or did not live long enough to be judged: of a run of seconds, nothing can be said."""
        self._seconds = seconds
        self._seed = seed
        self._say = say
        self._random = random.Random(f"{seed}/kills")
        self._undo = ExitStack()
        self._matcher = Matcher()
        self._clients: list[Client] = []
        self._pictures: dict[str, dict[str, tuple[dict[str, Info], int]]] = {}

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            btrfs = undo.enter_context(harness.btrfs_filesystem(4 << 30))
            sections: dict[str, dict[str, Any]] = {
                name: {"backend": name, "limits": LIMITS} for name in harness.SNAPSHOTTERS
            }
            sections["btrfs"]["root"] = str(btrfs / "soak")
            self._daemon = Daemon(sections, **SETTINGS)
            undo.callback(self._daemon.remove)
            self._daemon.start()
            self._watch = Watch(self._daemon)
            self._follower = Follower(self._daemon, self._matcher)
            self._slow = SlowFollower(self._daemon, "overlayfs")
            self._deaf = Deaf(self._daemon)
            undo.callback(self._deaf.close)
            self._clients = [
                self._client(name, number) for name in self._daemon.snapshotters for number in range(CLIENTS)
            ]
            for thread in (self._watch, self._follower, self._slow):
                thread.start()
                undo.callback(thread.join)
                undo.callback(thread.stop)
            for client in self._clients:
                client.start()
                undo.callback(client.join)
            undo.callback(lambda: [client.abandon() for client in self._clients])
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.__exit__(*exception)  # type: ignore[arg-type]

    def _client(self, snapshotter: str, number: int) -> Client:
        rebases = snapshotter in ("overlayfs", "memory")
        books = Books(Oracle(snapshotter, f"client-{number}", rebases))
        seed = f"{self._seed}/{books.name}"
        client = Client(self._daemon, books, seed, patience_s=PATIENCE_S, notes=False)
        client.on_events = lambda happened: self._matcher.asked(books.name, happened)
        return client

    # The run.

    def run(self) -> dict[str, Any]:
        """Load and kills for the time given, then quiet and every check; answers the figures."""
        begun = time.monotonic()
        pace = threading.Event()
        mean = max(KILL_S_MIN, self._seconds / KILLS)
        next_kill, next_tick = begun + self._random.expovariate(1 / mean), begun + TICK_S
        while (now := time.monotonic()) < begun + self._seconds and not self._broken():
            if now >= next_kill:
                self._kill((now - begun) / self._seconds)
                next_kill = time.monotonic() + self._random.expovariate(1 / mean)
            if now >= next_tick:
                self._tick(now - begun)
                next_tick = now + TICK_S
            # It paces the run: nothing is waited for.
            pace.wait(max(0.01, min(next_kill, next_tick, begun + self._seconds) - time.monotonic()))
        self._quiet()
        self._check()
        return self._figures(time.monotonic() - begun)

    def _broken(self) -> bool:
        return any(thread.error is not None for thread in (self._follower, self._slow, *self._clients))

    def _tick(self, elapsed: float) -> None:
        answers = sum(client.answers for client in self._clients)
        repeats = sum(client.repeats for client in self._clients)
        self._say(
            f"{elapsed:6.0f} s  {answers} answers  {repeats} repeats  {sum(self.kills.values())} kills  "
            f"{self._matcher.matched} events matched  {self._watch.latest()}"
        )
        with contextlib.suppress(Silence, BrokerError):
            for name in self._daemon.snapshotters:
                self._take_pictures(name)

    def _take_pictures(self, name: str) -> None:
        """What is shown while everything goes on; with the events above its sequence it must give the end."""
        with self._daemon.wire(name) as wire:
            self._pictures[name] = {
                client.books.oracle.namespace: walked(wire, client.books.oracle.namespace) for client in self._of(name)
            }

    def _of(self, snapshotter: str) -> list[Client]:
        return [client for client in self._clients if client.snapshotter == snapshotter]

    # Kills.

    def _kill(self, share: float) -> None:
        """One of what this part of the run allows."""
        kinds = ["child", "child", "actor", "actor", "actor", FORK_SERVER, "daemon", "stop"]
        allowed = kinds[:2] if share > 2 / 3 else kinds[:6] if share > 1 / 3 else kinds
        kind = self._random.choice(allowed)
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if kind == "daemon":
                self._daemon.kill()
                self._daemon.start(wait=False)
            elif kind == "stop":
                self._daemon.restart()
            elif not self._kill_below(kind):
                return
            self.kills[kind] += 1

    def _kill_below(self, kind: str) -> bool:
        """Kill -9 of an actor, of one of an actor's child processes, or of what forks them; whether there was one."""
        below = [process for title, process in self._daemon.forked().items() if _kind_of(title) == kind]
        if below:
            self._random.choice(below).kill()
        return bool(below)

    # The end.

    def _quiet(self) -> None:
        """End the load; every request's outcome is known then, and every event told."""
        self._say("the load ends")
        for client in self._clients:
            client.stop()
        for client in self._clients:
            client.join()
            if client.error is not None:
                self._fail(f"client {client.name}", client.error)
        self._daemon.wait_ready()
        newest = {name: self._newest(name) for name in self._daemon.snapshotters}
        with self._checked("the follower hears of everything"):
            wait_until(
                lambda: self._follower.error or all(self._follower.sequences[name] >= newest[name] for name in newest),
                "the newest events",
                timeout=HEAL_S,
            )
        self._follower.stop()
        self._slow.stop()
        self._watch.stop()
        for thread in (self._follower, self._slow):
            if thread.error is not None:
                self._fail(thread.name, thread.error)
        for name, (asked, told) in self._matcher.mismatches.items():
            self.failures.append(f"{name}: the follower was told {told}, asked for was {asked}")
        if left := self._matcher.open():
            self.failures.append(f"(asked for and not told, told and not asked for): {left}")

    def _newest(self, name: str) -> int:
        """The newest event; what the status tells of it is a second old."""
        with self._daemon.wire(name) as wire:
            return walked(wire, "default")[1]

    def _check(self) -> None:
        self._say("everything is checked")
        for client in self._clients:
            with self._checked(f"the walk of {client.name}"), self._daemon.wire(client.snapshotter) as wire:
                namespace = client.books.oracle.namespace
                found, _ = walked(wire, namespace)
                expected = client.books.oracle.matching(lambda _info: True)
                assert [timeless(info) for info in found.values()] == expected, f"{found}, not {expected}"
                told = self._follower.states.get((client.snapshotter, namespace), {})
                assert told == found, f"the events tell {told}, a walk {found}"
        for name in self._daemon.snapshotters:
            mine = [client.books.oracle.namespace for client in self._of(name)]
            with self._checked(f"the journal of {name}"), self._daemon.wire(name) as wire:
                check_journal(wire, mine, self._pictures.get(name))
            with self._checked(f"the recovery of {name}"):
                check_recovered(self._daemon, name)
            if name != "memory":
                with self._checked(f"the directories of {name}"):
                    check_directories(self._daemon, name)
        self.files = 0
        for client in self._clients:
            if client.error is None:
                with self._checked(f"the files of {client.name}"):
                    client.on_events = None
                    self.files += client.verify(Contents.all)
            client.close()
        self.flat, self.grown = self._watch.verdict()
        with self._checked("the stop"):
            self._daemon.stop()

    @contextlib.contextmanager
    def _checked(self, what: str) -> Iterator[None]:
        """Go on after a check that fails: the others may tell why."""
        try:
            yield
        except (AssertionError, BrokerError) as error:
            self._fail(what, error)

    def _fail(self, what: str, error: BaseException) -> None:
        notes = "; ".join(getattr(error, "__notes__", []))
        self.failures.append(f"{what}: {type(error).__name__}: {error} {notes}"[:4000])
        self._say(f"FAILED {self.failures[-1]}")

    def _figures(self, seconds: float) -> dict[str, Any]:
        return {
            "seconds": round(seconds),
            "answers": sum(client.answers for client in self._clients),
            "answers_by_snapshotter": {
                name: sum(client.answers for client in self._of(name)) for name in self._daemon.snapshotters
            },
            "repeats": sum(client.repeats for client in self._clients),
            "kills": dict(self.kills),
            "events_followed": self._follower.sequences,
            "events_matched": self._matcher.matched,
            "gaps_healed": self._follower.gaps,
            "slow_subscriber": {"events": self._slow.events, "fell_off": self._slow.fell_off},
            "files_verified": self.files,
            "flatness": self.flat,
        }


def _kind_of(title: str) -> str:
    """What a process is, by its title."""
    if title == FORK_SERVER:
        return FORK_SERVER
    return "child" if ", " in title else "actor"
