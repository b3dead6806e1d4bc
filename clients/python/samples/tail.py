"""The events above a sequence, as JSON lines: the same as `snapbroker --json events`.

    python tail.py [--since N] [--follow] [TOPIC...]

Which broker, namespace and snapshotter: SNAPBROKER_ENDPOINT, SNAPBROKER_NAMESPACE, SNAPBROKER_SNAPSHOTTER.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys

import msgspec

import snapbroker
from snapbroker.errors import BrokerError, OutOfRange


def main() -> int:
    """Print until the end, or until told to stop."""
    parser = argparse.ArgumentParser(prog="tail", description="Print events as JSON lines.")
    parser.add_argument("--since", type=int, metavar="N", help="only events above this sequence")
    parser.add_argument("--follow", action="store_true", help="go on with those that come")
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help="prefix of SNAPSHOTTER/NAMESPACE/snapshot/VERB")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        with snapbroker.connect() as broker:
            # Whoever follows waits for a broker that goes away, but not for one that was never there.
            broker.status()
            try:
                show(broker, options.since or 0, options)
            except OutOfRange as error:
                oldest = error.details.get("oldest")
                if options.since is not None or error.details.get("since") != 0 or not isinstance(oldest, int):
                    raise
                # Nobody asked for a sequence: what is kept is what there is to show.
                show(broker, oldest - 1, options)
    except BrokerError as error:
        print(f"tail: {error.code}: {error.message}", file=sys.stderr)
        return error.exit_status
    return 0


def show(broker: snapbroker.Broker, since: int, options: argparse.Namespace) -> None:
    """Print one line for each event."""
    for event in broker.events(since, options.topics, options.follow, timeout=math.inf if options.follow else None):
        info = None if event.info is None else msgspec.structs.asdict(event.info)
        line = {**msgspec.structs.asdict(event), "info": info, "topic": event.topic}
        sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
