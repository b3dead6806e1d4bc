"""Key files, the key directory, and the command that tends it."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from broker import keys
from broker.main import main
from snapbroker import endpoints, keyfiles
from snapbroker.errors import AlreadyExists, BrokerError, FailedPrecondition, InvalidArgument, NotFound
from snapbroker.keyfiles import CLIENT_KEY_VARIABLE, SERVER_KEY_VARIABLE, Curve
from tests.access.guarded import Guarded

BIN = Path(sys.executable).parent


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture(autouse=True)
def _no_keys_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CLIENT_KEY_VARIABLE, raising=False)
    monkeypatch.delenv(SERVER_KEY_VARIABLE, raising=False)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_key(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--role", "write", "--namespace", "red", "--namespace", "blue", "--snapshotter", "fast"]
    old = os.umask(0)
    try:
        assert main(["keys", "new", "farm", *options, "--directory", str(directory)]) == 0
    finally:
        os.umask(old)
    printed = capsys.readouterr()
    assert mode(directory) == 0o700
    assert {path.name: mode(path) for path in directory.iterdir()} == {
        "farm.toml": 0o644,
        "farm.key": 0o600,
        "server.key": 0o600,
        "server.pub": 0o644,
    }
    curve = Curve.load(directory / "farm.key")
    assert curve is not None
    assert curve.server == keyfiles.server_key_of(str(directory / "server.pub"))
    (entry,) = keys.read_directory(directory).entries.values()
    assert (entry.name, entry.grant.key, entry.grant.role.name) == ("farm", curve.public, "WRITE")
    assert (entry.grant.namespaces, entry.grant.snapshotters) == (("red", "blue"), ("fast",))
    server = keyfiles.read_secret(directory / "server.key")
    for secret in (curve.secret, server.secret):
        assert secret not in printed.out + printed.err
        assert secret not in repr(curve) + repr(server)
        assert secret not in (directory / "farm.toml").read_text() + (directory / "server.pub").read_text()


def test_the_brokers_pair_is_made_once(directory: Path) -> None:
    keys.make(directory, "one", "read", (), ())
    first = (directory / "server.key").read_bytes()
    keys.make(directory, "two", "read", (), ())
    assert (directory / "server.key").read_bytes() == first


def test_a_name_is_taken_once(directory: Path) -> None:
    keys.make(directory, "farm", "read", (), ())
    before = (directory / "farm.key").read_bytes()
    with pytest.raises(AlreadyExists, match="revoke it first"):
        keys.make(directory, "farm", "read", (), ())
    # Also where the secret is still there and the broker's file is not: somebody may be using it.
    (directory / "farm.toml").unlink()
    with pytest.raises(AlreadyExists):
        keys.make(directory, "farm", "read", (), ())
    assert (directory / "farm.key").read_bytes() == before
    assert not (directory / "farm.toml").exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-r", "a/b", "../up", "a b", "a\nb", "ü", "a" * 65, "server", "a\0", "*", "_x"]
)
def test_odd_names_are_refused(name: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidArgument):
        keys.make(directory, name, "read", (), ())
    with pytest.raises(InvalidArgument):
        keys.revoke(directory, name)
    assert not directory.exists()
    if not name.startswith("-"):
        assert main(["keys", "new", name, "--directory", str(directory)]) == 2
        assert capsys.readouterr().err.startswith("snapbrokerd: ")


@pytest.mark.parametrize("name", ["a", "Farm-7", "node.example.org", "a_b", "9", "a" * 64, "server2"])
def test_good_names(name: str, directory: Path) -> None:
    keys.make(directory, name, "read", ("red",), ())
    assert [entry.name for entry in keys.read_directory(directory).entries.values()] == [name]
    keys.revoke(directory, name)
    assert keys.read_directory(directory).entries == {}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--namespace", "a/b"], "namespace"),
        (["--namespace", "*", "--namespace", "red"], "stands alone"),
        ([word for number in range(65) for word in ("--namespace", f"n{number}")], "more than 64"),
    ],
)
def test_what_cannot_be_granted(
    options: list[str], reason: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "new", "farm", *options, "--directory", str(directory)]) == 2
    assert reason in capsys.readouterr().err
    assert not directory.exists()


def test_listing_and_revoking(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--directory", str(directory)]
    assert main(["keys", "list", *where]) == FailedPrecondition.exit_status
    for name, options in (("b", ["--namespace", "*", "--role", "admin"]), ("a", [])):
        assert main(["keys", "new", name, *options, *where]) == 0
    capsys.readouterr()
    assert main(["keys", "list", "--json", *where]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["role"], one["namespaces"], one["snapshotters"]) for one in listed["keys"]] == [
        ("a", "read", ["default"], ["*"]),
        ("b", "admin", ["*"], ["*"]),
    ]
    assert main(["keys", "list", *where]) == 0
    text = capsys.readouterr().out
    assert "b  admin  namespaces *" in text
    assert main(["keys", "revoke", "a", *where]) == 0
    assert sorted(path.name for path in directory.iterdir()) == ["b.key", "b.toml", "server.key", "server.pub"]
    assert main(["keys", "revoke", "a", *where]) == NotFound.exit_status
    (directory / "c.toml").write_text("role = 3")
    capsys.readouterr()
    assert main(["keys", "list", *where]) == 1
    assert "c.toml" in capsys.readouterr().err


def test_the_configuration_names_the_directory(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(f'[tcp]\nkeys = "{directory}"\n')
    assert main(["keys", "new", "farm", "--config", str(file)]) == 0
    assert (directory / "farm.toml").exists()
    capsys.readouterr()


# Files.


def spoil(what: str) -> Callable[[Path], object]:
    """A way to spoil a client's key file."""
    return {
        "readable": lambda path: path.chmod(0o640),
        "world": lambda path: path.chmod(0o604),
        "writable": lambda path: path.chmod(0o620),
        "missing": lambda path: path.unlink(),
        "directory": lambda path: (path.unlink(), path.mkdir(0o700)),
        "pipe": lambda path: (path.unlink(), os.mkfifo(path, 0o600)),
        "empty": lambda path: path.write_text(""),
        "not-text": lambda path: path.write_bytes(b"\xff\xfe"),
        "twice": lambda path: path.write_text(path.read_text() * 2),
        "no-secret": lambda path: path.write_text(path.read_text().replace("secret_key", "secret")),
        "short": lambda path: path.write_text(path.read_text().replace('secret_key = "', 'secret_key = "x')),
        "no-bits": lambda path: path.write_text(
            path.read_text().replace(keyfiles.read_secret(path).secret, "#" * keyfiles.KEY_CHARACTERS)
        ),
        "mixed": lambda path: path.write_text(
            path.read_text().replace(keyfiles.read_secret(path).public, keyfiles.generate()[0])
        ),
        "no-server": lambda path: path.write_text(path.read_text().replace("server_key", "other")),
        "long": lambda path: path.write_text(path.read_text() + "#" * keyfiles.FILE_BYTES_MAX),
    }[what]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("readable", "chmod 600"),
        ("world", "chmod 600"),
        ("writable", "chmod 600"),
        ("missing", "No such file"),
        ("directory", "no regular file"),
        ("pipe", "no regular file"),
        ("empty", "no public_key"),
        ("not-text", "no key file"),
        ("twice", "no key file"),
        ("no-secret", "no secret_key"),
        ("short", "secret_key is no key"),
        ("no-bits", "secret_key is no key"),
        ("mixed", "not that of secret_key"),
        ("no-server", "SNAPBROKER_SERVER_KEY"),
        ("long", "longer than"),
    ],
)
def test_a_bad_client_key_file(what: str, reason: str, directory: Path) -> None:
    _, path = keys.make(directory, "farm", "read", (), ())
    secret = keyfiles.read_secret(path).secret
    spoil(what)(path)
    with pytest.raises(InvalidArgument, match=reason) as caught:
        Curve.load(path)
    assert str(path) in caught.value.message
    assert secret not in caught.value.message


