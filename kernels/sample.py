"""Drawing the next token of each row, as a pure function: the same inputs give the same tokens anywhere.

The order of the processing, for each row:

1. raw logprobs and rank, from the logits as the model gave them (for reporting only);
2. bias is added (an id that stands twice counts twice; ids outside the vocabulary are ignored);
3. repetition penalty, over prompt and output: a positive logit is divided by it, another multiplied;
4. frequency penalty times the count, then the presence penalty once, over output tokens only;
5. stop ids are ruled out while the output position is below min_tokens;
6. a greedy row takes the best token here, ties to the lowest id, and the filters do not concern it;
7. the logits are multiplied by 1 / temperature (a float32);
8. min_p, then top_k, then top_p set one threshold: exactly the tokens whose logit reaches it are kept;
9. the draw is the kept token with the best sum of logit and Gumbel noise, ties to the lowest id.

At a filter's border, tokens of equal logit share one fate, so the outcome depends on no sorting order.
min_p keeps a token when its logit is at least the best one plus log(min_p). top_k keeps every token that
ties with the k-th best, and so may keep more than k. top_p looks at what min_p and top_k left, renormalised,
and keeps a token when all tokens strictly better than it together have less than top_p; the best are always
kept.

The noise is keyed by (seed, output position, token id): see `kernels.philox`.

Sources: the OpenAI API reference (frequency and presence penalties, bias); Keskar et al. 2019, arXiv
1909.05858 (repetition penalty); Holtzman et al. 2019, arXiv 1904.09751 (top_p); Nguyen et al. 2024, arXiv
2407.01082 (min_p); Maddison et al. 2014, arXiv 1411.0030 (argmax with Gumbel noise draws from the softmax).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch

from kernels import philox
from kernels.cpu import sample as cpu
from kernels.cpu.build import library
from kernels.ranks import Ranks

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: its reciprocal would carry logits out of float32's range."""

NEG_INF = float("-inf")
STOP = 1
LENGTH = 2


@dataclass(frozen=True)
class SamplingColumns:
    """How each row's tokens are drawn: tensors on the device, one entry a slot (S slots).

    `allocate` makes them with every feature off; the worker writes a slot's entries when a row enters it.
    """

    temperature: torch.Tensor
    """float32[S]; below `GREEDY_BELOW` is greedy."""
    top_k: torch.Tensor
    """int32[S]; 0 keeps all."""
    top_p: torch.Tensor
    """float32[S]; 1 keeps all."""
    min_p: torch.Tensor
    """float32[S]; 0 keeps all."""
    presence: torch.Tensor
    """float32[S]; presence penalty, 0 is off."""
    frequency: torch.Tensor
    """float32[S]; frequency penalty, 0 is off."""
    repetition: torch.Tensor
    """float32[S]; repetition penalty, above 0, 1 is off."""
    seed: torch.Tensor
    """int64[S]; the unsigned 64-bit seed in two's complement."""
    min_tokens: torch.Tensor
    """int32[S]; how many output tokens come before any stop id may."""
    stop_ids: torch.Tensor
    """int32[S, max_stop_ids]; -1 pads."""
    bias_ids: torch.Tensor
    """int32[S, max_bias]; -1 pads."""
    bias_values: torch.Tensor
    """float32[S, max_bias], parallel to bias_ids."""
    num_logprobs: torch.Tensor
    """int32[S]; how many best tokens are to be reported beside the drawn one, -1 for no logprobs at all."""

    @classmethod
    def allocate(
        cls, num_slots: int, device: torch.device | str, max_stop_ids: int = 64, max_bias: int = 320
    ) -> SamplingColumns:
        """Columns of `num_slots` slots on `device`, with every feature off."""

        def column(value: float, dtype: torch.dtype, *width: int) -> torch.Tensor:
            return torch.full((num_slots, *width), value, dtype=dtype, device=device)

        f32, i32 = torch.float32, torch.int32
        return cls(
            temperature=column(0, f32), top_k=column(0, i32), top_p=column(1, f32), min_p=column(0, f32),
            presence=column(0, f32), frequency=column(0, f32), repetition=column(1, f32),
            seed=column(0, torch.int64), min_tokens=column(0, i32), stop_ids=column(-1, i32, max_stop_ids),
            bias_ids=column(-1, i32, max_bias), bias_values=column(0, f32, max_bias),
            num_logprobs=column(-1, i32),
        )  # fmt: skip

    @cached_property
    def c_columns(self) -> cpu.CColumns:
        """The C path's view of these tensors, whose storage stays where it is for as long as they live."""
        return cpu.c_columns(self)


