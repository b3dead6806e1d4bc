"""The clients of every language against the Python one: a lone call, many callers, and events received.

Each language ships a program `bench`; what it is told and prints is in tests/conformance/README.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import scratch
from benchmarks.bench import BASE, Bench
from benchmarks.figures import Figure, Target, callers
from benchmarks.plan import Plan
from benchmarks.services import OURS, load
from benchmarks.snapbrokerd import Running
from tests.conformance.languages import LANGUAGES, Language

BACKEND = "overlayfs"
CALLERS = 64
KEY = "bench"
END = "bench-end"
CONNECT_SECONDS = 1.0
"""A subscriber that says that it is ready may still be on its way to the publisher."""
FAST = ("go",)
"""Who has to be at least as fast as Python everywhere."""
PYTHON = {"latency": "python", "throughput": "python-asyncio", "events": "python"}
"""The client of Python that is made for a work: it is what the others are held against."""

Results = dict[str, list[dict[str, Any]]]


def clients(bench: Bench) -> Iterator[Figure]:
    """All languages in one run, one after the other, round after round."""
    if OURS not in bench.sides:
        return
    for language in LANGUAGES:
        language.make()
    results: dict[str, Results] = {work: {} for work in PYTHON}
    with bench.service(OURS, BACKEND, with_base=True) as service:
        assert isinstance(service, Running)
        service.calls.prepare(KEY, BASE)
        for number in range(bench.plan.rounds):
            bench.say(f"clients, round {number + 1}")
            for work, count in (("latency", 1), ("throughput", CALLERS)):
                for language in LANGUAGES:
                    command = _command(service, language, work, bench.plan.seconds, count)
                    _add(results, language, json.loads(scratch.run(command)))
            for language, result in _subscribers(service, bench.plan, number):
                if result["gaps"]:
                    bench.say(
                        f"{language.name} missed events on the socket {result['gaps']} times, and read the journal"
                    )
                _add(results, language, result)
    for language in LANGUAGES:
        yield _figure(results, language, "latency", "a client's stat", callers(1), "ms, median", "p50_ms")
        yield _figure(results, language, "throughput", "a client's stat", callers(CALLERS), "calls/s", "per_second")
        yield _figure(results, language, "events", "events received", "1 subscriber", "events/s", "per_second")


def _command(service: Running, language: Language, work: str, seconds: float, count: int) -> list[str]:
    place = service.place()
    return [
        *language.bench,
        *(word for name, value in place.items() for word in (f"--{name}", value)),
        "--work", work, "--seconds", str(seconds), "--callers", str(count),
    ]  # fmt: skip


def _add(results: dict[str, Results], language: Language, result: dict[str, Any]) -> None:
    results[result["work"]].setdefault(language.name, []).append(result)


def _subscribers(service: Running, plan: Plan, number: int) -> Iterator[tuple[Language, dict[str, Any]]]:
    """Events are made once, while all subscribers are stopped; then each in turn takes what lies there for it."""
    of_round = {"callers": CALLERS, "operations": plan.client_events, "prefix": f"event-{number}"}
    with contextlib.ExitStack() as stack:
        programs: list[tuple[Language, subprocess.Popen[str]]] = []
        for language in LANGUAGES:
            command = _command(service, language, "events", plan.seconds, 1)
            program = stack.enter_context(scratch.program(command, stdin=subprocess.DEVNULL))
            # Whatever happens, nobody is left stopped.
            stack.callback(_continue, program)
            assert program.stdout is not None
            if json.loads(program.stdout.readline() or "null") != {"ready": True}:
                raise RuntimeError(f"{' '.join(command)}: {program.communicate()[1]}")
            programs.append((language, program))
        time.sleep(CONNECT_SECONDS)
        for _, program in programs:
            os.kill(program.pid, signal.SIGSTOP)
        load(service, "prepare", parent=BASE, **of_round)
        service.calls.prepare(END)
        for language, program in programs:
            _continue(program)
            output, errors = program.communicate()
            if program.returncode:
                raise RuntimeError(f"{language.name}'s bench: {errors}")
            yield language, json.loads(output)
        load(service, "drop", **of_round)
        service.calls.remove(END)


def _continue(program: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(program.pid, signal.SIGCONT)


def _figure(
    results: dict[str, Results], language: Language, work: str, what: str, at: str, unit: str, take: str
) -> Figure:
    taken, python = results[work], PYTHON[work]
    better = Target(at_most=1) if work == "latency" else Target(at_least=1)
    return Figure(
        what, BACKEND, at, unit, tuple(result[take] for result in taken[language.name]),
        () if language.name == python else tuple(result[take] for result in taken[python]),
        subject=language.name, baseline="" if language.name == python else python,
        target=better if language.name in FAST else None, samples={language.name: taken[language.name]},
    )  # fmt: skip
