"""A client that floods harms itself: the others are served, what it is refused says truly when to come again."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any, Final, Self

import pytest
import zmq

from broker.config import RouterLimits
from snapbroker.errors import ResourceExhausted
from snapbroker.protocol import (
    DONE,
    REQUEST_VERSION,
    Call,
    Events,
    Prepare,
    Request,
    Stat,
    Status,
    decode_reply,
    encode,
)
from tests.daemon.support import UNHURT_S, wait_until
from tests.harness import Daemon

OPEN_REQUESTS_MAX: Final = 1000
STREAMS_MAX: Final = 8
TURN_SHARED_MAX: Final = 16
FLOOD: Final = 400
"""Requests that the flood keeps open."""
PREPARES: Final = 600
"""A flush each, one after the other."""
SERVED_S: Final = 100.0
"""How long they may take: beside others who write much a flush can take a twentieth of a second."""


@pytest.fixture(scope="module")
def flooded() -> Iterator[Daemon]:
    limits = {"service": {"streams_max": STREAMS_MAX}, "writer": {"turn_shared_max": TURN_SHARED_MAX}}
    few = {"backend": "memory", "limits": {"writer": {"turn_max": 1}}}
    with Daemon(
        {"overlayfs": {"limits": limits}, "few": few},
        router={"open_requests_max": OPEN_REQUESTS_MAX, "client_requests_max": FLOOD},
    ) as daemon:
        with daemon.client("overlayfs") as broker:
            broker.prepare("known")
        yield daemon


class Flood(threading.Thread):
    """Keeps requests open, sends one for each reply, waits for nothing; `answered` counts."""

    def __init__(self, daemon: Daemon, target: str, calls: Any, requests: int = FLOOD) -> None:
        super().__init__()
        self._endpoint, self._target, self._calls, self._requests = daemon.endpoint, target, calls, requests
        self._halt = threading.Event()
        self.answered = 0
        self.refused = 0

    def run(self) -> None:
        numbers = itertools.count()
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(self._endpoint)

            def send() -> None:
                number = next(numbers)
                body = encode(Request(calls=self._calls(number), namespace="default"))
                socket.send_multipart((REQUEST_VERSION, b"%d" % number, self._target.encode(), body))

            for _ in range(self._requests):
                send()
            while not self._halt.is_set():
                if not socket.poll(100):
                    continue
                _, _, status, body = socket.recv_multipart()
                if status == DONE:
                    self.refused += decode_reply(body).error is not None
                    self.answered += 1
                    send()

    def __enter__(self) -> Self:
        self.start()
        wait_until(lambda: self.answered > self._requests, "the flood")
        return self

    def __exit__(self, *_: object) -> None:
        self._halt.set()
        self.join()


def stats(_number: int) -> tuple[Call, ...]:
    return (Stat(key="known"),) * 4


def prepares(number: int) -> tuple[Call, ...]:
    return tuple(Prepare(key=f"flood-{number}-{part}") for part in range(4))


def status(_number: int) -> tuple[Call, ...]:
    return (Status(),)


@pytest.mark.parametrize(("target", "calls"), [("overlayfs", stats), ("overlayfs", prepares), ("", status)])
def test_a_good_client_is_served_beside_a_flood(flooded: Daemon, target: str, calls: Any) -> None:
    slowest = 0.0
    with Flood(flooded, target, calls) as flood, flooded.client("overlayfs", "good", patience=0) as broker:
        before = flood.answered
        for _ in range(10):
            for call in (
                lambda: broker.prepare("mine"),
                lambda: broker.stat("mine"),
                lambda: broker.mounts("mine"),
                lambda: broker.remove("mine"),
            ):
                begun = time.monotonic()
                call()
                slowest = max(slowest, time.monotonic() - begun)
        wait_until(lambda: flood.answered > before, "the flood goes on")
    assert slowest < UNHURT_S
    flooded.wait_for(lambda figures: figures.queues["mailbox.overlayfs"]["open"] == 0)


def test_the_flood_waits_in_the_router_and_not_before_the_others(flooded: Daemon) -> None:
    with Flood(flooded, "overlayfs", stats), flooded.client("overlayfs") as broker:

        def waits() -> bool:
            broker.stat("known")
            mailbox = flooded.status().queues["mailbox.overlayfs"]
            return mailbox["window"] == RouterLimits().window_shared_bytes and mailbox["waiting"] > FLOOD // 2

        wait_until(waits, "a narrow window")


def test_who_only_reads_keeps_the_turns_of_the_others_short(flooded: Daemon) -> None:
    calls = tuple(Prepare(key=f"many-{number}") for number in range(512))
    with flooded.client("overlayfs") as reader, flooded.wire("overlayfs") as writer:

        def written() -> dict[str, int]:
            return flooded.actor("overlayfs").queues["writer"]

        before = written()
        reader.stat("known")
        writer.one(Stat(key="known"))
        reader.stat("known")
        writer.send(*calls)
        while writer.is_silent(0):
            reader.stat("known")
        wait_until(lambda: written()["operations"] >= before["operations"] + len(calls), "the figures of all of them")
        turns = written()["turns"] - before["turns"]
    assert turns >= len(calls) // TURN_SHARED_MAX


def test_streams_of_one_client_leave_room_for_the_others(flooded: Daemon) -> None:
    follow = Events(since=0, follow=True)
    with flooded.wire("overlayfs") as greedy, flooded.client("overlayfs") as broker:
        for _ in range(STREAMS_MAX):
            greedy.send(follow, timeout_ms=3000)
        refused = 0
        while refused < STREAMS_MAX // 2:
            _, _, _, body = greedy.receive_frames()
            fault = decode_reply(body).outcomes[0].error
            if fault is not None:
                assert fault.code == "resource_exhausted"
                refused += 1
        assert {info.name for info in broker.walk()} >= {"known"}


def test_what_is_refused_mostly_succeeds_after_the_time_it_was_told(flooded: Daemon) -> None:
    """Prepares, a flush each, with room for a part of them, and everybody comes back when told to."""
    waiting: list[tuple[float, int]] = [(0.0, number) for number in range(PREPARES)]
    numbers = itertools.count()
    under_way: dict[bytes, tuple[int, bool]] = {}
    returns = successes = done = 0
    with flooded.wire("few") as wire:
        give_up = time.monotonic() + SERVED_S
        while done < PREPARES:
            assert time.monotonic() < give_up
            moment = time.monotonic()
            while waiting and min(waiting)[0] <= moment:
                told, key = min(waiting)
                waiting.remove((told, key))
                request = wire.send(Prepare(key=f"key-{key}"), request_id=b"r%d" % next(numbers))
                under_way[request] = (key, told > 0)
            pause = min((told for told, _ in waiting), default=moment + 1) - time.monotonic()
            if wire.is_silent(max(0.0, min(pause, 1.0))):
                continue
            _, request, status, body = wire.receive_frames()
            assert status == DONE
            key, returned = under_way.pop(request)
            reply = decode_reply(body)
            returns += returned
            if reply.error is None:
                done += 1
                successes += returned
            else:
                assert reply.error.code == ResourceExhausted.code
                assert reply.error.details["position"] >= FLOOD
                waiting.append((time.monotonic() + reply.error.details["retry_after_ms"] / 1000, key))
    assert returns > 100
    assert successes > returns / 2, f"{successes} of {returns} returns succeeded"
