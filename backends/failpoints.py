"""Named points between the steps on disk and in the database, at which a test ends the process or makes a call fail.

Nothing is armed unless SNAPBROKER_FAILPOINTS names a directory when the daemon is started. Then a file there, named
like a point, arms it in all processes of the daemon; its content is

    ACTION[@N] [PROCESS]

the N-th time (the first where it is left out) that one process, `actor` or `hand` (any where it is left out), is there:

    kill          the process ends as by SIGKILL; the file is taken away first, so that the next life goes on
    error:ENOSPC  OSError of that name is raised, from then on, as long as the file is there
    pause         the thread waits there, as long as the file is there
    note          nothing; it is only marked

A point that struck is marked by a file of its name with `.struck` behind it, which names the process where one is left.
There is no other way to arm one: nothing that comes over a socket can.

A point is named after the module that reaches it. The table says of each what has just been done and what is done
next, and what a crash leaves that recovery has to deal with; the tests are made from it.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Final, NamedTuple

from snapbroker.errors import InvalidArgument

VARIABLE: Final = "SNAPBROKER_FAILPOINTS"
STRUCK: Final = ".struck"
PAUSE_S: Final = 0.005
"""How often a paused thread looks whether it may go on."""

ACTOR: Final = "actor"
HAND: Final = "hand"

# What a crash leaves.
NOTHING: Final = "nothing: what was written so far is dropped with its transaction"
WHOLE: Final = "the change, whole; a repeat with its token gets the first answer"
ZEROS: Final = "zeros behind the pages of the database, which are used later"
LEFT_OVER: Final = (
    "a directory without a record, discarded by recovery; by the actor at once where only a hand was ended"
)
TRASH: Final = "an entry of the trash, or half of one, which is deleted later"
HALVES: Final = "both halves of a btrfs commit, of which recovery drops the one that does not count"
START: Final = "a start half done, which the next one does again"
LEDGER: Final = "a ledger that was not closed, which the next start writes anew"


class Point(NamedTuple):
    """One point: what is done, what comes next, what a crash in between leaves, and where it is reached."""

    name: str
    after: str
    before: str
    leaves: str
    backends: tuple[str, ...] = ("overlayfs", "native", "btrfs")
    processes: tuple[str, ...] = (ACTOR,)


_BOTH: Final = (ACTOR, HAND)
_OVERLAYFS: Final = ("overlayfs",)
_NATIVE: Final = ("native",)
_BTRFS: Final = ("btrfs",)

POINTS: Final = (
    # A turn of the writer.
    Point("writer.begun", "operations are taken from the inbox", "their transaction", NOTHING),
    Point("snapshots.inserted", "a record is put", "its place among its parent's children", NOTHING),
    Point("snapshots.deleted", "a record is deleted", "its place among its parent's children", NOTHING),
    Point("snapshots.referred", "a committed name is put under its reference", "the event", NOTHING),
    Point("verbs.created", "a prepare's or view's record is put", "its event", NOTHING),
    Point("verbs.consumed", "a commit's active record is deleted", "its committed record", NOTHING),
    Point("verbs.committed", "a commit's committed record is put", "its event", NOTHING),
    Point("verbs.removed", "a record is deleted", "the removal's event", NOTHING),
    Point("verbs.updated", "a record is put again", "the update's event", NOTHING),
    Point("journal.appended", "an event is put", "the rest of the turn", NOTHING),
    Point("journal.trimmed", "old events are deleted", "the rest of the turn", NOTHING),
    Point("outcomes.stored", "a token's outcome is put", "its place in the order of time", NOTHING),
    Point("outcomes.trimmed", "an old outcome is deleted", "its place in the order of time", NOTHING),
    Point("environment.nested", "an atomic request is in its parent transaction", "the rest of the turn", NOTHING),
    Point("environment.full", "a transaction is dropped, the map being full", "a larger map", NOTHING),
    Point("environment.grown", "the map is larger", "the same work again", NOTHING),
    Point("preallocation.written", "the database's file is longer", "its flush", ZEROS, ("overlayfs", "native")),
    Point("environment.worked", "everything of a transaction is written", "its commit", NOTHING),
    Point("environment.committed", "a transaction is committed", "what follows from it", WHOLE),
    Point("writer.settled", "a turn is committed", "what it needs of the backend, and what it removed", WHOLE),
    Point("writer.cleared", "what was removed is put aside", "the replies", WHOLE),
    Point("writer.delivered", "replies and events are on their way", "undoing what failed", WHOLE),
    Point("service.answered", "the replies of a turn are sent", "its events", WHOLE),
    Point("service.published", "the events of a turn are sent", "the next turn", WHOLE),
    Point("service.emptied", "the trash is empty", "the event of a cleanup", NOTHING),
    # What a backend does for a call.
    Point("writer.held", "a call's names are held", "what its backend does for it", NOTHING),
    Point("writer.made", "a backend has worked for a call", "the call is decided again", LEFT_OVER),
    Point("writer.undoing", "a call failed, for which a backend has worked", "that is undone", LEFT_OVER),
    Point("overlayfs.made", "a snapshot's directory is made", "those in it", LEFT_OVER, _OVERLAYFS, _BOTH),
    Point("overlayfs.filled", "a snapshot's directories are made", "their flush", LEFT_OVER, _OVERLAYFS, _BOTH),
    Point("overlayfs.flushed", "a snapshot's directories are durable", "they are used", LEFT_OVER, _OVERLAYFS, _BOTH),
    Point("overlayfs.undoing", "directories cannot be made", "what was made goes", LEFT_OVER, _OVERLAYFS, _BOTH),
    Point("native.made", "a snapshot's directory is made", "what is in it", LEFT_OVER, _NATIVE, _BOTH),
    Point("entries.copied", "a file is copied", "the next", LEFT_OVER, _NATIVE, _BOTH),
    Point("copying.walked", "all files are copied", "what directories get", LEFT_OVER, _NATIVE, _BOTH),
    Point("patterns.filled", "all files are made from memory", "what directories get", LEFT_OVER, _NATIVE, _BOTH),
    Point("native.copied", "a tree is copied", "its flush", LEFT_OVER, _NATIVE, _BOTH),
    Point("native.undoing", "a copy failed", "what there is of it is deleted", LEFT_OVER, _NATIVE, _BOTH),
    Point("crew.built", "copies are made", "their flush", LEFT_OVER, _NATIVE),
    Point("crew.flushed", "copies are durable", "their callers are told", LEFT_OVER, _NATIVE),
    Point("crew.dropping", "a copying process was ended", "its copies are put aside", LEFT_OVER, _NATIVE),
    Point("btrfs.made", "a snapshot's directory is made", "the subvolume in it", LEFT_OVER, _BTRFS),
    Point("btrfs.snapshotted", "a snapshot's subvolume is made", "it is used", LEFT_OVER, _BTRFS),
    Point("btrfs.undoing", "a snapshot failed", "what there is of it is deleted", LEFT_OVER, _BTRFS),
    Point("btrfs.noted", "a commit's beginning is noted", "its subvolume", NOTHING, _BTRFS),
    Point("btrfs.unnested", "a stub of a subvolume inside is deleted", "a directory in its place", HALVES, _BTRFS),
    Point("btrfs.committed", "a commit's subvolume is made", "it is measured, then its record", HALVES, _BTRFS),
    Point("btrfs.reverting", "a commit's record is refused", "its subvolume is deleted", HALVES, _BTRFS),
    Point("btrfs.settling", "a commit's record is written", "the active subvolume is put away", HALVES, _BTRFS),
    Point("btrfs.settled", "the active subvolume is put away", "it is deleted with others", TRASH, _BTRFS),
    Point("files.flushing", "files are written", "the flush of their filesystem", LEFT_OVER),
    Point("files.flushed", "a filesystem is flushed", "those who wait are told", LEFT_OVER),
    # Stocking.
    Point("pool.taken", "ids are taken", "their directories", NOTHING, _OVERLAYFS),
    Point("pool.stocked", "directories are made and durable", "they are on the shelf", LEFT_OVER, _OVERLAYFS),
    Point("pool.failed", "a stocking process was ended", "what it made is put aside", LEFT_OVER, _OVERLAYFS),
    Point("hands.asked", "a child process is asked", "its work", LEFT_OVER, processes=(HAND,)),
    Point("hands.done", "a child process has worked", "its answer", LEFT_OVER, processes=(HAND,)),
    # Deleting.
    Point("files.discarding", "a record is deleted", "its directory is put into the trash", LEFT_OVER),
    Point("trash.discarded", "a directory is in the trash", "the queue of deletions", TRASH),
    Point("trash.taken", "entries are taken from the queue", "they are deleted", TRASH),
    Point("files.unlinked", "a file of a tree is deleted", "the next", TRASH, ("overlayfs", "native"), (HAND,)),
    Point("files.emptied", "a tree is empty", "its directory is deleted", TRASH, ("overlayfs", "native"), (HAND,)),
    Point("btrfs_sweeper.destroyed", "a subvolume is deleted", "the directory it was in", TRASH, _BTRFS, _BOTH),
    Point("btrfs_ioctl.destroyed", "a subvolume inside another is deleted", "the next", TRASH, _BTRFS, _BOTH),
    Point("trash.deleted", "entries are deleted", "who waits for it is told", TRASH),
    # The ledger.
    Point("ledger.appended", "changes are written behind the others", "their flush", LEDGER),
    Point("ledger.flushed", "changes are durable", "the next ones", LEDGER),
    Point("ledger.opened", "the file of another ledger is made", "its pages", LEDGER),
    Point("ledger.copied", "a page of records is written into it", "the next", LEDGER),
    Point("ledger.written", "it is durable", "it takes the place of the one before", LEDGER),
    Point("ledger.renamed", "it has the place of the one before", "the directory's flush", LEDGER),
    # A start, and recovery.
    Point("files.rooted", "the root is made", "the directories in it", START),
    Point("files.laid", "the directories in the root are made", "their flush", START),
    Point("btrfs.emptied", "the origin of all subvolumes is made", "it is made read-only", START, _BTRFS),
    Point("environment.opened", "the database is opened", "its tables and format", START),
    Point("ids.reserved", "a block of ids is noted", "its commit", START),
    Point("ids.committed", "a block of ids is reserved", "an id of it is used", START),
    Point("space.opened", "the ballast's file is made", "its space is taken", START),
    Point("trash.recovered", "the trash of earlier lives is listed", "it is queued", TRASH),
    Point("recovery.looked", "a page of records is looked at", "its transaction is committed", START),
    Point("recovery.marked", "a record without its files is marked broken", "that is committed", START),
    Point("btrfs.righted", "the half of a commit that does not count is dropped", "the next record", START, _BTRFS),
    Point("recovery.sweeping", "all records are looked at", "left-overs are looked for", LEFT_OVER),
    Point("recovery.discarded", "a left-over is put aside", "the next one", LEFT_OVER),
    Point("recovery.finished", "recovery is done", "nothing", START),
)  # fmt: skip
NAMES: Final = frozenset(point.name for point in POINTS)

_TERMS: Final = re.compile(
    rf"(?P<action>kill|note|pause|error:(?P<errno>{'|'.join(errno.errorcode.values())}))(?:@(?P<count>[1-9][0-9]*))?"
    rf"(?: (?P<process>{ACTOR}|{HAND}))?\n?"
)

_directory: Path | None = None
_process = ""
_lock = threading.Lock()
_reached: dict[str, tuple[int, int]] = {}


def requested() -> Path | None:
    """The directory that arms points, or None; InvalidArgument where that, or what is in there, makes no sense."""
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    place = Path(value)
    if not place.is_dir():
        raise InvalidArgument(f"{VARIABLE}: {value} is not a directory: make it, or do not set the variable")
    for path in place.iterdir():
        if path.name.removesuffix(STRUCK) not in NAMES:
            raise InvalidArgument(f"{VARIABLE}: {value}: there is no fail point {path.name!r}")
        if path.suffix != STRUCK and not _TERMS.fullmatch(text := path.read_text()):
            raise InvalidArgument(
                f"{VARIABLE}: {path}: {text!r} is not ACTION[@N] [PROCESS], see backends/failpoints.py"
            )
    return place


def arm(process: str) -> None:
    """Look at the points from here on, as a process of this kind, if the environment asks for it."""
    global _directory, _process
    value = os.environ.get(VARIABLE)
    _directory, _process = Path(value) if value else None, process


def reach(name: str) -> None:
    """Be at a point; what that does is in the module's words. Costs a call and a comparison where nothing is armed."""
    if _directory is not None:
        _look(_directory, name)


def _look(directory: Path, name: str) -> None:
    armed = directory / name
    try:
        terms = _TERMS.fullmatch(armed.read_text())
        stamp = armed.stat().st_mtime_ns
    except FileNotFoundError:
        return
    if terms is None:
        raise InvalidArgument(f"{armed} is not ACTION[@N] [PROCESS]")
    if terms["process"] not in (None, _process):
        return
    with _lock:
        # A file written again counts from the beginning.
        before = _reached.get(name, (0, 0))
        times = before[1] + 1 if before[0] == stamp else 1
        _reached[name] = (stamp, times)
    if times >= int(terms["count"] or 1):
        _strike(armed, terms["action"], terms["errno"])


def _strike(armed: Path, action: str, error: str | None) -> None:
    struck = armed.with_name(armed.name + STRUCK)
    if action == "kill":
        # Of several that are here at a time, one takes the file, and that one ends.
        try:
            armed.rename(struck)
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
    struck.write_text(str(os.getpid()))
    if error is not None:
        number = getattr(errno, error)
        raise OSError(number, os.strerror(number), f"fail point {armed.name}")
    while action == "pause" and armed.exists():
        time.sleep(PAUSE_S)
