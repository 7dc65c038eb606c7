"""Beam searches in a step: how beams go on, and which rows get candidates, from columns to tensors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from gpu_worker.buffers import Staging
from gpu_worker.host_rows import HostRows, StepError
from gpu_worker.sampler import features_of
from kernels.beams import Searches
from kernels.sample import Features
from pagoda.internal.v1 import worker_pb2

# Rows that are looked at together, so that what is as large as their logits stays small beside KV memory.
MOST_ROWS = 256


@dataclass(frozen=True)
class Beams:
    """The rows of a batch that get candidates, N of them.

    Attributes:
        rows: int64[N], places among the batch's logits.
        slots: int64[N].
        scores: float32[N].
        features: what they use.
        num_stops: the most stop ids of a row.
        num_logprobs: for each row, -1 where it wants none; in host memory.
        searches: which rows are whose.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    scores: torch.Tensor
    features: Features
    num_stops: int
    num_logprobs: list[int]
    searches: list[Searches]


def moves(step: worker_pb2.Step, host: HostRows, staging: Staging) -> tuple[torch.Tensor, ...]:
    """Let beams go on: stage `staging.Diff.moves`, and follow the rows' counts.

    Raises:
        StepError: the columns contradict each other, or a parent is not where a beam can go on from.
    """
    slots, parents = np.array(step.beam_slots, np.int64), np.array(step.beam_parent_slots, np.int64)
    if not len(slots) == len(parents) == len(step.beam_tokens) == len(set(step.beam_slots)):
        raise StepError("the columns of beams differ in length, or a slot stands twice")
    for slot in (*step.beam_slots, *step.beam_parent_slots):
        host.check_used(slot)
    length = host.num_tokens[parents]
    if (host.num_computed[parents] != length).any():
        raise StepError("a beam goes on from a row whose last token is not computed")
    for counts in (host.num_tokens, host.num_computed, host.num_blocks):
        counts[slots] = counts[parents]
    host.num_tokens[slots] += 1
    copied, put = slots != parents, staging.put_long
    return put(slots[copied]), put(parents[copied]), put(slots), staging.put(step.beam_tokens)


def searches(
    step: worker_pb2.Step, sampling: np.ndarray, host: HostRows, staging: Staging
) -> tuple[Beams, np.ndarray]:
    """Stage a step's searches; they draw nothing, and their rows' counts are as if they had lost a token.

    Args:
        sampling: int64[R], slots of the rows whose logits there are, in order.

    Returns:
        The searches, and which of the R rows draw (bool).

    Raises:
        StepError: the columns contradict each other, or a row's last token is not computed once.
    """
    counts, rows = step.beam_counts, np.array(step.beam_rows, np.int64)
    parallel = len(counts) == len(step.beam_widths) and len(rows) == len(step.beam_scores) == sum(counts)
    if not parallel or rows.max() >= len(step.slots) or len(set(step.beam_rows)) != len(rows):
        raise StepError(f"step {step.step_id}: the columns of searches contradict each other")
    slots = np.array(step.slots, np.int64)[rows]
    draws = ~np.isin(sampling, slots)
    if step.num_iterations > 1 or len(sampling) - draws.sum() != len(slots):
        raise StepError(f"step {step.step_id}: a beam's last token is not computed once")
    host.num_tokens[slots] -= 1
    place = np.zeros(len(host.used), np.int64)
    place[sampling] = np.arange(len(sampling))
    num_logprobs = host.num_logprobs[slots].tolist()
    scores = np.array(step.beam_scores, np.float32).view(np.int32)
    alike = []
    for (num_beams, width), run in groupby(zip(counts, step.beam_widths, strict=True)):
        left, most = len(list(run)), MOST_ROWS // num_beams
        alike += [Searches(min(most, left - done), num_beams, width) for done in range(0, left, most)]
    beams = Beams(
        rows=staging.put_long(place[slots]),
        slots=staging.put_long(slots),
        scores=staging.put(scores).view(torch.float32),
        features=features_of(int(np.bitwise_or.reduce(host.traits[slots])), max(num_logprobs)),
        num_stops=int(host.num_stops[slots].max()),
        num_logprobs=num_logprobs,
        searches=alike,
    )
    return beams, draws
