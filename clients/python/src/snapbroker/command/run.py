"""`snapbroker run`: a command in a fresh workspace, committed when it succeeds and discarded when it does not.

Signals are the hard part. Before the command runs, one ends everything, and the snapshot goes. While it runs,
signals are the command's: they are passed on, except the keyboard's, which the terminal sends to it by
itself; and whatever the command makes of it, a run that was interrupted is not committed. While the workspace
is committed or discarded, they wait: half of that is what nobody wants.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import uuid
from typing import TYPE_CHECKING, Any, Final

from snapbroker.errors import AlreadyExists, BrokerError, NotFound

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path
    from types import FrameType, TracebackType
    from typing import Self

    from snapbroker.blocking import Broker

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_KEYBOARD: Final = (signal.SIGINT, signal.SIGQUIT)
NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
"""The statuses shells use."""


class _Discard(BaseException):
    """Leaves the workspace's block so that nothing is committed; the run ends with `status`."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def run_in_workspace(broker: Broker, arguments: argparse.Namespace) -> int:
    """The command's exit status, 128+n where it or this program was ended by signal n; raises BrokerError.

    A name to commit that is taken is refused before the command runs; where it is taken, or the broker lost, while
    the command runs, the work is kept under its key.
    """
    if arguments.commit is not None:
        _check_free(broker, arguments.commit)
    key = f"run-{uuid.uuid4().hex}"
    with _Signals() as signals:
        try:
            with broker.workspace(
                parent=arguments.parent,
                commit_as=arguments.commit,
                key=key,
                labels=dict(arguments.labels),
                sync=arguments.sync,
                keep_uncommitted=True,
            ) as path:
                status = _execute(arguments.command, path, signals)
                if status:
                    raise _Discard(status)
        except _Discard as discarded:
            if not signals.ran:
                # The signal may have come between the broker's answer and the workspace that would discard
                # it.
                with contextlib.suppress(BrokerError):
                    broker.remove(key)
            return discarded.status
        except BrokerError as error:
            if signals.ran and not getattr(error, "__notes__", ()):
                error.add_note("what the command made is discarded")
            raise
    return 0


def _check_free(broker: Broker, name: str) -> None:
    """Raise AlreadyExists where the name is taken: hours of work are not begun to be refused at the end."""
    with contextlib.suppress(NotFound):
        broker.stat(name)
        raise AlreadyExists(f"snapshot {name!r} exists already, the command was not run")


def _execute(command: Sequence[str], path: Path, signals: _Signals) -> int:
    try:
        status = signals.wait(command, path)
    except OSError as error:
        print(f"snapbroker: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
    if status < 0:
        return 128 - status
    if signals.received and not status:
        return 128 + signals.received
    return status


class _Signals:
    """What a signal means at each stage, as a context manager around the run; `ran`: the command was started."""

    def __init__(self) -> None:
        self.received = 0
        self.ran = False
        self._child: subprocess.Popen[bytes] | None = None
        self._recording = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # What is ignored stays ignored: nohup means it, and so does a shell's background job.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self, command: Sequence[str], path: Path) -> int:
        """Run the command to its end; answers its status, negative for a signal. Signals only wait after it."""
        # Recorded, not raised, as long as there may be a child that nobody knows yet.
        self._recording = True
        child = subprocess.Popen(command, cwd=path)
        self.ran = True
        self._child = child
        if self.received:
            child.send_signal(self.received)
        status = child.wait()
        self._child = None
        return status

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number
        if self._child is not None:
            if number not in _KEYBOARD or not _in_foreground():
                self._child.send_signal(number)
        elif not self._recording:
            self._recording = True
            raise _Discard(128 + number)


def _in_foreground() -> bool:
    """Whether the terminal's keys signal this program and its child alike."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
