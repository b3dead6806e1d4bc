"""The one thread that writes an actor's database: everything that has arrived goes into one transaction.

A turn: take what waits; decide each operation against one write transaction, its event with it; commit, which is
the pair of flushes that all share; put aside what was removed; hand the outcomes over. While the flush runs the next
operations gather: under load the turns grow by themselves, and a lone caller waits for nobody.

An operation whose backend has to work is held and handed to the workers; when it comes back it is decided again in
a later turn. An atomic operation is decided in a child transaction that is dropped whole when one of its calls
fails or needs work.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import lmdb
import msgspec

from backends.api import Backend, Glance, Snapshot, Task, TooMany
from backends.failpoints import reach
from broker.logs import get_logger
from broker.snapshotter.crew import Order
from broker.snapshotter.errors import error_of
from broker.snapshotter.inbox import Inbox
from broker.snapshotter.operations import Delivery, Labour, Made, Need, Operation, Result
from broker.snapshotter.verbs import Scene, Verbs
from broker.snapshotter.workers import Workers
from broker.store.environment import StoreBroken, StoreFull
from snapbroker.errors import (
    AlreadyExists,
    BrokerError,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from snapbroker.protocol import Commit, Outcome, Prepare, View, encode, fault
from snapbroker.protocol import error_of as error_of_fault

if TYPE_CHECKING:
    from lmdb import Transaction

    from broker.actor.fairness import Mix
    from broker.snapshotter.crew import Crew
    from broker.snapshotter.ids import Ids
    from broker.snapshotter.pool import Pool
    from broker.store import Environment, Journal, Outcomes, Snapshots, Token
    from broker.store.journal import Turn
    from broker.store.outcomes import OutcomeTurn

log = get_logger()


class WriterLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits of the write path."""

    turn_max: int = 1024
    """Most calls in one transaction: bounds the time to its flush."""
    turn_shared_max: int = 64
    """The same while several clients are about: bounds the time that one waits for the others."""
    turn_part_max: int = 16
    """Most of them that are one client's, however many of its calls wait."""
    waiting_max: int = 16_384
    """Most operations that wait for a turn; beyond, calls of whoever has more than its part get resource_exhausted."""
    workers: int = 0
    """Threads for what backends do beside the transactions; 0 is the backend's own choice."""
    working_max: int = 16_384
    """Most operations in the workers' hands, and one client has no more than is free; beyond, resource_exhausted."""


@dataclass(slots=True)
class Errand:
    """Work of the actor itself that needs a transaction, such as a recovery's page."""

    run: Callable[[Transaction, Turn, int], None]
    done: Callable[[BrokerError | None], None] = lambda _error: None


DECIDED: Final = frozenset(
    error.code for error in (NotFound, AlreadyExists, FailedPrecondition, InvalidArgument, Unimplemented)
)
"""Errors that are an answer; the others say that there is none yet."""
WAY_S: Final = 0.002
"""Longest that `give_way` lasts: about a turn's work of a few dozen calls."""
WAY_SHARED_S: Final = 0.0005
"""The same while several clients are about: the others' calls wait for it."""
WAY_AT: Final = 64
"""What the loop takes before it gives way, half a millisecond: a write queued is 1, a read `READ_WEIGHT`."""
READ_WEIGHT: Final = 4
"""What a read that is answered takes of the loop, where a write that is queued takes 1."""
Deliver = Callable[[Delivery], None]
Clock = Callable[[], int]


