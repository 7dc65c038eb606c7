"""`kernels.rope` on CUDA: one launch for queries, keys and values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.cuda.device import launch

# Heads that one program turns.
HEADS = 8


@triton.jit
def _cells(slot, head, dim, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr):
    """Where a token's heads begin in the key cache and in the value cache."""
    row = (slot // BLOCK_SIZE * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
    return row[:, None] * DIM + dim[None, :]


@triton.jit
def _rotate(x, inside, cos, sin, HALF: tl.constexpr):
    """Rotates in place; the two halves of the result."""
    a = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
    one = (a * cos - b * sin).to(x.dtype.element_ty)
    two = (b * cos + a * sin).to(x.dtype.element_ty)
    tl.store(x, one, mask=inside)
    tl.store(x + HALF, two, mask=inside)
    return one, two


@triton.jit
def rope_and_cache_kernel(
    q, k, v, cos_sin, positions, slots, key_cache, value_cache, stride_q, stride_k, stride_v,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (t, i) has some query heads of token t, or some of its key heads and the values beside them."""
    DIM: tl.constexpr = 2 * HALF
    QUERY_PROGRAMS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, BLOCK)
    angle = cos_sin + tl.load(positions + token).to(tl.int64) * DIM + dim
    cos = tl.load(angle, mask=dim < HALF, other=1.0)[None, :]
    sin = tl.load(angle + HALF, mask=dim < HALF, other=0.0)[None, :]
    if part < QUERY_PROGRAMS:
        head = part * HEADS + tl.arange(0, HEADS)
        inside = (head < NUM_HEADS)[:, None] & (dim < HALF)[None, :]
        _rotate(q + token * stride_q + head[:, None] * DIM + dim[None, :], inside, cos, sin, HALF)
    else:
        head = (part - QUERY_PROGRAMS) * HEADS + tl.arange(0, HEADS)
        inside = (head < KV_HEADS)[:, None] & (dim < HALF)[None, :]
        place = head[:, None] * DIM + dim[None, :]
        one, two = _rotate(k + token * stride_k + place, inside, cos, sin, HALF)
        slot = tl.load(slots + token)
        inside &= slot >= 0
        cell = _cells(slot, head, dim, KV_HEADS, BLOCK_SIZE, DIM)
        tl.store(key_cache + cell, one, mask=inside)
        tl.store(key_cache + cell + HALF, two, mask=inside)
        values = v + token * stride_v + place
        tl.store(value_cache + cell, tl.load(values, mask=inside), mask=inside)
        tl.store(value_cache + cell + HALF, tl.load(values + HALF, mask=inside), mask=inside)


def rope_and_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See `kernels.rope.rope_and_cache`; arguments are checked there. k is rotated in place, too."""
    tokens, num_heads, dim = q.shape
    _, num_kv_heads, block_size, _ = value_cache.shape
    grid = (tokens, triton.cdiv(num_heads, HEADS) + triton.cdiv(num_kv_heads, HEADS))
    launch(
        rope_and_cache_kernel, grid, q, k, v, cos_sin, positions, slot_mapping, key_cache, value_cache,
        q.stride(0), k.stride(0), v.stride(0),
        NUM_HEADS=num_heads, KV_HEADS=num_kv_heads, HALF=dim // 2, BLOCK_SIZE=block_size,
        BLOCK=triton.next_power_of_2(dim // 2), HEADS=HEADS, num_warps=2,
    )  # fmt: skip
