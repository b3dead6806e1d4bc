"""A mistake in the configuration stops the start with file, key and reason; what is lacking costs one snapshotter."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
import psutil
import pytest

from backends import registry
from broker import config as configuration
from broker.main import main
from snapbroker import blocking
from snapbroker.errors import NotFound
from tests.daemon import support
from tests.harness import READY_S, SCRATCH, STOP_S, Daemon

REPOSITORY: Final = Path(__file__).parents[2]
SHIPPED: Final = sorted((REPOSITORY / "config").glob("snapbrokerd*.toml"))
SNAPBROKERD: Final = str(Path(sys.executable).with_name("snapbrokerd"))

LIMITS: Final = "snapshotters.native.limits"
OPTIONS: Final = "snapshotters.native.options"
MISTAKES: Final = {
    "unknown-key": ('colour = "red"', "", "unknown field `colour`"),
    "unknown-table": ("[rooter]\nopen_requests_max = 1", "", "unknown field `rooter`"),
    "unknown-limit": ("[router]\nopen_request_max = 1", "router", "open_request_max"),
    "not-a-number": ('[router]\nopen_requests_max = "many"', "router.open_requests_max", "int"),
    "a-float": ("[supervisor]\nstop_timeout_ms = 1.5", "supervisor.stop_timeout_ms", "int"),
    "a-flag": ("[supervisor]\nstop_timeout_ms = true", "supervisor.stop_timeout_ms", "int"),
    "not-a-text": ("root = 3", "root", "str"),
    "not-a-table": ("router = 3", "router", "object"),
    "zero": ("[router]\nopen_requests_max = 0", "router.open_requests_max", "above 0"),
    "negative": ("[publisher]\nheartbeat_ms = -1", "publisher.heartbeat_ms", "above 0"),
    "too-large": ("[publisher]\nsend_queue_max = 9999999999", "publisher.send_queue_max", "at most"),
    "huge": ("[supervisor]\nsilence_max_ms = 1000000000000000000000000", "supervisor.silence_max_ms", ""),
    "not-finite": (
        "[snapshotters.native.limits.pool]\npool_idle_s = nan",
        "snapshotters.native.limits.pool.pool_idle_s",
        "",
    ),
    "endless": (
        "[snapshotters.native.limits.pool]\npool_idle_s = inf",
        "snapshotters.native.limits.pool.pool_idle_s",
        "",
    ),
    "log-level": ('log_level = "loud"', "log_level", "debug, info, warning or error"),
    "log-format": ('log_format = "xml"', "log_format", "auto, json or console"),
    "relative-root": ('root = "here"', "root", "absolute"),
    "relative-runtime": ('runtime = "here"', "runtime", "absolute"),
    "long-runtime": (f'runtime = "/{"r" * 100}"', "runtime", "107"),
    "long-endpoint": (f'endpoint = "ipc:///{"r" * 107}"', "endpoint", "107"),
    "long-events-endpoint": (f'events_endpoint = "ipc:///{"r" * 107}"', "events_endpoint", "107"),
    "no-scheme": ('endpoint = "/run/x.sock"', "endpoint", "ipc://PATH"),
    "other-scheme": ('endpoint = "inproc://x"', "endpoint", "ipc://PATH"),
    "empty-address": ('endpoint = "ipc://"', "endpoint", "ipc://PATH"),
    "not-loopback": ('endpoint = "tcp://10.0.0.1:5555"', "endpoint", "loopback"),
    "every-interface": ('endpoint = "tcp://*:5555"', "endpoint", "loopback"),
    "any-address": ('events_endpoint = "tcp://0.0.0.0:5555"', "events_endpoint", "loopback"),
    "looks-like-loopback": ('endpoint = "tcp://127.example.org:5555"', "endpoint", ""),
    "without-keys": ('endpoint = "tcp://127.0.0.1:5555"', "endpoint", "insecure_tcp"),
    "insecure-elsewhere": ('insecure_tcp = true\nendpoint = "tcp://10.0.0.1:5555"', "endpoint", "loopback"),
    "owner-unknown": ('socket_owner = "nobody-has-it"', "socket_owner", "no user 'nobody-has-it'"),
    "owner-negative": ("socket_owner = -1", "socket_owner", ""),
    "owner-unchanged": (f"socket_owner = {2**32 - 1}", "socket_owner", "no user's number"),
    "owner-list": ('socket_owner = ["root"]', "socket_owner", ""),
    "group-unknown": ('socket_group = "nobody has it"', "socket_group", "no group 'nobody has it'"),
    "role-unknown": ('socket_role = "king"', "socket_role", "read, write, admin"),
    "tcp-half": ('[tcp]\nendpoint = "tcp://10.0.0.1:5555"', "tcp.endpoint", "both"),
    "tcp-ipc": ('[tcp]\nendpoint = "ipc:///x"\nevents_endpoint = "ipc:///y"', "tcp.endpoint", "tcp://ADDRESS:PORT"),
    "tcp-no-port": ('[tcp]\nendpoint = "tcp://h"\nevents_endpoint = "tcp://h:1"', "tcp.endpoint", "port"),
    "tcp-same": ('[tcp]\nendpoint = "tcp://h:1"\nevents_endpoint = "tcp://h:1"', "tcp.events_endpoint", "already"),
    "tcp-keys-relative": ('[tcp]\nkeys = "here"', "tcp.keys", "absolute"),
    "tcp-unknown": ("[tcp]\nport = 1", "tcp", "port"),
    "no-port": ('endpoint = "tcp://127.0.0.1"', "endpoint", "port"),
    "same-endpoints": ('endpoint = "ipc:///run/x.sock"\nevents_endpoint = "ipc:///run/x.sock"', "events_endpoint", ""),
    "snapshotters-a-list": ("snapshotters = []", "snapshotters", ""),
    "section-a-number": ("[snapshotters]\nnative = 3", "snapshotters.native", "object"),
    "section-unknown-key": ("[snapshotters.native]\nrot = 1", "snapshotters.native", "rot"),
    "section-limit": (
        "[snapshotters.native.limits.pool]\npool_minn = 1",
        "snapshotters.native.limits.pool",
        "pool_minn",
    ),
    "section-type": (
        "[snapshotters.native.limits.writer]\nturn_max = []",
        "snapshotters.native.limits.writer.turn_max",
        "int",
    ),
    "section-zero": (f"[{LIMITS}.service]\nstreams_max = 0", f"{LIMITS}.service.streams_max", "above 0"),
    "section-relative-root": ('[snapshotters.native]\nroot = "here"', "snapshotters.native.root", "absolute"),
    "section-relative-metadata": ('[snapshotters.native]\nmetadata = "m"', "snapshotters.native.metadata", "absolute"),
    "name-empty": ('[snapshotters.""]\nbackend = "native"', "snapshotters.", "name"),
    "name-slash": ('[snapshotters."a/b"]\nbackend = "native"', "snapshotters.a/b", "name"),
    "name-space": ('[snapshotters."a b"]\nbackend = "native"', "snapshotters.a b", "name"),
    "name-umlaut": ('[snapshotters."ü"]\nbackend = "native"', "snapshotters.ü", "name"),
    "name-dots": ('[snapshotters.".."]\nbackend = "native"', "snapshotters...", "name"),
    "name-dot": ('[snapshotters."."]\nbackend = "native"', "snapshotters..", "name"),
    "name-long": (f'[snapshotters.{"n" * 65}]\nbackend = "native"', "snapshotters.nnn", "64"),
    "backend-unknown": ('[snapshotters.mine]\nbackend = "zfs"', "snapshotters.mine.backend", "zfs"),
    "backend-of-the-name": ("[snapshotters.mine]", "snapshotters.mine.backend", "mine"),
    "option-unknown": (
        '[snapshotters.mine]\nbackend = "overlayfs"\n[snapshotters.mine.options]\nmont_options = []',
        "snapshotters.mine.options",
        "mont_options",
    ),
    "option-type": (
        "[snapshotters.overlayfs.options]\nmount_options = 3",
        "snapshotters.overlayfs.options.mount_options",
        "array",
    ),
    "option-value": (
        '[snapshotters.native.options]\nreflink = "often"',
        "snapshotters.native.options.reflink",
        "often",
    ),
    "option-range": (
        "[snapshotters.native.options]\ncopy_threads = 0",
        "snapshotters.native.options.copy_threads",
        "1",
    ),
    "same-root": (
        '[snapshotters.a]\nbackend = "native"\nroot = "/x/y"\n[snapshotters.b]\nbackend = "native"\nroot = "/x/./y/"',
        "snapshotters.b.root",
        "a",
    ),
    "same-metadata": (
        '[snapshotters.a]\nbackend = "native"\nmetadata = "/m"\n[snapshotters.b]\nbackend = "native"\nmetadata = "/m/"',
        "snapshotters.b.metadata",
        "a",
    ),
    "not-toml": ("root = ", "", "TOML"),
    "twice": ('root = "/a"\nroot = "/b"', "", "TOML"),
    "not-utf-8": ('root = "\udcff"', "", "TOML"),
    "too-many-digits": (f"socket_mode = {'9' * 5000}", "", "TOML"),
    "too-many-brackets": (f"root = {'[' * 3000}", "", "TOML"),
    "too-deep": (f"[snapshotters.memory.options]\n{'a.' * 3000}a = 1", "", "deeper than"),
    "root-nul": ('root = "/a\\u0000b"', "root", "NUL"),
    "section-root-nul": ('[snapshotters.memory]\nroot = "/a\\u0000b"', "snapshotters.memory.root", "NUL"),
    "endpoint-nul": ('endpoint = "ipc:///a\\u0000b"', "endpoint", "ipc://PATH"),
}
"""What is written, the key that is blamed, and what of the reason is told."""


def check(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command."""
    status = main(arguments)
    output, errors = capsys.readouterr()
    return status, output, errors


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_file_key_and_reason(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, key, reason = MISTAKES[name]
    file = tmp_path / "broker.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    status, output, errors = check(["check-config", str(file)], capsys)
    assert (status, output) == (2, "")
    assert errors.startswith(f"snapbrokerd: {file}: {key}")
    assert reason in errors
    assert errors.count("\n") == 1
    # The same mistake stops the start.
    assert check(["--config", str(file)], capsys) == (2, "", errors)


@pytest.mark.parametrize("what", ["missing", "directory"])
def test_a_file_that_cannot_be_read(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broker.toml"
    if what == "directory":
        file.mkdir()
    for arguments in (["check-config", str(file)], ["--config", str(file)], ["--config", str(file), "doctor"]):
        status, output, errors = check(arguments, capsys)
        assert (status, output) == (2, "")
        assert errors.startswith(f"snapbrokerd: {file}: cannot be read: ")


def test_the_command_line_is_checked_like_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broker.toml"
    file.write_text("")
    runtime = tmp_path / ("r" * 100)
    status, _, errors = check(["--config", str(file), "--runtime", str(runtime)], capsys)
    assert status == 2
    assert "107" in errors
    with pytest.raises(SystemExit) as caught:
        main(["--colour", "red"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        'insecure_tcp = true\nendpoint = "tcp://127.0.0.1:5555"\nevents_endpoint = "tcp://[::1]:5556"',
        'insecure_tcp = true\nendpoint = "tcp://localhost:*"',
        'socket_owner = "root"\nsocket_group = 0\nsocket_mode = 0o660\nsocket_role = "read"',
        '[tcp]\nendpoint = "tcp://*:7000"\nevents_endpoint = "tcp://[::]:7001"\nkeys = "/srv/keys"',
        f'[snapshotters.{"n" * 64}]\nbackend = "memory"',
        "[snapshotters.native.limits.pool]\npool_min = 0\n[snapshotters.native.limits.writer]\nworkers = 0",
        '[snapshotters.a]\nbackend = "native"\n[snapshotters.b]\nbackend = "native"',
    ],
)
def test_what_is_good(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(text)
    assert check(["check-config", str(file)], capsys) == (0, f"{file}: good\n", "")


def test_the_command_ends_with_the_exit_status(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text("colour = 1")
    ended = subprocess.run([SNAPBROKERD, "check-config", file], capture_output=True, text=True, timeout=READY_S)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"snapbrokerd: {file}: ")


# What is shipped.


def test_a_configuration_is_shipped() -> None:
    assert [file.name for file in SHIPPED] == ["snapbrokerd.toml"]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_the_shipped_configuration_is_the_defaults(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(["check-config", str(file)], capsys)[0] == 0
    assert configuration.load(file) == configuration.Config()


@pytest.mark.parametrize("backend", ["overlayfs", "native", "btrfs"])
def test_what_the_shipped_configuration_names_is_the_defaults(backend: str, tmp_path: Path) -> None:
    text = (REPOSITORY / "config" / "snapbrokerd.toml").read_text()
    head, _, sections = text.partition("# Snapshotters.")
    _, _, sections = sections.partition("# [snapshotters.NAME]\n")
    kept = [head, f"[snapshotters.{backend}]\n"]
    for part in re.split(r"(?m)^(?=# \[)", sections):
        title, _, rest = part.partition("\n")
        of = re.search(r'with backend = "(\w+)"', title)
        if of is None or of[1] == backend:
            kept.append(f"{title.partition(']')[0]}]\n{rest}" if title.startswith("# [") else part)
    uncommented = re.sub(r"(?m)^# (\[.*\]|\w+ = .*)$", r"\1", "".join(kept).replace("NAME", backend))
    file = tmp_path / "uncommented.toml"
    file.write_text(uncommented)
    loaded = configuration.load(file)
    section = loaded.snapshotters[backend]
    kind = registry.load(backend)
    assert msgspec.structs.replace(loaded, snapshotters={}) == configuration.Config()
    assert section.limits == configuration.SnapshotterSection().limits
    assert section.options.keys() == set(kind.Options.__struct_fields__)
    assert msgspec.convert(section.options, kind.Options) == kind.Options()
    # Nothing is left out of it.
    told = set(re.findall(r"(?m)^(\w+) = ", uncommented))
    assert told == {"root", "runtime", "backend", "metadata", *fields_of(configuration.Config), *section.options}


def fields_of(kind: type[msgspec.Struct]) -> set[str]:
    """The names of all values of a configuration's type and of the tables in it."""
    names: set[str] = set()
    for field in msgspec.structs.fields(kind):
        default = field.default if field.default is not msgspec.NODEFAULT else None
        if isinstance(default, msgspec.Struct):
            names |= fields_of(type(default))
        elif field.name == "snapshotters":
            names |= fields_of(configuration.SnapshotterSection)
        elif field.name != "options":
            names.add(field.name)
    return names


# Doctor, and what a machine lacks.


def test_doctor_says_what_works_and_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(
        f'[snapshotters.good]\nbackend = "native"\n[snapshotters.bad]\nbackend = "btrfs"\nroot = "{SCRATCH}/none"\n'
    )
    places = ["--config", str(file), "--root", str(tmp_path), "--runtime", str(tmp_path)]
    status, output, errors = check(["doctor", *places], capsys)
    assert (status, errors) == (0, "")
    lines = output.splitlines()
    assert f"good: works at {tmp_path}/good" in lines
    reason = lines[lines.index(f"bad: does not work at {SCRATCH}/none") + 1]
    assert re.search("on ext4|on xfs|on tmpfs|on overlay", reason)
    status, output, errors = check([*places, "doctor", "--json"], capsys)
    assert (status, errors) == (0, "")
    rows = {row["name"]: row for row in json.loads(output)}
    assert rows["good"]["ok"] is True
    assert rows["good"]["missing"] == []
    assert rows["good"]["root"] == f"{tmp_path}/good"
    assert rows["bad"]["ok"] is False
    assert rows["bad"]["backend"] == "btrfs"
    assert rows["bad"]["missing"] == [reason.strip()]
    assert not (tmp_path / "good").exists(), "doctor only looks"


def test_doctor_says_so_when_nothing_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(f'[snapshotters.btrfs]\nroot = "{SCRATCH}/none"\n')
    status, output, _ = check(["--config", str(file), "doctor"], capsys)
    assert status == 1
    assert "btrfs: does not work" in output


def test_doctor_tells_of_a_configured_option_that_the_kernel_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broker.toml"
    file.write_text('[snapshotters.overlayfs.options]\nmount_options = ["redirect_dir=perhaps"]\n')
    status, output, _ = check(["--config", str(file), "--root", str(tmp_path), "doctor"], capsys)
    assert status == 1
    assert "redirect_dir=perhaps" in output


def test_a_snapshotter_that_cannot_run_is_left_out(unstarted_daemon: Callable[..., Daemon]) -> None:
    daemon = unstarted_daemon({"btrfs": {"backend": "btrfs"}, "memory": {"backend": "memory"}})
    daemon.start(wait=False)
    status = daemon.wait_for(lambda status: [actor.state for actor in status.snapshotters] == ["ready"])
    assert [actor.name for actor in status.snapshotters] == ["memory"]
    lines = [json.loads(line) for line in daemon.log().splitlines()]
    (line,) = [line for line in lines if line["event"] == "a snapshotter is left out"]
    assert line["snapshotter"] == "btrfs"
    assert line["level"] == "warning"
    assert "not on btrfs" in line["missing"][0]
    with daemon.client("btrfs") as broker, pytest.raises(NotFound, match="memory"):
        broker.stat("a")
    daemon.stop()


def test_a_daemon_without_any_snapshotter_does_not_start(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(f'[snapshotters.btrfs]\nroot = "{SCRATCH}/none"\n')
    command: list[str | Path] = [SNAPBROKERD, "--config", file, "--root", tmp_path, "--runtime", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=READY_S)
    assert ended.returncode == 5
    assert ended.stderr.splitlines()[-1].startswith("snapbrokerd: no snapshotter can run here")
    assert "not on btrfs" in ended.stderr


def test_a_runtime_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command: list[str | Path] = [SNAPBROKERD, "--root", tmp_path / "root", "--runtime", tmp_path / "file" / "run"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=READY_S)
    assert ended.returncode == 5
    assert ended.stderr.splitlines()[-1].startswith("snapbrokerd: ")
    assert f"{tmp_path}/file/run" in ended.stderr
    assert "Traceback" not in ended.stderr


# What the configuration does.


def test_several_instances_of_a_backend(unstarted_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = unstarted_daemon(
        {
            "one": {"backend": "native"},
            "two": {"backend": "native", "metadata": str(tmp_path / "metadata")},
            "native": {"root": str(tmp_path / "three")},
        }
    )
    daemon.start()
    with daemon.client("one") as one, daemon.client("two") as two, daemon.client("native") as three:
        sources = [broker.prepare("same")[0].source for broker in (one, two, three)]
        assert [Path(source).parents[1] for source in sources] == [
            daemon.root / "one",
            daemon.root / "two",
            tmp_path / "three",
        ]
        one.remove("same")
        assert two.stat("same").name == three.stat("same").name == "same"
        with pytest.raises(NotFound):
            one.stat("same")
    assert (tmp_path / "metadata" / "data.mdb").exists()
    assert not (daemon.root / "two" / "metadata").exists()
    daemon.stop()


def test_the_sockets_have_the_configured_mode(start_daemon: Callable[..., Daemon]) -> None:
    for mode in (0o600, 0o666):
        daemon = start_daemon({"memory": {"backend": "memory"}}, socket_mode=mode)
        for name in ("router.sock", "events.sock"):
            assert stat.S_IMODE((daemon.runtime / name).stat().st_mode) == mode
        daemon.stop()


def test_endpoints_of_tcp(unstarted_daemon: Callable[..., Daemon]) -> None:
    ports = [port_nobody_uses(), port_nobody_uses()]
    endpoints = [f"tcp://127.0.0.1:{port}" for port in ports]
    daemon = unstarted_daemon(
        {"memory": {"backend": "memory"}}, endpoint=endpoints[0], events_endpoint=endpoints[1], insecure_tcp=True
    )
    daemon.start()
    status = daemon.status()
    assert [status.endpoint, status.events_endpoint] == endpoints
    with daemon.client("memory") as broker, broker.events(since=0) as events:
        broker.prepare("key")
        event = events.poll(READY_S)
        assert event is not None
        assert event.key == "key"
    daemon.stop()


def port_nobody_uses() -> int:
    """A port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_longest_runtime_directory_that_is_called_good_serves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path(tempfile.mkdtemp(prefix="snb-", dir=SCRATCH))
    file = tmp_path / "broker.toml"

    def is_good(runtime: Path) -> bool:
        file.write_text(f'runtime = "{runtime}"\n[snapshotters.memory]\nbackend = "memory"\n')
        return main(["check-config", str(file)]) == 0

    try:
        longest = next(filter(is_good, (place / ("r" * length) for length in range(107, 0, -1))))
        command: list[str | Path] = [SNAPBROKERD, "--config", file, "--root", place / "root"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                endpoint = f"ipc://{longest}/router.sock"
                support.wait_until(lambda: process.poll() is not None or (longest / "router.sock").exists(), "a start")
                assert process.returncode is None, "it called the directory good and cannot use it"
                with blocking.connect(endpoint, snapshotter="memory", connect_timeout=READY_S) as broker:
                    wait_ready(broker)
                    broker.prepare("key")
            finally:
                process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_S) == 0
    finally:
        shutil.rmtree(place)


def wait_ready(broker: blocking.Broker) -> list[str]:
    """Wait until every snapshotter serves; answers their names."""
    support.wait_until(
        lambda: {actor.state for actor in broker.status().snapshotters} == {"ready"}, "every snapshotter to be ready"
    )
    return [actor.name for actor in broker.status().snapshotters]


# Not root.

NOBODY: Final = 65534


@pytest.fixture
def home() -> Iterator[Path]:
    """The home of a user who is nobody."""
    place = Path(tempfile.mkdtemp(prefix="snb-home-", dir=SCRATCH))
    os.chown(place, NOBODY, NOBODY)
    try:
        yield place
    finally:
        shutil.rmtree(place)


def as_nobody(home: Path, *command: str) -> list[str]:
    """The command as that user, in an environment of its own.

    Where the interpreter or the checkout lies below a directory of root's, the one capability to pass through it
    is kept; none that changes anything is.
    """
    hidden = any(not stat.S_IMODE(path.stat().st_mode) & 0o001 for path in ancestors(Path(sys.executable), REPOSITORY))
    passing = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"] if hidden else ["--inh-caps=-all"]
    return [
        *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *passing),
        *("env", "-i", f"PATH={os.environ['PATH']}", f"HOME={home}", f"XDG_RUNTIME_DIR={home}/runtime"),
        *command,
    ]


def ancestors(*paths: Path) -> set[Path]:
    """Every directory on the way to these files, links resolved."""
    return {parent for path in paths for real in (path, path.resolve()) for parent in real.parents}


@pytest.mark.root
def test_all_defaults_and_not_root(home: Path) -> None:
    with (
        (home / "log").open("wb") as log,
        subprocess.Popen(as_nobody(home, SNAPBROKERD), stderr=log, cwd=home) as process,
    ):
        try:
            endpoint = f"ipc://{home}/runtime/snapbroker/router.sock"
            with blocking.connect(endpoint, snapshotter="native", connect_timeout=READY_S) as broker:
                names = wait_ready(broker)
                assert "native" in names
                assert "btrfs" not in names, "it needs root"
                (mount,) = broker.prepare("making")
                assert mount.source.startswith(f"{home}/.local/state/snapbroker/native/snapshots/")
                (Path(mount.source) / "file").write_text("content")
                os.chown(Path(mount.source) / "file", NOBODY, NOBODY)
                broker.commit("base", "making")
                (mount,) = broker.prepare("job", "base")
                assert (Path(mount.source) / "file").read_text() == "content"
                assert Path(mount.source).stat().st_uid == NOBODY
                broker.remove("job")
                broker.cleanup()
                pids = [actor.pid for actor in broker.status().snapshotters]
                assert all(psutil.Process(pid).uids().effective == NOBODY for pid in [process.pid, *pids])
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0
    lines = [json.loads(line) for line in (home / "log").read_text().splitlines()]
    left_out = {line["snapshotter"]: line["missing"] for line in lines if line["event"] == "a snapshotter is left out"}
    assert "btrfs" in left_out
    assert all(reasons and all(reasons) for reasons in left_out.values())


@pytest.mark.root
def test_state_and_runtime_directories_of_a_user(home: Path) -> None:
    command = as_nobody(home, "env", f"XDG_STATE_HOME={home}/elsewhere", SNAPBROKERD, "doctor", "--json")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=READY_S, cwd=home)
    rows = {row["name"]: row for row in json.loads(ended.stdout)}
    assert rows["native"]["root"] == f"{home}/elsewhere/snapbroker/native"
    assert rows["native"]["ok"] is True
    assert rows["btrfs"]["ok"] is False


@pytest.mark.root
def test_a_user_without_a_runtime_directory_is_told_what_to_do(home: Path) -> None:
    command = as_nobody(home, "env", "-u", "XDG_RUNTIME_DIR", SNAPBROKERD)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=READY_S, cwd=home)
    assert ended.returncode == 5
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("snapbrokerd: ")
    assert f"/run/user/{NOBODY}/snapbroker" in last
    assert "--runtime" in last
    assert "Traceback" not in ended.stderr
