"""Bodies of requests at a whole snapshotter: each gets its reply, an error changes nothing, and the journal tells all.

The snapshotter is a real one on the memory backend, in this process, with its database, threads and loop. It is empty
before every input. After each, its records must be what the events replay to; and as long as requests come one by one,
their outcomes must be the oracle's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Final

import msgspec

from snapbroker.contract import SNAPSHOT_REF_LABEL, Info, check_namespace
from snapbroker.errors import ERRORS, BrokerError
from snapbroker.protocol import (
    BODY_BYTES_MAX,
    DONE,
    Call,
    Cancel,
    Cleanup,
    Commit,
    Events,
    Fault,
    Mounts,
    Prepare,
    Remove,
    Request,
    Stat,
    Status,
    Update,
    UsageOf,
    View,
    Walk,
    decode_reply,
    decode_request,
    encode,
)
from tests.fuzz import vectors
from tests.fuzz.draws import Draws
from tests.fuzz.snapshotter import DECODERS, NAME, Snapshotter
from tests.oracle import Oracle, Refused, check_chains, replay, timeless

_CHANGES: Final = (Prepare, View, Commit, Remove, Update, Cleanup)
_KNOWN: Final = (Prepare, View, Commit, Remove, Update, Stat, Mounts)
"""What the oracle answers for."""
_NAMES: Final = ("a", "b", "c", "d", "", "\0", "e" * 4096, "f" * 4097, "é" * 300, "a" * 401)
_NAMESPACES: Final = ("default", "default", "default", "other", "", "version", "a/b")
_LABELS: Final = ("a", "b", SNAPSHOT_REF_LABEL, "", "containerd.io/snapshot/uidmapping")
_PATHS: Final = ("labels.a", "labels", "labels.", "name", "labels.containerd.io/snapshot.ref")
_TOKENS: Final = (b"", b"", b"", b"one", b"two", bytes(64))


@cache
def _snapshotter() -> Snapshotter:
    return Snapshotter()


def one(data: bytes) -> None:
    """Some requests, one by one or together."""
    snapshotter = _snapshotter()
    begun = snapshotter.published
    draws = Draws(data)
    oracles: dict[str, Oracle] | None = {}
    certain, changes = True, 0
    while draws.left:
        bodies = [_body(draws) for _ in range(2 if draws.chance(8) else 1)]
        for body, parts in zip(bodies, snapshotter.ask(bodies), strict=True):
            request, outcomes = _check_reply(body, parts)
            if request is None:
                continue
            changed = sum(outcomes[number] is None for number, call in enumerate(request.calls) if _changes(call))
            changes += changed
            certain = certain and not (request.token and changed)
            oracles = _check_oracle(oracles if len(bodies) == 1 else None, request, outcomes, parts)
    happened = snapshotter.published - begun
    assert happened == changes if certain else happened <= changes, f"{happened} events of {changes} changes"
    if happened:
        _check_journal(snapshotter, begun)
        snapshotter.clear()
    else:
        assert not snapshotter.records()


def close() -> None:
    """Stop the snapshotter."""
    _snapshotter().close()


def seeds() -> Iterator[bytes]:
    """The golden requests, some lives of snapshots, and one of each verb that is built here."""
    for body in vectors.bodies("Request"):
        yield _script(body)
    for calls in _LIVES:
        yield _script(*(encode(Request(calls=(call,), namespace="default")) for call in calls))
        yield _script(encode(Request(calls=calls, namespace="default", atomic=True)))
        yield _script(encode(Request(calls=calls, namespace="default")))
        whole = encode(Request(calls=calls, namespace="default", atomic=True, token=b"one"))
        yield _script(whole, whole)
        singles = [encode(Request(calls=(call,), namespace="default", token=b"one")) for call in calls]
        yield _script(*singles[:1], *singles[:2])
    for verb in range(12):
        prepare = bytes((0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))
        yield prepare + bytes((0, 0, 0, 0, 0, verb, 0, 0, 0, 0, 0, 0))


_LAYER: Final = (Prepare(key="a", labels={"a": "b"}), Commit(name="base", key="a", sync=True))
_LIVES: Final[tuple[tuple[Call, ...], ...]] = (
    (*_LAYER, Prepare(key="a", parent="base"), Mounts(key="a"), Commit(name="top", key="a"), Stat(key="top"), Walk()),
    (*_LAYER, View(key="v", parent="base"), UsageOf(key="v"), Remove(key="base"), Remove(key="v"), Remove(key="base")),
    (*_LAYER, Prepare(key="b"), Commit(name="c", key="b", parent="base"), Remove(key="base"), Stat(key="c"), Cleanup()),
    (*_LAYER, Update(name="base", labels={"x": "y"}, fieldpaths=("labels.x", "labels.a")), Walk(filters=("labels.x",))),
    (
        Prepare(key="a"),
        Commit(name="base", key="a", labels={SNAPSHOT_REF_LABEL: "ref"}),
        Prepare(key="b", labels={SNAPSHOT_REF_LABEL: "ref"}),
        Prepare(key="b", parent="base", labels={SNAPSHOT_REF_LABEL: "ref"}),
    ),
    (Prepare(key="a"), Remove(key="a", fence=1), Mounts(key="a", fence=1 << 62), Commit(name="b", key="a", fence=7)),
    (Prepare(key="n" * 500), UsageOf(key="n" * 500), Commit(name="m" * 500, key="n" * 500), Remove(key="m" * 500)),
    (Prepare(key="a"), Events(since=0, page=1, credit=2, follow=True), Cancel(request=b"1"), Walk(page=1, credit=1)),
)


def _script(*bodies: bytes) -> bytes:
    """Bodies one by one, as `_body` takes them."""
    return b"".join(b"\x00\x07" + len(body).to_bytes(2, "big") + body for body in bodies)


def _changes(call: Call) -> bool:
    return isinstance(call, _CHANGES)


def _check_reply(body: bytes, parts: list[tuple[bytes, bytes]]) -> tuple[Request | None, dict[int, Fault | None]]:
    """One outcome for each call, or one error for all; answers the request that was understood, and its faults."""
    try:
        request = decode_request(body)
        check_namespace(request.namespace)
    except BrokerError as error:
        ((status, part),) = parts
        refused = decode_reply(part).error
        assert status == DONE
        assert refused is not None
        assert refused.code == error.code
        return None, {}
    outcomes: dict[int, Fault | None] = {}
    for number, (status, part) in enumerate(parts):
        assert (status == DONE) == (number + 1 == len(parts)), "a part behind the last one"
        assert len(part) <= BODY_BYTES_MAX
        reply = decode_reply(part)
        if reply.error is not None:
            _check_fault(reply.error)
            assert len(parts) == 1
            return None, {}
        for outcome in reply.outcomes:
            call = request.calls[outcome.call]
            if outcome.error is not None:
                _check_fault(outcome.error)
            elif outcome.progress is None:
                DECODERS[str(call.__struct_config__.tag)](outcome.ok)
            if outcome.progress is None:
                assert outcome.call not in outcomes or isinstance(call, (Walk, Events))
                outcomes[outcome.call] = outcome.error
    assert sorted(outcomes) == list(range(len(request.calls)))
    if request.atomic and len(request.calls) > 1:
        assert len({fault is None for fault in outcomes.values()}) == 1, "all or none"
    return request, outcomes


def _check_fault(fault: Fault) -> None:
    assert fault.code in ERRORS
    assert fault.message
    assert fault.code != "internal", f"a mistake of the broker's own: {fault.message}"


def _check_oracle(
    oracles: dict[str, Oracle] | None,
    request: Request,
    outcomes: dict[int, Fault | None],
    parts: list[tuple[bytes, bytes]],
) -> dict[str, Oracle] | None:
    """Hold the outcomes against the oracle's; it is of no use any more after what it does not know."""
    if oracles is None:
        return None
    calls = request.calls
    simple = len(calls) == 1 or request.atomic
    fenced = any(getattr(call, "fence", 0) for call in calls)
    if not simple or fenced or request.token or request.timeout_ms or not all(isinstance(c, _KNOWN) for c in calls):
        return None if any(map(_changes, calls)) else oracles
    oracle = oracles.setdefault(request.namespace, Oracle(NAME, request.namespace))
    answers = {o.call: o.ok for _, part in parts for o in decode_reply(part).outcomes}
    for number, wanted in enumerate(oracle.request(calls, atomic=request.atomic)):
        fault = outcomes[number]
        code = wanted.code if isinstance(wanted, Refused) else None
        assert (fault.code if fault else None) == code, f"{calls[number]!r:.300}: {fault}, not {code}"
        if isinstance(wanted, Info):
            assert timeless(msgspec.msgpack.decode(answers[number], type=Info)) == wanted
    return oracles


