"""Structured logs on standard error: JSON for machines, lines on a terminal, set up by a process's main alone."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """What is imported inside does not find this module, unless it was there before."""
    modules: dict[str, Any] = sys.modules
    if name in modules:
        yield
        return
    modules[name] = None
    try:
        yield
    finally:
        del modules[name]


# The command line has rich installed, and structlog would load it to draw tracebacks, which no log here wants: a fifth
# of each process's start, by which an actor that died is back later.
with _without("rich"):
    import structlog

get_logger = structlog.get_logger
bind = structlog.contextvars.bind_contextvars

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Patient:
    """Standard error, but a log that cannot be written (its reader went, its disk is full) decides over nothing."""

    def write(self, text: str) -> None:
        """Write, or not."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        """Flush, or not."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


def configure(level: str, form: str) -> None:
    """Set up structlog for this process."""
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    renderer: list[Any] = (
        [structlog.dev.ConsoleRenderer()]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", Patient())),
        cache_logger_on_first_use=True,
    )
