"""The backend `gated`: memory's, with work that waits at a gate until the test opens it.

What a test wants to see while a backend is at work has to be seen for certain, and not only when a copy happens to
be slow. A snapshot with the label `gate=NAME` waits, when it is made, until there is a file NAME in the directory
that the option `gates` names; `commit-gate=NAME` waits when it is committed. Waiting, it makes a file NAME.waiting.
With the label `deaf` it does not listen when it is asked to stop. `open_gate` lets the backend itself wait.

It is installed by a fixture, as a distribution of its own: what it uses of the daemon is what any plug-in may use.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from backends.api import Options, Snapshot, Task
from backends.memory import Memory
from snapbroker.contract import Usage


class GatedOptions(Options, frozen=True, kw_only=True):
    """Where the gates are."""

    gates: str
    open_gate: str = ""


class Gated(Memory):
    """The backend (see the module)."""

    Options: ClassVar[type[Options]] = GatedOptions

    @classmethod
    def open(cls, root: Path, options: Any) -> Self:
        """Wait at the gate of the start, if there is one."""
        backend = cls(root)
        backend.gates = Path(options.gates)
        if options.open_gate:
            backend.wait(options.open_gate, {}, Task())
        return backend

    gates: Path

    def wait(self, gate: str, labels: Mapping[str, str], task: Task) -> None:
        """Wait until the gate is open, or until asked to stop."""
        (self.gates / f"{gate}.waiting").touch()
        while not (self.gates / gate).exists():
            if "deaf" not in labels:
                task.advance(1, 100)
            time.sleep(0.005)

    def create(self, snapshot: Snapshot, task: Task) -> None:
        """Wait, then remember the id."""
        if gate := snapshot.labels.get("gate"):
            self.wait(gate, snapshot.labels, task)
        super().create(snapshot, task)

    def fits(self, snapshot: Snapshot) -> bool:
        """A stocked id would not wait."""
        return "gate" not in snapshot.labels and super().fits(snapshot)

    def commit(self, snapshot: Snapshot, sync: bool, task: Task) -> Usage:
        """Wait, then do nothing."""
        if gate := snapshot.labels.get("commit-gate"):
            self.wait(gate, snapshot.labels, task)
        return super().commit(snapshot, sync, task)
