"""The port of a socket whose descriptor tells once: no message is left lying, whatever is sent meanwhile."""

from __future__ import annotations

import select
from collections.abc import Callable
from pathlib import Path
from typing import Final

import anyio
import pytest
import zmq
from anyio.lowlevel import checkpoint

from broker.sockets import Port

WAIT_S: Final = 20.0
"""Much longer than it takes, on a busy machine."""
SENDS_MAX: Final = 1_000_000


def edge(socket: zmq.Socket[bytes], seconds: float) -> bool:
    """Whether the socket's descriptor tells something."""
    return bool(select.select([int(socket.getsockopt(zmq.FD))], [], [], seconds)[0])


async def received_after(path: Path, send: Callable[[Port, bytes], object]) -> list[bytes]:
    """What comes of a message whose edge is swallowed by what is sent before the loop turns."""
    came: list[list[bytes]] = []
    once, twice = anyio.Event(), anyio.Event()

    def handler(frames: list[bytes]) -> None:
        came.append(frames)
        (once if len(came) == 1 else twice).set()

    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.bind(f"ipc://{path}")
        dealer.connect(f"ipc://{path}")
        port = Port(router, handler)
        with anyio.fail_after(WAIT_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(port.run)
                dealer.send(b"first")
                await once.wait()
                # Two turns, in which what it still wanted to look at is looked at.
                await checkpoint()
                await checkpoint()
                dealer.send(b"second")
                assert edge(router, WAIT_S)
                for _ in range(SENDS_MAX):
                    send(port, came[0][0])
                    if not edge(router, 0):
                        break
                assert not edge(router, 0)
                assert len(came) == 1
                await twice.wait()
                tasks.cancel_scope.cancel()
        port.close(0)
    return came[1][1:]


@pytest.mark.anyio
async def test_a_message_is_taken_whose_edge_a_send_swallowed(tmp_path: Path) -> None:
    assert await received_after(tmp_path / "s", lambda port, peer: port.send((peer, b"answer"))) == [b"second"]


@pytest.mark.anyio
async def test_a_message_is_taken_whose_edge_a_failed_send_swallowed(tmp_path: Path) -> None:
    """Replies to a client that has left come in between, when there are many."""

    def failing(port: Port, _peer: bytes) -> None:
        assert not port.send((b"nobody", b"answer"))

    assert await received_after(tmp_path / "s", failing) == [b"second"]
