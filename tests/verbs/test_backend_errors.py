"""What a backend cannot do: its caller is told, nothing is changed, and nobody else notices."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapbroker.contract import Info
from snapbroker.errors import BrokerError
from snapbroker.protocol import (
    Commit,
    Empty,
    Events,
    Mounts,
    MountsAnswer,
    Prepare,
    Remove,
    Stat,
    Update,
    UsageOf,
    View,
    Walk,
)
from tests.harness import Daemon, Result, Wire
from tests.verbs import faulty

FAULTS = {
    "EIO": "internal",
    "ENOENT": "internal",
    "ENOSPC": "resource_exhausted",
    "EDQUOT": "resource_exhausted",
    "EMFILE": "resource_exhausted",
    "failed_precondition": "failed_precondition",
    "unavailable": "unavailable",
    "bug": "internal",
}
"""What a backend raises, and the code that its caller gets."""


@pytest.fixture(scope="module")
def faulty_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with two snapshotters on the backend `faulty`: with a pool, and without."""
    place = tmp_path_factory.mktemp("plugins")
    shutil.copy(faulty.__file__, place / "snapbroker_faulty.py")
    distribution = place / "snapbroker_faulty-1.0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: snapbroker-faulty\nVersion: 1.0\n")
    (distribution / "entry_points.txt").write_text("[snapbroker.backends]\nfaulty = snapbroker_faulty:Faulty\n")
    sections: dict[str, dict[str, Any]] = {
        "pooled": {"backend": "faulty"},
        "unpooled": {"backend": "faulty", "limits": {"pool": {"pool_min": 0}}},
    }
    path = os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))
    with Daemon(sections, environment={"PYTHONPATH": path}) as daemon:
        # Whoever writes a backend wants to see where it went wrong.
        daemon.may_log_tracebacks = True
        yield daemon


@pytest.fixture(params=["pooled", "unpooled"])
def wire(request: pytest.FixtureRequest, faulty_daemon: Daemon, namespace: str) -> Iterator[Wire]:
    """The bare protocol, to each of the two."""
    with faulty_daemon.wire(request.param, namespace) as wire:
        yield wire


def look(wire: Wire) -> tuple[list[Info], list[Any]]:
    walk, events = wire.pages(Walk()), wire.pages(Events(since=0))
    return (
        [info for page in walk for info in page.infos],
        [event for page in events for event in page.events],
    )


def code_of(result: Result) -> str:
    return result.code if isinstance(result, BrokerError) else "ok"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", ["create", "mounts"])
def test_a_create_that_fails(wire: Wire, method: str, fault: str) -> None:
    """C19: no record; and the calls beside it in the same turn have what they asked for."""
    before = look(wire)
    for verb in (Prepare, View):
        (result,) = wire.call(verb(key="job", labels={method: fault}))
        assert code_of(result) == FAULTS[fault]
        assert look(wire) == before
    calls: list[Any] = [Prepare(key=f"job-{number}") for number in range(10)]
    calls.insert(5, Prepare(key="job", labels={method: fault}))
    results = wire.call(*calls)
    assert [code_of(result) for result in results] == ["ok"] * 5 + [FAULTS[fault]] + ["ok"] * 5
    assert [info.name for info in look(wire)[0]] == [f"job-{number}" for number in range(10)]
    assert isinstance(wire.one(Prepare(key="job")), MountsAnswer)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_commit_that_fails(wire: Wire, fault: str) -> None:
    """C34: the key stays as it was, and its name is free."""
    wire.one(Prepare(key="job", labels={"commit": fault}))
    wire.one(Prepare(key="other"))
    before = look(wire)
    failed, done = wire.call(Commit(name="layer", key="job"), Commit(name="other layer", key="other"))
    assert code_of(failed) == FAULTS[fault]
    assert done == Empty()
    assert wire.one(Stat(key="job")) == before[0][0]
    assert isinstance(wire.one(Prepare(key="layer")), MountsAnswer)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_usage_that_fails(wire: Wire, fault: str) -> None:
    wire.one(Prepare(key="job", labels={"usage": fault}))
    wire.one(Prepare(key="other"))
    failed, done = wire.call(UsageOf(key="job"), UsageOf(key="other"))
    assert (code_of(failed), code_of(done)) == (FAULTS[fault], "ok")
    results = wire.call(Remove(key="other"), UsageOf(key="job"), atomic=True)
    assert [code_of(result) for result in results] == ["cancelled", FAULTS[fault]]
    assert len(look(wire)[0]) == 2


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("atomic", [False, True])
def test_mounts_that_fail(wire: Wire, fault: str, atomic: bool) -> None:
    """A label may come after the snapshot was made."""
    wire.one(Prepare(key="job"))
    wire.one(Prepare(key="other"))
    wire.one(Update(name="job", labels={"mounts": fault}))
    other, job = wire.call(Mounts(key="other"), Mounts(key="job"), atomic=atomic)
    assert code_of(job) == FAULTS[fault]
    assert code_of(other) == ("cancelled" if atomic else "ok")
    assert code_of(wire.call(Stat(key="job"))[0]) == "ok"


