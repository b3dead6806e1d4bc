"""What a directory tree holds, as something that can be compared with another one's."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

OVERLAY_PREFIXES = ("trusted.overlay.", "user.overlay.")
"""Marks that overlayfs makes for itself: they say how a tree is stored, not what it is."""


@dataclass(frozen=True)
class Entry:
    """One file of whatever kind; times in nanoseconds. `names`: all names of it in the tree."""

    kind: str
    mode: str
    user: int
    group: int
    device: tuple[int, int] | None
    content: str
    changed: int | None
    xattrs: tuple[tuple[str, bytes], ...]
    names: tuple[str, ...]


def entries(root: Path) -> dict[str, Entry]:
    """Every entry below `root` and `root` itself, as `.`, by its path.

    The modification time of the root is left out: it says when the snapshot was made, unless a layer names the root.
    """
    statuses = {path: os.lstat(os.path.join(root, path)) for path in _paths(root)}
    names: dict[tuple[int, int], list[str]] = defaultdict(list)
    for path, status in statuses.items():
        names[status.st_dev, status.st_ino].append(path)
    found = {}
    for path, status in statuses.items():
        kind = stat.S_IFMT(status.st_mode)
        whole = os.path.join(root, path)
        found[path] = Entry(
            kind=stat.filemode(kind)[0],
            mode=oct(stat.S_IMODE(status.st_mode)),
            user=status.st_uid,
            group=status.st_gid,
            device=_device(status) if kind in (stat.S_IFCHR, stat.S_IFBLK) else None,
            content=_content(whole, kind),
            changed=None if path == "." else status.st_mtime_ns,
            xattrs=_xattrs(whole),
            names=tuple(sorted(names[status.st_dev, status.st_ino])),
        )
    return found


def differences(one: dict[str, Entry], other: dict[str, Entry]) -> list[str]:
    """Where two trees differ, a line each; nothing when they are the same."""
    return [
        f"{path}: {one.get(path)} is not {other.get(path)}"
        for path in sorted(one.keys() | other.keys())
        if one.get(path) != other.get(path)
    ]


def without_times(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The same entries, whenever they were changed."""
    return {path: replace(entry, changed=None) for path, entry in entries.items()}


def files(root: Path) -> list[Path]:
    """Every regular file below a directory."""
    return [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]


def _paths(root: Path) -> list[str]:
    found = ["."]
    for where, directories, names in os.walk(root):
        found += [os.path.relpath(os.path.join(where, name), root) for name in (*directories, *names)]
    return found


def _device(status: os.stat_result) -> tuple[int, int]:
    return os.major(status.st_rdev), os.minor(status.st_rdev)


def _content(path: str, kind: int) -> str:
    if kind == stat.S_IFLNK:
        return os.readlink(path)
    if kind == stat.S_IFREG:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return ""


def _xattrs(path: str) -> tuple[tuple[str, bytes], ...]:
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return tuple(
        (name, os.getxattr(path, name, follow_symlinks=False))
        for name in names
        if not name.startswith(OVERLAY_PREFIXES)
    )
