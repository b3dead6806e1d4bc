"""The contract's lines as containerd sees them: a table of calls through the gRPC entrance, on every snapshotter.

Each row names the line it shows, what has to be there first, the call, and what must come of it. Left out are lines of
other layers (C2, C8-C10, C14, C16, C26, C27, C29, C44-C47, C54, C70-C71, C75-C92), and of the files themselves, which
`test_content` and the end-to-end tests look at.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from bridges import SNAPSHOTTERS, Client, marks
from google.protobuf.empty_pb2 import Empty
from grpc import StatusCode

from snapbroker import mount as mounting
from snapbroker_containerd.api import snapshots_pb2 as api

Call = Callable[[Client], Any]
REF = "containerd.io/snapshot.ref"
REBASING = ("memory", "overlayfs")
"""Those that can rebase at commit (D9)."""


@dataclass(frozen=True)
class Fails:
    """The call ends with this status, and these words are in its message."""

    code: StatusCode
    words: str = ""


INVALID = Fails(StatusCode.INVALID_ARGUMENT)
MISSING = Fails(StatusCode.NOT_FOUND)
TAKEN = Fails(StatusCode.ALREADY_EXISTS)
STATE = Fails(StatusCode.FAILED_PRECONDITION)


@dataclass(frozen=True)
class Row:
    """`given` is done, then `when`; `then` is how it fails, or says whether its answer is right."""

    line: str
    what: str
    given: tuple[Call, ...]
    when: Call
    then: Fails | Callable[[Any], object]
    only: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


def prepare(key: str, parent: str = "", labels: dict[str, str] | None = None) -> Call:
    return lambda client: client.prepare(key, parent, labels)


def view(key: str, parent: str = "", labels: dict[str, str] | None = None) -> Call:
    return lambda client: client.view(key, parent, labels)


def mounts(key: str) -> Call:
    return lambda client: client.mounts(key)


def commit(name: str, key: str, parent: str = "", labels: dict[str, str] | None = None) -> Call:
    return lambda client: client.commit(name, key, parent, labels)


def remove(key: str) -> Call:
    return lambda client: client.remove(key)


def stat(key: str) -> Call:
    return lambda client: client.stat(key)


def update(name: str, labels: dict[str, str] | None = None, *paths: str, mask: bool = False) -> Call:
    return lambda client: client.update(name, labels, *paths, mask=mask)


def names(*filters: str) -> Call:
    return lambda client: client.names(*filters)


def usage(key: str) -> Call:
    return lambda client: client.usage(key)


def committed(name: str, parent: str = "", labels: dict[str, str] | None = None) -> Call:
    return lambda client: client.committed(name, parent, labels)


def failing(call: Call) -> Call:
    """A call that must fail, whatever with."""

    def must_fail(client: Client) -> None:
        with pytest.raises(grpc.RpcError):
            call(client)

    return must_fail


def both(*calls: Call) -> Call:
    """The answers of several calls."""
    return lambda client: [call(client) for call in calls]


def nanoseconds(moment: Any) -> int:
    return int(moment.seconds * 10**9 + moment.nanos)


def created_is_updated(info: Any) -> bool:
    return nanoseconds(info.created_at) == nanoseconds(info.updated_at) > 0


def is_nothing(answer: Any) -> bool:
    return answer == Empty()


def labelled(**expected: str) -> Callable[[Any], bool]:
    """The labels, without those the backend adds of its own."""
    return lambda info: dict(info.labels) == expected


BASE = (committed("base"),)
SOME = (committed("base", "", {"a": "1"}), prepare("active", "base", {"a": "2", "b/c": "3"}), view("view", "base"))
NAMES = ["active", "base", "view"]
LONG = "x" * 4096
MISSING_PARENT = "a parent that is not there"

ROWS = [
    # State machine, names.
    Row("C1", "kinds have the numbers of the API", SOME, both(*map(stat, ("view", "active", "base"))),
        lambda found: [info.kind for info in found] == [1, 2, 3]),
    Row("C3", "a committed name blocks a key", BASE, prepare("base"), TAKEN),
    Row("C3", "a key blocks a name", (prepare("taken"), prepare("key")), commit("taken", "key"), TAKEN),
    Row("C4", "the key is gone after commit", (prepare("key"), commit("name", "key")), stat("key"), MISSING),
    Row("C4", "the name is there after commit", (prepare("key"), commit("name", "key")), stat("name"),
        lambda info: (info.name, info.kind, info.parent) == ("name", api.COMMITTED, "")),
    Row("C5", "no active parent", (prepare("active"),), prepare("key", "active"), INVALID),
    Row("C5", "no view as parent", (view("view"),), view("key", "view"), INVALID),
    Row("C5", "the empty parent is an empty directory", (prepare("key"),), stat("key"), lambda info: not info.parent),
    Row("C6", "prepare twice", (prepare("key"),), prepare("key"), TAKEN),
    Row("C6", "view twice", (view("key"),), view("key"), TAKEN),
    Row("C6", "prepare after view", (view("key"),), prepare("key"), TAKEN),
    Row("C6", "view after prepare", (prepare("key"),), view("key"), TAKEN),
    Row("C7", "a removed key is free", (prepare("key"), remove("key")), prepare("key"), bool),
    Row("C7", "a removed name may be committed again", (committed("name"), remove("name"), committed("name")),
        stat("name"), lambda info: info.kind == api.COMMITTED),
    *[
        Row("C11", f"a key of {what}", (prepare(key),), both(stat(key), names()),
            lambda found, key=key: found[0].name == key and found[1] == [key])
        for what, key in {
            "spaces": "two words", "colons": "sha256:abc", "slashes": "k8s.io/17/x", "unicode": "Schlüssel 鍵",
            "quotes": "\"'", "600 bytes": "k" * 600, "4096 bytes": LONG, "one byte": "k", "newlines": "a\nb",
        }.items()
    ],
    *[
        Row("C12, D3", f"{method} with {what}", (), lambda client, method=method, field=field, key=key:
            client.call(method, **field(key)), INVALID)
        for what, key in {"an empty name": "", "a NUL": "a\0b", "4097 bytes": LONG + "x"}.items()
        for method, field in {
            "Prepare": lambda key: {"key": key}, "View": lambda key: {"key": key}, "Mounts": lambda key: {"key": key},
            "Commit": lambda key: {"name": key, "key": "key"}, "Remove": lambda key: {"key": key},
            "Stat": lambda key: {"key": key}, "Usage": lambda key: {"key": key},
            "Update": lambda key: {"info": api.Info(name=key)},
        }.items()
    ],
    Row("C13", "created is updated after prepare", (prepare("key"),), stat("key"), created_is_updated),
    Row("C13", "created is updated after view", (view("key"),), stat("key"), created_is_updated),
    Row("C13", "created is updated after commit", BASE, stat("base"), created_is_updated),
    Row("C13", "commit sets both", (), both(prepare("key"), stat("key"), commit("name", "key"), stat("name")),
        lambda found: nanoseconds(found[3].created_at) > nanoseconds(found[1].created_at)),
    Row("C13", "moments are UTC", (prepare("key"),), stat("key"),
        lambda info: abs(nanoseconds(info.created_at) - time.time_ns()) < 60 * 10**9),

    # Prepare and view.
    Row("C15", "a missing parent", (), prepare("key", MISSING_PARENT), MISSING),
    Row("C15", "a missing parent of a view", (), view("key", MISSING_PARENT), MISSING),
    Row("C15", "a missing parent before a taken key", (prepare("key"),), prepare("key", MISSING_PARENT), MISSING),
    Row("C15", "a wrong parent before a taken key", (prepare("key"),), view("key", "key"), INVALID),
    Row("C18", "labels as given, without empty values", (prepare("key", "", {"a": "1", "b/c.d": "x y", "empty": ""}),),
        stat("key"), labelled(**{"a": "1", "b/c.d": "x y"})),
    Row("C18", "labels of a view", (view("key", "", {"a": "ü"}),), stat("key"), labelled(a="ü")),
    Row("C19", "a failed prepare leaves nothing", (failing(prepare("key", MISSING_PARENT)),), names(),
        lambda found: found == []),
    Row("C20", "a label of 4096 bytes", (), prepare("key", "", {"k" * 96: "v" * 4000}), bool),
    Row("C20", "a label of 4097 bytes", (), prepare("key", "", {"k" * 97: "v" * 4000}), INVALID),
    Row("C20", "a label of 4097 bytes by update", BASE, update("base", {"k" * 97: "v" * 4000}), INVALID),
    Row("C21", "a view of nothing", (), view("key"), bool),

    # Mounts.
    Row("C24", "of a missing key", (), mounts("key"), MISSING),
    Row("C24", "of a committed name", BASE, mounts("base"), STATE),
    Row("C25", "those of prepare", BASE, both(prepare("key", "base"), mounts("key"), mounts("key")),
        lambda found: found[0] == found[1] == found[2] != []),
    Row("C25", "those of view", BASE, both(view("key", "base"), mounts("key")),
        lambda found: found[0] == found[1] != []),

    # Commit.
    Row("C28", "of a missing key", (), commit("name", "key"), MISSING),
    Row("C28", "of a missing key before a taken name", BASE, commit("base", "key"), MISSING),
    Row("C28", "to a taken name", (*BASE, prepare("key")), commit("base", "key"), TAKEN),
    Row("C28", "to a taken name before a key that is not active", (*BASE, view("key")), commit("base", "key"), TAKEN),
    Row("C30", "of a view", (view("key"),), commit("name", "key"), STATE),
    Row("C30", "of a view with a parent", (*BASE, view("key", "base")), commit("name", "key"), STATE),
    Row("C30", "of a committed one", BASE, commit("name", "base"), STATE),
    Row("C31", "to its own key", (prepare("key"),), commit("key", "key"), TAKEN),
    Row("C32", "labels are those of the commit", (prepare("key", "", {"old": "1"}),
        commit("name", "key", "", {"n": "2"})), stat("name"), labelled(n="2")),
    Row("C32", "labels are not inherited", (prepare("key", "", {"old": "1"}), commit("name", "key")), stat("name"),
        labelled()),
    Row("C33", "its own parent again", (*BASE, prepare("key", "base"), commit("name", "key", "base")), stat("name"),
        lambda info: info.parent == "base"),
    Row("C33", "another parent", (*BASE, committed("other"), prepare("key", "base")), commit("name", "key", "other"),
        INVALID),
    Row("C33", "a parent for one without", (*BASE, prepare("key"), commit("name", "key", "base")), stat("name"),
        lambda info: info.parent == "base", only=REBASING),
    Row("C33", "a missing parent for one without", (prepare("key"),), commit("name", "key", MISSING_PARENT), MISSING,
        only=REBASING),
    Row("C33", "a parent that is not committed", (prepare("key"), prepare("p")), commit("name", "key", "p"), STATE,
        only=REBASING),
    Row("D9", "no rebase where the backend cannot", (*BASE, prepare("key")), commit("name", "key", "base"), INVALID,
        never=REBASING),
    Row("D5", "its own name as parent", (prepare("key"),), commit("name", "key", "name"), INVALID),
    Row("C34", "after a failed commit the key is usable", (*BASE, prepare("key"), failing(commit("base", "key")),
        commit("name", "key")), stat("name"), lambda info: info.kind == api.COMMITTED),
    Row("C38", "answers nothing", (prepare("key"),), commit("name", "key"), is_nothing),

    # Remove.
    Row("C39", "of a missing key", (), remove("key"), MISSING),
    Row("C40", "with an active child", (*BASE, prepare("key", "base")), remove("base"),
        Fails(StatusCode.FAILED_PRECONDITION, "cannot remove")),
    Row("C40", "with a view as child", (*BASE, view("key", "base")), remove("base"), STATE),
    Row("C40", "with a committed child", (*BASE, committed("child", "base")), remove("base"), STATE),
    Row("C40", "after its child", (*BASE, view("key", "base"), remove("key")), remove("base"), is_nothing),
    Row("C41", "of any kind", SOME, both(*map(remove, NAMES[::2]), remove("base"), names()),
        lambda found: found[-1] == []),
    Row("C43, C140", "cleanup answers when all is deleted", (*SOME, remove("active")), Client.cleanup, is_nothing),
    Row("C69, D11", "cleanup of nothing", (), Client.cleanup, is_nothing),

    # Usage.
    Row("C49", "of a missing key", (), usage("key"), MISSING),
    Row("C49", "of a view", (*BASE, view("key", "base")), usage("key"), lambda found: found == api.UsageResponse()),
    Row("C50", "of a committed one, measured at commit", BASE, both(usage("base"), usage("base")),
        lambda found: found[0] == found[1]),
    Row("C51", "of an empty active one, its root", (prepare("key"),), usage("key"),
        lambda found: found.inodes == 1 and found.size % 512 == 0, never=("memory",)),

    # Stat and update.
    Row("C55", "stat of a missing key", (), stat("key"), MISSING),
    Row("C56", "no mask replaces all labels", SOME, both(update("active", {"new": "1"}), stat("active")),
        lambda found: all(map(labelled(new="1"), found))),
    Row("C56", "an empty mask is none", SOME, update("active", {"new": "1"}, mask=True), labelled(new="1")),
    Row("C56", "no labels clear them", SOME, update("active"), labelled()),
    Row("C56", "the other fields cannot be changed", SOME, lambda client: client.call(
        "Update", info=api.Info(name="active", parent="other", kind=api.COMMITTED, labels={"a": "5"})).info,
        lambda info: (info.name, info.parent, info.kind) == ("active", "base", api.ACTIVE)),
    Row("C57", "the mask `labels` replaces all", SOME, update("active", {"new": "1"}, "labels"), labelled(new="1")),
    Row("C57", "a mask of one label", SOME, update("active", {"b/c": "4", "x": "y"}, "labels.b/c"),
        labelled(**{"a": "2", "b/c": "4"})),
    Row("C57", "a label's key may hold dots", SOME, update("base", {"x.y/z": "4"}, "labels.x.y/z"),
        labelled(**{"a": "1", "x.y/z": "4"})),
    Row("C57", "a masked label that is absent is deleted", SOME, update("active", None, "labels.a"),
        labelled(**{"b/c": "3"})),
    *[
        Row("C58", f"the path {path!r}", SOME,
            both(failing(update("base", {"a": "9"}, "labels.a", path)), stat("base")),
            lambda found: labelled(a="1")(found[1]))
        for path in ("", "Labels", "created_at", "name", "labels.", "parent")
    ],
    Row("C58", "another path", SOME, update("base", {"a": "9"}, "kind"), INVALID),
    Row("C59", "updated moves, created stays", (prepare("key"),), both(stat("key"), update("key", {"a": "1"})),
        lambda found: nanoseconds(found[1].updated_at) > nanoseconds(found[1].created_at)
        == nanoseconds(found[0].created_at)),
    Row("C60", "of any kind", SOME, both(*[update(name, {"a": "9"}) for name in NAMES]),
        lambda found: all(map(labelled(a="9"), found))),
    Row("C61", "of a missing one", (), update("key", {"a": "1"}), MISSING),
    Row("C62", "empty values are not stored", BASE, update("base", {"a": "", "b": "1"}), labelled(b="1")),

    # List.
    Row("C63", "in the order of names", (*map(prepare, ("b", "c/2", "a", "c/10", "B")),), names(),
        lambda found: found == ["B", "a", "b", "c/10", "c/2"]),
    Row("C63", "each as stat has it", SOME, both(*map(stat, NAMES), Client.list), lambda found: found[:3] == found[3]),
    Row("C69, D11", "nothing", (), Client.list, lambda found: found == []),
    *[
        Row(line, f"the filters {filters!r}", SOME, names(*filters), lambda found, expected=expected: found == expected)
        for line, filters, expected in [
            ("C64", (), NAMES), ("C64", ("",), NAMES), ("C64", ("name==view", "kind==committed"), ["base", "view"]),
            ("C64", ("kind==active,labels.a==2",), ["active"]), ("C64", ("kind==active,labels.a==1",), []),
            ("C65", ("kind==Active",), []), ("C65", ("parent==base",), ["active", "view"]),
            ("C65", ("labels.a",), ["active", "base"]), ("C65", ("bogus!=z",), NAMES), ("C65", ("bogus",), []),
            ("C65", ("name!=base",), ["active", "view"]), ("C66", ('labels."b/c"==3',), ["active"]),
            ("C67", ("name~=/^[ab]/",), ["active", "base"]), ("C67", ("name~=|ie|",), ["view"]),
            ("C68", ("name~=i",), ["active", "view"]), ("C68", ('name~="("',), []),
            ("C68", ("labels.a!=1",), ["active", "view"]),
        ]
    ],
    *[
        Row("C67, C69, D11", f"the bad filter {bad!r}", SOME, names(bad), INVALID)
        for bad in ("name==", "name=x", "labels.b/c==3", "name==a ,kind==b", "==x", "~")
    ],
    Row("D11", "a bad filter among good ones, on an empty store", (), names("name==a", "name=="), INVALID),

    # What containerd's metadata layer and unpacker rely on.
    Row("C72", "keys of containerd's making", (prepare("default/1/extract-123-ab_- sha256:00"),
        commit("default/2/sha256:00", "default/1/extract-123-ab_- sha256:00")), names('name=="default/2/sha256:00"'),
        lambda found: found == ["default/2/sha256:00"]),
    Row("C93", "a layer that is not there is prepared", (), both(prepare("key", "", {REF: "sha256:1"}), stat("key")),
        lambda found: labelled(**{REF: "sha256:1"})(found[1])),
    Row("C93", "a layer that is there under its name", (committed("sha256:1"),), prepare("key", "", {REF: "sha256:1"}),
        TAKEN),
    Row("C94", "a layer that is there under its label", (*BASE, committed("any", "base", {REF: "sha256:1"})),
        prepare("key", "base", {REF: "sha256:1"}), TAKEN),
    Row("C94", "nothing is created for it", (committed("any", "", {REF: "sha256:1"}),
        failing(prepare("key", "", {REF: "sha256:1"}))), stat("key"), MISSING),
    Row("C94", "it is found by label and parent", (*BASE, committed("any", "base", {REF: "sha256:1"})),
        names(f'labels."{REF}"=="sha256:1",parent==base'), lambda found: found == ["any"]),
    Row("C95", "a layer on another parent is not it", (*BASE, committed("any", "", {REF: "sha256:1"})),
        prepare("key", "base", {REF: "sha256:1"}), bool),
    Row("C98", "what is prepared is not read-only", BASE, both(prepare("key", "base"), prepare("other")),
        lambda found: not any("ro" in answer[-1].options for answer in found)),
    Row("C138", "no snapshotter named", (), lambda client: client.call("Stat", key="key", snapshotter=""), INVALID),
    *[
        Row("C138", f"{method} of an unknown snapshotter", (), lambda client, method=method:
            client.call(method, snapshotter="nobody's"), Fails(StatusCode.INVALID_ARGUMENT, "nobody's"))
        for method in ("Prepare", "View", "Mounts", "Commit", "Remove", "Stat", "Update", "List", "Usage", "Cleanup")
    ],
    Row("C138", "the name behind a prefix", (prepare("key"),), lambda client:
        client.call("Stat", key="key", snapshotter=f"snapbroker-{client.snapshotter}").info.name,
        lambda name: name == "key"),
]  # fmt: skip


def applying() -> list[Any]:
    """Every snapshotter with each row that is about it."""
    return [
        pytest.param(name, row, id=f"{name}-{row.line}-{row.what}", marks=marks(name))
        for name in SNAPSHOTTERS
        for row in ROWS
        if name not in row.never and (not row.only or name in row.only)
    ]


def each(*snapshotters: str) -> pytest.MarkDecorator:
    """A test on these alone."""
    return pytest.mark.parametrize(
        "running", [pytest.param(name, marks=marks(name)) for name in snapshotters], indirect=True
    )


@pytest.mark.parametrize(("running", "row"), applying(), indirect=["running"])
def test_a_line_of_the_contract(client: Client, row: Row) -> None:
    for call in row.given:
        call(client)
    if isinstance(row.then, Fails):
        with pytest.raises(grpc.RpcError) as caught:
            row.when(client)
        assert (caught.value.code(), row.then.words in caught.value.details()) == (row.then.code, True), caught.value
    else:
        answer = row.when(client)
        assert row.then(answer), answer


def test_a_page_is_a_stream_of_blocks(client: Client) -> None:
    """C139: blocks of 100."""
    wanted = sorted(f"key-{number}" for number in range(250))
    for key in wanted:
        client.view(key)
    blocks = client.blocks()
    assert [len(block.info) for block in blocks] == [100, 100, 50]
    assert [info.name for block in blocks for info in block.info] == wanted


def test_a_message_may_be_long_in_both_directions(client: Client) -> None:
    """C139: beyond gRPC's own 4 MiB; a block of a list ends before it gets too long for containerd."""
    labels = {f"label-{number}": "v" * 4000 for number in range(1000)}
    for number in range(6):
        client.prepare(f"key-{number}", "", labels)
    blocks = client.blocks()
    assert len(blocks) == 6
    assert all(dict(info.labels) == labels for block in blocks for info in block.info)
    assert all(block.ByteSize() < 16 << 20 for block in blocks)


