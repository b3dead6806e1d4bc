"""The asyncio client against a broker on a real socket: coalescing, cancellation, and all that goes wrong."""

from __future__ import annotations

import asyncio
import math
import os
import select
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import fake_broker
import pytest
import zmq
from fake_broker import FakeBroker, Received

import snapbroker
from snapbroker import protocol, session, sockets, subscriber
from snapbroker.aio import Broker
from snapbroker.contract import Event, Info, Kind, Usage
from snapbroker.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Unavailable,
)
from snapbroker.protocol import Outcome, Progress, Reply


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBroker]:
    for name in ("ENDPOINT", "EVENTS_ENDPOINT", "NAMESPACE", "SNAPSHOTTER"):
        monkeypatch.delenv(f"SNAPBROKER_{name}", raising=False)
    with FakeBroker(tmp_path) as fake:
        yield fake


@pytest.fixture
async def broker(fake: FakeBroker) -> AsyncIterator[Broker]:
    async with snapbroker.aio.connect(fake.endpoint, snapshotter="overlayfs", timeout=20) as broker:
        yield broker


@pytest.fixture
async def impatient(fake: FakeBroker) -> AsyncIterator[Broker]:
    """A client that repeats nothing."""
    async with snapbroker.aio.connect(fake.endpoint, snapshotter="overlayfs", timeout=20, patience=0) as broker:
        yield broker


async def seen(fake: FakeBroker, condition: Callable[[], object]) -> None:
    """Wait for the broker without holding up the loop."""
    await anyio.to_thread.run_sync(fake.wait, condition)


def mounted() -> str:
    return Path("/proc/self/mountinfo").read_text()


# The verbs.


async def test_a_layer_is_unpacked_a_build_runs_somebody_looks(broker: Broker, fake: FakeBroker):
    mounts = await broker.prepare("unpack-1", labels={"a": "b"})
    assert mounts == [snapbroker.Mount("bind", f"{fake.directory}/files/unpack-1", ("rbind", "rw"))]
    assert await broker.mounts("unpack-1") == mounts
    assert await broker.commit("layer-1", "unpack-1", labels={"c": "d"}, sync=True) is None
    layer = await broker.stat("layer-1")
    assert (layer.name, layer.kind, layer.labels) == ("layer-1", Kind.COMMITTED, {"c": "d"})
    await broker.prepare("job-42", "layer-1")
    await broker.remove("job-42")
    assert (await broker.view("look", parent="layer-1"))[0].options == ("rbind", "ro")
    with pytest.raises(FailedPrecondition, match="child"):
        await broker.remove("layer-1")
    assert (await broker.update("layer-1", {"x": "y"}, ["labels.x"])).labels == {"c": "d", "x": "y"}
    assert await broker.usage("layer-1") == Usage(1, 4096 * 7)
    assert await broker.cleanup() is None
    assert (await broker.status()).version == "0"


async def test_timeout_and_namespace_travel(fake: FakeBroker):
    async with snapbroker.aio.connect(fake.endpoint, snapshotter="overlayfs", namespace="builds", timeout=7) as broker:
        await broker.prepare("k")
        await broker.stat("k", timeout=1.5)
        with pytest.raises(NotFound):
            await broker.snapshotter("overlayfs", namespace="other").stat("k")
    assert [(r.request.namespace, r.request.timeout_ms) for r in fake.received] == [
        ("builds", 7000),
        ("builds", 1500),
        ("other", 7000),
    ]


async def test_the_only_snapshotter_is_found(fake: FakeBroker):
    async with snapbroker.aio.connect(fake.endpoint) as broker:
        assert await broker.snapshotter_name() == "overlayfs"
        await broker.prepare("k")
    assert [received.target for received in fake.received] == [b"", b"overlayfs"]


async def test_of_several_snapshotters_one_must_be_named(tmp_path: Path):
    with FakeBroker(tmp_path, names=("native", "btrfs")) as fake:
        async with snapbroker.aio.connect(fake.endpoint) as broker:
            with pytest.raises(InvalidArgument, match="native, btrfs"):
                await broker.prepare("k")
            await broker.snapshotter("btrfs").prepare("k")
            with pytest.raises(NotFound, match="no snapshotter 'zfs'"):
                await broker.snapshotter("zfs").prepare("k")


