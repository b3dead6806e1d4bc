"""The Go client: its own tests, with the race detector, against the golden vectors and brokers that they start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from benchmarks import scratch

MODULE: Final = Path(__file__).parents[2] / "clients" / "go"
TESTS_S: Final = 600
"""How long they may take with nothing built yet, on a busy machine."""
pytestmark = pytest.mark.timeout(2 * TESTS_S)


def go(*arguments: str) -> None:
    """Run the go command in the module; what it says is shown where it fails."""
    scratch.require("go", "gcc", "pkg-config")
    environment = {**os.environ, "SNAPBROKERD": str(Path(sys.executable).with_name("snapbrokerd"))}
    done = subprocess.run(
        ["go", *arguments],
        cwd=MODULE,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TESTS_S,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.root
def test_go_test() -> None:
    go("test", "-race", "-count=1", "./...")


def test_go_vet() -> None:
    go("vet", "./...")
