"""Any text as a configuration file: a configuration with every value within bounds, or an error that names the file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import msgspec

import snapbroker_containerd.config
from broker.config import BYTES_MAX, NAME_CHARACTERS, Config, load
from snapbroker.errors import InvalidArgument
from tests.fuzz.draws import Draws
from tests.fuzz.vectors import REPOSITORY

_LINES: Final = (
    'root = "/r"', 'runtime = "/r"', 'endpoint = "ipc:///r/a"', 'endpoint = "tcp://127.0.0.1:5555"',
    'events_endpoint = "tcp://localhost:*"', "socket_mode = 0o660", 'log_level = "debug"', 'log_format = "json"',
    "[router]", "open_requests_max = 5", "[publisher]", "heartbeat_ms = 100", "[supervisor]",
    "backoff_initial_ms = 1", "[snapshotters.a]", "[snapshotters.memory]", 'backend = "memory"', 'backend = "native"',
    'backend = "overlayfs"', 'metadata = "/m"', "[snapshotters.memory.limits.pool]", "pool_min = 0", "pool_max = 9",
    "[snapshotters.memory.limits.service]", "timeout_max_ms = 3", "[snapshotters.memory.limits.store]",
    "map_max_bytes = 1099511627776", "[snapshotters.memory.options]", "[snapshotters.native.options]",
    "snapshotters = 3", "options = {}", "limits = 1", "layers_max = 3", "insecure_tcp = true", "[tcp]", 'keys = "/k"',
    'socket_owner = "root"', "socket_group = 7", 'socket_role = "read"',
)  # fmt: skip
_KEYS: Final = (
    "root", "runtime", "endpoint", "events_endpoint", "socket_mode", "log_level", "metadata", "backend", "options",
    "limits", "pool_min", "open_requests_max", "reserve_bytes", "workers", "hands", "layers_max", "a.b", '"c d"',
)  # fmt: skip
_VALUES: Final = (
    "0", "-1", "1e400", "nan", "inf", "true", '""', '"/"', '"a"', "[]", "{}", "1979-05-27", "07:32:00", "9" * 20,
    '"/a\\u0000b"', '"tcp://[::1]:0"', '"tcp://127.0.0.1:65536"', '"ipc://"', '"ipc://@a"', '"\\U0010ffff"',
)  # fmt: skip


@cache
def _file() -> Path:
    place = Path(tempfile.mkdtemp(prefix="snb-fuzz-"))
    return place / "config.toml"


def one(data: bytes) -> None:
    """The bytes as they are, or lines that could stand in a file."""
    draws = Draws(data)
    text = draws.rest() if draws.chance(2) else "\n".join(_lines(draws)).encode()
    file = _file()
    file.write_bytes(text)
    try:
        _check(load(file))
    except InvalidArgument as error:
        assert str(file) in error.message, f"{error.message}: no file"
    try:
        assert snapbroker_containerd.config.load(file).socket.startswith("/")
    except InvalidArgument as error:
        assert str(file) in error.message, f"{error.message}: no file"


def seeds() -> Iterator[bytes]:
    """The commented default, its lines without their comment signs, and single lines."""
    whole = (REPOSITORY / "config/snapbrokerd.toml").read_bytes()
    yield b"\x01" + whole
    for section in whole.split(b"\n\n"):
        bare = b"\n".join(line.removeprefix(b"#").removeprefix(b" ") for line in section.split(b"\n"))
        yield b"\x01" + bare
    for number in range(len(_LINES)):
        yield bytes((0, 0, number))
        yield bytes((0, 0, 14, 0, 16, 0, number))
    for key in range(len(_KEYS)):
        yield b"".join(bytes((0, 3, key, 0, value)) for value in range(1))
        for value in range(len(_VALUES)):
            yield bytes((0, 3, key, 0, value))
            yield bytes((0, 0, 15, 3, key, 0, value))
    yield b"\x01" + b"x = " + b"9" * 5000
    yield b"\x01" + b"x = " + b"[" * 3000
    yield b"\x01[snapshotters.native.options]\n" + b"a." * 2000 + b"b = 1"
    bridge = (REPOSITORY / "config/snapbroker-containerd.toml").read_bytes()
    yield b"\x01" + bridge
    yield b"\x01" + bridge.replace(b"\n# ", b"\n").replace(b"\n#", b"\n")


def _lines(draws: Draws) -> Iterator[str]:
    while draws.left:
        if not draws.chance(4):
            yield draws.choice(_LINES)
        else:
            key, literal = draws.choice(_KEYS), draws.text() if draws.chance(4) else draws.choice(_VALUES)
            yield f"{key} = {literal}"


def _check(config: Config) -> None:
    for path in (config.root, config.runtime):
        assert not path or os.path.isabs(path)
        assert "\0" not in path
    assert config.router_endpoint.startswith(("ipc://", "tcp://"))
    assert config.publisher_endpoint.startswith(("ipc://", "tcp://"))
    assert 0 <= config.socket_mode <= 0o777
    for name, section in config.snapshotters.items():
        assert name
        assert set(name) <= NAME_CHARACTERS
        _check_numbers(msgspec.to_builtins(section.limits))
    for part in (config.router, config.publisher, config.supervisor):
        _check_numbers(msgspec.to_builtins(part))


def _check_numbers(value: object) -> None:
    if isinstance(value, dict):
        for each in value.values():
            _check_numbers(each)
    else:
        assert isinstance(value, bool) or (isinstance(value, (int, float)) and 0 <= value <= BYTES_MAX), value