async def test_an_endpoint_that_is_none():
    with pytest.raises(InvalidArgument, match="endpoint"):
        async with snapbroker.aio.connect("nonsense://x"):
            pass
    with pytest.raises(InvalidArgument, match="calls_per_request"):
        async with snapbroker.aio.connect("ipc:///x", calls_per_request=1025):
            pass


# Coalescing.


async def test_calls_of_one_turn_travel_together(broker: Broker, fake: FakeBroker):
    await asyncio.gather(*(broker.prepare(f"k{number}") for number in range(5)))
    infos = await asyncio.gather(*(broker.stat(f"k{number}") for number in range(5)))
    assert [info.name for info in infos] == [f"k{number}" for number in range(5)]
    assert [received.verbs for received in fake.received] == [["prepare"] * 5, ["stat"] * 5]
    assert broker.statistics() == snapbroker.aio.Statistics(requests=2, calls=10, under_way=0, unsent=0, stray=0)


async def test_a_request_has_its_most_calls(fake: FakeBroker):
    async with snapbroker.aio.connect(fake.endpoint, snapshotter="overlayfs", calls_per_request=4) as broker:
        await asyncio.gather(*(broker.prepare(f"k{number}") for number in range(10)))
    assert [len(received.calls) for received in fake.received] == [4, 4, 2]


async def test_what_differs_in_snapshotter_namespace_or_timeout_travels_apart(broker: Broker, fake: FakeBroker):
    await asyncio.gather(
        broker.prepare("a"),
        broker.prepare("b"),
        broker.snapshotter("overlayfs", namespace="other").prepare("a"),
        broker.prepare("c", timeout=3),
        broker.prepare("d", timeout=3),
        broker.status(),
    )
    requests = {(r.target, r.request.namespace, r.request.timeout_ms): len(r.calls) for r in fake.received}
    assert requests == {
        (b"overlayfs", "default", 20000): 2,
        (b"overlayfs", "other", 20000): 1,
        (b"overlayfs", "default", 3000): 2,
        (b"", "", 20000): 1,
    }


async def test_each_call_has_its_own_error_and_order_does_not_matter(broker: Broker, fake: FakeBroker):
    await broker.prepare("good")
    fake.script.append(fake_broker.out_of_order)
    results = await asyncio.gather(*(broker.stat(key) for key in ("x", "good", "y", "good")), return_exceptions=True)
    assert [type(result) for result in results] == [NotFound, Info, NotFound, Info]
    assert "'x'" in str(results[0])
    assert "'y'" in str(results[2])


async def test_a_call_that_cannot_be_sent_fails_alone(broker: Broker, fake: FakeBroker):
    await broker.prepare("k")
    results = await asyncio.gather(
        broker.stat("k"), broker.stat("\udc80"), broker.stat("k"), broker.stat(7), broker.stat("k"),  # type: ignore[arg-type]
        return_exceptions=True,
    )  # fmt: skip
    assert [type(result) for result in results] == [Info, InvalidArgument, Info, InvalidArgument, Info]


async def test_calls_that_are_too_long_together_are_sent_apart(broker: Broker, fake: FakeBroker):
    labels = {f"l{number}": "x" * 4000 for number in range(1000)}
    await asyncio.gather(*(broker.prepare(f"k{number}", labels=labels) for number in range(6)))
    assert len(fake.snapshots) == 6
    assert len(fake.received) == 2


async def test_ten_thousand_callers(broker: Broker, fake: FakeBroker):
    await broker.prepare("k")
    infos = await asyncio.gather(*(broker.stat("k") for _ in range(10_000)))
    assert {info.name for info in infos} == {"k"}
    assert len(fake.received) == 1 + math.ceil(10_000 / session.READS_PER_REQUEST)


# Cancellation and timeouts.


async def test_a_cancelled_call_is_taken_back(broker: Broker, fake: FakeBroker):
    fake.script.append(fake_broker.silence)
    with anyio.move_on_after(0.05):
        await broker.prepare("k")
    await seen(fake, lambda: fake.cancelled() == [fake.received[0].request_id])
    assert fake.requests("cancel")[0].target == b"overlayfs"
    assert broker.statistics().under_way == 0


