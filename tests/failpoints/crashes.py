"""One daemon of one backend, ended at one point after the other, and everything held against the books each time.

A round: clients work, the point is armed, a process dies there; the supervisor starts the actor again. Then

- every client's acknowledged requests are there, the one in doubt whole or not at all; every token repeated gets the
  first answer and changes nothing, a call that had not happened happens now, once; files are as they were written;
- the journal has no gap and an event for each change, no other; replayed it gives what a walk shows;
- no record is without its files, nothing on disk is without a record, the trash is empty;
- the ledger tells of the committed snapshots, as they are, and of no others;
- the clients go on, and remove all they have.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Self

from backends.failpoints import ACTOR, HAND, NAMES, STRUCK, VARIABLE
from broker.snapshotter.ids import BLOCK
from broker.store.ledger import changes
from broker.store.records import decode_record, index_key
from snapbroker.contract import Kind
from snapbroker.protocol import Cleanup, Prepare, StatusAnswer, Update
from tests.daemon import support
from tests.daemon.support import queue_of, wait_until
from tests.failpoints.caller import LARGE_LABELS, Caller
from tests.failpoints.ways import Way, way_of
from tests.harness import Daemon, btrfs_filesystem
from tests.oracle import Oracle
from tests.powercut.books import Books
from tests.powercut.checks import check_directories, check_form, check_journal, events_of, happenings, walked
from tests.powercut.settling import Settling

CALLERS: Final = 3
REACH_S: Final = 30.0
"""How long a load may take to come to a point."""
EVENTS_MAX: Final = 4000
"""More than a round has."""
FILLER_CALLS: Final = 1000
OUTCOMES_BYTES: Final = 1 << 20
POLL_S: Final = 0.003
SETTINGS: Final[dict[str, Any]] = {
    "supervisor": {"backoff_initial_ms": 1, "backoff_max_ms": 1},
    "log_level": "info",
}
LIMITS: Final[dict[str, Any]] = {
    "store": {"map_initial_bytes": 1 << 18},
    "journal": {"events_max": EVENTS_MAX},
    "outcomes": {"size_max_bytes": OUTCOMES_BYTES},
    "pool": {"pool_min": 6},
    "ledger": {"flush_ms": 50, "slack_bytes": 1024},
}
"""Small ones: what grows, is dropped and is stocked again does so within a round."""
BALLAST: Final = "metadata/ballast"
BALLAST_BYTES: Final = 4 << 20


class Armory:
    """The directory that arms points."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._draft = place.with_name("draft")
        place.mkdir()

    def arm(self, name: str, action: str) -> None:
        """From here on, whoever comes there does this."""
        assert name in NAMES
        self._draft.write_text(action)
        self._draft.rename(self.place / name)

    def struck(self, name: str) -> bool:
        """Whether somebody came there."""
        return (self.place / (name + STRUCK)).exists()

    def struck_by(self, name: str) -> str:
        """Who did, where it is told."""
        try:
            return (self.place / (name + STRUCK)).read_text()
        except FileNotFoundError:
            return ""

    def clear(self) -> None:
        """Nothing is armed, nothing is marked."""
        for path in self.place.iterdir():
            path.unlink(missing_ok=True)


@contextmanager
def running(backend: str, seed: str = "", environment: dict[str, str] | None = None) -> Iterator[Crashes]:
    """A daemon to be ended at its points; the seed is random, or SNAPBROKER_SEED, where none is given."""
    seed = seed or os.environ.get("SNAPBROKER_SEED") or str(random.SystemRandom().getrandbits(32))
    with ExitStack() as undo:
        root = undo.enter_context(btrfs_filesystem()) / "root" if backend == "btrfs" else None
        yield undo.enter_context(Crashes(backend, root, seed, environment))


