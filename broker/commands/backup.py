"""`snapbrokerd backup`: a copy of the metadata of a daemon that may be running."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.syscalls import rename_noreplace
from broker.commands.places import Place, add_names, places
from broker.store.environment import copy_database
from snapbroker.command import words
from snapbroker.command.output import Output
from snapbroker.errors import AlreadyExists, FailedPrecondition

if TYPE_CHECKING:
    from broker.config import Config


def add(verbs: Any) -> argparse.ArgumentParser:
    """The command's arguments."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "backup",
        help="copy the metadata of every snapshotter, which may be serving, to a directory",
        epilog="One file a snapshotter, DEST/NAME.mdb; one that exists is not overwritten. The files of snapshots are "
        "not in it. Restore it with `snapbrokerd rebuild --from DEST`, never by putting the file in place.",
    )
    parser.add_argument("dest", type=Path, metavar="DEST", help="a directory, made where it is missing")
    add_names(parser)
    parser.add_argument("--compact", action="store_true", help="leave free pages out: smaller, and takes longer")
    parser.add_argument("--json", action="store_true", help="one object a line")
    return parser


def run(config: Config, options: argparse.Namespace) -> int:
    """Copy one after the other; nothing is copied where one of the files is there already."""
    chosen = places(config, options.names)
    for place in chosen:
        file = _file(options.dest, place)
        if file.exists():
            raise AlreadyExists(f"{file} exists and is not overwritten: choose another DEST, or move it away")
        if not place.database.is_file():
            raise FailedPrecondition(
                f"{place.name}: {place.database} is not there: name the root with --root or --config"
            )
    output = Output(as_json=options.json)
    try:
        options.dest.mkdir(mode=0o700, parents=True, exist_ok=True)
        for place in chosen:
            _copy(place, options.dest, compact=options.compact)
            size = _file(options.dest, place).stat().st_size
            if output.as_json:
                output.document({"snapshotter": place.name, "file": str(_file(options.dest, place)), "size": size})
            else:
                output.line(f"{place.name}: {_file(options.dest, place)}, {words.size(size)}")
    except OSError as error:
        raise FailedPrecondition(f"{error.filename or options.dest}: {error.strerror}: choose another DEST") from None
    if not output.as_json:
        output.line(f"to restore: stop snapbrokerd, move the metadata away, snapbrokerd rebuild --from {options.dest}")
    return 0


def _file(directory: Path, place: Place) -> Path:
    return directory / f"{place.name}.mdb"


def _copy(place: Place, directory: Path, *, compact: bool) -> None:
    """Copy beside the file's place, flush, and put it there."""
    part = directory / f".{place.name}.mdb.{os.getpid()}"
    held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        copy_database(place.metadata, fd, compact=compact)
        os.fsync(fd)
        try:
            rename_noreplace(part.name, _file(directory, place).name, held, held)
        except FileExistsError:
            raise AlreadyExists(f"{_file(directory, place)} exists and is not overwritten") from None
        os.fsync(held)
    finally:
        os.close(fd)
        os.close(held)
        part.unlink(missing_ok=True)
