"""The golden vectors at the edges: every width of every encoding, every field of every message, right and wrong.

They are made by rule, where those in `generate_vectors` are told one by one: each boundary of MessagePack's widths;
each message in the longest encoding, with its fields the other way round, and among fields that nobody knows; each
field of what a client reads with a value of another type.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

import msgspec
from vector_parts import (
    BASE,
    CREATED,
    FAR_NAME,
    INTEGER_MAX,
    JOB,
    LONGEST_LABEL,
    LONGEST_NAME,
    LONGEST_NAMESPACE,
    LOOK,
    MOUNTS,
    Vector,
    event,
    failed,
    ok,
    one,
    readable,
    vector,
)

from snapbroker.contract import LABELS_MAX, Event, Info, Kind, Mount
from snapbroker.errors import ERRORS
from snapbroker.protocol import (
    CALLS_MAX,
    FILTERS_MAX,
    REQUEST_ID_BYTES_MAX,
    TARGET_BYTES_MAX,
    TOKEN_BYTES_MAX,
    ActorStatus,
    Cancel,
    Cleanup,
    Commit,
    Empty,
    Events,
    EventsPage,
    Fault,
    Heartbeat,
    Mounts,
    MountsAnswer,
    Outcome,
    Prepare,
    Progress,
    Remove,
    Reply,
    Request,
    Stat,
    Status,
    StatusAnswer,
    Update,
    UsageOf,
    View,
    Walk,
    WalkPage,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

INTEGERS: Final = (
    0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x100000000,
    2**53 - 1, 2**53, 2**53 + 1, INTEGER_MAX,
)  # fmt: skip
"""Both sides of every width, and of what a float of 64 bits still holds."""
NEGATIVES: Final = (-1, -32, -33, -128, -129, -32768, -32769, -(2**31), -(2**31) - 1, -(2**53) - 1, -(2**63))
LENGTHS: Final = (1, 31, 32, 255, 256)
"""Both sides of the widths of a string's length; those of 65,536 are in a message of their own."""
FAR_NAMES: Final = (
    "\u00e9", "e\u0301",  # the same letter for people, two names for the wire
    "\ufeffbom", "\u2028line\u2029paragraph", "\uffff", "\U0010ffff", "\u202eright to left", "\u200d", "a\u00a0b", " ",
    "..", "/", "a/../b", "-", "%00", "null", "\x7f", "\x01\x02\x1f",
)  # fmt: skip
FAR_LABELS: Final = {"a.b": "c.d", "containerd.io/gc.root": "\u2028", "labels": "labels.labels", "é": "", "牛": "😀"}
TOKEN: Final = bytes(range(24))
FREE: Final = frozenset(("labels", "details", "topics", "queues", "backlog"))
"""Maps whose keys are free: a stranger among them would be one more label."""


# Messages as they are written here.


