"""The gated activation of Llama's feed-forward block (SwiGLU, Shazeer 2020)."""

import torch

from kernels.checks import FLOATS, output
from kernels.cpu.functions import function, i32, i64, ptr

_c_silu_and_mul = function("pagoda_silu_and_mul", ptr, ptr, i64, i64, i64, i64, i32)


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up, computed in float32 and rounded once.

    Args:
        gate_up: [T, 2 I], float32 or bfloat16: the gates, then the ups.
        out: [T, I], written and returned. A new tensor when None.

    Raises:
        ValueError: a shape, type or stride is wrong; the message names the argument.
    """
    rows, width = gate_up.shape
    dtype = gate_up.dtype
    if dtype not in FLOATS or width % 2 or gate_up.stride(1) != 1:
        raise ValueError(
            f"gate_up must be float32 or bfloat16 [T, 2 I], unit stride, not {dtype} {tuple(gate_up.shape)}"
        )
    out = output(out, dtype, (rows, width // 2), (1,), gate_up.device)
    if gate_up.is_cpu and (c := _c_silu_and_mul()) is not None:
        c(
            gate_up.data_ptr(), out.data_ptr(), gate_up.stride(0), out.stride(0), rows, width // 2,
            dtype is torch.bfloat16,
        )  # fmt: skip
        return out
    if gate_up.is_cuda:
        from kernels.cuda import activation

        return activation.silu_and_mul(gate_up, out)
    return silu_and_mul_reference(gate_up, out)


def silu_and_mul_reference(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`silu_and_mul` in plain torch, on any device."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    result = (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)
    return result if out is None else out.copy_(result)
