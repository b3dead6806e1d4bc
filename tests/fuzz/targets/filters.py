"""Walk filters: any text is a predicate that answers for every snapshot, or invalid_argument with a place in the text.

What is read and what is refused is held against the grammar read character by character, what matches against its
meaning, worked out field by field. What was read is written again with everything quoted, and is read as the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import re2

from broker.filters import Selector, compile_filters, parse_filter
from snapbroker.contract import Info, Kind
from snapbroker.errors import InvalidArgument
from snapbroker.protocol import FILTER_BYTES_MAX
from tests.fuzz.draws import Draws
from tests.fuzz.grammar import Grammar, Refused
from tests.test_filters import MALFORMED, MATCHING, SNAPSHOTS

_INFOS: Final = (*SNAPSHOTS.values(), Info("a", Kind.VIEW, "b", {"a": "1", "": "x"}))
_FIELDS: Final = (
    "name",
    "parent",
    "kind",
    "labels",
    "labels.a",
    'labels."a.b"',
    '"labels".foo',
    "bogus",
    "name.x",
    '""',
)
_OPERATORS: Final = ("", "==", "!=", "~=", " == ", "=", "=~", "!")
_VALUES: Final = (
    "a", "base", '""', '"a b"', "/a|b/", "|^l|", "^(a+)+$", '"[0-9]{1,1000}"', "a,b", '"\\xff"', '"\\ud800"',
    '"\\U0010ffff"', "a.b=c", "committed", '"(?i)BASE"', '"(("', "\u3042", '"\\"',
)  # fmt: skip


def one(data: bytes) -> None:
    """Filters of one walk: whole texts, or selectors put together."""
    draws = Draws(data)
    if draws.chance(2):
        filters = [draws.rest().decode(errors="surrogateescape" if len(data) % 2 else "replace")]
    else:
        filters = [_filter(draws) for _ in range(draws.number(4))]
    parsed: list[tuple[Selector, ...]] = []
    for text in filters:
        try:
            parsed.append(parse_filter(text))
            assert parsed[-1] == Grammar(text).selectors()
        except InvalidArgument as error:
            assert len(text.encode(errors="surrogatepass")) > FILTER_BYTES_MAX or _outside_grammar(text)
            assert 0 <= error.details.get("position", 0) <= len(text)
            assert _refused(filters)
            return
    for selectors in parsed:
        assert not selectors or parse_filter(",".join(map(_quoted, selectors))) == selectors
    if _refused(filters):
        assert any(selector.operator == "~=" for selectors in parsed for selector in selectors)
        return
    matches = compile_filters(filters)
    for info in _INFOS:
        found = matches is None or matches(info)
        assert found == _slowly(parsed, info), f"{filters} and {info}"


def seeds() -> Iterator[bytes]:
    """The table of the peer's behaviour, and every operator with every value."""
    for text in (row[0] for row in (*MATCHING, *MALFORMED)):
        yield b"\x01" + text.encode(errors="surrogatepass")
    for value in range(len(_VALUES)):
        for operator in range(4):
            yield bytes((0, 1, 1, 0, operator, 0, operator, 0, value))


def _filter(draws: Draws) -> str:
    selectors = []
    for _ in range(draws.number(4)):
        parts = (_FIELDS, _OPERATORS, _VALUES)
        field, operator, value = (draws.text() if draws.chance(8) else draws.choice(part) for part in parts)
        selectors.append(field + operator + (value if operator else ""))
    return ",".join(selectors)


def _refused(filters: Sequence[str]) -> bool:
    try:
        compile_filters(filters)
    except InvalidArgument:
        return True
    return False


def _outside_grammar(text: str) -> bool:
    try:
        Grammar(text).selectors()
    except Refused:
        return True
    return False


def _quoted(selector: Selector) -> str:
    """A selector as text, every byte of it in an escape."""
    fields = ".".join(map(_escaped, selector.fieldpath))
    return fields + (selector.operator + _escaped(selector.value) if selector.operator else "")


def _escaped(text: str) -> str:
    return '"' + "".join(f"\\x{byte:02x}" for byte in text.encode(errors="surrogateescape")) + '"'


def _slowly(filters: Sequence[Sequence[Selector]], info: Info) -> bool:
    """C64 to C68: one filter matches with all of its selectors; none, and an empty one, match everything."""
    return not filters or any(all(_holds(selector, info) for selector in selectors) for selectors in filters)


def _holds(selector: Selector, info: Info) -> bool:
    first, *rest = selector.fieldpath
    value: str | None = None
    if first == "labels":
        value = info.labels.get(".".join(rest))
    elif first in ("name", "parent", "kind"):
        value = {"name": info.name, "parent": info.parent, "kind": info.kind.value}[first]
    if not selector.operator:
        return value is not None
    if selector.operator == "==":
        return value == selector.value
    if selector.operator == "!=":
        return (value or "") != selector.value
    options = re2.Options()
    options.log_errors = False
    try:
        expression = re2.compile(selector.value.encode(errors="surrogateescape"), options=options)
    except re2.error:
        return False
    return expression.search((value or "").encode()) is not None
