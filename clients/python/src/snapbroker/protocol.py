"""Frames to messages and back, without a socket: what docs/rfc/1-request.md and 2-events.md say, as types.

A request carries a list of calls; its reply comes in one or more parts, each with the outcomes that are ready,
the last one marked as such. Whatever bytes come in, decoding either gives a message or raises an error of the
contract: nothing else gets out.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, TypeVar

import msgspec

from snapbroker.contract import Event, Info, Mount, Usage
from snapbroker.errors import ERRORS, BrokerError, Internal, InvalidArgument, Unimplemented

REQUEST_VERSION: Final = b"SNBR\x01"
"""First frame of every request and reply."""
EVENT_VERSION: Final = b"SNBE\x01"
"""Second frame of every event, after its topic."""
MORE: Final = b"\x00"
DONE: Final = b"\x01"
"""Third frame of a reply: whether more parts follow."""

CALLS_MAX: Final = 1024
"""Most calls in one request."""
REQUEST_ID_BYTES_MAX: Final = 64
"""Longest request id."""
TOKEN_BYTES_MAX: Final = 64
"""Longest idempotency token."""
TARGET_BYTES_MAX: Final = 64
"""Longest snapshotter name."""
BODY_BYTES_MAX: Final = 16 * 1024 * 1024
"""Longest body, of a request and of one part of a reply."""
PAGE_MAX: Final = 10_000
"""Most infos or events in one page."""
CREDIT_MAX: Final = 1024
"""Most pages a request may ask for at once."""
FILTERS_MAX: Final = 64
"""Most filters of one walk, and most topics of one events call."""
FILTER_BYTES_MAX: Final = 4096
"""Longest filter, in bytes of UTF-8."""


class Message(msgspec.Struct, frozen=True, omit_defaults=True, gc=False, kw_only=True):
    """A map with named fields; fields a reader does not know are ignored."""


# Calls. `verb` is the tag: which of them a map is.


class Prepare(Message, frozen=True, tag_field="verb", tag="prepare"):
    """Create an active snapshot: answers `Mounts`."""

    key: str
    parent: str = ""
    labels: dict[str, str] = {}


class View(Message, frozen=True, tag_field="verb", tag="view"):
    """Create a read-only snapshot: answers `Mounts`."""

    key: str
    parent: str = ""
    labels: dict[str, str] = {}


class Commit(Message, frozen=True, tag_field="verb", tag="commit"):
    """Turn the active `key` into the committed `name`: answers `Empty`.

    `sync`: its files are durable before the name exists (D12). `parent`: the rebase (C33, D9).
    """

    name: str
    key: str
    parent: str = ""
    labels: dict[str, str] = {}
    sync: bool = False
    fence: int = 0


class Remove(Message, frozen=True, tag_field="verb", tag="remove"):
    """Remove a snapshot of any kind that has no children: answers `Empty`."""

    key: str
    fence: int = 0


class Mounts(Message, frozen=True, tag_field="verb", tag="mounts"):
    """The mounts of an active snapshot or view: answers `MountsAnswer`."""

    key: str
    fence: int = 0


class Stat(Message, frozen=True, tag_field="verb", tag="stat"):
    """What is known of a snapshot: answers `Info`."""

    key: str


class Update(Message, frozen=True, tag_field="verb", tag="update"):
    """Change labels: answers the new `Info`. Without `fieldpaths` all labels are replaced (C56, C57)."""

    name: str
    labels: dict[str, str] = {}
    fieldpaths: tuple[str, ...] = ()


class UsageOf(Message, frozen=True, tag_field="verb", tag="usage"):
    """What a snapshot takes: answers `Usage`."""

    key: str


class Walk(Message, frozen=True, tag_field="verb", tag="walk"):
    """All snapshots that match one of the filters, by name: answers up to `credit` parts `WalkPage`.

    `after` continues behind the name that a page gave as its `next`.
    """

    filters: tuple[str, ...] = ()
    after: str = ""
    page: int = 1000
    credit: int = 16


class Cleanup(Message, frozen=True, tag_field="verb", tag="cleanup"):
    """Wait until everything removed so far is deleted from disk: answers `Empty`."""


class Events(Message, frozen=True, tag_field="verb", tag="events"):
    """The journal above sequence `since`: answers up to `credit` parts `EventsPage`.

    `topics` are prefixes of topics, any namespace's with an empty list only the caller's own namespace.
    `follow` waits for more when the end is reached, until the credit is used or the timeout passes.
    """

    since: int
    topics: tuple[str, ...] = ()
    page: int = 1000
    credit: int = 16
    follow: bool = False


class Audit(Message, frozen=True, tag_field="verb", tag="audit"):
    """Hold records, indexes, journal, directories and mounts against each other: answers up to `credit` `AuditPage`.

    It is of the whole snapshotter, of every namespace. `after` continues behind a page's `next`.
    """

    after: str = ""
    page: int = 1000
    credit: int = 16


class Repair(Message, frozen=True, tag_field="verb", tag="repair"):
    """An audit whose findings are mended where that can be done: answers as `audit`.

    Without `execute` nothing is changed: each finding says in `repair` what would be done.
    """

    execute: bool = False
    after: str = ""
    page: int = 1000
    credit: int = 16


class Why(Message, frozen=True, tag_field="verb", tag="why"):
    """What keeps a snapshot, or what became of it: answers `WhyAnswer`, also where there is none of this name."""

    key: str


class Cancel(Message, frozen=True, tag_field="verb", tag="cancel"):
    """Take back the caller's own request `request`: answers `Empty`; its unfinished calls end `cancelled`.

    With `calls` only the calls of these numbers are taken back; those of an atomic request only together.
    """

    request: bytes
    calls: tuple[int, ...] = ()


class Status(Message, frozen=True, tag_field="verb", tag="status"):
    """How the broker and its snapshotters are (target: the broker itself): answers `StatusAnswer`."""


Call = (
    Prepare | View | Commit | Remove | Mounts | Stat | Update | UsageOf | Walk | Cleanup | Events | Audit | Repair | Why
    | Cancel | Status
)  # fmt: skip
VERBS: Final[tuple[str, ...]] = (
    "prepare", "view", "commit", "remove", "mounts", "stat", "update", "usage", "walk", "cleanup",
    "events", "audit", "repair", "why", "cancel", "status",
)  # fmt: skip


class Request(Message, frozen=True):
    """The body of a request.

    `atomic`: all calls take effect, in their order, or none does. `timeout_ms`: a call that has not begun
    this long after its arrival is not executed; 0 is the broker's default. `token`: a repeat of the request with the
    same token gets the first answers, and nothing is changed twice.
    """

    calls: Annotated[tuple[Call, ...], msgspec.Meta(min_length=1, max_length=CALLS_MAX)]
    namespace: str = ""
    atomic: bool = False
    timeout_ms: int = 0
    token: Annotated[bytes, msgspec.Meta(max_length=TOKEN_BYTES_MAX)] = b""


# Answers.


class Empty(Message, frozen=True):
    """Nothing to say but that it is done."""


class MountsAnswer(Message, frozen=True):
    """The mounts to make, in order.

    `fence` is the snapshot's fencing number, the sequence of the event that made it: commit, remove and mounts that
    carry it are refused once the key stands for another snapshot.
    """

    mounts: tuple[Mount, ...]
    fence: int = 0


class WalkPage(Message, frozen=True):
    """Infos in the order of their names; `sequence` is the newest event that the page has seen.

    `next` is where to continue, absent at the end. Events above the FIRST page's sequence, applied in order,
    bring the whole walk up to date.
    """

    infos: tuple[Info, ...] = ()
    sequence: int = 0
    next: str = ""


class EventsPage(Message, frozen=True):
    """Events in their order; `next` is the `since` to go on with, `newest` the newest sequence of the journal."""

    events: tuple[Event, ...] = ()
    next: int = 0
    newest: int = 0


class Finding(Message, frozen=True):
    """Something that is not as it must be, or that somebody should know of.

    `kind` is one of those that docs/rfc/1-request.md lists, `severity` note, warning or error. What it is about is in
    those of `namespace`, `key`, `id`, `path` and `sequence` that are known. `time`: since when, as far as the disk or
    the record tells, in nanoseconds since the epoch, 0: unknown. `inodes` and `size`, in bytes: what it takes.
    `repair` says what a repair does about it, and is absent where it does nothing. In the answer to a repair that
    executes: `mended`, or `failure`, why it could not be.
    """

    kind: str
    severity: str
    message: str
    advice: str
    namespace: str = ""
    key: str = ""
    id: int = 0
    path: str = ""
    sequence: int = 0
    time: int = 0
    inodes: int = 0
    size: int = 0
    repair: str = ""
    mended: bool = False
    failure: str = ""


class AuditPage(Message, frozen=True):
    """Findings in the order in which they were made; `next` is where to go on, absent at the end.

    `looked`: how many records, directories, index entries, events and mounts were looked at by this request so far.
    """

    findings: tuple[Finding, ...] = ()
    next: str = ""
    looked: int = 0


class MountUse(Message, frozen=True):
    """A mount that uses a snapshot's directory: where, and a process in whose mount namespace it is."""

    point: str
    type: str
    pid: int = 0
    process: str = ""