def test_forms_of_a_key_file(directory: Path) -> None:
    """Comments, blank lines, CR LF, unknown fields, no last line end, a '#' in a key: as the specification has it."""
    _, path = keys.make(directory, "farm", "read", (), ())
    pair = keyfiles.read_secret(path)
    text = f'# one\n\n  public_key="{pair.public}" # two\nsecret_key\t=  "{pair.secret}"\nunknown = "x"\nname = "y"'
    for form in (text, text.replace("\n", "\r\n"), text + "\n"):
        path.write_bytes(form.encode())
        found = keyfiles.read_secret(path)
        assert (found.public, found.secret, found.server) == (pair.public, pair.secret, "")


def test_the_example_of_the_specification(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/rfc/3-access.md").read_text()
    path = tmp_path / "example.key"
    path.write_text(text.partition("```toml\n")[2].partition("```")[0])
    path.chmod(0o600)
    assert keyfiles.read_secret(path).server


def test_where_the_server_key_comes_from(directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, path = keys.make(directory, "farm", "read", (), ())
    own = keyfiles.read_secret(path).server
    one, two = keyfiles.generate()[0], keyfiles.generate()[0]
    monkeypatch.setenv(CLIENT_KEY_VARIABLE, str(path))

    def server(told: str | None = None) -> str:
        found = Curve.load(None, told)
        assert found is not None
        return found.server

    assert server() == own
    monkeypatch.setenv(SERVER_KEY_VARIABLE, one)
    assert server() == one
    assert server(two) == two
    assert server(str(directory / "server.pub")) == own
    monkeypatch.setenv(SERVER_KEY_VARIABLE, str(tmp_path / "not-there"))
    with pytest.raises(InvalidArgument, match="not-there"):
        server()
    with pytest.raises(InvalidArgument, match="is no key"):
        server("#" * keyfiles.KEY_CHARACTERS)
    monkeypatch.setenv(CLIENT_KEY_VARIABLE, "")
    assert Curve.load() is None


def test_keys_are_only_for_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CLIENT_KEY_VARIABLE, "/not-there")
    assert endpoints.curve_for(None, "ipc:///run/x", "ipc:///run/y") is None
    with pytest.raises(InvalidArgument, match="/not-there"):
        endpoints.curve_for(None, "tcp://host:1", None)


# The directory.


WHATEVER = st.one_of(
    st.binary(max_size=300),
    st.lists(
        st.sampled_from(
            [
                "public_key", "role", "namespaces", "snapshotters", "secret_key", "server_key", "=", "[", "]", '"',
                "\n", '"*"', '"read"', "9" * 5000, "[" * 2000, "{", "}", ",", "#", "a.b", "1979-05-27", "nan", "\0",
                '"' + "x" * keyfiles.KEY_CHARACTERS + '"',
            ]
        ),
        max_size=30,
    ).map(lambda words: " ".join(words).encode()),
)  # fmt: skip


@given(data=WHATEVER)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(data=b"a = " + b"[" * 60_000)
@example(data=b"a = " + b"9" * 60_000)
def test_whatever_is_in_a_file_it_is_read_or_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "farm.toml"
    path.write_bytes(data)
    path.chmod(0o600)
    for read in (keys.read_client, keyfiles.read_secret):
        with contextlib.suppress(InvalidArgument):
            read(path)


@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        (lambda path: path.chmod(0o664), "others can write"),
        (lambda path: path.write_text(path.read_text() + "colour = 1\n"), "colour"),
        (lambda path: path.write_text(path.read_text().replace("public_key", "# ")), "public_key"),
        (lambda path: path.write_text(path.read_text().replace('public_key = "', 'public_key = "x')), "no key"),
        (lambda path: path.write_text(path.read_text().replace('"read"', '"king"')), "king"),
        (lambda path: path.write_text(path.read_text().replace('["red"]', '["a/b"]')), "a/b"),
        (lambda path: path.write_text(path.read_text().replace('["red"]', '"red"')), "namespaces"),
        (lambda path: path.write_bytes(b"\xff"), "not TOML"),
        (lambda path: path.write_text("#" * 70_000), "longer"),
        (lambda path: path.rename(path.with_name("server.toml")), "server"),
        (lambda path: path.rename(path.with_name("a b.toml")), "a b"),
        (lambda path: (path.unlink(), path.symlink_to("/nonexistent")), "No such file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "no regular file"),
        (lambda path: (path.unlink(), path.mkdir()), "no regular file"),
        (lambda path: path.write_bytes((path.parent / "good.toml").read_bytes()), "'good'"),
    ],
)
def test_a_bad_file_lets_nobody_in_and_concerns_no_other(
    spoiled: Callable[[Path], object], reason: str, directory: Path
) -> None:
    keys.make(directory, "good", "read", ("red",), ())
    path, _ = keys.make(directory, "other", "read", ("red",), ())
    spoiled(path)
    listing = keys.read_directory(directory)
    assert [entry.name for entry in listing.entries.values()] == ["good"]
    ((name, told),) = listing.bad.items()
    assert name.endswith(".toml")
    assert reason in told
    assert str(directory) in told


