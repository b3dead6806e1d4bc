"""Where results go: tables and trees for people, coloured on a terminal only, or JSON for scripts."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

    from snapbroker.protocol import Progress

Row = tuple[str, ...]


class Output:
    """One invocation's output; with `as_json` the human side stays silent and the other way round."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._terminal = sys.stdout.isatty()

    def document(self, value: Any) -> None:
        """One JSON document on a line of its own, at once."""
        # The bytes, since a name may hold what the terminal's encoding cannot.
        sys.stdout.flush()
        sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
        sys.stdout.buffer.flush()

    def line(self, text: str) -> None:
        """One line of text, at once."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def table(self, columns: Row, rows: Sequence[Row], *, right: frozenset[str] = frozenset()) -> None:
        """Rows below their columns' names; `right` are the columns of numbers."""
        if self._terminal:
            self._drawn_table(columns, rows, right)
            return
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        for row in (columns, *rows):
            cells = (
                cell.rjust(width) if name in right else cell.ljust(width)
                for cell, width, name in zip(row, widths, columns, strict=True)
            )
            sys.stdout.write("  ".join(cells).rstrip() + "\n")

    def _drawn_table(self, columns: Row, rows: Sequence[Row], right: frozenset[str]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in columns:
            # Folded, not cut: a name of which a part is missing is of no use.
            table.add_column(name, justify="right" if name in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, _STYLES.get(cell, "")) for cell in row))
        _console().print(table)

    def branch(self, guide: str, name: str, note: str) -> None:
        """One line of a tree."""
        if not self._terminal:
            sys.stdout.write(f"{guide}{name}  {note}\n")
            return
        from rich.text import Text

        text = Text.assemble((guide, "dim"), name, "  ", (note, _STYLES.get(note, "")))
        _console().print(text, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, doing: str) -> Iterator[Callable[[Progress], object] | None]:
        """A callback that shows how far a long call is; None where nobody watches."""
        if self.as_json or not sys.stderr.isatty():
            yield None
            return
        shown = _Shown(doing)
        try:
            yield shown.advance
        finally:
            shown.close()


_STYLES = {
    "active": "green",
    "view": "cyan",
    "committed": "blue",
    "ready": "green",
    "starting": "yellow",
    "unavailable": "red",
    "stopped": "red",
}


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


class _Shown:
    """A line on the terminal that appears with the first progress a call reports: a short call has none."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._status: Any = None

    def advance(self, progress: Progress) -> None:
        """Show the figures."""
        from snapbroker.command import words

        text = f"{self._doing}: {progress.entries} entries, {words.size(progress.bytes)}"
        if self._status is None:
            from rich.console import Console
            from rich.status import Status

            self._status = Status(text, console=Console(stderr=True, markup=False, highlight=False))
            self._status.start()
        else:
            self._status.update(text)

    def close(self) -> None:
        """Take the line away."""
        if self._status is not None:
            self._status.stop()
