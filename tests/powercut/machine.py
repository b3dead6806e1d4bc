"""A machine that loses power again and again: load, cut, the daemon on what is left, everything checked, and on.

Each round has one of two cuts: in the middle of a load, after a random number of answers and a random moment more; or
while the daemon starts, in the middle of a recovery. Then the image is mounted, the daemon started on it, and held
against the books of every client:

- A request that was acknowledged before the image was taken is there exactly; one that was under way is there whole or
  not at all; one that was sent later cannot be there.
- The journal's events of a client are those of its requests, no more and no less; it has no gap; replayed it gives
  what a walk shows. A repeat with a token gets the first answer and changes nothing; where there was none, it is
  executed.
- No record is without its files, and none of the files is without a record. Files of a `sync` commit, and files that
  their writer flushed, are whole byte by byte, through the snapshot's own mounts.
- The clients go on: what they prepare, commit and remove next is checked like everything else.

Everything random comes from one seed; how the threads of a machine interleave does not.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, Self

import psutil

from tests.daemon.support import wait_until
from tests.harness import Daemon, Silence
from tests.oracle import Oracle
from tests.powercut.books import Books
from tests.powercut.checks import check_directories, check_journal, check_recovered, happenings
from tests.powercut.client import Client
from tests.powercut.disk import Cut, Disk
from tests.powercut.settling import Settling

BACKENDS: Final = {"ext4": ("overlayfs", "native"), "xfs": ("overlayfs", "native"), "btrfs": ("btrfs", "native")}
"""The snapshotters of a machine, by the filesystem that they lie on."""
CLIENTS: Final = 3
"""Clients of each snapshotter."""
ANSWERS_MAX: Final = 300
"""Most answers before a cut; the fewest are none."""
ANSWERS_S: Final = 120.0
"""How long the answers before a cut may take, on a disk however slow."""
MOMENT_S: Final = 0.02
"""Longest time between the last of these answers and the cut."""
START_S: Final = 0.8
"""Longest time between the daemon's start and a cut in it: until about when it serves."""
STARTS: Final = 0.15
"""Share of the cuts that are made while the daemon starts."""


class Machine(Settling):
    """One filesystem, one daemon, its clients, and their books; a context manager."""

    def __init__(
        self,
        filesystem: str,
        host: Path,
        seed: str,
        environment: dict[str, str] | None = None,
        disk: type[Disk] = Disk,
    ) -> None:
        super().__init__()
        self.seed = f"{seed}/{filesystem}"
        self._filesystem = filesystem
        self._host = host
        self._undo = ExitStack()
        self._rounds = 0
        self._environment = environment
        self._kind = disk
        self._disk: Disk | None = None

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            target = self._host / f"{self._filesystem}-mounted"
            snapshotters = BACKENDS[self._filesystem]
            sections = {name: {"backend": name, "root": str(target / name)} for name in snapshotters}
            self.daemon = Daemon(sections, environment=self._environment)
            undo.callback(self._take_down)
            self._insert(self._kind.made(self._filesystem, self._host, target))
            self.daemon.start()
            for name in snapshotters:
                self.sequences[name] = 0
                for number in range(CLIENTS):
                    books = Books(Oracle(name, f"client-{number}", rebases=name == "overlayfs"))
                    self.books[books.name] = books
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.__exit__(*exception)  # type: ignore[arg-type]

    def _insert(self, disk: Disk) -> None:
        disk.__enter__()
        self._disk = disk

    def _eject(self) -> None:
        if self._disk is not None:
            disk, self._disk = self._disk, None
            disk.__exit__()

    def _take_down(self) -> None:
        """The daemon before the disk it is on."""
        try:
            self.daemon.remove()
        finally:
            self._eject()

    def _switch_off(self) -> None:
        """End all processes at once, as the power does; an actor alone would take its time to notice."""
        for process in psutil.Process(self.daemon.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.daemon.kill()

    def round(self, work: Callable[[list[Client]], None] | None = None) -> None:
        """Cut the power once, and check what is left; AssertionError, with the seed, where something is wrong.

        With `work` that is what the clients do, and the cut comes right behind it.
        """
        self._rounds += 1
        seed = f"{self.seed}/{self._rounds}"
        clients = self._clients(seed)
        try:
            chance = random.Random(seed)
            cut = self._cut(clients, chance) if work is None else self._cut_behind(work, clients, chance)
            self._switch_off()
            disk = self._disk
            assert disk is not None
            self._eject()
            self._insert(disk.after(cut))
            self.daemon.start()
            for client in clients:
                self.settle(client, cut.before, cut.after, power=True)
            self._check(clients)
        except BaseException as error:
            error.add_note(f"power cut {seed}: {self.daemon.log()[-4000:]}")
            if isinstance(error, Silence):
                error.add_note(self.daemon.stacks())
            raise
        finally:
            for client in clients:
                client.close()
        self.figures["cuts"] += 1

    def _clients(self, seed: str) -> list[Client]:
        for books in self.books.values():
            books.forget_events()
        return [Client(self.daemon, books.copy(), f"{seed}/{name}") for name, books in self.books.items()]

    # The cut.

    def _cut(self, clients: list[Client], chance: random.Random) -> Cut:
        assert self._disk is not None
        pace = threading.Event()
        if self._rounds > 1 and chance.random() < STARTS:
            self.figures["cuts at a start"] += 1
            self._switch_off()
            self.daemon.start(wait=False)
            pace.wait(chance.uniform(0, START_S))
            return self._disk.cut(chance)
        enough, moment = chance.randint(0, ANSWERS_MAX), chance.uniform(0, MOMENT_S)
        for client in clients:
            client.start()
        try:
            wait_until(
                lambda: sum(client.answers for client in clients) >= enough or any(client.error for client in clients),
                "answers before a cut",
                ANSWERS_S,
            )
            # The moment is what is random here: nothing is waited for.
            pace.wait(moment)
            cut = self._disk.cut(chance)
        finally:
            for client in clients:
                client.stop()
            for client in clients:
                client.join()
        for client in clients:
            if client.error is not None:
                raise client.error
        return cut

    def _cut_behind(self, work: Callable[[list[Client]], None], clients: list[Client], chance: random.Random) -> Cut:
        assert self._disk is not None
        work(clients)
        return self._disk.cut(chance)

    # What is left of the whole.

    def _check(self, clients: list[Client]) -> None:
        for client in clients:
            self.figures["files"] += client.verify(lambda contents: contents.certain)
            self.go_on(client)
        for name in self.daemon.snapshotters:
            self.figures["left-overs"] += check_recovered(self.daemon, name)["leftovers"]
            self.figures["records"] += check_directories(self.daemon, name)
            mine = [client for client in clients if client.snapshotter == name]
            with self.daemon.wire(name) as wire:
                events = check_journal(wire, [client.books.oracle.namespace for client in mine])
            later = events[self.sequences[name] :]
            for client in mine:
                # With the repeats and the checks above, there is still an event for each change, and no other.
                told, asked = happenings(later, client.books.oracle.namespace), client.books.happened()
                assert told == asked, f"{client.name}: events {told}, asked for {asked}"
            self.sequences[name] = events[-1].sequence