async def test_a_file_that_is_being_written_revokes_nobody(directory: Path) -> None:
    path, _ = keys.make(directory, "farm", "read", ("red",), ())
    other, _ = keys.make(directory, "other", "read", ("red",), ())
    keyring = keys.Keyring(directory, 1)
    text = path.read_text()

    def look() -> list[str]:
        if (found := keyring._look()) is not None:
            keyring.listing, keyring._seen = found
        return sorted(entry.name for entry in keyring.listing.entries.values())

    path.write_text("")
    other.unlink()
    assert look() == ["farm"], "the other one is gone at once"
    path.write_text(text)
    assert look() == ["farm"]
    path.write_text("")
    assert look() == ["farm"]
    assert look() == []
    assert "farm.toml" in keyring.listing.bad
    path.write_text(text)
    assert look() == ["farm"]
    path.unlink()
    assert look() == []


@pytest.mark.root
def test_a_file_of_another_user_lets_nobody_in(directory: Path) -> None:
    path, _ = keys.make(directory, "other", "read", ("red",), ())
    os.chown(path, 1234, -1)
    assert "chown" in keys.read_directory(directory).bad["other.toml"]


@pytest.mark.parametrize("what", ["missing", "wide", "file", "no-server", "wide-server"])
def test_a_directory_that_cannot_be_used_stops_the_start(what: str, directory: Path, tmp_path: Path) -> None:
    keys.make(directory, "farm", "read", ("red",), ())
    expected = {
        "missing": (lambda: directory.rename(tmp_path / "away"), "keys new"),
        "wide": (lambda: directory.chmod(0o770), "chmod go-w"),
        "file": (lambda: (directory.rename(tmp_path / "away"), directory.touch()), "no directory"),
        "no-server": (lambda: (directory / "server.key").unlink(), "server.key"),
        "wide-server": (lambda: (directory / "server.key").chmod(0o644), "chmod 600"),
    }
    spoil_it, reason = expected[what]
    spoil_it()
    if what != "wide-server":
        with pytest.raises((FailedPrecondition, InvalidArgument), match=reason) as caught:
            keys.Keyring(directory, 1000)
        assert caught.value.message.startswith(str(directory))
        return
    file = tmp_path / "broker.toml"
    file.write_text(
        f'root = "{tmp_path}/root"\nruntime = "{tmp_path}/run"\n[snapshotters.memory]\nbackend = "memory"\n[tcp]\n'
        f'endpoint = "tcp://127.0.0.1:*"\nevents_endpoint = "tcp://127.0.0.1:*"\nkeys = "{directory}"\n'
    )
    ended = subprocess.run([BIN / "snapbrokerd", "--config", file], capture_output=True, text=True, timeout=60)
    assert ended.returncode in (2, 5)
    assert ended.stderr.splitlines()[-1].startswith(f"snapbrokerd: {directory}")
    assert reason in ended.stderr