class Writer:
    """The turns of one actor. `submit` and `errand` from the loop's thread or a worker's; `run` is the thread."""

    def __init__(
        self,
        environment: Environment,
        journal: Journal,
        outcomes: Outcomes,
        snapshots: Snapshots,
        verbs: Verbs,
        ids: Ids,
        pool: Pool | None,
        crew: Crew | None,
        backend: Backend,
        limits: WriterLimits,
        deliver: Deliver,
        mix: Mix,
        clock: Clock = time.time_ns,
    ) -> None:
        self._environment = environment
        self._journal = journal
        self._outcomes = outcomes
        self._snapshots = snapshots
        self._verbs = verbs
        self._ids = ids
        self._pool = pool
        self._crew = crew
        self._backend = backend
        self._limits = limits
        self._deliver = deliver
        self._clock = clock
        self._mix = mix
        self._inbox: Inbox[Errand] = Inbox(limits, mix)
        self._workers = Workers(limits.workers or backend.workers)
        self._rests = threading.Event()
        """Set while the thread does not need the interpreter: it waits for the disk, or for something to do."""
        self._working: dict[Operation, None] = {}
        self._working_of: Counter[bytes] = Counter()
        self._fresh_holds: list[tuple[Operation, Need]] = []
        self._at_work = False
        self._charged = 0
        self._turns = 0
        self._operations = 0
        self._largest = 0
        self._labours = {
            Labour.CREATE: self._create,
            Labour.COMMIT: self._commit,
            Labour.MEASURE: self._measure,
        }

    # In.

    def submit(self, operations: list[Operation], *, more: bool = False) -> None:
        """Queue a client's operations in their order; ResourceExhausted when too many wait, and then none is.

        `more`: of a request that was let in.
        """
        self._rests.clear()
        self._inbox.submit(operations[0].line, operations, more=more)

    def errand(self, errand: Errand) -> None:
        """Queue work of the actor itself."""
        self._inbox.first(errand)

    def charge(self, reads: int, writes: int) -> None:
        """Note what the loop has taken of the interpreter, for `give_way`."""
        # A client alone gains by giving way; with others about, a flood of writes would stop the loop all the time.
        self._charged += reads * READ_WEIGHT + (0 if self._mix.shared else writes)

    def give_way(self) -> None:
        """Leave the interpreter to the thread while it computes, for a moment at most, if the loop has taken its part.

        A thread that computes here takes it back at every look into the database, twenty times a call, each time
        half a millisecond later: beside a loop that is never idle a prepare would take the better part of a second.
        """
        if self._charged >= WAY_AT:
            self._charged = 0
            if not self._rests.is_set():
                self._rests.wait(WAY_SHARED_S if self._mix.shared else WAY_S)

    def submit_work(self, work: Callable[[], None], line: bytes = b"") -> None:
        """Let a worker run `work`, which must not raise; `line` is whose it is."""
        self._workers.submit(line, work)

    def glanced(self, snapshot: Snapshot) -> Result | None:
        """The same of a snapshot of a few entries; None where there are more."""
        try:
            return encode(self._backend.usage(snapshot, Glance()))
        except TooMany:
            return None
        except Exception as error:
            return error_of(error, "usage")

    def measured(self, snapshot: Snapshot, task: Task) -> Result:
        """The encoded usage of an active snapshot, or why not; blocks, for a worker."""
        try:
            return encode(self._backend.usage(snapshot, task))
        except Exception as error:
            return error_of(error, "usage")

    def stop(self) -> None:
        """Finish what is queued, then end `run`."""
        self._inbox.stop()

    def abandon(self) -> None:
        """Ask everything in the workers' hands to stop."""
        for operation in list(self._working):
            operation.cancel()

    # The thread.

    def run(self) -> None:
        """Take turns until `stop`; what the workers hold by then is waited for."""
        while not (self._inbox.stopped and not self._working):
            self._rests.set()
            batch = self._inbox.take()
            self._rests.clear()
            if batch:
                self._at_work = True
                self._turn(batch)
                self._at_work = False
        self._workers.shutdown()

    def _turn(self, batch: list[Operation | Errand], *, frees: bool = False) -> None:
        self._turns += 1
        self._operations += len(batch)
        self._largest = max(self._largest, len(batch))
        reach("writer.begun")
        try:
            if not frees:
                self._ids.replenish()
            draft = self._environment.write(lambda txn: self._decide(txn, batch), frees=frees)
        except StoreFull as error:
            growing: list[Operation | Errand] = [
                item for item in batch if isinstance(item, Operation) and creates(item)
            ]
            rest = [item for item in batch if item not in growing]
            self._fail(growing if rest and not frees else batch, error)
            if rest and not frees:
                self._turn(rest, frees=True)
            return
        except StoreBroken:
            # Whether the turn took effect is unknown here: the end of the actor tells its callers just that.
            raise
        except BrokerError as error:
            self._fail(batch, error)
            return
        except Exception as error:
            log.exception("a turn failed")
            self._fail(batch, Internal(f"the turn failed: {error!r}; nothing was changed"))
            return
        self._rests.clear()
        self._journal.settle(draft.turn)
        self._snapshots.settle()
        self._fresh_holds.clear()
        reach("writer.settled")
        for operation, needs in draft.needs:
            if (refusal := self._dispatch(operation, needs)) is not None:
                draft.results.append((operation, [refusal]))
                draft.failed.append(operation)
        for operation, _ in draft.results:
            self._let_go(operation)
        for after in draft.after:
            self._after(after)
        reach("writer.cleared")
        self._deliver(Delivery(draft.results, draft.turn.entries, draft.aside()))
        reach("writer.delivered")
        if self._environment.runs_short():
            with contextlib.suppress(RuntimeError):
                # Where no thread is to be had the next turn asks again.
                self.submit_work(self._environment.extend)
        for errand in draft.errands:
            errand.done(None)
        for operation in draft.failed:
            self._undo(operation)

    def _decide(self, txn: Transaction, batch: list[Operation | Errand]) -> _Draft:
        """Decide every operation; run again from scratch when the map had to grow, so it keeps no state."""
        now = self._clock()
        self._drop_fresh()
        draft = _Draft(self._journal.begin(), self._outcomes.begin())
        monotonic = time.monotonic_ns()
        for item in batch:
            if isinstance(item, Errand):
                item.run(txn, draft.turn, now)
                draft.errands.append(item)
                continue
            scene = Scene(txn, draft.turn, item, now)
            if item.token is not None and self._repeats(txn, item, item.token, draft):
                continue
            try:
                self._check_begun(item, monotonic)
                if len(item.calls) == 1:
                    self._decide_one(scene, item, draft)
                else:
                    self._decide_atomic(scene, item, draft)
            except lmdb.Error:
                raise  # Of the transaction, not of this operation.
            except Exception as error:
                draft.results.append((item, _shared(item, item.failed, error_of(error, "the call"))))
                draft.failed.append(item)
            if item.token is not None and draft.results and draft.results[-1][0] is item:
                _keep(draft.outcomes, item.token, item.first, draft.results[-1][1])
        draft.turn.finish(txn, now)
        draft.outcomes.finish(txn, now)
        self._rests.set()
        return draft

    def _repeats(self, txn: Transaction, operation: Operation, token: Token, draft: _Draft) -> bool:
        """Answer an operation whose outcome is kept, or that another one with its token is at work on."""
        holder = self._verbs.holds.tokens.get((token.key, operation.first), operation)
        if holder is not operation:
            at_work = Unavailable(
                "the first request with this token is still at work, repeat in a moment", {"retry_after_ms": 100}
            )
            draft.results.append((operation, [at_work]))
            return True
        numbers = range(operation.first, operation.first + len(operation.calls))
        try:
            kept = [outcome for number in numbers if (outcome := draft.outcomes.find(txn, token, number))]
        except BrokerError as error:
            # Another request's token, or a damaged value: not executed, and nobody else's concern.
            draft.results.append((operation, [error]))
            return True
        if kept:
            draft.results.append((operation, [_result_of(outcome) for outcome in kept]))
        return bool(kept)

    @staticmethod
    def _check_begun(operation: Operation, monotonic: int) -> None:
        if operation.failure is not None:
            raise operation.failure
        if operation.made or operation.task is None:
            if not operation.made:
                _check_deadline(operation, monotonic)
            return
        if operation.task.cancelled:
            raise Cancelled("the call was taken back before it began")

    def _decide_one(self, scene: Scene, operation: Operation, draft: _Draft) -> None:
        answer = self._verbs.decide(scene, operation.calls[0])
        if isinstance(answer, Need):
            self._hold(operation, 0, answer, draft)
            return
        draft.after.extend(scene.after)
        draft.results.append((operation, [answer]))

    def _decide_atomic(self, scene: Scene, operation: Operation, draft: _Draft) -> None:
        mark, chains = draft.turn.mark(), self._snapshots.mark()
        outer = scene.txn
        results: list[Result] = []
        try:
            with self._environment.nested(outer) as scene.txn:
                for scene.index, call in enumerate(operation.calls):
                    answer = self._verbs.decide(scene, call)
                    if isinstance(answer, Need):
                        raise _NeedsWork(scene.index, answer)
                    results.append(answer)
        except _NeedsWork as needs:
            draft.turn.rewind(mark)
            self._snapshots.rewind(chains)
            self._hold(operation, needs.index, needs.need, draft)
            return
        except lmdb.Error:
            raise
        except Exception as error:
            draft.turn.rewind(mark)
            self._snapshots.rewind(chains)
            draft.results.append((operation, _shared(operation, scene.index, error_of(error, "the call"))))
            draft.failed.append(operation)
            return
        draft.after.extend(scene.after)
        draft.results.append((operation, results))

    def _hold(self, operation: Operation, index: int, need: Need, draft: _Draft) -> None:
        """Hold what a call needs at once: the next call of the same turn must see it."""
        self._verbs.holds.add(operation, need)
        self._fresh_holds.append((operation, need))
        draft.needs.append((operation, [(index, need)]))

    def _drop_fresh(self) -> None:
        """The transaction in which holds were taken and chains learnt did not commit."""
        self._snapshots.rewind()
        for operation, need in self._fresh_holds:
            self._verbs.holds.drop(operation, need)
        self._fresh_holds.clear()

    def _fail(self, batch: list[Operation | Errand], error: BrokerError) -> None:
        """The transaction did not commit: nothing changed, everybody is told."""
        log.error("a transaction did not commit", error=str(error), operations=len(batch))
        self._drop_fresh()
        operations = [item for item in batch if isinstance(item, Operation)]
        for operation in operations:
            self._let_go(operation)
        self._deliver(Delivery([(operation, [error]) for operation in operations], []))
        for operation in operations:
            self._undo(operation)
        for item in batch:
            if isinstance(item, Errand):
                item.done(error)

    @staticmethod
    def _after(after: Callable[[], None]) -> None:
        try:
            after()
        except Exception as error:
            # The record says the truth already; what is left on disk is a left-over for the next start (C42).
            log.warning("clearing up after a commit failed", error=error_of(error, "clearing up").message)

    # Beside the transactions.

    def _dispatch(self, operation: Operation, needs: list[tuple[int, Need]]) -> BrokerError | None:
        """Hand an operation to who works for it; answers why that cannot be."""
        own, free = self._working_of[operation.line], self._limits.working_max - len(self._working)
        if operation not in self._working and own >= free:
            return ResourceExhausted(
                f"{own} calls of this client are in the backend's hands, and {len(self._working)} of all: "
                f"working_max={self._limits.working_max}, and one client has no more than is free",
                {"retry_after_ms": 50, "position": own},
            )
        if operation.task is None:
            operation.task = Task()
        if operation not in self._working:
            self._working[operation] = None
            self._working_of[operation.line] += 1
        reach("writer.held")
        for index, need in needs:
            if need.labour is Labour.STOCK and self._pool is not None:
                self._pool.park(operation.line, partial(self._stocked, operation, index, need))
                return None
            if need.labour is Labour.CREATE and self._crew is not None:
                check, done = partial(_check_begins, operation), partial(self._created, operation, index, need)
                self._crew.submit(Order(need.snapshot, operation.task, check, done, operation.line))
                return None
        try:
            self._workers.submit(operation.line, partial(self._labour, operation, needs))
        except RuntimeError as error:
            # No thread to be had (pids limit); what is queued goes to the workers there are, later calls may succeed.
            operation.failure = ResourceExhausted(f"no worker can be started: {error}", {"retry_after_ms": 100})
            self._inbox.again(operation)
        return None

    def _stocked(self, operation: Operation, index: int, need: Need, got: int | BrokerError) -> None:
        """The pool made a directory for a call, or could not; queue the operation again."""
        if isinstance(got, int):
            operation.made[index] = Made(Labour.CREATE, replace(need.snapshot, id=got))
        else:
            operation.failure, operation.failed = got, index
        reach("writer.made")
        self._inbox.again(operation)

    def _created(self, operation: Operation, index: int, need: Need, failure: Exception | None) -> None:
        """The crew made a snapshot for a call, or could not; queue the operation again."""
        if failure is None:
            operation.made[index] = Made(need.labour, need.snapshot)
        else:
            operation.failure, operation.failed = error_of(failure, need.labour.value), index
        reach("writer.made")
        self._inbox.again(operation)

    def _labour(self, operation: Operation, needs: list[tuple[int, Need]]) -> None:
        """Do what a call needs, in a worker's thread, and queue the operation again."""
        task = operation.task or Task()
        for index, need in needs:
            try:
                task.advance(0)
                _check_begins(operation)
                operation.made[index] = self._labours[need.labour](need, task)
            except Exception as error:
                operation.failure, operation.failed = error_of(error, need.labour.value), index
        reach("writer.made")
        self._inbox.again(operation)

    def _create(self, need: Need, task: Task) -> Made:
        self._backend.create(need.snapshot, task)
        return Made(need.labour, need.snapshot)

    def _commit(self, need: Need, task: Task) -> Made:
        return Made(need.labour, need.snapshot, self._backend.commit(need.snapshot, need.sync, task))

    def _measure(self, need: Need, task: Task) -> Made:
        return Made(need.labour, need.snapshot, self._backend.usage(need.snapshot, task))

    def _let_go(self, operation: Operation) -> None:
        if operation.needs:
            self._verbs.holds.release(operation)
        if operation in self._working:
            del self._working[operation]
            self._working_of[operation.line] -= 1
            if not self._working_of[operation.line]:
                del self._working_of[operation.line]

    def _undo(self, operation: Operation) -> None:
        """Undo what the backend did for an operation that failed; its holds are released only after."""
        self._let_go(operation)
        for made in operation.made.values():
            reach("writer.undoing")
            if made.labour is Labour.CREATE:
                self._after(lambda made=made: self._verbs.discard(made.snapshot.id))  # type: ignore[misc]
            elif made.labour is Labour.COMMIT:
                self._after(lambda made=made: self._backend.revert(made.snapshot))  # type: ignore[misc]
        operation.made.clear()

    def in_hand(self) -> tuple[set[int], set[bytes], set[bytes], dict[int, int]]:
        """What calls under way hold: ids, keys that come, keys that go, and pins by id; for the writer's thread."""
        ids: set[int] = set()
        for operation in self._working:
            ids.update(need.snapshot.id for need in operation.needs)
            ids.update(made.snapshot.id for made in list(operation.made.values()))
        holds = self._verbs.holds
        return ids, set(holds.creates), set(holds.consumes), dict(holds.pins)

    def mark(self) -> int | None:
        """For the watch: changes with every turn, None between two."""
        return self._turns if self._at_work else None

    def works(self) -> dict[str, tuple[int, int]]:
        """For the watch: how far each work of the backend is that has begun; one that waits for a hand has not."""
        return {
            f"{need.labour.value} of snapshot {need.snapshot.id}": (task.entries, task.bytes)
            for operation in list(self._working)
            if (task := operation.task) is not None and task.begun
            for need in operation.needs
        }

    def statistics(self) -> dict[str, dict[str, int]]:
        """For `status`."""
        return {
            "writer": {
                **self._inbox.statistics(),
                "turns": self._turns,
                "operations": self._operations,
                "largest_turn": self._largest,
            },
            "workers": {
                "working": len(self._working),
                "limit": self._limits.working_max,
                "clients": len(self._working_of),
                **self._workers.statistics(),
            },
        }


