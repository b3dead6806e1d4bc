"""`snapbroker-containerd`: serve containerd, or print what its configuration needs."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from snapbroker import blocking
from snapbroker.errors import BrokerError
from snapbroker_containerd import config as configuration
from snapbroker_containerd import logs, stanza
from snapbroker_containerd.server import Bridge

if TYPE_CHECKING:
    from collections.abc import Sequence

DISTRIBUTION: Final = "snapbroker-containerd"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="snapbroker-containerd",
        description="Serves containerd as a proxy snapshotter, on top of a snapshot broker.",
        epilog="SIGTERM stops it: calls under way are finished first. SIGUSR1 logs its figures.",
    )
    top.add_argument("--version", action="version", version=f"snapbroker-containerd {metadata.version(DISTRIBUTION)}")
    add_places(top)
    verbs = top.add_subparsers(dest="verb", metavar="VERB")
    printing = verbs.add_parser("stanza", help="print the tables that containerd's configuration needs")
    add_places(printing)
    printing.add_argument("--json", action="store_true", help="one JSON document")
    return top


def add_places(to: argparse.ArgumentParser) -> None:
    """The options that say where things are; a verb's own win over those before it."""
    to.add_argument("--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="TOML configuration")
    to.add_argument(
        "--listen",
        metavar="SOCKET",
        default=argparse.SUPPRESS,
        help=f"unix socket for containerd (default {configuration.default_socket()})",
    )
    to.add_argument(
        "-e",
        "--endpoint",
        default=argparse.SUPPRESS,
        help="the broker's endpoint, or the path of its socket (default SNAPBROKER_ENDPOINT, or the broker's default)",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status is 0, or that of the error (see `snapbroker.errors`)."""
    options = parser().parse_args(arguments)
    try:
        config = configuration.load(
            getattr(options, "config", None),
            listen=getattr(options, "listen", None),
            endpoint=getattr(options, "endpoint", None),
        )
        if options.verb == "stanza":
            print_stanza(config, as_json=options.json)
        else:
            logs.configure(config.log_level, config.log_format)
            asyncio.run(Bridge(config).run())
    except BrokerError as error:
        print(f"snapbroker-containerd: {error.message}", file=sys.stderr)
        return error.exit_status
    return 0


def print_stanza(config: configuration.Config, *, as_json: bool) -> None:
    """Ask the broker what it has, and print it as containerd's configuration has it."""
    with blocking.connect(config.broker_endpoint, curve=config.curve, namespace=config.namespace) as broker:
        snapshotters = broker.status().snapshotters
    found = stanza.plugins(config.snapshotters, snapshotters, config.socket)
    sys.stdout.write(json.dumps({"proxy_plugins": found}, indent=2) + "\n" if as_json else stanza.as_toml(found))


if __name__ == "__main__":
    sys.exit(main())
