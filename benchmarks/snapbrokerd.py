"""Our side: the daemon with one snapshotter, with the limits it is shipped with, on a root of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

import snapbroker
from benchmarks import scratch, services
from snapbroker.errors import BrokerError
from snapbroker.protocol import ActorStatus

NAMESPACE = "bench"
START_SECONDS = 30.0
"""How long the daemon may take until its snapshotter is ready."""
CALL_SECONDS = 1800.0
"""How long one call may take: a native snapshot of gigabytes is copied inside its prepare."""
POLL_SECONDS = 0.02
REPORT_SECONDS = 1.2
"""An actor tells its figures every second."""

CONFIGURATION = """\
root = "{home}/root"
runtime = "{home}"
log_level = "warning"

[snapshotters.{backend}]
root = "{place}"
"""


class Snapbrokerd:
    """Starts the daemon of this environment."""

    name = services.OURS

    def __init__(self) -> None:
        self._daemon = str(Path(sys.executable).with_name("snapbrokerd"))
        scratch.require(self._daemon)

    @contextlib.contextmanager
    def start(self, backend: str, place: Path) -> Iterator[services.Service]:
        """Run the daemon with the snapshotter's root, its database included, under `place`."""
        with contextlib.ExitStack() as stack:
            home = stack.enter_context(scratch.directory("snapbroker-bench-daemon"))
            configuration = home / "config.toml"
            configuration.write_text(CONFIGURATION.format(home=home, backend=backend, place=place / backend))
            log = stack.enter_context((home / "log").open("wb"))
            process = stack.enter_context(scratch.process([self._daemon, "--config", str(configuration)], log))
            endpoint, events = f"ipc://{home}/router.sock", f"ipc://{home}/events.sock"
            broker = stack.enter_context(
                snapbroker.connect(endpoint, namespace=NAMESPACE, snapshotter=backend, timeout=CALL_SECONDS)
            )
            try:
                _ready(process, broker, backend)
            except RuntimeError as error:
                raise RuntimeError(f"{error}:\n{(home / 'log').read_text()[-2000:]}") from None
            yield Running(broker, endpoint, events, backend, process.pid)


def _ready(process: subprocess.Popen[bytes], broker: snapbroker.Broker, backend: str) -> None:
    """Wait until the snapshotter takes calls."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"snapbrokerd ended with status {process.returncode}")
        with contextlib.suppress(BrokerError):
            if _actor(broker, backend).state == "ready":
                return
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"snapbrokerd's {backend} is not ready after {START_SECONDS:g} s")


def _actor(broker: snapbroker.Broker, backend: str) -> ActorStatus:
    return next(actor for actor in broker.status().snapshotters if actor.name == backend)


class Calls:
    """Single blocking calls."""

    def __init__(self, broker: snapbroker.Broker) -> None:
        self._broker = broker

    def prepare(self, key: str, parent: str = "") -> Sequence[services.MountPoint]:
        mounts = self._broker.prepare(key, parent)
        return [services.MountPoint(mount.type, mount.source, tuple(mount.options)) for mount in mounts]

    def commit(self, name: str, key: str) -> None:
        self._broker.commit(name, key)

    def remove(self, key: str) -> None:
        self._broker.remove(key)


class Running:
    """A daemon whose snapshotter is ready."""

    side = services.OURS

    def __init__(self, broker: snapbroker.Broker, endpoint: str, events: str, backend: str, pid: int) -> None:
        self._broker, self.endpoint, self._events, self._backend, self._pid = broker, endpoint, events, backend, pid
        self.calls = Calls(broker)

    def command(self, operation: str, **options: object) -> list[str]:
        named = {
            "address": self.endpoint, "events": self._events, "namespace": NAMESPACE,
            "snapshotter": self._backend, "operation": operation,
        }  # fmt: skip
        return [sys.executable, "-m", "benchmarks.callers.ours", *services.flags({**named, **options})]

    def place(self) -> dict[str, str]:
        """Where clients find it, as the options of their `bench`."""
        return {
            "endpoint": self.endpoint, "events-endpoint": self._events, "snapshotter": self._backend,
            "namespace": NAMESPACE,
        }  # fmt: skip

    def blocking_command(self, key: str, seconds: float) -> list[str]:
        return [
            sys.executable, "-m", "benchmarks.callers.ours_blocking", self.endpoint, NAMESPACE, self._backend,
            key, str(seconds),
        ]  # fmt: skip

    def settle(self) -> None:
        """Deleted is what was removed, and stocked what was taken: the child processes have nothing to do."""
        self._broker.cleanup()
        deadline = time.monotonic() + START_SECONDS
        # The figures are a second old at most; the first ones may be of the time before.
        begun = time.monotonic()
        while time.monotonic() < deadline:
            pool = _actor(self._broker, self._backend).queues.get("pool")
            rested = pool is None or pool["ready"] >= pool["aim"]
            if rested and time.monotonic() - begun > REPORT_SECONDS:
                return
            time.sleep(POLL_SECONDS)
        raise RuntimeError(f"the pool of {self._backend} is not stocked after {START_SECONDS:g} s")

    def resident(self) -> dict[str, int]:
        daemon = psutil.Process(self._pid)
        actor = _actor(self._broker, self._backend).pid
        processes = {child.pid: child for child in daemon.children(recursive=True)}
        (fork_server,) = daemon.children()
        named = {
            "broker": daemon,
            f"actor {self._backend}": processes.pop(actor),
            "fork server": processes.pop(fork_server.pid),
        }
        resident = {name: process.memory_info().rss for name, process in named.items()}
        # The processes that delete and copy come and go with the work; together they are one row.
        return resident | {"helpers": sum(process.memory_info().rss for process in processes.values())}
