"""The configuration as types: one TOML file, every limit named with its unit, mistakes told with file, key, reason."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Final

import msgspec

from snapbroker import endpoints
from snapbroker.contract import check_namespace
from snapbroker.errors import BrokerError, InvalidArgument
from snapbroker.keyfiles import Curve
from snapbroker.protocol import TARGET_BYTES_MAX
from snapbroker_containerd import logs, service

NUMBER_MAX: Final = 2**31 - 1
"""Largest count, size or time: what gRPC's options hold."""
SOCKET: Final = "/run/snapbroker-containerd/snapshots.sock"
"""Where root's bridge listens. The broker's own directory is taken away with the broker when that stops."""


class ServerLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits of the gRPC server."""

    message_bytes_max: int = 16 * 1024 * 1024
    """Longest message, each way; containerd's own limit (C139)."""
    calls_max: int = 4096
    """Most calls open at a time; further ones get resource_exhausted."""
    stop_grace_ms: int = 5000
    """On a stop, how long calls under way may take; then they are cut off."""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole configuration; an empty file is a complete one."""

    listen: str = ""
    """The unix socket for containerd; /run/snapbroker-containerd/snapshots.sock, or in the user's runtime directory."""
    endpoint: str = ""
    """The broker's endpoint; SNAPBROKER_ENDPOINT, or the broker's default socket."""
    client_key: str = ""
    """The key file for a broker behind tcp, as `snapbrokerd keys new` makes it; SNAPBROKER_CLIENT_KEY."""
    server_key: str = ""
    """The broker's public key, or the file that has it; SNAPBROKER_SERVER_KEY, or what the key file says."""
    namespace: str = "containerd"
    """The broker's namespace for all snapshots: containerd writes its own into their names (C72, D14)."""
    socket_mode: int = 0o600
    """Mode of the unix socket: whoever can write to it can do all that containerd can."""
    commit_sync: bool = False
    """Have every commit wait until the snapshot's files are on disk: containerd cannot ask for it itself (D12)."""
    log_level: str = "info"
    """debug, info, warning or error."""
    log_format: str = "auto"
    """json, console, or auto: console on a terminal."""
    server: ServerLimits = ServerLimits()
    calls: service.Limits = service.Limits()
    snapshotters: dict[str, str] = {}
    """Containerd name to snapshotter. Without any, `X` and `snapbroker-X` both mean the snapshotter X."""

    @property
    def socket(self) -> str:
        """The unix socket's path, absolute."""
        return os.path.abspath(self.listen or default_socket())

    @property
    def broker_endpoint(self) -> str:
        """The broker's endpoint."""
        return endpoints.router_endpoint(self.endpoint or None)

    @property
    def curve(self) -> Curve | None:
        """The keys for a broker behind tcp."""
        return endpoints.curve_for(self.client_key or None, self.broker_endpoint, None, self.server_key or None)


def default_socket() -> str:
    """Root's in /run, a user's in the runtime directory."""
    if os.geteuid() == 0:
        return SOCKET
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return os.path.join(runtime, *Path(SOCKET).parts[-2:])


def load(path: Path | None, **over: str | None) -> Config:
    """The configuration in a file, the defaults without one, `over` both what is given; InvalidArgument says why not.

    The message has file, key and reason.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_bytes().decode())
        except OSError as error:
            raise InvalidArgument(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"{path}: not TOML: {error}") from None
    source = "command line" if path is None else str(path)
    try:
        config = msgspec.convert(table, Config)
    except (msgspec.ValidationError, OverflowError) as error:
        reason, _, key = str(error).partition(" - at `$.")
        raise InvalidArgument(f"{source}: {key.rstrip('`')}: {reason}".replace(": :", ":")) from None
    config = msgspec.structs.replace(config, **{key: value for key, value in over.items() if value is not None})
    check(config, source)
    return config


def check(config: Config, source: str) -> None:
    """What types cannot say: words, names, ranges."""
    for key, words in (("log_level", tuple(logs.LEVELS)), ("log_format", logs.FORMS)):
        if getattr(config, key) not in words:
            raise InvalidArgument(f"{source}: {key}: {getattr(config, key)!r} is none of {', '.join(words)}")
    if not 0 < config.socket_mode <= 0o777:
        raise InvalidArgument(f"{source}: socket_mode: {config.socket_mode:#o} is not a mode between 0 and 0o777")
    try:
        check_namespace(config.namespace)
    except BrokerError as error:
        raise InvalidArgument(f"{source}: namespace: {error.message}") from None
    for table in ("server", "calls"):
        for key, value in msgspec.to_builtins(getattr(config, table)).items():
            lowest = 0 if key in ("wait_ms", "stop_grace_ms") else 1
            if not lowest <= value <= NUMBER_MAX:
                raise InvalidArgument(f"{source}: {table}.{key}: must be {lowest} to {NUMBER_MAX}, not {value}")
    for name, target in config.snapshotters.items():
        where = f"{source}: snapshotters.{name}"
        if not name or len(name.encode()) > TARGET_BYTES_MAX:
            raise InvalidArgument(f"{where}: a name has 1 to {TARGET_BYTES_MAX} bytes")
        try:
            endpoints.target_frame(target)
        except BrokerError as error:
            raise InvalidArgument(f"{where}: {error.message}") from None
