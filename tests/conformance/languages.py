"""The clients that take part: how each is built, and what its programs are called.

Another one is one more entry of `LANGUAGES`. Nothing is skipped: a command that is not there fails the tests, and so
does a build.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
CLIENTS: Final = ROOT / "clients"
BUILD_S: Final = 600
"""How long a build may take on a busy machine, with nothing downloaded yet."""

Command = tuple[str, ...]

_made: set[str] = set()
"""The languages whose programs this process has built."""


@dataclass(frozen=True)
class Language:
    """One client. `build`: commands run in `folder`, the first time and whenever something changed."""

    name: str
    folder: Path
    driver: Command
    recorder: Command
    bench: Command
    samples: Mapping[str, Command] = field(default_factory=dict)
    build: tuple[Command, ...] = ()

    def make(self) -> None:
        """Build the programs; AssertionError with what the build said where that fails. Waits for another's build.

        Once in a process: to find that nothing has changed takes some compilers seconds.
        """
        if not self.build or self.name in _made:
            return
        with (self.folder / ".build.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for command in self.build:
                try:
                    done = subprocess.run(
                        command, cwd=self.folder, capture_output=True, text=True, timeout=BUILD_S, check=False
                    )
                except FileNotFoundError:
                    raise AssertionError(
                        f"{command[0]} is not there: `.ci/setup dev` installs what tests need"
                    ) from None
                assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        _made.add(self.name)


def _python(name: str, suffix: str, samples: tuple[str, ...]) -> Language:
    folder = CLIENTS / "python"
    programs = folder / "conformance"
    return Language(
        name=name,
        folder=folder,
        driver=(sys.executable, str(programs / f"driver{suffix}.py")),
        recorder=(sys.executable, str(programs / f"recorder{suffix}.py")),
        bench=(sys.executable, str(programs / "bench.py"), "asyncio" if suffix else "blocking"),
        samples={sample: (sys.executable, str(folder / "samples" / f"{sample}.py")) for sample in samples},
    )


def _go() -> Language:
    folder = CLIENTS / "go"
    samples = ("watch", "farm", "tail")
    programs = {name: (str(folder / "bin" / name),) for name in ("driver", "recorder", "bench", *samples)}
    return Language(
        name="go",
        folder=folder,
        driver=programs["driver"],
        recorder=programs["recorder"],
        bench=programs["bench"],
        samples={sample: programs[sample] for sample in samples},
        build=(("go", "build", "-o", "bin/", "./conformance/...", "./samples/..."),),
    )


def _typescript() -> Language:
    folder = CLIENTS / "typescript"
    dist = folder / "dist"

    def program(place: str, name: str) -> Command:
        return ("node", str(dist / place / f"{name}.js"))

    return Language(
        name="typescript",
        folder=folder,
        driver=program("conformance", "driver"),
        recorder=program("conformance", "recorder"),
        bench=program("conformance", "bench"),
        samples={sample: program("samples", sample) for sample in ("watch", "farm", "tail")},
        build=(("npm", "run", "--silent", "build"),),
    )


LANGUAGES: Final = (
    _python("python", "", ("watch", "farm", "tail")),
    _python("python-asyncio", "_aio", ()),
    _go(),
    _typescript(),
)
