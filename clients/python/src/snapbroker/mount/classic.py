"""Mounts made with mount(2), for kernels, and seccomp profiles, without the new mount API.

Two things are hard with it. A bind mount is writable until a second call, and its submounts until a call
each: so it is made in a private corner and moved to its place when it is right. And an option string is at
most a page: so layers are named relative to the directory they have in common, by a thread that has a working
directory of its own (C118).
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

from snapbroker.errors import FailedPrecondition, InvalidArgument
from snapbroker.mount import system, table
from snapbroker.mount.detached import READ_ONLY_REASONS, refuse_read_only
from snapbroker.mount.plan import SUPERBLOCK, Attributes, Plan, escaped
from snapbroker.mount.staging import Staging

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snapbroker.mount.kernel import Kernel
    from snapbroker.mount.place import Place

_FLAGS: Final = {
    system.MOUNT_ATTR_RDONLY: system.MS_RDONLY,
    system.MOUNT_ATTR_NOSUID: system.MS_NOSUID,
    system.MOUNT_ATTR_NODEV: system.MS_NODEV,
    system.MOUNT_ATTR_NOEXEC: system.MS_NOEXEC,
    system.MOUNT_ATTR_NODIRATIME: system.MS_NODIRATIME,
    system.MOUNT_ATTR_NOSYMFOLLOW: system.MS_NOSYMFOLLOW,
}
_ATIME_FLAGS: Final = {
    None: 0,
    0: system.MS_RELATIME,
    system.MOUNT_ATTR_NOATIME: system.MS_NOATIME,
    system.MOUNT_ATTR_STRICTATIME: system.MS_STRICTATIME,
}
_KEPT: Final = system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC | system.MS_RDONLY | system.MS_NODIRATIME
"""What statvfs(3) tells of a mount in the very bits of mount(2)."""


def bind(plan: Plan, place: Place) -> None:
    """Bind in a private corner, set the attributes of every mount in it, and move it to its place."""
    if plan.mapping:
        raise FailedPrecondition("mount options uidmap= and gidmap= need mount_setattr(2): Linux 5.12 or later")
    with Staging() as staging:
        point = staging.point(plan.source, "bind")
        recursive = system.MS_REC if plan.recursive else 0
        system.mount(plan.source, point, None, system.MS_BIND | recursive)
        system.mount(None, point, None, system.MS_PRIVATE | recursive)
        if plan.attributes.writable:
            refuse_read_only(os.statvfs(point), f"its source {plan.source} lies on a read-only mount")
        if plan.attributes.all or plan.attributes.remove:
            for entry in reversed(table.on_top_of(point)):
                _remount(entry.point, plan.attributes)
        system.mount(point, place.link, None, system.MS_MOVE)


def _remount(point: str, attributes: Attributes) -> None:
    """Add the attributes to those the mount has: a remount drops what it does not repeat."""
    flags = system.MS_REMOUNT | system.MS_BIND | _flags(attributes)
    present = os.statvfs(point).f_flag
    flags |= present & _KEPT
    if attributes.atime is None:
        flags |= _atime(present)
    system.mount(None, point, None, flags)


def _atime(present: int) -> int:
    if present & os.ST_NOATIME:
        return system.MS_NOATIME
    return system.MS_RELATIME if present & os.ST_RELATIME else system.MS_STRICTATIME


def _flags(attributes: Attributes) -> int:
    flags = _ATIME_FLAGS[attributes.atime]
    for attribute, flag in _FLAGS.items():
        flags |= flag if attributes.add & attribute else 0
    return flags


def btrfs(plan: Plan, place: Place) -> None:
    """Mount a subvolume."""
    if plan.mapping:
        raise FailedPrecondition("mount options uidmap= and gidmap= need mount_setattr(2): Linux 5.12 or later")
    flags, options = _parameters(plan)
    _mount(plan, place, flags, ",".join(options))


def overlay(plan: Plan, place: Place, kernel: Kernel) -> None:
    """Mount an overlay whose layers fit into one page, if need be relative to a common directory."""
    if not plan.mapping:
        _overlay(plan, plan.lowers, place)
        return
    if not kernel.trees:
        raise FailedPrecondition("mount options uidmap= and gidmap= need mount_setattr(2): Linux 5.19 or later")
    with Staging() as staging, staging.idmapped(plan) as lowers:
        _overlay(plan, lowers, place)


def _overlay(plan: Plan, lowers: Sequence[str], place: Place) -> None:
    flags, options = _parameters(plan)
    if plan.upper:
        options += [f"upperdir={escaped(plan.upper)}", f"workdir={escaped(plan.work)}"]
    whole = _joined(options, lowers)
    if _fits(whole):
        _mount(plan, place, flags, whole)
        return
    common = os.path.commonpath(lowers)
    relative = _joined(options, [os.path.relpath(lower, common) for lower in lowers])
    if not _fits(relative):
        raise FailedPrecondition(
            f"{len(lowers)} layers need {len(os.fsencode(relative))} bytes of mount options, and this kernel "
            f"takes {system.PAGE_BYTES_MAX}: Linux 6.7 or later takes 500 layers"
        )
    _mount_from(common, plan, place, flags, relative)


def _joined(options: Sequence[str], lowers: Sequence[str]) -> str:
    return ",".join([*options, "lowerdir=" + ":".join(map(escaped, lowers))])


def _fits(options: str) -> bool:
    return len(os.fsencode(options)) <= system.PAGE_BYTES_MAX


def _mount_from(directory: str, plan: Plan, place: Place, flags: int, options: str) -> None:
    """Mount in a thread whose working directory is `directory`: the process's own stays as it is."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            system.unshare(system.CLONE_FS)
            os.chdir(directory)
            _mount(plan, place, flags, options)
        except BaseException as error:  # raised again in the calling thread
            failures.append(error)

    # A thread of its own, and not one of a pool: it can never again share a working directory with the
    # others.
    thread = threading.Thread(target=work, name="snapbroker-mount")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def _parameters(plan: Plan) -> tuple[int, list[str]]:
    flags = _flags(plan.attributes)
    options: list[str] = []
    for key, value in plan.parameters:
        if key in SUPERBLOCK:
            flags |= SUPERBLOCK[key]
        elif value is not None and "," in value:
            raise InvalidArgument(f"mount option {key}={value} has a comma, which mount(2) takes for the next option")
        else:
            options.append(key if value is None else f"{key}={value}")
    return flags, options


def _mount(plan: Plan, place: Place, flags: int, options: str) -> None:
    system.mount(plan.source, place.link, plan.type, flags, os.fsencode(options))
    if plan.attributes.read_only or not (plan.upper or plan.type == "btrfs"):
        return
    try:
        refuse_read_only(os.statvfs(place.path), READ_ONLY_REASONS[plan.type])
    except BaseException:
        system.umount(place.path, system.MNT_DETACH)
        raise
