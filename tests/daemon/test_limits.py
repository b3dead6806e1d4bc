"""Every queue has a limit that refuses truthfully, every call a deadline and a way back, and nobody holds up others.

Most tests share a daemon with low limits. What must be seen while a backend works is seen at a gate (`gated`), which
the test opens; what must be seen while an actor is busy, with the actor stopped by SIGSTOP.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import zmq

from broker.config import RouterLimits
from snapbroker.contract import LABEL_BYTES_MAX
from snapbroker.errors import (
    AlreadyExists,
    BrokerError,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from snapbroker.protocol import (
    DONE,
    REQUEST_VERSION,
    Call,
    Cancel,
    Cleanup,
    Commit,
    Empty,
    Events,
    Mounts,
    MountsAnswer,
    Prepare,
    Progress,
    Remove,
    Request,
    Stat,
    StatusAnswer,
    Update,
    UsageOf,
    View,
    Walk,
    decode_reply,
    encode,
    error_of,
)
from tests.daemon import support
from tests.daemon.support import UNHURT_S, Bystander, paused, pid_of, queue_of, wait_until
from tests.harness import Daemon, Result, Wire

OWN_REQUESTS_MAX: Final = 8
"""A lone client has half of what all may have."""
OPEN_REQUESTS_MAX: Final = 2 * OWN_REQUESTS_MAX
OPEN_BYTES_MAX: Final = 1_000_000
OWN_STREAMS_MAX: Final = 4
STREAMS_MAX: Final = 2 * OWN_STREAMS_MAX
OWN_WORKING_MAX: Final = 3
WORKING_MAX: Final = 2 * OWN_WORKING_MAX
WAITING_MAX: Final = 16
SILENCE_MS: Final = 4000
SEND_QUEUE_MAX: Final = 50

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where gates are opened."""
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module")
def limited(gates: Path, plugins: dict[str, str]) -> Iterator[Daemon]:
    """A daemon with low limits: `gated` works when it may, `slow` and `turns` flush after each call."""
    gated = {
        "backend": "gated",
        "options": {"gates": str(gates)},
        "limits": {
            "service": {"streams_max": STREAMS_MAX, "progress_interval_ms": 10},
            "writer": {"working_max": WORKING_MAX},
        },
    }
    slow = {"backend": "memory", "limits": {"writer": {"turn_max": 1, "waiting_max": WAITING_MAX}}}
    native = {"backend": "native", "limits": {"service": {"progress_interval_ms": 5}}}
    turns = {"backend": "memory", "limits": {"writer": {"turn_max": 1}}}
    with Daemon(
        {"gated": gated, "slow": slow, "turns": turns, "native": native},
        environment=plugins,
        router={
            "open_requests_max": OPEN_REQUESTS_MAX,
            "open_bytes_max": OPEN_BYTES_MAX,
            "send_queue_max": SEND_QUEUE_MAX,
            # Who else has called a moment ago must not decide which limit is reached first.
            "window_shared_bytes": RouterLimits().window_bytes,
        },
        publisher={"send_queue_max": SEND_QUEUE_MAX},
        supervisor={"silence_max_ms": SILENCE_MS},
    ) as daemon:
        yield daemon


@pytest.fixture
def wire(limited: Daemon) -> Iterator[Wire]:
    """A client of `gated`, in a namespace of its own."""
    with limited.wire("gated", f"limits-{next(_numbers)}") as wire:
        yield wire


@pytest.fixture
def bystander(limited: Daemon) -> Iterator[Bystander]:
    """A client of another snapshotter, which must not notice anything."""
    with Bystander(limited, "native") as bystander:
        yield bystander
        bystander.wait_for_rounds()


class Gate:
    """Work that waits until `open`."""

    def __init__(self, gates: Path) -> None:
        self.name = f"gate-{next(_numbers)}"
        self._file = gates / self.name

    @property
    def labels(self) -> dict[str, str]:
        """For a snapshot that waits when it is made."""
        return {"gate": self.name}

    @property
    def commit_labels(self) -> dict[str, str]:
        """For a snapshot that waits when it is committed."""
        return {"commit-gate": self.name}

    def wait(self) -> None:
        """Wait until somebody waits at it."""
        wait_until(self._file.with_suffix(".waiting").exists, "the backend's work")

    def open(self) -> None:
        """Let all pass."""
        self._file.touch()


@pytest.fixture
def gate(gates: Path) -> Iterator[Gate]:
    """A gate of the test's own, open at its end."""
    gate = Gate(gates)
    yield gate
    gate.open()


