"""Whether memory and descriptors of the daemon's processes stay where they are, however long it works.

A process that a kill has replaced begins anew, so growth is looked for within one process's life: of each role the one
that lived longest, the median of the first third of its life against that of the last. Memory is what is the process's
own (RssAnon): the pages of the database that it happens to have mapped are the page cache's.
"""

from __future__ import annotations

import statistics
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from snapbroker.errors import BrokerError
from snapbroker.protocol import Status, StatusAnswer
from tests.harness import Daemon, Silence

INTERVAL_S: Final = 1.0
"""Between two samples."""
STATUS_S: Final = 2.0
"""How long the daemon may take to say which processes it has; then there is no sample."""
SAMPLES_MIN: Final = 15
"""Fewer say nothing: a role whose longest life is shorter fails the run."""
MEMORY_FACTOR: Final = 1.2
MEMORY_BYTES: Final = 12 << 20
"""Memory may grow by a fifth and 12 MiB: caches fill that have their own limits, and the allocator keeps pages."""
DESCRIPTORS: Final = 16
"""Descriptors may differ by so many: clients that come and go, and what is open at the moment of the sample."""


@dataclass
class Life:
    """One process: its samples, a second apart."""

    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)


class Watch(threading.Thread):
    """Takes the samples until `stop`."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(name="watch", daemon=True)
        self.lives: defaultdict[str, dict[int, Life]] = defaultdict(dict)
        self._daemon = daemon
        self._halt = threading.Event()

    def run(self) -> None:
        """Look once a second; a daemon that is away is not looked at."""
        while not self._halt.wait(INTERVAL_S):
            try:
                self._sample()
            except (psutil.Error, OSError, Silence, BrokerError):
                continue

    def _sample(self) -> None:
        with self._daemon.wire() as wire:
            for _, status in wire.parts(wire.send(Status()), (Status(),), timeout=STATUS_S):
                assert isinstance(status, StatusAnswer)
                self._add("broker", status.pid)
                for actor in status.snapshotters:
                    if actor.state == "ready":
                        self._add(f"actor {actor.name}", actor.pid)

    def _add(self, role: str, pid: int) -> None:
        process = psutil.Process(pid)
        memory = _own_memory(pid)
        with process.oneshot():
            descriptors, threads = process.num_fds(), process.num_threads()
        life = self.lives[role].setdefault(pid, Life())
        life.memory.append(memory)
        life.descriptors.append(descriptors)
        life.threads.append(threads)

    def stop(self) -> None:
        """End it and wait."""
        self._halt.set()
        self.join()

    def latest(self) -> dict[str, str]:
        """Memory in MiB and descriptors of each role's newest process, for the progress."""
        shown = {}
        for role, lives in list(self.lives.items()):
            life = list(lives.values())[-1]
            if life.threads:
                shown[role.removeprefix("actor ")] = f"{life.memory[-1] >> 20}M/{life.descriptors[-1]}fd"
        return shown

    def verdict(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Figures of each role, and what is not flat."""
        figures: dict[str, dict[str, Any]] = {}
        grown: list[str] = []
        for role, lives in sorted(self.lives.items()):
            life = max(lives.values(), key=lambda life: len(life.threads))
            memory, descriptors, threads = (
                _thirds(samples) for samples in (life.memory, life.descriptors, life.threads)
            )
            figures[role] = {
                "processes": len(lives),
                "longest_life_s": round(len(life.threads) * INTERVAL_S),
                "memory_bytes": memory,
                "descriptors": descriptors,
                "threads": threads,
            }
            if len(life.threads) < SAMPLES_MIN:
                grown.append(f"{role}: none lived longer than {len(life.threads)} s")
            if memory[1] > memory[0] * MEMORY_FACTOR + MEMORY_BYTES:
                grown.append(f"{role}: memory grew from {memory[0]} to {memory[1]} bytes")
            if abs(descriptors[1] - descriptors[0]) > DESCRIPTORS:
                grown.append(f"{role}: descriptors went from {descriptors[0]} to {descriptors[1]}")
        return figures, grown


def _thirds(samples: list[int]) -> tuple[int, int]:
    third = max(1, len(samples) // 3)
    return int(statistics.median(samples[:third])), int(statistics.median(samples[-third:]))


def _own_memory(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise psutil.NoSuchProcess(pid)
