"""What a client has been promised: the state that its requests must have led to, and the bytes that must be in files.

`Books` are kept by replaying a client's steps, so they can be had for any instant: after a cut, for what was
acknowledged before it and for each step that was under way.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from snapbroker.contract import Kind
from snapbroker.errors import BrokerError
from snapbroker.protocol import Call, Commit, MountsAnswer, Prepare, Remove, View
from tests.harness import Result
from tests.oracle import Oracle, Refused, timeless

Digests = dict[str, bytes | None]
"""What a path must hold, as a digest; None where there must be nothing."""
Happening = tuple[str, str, str]
"""An event without its number: verb, key, and the name of the info or nothing."""


@dataclass
class Said:
    """One request: `sent` and `answered` on the monotonic clock in nanoseconds, 0 as long as there is no answer."""

    calls: tuple[Call, ...]
    sent: int
    atomic: bool = False
    token: bytes = b""
    results: list[Result] = field(default_factory=list)
    answered: int = 0


@dataclass
class Wrote:
    """Files written into an active snapshot; `durable` when they and their directories were flushed one by one."""

    key: str
    digests: Digests
    sent: int
    durable: bool
    answered: int = 0


Step = Said | Wrote


@dataclass
class Contents:
    """Files of one snapshot: `certain` ones outlive a power cut, the others are there as long as the power is.

    `loose` ones were written into this snapshot, `inherited` ones into a parent that was committed without `sync`.
    """

    certain: Digests = field(default_factory=dict)
    loose: Digests = field(default_factory=dict)
    inherited: Digests = field(default_factory=dict)

    def child(self) -> Contents:
        """What a snapshot of this one begins with."""
        return Contents(dict(self.certain), {}, {**self.inherited, **self.loose})

    def write(self, digests: Mapping[str, bytes | None], *, durable: bool) -> None:
        """Note what was written last."""
        for path in digests:
            for before in (self.certain, self.loose, self.inherited):
                before.pop(path, None)
        (self.certain if durable else self.loose).update(digests)

    def rebase(self) -> None:
        """It gets a parent that it was not made of: what was deleted here was not there, and hides nothing of it."""
        for digests in (self.certain, self.loose, self.inherited):
            for path in [path for path, digest in digests.items() if digest is None]:
                del digests[path]

    def flush(self) -> None:
        """Everything that was written into this snapshot is on disk."""
        self.certain.update(self.loose)
        self.loose.clear()

    def lose_power(self) -> None:
        """What was not flushed may hold anything."""
        self.loose.clear()
        self.inherited.clear()

    def all(self) -> Digests:
        """Every file, as it is while the power is on."""
        return {**self.inherited, **self.certain, **self.loose}


@dataclass
class Books:
    """One client's namespace: the oracle, the files, and the answers that `mounts` must give again."""

    oracle: Oracle
    contents: dict[str, Contents] = field(default_factory=dict)
    mounts: dict[str, MountsAnswer] = field(default_factory=dict)
    side_by_side: list[tuple[int, int]] = field(default_factory=list)
    """Where in the events those of one request stand that do not wait for each other."""

    @property
    def name(self) -> str:
        """What tells this client from others."""
        return f"{self.oracle.snapshotter}/{self.oracle.namespace}"

    def copy(self) -> Books:
        """Books that go on by themselves."""
        return copy.deepcopy(self)

    def say(self, said: Said) -> list[Any]:
        """Enter a request; answers what the oracle expects of each call."""
        before = len(self.oracle.events)
        expected = self.oracle.request(said.calls, atomic=said.atomic)
        if len(said.calls) > 1 and not said.atomic:
            self.side_by_side.append((before, len(self.oracle.events)))
        for number, (call, wanted) in enumerate(zip(said.calls, expected, strict=True)):
            if not isinstance(wanted, Refused):
                self._follow(call, said.results[number] if said.results else None)
        return expected

    def _follow(self, call: Call, result: Result | None) -> None:
        match call:
            case Prepare() | View():
                parent = self.contents.get(call.parent, Contents())
                self.contents[call.key] = parent.child()
                if isinstance(result, MountsAnswer):
                    self.mounts[call.key] = result
            case Commit():
                committed = self.contents.pop(call.key)
                self.mounts.pop(call.key, None)
                if call.parent:
                    committed.rebase()
                if call.sync:
                    committed.flush()
                self.contents[call.name] = committed
            case Remove():
                del self.contents[call.key]
                self.mounts.pop(call.key, None)
            case _:
                pass

    def wrote(self, wrote: Wrote, *, durable: bool) -> None:
        """Enter what was written, unless the snapshot is not there."""
        if wrote.key in self.contents:
            self.contents[wrote.key].write(wrote.digests, durable=durable)

    def enter(self, step: Step, *, certain: bool) -> list[Any]:
        """Enter a step; of one that may have been under way nothing is known to be flushed."""
        if isinstance(step, Said):
            return self.say(step)
        self.wrote(step, durable=step.durable and certain)
        return []

    def lose_power(self) -> None:
        """What was not flushed may hold anything."""
        for contents in self.contents.values():
            contents.lose_power()

    def happened(self) -> list[Happening]:
        """The events entered since the books were opened."""
        return [event[2:] for event in self.oracle.events]

    def forget_events(self) -> None:
        """Open the books again at what there is."""
        self.oracle.events.clear()
        self.side_by_side.clear()

    def tell(self, happened: Sequence[Happening]) -> bool:
        """Whether these are the events entered; in which order calls of one request are done is the broker's choice."""
        entered, told = self.happened(), list(happened)
        for begin, end in self.side_by_side:
            entered[begin:end], told[begin:end] = sorted(entered[begin:end]), sorted(told[begin:end])
        return entered == told

    def names(self, *kinds: Kind) -> list[str]:
        """The names of these kinds."""
        return [name for name, snapshot in self.oracle.snapshots.items() if snapshot.kind in kinds]


def digest(content: bytes) -> bytes:
    """What tells a file's content apart."""
    return hashlib.blake2b(content, digest_size=16).digest()


def check_results(said: Said, expected: list[Any]) -> None:
    """Hold what was answered against what the oracle expects."""
    for call, result, wanted in zip(said.calls, said.results, expected, strict=True):
        if isinstance(wanted, Refused):
            assert isinstance(result, BrokerError), f"{call}: {result}, not {wanted.code}"
            assert result.code == wanted.code, f"{call}: {result!r}, not {wanted.code}"
            continue
        assert not isinstance(result, BrokerError), f"{call}: {result!r}, not {wanted}"
        told = getattr(result, "infos", None)
        if told is not None:
            assert [timeless(info) for info in told] == wanted, f"{call}: {told}, not {wanted}"
        elif hasattr(result, "kind"):
            assert timeless(result) == wanted, f"{call}: {result}, not {wanted}"


def alike(results: Sequence[Result], first: Sequence[Result]) -> bool:
    """Whether answers are the same; a btrfs may have come to lie on another device."""
    return [_comparable(result) for result in results] == [_comparable(result) for result in first]


def _comparable(result: Result) -> object:
    if isinstance(result, BrokerError):
        return result.code, result.message
    if isinstance(result, MountsAnswer):
        mounts = [(each.type, "" if each.type == "btrfs" else each.source, each.options) for each in result.mounts]
        return mounts, result.fence
    return result
