"""The configuration and the stanza: what is shipped is what the types and the program say, and mistakes are told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from bridges import PROGRAM, REPLY_S

from snapbroker.errors import InvalidArgument, NotFound
from snapbroker.protocol import ActorStatus
from snapbroker_containerd import config as configuration
from snapbroker_containerd import stanza
from snapbroker_containerd.main import main
from tests.harness import Daemon

SHIPPED = Path(__file__).parents[3] / "config"
DEFAULTS = (
    ActorStatus(
        name="overlayfs",
        backend="overlayfs",
        state="ready",
        root="/var/lib/snapbroker/overlayfs",
        capabilities=("only-remap-ids", "rebase", "remap-ids"),
    ),
    ActorStatus(name="native", backend="native", state="ready", root="/var/lib/snapbroker/native"),
    ActorStatus(name="btrfs", backend="btrfs", state="ready", root="/var/lib/snapbroker/btrfs"),
)
"""What a default broker says of itself where it can run everything."""

MISTAKES = {
    "unknown-key": ('colour = "red"', "", "unknown field `colour`"),
    "unknown-limit": ("[calls]\ncall_timeout_s = 1", "calls", "unknown field `call_timeout_s`"),
    "unknown-table": ("[call]\ncall_timeout_ms = 1", "", "unknown field `call`"),
    "not-a-number": ('[calls]\nblock_infos = "many"', "calls.block_infos", "Expected `int`"),
    "a-flag": ("[server]\ncalls_max = true", "server.calls_max", "Expected `int`"),
    "not-a-text": ("listen = 3", "listen", "Expected `str`"),
    "not-a-flag": ("commit_sync = 1", "commit_sync", "Expected `bool`"),
    "zero": ("[calls]\ncall_timeout_ms = 0", "calls.call_timeout_ms", "must be 1 to"),
    "negative": ("[calls]\nwait_ms = -1", "calls.wait_ms", "must be 0 to"),
    "too-large": ("[server]\nmessage_bytes_max = 9999999999", "server.message_bytes_max", "must be 1 to"),
    "huge": ("[server]\nmessage_bytes_max = 1000000000000000000000000", "server.message_bytes_max", ""),
    "namespace": ('namespace = "a b"', "namespace", "letters and digits"),
    "no-namespace": ('namespace = ""', "namespace", "is required"),
    "mode": ("socket_mode = 0o1777", "socket_mode", "not a mode"),
    "log-level": ('log_level = "loud"', "log_level", "none of debug, info, warning, error"),
    "log-format": ('log_format = "xml"', "log_format", "none of auto, json, console"),
    "target": ('[snapshotters]\nfast = "a/b"', "snapshotters.fast", "without a '/'"),
    "no-target": ('[snapshotters]\nfast = ""', "snapshotters.fast", "1 to 64 bytes"),
    "no-name": ('[snapshotters]\n"" = "overlayfs"', "snapshotters.", "1 to 64 bytes"),
    "not-toml": ("listen", "", "not TOML"),
    "not-text": ("\udcff", "", "not TOML"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_file_key_and_reason(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, key, reason = MISTAKES[mistake]
    file = tmp_path / "bridge.toml"
    file.write_bytes(os.fsencode(content))
    assert main(["--config", str(file)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"snapbroker-containerd: {file}: {key}")
    assert reason in message
    assert message.count("\n") == 1


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(tmp_path / "none.toml")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_the_shipped_configuration_is_the_defaults() -> None:
    assert configuration.load(SHIPPED / "snapbroker-containerd.toml") == configuration.Config()


def test_what_the_shipped_configuration_names_is_the_defaults(tmp_path: Path) -> None:
    text = (SHIPPED / "snapbroker-containerd.toml").read_text().partition("#\n# [snapshotters]")[0]
    uncommented = re.sub(r"(?m)^# (\w+ = .*)$", r"\1", text)
    (tmp_path / "uncommented.toml").write_text(uncommented)
    assert configuration.load(tmp_path / "uncommented.toml") == configuration.Config()
    # Nothing is left out of it, and each key is told with the words of its type.
    told = tomllib.loads(uncommented)
    assert {**told, "snapshotters": {}} == msgspec.to_builtins(configuration.Config())
    for line in documented(Path(configuration.__file__).parent):
        assert f"# {line}" in text + "# Containerd name to snapshotter. Without any, `X` and", line


def documented(package: Path) -> Iterator[str]:
    """The documentation of every key, as the sources have it."""
    for name in ("config", "service"):
        found = re.findall(
            r'^    \w+: (?:str|int|bool) = .*\n    """(.*)"""$', (package / f"{name}.py").read_text(), re.MULTILINE
        )
        assert found
        yield from found


def test_what_is_given_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "bridge.toml"
    file.write_text('listen = "/a"\nendpoint = "ipc:///b"\n')
    loaded = configuration.load(file, listen="/c", endpoint=None)
    assert (loaded.socket, loaded.broker_endpoint) == ("/c", "ipc:///b")


# The stanza.


def test_the_shipped_stanza_is_what_is_printed() -> None:
    printed = stanza.as_toml(stanza.plugins({}, DEFAULTS, configuration.SOCKET))
    assert (SHIPPED / "containerd.toml").read_text() == printed


def test_a_stanza_is_toml() -> None:
    found = stanza.plugins({}, DEFAULTS, '/run/a socket\\with "quotes"')
    assert tomllib.loads(stanza.as_toml(found)) == {"proxy_plugins": found}
    assert found["snapbroker-overlayfs"] == {
        "type": "snapshot",
        "address": '/run/a socket\\with "quotes"',
        "capabilities": ["rebase", "remap-ids", "only-remap-ids"],
        "exports": {"root": "/var/lib/snapbroker/overlayfs"},
    }


def test_a_stanza_has_the_names_of_the_configuration() -> None:
    names = {"fast": "overlayfs", "also-fast": "overlayfs", "gone": "nobody"}
    assert list(stanza.plugins(names, DEFAULTS, "/x")) == ["also-fast", "fast"]
    with pytest.raises(NotFound):
        stanza.plugins({"gone": "nobody"}, DEFAULTS, "/x")


def test_a_name_of_containerds_own_is_not_printed() -> None:
    """containerd 1.6 ends at its start with "id already registered"."""
    with pytest.raises(InvalidArgument, match="containerd's own"):
        stanza.plugins({"native": "overlayfs"}, DEFAULTS, "/x")


def test_the_stanza_of_a_running_broker(capsys: pytest.CaptureFixture[str]) -> None:
    with Daemon({"memory": {}}) as daemon:
        arguments = ["stanza", "-e", daemon.endpoint, "--listen", "/run/x.sock"]
        assert main(arguments) == 0
        printed = tomllib.loads(capsys.readouterr().out)
        assert main([*arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == printed
        assert printed["proxy_plugins"] == {
            "snapbroker-memory": {
                "type": "snapshot",
                "address": "/run/x.sock",
                "capabilities": ["rebase"],
                "exports": {"root": str(daemon.root_of("memory"))},
            }
        }


def test_the_stanza_of_a_broker_that_is_away(tmp_path: Path) -> None:
    done = subprocess.run(
        [PROGRAM, "stanza", "-e", tmp_path / "none.sock"], capture_output=True, text=True, timeout=REPLY_S, check=False
    )
    assert (done.returncode, "start snapbrokerd" in done.stderr) == (6, True)


# What the service manager is given.


def test_the_unit_is_between_broker_and_containerd() -> None:
    unit = (SHIPPED / "snapbroker-containerd.service").read_text()
    assert "After=snapbrokerd.service\n" in unit
    assert "Before=containerd.service\n" in unit
    assert "Type=notify\n" in unit
    directory = re.search(r"^RuntimeDirectory=(.*)$", unit, re.MULTILINE)
    assert directory is not None
    assert str(Path(configuration.SOCKET).parent) == f"/run/{directory[1]}"


def test_the_versions_of_the_distributions_are_one() -> None:
    top = Path(__file__).parents[3]
    versions = {
        tomllib.loads((top / place / "pyproject.toml").read_text())["project"]["version"]
        for place in (".", "clients/python", "clients/containerd")
    }
    assert len(versions) == 1
