"""What the fork server of `test_forks` runs; a module of its own, since its imports are waited for."""

from __future__ import annotations

import os
import socket
import sys

from broker.actor.forks import Forks, ForkServer
from broker.actor.lineage import die_with_parent


def leave(number: int, _forks: Forks, _given: list[int]) -> int:
    return number


def fail(number: int, _forks: Forks, _given: list[int]) -> int:
    raise ValueError(number)


def echo(_number: int, _forks: Forks, given: list[int]) -> int:
    """Say what is open, then what comes, until nothing more does."""
    with socket.socket(fileno=given[0]) as line:
        line.sendall(b"%d" % len(os.listdir("/proc/self/fd")))
        while data := line.recv(100):
            line.sendall(data)
    return 0


def parent(number: int, forks: Forks, given: list[int]) -> int:
    """Start others, say who they are, and wait for an end from outside."""
    children = [forks.start("echo", 0, given[0]) for _ in range(number)]
    with socket.socket(fileno=given[1]) as line:
        line.sendall(b" ".join(b"%d" % child.pid for child in children))
        line.recv(1)
    return 0


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    owner = socket.socket(fileno=int(sys.argv[2]))
    ForkServer(owner, {"leave": leave, "fail": fail, "echo": echo, "parent": parent}).run()


if __name__ == "__main__":
    main()
