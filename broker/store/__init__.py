"""An actor's metadata database: records, children, journal and counters in one LMDB environment."""

from broker.store.environment import Environment, StoreLimits
from broker.store.journal import Journal, Retention
from broker.store.records import Record, index_key
from broker.store.snapshots import Snapshots

__all__ = ["Environment", "Journal", "Record", "Retention", "Snapshots", "StoreLimits", "index_key"]
