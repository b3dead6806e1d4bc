"""Starts actors, watches them, and restarts those that die or fall silent, each with a back-off of its own.

An actor is a process forked by this one's fork server. Its state goes

    stopped -> starting -> ready -> (died, silent, stands still) -> unavailable -> starting ...

and whoever cares is told of every change. What the actor does inside is not known here.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

import anyio
import psutil

from broker.actor.forks import Child, ForkServerProcess
from broker.actor.link import Link
from broker.actor.mailbox import SETUP
from broker.logs import get_logger
from snapbroker.protocol import ActorStatus, decoder

log = get_logger()

WATCH_S = 1.0
"""How often an actor's silence is looked at."""

FIGURES_S: Final = 0.5
"""How long what psutil says is believed: it takes a millisecond, and a flood of `status` would take all of them."""
FIGURES_MAX: Final = 1000
"""Processes whose figures are remembered."""
STACKS_SIGNAL: Final = signal.SIGUSR1
"""An actor answers it on standard error with the stacks of its threads."""
STACKS_S: Final = 0.2
"""How long it has for that."""

decode_status = decoder(ActorStatus).decode


class Limits(Protocol):
    """What of the configuration is needed here."""

    @property
    def start_timeout_ms(self) -> int: ...  # noqa: D102
    @property
    def backoff_initial_ms(self) -> int: ...  # noqa: D102
    @property
    def backoff_max_ms(self) -> int: ...  # noqa: D102
    @property
    def backoff_reset_ms(self) -> int: ...  # noqa: D102
    @property
    def silence_max_ms(self) -> int: ...  # noqa: D102
    @property
    def progress_max_ms(self) -> int: ...  # noqa: D102
    @property
    def stop_timeout_ms(self) -> int: ...  # noqa: D102


@dataclass(slots=True, frozen=True)
class Figures:
    """What psutil says of a process."""

    resident_bytes: int = 0
    cpu_seconds: float = 0.0
    open_files: int = 0


_known: dict[int, tuple[float, Figures]] = {}


def figures(pid: int) -> Figures:
    """The figures of a process, not older than FIGURES_S; zeros when it is gone."""
    moment = time.monotonic()
    known = _known.get(pid)
    if known is not None and moment - known[0] < FIGURES_S:
        return known[1]
    if len(_known) > FIGURES_MAX:
        _known.clear()
    _known[pid] = (moment, _figures(pid))
    return _known[pid][1]


def _figures(pid: int) -> Figures:
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            cpu = process.cpu_times()
            open_files = 0
            # A process with capabilities shows its descriptors to none without: it tells them itself.
            with suppress(psutil.AccessDenied):
                open_files = process.num_fds()
            return Figures(process.memory_info().rss, cpu.user + cpu.system, open_files)
    except (psutil.Error, OSError):
        return Figures()


@dataclass(eq=False)
class Actor:
    """One supervised process: how to start it, how it is, and the line to it, another one with every start.

    `run` is what the fork server calls what it runs. `setup` is the first message on the line, `on_message` gets what
    comes on it.
    """

    name: str
    run: str
    setup: bytes
    on_message: Callable[[Actor, list[bytes]], None]
    on_ready: Callable[[Actor], None]
    on_gone: Callable[[Actor], None]
    state: str = "stopped"
    restarts: int = 0
    pid: int = 0
    last_heard: float = 0.0
    retry_after_ms: int = 0
    status: ActorStatus | None = None
    process: Child | None = None
    link: Link | None = None
    heard: anyio.Event = field(default_factory=anyio.Event)
    served: bool = False
    """Whether a process of it was ever ready."""
    standing: Mapping[str, int] = field(default_factory=dict)
    """Milliseconds for which each of its vital threads has stood still, as of its last report."""

    def became_ready(self, body: bytes) -> None:
        """The process says that it serves."""
        self.report(body, {})
        self.state = "ready"
        self.served = True
        self.on_ready(self)

    def report(self, body: bytes, standing: Mapping[str, int]) -> None:
        """The process sent its figures, and which of its threads stand still."""
        self.last_heard = time.monotonic()
        self.standing = standing
        self.status = decode_status(body)
        self.heard.set()


def kill(actor: Actor) -> None:
    """Kill the actor's process, if it is still there."""
    if actor.process is not None:
        actor.process.kill()


def _lose(actor: Actor) -> None:
    """Nobody hears the actor any more, or is to: its callers are told, before its end is known."""
    actor.state = "unavailable"
    actor.on_gone(actor)


