"""Frames of requests at the router, local and remote, and messages of an actor: one answer each, and true books.

What is open is held in books of the target's own, from what went to the actor and to the clients: a request is refused,
handed on, or kept until its client's window has room; whatever the order, nothing is lost, answered twice or handed on
twice, and at the end of an actor what it had is in doubt, and what was kept is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Final

import zmq

from broker.access import WHOLE, Grant, Role, encode_grant
from broker.actor import mailbox
from broker.config import RouterLimits
from broker.keys import Entry
from broker.router import REMOTE, Router
from snapbroker.errors import ERRORS, Unauthenticated
from snapbroker.protocol import BODY_BYTES_MAX, DONE, MORE, REQUEST_ID_BYTES_MAX, REQUEST_VERSION, decode_reply, encode
from tests.fuzz import vectors
from tests.fuzz.draws import Draws

_NAME: Final = "overlayfs"
_OWN: Final = encode({})
_LIMITS: Final = RouterLimits(
    open_requests_max=8,
    open_bytes_max=1200,
    client_requests_max=5,
    client_bytes_max=700,
    window_bytes=400,
    window_shared_bytes=200,
)
_STATES: Final = ("ready", "ready", "ready", "starting", "unavailable", "stopped")
_GENERATED: Final = b"\0\0\0\0"
_HANDED: Final = "handed"
_KEPT: Final = "kept"
Key = tuple[bytes, bytes]


def _entry(name: str, snapshotters: tuple[str, ...] | None) -> Entry:
    grant = Grant(client=name, role=Role.READ, key=name, namespaces=("n",), snapshotters=snapshotters)
    return Entry(name, grant, encode_grant(grant))


_ENTRIES: Final = {each.name: each for each in (_entry("farm", (_NAME,)), _entry("all", None), _entry("none", ()))}
_KEYS: Final = (*_ENTRIES, "revoked", "")


class _Line:
    """The router's end of the line to an actor that only notes what it is told."""

    unsent_bytes = 0

    def __init__(self) -> None:
        self.told: list[list[bytes]] = []
        self.open = True

    def send(self, frames: Sequence[bytes]) -> bool:
        assert self.open, "nothing is sent to an actor that is gone"
        self.told.append(list(frames))
        return True

    def drain(self) -> bool:
        return False


class _Actor:
    """What the router knows of an actor."""

    name = _NAME
    retry_after_ms = 0

    def __init__(self) -> None:
        self.state = "ready"
        self.link = _Line()

    def report(self, body: bytes, vital: dict[str, int]) -> None:
        """Its figures."""

    def became_ready(self, body: bytes) -> None:
        """It serves."""


class _Front:
    """A socket of the clients: whose identities get `prefix`."""

    def __init__(self, prefix: bytes, sent: list[Sequence[bytes]]) -> None:
        self._prefix = prefix
        self._sent = sent

    def send(self, frames: Sequence[bytes]) -> None:
        self._sent.append((self._prefix + frames[0], *frames[1:]))

    def statistics(self) -> dict[str, int]:
        return {}


class _Gate:
    """Who is known."""

    def entry(self, key: str) -> Entry:
        if key not in _ENTRIES:
            raise Unauthenticated("not known")
        return _ENTRIES[key]


_published: list[Any] = []


@cache
def _context() -> zmq.Context[zmq.Socket[bytes]]:
    return zmq.Context()


@cache
def _router() -> Router:
    """A router whose socket is closed: frames are given to it, and taken from it, where the socket would."""
    router = Router(_context(), "inproc://fuzz", _LIMITS, lambda *_: _OWN, lambda *event: _published.append(event))
    router.front.close()
    router._gate = _Gate()  # type: ignore[assignment]
    return router


