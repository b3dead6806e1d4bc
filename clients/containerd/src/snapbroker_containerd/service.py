"""The ten calls of `containerd.services.snapshots.v1.Snapshots`, each a call of the broker.

The broker keeps the contract: order of checks, codes, kinds, labels (D2, D14). What is left to do here is to read one
form and write the other, to find the snapshotter by its name, and to be patient.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from functools import partial
from typing import Final, TypeVar

import grpc
import msgspec

from snapbroker.aio import Broker, Walk
from snapbroker.contract import Info, Kind, Mount
from snapbroker.errors import BrokerError, NotFound
from snapbroker.protocol import WalkPage
from snapbroker_containerd import messages
from snapbroker_containerd.api import snapshots_pb2 as api
from snapbroker_containerd.methods import Method
from snapbroker_containerd.patience import MOMENTS, Patience, Span, Undecided
from snapbroker_containerd.status import refusal
from snapbroker_containerd.targets import Targets

SERVICE: Final = "containerd.services.snapshots.v1.Snapshots"
NOTHING: Final = b""
"""A `google.protobuf.Empty`."""

T = TypeVar("T")
Ask = Callable[[Broker], Awaitable[T]]
"""A call of the broker, to be made in the view of the snapshotter that is meant."""
LookAt = Callable[[Broker, Span], Awaitable[T | None]]
"""Whether a call whose reply was lost took effect: its answer, or None where it did not."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits of the calls."""

    call_timeout_ms: int = 10_000
    """Longest time of a stat, mounts, update, remove or page of a list: containerd itself sets no deadline (C141)."""
    work_timeout_ms: int = 600_000
    """Longest time of a prepare, view, commit, usage or cleanup: a backend may have to copy, measure or delete."""
    block_infos: int = 100
    """Most snapshots in one message of a list; containerd's own number (C139)."""
    block_bytes: int = 4 * 1024 * 1024
    """A message of a list ends early at this size: the labels of one snapshot may take as much."""


