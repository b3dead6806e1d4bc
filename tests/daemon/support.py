"""What the tests of the daemon as a process share: clients that keep books under load, and looks at the disk.

A `Worker` calls a snapshotter as fast as it answers and notes what each call must have led to. A call whose reply
never came leaves a doubt: afterwards all of it must be there, or nothing. `Ledger.check` holds the books against
what a walk shows, `check_journal` against what the journal says, `check_disk` against what lies on disk.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import lmdb

from broker.store.records import Record, decode_record
from snapbroker.blocking import Broker
from snapbroker.contract import Info, Kind, Mount
from snapbroker.errors import BrokerError, Unavailable
from snapbroker.protocol import StatusAnswer
from tests.harness import READY_S, Daemon

State = tuple[str, str] | None
"""Kind and parent of a snapshot, None where there is none."""
States = Mapping[str, State]

BASE_FILES: Final = {f"file-{number}": bytes([number]) * 100 * number for number in range(1, 6)}
"""What the base of the workers' snapshots contains."""
UNHURT_S: Final = 5.0
"""Longest a call may take while something happens elsewhere; a machine with two busy cores has its own pauses."""

_ID = re.compile(r"(?:/snapshots/|^subvolid=)(\d+)")


# Books.


@dataclass
class Ledger:
    """What must be there: `states` for certain, and of each doubt either the whole or nothing."""

    states: dict[str, State] = field(default_factory=dict)
    doubts: list[tuple[States, States]] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    acknowledged: int = 0
    refused: int = 0

    def merge(self, other: Ledger) -> None:
        """Take over another ledger's entries, of other names."""
        self.states.update(other.states)
        self.doubts += other.doubts
        assert not self.ids.keys() & other.ids.keys()
        self.ids.update(other.ids)
        self.acknowledged += other.acknowledged
        self.refused += other.refused

    def check(self, broker: Broker) -> dict[str, Info]:
        """Hold the books against a walk; answers the infos by name."""
        infos = {info.name: info for info in broker.walk()}
        actual: dict[str, State] = {name: (str(info.kind), info.parent) for name, info in infos.items()}
        named = set(self.states)
        for before, after in self.doubts:
            found = {name: actual.get(name) for name in after}
            assert found in (before, after), f"half done: {found}, neither {before} nor {after}"
            named |= set(after)
        wrong = {name: (state, actual.get(name)) for name, state in self.states.items() if actual.get(name) != state}
        assert not wrong, f"name: (acknowledged, found) {dict(list(wrong.items())[:5])}"
        assert actual.keys() <= named, f"nobody asked for {sorted(actual.keys() - named)[:5]}"
        assert len(set(self.ids.values())) == len(self.ids), "an id was used twice"
        return infos