async def test_a_call_of_many_is_taken_back_alone_and_the_request_with_the_last_of_its_callers(
    broker: Broker, fake: FakeBroker
):
    fake.script.append(fake_broker.silence)
    calls = [asyncio.create_task(broker.prepare(f"k{number}")) for number in range(3)]
    await seen(fake, lambda: fake.received)
    calls[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await calls[0]
    await seen(fake, lambda: fake.cancelled() == [fake.received[0].request_id])
    fake.run(lambda: fake.received[0].part(Reply(outcomes=(fake.outcome(fake.received[0], 1),))))
    assert await calls[1]
    calls[2].cancel()
    with pytest.raises(asyncio.CancelledError):
        await calls[2]
    await seen(fake, lambda: fake.cancelled() == [fake.received[0].request_id] * 2)
    assert [call.calls for received in fake.requests("cancel") for call in received.calls] == [(0,), ()]


async def test_a_call_cancelled_in_its_own_turn_is_not_sent(broker: Broker, fake: FakeBroker):
    keep = asyncio.create_task(broker.prepare("keep"))
    drop = asyncio.create_task(broker.prepare("drop"))
    await asyncio.sleep(0)
    drop.cancel()
    assert await keep
    with pytest.raises(asyncio.CancelledError):
        await drop
    assert [call.key for received in fake.requests("prepare") for call in received.calls] == ["keep"]
    assert fake.cancelled() == []


async def test_an_answer_and_a_cancellation_at_once(broker: Broker, fake: FakeBroker):
    """The answer is there when the task is cancelled: the request is over, nothing is taken back."""
    fake.script.append(fake_broker.silence)
    call = asyncio.create_task(broker.prepare("k"))
    await seen(fake, lambda: fake.received)
    fake.run(lambda: fake.answer(fake.received[0]))
    while broker.statistics().under_way:  # noqa: ASYNC110 - a client has no event for this
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await broker.status()
    assert fake.cancelled() == []


async def test_a_timeout_fails_the_request_and_takes_it_back(broker: Broker, fake: FakeBroker):
    fake.script.append(fake_broker.silence)
    results = await asyncio.gather(*(broker.prepare(key, timeout=0.05) for key in ("a", "b")), return_exceptions=True)
    assert [type(result) for result in results] == [DeadlineExceeded] * 2
    assert fake.endpoint in str(results[0])
    await seen(fake, lambda: fake.cancelled() == [fake.received[0].request_id])
    fake.run(lambda: fake.answer(fake.received[0]))
    await broker.stat("a")
    assert broker.statistics().stray == 2


async def test_no_time_left(broker: Broker, fake: FakeBroker):
    with pytest.raises(DeadlineExceeded, match="not sent"):
        await broker.stat("k", timeout=0)
    assert fake.received == []


async def test_waiting_without_end(broker: Broker, fake: FakeBroker):
    await broker.prepare("k", timeout=float("inf"))
    assert fake.received[0].request.timeout_ms == 0


async def test_progress_is_reported(broker: Broker, fake: FakeBroker):
    reports = [Progress(entries=1, bytes=10), Progress(entries=2, bytes=20)]
    fake.script.append(fake_broker.progress_first(*reports))
    seen: list[Progress] = []
    await broker.prepare("k", progress=seen.append)
    assert seen == reports


async def test_a_callback_that_fails_takes_its_call_back(broker: Broker, fake: FakeBroker):
    def dawdle(received: Received) -> None:
        received.part(Reply(outcomes=(Outcome(call=0, progress=Progress(entries=1)),)))

    fake.script.append(dawdle)
    with pytest.raises(ZeroDivisionError):
        await broker.prepare("k", progress=lambda progress: 1 / 0)
    await seen(fake, lambda: fake.cancelled() == [fake.received[0].request_id])


# Replies that are none, brokers that are not there.


@pytest.mark.parametrize(
    "behaviour",
    [
        fake_broker.body(b"\xc1"),
        fake_broker.body(b""),
        fake_broker.reply(),
        fake_broker.reply(Outcome(call=3)),
        fake_broker.reply(Outcome(call=0)),
        fake_broker.reply(Outcome(call=0, ok=fake_broker.encoded([1]))),
    ],
)
async def test_a_malformed_reply_is_internal_and_the_next_call_works(
    broker: Broker, fake: FakeBroker, behaviour: fake_broker.Behaviour
):
    fake.script.append(behaviour)
    with pytest.raises(Internal):
        await broker.stat("k")
    await broker.prepare("k")
    assert (await broker.stat("k")).name == "k"


async def test_messages_that_are_no_reply_are_counted(broker: Broker, fake: FakeBroker):
    def noise(received: Received) -> None:
        received.send(b"HTTP/1.1 400")
        received.send(protocol.REQUEST_VERSION, b"nobody", protocol.DONE, b"")
        fake.answer(received)

    fake.script.append(noise)
    await broker.prepare("k")
    assert broker.statistics().stray == 2


async def test_no_broker(tmp_path: Path):
    async with snapbroker.aio.connect(f"{tmp_path}/none.sock", connect_timeout=0.05) as broker:
        with pytest.raises(Unavailable, match="start snapbrokerd") as raised:
            await broker.status()
        assert f"{tmp_path}/none.sock" in raised.value.message
        assert broker.statistics().unsent == 0


async def test_a_broker_that_comes_in_time(tmp_path: Path):
    fake = FakeBroker(tmp_path)
    async with snapbroker.aio.connect(fake.endpoint, snapshotter="overlayfs", connect_timeout=20) as broker:
        calls = [asyncio.create_task(broker.prepare(f"k{number}")) for number in range(3)]
        while broker.statistics().unsent == 0:  # noqa: ASYNC110 - a client has no event for this
            await asyncio.sleep(0)
        with fake:
            await asyncio.gather(*calls)
            assert len(fake.received) == 1


async def test_a_broker_that_vanishes_is_noticed_before_the_timeout(impatient: Broker, fake: FakeBroker):
    fake.script.append(fake_broker.silence)
    started = time.monotonic()
    call = asyncio.create_task(impatient.prepare("k"))
    await seen(fake, lambda: fake.received)
    fake.stop()
    with pytest.raises(Unavailable, match="unknown whether") as raised:
        await call
    assert fake.endpoint in raised.value.message
    assert raised.value.in_doubt
    assert time.monotonic() - started < 10
    fake.start()
    assert await impatient.prepare("k")


async def test_a_broker_that_was_replaced_between_calls_is_simply_used(broker: Broker, fake: FakeBroker):
    await broker.prepare("k")
    # Often: a call right after the break would sometimes be accepted by the queue of the old connection, and lost.
    for _ in range(40):
        fake.stop()
        while broker._connection._line.connected:  # noqa: ASYNC110 - a client has no event for this
            await asyncio.sleep(0)
        fake.start()
        assert (await broker.stat("k", timeout=5)).name == "k"


async def test_a_connection_that_broke_while_the_loop_was_busy_is_not_blamed_on_the_next_call(
    broker: Broker, fake: FakeBroker
):
    await broker.prepare("k")
    fake.stop()
    fake.start()
    # The loop stands still until the connection has broken and there is another one. The monitor's descriptor is
    # looked at from outside: asking ZeroMQ would eat the edge that wakes the loop.
    assert select.select([sockets.descriptor(broker._connection._monitor)], [], [], 20)[0]
    assert broker._connection._socket.poll(20_000, zmq.POLLOUT)
    assert (await broker.stat("k")).name == "k"


async def test_closing_ends_what_is_under_way(fake: FakeBroker):
    fake.script.append(fake_broker.silence)
    async with snapbroker.aio.connect(fake.endpoint, snapshotter="overlayfs") as broker:
        sent = asyncio.create_task(broker.prepare("k"))
        await seen(fake, lambda: fake.received)
        events = broker.events(0)
        stream = asyncio.create_task(anext(events))
        await seen(fake, lambda: fake.subscriptions)
        gathered = asyncio.create_task(broker.prepare("l"))
        await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="closed"):
        await sent
    with pytest.raises((Unavailable, FailedPrecondition), match="closed"):
        await gathered
    with pytest.raises((Unavailable, FailedPrecondition), match="closed"):
        await stream
    await seen(fake, lambda: fake.received[0].request_id in fake.cancelled())
    with pytest.raises(FailedPrecondition, match="closed"):
        await broker.stat("k")


