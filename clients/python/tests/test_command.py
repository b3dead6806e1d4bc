"""The command line: in process against a broker that only remembers, and as a user types it against a real one."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

import snapbroker
from snapbroker import endpoints
from snapbroker.command import main, words
from snapbroker.command.arguments import _parser, parse
from snapbroker.command.failures import complaint, statuses
from snapbroker.contract import FENCE_MAX, Event, Info, Kind, Mount, Mounts, Usage
from snapbroker.errors import (
    ERRORS,
    AlreadyExists,
    BrokerError,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
)
from snapbroker.protocol import ActorStatus, Progress, StatusAnswer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MOMENT = 1_700_000_000_123_456_789
MOUNTS = Mounts([Mount("bind", "/srv/1/fs", ("rw", "rbind"))])
MOUNTS.fence = 17
SNAPBROKER = Path(sys.executable).with_name("snapbroker")
SNAPBROKERD = Path(sys.executable).with_name("snapbrokerd")
DOCUMENTATION = Path(__file__).parents[3] / "docs" / "command.md"


def info(name: str, parent: str = "", kind: Kind = Kind.COMMITTED, **labels: str) -> Info:
    return Info(name, kind, parent, labels, MOMENT, MOMENT)


@dataclass
class FakeAnswer:
    value: Usage | None
    error: BrokerError | None = None

    def done(self) -> bool:
        return True

    def result(self) -> Usage:
        if self.error:
            raise self.error
        assert self.value is not None
        return self.value


class FakeBatch:
    def __init__(self, broker: FakeBroker) -> None:
        self._broker = broker
        self._answers: list[FakeAnswer] = []

    def usage(self, key: str) -> FakeAnswer:
        self._broker.calls.append(("usage", key))
        found = self._broker.usages.get(key)
        answer = FakeAnswer(found, None if found else NotFound(f"snapshot {key!r} does not exist"))
        self._answers.append(answer)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for answer in self._answers:
            if answer.error:
                raise answer.error


@dataclass
class FakeBroker:
    """Remembers what it is asked, and answers what a test laid down."""

    infos: list[Info] = field(default_factory=list)
    usages: dict[str, Usage] = field(default_factory=dict)
    kept: list[Event] = field(default_factory=list)
    oldest: int = 1
    failure: BrokerError | None = None
    failures: dict[str, BrokerError] = field(default_factory=dict)
    progress: list[Progress] = field(default_factory=list)
    workspace_path: Path | None = None
    commit_failure: BrokerError | None = None
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    connected: dict[str, Any] = field(default_factory=dict)

    def connect(self, endpoint: str | None = None, **options: Any) -> FakeBroker:
        self.connected = {"endpoint": endpoint, **options}
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.append(("close",))

    def _called(self, *call: Any) -> None:
        self.calls.append(call)
        if self.failure:
            raise self.failure

    def prepare(self, key: str, parent: str, labels: dict[str, str], *, progress: Any = None) -> Mounts:
        self._called("prepare", key, parent, labels)
        for each in self.progress:
            if progress:
                progress(each)
        return MOUNTS

    def view(self, key: str, parent: str, labels: dict[str, str]) -> Mounts:
        self._called("view", key, parent, labels)
        return MOUNTS

    def mounts(self, key: str, fence: int = 0) -> Mounts:
        self._called("mounts", key, fence)
        return MOUNTS

    def commit(self, name: str, key: str, parent: str, labels: dict[str, str], sync: bool, fence: int) -> None:
        self._called("commit", name, key, parent, labels, sync, fence)

    def remove(self, key: str, fence: int = 0) -> None:
        self._called("remove", key, fence)
        if key in self.failures:
            raise self.failures[key]

    def stat(self, key: str) -> Info:
        self._called("stat", key)
        for each in self.infos:
            if each.name == key:
                return each
        raise NotFound(f"snapshot {key!r} does not exist")

    def update(self, name: str, labels: dict[str, str], fieldpaths: tuple[str, ...]) -> Info:
        self._called("update", name, labels, fieldpaths)
        return Info(name, Kind.ACTIVE, labels={key: value for key, value in labels.items() if value})

    def walk(self, *filters: str) -> Iterator[Info]:
        self._called("walk", *filters)
        return iter(self.infos)

    def batch(self) -> FakeBatch:
        return FakeBatch(self)

    def cleanup(self, *, progress: Any) -> None:
        self._called("cleanup")
        for each in self.progress:
            progress(each)

    def events(self, *, since: int | None, topics: tuple[str, ...], follow: bool) -> Iterator[Event]:
        self._called("events", since, topics, follow)
        if since is not None and since + 1 < self.oldest:
            raise OutOfRange("gone", {"oldest": self.oldest})
        yield from (event for event in self.kept if since is not None and event.sequence > since)

    def status(self) -> StatusAnswer:
        self._called("status")
        return StatusAnswer(
            version="0.1.0",
            pid=17,
            uptime_seconds=90061.5,
            resident_bytes=40 << 20,
            endpoint="ipc:///run/router.sock",
            events_endpoint="ipc:///run/events.sock",
            queues={"front": {"depth": 3}},
            snapshotters=(
                ActorStatus(name="o1", backend="overlayfs", state="ready", pid=18, backlog={"bytes": 4096}),
                ActorStatus(name="n1", backend="native", state="unavailable"),
            ),
        )

    @contextlib.contextmanager
    def workspace(self, **options: Any) -> Iterator[Path]:
        self._called("workspace", options)
        assert self.workspace_path
        try:
            yield self.workspace_path
        except BaseException:
            self.calls.append(("discarded",))
            raise
        if self.commit_failure:
            raise self.commit_failure
        self.calls.append(("committed", options["commit_as"]))


@pytest.fixture
def fake(tmp_path: Path) -> FakeBroker:
    return FakeBroker(workspace_path=tmp_path)


@pytest.fixture
def command(fake: FakeBroker, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in process: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments, connect=fake.connect)  # type: ignore[arg-type]
        out, err = capfd.readouterr()
        return status, out, err

    return run


# The command line itself.


def test_options_stand_before_or_after_the_verb(command: Any, fake: FakeBroker) -> None:
    fake.infos = [info("a")]
    expected = {"endpoint": "tcp://h:1", "namespace": "n", "snapshotter": "s", "timeout": 2.5}
    options = ["-e", "tcp://h:1", "-n", "n", "-s", "s", "--timeout", "2.5", "--json"]
    for line in ([*options, "stat", "a"], ["stat", *options, "a"], ["stat", "a", *options]):
        status, out, _ = command(*line)
        assert status == 0
        assert json.loads(out)["name"] == "a"
        assert fake.connected == expected
    status, out, _ = command(*options[:4], "stat", "a", *options[4:])
    assert fake.connected == expected


def test_what_is_not_given_is_left_to_the_client(command: Any, fake: FakeBroker) -> None:
    command("status")
    assert fake.connected == {"endpoint": None, "namespace": None, "snapshotter": None}
    assert fake.calls[-1] == ("close",)


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["bogus"],
        ["stat"],
        ["rm"],
        ["label", "a"],
        ["label", "a", "novalue"],
        ["label", "a", "=x"],
        ["prepare", "a", "--label", "x"],
        ["events", "--since", "-1"],
        ["events", "--since", "x"],
        ["--timeout", "0", "status"],
        ["--timeout", "nan", "status"],
        ["--timeout", "inf", "status"],
        ["run", "--parent", "p"],
        ["run", "--parent", "p", "--"],
        ["--end", "x", "status"],
    ],
)
def test_a_wrong_command_line_is_status_2(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(line)
    assert left.value.code == 2
    assert "snapbroker" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["run", "--parent", "p", "--", "make", "-j4"], ["make", "-j4"]),
        (["run", "--parent", "p", "make", "-j4"], ["make", "-j4"]),
        (["run", "--", "sh", "-c", "x", "--", "y"], ["sh", "-c", "x", "--", "y"]),
        (["run", "--commit", "c", "--label", "a=b", "--", "--weird"], ["--weird"]),
    ],
)
def test_the_command_of_run_is_taken_as_it_is(line: list[str], expected: list[str]) -> None:
    assert parse(line).command == expected


def test_a_key_may_begin_with_a_dash(command: Any, fake: FakeBroker) -> None:
    fake.infos = [info("-x")]
    assert command("stat", "--", "-x")[0] == 0


def test_the_help_and_the_page_have_the_table_of_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    page = DOCUMENTATION.read_text()
    assert len(statuses()) == len(ERRORS)
    for status, code, meaning in statuses():
        assert f"{status:>3}  {code}: {meaning}" in told
        assert f"| {status} | `{code}` | {meaning} |" in page


def test_the_page_has_every_verb_and_option() -> None:
    page = DOCUMENTATION.read_text()
    verbs: dict[str, argparse.ArgumentParser] = next(
        action.choices for action in _parser()._actions if isinstance(action.choices, dict)
    )
    for verb, parser in verbs.items():
        assert f"`snapbroker {verb}" in page
        for action in parser._actions:
            for option in action.option_strings:
                assert option in page, (verb, option)


@pytest.mark.parametrize("error", ERRORS.values())
def test_every_error_has_its_status_and_one_line(error: type[BrokerError], command: Any, fake: FakeBroker) -> None:
    fake.failure = error("first line\nsecond line")
    status, out, err = command("stat", "a")
    assert status == error.exit_status
    assert not out
    assert err.startswith(f"snapbroker: {error.code}: first line second line")
    assert err.count("\n") == 1


def test_errors_say_what_to_do() -> None:
    assert "repeat in 1.5 s" in complaint(ResourceExhausted("full", {"retry_after_ms": 1500}))
    assert "--timeout" in complaint(DeadlineExceeded("late"))
    assert "snapbroker ls" in complaint(NotFound("no such snapshot"))
    assert "snapbroker ls" in complaint(NotFound("snapshot 'a: b' does not exist"))
    assert "snapbroker tree" in complaint(FailedPrecondition("cannot remove snapshot with child: 'base'"))
    assert "commit it first" in complaint(FailedPrecondition("parent 'a' is active, not committed"))
    assert "-n" in complaint(FailedPrecondition("namespace is required: name one"))


@pytest.mark.parametrize(
    "message", ["no snapshotter 'nix'; there are: native", "mount point /x does not exist: make the directory first"]
)
def test_errors_that_say_what_to_do_are_left_alone(message: str) -> None:
    assert complaint(NotFound(message)) == f"snapbroker: not_found: {message}"


def test_every_variable_of_the_environment_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    told = capsys.readouterr().out
    page = DOCUMENTATION.read_text()
    for name in vars(endpoints):
        if name.endswith("_VARIABLE"):
            assert getattr(endpoints, name) in told
            assert f"`{getattr(endpoints, name)}`" in page


# Each verb.


@pytest.mark.parametrize("verb", ["prepare", "view"])
def test_prepare_and_view(verb: str, command: Any, fake: FakeBroker) -> None:
    status, out, _ = command("--json", verb, "k", "p", "--label", "a=b=c", "--label", "d=")
    assert status == 0
    assert json.loads(out) == [
        {"type": "bind", "source": "/srv/1/fs", "options": ["rw", "rbind"], "target": "", "fence": 17}
    ]
    assert fake.calls[0] == (verb, "k", "p", {"a": "b=c", "d": ""})
    status, out, _ = command(verb, "k")
    assert out == "bind of /srv/1/fs\n    rw\n    rbind\n"
    assert (verb, "k", "", {}) in fake.calls


def test_mounts(command: Any, fake: FakeBroker) -> None:
    _, out, _ = command("mounts", "k", "--json")
    assert json.loads(out)[0]["source"] == "/srv/1/fs"
    assert json.loads(out)[0]["fence"] == 17
    command("mounts", "k", "--fence", "17")
    assert [call for call in fake.calls if call[0] == "mounts"] == [("mounts", "k", 0), ("mounts", "k", 17)]


@pytest.mark.parametrize("line", [["commit", "n", "k"], ["rm", "k"], ["mounts", "k"]])
@pytest.mark.parametrize("fence", ["0", "-1", "x", str(FENCE_MAX + 1)])
def test_a_fence_is_a_number_above_0(line: list[str], fence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse([*line, f"--fence={fence}"])
    assert left.value.code == 2
    assert "is not a fencing number" in capsys.readouterr().err


def test_a_fence_is_of_one_snapshot(command: Any, fake: FakeBroker) -> None:
    with pytest.raises(SystemExit) as left:
        command("rm", "a", "b", "--fence", "3")
    assert left.value.code == 2
    command("rm", "a", "--fence", "3")
    assert [call for call in fake.calls if call[0] == "remove"] == [("remove", "a", 3)]


def test_commit(command: Any, fake: FakeBroker) -> None:
    status, out, _ = command("commit", "n", "k")
    assert (status, out) == (0, "")
    line = ["commit", "n", "k", "--sync", "--parent", "p", "--label", "a=b", "--fence", "17", "--json"]
    status, out, _ = command(*line)
    assert json.loads(out) == {"name": "n", "key": "k"}
    commits = [call for call in fake.calls if call[0] == "commit"]
    assert commits == [("commit", "n", "k", "", {}, False, 0), ("commit", "n", "k", "p", {"a": "b"}, True, 17)]


def test_rm_goes_on_after_an_error_and_ends_with_the_first_status(command: Any, fake: FakeBroker) -> None:
    fake.failures = {"b": FailedPrecondition("has children"), "c": NotFound("none")}
    status, out, err = command("--json", "rm", "a", "b", "c", "d")
    assert status == FailedPrecondition.exit_status
    assert json.loads(out) == {"removed": ["a", "d"]}
    assert [line.split(": ")[1] for line in err.splitlines()] == ["failed_precondition", "not_found"]


def test_stat(command: Any, fake: FakeBroker) -> None:
    fake.infos = [info("a", "p", Kind.ACTIVE, zone="1"), info("b")]
    _, out, _ = command("--json", "stat", "a")
    assert json.loads(out) == {
        "name": "a", "kind": "active", "parent": "p", "labels": {"zone": "1"}, "created": MOMENT, "updated": MOMENT,
    }  # fmt: skip
    _, out, _ = command("--json", "stat", "b")
    assert json.loads(out)["labels"] == {}
    assert json.loads(out)["parent"] == ""
    _, out, _ = command("stat", "a")
    assert "created  2023-11-14T22:13:20Z\n" in out
    assert "label    zone=1\n" in out


def test_label_sets_and_deletes(command: Any, fake: FakeBroker) -> None:
    _, out, _ = command("label", "a", "x=1", "y=", "containerd.io/gc.root=2", "--json")
    assert fake.calls[0] == (
        "update", "a", {"x": "1", "y": "", "containerd.io/gc.root": "2"},
        ("labels.x", "labels.y", "labels.containerd.io/gc.root"),
    )  # fmt: skip
    assert json.loads(out)["labels"] == {"x": "1", "containerd.io/gc.root": "2"}


def test_usage_of_some_and_of_all(command: Any, fake: FakeBroker) -> None:
    fake.usages = {"a": Usage(2, 8192), "b": Usage(1, 512)}
    fake.infos = [info("a"), info("gone"), info("b")]
    _, out, _ = command("usage", "--json")
    assert json.loads(out) == {
        "snapshots": [{"key": "a", "inodes": 2, "size": 8192}, {"key": "b", "inodes": 1, "size": 512}],
        "total": {"inodes": 3, "size": 8704},
    }
    status, out, err = command("usage", "a", "gone")
    assert status == NotFound.exit_status
    assert "gone" in err
    _, out, _ = command("usage", "b", "a")
    assert out.splitlines() == [
        "KEY    INODES     SIZE",
        "b           1    512 B",
        "a           2  8.0 KiB",
        "total       3  8.5 KiB",
    ]


def test_ls(command: Any, fake: FakeBroker) -> None:
    fake.infos = [info("a", x="1", b="2"), info("long name", "a", Kind.VIEW)]
    _, out, _ = command("ls", "kind==view", "name~=a,parent==b", "--json")
    assert [each["name"] for each in json.loads(out)] == ["a", "long name"]
    assert fake.calls[0] == ("walk", "kind==view", "name~=a,parent==b")
    _, out, _ = command("ls")
    assert out.splitlines() == [
        "NAME       KIND       PARENT  CREATED               LABELS",
        "a          committed          2023-11-14T22:13:20Z  b=2 x=1",
        "long name  view       a       2023-11-14T22:13:20Z",
    ]
    fake.infos = []
    assert command("ls", "--json")[1] == "[]\n"
    assert command("ls")[1] == "NAME  KIND  PARENT  CREATED  LABELS\n"


def test_names_cannot_talk_to_the_terminal(command: Any, fake: FakeBroker) -> None:
    fake.infos = [info("\x1b[31mred\n", kind=Kind.ACTIVE, **{"\x07": "[bold]"})]
    for verb in ("ls", "tree"):
        _, out, _ = command(verb)
        assert "\\x1b[31mred\\n" in out
        assert not any(ord(letter) < 32 and letter != "\n" for letter in out)
    _, out, _ = command("ls", "--json")
    assert json.loads(out)[0]["name"] == "\x1b[31mred\n"


def test_tree(command: Any, fake: FakeBroker) -> None:
    fake.infos = [
        info("base"),
        info("job", "two", Kind.ACTIVE),
        info("one", "base"),
        info("orphan", "elsewhere"),
        info("two", "base"),
        info("x", "one", Kind.VIEW),
    ]
    _, out, _ = command("tree")
    assert out.splitlines() == [
        "base  committed",
        "├── one  committed",
        "│   └── x  view",
        "└── two  committed",
        "    └── job  active",
        "orphan  committed",
    ]
    _, out, _ = command("tree", "--json")
    found = [(each["name"], each["depth"]) for each in json.loads(out)]
    assert found == [("base", 0), ("one", 1), ("x", 2), ("two", 1), ("job", 2), ("orphan", 0)]


def test_a_tree_as_deep_as_chains_go(command: Any, fake: FakeBroker) -> None:
    fake.infos = [info("0"), *(info(str(number), str(number - 1)) for number in range(1, 3000))]
    _, out, _ = command("tree", "--json")
    assert json.loads(out)[-1]["depth"] == 2999
    _, out, _ = command("tree")
    assert len(out.splitlines()) == 3000


def event(sequence: int, verb: str, key: str = "", about: Info | None = None) -> Event:
    return Event(sequence, 0, MOMENT, "o", "default", verb, key, about)


def test_events_that_are_kept(command: Any, fake: FakeBroker) -> None:
    fake.kept = [
        event(1, "prepare", "k", info("k", "base", Kind.ACTIVE)),
        event(2, "commit", "k", info("layer", "base")),
        event(3, "remove", "layer"),
    ]
    _, out, _ = command("events")
    assert fake.calls[0] == ("events", 0, (), False)
    assert out.splitlines() == [
        "       1 2023-11-14T22:13:20Z o/default/snapshot/prepare k (parent base)",
        "       2 2023-11-14T22:13:20Z o/default/snapshot/commit k -> layer (parent base)",
        "       3 2023-11-14T22:13:20Z o/default/snapshot/remove layer",
    ]
    _, out, _ = command("events", "--since", "1", "--json", "o/default/", "o/other/")
    assert fake.calls[-2] == ("events", 1, ("o/default/", "o/other/"), False)
    documents = [json.loads(line) for line in out.splitlines()]
    assert [document["sequence"] for document in documents] == [2, 3]
    assert documents[0]["topic"] == "o/default/snapshot/commit"
    assert documents[0]["info"]["name"] == "layer"
    assert documents[1]["info"] is None


def test_events_in_json_have_every_field(command: Any, fake: FakeBroker) -> None:
    fake.kept = [event(1, "prepare", "k", Info("k", Kind.ACTIVE)), event(2, "cleanup")]
    documents = [json.loads(line) for line in command("events", "--json")[1].splitlines()]
    every = {"name": "k", "kind": "active", "parent": "", "labels": {}, "created": 0, "updated": 0}
    assert documents[0]["info"] == every
    assert set(documents[0]) == {*Event.__struct_fields__, "topic"}
    assert documents[1] == {**documents[1], "key": "", "info": None}
    assert set(documents[1]) == set(documents[0])


def test_events_begin_with_the_oldest_kept(command: Any, fake: FakeBroker) -> None:
    fake.oldest = 7
    fake.kept = [event(7, "remove", "a")]
    status, out, _ = command("events", "--json")
    assert status == 0
    assert json.loads(out)["sequence"] == 7
    status, _, err = command("events", "--since", "2")
    assert status == OutOfRange.exit_status
    assert "out_of_range" in err


def test_following_begins_with_what_comes(command: Any, fake: FakeBroker) -> None:
    command("events", "--follow")
    command("events", "-f", "--since", "5")
    assert [call for call in fake.calls if call[0] == "events"] == [
        ("events", None, (), True),
        ("events", 5, (), True),
    ]


def test_cleanup(command: Any, fake: FakeBroker) -> None:
    fake.progress = [Progress(entries=1, bytes=10), Progress(entries=5, bytes=50)]
    assert command("cleanup")[:2] == (0, "")
    _, out, _ = command("cleanup", "--json")
    assert json.loads(out) == {"entries": 5, "bytes": 50}


def test_status(command: Any) -> None:
    _, out, _ = command("status", "--json")
    document = json.loads(out)
    assert document["pid"] == 17
    assert document["resident_bytes"] == 40 << 20
    assert [each["name"] for each in document["snapshotters"]] == ["o1", "n1"]
    assert document["snapshotters"][1]["restarts"] == 0
    _, out, _ = command("status")
    assert "broker 0.1.0, pid 17, up 1 d 1 h, 40.0 MiB resident" in out
    assert re.search(r"^o1 +overlayfs +ready +18 ", out, re.MULTILINE)
    assert re.search(r"^broker +front +depth 3$", out, re.MULTILINE)
    assert re.search(r"^o1 +to delete +bytes 4.0 KiB$", out, re.MULTILINE)


def test_unmount_needs_no_broker(command: Any, fake: FakeBroker, tmp_path: Path) -> None:
    status, _, err = command("unmount", str(tmp_path))
    assert status == FailedPrecondition.exit_status
    assert "is not a mount point" in err
    assert not fake.connected


@pytest.mark.root
def test_mount_and_unmount(fake: FakeBroker, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "file").write_text("")
    monkeypatch.setattr(sys.modules[__name__], "MOUNTS", Mounts([Mount("bind", str(source), ("ro", "rbind"))]))
    status, out, _ = command("mount", "k", str(target), "--json")
    try:
        assert status == 0
        assert json.loads(out)["target"] == str(target)
        assert (target / "file").exists()
    finally:
        assert command("unmount", str(target))[0] == 0
    assert not (target / "file").exists()


# A command in a workspace.


def test_run_commits_on_success(command: Any, fake: FakeBroker, tmp_path: Path) -> None:
    line = ["--parent", "p", "--commit", "c", "--sync", "--label", "a=b", "--", "sh", "-c", "pwd; echo 1 > made"]
    status, out, _ = command("run", *line)
    assert (status, out) == (0, f"{tmp_path}\n")
    assert (tmp_path / "made").read_text() == "1\n"
    assert fake.calls[0] == ("stat", "c")
    options = fake.calls[1][1]
    assert re.fullmatch(r"run-[0-9a-f]{32}", options.pop("key"))
    assert options == {"parent": "p", "commit_as": "c", "labels": {"a": "b"}, "sync": True, "keep_uncommitted": True}
    assert fake.calls[2] == ("committed", "c")


def test_run_of_a_name_that_is_taken_runs_nothing(command: Any, fake: FakeBroker, tmp_path: Path) -> None:
    fake.infos = [info("c")]
    status, _, err = command("run", "--commit", "c", "--", "touch", "made")
    assert status == AlreadyExists.exit_status
    assert not (tmp_path / "made").exists()
    assert [call[0] for call in fake.calls] == ["stat", "close"]
    assert "the command was not run; choose another" in err


def test_run_tells_what_became_of_the_work(command: Any, fake: FakeBroker) -> None:
    fake.commit_failure = FailedPrecondition("the mount is busy")
    status, _, err = command("run", "--commit", "c", "--", "true")
    assert status == FailedPrecondition.exit_status
    assert err.endswith("busy; what the command made is discarded\n")
    fake.commit_failure = AlreadyExists("snapshot 'c' exists")
    fake.commit_failure.add_note("the work is kept in the active snapshot 'run-1'")
    _, _, err = command("run", "--commit", "c", "--", "true")
    assert err.endswith("; the work is kept in the active snapshot 'run-1'\n")
    assert "discarded" not in err


@pytest.mark.parametrize(
    ("script", "expected"),
    [("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137), ("exit 255", 255)],
)
def test_run_discards_on_failure(command: Any, fake: FakeBroker, script: str, expected: int) -> None:
    status, out, _ = command("--json", "run", "--commit", "c", "--", "sh", "-c", script)
    assert status == expected
    assert json.loads(out) == {"parent": "", "committed": None, "status": expected}
    assert fake.calls[2] == ("discarded",)


def test_run_of_what_cannot_be_run(command: Any, fake: FakeBroker, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("")
    assert command("run", "no-such-command-here")[0] == 127
    status, _, err = command("run", "./text")
    assert status == 126
    assert err == "snapbroker: cannot run ./text: Permission denied\n"
    assert ("committed", None) not in fake.calls


def test_run_passes_on_the_brokers_error(command: Any, fake: FakeBroker) -> None:
    fake.failure = AlreadyExists("taken")
    assert command("run", "true")[0] == AlreadyExists.exit_status


IN_PROCESS = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_command
from snapbroker.command import main
fake = test_command.FakeBroker(workspace_path=Path({path!r}))
status = main({line!r}, connect=fake.connect)
print([call[0] for call in fake.calls], file=sys.stderr)
sys.exit(status)
"""


