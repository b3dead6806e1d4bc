"""A tenant sees its own namespaces: in calls, the journal, the status, and in every frame on its events socket."""

from __future__ import annotations

import itertools

import msgspec
import pytest
import zmq

from snapbroker import protocol
from snapbroker.errors import NotFound, OutOfRange, PermissionDenied, Unauthenticated
from snapbroker.keyfiles import Curve
from snapbroker.protocol import EVENT_VERSION, Heartbeat, StatusAnswer, decode_event, decode_heartbeat
from tests.access.guarded import Guarded, raw_socket, take_until
from tests.daemon import support
from tests.harness import READY_S


@pytest.mark.parametrize("namespace", ["green", "re", "redder", "RED"])
def test_another_namespace_is_refused(namespace: str, gate: Guarded, red: Curve) -> None:
    with gate.wire(red) as wire:
        for call in (protocol.Stat(key="k"), protocol.Prepare(key="k"), protocol.Walk(), protocol.Events(since=0)):
            (result,) = wire.call(call, namespace=namespace)
            assert isinstance(result, PermissionDenied)
            assert result.details == {"namespace": namespace}


def test_another_snapshotter_is_refused(gate: Guarded) -> None:
    curve = gate.grant("only-other", "write", "red", snapshotters=("other",))
    with gate.wire(curve, "other") as wire:
        wire.one(protocol.Prepare(key="mine"))
        for name in ("memory", "not-there"):
            with pytest.raises(PermissionDenied) as caught:
                wire.one(protocol.Stat(key="mine"), snapshotter=name)
            assert caught.value.details == {"snapshotters": ["other"]}


def test_an_unknown_snapshotter_is_told_to_who_may_know(gate: Guarded, red: Curve) -> None:
    with gate.wire(red) as wire, pytest.raises(NotFound) as caught:
        wire.one(protocol.Stat(key="k"), snapshotter="not-there")
    assert caught.value.details == {"snapshotters": ["memory", "other"]}


def test_the_status_tells_a_tenant_nothing_of_others(gate: Guarded, red: Curve, whole: Curve) -> None:
    with gate.wire(whole) as wire:
        wire.one(protocol.Prepare(key="somebody-else"), namespace="green")
        full = wire.one(protocol.Status(), snapshotter="")
    with gate.wire(red) as wire:
        shown = wire.one(protocol.Status(), snapshotter="")
    assert isinstance(full, StatusAnswer)
    assert full.queues["access"]["keys"] > 0
    assert (full.endpoint, full.events_endpoint) == (gate.endpoint, gate.events_endpoint)
    assert shown == StatusAnswer(
        version=full.version,
        pid=0,
        uptime_seconds=0.0,
        resident_bytes=0,
        endpoint=gate.endpoint,
        events_endpoint=gate.events_endpoint,
        snapshotters=tuple(
            protocol.ActorStatus(name=one.name, backend=one.backend, state="ready", capabilities=one.capabilities)
            for one in full.snapshotters
        ),
    )


def test_the_journal_is_narrowed(gate: Guarded, red: Curve, whole: Curve) -> None:
    with gate.wire(whole) as wire:
        for namespace in ("red", "green", "redder"):
            wire.one(protocol.Prepare(key="journal"), namespace=namespace)
    with gate.wire(red) as wire:
        for topics in ((), ("memory/",), ("",), ("memory/red/", "mem"), ("memory/red/snapshot/prepare",)):
            pages = wire.pages(protocol.Events(since=0, topics=topics))
            events = [event for page in pages for event in page.events]
            assert events
            assert {event.namespace for event in events} == {"red"}
            assert len(events) == len({event.sequence for event in events})
        for topics in (("memory/green/",), ("memory/redder/",), ("other/",), ("memory/red/", "memory/green/")):
            with pytest.raises(PermissionDenied) as caught:
                wire.one(protocol.Events(since=0, topics=topics))
            assert caught.value.details == {"topic": topics[-1]}
        with pytest.raises(OutOfRange):
            wire.one(protocol.Events(since=1 << 40))