@pytest.mark.parametrize("fault", ["EIO", "bug"])
def test_an_atomic_request_whose_last_call_fails(wire: Wire, fault: str) -> None:
    """What the backend did for the calls before it is undone."""
    wire.one(Prepare(key="one"))
    wire.one(Prepare(key="two", labels={"commit": fault}))
    before = look(wire)
    results = wire.call(
        Commit(name="layer", key="one"), Prepare(key="child", parent="layer"), Commit(name="layer-2", key="two"),
        atomic=True,
    )  # fmt: skip
    assert [code_of(result) for result in results] == ["cancelled", "cancelled", "internal"]
    assert look(wire) == before
    results = wire.call(Commit(name="layer", key="one"), Prepare(key="child", parent="layer"), atomic=True)
    assert [code_of(result) for result in results] == ["ok", "ok"]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_comes_after_a_commit_is_nobodys_error(faulty_daemon: Daemon, wire: Wire, fault: str) -> None:
    """C42: the record says the truth already, and the next start clears up."""
    before = faulty_daemon.actor(wire.snapshotter).pid
    wire.one(Prepare(key="job", labels={"settle": fault, "revert": fault}))
    wire.one(Prepare(key="other"))
    results = wire.call(Commit(name="layer", key="job"), Remove(key="missing"), atomic=True)
    assert [code_of(result) for result in results] == ["cancelled", "not_found"]
    assert [code_of(result) for result in wire.call(Commit(name="layer", key="job"), Stat(key="other"))] == ["ok", "ok"]
    assert wire.one(Stat(key="layer")).kind == "committed"
    assert faulty_daemon.actor(wire.snapshotter).pid == before


def test_a_parent_replaced_while_an_atomic_request_waits(faulty_daemon: Daemon, wire: Wire, tmp_path: Path) -> None:
    """The child is of the parent that has the name when the request takes effect, and so are its mounts."""
    gate = tmp_path / "gate"
    wire.one(Prepare(key="making"))
    wire.one(Commit(name="base", key="making"))
    wire.one(Prepare(key="slow", labels={"commit-waits": str(gate)}))
    calls: list[Any] = [Prepare(key="child", parent="base"), Commit(name="layer", key="slow")]
    request_id = wire.send(*calls, atomic=True)
    with faulty_daemon.wire(wire.snapshotter, wire.namespace) as other:
        while not Path(f"{gate}.waiting").exists():
            other.is_silent(0.01)
        (removed,) = other.call(Remove(key="base"))
        if not isinstance(removed, BrokerError):
            other.one(Prepare(key="making"))
            other.one(Commit(name="base", key="making"))
        gate.touch()
    results = dict(wire.parts(request_id, calls))
    prepared = results[0]
    assert isinstance(prepared, MountsAnswer), prepared
    assert wire.one(Mounts(key="child")) == prepared
    # A view of the parent tells which chain that is.
    looked = wire.one(View(key="look", parent="base"))
    assert prepared.mounts[0].options[1:] == looked.mounts[0].options[1:]
