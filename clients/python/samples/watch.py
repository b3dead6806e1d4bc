"""A live mirror of the snapshots of a namespace, printed as it changes.

    python watch.py

Which broker, namespace and snapshotter: SNAPBROKER_ENDPOINT, SNAPBROKER_NAMESPACE, SNAPBROKER_SNAPSHOTTER.

A walk says what is there and up to which event; the events above that go on from it. Whatever is lost on the way
the client takes from the journal, also across a restart of the broker; only where the journal no longer has it
(OutOfRange) there is another walk.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys

import snapbroker
from snapbroker import Event, Info
from snapbroker.errors import BrokerError, OutOfRange

Mirror = dict[str, Info]


def main() -> int:
    """Watch until told to stop."""
    argparse.ArgumentParser(prog="watch", description="A live mirror of what exists.").parse_args()
    sys.stdout.reconfigure(encoding="utf-8", line_buffering=True)  # type: ignore[union-attr]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        with snapbroker.connect() as broker:
            watch(broker)
    except BrokerError as error:
        print(f"watch: {error.code}: {error.message}", file=sys.stderr)
        return error.exit_status
    return 0


def watch(broker: snapbroker.Broker) -> None:
    """State, then stream; again where the stream has a hole that the journal cannot fill."""
    mirror: Mirror | None = None
    while True:
        walk = broker.walk()
        walked = {info.name: info for info in walk}
        if mirror is None:
            for info in walked.values():
                print("=", described(info))
        else:
            tell_differences(mirror, walked)
        mirror = walked
        print(f"-- {len(mirror)} snapshots at {walk.sequence}")
        try:
            for event in broker.events(walk.sequence, timeout=math.inf):
                apply(event, mirror)
        except OutOfRange:
            continue


def apply(event: Event, mirror: Mirror) -> None:
    """Change the mirror as the event says, and tell what changed."""
    info = event.info
    if event.verb == "remove":
        if mirror.pop(event.key, None) is not None:
            print("-", quoted(event.key))
    elif info is not None:
        consumed = mirror.pop(event.key, None) if event.verb == "commit" else None
        before, mirror[info.name] = mirror.get(info.name), info
        if before == info and consumed is None:
            return
        if event.verb == "commit":
            print(">", described(info), "from", quoted(event.key))
        elif event.verb == "update":
            print("~", labelled(info))
        else:
            print("+", described(info))


def tell_differences(before: Mirror, after: Mirror) -> None:
    """What went, came and changed while nobody listened."""
    for name in sorted(before.keys() - after.keys()):
        print("-", quoted(name))
    for name in sorted(after.keys() - before.keys()):
        print("+", described(after[name]))
    for name in sorted(before.keys() & after.keys()):
        old, new = before[name], after[name]
        if (old.kind, old.parent, old.labels) != (new.kind, new.parent, new.labels):
            print("~", labelled(new))


def described(info: Info) -> str:
    """Kind, name and parent."""
    return f"{info.kind} {quoted(info.name)}" + (f" on {quoted(info.parent)}" if info.parent else "")


def labelled(info: Info) -> str:
    """The same with all labels."""
    labels = dict(sorted(info.labels.items()))
    return f"{described(info)} {json.dumps(labels, ensure_ascii=False, separators=(',', ':'))}"


def quoted(name: str) -> str:
    """A name in which nothing can be mistaken."""
    return json.dumps(name, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
