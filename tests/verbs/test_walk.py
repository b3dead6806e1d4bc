"""Walks: the order of names, pages of every size, names too long for the index, and what is written meanwhile."""

from __future__ import annotations

import itertools
import threading

import pytest

from snapbroker.blocking import Broker
from snapbroker.errors import BrokerError
from snapbroker.protocol import CALLS_MAX, Prepare, Remove, Update, View, Walk, WalkPage
from tests.harness import Daemon, Wire

STEM = "n" * 400
"""As long as the index keeps names whole (D3)."""

LONG_NAMES = [
    STEM[:-1],
    STEM,
    *(STEM + tail for tail in ("a", "b", "c", "\x01", "牛", "aa", "a" * 3696, "\uffff", "😀")),
    *(STEM[:-1] + tail for tail in ("a", "m" * 2, "o", "o" * 50, "é")),
    *("é" * 199 + tail for tail in ("", "é", "éé", "éa", "aé", "ééé" * 100)),
    # The 400th byte lies inside of a character.
    *("x" + "é" * 199 + tail for tail in ("", "é", "éa", "éé", "牛牛")),
    "",
    "a",
    "z",
    "\x7f",
    "~" * 4096,
    "~" * 4095 + "!",
]


def prepare_all(wire: Wire, names: list[str], size: int = 100) -> None:
    """Views take no directory worth the name: many of them are cheap on every snapshotter."""
    for begin in range(0, len(names), size):
        calls = [View(key=name) for name in names[begin : begin + size]]
        for result in wire.call(*calls):
            assert not isinstance(result, BrokerError), result


def walked(wire: Wire, page: int, credit: int, *filters: str) -> list[WalkPage]:
    """All pages of a walk, asking again behind each request's last; it must come to an end."""
    pages: list[WalkPage] = []
    after = ""
    while True:
        answered = wire.pages(Walk(filters=filters, after=after, page=page, credit=credit))
        for answer in answered:
            assert not answer.next or answer.next.encode() > after.encode(), "the walk goes back"
            after = answer.next
        pages += answered
        if not after:
            return pages


def names_of(pages: list[WalkPage]) -> list[str]:
    return [info.name for page in pages for info in page.infos]


@pytest.fixture(scope="module")
def long_names(daemon: Daemon) -> list[str]:
    """Snapshots with these names in namespace `long`, and their order."""
    names = [name for name in LONG_NAMES if name]
    with daemon.wire("memory", "long") as wire:
        prepare_all(wire, names)
    return sorted(names, key=str.encode)


@pytest.mark.parametrize("credit", [1, 3, 1024])
@pytest.mark.parametrize("page", [1, 2, 3, 5, 7, 10_000])
def test_long_names_in_order_each_once(daemon: Daemon, long_names: list[str], page: int, credit: int) -> None:
    """C63, D3: bytewise, though the index has digests in place of the ends of long names."""
    with daemon.wire("memory", "long") as wire:
        pages = walked(wire, page, credit)
    assert names_of(pages) == long_names
    assert all(len(answer.infos) <= page for answer in pages)


@pytest.mark.parametrize("page", [1, 2, 1000])
def test_long_names_with_a_filter(daemon: Daemon, long_names: list[str], page: int) -> None:
    with daemon.wire("memory", "long") as wire:
        pages = walked(wire, page, 1, "name~=a$", "name~=é$")
    assert names_of(pages) == [name for name in long_names if name.endswith(("a", "é"))]


def test_on_behind_any_name_there_or_not(daemon: Daemon, long_names: list[str]) -> None:
    """`after` is a place, not a snapshot: what has it as its name may be gone by then."""
    places = [*long_names, *(name + "a" for name in long_names), *(name[:-1] for name in long_names)]
    with daemon.wire("memory", "long") as wire:
        for after in places:
            if not 0 < len(after.encode()) <= 4096:
                continue
            pages = wire.pages(Walk(after=after, page=10_000))
            assert names_of(pages) == [name for name in long_names if name.encode() > after.encode()]


def test_long_names_on_every_snapshotter(wire: Wire) -> None:
    names = [STEM, STEM + "a", STEM + "b", STEM[:-1], "a"]
    prepare_all(wire, names)
    assert names_of(walked(wire, 2, 2)) == sorted(names)


