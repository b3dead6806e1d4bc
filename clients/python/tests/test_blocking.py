"""The blocking client against a broker on a real socket that answers, dawdles, lies and vanishes."""

from __future__ import annotations

import itertools
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_broker
import pytest
from fake_broker import FakeBroker, Received

import snapbroker
from snapbroker import messages, protocol, sockets, subscriber
from snapbroker.blocking import Broker
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
    ResourceExhausted,
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
def broker(fake: FakeBroker) -> Iterator[Broker]:
    with snapbroker.connect(fake.endpoint, snapshotter="overlayfs", timeout=20) as broker:
        yield broker


@pytest.fixture
def impatient(fake: FakeBroker) -> Iterator[Broker]:
    """A client that repeats nothing."""
    with snapbroker.connect(fake.endpoint, snapshotter="overlayfs", timeout=20, patience=0) as broker:
        yield broker


@pytest.fixture
def background() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor() as pool:
        yield pool.submit


# The verbs.


def test_a_layer_is_unpacked_a_build_runs_somebody_looks(broker: Broker, fake: FakeBroker):
    mounts = broker.prepare("unpack-1", labels={"a": "b"})
    assert mounts == [snapbroker.Mount("bind", f"{fake.directory}/files/unpack-1", ("rbind", "rw"))]
    assert broker.mounts("unpack-1") == mounts
    assert broker.commit("layer-1", "unpack-1", labels={"c": "d"}, sync=True) is None
    assert fake.requests("commit")[0].calls[0] == protocol.Commit(
        name="layer-1", key="unpack-1", labels={"c": "d"}, sync=True
    )
    layer = broker.stat("layer-1")
    assert (layer.name, layer.kind, layer.labels) == ("layer-1", Kind.COMMITTED, {"c": "d"})
    broker.prepare("job-42", "layer-1")
    broker.remove("job-42")
    assert broker.view("look", parent="layer-1")[0].options == ("rbind", "ro")
    with pytest.raises(FailedPrecondition, match="child"):
        broker.remove("layer-1")
    assert broker.update("layer-1", {"x": "y"}, ["labels.x"]).labels == {"c": "d", "x": "y"}
    assert broker.usage("layer-1") == Usage(1, 4096 * 7)
    assert broker.cleanup() is None


def test_errors_carry_code_message_and_details(broker: Broker, fake: FakeBroker):
    fault = protocol.Fault(code="resource_exhausted", message="full", details={"retry_after_ms": 20})
    fake.script.append(fake_broker.reply(Outcome(call=0, error=fault)))
    with pytest.raises(ResourceExhausted, match="full") as raised:
        broker.stat("k")
    assert raised.value.details == {"retry_after_ms": 20}
    with pytest.raises(NotFound):
        broker.stat("k")


def test_timeout_and_namespace_travel(fake: FakeBroker):
    with snapbroker.connect(fake.endpoint, snapshotter="overlayfs", namespace="builds", timeout=7) as broker:
        broker.prepare("k")
        broker.stat("k", timeout=1.5)
        with pytest.raises(NotFound):
            broker.snapshotter("overlayfs", namespace="other").stat("k")
    assert [(r.request.namespace, r.request.timeout_ms) for r in fake.received] == [
        ("builds", 7000),
        ("builds", 1500),
        ("other", 7000),
    ]


def test_the_environment_names_what_is_not_given(fake: FakeBroker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SNAPBROKER_ENDPOINT", f"{fake.directory}/router.sock")
    monkeypatch.setenv("SNAPBROKER_NAMESPACE", "builds")
    monkeypatch.setenv("SNAPBROKER_SNAPSHOTTER", "overlayfs")
    with snapbroker.connect() as broker:
        broker.prepare("k")
    assert (fake.received[0].target, fake.received[0].request.namespace) == (b"overlayfs", "builds")


def test_the_only_snapshotter_is_found(fake: FakeBroker):
    with snapbroker.connect(fake.endpoint) as broker:
        assert broker.snapshotter_name == "overlayfs"
        broker.prepare("k")
        broker.stat("k")
    assert [received.target for received in fake.received] == [b"", b"overlayfs", b"overlayfs"]


def test_of_several_snapshotters_one_must_be_named(tmp_path: Path):
    with FakeBroker(tmp_path, names=("native", "btrfs")) as fake, snapbroker.connect(fake.endpoint) as broker:
        assert [each.name for each in broker.status().snapshotters] == ["native", "btrfs"]
        with pytest.raises(InvalidArgument, match="native, btrfs"):
            broker.prepare("k")
        broker.snapshotter("btrfs").prepare("k")
        with pytest.raises(NotFound, match="no snapshotter 'zfs'"):
            broker.snapshotter("zfs").prepare("k")


def test_what_cannot_be_sent_is_not_sent(broker: Broker, fake: FakeBroker):
    for wrong in (lambda: broker.stat(7), lambda: broker.stat("\udc80")):  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument):
            wrong()
    with pytest.raises(DeadlineExceeded):
        broker.stat("k", timeout=0)
    assert fake.received == []


