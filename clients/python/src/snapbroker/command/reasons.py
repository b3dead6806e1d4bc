"""Why a snapshot is there, or is not: the answer of `why` as people read it, and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from snapbroker.command import words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snapbroker.contract import Event
    from snapbroker.protocol import WhyAnswer


def described(answer: WhyAnswer) -> dict[str, Any]:
    """All fields of the answer, and of what is in it."""
    return {
        **msgspec.structs.asdict(answer),
        "info": None if answer.info is None else msgspec.structs.asdict(answer.info),
        "mounts": [msgspec.structs.asdict(mount) for mount in answer.mounts],
        "events": [
            {**msgspec.structs.asdict(event), "info": event.info and msgspec.structs.asdict(event.info)}
            for event in answer.events
        ],
    }


def told(key: str, answer: WhyAnswer) -> Iterator[str]:
    """The lines."""
    name = words.plain(key)
    if answer.info is None:
        yield f"{name} is not there"
        yield from (f"    {words.plain(held)}" for held in answer.holds)
    else:
        broken = ", broken: its files are missing" if answer.broken else ""
        yield f"{name} is {answer.info.kind}, id {answer.id}, fence {answer.fence}{broken}"
        yield from _kept_by(answer)
    if not answer.events:
        yield f"the journal, which begins at event {answer.oldest}, does not name it"
    for event in answer.events:
        yield f"{event.sequence:>8} {words.moment(event.time)} {words.plain(_happened(key, event))}"


def _kept_by(answer: WhyAnswer) -> Iterator[str]:
    lines = [
        *(f"child {words.plain(child)}" for child in answer.children),
        *(words.plain(held) for held in answer.holds),
        *(
            f"mounted on {words.plain(mount.point)} ({mount.type}), seen by {words.plain(mount.process)} ({mount.pid})"
            for mount in answer.mounts
        ),
        *(f"found as {words.plain(reference)}" for reference in answer.references),
    ]
    more = answer.children_count - len(answer.children)
    if more > 0:
        lines.append(f"and {more} more children")
    yield from (f"    {line}" for line in lines or ["nothing keeps it: it can be removed"])


def _happened(key: str, event: Event) -> str:
    name = event.info.name if event.info else ""
    if event.verb == "commit":
        return f"committed as {name}" if event.key == key else f"committed from {event.key}"
    return {"prepare": "prepared", "view": "made as a view", "update": "its labels were set", "remove": "removed"}.get(
        event.verb, event.verb
    )
