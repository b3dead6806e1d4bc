"""`snapbrokerd rebuild`: a snapshotter's records when its database is gone, from its ledger, a backup and the disk."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.api import Inspected, Pooled
from broker.audit import rebuild
from broker.commands.places import Place, add_names, places
from broker.store import Environment
from broker.store.ledger import NAME, changes
from snapbroker.command import words
from snapbroker.command.output import Output
from snapbroker.errors import FailedPrecondition

if TYPE_CHECKING:
    from broker.config import Config


def add(verbs: Any) -> argparse.ArgumentParser:
    """The command's arguments."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "rebuild",
        help="make the metadata of a snapshotter anew from its ledger, a backup and what is on disk",
        epilog="It says what it would do; with --yes it does it. No file of a snapshot is touched.",
    )
    add_names(parser)
    parser.add_argument("--from", dest="backup", type=Path, metavar="BACKUP", help="a backup: its file or directory")
    parser.add_argument("--yes", action="store_true", help="do it")
    parser.add_argument("--json", action="store_true", help="one object a line, and a summary for each snapshotter")
    return parser


def run(config: Config, options: argparse.Namespace) -> int:
    """Rebuild one snapshotter after the other: those named, or those that have no database."""
    chosen = places(config, options.names)
    if not options.names:
        chosen = [place for place in chosen if not place.database.exists()] or chosen
    output = Output(as_json=options.json)
    for place in chosen:
        with place.locked("rebuild its metadata"):
            _rebuild(place, options, output)
    return 0


def _rebuild(place: Place, options: argparse.Namespace, output: Output) -> None:
    if place.database.exists():
        raise FailedPrecondition(
            f"{place.name}: {place.metadata} has a database: audit it, or move that directory away to have it rebuilt"
        )
    if not issubclass(place.backend, Inspected):
        raise FailedPrecondition(f"{place.name}: its backend cannot be looked at, so there is nothing to rebuild from")
    backup = _backup_of(place, options.backup)
    if backup is None and not (place.root / NAME).is_file():
        raise FailedPrecondition(
            f"{place.name}: nothing tells what its directories are: {place.root / NAME} is not there, and no backup is "
            "named with --from"
        )
    inspector = place.backend.inspect(place.root)
    with _opened(backup, place) as environment:
        plan = rebuild.plan(inspector, changes(place.root), environment, stocked=issubclass(place.backend, Pooled))
    _tell(place, plan, output)
    if options.yes:
        rebuild.write(plan, place.metadata, place.name, place.limits.store)
    kinds = {kind: plan.kinds[kind] for kind in ("committed", "active", "view")}
    if output.as_json:
        left = {"left": len(plan.left), "kept": len(plan.kept), "unused": plan.unused, "done": options.yes}
        output.document({"snapshotter": place.name, "summary": {**kinds, **left}})
        return
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    did = "rebuilt" if options.yes else "would be rebuilt"
    output.line(f"{place.name}: {told} {did}; {len(plan.kept)} directories that nobody knows are left alone")
    if not options.yes:
        output.line("    --yes does it")


def _tell(place: Place, plan: rebuild.Plan, output: Output) -> None:
    for left in plan.left:
        if output.as_json:
            output.document({"snapshotter": place.name, "left": left.what, "why": left.why, "id": left.id})
        else:
            output.line(f"not rebuilt: {words.plain(left.what)}: {words.plain(left.why)}")


def _backup_of(place: Place, named: Path | None) -> Path | None:
    if named is None:
        return None
    file = named / f"{place.name}.mdb" if named.is_dir() else named
    if not file.is_file():
        raise FailedPrecondition(f"{place.name}: no backup at {file}")
    return file


@contextlib.contextmanager
def _opened(backup: Path | None, place: Place) -> Iterator[Environment | None]:
    """The backup as an environment: of a copy, for opening one writes beside it."""
    if backup is None:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=place.root, prefix="backup-") as directory:
        shutil.copyfile(backup, Path(directory, "data.mdb"))
        environment = Environment(Path(directory), place.limits.store)
        try:
            yield environment
        finally:
            environment.close()
