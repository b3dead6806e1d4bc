"""How findings are told: for people in lines that say what to do, as JSON one object a line."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Final

import msgspec

from snapbroker.command import words

if TYPE_CHECKING:
    from snapbroker.command.output import Output
    from snapbroker.protocol import Finding

FOUND_STATUS: Final = 20
"""Exit status of an audit that found warnings or errors: apart from every error's own."""


class Report:
    """The findings of one snapshotter, told as they come, and their number."""

    def __init__(self, output: Output, snapshotter: str, *, repair: bool, execute: bool) -> None:
        self._output = output
        self._snapshotter = snapshotter
        self._repair = repair
        self._execute = execute
        self._open: Counter[str] = Counter()
        self._mended = 0
        self._mendable = 0

    @property
    def clean(self) -> bool:
        """Whether nothing is left but notes."""
        return not self._open["error"] and not self._open["warning"]

    def tell(self, finding: Finding) -> None:
        """Print one."""
        if finding.mended:
            self._mended += 1
        else:
            self._open[finding.severity] += 1
            self._mendable += bool(finding.repair)
        if self._output.as_json:
            age = _age_seconds(finding.time) if finding.time else None
            about = {"snapshotter": self._snapshotter, **msgspec.structs.asdict(finding), "age_seconds": age}
            self._output.document(about)
            return
        about_key = f"{finding.namespace}/{finding.key}: " if finding.key else ""
        known = [f"id {finding.id}" if finding.id else "", f"event {finding.sequence}" if finding.sequence else ""]
        if finding.time:
            known.append(f"since {words.moment(finding.time)}, {words.duration(_age_seconds(finding.time))}")
        if finding.size or finding.inodes:
            known.append(f"{words.size(finding.size)} in {finding.inodes} inodes")
        facts = ", ".join(filter(None, known))
        self._output.line(
            f"{finding.severity}: {finding.kind}: {words.plain(about_key + finding.message)}"
            + (f" ({facts})" if facts else "")
        )
        self._output.line(f"    {self._remedy(finding)}")

    def _remedy(self, finding: Finding) -> str:
        if finding.mended:
            return f"mended: {finding.repair}"
        if finding.failure:
            return f"not mended: {words.plain(finding.failure)}; {finding.advice}"
        if self._repair and finding.repair:
            return f"repair would: {finding.repair}"
        return f"to do: {finding.advice}"

    def summary(self, looked: int) -> None:
        """Print what it came to."""
        if self._output.as_json:
            counts = {severity: self._open[severity] for severity in ("error", "warning", "note")}
            self._output.document(
                {"snapshotter": self._snapshotter, "summary": {"looked": looked, "mended": self._mended, **counts}}
            )
            return
        told = [f"{self._open[each]} {each}{'s' * (self._open[each] != 1)}" for each in ("error", "warning", "note")]
        mended = f", {self._mended} mended" if self._execute else ""
        self._output.line(f"{words.plain(self._snapshotter)}: looked at {looked}: {', '.join(told)}{mended}")
        if self._mendable and not self._execute:
            how = "--repair --yes does it" if self._repair else "--repair says what a repair would do"
            self._output.line(f"    {self._mendable} can be mended: {how}")


def _age_seconds(since: int) -> float:
    return max(0, time.time_ns() - since) / 1e9
