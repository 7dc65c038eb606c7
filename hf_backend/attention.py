"""Paged attention as transformers' attention function, for flat batches of many rows.

transformers' modules call the function that is registered under their configuration's name with queries,
keys and values of the batch's tokens and with what the registered mask function returned. Here that is the
rule itself, "may position q look at position k", and not a matrix: it is asked for each row of the batch.
Causal attention goes to the kernel; whatever that cannot express is computed in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from hf_backend.pages import Pages, Row
from kernels.attention import paged_attention
from kernels.layer import Step

NAME = "pagoda_paged"
# Scores that are computed at a time, in plain torch.
SCORES = 1 << 26
Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class CannotAttend(Exception):
    """A module asks for what attention over pages of many rows cannot give; such a model runs row by row."""


@dataclass(frozen=True)
class Mask:
    """Goes through transformers' modules in a mask's place: batch, head, q, k -> whether q sees k."""

    rule: Rule


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of a forward; `row` is what its cache writes to."""

    step: Step
    row: Row


_current: ContextVar[Batch] = ContextVar("batch")


@contextmanager
def attending(batch: Batch) -> Iterator[None]:
    """Attention within is over the pages of this batch."""
    token = _current.set(batch)
    try:
        yield
    finally:
        _current.reset(token)


def _mask(*args: Any, mask_function: Rule, **kwargs: Any) -> Mask:
    return Mask(mask_function)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mask,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """[1, T, heads, dims] of queries [1, heads, T, dims]; keys and values are in the pages already."""
    if not isinstance(attention_mask, Mask):
        raise CannotAttend("it makes masks of its own, which say nothing of rows in pages")
    if position_bias is not None:
        raise CannotAttend("it adds position biases to the scores")
    batch = _current.get()
    pages = batch.row.updated
    if pages is None:
        raise CannotAttend("its attention stores no keys and values")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    plain = attention_mask.rule is causal_mask_function and not softcap and s_aux is None
    if plain and q.is_cpu and pages.fits(k, v) and q.dtype == v.dtype and not q.shape[1] % v.shape[1]:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        step = batch.step
        rows = (step.block_tables, step.query_start, step.seq_lens)
        paged_attention(
            q.contiguous(), pages.keys, pages.values, *rows, scale, out, table_rows=step.table_rows
        )
    else:
        out = torch_attention(q, k, v, pages, batch.step, attention_mask.rule, scale, softcap, s_aux)
    return out.unsqueeze(0), None


def torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: Pages, step: Step, rule: Rule, scale: float,
    softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of any rule, row after row; scores and sums are float32.

    Args:
        q: [T, Hq, D].
        k: [T, Hk, D]; only its shape counts, the numbers are read from the pages.
        v: [T, Hk, Dv], likewise.
        pages: keys and values of the layer.
        step: the batch's rows.
        rule: whether position q sees position k.
        scale: multiplies the scores.
        softcap: c tanh(scores / c) where given.
        sinks: [Hq] logits that take part in each softmax and add nothing, where given.

    Returns:
        [T, Hq, Dv], zeros for tokens of no row.
    """
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    tables = step.block_tables if step.table_rows is None else step.block_tables[step.table_rows]
    starts, lengths = step.query_start.tolist(), step.seq_lens.tolist()
    zero = torch.zeros((), dtype=torch.int64, device=q.device)
    group = q.shape[1] // k.shape[1]
    for row, length in enumerate(lengths):
        first, end = starts[row], starts[row + 1]
        if first == end:
            continue
        keys, values = pages.read(tables[row], length, k.shape[1], k.shape[2], v.shape[2])
        keys, values = (x.float().repeat_interleave(group, dim=0) for x in (keys, values))
        position = torch.arange(length - (end - first), length, device=q.device).unsqueeze(1)
        token = torch.arange(length, device=q.device)
        piece = max(1, SCORES // (q.shape[1] * length))
        pieces = (x.split(piece) for x in (q[first:end], position, out[first:end]))
        for queries, at, into in zip(*pieces, strict=True):
            scores = queries.transpose(0, 1).float() @ keys.transpose(1, 2) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~rule(zero, zero, at, token), float("-inf"))
            if sinks is not None:
                column = sinks.float().view(-1, 1, 1).expand(-1, len(at), 1)
                scores = torch.cat((scores, column), dim=-1)
            weights = scores.softmax(-1)[..., :length]
            into.copy_((weights @ values).transpose(0, 1))
    return out


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
