"""`python -m tests.fuzz [TARGET...]`: search for inputs that no target gets through; a summary as JSON at the end.

Each target runs in a process of its own, `--jobs` at a time, for `--seconds` or `--runs`, from
its corpus and its seeds. What is new in what was found is merged into the corpus with `--keep`. An input that fails is
written to `--findings`, and told: once its cause is mended it belongs into the corpus, where every test run tries it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha1
from pathlib import Path
from typing import Final

from tests.fuzz import targets
from tests.fuzz.vectors import REPOSITORY

CORPUS: Final = Path(__file__).with_name("corpus")
LENGTH_MAX: Final = 4096
"""Longest input that is tried, in bytes."""
INPUT_S_MAX: Final = 60
"""An input that takes longer fails: nothing here may hang, whatever the machine has to do besides."""
MEMORY_MAX_MIB: Final = 4096
MERGE_S: Final = 600
_MEMORY: Final = Path("/dev/shm")


@dataclass
class Found:
    """What became of one target: inputs `executed`, features seen (`coverage`), and the files of inputs that failed.

    A feature is, in libFuzzer's words, a branch and about how often an input takes it. `status` is the process's own.
    """

    target: str
    seconds: float
    executed: int
    coverage: int
    corpus: int
    findings: list[str]
    status: int
    output: str = ""

    @property
    def failed(self) -> bool:
        """Whether an input failed, or nothing was tried at all."""
        return bool(self.findings) or bool(self.status) or not self.executed


def main() -> int:
    """Run; exit status 1 when an input failed."""
    arguments = _arguments()
    arguments.findings.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as jobs:
        results = list(jobs.map(lambda name: _told(name, arguments), arguments.targets or targets.NAMES))
    summary = {
        "executed": sum(found.executed for found in results),
        "findings": sum(len(found.findings) for found in results),
        "targets": [{key: value for key, value in asdict(found).items() if key != "output"} for found in results],
    }
    text = json.dumps(summary, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return int(any(found.failed for found in results))


def _told(name: str, arguments: argparse.Namespace) -> Found:
    found = fuzz(name, arguments.findings, seconds=arguments.seconds, runs=arguments.runs, keep=arguments.keep)
    rate = round(found.executed / found.seconds * 60) if found.seconds else 0
    print(
        f"{name}: {found.executed} inputs in {found.seconds:.0f} s ({rate} a minute), coverage {found.coverage}, "
        f"corpus {found.corpus}" + (f", FAILED {found.findings}\n{found.output[-6000:]}" if found.failed else ""),
        file=sys.stderr,
        flush=True,
    )
    return found


def fuzz(name: str, findings: Path, *, seconds: int = 0, runs: int = -1, seed: int = 0, keep: bool = False) -> Found:
    """Fuzz one target for `seconds`, or for `runs` inputs, corpus and seeds among them; `seed` 0 is a random one.

    With `keep`, what reaches what the corpus does not is added to it.
    """
    with _scratch() as place:
        fresh, seeds = place / "fresh", place / "seeds"
        fresh.mkdir()
        write_seeds(name, seeds)
        before = set(findings.glob(f"{name}-*"))
        begun = time.monotonic()
        flags = [f"-max_total_time={seconds}", f"-runs={runs}", f"-seed={seed}", f"-max_len={LENGTH_MAX}"]
        flags += [f"-artifact_prefix={findings}/{name}-", "-print_final_stats=1", f"-timeout={INPUT_S_MAX}"]
        status, output = _process(name, place, *flags, fresh, CORPUS / name, seeds)
        took = time.monotonic() - begun
        failed = sorted(str(file) for file in set(findings.glob(f"{name}-*")) - before)
        if keep and not failed:
            status, merged = _process(name, place, "-merge=1", CORPUS / name, fresh, timeout_s=MERGE_S)
            output += merged if status else ""
        covered = re.findall(r"\bft: (\d+)", output)
        executed = re.search(r"stat::number_of_executed_units:\s+(\d+)", output)
        count = len(list((CORPUS / name).iterdir()))
        return Found(
            target=name,
            seconds=round(took, 1),
            executed=int(executed[1]) if executed else 0,
            coverage=int(covered[-1]) if covered else 0,
            corpus=count,
            findings=failed,
            status=status,
            output=output,
        )


def write_seeds(name: str, place: Path) -> None:
    """The seeds of a target as files, and a place for its corpus."""
    place.mkdir(exist_ok=True)
    (CORPUS / name).mkdir(parents=True, exist_ok=True)
    for seed in targets.load(name).seeds():
        if len(seed) <= LENGTH_MAX:
            (place / sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)


def _process(name: str, place: Path, *arguments: str | Path, timeout_s: int | None = None) -> tuple[int, str]:
    """Run a target's process to its end; answers its exit status and what it wrote."""
    environment = {**os.environ, "TMPDIR": str(place)}
    command = [sys.executable, "-m", "tests.fuzz.process", name, f"-rss_limit_mb={MEMORY_MAX_MIB}", *arguments]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout_s,
    )
    return done.returncode, done.stdout.decode(errors="replace")


@contextmanager
def _scratch() -> Iterator[Path]:
    """A directory in memory, where there is one, for what the targets write."""
    where = str(_MEMORY) if os.access(_MEMORY, os.W_OK) else None
    place = tempfile.mkdtemp(prefix="snb-fuzz-", dir=where)
    try:
        yield Path(place)
    finally:
        # The children of a process that libFuzzer has ended may be about to end.
        shutil.rmtree(place, ignore_errors=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"all by default: {', '.join(targets.NAMES)}")
    parser.add_argument("--seconds", type=int, default=60, help="how long each target is fuzzed (default %(default)s)")
    parser.add_argument("--runs", type=int, default=-1, help="most inputs of each target; without a limit by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at a time (default %(default)s)")
    parser.add_argument("--keep", action="store_true", help="add to the corpus what reaches more than it does")
    parser.add_argument("--findings", type=Path, default=REPOSITORY / "fuzz-findings", help="where failed inputs go")
    parser.add_argument("--json", type=Path, help="where to write the summary as well")
    arguments = parser.parse_args()
    for name in arguments.targets:
        if name not in targets.NAMES:
            parser.error(f"there is no target {name!r}: {', '.join(targets.NAMES)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
