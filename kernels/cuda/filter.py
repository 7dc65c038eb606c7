"""min_p, top_k and top_p on CUDA: one threshold for each row, without sorting it.

With the row's best logit known, three launches find the threshold:

1. the survey counts and weighs the tokens within several depths of the best;
2. the tokens of the least depth that must contain the border are copied out, close together and in any order;
3. one program a row bisects the order-preserving integers of the copied logits: first for the greatest
   threshold that top_k tokens reach, then for the greatest that top_p of what is left reaches.

As a rule the copy is small, and the bisection's passes over it take no time; on a flat row it is the
vocabulary, and the passes read it from L2.

A token weighs exp(logit - best) in units of 2^-40, as an int64. Integers add up to the same in any order, so
the threshold does not depend on how the work is split. Against the reference's float64 sums a weight is off
by at most 1e-6 of itself and 2^-40 of the best one's: a token may fall on the border's other side where the
mass before it and top_p are that close.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.cuda.draw import MAX_SPLITS, Rows, inverse_temperature, load_scores, split_vocabulary

SURVEY_BLOCK = 512
"""Tokens that the survey looks at at once, each at every depth."""
COPY_BLOCK = 1024
BORDER_BLOCK = 4096
BORDER_WARPS = 16
DEPTHS = 8
"""Depths of the survey: 2, 4 and so on below the best, and as the last one all that min_p leaves."""

_DEPTHS = tl.constexpr(DEPTHS)
_MAX_SPLITS = tl.constexpr(MAX_SPLITS)
_NEG_INF = tl.constexpr(float("-inf"))
_INF = tl.constexpr(float("inf"))
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_ONE = tl.constexpr(2.0**40)
# A row's totals: the depths' counts, the depths' weights, and how many tokens were copied.
_WEIGHTS = tl.constexpr(DEPTHS)
_COPIED = tl.constexpr(2 * DEPTHS)
_TOTALS = tl.constexpr(2 * DEPTHS + 1)


@triton.jit
def _row_plan(row, slots, temperature, top_k, top_p, log_min_p, maxima, num_splits, vocab_size):
    """What all three launches need of a row.

    Returns (the scale of its logits, its best scaled logit, min_p's threshold, top_k or 0, top_p, whether a
    border must be searched). A row that is greedy or not finite has no threshold and is not searched.
    """
    slot = tl.load(slots + row)
    inverse = inverse_temperature(temperature, slot)
    lanes = tl.arange(0, _MAX_SPLITS)
    value = tl.load(maxima + row * num_splits + lanes, mask=lanes < num_splits, other=_NEG_INF)
    is_bad = tl.max((value != value).to(tl.int32), 0) > 0
    best = tl.max(tl.where(value == value, value, _NEG_INF), 0) * inverse
    k = tl.load(top_k + slot)
    k = tl.where(k < vocab_size, k, 0)
    p = tl.load(top_p + slot)
    is_random = (inverse > 0.0) & (is_bad == 0) & (best > _NEG_INF) & (best < _INF)
    floor = tl.where(is_random, best + tl.load(log_min_p + slot), _NEG_INF)
    return inverse, best, floor, k, p, is_random & ((k > 0) | (p < 1.0))


@triton.jit
def _depth_cuts(best, floor):
    """The least logit of each depth, falling; the last one is that of all tokens that min_p leaves."""
    depth = tl.arange(0, _DEPTHS)
    cut = tl.where(depth < _DEPTHS - 1, best - 2.0 * (depth + 1).to(tl.float32), _LOWEST)
    return tl.maximum(cut, floor)


@triton.jit
def _token_weight(scaled, best):
    return (tl.exp(scaled - best) * _ONE).to(tl.int64)


@triton.jit
def _chosen_cut(totals, best, floor, k, p):
    """The cut of the least depth that contains the border, and the weight of all that min_p leaves."""
    depth = tl.arange(0, _DEPTHS)
    weight = tl.load(totals + _WEIGHTS + depth)
    all_weight = tl.sum(tl.where(depth == _DEPTHS - 1, weight, 0), 0)
    has_k = tl.load(totals + depth) >= k
    has_p = weight.to(tl.float64) >= p.to(tl.float64) * all_weight.to(tl.float64)
    # Where top_k applies, top_p looks at what it leaves, which lies above the same cut.
    enough = tl.where(k > 0, has_k, has_p) | (depth == _DEPTHS - 1)
    return tl.max(tl.where(enough, _depth_cuts(best, floor), _NEG_INF), 0), all_weight


@triton.jit
def survey_kernel(
    scores,
    slots,
    temperature,
    top_k,
    top_p,
    log_min_p,
    maxima,
    totals,
    stride,
    width,
    num_splits,
    vocab_size,
    split_size,
    BLOCK: tl.constexpr,
):
    """Adds a split's counts and weights at all depths to its row's zeroed totals."""
    row = tl.program_id(1)
    inverse, best, floor, _k, _p, is_searched = _row_plan(
        row, slots, temperature, top_k, top_p, log_min_p, maxima, num_splits, vocab_size
    )
    if is_searched:
        start = tl.program_id(0) * split_size
        end = tl.minimum(start + split_size, vocab_size)
        scores += row.to(tl.int64) * stride
        cuts = _depth_cuts(best, floor)
        count = tl.zeros([BLOCK, _DEPTHS], tl.int32)
        weight = tl.zeros([BLOCK, _DEPTHS], tl.int64)
        for first in range(start, end, BLOCK):
            scaled = load_scores(scores, first + tl.arange(0, BLOCK), width, vocab_size) * inverse
            reached = scaled[:, None] >= cuts[None, :]
            count += reached.to(tl.int32)
            weight += tl.where(reached, _token_weight(scaled, best)[:, None], 0)
        out = totals + row * _TOTALS + tl.arange(0, _DEPTHS)
        tl.atomic_add(out, tl.sum(count, 0).to(tl.int64), sem="relaxed")
        tl.atomic_add(out + _WEIGHTS, tl.sum(weight, 0), sem="relaxed")


@triton.jit
def copy_kernel(
    scores,
    slots,
    temperature,
    top_k,
    top_p,
    log_min_p,
    maxima,
    totals,
    copies,
    stride,
    width,
    copies_stride,
    num_splits,
    vocab_size,
    split_size,
    BLOCK: tl.constexpr,
):
    """Copies a split's scaled logits at the chosen depth, float32, to its row's others."""
    row = tl.program_id(1)
    inverse, best, floor, k, p, is_searched = _row_plan(
        row, slots, temperature, top_k, top_p, log_min_p, maxima, num_splits, vocab_size
    )
    if is_searched:
        start = tl.program_id(0) * split_size
        end = tl.minimum(start + split_size, vocab_size)
        scores += row.to(tl.int64) * stride
        totals += row * _TOTALS
        copies += row.to(tl.int64) * copies_stride
        cut, _ = _chosen_cut(totals, best, floor, k, p)
        for first in range(start, end, BLOCK):
            scaled = load_scores(scores, first + tl.arange(0, BLOCK), width, vocab_size) * inverse
            is_taken = scaled >= cut
            taken = is_taken.to(tl.int32)
            number = tl.sum(taken, 0)
            if number > 0:
                place = tl.atomic_add(totals + _COPIED, number.to(tl.int64), sem="relaxed")
                tl.store(copies + place + tl.cumsum(taken, 0) - 1, scaled, mask=is_taken)


@triton.jit
def _key_of(value):
    """An int32 that compares as the float does."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _measure(copies, size, bound, best, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    """int64: how many of the copied logits reach the bound, or how much they weigh."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int64)
    for first in range(0, size, BLOCK):
        scaled = tl.load(copies + first + lanes, mask=first + lanes < size, other=_NEG_INF)
        amount = _token_weight(scaled, best) if WEIGHTS else tl.full([BLOCK], 1, tl.int64)
        total += tl.where(scaled >= bound, amount, 0)
    return tl.sum(total, 0)


