"""The line between router and actor: whole messages in order, whatever the sockets make of them, and a certain end."""

from __future__ import annotations

import itertools
import socket
import struct

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.actor.link import RECEIVE_BYTES, TURN_MAX, Link
from snapbroker.protocol import encode


class End:
    """One end and what came to it."""

    def __init__(self, end: socket.socket) -> None:
        self.link = Link(end)
        self.messages: list[list[bytes]] = []
        self.ended = anyio.Event()
        self.changed = anyio.Event()

    def listen(self) -> None:
        self.link.listen(self.take, self.ended.set)

    def take(self, frames: list[bytes]) -> None:
        self.messages.append(frames)
        self.changed.set()

    async def wait_for(self, count: int) -> None:
        with anyio.fail_after(20):
            while len(self.messages) < count:
                self.changed = anyio.Event()
                await self.changed.wait()


@pytest.fixture
async def ends():
    one, other = (End(end) for end in socket.socketpair())
    one.listen()
    other.listen()
    yield one, other
    one.link.close()
    other.link.close()


async def test_messages_arrive_whole_and_in_order(ends: tuple[End, End]) -> None:
    one, other = ends
    sent = [[b"", str(number).encode(), bytes(number)] for number in range(500)]
    for message in sent:
        assert one.link.send(message)
    await other.wait_for(len(sent))
    assert other.messages == sent


async def test_what_the_kernel_does_not_take_is_kept_and_leaves_later(ends: tuple[End, End]) -> None:
    one, other = ends
    sent = [[b"large", bytes([number]) * 16 * 1024 * 1024] for number in range(3)]
    for message in sent:
        assert one.link.send(message)
    assert one.link.unsent_bytes > RECEIVE_BYTES
    assert one.link.send((b"last",))
    await other.wait_for(4)
    assert other.messages == [*sent, [b"last"]]
    assert one.link.unsent_bytes == 0


async def test_answers_given_while_messages_are_taken_arrive(ends: tuple[End, End]) -> None:
    one, other = ends
    other.link.listen(lambda frames: other.link.send((b"answer", *frames)) and None, other.ended.set)
    for number in range(100):
        one.link.send((str(number).encode(),))
    await one.wait_for(100)
    assert one.messages == [[b"answer", str(number).encode()] for number in range(100)]


async def test_a_flood_lets_the_loop_have_its_turns(ends: tuple[End, End]) -> None:
    one, other = ends
    for number in range(10 * TURN_MAX):
        one.link.send((str(number).encode(),))
    seen: list[int] = []
    while len(other.messages) < 10 * TURN_MAX:
        seen.append(len(other.messages))
        await anyio.lowlevel.checkpoint()
    assert max(after - before for before, after in itertools.pairwise([*seen, 10 * TURN_MAX])) <= TURN_MAX


async def test_what_is_sent_together_leaves_at_the_end(ends: tuple[End, End]) -> None:
    one, other = ends
    with one.link.together():
        one.link.send((b"a",))
        one.link.send((b"b",))
        assert one.link.unsent_bytes
    assert not one.link.unsent_bytes
    await other.wait_for(2)


async def test_the_last_words_of_a_flood_are_all_heard(ends: tuple[End, End]) -> None:
    one, other = ends
    for number in range(10 * TURN_MAX):
        one.link.send((str(number).encode(),))
    one.link.close()
    await other.ended.wait()
    assert len(other.messages) == 10 * TURN_MAX


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.binary(max_size=300), max_size=5), min_size=1, max_size=20),
    st.lists(st.integers(1, 400), min_size=1, max_size=30),
)
async def test_a_stream_cut_anywhere_gives_the_same_messages(messages: list[list[bytes]], cuts: list[int]) -> None:
    raw, theirs = socket.socketpair()
    end = End(theirs)
    end.listen()
    stream = b"".join(struct.pack(">I", len(body)) + body for body in map(encode, messages))
    with raw:
        at = 0
        while at < len(stream):
            size = cuts[at % len(cuts)]
            raw.sendall(stream[at : at + size])
            at += size
            while end.link.drain():
                continue
        assert end.messages == messages
    end.link.close()


async def test_a_handler_that_fails_does_not_lose_the_messages_behind(ends: tuple[End, End]) -> None:
    one, other = ends

    def fail_first(frames: list[bytes]) -> None:
        other.take(frames)
        if frames == [b"bad"]:
            raise RuntimeError("cannot be handled")

    other.link.listen(fail_first, other.ended.set)
    one.link.send((b"bad",))
    one.link.send((b"good",))
    await other.wait_for(2)
    assert other.messages == [[b"bad"], [b"good"]]


async def test_the_end_comes_behind_the_last_words(ends: tuple[End, End]) -> None:
    one, other = ends
    one.link.send((b"last words",))
    await one.link.finish(5)
    with anyio.fail_after(20):
        await other.ended.wait()
    assert other.messages == [[b"last words"]]
    assert not other.link.open
    assert not other.link.send((b"too late",))


async def test_finishing_waits_for_what_is_kept(ends: tuple[End, End]) -> None:
    one, other = ends
    one.link.send((bytes(8 * 1024 * 1024),))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one.link.finish, 20)
        await other.wait_for(1)
    assert not one.link.open


async def test_finishing_gives_up_when_nobody_takes_it() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        link = Link(ours)
        link.listen(lambda frames: None, lambda: None)
        link.send((bytes(8 * 1024 * 1024),))
        with anyio.fail_after(20):
            await link.finish(0.05)
        assert not link.open


async def test_sending_to_an_end_that_is_gone_says_so() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    end = End(ours)
    end.listen()
    assert not end.link.send((b"nobody", bytes(1000)))
    with anyio.fail_after(20):
        await end.ended.wait()
