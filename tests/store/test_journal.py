"""The journal: numbers without a gap, chains by topic, what is dropped by count and by age, pages."""

from __future__ import annotations

from typing import Any

import pytest

from broker.store import Environment, Journal, Retention
from broker.store.records import encode_info
from snapbroker.contract import Event, Info, Kind
from snapbroker.errors import Internal, OutOfRange
from snapbroker.protocol import decode_event
from tests.oracle import check_chains

SECOND = 1_000_000_000
Change = tuple[str, str]
"""Namespace and verb."""


def journal_of(environment: Environment, **retention: int) -> Journal:
    return Journal(environment, "sn", Retention(**retention))


def write(environment: Environment, journal: Journal, *changes: Change, now: int = 0) -> list[Event]:
    """One turn with these events; what is to be published."""
    turns: list[Any] = []

    def work(txn: Any) -> None:
        turn = journal.begin()
        for namespace, verb in changes:
            info = b"" if verb == "remove" else encode_info(Info("key", Kind.ACTIVE))
            turn.append(txn, now, namespace, verb, "key", info)
        turn.finish(txn, now)
        turns[:] = [turn]

    environment.write(work)
    journal.settle(turns[0])
    published = [(topic, sequence, decode_event(body)) for topic, sequence, body in turns[0].entries]
    assert [(event.topic, event.sequence) for _, _, event in published] == [(t, s) for t, s, _ in published]
    return [event for _, _, event in published]


def kept(environment: Environment, journal: Journal, since: int | None = None, *topics: str) -> list[Event]:
    """What is in the journal above `since`, or all of it."""
    with environment.read() as txn:
        if since is None:
            since = journal.bounds(txn)[0] - 1
        bodies, _ = journal.page(txn, since, topics, 1 << 30, 1 << 30, 1 << 30)
    return [decode_event(body) for body in bodies]


def test_an_empty_journal(environment: Environment) -> None:
    journal = journal_of(environment)
    with environment.read() as txn:
        assert journal.bounds(txn) == (1, 0)
        assert journal.newest_in(txn) == 0
    assert kept(environment, journal) == []
    journal.check(0, 1, 0)
    with pytest.raises(OutOfRange):
        journal.check(1, 1, 0)


@pytest.mark.parametrize("verb", ["prepare", "remove"])
def test_an_event_with_and_without_an_info(environment: Environment, verb: str) -> None:
    journal = journal_of(environment)
    (event,) = write(environment, journal, ("ns", verb), now=77)
    assert kept(environment, journal) == [event]
    assert (event.sequence, event.previous, event.time, event.snapshotter) == (1, 0, 77, "sn")
    assert (event.info is None) == (verb == "remove")


def test_numbers_and_chains(environment: Environment) -> None:
    journal = journal_of(environment)
    told: list[Event] = []
    for _ in range(3):
        told += write(environment, journal, ("a", "prepare"), ("b", "prepare"), ("a", "prepare"), ("a", "remove"))
        told += write(environment, journal)
        told += write(environment, journal, ("b", "prepare"))
    assert [event.sequence for event in told] == list(range(1, 16))
    check_chains(told)
    assert kept(environment, journal) == told


def test_they_go_on_after_a_restart(environment: Environment) -> None:
    told = write(environment, journal_of(environment), ("a", "prepare"), ("a", "remove"))
    told += write(environment, journal_of(environment), ("a", "remove"), ("a", "prepare"))
    assert [event.sequence for event in told] == [1, 2, 3, 4]
    check_chains(told)


def test_a_turn_that_was_not_committed_never_was(environment: Environment) -> None:
    journal = journal_of(environment)
    told = write(environment, journal, ("a", "prepare"))

    def work(txn: Any) -> None:
        turn = journal.begin()
        turn.append(txn, 0, "a", "prepare", "key")
        turn.finish(txn, 0)
        raise KeyError("wrong")

    with pytest.raises(KeyError):
        environment.write(work)
    told += write(environment, journal, ("a", "prepare"))
    assert [event.sequence for event in told] == [1, 2]
    check_chains(told)
    assert kept(environment, journal) == told


