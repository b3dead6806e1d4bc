"""Events: what each verb tells, the journal and the walk that agree with it, live streams, filters and heartbeats."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import pytest
import zmq

from snapbroker.blocking import Broker
from snapbroker.contract import EVENT_VERBS, Event, Info
from snapbroker.errors import BrokerError, NotFound, OutOfRange
from snapbroker.protocol import (
    BODY_BYTES_MAX,
    DONE,
    EVENT_VERSION,
    Cancel,
    Cleanup,
    Commit,
    Events,
    EventsPage,
    Heartbeat,
    Prepare,
    Remove,
    Update,
    View,
    Walk,
    decode_event,
    decode_heartbeat,
    decode_reply,
    heartbeat_topic,
)
from tests.harness import REPLY_S, Daemon, Wire
from tests.oracle import check_chains, replay

StartDaemon = Callable[..., Daemon]


def live_a_little(broker: Broker) -> None:
    """Every verb, on every kind."""
    broker.prepare("one", labels={"a": "b"})
    broker.commit("base", "one", labels={"layer": "1"})
    broker.prepare("two", "base")
    broker.view("look", "base", {"c": "d"})
    broker.update("base", {"x": "y"}, ["labels.x"])
    broker.commit("top", "two", sync=True)
    broker.prepare("two", "top")
    broker.update("two", {"again": "yes"})
    broker.view("bare")
    broker.remove("bare")
    broker.remove("look")
    broker.cleanup()
    broker.prepare("three")


def events_of(wire: Wire, since: int = 0, *topics: str, page: int = 1000) -> list[Event]:
    """The journal above `since`."""
    events: list[Event] = []
    while True:
        pages = wire.pages(Events(since=since, topics=topics, page=page))
        events += [event for answer in pages for event in answer.events]
        since = pages[-1].next
        if since >= pages[-1].newest:
            return events


def walked(wire: Wire, page: int = 1000) -> tuple[dict[str, Info], int]:
    """All infos by name, and the first page's sequence."""
    pages = wire.pages(Walk(page=page, credit=1024))
    assert not pages[-1].next
    return {info.name: info for answer in pages for info in answer.infos}, pages[0].sequence