@dataclass(frozen=True)
class Features:
    """What the rows of a batch use, known on the host, so that nothing else is computed or waited for.

    A flag must be set when any row of the batch uses the feature; one that is set needlessly costs time and
    changes no token.
    """

    any_random: bool = False
    """Some row's temperature is not greedy."""
    any_filter: bool = False
    """Some row uses top_k, top_p or min_p."""
    any_penalty: bool = False
    """Some row uses the presence, frequency or repetition penalty."""
    any_bias: bool = False
    """Some row has biased tokens."""
    any_min_tokens: bool = False
    """Some row has min_tokens above 0."""
    max_logprobs: int = -1
    """The largest num_logprobs; -1 when no row wants logprobs."""


@dataclass(frozen=True)
class SampledLogprobs:
    """Logprobs of the unmodified logits.

    They mean something for rows that are finite and whose num_logprobs is not -1. All rows have the batch's
    `max_logprobs` best tokens; who sends them on takes each row's own number of them.
    """

    token_logprob: torch.Tensor
    """float32[R], of the drawn token."""
    rank: torch.Tensor
    """int32[R], of the drawn token: 1 plus the number of tokens with a greater logit."""
    top_ids: torch.Tensor
    """int32[R, k], the best tokens, best first, ties lowest id first; k = min(max_logprobs, vocab_size)."""
    top_logprobs: torch.Tensor
    """float32[R, k], parallel to top_ids."""


@dataclass(frozen=True)
class Sampled:
    """What `sample` drew, one entry a row of the batch."""

    token_ids: torch.Tensor
    """int32[R], within the vocabulary even where `finite` is False, but meaningless there."""
    finite: torch.Tensor
    """bool[R]; False where a logit within the vocabulary is NaN or +inf, or no token is left to draw."""
    logprobs: SampledLogprobs | None
    """None when `Features.max_logprobs` is -1."""


def sample(
    logits: torch.Tensor, slots: torch.Tensor, columns: SamplingColumns, tokens: torch.Tensor,
    num_tokens: torch.Tensor, num_prompt: torch.Tensor, vocab_size: int, features: Features,
    ranks: Ranks | None = None,
) -> Sampled:  # fmt: skip
    """Draw one token for each row.

    Args:
        logits: float32 or bfloat16 [R, V], V >= vocab_size; contiguous along V. Read only. With `ranks`, this
            rank's V columns, a multiple of 4, of which all ranks' side by side hold vocab_size.
        slots: int64[R], the rows' slots.
        columns: how to draw, by slot.
        tokens: int32[S, L], each slot's tokens so far, prompt first.
        num_tokens: int32[S], how many of them there are, before this draw.
        num_prompt: int32[S], how many of those are the prompt; the output position is the difference.
        vocab_size: how many ids may be drawn; logits beyond are padding and are not looked at.
        features: what the rows use.
        ranks: who has the other columns; all of them draw the same.

    Returns:
        The drawn tokens. A row's result depends on that row alone.

    Raises:
        MemoryError: the CPU's path found no memory for its scratch buffers.
        TypeError: a tensor's dtype or layout is not as stated (CPU only).
    """
    if logits.device.type == "cuda":
        from kernels.cuda import sample as cuda

        history = tokens, num_tokens, num_prompt
        return cuda.sample(logits, slots, columns, *history, vocab_size, features, cast(Any, ranks))
    if ranks is not None:
        logits = ranks.gathered(logits)
    if logits.device.type != "cpu" or library() is None:
        return sample_reference(logits, slots, columns, tokens, num_tokens, num_prompt, vocab_size, features)
    sampled = _allocate(logits.shape[0], min(features.max_logprobs, vocab_size))
    cpu.sample(logits, slots, columns, tokens, num_tokens, num_prompt, vocab_size, features, sampled)
    return sampled


def allow(logits: torch.Tensor, masks: torch.Tensor, bits: torch.Tensor) -> None:
    """Rule out, in place, what some rows may not draw.

    Args:
        logits: float32 or bfloat16 [R, V]; contiguous along V.
        masks: int32[R]: which mask is each row's; below 0 for a row that may draw anything.
        bits: int32[G, W], contiguous along W: a token a bit, 32 a word, the lowest bit first; 0 rules a token
            out. What lies beyond the last bit stays as it is. Logits that begin at a later id, a multiple of
            32, take the words from there on.
    """
    if logits.is_cuda:
        from kernels.cuda import allow as cuda

        cuda.allow(logits, masks, bits)
        return
    places = torch.arange(32, dtype=torch.int32)
    index = masks.ge(0).nonzero().flatten()
    if not len(index):
        return
    words = bits.index_select(0, masks.index_select(0, index))
    ruled_out = (words.unsqueeze(-1) >> places).bitwise_and_(1).view(len(words), -1) == 0
    part = logits[:, : ruled_out.shape[1]]
    kept = part.index_select(0, index).masked_fill_(ruled_out[:, : part.shape[1]], NEG_INF)
    part.index_copy_(0, index, kept)


