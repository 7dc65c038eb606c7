"""Ruling out tokens on CUDA, in one launch that reads bits and writes only what it rules out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048
"""Tokens that a program looks at."""


@triton.jit
def allow_kernel(logits, rows, bits, stride, num_words, width, BLOCK: tl.constexpr):
    """A block of one row of logits [R, stride]; `width` of a row's tokens have bits, 32 in each word."""
    row = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    word = tl.load(bits + row * num_words + place // 32, mask=inside, other=-1)
    ruled_out = inside & (((word >> (place % 32)) & 1) == 0)
    logits += tl.load(rows + row).to(tl.int64) * stride
    tl.store(logits + place, float("-inf"), mask=ruled_out)


def allow(logits: torch.Tensor, rows: torch.Tensor, bits: torch.Tensor) -> None:
    """See `kernels.sample.allow`."""
    count, words = bits.shape
    width = min(32 * words, logits.shape[1])
    allow_kernel[(triton.cdiv(width, BLOCK), count)](
        logits, rows, bits, logits.stride(0), words, width, BLOCK=BLOCK
    )