class Supervisor:
    """The actors of this broker; `run` supervises one of them until it is told to stop."""

    def __init__(self, limits: Limits, fork_server: ForkServerProcess) -> None:
        self._limits = limits
        self._fork_server = fork_server
        self.actors: dict[str, Actor] = {}
        self._stop = anyio.Event()

    def add(self, actor: Actor) -> None:
        """Take an actor under supervision."""
        self.actors[actor.name] = actor

    async def run(self, actor: Actor) -> None:
        """Start the actor and restart it whenever it dies, until `stop`."""
        pause = self._limits.backoff_initial_ms
        while not self._is_stopping():
            started = time.monotonic()
            await self._live(actor)
            if self._is_stopping():
                break
            if (time.monotonic() - started) * 1000 > self._limits.backoff_reset_ms:
                pause = self._limits.backoff_initial_ms
            actor.restarts += 1
            actor.retry_after_ms = pause
            log.warning("an actor is restarted", actor=actor.name, pause_ms=pause, restarts=actor.restarts)
            with anyio.move_on_after(pause / 1000):
                await self._stop.wait()
            pause = min(2 * pause, self._limits.backoff_max_ms)
        actor.state = "stopped"

    async def _live(self, actor: Actor) -> None:
        """One life of the process, from its start to its end."""
        actor.state = "starting"
        actor.heard = anyio.Event()
        actor.standing = {}
        actor.last_heard = time.monotonic()
        try:
            ours, theirs = socket.socketpair()
            actor.link = Link(ours)
            with theirs:
                process = await self._fork_server.start(
                    actor.run, int(actor.served), theirs.fileno(), timeout_s=self._limits.start_timeout_ms / 1000
                )
        except OSError as error:
            log.error("an actor cannot be started", actor=actor.name, error=str(error))
            actor.state = "unavailable"
            if actor.link is not None:
                actor.link.close()
            return
        line_ended = anyio.Event()
        actor.link.listen(lambda frames: actor.on_message(actor, frames), line_ended.set)
        actor.link.send((SETUP, actor.setup))
        actor.pid, actor.process = process.pid, process
        if self._is_stopping():
            kill(actor)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch, actor, process)
                tasks.start_soon(self._listen_for_end, actor, line_ended)
                await anyio.wait_readable(process.line)
                tasks.cancel_scope.cancel()
            status = process.wait()
            if not self._is_stopping():
                log.error("an actor died", actor=actor.name, pid=actor.pid, exit_status=status)
        finally:
            process.kill()
            actor.pid = 0
            _lose(actor)
            actor.link.close()

    @staticmethod
    async def _listen_for_end(actor: Actor, line_ended: anyio.Event) -> None:
        """The line ends with its process, and that is known at once, where its end has to be told by another one."""
        await line_ended.wait()
        _lose(actor)

    async def _watch(self, actor: Actor, process: Child) -> None:
        """Kill the process when it does not get ready, or falls silent."""
        with anyio.move_on_after(self._limits.start_timeout_ms / 1000) as starting:
            await actor.heard.wait()
        if starting.cancelled_caught:
            log.error("an actor did not get ready in time", actor=actor.name)
            await self._give_up(actor, process)
            return
        silence_max = self._limits.silence_max_ms / 1000
        while True:
            asleep = time.monotonic()
            await anyio.sleep(WATCH_S)
            if time.monotonic() - asleep > 2 * WATCH_S + 1:
                # This process was frozen too, or the whole machine: nobody could report.
                actor.last_heard = time.monotonic()
            silent = time.monotonic() - actor.last_heard
            if silent > silence_max:
                log.error("an actor is silent and is killed", actor=actor.name, silent_s=round(silent, 1))
                await self._give_up(actor, process)
                return
            thread, standing = max(actor.standing.items(), key=lambda item: item[1], default=("", 0))
            if standing > self._limits.progress_max_ms:
                log.error(
                    "an actor stands still and is killed", actor=actor.name, thread=thread, seconds=standing // 1000
                )
                await self._give_up(actor, process)
                return

    @staticmethod
    async def _give_up(actor: Actor, process: Child) -> None:
        """Let the process write where its threads are, tell its callers, and kill it.

        Whoever waits for it is told before its end: a thread that waits for a disk in the kernel keeps a killed
        process for as long as that takes, and its successor waits for the end, since the root is its.
        """
        process.send_signal(STACKS_SIGNAL)
        await anyio.sleep(STACKS_S)
        _lose(actor)
        if actor.link is not None:
            actor.link.close()
        process.kill()

    def _is_stopping(self) -> bool:
        return self._stop.is_set()

    def stopping(self) -> None:
        """Restart nothing from here on; an actor that is still starting has accepted nothing and is ended."""
        self._stop.set()
        for actor in self.actors.values():
            if actor.state == "starting":
                kill(actor)

    async def close(self) -> None:
        """Let the fork server end, when no actor is there any more."""
        await self._fork_server.close()

    async def kill_late(self) -> None:
        """Kill what has not ended in time after a stop."""
        await anyio.sleep(self._limits.stop_timeout_ms / 1000)
        for actor in self.actors.values():
            if actor.pid:
                log.error("an actor did not stop in time and is killed", actor=actor.name)
                kill(actor)
            elif actor.state == "starting":
                # It waits for its birth.
                self._fork_server.kill()

    def statuses(self) -> tuple[ActorStatus, ...]:
        """Every actor's figures, with what psutil says."""
        return tuple(self._status(actor) for actor in self.actors.values())

    @staticmethod
    def _status(actor: Actor) -> ActorStatus:
        reported = actor.status or ActorStatus(name=actor.name, backend="", state=actor.state)
        seen = figures(actor.pid) if actor.pid else Figures()
        return ActorStatus(
            name=actor.name,
            backend=reported.backend,
            state=actor.state,
            pid=actor.pid,
            restarts=actor.restarts,
            resident_bytes=seen.resident_bytes,
            cpu_seconds=seen.cpu_seconds,
            open_files=seen.open_files or reported.open_files,
            sequence=reported.sequence,
            snapshots=reported.snapshots,
            capabilities=reported.capabilities,
            root=reported.root,
            queues=reported.queues,
            backlog=reported.backlog,
        )
