"""Ruling out tokens on CUDA, in one launch that reads bits and writes only what it rules out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048
"""Tokens that a program looks at."""


@triton.jit
def allow_kernel(logits, masks, bits, stride, num_words, width, BLOCK: tl.constexpr):
    """A block of one row of logits [R, stride]; `width` of a row's tokens have bits, 32 in each word,
    perhaps in host memory; masks are `num_words` apart."""
    row = tl.program_id(1)
    mask = tl.load(masks + row)
    if mask >= 0:
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = place < width
        word = tl.load(bits + mask.to(tl.int64) * num_words + place // 32, mask=inside, other=-1)
        ruled_out = inside & (((word >> (place % 32)) & 1) == 0)
        tl.store(logits + row.to(tl.int64) * stride + place, float("-inf"), mask=ruled_out)


def allow(logits: torch.Tensor, masks: torch.Tensor, bits: torch.Tensor) -> None:
    """See `kernels.sample.allow`."""
    width = min(32 * bits.shape[1], logits.shape[1])
    allow_kernel[(triton.cdiv(width, BLOCK), logits.shape[0])](
        logits, masks, bits, logits.stride(0), bits.stride(0), width, BLOCK=BLOCK
    )
