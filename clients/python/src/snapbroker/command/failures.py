"""Errors as the command tells them: one line that says what to do, and an exit status from the one table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from snapbroker.errors import ERRORS, BrokerError

if TYPE_CHECKING:
    from collections.abc import Mapping

_HINTS: Final[Mapping[str, str]] = {
    "not_found": "'snapbroker ls' shows what is there",
    "already_exists": "choose another, or free it with 'snapbroker rm'",
    "deadline_exceeded": "allow more with --timeout",
}
"""What a user of the command can do, where only the command knows."""

OTHER_STATUSES: Final[Mapping[int, str]] = {
    126: "run: the command cannot be executed",
    127: "run: the command was not found",
    130: "interrupted from the keyboard",
    141: "whoever read the output has gone",
}
"""Exit statuses that are not the broker's errors; `run` answers 128+n for a command ended by signal n."""


def complaint(error: BrokerError) -> str:
    """The line for stderr."""
    parts = [" ".join(error.message.split())]
    if error.code in _HINTS:
        parts.append(_HINTS[error.code])
    retry = error.details.get("retry_after_ms")
    if isinstance(retry, int | float):
        parts.append(f"repeat in {retry / 1000:g} s")
    return f"snapbroker: {error.code}: {'; '.join(parts)}"


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
        "environment: SNAPBROKER_ENDPOINT, SNAPBROKER_NAMESPACE, SNAPBROKER_SNAPSHOTTER stand for -e, -n, -s.",
    ]
    return "\n".join(lines)