class TestJournal:
    """What is kept."""

    def test_what_each_verb_tells(self, broker: Broker, wire: Wire, snapshotter: str) -> None:
        """D7, C80."""
        begin = time.time_ns()
        told: list[tuple[str, str, Info | None]] = []
        broker.prepare("job", labels={"a": "b"})
        told.append(("prepare", "job", broker.stat("job")))
        broker.commit("base", "job", labels={"c": "d"})
        told.append(("commit", "job", broker.stat("base")))
        broker.view("look", "base")
        told.append(("view", "look", broker.stat("look")))
        told.append(("update", "base", broker.update("base", {"e": "f"})))
        broker.remove("look")
        told.append(("remove", "look", None))
        broker.cleanup()
        told.append(("cleanup", "", None))
        events = events_of(wire)
        assert [(event.verb, event.key, event.info) for event in events] == told
        assert [event.verb for event in events] == ["prepare", "commit", "view", "update", "remove", "cleanup"]
        for event in events:
            assert event.snapshotter == snapshotter
            assert event.namespace == broker.namespace
            assert event.topic == f"{snapshotter}/{broker.namespace}/snapshot/{event.verb}"
            assert begin <= event.time <= time.time_ns()
            if event.info is not None:
                assert event.info.updated == event.time

    def test_replayed_it_is_the_state(self, broker: Broker, wire: Wire) -> None:
        live_a_little(broker)
        events = events_of(wire)
        state, sequence = walked(wire)
        assert replay(events) == state == {info.name: info for info in broker.walk()}
        assert sequence == events[-1].sequence
        check_chains(events)

    def test_the_whole_journal_has_no_gap(self, broker: Broker, wire: Wire, snapshotter: str) -> None:
        live_a_little(broker)
        events = events_of(wire, 0, f"{snapshotter}/")
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        check_chains(events)

    @pytest.mark.parametrize("page", [1, 2, 5, 12, 13])
    def test_pages(self, broker: Broker, wire: Wire, page: int) -> None:
        live_a_little(broker)
        whole = events_of(wire)
        assert events_of(wire, page=page) == whole
        for since in (whole[0].sequence, whole[5].sequence, whole[-1].sequence):
            assert events_of(wire, since, page=page) == [event for event in whole if event.sequence > since]

    def test_credit(self, broker: Broker, wire: Wire) -> None:
        live_a_little(broker)
        whole = events_of(wire)
        pages = wire.pages(Events(since=whole[0].sequence - 1, page=2, credit=3))
        assert [event for page in pages for event in page.events] == whole[:6]
        assert pages[-1].next == whole[5].sequence
        assert pages[-1].newest >= whole[-1].sequence

    @pytest.mark.parametrize("verb", EVENT_VERBS)
    def test_one_topic(self, broker: Broker, wire: Wire, snapshotter: str, verb: str) -> None:
        live_a_little(broker)
        expected = [event for event in events_of(wire) if event.verb == verb]
        assert expected
        assert events_of(wire, 0, f"{snapshotter}/{broker.namespace}/snapshot/{verb}") == expected

    def test_several_topics(self, daemon: Daemon, broker: Broker, wire: Wire, snapshotter: str) -> None:
        live_a_little(broker)
        with daemon.client(snapshotter, f"{broker.namespace}-2") as other:
            live_a_little(other)
        own, others = f"{snapshotter}/{broker.namespace}/", f"{snapshotter}/{broker.namespace}-2/snapshot/"
        assert events_of(wire, 0, own) == events_of(wire)
        both = events_of(wire, 0, own, f"{others}view", f"{others}commit")
        assert [event.sequence for event in both] == sorted({event.sequence for event in both})
        assert {(event.namespace, event.verb) for event in both} == {
            *((broker.namespace, verb) for verb in EVENT_VERBS),
            (f"{broker.namespace}-2", "view"),
            (f"{broker.namespace}-2", "commit"),
        }
        assert events_of(wire, 0, "nobody/") == []
        assert events_of(wire, 0, f"{own}snapshot/bogus") == []

    def test_what_failed_left_no_event(self, broker: Broker, wire: Wire) -> None:
        live_a_little(broker)
        before = events_of(wire)
        for result in wire.call(Prepare(key="base"), Remove(key="base"), Commit(name="x", key="y"), Update(name="z")):
            assert isinstance(result, BrokerError)
        assert events_of(wire) == before

    @pytest.mark.parametrize("snapshotter", ["memory"])
    def test_large_events_make_short_pages(self, wire: Wire) -> None:
        """A page is no longer than a body may be, however much its events tell."""
        labels = {f"label-{number}": "v" * 4000 for number in range(1000)}
        for number in range(6):
            wire.one(View(key=f"look-{number}", labels=labels))
        request_id = wire.send(Events(since=0))
        sizes = []
        while True:
            _, answered, status, body = wire.receive_frames()
            assert answered == request_id
            sizes.append(len(body))
            if status == DONE:
                break
        assert max(sizes) <= BODY_BYTES_MAX
        assert len(events_of(wire)) == 6

    def test_it_goes_on_after_a_restart(self, start_daemon: StartDaemon) -> None:
        daemon = start_daemon({"native": {}})
        with daemon.client("native") as broker:
            live_a_little(broker)
        with daemon.wire("native") as wire:
            before, state = events_of(wire), walked(wire)
        daemon.restart()
        with daemon.wire("native") as wire, daemon.client("native") as broker:
            assert events_of(wire) == before
            assert walked(wire) == state
            broker.prepare("after")
            events = events_of(wire)
            assert events[:-1] == before
            assert events[-1].sequence == before[-1].sequence + 1
            check_chains(events)


