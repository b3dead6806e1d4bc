"""`snapbrokerd audit`: hold the stores of a root that nobody serves against what is on disk, and mend them."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import lmdb

from backends.api import Task
from broker.audit.auditor import Auditor
from broker.audit.kinds import finding
from broker.commands.places import Place, add_names, places
from broker.store.ledger import last_word
from snapbroker.command.findings import FOUND_STATUS, Report
from snapbroker.command.output import Output
from snapbroker.errors import Internal
from snapbroker.protocol import Progress

if TYPE_CHECKING:
    from broker.config import Config


def add(verbs: Any) -> argparse.ArgumentParser:
    """The command's arguments."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "audit",
        help="hold records, journal and directories against each other, the daemon being stopped",
        epilog=f"The exit status is {FOUND_STATUS} where warnings or errors were found, 0 where there were none, or a "
        "repair mended them all; notes do not count.",
    )
    add_names(parser)
    parser.add_argument("--repair", action="store_true", help="say what a repair would do; with --yes, do it")
    parser.add_argument("--yes", action="store_true", help="with --repair: do it")
    parser.add_argument("--json", action="store_true", help="one finding a line, and a summary for each snapshotter")
    return parser


def run(config: Config, options: argparse.Namespace) -> int:
    """Audit one snapshotter after the other."""
    if options.yes and not options.repair:
        print("snapbrokerd: --yes goes with --repair", file=sys.stderr)
        return 2
    output = Output(as_json=options.json)
    dirty = False
    for place in places(config, options.names):
        with place.locked("audit it without the daemon"):
            try:
                dirty = not _audit(place, options, output) or dirty
            except lmdb.Error as error:
                raise Internal(
                    f"{place.name}: the database cannot be read: {error}: move {place.metadata} away, and `snapbrokerd "
                    "rebuild`"
                ) from error
    return FOUND_STATUS if dirty else 0


def _audit(place: Place, options: argparse.Namespace, output: Output) -> bool:
    task = Task()
    if not place.database.is_file():
        report = Report(output, place.name, repair=options.repair, execute=options.yes)
        report.tell(finding("missing-database", f"{place.database} is not there", path=str(place.database)))
        report.summary(0)
        return False
    with place.opened() as access, output.progress(f"auditing {place.name}") as show:
        report = Report(output, place.name, repair=options.repair, execute=options.yes)
        auditor = Auditor(access, task, lambda key: last_word(place.root, key), execute=options.yes)
        for item in auditor.told():
            if item is not None:
                report.tell(item[1])
            elif show is not None:
                show(Progress(entries=task.entries, bytes=task.bytes))
        report.summary(task.entries)
    return report.clean
