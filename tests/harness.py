"""A private daemon for a test: started as a user starts it, spoken to through its socket, gone without a trace.

    with Daemon({"overlayfs": {}, "memory": {}}) as daemon:
        with daemon.client("overlayfs") as broker:
            broker.prepare("job")

`Daemon` writes a configuration, runs `snapbrokerd --config FILE` and asks it for its status until every snapshotter
is ready. At the end it is told to stop with SIGTERM, and must end by itself in five seconds with exit status 0
and leave no process, no mount and no socket. `Wire` speaks the protocol without the client library, for what no
client would send and for the outcomes of a batch side by side.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import anyio
import msgspec
import psutil
import zmq

from broker.actor.forks import Forks, ForkServerProcess
from broker.main import main as snapbrokerd
from broker.server import ACTORS_MODULE
from snapbroker import blocking, sockets
from snapbroker.contract import Info, Mount, Usage
from snapbroker.errors import BrokerError
from snapbroker.keyfiles import Curve
from snapbroker.protocol import (
    DONE,
    REQUEST_VERSION,
    ActorStatus,
    Call,
    Empty,
    EventsPage,
    MountsAnswer,
    Progress,
    Request,
    Status,
    StatusAnswer,
    WalkPage,
    answer_types,
    decode_reply,
    decoder,
    encode,
    error_of,
)

SNAPSHOTTERS: Final = ("memory", "overlayfs", "native", "btrfs")
"""What the shared daemon runs; each is an instance named like its backend."""
SCRATCH: Final = "/var/tmp"
"""On a disk, and short: an ipc path ends at 107 bytes."""
READY_S: Final = 30.0
"""How long a start may take on a busy machine."""
STOP_S: Final = 5.0
"""How long a stop may take, as promised."""
REPLY_S: Final = 20.0
"""How long a reply may take."""
_LOG_SHOWN_BYTES: Final = 20_000

Answer = Info | Usage | MountsAnswer | WalkPage | EventsPage | StatusAnswer | Empty
Result = Answer | BrokerError
"""What became of one call of a request."""

_DECODERS: Final = {verb: decoder(answer).decode for verb, answer in answer_types().items()}

running: list[Daemon] = []
"""The daemons of this moment, whose logs are shown with a test that fails."""


class Silence(AssertionError):
    """No reply came in time."""


class Wire:
    """One DEALER socket and the protocol, nothing else; for one thread."""

    def __init__(
        self, endpoint: str, snapshotter: str = "", namespace: str = "default", curve: Curve | None = None
    ) -> None:
        self.snapshotter = snapshotter
        self.namespace = namespace
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        if curve is not None:
            sockets.equip(self._socket, curve)
        self._socket.connect(endpoint)
        self._numbers = itertools.count(1)

    def send_frames(self, *frames: bytes) -> None:
        """Send whatever frames."""
        self._socket.send_multipart(frames)

    def receive_frames(self, timeout: float = REPLY_S) -> list[bytes]:
        """The next message; Silence when none comes."""
        if not self._socket.poll(round(timeout * 1000)):
            raise Silence(f"no message within {timeout} s")
        return self._socket.recv_multipart()

    def is_silent(self, timeout: float) -> bool:
        """Whether nothing comes for so long."""
        return not self._socket.poll(round(timeout * 1000))

    def send(
        self,
        *calls: Call,
        atomic: bool = False,
        timeout_ms: int = 0,
        snapshotter: str | None = None,
        namespace: str | None = None,
        request_id: bytes = b"",
        token: bytes = b"",
    ) -> bytes:
        """Send a request; answers its id."""
        request_id = request_id or b"%d" % next(self._numbers)
        request = Request(
            calls=calls,
            namespace=self.namespace if namespace is None else namespace,
            atomic=atomic,
            timeout_ms=timeout_ms,
            token=token,
        )
        target = self.snapshotter if snapshotter is None else snapshotter
        self.send_frames(REQUEST_VERSION, request_id, target.encode(), encode(request))
        return request_id

    def parts(self, request_id: bytes, calls: Sequence[Call], timeout: float = REPLY_S) -> Iterator[Part]:
        """What each outcome of each part of the reply says, as it comes; a refusal of the whole request is raised."""
        while True:
            version, answered, status, body = self.receive_frames(timeout)
            assert version == REQUEST_VERSION
            assert answered == request_id
            reply = decode_reply(body)
            if reply.error is not None:
                assert status == DONE
                raise error_of(reply.error)
            for outcome in reply.outcomes:
                if outcome.error is not None:
                    yield outcome.call, error_of(outcome.error)
                elif outcome.progress is not None:
                    yield outcome.call, outcome.progress
                else:
                    yield outcome.call, _DECODERS[_verb(calls[outcome.call])](outcome.ok)
            if status == DONE:
                return

    def call(
        self,
        *calls: Call,
        atomic: bool = False,
        timeout_ms: int = 0,
        snapshotter: str | None = None,
        namespace: str | None = None,
        token: bytes = b"",
    ) -> list[Result]:
        """The result of every call, errors among them; of a stream the last page. Every call must have one."""
        request_id = self.send(
            *calls, atomic=atomic, timeout_ms=timeout_ms, snapshotter=snapshotter, namespace=namespace, token=token
        )
        parts = self.parts(request_id, calls)
        results = {index: result for index, result in parts if not isinstance(result, Progress)}
        assert sorted(results) == list(range(len(calls)))
        return [results[index] for index in range(len(calls))]

    def one(self, call: Call, **where: Any) -> Any:
        """The answer of one call; its error is raised."""
        (result,) = self.call(call, **where)
        if isinstance(result, BrokerError):
            raise result
        return result

    def pages(self, call: Call, **where: Any) -> list[Any]:
        """All pages that one walk or events call answers; its error is raised."""
        request_id = self.send(call, **where)
        pages = []
        for _, result in self.parts(request_id, (call,)):
            if isinstance(result, BrokerError):
                raise result
            pages.append(result)
        return pages

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Part = tuple[int, Result | Progress]
"""The number of a call, and what a part of the reply says of it."""


def _verb(call: Call) -> str:
    return str(call.__struct_config__.tag)


def survivors(family: Iterable[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Those that have not ended in this time."""
    give_up = time.monotonic() + timeout
    pace = threading.Event()
    left = list(family)
    while (left := [process for process in left if not is_ended(process)]) and time.monotonic() < give_up:
        pace.wait(0.01)
    return left


