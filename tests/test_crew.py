"""The crew that builds snapshots in helper processes: its order, its flushes, and what becomes of what fails."""

import errno
import os
import subprocess
import tempfile
import threading
from functools import partial
from pathlib import Path

import pytest

from backends.api import Snapshot, Task
from backends.files import Shelf
from backends.native import Native, NativeOptions
from broker.snapshotter import hands
from broker.snapshotter.crew import BATCH, SMALL_ENTRIES, Crew, Order
from broker.snapshotter.hands import Answer, Place
from snapbroker.contract import Kind
from snapbroker.errors import Cancelled, DeadlineExceeded, Unavailable
from tests.harness import fork_server, loop_filesystem

WAIT_S = 30
SMALL, LARGE = 1, 2
"""Ids of parents."""


class Hands:
    """Stands for the helper processes: each job waits for its turn where the test says so."""

    def __init__(self):
        self.lock = threading.Lock()
        self.came = threading.Condition(self.lock)
        self.jobs = []
        self.gates = {}
        self.failures = {}
        self.closed = False

    def gate(self, *ids):
        """Let jobs with these ids wait; the event lets them go on."""
        gate = threading.Event()
        with self.lock:
            self.gates.update(dict.fromkeys(ids, gate))
        return gate

    def wait_for(self, *ids):
        """Wait until a job with exactly these ids came."""
        with self.came:
            assert self.came.wait_for(lambda: list(ids) in self.jobs, WAIT_S), self.jobs


class Hand:
    def __init__(self, hands):
        self.hands = hands
        self.running = False

    def build(self, snapshots, task):
        ids = [snapshot.id for snapshot in snapshots]
        assert self.running or len(ids) == 1, "only one order waits for a start"
        self.running = True
        with self.hands.came:
            self.hands.jobs.append(ids)
            self.hands.came.notify_all()
            gates = {self.hands.gates[id_] for id_ in ids if id_ in self.hands.gates}
        for gate in gates:
            assert gate.wait(WAIT_S)
        if self.hands.closed:
            raise Cancelled("the actor is stopping")
        answers = []
        for snapshot in snapshots:
            failure = self.hands.failures.get(snapshot.id)
            if isinstance(failure, Exception):
                raise failure
            entries = SMALL_ENTRIES + (snapshot.parents[0] == LARGE)
            answers.append(Answer(entries=entries, errno=failure or 0))
        return answers

    def close(self):
        self.hands.closed = True

    def let_go(self):
        pass

    let_go_if_idle = let_go


class Backend:
    """Stands for the backend in the actor: builds what is alone, and flushes."""

    def __init__(self, hands):
        self.hands = hands
        self.flushes = []
        self.failure: Exception | None = None
        self.gate: threading.Event | None = None
        self.here = []

    def build(self, snapshot, task):
        with self.hands.came:
            self.here.append(snapshot.id)
            self.hands.came.notify_all()
        if self.gate is not None:
            assert self.gate.wait(WAIT_S)
        task.advance(SMALL_ENTRIES + (snapshot.parents[0] == LARGE))

    def flush(self, snapshots):
        self.flushes.append([snapshot.id for snapshot in snapshots])
        if self.failure is not None:
            raise self.failure


class Outcomes(dict):
    """What orders were told, by id."""

    def __init__(self):
        super().__init__()
        self.changed = threading.Condition()

    def tell(self, id_, failure):
        with self.changed:
            assert id_ not in self, "told once"
            self[id_] = failure
            self.changed.notify_all()

    def wait_for(self, *ids):
        with self.changed:
            assert self.changed.wait_for(lambda: set(ids) <= set(self), WAIT_S), dict(self)
        return [self[id_] for id_ in ids]


class Scene:
    def __init__(self, size=3):
        self.hands, self.outcomes = Hands(), Outcomes()
        self.backend = Backend(self.hands)
        self.discarded = []
        self.crew = Crew(self.backend, self.discarded.append, [Hand(self.hands) for _ in range(size)])

    def order(self, id_, parent=SMALL, task=None, check=lambda: None):
        snapshot = Snapshot(id_, Kind.ACTIVE, (parent,))
        self.crew.submit(Order(snapshot, task or Task(), check, partial(self.outcomes.tell, id_)))

    def learn(self):
        """Let both parents be known; nothing is under way afterwards."""
        for parent, id_ in ((SMALL, 1001), (LARGE, 1002)):
            self.order(id_, parent)
            assert self.outcomes.wait_for(id_) == [None]

    def occupy(self, *ids):
        """Let the first of these large copies be built in the actor, and others by hands, until the event is set."""
        gate = self.hands.gate(*ids)
        self.backend.gate = gate
        self.order(ids[0], LARGE)
        with self.hands.came:
            assert self.hands.came.wait_for(lambda: ids[0] in self.backend.here, WAIT_S)
        for id_ in ids[1:]:
            self.order(id_, LARGE)
        return gate


