"""Paged attention on CUDA: rows of one query here; prompt chunks are `kernels.cuda.prefill`'s.

Decode attention reads every key and value once and computes little, so what counts is that all SMs read all
the time. The context of all rows and kv heads is cut into tiles, the tiles are dealt out in equal shares to a
fixed number of programs (each counts the tiles itself from the lengths on the device), and what a
program has of a head that it shares with others goes to a workspace, to be combined (flash-decoding, Dao et
al. 2023): by whichever program comes last to that head where it has few parts, which costs less than a launch
(4.2 of 14.3 us with 64 rows of a 0.5B shape); where it has many, by programs of their own, side by side. A kv
head's group of query heads is one tile of the tensor cores.

A share is counted in units of a tile's time. To begin a head costs some, too: a chain of loads that depend on
each other, with nothing on its way meanwhile. Counting only tiles, the few programs to which the short rows
fell (those that pad a batch, say) took twice as long as all others.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import Tiles
from kernels.cuda import prefill
from kernels.cuda.device import launch, traits
from kernels.cuda.prefetch import prefetch

LOG2_E = tl.constexpr(math.log2(math.e))
# Up to so many rows most programs begin one head at most.
FEW_ROWS = 4
# Of a head: so few are joined by the program that comes last to it.
FEW_PARTS = 4
MOST_PROGRAMS = 1024


class DecodeConfig(NamedTuple):
    """How the decode kernel cuts its work.

    Attributes:
        block_m: query heads in a tile, at least the group.
        block_n: tokens in a tile.
        num_warps: of a program.
        num_stages: depth of the pipeline of loads.
        per_sm: programs for each SM.
        min_tiles: fewest units of a share worth a program.
        setup: units that beginning a head counts for.
    """

    block_m: int = 16
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 5
    per_sm: int = 2
    min_tiles: int = 2
    setup: int = 2


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    sliding_window: int | None = None,
    table_rows: torch.Tensor | None = None,
    tiles: Tiles | None = None,
    new_keys: torch.Tensor | None = None,
    new_values: torch.Tensor | None = None,
) -> torch.Tensor:
    """`kernels.attention.paged_attention`, whose arguments these are, checked."""
    caches, rows = (key_cache, value_cache), (block_tables, query_start, seq_lens)
    if tiles is None or tiles.has_decodes:
        decode(q, *caches, *rows, table_rows, scale, out, sliding_window, ragged=tiles is not None)
    if tiles is not None and tiles.paged.shape[0]:
        prefill.paged(q, *caches, *rows, table_rows, tiles.paged, scale, out, sliding_window)
    if tiles is not None and tiles.fresh.shape[0]:
        assert new_keys is not None and new_values is not None
        prefill.fresh(q, new_keys, new_values, query_start, tiles.fresh, scale, out, sliding_window)
    return out


@functools.cache
def arrivals(device: torch.device) -> torch.Tensor:
    """How many parts of the head that each of `_decode`'s programs begins are there: zeros between two
    launches. Made before any graph is captured, because a graph's own memory is not zeroed."""
    return torch.zeros(MOST_PROGRAMS, dtype=torch.int32, device=device)


def decode_config(dtype: torch.dtype, dim: int, capability: int, rows: int) -> DecodeConfig:
    """The fastest measured for a type, a head size, a device and a number of rows."""
    setup = 2 if rows > FEW_ROWS else 0
    if dtype is torch.float32 or dim > 128:
        return DecodeConfig(block_n=32, num_stages=3, setup=setup)
    return DecodeConfig(num_stages=5 if capability in (80, 90) else 3, setup=setup)