class _Scene:
    """A router, an actor, and the books of what is open."""

    def __init__(self) -> None:
        self.router = _router()
        self.actor = _Actor()
        self.sent: list[Sequence[bytes]] = []
        self.router.front = _Front(b"", self.sent)  # type: ignore[assignment]
        self.router.remote = _Front(REMOTE, self.sent)  # type: ignore[assignment]
        self.router.add(self.actor)  # type: ignore[arg-type]
        self.books: dict[Key, str] = {}
        self.sizes: dict[Key, int] = {}
        self.handed = 0
        self.served = 0

    def figures(self) -> dict[str, int]:
        """Of the actor's mailbox."""
        return self.router.statistics()[f"mailbox.{_NAME}"]

    def ask(self, draws: Draws) -> None:
        """A request of a client."""
        self.actor.state = draws.choice(_STATES) if draws.chance(4) else "ready"
        frames = draws.frames() if draws.chance(4) else _request(draws)
        key, remote = draws.choice(_KEYS), draws.chance(3)
        if remote:
            if len(frames) == 5 and not draws.chance(4):
                frames[0] = _GENERATED + frames[0][:1]
            self.router._from_remote(key, frames)
        else:
            self.router._from_client(frames)
        if len(frames) != 5 or not 0 < len(frames[2]) <= REQUEST_ID_BYTES_MAX:
            assert not self.actor.link.told
            assert not self.sent
            return
        client = REMOTE + frames[0] if remote else frames[0]
        if self.sent:
            self._answered(client, frames, local=not remote)
            return
        entry = _ENTRIES.get(key) if remote else None
        assert not remote or entry is not None, "a request of a key that nobody knows was taken"
        assert not remote or len(frames[0]) == len(_GENERATED) + 1, "a remote client chose its routing id"
        self._opened(client, frames, entry)

    def _answered(self, client: bytes, frames: list[bytes], *, local: bool) -> None:
        assert not self.actor.link.told, "a request was handed on and answered"
        ((to, spoken, request_id, status, answer),) = self.sent
        assert (to, spoken, request_id, status) == (client, REQUEST_VERSION, frames[2], DONE)
        error = decode_reply(answer).error
        assert error is None or error.code in ERRORS
        own = frames[1] == REQUEST_VERSION and not frames[3]
        assert error is not None or own
        assert error is None or not own or not local

    def _opened(self, client: bytes, frames: list[bytes], entry: Entry | None) -> None:
        _, version, request_id, target, body = frames
        assert (version, target, self.actor.state) == (REQUEST_VERSION, _NAME.encode(), "ready")
        assert self.actor.link.open
        assert entry is None or entry.grant.reaches(_NAME)
        assert len(body) <= BODY_BYTES_MAX
        key = (client, request_id)
        assert key not in self.books, "an id is open twice"
        self.books[key], self.sizes[key] = _KEPT, len(body)
        for kind, *_, arrival, grant, handed in self.actor.link.told:
            assert (kind, len(arrival), grant, handed) == (mailbox.REQUEST, 8, entry.frame if entry else WHOLE, body)
        self._note_handed(client)
        assert self.books[key] == _HANDED or _HANDED in self._states_of(client), "nobody waits behind nothing"

    def _note_handed(self, client: bytes) -> None:
        """What the actor was told: requests of this client that were kept, in their order."""
        told = [(frames[1], frames[2]) for frames in self.actor.link.told]
        kept = [key for key, state in self.books.items() if state == _KEPT and key[0] == client]
        assert told == kept[: len(told)], "requests of a client go in their order, each once"
        for key in told:
            self.books[key] = _HANDED

    def _states_of(self, client: bytes) -> set[str]:
        return {state for key, state in self.books.items() if key[0] == client}

    def act(self, draws: Draws) -> None:
        """A message of the actor; one that is none of its own is an exception here, which the line logs."""
        kind = draws.number(6)
        if kind == 4:
            self.end(again=not draws.chance(4))
        elif kind in (0, 5):
            self._reply(draws) if kind == 0 else self._aside(draws)
        else:
            if kind == 1:
                frames = [mailbox.EVENTS, draws.torn(encode({"a": 1})), b"a", bytes(8), b""]
            elif kind == 2:
                frames = [draws.choice((mailbox.REPORT, mailbox.READY)), draws.blob(), draws.torn(encode({"loop": 1}))]
            else:
                frames = [b"?", *draws.frames()]
            try:
                self.router.from_actor(self.actor, frames)  # type: ignore[arg-type]
            except Exception:
                assert kind in (1, 2), frames
            assert not self.sent
            assert not self.actor.link.told

    def _drawn(self, draws: Draws) -> Key:
        """A request in the actor's hands, most of the time; never one that it was not given."""
        handed = [key for key, state in self.books.items() if state == _HANDED]
        return (b"stranger", b"id") if not handed or draws.chance(8) else draws.choice(handed)

    def _reply(self, draws: Draws) -> None:
        key, status, body = self._drawn(draws), draws.choice((DONE, MORE)), draws.blob()
        self.router.from_actor(self.actor, [mailbox.REPLY, *key, status, body])  # type: ignore[arg-type]
        assert [tuple(frames) for frames in self.sent] == [(key[0], REQUEST_VERSION, key[1], status, body)]
        if status == DONE and self.books.pop(key, None):
            self.served += 1
        self._note_handed(key[0])
        assert self._states_of(key[0]) != {_KEPT}, "somebody waits behind nothing"

    def _aside(self, draws: Draws) -> None:
        key = self._drawn(draws)
        self.router.from_actor(self.actor, [mailbox.ASIDE, *key])  # type: ignore[arg-type]
        assert not self.sent
        self._note_handed(key[0])

    def end(self, *, again: bool) -> None:
        """The actor dies: everybody who waits is told once, and whether there is a doubt."""
        self.actor.link.open = False
        self.router.gone(self.actor)  # type: ignore[arg-type]
        answers = {(frames[0], frames[2]): decode_reply(frames[4]).error for frames in self.sent}
        assert len(answers) == len(self.sent)
        assert all(frames[3] == DONE for frames in self.sent)
        assert answers.keys() == self.books.keys(), "every open request is answered"
        for key, error in answers.items():
            assert error is not None
            assert error.code == "unavailable"
            assert bool(error.details.get("in_doubt")) == (self.books[key] == _HANDED)
        self.books.clear()
        self.actor.link.open = again

    def check(self) -> None:
        """The router's figures are those of the books, and within the limits."""
        figures = self.figures()
        sizes = [self.sizes[key] for key in self.books]
        assert figures["open"] == len(self.books) <= _LIMITS.open_requests_max
        assert figures["bytes"] == sum(sizes) <= _LIMITS.open_bytes_max
        assert figures["waiting"] == sum(state == _KEPT for state in self.books.values())
        assert figures["served"] == self.served
        for client in {key[0] for key in self.books}:
            own = [self.sizes[key] for key in self.books if key[0] == client]
            assert len(own) <= _LIMITS.client_requests_max
            assert sum(own) <= _LIMITS.client_bytes_max


