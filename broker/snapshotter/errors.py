"""Errors of the operating system as errors of the contract."""

from __future__ import annotations

import errno
from typing import Final

from snapbroker.errors import BrokerError, Internal, ResourceExhausted

_EXHAUSTED: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM))


def error_of_system(error: OSError) -> BrokerError:
    """ResourceExhausted where something ran out, else Internal; the path and the number travel along."""
    where = f" ({error.filename})" if error.filename else ""
    kind = ResourceExhausted if error.errno in _EXHAUSTED else Internal
    return kind(f"{error.strerror or error}{where}", {"errno": error.errno or 0})