class WhyAnswer(Message, frozen=True):
    """What keeps a snapshot, and the last that the journal says of its name.

    `info` is absent where there is no such snapshot; `broken`: its files are missing. `children`: the first of those
    that lie on it, `children_count` all of them. `holds`: calls under way that need it. `mounts`: where it is mounted,
    also as a layer of another. `references`: under which `containerd.io/snapshot.ref` it is found.
    `events`: the last events on the name, the newest first. `oldest`: the oldest sequence that the journal keeps.
    """

    info: Info | None = None
    id: int = 0
    fence: int = 0
    broken: bool = False
    children: tuple[str, ...] = ()
    children_count: int = 0
    holds: tuple[str, ...] = ()
    mounts: tuple[MountUse, ...] = ()
    references: tuple[str, ...] = ()
    events: tuple[Event, ...] = ()
    oldest: int = 0


class Progress(Message, frozen=True):
    """How far a long call is, in entries and bytes; sent as a part before its outcome."""

    entries: int = 0
    bytes: int = 0


class ActorStatus(Message, frozen=True):
    """One snapshotter: `state` is starting, ready, unavailable or stopped."""

    name: str
    backend: str
    state: str
    pid: int = 0
    restarts: int = 0
    resident_bytes: int = 0
    cpu_seconds: float = 0.0
    open_files: int = 0
    sequence: int = 0
    snapshots: int = 0
    capabilities: tuple[str, ...] = ()
    root: str = ""
    queues: dict[str, dict[str, int]] = {}
    backlog: dict[str, int] = {}


