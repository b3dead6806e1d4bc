"""`make demo`: a tree of this machine committed, cloned, built in and watched on every backend, and no trace after it.

Everything that outlives a process is tied to one. As root the demo first enters a mount namespace of its own, so
that mounts go with it however it ends, and with the last mount the loop device. Without root it tries a
user namespace, in which overlayfs and bind mounts need nobody's permission; where that is refused, native
snapshots are still worked on, in the directory that their mount names. Between "it is made" and "its end is arranged"
no signal is let in, nor while everything is put away.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import enum
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

import msgspec
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

import snapbroker
from snapbroker import Broker, BrokerError, Event, Kind, Mount, Usage, mount

FILES_MIN: Final = 5_000
"""A tree worth the name."""
FILES_MAX: Final = 5_500
"""Native snapshots are copies of each of them."""
BYTES_MAX: Final = 96 << 20
TREES: Final = ("/usr/include", "/usr/share/doc", "/usr/lib/python3", "/usr/share", "/usr/lib", "/usr/src", sys.prefix)
"""Where a tree is looked for."""
CLONES: Final = 200
NATIVE_CLONES: Final = 4
"""Fewer, because each is a copy of the whole tree."""
MOUNTED: Final = 10
IMAGE_BYTES: Final = 4 << 30
"""Size of the sparse file that btrfs lies on."""
READY_SECONDS: Final = 30.0
STOP_SECONDS: Final = 10.0
EVENTS_SECONDS: Final = 10.0
"""How long the last event may take to arrive."""
NAMESPACE: Final = "demo"
BACKENDS: Final = ("overlayfs", "native", "btrfs")

_CLONE_NEWNS: Final = 0x20000
_CLONE_NEWUSER: Final = 0x10000000
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 1 << 18
_PR_SET_PDEATHSIG: Final = 1
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_libc: Final = ctypes.CDLL(None, use_errno=True)

# The work: counts what is in the tree, so that its output shows whether a workspace has all of it.
COUNT_C: Final = """\
#define _XOPEN_SOURCE 700
#include <ftw.h>
#include <stdio.h>

static long files;

static int visit(const char *path, const struct stat *status, int type, struct FTW *position) {
    (void)path; (void)status; (void)position;
    files += type != FTW_D;
    return 0;
}

int main(int count, char **arguments) {
    if (count != 2 || nftw(arguments[1], visit, 64, FTW_PHYS)) return 1;
    return printf("%ld\\n", files) < 0;
}
"""
COMPILE: Final = "cc -O1 -o build/count build/count.c && ./build/count tree > build/found"
FIND: Final = "find tree ! -type d | wc -l > build/found"


class Interrupted(BaseException):
    """A signal asked for the end; not an Exception, so that nobody takes it for a failure of a step."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


class DemoError(Exception):
    """The demo cannot go on, or found something that is not true; the message says what."""


