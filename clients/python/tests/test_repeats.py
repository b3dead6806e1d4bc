"""Requests that are repeated: one effect, whatever became of the broker, and an end to it when the patience is over."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio.to_thread
import fake_broker
import pytest
from fake_broker import FakeBroker, Received
from hypothesis import given
from hypothesis import strategies as st

import snapbroker
from snapbroker import aio, blocking, protocol, session
from snapbroker.contract import Info, Kind
from snapbroker.errors import (
    AlreadyExists,
    BrokerError,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from snapbroker.protocol import Fault, Outcome, Reply
from snapbroker.session import Answer, Exchange, Patience, Repeats

UNAVAILABLE = Fault(code="unavailable", message="restarting")
LONG_PAUSE = Fault(code="unavailable", message="restarting", details={"retry_after_ms": 5000})
"""Nothing is sent again as long as a test runs."""
DIED = Fault(code="unavailable", message="died with this call in its hands", details={"in_doubt": True})


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBroker]:
    for name in ("ENDPOINT", "EVENTS_ENDPOINT", "NAMESPACE", "SNAPSHOTTER"):
        monkeypatch.delenv(f"SNAPBROKER_{name}", raising=False)
    with FakeBroker(tmp_path) as fake:
        yield fake


@pytest.fixture
async def tasks(fake: FakeBroker) -> AsyncIterator[aio.Broker]:
    """The asyncio client."""
    async with aio.connect(fake.endpoint, snapshotter="overlayfs", timeout=20) as broker:
        yield broker


@pytest.fixture
def thread(fake: FakeBroker) -> Iterator[blocking.Broker]:
    """The blocking client."""
    with blocking.connect(fake.endpoint, snapshotter="overlayfs", timeout=20) as broker:
        yield broker


@pytest.fixture
def background() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor() as pool:
        yield pool.submit


async def seen(fake: FakeBroker, condition: Callable[[], object]) -> None:
    await anyio.to_thread.run_sync(fake.wait, condition)


def done_in_silence(received: Received) -> None:
    """What was asked for is done, and the reply is lost."""
    for index in range(len(received.calls)):
        received.fake.outcome(received, index)


def refuse(*refused: int, fault: Fault = UNAVAILABLE) -> fake_broker.Behaviour:
    """Answer all calls but these, which are refused; without numbers refuse the request as a whole."""

    def behave(received: Received) -> None:
        if not refused:
            received.part(Reply(error=fault), last=True)
            return
        received.done(
            *(
                Outcome(call=index, error=fault) if index in refused else received.fake.outcome(received, index)
                for index in range(len(received.calls))
            )
        )

    return behave


def restart(fake: FakeBroker) -> None:
    fake.stop()
    fake.start()


def verbs(fake: FakeBroker) -> list[tuple[str, str]]:
    """What has happened."""
    return [(event.verb, event.key) for event in fake.journal]


def check_repeated(fake: FakeBroker, count: int = 2) -> None:
    """All requests are the same but for their ids and the time that is left."""
    first, *others = fake.received
    assert len(others) == count - 1
    assert len({received.request_id for received in fake.received}) == count
    for other in others:
        assert (other.target, other.calls, other.request.token) == (first.target, first.calls, first.request.token)
        assert (other.request.namespace, other.request.atomic) == (first.request.namespace, first.request.atomic)
        assert 0 < other.request.timeout_ms <= first.request.timeout_ms


# A lost reply.


async def test_a_lost_reply_is_asked_for_again(tasks: aio.Broker, fake: FakeBroker):
    fake.script.append(done_in_silence)
    calls = [asyncio.create_task(tasks.prepare(f"k{number}")) for number in range(3)]
    await seen(fake, lambda: fake.received)
    await anyio.to_thread.run_sync(restart, fake)
    mounts = await asyncio.gather(*calls)
    assert [answer.fence for answer in mounts] == [1, 2, 3]
    assert verbs(fake) == [("prepare", f"k{number}") for number in range(3)]
    check_repeated(fake)
    assert tasks.statistics() == aio.Statistics(1, 3, under_way=0, unsent=0, stray=0, repeated=1)


def test_a_lost_reply_is_asked_for_again_by_a_thread(
    thread: blocking.Broker, fake: FakeBroker, background: Callable[..., Future[Any]]
):
    fake.script.append(done_in_silence)
    call = background(thread.prepare, "k")
    fake.wait(lambda: fake.received)
    restart(fake)
    assert call.result(20).fence == 1
    assert verbs(fake) == [("prepare", "k")]
    check_repeated(fake)


async def test_what_was_answered_already_is_kept(tasks: aio.Broker, fake: FakeBroker):
    """The repeat holds all calls, in their order; what the broker answers twice is told once."""

    def first_only(received: Received) -> None:
        received.part(Reply(outcomes=(received.fake.outcome(received, 0),)))
        received.fake.outcome(received, 1)

    fake.script.append(first_only)
    first, second = (asyncio.create_task(tasks.prepare(key)) for key in "ab")
    answered = await first
    restarting = anyio.to_thread.run_sync(restart, fake)
    await restarting
    assert (await second).fence == 2
    assert answered.fence == 1
    assert verbs(fake) == [("prepare", "a"), ("prepare", "b")]
    check_repeated(fake)


async def test_a_broker_away_for_longer_than_a_connection_may_take(fake: FakeBroker):
    async with aio.connect(fake.endpoint, snapshotter="overlayfs", connect_timeout=0.05, patience=20) as broker:
        fake.script.append(done_in_silence)
        call = asyncio.create_task(broker.prepare("k"))
        await seen(fake, lambda: fake.received)
        await anyio.to_thread.run_sync(fake.stop)
        while broker.statistics().repeated < 3:  # noqa: ASYNC110 - a client has no event for this
            await asyncio.sleep(0)
        fake.start()
        assert (await call).fence == 1
    assert verbs(fake) == [("prepare", "k")]


def test_a_broker_away_for_longer_than_a_connection_may_take_a_thread(
    fake: FakeBroker, background: Callable[..., Future[Any]]
):
    tries = threading.Semaphore(0)

    def chance() -> float:
        tries.release()
        return 0.5

    with blocking.connect(fake.endpoint, snapshotter="overlayfs", connect_timeout=0.05) as broker:
        broker._connection.patience = Patience(20, chance=chance)
        fake.script.append(done_in_silence)
        call = background(broker.prepare, "k")
        fake.wait(lambda: fake.received)
        fake.stop()
        for _ in range(3):
            assert tries.acquire(timeout=20)
        fake.start()
        assert call.result(20).fence == 1
    assert verbs(fake) == [("prepare", "k")]


# A refusal.


@pytest.mark.parametrize("fault", [UNAVAILABLE, DIED])
async def test_a_request_refused_as_a_whole(tasks: aio.Broker, fake: FakeBroker, fault: Fault):
    fake.script.extend([refuse(fault=fault)] * 3)
    await asyncio.gather(tasks.prepare("a"), tasks.stat("x"), tasks.prepare("b"), return_exceptions=True)
    assert verbs(fake) == [("prepare", "a"), ("prepare", "b")]
    check_repeated(fake, 4)


@pytest.mark.parametrize("code", ["unavailable", "cancelled"])
async def test_calls_refused_one_by_one(tasks: aio.Broker, fake: FakeBroker, code: str):
    fault = Fault(code=code, message="the snapshotter is stopping")
    fake.script.append(refuse(1, 2, fault=fault))
    results = await asyncio.gather(*(tasks.prepare(key) for key in "abc"), tasks.stat("x"), return_exceptions=True)
    assert [type(result) for result in results] == [snapbroker.Mounts] * 3 + [NotFound]
    assert sorted(verbs(fake)) == [("prepare", "a"), ("prepare", "b"), ("prepare", "c")]
    check_repeated(fake)


def test_refusals_of_a_thread(thread: blocking.Broker, fake: FakeBroker):
    fake.script.extend([refuse(), refuse(0), refuse(0, fault=Fault(code="cancelled", message="stopping"))])
    assert thread.prepare("k").fence == 1
    check_repeated(fake, 4)


def test_a_batch_of_a_thread(thread: blocking.Broker, fake: FakeBroker):
    fake.script.append(refuse(0, 2))
    with thread.batch() as batch:
        answers = [batch.prepare(key) for key in "abc"]
    assert [answer.result().fence for answer in answers] == [2, 1, 3]
    check_repeated(fake)


async def test_reads_are_repeated_without_a_token(tasks: aio.Broker, fake: FakeBroker):
    await tasks.prepare("k")
    fake.received.clear()
    fake.script.append(refuse())
    await asyncio.gather(tasks.stat("k"), tasks.mounts("k"), tasks.usage("k"))
    assert [received.request.token for received in fake.received] == [b"", b""]
    check_repeated(fake)


async def test_an_atomic_request_is_repeated_whole(tasks: aio.Broker, fake: FakeBroker):
    taken_back = Fault(code="cancelled", message="call 1 of the atomic request failed (unavailable)")
    fake.script.append(fake_broker.reply(Outcome(call=0, error=taken_back), Outcome(call=1, error=UNAVAILABLE)))
    async with tasks.batch(atomic=True) as batch:
        answers = [batch.prepare("a"), batch.prepare("b")]
    assert [answer.result().fence for answer in answers] == [1, 2]
    check_repeated(fake)


async def test_an_atomic_request_that_failed_for_a_reason_is_not_repeated(tasks: aio.Broker, fake: FakeBroker):
    await tasks.prepare("taken")
    with pytest.raises(AlreadyExists):  # noqa: PT012 - it is the end of the block that raises
        async with tasks.batch(atomic=True) as batch:
            batch.prepare("free")
            batch.prepare("taken")
    assert len(fake.received) == 2


@pytest.mark.parametrize("code", ["resource_exhausted", "deadline_exceeded", "internal", "already_exists"])
async def test_what_is_not_repeated(tasks: aio.Broker, fake: FakeBroker, code: str):
    fault = Fault(code=code, message="no")
    fake.script.extend([refuse(fault=fault), refuse(0, fault=fault)])
    for _ in range(2):
        with pytest.raises(BrokerError, match=r"^no$") as raised:
            await tasks.prepare("k")
        assert raised.value.code == code
        assert not raised.value.in_doubt
    assert len(fake.received) == 2


# Tokens.


async def test_each_request_with_a_change_has_a_token_of_its_own(tasks: aio.Broker, fake: FakeBroker):
    for call in (tasks.prepare("a"), tasks.commit("b", "a"), tasks.view("v", "b"), tasks.remove("v")):
        await call
    await tasks.update("b", {"x": "y"})
    async with aio.connect(fake.endpoint, snapshotter="overlayfs") as other:
        await other.prepare("c")
    tokens = {received.request.token for received in fake.received}
    assert len(tokens) == 6
    assert all(16 <= len(token) <= protocol.TOKEN_BYTES_MAX for token in tokens)


def test_threads_and_sockets_share_no_token(thread: blocking.Broker, fake: FakeBroker):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(thread.prepare, (f"k{number}" for number in range(64))))
    assert len({received.request.token for received in fake.received}) == 64


async def test_without_patience_there_is_no_token_and_no_repeat(fake: FakeBroker):
    async with aio.connect(fake.endpoint, snapshotter="overlayfs", patience=0) as broker:
        fake.script.extend([refuse(), refuse(0)])
        for _ in range(2):
            with pytest.raises(Unavailable, match=r"^restarting$"):
                await broker.prepare("k")
    assert [received.request.token for received in fake.received] == [b"", b""]


@pytest.mark.parametrize("patience", [-1, math.nan, "1"])
def test_a_patience_that_is_none(patience: Any):
    with pytest.raises(InvalidArgument, match="patience"):
        blocking.connect("ipc:///x", patience=patience)


# The end of the patience.


async def test_when_the_patience_is_over_the_last_error_is_told(fake: FakeBroker):
    fake.script.extend([refuse()] * 1000)
    async with aio.connect(fake.endpoint, snapshotter="overlayfs", patience=0.3) as broker:
        with pytest.raises(Unavailable, match=r"^restarting; repeated \d+ times in 0\.\d s$") as raised:
            await broker.prepare("k")
    assert not raised.value.in_doubt
    assert len(fake.received) > 1


def test_when_the_patience_of_a_thread_is_over(fake: FakeBroker):
    fake.script.extend([refuse(0)] * 1000)
    told = r"^restarting; repeated \d+ times in 0\.\d s$"
    with (
        blocking.connect(fake.endpoint, snapshotter="overlayfs", patience=0.3) as broker,
        pytest.raises(Unavailable, match=told) as raised,
    ):
        broker.prepare("k")
    assert not raised.value.in_doubt


@pytest.mark.parametrize("fault", [UNAVAILABLE, Fault(code="resource_exhausted", message="full")])
async def test_a_doubt_stays_until_there_is_an_outcome(fake: FakeBroker, fault: Fault):
    fake.script.extend([refuse(fault=DIED), *[refuse(fault=fault)] * 1000])
    async with aio.connect(fake.endpoint, snapshotter="overlayfs", patience=0.3) as broker:
        write, read = await asyncio.gather(broker.prepare("k"), broker.stat("k"), return_exceptions=True)
    assert isinstance(write, BrokerError)
    assert isinstance(read, BrokerError)
    assert write.code == read.code == fault.code
    assert "unknown whether the call took effect" in write.message
    assert (write.in_doubt, read.in_doubt) == (True, False)
    assert "unknown" not in read.message


async def test_an_outcome_ends_the_doubt(tasks: aio.Broker, fake: FakeBroker):
    await tasks.prepare("taken")
    fake.script.append(refuse(fault=DIED))
    with pytest.raises(AlreadyExists, match=r"^snapshot 'taken' exists$") as raised:
        await tasks.prepare("taken")
    assert not raised.value.in_doubt


async def test_a_broker_that_does_not_come_back(fake: FakeBroker):
    async with aio.connect(fake.endpoint, snapshotter="overlayfs", patience=0.3) as broker:
        fake.script.append(fake_broker.silence)
        calls = [asyncio.create_task(call) for call in (broker.prepare("k"), broker.stat("k"))]
        await seen(fake, lambda: fake.received)
        fake.stop()
        write, read = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(write, Unavailable)
    assert isinstance(read, Unavailable)
    assert "start snapbrokerd" in write.message
    assert "; repeated " in write.message
    assert (write.in_doubt, read.in_doubt) == (True, False)
    assert "unknown" not in read.message


def test_a_broker_that_does_not_come_back_to_a_thread(fake: FakeBroker, background: Callable[..., Future[Any]]):
    with blocking.connect(fake.endpoint, snapshotter="overlayfs", patience=0.3) as broker:
        fake.script.append(fake_broker.silence)
        call = background(broker.prepare, "k")
        fake.wait(lambda: fake.received)
        fake.stop()
        with pytest.raises(Unavailable, match=r"start snapbrokerd.*; repeated .*unknown whether") as raised:
            call.result(20)
    assert raised.value.in_doubt


async def test_the_timeout_bounds_the_repeats(tasks: aio.Broker, fake: FakeBroker):
    fake.script.extend([refuse()] * 1000)
    started = time.monotonic()
    with pytest.raises(Unavailable, match="restarting"):
        await tasks.prepare("k", timeout=0.3)
    assert time.monotonic() - started < 5
    fake.script.clear()
    fake.script.extend([refuse(), fake_broker.silence])
    with pytest.raises(DeadlineExceeded, match="unknown whether") as raised:
        await tasks.prepare("k", timeout=0.3)
    assert raised.value.in_doubt


def test_the_timeout_bounds_the_repeats_of_a_thread(thread: blocking.Broker, fake: FakeBroker):
    fake.script.extend([refuse(), fake_broker.silence])
    with pytest.raises(DeadlineExceeded, match="unknown whether"):
        thread.prepare("k", timeout=0.3)
    fake.wait(lambda: fake.cancelled() == [fake.received[1].request_id])


# Callers that give up.


async def pausing(tasks: aio.Broker, fake: FakeBroker) -> None:
    """Wait until the first request was refused and its repeat is waited for."""
    await seen(fake, lambda: fake.received)
    under_way = tasks._connection._under_way
    while under_way[fake.received[0].request_id].sent:  # noqa: ASYNC110 - a client has no event for this
        await asyncio.sleep(0)


async def test_a_caller_cancelled_in_a_pause_ends_at_once_and_nothing_is_sent(tasks: aio.Broker, fake: FakeBroker):
    fake.script.append(refuse(fault=LONG_PAUSE))
    call = asyncio.create_task(tasks.prepare("k"))
    await pausing(tasks, fake)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert tasks.statistics().under_way == 0
    await tasks.status()
    assert [received.verbs for received in fake.received] == [["prepare"], ["status"]]


async def test_a_caller_cancelled_in_a_pause_is_taken_back_behind_the_repeat_for_the_others(
    tasks: aio.Broker, fake: FakeBroker
):
    pause = Fault(code="unavailable", message="restarting", details={"retry_after_ms": 300})
    fake.script.extend([refuse(fault=pause), fake_broker.silence])
    calls = [asyncio.create_task(tasks.prepare(f"k{number}")) for number in range(3)]
    await pausing(tasks, fake)
    calls[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await calls[1]
    await seen(fake, lambda: fake.cancelled())
    again = fake.received[1]
    assert again.calls == fake.received[0].calls
    assert fake.requests("cancel")[0].calls[0] == protocol.Cancel(request=again.request_id, calls=(1,))
    fake.run(lambda: again.done(again.fake.outcome(again, 0), again.fake.outcome(again, 2)))
    assert [(await calls[number]).fence for number in (0, 2)] == [1, 2]


async def test_a_workspace_cancelled_while_its_prepare_pauses_leaves_nothing(tasks: aio.Broker, fake: FakeBroker):
    """What others prepare in the same turn is repeated; what the workspace prepared was removed before."""
    first, other = asyncio.Event(), Fault(code="unavailable", message="x", details={"retry_after_ms": 300})
    fake.script.extend([refuse(fault=other), refuse(fault=other)])

    async def build() -> None:
        first.set()
        async with tasks.workspace():
            pytest.fail("nothing was answered")

    building = asyncio.create_task(build())
    neighbour = asyncio.create_task(tasks.prepare("neighbour"))
    await seen(fake, lambda: len(fake.received) == 2)
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    await neighbour
    assert [key for _, key in fake.snapshots] == ["neighbour"]


async def test_closing_ends_a_pause(fake: FakeBroker):
    fake.script.append(refuse(fault=LONG_PAUSE))
    async with aio.connect(fake.endpoint, snapshotter="overlayfs") as broker:
        call = asyncio.create_task(broker.prepare("k"))
        await seen(fake, lambda: fake.received)
    with pytest.raises(Unavailable, match="closed"):
        await call


def test_closing_ends_the_pause_of_a_thread(
    thread: blocking.Broker, fake: FakeBroker, background: Callable[..., Future[Any]]
):
    paused = threading.Event()

    def chance() -> float:
        paused.set()
        return 0.0

    thread._connection.patience = Patience(10, chance=chance)
    fake.script.append(refuse(fault=LONG_PAUSE))
    call = background(thread.prepare, "k")
    assert paused.wait(20)
    started = time.monotonic()
    thread.close()
    with pytest.raises(FailedPrecondition, match="closed"):
        call.result(20)
    assert time.monotonic() - started < 4


# Walks.


def broken_off(received: Received) -> None:
    """One page of a walk, and no end."""
    page = protocol.WalkPage(infos=(Info("k0", Kind.ACTIVE),), sequence=3, next="k0")
    received.part(Reply(outcomes=(Outcome(call=0, ok=fake_broker.encoded(page)),)))


async def test_a_walk_goes_on_behind_its_last_page(tasks: aio.Broker, fake: FakeBroker):
    await asyncio.gather(*(tasks.prepare(f"k{number}") for number in range(3)))
    fake.script.extend([refuse(), broken_off])
    walk = tasks.walk()
    assert (await anext(walk)).name == "k0"
    await anyio.to_thread.run_sync(restart, fake)
    assert [info.name async for info in walk] == ["k1", "k2"]
    assert [received.calls[0].after for received in fake.requests("walk")] == ["", "", "k0"]  # type: ignore[union-attr]


def test_a_walk_of_a_thread_goes_on_behind_its_last_page(thread: blocking.Broker, fake: FakeBroker):
    for number in range(3):
        thread.prepare(f"k{number}")
    fake.script.extend([refuse(), broken_off])
    walk = thread.walk()
    assert next(walk).name == "k0"
    restart(fake)
    assert [info.name for info in walk] == ["k1", "k2"]
    assert [received.calls[0].after for received in fake.requests("walk")] == ["", "", "k0"]  # type: ignore[union-attr]


async def test_a_walk_that_stays_away_ends(fake: FakeBroker):
    fake.script.extend([refuse()] * 1000)
    async with aio.connect(fake.endpoint, snapshotter="overlayfs", patience=0.2) as broker:
        with pytest.raises(Unavailable, match="restarting"):
            await anext(broker.walk())
    assert len(fake.received) > 1


def test_a_walk_of_a_thread_that_stays_away_ends(fake: FakeBroker):
    fake.script.extend([refuse()] * 1000)
    with blocking.connect(fake.endpoint, snapshotter="overlayfs", patience=0.2) as broker:
        walk = broker.walk()
        with pytest.raises(Unavailable, match="restarting"):
            next(walk)
    assert len(fake.received) > 1


# The pace.


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def unavailable(retry_after_ms: object = None) -> Unavailable:
    return Unavailable("away", {} if retry_after_ms is None else {"retry_after_ms": retry_after_ms})


def test_pauses_double_to_a_second():
    clock = Clock()
    repeats = Repeats(Patience(100, clock, chance=lambda: 1.0), math.inf)
    assert [repeats.pause(unavailable()) for _ in range(7)] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    repeats.count = 10**6
    assert repeats.pause(unavailable()) == 1.0


@given(chance=st.floats(0, 1, exclude_max=True), asked=st.integers(0, 10_000), count=st.integers(0, 50))
def test_a_pause_is_any_part_of_the_longest_on_top_of_what_the_broker_asks(chance: float, asked: int, count: int):
    repeats = Repeats(Patience(100, Clock(), chance=lambda: chance), math.inf)
    repeats.count = count
    pause = repeats.pause(unavailable(asked))
    least = min(asked / 1000, session.RETRY_AFTER_SECONDS_MAX)
    assert pause == pytest.approx(least + chance * min(1.0, 0.05 * 2**count))


@pytest.mark.parametrize("asked", ["100", -5, math.nan, None, [1]])
def test_a_broker_that_asks_nonsense_is_not_heeded(asked: object):
    assert session.retry_after(unavailable(asked)) == 0.0


@pytest.mark.parametrize(("patience", "deadline"), [(10.0, math.inf), (math.inf, 1010.0), (10.0, 1010.0)])
def test_no_repeat_comes_too_late(patience: float, deadline: float):
    clock = Clock()
    repeats = Repeats(Patience(patience, clock, chance=lambda: 1.0), deadline)
    clock.now = 1009.94
    assert repeats.pause(unavailable()) == 0.05
    assert repeats.pause(unavailable(10)) is None
    assert repeats.count == 1
    clock.now = 1010.0
    assert repeats.pause(unavailable()) is None
    assert repeats.told() == "; repeated once in 10.0 s"


def test_a_token_is_of_its_connection_and_its_request():
    drawn = itertools.count()
    patiences = [Patience(1, entropy=lambda size: bytes([next(drawn)]) * size) for _ in range(2)]
    tokens = []
    for patience in (*patiences, *patiences):
        exchange = Exchange(b"overlayfs", "default", 60.0)
        exchange.add(protocol.Remove(key="k"), session.read_nothing, Answer())
        patience.equip(exchange)
        tokens.append(exchange.token)
    assert len(set(tokens)) == 4
    assert [token[:16] for token in tokens] == [b"\0" * 16, b"\1" * 16] * 2


# Replies to requests that may be repeated, without a socket.


@given(st.data())
def test_every_call_ends_once_however_often_the_request_is_repeated(data: st.DataObject):
    """A model: in each try any calls are answered, refused or given up; what has an outcome keeps it."""
    count = data.draw(st.integers(1, 6))
    patience = Patience(1000, Clock(), chance=lambda: 0.0)
    exchange = Exchange(b"overlayfs", "default", math.inf)
    answers: list[Answer[Info]] = [Answer() for _ in range(count)]
    for number, answer in enumerate(answers):
        exchange.add(protocol.Stat(key=f"k{number}"), session.read_info, answer)
    patience.equip(exchange)
    for attempt in itertools.count():
        settled = {number for number, answer in enumerate(answers) if answer.done()}
        refused = data.draw(st.sets(st.sampled_from(range(count)))) if attempt < 4 else set()
        outcomes = [
            Outcome(call=number, error=UNAVAILABLE)
            if number in refused
            else Outcome(call=number, ok=fake_broker.encoded(Info(f"{number} of {attempt}", Kind.ACTIVE)))
            for number in data.draw(st.permutations(range(count)))
        ]
        before = {number: answers[number].result() for number in settled}
        assert exchange.receive(protocol.encode(Reply(outcomes=tuple(outcomes))), last=True)
        assert all(answers[number].result() == found for number, found in before.items())
        assert {number for number, answer in enumerate(answers) if not answer.done()} == refused - settled
        if not refused - settled:
            assert exchange.failure is None
            return
        assert exchange.failure is not None
        assert exchange.pause(patience, exchange.failure) is not None


def test_a_reply_that_leaves_a_call_open_is_malformed_whatever_is_refused():
    exchange = Exchange(b"overlayfs", "default", 60.0)
    for key in "ab":
        exchange.add(protocol.Stat(key=key), session.read_info, Answer())
    Patience(10).equip(exchange)
    with pytest.raises(Internal, match="without an outcome"):
        exchange.receive(protocol.encode(Reply(outcomes=(Outcome(call=0, error=UNAVAILABLE),))), last=True)


def test_a_call_taken_back_and_refused_is_taken_back_again():
    exchange = Exchange(b"overlayfs", "default", 60.0)
    answers: list[Answer[None]] = [Answer(), Answer(), Answer()]
    for number, answer in enumerate(answers):
        exchange.add(protocol.Remove(key=f"k{number}"), session.read_nothing, answer)
    Patience(10).equip(exchange)
    for answer in answers[:2]:
        answer.set_exception(ValueError())
        exchange.abandon()
    taken_back = Fault(code="cancelled", message="taken back")
    exchange.receive(protocol.encode(Reply(outcomes=(Outcome(call=0, error=taken_back),))), last=False)
    assert exchange.receive(protocol.encode(Reply(error=UNAVAILABLE)), last=True)
    assert exchange.failure is not None
    assert sorted(exchange.given_up) == [0, 1]
    assert not exchange.forsaken
    answers[2].set_exception(ValueError())
    exchange.abandon()
    assert exchange.forsaken


@pytest.mark.parametrize("error", [ResourceExhausted, Cancelled, DeadlineExceeded])
def test_only_a_change_can_be_in_doubt(error: type[BrokerError]):
    exchange = Exchange(b"overlayfs", "default", 60.0)
    answers: list[Answer[Any]] = [Answer(), Answer()]
    exchange.add(protocol.Remove(key="k"), session.read_nothing, answers[0])
    exchange.add(protocol.Stat(key="k"), session.read_info, answers[1])
    exchange.doubt = True
    exchange.fail(error("no"))
    found = [answer.error() for answer in answers]
    assert [(type(each), each.in_doubt) for each in found if isinstance(each, BrokerError)] == [
        (error, True),
        (error, False),
    ]
    assert str(found[1]) == "no"
