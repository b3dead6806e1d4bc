"""What a restart on the same root must not change, and what it must find out: records, ids, broken snapshots."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest

from snapbroker import mount
from snapbroker.contract import Info, Kind, Mount
from snapbroker.errors import BrokerError, FailedPrecondition, Internal, Unavailable
from snapbroker.protocol import (
    Call,
    Cleanup,
    Commit,
    Events,
    Mounts,
    MountsAnswer,
    Prepare,
    Remove,
    Stat,
    StatusAnswer,
    Update,
    UsageOf,
    View,
    Walk,
    WalkPage,
)
from tests.harness import Daemon, Wire
from tests.oracle import check_chains, replay

pytestmark = pytest.mark.root
DISK = ("overlayfs", "native", "btrfs")


@pytest.fixture
def own_daemon(btrfs: Path) -> Iterator[Callable[..., Daemon]]:
    """A function that starts a daemon of the test's own with these snapshotters."""
    with contextlib.ExitStack() as daemons:

        def start(*snapshotters: str) -> Daemon:
            sections: dict[str, dict[str, Any]] = {name: {} for name in snapshotters}
            if "btrfs" in sections:
                sections["btrfs"]["root"] = tempfile.mkdtemp(dir=btrfs)
            return daemons.enter_context(Daemon(sections))

        yield start


def recovered(daemon: Daemon, snapshotter: str) -> dict[str, int]:
    """Recovery's figures, once it is finished."""

    def finished(status: StatusAnswer) -> bool:
        (actor,) = [actor for actor in status.snapshotters if actor.name == snapshotter]
        return bool(actor.queues.get("recovery", {}).get("finished"))

    daemon.wait_for(finished)
    return daemon.actor(snapshotter).queues["recovery"]


def picture(wire: Wire) -> tuple[dict[str, Info], dict[str, Any], dict[str, Any]]:
    """Infos, mounts and usages by name."""
    infos = {info.name: info for page in wire.pages(Walk()) for info in page.infos}
    names = list(infos)
    mounts = dict(zip(names, wire.call(*(Mounts(key=name) for name in names)), strict=True))
    usages = dict(zip(names, wire.call(*(UsageOf(key=name) for name in names)), strict=True))
    return infos, {name: _plain(answer) for name, answer in mounts.items()}, usages


def _plain(answer: Any) -> Any:
    return answer.code if isinstance(answer, BrokerError) else answer


def live(wire: Wire, rng: random.Random, steps: int) -> None:
    """Whatever comes of it."""
    names = [f"name-{number}" for number in range(8)] + ["n" * 450, "n" * 450 + "m"]
    for _ in range(steps):
        name, other = rng.sample(names, 2)
        parent = rng.choice(["", *names[:4]])
        calls: list[Call] = [
            Prepare(key=name, parent=parent, labels={"by": str(rng.random())}),
            View(key=name, parent=parent),
            Commit(name=name, key=other),
            Commit(name=name, key=other),
            Remove(key=name),
            Update(name=name, labels={"a": str(rng.random())}, fieldpaths=("labels.a",)),
        ]
        wire.call(rng.choice(calls))
    wire.call(Prepare(key="always there"))


def test_everything_is_as_it_was(own_daemon: Callable[..., Daemon]) -> None:
    """Records, mounts, usages and events after each of two restarts, with a life between them; and D4, C25."""
    daemon = own_daemon(*DISK)
    rng = random.Random(20)
    pictures: dict[str, Any] = {}
    sources: dict[str, set[tuple[Mount, ...]]] = {snapshotter: set() for snapshotter in DISK}
    for lives in range(3):
        for snapshotter in DISK:
            with daemon.wire(snapshotter) as wire:
                if lives:
                    figures = recovered(daemon, snapshotter)
                    assert figures["broken"] == 0
                    assert figures["checked"] == len(pictures[snapshotter][0])
                    assert picture(wire) == pictures[snapshotter]
                for _ in range(3):
                    mounts = wire.one(Prepare(key="passing")).mounts
                    assert mounts not in sources[snapshotter], "an id came again"
                    sources[snapshotter].add(mounts)
                    wire.one(Remove(key="passing"))
                live(wire, rng, 60)
                pictures[snapshotter] = picture(wire)
                assert pictures[snapshotter][0]
                events = [event for page in wire.pages(Events(since=0)) for event in page.events]
                check_chains(events)
                assert replay(events) == pictures[snapshotter][0]
        if lives < 2:
            daemon.restart()