class Service:
    """The calls: `handler` is what a gRPC server serves, `methods` has the figures of each.

    `commit_sync`: a commit's files are durable before its name exists (D12).
    """

    def __init__(self, targets: Targets, patience: Patience, limits: Limits, *, commit_sync: bool = False) -> None:
        self._targets = targets
        self._patience = patience
        self._call_s = limits.call_timeout_ms / 1000
        self._work_s = limits.work_timeout_ms / 1000
        self._limits = limits
        self._sync = commit_sync
        answers = {
            "Prepare": self.prepare,
            "View": self.view,
            "Mounts": self.mounts,
            "Commit": self.commit,
            "Remove": self.remove,
            "Stat": self.stat,
            "Update": self.update,
            "Usage": self.usage,
            "Cleanup": self.cleanup,
        }
        self.methods = {name: Method() for name in (*answers, "List")}
        handlers = {name: self.methods[name].answering(answer) for name, answer in answers.items()}
        handlers["List"] = self.methods["List"].streaming(self.list)
        self.handler = grpc.method_handlers_generic_handler(SERVICE, handlers)

    async def prepare(self, message: bytes) -> bytes:
        """C15-C23, C93."""
        request = messages.read(api.PrepareSnapshotRequest, message)
        key, parent, labels = request.key, request.parent, dict(request.labels)
        mounts = await self._call(
            request.snapshotter,
            lambda broker: broker.prepare(key, parent, labels, timeout=self._work_s),
            lambda broker, span: created(broker, span, Kind.ACTIVE, key, parent),
            key,
        )
        return api.PrepareSnapshotResponse(mounts=messages.mounts(mounts)).SerializeToString()

    async def view(self, message: bytes) -> bytes:
        """C15-C23."""
        request = messages.read(api.ViewSnapshotRequest, message)
        key, parent, labels = request.key, request.parent, dict(request.labels)
        mounts = await self._call(
            request.snapshotter,
            lambda broker: broker.view(key, parent, labels, timeout=self._work_s),
            lambda broker, span: created(broker, span, Kind.VIEW, key, parent),
            key,
        )
        return api.ViewSnapshotResponse(mounts=messages.mounts(mounts)).SerializeToString()

    async def mounts(self, message: bytes) -> bytes:
        """C24-C27."""
        request = messages.read(api.MountsRequest, message)
        key = request.key
        mounts = await self._call(request.snapshotter, lambda broker: broker.mounts(key, timeout=self._call_s))
        return api.MountsResponse(mounts=messages.mounts(mounts)).SerializeToString()

    async def commit(self, message: bytes) -> bytes:
        """C28-C38; `parent` is the rebase (C33, D9)."""
        request = messages.read(api.CommitSnapshotRequest, message)
        name, key, parent, labels = request.name, request.key, request.parent, dict(request.labels)
        await self._call(
            request.snapshotter,
            lambda broker: done(broker.commit(name, key, parent, labels, self._sync, timeout=self._work_s)),
            lambda broker, span: committed(broker, span, name),
            name,
        )
        return NOTHING

    async def remove(self, message: bytes) -> bytes:
        """C39-C42."""
        request = messages.read(api.RemoveSnapshotRequest, message)
        key = request.key
        await self._call(
            request.snapshotter,
            lambda broker: done(broker.remove(key, timeout=self._call_s)),
            lambda broker, span: removed(broker, span, key),
        )
        return NOTHING

    async def stat(self, message: bytes) -> bytes:
        """C55."""
        request = messages.read(api.StatSnapshotRequest, message)
        key = request.key
        info = await self._call(request.snapshotter, lambda broker: broker.stat(key, timeout=self._call_s))
        return messages.info_field(info)

    async def update(self, message: bytes) -> bytes:
        """C56-C62. A mask without paths is none."""
        request = messages.read(api.UpdateSnapshotRequest, message)
        name, labels, paths = request.info.name, dict(request.info.labels), tuple(request.update_mask.paths)
        info = await self._call(
            request.snapshotter, lambda broker: broker.update(name, labels, paths, timeout=self._call_s)
        )
        return messages.info_field(info)

    async def usage(self, message: bytes) -> bytes:
        """C48-C53."""
        request = messages.read(api.UsageRequest, message)
        key = request.key
        usage = await self._call(request.snapshotter, lambda broker: broker.usage(key, timeout=self._work_s))
        return api.UsageResponse(size=usage.size, inodes=usage.inodes).SerializeToString()

    async def cleanup(self, message: bytes) -> bytes:
        """C43: returns when everything removed so far is deleted."""
        request = messages.read(api.CleanupRequest, message)
        await self._call(request.snapshotter, lambda broker: done(broker.cleanup(timeout=self._work_s)))
        return NOTHING

    async def list(self, message: bytes) -> AsyncIterator[bytes]:
        """C63-C69, in blocks (C139). Only its beginning is repeated: what was sent cannot be taken back."""
        request = messages.read(api.ListSnapshotsRequest, message)
        filters = tuple(request.filters)
        walk, page = await self._call(request.snapshotter, lambda broker: self._begin(broker, filters))
        try:
            pages = walk.pages()
            while page is not None:
                for block in self._blocks(page.infos):
                    yield block
                page = await anext(pages, None)
        except BrokerError as error:
            raise refusal(error) from None
        finally:
            walk.close()

    async def _begin(self, broker: Broker, filters: tuple[str, ...]) -> tuple[Walk, WalkPage | None]:
        walk = broker.walk(*filters, timeout=self._call_s)
        return walk, await anext(walk.pages(), None)

    def _blocks(self, infos: Iterable[Info]) -> Iterator[bytes]:
        fields: list[bytes] = []
        size = 0
        for info in infos:
            field = messages.info_field(info)
            if fields and size + len(field) > self._limits.block_bytes:
                yield b"".join(fields)
                fields, size = [], 0
            fields.append(field)
            size += len(field)
            if len(fields) == self._limits.block_infos:
                yield b"".join(fields)
                fields, size = [], 0
        if fields:
            yield b"".join(fields)

    async def _call(self, name: str, ask: Ask[T], look: LookAt[T] | None = None, key: str = "") -> T:
        """The broker's answer, waited for as long as `patience` has it; raises Refusal.

        `look`: where the call is not one to be simply repeated. `key`: what it creates.
        """
        sent = time.time_ns()
        try:
            try:
                return await self._ask(name, ask)
            except MOMENTS as error:
                return await self._patience.repeat(
                    error,
                    partial(self._ask, name, ask),
                    sent=sent,
                    look=None if look is None else lambda span: self._ask(name, lambda broker: look(broker, span)),
                    what=(name, key) if key else None,
                )
            except NotFound as error:
                if not self._targets.forget(name, error):
                    raise
                return await ask(await self._targets.find(name))
        except BrokerError as error:
            raise refusal(error) from None

    async def _ask(self, name: str, ask: Ask[T]) -> T:
        return await ask(self._targets.get(name) or await self._targets.find(name))


async def done(call: Awaitable[None]) -> bool:
    """True when the call has done well: None is what a look says that found nothing."""
    await call
    return True


# What a call whose reply was lost has done: see `patience`.


async def created(broker: Broker, span: Span, kind: Kind, key: str, parent: str) -> list[Mount] | None:
    """The mounts of the snapshot that a lost prepare or view has made."""
    try:
        info = await broker.stat(key)
        if info.kind is kind and info.parent == parent and span.covers(info.created):
            return await broker.mounts(key)
    except NotFound:
        pass
    return None


async def committed(broker: Broker, span: Span, name: str) -> bool | None:
    """Whether a lost commit has made the snapshot."""
    try:
        info = await broker.stat(name)
    except NotFound:
        return None
    return True if info.kind is Kind.COMMITTED and span.covers(info.created) else None


async def removed(broker: Broker, span: Span, key: str) -> bool | None:
    """Whether what was to be removed is gone; Undecided where there is another one since."""
    try:
        info = await broker.stat(key)
    except NotFound:
        return True
    if info.created > span.since:
        raise Undecided(f"{key!r} was made anew while the broker was away: whether its removal took effect is unknown")
    return None
