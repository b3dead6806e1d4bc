"""Bad input through raw sockets: each gets the promised error, or is dropped and counted; nobody else notices."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from snapbroker.contract import LABEL_BYTES_MAX, LABELS_MAX, NAME_BYTES_MAX, NAMESPACE_BYTES_MAX
from snapbroker.errors import ERRORS, BrokerError
from snapbroker.protocol import (
    BODY_BYTES_MAX,
    CALLS_MAX,
    CREDIT_MAX,
    DONE,
    FILTER_BYTES_MAX,
    FILTERS_MAX,
    MORE,
    PAGE_MAX,
    REQUEST_ID_BYTES_MAX,
    REQUEST_VERSION,
    VERBS,
    Call,
    Cancel,
    Cleanup,
    Events,
    Prepare,
    Stat,
    Status,
    Update,
    Walk,
    decode_reply,
)
from tests.daemon.support import Bystander, wait_until
from tests.harness import Daemon, Wire

TARGET: Final = b"memory"


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Daemon]:
    """A daemon for bad input; at the end its processes are those of the beginning."""
    with Daemon({"memory": {"backend": "memory"}, "native": {"backend": "native"}}) as daemon:
        pids = pids_of(daemon)
        yield daemon
        assert pids_of(daemon) == pids
        for name in ("memory", "native"):
            with daemon.client(name, "bad") as broker:
                assert list(broker.events(since=0, follow=False)) == [], "something was changed"


def pids_of(daemon: Daemon) -> list[int]:
    """The broker's process and its actors'."""
    status = daemon.status()
    return [status.pid, *(actor.pid for actor in status.snapshotters)]


@pytest.fixture(scope="module")
def bystanders(fuzzed: Daemon) -> Iterator[list[Bystander]]:
    """Good clients of the same snapshotter and of another, from the first bad message to the last."""
    with Bystander(fuzzed, "memory") as one, Bystander(fuzzed, "native") as other:
        yield [one, other]


@pytest.fixture
def wire(fuzzed: Daemon, bystanders: list[Bystander]) -> Iterator[Wire]:
    """A socket that says bad things; nothing may come of what it says, and the good clients go on."""
    with fuzzed.wire("memory", "bad") as wire:
        yield wire
    for bystander in bystanders:
        bystander.wait_for_rounds(1)
        assert bystander.error is None
    with fuzzed.client("memory", "bad") as broker:
        assert list(broker.walk()) == [], "something was changed"


def dropped(daemon: Daemon) -> int:
    """How many messages the router has dropped."""
    return daemon.status().queues["router"]["dropped"]


_numbers = itertools.count(1)


def body_of(*calls: Call | dict[str, Any], **fields: Any) -> bytes:
    """A request's body, with whatever in it."""
    return msgspec.msgpack.encode({"calls": calls, "namespace": "bad", **fields})


def refused(wire: Wire, body: bytes, *, target: bytes = TARGET, version: bytes = REQUEST_VERSION) -> BrokerError:
    """Send a request that is refused as a whole; answers its error."""
    number = b"bad-%d" % next(_numbers)
    wire.send_frames(version, number, target, body)
    return refusal(wire, number)


def refusal(wire: Wire, number: bytes) -> BrokerError:
    """The error that the next reply is, to this request."""
    version, answered, status, body = wire.receive_frames()
    assert (version, answered, status) == (REQUEST_VERSION, number, DONE)
    reply = decode_reply(body)
    assert reply.error is not None, reply
    assert reply.outcomes == ()
    return ERRORS[reply.error.code](reply.error.message)


def error_of(wire: Wire, call: Call) -> BrokerError:
    """Send one call that fails; answers its error, whether it comes for the call or for the whole request."""
    try:
        (result,) = wire.call(call)
    except BrokerError as error:
        return error
    assert isinstance(result, BrokerError), result
    return result


