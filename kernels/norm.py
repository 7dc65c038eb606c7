"""RMS norm, with the addition of the residual before it (Zhang and Sennrich 2019, as Llama uses it)."""

import torch

from kernels.checks import FLOATS, output, require
from kernels.cpu.functions import f32, function, i32, i64, ptr

_c_rms_norm = function("pagoda_rms_norm", ptr, ptr, ptr, ptr, i64, i64, i64, i64, i32, i32, i32, f32)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; with a residual, of their sum.

    Statistics are float32; the sum with the residual and the normed value are each rounded to x's type, as in
    transformers.

    Args:
        x: [T, H], float32 or bfloat16, unit stride in the last dim.
        weight: [H], the type of x; on CUDA also bfloat16 for a float32 x.
        eps: added to the mean square.
        residual: [T, H] or None, the type of x, which is added to it in place first.
        out: [T, H], the type of weight, written and returned; x itself is allowed. A new tensor when None.

    Raises:
        ValueError: a shape, type or stride is wrong; the message names the argument.
    """
    _, dim = x.shape
    if x.dtype not in FLOATS or x.stride(1) != 1:
        raise ValueError(f"x must be float32 or bfloat16 with unit stride, not {x.dtype}, {x.stride()}")
    narrows = x.is_cuda and x.dtype is torch.float32 and weight.dtype in FLOATS
    require("weight", weight, weight.dtype if narrows else x.dtype, (dim,))
    if residual is not None:
        require("residual", residual, x.dtype, x.shape, (1,))
    out = output(out, weight.dtype, x.shape, (1,), x.device)
    return _run(x, weight, eps, residual, out)


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`rms_norm` in plain torch, on any device; x may have more dims in front."""
    if residual is not None:
        x = residual.add_(x)
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    return normed if out is None else out.copy_(normed)


def head_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """RMS norm of every head by itself: the query and key norms of Qwen3.

    Args:
        x: [T, heads, D], float32 or bfloat16; the last two dims contiguous, so that it may be a view of a
            fused qkv projection.
        weight: [D], the type of x.
        eps: added to the mean square.
        out: [T, heads, D], written and returned; x itself is allowed. A new tensor when None.

    Raises:
        ValueError: a shape, type or stride is wrong; the message names the argument.
    """
    _, _, dim = x.shape
    if x.dtype not in FLOATS or x.stride()[1:] != (dim, 1):
        raise ValueError(f"x must be float32 or bfloat16 with contiguous heads, not {x.dtype}, {x.stride()}")
    require("weight", weight, x.dtype, (dim,))
    return _run(x, weight, eps, None, output(out, x.dtype, x.shape, (dim, 1), x.device))


def _run(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """Either norm, its arguments checked: x of two dims, or of three with the heads between."""
    if x.is_cpu and (c := _c_rms_norm()) is not None:
        heads = x.shape[1] if x.dim() == 3 else 1
        c(
            x.data_ptr(), None if residual is None else residual.data_ptr(), weight.data_ptr(),
            out.data_ptr(), x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
            x.shape[0], heads, x.shape[-1], x.dtype is torch.bfloat16, eps,
        )  # fmt: skip
        return out
    if x.is_cuda:
        from kernels.cuda import norm

        return norm.rms_norm(x, weight, eps, residual, out)
    return rms_norm_reference(x, weight, eps, residual, out)
