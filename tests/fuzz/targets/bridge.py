"""The bridge's messages: what containerd could send is read, or refused with a status; and an Info stays what it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from snapbroker.contract import Info, Kind, Mount
from snapbroker_containerd import messages
from snapbroker_containerd.api import snapshots_pb2
from snapbroker_containerd.status import Refusal
from tests.fuzz.draws import Draws

_KINDS: Final = (
    *tuple(
        getattr(snapshots_pb2, f"{name}SnapshotRequest")
        for name in ("Prepare", "View", "Commit", "Remove", "Stat", "Update")
    ),
    snapshots_pb2.MountsRequest,
    snapshots_pb2.ListSnapshotsRequest,
    snapshots_pb2.UsageRequest,
)


def one(data: bytes) -> None:
    """A message of each kind, and an Info and a mount built of texts."""
    draws = Draws(data)
    kind = draws.choice(_KINDS)
    if draws.chance(2):
        body = draws.rest()
        try:
            read = messages.read(kind, body)
        except Refusal:
            return
        assert messages.read(kind, read.SerializeToString()) == read
        return
    labels = {draws.text(): draws.text() for _ in range(draws.number(4))}
    info = Info(draws.text(), draws.choice(tuple(Kind)), draws.text(), labels, draws.integer(), draws.integer())
    block = messages.info_field(info)
    (found,) = snapshots_pb2.ListSnapshotsResponse.FromString(block).info
    moments = [moment.seconds * 10**9 + moment.nanos for moment in (found.created_at, found.updated_at)]
    assert (found.name, found.parent, dict(found.labels)) == (info.name, info.parent, labels)
    assert moments == [info.created, info.updated]
    assert snapshots_pb2.ListSnapshotsResponse.FromString(block * 2).info == [found, found]
    options = tuple(draws.text() for _ in range(draws.number(4)))
    mount = Mount(draws.text(), draws.text(), options, draws.text())
    (made,) = messages.mounts([mount])
    assert (made.type, made.source, tuple(made.options), made.target) == (
        mount.type, mount.source, mount.options, mount.target,
    )  # fmt: skip


def seeds() -> Iterator[bytes]:
    """A message of each kind, and Infos of several sizes."""
    for number, kind in enumerate(_KINDS):
        for field in ("key", "name", "parent", "snapshotter"):
            if field in kind.DESCRIPTOR.fields_by_name:
                yield bytes((number, 1)) + kind(**{field: "a"}).SerializeToString()
    for size in (0, 3, 100, 200):
        yield bytes((0, 0, 2, 1, 97, size)) + b"b" * size + bytes((1, 98, 0, size)) + b"c" * size + bytes((1, 0))