def requests() -> Iterator[Vector]:
    """Every field of every verb, the widths of integers, lengths and lists."""
    token = {"calls": (Prepare(key="job-42"),), "namespace": "default"}
    yield vector("token", Request(**token, token=TOKEN), "A repeat with the same token gets the first answers.")
    yield vector("token-shortest", Request(**token, token=b"\0"), "One byte; any byte may stand in it.")
    yield vector("token-longest", Request(**token, token=b"\xff" * TOKEN_BYTES_MAX), f"{TOKEN_BYTES_MAX} bytes.")
    yield vector(
        "request-all-fields",
        Request(calls=(Stat(key="a"),), namespace="default", atomic=True, timeout_ms=86_400_000, token=TOKEN),
        "Every field of a request, in the order in which they are written.",
    )
    labels = {"containerd.io/gc.root": "x", "team": "build"}
    yield vector("view-all-fields", one(View(key="look", parent="base", labels=labels)), "Labels on a view.")
    yield vector(
        "commit-fence",
        one(Commit(name="n", key="k", parent="p", labels=labels, sync=True, fence=41)),
        "Every field of a commit; with a fence it is of this very snapshot.",
    )
    yield vector("remove-fence", one(Remove(key="k", fence=41)), "The fence that prepare answered.")
    yield vector("mounts-fence", one(Mounts(key="k", fence=INTEGER_MAX)), "The largest fence.")
    yield vector("cancel-calls", one(Cancel(request=b"\0\0\0\1", calls=(0, 7, CALLS_MAX - 1))), "Only these calls.")
    yield vector("cancel-longest", one(Cancel(request=b"i" * REQUEST_ID_BYTES_MAX)), "The longest request id.")
    yield vector(
        "every-verb",
        one(
            Prepare(key="a"), View(key="b"), Commit(name="c", key="a"), Remove(key="b"), Mounts(key="a"), Stat(key="a"),
            Update(name="c"), UsageOf(key="c"), Walk(), Cleanup(), Events(since=0), Cancel(request=b"x"), Status(),
        ),
        "All in one request, each as short as it can be.",
    )  # fmt: skip
    yield vector("integers", one(*(Events(since=number) for number in INTEGERS)), "Both sides of every width.")
    for length in LENGTHS:
        yield vector(f"key-of-{length}", one(Stat(key="k" * length)), f"{length} bytes.")
    yield vector("names-far", one(*(Stat(key=name) for name in FAR_NAMES)), "Names that look odd, and are legal.")
    yield vector("labels-far", one(Prepare(key="a", labels=FAR_LABELS)), "Labels that look odd, and are legal.")
    for count in (15, 16, LABELS_MAX):
        many = {f"label-{number:04}": str(number) for number in range(count)}
        yield vector(f"labels-{count}", one(Update(name="base", labels=many)), f"{count} labels.")
    for count in (15, 16, FILTERS_MAX):
        yield vector(f"filters-{count}", one(Walk(filters=("name",) * count)), f"{count} filters.")
    for count in (15, 16):
        yield vector(f"calls-{count}", one(*(Stat(key="a"),) * count), f"{count} calls.")
    yield vector("topics-most", one(Events(since=0, topics=("overlayfs/",) * FILTERS_MAX)), f"{FILTERS_MAX} topics.")


DETAILS: Final[dict[str, dict[str, Any]]] = {
    "internal": {},
    "invalid_argument": {"expected": "an operator", "filter": 0, "position": 4},
    "not_found": {"snapshotters": ["native", "overlayfs"]},
    "already_exists": {"name": "layer-1"},
    "failed_precondition": {"fence": 41},
    "unavailable": {"in_doubt": True, "retry_after_ms": 100},
    "resource_exhausted": {"free_bytes": 0, "free_inodes": 12, "retry_after_ms": 1000},
    "out_of_range": {"newest": 9000, "oldest": 5001},
}
"""Code to the details that programs rely on (RFC 1, section 8)."""


def replies() -> Iterator[Vector]:
    """The answers of the verbs inside a reply, and faults with their details."""
    page = WalkPage(infos=(BASE, JOB, LOOK), sequence=42, next="look")
    yield vector("reply-walk", Reply(outcomes=(ok(0, page),)), "To walk: one page.")
    events = EventsPage(events=(event(1, 0, "prepare", "job-42", JOB),), next=1, newest=1)
    yield vector("reply-events", Reply(outcomes=(ok(0, events),)), "To events: one page.")
    yield vector("reply-status", Reply(outcomes=(ok(0, SMALL_STATUS),)), "To status.")
    yield vector("reply-mounts-fence", Reply(outcomes=(ok(0, MountsAnswer(mounts=MOUNTS, fence=17)),)), "A fence.")
    yield vector(
        "reply-two-pages", Reply(outcomes=(ok(0, WalkPage(infos=(BASE,), next="base")), ok(0, WalkPage(infos=(JOB,))))),
        "Two pages of the same call in one part: its outcomes stay in their order.",
    )  # fmt: skip
    yield vector("reply-last-call", Reply(outcomes=(ok(CALLS_MAX - 1, Empty()),)), "The last call of the largest.")
    yield vector("reply-progress-zero", Reply(outcomes=(Outcome(call=0, progress=Progress()),)), "Begun: an empty map.")
    most = Progress(entries=INTEGER_MAX, bytes=INTEGER_MAX)
    yield vector("reply-progress-largest", Reply(outcomes=(Outcome(call=0, progress=most),)), "The largest integers.")
    for code in ERRORS:
        details = DETAILS.get(code, {})
        yield vector(
            f"reply-refused-{code}", Reply(error=Fault(code=code, message="no", details=details)), "As a whole."
        )
        if details:
            yield vector(
                f"reply-details-{code}", Reply(outcomes=(failed(0, code, "no", **details),)), "Details of one call."
            )
    anything = {
        "array": [], "boolean": False, "float": 0.5, "integer": -1, "largest": INTEGER_MAX, "map": {"a": {"b": [1]}},
        "nil": None, "text": "é",
    }  # fmt: skip
    yield vector("reply-details-anything", Reply(outcomes=(failed(0, "internal", "", **anything),)), "Any values.")
    yield vector("reply-message-long", Reply(error=Fault(code="internal", message="é" * 32768)), "65,536 bytes.")


