"""The scenario, chapter by chapter: what every driver is told, and what must come of it."""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import Any, Final

from snapbroker.contract import LABEL_BYTES_MAX, LABELS_MAX, NAME_BYTES_MAX
from snapbroker.protocol import BODY_BYTES_MAX, CALLS_MAX, PAGE_MAX
from tests.conformance.stage import ASIDE, FULL, Stage

TIME: Final = "<time>"
PATIENT: Final = {"do": "open", "patience_ms": 90_000, "connect_timeout_ms": 90_000, "timeout_ms": 90_000}
"""A connection that outlives a restart on a busy machine."""
FAR_NAMES: Final = (
    "é/牛/😀/\"\\", "e\u0301", "\u00e9", "\ufeffbom", "\u2028", "\uffff", "\U0010ffff", "tab\tnewline\n", "\x01\x7f",
    " ", "..",
    "-", "labels.x==y,", "<&>",
)  # fmt: skip
SNAPSHOTTERS: Final = sorted(("main", ASIDE, FULL))
NO_SPACE: Final = {"free_bytes": ..., "free_inodes": ...}
CHURN: Final = 150
FROZEN_BYTES: Final = (6_000, 6_000)
"""After so many bytes of replies the broker is killed: about thirty prepares."""


def info(name: str, kind: str, parent: str = "", labels: dict[str, str] | None = None) -> dict[str, Any]:
    """An info as it is after normalising."""
    return {"name": name, "kind": kind, "parent": parent, "labels": labels or {}, "created": TIME, "updated": TIME}


def make_base(stage: Stage, name: str = "base") -> None:
    """A committed snapshot."""
    stage.ok({"do": "prepare", "key": f"{name}-making"})
    stage.ok({"do": "commit", "name": name, "key": f"{name}-making"})


def verbs(stage: Stage) -> None:
    """Every verb, and every way in which it is refused."""
    assert stage.ok({"do": "status"}) == {"snapshotters": SNAPSHOTTERS}
    assert stage.ok({"do": "walk"}) == {"infos": [], "sequence": 0}
    prepared = stage.ok({"do": "prepare", "key": "work", "labels": {"team": "build", "empty": ""}})
    assert prepared["fence"] == "<fence 1>"
    assert stage.ok({"do": "mounts", "key": "work"}) == prepared
    assert stage.ok({"do": "stat", "key": "work"}) == info("work", "active", "", {"team": "build"})
    assert stage.ok({"do": "usage", "key": "work"}).keys() == {"inodes", "size"}
    assert stage.ok({"do": "commit", "name": "base", "key": "work", "labels": {"a": "1"}, "sync": True}) == {}
    assert stage.ok({"do": "stat", "key": "base"}) == info("base", "committed", "", {"a": "1"})
    viewed = stage.ok({"do": "view", "key": "look", "parent": "base", "labels": {"v": "w"}})
    assert stage.ok({"do": "mounts", "key": "look"}) == viewed
    assert stage.ok({"do": "usage", "key": "look"}) == {"inodes": 0, "size": 0}
    update = {"do": "update", "name": "base", "labels": {"b": "2", "c": "3"}}
    assert stage.ok(update) == info("base", "committed", "", {"b": "2", "c": "3"})
    one = {"do": "update", "name": "base", "labels": {"d": "4"}, "fieldpaths": ["labels.d", "labels.b"]}
    assert stage.ok(one) == info("base", "committed", "", {"c": "3", "d": "4"})
    assert stage.ok({"do": "walk"})["infos"] == [
        info("base", "committed", "", {"c": "3", "d": "4"}),
        info("look", "view", "base", {"v": "w"}),
    ]
    stage.ok({"do": "remove", "key": "look"})
    assert stage.ok({"do": "cleanup"}) == {}
    refusals(stage)
    fences(stage)


