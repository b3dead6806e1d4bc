"""What the running kernel can do for a mounter, found out by asking it."""

from __future__ import annotations

import enum
import errno
import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from snapbroker.mount import system

if TYPE_CHECKING:
    from collections.abc import Callable

_ABSENT: Final = (errno.ENOSYS, errno.EPERM)
"""How a call answers that is not there: the kernel with the first, an old seccomp profile with the second."""


class Layers(enum.Enum):
    """How an overlay is told its layers."""

    DESCRIPTOR = "descriptor"
    """One parameter each, path or descriptor (Linux 6.13)."""
    PATH = "path"
    """One parameter each, by path (Linux 6.7)."""
    STRING = "string"
    """All in the option string of mount(2), at most a page long."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """`trees`: mounts can be copied and changed while detached (Linux 5.12). `contexts`: fsopen(2) (5.2)."""

    trees: bool
    contexts: bool
    layers: Layers


CLASSIC: Final = Kernel(trees=False, contexts=False, layers=Layers.STRING)
"""A kernel with mount(2) and nothing else."""


@functools.cache
def running() -> Kernel:
    """The kernel this runs on. Without privileges it looks like the classic one, and mount(2) refuses."""
    trees = _there(lambda: system.open_tree("", recursive=False)) and _there(lambda: system.mount_setattr(-1))
    contexts = _there(lambda: system.fsopen("no such filesystem"))
    return Kernel(trees, contexts, _layers() if contexts else Layers.STRING)


def _there(call: Callable[[], object]) -> bool:
    """Whether a call with senseless arguments is refused for its arguments."""
    try:
        call()
    except OSError as error:
        return error.errno not in _ABSENT
    return True


def _layers() -> Layers:
    try:
        context = system.fsopen("overlay")
    except OSError:
        return Layers.STRING
    try:
        root = os.open("/", os.O_PATH | os.O_CLOEXEC)
        try:
            system.fsconfig_descriptor(context, "lowerdir+", root)
        except OSError:
            return _layers_by_path(context)
        finally:
            os.close(root)
        return Layers.DESCRIPTOR
    finally:
        os.close(context)


def _layers_by_path(context: int) -> Layers:
    # A kernel that knows the parameter looks the path up at once. One that does not either says EINVAL or,
    # where overlayfs has no context of its own yet, keeps the text for later and says nothing.
    try:
        system.fsconfig_string(context, "lowerdir+", "/proc/self/no such layer")
    except OSError as error:
        return Layers.PATH if error.errno == errno.ENOENT else Layers.STRING
    return Layers.STRING
