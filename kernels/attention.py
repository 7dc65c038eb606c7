"""Causal attention over the paged cache (Kwon et al. 2023), for decodes and prompt chunks in one call."""

import functools

import torch

from kernels.cpu.functions import f32, function, i32, i64, ptr


@functools.cache
def _c_paged_attention():
    return function("pagoda_paged_attention", *[ptr] * 7, *[i64] * 3, *[i32] * 7, f32)


def cache_shape(
    num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one layer's key cache and value cache, both contiguous and of type `dtype`.

    Keys are [blocks, kv heads, D / pack, block size, pack] with pack = 2 for bfloat16 and 1 for float32, so
    that one vector load brings the same dims of many tokens; values are [blocks, kv heads, block size, D].
    Both begin with the block, so a block is copied or swapped as so many bytes.

    Raises:
        ValueError: the type is neither, or head_dim is odd.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype}")
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, not {head_dim}")
    pack = 4 // dtype.itemsize
    return (
        (num_blocks, num_kv_heads, head_dim // pack, block_size, pack),
        (num_blocks, num_kv_heads, block_size, head_dim),
    )


def key_words(keys: torch.Tensor, pack: int) -> torch.Tensor:
    """Keys [tokens, kv heads, D] as the key cache holds them: [tokens, kv heads, D / pack, pack]."""
    return keys.unflatten(-1, (-1, pack))


def check_caches(
    key_cache: torch.Tensor, value_cache: torch.Tensor, dtype: torch.dtype, head_dim: int
) -> tuple[int, int]:
    """The kv heads and the block size of two caches, checked against each other and the queries.

    Raises:
        ValueError: a shape, type or stride is wrong; the message names the argument.
    """
    blocks, num_kv_heads, block_size, dim = value_cache.shape
    if value_cache.dtype != dtype or dim != head_dim or not value_cache.is_contiguous():
        raise ValueError(
            f"value_cache must be {dtype} with head_dim {head_dim}, contiguous, "
            f"not {value_cache.dtype} {tuple(value_cache.shape)}"
        )
    pack = 4 // dtype.itemsize
    if (
        key_cache.shape != (blocks, num_kv_heads, dim // pack, block_size, pack)
        or key_cache.dtype != dtype
        or not key_cache.is_contiguous()
    ):
        raise ValueError(
            f"key_cache must be {dtype} {(blocks, num_kv_heads, dim // pack, block_size, pack)}, contiguous, "
            f"not {key_cache.dtype} {tuple(key_cache.shape)}"
        )
    return num_kv_heads, block_size


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T) v of each new token over its sequence's tokens up to itself.

    The last query of row b is its token seq_lens[b] - 1, whose key is in the cache already. A row's result
    depends neither on the other rows nor on the number of threads. Sums are float32.

    Args:
        q: [T, Hq, D], float32 or bfloat16, heads contiguous; D even.
        key_cache: see `cache_shape`.
        value_cache: see `cache_shape`; Hq is a multiple of its kv heads.
        block_tables: [B, MB] int32, unit stride in the last dim; entries past a row's tokens are not read.
        query_start: [B + 1] int32: row b has queries query_start[b] to query_start[b + 1].
        seq_lens: [B] int32: tokens of row b, this iteration's included.
        scale: multiplies the scores, as 1 / sqrt(D).
        out: [T, Hq, D], written and returned. A new tensor when None.
        sliding_window: how many tokens a query sees, itself included; None for all.

    Raises:
        ValueError: a shape, type or stride is wrong; the message names the argument.
    """
    _, num_heads, dim = q.shape
    num_kv_heads, block_size = check_caches(key_cache, value_cache, q.dtype, dim)
    rows = seq_lens.shape[0]
    if num_heads % num_kv_heads or q.stride()[1:] != (dim, 1):
        raise ValueError(f"q must have contiguous heads, a multiple of {num_kv_heads}, not {tuple(q.shape)}")
    for name, x, shape in (("query_start", query_start, (rows + 1,)), ("seq_lens", seq_lens, (rows,))):
        if x.dtype != torch.int32 or x.shape != shape:
            raise ValueError(f"{name} must be int32 {list(shape)}, not {x.dtype} {tuple(x.shape)}")
    if block_tables.dtype != torch.int32 or block_tables.shape[0] != rows or block_tables.stride(1) != 1:
        raise ValueError(f"block_tables must be int32 [{rows}, blocks], not {tuple(block_tables.shape)}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, not {sliding_window}")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    elif out.shape != q.shape or out.dtype != q.dtype or out.stride()[1:] != (dim, 1):
        raise ValueError(f"out must be {q.dtype} {tuple(q.shape)} with contiguous heads, not {out.dtype}")
    if q.is_cpu and (c := _c_paged_attention()) is not None:
        c(
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            q.data_ptr(),
            out.data_ptr(),
            block_tables.data_ptr(),
            query_start.data_ptr(),
            seq_lens.data_ptr(),
            q.stride(0),
            out.stride(0),
            block_tables.stride(0),
            rows,
            num_heads,
            num_kv_heads,
            block_size,
            dim,
            q.dtype is torch.bfloat16,
            sliding_window or 0,
            scale,
        )
        return out
    return paged_attention_reference(
        q, key_cache, value_cache, block_tables, query_start, seq_lens, scale, out, sliding_window
    )


def paged_attention_reference(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """`paged_attention` in plain torch, row after row, on any device."""
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block_size, starts = value_cache.shape[2], query_start.tolist()
    group = q.shape[1] // value_cache.shape[1]
    for row, length in enumerate(seq_lens.tolist()):
        queries = q[starts[row] : starts[row + 1]].transpose(0, 1).float()
        # Blocks that left every query's window may hold anything by now.
        unseen = max(0, length - queries.shape[1] + 1 - (sliding_window or length))
        first = unseen // block_size * block_size
        blocks = block_tables[row, first // block_size : -(-length // block_size)].long()
        seen = slice(unseen - first, length - first)
        keys = key_cache[blocks].permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)[:, seen]
        values = value_cache[blocks].transpose(0, 1).flatten(1, 2)[:, seen]
        keys = keys.float().repeat_interleave(group, dim=0)
        values = values.float().repeat_interleave(group, dim=0)
        position = torch.arange(length - queries.shape[1], length, device=q.device).unsqueeze(1)
        token = torch.arange(unseen, length, device=q.device)
        hidden = token > position
        if sliding_window is not None:
            hidden |= token <= position - sliding_window
        scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
        out[starts[row] : starts[row + 1]] = (scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype)
    return out
