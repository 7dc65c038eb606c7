"""Products of few rows with a large matrix, whose time is that of reading it; what follows them is fused.

A program sums BN rows of the weights over all columns, or over one of SPLIT ranges of columns. In the second
case the program that comes last to a tile adds the tile's parts, in a fixed order: which one that is differs
from run to run, the result does not.

RMS norm is cut in two. Whoever writes a row also writes it multiplied by the norm's weight, and sums of its
squares, a tile each. The next product reads the former, and multiplies its sums by 1 / sqrt(mean + eps) at
its end. So no program waits for a whole row, and the loop over columns does nothing but load and multiply.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.cuda.meet import addresses
from kernels.cuda.prefetch import prefetch

# Threads of one program that ask for weights ahead of time, one piece of a row each.
PIECES = tl.constexpr(128)


@triton.jit
def _prefetch(weight, rows, K, first, BN: tl.constexpr, SPAN: tl.constexpr):
    """Brings SPAN columns of each row to L2 without waiting for them."""
    COUNT: tl.constexpr = PIECES // BN if BN < PIECES else 1
    PIECE: tl.constexpr = SPAN // COUNT
    column = tl.minimum(first, K - SPAN) + tl.arange(0, COUNT) * PIECE
    pointers = weight + rows.to(tl.int64)[:, None] * K + column[None, :]
    prefetch(pointers, PIECE * (weight.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit
def _enter(weight, rows, K, first, BN: tl.constexpr, SPAN: tl.constexpr, OVERLAPS: tl.constexpr):
    """Until this returns, a kernel may read nothing but weights: the one before it may still be running.

    The next kernel is let in only then. When it was let in at once, kernels queued up three deep on the
    multiprocessors, and every other down projection of a small model took 24 us instead of 9 (H100).
    """
    if OVERLAPS:
        if SPAN > 0:
            _prefetch(weight, rows, K, first, BN, SPAN)
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _columns(split, K, BK: tl.constexpr, SPLIT: tl.constexpr):
    """The columns [first, end) of one of SPLIT ranges."""
    size = tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
    return split * size, tl.minimum(split * size + size, K)


@triton.jit
def _multiply(
    x, weight, rows, M, K, stride_x, first, end,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """float32 [BM, BN]: x times `rows` of the weights over columns [first, end)."""
    token, column = tl.arange(0, BM), tl.arange(0, BK)
    xs = x + token[:, None] * stride_x + (first + column)[None, :]
    ws = weight + rows.to(tl.int64)[:, None] * K + (first + column)[None, :]
    is_token = (token < M)[:, None]
    total = tl.zeros([BN if SWAP else BM, BM if SWAP else BN], tl.float32)
    for start in range(first, end, BK):
        if WHOLE:
            a = tl.load(xs, mask=is_token, other=0.0, eviction_policy="evict_last")
            b = tl.load(ws, eviction_policy="evict_first")
        else:
            inside = (start + column < K)[None, :]
            a = tl.load(xs, mask=is_token & inside, other=0.0, eviction_policy="evict_last")
            b = tl.load(ws, mask=inside, other=0.0, eviction_policy="evict_first")
        if SWAP:
            total = tl.dot(b, tl.trans(a), total, input_precision="ieee")
        else:
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        xs += BK
        ws += BK
    if SWAP:
        total = tl.trans(total)
    return total


@triton.jit
def _deposit(total, partial, arrivals, tile, split, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Leaves this range's part of the tile for the program that comes last; whether that is this one."""
    cell = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    tl.store(partial + (tile * SPLIT + split) * (BM * BN) + cell, total)
    tl.debug_barrier()  # all of this program's parts are stored before its arrival is
    return tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLIT - 1


