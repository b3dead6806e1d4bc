"""The limits of one snapshotter, gathered from its parts for the configuration."""

from __future__ import annotations

import msgspec

from broker.snapshotter.pool import PoolLimits
from broker.snapshotter.reserve import SpaceLimits
from broker.snapshotter.service import ServiceLimits
from broker.snapshotter.writer import WriterLimits
from broker.store import LedgerLimits, OutcomeRetention, Retention, StoreLimits


class SnapshotterLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[snapshotters.<name>.limits.<part>]`."""

    store: StoreLimits = StoreLimits()
    journal: Retention = Retention()
    outcomes: OutcomeRetention = OutcomeRetention()
    ledger: LedgerLimits = LedgerLimits()
    space: SpaceLimits = SpaceLimits()
    pool: PoolLimits = PoolLimits()
    writer: WriterLimits = WriterLimits()
    service: ServiceLimits = ServiceLimits()
    hands: int = 0
    """Processes for snapshots whose making computes, such as native's copies; 0 is the backend's own choice."""
    still_told_ms: int = 10_000
    """A thread, a copy or the trash that did not move for so long is told in the log, with its stack."""
    layers_max: int = 500
    """Most layers of a chain: what the kernel's overlayfs mounts at most."""
