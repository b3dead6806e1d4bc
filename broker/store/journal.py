"""The journal: every change of an actor, numbered from 1 without a gap, written in the change's own transaction.

Each event also carries the sequence of the event before it on its topic, so that a subscriber of any topic sees
a gap at once; the newest sequence of each topic is kept beside the events and cached here by the one writer.
The oldest events are dropped by count and by age, a few with every turn, never the newest.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import msgspec

from backends.failpoints import reach
from snapbroker.contract import topic
from snapbroker.errors import Internal, OutOfRange

if TYPE_CHECKING:
    from lmdb import Transaction

    from broker.store.environment import Environment

_U64: Final = struct.Struct(">Q")
TOPICS_CACHED_MAX: Final = 65_536
"""Topics whose newest sequence is kept in memory; the database knows the others."""
_TRIM_EXTRA: Final = 64
"""Old events dropped per turn beyond the number that came in, so that a lowered limit is reached in time."""
_LONG_AGO: Final = -(1 << 63)

_encode = msgspec.msgpack.Encoder().encode


class Retention(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long events are kept; whichever limit is reached first drops the oldest."""

    events_max: int = 1_000_000
    """Most events in the journal, about 300 bytes each."""
    age_max_s: int = 7 * 24 * 3600
    """Oldest event, in seconds."""


NO_INFO: Final = msgspec.Raw(b"")
"""What `Entry.info` is where there is none; left out by identity, so it must be this very object."""


class Entry(msgspec.Struct, omit_defaults=True, gc=False):
    """An Event as it is written: the same fields as `snapbroker.contract.Event`, the Info still encoded."""

    sequence: int
    previous: int
    time: int
    snapshotter: str
    namespace: str
    verb: str
    key: str = ""
    info: msgspec.Raw = NO_INFO


Published = tuple[str, int, bytes]
"""Topic, sequence and body of an event that is to be published once its transaction is committed."""


class Turn:
    """The events of one transaction: numbered as they come, made the journal's state by `Journal.settle`."""

    __slots__ = ("_journal", "entries", "oldest", "sequence", "topics")

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.sequence = journal.newest
        self.oldest = journal.oldest
        self.topics: dict[str, int] = {}
        self.entries: list[Published] = []

    @property
    def next(self) -> int:
        """The sequence of the next event."""
        return self.sequence + 1

    def append(self, txn: Transaction, now: int, namespace: str, verb: str, key: str, info: bytes = b"") -> None:
        """Write one event."""
        journal = self._journal
        name = topic(journal.snapshotter, namespace, verb)
        sequence = self.sequence + 1
        previous = self.topics.get(name)
        if previous is None:
            previous = journal.newest_of(txn, name)
        raw = msgspec.Raw(info) if info else NO_INFO
        body = _encode(Entry(sequence, previous, now, journal.snapshotter, namespace, verb, key, raw))
        txn.put(_U64.pack(sequence), body, db=journal.db, append=True)
        reach("journal.appended")
        self.sequence = sequence
        self.topics[name] = sequence
        self.entries.append((name, sequence, body))

    def mark(self) -> tuple[int, int, dict[str, int]]:
        """Where the turn is, for `rewind`."""
        return self.sequence, len(self.entries), dict(self.topics)

    def rewind(self, mark: tuple[int, int, dict[str, int]]) -> None:
        """Forget the events since `mark`, whose child transaction was dropped."""
        self.sequence, count, self.topics = mark
        del self.entries[count:]

    def finish(self, txn: Transaction, now: int) -> None:
        """Write the topics' newest sequences and drop what is too old."""
        for name, sequence in self.topics.items():
            txn.put(name.encode(), _U64.pack(sequence), db=self._journal.topics_db)
        if self.entries:
            self.oldest = self._journal.trim(txn, now, self.sequence, len(self.entries) + _TRIM_EXTRA)


