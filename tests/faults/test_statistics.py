"""Every queue says how full it is and how full it may be."""

from __future__ import annotations

import pytest

from snapbroker.protocol import StatusAnswer
from tests.harness import Daemon

BROKER = {
    "mailbox.overlayfs": (("open", "limit"), ("bytes", "bytes_limit"), ("unsent", "bytes_limit"), ("waiting", "limit")),
    "publisher": (("published", "limit"),),
    "router": (("undeliverable", "limit"),),
}
ACTOR = {
    "writer": (("waiting", "limit"),),
    "workers": (("working", "limit"), ("waiting", "limit")),
    "pool": (("ready", "limit"), ("waiting", "waiting_limit")),
    "service": (("streams", "streams_limit"),),
    "outcomes": (("bytes", "limit"),),
    "ledger": (("waiting", "limit"),),
    "store": (("used_bytes", "limit"),),
    "space": (("free", "reserve"), ("inodes", "reserve_inodes")),
    "watch": (("writer_ms", "told_ms"), ("pool_ms", "told_ms"), ("trash_ms", "told_ms"), ("work_ms", "told_ms")),
}
"""Queue to pairs of a figure and the limit that it has."""


@pytest.fixture
def status(daemon: Daemon) -> StatusAnswer:
    return daemon.wait_for(lambda status: all("pool" in a.queues for a in status.snapshotters if a.name == "overlayfs"))


def test_every_queue_has_its_figure_and_its_limit(status: StatusAnswer) -> None:
    (actor,) = [actor for actor in status.snapshotters if actor.name == "overlayfs"]
    for queues, wanted in ((status.queues, BROKER), (actor.queues, ACTOR)):
        for queue, pairs in wanted.items():
            for figure, limit in pairs:
                assert queues[queue][figure] >= 0, (queue, figure)
                assert queues[queue][limit] > 0, (queue, limit)
    assert actor.backlog["entries"] >= 0
    assert actor.backlog["limit"] > 0


def test_no_queue_is_unknown_here(status: StatusAnswer) -> None:
    """Who adds a queue says here, and in docs/operations.md, what bounds it."""
    (actor,) = [actor for actor in status.snapshotters if actor.name == "overlayfs"]
    assert {name for name in status.queues if not name.startswith("mailbox.")} == {"publisher", "router"}
    assert set(actor.queues) == {*ACTOR, "recovery"}
