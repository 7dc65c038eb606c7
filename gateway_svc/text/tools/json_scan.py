"""Where a JSON value ends, and whether it is one, in text that comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Callable

_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_HEX = re.compile(r"[0-9a-fA-F]*")
_SCALAR_PART = re.compile(r"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_SCALAR_BEGINS = frozenset("-0123456789tfn")
_CLOSES = {"{": "}", "[": "]"}


def skip_space(text: str, at: int) -> int:
    """The place of the first character from `at` on that is not JSON's whitespace."""
    return _end(_SPACE, text, at)


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


class JsonScanner:
    """Follows one value of strict JSON (no NaN, no raw control characters in strings), after whitespace.

    A number, true, false or null ends at the character after it; with no such character, it has not ended.
    """

    __slots__ = ("_escaped", "_in_key", "_open", "_scalar", "_state", "ended", "failed")

    def __init__(self) -> None:
        self.ended = False
        self.failed = False
        self._state: Callable[[JsonScanner, str, int], int] = JsonScanner._value
        self._open: list[str] = []  # brackets that wait for theirs
        self._scalar = ""  # what there is of a number or a word
        self._in_key = False
        self._escaped = ""  # what there is of \uXXXX after the backslash

    def feed(self, text: str, at: int = 0) -> int:
        """Read on from `at`; where it stopped.

        That is the end of the text; or the place after the value, when it has `ended`; or the character that
        cannot be, when it has `failed`.
        """
        while at < len(text) and not (self.ended or self.failed):
            at = self._state(self, text, at)
        return at

    def _fail(self, at: int) -> int:
        self.failed = True
        return at

    def _value(self, text: str, at: int) -> int:
        at = skip_space(text, at)
        if at == len(text):
            return at
        char = text[at]
        if char in _SCALAR_BEGINS:
            self._scalar = ""
            self._state = JsonScanner._in_scalar
            return at
        if char == '"':
            self._in_key = False
            self._state = JsonScanner._in_string
        elif char in _CLOSES:
            self._open.append(char)
            self._state = JsonScanner._first
        else:
            return self._fail(at)
        return at + 1

    def _first(self, text: str, at: int) -> int:
        """After an opening bracket."""
        at = skip_space(text, at)
        if at < len(text):
            if text[at] == _CLOSES[self._open[-1]]:
                return self._close(at)
            self._state = JsonScanner._next
        return at

    def _next(self, text: str, at: int) -> int:
        """A member or an item must come."""
        if self._open[-1] == "[":
            return self._value(text, at)
        self._in_key = True
        return self._expect('"', JsonScanner._in_string, text, at)

    def _colon(self, text: str, at: int) -> int:
        return self._expect(":", JsonScanner._value, text, at)

    def _expect(self, char: str, then: Callable[[JsonScanner, str, int], int], text: str, at: int) -> int:
        at = skip_space(text, at)
        if at == len(text):
            return at
        if text[at] != char:
            return self._fail(at)
        self._state = then
        return at + 1

    def _after_value(self, text: str, at: int) -> int:
        at = skip_space(text, at)
        if at == len(text):
            return at
        if text[at] == ",":
            self._state = JsonScanner._next
            return at + 1
        return self._close(at) if text[at] == _CLOSES[self._open[-1]] else self._fail(at)

    def _close(self, at: int) -> int:
        self._open.pop()
        self._end_value()
        return at + 1

    def _end_value(self) -> None:
        self._state = JsonScanner._after_value
        self.ended = not self._open

    def _in_string(self, text: str, at: int) -> int:
        at = _end(_PLAIN, text, at)
        if at == len(text):
            return at
        if text[at] == "\\":
            self._escaped = ""
            self._state = JsonScanner._escape
        elif text[at] != '"':
            return self._fail(at)
        elif self._in_key:
            self._state = JsonScanner._colon
        else:
            self._end_value()
        return at + 1

    def _escape(self, text: str, at: int) -> int:
        """After a backslash in a string."""
        if not self._escaped and text[at] not in '"\\/bfnrtu':
            return self._fail(at)
        if self._escaped:
            end = min(_end(_HEX, text, at), at + 5 - len(self._escaped))
            if end == at:
                return self._fail(at)
        else:
            end = at + 1
        self._escaped += text[at:end]
        if self._escaped[0] != "u" or len(self._escaped) == 5:
            self._state = JsonScanner._in_string
        return end

    def _in_scalar(self, text: str, at: int) -> int:
        end = _end(_SCALAR_PART, text, at)
        self._scalar += text[at:end]
        if end < len(text):
            if not _SCALAR.fullmatch(self._scalar):
                return self._fail(end)
            self._end_value()
        return end
