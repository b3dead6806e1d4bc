"""The threads for what a backend does beside the transactions; each takes what the next client in turn has waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from broker.actor.fairness import FairQueue


class Workers:
    """Threads, and a line for each client before them; for any thread."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._executor = ThreadPoolExecutor(size, thread_name_prefix="worker")
        self._lock = threading.Lock()
        self._waiting: FairQueue[Callable[[], None]] = FairQueue(quantum=1)

    def submit(self, line: bytes, work: Callable[[], None]) -> None:
        """Run `work`, which must not raise, when its turn comes; RuntimeError where no thread can be had for it."""
        with self._lock:
            self._waiting.append(line, work)
        # What the executor queues is only how often somebody is to look.
        self._executor.submit(self._run_next)

    def _run_next(self) -> None:
        with self._lock:
            work = self._waiting.popleft() if self._waiting else None
        if work is not None:
            work()

    def shutdown(self) -> None:
        """Do what waits, and end the threads."""
        self._executor.shutdown()

    def statistics(self) -> dict[str, int]:
        """For `status`."""
        with self._lock:
            return {"waiting": len(self._waiting), "threads": self._size}
