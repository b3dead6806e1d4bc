"""The composition root: the one file that knows router, publisher, supervisor and snapshotters together."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
import msgspec
import zmq

from backends import registry
from broker import loop, places, privileges
from broker.access import Grant, local_grant
from broker.actor.forks import ForkServerProcess
from broker.actor.supervisor import Actor, Supervisor, figures
from broker.audience import Audience
from broker.config import Config, SnapshotterSection
from broker.gate import Gate
from broker.keys import Entry, Keyring
from broker.lock import lock_directory
from broker.logs import get_logger
from broker.publisher import Publisher
from broker.router import Router
from broker.snapshotter.actor import ACTOR, Setup
from broker.snapshotter.space import Ballast
from broker.systemd import keep_watchdog, notify
from snapbroker.errors import BrokerError, FailedPrecondition, Unimplemented
from snapbroker.protocol import ActorStatus, Outcome, Reply, Status, StatusAnswer, decode_request, encode, fault

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.api import Support

log = get_logger()

ACTORS_MODULE: Final = "broker.snapshotter"
STARTING: Final = frozenset(("chown", "dac_override", "fowner", "fsetid", "setpcap", "sys_admin", "net_bind_service"))
"""Capabilities for a start: making directories, giving sockets away, trying mounts, dropping the others."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What was found of one snapshotter before the start."""

    name: str
    backend: str
    root: str
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    section: SnapshotterSection = SnapshotterSection()

    @property
    def ok(self) -> bool:
        """Whether it can be started."""
        return not self.missing


def examine(config: Config) -> list[Finding]:
    """Every configured snapshotter, or every installed backend, with what this machine lacks for it."""
    sections = config.snapshotters or {
        name: SnapshotterSection() for name in sorted(registry.available().backends) if name != "memory"
    }
    return [_examine(config, name, section) for name, section in sections.items()]


def _examine(config: Config, name: str, section: SnapshotterSection) -> Finding:
    backend = section.backend or name
    root = Path(section.root or config.root_path / name)
    database = Path(section.metadata or root / "metadata")
    Ballast((root, database), section.limits.space.ballast_bytes).let_go_if_needed()
    found: Support | None = None
    missing: tuple[str, ...] = ()
    try:
        kind = registry.load(backend)
        options = msgspec.convert(section.options, kind.Options)
        found = kind.probe(root, options)
    except BrokerError as error:
        missing = (error.message,)
    except OSError as error:
        missing = (f"{error.strerror}: {error.filename}",)
    return Finding(
        name=name,
        backend=backend,
        root=str(root),
        missing=found.missing if found else missing,
        notes=found.notes if found else (),
        section=section,
    )


