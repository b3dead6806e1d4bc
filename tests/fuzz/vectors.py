"""The golden vectors as inputs to begin with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).parents[2]
_VECTORS: Final[dict[str, Any]] = json.loads((REPOSITORY / "clients/vectors/vectors.json").read_text())


def bodies(*types: str) -> list[bytes]:
    """Every body of these types, good and bad."""
    sections = ("messages", "tolerated", "malformed", "refused")
    return [bytes.fromhex(each["hex"]) for name in sections for each in _VECTORS[name] if each["type"] in types]


def frames(direction: str) -> list[list[bytes]]:
    """The frames of every step in this direction."""
    return [
        [bytes.fromhex(frame) for frame in step["frames"]]
        for exchange in _VECTORS["exchanges"]
        for step in exchange["steps"]
        if step["direction"] == direction
    ]


def packed(parts: list[bytes]) -> bytes:
    """Frames as `unpacked` reads them: how many, then each with its length in two bytes."""
    return bytes((len(parts),)) + b"".join(len(part).to_bytes(2, "big") + part for part in parts)
