"""One snapshotter put together: store, backend, writer, pool, trash, recovery and service, and their threads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import msgspec

from backends import registry
from backends.api import Backend, Copying, Pooled
from broker.actor.fairness import Mix
from broker.actor.forks import Forks
from broker.lock import lock_directory
from broker.logs import get_logger
from broker.snapshotter import ground
from broker.snapshotter.audits import Audits, OnlineAccess
from broker.snapshotter.crew import Crew
from broker.snapshotter.hands import IDLE_S, Hand, Place
from broker.snapshotter.ids import Ids
from broker.snapshotter.limits import SnapshotterLimits
from broker.snapshotter.operations import Delivery
from broker.snapshotter.pool import Pool
from broker.snapshotter.reader import Reader
from broker.snapshotter.recovery import Recovery
from broker.snapshotter.service import Send, Service
from broker.snapshotter.space import Ballast, Space
from broker.snapshotter.trash import Trash
from broker.snapshotter.verbs import Verbs
from broker.snapshotter.watch import Watch
from broker.snapshotter.writer import Writer
from broker.store import Environment, Inspection, Journal, Ledger, Outcomes, Snapshots
from broker.store.environment import DATABASE
from broker.store.ledger import check_not_lost, check_not_older, last_word
from snapbroker.protocol import ActorStatus, encode

log = get_logger()

SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep the interpreter from the loop: reads are answered while the writer computes."""


DELETER_NICENESS = 10
"""Deleting gets what nobody else wants of the processors."""
COPIER_NICENESS = 10
"""Copying yields to answering."""


ACTOR: Final = "actor"
"""What the fork server calls the process of a snapshotter."""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What an actor's process is told at its start."""

    name: str
    backend: str
    root: str
    metadata: str
    options: dict[str, Any] = {}
    limits: SnapshotterLimits = SnapshotterLimits()
    log_level: str = "info"
    log_format: str = "json"


