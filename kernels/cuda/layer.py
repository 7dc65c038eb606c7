"""`kernels.layer` on CUDA: for few rows four launches a layer beside attention's; for more, cuBLAS."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from kernels.attention import paged_attention
from kernels.cuda.activation import silu_and_mul
from kernels.cuda.linear import (
    SKINNY_ROWS,
    Normed,
    Rotation,
    choose_tile,
    gated_linear,
    padded_rows,
    residual_linear,
    rotated_linear,
    skinny_linear,
    wide_linear,
)
from kernels.cuda.norm import rms_norm, scale_and_square
from kernels.cuda.rope import rope_and_cache

if TYPE_CHECKING:
    from kernels.layer import Layer, Step
    from kernels.linear import PackedLinear


def forward(layers: list[Layer], hidden: torch.Tensor, step: Step, out: torch.Tensor) -> torch.Tensor:
    """See `kernels.layer.LayerStack.forward`; arguments are checked there."""
    if hidden.shape[0] <= SKINNY_ROWS and hidden.dtype is torch.bfloat16:
        return forward_skinny(layers, hidden, step, out)
    return forward_wide(layers, hidden, step, out)


def forward_skinny(layers: list[Layer], hidden: torch.Tensor, step: Step, out: torch.Tensor) -> torch.Tensor:
    """`forward` for few rows. Every product but the last adds to `hidden` and prepares the norm behind it."""
    tokens, inner = hidden.shape[0], layers[0].down.in_features
    qkv, attended = _projections(layers[0], hidden)
    activated = hidden.new_empty(tokens, inner)
    normed = Normed(torch.empty_like(hidden), _squares(layers[0], hidden), 1, layers[0].eps)
    scale_and_square(hidden, layers[0].input_norm, normed.scaled, normed.squares)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        _project_skinny(layer, normed, step, qkv)
        _attend(layer, qkv, step, attended)
        normed = residual_linear(attended, layer.o, hidden, layer.post_norm, normed)
        gated_linear(normed, layer.gate_up, activated)
        if following is not None:
            normed = residual_linear(activated, layer.down, hidden, following.input_norm, normed)
    return skinny_linear(activated, layers[-1].down, out)


def forward_wide(layers: list[Layer], hidden: torch.Tensor, step: Step, out: torch.Tensor) -> torch.Tensor:
    """`forward` for any number of rows."""
    qkv, attended = _projections(layers[0], hidden)
    normed = torch.empty_like(hidden)
    gate_up = hidden.new_empty(hidden.shape[0], layers[0].gate_up.out_features)
    activated = hidden.new_empty(hidden.shape[0], layers[0].down.in_features)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        rms_norm(hidden, layer.input_norm, layer.eps, None, normed)
        wide_linear(normed, layer.qkv, qkv)
        _rotate(layer, qkv, step)
        _attend(layer, qkv, step, attended)
        _add_wide(attended, layer.o, hidden)
        rms_norm(hidden, layer.post_norm, layer.eps, None, normed)
        wide_linear(normed, layer.gate_up, gate_up)
        silu_and_mul(gate_up, activated)
        if following is not None:
            _add_wide(activated, layer.down, hidden)
    return wide_linear(activated, layers[-1].down, out)


def _add_wide(x: torch.Tensor, packed: PackedLinear, hidden: torch.Tensor) -> None:
    hidden.addmm_(x, packed.data.t())
    if packed.bias is not None:
        hidden.add_(packed.bias)


def _projections(layer: Layer, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for q, k and v, [T, (Hq + 2 Hk) D], and for what attention gives, [T, Hq D]."""
    tokens = hidden.shape[0]
    return hidden.new_empty(tokens, layer.qkv.out_features), hidden.new_empty(tokens, layer.o.in_features)


def _squares(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    """Room for the sums of squares that the largest number of tiles writes."""
    bm, width = padded_rows(hidden.shape[0]), hidden.shape[1]
    parts = 1
    for packed in (layer.o, layer.down):
        tile = choose_tile(width, packed.in_features, bm, hidden.itemsize, hidden.device)
        parts = max(parts, triton.cdiv(width, tile.rows))
    return torch.empty(parts, bm, dtype=torch.float32, device=hidden.device)


def _project_skinny(layer: Layer, normed: Normed, step: Step, qkv: torch.Tensor) -> None:
    if layer.q_norm is None and layer.k_norm is None:
        caches = layer.key_cache, layer.value_cache
        rotation = Rotation(step.cos_sin, step.positions, step.slot_mapping, *caches, layer.num_heads)
        rotated_linear(normed, layer.qkv, rotation, qkv)
        return
    skinny_linear(normed, layer.qkv, qkv)
    _rotate(layer, qkv, step)


def _split(layer: Layer, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views [T, heads, D] of q, k and v."""
    _, num_kv_heads, _, dim = layer.value_cache.shape
    heads = qkv.unflatten(1, (-1, dim))
    keys = layer.num_heads + num_kv_heads
    return heads[:, : layer.num_heads], heads[:, layer.num_heads : keys], heads[:, keys:]


def _rotate(layer: Layer, qkv: torch.Tensor, step: Step) -> None:
    q, k, v = _split(layer, qkv)
    if layer.q_norm is not None:
        rms_norm(q, layer.q_norm, layer.eps, None, q)
    if layer.k_norm is not None:
        rms_norm(k, layer.k_norm, layer.eps, None, k)
    caches = layer.key_cache, layer.value_cache
    rope_and_cache(q, k, v, step.cos_sin, step.positions, *caches, step.slot_mapping)


def _attend(layer: Layer, qkv: torch.Tensor, step: Step, out: torch.Tensor) -> None:
    q, k, v = _split(layer, qkv)
    paged_attention(
        q, layer.key_cache, layer.value_cache, step.block_tables, step.query_start, step.seq_lens,
        layer.scale, out.view(q.shape), layer.sliding_window,
        table_rows=step.table_rows, tiles=step.tiles, new_keys=k, new_values=v,
    )  # fmt: skip
