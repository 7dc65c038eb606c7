"""`kernels.blocks` on CUDA: all layers' copies in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WORDS = 1024


@triton.jit
def _copy_blocks_kernel(pool, src, dst, cache_words, block_words, WORDS: tl.constexpr):
    """Program (n, c, i) copies piece i of pair n in cache c; a word is 64 bits."""
    pair, cache = tl.program_id(0), tl.program_id(1).to(tl.int64)
    word = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    base = pool + cache * cache_words
    inside = word < block_words
    values = tl.load(base + tl.load(src + pair) * block_words + word, mask=inside)
    tl.store(base + tl.load(dst + pair) * block_words + word, values, mask=inside)


def copy_blocks(caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor) -> None:
    """See `kernels.blocks.copy_blocks`; the caches must lie at equal distances, as slices of one pool do."""
    first = caches[0]
    distance = caches[1].data_ptr() - first.data_ptr() if len(caches) > 1 else first.nbytes
    if any(c.data_ptr() != first.data_ptr() + i * distance for i, c in enumerate(caches)):
        raise ValueError("caches must be slices of one pool")
    block_words = first.nbytes // len(first) // 8
    grid = (src.numel(), len(caches), triton.cdiv(block_words, WORDS))
    _copy_blocks_kernel[grid](
        first.view(torch.int64).view(-1), src, dst, distance // 8, block_words, WORDS=WORDS, num_warps=4
    )
