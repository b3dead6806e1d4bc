"""The client's ZeroMQ sockets: one place for their options, so that both clients fail and recover alike.

A DEALER with IMMEDIATE set holds no message for a broker that is not there: a send without a connection says
so at once, and what was queued when a connection broke is dropped, not delivered to the next broker minutes
later. The monitor tells when a connection broke: replies that were under way then will never come.

ZeroMQ reports the break before it takes the connection's queue away: what is sent in between is accepted and lost,
and no second report follows. So after a break nothing is sent until the monitor has seen the next handshake.
"""

from __future__ import annotations

import os
import warnings
import weakref
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from snapbroker.errors import InvalidArgument
from snapbroker.protocol import BODY_BYTES_MAX

CONNECT_SECONDS: Final = 3.0
"""How long a call waits for a broker that is not there: longer than a restart takes, short for somebody who waits."""
RECONNECT_MS: Final = 50
"""First pause between attempts to connect."""
RECONNECT_MS_MAX: Final = 1_000
"""Longest pause between attempts to connect."""
LINGER_MS: Final = 100
"""How long closing waits for the last messages, such as a Cancel, to leave."""
EVENTS_QUEUED_MAX: Final = 100_000
"""Most events a subscriber's socket holds; what comes above is dropped and healed from the journal."""
ALIVE_MS: Final = 10_000
"""Pause between ZMTP pings over tcp, where a dead peer would not be noticed otherwise."""

_FRAME_BYTES_MAX: Final = BODY_BYTES_MAX + 4096

Socket = zmq.Socket[bytes]


class Sockets:
    """The context and the open sockets of one connection, `owner`: closed with it, at the latest when it is collected.

    A context that becomes garbage together with its sockets ends the program's progress: the collector takes the
    context's list of its sockets away first, so the context closes none of them and then waits for all, without
    a limit, wherever in the program the collector has struck. So both are held here from outside of every cycle
    that the owner is in, and are closed when the owner goes.

    At the interpreter's exit nothing is closed: a daemon thread may be inside one of the sockets, and pyzmq
    terminates no context then.
    """

    def __init__(self, owner: object, endpoint: str) -> None:
        self.context: zmq.Context[Socket] = zmq.Context()
        self.open: set[Socket] = set()
        self._abandoned = weakref.finalize(owner, _close_abandoned, self.context, self.open, endpoint, os.getpid())
        self._abandoned.atexit = False

    def dealer(self, endpoint: str) -> tuple[Socket, Socket]:
        """A DEALER connecting to the broker, and the monitor of its connection."""
        pair = dealer(self.context, endpoint)
        self.open.update(pair)
        return pair

    def close_dealer(self, socket: Socket, monitor: Socket) -> None:
        """Close a DEALER and its monitor."""
        # The collector may have closed them before the last of their users went.
        if not socket.closed:
            close_dealer(socket, monitor)
        self.open.difference_update((socket, monitor))

    def subscriber(self, endpoint: str, prefixes: tuple[bytes, ...]) -> Socket:
        """A SUB connected to the broker's publisher, subscribed to `prefixes`."""
        socket = subscriber(self.context, endpoint, prefixes)
        self.open.add(socket)
        return socket

    def close_subscriber(self, socket: Socket) -> None:
        """Close a SUB."""
        socket.close()
        self.open.discard(socket)

    def end(self) -> None:
        """Terminate the context once no socket is open; last messages have LINGER_MS to leave."""
        if not self.open and self._abandoned.detach() is not None:
            # Not only terminated: what could not be opened wholly may not have been collected yet.
            self.context.destroy()


def _close_abandoned(context: zmq.Context[Socket], opened: set[Socket], endpoint: str, pid: int) -> None:
    """Close what nobody can close any more, at once: whoever is collecting must not wait for messages to leave."""
    # After a fork the sockets are the parent's.
    if os.getpid() != pid:
        return
    for socket in opened:
        socket.close(linger=0)
    opened.clear()
    context.destroy(linger=0)
    warnings.warn(f"a connection to {endpoint} was dropped and not closed", ResourceWarning, stacklevel=2)


