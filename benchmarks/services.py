"""What a workload needs of either side, so that it is written once: a running service, its callers, its memory."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks import scratch

PEER = "containerd"
OURS = "snapbroker"

LOAD_SECONDS_MAX = 1800.0
"""How long one program of callers may take before the benchmark gives up on it."""


@dataclass(frozen=True)
class Sample:
    """One run of one load: calls a second, and latencies in milliseconds."""

    rate: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    operations: int
    seconds: float
    delivery_rate: float = 0.0
    lost: int = 0

    @classmethod
    def of(cls, document: str) -> Sample:
        """The sample in the JSON document that a program of callers printed."""
        fields = json.loads(document)
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__ if name in fields})


@dataclass(frozen=True)
class MountPoint:
    """A mount as either side answers it."""

    type: str
    source: str
    options: tuple[str, ...]


class Calls(Protocol):
    """Single blocking calls from Python, for what surrounds a measurement."""

    def prepare(self, key: str, parent: str = "") -> Sequence[MountPoint]: ...

    def commit(self, name: str, key: str) -> None: ...

    def remove(self, key: str) -> None: ...


class Service(Protocol):
    """A daemon that runs with an empty store of its own."""

    side: str

    @property
    def calls(self) -> Calls:
        """Single calls to it."""
        ...

    def command(self, operation: str, **options: object) -> list[str]:
        """The program of callers with its arguments; the options are named alike on both sides."""
        ...

    def blocking_command(self, key: str, seconds: float) -> list[str]:
        """A program with one blocking Python caller that asks for the stat of `key` again and again."""
        ...

    def settle(self) -> None:
        """Wait until everything removed so far is deleted from disk."""
        ...

    def resident(self) -> dict[str, int]:
        """Resident bytes of each process of the service."""
        ...


class Side(Protocol):
    """Something that can be started on an empty directory."""

    name: str

    def start(self, backend: str, place: Path) -> AbstractContextManager[Service]:
        """Run the service with `backend`, its snapshots under `place`."""
        ...


def load(service: Service, operation: str, **options: object) -> Sample:
    """Run a program of callers to its end."""
    command = service.command(operation, **options)
    return Sample.of(scratch.run(command, timeout=LOAD_SECONDS_MAX))


def blocking(service: Service, key: str, seconds: float) -> Sample:
    """Run one blocking Python caller to its end."""
    return Sample.of(scratch.run(service.blocking_command(key, seconds)))


def load_during(
    service: Service, work: Callable[[], object], operation: str, **options: object
) -> tuple[Sample, float]:
    """The load that callers see while `work` runs, and how many seconds it took.

    The work begins when the callers say that they are ready, and they stop when it is done.
    """
    command = [*service.command(operation, **options), "-until-eof"]
    with scratch.program(command, stdin=subprocess.PIPE) as program:
        assert program.stdout is not None
        if program.stdout.readline() != "ready\n":
            raise RuntimeError(f"{' '.join(command)}: {program.communicate()[1]}")
        begun = time.perf_counter()
        work()
        seconds = time.perf_counter() - begun
        output, errors = program.communicate()
        if program.returncode:
            raise RuntimeError(f"{' '.join(command)}: {errors}")
    return Sample.of(output), seconds


def base(service: Service, name: str, fill: Callable[[Path], None]) -> None:
    """Commit a snapshot with what `fill` writes, through the mounts that the service answers."""
    active(service, f"{name}-active", fill)
    service.calls.commit(name, f"{name}-active")


def active(service: Service, key: str, fill: Callable[[Path], None]) -> None:
    """Prepare a snapshot without a parent and fill it."""
    (mount,) = service.calls.prepare(key)
    with (
        scratch.directory("snapbroker-bench-mount") as target,
        scratch.mounted(mount.type, mount.source, mount.options, target),
    ):
        fill(target)


def flags(options: dict[str, Any]) -> list[str]:
    """Options as flags that Go's flag package and argparse both read."""
    return [f"-{name}={value}" for name, value in options.items()]
