"""Where the scenario plays: a broker, a driver and a recorder of every language, and what they must have said alike."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Self

from snapbroker.blocking import Broker
from tests.conformance.languages import LANGUAGES
from tests.conformance.normal import Normal
from tests.conformance.programs import ANSWER_S, Driver, Line, Recorder
from tests.conformance.relay import Relay
from tests.harness import Daemon

END: Final = "conformance-end"
"""The snapshot that ends a namespace for the recorders."""
ASIDE: Final = "aside"
"""The snapshotter that may be stopped, and whose journal keeps few events."""
ASIDE_EVENTS: Final = 20
FULL: Final = "full"
"""The snapshotter whose reserve is larger than any disk."""
QUEUE: Final = 200
"""How many events the publisher keeps for a slow subscriber."""

Told = Line | Callable[[Driver], Line]
"""A step, or one that depends on whose it is; `<namespace>` in it becomes the driver's."""


def settings(snapshotter: str) -> dict[str, Any]:
    """The broker's snapshotters and limits, for a scenario on a backend."""
    return {
        "snapshotters": {
            "main": {"backend": snapshotter},
            ASIDE: {"backend": "memory", "limits": {"journal": {"events_max": ASIDE_EVENTS}}},
            FULL: {"backend": "overlayfs", "limits": {"space": {"reserve_bytes": 1 << 46, "ballast_bytes": 0}}},
        },
        "publisher": {"send_queue_max": QUEUE, "heartbeat_ms": 200},
    }