@triton.jit
def _collect(partial, arrivals, tile, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The sum of the tile's parts, in their order."""
    cell = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    for split in range(SPLIT):
        # Not through L1, which is not kept equal to what other programs stored.
        total += tl.load(partial + (tile * SPLIT + split) * (BM * BN) + cell, cache_modifier=".cg")
    tl.store(arrivals + tile, 0)
    return total


@triton.jit
def _load_squares(squares, count, BM: tl.constexpr, PARTS: tl.constexpr):
    """float32 [PARTS, BM]: sums of x's squares. Added up only behind the loop, they arrive during it."""
    part = tl.arange(0, PARTS)[:, None]
    return tl.load(squares + part * BM + tl.arange(0, BM)[None, :], mask=part < count, other=0.0)


@triton.jit
def _normed(total, squares, K, eps):
    return total * tl.rsqrt(tl.sum(squares, axis=0) / K + eps)[:, None]


@triton.jit
def _with_bias(total, bias, rows):
    if bias is not None:
        total += tl.load(bias + rows)[None, :]
    return total


@triton.jit
def _store_linear(
    total, bias, out, peers, tile, rows, M, N, stride_out, BM: tl.constexpr, BN: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """To `out`, or to the same place in the memory of each rank."""
    token, row = tl.arange(0, BM), tile * BN + tl.arange(0, BN)
    inside = (token < M)[:, None] & (row < N)[None, :]
    total = _with_bias(total, bias, rows).to(out.dtype.element_ty)
    place = token.to(tl.int64)[:, None] * stride_out + row[None, :]
    if RANKS == 0:
        tl.store(out + place, total, mask=inside)
    for peer in tl.static_range(RANKS):
        tl.store(peers[peer] + place, total, mask=inside)


@triton.jit(do_not_specialize=["M", "count"])
def linear_kernel(
    x, weight, bias, squares, out, remotes, partial, arrivals,
    M, N, K, count, stride_x, stride_out, eps,
    PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE: tl.constexpr, SWAP: tl.constexpr, SPAN: tl.constexpr, OVERLAPS: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """out = x W^T + bias; with `squares`, of x's RMS norm; with RANKS, in what `remotes` name instead."""
    tile, split = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    peers = addresses(remotes, out, RANKS)
    rows = tl.minimum(tile * BN + tl.arange(0, BN), N - 1)
    first, end = _columns(split, K, BK, SPLIT)
    _enter(weight, rows, K, first, BN, SPAN, OVERLAPS)
    total = _multiply(x, weight, rows, M, K, stride_x, first, end, BM, BN, BK, WHOLE, SWAP)
    if squares is not None:
        total = _normed(total, _load_squares(squares, count, BM, PARTS), K, eps)
    if SPLIT == 1:
        _store_linear(total, bias, out, peers, tile, rows, M, N, stride_out, BM, BN, RANKS)
    elif _deposit(total, partial, arrivals, tile, split, SPLIT, BM, BN):
        total = _collect(partial, arrivals, tile, SPLIT, BM, BN)
        _store_linear(total, bias, out, peers, tile, rows, M, N, stride_out, BM, BN, RANKS)


@triton.jit
def _store_sum(
    total, bias, hidden, norm, scaled, squares, tile, rows, M, N, BM: tl.constexpr, BN: tl.constexpr
):
    token, row = tl.arange(0, BM), tile * BN + tl.arange(0, BN)
    inside = (token < M)[:, None] & (row < N)[None, :]
    place = token[:, None] * N + row[None, :]
    total = _with_bias(total, bias, rows) + tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
    total = total.to(hidden.dtype.element_ty)
    tl.store(hidden + place, total, mask=inside)
    total = total.to(tl.float32)
    factor = tl.load(norm + rows).to(tl.float32)
    tl.store(scaled + place, (total * factor[None, :]).to(scaled.dtype.element_ty), mask=inside)
    tl.store(squares + tile * BM + token, tl.sum(tl.where(inside, total * total, 0.0), axis=1))


@triton.jit(do_not_specialize=["M"])
def residual_kernel(
    x, weight, bias, hidden, norm, scaled, squares, partial, arrivals,
    M, N, K, stride_x,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE: tl.constexpr, SWAP: tl.constexpr, SPAN: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """hidden += x W^T + bias, and what the next norm is made of: hidden * norm and sums of squares."""
    tile, split = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    rows = tl.minimum(tile * BN + tl.arange(0, BN), N - 1)
    first, end = _columns(split, K, BK, SPLIT)
    _enter(weight, rows, K, first, BN, SPAN, OVERLAPS)
    total = _multiply(x, weight, rows, M, K, stride_x, first, end, BM, BN, BK, WHOLE, SWAP)
    if SPLIT == 1:
        _store_sum(total, bias, hidden, norm, scaled, squares, tile, rows, M, N, BM, BN)
    elif _deposit(total, partial, arrivals, tile, split, SPLIT, BM, BN):
        total = _collect(partial, arrivals, tile, SPLIT, BM, BN)
        _store_sum(total, bias, hidden, norm, scaled, squares, tile, rows, M, N, BM, BN)


@triton.jit
def _store_gated(total, bias, out, tile, rows, M, N, BM: tl.constexpr, BN: tl.constexpr):
    gate, up = tl.split(tl.reshape(_with_bias(total, bias, rows), (BM, BN // 2, 2)))
    gate = gate / (1.0 + tl.exp(-gate))
    token, place = tl.arange(0, BM), tile * (BN // 2) + tl.arange(0, BN // 2)
    inside = (token < M)[:, None] & (place < N // 2)[None, :]
    where = out + token[:, None] * (N // 2) + place[None, :]
    tl.store(where, (gate * up).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "count"])
def gated_kernel(
    x, weight, bias, squares, out, partial, arrivals,
    M, N, K, count, stride_x, eps,
    PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE: tl.constexpr, SWAP: tl.constexpr, SPAN: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """out = silu(gates) * ups, of x's RMS norm. A tile takes gates and their ups in turn."""
    tile, split = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    place = tile * BN + tl.arange(0, BN)
    rows = tl.minimum(place // 2 + place % 2 * (N // 2), N - 1)
    first, end = _columns(split, K, BK, SPLIT)
    _enter(weight, rows, K, first, BN, SPAN, OVERLAPS)
    sums = _load_squares(squares, count, BM, PARTS)
    total = _multiply(x, weight, rows, M, K, stride_x, first, end, BM, BN, BK, WHOLE, SWAP)
    total = _normed(total, sums, K, eps)
    if SPLIT == 1:
        _store_gated(total, bias, out, tile, rows, M, N, BM, BN)
    elif _deposit(total, partial, arrivals, tile, split, SPLIT, BM, BN):
        total = _collect(partial, arrivals, tile, SPLIT, BM, BN)
        _store_gated(total, bias, out, tile, rows, M, N, BM, BN)


@triton.jit
def _store_rotated(
    total, bias, qkv, cos_sin, positions, slots, keys, values, tile, rows, M, N,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    a, b = tl.split(tl.reshape(_with_bias(total, bias, rows), (BM, BN // 2, 2)))
    token, pair = tl.arange(0, BM), tile * (BN // 2) + tl.arange(0, BN // 2)
    head, dim = pair // HALF, pair % HALF
    inside = (token < M)[:, None] & (pair < N // 2)[None, :]
    position = tl.load(positions + token, mask=token < M, other=0)
    angle = cos_sin + position[:, None] * (2 * HALF) + dim[None, :]
    turns = inside & (head < HEADS + KV_HEADS)[None, :]
    cos = tl.load(angle, mask=turns, other=1.0)
    sin = tl.load(angle + HALF, mask=turns, other=0.0)
    one = (a * cos - b * sin).to(qkv.dtype.element_ty)
    two = (b * cos + a * sin).to(qkv.dtype.element_ty)
    place = qkv + token[:, None] * N + (head * (2 * HALF) + dim)[None, :]
    tl.store(place, one, mask=inside)
    tl.store(place + HALF, two, mask=inside)
    slot = tl.load(slots + token, mask=token < M, other=-1)
    row = (slot // BLOCK_SIZE * KV_HEADS * BLOCK_SIZE + slot % BLOCK_SIZE)[:, None]
    row += ((head - HEADS) % KV_HEADS * BLOCK_SIZE)[None, :]
    cell = row * (2 * HALF) + dim[None, :]
    written = inside & (slot >= 0)[:, None]
    is_key = written & ((head >= HEADS) & (head < HEADS + KV_HEADS))[None, :]
    tl.store(keys + cell, one, mask=is_key)
    tl.store(keys + cell + HALF, two, mask=is_key)
    is_value = written & (head >= HEADS + KV_HEADS)[None, :]
    tl.store(values + cell, one, mask=is_value)
    tl.store(values + cell + HALF, two, mask=is_value)


@triton.jit(do_not_specialize=["M", "count"])
def rotated_kernel(
    x, weight, bias, squares, qkv, cos_sin, positions, slots, keys, values, partial, arrivals,
    M, N, K, count, stride_x, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE: tl.constexpr, SWAP: tl.constexpr, SPAN: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """qkv = x's RMS norm W^T + bias, q and k rotated, k and v also written to their slots.

    A tile takes dims i and i + HALF of a head, which turn together, in turn.
    """
    tile, split = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    place = tile * BN + tl.arange(0, BN)
    pair = place // 2
    rows = tl.minimum(pair // HALF * (2 * HALF) + pair % HALF + place % 2 * HALF, N - 1)
    first, end = _columns(split, K, BK, SPLIT)
    _enter(weight, rows, K, first, BN, SPAN, OVERLAPS)
    sums = _load_squares(squares, count, BM, PARTS)
    total = _multiply(x, weight, rows, M, K, stride_x, first, end, BM, BN, BK, WHOLE, SWAP)
    total = _normed(total, sums, K, eps)
    if SPLIT == 1:
        _store_rotated(
            total, bias, qkv, cos_sin, positions, slots, keys, values, tile, rows, M, N,
            HEADS, KV_HEADS, HALF, BLOCK_SIZE, BM, BN,
        )  # fmt: skip
    elif _deposit(total, partial, arrivals, tile, split, SPLIT, BM, BN):
        total = _collect(partial, arrivals, tile, SPLIT, BM, BN)
        _store_rotated(
            total, bias, qkv, cos_sin, positions, slots, keys, values, tile, rows, M, N,
            HEADS, KV_HEADS, HALF, BLOCK_SIZE, BM, BN,
        )  # fmt: skip