def is_ended(process: psutil.Process) -> bool:
    """Whether nothing of it runs any more, reaped or not.

    One whose parent was killed is for the machine's first process to collect, whenever it does. And a process looks
    like one that waits for that as soon as its first thread has ended, while another is still in the kernel with all
    that they have open.
    """
    try:
        return process.status() == psutil.STATUS_ZOMBIE and len(process.threads()) <= 1
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def fork_server() -> Iterator[Forks]:
    """A connection to a fork server without a broker."""
    server = ForkServerProcess(ACTORS_MODULE)
    try:
        yield server.launch()
    finally:
        anyio.run(server.close)


class Daemon:
    """One `snapbrokerd` with a configuration, a root and a runtime directory of its own.

    `snapshotters`: name to its section of the configuration (`backend`, `root`, `options`, `limits`); `settings`: the
    rest of the configuration. Used as a context manager, it is started at the beginning and stopped at the end.
    """

    def __init__(
        self,
        snapshotters: Mapping[str, Mapping[str, Any]],
        *,
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="snb-", dir=SCRATCH))
        self.root = self.place / "root"
        self.runtime = self.place / "run"
        self.config_file = self.place / "config.toml"
        self.log_file = self.place / "log"
        self.log_file.touch()
        self.environment = dict(environment or {})
        self.snapshotters = {name: dict(section) for name, section in snapshotters.items()}
        self.settings = settings
        self.process: subprocess.Popen[bytes] | None = None
        self.mark = 0
        self.may_log_tracebacks = False
        self._family: list[psutil.Process] = []

    # Life.

    def start(self, *, wait: bool = True) -> Self:
        """Run the daemon; with `wait`, return when every snapshotter is ready."""
        assert self.process is None, "it runs already"
        table = {
            "root": str(self.root),
            "runtime": str(self.runtime),
            "log_format": "json",
            **self.settings,
            "snapshotters": self.snapshotters,
        }
        self.config_file.write_text(to_toml(table))
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("snapbrokerd"), "--config", self.config_file],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.place,
                env={**os.environ, **self.environment},
            )
        if self not in running:
            running.append(self)
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> StatusAnswer:
        """Wait until every snapshotter of the configuration is ready."""
        return self.wait_for(
            lambda status: (
                {actor.name for actor in status.snapshotters if actor.state == "ready"} == set(self.snapshotters)
            )
        )

    def wait_for(self, condition: Callable[[StatusAnswer], object], timeout: float = READY_S) -> StatusAnswer:
        """Ask for the status until it is as wanted; AssertionError, with the last one, when that takes too long."""
        give_up = time.monotonic() + timeout
        status: StatusAnswer | None = None
        with Wire(self.endpoint) as wire:
            while time.monotonic() < give_up:
                assert self.process is not None
                assert self.process.poll() is None, f"snapbrokerd ended with {self.process.returncode}:\n{self.log()}"
                number = wire.send(Status())
                try:
                    for _, answer in wire.parts(number, (Status(),), timeout=give_up - time.monotonic()):
                        assert isinstance(answer, StatusAnswer)
                        status = answer
                except Silence:
                    break
                if status is not None and condition(status):
                    return status
                # Nothing is expected here: it paces the questions.
                wire.is_silent(0.02)
        raise AssertionError(f"not as wanted within {timeout} s: {status}\n{self.log()}")

    def stop(self) -> None:
        """SIGTERM: it must end in time with exit status 0 and leave no process, no mount and no socket."""
        assert self.process is not None
        family = self._descendants()
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._kill_all(family)
            raise AssertionError(f"snapbrokerd did not stop within {STOP_S} s:\n{self.log()}") from None
        self.process = None
        left = survivors(family, 1)
        self._kill_all(left)
        assert status == 0, f"snapbrokerd ended with {status}:\n{self.log()}"
        assert not left, f"left behind: {left}\n{self.log()}"
        assert self.left_in_runtime() == []
        assert self.mounts() == []
        log = self.log_file.read_text()
        assert self.may_log_tracebacks or "Traceback" not in log, self.log()
        assert "did not stop in time" not in log, self.log()

    def kill(self, number: signal.Signals = signal.SIGKILL, actor: str = "") -> None:
        """Send a signal to the daemon, or to one snapshotter's process; with SIGKILL, return when it is known dead."""
        assert self.process is not None
        if actor:
            victim = self.actor(actor).pid
            os.kill(victim, number)
            if number == signal.SIGKILL:
                self.wait_for(lambda status: all(actor.pid != victim for actor in status.snapshotters))
            return
        family = self._descendants()
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(STOP_S)
            self.process = None
            left = survivors(family, STOP_S)
            self._kill_all(left)
            assert not left, f"actors outlived their broker: {left}"

    def restart(self) -> Self:
        """Stop it, if it still runs, and start it again on the same root."""
        if self.process is not None:
            self.stop()
        return self.start()

    def remove(self) -> None:
        """Take away everything that is left of it; for the end of a test, whatever happened before."""
        if self in running:
            running.remove(self)
        if self.process is not None:
            family = self._descendants()
            self.process.kill()
            self.process.wait()
            self.process = None
            self._kill_all(family)
            survivors(family, STOP_S)
        for target in reversed(self.mounts()):
            subprocess.run(["umount", "--lazy", target], check=True)
        shutil.rmtree(self.place)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.remove()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            if self.process is not None:
                self.stop()
        finally:
            self.remove()

    def stacks(self) -> str:
        """Where in the kernel its threads are, and those of any process that cannot be interrupted."""
        family = {self.pid, *(process.pid for process in self._descendants())} if self.process is not None else set()
        told: list[str] = []
        for task in Path("/proc").glob("[0-9]*/task/*"):
            with contextlib.suppress(OSError):
                state = (task / "stat").read_text().rpartition(")")[2].split()[0]
                if state == "D" or int(task.parts[2]) in family:
                    name, stack = (task / "comm").read_text().strip(), (task / "stack").read_text()
                    told.append(f"{task.parts[2]}/{task.name} {name} {state}\n{stack}")
        return "\n".join(told)

    def _descendants(self) -> list[psutil.Process]:
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    @staticmethod
    def _kill_all(processes: Iterable[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    # Talk.

    @property
    def endpoint(self) -> str:
        """The router's endpoint."""
        return str(self.settings.get("endpoint") or f"ipc://{self.runtime}/router.sock")

    @property
    def events_endpoint(self) -> str:
        """The publisher's endpoint."""
        return str(self.settings.get("events_endpoint") or f"ipc://{self.runtime}/events.sock")

    @property
    def pid(self) -> int:
        """The broker's process."""
        assert self.process is not None
        return self.process.pid

    def client(self, snapshotter: str, namespace: str = "default", **arguments: Any) -> blocking.Broker:
        """A blocking client; close it, or use it as a context manager."""
        return blocking.connect(
            self.endpoint,
            namespace=namespace,
            snapshotter=snapshotter,
            events_endpoint=self.events_endpoint,
            **arguments,
        )

    def wire(self, snapshotter: str = "", namespace: str = "default") -> Wire:
        """The bare protocol; close it, or use it as a context manager."""
        return Wire(self.endpoint, snapshotter, namespace)

    def status(self) -> StatusAnswer:
        """The broker's own figures and every snapshotter's."""
        with self.wire() as wire:
            answer = wire.one(Status())
        assert isinstance(answer, StatusAnswer)
        return answer

    def actor(self, snapshotter: str) -> ActorStatus:
        """The figures of one snapshotter."""
        (found,) = [actor for actor in self.status().snapshotters if actor.name == snapshotter]
        return found

    def forked(self) -> dict[str, psutil.Process]:
        """The daemon's processes by their titles: `fork server`, `overlayfs`, `overlayfs, deleter` and so on."""
        found: dict[str, psutil.Process] = {}
        for process in self._descendants():
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                # One that has ended has no command line.
                found[process.cmdline()[0].removeprefix("snapbrokerd: ")] = process
        return found

    def root_of(self, snapshotter: str) -> Path:
        """The directory of one snapshotter."""
        return Path(self.snapshotters[snapshotter].get("root") or self.root / snapshotter)

    # Traces.

    def left_in_runtime(self) -> list[str]:
        """What a stopped daemon left beside its lock, which stays: whoever waits for a lock must find the same file."""
        return sorted(path.name for path in self.runtime.iterdir() if path.name != "lock")

    def mounts(self) -> list[str]:
        """Mount points below its directory."""
        return [target for target in mount_points() if target.startswith(f"{self.place}/")]

    def log(self) -> str:
        """What it wrote since the mark, its last part when that is long."""
        with self.log_file.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self.mark, end - _LOG_SHOWN_BYTES))
            return log.read().decode(errors="replace")


