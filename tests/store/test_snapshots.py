"""Records with their indexes: pages in the order of names, children, chains, references, and damage in between."""

from __future__ import annotations

import contextlib
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.store import Environment, Record, Snapshots, index_key
from broker.store.records import encode_info
from broker.store.snapshots import CHAINS_BYTES_MAX, row_info, row_name, row_record
from snapbroker.contract import SNAPSHOT_REF_LABEL, Info, Kind
from snapbroker.errors import Internal
from tests.store.conftest import SMALL

STEM = "n" * 400


def record(
    name: str, id_: int, parent: str = "", parent_id: int = 0, kind: Kind = Kind.COMMITTED, **labels: str
) -> Record:
    return Record(kind, 0, 0, id_, parent_id, 0, 0, 0, encode_info(Info(name, kind, parent, labels)))


def insert_all(environment: Environment, snapshots: Snapshots, names: list[str], namespace: str = "ns") -> None:
    def work(txn: object) -> None:
        for id_, name in enumerate(names, 1):
            snapshots.insert(txn, index_key(namespace, name), record(name, id_))  # type: ignore[arg-type]

    environment.write(work)


def pages(environment: Environment, snapshots: Snapshots, size: int, namespace: str = "ns") -> Iterator[list[str]]:
    """Page after page as a reader takes them: cut to the size, and on behind the last name."""
    after = ""
    while True:
        with environment.read() as txn:
            rows, end = snapshots.page(txn, namespace, after, size)
        names = [row_record(row).decoded().name for row in rows]
        assert [row_name(row) for row in rows] == names
        assert [row_info(row) for row in rows] == [row_record(row).info for row in rows]
        cut = names[:size]
        assert not cut or cut[0].encode() > after.encode(), "the page goes back"
        yield cut
        if end and len(names) <= size:
            return
        assert cut, "a page without an end has something"
        after = cut[-1]


@contextlib.contextmanager
def store_of(names: list[str]) -> Iterator[tuple[Environment, Snapshots]]:
    with tempfile.TemporaryDirectory() as directory:
        environment = Environment(Path(directory), SMALL)
        snapshots = Snapshots(environment)
        insert_all(environment, snapshots, names)
        yield environment, snapshots
        environment.close()


TAILS = st.text(st.sampled_from(["a", "b", "é", "牛", "\x01", "n"]), max_size=4)
NAMES = st.builds(
    lambda stem, tail: stem + tail,
    st.sampled_from(
        ["", "n", "n" * 399, STEM, "n" * 401, "é" * 199, "é" * 200, "x" + "é" * 199, "牛" * 133, "n" * 4000]
    ),
    TAILS,
).filter(bool)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(NAMES, unique=True, max_size=25), st.integers(1, 8))
def test_pages_are_in_the_order_of_names(names: list[str], size: int) -> None:
    """C63, D3."""
    with store_of(names) as (environment, snapshots):
        found = [name for page in pages(environment, snapshots, size) for name in page]
    assert found == sorted(names, key=str.encode)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(NAMES, unique=True, max_size=25), NAMES)
def test_a_page_begins_behind_any_name(names: list[str], after: str) -> None:
    with store_of(names) as (environment, snapshots), environment.read() as txn:
        rows, end = snapshots.page(txn, "ns", after, 1000)
    assert [row_name(row) for row in rows] == sorted(
        (name for name in names if name.encode() > after.encode()), key=str.encode
    )
    assert end


def test_pages_end_with_the_namespace(environment: Environment, snapshots: Snapshots) -> None:
    for namespace in ("a", "a.b", "a-b", "b", "A"):
        insert_all(environment, snapshots, [f"in {namespace}", STEM + namespace], namespace)
    for namespace in ("a", "a.b", "a-b", "b", "A"):
        for size in (1, 2, 3, 10):
            found = [name for page in pages(environment, snapshots, size, namespace) for name in page]
            assert found == [f"in {namespace}", STEM + namespace]
    assert list(pages(environment, snapshots, 10, "c")) == [[]]


@pytest.mark.parametrize("size", [1, 9, 10, 11])
def test_the_bounds_of_a_page(environment: Environment, snapshots: Snapshots, size: int) -> None:
    names = [f"{number:02}" for number in range(10)]
    insert_all(environment, snapshots, names)
    with environment.read() as txn:
        rows, end = snapshots.page(txn, "ns", "", size)
        assert len(rows) == min(size, 10)
        behind, last = snapshots.page(txn, "ns", names[min(size, 10) - 1], size)
    if end:
        assert behind == []
    else:
        assert [row_name(row) for row in behind] == names[size : 2 * size]
    assert last or len(behind) == size


def test_children(environment: Environment, snapshots: Snapshots) -> None:
    """D6."""
    base, one, two = record("base", 1), record("one", 2, "base", 1), record("two", 256, "base", 1)
    unrelated = record("unrelated", 3, "other", 2**63)

    def work(txn: object) -> None:
        for row in (base, one, two, unrelated):
            snapshots.insert(txn, index_key("ns", row.decoded().name), row)  # type: ignore[arg-type]

    environment.write(work)
    with environment.read() as txn:
        assert {id_: snapshots.has_children(txn, id_) for id_ in (1, 2, 3, 256, 2**63)} == {
            1: True, 2: False, 3: False, 256: False, 2**63: True,
        }  # fmt: skip
    environment.write(lambda txn: snapshots.delete(txn, index_key("ns", "one"), one))
    with environment.read() as txn:
        assert snapshots.has_children(txn, 1)
        assert snapshots.count(txn) == 3
    environment.write(lambda txn: snapshots.delete(txn, index_key("ns", "two"), two))
    with environment.read() as txn:
        assert not snapshots.has_children(txn, 1)