def test_an_endpoint_that_is_none():
    for endpoint in ("nonsense://x", "ipc://" + "x" * 200):
        with pytest.raises(InvalidArgument, match="endpoint"):
            snapbroker.connect(endpoint)


def test_threads_share_a_broker(broker: Broker, fake: FakeBroker):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(broker.prepare, (f"k{number}" for number in range(64))))
        infos = list(pool.map(broker.stat, (f"k{number}" for number in range(64))))
    assert [info.name for info in infos] == [f"k{number}" for number in range(64)]
    assert len({received.identity for received in fake.received}) <= 8


# Replies.


def test_progress_is_reported(broker: Broker, fake: FakeBroker):
    reports = [Progress(entries=1, bytes=10), Progress(entries=2, bytes=20)]
    fake.script.append(fake_broker.progress_first(*reports))
    seen: list[Progress] = []
    broker.prepare("k", progress=seen.append)
    assert seen == reports


def test_a_callback_that_fails_takes_its_call_back(broker: Broker, fake: FakeBroker):
    fake.script.append(fake_broker.progress_first(Progress(entries=1)))
    with pytest.raises(ZeroDivisionError):
        broker.prepare("k", progress=lambda progress: 1 / 0)
    fake.wait(lambda: fake.cancelled() == [fake.received[0].request_id])
    assert broker.stat("k").name == "k"


@pytest.mark.parametrize(
    "behaviour",
    [
        fake_broker.body(b"\xc1"),
        fake_broker.body(b""),
        fake_broker.reply(),
        fake_broker.reply(Outcome(call=3)),
        fake_broker.reply(Outcome(call=0)),
        fake_broker.reply(Outcome(call=0, ok=fake_broker.encoded([1]))),
        lambda received: received.send(b"HTTP/1.1 400"),
        lambda received: received.send(b"SNBR\x02", received.request_id, protocol.DONE, b""),
    ],
)
def test_a_malformed_reply_is_internal_and_the_next_call_works(
    broker: Broker, fake: FakeBroker, behaviour: fake_broker.Behaviour
):
    fake.script.append(behaviour)
    with pytest.raises(Internal):
        broker.stat("k")
    broker.prepare("k")
    assert broker.stat("k").name == "k"


def test_a_late_reply_is_not_taken_for_the_next(broker: Broker, fake: FakeBroker):
    fake.script.append(fake_broker.silence)
    with pytest.raises(DeadlineExceeded) as raised:
        broker.stat("late", timeout=0.05)
    assert fake.endpoint in raised.value.message
    assert "overlayfs" in raised.value.message

    def answer_both(received: Received) -> None:
        fake.received[0].done(Outcome(call=0, ok=fake_broker.encoded(Info("late", Kind.VIEW))))
        received.done(Outcome(call=0, ok=fake_broker.encoded(Info("k", Kind.VIEW))))

    fake.script.append(answer_both)
    assert broker.stat("k").name == "k"


def test_a_timeout_takes_the_call_back(broker: Broker, fake: FakeBroker):
    fake.script.append(fake_broker.silence)
    with pytest.raises(DeadlineExceeded):
        broker.prepare("k", timeout=0.3)
    fake.wait(lambda: fake.cancelled() == [fake.received[0].request_id])
    assert fake.requests("cancel")[0].target == b"overlayfs"
    assert fake.requests("cancel")[0].request.namespace == "default"


