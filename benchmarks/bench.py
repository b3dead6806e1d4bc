"""One run: which sides there are, how they take turns, and where their stores lie."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from benchmarks import scratch
from benchmarks.plan import Plan
from benchmarks.services import Service, Side, base

T = TypeVar("T")

BASE = "base"
"""The committed snapshot that others are prepared from."""


class Bench:
    """What every workload is given."""

    def __init__(self, plan: Plan, sides: Mapping[str, Side]) -> None:
        self.plan, self.sides = plan, sides

    def alternate(self, measure: Callable[[str], T], *only: str) -> dict[str, list[T]]:
        """Measure one side after the other, round after round, so that what disturbs the machine disturbs both."""
        taken: dict[str, list[T]] = {}
        for _ in range(self.plan.rounds):
            for side in self.sides:
                if not only or side in only:
                    taken.setdefault(side, []).append(measure(side))
        return taken

    @contextlib.contextmanager
    def place(self, backend: str) -> Iterator[Path]:
        """An empty directory where the backend can work, on a filesystem that nobody has used before.

        What one load deleted would else weigh on the next: ext4 avoids inodes that were freed a moment ago.
        """
        kind = "btrfs" if backend == "btrfs" else self.plan.filesystem
        with (
            scratch.directory("snapbroker-bench")
            if kind == "disk"
            else scratch.filesystem(kind, self.plan.filesystem_bytes) as path
        ):
            yield path

    @contextlib.contextmanager
    def service(self, side: str, backend: str, *, with_base: bool = False) -> Iterator[Service]:
        """One side with an empty store, or one that holds a small base."""
        with self.place(backend) as place, self.sides[side].start(backend, place) as service:
            if with_base:
                base(service, BASE, self.small)
            # What an earlier load left to be flushed, deleted directories above all, does not weigh on the next.
            scratch.run(["sync", "--file-system", str(place)])
            scratch.run(["sync", "--file-system", str(scratch.DISK)])
            yield service

    @contextlib.contextmanager
    def services(self, backend: str) -> Iterator[dict[str, Service]]:
        """All sides at once, each on a place of its own: for loads that leave the store as it is."""
        with contextlib.ExitStack() as stack:
            yield {side: stack.enter_context(self.service(side, backend, with_base=True)) for side in self.sides}

    def small(self, path: Path) -> None:
        """Fill a base with a few small files."""
        for number in range(self.plan.base_files):
            (path / f"file-{number}").write_bytes(bytes(4096))

    def say(self, text: str) -> None:
        """Tell whoever waits what is being measured."""
        print(f"  {text}", file=sys.stderr, flush=True)
