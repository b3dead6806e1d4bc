"""A finding, and how it can be mended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from broker.audit.access import Access
from snapbroker.protocol import Finding

Mend = Callable[[Access], bool]
"""Mends what a finding is about; False where there is nothing to mend any more. It may raise."""


@dataclass(slots=True)
class Found:
    """`mend` is None where a repair leaves the matter alone."""

    finding: Finding
    mend: Mend | None = None