def test_a_message_that_is_too_long_is_refused(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.prepare("key", "", {"label": "v" * (17 << 20)})
    assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
    assert client.names() == []


def test_garbage_is_refused_and_harms_nobody(client: Client) -> None:
    for garbage in (b"\xff", b"\x12\x05ab", b"\x12\x02\xff\xfe", bytes(range(256))):
        with pytest.raises(grpc.RpcError) as caught:
            client.raw("/containerd.services.snapshots.v1.Snapshots/Prepare", garbage)
        assert caught.value.code() == StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as caught:
        client.raw("/containerd.services.snapshots.v1.Snapshots/Explode", b"")
    assert caught.value.code() == StatusCode.UNIMPLEMENTED
    assert client.names() == []


def test_the_longest_message_of_an_error_arrives(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.stat("鍵" * 1300)
    assert caught.value.code() == StatusCode.NOT_FOUND
    assert caught.value.details().startswith("snapshot '鍵鍵")
    assert caught.value.details().endswith("...")


def test_calls_of_many_callers_at_once(client: Client) -> None:
    """C141: one connection carries them all; every one has its own outcome."""
    begun = [client.begin("Prepare", key=f"key-{number % 50}") for number in range(100)]
    outcomes = [call.exception() for call in begun]
    assert sum(outcome is None for outcome in outcomes) == 50
    assert all(outcome.code() == StatusCode.ALREADY_EXISTS for outcome in outcomes if outcome)
    assert len(client.names()) == 50


@each("overlayfs", "native", "btrfs")
def test_content(client: Client) -> None:
    """C19, C22, C23, C36: mounts can be used at once, a view is read-only, children see what was committed."""
    with mounting.mounted(client.prepare("key")) as path:
        assert path.stat().st_mode & 0o7777 == 0o755
        (path / "file").write_text("content")
    client.commit("name", "key")
    assert client.usage("name").inodes == 2
    with mounting.mounted(client.prepare("child", "name")) as path:
        assert (path / "file").read_text() == "content"
        (path / "file").unlink()
    with mounting.mounted(client.view("view", "name")) as path:
        assert (path / "file").read_text() == "content"
        with pytest.raises(OSError, match="Read-only"):
            (path / "other").touch()
