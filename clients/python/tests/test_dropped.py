"""A connection that nobody closed must not hold up the program: neither when it is collected nor at the exit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_broker import FakeBroker

from snapbroker.contract import Info, Kind

LIMIT_SECONDS = 20

BLOCKING = """
import contextlib, gc, sys, threading, zmq
import snapbroker
from snapbroker.errors import Unavailable

kept = []

def use(endpoint):
    broker = snapbroker.connect(endpoint, snapshotter="overlayfs", timeout=10, connect_timeout=0.05)
    walk = broker.walk(page=1)
    cycle = [broker, walk]
    cycle.append(cycle)
    with contextlib.suppress(Unavailable):
        next(walk)
        cycle.append(broker.events(0))
        next(cycle[-1])
    return cycle

for _ in range(5):
    cycle = use(sys.argv[1])
    if sys.argv[2] != "collected":
        kept.append(cycle)
    del cycle
if sys.argv[2] == "thread":
    waiting = threading.Event()

    def follow():
        broker = kept[0][0]
        waiting.set()
        with contextlib.suppress(Unavailable):
            for _ in broker.events(0):
                pass

    threading.Thread(target=follow, daemon=True).start()
    waiting.wait()
gc.collect()
print("open sockets:", sum(isinstance(each, zmq.Socket) and not each.closed for each in gc.get_objects()))
"""

ASYNCIO = """
import asyncio, contextlib, gc, sys
import snapbroker.aio, zmq
from snapbroker.errors import Unavailable

kept = []

async def use(endpoint):
    manager = snapbroker.aio.connect(endpoint, snapshotter="overlayfs", timeout=10, connect_timeout=0.05)
    broker = await manager.__aenter__()
    walk = broker.walk(page=1)
    cycle = [manager, broker, walk]
    cycle.append(cycle)
    with contextlib.suppress(Unavailable):
        await anext(walk)
        cycle.append(broker.events(0))
        await anext(cycle[-1])
    return cycle

for _ in range(5):
    loop = asyncio.new_event_loop()
    cycle = loop.run_until_complete(use(sys.argv[1]))
    loop.close()
    if sys.argv[2] != "collected":
        kept.append(cycle)
    del cycle, loop
gc.collect()
print("open sockets:", sum(isinstance(each, zmq.Socket) and not each.closed for each in gc.get_objects()))
"""


def dropped(code: str, endpoint: str, how: str) -> tuple[int, str]:
    """How many sockets were open at the end of the program, and what it complained of."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SNAPBROKER_")}
    line = [sys.executable, "-W", "always::ResourceWarning", "-c", code, endpoint, how]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT_SECONDS, env=environment, check=True)
    return int(ended.stdout.removeprefix("open sockets:")), ended.stderr


@pytest.fixture(params=["live", "absent"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path):
    if request.param == "absent":
        yield f"ipc://{tmp_path}/router.sock"
        return
    with FakeBroker(tmp_path) as fake:
        for number in range(5):
            name = f"k{number}"
            fake.snapshots["default", name] = Info(name, Kind.ACTIVE)
            fake.happen(name)
        yield fake.endpoint


@pytest.mark.parametrize("code", [BLOCKING, ASYNCIO], ids=["blocking", "asyncio"])
def test_a_connection_that_is_collected_is_closed_and_reported(code: str, endpoint: str):
    opened, complaints = dropped(code, endpoint, "collected")
    assert opened == 0
    assert complaints.count("ResourceWarning: a connection to ") == 5
    assert "Exception ignored" not in complaints


@pytest.mark.parametrize(
    ("code", "how"),
    [(BLOCKING, "kept"), (BLOCKING, "thread"), (ASYNCIO, "kept")],
    ids=["blocking", "blocking-in-use", "asyncio"],
)
def test_a_program_that_closes_nothing_ends(code: str, how: str, endpoint: str):
    opened, complaints = dropped(code, endpoint, how)
    assert opened >= 5
    assert "Exception ignored" not in complaints
