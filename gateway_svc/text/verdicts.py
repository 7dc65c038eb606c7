"""Which candidates of a beam search a stop string ends: what a scheduler waits to be told after each step.

A candidate is a token after the path of its parent, a candidate of the step before. So each has a detokenizer
and a matcher of its own, forked from its parent's, and a step costs what its new tokens cost. Only the last
step's are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway_svc.text.detokenize import Detokenizer, TokenBytes
from gateway_svc.text.stops import StopMatcher


class _Path:
    """The text from the prompt up to a candidate, as far as what comes after it depends on it."""

    __slots__ = ("_detokenizer", "_matcher")

    def __init__(self, detokenizer: Detokenizer, matcher: StopMatcher) -> None:
        self._detokenizer = detokenizer
        self._matcher = matcher

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._matcher.matched is not None

    def then(self, token_id: int) -> _Path:
        """The path with one more token."""
        detokenizer, matcher = self._detokenizer.fork(), self._matcher.fork()
        matcher.feed(detokenizer.feed((token_id,)))
        return _Path(detokenizer, matcher)


class StopVerdicts:
    """The verdicts of one beam search."""

    def __init__(self, table: TokenBytes, stops: Sequence[str]) -> None:
        """`table` and `stops` are those that the results are made text and cut with."""
        self._prompt = _Path(Detokenizer(table), StopMatcher(stops))
        self._paths: list[_Path] = []
        self._step = 0

    def judge(self, step: int, parents: Sequence[int], token_ids: Sequence[int]) -> list[int]:
        """Indexes of the candidates that a stop string ends, ascending.

        `parents` are indexes into the candidates of the step before. Step 0 is at the prompt, be it anew.

        Raises:
            ValueError: the steps do not follow each other, or a candidate has no parent.
        """
        if step == 0:
            before = [self._prompt] * len(token_ids)
        elif (
            step != self._step + 1
            or len(parents) != len(token_ids)
            or max(parents, default=0) >= len(self._paths)
        ):
            problem = f"{len(token_ids)} candidates with the parents {list(parents)} at step {step}"
            raise ValueError(f"{problem}, after {len(self._paths)} candidates at step {self._step}")
        else:
            before = [self._paths[parent] for parent in parents]
        self._step = step
        self._paths = [path.then(token) for path, token in zip(before, token_ids, strict=True)]
        return [i for i, path in enumerate(self._paths) if path.stopped]
