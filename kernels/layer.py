"""Decoder layers of Llama's shape in one call: norm, attention, norm and feed-forward of each layer in turn.

They are made of this package's other operations and give their results bit for bit. What the one call saves
is the time between them: a decode of one token is some 270 calls, of a few microseconds each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from kernels.attention import Tiles, check_caches, check_rows, paged_attention
from kernels.checks import require
from kernels.cpu.functions import f32, fields, function, i32, i64, ptr
from kernels.linear import PackedLinear, linear, silu_and_mul_linear
from kernels.norm import head_rms_norm, rms_norm
from kernels.ranks import Place, Ranks
from kernels.rope import rope_and_cache

Product = Callable[..., torch.Tensor]

_c_layers = function("pagoda_layers_run", ptr, i32, ptr, ptr, ptr)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's weights, its cache and its constants; all tensors of one type, float32 or bfloat16.

    Attributes:
        input_norm: [H], before attention.
        qkv: [(Hq + 2 Hk) D, H].
        o: [H, Hq D].
        post_norm: [H], before the feed-forward block.
        gate_up: [2 I, H].
        down: [H, I].
        key_cache: see `kernels.attention.cache_shape`.
        value_cache: see `kernels.attention.cache_shape`.
        num_heads: Hq.
        eps: of every norm.
        scale: of the attention scores.
        q_norm: [D] or None; for Qwen3's norm of every query head.
        k_norm: [D] or None; for Qwen3's norm of every key head.
        sliding_window: how many tokens a query sees, itself included; None for all.
    """

    input_norm: torch.Tensor
    qkv: PackedLinear
    o: PackedLinear
    post_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    num_heads: int
    eps: float
    scale: float
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    sliding_window: int | None = None

    def check(self) -> None:
        """Raises ValueError, naming the attribute, where shapes or types do not belong together."""
        hidden, dtype, dim = self.qkv.in_features, self.qkv.dtype, self.value_cache.shape[3]
        num_kv_heads, _ = check_caches(self.key_cache, self.value_cache, dtype, dim)
        attended, inner = self.num_heads * dim, self.down.in_features
        shapes = {
            "qkv": (attended + 2 * num_kv_heads * dim, hidden),
            "o": (hidden, attended),
            "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
        }
        for name, shape in shapes.items():
            packed = getattr(self, name)
            found = packed.out_features, packed.in_features, packed.dtype, packed.out_dtype
            if found != (*shape, dtype, dtype):
                raise ValueError(f"{name} must be {dtype} {list(shape)}")
        if self.num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of {num_kv_heads}, not {self.num_heads}")
        norms = {"input_norm": hidden, "post_norm": hidden, "q_norm": dim, "k_norm": dim}
        for name, size in norms.items():
            weight = getattr(self, name)
            if weight is not None or name not in ("q_norm", "k_norm"):
                require(name, weight, dtype, (size,))


