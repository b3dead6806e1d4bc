"""The contract as a dictionary: what a snapshotter must answer, worked out without a broker, a disk or a thread.

`Oracle` takes the calls of the protocol and gives the result that each must have, in the words of the contract:
kinds, parents, labels, errors and their order, events with their sequences and chains, and whether a usage is zero.
Times, ids and mounts are the broker's to choose; what must hold between them is checked where the answers are.
`replay` is the other half: the state that a journal tells.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from snapbroker.contract import (
    LABEL_BYTES_MAX,
    LABELS_MAX,
    NAME_BYTES_MAX,
    SNAPSHOT_REF_LABEL,
    Event,
    Info,
    Kind,
    topic,
)
from snapbroker.protocol import (
    Call,
    Cleanup,
    Commit,
    Mounts,
    Prepare,
    Remove,
    Stat,
    Update,
    UsageOf,
    View,
    Walk,
)


class Refused(Exception):
    """A call must end with this code."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class Snapshot:
    """What the contract knows of a snapshot; `chain` is the names of its ancestors, the immediate parent first."""

    kind: Kind
    parent: str
    labels: dict[str, str]
    chain: tuple[str, ...] = ()


@dataclass
class Oracle:
    """One snapshotter in one namespace; `rebases` is whether its backend can, `counts` what its usage counts."""

    snapshotter: str
    namespace: str
    rebases: bool = True
    counts: Literal["nothing", "directory", "changes"] = "nothing"
    """What of a snapshot that nobody wrote to: nothing, its own directory, or that only where it has no parent."""
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    events: list[tuple[int, int, str, str, str]] = field(default_factory=list)
    """(sequence, previous, verb, key, name of the info or nothing) of every event."""

    # Calls.

    def call(self, call: Call) -> Any:
        """The answer of one call: an Info without times, a kind for mounts, whether a usage must be zero."""
        return self._verbs[type(call)](self, call)

    def request(self, calls: Sequence[Call], *, atomic: bool) -> list[Any]:
        """The result of every call; of an atomic request all, or the failing one's code and `cancelled`."""
        if not atomic or len(calls) == 1:
            return [self._attempt(call) for call in calls]
        before = copy.deepcopy((self.snapshots, self.events))
        answers: list[Any] = []
        for index, call in enumerate(calls):
            try:
                answers.append(self.call(call))
            except Refused as refused:
                self.snapshots, self.events = before
                return [refused if other == index else Refused("cancelled") for other in range(len(calls))]
        return answers

    def _attempt(self, call: Call) -> Any:
        try:
            return self.call(call)
        except Refused as refused:
            return refused

    def info(self, name: str) -> Info:
        """What stat must tell, its times left out."""
        found = self.snapshots[name]
        return Info(name, found.kind, found.parent, found.labels)

    # Verbs.

    def _prepare(self, call: Prepare) -> Kind:
        return self._create(Kind.ACTIVE, "prepare", call.key, call.parent, call.labels)

    def _view(self, call: View) -> Kind:
        return self._create(Kind.VIEW, "view", call.key, call.parent, call.labels)

    def _create(self, kind: Kind, verb: str, key: str, parent: str, labels: Mapping[str, str]) -> Kind:
        check_name(key)
        check_labels(labels)
        stored = {name: value for name, value in labels.items() if value}
        chain: tuple[str, ...] = ()
        if parent:
            chain = self._parent(parent, "invalid_argument")
        if kind is Kind.ACTIVE and SNAPSHOT_REF_LABEL in stored:
            self._refuse_what_is_there(stored[SNAPSHOT_REF_LABEL], parent)
        if key in self.snapshots:
            raise Refused("already_exists")
        self.snapshots[key] = Snapshot(kind, parent, stored, chain)
        self._event(verb, key, key)
        return kind

    def _parent(self, parent: str, error: str) -> tuple[str, ...]:
        check_name(parent)
        found = self.snapshots.get(parent)
        if found is None:
            raise Refused("not_found")
        if found.kind is not Kind.COMMITTED:
            raise Refused(error)
        return (parent, *found.chain)

    def _refuse_what_is_there(self, target: str, parent: str) -> None:
        """By its name whatever it is (C93), by its label where it is a layer on this parent (C94)."""
        for name, snapshot in self.snapshots.items():
            layer = snapshot.kind is Kind.COMMITTED and snapshot.parent == parent
            if name == target or (layer and snapshot.labels.get(SNAPSHOT_REF_LABEL) == target):
                raise Refused("already_exists")

    def _commit(self, call: Commit) -> None:
        check_name(call.name)
        check_name(call.key)
        if call.parent:
            check_name(call.parent)
        check_labels(call.labels)
        found = self.snapshots.get(call.key)
        if found is None:
            raise Refused("not_found")
        if call.name in self.snapshots:
            raise Refused("already_exists")
        if found.kind is not Kind.ACTIVE:
            raise Refused("failed_precondition")
        parent, chain = found.parent, found.chain
        if call.parent and call.parent != found.parent:
            if call.parent == call.name or found.parent or not self.rebases:
                raise Refused("invalid_argument")
            parent, chain = call.parent, self._parent(call.parent, "failed_precondition")
        del self.snapshots[call.key]
        labels = {name: value for name, value in call.labels.items() if value}
        self.snapshots[call.name] = Snapshot(Kind.COMMITTED, parent, labels, chain)
        self._event("commit", call.key, call.name)

    def _remove(self, call: Remove) -> None:
        check_name(call.key)
        self._existing(call.key)
        if any(snapshot.parent == call.key for snapshot in self.snapshots.values()):
            raise Refused("failed_precondition")
        del self.snapshots[call.key]
        self._event("remove", call.key)

    def _mounts(self, call: Mounts) -> Kind:
        check_name(call.key)
        found = self._existing(call.key)
        if found.kind is Kind.COMMITTED:
            raise Refused("failed_precondition")
        return found.kind

    def _stat(self, call: Stat) -> Info:
        check_name(call.key)
        self._existing(call.key)
        return self.info(call.key)

    def _update(self, call: Update) -> Info:
        check_name(call.name)
        check_labels(call.labels)
        found = self._existing(call.name)
        labels = dict(found.labels) if call.fieldpaths else dict(call.labels)
        for path in call.fieldpaths:
            if path == "labels":
                labels = dict(call.labels)
            elif path.startswith("labels.") and path != "labels.":
                key = path.removeprefix("labels.")
                labels[key] = call.labels.get(key, "")
            else:
                raise Refused("invalid_argument")
        labels = {key: value for key, value in labels.items() if value}
        check_labels(labels)
        found.labels = labels
        self._event("update", call.name, call.name)
        return self.info(call.name)

    def _usage(self, call: UsageOf) -> bool:
        """Whether it is zero: a view's always is (C49); else it depends on what the backend counts (C51-C53, D10)."""
        check_name(call.key)
        found = self._existing(call.key)
        if found.kind is Kind.VIEW or self.counts == "nothing":
            return True
        return self.counts == "changes" and bool(found.parent)

    def _walk(self, call: Walk) -> list[Info]:
        """All of them; the filters that are used with an oracle are functions (`matching`)."""
        return self.matching(lambda _info: True)

    def _cleanup(self, _call: Cleanup) -> None:
        self._event("cleanup", "")

    def _existing(self, key: str) -> Snapshot:
        found = self.snapshots.get(key)
        if found is None:
            raise Refused("not_found")
        return found

    def matching(self, condition: Callable[[Info], bool]) -> list[Info]:
        """What a walk must give, in the order of names (C63)."""
        infos = [self.info(name) for name in sorted(self.snapshots, key=str.encode)]
        return [info for info in infos if condition(info)]

    def _event(self, verb: str, key: str, name: str = "") -> None:
        previous = next((event[0] for event in reversed(self.events) if event[2] == verb), 0)
        sequence = self.events[-1][0] + 1 if self.events else 1
        self.events.append((sequence, previous, verb, key, name))

    _verbs: Mapping[type, Callable[[Oracle, Any], Any]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._verbs = {
            Prepare: Oracle._prepare,
            View: Oracle._view,
            Commit: Oracle._commit,
            Remove: Oracle._remove,
            Mounts: Oracle._mounts,
            Stat: Oracle._stat,
            Update: Oracle._update,
            UsageOf: Oracle._usage,
            Walk: Oracle._walk,
            Cleanup: Oracle._cleanup,
        }


def check_name(name: str) -> None:
    """D3."""
    if not name or "\0" in name or len(name.encode()) > NAME_BYTES_MAX:
        raise Refused("invalid_argument")


def check_labels(labels: Mapping[str, str]) -> None:
    """C20."""
    too_long = any(len(key.encode()) + len(value.encode()) > LABEL_BYTES_MAX for key, value in labels.items())
    if len(labels) > LABELS_MAX or "" in labels or too_long:
        raise Refused("invalid_argument")


def timeless(info: Info) -> Info:
    """The Info without its times, to be compared with the oracle's."""
    return msgspec.structs.replace(info, created=0, updated=0)


# Events.


def replay(events: Iterable[Event], state: Mapping[str, Info] | None = None) -> dict[str, Info]:
    """The snapshots by name that events make of `state`; events that the state has seen already do no harm."""
    found = dict(state or {})
    for event in events:
        if event.verb in ("commit", "remove"):
            found.pop(event.key, None)
        if event.info is not None:
            found[event.info.name] = event.info
    return found


def check_chains(events: Sequence[Event], before: Mapping[str, int] | None = None) -> None:
    """Sequences rise, and every event names the one before it on its topic; `before`: the newest of each topic then."""
    newest = dict(before or {})
    last = 0
    for event in events:
        assert event.sequence > last, f"{event.sequence} comes after {last}"
        last = event.sequence
        name = topic(event.snapshotter, event.namespace, event.verb)
        assert event.topic == name
        assert event.previous == newest.get(name, 0), f"{name}: {event.previous}, not {newest.get(name, 0)}"
        newest[name] = event.sequence
