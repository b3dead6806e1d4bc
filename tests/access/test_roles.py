"""The least role of every verb, from the table, over the wire."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from broker.access import LEAST_ROLE, ROLES, Role, least_role
from snapbroker import protocol
from snapbroker.errors import BrokerError, Cancelled, NotFound, PermissionDenied
from snapbroker.keyfiles import Curve
from snapbroker.protocol import VERBS, Call
from tests.access.guarded import Guarded, guarded

_numbers = itertools.count(1)


def call_of(verb: str) -> Call:
    """A call of this verb that would do something, or fail, but not for want of a role."""
    key = f"key-{next(_numbers)}"
    calls: dict[str, Call] = {
        "prepare": protocol.Prepare(key=key),
        "view": protocol.View(key=key),
        "commit": protocol.Commit(name=f"{key}-name", key=key),
        "remove": protocol.Remove(key=key),
        "mounts": protocol.Mounts(key=key),
        "stat": protocol.Stat(key=key),
        "update": protocol.Update(name=key),
        "usage": protocol.UsageOf(key=key),
        "walk": protocol.Walk(),
        "cleanup": protocol.Cleanup(),
        "events": protocol.Events(since=0),
        "cancel": protocol.Cancel(request=b"none"),
        "status": protocol.Status(),
        "audit": protocol.Audit(),
        "repair": protocol.Repair(),
        "why": protocol.Why(key=key),
    }
    return calls[verb]


def test_every_verb_was_decided_about() -> None:
    """A verb that is forgotten takes an admin; here somebody is told to decide."""
    assert set(LEAST_ROLE) <= set(VERBS)
    assert {verb for verb in VERBS if verb not in LEAST_ROLE} == set(), "decide about these"
    assert least_role("a verb of tomorrow") is Role.ADMIN


def test_the_specification_has_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs/rfc/3-access.md").read_text()
    for role in ROLES[:2]:
        row = re.search(rf"^\| `{role}` \| (`.*`) \|$", text, re.MULTILINE)
        assert row is not None
        told = set(re.findall(r"`(\w+)`", row[1]))
        assert told == {verb for verb, least in LEAST_ROLE.items() if least is Role[role.upper()]}


SPANNING = ("audit", "repair")
"""Of all namespaces: a key of some may not call them, whatever its role."""


@pytest.mark.parametrize("verb", SPANNING)
def test_what_is_of_all_namespaces_takes_all_of_them(
    verb: str, gate: Guarded, roles: dict[str, Curve], whole: Curve
) -> None:
    with gate.wire(roles["admin"]) as wire, pytest.raises(PermissionDenied, match="all namespaces"):
        wire.one(call_of(verb), snapshotter="memory")
    with gate.wire(whole, namespace="red") as wire:
        assert isinstance(wire.one(call_of(verb), snapshotter="memory"), protocol.AuditPage)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in SPANNING])
@pytest.mark.parametrize("role", ROLES)
def test_a_role_may_call_what_the_table_says(role: str, verb: str, gate: Guarded, roles: dict[str, Curve]) -> None:
    with gate.wire(roles[role]) as wire:
        target = "" if verb == "status" else "memory"
        (result,) = wire.call(call_of(verb), snapshotter=target)
    if Role[role.upper()] < least_role(verb):
        assert isinstance(result, PermissionDenied)
        assert result.details == {"needed": least_role(verb).name.lower(), "role": role}
    else:
        assert not isinstance(result, PermissionDenied)


def test_calls_of_one_request_are_refused_one_by_one(gate: Guarded, roles: dict[str, Curve]) -> None:
    denied = gate.daemon.actor("memory").queues["service"]["denied"]
    with gate.wire(roles["read"]) as wire:
        results = wire.call(protocol.Stat(key="none"), protocol.Prepare(key="refused"), protocol.Walk())
        assert [type(result) for result in results] == [NotFound, PermissionDenied, protocol.WalkPage]
        with pytest.raises(NotFound):
            wire.one(protocol.Stat(key="refused"))
    gate.daemon.wait_for(
        lambda status: any(one.queues.get("service", {}).get("denied", 0) > denied for one in status.snapshotters)
    )


def test_an_atomic_request_with_a_refused_call_does_nothing(gate: Guarded, roles: dict[str, Curve]) -> None:
    with gate.wire(roles["write"]) as wire:
        wire.one(protocol.Prepare(key="atomic"))
    with gate.wire(roles["read"]) as wire:
        results = wire.call(protocol.Stat(key="atomic"), protocol.Remove(key="atomic"), atomic=True)
        assert [type(result) for result in results] == [Cancelled, PermissionDenied]
        assert wire.one(protocol.Stat(key="atomic")).name == "atomic"


def test_local_sockets_may_have_a_lesser_role() -> None:
    with guarded(socket_role="read") as found:
        with found.daemon.wire("memory") as wire:
            assert isinstance(wire.one(protocol.Walk()), protocol.WalkPage)
            with pytest.raises(PermissionDenied, match="'local'"):
                wire.one(protocol.Prepare(key="refused"))
        curve = found.grant("writer", "write", "default")
        with found.wire(curve, namespace="default") as wire:
            wire.one(protocol.Prepare(key="written"))
        with found.daemon.wire("memory") as wire:
            assert wire.one(protocol.Stat(key="written")).name == "written"


def test_a_refusal_is_not_about_what_exists(gate: Guarded, red: Curve, whole: Curve) -> None:
    """Whether the namespace holds the snapshot or nothing, the answer is the same."""
    with gate.wire(whole, namespace="green") as wire:
        wire.one(protocol.Prepare(key="there"))
    with gate.wire(red) as wire:
        answers = [wire.call(protocol.Stat(key=key), namespace="green")[0] for key in ("there", "not-there")]
    assert all(isinstance(answer, PermissionDenied) for answer in answers)
    first, second = (answer for answer in answers if isinstance(answer, BrokerError))
    assert (first.message, first.details) == (second.message, second.details)
