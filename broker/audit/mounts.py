"""Which mounts of this machine use a directory of ours: binds of it, and overlays that have it as a layer.

A container has a mount namespace of its own, so the table of every namespace is read, once, by way of one process
in it. Which namespace a process is in may be hidden from who has few capabilities; its table is not, and a mount has
an id that is nobody else's in any namespace, so the table's first one tells. A bind's source is not in the table,
only the place within its filesystem that it shows: our root is looked for in the same words. Of an overlay the table
has the paths that it was mounted with.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from snapbroker.protocol import MountUse

if TYPE_CHECKING:
    from backends.api import Inspector

_ESCAPE = re.compile(rb"\\([0-7]{3})")
_LAYERS = ("lowerdir=", "lowerdir+=", "upperdir=", "workdir=", "datadir+=")


class Use(NamedTuple):
    """A mount, and whose directory it uses: an id, or 0 for something in the trash; `path` is what it uses of it."""

    id: int
    path: str
    mount: MountUse


class _Line(NamedTuple):
    id: str
    device: str
    root: str
    point: str
    type: str
    options: str


def uses(root: str, inspector: Inspector) -> list[Use]:
    """Every mount that uses something of ours, each once."""
    place = _in_filesystem(root)
    found: dict[tuple[str, int], Use] = {}
    for pid in _processes():
        for line in _table(pid):
            for path in _paths(line, root, place):
                owner = inspector.owner(path)
                if owner is not None and (line.id, owner) not in found:
                    use = MountUse(point=line.point, type=line.type, pid=int(pid), process=_name(pid))
                    found[line.id, owner] = Use(owner, path, use)
    return list(found.values())


def _processes() -> Iterator[str]:
    """A process of each mount namespace, ours first; those that are hidden from us are left out."""
    seen: set[bytes] = set()
    for pid in (str(os.getpid()), *sorted(filter(str.isdecimal, os.listdir("/proc")), key=int)):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/mountinfo", "rb") as table:
                first = table.readline().partition(b" ")[0]
            if first and first not in seen:
                seen.add(first)
                yield pid


def _table(pid: str) -> list[_Line]:
    try:
        with open(f"/proc/{pid}/mountinfo", "rb") as table:
            return [_parsed(line) for line in table]
    except OSError:
        return []


def _parsed(line: bytes) -> _Line:
    left, _, right = line.rstrip(b"\n").partition(b" - ")
    id_, _, device, root, point = left.split(b" ")[:5]
    kind, _, options = (*right.split(b" ", 2), b"", b"")[:3]
    return _Line(id_.decode(), device.decode(), _text(root), _text(point), kind.decode(), _text(options))


def _text(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))


def _in_filesystem(root: str) -> tuple[str, str] | None:
    """Device and path, within its filesystem, of our root; None where the root is not there."""
    try:
        fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
            mount = next(line.split()[1] for line in lines if line.startswith("mnt_id:"))
    finally:
        os.close(fd)
    for line in _table("self"):
        if line.id == mount:
            below = os.path.relpath(os.path.realpath(root), line.point)
            return line.device, os.path.normpath(os.path.join(line.root, below))
    return None


def _paths(line: _Line, root: str, place: tuple[str, str] | None) -> Iterator[str]:
    """The paths below our root that a mount uses."""
    if line.type == "overlay":
        for option in line.options.split(","):
            for name in _LAYERS:
                if option.startswith(name):
                    yield from filter(None, option[len(name) :].split(":"))
    elif place is not None and line.device == place[0]:
        shown = line.root.removesuffix("//deleted")
        if shown.startswith(f"{place[1].rstrip('/')}/"):
            yield root + shown[len(place[1].rstrip("/")) :]


def _name(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
