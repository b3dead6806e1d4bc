r"""Walk filters: the text a caller sends becomes a predicate over Info, in containerd's grammar (C64-C68).

    filter    = [ selector *( "," selector ) ]           ; the empty one matches everything, "," means and
    selector  = fieldpath [ operator value ]             ; without an operator: is it present?
    fieldpath = field *( "." field )                     ; name, parent, kind, labels.<key>
    field     = 1*( ALPHA / DIGIT / "_" ) / quoted
    operator  = "==" / "!=" / "~="
    value     = quoted / run                             ; run: up to "," or white space

White space may stand before a field, an operator and a value, and nowhere else: a blank before a comma or at
the end is an error. A `"` quotes anywhere, `/` and `|` quote only the value of `~=`, all three with the
escapes of Go's double-quoted strings; an escape by bytes (`\xHH`, `\ooo`) may spell something that is not
UTF-8, which then equals no name. A run begins with any character that is not a quote, an operator, a comma or
a dot, and goes on over letters, marks, numbers, punctuation and symbols: dots, quotes and `=` included.

What follows from the peer's adaptor, and is kept: `parent` is always present, empty for a root; whatever
comes after `name`, `parent` or `kind` in a field path is not looked at; `labels` by itself is the label with
the empty key, which nobody has; and a field nobody knows is absent, so `bogus!=z` matches (C65).

One thing is not kept: a `\U` escape above 0x7FFFFFFF overflows in the peer and becomes a byte; here, as in Go
itself, everything above U+10FFFF is an error.

`~=` runs in RE2, whose time grows with the text and not with what the expression hopes to find, so that no
caller can stall an actor. Its memory, and the number of selectors every snapshot is held against, have
limits.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final, NoReturn

import re2  # type: ignore[import-untyped]

from snapbroker.contract import Info
from snapbroker.errors import InvalidArgument
from snapbroker.protocol import FILTER_BYTES_MAX, FILTERS_MAX

SELECTORS_MAX: Final = 256
"""Most selectors in all filters of one walk: every snapshot walked over is held against each of them."""
EXPRESSIONS_MAX: Final = 16
"""Most `~=` in all filters of one walk: each may take EXPRESSION_MEMORY_BYTES while the walk lasts."""
EXPRESSION_MEMORY_BYTES: Final = 1024 * 1024
"""Most memory of one compiled expression, its cache of states included."""

Match = Callable[[Info], bool]


@dataclass(frozen=True, slots=True)
class Selector:
    """One condition: `operator` is `==`, `!=`, `~=`, or empty for "is present"."""

    fieldpath: tuple[str, ...]
    operator: str = ""
    value: str = ""


def compile_filters(filters: Sequence[str]) -> Match | None:
    """A predicate that is true where one of the filters matches; None where everything does (C64).

    Raises InvalidArgument, with the filter, the position and what was expected there, for text outside the
    grammar (C69) and for what is over a limit. An expression that RE2 cannot read is no error: it matches
    nothing (C68).
    """
    if len(filters) > FILTERS_MAX:
        raise InvalidArgument(f"{len(filters)} filters, more than {FILTERS_MAX}")
    parsed = [_Parser(text, number).parse() for number, text in enumerate(filters)]
    _check_amounts([selector for selectors in parsed for selector in selectors])
    if not parsed or not all(parsed):
        return None
    try:
        return _any([_all([_predicate(selector) for selector in selectors]) for selectors in parsed])
    finally:
        # RE2's Python module keeps the last 128 expressions for ever: they are to end with their walk.
        re2.purge()


def parse_filter(text: str) -> tuple[Selector, ...]:
    """The selectors of one filter, none for the empty one; raises InvalidArgument like `compile_filters`."""
    return _Parser(text, 0).parse()


def _check_amounts(selectors: Sequence[Selector]) -> None:
    if len(selectors) > SELECTORS_MAX:
        raise InvalidArgument(f"the filters have {len(selectors)} selectors, more than {SELECTORS_MAX}")
    expressions = sum(selector.operator == "~=" for selector in selectors)
    if expressions > EXPRESSIONS_MAX:
        raise InvalidArgument(f"the filters have {expressions} expressions (~=), more than {EXPRESSIONS_MAX}")


_OPERATORS: Final = ("==", "!=", "~=")
# What Go calls white space; Python's own idea of it has four control characters more.
_BLANKS: Final = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*")
_FIELD: Final = re.compile("[A-Za-z0-9_]+")
_OPERATOR: Final = re.compile("[=!~]+")
# The peer reads bytes and takes a U+FFFD for a broken one, so that even one sent on purpose is an error.
_ILLEGAL: Final = "\0\ufffd\ud800-\udfff"
_ILLEGAL_CHARACTER: Final = re.compile(f"[{_ILLEGAL}]")
_PLAIN: Final = {quote: re.compile(rf"[^\\\n{quote}{_ILLEGAL}]*") for quote in '"/|'}
_ESCAPE: Final = re.compile(
    r"\\(?:(?P<byte>x[0-9A-Fa-f]{2}|[0-3][0-7]{2})|u(?P<short>[0-9A-Fa-f]{4})|U(?P<long>[0-9A-Fa-f]{8})|(?P<one>.))"
)
_CONTROLS: Final = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\"}


class _Parser:
    """Reads one filter from left to right; `_position` is that of the next unread character."""

    def __init__(self, text: str, number: int) -> None:
        self._text = text
        self._number = number
        self._position = 0

    def parse(self) -> tuple[Selector, ...]:
        size = len(self._text.encode("utf-8", "surrogatepass"))
        if size > FILTER_BYTES_MAX:
            raise InvalidArgument(f"filter {self._number + 1} is {size} bytes long, more than {FILTER_BYTES_MAX}")
        if not self._text:
            return ()
        selectors = [self._selector()]
        while self._next():
            if self._next() != ",":
                self._fail("a comma or the end")
            self._position += 1
            selectors.append(self._selector())
        return tuple(selectors)

    def _selector(self) -> Selector:
        fieldpath = [self._field()]
        while self._next() == ".":
            self._position += 1
            fieldpath.append(self._field())
        if self._next() in ("", ","):
            return Selector(tuple(fieldpath))
        operator = self._operator()
        return Selector(tuple(fieldpath), operator, self._value(operator))

    def _field(self) -> str:
        self._skip_blanks()
        if self._next() == '"':
            return self._quoted()
        field = _FIELD.match(self._text, self._position)
        if field is None:
            self._fail('a field: letters, digits and _, or anything in "..."')
        self._position = field.end()
        return field.group()

    def _operator(self) -> str:
        self._skip_blanks()
        operator = _OPERATOR.match(self._text, self._position)
        if operator is None or operator.group() not in _OPERATORS:
            self._fail('an operator (==, != or ~=), or "..." around a field with other characters')
        self._position = operator.end()
        return operator.group()

    def _value(self, operator: str) -> str:
        self._skip_blanks()
        first = self._next()
        if first == '"' or (operator == "~=" and first in ("/", "|")):
            return self._quoted()
        if first in ("", *"/|,.=!~") or _ILLEGAL_CHARACTER.match(first):
            self._fail('a value, in "..." where it begins with a quote, an operator, a comma or a dot')
        end = self._position + 1
        while end < len(self._text) and _continues_run(self._text[end]):
            end += 1
        value = self._text[self._position : end]
        self._position = end
        return value

    def _quoted(self) -> str:
        opening, quote = self._position, self._next()
        self._position += 1
        value = bytearray()
        while True:
            plain = _PLAIN[quote].match(self._text, self._position)
            assert plain is not None  # noqa: S101 - the pattern matches the empty string too
            value += plain.group().encode()
            self._position = plain.end()
            if self._next() == quote:
                self._position += 1
                return value.decode("utf-8", "surrogateescape")
            if self._next() != "\\":
                self._position = opening
                self._fail(f"a closing {quote} on the same line, with no NUL or U+FFFD before it")
            value += self._escaped(quote)

    def _escaped(self, quote: str) -> bytes:
        escape = _ESCAPE.match(self._text, self._position)
        value = _unescape(escape, quote) if escape else None
        if escape is None or value is None:
            self._fail(rf"one of the escapes \a \b \f \n \r \t \v \\ \{quote} \ooo \xHH \uHHHH \UHHHHHHHH")
        self._position = escape.end()
        return value

    def _next(self) -> str:
        """The next unread character; empty at the end."""
        return self._text[self._position : self._position + 1]

    def _skip_blanks(self) -> None:
        blanks = _BLANKS.match(self._text, self._position)
        assert blanks is not None  # noqa: S101 - the pattern matches the empty string too
        self._position = blanks.end()

    def _fail(self, expected: str) -> NoReturn:
        found = ascii(self._next()) if self._next() else "the end"
        raise InvalidArgument(
            f"filter {self._number + 1}, character {self._position + 1}: expected {expected}, found {found}",
            {"filter": self._number, "position": self._position, "expected": expected},
        )


def _continues_run(character: str) -> bool:
    return character != "," and character != "\ufffd" and unicodedata.category(character)[0] in "LMNPS"


def _unescape(escape: re.Match[str], quote: str) -> bytes | None:
    """The bytes an escape stands for, None where it is none."""
    byte, short, long, one = escape.group("byte", "short", "long", "one")
    if byte:
        return bytes([int(byte[1:], 16) if byte[0] == "x" else int(byte, 8)])
    if one:
        control = _CONTROLS.get(one, quote if one == quote else None)
        return None if control is None else control.encode()
    code = int(short or long, 16)
    if code > 0x10FFFF:
        return None
    # Half a surrogate pair is no character; the peer writes U+FFFD in its place.
    return "\ufffd".encode() if 0xD800 <= code <= 0xDFFF else chr(code).encode()


def _predicate(selector: Selector) -> Match:
    read, value = _reader(selector.fieldpath), selector.value
    if selector.operator == "":
        return lambda info: read(info) is not None
    if selector.operator == "==":
        return lambda info: read(info) == value
    if selector.operator == "!=":
        return lambda info: (read(info) or "") != value
    search = _search(value)
    return lambda info: search(read(info) or "")


def _reader(fieldpath: Sequence[str]) -> Callable[[Info], str | None]:
    """What reads the field of an Info; None where it is absent."""
    if fieldpath[0] in ("name", "parent", "kind"):
        return attrgetter(fieldpath[0])
    if fieldpath[0] == "labels":
        key = ".".join(fieldpath[1:])
        return lambda info: info.labels.get(key)
    return lambda info: None


def _search(expression: str) -> Callable[[str], bool]:
    """An unanchored RE2 search that never matches where RE2 cannot read the expression (C68)."""
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    options.max_mem = EXPRESSION_MEMORY_BYTES
    try:
        # In bytes: the module turns positions in UTF-8 into positions in text, which nobody asked for.
        compiled = re2.compile(expression.encode("utf-8", "surrogateescape"), options=options)
    except re2.error as error:
        if b"too large" in error.args[0]:
            limit = f"{EXPRESSION_MEMORY_BYTES} bytes of memory"
            raise InvalidArgument(f"the expression {expression[:40]!r} takes more than {limit}") from None
        return lambda text: False
    return lambda text: compiled.search(text.encode()) is not None


def _all(matches: Sequence[Match]) -> Match:
    if len(matches) == 1:
        return matches[0]
    return lambda info: all(match(info) for match in matches)


def _any(matches: Sequence[Match]) -> Match:
    if len(matches) == 1:
        return matches[0]
    return lambda info: any(match(info) for match in matches)
