"""The journal held against itself and against the records: numbers, chains of topics, and the last word on each name.

Read from its beginning, each event either tells what the record of its name says now, or another event on the name
must follow. Names whose last event disagrees are the findings. Only the names that are between two states at the
event that was read last are in memory.

The last look shares its transaction with calls that were decided before it: their events are there, and what the turn
writes at its end is not.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Final, Self

import msgspec

from broker.audit.found import Found, Mend
from broker.audit.kinds import finding
from broker.store.records import decode_record, index_key, info_of
from snapbroker.contract import Info, topic

if TYPE_CHECKING:
    from lmdb import Transaction

    from broker.store import Inspection
    from broker.store.journal import Turn

PENDING_MAX: Final = 1 << 18
"""Most names that are remembered as half way between two states, about 150 bytes each."""
MAKING: Final = frozenset(("prepare", "view", "commit", "update"))
"""Verbs whose event may give a snapshot its fence; `update` where a repair gave it a new one."""


class Heard(msgspec.Struct, gc=False):
    """An event as the journal has it, its Info still encoded."""

    sequence: int
    previous: int
    time: int
    snapshotter: str
    namespace: str
    verb: str
    key: str = ""
    info: msgspec.Raw = msgspec.Raw(b"")

    @property
    def topic(self) -> str:
        """The topic it was published on."""
        return topic(self.snapshotter, self.namespace, self.verb)

    @property
    def subject(self) -> str:
        """The name that it leaves behind; the one that it took away where it leaves none."""
        return _name_of(self.info) if self.info else self.key

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that it is about."""
        return tuple({self.key, self.subject} - {""})


class _Named(msgspec.Struct):
    name: str


_decode = msgspec.msgpack.Decoder(Heard).decode
_decode_name = msgspec.msgpack.Decoder(_Named).decode
_decode_info = msgspec.msgpack.Decoder(Info).decode


def _name_of(info: msgspec.Raw) -> str:
    return _decode_name(info).name


def decode_event(body: bytes) -> Heard | None:
    """The event; None where it cannot be read."""
    try:
        event = _decode(body)
        if event.info:
            _decode_info(event.info)
    except (msgspec.MsgspecError, UnicodeError):
        return None
    return event