@dataclass(frozen=True, eq=False)
class Step:
    """One iteration's tokens and rows, as `rope_and_cache` and `paged_attention` take them.

    Attributes:
        cos_sin: [max_len, D] float32.
        positions: [T] int32.
        slot_mapping: [T] int64.
        block_tables: [B, MB] int32; with `table_rows`, [S, MB] of all slots.
        query_start: [B + 1] int32.
        seq_lens: [B] int32.
        table_rows: [B] int64: the row of `block_tables` that is row b's; None for row b itself.
        tiles: how attention on a GPU cuts up the queries of rows with more than one; None if none has.
        wanted: [R] int64: the tokens whose states are asked for; None for all.
    """

    cos_sin: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    table_rows: torch.Tensor | None = None
    tiles: Tiles | None = None
    wanted: torch.Tensor | None = None

    def select(self, one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The wanted tokens' rows of two [T, ...]."""
        if self.wanted is None:
            return one, other
        return one.index_select(0, self.wanted), other.index_select(0, self.wanted)

    def check(self, tokens: int, dim: int) -> None:
        """Raises ValueError, naming the attribute, where a shape, type or stride is wrong."""
        require("cos_sin", self.cos_sin, torch.float32, (*self.cos_sin.shape[:1], dim))
        require("positions", self.positions, torch.int32, (tokens,))
        require("slot_mapping", self.slot_mapping, torch.int64, (tokens,))
        check_rows(self.block_tables, self.query_start, self.seq_lens, self.table_rows)
        if self.wanted is not None:
            require("wanted", self.wanted, torch.int64, self.wanted.shape[:1])


class _CLayer(ctypes.Structure):
    """`pagoda_layer` of cpu/layer.h."""

    _fields_ = fields(
        (ptr, "qkv o gate_up down input_norm post_norm q_norm k_norm keys values"),
        (i32, "num_heads num_kv_heads head_dim block_size window"),
        (f32, "eps scale"),
        (i32, "padding"),
    )


class _CStep(ctypes.Structure):
    """`pagoda_step` of cpu/layer.h."""

    _fields_ = fields(
        (ptr, "cos_sin positions slots block_tables query_start seq_lens"),
        (i64, "table_stride tokens num_rows"),
    )


class LayerStack:
    """Layers that run one after the other. The tensors of each stay where they are while the stack lives.

    With `ranks`, the layers are this rank's part: what `o` and `down` give is summed over all of them.

    Raises:
        ValueError: a layer's shapes or types do not belong together; the message names the attribute.
    """

    def __init__(self, layers: list[Layer], ranks: Ranks | None = None) -> None:
        for layer in layers:
            layer.check()
        self.layers, self._ranks = layers, ranks
        if layers and layers[0].qkv.data.is_cuda:
            from kernels.cuda.linear import workspace

            workspace(layers[0].qkv.data.device)
        in_c = all(p.address for layer in layers for p in (layer.qkv, layer.o, layer.gate_up, layer.down))
        alone = ranks is None
        self._c = (_CLayer * len(layers))(*map(_c_layer, layers)) if in_c and layers and alone else None

    @property
    def residual_dtype(self) -> torch.dtype:
        """The type of the sums that go from layer to layer. On CUDA float32: rounding them to bfloat16 after
        each block is half of the error of a bfloat16 model's logits."""
        data = self.layers[0].qkv.data
        return torch.float32 if data.is_cuda else self.layers[0].qkv.dtype

    def forward(self, hidden: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs all layers over an iteration's tokens and writes their keys and values to the caches.

        Args:
            hidden: [T, H] contiguous, the embeddings, of `residual_dtype`; used up.
            step: the iteration's tokens and rows.

        Returns:
            Two [R, H], of the tokens that `step.wanted` names: their state before the last feed-forward block
            and what that adds to it. The final norm is `rms_norm(second, weight, eps, residual=first)`.

        Raises:
            ValueError: a shape, type or stride is wrong; the message names the argument.
        """
        first = self.layers[0]
        tokens = hidden.shape[0]
        require("hidden", hidden, self.residual_dtype, (tokens, first.qkv.in_features))
        step.check(tokens, first.value_cache.shape[3])
        if hidden.is_cuda:
            from kernels.cuda import layer

            return layer.forward(self.layers, hidden, step, cast(Any, self._ranks))
        if self._c is None or not hidden.is_cpu:
            return step.select(hidden, forward_reference(self.layers, hidden, step, self._ranks))
        out = torch.empty_like(hidden)
        c_step = _CStep(
            step.cos_sin.data_ptr(), step.positions.data_ptr(), step.slot_mapping.data_ptr(),
            step.block_tables.data_ptr(), step.query_start.data_ptr(), step.seq_lens.data_ptr(),
            step.block_tables.stride(0), tokens, step.seq_lens.shape[0],
        )  # fmt: skip
        _c_layers()(self._c, len(self._c), ctypes.byref(c_step), hidden.data_ptr(), out.data_ptr())
        return step.select(hidden, out)


def _c_layer(layer: Layer) -> _CLayer:
    _, num_kv_heads, block_size, dim = layer.value_cache.shape
    return _CLayer(
        *(packed.address for packed in (layer.qkv, layer.o, layer.gate_up, layer.down)),
        layer.input_norm.data_ptr(), layer.post_norm.data_ptr(),
        None if layer.q_norm is None else layer.q_norm.data_ptr(),
        None if layer.k_norm is None else layer.k_norm.data_ptr(), layer.key_cache.data_ptr(),
        layer.value_cache.data_ptr(), layer.num_heads, num_kv_heads, dim, block_size,
        layer.sliding_window or 0, layer.eps, layer.scale,
    )  # fmt: skip


def forward_reference(
    layers: list[Layer], hidden: torch.Tensor, step: Step, ranks: Ranks | None = None
) -> torch.Tensor:
    """What the last block adds to `hidden`, in calls of the single operations, each of which finds its own
    implementation; of all tokens."""

    def over_ranks(place: Place, product: Product, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        if ranks is None:
            return product(x, packed)
        part = ranks.part(place, x.shape[0], packed.out_features, packed.out_dtype)
        return ranks.summed(place, product(x, packed, part))

    delta, residual = hidden, None
    for layer in layers:
        _, num_kv_heads, _, dim = layer.value_cache.shape
        normed, residual = rms_norm(delta, layer.input_norm, layer.eps, residual), hidden
        qkv = linear(normed, layer.qkv).unflatten(1, (-1, dim))
        q, k, v = qkv.split([layer.num_heads, num_kv_heads, num_kv_heads], dim=1)
        if layer.q_norm is not None:
            head_rms_norm(q, layer.q_norm, layer.eps, out=q)
        if layer.k_norm is not None:
            head_rms_norm(k, layer.k_norm, layer.eps, out=k)
        caches = (layer.key_cache, layer.value_cache)
        rope_and_cache(q, k, v, step.cos_sin, step.positions, *caches, step.slot_mapping)
        rows = (step.block_tables, step.query_start, step.seq_lens)
        attended = paged_attention(
            q, *caches, *rows, layer.scale, sliding_window=layer.sliding_window,
            table_rows=step.table_rows, tiles=step.tiles, new_keys=k, new_values=v,
        )  # fmt: skip
        projected = over_ranks(Place.ATTENDED, linear, attended.flatten(1), layer.o)
        normed = rms_norm(projected, layer.post_norm, layer.eps, hidden)
        delta = over_ranks(Place.FED, silu_and_mul_linear, linear(normed, layer.gate_up), layer.down)
    return delta
