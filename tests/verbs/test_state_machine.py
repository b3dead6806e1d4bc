"""Calls nobody planned, one after the other: every answer and every event must be the oracle's.

A run is made of one integer, printed when it fails: `SNAPBROKER_SEED=<it>` in the environment repeats it, and looks
for the shortest conversation that fails too, which may take minutes.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from snapbroker.contract import SNAPSHOT_REF_LABEL, Info, Kind, Usage
from snapbroker.errors import BrokerError
from snapbroker.protocol import (
    Call,
    Cleanup,
    Commit,
    Events,
    Mounts,
    MountsAnswer,
    Prepare,
    Remove,
    Stat,
    Update,
    UsageOf,
    View,
    Walk,
)
from tests.harness import Daemon, Wire
from tests.oracle import Oracle, Refused, check_chains, replay, timeless

STEM = "n" * 400
NAMES = ["a", "b", "c", "d", STEM, STEM + "x", STEM + "y", "牛/ü:"]
ILLEGAL_NAMES = ["", "x" * 4097, "a\0"]
LABELS = st.dictionaries(
    st.sampled_from(["color", "size", "a.b/c"]), st.sampled_from(["red", "blue", "", "very " * 20]), max_size=3
)
ODD_LABELS = [
    {"k": "v" * 4096},
    {"": "x"},
    {SNAPSHOT_REF_LABEL: "a"},
    {SNAPSHOT_REF_LABEL: "ref-1"},
    {SNAPSHOT_REF_LABEL: "ref-1", "color": "red"},
]
FIELDPATHS = st.lists(
    st.sampled_from(["labels", "labels.color", "labels.size", "labels.a.b/c", f"labels.{SNAPSHOT_REF_LABEL}"]),
    max_size=3,
)
ODD_FIELDPATHS = st.sampled_from([("",), ("name",), ("labels.color", "created"), ("labels.",)])
FILTERS: list[tuple[tuple[str, ...], Callable[[Info], bool]]] = [
    ((), lambda info: True),
    (("kind==active",), lambda info: info.kind is Kind.ACTIVE),
    (("kind==view", "name==a"), lambda info: info.kind is Kind.VIEW or info.name == "a"),
    (("parent==a,kind!=committed",), lambda info: info.parent == "a" and info.kind is not Kind.COMMITTED),
    (("labels.color",), lambda info: "color" in info.labels),
    (("labels.color!=red",), lambda info: info.labels.get("color") != "red"),
    (("name~=^n+$",), lambda info: set(info.name) == {"n"}),
]


# By number: hypothesis writes a strategy's values down, and some of these are long.
_NAMES = [*NAMES * 6, *ILLEGAL_NAMES]
_PARENTS = [*[""] * 8, *NAMES * 3, *ILLEGAL_NAMES]


def _name(number: int) -> str:
    return _NAMES[number]


def _parent(number: int) -> str:
    return _PARENTS[number]


def _odd_labels(number: int) -> dict[str, str]:
    return ODD_LABELS[number]


names = st.integers(0, len(_NAMES) - 1).map(_name)
legal_names = st.integers(0, len(NAMES) - 1).map(_name)
parents = st.integers(0, len(_PARENTS) - 1).map(_parent)
labels = st.one_of(LABELS, LABELS, LABELS, st.integers(0, len(ODD_LABELS) - 1).map(_odd_labels))
fieldpaths = st.one_of(FIELDPATHS.map(tuple), FIELDPATHS.map(tuple), FIELDPATHS.map(tuple), ODD_FIELDPATHS)

prepares = st.builds(Prepare, key=names, parent=parents, labels=labels)
views = st.builds(View, key=names, parent=parents, labels=labels)
commits = st.builds(Commit, name=names, key=names, parent=parents, labels=labels, sync=st.booleans())
removes = st.builds(Remove, key=names)
updates = st.builds(Update, name=names, labels=labels, fieldpaths=fieldpaths)
reads = st.one_of(st.builds(Stat, key=names), st.builds(Mounts, key=names), st.builds(UsageOf, key=names))
changes = st.one_of(prepares, views, commits, removes, updates)


class Conversation(RuleBasedStateMachine):
    """One namespace, from its first call to its last; what is only declared here is set by whoever runs it."""

    connect: Callable[[], Wire]
    rebases: bool
    counts: Any
    in_memory: bool
    numbers: Iterator[int]

    def __init__(self) -> None:
        super().__init__()
        # Of its own: what a conversation that failed left unanswered must not come into the next one.
        self.wire = self.connect()
        self.namespace = f"machine-{next(self.numbers)}"
        self.offset = self.wire.one(Walk(page=1, credit=1), namespace=self.namespace).sequence
        self.oracle = Oracle(self.wire.snapshotter, self.namespace, self.rebases, self.counts)
        self.mounts: dict[str, MountsAnswer] = {}
        self.infos: dict[str, Info] = {}
        self.sources: set[str] = set()
        self.settled = True

    # What is said.

    @rule(call=prepares)
    def prepare(self, call: Call) -> None:
        self.say(call)

    @rule(call=views)
    def view(self, call: Call) -> None:
        self.say(call)

    @rule(call=commits)
    def commit(self, call: Call) -> None:
        self.say(call)

    @precondition(lambda self: self.actives())
    @rule(data=st.data(), name=legal_names, labels=labels)
    def commit_what_can_be(self, data: st.DataObject, name: str, labels: dict[str, str]) -> None:
        key = data.draw(st.sampled_from(self.actives()))
        parent = data.draw(st.sampled_from(["", *self.of_kind(Kind.COMMITTED)]))
        self.say(Commit(name=name, key=key, parent=parent, labels=labels))

    @precondition(lambda self: self.of_kind(Kind.COMMITTED))
    @rule(data=st.data(), key=legal_names, verb=st.sampled_from([Prepare, View]))
    def go_on_from_what_is_committed(self, data: st.DataObject, key: str, verb: Any) -> None:
        self.say(verb(key=key, parent=data.draw(st.sampled_from(self.of_kind(Kind.COMMITTED)))))

    @rule(call=removes)
    def remove(self, call: Call) -> None:
        self.say(call)

    @rule(call=updates)
    def update(self, call: Call) -> None:
        self.say(call)

    @rule(call=reads)
    def read(self, call: Call) -> None:
        self.say(call)

    @rule(calls=st.lists(st.one_of(changes, changes, reads), min_size=2, max_size=6))
    def say_at_once(self, calls: list[Call]) -> None:
        self.say(*calls, atomic=True)

    @precondition(lambda self: self.actives())
    @rule(data=st.data(), first=legal_names, second=legal_names, then=st.lists(changes, max_size=3))
    def commit_and_go_on_at_once(self, data: st.DataObject, first: str, second: str, then: list[Call]) -> None:
        key = data.draw(st.sampled_from(self.actives()))
        parent = data.draw(st.sampled_from(["", *self.of_kind(Kind.COMMITTED)]))
        calls = [Commit(name=first, key=key, parent=parent), Prepare(key=second, parent=first), *then]
        self.say(*calls, atomic=True)

    @rule(chosen=st.sampled_from(FILTERS), page=st.sampled_from([1, 2, 3, 1000]))
    def walk(self, chosen: tuple[tuple[str, ...], Callable[[Info], bool]], page: int) -> None:
        filters, condition = chosen
        infos, sequence = self.walked(filters, page)
        assert [timeless(info) for info in infos] == self.oracle.matching(condition)
        assert sequence == self.offset + len(self.oracle.events)

    @rule()
    def cleanup(self) -> None:
        self.say(Cleanup())

    # What must be answered.

    def say(self, *calls: Call, atomic: bool = False) -> None:
        self.settled = False
        expected = self.oracle.request(calls, atomic=atomic)
        answers = self.wire.call(*calls, atomic=atomic, namespace=self.namespace)
        for call, answer, wanted in zip(calls, answers, expected, strict=True):
            if isinstance(wanted, Refused):
                assert isinstance(answer, BrokerError), f"{call}: {answer}, not {wanted.code}"
                assert answer.code == wanted.code, f"{call}: {answer!r}, not {wanted.code}"
            else:
                assert not isinstance(answer, BrokerError), f"{call}: {answer!r}, not {wanted}"
                self.check(call, answer, wanted)
        self.follow()
        self.settled = True

    def check(self, call: Call, answer: Any, wanted: Any) -> None:
        """An answer that is none of an error."""
        if isinstance(call, Prepare | View):
            self.check_mounts(answer, wanted)
            assert not self.sources & {mount.source for mount in answer.mounts} or not self.in_memory, (
                "an id came again"
            )
            self.sources |= {mount.source for mount in answer.mounts}
            self.mounts[call.key] = answer
        elif isinstance(call, Mounts):
            self.check_mounts(answer, wanted)
            assert answer == self.mounts[call.key]
        elif isinstance(call, Commit):
            self.mounts[call.name] = self.mounts.pop(call.key)
        elif isinstance(call, Stat | Update):
            assert timeless(answer) == wanted
            assert answer.created <= answer.updated
        elif isinstance(call, UsageOf):
            assert (answer == Usage()) == wanted

    def check_mounts(self, answer: MountsAnswer, kind: Kind) -> None:
        if self.in_memory:
            assert answer.mounts[-1].options[0] == ("rw" if kind is Kind.ACTIVE else "ro")
        else:
            assert answer.mounts

    def follow(self) -> None:
        """The state and its times after a request; chains of ids too, where mounts tell them."""
        infos, _ = self.walked((), 1000)
        assert [timeless(info) for info in infos] == self.oracle.matching(lambda info: True)
        for info in infos:
            before = self.infos.get(info.name)
            if before is not None and before.created == info.created:
                assert before.updated <= info.updated
            if self.in_memory and info.kind is not Kind.COMMITTED:
                chain = ":".join(self.source(name) for name in self.oracle.snapshots[info.name].chain)
                assert self.mounts[info.name].mounts[0].options[1:] == ((f"parents={chain}",) if chain else ())
        self.infos = {info.name: info for info in infos}

    def source(self, name: str) -> str:
        return self.mounts[name].mounts[0].source

    def walked(self, filters: tuple[str, ...], page: int) -> tuple[list[Info], int]:
        infos: list[Info] = []
        sequence = -1
        after = ""
        while True:
            for answer in self.wire.pages(Walk(filters=filters, page=page, after=after), namespace=self.namespace):
                infos += answer.infos
                assert not answer.next or answer.next.encode() > after.encode()
                after = answer.next
                sequence = answer.sequence if sequence < 0 else sequence
            if not after:
                return infos, sequence

    def actives(self) -> list[str]:
        return self.of_kind(Kind.ACTIVE)

    def of_kind(self, kind: Kind) -> list[str]:
        return sorted(name for name, snapshot in self.oracle.snapshots.items() if snapshot.kind is kind)

    # What must be told in the end.

    def teardown(self) -> None:
        with self.wire:
            # If something was wrong already, that is what is to be told.
            if self.settled:
                self.check_events()

    def check_events(self) -> None:
        pages = self.wire.pages(Events(since=self.offset), namespace=self.namespace)
        events = [event for page in pages for event in page.events]
        told = [
            (
                event.sequence - self.offset,
                event.previous - self.offset if event.previous else 0,
                event.verb,
                event.key,
                event.info.name if event.info else "",
            )
            for event in events
        ]
        assert told == self.oracle.events
        check_chains(events)
        infos, sequence = self.walked((), 1000)
        assert replay(events) == {info.name: info for info in infos}
        assert [timeless(info) for info in infos] == self.oracle.matching(lambda info: True)
        assert sequence == self.offset + len(self.oracle.events)


@pytest.fixture(scope="module")
def talkative() -> Iterator[Daemon]:
    """Two memory snapshotters: one takes ids from a pool, with the other every prepare is made by a worker."""
    sections: dict[str, dict[str, Any]] = {
        "pooled": {"backend": "memory"},
        "unpooled": {"backend": "memory", "limits": {"pool": {"pool_min": 0}}},
    }
    with Daemon(sections) as daemon:
        yield daemon


def converse(daemon: Daemon, snapshotter: str, examples: int, steps: int) -> None:
    """Run the machine against one snapshotter."""
    given = os.environ.get("SNAPBROKER_SEED")
    number = int(given) if given else random.SystemRandom().getrandbits(32)
    phases = [Phase.generate, Phase.shrink] if given else [Phase.generate]
    machine = type(
        "Machine",
        (Conversation,),
        {
            "connect": lambda _self: daemon.wire(snapshotter),
            "rebases": snapshotter not in ("native", "btrfs"),
            "counts": {"overlayfs": "directory", "native": "changes", "btrfs": "changes"}.get(snapshotter, "nothing"),
            "in_memory": snapshotter in ("pooled", "unpooled"),
            "numbers": itertools.count(),
        },
    )
    try:
        run_state_machine_as_test(
            seed(number)(machine),
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                database=None,
                phases=phases,
                report_multiple_bugs=False,
                suppress_health_check=[HealthCheck.too_slow],
            ),
        )
    except BaseException as error:
        error.add_note(f"SNAPBROKER_SEED={number} repeats it")
        raise


@pytest.mark.parametrize("snapshotter", ["pooled", "unpooled"])
def test_any_conversation(talkative: Daemon, snapshotter: str) -> None:
    converse(talkative, snapshotter, examples=60, steps=40)


@pytest.mark.root
@pytest.mark.parametrize("snapshotter", ["overlayfs", "native", "btrfs"])
def test_any_conversation_on_disk(daemon: Daemon, snapshotter: str) -> None:
    converse(daemon, snapshotter, examples=6, steps=30)
