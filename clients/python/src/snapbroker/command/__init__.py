"""The command `snapbroker`: every verb of the broker as a user types it, for people and, with --json, for scripts.

What a verb does not need is not imported: `snapbroker --json stat` loads the client and nothing to draw with.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

from snapbroker.command.arguments import parse
from snapbroker.command.failures import complaint
from snapbroker.errors import BrokerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from snapbroker.blocking import Broker

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None, *, connect: Callable[..., Broker] | None = None) -> int:
    """Run the command line and answer its exit status; `connect` stands in for `snapbroker.connect`.

    A mistake in the command line itself leaves by SystemExit with status 2.
    """
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        # After the command line is found good, since this brings the client with it.
        from snapbroker.command.verbs import run

        status = run(parsed, connect)
        sys.stdout.flush()
    except BrokerError as error:
        print(complaint(error), file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _forget_output()
        return 128 + signal.SIGPIPE
    return status


def _forget_output() -> None:
    """Whoever read the output has gone: let the flush at exit go nowhere, and not fail."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
