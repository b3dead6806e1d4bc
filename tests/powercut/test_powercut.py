"""A handful of power cuts on each filesystem; `make soak` makes hundreds.

The seed is random and told when a cut goes wrong: `SNAPBROKER_SEED=<it>` makes the same choices again.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapbroker.errors import BrokerError
from snapbroker.protocol import Commit, MountsAnswer, Prepare
from tests.powercut.client import Client
from tests.powercut.disk import FILESYSTEMS, Disk, image_host
from tests.powercut.logged import LoggedDisk
from tests.powercut.machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

CUTS = 2
"""Cuts of each filesystem on each disk; two snapshotters lie on it."""
CUTS_MAX = 10
CARELESS_CUTS = 10
"""Cuts that a broker which flushes nothing cannot get through."""
CARELESS = """
import os
os.fsync = lambda fd: None
import backends.syscalls
backends.syscalls.syncfs = lambda fd: None
"""
HASTY = """
import functools
import lmdb
lmdb.open = functools.partial(lmdb.open, sync=False)
"""
FORGETFUL = """
from backends.native import Native
from backends.overlayfs import Overlayfs
def forgetful(commit):
    return lambda self, snapshot, sync, task: commit(self, snapshot, False, task)
for backend in (Native, Overlayfs):
    backend.commit = forgetful(backend.commit)
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Path]:
    """Where the images lie."""
    with image_host() as path:
        yield path


@pytest.mark.parametrize("disk", [Disk, LoggedDisk], ids=["clone", "log"])
@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_power_cuts(filesystem: str, disk: type[Disk], host: Path) -> None:
    seed = os.environ.get("SNAPBROKER_SEED") or str(random.SystemRandom().getrandbits(32))
    with Machine(filesystem, host, seed, disk=disk) as under_test:
        rounds(under_test, CUTS)
        # On a busy machine the first cuts may come before anything was acknowledged.
        while not under_test.figures["records"] and under_test.figures["cuts"] < CUTS_MAX:
            under_test.round()
    assert under_test.figures["cuts"] >= CUTS
    assert under_test.figures["records"]


def test_a_broker_that_flushes_nothing_is_found_out(host: Path, tmp_path: Path) -> None:
    """The harness can fail: the database of this one is durable, and what its records speak of is not."""
    careless = Machine("ext4", host, "careless", changed(tmp_path, CARELESS))
    with careless, pytest.raises(AssertionError, match=r"broken|missing|damaged") as found:
        rounds(careless, CARELESS_CUTS)
    assert any("power cut careless/ext4" in note for note in found.value.__notes__)


def test_a_broker_that_flushes_no_record_is_found_out(host: Path, tmp_path: Path) -> None:
    """The log is read as it should be: what was not flushed is not there."""
    hasty = Machine("ext4", host, "hasty", changed(tmp_path, HASTY), LoggedDisk)
    # What is half there of its database may be an answer that is wrong, or one that is an error.
    with hasty, pytest.raises((AssertionError, BrokerError)) as found:
        rounds(hasty, CARELESS_CUTS)
    assert any("power cut hasty/ext4" in note for note in found.value.__notes__)


@pytest.mark.parametrize("disk", [Disk, LoggedDisk], ids=["clone", "log"])
def test_files_of_a_sync_commit_are_whole(disk: type[Disk], host: Path) -> None:
    with Machine("ext4", host, "sync", disk=disk) as under_test:
        under_test.round(write_and_commit)
    assert under_test.figures["files"] >= 6


def test_a_broker_that_forgets_sync_is_found_out(host: Path, tmp_path: Path) -> None:
    forgetful = Machine("ext4", host, "sync", changed(tmp_path, FORGETFUL))
    with forgetful, pytest.raises(AssertionError, match=r"-committed: \S*file-\d is (missing|damaged)"):
        forgetful.round(write_and_commit)


def write_and_commit(clients: list[Client]) -> None:
    """Files of each client, some of which it flushes by itself, in a snapshot that is committed with `sync`."""
    for client in clients:
        (answer,) = client.say(Prepare(key="layer"))
        assert isinstance(answer, MountsAnswer)
        client.write("layer", answer)
        client.say(Commit(name="layer-committed", key="layer", sync=True))


def changed(place: Path, code: str) -> dict[str, str]:
    """The environment of a daemon that runs `code` first."""
    (place / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def rounds(under_test: Machine, count: int) -> None:
    for _ in range(count):
        under_test.round()
