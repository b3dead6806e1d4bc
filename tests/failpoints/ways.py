"""How a load comes to a fail point, where calls alone do not: what goes before, and what has to be armed with it.

A point that is not named here is reached by the calls of `tests.failpoints.caller`; so is one added to the table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from backends.failpoints import ACTOR, POINTS


@dataclass(frozen=True)
class Way:
    """`at` says when the point is reached; `given` is armed with it, by backend ("" for all): a point and its action.

    - calls: while clients work. start: when the actor starts again after a kill, or after what was `given`.
    - first: at the first start on an empty root.
    - broken: at a start, when the files of a snapshot are away. ballast: when the ballast has to be taken up again.
    """

    at: Literal["calls", "start", "first", "broken", "ballast"] = "calls"
    given: dict[str, tuple[str, str]] = field(default_factory=dict)
    before: Literal["", "events", "outcomes"] = ""
    """What the journal or the outcomes have to be full of."""
    large: bool = False
    """Whether clients write so much that the map has to grow."""


_CUT: Final = {
    "overlayfs": ("overlayfs.made", f"kill {ACTOR}"),
    "native": ("native.copied", f"kill {ACTOR}"),
    "btrfs": ("btrfs.snapshotted", f"kill {ACTOR}"),
}
"""A crash that leaves a directory without a record."""

WAYS: Final = {
    "journal.trimmed": Way(before="events"),
    "outcomes.trimmed": Way(before="outcomes"),
    "environment.full": Way(large=True),
    "environment.grown": Way(large=True),
    "preallocation.written": Way(large=True),
    "overlayfs.undoing": Way(given={"": ("overlayfs.filled", "error:ENOSPC {process}")}),
    "native.undoing": Way(given={"": ("native.copied", "error:ENOSPC {process}")}),
    "btrfs.undoing": Way(given={"": ("btrfs.snapshotted", "error:ENOSPC")}),
    "pool.failed": Way(given={"": ("overlayfs.filled", "kill hand")}),
    "crew.dropping": Way(given={"": ("native.made", "kill hand")}),
    "files.rooted": Way("first"),
    "files.laid": Way("first"),
    "btrfs.emptied": Way("first"),
    "environment.opened": Way("start"),
    "ids.reserved": Way("start"),
    "ids.committed": Way("start"),
    "space.opened": Way("ballast"),
    "trash.recovered": Way("start"),
    "recovery.looked": Way("start"),
    "recovery.marked": Way("broken"),
    "btrfs.righted": Way("start", {"": ("btrfs.committed", "kill")}),
    "recovery.sweeping": Way("start"),
    "recovery.discarded": Way("start", _CUT),
    "recovery.finished": Way("start"),
}


AGAIN: Final = ("environment.opened", "ids.reserved", "ids.committed", "recovery.looked", "recovery.sweeping")
"""Points that every start comes to, and nothing else does."""


def way_of(name: str) -> Way:
    """How a point is reached."""
    return WAYS.get(name, Way())


def share(backend: str) -> list[tuple[str, str]]:
    """The combinations of the short run: a point that several backends have is tried with one of them, in turn."""
    turns = {point.name: point.backends[number % len(point.backends)] for number, point in enumerate(POINTS)}
    return [(name, process) for name, process in combinations(backend) if turns[name] == backend]


def combinations(backend: str) -> list[tuple[str, str]]:
    """Every point of a backend, in each of the processes that reach it; those of a first start have a test apart."""
    return [
        (point.name, process)
        for point in POINTS
        if backend in point.backends and way_of(point.name).at != "first"
        for process in point.processes
    ]