def test_the_memory_for_chains_has_a_limit(environment: Environment, snapshots: Snapshots) -> None:
    one = record("base", 1)
    tracemalloc.start()
    try:
        with environment.read() as txn:
            for id_ in range(1, 60_000):
                assert snapshots.chain(txn, "ns", "base", one._replace(id=id_)) == (id_,)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert CHAINS_BYTES_MAX // 2 < taken < 3 * CHAINS_BYTES_MAX // 2


def test_chains(environment: Environment, snapshots: Snapshots) -> None:
    """C10: the immediate parent first, whichever link was asked for before."""
    rows = [record(f"layer-{n}", n, f"layer-{n - 1}" if n > 1 else "", n - 1) for n in range(1, 51)]

    def work(txn: object) -> None:
        for row in rows:
            snapshots.insert(txn, index_key("ns", row.decoded().name), row)  # type: ignore[arg-type]

    environment.write(work)
    for order in ([50], [1, 50], [25, 50, 10], list(range(50, 0, -1)), [50, 50]):
        fresh = Snapshots(environment)
        with environment.read() as txn:
            for depth in order:
                chain = fresh.chain(txn, "ns", f"layer-{depth}", rows[depth - 1])
                assert chain == tuple(range(depth, 0, -1))


def test_a_circle_of_parents_ends(environment: Environment, snapshots: Snapshots) -> None:
    """Nothing writes one, but a record that was written over could lead round, and a reader with it."""
    rows = [record("a", 1, "b", 2), record("b", 2, "a", 1)]

    def work(txn: object) -> None:
        for row in rows:
            snapshots.insert(txn, index_key("ns", row.decoded().name), row)  # type: ignore[arg-type]

    environment.write(work)
    with environment.read() as txn, pytest.raises(Internal, match="its own ancestor"):
        snapshots.chain(txn, "ns", "a", rows[0])


def test_references(environment: Environment, snapshots: Snapshots) -> None:
    """C93, C94."""
    label = {SNAPSHOT_REF_LABEL: "sha256:1"}

    def work(txn: object) -> None:
        for id_, name in ((1, "one"), (2, "two")):
            snapshots.refer(txn, "ns", Info(name, Kind.COMMITTED, "", label), id_)  # type: ignore[arg-type]
        snapshots.refer(txn, "ns", Info("none", Kind.COMMITTED), 3)  # type: ignore[arg-type]
        snapshots.refer(txn, "other", Info("three", Kind.COMMITTED, "", label), 4)  # type: ignore[arg-type]

    environment.write(work)
    with environment.read() as txn:
        assert snapshots.referred(txn, "ns", "sha256:1") == ["one", "two"]
        assert snapshots.referred(txn, "other", "sha256:1") == ["three"]
        assert snapshots.referred(txn, "ns", "sha256:2") == []
    environment.write(lambda txn: snapshots.unrefer(txn, "ns", Info("one", Kind.COMMITTED, "", label), 1))
    with environment.read() as txn:
        assert snapshots.referred(txn, "ns", "sha256:1") == ["two"]


class TestDamage:
    """One value is not what was written."""

    @pytest.fixture(autouse=True)
    def damaged(self, environment: Environment, snapshots: Snapshots) -> None:
        insert_all(environment, snapshots, [f"job-{number}" for number in range(9)])
        key = index_key("ns", "job-4")
        environment.write(lambda txn: txn.put(key, b"\xc8 damaged", db=environment.snapshots))

    def test_it_is_internal_for_that_one_only(self, environment: Environment, snapshots: Snapshots) -> None:
        with environment.read() as txn:
            for number in range(9):
                key = index_key("ns", f"job-{number}")
                if number == 4:
                    with pytest.raises(Internal, match="job-4"):
                        snapshots.get(txn, key)
                else:
                    found = snapshots.get(txn, key)
                    assert found is not None
                    assert found.id == number + 1

    def test_a_scan_tells_it_apart(self, environment: Environment, snapshots: Snapshots) -> None:
        with environment.read() as txn:
            rows = list(snapshots.scan(txn, b"", 100))
        assert [key for key, row in rows if row is None] == [index_key("ns", "job-4")]
        assert [row.id for _, row in rows if row is not None] == [1, 2, 3, 4, 6, 7, 8, 9]

    def test_pages_before_and_behind_it(self, environment: Environment, snapshots: Snapshots) -> None:
        with environment.read() as txn:
            rows, _ = snapshots.page(txn, "ns", "", 4)
            assert [row_record(row).id for row in rows] == [1, 2, 3, 4]
            rows, end = snapshots.page(txn, "ns", "job-4", 100)
            assert [row_record(row).id for row in rows] == [6, 7, 8, 9]
            assert end

    def test_a_page_with_it_names_it(self, environment: Environment, snapshots: Snapshots) -> None:
        with environment.read() as txn:
            rows, _ = snapshots.page(txn, "ns", "job-2", 100)
        assert row_record(rows[0]).id == 4
        for read in (row_record, row_info):
            with pytest.raises(Internal, match="job-4"):
                read(rows[1])


@pytest.mark.parametrize("count", [1, 3, 64])
def test_a_scan_goes_through_all_namespaces(environment: Environment, snapshots: Snapshots, count: int) -> None:
    for namespace in ("a", "b"):
        insert_all(environment, snapshots, ["one", "two", STEM + "x", STEM + "y"], namespace)
    keys: list[bytes] = []
    with environment.read() as txn:
        while rows := list(snapshots.scan(txn, keys[-1] if keys else b"", count)):
            assert len(rows) <= count
            keys += [key for key, _ in rows]
    assert keys == sorted(index_key(ns, name) for ns in ("a", "b") for name in ("one", "two", STEM + "x", STEM + "y"))
