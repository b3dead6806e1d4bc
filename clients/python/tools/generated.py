"""Files that are generated and checked in: written, or with `--check` compared, so that they never drift."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[3]
"""The top of the repository."""


def write_or_check(folder: Path, files: Mapping[str, str], description: str | None) -> int:
    """Write `files` (name to content) into `folder`; with `--check` only compare. Answers the exit status."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="compare only; status 1 when they differ")
    if parser.parse_args().check:
        return _check(folder, files)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    for path in _strangers(folder, files):
        path.unlink()
    return 0


def _check(folder: Path, files: Mapping[str, str]) -> int:
    differing = [
        str(folder / name)
        for name, content in files.items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != content
    ]
    differing += map(str, _strangers(folder, files))
    for path in differing:
        sys.stderr.write(f"{path} is not what {Path(sys.argv[0]).name} generates: run it without --check\n")
    return 1 if differing else 0


def _strangers(folder: Path, files: Mapping[str, str]) -> list[Path]:
    """JSON files that are no longer generated."""
    return [path for path in sorted(folder.glob("*.json")) if path.name not in files]
