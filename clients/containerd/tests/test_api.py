"""The generated code is what the definitions say, and Infos that are built by hand are what it reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from snapbroker.contract import Info, Kind
from snapbroker_containerd import messages, status
from snapbroker_containerd.api import snapshots_pb2 as api

TOOL = Path(__file__).parents[1] / "tools" / "generate_api.py"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def test_what_is_checked_in_is_what_is_generated() -> None:
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@given(
    infos=st.lists(
        st.builds(
            Info,
            name=TEXT,
            kind=st.sampled_from(Kind),
            parent=TEXT,
            labels=st.dictionaries(TEXT, TEXT, max_size=5),
            created=st.integers(0, 2**62),
            updated=st.integers(0, 2**62),
        ),
        max_size=3,
    )
)
def test_any_infos_are_read_as_they_were(infos: list[Info]) -> None:
    found = api.ListSnapshotsResponse.FromString(b"".join(map(messages.info_field, infos))).info
    assert [
        Info(
            info.name,
            Kind(api.Kind.Name(info.kind).lower()),
            info.parent,
            dict(info.labels),
            info.created_at.ToNanoseconds(),
            info.updated_at.ToNanoseconds(),
        )
        for info in found
    ] == infos


@given(st.binary(max_size=100))
def test_any_garbage_is_a_message_or_refused(garbage: bytes) -> None:
    try:
        readable = api.UpdateSnapshotRequest.FromString(garbage)
    except DecodeError:
        with pytest.raises(status.Refusal) as caught:
            messages.read(api.UpdateSnapshotRequest, garbage)
        assert caught.value.status is grpc.StatusCode.INVALID_ARGUMENT
    else:
        assert messages.read(api.UpdateSnapshotRequest, garbage) == readable


@pytest.mark.parametrize("size", [0, 1, 1999, 2000, 2001, 5000])
def test_messages_of_errors_are_cut(size: int) -> None:
    for letter in ("x", "é", "鍵", "\udc80"):
        shortened = status.shortened(letter * size)
        assert len(shortened.encode()) <= status.MESSAGE_BYTES_MAX + 3
        if len(letter.encode(errors="backslashreplace")) * size <= status.MESSAGE_BYTES_MAX:
            assert shortened == (letter * size).encode(errors="backslashreplace").decode()
