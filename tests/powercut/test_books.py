"""What the books say of files, where it is not plain."""

from __future__ import annotations

from snapbroker.protocol import Commit, MountsAnswer, Prepare
from tests.oracle import Oracle, Refused
from tests.powercut.books import Books, Said, Wrote


def test_what_was_deleted_without_a_parent_hides_nothing_of_one_that_comes_later() -> None:
    """There was nothing to delete, so no whiteout lies there."""
    books = Books(Oracle("overlayfs", "ns", rebases=True))

    def say(*calls: Prepare | Commit) -> None:
        said = Said(calls, 1, results=[MountsAnswer(mounts=()) for _ in calls], answered=2)
        assert not any(isinstance(wanted, Refused) for wanted in books.say(said))

    say(Prepare(key="a"), Commit(name="base", key="a"))
    say(Prepare(key="b"), Prepare(key="c", parent="base"))
    for key in ("b", "c"):
        books.wrote(Wrote(key, {"gone": None, "there": b"1"}, 1, durable=False), durable=False)
    say(Commit(name="rebased", key="b", parent="base"), Commit(name="child", key="c"))
    assert books.contents["rebased"].all() == {"there": b"1"}
    assert books.contents["child"].all() == {"gone": None, "there": b"1"}
