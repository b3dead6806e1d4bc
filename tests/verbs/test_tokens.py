"""Idempotency tokens and fencing numbers: one effect however often a request comes, none from a worker thought dead."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from snapbroker.errors import BrokerError, FailedPrecondition, InvalidArgument, NotFound
from snapbroker.protocol import (
    TOKEN_BYTES_MAX,
    Commit,
    Events,
    Mounts,
    MountsAnswer,
    Prepare,
    Remove,
    Stat,
    Update,
    View,
)
from tests.harness import Daemon, Wire


def verbs(wire: Wire) -> list[str]:
    """Everything that has happened, as the journal has it."""
    return [event.verb for page in wire.pages(Events(since=0)) for event in page.events]


class TestToken:
    """A repeat gets the first answer and changes nothing."""

    def test_a_repeat_of_each_verb(self, wire: Wire) -> None:
        requests = {
            b"prepare": (Prepare(key="a"),),
            b"update": (Update(name="a", labels={"x": "y"}),),
            b"commit": (Commit(name="base", key="a"),),
            b"view": (View(key="v", parent="base"),),
            b"remove": (Remove(key="v"),),
        }
        first = {token: wire.call(*calls, token=token) for token, calls in requests.items()}
        assert not [result for results in first.values() for result in results if isinstance(result, BrokerError)]
        happened = verbs(wire)
        assert {token: wire.call(*calls, token=token) for token, calls in requests.items()} == first
        assert verbs(wire) == happened == ["prepare", "update", "commit", "view", "remove"]

    def test_the_first_answer_may_be_an_error(self, wire: Wire) -> None:
        commit = Commit(name="base", key="a")
        (refused,) = wire.call(commit, token=b"t")
        assert isinstance(refused, NotFound)
        wire.one(Prepare(key="a"))
        (again,) = wire.call(commit, token=b"t")
        assert isinstance(again, NotFound)
        assert again.message == refused.message
        wire.one(commit, token=b"another")

    def test_the_first_answer_stays_although_the_snapshot_is_gone(self, wire: Wire) -> None:
        answer = wire.one(Prepare(key="a"), token=b"t")
        wire.one(Remove(key="a"))
        assert wire.one(Prepare(key="a"), token=b"t") == answer
        with pytest.raises(NotFound):
            wire.one(Stat(key="a"))

    def test_every_call_of_a_request_is_known(self, wire: Wire) -> None:
        calls = (Prepare(key="a"), Stat(key="x"), Commit(name="b", key="missing"), Prepare(key="c"))
        first = wire.call(*calls, token=b"t")
        again = wire.call(*calls, token=b"t")
        assert [type(result) for result in again] == [MountsAnswer, NotFound, NotFound, MountsAnswer]
        assert (again[0], again[3]) == (first[0], first[3])
        assert verbs(wire) == ["prepare", "prepare"]

    def test_an_atomic_request_is_known_whole(self, wire: Wire) -> None:
        wire.one(Prepare(key="a"))
        calls = (Commit(name="base", key="a"), Prepare(key="b", parent="base"))
        first = wire.call(*calls, atomic=True, token=b"t")
        assert wire.call(*calls, atomic=True, token=b"t") == first
        refused = wire.call(*calls, atomic=True, token=b"u")
        assert [error.code for error in refused if isinstance(error, BrokerError)] == ["not_found", "cancelled"]
        wire.one(Prepare(key="a"))
        again = wire.call(*calls, atomic=True, token=b"u")
        assert [error.code for error in again if isinstance(error, BrokerError)] == ["not_found", "cancelled"]

    def test_repeats_in_one_turn(self, wire: Wire) -> None:
        ids = [wire.send(Prepare(key="a"), token=b"t") for _ in range(20)]
        answers = {}
        while len(answers) < len(ids):
            _, answered, _, body = wire.receive_frames()
            answers[answered] = body
        # Where a copy is under way the others are told to come again; nobody is told that it exists.
        assert verbs(wire) == ["prepare"]
        assert b"already_exists" not in b"".join(answers.values())

    def test_a_token_is_of_its_request(self, wire: Wire) -> None:
        wire.one(Prepare(key="a"), token=b"t")
        with pytest.raises(InvalidArgument, match="other calls"):
            wire.one(Prepare(key="b"), token=b"t")
        with pytest.raises(InvalidArgument, match="other calls"):
            wire.one(Prepare(key="a", labels={"x": "y"}), token=b"t")
        wire.one(Prepare(key="a"), token=b"t")
        with pytest.raises(NotFound):
            wire.one(Stat(key="b"))

    def test_a_token_is_of_its_namespace(self, wire: Wire) -> None:
        other = f"{wire.namespace}.other"
        wire.one(Prepare(key="a"), token=b"t")
        wire.one(Prepare(key="b"), token=b"t", namespace=other)
        wire.one(Stat(key="b"), namespace=other)

    @pytest.mark.parametrize("token", [b"\0", b"t" * TOKEN_BYTES_MAX, bytes(range(64))])
    def test_any_bytes_are_a_token(self, wire: Wire, token: bytes) -> None:
        first = wire.one(Prepare(key="a"), token=token)
        assert wire.one(Prepare(key="a"), token=token) == first

    def test_tokens_that_begin_alike(self, wire: Wire) -> None:
        """A value of one must not be taken for one of the other, whatever bytes follow."""
        tokens = [b"t" + b"\0" * count for count in range(5)]
        first = [wire.one(Prepare(key=f"k{number}"), token=token) for number, token in enumerate(tokens)]
        assert [wire.one(Prepare(key=f"k{number}"), token=token) for number, token in enumerate(tokens)] == first

    def test_a_token_that_is_too_long(self, wire: Wire) -> None:
        with pytest.raises(InvalidArgument):
            wire.one(Prepare(key="a"), token=b"t" * (TOKEN_BYTES_MAX + 1))

    def test_a_token_lives_through_a_crash(self, start_daemon: Callable[..., Daemon]) -> None:
        daemon = start_daemon({"native": {}})
        with daemon.wire("native") as wire:
            first = wire.one(Prepare(key="a"), token=b"t")
        daemon.kill()
        daemon.start()
        with daemon.wire("native") as wire:
            assert wire.one(Prepare(key="a"), token=b"t") == first
            assert verbs(wire) == ["prepare"]


class TestFence:
    """A worker thought dead cannot touch what its successor works on."""

    def test_a_stale_fence_is_refused(self, wire: Wire) -> None:
        stale = wire.one(Prepare(key="a")).fence
        wire.one(Remove(key="a"))
        fence = wire.one(Prepare(key="a")).fence
        assert fence > stale > 0
        happened = verbs(wire)
        for call in (
            Commit(name="b", key="a", fence=stale),
            Remove(key="a", fence=stale),
            Mounts(key="a", fence=stale),
        ):
            with pytest.raises(FailedPrecondition, match="fence") as refused:
                wire.one(call)
            assert refused.value.details["fence"] == fence
        assert verbs(wire) == happened
        assert wire.one(Mounts(key="a", fence=fence)).fence == fence
        wire.one(Commit(name="b", key="a", fence=fence))

    def test_the_fence_is_the_sequence_of_the_event(self, wire: Wire) -> None:
        fences = [wire.one(Prepare(key="a")).fence, wire.one(View(key="v")).fence]
        events = [event for page in wire.pages(Events(since=0)) for event in page.events]
        assert fences == [event.sequence for event in events]
        assert wire.one(Mounts(key="v")).fence == fences[1]

    def test_an_update_leaves_the_fence(self, wire: Wire) -> None:
        fence = wire.one(Prepare(key="a")).fence
        wire.one(Update(name="a", labels={"x": "y"}))
        assert wire.one(Mounts(key="a", fence=fence)).fence == fence

    def test_a_committed_snapshot_has_one_of_its_own(self, wire: Wire) -> None:
        fence = wire.one(Prepare(key="a")).fence
        wire.one(Commit(name="b", key="a"))
        with pytest.raises(FailedPrecondition, match="fence") as refused:
            wire.one(Remove(key="b", fence=fence))
        wire.one(Remove(key="b", fence=refused.value.details["fence"]))

    def test_in_an_atomic_request(self, wire: Wire) -> None:
        fence = wire.one(Prepare(key="a")).fence
        refused = wire.call(Mounts(key="a", fence=fence), Remove(key="a", fence=fence + 1), atomic=True)
        assert [error.code for error in refused if isinstance(error, BrokerError)] == [
            "cancelled",
            "failed_precondition",
        ]
        done = wire.call(Mounts(key="a", fence=fence), Remove(key="a", fence=fence), atomic=True)
        assert not [error for error in done if isinstance(error, BrokerError)]

    def test_a_missing_key_is_missing_whatever_the_fence(self, wire: Wire) -> None:
        for call in (Commit(name="b", key="a", fence=7), Remove(key="a", fence=7), Mounts(key="a", fence=7)):
            with pytest.raises(NotFound):
                wire.one(call)