async def test_a_stream_whose_connection_was_closed_says_so(fake: FakeBroker):
    async with snapbroker.aio.connect(fake.endpoint, snapshotter="overlayfs") as broker:
        events = broker.events()
        await events.start()
    with pytest.raises(FailedPrecondition, match="closed"):
        await anext(events)


async def test_a_connection_may_be_closed_in_another_task(fake: FakeBroker):
    connection = snapbroker.aio.connect(fake.endpoint, snapshotter="overlayfs")
    broker = await asyncio.create_task(connection.__aenter__())
    await broker.prepare("k")
    await asyncio.create_task(connection.__aexit__(None, None, None))


# Batches.


async def test_a_batch_is_one_request_behind_what_was_called_before(broker: Broker, fake: FakeBroker):
    before = asyncio.create_task(broker.prepare("a"))
    await asyncio.sleep(0)
    async with broker.batch(atomic=True) as batch:
        batch.commit("base", "a")
        mounts = batch.prepare("b", "base")
        info = batch.stat("b")
    await before
    assert mounts.result()[0].source.endswith("/b")
    assert info.result().parent == "base"
    assert [received.verbs for received in fake.received] == [["prepare"], ["commit", "prepare", "stat"]]
    assert fake.received[-1].request.atomic


async def test_an_atomic_batch_fails_as_one_for_the_reason(broker: Broker):
    await broker.prepare("taken")
    with pytest.raises(AlreadyExists):  # noqa: PT012 - it is the end of the block that raises
        async with broker.batch(atomic=True) as batch:
            first = batch.prepare("free")
            batch.prepare("taken")
    with pytest.raises(Cancelled):
        first.result()


