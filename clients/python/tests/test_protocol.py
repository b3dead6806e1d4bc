"""Whatever bytes come in, decoding gives a message or an error of the contract: nothing else gets out."""

import contextlib

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from snapbroker import protocol
from snapbroker.contract import Event, Info, Kind
from snapbroker.errors import ERRORS, BrokerError, Internal, InvalidArgument, NotFound, Unimplemented
from snapbroker.protocol import BODY_BYTES_MAX, CALLS_MAX, VERBS, Fault, Outcome, Prepare, Reply, Request, Stat

DECODERS = (protocol.decode_request, protocol.decode_reply, protocol.decode_event, protocol.decode_heartbeat)

# A text may hold anything but half a surrogate pair, which is no UTF-8.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
label_maps = st.dictionaries(texts, texts, max_size=3)
integers = st.integers(-(2**63), 2**64 - 1)
naturals = st.integers(0, 2**64 - 1)
kinds = st.sampled_from(list(Kind))
infos = st.builds(Info, texts, kinds, texts, label_maps, integers, integers)
text_tuples = st.lists(texts, max_size=3).map(tuple)
calls = st.one_of(
    st.builds(Prepare, key=texts, parent=texts, labels=label_maps),
    st.builds(protocol.View, key=texts, parent=texts, labels=label_maps),
    st.builds(protocol.Commit, name=texts, key=texts, parent=texts, labels=label_maps, sync=st.booleans()),
    st.builds(protocol.Remove, key=texts),
    st.builds(protocol.Mounts, key=texts),
    st.builds(Stat, key=texts),
    st.builds(protocol.Update, name=texts, labels=label_maps, fieldpaths=text_tuples),
    st.builds(protocol.UsageOf, key=texts),
    st.builds(protocol.Walk, filters=text_tuples, after=texts, page=integers, credit=integers),
    st.builds(protocol.Cleanup),
    st.builds(
        protocol.Events, since=integers, topics=text_tuples, page=integers, credit=integers, follow=st.booleans()
    ),
    st.builds(protocol.Cancel, request=st.binary(max_size=80)),
    st.builds(protocol.Status),
)
requests = st.builds(
    Request,
    calls=st.lists(calls, min_size=1, max_size=4).map(tuple),
    namespace=texts,
    atomic=st.booleans(),
    timeout_ms=integers,
)
faults = st.builds(Fault, code=texts, message=texts, details=st.dictionaries(texts, texts | integers, max_size=2))
outcomes = st.one_of(
    st.builds(Outcome, call=naturals, ok=st.builds(msgspec.Raw, infos.map(protocol.encode))),
    st.builds(Outcome, call=naturals, error=faults),
    st.builds(Outcome, call=naturals, progress=st.builds(protocol.Progress, entries=naturals, bytes=naturals)),
)
replies = st.builds(Reply, outcomes=st.lists(outcomes, max_size=3).map(tuple), error=st.none() | faults)
events = st.builds(Event, naturals, naturals, integers, texts, texts, texts, texts, st.none() | infos)
heartbeats = st.builds(
    protocol.Heartbeat,
    sequence=naturals,
    previous=naturals,
    time=integers,
    topics=st.none() | st.dictionaries(texts, naturals, max_size=3),
)

# What MessagePack can hold, as a writer that knows nothing of the types would send it.
scalars = st.one_of(
    st.none(), st.booleans(), integers, st.floats(), texts, st.binary(max_size=20), st.sampled_from(VERBS),
    st.builds(msgspec.msgpack.Ext, st.integers(-128, 127).filter(lambda code: code != -1), st.binary(max_size=20)),
)  # fmt: skip
field_names = st.sampled_from(
    ["calls", "verb", "key", "name", "labels", "outcomes", "call", "ok", "error", "code", "message", "details",
     "sequence", "previous", "time", "info", "kind", "topics", "namespace", "since", "request"]
)  # fmt: skip
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(field_names | texts, inner, max_size=6),
    max_leaves=20,
)


@st.composite
def damaged(draw):
    """The bytes of a real message with some of them changed, dropped, doubled or cut off."""
    body = bytearray(protocol.encode(draw(requests | replies | events | heartbeats)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(body)))
        damage = draw(st.sampled_from(["change", "insert", "remove", "cut", "repeat"]))
        if damage == "change" and at < len(body):
            body[at] = draw(st.integers(0, 255))
        elif damage == "insert":
            body[at:at] = draw(st.binary(min_size=1, max_size=5))
        elif damage == "remove":
            del body[at : at + draw(st.integers(1, 5))]
        elif damage == "cut":
            del body[at:]
        else:
            body += body[at : at + 20]
    return bytes(body)


def decode_with_everything(body):
    """Every decoder on the bytes; anything but a message or an error of the contract fails the test."""
    for decode in DECODERS:
        for view in (body, memoryview(body)):
            try:
                message = decode(view)
            except BrokerError as error:
                assert type(error) in ERRORS.values()  # noqa: PT017 - both ways out are looked at
                error.message.encode()
            else:
                protocol.encode(message)


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xc1")
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\xdf\xff\xff\xff\xff")
@example(b"\xdb\xff\xff\xff\xff")
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\xc9\xff\xff\xff\xff\x05")
@example(b"\x81\xa5calls\xdd\x7f\xff\xff\xff")
@example(b"\x81\x80\x01")
@example(b"\x81\xa5calls\x91\x81\xa4verb\xa3\xff\xfe\xfd")
@example(b"\xc7\x0c\xff" + b"\xff" * 12)
def test_garbage(body):
    decode_with_everything(body)