def test_rewound_events_never_were(environment: Environment) -> None:
    """An atomic request in the middle of a turn is dropped with its child transaction."""
    journal = journal_of(environment)

    def fail_in_a_child(txn: Any, turn: Any) -> None:
        with environment.nested(txn) as child:
            turn.append(child, 0, "a", "prepare", "two")
            turn.append(child, 0, "b", "view", "three")
            raise KeyError("wrong")

    def work(txn: Any) -> Any:
        turn = journal.begin()
        turn.append(txn, 0, "a", "prepare", "one")
        mark = turn.mark()
        with pytest.raises(KeyError):
            fail_in_a_child(txn, turn)
        turn.rewind(mark)
        turn.append(txn, 0, "a", "prepare", "four")
        turn.finish(txn, 0)
        return turn

    journal.settle(environment.write(work))
    told = kept(environment, journal)
    assert [(event.sequence, event.previous, event.key) for event in told] == [(1, 0, "one"), (2, 1, "four")]
    (later,) = write(environment, journal, ("b", "view"))
    assert (later.sequence, later.previous) == (3, 0)


@pytest.mark.parametrize("events_max", [1, 2, 10, 99])
def test_the_oldest_go_by_count(environment: Environment, events_max: int) -> None:
    journal = journal_of(environment, events_max=events_max)
    for number in range(1, 101):
        write(environment, journal, ("a", "prepare" if number % 3 else "remove"))
        sequences = [event.sequence for event in kept(environment, journal)]
        assert sequences == list(range(max(1, number - events_max + 1), number + 1))
        assert journal.oldest == sequences[0]
        with environment.read() as txn:
            assert journal.bounds(txn) == (sequences[0], number)


def test_a_turn_larger_than_the_journal(environment: Environment) -> None:
    journal = journal_of(environment, events_max=5)
    write(environment, journal, *[("a", "prepare")] * 300)
    assert [event.sequence for event in kept(environment, journal)] == [296, 297, 298, 299, 300]


