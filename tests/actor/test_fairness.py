"""Fairness between clients, without sockets: whatever comes in whatever order, windows, limits and order hold."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.actor.fairness import ABOUT_NS, PACE_NS, REQUEST_BYTES, RETRY_MS_MAX, Admission, FairQueue, Mix, Pace
from snapbroker.errors import InvalidArgument, ResourceExhausted

MS = 1_000_000


@dataclass(frozen=True)
class Limits:
    open_requests_max: int = 40
    open_bytes_max: int = 100_000
    client_requests_max: int = 30
    client_bytes_max: int = 60_000
    window_bytes: int = 2000
    window_shared_bytes: int = 400


def admit(admission: Admission, client: bytes, number: int, size: int = 36, now: int = 0) -> bool:
    return admission.admit(client, b"%d" % number, size, (client, b"%d" % number), now)


class TestAdmission:
    def test_a_lone_client_has_a_wide_window_and_half_of_the_room(self) -> None:
        admission = Admission("x", Limits())
        handed = [admit(admission, b"a", number) for number in range(20)]
        assert handed == [True] * 20
        with pytest.raises(ResourceExhausted) as caught:
            admit(admission, b"a", 20)
        assert caught.value.details["position"] == 20
        assert caught.value.details["retry_after_ms"] >= 1
        # There is room for the next one, whatever the first does.
        assert admit(admission, b"b", 0)
        assert admission.statistics()["open"] == 21

    def test_what_is_beyond_the_window_waits_for_its_own_client_only(self) -> None:
        admission = Admission("x", Limits(window_shared_bytes=2 * (36 + REQUEST_BYTES)))
        assert admit(admission, b"b", 0)
        assert [admit(admission, b"a", number) for number in range(4)] == [True, True, False, False]
        assert admit(admission, b"b", 1)
        assert list(admission.done(b"b", b"0", 1)) == []
        assert list(admission.done(b"a", b"0", 1)) == [(b"a", b"2")]
        assert list(admission.done(b"a", b"1", 1)) == [(b"a", b"3")]
        assert admission.waiting == 0

    def test_a_window_is_wide_again_when_the_others_are_gone(self) -> None:
        admission = Admission("x", Limits(window_shared_bytes=100))
        assert admit(admission, b"b", 0)
        assert [admit(admission, b"a", number) for number in range(4)] == [True, False, False, False]
        assert list(admission.done(b"b", b"0", 1)) == []
        assert list(admission.done(b"a", b"0", 2)) == [(b"a", b"1")]
        assert list(admission.done(b"a", b"1", 2 + 2 * ABOUT_NS)) == [(b"a", b"2"), (b"a", b"3")]

    def test_what_is_set_aside_fills_no_window(self) -> None:
        admission = Admission("x", Limits(window_shared_bytes=100))
        assert admit(admission, b"b", 0)
        assert [admit(admission, b"a", number) for number in range(3)] == [True, False, False]
        assert list(admission.set_aside(b"a", b"0")) == [(b"a", b"1")]
        assert list(admission.set_aside(b"a", b"0")) == []
        assert list(admission.done(b"a", b"0", 1)) == []
        assert list(admission.done(b"a", b"1", 1)) == [(b"a", b"2")]

    def test_an_id_that_is_open_is_refused_and_the_first_goes_on(self) -> None:
        admission = Admission("x", Limits())
        assert admit(admission, b"a", 1)
        with pytest.raises(InvalidArgument):
            admit(admission, b"a", 1)
        assert admit(admission, b"b", 1)
        assert admission.open == 2

    def test_the_end_of_the_actor_tells_what_it_had_from_what_it_had_not(self) -> None:
        admission = Admission("x", Limits(window_shared_bytes=100))
        admit(admission, b"b", 0)
        for number in range(3):
            admit(admission, b"a", number)
        handed, kept = admission.clear()
        assert sorted(handed) == [(b"a", b"0"), (b"b", b"0")]
        assert kept == [(b"a", b"1"), (b"a", b"2")]
        assert admission.statistics()["open"] == admission.statistics()["bytes"] == admission.waiting == 0
        assert list(admission.done(b"a", b"0", 1)) == []

    @given(
        st.lists(
            st.tuples(st.sampled_from("abc"), st.sampled_from("+-="), st.integers(1, 3000), st.integers(0, 400)),
            max_size=200,
        )
    )
    def test_whatever_comes_the_limits_and_the_order_hold(self, steps: list[tuple[str, str, int, int]]) -> None:
        limits = Limits()
        admission = Admission("x", limits)
        now = 0
        sent: dict[bytes, list[int]] = defaultdict(list)
        accepted: dict[bytes, list[int]] = defaultdict(list)
        in_hands: dict[bytes, dict[int, int]] = defaultdict(dict)
        sizes: dict[tuple[bytes, int], int] = {}

        def goes(client: bytes, number: int) -> None:
            others = sum(in_hands[client].values())
            in_hands[client][number] = sizes[client, number] + REQUEST_BYTES
            assert not others or sum(in_hands[client].values()) <= limits.window_bytes
            sent[client].append(number)

        for number, (name, kind, size, passed) in enumerate(steps):
            client = name.encode()
            now += passed * MS
            if kind == "+":
                sizes[client, number] = size
                refused: ResourceExhausted | None = None
                try:
                    at_once = admit(admission, client, number, size, now)
                except ResourceExhausted as error:
                    refused = error
                if refused is not None:
                    assert 1 <= refused.details["retry_after_ms"] <= RETRY_MS_MAX
                    continue
                accepted[client].append(number)
                if at_once:
                    goes(client, number)
            elif in_hands[client]:
                oldest = min(in_hands[client])
                if kind == "-":
                    del in_hands[client][oldest]
                    frames = admission.done(client, b"%d" % oldest, now)
                else:
                    in_hands[client][oldest] = 0
                    frames = admission.set_aside(client, b"%d" % oldest)
                for other, request in frames:
                    assert other == client
                    goes(client, int(request))
            figures = admission.statistics()
            assert figures["open"] <= limits.open_requests_max
            assert figures["bytes"] <= limits.open_bytes_max
        for client, numbers in accepted.items():
            # In their order, and nobody waits who has nothing in the actor's hands.
            assert sent[client] == numbers[: len(sent[client])]
            assert in_hands[client] or sent[client] == numbers


class TestPace:
    def test_those_who_are_refused_come_back_one_after_the_other(self) -> None:
        pace = Pace(0)
        for number in range(1, 101):
            pace.done(number * 2 * MS)
        times = [pace.promise(200 * MS)[0] for _ in range(10)]
        assert times == [2 * number + 1 for number in range(1, 11)]
        assert pace.promise(200 * MS)[1] == 10

    def test_where_nothing_is_done_it_takes_as_long_as_that(self) -> None:
        pace = Pace(0)
        assert pace.promise(0)[0] <= 2
        assert pace.promise(10 * PACE_NS)[0] >= 10 * PACE_NS // MS

    def test_rest_is_no_slowness(self) -> None:
        pace = Pace(0)
        for number in range(101):
            pace.done(number * MS)
        pace.rests(100 * MS)
        pace.resumes(3_600_000 * MS)
        assert pace.gap(3_600_001 * MS) <= 2 * MS


class TestMix:
    def test_two_who_take_turns_are_several_for_a_second(self) -> None:
        now = 0
        mix = Mix(lambda: now)
        assert not mix.shared
        mix.see(b"a")
        now += ABOUT_NS
        mix.see(b"a")
        assert not mix.shared
        mix.see(b"b")
        assert not mix.shared
        mix.see(b"a")
        assert mix.shared
        now += ABOUT_NS - 1
        assert mix.shared
        now += 1
        assert not mix.shared

    def test_one_who_takes_over_from_another_is_alone(self) -> None:
        now = 0
        mix = Mix(lambda: now)
        for line in (b"a", b"a", b"b", b"b"):
            mix.see(line)
            assert not mix.shared
        now += ABOUT_NS
        mix.see(b"c")
        assert not mix.shared


class TestFairQueue:
    def test_one_who_floods_is_served_in_turn_with_the_others(self) -> None:
        queue: FairQueue[str] = FairQueue(quantum=2)
        for number in range(1000):
            queue.append(b"flood", f"flood-{number}")
        queue.append(b"good", "good-0")
        queue.append(b"good", "good-1")
        assert queue.take(6) == ["flood-0", "flood-1", "good-0", "good-1", "flood-2", "flood-3"]
        assert len(queue) == 996
        assert queue.waiting(b"flood") == 996

    def test_with_once_a_flood_is_no_more_than_a_turn_of_its_line(self) -> None:
        queue: FairQueue[str] = FairQueue(quantum=2)
        for number in range(1000):
            queue.append(b"flood", f"flood-{number}")
        queue.append(b"good", "good-0")
        assert queue.take(100, once=True) == ["flood-0", "flood-1", "good-0"]
        assert queue.take(100, once=True) == ["flood-2", "flood-3"]
        queue.append(b"flood", "large", 50, first=True)
        assert queue.take(100, once=True) == ["large"]

    def test_what_comes_back_goes_before_what_else_is_in_its_line(self) -> None:
        queue: FairQueue[str] = FairQueue(quantum=2)
        queue.append(b"a", "second")
        queue.append(b"a", "first", first=True)
        queue.append(b"b", "other")
        assert queue.take(10) == ["first", "second", "other"]

    def test_what_costs_much_is_served_as_often_as_it_pays_for(self) -> None:
        queue: FairQueue[str] = FairQueue(quantum=8)
        for number in range(20):
            queue.append(b"large", "L", 64)
            for _ in range(8):
                queue.append(b"small", f"s{number}")
        taken = queue.take(400)
        # Equal parts of 400, as nearly as pieces of 64 allow.
        assert taken.count("L") in (2, 3, 4)

    @given(
        st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.integers(1, 40)), max_size=80),
        st.integers(1, 100),
    )
    def test_everything_comes_out_once_and_in_its_order(self, items: list[tuple[bytes, int]], budget: int) -> None:
        queue: FairQueue[tuple[bytes, int]] = FairQueue(quantum=8)
        for number, (line, cost) in enumerate(items):
            queue.append(line, (line, number), cost)
        costs = [cost for _, cost in items]
        taken: list[tuple[bytes, int]] = []
        while queue:
            some = queue.take(budget)
            assert some
            # No more than the budget, but for the last one.
            assert sum(costs[number] for _, number in some[:-1]) < budget
            taken += some
        assert sorted(taken, key=lambda item: item[1]) == [(line, n) for n, (line, _) in enumerate(items)]
        for line in {line for line, _ in items}:
            numbers = [number for other, number in taken if other == line]
            assert numbers == sorted(numbers)
        with pytest.raises(IndexError):
            queue.popleft()
