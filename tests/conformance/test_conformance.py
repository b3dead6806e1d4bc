"""One scenario: every language's client drives it, every language's subscriber records it, and all say the same."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest

from snapbroker.contract import Event, Info
from tests.conformance import scenario
from tests.conformance.languages import LANGUAGES
from tests.conformance.programs import Line, Recorder
from tests.conformance.stage import ASIDE, END, Stage, replayed

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def _programs() -> None:
    for language in LANGUAGES:
        language.make()


def test_all_languages_say_the_same_of_overlayfs() -> None:
    """Recorders are there from the beginning, and are stopped; others start late."""
    with Stage("overlayfs") as stage:
        early = stage.recorders(stage.namespaces)
        play(stage, early)
        late = stage.recorders(stage.namespaces)
        finish(stage, (*early, *late))
        for namespace in stage.namespaces:
            journal, infos = journal_of(stage, namespace), infos_of(stage, namespace)
            check_once(journal)
            for recorder in early:
                check_complete(recorder, namespace, journal, infos)
            for recorder in late:
                check_suffix(recorder, namespace, journal, infos)
        for recorder in early:
            assert any(line["gaps"] for line in recorder.lines if "gaps" in line), f"{recorder.name} missed nothing"


def test_all_languages_say_the_same_of_native() -> None:
    """Besides, recorders of another snapshotter are stopped until its journal no longer has what they missed."""
    with Stage("native") as stage:
        early = stage.recorders(stage.namespaces)
        overtaken = stage.recorders(["red", "blue"], ASIDE)
        play(stage, early)
        overtake(stage, overtaken)
        finish(stage, (*early, *overtaken))
        for namespace in stage.namespaces:
            journal, infos = journal_of(stage, namespace), infos_of(stage, namespace)
            check_once(journal)
            for recorder in early:
                check_complete(recorder, namespace, journal, infos)
        for recorder in overtaken:
            for namespace in ("red", "blue"):
                states = check_segments(recorder, namespace, infos_of(stage, namespace, ASIDE))
                assert states > 1 or namespace == "blue", f"{recorder.name} never walked again"


def play(stage: Stage, recorders: Sequence[Recorder]) -> None:
    """The scenario, with the recorders stopped before its last chapter and continued after it."""
    scenario.verbs(stage)
    scenario.names(stage)
    scenario.events(stage)
    scenario.batches(stage)
    scenario.together(stage)
    scenario.walks(stage)
    scenario.deadlines(stage)
    scenario.lost_replies(stage)
    scenario.killed(stage)
    with stopped(recorders):
        scenario.burst(stage)


def overtake(stage: Stage, recorders: Sequence[Recorder]) -> None:
    """Out of range is answered by a walk, and the mirror is right again."""
    red, blue = stage.broker("red", ASIDE), stage.broker("blue", ASIDE)
    for broker in (red, blue):
        broker.prepare("before")
    for recorder in recorders:
        recorder.wait_for(lambda lines: sum("event" in line for line in lines) == 2, "events before the stop")
    with stopped(recorders), red.batch() as batch:
        batch.remove("before")
        for number in range(600):
            batch.prepare(f"missed-{number}", labels={"l": "x" * 4000})
    for broker in (blue, red):
        broker.prepare(END)


@contextlib.contextmanager
def stopped(recorders: Sequence[Recorder]) -> Iterator[None]:
    """All of them are held up for the length of the block."""
    with contextlib.ExitStack() as stops:
        for recorder in recorders:
            stops.enter_context(recorder.stopped())
        yield


def finish(stage: Stage, recorders: Sequence[Recorder]) -> None:
    """The last word to the recorders, and the good end of every program."""
    stage.ok({"do": "prepare", "key": END})
    stage.finish()
    for recorder in recorders:
        recorder.finish()
        recorder.check_lines()


# What the recorders wrote, against the journal and a walk.


def journal_of(stage: Stage, namespace: str) -> list[Line]:
    """The journal of a namespace, as a recorder writes events."""
    return [event_line(event) for event in stage.broker(namespace).events(0, follow=False)]


def infos_of(stage: Stage, namespace: str, snapshotter: str = "main") -> list[Line]:
    """What is there, as a recorder writes infos."""
    return [as_line(info) for info in stage.broker(namespace, snapshotter).walk()]


def as_line(info: Info) -> Line:
    return dict(msgspec.to_builtins(msgspec.structs.asdict(info)))


def event_line(event: Event) -> Line:
    info = None if event.info is None else as_line(event.info)
    return {**msgspec.structs.asdict(event), "info": info, "topic": event.topic}


def check_once(journal: Sequence[Line]) -> None:
    """Each call of the churn, and each whose reply was lost, has one event."""
    events = Counter((event["verb"], event["key"]) for event in journal)
    expected = scenario.churn_events()
    assert {each: events[each] for each in events if each[1].startswith("churn-")} == dict(expected)
    lost = {each: count for each, count in events.items() if each[1].startswith("lost")}
    assert lost == {
        ("prepare", "lost"): 1, ("view", "lost-view"): 1, ("update", "lost"): 1, ("commit", "lost"): 1,
        ("prepare", "lost-2"): 1, ("remove", "lost-view"): 1, ("remove", "lost-2"): 1, ("remove", "lost-made"): 1,
    }  # fmt: skip


def check_complete(recorder: Recorder, namespace: str, journal: Sequence[Line], infos: Sequence[Line]) -> None:
    """From an empty namespace on it wrote exactly what the journal has, and ended with what is there."""
    first, *events, last = recorder.transcript(namespace)
    assert first == {"namespace": namespace, "state": [], "sequence": 0}, recorder.name
    check_events(recorder, events, journal)
    assert last["mirror"] == infos, recorder.name


def check_suffix(recorder: Recorder, namespace: str, journal: Sequence[Line], infos: Sequence[Line]) -> None:
    """It began with what was there, and wrote what the journal has above that."""
    first, *events, last = recorder.transcript(namespace)
    before = [event for event in journal if event["sequence"] <= first["sequence"]]
    assert first["state"] == replayed(before), recorder.name
    check_events(recorder, events, journal[len(before) :])
    assert last["mirror"] == infos, recorder.name


def check_events(recorder: Recorder, lines: Sequence[Line], journal: Sequence[Line]) -> None:
    written = [line["event"] for line in lines]
    for number, (one, other) in enumerate(zip(written, journal, strict=False)):
        assert one == other, f"{recorder.name} differs from the journal at its event {number}"
    assert len(written) == len(journal), recorder.name


def check_segments(recorder: Recorder, namespace: str, infos: Sequence[Line]) -> int:
    """Each walk and the events above it lead to what is there at the end; answers the number of walks."""
    *lines, last = recorder.transcript(namespace)
    assert "state" in lines[0]
    states = 0
    mirror: list[Any] = []
    sequence = 0
    for line in lines:
        if "state" in line:
            assert line["sequence"] >= sequence
            states, mirror, sequence = states + 1, line["state"], line["sequence"]
        else:
            assert line["event"]["sequence"] > sequence
            mirror = replayed([line["event"]], mirror)
            sequence = line["event"]["sequence"]
    assert last["mirror"] == infos == mirror, recorder.name
    return states