def _check_journal(snapshotter: Snapshotter, since: int) -> None:
    """Every change has its event and every event its change."""
    events = snapshotter.events(since)
    assert [event.sequence for event in events] == list(range(since + 1, snapshotter.published + 1))
    before: dict[str, int] = {}
    for event in events:
        before.setdefault(event.topic, event.previous)
    check_chains(events, before)
    records = snapshotter.records()
    for namespace in {event.namespace for event in events} | records.keys():
        told = replay([event for event in events if event.namespace == namespace])
        assert told == records.get(namespace, {}), f"{namespace}: the journal tells {told}, the records {records}"


# Requests.


def _body(draws: Draws) -> bytes:
    if draws.chance(8):
        return draws.take(int.from_bytes(draws.take(2), "big"))
    calls = tuple(_call(draws) for _ in range(1 + (draws.number(4) if draws.chance(4) else 0)))
    atomic, token = draws.chance(3), draws.choice(_TOKENS)
    timeout_ms = draws.integer(4) if draws.chance(16) else 0
    namespace = draws.choice(_NAMESPACES)
    return draws.torn(
        encode(Request(calls=calls, namespace=namespace, atomic=atomic, token=token, timeout_ms=timeout_ms))
    )


def _call(draws: Draws) -> Call:
    verb = draws.number(16)
    key, other = _name(draws), _name(draws)
    match verb:
        case 0 | 13:
            return Prepare(key=key, parent=_parent(draws, other), labels=_labels(draws))
        case 1:
            return View(key=key, parent=_parent(draws, other), labels=_labels(draws))
        case 2 | 14 | 15:
            parent = _name(draws) if draws.chance(4) else ""
            fence = draws.integer() if draws.chance(8) else 0
            return Commit(name=other, key=key, parent=parent, labels=_labels(draws), sync=draws.chance(2), fence=fence)
        case 3:
            return Remove(key=key, fence=draws.integer() if draws.chance(8) else 0)
        case 4:
            return Mounts(key=key, fence=draws.integer() if draws.chance(8) else 0)
        case 5:
            return Stat(key=key)
        case 6:
            paths = tuple(draws.choice(_PATHS) for _ in range(draws.number(3)))
            return Update(name=key, labels=_labels(draws), fieldpaths=paths)
        case 7:
            return UsageOf(key=key)
        case 8:
            filters = ("kind==active", f'name~="{other[:9]}"', draws.text())[: draws.number(4)]
            page, credit = _amount(draws), _amount(draws)
            return Walk(filters=filters, after=key if draws.chance(4) else "", page=page, credit=credit)
        case 9:
            return Cleanup()
        case 10:
            topics = tuple(draws.choice((f"{NAME}/", "", "x")) for _ in range(draws.number(3)))
            page, credit, follow = _amount(draws), _amount(draws), draws.chance(4)
            return Events(since=draws.integer(), topics=topics, page=page, credit=credit, follow=follow)
        case 11:
            return Cancel(request=str(draws.number(100)).encode(), calls=tuple(draws.take(draws.number(3))))
        case _:
            return Status()


def _name(draws: Draws) -> str:
    return draws.text() if draws.chance(32) else draws.choice(_NAMES[:4] if not draws.chance(8) else _NAMES)


def _parent(draws: Draws, other: str) -> str:
    return other if draws.chance(2) else ""


def _labels(draws: Draws) -> dict[str, str]:
    if not draws.chance(3):
        return {}
    return {draws.choice(_LABELS): draws.text() for _ in range(draws.number(3))}


def _amount(draws: Draws) -> int:
    return draws.integer() if draws.chance(8) else 1 + draws.number(4)