class TestRetention:
    """What is no longer kept."""

    KEPT = 40

    @pytest.fixture(scope="class")
    @classmethod
    def small(cls) -> Iterator[Wire]:
        """A journal of 40 events in which 200 came."""
        sections = {"memory": {"limits": {"journal": {"events_max": cls.KEPT}}}}
        with Daemon(sections) as daemon, daemon.wire("memory") as wire:
            for number in range(100):
                wire.one(Prepare(key=f"job-{number}"))
                wire.one(Update(name=f"job-{number}", labels={"a": "b"}))
            yield wire

    def test_too_old(self, small: Wire) -> None:
        for since in (0, 1, 100, 200 - self.KEPT - 1):
            with pytest.raises(OutOfRange, match="walk") as raised:
                small.one(Events(since=since))
            assert raised.value.details == {"oldest": 200 - self.KEPT + 1, "newest": 200}

    def test_not_yet_too_old(self, small: Wire) -> None:
        for since in (200 - self.KEPT, 180, 199, 200):
            events = events_of(small, since)
            assert [event.sequence for event in events] == list(range(since + 1, 201))

    def test_in_the_future(self, small: Wire) -> None:
        with pytest.raises(OutOfRange, match="walk"):
            small.one(Events(since=201))

    def test_the_chain_leads_through_what_is_gone(self, small: Wire) -> None:
        events = events_of(small, 200 - self.KEPT)
        assert {event.previous for event in events} == {event.sequence - 2 for event in events}

    def test_a_walk_goes_on_where_the_journal_begins_later(self, small: Wire) -> None:
        state, sequence = walked(small)
        assert len(state) == 100
        assert events_of(small, sequence) == []

    def test_the_client_says_so(self, start_daemon: StartDaemon) -> None:
        daemon = start_daemon({"memory": {"limits": {"journal": {"events_max": 5}}}})
        with daemon.client("memory") as broker:
            for number in range(100):
                broker.prepare(f"job-{number}")
            with pytest.raises(OutOfRange, match="walk again"), broker.events(since=0, follow=False) as events:
                next(events)


class TestStateAndStream:
    """A walk and the events above its sequence make a later walk (the pattern of every mirror)."""

    @pytest.mark.parametrize("page", [1000, 3])
    def test_with_writers_at_work(
        self, daemon: Daemon, wire: Wire, snapshotter: str, namespace: str, page: int
    ) -> None:
        for number in range(20):
            wire.one(View(key=f"steady-{number:02}"))
        with Writers(daemon, snapshotter, namespace, 3) as writers:
            pictures = []
            for _ in range(3):
                writers.wait_for(10)
                pictures.append(walked(wire, page))
            writers.wait_for(10)
        final, newest = walked(wire)
        for state, sequence in pictures:
            assert sequence < newest
            assert replay(events_of(wire, sequence), state) == final
        events = events_of(wire)
        assert replay(events) == final
        check_chains(events)


class Writers:
    """Threads that change what they can, until the end of the block."""

    def __init__(self, daemon: Daemon, snapshotter: str, namespace: str, count: int) -> None:
        self._daemon = daemon
        self._snapshotter = snapshotter
        self._namespace = namespace
        self._over = threading.Event()
        self._done = threading.Semaphore(0)
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        try:
            with self._daemon.wire(self._snapshotter, self._namespace) as wire:
                for step in itertools.count():
                    if self._over.is_set():
                        return
                    results = wire.call(self._change(rng, number, step))
                    if not isinstance(results[0], BrokerError):
                        self._done.release()
                    else:
                        assert results[0].code in ("not_found", "already_exists", "failed_precondition")
        except BaseException as error:
            self._failures.append(error)
            self._done.release(1000)

    @staticmethod
    def _change(rng: random.Random, number: int, step: int) -> Any:
        key = f"job-{rng.randrange(6)}"
        return rng.choice(
            [
                Prepare(key=key, parent=rng.choice(["", f"layer-{rng.randrange(6)}"])),
                View(key=key, labels={"by": str(number)}),
                Commit(name=f"layer-{rng.randrange(6)}", key=key),
                Remove(key=rng.choice([key, f"layer-{rng.randrange(6)}"])),
                Update(name=key, labels={"step": str(step)}),
            ]
        )

    def wait_for(self, changes: int) -> None:
        """Until so many changes succeeded from here on."""
        while self._done.acquire(blocking=False):
            pass
        for _ in range(changes):
            assert self._done.acquire(timeout=REPLY_S)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        assert self._failures == []