async def test_a_cancelled_batch_is_taken_back(broker: Broker, fake: FakeBroker):
    fake.script.append(fake_broker.silence)
    with anyio.move_on_after(0.05) as scope:
        async with broker.batch() as batch:
            batch.prepare("a")
            batch.prepare("b")
    assert scope.cancelled_caught
    await seen(fake, lambda: fake.cancelled() == [fake.received[0].request_id])


async def test_a_batch_that_cannot_be_sent(broker: Broker, fake: FakeBroker):
    with pytest.raises(InvalidArgument):  # noqa: PT012 - it is the end of the block that raises
        async with broker.batch() as batch:
            batch.stat("k")
            batch.stat("\udc80")
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - it is the end of the block that raises
        async with broker.batch() as batch:
            batch.stat("k")
            1 / 0  # noqa: B018
    fake.script.append(fake_broker.silence)
    with pytest.raises(DeadlineExceeded):
        async with broker.batch(timeout=0.05) as batch:
            batch.stat("k")
    assert len(fake.requests("stat")) == 1


# Walks.


def names(count: int) -> list[str]:
    return [f"k{number:04}" for number in range(count)]


async def filled(broker: Broker, count: int) -> None:
    await asyncio.gather(*(broker.prepare(name) for name in names(count)))


async def test_a_walk_goes_through_pages_and_credits(broker: Broker, fake: FakeBroker):
    await filled(broker, 100)
    walk = broker.walk("kind==active", page=3)
    with pytest.raises(FailedPrecondition, match="first page"):
        walk.sequence  # noqa: B018
    assert await walk.first() == 100
    await broker.remove("k0000")
    assert [info.name async for info in walk] == names(100)
    assert walk.sequence == 100
    assert len(fake.requests("walk")) > 1
    assert [len(page.infos) async for page in broker.walk(page=40).pages()] == [40, 40, 19]


async def test_a_walk_left_early_is_taken_back(broker: Broker, fake: FakeBroker):
    def first_page_only(received: Received) -> None:
        page = protocol.WalkPage(infos=(Info("k0000", Kind.ACTIVE),), sequence=10, next="k0000")
        received.part(Reply(outcomes=(Outcome(call=0, ok=fake_broker.encoded(page)),)))

    fake.script.append(first_page_only)
    walk = broker.walk(page=1)
    assert (await anext(walk)).name == "k0000"
    walk.close()
    await seen(fake, lambda: fake.cancelled() == [fake.received[0].request_id])


async def test_a_cancelled_walk_is_taken_back(broker: Broker, fake: FakeBroker):
    fake.script.append(fake_broker.silence)
    with anyio.move_on_after(0.05):
        await anext(broker.walk())
    await seen(fake, lambda: fake.cancelled() == [fake.received[0].request_id])


