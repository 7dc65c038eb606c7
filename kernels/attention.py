"""Causal attention over the paged cache (Kwon et al. 2023), for decodes and prompt chunks in one call."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.checks import FLOATS, output, require
from kernels.cpu.functions import f32, function, i32, i64, ptr

# Queries in one tile of `Tiles`.
QUERY_TILE = 128

_c_paged_attention = function("pagoda_paged_attention", *[ptr] * 7, *[i64] * 3, *[i32] * 7, f32)


@dataclass(frozen=True, eq=False)
class Tiles:
    """How a batch of prompt chunks is cut for the GPU: `make_tiles` on the device. Decodes are in no tile.

    An entry (row, first) stands for the QUERY_TILE queries of the row's chunk from `first` on; -1 pads.

    Attributes:
        paged: [N, 2] int32, of rows whose chunk begins behind tokens already in the cache.
        fresh: [M, 2] int32, of rows whose chunk begins at position 0, which read no cache.
        has_decodes: whether a row may have exactly one query.
    """

    paged: torch.Tensor
    fresh: torch.Tensor
    has_decodes: bool = True


def make_tiles(
    chunk_lengths: Sequence[int] | np.ndarray,
    starts: Sequence[int] | np.ndarray,
    num_paged: int | None = None,
    num_fresh: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`Tiles.paged` and `Tiles.fresh` of a batch, each [tiles, 2] int32 on the host, most work first.

    Args:
        chunk_lengths: [B] queries of each row; rows of none or one get no tile.
        starts: [B] position of each row's first query.
        num_paged: pads `paged` to so many tiles. As many as there are when None.
        num_fresh: the same for `fresh`.

    Raises:
        ValueError: there are more tiles than num_paged or num_fresh.
    """
    lengths, starts = np.asarray(chunk_lengths, np.int32), np.asarray(starts, np.int32)
    counts = np.where(lengths > 1, -(-lengths // QUERY_TILE), 0)
    rows = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
    first = (np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)) * QUERY_TILE
    # Programs start in order: the causal tiles with the most keys first leave the shortest tail.
    order = np.argsort(-(starts[rows] + np.minimum(first + QUERY_TILE, lengths[rows])), kind="stable")
    tiles = np.stack((rows, first), axis=1).astype(np.int32)[order]
    is_fresh = starts[tiles[:, 0]] == 0
    return _padded(tiles[~is_fresh], num_paged, "num_paged"), _padded(tiles[is_fresh], num_fresh, "num_fresh")


def _padded(tiles: np.ndarray, count: int | None, name: str) -> np.ndarray:
    if count is None:
        return tiles
    if len(tiles) > count:
        raise ValueError(f"{name} must be at least {len(tiles)}, not {count}")
    return np.concatenate((tiles, np.full((count - len(tiles), 2), -1, np.int32)))


def cache_shape(
    num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype,
    device_type: str = "cpu",
) -> tuple[tuple[int, ...], tuple[int, ...]]:  # fmt: skip
    """Shapes of one layer's key cache and value cache, both contiguous and of type `dtype`.

    Keys are [blocks, kv heads, D / pack, block size, pack]; values are [blocks, kv heads, block size, D]. On
    the CPU pack is 2 for bfloat16 and 1 for float32, so that one vector load brings the same dims of many
    tokens. On "cuda" it is D: a head's keys of a block are one tile like its values.
    Both begin with the block, so a block is copied or swapped as so many bytes.

    Raises:
        ValueError: the type is neither, or head_dim is odd.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype}")
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, not {head_dim}")
    pack = head_dim if device_type == "cuda" else 4 // dtype.itemsize
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
    blocks, num_kv_heads, block_size, _ = value_cache.shape
    require("value_cache", value_cache, dtype, (blocks, num_kv_heads, block_size, head_dim))
    pack = head_dim if key_cache.shape[-1] == head_dim else 4 // dtype.itemsize
    require("key_cache", key_cache, dtype, (blocks, num_kv_heads, head_dim // pack, block_size, pack))
    if key_cache.is_cuda and pack != head_dim:
        raise ValueError("key_cache must have the layout of cache_shape(..., device_type='cuda')")
    return num_kv_heads, block_size


def check_rows(
    block_tables: torch.Tensor, query_start: torch.Tensor, seq_lens: torch.Tensor,
    table_rows: torch.Tensor | None,
) -> None:  # fmt: skip
    """Checks what says which tokens belong to which row, against each other.

    Raises:
        ValueError: a shape, type or stride is wrong; the message names the argument.
    """
    rows = seq_lens.shape[0]
    tables = rows if table_rows is None else block_tables.shape[0]
    require("block_tables", block_tables, torch.int32, (tables, block_tables.shape[-1]), (1,))
    require("query_start", query_start, torch.int32, (rows + 1,))
    require("seq_lens", seq_lens, torch.int32, (rows,))
    if table_rows is not None:
        require("table_rows", table_rows, torch.int64, (rows,))


def paged_attention(
    q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, block_tables: torch.Tensor,
    query_start: torch.Tensor, seq_lens: torch.Tensor, scale: float, out: torch.Tensor | None = None,
    sliding_window: int | None = None, *, table_rows: torch.Tensor | None = None, tiles: Tiles | None = None,
    new_keys: torch.Tensor | None = None, new_values: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """softmax(scale q k^T) v of each new token over its sequence's tokens up to itself.

    The last query of row b is its token seq_lens[b] - 1, whose key is in the cache already. Sums are float32.
    On the CPU a row's result depends neither on the other rows nor on the number of threads. On the GPU
    nothing waits for the host and the launches depend on shapes alone, so a captured graph serves every
    batch of its shapes; rows without queries, and queries behind the last row's, get no result.

    Args:
        q: [T, Hq, D], float32 or bfloat16, heads contiguous; D even.
        key_cache: see `cache_shape`.
        value_cache: see `cache_shape`; Hq is a multiple of its kv heads.
        block_tables: [S, MB] int32, unit stride in the last dim; entries past a row's tokens are not read.
        query_start: [B + 1] int32: row b has queries query_start[b] to query_start[b + 1].
        seq_lens: [B] int32: tokens of row b, this iteration's included.
        scale: multiplies the scores, as 1 / sqrt(D).
        out: [T, Hq, D], written and returned. A new tensor when None.
        sliding_window: how many tokens a query sees, itself included; None for all.
        table_rows: [B] int64: the row of block_tables that is row b's; row b itself (and S = B) when None.
        tiles: how prompt chunks are cut for the GPU; None for decodes, one query a row. Unused on the CPU.
        new_keys: [T, Hk, D] rotated keys of this iteration's tokens, heads contiguous; `tiles.fresh` read it.
        new_values: [T, Hk, D], likewise.

    Raises:
        ValueError: a shape, type or stride is wrong; the message names the argument.
    """
    dim = q.shape[2]
    num_kv_heads, block_size = check_caches(key_cache, value_cache, q.dtype, dim)
    if q.shape[1] % num_kv_heads or q.stride()[1:] != (dim, 1):
        raise ValueError(f"q must have contiguous heads, a multiple of {num_kv_heads}, not {tuple(q.shape)}")
    check_rows(block_tables, query_start, seq_lens, table_rows)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, not {sliding_window}")
    out = output(out, q.dtype, q.shape, (dim, 1), q.device)
    if q.is_cuda:
        _check_tiles(q, num_kv_heads, seq_lens, tiles, new_keys, new_values)
        from kernels.cuda import attention

        return attention.paged_attention(
            q, key_cache, value_cache, block_tables, query_start, seq_lens, scale, out, sliding_window,
            table_rows, tiles, new_keys, new_values,
        )  # fmt: skip
    if table_rows is not None:
        block_tables = block_tables[table_rows]
    in_c_layout = key_cache.shape[-1] == 4 // q.dtype.itemsize
    if q.is_cpu and in_c_layout and (c := _c_paged_attention()) is not None:
        c(
            key_cache.data_ptr(), value_cache.data_ptr(), q.data_ptr(), out.data_ptr(),
            block_tables.data_ptr(), query_start.data_ptr(), seq_lens.data_ptr(), q.stride(0), out.stride(0),
            block_tables.stride(0), seq_lens.shape[0], q.shape[1], num_kv_heads, block_size, dim,
            q.dtype is torch.bfloat16, sliding_window or 0, scale,
        )  # fmt: skip
        return out
    return paged_attention_reference(
        q, key_cache, value_cache, block_tables, query_start, seq_lens, scale, out, sliding_window
    )


def _check_tiles(
    q: torch.Tensor, num_kv_heads: int, seq_lens: torch.Tensor, tiles: Tiles | None,
    new_keys: torch.Tensor | None, new_values: torch.Tensor | None,
) -> None:  # fmt: skip
    """Checks what only the GPU needs."""
    tokens, _, dim = q.shape
    if tiles is None:
        if tokens != seq_lens.shape[0]:
            raise ValueError(f"tiles must be given for {tokens} queries of {seq_lens.shape[0]} rows")
        return
    require("tiles.paged", tiles.paged, torch.int32, (*tiles.paged.shape[:1], 2))
    require("tiles.fresh", tiles.fresh, torch.int32, (*tiles.fresh.shape[:1], 2))
    if len(tiles.fresh):
        require("new_keys", new_keys, q.dtype, (tokens, num_kv_heads, dim), (dim, 1))
        require("new_values", new_values, q.dtype, (tokens, num_kv_heads, dim), (dim, 1))


def paged_attention_reference(
    q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, block_tables: torch.Tensor,
    query_start: torch.Tensor, seq_lens: torch.Tensor, scale: float, out: torch.Tensor | None = None,
    sliding_window: int | None = None, *, table_rows: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`paged_attention` in plain torch, row after row, on any device."""
    if table_rows is not None:
        block_tables = block_tables[table_rows]
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