def test_the_oldest_go_by_age(environment: Environment) -> None:
    journal = journal_of(environment, age_max_s=10)
    for number in range(30):
        write(environment, journal, ("a", "prepare"), now=number * SECOND)
        times = [event.time // SECOND for event in kept(environment, journal)]
        assert times == list(range(max(0, number - 10), number + 1))


def test_the_newest_stays_however_old(environment: Environment) -> None:
    """Its number is where the next one goes on."""
    journal = journal_of(environment, age_max_s=1)
    write(environment, journal, ("a", "prepare"), ("a", "remove"), now=0)
    write(environment, journal, ("b", "view"), now=10**9 * SECOND)
    assert [event.sequence for event in kept(environment, journal)] == [3]
    write(environment, journal, now=2 * 10**9 * SECOND)
    assert [event.sequence for event in kept(environment, journal)] == [3]
    (event,) = write(environment, journal_of(environment, age_max_s=1), ("a", "prepare"), now=3 * 10**9 * SECOND)
    assert (event.sequence, event.previous) == (4, 1)


def test_a_lowered_limit_is_reached_in_steps(environment: Environment) -> None:
    """No turn drops so much that its callers would notice, and soon it is done."""
    journal = journal_of(environment)
    for _ in range(10):
        write(environment, journal, *[("a", "prepare")] * 100)
    lowered = journal_of(environment, events_max=10)
    counts = []
    while len(kept(environment, lowered)) > 10:
        write(environment, lowered, ("a", "prepare"))
        counts.append(len(kept(environment, lowered)))
        assert len(counts) < 100
    dropped = [before - after + 1 for before, after in zip([1000, *counts], counts, strict=False)]
    assert max(dropped) <= 100
    assert kept(environment, lowered)[-1].sequence == 1000 + len(counts)


def test_what_can_be_asked_for(environment: Environment) -> None:
    journal = journal_of(environment)
    for since in (9, 10, 19, 20):
        journal.check(since, 10, 20)
    for since in (-1, 0, 8, 21, 1 << 62):
        with pytest.raises(OutOfRange) as raised:
            journal.check(since, 10, 20)
        assert raised.value.details == {"oldest": 10, "newest": 20}


class TestPages:
    """Pages of a journal of 12 events on three topics."""

    @pytest.fixture
    def journal(self, environment: Environment) -> Journal:
        journal = journal_of(environment)
        write(environment, journal, *[("a", "prepare"), ("a", "remove"), ("b", "prepare")] * 4)
        return journal

    @pytest.mark.parametrize("count", [1, 2, 5, 11, 12, 13])
    def test_by_count(self, environment: Environment, journal: Journal, count: int) -> None:
        found: list[int] = []
        since = 0
        while since < 12:
            with environment.read() as txn:
                bodies, reached = journal.page(txn, since, (), count, 1000, 1 << 30)
            assert 0 < len(bodies) <= count
            found += [decode_event(body).sequence for body in bodies]
            assert reached == found[-1]
            since = reached
        assert found == list(range(1, 13))

    @pytest.mark.parametrize("scan_max", [1, 2, 3, 100])
    def test_by_what_is_looked_at(self, environment: Environment, journal: Journal, scan_max: int) -> None:
        """A page of a rare topic may be empty, and says how far it has looked."""
        found: list[int] = []
        since = 0
        while since < 12:
            with environment.read() as txn:
                bodies, reached = journal.page(txn, since, ("sn/b/",), 1000, scan_max, 1 << 30)
            assert since < reached <= since + scan_max
            found += [decode_event(body).sequence for body in bodies]
            since = reached
        assert found == [3, 6, 9, 12]

    def test_by_bytes(self, environment: Environment, journal: Journal) -> None:
        with environment.read() as txn:
            whole, _ = journal.page(txn, 0, (), 1000, 1000, 1 << 30)
            part, reached = journal.page(txn, 0, (), 1000, 1000, sum(map(len, whole[:5])) - 1)
            assert part == whole[:5]
            assert reached == 5
            assert journal.page(txn, 0, (), 1000, 1000, 1) == (whole[:1], 1)

    @pytest.mark.parametrize(
        ("topics", "expected"),
        [
            ((), range(1, 13)),
            (("",), range(1, 13)),
            (("sn/",), range(1, 13)),
            (("sn/a/snapshot/prepare",), [1, 4, 7, 10]),
            (("sn/a/snapshot/",), [1, 2, 4, 5, 7, 8, 10, 11]),
            (("sn/b/", "sn/a/snapshot/remove"), [2, 3, 5, 6, 8, 9, 11, 12]),
            (("other/",), []),
        ],
    )
    def test_by_topic(
        self, environment: Environment, journal: Journal, topics: tuple[str, ...], expected: list[int]
    ) -> None:
        assert [event.sequence for event in kept(environment, journal, 0, *topics)] == list(expected)


def damage(environment: Environment, sequence: int, body: bytes = b"\x82\xa4time") -> None:
    environment.write(lambda txn: txn.put(sequence.to_bytes(8, "big"), body, db=environment.journal))


def test_a_damaged_event_is_told_by_its_number(environment: Environment) -> None:
    journal = journal_of(environment)
    write(environment, journal, ("a", "prepare"), ("a", "prepare"), ("a", "prepare"))
    damage(environment, 2)
    assert [event.sequence for event in kept(environment, journal, 2, "sn/a/")] == [3]
    with pytest.raises(Internal, match="event 2 of the journal is damaged"):
        kept(environment, journal, 0, "sn/a/")


def test_a_damaged_event_does_not_end_the_turns_that_come_to_it(environment: Environment) -> None:
    """It is dropped when it is the oldest: whoever asks for it is told to walk."""
    journal = journal_of(environment)
    write(environment, journal, ("a", "prepare"), ("a", "prepare"), now=SECOND)
    damage(environment, 1)
    write(environment, journal, ("a", "prepare"), now=SECOND)
    assert [event.sequence for event in kept(environment, journal)] == [2, 3]
    assert journal.oldest == 2
    with pytest.raises(OutOfRange):
        journal.check(0, journal.oldest, journal.newest)
