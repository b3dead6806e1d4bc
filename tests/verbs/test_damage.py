"""A damaged value is told to whoever asks for it, and is nobody else's concern."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapbroker.protocol import Prepare, Request, decode_reply, encode
from tests.fuzz.snapshotter import Snapshotter


@pytest.fixture
def snapshotter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Snapshotter]:
    """One in this process, whose database can be damaged."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Snapshotter() as snapshotter:
        yield snapshotter


def prepare(key: str, token: bytes = b"") -> bytes:
    return encode(Request(calls=(Prepare(key=key),), namespace="default", token=token))


def codes(parts: list[tuple[bytes, bytes]]) -> list[str]:
    outcomes = [outcome for _, body in parts for outcome in decode_reply(body).outcomes]
    return [outcome.error.code if outcome.error else "ok" for outcome in outcomes]


def test_a_damaged_outcome_ends_its_own_repeat_alone(snapshotter: Snapshotter) -> None:
    (parts,) = snapshotter.ask([prepare("a", b"token")])
    assert codes(parts) == ["ok"]
    assert snapshotter.damage_outcomes(b"\x93\x01") == 1
    together = snapshotter.ask([prepare("b"), prepare("a", b"token"), prepare("c")])
    assert [codes(parts) for parts in together] == [["ok"], ["internal"], ["ok"]]
    assert sorted(snapshotter.records()["default"]) == ["a", "b", "c"]
    (parts,) = snapshotter.ask([prepare("d")])
    assert codes(parts) == ["ok"]
