"""What was measured, against what, and what is asked of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.services import OURS, PEER, Sample


@dataclass(frozen=True)
class Target:
    """What the ratio to the baseline, or an `absolute` value, has to be."""

    at_least: float | None = None
    at_most: float | None = None
    aim: float | None = None
    absolute: bool = False

    def met(self, value: float) -> bool:
        """Whether the value is good enough; the aim is more than that."""
        if self.at_least is not None and value < self.at_least:
            return False
        return self.at_most is None or value <= self.at_most

    def __str__(self) -> str:
        bound = f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"
        return bound if self.aim is None else f"{bound} (aim {self.aim:g})"


TARGETS: dict[tuple[str, str, str, str], Target] = {
    ("prepare", "overlayfs", "64 callers", "calls/s"): Target(at_least=10, aim=20),
    ("prepare + commit + remove", "overlayfs", "64 callers", "calls/s"): Target(at_least=10, aim=20),
    ("prepare", "overlayfs", "1 caller", "ms, median"): Target(at_most=0.5),
    ("prepare", "native", "64 callers", "calls/s"): Target(at_least=5),
    ("prepare", "btrfs", "64 callers", "calls/s"): Target(at_least=2),
    ("prepare + commit + remove", "btrfs", "64 callers", "calls/s"): Target(at_least=2, aim=4),
    ("stat", "overlayfs", "64 callers", "calls/s"): Target(at_least=3, aim=5),
    ("mounts", "overlayfs", "64 callers", "calls/s"): Target(at_least=3, aim=5),
    ("stat, one blocking Python caller", "overlayfs", "1 caller", "ms, median"): Target(at_most=1, aim=0.7),
    ("walk", "overlayfs", "1 caller", "ms, median"): Target(at_most=0.2),
}
"""Work, backend, where, unit: what the ratio to containerd has to be."""


@dataclass(frozen=True)
class Figure:
    """One row: what `subject` did in every round, and what `baseline` did in the same rounds."""

    work: str
    backend: str
    at: str
    unit: str
    values: tuple[float, ...]
    against: tuple[float, ...] = ()
    subject: str = OURS
    baseline: str = PEER
    target: Target | None = None
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Everything that the callers printed, by side."""

    @property
    def value(self) -> float | None:
        """The median of the subject's rounds."""
        return statistics.median(self.values) if self.values else None

    @property
    def reference(self) -> float | None:
        """The median of the baseline's rounds."""
        return statistics.median(self.against) if self.against else None

    @property
    def ratio(self) -> float | None:
        """The subject's median as a multiple of the baseline's."""
        if self.value is None or not self.reference:
            return None
        return self.value / self.reference

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is no target or no value."""
        judged = self.value if self.target is not None and self.target.absolute else self.ratio
        return None if self.target is None or judged is None else self.target.met(judged)

    def document(self) -> dict[str, Any]:
        """The row for the JSON file."""
        return {
            **{name: getattr(self, name) for name in ("work", "backend", "at", "unit", "subject", "baseline")},
            "value": self.value, "reference": self.reference, "ratio": self.ratio,
            "target": str(self.target) if self.target else None, "met": self.met,
            "rounds": list(self.values), "reference_rounds": list(self.against), "samples": self.samples,
        }  # fmt: skip


def compare(
    work: str, backend: str, at: str, samples: dict[str, list[Sample]], *, unit: str = "calls/s", take: str = "rate"
) -> Figure:
    """Our broker against containerd: `take` names the field of the samples that the row shows."""
    return Figure(
        work, backend, at, unit, _values(samples.get(OURS, ()), take), _values(samples.get(PEER, ()), take),
        target=TARGETS.get((work, backend, at, unit)),
        samples={side: [asdict(sample) for sample in taken] for side, taken in samples.items()},
    )  # fmt: skip


def _values(samples: Sequence[Sample], take: str) -> tuple[float, ...]:
    return tuple(getattr(sample, take) for sample in samples)


def callers(count: int) -> str:
    """How the column says it."""
    return "1 caller" if count == 1 else f"{count} callers"
