"""The router: moves requests from clients to actors and parts of replies back, and never reads a body.

It knows which requests are open at which actor. That bounds an actor's mailbox truthfully (a request beyond the
limit is refused at once, with the time after which it may succeed), keeps one client's flood from the others
(`broker.actor.fairness`), and lets every caller of an actor that died be told so in the same moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import zmq

from broker.access import WHOLE, Denials, Grant, decode_grant
from broker.actor import fairness, mailbox
from broker.actor.fairness import Admission
from broker.gate import Gate, is_generated, told_user
from broker.logs import get_logger
from broker.sockets import FramePort, Port
from snapbroker.errors import (
    BrokerError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unavailable,
    Unimplemented,
)
from snapbroker.protocol import (
    BODY_BYTES_MAX,
    DONE,
    REQUEST_ID_BYTES_MAX,
    REQUEST_VERSION,
    Reply,
    decoder,
    encode,
    fault,
)

if TYPE_CHECKING:
    from broker.actor.supervisor import Actor
    from broker.keys import Entry

log = get_logger()


REMOTE: Final = b"\0remote:"
"""Before the identity of who came in by the remote socket: no identity of the local one can begin so, as those that
libzmq makes have five bytes and those that clients choose do not begin with a zero."""

_decode_map = decoder(dict[str, int]).decode


class Limits(fairness.Limits, Protocol):
    """What of the configuration is needed here."""

    @property
    def send_queue_max(self) -> int: ...  # noqa: D102


class Lane:
    """One actor, and what is open at it."""

    def __init__(self, actor: Actor, limits: Limits) -> None:
        self.actor = actor
        self.admission = Admission(actor.name, limits)


class Router:
    """The ROUTER socket of the clients, and the lines of the actors."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        limits: Limits,
        own: Callable[[bytes, Grant | None, bool], bytes],
        publish: Callable[[str, dict[str, int], Sequence[bytes]], None],
        local: bytes = WHOLE,
    ) -> None:
        self._limits = limits
        self._own = own
        self._publish = publish
        self._lanes: dict[bytes, Lane] = {}
        self._local = local
        self._local_grant = decode_grant(local) if local else None
        self._dropped = 0
        self._stopping = False
        self._denials = Denials("a request was refused")
        self._gate: Gate | None = None
        front = self._socket(context)
        front.bind(endpoint)
        self.endpoint = front.getsockopt_string(zmq.LAST_ENDPOINT)
        self.front = Port(front, self._from_client)
        self.remote: FramePort | None = None
        self.remote_endpoint = ""

    def _socket(self, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
        front = context.socket(zmq.ROUTER)
        front.setsockopt(zmq.ROUTER_MANDATORY, 1)
        front.setsockopt(zmq.SNDHWM, self._limits.send_queue_max)
        front.setsockopt(zmq.RCVHWM, self._limits.send_queue_max)
        front.setsockopt(zmq.MAXMSGSIZE, BODY_BYTES_MAX + 1)
        return front

    def open_remote(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, gate: Gate) -> None:
        """Serve those as well whom the gate lets in."""
        front = self._socket(context)
        gate.guard(front, endpoint)
        front.bind(endpoint)
        self._gate = gate
        self.remote_endpoint = front.getsockopt_string(zmq.LAST_ENDPOINT)
        self.remote = FramePort(front, told_user(self._from_remote))

    def add(self, actor: Actor) -> None:
        """Serve an actor's name."""
        self._lanes[actor.name.encode()] = Lane(actor, self._limits)

    # Clients.

    def _from_client(self, frames: list[bytes]) -> None:
        if len(frames) != 5 or not 0 < len(frames[2]) <= REQUEST_ID_BYTES_MAX:
            self._dropped += 1
            return
        client, version, request_id, target, body = frames
        try:
            self._route(client, version, request_id, target, body, self._local, self._local_grant)
        except BrokerError as error:
            self._answer(client, request_id, error)

    def _from_remote(self, key: str, frames: list[bytes]) -> None:
        if self._gate is None or len(frames) != 5 or not 0 < len(frames[2]) <= REQUEST_ID_BYTES_MAX:
            self._dropped += 1
            return
        identity, version, request_id, target, body = frames
        client = REMOTE + identity
        try:
            entry = self._gate.entry(key)
            if not is_generated(identity):
                # Replies go to an identity: whoever chooses that of somebody who left would get theirs.
                raise InvalidArgument("a remote client must not choose its routing id: leave ZMQ_ROUTING_ID unset")
            self._route(client, version, request_id, target, body, entry.frame, entry.grant)
        except BrokerError as error:
            self._answer(client, request_id, error)

    def _route(
        self,
        client: bytes,
        version: bytes,
        request_id: bytes,
        target: bytes,
        body: bytes,
        frame: bytes,
        grant: Grant | None,
    ) -> None:
        if version != REQUEST_VERSION:
            raise Unimplemented(f"this broker speaks {REQUEST_VERSION!r}, not {version[:16]!r}")
        if self._stopping:
            raise Unavailable("the broker is stopping, repeat in a moment", {"retry_after_ms": 1000})
        if len(body) > BODY_BYTES_MAX:
            raise InvalidArgument(f"a body of {len(body)} bytes is longer than {BODY_BYTES_MAX}")
        if not target:
            self._send(client, request_id, DONE, self._own(body, grant, client.startswith(REMOTE)))
            return
        if grant is not None and not grant.reaches(target.decode(errors="replace")):
            self._denials.add(client=grant.client, target=target[:64].decode(errors="replace"))
            raise PermissionDenied(
                f"{grant.client!r} may not use snapshotter {target[:64].decode(errors='replace')!r}",
                {"snapshotters": list(grant.snapshotters or ())},
            )
        lane = self._lanes.get(target)
        if lane is None:
            names = sorted(name.decode() for name in self._lanes if grant is None or grant.reaches(name.decode()))
            raise NotFound(
                f"no snapshotter {target[:64].decode(errors='replace')!r}; there are: {', '.join(names) or 'none'}",
                {"snapshotters": names},
            )
        if lane.actor.state != "ready":
            raise Unavailable(
                f"snapshotter {lane.actor.name!r} is {lane.actor.state}, repeat in a moment",
                {"retry_after_ms": max(lane.actor.retry_after_ms, 100)},
            )
        self._admit(lane, client, request_id, body, frame)

    def _admit(self, lane: Lane, client: bytes, request_id: bytes, body: bytes, grant: bytes) -> None:
        link = lane.actor.link
        if link is None or not link.open:
            raise Unavailable(f"snapshotter {lane.actor.name!r} is not connected, repeat in a moment")
        arrival = time.monotonic_ns()
        frames = (mailbox.REQUEST, client, request_id, mailbox.U64.pack(arrival), grant, body)
        if lane.admission.admit(client, request_id, len(body), frames, arrival):
            link.send(frames)

    def _answer(self, client: bytes, request_id: bytes, error: BrokerError) -> None:
        body = encode(Reply(error=fault(error)))
        self._send(client, request_id, DONE, body)

    def _send(self, client: bytes, request_id: bytes, status: bytes, body: bytes) -> None:
        """One part of a reply, by the socket that the request came in by."""
        if client.startswith(REMOTE) and self.remote is not None:
            self.remote.send((client[len(REMOTE) :], REQUEST_VERSION, request_id, status, body))
        else:
            self.front.send((client, REQUEST_VERSION, request_id, status, body))

    def regrant(self, before: Mapping[str, Entry], after: Mapping[str, Entry]) -> None:
        """Tell the actors whose grant is another one, so that no stream outlives it."""
        for key, entry in before.items():
            found = after.get(key)
            frame = found.frame if found is not None else b""
            if frame == entry.frame:
                continue
            for lane in self._lanes.values():
                if lane.actor.link is not None:
                    lane.actor.link.send((mailbox.GRANT, key.encode(), frame))

    # Actors.

    def from_actor(self, actor: Actor, frames: list[bytes]) -> None:
        """Take a message of an actor."""
        kind = frames[0]
        if kind == mailbox.REPLY:
            _, client, request_id, status, body = frames
            if status == DONE:
                admission = self._lanes[actor.name.encode()].admission
                self._hand_over(actor, admission.done(client, request_id, time.monotonic_ns()))
            self._send(client, request_id, status, body)
        elif kind == mailbox.EVENTS:
            self._publish(actor.name, _decode_map(frames[1]), frames[2:])
        elif kind == mailbox.ASIDE:
            self._hand_over(actor, self._lanes[actor.name.encode()].admission.set_aside(frames[1], frames[2]))
        elif kind == mailbox.REPORT:
            actor.report(frames[1], _decode_map(frames[2]))
        elif kind == mailbox.READY:
            actor.became_ready(frames[1])
            if self._stopping:
                _tell_to_stop(actor)

    @staticmethod
    def _hand_over(actor: Actor, requests: Iterable[fairness.Frames]) -> None:
        """Send what has waited for its turn; what the link does not take, `gone` answers."""
        for frames in requests:
            if actor.link is not None:
                actor.link.send(frames)

    def gone(self, actor: Actor) -> None:
        """The actor died: its last words are passed on, then everybody who still waits for it is told."""
        while actor.link is not None and actor.link.drain():
            continue
        handed, kept = self._lanes[actor.name.encode()].admission.clear()
        details = {"retry_after_ms": max(actor.retry_after_ms, 100)}
        error = Unavailable(
            f"snapshotter {actor.name!r} died with this call in its hands; whether it took effect is unknown: "
            "stat before you repeat",
            {**details, "in_doubt": True},
        )
        for client, request_id in handed:
            self._answer(client, request_id, error)
        error = Unavailable(
            f"snapshotter {actor.name!r} died before it got this call; nothing was changed, repeat in a moment", details
        )
        for client, request_id in kept:
            self._answer(client, request_id, error)

    # Stopping.

    def stop(self) -> None:
        """Refuse new requests and tell the actors to finish what they have."""
        self._stopping = True
        for lane in self._lanes.values():
            if lane.actor.state == "ready":
                _tell_to_stop(lane.actor)

    def statistics(self) -> dict[str, dict[str, int]]:
        """For `status`."""
        queues = {
            "router": {
                **self.front.statistics(),
                "dropped": self._dropped,
                "denied": self._denials.count,
                "limit": self._limits.send_queue_max,
            }
        }
        if self.remote is not None:
            queues["router.remote"] = {**self.remote.statistics(), "limit": self._limits.send_queue_max}
        for lane in self._lanes.values():
            queues[f"mailbox.{lane.actor.name}"] = {
                **lane.admission.statistics(),
                "unsent": lane.actor.link.unsent_bytes if lane.actor.link else 0,
            }
        return queues


def _tell_to_stop(actor: Actor) -> None:
    if actor.link is not None:
        actor.link.send((mailbox.STOP,))
