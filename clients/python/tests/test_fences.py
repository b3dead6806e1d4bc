"""Fencing numbers: answered with the mounts, carried by what must not touch a successor's snapshot."""

from __future__ import annotations

import copy
import pickle
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from fake_broker import FakeBroker

import snapbroker
from snapbroker import Mount, Mounts, aio, blocking, session
from snapbroker.errors import FailedPrecondition, InvalidArgument


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBroker]:
    for name in ("ENDPOINT", "EVENTS_ENDPOINT", "NAMESPACE", "SNAPSHOTTER"):
        monkeypatch.delenv(f"SNAPBROKER_{name}", raising=False)
    with FakeBroker(tmp_path) as fake:
        yield fake


@pytest.fixture
async def tasks(fake: FakeBroker) -> AsyncIterator[aio.Broker]:
    async with aio.connect(fake.endpoint, snapshotter="overlayfs", timeout=20) as broker:
        yield broker


@pytest.fixture
def thread(fake: FakeBroker) -> Iterator[blocking.Broker]:
    with snapbroker.connect(fake.endpoint, snapshotter="overlayfs", timeout=20) as broker:
        yield broker


def test_mounts_are_a_list_with_a_fence():
    mounts = Mounts([Mount("bind", "/a")])
    assert mounts.fence == 0
    mounts.fence = 7
    assert mounts == [Mount("bind", "/a")]
    assert isinstance(mounts, list)
    for twin in (copy.copy(mounts), copy.deepcopy(mounts), pickle.loads(pickle.dumps(mounts))):
        assert (twin, twin.fence, type(twin)) == (mounts, 7, Mounts)


@pytest.mark.parametrize("fence", [-1, 2**63, 1.0, "1", None, True])
def test_what_is_no_fence(fence: object):
    for call in (
        lambda: session.commit("n", "k", "", None, False, fence),  # type: ignore[arg-type]
        lambda: session.remove("k", fence),  # type: ignore[arg-type]
        lambda: session.mounts("k", fence),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidArgument, match="fence"):
            call()


async def test_a_successors_snapshot_is_left_alone(tasks: aio.Broker):
    stale = (await tasks.prepare("job")).fence
    await tasks.remove("job", stale)
    fence = (await tasks.prepare("job")).fence
    assert fence > stale > 0
    for call in (tasks.commit("n", "job", fence=stale), tasks.remove("job", stale), tasks.mounts("job", fence=stale)):
        with pytest.raises(FailedPrecondition) as refused:
            await call
        assert refused.value.details["fence"] == fence
    assert (await tasks.mounts("job", fence)).fence == fence
    await tasks.commit("n", "job", fence=fence)


def test_a_successors_snapshot_is_left_alone_by_a_thread(thread: blocking.Broker):
    stale = thread.prepare("job").fence
    thread.remove("job", stale)
    fence = thread.prepare("job").fence
    for call in (
        lambda: thread.commit("n", "job", fence=stale),
        lambda: thread.remove("job", stale),
        lambda: thread.mounts("job", fence=stale),
    ):
        with pytest.raises(FailedPrecondition):
            call()
    assert thread.mounts("job", fence).fence == fence
    thread.commit("n", "job", fence=fence)
    assert thread.view("look", "n").fence > fence


def test_in_a_batch(thread: blocking.Broker):
    with thread.batch() as batch:
        first, second = batch.prepare("a"), batch.prepare("b")
    fence = second.result().fence
    with pytest.raises(FailedPrecondition), thread.batch() as batch:  # noqa: PT012 - the end of the block raises
        stale = batch.remove("b", first.result().fence)
        good = batch.mounts("b", fence)
        batch.commit("c", "b", fence=fence)
    assert isinstance(stale.error(), FailedPrecondition)
    assert good.result().fence == fence


@pytest.mark.root
def test_a_workspace_carries_its_fence(thread: blocking.Broker, fake: FakeBroker):
    with thread.workspace(commit_as="made"):
        pass
    with thread.workspace():
        pass
    with pytest.raises(ZeroDivisionError), thread.workspace():
        1 / 0  # noqa: B018
    check_fences(fake)


@pytest.mark.root
async def test_a_workspace_of_a_task_carries_its_fence(tasks: aio.Broker, fake: FakeBroker):
    async with tasks.workspace(commit_as="made"):
        pass
    async with tasks.workspace():
        pass
    with pytest.raises(ZeroDivisionError):
        async with tasks.workspace():
            1 / 0  # noqa: B018
    check_fences(fake)


def check_fences(fake: FakeBroker) -> None:
    """Every commit and remove had the fence of its prepare."""
    prepared = [event.sequence for event in fake.journal if event.verb == "prepare"]
    ends = [received.calls[0] for received in fake.received if received.verbs[0] in ("commit", "remove")]
    assert [call.fence for call in ends] == prepared  # type: ignore[union-attr]
    assert len(ends) == 3


@pytest.mark.root
def test_a_workspace_leaves_alone_what_took_its_place(thread: blocking.Broker, fake: FakeBroker):
    """Somebody thought this worker dead, removed its key and prepared it once more."""
    workspace = thread.workspace(key="job", commit_as="made")
    with pytest.raises(FailedPrecondition) as raised, workspace:  # noqa: PT012 - the end of the block raises
        thread.remove("job")
        thread.prepare("job")
    assert raised.value.details["fence"] == fake.fences["default", "job"]
    assert [key for _, key in fake.snapshots] == ["job"]
    assert not getattr(raised.value, "__notes__", ())


@pytest.mark.root
async def test_a_workspace_of_a_task_leaves_alone_what_took_its_place(tasks: aio.Broker, fake: FakeBroker):
    with pytest.raises(FailedPrecondition):  # noqa: PT012 - it is the end of the block that raises
        async with tasks.workspace(key="job", commit_as="made"):
            await tasks.remove("job")
            await tasks.prepare("job")
    assert [key for _, key in fake.snapshots] == ["job"]