class JournalCheck:
    """Fed the events in their order; `settle` tells of what remains, in one transaction with the newest of them."""

    def __init__(self, inspection: Inspection, snapshotter: str) -> None:
        self._inspection = inspection
        self._snapshotter = snapshotter
        self._oldest = 0
        self.upto = 0
        self._topics: dict[str, int] = {}
        self._pending: dict[bytes, Heard] = {}
        self._lost: list[tuple[int, int]] = []
        self._forgotten = False
        self.found: list[Found] = []

    def copy(self) -> Self:
        """Another that goes on from here: a transaction may be dropped after its events were fed."""
        other = copy.copy(self)
        # What they shared is the other's.
        self._topics, self._pending = dict(self._topics), dict(self._pending)
        self._lost, self.found = list(self._lost), list(self.found)
        return other

    def feed(self, txn: Transaction, sequence: int, body: bytes) -> None:
        """Take the next event."""
        if not self.upto:
            self._oldest = sequence
        elif sequence != self.upto + 1 and self._inspection.events(txn, 0, 1)[0][0] == sequence:
            self._begin_anew(sequence)
        elif sequence != self.upto + 1:
            first, last = self.upto + 1, sequence - 1
            self._lost.append((first, last))
            which = f"event {first} is" if first == last else f"events {first} to {last} are"
            self._note("journal-gap", f"{which} missing", first, cut=last)
        self.upto = sequence
        event = decode_event(body)
        if event is None or event.sequence != sequence or event.snapshotter != self._snapshotter:
            self._lost.append((sequence, sequence))
            what = "cannot be read" if event is None else f"is event {event.sequence} of {event.snapshotter!r}"
            self._note("damaged-event", f"event {sequence} {what}", sequence, cut=sequence)
            return
        self._follow(event)
        self._compare(txn, event)

    def _begin_anew(self, oldest: int) -> None:
        """All that was read is no longer kept, nor are events after it that nobody has read."""
        self._oldest = oldest
        self._topics.clear()
        self._pending.clear()
        self._lost.clear()
        self._forgotten = False
        self.found.clear()

    def _follow(self, event: Heard) -> None:
        name = event.topic
        known = self._topics.get(name)
        # What is before the oldest event that is kept cannot be known. A journal that was begun anew has all topics
        # begin at its first event, whatever topic that is of.
        good = event.previous == known if known is not None else event.previous <= self._oldest
        # The event before may be among those that are missing, which are told of already.
        good = good or any(first <= event.previous <= last for first, last in self._lost)
        if not good or event.previous >= event.sequence:
            message = f"event {event.sequence} names {event.previous} as the one before it on {name}"
            message += f", which is {known}" if known is not None else ""
            self._note("journal-chain", message, event.sequence, cut=event.sequence)
        self._topics[name] = event.sequence

    def _compare(self, txn: Transaction, event: Heard) -> None:
        if event.verb == "cleanup":
            return
        if event.verb in ("commit", "remove"):
            self._expect(txn, event, event.key, None)
        if event.info:
            self._expect(txn, event, event.subject, bytes(event.info))

    def _expect(self, txn: Transaction, event: Heard, name: str, info: bytes | None) -> None:
        key = index_key(event.namespace, name)
        if self._says(txn, key) == info:
            self._pending.pop(key, None)
        elif len(self._pending) < PENDING_MAX or key in self._pending:
            self._pending[key] = event
        else:
            self._forgotten = True

    def _says(self, txn: Transaction, key: bytes) -> bytes | None:
        """The encoded Info of the record; empty where it is damaged, None where there is none."""
        value = self._inspection.value(txn, key)
        try:
            return None if value is None else info_of(value)
        except ValueError:
            return b""

    def settle(self, txn: Transaction, turn: Turn) -> list[Found]:
        """What does not fit at the end; the newest event must have been fed in this transaction, that of the turn."""
        found = list(self.found)
        for name, sequence in self._topics.items():
            noted = self._noted(txn, turn, name)
            if noted != sequence:
                message = f"the newest event on {name} is {sequence}, the index says {noted}"
                told = finding("journal-topic", message, sequence=sequence)
                found.append(Found(told, self._set_topic(name, noted, sequence)))
        for key, event in self._pending.items():
            said = self._says(txn, key)
            if said == b"":
                continue
            name = event.subject if index_key(event.namespace, event.subject) == key else event.key
            state = "is another than" if said is not None else "is missing after"
            if said is not None and not (event.info and name == event.subject):
                state = "is there after"
            message = f"the record of {name!r} {state} the last event on it, {event.verb}"
            about = {"namespace": event.namespace, "key": name, "sequence": event.sequence, "time": event.time}
            found.append(Found(finding("journal-state", message, **about), self._tell(key, event.namespace, name)))
        if self._forgotten:
            message = f"more than {PENDING_MAX} names are between two states: not all of them were compared"
            found.append(Found(finding("unchecked", message)))
        return found

    def _noted(self, txn: Transaction, turn: Turn, name: str) -> int:
        """The newest sequence on a topic by the index, as the turn will leave it."""
        return turn.topics.get(name) or self._inspection.newest_on(txn, name)

    def _note(self, kind: str, message: str, sequence: int, cut: int) -> None:
        self.found.append(Found(finding(kind, message, sequence=sequence), self._cut(cut)))

    def _cut(self, upto: int) -> Mend:
        def work(txn: Transaction, turn: Turn, now: int) -> bool:
            # The newest event stays, or sequences would begin again: one that says nothing takes its place.
            if upto >= turn.sequence:
                turn.append(txn, now, "default", "cleanup", "")
            self._inspection.cut(txn, upto)
            return True

        return lambda access: access.transact(work)

    def _tell(self, key: bytes, namespace: str, name: str) -> Mend:
        def work(txn: Transaction, turn: Turn, now: int) -> bool:
            value = self._inspection.value(txn, key)
            if value is None:
                turn.append(txn, now, namespace, "remove", name)
            else:
                turn.append(txn, now, namespace, "update", name, decode_record(value).info)
            return True

        return lambda access: access.transact(work)

    def _set_topic(self, name: str, noted: int, sequence: int) -> Mend:
        def work(txn: Transaction, turn: Turn, _now: int) -> bool:
            # An event that has come meanwhile has noted itself.
            if self._noted(txn, turn, name) != noted:
                return False
            # By way of the turn, whose journal remembers the topics' newest sequences.
            turn.topics[name] = sequence
            return True

        return lambda access: access.transact(work)
