"""Capabilities: what a process of the broker keeps, and that it gets no more.

An actor keeps what its backend says it needs; its child processes inherit that and no more. The broker process itself
needs none while it serves, but starts actors: it keeps theirs in reserve (permitted) and has none in force (effective).
Capabilities belong to threads, and a thread has those of who started it: so all of this is done before threads start.

With "no new privileges" set, a program that is started has what its starter had permitted, and no set-user-id file
changes that (prctl(2), capabilities(7)).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

NAMES: Final = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap",
    "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner",
    "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice",
    "sys_resource", "sys_time", "sys_tty_config", "mknod", "lease", "audit_write", "audit_control", "setfcap",
    "mac_override", "mac_admin", "syslog", "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf",
    "checkpoint_restore",
)  # fmt: skip
"""Capabilities by their numbers (linux/capability.h)."""
ALL: Final = frozenset(NAMES)

REACHING: Final = "dac_read_search"
"""Kept by who was given it as an ambient one: the interpreter may be out of reach without, and so every child."""

_VERSION_3: Final = 0x20080522
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_IS_SET: Final = 1


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Words(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


_libc = ctypes.CDLL(None, use_errno=True)


def _mask(names: Iterable[str]) -> int:
    return sum(1 << NAMES.index(name) for name in names)


def _get() -> tuple[int, int, int]:
    """Effective, permitted and inheritable of the calling thread."""
    words = (_Words * 2)()
    _call("capget", ctypes.byref(_Header(_VERSION_3, 0)), words)
    low, high = words
    return (
        low.effective | high.effective << 32,
        low.permitted | high.permitted << 32,
        low.inheritable | high.inheritable << 32,
    )


def _set(effective: int, permitted: int, inheritable: int) -> None:
    half = 0xFFFFFFFF
    words = (_Words * 2)(
        _Words(effective & half, permitted & half, inheritable & half),
        _Words(effective >> 32, permitted >> 32, inheritable >> 32),
    )
    _call("capset", ctypes.byref(_Header(_VERSION_3, 0)), words)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _reaching() -> int:
    given = _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_IS_SET, NAMES.index(REACHING), 0, 0) == 1
    return _mask((REACHING,)) if given else 0


def kept_by(backend: type[Any]) -> frozenset[str]:
    """The capabilities that a backend needs once it is open; all, where it does not say."""
    return frozenset(getattr(backend, "privileges", ALL))


def keep(names: Iterable[str]) -> None:
    """Give up every capability but these, for good."""
    wanted = _mask(names) | _reaching()
    _, permitted, inheritable = _get()
    for number in range(len(NAMES)):
        if not wanted >> number & 1:
            # Without setpcap the bounding set stays as it is: no program that is started gains by it, see above.
            _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"no_new_privs: {os.strerror(number)}")
    kept = permitted & wanted
    _set(kept, kept, inheritable & wanted)


def rest() -> None:
    """Have no capability in force in this thread, nor in those it starts, until `raised`."""
    _, permitted, inheritable = _get()
    _set(permitted & _reaching(), permitted, inheritable)


def rise() -> None:
    """Have in force what is permitted, for good."""
    _, permitted, inheritable = _get()
    _set(permitted, permitted, inheritable)


@contextmanager
def raised() -> Iterator[None]:
    """Have in force what is permitted, for a moment."""
    effective, permitted, inheritable = _get()
    _set(permitted, permitted, inheritable)
    try:
        yield
    finally:
        _, permitted, inheritable = _get()
        _set(effective & permitted, permitted, inheritable)


@contextmanager
def lowered() -> Iterator[None]:
    """Have none in force, for a moment: what is started here has none."""
    effective, permitted, inheritable = _get()
    _set(0, permitted, inheritable)
    try:
        yield
    finally:
        _set(effective, permitted, inheritable)
