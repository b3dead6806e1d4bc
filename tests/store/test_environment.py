"""The environment: it grows without losing a call, stops at its limit, and reads only what it understands."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import lmdb
import pytest

from broker.store import Environment, StoreLimits
from broker.store.environment import FORMAT
from snapbroker.errors import BrokerError, FailedPrecondition, Internal, ResourceExhausted

TINY = StoreLimits(map_initial_bytes=128 * 1024, map_max_bytes=64 << 20)
FULL = StoreLimits(map_initial_bytes=128 * 1024, map_max_bytes=512 * 1024)
VALUE = b"v" * 1000


def opened(path: Path, limits: StoreLimits = TINY) -> Environment:
    return Environment(path / "metadata", limits)


def put(environment: Environment, key: str, value: bytes = VALUE) -> None:
    environment.write(lambda txn: txn.put(key.encode(), value, db=environment.snapshots))


def put_all(environment: Environment, keys: list[str]) -> None:
    """In one transaction."""
    environment.write(lambda txn: [txn.put(key.encode(), VALUE, db=environment.snapshots) for key in keys])


def contents(environment: Environment) -> dict[str, bytes]:
    with environment.read() as txn, txn.cursor(db=environment.snapshots) as cursor:
        return {bytes(key).decode(): bytes(value) for key, value in cursor}


def fill(environment: Environment) -> int:
    """Write until there is no room; how many records were written."""
    for number in range(100_000):
        try:
            put(environment, f"{number:06}")
        except ResourceExhausted:
            return number
    raise AssertionError("there is no limit")


def test_it_grows(tmp_path: Path) -> None:
    environment = opened(tmp_path)
    keys = [f"{number:05}" for number in range(5000)]
    for begin in range(0, 5000, 50):
        put_all(environment, keys[begin : begin + 50])
    assert contents(environment) == dict.fromkeys(keys, VALUE)
    assert environment.statistics()["map_bytes"] > 5000 * len(VALUE) > TINY.map_initial_bytes
    environment.close()
    reopened = opened(tmp_path)
    assert contents(reopened) == dict.fromkeys(keys, VALUE)
    reopened.close()


def test_one_transaction_larger_than_the_map(tmp_path: Path) -> None:
    """It grows as often as it has to, and each attempt begins anew."""
    environment = opened(tmp_path)
    attempts = []

    def work(txn: lmdb.Transaction) -> str:
        attempts.append(list(txn.cursor(db=environment.snapshots).iternext(values=False)))
        for number in range(2000):
            txn.put(b"%06d" % number, VALUE, db=environment.snapshots)
        return "done"

    assert environment.write(work) == "done"
    assert len(attempts) > 2
    assert not any(attempts), "an earlier attempt left something"
    assert len(contents(environment)) == 2000
    environment.close()


def test_it_grows_inside_a_child_transaction(tmp_path: Path) -> None:
    environment = opened(tmp_path)

    def work(txn: lmdb.Transaction) -> None:
        txn.put(b"before", VALUE, db=environment.snapshots)
        with environment.nested(txn) as child:
            for number in range(1000):
                child.put(b"%06d" % number, VALUE, db=environment.snapshots)

    environment.write(work)
    assert len(contents(environment)) == 1001
    environment.close()


def test_readers_are_held_up_and_not_harmed(tmp_path: Path) -> None:
    environment = opened(tmp_path)
    put(environment, "known")
    over = threading.Event()
    begun = threading.Barrier(4)
    failures: list[BaseException] = []

    def read() -> None:
        try:
            begun.wait(10)
            while not over.is_set():
                with environment.read() as txn:
                    assert txn.get(b"known", db=environment.snapshots) == VALUE
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    begun.wait(10)
    for number in range(300):
        put(environment, f"{number:04}", VALUE * 10)
    over.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert environment.statistics()["map_bytes"] > TINY.map_initial_bytes
    assert len(contents(environment)) == 301
    environment.close()


def overfill(environment: Environment) -> None:
    """More than there is room for, in one transaction."""
    put_all(environment, [f"x{number}" for number in range(50)])


def test_at_its_limit_nothing_changes(tmp_path: Path) -> None:
    environment = opened(tmp_path, FULL)
    count = fill(environment)
    assert count > 100
    before = contents(environment)
    assert len(before) == count
    for _ in range(3):
        with pytest.raises(ResourceExhausted, match="map_max_bytes=524288"):
            overfill(environment)
    assert contents(environment) == before
    environment.close()


def test_the_limit_holds_over_a_restart(tmp_path: Path) -> None:
    environment = opened(tmp_path, FULL)
    fill(environment)
    before = contents(environment)
    for _ in range(3):
        environment.close()
        environment = opened(tmp_path, FULL)
        with pytest.raises(ResourceExhausted):
            overfill(environment)
        assert contents(environment) == before
    environment.close()


def test_a_higher_limit_helps(tmp_path: Path) -> None:
    environment = opened(tmp_path, FULL)
    count = fill(environment)
    environment.close()
    environment = opened(tmp_path, TINY)
    for number in range(1000):
        put(environment, f"more-{number}")
    assert len(contents(environment)) == count + 1000
    environment.close()


def test_an_error_of_the_work_drops_all(tmp_path: Path) -> None:
    environment = opened(tmp_path)

    def work(txn: lmdb.Transaction) -> None:
        txn.put(b"key", VALUE, db=environment.snapshots)
        raise KeyError("wrong")

    with pytest.raises(KeyError):
        environment.write(work)
    assert contents(environment) == {}
    environment.close()


def test_a_child_is_dropped_alone(tmp_path: Path) -> None:
    environment = opened(tmp_path)

    def fail_in_a_child(txn: lmdb.Transaction) -> None:
        with environment.nested(txn) as child:
            child.put(b"two", VALUE, db=environment.snapshots)
            raise KeyError("wrong")

    def work(txn: lmdb.Transaction) -> None:
        txn.put(b"one", VALUE, db=environment.snapshots)
        with pytest.raises(KeyError):
            fail_in_a_child(txn)
        with environment.nested(txn) as child:
            child.put(b"three", VALUE, db=environment.snapshots)

    environment.write(work)
    assert contents(environment).keys() == {"one", "three"}
    environment.close()


def test_an_error_of_the_database_is_internal(tmp_path: Path) -> None:
    environment = opened(tmp_path)
    with pytest.raises(Internal, match="metadata database"):
        environment.write(lambda txn: txn.put(b"k" * 600, VALUE, db=environment.snapshots))
    put(environment, "key")
    environment.close()


def test_another_format_is_refused(tmp_path: Path) -> None:
    environment = opened(tmp_path)
    environment.write(lambda txn: txn.put(b"format", b"99", db=environment.meta))
    environment.close()
    with pytest.raises(FailedPrecondition) as raised:
        opened(tmp_path)
    assert "format 99" in raised.value.message
    assert f"reads {FORMAT}" in raised.value.message
    assert str(tmp_path) in raised.value.message


def test_what_is_no_database_is_an_error_of_the_contract(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "data.mdb").write_bytes(os.urandom(64 * 1024))
    with pytest.raises(BrokerError, match="metadata database"):
        opened(tmp_path)


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        environment = opened(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "metadata").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "metadata" / "data.mdb").stat().st_mode) == 0o600
    environment.close()