SMALL_STATUS: Final = StatusAnswer(
    version="0.1.0", pid=1, uptime_seconds=0.5, resident_bytes=0, endpoint="", events_endpoint="",
    snapshotters=(ActorStatus(name="memory", backend="memory", state="starting", cpu_seconds=1.25),),
)  # fmt: skip


def answers() -> Iterator[Vector]:
    """Answers with every field, and with the widths of signed integers."""
    yield vector("answer-mounts-fence", MountsAnswer(mounts=MOUNTS, fence=INTEGER_MAX), "The largest fence.")
    odd = Mount("", "", ("", FAR_NAME, "x" * 4096), FAR_NAME)
    yield vector(
        "answer-mounts-odd", MountsAnswer(mounts=(odd, *MOUNTS * 15)), "Empty and far strings, sixteen mounts."
    )
    times = tuple(Info("a", Kind.ACTIVE, created=number, updated=-number - 1) for number in NEGATIVES)
    yield vector("answer-times-negative", WalkPage(infos=times), "Both sides of every width of a signed integer.")
    yield vector("answer-info-all-fields", Info("a", Kind.VIEW, "b", FAR_LABELS, 1, 2), "Every field.")
    pages = tuple(
        Info(name, Kind.COMMITTED, FAR_NAME, {}, CREATED, CREATED) for name in sorted(FAR_NAMES, key=str.encode)
    )
    yield vector("answer-walk-far", WalkPage(infos=pages, sequence=INTEGER_MAX, next=FAR_NAMES[-1]), "By their bytes.")
    yield vector("answer-walk-longest", WalkPage(infos=(Info(LONGEST_NAME, Kind.VIEW),), next=LONGEST_NAME), "Longest.")
    yield vector("answer-events-largest", EventsPage(next=INTEGER_MAX, newest=INTEGER_MAX), "The largest sequences.")
    yield vector("answer-events-every-verb", EventsPage(events=tuple(every_event()), next=6, newest=6), "One of each.")
    yield vector("answer-status-smallest", SMALL_STATUS, "What can be absent is.")


def every_event() -> Iterator[Event]:
    """One event of each verb."""
    layer = Info("layer-1", Kind.COMMITTED, "base", FAR_LABELS, CREATED, CREATED)
    yield event(1, 0, "prepare", "job-42", JOB)
    yield event(2, 0, "view", "look", LOOK)
    yield event(3, 0, "commit", "job-42", layer)
    yield event(4, 0, "update", "layer-1", layer)
    yield event(5, 0, "remove", "look")
    yield event(6, 0, "cleanup")


def publications() -> Iterator[Vector]:
    """Events and heartbeats with longest names and widths of integers."""
    longest = Info(LONGEST_NAME, Kind.COMMITTED, LONGEST_NAME, LONGEST_LABEL, INTEGER_MAX, INTEGER_MAX)
    snapshotter = "s" * TARGET_BYTES_MAX
    yield vector(
        "event-longest",
        Event(INTEGER_MAX, INTEGER_MAX, -1, snapshotter, LONGEST_NAMESPACE, "commit", LONGEST_NAME, longest),
        "The longest of everything; a clock before 1970.",
    )
    yield vector("event-labels", event(7, 6, "update", "a", Info("a", Kind.ACTIVE, "", FAR_LABELS)), "Far labels.")
    yield vector("event-verb-unknown", event(8, 0, "lease", "a"), "A verb of a later version: a topic nobody knows.")
    topics = {f"{snapshotter}/{LONGEST_NAMESPACE}/snapshot/commit": INTEGER_MAX}
    largest = Heartbeat(sequence=INTEGER_MAX, previous=INTEGER_MAX, time=INTEGER_MAX, topics=topics)
    yield vector("heartbeat-largest", largest, "The largest integers and the longest topic.")
    for count in (15, 16):
        many = {f"overlayfs/n{number:02}/snapshot/view": number for number in range(count)}
        yield vector(
            f"heartbeat-topics-{count}", Heartbeat(sequence=count, previous=0, time=0, topics=many), f"{count}."
        )


