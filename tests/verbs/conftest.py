"""A small world to try calls on: one snapshot of every sort, the same on every snapshotter."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from snapbroker.errors import BrokerError
from snapbroker.protocol import Commit, Events, Prepare, View, Walk
from tests.harness import Daemon, Wire

WORLD = (
    (Prepare(key="a"),),
    (Commit(name="base", key="a", labels={"layer": "1"}), Prepare(key="rootless"), View(key="bare")),
    (Prepare(key="b", parent="base"),),
    (Commit(name="top", key="b"),),
    (
        Prepare(key="active", parent="base", labels={"color": "red", "size": "big"}),
        View(key="view", parent="base"),
        View(key="high", parent="top"),
    ),
)
"""base and top are committed, one on the other; rootless and bare have no parent, active and view are on base."""


class World:
    """The world of one snapshotter, in a namespace of its own; nothing that is tried on it may change it."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        for calls in WORLD:
            for result in wire.call(*calls):
                assert not isinstance(result, BrokerError), result
        self.picture = self._look()

    def _look(self) -> tuple[object, ...]:
        walk = self.wire.pages(Walk())
        events = self.wire.pages(Events(since=0))
        return (
            [info for page in walk for info in page.infos],
            [event for page in events for event in page.events],
        )

    def check_unchanged(self) -> None:
        """Neither a snapshot nor an event came or went."""
        assert self._look() == self.picture


@pytest.fixture(scope="session")
def worlds(daemon: Daemon) -> Iterator[Callable[[str], World]]:
    """The world of a snapshotter, made at its first use."""
    made: dict[str, World] = {}

    def world(snapshotter: str) -> World:
        if snapshotter not in made:
            made[snapshotter] = World(daemon.wire(snapshotter, "world"))
        return made[snapshotter]

    yield world
    for known in made.values():
        known.wire.close()


@pytest.fixture
def world(worlds: Callable[[str], World], snapshotter: str) -> World:
    """The world of the snapshotter at hand."""
    return worlds(snapshotter)
