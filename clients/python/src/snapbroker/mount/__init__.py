"""The mounts of a snapshot made on this machine, all or none: what a caller does with an answer's mounts.

    mounts = broker.prepare("job-42", parent="layer-1")
    mount.all(mounts, "/srv/work")
    ...
    mount.unmount("/srv/work")

or, for the length of a block, `with mount.mounted(mounts) as path:`.

Types are bind, overlay and btrfs. Every option is understood or refused before anything is mounted, a
read-only mount is never writable for an instant, a writable one that the kernel quietly made read-only is an
error, and what failed leaves nothing mounted. Mounting needs root (CAP_SYS_ADMIN).
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from snapbroker.errors import BrokerError, FailedPrecondition, Internal, NotFound, PermissionDenied
from snapbroker.mount import classic, detached, system, table
from snapbroker.mount.kernel import Kernel, Layers, running
from snapbroker.mount.place import Place, place
from snapbroker.mount.plan import Plan, plan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from snapbroker.contract import Mount

__all__ = ["all", "mounted", "unmount"]

BUSY_SECONDS: Final = 0.5
"""How long an unmount waits for the users of a mount to go."""

_VOLATILE: Final = ("volatile", "fsync=volatile")

Target = str | os.PathLike[str]

_PRECONDITIONS: Final = {
    errno.EBUSY,
    errno.EEXIST,
    errno.EINVAL,
    errno.ELOOP,
    errno.ENODEV,
    errno.ENOENT,
    errno.ENOTBLK,
    errno.ENOTDIR,
    errno.EOPNOTSUPP,
    errno.EOVERFLOW,
    errno.EROFS,
    errno.ESTALE,
    errno.EXDEV,
}
"""Errors that blame what was found on this machine, and not the machine."""


def all(  # noqa: A001 - mount.all says what it does
    mounts: Iterable[Mount], target: Target, *, kernel: Kernel | None = None
) -> None:
    """Make the mounts, in their order, on `target` and below it.

    The target, and a `Mount.target` below it, must exist. `kernel` is what the kernel is to be asked for: the
    running one's abilities where absent. Raises InvalidArgument or Unimplemented for a type or option that is
    not understood, NotFound without the target, PermissionDenied, FailedPrecondition, Internal; whatever it
    is, nothing stays mounted.
    """
    _all(mounts, target, kernel or running())


def _all(mounts: Iterable[Mount], target: Target, kernel: Kernel) -> list[str]:
    """Make the mounts and answer where they are."""
    plans = [plan(mount) for mount in mounts]
    root = _resolved(target)
    made: list[str] = []
    try:
        for each in plans:
            with _blaming(each, root), place(root, each.target) as found:
                _make(each, found, kernel)
                made.append(found.path)
    except BaseException:
        _take_back(made)
        raise
    return made


def _resolved(target: Target) -> str:
    path = os.path.realpath(target)
    if not os.path.exists(path):
        raise NotFound(f"mount point {path} does not exist: make the directory first")
    return path


def _make(plan: Plan, place: Place, kernel: Kernel) -> None:
    match plan.type:
        case "bind" if kernel.trees:
            detached.bind(plan, place)
        case "bind":
            classic.bind(plan, place)
        case "overlay" if kernel.contexts and kernel.layers is not Layers.STRING:
            detached.overlay(plan, place, kernel)
        case "overlay":
            classic.overlay(plan, place, kernel)
        case _ if kernel.contexts:
            detached.btrfs(plan, place)
        case _:
            classic.btrfs(plan, place)


def _take_back(made: list[str]) -> None:
    """Undo mounts, newest first, even where somebody already looks into them."""
    for path in reversed(made):
        with contextlib.suppress(OSError):
            system.umount(path, system.MNT_DETACH)


@contextlib.contextmanager
def _blaming(plan: Plan, root: str) -> Iterator[None]:
    """Raise the operating system's errors as the contract's."""
    try:
        yield
    except OSError as error:
        point = "/".join([root.rstrip("/"), *plan.target]) or "/"
        what = f"cannot mount {plan.type} of {plan.source} on {point}"
        raise _explained(error, what, point, _volatile_before(plan)) from error


def _volatile_before(plan: Plan) -> str:
    """The advice for an upper directory that was mounted volatile once: the kernel refuses it a second time (C119)."""
    mark = f"{plan.work}/work/incompat/volatile"
    if not plan.work or not os.path.lexists(mark):
        return ""
    return (
        f"; {plan.upper} was mounted volatile before, and what was written then may be incomplete: discard the "
        f"snapshot, or remove {mark} if the machine has not crashed since"
    )


def _explained(error: OSError, what: str, point: str, advice: str = "") -> BrokerError:
    log = [line for line in getattr(error, "log", ()) if line]
    place = "" if error.filename in (None, point) else f" ({_shortened(str(error.filename))})"
    message = f"{what}: {error.strerror}{place}" + "".join(f"; {line}" for line in log) + advice
    details = {"errno": errno.errorcode.get(error.errno or 0, "?"), "target": point, "log": log}
    if error.errno in (errno.EPERM, errno.EACCES):
        return PermissionDenied(f"{message}; mounting needs root (CAP_SYS_ADMIN)", details)
    return (FailedPrecondition if error.errno in _PRECONDITIONS else Internal)(message, details)


def _shortened(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:400]}..."


def unmount(target: Target, *, recursive: bool = True, lazy: bool = False) -> None:
    """Unmount the topmost mount on `target`.

    `recursive`: first what is mounted on it, or, where the target itself is no mount, all that is mounted
    below it: the counterpart of `all` with mounts that have targets. `lazy`: take it out of the tree at once
    and let the kernel finish when the last user is gone. Raises FailedPrecondition where the target is not a
    mount point, or is busy (and says by whom), NotFound, PermissionDenied.
    """
    path = _resolved(target)
    if path == "/":
        raise FailedPrecondition("the root directory is not unmounted: name the mount point")
    flags = system.MNT_DETACH if lazy else 0
    error = _attempt(path, flags)
    if error is None:
        return
    if error.errno == errno.EBUSY:
        _unmount_busy(path, recursive)
    elif error.errno == errno.EINVAL:
        _unmount_below(path, recursive, flags)
    else:
        raise _explained(error, f"cannot unmount {path}", path) from error


def _unmount_busy(path: str, recursive: bool) -> None:
    """Unmount what is mounted on the mount, or wait for who else uses it."""
    entries = table.on_top_of(path)
    if len(entries) > 1 and not recursive:
        raise FailedPrecondition(
            f"{path} is busy: {len(entries) - 1} mounts lie on it: unmount them first, or recursively",
            {"errno": "EBUSY", "target": path},
        )
    for entry in entries:
        _unmount_patiently(entry.point, 0)


def _unmount_below(path: str, recursive: bool, flags: int) -> None:
    """Unmount what lies below a directory that is no mount."""
    entries = table.on_top_of(path)
    if not entries:
        raise FailedPrecondition(
            f"{path} is not a mount point: name the directory that something was mounted on (findmnt lists them)",
            {"target": path},
        )
    if not recursive:
        raise FailedPrecondition(
            f"{path} is not a mount point, but {len(entries)} lie below it: unmount those, or recursively",
            {"target": path},
        )
    for entry in entries:
        _unmount_patiently(entry.point, flags)


def _unmount_patiently(path: str, flags: int) -> None:
    """Unmount, giving who uses the mount BUSY_SECONDS to go.

    A process that another thread is just starting has this one's files open until its exec: milliseconds in
    which a mount is busy though nobody means to use it.
    """
    give_up = time.monotonic() + BUSY_SECONDS
    pause = 0.001
    while (error := _attempt(path, flags)) is not None:
        if error.errno != errno.EBUSY:
            raise _explained(error, f"cannot unmount {path}", path) from error
        if time.monotonic() + pause > give_up:
            holders = ", ".join(table.holders(path)) or "a process"
            raise FailedPrecondition(
                f"{path} is busy: in use by {holders}: end that first, or detach it lazily",
                {"errno": "EBUSY", "target": path},
            )
        time.sleep(pause)
        pause *= 2


def _attempt(path: str, flags: int) -> OSError | None:
    try:
        system.umount(path, flags)
    except OSError as error:
        return error
    return None


@contextlib.contextmanager
def mounted(mounts: Iterable[Mount], target: Target | None = None, *, kernel: Kernel | None = None) -> Iterator[Path]:
    """The mounts for the length of a block, on `target` or a temporary directory; the block gets its path.

    Nothing stays mounted after it. If a process still uses a mount when the block ends well, the mount is
    detached lazily and FailedPrecondition says so, because that process may go on writing. An overlay is never
    mounted volatile here, whatever its options say: what is mounted so cannot be mounted again (C119).
    """
    with contextlib.ExitStack() as stack:
        if target is None:
            target = tempfile.mkdtemp(prefix="snapbroker-")
            stack.callback(os.rmdir, target)
        made = _all(map(_lasting, mounts), target, kernel or running())
        try:
            yield Path(os.path.realpath(target))
        except BaseException:
            _take_back(made)
            raise
        _put_down(made)


def _lasting(mount: Mount) -> Mount:
    if mount.type != "overlay":
        return mount
    options = tuple(option for option in mount.options if option not in _VOLATILE)
    return msgspec.structs.replace(mount, options=options)


def _put_down(made: list[str]) -> None:
    """Unmount, newest first; what is busy is detached lazily and blamed at the end."""
    busy: BrokerError | None = None
    for path in reversed(made):
        try:
            unmount(path)
        except BrokerError as error:
            busy = busy or error
            _take_back([path])
    if busy is not None:
        raise busy
