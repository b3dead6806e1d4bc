"""Directories, filesystems and processes that last as long as the benchmark, however it ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

DISK = Path("/var/tmp")
"""On a disk: /tmp is in memory on many machines, where nothing that is called durable would be."""

STOP_SECONDS = 20.0
"""How long a process may take to stop before it is killed."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
UNMOUNT_SECONDS = 10.0
"""How long a mount may stay busy after the process that used it has ended."""


class _Interrupts:
    """Ctrl-C and its like: they end the run once, and never in the middle of cleaning up."""

    def __init__(self) -> None:
        self._shields = 0
        self._pending = False

    def install(self) -> None:
        """Take the signals."""
        for number in SIGNALS:
            signal.signal(number, self._arrived)

    def _arrived(self, signum: int, frame: FrameType | None) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if not self._shields:
            raise KeyboardInterrupt
        self._pending = True

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        """Hold a signal back until the block is done."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
            if self._pending and not self._shields:
                self._pending = False
                raise KeyboardInterrupt


interrupts = _Interrupts()


@contextlib.contextmanager
def directory(prefix: str, parent: Path = DISK) -> Iterator[Path]:
    """An empty directory; what is in it afterwards is deleted, but nothing that is mounted there."""
    path = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=parent))
    try:
        yield path
    finally:
        with interrupts.shield():
            delete(path)


def delete(path: Path) -> None:
    """Delete a tree quickly, never into another filesystem."""
    run(["rm", "-rf", "--one-file-system", str(path)], check=False)


def run(command: Sequence[str], *, check: bool = True, timeout: float | None = None, cwd: Path | None = None) -> str:
    """Run a command to its end and return what it printed; on an error raise with what it said."""
    with program(command, cwd=cwd) as running:
        try:
            output, errors = running.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{' '.join(command)}: not done after {timeout:g} s") from None
    if check and running.returncode:
        said = errors.strip() or output.strip()
        raise RuntimeError(f"{' '.join(command)}: exit status {running.returncode}: {said}")
    return output


@contextlib.contextmanager
def program(
    command: Sequence[str], *, cwd: Path | None = None, stdin: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A program whose output is read; if it has not ended by the end of the block, it and its children are killed."""
    running = subprocess.Popen(
        list(command), text=True, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd, process_group=0
    )
    try:
        yield running
    finally:
        if running.poll() is None:
            _kill_group(running.pid)
            running.communicate()


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


@contextlib.contextmanager
def filesystem(kind: str, size_bytes: int) -> Iterator[Path]:
    """A filesystem of its own, on a loop device over a sparse image; yields where it is mounted."""
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(directory(f"snapbroker-bench-{kind}"))
        image = home / "image"
        with image.open("wb") as file:
            file.truncate(size_bytes)
        run([f"mkfs.{kind}", "-q", str(image)])
        device = run(["losetup", "--direct-io=on", "--find", "--show", str(image)]).strip()
        stack.callback(_detach, device)
        target = home / "mount"
        target.mkdir()
        stack.enter_context(mounted(kind, device, (), target))
        yield target


def _detach(device: str) -> None:
    with interrupts.shield():
        run(["losetup", "--detach", device], check=False)


@contextlib.contextmanager
def mounted(kind: str, source: str, options: Sequence[str], target: Path) -> Iterator[Path]:
    """One mount, as mount(8) makes it."""
    command = ["mount"] if kind == "bind" else ["mount", "-t", kind]
    if options:
        command += ["-o", ",".join(options)]
    run([*command, source, str(target)])
    try:
        yield target
    finally:
        with interrupts.shield():
            _unmount(target)


def _unmount(target: Path) -> None:
    deadline = time.monotonic() + UNMOUNT_SECONDS
    while True:
        try:
            run(["umount", str(target)])
        except RuntimeError:
            if time.monotonic() > deadline:
                # Detached from the tree at least, so that deleting the directory cannot reach into it.
                run(["umount", "--lazy", str(target)], check=False)
                raise
            time.sleep(0.1)
        else:
            return


@contextlib.contextmanager
def process(command: Sequence[str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon in a process group of its own, so that Ctrl-C reaches only us; stopped with SIGTERM, then SIGKILL."""
    daemon = subprocess.Popen(list(command), stdout=log, stderr=log, process_group=0)
    try:
        yield daemon
    finally:
        with interrupts.shield():
            stop(daemon)


def stop(daemon: subprocess.Popen[Any]) -> None:
    """End a process and wait for it; what is left of its group after that, or after too long, is killed."""
    daemon.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        daemon.wait(STOP_SECONDS)
    _kill_group(daemon.pid)
    daemon.wait()


def require(*tools: str) -> None:
    """Raise unless every tool is there, saying all that are missing."""
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        raise RuntimeError(f"not installed: {', '.join(missing)}")
