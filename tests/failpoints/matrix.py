"""Every point in every process of every backend, in random order, at a random time, and again at the next start."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from backends.failpoints import ACTOR
from tests.failpoints.crashes import running
from tests.failpoints.ways import AGAIN, Way, combinations, way_of

BACKENDS: Final = ("overlayfs", "native", "btrfs")
HITS_MAX: Final = 12
AGAIN_SHARE: Final = 0.3
"""Share of the crashes that are followed by another one, of the next life."""


def crash_everywhere(backend: str, seed: int, say: Callable[[str], None]) -> tuple[dict[str, Any], list[str]]:
    """Die everywhere once; figures, and what went wrong. After that another daemon goes on."""
    chance = random.Random(f"{seed}/{backend}")
    left = combinations(backend)
    chance.shuffle(left)
    figures: Counter[str] = Counter()
    failures: list[str] = []
    while left:
        with running(backend, str(seed)) as crashes:
            try:
                crashes.start()
                while left:
                    name, process = left.pop()
                    figures["combinations"] += 1
                    crashes.round(name, process, *_choices(chance, name, process))
                crashes.finish()
            except Exception as error:
                notes = "; ".join(getattr(error, "__notes__", []))
                failures.append(f"{backend}: {type(error).__name__}: {error} {notes}"[:8000])
                say(f"FAILED {failures[-1]}")
            figures.update(crashes.figures)
            say(f"{backend}: {dict(figures)}")
    return dict(figures), failures


def _choices(chance: random.Random, name: str, process: str) -> tuple[int, str]:
    """Which time, and at which point the next life dies, if at one."""
    if way_of(name) != Way() or process != ACTOR:
        return 1 if way_of(name) != Way() else chance.randint(1, HITS_MAX), ""
    return chance.randint(1, HITS_MAX), chance.choice(AGAIN) if chance.random() < AGAIN_SHARE else ""
