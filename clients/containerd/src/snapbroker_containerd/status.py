"""How the broker's errors end a gRPC call: codes one to one, messages as they are (D14)."""

from __future__ import annotations

from typing import Final

import grpc

from snapbroker.errors import ERRORS, BrokerError

MESSAGE_BYTES_MAX: Final = 2000
"""Longest message: escaped for its header, which may triple it, it is still below what clients take (8 KiB)."""

STATUSES: Final = {code: grpc.StatusCode[code.upper()] for code in ERRORS}
"""Wire code to status: the broker's codes are gRPC's words."""


class Refusal(Exception):
    """A call ends with a status other than OK."""

    def __init__(self, status: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def refusal(error: BrokerError) -> Refusal:
    """The end of a call that failed with `error`."""
    return Refusal(STATUSES[error.code], shortened(error.message))


def shortened(message: str) -> str:
    """The message, cut where it is too long to be sent: keys in it may have 4,096 bytes."""
    text = message.encode(errors="backslashreplace")
    if len(text) <= MESSAGE_BYTES_MAX:
        return text.decode()
    # A character cut in two is left out.
    return text[:MESSAGE_BYTES_MAX].decode(errors="ignore") + "..."