class SnapshotterActor:
    """The actor; `run` serves until `stop` was called and everything accepted is finished."""

    def __init__(
        self,
        setup: Setup,
        forks: Forks,
        send: Send,
        publish: Callable[[list[tuple[str, int, bytes]]], None],
        aside: Callable[[bytes, bytes], None],
        together: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        opened: Callable[[Backend], None] = lambda _backend: None,
        *,
        again: bool,
    ) -> None:
        """`again`: an earlier process of the same daemon has served."""
        self._setup = setup
        self._send = send
        self._publish = publish
        self._aside = aside
        self._together = together
        self._stop = anyio.Event()
        limits = setup.limits
        root = Path(setup.root)
        if again:
            ground.require(Path(setup.metadata) / DATABASE)
        self._lock = lock_directory(root, "root")
        places = (root, Path(setup.metadata))
        self._ballast = Ballast(places, limits.space.ballast_bytes)
        self._ballast.let_go_if_needed()
        backend_type = registry.load(setup.backend)
        self.backend = backend_type.open(root, msgspec.convert(setup.options, backend_type.Options))
        check_not_lost(root, Path(setup.metadata))
        opened(self.backend)
        self._environment = Environment(Path(setup.metadata), limits.store)
        check_not_older(root, self._environment)
        self._ground = ground.Ground(root, self._environment.file)
        self._outcomes = Outcomes(self._environment, limits.outcomes)
        self._ledger = Ledger(root, self._environment, limits.ledger)
        snapshots = Snapshots(self._environment, writes=True, note=self._ledger.note)
        self._journal = Journal(self._environment, setup.name, limits.journal)
        ids = Ids(self._environment, snapshots)

        def hand(name: str, niceness: int) -> Hand:
            title = f"{setup.name}, {name}"
            place = Place(title, setup.backend, setup.root, setup.options, limits.space)
            return Hand(place, niceness, self._lock, forks)

        self._deleter = hand("deleter", DELETER_NICENESS)
        mix = self._mix = Mix()
        self._pool: Pool | None = None
        self._stockers: dict[str, Hand] = {}
        if isinstance(self.backend, Pooled) and limits.pool.pool_min:
            self._pool = Pool(ids, lambda id_: self._trash.discard(id_, None), limits.pool, mix)
            self._stockers = {name: hand(name, 0) for name in self._pool.threads}
        self._hands = [*self._stockers.values(), self._deleter]
        self._crew: Crew | None = None
        self._trash = Trash(self.backend, self._deleter, IDLE_S)
        if isinstance(self.backend, Copying):
            size = limits.hands or self.backend.hands
            copiers = [hand(f"copier-{number}", COPIER_NICENESS) for number in range(size)]
            self._crew = Crew(self.backend, lambda id_: self._trash.discard(id_, None), copiers)
        layers_max = min(limits.layers_max, getattr(self.backend, "layers_max", limits.layers_max))
        self._space = Space(places, limits.space)
        self._ballast = Ballast(places, limits.space.ballast_bytes)
        verbs = Verbs(self.backend, snapshots, ids, self._pool, self._trash, self._space, layers_max)
        self._deliver: Callable[[Delivery], None] = lambda _delivery: None
        self._writer = Writer(
            self._environment,
            self._journal,
            self._outcomes,
            snapshots,
            verbs,
            ids,
            self._pool,
            self._crew,
            self.backend,
            limits.writer,
            lambda delivery: self._deliver(delivery),
            mix,
        )
        # The loop's thread reads with a Snapshots of its own: its cache of chains is not shared with the writer.
        self._reader = Reader(self._environment, Snapshots(self._environment), self._journal, self.backend)
        with self._environment.read() as txn:
            kept = Inspection(self._environment).kept(txn)
        self._recovery = Recovery(self.backend, snapshots, self._writer, self._trash, ids.boundary, kept)
        self._access = OnlineAccess(
            setup.name,
            root,
            Path(setup.metadata),
            self._environment,
            self.backend,
            self._writer,
            self._pool,
            self._trash,
            self._recovery,
        )
        verbs.touched = self._touched
        self._ledger_thread = threading.Thread(
            target=vital, args=("ledger", self._ledger.run), name="ledger", daemon=True
        )
        self._tending = False
        self._watch = Watch(limits.still_told_ms)
        self.vital: dict[str, int] = {}
        """Milliseconds for which each thread that the actor cannot do without stood still at the last report."""
        self.service: Service | None = None

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve; `ready` is called once requests can come."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        async with anyio.create_task_group() as tasks:
            async with anyio.create_task_group() as streams:
                limits = self._setup.limits.service
                audits = Audits(
                    self._access,
                    self._writer,
                    lambda key: last_word(Path(self._setup.root), key),
                    limits.progress_interval_ms / 1000,
                    limits.audits_max,
                )
                self.service = service = Service(
                    self._setup.name,
                    self._send,
                    self._reader,
                    self._writer,
                    self._trash,
                    streams,
                    self.backend.sync_remove,
                    limits,
                    self._publish,
                    audits,
                    self._aside,
                    self._mix,
                )
                self._deliver = thread_safe(self._deliver_together)
                tasks.start_soon(anyio.to_thread.run_sync, vital, "writer", self._writer.run)
                tasks.start_soon(anyio.to_thread.run_sync, vital, "trash", self._trash.run)
                self._ledger_thread.start()
                if self._pool is not None:
                    for number, (name, stocker) in enumerate(self._stockers.items()):
                        stock = partial(self._pool.run, stocker, helps=number > 0)
                        tasks.start_soon(anyio.to_thread.run_sync, vital, name, stock)
                streams.start_soon(service.tell_progress)
                self._recovery.begin()
                ready()
                await self._stop.wait()
                self._recovery.stop()
                self._access.stop()
                await service.stop()
                streams.cancel_scope.cancel()
            self._writer.stop()
            self._trash.stop()
            if self._pool is not None:
                self._pool.stop()
            for hand in self._hands:
                hand.close()
            if self._crew is not None:
                self._crew.close()
        for hand in self._hands:
            hand.let_go()
        if self._crew is not None:
            self._crew.wait()
        # Behind the writer's last transaction.
        self._ledger.stop()
        self._ledger_thread.join()
        self.backend.close()
        self._environment.close()
        self._ground.close()
        os.close(self._lock)

    def _deliver_together(self, delivery: Delivery) -> None:
        """Every system call of the loop is a moment in which the writer takes the interpreter: one for all replies."""
        if self.service is not None:
            with self._together():
                self.service.deliver(delivery)

    def _touched(self, id_: int) -> None:
        """A commit has touched an id: who looks at disk and records beside the writer must not judge it."""
        self._recovery.see(id_)
        self._access.see(id_)

    def stop(self) -> None:
        """Finish what was accepted, then end `run`."""
        self._stop.set()

    def report(self) -> bytes:
        """The figures for `status`, encoded; the rhythm of its calls is also that of small chores."""
        if self._ground.lost():
            os._exit(1)
        if self._crew is not None:
            self._crew.rest()
        if not self._tending:
            self._tending = True
            try:
                self._writer.submit_work(self._tend)
            except RuntimeError:
                # No thread is to be had at the end of a stop, or at the limit of the process: the next report tries.
                self._tending = False
        queues = {**self._writer.statistics(), "recovery": self._recovery.statistics(), "watch": self._look()}
        if self.service is not None:
            queues.update(self.service.statistics())
        if self._pool is not None:
            # What waits for it is in the workers' hands, as far as their limit is concerned.
            queues["pool"] = {**self._pool.statistics(), "waiting_limit": self._setup.limits.writer.working_max}
        with self._environment.read() as txn:
            queues["outcomes"] = self._outcomes.statistics(txn)
        queues["ledger"] = self._ledger.statistics()
        queues["space"] = self._space.statistics()
        queues["store"] = self._environment.statistics()
        return encode(
            ActorStatus(
                name=self._setup.name,
                backend=self._setup.backend,
                state="ready",
                pid=os.getpid(),
                open_files=len(os.listdir("/proc/self/fd")),
                sequence=self._reader.newest(),
                snapshots=self._reader.count(),
                capabilities=tuple(sorted(self.backend.capabilities)),
                root=self._setup.root,
                queues=queues,
                backlog=self._trash.backlog(),
            )
        )

    def _tend(self) -> None:
        """Look after the ballast, in a worker: a disk that hangs must not keep the loop."""
        with contextlib.suppress(OSError):
            # One that fails is told by the calls that need it.
            self._ballast.tend(self._setup.limits.space.reserve_bytes)
        self._tending = False

    def _look(self) -> dict[str, int]:
        """How long the threads, and what the backend is at work on, stand still."""
        stocking = self._pool.marks() if self._pool is not None else {}
        vital = {"writer": self._writer.mark(), **stocking}
        standing = self._watch.look({**vital, "trash": self._trash.mark(), **self._writer.works()})
        self.vital = {name: standing.pop(name) for name in vital}
        return {
            "writer_ms": self.vital["writer"],
            "pool_ms": max((self.vital[name] for name in stocking), default=0),
            "trash_ms": standing.pop("trash"),
            "work_ms": max(standing.values(), default=0),
            "told_ms": self._setup.limits.still_told_ms,
        }


def vital(name: str, body: Callable[[], None]) -> None:
    """Run the body of a thread that the actor cannot live without; when it fails the process ends.

    Half an actor would leave its callers waiting for ever; a whole new one is there in a moment, and nothing
    acknowledged is lost.
    """
    threading.current_thread().name = name
    try:
        body()
    except BaseException:
        log.exception("a vital thread failed, the actor ends")
        os._exit(1)


def thread_safe(call: Callable[[Delivery], None]) -> Callable[[Delivery], None]:
    """`call` on the running loop, from any thread."""
    soon = asyncio.get_running_loop().call_soon_threadsafe

    def deliver(delivery: Delivery) -> None:
        soon(call, delivery)

    return deliver
