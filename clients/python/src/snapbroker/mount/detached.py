"""Mounts made with the new mount API: built detached, where nobody sees them, attached when they are right.

A mount that is read-only, private or idmapped is so before it has a place; one that comes out wrong is closed
and was never there.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from snapbroker.errors import FailedPrecondition
from snapbroker.mount import idmap, system
from snapbroker.mount.kernel import Kernel, Layers
from snapbroker.mount.staging import Staging

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from snapbroker.mount.place import Place
    from snapbroker.mount.plan import IdMapping, Plan

Layer = str | int
"""A path, or a descriptor."""


class KernelLogError(OSError):
    """An error of a filesystem context, with what the kernel said about it in `log`."""

    log: Sequence[str] = ()


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def bind(plan: Plan, place: Place) -> None:
    """Attach a copy of the mount at the source, with attributes of its own."""
    with clone(plan.source, plan) as copy:
        if plan.attributes.writable:
            refuse_read_only(os.fstatvfs(copy), f"its source {plan.source} lies on a read-only mount")
        system.move_mount(copy, place.descriptor)


@contextlib.contextmanager
def clone(source: str, plan: Plan) -> Iterator[int]:
    """A detached copy of a mount: private, so that what is mounted on it does not appear at its source."""
    with _closing(system.open_tree(source, recursive=plan.recursive)) as copy:
        system.mount_setattr(
            copy,
            recursive=plan.recursive,
            add=plan.attributes.all,
            remove=plan.attributes.remove,
            propagation=system.MS_PRIVATE,
        )
        if plan.mapping:
            apply_mapping(copy, plan.mapping, recursive=plan.recursive)
        yield copy


def apply_mapping(descriptor: int, mapping: IdMapping, *, recursive: bool = False) -> None:
    """Make a detached mount an idmapped one."""
    with idmap.namespace(mapping) as userns:
        try:
            system.mount_setattr(descriptor, recursive=recursive, add=system.MOUNT_ATTR_IDMAP, userns=userns)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise FailedPrecondition(
                "the filesystem of the snapshot does not take an id mapping (uidmap=, gidmap=): keep the "
                "snapshotter's root on ext4, xfs, btrfs or tmpfs"
            ) from None


def btrfs(plan: Plan, place: Place) -> None:
    """Mount a subvolume."""
    with _context("btrfs") as context:
        system.fsconfig_string(context, "source", plan.source)
        _parameters(context, plan)
        _attach(context, plan, place)


def overlay(plan: Plan, place: Place, kernel: Kernel) -> None:
    """Mount an overlay of up to 500 layers, one parameter each."""
    with idmapped(plan) as lowers:
        try:
            _overlay(plan, lowers, place, kernel)
        except OSError as error:
            # Linux before 6.15 takes idmapped copies as layers only where they are attached.
            if not plan.mapping or error.errno != errno.EINVAL:
                raise
        else:
            return
    with Staging() as staging, staging.idmapped(plan) as lowers:
        _overlay(plan, lowers, place, kernel)


@contextlib.contextmanager
def idmapped(plan: Plan) -> Iterator[Sequence[Layer]]:
    """The lower layers, as detached idmapped copies where the plan has a mapping (C111).

    The upper layer is not mapped: overlayfs works in it as the mounter, whom the mapping does not contain.
    """
    if not plan.mapping:
        yield plan.lowers
        return
    with contextlib.ExitStack() as stack:
        copies: list[int] = []
        for lower in plan.lowers:
            copies.append(stack.enter_context(_closing(system.open_tree(lower, recursive=False))))
            apply_mapping(copies[-1], plan.mapping)
        yield copies


def _overlay(plan: Plan, lowers: Sequence[Layer], place: Place, kernel: Kernel) -> None:
    with _context("overlay") as context, contextlib.ExitStack() as opened:
        system.fsconfig_string(context, "source", plan.source)
        _parameters(context, plan)
        for lower in lowers:
            _layer(context, "lowerdir+", lower, kernel, opened)
        if plan.upper:
            _layer(context, "upperdir", plan.upper, kernel, opened)
            _layer(context, "workdir", plan.work, kernel, opened)
        _attach(context, plan, place)


def _layer(context: int, key: str, layer: Layer, kernel: Kernel, opened: contextlib.ExitStack) -> None:
    """Name a layer: by path where that is short and plain, since the table of mounts then shows it."""
    if isinstance(layer, str):
        if len(os.fsencode(layer)) <= system.STRING_BYTES_MAX and "\\" not in layer:
            system.fsconfig_string(context, key, layer)
            return
        layer = opened.enter_context(_closing(os.open(layer, os.O_PATH | os.O_CLOEXEC)))
    if kernel.layers is Layers.DESCRIPTOR:
        system.fsconfig_descriptor(context, key, layer)
    else:
        system.fsconfig_string(context, key, f"/proc/self/fd/{layer}")


@contextlib.contextmanager
def _context(fstype: str) -> Iterator[int]:
    with _closing(system.fsopen(fstype)) as context:
        try:
            yield context
        except OSError as error:
            told = KernelLogError(error.errno, error.strerror, error.filename)
            told.log = system.messages(context)
            raise told from None


def _parameters(context: int, plan: Plan) -> None:
    if plan.attributes.read_only:
        system.fsconfig_flag(context, "ro")
    for key, value in plan.parameters:
        if value is None:
            system.fsconfig_flag(context, key)
        else:
            system.fsconfig_string(context, key, value)


def _attach(context: int, plan: Plan, place: Place) -> None:
    system.fsconfig_create(context)
    with _closing(system.fsmount(context, plan.attributes.all)) as mounted:
        if plan.mapping and plan.type == "btrfs":
            apply_mapping(mounted, plan.mapping)
        if not plan.attributes.read_only and (plan.upper or plan.type == "btrfs"):
            refuse_read_only(os.fstatvfs(mounted), READ_ONLY_REASONS[plan.type])
        system.move_mount(mounted, place.descriptor)


READ_ONLY_REASONS = {
    "overlay": "overlayfs could not make its work directory, and then mounts read-only without an error; the "
    "kernel's log has the reason (dmesg)",
    "btrfs": "the filesystem or the subvolume is read-only",
}
"""Why a mount that was to be writable is not."""


def refuse_read_only(status: os.statvfs_result, reason: str) -> None:
    """Raise FailedPrecondition where a mount that was to be writable is not."""
    if status.f_flag & os.ST_RDONLY:
        raise FailedPrecondition(f"the mount came out read-only: {reason}")