def _allocate(num_rows: int, num_top: int) -> Sampled:
    """Results on the CPU; num_top below 0 is without logprobs."""
    token_ids = torch.empty(num_rows, dtype=torch.int32)
    finite = torch.empty(num_rows, dtype=torch.bool)
    if num_top < 0:
        return Sampled(token_ids, finite, None)
    rank = torch.zeros(num_rows, dtype=torch.int32)
    top_ids = torch.zeros((num_rows, num_top), dtype=torch.int32)
    logprobs = SampledLogprobs(torch.zeros(num_rows), rank, top_ids, torch.zeros((num_rows, num_top)))
    return Sampled(token_ids, finite, logprobs)


def sample_reference(
    logits: torch.Tensor, slots: torch.Tensor, columns: SamplingColumns, tokens: torch.Tensor,
    num_tokens: torch.Tensor, num_prompt: torch.Tensor, vocab_size: int, features: Features,
) -> Sampled:  # fmt: skip
    """`sample` in plain torch, on any device and without a synchronisation; the arguments are the same."""
    raw = logits[:, :vocab_size].float()
    position = (num_tokens - num_prompt)[slots]
    scores = edited(raw, slots, columns, tokens, num_tokens, num_prompt, features)
    # A maximum is NaN when any entry is, so two of them tell all there is to know.
    finite = raw.amax(-1).isfinite() & scores.amax(-1).isfinite()
    token_ids = scores.argmax(-1)
    if features.any_random:
        temperature = columns.temperature[slots]
        greedy = temperature < GREEDY_BELOW
        scaled = scores * torch.where(greedy, 1.0, temperature).reciprocal().unsqueeze(1)
        noisy = scaled + philox.gumbel(philox.token_uniforms(columns.seed[slots], position, vocab_size))
        if features.any_filter:
            noisy = torch.where(scaled >= _filter_threshold(scaled, slots, columns), noisy, NEG_INF)
        token_ids = torch.where(greedy, token_ids, noisy.argmax(-1))
    token_ids = token_ids.to(torch.int32)
    logprobs = raw_logprobs(raw, token_ids, features.max_logprobs) if features.max_logprobs >= 0 else None
    return Sampled(token_ids, finite, logprobs)


def edited(
    scores: torch.Tensor, slots: torch.Tensor, columns: SamplingColumns, tokens: torch.Tensor,
    num_tokens: torch.Tensor, num_prompt: torch.Tensor, features: Features,
) -> torch.Tensor:  # fmt: skip
    """Scores (float32 [R, vocab_size]) after bias, penalties and min_tokens: steps 2 to 5, in plain torch.
    The other arguments are `sample`'s. What uses none of these is returned as it is."""
    if features.any_bias:
        ids = columns.bias_ids[slots]
        scores = _add_at(scores, ids, torch.where(ids >= 0, columns.bias_values[slots], 0.0))
    if features.any_penalty:
        scores = _penalise(scores, slots, columns, tokens, num_tokens, num_prompt)
    if features.any_min_tokens:
        ids = columns.stop_ids[slots]
        early = (num_tokens - num_prompt)[slots] < columns.min_tokens[slots]
        banned = (ids >= 0) & early.unsqueeze(1)
        scores = _add_at(scores, ids, torch.where(banned, NEG_INF, 0.0))
    return scores


