"""Who gets in: keys, mechanisms, hostile handshakes and messages, and what a client is told who does not."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import pytest
import zmq

from snapbroker import blocking, protocol
from snapbroker.errors import InvalidArgument, Unauthenticated, Unavailable
from snapbroker.keyfiles import Curve, generate
from snapbroker.protocol import DONE, REQUEST_VERSION, decode_reply, encode
from tests.access.guarded import Guarded, guarded, raw_socket, take_until
from tests.daemon import support
from tests.harness import READY_S, Daemon, Wire

SOON_S = 2.0
"""Far below the time to connect, which is what a client that merely waits would take."""


def stranger(gate: Guarded) -> Curve:
    """A key that the broker does not know, and the right one of the broker."""
    public, secret = generate()
    return Curve(public, secret, (gate.directory / "server.pub").read_text().split('"')[1], "stranger.key")


def test_an_unknown_key_is_refused_at_once(gate: Guarded) -> None:
    refused = gate.figure("access", "connections_refused")
    with gate.client(stranger(gate), connect_timeout=READY_S) as broker:
        begun = time.monotonic()
        for _ in range(2):
            with pytest.raises(Unauthenticated, match=r"refused the key of stranger\.key"):
                broker.stat("k")
        assert time.monotonic() - begun < SOON_S
    assert gate.figure("access", "connections_refused") >= refused + 2


async def test_an_unknown_key_is_refused_at_once_to_asyncio(gate: Guarded) -> None:
    async with gate.aio_client(stranger(gate), connect_timeout=READY_S) as broker:
        begun = time.monotonic()
        for _ in range(2):
            results = await asyncio.gather(*(broker.stat(f"k{n}") for n in range(3)), return_exceptions=True)
            assert [type(result) for result in results] == [Unauthenticated] * 3
        assert time.monotonic() - begun < SOON_S


def test_a_key_that_is_given_later_works(gate: Guarded) -> None:
    curve = gate.grant("later", "read", "red")
    file = gate.directory / "later.toml"
    text = file.read_text()
    file.unlink()
    gate.wait_reread()
    with gate.client(curve) as broker:
        with pytest.raises(Unauthenticated):
            broker.status()
        file.write_text(text)
        gate.wait_reread()
        assert broker.status().version


def test_a_wrong_server_key(gate: Guarded, red: Curve) -> None:
    other, _ = generate()
    curve = Curve(red.public, red.secret, other)
    with gate.client(curve, connect_timeout=0.5) as broker, pytest.raises(Unauthenticated, match=r"server\.pub"):
        broker.stat("k")


async def test_a_wrong_server_key_of_asyncio(gate: Guarded, red: Curve) -> None:
    other, _ = generate()
    async with gate.aio_client(Curve(red.public, red.secret, other), connect_timeout=0.5) as broker:
        with pytest.raises(Unauthenticated, match=r"server\.pub"):
            await broker.stat("k")


def test_a_client_without_a_key(gate: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SNAPBROKER_CLIENT_KEY", raising=False)
    with gate.client(None) as broker, pytest.raises(Unauthenticated, match="SNAPBROKER_CLIENT_KEY"):
        broker.stat("k")


def test_a_key_where_none_is_asked_for(red: Curve) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    daemon = Daemon(
        {"memory": {"backend": "memory"}}, insecure_tcp=True, endpoint=endpoint, events_endpoint=endpoint[:-1] + "*"
    )
    daemon.settings["events_endpoint"] = "tcp://127.0.0.1:*"
    with (
        daemon,
        blocking.connect(endpoint, snapshotter="memory", curve=red) as broker,
        pytest.raises(Unauthenticated, match="knows of no keys"),
    ):
        broker.stat("k")


def test_nobody_there_is_not_taken_for_a_wrong_key(red: Curve) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with (
        blocking.connect(endpoint, snapshotter="memory", curve=red, connect_timeout=0.3) as broker,
        pytest.raises(Unavailable, match="no broker answers"),
    ):
        broker.stat("k")


def test_keys_are_not_for_the_local_sockets(gate: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPBROKER_CLIENT_KEY", "/nonexistent")
    with gate.daemon.client("memory") as broker:
        assert broker.status().version


def test_a_chosen_routing_id_is_refused(gate: Guarded, red: Curve) -> None:
    """Replies are sent to it: whoever takes over the one of somebody who left would get theirs."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with raw_socket(zmq.DEALER, gate.endpoint, red) as usual:
        del usual
    plain = context.socket(zmq.DEALER)
    try:
        plain.set(zmq.LINGER, 0)
        plain.set(zmq.ROUTING_ID, b"somebody")
        plain.set(zmq.CURVE_PUBLICKEY, red.public.encode())
        plain.set(zmq.CURVE_SECRETKEY, red.secret.encode())
        plain.set(zmq.CURVE_SERVERKEY, red.server.encode())
        plain.connect(gate.endpoint)
        body = encode(protocol.Request(calls=(protocol.Walk(),), namespace="red"))
        plain.send_multipart((REQUEST_VERSION, b"1", b"memory", body))
        assert plain.poll(READY_S * 1000)
        _, request_id, status, answer = plain.recv_multipart()
        assert (request_id, status) == (b"1", DONE)
        error = decode_reply(answer).error
        assert error is not None
        assert (error.code, "ROUTING_ID" in error.message) == (InvalidArgument.code, True)
    finally:
        plain.close()
        context.term()