class TestFollow:
    """A stream of events that waits for more."""

    def test_events_come_as_they_happen(self, daemon: Daemon, broker: Broker, wire: Wire) -> None:
        broker.prepare("before")
        _, newest = walked(wire)
        call = Events(since=newest, follow=True, credit=3)
        with daemon.wire(wire.snapshotter, wire.namespace) as follower:
            request_id = follower.send(call)
            parts = follower.parts(request_id, [call])
            seen: list[Event] = []
            for change in ("one", "two", "three"):
                broker.prepare(change)
                _, page = next(parts)
                assert isinstance(page, EventsPage)
                assert [event.key for event in page.events] == [change]
                seen += page.events
            assert list(parts) == []
        assert seen == events_of(wire, newest)

    def test_what_was_there_comes_first(self, broker: Broker, wire: Wire) -> None:
        live_a_little(broker)
        whole = events_of(wire)
        pages = wire.pages(Events(since=whole[0].sequence - 1, follow=True, page=5, credit=3))
        assert [event for page in pages for event in page.events] == whole

    def test_it_ends_with_its_deadline(self, broker: Broker, wire: Wire) -> None:
        broker.prepare("job")
        _, newest = walked(wire)
        begin = time.monotonic()
        (page,) = wire.pages(Events(since=newest, follow=True), timeout_ms=200)
        assert page == EventsPage(next=newest, newest=newest)
        assert 0.15 < time.monotonic() - begin < 5

    def test_other_topics_do_not_use_the_credit(self, daemon: Daemon, broker: Broker, wire: Wire) -> None:
        _, newest = walked(wire)
        call = Events(
            since=newest, topics=(f"{wire.snapshotter}/{wire.namespace}/snapshot/remove",), follow=True, credit=2
        )
        with daemon.wire(wire.snapshotter, wire.namespace) as follower:
            parts = follower.parts(follower.send(call), [call])
            for number in range(5):
                broker.prepare(f"job-{number}")
            broker.remove("job-0")
            broker.remove("job-1")
            removed = [event.key for _, page in parts for event in page.events]  # type: ignore[union-attr]
        assert removed == ["job-0", "job-1"]

    def test_it_can_be_taken_back(self, daemon: Daemon, wire: Wire) -> None:
        _, newest = walked(wire)
        following = wire.send(Events(since=newest, follow=True), request_id=b"following")
        with daemon.wire(wire.snapshotter, wire.namespace) as other, pytest.raises(NotFound):
            # Another client has no business with it.
            other.one(Cancel(request=following))
        wire.send(Cancel(request=following), request_id=b"cancel")
        # Either reply may come first.
        replies = {frames[1]: frames[2:] for frames in (wire.receive_frames(), wire.receive_frames())}
        assert replies.keys() == {b"following", b"cancel"}
        assert {status for status, _ in replies.values()} == {DONE}
        (taken_back,) = decode_reply(replies[b"following"][1]).outcomes
        assert taken_back.error is not None
        assert taken_back.error.code == "cancelled"

    def test_the_client_follows(self, broker: Broker) -> None:
        broker.prepare("before")
        with broker.events() as events:
            live_a_little(broker)
            broker.remove("before")
            seen = list(itertools.islice(events, 14))
        assert [event.verb for event in seen][-1] == "remove"
        with broker.events(since=seen[0].sequence - 1, follow=False) as journal:
            assert list(journal) == seen


