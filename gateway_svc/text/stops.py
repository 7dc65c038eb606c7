"""Stop strings in a stream: the match that completes first ends the text, and no part of it leaks out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class _Pattern:
    """One stop string and how much of it the text ends with (Knuth, Morris and Pratt)."""

    __slots__ = ("failure", "length", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = len(text)
        self.matched = 0
        self.failure = [0] * self.length
        k = 0
        for i in range(1, self.length):
            while k and text[i] != text[k]:
                k = self.failure[k - 1]
            if text[i] == text[k]:
                k += 1
            self.failure[i] = k

    def advance(self, char: str) -> bool:
        """Take the next character; whether it completes the stop string."""
        k = self.matched
        while k and char != self.text[k]:
            k = self.failure[k - 1]
        if char == self.text[k]:
            k += 1
        self.matched = k
        return k == self.length


class StopMatcher:
    """Passes text through until a stop string is complete.

    The longest end of the text that may still become a stop string is held back. Of several stop strings the
    one that is complete first counts, and of those that are complete with the same character the longest:
    a rule that does not depend on how the text is cut into pieces.
    """

    __slots__ = ("_held", "_include", "_patterns", "matched")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """`include` leaves the stop string in the text. Stop strings are not empty."""
        self._patterns = [_Pattern(stop) for stop in stops]
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """What may be shown now. Once `matched` is set, the text is over and nothing more is."""
        if self.matched is not None or not text:
            return ""
        patterns = self._patterns
        for i, char in enumerate(text):
            complete = [pattern for pattern in patterns if pattern.advance(char)]
            if complete:
                return self._end(self._held + text[: i + 1], complete)
        text = self._held + text
        keep = len(text) - max(pattern.matched for pattern in patterns)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _end(self, text: str, complete: Iterable[_Pattern]) -> str:
        stop = max((pattern.text for pattern in complete), key=len)
        self.matched = stop
        self._held = ""
        return text if self._include else text[: len(text) - len(stop)]