def dealer(context: zmq.Context[Socket], endpoint: str) -> tuple[Socket, Socket]:
    """A DEALER connecting to the broker, and the monitor of its connection."""
    socket = context.socket(zmq.DEALER)
    try:
        socket.set(zmq.IMMEDIATE, 1)
        # A ROUTER drops what does not fit a peer's queue. The queue is bounded by what this client asked for.
        socket.set(zmq.RCVHWM, 0)
        _common(socket, endpoint)
        monitor = _monitor(context, socket)
    except BaseException:
        socket.close()
        raise
    try:
        _connect(socket, endpoint)
    except BaseException:
        close_dealer(socket, monitor)
        raise
    return socket, monitor


def _monitor(context: zmq.Context[Socket], socket: Socket) -> Socket:
    address = f"inproc://monitor-{id(socket)}"
    socket.monitor(address, zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    monitor = context.socket(zmq.PAIR)
    # The I/O thread would block on a full queue of a monitor that nobody reads while the program is idle.
    monitor.set(zmq.RCVHWM, 0)
    monitor.set(zmq.LINGER, 0)
    monitor.connect(address)
    return monitor


def close_dealer(socket: Socket, monitor: Socket) -> None:
    """Close a DEALER and its monitor."""
    socket.disable_monitor()
    monitor.close()
    socket.close()


def subscriber(context: zmq.Context[Socket], endpoint: str, prefixes: tuple[bytes, ...]) -> Socket:
    """A SUB connected to the broker's publisher, subscribed to `prefixes`."""
    socket = context.socket(zmq.SUB)
    socket.set(zmq.RCVHWM, EVENTS_QUEUED_MAX)
    _common(socket, endpoint)
    for prefix in prefixes:
        socket.set(zmq.SUBSCRIBE, prefix)
    try:
        _connect(socket, endpoint)
    except InvalidArgument:
        socket.close()
        raise
    return socket


def _common(socket: Socket, endpoint: str) -> None:
    socket.set(zmq.LINGER, LINGER_MS)
    socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)
    socket.set(zmq.MAXMSGSIZE, _FRAME_BYTES_MAX)
    if endpoint.startswith("tcp://"):
        socket.set(zmq.IPV6, 1)
        socket.set(zmq.HEARTBEAT_IVL, ALIVE_MS)
        socket.set(zmq.HEARTBEAT_TIMEOUT, 3 * ALIVE_MS)


def _connect(socket: Socket, endpoint: str) -> None:
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise InvalidArgument(f"{endpoint!r} is no endpoint to connect to: {error}") from None


def connection_changes(monitor: Socket) -> tuple[bool, bool | None]:
    """What the monitor has to tell: whether a connection broke, and whether there is one since (None: no change)."""
    broke = False
    connected: bool | None = None
    while True:
        try:
            frames = monitor.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return broke, connected
        connected = parse_monitor_message(frames)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        broke = broke or not connected


def readable(socket: Socket) -> bool:
    """Whether a message can be taken without waiting."""
    events = socket.get(zmq.EVENTS)
    assert isinstance(events, int)  # noqa: S101 - the option's type, as ZeroMQ's manual has it
    return bool(events & zmq.POLLIN)


def descriptor(socket: Socket) -> int:
    """The descriptor that becomes readable, once, when there is something to do."""
    found = socket.get(zmq.FD)
    assert isinstance(found, int)  # noqa: S101 - the option's type, as ZeroMQ's manual has it
    return found


def absent(endpoint: str, seconds: float) -> str:
    """The message for a broker that cannot be reached."""
    return (
        f"no broker answers at {endpoint} (waited {seconds:g} s): start snapbrokerd, "
        "or name the right endpoint by argument or SNAPBROKER_ENDPOINT"
    )


def vanished(endpoint: str) -> str:
    """The message for a broker that went away with a call under way."""
    return f"the connection to the broker at {endpoint} broke with the call under way"


def overdue(endpoint: str, target: bytes, seconds: float) -> str:
    """The message for a reply that did not come in time."""
    who = repr(target.decode(errors="replace")) if target else "the broker itself"
    return f"no answer from {who} at {endpoint} within {seconds:g} s"
