"""The remote publisher: the same events, each subscriber seeing those of its grant and no others.

An XPUB socket in manual mode asks what to make of every subscription: it is narrowed to the grant of the key that sent
it (docs/rfc/3-access.md 4.3), so that what a subscriber may not see is never queued for it. Three things follow from
how libzmq does it:

- A subscription can be put on a connection in answer to a message of it, and never be changed later. So when a key
  is revoked, or has another grant, the socket is closed and bound anew: its subscribers come back by themselves, are
  asked for their keys again, and see by the heartbeats what they missed.
- A prefix that was narrowed to a longer one is not unsubscribed: another subscription of the same connection may
  have been narrowed to the same. What is too much a SUB socket drops by itself.
- libzmq counts on it that every message it hands out is a subscription: one that is not makes it take the next
  subscription for another connection's (4.3.5, `xpub_t::xrecv`). No client has a reason to send one. So the socket
  is bound anew before the next is looked at, and the sender gets no events for a while.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import anyio
import zmq

from broker import privileges
from broker.access import Denials, narrowed
from broker.gate import Gate, told_user
from broker.logs import get_logger
from broker.sockets import FramePort
from snapbroker.errors import Unauthenticated
from snapbroker.protocol import heartbeat_topic

if TYPE_CHECKING:
    from broker.keys import Entry

log = get_logger()

REBIND_PAUSE_S: Final = 0.005
"""Between two attempts to bind an address that the closed socket has not let go of yet: measured, one is enough."""
BANISHED_S: Final = 60.0
"""How long a key gets no events that sent what no subscriber sends."""


class Audience:
    """The remote publisher's socket, bound anew when somebody in it has to go."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        gate: Gate,
        snapshotters: Sequence[str],
        send_queue_max: int,
    ) -> None:
        self._context = context
        self._gate = gate
        self._snapshotters = tuple(snapshotters)
        self._send_queue_max = send_queue_max
        self._refused = Denials("a subscription was refused")
        self._strays = Denials("a subscriber sent what is no subscription, and gets no events for a while")
        self._banished: dict[str, float] = {}
        self._rebinds = 0
        self._before: Counter[str] = Counter()
        self._subscriptions = 0
        self._wanted = anyio.Event()
        self.endpoint = endpoint
        self._port: FramePort | None = None
        self._port = self._bind()

    def _bind(self) -> FramePort:
        socket = self._context.socket(zmq.XPUB)
        try:
            socket.setsockopt(zmq.SNDHWM, self._send_queue_max)
            socket.setsockopt(zmq.XPUB_MANUAL, 1)
            self._gate.guard(socket, self.endpoint)
            with privileges.raised():
                socket.bind(self.endpoint)
        except zmq.ZMQError:
            socket.close(linger=0)
            raise
        # With a port that the kernel chose, the next bind is to the same one.
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._socket = socket
        return FramePort(socket, told_user(self._subscribed))

    async def run(self) -> None:
        """Drain the socket, and bind it anew when that is wanted, until cancelled."""
        while True:
            self._wanted = anyio.Event()
            if self._port is None:
                self._port = await self._bind_again()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._port.run)
                await self._wanted.wait()
                tasks.cancel_scope.cancel()
            self._drop()

    async def _bind_again(self) -> FramePort:
        told = False
        while True:
            try:
                return self._bind()
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE and not told:
                    told = True
                    log.error("the remote publisher cannot be bound again", endpoint=self.endpoint, error=str(error))
            await anyio.sleep(REBIND_PAUSE_S if not told else 1.0)

    def _drop(self) -> None:
        """Close the socket with all its connections; `run` binds it anew."""
        port, self._port = self._port, None
        if port is not None:
            self._rebinds += 1
            self._before.update(port.statistics())
            self._subscriptions = 0
            port.close(linger_ms=0)
        self._wanted.set()

    def _subscribed(self, key: str, frames: list[bytes]) -> None:
        kind, topic = frames[0][:1], frames[0][1:]
        if len(frames) != 1 or kind not in (b"\x00", b"\x01"):
            self._strays.add(key=key)
            self._banished[key] = time.monotonic() + BANISHED_S
            self._drop()
            return
        if not key:
            return  # The end of a connection, told by libzmq itself.
        prefixes, own = self._narrowed(key, topic)
        if kind == b"\x01":
            # Never counted down: anybody can end what was never begun, and silence the others so.
            self._subscriptions += 1
            for prefix in prefixes:
                self._socket.setsockopt(zmq.SUBSCRIBE, prefix)
        elif own:
            self._socket.setsockopt(zmq.UNSUBSCRIBE, topic)

    def _narrowed(self, key: str, topic: bytes) -> tuple[list[bytes], bool]:
        """What a subscription becomes, and whether no other subscription can have become the same."""
        if self._banished.get(key, 0.0) > time.monotonic():
            return [], False
        try:
            grant = self._gate.entry(key).grant
            text = topic.decode()
        except (Unauthenticated, UnicodeDecodeError):
            return [], False
        names = [name for name in self._snapshotters if grant.reaches(name)]
        allowed = (*grant.prefixes(self._snapshotters), *(heartbeat_topic(name) for name in names))
        found = narrowed(text, allowed)
        if not found:
            self._refused.add(client=grant.client, topic=text[:200])
        return [prefix.encode() for prefix in found], found == [text] and text not in allowed

    def changed(self, before: Mapping[str, Entry], after: Mapping[str, Entry]) -> None:
        """Bind anew where somebody who was let in has another grant, or none."""
        if any(after.get(key) is None or after[key].grant != entry.grant for key, entry in before.items()):
            self._drop()

    @property
    def listening(self) -> bool:
        """Whether anybody has asked for anything since the socket was bound."""
        return self._subscriptions > 0

    def send(self, frames: Sequence[bytes]) -> None:
        """Publish one message to those who may see it; nobody while the socket is bound anew."""
        if self._port is not None:
            self._port.send(frames)

    def statistics(self) -> dict[str, int]:
        """For `status`."""
        so_far = Counter({"received": 0, "sent": 0, "undeliverable": 0})
        so_far.update(self._before)
        if self._port is not None:
            so_far.update(self._port.statistics())
        return {
            **so_far,
            "subscriptions": self._subscriptions,
            "subscriptions_refused": self._refused.count,
            "strays": self._strays.count,
            "rebinds": self._rebinds,
            "limit": self._send_queue_max,
        }

    def close(self) -> None:
        """Close the socket."""
        if self._port is not None:
            self._port.close()
