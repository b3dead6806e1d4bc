"""The command line: options, verbs and their arguments."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from snapbroker.command.failures import epilog
from snapbroker.contract import FENCE_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What the user asks for; SystemExit after help, version, or a mistake (status 2)."""
    parsed = _parser().parse_args(arguments)
    if parsed.verb == "run":
        # argparse leaves the `--` in what it takes as it is.
        parsed.command = parsed.command[1:] if parsed.command[:1] == ["--"] else parsed.command
        if not parsed.command:
            parsed.parser.error("a command is needed: snapbroker run --parent P -- COMMAND...")
    if parsed.verb == "audit" and parsed.yes and not parsed.repair:
        parsed.parser.error("--yes goes with --repair")
    if parsed.verb == "rm" and parsed.fence and len(parsed.keys) > 1:
        parsed.parser.error("--fence is that of one snapshot: name one KEY")
    return parsed


def label(text: str) -> tuple[str, str]:
    """`k=v` as a pair; the value may be empty, the key may not."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form k=v")
    return key, value


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _sequence(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a sequence number")
    return int(text)


def _fence(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= FENCE_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fencing number")
    return int(text)


class _Version(argparse.Action):
    """`--version`, which reads the distribution's metadata only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        sys.stdout.write(f"snapbroker {version('snapbroker')}\n")
        parser.exit()


def _common(*, first: bool) -> argparse.ArgumentParser:
    """The options that may stand before the verb (`first`, with their defaults) or after it."""
    parser = argparse.ArgumentParser(add_help=False)
    options = parser.add_argument_group("connection and output")

    def add(*names: str, default: object, **settings: Any) -> None:
        options.add_argument(*names, default=default if first else argparse.SUPPRESS, **settings)

    add("-e", "--endpoint", default=None, help="the broker's socket (a path or ipc://, tcp://)")
    add("--client-key", default=None, metavar="FILE", help="this client's key, for a broker behind tcp")
    add("--server-key", default=None, metavar="KEY", help="the broker's public key, or the file that has it")
    add("-n", "--namespace", default=None, help="whose snapshots are meant (default: default)")
    add("-s", "--snapshotter", default=None, help="which snapshotter (default: the broker's only one)")
    add("--json", default=False, action="store_true", help="print one JSON document; events: one a line")
    add("--timeout", default=None, type=_seconds, metavar="S", help="how long a call may take, in seconds")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="snapbroker",
        description="Prepare, mount, commit and watch the snapshots of a snapbrokerd.",
        parents=[_common(first=True)],
        epilog=epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    _Verbs(parser).add_all()
    return parser


class _Verbs:
    """The verbs, each a parser of its own."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
        self._common = _common(first=False)

    def add_all(self) -> None:
        """In the order of a snapshot's life."""
        self._creating()
        self._reading()
        self._mounting()
        self._watching()
        self._running()

    def _verb(self, name: str, meaning: str) -> argparse.ArgumentParser:
        parser = self._parsers.add_parser(
            name,
            help=meaning,
            description=f"{meaning[0].upper()}{meaning[1:]}.",
            parents=[self._common],
            allow_abbrev=False,
        )
        parser.set_defaults(parser=parser)
        return parser

    @staticmethod
    def _labels(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--label",
            dest="labels",
            metavar="k=v",
            type=label,
            action="append",
            default=[],
            help="a label; may be repeated",
        )

    @staticmethod
    def _fenced(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--fence",
            metavar="N",
            type=_fence,
            default=0,
            help="refuse where KEY is not the snapshot with this fencing number (prepare --json)",
        )

    def _creating(self) -> None:
        for name, meaning in (
            ("prepare", "create a writable snapshot and print its mounts"),
            ("view", "create a read-only snapshot and print its mounts"),
        ):
            parser = self._verb(name, meaning)
            parser.add_argument("key", metavar="KEY")
            parser.add_argument("parent", metavar="PARENT", nargs="?", default="", help="a committed snapshot")
            self._labels(parser)
        parser = self._verb("commit", "turn the active KEY into the committed NAME")
        parser.add_argument("name", metavar="NAME")
        parser.add_argument("key", metavar="KEY")
        parser.add_argument("--sync", action="store_true", help="the files are durable before the name exists")
        parser.add_argument("--parent", metavar="P", default="", help="the parent of one prepared without (rebase)")
        self._labels(parser)
        self._fenced(parser)
        parser = self._verb("rm", "remove snapshots that have no children")
        parser.add_argument("keys", metavar="KEY", nargs="+")
        self._fenced(parser)

    def _reading(self) -> None:
        parser = self._verb("stat", "show what is known of a snapshot")
        parser.add_argument("key", metavar="KEY")
        parser = self._verb("label", "set labels, and delete those without a value")
        parser.add_argument("key", metavar="KEY")
        parser.add_argument("labels", metavar="k=v", type=label, nargs="+", help="k= deletes")
        parser = self._verb("usage", "show what snapshots take beyond their parents")
        parser.add_argument("keys", metavar="KEY", nargs="*", help="all, where none is named")
        parser = self._verb("ls", "list snapshots")
        parser.add_argument("filters", metavar="FILTER", nargs="*", help="such as kind==active,parent~=base")
        self._verb("tree", "show which snapshot lies on which")

    def _mounting(self) -> None:
        parser = self._verb("mounts", "print the mounts of a snapshot")
        parser.add_argument("key", metavar="KEY")
        self._fenced(parser)
        parser = self._verb("mount", "mount a snapshot")
        parser.add_argument("key", metavar="KEY")
        parser.add_argument("target", metavar="TARGET", help="a directory")
        parser = self._verb("unmount", "unmount what is mounted on a directory")
        parser.add_argument("target", metavar="TARGET")
        parser.add_argument("-r", "--recursive", action="store_true", help="and first what is mounted on or below it")
        parser.add_argument("-l", "--lazy", action="store_true", help="at once, even while it is in use")

    def _watching(self) -> None:
        parser = self._verb("events", "print the kept events, or follow them")
        parser.add_argument("topics", metavar="TOPIC", nargs="*", help="a prefix such as SNAPSHOTTER/NAMESPACE/")
        parser.add_argument("--since", type=_sequence, metavar="N", help="events above this sequence")
        parser.add_argument("-f", "--follow", action="store_true", help="go on; without --since from here on")
        parser = self._verb("why", "show what keeps a snapshot, or what became of it")
        parser.add_argument("key", metavar="KEY")
        parser = self._verb("audit", "hold records, journal and directories of a snapshotter against each other")
        parser.add_argument("--repair", action="store_true", help="say what a repair would do; with --yes, do it")
        parser.add_argument("--yes", action="store_true", help="with --repair: do it")
        self._verb("cleanup", "wait until everything removed is deleted from disk")
        self._verb("status", "show how the broker and its snapshotters are")

    def _running(self) -> None:
        parser = self._verb("run", "run a command in a fresh workspace, commit on success, discard on failure")
        parser.add_argument("--parent", metavar="P", default="", help="a committed snapshot; else an empty one")
        parser.add_argument("--commit", metavar="NAME", help="commit as NAME when the command ends with 0")
        parser.add_argument("--sync", action="store_true", help="the files are durable before the name exists")
        self._labels(parser)
        parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="after a --")
