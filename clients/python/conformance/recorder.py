"""The blocking client's recorder: a thread for each namespace, all on one connection."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import values
from mirror import WAIT_SECONDS, Mirror

import snapbroker
from snapbroker.errors import OutOfRange


def record(broker: snapbroker.Broker, begun: threading.Barrier) -> None:
    """State, then stream, until the end of the namespace."""
    mirror = Mirror(broker.namespace)
    first = True
    while not mirror.ended:
        walk = broker.walk()
        mirror.walked(list(walk), walk.sequence)
        with broker.events(walk.sequence) as events:
            if first:
                begun.wait()
                first = False
            with contextlib.suppress(OutOfRange):
                while not mirror.ended:
                    mirror.apply(next(events))
            mirror.gaps += events.statistics().gaps
    mirror.end()


def main(namespaces: list[str]) -> None:
    """Record all namespaces to their ends."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    snapshotter = os.environ["SNAPBROKER_SNAPSHOTTER"]
    begun = threading.Barrier(len(namespaces), lambda: values.write({"ready": True}))
    with (
        snapbroker.connect(timeout=WAIT_SECONDS, patience=WAIT_SECONDS) as connection,
        ThreadPoolExecutor(len(namespaces)) as threads,
    ):
        brokers = [connection.snapshotter(snapshotter, namespace=namespace) for namespace in namespaces]
        records = [threads.submit(record, broker, begun) for broker in brokers]
        for failed in wait(records, return_when=FIRST_EXCEPTION).done:
            if error := failed.exception():
                sys.excepthook(type(error), error, error.__traceback__)
                # The other threads wait for events that nobody needs.
                os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
