"""The results as a table for people, JSON for programs, and a plot for the documentation."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure
from benchmarks.services import OURS, PEER

TABLE_BEGIN = "<!-- figures: written by `make bench` -->"
TABLE_END = "<!-- end of figures -->"

COLUMNS = ("work", "snapshotter", "at", "unit", "measured", "against", "ratio", "target", "met")


def number(value: float | None) -> str:
    """Three significant digits, with thousands separated."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def row(figure: Figure) -> tuple[str, ...]:
    """The cells of one figure."""
    subject = "" if figure.subject == OURS else f"{figure.subject} "
    against = f"{figure.baseline} {number(figure.reference)}" if figure.baseline else "-"
    ratio = f"{figure.ratio:.2f}" if figure.ratio is not None else "-"
    met = {True: "yes", False: "NO", None: ""}[figure.met]
    return (
        figure.work, figure.backend, figure.at, figure.unit, f"{subject}{number(figure.value)}", against, ratio,
        str(figure.target or ""), met,
    )  # fmt: skip


def table(figures: Sequence[Figure]) -> str:
    """A Markdown table, its columns aligned so that it also reads well on a terminal."""
    rows = [COLUMNS, *(row(figure) for figure in figures)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |" for cells in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def machine(facts: dict[str, Any]) -> str:
    """The machine in one line."""
    return (
        f"{facts['cores']} cores ({facts['processor']}), {facts['memory_gib']} GiB, kernel {facts['kernel']}, "
        f"{facts['filesystem']} with {facts['fdatasync_4k_ms']} ms for an fdatasync of 4 KiB, load average "
        f"{facts['load_average']:.1f} at the start; Python {facts['python']}, "
        f"containerd {facts['containerd']}, {facts['go']}"
    )


def document(facts: dict[str, Any], options: dict[str, Any], figures: Sequence[Figure], seconds: float) -> str:
    """Everything as JSON."""
    return json.dumps(
        {
            "machine": facts,
            "options": options,
            "seconds": round(seconds),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "figures": [figure.document() for figure in figures],
        },
        indent=1,
    )


def refresh(page: Path, facts: dict[str, Any], figures: Sequence[Figure]) -> None:
    """Write the table and the machine into a page, between its two marks."""
    text = page.read_text()
    head, begin, rest = text.partition(TABLE_BEGIN)
    _, end, tail = rest.partition(TABLE_END)
    if not begin or not end:
        raise ValueError(f"{page} has no lines {TABLE_BEGIN!r} and {TABLE_END!r}")
    page.write_text(f"{head}{begin}\n\nMeasured {facts['date']}: {machine(facts)}.\n\n{table(figures)}\n\n{end}{tail}")


COLOURS = {PEER: "#8c8c8c", OURS: "#1b6ca8"}
WORKS = ("prepare", "prepare + commit + remove", "stat", "mounts")


def plot(figures: Sequence[Figure], path: Path) -> None:
    """Rates by number of callers, one panel a verb and snapshotter, both sides; on a logarithmic scale."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    # A file that is checked in changes only with its figures.
    mpl.rcParams["svg.hashsalt"] = "snapbroker"
    rates = [figure for figure in figures if figure.unit == "calls/s" and figure.work in WORKS]
    works = [work for work in WORKS if any(figure.work == work for figure in rates)]
    backends = list(dict.fromkeys(figure.backend for figure in rates))
    if not rates:
        return
    canvas = Canvas(figsize=(3.2 * len(works), 2.5 * len(backends)), layout="constrained")
    panels = canvas.subplots(len(backends), len(works), squeeze=False, sharey="col")
    for panel_row, backend in zip(panels, backends, strict=True):
        for panel, work in zip(panel_row, works, strict=True):
            shown = [figure for figure in rates if (figure.work, figure.backend) == (work, backend)]
            _panel(panel, shown)
            panel.set_title(f"{work}\n{backend}", fontsize=9)
    panels[0][0].legend(fontsize=8, frameon=False)
    canvas.savefig(path, metadata={"Date": None})


def _panel(panel: Any, figures: Sequence[Figure]) -> None:
    for side in (PEER, OURS):
        points = [
            (int(figure.at.split()[0]), value)
            for figure in figures
            if (value := figure.value if side == OURS else figure.reference)
        ]
        if points:
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, color=COLOURS[side], label=side)
    counts = [int(figure.at.split()[0]) for figure in figures]
    panel.set_xscale("log")
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.minorticks_off()
    panel.tick_params(labelsize=8)
    panel.set_xlabel("callers", fontsize=8)
    panel.set_ylabel("calls a second", fontsize=8)
    panel.grid(visible=True, alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