# Frames.


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [REQUEST_VERSION],
        [REQUEST_VERSION, b"1"],
        [REQUEST_VERSION, b"1", TARGET],
        [REQUEST_VERSION, b"1", TARGET, body_of(Stat(key="a")), b""],
        [b"", REQUEST_VERSION, b"1", TARGET, body_of(Stat(key="a"))],
        [REQUEST_VERSION, b"", TARGET, body_of(Stat(key="a"))],
        [REQUEST_VERSION, b"i" * (REQUEST_ID_BYTES_MAX + 1), TARGET, body_of(Stat(key="a"))],
        [b"x"] * 2000,
    ],
    ids=["empty", "1", "2", "3", "5", "delimiter", "no-id", "long-id", "2000"],
)
def test_what_has_no_reply_address_is_dropped_and_counted(fuzzed: Daemon, wire: Wire, frames: list[bytes]) -> None:
    before = dropped(fuzzed)
    wire.send_frames(*frames)
    # The same connection goes on, and what it says next is answered first.
    assert isinstance(error_of(wire, Stat(key="nothing")), ERRORS["not_found"])
    assert dropped(fuzzed) == before + 1


def test_the_longest_request_id_is_echoed(wire: Wire) -> None:
    number = os.urandom(REQUEST_ID_BYTES_MAX)
    wire.send_frames(REQUEST_VERSION, number, TARGET, body_of())
    assert isinstance(refusal(wire, number), ERRORS["invalid_argument"])


@pytest.mark.parametrize("version", [b"", b"SNBR\x02", b"SNBR", b"SNBE\x01", b"x" * 1000])
def test_an_unknown_version(wire: Wire, version: bytes) -> None:
    error = refused(wire, body_of(Stat(key="a")), version=version)
    assert error.code == "unimplemented"


@pytest.mark.parametrize(
    "target", [b"nobody", b"\xff\xfe", b"\0", b"memory\0", b"Memory", b"../memory", b"m" * 100_000]
)
def test_an_unknown_target(wire: Wire, target: bytes) -> None:
    error = refused(wire, body_of(Stat(key="a")), target=target)
    assert error.code == "not_found"
    assert "memory, native" in error.message
    assert len(error.message) < 500


def test_a_body_of_more_than_the_limit(fuzzed: Daemon, wire: Wire) -> None:
    assert refused(wire, bytes(BODY_BYTES_MAX + 1)).code == "invalid_argument"
    assert refused(wire, bytes(BODY_BYTES_MAX + 1), target=b"").code == "invalid_argument"
    # Far beyond it ZeroMQ ends the connection, before all of it is in anybody's memory.
    with fuzzed.wire("memory", "bad") as other:
        other.send_frames(REQUEST_VERSION, b"1", TARGET, bytes(2 * BODY_BYTES_MAX))
        assert isinstance(error_of(other, Stat(key="nothing")), ERRORS["not_found"])


def test_a_request_id_that_is_still_open(fuzzed: Daemon, wire: Wire) -> None:
    follow = encode_request(Events(since=0, follow=True))
    wire.send_frames(REQUEST_VERSION, b"same", TARGET, follow)
    wire.send_frames(REQUEST_VERSION, b"same", TARGET, encode_request(Stat(key="a")))
    assert refusal(wire, b"same").code == "invalid_argument"
    # Another client's requests are its own, whatever it calls them.
    with fuzzed.wire("memory", "bad") as other:
        other.send_frames(REQUEST_VERSION, b"same", TARGET, encode_request(Stat(key="a")))
        assert other.receive_frames()[1:3] == [b"same", DONE]
        other.send_frames(REQUEST_VERSION, b"taking", TARGET, encode_request(Cancel(request=b"same")))
        _, _, _, body = other.receive_frames()
        (outcome,) = decode_reply(body).outcomes
        assert outcome.error is not None
        assert outcome.error.code == "not_found"
    wire.send_frames(REQUEST_VERSION, b"own", TARGET, encode_request(Cancel(request=b"same")))
    ended = {answered: status for _, answered, status, _ in (wire.receive_frames(), wire.receive_frames())}
    assert ended == {b"same": DONE, b"own": DONE}


def encode_request(*calls: Call) -> bytes:
    """A good request's body."""
    return body_of(*calls)


# Bodies.

