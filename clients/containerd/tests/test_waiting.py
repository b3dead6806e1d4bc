"""While broker or snapshotter is away calls wait, no longer than they may, and none is done twice or said to be."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from bridges import REPLY_S, Bridge, Client
from grpc import StatusCode

from snapbroker.contract import Info, Kind
from snapbroker.errors import BrokerError, ResourceExhausted
from snapbroker_containerd import service
from snapbroker_containerd.api import snapshots_pb2 as api
from snapbroker_containerd.status import Refusal
from tests.daemon import support
from tests.harness import Daemon


def answering(*outcomes: Any) -> Callable[..., Awaitable[Any]]:
    """A call that has these outcomes, one after the other, the last one again and again."""
    left = list(outcomes)

    async def call(*_: Any, **__: Any) -> Any:
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(outcome, BrokerError):
            raise outcome
        return outcome

    return call


# A broker that is full.


def service_of(*outcomes: Any, wait_ms: int = 20_000) -> service.Service:
    """The calls, before a snapshotter whose stat has these outcomes."""
    view = SimpleNamespace(stat=answering(*outcomes))
    targets = SimpleNamespace(get=lambda _name: view, forget=lambda _name, _error: False)
    return service.Service(targets, service.Limits(wait_ms=wait_ms))  # type: ignore[arg-type]


FULL = ResourceExhausted("full", {"retry_after_ms": 2})
REQUEST = api.StatSnapshotRequest(snapshotter="s", key="key").SerializeToString()


async def test_a_call_comes_again_when_a_full_broker_says() -> None:
    calls = service_of(FULL, FULL, Info("key", Kind.ACTIVE, "", {}, 1, 1))
    answer = api.StatSnapshotResponse.FromString(await calls.stat(REQUEST))
    assert answer.info.name == "key"
    assert calls.returned == 2


@pytest.mark.parametrize(
    ("error", "wait_ms"),
    [(ResourceExhausted("no room", {"retry_after_ms": 1000}), 500), (ResourceExhausted("the disk is full"), 20_000)],
)
async def test_a_call_does_not_come_again_later_than_it_may_nor_in_vain(error: BrokerError, wait_ms: int) -> None:
    calls = service_of(error, wait_ms=wait_ms)
    with pytest.raises(Refusal) as caught:
        await calls.stat(REQUEST)
    assert caught.value.status is StatusCode.RESOURCE_EXHAUSTED
    assert calls.returned == 0


# With a broker that goes and comes back.


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A broker of the test's own."""
    daemon = Daemon({"memory": {}, "native": {}})
    try:
        yield daemon
        if daemon.process is not None:
            daemon.stop()
    finally:
        daemon.remove()


@pytest.fixture
def bridge(daemon: Daemon) -> Iterator[Bridge]:
    """Before a broker that does not run yet."""
    with Bridge(daemon.place, daemon.endpoint, log_format="json", calls={"wait_ms": 20_000}) as bridge:
        yield bridge


@pytest.mark.root
def test_a_broker_that_is_not_there_yet_is_waited_for(daemon: Daemon, bridge: Bridge) -> None:
    with bridge.client("native") as client:
        call = client.begin("Prepare", key="key")
        daemon.start()
        assert call.result(REPLY_S).mounts
        assert client.names() == ["key"]


def test_a_broker_that_does_not_come_is_not_waited_for_any_longer(daemon: Daemon, tmp_path: Path) -> None:
    """C141: the call fails; nothing has to be started anew when the broker is there at last."""
    place = daemon.place / "short"
    place.mkdir()
    with Bridge(place, daemon.endpoint, calls={"wait_ms": 300}) as bridge, bridge.client("memory") as client:
        begun = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            client.stat("key")
        assert caught.value.code() == StatusCode.UNAVAILABLE
        assert "start snapbrokerd" in caught.value.details()
        assert time.monotonic() - begun < 1 + support.UNHURT_S
        daemon.start()
        assert client.names() == []


@pytest.mark.root
@pytest.mark.parametrize("victim", ["broker", "snapshotter"])
def test_nothing_is_lost_or_done_twice_when_it_is_killed_under_load(
    daemon: Daemon, bridge: Bridge, victim: str
) -> None:
    """Every call does well, and the journal has each change exactly once."""
    daemon.start()
    halt = threading.Event()
    callers = [Caller(bridge, f"caller-{number}", halt) for number in range(16)]
    for caller in callers:
        caller.start()
    for _ in range(2):
        before = sum(caller.rounds for caller in callers)
        support.wait_until(
            lambda before=before: (
                sum(caller.rounds for caller in callers) > before + 50 or any(caller.error for caller in callers)
            ),
            "calls under load",
        )
        if victim == "broker":
            daemon.kill()
            daemon.start()
        else:
            daemon.kill(actor="native")
    halt.set()
    for caller in callers:
        caller.join(REPLY_S)
        assert not caller.is_alive()
        if caller.error is not None:
            raise caller.error
    with daemon.client("native", "containerd") as broker:
        assert list(broker.walk()) == []
        seen = [(event.verb, event.key) for event in broker.events(0, follow=False)]
    wanted = [
        change
        for caller in callers
        for number in range(caller.rounds)
        for change in (
            ("prepare", f"{caller.name}-{number}"),
            ("commit", f"{caller.name}-{number}"),
            ("remove", f"{caller.name}-{number}-committed"),
        )
    ]
    assert sorted(seen) == sorted(wanted)


class Caller(threading.Thread):
    """Prepares, commits and removes, one after the other, and takes no error."""

    def __init__(self, bridge: Bridge, name: str, halt: threading.Event) -> None:
        super().__init__(name=name)
        self.rounds = 0
        self.error: BaseException | None = None
        self._bridge = bridge
        self._halt = halt

    def run(self) -> None:
        """Go on until told to stop."""
        try:
            with self._bridge.client("native") as client:
                while not self._halt.is_set():
                    self._round(client, f"{self.name}-{self.rounds}")
                    self.rounds += 1
        except BaseException as error:
            self.error = error

    @staticmethod
    def _round(client: Client, key: str) -> None:
        assert client.prepare(key)
        client.commit(f"{key}-committed", key)
        client.remove(f"{key}-committed")
