"""Files of a key directory, grants and topics: whoever wrote them, they are read, or refused by a contract's error.

What a file grants is what the actor reads from its frame; and what a restricted grant selects of the events, whatever
topics are asked for, is of its own namespaces and snapshotters.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import zmq
from zmq.utils import z85

from broker.access import ROLES, Grant, Role, decode_grant, encode_grant
from broker.keys import Entry, read_client, read_directory
from snapbroker import keyfiles
from snapbroker.errors import InvalidArgument, PermissionDenied
from tests.fuzz.draws import Draws

_KEY: Final = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"
_SECRET: Final = "D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs"
_NAMES: Final = ("red", "red2", "re", "blue", "*", "")
_FIELDS: Final = ("public_key", "role", "namespaces", "snapshotters", "secret_key", "server_key", "other")
_VALUES: Final = (
    f'"{_KEY}"', f'"{_SECRET}"', '"' + "#" * keyfiles.KEY_CHARACTERS + '"', '"read"', '"admin"', '["red"]', '["*"]',
    "[]", '["red", "*"]', "7", "nan", "1979-05-27", "{}", '"""', "[[", '"\\ud800"', "9" * 4400,
)  # fmt: skip
_OTHER: Final = "farm"


@cache
def _place() -> Path:
    place = Path(tempfile.mkdtemp(prefix="snb-fuzz-"))
    (place / f"{_OTHER}.toml").write_text(f'public_key = "{_SECRET}"\n')
    return place


def one(data: bytes) -> None:
    """A file, a frame or topics."""
    draws = Draws(data)
    kind = draws.number(4)
    if kind == 0:
        _file(_text(draws))
    elif kind == 1:
        _file(draws.rest())
    elif kind == 2:
        _frame(draws)
    else:
        _topics(draws)


def seeds() -> Iterator[bytes]:
    """The specification's forms, each field with each value, and topics about those of a grant."""
    yield b"\x01" + f'public_key = "{_KEY}"\nrole = "write"\nnamespaces = ["red"]\nsnapshotters = ["*"]\n'.encode()
    yield b"\x01" + f'public_key = "{_KEY}"\nsecret_key = "{_SECRET}"\nserver_key = "{_KEY}"\n'.encode()
    for field in range(len(_FIELDS)):
        for value in range(len(_VALUES)):
            yield bytes((0, 3, 0, 0, 0, 4, 1, field, value, 0, 0, 0))
    for topic in (b"", b"a", b"a/", b"a/red/", b"a/red2/", b"a/re", b"a/blue/x", b"b/red/"):
        for names in range(3):
            yield bytes((3, 1, names, 0, 1, 2, names, 0, 1, len(topic))) + topic
    yield b"\x02\x00\x01\x02"


def _text(draws: Draws) -> bytes:
    lines = [f"{draws.choice(_FIELDS)} = {draws.choice(_VALUES)}\n" for _ in range(draws.number(6))]
    return draws.torn("".join(lines).encode())


def _file(text: bytes) -> None:
    path = _place() / "one.toml"
    path.write_bytes(text)
    path.chmod(0o600)
    entry: Entry | None = None
    try:
        entry = read_client(path)
    except InvalidArgument as error:
        assert str(path) in error.message
    if entry is not None:
        _check_entry(entry)
    listing = read_directory(_place())
    assert (entry is None or entry.grant.key == _SECRET) == (path.name in listing.bad)
    # In the order of names, so that a file cannot take the place of one that was there before.
    assert listing.entries[_SECRET].name == _OTHER
    try:
        pair = keyfiles.read_secret(path)
    except InvalidArgument as error:
        assert _SECRET not in error.message
        return
    assert zmq.curve_public(pair.secret.encode()).decode() == pair.public
    assert pair.secret not in repr(pair)


def _check_entry(entry: Entry) -> None:
    grant = entry.grant
    assert decode_grant(entry.frame) == grant
    assert grant.role.name.lower() in ROLES
    assert all("/" not in name and "\0" not in name for name in grant.namespaces or ())
    assert len(z85.decode(grant.key.encode())) == 32, "libzmq takes it"


def _frame(draws: Draws) -> None:
    """A grant as it goes to an actor."""
    grant = _grant(draws)
    frame = encode_grant(grant)
    assert not frame or decode_grant(frame) == grant
    assert bool(frame) == (not grant.whole or grant.role is not Role.ADMIN or bool(grant.key))


def _names(draws: Draws, names: tuple[str, ...]) -> tuple[str, ...] | None:
    return None if draws.chance(4) else tuple(draws.choice(names) for _ in range(draws.number(4)))


def _grant(draws: Draws) -> Grant:
    return Grant(
        client="farm",
        role=draws.choice(tuple(Role)),
        key=_KEY if draws.chance(2) else "",
        namespaces=_names(draws, _NAMES[:4]),
        snapshotters=_names(draws, ("a", "ab", "b")),
    )


def _topics(draws: Draws) -> None:
    grant = _grant(draws)
    asked = [draws.text() for _ in range(draws.number(4))]
    asked += ["/".join((draws.choice(("a", "ab", "b")), draws.choice(_NAMES), draws.text()))] if draws.left else []
    snapshotter = draws.choice(("a", "ab", "b"))
    try:
        selected = grant.narrowed(asked, snapshotter)
    except PermissionDenied as error:
        assert not grant.whole
        json.dumps(error.details)
        return
    events = [f"{name}/{namespace}/k" for name in ("a", "ab", "b") for namespace in ("red", "red2", "re", "blue")]
    for event in events:
        name, namespace, _ = event.split("/")
        may = grant.whole or (
            name == snapshotter and grant.reaches(name) and (grant.namespaces is None or namespace in grant.namespaces)
        )
        wanted = any(event.startswith(topic) for topic in asked)
        found = any(event.startswith(topic) for topic in selected)
        assert found == (may and wanted), (grant, asked, selected, event)
