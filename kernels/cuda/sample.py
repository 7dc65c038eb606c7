"""Drawing tokens on CUDA: `kernels.sample.sample` without a synchronisation, so that a graph can hold it.

The draw itself (`kernels.cuda.draw`) is two launches, and for most batches that is all. Bias, penalties and
min_tokens edit a float32 copy of the logits first (`kernels.cuda.edit`), and filters become one threshold a
row (`kernels.cuda.filter`). Their buffers are as large as the logits, so such batches go in groups of rows.

A draw equals the reference's but where two noisy logits differ by rounding: a logit's multiplication by 1 /
temperature may be fused with the addition of its noise, and logarithms may differ in the last place.
"""

from __future__ import annotations

import torch

from kernels.cuda.draw import Rows, best_of_splits, combine_splits
from kernels.cuda.edit import edited_scores
from kernels.cuda.filter import filter_thresholds
from kernels.cuda.ranks import DeviceRanks
from kernels.sample import Features, Sampled, SamplingColumns, raw_logprobs

GROUP_BYTES = 64 << 20
"""Size of a buffer with a float32 for each logit of a group of rows."""


def _sample_group(
    logits: torch.Tensor,
    rows: Rows,
    features: Features,
    token_ids: torch.Tensor,
    finite: torch.Tensor,
    ranks: DeviceRanks | None,
) -> None:
    """Draw for rows whose scratch buffers fit."""
    scores, thresholds = logits, None
    if features.any_bias or features.any_penalty or features.any_min_tokens:
        scores = edited_scores(logits, rows, features)
    if features.any_random and features.any_filter:
        maxima, _ = best_of_splits(scores, rows, any_random=False, thresholds=None)
        thresholds = filter_thresholds(scores, rows, maxima)
    values, tokens = best_of_splits(scores, rows, features.any_random, thresholds)
    combine_splits(values, tokens, token_ids, finite, ranks)


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    columns: SamplingColumns,
    tokens: torch.Tensor,
    num_tokens: torch.Tensor,
    num_prompt: torch.Tensor,
    vocab_size: int,
    features: Features,
    ranks: DeviceRanks | None = None,
) -> Sampled:
    """`kernels.sample.sample`, whose arguments these are. Results and scratch come from torch's allocator.

    Ranks draw each among its own columns and exchange what they drew; edits, filters and logprobs, which look
    at whole rows, gather these first.

    Raises:
        TypeError: the logits are not contiguous along the vocabulary.
    """
    if logits.stride(1) != 1:
        raise TypeError("logits must be contiguous along the vocabulary")
    plain = features == Features(any_random=features.any_random)
    first_id = 0
    if ranks is not None and plain:
        first_id = ranks.rank * logits.shape[1]
        vocab_size = max(0, min(logits.shape[1], vocab_size - first_id))
    elif ranks is not None:
        logits, ranks = ranks.gathered(logits), None
    num_rows = logits.shape[0]
    token_ids = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    finite = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    edits = features.any_bias or features.any_penalty or features.any_min_tokens
    filters = features.any_random and features.any_filter
    # A multiple of 16 keeps the groups' addresses aligned, for which the kernels are compiled.
    group = max(16, GROUP_BYTES // (64 * vocab_size) * 16) if edits or filters else max(num_rows, 1)
    for first in range(0, num_rows, group):
        part = slice(first, first + group)
        rows = Rows(slots[part], columns, tokens, num_tokens, num_prompt, vocab_size, first_id)
        _sample_group(logits[part], rows, features, token_ids[part], finite[part], ranks)
    logprobs = None
    if features.max_logprobs >= 0:
        logprobs = raw_logprobs(logits[:, :vocab_size].float(), token_ids, features.max_logprobs)
    return Sampled(token_ids, finite, logprobs)