async def test_a_walk_that_fails(broker: Broker, fake: FakeBroker):
    fault = protocol.Fault(code="invalid_argument", message="bad filter")
    fake.script.append(fake_broker.reply(Outcome(call=0, error=fault)))
    with pytest.raises(InvalidArgument, match="bad filter"):
        await anext(broker.walk("]"))
    fake.script.append(fake_broker.silence)
    with pytest.raises(DeadlineExceeded):
        await anext(broker.walk(timeout=0.05))
    fake.script.append(fake_broker.body(b"\xc1"))
    with pytest.raises(Internal):
        await anext(broker.walk())


# Events.


async def taken(events: snapbroker.aio.Events, count: int) -> list[Event]:
    return [await anext(events) for _ in range(count)]


async def test_events_from_here_on(broker: Broker, fake: FakeBroker):
    await broker.prepare("before")
    async with broker.events() as events:
        await seen(fake, lambda: fake.subscriptions)
        await broker.prepare("k")
        await broker.snapshotter("overlayfs", namespace="other").prepare("k")
        await broker.commit("c", "k")
        assert [(event.verb, event.key) for event in await taken(events, 2)] == [("prepare", "k"), ("commit", "k")]
        assert events.sequence == 4
        assert await events.poll(0.01) is None
        assert events.statistics().gaps == 0
    await seen(fake, lambda: not fake.subscriptions)
    assert fake.requests("events") == []


async def test_without_follow_the_journal_is_the_end(broker: Broker, fake: FakeBroker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subscriber, "_PAGE", 2)
    await filled(broker, 50)
    assert [event.sequence async for event in broker.events(0, follow=False)] == list(range(1, 51))
    assert len(fake.requests("events")) > 1
    assert [event async for event in broker.events(follow=False)] == []
    assert fake.subscriptions == set()


async def test_lost_messages_are_healed_from_the_journal(broker: Broker, fake: FakeBroker):
    async with broker.events() as events:
        await seen(fake, lambda: fake.subscriptions)
        fake.lose = lambda event: event.sequence in (2, 3, 6, 7)
        await asyncio.gather(*(broker.prepare(f"k{number}") for number in range(5)))
        assert [event.sequence for event in await taken(events, 5)] == [1, 2, 3, 4, 5]
        await asyncio.gather(broker.prepare("k5"), broker.remove("k0"))
        waiting = asyncio.create_task(taken(events, 2))
        await asyncio.sleep(0)
        fake.heartbeat(with_topics=False)
        assert [event.sequence for event in await waiting] == [6, 7]
        assert events.statistics().gaps == 2


async def test_a_flood_of_events_lets_other_tasks_run(broker: Broker, fake: FakeBroker):
    async with broker.events() as events:
        await seen(fake, lambda: fake.subscriptions)

        def flood() -> None:
            for _ in range(2000):
                fake.publish(fake.record("default", "prepare", "k", None))

        fake.run(flood)
        await anyio.wait_readable(sockets.descriptor(events._socket))
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(others())
        await taken(events, 2000)
        other.cancel()
        assert turns >= 5


async def test_silence_is_doubted(broker: Broker, fake: FakeBroker):
    async with broker.events(silence=0.05) as events:
        await seen(fake, lambda: fake.subscriptions)
        fake.lose = lambda event: True
        await broker.prepare("k")
        assert (await anext(events)).key == "k"


async def test_silence_is_doubted_by_who_polls_more_often(broker: Broker, fake: FakeBroker):
    async with broker.events(silence=0.2) as events:
        await seen(fake, lambda: fake.subscriptions)
        fake.lose = lambda event: True
        await broker.prepare("k")
        for _ in range(1000):
            event = await events.poll(0.05)
            if event is not None:
                break
        assert event is not None
        assert event.key == "k"


async def test_the_heartbeats_tell_what_silence_is(broker: Broker, fake: FakeBroker):
    async with broker.events(silence=0.05) as events:
        await seen(fake, lambda: fake.subscriptions)
        asked = len(fake.requests("events"))
        fake.heartbeat(time=1)
        fake.heartbeat(time=1 + 60 * 10**9)
        fake.happen("k")
        assert (await anext(events)).key == "k"
        assert await events.poll(0.3) is None
        assert len(fake.requests("events")) == asked


async def test_a_cancelled_wait_for_an_event_loses_none(broker: Broker, fake: FakeBroker):
    async with broker.events() as events:
        await seen(fake, lambda: fake.subscriptions)
        for number in range(5):
            assert await events.poll(0.005) is None
            await broker.prepare(f"k{number}")
            assert (await anext(events)).key == f"k{number}"


