"""Requests of several calls: atomic ones take effect whole or not at all, others call by call."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from snapbroker.blocking import Broker
from snapbroker.contract import Info, Kind
from snapbroker.errors import AlreadyExists, BrokerError, Cancelled, FailedPrecondition, NotFound
from snapbroker.protocol import (
    CALLS_MAX,
    Commit,
    Empty,
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
from tests.harness import Daemon, Result, Wire


def look(wire: Wire) -> tuple[list[Info], list[Any]]:
    """All snapshots and all events of the namespace."""
    walk, events = wire.pages(Walk()), wire.pages(Events(since=0))
    return (
        [info for page in walk for info in page.infos],
        [event for page in events for event in page.events],
    )


def succeeded(results: list[Result]) -> list[Any]:
    assert not [result for result in results if isinstance(result, BrokerError)], results
    return results


@pytest.fixture
def base(broker: Broker) -> str:
    """A committed snapshot."""
    broker.prepare("making base")
    broker.commit("base", "making base")
    return "base"


class TestAll:
    """What takes effect together."""

    def test_commit_and_go_on_from_it(self, broker: Broker, wire: Wire, base: str) -> None:
        """The story of the design: commit A, then prepare B and C from it, in one transaction."""
        broker.prepare("a", base)
        committed, b, c, a = succeeded(
            wire.call(
                Commit(name="A", key="a"), Prepare(key="b", parent="A"), View(key="c", parent="A"), Stat(key="A"),
                atomic=True,
            )
        )  # fmt: skip
        assert committed == Empty()
        assert list(b.mounts) == broker.mounts("b")
        assert list(c.mounts) == broker.mounts("c")
        assert a == broker.stat("A")
        assert a.kind is Kind.COMMITTED
        # One transaction, one time.
        assert broker.stat("b").created == broker.stat("c").created == a.created

    def test_a_whole_life(self, wire: Wire) -> None:
        results = succeeded(
            wire.call(
                Prepare(key="key"),
                Update(name="key", labels={"a": "b"}),
                Commit(name="name", key="key"),
                Prepare(key="key", parent="name"),
                Remove(key="key"),
                Remove(key="name"),
                atomic=True,
            )
        )
        assert isinstance(results[0], MountsAnswer)
        infos, events = look(wire)
        assert infos == []
        assert [event.verb for event in events] == ["prepare", "update", "commit", "prepare", "remove", "remove"]
        assert [event.sequence - events[0].sequence for event in events] == list(range(6))

    def test_a_commit_and_its_key_again(self, wire: Wire) -> None:
        """What the request itself holds is in nobody's way but others'."""
        wire.one(Prepare(key="key"))
        succeeded(wire.call(Commit(name="name", key="key"), Prepare(key="key"), Remove(key="key"), atomic=True))
        infos, _ = look(wire)
        assert [info.name for info in infos] == ["name"]

    def test_a_commit_removed(self, wire: Wire, base: str) -> None:
        wire.one(Prepare(key="key", parent=base))
        succeeded(wire.call(Commit(name="name", key="key"), Remove(key="name"), Remove(key=base), atomic=True))
        assert look(wire)[0] == []

    def test_a_child_and_its_parent_removed(self, wire: Wire, base: str) -> None:
        succeeded(wire.call(Prepare(key="child", parent=base), Remove(key="child"), Remove(key=base), atomic=True))
        assert look(wire)[0] == []

    def test_a_name_given_on(self, wire: Wire, base: str) -> None:
        """A committed name replaced by its successor, with nobody ever seeing it gone."""
        wire.one(Prepare(key="new"))
        succeeded(wire.call(Remove(key=base), Commit(name=base, key="new", labels={"new": "yes"}), atomic=True))
        assert wire.one(Stat(key=base)).labels == {"new": "yes"}

    def test_a_chain_of_layers(self, broker: Broker, wire: Wire) -> None:
        calls: list[Any] = []
        for depth in range(8):
            parent = f"layer-{depth - 1}" if depth else ""
            calls += [Prepare(key="job", parent=parent), Commit(name=f"layer-{depth}", key="job")]
        succeeded(wire.call(*calls, Prepare(key="top", parent="layer-7"), atomic=True))
        assert [info.parent for info in broker.walk("kind==committed")] == ["", *(f"layer-{n}" for n in range(7))]
        (mounts,) = [m.mounts for m in wire.call(Mounts(key="top")) if isinstance(m, MountsAnswer)]
        assert list(mounts) == broker.mounts("top")

    def test_reads_see_what_the_calls_before_them_wrote(self, wire: Wire) -> None:
        results = wire.call(
            Prepare(key="a", labels={"n": "1"}), Stat(key="a"), Update(name="a", labels={"n": "2"}), Stat(key="a"),
            UsageOf(key="a"), Mounts(key="a"), atomic=True,
        )  # fmt: skip
        prepared, first, updated, second, usage, mounts = succeeded(results)
        assert first.labels == {"n": "1"}
        assert second == updated
        assert second.labels == {"n": "2"}
        assert mounts == prepared
        assert usage == wire.one(UsageOf(key="a"))

    def test_one_call_is_as_good_as_none_of_that(self, wire: Wire) -> None:
        assert isinstance(wire.one(Prepare(key="a"), atomic=True), MountsAnswer)
        with pytest.raises(AlreadyExists):
            wire.one(Prepare(key="a"), atomic=True)

    def test_as_many_as_there_may_be(self, wire: Wire) -> None:
        succeeded(wire.call(*(View(key=f"look-{number}") for number in range(200)), atomic=True))
        assert len(look(wire)[0]) == 200


class TestNone:
    """What does not take effect, because something else in the request cannot."""

    @pytest.mark.parametrize("where", [0, 1, 3, 6])
    def test_one_that_fails_takes_back_all(self, wire: Wire, base: str, where: int) -> None:
        wire.one(Prepare(key="job", parent=base, labels={"a": "b"}))
        before = look(wire)
        calls: list[Any] = [
            Prepare(key="one", parent=base),
            Update(name="job", labels={}),
            Commit(name="layer", key="job"),
            View(key="two", parent="layer"),
            Remove(key="one"),
            Update(name=base, labels={"changed": "yes"}),
        ]
        calls.insert(where, Remove(key="missing"))
        results = wire.call(*calls, atomic=True)
        assert isinstance(results[where], NotFound)
        for index, result in enumerate(results):
            assert isinstance(result, Cancelled if index != where else NotFound)
            assert "call" in str(result) or index == where
        assert look(wire) == before

    def test_the_same_again_without_what_failed(self, wire: Wire, base: str) -> None:
        """What was made for the failed request is in nobody's way."""
        wire.one(Prepare(key="job", parent=base))
        calls: list[Any] = [
            Commit(name="layer", key="job"),
            Prepare(key="job", parent="layer"),
            View(key="look", parent=base),
        ]
        for _ in range(3):
            assert isinstance(wire.call(*calls, Stat(key="missing"), atomic=True)[-1], NotFound)
        succeeded(wire.call(*calls, atomic=True))

    def test_its_own_key_twice(self, wire: Wire) -> None:
        first, second = wire.call(Prepare(key="a"), Prepare(key="a"), atomic=True)
        assert isinstance(first, Cancelled)
        assert isinstance(second, AlreadyExists)
        assert look(wire) == ([], [])

    def test_a_parent_that_got_a_child_just_before(self, wire: Wire, base: str) -> None:
        before = look(wire)
        _, removed = wire.call(Prepare(key="child", parent=base), Remove(key=base), atomic=True)
        assert isinstance(removed, FailedPrecondition)
        assert look(wire) == before

    def test_events_go_on_without_a_gap(self, wire: Wire, base: str) -> None:
        """A request that was dropped used no sequence, and the topics' chains do not lead through it."""
        wire.one(Prepare(key="a"))
        wire.call(Prepare(key="b"), View(key="v"), Remove(key="a"), Remove(key="missing"), atomic=True)
        wire.one(Prepare(key="c"))
        wire.one(View(key="w"))
        _, events = look(wire)
        assert [(event.verb, event.key) for event in events[-3:]] == [("prepare", "a"), ("prepare", "c"), ("view", "w")]
        assert events[-2].previous == events[-3].sequence
        assert events[-2].sequence == events[-3].sequence + 1


