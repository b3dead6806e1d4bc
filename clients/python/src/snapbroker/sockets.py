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
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from snapbroker import messages
from snapbroker.errors import BrokerError, InvalidArgument, Unauthenticated, Unavailable
from snapbroker.keyfiles import CLIENT_KEY_VARIABLE, SERVER_KEY_VARIABLE, Curve
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

_TCP: Final = "tcp://"
_WATCHED: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_FRAME_BYTES_MAX: Final = BODY_BYTES_MAX + 4096

Socket = messages.Socket


class Sockets:
    """The context and the open sockets of one connection, `owner`: closed with it, at the latest when it is collected.

    A context that becomes garbage together with its sockets ends the program's progress: the collector takes the
    context's list of its sockets away first, so the context closes none of them and then waits for all, without
    a limit, wherever in the program the collector has struck. So both are held here from outside of every cycle
    that the owner is in, and are closed when the owner goes.

    At the interpreter's exit nothing is closed: a daemon thread may be inside one of the sockets, and pyzmq
    terminates no context then.
    """

    def __init__(self, owner: object, endpoint: str, curve: Curve | None = None) -> None:
        self._curve = curve
        self.context: zmq.Context[Socket] = zmq.Context()
        self.open: set[Socket] = set()
        self._abandoned = weakref.finalize(owner, _close_abandoned, self.context, self.open, endpoint, os.getpid())
        self._abandoned.atexit = False

    def dealer(self, endpoint: str) -> tuple[Socket, Socket]:
        """A DEALER connecting to the broker, and the monitor of its connection."""
        pair = dealer(self.context, endpoint, self._curve)
        self.open.update(pair)
        return pair

    def line(self, socket: Socket, monitor: Socket, endpoint: str) -> Line:
        """What is known of a DEALER's connection."""
        return Line(socket, monitor, endpoint, self._curve)

    def close_dealer(self, socket: Socket, monitor: Socket) -> None:
        """Close a DEALER and its monitor."""
        # The collector may have closed them before the last of their users went.
        if not socket.closed:
            close_dealer(socket, monitor)
        self.open.difference_update((socket, monitor))

    def subscriber(self, endpoint: str, prefixes: tuple[bytes, ...]) -> Socket:
        """A SUB connected to the broker's publisher, subscribed to `prefixes`."""
        socket = subscriber(self.context, endpoint, prefixes, self._curve)
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


def dealer(context: zmq.Context[Socket], endpoint: str, curve: Curve | None = None) -> tuple[Socket, Socket]:
    """A DEALER connecting to the broker, and the monitor of its connection."""
    socket = context.socket(zmq.DEALER)
    try:
        socket.set(zmq.IMMEDIATE, 1)
        # A ROUTER drops what does not fit a peer's queue. The queue is bounded by what this client asked for.
        socket.set(zmq.RCVHWM, 0)
        _common(socket, endpoint, curve)
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
    socket.monitor(address, _WATCHED)
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


def subscriber(
    context: zmq.Context[Socket], endpoint: str, prefixes: tuple[bytes, ...], curve: Curve | None = None
) -> Socket:
    """A SUB connected to the broker's publisher, subscribed to `prefixes`."""
    socket = context.socket(zmq.SUB)
    socket.set(zmq.RCVHWM, EVENTS_QUEUED_MAX)
    _common(socket, endpoint, curve)
    for prefix in prefixes:
        socket.set(zmq.SUBSCRIBE, prefix)
    try:
        _connect(socket, endpoint)
    except InvalidArgument:
        socket.close()
        raise
    return socket


def equip(socket: Socket, curve: Curve) -> None:
    """Give a socket its keys, before it is connected."""
    socket.set(zmq.CURVE_PUBLICKEY, curve.public.encode())
    socket.set(zmq.CURVE_SECRETKEY, curve.secret.encode())
    socket.set(zmq.CURVE_SERVERKEY, curve.server.encode())


def connect_anew(socket: Socket) -> None:
    """Let a subscriber that hears nothing from another machine knock again: libzmq gives up where it was refused."""
    endpoint = socket.get_string(zmq.LAST_ENDPOINT)
    if endpoint.startswith(_TCP):
        with suppress(zmq.ZMQError):
            socket.disconnect(endpoint)
        _connect(socket, endpoint)


