"""What can go wrong, typed by blame: one table ties exception, wire code and exit status together.

    BrokerError
    |-- the caller's doing      InvalidArgument NotFound AlreadyExists FailedPrecondition OutOfRange
    |                           PermissionDenied Unauthenticated Unimplemented Cancelled
    |-- the moment's doing      Unavailable ResourceExhausted DeadlineExceeded      (repeat later)
    `-- the broker's doing      Internal

The codes are the gRPC words in lower case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping


class BrokerError(Exception):
    """An error of the contract: `code`, a message that says what to do, and machine-readable `details`."""

    code: ClassVar[str] = "internal"
    exit_status: ClassVar[int] = 1
    in_doubt: bool = False
    """Whether the call may have taken effect all the same: no answer came, and a repeat brought none either."""

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details: Mapping[str, Any] = details or {}


class Internal(BrokerError):
    """The broker failed; its log says why."""


class InvalidArgument(BrokerError):
    """The request itself is wrong and will stay wrong."""

    code = "invalid_argument"
    exit_status = 2


class NotFound(BrokerError):
    """No such snapshot, parent or snapshotter."""

    code = "not_found"
    exit_status = 3


class AlreadyExists(BrokerError):
    """The key or name is taken."""

    code = "already_exists"
    exit_status = 4


class FailedPrecondition(BrokerError):
    """The snapshot is not in a state that allows this."""

    code = "failed_precondition"
    exit_status = 5


class Unavailable(BrokerError):
    """The snapshotter or the broker is not there at the moment; repeat the call."""

    code = "unavailable"
    exit_status = 6


class ResourceExhausted(BrokerError):
    """A limit is reached; `details["retry_after_ms"]`, where given, says when to repeat."""

    code = "resource_exhausted"
    exit_status = 7


class DeadlineExceeded(BrokerError):
    """The deadline passed; without a reply it is unknown whether the call took effect."""

    code = "deadline_exceeded"
    exit_status = 8


class PermissionDenied(BrokerError):
    """The caller may not do this."""

    code = "permission_denied"
    exit_status = 9


class Unauthenticated(BrokerError):
    """The caller did not say who it is."""

    code = "unauthenticated"
    exit_status = 10


class Unimplemented(BrokerError):
    """The broker, or this snapshotter, does not know the verb, version or option."""

    code = "unimplemented"
    exit_status = 11


class Cancelled(BrokerError):
    """The caller took the call back."""

    code = "cancelled"
    exit_status = 12


class OutOfRange(BrokerError):
    """The sequence asked for is no longer, or not yet, in the journal."""

    code = "out_of_range"
    exit_status = 13


ERRORS: Mapping[str, type[BrokerError]] = {
    error.code: error
    for error in (
        Internal,
        InvalidArgument,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        Unavailable,
        ResourceExhausted,
        DeadlineExceeded,
        PermissionDenied,
        Unauthenticated,
        Unimplemented,
        Cancelled,
        OutOfRange,
    )
}
"""Wire code to exception; a code that is not here is read as `Internal`."""
