"""A client of one namespace that comes by everything a snapshotter does, again and again, until its calls fail."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from backends import btrfs_ioctl
from snapbroker import mount
from snapbroker.contract import GIDMAPPING_LABEL, SNAPSHOT_REF_LABEL, UIDMAPPING_LABEL, Kind
from snapbroker.errors import ResourceExhausted, Unavailable
from snapbroker.protocol import (
    Call,
    Cleanup,
    Commit,
    Mounts,
    MountsAnswer,
    Prepare,
    Remove,
    Stat,
    Update,
    UsageOf,
    View,
)
from tests.harness import Daemon, Result, Silence
from tests.powercut.books import Books, Said
from tests.powercut.client import Client

AWAY: Final = (Unavailable, ResourceExhausted)
LARGE_LABELS: Final = {f"large-{number}": "x" * 4000 for number in range(200)}
"""800 kB in a record, and again in its event."""
NESTED: Final = "nested"


class Caller(Client):
    """Stories in random order, each call with a token; a call without an outcome ends it, and is left in doubt."""

    def __init__(self, daemon: Daemon, books: Books, seed: str, *, large: bool = False) -> None:
        super().__init__(daemon, books, seed)
        self.in_doubt = False
        self._large = large
        self._numbers = 0
        self.base = ""
        self.nests: tuple[str, ...] = ()
        """The names of a snapshot with a subvolume inside, before and after its commit."""

    def run(self) -> None:
        """Work until told to stop, or until a call is in doubt."""
        try:
            self.base = self._layer("")
            while not self._halt.is_set():
                for story in self._stories():
                    if self._halt.is_set():
                        break
                    story()
        except (Silence, *AWAY):
            self.in_doubt = True
        except BaseException as error:
            self.error = error
        finally:
            self.close()

    def tidy(self) -> None:
        """Remove everything, children first."""
        while left := self.books.oracle.snapshots:
            parents = {snapshot.parent for snapshot in left.values()}
            self.say(*(Remove(key=name) for name in left.keys() - parents), atomic=True)

    def ask(self, said: Said) -> list[Result]:
        """As it is answered; Unavailable and the like stand for the whole request."""
        results = super().ask(said)
        for result in results:
            if isinstance(result, AWAY):
                raise result
        return results

    def _must_be_known(self) -> bool:
        return True

    # Stories: each leaves nothing but what its last call may have left.

    def _stories(self) -> list[Callable[[], Any]]:
        stories = [
            self._commits,
            self._views,
            self._updates,
            self._goes_on,
            self._fails_to_prepare,
            self._fails_to_commit,
            self._many,
            self._side_by_side,
            lambda: self.say(Cleanup(), token=b""),
        ]
        if self.snapshotter == "overlayfs":
            stories += [self._rebases, self._maps]
        if self.snapshotter == "btrfs":
            stories += [self._nests, self._nests_in_vain]
        self._random.shuffle(stories)
        return [self._grows] * 6 + stories if self._large else stories

    def _fresh(self, stem: str) -> str:
        self._numbers += 1
        return f"{stem}-{self._numbers}"

    def _prepared(self, parent: str, **labels: str) -> str:
        key = self._fresh("active")
        (answer,) = self.say(Prepare(key=key, parent=parent, labels=labels))
        assert isinstance(answer, MountsAnswer)
        self.write(key, answer)
        return key

    def _layer(self, parent: str, *, sync: bool = False) -> str:
        key, name = self._prepared(parent), self._fresh("layer")
        if not sync:
            self.say(Mounts(key=key), token=b"")
        self.say(Commit(name=name, key=key, sync=sync, labels={SNAPSHOT_REF_LABEL: name}))
        return name

    def _remove(self, *names: str) -> None:
        for name in names:
            self.say(Remove(key=name))

    def _commits(self) -> None:
        child = self._layer(self.base, sync=True)
        grandchild = self._layer(child)
        self._remove(grandchild, child)

    def _views(self) -> None:
        of_base, of_nothing = self._fresh("view"), self._fresh("view")
        self.say(View(key=of_base, parent=self.base))
        self.say(View(key=of_nothing))
        self._remove(of_base, of_nothing)

    def _updates(self) -> None:
        key = self._prepared(self.base)
        self.say(UsageOf(key=key), token=b"")
        self.say(Update(name=key, labels={"step": key}))
        self.say(Stat(key=key), token=b"")
        self._remove(key)

    def _goes_on(self) -> None:
        key, name, following = self._prepared(self.base), self._fresh("layer"), self._fresh("active")
        self.say(Commit(name=name, key=key), Prepare(key=following, parent=name), atomic=True)
        self._remove(following, name)

    def _fails_to_prepare(self) -> None:
        self.say(Prepare(key=self._fresh("never"), parent=self.base), Prepare(key=self.base), atomic=True)

    def _fails_to_commit(self) -> None:
        key = self._prepared(self.base)
        self.say(Commit(name=self._fresh("never"), key=key, sync=True), Prepare(key=self.base), atomic=True)
        self._remove(key)

    def _many(self) -> None:
        calls: tuple[Call, ...] = tuple(Prepare(key=self._fresh("many"), parent=self.base) for _ in range(3))
        self.say(*calls, atomic=True)
        self._remove(*(call.key for call in calls if isinstance(call, Prepare)))

    def _side_by_side(self) -> None:
        """Calls of one request that do not wait for each other, each of which may have happened alone."""
        view, copy, empty = self._fresh("beside"), self._fresh("beside"), self._fresh("beside")
        self.say(View(key=view, parent=self.base), Prepare(key=copy, parent=self.base), Prepare(key=empty))
        self.say(*(Remove(key=key) for key in (view, copy, empty)))

    def _nests(self) -> None:
        """A subvolume that somebody made inside, which a commit makes a directory."""
        key, name = self._prepared_with_a_nest(), self._fresh("layer")
        self.nests = (key, name)
        self.say(Commit(name=name, key=key))
        self._remove(name)
        self.nests = ()

    def _nests_in_vain(self) -> None:
        self._remove(self._prepared_with_a_nest())

    def _prepared_with_a_nest(self) -> str:
        key = self._prepared(self.base)
        (answer,) = self.say(Mounts(key=key), token=b"")
        assert isinstance(answer, MountsAnswer)
        with mount.mounted(answer.mounts) as directory, open_directory(directory) as fd:
            btrfs_ioctl.create_subvolume(fd, NESTED)
        return key

    def check_nest(self) -> None:
        """What was made inside is there, in the active snapshot or in the one that was made of it."""
        for name in self.nests:
            found = self.books.oracle.snapshots.get(name)
            if found is not None:
                look = name if found.kind is Kind.ACTIVE else self._fresh("look")
                call = Mounts(key=name) if look == name else View(key=look, parent=name)
                (answer,) = self.say(call, token=b"" if look == name else None)
                assert isinstance(answer, MountsAnswer)
                with mount.mounted(answer.mounts) as directory:
                    assert (directory / NESTED).is_dir(), f"{name} has lost the subvolume inside"

    def _grows(self) -> None:
        key = self._fresh("large")
        self.say(View(key=key, parent=self.base, labels=LARGE_LABELS))
        self._remove(key)

    def _rebases(self) -> None:
        key, name = self._prepared(""), self._fresh("layer")
        self.say(Commit(name=name, key=key, parent=self.base))
        self._remove(name)

    def _maps(self) -> None:
        mapping = "0:100000:65536"
        key = self._fresh("active")
        self.say(Prepare(key=key, labels={UIDMAPPING_LABEL: mapping, GIDMAPPING_LABEL: mapping}))
        self._remove(key)


@contextlib.contextmanager
def open_directory(path: Path) -> Iterator[int]:
    """A descriptor of a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)