def _common(socket: Socket, endpoint: str, curve: Curve | None) -> None:
    socket.set(zmq.LINGER, LINGER_MS)
    socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)
    socket.set(zmq.MAXMSGSIZE, _FRAME_BYTES_MAX)
    if endpoint.startswith(_TCP):
        if curve is not None:
            equip(socket, curve)
        socket.set(zmq.IPV6, 1)
        socket.set(zmq.HEARTBEAT_IVL, ALIVE_MS)
        socket.set(zmq.HEARTBEAT_TIMEOUT, 3 * ALIVE_MS)


def _connect(socket: Socket, endpoint: str) -> None:
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise InvalidArgument(f"{endpoint!r} is no endpoint to connect to: {error}") from None


class Line:
    """What a DEALER's monitor has told: whether it is connected, and if not, why (RFC 3, 3.5).

    A broker that refuses a key says so, and libzmq does not try again by itself: `knock` does, for the next call.
    One that has another key than was expected says nothing and hangs up, as one does that is just being stopped: that
    counts when the time to connect is over.
    """

    def __init__(self, socket: Socket, monitor: Socket, endpoint: str, curve: Curve | None) -> None:
        self._socket = socket
        self._monitor = monitor
        self._endpoint = endpoint
        self._curve = curve
        self._hung_up = False
        self.connected = False
        self.lost = False
        """Whether an interrupt may have lost an event: nobody knows then what is connected."""
        self.refused: str | None = None

    def learn(self) -> bool:
        """Take what the monitor has to tell; answers whether a connection broke since the last time."""
        broke = False
        while messages.readable(self._monitor):
            told = self._told()
            event = told["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.connected, self.refused, self._hung_up = True, None, False
            elif event == zmq.EVENT_DISCONNECTED:
                broke = broke or self.connected
                self.connected = False
            elif event == zmq.EVENT_CLOSED:
                self._hung_up = False
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._hung_up = True
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self.refused = refused(self._endpoint, self._curve)
            elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                mismatch = told["value"] == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
                self.refused = (mismatched if mismatch else mistaken)(self._endpoint, self._curve)
        return broke

    def _told(self) -> Mapping[str, object]:
        self.lost = True
        told = parse_monitor_message(messages.receive(self._monitor, messages.NOBLOCK))
        self.lost = False
        return told

    def refusal(self) -> BrokerError | None:
        """Why there will be no connection by waiting; None where there may be one."""
        return None if self.refused is None else Unauthenticated(self.refused)

    def knock(self) -> None:
        """Try again where libzmq has given up."""
        if self.refused is not None:
            self.refused = None
            with suppress(zmq.ZMQError):
                self._socket.disconnect(self._endpoint)
            _connect(self._socket, self._endpoint)

    def absent(self, seconds: float) -> BrokerError:
        """The error when so many seconds have brought no connection."""
        if self._hung_up and self._endpoint.startswith(_TCP):
            return Unauthenticated((mistaken if self._curve is not None else mismatched)(self._endpoint, self._curve))
        return Unavailable(absent(self._endpoint, seconds))


def descriptor(socket: Socket) -> int:
    """The descriptor that becomes readable, once, when there is something to do."""
    found = socket.get(zmq.FD)
    assert isinstance(found, int)  # noqa: S101 - the option's type, as ZeroMQ's manual has it
    return found


def refused(endpoint: str, curve: Curve | None) -> str:
    """The message for a key that the broker does not know."""
    if curve is None:
        return f"the broker at {endpoint} refused the connection: it takes a key, name it by {CLIENT_KEY_VARIABLE}"
    return (
        f"the broker at {endpoint} refused the key of {curve.source or 'this client'}: it was revoked, or this broker "
        "never had it; `snapbrokerd keys list` there shows those it has"
    )


def mismatched(endpoint: str, curve: Curve | None) -> str:
    """The message where one side has keys and the other has none."""
    if curve is None:
        return (
            f"the broker at {endpoint} broke the handshake off: it likely takes a key; `snapbrokerd keys new` there "
            f"makes one, name its file by {CLIENT_KEY_VARIABLE}"
        )
    return f"what listens at {endpoint} knows of no keys: connect without {CLIENT_KEY_VARIABLE}, or to another endpoint"


def mistaken(endpoint: str, _curve: Curve | None) -> str:
    """The message where the broker is likely another one than was expected."""
    return (
        f"the handshake with {endpoint} fails: the server key, of {SERVER_KEY_VARIABLE} or of the client's key file, "
        "is likely not that of this broker: compare it with the broker's server.pub"
    )


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