def end_of(wire: Wire, number: bytes, *calls: Call) -> list[Result]:
    """The results of a request sent before, progress left out; its refusal as a whole is its one result."""
    try:
        parts = dict(part for part in wire.parts(number, calls) if not isinstance(part[1], Progress))
    except BrokerError as error:
        return [error]
    return [result for _, result in sorted(parts.items())]  # type: ignore[misc]


def replies(wire: Wire, sent: Mapping[bytes, Call]) -> dict[bytes, Result]:
    """The outcome of several requests of one call, in whatever order they come."""
    found: dict[bytes, Any] = {}
    while len(found) < len(sent):
        _, number, status, body = wire.receive_frames()
        assert number in sent
        reply = decode_reply(body)
        fault = reply.error or (reply.outcomes[0].error if reply.outcomes else None)
        if status == DONE:
            found[number] = error_of(fault) if fault else Empty()
    return found


# Limits of queues.


def test_a_full_mailbox_refuses_at_once_and_says_when_to_repeat(
    limited: Daemon, wire: Wire, bystander: Bystander
) -> None:
    with paused(limited, "gated"), limited.wire("gated", wire.namespace) as other:
        sent = {wire.send(Stat(key="a")): Stat(key="a") for _ in range(OWN_REQUESTS_MAX)}
        limited.wait_for(lambda status: status.queues["mailbox.gated"]["open"] == OWN_REQUESTS_MAX)
        begun = time.monotonic()
        for _ in range(2):
            with pytest.raises(ResourceExhausted) as caught:
                wire.one(Stat(key="a"))
            assert caught.value.details["retry_after_ms"] >= 1
            assert caught.value.details["position"] >= OWN_REQUESTS_MAX
        assert time.monotonic() - begun < UNHURT_S
        # Whoever did not fill it has room in it.
        late = other.send(Stat(key="a"))
        mailbox = limited.wait_for(lambda status: status.queues["mailbox.gated"]["open"] > OWN_REQUESTS_MAX)
        figures = mailbox.queues["mailbox.gated"]
        assert figures["open"] == OWN_REQUESTS_MAX + 1 < figures["limit"]
        assert figures["refused"] >= 2
        bystander.wait_for_rounds()
        # What was accepted is answered, and there is room again.
        os.kill(pid_of(limited, "gated"), signal.SIGCONT)
        assert [type(error) for error in end_of(other, late, Stat(key="a"))] == [NotFound]
    assert {type(result) for result in replies(wire, sent).values()} == {NotFound}
    with pytest.raises(NotFound):
        wire.one(Stat(key="a"))


def test_a_mailbox_is_limited_in_bytes_too(limited: Daemon, wire: Wire) -> None:
    large = Prepare(key="a", parent="missing", labels={f"l{n}": "v" * (LABEL_BYTES_MAX - 10) for n in range(150)})
    with paused(limited, "gated"):
        number = wire.send(large)
        limited.wait_for(lambda status: status.queues["mailbox.gated"]["open"] == 1)
        with limited.wire("gated") as other, pytest.raises(ResourceExhausted) as caught:
            other.one(large)
        assert caught.value.details["retry_after_ms"] >= 1
        assert 600_000 < limited.status().queues["mailbox.gated"]["bytes"] < OPEN_BYTES_MAX
    assert [type(result) for result in end_of(wire, number, large)] == [NotFound]
    assert limited.status().queues["mailbox.gated"]["bytes"] == 0


def test_streams_have_a_limit(limited: Daemon, wire: Wire) -> None:
    follow = Events(since=0, follow=True)
    open_ = [wire.send(follow) for _ in range(OWN_STREAMS_MAX)]
    limited.wait_for(lambda status: queue_of(status, "gated", "service").get("streams") == OWN_STREAMS_MAX)
    for call in (Walk(), Cleanup(), follow):
        refused = wire.send(call)
        (error,) = replies(wire, {refused: call}).values()
        assert isinstance(error, ResourceExhausted)
        assert error.details["retry_after_ms"] >= 1
        assert error.details["position"] == OWN_STREAMS_MAX
    with pytest.raises(NotFound):
        wire.one(Stat(key="reads-need-no-stream"))
    with limited.wire("gated") as other:
        assert other.one(Walk()).infos == ()
    taken = wire.send(Cancel(request=open_[0]))
    assert {type(r) for r in replies(wire, {taken: follow, open_[0]: follow}).values()} == {Cancelled, Empty}
    with limited.wire("gated") as other:
        assert other.one(Walk()).infos == ()
    for number in open_[1:]:
        taken = wire.send(Cancel(request=number))
        replies(wire, {taken: follow, number: follow})


