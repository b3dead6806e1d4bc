"""The samples of every language, run as a user runs them: same arguments, same output, same exit status."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from snapbroker import mount
from snapbroker.blocking import Broker
from snapbroker.contract import Info
from tests.conformance.languages import LANGUAGES, Language
from tests.conformance.programs import ANSWER_S, Program
from tests.harness import Daemon

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

WITH_SAMPLES = [language for language in LANGUAGES if language.samples]
KEPT = 20
"""Events that the journal of the snapshotter `short` keeps."""
SOON_S = 30.0
"""Until somebody who has typed a wrong endpoint must know, on a busy machine; the clients wait some seconds."""

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    short = {"backend": "memory", "limits": {"journal": {"events_max": KEPT}}}
    publisher = {"send_queue_max": 100, "heartbeat_ms": 200}
    with Daemon({"overlayfs": {}, "short": short}, publisher=publisher) as daemon:
        yield daemon


@pytest.fixture(params=WITH_SAMPLES, ids=[language.name for language in WITH_SAMPLES])
def samples(request: pytest.FixtureRequest, daemon: Daemon) -> Iterator[Samples]:
    request.param.make()
    with Samples(request.param, daemon) as samples:
        yield samples


class Samples:
    """The samples of one language, in a namespace of their own."""

    def __init__(self, language: Language, daemon: Daemon) -> None:
        self.daemon = daemon
        self.namespace = f"samples-{next(_numbers)}"
        self._language = language
        self._undo = contextlib.ExitStack()

    def broker(self, snapshotter: str = "overlayfs") -> Broker:
        """The harness's own client."""
        client = self.daemon.client(snapshotter, self.namespace, patience=ANSWER_S, connect_timeout=ANSWER_S)
        return self._undo.enter_context(client)

    def environment(self, snapshotter: str) -> dict[str, str]:
        """Where the broker is."""
        return {
            "SNAPBROKER_ENDPOINT": self.daemon.endpoint,
            "SNAPBROKER_NAMESPACE": self.namespace,
            "SNAPBROKER_SNAPSHOTTER": snapshotter,
        }

    def start(self, sample: str, *arguments: str, snapshotter: str = "overlayfs") -> Program[str]:
        """Run a sample beside the test."""
        command = (*self._language.samples[sample], *arguments)
        name = f"{self._language.name}'s {sample}"
        program = Program(name, command, self.environment(snapshotter), lambda line: line.decode().removesuffix("\n"))
        return self._undo.enter_context(program)

    def run(
        self,
        sample: str,
        *arguments: str,
        status: int = 0,
        under: tuple[str, ...] = (),
        within: float = ANSWER_S,
        **environment: str,
    ) -> str:
        """Run a sample to its end; answers its output, or what it said on stderr where it fails as it must."""
        done = subprocess.run(
            (*under, *self._language.samples[sample], *arguments),
            env={**_environment(), **self.environment("overlayfs"), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=within,
            check=False,
        )
        assert done.returncode == status, f"{done.args}: {done.returncode}\n{done.stdout}{done.stderr}"
        if status:
            assert not done.stdout, done.stdout
            return done.stderr
        assert not done.stderr, done.stderr
        return done.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("SNAPBROKER_")}


def ends_well(program: Program[str], number: signal.Signals) -> None:
    program.process.send_signal(number)
    program.finish()


# tail.


def expected(events: Any) -> list[str]:
    """What `snapbroker --json events` prints."""
    lines = []
    for event in events:
        info: dict[str, Any] | None = None
        if event.info is not None:
            info = {name: getattr(event.info, name) for name in Info.__struct_fields__}
        line = {name: getattr(event, name) for name in event.__struct_fields__} | {"info": info, "topic": event.topic}
        lines.append(json.dumps(line, separators=(",", ":"), ensure_ascii=False))
    return lines


