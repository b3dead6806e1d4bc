"""The grammar of walk filters, as `broker.filters` describes it, read character by character and without patterns."""

from __future__ import annotations

import unicodedata
from typing import Final

from broker.filters import Selector

_BLANKS: Final = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_CONTROLS: Final = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92}
_HEX: Final = "0123456789abcdefABCDEF"


class Refused(Exception):
    """The text is outside the grammar."""


class Grammar:
    """One filter, whose characters are taken from the front."""

    def __init__(self, text: str) -> None:
        self._left = list(text)

    def selectors(self) -> tuple[Selector, ...]:
        """What it says; Refused where it says nothing."""
        found: list[Selector] = []
        if self._left:
            found.append(self._selector())
        while self._left:
            if self._left.pop(0) != ",":
                raise Refused
            found.append(self._selector())
        return tuple(found)

    def _selector(self) -> Selector:
        path = [self._field()]
        while self._left[:1] == ["."]:
            del self._left[0]
            path.append(self._field())
        if self._left[:1] in ([], [","]):
            return Selector(tuple(path))
        self._skip()
        operator = ""
        while self._left and self._left[0] in "=!~":
            operator += self._left.pop(0)
        if operator not in ("==", "!=", "~="):
            raise Refused
        return Selector(tuple(path), operator, self._value(operator))

    def _skip(self) -> None:
        while self._left and self._left[0] in _BLANKS:
            del self._left[0]

    def _field(self) -> str:
        self._skip()
        if self._left[:1] == ['"']:
            return self._quoted()
        field = ""
        while self._left and self._left[0].isascii() and (self._left[0].isalnum() or self._left[0] == "_"):
            field += self._left.pop(0)
        if not field:
            raise Refused
        return field

    def _value(self, operator: str) -> str:
        self._skip()
        if not self._left:
            raise Refused
        if self._left[0] == '"' or (operator == "~=" and self._left[0] in "/|"):
            return self._quoted()
        if self._left[0] in "/|,.=!~" or _illegal(self._left[0]):
            raise Refused
        value = self._left.pop(0)
        while self._left and _goes_on(self._left[0]):
            value += self._left.pop(0)
        return value

    def _quoted(self) -> str:
        quote = self._left.pop(0)
        value = b""
        while self._left:
            character = self._left.pop(0)
            if character == quote:
                return value.decode(errors="surrogateescape")
            if character == "\n" or _illegal(character):
                raise Refused
            value += self._escaped(quote) if character == "\\" else character.encode()
        raise Refused

    def _escaped(self, quote: str) -> bytes:
        if not self._left:
            raise Refused
        kind = self._left.pop(0)
        if kind == quote:
            return quote.encode()
        if kind in _CONTROLS:
            return bytes((_CONTROLS[kind],))
        if kind == "x":
            return bytes((self._number(2),))
        if kind in "uU":
            code = self._number(4 if kind == "u" else 8)
            if code > 0x10FFFF:
                raise Refused
            return "\ufffd".encode() if 0xD800 <= code < 0xE000 else chr(code).encode()
        digits = [kind, *self._left[:2]]
        del self._left[:2]
        if len(digits) < 3 or any(digit not in "01234567" for digit in digits):
            raise Refused
        code = sum(int(digit) * 8**place for place, digit in enumerate(reversed(digits)))
        if code > 255:
            raise Refused
        return bytes((code,))

    def _number(self, count: int) -> int:
        digits = self._left[:count]
        del self._left[:count]
        if len(digits) < count or any(digit not in _HEX for digit in digits):
            raise Refused
        return int("".join(digits), 16)


def _illegal(character: str) -> bool:
    return character in "\0\ufffd" or 0xD800 <= ord(character) < 0xE000


def _goes_on(character: str) -> bool:
    return character not in ",\ufffd" and unicodedata.category(character)[0] in "LMNPS"