def test_work_has_a_limit(limited: Daemon, wire: Wire, gate: Gate) -> None:
    calls = [Prepare(key=f"k{n}", labels=gate.labels) for n in range(OWN_WORKING_MAX + 2)]
    sent = {wire.send(call): call for call in calls}
    refused = replies(wire, dict(list(sent.items())[OWN_WORKING_MAX:]))
    assert {type(error) for error in refused.values()} == {ResourceExhausted}
    assert all(error.details["retry_after_ms"] >= 1 for error in refused.values() if isinstance(error, BrokerError))
    limited.wait_for(lambda status: queue_of(status, "gated", "workers").get("working") == OWN_WORKING_MAX)
    # What needs no work is not refused.
    with limited.wire("gated", wire.namespace) as other:
        other.one(Prepare(key="stocked"))
    gate.open()
    done = replies(wire, dict(list(sent.items())[:OWN_WORKING_MAX]))
    assert {type(result) for result in done.values()} == {Empty}
    assert wire.one(Prepare(key=calls[-1].key)) is not None


def test_what_waits_for_a_turn_has_a_limit(limited: Daemon) -> None:
    with limited.wire("slow", "waiting") as wire, limited.wire("slow", "waiting") as other:
        many = [Prepare(key=f"many-{n}") for n in range(500)]
        with paused(limited, "slow"):
            # All are there when it wakes: the second finds the first one's calls before it.
            number = wire.send(*many)
            limited.wait_for(lambda status: status.queues["mailbox.slow"]["open"] == 1)
            second = wire.send(Prepare(key="too-much"))
            third = other.send(Prepare(key="another-client"))
            limited.wait_for(lambda status: status.queues["mailbox.slow"]["open"] == 3)
        assert [type(result) for result in end_of(other, third, Prepare(key="another-client"))] == [MountsAnswer]
        refused = replies(wire, {number: many[0], second: Prepare(key="too-much")})[second]
        assert isinstance(refused, ResourceExhausted)
        assert refused.details["retry_after_ms"] >= 1
        assert refused.details["position"] > WAITING_MAX
        with pytest.raises(NotFound):
            other.one(Stat(key="too-much"))
        assert len(other.one(Walk()).infos) == 501


# Deadlines.


def expired(wire: Wire, milliseconds: int) -> None:
    """Let a deadline pass; nothing may come meanwhile."""
    assert wire.is_silent((milliseconds + 20) / 1000)


def test_what_expired_in_the_mailbox_is_not_executed(limited: Daemon, wire: Wire) -> None:
    wire.one(Prepare(key="kept"))
    before = wire.one(Walk()).sequence
    calls = (Prepare(key="late"), Remove(key="kept"), Update(name="kept", labels={"late": "yes"}), Stat(key="kept"))
    with paused(limited, "gated"):
        number = wire.send(*calls, timeout_ms=50)
        expired(wire, 50)
    (error,) = end_of(wire, number, *calls)
    assert isinstance(error, DeadlineExceeded)
    assert "not executed" in error.message
    assert [info.name for info in wire.one(Walk()).infos] == ["kept"]
    assert wire.one(Walk()).sequence == before


def test_what_expired_before_its_turn_is_not_executed(limited: Daemon) -> None:
    many = [Prepare(key=f"many-{n}") for n in range(200)]
    late = Prepare(key="late")
    with limited.wire("turns", "expiring") as wire, limited.wire("turns", "expiring") as other:
        with paused(limited, "turns"):
            number = wire.send(*many)
            limited.wait_for(lambda status: status.queues["mailbox.turns"]["open"] == 1)
            # A turn has one operation here: there are two hundred flushes before this one's, but for another client's.
            second = wire.send(late, timeout_ms=10)
            third = other.send(Prepare(key="another-client"), timeout_ms=10_000)
        assert [type(result) for result in end_of(other, third, late)] == [MountsAnswer]
        results = replies(wire, {number: many[0], second: late})
        error = results[second]
        assert isinstance(error, DeadlineExceeded)
        assert "not executed" in error.message
        assert isinstance(results[number], Empty)
        with pytest.raises(NotFound):
            other.one(Stat(key="late"))


