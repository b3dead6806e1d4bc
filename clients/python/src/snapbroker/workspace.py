"""A prepared snapshot as a directory to work in: mounted on entering, committed or discarded on leaving.

Whatever happens in the block, neither mount nor key nor directory stays behind; where the key cannot be removed,
a note on the error says so. Only with `keep_uncommitted` a key outlives a commit that fails. A key is only removed
if this workspace has prepared it: after a prepare without a reply that is certain for a random key alone. Commit and
remove carry the fencing number that prepare answered: what somebody else has under the key by then is left alone.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread

from snapbroker import mount
from snapbroker.errors import BrokerError, DeadlineExceeded, FailedPrecondition, NotFound, Unavailable

if TYPE_CHECKING:
    from snapbroker import aio
    from snapbroker.blocking import Broker
    from snapbroker.contract import Mounts

DISCARD_SECONDS: Final = 30.0
"""How long removing a workspace may take when an error, or a cancellation, is on its way."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to prepare, and what to make of it."""

    parent: str
    commit_as: str | None
    key: str
    random: bool
    labels: Mapping[str, str] | None
    sync: bool
    keep_uncommitted: bool

    @classmethod
    def of(
        cls,
        parent: str,
        commit_as: str | None,
        key: str | None,
        labels: Mapping[str, str] | None,
        sync: bool,
        keep_uncommitted: bool,
    ) -> Plan:
        """The plan, with a random key where none is given."""
        chosen = key or f"workspace-{secrets.token_hex(8)}"
        return cls(parent, commit_as, chosen, not key, labels, sync, keep_uncommitted)

    def may_exist_after(self, error: BaseException) -> bool:
        """Whether a prepare that ended so may have made the key, and nobody else can have."""
        return self.random and (not isinstance(error, BrokerError) or _may_have_happened(error))

    def kept_after(self, error: BrokerError) -> bool:
        """Whether the work outlives a commit that ended so; a note on the error says where it is."""
        if self.keep_uncommitted:
            where = f"in the active snapshot {self.key!r}"
            if _may_have_happened(error):
                error.add_note(f"unless the commit took effect after all, the work is {where}: commit or remove that")
            else:
                error.add_note(f"the work is kept {where}: commit that under a free name, or remove it")
        return self.keep_uncommitted


@contextmanager
def blocking(broker: Broker, plan: Plan) -> Iterator[Path]:
    """The workspace of a blocking program."""
    try:
        mounts = broker.prepare(plan.key, plan.parent, plan.labels)
    except BaseException as error:
        if plan.may_exist_after(error):
            _discard(broker, plan, 0, error)
        raise
    fence = mounts.fence
    try:
        with mount.mounted(mounts) as path:
            yield path
    except BaseException as error:
        _discard(broker, plan, fence, error)
        raise
    if plan.commit_as is None:
        broker.remove(plan.key, fence)
        return
    try:
        broker.commit(plan.commit_as, plan.key, labels=plan.labels, sync=plan.sync, fence=fence)
    except BaseException as error:
        if not (isinstance(error, BrokerError) and plan.kept_after(error)):
            _discard(broker, plan, fence, error)
        raise


def _discard(broker: Broker, plan: Plan, fence: int, reason: BaseException) -> None:
    try:
        broker.remove(plan.key, fence, timeout=DISCARD_SECONDS)
    except BrokerError as error:
        if not _is_gone(error):
            reason.add_note(_left_over(plan, error))


@asynccontextmanager
async def asynchronous(broker: aio.Broker, plan: Plan) -> AsyncIterator[Path]:
    """The workspace of an asyncio program: mounted in a thread, put away even if the task is cancelled."""
    try:
        mounts = await _prepare_alone(broker, plan)
    except BaseException as error:
        if plan.may_exist_after(error):
            await _discard_shielded(broker, plan, 0, error)
        raise
    fence = mounts.fence
    try:
        mounted = mount.mounted(mounts)
        path = await anyio.to_thread.run_sync(mounted.__enter__)
        try:
            yield path
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(mounted.__exit__, type(error), error, error.__traceback__)
            raise
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(mounted.__exit__, None, None, None)
    except BaseException as error:
        await _discard_shielded(broker, plan, fence, error)
        raise
    if plan.commit_as is None:
        await broker.remove(plan.key, fence)
        return
    try:
        await broker.commit(plan.commit_as, plan.key, labels=plan.labels, sync=plan.sync, fence=fence)
    except BaseException as error:
        if not (isinstance(error, BrokerError) and plan.kept_after(error)):
            await _discard_shielded(broker, plan, fence, error)
        raise


async def _prepare_alone(broker: aio.Broker, plan: Plan) -> Mounts:
    """Prepare in a request of its own.

    Where this task is cancelled while the broker is away, the key is removed. A request with calls of others would be
    repeated for those after that, and make the snapshot once more.
    """
    async with broker.batch() as batch:
        mounts = batch.prepare(plan.key, plan.parent, plan.labels)
    return mounts.result()


async def _discard_shielded(broker: aio.Broker, plan: Plan, fence: int, reason: BaseException) -> None:
    with anyio.CancelScope(shield=True):
        try:
            await broker.remove(plan.key, fence, timeout=DISCARD_SECONDS)
        except BrokerError as error:
            if not _is_gone(error):
                reason.add_note(_left_over(plan, error))


def _may_have_happened(error: BrokerError) -> bool:
    # More than `in_doubt` says: looking for what is not there costs one call.
    return error.in_doubt or isinstance(error, DeadlineExceeded | Unavailable)


def _is_gone(error: BrokerError) -> bool:
    """Whether the snapshot could not be removed because it is there no more, or another one is under its key."""
    return isinstance(error, NotFound) or (isinstance(error, FailedPrecondition) and "fence" in error.details)


def _left_over(plan: Plan, error: BrokerError) -> str:
    return f"the workspace {plan.key!r} could not be removed, remove it later: {error.message}"
