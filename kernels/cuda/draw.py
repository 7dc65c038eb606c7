"""The best token of each row on CUDA, with noise or without: what every draw ends in, and most consist of.

A first launch cuts each row into splits and finds each split's best token: greedy rows are read and compared;
random rows take the noise into the bargain, computed in registers from (seed, position, id), so that the
logits are read once and nothing of the vocabulary's size is written. A second finds the best of each row's
splits. Which of the two a row is, its temperature on the device says.

Where ranks hold columns each, the second also exchanges its rank's best with the others' (see
`kernels.cuda.ranks`), and takes the best of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import philox
from kernels.cuda.meet import addresses, epoch_of, meet
from kernels.cuda.ranks import PROGRAMS as RANK_PROGRAMS
from kernels.cuda.ranks import DeviceRanks
from kernels.sample import GREEDY_BELOW, SamplingColumns

BLOCK = 1024
"""Tokens that a program looks at at once."""
NUM_WARPS = 4
PROGRAMS = 2112
"""About how many programs share a batch: 16 for each of 132 SMs, so that one row busies them all."""
MAX_SPLITS = 256
"""Most splits of a row, so that one warp can hold their results."""

_MAX_SPLITS = tl.constexpr(MAX_SPLITS)
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_NEG_INF = tl.constexpr(float("-inf"))
_INF = tl.constexpr(float("inf"))
_NO_TOKEN = tl.constexpr(2**31 - 1)
_MULTIPLIER0 = tl.constexpr(philox.MULTIPLIERS[0])
_MULTIPLIER1 = tl.constexpr(philox.MULTIPLIERS[1])
_WEYL0 = tl.constexpr(philox.WEYL[0])
_WEYL1 = tl.constexpr(philox.WEYL[1])
_ROUNDS = tl.constexpr(philox.ROUNDS)
_HALF_STEP = tl.constexpr(2.0**-24)


class Rows(NamedTuple):
    """What `kernels.sample.sample` is told of the rows of a batch, or a part of it, beside their logits; and
    which id is the logits' first, a multiple of 4, with `vocab_size` of them from there."""

    slots: torch.Tensor
    columns: SamplingColumns
    tokens: torch.Tensor
    num_tokens: torch.Tensor
    num_prompt: torch.Tensor
    vocab_size: int
    first_id: int = 0


class Split(NamedTuple):
    """How a row's vocabulary is cut: the grid's first dimension, and tokens of each piece."""

    number: int
    size: int


