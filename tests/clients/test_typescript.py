"""The TypeScript client: built, which checks its types, and tested by its own tests, which start real brokers."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

FOLDER: Final = Path(__file__).resolve().parents[2] / "clients" / "typescript"
BUILD_S: Final = 200
"""How long the compiler may take on a busy machine."""
TESTS_S: Final = 500
"""How long all tests of the package may take on a busy machine; alone they take a twentieth of it."""


def run(*command: str, timeout: float) -> str:
    """What a command of the package's folder says; AssertionError with it where the command fails."""
    environment = {
        **os.environ,
        "PATH": f"{os.environ['PATH']}:{Path(sys.executable).parent}",
        "SNAPBROKERD": str(Path(sys.executable).with_name("snapbrokerd")),
    }
    try:
        done = subprocess.run(
            command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except FileNotFoundError:
        raise AssertionError(f"{command[0]} is not there: `.ci/setup dev` installs what tests need") from None
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(BUILD_S + TESTS_S)
def test_the_package_passes_its_own_tests() -> None:
    # Whoever else runs programs of the package builds it as well.
    with (FOLDER / ".build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("npm", "run", "--silent", "build", timeout=BUILD_S)
    said = run("npm", "test", "--silent", timeout=TESTS_S)
    passed = re.search(r"^\S+ pass (\d+)$", said, re.MULTILINE)
    assert passed is not None, said
    assert int(passed[1]) > 200, said