GARBAGE: Final = {
    "empty": b"",
    "never-used": b"\xc1",
    "text": b"calls: []",
    "truncated": body_of(Stat(key="a"))[:-3],
    "longer": body_of(Stat(key="a")) + b"\x00",
    "nested-lists": b"\x91" * 100_000 + b"\x90",
    "nested-maps": b"\x81\xa1a" * 50_000 + b"\x80",
    "huge-list": b"\xdd\xff\xff\xff\xff",
    "huge-text": b"\xdb\xff\xff\xff\xffx",
    "not-utf-8": msgspec.msgpack.encode({"calls": []}) + b"\xa2\xff\xfe",
    "key-not-utf-8": b"\x82\xa5calls\x91\x82\xa4verb\xa4stat\xa3key\xa2\xff\xfe\xa9namespace\xa3bad",
    "a-number": msgspec.msgpack.encode(7),
    "a-list": msgspec.msgpack.encode([1, 2]),
    "no-calls": msgspec.msgpack.encode({"namespace": "bad"}),
    "calls-a-map": msgspec.msgpack.encode({"calls": {}, "namespace": "bad"}),
    "no-call": body_of(),
    "call-a-number": msgspec.msgpack.encode({"calls": [1]}),
    "no-verb": body_of({"key": "a"}),
    "verb-a-number": body_of({"verb": 3}),
    "no-key": body_of({"verb": "stat"}),
    "key-a-number": body_of({"verb": "stat", "key": 3}),
    "key-bytes": body_of({"verb": "stat", "key": b"a"}),
    "labels-a-list": body_of({"verb": "prepare", "key": "a", "labels": ["x"]}),
    "label-a-number": body_of({"verb": "prepare", "key": "a", "labels": {"x": 1}}),
    "sync-a-text": body_of({"verb": "commit", "key": "a", "name": "b", "sync": "yes"}),
    "since-a-float": body_of({"verb": "events", "since": 1.5}),
    "atomic-a-number": body_of(Stat(key="a"), atomic=1),
    "timeout-a-text": body_of(Stat(key="a"), timeout_ms="5"),
    "timeout-negative": body_of(Stat(key="a"), timeout_ms=-1),
    "timeout-endless": body_of(Stat(key="a"), timeout_ms=2**63),
    "namespace-a-number": msgspec.msgpack.encode({"calls": [{"verb": "stat", "key": "a"}], "namespace": 1}),
    "too-many-calls": body_of(*[Stat(key="a")] * (CALLS_MAX + 1)),
    "one-bad-of-many": body_of(*[Prepare(key="never")] * 10, {"verb": "stat", "key": 3}),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_body_that_is_no_request(wire: Wire, name: str) -> None:
    # The broker itself has no queue, and so no use for a deadline.
    targets = [TARGET] if name in ("timeout-negative", "timeout-endless") else [TARGET, b""]
    for target in targets:
        error = refused(wire, GARBAGE[name], target=target)
        assert error.code == "invalid_argument"
        assert len(error.message) < 1000


def test_an_unknown_verb(wire: Wire) -> None:
    error = refused(wire, body_of({"verb": "explode", "key": "a"}))
    assert error.code == "unimplemented"
    assert all(verb in error.message for verb in VERBS)
    assert len(refused(wire, body_of({"verb": "x" * 100_000})).message) < 1000


def test_most_calls_and_unknown_fields_are_taken(wire: Wire) -> None:
    results = wire.call(*[Stat(key="a")] * CALLS_MAX)
    assert {type(result) for result in results} == {ERRORS["not_found"]}
    body = body_of({"verb": "stat", "key": "a", "colour": "red"}, mood={"good": [1, 2]})
    wire.send_frames(REQUEST_VERSION, b"1", TARGET, body)
    _, _, status, answer = wire.receive_frames()
    assert status == DONE
    assert decode_reply(answer).error is None


@pytest.mark.parametrize(
    ("namespace", "code"),
    [
        ("", "failed_precondition"),
        ("a/b", "invalid_argument"),
        ("-a", "invalid_argument"),
        ("a..b", "invalid_argument"),
        ("version", "invalid_argument"),
        ("ümlaut", "invalid_argument"),
        ("a\0b", "invalid_argument"),
        ("a\n", "invalid_argument"),
        ("n" * (NAMESPACE_BYTES_MAX + 1), "invalid_argument"),
    ],
)
def test_an_invalid_namespace(wire: Wire, namespace: str, code: str) -> None:
    assert refused(wire, body_of(Prepare(key="a"), namespace=namespace)).code == code


# Fields.

TOO_MUCH: Final[dict[str, Callable[[], Call]]] = {
    "no-key": lambda: Prepare(key=""),
    "nul": lambda: Prepare(key="a\0b"),
    "long-key": lambda: Prepare(key="k" * (NAME_BYTES_MAX + 1)),
    "long-key-in-bytes": lambda: Prepare(key="ü" * (NAME_BYTES_MAX // 2 + 1)),
    "long-parent": lambda: Prepare(key="a", parent="p" * (NAME_BYTES_MAX + 1)),
    "long-stat": lambda: Stat(key="k" * (NAME_BYTES_MAX + 1)),
    "long-label": lambda: Prepare(key="a", labels={"l": "v" * LABEL_BYTES_MAX}),
    "nameless-label": lambda: Prepare(key="a", labels={"": "v"}),
    "many-labels": lambda: Prepare(key="a", labels={f"l{n}": "v" for n in range(LABELS_MAX + 1)}),
    "long-filter": lambda: Walk(filters=("name==" + "x" * FILTER_BYTES_MAX,)),
    "bad-filter": lambda: Walk(filters=("name=x",)),
    "many-filters": lambda: Walk(filters=("name==x",) * (FILTERS_MAX + 1)),
    "many-topics": lambda: Events(since=0, topics=("memory/",) * (FILTERS_MAX + 1)),
    "no-page": lambda: Walk(page=0),
    "large-page": lambda: Walk(page=PAGE_MAX + 1),
    "negative-page": lambda: Events(since=0, page=-1),
    "no-credit": lambda: Walk(credit=0),
    "much-credit": lambda: Events(since=0, credit=CREDIT_MAX + 1),
    "huge-numbers": lambda: Walk(page=2**63, credit=2**63),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_field_beyond_its_limit(wire: Wire, name: str) -> None:
    assert error_of(wire, TOO_MUCH[name]()).code == "invalid_argument"


@pytest.mark.parametrize("since", [-1, -(2**63), 10**15, 2**63, 2**64 - 1])
def test_a_sequence_that_was_never_given(wire: Wire, since: int) -> None:
    assert error_of(wire, Events(since=since)).code == "out_of_range"


def test_what_makes_no_sense_to_whom_it_is_said(wire: Wire) -> None:
    assert error_of(wire, Status()).code == "unimplemented"
    assert error_of(wire, Cancel(request=b"nothing")).code == "not_found"
    assert error_of(wire, Update(name="nothing", labels={}, fieldpaths=("Labels",))).code == "not_found"
    to_broker = wire.call(Status(), Stat(key="a"), Walk(), snapshotter="")
    assert [getattr(result, "code", "ok") for result in to_broker] == ["ok", "unimplemented", "unimplemented"]
    for call in (Walk(), Events(since=0), Cleanup(), Cancel(request=b"1")):
        assert refused(wire, body_of(call, call, atomic=True)).code == "unimplemented"
    atomic = wire.call(Status(), Status(), atomic=True)
    assert [getattr(result, "code", "ok") for result in atomic] == ["unimplemented", "cancelled"]


def test_a_key_beyond_its_limit_harms_no_other_call_of_the_request(wire: Wire) -> None:
    codes = [
        getattr(result, "code", "ok")
        for result in wire.call(Stat(key="a"), Stat(key=""), Walk(page=0), Walk(), Stat(key="b"))
    ]
    assert codes == ["not_found", "invalid_argument", "invalid_argument", "ok", "not_found"]


# Garbage without end.

FRAMES = st.lists(
    st.one_of(
        st.binary(max_size=80),
        st.sampled_from([REQUEST_VERSION, TARGET, b"native", b"", b"1", MORE, DONE]),
        st.sampled_from(list(GARBAGE.values())),
    ),
    min_size=1,
    max_size=7,
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=20),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(SCALARS, inner, max_size=4)),
    max_leaves=10,
)
FIELDS = st.sampled_from(
    ["key", "parent", "name", "labels", "filters", "page", "credit", "since", "topics", "request", "fieldpaths", "sync"]
)
# What may change or wait for something belongs to the other tests: here nothing may come of it.
HARMLESS = st.sampled_from(["stat", "mounts", "usage", "walk", "cancel", "status", "explode", ""])
CALLS = st.lists(
    st.one_of(VALUES, st.builds(lambda verb, rest: {**rest, "verb": verb}, HARMLESS, st.dictionaries(FIELDS, VALUES))),
    max_size=4,
)
REQUESTS = st.builds(
    lambda calls, rest: {"namespace": "bad", **rest, "calls": calls},
    CALLS,
    st.dictionaries(st.sampled_from(["namespace", "atomic", "timeout_ms", "lease", "x"]), VALUES),
)
FUZZ: Final = settings(
    max_examples=600,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)


@FUZZ
@given(frames=FRAMES)
def test_any_frames_get_an_error_or_nothing(wire: Wire, frames: list[bytes]) -> None:
    wire.send_frames(*frames)
    expect_end(wire)


@FUZZ
@given(request=REQUESTS, target=st.sampled_from([b"", TARGET, b"native"]))
def test_any_request_gets_a_reply(wire: Wire, request: dict[str, Any], target: bytes) -> None:
    with contextlib.suppress(OverflowError, ValueError):
        body = msgspec.msgpack.encode(request)
        number = b"any-%d" % next(_numbers)
        wire.send_frames(REQUEST_VERSION, number, target, body)
        while True:
            version, answered, status, reply = wire.receive_frames()
            assert (version, answered) == (REQUEST_VERSION, number)
            assert_of_the_contract(reply)
            if status == DONE:
                return


def expect_end(wire: Wire) -> None:
    """Take replies until that of a request sent last; whatever comes before it is a reply of the contract."""
    number = b"end-%d" % next(_numbers)
    wire.send_frames(REQUEST_VERSION, number, b"nobody", b"")
    while True:
        version, answered, _, reply = wire.receive_frames()
        assert version == REQUEST_VERSION
        assert_of_the_contract(reply)
        if answered == number:
            return


def assert_of_the_contract(body: bytes) -> None:
    """A reply that decodes, with codes of the contract, and not the broker's own fault."""
    reply = decode_reply(body)
    faults = [outcome.error for outcome in reply.outcomes if outcome.error] + ([reply.error] if reply.error else [])
    for fault in faults:
        assert fault.code in ERRORS
        assert fault.code != "internal", fault.message


def test_peers_that_speak_something_else(fuzzed: Daemon, wire: Wire) -> None:
    """Sockets of other kinds, and bytes that are no ZMTP at all."""
    before = dropped(fuzzed)
    with zmq.Context() as context, context.socket(zmq.REQ) as requester:
        requester.linger = 0
        requester.connect(fuzzed.endpoint)
        # A REQ socket puts an empty frame before its message, so that this has one frame too many.
        requester.send_multipart([REQUEST_VERSION, b"1", TARGET, body_of(Stat(key="a"))])
        wait_until(lambda: dropped(fuzzed) == before + 1, "the message to be dropped")
    # Last: libzmq may take bytes of chance for messages of its first protocol, which are dropped some time later.
    path = fuzzed.endpoint.removeprefix("ipc://")
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, os.urandom(4096), b""):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(path)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                stranger.sendall(noise)
    assert isinstance(error_of(wire, Stat(key="nothing")), ERRORS["not_found"])


def test_clients_that_come_and_go_in_the_middle_of_a_request(fuzzed: Daemon, wire: Wire) -> None:
    def come_and_go() -> None:
        for _ in range(30):
            with fuzzed.wire("native", "bad") as other:
                other.send(*[Stat(key="a")] * 500)
                other.send(Walk())
                other.send(Events(since=0, follow=True), timeout_ms=200)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Whoever is gone is forgotten once its requests are done.
    fuzzed.wait_for(lambda status: status.queues["mailbox.native"]["open"] <= 1)
