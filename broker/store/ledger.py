"""The ledger: a second copy of the committed snapshots' records, beside their files, for the day the database is gone.

A directory tells neither name nor parent nor labels. So every change of a committed snapshot's record is appended to
one file in the snapshotter's root, off everybody's way: a turn leaves its changes in memory, and a thread writes them
once a flush interval, with one flush for all. Active snapshots and views are not in it: a prepare costs nothing.

The file is a header and frames: length and CRC-32 of what follows (4 bytes each), then a MessagePack array of index
keys, each followed by its record or nil. Read in their order the last word on a key holds; a frame that was cut short
is the end. A stop that had the time ends the file with a frame that names the journal's newest sequence; a file that
does not end so, or has grown to a multiple of what is true, is written anew from the database, page by page, while
changes go on to gather. They are appended behind it, so that it does not matter which of them it holds already.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import lmdb
import msgspec

from backends.failpoints import reach
from broker.logs import get_logger
from broker.store.inspection import Inspection
from broker.store.records import is_committed
from snapbroker.errors import FailedPrecondition

if TYPE_CHECKING:
    from broker.store.environment import Environment

log = get_logger()

NAME: Final = "ledger"
HEADER: Final = b"SNBL\x01\n"
_FRAME: Final = struct.Struct(">II")
_CLOSED: Final = struct.Struct(">4sQ")
_CLOSED_MARK: Final = b"\xc1end"
"""No MessagePack value begins so."""
PAGE: Final = 256
"""Records read in one transaction of a rewriting."""
FRAME_BYTES_MAX: Final = 1 << 28
"""Longer is no frame of ours."""
GATHERED_MAX: Final = 65_536
"""Changes that wait in memory at most for the flush interval to pass."""
DROPPED_MAX: Final = 16 * GATHERED_MAX
"""So many that could not be written are dropped: the file is written anew when there is room."""
_GENTLE_S: Final = 0.002
"""Pause between two pages of a rewriting."""
_RETRY_S: Final = 5.0
"""Pause after the file could not be written."""

Change = tuple[bytes, bytes | None]

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[bytes | None]).decode


class LedgerLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ledger of one snapshotter."""

    flush_ms: int = 1000
    """How often what changed is written and flushed: what a loss of the database in the same moment can cost."""
    slack_bytes: int = 64 * 1024 * 1024
    """How far the file may grow beyond twice its size after the last rewriting."""


