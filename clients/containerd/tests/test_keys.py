"""The bridge on a broker behind tcp: its key from the configuration or the environment, and what containerd is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from bridges import Bridge

from snapbroker.errors import InvalidArgument
from snapbroker_containerd import config as configuration
from snapbroker_containerd.main import main
from tests.access.guarded import Guarded, guarded


@pytest.fixture(scope="module")
def gate() -> Iterator[Guarded]:
    """A broker with remote sockets, and keys for two bridges."""
    with guarded("memory") as found:
        found.grant("bridge", "write", "containerd")
        found.grant("reader", "read", "containerd")
        yield found


def test_a_bridge_with_a_key(gate: Guarded, tmp_path: Path) -> None:
    key = str(gate.directory / "bridge.key")
    with Bridge(tmp_path, gate.endpoint, client_key=key) as bridge, bridge.client("memory") as client:
        client.prepare("default/1/key")
        assert client.stat("default/1/key").name == "default/1/key"


def test_a_bridge_whose_role_is_too_small(gate: Guarded, tmp_path: Path) -> None:
    environment = {"SNAPBROKER_CLIENT_KEY": str(gate.directory / "reader.key")}
    with (
        Bridge(tmp_path, gate.endpoint, environment=environment) as bridge,
        bridge.client("memory") as client,
        pytest.raises(grpc.RpcError) as caught,
    ):
        client.prepare("default/1/refused")
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_a_bridge_whose_key_is_refused(gate: Guarded, tmp_path: Path) -> None:
    gate.grant("leaver", "write", "containerd")
    key = str(gate.directory / "leaver.key")
    kept = (gate.directory / "leaver.key").read_text()
    gate.revoke("leaver")
    Path(key).touch(0o600)
    Path(key).write_text(kept)
    with (
        Bridge(tmp_path, gate.endpoint, client_key=key) as bridge,
        bridge.client("memory") as client,
        pytest.raises(grpc.RpcError) as caught,
    ):
        client.stat("default/1/key")
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "refused the key" in str(caught.value.details())


def test_the_stanza_over_tcp(gate: Guarded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bridge.toml"
    file.write_text(f'client_key = "{gate.directory}/bridge.key"\nserver_key = "{gate.directory}/server.pub"\n')
    assert main(["stanza", "--config", str(file), "-e", gate.endpoint]) == 0
    assert "snapbroker-memory" in capsys.readouterr().out


def test_a_key_file_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bridge.toml"
    file.write_text(f'client_key = "{tmp_path}/none.key"\nendpoint = "tcp://127.0.0.1:1"\n')
    assert main(["--config", str(file)]) == InvalidArgument.exit_status
    assert f"{tmp_path}/none.key" in capsys.readouterr().err
    assert configuration.load(None, endpoint=f"{tmp_path}/s").curve is None
