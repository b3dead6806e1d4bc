"""The golden vectors as inputs to begin with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).parents[2]
FRAME_BYTES_MAX: Final = 65_535
"""Longest frame that `packed` has a length for; what is longer is no input to begin with."""
_VECTORS: Final[dict[str, Any]] = json.loads((REPOSITORY / "clients/vectors/vectors.json").read_text())


def bodies(*types: str) -> list[bytes]:
    """Every body of these types, good and bad, but for those that are too long."""
    sections = ("messages", "tolerated", "malformed", "refused")
    found = [bytes.fromhex(each["hex"]) for name in sections for each in _VECTORS[name] if each["type"] in types]
    return [body for body in found if len(body) <= FRAME_BYTES_MAX]


def frames(direction: str) -> list[list[bytes]]:
    """The frames of every step in this direction, but for those that are too long."""
    found = [
        [bytes.fromhex(frame) for frame in step["frames"]]
        for exchange in _VECTORS["exchanges"]
        for step in exchange["steps"]
        if step["direction"] == direction
    ]
    return [frames for frames in found if max(map(len, frames)) <= FRAME_BYTES_MAX]


def packed(parts: list[bytes]) -> bytes:
    """Frames as `unpacked` reads them: how many, then each with its length in two bytes."""
    return bytes((len(parts),)) + b"".join(len(part).to_bytes(2, "big") + part for part in parts)
