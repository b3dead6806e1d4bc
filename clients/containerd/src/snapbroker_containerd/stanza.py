"""What to paste into containerd's configuration for the broker that runs (C137)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from snapbroker.errors import InvalidArgument, NotFound
from snapbroker.protocol import ActorStatus
from snapbroker_containerd.targets import PREFIX

TAKEN: Final = frozenset({"aufs", "blockfile", "btrfs", "devmapper", "erofs", "native", "overlayfs", "zfs"})
"""Names of containerd's own snapshotters: a proxy plugin of such a name stops its start."""
CAPABILITIES: Final = ("rebase", "remap-ids", "only-remap-ids")
"""Those that containerd knows, in the order in which they are printed."""

_HEAD: Final = """\
# For containerd's configuration: the snapshotters of snapbrokerd, by way of snapbroker-containerd.
# `snapbroker-containerd stanza` prints this for the broker that runs. containerd's own snapshotters keep their names:
# a proxy plugin must not be called like one of them.
"""
_PLUGIN: Final = """
[proxy_plugins.{name}]
type = "snapshot"
address = {address}
# What the snapshotter can do: rebase is what lets containerd unpack layers in parallel.
capabilities = {capabilities}

# Where its files are: what reports the use of disks asks for it.
[proxy_plugins.{name}.exports]
root = {root}
"""


def plugins(names: Mapping[str, str], snapshotters: Iterable[ActorStatus], address: str) -> dict[str, dict[str, Any]]:
    """Containerd name to the fields of its plugin, for the broker's `snapshotters`.

    `names`: containerd name to snapshotter, from the configuration; empty: each behind `snapbroker-`. InvalidArgument
    for a name that containerd has itself, NotFound where nothing is left to print.
    """
    found: dict[str, dict[str, Any]] = {}
    for status in snapshotters:
        for name in (
            [name for name, target in names.items() if target == status.name] if names else [PREFIX + status.name]
        ):
            if name in TAKEN:
                raise InvalidArgument(
                    f"{name!r} is a name of containerd's own, which does not start with a plugin called so: "
                    f"choose another one for {status.name!r} under [snapshotters]"
                )
            found[name] = {
                "type": "snapshot",
                "address": address,
                "capabilities": [word for word in CAPABILITIES if word in status.capabilities],
                "exports": {"root": status.root},
            }
    if not found:
        raise NotFound("the broker has no snapshotter that could be named: `snapbroker status` shows those it has")
    return dict(sorted(found.items()))


def as_toml(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The stanza. JSON's strings and arrays are TOML's too."""
    return _HEAD + "".join(
        _PLUGIN.format(
            name=json.dumps(name),
            address=json.dumps(fields["address"]),
            capabilities=json.dumps(fields["capabilities"]),
            root=json.dumps(fields["exports"]["root"]),
        )
        for name, fields in found.items()
    )
