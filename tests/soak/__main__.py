"""`python -m tests.soak`: an hour of everything at once, then hundreds of power cuts, then a crash at every fail point.

A summary as JSON is at the end.

One integer makes all random choices: `--seed N` makes them again, as far as the threads' timing allows. A power cut
that fails names its chain: `--minutes 0 --seed N --chain C` makes that chain alone.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from tests.failpoints.matrix import BACKENDS, crash_everywhere
from tests.powercut.disk import FILESYSTEMS, Disk, image_host
from tests.powercut.logged import LoggedDisk
from tests.powercut.machine import Machine
from tests.soak.run import Soak

CHAIN: Final = 12
"""Cuts of one filesystem, each on what the one before has left."""
DISKS: Final[tuple[type[Disk], ...]] = (Disk, LoggedDisk)
"""What the power is cut of, in turn."""


def main() -> int:
    """Run both parts; exit status 1 when anything was not as it must be."""
    arguments = _arguments()
    # In the background too, an end from outside takes along what was started and mounted.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    seed = random.SystemRandom().getrandbits(32) if arguments.seed is None else arguments.seed
    say(f"seed {seed}")
    failures: list[str] = []
    summary: dict[str, Any] = {"seed": seed, "minutes": arguments.minutes, "failures": failures}
    if arguments.minutes:
        with Soak(arguments.minutes * 60, seed, say) as soak:
            summary["soak"] = soak.run()
        failures += soak.failures + soak.grown
    chains = [arguments.chain] if arguments.chain is not None else list(range(-(-arguments.cuts // CHAIN)))
    if chains:
        summary["power_cuts"] = cut(seed, chains, arguments.cuts, failures)
    if arguments.crashes:
        summary["crashes"] = crash(seed, arguments.crashes, failures)
    text = json.dumps(summary, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return int(bool(failures))


def cut(seed: int, chains: list[int], cuts: int, failures: list[str]) -> dict[str, Any]:
    """Chains of power cuts, on each filesystem and kind of disk in turn; a chain that fails ends, the others go on."""
    begun = time.monotonic()
    figures: dict[str, Counter[str]] = {filesystem: Counter() for filesystem in FILESYSTEMS}
    with image_host() as host:
        for chain in chains:
            filesystem = FILESYSTEMS[chain % len(FILESYSTEMS)]
            disk = DISKS[chain // len(FILESYSTEMS) % len(DISKS)]
            name = f"chain {chain}, {filesystem}, {disk.__name__}"
            machine = Machine(filesystem, host, f"{seed}/{chain}", disk=disk)
            try:
                with machine:
                    for _ in range(min(CHAIN, cuts - CHAIN * chain) if len(chains) > 1 else CHAIN):
                        machine.round()
            except Exception as error:
                notes = "; ".join(getattr(error, "__notes__", []))
                failures.append(f"{name}: {type(error).__name__}: {error} {notes}"[:8000])
                say(f"FAILED {failures[-1]}")
            figures[filesystem].update(machine.figures)
            done = sum(each["cuts"] for each in figures.values())
            say(f"{done} cuts, {name}: {dict(machine.figures)}")
    total = sum(figures.values(), Counter[str]())
    return {"seconds": round(time.monotonic() - begun), "total": dict(total)} | {
        filesystem: dict(each) for filesystem, each in figures.items()
    }


def crash(seed: int, times: int, failures: list[str]) -> dict[str, Any]:
    """Die at every fail point, so many times over."""
    begun = time.monotonic()
    figures: dict[str, Counter[str]] = {backend: Counter() for backend in BACKENDS}
    for number in range(times):
        for backend in BACKENDS:
            done, failed = crash_everywhere(backend, seed + number, say)
            figures[backend].update(done)
            failures += failed
    total = sum(figures.values(), Counter[str]())
    return {"seconds": round(time.monotonic() - begun), "total": dict(total)} | {
        backend: dict(each) for backend, each in figures.items()
    }


def say(text: str) -> None:
    """A line of progress; the summary alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long the first part takes; 0 leaves it out")
    parser.add_argument("--cuts", type=int, default=204, help="power cuts in the second part; 0 leaves it out")
    parser.add_argument("--crashes", type=int, default=1, help="how often each fail point is died at; 0 leaves it out")
    parser.add_argument("--chain", type=int, help="only this chain of cuts")
    parser.add_argument("--seed", type=int, help="the integer that a run is made of; random where it is left out")
    parser.add_argument("--json", type=Path, help="where to write the summary as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