class TestSeveral:
    """Calls that merely travel together."""

    def test_each_has_its_own_outcome(self, wire: Wire, base: str) -> None:
        results = wire.call(
            Prepare(key="a", parent=base), Prepare(key="a"), Prepare(key="b", parent="missing"), View(key="v"),
            Stat(key=base), Stat(key="missing"), Remove(key="missing"),
        )  # fmt: skip
        kinds = [type(result) for result in results]
        assert kinds == [MountsAnswer, AlreadyExists, NotFound, MountsAnswer, Info, NotFound, NotFound]

    def test_streams_and_calls_in_one_request(self, wire: Wire, base: str) -> None:
        walk, stat, events, usage = wire.call(Walk(), Stat(key=base), Events(since=0), UsageOf(key=base))
        assert walk.infos == (stat,)  # type: ignore[union-attr]
        assert [event.verb for event in events.events] == ["prepare", "commit"]  # type: ignore[union-attr]
        assert not isinstance(usage, BrokerError)

    def test_the_most_calls_there_may_be(self, wire: Wire, base: str) -> None:
        results = wire.call(*[Stat(key=base)] * CALLS_MAX)
        assert results == [results[0]] * CALLS_MAX
        with pytest.raises(BrokerError) as raised:
            wire.call(*[Stat(key=base)] * (CALLS_MAX + 1))
        assert raised.value.code == "invalid_argument"

    def test_the_batch_of_the_client(self, broker: Broker, base: str) -> None:
        batch = broker.batch()
        one, taken = batch.prepare("one", base), batch.prepare(base)
        with pytest.raises(AlreadyExists), batch:
            """Sent at the end of the block."""
        assert one.result() == broker.mounts("one")
        assert isinstance(taken.error(), AlreadyExists)

    def test_the_atomic_batch_of_the_client(self, broker: Broker, base: str) -> None:
        batch = broker.batch(atomic=True)
        batch.prepare("one", base)
        batch.prepare(base)
        with pytest.raises(AlreadyExists), batch:
            """Sent at the end of the block."""
        assert [info.name for info in broker.walk()] == [base]