class Ledger:
    """The ledger of a snapshotter that runs; `note` from the writer's thread, `run` is a thread of its own."""

    def __init__(self, root: Path, environment: Environment, limits: LedgerLimits) -> None:
        self._path = root / NAME
        self._environment = environment
        self._inspection = Inspection(environment)
        self._limits = limits
        self._condition = threading.Condition()
        self._gathered: list[Change] = []
        self._stopped = False
        self._dropped = False
        self._fd = -1
        self._size = 0
        self._base = 0
        self._rewritten = 0
        self._failures = 0

    def note(self, changes: list[Change]) -> None:
        """Changes of a transaction that is committed."""
        with self._condition:
            self._gathered += changes
            if len(self._gathered) > GATHERED_MAX:
                self._condition.notify()

    def run(self) -> None:
        """Write until `stop`; the body of a thread. A disk that does not take it is told and tried again."""
        current = self._resume()
        while True:
            try:
                if not current:
                    if not self._rewrite():
                        return
                    current = True
                with self._condition:
                    self._condition.wait_for(self._is_due, self._limits.flush_ms / 1000)
                    stopped = self._stopped
                self._append()
                if stopped:
                    self._close()
                    return
                current = self._size <= 2 * self._base + self._limits.slack_bytes
            except (OSError, lmdb.Error) as error:
                self._failures += 1
                # Where there was only no room, what was written holds, and the rest is tried again.
                no_room = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
                current = current and no_room and not self._dropped
                log.warning("the ledger cannot be written", error=str(error))
                with self._condition:
                    if self._condition.wait_for(lambda: self._stopped, _RETRY_S):
                        return

    def stop(self) -> None:
        """End `run` when what was noted is written; the writer has ended before."""
        with self._condition:
            self._stopped = True
            self._condition.notify()

    def _is_due(self) -> bool:
        return self._stopped or len(self._gathered) > GATHERED_MAX

    def _resume(self) -> bool:
        """Whether the file that is there is that of a stop with all that the database has; then it is gone on with."""
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            size = os.fstat(self._fd).st_size
            tail = os.pread(self._fd, _CLOSED.size, max(0, size - _CLOSED.size))
        except OSError:
            return False
        with self._environment.read() as txn:
            newest = self._inspection.events_before(txn, 2**63, 1)
        if len(tail) < _CLOSED.size or _CLOSED.unpack(tail) != (_CLOSED_MARK, newest[0][0] if newest else 0):
            return False
        os.ftruncate(self._fd, size - _CLOSED.size)
        self._size = self._base = size - _CLOSED.size
        return True

    def _append(self) -> None:
        with self._condition:
            changes, self._gathered = self._gathered, []
        if not changes:
            return
        begin = self._size
        try:
            self._write(_framed(changes))
            reach("ledger.appended")
            os.fdatasync(self._fd)
            reach("ledger.flushed")
        except OSError:
            self._size = begin
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, begin)
            with self._condition:
                self._gathered = changes + self._gathered
                if len(self._gathered) > DROPPED_MAX:
                    self._gathered, self._dropped = [], True
            raise

    def _write(self, frame: bytes) -> None:
        view = memoryview(frame)
        while view:
            written = os.pwrite(self._fd, view, self._size)
            self._size += written
            view = view[written:]

    def _rewrite(self) -> bool:
        """Write the database's committed records into a new file, and put it in the old one's place; False at a stop.

        Then the file that is there was not closed, and the next start begins anew.
        """
        self._let_go()
        fresh = self._path.with_suffix(".new")
        try:
            whole = self._write_anew(fresh)
        except (OSError, lmdb.Error):
            fresh.unlink(missing_ok=True)
            raise
        if not whole:
            fresh.unlink()
        return whole

    def _write_anew(self, fresh: Path) -> bool:
        self._dropped = False
        self._fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._size = 0
        reach("ledger.opened")
        self._write(HEADER)
        after = b""
        while True:
            with self._environment.read() as txn:
                rows = self._inspection.rows(txn, after, PAGE)
            if not rows:
                break
            after = rows[-1][0]
            changes: list[Change] = [row for row in rows if is_committed(row[1])]
            if changes:
                self._write(_framed(changes))
                reach("ledger.copied")
            with self._condition:
                if self._condition.wait_for(lambda: self._stopped, _GENTLE_S):
                    return False
        os.fsync(self._fd)
        reach("ledger.written")
        fresh.rename(self._path)
        reach("ledger.renamed")
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self._base = self._size
        self._rewritten += 1
        return True

    def _close(self) -> None:
        with self._environment.read() as txn:
            newest = self._inspection.events_before(txn, 2**63, 1)
        self._write(_CLOSED.pack(_CLOSED_MARK, newest[0][0] if newest else 0))
        os.fdatasync(self._fd)
        self._let_go()

    def _let_go(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def statistics(self) -> dict[str, int]:
        """For `status`."""
        return {
            "waiting": len(self._gathered),
            "limit": GATHERED_MAX,
            "size_bytes": self._size,
            "rewritten": self._rewritten,
            "failures": self._failures,
        }


def check_not_lost(root: Path, metadata: Path) -> None:
    """FailedPrecondition where the ledger knows snapshots and there is no database: it is lost, and not yet begun.

    Serving would give ids again that are on disk, and write the ledger anew from a database that knows nothing.
    """
    if not (metadata / "data.mdb").exists() and any(value is not None for value in dict(changes(root)).values()):
        raise FailedPrecondition(
            f"the metadata database in {metadata} is gone, and {root} has snapshots: "
            "`snapbrokerd rebuild` makes it anew"
        )


def check_not_older(root: Path, environment: Environment) -> None:
    """FailedPrecondition where the ledger was closed at an event that the database does not have: it is an old copy."""
    with environment.read() as txn:
        newest = Inspection(environment).events_before(txn, 2**63, 1)
    sequence, closed_at = newest[0][0] if newest else 0, _closed_at(root)
    if closed_at > sequence:
        raise FailedPrecondition(
            f"the metadata database ends at event {sequence}, and {root / NAME} at {closed_at}: it is an old copy; "
            "move it away, and `snapbrokerd rebuild --from` it"
        )


def _closed_at(root: Path) -> int:
    """The sequence that the ledger of a clean stop ends with; 0 where there is none."""
    try:
        with (root / NAME).open("rb") as file:
            file.seek(-_CLOSED.size, os.SEEK_END)
            mark, sequence = _CLOSED.unpack(file.read(_CLOSED.size))
    except OSError:
        return 0
    return int(sequence) if mark == _CLOSED_MARK else 0


def _framed(changes: list[Change]) -> bytes:
    body = _encode([part for change in changes for part in change])
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


def changes(root: Path) -> Iterator[Change]:
    """What a ledger has, in its order, up to what is no frame; nothing where there is none.

    OSError where it cannot be read.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context((root / NAME).open("rb"))
        except FileNotFoundError:
            return
        if file.read(len(HEADER)) != HEADER:
            return
        while True:
            head = file.read(_FRAME.size)
            if len(head) < _FRAME.size or head.startswith(_CLOSED_MARK):
                return
            length, checksum = _FRAME.unpack(head)
            body = file.read(length) if length <= FRAME_BYTES_MAX else b""
            if len(body) < length or zlib.crc32(body) != checksum:
                return
            try:
                parts: Any = _decode(body)
            except msgspec.MsgspecError:
                return
            if len(parts) % 2 or None in parts[::2]:
                return
            yield from zip(parts[::2], parts[1::2], strict=True)


def last_word(root: Path, key: bytes) -> bytes | None:
    """The record of an index key; None where the ledger has none."""
    found: bytes | None = None
    for each, value in changes(root):
        if each == key:
            found = value
    return found
