"""Rotary position embedding of new tokens, written into the paged cache in the same pass (Su et al. 2021)."""

import functools

import torch

from kernels.attention import check_caches, key_words
from kernels.cpu.functions import function, i32, i64, ptr


@functools.cache
def _c_rope_and_cache():
    return function("pagoda_rope_and_cache", *[ptr] * 8, *[i64] * 4, *[i32] * 5)


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
    for name, x in (("q", q), ("k", k), ("v", v)):
        heads = num_heads if x is q else num_kv_heads
        if x.shape != (tokens, heads, dim) or x.dtype != q.dtype or x.stride()[1:] != (dim, 1):
            raise ValueError(f"{name} must be {q.dtype} [{tokens}, {heads}, {dim}] with contiguous heads")
    if cos_sin.dtype != torch.float32 or cos_sin.shape[1:] != (dim,) or not cos_sin.is_contiguous():
        raise ValueError(f"cos_sin must be float32 [max_len, {dim}], not {cos_sin.dtype}, {cos_sin.shape}")
    if positions.dtype != torch.int32 or positions.shape != (tokens,):
        raise ValueError(f"positions must be int32 [{tokens}], not {positions.dtype}, {positions.shape}")
    if slot_mapping.dtype != torch.int64 or slot_mapping.shape != (tokens,):
        raise ValueError(f"slot_mapping must be int64 [{tokens}], not {slot_mapping.dtype}")
    if q.is_cpu and (c := _c_rope_and_cache()) is not None:
        c(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), cos_sin.data_ptr(), positions.data_ptr(),
            slot_mapping.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), q.stride(0), k.stride(0),
            v.stride(0), tokens, num_heads, num_kv_heads, block_size, dim, q.dtype is torch.bfloat16,
        )  # fmt: skip
        return
    if q.is_cuda:
        if key_cache.shape[-1] != dim:
            raise ValueError("key_cache must have the layout of cache_shape(..., device_type='cuda')")
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
