"""The backend `faulty`: memory's, with work that fails, or waits, where a snapshot's labels say so.

    mounts, create, commit, usage, settle, revert
                    what that method raises: a code of the contract, a name of errno, or `bug`
    commit-waits    a file: the commit goes on once it is there, and makes a file `<it>.waiting`

Tests install it as a distribution of its own, as any third party's plug-in is.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from backends.api import Snapshot, Task
from backends.memory import Memory
from snapbroker.contract import Mount, Usage
from snapbroker.errors import ERRORS


def fail(labels: Mapping[str, str], method: str) -> None:
    """Raise what the label says."""
    fault = labels.get(method)
    if fault is None:
        return
    if fault in ERRORS:
        raise ERRORS[fault]("the backend says no")
    if fault == "bug":
        raise ZeroDivisionError("the backend is wrong")
    number = getattr(errno, fault)
    raise OSError(number, os.strerror(number), "/some/file")


class Faulty(Memory):
    """The backend (see the module)."""

    def create(self, snapshot: Snapshot, task: Task) -> None:
        """Fail, or remember the id."""
        fail(snapshot.labels, "create")
        super().create(snapshot, task)

    def fits(self, snapshot: Snapshot) -> bool:
        """What is to fail when it is made comes from no pool."""
        return "create" not in snapshot.labels and super().fits(snapshot)

    def mounts(self, snapshot: Snapshot) -> Sequence[Mount]:
        """Fail, or tell kind and chain."""
        fail(snapshot.labels, "mounts")
        return super().mounts(snapshot)

    def usage(self, snapshot: Snapshot, task: Task) -> Usage:
        """Fail, or nothing."""
        fail(snapshot.labels, "usage")
        return super().usage(snapshot, task)

    def commit(self, snapshot: Snapshot, sync: bool, task: Task) -> Usage:
        """Wait, fail, or nothing."""
        if gate := snapshot.labels.get("commit-waits"):
            Path(f"{gate}.waiting").touch()
            while not Path(gate).exists():
                task.advance(0)
                time.sleep(0.005)
        fail(snapshot.labels, "commit")
        return Usage()

    def settle(self, snapshot: Snapshot) -> None:
        """Fail, or nothing."""
        fail(snapshot.labels, "settle")

    def revert(self, snapshot: Snapshot) -> None:
        """Fail, or nothing."""
        fail(snapshot.labels, "revert")