@given(anything)
def test_messagepack_of_any_shape(value):
    decode_with_everything(msgspec.msgpack.encode(value))


@given(damaged())
def test_damaged_messages(body):
    decode_with_everything(body)


FIELD = b"\x82\xa1x%s\xa5calls\x91\x82\xa4verb\xa4stat\xa3key\xa1k"
DETAIL = b"\x81\xa5error\x83\xa4code\xa1x\xa7message\xa0\xa7details\x81\xa1x%s"
ANSWER = b"\x81\xa8outcomes\x91\x82\xa4call\x00\xa2ok%s"


@pytest.mark.parametrize(
    "deep", [b"\x91" * 200_000 + b"\xc0", b"\x81\xa1a" * 200_000 + b"\xc0"], ids=["arrays", "maps"]
)
@pytest.mark.parametrize("place", [b"%s", FIELD, DETAIL, ANSWER], ids=["body", "field", "detail", "answer"])
def test_nesting_deeper_than_any_stack(deep, place):
    for decode in DECODERS:
        with pytest.raises(BrokerError):
            decode(place % deep)


@pytest.mark.parametrize("odd", [b"\x80", b"\xc7\x0c\xff" + b"\xff" * 12, b"\xd6\xff\x00\x00\x00\x01", b"\xa2\xff\xfe"])
@pytest.mark.parametrize("place", [b"%s", FIELD, DETAIL, ANSWER, b"\x81%s\x01"])
def test_odd_values_in_places_nobody_reads(odd, place):
    decode_with_everything(place % odd)


def test_a_body_over_the_limit_is_not_even_read():
    with pytest.raises(InvalidArgument, match=str(BODY_BYTES_MAX + 1)):
        protocol.decode_request(bytes(BODY_BYTES_MAX + 1))


def test_no_more_calls_than_allowed():
    request = Request(calls=(Stat(key="a"),) * CALLS_MAX, namespace="default")
    assert protocol.decode_request(protocol.encode(request)) == request
    with pytest.raises(InvalidArgument, match=f"length <= {CALLS_MAX} - at"):
        protocol.decode_request(protocol.encode(Request(calls=(Stat(key="a"),) * (CALLS_MAX + 1))))


def test_an_unknown_verb_is_told_from_a_malformed_call():
    with pytest.raises(Unimplemented, match="lease"):
        protocol.decode_request(protocol.encode({"calls": [{"verb": "lease", "key": 3}]}))
    with pytest.raises(InvalidArgument):
        protocol.decode_request(protocol.encode({"calls": [{"verb": "stat", "key": 3}]}))


@given(requests)
def test_a_request_comes_back_as_it_went(request):
    assert protocol.decode_request(protocol.encode(request)) == request


@given(replies)
def test_a_reply_comes_back_as_it_went(reply):
    body = protocol.encode(reply)
    again = protocol.decode_reply(body)
    assert protocol.encode(again) == body
    assert [outcome.call for outcome in again.outcomes] == [outcome.call for outcome in reply.outcomes]
    assert again.error == reply.error


@given(events)
def test_an_event_comes_back_as_it_went(event):
    assert protocol.decode_event(protocol.encode(event)) == event


@given(heartbeats)
def test_a_heartbeat_comes_back_as_it_went(heartbeat):
    assert protocol.decode_heartbeat(protocol.encode(heartbeat)) == heartbeat


@given(damaged() | anything.map(msgspec.msgpack.encode) | st.binary(max_size=100))
def test_an_answer_is_read_or_refused_in_the_words_of_the_decoder(body):
    for answer in protocol.answer_types().values():
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            protocol.encode(protocol.decoder(answer).decode(body))


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_every_error_crosses_the_wire(error):
    raised = error("say what to do", {"retry_after_ms": 50})
    again = protocol.error_of(protocol.decode_reply(protocol.encode(Reply(error=protocol.fault(raised)))).error)
    assert type(again) is error
    assert (again.message, again.details, again.code) == (raised.message, raised.details, error.code)


def test_an_unknown_code_is_internal():
    assert type(protocol.error_of(Fault(code="on_fire", message="?"))) is Internal
    assert ERRORS["not_found"] is NotFound


def test_the_verbs_are_those_of_the_calls_and_of_the_answers():
    assert tuple(call.__struct_config__.tag for call in protocol.Call.__args__) == VERBS
    assert tuple(sorted(protocol.answer_types())) == tuple(sorted(VERBS))


def test_the_frames_of_an_event():
    frames = protocol.event_frames("overlayfs/default/snapshot/remove", 258, b"body")
    assert tuple(frames) == (
        b"overlayfs/default/snapshot/remove",
        b"SNBE\x01",
        b"\x00\x00\x00\x00\x00\x00\x01\x02",
        b"body",
    )


def test_no_event_has_the_topic_of_a_heartbeat():
    assert protocol.heartbeat_topic("overlayfs") == "overlayfs//heartbeat"
    assert protocol.heartbeat_topic("overlayfs").startswith("overlayfs/")
