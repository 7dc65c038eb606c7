"""`kernels.linear` on CUDA: for few rows the products of `skinny`, for more the vendor's library."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from kernels.cuda import skinny
from kernels.cuda.cublaslt import chosen
from kernels.cuda.device import launch, traits
from kernels.linear import PackedLinear

# Up to so many rows of bfloat16 a product's time is that of reading the weights.
SKINNY_ROWS = 64
# Room for the parts of tiles whose columns are split, and for counting them.
PARTIAL_FLOATS = 4 << 20
MAX_TILES = 4096


class Tile(NamedTuple):
    """How a product of few rows is cut.

    Attributes:
        rows: of the weights, for one program.
        depth: columns that it takes at a time.
        stages: how many of those are on their way or in use.
        split: into how many ranges the columns are cut, a program each.
        swap: whether the weights are the left operand: Hopper's instructions take 64 rows of that at least.
        span: columns of each row to bring to L2 before the kernel in front has ended.
        warps: of one program.
    """

    rows: int
    depth: int
    stages: int
    split: int = 1
    swap: bool = False
    span: int = 0
    warps: int = 4


# Measured on an H100 by benchmarks/gpu_tiles.py and gpu_linear.py, by (N, K, rows of x rounded up as by
# `padded_rows`).
TILES: dict[tuple[int, int, int], Tile] = {
    (4608, 3584, 16): Tile(64, 128, 4, split=5, swap=True),
    (4608, 3584, 32): Tile(32, 128, 6, span=512),
    (4608, 3584, 64): Tile(64, 128, 3, split=3),
    (3584, 3584, 16): Tile(32, 128, 6, split=3),
    (3584, 3584, 32): Tile(64, 128, 4, split=2, swap=True, span=512),
    (3584, 3584, 64): Tile(64, 64, 5, split=2),
    (37888, 3584, 16): Tile(32, 256, 4),
    (37888, 3584, 32): Tile(64, 128, 4, swap=True, span=256),
    (37888, 3584, 64): Tile(64, 128, 3),
    (3584, 18944, 16): Tile(64, 128, 4, split=4, swap=True),
    (3584, 18944, 32): Tile(64, 128, 3, split=7),
    (3584, 18944, 64): Tile(64, 128, 3, split=4),
    (152064, 3584, 16): Tile(64, 128, 4, swap=True, span=256),
    (152064, 3584, 32): Tile(64, 128, 4, swap=True, span=256),
    (152064, 3584, 64): Tile(64, 128, 3, span=256),
    # One of two ranks of the same model.
    (2304, 3584, 16): Tile(32, 128, 6, split=5, span=256),
    (2304, 3584, 32): Tile(64, 128, 4, split=3, swap=True, span=256),
    (2304, 3584, 64): Tile(32, 128, 4, split=3, span=256),
    (3584, 1792, 16): Tile(32, 128, 6, span=256),
    (3584, 1792, 32): Tile(32, 128, 6, span=256),
    (3584, 1792, 64): Tile(32, 128, 4, span=256),
    (18944, 3584, 16): Tile(32, 128, 6, span=256),
    (18944, 3584, 32): Tile(64, 128, 3, swap=True, span=256),
    (18944, 3584, 64): Tile(128, 64, 4),
    (3584, 9472, 16): Tile(64, 128, 4, split=7, span=256),
    (3584, 9472, 32): Tile(64, 128, 4, split=2, swap=True, span=256),
    (3584, 9472, 64): Tile(32, 128, 4, split=2, span=256),
    (76032, 3584, 16): Tile(64, 128, 4),
    (76032, 3584, 32): Tile(64, 128, 3, swap=True, span=256),
    (76032, 3584, 64): Tile(64, 128, 3, span=256),
    (1152, 896, 16): Tile(32, 128, 6, span=512),
    (1152, 896, 32): Tile(32, 128, 6, span=512),
    (1152, 896, 64): Tile(64, 128, 3),
    (896, 896, 16): Tile(16, 128, 6, span=512),
    (896, 896, 32): Tile(16, 128, 6, span=512),
    (896, 896, 64): Tile(32, 128, 4, span=512),
    (9728, 896, 16): Tile(64, 128, 4, swap=True),
    (9728, 896, 32): Tile(64, 128, 4, swap=True, span=256),
    (9728, 896, 64): Tile(128, 64, 4, swap=True),
    (896, 4864, 16): Tile(32, 128, 6, split=4),
    (896, 4864, 32): Tile(32, 64, 6, split=2, span=512),
    (896, 4864, 64): Tile(32, 128, 4, split=4),
    (151936, 896, 16): Tile(64, 128, 4),
    (151936, 896, 32): Tile(64, 128, 4, swap=True, span=256),
    (151936, 896, 64): Tile(64, 64, 5, span=256),
}


def padded_rows(rows: int) -> int:
    """The rows that a skinny product computes: 16, 32, 64 or 128."""
    return max(16, triton.next_power_of_2(rows))


def _default_tile(n: int, k: int, bm: int) -> Tile:
    """Enough programs for every multiprocessor, each with some 48 KiB of weights on their way."""
    depth = 128 if k % 128 == 0 else 64
    if n * k < 8 << 20:  # a small model's: over before a second part could pay
        return Tile(16, depth, 6, span=512)
    rows = {16: 32, 32: 64, 64: 128, 128: 128}[bm]
    if n >= 8192:
        return Tile(max(64, rows), 64 if bm >= 64 else depth, 4, span=256)
    split = max(1, round(120 / triton.cdiv(n, rows)))
    return Tile(rows, 64 if bm >= 64 else depth, 5, split, span=512)


@functools.cache
def choose_tile(n: int, k: int, bm: int, itemsize: int, device: torch.device) -> Tile:
    """The tile of a product, cut down to what the device can hold.

    Args:
        n: rows of the weights.
        k: columns of the weights.
        bm: rows of x, from `padded_rows`.
        itemsize: bytes of a weight.
        device: where it runs.
    """
    return fitted(TILES.get((n, k, bm)) or _default_tile(n, k, bm), n, k, bm, itemsize, device)


def fitted(tile: Tile, n: int, k: int, bm: int, itemsize: int, device: torch.device) -> Tile:
    """`tile` with as much of its stages, split and span as the device, the workspace and K allow."""
    shared_bytes, overlaps = traits(device).shared_bytes, traits(device).overlaps
    stage_bytes = (tile.rows + bm) * tile.depth * itemsize
    # What the epilogue needs of shared memory reuses the stages'.
    stages = max(1, min(tile.stages, shared_bytes // stage_bytes))
    tiles = triton.cdiv(n, tile.rows)
    fits = tiles <= MAX_TILES and tiles * tile.split * bm * tile.rows <= PARTIAL_FLOATS
    span = min(tile.span, k // 128 * 128) if overlaps and k % (16 // itemsize) == 0 else 0
    return tile._replace(
        stages=stages, split=tile.split if fits else 1, swap=tile.swap and overlaps, span=span
    )


@functools.cache
def workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts of split tiles, and how many of each tile's have arrived: zeros between two products.

    Made before any graph is captured, because a graph's own memory is not zeroed when it is captured.
    """
    return (
        torch.empty(PARTIAL_FLOATS, dtype=torch.float32, device=device),
        torch.zeros(MAX_TILES, dtype=torch.int32, device=device),
    )