@pytest.fixture
def scene():
    scene = Scene()
    yield scene
    scene.crew.close()
    scene.crew.wait()


class TestOrder:
    def test_a_lone_order_needs_no_other_process_if_it_is_small(self, scene):
        scene.learn()
        assert scene.backend.here == [1001, 1002], "both were begun in the actor"
        assert scene.hands.jobs == [[1002]], "the large one was begun again"
        assert scene.backend.flushes == [[1001], [1002]]

    def test_large_copies_leave_a_hand_to_small_ones(self, scene):
        scene.learn()
        gate = scene.occupy(1, 2, 3, 4)
        scene.order(5)
        assert scene.outcomes.wait_for(5) == [None]
        assert set(scene.outcomes) == {1001, 1002, 5}
        gate.set()
        assert scene.outcomes.wait_for(1, 2, 3, 4) == [None] * 4

    def test_one_hand_serves_large_and_small(self):
        scene = Scene(size=1)
        scene.learn()
        for id_ in range(10):
            scene.order(id_, LARGE if id_ % 2 else SMALL)
        assert scene.outcomes.wait_for(*range(10)) == [None] * 10
        scene.crew.close()
        scene.crew.wait()

    def test_small_copies_are_handed_over_together(self, scene):
        scene.learn()
        gate = scene.occupy(1, 2)
        third = scene.hands.gate(3)
        scene.order(3)
        scene.hands.wait_for(3)
        waiting = range(10, 10 + 4 * BATCH)
        for id_ in waiting:
            scene.order(id_)
        third.set()
        assert scene.outcomes.wait_for(*waiting) == [None] * len(waiting)
        sizes = [len(job) for job in scene.hands.jobs if job[0] in waiting]
        assert sizes[0] == BATCH
        assert max(sizes) == BATCH
        assert [id_ for job in scene.hands.jobs for id_ in job if id_ in waiting] == list(waiting)
        gate.set()

    def test_what_is_not_known_to_be_small_goes_alone(self, scene):
        gate = scene.hands.gate(2, 3)
        scene.backend.gate = gate
        for id_ in range(1, 7):
            scene.order(id_)
        gate.set()
        assert scene.outcomes.wait_for(*range(1, 7)) == [None] * 6
        assert all(len(job) == 1 for job in scene.hands.jobs)


class TestFlush:
    def test_what_is_built_meanwhile_is_flushed_together(self, scene):
        scene.learn()
        gate = scene.occupy(1, 2)
        third = scene.hands.gate(3)
        scene.order(3)
        scene.hands.wait_for(3)
        for id_ in range(10, 18):
            scene.order(id_)
        later = scene.hands.gate(14)
        third.set()
        scene.outcomes.wait_for(3, 10, 11, 12, 13)
        assert scene.backend.flushes[2:] == [[3, 10, 11, 12, 13]], "more than what is still under way"
        assert set(scene.outcomes).isdisjoint(range(14, 18))
        later.set()
        assert scene.outcomes.wait_for(*range(14, 18)) == [None] * 4
        gate.set()

    def test_it_does_not_wait_for_large_copies(self, scene):
        scene.learn()
        gate = scene.occupy(1, 2, 4)
        scene.order(3)
        assert scene.outcomes.wait_for(3) == [None]
        gate.set()

    def test_its_failure_is_everybody_s(self, scene):
        scene.learn()
        gate = scene.occupy(1, 2)
        scene.backend.failure = OSError(errno.EIO, "Input/output error")
        third = scene.hands.gate(3)
        for id_ in (3, 4, 5):
            scene.order(id_)
        third.set()
        failures = scene.outcomes.wait_for(3, 4, 5)
        assert all(failure is scene.backend.failure for failure in failures)
        assert sorted(scene.discarded) == [3, 4, 5]
        gate.set()