# From beginning to end.


def test_the_commands_end_to_end(gate: Guarded, tmp_path: Path) -> None:
    """Made by one command, used by the other, from a file or the environment; and revoked."""
    where = ["--directory", str(gate.directory)]
    subprocess.run(
        [BIN / "snapbrokerd", "keys", "new", "end", "--role", "write", "--namespace", "red", *where], check=True
    )
    gate.wait_reread()
    key = tmp_path / "end.key"
    (gate.directory / "end.key").rename(key)
    base = {**os.environ, "SNAPBROKER_ENDPOINT": gate.endpoint, "SNAPBROKER_SNAPSHOTTER": "memory"}

    def snapbroker(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "snapbroker", *arguments], capture_output=True, text=True, env={**base, **environment}, timeout=60
        )

    assert snapbroker("-n", "red", "prepare", "end", SNAPBROKER_CLIENT_KEY=str(key)).returncode == 0
    listed = snapbroker("--client-key", str(key), "-n", "red", "ls")
    assert (listed.returncode, "end" in listed.stdout) == (0, True)
    assert snapbroker("--client-key", str(key), "-n", "green", "ls").returncode == 9
    assert snapbroker("--client-key", str(key), "status").returncode == 0
    wrong = snapbroker(
        "--client-key", str(key), "--server-key", keyfiles.generate()[0], "--timeout", "1.5", "-n", "red", "ls"
    )
    assert (wrong.returncode, "server.pub" in wrong.stderr) == (10, True)
    key.chmod(0o644)
    wide = snapbroker("--client-key", str(key), "-n", "red", "ls")
    assert (wide.returncode, f"chmod 600 {key}" in wide.stderr) == (2, True)
    key.chmod(0o600)
    subprocess.run([BIN / "snapbrokerd", "keys", "revoke", "end", *where], check=True)
    gate.wait_reread()
    refused = snapbroker("--client-key", str(key), "-n", "red", "ls")
    assert (refused.returncode, "unauthenticated" in refused.stderr) == (10, True)


def test_a_momentary_failure_revokes_nobody(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.make(directory, "farm", "read", ("red",), ())

    def no_descriptors(*_: object, **__: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", no_descriptors)
    with pytest.raises(OSError, match="Too many"):
        keys.read_directory(directory)
    assert not issubclass(OSError, BrokerError)