def test_a_call_that_has_begun_is_finished_whatever_its_deadline(limited: Daemon, wire: Wire, gate: Gate) -> None:
    call = Prepare(key="long", labels=gate.labels)
    number = wire.send(call, timeout_ms=200)
    gate.wait()
    begun = time.monotonic()
    wait_until(lambda: time.monotonic() > begun + 0.25, "the deadline")
    gate.open()
    assert [type(result) for result in end_of(wire, number, call)] == [MountsAnswer]
    assert wire.one(Stat(key="long")).name == "long"


def test_a_follower_is_let_go_at_its_deadline(wire: Wire) -> None:
    follow = Events(since=0, follow=True)
    begun = time.monotonic()
    (page,) = end_of(wire, wire.send(follow, timeout_ms=150), follow)
    assert 0.15 <= time.monotonic() - begun < UNHURT_S
    assert not isinstance(page, BrokerError)


def test_what_is_at_work_is_not_begun_again(limited: Daemon, wire: Wire, gate: Gate) -> None:
    """A repeat with the same token, while the first request waits for its backend, is told to come again."""
    prepare = Prepare(key="a", labels=gate.labels)
    first = wire.send(prepare, token=b"t")
    gate.wait()
    with limited.wire("gated", wire.namespace) as other:
        (refused,) = other.call(prepare, token=b"t")
        assert isinstance(refused, Unavailable)
        assert refused.details["retry_after_ms"] > 0
        gate.open()
        (answer,) = end_of(wire, first, prepare)
        assert isinstance(answer, MountsAnswer)
        assert other.call(prepare, token=b"t") == [answer]


# Taking back.


def test_work_that_is_taken_back_leaves_its_key_free(wire: Wire, gate: Gate) -> None:
    call = Prepare(key="key", labels=gate.labels)
    number = wire.send(call)
    gate.wait()
    taken = wire.send(Cancel(request=number))
    results = replies(wire, {number: call, taken: call})
    assert isinstance(results[number], Cancelled)
    assert isinstance(results[taken], Empty)
    with pytest.raises(NotFound):
        wire.one(Stat(key="key"))
    wire.one(Prepare(key="key"))
    with pytest.raises(NotFound):
        wire.one(Cancel(request=number))
    assert [event.key for page in wire.pages(Events(since=0)) for event in page.events] == ["key"]


def test_what_was_not_looked_at_yet_is_taken_back(limited: Daemon, wire: Wire) -> None:
    many = [Prepare(key=f"many-{n}") for n in range(1000)]
    with paused(limited, "gated"):
        number = wire.send(*many)
        taken = wire.send(Cancel(request=number))
        limited.wait_for(lambda status: status.queues["mailbox.gated"]["open"] == 2)
    outcomes: dict[int, Any] = {}
    ended = set()
    while len(ended) < 2:
        _, answered, status, body = wire.receive_frames()
        for outcome in decode_reply(body).outcomes:
            if answered == number:
                assert outcome.call not in outcomes
                outcomes[outcome.call] = error_of(outcome.error) if outcome.error else None
        if status == DONE:
            ended.add(answered)
    assert ended == {number, taken}
    assert sorted(outcomes) == list(range(1000))
    refused = [call for call, error in outcomes.items() if error is not None]
    assert len(refused) > 500
    assert all(isinstance(outcomes[call], Cancelled) for call in refused)
    made = {info.name for info in wire.one(Walk()).infos}
    assert made == {many[call].key for call, error in outcomes.items() if error is None}


def test_a_copy_that_is_taken_back_leaves_nothing(limited: Daemon, tree: str) -> None:
    place = limited.root_of("native") / "snapshots"
    copy = Prepare(key="copy", parent=tree)
    with limited.wire("native") as wire:
        # Removed is what has no record; its directory goes a moment after the reply.
        wire.one(Cleanup())
        before = set(os.listdir(place))
        number = wire.send(copy)
        _, progress = next(wire.parts(number, [copy]))
        assert isinstance(progress, Progress)
        assert progress.entries > 0
        assert len(os.listdir(place)) == len(before) + 1
        taken = wire.send(Cancel(request=number))
        results = replies(wire, {number: copy, taken: copy})
        assert isinstance(results[number], Cancelled)
        assert set(os.listdir(place)) == before
        wire.one(Prepare(key="copy"))
        wire.one(Remove(key="copy"))


@pytest.mark.timeout(30)
def test_what_its_caller_has_given_up_is_taken_back(limited: Daemon, wire: Wire, gate: Gate) -> None:
    with limited.client("gated", wire.namespace) as broker:
        with pytest.raises(DeadlineExceeded):
            broker.prepare("given-up", labels=gate.labels, timeout=0.2)
        limited.wait_for(lambda status: status.queues["mailbox.gated"]["open"] == 0)
        with pytest.raises(NotFound):
            broker.stat("given-up")
        broker.prepare("given-up")


