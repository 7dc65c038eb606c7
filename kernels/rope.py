"""Rotary position embedding of new tokens, written into the paged cache in the same pass (Su et al. 2021)."""

import torch

from kernels.attention import check_caches, key_words
from kernels.checks import require
from kernels.cpu.functions import function, i32, i64, ptr

_c_rope_and_cache = function("pagoda_rope_and_cache", *[ptr] * 8, *[i64] * 4, *[i32] * 5)


def rope_and_cache(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor,
    key_cache: torch.Tensor, value_cache: torch.Tensor, slot_mapping: torch.Tensor,
) -> None:  # fmt: skip
    """Rotates q in place and writes the rotated k, and v, to their slots.

    On CUDA k is rotated in place, too, for attention that reads new keys from there; elsewhere it is not.
    The rotation is transformers' for Llama: dims i and i + D / 2 are a pair. It is computed in float32 and
    rounded once. q, k and v may be views of one fused projection [T, (Hq + 2 Hk) D].

    Args:
        q: [T, Hq, D], float32 or bfloat16, heads contiguous.
        k: [T, Hk, D], the type of q, heads contiguous.
        v: [T, Hk, D], the type of q, heads contiguous.
        cos_sin: [max_len, D] float32, cosines in the first half of a row and sines in the second.
        positions: [T] int32, each below max_len (not checked here).
        key_cache: see `kernels.attention.cache_shape`.
        value_cache: see `kernels.attention.cache_shape`.
        slot_mapping: [T] int64: block id * block size + offset; -1 writes nothing.

    Raises:
        ValueError: a shape, type or stride is wrong; the message names the argument.
    """
    tokens, num_heads, dim = q.shape
    num_kv_heads, block_size = check_caches(key_cache, value_cache, q.dtype, dim)
    require("q", q, q.dtype, q.shape, (dim, 1))
    require("k", k, q.dtype, (tokens, num_kv_heads, dim), (dim, 1))
    require("v", v, q.dtype, (tokens, num_kv_heads, dim), (dim, 1))
    require("cos_sin", cos_sin, torch.float32, (*cos_sin.shape[:1], dim))
    require("positions", positions, torch.int32, (tokens,))
    require("slot_mapping", slot_mapping, torch.int64, (tokens,))
    if q.is_cpu and (c := _c_rope_and_cache()) is not None:
        c(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), cos_sin.data_ptr(), positions.data_ptr(),
            slot_mapping.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), q.stride(0), k.stride(0),
            v.stride(0), tokens, num_heads, num_kv_heads, block_size, dim, q.dtype is torch.bfloat16,
        )  # fmt: skip
        return
    if q.is_cuda:
        from kernels.cuda import rope

        rope.rope_and_cache(q, k, v, cos_sin, positions, key_cache, value_cache, slot_mapping)
        return
    rope_and_cache_reference(q, k, v, cos_sin, positions, key_cache, value_cache, slot_mapping)


def rope_and_cache_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor,
    key_cache: torch.Tensor, value_cache: torch.Tensor, slot_mapping: torch.Tensor,
) -> None:  # fmt: skip
    """`rope_and_cache` in plain torch, on any device."""
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    q.copy_(rotate(q))
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    block_size = value_cache.shape[2]
    block, offset = slots // block_size, slots % block_size
    key_cache[block, :, :, offset] = key_words(rotate(k)[written], key_cache.shape[-1])
    value_cache[block, :, offset] = v[written]
