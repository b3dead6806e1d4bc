"""A store that grows under load, and one that is full: no call is lost, and removing is the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from snapbroker.errors import BrokerError, ResourceExhausted
from snapbroker.protocol import DONE, Events, Prepare, Remove, Stat, Update, View, Walk, decode_reply
from tests.harness import Daemon, Result, Wire

StartDaemon = Callable[..., Daemon]
LABELS = {"label": "v" * 2000}


def section(initial: int, most: int) -> dict[str, Any]:
    store = {"map_initial_bytes": initial, "map_max_bytes": most}
    return {"backend": "memory", "limits": {"store": store, "journal": {"events_max": 50}}}


def names(wire: Wire) -> list[str]:
    return [info.name for page in wire.pages(Walk(credit=1024)) for info in page.infos]


def test_growing_loses_no_call(start_daemon: StartDaemon) -> None:
    """Many requests under way at once: each is answered, and all of it is there."""
    daemon = start_daemon({"growing": section(256 * 1024, 1 << 30)})
    requests = [[View(key=f"{turn:02}-{number:02}", labels=LABELS) for number in range(50)] for turn in range(40)]
    with daemon.wire("growing") as wire:
        under_way = {wire.send(*calls) for calls in requests}
        answered = 0
        while under_way:
            _, request_id, status, body = wire.receive_frames()
            reply = decode_reply(body)
            assert reply.error is None
            assert not [outcome.error for outcome in reply.outcomes if outcome.error is not None]
            answered += len(reply.outcomes)
            if status == DONE:
                under_way.remove(request_id)
        assert answered == 2000
        assert names(wire) == [f"{turn:02}-{number:02}" for turn in range(40) for number in range(50)]
        assert wire.pages(Events(since=1950))[-1].newest == 2000
    queues = daemon.wait_for(lambda status: status.snapshotters[0].snapshots == 2000).snapshotters[0].queues
    assert queues["store"]["map_bytes"] > 2000 * 2000


def test_a_full_store(start_daemon: StartDaemon) -> None:
    daemon = start_daemon({"full": section(1 << 20, 1 << 20)})
    with daemon.wire("full") as wire:
        made: list[str] = []
        refusal: Result | None = None
        while not isinstance(refusal, BrokerError):
            name = f"job-{len(made):04}"
            (refusal,) = wire.call(Prepare(key=name, labels=LABELS))
            if not isinstance(refusal, BrokerError):
                made.append(name)
            assert len(made) < 2000
        assert isinstance(refusal, ResourceExhausted)
        assert "map_max_bytes" in refusal.message
        # Reads go on, and nothing of what was refused is there.
        assert names(wire) == made
        assert wire.one(Stat(key=made[0])).labels == LABELS
        # Removing is the way out, as the message says.
        for name in made[: len(made) // 2]:
            wire.one(Remove(key=name))
        wire.one(Update(name=made[-1], labels={}))
        wire.one(Prepare(key="again", labels=LABELS))
        assert names(wire) == ["again", *made[len(made) // 2 :]]
    daemon.stop()
    daemon.start()
    with daemon.wire("full") as wire:
        assert names(wire) == ["again", *made[len(made) // 2 :]]