def test_tail_prints_the_journal(samples: Samples) -> None:
    broker = samples.broker()
    broker.prepare('é "quoted" \\ 牛😀\n', labels={"a": "<&>", "b": "\x01"})
    broker.commit("base", 'é "quoted" \\ 牛😀\n')
    broker.view("look", "base")
    broker.remove("look")
    everything = expected(broker.events(0, follow=False))
    assert samples.run("tail").splitlines() == everything
    since = str(json.loads(everything[1])["sequence"])
    assert samples.run("tail", "--since", since).splitlines() == everything[2:]
    topic = f"overlayfs/{samples.namespace}/snapshot/view"
    assert samples.run("tail", topic, f"overlayfs/{samples.namespace}/snapshot/commit").splitlines() == everything[1:3]
    complaint = samples.run("tail", "--since", "999999999", status=13)
    assert re.fullmatch(r"tail: out_of_range: [^\n]+\n", complaint)
    assert re.match(r"tail: invalid_argument: ", samples.run("tail", "elsewhere/", status=2))
    assert samples.run("tail", "--bogus", status=2)
    assert "--follow" in samples.run("tail", "--help")


def test_tail_begins_with_what_is_kept(samples: Samples) -> None:
    broker = samples.broker("short")
    for number in range(KEPT + 5):
        broker.prepare(f"key-{number}")
    told = samples.run("tail", SNAPBROKER_SNAPSHOTTER="short").splitlines()
    assert [json.loads(line)["key"] for line in told] == [f"key-{number}" for number in range(5, KEPT + 5)]


def test_tail_follows_across_a_restart(samples: Samples) -> None:
    broker = samples.broker()
    broker.prepare("first")
    tail = samples.start("tail", "--follow")
    tail.wait_for(lambda lines: len(lines) == 1, "event from the journal")
    broker.prepare("second")
    tail.wait_for(lambda lines: len(lines) == 2, "event that came")
    samples.daemon.kill()
    samples.daemon.start()
    broker.prepare("third")
    tail.wait_for(lambda lines: len(lines) == 3, "event after the restart")
    assert tail.lines == expected(broker.events(0, follow=False))
    ends_well(tail, signal.SIGTERM)


@pytest.mark.parametrize("sample", ["watch", "farm", "tail"])
def test_a_broker_that_is_not_there(samples: Samples, sample: str) -> None:
    nobody = f"ipc://{samples.daemon.place}/nobody.sock"
    complaint = samples.run(sample, status=6, within=SOON_S, SNAPBROKER_ENDPOINT=nobody)
    assert re.fullmatch(rf"{sample}: unavailable: [^\n]+\n", complaint)


# watch.


def test_watch_mirrors_what_exists(samples: Samples) -> None:
    broker = samples.broker()
    broker.prepare("making")
    broker.commit("base", "making")
    broker.prepare("job-1", "base")
    watch = samples.start("watch")
    newest = broker.walk().sequence
    head = ['= committed "base"', '= active "job-1" on "base"', f"-- 2 snapshots at {newest}"]
    watch.wait_for(lambda lines: lines == head, "first picture")
    broker.prepare('é\n"', "base")
    broker.view("look", "base")
    samples.daemon.kill()
    samples.daemon.start()
    broker.commit("layer-1", 'é\n"')
    broker.update("layer-1", {"owner": "ci", "é": "牛", "a": '"'})
    broker.remove("look")
    broker.cleanup()
    broker.remove("job-1")
    tail = [
        '+ active "é\\n\\"" on "base"',
        '+ view "look" on "base"',
        '> committed "layer-1" on "base" from "é\\n\\""',
        '~ committed "layer-1" on "base" {"a":"\\"","owner":"ci","é":"牛"}',
        '- "look"',
        '- "job-1"',
    ]
    watch.wait_for(lambda lines: len(lines) >= len(head) + len(tail), "picture of the changes")
    assert watch.lines == head + tail
    ends_well(watch, signal.SIGINT)


def test_watch_walks_again_where_the_journal_ends(samples: Samples) -> None:
    broker = samples.broker("short")
    for key in ("goes", "stays", "changes"):
        broker.prepare(key)
    watch = samples.start("watch", snapshotter="short")
    watch.wait_for(lambda lines: len(lines) == 4, "first picture")
    with watch.stopped():
        broker.remove("goes")
        broker.update("changes", {"k": "v"})
        with broker.batch() as batch:
            for number in range(500):
                batch.prepare(f"comes-and-goes-{number}", labels={"l": "x" * 4000})
        with broker.batch() as batch:
            for number in range(500):
                batch.remove(f"comes-and-goes-{number}")
        broker.prepare("comes")
    newest = broker.walk().sequence
    watch.wait_for(lambda lines: lines[-1] == f"-- 3 snapshots at {newest}", "second picture")
    # How much of the burst was in the socket before it was continued is the kernel's; all lines lead to what is there.
    assert mirrored(watch.lines) == {'"stays"', '"changes"', '"comes"'}
    assert [line for line in watch.lines if line.startswith("~")] == ['~ active "changes" {"k":"v"}']
    broker.remove("comes")
    watch.wait_for(lambda lines: lines[-1] == '- "comes"', "event after it")
    ends_well(watch, signal.SIGTERM)