# The same messages, written otherwise.


def wide(value: Any, key: str = "") -> bytes:
    """`value` in the longest encodings there are; the answer in an `ok`, whose reader compares its bytes, as it is."""
    if key == "ok" or value is None or isinstance(value, bool):
        return encode(value)
    if isinstance(value, int):
        return struct.pack(">BQ", 0xCF, value) if value >= 0 else struct.pack(">Bq", 0xD3, value)
    if isinstance(value, float):
        return struct.pack(">Bd", 0xCB, value)
    if isinstance(value, str):
        return struct.pack(">BI", 0xDB, len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return struct.pack(">BI", 0xC6, len(value)) + value
    if isinstance(value, list):
        return struct.pack(">BI", 0xDD, len(value)) + b"".join(map(wide, value))
    fields = (wide(name) + wide(field, name) for name, field in value.items())
    return struct.pack(">BI", 0xDF, len(value)) + b"".join(fields)


def mirrored(value: Any, free: bool = False) -> Any:
    """`value` with the fields of every map in the opposite order; what has free keys stays as it is."""
    if isinstance(value, list):
        return [mirrored(each) for each in value]
    if not isinstance(value, dict) or free:
        return value
    return {name: value[name] if name == "ok" else mirrored(value[name], name in FREE) for name in reversed(value)}


DEEP: Final = b"\x91" * 26 + b"\xc0"
STRANGERS: Final = (
    b"\xc0", b"\xc2", b"\xff", b"\xd3\x80" + b"\0" * 7, b"\xcf" + b"\xff" * 8, b"\xca\x7f\x80\x00\x00",
    b"\xcb\x7f\xf8" + b"\0" * 6, b"\xa3\xed\xa0\x80", b"\xc4\x02\x00\xff", b"\xc5\x00\x01\x80", b"\xc6\x00\x00\x00\x00",
    b"\xd4\x05\x00", b"\xd6\xff\x00\x00\x00\x01", b"\xd8\x7f" + b"\0" * 16, b"\xc7\x00\x80", b"\xc8\x00\x03\x05abc",
    b"\xc9\x00\x00\x00\x01\x05a", b"\xdc\x00\x01\xc3", b"\x83\x01\xc0\xc3\x02\x91\x01\x03", b"\x82\xa1k\x01\xa1k\x02",
    b"\x81\xc4\x01k\xc0", DEEP,
)  # fmt: skip
"""Values that a field nobody knows may have: all kinds of numbers, extensions, text that is none, maps by other keys
than text and with one key twice, and one that is as deep as the deepest may be."""


def among_strangers(value: Any, free: bool = False) -> bytes:
    """`value` with a field that nobody knows in front of, and one behind, the fields of every map."""
    if isinstance(value, list):
        return encode([None] * len(value))[: -len(value) or None] + b"".join(map(among_strangers, value))
    if not isinstance(value, dict) or free:
        return encode(value)
    body = b"\xa5later\xdc" + struct.pack(">H", len(STRANGERS)) + b"".join(STRANGERS)
    for name, field in value.items():
        body += encode(name) + (encode(field) if name == "ok" else among_strangers(field, name in FREE))
    return b"\xde" + struct.pack(">H", len(value) + 2) + body + b"\xa0\xc0"


VARIED: Final = (
    "prepare-labels", "commit-fence", "update-fieldpaths", "walk-all-fields", "events-all-fields", "cancel-calls",
    "atomic",
    "request-all-fields", "every-verb", "reply-mounts", "reply-several", "reply-progress", "reply-details-anything",
    "reply-request-error", "answer-mounts-several", "answer-mounts-fence", "answer-info-all-fields", "answer-usage",
    "answer-walk-more", "answer-events-every-verb", "answer-status", "event-commit", "event-remove", "heartbeat-busy",
    "heartbeat-started",
)  # fmt: skip
"""Messages of every type, with every field."""


def variations(messages: dict[str, Vector]) -> Iterator[Vector]:
    """Three other writings of each of `VARIED`."""
    for name in VARIED:
        made = messages[name]
        body = bytes.fromhex(made["hex"])
        value = msgspec.msgpack.decode(body)
        yield readable(f"wide-{name}", made["type"], wide(value), name, "The longest encodings.")
        if (turned := encode(mirrored(value))) != body:
            yield readable(f"reversed-{name}", made["type"], turned, name, "The fields in the opposite order.")
        strange = among_strangers(value)
        yield readable(f"later-{name}", made["type"], strange, name, "Fields of later versions.", opaque=True)


FIVES: Final = (
    b"\x05", b"\xcc\x05", b"\xcd\0\x05", b"\xce\0\0\0\x05", b"\xcf" + b"\0" * 7 + b"\x05", b"\xd0\x05", b"\xd1\0\x05",
    b"\xd2\0\0\0\x05", b"\xd3" + b"\0" * 7 + b"\x05",
)  # fmt: skip


def fives() -> Iterator[Vector]:
    """The message that the other encodings of a small integer stand for."""
    yield vector("integer-widths", one(*(Events(since=5),) * len(FIVES)), "Nine times five.")


def encodings() -> Iterator[Vector]:
    """Single odd encodings, and what stands twice or is nil."""
    calls = b"".join(b"\x82\xa4verb\xa6events\xa5since" + five for five in FIVES)
    body = b"\x82\xa5calls" + bytes([0x90 + len(FIVES)]) + calls + b"\xa9namespace\xa7default"
    yield readable("request-integer-widths", "Request", body, "integer-widths", "In all encodings that an integer has.")
    call = b"\x83\xa4verb\xa4stat\xa3key\xa1a\xa3key\xa6job-42"
    doubled = b"\x83\xa9namespace\xa5other\xa5calls\x91" + call + b"\xa9namespace\xa7default"
    yield readable("request-doubled-fields", "Request", doubled, "stat", "The last one counts.", opaque=True)
    label = (
        b"\x82\xa5calls\x91\x83\xa4verb\xa7prepare\xa3key\xa1a\xa6labels\x82\xa1k\xa1x\xa1k\xa0\xa9namespace\xa7default"
    )
    yield readable("request-doubled-label", "Request", label, "label-empty-value", "Of labels as well.", opaque=True)
    nothing = {"outcomes": [{"call": 0, "ok": {}}], "error": None}
    yield readable("reply-nil-fields", "Reply", encode(nothing), "reply-empty", "What may be absent may be nil.")
    beat = {"sequence": 42, "previous": 0, "time": CREATED, "topics": None}
    yield readable("heartbeat-nil-topics", "Heartbeat", encode(beat), "heartbeat-started", "Nil is absent, not empty.")
    gone = {**msgspec.to_builtins(event(5, 0, "remove", "look")), "info": None}
    yield readable("event-nil-info", "Event", encode(gone), "event-remove", "Nil is absent.")
    written = {"name": "a", "kind": "active", "parent": "", "labels": {}, "created": 0, "updated": 0}
    yield readable("info-defaults-written", "Info", encode(written), "answer-info-smallest", "Defaults may be written.")
    page = {"infos": [], "sequence": 0, "next": ""}
    yield readable("walk-defaults-written", "WalkPage", encode(page), "answer-walk-empty", "Of a page as well.")
    half = encode(SMALL_STATUS).replace(b"\xcb" + struct.pack(">d", 0.5), b"\xca" + struct.pack(">f", 0.5))
    yield readable("status-short-float", "StatusAnswer", half, "answer-status-smallest", "A float of 32 bits.")


# Wrong ones.

OTHERS: Final[dict[type, tuple[tuple[str, object], ...]]] = {
    str: (("integer", 1), ("bin", b"a"), ("nil", None)),
    int: (("text", "1"), ("float", 1.0), ("boolean", True), ("nil", None)),
    dict: (("array", []), ("text", "{}")),
    list: (("map", {}), ("text", "a")),
}
"""The type of a field to values of other types."""

RIGHT: Final[dict[str, tuple[dict[str, Any], tuple[str, ...]]]] = {
    "Event": (
        {
            "sequence": 1, "previous": 0, "time": 0, "snapshotter": "s", "namespace": "n", "verb": "update", "key": "a",
            "info": {"name": "a", "kind": "view"},
        },
        ("sequence", "previous", "time", "snapshotter", "namespace", "verb"),
    ),
    "Heartbeat": ({"sequence": 1, "previous": 0, "time": 0, "topics": {"t": 1}}, ("sequence", "previous", "time")),
    "Info": (
        {"name": "a", "kind": "active", "parent": "b", "labels": {"k": "v"}, "created": 1, "updated": 1},
        ("name", "kind"),
    ),
    "MountsAnswer": ({"mounts": [{"type": "bind", "source": "/a"}], "fence": 1}, ("mounts",)),
    "Usage": ({"inodes": 1, "size": 1}, ()),
    "WalkPage": ({"infos": [{"name": "a", "kind": "view"}], "sequence": 1, "next": "a"}, ()),
    "EventsPage": ({"events": [], "next": 1, "newest": 1}, ()),
    "Reply": ({"outcomes": [{"call": 0, "ok": {}}], "error": {"code": "internal", "message": ""}}, ()),
    "StatusAnswer": (msgspec.to_builtins(SMALL_STATUS), ("version", "pid", "endpoint", "events_endpoint")),
}  # fmt: skip
"""What a client reads: a message of each type with its fields, and those of them that are required."""


def wrong_fields() -> Iterator[Vector]:
    """Each field of what a client reads with a value of another type, and each required one left out."""
    for type_, (right, required) in RIGHT.items():
        for name, value in right.items():
            for what, other in OTHERS.get(type(value), ()):
                body = encode({**right, name: other})
                yield wrong(f"{type_}-{name}-{what}", type_, body, f"`{name}` is no {what}.")
        for name in required:
            body = encode({field: value for field, value in right.items() if field != name})
            yield wrong(f"{type_}-without-{name}", type_, body, f"`{name}` is missing.")


def wrong_bodies() -> Iterator[Vector]:
    """What is no body of its type at all, and wrong values further inside."""
    for type_, (right, _) in RIGHT.items():
        body = encode(right)
        yield wrong(f"{type_}-empty", type_, b"", "No bytes at all.")
        yield wrong(f"{type_}-truncated", type_, body[:-1], "The last byte is missing.")
        yield wrong(f"{type_}-half", type_, body[: len(body) // 2], "Half of it is missing.")
        yield wrong(f"{type_}-trailing", type_, body + b"\xc0", "A second value behind the map.")
        yield wrong(f"{type_}-array", type_, encode([right]), "An array of it.")
        yield wrong(f"{type_}-nil", type_, b"\xc0", "Nil.")
        yield wrong(
            f"{type_}-length", type_, b"\x81\xa5later\xdd\xff\xff\xff\xff", "Claims four thousand million values."
        )
        yield wrong(f"{type_}-field-name", type_, b"\x81\x01\x02", "A field's name is text.")
        yield wrong(f"{type_}-reserved", type_, b"\x81\xa5later\xc1", "The one byte MessagePack never uses.")
    for name, type_, value, note in (
        ("Info-kind-unknown", "Info", {"name": "a", "kind": "frozen"}, "No such kind."),
        ("Info-label-integer", "Info", {"name": "a", "kind": "view", "labels": {"k": 1}}, "A label's value is text."),
        ("Info-label-key-integer", "Info", {"name": "a", "kind": "view", "labels": {1: "v"}}, "And so is its key."),
        ("MountsAnswer-mount-without-type", "MountsAnswer", {"mounts": [{"source": "/a"}]}, "`type` is missing."),
        ("MountsAnswer-mount-without-source", "MountsAnswer", {"mounts": [{"type": "bind"}]}, "`source` is missing."),
        (
            "MountsAnswer-options-text", "MountsAnswer",
            {"mounts": [{"type": "bind", "source": "/a", "options": "ro"}]}, "One option is an array of one.",
        ),
        ("WalkPage-info-nil", "WalkPage", {"infos": [None]}, "Nil is no info."),
        ("EventsPage-event-without-verb", "EventsPage", {"events": [{"sequence": 1}]}, "Half an event."),
        ("Event-info-kind", "Event", {**RIGHT["Event"][0], "info": {"name": "a", "kind": "Active"}}, "In lower case."),
        ("Heartbeat-topic-text", "Heartbeat", {**RIGHT["Heartbeat"][0], "topics": {"t": "1"}}, "An integer."),
        ("Reply-outcome-nil", "Reply", {"outcomes": [None]}, "Nil is no outcome."),
        ("Reply-call-text", "Reply", {"outcomes": [{"call": "0", "ok": {}}]}, "A call is a number."),
        ("Reply-error-without-message", "Reply", {"error": {"code": "internal"}}, "`message` is missing."),
        ("Reply-code-integer", "Reply", {"error": {"code": 5, "message": ""}}, "A code is text."),
        ("Reply-details-array", "Reply", {"error": {"code": "internal", "message": "", "details": []}}, "A map."),
        ("Reply-progress-text", "Reply", {"outcomes": [{"call": 0, "progress": "half"}]}, "Progress is a map."),
        (
            "Reply-progress-float", "Reply",
            {"outcomes": [{"call": 0, "progress": {"entries": 0.5}}]}, "Half an entry.",
        ),
    ):  # fmt: skip
        yield wrong(name, type_, encode(value), note)
    text = encode({**RIGHT["Event"][0], "key": "~~"}).replace(b"~~", b"\xc3\x28")
    yield wrong("Event-key-utf8", "Event", text, "Broken UTF-8.")
    half = encode({**RIGHT["Info"][0], "name": "~~~"}).replace(b"~~~", b"\xed\xa0\x80")
    yield wrong("Info-name-surrogate", "Info", half, "Half a pair.")


def wrong(name: str, type_: str, body: bytes, note: str) -> Vector:
    """A body that a client must refuse."""
    note = f"{note} A client reports `internal`."
    return {"name": f"malformed-{name}", "type": type_, "note": note, "error": "internal", "hex": body.hex()}


def wrong_requests() -> Iterator[Vector]:
    """Fields of requests that `generate_vectors` does not have."""
    call = {"verb": "remove", "key": "a"}
    for name, request, note in (
        ("token-text", {"calls": [call], "token": "abc"}, "A token is bytes."),
        ("token-too-long", {"calls": [call], "token": b"t" * (TOKEN_BYTES_MAX + 1)}, "A byte over."),
        ("atomic-integer", {"calls": [call], "atomic": 1}, "A number is no boolean."),
        ("timeout-float", {"calls": [call], "timeout_ms": 1.0}, "A float is no integer, whole or not."),
        ("fence-text", {"calls": [{**call, "fence": "1"}]}, "A fence is a number."),
        ("fence-float", {"calls": [{**call, "fence": 1.0}]}, "A float is no integer."),
        ("since-nil", {"calls": [{"verb": "events", "since": None}]}, "Nil is no number."),
        ("follow-integer", {"calls": [{"verb": "events", "since": 0, "follow": 1}]}, "A number is no boolean."),
        ("topics-text", {"calls": [{"verb": "events", "since": 0, "topics": "a/"}]}, "One topic is an array of one."),
        ("cancel-calls-text", {"calls": [{"verb": "cancel", "request": b"a", "calls": ["0"]}]}, "Calls are numbers."),
        ("fieldpaths-text", {"calls": [{"verb": "update", "name": "a", "fieldpaths": "labels"}]}, "An array of one."),
        ("commit-without-name", {"calls": [{"verb": "commit", "key": "a"}]}, "`name` is missing."),
        ("commit-without-key", {"calls": [{"verb": "commit", "name": "a"}]}, "`key` is missing."),
        ("update-without-name", {"calls": [{"verb": "update"}]}, "`name` is missing."),
        ("cancel-without-request", {"calls": [{"verb": "cancel"}]}, "`request` is missing."),
        ("label-nil", {"calls": [{"verb": "prepare", "key": "a", "labels": {"k": None}}]}, "Nil is no text."),
        ("labels-nil", {"calls": [{"verb": "prepare", "key": "a", "labels": None}]}, "Nil is no map."),
    ):
        yield {
            "name": f"malformed-{name}", "type": "Request", "note": note, "error": "invalid_argument",
            "hex": encode({**request, "namespace": "default"}).hex(),
        }  # fmt: skip


MESSAGES: Final = (requests, replies, answers, publications, fives)
ENCODINGS: Final = (encodings,)
MALFORMED: Final = (wrong_requests, wrong_fields, wrong_bodies)