def one(data: bytes) -> None:
    """Some messages of clients and of the actor, and its end."""
    draws, scene = Draws(data), _Scene()
    while draws.left:
        if draws.chance(4):
            scene.act(draws)
        else:
            scene.ask(draws)
        scene.check()
        scene.sent.clear()
        scene.actor.link.told.clear()
    scene.end(again=False)
    scene.check()


def close() -> None:
    """Let go of the sockets."""
    _context().destroy(linger=0)


def seeds() -> Iterator[bytes]:
    """The golden requests, local and remote; and requests beyond a window, each kind of message of an actor after."""
    for frames in vectors.frames("client-to-broker"):
        yield b"\x00\x00\x03" + vectors.packed([b"client", *frames])
        yield b"\x00\x00\x03" + vectors.packed([b"client", *frames]) + b"\x00\x02\x00"
    for kind in range(6):
        asked = b"".join(_asked(number, remote=number % 2) for number in range(6))
        yield asked + bytes((3, kind, 0, 0, 0, 0)) * 3
        yield asked + bytes((3, kind, 0, 1, 0, 2, 1, 2)) + asked


def _asked(number: int, *, remote: int) -> bytes:
    """The choices of a request in order: as `ask` and `_request` make them."""
    return bytes((0, 0, 0, 0, 0, 0, number, 0, 0, 40)) + bytes(40) + bytes((0, 2 * remote, *(0,) * remote))


def _request(draws: Draws) -> list[bytes]:
    version = draws.blob() if draws.chance(16) else REQUEST_VERSION
    client, request_id = bytes((1 + draws.number(3),)), bytes((draws.number(6),)) * (1 + draws.number(2))
    target = draws.choice((_NAME.encode(), _NAME.encode(), _NAME.encode(), b"", b"none", b"\xff"))
    return [client, version, request_id, target, draws.blob()]
