"""`kernels.layer` on CUDA: for few rows four launches a layer beside attention's; for more, cuBLAS."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import triton

from kernels.cuda.activation import silu_and_mul
from kernels.cuda.attention import paged_attention
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
from kernels.ranks import Place

if TYPE_CHECKING:
    from kernels.cuda.ranks import Brought, DeviceRanks
    from kernels.layer import Layer, Step
    from kernels.linear import PackedLinear


def forward(
    layers: list[Layer], hidden: torch.Tensor, step: Step, ranks: DeviceRanks | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.layer.LayerStack.forward`; arguments are checked there."""
    if hidden.shape[0] <= SKINNY_ROWS and layers[0].qkv.dtype is torch.bfloat16:
        return forward_skinny(layers, hidden, step, ranks)
    if ranks is not None and ranks.pieces(hidden.shape[0]):
        return forward_carried(layers, hidden, step, ranks)
    return forward_wide(layers, hidden, step, ranks)


def forward_skinny(
    layers: list[Layer], hidden: torch.Tensor, step: Step, ranks: DeviceRanks | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` for few rows. Every product but the last adds to `hidden` and prepares the norm behind it."""
    first, tokens = layers[0], hidden.shape[0]
    qkv, attended = _rows(first.qkv, tokens), _rows(first.o, tokens, inputs=True)
    activated, out = _rows(first.down, tokens, inputs=True), torch.empty_like(hidden)
    normed = Normed(_rows(first.o, tokens), _squares(first, hidden), 1, first.eps)
    scale_and_square(hidden, first.input_norm, normed.scaled, normed.squares)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        _project_skinny(layer, normed, step, qkv)
        _attend(layer, qkv, step, attended)
        normed = _add_skinny(attended, layer.o, hidden, layer.post_norm, normed, ranks, Place.ATTENDED)
        gated_linear(normed, layer.gate_up, activated)
        if following is not None:
            norm = following.input_norm
            normed = _add_skinny(activated, layer.down, hidden, norm, normed, ranks, Place.FED)
    if ranks is None:
        return step.select(hidden, skinny_linear(activated, layers[-1].down, out))
    slots = ranks.slots(Place.FED, hidden.shape[0], hidden.shape[1], activated.dtype)
    part = skinny_linear(activated, layers[-1].down, slots.own, remotes=slots.remotes)
    return step.select(hidden, ranks.summed(Place.FED, part, out, slots.parts))


def forward_wide(
    layers: list[Layer], hidden: torch.Tensor, step: Step, ranks: DeviceRanks | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` for any number of rows. Behind the last attention only the wanted ones go on."""
    first, tokens = layers[0], hidden.shape[0]
    qkv, attended = _rows(first.qkv, tokens), _rows(first.o, tokens, inputs=True)
    rows = normed, gate_up, activated = _feed_forward_rows(first, tokens)
    rms_norm(hidden, first.input_norm, first.eps, None, normed)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        wide_linear(normed, layer.qkv, qkv)
        _rotate(layer, qkv, step)
        _attend(layer, qkv, step, attended)
        if following is not None:
            _add_wide(attended, layer.o, hidden, layer.post_norm, layer.eps, normed, ranks, Place.ATTENDED)
            wide_linear(normed, layer.gate_up, gate_up)
            silu_and_mul(gate_up, activated)
            norm = following.input_norm
            _add_wide(activated, layer.down, hidden, norm, layer.eps, normed, ranks, Place.FED)
    return _finish_wide(layers[-1], hidden, attended, rows, step, ranks)


def forward_carried(
    layers: list[Layer], hidden: torch.Tensor, step: Step, ranks: DeviceRanks
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward_wide` of two ranks for so many rows that they are cut in pieces: while one's part of a sum is
    brought from the peer, another's products run. Attention, and what is behind the last one, is of all."""
    first, tokens = layers[0], hidden.shape[0]
    qkv, attended = _rows(first.qkv, tokens), _rows(first.o, tokens, inputs=True)
    rows = normed, gate_up, activated = _feed_forward_rows(first, tokens)
    rms_norm(hidden, first.input_norm, first.eps, None, normed)
    wide_linear(normed, first.qkv, qkv)
    for layer, following in pairwise(layers):
        _rotate(layer, qkv, step)
        _attend(layer, qkv, step, attended)
        part = _part(ranks, Place.ATTENDED, hidden, attended.dtype)
        projected = [
            _bring(attended, layer.o, part, piece, ranks, Place.ATTENDED) for piece in ranks.pieces(tokens)
        ]
        part, fed = _part(ranks, Place.FED, hidden, activated.dtype), []
        for brought in projected:
            piece = brought.rows
            ranks.add_brought(brought, hidden, layer.post_norm, layer.eps, normed)
            wide_linear(normed[piece], layer.gate_up, gate_up[piece])
            silu_and_mul(gate_up[piece], activated[piece])
            fed.append(_bring(activated, layer.down, part, piece, ranks, Place.FED))
        for brought in fed:
            ranks.add_brought(brought, hidden, following.input_norm, layer.eps, normed)
            wide_linear(normed[brought.rows], following.qkv, qkv[brought.rows])
    _rotate(layers[-1], qkv, step)
    _attend(layers[-1], qkv, step, attended)
    return _finish_wide(layers[-1], hidden, attended, rows, step, ranks)


def _finish_wide(
    layer: Layer, hidden: torch.Tensor, attended: torch.Tensor, rows: tuple[torch.Tensor, ...], step: Step,
    ranks: DeviceRanks | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What is behind the last attention, of the wanted tokens; `rows` is room for all."""
    if step.wanted is not None:  # more than all, where several forks want one
        hidden, attended = step.select(hidden, attended)
        rows = _feed_forward_rows(layer, len(step.wanted))
    normed, gate_up, activated = rows
    _add_wide(attended, layer.o, hidden, layer.post_norm, layer.eps, normed, ranks, Place.ATTENDED)
    wide_linear(normed, layer.gate_up, gate_up)
    silu_and_mul(gate_up, activated)
    out = torch.empty_like(hidden)
    if ranks is None:
        return hidden, wide_linear(activated, layer.down, out)
    part = wide_linear(activated, layer.down, _part(ranks, Place.FED, out, activated.dtype))
    return hidden, ranks.summed(Place.FED, part, out)


def _bring(
    x: torch.Tensor, packed: PackedLinear, part: torch.Tensor, piece: slice, ranks: DeviceRanks, place: Place
) -> Brought:
    """x W^T + bias of a piece, and the peer's on their way."""
    wide_linear(x[piece], packed, part[piece])
    return ranks.bring(place, part, piece)


def _add_skinny(
    x: torch.Tensor, packed: PackedLinear, hidden: torch.Tensor, norm: torch.Tensor, normed: Normed,
    ranks: DeviceRanks | None, place: Place,
) -> Normed:  # fmt: skip
    """hidden += x W^T + bias over all ranks, and what the next norm is made of."""
    if ranks is None:
        return residual_linear(x, packed, hidden, norm, normed)
    slots = ranks.slots(place, hidden.shape[0], hidden.shape[1], x.dtype)
    part = skinny_linear(x, packed, slots.own, remotes=slots.remotes)
    ranks.add(place, part, hidden, norm, normed.eps, normed.scaled, normed.squares, slots.parts)
    return normed._replace(parts=1)


def _add_wide(
    x: torch.Tensor, packed: PackedLinear, hidden: torch.Tensor, norm: torch.Tensor, eps: float,
    normed: torch.Tensor, ranks: DeviceRanks | None, place: Place,
) -> None:  # fmt: skip
    """hidden += x W^T + bias over all ranks; its norm to `normed`."""
    if ranks is not None:
        part = wide_linear(x, packed, _part(ranks, place, hidden, x.dtype))
        ranks.add(place, part, hidden, norm, eps, normed)
        return
    if hidden.dtype is x.dtype:
        hidden.addmm_(x, packed.data.t())
    else:
        torch.addmm(hidden, x, packed.data.t(), out_dtype=hidden.dtype, out=hidden)
    if packed.bias is not None:
        hidden.add_(packed.bias)
    rms_norm(hidden, norm, eps, None, normed)


def _part(ranks: DeviceRanks, place: Place, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return ranks.part(place, like.shape[0], like.shape[1], dtype)


def _rows(packed: PackedLinear, tokens: int, inputs: bool = False) -> torch.Tensor:
    """Room for what a projection gives, or takes."""
    width = packed.in_features if inputs else packed.out_features
    return torch.empty(tokens, width, dtype=packed.dtype, device=packed.data.device)


def _feed_forward_rows(layer: Layer, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for a norm's result, for gates and ups, and for what they make."""
    return _rows(layer.o, tokens), _rows(layer.gate_up, tokens), _rows(layer.down, tokens, inputs=True)


def _squares(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    """Room for the sums of squares that the largest number of tiles writes."""
    bm, width = padded_rows(hidden.shape[0]), hidden.shape[1]
    parts = 1
    for packed in (layer.o, layer.down):
        tile = choose_tile(width, packed.in_features, bm, packed.dtype.itemsize, hidden.device)
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
        layer.scale, out.view(q.shape), layer.sliding_window, step.table_rows, step.tiles, k, v,
    )  # fmt: skip
