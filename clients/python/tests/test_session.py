"""Requests and replies without a socket: whatever the broker sends, every call ends with its answer or an error."""

from __future__ import annotations

import math
import os
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapbroker import endpoints, protocol, session
from snapbroker.contract import Info, Kind
from snapbroker.errors import (
    BrokerError,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
)
from snapbroker.protocol import Outcome, Progress, Reply
from snapbroker.session import Answer, Exchange, Stream


def encoded(answer: Any) -> msgspec.Raw:
    return msgspec.Raw(protocol.encode(answer))


def info(number: int) -> Info:
    return Info(f"k{number}", Kind.ACTIVE)


def answered(number: int) -> Outcome:
    return Outcome(call=number, ok=encoded(info(number)))


def refused(number: int) -> Outcome:
    return Outcome(call=number, error=protocol.Fault(code="not_found", message=f"no k{number}"))


def stats(count: int) -> tuple[Exchange, list[Answer[Info]]]:
    exchange = Exchange(b"overlayfs", "default", 60.0)
    answers: list[Answer[Info]] = []
    for number in range(count):
        answers.append(Answer())
        exchange.add(protocol.Stat(key=f"k{number}"), session.read_info, answers[-1])
    return exchange, answers


def part(*outcomes: Outcome, error: protocol.Fault | None = None) -> bytes:
    return protocol.encode(Reply(outcomes=outcomes, error=error))


@given(st.data())
def test_outcomes_in_any_order_and_any_parts(data: st.DataObject):
    count = data.draw(st.integers(1, 12))
    bad = data.draw(st.sets(st.integers(0, count - 1)))
    order = data.draw(st.permutations(range(count)))
    twice = data.draw(st.lists(st.sampled_from(order), max_size=4))
    exchange, answers = stats(count)
    sent = [refused(number) if number in bad else answered(number) for number in (*order, *twice)]
    while sent:
        size = data.draw(st.integers(1, len(sent)))
        exchange.receive(part(*sent[:size]), last=size == len(sent))
        sent = sent[size:]
    for number, answer in enumerate(answers):
        if number in bad:
            with pytest.raises(NotFound, match=f"no k{number}"):
                answer.result()
        else:
            assert answer.result() == info(number)
    assert exchange.unsettled == 0


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.integers(-2, 3) | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["outcomes", "call", "ok", "error", "progress", "code"]), inner, max_size=4),
    max_leaves=12,
).map(protocol.encode))  # fmt: skip
def test_garbage_is_a_part_or_internal(body: bytes):
    exchange, answers = stats(2)
    try:
        exchange.receive(body, last=True)
    except Internal as error:
        exchange.fail(error)
    for answer in answers:
        assert isinstance(answer.error(), BrokerError)
    stream = Stream(b"overlayfs", "default", 60.0, protocol.Walk(), session.read_walk)
    try:
        stream.receive(body, last=True)
    except Internal as error:
        stream.fail(error)
    assert stream.over


def test_more_to_come_until_every_call_is_settled():
    exchange, answers = stats(2)
    assert not exchange.receive(part(answered(1)), last=False)
    assert not answers[0].done()
    assert exchange.receive(part(answered(0)), last=False)


def test_the_last_part_leaves_no_call_open():
    exchange, _ = stats(2)
    with pytest.raises(Internal, match="without an outcome"):
        exchange.receive(part(answered(0)), last=True)


@pytest.mark.parametrize("index", [-1, 2])
def test_an_outcome_of_no_call(index: int):
    exchange, _ = stats(2)
    with pytest.raises(Internal, match=f"call {index} of a request of 2"):
        exchange.receive(part(Outcome(call=index)), last=True)


def test_an_error_of_the_request_is_that_of_every_open_call_and_an_exception_each():
    exchange, answers = stats(3)
    exchange.receive(part(answered(1)), last=False)
    fault = protocol.Fault(code="unavailable", message="gone", details={"a": 1})
    assert exchange.receive(part(error=fault), last=True)
    assert answers[1].result() == info(1)
    first, last = answers[0].error(), answers[2].error()
    assert first is not last
    assert type(first) is type(last) is protocol.ERRORS["unavailable"]
    assert first.details == {"a": 1}


@pytest.mark.parametrize("ok", [b"", b"\xc1", b"\xa1x", protocol.encode({"name": 1})])
def test_an_answer_of_another_shape_fails_its_own_call_alone(ok: bytes):
    exchange, answers = stats(2)
    outcome = Outcome(call=0) if not ok else Outcome(call=0, ok=msgspec.Raw(ok))
    if ok == b"\xc1":
        with pytest.raises(Internal):
            exchange.receive(part(outcome, answered(1)), last=True)
        return
    assert exchange.receive(part(outcome, answered(1)), last=True)
    with pytest.raises(Internal, match="malformed"):
        answers[0].result()
    assert answers[1].result() == info(1)


def test_progress_goes_to_its_call():
    exchange, _ = stats(1)
    seen: list[Progress] = []
    exchange.add(protocol.Prepare(key="k1"), session.read_mounts, Answer(), seen.append)
    exchange.receive(part(Outcome(call=1, progress=Progress(entries=3))), last=False)
    exchange.receive(part(Outcome(call=0, progress=Progress(entries=4))), last=False)
    assert seen == [Progress(entries=3)]
    assert exchange.unsettled == 2