class Worker(threading.Thread):
    """One caller: prepares, commits, views, updates and removes snapshots of its own until `stop`.

    `failures` has, for each call without an answer, when it was sent and when it failed, on the monotonic clock.
    """

    def __init__(self, daemon: Daemon, snapshotter: str, name: str) -> None:
        super().__init__(name=name)
        self.ledger = Ledger()
        self.failures: list[tuple[float, float, BrokerError]] = []
        self.error: BaseException | None = None
        self._daemon = daemon
        self._snapshotter = snapshotter
        self._halt = threading.Event()

    def run(self) -> None:
        """Work until told to stop; anything but a call that is unavailable ends it with an error."""
        try:
            # Nothing is repeated for it: what it has to tell is what became of each call.
            with self._daemon.client(self._snapshotter, connect_timeout=1.0, patience=0) as broker:
                number = 0
                while not self._halt.is_set():
                    number += 1
                    with contextlib.suppress(Unavailable):
                        self._round(broker, number)
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        """Finish the call under way."""
        self._halt.set()

    def _round(self, broker: Broker, number: int) -> None:
        key, name = f"{self.name}-{number}", f"{self.name}-{number}-committed"
        active: State = ("active", "base")
        mounts = self._call(lambda: broker.prepare(key, "base"), {key: None}, {key: active})
        self.ledger.ids[key] = id_of(mounts)
        if number % 4 == 0:
            self._call(lambda: broker.remove(key), {key: active}, {key: None})
            return
        if number % 4 == 1:
            self._call(lambda: broker.update(key, {"worker": self.name}), {key: active}, {key: active})
            return
        committed: State = ("committed", "base")
        self._call(lambda: broker.commit(name, key), {key: active, name: None}, {key: None, name: committed})
        if number % 4 == 2:
            view = f"{key}-view"
            self._call(lambda: broker.view(view, name), {view: None}, {view: ("view", name)})
        else:
            self._call(lambda: broker.remove(name), {name: committed}, {name: None})

    def _call(self, call: Callable[[], Any], before: States, after: States) -> Any:
        sent = time.monotonic()
        try:
            answer = call()
        except Unavailable as error:
            self.failures.append((sent, time.monotonic(), error))
            if is_doubtful(error):
                self.ledger.doubts.append((before, after))
                for name in after:
                    self.ledger.states.pop(name, None)
            else:
                self.ledger.refused += 1
                # As a caller does who is asked to repeat later.
                self._halt.wait(int(error.details.get("retry_after_ms", 100)) / 1000)
            raise
        self.ledger.states.update(after)
        self.ledger.acknowledged += 1
        return answer


def is_doubtful(error: BrokerError) -> bool:
    """Whether the error says that the call may have taken effect all the same."""
    return error.in_doubt or bool(error.details.get("in_doubt"))


def id_of(mounts: Iterable[Mount]) -> int:
    """What tells the snapshot apart on disk: its id, or for btrfs its subvolume's."""
    for mount in mounts:
        # The upper directory is the snapshot's own; a lower one is its parent's.
        for text in (mount.source, *(option for option in mount.options if not option.startswith("lowerdir="))):
            if found := _ID.search(text):
                return int(found[1])
    raise AssertionError(f"no id in {mounts}")


class Load:
    """Several workers on one snapshotter, on a base that is made first."""

    def __init__(self, daemon: Daemon, snapshotter: str, workers: int = 4) -> None:
        self._daemon = daemon
        self._snapshotter = snapshotter
        self._count = workers
        self._generation = 0
        self.ledger = Ledger()
        self.workers: list[Worker] = []

    def start(self) -> None:
        """Let new workers begin."""
        if not self._generation:
            make_base(self._daemon, self._snapshotter)
            self.ledger.states["base"] = ("committed", "")
        self._generation += 1
        self.workers = [
            Worker(self._daemon, self._snapshotter, f"w{self._generation}-{number}") for number in range(self._count)
        ]
        for worker in self.workers:
            worker.start()

    def wait_for_calls(self, count: int) -> None:
        """Wait until the workers of this generation have so many answers together."""
        wait_until(lambda: sum(worker.ledger.acknowledged for worker in self.workers) >= count, "calls under load")

    def stop(self) -> list[tuple[float, float, BrokerError]]:
        """End the workers and take over their books; answers the calls that had no answer."""
        for worker in self.workers:
            worker.stop()
        failures = []
        for worker in self.workers:
            worker.join(READY_S)
            assert not worker.is_alive(), "a worker hangs in a call"
            if worker.error is not None:
                raise worker.error
            self.ledger.merge(worker.ledger)
            failures += worker.failures
        self.workers = []
        return failures

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.stop()
        for worker in self.workers:
            worker.join(READY_S)