class Crashes(Settling):
    """A daemon with one disk snapshotter and its armory; a context manager."""

    def __init__(self, backend: str, root: Path | None, seed: str, environment: dict[str, str] | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.seed = seed
        self._section = {"backend": backend, "limits": LIMITS, **({"root": str(root)} if root else {})}
        self._environment = environment
        self._undo = ExitStack()
        self._rounds = 0

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self.daemon = Daemon({self.backend: self._section}, environment=self._environment, **SETTINGS)
            undo.callback(self.daemon.remove)
            self.armory = Armory(self.daemon.place / "armory")
            self.daemon.environment[VARIABLE] = str(self.armory.place)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.__exit__(*exception)  # type: ignore[arg-type]

    @property
    def root(self) -> Path:
        """The snapshotter's directory."""
        return self.daemon.root_of(self.backend)

    # The first start.

    def start(self) -> None:
        """Start the daemon, if it does not run, and die once at each point of a first start."""
        if self.daemon.process is not None:
            return
        names = [name for name in NAMES if way_of(name).at in ("first", "start") and not way_of(name).given]
        names = [name for name in names if name.partition(".")[0] in ("files", "environment", "ids", self.backend)]
        for name in names:
            self.armory.arm(name, f"kill {ACTOR}")
        self.daemon.start()
        missed = [name for name in names if not self.armory.struck(name)]
        assert not missed, f"{self.backend}: the first start never came to {missed}"
        assert self.daemon.actor(self.backend).restarts == len(names)
        self.armory.clear()
        self.figures["crashes"] += len(names)

    # A round.

    def round(self, name: str, process: str, hit: int = 1, then: str = "") -> None:
        """Die at a point, the `hit`th time, and check all; AssertionError, with the seed, where something is wrong.

        `then` is a point of a start, at which the next life dies too.
        """
        self.start()
        self._rounds += 1
        seed = f"{self.seed}/{name}/{process}/{hit}/{then}"
        way = way_of(name)
        try:
            self.armory.arm("recovery.finished", "note")
            callers = self._callers(seed, way)
            self._prepare(way)
            if then:
                self.armory.arm(then, f"kill {ACTOR}")
            self._crash(callers, name, process, hit, way)
            if then:
                assert self.armory.struck(then), f"the next life never came to {then}"
                self.figures["crashes"] += 1
            if way.at == "ballast":
                wait_until(lambda: (self.root / BALLAST).stat().st_size == BALLAST_BYTES, "the whole ballast")
            self._check(callers, process)
        except BaseException as error:
            error.add_note(f"SNAPBROKER_SEED={self.seed}: {seed}")
            raise
        finally:
            self.armory.clear()
        self.figures["crashes"] += 1

    def _callers(self, seed: str, way: Way) -> list[Caller]:
        with self.daemon.wire(self.backend, "checks") as wire:
            _, self.sequences[self.backend] = walked(wire, "checks")
        callers = []
        for number in range(CALLERS):
            books = Books(Oracle(self.backend, f"round-{self._rounds}-{number}", rebases=self.backend == "overlayfs"))
            self.books[books.name] = books
            callers.append(Caller(self.daemon, books.copy(), f"{seed}/{number}", large=way.large))
        return callers

    def _prepare(self, way: Way) -> None:
        if not way.before:
            return
        with self.daemon.wire(self.backend, "filler") as wire:
            self._rounds += 1
            key = f"filler-{self._rounds}"
            wire.one(Prepare(key=key))
            if way.before == "events":
                for _ in range(EVENTS_MAX // FILLER_CALLS):
                    wire.call(*[Update(name=key, labels={"n": str(number)}) for number in range(FILLER_CALLS)])
            else:
                for number in range(3):
                    wire.call(Update(name=key, labels=LARGE_LABELS), token=b"filler-%d-%d" % (self._rounds, number))
            _, self.sequences[self.backend] = walked(wire, "checks")

    def _crash(self, callers: list[Caller], name: str, process: str, hit: int, way: Way) -> None:
        victim = self.daemon.actor(self.backend).pid
        for caller in callers:
            caller.start()
        try:
            self._wait(callers, lambda: all(caller.base for caller in callers), "answers")
            given = way.given.get(self.backend) or way.given.get("")
            if given:
                self.armory.arm(given[0], given[1].format(process=process))
            away = self._take_away(callers) if way.at == "broken" else None
            if name == "recovery.finished":
                # It cannot be armed to note and to kill; the status will tell.
                (self.armory.place / name).unlink()
            self.armory.arm(name, f"kill@{hit} {process}")
            if way.at in ("start", "broken") and not given:
                os.kill(victim, signal.SIGKILL)
            if way.at == "ballast":
                (self.root / BALLAST).unlink()
            self._wait(callers, lambda: self.armory.struck(name), f"{name} in a process {process!r}")
            if given:
                (self.armory.place / given[0]).unlink(missing_ok=True)
            if away is not None:
                away[1].rename(away[0])
        finally:
            for caller in callers:
                caller.stop()
            for caller in callers:
                caller.join()
        for caller in callers:
            if caller.error is not None:
                raise caller.error
        if process == ACTOR:
            self._wait_recovered(victim)
            if away is not None:
                # This life may have looked before the files were back: the next one finds the snapshot whole again.
                victim = self.daemon.actor(self.backend).pid
                os.kill(victim, signal.SIGKILL)
                self._wait_recovered(victim)
            self._check_directories()

    def _take_away(self, callers: list[Caller]) -> tuple[Path, Path]:
        """Move the files of a snapshot away for a while."""
        name, namespace = callers[0].base, callers[0].books.oracle.namespace
        place = self.root / "snapshots" / str(support.records_of(self.daemon, self.backend)[namespace, name].id)
        return place, place.rename(self.root / f"away-{place.name}")

    def _wait(self, callers: list[Caller], condition: Callable[[], bool], what: str) -> None:
        """Wait for something while callers work."""
        give_up = time.monotonic() + REACH_S
        pace = threading.Event()
        while not condition():
            for caller in callers:
                if caller.error is not None:
                    raise caller.error
            assert time.monotonic() < give_up, f"{self.backend}: this load never came to {what}"
            pace.wait(POLL_S)

    def _wait_recovered(self, victim: int) -> None:
        """Wait until another actor serves and its recovery is finished."""

        def recovered(status: StatusAnswer) -> bool:
            (actor,) = status.snapshotters
            if actor.state != "ready" or actor.pid == victim:
                return False
            told = self.armory.struck_by("recovery.finished") == str(actor.pid)
            return told or bool(queue_of(status, self.backend, "recovery").get("finished"))

        self.daemon.wait_for(recovered)

    # What is left.

    def _check(self, callers: list[Caller], process: str) -> None:
        now = time.monotonic_ns()
        for caller in callers:
            doubtful = [step for step in caller.steps if not step.answered]
            assert len(doubtful) == int(caller.in_doubt)
            self.settle(caller, now, now, power=False)
            caller.check_nest()
            self.figures["files"] += caller.verify(lambda contents: contents.all())
            self.go_on(caller)
        # The pool's figures come once a second; after a start its ids tell what is stocked.
        if process == HAND:
            check_directories(self.daemon, self.backend)
        else:
            self._check_directories()
        wait_until(self._is_in_ledger, "the ledger has what is committed, and no more")
        with self.daemon.wire(self.backend) as wire:
            events = events_of(wire, self.sequences[self.backend])
            pictures = {caller.books.oracle.namespace: ({}, self.sequences[self.backend]) for caller in callers}
            check_journal(wire, pictures, pictures)
        for caller in callers:
            told = happenings(events, caller.books.oracle.namespace)
            assert caller.books.tell(told), f"{caller.name}: events {told}, asked for {caller.books.happened()}"
            caller.tidy()
            caller.close()
            del self.books[caller.name]

    def _check_directories(self) -> None:
        """Nothing of earlier lives is on disk but what a record has; all that a record has is there."""
        with self.daemon.wire(self.backend, "checks") as wire:
            wire.one(Cleanup())
        assert os.listdir(self.root / "trash") == []
        if self.backend == "btrfs":
            wait_until(lambda: not os.listdir(self.root / "settled"), "the last burst of deletions")
        records = support.records_of(self.daemon, self.backend)
        in_use = {record.id for record in records.values()}
        assert len(in_use) == len(records), "two snapshots have the same id"
        boundary = support.next_id_of(self.daemon, self.backend) - BLOCK
        besides = {int(name) for name in os.listdir(self.root / "snapshots")} - in_use
        assert {id_ for id_ in besides if id_ < boundary} == set(), "directories without a record"
        for (_, name), record in records.items():
            assert not record.broken, f"{name} is broken"
            check_form(self.root / "snapshots" / str(record.id), record, self.daemon.snapshotters[self.backend])

    def _is_in_ledger(self) -> bool:
        records = support.records_of(self.daemon, self.backend)
        committed = {index_key(*place): record for place, record in records.items() if record.kind is Kind.COMMITTED}
        told = dict(changes(self.root))
        return committed == {key: decode_record(value) for key, value in told.items() if value is not None}

    def finish(self) -> None:
        """After the last round: what the last life has made is accounted for too, and the daemon stops as promised."""
        if self.daemon.process is None:
            return
        self.armory.clear()
        check_directories(self.daemon, self.backend)
        self.daemon.stop()
