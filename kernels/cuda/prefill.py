"""Causal attention of prompt chunks on CUDA: a tile of queries of one head at a time (flash attention).

A chunk at the start of its sequence reads keys and values as the projection left them; another reads pages.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attention import QUERY_TILE
from kernels.cuda.device import traits

LOG2_E = math.log2(math.e)


class PrefillConfig(NamedTuple):
    """How the kernel cuts its work.

    Attributes:
        block_m: queries in a tile, a divisor of QUERY_TILE.
        block_n: keys in a tile.
        num_warps: of a program.
        num_stages: depth of the pipeline of loads.
        descriptors: whether contiguous keys and values come by the copy engine of sm_90.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


# Up to so many tokens, small tiles fill the multiprocessors better.
SHORT = 2048


def prefill_config(
    is_paged: bool, dtype: torch.dtype, dim: int, capability: int, is_short: bool = False
) -> PrefillConfig:
    """The fastest measured for a type, a head size, a device, and batches of few tokens."""
    if dtype is torch.float32:
        # Without tensor cores everything is unrolled: small tiles compile in seconds and do not spill.
        return PrefillConfig(32, 32, 4, 2) if dim <= 64 else PrefillConfig(16, 32, 8, 2)
    if dim > 128:
        return PrefillConfig(64, 32, 4, 2)
    if capability == 90:
        if is_paged:
            return PrefillConfig(128, 128, 8, 3)
        if is_short:
            return PrefillConfig(64, 64, 4, 2, descriptors=True)
        return PrefillConfig(128, 128, 8, 3, descriptors=True)
    return PrefillConfig(128, 64 if dim <= 64 else 32, 4 if dim <= 64 else 8, 2)


def fresh(
    q: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    query_start: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    sliding_window: int | None = None,
    config: PrefillConfig | None = None,
) -> None:
    """Attention of chunks that begin their sequences; arguments as `kernels.attention.paged_attention`'s.

    Args:
        tiles: [M, 2] int32, `Tiles.fresh`.
    """
    dim = q.shape[2]
    config = config or prefill_config(False, q.dtype, dim, traits(q.device).capability, len(q) <= SHORT)
    keys, values = new_keys, new_values
    # The copy engine wants 16 byte steps, and its tile is a power of two of whole heads.
    aligned = all((x.stride(0) * x.itemsize | x.data_ptr()) % 16 == 0 for x in (keys, values))
    descriptors = config.descriptors and aligned and dim == triton.next_power_of_2(dim)
    if descriptors:
        keys, values = (_descriptor(x, config.block_n) for x in (keys, values))
    _launch(
        q, keys, values, new_keys.stride(0), new_values.stride(0), query_start, query_start, query_start,
        query_start, 0, tiles, scale, out, sliding_window, config,
        {"HK": new_keys.shape[1], "BLOCK_SIZE": 1, "PAGED": False, "DESCRIPTORS": descriptors},
    )  # fmt: skip


def paged(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    table_rows: torch.Tensor | None,
    tiles: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    sliding_window: int | None = None,
    config: PrefillConfig | None = None,
) -> None:
    """Attention of chunks behind cached tokens; arguments as `kernels.attention.paged_attention`'s.

    Args:
        tiles: [N, 2] int32, `Tiles.paged`.
    """
    config = config or prefill_config(True, q.dtype, q.shape[2], traits(q.device).capability)
    _launch(
        q, key_cache, value_cache, 0, 0, query_start, seq_lens, block_tables,
        query_start if table_rows is None else table_rows, block_tables.stride(0), tiles, scale, out,
        sliding_window, config,
        {"HK": value_cache.shape[1], "BLOCK_SIZE": value_cache.shape[2], "PAGED": True,
         "HAS_TABLE_ROWS": table_rows is not None},
    )  # fmt: skip


def _descriptor(x: torch.Tensor, block_n: int) -> TensorDescriptor:
    """Of [T, Hk, D] with contiguous heads: tiles of `block_n` tokens of one head."""
    tokens, heads, dim = x.shape
    return TensorDescriptor(x, [tokens, heads * dim], [x.stride(0), 1], [block_n, dim])


