"""Which of an actor's threads and works stand still: being asked is answered by the loop, making progress is not.

Each second the loop looks at a mark of everything that ought to move: how many turns the writer has taken, how much
of a copy is done. A mark that has not changed since the last look stands still; None says that there is nothing to do.
Nothing on the way of a call counts or times anything for it.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Mapping
from typing import Final

from broker.logs import get_logger

log = get_logger()

ASLEEP_NS: Final = 3_000_000_000
"""A pause between two looks that is longer was nobody's fault here: the process or the machine did not run."""
FRAMES_MAX: Final = 12
"""Innermost frames of a stack that are told."""


class Watch:
    """How long each of several works has stood still, looked at again and again."""

    def __init__(self, told_after_ms: int, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._told_after = told_after_ms * 1_000_000
        self._clock = clock
        self._looked = clock()
        self._marks: dict[str, tuple[Hashable, int]] = {}
        self._told: set[str] = set()

    def look(self, marks: Mapping[str, Hashable | None]) -> dict[str, int]:
        """Milliseconds for which each has stood still, 0 for what moves or rests; what does for long is logged."""
        now = self._clock()
        asleep = now - self._looked if now - self._looked > ASLEEP_NS else 0
        self._looked = now
        standing: dict[str, int] = {}
        known, self._marks = self._marks, {}
        for name, mark in marks.items():
            standing[name] = 0
            if mark is None:
                continue
            before, since = known.get(name, (None, now))
            since = since + asleep if mark == before else now
            self._marks[name] = (mark, since)
            standing[name] = (now - since) // 1_000_000
        self._tell(standing)
        return standing

    def _tell(self, standing: Mapping[str, int]) -> None:
        still = {name: ms for name, ms in standing.items() if ms * 1_000_000 >= self._told_after}
        for name in self._told - still.keys():
            log.info("it goes on", what=name)
        for name in still.keys() - self._told:
            log.error("it stands still", what=name, seconds=still[name] // 1000, stack=stack_of(name))
        self._told = set(still)


def stack_of(name: str) -> list[str]:
    """Where the thread of this name is, the innermost frame last; empty where there is none."""
    found = next((thread.ident for thread in threading.enumerate() if thread.name == name), None)
    frame = sys._current_frames().get(found) if found is not None else None  # noqa: SLF001
    if frame is None:
        return []
    summary = traceback.extract_stack(frame)[-FRAMES_MAX:]
    return [f"{entry.filename}:{entry.lineno} {entry.name}" for entry in summary]