def test_contents_are_still_there(own_daemon: Callable[..., Daemon]) -> None:
    daemon = own_daemon(*DISK)
    for snapshotter in DISK:
        with daemon.client(snapshotter) as broker:
            with mount.mounted(broker.prepare("job")) as path:
                (path / "file").write_bytes(b"content")
            broker.commit("base", "job", sync=True)
            with mount.mounted(broker.prepare("child", "base")) as path:
                (path / "another").write_bytes(b"more")
    daemon.restart()
    for snapshotter in DISK:
        recovered(daemon, snapshotter)
        with daemon.client(snapshotter) as broker:
            with mount.mounted(broker.mounts("child")) as path:
                assert (path / "file").read_bytes() == b"content"
                assert (path / "another").read_bytes() == b"more"
            broker.commit("top", "child")
            with mount.mounted(broker.view("look", "top")) as path:
                assert sorted(file.name for file in path.iterdir()) == ["another", "file"]


def test_a_commit_during_recovery_is_safe(own_daemon: Callable[..., Daemon]) -> None:
    """Recovery looks at the records in the order of their names while the service is at work: a commit at that time
    moves a record to a name that was passed already, and its files must not be taken for a left-over."""
    daemon = own_daemon("native")
    jobs = range(100)
    with daemon.wire("native") as wire:
        for begin in range(0, 8000, 1000):
            wire.call(*(View(key=f"m{number:05}") for number in range(begin, begin + 1000)))
        for result in wire.call(*(Prepare(key=f"z{job:03}") for job in jobs)):
            assert isinstance(result, MountsAnswer)
            (Path(result.mounts[0].source) / "file").write_bytes(b"content")
    daemon.stop()
    daemon.start(wait=False)
    with daemon.wire("native") as wire:
        under_way = list(jobs)
        while under_way:
            calls = [Commit(name=f"a{job:03}", key=f"z{job:03}") for job in under_way[:5]]
            try:
                results = wire.call(*calls)
            except Unavailable:
                continue
            assert not [result for result in results if isinstance(result, BrokerError)]
            del under_way[:5]
        recovered(daemon, "native")
        wire.one(Cleanup())
        for job in jobs:
            (look,) = wire.one(View(key=f"look-{job}", parent=f"a{job:03}")).mounts
            assert (Path(look.source) / "file").read_bytes() == b"content"


def location(daemon: Daemon, snapshotter: str, mounts: MountsAnswer) -> Path:
    """The directory `<id>` of an active snapshot."""
    (only,) = mounts.mounts
    source = only.source
    if only.type == "overlay":
        (source,) = [option.removeprefix("upperdir=") for option in only.options if option.startswith("upperdir=")]
    path = Path(source)
    return path.parent if snapshotter == "overlayfs" else path


def lose_some(daemon: Daemon, snapshotter: str) -> list[Path]:
    """Snapshots in the namespace, and the directories of two of them that are to be lost."""
    with daemon.wire(snapshotter) as wire:
        lost_job = location(daemon, snapshotter, wire.one(Prepare(key="lost job")))
        lost_layer = location(daemon, snapshotter, wire.one(Prepare(key="making")))
        wire.one(Commit(name="lost layer", key="making"))
        wire.one(Prepare(key="making"))
        wire.one(Commit(name="layer", key="making"))
        wire.one(Prepare(key="job", parent="layer"))
    return [lost_job, lost_layer]


def test_a_broken_snapshot_is_known_and_everything_else_serves(own_daemon: Callable[..., Daemon]) -> None:
    daemon = own_daemon("overlayfs", "native")
    lost = {snapshotter: lose_some(daemon, snapshotter) for snapshotter in ("overlayfs", "native")}
    daemon.stop()
    for number, path in enumerate([*lost["overlayfs"], *lost["native"]]):
        path.rename(daemon.place / f"elsewhere-{number}")
    daemon.start()
    for snapshotter in lost:
        assert recovered(daemon, snapshotter)["broken"] == 2
        with daemon.wire(snapshotter) as wire:
            assert wire.one(Stat(key="lost job")).kind is Kind.ACTIVE
            refused = wire.call(
                Mounts(key="lost job"), UsageOf(key="lost job"), Prepare(key="x", parent="lost layer"),
                View(key="x", parent="lost layer"), Commit(name="x", key="lost job"),
            )  # fmt: skip
            for result in refused:
                assert isinstance(result, FailedPrecondition), result
                assert "broken" in result.message
            assert isinstance(wire.one(Mounts(key="job")), MountsAnswer)
            assert isinstance(wire.one(Prepare(key="another", parent="layer")), MountsAnswer)
    # What comes back mends them: a filesystem may only have been mounted late. It is found at the next start.
    daemon.stop()
    for number, path in enumerate([*lost["overlayfs"], *lost["native"]]):
        (daemon.place / f"elsewhere-{number}").rename(path)
    for path in lost["native"]:
        shutil.rmtree(path)
    daemon.start()
    assert recovered(daemon, "overlayfs")["broken"] == 0
    with daemon.wire("overlayfs") as wire:
        assert isinstance(wire.one(Mounts(key="lost job")), MountsAnswer)
        assert isinstance(wire.one(Prepare(key="x", parent="lost layer")), MountsAnswer)
    # Else to remove them is the way out.
    with daemon.wire("native") as wire:
        wire.one(Remove(key="lost job"))
        wire.one(Remove(key="lost layer"))
        wire.one(Cleanup())
        assert [info.name for page in wire.pages(Walk()) for info in page.infos] == ["another", "job", "layer"]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "first-bit": lambda value: bytes([value[0] ^ 0x80]) + value[1:],
    "header": lambda value: value[:8] + b"\xff" + value[9:],
    "info": lambda value: value[:-5] + bytes([value[-5] ^ 1]) + value[-4:],
    "cut-short": lambda value: value[:-5],
    "header-only": lambda value: value[:20],
    "empty": lambda value: b"",
    "not-an-info": lambda value: value[:40] + b"\xc1" * 10,
}
"""What may become of a record, by namespace."""
JOBS = [f"job-{number}" for number in range(9)]