class Journal:
    """The journal of one snapshotter."""

    def __init__(self, environment: Environment, snapshotter: str, retention: Retention) -> None:
        self.db = environment.journal
        self.topics_db = environment.topics
        self.snapshotter = snapshotter
        self._retention = retention
        self._topics: dict[str, int] = {}
        with environment.read() as txn, txn.cursor(db=self.db) as cursor:
            self.newest = int(_U64.unpack(cursor.key())[0]) if cursor.last() else 0
            self.oldest = int(_U64.unpack(cursor.key())[0]) if cursor.first() else 1

    def begin(self) -> Turn:
        """The events of a transaction about to be written."""
        return Turn(self)

    def newest_of(self, txn: Transaction, name: str) -> int:
        """The newest sequence on a topic, 0 before its first event."""
        known = self._topics.get(name)
        if known is None:
            value = txn.get(name.encode(), db=self.topics_db)
            known = int(_U64.unpack(value)[0]) if value else 0
        return known

    def settle(self, turn: Turn) -> None:
        """The turn's transaction is committed: its state is the journal's."""
        self.newest = turn.sequence
        self.oldest = turn.oldest
        if len(self._topics) > TOPICS_CACHED_MAX:
            self._topics.clear()
        self._topics.update(turn.topics)

    def trim(self, txn: Transaction, now: int, newest: int, drop_max: int) -> int:
        """Drop up to `drop_max` events over the limits; the new oldest sequence."""
        oldest = self.oldest
        too_old = now - self._retention.age_max_s * 1_000_000_000
        with txn.cursor(db=self.db) as cursor:
            found = cursor.first()
            while found and drop_max:
                sequence = int(_U64.unpack(cursor.key())[0])
                if sequence == newest:
                    break
                if newest - sequence < self._retention.events_max and _time_of(cursor.value()) >= too_old:
                    break
                found = cursor.delete()
                oldest = sequence + 1
                drop_max -= 1
                reach("journal.trimmed")
        return oldest

    def check(self, since: int, oldest: int, newest: int) -> None:
        """Raise OutOfRange unless every event above `since` is kept."""
        if since + 1 < oldest:
            raise OutOfRange(
                f"events above {since} are no longer kept, the oldest is {oldest}: walk, then follow from the "
                "walk's sequence",
                {"oldest": oldest, "newest": newest},
            )
        if since > newest:
            raise OutOfRange(
                f"sequence {since} has not happened, the newest is {newest}: walk again",
                {"oldest": oldest, "newest": newest},
            )

    def bounds(self, txn: Transaction) -> tuple[int, int]:
        """Oldest and newest sequence as this transaction sees them; (1, 0) in an empty journal."""
        with txn.cursor(db=self.db) as cursor:
            if not cursor.last():
                return 1, 0
            newest = int(_U64.unpack(cursor.key())[0])
            cursor.first()
            return int(_U64.unpack(cursor.key())[0]), newest

    def newest_in(self, txn: Transaction) -> int:
        """The newest sequence as this transaction sees it."""
        with txn.cursor(db=self.db) as cursor:
            return int(_U64.unpack(cursor.key())[0]) if cursor.last() else 0

    def page(
        self, txn: Transaction, since: int, topics: tuple[str, ...], count: int, scan_max: int, room: int
    ) -> tuple[list[bytes], int]:
        """Up to `count` encoded events above `since` on the topic prefixes, looking at `scan_max` at most.

        The page ends with the event that makes it larger than `room` bytes.

        Also the sequence up to which the journal has been looked at.
        """
        bodies: list[bytes] = []
        with txn.cursor(db=self.db) as cursor:
            found = cursor.set_range(_U64.pack(since + 1))
            while found and len(bodies) < count and scan_max and room > 0:
                key, body = cursor.item()
                since = int(_U64.unpack(key)[0])
                if not topics or _topic_of(since, body).startswith(topics):
                    bodies.append(bytes(body))
                    room -= len(body)
                scan_max -= 1
                found = cursor.next()
        return bodies, since


class _Head(msgspec.Struct):
    time: int
    snapshotter: str
    namespace: str
    verb: str


_decode_head = msgspec.msgpack.Decoder(_Head).decode


def _time_of(body: bytes | memoryview) -> int:
    """When it happened; one that cannot be read is as old as can be: kept, it would end every turn that comes to it."""
    try:
        return _decode_head(body).time
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _LONG_AGO


def _topic_of(sequence: int, body: bytes | memoryview) -> str:
    try:
        head = _decode_head(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Internal(f"event {sequence} of the journal is damaged, walk again: {error}") from error
    return topic(head.snapshotter, head.namespace, head.verb)