class Subscriber:
    """A plain SUB socket, as any language has one."""

    def __init__(self, daemon: Daemon, *prefixes: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.linger = 0
        for prefix in prefixes:
            self._socket.subscribe(prefix)
        self._socket.connect(daemon.events_endpoint)

    def next(self) -> tuple[str, int, bytes]:
        """Topic, sequence and body of the next publication."""
        assert self._socket.poll(round(REPLY_S * 1000)), "nothing was published"
        topic, version, sequence, body = self._socket.recv_multipart()
        assert version == EVENT_VERSION
        return topic.decode(), int.from_bytes(sequence), body

    def next_heartbeat(self) -> Heartbeat:
        """The next heartbeat, whatever comes before it; with the first one the subscription is known to be there."""
        while True:
            topic, sequence, body = self.next()
            if topic.endswith("//heartbeat"):
                beat = decode_heartbeat(body)
                assert beat.sequence == sequence
                return beat

    def until(self, sequence: int) -> list[Event]:
        """The events up to that sequence, or to the heartbeat that says that it has passed."""
        events: list[Event] = []
        while True:
            topic, number, body = self.next()
            if topic.endswith("//heartbeat"):
                if number >= sequence:
                    return events
                continue
            event = decode_event(body)
            assert (event.topic, event.sequence) == (topic, number)
            events.append(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._context.term()


class TestPublished:
    """What is broadcast."""

    @pytest.fixture(scope="class")
    @classmethod
    def lively(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
        """A daemon whose heartbeats come often."""
        with Daemon({"memory": {}, "second": {"backend": "memory"}}, publisher={"heartbeat_ms": 50}) as daemon:
            yield daemon

    def test_the_same_as_in_the_journal(self, lively: Daemon, namespace: str) -> None:
        with Subscriber(lively, "memory/") as subscriber:
            subscriber.next_heartbeat()
            with lively.client("memory", namespace) as broker, lively.wire("memory", namespace) as wire:
                _, before = walked(wire)
                live_a_little(broker)
                journal = events_of(wire)
                assert subscriber.until(journal[-1].sequence) == journal
                assert journal[0].sequence == before + 1

    def test_a_subscription_is_a_prefix(self, lively: Daemon, namespace: str) -> None:
        prefixes = (
            f"memory/{namespace}/snapshot/commit",
            f"memory/{namespace}/snapshot/remove",
            heartbeat_topic("memory"),
        )
        with Subscriber(lively, *prefixes) as subscriber:
            subscriber.next_heartbeat()
            with lively.client("memory", namespace) as broker, lively.wire("memory", namespace) as wire:
                live_a_little(broker)
                journal = events_of(wire)
            expected = [event for event in journal if event.verb in ("commit", "remove")]
            assert subscriber.until(journal[-1].sequence) == expected

    def test_snapshotters_have_journals_of_their_own(self, lively: Daemon, namespace: str) -> None:
        with Subscriber(lively, "second/") as subscriber:
            subscriber.next_heartbeat()
            with lively.client("memory", namespace) as memory, lively.client("second", namespace) as second:
                memory.prepare("job")
                second.prepare("job")
            with lively.wire("second", namespace) as wire:
                journal = events_of(wire)
            assert subscriber.until(journal[-1].sequence) == journal
            assert [event.snapshotter for event in journal] == ["second"]

    def test_heartbeats_are_a_chain(self, lively: Daemon, namespace: str) -> None:
        with (
            Subscriber(lively, heartbeat_topic("memory")) as subscriber,
            lively.client("memory", namespace) as broker,
            lively.wire("memory", namespace) as wire,
        ):
            first = subscriber.next_heartbeat()
            live_a_little(broker)
            _, newest = walked(wire)
            beats = [first]
            while beats[-1].sequence < newest:
                beats.append(subscriber.next_heartbeat())
            beats.append(subscriber.next_heartbeat())
            events = {event.sequence: event for event in events_of(wire)}
        assert beats[-1].sequence == beats[-1].previous == newest
        for before, beat in itertools.pairwise(beats):
            assert beat.previous == before.sequence
            assert beat.time >= before.time
            told = [events[sequence] for sequence in range(beat.previous + 1, beat.sequence + 1)]
            assert beat.topics == {event.topic: event.sequence for event in told}

    def test_each_snapshotter_has_heartbeats(self, lively: Daemon) -> None:
        for name in ("memory", "second"):
            with Subscriber(lively, heartbeat_topic(name)) as subscriber:
                status = lively.actor(name)
                assert subscriber.next_heartbeat().sequence >= status.sequence


def test_cleanup_without_anything_to_clean_is_an_event_too(wire: Wire) -> None:
    wire.one(Cleanup())
    wire.one(Cleanup())
    events = events_of(wire)
    assert [event.verb for event in events] == ["cleanup", "cleanup"]
    check_chains(events)
