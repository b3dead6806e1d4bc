"""The state machine of a snapshot as one table: which verb is legal for which kind, and what comes of it.

absent --prepare--> active --commit--> committed
absent --view-----> view
any    --remove---> absent              (a committed one only without children)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from snapbroker.contract import Kind
from snapbroker.errors import AlreadyExists, BrokerError, FailedPrecondition, InvalidArgument, NotFound

ABSENT: Final = None
State = Kind | None
Outcome = Kind | None | type[BrokerError]

TRANSITIONS: Final[Mapping[tuple[State, str], Outcome]] = {
    (ABSENT, "prepare"): Kind.ACTIVE,
    (ABSENT, "view"): Kind.VIEW,
    (ABSENT, "commit"): NotFound,
    (ABSENT, "remove"): NotFound,
    (ABSENT, "mounts"): NotFound,
    (ABSENT, "stat"): NotFound,
    (ABSENT, "update"): NotFound,
    (ABSENT, "usage"): NotFound,
    (Kind.ACTIVE, "prepare"): AlreadyExists,
    (Kind.ACTIVE, "view"): AlreadyExists,
    (Kind.ACTIVE, "commit"): Kind.COMMITTED,
    (Kind.ACTIVE, "remove"): ABSENT,
    (Kind.ACTIVE, "mounts"): Kind.ACTIVE,
    (Kind.ACTIVE, "stat"): Kind.ACTIVE,
    (Kind.ACTIVE, "update"): Kind.ACTIVE,
    (Kind.ACTIVE, "usage"): Kind.ACTIVE,
    (Kind.VIEW, "prepare"): AlreadyExists,
    (Kind.VIEW, "view"): AlreadyExists,
    (Kind.VIEW, "commit"): FailedPrecondition,
    (Kind.VIEW, "remove"): ABSENT,
    (Kind.VIEW, "mounts"): Kind.VIEW,
    (Kind.VIEW, "stat"): Kind.VIEW,
    (Kind.VIEW, "update"): Kind.VIEW,
    (Kind.VIEW, "usage"): Kind.VIEW,
    (Kind.COMMITTED, "prepare"): AlreadyExists,
    (Kind.COMMITTED, "view"): AlreadyExists,
    (Kind.COMMITTED, "commit"): FailedPrecondition,
    (Kind.COMMITTED, "remove"): ABSENT,
    (Kind.COMMITTED, "mounts"): FailedPrecondition,
    (Kind.COMMITTED, "stat"): Kind.COMMITTED,
    (Kind.COMMITTED, "update"): Kind.COMMITTED,
    (Kind.COMMITTED, "usage"): Kind.COMMITTED,
}
"""(kind of the snapshot under the key, verb) to the kind after it, or to the error (C3-C7, C24, C30, C39, C55)."""

PARENT: Final[Mapping[State, type[BrokerError] | None]] = {
    ABSENT: NotFound,
    Kind.ACTIVE: InvalidArgument,
    Kind.VIEW: InvalidArgument,
    Kind.COMMITTED: None,
}
"""Kind of the parent of a prepare or view to its error, None where it may be a parent (C5, C15)."""

REBASE_PARENT: Final[Mapping[State, type[BrokerError] | None]] = {
    ABSENT: NotFound,
    Kind.ACTIVE: FailedPrecondition,
    Kind.VIEW: FailedPrecondition,
    Kind.COMMITTED: None,
}
"""The same for the parent that a commit names (C33)."""


def refusal(kind: State, verb: str, key: str) -> BrokerError | None:
    """The error of `verb` for a snapshot of this kind under `key`, or None where it is legal."""
    outcome = TRANSITIONS[kind, verb]
    if not isinstance(outcome, type):
        return None
    if kind is ABSENT:
        return outcome(f"snapshot {key!r} does not exist")
    if outcome is AlreadyExists:
        return outcome(f"snapshot {key!r} already exists ({kind})")
    if verb == "mounts":
        return outcome(f"snapshot {key!r} is {kind}, not active or view: prepare or view a child of it")
    return outcome(f"snapshot {key!r} is {kind}, not active: only an active snapshot can be committed")
