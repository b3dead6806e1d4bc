"""What keeps one snapshot, and what the journal tells of its name: the answer to `why`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from broker.audit import mounts
from broker.audit.journal import decode_event
from broker.store import Inspection
from broker.store.records import Record, decode_record, index_key
from snapbroker.contract import SNAPSHOT_REF_LABEL, Event, Info, check_name
from snapbroker.errors import Internal
from snapbroker.protocol import WhyAnswer
from snapbroker.protocol import decode_event as decode_whole_event

if TYPE_CHECKING:
    from lmdb import Transaction

    from backends.api import Task
    from broker.audit.access import Access, Flight

CHILDREN_MAX: Final = 100
"""Children that are named; how many there are is told."""
EVENTS_MAX: Final = 10
"""Most events of a name that are told."""
PAGE: Final = 512


def why(access: Access, namespace: str, name: str, task: Task) -> WhyAnswer:
    """Look at everything that can keep a snapshot, and back in the journal to the event that made it."""
    check_name(name)
    key = index_key(namespace, name)
    inspection = Inspection(access.environment)
    flight, value = access.transact(lambda txn, _turn, _now: (access.flight(), inspection.value(txn, key)))
    record = _record(name, value)
    events, oldest = _events(access, inspection, namespace, name, task)
    if record is None:
        held = ("a call that makes it is under way",) if key in flight.creates else ()
        return WhyAnswer(holds=held, events=events, oldest=oldest)
    info = record.decoded()
    children, count = _children(access, inspection, record.id, task)
    return WhyAnswer(
        info=info,
        id=record.id,
        fence=record.fence,
        broken=record.broken,
        children=children,
        children_count=count,
        holds=_holds(flight, key, record),
        mounts=tuple(use.mount for use in mounts.uses(str(access.root), access.inspector) if use.id == record.id),
        references=_references(access, inspection, namespace, info, record),
        events=events,
        oldest=oldest,
    )


def _record(name: str, value: bytes | None) -> Record | None:
    try:
        return None if value is None else decode_record(value)
    except ValueError as error:
        raise Internal(f"the record of {name!r} is damaged: {error}: see audit") from error


def _holds(flight: Flight, key: bytes, record: Record) -> tuple[str, ...]:
    held: list[str] = []
    if key in flight.consumes:
        held.append("a commit of it is under way")
    if pins := flight.pins.get(record.id, 0):
        held.append(f"{pins} calls that make or commit a snapshot on it are under way")
    return tuple(held)


def _children(access: Access, inspection: Inspection, id_: int, task: Task) -> tuple[tuple[str, ...], int]:
    """The first names, found by a scan of the records, and how many there are by the index."""
    with access.environment.read() as txn:
        count = len(inspection.children_of(txn, id_))
    names: list[str] = []
    after = b""
    while len(names) < min(count, CHILDREN_MAX):
        task.advance(0)
        with access.environment.read() as txn:
            heads, after = inspection.heads(txn, after, PAGE)
            names += [_name(inspection, txn, key) for key, _, parent in heads if parent == id_]
        if not after:
            break
    return tuple(names[:CHILDREN_MAX]), count


def _name(inspection: Inspection, txn: Transaction, key: bytes) -> str:
    """The name of a record, with its namespace's key alone where it is damaged."""
    value = inspection.value(txn, key)
    try:
        return decode_record(value or b"").decoded().name
    except Exception:
        return key.partition(b"\0")[2].decode("utf-8", "replace")


def _references(access: Access, inspection: Inspection, namespace: str, info: Info, record: Record) -> tuple[str, ...]:
    reference = info.labels.get(SNAPSHOT_REF_LABEL, "")
    if not reference:
        return ()
    with access.environment.read() as txn:
        found = inspection.referred_by(txn, inspection.reference_key(namespace, reference, record.id))
    return (reference,) if found == info.name else ()


def _events(
    access: Access, inspection: Inspection, namespace: str, name: str, task: Task
) -> tuple[tuple[Event, ...], int]:
    """The last events on the name back to the one that made it, the newest first; and the oldest sequence kept."""
    needle = name.encode()
    found: list[Event] = []
    below = 2**63 - 1
    with access.environment.read() as txn:
        first = inspection.events(txn, 0, 1)
    oldest = first[0][0] if first else 0
    while len(found) < EVENTS_MAX:
        task.advance(0)
        with access.environment.read() as txn:
            bodies = inspection.events_before(txn, below, PAGE)
        for sequence, body in bodies:
            below = sequence
            # Nearly every event is about another name: only what may be about this one is decoded.
            heard = decode_event(body) if needle in body else None
            if heard is None or heard.namespace != namespace or name not in heard.names:
                continue
            found.append(decode_whole_event(body))
            made = heard.verb in ("prepare", "view", "commit") and heard.subject == name
            if made or len(found) == EVENTS_MAX:
                return tuple(found), oldest
        if len(bodies) < PAGE:
            break
    return tuple(found), oldest