# What a backend works on is held.


def test_a_key_in_the_making_is_taken_and_its_parent_is_in_use(limited: Daemon, wire: Wire, gate: Gate) -> None:
    wire.one(Prepare(key="making"))
    wire.one(Commit(name="parent", key="making"))
    wire.one(Prepare(key="other"))
    call = Prepare(key="key", parent="parent", labels=gate.labels)
    number = wire.send(call)
    gate.wait()
    with limited.wire("gated", wire.namespace) as other:
        for taking in (
            Prepare(key="key"),
            Prepare(key="key", parent="parent", labels=gate.labels),
            View(key="key"),
            Commit(name="key", key="other"),
        ):
            with pytest.raises(AlreadyExists):
                other.one(taking)
        with pytest.raises(FailedPrecondition, match="remove"):
            other.one(Remove(key="parent"))
        # It is not there yet for whoever asks, and everything else goes on.
        for asking in (Stat(key="key"), Mounts(key="key"), Remove(key="key"), Commit(name="c", key="key")):
            with pytest.raises(NotFound):
                other.one(asking)
        other.one(Prepare(key="sibling", parent="parent"))
        other.one(Remove(key="sibling"))
    gate.open()
    assert [type(result) for result in end_of(wire, number, call)] == [MountsAnswer]
    with pytest.raises(FailedPrecondition):
        wire.one(Remove(key="parent"))
    wire.one(Remove(key="key"))
    wire.one(Remove(key="parent"))


def test_what_is_being_committed_is_held(limited: Daemon, wire: Wire, gate: Gate) -> None:
    wire.one(Prepare(key="key", labels=gate.commit_labels))
    wire.one(Prepare(key="other"))
    call = Commit(name="name", key="key")
    number = wire.send(call)
    gate.wait()
    with limited.wire("gated", wire.namespace) as other:
        with pytest.raises(FailedPrecondition):
            other.one(Remove(key="key"))
        with pytest.raises(FailedPrecondition):
            other.one(Commit(name="another", key="key"))
        for taking in (Prepare(key="name"), Commit(name="name", key="other"), Prepare(key="key")):
            with pytest.raises(AlreadyExists):
                other.one(taking)
        assert other.one(Stat(key="key")).kind == "active"
        other.one(UsageOf(key="key"))
        assert other.one(Update(name="key", labels={"x": "y"})).labels == {"x": "y"}
    gate.open()
    assert [type(result) for result in end_of(wire, number, call)] == [Empty]
    assert wire.one(Stat(key="name")).kind == "committed"
    with pytest.raises(NotFound):
        wire.one(Stat(key="key"))


def test_calls_of_one_request_respect_each_other(wire: Wire, gate: Gate) -> None:
    gate.open()
    wire.one(Prepare(key="making"))
    wire.one(Commit(name="parent", key="making"))
    calls: list[Call] = [
        Prepare(key="key", parent="parent", labels=gate.labels),
        Remove(key="parent"),
        Prepare(key="key", labels=gate.labels),
        View(key="key"),
    ]
    results = wire.call(*calls)
    assert [type(result) for result in results] == [MountsAnswer, FailedPrecondition, AlreadyExists, AlreadyExists]


# Slow and silent peers.

FILES: Final = 5_000
FILE_BYTES: Final = 64_000


@pytest.fixture(scope="module")
def tree(limited: Daemon) -> str:
    """The name of a committed native snapshot of 320 MB in 5,000 files."""
    with limited.client("native") as broker:
        (mount,) = broker.prepare("making-tree")
        support.make_tree(Path(mount.source), FILES, FILE_BYTES)
        broker.commit("tree", "making-tree")
    return "tree"


def test_a_long_copy_holds_up_nobody(limited: Daemon, tree: str) -> None:
    copy = Prepare(key="long", parent=tree)
    busy: list[float] = []
    with limited.wire("native") as wire, limited.wire("native") as other, Bystander(limited, "gated"):
        idle = [_timed(lambda: other.one(Stat(key=tree))) for _ in range(200)]
        parts = wire.parts(wire.send(copy), [copy])
        _, part = next(parts)
        assert isinstance(part, Progress)
        with pytest.raises(AlreadyExists):
            other.one(Prepare(key="long", parent=tree))
        with pytest.raises(FailedPrecondition):
            other.one(Remove(key=tree))
        while isinstance(part, Progress):
            busy.append(_timed(lambda: other.one(Stat(key=tree))))
            while isinstance(part, Progress) and not wire.is_silent(0):
                _, part = next(parts)
        assert isinstance(part, MountsAnswer)
        other.one(Remove(key="long"))
    assert len(busy) > 50
    assert statistics.median(busy) < max(5 * statistics.median(idle), 0.02)
    assert max(busy) < UNHURT_S


