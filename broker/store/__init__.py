"""An actor's metadata database: records, children, journal and counters in one LMDB environment."""

from broker.store.environment import Environment, StoreLimits
from broker.store.idset import IdSet
from broker.store.inspection import Inspection
from broker.store.journal import Journal, Retention
from broker.store.ledger import Ledger, LedgerLimits
from broker.store.outcomes import OutcomeRetention, Outcomes, Token, digest_of
from broker.store.records import Record, index_key
from broker.store.snapshots import Snapshots

__all__ = [
    "Environment",
    "IdSet",
    "Inspection",
    "Journal",
    "Ledger",
    "LedgerLimits",
    "OutcomeRetention",
    "Outcomes",
    "Record",
    "Retention",
    "Snapshots",
    "StoreLimits",
    "Token",
    "digest_of",
    "index_key",
]
