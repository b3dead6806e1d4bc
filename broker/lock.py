"""One daemon per directory: an exclusive lock on a file in it, released by the kernel when its process ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from snapbroker.errors import FailedPrecondition

LOCK_WAIT_S = 5.0
"""How long a start waits for the processes of a killed daemon to be gone."""
_POLL_S = 0.02


def lock_directory(directory: Path, option: str, mode: int = 0o700, wait_s: float = LOCK_WAIT_S) -> int:
    """Lock `directory`, made where it is missing, as long as the descriptor returned is open.

    FailedPrecondition names the directory and the command line's `option` when another process has it.
    """
    try:
        directory.mkdir(mode=mode, parents=True, exist_ok=True)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise FailedPrecondition(f"{directory} cannot be used: {error.strerror}: choose another {option}") from None
    patience = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > patience:
                os.close(descriptor)
                raise FailedPrecondition(
                    f"{directory} is in use by another snapbrokerd: stop it, or give this one another {option}"
                ) from None
            time.sleep(_POLL_S)
        else:
            return descriptor