@pytest.fixture(scope="module")
def damaged() -> Iterator[tuple[Daemon, dict[str, dict[str, Path]], dict[str, dict[str, Info]]]]:
    """A daemon with a damaged job-4 in each namespace; all jobs' directories, and their infos before that."""
    with Daemon({"native": {}}) as daemon:
        places, infos = {}, {}
        for namespace in DAMAGES:
            with daemon.wire("native", namespace) as wire:
                places[namespace] = {name: location(daemon, "native", wire.one(Prepare(key=name))) for name in JOBS}
                infos[namespace] = {info.name: info for page in wire.pages(Walk()) for info in page.infos}
        daemon.stop()
        with lmdb.open(str(daemon.root_of("native") / "metadata"), max_dbs=8, map_size=1 << 30) as environment:
            snapshots = environment.open_db(b"snapshots")
            with environment.begin(write=True) as txn:
                for namespace, change in DAMAGES.items():
                    key = namespace.encode() + b"\0job-4"
                    value = txn.get(key, db=snapshots)
                    assert value is not None
                    txn.put(key, change(bytes(value)), db=snapshots)
        daemon.start()
        recovered(daemon, "native")
        yield daemon, places, infos


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_harms_nobody_else(
    damaged: tuple[Daemon, dict[str, dict[str, Path]], dict[str, dict[str, Info]]], damage: str
) -> None:
    """It answers Internal, by itself and in the middle of a request; others serve, and no file is touched."""
    daemon, places, infos = damaged
    with daemon.wire("native", damage) as wire:
        results = wire.call(*(Stat(key=name) for name in JOBS), *(Mounts(key=name) for name in JOBS))
        for name, stat, mounts in zip(JOBS, results[:9], results[9:], strict=True):
            if name == "job-4":
                assert isinstance(stat, Internal)
                assert isinstance(mounts, Internal)
                assert "job-4" in stat.message
            else:
                assert stat == infos[damage][name]
                assert isinstance(mounts, MountsAnswer)
        refused = wire.call(
            Update(name="job-4", labels={"a": "b"}), Prepare(key="child", parent="job-4"), Commit(name="x", key="job-4")
        )
        assert all(isinstance(result, BrokerError) for result in refused)
        wire.one(Prepare(key="fresh"))
        wire.one(Commit(name="layer", key="job-3"))
        assert walked_around(wire) == sorted(["fresh", "layer", *(set(JOBS) - {"job-3", "job-4"})])
        wire.one(Cleanup())
    assert all(place.is_dir() for place in places[damage].values())


def walked_around(wire: Wire) -> list[str]:
    """The names of a walk, which says at which name it cannot go on; behind that it can."""
    found: list[str] = []
    after = ""
    refusals = []
    while True:
        (result,) = wire.call(Walk(page=1, credit=1, after=after))
        if isinstance(result, BrokerError):
            refusals.append(result)
            after = "job-4"
            assert len(refusals) == 1
            continue
        assert isinstance(result, WalkPage)
        found += [info.name for info in result.infos]
        after = result.next
        if not after:
            break
    assert [type(refusal) for refusal in refusals] == [Internal]
    assert "job-4" in refusals[0].message
    return found


def test_another_format_is_refused(own_daemon: Callable[..., Daemon]) -> None:
    daemon = own_daemon("native")
    daemon.stop()
    with lmdb.open(str(daemon.root_of("native") / "metadata"), max_dbs=8) as environment:
        meta = environment.open_db(b"meta")
        with environment.begin(write=True) as txn:
            txn.put(b"format", b"7", db=meta)
    daemon.start(wait=False)
    daemon.wait_for(lambda status: status.snapshotters[0].restarts > 0)
    with daemon.wire("native") as wire, pytest.raises(Unavailable):
        wire.one(Stat(key="x"))
    assert "format 7" in daemon.log()
