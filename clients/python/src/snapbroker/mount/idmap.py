"""User namespaces that carry an id mapping, made without running Python in a forked child, kept for reuse.

An idmapped mount takes its mapping from a user namespace, and a namespace with a given mapping exists only
once some process has been in it. Forking a threaded Python for that is unsafe (a lock held by another thread
stays locked in the child), and starting a program costs milliseconds and needs the program. So the child is a
bare clone that does nothing but sleep(3) until its maps are written and its namespace is open here; then it
is killed. Were this process killed in between, the child ends by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from snapbroker.mount import system

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snapbroker.mount.plan import IdMapping

NAMESPACES_MAX: Final = 64
"""Most mappings kept, each at the price of one descriptor; the one unused longest goes first."""
_CHILD_SECONDS: Final = 10

_kept: OrderedDict[IdMapping, int] = OrderedDict()
_lock = threading.Lock()


@contextlib.contextmanager
def namespace(mapping: IdMapping) -> Iterator[int]:
    """A descriptor of a user namespace with this mapping, for the length of the block."""
    with _lock:
        kept = _kept.get(mapping)
        if kept is None:
            kept = _kept[mapping] = _create(mapping)
            if len(_kept) > NAMESPACES_MAX:
                os.close(_kept.popitem(last=False)[1])
        _kept.move_to_end(mapping)
        # A copy, since another thread's mapping may push this one out.
        descriptor = os.dup(kept)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _create(mapping: IdMapping) -> int:
    # The descriptors are shared: a copy of them would keep other threads' mounts busy while the child lives.
    child = system.clone_asleep(system.CLONE_NEWUSER | system.CLONE_FILES, _CHILD_SECONDS)
    try:
        _write(f"/proc/{child}/uid_map", mapping.users)
        _write(f"/proc/{child}/gid_map", mapping.groups)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, system.WAIT_CLONE)


def _write(path: str, text: str) -> None:
    # The kernel takes the whole map in one write and none after it.
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