def _add_at(scores: torch.Tensor, ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Scores plus values at ids; ids outside the vocabulary add nothing."""
    inside = (ids >= 0) & (ids < scores.shape[1])
    index = torch.where(inside, ids, 0).to(torch.int64)
    return scores.scatter_add(1, index, torch.where(inside, values, 0.0))


def _penalise(
    scores: torch.Tensor, slots: torch.Tensor, columns: SamplingColumns, tokens: torch.Tensor,
    num_tokens: torch.Tensor, num_prompt: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Scores after the repetition, frequency and presence penalties."""
    history = tokens[slots].to(torch.int64)
    place = torch.arange(history.shape[1], device=history.device).unsqueeze(0)
    # What lies behind a row's last token is left over from the slot's earlier rows.
    written = (place < num_tokens[slots].unsqueeze(1)) & (history >= 0) & (history < scores.shape[1])
    history = torch.where(written, history, 0)
    output = written & (place >= num_prompt[slots].unsqueeze(1))
    zeros = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
    seen = zeros.scatter_add(1, history, written.to(torch.int32)) > 0
    counts = zeros.scatter_add(1, history, output.to(torch.int32))
    repetition = columns.repetition[slots].unsqueeze(1)
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(seen, repeated, scores)
    scores = scores - columns.frequency[slots].unsqueeze(1) * counts
    return scores - columns.presence[slots].unsqueeze(1) * (counts > 0)


def _filter_threshold(scaled: torch.Tensor, slots: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
    """float32[R, 1]: the least logit that min_p, top_k and top_p keep."""
    ordered = scaled.sort(dim=-1, descending=True).values
    best = ordered[:, :1]
    # log(0) is -inf, which keeps all.
    threshold = best + columns.min_p[slots].unsqueeze(1).log()
    top_k = columns.top_k[slots].to(torch.int64).unsqueeze(1)
    top_k = torch.where(top_k > 0, top_k, scaled.shape[1]).clamp(max=scaled.shape[1])
    threshold = torch.maximum(threshold, ordered.gather(1, top_k - 1))
    # In float64, because a float32 sum over a large vocabulary would move the border.
    weights = torch.where(ordered >= threshold, (ordered - best).exp(), 0.0).to(torch.float64)
    mass = weights.cumsum(-1)
    top_p = columns.top_p[slots].unsqueeze(1)
    num_kept = (mass - weights < top_p * mass[:, -1:]).sum(-1, keepdim=True).clamp(min=1)
    return torch.maximum(threshold, torch.where(top_p < 1, ordered.gather(1, num_kept - 1), NEG_INF))


def raw_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> SampledLogprobs:
    """Logprobs and rank of the drawn tokens, and the best tokens.

    Args:
        logits: float32[R, vocab_size].
        token_ids: int32[R].
        num_top: how many of the best tokens; 0 is allowed.
    """
    chosen = logits.gather(1, token_ids.to(torch.int64).unsqueeze(1))
    normaliser = logits.logsumexp(-1, keepdim=True)
    rank = (logits > chosen).sum(-1, dtype=torch.int32) + 1
    num_top = min(num_top, logits.shape[1])
    if num_top == 0:
        top_ids = torch.empty((logits.shape[0], 0), dtype=torch.int64, device=logits.device)
    else:
        # Logit and id become one integer, so that ties have an order whichever way topk works. A float's bits
        # compare like the float once a negative number's are flipped; adding 0 makes -0 equal to 0.
        bits = (logits + 0.0).view(torch.int32)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        ids = torch.arange(logits.shape[1], dtype=torch.int64, device=logits.device)
        keys = (bits.to(torch.int64) << 32) | (philox.MASK32 - ids)
        top_ids = philox.MASK32 - (keys.topk(num_top, dim=-1).values & philox.MASK32)
    top_logprobs = logits.gather(1, top_ids) - normaliser
    return SampledLogprobs((chosen - normaliser).squeeze(1), rank, top_ids.to(torch.int32), top_logprobs)


def ended(
    token_ids: torch.Tensor, slots: torch.Tensor, columns: SamplingColumns, num_tokens_after: torch.Tensor,
    num_prompt: torch.Tensor, last_position: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Whether each row's new token is its last one.

    Args:
        token_ids: int32[R], the new tokens.
        slots: int64[R], the rows' slots.
        columns: stop_ids and min_tokens are read.
        num_tokens_after: int32[S], tokens of each slot, the new one included.
        num_prompt: int32[S], how many of those are the prompt.
        last_position: int32[S], how many tokens fill the row.

    Returns:
        int8[R]: 1 (`STOP`) where the token is one of the row's stop ids and min_tokens come before it, else
        2 (`LENGTH`) where the row is full, else 0.
    """
    length = num_tokens_after[slots]
    is_stop = (columns.stop_ids[slots] == token_ids.unsqueeze(1)).any(-1)
    is_stop &= length - num_prompt[slots] > columns.min_tokens[slots]
    is_full = length >= last_position[slots]
    return torch.where(is_stop, STOP, torch.where(is_full, LENGTH, 0)).to(torch.int8)