def _launch(q, keys, values, key_stride, value_stride, query_start, seq_lens, tables, table_rows,
            table_stride, tiles, scale, out, window, config: PrefillConfig,
            constants: dict[str, Any]) -> None:  # fmt: skip
    _, num_heads, dim = q.shape
    grid = (num_heads, tiles.shape[0] * (QUERY_TILE // config.block_m))
    _prefill[grid](
        q, keys, values, out, tiles, query_start, seq_lens, tables, table_rows, q.stride(0), key_stride,
        value_stride, out.stride(0), table_stride, window or 0, scale * LOG2_E,
        GROUP=num_heads // constants["HK"], D=dim, BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, PER_TILE=QUERY_TILE // config.block_m,
        WINDOW=window is not None,
        num_warps=config.num_warps, num_stages=config.num_stages, **constants,
    )  # fmt: skip


@triton.jit
def _prefill(q, keys, values, out, tiles, query_start, seq_lens, tables, table_rows,
             q_stride, key_stride, value_stride, out_stride, table_stride, window, scale,
             HK: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
             PER_TILE: tl.constexpr, PAGED: tl.constexpr, WINDOW: tl.constexpr,
             DESCRIPTORS: tl.constexpr = False, HAS_TABLE_ROWS: tl.constexpr = False):  # fmt: skip
    """One program: BLOCK_M queries of one head."""
    query_head, tile = tl.program_id(0), tl.program_id(1) // PER_TILE
    head = query_head // GROUP
    row = tl.load(tiles + 2 * tile)
    if row < 0:
        return
    first = tl.load(tiles + 2 * tile + 1) + (tl.program_id(1) % PER_TILE) * BLOCK_M
    chunk = tl.load(query_start + row)
    num_queries = tl.load(query_start + row + 1) - chunk
    if first >= num_queries:
        return
    if PAGED:
        length = tl.load(seq_lens + row)
        table_row = tl.load(table_rows + row) if HAS_TABLE_ROWS else row
        tables += table_row.to(tl.int64) * table_stride
    else:
        length = num_queries
    m_range, d_range = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (first + m_range < num_queries)[:, None]
    if BLOCK_D != D:
        inside &= d_range[None, :] < D
    token = (chunk + first + m_range).to(tl.int64)[:, None]
    queries = tl.load(q + token * q_stride + query_head * D + d_range[None, :], mask=inside, other=0.0)
    start = length - num_queries + first
    # Keys that all queries of the tile see need no mask; those before and behind are hidden from some.
    lowest = tl.maximum(start + 1 - window, 0) if WINDOW else 0
    begin = lowest // BLOCK_N * BLOCK_N
    clear_end = (start + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(start + BLOCK_M, length)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    source = (keys, values, chunk, head, lowest, length, tables, key_stride, value_stride)
    state = (acc, best, norm)
    clear = begin
    if WINDOW:
        all_see = tl.cdiv(tl.maximum(start + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
        clear = tl.maximum(tl.minimum(all_see, clear_end), begin)
        state = _visit(state, queries, begin, clear, source, start, window, scale, HK, D, BLOCK_D, BLOCK_M,
                       BLOCK_N, BLOCK_SIZE, PAGED, WINDOW, DESCRIPTORS, True)  # fmt: skip
    state = _visit(state, queries, clear, clear_end, source, start, window, scale, HK, D, BLOCK_D, BLOCK_M,
                   BLOCK_N, BLOCK_SIZE, PAGED, WINDOW, DESCRIPTORS, False)  # fmt: skip
    acc, best, norm = _visit(state, queries, tl.maximum(clear_end, begin), end, source, start, window, scale,
                             HK, D, BLOCK_D, BLOCK_M, BLOCK_N, BLOCK_SIZE, PAGED, WINDOW, DESCRIPTORS,
                             True)  # fmt: skip
    at = out + token * out_stride + query_head * D + d_range[None, :]
    tl.store(at, (acc / norm[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _visit(state, queries, begin, end, source, start, window, scale, HK: tl.constexpr, D: tl.constexpr,
           BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
           PAGED: tl.constexpr, WINDOW: tl.constexpr, DESCRIPTORS: tl.constexpr,
           MASKED: tl.constexpr):  # fmt: skip
    """Adds the keys `begin` to `end` to (weighted values, largest score, sum of weights)."""
    acc, best, norm = state
    for at in tl.range(begin, end, BLOCK_N):
        k = _tile(source, at, HK, D, BLOCK_D, BLOCK_N, BLOCK_SIZE, PAGED, DESCRIPTORS, MASKED, False)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        if MASKED:
            position = start + tl.arange(0, BLOCK_M)[:, None]
            token = at + tl.arange(0, BLOCK_N)[None, :]
            seen = token <= position
            if WINDOW:
                seen &= token > position - window
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1) * scale)
        # Behind a window a query may have seen nothing yet.
        base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED and WINDOW else higher
        weights = tl.exp2(scores * scale - base[:, None])
        shrink = tl.exp2(best - base)
        norm = norm * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        best = higher
        v = _tile(source, at, HK, D, BLOCK_D, BLOCK_N, BLOCK_SIZE, PAGED, DESCRIPTORS, MASKED, True)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, best, norm


@triton.jit
def _tile(source, at, HK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr, DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
          VALUES: tl.constexpr):  # fmt: skip
    """[BLOCK_N, BLOCK_D]: one head's keys or values of the tokens from `at` on, a multiple of BLOCK_N."""
    keys, values, chunk, head, lowest, length, tables, key_stride, value_stride = source
    tensor = values if VALUES else keys
    n_range, d_range = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)[None, :]
    # Others' values and those that left the window may be NaN, which a weight of zero does not hide.
    there = (at + n_range >= lowest) & (at + n_range < length)
    if DESCRIPTORS:
        x = tensor.load([chunk + at, head * D])
        return tl.where(there[:, None], x, 0.0) if MASKED and VALUES else x
    else:
        if PAGED:
            if BLOCK_N % BLOCK_SIZE == 0:  # the offsets in the blocks are the same for every tile
                block, offset = at // BLOCK_SIZE + n_range // BLOCK_SIZE, n_range % BLOCK_SIZE
            else:
                block, offset = (at + n_range) // BLOCK_SIZE, (at + n_range) % BLOCK_SIZE
            block = _load(tables + block, there, MASKED).to(tl.int64)[:, None] * (HK * BLOCK_SIZE * D)
            rows = tensor + head * (BLOCK_SIZE * D) + block + (offset[:, None] * D + d_range)
        else:
            stride = value_stride if VALUES else key_stride
            rows = tensor + (chunk + at + n_range).to(tl.int64)[:, None] * stride + head * D + d_range
        return _load(rows, there[:, None] & (d_range < D), MASKED or BLOCK_D != D)


@triton.jit
def _load(pointers, mask, MASKED: tl.constexpr):
    return tl.load(pointers, mask=mask, other=0) if MASKED else tl.load(pointers)