class StatusAnswer(Message, frozen=True):
    """The broker's own figures and one entry for each snapshotter."""

    version: str
    pid: int
    uptime_seconds: float
    resident_bytes: int
    endpoint: str
    events_endpoint: str
    queues: dict[str, dict[str, int]] = {}
    snapshotters: tuple[ActorStatus, ...] = ()


class Fault(Message, frozen=True):
    """An error on the wire: a code of `snapbroker.errors`, a message and details."""

    code: str
    message: str
    details: dict[str, Any] = {}


NO_ANSWER: Final = msgspec.Raw(b"")
"""What `Outcome.ok` is where it is absent."""


class Outcome(Message, frozen=True):
    """The outcome, or the progress, of call number `call` of the request.

    `ok` is the answer, still encoded: its type follows from the call's verb; absent with an error or progress.
    """

    call: int
    ok: msgspec.Raw = NO_ANSWER
    error: Fault | None = None
    progress: Progress | None = None


class Reply(Message, frozen=True):
    """One part of a reply: outcomes by call, or one error for the request as a whole."""

    outcomes: tuple[Outcome, ...] = ()
    error: Fault | None = None


class Heartbeat(Message, frozen=True):
    """Sent on `<snapshotter>//heartbeat`: the newest sequence, and the newest at the heartbeat before.

    `topics` has the newest sequence of every topic that changed in between; absent when there were too many.
    """

    sequence: int
    previous: int
    time: int
    topics: dict[str, int] | None = None


