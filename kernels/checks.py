"""Checks of the tensors that an operation is given, with one form of message."""

import torch

FLOATS = (torch.float32, torch.bfloat16)


def require(
    name: str, x: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
) -> None:  # fmt: skip
    """Holds an argument to its type, its shape and how it lies in memory.

    Args:
        name: of the argument.
        x: the argument.
        dtype: what its type must be.
        shape: what its shape must be.
        strides: what its last strides must be; it must be contiguous when None.

    Raises:
        ValueError: it is otherwise; the message begins with its name.
    """
    if x is None or x.dtype != dtype or x.shape != shape or not _lies(x, strides):
        wanted = "contiguous" if strides is None else f"last strides {list(strides)}"
        found = "None" if x is None else f"{x.dtype} {list(x.shape)}, strides {list(x.stride())}"
        raise ValueError(f"{name} must be {dtype} {list(shape)}, {wanted}, not {found}")


def _lies(x: torch.Tensor, strides: tuple[int, ...] | None) -> bool:
    return x.is_contiguous() if strides is None else x.stride()[-len(strides) :] == strides


def output(
    out: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...],
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """The argument `out`, held to this by `require`; a new tensor when None."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    require("out", out, dtype, shape, strides)
    return out
