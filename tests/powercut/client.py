"""A client nobody planned: one namespace, random requests and files, and a note of each step for the books.

Every answer is held against the oracle as it comes. A request that changes something carries a token, most of the
time: it can be repeated until its outcome is known, and once more when that is. With `patience_s` the client does so
by itself, as long as the broker is away.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from snapbroker import mount
from snapbroker.contract import Kind
from snapbroker.errors import BrokerError, ResourceExhausted, Unavailable
from snapbroker.protocol import (
    Call,
    Cleanup,
    Commit,
    Mounts,
    MountsAnswer,
    Prepare,
    Progress,
    Remove,
    Stat,
    Update,
    UsageOf,
    View,
    Walk,
)
from tests.harness import Daemon, Result, Silence, Wire
from tests.powercut.books import Books, Contents, Digests, Said, Step, Wrote, alike, check_results, digest

NAMES: Final = tuple(f"{stem}{number}" for stem in ("a", "b", "c") for number in range(8))
"""Few, so that keys are taken, freed and taken again."""
SNAPSHOTS_MAX: Final = 12
"""A client with more removes one."""
PATHS: Final = tuple(f"{place}file-{number}" for place in ("", "below/", "below/deep/") for number in range(3))
FILE_BYTES_MAX: Final = 40_000
LOOK: Final = "look"
"""The key of a view through which a committed snapshot's files are looked at."""
REPLY_S: Final = 3.0
"""How long a client that repeats waits for a reply before it asks again."""
PAUSE_S: Final = 0.05
"""Pause before a repeat that the broker has not named one for."""

_AWAY: Final = (Unavailable, ResourceExhausted)
_CHANGES: Final = (Prepare, View, Commit, Remove, Update)


