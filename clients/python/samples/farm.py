"""Workspaces from one base, used and committed, the way a build farm does it, with what each step took.

    python farm.py [--count 100] [--callers 16] [--base NAME] [--prefix P] [--keep] [--json]

Which broker, namespace and snapshotter: SNAPBROKER_ENDPOINT, SNAPBROKER_NAMESPACE, SNAPBROKER_SNAPSHOTTER. Workspaces
are mounted by root; anybody else's are prepared and committed only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import snapbroker
from snapbroker import mount
from snapbroker.errors import BrokerError, Internal, NotFound


def main() -> int:
    """Run the farm and print its summary."""
    options = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with snapbroker.connect() as broker:
            summary = Farm(broker, options).run()
    except BrokerError as error:
        print(f"farm: {error.code}: {error.message}", file=sys.stderr)
        return error.exit_status
    print(json.dumps(summary, separators=(",", ":")) if options.json else told(summary))
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="farm", description="Workspaces from one base, used and committed.")
    parser.add_argument("--count", type=_positive, default=100, help="workspaces (default %(default)s)")
    parser.add_argument("--callers", type=_positive, default=16, help="how many at a time (default %(default)s)")
    parser.add_argument("--base", metavar="NAME", help="a committed snapshot to begin from; else one is made")
    parser.add_argument("--prefix", metavar="P", default=f"farm-{secrets.token_hex(4)}", help="of all names made")
    parser.add_argument("--keep", action="store_true", help="leave everything there")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    options = parser.parse_args()
    if not re.fullmatch(r"[A-Za-z0-9._-]+", options.prefix):
        parser.error("a prefix has letters, digits, '.', '_' and '-' only")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


class Farm:
    """One run of the farm; `took`: the milliseconds of each step, `made`: the names that are there."""

    def __init__(self, broker: snapbroker.Broker, options: argparse.Namespace) -> None:
        self.broker = broker
        self.options = options
        self.prefix: str = options.prefix
        self.base: str = options.base or f"{self.prefix}-base"
        self.mounts = os.geteuid() == 0
        self.made: set[str] = set()
        self.took: dict[str, list[float]] = {"prepare": [], "use": [], "commit": []}

    def run(self) -> dict[str, Any]:
        """Make everything, take it away again unless it is to be kept, and answer the summary."""
        options = self.options
        try:
            if options.base is None:
                self.make_base()
            begun = time.monotonic()
            with ThreadPoolExecutor(options.callers) as callers:
                list(callers.map(self.workspace, range(options.count)))
            seconds = time.monotonic() - begun
            self.check()
        finally:
            if not options.keep:
                self.discard()
        return {
            "workspaces": options.count,
            "callers": options.callers,
            "base": self.base,
            "mounted": self.mounts,
            **{f"{step}_ms": _figures(times) for step, times in self.took.items()},
            "seconds": round(seconds, 3),
            "per_second": round(options.count / seconds, 1),
        }

    def make_base(self) -> None:
        """A base with one file."""
        key = f"{self.base}-making"
        mounts = self.broker.prepare(key)
        self.made.add(key)
        if self.mounts:
            with mount.mounted(mounts) as path:
                (path / "base.txt").write_text(f"the base of {self.prefix}\n")
        self.broker.commit(self.base, key, sync=True, fence=mounts.fence)
        self.made ^= {key, self.base}

    def workspace(self, number: int) -> None:
        """Prepare one, use it, commit it."""
        key, labels = f"{self.prefix}-{number}", {"farm": self.prefix}
        with self.timed("prepare"):
            mounts = self.broker.prepare(key, self.base, labels)
        self.made.add(key)
        if self.mounts:
            with self.timed("use"), mount.mounted(mounts) as path:
                if self.options.base is None and (path / "base.txt").read_text() != f"the base of {self.prefix}\n":
                    raise Internal(f"the workspace {key!r} has not the file of its base")
                (path / "result.txt").write_text(f"workspace {number}\n")
        with self.timed("commit"):
            self.broker.commit(f"{key}-done", key, labels=labels, fence=mounts.fence)
        self.made.discard(key)
        self.made.add(f"{key}-done")

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Note what the block took."""
        begun = time.perf_counter()
        yield
        self.took[step].append((time.perf_counter() - begun) * 1000)

    def check(self) -> None:
        """Every workspace is a committed snapshot."""
        found = sum(1 for _ in self.broker.walk(f'labels.farm=="{self.prefix}",kind==committed'))
        if found != self.options.count:
            raise Internal(f"{found} of {self.options.count} workspaces are committed")

    def discard(self) -> None:
        """Take away what this run has made, the base last, and wait until it is gone from disk."""
        for name in sorted(self.made, key=lambda name: name == self.base):
            with contextlib.suppress(NotFound):
                self.broker.remove(name)
        self.broker.cleanup()


def _figures(times: list[float]) -> dict[str, float]:
    if not times:
        return {"median": 0, "max": 0}
    return {"median": round(statistics.median(times), 3), "max": round(max(times), 3)}


def told(summary: dict[str, Any]) -> str:
    """The summary for people."""
    how = "mounted" if summary["mounted"] else "not mounted (needs root)"
    lines = [
        f"workspaces  {summary['workspaces']} from {json.dumps(summary['base'])}, {summary['callers']} at a time, {how}"
    ]
    for step in ("prepare", "use", "commit"):
        figures = summary[f"{step}_ms"]
        lines.append(f"{step:<10}  median {figures['median']:.2f} ms, slowest {figures['max']:.2f} ms")
    lines.append(f"{'total':<10}  {summary['seconds']:.2f} s, {summary['per_second']:.1f} workspaces a second")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