def test_what_is_no_subscription_throws_its_sender_out(gate: Guarded, red: Curve, whole: Curve) -> None:
    """libzmq would take the next subscription for another connection's: a tenant could get another's events."""
    rebinds, strays = (gate.figure("publisher.remote", name) for name in ("rebinds", "strays"))
    evil = gate.grant("evil", "read", "yellow")
    with (
        raw_socket(zmq.XSUB, gate.events_endpoint, evil) as attacker,
        raw_socket(zmq.SUB, gate.events_endpoint, whole) as victim,
        gate.wire(whole) as wire,
    ):
        victim.subscribe(b"memory//heartbeat")
        take_until(victim, lambda _: True)
        for number in range(50):
            attacker.send(b"no subscription", zmq.SNDMORE)
            attacker.send(b"at all")
            attacker.send(b"\x01memory/yellow/%d" % number)
            victim.subscribe(b"memory/red/%d" % number)
        gate.daemon.wait_for(lambda status: status.queues["publisher.remote"].get("strays", 0) > strays)
        assert gate.figure("publisher.remote", "rebinds") > rebinds
        numbers = iter(range(10_000))

        def victim_is_back() -> bool:
            wire.one(protocol.Prepare(key=f"strays-{next(numbers)}"), namespace="red")
            while victim.poll(10):
                if victim.recv_multipart()[0] == b"memory/red/snapshot/prepare":
                    return True
            return False

        victim.subscribe(b"memory/red/")
        support.wait_until(victim_is_back, "the victim's events")
        got = []
        while attacker.poll(0):
            got.append(attacker.recv_multipart())
        assert not [frames for frames in got if b"/snapshot/" in frames[0]]


def test_a_flood_of_bad_handshakes_harms_nobody(gate: Guarded, red: Curve) -> None:
    """Unknown keys, no keys, bytes that are no ZMTP, and connections that say nothing, from many threads."""
    halt = threading.Event()
    host, port = gate.endpoint.removeprefix("tcp://").rsplit(":", 1)
    counts = [0, 0, 0]

    def strangers() -> None:
        while not halt.is_set():
            with raw_socket(zmq.DEALER, gate.endpoint, stranger(gate)) as plain:
                plain.poll(5)
            counts[0] += 1

    def plain_ones() -> None:
        while not halt.is_set():
            with raw_socket(zmq.DEALER, gate.endpoint, None) as plain:
                plain.send_multipart((REQUEST_VERSION, b"1", b"memory", b"\x80"))
                plain.poll(5)
            counts[1] += 1

    def garbage() -> None:
        held = []
        while not halt.is_set():
            connection = socket.create_connection((host, int(port)))
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n" if counts[2] % 2 else b"\xff")
            held.append(connection)
            counts[2] += 1
            if len(held) > 200:
                held.pop(0).close()
            halt.wait(0.002)
        for connection in held:
            connection.close()

    threads = [threading.Thread(target=target) for target in (strangers, plain_ones, garbage)]
    with gate.client(red, timeout=READY_S) as broker:
        broker.prepare("flood")
        for thread in threads:
            thread.start()
        try:
            slowest, rounds = 0.0, 0
            while min(counts) < 40 or rounds < 200:
                begun = time.monotonic()
                broker.stat("flood")
                slowest = max(slowest, time.monotonic() - begun)
                rounds += 1
        finally:
            halt.set()
            for thread in threads:
                thread.join(READY_S)
        assert slowest < support.UNHURT_S
    assert gate.figure("access", "connections_refused") >= 40
    refusals = [line for line in gate.daemon.log_file.read_text().splitlines() if "a connection was refused" in line]
    assert len(refusals) < gate.figure("access", "connections_refused")
    assert len(refusals) < 200


def test_refusals_are_logged_with_who_and_why(gate: Guarded, red: Curve) -> None:
    with gate.wire(red) as wire:
        wire.call(protocol.Stat(key="k"), namespace="indigo")

    def logged() -> bool:
        lines = [json.loads(line) for line in gate.daemon.log().splitlines() if line.startswith("{")]
        return any(
            line["event"] == "a call was refused" and line["client"] == "red" and "indigo" in line["reason"]
            for line in lines
        )

    support.wait_until(logged, "the refusal in the log")


async def test_both_clients_go_on_after_a_crash_of_the_daemon() -> None:
    with guarded("memory") as found:
        curve = found.grant("farm", "write", "red")
        # On a busy machine the daemon takes longer to come back than a call waits for one by default.
        patient = {"patience": READY_S, "connect_timeout": READY_S}
        with found.client(curve, **patient) as broker, broker.events() as events:
            async with found.aio_client(curve, **patient) as other:
                broker.prepare("before")
                event = events.poll(READY_S)
                assert event is not None
                assert event.key == "before"
                await other.status()
                await asyncio.to_thread(found.daemon.kill)
                calls = [
                    asyncio.create_task(other.prepare("during-aio")),
                    asyncio.create_task(asyncio.to_thread(broker.prepare, "during")),
                ]
                await asyncio.to_thread(found.daemon.start)
                await asyncio.gather(*calls)
                # `memory` forgets with its process, its journal does not.
                seen = {event.key, *(await asyncio.to_thread(lambda: [take(events) for _ in range(2)]))}
                assert seen == {"before", "during", "during-aio"}


def take(events: blocking.Events) -> str:
    """The key of the next event."""
    event = events.poll(READY_S)
    assert event is not None
    return event.key


def test_the_bare_protocol_needs_a_key_too(gate: Guarded, red: Curve) -> None:
    with Wire(gate.endpoint, "memory", "red", red) as wire:
        assert isinstance(wire.one(protocol.Walk()), protocol.WalkPage)
    with Wire(gate.endpoint, "memory", "red") as wire:
        wire.send(protocol.Walk())
        assert wire.is_silent(0.3)