class TestFailures:
    def test_one_of_a_batch_fails_alone(self, scene):
        scene.learn()
        gate = scene.occupy(1, 2)
        third = scene.hands.gate(3)
        scene.order(3)
        scene.hands.wait_for(3)
        scene.hands.failures[11] = errno.ENOSPC
        for id_ in range(10, 16):
            scene.order(id_)
        third.set()
        outcomes = scene.outcomes.wait_for(*range(10, 16))
        assert [type(outcome) for outcome in outcomes] == [type(None), OSError, *[type(None)] * 4]
        assert outcomes[1].errno == errno.ENOSPC
        assert scene.discarded == [], "a build that fails clears up by itself"
        gate.set()

    def test_a_helper_that_dies_takes_its_batch_along(self, scene):
        scene.learn()
        gate = scene.occupy(1, 2)
        third = scene.hands.gate(3)
        scene.order(3)
        scene.hands.wait_for(3)
        scene.hands.failures[10] = Unavailable("the helper process is gone")
        for id_ in range(10, 16):
            scene.order(id_)
        third.set()
        failures = scene.outcomes.wait_for(10, 11)
        assert all(isinstance(failure, Unavailable) for failure in failures)
        assert scene.discarded == [10, 11]
        assert scene.outcomes.wait_for(*range(12, 16)) == [None] * 4
        gate.set()

    def test_what_is_taken_back_while_it_waits_is_not_begun(self, scene):
        scene.learn()
        gate = scene.occupy(1, 2)
        third = scene.hands.gate(3)
        scene.order(3)
        scene.hands.wait_for(3)
        task = Task()

        def check():
            raise DeadlineExceeded("too late")

        scene.order(10, task=task)
        scene.order(11, check=check)
        task.cancel()
        third.set()
        outcomes = scene.outcomes.wait_for(3, 10, 11)
        assert [type(outcome) for outcome in outcomes] == [type(None), Cancelled, DeadlineExceeded]
        assert [10] not in scene.hands.jobs
        assert scene.discarded == []
        gate.set()

    def test_what_is_taken_back_while_it_is_built_is_discarded(self, scene):
        scene.learn()
        gate = scene.occupy(1)
        built = scene.hands.gate(3)
        task = Task()
        scene.order(3, task=task)
        scene.hands.wait_for(3)
        task.cancel()
        built.set()
        assert isinstance(scene.outcomes.wait_for(3)[0], Cancelled)
        assert scene.discarded == [3]
        gate.set()


class TestStop:
    def test_what_waits_and_what_comes_is_taken_back(self):
        scene = Scene()
        scene.learn()
        gate = scene.occupy(1, 2, 3, 4)
        scene.hands.wait_for(2)
        scene.crew.close()
        assert all(isinstance(outcome, Cancelled) for outcome in scene.outcomes.wait_for(3, 4))
        scene.order(5)
        assert isinstance(scene.outcomes.wait_for(5)[0], Cancelled)
        gate.set()
        scene.crew.wait()
        assert all(isinstance(scene.outcomes[id_], Cancelled) for id_ in (1, 2)), "their hands were ended"
        assert not [thread for thread in threading.enumerate() if thread.name.startswith(("hand-", "flush"))]


@pytest.mark.root
class TestProcesses:
    """With the processes, the backend and the disk that it is for."""

    @pytest.fixture
    def scratch(self):
        with tempfile.TemporaryDirectory(prefix="snapbroker-test-", dir="/var/tmp") as path:
            yield Path(path)

    @pytest.fixture
    def backend(self, scratch):
        backend = Native.open(scratch / "root", NativeOptions())
        yield backend
        backend.close()

    def test_many_copies_of_one_base(self, backend, scratch):
        base = Snapshot(1, Kind.ACTIVE)
        backend.create(base, Task())
        for number in range(10):
            (backend.root / f"snapshots/1/file-{number}").write_bytes(os.urandom(4096))
        lock = os.open(scratch, os.O_RDONLY)
        outcomes = Outcomes()
        place = Place("native, copier", "native", str(backend.root), {})
        with fork_server() as forks:
            crew = Crew(backend, backend.discard, [hands.Hand(place, 10, lock, forks) for _ in range(2)])
            try:
                (backend.root / "snapshots/50").mkdir()
                for id_ in range(2, 100):
                    snapshot = Snapshot(id_, Kind.ACTIVE, (1,) if id_ % 10 else ())
                    crew.submit(Order(snapshot, Task(), lambda: None, partial(outcomes.tell, id_)))
                outcomes.wait_for(*range(2, 100))
            finally:
                crew.close()
                crew.wait()
                os.close(lock)
        assert isinstance(outcomes.pop(50), FileExistsError)
        assert set(outcomes.values()) == {None}
        expected = {path.name: path.read_bytes() for path in (backend.root / "snapshots/1").iterdir()}
        for id_ in set(range(2, 100)) - {50}:
            found = {path.name: path.read_bytes() for path in (backend.root / f"snapshots/{id_}").iterdir()}
            assert found == (expected if id_ % 10 else {})
        assert list(backend.discarded()) == []


@pytest.mark.root
def test_a_hand_that_cannot_open_its_place_says_what_the_disk_says() -> None:
    with fork_server() as forks, loop_filesystem("ext4", 64 << 20) as path:
        Shelf(path / "root").close()
        subprocess.run(["mount", "-o", "remount,ro", path], check=True)
        lock = os.open(path, os.O_RDONLY)
        hand = hands.Hand(Place("overlayfs, pool", "overlayfs", str(path / "root"), {}), 0, lock, forks)
        try:
            for _ in range(2):
                with pytest.raises(OSError, match="Read-only") as refused:
                    hand.stock([1], Task())
                assert refused.value.errno == errno.EROFS
        finally:
            hand.let_go()
            os.close(lock)
