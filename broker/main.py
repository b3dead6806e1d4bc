"""`snapbrokerd`: serve, say what this machine supports, check a configuration, or look after a root."""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from backends import failpoints
from broker import config as configuration
from broker import keys, logs, loop, privileges
from broker.access import ROLES
from broker.commands import audit, backup, rebuild
from broker.server import Finding, Server, examine, privileges_of, version
from snapbroker.errors import BrokerError

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logs.get_logger()

COMMANDS = {"audit": audit, "backup": backup, "rebuild": rebuild}
"""Those that work on a root instead of serving it."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="snapbrokerd",
        description="The snapshot broker's daemon. Without a configuration it starts every snapshotter that this "
        "machine supports.",
        epilog="Stop it with SIGTERM: what was accepted is finished first.",
    )
    top.add_argument("--version", action="version", version=f"snapbrokerd {version()}")
    add_places(top)
    verbs = top.add_subparsers(dest="verb", metavar="VERB")
    doctor = verbs.add_parser("doctor", help="say what this machine supports, and why not")
    add_places(doctor)
    doctor.add_argument("--json", action="store_true", help="one JSON document")
    for command in COMMANDS.values():
        add_places(command.add(verbs))
    check = verbs.add_parser("check-config", help="check a configuration file and exit")
    check.add_argument("file", type=Path, metavar="FILE")
    add_keys(verbs.add_parser("keys", help="make, list and revoke the keys of clients over tcp"))
    return top


def add_keys(parser: argparse.ArgumentParser) -> None:
    """The verbs of the key directory."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    new = actions.add_parser("new", help="make a client's key, and the broker's own at the first time")
    new.add_argument("name", metavar="NAME")
    new.add_argument("--role", choices=ROLES, default="read", help="what it may do (default read)")
    new.add_argument(
        "--namespace", dest="namespaces", metavar="N", action="append",
        help="whose snapshots and events it may use, '*' for all; may be repeated (default: default)",
    )  # fmt: skip
    new.add_argument(
        "--snapshotter", dest="snapshotters", metavar="S", action="append",
        help="which snapshotters it may use; may be repeated (default: all)",
    )  # fmt: skip
    listing = actions.add_parser("list", help="show who has a key, and which files are not in order")
    listing.add_argument("--json", action="store_true", help="one JSON document")
    revoke = actions.add_parser("revoke", help="take a client's key away; running brokers notice within a second")
    revoke.add_argument("name", metavar="NAME")
    for action in (new, listing, revoke):
        action.add_argument(
            "--directory", type=Path, metavar="DIR",
            help=f"the key directory (default that of --config, else {configuration.default_keys()})",
        )  # fmt: skip
        action.add_argument("--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="TOML configuration")


def add_places(to: argparse.ArgumentParser) -> None:
    """The options that say where things are; a verb's own win over those before it."""
    to.add_argument("--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="TOML configuration")
    to.add_argument(
        "--root",
        metavar="DIR",
        default=argparse.SUPPRESS,
        help=f"snapshots (default {configuration.default_root()})",
    )
    to.add_argument(
        "--runtime",
        metavar="DIR",
        default=argparse.SUPPRESS,
        help=f"sockets router.sock and events.sock (default {configuration.default_runtime()})",
    )
    to.add_argument(
        "--insecure-tcp",
        action="store_true",
        default=argparse.SUPPRESS,
        help="let the configuration's endpoints be tcp without keys, on loopback",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status is 0, or that of the error (see `snapbroker.errors`)."""
    options = parser().parse_args(arguments)
    try:
        if options.verb == "check-config":
            configuration.load(options.file, insecure_tcp=getattr(options, "insecure_tcp", False))
            print(f"{options.file}: good")
            return 0
        if options.verb == "keys":
            return tend_keys(options)
        config = settings(options)
        if options.verb == "doctor":
            return doctor(config, as_json=options.json)
        if options.verb in COMMANDS:
            status: int = COMMANDS[options.verb].run(config, options)
            return status
        return serve(config)
    except BrokerError as error:
        print(f"snapbrokerd: {error.message}", file=sys.stderr)
        return error.exit_status


def settings(options: argparse.Namespace) -> configuration.Config:
    """The file's configuration with the command line's places over it."""
    config = configuration.load(getattr(options, "config", None), insecure_tcp=getattr(options, "insecure_tcp", False))
    places = {key: getattr(options, key) for key in ("root", "runtime") if hasattr(options, key)}
    config = msgspec.structs.replace(config, **{key: str(Path(value).absolute()) for key, value in places.items()})
    configuration.check(config, str(getattr(options, "config", "command line")))
    return config


def tend_keys(options: argparse.Namespace) -> int:
    """Make, list or revoke keys. A secret key is only ever written to its file."""
    directory = (options.directory or configuration.load(getattr(options, "config", None)).keys_path).absolute()
    if options.action == "new":
        namespaces = tuple(dict.fromkeys(options.namespaces or ("default",)))
        snapshotters = tuple(dict.fromkeys(options.snapshotters or (keys.ALL,)))
        ours, theirs = keys.make(directory, options.name, options.role, namespaces, snapshotters)
        print(f"{ours}: {options.name} may {options.role}, namespaces {', '.join(namespaces)}")
        print(f"{theirs}: its secret key: move it to the client, and set SNAPBROKER_CLIENT_KEY to its path there")
        return 0
    if options.action == "revoke":
        for path in keys.revoke(directory, options.name):
            print(f"{path}: removed")
        return 0
    keys.check_directory(directory)
    listing = keys.read_directory(directory)
    rows = [
        {
            "name": entry.name,
            "role": entry.grant.role.name.lower(),
            "namespaces": list(entry.grant.namespaces or ()) if entry.grant.namespaces is not None else [keys.ALL],
            "snapshotters": list(entry.grant.snapshotters or ())
            if entry.grant.snapshotters is not None
            else [keys.ALL],
            "public_key": entry.grant.key,
        }
        for entry in sorted(listing.entries.values(), key=lambda entry: entry.name)
    ]
    if options.json:
        print(msgspec.json.encode({"directory": str(directory), "keys": rows, "bad": listing.bad}).decode())
    else:
        for row in rows:
            print(f"{row['name']}  {row['role']}  namespaces {', '.join(row['namespaces']) or 'none'}  "
                  f"snapshotters {', '.join(row['snapshotters']) or 'none'}  {row['public_key']}")  # fmt: skip
        for reason in listing.bad.values():
            print(f"not in order: {reason}", file=sys.stderr)
    return 1 if listing.bad else 0


def doctor(config: configuration.Config, *, as_json: bool) -> int:
    """Print what was found; 0 when at least one snapshotter can run."""
    findings = examine(config)
    if as_json:
        rows = [
            {
                "name": f.name,
                "backend": f.backend,
                "root": f.root,
                "ok": f.ok,
                "missing": f.missing,
                "notes": f.notes,
            }
            for f in findings
        ]
        print(msgspec.json.encode(rows).decode())
    else:
        for finding in findings:
            print(f"{finding.name}: {'works' if finding.ok else 'does not work'} at {finding.root}")
            for line in (*finding.missing, *finding.notes):
                print(f"    {line}")
    return 0 if any(finding.ok for finding in findings) else 1


def serve(config: configuration.Config) -> int:
    """Serve until a signal."""
    logs.configure(config.log_level, config.log_format)
    raise_file_limit()
    if armed := failpoints.requested():
        log.warning(
            "FAIL POINTS ARE ARMED: this daemon breaks on purpose", directory=str(armed), variable=failpoints.VARIABLE
        )
    findings = examine(config)
    usable: list[Finding] = []
    for finding in findings:
        if finding.ok:
            usable.append(finding)
        else:
            log.warning("a snapshotter is left out", snapshotter=finding.name, missing=list(finding.missing))
    if not usable:
        print("snapbrokerd: no snapshotter can run here: `snapbrokerd doctor` says why", file=sys.stderr)
        return 5
    privileges.keep(privileges_of(usable))
    server = Server(config, usable)
    privileges.rest()
    loop.run(server.run)
    return 0


def raise_file_limit() -> None:
    """Every client takes descriptors, and libzmq ends the process when there are none left: use all we may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log.info("descriptors", limit=hard)


if __name__ == "__main__":
    sys.exit(main())