class _Verb(msgspec.Struct):
    verb: str


class _Verbs(msgspec.Struct):
    """Only the verbs of a request: looking at a malformed one must not build what else is in it."""

    calls: Annotated[list[_Verb], msgspec.Meta(max_length=CALLS_MAX)]


_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)
_verbs = msgspec.msgpack.Decoder(_Verbs)

encode = _encoder.encode
encode_into = _encoder.encode_into

T = TypeVar("T")


def decode_request(body: bytes | memoryview) -> Request:
    """The request in `body`; InvalidArgument or Unimplemented (unknown verb) where it is none."""
    if len(body) > BODY_BYTES_MAX:
        raise InvalidArgument(f"a body of {len(body)} bytes is longer than {BODY_BYTES_MAX}")
    try:
        return _requests.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _blame(body, error) from None


def _blame(body: bytes | memoryview, error: Exception) -> BrokerError:
    """Tell an unknown verb from a malformed request."""
    try:
        verbs = [call.verb for call in _verbs.decode(body).calls]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        verbs = []
    for verb in verbs:
        if verb not in VERBS:
            return Unimplemented(f"unknown verb {verb[:40]!r}; known are {', '.join(VERBS)}")
    return InvalidArgument(f"the body is not a request: {error}")


def decode_reply(body: bytes | memoryview) -> Reply:
    """One part of a reply; Internal where the broker sent something else."""
    try:
        return _replies.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Internal(f"the broker's reply is malformed: {error}") from None


def decoder(answer: type[T]) -> msgspec.msgpack.Decoder[T]:
    """A decoder for the `ok` of an outcome, or for an event's body."""
    return msgspec.msgpack.Decoder(answer)


_events = msgspec.msgpack.Decoder(Event)
_heartbeats = msgspec.msgpack.Decoder(Heartbeat)


def decode_event(body: bytes | memoryview) -> Event:
    """The event in a publication's last frame; Internal where the broker sent something else."""
    try:
        return _events.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Internal(f"the broker's event is malformed: {error}") from None


def decode_heartbeat(body: bytes | memoryview) -> Heartbeat:
    """The heartbeat in a publication's last frame; Internal where the broker sent something else."""
    try:
        return _heartbeats.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Internal(f"the broker's heartbeat is malformed: {error}") from None


def fault(error: BrokerError) -> Fault:
    """The error as it is sent; a file's name in it may be no text, and is escaped."""
    details = {key: _as_text(value) if isinstance(value, str) else value for key, value in error.details.items()}
    return Fault(code=error.code, message=_as_text(error.message), details=details)


def _as_text(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def error_of(sent: Fault) -> BrokerError:
    """The error as it is raised."""
    return ERRORS.get(sent.code, Internal)(sent.message, sent.details)


def event_frames(topic: str, sequence: int, body: bytes) -> Sequence[bytes]:
    """Topic, protocol and version, sequence (8 bytes, big endian), body."""
    return (topic.encode(), EVENT_VERSION, struct.pack(">Q", sequence), body)


def heartbeat_topic(snapshotter: str) -> str:
    """A namespace is never empty, so no event has this topic; a subscription to `<snapshotter>/` covers it."""
    return f"{snapshotter}//heartbeat"


def answer_types() -> Mapping[str, type[Any]]:
    """Verb to the type of its `ok`, for clients, schemas and vectors."""
    return {
        "prepare": MountsAnswer, "view": MountsAnswer, "mounts": MountsAnswer, "commit": Empty, "remove": Empty,
        "stat": Info, "update": Info, "usage": Usage, "walk": WalkPage, "events": EventsPage, "cleanup": Empty,
        "audit": AuditPage, "repair": AuditPage, "why": WhyAnswer, "cancel": Empty, "status": StatusAnswer,
    }  # fmt: skip
