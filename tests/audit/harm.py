"""Harm done to a snapshotter behind its back: to its database through LMDB, and to its directories."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from backends import btrfs_ioctl
from backends.api import Task
from broker.store.records import HEADER_BYTES, Record, decode_record, encode_info, index_key
from broker.store.snapshots import reference_key
from snapbroker.contract import Info


class Store:
    """The database of a snapshotter, opened beside it or while it rests; every method is a transaction of its own."""

    def __init__(self, metadata: Path, namespace: str = "default") -> None:
        self._metadata = metadata
        self._namespace = namespace

    @contextlib.contextmanager
    def _transaction(self, database: bytes, *, write: bool = True) -> Iterator[Any]:
        # Nobody takes the power away: what is written is seen by others without a flush.
        environment = lmdb.open(str(self._metadata), map_size=1 << 30, max_dbs=12, sync=False)
        try:
            found = environment.open_db(database)
            with environment.begin(write=write, db=found) as txn:
                yield txn
        finally:
            environment.close()

    def key(self, name: str) -> bytes:
        """Where the record is."""
        return index_key(self._namespace, name)

    def record(self, name: str) -> Record:
        """The record."""
        with self._transaction(b"snapshots", write=False) as txn:
            return decode_record(txn.get(self.key(name)))

    def has(self, name: str) -> bool:
        """Whether there is a record."""
        with self._transaction(b"snapshots", write=False) as txn:
            return txn.get(self.key(name)) is not None

    def change(self, name: str, **fields: Any) -> None:
        """Other fields in the record, with a good checksum."""
        with self._transaction(b"snapshots") as txn:
            record = decode_record(txn.get(self.key(name)))
            txn.put(self.key(name), record._replace(**fields).encode())

    def reinform(self, name: str, change: Callable[[Info], Info], as_name: str = "", **fields: Any) -> None:
        """Another Info in the record, or in a copy under another name."""
        with self._transaction(b"snapshots") as txn:
            record = decode_record(txn.get(self.key(name)))
            changed = record._replace(info=encode_info(change(record.decoded())), **fields)
            txn.put(self.key(as_name or name), changed.encode())

    def damage(self, name: str) -> None:
        """One byte of the Info is another."""
        with self._transaction(b"snapshots") as txn:
            value = bytearray(txn.get(self.key(name)))
            value[-1] ^= 0xFF
            assert len(value) > HEADER_BYTES
            txn.put(self.key(name), bytes(value))

    def delete(self, name: str) -> None:
        """The record is gone, and nothing else."""
        with self._transaction(b"snapshots") as txn:
            assert txn.delete(self.key(name))

    def set_child(self, parent: int, child: int, *, there: bool) -> None:
        """An entry of the index of children."""
        pair = parent.to_bytes(8) + child.to_bytes(8)
        with self._transaction(b"children") as txn:
            assert txn.put(pair, b"") if there else txn.delete(pair)

    def set_reference(self, reference: str, id_: int, name: str | None) -> None:
        """An entry of the index of references."""
        key = reference_key(self._namespace, reference) + id_.to_bytes(8)
        with self._transaction(b"references") as txn:
            assert txn.delete(key) if name is None else txn.put(key, name.encode())

    def events(self) -> dict[int, dict[str, Any]]:
        """The journal."""
        with self._transaction(b"journal", write=False) as txn:
            return {int.from_bytes(key): msgspec.msgpack.decode(body) for key, body in txn.cursor()}

    def set_event(self, sequence: int, event: dict[str, Any] | bytes | None) -> None:
        """An event is another, or gone."""
        key = sequence.to_bytes(8)
        with self._transaction(b"journal") as txn:
            if event is None:
                assert txn.delete(key)
            else:
                txn.put(key, event if isinstance(event, bytes) else msgspec.msgpack.encode(event))

    def set_topic(self, topic: str, sequence: int) -> None:
        """The newest sequence on a topic, by its index."""
        with self._transaction(b"topics") as txn:
            txn.put(topic.encode(), sequence.to_bytes(8))

    def next_id(self) -> int:
        """The first id that was not given out."""
        with self._transaction(b"meta", write=False) as txn:
            return int.from_bytes(txn.get(b"next_id"))

    def contents(self) -> dict[str, list[tuple[bytes, bytes]]]:
        """Everything in every database."""
        found: dict[str, list[tuple[bytes, bytes]]] = {}
        for name in ("meta", "snapshots", "children", "references", "journal", "topics"):
            with self._transaction(name.encode(), write=False) as txn:
                found[name] = [(bytes(key), bytes(value)) for key, value in txn.cursor()]
        return found


def remove_files(path: Path) -> None:
    """Delete a snapshot's directory, subvolumes and all."""
    for name in ("fs", "committed"):
        if path.joinpath(name).is_dir() and path.joinpath(name).stat().st_ino == btrfs_ioctl.SUBVOLUME_INODE:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                btrfs_ioctl.destroy_with_nested(fd, name, Task())
            finally:
                os.close(fd)
    shutil.rmtree(path)


def tree(root: Path) -> dict[str, tuple[int, int, int]]:
    """Mode, owner and time of change of everything in a root but the files of the database."""
    found: dict[str, tuple[int, int, int]] = {}
    for directory, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = Path(directory, name)
            if "metadata" not in path.parts and name not in ("lock", "ballast"):
                status = path.lstat()
                found[str(path.relative_to(root))] = (status.st_mode, status.st_uid, status.st_ctime_ns)
    return found