class Server:
    """One broker process."""

    def __init__(self, config: Config, findings: Sequence[Finding]) -> None:
        self._config = config
        self._encoded_statuses: dict[tuple[Grant | None, bool], bytes] = {}
        self._started = time.monotonic()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, 4096)
        with privileges.lowered():
            # libzmq's threads start with its first socket, and keep the capabilities that they are born with.
            self._context.socket(zmq.PAIR).close()
        runtime = config.runtime_path
        self._lock = lock_directory(runtime, "--runtime", mode=0o755)
        places.check_runtime(runtime)
        for finding in findings:
            os.close(lock_directory(Path(finding.root), "--root"))
        for endpoint in (config.router_endpoint, config.publisher_endpoint):
            refuse_taken(endpoint)
        owner, group = places.user_id(config.socket_owner), places.group_id(config.socket_group)
        rights = (owner, group, config.socket_mode)
        try:
            self._publisher = places.bind_local(
                lambda: Publisher(self._context, config.publisher_endpoint, config.publisher),
                config.publisher_endpoint,
                *rights,
            )
            self._router = places.bind_local(
                lambda: Router(
                    self._context,
                    config.router_endpoint,
                    config.router,
                    self._own,
                    self._publisher.publish,
                    local_grant(config.socket_role),
                ),
                config.router_endpoint,
                *rights,
            )
        except zmq.ZMQError as error:
            raise FailedPrecondition(
                f"cannot bind {config.router_endpoint} and {config.publisher_endpoint}: {error.strerror}: "
                "choose another --runtime or other endpoints"
            ) from None
        self._gate: Gate | None = None
        if config.tcp.endpoint:
            self._gate = self._open_remote([finding.name for finding in findings])
        self._supervisor = Supervisor(config.supervisor, ForkServerProcess(ACTORS_MODULE))
        self._unsettled = {finding.name for finding in findings}
        self._told_ready = False
        for finding in findings:
            self._add(finding)

    def _open_remote(self, snapshotters: Sequence[str]) -> Gate:
        """The second pair of sockets, for those with keys."""
        config = self._config
        gate = Gate(self._context, Keyring(config.keys_path, config.tcp.reread_ms), config.tcp)
        try:
            self._publisher.remote = Audience(
                self._context, config.tcp.events_endpoint, gate, snapshotters, config.publisher.send_queue_max
            )
            self._router.open_remote(self._context, config.tcp.endpoint, gate)
        except zmq.ZMQError as error:
            raise FailedPrecondition(
                f"cannot bind {config.tcp.endpoint} and {config.tcp.events_endpoint}: {error.strerror}: choose other "
                "endpoints in [tcp]"
            ) from None
        return gate

    def _keys_changed(self, before: Mapping[str, Entry], after: Mapping[str, Entry]) -> None:
        log.info("the keys have changed", keys=len(after))
        self._router.regrant(before, after)
        if self._publisher.remote is not None:
            self._publisher.remote.changed(before, after)

    def _add(self, finding: Finding) -> None:
        section = finding.section

        setup = Setup(
            name=finding.name,
            backend=finding.backend,
            root=finding.root,
            metadata=section.metadata or f"{finding.root}/metadata",
            options=section.options,
            limits=section.limits,
            log_level=self._config.log_level,
            log_format=self._config.log_format,
        )
        actor = Actor(
            finding.name,
            ACTOR,
            msgspec.json.encode(setup),
            self._router.from_actor,
            self._ready,
            self._gone,
        )
        self._supervisor.add(actor)
        self._router.add(actor)

    def _ready(self, actor: Actor) -> None:
        newest = actor.status.sequence if actor.status else 0
        self._publisher.started(actor.name, newest)
        log.info("a snapshotter is ready", snapshotter=actor.name, pid=actor.pid, sequence=newest)
        self._settle(actor)

    def _gone(self, actor: Actor) -> None:
        self._router.gone(actor)
        self._settle(actor)

    def _settle(self, actor: Actor) -> None:
        """Tell the service manager once every snapshotter served or failed: one that cannot holds up no other."""
        self._unsettled.discard(actor.name)
        if not self._unsettled and not self._told_ready:
            self._told_ready = any(other.state == "ready" for other in self._supervisor.actors.values())
            if self._told_ready:
                loop.settle()
                notify("READY=1")

    def _own(self, body: bytes, grant: Grant | None, remote: bool) -> bytes:
        """Answer a request to the broker itself."""
        try:
            request = decode_request(body)
            answer = msgspec.Raw(self._status_of_turn(grant, remote=remote))
            outcomes = tuple(
                Outcome(call=index, ok=answer)
                if isinstance(call, Status)
                else Outcome(
                    call=index,
                    error=fault(Unimplemented("the broker itself only knows status: name a snapshotter")),
                )
                for index, call in enumerate(request.calls)
            )
            return encode(Reply(outcomes=outcomes))
        except BrokerError as error:
            return encode(Reply(error=fault(error)))

    def _status_of_turn(self, grant: Grant | None, *, remote: bool) -> bytes:
        """The encoded status, gathered once in a turn of the loop: a flood of questions takes no more of it."""
        asked = (grant, remote)
        encoded = self._encoded_statuses.get(asked)
        if encoded is None:
            if not self._encoded_statuses:
                asyncio.get_running_loop().call_soon(self._encoded_statuses.clear)
            status = self.status(remote=remote)
            encoded = encode(status if grant is None or grant.whole else _shown_to(grant, status))
            self._encoded_statuses[asked] = encoded
        return encoded

    def status(self, *, remote: bool = False) -> StatusAnswer:
        """The broker's and every snapshotter's figures; the endpoints are those of the same pair of sockets."""
        queues = {**self._router.statistics(), "publisher": self._publisher.statistics()}
        endpoints = (self._router.endpoint, self._publisher.endpoint)
        if self._gate is not None and self._publisher.remote is not None:
            queues["access"] = self._gate.statistics()
            queues["publisher.remote"] = self._publisher.remote.statistics()
            if remote:
                endpoints = (self._router.remote_endpoint, self._publisher.remote.endpoint)
        return StatusAnswer(
            version=version(),
            pid=os.getpid(),
            uptime_seconds=time.monotonic() - self._started,
            resident_bytes=figures(os.getpid()).resident_bytes,
            endpoint=endpoints[0],
            events_endpoint=endpoints[1],
            queues=queues,
            snapshotters=self._supervisor.statuses(),
        )

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then finish what was accepted."""
        log.info(
            "serving",
            endpoint=self._router.endpoint,
            events=self._publisher.endpoint,
            snapshotters=list(self._supervisor.actors),
            remote=self._router.remote_endpoint,
        )
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._router.front.run)
                tasks.start_soon(self._publisher.port.run)
                tasks.start_soon(self._publisher.beat)
                if self._gate is not None and self._router.remote is not None and self._publisher.remote is not None:
                    tasks.start_soon(self._gate.port.run)
                    tasks.start_soon(self._router.remote.run)
                    tasks.start_soon(self._publisher.remote.run)
                    tasks.start_soon(self._gate.watch, self._keys_changed)
                tasks.start_soon(keep_watchdog)
                await self._supervise()
                tasks.cancel_scope.cancel()
        finally:
            self._close()

    async def _supervise(self) -> None:
        """Run the actors until a signal, then see them off; a further signal changes nothing."""
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with anyio.create_task_group() as late:
                async with anyio.create_task_group() as actors:
                    for actor in self._supervisor.actors.values():
                        actors.start_soon(self._supervisor.run, actor)
                    async for signum in signals:
                        log.info("stopping", signal=signal.Signals(signum).name)
                        break
                    notify("STOPPING=1")
                    self._supervisor.stopping()
                    self._router.stop()
                    late.start_soon(self._supervisor.kill_late)
                late.cancel_scope.cancel()
        await self._supervisor.close()

    def _close(self) -> None:
        """Let go of sockets and places."""
        self._router.front.close()
        self._publisher.port.close()
        if self._gate is not None and self._router.remote is not None and self._publisher.remote is not None:
            self._router.remote.close()
            self._publisher.remote.close()
            self._gate.port.close()
        self._context.term()
        for path in (self._config.router_endpoint, self._config.publisher_endpoint):
            if path.startswith("ipc://"):
                Path(path.removeprefix("ipc://")).unlink(missing_ok=True)
        os.close(self._lock)
        log.info("stopped")


def _shown_to(grant: Grant, status: StatusAnswer) -> StatusAnswer:
    """Of the status what tells nothing of other namespaces and snapshotters."""
    return StatusAnswer(
        version=status.version,
        pid=0,
        uptime_seconds=0.0,
        resident_bytes=0,
        endpoint=status.endpoint,
        events_endpoint=status.events_endpoint,
        snapshotters=tuple(
            ActorStatus(name=one.name, backend=one.backend, state=one.state, capabilities=one.capabilities)
            for one in status.snapshotters
            if grant.reaches(one.name)
        ),
    )


def privileges_of(findings: Sequence[Finding]) -> frozenset[str]:
    """The capabilities that the actors need: for opening their backends, and after it."""
    return STARTING.union(*(privileges.kept_by(registry.load(finding.backend)) for finding in findings))


def refuse_taken(endpoint: str) -> None:
    """FailedPrecondition when an ipc endpoint's path is somebody else's: a bind would silently take it away."""
    if not endpoint.startswith("ipc://"):
        return
    path = Path(endpoint.removeprefix("ipc://"))
    try:
        is_socket = path.is_socket() or not path.exists()
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be used: {error.strerror}: choose another endpoint") from None
    if not is_socket:
        raise FailedPrecondition(f"{path} exists and is no socket: choose another endpoint")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return
    raise FailedPrecondition(f"a broker already serves {path}: stop it, or give this one another endpoint")


def version() -> str:
    """The daemon's version."""
    return metadata.version("snapbrokerd")
