"""Errors as the command tells them: one line that says what to do, and an exit status from the one table."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from snapbroker.errors import ERRORS, BrokerError

if TYPE_CHECKING:
    from collections.abc import Mapping

_HINTS: Final = (
    ("not_found", r"(no such )?(snapshot|parent) ?\b", "'snapbroker ls' shows what is there"),
    ("already_exists", r"", "choose another, or free it with 'snapbroker rm'"),
    ("deadline_exceeded", r"", "allow more with --timeout"),
    (
        "failed_precondition",
        r"cannot remove snapshot with child",
        "'snapbroker tree' shows its children, remove them first",
    ),
    ("failed_precondition", r"parent .* is active", "commit it first"),
    ("failed_precondition", r"parent .* is view", "a view is never a parent, name a committed one"),
    ("failed_precondition", r".* has the parent .* cannot be committed on", "commit it without --parent"),
    ("failed_precondition", r"namespace is required", "give it with -n"),
)
"""What a user of the command can do, where only the command knows: code, how the message begins, advice.

The first that fits is taken; what says by itself what to do fits none.
"""

OTHER_STATUSES: Final[Mapping[int, str]] = {
    20: "audit: warnings or errors were found",
    126: "run: the command cannot be executed",
    127: "run: the command was not found",
    130: "interrupted from the keyboard",
    141: "whoever read the output has gone",
}
"""Exit statuses that are not the broker's errors; `run` answers 128+n for a command ended by signal n."""


def complaint(error: BrokerError) -> str:
    """The line for stderr."""
    parts = [" ".join(error.message.split())]
    hint = _hint(error.code, parts[0])
    if hint:
        parts.append(hint)
    retry = error.details.get("retry_after_ms")
    if isinstance(retry, int | float):
        parts.append(f"repeat in {retry / 1000:g} s")
    # Such as where the work is that could not be committed.
    parts += getattr(error, "__notes__", ())
    return f"snapbroker: {error.code}: {'; '.join(parts)}"


def _hint(code: str, message: str) -> str:
    return next((hint for each, begin, hint in _HINTS if each == code and re.match(begin, message)), "")


def statuses() -> list[tuple[int, str, str]]:
    """Exit status, code and meaning of every error, by status."""
    return sorted((error.exit_status, code, _meaning(error)) for code, error in ERRORS.items())


def _meaning(error: type[BrokerError]) -> str:
    return (error.__doc__ or "").partition("\n")[0]


def epilog() -> str:
    """The table of exit statuses for the help."""
    lines = ["exit status:", f"  {0:>3}  done"]
    lines += [f"  {status:>3}  {code}: {meaning}" for status, code, meaning in statuses()]
    lines += [f"  {status:>3}  {meaning}" for status, meaning in OTHER_STATUSES.items()]
    lines += [
        "  A wrong command line is 2 as well. 'run' answers its command's status, 128+n for signal n.",
        "",
        "environment: SNAPBROKER_ENDPOINT, SNAPBROKER_NAMESPACE, SNAPBROKER_SNAPSHOTTER stand for -e, -n, -s;",
        "  SNAPBROKER_EVENTS_ENDPOINT names the socket of the events, where it is not events.sock beside the other.",
    ]
    return "\n".join(lines)
