"""What the figures were measured on: without it a rate says nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import scratch

FLUSHES = 200
"""How many 4 KiB flushes the disk's figure is taken from."""


def facts(place: Path) -> dict[str, Any]:
    """Processor, memory, kernel, the filesystem at `place` and how long its flushes take, and all versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release().partition("-")[0],
        "filesystem": scratch.run(["df", "--output=fstype", str(place)]).split()[-1],
        "fdatasync_4k_ms": flush_ms(place),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "snapbroker": _version("snapbrokerd"),
        "pyzmq": _version("pyzmq"),
        "lmdb": _version("lmdb"),
        "containerd": scratch.run(["containerd", "--version"]).split()[2],
        "go": scratch.run(["go", "version"]).split()[2],
        "grpcio": _version("grpcio"),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def flush_ms(place: Path) -> float:
    """The median time of an fdatasync after 4 KiB were written over, in milliseconds."""
    times = []
    with tempfile.TemporaryFile(dir=place) as file:
        for number in range(FLUSHES + 1):
            os.pwrite(file.fileno(), bytes([number % 256]) * 4096, 0)
            begun = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - begun)
    # The first flush also allocates the block.
    return round(statistics.median(times[1:]) * 1000, 3)
