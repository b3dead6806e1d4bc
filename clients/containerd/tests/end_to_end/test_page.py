"""The five minutes of docs/containerd.md are run as a reader would, and do what the page says."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import scratch
from benchmarks.node import Containerd
from tests import test_documentation as documentation

pytestmark = pytest.mark.root

PAGE = "docs/containerd.md"
NAMESPACE = "five-minutes"


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory with a short path; at the end what the page's containerd has left is taken away."""
    path = Path(tempfile.mkdtemp(prefix="snb-page-", dir="/var/tmp"))
    yield path
    node = Containerd(path, NAMESPACE)
    node.sweep()
    scratch.delete(path)


def test_the_five_minutes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKOUT", str(documentation.ROOT))
    printed = documentation.run_session(PAGE, place)
    assert printed.count("--- line ") == len(documentation.session(PAGE)) > 0
    assert "hello from a snapshot\nchanged\n" in printed
    assert '[proxy_plugins."snapbroker-overlayfs"]' in printed
    assert "overlayfs/containerd/snapshot/prepare five-minutes/5/first" in printed
    assert "\netc/kept\n" in printed
    assert printed.endswith("example.test/hello:1\nNAME  KIND  PARENT  CREATED  LABELS\n")
    assert Containerd(place, NAMESPACE).sweep() == []
    assert "Traceback" not in (place / "log").read_text() + (place / "bridge.log").read_text()