class Normed(NamedTuple):
    """Rows whose RMS norm a skinny product takes as its input.

    Attributes:
        scaled: [T, K], the rows times the norm's weight.
        squares: [parts, padded_rows(T)] float32: sums of the rows' squares.
        parts: how many of `squares` count.
        eps: of the norm.
    """

    scaled: torch.Tensor
    squares: torch.Tensor
    parts: int
    eps: float


class Rotation(NamedTuple):
    """What `rotated_linear` needs beside the product; see `kernels.rope.rope_and_cache`."""

    cos_sin: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    num_heads: int


def _cut(x: torch.Tensor, packed: PackedLinear, tile: Tile | None) -> tuple[Tile, tuple[int, ...], dict]:
    """A product's tile, its grid, and the options that all kernels of `skinny` share."""
    bm, n, k = padded_rows(x.shape[0]), packed.out_features, packed.in_features
    if tile is None:
        tile = choose_tile(n, k, bm, x.itemsize, x.device)
    options = {
        "BM": bm,
        "BN": tile.rows,
        "BK": tile.depth,
        "SPLIT": tile.split,
        "WHOLE": k % tile.depth == 0,
        "SWAP": tile.swap,
        "SPAN": tile.span,
        "OVERLAPS": traits(x.device).overlaps,
        "overlaps": traits(x.device).overlaps,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return tile, (triton.cdiv(n, tile.rows) * tile.split,), options


def skinny_linear(
    x: torch.Tensor | Normed, packed: PackedLinear, out: torch.Tensor, tile: Tile | None = None,
    remotes: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x W^T + bias of few rows, [T, N]; x contiguous rows or those of a norm. With `remotes`, int64, it is
    written to each of these addresses, of memory laid out like `out`, one of which is `out`'s own."""
    squares, parts, eps = None, 0, 0.0
    if isinstance(x, Normed):
        x, squares, parts, eps = x
    tile, grid, options = _cut(x, packed, tile)
    launch(
        skinny.linear_kernel, grid, x, packed.data, packed.bias, squares, out, remotes, *workspace(x.device),
        x.shape[0], packed.out_features, packed.in_features, parts, x.stride(0), out.stride(0), eps,
        PARTS=triton.next_power_of_2(parts) if parts else 1, RANKS=0 if remotes is None else len(remotes),
        **options,
    )  # fmt: skip
    return out


def residual_linear(
    x: torch.Tensor,
    packed: PackedLinear,
    hidden: torch.Tensor,
    norm: torch.Tensor,
    normed: Normed,
    tile: Tile | None = None,
) -> Normed:
    """hidden += x W^T + bias of few rows; the sum's norm with weight [N], written to the tensors of `normed`.

    Args:
        x: [T, K] contiguous rows.
        packed: the weights.
        hidden: [T, N] contiguous, updated.
        norm: [N], the weight of the norm that comes next.
        normed: whose tensors to overwrite; its eps is that norm's.
        tile: how to cut it; `choose_tile` when None.
    """
    tile, grid, options = _cut(x, packed, tile)
    launch(
        skinny.residual_kernel, grid, x, packed.data, packed.bias, hidden, norm, normed.scaled,
        normed.squares, *workspace(x.device),
        x.shape[0], packed.out_features, packed.in_features, x.stride(0), **options,
    )  # fmt: skip
    return normed._replace(parts=triton.cdiv(packed.out_features, tile.rows))


def gated_linear(
    x: Normed, packed: PackedLinear, out: torch.Tensor, tile: Tile | None = None
) -> torch.Tensor:
    """silu(gates) * ups of few rows, [T, N / 2] contiguous; the weights are the gates', then the ups'."""
    tile, grid, options = _cut(x.scaled, packed, tile)
    launch(
        skinny.gated_kernel, grid, x.scaled, packed.data, packed.bias, x.squares, out,
        *workspace(out.device),
        out.shape[0], packed.out_features, packed.in_features, x.parts, x.scaled.stride(0), x.eps,
        PARTS=triton.next_power_of_2(x.parts), **options,
    )  # fmt: skip
    return out


def rotated_linear(
    x: Normed, packed: PackedLinear, rotation: Rotation, out: torch.Tensor, tile: Tile | None = None
) -> torch.Tensor:
    """q, k and v of few rows, [T, N] contiguous: q and k rotated, k and v also written to their slots."""
    tile, grid, options = _cut(x.scaled, packed, tile)
    _, num_kv_heads, block_size, dim = rotation.value_cache.shape
    launch(
        skinny.rotated_kernel, grid, x.scaled, packed.data, packed.bias, x.squares, out,
        *rotation[:5], *workspace(out.device),
        out.shape[0], packed.out_features, packed.in_features, x.parts, x.scaled.stride(0), x.eps,
        HEADS=rotation.num_heads, KV_HEADS=num_kv_heads, HALF=dim // 2, BLOCK_SIZE=block_size,
        PARTS=triton.next_power_of_2(x.parts), **options,
    )  # fmt: skip
    return out


def wide_linear(x: torch.Tensor, packed: PackedLinear, out: torch.Tensor) -> torch.Tensor:
    """x W^T + bias of any number of rows, by the vendor's library."""
    weight = packed.data.t()
    if out.dtype is not x.dtype:
        torch.mm(x, weight, out_dtype=out.dtype, out=out)
        return out if packed.bias is None else out.add_(packed.bias)
    if packed.bias_like_out is not None:
        return torch.addmm(packed.bias_like_out, x, weight, out=out)
    if x.dtype is torch.bfloat16 and x.is_contiguous() and out.is_contiguous():
        product = chosen(x.shape[0], packed.out_features, packed.in_features, x.device)
        if product is not None:
            return product(x, packed.data, out)
    return torch.mm(x, weight, out=out)


def linear(x: torch.Tensor, packed: PackedLinear, out: torch.Tensor) -> torch.Tensor:
    """See `kernels.linear.linear`; arguments are checked there."""
    if x.shape[0] <= SKINNY_ROWS and x.dtype is torch.bfloat16:
        return skinny_linear(x, packed, out)
    return wide_linear(x, packed, out)
