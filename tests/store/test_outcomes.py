"""The memory of answered requests: found again with its token, and let go by age and by size."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from broker.store import Environment, OutcomeRetention, Outcomes, StoreLimits, Token
from snapbroker.errors import Internal, InvalidArgument
from snapbroker.protocol import Outcome, encode

SECOND = 1_000_000_000


@pytest.fixture
def environment(tmp_path: Path):
    environment = Environment(tmp_path / "metadata", StoreLimits())
    yield environment
    environment.close()


def keep(environment: Environment, outcomes: Outcomes, token: Token, *numbers: int, now: int, size: int = 10) -> None:
    def work(txn):
        turn = outcomes.begin()
        for number in numbers:
            turn.keep(token, Outcome(call=number, ok=msgspec.Raw(encode(b"x" * size))))
        turn.finish(txn, now)

    environment.write(work)


def found(environment: Environment, outcomes: Outcomes, token: Token, *numbers: int) -> list[int]:
    with environment.read() as txn:
        turn = outcomes.begin()
        return [number for number in numbers if turn.find(txn, token, number) is not None]


def token(name: bytes, digest: bytes = b"12345678") -> Token:
    return Token("ns", name, digest)


def test_outcomes_of_several_turns_are_found_together(environment):
    outcomes = Outcomes(environment, OutcomeRetention())
    keep(environment, outcomes, token(b"t"), 0, 2, now=SECOND)
    keep(environment, outcomes, token(b"t"), 1, 1023, now=2 * SECOND)
    assert found(environment, outcomes, token(b"t"), 0, 1, 2, 3, 1023) == [0, 1, 2, 1023]
    assert found(environment, outcomes, token(b"u"), 0, 1) == []


def test_within_a_turn(environment):
    outcomes = Outcomes(environment, OutcomeRetention())
    with environment.read() as txn:
        turn = outcomes.begin()
        assert turn.find(txn, token(b"t"), 0) is None
        turn.keep(token(b"t"), Outcome(call=0))
        assert turn.find(txn, token(b"t"), 0) == Outcome(call=0)
        with pytest.raises(InvalidArgument):
            turn.find(txn, token(b"t", b"other..."), 0)


def test_a_token_of_other_calls(environment):
    outcomes = Outcomes(environment, OutcomeRetention())
    keep(environment, outcomes, token(b"t"), 0, now=SECOND)
    with pytest.raises(InvalidArgument, match="other calls"):
        found(environment, outcomes, token(b"t", b"another."), 0)


def test_a_damaged_one_is_told(environment):
    outcomes = Outcomes(environment, OutcomeRetention())
    keep(environment, outcomes, token(b"t"), 0, now=SECOND)
    keep(environment, outcomes, token(b"u"), 0, now=SECOND)
    environment.write(lambda txn: txn.put(token(b"t").key + b"\0\0", b"\x93\x01", db=environment.outcomes))
    with pytest.raises(Internal, match="damaged"):
        found(environment, outcomes, token(b"t"), 0)
    assert found(environment, outcomes, token(b"u"), 0) == [0]


def test_the_oldest_go_by_age(environment):
    outcomes = Outcomes(environment, OutcomeRetention(age_max_s=10))
    for number in range(5):
        keep(environment, outcomes, token(b"%d" % number), 0, now=number * SECOND)
    keep(environment, outcomes, token(b"late"), 0, now=13 * SECOND - 1)
    kept = [name for name in (b"0", b"1", b"2", b"3", b"4", b"late") if found(environment, outcomes, token(name), 0)]
    assert kept == [b"3", b"4", b"late"]


def test_the_oldest_go_by_size(environment):
    outcomes = Outcomes(environment, OutcomeRetention(size_max_bytes=1 << 20))
    for number in range(800):
        keep(environment, outcomes, token(b"%04d" % number), 0, now=SECOND + number, size=3000)
    with environment.read() as txn:
        figures = outcomes.statistics(txn)
    assert 100 < figures["kept"] < 400
    assert figures["bytes"] < 2 << 20
    assert found(environment, outcomes, token(b"0000"), 0) == []
    assert found(environment, outcomes, token(b"0799"), 0) == [0]


def test_a_clock_that_goes_back_loses_nothing(environment):
    outcomes = Outcomes(environment, OutcomeRetention(age_max_s=10))
    keep(environment, outcomes, token(b"t"), 0, now=100 * SECOND)
    keep(environment, outcomes, token(b"u"), 0, now=50 * SECOND)
    assert found(environment, outcomes, token(b"t"), 0) == [0]
    assert found(environment, outcomes, token(b"u"), 0) == [0]
