"""A relay between a client and the broker that loses replies: the request went through, and nobody hears of it.

It moves bytes between Unix sockets and knows nothing of what they mean. A client whose connection is cut connects anew
and repeats; the broker has done what was asked, and gives the first answer.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from typing import Final, Self

CHUNK: Final = 65_536


class Relay:
    """Listens at `path` for clients of the broker at `upstream`; `cuts`: connections that it has cut."""

    def __init__(self, path: Path, upstream: Path) -> None:
        self.endpoint = f"ipc://{path}"
        self.cuts = 0
        self._upstream = upstream
        self._lock = threading.Lock()
        self._cutting = False
        self._room: int | None = None
        self._thawed = threading.Event()
        self._frozen = threading.Event()
        self._closed = False
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._run(self._accept)

    def cut_next_reply(self) -> None:
        """Keep back the next thing the broker says, and cut the connection."""
        self._cutting = True

    def freeze_after(self, size: int) -> None:
        """Keep back everything that the broker says after so many further bytes."""
        self._thawed.clear()
        self._frozen.clear()
        self._room = size

    def wait_frozen(self, within: float) -> bool:
        """Wait until something is kept back."""
        return self._frozen.wait(within)

    def thaw(self) -> None:
        """Cut the connections whose replies were kept back; those that come are served again."""
        self._room = None
        self._thawed.set()

    def close(self) -> None:
        """Cut everything and end."""
        self._closed = True
        self.thaw()
        with self._lock:
            for each in (*self._open, self._listener):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            broker = socket.socket(socket.AF_UNIX)
            try:
                broker.connect(str(self._upstream))
            except OSError:
                client.close()
                broker.close()
                continue
            with self._lock:
                self._open.update((client, broker))
            self._run(self._carry, client, broker)

    def _carry(self, client: socket.socket, broker: socket.socket) -> None:
        """Both directions of one connection, until either side ends it."""
        up = threading.Thread(target=self._up, args=(client, broker), daemon=True)
        up.start()
        self._down(broker, client)
        for each in (client, broker):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        up.join()
        with self._lock:
            self._open.difference_update((client, broker))
        client.close()
        broker.close()

    def _up(self, client: socket.socket, broker: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(CHUNK):
                broker.sendall(data)
        with contextlib.suppress(OSError):
            broker.shutdown(socket.SHUT_RDWR)

    def _down(self, broker: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := broker.recv(CHUNK):
                if self._cutting:
                    self._cutting = False
                    self.cuts += 1
                    return
                if self._room is not None:
                    self._room -= len(data)
                    if self._room < 0:
                        self._frozen.set()
                        self._thawed.wait()
                        self.cuts += 1
                        return
                client.sendall(data)