class _Draft:
    """What a turn's transaction decided, to be acted on once it is committed."""

    __slots__ = ("after", "errands", "failed", "needs", "outcomes", "results", "turn")

    def __init__(self, turn: Turn, outcomes: OutcomeTurn) -> None:
        self.turn = turn
        self.outcomes = outcomes
        self.results: list[tuple[Operation, list[Result]]] = []
        self.needs: list[tuple[Operation, list[tuple[int, Need]]]] = []
        self.after: list[Callable[[], None]] = []
        self.errands: list[Errand] = []
        self.failed: list[Operation] = []

    def aside(self) -> list[Operation]:
        """What goes on beside the turns; a wait for stock is none, or who floods would only wait for more of it."""
        return [operation for operation, needs in self.needs if needs[0][1].labour is not Labour.STOCK]


def _check_deadline(operation: Operation, monotonic: int) -> None:
    if operation.deadline and monotonic > operation.deadline:
        raise DeadlineExceeded("the deadline passed before the call began; it was not executed")


def _keep(outcomes: OutcomeTurn, token: Token, first: int, results: list[Result]) -> None:
    """Keep what was decided; what was not, for want of time or room, may be decided another time."""
    if any(isinstance(result, bytes) or result.code in DECIDED for result in results):
        for number, result in enumerate(results, first):
            outcomes.keep(token, _outcome_of(number, result))


def _outcome_of(number: int, result: Result) -> Outcome:
    if isinstance(result, bytes):
        return Outcome(call=number, ok=msgspec.Raw(result))
    return Outcome(call=number, error=fault(result))


def _result_of(outcome: Outcome) -> Result:
    return bytes(outcome.ok) if outcome.error is None else error_of_fault(outcome.error)


def _check_begins(operation: Operation) -> None:
    """A deadline is of the beginning: what has made something already goes on."""
    if not operation.made:
        _check_deadline(operation, time.monotonic_ns())


def _shared(operation: Operation, failed: int, error: BrokerError) -> list[Result]:
    """The outcomes of an operation of which one call failed: the others were only taken back with it."""
    taken_back = Cancelled(f"call {failed} of the atomic request failed ({error.code}), nothing was changed")
    return [error if number == failed else taken_back for number in range(len(operation.calls))]


def creates(operation: Operation) -> bool:
    """Whether an operation makes records, and so waits for room where one that removes must not."""
    return any(isinstance(call, (Prepare, View, Commit)) for call in operation.calls)


class _NeedsWork(Exception):
    def __init__(self, index: int, need: Need) -> None:
        super().__init__()
        self.index = index
        self.need = need