def started(path: Path, *line: str, **options: Any) -> Any:
    """The command with the fake broker in a process of its own, its calls on stderr at the end."""
    # Tests run under nohup ignore the hang-up, and so would what they start.
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    script += IN_PROCESS.format(tests=str(Path(__file__).parent), path=str(path), line=list(line))
    return subprocess.Popen([sys.executable, "-c", script], **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("handled", [False, True], ids=["dies", "ends well"])
def test_an_interrupted_run_is_discarded(tmp_path: Path, number: signal.Signals, handled: bool) -> None:
    # No child of the shell sleeps long: one that is killed before it has become the sleep may not notice.
    handler = "trap 'exit 0' INT TERM HUP; echo ready; while :; do sleep 0.05; done"
    script = handler if handled else "echo ready; exec sleep 60"
    process = started(
        tmp_path, "run", "--commit", "c", "--", "sh", "-c", script,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number
    assert err.decode().splitlines()[-1] == "['stat', 'workspace', 'discarded', 'close']"


def test_the_keyboards_signal_reaches_the_command_once(tmp_path: Path) -> None:
    """On a terminal both are signalled by it; the command counts what arrives."""
    script = "n=0; trap 'n=$((n+1))' INT; echo ready; read line; echo got $n; exit 5"
    leader, follower = pty.openpty()
    terminal = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
    code = terminal + IN_PROCESS.format(
        tests=str(Path(__file__).parent), path=str(tmp_path), line=["run", "--", "sh", "-c", script]
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=follower, stdout=follower, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    with os.fdopen(leader, "r+b", buffering=0) as keyboard:
        seen = b""
        while b"ready" not in seen:
            seen += keyboard.read(100)
        keyboard.write(b"\x03")
        while b"^C" not in seen:
            seen += keyboard.read(100)
        keyboard.write(b"go\n")
        while b"got" not in seen or not seen.endswith(b"\n"):
            seen += keyboard.read(100)
        _, err = process.communicate()
    assert b"got 1" in seen
    assert process.returncode == 5
    assert err.decode().splitlines()[-1] == "['workspace', 'discarded', 'close']"


def test_a_signal_before_the_command_discards(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fake = FakeBroker(workspace_path=tmp_path)

    @contextlib.contextmanager
    def interrupted(**_: Any) -> Iterator[Path]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield tmp_path

    fake.workspace = interrupted  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGTERM)
    assert main(["run", "touch", "made"], connect=fake.connect) == 143  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGTERM) == before
    assert fake.calls[0][0] == "remove"
    assert not (tmp_path / "made").exists()


# The outside world.


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    script = IN_PROCESS.replace("status =", "fake.infos = [test_command.info('n' * 100)] * 20000\nstatus =").format(
        tests=str(Path(__file__).parent), path=str(tmp_path), line=["ls"]
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert err == b"['walk', 'close']\n"


def on_a_terminal(tmp_path: Path, *line: str, **setup: str) -> str:
    """What a terminal of 60 columns is sent."""
    leader, follower = pty.openpty()
    code = IN_PROCESS.replace("status =", f"{setup.get('setup', '')}\nstatus =").format(
        tests=str(Path(__file__).parent), path=str(tmp_path), line=list(line)
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=follower, stderr=follower, stdin=follower, env=environment
    )
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(leader, 4096):
            shown += chunk
    os.close(leader)
    assert process.wait() == 0
    return shown.decode()


def test_a_terminal_gets_colours_and_loses_nothing(tmp_path: Path) -> None:
    name = "layer-" + "0123456789" * 8
    setup = f"fake.infos = [test_command.info({name!r}), test_command.info('[red]job', {name!r})]"
    listed = on_a_terminal(tmp_path, "ls", setup=setup)
    assert "\x1b[" in listed
    assert "[red]job" in listed
    assert "…" not in listed
    tree = on_a_terminal(tmp_path, "tree", setup=setup)
    assert name in tree
    assert "└── " in tree


def test_progress_shows_on_a_terminal_only(tmp_path: Path) -> None:
    setup = "fake.progress = [test_command.Progress(entries=5, bytes=4096)]"
    assert "preparing k: 5 entries, 4.0 KiB" in on_a_terminal(tmp_path, "prepare", "k", setup=setup)
    assert "preparing" not in on_a_terminal(tmp_path, "prepare", "k", "--json", setup=setup)


def test_nothing_to_draw_with_is_loaded_without_a_terminal(tmp_path: Path) -> None:
    script = IN_PROCESS.replace("sys.exit(status)", "print('rich' in sys.modules)").format(
        tests=str(Path(__file__).parent), path=str(tmp_path), line=["status", "--json"]
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1048575, "1.0 MiB"), (5 << 30, "5.0 GiB"), (2**63, "8.0 EiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert words.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (200_000, "2 d 7 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


def test_a_time_that_is_not_known_is_empty() -> None:
    assert words.moment(0) == ""


# As a user types it, against a real broker.


@dataclass
class Shell:
    """A running broker and the command for it."""

    environment: dict[str, str]
    directory: Path

    def __call__(self, *line: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [SNAPBROKER, *line],
            env=self.environment, capture_output=True, text=True, check=False, timeout=60, **options,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, done.stderr
        return done

    def json(self, *line: str) -> Any:
        return json.loads(self("--json", *line).stdout)


def wait_for_broker(process: subprocess.Popen[bytes], endpoint: str) -> None:
    """Until the overlayfs snapshotter answers; every attempt waits for the socket, and then for the snapshotter."""
    give_up = time.monotonic() + 30
    while True:
        try:
            with snapbroker.connect(endpoint, snapshotter="overlayfs", timeout=5) as broker:
                broker.stat("nothing")
        except NotFound:
            return
        except (Unavailable, DeadlineExceeded):
            if process.poll() is not None or time.monotonic() > give_up:
                raise


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A private `snapbrokerd`, stopped by SIGTERM."""
    directory = tmp_path_factory.mktemp("snapbroker")
    line = [str(SNAPBROKERD), "--root", str(directory / "root"), "--runtime", str(directory / "run")]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(line, stderr=log)
    endpoint = f"ipc://{directory}/run/router.sock"
    try:
        wait_for_broker(process, endpoint)
        environment = {**os.environ, "SNAPBROKER_ENDPOINT": endpoint, "SNAPBROKER_SNAPSHOTTER": "overlayfs"}
        yield Shell(environment, directory)
    finally:
        process.terminate()
        assert process.wait(30) == 0, (directory / "log").read_text()[-4000:]


@pytest.mark.root
def test_a_layer_is_unpacked(broker: Shell) -> None:
    """The first of the contract's stories, from a shell."""
    target = broker.directory / "target"
    target.mkdir()
    assert broker.json("prepare", "unpack-1", "--label", "story=1")[0]["type"] == "bind"
    broker("mount", "unpack-1", str(target))
    (target / "file").write_text("content")
    assert broker.json("usage", "unpack-1")["total"]["inodes"] == 2
    broker("unmount", str(target))
    broker("commit", "layer-1", "unpack-1", "--sync", "--label", "layer=1")
    assert broker("stat", "unpack-1", check=False).returncode == NotFound.exit_status
    found = broker.json("stat", "layer-1")
    assert (found["kind"], found["labels"]) == ("committed", {"layer": "1"})

    broker("view", "look-1", "layer-1")
    broker("mount", "look-1", str(target))
    try:
        assert (target / "file").read_text() == "content"
        with pytest.raises(OSError, match="Read-only"):
            (target / "other").write_text("")
    finally:
        broker("unmount", str(target))
    refused = broker("rm", "layer-1", check=False)
    assert refused.returncode == FailedPrecondition.exit_status
    assert refused.stderr.startswith("snapbroker: failed_precondition: ")
    assert broker.json("rm", "look-1", "layer-1") == {"removed": ["look-1", "layer-1"]}
    broker("cleanup")
    verbs = [json.loads(line)["verb"] for line in broker("--json", "events").stdout.splitlines()]
    assert verbs[:5] == ["prepare", "commit", "view", "remove", "remove"]


@pytest.mark.root
def test_a_build_runs(broker: Shell) -> None:
    line = ["--commit", "base-run", "--label", "a=b", "--", "sh", "-c", "mkdir -p d && echo 1 > d/f && pwd"]
    path = broker("run", *line).stdout.strip()
    assert not Path(path).exists()
    assert broker.json("stat", "base-run")["labels"]["a"] == "b"
    seen = broker("run", "--parent", "base-run", "--commit", "next-run", "--", "cat", "d/f")
    assert seen.stdout == "1\n"
    script = "rm -r d; exit 9"
    failed = broker("run", "--parent", "next-run", "--commit", "never", "--", "sh", "-c", script, check=False)
    assert failed.returncode == 9
    assert broker("stat", "never", check=False).returncode == NotFound.exit_status
    kept = broker("run", "--parent", "next-run", "--", "cat", "d/f")
    assert kept.stdout == "1\n"
    assert [each["name"] for each in broker.json("ls", "kind==active")] == []
    tree = broker.json("tree")
    assert [(each["name"], each["depth"]) for each in tree if each["name"].endswith("-run")] == [
        ("base-run", 0),
        ("next-run", 1),
    ]
    assert "snapbroker-" not in Path("/proc/self/mountinfo").read_text()
    broker("rm", "next-run", "base-run")


@pytest.mark.root
def test_an_interrupted_build_leaves_nothing(broker: Shell) -> None:
    process = subprocess.Popen(
        [SNAPBROKER, "run", "--commit", "never", "--", "sh", "-c", "echo in; exec sleep 60"],
        env=broker.environment, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == b"in\n"
    os.killpg(process.pid, signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert broker.json("ls", 'name=="never"', "kind==active") == []


@pytest.mark.root
def test_labels_filters_and_listings(broker: Shell) -> None:
    for name in ("f-1", "f-2", "with space", "-dash"):
        broker("prepare", "--", name)
    assert broker.json("label", "f-1", "x=1", "y=2")["labels"] == {"x": "1", "y": "2"}
    assert broker.json("label", "f-1", "x=", "z=3")["labels"] == {"y": "2", "z": "3"}
    assert [each["name"] for each in broker.json("ls", "name~=^f-")] == ["f-1", "f-2"]
    assert [each["name"] for each in broker.json("ls", "labels.z==3", 'name=="with space"')] == ["f-1", "with space"]
    bad = broker("ls", "name=x", check=False)
    assert bad.returncode == 2
    assert bad.stderr.startswith("snapbroker: invalid_argument: ")
    assert "with space  active" in broker("ls").stdout
    taken = broker("prepare", "f-1", check=False)
    assert taken.returncode == AlreadyExists.exit_status
    broker("rm", "--", "f-1", "f-2", "with space", "-dash")


@pytest.mark.root
def test_followed_events_arrive_as_they_happen(broker: Shell) -> None:
    broker("prepare", "before")
    broker("rm", "before")
    newest = json.loads(broker("--json", "events").stdout.splitlines()[-1])["sequence"]
    process = subprocess.Popen(
        [SNAPBROKER, "--json", "events", "--follow", "--since", str(newest)],
        env=broker.environment, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    try:
        broker("prepare", "followed")
        first = json.loads(process.stdout.readline())
        broker("rm", "followed")
        second = json.loads(process.stdout.readline())
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert (first["verb"], first["key"]) == ("prepare", "followed")
    assert (second["verb"], second["key"]) == ("remove", "followed")
    assert first["topic"] == "overlayfs/default/snapshot/prepare"
    assert process.returncode == 130


@pytest.mark.root
def test_status_of_a_real_broker(broker: Shell) -> None:
    found = broker.json("status")
    names = {each["name"] for each in found["snapshotters"]}
    assert "overlayfs" in names
    assert all(each["pid"] for each in found["snapshotters"] if each["state"] == "ready")
    assert "overlayfs" in broker("status").stdout


def test_no_broker_is_told_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [SNAPBROKER, "-e", str(tmp_path / "none"), "--timeout", "0.3", "stat", "a"],
        capture_output=True, text=True, check=False, env={**os.environ, "SNAPBROKER_SNAPSHOTTER": "overlayfs"},
    )  # fmt: skip
    assert done.returncode in (Unavailable.exit_status, DeadlineExceeded.exit_status)
    assert done.stderr.count("\n") == 1
    assert "snapbrokerd" in done.stderr
