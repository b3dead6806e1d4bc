"""Owners, groups and modes of the local sockets, at every moment, and the directory that they are in."""

from __future__ import annotations

import grp
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker import places
from snapbroker.errors import FailedPrecondition
from tests.daemon.test_configuration import as_nobody, home  # noqa: F401 - a fixture
from tests.harness import Daemon

SNAPBROKERD = Path(sys.executable).with_name("snapbrokerd")


@pytest.mark.root
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (0, 0, 0o600)),
        ({"socket_group": "adm", "socket_mode": 0o660}, (0, grp.getgrnam("adm").gr_gid, 0o660)),
        ({"socket_owner": "nobody", "socket_group": 5678, "socket_mode": 0o640}, (65534, 5678, 0o640)),
    ],
)
def test_sockets_have_owner_group_and_mode(
    settings: dict[str, Any], expected: tuple[int, int, int], start_daemon: Callable[..., Daemon]
) -> None:
    daemon = start_daemon({"memory": {"backend": "memory"}}, **settings)
    for name in ("router.sock", "events.sock"):
        found = (daemon.runtime / name).stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == expected
    assert stat.S_IMODE(daemon.runtime.stat().st_mode) == 0o755


@pytest.mark.root
def test_a_socket_is_never_wider_than_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at whenever it changes: only its owner has any right until owner and group are the last ones."""
    path = tmp_path / "router.sock"
    seen: list[tuple[str, int, int, int]] = []

    def look(when: str) -> None:
        found = path.stat()
        seen.append((when, found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)))

    def watched(name: str) -> None:
        real = getattr(os, name)

        def change(*arguments: Any, **more: Any) -> Any:
            look(f"before {name}")
            answer = real(*arguments, **more)
            look(f"after {name}")
            return answer

        monkeypatch.setattr(os, name, change)

    for name in ("chown", "chmod"):
        watched(name)
    listener = socket.socket(socket.AF_UNIX)

    def bind() -> str:
        listener.bind(os.fspath(path))
        look("bound")
        return "bound"

    umask = os.umask(0)
    try:
        assert places.bind_local(bind, f"ipc://{path}", 1234, 5678, 0o660) == "bound"
        assert os.umask(0) == 0, "the umask is what it was"
    finally:
        os.umask(umask)
        listener.close()
    assert [(when, mode) for when, _, _, mode in seen if when != "after chmod"] == [
        ("bound", 0o600),
        ("before chown", 0o600),
        ("after chown", 0o600),
        ("before chmod", 0o600),
    ]
    assert seen[-1] == ("after chmod", 1234, 5678, 0o660)


@pytest.mark.parametrize("what", ["link", "file", "nothing"])
def test_what_was_put_in_a_sockets_place_is_not_touched(what: str, tmp_path: Path) -> None:
    path, other = tmp_path / "router.sock", tmp_path / "shadow"
    other.touch(0o600)

    def bind() -> None:
        if what == "link":
            path.symlink_to(other)
        elif what == "file":
            path.touch(0o600)

    with pytest.raises(FailedPrecondition, match=r"router\.sock"):
        places.bind_local(bind, f"ipc://{path}", places.UNCHANGED, places.UNCHANGED, 0o666)
    assert stat.S_IMODE(other.stat().st_mode) == 0o600


def test_names_and_numbers() -> None:
    assert (places.user_id("root"), places.user_id("1234"), places.user_id(5), places.user_id("")) == (0, 1234, 5, -1)
    assert (places.group_id("root"), places.group_id("0"), places.group_id("")) == (0, 0, -1)


@pytest.mark.root
def test_only_root_gives_sockets_away(home: Path) -> None:  # noqa: F811 - the fixture
    file = home / "broker.toml"
    file.write_text('socket_owner = "root"\n[snapshotters.memory]\nbackend = "memory"\n')
    ended = subprocess.run(
        as_nobody(home, os.fspath(SNAPBROKERD), "--config", os.fspath(file)),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=home,
    )
    assert ended.returncode == 5
    assert "only root gives files away" in ended.stderr.splitlines()[-1]


@pytest.mark.root
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.chmod(0o777), "chmod go-w"),
        (lambda path: path.chmod(0o775), "chmod go-w"),
        (lambda path: os.chown(path, 1234, -1), "belongs to user 1234"),
    ],
)
def test_a_runtime_directory_others_can_write_to(spoil: Callable[[Path], object], reason: str, tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    spoil(runtime)
    with pytest.raises(FailedPrecondition, match=reason):
        places.check_runtime(runtime)
    if reason == "chmod go-w":
        return
    file = tmp_path / "broker.toml"
    file.write_text('[snapshotters.memory]\nbackend = "memory"\n')
    command = [SNAPBROKERD, "--config", file, "--root", tmp_path / "root", "--runtime", runtime]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 5
    assert reason in ended.stderr.splitlines()[-1]
    assert sorted(path.name for path in runtime.iterdir()) in ([], ["lock"])


def test_the_umask_is_back_after_a_bind(tmp_path: Path) -> None:
    """The umask is the whole process's: it is back before anything else runs here."""
    before = os.umask(0o022)
    try:
        places.bind_local(lambda: None, "tcp://127.0.0.1:1", -1, -1, 0o600)
        assert os.umask(0o022) == 0o022
        with pytest.raises(OSError, match="no"):
            places.bind_local(lambda: (_ for _ in ()).throw(OSError("no")), f"ipc://{tmp_path}/s", -1, -1, 0o600)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
