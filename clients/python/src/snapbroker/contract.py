"""The words of the snapshot contract: kinds, mounts, infos, usages, events and the limits of their fields.

A *snapshot* is a directory tree under one *name*. An `active` snapshot is written to under its *key*; a
`view` is read under its key; a `committed` one never changes again and may be the *parent* of others. Keys
and names share one space per snapshotter and namespace.

Three stories:

*A layer is unpacked.* `prepare("unpack-1", parent="base")` answers mounts; the caller mounts them, writes,
unmounts; `commit("layer-1", "unpack-1")` turns the active snapshot into the committed `layer-1`, and the
key `unpack-1` is free again.

*A build runs.* `prepare("job-42", parent="layer-1")` gives a fresh workspace; after the build,
`remove("job-42")` discards it at once, however large it is: its files are deleted in the background.

*Somebody looks.* `view("look", parent="layer-1")` answers read-only mounts; until `remove("look")` the
parent cannot be removed.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Final

import msgspec

from snapbroker.errors import FailedPrecondition, InvalidArgument

NAME_BYTES_MAX: Final = 4096
"""Longest key or name, in bytes of UTF-8 (D3)."""
LABEL_BYTES_MAX: Final = 4096
"""Longest label, key and value together, in bytes of UTF-8 (C20)."""
LABELS_MAX: Final = 1024
"""Most labels a snapshot may carry: keeps a record within one page of a walk."""
NAMESPACE_BYTES_MAX: Final = 76
"""Longest namespace (C70)."""
FENCE_MAX: Final = 2**63 - 1
"""Highest fencing number: that of a sequence."""

SNAPSHOT_REF_LABEL: Final = "containerd.io/snapshot.ref"
"""On prepare: "do you have this?"; on a committed snapshot: "this is it" (C93-C96)."""
UIDMAPPING_LABEL: Final = "containerd.io/snapshot/uidmapping"
GIDMAPPING_LABEL: Final = "containerd.io/snapshot/gidmapping"
UPPERDIR_LABEL: Final = "containerd.io/snapshot/overlay.upperdir"

_NAMESPACE = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")


class Kind(enum.StrEnum):
    """What a snapshot is; on the wire the lower-case word (D15)."""

    VIEW = "view"
    ACTIVE = "active"
    COMMITTED = "committed"


class Info(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What is known of a snapshot without looking at its files; times are nanoseconds since the epoch, UTC."""

    name: str
    kind: Kind
    parent: str = ""
    labels: dict[str, str] = {}
    created: int = 0
    updated: int = 0


class Mount(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One mount for the caller to make, in the words of mount(8); `target` is relative to the mount point."""

    type: str
    source: str
    options: tuple[str, ...] = ()
    target: str = ""


class Mounts(list[Mount]):
    """The mounts of an active snapshot or view, to make in their order; as a list it is equal to any other of the same.

    `fence` is the snapshot's fencing number: a later snapshot under the same key has a higher one. Commit, remove and
    mounts that carry it are refused with failed_precondition once the key stands for another snapshot.
    """

    # No __init__ of its own and no argument: it is made for every answer, and a list is made in C.
    fence: int = 0


class Usage(msgspec.Struct, frozen=True, gc=False):
    """What a snapshot takes beyond its parents: `inodes`, and `size` in bytes of allocated blocks (C48, C51)."""

    inodes: int = 0
    size: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.inodes + other.inodes, self.size + other.size)


class Event(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One change. `previous` is the sequence of the event before it on the same topic, 0 where there is none.

    `info` is the snapshot as it is after the change; absent for `remove` and `cleanup`. For `commit`, `key`
    is the active snapshot that was consumed and `info.name` the committed one.
    """

    sequence: int
    previous: int
    time: int
    snapshotter: str
    namespace: str
    verb: str
    key: str = ""
    info: Info | None = None

    @property
    def topic(self) -> str:
        """The topic it is published on."""
        return topic(self.snapshotter, self.namespace, self.verb)


EVENT_VERBS: Final = ("prepare", "view", "commit", "update", "remove", "cleanup")
"""The verbs that change something, and so have a topic."""


def topic(snapshotter: str, namespace: str, verb: str) -> str:
    """`<snapshotter>/<namespace>/snapshot/<verb>`."""
    return f"{snapshotter}/{namespace}/snapshot/{verb}"


def check_name(name: str, what: str = "key") -> None:
    """Raise InvalidArgument unless `name` is a legal key or name (D3)."""
    # len() counts characters, at most a quarter of the bytes: the encoding is only needed in between.
    if not name:
        raise InvalidArgument(f"{what} must not be empty: give 1 to {NAME_BYTES_MAX} bytes")
    if "\0" in name:
        raise InvalidArgument(f"{what} must not contain a NUL")
    try:
        too_long = len(name) * 4 > NAME_BYTES_MAX and len(name.encode()) > NAME_BYTES_MAX
    except UnicodeEncodeError:
        raise InvalidArgument(f"{what} is not text: it holds a lone surrogate") from None
    if too_long:
        raise InvalidArgument(f"{what} is longer than {NAME_BYTES_MAX} bytes, choose a shorter one: {name[:40]}...")


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise InvalidArgument unless every label fits (C20)."""
    if len(labels) > LABELS_MAX:
        raise InvalidArgument(f"{len(labels)} labels, more than {LABELS_MAX}")
    for key, value in labels.items():
        if not key:
            raise InvalidArgument("a label's key must not be empty")
        if (len(key) + len(value)) * 4 > LABEL_BYTES_MAX:
            size = len(key.encode()) + len(value.encode())
            if size > LABEL_BYTES_MAX:
                raise InvalidArgument(f"label {key[:40]!r} is {size} bytes with its value, more than {LABEL_BYTES_MAX}")


def check_namespace(namespace: str) -> None:
    """Raise FailedPrecondition when it is missing, InvalidArgument when it is malformed (C70)."""
    if not namespace:
        raise FailedPrecondition("namespace is required: name one, such as 'default'")
    if (
        len(namespace) > NAMESPACE_BYTES_MAX
        or namespace == "version"
        or not _NAMESPACE.fullmatch(namespace)
        or not namespace.isascii()
    ):
        raise InvalidArgument(
            f"namespace {namespace[:80]!r} must be at most {NAMESPACE_BYTES_MAX} letters and digits, "
            "single '.', '_' or '-' between them, and not 'version'"
        )


def without_empty(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels that are stored: those with a value (C62)."""
    return {key: value for key, value in labels.items() if value}