def test_frames_on_the_wire(gate: Guarded, red: Curve, whole: Curve) -> None:
    """Whatever a tenant subscribes to, no byte that comes names another's namespace."""
    with raw_socket(zmq.SUB, gate.events_endpoint, red) as tenant, gate.wire(whole) as wire:
        for prefix in (b"", b"memory/", b"memory/green/", b"mem", b"memory//heartbeat", b"other/", b"\xff"):
            tenant.subscribe(prefix)
        take_until(tenant, lambda frames: frames[0] == b"memory//heartbeat")
        for number in range(5):
            for namespace in ("green", "redder", "red"):
                wire.one(protocol.Prepare(key=f"frames-{number}"), namespace=namespace)
        newest = wire.pages(protocol.Events(since=0))[-1].newest
        taken = take_until(
            tenant, lambda frames: frames[0] == b"memory//heartbeat" and int.from_bytes(frames[2], "big") >= newest
        )
    events = [decode_event(frames[3]) for frames in taken if b"/snapshot/" in frames[0]]
    assert [event.key for event in events] == [f"frames-{number}" for number in range(5)]
    topics = {b"memory/red/snapshot/prepare", b"memory//heartbeat", b"other//heartbeat"}
    assert {frames[0] for frames in taken} == topics
    assert {frames[1] for frames in taken} == {EVENT_VERSION}
    assert not any(name in b"".join(frames) for frames in taken for name in (b"green", b"redder"))
    for frames in taken:
        if frames[0].endswith(b"heartbeat"):
            assert decode_heartbeat(frames[3]).topics is None
            assert set(msgspec.msgpack.decode(frames[3])) == {"sequence", "previous", "time"}


def test_who_has_everything_gets_everything(gate: Guarded, whole: Curve) -> None:
    with raw_socket(zmq.SUB, gate.events_endpoint, whole) as plain, gate.wire(whole) as wire:
        plain.subscribe(b"memory/")
        take_until(plain, lambda frames: frames[0] == b"memory//heartbeat")
        for namespace in ("green", "red"):
            wire.one(protocol.Prepare(key="whole"), namespace=namespace)
        taken = take_until(plain, lambda frames: frames[0] == b"memory/red/snapshot/prepare")
        assert b"memory/green/snapshot/prepare" in {frames[0] for frames in taken}


def test_local_heartbeats_still_name_topics(gate: Guarded, whole: Curve) -> None:
    with raw_socket(zmq.SUB, gate.daemon.events_endpoint, None) as plain, gate.wire(whole) as wire:
        plain.subscribe(b"memory//heartbeat")
        take_until(plain, lambda _: True)
        wire.one(protocol.Prepare(key="beat"))

        def names_it(frames: list[bytes]) -> bool:
            beat = decode_heartbeat(frames[3])
            return isinstance(beat, Heartbeat) and "memory/red/snapshot/prepare" in (beat.topics or {})

        take_until(plain, names_it)


def test_unsubscribing_from_one_prefix_leaves_the_other(gate: Guarded, red: Curve) -> None:
    """`memory/` was narrowed to what the second subscription is: it must survive the second's end."""
    with raw_socket(zmq.XSUB, gate.events_endpoint, red) as plain, gate.wire(red) as wire:
        for message in (b"\x00never/subscribed",) * 50:
            plain.send(message)
        for message in (b"\x01memory/", b"\x01memory/red/", b"\x00memory/red/", b"\x01memory/red/snapshot/remove"):
            plain.send(message)
        # The last one is in force, so that those before it are.
        wire.one(protocol.Prepare(key="unsubscribed"))

        def removed(frames: list[bytes]) -> bool:
            return frames[0] == b"memory/red/snapshot/remove"

        def round_trip() -> bool:
            wire.call(protocol.Remove(key="unsubscribed"), protocol.Prepare(key="unsubscribed"))
            wire.call(protocol.Prepare(key="unsubscribed"))
            return bool(plain.poll(20))

        support.wait_until(round_trip, "the subscription")
        wire.call(protocol.Remove(key="unsubscribed"))
        wire.one(protocol.Prepare(key="unsubscribed-2"))
        taken = take_until(
            plain, lambda frames: b"/snapshot/" in frames[0] and decode_event(frames[3]).key == "unsubscribed-2"
        )
        assert any(removed(frames) for frames in taken)
        plain.send(b"\x00memory/red/snapshot/remove")


