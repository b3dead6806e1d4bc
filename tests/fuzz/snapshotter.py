"""A whole snapshotter in this process: a real one on the memory backend, with its database, threads and loop."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Self

from broker.actor.forks import ForkServerProcess
from broker.server import ACTORS_MODULE
from broker.snapshotter.actor import Setup, SnapshotterActor
from broker.snapshotter.limits import SnapshotterLimits
from broker.snapshotter.reserve import SpaceLimits
from broker.snapshotter.service import ServiceLimits
from broker.store import Retention
from broker.store.records import decode_record
from snapbroker import protocol
from snapbroker.contract import Event, Info
from snapbroker.protocol import DONE, Call, Events, Remove, Request, decode_reply, encode

if TYPE_CHECKING:
    from lmdb import Transaction

NAME: Final = "fuzz"
REPLY_S: Final = 60.0
LIMITS: Final = SnapshotterLimits(
    service=ServiceLimits(follow_max_ms=5, timeout_max_ms=1 << 40),
    journal=Retention(events_max=2000),
    # How full the machine is must not change an answer.
    space=SpaceLimits(reserve_bytes=0, reserve_inodes=0, ballast_bytes=0),
)
DECODERS: Final = {verb: protocol.decoder(answer).decode for verb, answer in protocol.answer_types().items()}
"""What reads the answer of each verb."""


class Snapshotter:
    """A running snapshotter and what it has said; close it, or use it as a context manager."""

    def __init__(self) -> None:
        self._switch_interval_s = sys.getswitchinterval()
        place = tempfile.mkdtemp(prefix="snb-fuzz-")
        self._loop = asyncio.new_event_loop()
        self._parts: dict[bytes, list[tuple[bytes, bytes]]] = defaultdict(list)
        self._done: dict[bytes, asyncio.Future[None]] = {}
        self._number = 0
        self._fork_server = ForkServerProcess(ACTORS_MODULE)
        self.published = 0
        setup = Setup(name=NAME, backend="memory", root=place, metadata=f"{place}/metadata", limits=LIMITS)
        self._loop.run_until_complete(self._start(setup))

    async def _start(self, setup: Setup) -> None:
        ready = self._loop.create_future()
        self._actor = SnapshotterActor(
            setup, self._fork_server.launch(), self._send, self._publish, lambda _client, _request: None, again=False
        )
        self._running = self._loop.create_task(self._actor.run(lambda: ready.set_result(None)))
        await asyncio.wait([ready, self._running], return_when=asyncio.FIRST_COMPLETED)

    def _send(self, client: bytes, request_id: bytes, status: bytes, body: bytes) -> None:
        assert client == b"client"
        self._parts[request_id].append((status, body))
        if status == DONE:
            self._done[request_id].set_result(None)

    def _publish(self, events: Sequence[tuple[str, int, bytes]]) -> None:
        assert [sequence for _, sequence, _ in events] == list(
            range(self.published + 1, self.published + 1 + len(events))
        )
        self.published += len(events)

    def ask(self, bodies: Sequence[bytes]) -> list[list[tuple[bytes, bytes]]]:
        """The parts of the replies to requests that arrive together."""
        return self._loop.run_until_complete(self._ask(bodies))

    async def _ask(self, bodies: Sequence[bytes]) -> list[list[tuple[bytes, bytes]]]:
        ids = []
        service = self._actor.service
        assert service is not None
        for body in bodies:
            self._number += 1
            ids.append(str(self._number % 100).encode())
            self._done[ids[-1]] = self._loop.create_future()
            service.receive(b"client", ids[-1], time.monotonic_ns(), body)
        async with asyncio.timeout(REPLY_S):
            for request_id in ids:
                await self._done[request_id]
        assert not self._running.done(), "the snapshotter ended"
        for request_id in ids:
            del self._done[request_id]
        return [self._parts.pop(request_id) for request_id in ids]

    def one(self, call: Call, namespace: str) -> list[Any]:
        """The answers of one call."""
        (parts,) = self.ask([encode(Request(calls=(call,), namespace=namespace))])
        outcomes = [outcome for _, body in parts for outcome in decode_reply(body).outcomes]
        return [DECODERS[str(call.__struct_config__.tag)](outcome.ok) for outcome in outcomes if outcome.ok]

    def records(self) -> dict[str, dict[str, Info]]:
        """What there is, by namespace and name, as it is stored."""
        found: defaultdict[str, dict[str, Info]] = defaultdict(dict)
        environment = self._actor._environment
        with environment.read() as txn, txn.cursor(db=environment.snapshots) as cursor:
            for key, value in cursor:
                record = decode_record(value)
                info = record.decoded()
                assert info.kind == record.kind
                assert not record.broken
                found[bytes(key).partition(b"\0")[0].decode()][info.name] = info
        return found

    def events(self, since: int) -> list[Event]:
        """The journal of all namespaces."""
        pages = self.one(Events(since=since, topics=(f"{NAME}/",), page=10_000, credit=1024), "default")
        return [event for page in pages for event in page.events]

    def clear(self) -> int:
        """Forget every snapshot and every kept outcome; answers the newest sequence."""
        for namespace, infos in self.records().items():
            left = dict(infos)
            while left:
                parents = {info.parent for info in left.values()}
                leaves = [name for name in left if name not in parents]
                assert leaves, f"a circle: {left}"
                calls: tuple[Call, ...] = tuple(Remove(key=name) for name in leaves[:1024])
                self.ask([encode(Request(calls=calls, namespace=namespace))])
                for call in calls:
                    del left[call.key]  # type: ignore[union-attr]
        environment = self._actor._environment
        environment.write(
            lambda txn: [txn.drop(db, delete=False) for db in (environment.outcomes, environment.outcome_ages)]
        )
        assert not self.records()
        return self.published

    def damage_outcomes(self, value: bytes) -> int:
        """Write over every kept outcome; answers how many."""
        environment = self._actor._environment

        def work(txn: Transaction) -> int:
            with txn.cursor(db=environment.outcomes) as cursor:
                keys = [bytes(key) for key in cursor.iternext(values=False)]
            for key in keys:
                txn.put(key, value, db=environment.outcomes)
            return len(keys)

        return environment.write(work)

    def close(self) -> None:
        """Stop it as a daemon does."""
        self._actor.stop()
        self._loop.run_until_complete(self._running)
        self._loop.run_until_complete(self._fork_server.close())
        self._loop.close()
        sys.setswitchinterval(self._switch_interval_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
