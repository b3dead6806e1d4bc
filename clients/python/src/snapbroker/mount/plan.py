"""A mount of the contract read into what is to be done: every option has a known meaning, or is refused.

Nothing is touched here. A layer path in `lowerdir=`, `upperdir=` and `workdir=` is written as for mount(2): a
backslash takes the meaning from the character after it, and an unescaped `:` separates layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from snapbroker.errors import InvalidArgument, Unimplemented
from snapbroker.mount import system

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from snapbroker.contract import Mount

ID_MAX: Final = 2**32 - 1
MAPPING_ENTRIES_MAX: Final = 340
"""Most entries that the kernel takes in one map (user_namespaces(7))."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """The attributes of a mount in MOUNT_ATTR_ bits; `atime` is None where nothing was said of it."""

    add: int = 0
    atime: int | None = None
    writable: bool = False
    """Whether `rw` was asked for by name."""

    @property
    def read_only(self) -> bool:
        """Whether `ro` was asked for."""
        return bool(self.add & system.MOUNT_ATTR_RDONLY)

    @property
    def all(self) -> int:
        """All bits to set."""
        return self.add | (self.atime or 0)

    @property
    def remove(self) -> int:
        """The bits to clear first."""
        return 0 if self.atime is None else system.MOUNT_ATTR_ATIME


@dataclass(frozen=True, slots=True)
class IdMapping:
    """Two maps in the form of user_namespaces(7): lines of `inside outside count`."""

    users: str
    groups: str


@dataclass(frozen=True, slots=True)
class Plan:
    """One mount to make. `parameters` go to the filesystem as they are, None standing for no value."""

    type: str
    source: str
    target: tuple[str, ...] = ()
    attributes: Attributes = Attributes()
    recursive: bool = False
    parameters: tuple[tuple[str, str | None], ...] = ()
    lowers: tuple[str, ...] = ()
    upper: str = ""
    work: str = ""
    mapping: IdMapping | None = None


_SET: Final[Mapping[str, int]] = {
    "nosuid": system.MOUNT_ATTR_NOSUID,
    "nodev": system.MOUNT_ATTR_NODEV,
    "noexec": system.MOUNT_ATTR_NOEXEC,
    "nodiratime": system.MOUNT_ATTR_NODIRATIME,
    "nosymfollow": system.MOUNT_ATTR_NOSYMFOLLOW,
}
_CLEAR: Final[Mapping[str, int]] = {name.removeprefix("no"): bit for name, bit in _SET.items()}
_ATIME: Final[Mapping[str, int | None]] = {
    "noatime": system.MOUNT_ATTR_NOATIME,
    "relatime": 0,
    "strictatime": system.MOUNT_ATTR_STRICTATIME,
    "atime": None,
    "norelatime": None,
    "nostrictatime": None,
}

SUPERBLOCK: Final[Mapping[str, int]] = {
    "sync": system.MS_SYNCHRONOUS,
    "dirsync": system.MS_DIRSYNC,
    "lazytime": system.MS_LAZYTIME,
}
"""Parameters of any filesystem that mount(2) takes as flags; a bind mount has no superblock of its own."""

_OVERLAY: Final = frozenset(
    """
    default_permissions fsync index metacopy nfs_export nooverride_creds override_creds redirect_dir userxattr
    uuid verity volatile xino
    """.split()  # noqa: SIM905 - a list of words is read as one
)
_BTRFS: Final = frozenset(
    """
    acl autodefrag barrier clear_cache commit compress compress-force datacow datasum degraded discard
    enospc_debug fatal_errors flushoncommit max_inline metadata_ratio noacl noautodefrag nobarrier nodatacow
    nodatasum nodiscard noenospc_debug noflushoncommit nologreplay nospace_cache nossd nossd_spread notreelog
    ratio rescue space_cache ssd ssd_spread subvol subvolid thread_pool treelog user_subvol_rm_allowed
    """.split()  # noqa: SIM905
)

_MAPPING_ENTRY = re.compile(r"(\d{1,10}):(\d{1,10}):(\d{1,10})", re.ASCII)


def plan(mount: Mount) -> Plan:
    """What `mount` asks for; InvalidArgument or Unimplemented says which option or type is not understood."""
    read = _READERS.get(mount.type)
    if read is None:
        raise Unimplemented(
            f"mount type {mount.type!r} is not one of {', '.join(_READERS)}: a mount manager may know it",
            {"type": mount.type},
        )
    for text in (mount.source, mount.target, *mount.options):
        if "\0" in text:
            raise InvalidArgument(f"a mount's text must not contain a NUL: {text!r}")
    return read(mount)


def _target(text: str) -> tuple[str, ...]:
    parts = tuple(part for part in text.split("/") if part not in ("", "."))
    if ".." in parts:
        raise InvalidArgument(f"mount target {text!r} leads out of the mount point: it must not contain '..'")
    return parts


def _common(mount: Mount) -> tuple[Plan, list[str]]:
    """The plan as far as options go that every type has, and the options left over."""
    attributes = Attributes()
    maps: dict[str, str] = {}
    rest: list[str] = []
    for option in mount.options:
        key, _, value = option.partition("=")
        if option in _SET:
            attributes = replace(attributes, add=attributes.add | _SET[option])
        elif option in _CLEAR:
            attributes = replace(attributes, add=attributes.add & ~_CLEAR[option])
        elif option in _ATIME:
            attributes = replace(attributes, atime=_ATIME[option])
        elif option in ("ro", "rw"):
            attributes = _writability(attributes, option)
        elif key in ("uidmap", "gidmap"):
            _once(maps, key, value)
        elif option not in ("defaults", "async"):
            rest.append(option)
    return Plan(mount.type, mount.source, _target(mount.target), attributes, mapping=_mapping(maps)), rest


def _writability(attributes: Attributes, option: str) -> Attributes:
    others = attributes.add & ~system.MOUNT_ATTR_RDONLY
    if option == "ro":
        return replace(attributes, add=others | system.MOUNT_ATTR_RDONLY, writable=False)
    return replace(attributes, add=others, writable=True)


def _once(values: dict[str, str], key: str, value: str) -> None:
    if key in values:
        raise InvalidArgument(f"mount option {key}= is given twice")
    values[key] = value


def _mapping(maps: Mapping[str, str]) -> IdMapping | None:
    if not maps:
        return None
    if len(maps) != 2:
        raise InvalidArgument("mount options uidmap= and gidmap= belong together: one is missing")
    return IdMapping(_id_map("uidmap", maps["uidmap"]), _id_map("gidmap", maps["gidmap"]))


def _id_map(key: str, text: str) -> str:
    """`inside:outside:count[,...]` (C111) as the lines that the kernel reads."""
    entries = text.split(",")
    if len(entries) > MAPPING_ENTRIES_MAX:
        raise InvalidArgument(f"{key} has {len(entries)} entries, more than {MAPPING_ENTRIES_MAX}")
    lines: list[str] = []
    for entry in entries:
        matched = _MAPPING_ENTRY.fullmatch(entry)
        if not matched:
            raise InvalidArgument(f"{key} entry {entry!r} is not inside:outside:count")
        inside, outside, count = map(int, matched.groups())
        if not count or max(inside, outside) + count - 1 >= ID_MAX:
            raise InvalidArgument(f"{key} entry {entry!r} names no id, or one above {ID_MAX - 1}")
        lines.append(f"{inside} {outside} {count}\n")
    return "".join(lines)


def _unknown(mount_type: str, option: str) -> Exception:
    """The refusal of an option; manager-only ones are named as such (C135)."""
    if option.startswith("X-containerd.") or option == "loop" or "/" in option.partition("=")[0]:
        return Unimplemented(
            f"mount option {option!r} is for a mount manager: mount this with the program that asked for it",
            {"option": option},
        )
    return Unimplemented(
        f"mount option {option!r} is not known for type {mount_type!r}, and is not dropped in silence: take "
        "it out of the snapshotter's configuration, or mount this another way",
        {"option": option},
    )


def _bind(mount: Mount) -> Plan:
    common, rest = _common(mount)
    recursive = False
    for option in rest:
        if option not in ("bind", "rbind"):
            raise _unknown(mount.type, option)
        recursive = recursive or option == "rbind"
    _absolute("source", mount.source)
    return replace(common, recursive=recursive)


def _btrfs(mount: Mount) -> Plan:
    common, rest = _common(mount)
    _absolute("source", mount.source)
    return replace(common, parameters=tuple(_parameter(mount.type, option, _BTRFS) for option in rest))


def _overlay(mount: Mount) -> Plan:
    common, rest = _common(mount)
    layers: dict[str, str] = {}
    parameters: list[tuple[str, str | None]] = []
    for option in rest:
        key, _, value = option.partition("=")
        if key in ("lowerdir", "upperdir", "workdir"):
            _once(layers, key, value)
        else:
            parameters.append(_parameter(mount.type, option, _OVERLAY))
    if "lowerdir" not in layers:
        raise InvalidArgument("an overlay mount needs the option lowerdir=")
    if ("upperdir" in layers) != ("workdir" in layers):
        raise InvalidArgument("mount options upperdir= and workdir= belong together: one is missing")
    lowers = tuple(_absolute("lowerdir", layer) for layer in split_layers(layers["lowerdir"]))
    if len(lowers) == 1 and "upperdir" not in layers:
        raise InvalidArgument(f"an overlay needs two layers or an upperdir=: bind {lowers[0]} read-only instead")
    return replace(
        common,
        parameters=tuple(parameters),
        lowers=lowers,
        upper=_one_layer("upperdir", layers),
        work=_one_layer("workdir", layers),
    )


def _one_layer(key: str, layers: Mapping[str, str]) -> str:
    # A colon separates nothing here, so it may also stand unescaped.
    return _absolute(key, _unescaped(layers[key])) if key in layers else ""


def _parameter(mount_type: str, option: str, known: frozenset[str]) -> tuple[str, str | None]:
    key, equals, value = option.partition("=")
    if key not in known and option not in SUPERBLOCK:
        raise _unknown(mount_type, option)
    return key, value if equals else None


def _absolute(what: str, path: str) -> str:
    if not path.startswith("/"):
        raise InvalidArgument(f"mount {what} {path!r} must be an absolute path")
    return path


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def split_layers(text: str) -> list[str]:
    r"""The paths of a `lowerdir=`: `/a\:b:/c` is `/a:b` and `/c`."""
    return [_unescaped(part) for part in re.findall(r"(?:^|:)((?:[^:\\]|\\.|\\$)*)", text, flags=re.DOTALL)]


def escaped(path: str) -> str:
    """The path as it stands in the option string of an overlay's mount(2)."""
    return re.sub(r"([\\:,])", r"\\\1", path)


_READERS: Final[Mapping[str, Callable[[Mount], Plan]]] = {"bind": _bind, "overlay": _overlay, "btrfs": _btrfs}
