"""Every kind of finding: how bad it is, what to do, and what a repair does about it."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from snapbroker.protocol import Finding

NOTE: Final = "note"
WARNING: Final = "warning"
ERROR: Final = "error"


class Kind(NamedTuple):
    """`repair` is empty where a repair leaves it alone."""

    severity: str
    advice: str
    repair: str = ""


KINDS: Final[dict[str, Kind]] = {
    # Records.
    "damaged-record": Kind(
        ERROR,
        "look for the reason in the disk or the memory; repair takes the record away, or puts it back from the ledger",
        "put it back from the ledger where that has it, else remove it and tell subscribers",
    ),
    "missing-files": Kind(
        ERROR,
        "if a filesystem was not mounted, mount it and restart; else repair marks it broken, then remove it",
        "mark it broken",
    ),
    "broken": Kind(
        WARNING, "bring its files back and restart the snapshotter, or remove it: `snapbroker rm`, children first"
    ),
    "whole-again": Kind(NOTE, "the next start of the snapshotter sees it too", "take the mark away"),
    "missing-parent": Kind(
        ERROR, "nothing can be mounted of it: repair marks it broken, then remove it", "mark it broken"
    ),
    "parent-not-committed": Kind(
        ERROR, "nothing can be mounted of it: repair marks it broken, then remove it", "mark it broken"
    ),
    "wrong-parent": Kind(
        ERROR, "its parent was replaced by another: repair marks it broken, then remove it", "mark it broken"
    ),
    "wrong-depth": Kind(WARNING, "let repair count its layers again", "write the right depth"),
    "shared-id": Kind(ERROR, "two records speak of the same files: stop, back up the root, and remove one of them"),
    "unreadable": Kind(ERROR, "see what the system says of the path: dmesg, permissions, the disk"),
    # Indexes.
    "missing-child": Kind(ERROR, "the parent could be removed below it: let repair write the entry", "write the entry"),
    "stray-child": Kind(WARNING, "the parent cannot be removed: let repair delete the entry", "delete the entry"),
    "missing-reference": Kind(
        WARNING, "containerd does not find the layer, and unpacks it again: let repair write the entry",
        "write the entry",
    ),
    "stray-reference": Kind(WARNING, "let repair delete the entry", "delete the entry"),
    "missing-database": Kind(
        ERROR, "if a filesystem was not mounted, mount it; else `snapbrokerd rebuild` makes it from what is left"
    ),
    # Directories.
    "leftover": Kind(
        WARNING, "no record speaks of it: the next start discards it, or repair", "put it into the trash"
    ),
    "stocked": Kind(NOTE, "the next start discards them and makes others"),
    "unknown-directory": Kind(
        NOTE, "it was there when the database was rebuilt: look at it, and delete it by hand when nobody needs it"
    ),
    "id-above": Kind(
        ERROR,
        "the database is older than the directory, or somebody put it there: a snapshot to come would collide with it; "
        "let repair reserve its id, then look at it",
        "reserve its id, and leave the directory alone",
    ),
    "stranger": Kind(NOTE, "snapbroker did not make it and leaves it alone: move it elsewhere"),
    "mode": Kind(WARNING, "others may look into snapshots: let repair set mode and owner", "set mode and owner"),
    "missing-place": Kind(ERROR, "mount the filesystem that belongs there, or start the snapshotter, which makes it"),
    "trash": Kind(NOTE, "it is deleted in the background: `snapbroker cleanup` waits for it"),
    "trash-stuck": Kind(
        WARNING, "the log says what cannot be deleted and why, such as a mount inside; then `snapbroker cleanup`"
    ),
    "mount": Kind(WARNING, "no record is there any more for what is mounted: unmount it"),
    # The journal.
    "journal-gap": Kind(
        ERROR, "subscribers would miss what is not there: repair cuts the journal, so that they walk again", "cut it"
    ),
    "damaged-event": Kind(
        ERROR, "subscribers cannot read it: repair cuts the journal behind it, so that they walk again", "cut it"
    ),
    "journal-chain": Kind(
        ERROR, "subscribers see a gap that is none, or none where one is: repair cuts the journal behind it", "cut it"
    ),
    "journal-topic": Kind(
        ERROR, "the next event of the topic would break its chain: let repair write the right sequence",
        "write the right sequence",
    ),
    "journal-state": Kind(
        ERROR,
        "mirrors believe the journal, callers the record: let repair write an event that tells what the record says",
        "write an event that tells the record's state",
    ),
    "wrong-fence": Kind(
        ERROR, "a worker thought dead may not be told from its successor: let repair give it a new fence",
        "give it a new fence, that of an update event",
    ),
    "unchecked": Kind(NOTE, "too much of the journal is half way between two states: audit again in a quiet hour"),
}  # fmt: skip


def finding(kind: str, message: str, **about: Any) -> Finding:
    """A finding of a kind that is in the table."""
    known = KINDS[kind]
    return Finding(
        kind=kind, severity=known.severity, message=message, advice=known.advice, repair=known.repair, **about
    )