def decode(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    table_rows: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
    sliding_window: int | None = None,
    ragged: bool = False,
    config: DecodeConfig | None = None,
) -> None:
    """Attention of the rows with exactly one query. `ragged`: there may be others, which are left out."""
    _, num_heads, dim = q.shape
    _, num_kv_heads, block_size, _ = value_cache.shape
    device = traits(q.device)
    rows, group = seq_lens.shape[0], num_heads // num_kv_heads
    config = config or decode_config(q.dtype, dim, device.capability, rows)
    longest = block_tables.shape[1] * block_size
    if sliding_window is not None:
        longest = min(longest, sliding_window + config.block_n)
    units = triton.cdiv(longest, config.block_n) + config.setup
    most = rows * num_kv_heads * triton.cdiv(units, config.min_tiles)
    programs = min(config.per_sm * device.multiprocessors, most)
    parts = torch.empty((2 * programs, group, dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((2 * programs, group, 2), dtype=torch.float32, device=q.device)
    joined = FEW_PARTS * rows * num_kv_heads >= programs
    begun = torch.empty((programs, 2), dtype=torch.int32, device=q.device) if not joined else None
    common = dict(
        HK=num_kv_heads, GROUP=group, D=dim, BLOCK_D=triton.next_power_of_2(dim), RAGGED=ragged,
        PDL=device.overlaps, overlaps=device.overlaps,
    )  # fmt: skip
    launch(
        _decode, (programs,), q, key_cache, value_cache, out, parts, stats, begun,
        arrivals(q.device) if joined else None, block_tables,
        seq_lens if table_rows is None else table_rows, query_start, seq_lens, rows, sliding_window or 0,
        q.stride(0), out.stride(0), block_tables.stride(0), scale,
        BLOCK_M=max(config.block_m, triton.next_power_of_2(group)), BLOCK_N=config.block_n,
        # Few sizes, since each is compiled.
        BLOCK_B=128 if rows <= 128 else max(1024, triton.next_power_of_2(rows)),
        BLOCK_SIZE=block_size, MIN_TILES=config.min_tiles, SETUP=config.setup,
        WINDOW=sliding_window is not None, HAS_TABLE_ROWS=table_rows is not None,
        num_warps=config.num_warps, num_stages=config.num_stages, **common,
    )  # fmt: skip
    if not joined:
        summed = (out, parts, stats, begun, query_start, out.stride(0))
        launch(_combine, (programs, group), *summed, BLOCK_S=16, num_warps=4, **common)


@triton.jit
def _tiles(query_start, seq_lens, num_rows, window, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
           RAGGED: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """Of each row: the number of tiles that one kv head has to visit."""
    rows = tl.arange(0, BLOCK_B)
    lengths = tl.load(seq_lens + rows, mask=rows < num_rows, other=0)
    if RAGGED:
        start = tl.load(query_start + rows, mask=rows < num_rows, other=0)
        end = tl.load(query_start + rows + 1, mask=rows < num_rows, other=0)
        lengths = tl.where(end - start == 1, lengths, 0)
    counts = tl.cdiv(lengths, BLOCK_N)
    if WINDOW:
        counts -= tl.maximum(lengths - window, 0) // BLOCK_N
    return counts


@triton.jit
def _row_tiles(row, query_start, seq_lens, window, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
               WINDOW: tl.constexpr):  # fmt: skip
    """`_tiles` of one row."""
    length = tl.load(seq_lens + row)
    if RAGGED:
        one = tl.load(query_start + row + 1) - tl.load(query_start + row) == 1
        length = tl.where(one, length, 0)
    count = tl.cdiv(length, BLOCK_N)
    if WINDOW:
        count -= tl.maximum(length - window, 0) // BLOCK_N
    return count


@triton.jit
def _find(unit, units, ends, HK: tl.constexpr, BLOCK_B: tl.constexpr):
    """The row and the kv head that a unit belongs to, the first unit of that head, and how many it has."""
    rows = tl.arange(0, BLOCK_B)
    row = tl.sum((ends <= unit).to(tl.int32))
    count = tl.sum(tl.where(rows == row, units, 0))
    begin = tl.sum(tl.where(rows == row, ends, 0)) - count * HK
    head = (unit - begin) // tl.maximum(count, 1)  # of a unit behind the last, nothing
    return row, head, begin + head * count, count


@triton.jit
def _table(row, tables, table_rows, table_stride, HAS_TABLE_ROWS: tl.constexpr):
    """Where a row's block table begins."""
    return tables + (tl.load(table_rows + row) if HAS_TABLE_ROWS else row).to(tl.int64) * table_stride


@triton.jit
def _bring(low, row, head, key_cache, value_cache, tables, table_rows, seq_lens, window, table_stride,
           HK: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
           WINDOW: tl.constexpr, HAS_TABLE_ROWS: tl.constexpr):  # fmt: skip
    """Has the keys and values of tile `low` of a head brought to L2."""
    length = tl.load(seq_lens + row)
    first = tl.maximum(length - window, 0) // BLOCK_N if WINDOW else 0
    token = tl.minimum((first + low) * BLOCK_N + tl.arange(0, BLOCK_N), length - 1)
    table = _table(row, tables, table_rows, table_stride, HAS_TABLE_ROWS)
    block = tl.load(table + token // BLOCK_SIZE).to(tl.int64)
    at = ((block * HK + head) * BLOCK_SIZE + token % BLOCK_SIZE) * D
    SIZE: tl.constexpr = D * (key_cache.dtype.element_ty.primitive_bitwidth // 8)
    if SIZE % 16 == 0:
        prefetch(key_cache + at, SIZE)
        prefetch(value_cache + at, SIZE)


@triton.jit(do_not_specialize=["num_rows"])
def _decode(q, key_cache, value_cache, out, parts, stats, begun, arrivals, tables, table_rows, query_start,
            seq_lens, num_rows, window, q_stride, out_stride, table_stride, scale,
            HK: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_SIZE: tl.constexpr,
            MIN_TILES: tl.constexpr, SETUP: tl.constexpr, RAGGED: tl.constexpr, WINDOW: tl.constexpr,
            HAS_TABLE_ROWS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program's share of all units; their order is row, kv head, and then SETUP and the head's tiles.

    Shares are found while the kernel in front, which makes a token's query, key and value, still ends, and
    the first tile of each is brought to L2: lengths, tables and all other tokens are older than that."""
    pid = tl.program_id(0)
    counts = _tiles(query_start, seq_lens, num_rows, window, BLOCK_B, BLOCK_N, RAGGED, WINDOW)
    units = tl.where(counts > 0, counts + SETUP, 0)
    ends = tl.cumsum(units) * HK
    total = tl.sum(units) * HK
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0)), MIN_TILES)
    unit = pid * share
    stop = tl.minimum(unit + share, total)
    m_range, d_range = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    in_q = (m_range[:, None] < GROUP) & (d_range[None, :] < D)
    unfinished = -1  # the head that this program begins and others finish
    row, head, begin, count = _find(unit, units, ends, HK, BLOCK_B)
    if PDL:
        if unit < stop:
            low = tl.maximum(unit - begin - SETUP, 0)
            _bring(low, row, head, key_cache, value_cache, tables, table_rows, seq_lens, window, table_stride,
                   HK, D, BLOCK_N, BLOCK_SIZE, WINDOW, HAS_TABLE_ROWS)  # fmt: skip
        gdc_wait()
        gdc_launch_dependents()
    while unit < stop:
        end = tl.minimum(begin + count, stop)
        low, high = tl.maximum(unit - begin - SETUP, 0), tl.maximum(end - begin - SETUP, 0)  # of its tiles
        length = tl.load(seq_lens + row)
        first = tl.maximum(length - window, 0) // BLOCK_N if WINDOW else 0
        query = tl.load(query_start + row) if RAGGED else row
        table = _table(row, tables, table_rows, table_stride, HAS_TABLE_ROWS)
        heads = (head * GROUP + m_range)[:, None] * D + d_range[None, :]
        queries = tl.load(q + query.to(tl.int64) * q_stride + heads, mask=in_q, other=0.0)
        acc, best, norm = _attend(
            queries, key_cache, value_cache, table, head, first + low, first + high, length, window,
            scale * LOG2_E, HK, D, BLOCK_D, BLOCK_M, BLOCK_N, BLOCK_SIZE, WINDOW)  # fmt: skip
        if (low == 0) & (end == begin + count):
            result = (acc / norm[:, None]).to(out.dtype.element_ty)
            tl.store(out + query.to(tl.int64) * out_stride + heads, result, mask=in_q)
        elif low < high:  # else the share ends before the first tile, and others do all
            # A program's last head, if others go on with it, has the odd slot; its first has the even one.
            slot = 2 * pid + (low == 0).to(tl.int32)
            first, last = (begin + SETUP) // share, (begin + count - 1) // share  # who have tiles of it
            part = (slot * GROUP + m_range)[:, None] * D + d_range[None, :]
            tl.store(parts + part, acc, mask=in_q)
            stat = stats + (slot * GROUP + m_range) * 2
            tl.store(stat, best, mask=m_range < GROUP)
            tl.store(stat + 1, norm, mask=m_range < GROUP)
            if arrivals is not None:
                tl.debug_barrier()  # all of this program's part is stored before its arrival is
                if tl.atomic_add(arrivals + first, 1, sem="acq_rel") == last - first:
                    result = _join(parts, stats, first, last, GROUP, D, BLOCK_D, BLOCK_M)
                    at = out + query.to(tl.int64) * out_stride + heads
                    tl.store(at, result.to(out.dtype.element_ty), mask=in_q)
                    tl.store(arrivals + first, 0)
            elif low == 0:
                unfinished = row * HK + head
                tl.store(begun + 2 * pid + 1, last)
        unit = end
        begin = end
        head += 1
        # Looked up one by one from here on: finding them anew takes three sums over all rows.
        if (head == HK) & (unit < stop):
            head = 0
            tiles = 0
            while tiles == 0:
                row += 1
                tiles = _row_tiles(row, query_start, seq_lens, window, BLOCK_N, RAGGED, WINDOW)
            count = tiles + SETUP
    if begun is not None:
        tl.store(begun + 2 * pid, unfinished)


@triton.jit
def _join(parts, stats, first, last, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
          BLOCK_M: tl.constexpr):  # fmt: skip
    """Adds up the parts of a head, in their order, whichever program does so: two or three where rows are
    many."""
    m_range, d_range = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (m_range[:, None] < GROUP) & (d_range[None, :] < D)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for program in range(first, last + 1):
        member = (2 * program + (program == first).to(tl.int32)) * GROUP + m_range
        # Not through L1, which is not kept equal to what other programs stored.
        part_best = tl.load(stats + member * 2, mask=m_range < GROUP, other=0.0, cache_modifier=".cg")
        part_norm = tl.load(stats + member * 2 + 1, mask=m_range < GROUP, other=1.0, cache_modifier=".cg")
        part = tl.load(
            parts + member[:, None] * D + d_range[None, :], mask=inside, other=0.0, cache_modifier=".cg"
        )
        higher = tl.maximum(best, part_best)
        factor, shrink = tl.exp2(part_best - higher), tl.exp2(best - higher)
        norm = norm * shrink + part_norm * factor
        acc = acc * shrink[:, None] + part * factor[:, None]
        best = higher
    return acc / norm[:, None]


@triton.jit
def _attend(q, key_cache, value_cache, table, head, low, high, length, window, scale,
            HK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """Sums over the tiles `low` to `high` of one head: weighted values, largest score, sum of the weights."""
    d_range = tl.arange(0, BLOCK_D)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    # Summed over the tokens of a tile at the end only, which saves a reduction across warps in each tile.
    norm = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for tile in tl.range(low, high):
        token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        seen = token < length
        if WINDOW:
            seen &= token >= length - window
        block = tl.load(table + token // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        at = (block * HK + head) * (BLOCK_SIZE * D) + (token % BLOCK_SIZE) * D
        at = at[:, None] + d_range[None, :]
        inside = seen[:, None]
        if BLOCK_D != D:
            inside &= d_range[None, :] < D
        keys = tl.load(key_cache + at, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(best - higher)
        norm = norm * shrink[:, None] + weights
        values = tl.load(value_cache + at, mask=inside, other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        best = higher
    return acc, best, tl.sum(norm, 1)


@triton.jit
def _combine(out, parts, stats, begun, query_start, out_stride,
             HK: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
             BLOCK_S: tl.constexpr, RAGGED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Adds up the parts of the head that `_decode`'s program of the same number began and others finished."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    low, member = tl.program_id(0), tl.program_id(1)
    unfinished, high = tl.load(begun + 2 * low), tl.load(begun + 2 * low + 1)
    if unfinished >= 0:
        row, head = unfinished // HK, unfinished % HK
        d_range = tl.arange(0, BLOCK_D)
        best = float("-inf")
        norm = 0.0
        acc = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(low, high + 1, BLOCK_S):
            program = start + tl.arange(0, BLOCK_S)
            there = program <= high
            slot = (2 * program + (program == low).to(tl.int32)) * GROUP + member
            part_best = tl.load(stats + 2 * slot, mask=there, other=float("-inf"))
            part_norm = tl.load(stats + 2 * slot + 1, mask=there, other=0.0)
            inside = there[:, None] & (d_range[None, :] < D)
            part = tl.load(parts + slot[:, None] * D + d_range[None, :], mask=inside, other=0.0)
            higher = tl.maximum(best, tl.max(part_best, 0))
            factor = tl.exp2(part_best - higher)
            shrink = tl.exp2(best - higher)
            norm = norm * shrink + tl.sum(part_norm * factor, 0)
            acc = acc * shrink + tl.sum(part * factor[:, None], 0)
            best = higher
        query = tl.load(query_start + row) if RAGGED else row
        at = out + query.to(tl.int64) * out_stride + (head * GROUP + member) * D + d_range
        tl.store(at, (acc / norm).to(out.dtype.element_ty), mask=d_range < D)