def refusals(stage: Stage) -> None:
    """What is refused, with its code and details; nothing is changed by it."""
    stage.ok({"do": "prepare", "key": "active", "parent": "base"})
    stage.ok({"do": "view", "key": "view", "parent": "base"})
    before = stage.ok({"do": "walk"})["infos"]
    for step, code, details in (
        ({"do": "stat", "key": "missing"}, "not_found", {}),
        ({"do": "mounts", "key": "missing"}, "not_found", {}),
        ({"do": "usage", "key": "missing"}, "not_found", {}),
        ({"do": "remove", "key": "missing"}, "not_found", {}),
        ({"do": "update", "name": "missing"}, "not_found", {}),
        ({"do": "commit", "name": "n", "key": "missing"}, "not_found", {}),
        ({"do": "prepare", "key": "k", "parent": "missing"}, "not_found", {}),
        ({"do": "view", "key": "k", "parent": "missing"}, "not_found", {}),
        ({"do": "prepare", "key": "k", "parent": "active"}, "invalid_argument", {}),
        ({"do": "view", "key": "k", "parent": "view"}, "invalid_argument", {}),
        ({"do": "prepare", "key": "active", "parent": "base"}, "already_exists", {}),
        ({"do": "prepare", "key": "base"}, "already_exists", {}),
        ({"do": "view", "key": "active"}, "already_exists", {}),
        ({"do": "commit", "name": "base", "key": "active"}, "already_exists", {}),
        ({"do": "commit", "name": "active", "key": "active"}, "already_exists", {}),
        ({"do": "commit", "name": "n", "key": "view"}, "failed_precondition", {}),
        ({"do": "commit", "name": "n", "key": "base"}, "failed_precondition", {}),
        ({"do": "commit", "name": "n", "key": "active", "parent": "n"}, "invalid_argument", {}),
        ({"do": "commit", "name": "n", "key": "active", "parent": "other"}, "invalid_argument", {}),
        ({"do": "remove", "key": "base"}, "failed_precondition", {}),
        ({"do": "mounts", "key": "base"}, "failed_precondition", {}),
        ({"do": "update", "name": "base", "labels": {"x": "y"}, "fieldpaths": ["name"]}, "invalid_argument", {}),
        ({"do": "update", "name": "base", "fieldpaths": ["labels."]}, "invalid_argument", {}),
        ({"do": "prepare", "key": ""}, "invalid_argument", {}),
        ({"do": "prepare", "key": "a\0b"}, "invalid_argument", {}),
        ({"do": "stat", "key": "é" * (NAME_BYTES_MAX // 2) + "x"}, "invalid_argument", {}),
        ({"do": "prepare", "key": "k", "labels": {"": "x"}}, "invalid_argument", {}),
        ({"do": "prepare", "key": "k", "labels": {"x": "y" * LABEL_BYTES_MAX}}, "invalid_argument", {}),
        ({"do": "update", "name": "base", "labels": dict.fromkeys(map(str, range(1025)), "x")}, "invalid_argument", {}),
        ({"do": "walk", "filters": ["name=x"]}, "invalid_argument", {"filter": 0, "position": 4, "expected": ...}),
        ({"do": "walk", "filters": ["name", "é"]}, "invalid_argument", {"filter": 1, "position": 0, "expected": ...}),
        ({"do": "walk", "page": 0}, "invalid_argument", {}),
        ({"do": "walk", "page": PAGE_MAX + 1}, "invalid_argument", {}),
        ({"do": "stat", "key": "base", "snapshotter": "nobody"}, "not_found", {"snapshotters": SNAPSHOTTERS}),
        ({"do": "stat", "key": "base", "namespace": "elsewhere"}, "not_found", {}),
        ({"do": "stat", "key": "base", "namespace": "a/b"}, "invalid_argument", {}),
        ({"do": "events", "since": 1 << 62}, "out_of_range", {"oldest": "<sequence>", "newest": "<sequence>"}),
        ({"do": "prepare", "key": "k", "snapshotter": FULL}, "resource_exhausted", NO_SPACE),
    ):  # fmt: skip
        _refused(stage, step, code, details)
    assert stage.ok({"do": "walk"})["infos"] == before
    for key in ("active", "view"):
        stage.ok({"do": "remove", "key": key})


def _refused(stage: Stage, step: dict[str, Any], code: str, details: dict[str, Any]) -> None:
    """Refused with this code; a detail `...` is there, whatever its value."""
    outcome = stage.do(step)
    error = outcome.get("error", {})
    assert (error.get("code"), error.get("in_doubt")) == (code, False), f"{str(step)[:300]}: {str(outcome)[:300]}"
    assert error["details"].keys() == details.keys(), f"{str(step)[:300]}: {error}"
    for name, value in details.items():
        assert value in (..., error["details"][name]), f"{str(step)[:300]}: {error}"


def fences(stage: Stage) -> None:
    """A fence of a snapshot that had the key before is refused, with that of the one that has it."""
    fences: dict[str, list[int]] = {driver.namespace: [] for driver in stage.drivers}
    for _ in range(2):
        stage.ok({"do": "prepare", "key": "fenced", "parent": "base"})
        for driver in stage.drivers:
            fences[driver.namespace].append(driver.lines[-1]["ok"]["fence"])
        if len(fences[driver.namespace]) == 1:
            stage.ok(lambda driver: {"do": "remove", "key": "fenced", "fence": fences[driver.namespace][0]})
    assert all(first < second for first, second in fences.values())
    mounts = stage.ok({"do": "mounts", "key": "fenced"})

    def stale(step: dict[str, Any]) -> None:
        stage.refused(
            lambda driver: {**step, "fence": fences[driver.namespace][0]}, "failed_precondition", fence=mounts["fence"]
        )

    stale({"do": "mounts", "key": "fenced"})
    stale({"do": "commit", "name": "n", "key": "fenced"})
    stale({"do": "remove", "key": "fenced"})
    assert stage.ok(lambda driver: {"do": "mounts", "key": "fenced", "fence": fences[driver.namespace][1]}) == mounts
    stage.ok(lambda driver: {"do": "commit", "name": "n", "key": "fenced", "fence": fences[driver.namespace][1]})
    stage.ok({"do": "remove", "key": "n"})


def names(stage: Stage) -> None:
    """Names and labels from far away, and of every length."""
    longest = ("k" * NAME_BYTES_MAX, "é" * (NAME_BYTES_MAX // 2), "😀" * (NAME_BYTES_MAX // 4))
    for name in (*FAR_NAMES, *longest):
        labels = {"l": name} if name not in longest else {}
        stage.ok({"do": "prepare", "key": name, "parent": "base", "labels": labels})
        assert stage.ok({"do": "stat", "key": name}) == info(name, "active", "base", labels)
    walked = [each["name"] for each in stage.ok({"do": "walk", "filters": ["kind==active"]})["infos"]]
    assert walked == sorted((*FAR_NAMES, *longest), key=str.encode)
    found = stage.ok({"do": "walk", "filters": ['name=="é/牛/😀/\\"\\\\"', "labels.l~=/^<.*>$/"]})["infos"]
    assert [each["name"] for each in found] == ["<&>", 'é/牛/😀/"\\']
    stage.ok({"do": "batch", "calls": [{"do": "remove", "key": name} for name in (*FAR_NAMES, *longest)]})
    far = {
        "": "",
        **{name: name for name in FAR_NAMES},
        "k" * 96: "v" * (LABEL_BYTES_MAX - 96),
        "containerd.io/gc.root": "x",
    }
    del far[""]
    assert stage.ok({"do": "update", "name": "base", "labels": far}) == info("base", "committed", "", far)
    many = {f"label-{number}": "v" for number in range(LABELS_MAX)}
    assert stage.ok({"do": "update", "name": "base", "labels": many}) == info("base", "committed", "", many)
    stage.ok({"do": "update", "name": "base"})


def batches(stage: Stage) -> None:
    """Calls that travel together: independent ones, all or none, and more than one request takes."""
    calls = [
        {"do": "prepare", "key": "b-1", "parent": "base"},
        {"do": "stat", "key": "base"},
        {"do": "remove", "key": "missing"},
        {"do": "view", "key": "b-2", "parent": "base"},
        {"do": "usage", "key": "missing"},
    ]
    results = stage.ok({"do": "batch", "calls": calls})["results"]
    assert [next(iter(result)) for result in results] == ["ok", "ok", "error", "ok", "error"]
    assert results[1] == {"ok": info("base", "committed")}
    assert results[2] == {"error": {"code": "not_found", "details": {}, "in_doubt": False}}
    atomic = [
        {"do": "commit", "name": "b-3", "key": "b-1", "labels": {"x": "y"}},
        {"do": "prepare", "key": "b-4", "parent": "b-3"},
        {"do": "stat", "key": "b-4"},
        {"do": "update", "name": "b-3", "labels": {"z": "1"}, "fieldpaths": ["labels.z"]},
        {"do": "mounts", "key": "b-4"},
    ]
    results = stage.ok({"do": "batch", "atomic": True, "calls": atomic})["results"]
    assert results[2] == {"ok": info("b-4", "active", "b-3")}
    assert results[3] == {"ok": info("b-3", "committed", "base", {"x": "y", "z": "1"})}
    assert results[4] == results[1]
    failing = [{"do": "remove", "key": "b-4"}, {"do": "stat", "key": "b-4"}, {"do": "remove", "key": "b-2"}]
    results = stage.ok({"do": "batch", "atomic": True, "calls": failing})["results"]
    assert [result["error"]["code"] for result in results] == ["cancelled", "not_found", "cancelled"]
    assert [each["name"] for each in stage.ok({"do": "walk"})["infos"]] == ["b-2", "b-3", "b-4", "base"]
    for key in ("b-4", "b-3", "b-2"):
        stage.ok({"do": "remove", "key": key})
    too_many = {"do": "batch", "calls": [{"do": "prepare", "key": f"b-{number}"} for number in range(CALLS_MAX + 1)]}
    stage.refused(too_many, "invalid_argument")
    most = {**too_many, "calls": too_many["calls"][:CALLS_MAX], "snapshotter": ASIDE}
    assert all("ok" in result for result in stage.ok(most)["results"])


def together(stage: Stage) -> None:
    """Calls of many callers at the same moment: more than one request takes, of number and of bytes."""
    calls = [{"do": "stat", "key": f"b-{number}"} for number in range(2500)]
    results = stage.ok({"do": "together", "calls": calls, "snapshotter": ASIDE})["results"]
    assert Counter(next(iter(result)) for result in results) == {"ok": CALLS_MAX, "error": 2500 - CALLS_MAX}
    assert results[7] == {"ok": info("b-7", "active")}
    large(stage)


def large(stage: Stage) -> None:
    """Calls of more bytes than a request takes, and one alone that is too long for any."""
    labels = {f"label-{number}": "v" * 4000 for number in range(250)}
    calls = [{"do": "prepare", "key": f"large-{number}", "labels": labels} for number in range(20)]
    assert sum(len(str(call)) for call in calls) > BODY_BYTES_MAX
    results = stage.ok({"do": "together", "calls": calls, "snapshotter": ASIDE})["results"]
    assert all("ok" in result for result in results)
    stage.refused({"do": "batch", "atomic": True, "calls": calls, "snapshotter": ASIDE}, "invalid_argument")
    found = stage.ok({"do": "walk", "filters": ["name~=/^large-/"], "page": 3, "snapshotter": ASIDE})["infos"]
    assert [len(each["labels"]) for each in found] == [250] * 20


def walks(stage: Stage) -> None:
    """A thousand snapshots, in pages of many sizes, all and some."""
    calls = [{"do": "prepare", "key": f"w-{number:04}", "labels": {"odd": str(number % 2)}} for number in range(1000)]
    results = stage.ok({"do": "together", "calls": calls})["results"]
    assert all("ok" in result for result in results)
    expected = [info("base", "committed"), *(info(call["key"], "active", "", call["labels"]) for call in calls)]
    for page in (None, 7, 1000):
        step = {"do": "walk"} if page is None else {"do": "walk", "page": page}
        assert stage.ok(step)["infos"] == expected
    odd = stage.ok({"do": "walk", "filters": ["labels.odd==1", "kind==committed"], "page": 100})["infos"]
    assert odd == [each for each in expected if each["labels"].get("odd") != "0"]
    both = stage.ok({"do": "walk", "filters": ["labels.odd!=1,name~=/-0[0-9]{2}[2-4]$/"]})["infos"]
    assert [each["name"] for each in both] == [f"w-{n:04}" for n in range(1000) if n % 10 in (2, 4)]
    assert stage.ok({"do": "walk", "filters": ["bogus"]})["infos"] == []
    results = stage.ok({"do": "together", "calls": [{"do": "remove", "key": call["key"]} for call in calls]})["results"]
    assert results == [{"ok": {}}] * 1000


def events(stage: Stage) -> None:
    """The journal by topics, and followed: of changes made one after the other, so that all have the same order."""
    everything = stage.ok({"do": "events", "since": 0})["events"]
    assert [event["verb"] for event in everything[:4]] == ["prepare", "commit", "view", "update"]
    commits = stage.ok({"do": "events", "since": 0, "topics": ["main/<namespace>/snapshot/commit"]})["events"]
    assert len(commits) == sum(event["verb"] == "commit" for event in everything)
    assert commits[0]["topic"] == "main/<namespace>/snapshot/commit"
    assert commits[0]["info"] == info("base", "committed", "", {"a": "1"})
    two = {"topics": ["main/<namespace>/snapshot/view", "main/<namespace>/snapshot/cleanup"]}
    assert {event["verb"] for event in stage.ok({"do": "events", "since": 0, **two})["events"]} == {"view", "cleanup"}
    assert len(stage.ok({"do": "events", "since": 0, "count": 5})["events"]) == 5
    _refused(stage, {"do": "events", "since": 0, "topics": ["elsewhere/"]}, "invalid_argument", {})


def deadlines(stage: Stage) -> None:
    """A snapshotter that does not answer in time, and a broker that is not there."""
    stage.ok({"do": "prepare", "key": "slow", "snapshotter": ASIDE})
    pid = stage.daemon.actor(ASIDE).pid
    os.kill(pid, signal.SIGSTOP)
    try:
        stage.refused({"do": "stat", "key": "slow", "snapshotter": ASIDE, "timeout_ms": 300}, "deadline_exceeded")
        late = {"do": "prepare", "key": "late", "snapshotter": ASIDE, "timeout_ms": 300}
        stage.refused(late, "deadline_exceeded", in_doubt=True)
    finally:
        os.kill(pid, signal.SIGCONT)
    stage.refused({"do": "stat", "key": "late", "snapshotter": ASIDE}, "not_found")
    nowhere = f"ipc://{stage.daemon.place}/nobody.sock"
    stage.ok({"do": "open", "endpoint": nowhere, "connect_timeout_ms": 200, "patience_ms": 0})
    stage.refused({"do": "prepare", "key": "k"}, "unavailable")
    stage.ok({"do": "open", "endpoint": nowhere, "connect_timeout_ms": 200, "patience_ms": 300})
    stage.refused({"do": "stat", "key": "k"}, "unavailable")


def lost_replies(stage: Stage) -> None:
    """Each change whose reply is lost is told by its repeat, and happens once; without patience it is in doubt."""
    stage.ok(PATIENT)
    prepared = stage.ok_though_lost({"do": "prepare", "key": "lost", "parent": "base"})
    assert stage.ok({"do": "mounts", "key": "lost"}) == prepared
    assert stage.ok_though_lost({"do": "view", "key": "lost-view", "parent": "base"})["fence"]
    assert stage.ok_though_lost({"do": "update", "name": "lost", "labels": {"n": "1"}})["labels"] == {"n": "1"}
    assert stage.lose_reply({"do": "commit", "name": "lost-made", "key": "lost"}) == {"ok": {}}
    assert stage.ok_though_lost({"do": "stat", "key": "lost-made"}) == info("lost-made", "committed", "base")
    atomic = [{"do": "prepare", "key": "lost-2", "parent": "lost-made"}, {"do": "remove", "key": "lost-view"}]
    results = stage.ok_though_lost({"do": "batch", "atomic": True, "calls": atomic})["results"]
    assert [next(iter(result)) for result in results] == ["ok", "ok"]
    taken = stage.lose_reply({"do": "prepare", "key": "lost-2", "parent": "base"})
    assert taken == {"error": {"code": "already_exists", "details": {}, "in_doubt": False}}
    assert stage.lose_reply({"do": "remove", "key": "lost-2"}) == {"ok": {}}
    assert stage.lose_reply({"do": "remove", "key": "lost-made"}) == {"ok": {}}
    assert [each["name"] for each in stage.ok_though_lost({"do": "walk"})["infos"]] == ["base"]
    stage.ok({"do": "open", "patience_ms": 0})
    stage.ok({"do": "status"})
    doubtful = stage.lose_reply({"do": "prepare", "key": "doubtful"})
    assert doubtful == {"error": {"code": "unavailable", "details": {}, "in_doubt": True}}
    assert stage.lose_reply({"do": "stat", "key": "base"})["error"] == {
        "code": "unavailable", "details": {}, "in_doubt": False,
    }  # fmt: skip
    stage.ok(PATIENT)
    stage.ok({"do": "remove", "key": "doubtful"})


def killed(stage: Stage) -> None:
    """A run of changes with the broker killed twice in its midst: each takes effect once."""
    step = {"do": "churn", "prefix": "churn", "parent": "base", "count": CHURN, "callers": 8}
    outcome = stage.kill_in_the_midst(step, FROZEN_BYTES)
    assert outcome == {"ok": {"calls": 2 * CHURN + CHURN // 3}}
    expected = [info("base", "committed"), *_churned()]
    assert stage.ok({"do": "walk"})["infos"] == sorted(expected, key=lambda each: str(each["name"]).encode())


def _churned() -> list[dict[str, Any]]:
    return [info(f"churn-{number}-made", "committed", "base") for number in range(1, CHURN, 3)]


def churn_events() -> Counter[tuple[str, str]]:
    """Verb and key of each event of a churn."""
    found: Counter[tuple[str, str]] = Counter()
    for number in range(CHURN):
        key = f"churn-{number}"
        found["prepare", key] += 1
        found["remove" if number % 3 == 0 else "commit", key] += 1
        if number % 3 == 2:
            found["remove", f"{key}-made"] += 1
    return found


def burst(stage: Stage) -> None:
    """More than the publisher keeps for a subscriber that is stopped, and its socket besides."""
    calls = [{"do": "prepare", "key": f"burst-{n}", "labels": {"l": "x" * 4000}} for n in range(400)]
    assert all("ok" in result for result in stage.ok({"do": "together", "calls": calls})["results"])
