"""The gate of the remote sockets: CURVE, the ZAP handler that knows the keys, and whose message it was.

libzmq asks the handler, a ROUTER socket at a well-known place within the process, about the public key of everybody
who wants to connect (ZeroMQ RFC 27). It is drained on the broker's loop like every other socket: pyzmq's own
authenticators want a thread, or a wake-up for each message, and do not look at their certificates again. The answer's
user id is the public key itself, and not the client's name: a name may be given to another key while connections of
the first are open. libzmq attaches it to every message that comes in; the peer cannot set it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, Protocol

import zmq
from zmq.utils import z85

from broker.access import Denials
from broker.logs import get_logger
from broker.sockets import Port
from snapbroker.errors import Unauthenticated

if TYPE_CHECKING:
    from broker.keys import Entry, Keyring

log = get_logger()

ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
ZAP_VERSION: Final = b"1.0"
DOMAIN: Final = b"snapbroker"
KEEPALIVE: Final = (
    (zmq.TCP_KEEPALIVE, 1),
    (zmq.TCP_KEEPALIVE_IDLE, 60),
    (zmq.TCP_KEEPALIVE_INTVL, 15),
    (zmq.TCP_KEEPALIVE_CNT, 4),
)
"""A peer whose machine is gone is given up after two minutes: by the kernel, whatever its ZeroMQ can answer."""
BACKLOG: Final = 512
"""Connections that wait to be taken: a flood of them must not keep a good client out."""
_GENERATED_BYTES: Final = 5
"""A zero and a number of 32 bits."""


class Limits(Protocol):
    """What of the configuration is needed here."""

    @property
    def handshake_ms(self) -> int: ...  # noqa: D102


class Gate:
    """Who may connect, and what whoever is connected may do at this moment."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keyring: Keyring, limits: Limits) -> None:
        self._keyring = keyring
        self._limits = limits
        self._refused = Denials("a connection was refused")
        self._unknown = Denials("a request of a key that was revoked was refused")
        self._accepted = 0
        socket = context.socket(zmq.ROUTER)
        socket.bind(ZAP_ENDPOINT)
        self.port = Port(socket, self._asked)

    def _asked(self, frames: list[bytes]) -> None:
        """One ZAP request: identity, empty, version, id, domain, address, routing id, mechanism, credentials."""
        if len(frames) != 9 or frames[2] != ZAP_VERSION:
            return
        peer, _, _, request_id, domain, address, _, mechanism, credentials = frames
        key = z85.encode(credentials).decode() if mechanism == b"CURVE" and len(credentials) == 32 else ""
        entry = self._keyring.entry(key) if domain == DOMAIN else None
        if entry is None:
            self._refused.add(address=address.decode(errors="replace"), key=key)
            verdict = (b"400", b"this key is not known here", b"")
        else:
            self._accepted += 1
            verdict = (b"200", b"", key.encode())
        self.port.send((peer, b"", ZAP_VERSION, request_id, *verdict, b""))

    def guard(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        """Let nobody through to this socket, before it is bound, who was not asked for a key."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keyring.server.secret.encode())
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        # Without a handler libzmq would let everybody in who has the server's public key.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.setsockopt(zmq.HANDSHAKE_IVL, self._limits.handshake_ms)
        socket.setsockopt(zmq.BACKLOG, BACKLOG)
        socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        for option, value in KEEPALIVE:
            socket.setsockopt(option, value)

    def entry(self, key: str) -> Entry:
        """The client with this key; Unauthenticated where it has been revoked."""
        found = self._keyring.entry(key)
        if found is None:
            self._unknown.add(key=key)
            raise Unauthenticated("this key is not known here any more: ask whoever keeps the broker's keys")
        return found

    async def watch(self, changed: Callable[[Mapping[str, Entry], Mapping[str, Entry]], None]) -> None:
        """Follow the key directory, until cancelled."""
        await self._keyring.watch(changed)

    def statistics(self) -> dict[str, int]:
        """For `status`."""
        return {
            **self._keyring.statistics(),
            "connections": self._accepted,
            "connections_refused": self._refused.count,
            "revoked": self._unknown.count,
        }


def told_user(handler: Callable[[str, list[bytes]], None]) -> Callable[[list[zmq.Frame]], None]:
    """A handler of frames for one that wants the sender's key, '' where there is none."""

    def take(frames: list[zmq.Frame]) -> None:
        handler(user_of(frames[0]), [frame.bytes for frame in frames])

    return take


def user_of(frame: zmq.Frame) -> str:
    """The public key of who sent the frame; '' for what libzmq says itself."""
    try:
        found = frame.get("User-Id")
    except zmq.ZMQError:
        return ""
    return found if isinstance(found, str) else ""


def is_generated(routing_id: bytes) -> bool:
    """Whether a peer's routing id is the broker's own invention: the peer's never begins with a zero."""
    return len(routing_id) == _GENERATED_BYTES and routing_id[0] == 0