def test_clients_follow_their_own_events_among_others(gate: Guarded, red: Curve, whole: Curve) -> None:
    """In order, each once, though most of what happens is hidden from them."""
    with (
        gate.wire(whole) as others,
        gate.client(red) as broker,
        broker.events() as everything,
        broker.events(topics=["memory/red/snapshot/prepare"]) as one_topic,
    ):
        keys = [f"followed-{number}" for number in range(20)]
        for key in keys:
            others.one(protocol.Prepare(key=key), namespace="green")
            broker.prepare(key)
            others.one(protocol.Remove(key=key), namespace="green")
            broker.remove(key)
        for stream, verbs in ((everything, ("prepare", "remove")), (one_topic, ("prepare",))):
            seen = []
            while len(seen) < len(keys) * len(verbs):
                event = stream.poll(READY_S)
                assert event is not None
                seen.append((event.namespace, event.verb, event.key))
            assert seen == [("red", verb, key) for key in keys for verb in verbs]


def test_revocation_ends_streams_and_events(gate: Guarded, whole: Curve) -> None:
    curve = gate.grant("leaver", "read", "red")
    with (
        raw_socket(zmq.SUB, gate.events_endpoint, curve) as plain,
        gate.wire(curve) as wire,
        gate.wire(whole) as other,
    ):
        plain.subscribe(b"memory/")
        take_until(plain, lambda frames: frames[0] == b"memory//heartbeat")
        newest = wire.one(protocol.Walk()).sequence
        call = protocol.Events(since=newest, follow=True)
        request_id = wire.send(call)
        gate.daemon.wait_for(
            lambda status: any(one.queues.get("service", {}).get("streams") for one in status.snapshotters)
        )
        gate.revoke("leaver")
        ((_, result),) = wire.parts(request_id, (call,))
        assert isinstance(result, Unauthenticated)
        with pytest.raises(Unauthenticated):
            wire.one(protocol.Stat(key="k"))
        # Two heartbeats later it has not heard of what happened since.
        before = gate.figure("publisher.remote", "sent")
        other.one(protocol.Prepare(key="after-the-revocation"))
        gate.daemon.wait_for(lambda status: status.queues["publisher.remote"].get("sent", 0) >= before + 2)
        while plain.poll(0):
            assert int.from_bytes(plain.recv_multipart()[2], "big") <= newest


def test_a_grant_that_changes_holds_at_once(gate: Guarded) -> None:
    curve = gate.grant("changing", "write", "red")
    file = gate.directory / "changing.toml"
    with gate.wire(curve) as wire, raw_socket(zmq.SUB, gate.events_endpoint, curve) as plain:
        wire.one(protocol.Prepare(key="changing"))
        plain.subscribe(b"")
        take_until(plain, lambda frames: frames[0] == b"memory//heartbeat")
        text = file.read_text()
        rereads = gate.figure("access", "rereads")
        file.write_text(text.replace('"write"', '"read"').replace('["red"]', '["red", "violet"]'))
        gate.daemon.wait_for(lambda status: status.queues["access"]["rereads"] > rereads)
        with pytest.raises(PermissionDenied):
            wire.one(protocol.Remove(key="changing"))
        assert wire.one(protocol.Stat(key="changing")).name == "changing"
        assert wire.one(protocol.Walk(), namespace="violet").infos == ()
        with gate.daemon.wire("memory", "violet") as local:
            numbers = itertools.count()

            def arrives() -> bool:
                local.one(protocol.Prepare(key=f"wider-{next(numbers)}"))
                while plain.poll(10):
                    if plain.recv_multipart()[0] == b"memory/violet/snapshot/prepare":
                        return True
                return False

            support.wait_until(arrives, "an event of the namespace that was added")
