"""While broker or snapshotter is away calls wait, no longer than they may, and none is done twice or said to be."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from bridges import REPLY_S, Bridge, Client
from grpc import StatusCode

from snapbroker.contract import Info, Kind, Mount
from snapbroker.errors import (
    BrokerError,
    Cancelled,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from snapbroker_containerd import service
from snapbroker_containerd.patience import Limits, Patience, Span, Undecided, is_lost
from tests.daemon import support
from tests.harness import Daemon

LOST = Unavailable("the connection broke: it is unknown whether the call took effect")
REFUSED = Unavailable("the snapshotter is starting", {"retry_after_ms": 100})
QUICK = Limits(wait_ms=200, pause_initial_ms=1, pause_max_ms=4)
SPAN = Span(100, 200)


def answering(*outcomes: Any) -> Callable[..., Awaitable[Any]]:
    """A call that has these outcomes, one after the other, the last one again and again."""
    left = list(outcomes)

    async def call(*_: Any) -> Any:
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(outcome, BrokerError):
            raise outcome
        return outcome

    return call


def never(*_: Any) -> Awaitable[Any]:
    raise AssertionError("not to be called")


# What is repeated, and what is looked for.


@pytest.mark.parametrize("error", [REFUSED, ResourceExhausted("full", {"retry_after_ms": 2}), Cancelled("stopping")])
async def test_what_was_refused_is_repeated_without_a_look(error: BrokerError) -> None:
    patience = Patience(QUICK)
    assert await patience.repeat(error, answering(error, error, "done"), look=never) == "done"
    assert patience.statistics() == {"repeated": 3, "recovered": 0, "given_up": 0}


async def test_what_was_lost_and_took_effect_is_not_repeated() -> None:
    patience = Patience(QUICK)
    assert await patience.repeat(LOST, never, sent=1, look=answering("found"), what=("s", "key")) == "found"
    assert patience.statistics() == {"repeated": 1, "recovered": 1, "given_up": 0}


async def test_what_was_lost_without_effect_is_repeated() -> None:
    assert await Patience(QUICK).repeat(LOST, answering("done"), sent=1, look=answering(None)) == "done"


async def test_the_look_is_repeated_until_it_is_answered() -> None:
    """Until then nothing is known, whatever refuses the look."""
    look = answering(REFUSED, LOST, "found")
    assert await Patience(QUICK).repeat(LOST, never, sent=1, look=look) == "found"


async def test_a_read_that_was_lost_is_repeated() -> None:
    assert await Patience(QUICK).repeat(LOST, answering(LOST, "read")) == "read"


async def test_the_span_is_that_of_the_lost_attempt() -> None:
    spans: list[Span] = []

    async def look(span: Span) -> str | None:
        spans.append(span)
        return "found" if len(spans) == 2 else None

    before = time.time_ns()
    assert await Patience(QUICK).repeat(LOST, answering(LOST), sent=before, look=look) == "found"
    first, second = spans
    assert before == first.since <= first.until < second.since <= second.until <= time.time_ns()


async def test_another_error_ends_it() -> None:
    with pytest.raises(NotFound):
        await Patience(QUICK).repeat(REFUSED, answering(REFUSED, NotFound("gone"), "late"))


async def test_two_callers_of_one_lost_key_are_both_told_so() -> None:
    patience = Patience(QUICK)
    calls = [
        patience.repeat(LOST, never, sent=1, look=answering("found"), what=("s", key)) for key in ("key", "key", "own")
    ]
    one, two, other = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(one, Undecided)
    assert isinstance(two, Undecided)
    assert other == "found"


async def test_two_removals_of_one_lost_key_are_both_done() -> None:
    patience = Patience(QUICK)
    calls = [patience.repeat(LOST, never, sent=1, look=answering(True)) for _ in range(2)]
    assert await asyncio.gather(*calls) == [True, True]


@pytest.mark.parametrize(
    ("error", "look", "words"),
    [
        (REFUSED, None, "is starting (repeated for 50 ms)"),
        (LOST, answering(REFUSED), "whether the first attempt took effect is unknown"),
        (LOST, answering(LOST), "unknown whether the call took effect (repeated for 50 ms)"),
        (Cancelled("stopping"), None, "stopping (repeated"),
    ],
)
async def test_it_ends_in_time(error: BrokerError, look: Any, words: str) -> None:
    patience = Patience(Limits(wait_ms=50, pause_initial_ms=1, pause_max_ms=4))
    begun = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        await patience.repeat(error, answering(error), sent=1, look=look)
    assert words in caught.value.message
    assert time.monotonic() - begun < support.UNHURT_S
    assert patience.statistics()["given_up"] == 1


async def test_no_patience_is_no_repetition() -> None:
    with pytest.raises(Unavailable):
        await Patience(Limits(wait_ms=0)).repeat(REFUSED, never)


async def test_pauses_double_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def note(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", note)
    patience = Patience(Limits(pause_initial_ms=50, pause_max_ms=1000), random.Random(1))
    await patience.repeat(REFUSED, answering(*[REFUSED] * 7, "done"))
    for pause, longest in zip(pauses, (0.05, 0.1, 0.2, 0.4, 0.8, 1, 1, 1), strict=True):
        assert longest / 2 <= pause <= longest
    pauses.clear()
    overloaded = ResourceExhausted("full", {"retry_after_ms": 700})
    await patience.repeat(overloaded, answering("done"))
    assert pauses == [0.7]


def test_what_the_client_doubts_is_lost() -> None:
    doubted = Unavailable("the connection broke")
    assert not is_lost(doubted)
    doubted.in_doubt = True
    assert is_lost(doubted)
    assert is_lost(Unavailable("the snapshotter died; whether it took effect is unknown"))


class Found:
    """A broker that has one snapshot, or none."""

    def __init__(self, info: Info | None) -> None:
        self.info = info

    async def stat(self, key: str) -> Info:
        if self.info is None:
            raise NotFound(key)
        return self.info

    async def mounts(self, key: str) -> list[Mount]:
        return [Mount("bind", "/x")]


def found(kind: Kind, created: int, parent: str = "base") -> Any:
    return Found(Info("key", kind, parent, {}, created, created))


@pytest.mark.parametrize(
    ("broker", "ours"),
    [
        (found(Kind.ACTIVE, 150), True),
        (found(Kind.ACTIVE, 100), True),
        (found(Kind.ACTIVE, 200), True),
        (found(Kind.ACTIVE, 99), False),
        (found(Kind.ACTIVE, 201), False),
        (found(Kind.VIEW, 150), False),
        (found(Kind.COMMITTED, 150), False),
        (found(Kind.ACTIVE, 150, "other"), False),
        (Found(None), False),
    ],
)
async def test_what_a_lost_prepare_has_made(broker: Any, ours: bool) -> None:
    mounts = await service.created(broker, SPAN, Kind.ACTIVE, "key", "base")
    assert mounts == ([Mount("bind", "/x")] if ours else None)


@pytest.mark.parametrize(
    ("broker", "ours"),
    [
        (found(Kind.COMMITTED, 150), True),
        (found(Kind.COMMITTED, 99), None),
        (found(Kind.ACTIVE, 150), None),
        (Found(None), None),
    ],
)
async def test_what_a_lost_commit_has_made(broker: Any, ours: bool | None) -> None:
    assert await service.committed(broker, SPAN, "key") is ours


async def test_what_a_lost_remove_has_left() -> None:
    assert await service.removed(Found(None), SPAN, "key") is True  # type: ignore[arg-type]
    assert await service.removed(found(Kind.ACTIVE, 99), SPAN, "key") is None
    with pytest.raises(Undecided):
        await service.removed(found(Kind.ACTIVE, 150), SPAN, "key")


# With a broker that goes and comes back.


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A broker of the test's own."""
    daemon = Daemon({"memory": {}, "native": {}})
    try:
        yield daemon
        if daemon.process is not None:
            daemon.stop()
    finally:
        daemon.remove()