def test_an_interrupt_takes_the_call_back(broker: Broker, fake: FakeBroker):
    def interrupt(received: Received) -> None:
        import signal

        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    fake.script.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        broker.prepare("k")
    fake.wait(lambda: fake.cancelled() == [fake.received[0].request_id])


@pytest.mark.parametrize("number", [0, 1, 2, 3])
@pytest.mark.parametrize("step", ["_send", "_receive"])
def test_an_interrupt_between_two_frames_harms_no_later_call(
    broker: Broker, fake: FakeBroker, monkeypatch: pytest.MonkeyPatch, step: str, number: int
):
    """Whatever was sent or taken of the message: what follows is a message of its own."""
    real, left = getattr(messages, step), itertools.count(-number)

    def interrupted(*arguments: Any) -> Any:
        result = real(*arguments)
        # Only of this thread: the fake broker has a thread of its own.
        if threading.current_thread() is threading.main_thread() and next(left) == 0:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patched:
        patched.setattr(messages, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            broker.prepare("k")
    for name in ("a", "b"):
        assert broker.prepare(name)
        assert broker.stat(name).name == name


# A broker that is not there.


def test_no_broker(tmp_path: Path):
    with snapbroker.connect(f"{tmp_path}/none.sock", connect_timeout=0.05) as broker:
        with pytest.raises(Unavailable, match="start snapbrokerd") as raised:
            broker.status()
        assert f"{tmp_path}/none.sock" in raised.value.message


def test_a_broker_that_comes_in_time(tmp_path: Path, background: Callable[..., Future[Any]]):
    fake = FakeBroker(tmp_path)
    with snapbroker.connect(fake.endpoint, snapshotter="overlayfs", connect_timeout=20) as broker:
        call = background(broker.prepare, "k")
        with fake:
            assert call.result(20)


def test_a_broker_that_vanishes_is_noticed_before_the_timeout(
    impatient: Broker, fake: FakeBroker, background: Callable[..., Future[Any]]
):
    fake.script.append(fake_broker.silence)
    started = time.monotonic()
    call = background(impatient.prepare, "k")
    fake.wait(lambda: fake.received)
    fake.stop()
    with pytest.raises(Unavailable, match="unknown whether") as raised:
        call.result(20)
    assert fake.endpoint in raised.value.message
    assert raised.value.in_doubt
    assert time.monotonic() - started < 10
    fake.start()
    assert impatient.prepare("k")


def test_a_broker_that_was_replaced_between_calls_is_simply_used(broker: Broker, fake: FakeBroker):
    broker.prepare("k")
    monitor = broker._connection._idle[-1]._monitor
    # Often: a call right after the break would sometimes be accepted by the queue of the old connection, and lost.
    for _ in range(40):
        fake.stop()
        assert select.select([sockets.descriptor(monitor)], [], [], 20)[0]
        fake.start()
        assert broker.stat("k", timeout=5).name == "k"


def test_a_closed_connection(fake: FakeBroker):
    broker = snapbroker.connect(fake.endpoint, snapshotter="overlayfs")
    broker.close()
    broker.close()
    for call in (lambda: broker.stat("k"), lambda: broker.events(), lambda: next(broker.walk())):
        with pytest.raises(FailedPrecondition, match="closed"):
            call()


def test_closing_ends_the_calls_of_other_threads(
    broker: Broker, fake: FakeBroker, background: Callable[..., Future[Any]]
):
    fake.script.append(fake_broker.silence)
    call = background(broker.stat, "k")
    fake.wait(lambda: fake.received)
    broker.close()
    with pytest.raises(FailedPrecondition, match="closed"):
        call.result(20)


# Batches.


def test_a_batch_is_one_request(broker: Broker, fake: FakeBroker):
    broker.prepare("a")
    with broker.batch(atomic=True) as batch:
        batch.commit("base", "a")
        mounts = batch.prepare("b", "base")
        info = batch.stat("b")
        with pytest.raises(FailedPrecondition, match="end of its block"):
            info.result()
    assert len(batch) == 3
    assert mounts.result()[0].source.endswith("/b")
    assert info.result().parent == "base"
    assert fake.received[-1].verbs == ["commit", "prepare", "stat"]
    assert fake.received[-1].request.atomic


def test_every_verb_of_a_batch(broker: Broker):
    with broker.batch() as batch:
        answers = [
            batch.prepare("a"),
            batch.commit("base", "a", labels={"x": "y"}),
            batch.view("v", "base"),
            batch.mounts("v"),
            batch.update("base", {"z": "1"}),
            batch.usage("base"),
            batch.remove("v"),
        ]
    assert [type(answer.result()).__name__ for answer in answers] == [
        "Mounts", "NoneType", "Mounts", "Mounts", "Info", "Usage", "NoneType",
    ]  # fmt: skip


def test_an_atomic_batch_fails_as_one_for_the_reason(broker: Broker):
    broker.prepare("taken")
    with pytest.raises(AlreadyExists), broker.batch(atomic=True) as batch:  # noqa: PT012 - it is the end of the block that raises
        first = batch.prepare("free")
        batch.prepare("taken")
    with pytest.raises(Cancelled):
        first.result()
    with pytest.raises(NotFound):
        broker.stat("free")


def test_the_calls_of_a_plain_batch_are_independent(broker: Broker, fake: FakeBroker):
    fake.script.append(fake_broker.out_of_order)
    with pytest.raises(NotFound, match="'x'") as raised, broker.batch() as batch:  # noqa: PT012 - it is the end of the block that raises
        batch.stat("x")
        good = batch.prepare("k")
        bad = batch.stat("y")
    assert good.result()
    with pytest.raises(NotFound, match="'y'"):
        bad.result()
    assert "2 of 3 calls" in raised.value.__notes__[0]


def test_a_block_that_fails_sends_nothing(broker: Broker, fake: FakeBroker):
    with pytest.raises(ZeroDivisionError), broker.batch() as batch:  # noqa: PT012 - it is the end of the block that raises
        batch.prepare("k")
        1 / 0  # noqa: B018
    with broker.batch():
        pass
    assert fake.received == []
    with pytest.raises(FailedPrecondition, match="sent"):
        batch.prepare("k")


def test_a_batch_without_a_reply(broker: Broker, fake: FakeBroker):
    fake.script.append(fake_broker.silence)
    with pytest.raises(DeadlineExceeded), broker.batch(timeout=0.05) as batch:
        answer = batch.stat("k")
    with pytest.raises(DeadlineExceeded):
        answer.result()


def test_a_batch_has_an_end(broker: Broker):
    with pytest.raises(InvalidArgument, match="at most 1024"), broker.batch() as batch:  # noqa: PT012 - it is the end of the block that raises
        for number in range(1025):
            batch.stat(f"k{number}")


# Walks.


def names(count: int) -> list[str]:
    return [f"k{number:04}" for number in range(count)]


def filled(broker: Broker, count: int) -> None:
    with broker.batch() as batch:
        for name in names(count):
            batch.prepare(name)


def test_a_walk_goes_through_pages_and_credits(broker: Broker, fake: FakeBroker):
    filled(broker, 100)
    assert [info.name for info in broker.walk(page=3)] == names(100)
    assert len(fake.requests("walk")) > 1
    assert [len(page.infos) for page in broker.walk(page=40).pages()] == [40, 40, 20]
    assert fake.requests("walk")[-1].calls[0].filters == ()


def test_the_sequence_of_a_walk_is_that_of_its_first_page(broker: Broker, fake: FakeBroker):
    filled(broker, 30)
    walk = broker.walk("kind==active", "name==x", page=1)
    assert walk.sequence == 30
    first = next(walk)
    broker.remove(first.name)
    assert [info.name for info in walk] == names(30)[1:]
    assert walk.sequence == 30
    assert fake.requests("walk")[0].calls[0].filters == ("kind==active", "name==x")


def test_an_empty_walk_has_a_sequence(broker: Broker):
    walk = broker.walk()
    assert list(walk) == []
    assert walk.sequence == 0


def test_a_walk_left_early_gives_its_socket_back(broker: Broker, fake: FakeBroker):
    filled(broker, 10)

    def first_page_only(received: Received) -> None:
        page = protocol.WalkPage(infos=(Info("k0000", Kind.ACTIVE),), sequence=10, next="k0000")
        received.part(Reply(outcomes=(Outcome(call=0, ok=fake_broker.encoded(page)),)))

    fake.script.append(first_page_only)
    for _ in broker.walk(page=1):
        break
    fake.wait(lambda: fake.cancelled() == [fake.requests("walk")[0].request_id])
    assert broker.stat("k0000").name == "k0000"
    assert len({received.identity for received in fake.received}) == 1


def test_a_walk_that_fails(broker: Broker, fake: FakeBroker):
    fault = protocol.Fault(code="invalid_argument", message="bad filter")
    fake.script.append(fake_broker.reply(Outcome(call=0, error=fault)))
    with pytest.raises(InvalidArgument, match="bad filter"):
        list(broker.walk("]"))
    fake.script.append(fake_broker.silence)
    with pytest.raises(DeadlineExceeded):
        list(broker.walk(timeout=0.05))
    page = protocol.WalkPage(infos=(), sequence=1, next="k")
    fake.script.extend([fake_broker.reply(Outcome(call=0, ok=fake_broker.encoded(page)))] * 2)
    with pytest.raises(Internal, match="continues"):
        list(broker.walk())
    with pytest.raises(InvalidArgument):
        broker.walk(7)  # type: ignore[arg-type]


# Events.


def taken(events: snapbroker.blocking.Events, count: int) -> list[Event]:
    return [next(events) for _ in range(count)]


def test_events_from_here_on(broker: Broker, fake: FakeBroker):
    fake.happen("before")
    with broker.events() as events:
        fake.wait_for_subscription()
        broker.prepare("k")
        broker.snapshotter("overlayfs", namespace="other").prepare("k")
        broker.commit("c", "k")
        assert [(event.verb, event.key) for event in taken(events, 2)] == [("prepare", "k"), ("commit", "k")]
        assert events.sequence == 4
        assert events.poll(0.01) is None
        assert events.statistics().gaps == 0
    fake.wait(lambda: not fake.subscriptions)
    assert fake.requests("events") == []


def test_events_since(broker: Broker, fake: FakeBroker):
    filled(broker, 5)
    with broker.events(since=2) as events:
        assert [event.sequence for event in taken(events, 3)] == [3, 4, 5]
        fake.wait_for_subscription()
        broker.remove("k0000")
        assert next(events).sequence == 6


def test_without_follow_the_journal_is_the_end(broker: Broker, fake: FakeBroker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subscriber, "_PAGE", 2)
    filled(broker, 50)
    assert [event.sequence for event in broker.events(0, follow=False)] == list(range(1, 51))
    assert len(fake.requests("events")) > 1
    assert list(broker.events(follow=False)) == []
    assert fake.subscriptions == set()


def test_topics(broker: Broker, fake: FakeBroker):
    filled(broker, 3)
    broker.remove("k0001")
    found = broker.events(0, ["overlayfs/default/snapshot/remove"], follow=False)
    assert [event.key for event in found] == ["k0001"]
    with pytest.raises(InvalidArgument, match="one snapshotter"):
        broker.events(topics=["native/"])


def test_lost_messages_are_healed_from_the_journal(broker: Broker, fake: FakeBroker):
    with broker.events() as events:
        fake.wait_for_subscription()
        fake.lose = lambda event: event.sequence in (2, 3, 6, 7)
        for number in range(5):
            fake.happen(f"k{number}", "remove" if number % 2 else "prepare")
        assert [event.sequence for event in taken(events, 5)] == [1, 2, 3, 4, 5]
        fake.happen("k5")
        fake.happen("k6")
        assert events.poll(0.01) is None
        fake.heartbeat(with_topics=False)
        assert [event.sequence for event in taken(events, 2)] == [6, 7]
        assert events.statistics() == subscriber.Statistics(7, events.statistics().duplicates, 2, 0)


def test_what_happens_while_the_journal_is_read_comes_once(broker: Broker, fake: FakeBroker):
    for number in range(3):
        fake.happen(f"k{number}")
    once = iter([True])

    def meanwhile() -> None:
        if next(once, False):
            fake.publish(fake.record("default", "remove", "k0", None))

    fake.before_journal = meanwhile
    with broker.events(0) as events:
        assert [event.sequence for event in taken(events, 4)] == [1, 2, 3, 4]
        fake.wait_for_subscription()
        fake.happen("k9")
        assert next(events).sequence == 5


def test_silence_is_doubted(broker: Broker, fake: FakeBroker):
    with broker.events(silence=0.05) as events:
        fake.wait_for_subscription()
        fake.lose = lambda event: True
        fake.happen("k")
        assert next(events).key == "k"


def test_silence_is_doubted_by_who_polls_more_often(broker: Broker, fake: FakeBroker):
    with broker.events(silence=0.2) as events:
        fake.wait_for_subscription()
        fake.lose = lambda event: True
        fake.happen("k")
        found = (events.poll(0.01) for _ in range(1000))
        assert next(event for event in found if event).key == "k"


def test_the_heartbeats_tell_what_silence_is(broker: Broker, fake: FakeBroker):
    with broker.events(silence=0.05) as events:
        fake.wait_for_subscription()
        asked = len(fake.requests("events"))
        fake.heartbeat(time=1)
        fake.heartbeat(time=1 + 60 * 10**9)
        fake.happen("k")
        assert next(events).key == "k"
        assert events.poll(0.3) is None
        assert len(fake.requests("events")) == asked


def test_events_no_longer_kept(broker: Broker, fake: FakeBroker):
    fake.kept = 2
    filled(broker, 5)
    with broker.events(1) as events, pytest.raises(OutOfRange, match="walk again") as raised:
        next(events)
    assert raised.value.details == {"oldest": 4, "newest": 5, "since": 1}
    walk = broker.walk()
    assert len(list(walk)) == 5
    assert list(broker.events(walk.sequence, follow=False)) == []


def test_a_broker_that_restarts_does_not_end_the_events(
    broker: Broker, fake: FakeBroker, background: Callable[..., Future[Any]]
):
    with broker.events() as events:
        fake.wait_for_subscription()
        fake.happen("k1")
        assert next(events).key == "k1"
        waiting = background(next, events)
        fake.stop()
        fake.subscriptions.clear()
        fake.record("default", "remove", "k1", None)
        fake.start()
        fake.wait_for_subscription()
        fake.heartbeat()
        assert waiting.result(20).sequence == 2


def test_a_journal_that_stays_away_ends_the_events(broker: Broker, fake: FakeBroker):
    fault = protocol.Fault(code="unavailable", message="restarting")
    fake.script.append(fake_broker.reply(error=fault))
    fake.happen("k")
    with broker.events(0) as events:
        assert next(events).key == "k"
    fake.script.extend([fake_broker.reply(error=fault)] * 100)
    with broker.events(0, timeout=0.15) as events, pytest.raises(Unavailable, match="restarting"):
        next(events)


def test_the_publisher_of_a_tcp_broker_is_asked_for(fake: FakeBroker):
    def bind() -> None:
        port = fake.router.bind_to_random_port("tcp://127.0.0.1")
        fake.tcp = f"tcp://127.0.0.1:{port}"  # type: ignore[attr-defined]

    fake.run(bind)
    with snapbroker.connect(fake.tcp) as broker, broker.events() as events:  # type: ignore[attr-defined]
        fake.wait_for_subscription()
        broker.prepare("k")
        assert next(events).key == "k"
    assert "status" in fake.received[0].verbs


# Workspaces.


def mounted_below(directory: Path) -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(directory) in line]