class Bystander:
    """A client of another snapshotter, or beside a bad one, that must not notice anything.

    Used as a context manager; at its end every call of it must have been answered, in `UNHURT_S` at most.
    """

    def __init__(self, daemon: Daemon, snapshotter: str, key: str = "bystander") -> None:
        self.rounds = 0
        self.slowest = 0.0
        self.error: BaseException | None = None
        self._daemon = daemon
        self._snapshotter = snapshotter
        self._key = key
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, name=key)

    def _run(self) -> None:
        try:
            with self._daemon.client(self._snapshotter, "bystander", timeout=READY_S) as broker:
                while not self._halt.is_set():
                    self._timed(lambda: broker.prepare(self._key, labels={"a": "b"}))
                    self._timed(lambda: broker.stat(self._key))
                    self._timed(lambda: broker.mounts(self._key))
                    self._timed(lambda: broker.remove(self._key))
                    self.rounds += 1
                    self._halt.wait(0.002)
        except BaseException as error:
            self.error = error

    def _timed(self, call: Callable[[], object]) -> None:
        begun = time.monotonic()
        call()
        self.slowest = max(self.slowest, time.monotonic() - begun)

    def wait_for_rounds(self, count: int = 3) -> None:
        """Wait until it has gone on for so many rounds."""
        wanted = self.rounds + count
        wait_until(lambda: self.error is not None or self.rounds >= wanted, "the bystander's rounds")

    def __enter__(self) -> Self:
        self._thread.start()
        self.wait_for_rounds()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._halt.set()
        self._thread.join(READY_S)
        if kind is None:
            assert not self._thread.is_alive(), "a bystander hangs in a call"
            if self.error is not None:
                raise self.error
            assert self.slowest < UNHURT_S, f"a bystander waited {self.slowest:.2f} s"


def wait_until(condition: Callable[[], object], what: str, timeout: float = READY_S) -> None:
    """Look again and again until the condition holds; AssertionError when it takes too long."""
    give_up = time.monotonic() + timeout
    pace = threading.Event()
    while not condition():
        assert time.monotonic() < give_up, f"{what}: not within {timeout} s"
        pace.wait(0.01)


def pid_of(daemon: Daemon, snapshotter: str) -> int:
    """The process of a snapshotter that serves."""
    daemon.wait_ready()
    pid = daemon.actor(snapshotter).pid
    # Signals to process 0 go to the whole group of the sender: to the test run itself.
    assert pid > 0
    return pid


@contextlib.contextmanager
def paused(daemon: Daemon, snapshotter: str) -> Iterator[int]:
    """An actor that does not run for a while; gives its process id."""
    pid = pid_of(daemon, snapshotter)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        # It may have been given up meanwhile.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def queue_of(status: StatusAnswer, snapshotter: str, queue: str) -> dict[str, int]:
    """The figures of one queue of one snapshotter, empty while it has none."""
    (actor,) = [actor for actor in status.snapshotters if actor.name == snapshotter]
    return actor.queues.get(queue, {})


# Files.


def directory_of(daemon: Daemon, snapshotter: str, mounts: Iterable[Mount]) -> Path:
    """Where the files of an active snapshot lie on disk; for btrfs found by the subvolume's id."""
    (mount,) = mounts
    if mount.type == "overlay":
        return Path(next(o for o in mount.options if o.startswith("upperdir=")).removeprefix("upperdir="))
    if mount.type == "bind":
        return Path(mount.source)
    subvolume = id_of([mount])
    for directory in (daemon.root_of(snapshotter) / "snapshots").glob("*/fs"):
        # The number that btrfs shows for a subvolume's own root is 256; its id is in the mount alone.
        if _subvolume_id(directory) == subvolume:
            return directory
    raise AssertionError(f"no subvolume {subvolume}")


def _subvolume_id(directory: Path) -> int:
    from backends import btrfs_ioctl

    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return btrfs_ioctl.subvolume(fd).id
    finally:
        os.close(fd)


def make_base(daemon: Daemon, snapshotter: str, name: str = "base", files: Mapping[str, bytes] = BASE_FILES) -> None:
    """A committed snapshot with these files."""
    with daemon.client(snapshotter) as broker:
        mounts = broker.prepare(f"{name}-making")
        directory = directory_of(daemon, snapshotter, mounts)
        for path, content in files.items():
            (directory / path).write_bytes(content)
        broker.commit(name, f"{name}-making")


def make_tree(directory: Path, files: int, size_bytes: int) -> None:
    """Files of `size_bytes` each, a hundred to a directory."""
    content = os.urandom(size_bytes)
    for number in range(files):
        below = directory / f"directory-{number // 100}"
        if number % 100 == 0:
            below.mkdir()
        (below / f"file-{number}").write_bytes(content)