def test_a_callback_that_fails_gives_up_its_own_call_and_no_other():
    exchange, answers = stats(1)
    own: Answer[Any] = Answer()

    def fail(progress: Progress) -> None:
        raise ValueError("mine")

    exchange.add(protocol.Prepare(key="k1"), session.read_mounts, own, fail)
    exchange.receive(part(Outcome(call=1, progress=Progress(entries=3))), last=False)
    with pytest.raises(ValueError, match="mine"):
        own.result()
    assert not exchange.forsaken
    exchange.receive(part(answered(0)), last=False)
    assert answers[0].result() == info(0)
    assert exchange.forsaken


@given(st.data())
def test_forsaken_when_every_open_call_is_given_up(data: st.DataObject):
    """A model: `waiting` callers, `open` outcomes; given up callers never outnumber what is counted."""
    count = data.draw(st.integers(1, 8))
    exchange, answers = stats(count)
    waiting, pending = set(range(count)), set(range(count))
    while pending:
        number = data.draw(st.sampled_from(sorted(pending)))
        if number in waiting and data.draw(st.booleans()):
            answers[number].set_exception(ValueError())
            exchange.abandon()
            waiting.discard(number)
        else:
            exchange.receive(part(answered(number)), last=False)
            pending.discard(number)
            waiting.discard(number)
        assert exchange.forsaken == bool(pending and not pending & waiting)


def test_what_is_given_up_before_sending_is_not_sent():
    exchange, answers = stats(4)
    for number in (0, 2):
        answers[number].set_exception(ValueError())
    exchange.abandon()
    exchange.without_abandoned()
    # The second caller learns of its cancellation only afterwards.
    exchange.abandon()
    assert [call.key for call in exchange.calls] == ["k1", "k3"]
    assert not exchange.forsaken
    assert exchange.receive(part(answered(0), answered(1)), last=True)
    assert answers[1].result() == info(0)
    assert answers[3].result() == info(1)


def test_halves_have_all_calls_once():
    exchange, answers = stats(5)
    halves = exchange.halves()
    assert [[call.key for call in half.calls] for half in halves] == [["k0", "k1"], ["k2", "k3", "k4"]]
    for half in halves:
        half.receive(part(*(answered(number) for number in range(len(half.calls)))), last=True)
    assert all(answer.done() for answer in answers)


def test_what_is_atomic_has_no_halves():
    exchange = Exchange(b"", "default", 1.0, atomic=True)
    for number in range(2):
        exchange.add(protocol.Stat(key=f"k{number}"), session.read_info, Answer())
    assert exchange.halves() == []


def page(number: int, following: str = "") -> Outcome:
    return Outcome(call=0, ok=encoded(protocol.WalkPage(infos=(info(number),), sequence=9, next=following)))


def test_pages_come_before_the_error_that_ends_them():
    stream = Stream(b"overlayfs", "default", 60.0, protocol.Walk(), session.read_walk)
    woken: list[int] = []
    stream.wake = lambda: woken.append(len(stream.pages))
    assert stream.take() is None
    assert not stream.receive(part(page(0, "k0")), last=False)
    assert stream.receive(part(refused(0)), last=True)
    taken = stream.take()
    assert taken is not None
    assert taken.infos == (info(0),)
    with pytest.raises(NotFound):
        stream.take()
    assert len(woken) >= 2


def test_a_stream_without_a_page_is_no_stream():
    stream = Stream(b"overlayfs", "default", 60.0, protocol.Walk(), session.read_walk)
    with pytest.raises(Internal, match="without a page"):
        stream.receive(part(), last=True)


def test_a_walk_never_goes_back():
    session.check_continues(protocol.WalkPage(next="b"), "a")
    session.check_continues(protocol.WalkPage(), "a")
    for following in ("a", "A"):
        with pytest.raises(Internal, match="continues"):
            session.check_continues(protocol.WalkPage(next=following), "a")


@pytest.mark.parametrize(
    "call",
    [
        lambda: session.text(7),
        lambda: session.text(b"k"),
        lambda: session.texts("labels.a", "fieldpaths"),
        lambda: session.texts([1], "fieldpaths"),
        lambda: session.texts(7, "topics"),
        lambda: session.label_map({"a": 1}),  # type: ignore[dict-item]
        lambda: session.label_map({1: "a"}),  # type: ignore[dict-item]
        lambda: session.prepare("k", None, None),  # type: ignore[arg-type]
        lambda: session.seconds("1"),  # type: ignore[arg-type]
        lambda: session.seconds(math.nan),
        lambda: session.encode([protocol.Stat(key="\udc80")], "default", 1.0),
        lambda: session.encode([protocol.Stat(key="k" * protocol.BODY_BYTES_MAX)], "default", 1.0),
    ],
)
def test_what_cannot_be_sent(call: Any):
    with pytest.raises(InvalidArgument):
        call()