@pytest.mark.root
def test_a_workspace_is_committed(broker: Broker, fake: FakeBroker):
    with broker.workspace(commit_as="result", labels={"a": "b"}, sync=True) as path:
        assert mounted_below(path)
        (path / "file").write_text("made")
    assert not path.exists()
    assert (fake.directory / "files/result/file").read_text() == "made"
    assert [key for _, key in fake.snapshots] == ["result"]
    assert broker.stat("result").labels == {"a": "b"}
    assert fake.requests("commit")[0].calls[0].sync


@pytest.mark.root
def test_a_workspace_is_discarded(broker: Broker, fake: FakeBroker):
    with broker.workspace(key="job-1") as path:
        assert broker.stat("job-1").kind is Kind.ACTIVE
    assert not path.exists()
    assert fake.snapshots == {}


@pytest.mark.root
def test_a_workspace_whose_block_fails_leaves_nothing(broker: Broker, fake: FakeBroker):
    with pytest.raises(ZeroDivisionError), broker.workspace(commit_as="result") as path:
        1 / 0  # noqa: B018
    assert not path.exists()
    assert not mounted_below(path)
    assert fake.snapshots == {}


@pytest.mark.root
def test_a_workspace_that_somebody_still_uses_is_not_committed(broker: Broker, fake: FakeBroker):
    with pytest.raises(FailedPrecondition, match="busy"), broker.workspace(commit_as="result") as path:
        held = os.open(path / "file", os.O_CREAT | os.O_WRONLY)
    os.close(held)
    assert not path.exists()
    assert fake.snapshots == {}


