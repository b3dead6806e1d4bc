"""A ZeroMQ socket that is drained: one wake-up takes every message that is there.

The socket's descriptor is edge-triggered: it tells that something changed, once. So a drain goes on until there is
nothing, and a send from elsewhere, which may swallow the edge, is followed by another drain. Awaiting message by
message costs a turn of the loop each; draining was measured at one and a half times the rate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import anyio
import zmq

DRAIN_MAX: Final = 256
"""Messages taken before the loop gets a turn: a flood on one socket does not starve the others."""

Handler = Callable[[list[bytes]], None]


class Port:
    """One socket, its handler and its counters."""

    def __init__(self, socket: zmq.Socket[bytes], handler: Handler) -> None:
        self._socket = socket
        self._handler = handler
        self._descriptor = int(socket.getsockopt(zmq.FD))
        self._draining = False
        self._again = False
        self._closed = False
        self.received = 0
        self.sent = 0
        self.undeliverable = 0

    async def run(self) -> None:
        """Drain whenever there is something, until cancelled."""
        while True:
            while self.drain():
                await anyio.lowlevel.checkpoint()
            await anyio.wait_readable(self._descriptor)

    def drain(self) -> bool:
        """Hand every waiting message to the handler; whether there may be more."""
        if self._draining or self._closed:
            return False
        self._draining = True
        receive, handler = self._socket.recv_multipart, self._handler
        try:
            for _ in range(DRAIN_MAX):
                frames = receive(zmq.NOBLOCK)
                self.received += 1
                handler(frames)
        except zmq.Again:
            return False
        finally:
            self._draining = False
        return True

    def send(self, frames: Sequence[bytes]) -> bool:
        """Send without waiting; False, and counted, when the peer is gone or does not take what it has."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self.undeliverable += 1
            return False
        self.sent += 1
        if not self._draining and not self._again:
            self._again = True
            asyncio.get_running_loop().call_soon(self._after_send)
        return True

    def _after_send(self) -> None:
        self._again = False
        if self.drain():
            asyncio.get_running_loop().call_soon(self._after_send)

    def statistics(self) -> dict[str, int]:
        """For `status`."""
        return {"received": self.received, "sent": self.sent, "undeliverable": self.undeliverable}

    def close(self) -> None:
        """Close the socket, giving what is under way a moment."""
        self._closed = True
        self._socket.close(linger=200)
