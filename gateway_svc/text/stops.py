"""Stop strings in a stream: the match that completes first ends the text, and no part of it leaks out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class _Pattern:
    """One stop string, of which a text may end with a part (Knuth, Morris and Pratt)."""

    __slots__ = ("failure", "length", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = len(text)
        self.failure = [0] * self.length
        k = 0
        for i in range(1, self.length):
            while k and text[i] != text[k]:
                k = self.failure[k - 1]
            if text[i] == text[k]:
                k += 1
            self.failure[i] = k

    def advance(self, k: int, char: str) -> int:
        """How much of the stop string the text ends with after `char`, if it was `k` characters before."""
        while k and char != self.text[k]:
            k = self.failure[k - 1]
        return k + 1 if char == self.text[k] else k


class StopMatcher:
    """Passes text through until a stop string is complete.

    The longest end of the text that may still become a stop string is held back. Of several stop strings the
    one that is complete first counts, and of those that are complete with the same character the longest:
    a rule that does not depend on how the text is cut into pieces.
    """

    __slots__ = ("_begun", "_held", "_include", "_patterns", "matched")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """`include` leaves the stop string in the text. Stop strings are not empty."""
        self._patterns = [_Pattern(stop) for stop in stops]
        self._begun = [0] * len(self._patterns)  # how much of each the text ends with
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def fork(self) -> StopMatcher:
        """Another one for a text that goes on differently from here."""
        other = StopMatcher((), self._include)
        other._patterns, other._begun = self._patterns, self._begun[:]
        other._held, other.matched = self._held, self.matched
        return other

    def feed(self, text: str) -> str:
        """What may be shown now. Once `matched` is set, the text is over and nothing more is."""
        if self.matched is not None or not text:
            return ""
        patterns, begun = self._patterns, self._begun
        for i, char in enumerate(text):
            begun = [pattern.advance(k, char) for pattern, k in zip(patterns, begun, strict=True)]
            complete = [pattern for pattern, k in zip(patterns, begun, strict=True) if k == pattern.length]
            if complete:
                return self._end(self._held + text[: i + 1], complete)
        self._begun = begun
        text = self._held + text
        keep = len(text) - max(begun)
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