def split_vocabulary(num_rows: int, vocab_size: int, block: int) -> Split:
    """Pieces of whole blocks, so many that about `PROGRAMS` programs have work, at most `MAX_SPLITS`."""
    blocks = max(1, triton.cdiv(vocab_size, block))  # a rank may hold nothing but padding
    number = min(blocks, MAX_SPLITS, max(1, PROGRAMS // num_rows))
    size = triton.cdiv(blocks, number) * block
    return Split(triton.cdiv(blocks * block, size), size)


@triton.jit
def inverse_temperature(temperature, slot):
    """What a row's logits are multiplied by; 0 when the row is greedy."""
    value = tl.load(temperature + slot)
    return tl.where(value >= _GREEDY_BELOW, tl.div_rn(1.0, tl.maximum(value, _GREEDY_BELOW)), 0.0)


@triton.jit
def load_scores(scores, place, width, vocab_size):
    """A row's logits as float32 at `place`; -inf behind the vocabulary.

    They are read to the row's `width`, as a rule a multiple of 16, for which loads are wide; `vocab_size`
    need not be one.
    """
    score = tl.load(scores + place, mask=place < width, other=_NEG_INF).to(tl.float32)
    return tl.where(place < vocab_size, score, _NEG_INF)


@triton.jit
def philox_words(call, position, key0, key1):
    """The four words of each call: uint32 like `call`, see `kernels.philox`. All arguments are uint32."""
    c0 = call
    c1 = tl.zeros_like(call) + position
    c2 = tl.zeros_like(call)
    c3 = tl.zeros_like(call)
    for _ in tl.static_range(_ROUNDS):
        # One wide multiplication gives both halves of the product.
        product0 = c0.to(tl.uint64) * _MULTIPLIER0
        product1 = c2.to(tl.uint64) * _MULTIPLIER1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = product0.to(tl.uint32)
        key0 = (key0 + _WEYL0).to(tl.uint32)
        key1 = (key1 + _WEYL1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def gumbel_noise(words):
    """float32 noise of uint32 words: -log(-log(uniform)).

    `tl.log` is libdevice's logf, right within one unit in the last place. The hardware's own logarithm, whose
    error is absolute near 1, would not do for the inner one.
    """
    # The word's upper 23 bits as a mantissa: 1 <= ahead < 2, and the sums below are exact.
    ahead = ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    uniform = (ahead - 1.0) + _HALF_STEP
    return -tl.log(-tl.log(uniform))


@triton.jit
def _quarters(values, BLOCK: tl.constexpr):
    """The values at 4i, 4i + 1, 4i + 2 and 4i + 3 of BLOCK of them."""
    even, odd = values.reshape([BLOCK // 4, 2, 2]).split()
    value0, value2 = even.split()
    value1, value3 = odd.split()
    return value0, value1, value2, value3


@triton.jit
def _winner(best, token, bad):
    """One best value and its lowest token of all lanes'; NaN when any lane met what is not finite."""
    top = tl.max(best, 0)
    winner = tl.min(tl.where(best == top, token, _NO_TOKEN), 0)
    return tl.where(tl.max(bad.to(tl.int32), 0) > 0, float("nan"), top), winner


@triton.jit
def _best(scores, start, end, width, vocab_size, BLOCK: tl.constexpr):
    """Best score and token of a split, without noise."""
    best = tl.full([BLOCK], _NEG_INF, tl.float32)
    token = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int1)
    for first in range(start, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        score = load_scores(scores, place, width, vocab_size)
        bad = bad | (score != score) | (score == _INF)
        token = tl.where(score > best, place, token)
        best = tl.where(score > best, score, best)
    return _winner(best, token, bad)


@triton.jit
def _best_noisy(
    scores,
    start,
    end,
    width,
    vocab_size,
    inverse,
    threshold,
    position,
    seed,
    first_id,
    FILTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Best sum of scaled score and noise of a split, and its token; only scaled scores >= threshold count.
    The noise is that of ids from `first_id` on."""
    best = tl.full([BLOCK // 4], _NEG_INF, tl.float32)
    token = tl.zeros([BLOCK // 4], tl.int32)
    bad = tl.zeros([BLOCK // 4], tl.int1)
    for first in range(start, end, BLOCK):
        scores4 = _quarters(load_scores(scores, first + tl.arange(0, BLOCK), width, vocab_size), BLOCK)
        place = first + 4 * tl.arange(0, BLOCK // 4)
        words4 = philox_words(
            ((first_id + place) // 4).to(tl.uint32),
            position.to(tl.uint32),
            seed.to(tl.uint32),
            (seed >> 32).to(tl.uint32),
        )
        for j in tl.static_range(4):
            score = scores4[j]
            bad = bad | (score != score) | (score == _INF)
            scaled = score * inverse
            noisy = scaled + gumbel_noise(words4[j])
            if FILTERED:
                noisy = tl.where(scaled >= threshold, noisy, _NEG_INF)
            token = tl.where(noisy > best, place + j, token)
            best = tl.where(noisy > best, noisy, best)
    return _winner(best, token, bad)


@triton.jit(do_not_specialize=["split_size"])
def draw_kernel(
    scores,
    slots,
    temperature,
    seeds,
    num_tokens,
    num_prompt,
    thresholds,
    values,
    tokens,
    stride,
    width,
    vocab_size,
    split_size,
    first_id,
    RANDOM: tl.constexpr,
    FILTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Best value and token of each split and row, into [rows, splits]; the value NaN: it is not finite."""
    split, row = tl.program_id(0), tl.program_id(1)
    start = split * split_size
    end = tl.minimum(start + split_size, vocab_size)
    scores += row.to(tl.int64) * stride
    out = row * tl.num_programs(0) + split
    inverse = 0.0
    if RANDOM:
        slot = tl.load(slots + row)
        inverse = inverse_temperature(temperature, slot)
        if inverse > 0.0:
            threshold = tl.load(thresholds + row) if FILTERED else _NEG_INF
            position = tl.load(num_tokens + slot) - tl.load(num_prompt + slot)
            seed = tl.load(seeds + slot)
            value, token = _best_noisy(
                scores,
                start,
                end,
                width,
                vocab_size,
                inverse,
                threshold,
                position,
                seed,
                first_id,
                FILTERED,
                BLOCK,
            )
        else:
            value, token = _best(scores, start, end, width, vocab_size, BLOCK)
    else:
        value, token = _best(scores, start, end, width, vocab_size, BLOCK)
    tl.store(values + out, value)
    tl.store(tokens + out, first_id + token)


@triton.jit
def _best_of_row(values, tokens, row, num_splits):
    """The best value of a row's splits, its lowest token, and how many of them are not finite. Where all are,
    no lane equals the top, and the token is _NO_TOKEN."""
    lanes = tl.arange(0, _MAX_SPLITS)
    inside = lanes < num_splits
    value = tl.load(values + row * num_splits + lanes, mask=inside, other=_NEG_INF)
    token = tl.load(tokens + row * num_splits + lanes, mask=inside, other=_NO_TOKEN)
    bad = tl.max((value != value).to(tl.int32), 0)
    top = tl.max(tl.where(value == value, value, _NEG_INF), 0)
    return top, tl.min(tl.where(value == top, token, _NO_TOKEN), 0), bad


@triton.jit(do_not_specialize=["num_splits"])
def combine_kernel(values, tokens, token_ids, finite, num_splits):
    """The best of each row's splits: token_ids int32[R] and finite bool[R]."""
    row = tl.program_id(0)
    top, winner, bad = _best_of_row(values, tokens, row, num_splits)
    tl.store(token_ids + row, tl.where(winner == _NO_TOKEN, 0, winner))
    tl.store(finite + row, (bad == 0) & (top > _NEG_INF))


@triton.jit(do_not_specialize=["num_splits", "num_rows", "rank", "quiet"])
def combine_ranks_kernel(
    values, tokens, token_ids, finite, flags, own_flags, rooms, own, num_splits, num_rows, rank, quiet,
    SIZE: tl.constexpr,
):  # fmt: skip
    """The same over all ranks' splits. A row's room holds two candidates, value and token each, of which the
    epoch's lowest bit chooses one; see `kernels.cuda.ranks`."""
    their_flags, their_rooms = addresses(flags, own_flags, SIZE), addresses(rooms, own, SIZE)
    half = (epoch_of(own_flags, rank, SIZE) & 1) * 2
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        top, winner, bad = _best_of_row(values, tokens, row, num_splits)
        top = tl.where(bad > 0, float("nan"), top)
        tl.store(own + row * 4 + half, top.to(tl.int32, bitcast=True))
        tl.store(own + row * 4 + half + 1, winner)
    meet(their_flags, own_flags, rank, quiet, SIZE)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        best, token, good = _NEG_INF, 0, True
        for peer in tl.static_range(SIZE):
            place = their_rooms[peer] + row * 4 + half
            top = tl.load(place, cache_modifier=".cg").to(tl.float32, bitcast=True)
            winner = tl.load(place + 1, cache_modifier=".cg")
            good = good & (top == top)
            token = tl.where(top > best, winner, token)  # ties stay with the lower rank, whose ids are lower
            best = tl.where(top > best, top, best)
        good = good & (best > _NEG_INF)
        tl.store(token_ids + row, tl.where(good, token, 0))
        tl.store(finite + row, good)


def best_of_splits(
    scores: torch.Tensor, rows: Rows, any_random: bool, thresholds: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the draw: values float32 and tokens int32, both [rows, splits], of scores [rows, width]."""
    num_rows = scores.shape[0]
    split = split_vocabulary(num_rows, rows.vocab_size, BLOCK)
    values = torch.empty((num_rows, split.number), dtype=torch.float32, device=scores.device)
    tokens = torch.empty((num_rows, split.number), dtype=torch.int32, device=scores.device)
    draw_kernel[(split.number, num_rows)](
        scores,
        rows.slots,
        rows.columns.temperature,
        rows.columns.seed,
        rows.num_tokens,
        rows.num_prompt,
        values if thresholds is None else thresholds,
        values,
        tokens,
        scores.stride(0),
        scores.shape[1],
        rows.vocab_size,
        split.size,
        rows.first_id,
        RANDOM=any_random,
        FILTERED=thresholds is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return values, tokens


def combine_splits(
    values: torch.Tensor,
    tokens: torch.Tensor,
    token_ids: torch.Tensor,
    finite: torch.Tensor,
    ranks: DeviceRanks | None = None,
) -> None:
    """Write token_ids int32[rows] and finite bool[rows] from what `best_of_splits` returned, on all ranks."""
    rows, splits = values.shape
    results = values, tokens, token_ids, finite
    if ranks is None:
        combine_kernel[(rows,)](*results, splits, num_warps=1)
        return
    rooms, size, quiet = ranks.drawing(rows)
    # As many programs as there are rows, so that a row is always the same one's.
    combine_ranks_kernel[(min(rows, RANK_PROGRAMS),)](
        *results, *rooms, splits, rows, ranks.rank, quiet, SIZE=size, num_warps=1
    )
