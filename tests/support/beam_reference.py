"""Beam search by the book: transformers' rules in plain Python, over any model, with no engine at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logprobs = npt.NDArray[np.float64]
Model = Callable[[tuple[int, ...]], Logprobs]
"""The logprobs of the next token after a history."""

HEURISTIC, FIRST, NEVER = 1, 2, 3  # `pagoda.v1.EarlyStopping`: transformers' False, True and "never"
OUT = -1e9


@dataclass(frozen=True)
class Result:
    """One output, without its prompt."""

    tokens: tuple[int, ...]
    score: float
    stopped: bool


def beam_search(
    model: Model,
    prompt: Sequence[int],
    *,
    width: int,
    n: int,
    max_tokens: int,
    stops: Sequence[int] = (),
    min_tokens: int = 0,
    length_penalty: float = 1.0,
    early_stopping: int = HEURISTIC,
    gaps: list[float] | None = None,
    halts: Callable[[tuple[int, ...]], bool] | None = None,
) -> list[Result]:
    """The n best results, best first: `_beam_search` of transformers for one prompt, arrays for tensors.

    `gaps` takes how close each decision was: who is among the best, and whether the search has ended.
    `halts` says which outputs end beside those with a stop id. Here alone the search differs from
    transformers', which takes the next best in their place: others go on alone, and branch again.
    """
    gaps = [] if gaps is None else gaps
    prompt = tuple(prompt)
    sequences = [prompt] * width
    running = np.array([0.0] + [OUT] * (width - 1))
    finished: list[Result | None] = [None] * width
    scores = np.full(width, OUT)
    length = 0
    while True:
        rows = np.stack([_masked(model(s), stops if length < min_tokens else ()) for s in sequences])
        total = rows + running[:, None]
        keep = max(2, 1 + len(stops)) * width
        order = _best(total.reshape(-1), keep + 1)
        parents, tokens = np.divmod(order, rows.shape[1])
        found = total.reshape(-1)[order]
        length += 1
        _note_gaps(gaps, found, [length >= max_tokens or t in stops for t in tokens.tolist()], width)
        parents, tokens, found = parents[:keep], tokens[:keep], found[:keep]
        outputs = [(*sequences[p], t)[len(prompt) :] for p, t in zip(parents, tokens.tolist(), strict=True)]
        hits = np.array([length >= max_tokens or output[-1] in stops for output in outputs])

        following = np.where(hits, found + OUT, found)
        chosen = np.argsort(-following, kind="stable")[:width]
        halted = np.array([bool(halts and halts(output)) for output in outputs])
        hits |= halted
        chosen = chosen[~halted[chosen]]
        merged = [*finished]
        merged_scores = [*scores]
        for i in range(width):  # no more than the best may be final
            if hits[i]:
                score = float(found[i] / length**length_penalty)
                merged.append(Result(outputs[i], score, bool(halted[i]) or outputs[i][-1] in stops))
                merged_scores.append(score)
        best = np.argsort(-np.array(merged_scores), kind="stable")[:width]
        finished, scores = [merged[i] for i in best], np.array(merged_scores)[best]
        rated = np.sort(merged_scores)[::-1]
        gaps += (rated[width - 1 : width] - rated[width : width + 1]).tolist()
        sequences = [(*sequences[parents[i]], int(tokens[i])) for i in chosen]
        running = following[chosen]

        reach = max_tokens if early_stopping == NEVER and length_penalty > 0 else length
        full = all(result is not None for result in finished)
        if full and len(chosen):
            gaps.append(abs(float(running[0] / reach**length_penalty - scores.min())))
        if not len(chosen):
            return [result for result in finished if result is not None][:n]
        hopeless = full and running[0] / reach**length_penalty <= scores.min()
        if hopeless or (full and early_stopping == FIRST) or hits.all():
            gaps += (scores[: n - 1] - scores[1:n]).tolist()
            return [result for result in finished if result is not None][:n]


def _best(values: Logprobs, count: int) -> npt.NDArray[np.int64]:
    """Places of the greatest values, greatest first, ties lowest place first."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, -count)[-count]
    places = np.flatnonzero(values >= least)
    return places[np.argsort(-values[places], kind="stable")][:count]


def _note_gaps(gaps: list[float], found: Logprobs, hits: list[bool], width: int) -> None:
    """How close a step was: who goes on, and who may be final."""
    going = found[np.logical_not(hits)]
    gaps += (going[width - 1 : width] - going[width : width + 1]).tolist()
    if any(hits[width - 1 : width + 1]):
        gaps += (found[width - 1 : width] - found[width : width + 1]).tolist()


def _masked(logprobs: Logprobs, banned: Sequence[int]) -> Logprobs:
    masked = logprobs.copy()
    masked[list(banned)] = -np.inf
    return masked
