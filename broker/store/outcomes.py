"""What became of requests that carry a token: kept with their changes, so that a repeat gets the first answer.

A caller whose reply was lost cannot know whether its call took effect. It repeats the request with the same token; a
call whose outcome is kept is answered from here and changes nothing, any other is executed. The outcomes of a turn's
calls are written in the turn's own transaction, one value for each request: the change and the memory of it are there
together or not at all.

An index by time lets the oldest go first, by age and by the size of the whole, a few with every turn.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Final

import msgspec

from backends.failpoints import reach
from snapbroker.errors import Internal, InvalidArgument
from snapbroker.protocol import Outcome, decoder, encode

if TYPE_CHECKING:
    from lmdb import Transaction

    from broker.store.environment import Environment

_PLACE: Final = struct.Struct(">H")
_TIME: Final = struct.Struct(">Q")
_TRIM_EXTRA: Final = 16
"""Old outcomes dropped per turn beyond the number that came in, so that a lowered limit is reached in time."""


class OutcomeRetention(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long the outcomes of requests with a token are kept; whichever limit is reached first drops the oldest."""

    age_max_s: int = 900
    """Longest time after which a repeat gets the first answer, in seconds."""
    size_max_bytes: int = 256 * 1024 * 1024
    """Most space in the database, about 300 bytes a call."""


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """What is stored: when, the digest of the request's calls, and the outcomes of some of them."""

    time: int
    digest: bytes
    outcomes: tuple[Outcome, ...]


_decode = decoder(Kept).decode


def digest_of(calls: object) -> bytes:
    """What tells the calls of one request from those of another."""
    return hashlib.blake2b(encode(calls), digest_size=8).digest()


class Token:
    """The token of one request in its namespace, and the digest of its calls."""

    __slots__ = ("digest", "key")

    def __init__(self, namespace: str, token: bytes, digest: bytes) -> None:
        # The length keeps one token's values from lying between those of another that it begins with.
        self.key = namespace.encode() + b"\0" + bytes((len(token),)) + token
        self.digest = digest


class OutcomeTurn:
    """The outcomes of one transaction."""

    __slots__ = ("_known", "_new", "_outcomes")

    def __init__(self, outcomes: Outcomes) -> None:
        self._outcomes = outcomes
        self._known: dict[bytes, dict[int, Outcome]] = {}
        self._new: dict[bytes, tuple[Token, dict[int, Outcome]]] = {}

    def find(self, txn: Transaction, token: Token, call: int) -> Outcome | None:
        """The outcome of call number `call`; InvalidArgument when the token is another's, Internal when damaged."""
        known = self._known.get(token.key)
        if known is None:
            known = self._known[token.key] = self._outcomes.load(txn, token)
        found = known.get(call)
        if found is None and token.key in self._new:
            first, outcomes = self._new[token.key]
            _check(first.digest, token)
            found = outcomes.get(call)
        return found

    def keep(self, token: Token, outcome: Outcome) -> None:
        """Keep an outcome; written by `finish`."""
        self._new.setdefault(token.key, (token, {}))[1][outcome.call] = outcome

    def finish(self, txn: Transaction, now: int) -> None:
        """Write what is to be kept, one value a request, and drop what is too old."""
        for key, (token, outcomes) in self._new.items():
            place = key + _PLACE.pack(min(outcomes))
            self._outcomes.store(txn, place, Kept(now, token.digest, tuple(outcomes.values())))
        if self._new:
            self._outcomes.trim(txn, now, len(self._new) + _TRIM_EXTRA)


class Outcomes:
    """The kept outcomes of one snapshotter; used by its writer alone."""

    def __init__(self, environment: Environment, retention: OutcomeRetention) -> None:
        self._db = environment.outcomes
        self._ages = environment.outcome_ages
        self._page_bytes = environment.page_bytes
        self._retention = retention

    def begin(self) -> OutcomeTurn:
        """The outcomes of a transaction about to be written."""
        return OutcomeTurn(self)

    def load(self, txn: Transaction, token: Token) -> dict[int, Outcome]:
        """The kept outcomes of a request by the number of their call; Internal where they are damaged."""
        found: dict[int, Outcome] = {}
        with txn.cursor(db=self._db) as cursor:
            more = cursor.set_range(token.key)
            while more and bytes(cursor.key()).startswith(token.key):
                kept = _decoded(cursor.value())
                _check(kept.digest, token)
                found.update((outcome.call, outcome) for outcome in kept.outcomes)
                more = cursor.next()
        return found

    def store(self, txn: Transaction, place: bytes, kept: Kept) -> None:
        """Write one value and its place in the order of time."""
        txn.put(place, encode(kept), db=self._db)
        reach("outcomes.stored")
        txn.put(_age_key(kept.time, place), place, db=self._ages)

    def trim(self, txn: Transaction, now: int, drop_max: int) -> None:
        """Drop up to `drop_max` values over the limits, the oldest first."""
        too_old = now - self._retention.age_max_s * 1_000_000_000
        room = self._retention.size_max_bytes - self._size(txn)
        with txn.cursor(db=self._ages) as cursor:
            found = cursor.first()
            while found and drop_max:
                key, place = (bytes(part) for part in cursor.item())
                if room >= 0 and _TIME.unpack_from(key)[0] >= too_old:
                    break
                value = txn.pop(place, db=self._db)
                reach("outcomes.trimmed")
                room += len(value or b"") + len(key) + 2 * len(place)
                found = cursor.delete()
                drop_max -= 1

    def _size(self, txn: Transaction) -> int:
        pages = 0
        for database in (self._db, self._ages):
            figures = txn.stat(db=database)
            pages += figures["branch_pages"] + figures["leaf_pages"] + figures["overflow_pages"]
        return pages * self._page_bytes

    def statistics(self, txn: Transaction) -> dict[str, int]:
        """For `status`."""
        entries, size = txn.stat(db=self._ages)["entries"], self._size(txn)
        return {"kept": entries, "bytes": size, "limit": self._retention.size_max_bytes}


def _decoded(value: bytes | memoryview) -> Kept:
    try:
        return _decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Internal(
            f"the outcome kept with this token is damaged, so it is unknown here: look with stat: {error}"
        ) from error


def _check(digest: bytes, token: Token) -> None:
    if digest != token.digest:
        raise InvalidArgument("this token was used for other calls: a repeat has the same calls in the same order")


def _age_key(time: int, place: bytes) -> bytes:
    return _TIME.pack(time) + hashlib.blake2b(place, digest_size=8).digest()
