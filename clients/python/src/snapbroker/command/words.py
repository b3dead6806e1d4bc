"""Sizes, times and names as people read them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def size(count: int) -> str:
    """A number of bytes: `512 B`, `4.0 KiB`."""
    value = float(count)
    for unit in _UNITS:
        # 1023.95 would be written as 1024.0 of its unit.
        if abs(value) < 1023.95 or unit == _UNITS[-1]:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("the last unit takes everything")


def moment(nanoseconds: int) -> str:
    """Nanoseconds since the epoch as ISO 8601 in UTC, to the second; empty for 0."""
    if not nanoseconds:
        return ""
    return datetime.fromtimestamp(nanoseconds // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def duration(seconds: float) -> str:
    """`3 d 4 h`, `5 min 6 s`: the two largest units."""
    whole = int(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    while len(parts) > 1 and not parts[0][0]:
        parts.pop(0)
    return " ".join(f"{count} {unit}" for count, unit in parts[:2])


def plain(text: str) -> str:
    """The text without what a terminal would obey: a name may hold any character."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def labels(found: Mapping[str, str]) -> str:
    """`k=v k=v`."""
    return " ".join(f"{plain(key)}={plain(value)}" for key, value in sorted(found.items()))


def figures(found: Mapping[str, int]) -> str:
    """`entries 3, bytes 4.0 KiB`: what ends in `bytes` is a size."""
    return ", ".join(f"{plain(key)} {size(value) if key.endswith('bytes') else value}" for key, value in found.items())
