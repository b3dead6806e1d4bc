"""`python -m tests.fuzz.process TARGET [libFuzzer's flags and directories]`: one target under atheris, in this process.

libFuzzer ends the process itself. What the targets import of ours is instrumented, so that it sees which branches an
input takes; libraries in C are not.
"""

from __future__ import annotations

import logging
import sys
from typing import Final

import atheris
import structlog

PACKAGES: Final = ["broker", "backends", "snapbroker", "snapbroker_containerd"]


def main() -> None:
    """Fuzz until a flag says when to end."""
    name = sys.argv[1]
    quiet()
    # Loaded before, it would be what it was without instruments.
    with atheris.instrument_imports(include=PACKAGES):
        from tests.fuzz import targets

        target = targets.load(name)
    # libFuzzer's children, in a merge, are started by the shell with these words.
    command = f"{sys.executable} -m tests.fuzz.process {name}"
    atheris.Setup([command, *sys.argv[2:]], target.one)
    atheris.Fuzz()


def quiet() -> None:
    """No log lines: bad input makes many."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


if __name__ == "__main__":
    main()
