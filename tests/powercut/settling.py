"""What became of clients' requests after a crash: each is there whole or not at all, and a repeat changes nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from snapbroker.contract import Info, Kind
from snapbroker.protocol import Commit, MountsAnswer, Prepare, Remove
from tests.harness import Daemon, Wire
from tests.oracle import timeless
from tests.powercut.books import Books, Happening, Said, Step, Wrote, alike, check_results
from tests.powercut.checks import events_of, happenings, walked
from tests.powercut.client import Client


@dataclass(frozen=True)
class Done:
    """A step that was done, wholly or in part: the numbers of its calls in their order, and what each must answer."""

    step: Step
    numbers: Sequence[int]
    expected: list[Any]


class Settling:
    """The books of several clients, and how they are brought to what a crash has left."""

    daemon: Daemon

    def __init__(self) -> None:
        self.figures: Counter[str] = Counter()
        self.books: dict[str, Books] = {}
        self.sequences: dict[str, int] = {}

    def settle(self, client: Client, before: int, after: int, *, power: bool) -> None:
        """Find out which of a client's steps are there, and bring the client's books to that state.

        It happened between `before` and `after` on the monotonic clock: what was acknowledged before must be there,
        what was sent later cannot be. `power`: what was not flushed was lost too.
        """
        books = self.books[client.name]
        sent = [step for step in client.steps if step.sent <= after]
        certain = [step for step in sent if 0 < step.answered <= before]
        doubtful = sent[len(certain) :]
        for step in certain:
            books.enter(step, certain=True)
        with self.daemon.wire(client.snapshotter, books.oracle.namespace) as wire:
            found = self._match(books, doubtful, self._found(wire))
            there = len(found)
            self.figures["acknowledged"] += sum(isinstance(step, Said) for step in certain)
            self.figures["under way"] += sum(isinstance(step, Said) for step in doubtful)
            self.figures["under way, found"] += sum(isinstance(step, Said) for step in doubtful[:there])
            if power:
                books.lose_power()
            client.books = books
            for done in found:
                self._learn(books, wire, done)
            self._repeat(client, wire, [*certain, *doubtful[:there]], doubtful[there:])

    def _found(self, wire: Wire) -> tuple[list[Info], list[Happening]]:
        infos, _ = walked(wire, wire.namespace)
        events = events_of(wire, self.sequences[wire.snapshotter])
        return [timeless(info) for info in infos.values()], happenings(events, wire.namespace)

    def _match(self, books: Books, doubtful: list[Step], found: tuple[list[Info], list[Happening]]) -> list[Done]:
        """Which of the doubtful steps are there; they are entered.

        A client sends one when it has the reply to the one before, so those that are there are the first ones.
        """
        acknowledged = _told(books)
        done: list[Done] = []
        while not _agree(books, found) and len(done) < len(doubtful):
            step = doubtful[len(done)]
            if isinstance(step, Said) and not step.atomic and len(step.calls) > 1:
                done.append(_enter_part(books, step, found))
            else:
                count = len(step.calls) if isinstance(step, Said) else 0
                done.append(Done(step, range(count), books.enter(step, certain=False)))
        if not _agree(books, found):
            raise AssertionError(
                f"{books.oracle.snapshotter}/{books.oracle.namespace}: (acknowledged, found) "
                f"{_differences(acknowledged[0], found[0])}; last events acknowledged {acknowledged[1][-3:]} of "
                f"{len(acknowledged[1])}, found {found[1][-3:]} of {len(found[1])}; under way {doubtful}"
            )
        for step in doubtful[len(done) :]:
            # Of files that were being written, some may have come as far as the disk.
            if isinstance(step, Wrote):
                books.enter(step, certain=False)
        return done

    def _learn(self, books: Books, wire: Wire, done: Done) -> None:
        """What was done and never answered is answered when it is asked for again, and the rest of it is done."""
        step = done.step
        if not isinstance(step, Said) or not step.token or step.results:
            return
        step.results = wire.call(*step.calls, atomic=step.atomic, token=step.token)
        there = list(done.numbers)
        check_results(_part(step, there), done.expected)
        rest = [number for number in range(len(step.calls)) if number not in there]
        if rest:
            check_results(_part(step, rest), books.say(_part(step, rest)))
            self.figures["requests done in part"] += 1

    def _repeat(self, client: Client, wire: Wire, there: list[Step], absent: list[Step]) -> None:
        """Every token again: the first answers, and of what had not happened, the effect."""
        for step in there:
            if isinstance(step, Said) and step.token:
                results = wire.call(*step.calls, atomic=step.atomic, token=step.token)
                assert alike(results, step.results), f"{step}: the repeat was answered {results}"
                self.figures["repeats"] += 1
        for step in absent:
            if isinstance(step, Said) and step.token:
                step.results = wire.call(*step.calls, atomic=step.atomic, token=step.token)
                check_results(step, client.books.say(step))
                again = wire.call(*step.calls, atomic=step.atomic, token=step.token)
                assert alike(again, step.results), f"{step}: the repeat was answered {again}"
                self.figures["repeats executed"] += 1

    def go_on(self, client: Client) -> None:
        """Prepare, commit and remove at once, whatever the load will do."""
        books = client.books
        (parent, *_) = [*books.names(Kind.COMMITTED), ""]
        (answer,) = client.say(Prepare(key="next", parent=parent))
        assert isinstance(answer, MountsAnswer)
        client.write("next", answer)
        client.say(Commit(name="next-committed", key="next", sync=True))
        client.say(Remove(key="next-committed"))


def _part(step: Said, numbers: Sequence[int]) -> Said:
    """A request of some of the calls."""
    calls = tuple(step.calls[number] for number in numbers)
    results = [step.results[number] for number in numbers] if step.results else []
    return Said(calls, step.sent, step.atomic, step.token, results, step.answered)


def _enter_part(books: Books, step: Said, found: tuple[list[Info], list[Happening]]) -> Done:
    """Enter those of a request's calls that are there."""
    numbers = range(len(step.calls))
    for count in numbers:
        for some in itertools.combinations(numbers, count + 1):
            trial = books.copy()
            expected = trial.enter(_part(step, some), certain=False)
            if _agree(trial, found):
                vars(books).update(vars(trial))
                return Done(step, some, expected)
    return Done(step, numbers, books.enter(step, certain=False))


def _agree(books: Books, found: tuple[list[Info], list[Happening]]) -> bool:
    return _told(books)[0] == found[0] and books.tell(found[1])


def _told(books: Books) -> tuple[list[Info], list[Happening]]:
    return books.oracle.matching(lambda _info: True), books.happened()


def _differences(acknowledged: list[Info], found: list[Info]) -> dict[str, tuple[Info | None, Info | None]]:
    before, after = ({info.name: info for info in infos} for infos in (acknowledged, found))
    names = sorted(before.keys() | after.keys())
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}
