"""The configuration as types: one TOML file, every limit named with its unit, mistakes told with file, key, reason."""

from __future__ import annotations

import ipaddress
import os
import tomllib
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from backends import registry
from broker import places
from broker.access import ROLES
from broker.snapshotter.limits import SnapshotterLimits
from snapbroker.errors import BrokerError, InvalidArgument


class RouterLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits of the router."""

    open_requests_max: int = 8192
    """Most requests open at one snapshotter, and one client has no more than is free; beyond, resource_exhausted."""
    open_bytes_max: int = 256 * 1024 * 1024
    """Most bytes of bodies open at one snapshotter, and one client has no more than is free."""
    client_requests_max: int = 4096
    """Most requests that one client has open at one snapshotter."""
    client_bytes_max: int = 128 * 1024 * 1024
    """Most bytes of bodies that one client has open at one snapshotter."""
    window_bytes: int = 64 * 1024
    """How much of a lone client a snapshotter has in its hands, the rest waits: a thousand calls, two group commits."""
    window_shared_bytes: int = 512
    """The same while other clients call too: some four calls, a fifth of a millisecond that another one waits for."""
    send_queue_max: int = 10_000
    """Most messages waiting for one client that does not take them; beyond, its replies are dropped and counted."""


class PublisherLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits of the publisher."""

    send_queue_max: int = 100_000
    """Most events waiting for one slow subscriber; beyond, they are dropped for it: the journal has them."""
    heartbeat_ms: int = 1000
    """How often every snapshotter's newest sequences are published."""
    heartbeat_topics_max: int = 1000
    """Most topics named in a heartbeat; with more, subscribers ask the journal."""


class SupervisorLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How actors are started, watched and stopped."""

    start_timeout_ms: int = 30_000
    """Longest time from an actor's start to its first sign of being ready."""
    backoff_initial_ms: int = 100
    """Pause before the first restart of an actor that died; doubled with every further death."""
    backoff_max_ms: int = 10_000
    """Longest pause before a restart."""
    backoff_reset_ms: int = 30_000
    """An actor that lived this long starts again with the initial pause."""
    silence_max_ms: int = 30_000
    """An actor that did not report for this long hangs: it is killed and restarted."""
    progress_max_ms: int = 60_000
    """An actor that reports, but whose transactions or pool did not move for this long, hangs: it is killed too.
    Generous, since a flush of a slow disk, or one that waits for somebody's copy, may take long."""
    stop_timeout_ms: int = 4500
    """After a stop, when an actor that has not ended is killed."""


class TcpSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The remote sockets: tcp with CURVE, for those whose keys are in the key directory."""

    endpoint: str = ""
    """A second router, `tcp://ADDRESS:PORT`, for clients with a key; none by default."""
    events_endpoint: str = ""
    """A second publisher, `tcp://ADDRESS:PORT`; both or none."""
    keys: str = ""
    """The key directory; /etc/snapbroker/keys, or the user's configuration directory."""
    reread_ms: int = 1000
    """How often the key directory is looked at: a revoked key is good for so long at most."""
    handshake_ms: int = 5000
    """Longest handshake; then the connection is closed, and its descriptor free for somebody else."""


class SnapshotterSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One snapshotter: `[snapshotters.<name>]`; the name is the routing target."""

    backend: str = ""
    """Which backend; the snapshotter's own name by default."""
    root: str = ""
    """Its directory; `<root>/<name>` by default."""
    metadata: str = ""
    """Where its metadata database lies; `<its root>/metadata` by default."""
    options: dict[str, Any] = {}
    """The backend's own options."""
    limits: SnapshotterLimits = SnapshotterLimits()


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole configuration; an empty file is a complete one."""

    root: str = ""
    """Where snapshotters live; /var/lib/snapbroker, or the user's state directory."""
    runtime: str = ""
    """Where the sockets are; /run/snapbroker, or the user's runtime directory."""
    endpoint: str = ""
    """The router's endpoint; `ipc://<runtime>/router.sock` by default."""
    events_endpoint: str = ""
    """The publisher's endpoint; `ipc://<runtime>/events.sock` by default."""
    socket_mode: int = 0o600
    """Mode of the ipc sockets."""
    socket_owner: str | int = ""
    """User, by name or number, that the ipc sockets belong to; the daemon's own by default."""
    socket_group: str | int = ""
    """Group, by name or number, of the ipc sockets; the daemon's own by default. It takes a mode such as 0o660."""
    socket_role: str = "admin"
    """What who can open the ipc sockets may do: read, write or admin."""
    insecure_tcp: bool = False
    """Whether `endpoint` and `events_endpoint` may be tcp without keys, on loopback, where any local user gets in."""
    log_level: str = "info"
    """debug, info, warning or error."""
    log_format: str = "auto"
    """json, console, or auto: console on a terminal."""
    router: RouterLimits = RouterLimits()
    publisher: PublisherLimits = PublisherLimits()
    supervisor: SupervisorLimits = SupervisorLimits()
    tcp: TcpSection = TcpSection()
    snapshotters: dict[str, SnapshotterSection] = {}
    """Without any, every snapshotter that the machine supports is started."""

    @property
    def root_path(self) -> Path:
        """The root as a path."""
        return Path(self.root or default_root())

    @property
    def runtime_path(self) -> Path:
        """The runtime directory as a path."""
        return Path(self.runtime or default_runtime())

    @property
    def router_endpoint(self) -> str:
        """The router's endpoint."""
        return self.endpoint or f"ipc://{self.runtime_path}/router.sock"

    @property
    def publisher_endpoint(self) -> str:
        """The publisher's endpoint."""
        return self.events_endpoint or f"ipc://{self.runtime_path}/events.sock"

    @property
    def keys_path(self) -> Path:
        """The key directory."""
        return Path(self.tcp.keys or default_keys())


NAME_CHARACTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
NAME_CHARACTERS_MAX: Final = 64
NESTING_MAX: Final = 32
"""Most levels of tables and arrays in a file; the deepest limit is on the fifth."""
IPC_PATH_BYTES_MAX: Final = 107
"""A unix socket's path, by the kernel's structure."""


def default_root() -> str:
    """/var/lib/snapbroker, or the user's state directory when not root."""
    if os.geteuid() == 0:
        return "/var/lib/snapbroker"
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return f"{state}/snapbroker"


def default_runtime() -> str:
    """/run/snapbroker, or the user's runtime directory when not root."""
    if os.geteuid() == 0:
        return "/run/snapbroker"
    return f"{os.environ.get('XDG_RUNTIME_DIR') or f'/run/user/{os.getuid()}'}/snapbroker"


def default_keys() -> str:
    """/etc/snapbroker/keys, or the user's configuration directory when not root."""
    if os.geteuid() == 0:
        return "/etc/snapbroker/keys"
    place = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return f"{place}/snapbroker/keys"


