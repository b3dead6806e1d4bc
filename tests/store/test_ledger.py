"""The ledger by itself: what it tells after appending, rewriting, tearing, and disks that take nothing."""

from __future__ import annotations

import errno
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker.store import Environment, Ledger, LedgerLimits, Record, Snapshots, index_key
from broker.store import ledger as ledgers
from broker.store.ledger import NAME, changes, check_not_lost, check_not_older, last_word
from broker.store.records import encode_info
from snapbroker.contract import Info, Kind
from snapbroker.errors import FailedPrecondition

LIMITS = LedgerLimits(flush_ms=5, slack_bytes=2000)


class Kept:
    """A store with its ledger, whose thread runs until `stop`."""

    def __init__(self, environment: Environment, root: Path) -> None:
        self.environment = environment
        self.root = root
        self.ledger = Ledger(root, environment, LIMITS)
        self.snapshots = Snapshots(environment, writes=True, note=self.ledger.note)
        self.thread = threading.Thread(target=self.ledger.run)
        self.thread.start()

    def stop(self) -> None:
        # What stops before its file is there leaves that to the next start.
        self.wait(lambda: self.ledger.statistics()["rewritten"])
        self.ledger.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()

    def put(self, name: str, id_: int, kind: Kind = Kind.COMMITTED) -> bytes:
        record = Record(kind, 0, 0, id_, 0, 0, 0, 1, encode_info(Info(name, kind)))
        self.environment.write(lambda txn: self.snapshots.insert(txn, index_key("n", name), record))
        self.snapshots.settle()
        return record.encode()

    def delete(self, name: str) -> None:
        def work(txn: object) -> None:
            key = index_key("n", name)
            record = self.snapshots.get(txn, key)  # type: ignore[arg-type]
            assert record is not None
            self.snapshots.delete(txn, key, record)  # type: ignore[arg-type]

        self.environment.write(work)
        self.snapshots.settle()

    def told(self) -> dict[bytes, bytes]:
        return {key: value for key, value in dict(changes(self.root)).items() if value is not None}

    def wait(self, condition: Callable[[], object]) -> None:
        pace = threading.Event()
        for _ in range(6000):
            if condition():
                return
            pace.wait(0.005)
        raise AssertionError("not within 30 s")


@pytest.fixture
def kept(environment: Environment, tmp_path: Path) -> Iterator[Kept]:
    kept = Kept(environment, tmp_path)
    yield kept
    kept.stop()


def test_it_tells_the_last_word_on_what_is_committed(kept: Kept) -> None:
    kept.put("active", 1, Kind.ACTIVE)
    kept.put("gone", 2)
    value = kept.put("base", 3)
    kept.delete("gone")
    kept.stop()
    assert kept.told() == {index_key("n", "base"): value}
    assert last_word(kept.root, index_key("n", "base")) == value
    assert last_word(kept.root, index_key("n", "gone")) is None


def test_what_a_transaction_dropped_is_not_told(kept: Kept) -> None:
    mark = kept.snapshots.mark()
    record = Record(Kind.COMMITTED, 0, 0, 9, 0, 0, 0, 1, encode_info(Info("dropped", Kind.COMMITTED)))
    kept.environment.write(lambda txn: kept.snapshots.insert(txn, index_key("n", "dropped"), record))
    kept.snapshots.rewind(mark)
    kept.put("base", 1)
    kept.stop()
    assert list(kept.told()) == [index_key("n", "base")]


def test_it_is_written_anew_when_it_has_grown(kept: Kept) -> None:
    kept.put("base", 1)
    for number in range(2, 60):
        kept.put("comes-and-goes", number)
        kept.delete("comes-and-goes")
        kept.wait(lambda: not kept.ledger.statistics()["waiting"])
    kept.wait(lambda: kept.ledger.statistics()["rewritten"] > 1)
    kept.stop()
    assert list(kept.told()) == [index_key("n", "base")]
    assert (kept.root / NAME).stat().st_size < 10_000


def test_a_torn_end_is_the_end(kept: Kept) -> None:
    value = kept.put("base", 1)
    kept.stop()
    whole = (kept.root / NAME).read_bytes()
    for end in (whole[:-1], whole + b"\0\0\0\x09", whole[:-12] + os.urandom(64)):
        (kept.root / NAME).write_bytes(end)
        assert kept.told() == {index_key("n", "base"): value}
    for body in (b"", b"\x01", b"\x91\xc4\x01a", b"\x92\xc0\xc0", b"\x92\x01\x02", b"\xc1"):
        frame = len(body).to_bytes(4) + zlib.crc32(body).to_bytes(4) + body
        (kept.root / NAME).write_bytes(whole[:-12] + frame)
        assert kept.told() == {index_key("n", "base"): value}
    (kept.root / NAME).write_bytes(b"another file")
    assert kept.told() == {}


def test_a_full_disk_delays_it(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "_RETRY_S", 0.01)
    kept.wait(lambda: kept.ledger.statistics()["rewritten"])
    pwrite = os.pwrite
    full = [3]

    def no_room(fd: int, data: bytes, offset: int) -> int:
        if full[0]:
            full[0] -= 1
            # Some of it, and then no more.
            pwrite(fd, data[:5], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", no_room)
    value = kept.put("base", 1)
    kept.wait(lambda: kept.told() == {index_key("n", "base"): value})
    assert kept.ledger.statistics()["failures"] == 3
    assert kept.ledger.statistics()["rewritten"] == 1


def test_a_database_that_is_not_the_ledgers_is_refused(kept: Kept, tmp_path: Path) -> None:
    kept.put("base", 1)
    kept.stop()
    check_not_lost(kept.root, tmp_path / "metadata")
    check_not_older(kept.root, kept.environment)
    with pytest.raises(FailedPrecondition, match="is gone"):
        check_not_lost(kept.root, tmp_path / "elsewhere")
    file = kept.root / NAME
    file.write_bytes(file.read_bytes()[:-8] + (7).to_bytes(8))
    with pytest.raises(FailedPrecondition, match="it is an old copy"):
        check_not_older(kept.root, kept.environment)
