"""`kernels.activation` on CUDA."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.cuda.device import launch

BLOCK = 2048


@triton.jit
def silu_and_mul_kernel(gate_up, out, width, stride_in, stride_out, BLOCK: tl.constexpr):
    """Program (t, i) has piece i of row t."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gates = gate_up + row * stride_in + column
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gates + width, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * stride_out + column, result.to(out.dtype.element_ty), mask=inside)


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See `kernels.activation.silu_and_mul`; arguments are checked there."""
    rows, width = out.shape
    launch(
        silu_and_mul_kernel, (rows, triton.cdiv(width, BLOCK)),
        gate_up, out, width, gate_up.stride(0), out.stride(0), BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return out
