"""Between the wire's `RowSampling` and the kernels' columns: defaults, and which features a batch uses."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from kernels.sample import GREEDY_BELOW, Features
from pagoda.internal.v1 import worker_pb2

MAX_STOP_IDS = 1024
MAX_BIAS = 320


class Trait(IntEnum):
    """What a row uses, as bits; those of a batch's rows, or'ed, are its features."""

    RANDOM = 1
    FILTER = 2
    PENALTY = 4
    BIAS = 8
    MIN_TOKENS = 16
    GRAMMAR = 32


@dataclass(frozen=True)
class RowColumns:
    """One row's entries in the sampling columns."""

    integers: tuple[int, ...]
    """In the order of `kernels.rows.INTEGERS`."""
    floats: tuple[float, ...]
    """In the order of `kernels.rows.FLOATS`."""
    traits: int
    num_logprobs: int


def row_columns(sampling: worker_pb2.RowSampling) -> RowColumns:
    """Entries of one row; what is absent is off.

    Raises:
        ValueError: more stop ids or biased tokens than a row holds, or biases without values.
    """
    s = sampling
    num_bias = len(s.bias_token_ids)
    if len(s.stop_token_ids) > MAX_STOP_IDS or num_bias > MAX_BIAS or num_bias != len(s.bias_values):
        raise ValueError(
            f"{len(s.stop_token_ids)} stop ids (at most {MAX_STOP_IDS}), {num_bias} biased ids "
            f"(at most {MAX_BIAS}), {len(s.bias_values)} bias values"
        )
    top_p = s.top_p if s.HasField("top_p") else 1.0
    repetition = s.repetition_penalty if s.HasField("repetition_penalty") else 1.0
    num_logprobs = s.num_logprobs if s.HasField("num_logprobs") else -1
    traits = int(Trait.RANDOM) if s.temperature >= GREEDY_BELOW else 0
    if s.top_k or s.min_p or top_p < 1.0:
        traits |= Trait.FILTER
    if s.presence_penalty or s.frequency_penalty or repetition != 1.0:
        traits |= Trait.PENALTY
    if num_bias:
        traits |= Trait.BIAS
    if s.min_tokens:
        traits |= Trait.MIN_TOKENS
    if s.grammar:
        traits |= Trait.GRAMMAR
    return RowColumns(
        integers=(s.top_k, s.min_tokens, num_logprobs),
        floats=(s.temperature, top_p, s.min_p, s.presence_penalty, s.frequency_penalty, repetition),
        traits=traits,
        num_logprobs=num_logprobs,
    )


@lru_cache
def features_of(bits: int, max_logprobs: int) -> Features:
    """What a batch uses, from its sampling rows' traits, or'ed, and their largest number of logprobs."""
    return Features(
        any_random=bool(bits & Trait.RANDOM),
        any_filter=bool(bits & Trait.FILTER),
        any_penalty=bool(bits & Trait.PENALTY),
        any_bias=bool(bits & Trait.BIAS),
        any_min_tokens=bool(bits & Trait.MIN_TOKENS),
        max_logprobs=max_logprobs,
    )
