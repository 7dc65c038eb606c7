"""`kernels.norm` on CUDA, and the first norm of a stack of skinny products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.cuda.device import launch, traits


@triton.jit
def rms_norm_kernel(
    x, weight, residual, out, stride_x, stride_residual, stride_out, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program a head; rows are heads next to each other."""
    row, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    dim = tl.arange(0, BLOCK)
    inside = dim < DIM
    factor = tl.load(weight + dim, mask=inside, other=0.0).to(tl.float32)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    place = head * DIM + dim
    wide = tl.load(x + row * stride_x + place, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        sums = residual + row * stride_residual + place
        rounded = (wide + tl.load(sums, mask=inside, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(sums, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / DIM + eps)
    normed = (wide * scale).to(x.dtype.element_ty).to(tl.float32) * factor
    tl.store(out + row * stride_out + place, normed.to(out.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """See `kernels.norm.rms_norm` and, with x of three dims, `head_rms_norm`; arguments are checked there."""
    heads, dim = (1, x.shape[1]) if x.dim() == 2 else x.shape[1:]
    overlaps = traits(x.device).overlaps
    launch(
        rms_norm_kernel, (x.shape[0] * heads,), x, weight, residual, out,
        x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0), eps,
        HEADS=heads, DIM=dim, BLOCK=triton.next_power_of_2(dim), OVERLAPS=overlaps,
        overlaps=overlaps, num_warps=warps_of(dim),
    )  # fmt: skip
    return out


@triton.jit
def scale_and_square_kernel(
    x, weight, scaled, squares, DIM: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):
    """One program a row."""
    row, dim = tl.program_id(0), tl.arange(0, BLOCK)
    inside = dim < DIM
    factor = tl.load(weight + dim, mask=inside, other=0.0).to(tl.float32)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    wide = tl.load(x + row * DIM + dim, mask=inside, other=0.0).to(tl.float32)
    tl.store(scaled + row * DIM + dim, (wide * factor).to(scaled.dtype.element_ty), mask=inside)
    tl.store(squares + row, tl.sum(wide * wide, axis=0))


def scale_and_square(
    x: torch.Tensor, weight: torch.Tensor, scaled: torch.Tensor, squares: torch.Tensor
) -> None:
    """Writes x * weight, [T, H] contiguous, to `scaled` and each row's sum of squares to `squares[:T]`."""
    overlaps = traits(x.device).overlaps
    rows, dim = x.shape
    launch(
        scale_and_square_kernel, (rows,), x, weight, scaled, squares,
        DIM=dim, BLOCK=triton.next_power_of_2(dim), OVERLAPS=overlaps,
        overlaps=overlaps, num_warps=warps_of(dim),
    )  # fmt: skip


def warps_of(dim: int) -> int:
    """Eight numbers or so for every thread."""
    return min(16, max(1, triton.next_power_of_2(dim) // 256))
