"""What travels between the service, the writer and the workers: operations, and what a call asks of a backend."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from backends.api import Snapshot, Task
from broker.store import Token
from snapbroker.contract import Usage
from snapbroker.errors import BrokerError
from snapbroker.protocol import Call

Result = bytes | BrokerError
"""The outcome of one call: its encoded answer, or its error."""


class Requester(Protocol):
    """Who waits for the outcomes of an operation."""

    def settle(self, index: int, result: Result) -> None:
        """Take the outcome of call number `index`."""
        ...

    def set_aside(self) -> None:
        """What is left goes on beside the turns."""
        ...


class Labour(enum.Enum):
    """What a backend does for a call beside the transaction (D8); STOCK is a wait for the pool's next batch."""

    CREATE = "create"
    STOCK = "stock"
    COMMIT = "commit"
    MEASURE = "measure"


@dataclass(slots=True)
class Need:
    """A call cannot be decided before its backend did this; the names it touches are held meanwhile.

    `creates` and `consumes` are index keys; `pins` is the id of a parent that must not be removed.
    """

    labour: Labour
    snapshot: Snapshot
    creates: bytes | None = None
    consumes: bytes | None = None
    pins: int = 0
    sync: bool = False


@dataclass(slots=True)
class Made:
    """What a backend did for a call."""

    labour: Labour
    snapshot: Snapshot
    usage: Usage = field(default_factory=Usage)


After = Callable[[], None]
"""Something to do once the transaction is committed."""


@dataclass(slots=True, eq=False)
class Operation:
    """Calls that take effect together: one, or the whole of an atomic request.

    `deadline` is monotonic, in nanoseconds. `first` is the number of the first call within its request. `line` is the
    client's: operations of different ones are served in turn.
    """

    requester: Requester
    namespace: str
    calls: tuple[Call, ...]
    first: int = 0
    deadline: int = 0
    token: Token | None = None
    line: bytes = b""
    task: Task | None = None
    made: dict[int, Made] = field(default_factory=dict)
    needs: list[Need] = field(default_factory=list)
    failure: BrokerError | None = None
    failed: int = 0
    """Which call the failure is of."""

    def cancel(self) -> None:
        """Ask whatever works for it to stop."""
        if self.task is None:
            self.task = Task()
        self.task.cancel()


@dataclass(slots=True)
class Delivery:
    """What one committed turn gives back to the service."""

    results: list[tuple[Operation, list[Result]]]
    events: list[tuple[str, int, bytes]]
    aside: list[Operation] = field(default_factory=list)
    """What goes on beside the turns from here on."""
