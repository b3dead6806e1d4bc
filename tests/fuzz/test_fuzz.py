"""The fuzzer in a short form: every target gets through its corpus and its seeds, and through some random inputs more.

`make fuzz` searches for as long as it is given.
"""

from __future__ import annotations

import importlib.util
import logging
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests.fuzz import targets
from tests.fuzz.__main__ import CORPUS, fuzz
from tests.fuzz.draws import Draws

RUNS = {"bodies": 600}
"""Inputs of the short run; `bodies` has a whole snapshotter to ask."""
RUNS_OF_OTHERS = 3000
CORPUS_BYTES_MAX = 1 << 20
HAS_WHEELS = (sys.platform, platform.machine()) == ("linux", "x86_64") and sys.version_info < (3, 15)
"""What pyproject.toml asks for atheris on."""


def corpus(name: str) -> list[bytes]:
    return [file.read_bytes() for file in sorted((CORPUS / name).iterdir())]


@pytest.fixture
def quiet() -> Iterator[None]:
    """What bad input makes the broker log is no news here, and takes longer to write than all the rest."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", targets.NAMES)
def test_every_input_of_the_corpus(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    target = targets.load(name)
    inputs = [*target.seeds(), *corpus(name)]
    try:
        for data in inputs:
            try:
                target.one(data)
            except BaseException as error:
                error.add_note(f"{name}: {data!r}")
                raise
    finally:
        getattr(target, "close", lambda: None)()
    assert len(corpus(name)) >= 3


@pytest.mark.skipif(not HAS_WHEELS, reason="atheris has wheels for Linux on x86-64 alone")
@pytest.mark.parametrize("name", targets.NAMES)
def test_some_inputs_more(name: str, tmp_path: Path) -> None:
    """The same ones every time, as far as the threads of `bodies` allow."""
    found = fuzz(name, tmp_path, runs=RUNS.get(name, RUNS_OF_OTHERS), seed=1)
    assert not found.findings, found.output[-8000:]
    assert found.executed >= RUNS.get(name, RUNS_OF_OTHERS), found.output[-8000:]
    assert found.coverage > 0


@pytest.mark.skipif(not HAS_WHEELS, reason="atheris has wheels for Linux on x86-64 alone")
def test_a_mistake_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer can fail: with a decoder that lets out what msgspec raises, a few inputs are enough."""
    mistaken = tmp_path / "mistaken"
    mistaken.mkdir()
    (mistaken / "sitecustomize.py").write_text(MISTAKE)
    monkeypatch.setenv("PYTHONPATH", str(mistaken))
    findings = tmp_path / "findings"
    findings.mkdir()
    found = fuzz("events", findings, runs=RUNS_OF_OTHERS, seed=1)
    assert found.failed
    assert len(found.findings) == 1
    assert "a heartbeat that nobody expected" in found.output


MISTAKE = """
import snapbroker.subscriber as subscriber
def mistaken(body):
    raise KeyError("a heartbeat that nobody expected")
subscriber.decode_heartbeat = mistaken
"""


def test_the_corpus_is_small() -> None:
    sizes = [file.stat().st_size for file in CORPUS.rglob("*") if file.is_file()]
    assert sum(sizes) < CORPUS_BYTES_MAX
    assert {file.name for file in CORPUS.iterdir()} == set(targets.NAMES)


def test_atheris_is_there() -> None:
    assert (importlib.util.find_spec("atheris") is not None) == HAS_WHEELS


class TestDraws:
    """What structured targets build their inputs from."""

    def test_nothing_left_is_the_first_choice(self) -> None:
        draws = Draws(b"")
        assert (draws.number(), draws.choice("abc"), draws.chance(2), draws.integer()) == (0, "a", False, 0)
        assert (draws.text(), draws.blob(), draws.frames(), draws.rest(), draws.left) == ("", b"", [], b"", False)

    def test_each_byte_is_a_choice(self) -> None:
        draws = Draws(b"\x05\x01\x02\xff\xfe\x03abc\x02\x00\x01x\x00\x00tail")
        assert (draws.number(4), draws.choice("abc"), draws.integer()) == (1, "b", -2)
        assert (draws.text(), draws.frames(), draws.rest()) == ("abc", [b"x", b""], b"tail")

    def test_torn(self) -> None:
        assert Draws(b"\x00").torn(b"whole") == b"whole"
        assert Draws(b"\x07\x00\x00\x01\x00X").torn(b"whole") == b"wXole"
        assert Draws(b"\x07\x00\x00\x01\x01\x00X").torn(b"whole") == b"wXhole"
        assert Draws(b"\x07\x00\x00\x01\x02\x01").torn(b"whole") == b"wle"
        assert Draws(b"\x07\x00\x00\x01\x03").torn(b"whole") == b"w"
