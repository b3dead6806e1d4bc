"""The line between the router and an actor: messages of frames over a pair of connected Unix sockets.

Inside the broker nothing is gained by ZeroMQ: both ends are ours, there is one peer, and it is born with its socket.
What it costs is a thread at either end that every message has to pass. Measured on two cores, kernel 6.18: a stat by
one blocking caller takes 209 us with a ROUTER and a DEALER here, 124 us with this, and the two processes together spend
0.1 ms of processor on it instead of 0.17. And the end of a process is the end of its line: its last words come first,
nothing of a dead actor can be taken for the living one's.

A message is its length, 4 bytes, and a MessagePack array of its frames. Neither end ever waits: what the kernel does
not take is kept, and leaves as soon as it does. The router bounds what is open at an actor, and so what can lie here.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import anyio

from broker.logs import get_logger
from snapbroker.protocol import decoder, encode

log = get_logger()

RECEIVE_BYTES: Final = 64 * 1024
"""Taken from the kernel at once."""
TURN_MAX: Final = 4
"""Messages handed over before the loop gets a turn, a fifth of a millisecond: a flood on one line starves no other."""

_LENGTH: Final = struct.Struct(">I")
_frames = decoder(list[bytes]).decode

Handler = Callable[[list[bytes]], None]


def first_message(end: socket.socket) -> list[bytes]:
    """Wait for the message that comes first, before there is a loop, and take no more than that."""
    (length,) = _LENGTH.unpack(_exactly(end, _LENGTH.size))
    return _frames(_exactly(end, length))


def _exactly(end: socket.socket, size: int) -> bytes:
    data = end.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise ConnectionResetError("the other end was closed before the first message")
    return data


def _nobody(_frames: list[bytes]) -> None:
    """What comes before anybody listens, or after: nothing does."""


class Link:
    """One end: `handler` gets each message, `ended` is called once when the other end is closed."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._handler: Handler = _nobody
        self._ended: Callable[[], None] = lambda: None
        self._received = bytearray()
        self._left = False
        self._unsent = bytearray()
        self._corked = False
        self._waiting = False
        self._sent: anyio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.open = True

    def listen(self, handler: Handler, ended: Callable[[], None]) -> None:
        """Hand over what comes, on the running loop, until `close` or the other end's end."""
        self._handler, self._ended = handler, ended
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._readable)

    def _readable(self) -> None:
        if not self._left:
            self.drain()

    def drain(self) -> bool:
        """Hand over a turn's messages of those that are there; whether there may be more."""
        if not self._left and not self._receive():
            return False
        with self.together():
            self._left = self._take()
        if self._left and self._loop is not None:
            self._loop.call_soon(self.drain)
        return self._left or self.open

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is sent inside leaves at the end, by one system call; not to be nested."""
        self._corked = True
        try:
            yield
        finally:
            self._corked = False
            self._flush()

    def _receive(self) -> bool:
        """Take what the kernel has; at its end, this one's as well."""
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._end()
        self._received += data
        return bool(data)

    def _take(self) -> bool:
        """Hand over a turn's messages; whether more are left."""
        at, length, number = 0, len(self._received), 0
        with memoryview(self._received) as view:
            while length - at >= _LENGTH.size and number < TURN_MAX:
                begin = at + _LENGTH.size
                end = begin + _LENGTH.unpack_from(view, at)[0]
                if end > length:
                    break
                at = end
                number += 1
                try:
                    self._handler(_frames(view[begin:end]))
                except Exception:
                    log.exception("a message could not be handled")
        del self._received[:at]
        return number == TURN_MAX

    def send(self, frames: Sequence[bytes]) -> bool:
        """Send, or keep what the kernel does not take; False when the other end is gone."""
        if not self.open:
            return False
        message = encode(frames)
        self._unsent += _LENGTH.pack(len(message))
        self._unsent += message
        if not self._corked:
            self._flush()
        return self.open

    def _flush(self) -> None:
        """Send what is kept; where the kernel takes no more, go on when it does."""
        if not self._unsent or not self.open or self._loop is None:
            return
        try:
            taken = self._socket.send(self._unsent)
        except BlockingIOError:
            taken = 0
        except OSError:
            self._end()
            return
        del self._unsent[:taken]
        if self._waiting != bool(self._unsent):
            self._waiting = not self._waiting
            if self._waiting:
                self._loop.add_writer(self._socket, self._flush)
            else:
                self._loop.remove_writer(self._socket)
        if self._sent is not None and not self._unsent:
            self._sent.set()

    def _end(self) -> None:
        if self.open:
            self.close()
            self._ended()

    def close(self) -> None:
        """Let go of the socket, and of what it did not take."""
        if self.open:
            self.open = False
            if self._loop is not None:
                self._loop.remove_reader(self._socket)
                self._loop.remove_writer(self._socket)
            self._socket.close()
            if self._sent is not None:
                self._sent.set()

    async def finish(self, seconds: float) -> None:
        """Wait until all is sent, for a moment at most, and close."""
        if self._unsent and self.open:
            self._sent = anyio.Event()
            with anyio.move_on_after(seconds):
                await self._sent.wait()
        self.close()

    @property
    def unsent_bytes(self) -> int:
        """What the other end has not taken."""
        return len(self._unsent)
