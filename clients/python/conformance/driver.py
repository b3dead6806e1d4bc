"""The blocking client's driver: does the steps that come on stdin, and says what came of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import values
from values import AnyStep, Batch, Churn, Events, Open, Status, Step, Together, Walk, failure, value

import snapbroker
from snapbroker.errors import BrokerError

THREADS = 64


class Driver:
    """A connection, and what each step makes of it."""

    def __init__(self) -> None:
        self.snapshotter = os.environ["SNAPBROKER_SNAPSHOTTER"]
        self.broker = snapbroker.connect()

    def do(self, step: AnyStep) -> dict[str, Any]:
        """The outcome of a step."""
        if isinstance(step, Open):
            self.broker.close()
            self.snapshotter = step.snapshotter or os.environ["SNAPBROKER_SNAPSHOTTER"]
            self.broker = snapbroker.connect(**step.settings())
            return {"ok": {}}
        return outcome(lambda: self.answer(step))

    def answer(self, step: AnyStep) -> Any:
        """The answer of a step; its error is raised."""
        broker = self.view(step)
        if isinstance(step, Batch):
            return {"results": in_batch(broker, step)}
        if isinstance(step, Together):
            with ThreadPoolExecutor(THREADS) as threads:
                return {
                    "results": list(threads.map(lambda call: outcome(lambda: value(call.call(broker))), step.calls))
                }
        if isinstance(step, Churn):
            return {"calls": churn(broker, step)}
        if isinstance(step, Walk):
            walk = step.call(broker)
            infos = [value(info) for info in walk]
            return {"infos": infos, "sequence": walk.sequence}
        if isinstance(step, Events):
            return {"events": taken(step.call(broker), step.count)}
        if isinstance(step, Status):
            return {"snapshotters": sorted(actor.name for actor in step.call(broker).snapshotters)}
        return value(step.call(broker))

    def view(self, step: Step) -> snapbroker.Broker:
        """The broker that the step is for."""
        if step.snapshotter is None and step.namespace is None:
            return self.broker
        return self.broker.snapshotter(step.snapshotter or self.snapshotter, namespace=step.namespace)


def outcome(answer: Callable[[], Any]) -> dict[str, Any]:
    """The answer, or the error instead of it."""
    try:
        return {"ok": answer()}
    except BrokerError as error:
        return failure(error)


def in_batch(broker: snapbroker.Broker, step: Batch) -> list[dict[str, Any]]:
    """What came of each call of a batch; an error of the whole is raised where no call has an outcome."""
    options = {} if step.timeout_ms is None else {"timeout": step.timeout_ms / 1000}
    answers = []
    try:
        with broker.batch(step.atomic, **options) as batch:
            answers = [call.call(batch) for call in step.calls]
    except BrokerError:
        if len(answers) < len(step.calls) or not any(answer.done() for answer in answers):
            raise
    return [outcome(lambda answer=answer: value(answer.result())) for answer in answers]  # type: ignore[misc]


def taken(events: Any, count: int | None) -> list[Any]:
    """The events to the end of the journal, or so many."""
    found: list[Any] = []
    with events:
        while count is None or len(found) < count:
            event = next(events, None)
            if event is None:
                break
            found.append(value(event))
    return found


def churn(broker: snapbroker.Broker, step: Churn) -> int:
    """Prepare, and remove or commit, or both, `count` times by `callers` at a time; answers the number of calls."""

    def turn(number: int) -> int:
        key = f"{step.prefix}-{number}"
        fence = broker.prepare(key, step.parent).fence
        if number % 3 == 0:
            broker.remove(key, fence)
            return 2
        broker.commit(f"{key}-made", key, fence=fence)
        if number % 3 == 1:
            return 2
        broker.remove(f"{key}-made")
        return 3

    with ThreadPoolExecutor(step.callers) as callers:
        return sum(callers.map(turn, range(step.count)))


def main() -> None:
    """Step by step, until there is no more."""
    driver = Driver()
    values.write({"ready": "python"})
    for line in sys.stdin.buffer:
        step = values.read_step(line)
        values.write({"id": step.id, **driver.do(step)})
    driver.broker.close()


if __name__ == "__main__":
    main()
