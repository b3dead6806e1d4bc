"""Who may do what: roles, grants and topics of docs/rfc/3-access.md, as one table and three questions.

A grant travels with each request as a frame of its own, so that the router asks nothing of a body and the actor
nothing of a key. The empty frame is a whole grant of the role admin: what a local client has, and it costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any, Final, get_args

import msgspec

from broker.logs import get_logger
from snapbroker.errors import BrokerError, PermissionDenied
from snapbroker.protocol import Audit, Call, Repair, decoder, encode

log = get_logger()


class Role(IntEnum):
    """What a client may do at most; each includes those before it."""

    READ = 1
    WRITE = 2
    ADMIN = 3


LEAST_ROLE: Final[Mapping[str, Role]] = {
    "stat": Role.READ,
    "mounts": Role.READ,
    "usage": Role.READ,
    "walk": Role.READ,
    "events": Role.READ,
    "status": Role.READ,
    "cancel": Role.READ,
    "why": Role.READ,
    "prepare": Role.WRITE,
    "view": Role.WRITE,
    "commit": Role.WRITE,
    "remove": Role.WRITE,
    "update": Role.WRITE,
    "cleanup": Role.WRITE,
    "audit": Role.ADMIN,
    "repair": Role.ADMIN,
}
"""The least role of each verb; one that is not here takes an admin."""

ROLES: Final = tuple(role.name.lower() for role in Role)
ENTRIES_MAX: Final = 64
"""Most namespaces, and most snapshotters, of one grant: all are held against every subscription."""
DENIALS_LOGGED_PER_MINUTE: Final = 30
"""Lines in the log for what was refused: a client that knocks without end must not fill the disk."""


def least_role(verb: str) -> Role:
    """The least role that may call `verb`."""
    return LEAST_ROLE.get(verb, Role.ADMIN)


def _verb_of(call: type[Any]) -> str:
    return str(call.__struct_config__.tag)


_VERB: Final = {call: _verb_of(call) for call in get_args(Call)}
_LEAST: Final = {call: least_role(verb) for call, verb in _VERB.items()}
_SPANNING: Final = frozenset((Audit, Repair))
"""Calls that concern every namespace of a snapshotter, whatever the request names."""


class Grant(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A client's role, namespaces and snapshotters; None is all of them. `key` is its public key in Z85."""

    client: str
    role: Role
    key: str = ""
    namespaces: tuple[str, ...] | None = None
    snapshotters: tuple[str, ...] | None = None

    @property
    def whole(self) -> bool:
        """Whether it has all namespaces and all snapshotters."""
        return self.namespaces is None and self.snapshotters is None

    def reaches(self, snapshotter: str) -> bool:
        """Whether the snapshotter is in it."""
        return self.snapshotters is None or snapshotter in self.snapshotters

    def refusal(self, call: Any, namespace: str) -> BrokerError | None:
        """Why this call in this namespace may not be; None where it may."""
        needed = _LEAST[type(call)]
        if self.role < needed:
            return PermissionDenied(
                f"{_VERB[type(call)]} takes the role {needed.name.lower()!r}, and {self.client!r} has "
                f"{self.role.name.lower()!r}: ask whoever keeps the broker's keys",
                {"needed": needed.name.lower(), "role": self.role.name.lower()},
            )
        if self.namespaces is not None and type(call) in _SPANNING:
            return PermissionDenied(
                f"{_VERB[type(call)]} is of all namespaces, and {self.client!r} has some: ask who has all of them"
            )
        if self.namespaces is not None and namespace not in self.namespaces:
            return PermissionDenied(
                f"{self.client!r} may not use namespace {namespace!r}: name one of its own, by argument or "
                "SNAPBROKER_NAMESPACE",
                {"namespace": namespace},
            )
        return None

    def prefixes(self, snapshotters: Iterable[str]) -> tuple[str, ...]:
        """The prefixes of the topics of its events, of these snapshotters."""
        if self.whole:
            return ("",)
        names = [name for name in snapshotters if self.reaches(name)]
        if self.namespaces is None:
            return tuple(f"{name}/" for name in names)
        return tuple(f"{name}/{namespace}/" for name in names for namespace in self.namespaces)

    def narrowed(self, topics: Iterable[str], snapshotter: str) -> tuple[str, ...]:
        """What an `events` call with these topics selects; PermissionDenied for one that selects nothing."""
        own = self.prefixes((snapshotter,))
        selected: list[str] = []
        for topic in topics:
            narrow = narrowed(topic, own)
            if not narrow:
                raise PermissionDenied(
                    f"{self.client!r} sees no events on {topic[:200]!r}: name topics of its own namespaces",
                    {"topic": topic[:200]},
                )
            selected += narrow
        return tuple(dict.fromkeys(selected))


def narrowed(topic: str, prefixes: Sequence[str]) -> list[str]:
    """The longer one of the topic and each prefix, where one begins with the other."""
    if any(topic.startswith(prefix) for prefix in prefixes):
        return [topic]
    return [prefix for prefix in prefixes if prefix.startswith(topic)]


WHOLE: Final = b""
"""The encoded grant of who may do everything."""

_decode = decoder(Grant).decode


def encode_grant(grant: Grant) -> bytes:
    """The grant as a frame."""
    return WHOLE if grant.whole and grant.role is Role.ADMIN and not grant.key else encode(grant)


@lru_cache(maxsize=1024)
def decode_grant(frame: bytes) -> Grant:
    """The grant in a frame that is not empty."""
    return _decode(frame)


def local_grant(role: str) -> bytes:
    """What everybody has who can open a local socket, as a frame."""
    return encode_grant(Grant(client="local", role=Role[role.upper()]))


class Denials:
    """What was refused: counted all, and logged at a bounded rate."""

    def __init__(self, event: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._event = event
        self._clock = clock
        self._minute = clock()
        self._logged = 0
        self._left_out = 0
        self.count = 0

    def add(self, **what: object) -> None:
        """Count one, and log it if the minute's lines are not used up."""
        self.count += 1
        now = self._clock()
        if now - self._minute >= 60:
            if self._left_out:
                log.warning(self._event, left_out=self._left_out)
            self._minute, self._logged, self._left_out = now, 0, 0
        if self._logged < DENIALS_LOGGED_PER_MINUTE:
            self._logged += 1
            log.warning(self._event, **what)
        else:
            self._left_out += 1
