"""What is refused, with which code, and in which order it is looked for: one row for each statement of the contract.

A refusal changes nothing, so all rows share one world for each snapshotter, and each checks that it is as it was.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from snapbroker.errors import (
    AlreadyExists,
    BrokerError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Unimplemented,
)
from snapbroker.protocol import (
    Cancel,
    Cleanup,
    Commit,
    Events,
    Mounts,
    Prepare,
    Remove,
    Stat,
    Status,
    Update,
    UsageOf,
    View,
    Walk,
)
from tests.harness import Daemon
from tests.verbs.conftest import World

TOO_LONG = "n" * 4097
TOO_LONG_IN_BYTES = "é" * 2049
ILLEGAL_NAMES = {"empty": "", "long": TOO_LONG, "long-in-bytes": TOO_LONG_IN_BYTES, "nul": "a\0b"}
OVER = {"k": "v" * 4096}
"""A label of 4,097 bytes, key and value together (C20)."""

CALLS_WITH_A_NAME = {
    "prepare": lambda name: Prepare(key=name),
    "prepare-parent": lambda name: Prepare(key="fresh", parent=name),
    "view": lambda name: View(key=name),
    "view-parent": lambda name: View(key="fresh", parent=name),
    "commit-name": lambda name: Commit(name=name, key="active"),
    "commit-key": lambda name: Commit(name="fresh", key=name),
    "remove": lambda name: Remove(key=name),
    "mounts": lambda name: Mounts(key=name),
    "stat": lambda name: Stat(key=name),
    "update": lambda name: Update(name=name, labels={"a": "b"}),
    "usage": lambda name: UsageOf(key=name),
}


def rows_of_names() -> list[Any]:
    """D3, for every call that takes a name; an empty parent is legal (C5)."""
    return [
        pytest.param(make(name), InvalidArgument, id=f"D3-{verb}-{what}")
        for (verb, make), (what, name) in itertools.product(CALLS_WITH_A_NAME.items(), ILLEGAL_NAMES.items())
        if not (verb.endswith("parent") and what == "empty")
    ]


REFUSALS = [
    *rows_of_names(),
    # C15: parent missing, parent not committed, key taken, in this order.
    pytest.param(Prepare(key="fresh", parent="missing"), NotFound, id="C15-prepare-parent-missing"),
    pytest.param(Prepare(key="fresh", parent="active"), InvalidArgument, id="C15-prepare-parent-active"),
    pytest.param(Prepare(key="fresh", parent="view"), InvalidArgument, id="C15-prepare-parent-view"),
    pytest.param(Prepare(key="fresh", parent="fresh"), NotFound, id="C15-prepare-its-own-parent"),
    pytest.param(Prepare(key="active", parent="missing"), NotFound, id="C15-prepare-parent-missing-and-key-taken"),
    pytest.param(Prepare(key="active", parent="view"), InvalidArgument, id="C15-prepare-parent-view-and-key-taken"),
    pytest.param(View(key="fresh", parent="missing"), NotFound, id="C15-view-parent-missing"),
    pytest.param(View(key="fresh", parent="active"), InvalidArgument, id="C15-view-parent-active"),
    pytest.param(View(key="fresh", parent="bare"), InvalidArgument, id="C15-view-parent-view"),
    pytest.param(View(key="top", parent="missing"), NotFound, id="C15-view-parent-missing-and-key-taken"),
    pytest.param(View(key="top", parent="active"), InvalidArgument, id="C15-view-parent-active-and-key-taken"),
    pytest.param(Prepare(key="", parent="missing"), InvalidArgument, id="D3-before-C15"),
    # C3, C6: one key space.
    *(
        pytest.param(verb(key=key, parent=parent), AlreadyExists, id=f"C6-{verb.__name__.lower()}-{key}-on-{parent}")
        for verb in (Prepare, View)
        for key in ("active", "rootless", "view", "bare", "base", "top")
        for parent in ("", "base")
    ),
    # C20: the labels' limits, and before anything is looked up.
    pytest.param(Prepare(key="fresh", labels=OVER), InvalidArgument, id="C20-prepare"),
    pytest.param(View(key="fresh", labels=OVER), InvalidArgument, id="C20-view"),
    pytest.param(Commit(name="fresh", key="active", labels=OVER), InvalidArgument, id="C20-commit"),
    pytest.param(Update(name="active", labels=OVER), InvalidArgument, id="C20-update"),
    pytest.param(Update(name="active", labels=OVER, fieldpaths=("labels.k",)), InvalidArgument, id="C20-update-path"),
    pytest.param(Prepare(key="fresh", labels={"": "x"}), InvalidArgument, id="C20-label-without-key"),
    pytest.param(
        Prepare(key="fresh", labels={f"k{n}": "v" for n in range(1025)}), InvalidArgument, id="C20-1025-labels"
    ),
    pytest.param(
        Update(name="active", labels={f"k{n}": "v" for n in range(1025)}), InvalidArgument, id="C20-update-1025-labels"
    ),
    # D2: what is wrong with the call itself comes before what is wrong with the state.
    pytest.param(Prepare(key="active", parent="missing", labels=OVER), InvalidArgument, id="D2-prepare"),
    pytest.param(Commit(name="base", key="missing", labels=OVER), InvalidArgument, id="D2-commit"),
    pytest.param(Commit(name="base", key="missing", parent=TOO_LONG), InvalidArgument, id="D2-commit-parent"),
    pytest.param(Update(name="missing", labels=OVER), InvalidArgument, id="D2-update"),
    # C24.
    pytest.param(Mounts(key="missing"), NotFound, id="C24-missing"),
    pytest.param(Mounts(key="base"), FailedPrecondition, id="C24-committed"),
    pytest.param(Mounts(key="top"), FailedPrecondition, id="C24-committed-with-parent"),
    # C28: key missing, name taken, key not active, in this order. C30, C31.
    pytest.param(Commit(name="fresh", key="missing"), NotFound, id="C28-key-missing"),
    pytest.param(Commit(name="base", key="missing"), NotFound, id="C28-key-missing-and-name-taken"),
    pytest.param(Commit(name="base", key="active"), AlreadyExists, id="C28-name-taken-by-committed"),
    pytest.param(Commit(name="view", key="active"), AlreadyExists, id="C28-name-taken-by-view"),
    pytest.param(Commit(name="rootless", key="active"), AlreadyExists, id="C28-name-taken-by-active"),
    pytest.param(Commit(name="base", key="view"), AlreadyExists, id="C28-name-taken-and-key-not-active"),
    pytest.param(Commit(name="top", key="base"), AlreadyExists, id="C28-name-taken-and-key-committed"),
    pytest.param(Commit(name="fresh", key="view"), FailedPrecondition, id="C30-view"),
    pytest.param(Commit(name="fresh", key="bare"), FailedPrecondition, id="C30-view-without-parent"),
    pytest.param(Commit(name="fresh", key="base"), FailedPrecondition, id="C30-committed"),
    pytest.param(Commit(name="active", key="active"), AlreadyExists, id="C31-active"),
    pytest.param(Commit(name="base", key="base"), AlreadyExists, id="C31-committed"),
    # C33, D5: the parent given at commit.
    pytest.param(Commit(name="fresh", key="active", parent="top"), InvalidArgument, id="C33-another-parent"),
    pytest.param(Commit(name="fresh", key="view", parent="top"), FailedPrecondition, id="C33-kind-before-parent"),
    pytest.param(Commit(name="base", key="rootless", parent="missing"), AlreadyExists, id="C33-name-before-parent"),
    pytest.param(Commit(name="fresh", key="rootless", parent="fresh"), InvalidArgument, id="D5-its-own-parent"),
    pytest.param(Commit(name="fresh", key="rootless", parent=TOO_LONG), InvalidArgument, id="D3-commit-parent"),
    # C39, C40.
    pytest.param(Remove(key="missing"), NotFound, id="C39-missing"),
    pytest.param(Remove(key="base"), FailedPrecondition, id="C40-children-of-all-kinds"),
    pytest.param(Remove(key="top"), FailedPrecondition, id="C40-child-is-a-view"),
    # C49, C55, C58.
    pytest.param(UsageOf(key="missing"), NotFound, id="C49-missing"),
    pytest.param(Stat(key="missing"), NotFound, id="C55-missing"),
    pytest.param(Update(name="missing", labels={"a": "b"}), NotFound, id="C55-update-missing"),
    *(
        pytest.param(
            Update(name=name, labels={"color": "blue"}, fieldpaths=paths), InvalidArgument, id=f"C58-{name}-{paths}"
        )
        for name in ("active", "view", "base")
        for paths in (
            ("",),
            ("Labels",),
            ("created_at",),
            ("name",),
            ("parent",),
            ("kind",),
            ("labelsx",),
            ("labels.",),
            ("labels.color", "created_at"),
            ("created_at", "labels"),
        )
    ),
    # C67, C69, D11: a filter outside the grammar is the caller's mistake.
    *(
        pytest.param(Walk(filters=(text,)), InvalidArgument, id=f"C69-{text}")
        for text in ("name==", "name=x", "labels.containerd.io/x", "name==a ,kind==view", '"name', ",", "name==a,")
    ),
    pytest.param(Walk(filters=("name==a", "name=x")), InvalidArgument, id="C69-the-second-of-two"),
    pytest.param(Walk(filters=("name==" + "x" * 4096,)), InvalidArgument, id="filter-too-long"),
    pytest.param(Walk(filters=("name==a",) * 65), InvalidArgument, id="too-many-filters"),
    # The limits of the protocol.
    pytest.param(Walk(page=0), InvalidArgument, id="page-0"),
    pytest.param(Walk(page=10_001), InvalidArgument, id="page-10001"),
    pytest.param(Walk(page=-1), InvalidArgument, id="page-negative"),
    pytest.param(Walk(credit=0), InvalidArgument, id="credit-0"),
    pytest.param(Walk(credit=1025), InvalidArgument, id="credit-1025"),
    pytest.param(Events(since=0, page=0), InvalidArgument, id="events-page-0"),
    pytest.param(Events(since=0, credit=0), InvalidArgument, id="events-credit-0"),
    pytest.param(Events(since=0, topics=("x",) * 65), InvalidArgument, id="too-many-topics"),
    pytest.param(Events(since=1 << 40), OutOfRange, id="events-of-the-future"),
    pytest.param(Events(since=-1), OutOfRange, id="events-before-the-first"),
    pytest.param(Events(since=-(1 << 40)), OutOfRange, id="events-long-before-the-first"),
    pytest.param(Cancel(request=b"nobody"), NotFound, id="cancel-of-nothing"),
    pytest.param(Status(), Unimplemented, id="status-of-a-snapshotter"),
]


@pytest.mark.parametrize(("call", "error"), REFUSALS)
def test_refused_and_nothing_changed(world: World, call: Any, error: type[BrokerError]) -> None:
    (result,) = world.wire.call(call)
    assert type(result) is error, result
    assert str(result)
    world.check_unchanged()


@pytest.mark.parametrize("snapshotter", ["memory"])
@pytest.mark.parametrize(("call", "error"), REFUSALS)
def test_refused_alike_inside_an_atomic_request(world: World, call: Any, error: type[BrokerError]) -> None:
    if isinstance(call, (Walk, Events, Cancel)):
        error = Unimplemented
    if error is Unimplemented and not isinstance(call, Status):
        with pytest.raises(Unimplemented):
            world.wire.call(Stat(key="base"), call, atomic=True)
    else:
        first, second = world.wire.call(Prepare(key="other", parent="base"), call, atomic=True)
        assert type(second) is error, second
        assert isinstance(first, BrokerError)
        assert first.code == "cancelled"
    world.check_unchanged()


REBASES = [
    pytest.param(Commit(name="fresh", key="rootless", parent="missing"), NotFound, id="missing"),
    pytest.param(Commit(name="fresh", key="rootless", parent="view"), FailedPrecondition, id="view"),
    pytest.param(Commit(name="fresh", key="rootless", parent="active"), FailedPrecondition, id="active"),
    pytest.param(Commit(name="fresh", key="rootless", parent="rootless"), FailedPrecondition, id="the-key-itself"),
]


@pytest.mark.parametrize(("call", "error"), REBASES)
def test_c33_a_rebase_onto_what_is_no_parent(
    daemon: Daemon, world: World, snapshotter: str, call: Any, error: type[BrokerError]
) -> None:
    """D9: where the backend cannot rebase at all, that is what is wrong."""
    if "rebase" not in daemon.actor(snapshotter).capabilities:
        error = InvalidArgument
    (result,) = world.wire.call(call)
    assert type(result) is error, result
    world.check_unchanged()


def test_d9_who_can_rebase(daemon: Daemon, snapshotter: str) -> None:
    can = "rebase" in daemon.actor(snapshotter).capabilities
    assert can == (snapshotter in ("memory", "overlayfs"))


def test_d9_a_rebase_where_the_backend_cannot(daemon: Daemon, world: World, snapshotter: str) -> None:
    if "rebase" in daemon.actor(snapshotter).capabilities:
        return
    (result,) = world.wire.call(Commit(name="fresh", key="rootless", parent="base"))
    assert type(result) is InvalidArgument
    assert "rebase" in result.message
    world.check_unchanged()


def test_c40_the_word_remove(world: World) -> None:
    (result,) = world.wire.call(Remove(key="base"))
    assert isinstance(result, FailedPrecondition)
    assert "cannot remove snapshot with child" in result.message


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (Prepare(key="fresh", parent="missing"), "missing"),
        (Prepare(key="fresh", parent="active"), "active"),
        (Prepare(key="base"), "base"),
        (Commit(name="top", key="active"), "top"),
        (Mounts(key="base"), "base"),
        (Update(name="active", fieldpaths=("created_at",)), "created_at"),
        (Walk(filters=("name=x",)), "filter 1"),
    ],
)
def test_a_message_names_what_is_wrong(world: World, call: Any, words: str) -> None:
    (result,) = world.wire.call(call)
    assert isinstance(result, BrokerError)
    assert words in result.message


NAMESPACES = [
    pytest.param("", FailedPrecondition, id="missing"),
    *(
        pytest.param(text, InvalidArgument, id=what)
        for what, text in {
            "version": "version",
            "77-bytes": "n" * 77,
            "slash": "a/b",
            "blank": "a b",
            "two-dots": "a..b",
            "dot-at-the-end": "a.",
            "dash-at-the-beginning": "-a",
            "not-ascii": "é",
            "digits-not-ascii": "٣",
            "newline": "a\n",
            "nul": "a\0b",
        }.items()
    ),
]


@pytest.mark.parametrize(("text", "error"), NAMESPACES)
@pytest.mark.parametrize("call", [Stat(key="base"), Prepare(key="fresh"), Walk(), Events(since=0), Cleanup()])
def test_c70_namespaces(world: World, text: str, error: type[BrokerError], call: Any) -> None:
    with pytest.raises(error):
        world.wire.call(call, namespace=text)
    world.check_unchanged()


@pytest.mark.parametrize("text", ["n" * 76, "a", "7", "a.b-c_d", "Version", "k8s.io"])
def test_c70_legal_namespaces(world: World, text: str) -> None:
    assert world.wire.pages(Walk(), namespace=text)[-1].infos == ()


@pytest.mark.parametrize("timeout", [-1, 24 * 3600 * 1000 + 1])
def test_a_deadline_out_of_range(world: World, timeout: int) -> None:
    with pytest.raises(InvalidArgument, match="timeout_ms"):
        world.wire.call(Prepare(key="fresh"), timeout_ms=timeout)
    world.check_unchanged()


def test_the_target_must_be_known(world: World, snapshotter: str) -> None:
    with pytest.raises(NotFound, match=snapshotter):
        world.wire.call(Stat(key="base"), snapshotter="nobody")


@pytest.mark.parametrize("call", [Stat(key="base"), Prepare(key="fresh"), Walk(), Cleanup(), Events(since=0)])
def test_the_broker_itself_only_knows_status(world: World, call: Any) -> None:
    with pytest.raises(Unimplemented, match="snapshotter"):
        world.wire.one(call, snapshotter="")
    world.check_unchanged()


@pytest.mark.parametrize("call", [Walk(), Events(since=0), Cleanup(), Cancel(request=b"1")])
def test_streams_are_no_part_of_an_atomic_request(world: World, call: Any) -> None:
    with pytest.raises(Unimplemented, match="atomic"):
        world.wire.call(Prepare(key="fresh"), call, atomic=True)
    world.check_unchanged()