def mount_points() -> list[str]:
    """Every mount point of this process, in the order of mounting."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split(" ")[4].encode().decode("unicode_escape") for line in lines]


def to_toml(table: Mapping[str, Any]) -> str:
    """The table as TOML: JSON's strings, numbers and arrays are TOML's too, and tables get a header of their own."""
    lines: list[str] = []
    _write_table(table, "", lines)
    return "\n".join(lines) + "\n"


def _write_table(table: Mapping[str, Any], where: str, lines: list[str]) -> None:
    lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines.append(f"[{where}{key}]")
            _write_table(value, f"{where}{key}.", lines)


def audit_clean(daemon: Daemon, *names: str) -> None:
    """No audit of the daemon, or of these snapshotters of it, finds more than notes.

    It is asked over the wire while it runs, else its root is looked at. The broken snapshots that a test made are
    findings too: remove them first.
    """
    for name in names or daemon.snapshotters:
        wrong = [each for each in findings(daemon, name) if each["severity"] != "note"]
        assert not wrong, f"{name}: {wrong[:5]}\n{daemon.log()}"


def findings(daemon: Daemon, snapshotter: str, *options: str) -> list[dict[str, Any]]:
    """What an audit of one snapshotter finds; `options`: --repair, --yes, as for the commands."""
    if daemon.process is not None:
        with daemon.client(snapshotter) as client:
            asked = client.repair("--yes" in options) if "--repair" in options else client.audit()
            return [msgspec.structs.asdict(finding) for finding in asked]
    printed = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(printed, write_through=True)) as text:
        status = snapbrokerd(["audit", "--config", str(daemon.config_file), "--json", *options, snapshotter])
        text.detach()
    *told, summary = [json.loads(line) for line in printed.getvalue().splitlines()]
    left = [each["severity"] for each in told if not each["mended"]]
    assert {severity: left.count(severity) for severity in ("error", "warning", "note")}.items() <= summary[
        "summary"
    ].items()
    assert status == (20 if "error" in left or "warning" in left else 0)
    return told


def btrfs_filesystem(size_bytes: int = 2 << 30) -> contextlib.AbstractContextManager[Path]:
    """A mounted btrfs, see `loop_filesystem`."""
    return loop_filesystem("btrfs", size_bytes)


@contextlib.contextmanager
def loop_filesystem(kind: str, size_bytes: int, *options: str) -> Iterator[Path]:
    """A mounted filesystem on a sparse image behind a loop device; unmounted, detached and deleted at the end.

    `options` are for its mkfs.
    """
    place = Path(tempfile.mkdtemp(prefix=f"snb-{kind}-", dir=SCRATCH))
    image, target = place / "image", place / "mnt"
    target.mkdir()
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, place)
        with image.open("wb") as file:
            file.truncate(size_bytes)
        device = _run("losetup", "--find", "--show", image).strip()
        undo.callback(_run, "losetup", "--detach", device)
        _run(f"mkfs.{kind}", "-q", *options, device)
        _run("mount", device, target)
        # Lazily: a test that failed may have left somebody inside, and the image is to go all the same.
        undo.callback(_run, "umount", "--lazy", target)
        yield target


def _run(*command: str | os.PathLike[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def mounts_of(answer: MountsAnswer | Sequence[Mount]) -> list[Mount]:
    """The mounts of an answer, whichever client gave it."""
    return list(answer.mounts if isinstance(answer, MountsAnswer) else answer)