def load(path: Path | None, *, insecure_tcp: bool = False) -> Config:
    """The configuration in a file, the defaults without one; InvalidArgument says file, key and reason.

    `insecure_tcp`: as if the file said so.
    """
    if path is None:
        return Config(insecure_tcp=insecure_tcp)
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise InvalidArgument(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        # Of a number with thousands of digits, or of thousands of brackets, the parser says so in its own words.
        raise InvalidArgument(f"{path}: not TOML: {error}") from None
    _check_nesting(table, path)
    sections = table.pop("snapshotters", {})
    if not isinstance(sections, dict):
        raise InvalidArgument(f"{path}: snapshotters: expected one table a snapshotter, [snapshotters.NAME]")
    config = _convert(table, Config, f"{path}: ")
    snapshotters = {
        name: _convert(section, SnapshotterSection, f"{path}: snapshotters.{name}", ".")
        for name, section in sections.items()
    }
    config = msgspec.structs.replace(
        config, snapshotters=snapshotters, insecure_tcp=config.insecure_tcp or insecure_tcp
    )
    check(config, str(path))
    return config


def _check_nesting(table: dict[str, Any], path: Path) -> None:
    """Dotted keys nest without end, and what looks at them level by level would not come back."""
    level: list[Any] = [table]
    for _ in range(NESTING_MAX):
        level = [
            below
            for each in level
            if isinstance(each, dict | list)
            for below in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise InvalidArgument(f"{path}: tables and arrays are nested deeper than {NESTING_MAX}")


T = TypeVar("T")


def _convert(table: object, kind: type[T], where: str, separator: str = "") -> T:
    """A table as its type; the error has the key's whole path, which msgspec does not tell of a dict's members."""
    try:
        return msgspec.convert(table, kind)
    except (msgspec.ValidationError, OverflowError) as error:
        reason, _, key = str(error).partition(" - at `$.")
        key = key.rstrip("`")
        raise InvalidArgument(f"{where}{separator if key else ''}{key}: {reason}".replace(": :", ":")) from None


def check(config: Config, source: str) -> None:
    """What types cannot say: names, ranges, places, backends and their options."""
    for key in ("root", "runtime"):
        _check_absolute(getattr(config, key), key, source)
    _check_absolute(config.tcp.keys, "tcp.keys", source)
    _check_endpoints(config, source)
    _check_tcp(config.tcp, source)
    _check_rights(config, source)
    if config.log_level not in ("debug", "info", "warning", "error"):
        raise InvalidArgument(f"{source}: log_level: {config.log_level!r} is not debug, info, warning or error")
    if config.log_format not in ("auto", "json", "console"):
        raise InvalidArgument(f"{source}: log_format: {config.log_format!r} is not auto, json or console")
    _check_numbers(msgspec.to_builtins(config), "", source)
    _check_order(config.supervisor, "backoff_initial_ms", "backoff_max_ms", "supervisor", source)
    if config.socket_mode > 0o777:
        raise InvalidArgument(f"{source}: socket_mode: {config.socket_mode:#o} is not a mode between 0 and 0o777")
    taken: dict[tuple[str, str], str] = {}
    for name, section in config.snapshotters.items():
        _check_section(name, section, source)
        root = section.root or str(config.root_path / name)
        for key, place in (("root", root), ("metadata", section.metadata or f"{root}/metadata")):
            other = taken.setdefault((key, os.path.realpath(place)), name)
            if other != name:
                raise InvalidArgument(f"{source}: snapshotters.{name}.{key}: {place} is the {key} of {other!r} already")


def _check_absolute(path: str, key: str, source: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(
            f"{source}: {key}: {os.fsencode(path)!r} is not UTF-8, and mounts are told as text"
        ) from None
    if "\0" in path:
        raise InvalidArgument(f"{source}: {key}: {path!r} has a NUL, which no path can have")
    if path and not os.path.isabs(path):
        raise InvalidArgument(f"{source}: {key}: {path!r} is not an absolute path, and mounts are told by path")


def _check_endpoints(config: Config, source: str) -> None:
    if config.router_endpoint == config.publisher_endpoint and not config.router_endpoint.endswith(":*"):
        raise InvalidArgument(
            f"{source}: events_endpoint: {config.publisher_endpoint!r} is the router's endpoint already"
        )
    for key, endpoint in (("endpoint", config.router_endpoint), ("events_endpoint", config.publisher_endpoint)):
        scheme, _, address = endpoint.partition("://")
        if scheme not in ("ipc", "tcp") or not address or "\0" in address:
            raise InvalidArgument(f"{source}: {key}: {endpoint!r} is not ipc://PATH or tcp://ADDRESS:PORT")
        if scheme == "ipc" and len(os.fsencode(address)) > IPC_PATH_BYTES_MAX:
            where = key if getattr(config, key) else "runtime"
            raise InvalidArgument(
                f"{source}: {where}: {address} has over {IPC_PATH_BYTES_MAX} bytes: choose a shorter path"
            )
        if scheme == "tcp":
            host = _check_address(endpoint, key, source)
            if not _is_loopback(host):
                raise InvalidArgument(
                    f"{source}: {key}: {endpoint!r} is not loopback: for other machines there is [tcp], with keys"
                )
            if not config.insecure_tcp:
                raise InvalidArgument(
                    f"{source}: {key}: {endpoint!r} lets every user of this machine do everything: set insecure_tcp, "
                    "or --insecure-tcp, if that is meant; [tcp] is the one with keys"
                )


def _check_address(endpoint: str, key: str, source: str) -> str:
    """The host of a tcp endpoint."""
    host, _, port = endpoint.partition("://")[2].rpartition(":")
    if not (port == "*" or (port.isascii() and port.isdecimal() and int(port) < 65536)) or not host:
        raise InvalidArgument(f"{source}: {key}: {endpoint!r} has no port: tcp://ADDRESS:PORT")
    return host


def _check_tcp(tcp: TcpSection, source: str) -> None:
    for key in ("endpoint", "events_endpoint"):
        endpoint = getattr(tcp, key)
        if bool(tcp.endpoint) != bool(tcp.events_endpoint):
            raise InvalidArgument(f"{source}: tcp.{key}: endpoint and events_endpoint are set both, or neither")
        if endpoint and not endpoint.startswith("tcp://"):
            raise InvalidArgument(f"{source}: tcp.{key}: {endpoint!r} is not tcp://ADDRESS:PORT")
        if endpoint:
            _check_address(endpoint, f"tcp.{key}", source)
    if tcp.endpoint and tcp.endpoint == tcp.events_endpoint and not tcp.endpoint.endswith(":*"):
        raise InvalidArgument(f"{source}: tcp.events_endpoint: {tcp.endpoint!r} is the router's endpoint already")


def _check_rights(config: Config, source: str) -> None:
    for key, find in (("socket_owner", places.user_id), ("socket_group", places.group_id)):
        try:
            find(getattr(config, key))
        except InvalidArgument as error:
            raise InvalidArgument(f"{source}: {key}: {error.message}") from None
    if config.socket_role not in ROLES:
        raise InvalidArgument(f"{source}: socket_role: {config.socket_role!r} is not {', '.join(ROLES)}")


def _check_order(limits: msgspec.Struct, low: str, high: str, where: str, source: str) -> None:
    if getattr(limits, low) > getattr(limits, high):
        raise InvalidArgument(
            f"{source}: {where}.{low}: {getattr(limits, low)} is above {high}, which is {getattr(limits, high)}"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _check_section(name: str, section: SnapshotterSection, source: str) -> None:
    where = f"{source}: snapshotters.{name}"
    if not 0 < len(name) <= NAME_CHARACTERS_MAX or not set(name) <= NAME_CHARACTERS or name in (".", ".."):
        raise InvalidArgument(f"{where}: a name has 1 to {NAME_CHARACTERS_MAX} letters, digits, '.', '_', '-'")
    limits = section.limits
    place = f"snapshotters.{name}.limits"
    _check_order(limits.pool, "pool_min", "pool_max", f"{place}.pool", source)
    _check_order(limits.service, "timeout_default_ms", "timeout_max_ms", f"{place}.service", source)
    _check_order(limits.store, "map_initial_bytes", "map_max_bytes", f"{place}.store", source)
    if limits.layers_max > LAYERS_MAX:
        raise InvalidArgument(f"{source}: {place}.layers_max: no kernel mounts more than {LAYERS_MAX}")
    if limits.writer.workers > WORKERS_MAX or limits.hands > WORKERS_MAX:
        raise InvalidArgument(f"{source}: {place}: workers and hands are at most {WORKERS_MAX}")
    for key in ("root", "metadata"):
        _check_absolute(getattr(section, key), f"snapshotters.{name}.{key}", source)
    try:
        kind = registry.load(section.backend or name)
    except BrokerError as error:
        raise InvalidArgument(f"{where}.backend: {error.message}") from None
    _convert(section.options, kind.Options, f"{where}.options", ".")


def _check_numbers(table: dict[str, Any], where: str, source: str) -> None:
    for key, value in table.items():
        if isinstance(value, dict) and key != "options":
            _check_numbers(value, f"{where}{key}.", source)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            lowest = 0 if key in MAY_BE_NOTHING else 1e-3
            highest = BYTES_MAX if key.endswith("bytes") or "_bytes_" in key else NUMBER_MAX
            if not lowest <= value <= highest:
                raise InvalidArgument(f"{source}: {where}{key}: must be above 0 and at most {highest}, not {value}")


MAY_BE_NOTHING: Final = frozenset(
    (
        "workers", "hands", "pool_min", "reserve_bytes", "reserve_inodes", "ballast_bytes",
        "socket_owner", "socket_group",
    )
)  # fmt: skip
"""Numbers that may be 0, which switches something off or leaves it to the backend."""
LAYERS_MAX: Final = 500
"""Most lower layers of an overlay, by the kernel."""
WORKERS_MAX: Final = 1024
"""Most threads, or processes, of an actor."""
NUMBER_MAX: Final = 2**31 - 1
"""Largest count or time: what the sockets' options hold."""
BYTES_MAX: Final = 2**46
"""Largest size: what the processor's address space holds of a map."""
