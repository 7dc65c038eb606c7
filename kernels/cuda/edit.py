"""Bias, penalties and min_tokens on CUDA: an edited float32 copy of the logits, in two or three launches.

The copy's buffer first holds, as integers, what the history says of each token: bit 0, whether it occurs at
all, and above it, how often in the output. Integers add up to the same in any order. Then one pass reads
logits and counts and writes scores over the counts. Tokens with a bias, few a row, are worked out aside
before that pass, because the bias comes before the penalties, and are written after it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.cuda.draw import Rows, split_vocabulary
from kernels.sample import Features

BLOCK = 1024
"""Tokens that a program looks at at once."""

_NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def count_kernel(
    counts,
    slots,
    repetition,
    frequency,
    presence,
    tokens,
    num_tokens,
    num_prompt,
    stride,
    tokens_stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """Adds each row's history to its zeroed counts, int32 [rows, stride]."""
    first, row = tl.program_id(0) * BLOCK, tl.program_id(1)
    slot = tl.load(slots + row)
    length = tl.load(num_tokens + slot)
    is_off = (tl.load(repetition + slot) == 1.0) & (tl.load(frequency + slot) == 0.0)
    is_off = is_off & (tl.load(presence + slot) == 0.0)
    if (first < length) & (is_off == 0):
        place = first + tl.arange(0, BLOCK)
        token = tl.load(tokens + slot * tokens_stride + place, mask=place < length, other=-1)
        valid = (token >= 0) & (token < vocab_size)
        is_output = place >= tl.load(num_prompt + slot)
        counts += row.to(tl.int64) * stride
        tl.atomic_or(counts + token, 1, mask=valid, sem="relaxed")
        tl.atomic_add(counts + token, 2, mask=valid & is_output, sem="relaxed")


@triton.jit
def _penalise(score, seen, repetition, frequency, presence):
    """Scores after the penalties; `seen` is what the buffer holds, each step rounded as torch rounds it."""
    repeated = tl.where(score > 0, tl.div_rn(score, tl.zeros_like(score) + repetition), score * repetition)
    score = tl.where(seen > 0, repeated, score)
    count = seen >> 1
    score = score - frequency * count.to(tl.float32)
    return score - tl.where(count > 0, presence, 0.0)


@triton.jit
def edit_kernel(
    logits,
    scores,
    slots,
    repetition,
    frequency,
    presence,
    bias_ids,
    bias_values,
    stop_ids,
    min_tokens,
    num_tokens,
    num_prompt,
    logits_stride,
    scores_stride,
    logits_width,
    vocab_size,
    split_size,
    max_bias,
    max_stop_ids,
    BIAS: tl.constexpr,
    PENALTY: tl.constexpr,
    STOP: tl.constexpr,
    BIAS_LANES: tl.constexpr,
    STOP_LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A split of a row of scores, float32 [rows, scores_stride]; with PENALTY they hold counts before."""
    row = tl.program_id(1)
    start = tl.program_id(0) * split_size
    end = tl.minimum(start + split_size, vocab_size)
    slot = tl.load(slots + row)
    logits += row.to(tl.int64) * logits_stride
    scores += row.to(tl.int64) * scores_stride
    divisor, per_count, once = 1.0, 0.0, 0.0
    if PENALTY:
        divisor = tl.load(repetition + slot)
        per_count = tl.load(frequency + slot)
        once = tl.load(presence + slot)
    if BIAS:
        lanes = tl.arange(0, BIAS_LANES)
        biased = tl.load(bias_ids + slot * max_bias + lanes, mask=lanes < max_bias, other=-1)
        biased_here = (biased >= start) & (biased < end)
        sums = tl.load(logits + biased, mask=biased_here, other=0.0).to(tl.float32)
        # An id that stands twice gets both values, in their order, in both of its lanes.
        for i in range(tl.max(tl.where(biased >= 0, lanes + 1, 0), 0)):
            value = tl.load(bias_values + slot * max_bias + i)
            sums = tl.where(biased == tl.load(bias_ids + slot * max_bias + i), sums + value, sums)
        if PENALTY:
            biased_seen = tl.load(scores + biased, mask=biased_here, other=0.0).to(tl.int32, bitcast=True)
            sums = _penalise(sums, biased_seen, divisor, per_count, once)
            tl.debug_barrier()
    for first in range(start, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        score = tl.load(logits + place, mask=place < logits_width, other=_NEG_INF).to(tl.float32)
        if PENALTY:
            seen = tl.load(scores + place, mask=place < scores_stride, other=0.0).to(tl.int32, bitcast=True)
            score = _penalise(score, seen, divisor, per_count, once)
        tl.store(scores + place, score, mask=place < scores_stride)
    if BIAS:
        tl.debug_barrier()
        tl.store(scores + biased, sums, mask=biased_here)
    if STOP:
        tl.debug_barrier()
        position = tl.load(num_tokens + slot) - tl.load(num_prompt + slot)
        lanes = tl.arange(0, STOP_LANES)
        banned = tl.load(stop_ids + slot * max_stop_ids + lanes, mask=lanes < max_stop_ids, other=-1)
        is_here = (banned >= start) & (banned < end) & (position < tl.load(min_tokens + slot))
        # Added, not written: what is NaN or +inf must not be hidden.
        score = tl.load(scores + banned, mask=is_here, other=0.0)
        tl.store(scores + banned, score + _NEG_INF, mask=is_here)


def edited_scores(logits: torch.Tensor, rows: Rows, features: Features) -> torch.Tensor:
    """float32 [R, V rounded up to 16] of logits [R, >= V]; what lies behind the vocabulary has no meaning."""
    num_rows, columns = logits.shape[0], rows.columns
    shape = (num_rows, triton.cdiv(rows.vocab_size, 16) * 16)
    if features.any_penalty:
        scores = torch.zeros(shape, dtype=torch.float32, device=logits.device)
        count_kernel[(triton.cdiv(rows.tokens.shape[1], BLOCK), num_rows)](
            scores.view(torch.int32),
            rows.slots,
            columns.repetition,
            columns.frequency,
            columns.presence,
            rows.tokens,
            rows.num_tokens,
            rows.num_prompt,
            shape[1],
            rows.tokens.stride(0),
            rows.vocab_size,
            BLOCK=BLOCK,
        )
    else:
        scores = torch.empty(shape, dtype=torch.float32, device=logits.device)
    split = split_vocabulary(num_rows, rows.vocab_size, BLOCK)
    max_bias, max_stop_ids = columns.bias_ids.shape[1], columns.stop_ids.shape[1]
    edit_kernel[(split.number, num_rows)](
        logits,
        scores,
        rows.slots,
        columns.repetition,
        columns.frequency,
        columns.presence,
        columns.bias_ids,
        columns.bias_values,
        columns.stop_ids,
        columns.min_tokens,
        rows.num_tokens,
        rows.num_prompt,
        logits.stride(0),
        shape[1],
        logits.shape[1],
        rows.vocab_size,
        split.size,
        max_bias,
        max_stop_ids,
        BIAS=features.any_bias,
        PENALTY=features.any_penalty,
        STOP=features.any_min_tokens,
        BIAS_LANES=triton.next_power_of_2(max_bias),
        STOP_LANES=triton.next_power_of_2(max_stop_ids),
        BLOCK=BLOCK,
        # A product that is fused with the subtraction after it is rounded once, not twice as torch's.
        enable_fp_fusion=False,
    )
    return scores