async def test_events_no_longer_kept(broker: Broker, fake: FakeBroker):
    fake.kept = 2
    await filled(broker, 5)
    with pytest.raises(OutOfRange, match="walk again") as raised:
        await anext(broker.events(1, follow=False))
    assert raised.value.details == {"oldest": 4, "newest": 5, "since": 1}


async def test_a_broker_that_restarts_does_not_end_the_events(broker: Broker, fake: FakeBroker):
    async with broker.events() as events:
        await seen(fake, lambda: fake.subscriptions)
        waiting = asyncio.create_task(anext(events))
        fake.stop()
        fake.subscriptions.clear()
        fake.record("default", "remove", "k1", None)
        fake.start()
        await seen(fake, lambda: fake.subscriptions)
        fake.heartbeat()
        assert (await waiting).sequence == 1


async def test_a_journal_that_stays_away_ends_the_events(broker: Broker, fake: FakeBroker):
    fault = protocol.Fault(code="unavailable", message="restarting")
    async with broker.events(0, timeout=0.15) as events:
        fake.script.extend([fake_broker.reply(error=fault)] * 100)
        with pytest.raises(Unavailable, match="restarting"):
            await anext(events)
    assert len(fake.requests("events")) > 1


async def test_wrong_topics(broker: Broker):
    with pytest.raises(InvalidArgument, match="one snapshotter"):
        await anext(broker.events(topics=["native/"]))


# Workspaces.


@pytest.mark.root
async def test_a_workspace_is_committed(broker: Broker, fake: FakeBroker):
    async with broker.workspace(commit_as="result", labels={"a": "b"}, sync=True) as path:
        (path / "file").write_text("made")
    assert not path.exists()
    assert (fake.directory / "files/result/file").read_text() == "made"
    assert [key for _, key in fake.snapshots] == ["result"]
    assert fake.requests("commit")[0].calls[0].sync


@pytest.mark.root
async def test_a_workspace_whose_block_fails_leaves_nothing(broker: Broker, fake: FakeBroker):
    with pytest.raises(ZeroDivisionError):
        async with broker.workspace(commit_as="result") as path:
            1 / 0  # noqa: B018
    assert not path.exists()
    assert str(path) not in mounted()
    assert fake.snapshots == {}


@pytest.mark.root
async def test_a_workspace_that_cannot_be_committed_is_kept_if_asked_for(broker: Broker, fake: FakeBroker):
    await broker.prepare("taken")
    with pytest.raises(AlreadyExists) as raised:
        async with broker.workspace(commit_as="taken", keep_uncommitted=True) as path:
            (path / "file").write_text("made")
    (key,) = [key for _, key in fake.snapshots if key != "taken"]
    assert f"the work is kept in the active snapshot {key!r}" in raised.value.__notes__[0]
    assert (fake.directory / "files" / key / "file").read_text() == "made"


@pytest.mark.root
async def test_a_cancelled_workspace_leaves_nothing(broker: Broker, fake: FakeBroker):
    with anyio.CancelScope() as scope:
        async with broker.workspace(commit_as="result") as path:
            (path / "file").write_text("made")
            scope.cancel()
            await anyio.sleep_forever()
    assert not path.exists()
    assert str(path) not in mounted()
    assert fake.snapshots == {}


@pytest.mark.root
async def test_a_workspace_that_somebody_still_uses_is_not_committed(broker: Broker, fake: FakeBroker):
    with pytest.raises(FailedPrecondition, match="busy"):
        async with broker.workspace(commit_as="result") as path:
            held = os.open(path / "file", os.O_CREAT | os.O_WRONLY)
    os.close(held)
    assert not path.exists()
    assert fake.snapshots == {}


async def test_a_workspace_cancelled_while_it_is_prepared_leaves_nothing(broker: Broker, fake: FakeBroker):
    def prepare_and_say_nothing(received: Received) -> None:
        fake.outcome(received, 0)

    fake.script.append(prepare_and_say_nothing)
    with anyio.move_on_after(0.05):
        async with broker.workspace():
            pytest.fail("nothing was answered")
    assert fake.snapshots == {}
    assert len(fake.cancelled()) == 1
