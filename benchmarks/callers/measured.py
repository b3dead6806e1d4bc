"""Latencies of a load, and the JSON document that the Go callers print too."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence


def report(operation: str, callers: int, latencies: Sequence[float], seconds: float, **more: object) -> str:
    """The document: `latencies` in seconds, one for each call, and the time from the first call to the last answer."""
    ordered = sorted(latencies)
    return json.dumps(
        {
            "operation": operation,
            "callers": callers,
            "operations": len(ordered),
            "seconds": seconds,
            "rate": len(ordered) / seconds,
            "p50_ms": quantile(ordered, 0.50),
            "p99_ms": quantile(ordered, 0.99),
            "max_ms": quantile(ordered, 1),
            **more,
        }
    )


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """The nearest-rank quantile of sorted seconds, in milliseconds; 0 where there are none."""
    if not ordered:
        return 0.0
    return ordered[min(int(fraction * len(ordered)), len(ordered) - 1)] * 1000


def repeat(call: Callable[[], object], seconds: float) -> tuple[list[float], float]:
    """Call again and again for `seconds`: one latency each, and the seconds it took."""
    latencies = []
    begun = time.perf_counter()
    end = begun + seconds
    moment = begun
    while moment < end:
        call()
        before, moment = moment, time.perf_counter()
        latencies.append(moment - before)
    return latencies, moment - begun
