"""The parts of a Llama-shaped decoder: its working buffers and one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_worker.models.config import ModelConfig
from kernels.attention import paged_attention
from kernels.linear import PackedLinear, linear, silu_and_mul_linear
from kernels.norm import head_rms_norm, rms_norm
from kernels.rope import rope_and_cache


@dataclass(frozen=True)
class ForwardInputs:
    """What one forward reads: T tokens of B rows, one after another."""

    token_ids: torch.Tensor
    """int32[T]."""
    positions: torch.Tensor
    """int32[T]."""
    slot_mapping: torch.Tensor
    """int64[T]: block * block_size + offset that takes the token's keys and values; -1 writes none."""
    block_tables: torch.Tensor
    """int32[B, MB]."""
    query_start: torch.Tensor
    """int32[B + 1]: where each row's tokens begin."""
    seq_lens: torch.Tensor
    """int32[B]: tokens of each row whose keys are in the cache after this forward."""


@dataclass(frozen=True, slots=True)
class Views:
    """The working buffers of a forward of T tokens."""

    hidden: torch.Tensor
    qkv: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    heads: torch.Tensor
    """What attention writes, [T, num_heads, head_dim]."""
    attended: torch.Tensor
    """The same memory, [T, num_heads * head_dim]."""
    gate_up: torch.Tensor


class Activations:
    """Working buffers for the largest batch, so that a forward allocates nothing."""

    def __init__(self, config: ModelConfig, max_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        c = config
        self._q, self._kv, self._dim = c.num_heads, c.num_kv_heads, c.head_dim

        def buffer(width: int) -> torch.Tensor:
            return torch.empty((max_tokens, width), dtype=dtype, device=device)

        self._hidden = buffer(c.hidden_size)
        self._qkv = buffer((c.num_heads + 2 * c.num_kv_heads) * c.head_dim)
        self._attended = buffer(c.num_heads * c.head_dim)
        self._gate_up = buffer(2 * c.intermediate_size)
        self._cached: dict[int, Views] = {}

    def views(self, num_tokens: int) -> Views:
        """The buffers' first `num_tokens` rows. Small counts, those of decode batches, are kept."""
        if (views := self._cached.get(num_tokens)) is not None:
            return views
        n, q, kv, dim = num_tokens, self._q, self._kv, self._dim
        qkv = self._qkv[:n]
        heads = qkv.view(n, q + 2 * kv, dim)
        views = Views(
            hidden=self._hidden[:n],
            qkv=qkv,
            q=heads[:, :q],
            k=heads[:, q : q + kv],
            v=heads[:, q + kv :],
            heads=self._attended[:n].view(n, q, dim),
            attended=self._attended[:n],
            gate_up=self._gate_up[:n],
        )
        if num_tokens <= 256:
            self._cached[num_tokens] = views
        return views


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's weights."""

    input_norm: torch.Tensor
    qkv: PackedLinear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: PackedLinear
    post_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear
    sliding_window: int | None

    def forward(
        self,
        residual: torch.Tensor,
        views: Views,
        inputs: ForwardInputs,
        rotations: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        eps: float,
        first: bool,
    ) -> None:
        """Run the layer on `views.hidden`, which has yet to be added to `residual` (the first layer's input is
        `residual` alone), and leave its output in `views.hidden` in the same way."""
        hidden = views.hidden
        if first:
            rms_norm(residual, self.input_norm, eps, out=hidden)
        else:
            rms_norm(hidden, self.input_norm, eps, residual=residual, out=hidden)
        linear(hidden, self.qkv, out=views.qkv)
        q, k, v = views.q, views.k, views.v
        if self.q_norm is not None:
            head_rms_norm(q, self.q_norm, eps, out=q)
            head_rms_norm(k, self.k_norm, eps, out=k)
        keys, values = cache
        rope_and_cache(q, k, v, rotations, inputs.positions, keys, values, inputs.slot_mapping)
        paged_attention(
            q,
            keys,
            values,
            inputs.block_tables,
            inputs.query_start,
            inputs.seq_lens,
            q.shape[-1] ** -0.5,
            out=views.heads,
            sliding_window=self.sliding_window,
        )
        linear(views.attended, self.o, out=hidden)
        rms_norm(hidden, self.post_norm, eps, residual=residual, out=hidden)
        linear(hidden, self.gate_up, out=views.gate_up)
        silu_and_mul_linear(views.gate_up, self.down, out=hidden)
