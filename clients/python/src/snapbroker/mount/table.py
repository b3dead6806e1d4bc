"""The table of mounts as the kernel tells it, and who holds one of them."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Entry:
    """One mount: its id, the id of the mount it lies on, and where."""

    id: int
    parent: int
    point: str


_ESCAPE = re.compile(rb"\\([0-7]{3})")


def entries() -> list[Entry]:
    """All mounts of this namespace; a mount comes after the one it lies on, the topmost of a stack last."""
    with open("/proc/self/mountinfo", "rb") as table:
        return [_entry(line) for line in table]


def _entry(line: bytes) -> Entry:
    identity, parent, _, _, point = line.split(b" ", 5)[:5]
    plain = _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), point)
    return Entry(int(identity), int(parent), os.fsdecode(plain))


def within(point: str, directory: str) -> bool:
    """Whether a path is the directory or below it."""
    return point == directory or point.startswith(directory.rstrip("/") + "/")


def on_top_of(point: str) -> list[Entry]:
    """The topmost mount at `point` and all that lies on it, in an order in which they can be unmounted.

    Where `point` is no mount itself: all mounts below it.
    """
    table = entries()
    here = [entry for entry in table if entry.point == point]
    if not here:
        return [entry for entry in reversed(_topologically(table)) if within(entry.point, point)]
    chosen = {_topmost(here).id}
    found: list[Entry] = []
    for entry in _topologically(table):
        if entry.id in chosen or entry.parent in chosen:
            chosen.add(entry.id)
            found.append(entry)
    return found[::-1]


def _topmost(stack: list[Entry]) -> Entry:
    covered = {entry.parent for entry in stack}
    return next(entry for entry in reversed(stack) if entry.id not in covered)


def _topologically(table: list[Entry]) -> list[Entry]:
    """Each mount after the one it lies on: a moved mount may stand before it in the kernel's order."""
    children: dict[int, list[Entry]] = {}
    known = {entry.id for entry in table}
    for entry in table:
        children.setdefault(entry.parent if entry.parent in known and entry.parent != entry.id else 0, []).append(entry)
    ordered: list[Entry] = []
    waiting = children.get(0, [])[::-1]
    while waiting:
        entry = waiting.pop()
        ordered.append(entry)
        waiting.extend(reversed(children.get(entry.id, ())))
    return ordered


def holders(point: str, limit: int = 3) -> list[str]:
    """Up to `limit` processes, as `123 (name)`, with a file or directory of theirs at or below `point`."""
    found: list[str] = []
    for process in filter(str.isdecimal, os.listdir("/proc")):
        if any(within(path, point) for path in _links(process)):
            found.append(f"{process} ({_name(process)})")
            if len(found) == limit:
                break
    return found


def _links(process: str) -> Iterator[str]:
    """What a process has open; processes that end meanwhile, or are not ours to look at, have nothing."""
    directory = f"/proc/{process}"
    names = ["cwd", "root", "exe"]
    with contextlib.suppress(OSError):
        names += [f"fd/{descriptor}" for descriptor in os.listdir(f"{directory}/fd")]
    for name in names:
        with contextlib.suppress(OSError):
            yield os.readlink(f"{directory}/{name}")


def _name(process: str) -> str:
    try:
        with open(f"/proc/{process}/comm", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "ended"