@triton.jit
def _border(copies, size, low, best, target, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest threshold whose measure reaches the target; that of `low` does."""
    lower = _key_of(low).to(tl.int64)
    upper = _key_of(best).to(tl.int64) + 1
    while upper - lower > 1:
        middle = (lower + upper) >> 1
        measure = _measure(copies, size, _value_of(middle.to(tl.int32)), best, WEIGHTS, BLOCK)
        is_reached = measure.to(tl.float64) >= target
        lower = tl.where(is_reached, middle, lower)
        upper = tl.where(is_reached, upper, middle)
    return _value_of(lower.to(tl.int32))


@triton.jit
def border_kernel(
    slots,
    temperature,
    top_k,
    top_p,
    log_min_p,
    maxima,
    totals,
    copies,
    thresholds,
    copies_stride,
    num_splits,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """Each row's threshold, float32[R]; -inf keeps all."""
    row = tl.program_id(0)
    _, best, floor, k, p, is_searched = _row_plan(
        row, slots, temperature, top_k, top_p, log_min_p, maxima, num_splits, vocab_size
    )
    threshold = floor
    if is_searched:
        totals += row * _TOTALS
        copies += row.to(tl.int64) * copies_stride
        size = tl.load(totals + _COPIED).to(tl.int32)
        cut, weight = _chosen_cut(totals, best, floor, k, p)
        if k > 0:
            # Where fewer are left, the k-th best lies below min_p's threshold or is -inf.
            if size >= k:
                threshold = tl.maximum(
                    threshold, _border(copies, size, cut, best, k.to(tl.float64), False, BLOCK)
                )
            if p < 1.0:
                weight = _measure(copies, size, threshold, best, True, BLOCK)
        if p <= 0.0:
            threshold = best
        elif p < 1.0:
            low = tl.maximum(threshold, cut)
            target = p.to(tl.float64) * weight.to(tl.float64)
            threshold = tl.maximum(threshold, _border(copies, size, low, best, target, True, BLOCK))
    tl.store(thresholds + row, threshold)


def filter_thresholds(scores: torch.Tensor, rows: Rows, maxima: torch.Tensor) -> torch.Tensor:
    """The least scaled logit that each row's filters keep, float32[R]; -inf keeps all.

    Args:
        scores: float32 or bfloat16 [R, >= V], after bias and penalties.
        rows: how they are drawn.
        maxima: float32 [R, splits], the best scores of the rows' splits; NaN where a row is not finite.
    """
    num_rows, columns = scores.shape[0], rows.columns
    totals = torch.zeros((num_rows, 2 * DEPTHS + 1), dtype=torch.int64, device=scores.device)
    shape = (num_rows, triton.cdiv(rows.vocab_size, 16) * 16)
    copies = torch.empty(shape, dtype=torch.float32, device=scores.device)
    thresholds = torch.empty(num_rows, dtype=torch.float32, device=scores.device)
    plan = (rows.slots, columns.temperature, columns.top_k, columns.top_p, columns.min_p.log(), maxima)
    layout, num_splits = (scores.stride(0), scores.shape[1]), maxima.shape[1]
    split = split_vocabulary(num_rows, rows.vocab_size, SURVEY_BLOCK)
    survey_kernel[(split.number, num_rows)](
        scores, *plan, totals, *layout, num_splits, rows.vocab_size, split.size, BLOCK=SURVEY_BLOCK
    )
    split = split_vocabulary(num_rows, rows.vocab_size, COPY_BLOCK)
    sizes = (shape[1], num_splits, rows.vocab_size, split.size)
    copy_kernel[(split.number, num_rows)](scores, *plan, totals, copies, *layout, *sizes, BLOCK=COPY_BLOCK)
    border_kernel[(num_rows,)](
        *plan,
        totals,
        copies,
        thresholds,
        shape[1],
        num_splits,
        rows.vocab_size,
        BLOCK=BORDER_BLOCK,
        num_warps=BORDER_WARPS,
    )
    return thresholds
