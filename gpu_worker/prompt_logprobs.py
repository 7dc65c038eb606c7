"""Logprobs of the prompts' own tokens: which of a batch's tokens they follow, and what they are.

They are those of the unmodified logits, as a drawn token's are. A chunk reports on the tokens that follow its
own, as far as the prompt goes: so each token of a prompt but the first is reported on as that is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from gpu_worker.batch import Inputs
from gpu_worker.models.decoder import Decoder, whole
from kernels.sample import SampledLogprobs, raw_logprobs

# Positions whose logits are there at once: for a vocabulary of 152,000 they take 39 MB.
SLICE = 64


@dataclass(frozen=True)
class Wanted:
    """What a batch is to report: on Q tokens of prompts.

    Attributes:
        rows: indexes into the step's rows, ascending.
        counts: on how many tokens each of them reports.
        num_top: how many of the best tokens each of them wants beside.
        places: int64[3, Q]: the batch's tokens that they follow, their slots, and where they stand there.
    """

    rows: list[int]
    counts: list[int]
    num_top: list[int]
    places: torch.Tensor


def wanted(step_slots: Sequence[int], rows: np.ndarray, put: Callable[[np.ndarray], torch.Tensor]) -> Wanted:
    """What a batch is to report.

    Args:
        step_slots: the slots of the step's rows, forks included.
        rows: int64[5, B], the rows that compute: their slots; the lengths of their chunks; where these begin;
            on how many tokens from there on they are to report, 0 or less for none; the best tokens beside.
        put: stages int64 numbers.
    """
    slots, lengths, starts, left, num_top = rows
    counts = np.minimum(lengths, left)
    own = np.flatnonzero(counts > 0)
    counts, firsts = counts[own], (np.cumsum(lengths) - lengths)[own]
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.repeat([firsts, slots[own], starts[own] + 1], counts, axis=1)
    places[[0, 2]] += offsets
    reporting = np.flatnonzero(np.isin(step_slots, slots[own])).tolist()
    return Wanted(reporting, counts.tolist(), num_top[own].tolist(), put(places.reshape(-1)).view(3, -1))


def with_told(inputs: Inputs, wanted: Wanted) -> Inputs:
    """The inputs of a forward that goes to the end with the tokens to sample from, and behind them with those
    that the wanted ones follow."""
    assert inputs.chunks is not None, "a row that computes a token before its last makes a batch ragged"
    index = torch.cat([inputs.chunks.sample_index, wanted.places[0]])
    return replace(inputs, chunks=replace(inputs.chunks, sample_index=index))


def report(
    model: Decoder, tokens: torch.Tensor, hidden: torch.Tensor, delta: torch.Tensor, wanted: Wanted
) -> tuple[tuple[torch.Tensor, torch.Tensor], SampledLogprobs]:
    """Logprobs of the wanted tokens, a slice of positions at a time.

    Args:
        model: whose logits.
        tokens: int32[S, L], each slot's tokens.
        hidden, delta: [R + Q, hidden_size], as the model's forward returns them; the Q are used up.
        wanted: what to report.

    Returns:
        Of hidden and delta the R sampling rows', and the logprobs of the Q tokens.
    """
    _, slots, positions = wanted.places
    num_samples = len(hidden) - len(slots)
    columns = hidden[num_samples:], delta[num_samples:], tokens[slots, positions]
    parts = []
    for states, deltas, targets in zip(*(column.split(SLICE) for column in columns), strict=True):
        logits = whole(model, model.logits(states, deltas))[:, : model.vocab_size]
        parts.append(vars(raw_logprobs(logits, targets, max(wanted.num_top))).values())
    logprobs = SampledLogprobs(*map(torch.cat, zip(*parts, strict=True)))
    return (hidden[:num_samples], delta[:num_samples]), logprobs