@pytest.mark.parametrize("timeout", [0, -1.5])
def test_no_time_left(timeout: float):
    with pytest.raises(DeadlineExceeded, match="not sent"):
        session.seconds(timeout)


def test_timeouts_on_the_wire():
    assert [session.timeout_ms(timeout) for timeout in (1.5, 0.0001, 60, math.inf)] == [1500, 1, 60000, 0]


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [protocol.REQUEST_VERSION, b"1", protocol.DONE],
        [b"SNBR\x02", b"1", protocol.DONE, b""],
        [protocol.REQUEST_VERSION, b"1", b"\x02", b""],
        [protocol.REQUEST_VERSION, b"1", protocol.DONE, b"", b""],
    ],
)
def test_frames_that_are_no_reply(frames: list[bytes]):
    assert session.reply_frames(frames) is None


def test_an_answer_before_its_time():
    with pytest.raises(FailedPrecondition, match="end of its block"):
        Answer().result()


# Endpoints and names.


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch):
    for name in ("ENDPOINT", "EVENTS_ENDPOINT", "NAMESPACE", "SNAPSHOTTER"):
        monkeypatch.delenv(f"SNAPBROKER_{name}", raising=False)


def test_argument_then_environment_then_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert endpoints.router_endpoint() == "ipc:///run/snapbroker/router.sock"
    monkeypatch.setenv("SNAPBROKER_ENDPOINT", "/srv/x.sock")
    assert endpoints.router_endpoint() == "ipc:///srv/x.sock"
    assert endpoints.router_endpoint("tcp://host:1") == "tcp://host:1"


def test_the_default_of_a_user(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/9")
    assert endpoints.router_endpoint() == "ipc:///run/user/9/snapbroker/router.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert endpoints.router_endpoint() == "ipc:///run/user/1234/snapbroker/router.sock"


def test_a_relative_path_is_one_of_the_working_directory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir("/usr")
    assert endpoints.router_endpoint("r.sock") == "ipc:///usr/r.sock"


def test_the_publisher_is_beside_the_router(monkeypatch: pytest.MonkeyPatch):
    assert endpoints.events_endpoint(None, "ipc:///srv/router.sock") == "ipc:///srv/events.sock"
    assert endpoints.events_endpoint(None, "tcp://host:1") is None
    assert endpoints.events_endpoint(None, "ipc://@abstract") is None
    monkeypatch.setenv("SNAPBROKER_EVENTS_ENDPOINT", "tcp://other:2")
    assert endpoints.events_endpoint(None, "ipc:///srv/router.sock") == "tcp://other:2"
    assert endpoints.events_endpoint("/e", "ipc:///srv/router.sock") == "ipc:///e"


def status(events: str = "", *names: str) -> protocol.StatusAnswer:
    snapshotters = tuple(protocol.ActorStatus(name=name, backend="memory", state="ready") for name in names)
    return protocol.StatusAnswer(
        version="0",
        pid=1,
        uptime_seconds=1.0,
        resident_bytes=1,
        endpoint="",
        events_endpoint=events,
        snapshotters=snapshotters,
    )


@pytest.mark.parametrize(
    ("sent", "reached"),
    [
        ("tcp://0.0.0.0:2", "tcp://node7:2"),
        ("tcp://*:2", "tcp://node7:2"),
        ("tcp://[::]:2", "tcp://node7:2"),
        ("tcp://10.0.0.1:2", "tcp://10.0.0.1:2"),
    ],
)
def test_a_publisher_on_every_host_is_on_the_routers(sent: str, reached: str):
    assert endpoints.reachable_events_endpoint(status(sent), "tcp://node7:1") == reached


def test_a_broker_without_events():
    with pytest.raises(FailedPrecondition, match="SNAPBROKER_EVENTS_ENDPOINT"):
        endpoints.reachable_events_endpoint(status(), "tcp://node7:1")


def test_namespaces(monkeypatch: pytest.MonkeyPatch):
    assert endpoints.namespace_or_default() == "default"
    monkeypatch.setenv("SNAPBROKER_NAMESPACE", "builds")
    assert endpoints.namespace_or_default() == "builds"
    assert endpoints.namespace_or_default("mine") == "mine"
    with pytest.raises(InvalidArgument):
        endpoints.namespace_or_default("no/slash")


def test_snapshotters(monkeypatch: pytest.MonkeyPatch):
    assert endpoints.snapshotter_or_none() is None
    monkeypatch.setenv("SNAPBROKER_SNAPSHOTTER", "btrfs")
    assert endpoints.snapshotter_or_none() == "btrfs"
    for name in ("a/b", "x" * 65, "\udc80"):
        with pytest.raises(InvalidArgument):
            endpoints.snapshotter_or_none(name)


def test_the_only_snapshotter():
    assert endpoints.only_snapshotter(status("", "native"), "ipc://x") == "native"
    with pytest.raises(InvalidArgument, match="native, btrfs") as raised:
        endpoints.only_snapshotter(status("", "native", "btrfs"), "ipc://x")
    assert raised.value.details["snapshotters"] == ["native", "btrfs"]
    with pytest.raises(NotFound, match="doctor"):
        endpoints.only_snapshotter(status(), "ipc://x")
