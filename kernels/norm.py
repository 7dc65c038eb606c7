"""RMS norm, with the addition of the residual before it (Zhang and Sennrich 2019, as Llama uses it)."""

import functools

import torch

from kernels.cpu.functions import f32, function, i32, i64, ptr

FLOATS = (torch.float32, torch.bfloat16)


@functools.cache
def _c_rms_norm():
    return function("pagoda_rms_norm", ptr, ptr, ptr, ptr, i64, i64, i64, i64, i32, i32, i32, f32)


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
    rows, dim = x.shape
    if x.dtype not in FLOATS or x.stride(1) != 1:
        raise ValueError(f"x must be float32 or bfloat16 with unit stride, not {x.dtype}, {x.stride()}")
    narrows = x.is_cuda and x.dtype is torch.float32 and weight.dtype in FLOATS
    if weight.shape != (dim,) or not (weight.dtype == x.dtype or narrows) or not weight.is_contiguous():
        raise ValueError(f"weight must be {x.dtype} [{dim}], not {weight.dtype} {tuple(weight.shape)}")
    if residual is not None:
        _check_like("residual", residual, x.shape, x.dtype)
    if out is None:
        out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    else:
        _check_like("out", out, x.shape, weight.dtype)
    if x.is_cpu and (c := _c_rms_norm()) is not None:
        c(
            x.data_ptr(), None if residual is None else residual.data_ptr(), weight.data_ptr(),
            out.data_ptr(), x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0), rows,
            1, dim, x.dtype is torch.bfloat16, eps,
        )  # fmt: skip
        return out
    if x.is_cuda:
        from kernels.cuda import norm

        return norm.rms_norm(x, weight, eps, residual, out)
    return rms_norm_reference(x, weight, eps, residual, out)


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
    rows, heads, dim = x.shape
    if x.dtype not in FLOATS or x.stride()[1:] != (dim, 1):
        raise ValueError(f"x must be float32 or bfloat16 with contiguous heads, not {x.dtype}, {x.stride()}")
    if weight.shape != (dim,) or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(f"weight must be {x.dtype} [{dim}], not {weight.dtype} {tuple(weight.shape)}")
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    elif out.shape != x.shape or out.dtype != x.dtype or out.stride()[1:] != (dim, 1):
        raise ValueError(f"out must be {x.dtype} {tuple(x.shape)}, not {out.dtype} {tuple(out.shape)}")
    if x.is_cpu and (c := _c_rms_norm()) is not None:
        is_bf16 = x.dtype is torch.bfloat16
        c(
            x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), x.stride(0), 0, out.stride(0), rows, heads,
            dim, is_bf16, eps,
        )  # fmt: skip
        return out
    if x.is_cuda:
        from kernels.cuda import norm

        return norm.rms_norm(x, weight, eps, None, out)
    return rms_norm_reference(x, weight, eps, None, out)


def _check_like(name: str, tensor: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.stride(1) != 1:
        raise ValueError(f"{name} must be {dtype} {tuple(shape)}, not {tensor.dtype}, {tensor.shape}")