def _timed(call: Callable[[], object]) -> float:
    begun = time.monotonic()
    call()
    return time.monotonic() - begun


def test_a_client_that_takes_no_replies_holds_up_nobody(limited: Daemon, bystander: Bystander) -> None:
    with limited.client("slow", "greedy") as broker:
        for number in range(30):
            broker.prepare(f"k{number}", labels={f"l{n}": "v" * 4000 for n in range(50)})
    before = limited.status().queues["router"]["undeliverable"]
    with (
        Bystander(limited, "slow") as other,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as greedy,
    ):
        greedy.linger = 0
        greedy.rcvhwm = 1
        greedy.connect(limited.endpoint)
        numbers = itertools.count(1)
        body = walk_body("greedy")

        def starved(status: StatusAnswer) -> bool:
            with contextlib.suppress(zmq.Again):
                greedy.send_multipart((REQUEST_VERSION, b"%d" % next(numbers), b"slow", body), zmq.NOBLOCK)
            return status.queues["router"]["undeliverable"] > before

        limited.wait_for(starved)
        other.wait_for_rounds()
        bystander.wait_for_rounds()
    limited.wait_for(lambda status: status.queues["mailbox.slow"]["open"] == 0)


def walk_body(namespace: str) -> bytes:
    """A request for everything there."""
    return encode(Request(calls=(Walk(),), namespace=namespace))


def test_a_subscriber_that_never_reads_holds_up_nobody(limited: Daemon) -> None:
    label = {"l": "v" * 4000}
    with (
        zmq.Context() as context,
        context.socket(zmq.SUB) as sleeper,
        limited.client("slow", "told") as broker,
        broker.events(since=None) as events,
    ):
        sleeper.linger = 0
        sleeper.rcvhwm = 1
        sleeper.subscribe(b"")
        sleeper.connect(limited.events_endpoint)
        broker.prepare("key", labels=label)
        assert sleeper.poll(20_000), "it is subscribed"
        first = events.poll(20)
        assert first is not None
        received = [first.sequence]
        for number in range(1500):
            broker.update("key", {**label, "number": str(number)})
        while len(received) < 1501:
            event = events.poll(20)
            assert event is not None
            received.append(event.sequence)
        assert received == list(range(received[0], received[0] + 1501))


def test_an_actor_that_hangs_is_killed_and_comes_back(limited: Daemon, wire: Wire, bystander: Bystander) -> None:
    wire.one(Prepare(key="kept"))
    restarts = limited.actor("gated").restarts
    with paused(limited, "gated") as pid:
        begun = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            wire.one(Stat(key="kept"))
        assert time.monotonic() - begun < SILENCE_MS / 1000 + UNHURT_S
    assert support.is_doubtful(caught.value)
    limited.wait_ready()
    actor = limited.actor("gated")
    assert actor.pid != pid
    assert actor.restarts == restarts + 1
    assert wire.one(Stat(key="kept")).name == "kept"
    bystander.wait_for_rounds()


def test_an_actor_that_does_not_get_ready_is_started_again(
    unstarted_daemon: Callable[..., Daemon], plugins: dict[str, str], tmp_path: Path
) -> None:
    options = {"gates": str(tmp_path), "open_gate": "open"}
    daemon = unstarted_daemon(
        {"gated": {"backend": "gated", "options": options}, "memory": {"backend": "memory"}},
        environment=plugins,
        supervisor={"start_timeout_ms": 3000},
    )
    daemon.start(wait=False)
    daemon.wait_for(lambda status: any(actor.restarts for actor in status.snapshotters))
    with Bystander(daemon, "memory"), daemon.wire("gated") as wire:
        with pytest.raises(Unavailable) as caught:
            wire.one(Stat(key="a"))
        assert caught.value.details["retry_after_ms"] >= 100
        (tmp_path / "open").touch()
        daemon.wait_ready()
        with pytest.raises(NotFound):
            wire.one(Stat(key="a"))
    daemon.stop()
