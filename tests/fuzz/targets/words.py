"""Names, namespaces, labels, field paths and index keys, held against what the contract says in a slower way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from broker.snapshotter.verbs import merged
from broker.store.records import index_key
from snapbroker import protocol, session
from snapbroker.contract import Kind, check_labels, check_name, check_namespace
from snapbroker.errors import BrokerError, FailedPrecondition, InvalidArgument
from snapbroker.protocol import Update
from tests import oracle
from tests.fuzz import vectors
from tests.fuzz.draws import Draws
from tests.oracle import Oracle, Refused, Snapshot

_TEXTS: Final = ("", "a", "a.b", "\0", "é", "\U0010ffff", "labels", "labels.", "labels.a", "labels.a.b", "version")
_PATHS: Final = ("labels", "labels.a", "labels.a.b", "labels.", "labels.é", "name", "")


def one(data: bytes) -> None:
    """Texts as names, as namespaces and as labels."""
    draws = Draws(data)
    first, second = _text(draws), _text(draws)
    for text in (first, second):
        assert _fails(check_name, text) == _fails(oracle.check_name, text)
        _check_namespace(text)
        _check_text(text)
    labels, given = _labels(draws), _labels(draws)
    assert _fails(check_labels, labels) == _fails(oracle.check_labels, labels)
    _check_update(labels, given, tuple(_path(draws) for _ in range(draws.number(4))))
    if not _fails(check_name, first) and not _fails(check_name, second):
        _check_index(first, second)


def seeds() -> Iterator[bytes]:
    """Texts of every length around a limit, and every field path."""
    for number in range(len(_TEXTS)):
        yield bytes((0, number, 0, number, 2, 0, number, 0, 1, 0, 2, 0, number, 0, 3, 2, 0, 1, 0, number))
    for size in (0, 1, 76, 77, 100, 255):
        for letter in ("a", "é", "\U0001f600"):
            yield bytes((1, size)) + letter.encode() * (size // len(letter.encode())) + bytes((3, 1, 1, 97))
    for number in range(len(_PATHS)):
        yield bytes((0, 1, 0, 1, 1, 0, 1, 0, 2, 1, 0, 1, 0, 3, 1, 0, number))
    yield from vectors.bodies("Info")


def _text(draws: Draws) -> str:
    """A text; a long one is a short one many times over."""
    chosen = draws.choice(_TEXTS) if not draws.chance(2) else draws.text()
    if draws.chance(3):
        chosen = chosen * (draws.number() * 8) + draws.text()
    return chosen


def _path(draws: Draws) -> str:
    return draws.text() if draws.chance(4) else draws.choice(_PATHS)


def _labels(draws: Draws) -> dict[str, str]:
    return {_text(draws): _text(draws) for _ in range(draws.number(4))}


def _fails(check: Callable[[Any], None], value: object) -> bool:
    try:
        check(value)
    except (InvalidArgument, Refused):
        return True
    return False


def _check_namespace(text: str) -> None:
    """Letters and digits with single signs between them (C70), told apart one by one."""
    good = bool(text) and len(text) <= 76 and text != "version"
    apart = True
    for character in text:
        plain = character.isascii() and character.isalnum()
        good = good and (plain or (character in "._-" and not apart))
        apart = not plain
    try:
        check_namespace(text)
    except (InvalidArgument, FailedPrecondition) as error:
        assert isinstance(error, FailedPrecondition) == (not text)
        assert not good or apart, text
    else:
        assert good, text
        assert not apart, text


def _check_text(text: str) -> None:
    """What the client makes of it can be sent, and read again as it was."""
    call = session.prepare(text, text, {text: text})
    sent = protocol.decode_request(session.encode([call], text, 1.0))
    assert sent.calls == (call,)
    assert sent.namespace == text


def _check_update(labels: dict[str, str], given: dict[str, str], paths: tuple[str, ...]) -> None:
    """An update by field paths, against the oracle's."""
    known = Oracle("fuzz", "default")
    stored = {key: value for key, value in labels.items() if value}
    known.snapshots["a"] = Snapshot(Kind.ACTIVE, "", stored)
    try:
        check_labels(given)
        found = merged(stored, given, paths)
        check_labels(found)
    except BrokerError as error:
        assert isinstance(error, InvalidArgument)
        assert _fails(lambda call: known.call(call) and None, Update(name="a", labels=given, fieldpaths=paths))
        return
    assert known.call(Update(name="a", labels=given, fieldpaths=paths)).labels == found


def _check_index(first: str, second: str) -> None:
    """Different names have different keys, in the names' order where the keys are plain, and LMDB takes them all."""
    keys = index_key("n" * 76, first), index_key("n" * 76, second)
    assert (keys[0] == keys[1]) == (first == second)
    assert max(map(len, keys)) <= 511
    if max(len(first.encode()), len(second.encode())) <= 400:
        assert (keys[0] < keys[1]) == (first.encode() < second.encode())