# Looks at what is stored.


def records_of(daemon: Daemon, snapshotter: str) -> dict[tuple[str, str], Record]:
    """Every record of a snapshotter's database, by namespace and name; the daemon may be running."""
    with _database(daemon, snapshotter) as environment:
        found = environment.open_db(b"snapshots", create=False)
        with environment.begin(db=found) as transaction:
            rows = [(bytes(key), decode_record(value)) for key, value in transaction.cursor()]
    return {(key.partition(b"\0")[0].decode(), record.decoded().name): record for key, record in rows}


def next_id_of(daemon: Daemon, snapshotter: str) -> int:
    """The first id that the database has not given out."""
    with _database(daemon, snapshotter) as environment:
        meta = environment.open_db(b"meta", create=False)
        with environment.begin(db=meta) as transaction:
            return int.from_bytes(transaction.get(b"next_id"))


@contextlib.contextmanager
def _database(daemon: Daemon, snapshotter: str) -> Iterator[Any]:
    environment = lmdb.open(str(daemon.root_of(snapshotter) / "metadata"), readonly=True, max_dbs=8)
    try:
        yield environment
    finally:
        environment.close()


def check_journal(broker: Broker, infos: Mapping[str, Info]) -> None:
    """The journal has no gap, its topics' chains hold, and replayed from the beginning it gives `infos`."""
    replayed: dict[str, Info] = {}
    last: dict[str, int] = {}
    newest = 0
    for event in broker.events(since=0, topics=[f"{broker.snapshotter_name}/"], follow=False):
        assert event.sequence == newest + 1
        assert event.previous == last.get(event.topic, 0)
        newest = last[event.topic] = event.sequence
        if event.namespace != broker.namespace:
            continue
        if event.verb in ("remove", "commit"):
            del replayed[event.key]
        if event.info is not None:
            replayed[event.info.name] = event.info
    assert replayed == infos


def check_disk(daemon: Daemon, snapshotter: str) -> None:
    """Recovered and cleaned up, nothing is on disk but what a record has, whole, and what is stocked for this run."""
    daemon.wait_for(lambda status: queue_of(status, snapshotter, "recovery").get("finished"))
    with daemon.client(snapshotter) as broker:
        broker.cleanup()
    root = daemon.root_of(snapshotter)
    assert os.listdir(root / "trash") == []
    records = records_of(daemon, snapshotter)
    in_use = {record.id for record in records.values()}
    assert len(in_use) == len(records), "two snapshots have the same id"
    assert max(in_use, default=0) < next_id_of(daemon, snapshotter)

    def only_stocked_besides(status: StatusAnswer) -> bool:
        besides = {int(name) for name in os.listdir(root / "snapshots")} - in_use
        return len(besides) == queue_of(status, snapshotter, "pool").get("ready", 0)

    daemon.wait_for(only_stocked_besides)
    for (_, name), record in records.items():
        assert not record.broken, name
        check_whole(
            root / "snapshots" / str(record.id), record, daemon.snapshotters[snapshotter].get("backend", snapshotter)
        )


def check_whole(place: Path, record: Record, backend: str) -> None:
    """What the record promises is there, and nothing of what only a step on the way to it needed."""
    borrows = record.kind is Kind.VIEW and record.parent_id and backend != "overlayfs"
    if borrows:
        assert not place.exists()
    elif backend == "overlayfs":
        wanted = {"fs", "work"} if record.kind is Kind.ACTIVE else {"fs"}
        assert wanted <= set(os.listdir(place))
    elif backend == "native":
        check_files(place)
    else:
        assert backend == "btrfs"
        assert os.listdir(place) == ["committed" if record.kind is Kind.COMMITTED else "fs"]
        check_files(place / os.listdir(place)[0])


def check_files(directory: Path) -> None:
    """The files of the base, all of them and as they were."""
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == BASE_FILES