@pytest.fixture
def bridge(daemon: Daemon) -> Iterator[Bridge]:
    """Before a broker that does not run yet."""
    with Bridge(daemon.place, daemon.endpoint, log_format="json", patience={"wait_ms": 20_000}) as bridge:
        yield bridge


@pytest.mark.root
def test_a_broker_that_is_not_there_yet_is_waited_for(daemon: Daemon, bridge: Bridge) -> None:
    with bridge.client("native") as client:
        call = client.begin("Prepare", key="key")
        daemon.start()
        assert call.result(REPLY_S).mounts
        assert client.names() == ["key"]


def test_a_broker_that_does_not_come_is_not_waited_for_any_longer(daemon: Daemon, tmp_path: Path) -> None:
    """C141: the call fails; nothing has to be started anew when the broker is there at last."""
    place = daemon.place / "short"
    place.mkdir()
    with Bridge(place, daemon.endpoint, patience={"wait_ms": 300}) as bridge, bridge.client("memory") as client:
        begun = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            client.stat("key")
        assert caught.value.code() == StatusCode.UNAVAILABLE
        assert "start snapbrokerd" in caught.value.details()
        assert time.monotonic() - begun < 1 + support.UNHURT_S
        daemon.start()
        assert client.names() == []


@pytest.mark.root
@pytest.mark.parametrize("victim", ["broker", "snapshotter"])
def test_nothing_is_lost_or_done_twice_when_it_is_killed_under_load(
    daemon: Daemon, bridge: Bridge, victim: str
) -> None:
    """Every call does well, and the journal has each change exactly once."""
    daemon.start()
    halt = threading.Event()
    callers = [Caller(bridge, f"caller-{number}", halt) for number in range(16)]
    for caller in callers:
        caller.start()
    for _ in range(2):
        before = sum(caller.rounds for caller in callers)
        support.wait_until(
            lambda before=before: (
                sum(caller.rounds for caller in callers) > before + 50 or any(caller.error for caller in callers)
            ),
            "calls under load",
        )
        if victim == "broker":
            daemon.kill()
            daemon.start()
        else:
            daemon.kill(actor="native")
    halt.set()
    for caller in callers:
        caller.join(REPLY_S)
        assert not caller.is_alive()
        if caller.error is not None:
            raise caller.error
    with daemon.client("native", "containerd") as broker:
        assert list(broker.walk()) == []
        seen = [(event.verb, event.key) for event in broker.events(0, follow=False)]
    wanted = [
        change
        for caller in callers
        for number in range(caller.rounds)
        for change in (
            ("prepare", f"{caller.name}-{number}"),
            ("commit", f"{caller.name}-{number}"),
            ("remove", f"{caller.name}-{number}-committed"),
        )
    ]
    assert sorted(seen) == sorted(wanted)


class Caller(threading.Thread):
    """Prepares, commits and removes, one after the other, and takes no error."""

    def __init__(self, bridge: Bridge, name: str, halt: threading.Event) -> None:
        super().__init__(name=name)
        self.rounds = 0
        self.error: BaseException | None = None
        self._bridge = bridge
        self._halt = halt

    def run(self) -> None:
        """Go on until told to stop."""
        try:
            with self._bridge.client("native") as client:
                while not self._halt.is_set():
                    self._round(client, f"{self.name}-{self.rounds}")
                    self.rounds += 1
        except BaseException as error:
            self.error = error

    @staticmethod
    def _round(client: Client, key: str) -> None:
        assert client.prepare(key)
        client.commit(f"{key}-committed", key)
        client.remove(f"{key}-committed")
