"""Errors of the operating system as errors of the contract."""

from __future__ import annotations

import errno
from typing import Final

from broker.logs import get_logger
from snapbroker.errors import BrokerError, Internal, ResourceExhausted

log = get_logger()

_EXHAUSTED: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM))


def error_of_system(error: OSError) -> BrokerError:
    """ResourceExhausted where something ran out, else Internal; the path and the number travel along."""
    where = f" ({error.filename})" if error.filename else ""
    kind = ResourceExhausted if error.errno in _EXHAUSTED else Internal
    return kind(f"{error.strerror or error}{where}", {"errno": error.errno or 0})


def error_of(error: Exception, what: str) -> BrokerError:
    """Whatever came out of a backend, or out of a mistake of our own, as an error of the contract.

    The last is logged with its traceback: nothing of it reaches the caller but that it happened.
    """
    if isinstance(error, BrokerError):
        return error
    if isinstance(error, OSError):
        return error_of_system(error)
    log.error("unexpected", what=what, exc_info=error)
    return Internal(f"{what} failed: {error!r}")
