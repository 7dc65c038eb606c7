"""The call of cpu/sample.c, which draws tokens on the CPU: its structures, and what C cannot check itself."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from kernels.cpu.build import library

if TYPE_CHECKING:
    from kernels.sample import Features, Sampled, SamplingColumns

_COLUMN_DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "presence": torch.float32,
    "frequency": torch.float32,
    "repetition": torch.float32,
    "seed": torch.int64,
    "min_tokens": torch.int32,
    "stop_ids": torch.int32,
    "bias_ids": torch.int32,
    "bias_values": torch.float32,
    "num_logprobs": torch.int32,
}


class CColumns(ctypes.Structure):
    """`sample_columns` of cpu/sample.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _COLUMN_DTYPES),
        ("max_stop_ids", ctypes.c_int32),
        ("max_bias", ctypes.c_int32),
    )


class _CArgs(ctypes.Structure):
    """`sample_args` of cpu/sample.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "slots", "columns", "tokens", "num_tokens")),
        *((name, ctypes.c_void_p) for name in ("num_prompt", "token_ids", "finite")),
        *((name, ctypes.c_void_p) for name in ("token_logprob", "rank", "top_ids", "top_logprobs")),
        *((name, ctypes.c_int64) for name in ("logits_stride", "tokens_stride")),
        *(
            (name, ctypes.c_int32)
            for name in ("num_rows", "vocab_size", "is_bf16", "any_random", "any_filter")
        ),
        *((name, ctypes.c_int32) for name in ("any_penalty", "any_bias", "any_min_tokens", "max_logprobs")),
        ("out_of_memory", ctypes.c_int32),
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
        args.token_logprob = logprobs.token_logprob.data_ptr()
        args.rank = logprobs.rank.data_ptr()
        args.top_ids = logprobs.top_ids.data_ptr()
        args.top_logprobs = logprobs.top_logprobs.data_ptr()
    lib = library()
    assert lib is not None
    if lib.pagoda_sample(ctypes.byref(args)):
        raise MemoryError("no memory for the scratch buffers of sampling")
