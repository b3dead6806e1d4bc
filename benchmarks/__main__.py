"""`make bench`: snapbroker and containerd side by side on this machine, as root."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine, report, scratch
from benchmarks.bench import Bench
from benchmarks.containerd import Containerd
from benchmarks.figures import Figure
from benchmarks.plan import FULL, QUICK, Plan
from benchmarks.services import OURS, PEER, Side
from benchmarks.snapbrokerd import Snapbrokerd
from benchmarks.workloads import workloads

SCALE_LEVELS = (10_000, 100_000, 1_000_000)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="two to three minutes on a quiet machine; less certain, fewer sizes"
    )
    parser.add_argument("--only", action="append", metavar="PATTERN", help="only these, such as prepare.*; repeatable")
    parser.add_argument("--list", action="store_true", help="say what can be measured and stop")
    parser.add_argument("--sides", default=f"{PEER},{OURS}", help="who is measured (default %(default)s)")
    parser.add_argument("--rounds", type=int, help="how often each side has its turn")
    parser.add_argument("--seconds", type=float, help="how long one load runs")
    parser.add_argument("--callers", metavar="N,N", help="numbers of callers, such as 1,64")
    parser.add_argument("--copy-gib", type=float, help="size of the copy that readers are measured during")
    parser.add_argument(
        "--scale-backend", choices=("overlayfs", "memory"),
        help="fill the stores of 10,000 to 1,000,000 snapshots with this backend; without it 1,000,000 with memory and "
        "fewer with overlayfs, which makes three directories for each",
    )  # fmt: skip
    parser.add_argument(
        "--filesystem", choices=("ext4", "xfs", "disk"), default="ext4",
        help="where stores lie: each on a fresh filesystem of this kind on a loop device, or on the disk as it is "
        "(default %(default)s; btrfs always has its own)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw rates by callers (SVG, PNG or PDF by its name)")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write benchmarks.json and .svg, and the table in .md")
    return parser.parse_args()


def plan(options: argparse.Namespace) -> Plan:
    """The full or the quick plan, with what the options change."""
    chosen = QUICK if options.quick else FULL
    changes: dict[str, object] = {}
    changes["filesystem"] = options.filesystem
    if options.rounds:
        changes["rounds"] = options.rounds
    if options.seconds:
        changes["seconds"] = options.seconds
    if options.callers:
        changes["callers"] = tuple(int(count) for count in options.callers.split(","))
    if options.copy_gib:
        changes["large_copy_bytes"] = int(options.copy_gib * 2**30)
    if options.scale_backend:
        changes["scale"] = ((options.scale_backend, SCALE_LEVELS),)
    return dataclasses.replace(chosen, **changes)  # type: ignore[arg-type]


def measure(bench: Bench, patterns: list[str] | None) -> list[Figure]:
    """Run the workloads that a pattern names; one that fails is said and does not take the others with it."""
    figures: list[Figure] = []
    failed = []
    for name, workload in workloads(bench.plan).items():
        if patterns and not any(fnmatch.fnmatch(name, f"{pattern}*") for pattern in patterns):
            continue
        print(f"{name}:", file=sys.stderr, flush=True)
        begun = time.monotonic()
        try:
            for figure in workload(bench):
                figures.append(figure)
                print("    " + " | ".join(report.row(figure)), file=sys.stderr, flush=True)
        except Exception as error:
            failed.append(name)
            print(f"    FAILED: {error}", file=sys.stderr, flush=True)
        print(f"  {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return figures


def main() -> int:
    options = arguments()
    if options.list:
        print("\n".join(workloads(plan(options))))
        return 0
    if os.geteuid() != 0:
        sys.exit("the benchmark mounts filesystems: run it as root")
    scratch.interrupts.install()
    scratch.require("containerd", "go", "losetup", "mkfs.btrfs")
    begun = time.monotonic()
    facts = machine.facts(scratch.DISK)
    print(report.machine(facts), file=sys.stderr)
    with scratch.directory("snapbroker-bench-tools") as tools:
        makers: dict[str, Callable[[], Side]] = {PEER: lambda: Containerd(tools), OURS: Snapbrokerd}
        sides = {name: makers[name]() for name in options.sides.split(",")}
        figures = measure(Bench(plan(options), sides), options.only)
    seconds = time.monotonic() - begun
    print(report.table(figures))
    print(f"{seconds:.0f} s", file=sys.stderr)
    given = {name: str(value) for name, value in vars(options).items() if value}
    write(options, facts, given, figures, seconds)
    return 0 if figures and not any(figure.met is False for figure in figures) else 1


def write(
    options: argparse.Namespace, facts: dict[str, object], given: dict[str, str], figures: list[Figure], seconds: float
) -> None:
    """Write the files that were asked for."""
    documents = [options.json] if options.json else []
    plots = [options.plot] if options.plot else []
    if options.docs:
        documents.append(options.docs / "benchmarks.json")
        plots.append(options.docs / "benchmarks.svg")
        report.refresh(options.docs / "benchmarks.md", facts, figures)
    for path in documents:
        path.write_text(report.document(facts, given, figures, seconds) + "\n")
    for path in plots:
        report.plot(figures, path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; everything that was made for the benchmark is gone")
