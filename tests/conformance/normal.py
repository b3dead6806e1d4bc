"""What two drivers must say alike, with what is each one's own made relative.

A namespace becomes `<namespace>`, a time `<time>`, a path's root `<root>`; fences and ids get the number of their first
appearance in a driver's transcript, sequences of events their place among them.
"""

from __future__ import annotations

import re
from typing import Any, Final

TIME_MIN: Final = 1_600_000_000_000_000_000
"""No clock of a machine that tests run on is before 2020."""

_SNAPSHOT = re.compile(r"/snapshots/(\d+)")


class Normal:
    """One driver's view; it remembers what it has numbered, of each snapshotter by itself."""

    def __init__(self, namespace: str, root: str) -> None:
        self._namespace = namespace
        self._root = root
        self._snapshotter = ""
        self._fences: dict[tuple[str, int], str] = {}
        self._ids: dict[tuple[str, str], str] = {}

    def outcome(self, outcome: dict[str, Any], snapshotter: str) -> Any:
        """The outcome of a step at a snapshotter."""
        self._snapshotter = snapshotter
        return _as_a_whole(self._value(outcome))

    def _value(self, value: Any, key: str = "") -> Any:
        match key, value:
            case (("created" | "updated" | "time"), int()):
                assert value > TIME_MIN, value
                return "<time>"
            case "fence", int():
                return value and self._fences.setdefault((self._snapshotter, value), f"<fence {len(self._fences) + 1}>")
            case (("free_bytes" | "free_inodes"), int()):
                # Of a disk that others write to as well.
                return "<free>"
            case (("sequence" | "oldest" | "newest"), int()):
                return "<sequence>" if value else 0
            case "events", list():
                return self._events(value)
            case "labels", dict():
                return {name: self._text(label) for name, label in sorted(value.items())}
            case _, dict():
                # How long to wait is the moment's, and `since` is what some clients add for their callers.
                skipped = ("retry_after_ms", "since") if key == "details" else ()
                return {name: self._value(each, name) for name, each in value.items() if name not in skipped}
            case _, list():
                return [self._value(each) for each in value]
            case "source", str() if value.isdigit():
                # Of the memory backend.
                return self._id(value)
            case _, str():
                return self._text(value)
        return value

    def _text(self, text: str) -> str:
        text = text.replace(self._namespace, "<namespace>").replace(self._root, "<root>")
        return _SNAPSHOT.sub(lambda found: f"/snapshots/{self._id(found[1])}", text)

    def _id(self, number: str) -> str:
        return self._ids.setdefault((self._snapshotter, number), f"<id {len(self._ids) + 1}>")

    def _events(self, events: list[dict[str, Any]]) -> list[Any]:
        """Events by their places; `previous` is the place of the one before on the topic."""
        sequences = [event["sequence"] for event in events]
        assert sequences == sorted(set(sequences)), sequences
        places = {sequence: place for place, sequence in enumerate(sequences, 1)}
        return [
            {
                **{key: self._value(value, key) for key, value in event.items()},
                "sequence": places[event["sequence"]],
                "previous": places.get(event["previous"], "<before>" if event["previous"] else 0),
            }
            for event in events
        ]


def _as_a_whole(outcome: dict[str, Any]) -> Any:
    """A batch that was refused as a whole is told once, or by each of its calls."""
    match outcome:
        case {"ok": {"results": [{"error": error}, *others]}} if all(other == {"error": error} for other in others):
            return {"error": error}
    return outcome