@pytest.fixture(scope="module")
def many(daemon: Daemon) -> list[str]:
    """2,500 snapshots in namespace `many`: more than what one transaction looks at."""
    names = [f"job-{number:04}" for number in range(2500)]
    with daemon.wire("memory", "many") as wire:
        prepare_all(wire, names, CALLS_MAX)
    return names


@pytest.mark.parametrize(("page", "credit"), [(1000, 16), (1000, 1), (10_000, 1), (2500, 1), (2499, 1), (37, 1024)])
def test_pages(daemon: Daemon, many: list[str], page: int, credit: int) -> None:
    with daemon.wire("memory", "many") as wire:
        pages = walked(wire, page, credit)
    assert names_of(pages) == many
    assert [answer.next for answer in pages if not answer.next] == [""]
    for answer in pages[:-1]:
        assert answer.infos[-1].name <= answer.next
    assert len({answer.sequence for answer in pages}) == 1


def test_credit_bounds_the_pages_of_one_request(daemon: Daemon, many: list[str]) -> None:
    with daemon.wire("memory", "many") as wire:
        pages = wire.pages(Walk(page=100, credit=3))
    assert names_of(pages) == many[:300]
    assert pages[-1].next == many[299]


def test_a_filter_that_matches_little(daemon: Daemon, many: list[str]) -> None:
    """Pages may be short, or empty, for nobody looks at everything in one transaction; none may be lost."""
    with daemon.wire("memory", "many") as wire:
        assert names_of(walked(wire, 1000, 1, "name==job-2499")) == ["job-2499"]
        assert names_of(walked(wire, 2, 1, "name~=^job-(0000|1999|2000|2001|2499)$")) == [
            "job-0000", "job-1999", "job-2000", "job-2001", "job-2499",
        ]  # fmt: skip
        assert names_of(walked(wire, 1000, 16, "name==missing")) == []


def test_large_infos_make_short_pages(wire: Wire) -> None:
    """A page ends long before the longest body."""
    labels = {f"label-{number}": "v" * 1000 for number in range(1000)}
    names = [f"job-{number:02}" for number in range(12)]
    for name in names:
        (result,) = wire.call(View(key=name, labels=labels))
        assert not isinstance(result, BrokerError)
    pages = walked(wire, 10_000, 1)
    assert names_of(pages) == names
    assert len(pages) > 1
    assert all(len(page.infos) <= 6 for page in pages)


def test_what_was_there_all_the_time_is_walked_once(
    daemon: Daemon, broker: Broker, wire: Wire, snapshotter: str
) -> None:
    """Others come, change and go between the pages."""
    steady = [f"steady-{number:03}" for number in range(60)]
    prepare_all(wire, steady)
    over = threading.Event()
    failures: list[BaseException] = []

    def churn() -> None:
        try:
            with daemon.wire(snapshotter, broker.namespace) as own:
                for number in itertools.count():
                    if over.is_set():
                        return
                    key = f"steady-{number % 60:03}-passing"
                    results = own.call(View(key=key), Update(name=steady[number % 60], labels={"n": str(number)}))
                    results += own.call(Remove(key=key))
                    assert not [result for result in results if isinstance(result, BrokerError)]
        except BaseException as error:
            failures.append(error)

    churning = threading.Thread(target=churn)
    churning.start()
    try:
        for page in (1, 7, 59, 60, 61):
            found = names_of(walked(wire, page, 4))
            assert found == sorted(found)
            assert [name for name in found if not name.endswith("passing")] == steady
    finally:
        over.set()
        churning.join()
    assert failures == []


def test_the_client_walks_them_all(broker: Broker, wire: Wire) -> None:
    names = [f"job-{number:03}" for number in range(150)]
    prepare_all(wire, names)
    assert [info.name for info in broker.walk(page=7)] == names
    with broker.walk(page=10) as walk:
        assert next(walk).name == "job-000"
    assert broker.stat("job-149").name == "job-149"


def test_a_removed_name_is_not_walked(wire: Wire) -> None:
    (prepared, _, removed) = wire.call(Prepare(key="a"), View(key="b"), Remove(key="b"))
    assert not isinstance(prepared, BrokerError)
    assert not isinstance(removed, BrokerError) or removed.code == "not_found"
    names = names_of(walked(wire, 10, 1))
    assert names == (["a"] if not isinstance(removed, BrokerError) else ["a", "b"])
