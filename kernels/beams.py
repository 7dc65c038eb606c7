"""The candidates of beam searches: which tokens go on their beams best, chosen without a look by the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kernels.rows import RowState
from kernels.sample import NEG_INF, Features, edited


class Searches(NamedTuple):
    """So many searches of one step that are alike: each of `num_beams` beams, of which it keeps `width`."""

    number: int
    num_beams: int
    width: int


def candidates(
    logits: torch.Tensor, slots: torch.Tensor, scores: torch.Tensor, state: RowState, vocab_size: int,
    features: Features, num_stops: int, searches: Sequence[Searches],
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:  # fmt: skip
    """The best tokens of each search, and the best of those that are no stop ids. As in transformers, bias,
    penalties and min_tokens change a token's logprob: the others' stay as they are.

    Args:
        logits: float32 or bfloat16 [N, V], V >= vocab_size: of the beams, one search's after another's.
        slots: int64[N], the beams' slots.
        scores: float32[N], what the beams have so far.
        state: read only.
        vocab_size: what lies beyond is padding.
        features: what the beams use; `max_logprobs` are the alternatives that are wanted.
        num_stops: the most stop ids of a beam.
        searches: which rows are whose, in their order.

    Returns:
        int32[3, E], 2 x width entries a search: its best, best first, and then its best that are no stop ids.
        An entry is the beam's place in its search, the token, and the score as bits: minus infinity where
        there are too few, not a number, first, where logits were not finite.
        And ids and logprobs of each beam's best tokens, [N, k]; None where `max_logprobs` is -1.
    """
    found, tops, start = [], [], 0
    for number, num_beams, width in searches:
        rows = slice(start, start + number * num_beams)
        start = rows.stop
        logprobs = torch.log_softmax(logits[rows, :vocab_size], -1, dtype=torch.float32)
        if features.max_logprobs >= 0:
            tops.append(logprobs.topk(min(features.max_logprobs, vocab_size)))
        history = slots[rows], state.columns, state.tokens, state.num_tokens, state.num_prompt
        total = edited(logprobs, *history, features).add_(scores[rows, None])
        best = total.view(number, -1).topk(width)
        stops = state.columns.stop_ids[slots[rows], :num_stops].to(torch.int64)
        # What pads does nothing where it is: an id that is not there is added nothing.
        total.scatter_add_(1, stops.clamp(min=0), torch.where(stops >= 0, NEG_INF, 0.0))
        rest = total.view(number, -1).topk(width)
        values, places = (torch.cat(part, 1) for part in zip(best, rest, strict=True))
        parents = places.div(vocab_size, rounding_mode="floor")
        entries = parents, places - parents * vocab_size, values.view(torch.int32)
        found.append(torch.stack([part.flatten().to(torch.int32) for part in entries]))
    if not tops:
        return torch.cat(found, 1), None
    return torch.cat(found, 1), (torch.cat([t.indices for t in tops]), torch.cat([t.values for t in tops]))
