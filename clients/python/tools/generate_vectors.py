"""Writes clients/vectors/vectors.json: golden bytes of every message, so that all clients speak one language.

What is in the file, and how a client's tests use it, is said in clients/vectors/README.md. Everything comes from
the types of `snapbroker.protocol`, except where the point is that it could not: malformed bodies, fields of a
later version, encodings that are legal but not the shortest.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Final

import msgspec
import vector_edges as edges
from generated import ROOT, write_or_check
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

from snapbroker import protocol
from snapbroker.contract import (
    LABEL_BYTES_MAX,
    NAME_BYTES_MAX,
    NAMESPACE_BYTES_MAX,
    Event,
    Info,
    Kind,
    Mount,
    Usage,
    topic,
)
from snapbroker.errors import ERRORS
from snapbroker.protocol import (
    CALLS_MAX,
    CREDIT_MAX,
    DONE,
    EVENT_VERSION,
    FILTER_BYTES_MAX,
    FILTERS_MAX,
    MORE,
    PAGE_MAX,
    REQUEST_ID_BYTES_MAX,
    REQUEST_VERSION,
    ActorStatus,
    Audit,
    AuditPage,
    Cancel,
    Cleanup,
    Commit,
    Empty,
    Events,
    EventsPage,
    Fault,
    Finding,
    Heartbeat,
    Mounts,
    MountsAnswer,
    MountUse,
    Outcome,
    Prepare,
    Progress,
    Remove,
    Repair,
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
    Why,
    WhyAnswer,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER: Final = ROOT / "clients" / "vectors"


def requests() -> Iterator[Vector]:
    """Requests, one for each verb, then the odd ones."""
    labels = {"containerd.io/gc.root": "2026-01-01T00:00:00Z", "team": "build"}
    yield vector("prepare", one(Prepare(key="job-42", parent="base")), "An active snapshot over a parent.")
    yield vector("prepare-without-parent", one(Prepare(key="job-42")), "An empty parent is left out.")
    yield vector("prepare-labels", one(Prepare(key="job-42", parent="base", labels=labels)), "With labels.")
    yield vector("view", one(View(key="look", parent="base")), "A read-only snapshot.")
    yield vector("commit", one(Commit(name="layer-1", key="job-42")), "The active key becomes a name.")
    yield vector(
        "commit-all-fields",
        one(Commit(name="layer-1", key="job-42", parent="base", labels=labels, sync=True)),
        "Durable files, rebased, labelled.",
    )
    yield vector("remove", one(Remove(key="job-42")), "A snapshot of any kind without children.")
    yield vector("mounts", one(Mounts(key="job-42")), "The mounts of an active snapshot or a view.")
    yield vector("stat", one(Stat(key="job-42")), "What is known of a snapshot.")
    yield vector("update-all-labels", one(Update(name="base", labels=labels)), "Replaces all labels.")
    yield vector(
        "update-fieldpaths",
        one(
            Update(
                name="base",
                labels={"containerd.io/gc.root": "x"},
                fieldpaths=("labels.containerd.io/gc.root", "labels.team"),
            )
        ),
        "Sets one label and, as it is named and not given, deletes another.",
    )
    yield vector("usage", one(UsageOf(key="base")), "What a snapshot takes.")
    yield vector("walk", one(Walk()), "Everything in the namespace, in the pages and credit of the defaults.")
    yield vector(
        "walk-all-fields",
        one(Walk(filters=("kind==active", 'labels."containerd.io/gc.root"'), after="job-41", page=2, credit=3)),
        "Two filters (or), small pages, continued behind a name.",
    )
    yield vector("walk-limits", one(Walk(page=PAGE_MAX, credit=CREDIT_MAX)), "The largest page and credit.")
    yield vector("cleanup", one(Cleanup()), "Waits until what was removed is deleted.")
    yield vector("events", one(Events(since=0)), "The whole journal of the caller's namespace.")
    yield vector(
        "events-all-fields",
        one(
            Events(since=41, topics=("overlayfs/", "native/default/snapshot/commit"), page=10, credit=2, follow=True),
            timeout_ms=30_000,
        ),
        "Topics of any namespace, and wait for more.",
    )
    yield vector("events-since-maximum", one(Events(since=INTEGER_MAX)), "The largest integer a reader must hold.")
    yield vector("audit", one(Audit()), "Of the whole snapshotter, whatever the namespace.")
    yield vector("audit-all-fields", one(Audit(after="journal/7", page=100, credit=2)), "Continued behind a page.")
    yield vector("repair", one(Repair()), "Says what it would do, and changes nothing.")
    yield vector("repair-execute", one(Repair(execute=True)), "Does it.")
    yield vector("why", one(Why(key="base")), "What keeps it, or who removed it.")
    yield vector("cancel", one(Cancel(request=b"\x00\x01\xfe\xff")), "A request id is bytes, not text.")
    yield vector("status", Request(calls=(Status(),)), "To the broker itself: an empty target, no namespace.")
    yield vector(
        "several-calls",
        one(Stat(key="base"), Prepare(key="a", parent="base"), Remove(key="missing")),
        "Three calls that know nothing of each other.",
    )
    yield vector(
        "atomic",
        one(
            Commit(name="layer-1", key="job-42"),
            Prepare(key="a", parent="layer-1"),
            Stat(key="a"),
            atomic=True,
            timeout_ms=5000,
        ),
        "All or none: the second call sees the first.",
    )
    yield vector(
        "most-calls", Request(calls=(Status(),) * CALLS_MAX), f"{CALLS_MAX} calls, the most that one request has."
    )
    yield vector("name-longest", one(Stat(key=LONGEST_NAME)), f"{NAME_BYTES_MAX} bytes in half as many characters.")
    yield vector("name-unicode", one(Stat(key=FAR_NAME)), "Two, three and four bytes a character; not normalised.")
    yield vector("name-control-characters", one(Stat(key="\x01\t\n\x7f")), "Any character but NUL is legal.")
    yield vector("label-longest", one(Prepare(key="a", labels=LONGEST_LABEL)), f"{LABEL_BYTES_MAX} bytes in all.")
    yield vector("label-empty-value", one(Prepare(key="a", labels={"k": ""})), "Legal, and not stored.")
    yield vector("namespace-longest", one(Stat(key="a"), namespace=LONGEST_NAMESPACE), f"{NAMESPACE_BYTES_MAX} bytes.")


def replies() -> Iterator[Vector]:
    """Parts of replies: outcomes, progress, and one for each code."""
    yield vector("reply-mounts", Reply(outcomes=(ok(0, MountsAnswer(mounts=MOUNTS)),)), "To prepare, view and mounts.")
    yield vector("reply-empty", Reply(outcomes=(ok(0, Empty()),)), "To commit, remove, cleanup, cancel: an empty map.")
    yield vector("reply-info", Reply(outcomes=(ok(0, BASE),)), "To stat and update.")
    yield vector("reply-usage", Reply(outcomes=(ok(0, Usage(3, 12288)),)), "To usage.")
    yield vector(
        "reply-several",
        Reply(outcomes=(ok(2, JOB), failed(0, "not_found", "snapshot 'missing' does not exist"), ok(1, Empty()))),
        "Outcomes come as they get ready; `call` says whose they are.",
    )
    yield vector(
        "reply-progress",
        Reply(outcomes=(Outcome(call=0, progress=Progress(entries=1200, bytes=734_003_200)),)),
        "How far a long call is; its outcome follows in a later part.",
    )
    yield vector("reply-nothing", Reply(), "A part without outcomes says nothing; as the last one it ends the reply.")
    for code in ERRORS:
        yield vector(
            f"reply-error-{code}",
            Reply(outcomes=(failed(0, code, "the snapshot 'é' says no"),)),
            "An error of one call. Messages are for people and may change.",
        )
    yield vector(
        "reply-error-unknown-code",
        Reply(outcomes=(failed(0, "on_fire", "a code of a later version"),)),
        "A reader that does not know a code treats it as `internal`.",
    )
    yield vector(
        "reply-request-error",
        Reply(error=Fault(code="resource_exhausted", message="the mailbox is full", details={"retry_after_ms": 50})),
        "The request as a whole was refused: nothing was executed.",
    )
    yield vector(
        "reply-out-of-range",
        Reply(outcomes=(failed(0, "out_of_range", "no longer kept", newest=9000, oldest=5001),)),
        "To events: what is kept.",
    )


def answers() -> Iterator[Vector]:
    """What stands in `ok`, by itself."""
    yield vector("answer-mounts", MountsAnswer(mounts=MOUNTS), "One overlay mount.")
    yield vector(
        "answer-mounts-several",
        MountsAnswer(mounts=(Mount("bind", "/r/1/fs", ("ro", "rbind")), Mount("bind", "/r/2/fs", (), "sub/dir"))),
        "Two mounts to make in order, the second below the first; options may be absent.",
    )
    yield vector("answer-mounts-none", MountsAnswer(mounts=()), "No mount at all.")
    yield vector("answer-empty", Empty(), "An empty map.")
    yield vector("answer-info-active", JOB, "An active snapshot; without labels the field is absent.")
    yield vector("answer-info-view", LOOK, "A view.")
    yield vector("answer-info-committed", BASE, "A committed snapshot; without parent the field is absent.")
    yield vector("answer-info-smallest", Info("a", Kind.ACTIVE), "Everything that can be absent is.")
    yield vector(
        "answer-info-largest",
        Info(LONGEST_NAME, Kind.COMMITTED, FAR_NAME, {**LONGEST_LABEL, "é": "😀"}, -1, INTEGER_MAX),
        "The longest name and label; times are signed, before 1970 they are negative.",
    )
    yield vector("answer-usage", Usage(3, 12288), "Inodes, and bytes of allocated blocks.")
    yield vector("answer-usage-zero", Usage(0, 0), "Both fields are always there.")
    yield vector("answer-usage-largest", Usage(INTEGER_MAX, INTEGER_MAX), "The largest integers.")
    yield vector("answer-walk-empty", WalkPage(), "The one page of an empty namespace without history.")
    yield vector("answer-walk-more", WalkPage(infos=(BASE, JOB), sequence=42, next="job-42"), "More to come.")
    yield vector("answer-walk-last", WalkPage(infos=(LOOK,), sequence=43), "No `next`: the end.")
    yield vector(
        "answer-walk-none-but-more", WalkPage(sequence=42, next="job-42"), "A page may be empty before the end."
    )
    yield vector("answer-events-empty", EventsPage(next=42, newest=42), "Nothing above `since`.")
    yield vector(
        "answer-events",
        EventsPage(events=(event(41, 40, "prepare", "job-42", JOB), event(42, 7, "remove", "old")), next=42, newest=50),
        "Two events, more in the journal.",
    )
    finding = Finding(
        kind="leftover", severity="warning", message="a directory without a record", advice="repair discards it",
        id=7, path="/r/7", time=CREATED, inodes=3, size=12288, repair="discard it",
    )  # fmt: skip
    yield vector("answer-audit-clean", AuditPage(looked=7), "Nothing was found.")
    yield vector(
        "answer-audit",
        AuditPage(
            findings=(
                finding,
                Finding(kind="journal-gap", severity="error", message="7 is missing", advice="repair", sequence=7),
                Finding(
                    kind="damaged-record", severity="error", message="unreadable", advice="repair removes it",
                    namespace="default", key="job-42", repair="remove it", mended=True,
                ),
                Finding(kind="mode", severity="warning", message="0777", advice="chmod", path="/r", failure="EROFS"),
            ),
            next="journal/2", looked=1234,
        ),
        "Findings of several kinds, one mended and one that could not be; more to come.",
    )  # fmt: skip
    yield vector("answer-why-unknown", WhyAnswer(oldest=1), "No such snapshot, and nothing in the journal.")
    yield vector(
        "answer-why",
        WhyAnswer(
            info=BASE, id=3, fence=17, broken=True, children=("job-42",), children_count=2,
            holds=("a prepare makes 'x' of it",), mounts=(MountUse(point="/m", type="bind", pid=1, process="init"),),
            references=("sha256:1",), events=(event(17, 3, "commit", "making", BASE),), oldest=5,
        ),
        "All that can keep a snapshot.",
    )  # fmt: skip
    yield vector(
        "answer-status",
        StatusAnswer(
            version="0.1.0", pid=4711, uptime_seconds=12.5, resident_bytes=50_331_648,
            endpoint="ipc:///run/snapbroker/router.sock", events_endpoint="ipc:///run/snapbroker/events.sock",
            queues={"router": {"length": 0, "limit": 10000}},
            snapshotters=(
                ActorStatus(
                    name="overlayfs", backend="overlayfs", state="ready", pid=4712, restarts=1,
                    resident_bytes=41_943_040, cpu_seconds=0.25, open_files=17, sequence=42, snapshots=3,
                    capabilities=("rebase",), root="/var/lib/snapbroker/overlayfs",
                    queues={"mailbox": {"length": 0, "limit": 4096}}, backlog={"bytes": 0, "entries": 0},
                ),
                ActorStatus(name="btrfs", backend="btrfs", state="unavailable"),
            ),
        ),
        "A broker with two snapshotters, one of them down.",
    )  # fmt: skip


def publications() -> Iterator[Vector]:
    """Bodies of events and heartbeats."""
    yield vector("event-prepare", event(1, 0, "prepare", "job-42", JOB), "The first of its topic: no previous.")
    yield vector("event-view", event(2, 0, "view", "look", LOOK), "A view.")
    yield vector(
        "event-commit",
        event(3, 0, "commit", "job-42", Info("layer-1", Kind.COMMITTED, "base", {}, CREATED + 3, CREATED + 3)),
        "`key` is gone, `info.name` is there.",
    )
    yield vector("event-update", event(4, 0, "update", "base", BASE), "The snapshot with all its labels.")
    yield vector("event-remove", event(5, 0, "remove", "look"), "No info: it is gone.")
    yield vector("event-cleanup", event(6, 0, "cleanup"), "Neither key nor info.")
    yield vector("event-later", event(900, 899, "prepare", FAR_NAME, Info(FAR_NAME, Kind.ACTIVE)), "Far names.")
    yield vector(
        "event-largest",
        Event(INTEGER_MAX, INTEGER_MAX - 1, INTEGER_MAX, "native", LONGEST_NAMESPACE, "remove", LONGEST_NAME),
        "The largest integers and longest names.",
    )
    yield vector("heartbeat-quiet", Heartbeat(sequence=42, previous=42, time=CREATED, topics={}), "Nothing changed.")
    yield vector("heartbeat-first", Heartbeat(sequence=0, previous=0, time=CREATED, topics={}), "No event yet.")
    yield vector(
        "heartbeat-busy",
        Heartbeat(
            sequence=44, previous=42, time=CREATED,
            topics={"overlayfs/default/snapshot/prepare": 43, "overlayfs/default/snapshot/remove": 44},
        ),
        "The newest of each topic that changed since the heartbeat before.",
    )  # fmt: skip
    yield vector("heartbeat-started", Heartbeat(sequence=42, previous=0, time=CREATED), "The first after a start.")
    yield vector("heartbeat-too-many", Heartbeat(sequence=99, previous=42, time=CREATED), "Too many topics to name.")


def tolerated() -> Iterator[Vector]:
    """Other encodings of the same message, and fields of later versions."""
    later = {"nested": [{"deep": None}], "blob": b"\x00\xff", "float": 0.5, "big": 2**64 - 1}
    yield readable(
        "request-unknown-fields", "Request",
        encode({"later": later, "calls": [{"verb": "stat", "hint": [1], "key": "job-42"}], "namespace": "default"}),
        "stat", "Fields nobody knows, in the request and in the call, are skipped.",
    )  # fmt: skip
    yield readable(
        "request-defaults-written", "Request",
        encode(
            {
                "timeout_ms": 0, "atomic": False, "namespace": "default",
                "calls": [{"key": "job-42", "parent": "", "labels": {}, "verb": "prepare"}],
            }
        ),
        "prepare-without-parent", "Defaults may be written, fields may come in any order, the verb last.",
    )  # fmt: skip
    yield readable(
        "request-wide-encoding", "Request",
        b"\xdf\x00\x00\x00\x02"
        b"\xdb\x00\x00\x00\x05calls\xdd\x00\x00\x00\x01\xde\x00\x02\xd9\x04verb\xda\x00\x04stat\xd9\x03key\xda\x00\x06job-42"
        b"\xda\x00\x09namespace\xdb\x00\x00\x00\x07default",
        "stat", "Lengths need not be written in the shortest form.",
    )  # fmt: skip
    yield readable(
        "request-wide-integers", "Request",
        b"\x82\xa5calls\x91\x83\xa4verb\xa4walk\xa4page\xd3\x00\x00\x00\x00\x00\x00\x27\x10"
        b"\xa6credit\xcf\x00\x00\x00\x00\x00\x00\x04\x00\xa9namespace\xa7default",
        "walk-limits", "Integers neither: a signed and an unsigned one of 64 bits.",
    )  # fmt: skip
    yield readable(
        "reply-unknown-fields", "Reply",
        encode({"cost": 3, "outcomes": [{"call": 0, "ok": {}, "node": "a"}]}),
        "reply-empty", "In a reply as well.",
    )  # fmt: skip
    yield readable(
        "event-unknown-fields", "Event",
        encode(
            {
                "sequence": 5, "previous": 0, "time": CREATED + 5, "snapshotter": "overlayfs", "namespace": "default",
                "verb": "remove", "key": "look", "lease": "later", "info": None,
            }
        ),
        "event-remove", "In an event as well; an absent field may also be nil.",
    )  # fmt: skip


def malformed() -> Iterator[Vector]:
    """Bodies that are no message, with the code that answers them."""

    def bad(name: str, body: bytes, note: str, type_: str = "Request", error: str = "invalid_argument") -> Vector:
        return {"name": name, "type": type_, "note": note, "error": error, "hex": body.hex()}

    def call(**fields: object) -> bytes:
        return encode({"calls": [fields], "namespace": "default"})

    stat = encode(one(Stat(key="job-42")))
    yield bad("malformed-empty", b"", "No bytes at all.")
    yield bad("malformed-truncated", stat[:-1], "The last byte is missing.")
    yield bad("malformed-trailing", stat + b"\xc0", "A second value behind the map.")
    yield bad("malformed-never-used", b"\xc1", "The one byte MessagePack never uses.")
    yield bad("malformed-nil", b"\xc0", "Nil.")
    yield bad("malformed-array", b"\x90", "An array.")
    yield bad("malformed-array-length", b"\x81\xa5calls\xdd\xff\xff\xff\xff", "Claims four thousand million calls.")
    yield bad("malformed-map-length", b"\xdf\xff\xff\xff\xff", "Claims as many fields.")
    yield bad("malformed-string-length", b"\x81\xdb\xff\xff\xff\xff", "Claims a field name of four gigabytes.")
    yield bad("malformed-bin-length", b"\x81\xa5calls\xc6\xff\xff\xff\xff", "Claims four gigabytes.")
    yield bad("malformed-json", b'{"calls":[]}', "JSON is not MessagePack.")
    yield bad("malformed-field-name", b"\x81\x01\x02", "A field's name is text.")
    yield bad("malformed-no-calls", encode({"namespace": "default"}), "`calls` is missing.")
    yield bad("malformed-calls-empty", encode({"calls": [], "namespace": "default"}), "At least one call.")
    yield bad("malformed-calls-nil", encode({"calls": None}), "Nil is no list.")
    yield bad("malformed-calls-map", encode({"calls": {"verb": "stat", "key": "a"}}), "A map is no list.")
    yield bad("malformed-call-string", encode({"calls": ["stat"]}), "A string is no call.")
    yield bad("malformed-calls-too-many", encode({"calls": [{"verb": "status"}] * (CALLS_MAX + 1)}), "One too many.")
    yield bad("malformed-no-verb", call(key="a"), "A call without a verb.")
    yield bad("malformed-verb-integer", call(verb=1, key="a"), "A verb is text.")
    yield bad("malformed-verb-unknown", call(verb="rebase", key="a"), "No such verb.", error="unimplemented")
    yield bad("malformed-verb-case", call(verb="Stat", key="a"), "Verbs are in lower case.", error="unimplemented")
    yield bad(
        "malformed-verb-unknown-second",
        encode({"calls": [{"verb": "stat", "key": "a"}, {"verb": "lease", "id": "b"}], "namespace": "default"}),
        "One unknown verb refuses the request, known ones included.",
        error="unimplemented",
    )
    yield bad("malformed-no-key", call(verb="stat"), "`key` is missing.")
    yield bad("malformed-key-nil", call(verb="stat", key=None), "Nil is no key.")
    yield bad("malformed-key-integer", call(verb="stat", key=1), "A number is no key.")
    yield bad("malformed-key-bin", call(verb="stat", key=b"a"), "Bytes are no text.")
    yield bad("malformed-key-utf8", call(verb="stat", key="~~").replace(b"~~", b"\xc3\x28"), "Broken UTF-8.")
    yield bad("malformed-key-overlong", call(verb="stat", key="~~").replace(b"~~", b"\xc0\x80"), "NUL in two bytes.")
    yield bad("malformed-key-surrogate", call(verb="stat", key="~~~").replace(b"~~~", b"\xed\xa0\x80"), "Half a pair.")
    yield bad("malformed-key-extension", call(verb="stat", key=msgspec.msgpack.Ext(5, b"a")), "An extension type.")
    yield bad("malformed-labels-array", call(verb="prepare", key="a", labels=["k", "v"]), "Labels are a map.")
    yield bad("malformed-label-integer", call(verb="prepare", key="a", labels={"k": 1}), "A label's value is text.")
    yield bad("malformed-label-key-integer", call(verb="prepare", key="a", labels={1: "v"}), "And so is its key.")
    yield bad("malformed-sync-integer", call(verb="commit", name="n", key="a", sync=1), "A number is no boolean.")
    yield bad("malformed-page-string", call(verb="walk", page="10"), "Text is no number.")
    yield bad("malformed-page-float", call(verb="walk", page=1.5), "One page and a half.")
    yield bad("malformed-page-boolean", call(verb="walk", page=True), "A boolean is no number.")
    yield bad("malformed-filters-string", call(verb="walk", filters="name"), "One filter is a list of one.")
    yield bad("malformed-no-since", call(verb="events"), "`since` is missing.")
    yield bad("malformed-cancel-text", call(verb="cancel", request="!"), "A request id is bytes.")
    yield bad("malformed-namespace-nil", encode({"calls": [{"verb": "cleanup"}], "namespace": None}), "Nil is no text.")
    yield bad("malformed-timeout-string", encode({"calls": [{"verb": "cleanup"}], "timeout_ms": "9"}), "No number.")
    for name, type_, body, note in (
        ("reply-array", "Reply", b"\x90", "A reply is a map."),
        ("reply-no-call", "Reply", encode({"outcomes": [{"ok": {}}]}), "Whose outcome?"),
        ("reply-no-code", "Reply", encode({"error": {"message": "?"}}), "An error has a code."),
        ("reply-truncated", "Reply", encode(Reply(outcomes=(ok(0, BASE),)))[:-3], "Cut off inside an answer."),
        ("event-empty", "Event", b"", "No bytes at all."),
        ("event-no-sequence", "Event", encode({"previous": 0, "time": 0}), "No sequence."),
        (
            "event-kind", "Event", encode(event(1, 0, "prepare", "a", JOB)).replace(b"\xa6active", b"\xa6Active"),
            "Kinds are words in lower case.",
        ),
        ("heartbeat-topics", "Heartbeat", encode({"sequence": 1, "previous": 0, "time": 0, "topics": []}), "A map."),
    ):  # fmt: skip
        yield bad(f"malformed-{name}", body, f"{note} A client reports `internal`.", type_, "internal")


def refused() -> Iterator[Vector]:
    """Well-formed requests that break the contract: the code of the request, or of its one call."""

    def bad(name: str, request: Request, error: str, note: str, whole: bool = False) -> Vector:
        return {**vector(name, request, note), "error": error, "refuses": "request" if whole else "call"}

    invalid = "invalid_argument"
    yield bad("refused-key-empty", one(Prepare(key="")), invalid, "A key is at least one byte.")
    yield bad("refused-key-nul", one(Prepare(key="a\0b")), invalid, "The one character a key cannot hold.")
    yield bad("refused-key-too-long", one(Prepare(key=LONGEST_NAME + "x")), invalid, "One byte over the limit.")
    yield bad("refused-parent-too-long", one(Prepare(key="a", parent=LONGEST_NAME + "x")), invalid, "A parent as well.")
    yield bad("refused-name-empty", one(Commit(name="", key="a")), invalid, "A committed name as well.")
    yield bad("refused-label-too-long", one(Prepare(key="a", labels={"k" * 97: "v" * 4000})), invalid, "4,097 bytes.")
    yield bad("refused-label-key-empty", one(Prepare(key="a", labels={"": "v"})), invalid, "A label has a key.")
    yield bad("refused-stat-empty", one(Stat(key="")), invalid, "For reading verbs too.")
    yield bad("refused-page-zero", one(Walk(page=0)), invalid, "A page has at least one entry.")
    yield bad("refused-page-negative", one(Walk(page=-1)), invalid, "Below zero.")
    yield bad("refused-page-too-large", one(Walk(page=PAGE_MAX + 1)), invalid, f"{PAGE_MAX} at most.")
    yield bad("refused-credit-zero", one(Walk(credit=0)), invalid, "At least one page.")
    yield bad("refused-credit-too-large", one(Walk(credit=CREDIT_MAX + 1)), invalid, f"{CREDIT_MAX} at most.")
    yield bad("refused-filter", one(Walk(filters=("name=a",))), invalid, "No such operator.")
    yield bad("refused-filter-too-long", one(Walk(filters=("a" * (FILTER_BYTES_MAX + 1),))), invalid, "A byte over.")
    yield bad("refused-filters-too-many", one(Walk(filters=("name",) * (FILTERS_MAX + 1))), invalid, "One too many.")
    yield bad("refused-topics-too-many", one(Events(since=0, topics=("a",) * (FILTERS_MAX + 1))), invalid, "One over.")
    yield bad("refused-events-page-zero", one(Events(since=0, page=0)), invalid, "Of events too.")
    yield bad("refused-since-not-reached", one(Events(since=INTEGER_MAX)), "out_of_range", "Has not happened.")
    yield bad("refused-cancel-unknown", one(Cancel(request=b"nobody")), "not_found", "No such open request.")
    yield bad("refused-status", one(Status()), "unimplemented", "Status is asked of the broker, not a snapshotter.")
    yield bad(
        "refused-namespace-missing", Request(calls=(Stat(key="a"),)), "failed_precondition", "It is required.", True
    )
    for name, namespace in (
        ("too-long", LONGEST_NAMESPACE + "n"), ("slash", "a/b"), ("dash", "-a"), ("dots", "a..b"),
        ("reserved", "version"), ("unicode", "é"), ("newline", "a\n"), ("space", "a b"),
    ):  # fmt: skip
        yield bad(
            f"refused-namespace-{name}", one(Stat(key="a"), namespace=namespace), invalid, "Not an identifier.", True
        )
    yield bad("refused-timeout-negative", one(Stat(key="a"), timeout_ms=-1), invalid, "Before it began.", True)


def step(direction: str, *frames: bytes) -> Vector:
    """One message of several frames on a socket."""
    return {"direction": direction, "frames": [frame.hex() for frame in frames]}


def ask(request: Request, request_id: bytes = b"\x00\x00\x00\x01", target: bytes = b"overlayfs") -> Vector:
    """A request on the wire."""
    return step("client-to-broker", REQUEST_VERSION, request_id, target, encode(request))


def tell(reply: Reply, last: bool = True, request_id: bytes = b"\x00\x00\x00\x01") -> Vector:
    """A part of a reply on the wire."""
    return step("broker-to-client", REQUEST_VERSION, request_id, DONE if last else MORE, encode(reply))


def publish(body: Event) -> Vector:
    """An event on the wire."""
    return step("broker-to-subscriber", *protocol.event_frames(body.topic, body.sequence, encode(body)))


def talk(name: str, note: str, *steps: Vector) -> Vector:
    """A conversation."""
    return {"name": name, "note": note, "steps": list(steps)}


def exchanges() -> Iterator[Vector]:
    """Whole conversations, frame by frame, without the identity that a ROUTER socket puts in front."""
    yield from answered()
    yield from streamed()
    yield from turned_down()
    yield from published()


def answered() -> Iterator[Vector]:
    """Requests whose calls have one outcome each."""
    missing = failed(2, "not_found", "snapshot 'missing' does not exist")
    bound = MountsAnswer(mounts=(Mount("bind", "/r/7", ("rbind", "rw")),))
    yield talk(
        "exchange-prepare",
        "A request and its reply of one part.",
        ask(one(Prepare(key="job-42", parent="base"))),
        tell(Reply(outcomes=(ok(0, MountsAnswer(mounts=MOUNTS)),))),
    )
    yield talk(
        "exchange-several-parts",
        "The read is answered at once, the writes together after their commit.",
        ask(one(Prepare(key="a"), Stat(key="base"), Remove(key="missing"))),
        tell(Reply(outcomes=(ok(1, BASE),)), last=False),
        tell(Reply(outcomes=(ok(0, MountsAnswer(mounts=MOUNTS)), missing))),
    )
    yield talk(
        "exchange-progress",
        "A long copy tells how far it is.",
        ask(one(Prepare(key="job-42", parent="base")), target=b"native"),
        tell(Reply(outcomes=(Outcome(call=0, progress=Progress(entries=1200, bytes=734_003_200)),)), last=False),
        tell(Reply(outcomes=(ok(0, bound),))),
    )
    taken_back = failed(0, "cancelled", "call 1 of the atomic request failed (not_found), nothing was changed")
    yield talk(
        "exchange-atomic-failure",
        "One call fails: the others are taken back with it.",
        ask(one(Commit(name="layer-1", key="job-42"), Prepare(key="a", parent="missing"), atomic=True)),
        tell(Reply(outcomes=(taken_back, failed(1, "not_found", "parent 'missing' does not exist")))),
    )
    yield talk(
        "exchange-cancel",
        "A request is taken back by another one.",
        ask(one(Cleanup())),
        ask(one(Cancel(request=b"\x00\x00\x00\x01")), request_id=b"\x00\x00\x00\x02"),
        tell(Reply(outcomes=(ok(0, Empty()),)), request_id=b"\x00\x00\x00\x02"),
        tell(Reply(outcomes=(failed(0, "cancelled", "the call was taken back"),))),
    )


def streamed() -> Iterator[Vector]:
    """Requests that are answered in pages."""
    second = b"\x00\x00\x00\x02"
    yield talk(
        "exchange-walk",
        "Two pages use the credit up; the continuation reaches the end.",
        ask(one(Walk(page=1, credit=2))),
        tell(Reply(outcomes=(ok(0, WalkPage(infos=(BASE,), sequence=42, next="base")),)), last=False),
        tell(Reply(outcomes=(ok(0, WalkPage(infos=(JOB,), sequence=42, next="job-42")),))),
        ask(one(Walk(page=1, credit=2, after="job-42")), request_id=second),
        tell(Reply(outcomes=(ok(0, WalkPage(infos=(LOOK,), sequence=43)),)), request_id=second),
    )
    kept = EventsPage(events=(event(41, 40, "prepare", "job-42", JOB),), next=41, newest=41)
    happening = EventsPage(events=(event(42, 7, "remove", "old"),), next=42, newest=42)
    yield talk(
        "exchange-events",
        "What is kept above 40, then what happens until the timeout, which is no error.",
        ask(one(Events(since=40, follow=True), timeout_ms=30_000)),
        tell(Reply(outcomes=(ok(0, kept),)), last=False),
        tell(Reply(outcomes=(ok(0, happening),)), last=False),
        tell(Reply(outcomes=(ok(0, EventsPage(next=42, newest=42)),))),
    )


def turned_down() -> Iterator[Vector]:
    """Requests that no snapshotter ever sees."""
    prepare = one(Prepare(key="job-42", parent="base"))
    full = Fault(code="resource_exhausted", message="the mailbox is full", details={"retry_after_ms": 50})
    yield talk(
        "exchange-unknown-snapshotter",
        "There is no such target.",
        ask(prepare, target=b"zfs"),
        tell(
            Reply(
                error=Fault(
                    code="not_found",
                    message="no snapshotter 'zfs'; there are: native, overlayfs",
                    details={"snapshotters": ["native", "overlayfs"]},
                )
            )
        ),
    )
    yield talk("exchange-mailbox-full", "Too much at once: come back later.", ask(prepare), tell(Reply(error=full)))
    yield talk(
        "exchange-unsupported-version",
        "The reply is in the broker's own version.",
        step("client-to-broker", b"SNBR\x02", b"\x00\x00\x00\x01", b"overlayfs", encode(prepare)),
        tell(Reply(error=Fault(code="unimplemented", message="version 2 is not known, this broker speaks 1"))),
    )
    body = encode(prepare)
    long_id = b"i" * (REQUEST_ID_BYTES_MAX + 1)
    for name, note, *frames in (
        ("one-frame", "Only a version.", REQUEST_VERSION),
        ("three-frames", "The body is missing.", REQUEST_VERSION, b"1", b"overlayfs"),
        ("delimiter", "A REQ socket puts an empty frame in front.", b"", REQUEST_VERSION, b"1", b"overlayfs", body),
        ("no-request-id", "Nobody could tell whose the reply is.", REQUEST_VERSION, b"", b"overlayfs", body),
        ("long-request-id", f"Over {REQUEST_ID_BYTES_MAX} bytes.", REQUEST_VERSION, long_id, b"overlayfs", body),
    ):
        sent = [frame for frame in frames if isinstance(frame, bytes)]
        yield {**talk(f"dropped-{name}", note, step("client-to-broker", *sent)), "dropped": True}


def published() -> Iterator[Vector]:
    """What is on the publisher's socket."""
    changed = {topic("overlayfs", "default", "prepare"): 1, topic("overlayfs", "default", "remove"): 2}
    beat = Heartbeat(sequence=2, previous=0, time=CREATED + 10, topics=changed)
    beating = protocol.event_frames(protocol.heartbeat_topic("overlayfs"), beat.sequence, encode(beat))
    yield talk(
        "exchange-publications",
        "A subscription by prefix, two events and a heartbeat.",
        step("subscriber-to-broker", b"\x01overlayfs/"),
        publish(event(1, 0, "prepare", "job-42", JOB)),
        publish(event(2, 0, "remove", "job-42")),
        step("broker-to-subscriber", *beating),
    )


def varied() -> Iterator[Vector]:
    """Messages of every type as other writers may write them."""
    makers = (requests, replies, answers, publications, *edges.MESSAGES)
    yield from edges.variations({made["name"]: made for maker in makers for made in maker()})


def content() -> str:
    """The whole file, one vector a line."""
    head = {
        "about": "Golden vectors of the snapbroker wire; see README.md beside this file.",
        "request_version": REQUEST_VERSION.hex(),
        "event_version": EVENT_VERSION.hex(),
    }
    sections = {
        "messages": (requests, replies, answers, publications, *edges.MESSAGES),
        "tolerated": (tolerated, *edges.ENCODINGS, varied),
        "malformed": (malformed, *edges.MALFORMED),
        "refused": (refused,),
        "exchanges": (exchanges,),
    }
    parts = [f'"{name}": {json.dumps(value)}' for name, value in head.items()]
    for name, makers in sections.items():
        lines = ",\n".join(json.dumps(made, allow_nan=False) for maker in makers for made in maker())
        parts.append(f'"{name}": [\n{lines}\n]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(write_or_check(FOLDER, {"vectors.json": content()}, __doc__))
