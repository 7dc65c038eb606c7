"""The call of cpu/sample.c, which draws tokens on the CPU: its structures, and what C cannot check itself."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from kernels.cpu.build import library
from kernels.cpu.functions import fields, i32, i64, ptr

if TYPE_CHECKING:
    from kernels.sample import Features, Sampled, SamplingColumns

# In C's order.
_COLUMNS = (
    "temperature top_k top_p min_p presence frequency repetition seed min_tokens stop_ids bias_ids "
    "bias_values num_logprobs"
)
_INTEGERS = ("top_k", "min_tokens", "stop_ids", "bias_ids", "num_logprobs")
_COLUMN_DTYPES = {
    **dict.fromkeys(_COLUMNS.split(), torch.float32),
    **dict.fromkeys(_INTEGERS, torch.int32),
    "seed": torch.int64,
}


class CColumns(ctypes.Structure):
    """`sample_columns` of cpu/sample.c."""

    _fields_ = fields((ptr, _COLUMNS), (i32, "max_stop_ids max_bias"))


class _CArgs(ctypes.Structure):
    """`sample_args` of cpu/sample.c."""

    _fields_ = fields(
        (ptr, "logits slots columns tokens num_tokens num_prompt token_ids finite"),
        (ptr, "token_logprob rank top_ids top_logprobs"),
        (i64, "logits_stride tokens_stride"),
        (i32, "num_rows vocab_size is_bf16 any_random any_filter any_penalty any_bias any_min_tokens"),
        (i32, "max_logprobs out_of_memory"),
    )


def _pointer(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """Address of a tensor that C is to read, row after row."""
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise TypeError(
            f"{name} must be a contiguous {dtype} tensor on the CPU, not {tensor.dtype} on {tensor.device}"
        )
    return tensor.data_ptr()


def c_columns(columns: SamplingColumns) -> CColumns:
    """C's view of the columns.

    Raises:
        TypeError: a column is not of its type, contiguous and on the CPU.
    """
    pointers = {name: _pointer(name, getattr(columns, name), dtype) for name, dtype in _COLUMN_DTYPES.items()}
    return CColumns(**pointers, max_stop_ids=columns.stop_ids.shape[1], max_bias=columns.bias_ids.shape[1])


def sample(
    logits: torch.Tensor, slots: torch.Tensor, columns: SamplingColumns, tokens: torch.Tensor,
    num_tokens: torch.Tensor, num_prompt: torch.Tensor, vocab_size: int, features: Features, sampled: Sampled,
) -> None:  # fmt: skip
    """`kernels.sample.sample`, whose arguments and errors these are, into `sampled`.

    The library must be there.
    """
    if logits.stride(1) != 1 or logits.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError("logits must be float32 or bfloat16, and contiguous along the vocabulary")
    args = _CArgs(
        logits=logits.data_ptr(), slots=_pointer("slots", slots, torch.int64),
        columns=ctypes.addressof(columns.c_columns), tokens=_pointer("tokens", tokens, torch.int32),
        num_tokens=_pointer("num_tokens", num_tokens, torch.int32),
        num_prompt=_pointer("num_prompt", num_prompt, torch.int32), token_ids=sampled.token_ids.data_ptr(),
        finite=sampled.finite.data_ptr(), logits_stride=logits.stride(0), tokens_stride=tokens.stride(0),
        num_rows=logits.shape[0], vocab_size=vocab_size, is_bf16=logits.dtype == torch.bfloat16,
        any_random=features.any_random, any_filter=features.any_filter, any_penalty=features.any_penalty,
        any_bias=features.any_bias, any_min_tokens=features.any_min_tokens, max_logprobs=-1,
    )  # fmt: skip
    if (logprobs := sampled.logprobs) is not None:
        args.max_logprobs = logprobs.top_ids.shape[1]
        for name, column in vars(logprobs).items():
            setattr(args, name, column.data_ptr())
    lib = library()
    assert lib is not None
    if lib.pagoda_sample(ctypes.byref(args)):
        raise MemoryError("no memory for the scratch buffers of sampling")