class Interrupts:
    """The signals that end the demo: the first is raised as `Interrupted`, but not in a step that must be whole.

    A second one would cut off what the first has set going: the putting away.
    """

    def __init__(self) -> None:
        self._deferring = 0
        self._received = 0
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._received:
            return
        self._received = number
        if not self._deferring:
            raise Interrupted(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let no signal in before the end of the block."""
        self._deferring += 1
        try:
            yield
        finally:
            self._deferring -= 1
        if self._received and not self._deferring:
            raise Interrupted(self._received)


class Rights(enum.Enum):
    """What the demo may do here."""

    ROOT = "as root, in a mount namespace of its own"
    USER_NAMESPACE = "without root, in a user namespace of its own"
    NONE = "without the right to mount"


def enter_namespaces() -> Rights:
    """Enter namespaces whose mounts nobody else sees and that end with this process and its children."""
    if os.geteuid() == 0 and _unshare(_CLONE_NEWNS):
        return Rights.ROOT
    # A user namespace may be given without any right in it, and there is no way back: a child tries first.
    child = os.fork()
    if child == 0:
        os._exit(not _enter_user_namespace())
    if os.waitpid(child, 0)[1] == 0 and _enter_user_namespace():
        return Rights.USER_NAMESPACE
    return Rights.NONE


def _enter_user_namespace() -> bool:
    user, group = os.geteuid(), os.getegid()
    try:
        if _libc.unshare(_CLONE_NEWUSER):
            return False
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    except OSError:
        return False
    return _unshare(_CLONE_NEWNS)


def _unshare(flags: int) -> bool:
    return not _libc.unshare(flags) and not _libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None)


# The tree.


@dataclass(frozen=True)
class Source:
    """Directory entries of this machine that the base is made of."""

    directory: str
    entries: tuple[str, ...]
    of: int
    files: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.files:,} files, {_size(self.bytes)}: {len(self.entries)} of {self.of} entries of {self.directory}"
        )


def choose_tree() -> Source:
    """The first of TREES, or as many of its entries in the order of their names as make FILES_MIN files."""
    for directory in TREES:
        if os.path.isdir(directory) and (found := _choose_entries(directory)):
            return found
    raise DemoError(f"no directory with {FILES_MIN:,} files that may be read: looked in {', '.join(TREES)}")


def _choose_entries(directory: str) -> Source | None:
    names = sorted(os.listdir(directory))
    chosen: list[str] = []
    files = size = 0
    for name in names:
        census = _census(f"{directory}/{name}", FILES_MAX - files, BYTES_MAX - size)
        if census is None:
            continue
        chosen.append(name)
        files += census[0]
        size += census[1]
        if files >= FILES_MIN:
            return Source(directory, tuple(chosen), len(names), files, size)
    return None


def _census(path: str, files_max: int, bytes_max: int) -> tuple[int, int] | None:
    """Files and bytes below `path`; None where there are more, or something that cannot be copied."""
    files = size = 0
    waiting = [path]
    try:
        while waiting:
            path = waiting.pop()
            status = os.lstat(path)
            if os.path.isdir(path) and not os.path.islink(path):
                waiting.extend(entry.path for entry in os.scandir(path))
                continue
            if not os.path.islink(path) and not (os.path.isfile(path) and os.access(path, os.R_OK)):
                return None
            files += 1
            size += status.st_size
            if files > files_max or size > bytes_max:
                return None
    except OSError:
        return None
    return files, size


def fill(source: Source, target: Path, rights: Rights) -> None:
    """Copy the tree, and what the work needs, into the workspace of the base."""
    (target / "tree").mkdir()
    (target / "build").mkdir()
    (target / "build" / "count.c").write_text(COUNT_C)
    # Only root can give files to others.
    command = ["cp", "-a" if rights is Rights.ROOT else "-RP"]
    _run([*command, *(f"{source.directory}/{entry}" for entry in source.entries), str(target / "tree")])


def choose_work(scratch: Path) -> str:
    """A compile, where there is a compiler that finds its headers; else find(1)."""
    trial = scratch / "trial"
    (trial / "build").mkdir(parents=True)
    (trial / "tree").mkdir()
    (trial / "build" / "count.c").write_text(COUNT_C)
    done = subprocess.run(["sh", "-c", COMPILE], cwd=trial, capture_output=True, check=False)
    return FIND if done.returncode else COMPILE


def _run(command: Sequence[str], cwd: Path | None = None) -> str:
    """Run to the end and answer what was printed; an interruption ends it with all that it has started."""
    try:
        process = subprocess.Popen(
            command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
        )
    except FileNotFoundError:
        raise DemoError(f"{command[0]} is not installed") from None
    with process:
        try:
            printed, complained = process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        said = (complained or printed).strip().splitlines()[-1:] or ["it does not say why"]
        raise DemoError(f"{Path(command[0]).name}: exit status {process.returncode}: {said[0]}")
    return printed


# The broker, and what it stands on.


@contextlib.contextmanager
def scratch_directory(parent: str, interrupts: Interrupts) -> Iterator[Path]:
    """A directory of the demo's own; not deleted through a mount, should one have stayed."""
    with interrupts.deferred():
        path = Path(tempfile.mkdtemp(prefix="snapbroker-demo-", dir=parent))
    try:
        yield path
    finally:
        with interrupts.deferred():
            _detach_below(path)
            shutil.rmtree(path)


def _detach_below(path: Path) -> None:
    """Unmount what stayed mounted after a failure, so that nothing is deleted through a mount."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in reversed([point for point in points if point.startswith(f"{path}/")]):
        mount.unmount(point, lazy=True)


@contextlib.contextmanager
def btrfs(scratch: Path, interrupts: Interrupts) -> Iterator[Path]:
    """A btrfs on a loop device over a sparse file; the kernel detaches the device with its last mount."""
    image, target = scratch / "btrfs.image", scratch / "btrfs"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    _run([_tool("mkfs.btrfs"), "-q", str(image)])
    target.mkdir()
    with interrupts.deferred():
        _run([_tool("mount"), "-o", "loop", str(image), str(target)])
    try:
        yield target
    finally:
        with interrupts.deferred():
            mount.unmount(target)


def _tool(name: str) -> str:
    """The path of an administrator's tool: they are not on everybody's PATH."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise DemoError(f"{name} is not installed")
    return found


@contextlib.contextmanager
def daemon(config: Path, scratch: Path, interrupts: Interrupts) -> Iterator[None]:
    """`snapbrokerd`, ready; it is told to stop should this process die, and gets no signal from the keyboard."""
    log = scratch / "log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(scratch / "notify"))
        with interrupts.deferred(), log.open("wb") as output:
            process = subprocess.Popen(
                [_program("snapbrokerd"), "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "NOTIFY_SOCKET": str(scratch / "notify")},
                process_group=0,
                preexec_fn=_die_with_parent,
            )
        try:
            _await_ready(process, channel, log)
            yield
        except Exception:
            if process.poll() is not None:
                raise DemoError(f"snapbrokerd ended with {process.returncode}: {_last_line(log)}") from None
            raise
        finally:
            with interrupts.deferred():
                _stop(process)


def _program(name: str) -> str:
    """A program of the environment that this Python belongs to."""
    return str(Path(sys.executable).with_name(name))


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _await_ready(process: subprocess.Popen[bytes], channel: socket.socket, log: Path) -> None:
    """Wait for READY=1, for the process's end, or for too long."""
    ended = os.pidfd_open(process.pid)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            watched = [channel.fileno(), ended]
            readable, _, _ = select.select(watched, [], [], max(0.0, deadline - time.monotonic()))
            if channel.fileno() in readable and b"READY=1" in channel.recv(4096):
                return
            if ended in readable:
                raise DemoError(f"snapbrokerd ended with {process.wait()}: {_last_line(log)}")
            if not readable:
                raise DemoError(f"snapbrokerd was not ready within {READY_SECONDS:g} s: {_last_line(log)}")
    finally:
        os.close(ended)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_line(log: Path) -> str:
    return (log.read_text().strip().splitlines() or ["its log is empty"])[-1]


def write_config(scratch: Path, roots: Mapping[str, Path]) -> Path:
    """A configuration with one snapshotter for each backend."""
    lines = [f'runtime = "{scratch}/run"', 'log_format = "json"']
    for name, root in roots.items():
        lines += [f"[snapshotters.{name}]", f'root = "{root}"']
    path = scratch / "snapbrokerd.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def left_out_by_doctor(config: Path) -> dict[str, str]:
    """Snapshotter to reason, as `snapbrokerd doctor` has it."""
    done = subprocess.run(
        [_program("snapbrokerd"), "doctor", "--json", "--config", str(config)],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        findings = json.loads(done.stdout)
    except ValueError:
        raise DemoError(f"snapbrokerd doctor: {done.stderr.strip()}") from None
    return {each["name"]: "; ".join(each["missing"]) for each in findings if not each["ok"]}


# The run.


@dataclass
class Report:
    """What one backend did: seconds by step, counts, what it takes, and the events both ways."""

    clones: int
    worked: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    base: Usage = field(default_factory=Usage)
    built: Usage = field(default_factory=Usage)
    together: Usage = field(default_factory=Usage)
    tree: list[tuple[str, str, str]] = field(default_factory=list)
    live: list[Event] = field(default_factory=list)
    replayed: list[Event] = field(default_factory=list)
    healed: int = 0

    def document(self) -> dict[str, Any]:
        """For --json."""
        return {
            "clones": self.clones,
            "worked_in": self.worked,
            "seconds": {step: round(seconds, 6) for step, seconds in self.seconds.items()},
            "usage": {
                "base": msgspec.to_builtins(self.base),
                "built": msgspec.to_builtins(self.built),
                "clones": msgspec.to_builtins(self.together),
            },
            "tree": [{"name": name, "kind": kind, "parent": parent} for name, kind, parent in self.tree],
            "events": {
                "live": dict(Counter(event.verb for event in self.live)),
                "replayed": dict(Counter(event.verb for event in self.replayed)),
                "equal": self.live == self.replayed,
                "gaps_healed": self.healed,
            },
        }


class Subscriber:
    """Takes the events as they are published, beside everything else."""

    def __init__(self, broker: Broker) -> None:
        self._stream = broker.events()
        self._last: Future[int] = Future()
        self._pool = ThreadPoolExecutor(1)
        self._taken = self._pool.submit(self._take)
        self._give_up = threading.Event()

    def _take(self) -> list[Event]:
        events: list[Event] = []
        with self._stream:
            while not (self._last.done() and (self._give_up.is_set() or self._stream.sequence >= self._last.result())):
                if event := self._stream.poll(0.1):
                    events.append(event)
        return events

    def events_until(self, sequence: int) -> tuple[list[Event], int]:
        """All events up to `sequence`, and how many gaps were healed from the journal on the way."""
        self._last.set_result(sequence)
        try:
            return self._taken.result(EVENTS_SECONDS), self._stream.statistics().gaps
        except TimeoutError:
            raise DemoError(f"event {sequence} was not published within {EVENTS_SECONDS:g} s") from None

    def close(self) -> None:
        """End, whether all came or not."""
        self._give_up.set()
        if not self._last.done():
            self._last.set_result(0)
        self._pool.shutdown()


@dataclass
class Run:
    """One backend's turn."""

    broker: Broker
    rights: Rights
    source: Source
    work: str
    scratch: Path
    interrupts: Interrupts
    report: Report
    say: Callable[[str], None]

    @contextlib.contextmanager
    def step(self, name: str, told: str) -> Iterator[None]:
        """A part that is timed under `name`, and told when it is done."""
        began = time.perf_counter()
        yield
        seconds = self.report.seconds[name] = time.perf_counter() - began
        self.say(f"  {told}: {_time(seconds)}")

    def all(self) -> None:
        """From an empty store to an empty store."""
        with contextlib.ExitStack() as stack:
            with self.interrupts.deferred():
                subscriber = stack.enter_context(contextlib.closing(Subscriber(self.broker)))
            self.make_base()
            self.clone()
            self.build()
            if self.rights is not Rights.NONE:
                self.use_shell()
            self.look()
            self.remove()
            self.replay(subscriber)

    def make_base(self) -> None:
        """The tree, copied into a mounted active snapshot, becomes the committed `base`."""
        told = f"copy {self.source.files:,} files into an active snapshot"
        with self._directory(self.broker.prepare("import")) as target, self.step("copy", told):
            fill(self.source, target, self.rights)
        with self.step("base", "commit it as base, files durable"):
            self.broker.commit("base", "import", sync=True)

    def clone(self) -> None:
        """Workspaces, asked for in one request; all durable when it is answered."""
        count = self.report.clones
        with self.step("clone", f"{count} workspaces from base, durable"), self.broker.batch() as batch:
            for number in range(count):
                batch.prepare(f"workspace-{number:03}", "base")

    def build(self) -> None:
        """Mount some, do the work in each, unmount, commit."""
        keys = [f"workspace-{number:03}" for number in range(min(MOUNTED, self.report.clones))]
        with contextlib.ExitStack() as stack:
            with self.step("mount", f"mount {len(keys)} of them"):
                paths = [stack.enter_context(self._directory(self.broker.mounts(key))) for key in keys]
            with self.step("work", f"{self.work.split()[0]} in each"):
                for path in paths:
                    _run(["sh", "-c", self.work], cwd=path)
            for path in paths:
                self._check_work(path)
            unmounting = stack.pop_all()
            with self.step("unmount", "unmount"):
                unmounting.close()
        with self.step("commit", f"commit {len(keys)}"), self.broker.batch() as batch:
            for key in keys:
                batch.commit(key.replace("workspace", "built"), key)
        self.report.worked = len(keys)

    def _check_work(self, path: Path) -> None:
        found = int((path / "build" / "found").read_text())
        if found != self.source.files:
            raise DemoError(f"{self.work.split()[0]} found {found} files in a workspace of {self.source.files}")

    def use_shell(self) -> None:
        """The same as a user types it."""
        with self.step("shell", "snapbroker run --parent base --commit from-shell -- sh -c ..."):
            self._shell("run", "--parent", "base", "--commit", "from-shell", "--", "sh", "-c", FIND)
        listed = json.loads(self._shell("--json", "ls", "name==from-shell,kind==committed,parent==base"))
        if len(listed) != 1:
            raise DemoError("snapbroker run committed nothing")

    def _shell(self, *arguments: str) -> str:
        options = ["-e", self.broker.endpoint, "-n", NAMESPACE, "-s", self.broker.snapshotter_name]
        return _run([_program("snapbroker"), *options, *arguments])

    def look(self) -> None:
        """What is there, and what it takes."""
        report = self.report
        with self.step("walk", "walk"):
            infos = list(self.broker.walk())
        report.tree = [(info.name, info.kind.value, info.parent) for info in infos]
        with self.step("usage", f"usage of {len(infos)}"), self.broker.batch() as batch:
            answers = {info.name: batch.usage(info.name) for info in infos}
        usages = {name: answer.result() for name, answer in answers.items()}
        report.base = usages.pop("base")
        report.built = usages["built-000"]
        report.together = sum(usages.values(), Usage())

    def remove(self) -> None:
        """Everything, children first, and wait for the disk."""
        names = [name for name, _, _ in self.report.tree if name != "base"]
        with self.step("remove", f"remove {len(names) + 1}"):
            with self.broker.batch() as batch:
                for name in names:
                    batch.remove(name)
            self.broker.remove("base")
        with self.step("cleanup", "files deleted in the background, waited for"):
            self.broker.cleanup()
        if left := [info.name for info in self.broker.walk()]:
            raise DemoError(f"still there after everything was removed: {', '.join(left)}")

    def replay(self, subscriber: Subscriber) -> None:
        """The journal must tell what was seen live."""
        report = self.report
        with self.step("replay", "replay the journal"):
            report.replayed = list(self.broker.events(since=0, follow=False))
        report.live, report.healed = subscriber.events_until(report.replayed[-1].sequence)
        if report.live != report.replayed:
            raise DemoError(f"{len(report.live)} events live, {len(report.replayed)} replayed: not the same")

    @contextlib.contextmanager
    def _directory(self, mounts: Sequence[Mount]) -> Iterator[Path]:
        """The snapshot as a directory: mounted, or where that is not allowed the one that its only mount names."""
        if self.rights is Rights.NONE:
            yield Path(mounts[0].source)
            return
        target = Path(tempfile.mkdtemp(prefix="mount-", dir=self.scratch))
        with self.interrupts.deferred():
            mount.all(mounts, target)
        try:
            yield target
        finally:
            with self.interrupts.deferred():
                mount.unmount(target)
                target.rmdir()


@dataclass
class Demo:
    """The whole, from choosing a tree to the last line."""

    directory: str
    clones: int
    rights: Rights
    interrupts: Interrupts
    say: Callable[[str], None]
    source: Source = field(default_factory=choose_tree)
    work: str = ""
    seconds: float = 0.0
    left_out: dict[str, str] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)

    def run(self) -> None:
        """Everything; what was made is gone when it returns or raises."""
        began = time.perf_counter()
        with contextlib.ExitStack() as stack:
            scratch = stack.enter_context(scratch_directory(self.directory, self.interrupts))
            self.work = choose_work(scratch)
            self.say(f"{self.rights.value}; in {scratch}")
            self.say(f"the tree: {self.source}")
            self.say(f"the work: {self.work}")
            roots = self._roots(scratch, stack)
            stack.enter_context(daemon(write_config(scratch, roots), scratch, self.interrupts))
            broker = stack.enter_context(snapbroker.connect(f"{scratch}/run/router.sock", namespace=NAMESPACE))
            for name in roots:
                few = f" only {NATIVE_CLONES} workspaces, each is a copy of the whole tree" if name == "native" else ""
                self.say(f"{name}:{few}")
                clones = min(self.clones, NATIVE_CLONES) if name == "native" else self.clones
                report = self.reports[name] = Report(clones)
                view = broker.snapshotter(name)
                Run(view, self.rights, self.source, self.work, scratch, self.interrupts, report, self.say).all()
        self.seconds = time.perf_counter() - began

    def _roots(self, scratch: Path, stack: contextlib.ExitStack) -> dict[str, Path]:
        """The root of each snapshotter that works here; the others are left out, with the reason."""
        roots = {name: scratch / "root" / name for name in BACKENDS}
        try:
            roots["btrfs"] = self._btrfs(scratch, stack) / "root"
        except (DemoError, OSError) as error:
            self.left_out["btrfs"] = str(error)
            del roots["btrfs"]
        if self.rights is Rights.NONE:
            self.left_out["overlayfs"] = "mounting is not allowed here, not even in a user namespace"
            del roots["overlayfs"]
        found = left_out_by_doctor(write_config(scratch, roots))
        self.left_out.update(found)
        for name, reason in self.left_out.items():
            self.say(f"{name} is left out: {reason}")
        return {name: root for name, root in roots.items() if name not in found}

    def _btrfs(self, scratch: Path, stack: contextlib.ExitStack) -> Path:
        if self.rights is not Rights.ROOT:
            raise DemoError("the demo makes a loop device for it, which needs root")
        return stack.enter_context(btrfs(scratch, self.interrupts))

    def document(self) -> dict[str, Any]:
        """For --json."""
        return {
            "kernel": os.uname().release,
            "rights": self.rights.name.lower(),
            "tree": {
                "directory": self.source.directory,
                "entries": len(self.source.entries),
                "files": self.source.files,
                "bytes": self.source.bytes,
            },
            "work": self.work,
            "seconds": round(self.seconds, 3),
            "snapshotters": {name: report.document() for name, report in self.reports.items()},
            "left_out": self.left_out,
        }


# What is shown.


def show(demo: Demo, console: Console) -> None:
    """Timings, a tree, what it takes, and the events, by backend."""
    for table in (_timings(demo), _usages(demo), _events(demo)):
        console.print()
        console.print(table)
    console.print()
    console.print(Columns([_tree(name, report) for name, report in demo.reports.items()], padding=(0, 4)))
    for report in demo.reports.values():
        console.print()
        for event in (*report.replayed[:2], *report.replayed[-2:]):
            name = event.info.name if event.info else event.key
            console.print(f"{event.sequence:>6} {event.topic} {name}", soft_wrap=True, markup=False)
    console.print(f"\nall of it in {demo.seconds:.1f} s; what was made is gone again")


_STEPS: Final = {
    "copy": "copy the tree in",
    "base": "commit it as base, files durable",
    "clone": "prepare the workspaces, durable",
    "each": "each of them",
    "mount": "mount",
    "work": "do the work in each",
    "unmount": "unmount",
    "commit": "commit",
    "shell": "the same from the shell",
    "walk": "walk",
    "usage": "usage of all",
    "remove": "remove all",
    "cleanup": "deleted from disk",
    "replay": "replay the journal",
}


def _timings(demo: Demo) -> Table:
    table = _table("time", demo.reports)
    counts = [f"{report.clones}, {report.worked}" for report in demo.reports.values()]
    table.add_row("workspaces; mounted and worked in", *counts, end_section=True)
    for step, told in _STEPS.items():
        row = [report.seconds.get(step) for report in demo.reports.values()]
        if step == "each":
            row = [report.seconds["clone"] / report.clones for report in demo.reports.values()]
        table.add_row(told, *("" if seconds is None else _time(seconds) for seconds in row))
    return table


def _usages(demo: Demo) -> Table:
    table = _table("size / inodes", demo.reports)
    for told, name in (
        ("base", "base"),
        ("a built workspace, beyond base", "built"),
        ("all but base, beyond it", "together"),
    ):
        usages: list[Usage] = [getattr(report, name) for report in demo.reports.values()]
        table.add_row(told, *(f"{_size(usage.size)} / {usage.inodes:,}" for usage in usages))
    return table


def _events(demo: Demo) -> Table:
    table = _table("events, live / replayed", demo.reports)
    both = [(_verbs(report.live), _verbs(report.replayed)) for report in demo.reports.values()]
    for verb in sorted({verb for _, replayed in both for verb in replayed}):
        table.add_row(verb, *(f"{live[verb]} / {replayed[verb]}" for live, replayed in both))
    table.add_section()
    equal = ("the same" if report.live == report.replayed else "DIFFERENT" for report in demo.reports.values())
    table.add_row("one by one", *equal)
    return table


def _verbs(events: Iterable[Event]) -> Counter[str]:
    return Counter(event.verb for event in events)


def _table(first: str, reports: Mapping[str, Report]) -> Table:
    table = Table(first)
    for name in reports:
        table.add_column(name, justify="right")
    return table


def _tree(title: str, report: Report) -> Tree:
    """Which lies on which; what is not committed is only counted."""
    children: dict[str, list[tuple[str, str]]] = {}
    for name, kind, parent in report.tree:
        children.setdefault(parent, []).append((name, kind))
    tree = Tree(f"[bold]{title}[/bold]")
    _grow(tree, "", children)
    return tree


def _grow(branch: Tree, parent: str, children: Mapping[str, list[tuple[str, str]]]) -> None:
    found = children.get(parent, [])
    for name, kind in found:
        if kind == Kind.COMMITTED:
            _grow(branch.add(f"{escape(name)} [dim]{kind}[/dim]"), name, children)
    if others := [name for name, kind in found if kind != Kind.COMMITTED]:
        branch.add(f"{escape(others[0])} ... {escape(others[-1])} [dim]{len(others)} active[/dim]")


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.3g} {unit}"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--directory", default="/var/tmp", help="where to work (default: %(default)s)")
    parser.add_argument("--clones", type=int, default=CLONES, help="how many workspaces (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when everything that it shows is as it should be, 128+n after signal n."""
    chosen = _arguments(arguments)
    console = Console(highlight=False)
    say: Callable[[str], None] = (
        (lambda _: None) if chosen.json else (lambda line: console.print(escape(line), soft_wrap=True))
    )
    interrupts = Interrupts()
    try:
        demo = Demo(chosen.directory, chosen.clones, enter_namespaces(), interrupts, say)
        demo.run()
    except Interrupted as interrupted:
        print("demo: interrupted; what was made is gone again", file=sys.stderr)
        return interrupted.status
    except (DemoError, BrokerError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    if chosen.json:
        print(json.dumps(demo.document()))
    else:
        show(demo, console)
    return 0 if demo.reports else 1


if __name__ == "__main__":
    sys.exit(main())