class TestAtTheSameTime:
    """Many callers, one truth."""

    def test_one_of_many_gets_the_name(self, daemon: Daemon, snapshotter: str, namespace: str) -> None:
        outcomes: list[Result] = []

        def caller() -> None:
            with daemon.wire(snapshotter, namespace) as wire:
                for number in range(5):
                    outcomes.extend(wire.call(Prepare(key=f"key-{number}")))

        run_all([caller] * 8)
        winners = [outcome for outcome in outcomes if isinstance(outcome, MountsAnswer)]
        assert len(winners) == 5
        assert all(isinstance(outcome, MountsAnswer | AlreadyExists) for outcome in outcomes)
        with daemon.wire(snapshotter, namespace) as wire:
            infos, events = look(wire)
            assert [info.name for info in infos] == [f"key-{number}" for number in range(5)]
            assert len(events) == 5
            assert {wire.one(Mounts(key=info.name)).mounts for info in infos} == {w.mounts for w in winners}

    def test_one_of_many_commits(self, daemon: Daemon, snapshotter: str, namespace: str) -> None:
        outcomes: list[Result] = []
        with daemon.wire(snapshotter, namespace) as wire:
            wire.one(Prepare(key="job"))

            def committer(number: int) -> None:
                with daemon.wire(snapshotter, namespace) as own:
                    outcomes.extend(own.call(Commit(name=f"layer-{number}", key="job")))

            run_all([lambda number=number: committer(number) for number in range(8)])
            assert [outcome for outcome in outcomes if not isinstance(outcome, BrokerError)] == [Empty()]
            assert {type(outcome) for outcome in outcomes} <= {Empty, NotFound, FailedPrecondition}
            infos, events = look(wire)
            assert len(infos) == 1
            assert [event.verb for event in events] == ["prepare", "commit"]

    def test_a_parent_goes_or_gets_a_child_never_both(self, daemon: Daemon, snapshotter: str, namespace: str) -> None:
        for number in range(10):
            base, child = f"base-{number}", f"child-{number}"
            with daemon.wire(snapshotter, namespace) as wire:
                wire.one(Prepare(key="job"))
                wire.one(Commit(name=base, key="job"))
                outcomes: dict[str, Result] = {}

                def prepare(base: str = base, child: str = child, outcomes: dict[str, Result] = outcomes) -> None:
                    with daemon.wire(snapshotter, namespace) as own:
                        (outcomes["prepare"],) = own.call(Prepare(key=child, parent=base))

                def remove(base: str = base, outcomes: dict[str, Result] = outcomes) -> None:
                    with daemon.wire(snapshotter, namespace) as own:
                        (outcomes["remove"],) = own.call(Remove(key=base))

                run_all([prepare, remove])
                names = {info.name for info in look(wire)[0]}
                if isinstance(outcomes["prepare"], MountsAnswer):
                    assert isinstance(outcomes["remove"], FailedPrecondition)
                    assert {base, child} <= names
                else:
                    assert isinstance(outcomes["prepare"], NotFound)
                    assert outcomes["remove"] == Empty()
                    assert not {base, child} & names

    def test_atomic_requests_do_not_mix(self, daemon: Daemon, snapshotter: str, namespace: str) -> None:
        """Each takes a name that others want too, and fails whole or leaves its four events side by side."""
        done: list[str] = []

        def caller(number: int) -> None:
            with daemon.wire(snapshotter, namespace) as wire:
                for attempt in range(5):
                    name = f"done-{number}-{attempt}"
                    results = wire.call(
                        Prepare(key="wanted"), Prepare(key=f"mine-{number}"), Remove(key="wanted"),
                        Commit(name=name, key=f"mine-{number}"), atomic=True,
                    )  # fmt: skip
                    if not [result for result in results if isinstance(result, BrokerError)]:
                        done.append(name)

        run_all([lambda number=number: caller(number) for number in range(4)])
        with daemon.wire(snapshotter, namespace) as wire:
            infos, events = look(wire)
            assert [info.name for info in infos] == sorted(done)
            assert done
            assert [event.verb for event in events] == ["prepare", "prepare", "remove", "commit"] * len(done)


def run_all(callers: list[Any]) -> None:
    """Run them in threads at the same time; what one raises is raised."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(callers))

    def run(caller: Any) -> None:
        try:
            barrier.wait(10)
            caller()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(caller,)) for caller in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
