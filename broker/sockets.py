"""A ZeroMQ socket that is drained: one wake-up takes every message that is there.

The socket's descriptor is edge-triggered: it tells that something changed, once. So a drain goes on until there is
nothing, and a send from elsewhere, which may swallow the edge, is followed by another drain. Awaiting message by
message costs a turn of the loop each; draining was measured at one and a half times the rate. The descriptor stays
registered with the loop for the socket's life: waiting for it anew each time (`anyio.wait_readable`) adds a task
switch and two system calls to every message of a lone caller, 60 microseconds of 150.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import anyio
import zmq

from broker.logs import get_logger
from snapbroker.messages import NOBLOCK, readable, receive, send

log = get_logger()

DRAIN_MAX: Final = 4
"""Messages taken before the loop gets a turn, a tenth of a millisecond: a flood on one socket starves no other."""

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
        self._listening: asyncio.AbstractEventLoop | None = None
        self.received = 0
        self.sent = 0
        self.undeliverable = 0

    async def run(self) -> None:
        """Drain whenever there is something, until cancelled."""
        self._listening = asyncio.get_running_loop()
        self._listening.add_reader(self._descriptor, self._drain_in_turns)
        try:
            self._drain_in_turns()
            await anyio.sleep_forever()
        finally:
            self._listen_no_more()

    def _listen_no_more(self) -> None:
        """Before the socket is closed: its descriptor's number may be another's a moment later."""
        if self._listening is not None:
            self._listening.remove_reader(self._descriptor)
            self._listening = None

    def _drain_in_turns(self) -> None:
        """Drain, and go on in the loop's next turn where there is more than belongs in one."""
        self._again = False
        try:
            more = self.drain()
        except Exception:
            # The messages behind it make no new edge: go on with them.
            log.exception("a message could not be handled")
            more = True
        if more:
            self._drain_soon()

    def _drain_soon(self) -> None:
        if not self._again:
            self._again = True
            asyncio.get_running_loop().call_soon(self._drain_in_turns)

    def drain(self) -> bool:
        """Hand every waiting message to the handler; whether there may be more."""
        if self._draining:
            return False
        self._draining = True
        try:
            for _ in range(DRAIN_MAX):
                if self._closed or not readable(self._socket):
                    return False
                self.received += 1
                self._take()
        finally:
            self._draining = False
        return True

    def _take(self) -> None:
        self._handler(receive(self._socket, NOBLOCK))

    def send(self, frames: Sequence[bytes]) -> bool:
        """Send without waiting; False, and counted, when the peer is gone or does not take what it has."""
        taken = self._send(frames)
        self._look()
        return taken

    def send_all(self, messages: Iterable[Sequence[bytes]]) -> None:
        """Send several; cheaper than one by one."""
        for frames in messages:
            self._send(frames)
        self._look()

    def _send(self, frames: Sequence[bytes]) -> bool:
        try:
            send(self._socket, frames)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self.undeliverable += 1
            return False
        self.sent += 1
        return True

    def _look(self) -> None:
        """A send, and one that fails as well, may have swallowed the edge of a message that came meanwhile."""
        if not self._draining and readable(self._socket):
            self._drain_soon()

    @property
    def closed(self) -> bool:
        """Whether the socket is closed."""
        return self._closed

    def statistics(self) -> dict[str, int]:
        """For `status`."""
        return {"received": self.received, "sent": self.sent, "undeliverable": self.undeliverable}

    def close(self, linger_ms: int = 200) -> None:
        """Close the socket, giving what is under way a moment."""
        self._closed = True
        self._listen_no_more()
        self._socket.close(linger=linger_ms)


FrameHandler = Callable[[list[zmq.Frame]], None]


class FramePort(Port):
    """A socket whose handler is told what libzmq knows of a message beside its bytes; it may close the port."""

    def __init__(self, socket: zmq.Socket[bytes], handler: FrameHandler) -> None:
        super().__init__(socket, lambda _frames: None)
        self._frame_handler = handler

    def _take(self) -> None:
        self._frame_handler(self._socket.recv_multipart(NOBLOCK, copy=False))
