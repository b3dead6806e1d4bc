"""The snapshotters of a configuration or of a root, as commands find them: locked, so that no daemon has them."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from backends import registry
from backends.api import Backend
from broker.audit.access import OfflineAccess
from broker.config import Config, SnapshotterSection
from broker.lock import lock_directory
from broker.snapshotter.limits import SnapshotterLimits
from broker.store import Environment
from snapbroker.errors import FailedPrecondition, NotFound

LOCK_WAIT_S = 0.5
"""How long a command waits for a daemon to let go of a root."""


@dataclass(frozen=True)
class Place:
    """One snapshotter and where it lies."""

    name: str
    backend: type[Backend]
    root: Path
    metadata: Path
    options: dict[str, Any]
    limits: SnapshotterLimits

    @property
    def database(self) -> Path:
        """The file of its records."""
        return self.metadata / "data.mdb"

    def open_backend(self) -> Backend:
        """The backend, without probing the machine for it."""
        return self.backend.open_again(self.root, msgspec.convert(self.options, self.backend.Options))

    @contextlib.contextmanager
    def locked(self, doing: str) -> Iterator[None]:
        """Nobody else has the root meanwhile; FailedPrecondition while a daemon has it."""
        if not self.root.is_dir():
            raise FailedPrecondition(f"{self.name}: {self.root} is not there: name the root with --root or --config")
        try:
            lock = lock_directory(self.root, "--root", wait_s=LOCK_WAIT_S)
        except FailedPrecondition as error:
            if "in use" not in error.message:
                raise
            raise FailedPrecondition(
                f"{self.name}: a snapbrokerd serves {self.root}: stop it to {doing}"
                + (", or ask it: `snapbroker audit`" if doing.startswith("audit") else "")
            ) from None
        try:
            yield
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def opened(self) -> Iterator[OfflineAccess]:
        """Its store, for one who holds the lock; FailedPrecondition where there is none."""
        if not self.database.is_file():
            raise FailedPrecondition(
                f"{self.name}: {self.database} is not there: `snapbrokerd rebuild` makes it from what is on disk"
            )
        environment = Environment(self.metadata, self.limits.store)
        try:
            access = OfflineAccess(environment, self.name, self.root, self.metadata, self.backend, self.open_backend)
            try:
                yield access
            finally:
                access.close()
        finally:
            environment.close()


def add_names(to: argparse.ArgumentParser) -> None:
    """Which snapshotters are meant."""
    to.add_argument("names", metavar="NAME", nargs="*", help="snapshotters (default: all that are there)")


def places(config: Config, names: Sequence[str]) -> list[Place]:
    """The snapshotters named; all that the configuration, or else the root, has where none is.

    Without sections in the configuration a snapshotter is named like its backend, as when it is served.
    """
    sections = config.snapshotters or {
        name: SnapshotterSection()
        for name in sorted(registry.available().backends)
        if (config.root_path / name).is_dir()
    }
    missing = [name for name in names if name not in sections]
    if missing or not sections:
        where = f"{config.root_path} has {', '.join(sections) or 'no snapshotters'}"
        what = f"no snapshotter {missing[0]!r}: " if missing else ""
        raise NotFound(f"{what}{where}: name another --root, or the --config of the daemon")
    return [_place(config, name, sections[name]) for name in names or sections]


def _place(config: Config, name: str, section: SnapshotterSection) -> Place:
    root = Path(section.root or config.root_path / name)
    return Place(
        name,
        registry.load(section.backend or name),
        root,
        Path(section.metadata or root / "metadata"),
        section.options,
        section.limits,
    )