class Client(threading.Thread):
    """One caller of one snapshotter, at work from `start` to `stop`; `error` is what ended it before."""

    def __init__(self, daemon: Daemon, books: Books, seed: str, *, patience_s: float = 0.0, notes: bool = True) -> None:
        super().__init__(name=books.name, daemon=True)
        self.snapshotter = books.oracle.snapshotter
        self.books = books
        self.steps: list[Step] = []
        self.answers = 0
        self.repeats = 0
        self.error: BaseException | None = None
        self.on_events: Callable[[Sequence[tuple[str, str, str]]], None] | None = None
        self._daemon = daemon
        self._random = random.Random(seed)
        self._patience_s = patience_s
        self._notes = notes
        self._halt = threading.Event()
        self._pace = threading.Event()
        self._wire: Wire | None = None

    def run(self) -> None:
        """Work until told to stop; an answer that is not the oracle's ends it."""
        try:
            while not self._halt.is_set():
                self.step()
        except BaseException as error:
            self.error = error
        finally:
            self.close()

    def stop(self) -> None:
        """Finish the step under way."""
        self._halt.set()

    def abandon(self) -> None:
        """Finish without patience: whoever calls this has no use for the outcome of the step under way."""
        self._patience_s = 0.0
        self._halt.set()

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    # Requests.

    def say(self, *calls: Call, atomic: bool = False, token: bytes | None = None) -> list[Result]:
        """Send a request, check what is answered, and enter it into the books; without `token` it gets a random one."""
        if token is None:
            changes = all(isinstance(call, _CHANGES) for call in calls)
            token = self._random.randbytes(16) if changes and self._must_be_known() else b""
        said = Said(calls, time.monotonic_ns(), atomic, token)
        if self._notes:
            self.steps.append(said)
        said.results = self.ask(said)
        said.answered = time.monotonic_ns()
        expected = self.books.say(said)
        check_results(said, expected)
        self.answers += 1
        if self.on_events is not None:
            happened = self.books.happened()
            self.books.forget_events()
            self.on_events(happened)
        return said.results

    def _must_be_known(self) -> bool:
        return self._patience_s > 0 or self._random.random() < 0.7

    def ask(self, said: Said) -> list[Result]:
        """The results of a request, repeated while the broker is away if this client does that."""
        begun = time.monotonic()
        while True:
            try:
                results = self._once(said)
            except (Silence, *_AWAY) as error:
                self.close()
                if time.monotonic() > begun + self._patience_s:
                    raise
                pause = _pause(error)
            else:
                away = [result for result in results if isinstance(result, _AWAY)]
                if not away or time.monotonic() > begun + self._patience_s:
                    return results
                pause = _pause(away[0])
            self.repeats += 1
            # Not ended by a stop: the outcome must be known all the same.
            self._pace.wait(pause)

    def _once(self, said: Said) -> list[Result]:
        if self._wire is None:
            self._wire = self._daemon.wire(self.snapshotter, self.books.oracle.namespace)
        if not self._patience_s:
            return self._wire.call(*said.calls, atomic=said.atomic, token=said.token)
        sent = self._wire.send(*said.calls, atomic=said.atomic, token=said.token)
        parts = self._wire.parts(sent, said.calls, timeout=REPLY_S)
        results = {number: result for number, result in parts if not isinstance(result, Progress)}
        return [results[number] for number in range(len(said.calls))]

    # Steps.

    def step(self) -> None:
        """One random thing."""
        actives = self.books.names(Kind.ACTIVE)
        choices: list[tuple[int, Callable[[], object]]] = [
            (6, self._prepare),
            (2, self._view),
            (2, self._remove),
            (1, self._update),
            (2, self._read),
        ]
        if actives:
            choices += [(5, self._write), (5, self._commit), (2, self._commit_and_go_on)]
        if len(self.books.oracle.snapshots) > SNAPSHOTS_MAX:
            choices = [(1, self._remove)]
        elif self._random.random() < 0.02:
            choices = [(1, lambda: self.say(Cleanup()))]
        weights, actions = zip(*choices, strict=True)
        self._random.choices(actions, weights)[0]()

    def _one_of(self, *kinds: Kind) -> str:
        """A name of these kinds, now and then any name."""
        names = self.books.names(*kinds)
        return self._random.choice(names if names and self._random.random() < 0.95 else NAMES)

    def _labels(self) -> dict[str, str]:
        return {"step": str(self._random.randrange(1000))} if self._random.random() < 0.5 else {}

    def _fence(self, key: str) -> int:
        known = self.books.mounts.get(key)
        return known.fence if known is not None and self._random.random() < 0.3 else 0

    def _parent(self) -> str:
        return self._one_of(Kind.COMMITTED) if self._random.random() < 0.7 else ""

    def _prepare(self) -> None:
        key = self._random.choice(NAMES)
        (answer,) = self.say(Prepare(key=key, parent=self._parent(), labels=self._labels()))
        if isinstance(answer, MountsAnswer) and self._random.random() < 0.6:
            self.write(key, answer)

    def _view(self) -> None:
        self.say(View(key=self._random.choice(NAMES), parent=self._parent(), labels=self._labels()))

    def _commit(self) -> None:
        key = self._one_of(Kind.ACTIVE)
        self.say(self._commit_of(key))

    def _commit_of(self, key: str) -> Commit:
        name, sync = self._random.choice(NAMES), self._random.random() < 0.5
        return Commit(name=name, key=key, labels=self._labels(), sync=sync, fence=self._fence(key))

    def _commit_and_go_on(self) -> None:
        commit = self._commit_of(self._one_of(Kind.ACTIVE))
        self.say(commit, Prepare(key=self._random.choice(NAMES), parent=commit.name), atomic=True)

    def _remove(self) -> None:
        key = self._one_of(*Kind)
        self.say(Remove(key=key, fence=self._fence(key)))

    def _update(self) -> None:
        paths = self._random.choice([(), ("labels.step",)])
        self.say(Update(name=self._one_of(*Kind), labels=self._labels(), fieldpaths=paths))

    def _read(self) -> None:
        key = self._one_of(*Kind)
        self.say(self._random.choice([Stat(key=key), Mounts(key=key), UsageOf(key=key), Walk()]), token=b"")

    def _write(self) -> None:
        key = self._random.choice(self.books.names(Kind.ACTIVE))
        (answer,) = self.say(Mounts(key=key), token=b"")
        assert isinstance(answer, MountsAnswer)
        self.write(key, answer)

    # Files.

    def verify(self, digests_of: Callable[[Contents], Digests]) -> int:
        """Mounts are answered as before, and the files are there that `digests_of` picks; answers how many files."""
        count = 0
        for name, contents in list(self.books.contents.items()):
            digests = digests_of(contents)
            committed = self.books.oracle.snapshots[name].kind is Kind.COMMITTED
            if committed and not digests:
                continue
            call = View(key=LOOK, parent=name) if committed else Mounts(key=name)
            (answer,) = self.say(call, token=None if committed else b"")
            assert isinstance(answer, MountsAnswer)
            known = None if committed else self.books.mounts.get(name)
            assert known is None or alike([answer], [known]), f"{self.name}: {name} has {answer}, not {known}"
            if digests:
                with mount.mounted(answer.mounts) as directory:
                    count += check_contents(directory, digests, f"{self.name} {name}")
            if committed:
                self.say(Remove(key=LOOK))
        return count

    def write(self, key: str, answer: MountsAnswer) -> None:
        """Write some files, through the mount or where they lie; sometimes each is flushed, as by a careful program."""
        if answer.mounts[-1].type == "memory":
            return
        durable = self._random.random() < 0.3
        with self._opened(answer) as (directory, may_delete):
            changes: dict[str, bytes | None] = {}
            for path in self._random.sample(PATHS, self._random.randint(1, 3)):
                delete = may_delete and self._random.random() < 0.2
                changes[path] = None if delete else self._random.randbytes(self._random.randrange(FILE_BYTES_MAX))
            digests: Digests = {path: None if new is None else digest(new) for path, new in changes.items()}
            wrote = Wrote(key, digests, time.monotonic_ns(), durable)
            if self._notes:
                self.steps.append(wrote)
            for path, content in changes.items():
                write_file(directory, path, content, durable=durable)
            wrote.answered = time.monotonic_ns()
        self.books.wrote(wrote, durable=durable)

    @contextlib.contextmanager
    def _opened(self, answer: MountsAnswer) -> Iterator[tuple[Path, bool]]:
        """The directory to write into, and whether a file of a parent can be deleted there."""
        last = answer.mounts[-1]
        if last.type == "btrfs" or self._random.random() < 0.4:
            with mount.mounted(answer.mounts) as path:
                yield path, True
        elif last.type == "overlay":
            yield Path(next(o for o in last.options if o.startswith("upperdir=")).removeprefix("upperdir=")), False
        else:
            yield Path(last.source), True


def _pause(error: Exception) -> float:
    details: Any = error.details if isinstance(error, BrokerError) else {}
    return int(details.get("retry_after_ms", PAUSE_S * 1000)) / 1000


def write_file(directory: Path, path: str, content: bytes | None, *, durable: bool) -> None:
    """Replace, make or delete a file; `durable`: flushed, and every directory up to the snapshot's root."""
    place = directory / path
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_char_device():
        # Where an overlay's files lie, one that was deleted through its mount.
        place.unlink()
    if content is None:
        place.unlink(missing_ok=True)
    else:
        with place.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
    while durable and place != directory:
        place = place.parent
        _flush_directory(place)


def _flush_directory(place: Path) -> None:
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_contents(directory: Path, digests: Digests, what: str) -> int:
    """Every file is as it must be, byte by byte; answers how many were looked at."""
    for path, wanted in digests.items():
        place = directory / path
        if wanted is None:
            assert not place.exists(), f"{what}: {path} was deleted, and is there"
        else:
            assert place.exists(), f"{what}: {path} is missing"
            found = place.read_bytes()
            assert digest(found) == wanted, f"{what}: {path} is damaged: {len(found)} bytes"
    return len(digests)
