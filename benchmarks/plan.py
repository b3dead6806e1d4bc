"""How much is measured: the full run, and a short one that shows the same things with less certainty."""

from __future__ import annotations

from dataclasses import dataclass

BACKENDS = ("overlayfs", "native", "btrfs")


@dataclass(frozen=True)
class Plan:
    """The sizes of every workload; each is measured on both sides in turn, `rounds` times."""

    rounds: int = 3
    seconds: float = 2.0
    """How long one load runs."""
    warmup: float = 1.2
    """How long it runs before that, uncounted: whoever made the base counts as a second client for a second."""
    callers: tuple[int, ...] = (1, 8, 64, 256)
    base_files: int = 10
    """Files in the base that is prepared from."""
    read_keys: int = 1000
    """Active snapshots that stat, mounts and usage ask for in turn."""
    walk_infos: int = 10_000
    scale: tuple[tuple[str, tuple[int, ...]], ...] = (("overlayfs", (10_000, 100_000)), ("memory", (1_000_000,)))
    """Backends, and how many snapshots are there when a few more are prepared and removed."""
    scale_operations: int = 4000
    scale_peer_operations: int = 400
    scale_peer_infos_max: int = 10_000
    """The peer is filled up to here: it takes a quarter of a minute for every 10,000."""
    chain_depths: tuple[int, ...] = (1, 100, 500)
    copy_files: int = 12_000
    copy_bytes: int = 300 << 20
    large_copy_bytes: int = 5 << 30
    removal_files: int = 100_000
    subscribers: tuple[int, ...] = (1, 10, 100)
    fanout_events: int = 2000
    client_events: int = 20_000
    """Events that lie there for each client's subscriber: fewer than the publisher keeps for one."""
    worked: int = 2000
    """Snapshots prepared and removed before the memory is looked at again."""
    filesystem: str = "ext4"
    filesystem_bytes: int = 24 << 30
    """Size of the sparse image; what is written to it is what it takes."""


FULL = Plan()

QUICK = Plan(
    rounds=1,
    seconds=0.4,
    warmup=0.1,
    read_keys=200,
    callers=(1, 64),
    scale=(("overlayfs", (10_000,)),),
    scale_operations=2000,
    scale_peer_operations=200,
    scale_peer_infos_max=1000,
    chain_depths=(1, 100),
    copy_files=10_000,
    copy_bytes=60 << 20,
    large_copy_bytes=512 << 20,
    removal_files=10_000,
    subscribers=(1, 10),
    fanout_events=500,
    client_events=5000,
    worked=200,
)
