"""A private corner for mounts that are not finished: seen by root only, and gone with all that is on it."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from typing import TYPE_CHECKING, Self

from snapbroker.mount import idmap, system

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from snapbroker.mount.plan import Plan


class Staging:
    """A directory bound on itself and made private, as a context manager.

    Private, because only a mount that lies on a private one can be moved, and because what happens here must
    not show in other mount namespaces.
    """

    def __init__(self) -> None:
        self.path = ""

    def __enter__(self) -> Self:
        self.path = tempfile.mkdtemp(prefix="snapbroker-staging-")
        try:
            system.mount(self.path, self.path, None, system.MS_BIND)
        except OSError:
            os.rmdir(self.path)
            raise
        try:
            system.mount(None, self.path, None, system.MS_PRIVATE)
        except OSError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # First the mounts, then what they lay on: nothing is ever deleted through a mount. rmdir and unlink
        # of a mount point fail with EBUSY should one have stayed.
        system.umount(self.path, system.MNT_DETACH)
        for entry in list(os.scandir(self.path)):
            if entry.is_dir(follow_symlinks=False):
                os.rmdir(entry.path)
            else:
                os.unlink(entry.path)
        os.rmdir(self.path)

    def point(self, like: str, name: str) -> str:
        """A mount point of the kind, directory or file, that `like` is."""
        path = f"{self.path}/{name}"
        if stat.S_ISDIR(os.stat(like).st_mode):
            os.mkdir(path)
        else:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC))
        return path

    @contextlib.contextmanager
    def idmapped(self, plan: Plan) -> Iterator[Sequence[str]]:
        """The lower layers as idmapped copies attached here, under names as short as can be."""
        if not plan.mapping:
            raise ValueError("a plan without a mapping has no idmapped layers")
        paths: list[str] = []
        with idmap.namespace(plan.mapping) as userns:
            for number, lower in enumerate(plan.lowers):
                paths.append(self.point(lower, str(number)))
                self._attach(lower, paths[-1], userns)
        yield paths

    def _attach(self, lower: str, path: str, userns: int) -> None:
        copy = system.open_tree(lower, recursive=False)
        try:
            system.mount_setattr(copy, add=system.MOUNT_ATTR_IDMAP, userns=userns)
            point = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                system.move_mount(copy, point)
            finally:
                os.close(point)
        finally:
            os.close(copy)