def mirrored(lines: list[str]) -> set[str]:
    """The names that are there after the lines of a watch; each comes before it goes, and comes once."""
    names: set[str] = set()
    for line in lines:
        mark, *words = line.split(" ")
        if mark == "-":
            names.remove(words[0])
        elif mark in ("+", "="):
            assert words[1] not in names, line
            names.add(words[1])
        elif mark == "~":
            assert words[1] in names, line
    return names


# farm.


FIGURES = {"workspaces", "callers", "base", "mounted", "prepare_ms", "use_ms", "commit_ms", "seconds", "per_second"}


def test_farm_uses_workspaces_and_leaves_nothing(samples: Samples) -> None:
    broker = samples.broker()
    before = set(Path(tempfile.gettempdir()).iterdir())
    summary = json.loads(samples.run("farm", "--json", "--count", "30"))
    assert summary.keys() == FIGURES
    assert (summary["workspaces"], summary["callers"], summary["mounted"]) == (30, 16, True)
    assert re.fullmatch(r"farm-[0-9a-f]{8}-base", summary["base"])
    for step in ("prepare_ms", "use_ms", "commit_ms"):
        assert 0 < summary[step]["median"] <= summary[step]["max"]
    assert summary["per_second"] == pytest.approx(30 / summary["seconds"], rel=0.1)
    assert list(broker.walk()) == []
    assert samples.daemon.mounts() == []
    left = {path for path in set(Path(tempfile.gettempdir()).iterdir()) - before if "farm" in path.name}
    assert not left
    text = samples.run("farm", "--count", "2", "--callers", "1", "--prefix", "p.1")
    assert re.fullmatch(
        r'workspaces  2 from "p\.1-base", 1 at a time, mounted\n'
        r"prepare     median \d+\.\d\d ms, slowest \d+\.\d\d ms\n"
        r"use         median \d+\.\d\d ms, slowest \d+\.\d\d ms\n"
        r"commit      median \d+\.\d\d ms, slowest \d+\.\d\d ms\n"
        r"total       \d+\.\d\d s, \d+\.\d workspaces a second\n",
        text,
    )


def test_farm_keeps_what_it_is_told_to(samples: Samples) -> None:
    broker = samples.broker()
    samples.run("farm", "--keep", "--count", "3", "--prefix", "p")
    found = {info.name: (info.parent, info.labels) for info in broker.walk()}
    made = {f"p-{number}-done": ("p-base", {"farm": "p"}) for number in range(3)}
    assert found == {"p-base": ("", {}), **made}
    with mount.mounted(broker.view("look", "p-1-done")) as path:
        assert {file.name: file.read_text() for file in path.iterdir()} == {
            "base.txt": "the base of p\n",
            "result.txt": "workspace 1\n",
        }
    assert re.match(r"farm: already_exists: ", samples.run("farm", "--prefix", "p", "--count", "1", status=4))
    assert re.match(r"farm: not_found: ", samples.run("farm", "--base", "missing", "--count", "1", status=3))
    samples.run("farm", "--base", "p-base", "--prefix", "q", "--count", "2")
    assert {info.name for info in broker.walk()} == {"look", "p-base", *made}
    assert samples.run("farm", "--prefix", "a b", status=2)
    assert samples.run("farm", "--count", "0", status=2)


def test_farm_mounts_nothing_where_it_may_not(samples: Samples) -> None:
    """In a user namespace of its own it is nobody, with the sockets still open to it."""
    text = samples.run("farm", "--count", "2", under=("unshare", "--user"))
    assert re.match(r'workspaces  2 from "farm-[0-9a-f]{8}-base", 16 at a time, not mounted \(needs root\)\n', text)
    assert "use         median 0.00 ms, slowest 0.00 ms\n" in text
    assert list(samples.broker().walk()) == []
