"""Processes by fork from one that has everything loaded: what takes part in a snapshotter is there in milliseconds.

The interpreter's start and the imports take a third of a second of a processor, and a snapshotter whose actor died
waits for it. So the broker starts one process, the fork server, that imports once and then does nothing but fork. It
has one thread, no loop, no capability in force, and knows nothing of any snapshot.

Who asks has a connection to it: the broker, and from its birth every process that was forked. A request is what to
run, a number for it, and descriptors. The first of these is a line for this one child, on which who asked hears of
its birth (process id, and a pidfd to signal it by) and its end (exit status); the others are given to the child. What
was started over a connection is killed when that connection ends: an actor's children go with the actor, everything
goes with the broker.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import anyio
import msgspec

from broker.actor.lineage import die_with_parent

REQUEST_BYTES: Final = 256
"""Most of one request, beside its descriptors."""
GIVEN_MAX: Final = 4
"""Most descriptors of one request."""
END_S: Final = 2.0
"""How long the fork server has to end when its owner has let go of it."""
FAILED: Final = 1
"""Exit status of a child that raised."""
LOST: Final = -signal.SIGKILL
"""Exit status of a child whose fork server is gone: it is killed with it."""

_STATUS: Final = struct.Struct("=ii")
"""The birth: process id and 0, or 0 and why there is none (errno). The end: exit status and 0."""
_decode = msgspec.msgpack.Decoder(tuple[str, int]).decode
_encode = msgspec.msgpack.Encoder().encode

Run = Callable[[int, "Forks", list[int]], int]
"""What a child runs: gets its number, a connection to start others over, and what it was given; its exit status."""


class Child:
    """A process that somebody asked for, as who asked has it; for one thread, signals from any."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        """Readable when there is something to hear: the birth first, then the end."""
        self.pid = 0
        self._handle = -1

    def born(self) -> None:
        """Wait for the birth; OSError when there is none."""
        message, handles = b"", list[int]()
        with suppress(ConnectionError):
            message, handles, _, _ = socket.recv_fds(self.line, _STATUS.size, 1, socket.MSG_CMSG_CLOEXEC)
        self.pid, number = _STATUS.unpack(message) if message else (0, errno.ECHILD)
        if not handles:
            self._end()
            raise OSError(number or errno.EMFILE, f"no process can be forked: {os.strerror(number or errno.EMFILE)}")
        (self._handle,) = handles

    def wait(self) -> int:
        """Wait for the end; the exit status, negative where a signal was the end."""
        message = b""
        with suppress(ConnectionError):
            message = self.line.recv(_STATUS.size)
        self._end()
        return int(_STATUS.unpack(message)[0]) if message else LOST

    def _end(self) -> None:
        self.line.close()
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def send_signal(self, number: int) -> None:
        """Signal it, if it is there."""
        if self._handle >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """End it, if it is there."""
        self.send_signal(signal.SIGKILL)


class Forks:
    """A connection to the fork server; for any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def ask(self, run: str, number: int, *descriptors: int) -> Child:
        """Ask for a process that runs `run`; OSError where nobody hears it. The child is still to be born."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                socket.send_fds(
                    self._connection,
                    [_encode((run, number))],
                    [theirs.fileno(), *descriptors],
                    socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL,
                )
        except OSError:
            ours.close()
            raise
        return Child(ours)

    def start(self, run: str, number: int, *descriptors: int) -> Child:
        """Ask for a process, and wait until it is there."""
        child = self.ask(run, number, *descriptors)
        child.born()
        return child

    def close(self) -> None:
        """Let go of the connection, and so of what was started over it."""
        self._connection.close()


@dataclass(slots=True, eq=False)
class _Forked:
    """A child, as its parent has it."""

    pid: int
    line: socket.socket
    starter: int
    """The connection over which it was asked for."""
    connection: int
    """This end of its own, while it is open."""


class ForkServer:
    """The process that forks; `run` until the owner's connection ends."""

    def __init__(self, owner: socket.socket, runs: Mapping[str, Run]) -> None:
        self._runs = runs
        self._owner = owner.fileno()
        self._connections: dict[int, socket.socket] = {}
        self._children: dict[int, _Forked] = {}
        """By pidfd."""
        self._poll = select.poll()
        self._pid = os.getpid()
        self._connect(owner)

    def run(self) -> None:
        """Fork, and tell of births and ends."""
        while self._owner in self._connections:
            for descriptor, _ in self._poll.poll():
                # Nothing here waits: a descriptor may be another one since the poll.
                if descriptor in self._children:
                    self._reap(descriptor)
                elif descriptor in self._connections:
                    self._serve(descriptor)
        # Nothing that it forked outlives it; what was asked for over the owner's connection is killed already.
        for child in self._children.values():
            os.kill(child.pid, signal.SIGKILL)
        for child in self._children.values():
            os.waitpid(child.pid, 0)

    def _connect(self, connection: socket.socket) -> None:
        self._connections[connection.fileno()] = connection
        self._poll.register(connection, select.POLLIN)

    def _serve(self, starter: int) -> None:
        try:
            body, given, _, _ = socket.recv_fds(
                self._connections[starter], REQUEST_BYTES, GIVEN_MAX, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            body, given = b"", []
        if not body:
            self._disconnect(starter)
        elif given:
            line = socket.socket(fileno=given.pop(0))
            try:
                # Whoever asked is one of ours; what it may not ask for is not there.
                name, number = _decode(body)
                self._fork(self._runs[name], number, line, given, starter)
            except (OSError, KeyError, msgspec.MsgspecError) as error:
                _tell(line, 0, error.errno or errno.EAGAIN if isinstance(error, OSError) else errno.EINVAL)
                line.close()
            finally:
                for descriptor in given:
                    os.close(descriptor)

    def _fork(self, run: Run, number: int, line: socket.socket, given: list[int], starter: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                raise
            if not pid:
                self._become(run, number, (line, ours), theirs, given)
        try:
            handle = os.pidfd_open(pid)
        except OSError:
            ours.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self._children[handle] = _Forked(pid, line, starter, ours.fileno())
        self._poll.register(handle, select.POLLIN)
        self._connect(ours)
        _tell(line, pid, 0, handle)

    def _become(
        self, run: Run, number: int, parents: tuple[socket.socket, ...], connection: socket.socket, given: list[int]
    ) -> None:
        """In the child: have nothing of the fork server's, run, and end."""
        status = FAILED
        try:
            die_with_parent(self._pid)
            for handle, child in self._children.items():
                os.close(handle)
                child.line.close()
            for each in (*self._connections.values(), *parents):
                each.close()
            status = run(number, Forks(connection), given)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else FAILED
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError):
                sys.stderr.flush()
            os._exit(status)

    def _reap(self, handle: int) -> None:
        child = self._children[handle]
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        if pid:
            del self._children[handle]
            self._poll.unregister(handle)
            os.close(handle)
            self._disconnect(child.connection)
            _tell(child.line, os.waitstatus_to_exitcode(status), 0)
            child.line.close()

    def _disconnect(self, descriptor: int) -> None:
        """A connection has ended, and with it what was started over it."""
        connection = self._connections.pop(descriptor, None)
        if connection is None:
            return
        self._poll.unregister(connection)
        connection.close()
        for child in self._children.values():
            if child.starter == descriptor:
                os.kill(child.pid, signal.SIGKILL)
            if child.connection == descriptor:
                child.connection = -1


def _tell(line: socket.socket, status: int, number: int, *handles: int) -> None:
    """Say something to who asked, if it is still there."""
    with suppress(OSError):
        socket.send_fds(line, [_STATUS.pack(status, number)], list(handles), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class ForkServerProcess:
    """The fork server as the broker has it: started when the first process is wanted, and again when it is gone."""

    def __init__(self, module: str) -> None:
        """`module` makes a ForkServer: its arguments are the process id of its parent, and the owner's descriptor."""
        self._module = module
        self._running: tuple[subprocess.Popen[bytes], Forks] | None = None

    def launch(self) -> Forks:
        """The connection to the one that runs, which is started if there is none."""
        if self._running is not None:
            process, forks = self._running
            if process.poll() is None:
                return forks
            forks.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module, str(os.getpid()), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        forks = Forks(ours)
        self._running = process, forks
        return forks

    async def start(self, run: str, number: int, *descriptors: int, timeout_s: float) -> Child:
        """As `Forks.start`; OSError when it is not there in time."""
        child = self.launch().ask(run, number, *descriptors)
        with anyio.move_on_after(timeout_s):
            await anyio.wait_readable(child.line)
            child.born()
            return child
        self.kill()
        child.line.close()
        raise OSError(errno.ETIMEDOUT, f"the fork server does not answer within {timeout_s:g} s and is killed")

    def kill(self) -> None:
        """End it, and with it all that it forked."""
        if self._running is not None:
            self._running[0].kill()

    async def close(self) -> None:
        """Let it end; what it forked is gone already, or is killed."""
        if self._running is None:
            return
        process, forks = self._running
        forks.close()
        handle = os.pidfd_open(process.pid)
        try:
            with anyio.move_on_after(END_S):
                await anyio.wait_readable(handle)
        finally:
            os.close(handle)
            process.kill()
            process.wait()