@pytest.mark.root
def test_a_workspace_that_cannot_be_committed_is_removed(broker: Broker, fake: FakeBroker):
    broker.prepare("taken")
    with pytest.raises(AlreadyExists), broker.workspace(commit_as="taken"):
        pass
    assert [key for _, key in fake.snapshots] == ["taken"]


@pytest.mark.root
def test_a_workspace_that_cannot_be_committed_is_kept_if_asked_for(broker: Broker, fake: FakeBroker):
    broker.prepare("taken")
    with pytest.raises(AlreadyExists) as raised, broker.workspace(commit_as="taken", keep_uncommitted=True) as path:
        (path / "file").write_text("made")
    (key,) = [key for _, key in fake.snapshots if key != "taken"]
    assert f"the work is kept in the active snapshot {key!r}" in raised.value.__notes__[0]
    assert (fake.directory / "files" / key / "file").read_text() == "made"
    assert not mounted_below(path)


@pytest.mark.root
def test_a_block_that_fails_is_discarded_whatever_is_kept(broker: Broker, fake: FakeBroker):
    with pytest.raises(ZeroDivisionError), broker.workspace(commit_as="result", keep_uncommitted=True):
        1 / 0  # noqa: B018
    assert fake.snapshots == {}


def test_a_key_that_somebody_else_prepared_is_left_alone(impatient: Broker, fake: FakeBroker):
    impatient.prepare("mine")
    with pytest.raises(AlreadyExists), impatient.workspace(key="mine"):
        pass
    fake.script.append(fake_broker.reply(error=protocol.Fault(code="unavailable", message="gone")))
    with pytest.raises(Unavailable), impatient.workspace(key="mine"):
        pass
    assert impatient.stat("mine").name == "mine"
    assert fake.requests("remove") == []


