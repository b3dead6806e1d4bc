"""The programs of a client as the harness runs them: a driver that is told, a recorder that is listened to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Generic, Self, TypeVar

from tests.conformance.languages import Language
from tests.harness import SCRATCH

Line = dict[str, Any]
L = TypeVar("L")

ANSWER_S: Final = 100.0
"""How long a step may take on a busy machine, a restart of the broker included."""
END_S: Final = 10.0
"""How long a program may take to end."""


class Program(Generic[L]):
    """A process that writes lines, read by `parse`; its stderr is told when something is wrong with it."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], parse: Callable[[bytes], L]
    ) -> None:
        self.name = name
        self.lines: list[L] = []
        self._parse = parse
        self.ended = False
        self._changed = threading.Condition()
        self._complaints = tempfile.TemporaryFile(dir=SCRATCH)  # noqa: SIM115 - open as long as the program
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SNAPBROKER_")}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env={**kept, **environment},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            read = self._parse(line)
            with self._changed:
                self.lines.append(read)
                self._changed.notify_all()
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[list[L]], Any], what: str, within: float = ANSWER_S) -> Any:
        """Wait until the lines are as wanted; answers what the condition did."""
        give_up = time.monotonic() + within
        with self._changed:
            while not (found := condition(self.lines)):
                left = give_up - time.monotonic()
                if self.ended or left <= 0:
                    raise AssertionError(f"{self.name}: no {what}; {self.told()}")
                self._changed.wait(left)
        return found

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            status = self.process.wait(ANSWER_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end; {self.told()}") from None
        assert status == 0, f"{self.name} ended with {status}; {self.told()}"
        self._reader.join(END_S)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Hold it up for the length of the block."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def told(self) -> str:
        """Its last line and what it said on stderr."""
        last = str(self.lines[-1])[:2000] if self.lines else "nothing"
        self._complaints.seek(0)
        return f"its last line: {last}; its stderr: {self._complaints.read().decode(errors='replace')[-8000:]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
        self._reader.join(END_S)
        for stream in (self.process.stdin, self.process.stdout, self._complaints):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


class Driver(Program[Line]):
    """A client that does step by step what it is told, in a namespace of its own."""

    def __init__(self, language: Language, environment: Mapping[str, str]) -> None:
        super().__init__(f"{language.name}'s driver", language.driver, environment, json.loads)
        self.language = language.name
        self.namespace = environment["SNAPBROKER_NAMESPACE"]
        self.steps = 0

    def wait_ready(self) -> None:
        """Wait for its first line."""
        ready = self.wait_for(lambda lines: lines[:1], "sign of being ready")
        assert ready[0].keys() == {"ready"}, ready

    def tell(self, step: Line) -> None:
        """Send a step; a program that is not there any more is found by its missing answer."""
        assert self.process.stdin is not None
        self.steps += 1
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"id": self.steps, **step}).encode() + b"\n")
            self.process.stdin.flush()

    def answer(self) -> Line:
        """What came of the step before."""
        found = self.wait_for(lambda lines: lines[self.steps : self.steps + 1], f"answer to step {self.steps}")[0]
        assert found.get("id") == self.steps, f"{self.name} answered {str(found)[:500]} to step {self.steps}"
        assert found.keys() in ({"id", "ok"}, {"id", "error"}), found
        return {key: value for key, value in found.items() if key != "id"}


class Recorder(Program[Line]):
    """A client that writes down what it hears of some namespaces."""

    def __init__(self, language: Language, environment: Mapping[str, str], namespaces: Sequence[str]) -> None:
        super().__init__(f"{language.name}'s recorder", (*language.recorder, *namespaces), environment, json.loads)
        self.language = language.name
        self.namespaces = tuple(namespaces)

    def wait_ready(self) -> None:
        """Wait until it has all first states and all subscriptions."""
        self.wait_for(lambda lines: {"ready": True} in lines, "sign of being ready")

    def transcript(self, namespace: str) -> list[Line]:
        """What it wrote of one namespace."""
        return [line for line in self.lines if line.get("namespace") == namespace]

    def check_lines(self) -> None:
        """Every line is one that the protocol has."""
        kinds = ({"ready"}, {"namespace", "state", "sequence"}, {"namespace", "event"}, {"namespace", "mirror", "gaps"})
        for line in self.lines:
            assert line.keys() in kinds, f"{self.name} wrote {str(line)[:500]}"
