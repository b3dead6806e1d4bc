"""The ten calls of `containerd.services.snapshots.v1.Snapshots`, each a call of the broker.

The broker keeps the contract: order of checks, codes, kinds, labels (D2, D14). What is left to do here is to read one
form and write the other, to find the snapshotter by its name, and to come again when the broker is full.

containerd sets no deadline and, in some calls, holds its own database meanwhile (C75, C141). So a call waits `wait_ms`
for a broker or a snapshotter that is away, and then fails UNAVAILABLE. The broker's client does that: it repeats what
was refused or lost with the token of the first try, so that nothing is done twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Final, TypeVar

import grpc
import msgspec

from snapbroker import session
from snapbroker.aio import Broker, Walk
from snapbroker.contract import Info
from snapbroker.errors import BrokerError, NotFound, ResourceExhausted
from snapbroker.protocol import WalkPage
from snapbroker_containerd import messages
from snapbroker_containerd.api import snapshots_pb2 as api
from snapbroker_containerd.methods import Method
from snapbroker_containerd.status import refusal
from snapbroker_containerd.targets import Targets

SERVICE: Final = "containerd.services.snapshots.v1.Snapshots"
NOTHING: Final = b""
"""A `google.protobuf.Empty`."""

T = TypeVar("T")
Ask = Callable[[Broker], Awaitable[T]]
"""A call of the broker, to be made in the view of the snapshotter that is meant."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits of the calls."""

    wait_ms: int = 5000
    """How long a call is repeated while broker or snapshotter is away or full; then it fails."""
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

    `commit_sync`: a commit's files are durable before its name exists (D12). `returned`: how often a call came again
    to a broker that had been full.
    """

    def __init__(self, targets: Targets, limits: Limits, *, commit_sync: bool = False) -> None:
        self._targets = targets
        self._wait_s = limits.wait_ms / 1000
        self._call_s = limits.call_timeout_ms / 1000
        self._work_s = limits.work_timeout_ms / 1000
        self._limits = limits
        self._sync = commit_sync
        self.returned = 0
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
        )
        return api.PrepareSnapshotResponse(mounts=messages.mounts(mounts)).SerializeToString()

    async def view(self, message: bytes) -> bytes:
        """C15-C23."""
        request = messages.read(api.ViewSnapshotRequest, message)
        key, parent, labels = request.key, request.parent, dict(request.labels)
        mounts = await self._call(
            request.snapshotter,
            lambda broker: broker.view(key, parent, labels, timeout=self._work_s),
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
            lambda broker: broker.commit(name, key, parent, labels, self._sync, timeout=self._work_s),
        )
        return NOTHING

    async def remove(self, message: bytes) -> bytes:
        """C39-C42."""
        request = messages.read(api.RemoveSnapshotRequest, message)
        key = request.key
        await self._call(request.snapshotter, lambda broker: broker.remove(key, timeout=self._call_s))
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
        await self._call(request.snapshotter, lambda broker: broker.cleanup(timeout=self._work_s))
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

    async def _call(self, name: str, ask: Ask[T]) -> T:
        """The broker's answer; raises Refusal."""
        try:
            try:
                return await self._ask(name, ask)
            except NotFound as error:
                if not self._targets.forget(name, error):
                    raise
                return await self._ask(name, ask)
        except BrokerError as error:
            raise refusal(error) from None

    async def _ask(self, name: str, ask: Ask[T]) -> T:
        """The broker's answer, asked for again when a broker that is full says when to come back."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._wait_s
        while True:
            try:
                return await ask(self._targets.get(name) or await self._targets.find(name))
            except ResourceExhausted as error:
                pause = session.retry_after(error)
                if not pause or loop.time() + pause > give_up:
                    raise
            await asyncio.sleep(pause)
            self.returned += 1