class Stage:
    """The broker and one driver of each language, which do everything in step."""

    def __init__(self, snapshotter: str) -> None:
        self._undo = contextlib.ExitStack()
        self._numbers = itertools.count(1)
        self.daemon = Daemon(**settings(snapshotter))
        self.drivers: list[Driver] = []
        self.relays: list[Relay] = []
        self._normals: list[Normal] = []
        self._snapshotter = "main"

    def __enter__(self) -> Self:
        try:
            self._undo.enter_context(self.daemon)
            for language in LANGUAGES:
                relay = Relay(self.daemon.place / f"{language.name}.sock", self.daemon.runtime / "router.sock")
                self.relays.append(self._undo.enter_context(relay))
                place = {
                    "SNAPBROKER_ENDPOINT": relay.endpoint,
                    "SNAPBROKER_EVENTS_ENDPOINT": self.daemon.events_endpoint,
                    "SNAPBROKER_NAMESPACE": f"conf-{language.name}",
                    "SNAPBROKER_SNAPSHOTTER": "main",
                }
                self.drivers.append(self._undo.enter_context(Driver(language, place)))
                self._normals.append(Normal(f"conf-{language.name}", str(self.daemon.root)))
            for driver in self.drivers:
                driver.wait_ready()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    @property
    def namespaces(self) -> list[str]:
        """Those of the drivers."""
        return [driver.namespace for driver in self.drivers]

    # Drivers.

    def do(self, step: Told) -> Any:
        """Have every driver do a step; answers what all of them say came of it, what is their own made relative."""
        self.tell(step)
        return self.answers(step)

    def tell(self, step: Told) -> None:
        """Have every driver begin a step."""
        for driver in self.drivers:
            told = step(driver) if callable(step) else step
            self._snapshotter = told.get("snapshotter", "main")
            driver.tell(_filled(told, driver.namespace))

    def answers(self, step: Told) -> Any:
        """What all drivers say came of the step that they were told."""
        raw = [driver.answer() for driver in self.drivers]
        pairs = zip(self._normals, raw, strict=True)
        said = [normal.outcome(outcome, self._snapshotter) for normal, outcome in pairs]
        for driver, other in zip(self.drivers[1:], said[1:], strict=True):
            assert other == said[0], (
                f"{driver.name} and {self.drivers[0].name} differ after {_short(step)}:\n{_difference(other, said[0])}"
            )
        return said[0]

    def ok(self, step: Told) -> Any:
        """Have every driver do a step that must succeed; answers the answer."""
        outcome = self.do(step)
        assert "ok" in outcome, f"{_short(step)}: {_short(outcome)}"
        return outcome["ok"]

    def refused(self, step: Told, code: str, *, in_doubt: bool = False, **details: Any) -> None:
        """Have every driver do a step that must fail with this code, these details and this doubt."""
        expected = {"error": {"code": code, "details": details, "in_doubt": in_doubt}}
        outcome = self.do(step)
        assert outcome == expected, f"{_short(step)}: {_short(outcome)}"

    def lose_reply(self, step: Told) -> Any:
        """Have every driver do a step whose reply is lost after the broker has done it; answers what came of it."""
        # The connection is there, so that what is lost is the reply and not a handshake.
        self.ok({"do": "status"})
        before = [relay.cuts for relay in self.relays]
        for relay in self.relays:
            relay.cut_next_reply()
        outcome = self.do(step)
        assert [relay.cuts for relay in self.relays] == [cuts + 1 for cuts in before], "no reply was lost"
        return outcome

    def ok_though_lost(self, step: Told) -> Any:
        """The answer of a step that must succeed though its reply is lost."""
        outcome = self.lose_reply(step)
        assert "ok" in outcome, f"{_short(step)}: {_short(outcome)}"
        return outcome["ok"]

    def kill_in_the_midst(self, step: Told, sizes: Sequence[int]) -> Any:
        """Have every driver do a long step, and kill the broker under it, each time after so many bytes of replies."""
        for relay in self.relays:
            relay.freeze_after(sizes[0])
        self.tell(step)
        for following in (*sizes[1:], None):
            for driver, relay in zip(self.drivers, self.relays, strict=True):
                assert relay.wait_frozen(ANSWER_S), f"{driver.name} does not work on; {driver.told()}"
            self.daemon.kill()
            for relay in self.relays:
                relay.thaw()
                if following is not None:
                    relay.freeze_after(following)
            self.daemon.start()
        return self.answers(step)

    def finish(self) -> None:
        """No more steps: the drivers end."""
        for driver in self.drivers:
            driver.finish()
            assert len(driver.lines) == driver.steps + 1, driver.lines[-1]

    # Recorders.

    def recorders(self, namespaces: Sequence[str], snapshotter: str = "main") -> list[Recorder]:
        """One recorder of every language, all ready."""
        place = {
            "SNAPBROKER_ENDPOINT": self.daemon.endpoint,
            "SNAPBROKER_EVENTS_ENDPOINT": self.daemon.events_endpoint,
            "SNAPBROKER_NAMESPACE": namespaces[0],
            "SNAPBROKER_SNAPSHOTTER": snapshotter,
        }
        made = [self._undo.enter_context(Recorder(language, place, namespaces)) for language in LANGUAGES]
        for recorder in made:
            recorder.wait_ready()
        return made

    # What is there, as the harness sees it.

    def broker(self, namespace: str, snapshotter: str = "main") -> Broker:
        """A client of the harness's own, by which it looks after the others; closed with the stage."""
        client = self.daemon.client(snapshotter, namespace, patience=ANSWER_S, timeout=ANSWER_S)
        return self._undo.enter_context(client)


def _filled(value: Any, namespace: str) -> Any:
    match value:
        case str():
            return value.replace("<namespace>", namespace)
        case dict():
            return {key: _filled(each, namespace) for key, each in value.items()}
        case list() | tuple():
            return [_filled(each, namespace) for each in value]
    return value


def _short(value: object) -> str:
    return str(value)[:600]


def _difference(one: Any, other: Any, where: str = "") -> str:
    """The first place where two values differ, and what is there."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs: Iterator[tuple[Any, Any, Any]] = ((key, one[key], other[key]) for key in one)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = ((number, *pair) for number, pair in enumerate(zip(one, other, strict=True)))
    else:
        return f"at {where or 'the top'}: {_short(json.dumps(one))}\nand: {_short(json.dumps(other))}"
    return next((_difference(a, b, f"{where}.{key}") for key, a, b in pairs if a != b), "")


def replayed(lines: Sequence[Mapping[str, Any]], infos: Sequence[Mapping[str, Any]] = ()) -> list[Mapping[str, Any]]:
    """What is there after events, by name, where `infos` were before: the rules of RFC 2, section 6."""
    there = {info["name"]: info for info in infos}
    for event in lines:
        if event["verb"] in ("remove", "commit"):
            there.pop(event["key"], None)
        if event["info"] is not None:
            there[event["info"]["name"]] = event["info"]
    return [there[name] for name in sorted(there, key=str.encode)]
