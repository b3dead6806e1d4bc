"""Steps as the harness sends them, and values as it reads them: see tests/conformance/README.md."""

from __future__ import annotations

import sys
import threading
from typing import Any, ClassVar

import msgspec

from snapbroker.contract import Event, Info, Mounts, Usage
from snapbroker.errors import BrokerError

_writing = threading.Lock()


class Step(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, tag_field="do", kw_only=True):
    """What every step may say: which it is, where it goes, and how long it may take."""

    # The fields that are arguments of the client's method of the same name as the step.
    arguments: ClassVar[tuple[str, ...]] = ()

    id: int = -1
    snapshotter: str | None = None
    namespace: str | None = None
    timeout_ms: float | None = None

    @property
    def verb(self) -> str:
        """The step's word, which is the method's name."""
        return str(self.__struct_config__.tag)

    def call(self, target: Any) -> Any:
        """Call the method on a broker or a batch; an asyncio broker answers what is to be awaited."""
        values = {name: getattr(self, name) for name in self.arguments}
        if self.timeout_ms is not None:
            values["timeout"] = self.timeout_ms / 1000
        return getattr(target, self.verb)(**values)


class Open(Step, tag="open"):
    """Connect anew."""

    endpoint: str | None = None
    events_endpoint: str | None = None
    connect_timeout_ms: float | None = None
    patience_ms: float | None = None

    def settings(self) -> dict[str, Any]:
        """The arguments of `connect`."""
        seconds = {
            "timeout": self.timeout_ms,
            "connect_timeout": self.connect_timeout_ms,
            "patience": self.patience_ms,
        }
        words = {
            "endpoint": self.endpoint,
            "events_endpoint": self.events_endpoint,
            "namespace": self.namespace,
            "snapshotter": self.snapshotter,
        }
        chosen = {name: value / 1000 for name, value in seconds.items() if value is not None}
        return chosen | {name: value for name, value in words.items() if value is not None}


class Prepare(Step, tag="prepare"):
    """A verb."""

    arguments = ("key", "parent", "labels")
    key: str
    parent: str = ""
    labels: dict[str, str] = {}


class View(Prepare, tag="view"):
    """A verb."""


class Commit(Step, tag="commit"):
    """A verb."""

    arguments = ("name", "key", "parent", "labels", "sync", "fence")
    name: str
    key: str
    parent: str = ""
    labels: dict[str, str] = {}
    sync: bool = False
    fence: int = 0


class Remove(Step, tag="remove"):
    """A verb."""

    arguments = ("key", "fence")
    key: str
    fence: int = 0


class MountsOf(Remove, tag="mounts"):
    """A verb."""


class Stat(Step, tag="stat"):
    """A verb."""

    arguments = ("key",)
    key: str


class UsageOf(Stat, tag="usage"):
    """A verb."""


class Update(Step, tag="update"):
    """A verb."""

    arguments = ("name", "labels", "fieldpaths")
    name: str
    labels: dict[str, str] = {}
    fieldpaths: tuple[str, ...] = ()


class Cleanup(Step, tag="cleanup"):
    """A verb."""


class Status(Step, tag="status"):
    """The broker's."""


class Walk(Step, tag="walk"):
    """All of it, whatever number of pages."""

    filters: tuple[str, ...] = ()
    page: int | None = None

    def call(self, target: Any) -> Any:
        """The walk, to be iterated."""
        options: dict[str, Any] = {} if self.page is None else {"page": self.page}
        if self.timeout_ms is not None:
            options["timeout"] = self.timeout_ms / 1000
        return target.walk(*self.filters, **options)


class Events(Step, tag="events"):
    """What the journal has, or with `count` a followed stream until so many have come."""

    since: int
    topics: tuple[str, ...] = ()
    count: int | None = None

    def call(self, target: Any) -> Any:
        """The events, to be iterated."""
        options: dict[str, Any] = {} if self.timeout_ms is None else {"timeout": self.timeout_ms / 1000}
        return target.events(self.since, self.topics, self.count is not None, **options)


Verb = Prepare | View | Commit | Remove | MountsOf | Stat | Update | UsageOf


class Batch(Step, tag="batch"):
    """The client's batch."""

    calls: list[Verb]
    atomic: bool = False


class Together(Step, tag="together"):
    """Calls of as many callers at the same moment."""

    calls: list[Verb]


class Churn(Step, tag="churn"):
    """A run of changes that a broker may be killed in."""

    prefix: str
    parent: str
    count: int
    callers: int


AnyStep = Verb | Open | Cleanup | Status | Walk | Events | Batch | Together | Churn

read_step = msgspec.json.Decoder(AnyStep).decode


def value(answer: Any) -> Any:
    """An answer of the client as the harness reads it: every field is there."""
    if isinstance(answer, Mounts):
        return {"mounts": [msgspec.structs.asdict(mount) for mount in answer], "fence": answer.fence}
    if isinstance(answer, Event):
        info = None if answer.info is None else value(answer.info)
        return {**msgspec.structs.asdict(answer), "info": info, "topic": answer.topic}
    if isinstance(answer, Info | Usage):
        return msgspec.structs.asdict(answer)
    return {}


def failure(error: BrokerError) -> dict[str, Any]:
    """An error as the harness reads it."""
    return {"error": {"code": error.code, "details": dict(error.details), "in_doubt": error.in_doubt}}


def write(line: dict[str, Any]) -> None:
    """One line, whole and at once."""
    with _writing:
        sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
        sys.stdout.buffer.flush()
