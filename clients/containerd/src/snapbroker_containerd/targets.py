"""Which snapshotter of the broker a containerd name means (C138)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from snapbroker.aio import Broker
from snapbroker.errors import BrokerError, InvalidArgument, NotFound

PREFIX: Final = "snapbroker-"
"""Before a snapshotter's name in containerd: `overlayfs` itself is taken there by containerd's own."""


class Targets:
    """Views of one connection by containerd name: those that were asked for, once the broker was seen to have them.

    `names` maps containerd names to snapshotters. Where it is empty, each snapshotter is meant by its own name and by
    its own name behind `snapbroker-`.
    """

    def __init__(self, broker: Broker, names: Mapping[str, str]) -> None:
        self._broker = broker
        self._names = dict(names)
        self._found: dict[str, Broker] = {}

    def get(self, name: str) -> Broker | None:
        """The view of a name that was found before."""
        return self._found.get(name)

    async def find(self, name: str) -> Broker:
        """The view of a name; InvalidArgument where it means nothing here."""
        if not name:
            raise InvalidArgument("the request names no snapshotter")
        served = self.served({snapshotter.name for snapshotter in (await self._broker.status()).snapshotters})
        target = served.get(name)
        if target is None:
            known = ", ".join(sorted(served)) or "none"
            raise InvalidArgument(f"unknown snapshotter {name[:80]!r}; there are: {known}")
        view = self._found[name] = self._broker.snapshotter(target)
        return view

    def served(self, snapshotters: set[str]) -> dict[str, str]:
        """Containerd name to snapshotter, of those that the broker has."""
        names = self._names or {**{PREFIX + own: own for own in snapshotters}, **{own: own for own in snapshotters}}
        return {name: target for name, target in names.items() if target in snapshotters}

    def forget(self, name: str, error: BrokerError) -> bool:
        """Whether `error` says that the broker, started anew, has no such snapshotter: it is looked for again then."""
        if not isinstance(error, NotFound) or "snapshotters" not in error.details:
            return False
        return self._found.pop(name, None) is not None