def test_a_random_key_is_removed_even_if_nobody_knows_whether_it_is_there(broker: Broker, fake: FakeBroker):
    def prepare_and_say_nothing(received: Received) -> None:
        fake.outcome(received, 0)
        fault = protocol.Fault(code="deadline_exceeded", message="late")
        received.part(Reply(error=fault), last=True)

    fake.script.append(prepare_and_say_nothing)
    with pytest.raises(DeadlineExceeded, match="late"), broker.workspace():
        pass
    assert fake.snapshots == {}


def test_a_workspace_that_cannot_be_removed_is_named(impatient: Broker, fake: FakeBroker):
    gone = fake_broker.reply(error=protocol.Fault(code="unavailable", message="gone"))
    fake.script.extend([gone, gone])
    with pytest.raises(Unavailable) as raised, impatient.workspace():
        pass
    assert "'workspace-" in raised.value.__notes__[0]


def test_the_library_loads_what_is_used():
    import subprocess
    import sys

    code = "import sys, snapbroker, snapbroker.protocol; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"zmq", "asyncio", "anyio"} & set(loaded)
    code = "import sys, snapbroker; snapbroker.connect; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "anyio" not in loaded
    with pytest.raises(AttributeError):
        snapbroker.nothing  # noqa: B018


def test_no_socket_is_left_open(fake: FakeBroker):
    with snapbroker.connect(fake.endpoint, snapshotter="overlayfs") as broker:
        events = broker.events()
        context = events._connection.sockets.context
        broker.status()
    assert not context.closed
    events.close()
    assert context.closed
