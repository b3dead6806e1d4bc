"""A daemon with remote sockets and a key directory, and plain sockets with a key for what no client would do."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zmq

from broker import keys
from snapbroker import aio, blocking, sockets
from snapbroker.keyfiles import Curve
from tests.daemon import support
from tests.harness import Daemon, Wire

REREAD_MS = 50
"""How often the key directory is looked at here."""


class Guarded:
    """The daemon, its keys, and clients that have one."""

    def __init__(self, daemon: Daemon, directory: Path) -> None:
        self.daemon = daemon
        self.directory = directory

    @property
    def endpoint(self) -> str:
        """The remote router."""
        return str(self.daemon.settings["tcp"]["endpoint"])

    @property
    def events_endpoint(self) -> str:
        """The remote publisher."""
        return str(self.daemon.settings["tcp"]["events_endpoint"])

    def grant(self, name: str, role: str = "read", *namespaces: str, snapshotters: tuple[str, ...] = ()) -> Curve:
        """Make a key, and wait until the broker knows it."""
        _, theirs = keys.make(self.directory, name, role, namespaces, snapshotters)
        curve = Curve.load(theirs)
        assert curve is not None
        self.wait_reread()
        return curve

    def revoke(self, name: str) -> None:
        """Take a key away, and wait until the broker knows."""
        keys.revoke(self.directory, name)
        self.wait_reread()

    def wait_reread(self) -> None:
        """Wait until the broker has what lies in the directory."""
        if self.daemon.process is None:
            return
        listing = keys.read_directory(self.directory)
        known = {"keys": len(listing.entries), "keys_bad": len(listing.bad)}
        self.daemon.wait_for(lambda status: known.items() <= status.queues["access"].items())

    def wire(self, curve: Curve | None, snapshotter: str = "memory", namespace: str = "red") -> Wire:
        """The bare protocol with a key."""
        return Wire(self.endpoint, snapshotter, namespace, curve)

    def client(self, curve: Curve | Path | None, namespace: str = "red", **arguments: Any) -> blocking.Broker:
        """The blocking client with a key."""
        arguments = {"snapshotter": "memory", **arguments}
        return blocking.connect(self.endpoint, namespace=namespace, curve=curve, **arguments)

    def aio_client(
        self, curve: Curve | None, namespace: str = "red", **arguments: Any
    ) -> contextlib.AbstractAsyncContextManager[aio.Broker]:
        """The asyncio client with a key."""
        arguments = {"snapshotter": "memory", **arguments}
        return aio.connect(self.endpoint, namespace=namespace, curve=curve, **arguments)

    def figure(self, queue: str, name: str) -> int:
        """One figure of the broker's status."""
        return self.daemon.status().queues[queue][name]


@contextlib.contextmanager
def guarded(*snapshotters: str, **settings: Any) -> Iterator[Guarded]:
    """A daemon with remote sockets; removed at the end."""
    daemon = Daemon({name: {"backend": "memory"} for name in snapshotters or ("memory",)}, **settings)
    directory = daemon.place / "keys"
    daemon.settings["tcp"] = {
        "endpoint": f"tcp://127.0.0.1:{_free_port()}",
        "events_endpoint": f"tcp://127.0.0.1:{_free_port()}",
        "keys": str(directory),
        "reread_ms": REREAD_MS,
        **settings.get("tcp", {}),
    }
    keys.make(directory, "first", "read", (), ())
    with daemon:
        yield Guarded(daemon, directory)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def raw_socket(kind: int, endpoint: str, curve: Curve | None) -> Iterator[zmq.Socket[bytes]]:
    """A plain socket of pyzmq's with a key, connected."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    plain = context.socket(kind)
    try:
        plain.set(zmq.LINGER, 0)
        plain.set(zmq.RECONNECT_IVL, 20)
        if curve is not None:
            sockets.equip(plain, curve)
        plain.connect(endpoint)
        yield plain
    finally:
        plain.close()
        context.term()


def take_until(plain: zmq.Socket[bytes], condition: Callable[[list[bytes]], bool]) -> list[list[bytes]]:
    """Every message up to the one that meets the condition, which is the last."""
    taken: list[list[bytes]] = []

    def some() -> bool:
        while plain.poll(0):
            taken.append(plain.recv_multipart())
            if condition(taken[-1]):
                return True
        return False

    support.wait_until(some, "a published message")
    return taken
