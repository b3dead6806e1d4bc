"""What is fuzzed, by name: a module with `one(data)` and `seeds()` each."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Protocol, cast

NAMES: Final = tuple(sorted(file.stem for file in Path(__file__).parent.glob("[a-z]*.py")))
"""Every target."""


class Target(Protocol):
    """What each module here is."""

    def one(self, data: bytes) -> None:
        """Try one input; whatever it raises is a finding."""
        ...

    def seeds(self) -> Iterable[bytes]:
        """Inputs to begin with."""
        ...


def load(name: str) -> Target:
    """The target of this name."""
    return cast("Target", importlib.import_module(f"{__name__}.{name}"))
